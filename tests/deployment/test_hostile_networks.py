"""Networks that nobody would train are deployed with the right answers, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment import onnx_runtimes, tables
from haq.deployment.graph import capture
from haq.deployment.nodes import Node
from haq.deployment.onnx import export, verify

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FLAVOURS = (None, "tensorrt")


def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Tiny(nn.Module):
    """Two convolutions and a linear layer; what is behind them is for others to say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.last(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3))))

    def end(self, x: Tensor) -> Any:
        return x


def quantized(network: nn.Module, x: Tensor, bits: tuple[int, int] = (8, 8), residuals: bool = False) -> nn.Module:
    names = Q.BitPolicy.uniform(network, w=8, a=8)
    if residuals:
        network = Q.insert_residual_quantizers(network.eval(), x)
    return Q.quantize(network, dict.fromkeys(names, bits), calibrate=x).eval()


def assert_same(network: nn.Module, x: Tensor, path: Path, flavour: str | None, share: float = 2e-3) -> None:
    """Write a network to a file of ONNX and compare its outputs; `share` is of the largest."""
    export(capture(network, x), network, path, flavour)
    found = verify(path, network, x)
    assert not found.fault
    assert found.same_answers * found.images + found.ties == found.images
    if flavour != "tensorrt":  # which has a bit less of some inputs
        assert found.output_difference <= share * found.largest_output


class Scaled(Tiny):
    def end(self, x: Tensor) -> Tensor:
        return 3 * x + 10


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_numbers_behind_the_last_layer(flavour: str | None, tmp_path: Path) -> None:
    """They are folded into it, and it is what the outputs are read from."""
    assert_same(quantized(Scaled(), images()), images(), tmp_path / "net.onnx", flavour)


class Twice(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.body(F.relu(self.stem(x))))))
        made: Tensor = self.last(x.mean((2, 3)))
        return made


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_layer_that_is_called_twice_between_integers(flavour: str | None, tmp_path: Path) -> None:
    assert_same(quantized(Twice(), images(), residuals=True), images(), tmp_path / "net.onnx", flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_layers_that_give_their_bias_alone(factor: float, flavour: str | None, tmp_path: Path) -> None:
    """A step of their sums could be anything, and biases are counted in such steps."""
    network = Tiny()
    network.stem.weight.data *= factor
    network.body.weight.data[1] *= factor
    assert_same(quantized(network, images()), images(), tmp_path / "net.onnx", flavour)


@pytest.mark.parametrize("bits", [(8, 8), (3, 5)])
def test_names_of_layers(bits: tuple[int, int], tmp_path: Path) -> None:
    """Names that files use themselves, and what ends the name of a second call."""
    names = ("a@2", "a", "@3", "input", "output", "~1", "halves", "a:input", "int", "*/ 'b c\"", "\u00e9", "x" * 300)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleDict()
            for number, name in enumerate(names):
                self.parts._modules[name] = nn.Conv2d(4 if number else 3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for part in (*self.parts.values(), self.parts._modules["x" * 300]):
                x = F.relu(part(x))  # type: ignore[misc]
            return x.mean((2, 3))

    assert_same(quantized(Named(), images(), bits), images(), tmp_path / "net.onnx", None)


class Whole(Tiny):
    def end(self, x: Tensor) -> Tensor:
        return x.mean()


class Nothing(Tiny):
    def end(self, x: Tensor) -> Tensor:
        return x[:, :0]


class Logarithm(Tiny):
    def end(self, x: Tensor) -> Tensor:
        return (x - 100).log()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Whole(), "aten.mean over other dimensions than height and width"),
        (Nothing(), "without a number in it"),
        (Logarithm(), "gives NaN or infinity for the first image"),
    ],
    ids=["one number of all images", "no output", "not finite"],
)
def test_outputs_that_cannot_be_deployed(network: nn.Module, words: str) -> None:
    made = quantized(network, images())
    with pytest.raises(ValueError, match=words):
        capture(made, images())


def test_a_table_for_numbers_far_beyond_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sigmoid is flat from 64 on: its numbers up to thousands aren't looked at as closely as those before."""
    counts = []
    apply = tables.apply_function

    def counted(node: Node, x: Tensor) -> Tensor:
        counts.append(x.numel())
        return apply(node, x)

    monkeypatch.setattr(tables, "apply_function", counted)
    node = Node("f", "function", (), (1, 1, 1), module="f", function="sigmoid")
    made = tables.make_table(node, 3e3, 2.0, 1.0)
    assert np.isfinite(made.coefficients).all()
    assert max(counts) < 500_000


def test_what_a_runtime_refuses_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="ONNX Runtime .* doesn't load the file that was written for it: .*"):
        onnx_runtimes._session(b"no file of ONNX")
