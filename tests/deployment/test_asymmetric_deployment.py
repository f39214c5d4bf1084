"""Zero points and corrected biases are deployed: all that is written computes what the fake-quantized network does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.graph import capture
from haq.deployment.interpreter import compare, fake_quantized
from haq.deployment.lowering import integer_activations, lower
from haq.deployment.program import Codes, Convolution

Bits = tuple[int | None, int | None]


class Mixed(nn.Module):
    """Signed inputs of every kind of layer, that are pooled, added and flattened on their way; values are mostly positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, 2, 1, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.pointwise = nn.Conv2d(20, 20, 1)
        self.wide = nn.Conv2d(20, 20, 3, 1, 2, dilation=2, groups=2)
        self.last = nn.Linear(20 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).clamp(-0.3, 2))
        x = x + self.pointwise(self.depthwise(x))
        x = self.wide(x).clamp(min=-0.2)
        made: Tensor = self.last(x.flatten(1))
        return made


def mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mixed().eval(), torch.randn(8, 3, 16, 16) + 0.5


def quantized(bits: Bits | dict[str, Bits], **options: Any) -> tuple[nn.Module, Tensor]:
    network, images = mixed()
    policy: Any = bits
    if isinstance(bits, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    return Q.quantize(network, policy, scheme="linear-asymmetric", calibrate=images, **options), images


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 2), (1, 4)])
def test_integer_programs(bits: Bits) -> None:
    network, images = quantized(bits)
    program = lower(capture(network, images), network, images)
    found = compare(network, program, images)
    assert not found.fault
    assert found.different <= 1e-3 * found.values
    assert found.same_answers == 1
    codes = [program.values[step.input].representation for step in program.steps if isinstance(step, Convolution)]
    zero_points = [of_input.zero_point for of_input in codes if isinstance(of_input, Codes)]
    assert len(zero_points) == 5
    # With two bits 0 may be the lowest level.
    assert all(zero_points) or bits[1] == 2
    assert any(zero_points)


def test_one_bit_stands_for_two_signs() -> None:
    network, _ = quantized((1, 1))
    for name, layer in Q.quant_layers(network).items():
        codes = integer_activations(name, layer)
        assert (codes.signed, codes.zero_point, codes.range) == (True, 0, (-1, 1))


def test_the_integers_are_the_layers() -> None:
    network, images = quantized((4, 4))
    _, entered = fake_quantized(network, images)
    for name, layer in Q.quant_layers(network).items():
        codes = integer_activations(name, layer)
        low, high = codes.range
        assert (low, high) == (-codes.zero_point, 15 - codes.zero_point)
        assert low <= entered[name].min()
        assert entered[name].max() <= high
        assert entered[name].min() < 0 < entered[name].max()


def test_float_weights_take_codes_with_a_zero_point() -> None:
    network, images = quantized(
        {"stem": (4, 4), "depthwise": (None, 4), "pointwise": (4, None), "wide": (4, 3), "last": (None, 5)}
    )
    found = compare(network, lower(capture(network, images), network, images), images)
    assert not found.fault
    assert found.same_answers == 1


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 2), (None, 4)])
def test_onnx(bits: Bits, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("qonnx")
    from haq.deployment import onnx, qonnx

    network, images = quantized(bits, correction="analytic" if bits[0] else None)
    graph = capture(network, images)
    for files in (onnx, qonnx):
        files.export(graph, network, tmp_path / "network.onnx")
        found = files.verify(tmp_path / "network.onnx", network, images)
        print(found)
        assert not found.fault
        assert found.same_answers == 1
        # ONNX Runtime rounds biases to steps of the sums that it adds them to.
        share = {onnx: 1e-2, qonnx: 1e-3}[files]
        assert found.different <= share * found.values


@pytest.mark.slow  # kernels are measured; those with zero points are in tests/hw_models/test_low_bit_kernels.py
@pytest.mark.parametrize("bits", [(8, 8), (2, 3)])
def test_compiled(bits: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    from haq import deploy

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network, images = quantized(bits, correction="analytic")
    deployed = deploy.to_tvm(network, images, tmp_path / "network")
    program = lower(capture(network, images), network, images)
    assert not compare(network, program, images).fault
    from haq.deployment import interpreter

    assert np.array_equal(deployed(images.numpy()), interpreter.run(program, images.numpy())[0])


def test_corrected_biases() -> None:
    """Layers without a bias get one; in float64, too, where a network is compared that differs by rounding alone."""
    network, images = quantized((3, 4), correction="analytic")
    layer: Any = network.stem
    assert layer.bias is None
    shift = layer.effective_bias()
    assert float(shift.abs().max()) > 1e-4
    program = lower(capture(network, images), network, images)
    for some in (images, images.double()):
        found = compare(network, program, some)
        assert not found.fault
        assert found.same_answers == 1
    outputs, _ = fake_quantized(network, images.double())
    assert torch.allclose(outputs.float(), network(images), atol=1e-3)
