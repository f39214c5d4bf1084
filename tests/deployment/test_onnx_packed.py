"""Weights are packed at their bits in ONNX files, and are the same bytes again when ONNX Runtime has loaded them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import quantizers as Q
from haq.deployment.exporter import policy_storage_bytes
from haq.deployment.graph import capture
from haq.deployment.onnx import export, verify
from haq.deployment.onnx_compact import layer_call
from haq.deployment.onnx_weights import FoldedWeights, pack

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_integers_can_be_read(bits: int) -> None:
    integers = np.random.default_rng(0).integers(0, 2**bits, 29)
    packed = pack(integers, bits)
    assert packed.shape == (4, bits, 1)
    planes = np.unpackbits(packed[:, :, 0], axis=1, bitorder="little").reshape(4, bits, 8)
    assert np.array_equal((planes * 2 ** np.arange(bits)[:, None]).sum(1).reshape(-1)[:29], integers)


def kept(path: Path) -> tuple[list[NDArray[Any]], set[str]]:
    """The integers of 8 bits that ONNX Runtime keeps of a file, and its operators."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    model = onnx.load(path.with_suffix(".optimized"))
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    kinds = {node.op_type for node in model.graph.node}
    return [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.size > 64], kinds


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_packed_and_unpacked_by_the_runtime(bits: int, tmp_path: Path) -> None:
    """Half of the layers share what unpacks them; their numbers of weights are no multiples of eight."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.ReLU(), nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 67, 3), nn.ReLU(), nn.Conv2d(67, 9, 3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(36, 7)),
    ).eval()
    x = torch.rand(8, 3, 8, 8)
    names = list(Q.BitPolicy.uniform(network, w=8, a=8))
    made = Q.quantize(network, dict.fromkeys(names, (bits, 8)), calibrate=x).eval()
    path = tmp_path / "net.onnx"
    export(capture(made, x), made, path)
    found = verify(path, made, x)
    assert not found.fault
    assert found.same_answers == 1
    tensors, kinds = kept(path)
    assert {"QLinearConv", "QGemm"} <= kinds
    assert not {"Cast", "Floor", "MatMul", "Split", "Reshape"} & kinds
    expected = [layer.scheme.integer_weights(layer).codes.numpy() for layer in Q.quant_layers(made).values()]
    for tensor, q in zip(sorted(tensors, key=len), sorted(expected, key=len), strict=True):
        factor = abs(tensor).max() / abs(q).max()
        assert np.log2(factor) == int(np.log2(factor))
        assert np.array_equal(np.sort(tensor, None), np.sort(q * int(factor), None))
    assert path.stat().st_size < sum(-(-q.size * bits // 8) for q in expected) + 4000


def test_a_file_is_as_large_as_what_the_policy_stores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU()).eval()
    x = torch.rand(4, 16, 8, 8)
    made = Q.quantize(network, {"0": (5, 8), "3": (3, 6)}, scheme=Q.Linear(calibration="max"), calibrate=x).eval()
    path = tmp_path / "net.onnx"
    export(capture(made, x), made, path)
    stored = policy_storage_bytes(made, x)
    assert stored == 128 * 16 * 9 * 5 // 8 + 128 * 128 * 9 * 3 // 8 + 4 * (2 * 128 + 2 + 2 * 128)
    assert path.stat().st_size <= 1.1 * stored
    found = verify(path, made, x)
    words = dict(found.further)["size of the file"]
    assert words.endswith(f"{path.stat().st_size / stored:.2f} of the {stored / 1000:.2f} kB that layers store")


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_equal_weights_of_two_layers(kind: str, tmp_path: Path) -> None:
    """Each is written by itself: ONNX Runtime can't make two integer kernels of one tensor."""
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    layers: list[Any] = [nn.Linear(64, 64, bias=False) for _ in range(2)]
    if kind == "conv":
        x = torch.randn(4, 64, 3, 3)
        layers = [nn.Conv2d(64, 64, 1, bias=False) for _ in range(2)]
    layers[1].weight.data = layers[0].weight.data.clone()
    made = Q.quantize(nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval(), {"0": (8, 8), "2": (8, 8)}, calibrate=x).eval()
    export(capture(made, x), made, tmp_path / "net.onnx")
    assert 2 * 64 * 64 < (tmp_path / "net.onnx").stat().st_size < 2.6 * 64 * 64
    assert not verify(tmp_path / "net.onnx", made, x).fault


def test_signs_turn_but_for_the_smallest_integer() -> None:
    q = np.array([[-128, 5], [-127, 5], [3, 4], [1, 2]], np.int8)
    weights = FoldedWeights(q, 8, np.array([-1.0, -1.0, 0.0, 2.0]), np.zeros(4)).positive()
    assert weights.q.tolist() == [[-128, 5], [127, -5], [0, 0], [1, 2]]
    assert weights.scale.tolist() == [-1.0, 1.0, 2.0, 2.0]
    few = FoldedWeights(np.array([[-2, 1], [1, 1]], np.int8), 2, np.array([-1.0, -1.0]), np.zeros(2)).positive()
    assert few.q.tolist() == [[-2, 1], [-1, -1]]


def test_names_of_small_files_tell_the_layer() -> None:
    layers = ["stem", "blocks.0", "0"]
    assert layer_call("stem:input", layers) == "stem"
    assert layer_call("~1@2", layers) == "blocks.0@2"
    assert layer_call("~2", layers) == "0"
    assert layer_call("~3", layers) is None
    assert layer_call("stem:weight", layers) is None
