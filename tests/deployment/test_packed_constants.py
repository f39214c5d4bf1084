"""The file of constants is as small as the policy says, and what is unpacked of it are the kernels' own buffers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import quantizers as Q
from haq import data, networks
from haq.deployment import tvm as tvm_code
from haq.deployment.exporter import policy_storage_bytes
from haq.deployment.graph import capture
from haq.deployment.lowering import lower
from hw_models import load_target
from hw_models.tvm_cpu import kernels, packing
from hw_models.tvm_cpu.builder import Argument, Builder, Epilogue
from hw_models.tvm_cpu.conv import Conv, weight_range
from hw_models.tvm_cpu.cpu import Cpu
from hw_models.tvm_cpu.kernel import Kernel

tvm = pytest.importorskip("tvm")

MOST = 1.1  # times the storage that the search prints
TARGETS = {
    "vnni": {"kind": "llvm", "mcpu": "znver4"},
    "madd": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "sdot": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]},
    "plain": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
}


def unpacked(made: Sequence[Kernel], weights: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Run the code that unpacks here, whatever processor the layouts are for."""
    functions = {}
    calls = []
    for index, (kernel, array) in enumerate(zip(made, weights, strict=True)):
        packed, (stored,) = packing.pack([array])
        buffers = {a.name: a for stage in kernel.arguments().values() for a in stage if a.name in kernel.of_weights()}
        b = Builder()

        def body(given: dict, b: Builder = b, kernel: Kernel = kernel, stored: packing.Stored = stored) -> None:
            kernel.unpack(
                b, {n: v for n, v in given.items() if n != "packed"}, lambda at: stored.value(b, given["packed"], at)
            )

        functions[f"k{index}"] = b.function(f"k{index}", [Argument("packed", packed.shape, "uint8"), *buffers.values()], body)
        # What is left in them mustn't matter.
        calls.append((packed, {a.name: np.full(np.prod(a.shape), 77, a.dtype) for a in buffers.values()}))
    plainly = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    module = tvm.compile(tvm.IRModule(functions), target=plainly)
    found = []
    for index, (packed, empty) in enumerate(calls):
        arrays = {name: tvm.runtime.tensor(array) for name, array in empty.items()}
        module[f"k{index}"](tvm.runtime.tensor(packed), *arrays.values())
        found.append({name: array.numpy() for name, array in arrays.items()})
    return found


def draw(kernel: Kernel, rng: np.random.Generator) -> np.ndarray:
    conv = kernel.conv
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
    if kernel.is_float:
        return rng.normal(size=shape).astype(np.float32)
    if kernel.w_bits == 1:
        return rng.choice([-1, 1], shape).astype(np.int64)
    low, high = weight_range(kernel.w_bits)
    return rng.integers(low, high + 1, shape)


@pytest.mark.parametrize("dot", TARGETS)
def test_kernels_get_the_buffers_that_they_are_measured_with(dot: str) -> None:
    cpu = Cpu.of(TARGETS[dot])
    assert cpu.dot == dot
    rng = np.random.default_rng(0)
    convs = [
        Conv(6, 40, (5, 4), (5, 4), (3, 3), (1, 1), (1, 1), groups=2),
        Conv(35, 18, (5, 5), (3, 3), (3, 2), (2, 2), (1, 1), (2, 1)),
        Conv(20, 20, (6, 6), (6, 6), (3, 3), (1, 1), (1, 1), groups=20),
        Conv(70, 33, (1, 1), (1, 1)),
    ]
    made = []
    for conv in convs:
        for w, a, signed, zero in [(8, 8, True, 0), (3, 2, False, 1), (4, 8, False, 0), (2, 2, True, 0), (1, 1, True, 0)]:
            made += kernels.candidates(conv, w, a, signed, cpu, tiles=1)
            # A zero point is that of unsigned codes.
            if zero:
                made += [replace(kernel, zero=zero) for kernel in kernels.candidates(conv, w, a, signed, cpu, tiles=1)]
        made.append(kernels.float_kernel(conv, cpu, Epilogue()))
    weights = [draw(kernel, rng) for kernel in made]
    for kernel, array, found in zip(made, weights, unpacked(made, weights), strict=True):
        ones = np.ones(kernel.conv.out_channels)
        expected = kernel.constants(array, ones, ones)
        for name, values in found.items():
            assert values.tobytes() == expected[name].tobytes(), (kernel, name)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_take_their_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = -5 + 3 * rng.integers(0, 2**bits, 1001)
    values[:2] = -5, -5 + 3 * (2**bits - 1)
    values[2] = values[0] + 3
    packed, (stored,) = packing.pack([values])
    assert isinstance(stored, packing.Bits)
    assert (stored.bits, stored.low, stored.step) == (bits, -5, 3)
    assert packed.size == -(-1001 * bits // 8) + 1
    whole = 8 // bits
    assert packed[0] & (2**bits - 1) == 0
    assert len(np.unpackbits(packed)) // 8 == packed.size
    assert whole * stored.bytes <= 1001 or bits in (1, 2, 4, 8)


def file_bytes(network: object, images: object) -> int:
    """What the file takes, without compiling anything."""
    program = lower(capture(network, images), network, images)
    target: Any = load_target("cpu")
    chosen = {layer: kernels.candidates(*layer, target.cpu)[0] for layer in tvm_code.layers(program)}
    planned = tvm_code.plan(tvm_code.parts(program, chosen, target), program)
    file = io.BytesIO()
    tvm_code.write_packed(file, planned.packed)
    return len(file.getvalue())


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_the_file_is_no_larger_than_the_policy_says(bits: int) -> None:
    """Of the default network, whose layers are small: what pads them, and factors and offsets, count."""
    made = networks.load()
    images = made.preprocess(next(data.load().train.batches(16))[0]).contiguous()
    names = list(Q.BitPolicy.uniform(made.module, w=8, a=8))
    policy = {**dict.fromkeys(names, (bits, 4)), names[0]: (8, 8), names[-1]: (8, 8)}
    network = Q.quantize(made.module, policy, calibrate=images).eval()
    assert file_bytes(network, images) <= MOST * policy_storage_bytes(network, images)
