"""--to onnx --for tensorrt writes signed integers of 8 bits around zero, and refuses what TensorRT can't hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.graph import capture
from haq.deployment.onnx import OnnxExporter, export, verify
from haq.deployment.onnx_tensorrt import signed_codes
from haq.deployment.program import Codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.body(x) + x).relu().mean((2, 3))
        made: Tensor = self.last(self.hidden(x).relu())
        return made


def network(policy: Any, scheme: str = "linear", residuals: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made, x = Net(), torch.randn(12, 3, 8, 8)
    made(x)
    made.eval()
    made.norm.weight.data[:4] *= -1
    if isinstance(policy, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(made, w=8, a=8), policy)
    if residuals:
        made = Q.insert_residual_quantizers(made, x)
    return Q.quantize(made, policy, calibrate=x, scheme=scheme).eval(), x


def written(quantized: nn.Module, x: Tensor, path: Path) -> Any:
    export(capture(quantized, x), quantized, path, "tensorrt")
    found = verify(path, quantized, x)
    print(found, found.further)
    assert found.flavour == "tensorrt"
    assert not found.fault
    return found


@pytest.mark.parametrize("policy", [(8, 8), (4, 7), {"stem": (8, 8), "body": (3, 5), "hidden": (8, 8), "last": (None, None)}])
@pytest.mark.parametrize("residuals", [False, True])
def test_integers_are_signed_and_around_zero(policy: Any, residuals: bool, tmp_path: Path) -> None:
    quantized, x = network(policy, residuals=residuals)
    found = written(quantized, x, tmp_path / "net.onnx")
    assert found.output_difference <= 0.05 * found.largest_output
    model = onnx.load(tmp_path / "net.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not [name for name, value in held.items() if value.dtype == np.uint8]
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    rounded = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert rounded
    for node in rounded:
        assert (held[node.input[1]] > 0).all()
        if len(node.input) > 2:
            assert held[node.input[2]].dtype == np.int8
            assert not held[node.input[2]].any()
        if node.op_type == "QuantizeLinear":
            # TensorRT wants nothing in between.
            assert set(readers[node.output[0]]) == {"DequantizeLinear"}


def test_what_becomes_of_integers() -> None:
    assert signed_codes(Codes(0.1, 8, False)).range == (0, 127)
    assert signed_codes(Codes(0.1, 8, False)).scale == pytest.approx(0.1 * 255 / 127)
    assert signed_codes(Codes(0.1, 8, True)).range == (-128, 127)
    for codes in (Codes(0.1, 7, False), Codes(0.1, 4, True)):
        assert signed_codes(codes) == codes


def test_halved_inputs_are_counted(tmp_path: Path) -> None:
    quantized, x = network((8, 8))
    rows = dict(written(quantized, x, tmp_path / "net.onnx").further)
    assert rows["layers between integers of 8 bits"] == "4 of 4"
    assert rows["inputs of 8 unsigned bits that TensorRT has 7 of"] == "3"  # all but the image


def test_weights_alone_of_4_bits_are_packed(tmp_path: Path) -> None:
    quantized, x = network({"stem": (8, 8), "body": (4, None), "hidden": (4, None), "last": (3, None)})
    written(quantized, x, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    four = [tensor.dims for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
    assert sorted(map(list, four)) == [[4, 16], [16, 8]]
    assert model.opset_import[0].version == 21


@pytest.mark.parametrize(
    ("policy", "scheme", "message"),
    [
        ({"body": (1, 8)}, "linear", "layer 'body' can't be deployed for TensorRT: its weights have 1 bit"),
        ({"hidden": (8, 1)}, "linear", "layer 'hidden' can't be deployed for TensorRT: its input has 1 bit"),
        ({"last": (16, 8)}, "linear", "layer 'last' can't be deployed for TensorRT: its weights have 16 bits"),
        ({}, "linear-asymmetric", r"layer 'stem' can't be deployed for TensorRT: its input is asymmetric, with zero at \d+"),
    ],
)
def test_what_tensorrt_cannot_hold_is_refused(policy: Any, scheme: str, message: str, tmp_path: Path) -> None:
    whole = dict.fromkeys(("stem", "body", "hidden", "last"), (8, 8)) | policy
    quantized, x = network(whole, scheme)
    given: dict[str, Any] = {"notes": {}, "on_progress": lambda *told: None, "options": {"flavour": "tensorrt"}}
    graph = capture(quantized, x)
    with pytest.raises(ValueError, match=message):
        OnnxExporter().export(quantized, graph, x, tmp_path / "net.onnx", **given)
    with pytest.raises(ValueError, match=message):
        OnnxExporter().check_operations(quantized, graph, x, options={"flavour": "tensorrt"})
    OnnxExporter().check_operations(quantized, graph, x, options={})
    assert not list(tmp_path.iterdir())
