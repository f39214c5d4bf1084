"""ONNX files compute what the fake-quantized network does: in ONNX Runtime as it comes, and in the package qonnx."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import quantizers as Q
from haq import networks
from haq.deployment import onnx as onnx_files
from haq.deployment import qonnx as qonnx_files
from haq.deployment.graph import capture
from haq.deployment.onnx import OnnxExporter, export, verify
from haq.deployment.onnx_verify import Verification
from tests.conftest import images, small_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")

Bits = tuple[int | None, int | None]
FLAVOURS: dict[str, Any] = {"onnx": onnx_files, "qonnx": qonnx_files}


def randomised(network: nn.Module) -> nn.Module:
    """Batch norms that have seen something."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return network.eval()


def sequence(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(nn.Sequential(*modules))  # type: ignore[return-value]


def exported(network: nn.Module, policy: Any, x: Tensor, path: Path, scheme: Any = "linear") -> list[Verification]:
    """Written and verified in both flavours."""
    if isinstance(policy, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), policy)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme)
    graph = capture(quantized, x)
    found = []
    for flavour, files in FLAVOURS.items():
        files.export(graph, quantized, path / f"{flavour}.onnx")
        found.append(files.verify(path / f"{flavour}.onnx", quantized, x))
        print(found[-1])
        assert found[-1].flavour == flavour
        assert found[-1].images == len(x)
        assert not found[-1].fault
    found.append(verify_as_written(path / "onnx.onnx", quantized, x))
    print(found[-1])
    assert not found[-1].fault
    assert not list(path.glob("*.part"))
    return found


def check_equal(found: list[Verification]) -> None:
    """What files say is what the network computes. ONNX Runtime rounds biases to steps of sums, in what it makes of them."""
    for result in found:
        assert result.same_answers == 1
        if result.flavour == "onnx":
            assert result.different <= 0.02 * result.values
            assert result.output_difference <= 0.1 * result.largest_output
            continue
        assert result.different <= 1e-4 * result.values
        # A tie that falls to the other side is seen in the outputs, too.
        assert result.different or result.output_difference <= 1e-5 * max(1.0, result.largest_output)


def unoptimized(model: bytes, optimized: Path | None = None) -> Any:
    """A session that computes one operator after the other, as the file has them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def verify_as_written(path: Path, quantized: nn.Module, x: Tensor) -> Verification:
    with patch("haq.deployment.onnx_runtimes._session", unoptimized), patch("haq.deployment.onnx_runtimes.operators") as rows:
        rows.return_value = ()
        return dataclasses.replace(verify(path, quantized, x), flavour="as written")


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# ------------------------------------------------------------------------------------------------------------ networks


def test_the_default_network_at_mixed_bits(tmp_path: Path) -> None:
    network = networks.load().module
    draw = random.Random(0)
    policy: dict[str, Bits] = {
        name: (draw.randint(1, 8), draw.randint(1, 8)) for name in Q.BitPolicy.uniform(network, w=8, a=8)
    }
    policy |= dict(zip(draw.sample(list(policy), 3), [(None, None), (4, None), (None, 3)], strict=True))
    x = torch.rand(70, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    check_deep(exported(network, policy, x, tmp_path))


def check_deep(found: list[Verification]) -> None:
    """In a deep network one integer that differs makes others differ behind it."""
    for result in found:
        if result.flavour == "onnx":
            assert result.same_answers >= 0.85  # of images of noise, between which a network tells little
            assert result.output_difference <= 0.2 * result.largest_output
            continue
        assert result.same_answers == 1
        assert result.different <= 2e-3 * result.values


@pytest.mark.parametrize("bits", [8, 1])
def test_the_default_network_at_even_bits(bits: int, tmp_path: Path) -> None:
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    check_deep(exported(networks.load().module, (bits, bits), x, tmp_path))


@pytest.mark.parametrize(
    ("bits", "scheme"),
    [
        ((8, 8), Q.Linear(calibration="max")),
        pytest.param((1, 1), "binary", marks=pytest.mark.slow),
        pytest.param((3, 2), "lsq", marks=pytest.mark.slow),
    ],
)
def test_resnet18(bits: Bits, scheme: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomised(networks.load("torchvision:resnet18", pretrained=False).module)
    # In a network of random weights one tie makes thousands of integers of 8 bits differ behind it.
    for result in exported(network, bits, torch.randn(2, 3, 32, 32), tmp_path, scheme):
        assert result.same_answers == 1
        assert result.output_difference < 0.05 * result.largest_output
        assert bits == (8, 8) or result.different <= 1e-3 * result.values


# ------------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("linear", (1, 1)),
        ("linear", (8, 8)),
        ("linear", (None, 8)),  # ONNX Runtime would make the weights 8 bits wide,
        ("linear", (None, 2)),
        ("linear", (2, 8)),  # and round the bias
        ("linear", (8, None)),
        ("lsq", (2, 2)),
        ("lsq", (8, 8)),
        (Q.LSQ(per_channel=False), (5, 7)),
        ("lsqplus", (3, None)),
        ("pact", (1, 1)),
        ("pact", (3, 4)),
        ("dorefa", (2, 2)),
        ("dorefa", (7, 8)),
        ("binary", (1, 1)),
        (Q.Binary(scaling="xnor"), (1, 1)),
        (Q.Binary(scaling="xnor"), (1, None)),
    ],
)
def test_schemes(scheme: Any, bits: Bits, tmp_path: Path) -> None:
    check_equal(exported(small_network(), bits, images(32), tmp_path, scheme))


@pytest.mark.parametrize(
    ("scheme", "bits"), [("linear", (8, 8)), ("linear", (1, 1)), ("lsq", (8, 8)), ("lsq", (2, 3)), ("pact", (2, 1))]
)
def test_signed_inputs(scheme: Any, bits: Bits, tmp_path: Path) -> None:
    network = sequence(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.Linear(200, 5)
    )
    check_equal(exported(network, bits, torch.randn(4, 3, 9, 9), tmp_path, scheme))


# ---------------------------------------------------------------------------------------------------------- operations


class Shared(nn.Module):
    """One layer twice, an addition, and bounds on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.twice(x)).clamp(max=0.5) + x
        return self.twice(x).clamp(min=-0.25).mean((2, 3))


class Same(nn.Conv2d):
    """Pads its input itself, one more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_equal(exported(Shared().eval(), (4, 4), torch.rand(4, 2, 8, 8), tmp_path))
    # The first layer and the second, which is called again.
    assert {"~0", "~1", "~1@2"} <= {name for node in onnx.load(tmp_path / "onnx.onnx").graph.node for name in node.output}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(-0.5, 0.7), nn.Identity()])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_without_batch_norms(activation: nn.Module, bias: bool, tmp_path: Path) -> None:
    """Nothing lies between them that would keep ONNX Runtime from rounding otherwise."""
    network = sequence(
        nn.Conv2d(3, 8, 3, dilation=2, bias=bias),
        activation,
        nn.Conv2d(8, 8, (3, 1), (2, 1), (1, 0), groups=4, bias=bias),
        activation,
        Same(8, 6, 2, 2, bias=bias),
        activation,
        nn.Flatten(),
        nn.Linear(36, 8, bias=bias),
        activation,
        nn.BatchNorm1d(8),
        nn.Linear(8, 5, bias=bias),
    )
    for bits in [(8, 8), (2, 2), (None, 3)]:
        check_equal(exported(network, bits, torch.randn(8, 3, 9, 9), tmp_path))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(3),
    ],
)
def test_pools(pool: nn.Module, tmp_path: Path) -> None:
    network = sequence(pool, nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 4, 1), pool, nn.ReLU())
    check_equal(exported(network, (4, 3), torch.randn(4, 3, 36, 36), tmp_path))


# ---------------------------------------------------------------------------------------------------------- the files


def test_integers_are_clipped_to_their_bits(tmp_path: Path) -> None:
    network = sequence(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    policy = {"0": (8, 4), "3": (8, 8)}
    exported(network, policy, torch.randn(4, 2, 8, 8), tmp_path)
    # The signed input has a Clip, the bytes need none. What isn't rounded has real weights, and no DequantizeLinear is left.
    assert kinds(tmp_path / "onnx.onnx") == [
        *("QuantizeLinear", "Clip", "BitShift", "DequantizeLinear", "DequantizeLinear", "Conv"),
        *("QuantizeLinear", "Cast", "Mul", "DequantizeLinear", "Conv", "Identity"),
    ]
    assert kinds(tmp_path / "qonnx.onnx").count("Quant") == 4
    for image in (1, 3):  # any number of them
        session = onnxruntime.InferenceSession(tmp_path / "onnx.onnx", providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"input": np.zeros((image, 2, 8, 8), np.float32)})
        assert output.shape == (image, 4, 4, 4)


def test_sums_by_pairs_fit_into_16_bits(tmp_path: Path) -> None:
    """Processors without VNNI saturate them; this one may have it. Only two operands of 8 bits need the option for that."""
    network = sequence(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for bits, fits in [((8, 8), False), ((7, 8), True), ((8, 7), True), ((2, 8), True), ((2, 2), True)]:
        quantized = Q.quantize(network, dict.fromkeys(("1", "3", "6"), bits), calibrate=torch.rand(8, 3, 8, 8))
        export(capture(quantized, torch.rand(1, 3, 8, 8)), quantized, tmp_path / "net.onnx")
        folded = loaded(tmp_path / "net.onnx", tmp_path)
        weights = [held.astype(int) for held in folded.values() if held.dtype == np.int8 and held.size > 4]
        assert len(weights) == 3
        largest_input = 255
        if bits == (8, 7):
            largest_input = 127
        assert (2 * largest_input * max(abs(held).max() for held in weights) < 2**15) == fits


def loaded(path: Path, place: Path) -> dict[str, Any]:
    """The constants that ONNX Runtime keeps of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(place / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    made = onnx.load(place / "optimized.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}


def test_a_difference_is_shown(network: nn.Module, tmp_path: Path) -> None:
    x = images(8)
    policy = Q.BitPolicy.uniform(network, w=4, a=4)
    quantized = Q.quantize(network, policy, calibrate=x)
    export(capture(quantized, x), quantized, tmp_path / "net.onnx")
    Q.set_policy(quantized, Q.BitPolicy.uniform(network, w=2, a=4))
    found = verify(tmp_path / "net.onnx", quantized, x)
    assert found.different > 0
    assert found.steps > 0
    assert found.output_difference > 0.01
    assert f"{found.different} differ, by up to {found.steps}" in str(found)
    with pytest.raises(ValueError, match="there are none"):
        verify(tmp_path / "net.onnx", quantized, x[:0])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("scheme", "bits", "message"),
    [
        ("kmeans", (4, None), "layer 'stem' can't be deployed: weights of scheme 'kmeans' are no multiples of a step"),
        ("lsqplus", (4, 4), "layer 'stem' can't be deployed: activations of scheme 'lsqplus' have an offset"),
        ("dorefa", (8, 8), "layer 'stem' can't be deployed: weights of 8 bits in scheme 'dorefa'"),
    ],
)
def test_what_has_no_integers_is_refused(flavour: str, scheme: str, bits: Bits, message: str, tmp_path: Path) -> None:
    network, x = small_network(), images(16)
    policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme)
    with pytest.raises(ValueError, match=message):
        FLAVOURS[flavour].export(capture(quantized, x), quantized, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, x = small_network(), images(4)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=x)
    graph = capture(quantized, x)
    for name, flavour in [("qonnx.core.modelwrapper", "qonnx"), ("onnx", "onnx")]:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"the package {name.partition('.')[0]}: pip install 'onnx>="):
            FLAVOURS[flavour].export(graph, quantized, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_network_is_not_put_in_its_place(tmp_path: Path) -> None:
    """Whatever mistake it comes from: a layer's own numbers, where what enters it is the same, tell; so do images of NaN."""
    network, x = sequence(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)), torch.rand(4, 3, 8, 8)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=x)
    wrong = copy.deepcopy(quantized)
    wrong[0].bias.data += 1
    graph, path = capture(quantized, x), tmp_path / "net.onnx"
    path.write_text("the one before")
    given: dict[str, Any] = {"notes": {}, "options": {}, "on_progress": lambda *told: None}
    with patch("haq.deployment.onnx.export", lambda graph, network, path, flavour: export(graph, wrong, path, flavour)):
        with pytest.raises(ValueError, match=r"as a file of onnx it gives layer '3' integers that are off by up to \d+, from"):
            OnnxExporter().export(quantized, graph, x, path, **given)
        wrong[0].bias.data -= 1
        wrong[3].bias.data += 1
        with pytest.raises(ValueError, match="as a file of onnx it gives outputs that are off by 1"):
            OnnxExporter().export(quantized, graph, x, path, **given)
        wrong = Q.quantize(network, {"0": (4, 4), "3": (4, None)}, calibrate=x)
        with pytest.raises(ValueError, match="doesn't round what enters layer '3', which the network does"):
            OnnxExporter().export(quantized, graph, x, path, **given)
    assert path.read_text() == "the one before"
    OnnxExporter().export(quantized, graph, x, path, **given)
    with pytest.raises(ValueError, match="images of finite numbers, and these have NaN or infinity"):
        verify(path, quantized, x / 0)
    path.write_text("the one before")
    with pytest.raises(ValueError, match="is not a file of ONNX"):
        verify(path, quantized, x)
