"""ONNX files have every operation that a graph knows: functions, moves of values, interpolation, poolings, products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.graph import capture
from haq.deployment.onnx import export, verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Operation = Callable[[Tensor], Tensor]
FUNCTIONS: list[Operation] = [
    F.silu,
    F.hardswish,
    F.hardsigmoid,
    torch.sigmoid,
    torch.tanh,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.elu(x, 0.7),
    F.selu,
    lambda x: F.celu(x, 1.3),
    F.mish,
    lambda x: F.softplus(x, 2.0),
    F.logsigmoid,
    torch.exp,
    torch.expm1,
    torch.square,
    torch.abs,
    F.hardshrink,
    F.softshrink,
    lambda x: F.threshold(x, 0.1, -0.3),
    lambda x: x.pow(3),
    torch.atan,
    torch.asinh,
    torch.erf,
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: torch.log1p(x.abs()),
    lambda x: (x.abs() + 1).rsqrt(),
]
MAPS: list[Operation] = [
    lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    lambda x: x * 0.5 + 0.3 - x.flip(3),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, size=(13, 11)),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    lambda x: F.interpolate(x, size=(13, 10), mode="bilinear", align_corners=True),
    lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    lambda x: F.adaptive_avg_pool2d(x, 3),
    lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    lambda x: F.pad(x, (1, 2, 0, 1)),
    lambda x: x.roll((1, 2), (2, 3)),
    lambda x: F.channel_shuffle(x, 2),
    lambda x: torch.cat([x, x.relu()], 1)[:, 4:12],
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    lambda x: x.permute(0, 1, 3, 2),
    lambda x: x.view(x.shape[0], 4, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], 8, 8, 8),
    lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    lambda x: torch.stack([x[:, 0], x[:, 3]], 1).repeat(1, 4, 1, 1),
]


class Around(nn.Module):
    """An operation between two layers."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.operation(self.first(x)))
        return made


class Beside(Around):
    """Many functions side by side."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        parts = [operation(x) for operation in FUNCTIONS]
        return torch.cat([self.last(part) for part in parts[::9]] + [part[:, :1] for part in parts], 1)


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 5, stride=2, groups=4)
        self.last = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.silu(self.first(x))))
        made: Tensor = self.last(F.avg_pool1d(x, 2).flatten(1))
        return made


def check(network: nn.Module, x: Tensor, path: Path) -> None:
    """In float the file computes the same; with integers no layer is off by more than a step, from the same ones before."""
    for bits in [(None, None), (8, 8), (4, 3)]:
        made = Q.quantize(network, dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits), calibrate=x).eval()
        export(capture(made, x), made, path)
        found = verify(path, made, x)
        print(bits, found)
        assert not found.fault
        assert found.steps <= 1
        assert bits != (None, None) or found.output_difference <= 2e-5 * max(1.0, found.largest_output)


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_operations_on_maps(number: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Around(MAPS[number]).eval(), torch.randn(3, 3, 8, 8), tmp_path / "net.onnx")


def test_functions_of_each_value(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Beside(F.silu).eval(), torch.randn(3, 3, 8, 8), tmp_path / "net.onnx")


def test_signals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Signal().eval(), torch.randn(3, 2, 28), tmp_path / "net.onnx")


def test_maps_that_are_put_together_stay_integers(tmp_path: Path) -> None:
    """A shuffle and a concatenation of one grid lie between QuantizeLinear and DequantizeLinear."""
    from haq.deployment.onnx_runtimes import onnxruntime_kinds

    torch.manual_seed(0)

    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 4, 3, 1, 1),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            x = F.channel_shuffle(torch.cat([self.b(x).relu(), self.c(x).relu()], 1), 2)
            made: Tensor = self.d(x)
            return made

    network, x = Fire().eval(), torch.randn(4, 3, 8, 8)
    made = Q.quantize(network, dict.fromkeys("abcd", (8, 8)), calibrate=x).eval()
    export(capture(made, x), made, tmp_path / "net.onnx")
    assert not verify(tmp_path / "net.onnx", made, x).fault
    kinds = onnxruntime_kinds(tmp_path / "net.onnx")
    assert kinds["QLinearConv"] == 3
    assert kinds["Conv"] == 1  # its result isn't rounded
