"""Compiled low-bit kernels compute what NumPy does, bit for bit, whatever processor they are compiled for."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hw_models.tvm_cpu import kernels  # noqa: E402
from hw_models.tvm_cpu.builder import Epilogue, Output, Residual  # noqa: E402
from hw_models.tvm_cpu.conv import (  # noqa: E402
    MAX_TAPS,
    Conv,
    activation_range,
    fma,
    reference,
    weight_range,
    zero_point,
)
from hw_models.tvm_cpu.cpu import Cpu  # noqa: E402
from hw_models.tvm_cpu.depthwise import Depthwise  # noqa: E402
from hw_models.tvm_cpu.kernel import Kernel  # noqa: E402
from hw_models.tvm_cpu.kernels import Direct, candidates  # noqa: E402

SUMS = Epilogue((Output("sums"),))
PAIRS = [(w, a) for w in range(1, 9) for a in range(1, 9)]
OTHERS = {
    "AVX-512 without VNNI": {"kind": "llvm", "mcpu": "skylake-avx512"},
    "AVX2": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "SSE2": {"kind": "llvm", "mcpu": "x86-64"},
}
ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}

Codes = tuple[np.ndarray, np.ndarray]


def one_that_runs_here(name: str) -> Cpu:
    """One of `OTHERS`; skips the test where this processor hasn't its instructions, which would end the process."""
    cpu = Cpu.of(OTHERS[name])
    for feature in ("avx512bw", "avx2"):
        if cpu.has(feature) and not Cpu.host().has(feature):
            pytest.skip(f"this processor has no {feature}")
    return cpu


def codes(kernel: Kernel, rng: np.random.Generator) -> Codes:
    """Weights and activations of all values, the extreme ones more often."""
    conv = kernel.conv

    def draw(bounds: tuple[int, int], bits: int, signed: bool, shape: tuple[int, ...]) -> np.ndarray:
        if bits == 1 and signed:
            return rng.choice([-1, 1], shape)
        drawn = rng.integers(bounds[0], bounds[1] + 1, shape)
        return np.where(rng.random(shape) < 0.2, rng.choice(bounds, shape), drawn)

    inputs = conv.in_channels // conv.groups
    weights = draw(weight_range(kernel.w_bits), kernel.w_bits, True, (conv.out_channels, inputs, *conv.kernel))
    shape = (conv.batch, *conv.input_size, conv.in_channels)
    activations = draw(activation_range(kernel.a_bits, kernel.signed), kernel.a_bits, kernel.signed, shape)
    return weights, activations - kernel.zero


def buffers(kernel: Kernel, drawn: Codes, multiplier: object = 1.0, offset: object = 0.0) -> dict[str, np.ndarray]:
    weights, activations = drawn
    made = {a.name: np.zeros(math.prod(a.shape), a.dtype) for arguments in kernel.arguments().values() for a in arguments}
    # What is left from another layer mustn't matter.
    for name in kernel.workspace():
        made[name][:] = 77
    channels = kernel.conv.out_channels
    made |= kernel.constants(weights, np.full(channels, multiplier, np.float32), np.full(channels, offset, np.float32))
    zero = kernel.zero or zero_point(kernel.a_bits, kernel.signed)
    made["input"] = (activations + zero).astype(np.uint8).reshape(-1)
    return made


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy where kernels expect their buffers: at a multiple of 64 bytes."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    made = raw[start : start + array.nbytes].view(array.dtype)
    made[:] = array
    return made


def run_here(made: Sequence[Kernel], filled: Sequence[dict[str, np.ndarray]]) -> None:
    functions = {}
    for index, kernel in enumerate(made):
        functions |= kernel.functions(f"k{index}")
    module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(made[0].cpu.target))
    for index, (kernel, arrays) in enumerate(zip(made, filled, strict=True)):
        for name, array in arrays.items():
            arrays[name] = aligned(array)
        for stage, arguments in kernel.arguments().items():
            module[f"k{index}_{stage}"](*[arrays[a.name] for a in arguments])


def run_on_aarch64(folder: Path) -> Callable[[Sequence[Kernel], Sequence[dict[str, np.ndarray]]], None]:
    """The same under an emulator, with a program that knows nothing of TVM but its calling convention."""

    def run(made: Sequence[Kernel], filled: Sequence[dict[str, np.ndarray]]) -> None:
        functions = {}
        for index, kernel in enumerate(made):
            functions |= kernel.functions(f"k{index}")
        module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(made[0].cpu.target))

        def link(output: str, objects: list[str], **options: object) -> None:
            (folder / "symbols.h").write_text("".join(f"ONE(__tvm_ffi_{name})\n" for name in functions))
            source = str(Path(__file__).parent / "kernels_on_aarch64.c")
            compiler = ["aarch64-linux-gnu-gcc", "-static", "-O1", "-w", f"-I{folder}", source, *objects]
            subprocess.run([*compiler, "-o", str(folder / "program")], check=True)
            shutil.copy(objects[0], output)

        module.export_library(str(folder / "kernels.so"), fcompile=link)
        lines = []
        for index, (kernel, arrays) in enumerate(zip(made, filled, strict=True)):
            for name, array in arrays.items():
                array.tofile(folder / f"{index}.{name}")
            for stage, arguments in kernel.arguments().items():
                lines.append(f"__tvm_ffi_k{index}_{stage} {len(arguments)}")
                for a in arguments:
                    dtype = np.dtype(a.dtype)
                    lines.append(f"{dtype.kind} {8 * dtype.itemsize} {math.prod(a.shape)} {folder}/{index}.{a.name}")
        (folder / "list").write_text("\n".join(lines) + "\n")
        subprocess.run(["qemu-aarch64", "-cpu", "max", str(folder / "program"), str(folder / "list")], check=True)
        for index, arrays in enumerate(filled):
            for name, array in arrays.items():
                array[:] = np.fromfile(folder / f"{index}.{name}", array.dtype)

    return run


def assert_exact(made: Sequence[Kernel], run: Callable[..., None] = run_here, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    drawn = [codes(kernel, rng) for kernel in made]
    filled = [buffers(kernel, some) for kernel, some in zip(made, drawn, strict=True)]
    run(made, filled)
    for kernel, some, arrays in zip(made, drawn, filled, strict=True):
        expected = reference(kernel.conv, *some)
        found = arrays["output0"].reshape(expected.shape)
        assert np.array_equal(found, expected), f"{kernel.name}, {kernel.signed=}: {kernel.conv}"


def random_conv(rng: np.random.Generator, *, depthwise: bool = False) -> Conv:
    """Any stride, padding, dilation, groups and batch; small."""
    kernel, stride, dilation = (tuple(map(int, rng.integers(1, top + 1, 2))) for top in (3, 2, 2))
    padding = tuple(int(rng.integers(0, size)) for size in kernel)
    extent = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    size = [int(rng.integers(max(1, extent[i] - 2 * padding[i]), 9)) for i in (0, 1)]
    output = [(size[i] + 2 * padding[i] - extent[i]) // stride[i] + 1 for i in (0, 1)]
    groups = int(rng.integers(1, 41)) if depthwise else int(rng.choice([1, 1, 2, 3]))
    inputs, outputs = (groups, groups) if depthwise else (groups * int(rng.integers(1, 41)) for _ in range(2))
    sizes = (tuple(size), tuple(output), kernel, stride, padding, dilation)
    return Conv(inputs, outputs, *sizes, groups, int(rng.integers(1, 3)))


# Kernels of other widths are made as those of these.
OTHER_WIDTHS = [pytest.param(w_bits, marks=pytest.mark.slow) for w_bits in (3, 5, 6, 7)]


@pytest.mark.parametrize("w_bits", [1, 2, 4, 8, *OTHER_WIDTHS])
def test_all_bit_pairs_are_exact_on_random_shapes(w_bits: int) -> None:
    rng, cpu = np.random.default_rng(w_bits), Cpu.host()
    made: list[Kernel] = []
    for a_bits in range(1, 9):
        signed = bool(rng.integers(2))
        conv = random_conv(rng)
        tile = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(1, 3)))
        made.append(Direct(conv, w_bits, a_bits, signed, cpu, "bits", tile, epilogue=SUMS))
        made.append(Direct(conv, w_bits, a_bits, signed, cpu, "bytes", tile, epilogue=SUMS))
        if w_bits in (2, 4) and cpu.dot == "vnni":
            made.append(Direct(conv, w_bits, a_bits, signed, cpu, "packed", tile, epilogue=SUMS))
        made += candidates(random_conv(rng, depthwise=True), w_bits, a_bits, signed, cpu, epilogue=SUMS, tiles=1)
    assert_exact(made)


SLOWLY = [pytest.param(w_bits, marks=pytest.mark.slow) for w_bits in (2, 4, 8)]


@pytest.mark.parametrize("w_bits", [1, *SLOWLY])
def test_zero_points_are_exact(w_bits: int) -> None:
    """What pads an image is the byte of real zero, and the sums are those of the bytes less it."""
    rng, cpu = np.random.default_rng(w_bits), Cpu.host()
    made: list[Kernel] = []
    for a_bits in (2, 3, 4, 8):
        for conv in (random_conv(rng), random_conv(rng, depthwise=True)):
            made += candidates(conv, w_bits, a_bits, False, cpu, epilogue=SUMS, tiles=1)
        made.append(Direct(random_conv(rng), w_bits, a_bits, False, cpu, "bits", (1, 3, 1), epilogue=SUMS))
    # 128 is what signed bytes have.
    zeros = [int(rng.choice([1, 2**a_bits - 1, 2 ** (a_bits - 1)])) for a_bits in (kernel.a_bits for kernel in made)]
    assert_exact([dataclasses.replace(kernel, zero=zero) for kernel, zero in zip(made, zeros, strict=True)])


@pytest.mark.parametrize("name", [*OTHERS, "two threads"])
def test_zero_points_without_the_instructions_that_help(name: str) -> None:
    cpu = Cpu.host(2)
    if name in OTHERS:
        cpu = one_that_runs_here(name)
    kernels_for_unsigned = [kernel for kernel in _some(cpu) if not kernel.signed]
    assert_exact([dataclasses.replace(kernel, zero=2**kernel.a_bits - 1) for kernel in kernels_for_unsigned])


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_measured_is_exact(signed: bool) -> None:
    """All candidates of the layers that networks have: image stem, 3x3, pointwise, depthwise, fully connected."""
    cpu = Cpu.host()
    layers = [
        Conv(3, 16, (11, 11), (6, 6), (3, 3), (2, 2), (1, 1)),
        Conv(64, 48, (7, 7), (7, 7), (3, 3), (1, 1), (1, 1)),
        Conv(96, 24, (5, 5), (5, 5)),
        Conv(40, 40, (9, 9), (9, 9), (3, 3), (1, 1), (1, 1), groups=40),
        Conv(200, 10, (1, 1), (1, 1)),
        Conv(32, 64, (8, 8), (4, 4), (1, 1), (2, 2)),
    ]
    pairs = [(1, 1), (1, 3), (2, 2), (4, 4), (8, 8)]
    made = {k.key: k for conv in layers for w, a in pairs for k in candidates(conv, w, a, signed, cpu, epilogue=SUMS, tiles=1)}
    assert_exact(list(made.values()))


@pytest.mark.parametrize("name", OTHERS)
def test_without_the_instructions_that_help(name: str) -> None:
    cpu = one_that_runs_here(name)
    assert cpu.dot == "madd"
    assert_exact(_some(cpu))


def test_threads_compute_the_same() -> None:
    assert_exact(_some(Cpu.host(2)))


@pytest.mark.parametrize("dot", ["sdot", "plain"])
def test_cross_compiled_for_aarch64(dot: str, tmp_path: Path) -> None:
    cpu = Cpu.of(ARM | {"mattr": ["+neon", "+dotprod"]} if dot == "sdot" else ARM)
    assert cpu.dot == dot
    if not shutil.which("qemu-aarch64") or not shutil.which("aarch64-linux-gnu-gcc"):
        pytest.skip("qemu-user and gcc-aarch64-linux-gnu aren't installed")
    assert_exact(_some(cpu), run_on_aarch64(tmp_path))


def _some(cpu: Cpu) -> list[Kernel]:
    rng, made = np.random.default_rng(5), []
    for w_bits, a_bits, signed in [(8, 8, False), (8, 8, True), (1, 1, True), (1, 2, False), (3, 2, True)]:
        made += candidates(random_conv(rng), w_bits, a_bits, signed, cpu, epilogue=SUMS, tiles=1)
        made += candidates(random_conv(rng, depthwise=True), w_bits, a_bits, signed, cpu, epilogue=SUMS, tiles=1)
    return made


@pytest.mark.parametrize("channels", [5, 16, 40])
def test_epilogue(channels: int) -> None:
    """Scale, offset, residuals, clipping and rounding, in float32 and in this order."""
    conv = Conv(12, channels, (4, 5), (4, 5), (3, 3), (1, 1), (1, 1))
    residuals = (Residual("uint8", 0.02), Residual("int32", 2.0**-9))
    outputs = (Output("codes", 1.7, -7, 7, 128), Output("sign"), Output("fixed", 2.0**7, -(2**30), 2**30), Output("float"))
    epilogue = Epilogue(outputs, residuals, -4.0, 6.0)
    cpu, rng = Cpu.host(), np.random.default_rng(channels)
    for kernel in (
        Direct(conv, 3, 4, False, cpu, "bytes", (1, 4, 2), epilogue=epilogue),
        Direct(conv, 3, 4, False, cpu, "bits", (1, 4, 2), epilogue=epilogue),
        Depthwise(
            Conv(channels, channels, (4, 5), (4, 5), (3, 3), (1, 1), (1, 1), groups=channels),
            3,
            4,
            False,
            cpu,
            "int16",
            epilogue=epilogue,
        ),
    ):
        drawn = codes(kernel, rng)
        multiplier, offset = (rng.normal(size=channels).astype(np.float32) for _ in range(2))
        arrays = buffers(kernel, drawn)
        arrays |= kernel.constants(drawn[0], multiplier * np.float32(0.05), offset)
        sums = reference(kernel.conv, *drawn)
        arrays["residual0"] = rng.integers(0, 256, sums.size).astype(np.uint8)
        arrays["residual1"] = rng.integers(-900, 900, sums.size).astype(np.int32)
        run_here([kernel], [arrays])
        f = np.float32
        v = fma(sums.astype(f), multiplier * f(0.05), offset)
        v = fma(arrays["residual0"].astype(f).reshape(v.shape), 0.02, v)
        v = fma(arrays["residual1"].astype(f).reshape(v.shape), 2.0**-9, v)
        v = np.clip(v, f(-4), f(6))
        expected = [np.rint(np.clip(v * f(1.7), -7, 7)) + 128, np.where(v >= 0, 2, 0), np.rint(v * f(2.0**7)), v]
        for index, values in enumerate(expected):
            assert np.array_equal(arrays[f"output{index}"].reshape(v.shape), values), (kernel.name, outputs[index].kind)


def test_rounding_is_half_to_even() -> None:
    conv = Conv(1, 1, (8, 1), (8, 1))
    kernel = Direct(
        conv, 8, 8, True, Cpu.host(), "bytes", (1, 8, 1), epilogue=Epilogue((Output("codes", 0.5, -128, 127, 128),))
    )
    values = np.array([-3, -2, -1, 0, 1, 2, 3, 5]).reshape(1, 8, 1, 1)
    arrays = buffers(kernel, (np.ones((1, 1, 1, 1), np.int64), values))
    run_here([kernel], [arrays])
    assert (arrays["output0"].astype(int) - 128).tolist() == [-2, -1, 0, 0, 0, 1, 2, 2]


def test_sums_that_may_overflow_are_refused() -> None:
    assert Conv(MAX_TAPS, 1, (1, 1), (1, 1)).taps == MAX_TAPS
    with pytest.raises(ValueError, match="may overflow 32 bits"):
        Conv(MAX_TAPS + 1, 1, (1, 1), (1, 1))


def test_largest_sums_are_exact() -> None:
    """At the limit, with all weights and activations at their extremes."""
    conv = Conv(MAX_TAPS // 16 * 16, 1, (1, 1), (1, 1))
    for signed, activation in ((False, 255), (True, -128)):
        kernel = Direct(conv, 8, 8, signed, Cpu.host(), "bytes", (1, 1, 1), epilogue=SUMS)
        drawn = np.full((1, conv.in_channels, 1, 1), -128), np.full((1, 1, 1, conv.in_channels), activation)
        arrays = buffers(kernel, drawn)
        run_here([kernel], [arrays])
        assert arrays["output0"].item() == reference(conv, *drawn).item()


def test_sixteen_bit_sums_only_where_they_fit() -> None:
    conv = Conv(16, 16, (4, 4), (4, 4), (3, 3), (1, 1), (1, 1), groups=16)
    assert Depthwise.fits(conv, 4, 8, False)
    assert not Depthwise.fits(conv, 5, 8, False)
    for w_bits, a_bits in PAIRS:
        kernel = candidates(conv, w_bits, a_bits, False, Cpu.host())[0]
        assert isinstance(kernel, Depthwise)
        assert kernel.sums == ("int16" if Depthwise.fits(conv, w_bits, a_bits, False) else "int32")
    kernel = Depthwise(conv, 8, 8, False, Cpu.host(), "int16")
    with pytest.raises(ValueError, match="don't fit into 16 bits"):
        kernel.constants(np.zeros((16, 1, 3, 3), np.int8), np.ones(16), np.zeros(16))


def test_weights_of_other_bits_are_refused() -> None:
    kernel = Direct(Conv(4, 4, (1, 1), (1, 1)), 2, 2, False, Cpu.host(), "bits", (1, 1, 1))
    one = np.ones(4)
    with pytest.raises(ValueError, match=r"weights of 2 bits must be from -2 to 1, found 0 to 3"):
        kernel.constants(np.diag([3, 1, 1, 1]).reshape(4, 4, 1, 1), one, one)
    with pytest.raises(ValueError, match=r"shape \(4, 5, 1, 1\)"):
        kernel.constants(np.zeros((4, 5, 1, 1), np.int8), one, one)
    binary = Direct(Conv(4, 4, (1, 1), (1, 1)), 1, 1, True, Cpu.host(), "bits", (1, 1, 1))
    with pytest.raises(ValueError, match="-1 or \\+1, found 0"):
        binary.constants(np.eye(4, dtype=np.int8).reshape(4, 4, 1, 1), one, one)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nonsense9", "LLVM knows no processor 'nonsense9'"),
        ({"kind": "cuda"}, "its kind must be 'llvm'"),
        ('{"kind": "llvm", "foo": 3}', "Unknown config option 'foo'"),
        ("{nonsense", "it is not JSON"),
    ],
)
def test_targets_that_tvm_refuses(target: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cpu.of(target)  # type: ignore[arg-type]


def test_key_is_of_the_code() -> None:
    """What needn't be measured twice has the same key."""
    conv, cpu = Conv(64, 64, (8, 8), (8, 8)), Cpu.host()
    keys = [{k.key for k in candidates(conv, w, a, False, cpu) if "int8" in k.name} for w, a in ((8, 8), (3, 5), (1, 1))]
    assert keys[0] == keys[1] == keys[2]
    narrow = [(w, a) for w, a in PAIRS if w * a <= kernels.MOST_PAIRS]
    assert len({k.key for w, a in narrow for k in candidates(conv, w, a, False, cpu) if "bits" in k.name}) >= len(narrow)
