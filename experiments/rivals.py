"""What others make of the same work on a CPU, for benchmarks: single int8 layers, and whole networks. One thread each.

A rival is made once and called often, through the fastest interface its library has. What isn't installed raises
ImportError when a rival is made.

    pip install -c constraints.txt -e ".[onnx,tvm,zoo]" onnxscript openvino
"""

from __future__ import annotations

import functools
import importlib
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hw_models.runtimes.openvino import same_signal_stack
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

    Outputs are round(scale[c] * (sum + bias[c])) + 128, clipped to bytes.
    """

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
    def outputs(self) -> int:
        return math.prod(self.sizes[1])

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


def onnx_layer(
    layer: Int8Layer, nodes: Callable[[Any, str], list[Any]], shared: dict[str, Any], own: dict[str, Any], copies: int
) -> Any:
    """Make a model of the same layer several times, side by side with different weights: of input x, outputs y0, y1...

    `nodes` makes those of one copy, whose names end in its number.
    """
    onnx = importlib.import_module("onnx")
    make, of = onnx.helper, onnx.TensorProto
    given, made = layer.sizes
    held = dict(shared)
    for copy in range(copies):
        held |= {f"{name}{copy}": np.roll(value, copy, -1) for name, value in own.items()}
    graph = make.make_graph(
        [node for copy in range(copies) for node in nodes(make.make_node, str(copy))],
        "layer",
        [make.make_tensor_value_info("x", of.UINT8, given)],
        [make.make_tensor_value_info(f"y{copy}", of.UINT8, made) for copy in range(copies)],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in held.items()],
    )
    domains = [make.make_opsetid("", OPSET), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=domains)
    model.ir_version = IR_VERSION
    return model


def onnxruntime_layer(layer: Int8Layer, copies: int = 1) -> Rival:
    """ONNX Runtime's QLinearConv channels last, as its optimizer makes it inside a network, or QGemm."""
    shared: dict[str, Any] = {
        "x_scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w_scale": layer.scale,
        "w_zero": np.zeros(layer.conv.out_channels, np.int8),
        "y_scale": np.float32(1),
        "y_zero": np.uint8(128),
        "bias": layer.bias,
    }

    def nodes(node: Any, copy: str) -> list[Any]:
        names = ["x", "x_scale", "x_zero", f"w{copy}", "w_scale", "w_zero"]
        end = {"outputs": [f"y{copy}"], "domain": "com.microsoft"}
        if layer.linear:
            return [node("QGemm", [*names, "bias", "y_scale", "y_zero"], **end)]
        return [node("QLinearConv", [*names, "y_scale", "y_zero", "bias"], **end, **layer.attributes, channels_last=1)]

    weights = layer.weights
    if layer.linear:
        weights = weights[:, :, 0, 0].T
    model = onnx_layer(layer, nodes, shared, {"w": weights}, copies)
    return onnxruntime_rival("ONNX Runtime", model.SerializeToString(), layer.image.reshape(layer.sizes[0]))


def onnxruntime_rival(name: str, model: bytes, example: NDArray[Any]) -> Rival:
    """A model of one input, with buffers bound once; of its outputs, `run` returns the first."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given, names = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]
    # Of a copy: it shares the memory of the array, and `run` writes to it.
    x = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(example).copy())
    made = [ort.OrtValue.ortvalue_from_numpy(value) for value in session.run(names, {given: example})]
    binding = session.io_binding()
    binding.bind_ortvalue_input(given, x)
    for name_of, value in zip(names, made, strict=True):
        binding.bind_ortvalue_output(name_of, value)
    inner, bound = session._sess, binding._iobinding  # without the checks in Python

    def call() -> None:
        inner.run_with_iobinding(bound, None)

    def run(value: NDArray[Any]) -> NDArray[Any]:
        x.update_inplace(np.ascontiguousarray(value.reshape(example.shape)))
        call()
        return np.array(made[0].numpy())

    return Rival(name, run, call)


def openvino_layer(layer: Int8Layer, copies: int = 1) -> Rival:
    """A layer of QuantizeLinear and DequantizeLinear as OpenVINO reads it, tensors channels last."""
    shared: dict[str, Any] = {
        # A scale of 1 would vanish, and OpenVINO would not see that this is quantized.
        "half": np.float32(0.5),
        "x_zero": np.uint8(0),
        "y_zero": np.uint8(128),
        "w_scale": layer.scale,
        "w_zero": np.zeros(layer.conv.out_channels, np.int8),
        "bias": layer.real_bias * np.float32(0.5),
    }

    def nodes(node: Any, copy: str) -> list[Any]:
        weights, total = f"real_w{copy}", f"sum{copy}"
        made = [node("DequantizeLinear", [f"w{copy}", "w_scale", "w_zero"], [weights], axis=0)]
        if copy == "0":
            made.append(node("DequantizeLinear", ["x", "half", "x_zero"], ["real"]))
            if not layer.linear:
                made.append(node("Transpose", ["real"], ["first"], perm=(0, 3, 1, 2)))
        if layer.linear:
            made.append(node("Gemm", ["real", weights, "bias"], [total], transB=1))
        else:
            made.append(node("Conv", ["first", weights, "bias"], [f"{total}_first"], **layer.attributes))
            made.append(node("Transpose", [f"{total}_first"], [total], perm=(0, 2, 3, 1)))
        return [*made, node("QuantizeLinear", [total, "half", "y_zero"], [f"y{copy}"])]

    weights = layer.weights
    if layer.linear:
        weights = weights[:, :, 0, 0]
    model = onnx_layer(layer, nodes, shared, {"w": weights}, copies)
    return openvino_rival("OpenVINO", model, layer.image.reshape(layer.sizes[0]))


def openvino_rival(name: str, model: Any, example: NDArray[Any], precision: str = "") -> Rival:
    """An ONNX model of one input; `run` returns its first output, `note` says in what precision its layers run.

    What isn't quantized runs in the `precision` that is given, such as f32; empty leaves the choice to OpenVINO.
    """
    ov = importlib.import_module("openvino")
    core = ov.Core()
    read = core.read_model(model.SerializeToString(), b"")
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    with same_signal_stack():
        compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()
    buffer = np.ascontiguousarray(example).copy()
    request.set_input_tensor(ov.Tensor(buffer, shared_memory=True))
    request.infer()

    def call() -> None:
        request.start_async()
        request.wait()

    def run(value: NDArray[Any]) -> NDArray[Any]:
        buffer[:] = value.reshape(buffer.shape)
        call()
        return np.array(request.get_output_tensor(0).data)

    kinds = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
    ran = []
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].value in kinds:
            ran.append(str(facts["runtimePrecision"].value))
    return Rival(name, run, call, ", ".join(f"{ran.count(kind)} in {kind}" for kind in sorted(set(ran))))


def torch_layer(layer: Int8Layer, engine: str) -> Rival:
    """Torch's quantized operators with packed weights."""
    conv = layer.conv
    torch.backends.quantized.engine = engine
    zeros = torch.zeros(conv.out_channels, dtype=torch.int64)
    scale, bias = torch.from_numpy(layer.scale), torch.from_numpy(layer.real_bias)
    weights = torch.from_numpy(layer.weights)

    def read(image: NDArray[Any]) -> Tensor:
        if layer.linear:
            return torch._make_per_tensor_quantized_tensor(torch.from_numpy(image.reshape(-1, conv.in_channels)), 1.0, 0)
        x = torch.from_numpy(image.reshape(layer.sizes[0])).permute(0, 3, 1, 2)
        return torch._make_per_tensor_quantized_tensor(x, 1.0, 0).contiguous(memory_format=torch.channels_last)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if layer.linear:
            weights = weights[:, :, 0, 0]
        quantized = torch._make_per_channel_quantized_tensor(weights.contiguous(), scale, zeros, 0)
        inputs = {"x": read(layer.image)}
        if layer.linear:
            packed = torch.ops.quantized.linear_prepack(quantized, bias)
            operator: Any = torch.ops.quantized.linear.default
        else:
            options = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
            packed = torch.ops.quantized.conv2d_prepack(quantized, bias, *options)
            operator = torch.ops.quantized.conv2d.new

    def call() -> Tensor:
        made: Tensor = operator(inputs["x"], packed, 1.0, 128)
        return made

    def run(value: NDArray[Any]) -> NDArray[Any]:
        inputs["x"] = read(value)
        made = call().int_repr()
        if not layer.linear:
            made = made.permute(0, 2, 3, 1)
        return np.ascontiguousarray(made.numpy())

    return Rival(f"torch {engine}", run, call)


def torch_float_layer(layer: Int8Layer) -> Rival:
    """The same layer in float32, its output not quantized; channels last."""
    conv = layer.conv
    bias = torch.from_numpy(layer.real_bias)
    weights = torch.from_numpy(layer.weights.astype(np.float32) * layer.scale[:, None, None, None])
    x = torch.from_numpy(layer.image.astype(np.float32))  # a copy, which `run` writes to
    if layer.linear:
        weights, seen = weights[:, :, 0, 0].contiguous(), x.reshape(-1, conv.in_channels)

        def call() -> Tensor:
            return F.linear(seen, weights, bias)
    else:
        weights = weights.contiguous(memory_format=torch.channels_last)
        seen = x.permute(0, 3, 1, 2)

        def call() -> Tensor:
            return F.conv2d(seen, weights, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def run(value: NDArray[Any]) -> NDArray[Any]:
        x.copy_(torch.from_numpy(value.reshape(tuple(x.shape)).astype(np.float32)))
        return call().numpy()

    return Rival("torch float32", run, call)


TORCH_ENGINES = ("fbgemm", "onednn")
INT8_LIBRARIES: dict[str, Callable[[Int8Layer, int], Rival]] = {"ONNX Runtime": onnxruntime_layer, "OpenVINO": openvino_layer}


# Whole networks


def torch_eager(network: nn.Module, images: Tensor) -> Rival:
    """As `haq.networks` loads it, weights channels last where that is faster, on one example, a batch."""
    return _torch_rival("torch float32 eager", network.eval(), images)


def torch_compiled(network: nn.Module, images: Tensor) -> Rival:
    """Needs a C++ compiler."""
    return _torch_rival("torch float32 compiled", torch.compile(network.eval()), images)


def _torch_rival(name: str, network: Callable[[Tensor], Tensor], images: Tensor) -> Rival:
    channels_last = images.clone()
    if images.dim() == 4:
        channels_last = images.clone(memory_format=torch.channels_last)

    def call() -> Tensor:
        with torch.inference_mode():
            return network(channels_last)

    def run(value: NDArray[Any]) -> NDArray[Any]:
        channels_last.copy_(torch.from_numpy(value))
        return np.array(call().numpy())  # a network may return its input

    call()
    return Rival(name, run, call)


def onnxruntime_float(network: nn.Module, images: Tensor) -> Rival:
    return onnxruntime_rival("ONNX Runtime float32", _exported(network, images), images.numpy())


def onnxruntime_int8(network: nn.Module, images: Tensor, calibration: Tensor) -> Rival:
    """Static QuantizeLinear/DequantizeLinear: weights per channel, unsigned activations by their least and largest values."""
    return onnxruntime_rival("ONNX Runtime int8", _quantized(network, images, calibration), images.numpy())


def openvino_int8(network: nn.Module, images: Tensor, calibration: Tensor) -> Rival:
    """OpenVINO runs the model that ONNX Runtime has quantized."""
    onnx = importlib.import_module("onnx")
    model = onnx.load_from_string(_quantized(network, images, calibration))
    return openvino_rival("OpenVINO int8", model, images.numpy())


def network_rivals(network: nn.Module, images: Tensor, calibration: Tensor) -> tuple[list[Rival], dict[str, str]]:
    """Every rival that is installed, and by its name what the others lack."""
    makers: dict[str, Callable[[], Rival]] = {
        "torch float32 eager": lambda: torch_eager(network, images),
        "torch float32 compiled": lambda: torch_compiled(network, images),
        "ONNX Runtime float32": lambda: onnxruntime_float(network, images),
        "ONNX Runtime int8": lambda: onnxruntime_int8(network, images, calibration),
        "OpenVINO int8": lambda: openvino_int8(network, images, calibration),
    }
    made, missing = [], {}
    for name, make in makers.items():
        try:
            made.append(make())
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return made, missing


@functools.lru_cache(maxsize=1)  # of the last network: several rivals want it
def _exported(network: nn.Module, images: Tensor) -> bytes:
    """The network in ONNX."""
    importlib.import_module("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network.eval(), (images,), dynamo=True, verbose=False)
        assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


@functools.lru_cache(maxsize=1)
def _quantized(network: nn.Module, images: Tensor, calibration: Tensor) -> bytes:
    ort: Any = importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process

    class Images(ort.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self, name: str) -> None:
            self.batches = iter(
                [{name: batch.numpy()} for batch in calibration.split(len(images)) if len(batch) == len(images)]
            )

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("exported", "prepared", "quantized"))
        exported.write_bytes(_exported(network, images))
        prepare(str(exported), str(prepared), skip_symbolic_shape=True)  # which folds batch normalization, too
        (given,) = importlib.import_module("onnx").load(str(prepared)).graph.input
        options = {"per_channel": True, "activation_type": ort.QuantType.QUInt8, "weight_type": ort.QuantType.QInt8}
        ort.quantize_static(str(prepared), str(quantized), Images(given.name), quant_format=ort.QuantFormat.QDQ, **options)
        return quantized.read_bytes()
