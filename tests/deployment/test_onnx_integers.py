"""Stock ONNX Runtime and OpenVINO compute the files of --to onnx in integers: layers, additions and pools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.graph import capture
from haq.deployment.onnx import OnnxExporter, export, verify
from haq.deployment.onnx_runtimes import OVERFLOW, onnxruntime_kinds, openvino_kinds, overflow_words
from hw_models.measured import processor
from hw_models.measured.processor import lacks_vnni

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.second, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = F.relu(self.norm2(self.second(F.relu6(self.norm1(self.first(x))))) + x)
        return made


class Small(nn.Module):
    """Batch norms, also with negative and vanishing factors, additions, a maximum, a pool over everything, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        made: Tensor = self.last(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))
        return made


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network, x = Small(), torch.randn(16, 3, 16, 16)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(0, 0.3)
    network(x)
    network.norm.weight.data[:3] = torch.tensor([-0.7, 0.0, 1e-12])
    return network.eval(), x


def quantized(network: nn.Module, x: Tensor, bits: Any, residuals: bool, scheme: str = "linear") -> nn.Module:
    policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    if residuals:
        network = Q.insert_residual_quantizers(network, x)
    return Q.quantize(network, policy, calibrate=x, scheme=scheme).eval()


def written(network: nn.Module, x: Tensor, path: Path, flavour: str | None = None) -> Any:
    export(capture(network, x), network, path, flavour)
    found = verify(path, network, x)
    print(found, found.further)
    assert not found.fault
    assert found.same_answers * found.images + found.ties == found.images
    return found


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 3), (2, 2), (1, 1)])
def test_every_layer_is_computed_in_integers(bits: Any, tmp_path: Path) -> None:
    network, x = small()
    made = quantized(network, x, bits, residuals=True)
    found = written(made, x, tmp_path / "net.onnx")
    kinds = onnxruntime_kinds(tmp_path / "net.onnx")
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QLinearGlobalAveragePool"], kinds["QGemm"]) == (5, 2, 1, 1)
    assert not {"Conv", "FusedConv", "Gemm", "BatchNormalization"} & kinds.keys()
    # Integers of 8 bits that branches meet in are rounded to fewer in front of layers.
    assert ("DequantizeLinear" in kinds) == (bits[1] < 8)
    assert dict(found.further)["layers that ONNX Runtime computes in integers"] == "6 of 6"


def test_without_residual_quantizers_what_is_added_is_real(tmp_path: Path) -> None:
    network, x = small()
    written(quantized(network, x, (8, 8), residuals=False), x, tmp_path / "net.onnx")
    kinds = onnxruntime_kinds(tmp_path / "net.onnx")
    # The second layer of each block, and what the first of them adds to.
    assert (kinds["QLinearConv"], kinds["QGemm"]) == (2, 1)
    assert kinds["QLinearAdd"] == 0
    model = onnx.load(tmp_path / "net.onnx")
    scalars = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) == 4]
    assert scalars
    assert all(not tensor.dims for tensor in scalars if tensor.data_type == onnx.TensorProto.FLOAT)


def test_biases_beyond_32_bits_and_channels_without_a_factor(tmp_path: Path) -> None:
    """Steps of sums become coarser there; a bias that overflowed would turn its sign."""
    network, x = small()
    network.norm.bias.data[:3] = torch.tensor([0.5, 0.25, 2.0])
    made = quantized(network, x, (8, 8), residuals=True)
    written(made, x, tmp_path / "net.onnx")


@pytest.mark.parametrize("bits", [(8, 8), (7, 8), (8, 7), (4, 3)])
@pytest.mark.parametrize("residuals", [True, False])
def test_openvino_computes_every_layer_in_integers(bits: Any, residuals: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    network, x = small()
    made = quantized(network, x, bits, residuals)
    path = tmp_path / "net.onnx"
    if bits == (8, 8) and lacks_vnni():
        export(capture(made, x), made, path, "openvino")
        found = verify(path, made, x)
        # Its sums may overflow here. That nothing else is wrong is held by 7 bits of either operand.
        assert found.same_answers >= 0.9
    else:
        found = written(made, x, path, "openvino")
    assert found.flavour == "openvino"
    assert dict(found.further)["layers that OpenVINO computes in integers"] == "6 of 6"
    if bits == (8, 8):
        export(capture(made, x), made, tmp_path / "any.onnx")
        kinds = openvino_kinds(tmp_path / "any.onnx")
        layers = {
            key: count for key, count in kinds.items() if key[0] in ("Convolution", "GroupConvolution", "FullyConnected")
        }
        assert {precision for _, precision in layers} <= {"u8", "i8"}


def test_a_file_that_overflows_here_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are wrong are drawn by another bias, so that it can be seen on any processor."""
    pytest.importorskip("openvino")
    network, x = small()
    made = quantized(network, x, (8, 8), False)
    path = tmp_path / "net.onnx"
    export(capture(made, x), made, path, "openvino")
    made.get_submodule("blocks.0.norm1").bias.data += 1.0
    information = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "INFORMATION", information)
    information.write_text("flags\t: avx2 avx512_vnni\n")
    plain = verify(path, made, x).fault
    assert plain
    assert "VNNI" not in plain
    information.write_text("flags\t: avx2 bmi2\n")
    assert verify(path, made, x).fault == (
        f"{plain} (this processor has no VNNI, which may be why: weights and inputs of stem, blocks.0.first, "
        f"blocks.0.second, blocks.1.first and 2 more are integers of 8 bits: {OVERFLOW})"
    )


@pytest.mark.parametrize(
    ("scheme", "bits", "wide"),
    [
        ("linear", (7, 8), False),
        ("linear", (8, 8), True),
        ("linear", (8, 7), False),
        ("dorefa", (7, 8), True),  # its integers have a bit more than its widths
        ("linear", (16, 8), False),  # computed in float, as the next two
        ("linear", (8, 16), False),
        ("linear", (8, None), False),
    ],
)
def test_what_overflows_is_told_by_the_integers_of_both_operands(scheme: str, bits: Any, wide: bool) -> None:
    network, x = small()
    made = quantized(network, x, bits, False, scheme)
    assert bool(overflow_words(made, "openvino")) == wide
    assert not overflow_words(made, None)


def test_layers_with_zero_points_and_integers_of_minus_128(tmp_path: Path) -> None:
    network, x = small()
    for scheme in ("linear-asymmetric", "lsq"):
        made = quantized(network, x, (8, 8), True, scheme)
        layer: Any = made.stem
        layer.weight.data[:, 0, 0, 0] = -10.0  # the smallest integer, in front of a negative factor
        written(made, x, tmp_path / "net.onnx")


def test_openvino_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = small()
    made = quantized(network, x, (8, 8), False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    given: dict[str, Any] = {"notes": {}, "on_progress": lambda *told: None}
    with pytest.raises(ImportError, match=r"the package openvino: pip install 'onnx>="):
        OnnxExporter().export(made, capture(made, x), x, tmp_path / "net.onnx", options={"flavour": "openvino"}, **given)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unknown flavour 'tvm' of ONNX; known: tensorrt, openvino"):
        export(capture(made, x), made, tmp_path / "net.onnx", "tvm")
