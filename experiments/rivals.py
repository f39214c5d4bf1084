"""What others make of the same work on a CPU, for benchmarks: single int8 layers, and whole networks. One thread each.

A rival is made once and called often, through the fastest interface its library has. What isn't installed raises
ImportError when a rival is made.

    pip install -c constraints.txt -e ".[onnx,zoo]" openvino
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from hw_models.tvm_cpu.conv import Conv

OPSET, IR_VERSION = 17, 10


@dataclass
class Rival:
    """`call` does the work once, on the last input that `run` was given (or on the example it was made with)."""

    name: str
    run: Callable[[NDArray[Any]], NDArray[Any]]
    call: Callable[[], object]
    note: str = ""


@dataclass(frozen=True)
class Int8Layer:
    """A layer for libraries: bytes (zero point 0) in and out, channels last, weights of 8 bits with a scale per channel.
    Outputs are round(scale[c] * (sum + bias[c])) + 128, clipped to bytes."""

    conv: Conv
    weights: NDArray[np.int8]  # (C_out, C_in / groups, kh, kw)
    scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    image: NDArray[np.uint8]  # (batch, height, width, C_in)

    @property
    def linear(self) -> bool:
        return self.conv.input_size[1] == 1 and self.conv.kernel == (1, 1) and self.conv.groups == 1 and self.conv.batch == 1

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Of the input and the output."""
        conv = self.conv
        if self.linear:
            return [conv.input_size[0], conv.in_channels], [conv.output_size[0], conv.out_channels]
        return [conv.batch, *conv.input_size, conv.in_channels], [conv.batch, *conv.output_size, conv.out_channels]

    @property
    def real_bias(self) -> NDArray[np.float32]:
        return self.scale * self.bias.astype(np.float32)

    @property
    def attributes(self) -> dict[str, Any]:
        conv = self.conv
        return {
            "kernel_shape": conv.kernel,
            "strides": conv.stride,
            "pads": (*conv.padding, *conv.padding),
            "dilations": conv.dilation,
            "group": conv.groups,
        }


# Single layers


def onnxruntime_layer(layer: Int8Layer) -> Rival:
    """ONNX Runtime's QLinearConv channels last, as its optimizer makes it inside a network, or QGemm."""
    onnx = importlib.import_module("onnx")
    make, numpy_helper, of = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    conv = layer.conv
    constants: dict[str, NDArray[Any]] = {
        "x_scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w": layer.weights,
        "w_scale": layer.scale,
        "w_zero": np.zeros(conv.out_channels, np.int8),
        "y_scale": np.float32(1),
        "y_zero": np.uint8(128),
        "bias": layer.bias,
    }
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero"]
    if layer.linear:
        constants["w"] = layer.weights[:, :, 0, 0].T
        node = make.make_node("QGemm", [*names, "bias", "y_scale", "y_zero"], ["y"], domain="com.microsoft")
    else:
        options = layer.attributes | {"channels_last": 1}
        node = make.make_node("QLinearConv", [*names, "y_scale", "y_zero", "bias"], ["y"], domain="com.microsoft", **options)
    given, made = (make.make_tensor_value_info(name, of.UINT8, size) for name, size in zip("xy", layer.sizes, strict=True))
    held = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    domains = [make.make_opsetid("", OPSET), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(make.make_graph([node], "layer", [given], [made], held), opset_imports=domains)
    model.ir_version = IR_VERSION
    return onnxruntime_rival("ONNX Runtime", model.SerializeToString(), layer.image.reshape(layer.sizes[0]))


def onnxruntime_rival(name: str, model: bytes, example: NDArray[Any]) -> Rival:
    """A model of one input and one output, with buffers bound once."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given, made = session.get_inputs()[0].name, session.get_outputs()[0].name
    x = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(example))
    y = ort.OrtValue.ortvalue_from_numpy(session.run([made], {given: example})[0])
    binding = session.io_binding()
    binding.bind_ortvalue_input(given, x)
    binding.bind_ortvalue_output(made, y)
    inner, bound = session._sess, binding._iobinding  # without the checks in Python

    def call() -> None:
        inner.run_with_iobinding(bound, None)

    def run(value: NDArray[Any]) -> NDArray[Any]:
        x.update_inplace(np.ascontiguousarray(value.reshape(example.shape)))
        call()
        return np.array(y.numpy())

    return Rival(name, run, call)


def openvino_layer(layer: Int8Layer) -> Rival:
    """A layer of QuantizeLinear and DequantizeLinear as OpenVINO reads it, tensors channels last."""
    onnx = importlib.import_module("onnx")
    make, numpy_helper, of = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    conv = layer.conv
    constants: dict[str, NDArray[Any]] = {
        # A scale of 1 would vanish, and OpenVINO would not see that this is quantized.
        "half": np.float32(0.5),
        "x_zero": np.uint8(0),
        "y_zero": np.uint8(128),
        "w": layer.weights,
        "w_scale": layer.scale,
        "w_zero": np.zeros(conv.out_channels, np.int8),
        "bias": layer.real_bias * np.float32(0.5),
    }
    if layer.linear:
        constants["w"] = layer.weights[:, :, 0, 0]
        middle = [make.make_node("Gemm", ["real", "real_w", "bias"], ["sum"], transB=1)]
    else:
        middle = [
            make.make_node("Transpose", ["real"], ["first"], perm=(0, 3, 1, 2)),
            make.make_node("Conv", ["first", "real_w", "bias"], ["sum_first"], **layer.attributes),
            make.make_node("Transpose", ["sum_first"], ["sum"], perm=(0, 2, 3, 1)),
        ]
    nodes = [
        make.make_node("DequantizeLinear", ["x", "half", "x_zero"], ["real"]),
        make.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["real_w"], axis=0),
        *middle,
        make.make_node("QuantizeLinear", ["sum", "half", "y_zero"], ["y"]),
    ]
    given, made = (make.make_tensor_value_info(name, of.UINT8, size) for name, size in zip("xy", layer.sizes, strict=True))
    held = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    model = make.make_model(make.make_graph(nodes, "layer", [given], [made], held), opset_imports=[make.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return openvino_rival("OpenVINO", model, layer.image.reshape(layer.sizes[0]))


def openvino_rival(name: str, model: Any, example: NDArray[Any]) -> Rival:
    """An ONNX model of one input and one output; `note` says in what precision its layers run."""
    ov = importlib.import_module("openvino")
    core = ov.Core()
    read = core.read_model(model.SerializeToString(), b"")
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()
    buffer = np.ascontiguousarray(example).copy()
    request.set_input_tensor(ov.Tensor(buffer))
    request.infer()

    def call() -> None:
        request.start_async()
        request.wait()

    def run(value: NDArray[Any]) -> NDArray[Any]:
        buffer[:] = value.reshape(buffer.shape)
        call()
        return np.array(request.get_output_tensor().data)

    kinds = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
    ran = []
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].value in kinds:
            ran.append(str(facts["runtimePrecision"].value))
    return Rival(name, run, call, ", ".join(f"{ran.count(kind)} in {kind}" for kind in sorted(set(ran))))


def torch_layer(layer: Int8Layer, engine: str) -> Rival:
    """torch's quantized operators with packed weights."""
    conv = layer.conv
    torch.backends.quantized.engine = engine
    zeros = torch.zeros(conv.out_channels, dtype=torch.int64)
    scale, bias = torch.from_numpy(layer.scale), torch.from_numpy(layer.real_bias)
    weights = torch.from_numpy(layer.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if layer.linear:
            weights = weights[:, :, 0, 0]
            x = torch.from_numpy(layer.image.reshape(-1, conv.in_channels))
        else:
            x = torch.from_numpy(layer.image).permute(0, 3, 1, 2)  # channels last
        quantized = torch._make_per_channel_quantized_tensor(weights.contiguous(), scale, zeros, 0)
        example = torch._make_per_tensor_quantized_tensor(x, 1.0, 0)
        if layer.linear:
            packed = torch.ops.quantized.linear_prepack(quantized, bias)
            operator: Any = torch.ops.quantized.linear.default
        else:
            example = example.contiguous(memory_format=torch.channels_last)
            options = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
            packed = torch.ops.quantized.conv2d_prepack(quantized, bias, *options)
            operator = torch.ops.quantized.conv2d.new
    inputs = {"x": example}

    def call() -> torch.Tensor:
        made: torch.Tensor = operator(inputs["x"], packed, 1.0, 128)
        return made

    def run(value: NDArray[Any]) -> NDArray[Any]:
        made = call().int_repr()
        return np.ascontiguousarray((made if layer.linear else made.permute(0, 2, 3, 1)).numpy())

    return Rival(f"torch {engine}", run, call)


def torch_float_layer(layer: Int8Layer) -> Rival:
    """The same layer in float32, its output not quantized; channels last."""
    conv = layer.conv
    bias = torch.from_numpy(layer.real_bias)
    weights = torch.from_numpy(layer.weights.astype(np.float32) * layer.scale[:, None, None, None])
    x = torch.from_numpy(layer.image.astype(np.float32))
    if layer.linear:
        weights, x = weights[:, :, 0, 0].contiguous(), x.reshape(-1, conv.in_channels)

        def call() -> torch.Tensor:
            return F.linear(x, weights, bias)
    else:
        weights = weights.contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 3, 1, 2)

        def call() -> torch.Tensor:
            return F.conv2d(x, weights, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def run(value: NDArray[Any]) -> NDArray[Any]:
        return call().numpy()

    return Rival("torch float32", run, call)


INT8_LAYERS: dict[str, Callable[[Int8Layer], Rival]] = {
    "ONNX Runtime": onnxruntime_layer,
    "torch fbgemm": lambda layer: torch_layer(layer, "fbgemm"),
    "torch onednn": lambda layer: torch_layer(layer, "onednn"),
    "OpenVINO": openvino_layer,
}
