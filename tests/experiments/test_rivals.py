"""Rivals compute the image that they are given, and leave the caller's images as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from experiments import rivals
from hw_models.tvm_cpu.conv import Conv


def doubling() -> bytes:
    """An ONNX model that doubles its input."""
    onnx = pytest.importorskip("onnx")
    make, of = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("Add", ["x", "x"], ["y"])],
        "doubling",
        [make.make_tensor_value_info("x", of, [2, 3])],
        [make.make_tensor_value_info("y", of, [2, 3])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", rivals.OPSET)])
    model.ir_version = rivals.IR_VERSION
    return bytes(model.SerializeToString())


def onnxruntime(images: NDArray[Any]) -> rivals.Rival:
    pytest.importorskip("onnxruntime")
    return rivals.onnxruntime_rival("ONNX Runtime", doubling(), images)


def eager(images: NDArray[Any]) -> rivals.Rival:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    return rivals.torch_eager(Double(), torch.from_numpy(images))


@pytest.mark.parametrize("make", [onnxruntime, eager])
def test_a_rival_writes_to_no_image_of_the_caller(make: Callable[[NDArray[Any]], rivals.Rival]) -> None:
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept = images.copy()
    rival = make(images)
    assert np.array_equal(images, kept)
    other = np.full((2, 3), 7, np.float32)
    first = rival.run(other)
    assert np.array_equal(first, np.full((2, 3), 14))
    assert np.array_equal(images, kept)
    assert (other == 7).all()
    rival.run(images)
    assert (images == kept).all()
    assert (first == 14).all()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["torch fbgemm", "torch float32", "ONNX Runtime"])
def test_a_single_layer_computes_what_it_is_given(name: str, linear: bool) -> None:
    conv = Conv(4, 8, (5, 5), (5, 5), (3, 3), padding=(1, 1))
    if linear:
        conv = Conv(4, 8, (5, 1), (5, 1))
    random = np.random.default_rng(0)
    layer = rivals.Int8Layer(
        conv,
        random.integers(-127, 128, (8, 4, *conv.kernel), np.int8),
        np.full(8, 2**-8, np.float32),
        np.zeros(8, np.int32),
        random.integers(0, 256, (1, *conv.input_size, 4), np.uint8),
    )
    kept = layer.image.copy()
    if name == "ONNX Runtime":
        pytest.importorskip("onnxruntime")
        rival = rivals.onnxruntime_layer(layer)
    elif name == "torch fbgemm":
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            pytest.skip("this torch has no fbgemm")
        rival = rivals.torch_layer(layer, "fbgemm")
    else:
        rival = rivals.torch_float_layer(layer)
    nothing = rival.run(np.zeros_like(layer.image))
    assert len(np.unique(nothing)) == 1  # the zero point
    assert len(np.unique(rival.run(layer.image))) > 1
    assert (layer.image == kept).all()
