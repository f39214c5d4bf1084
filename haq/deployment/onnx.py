"""A quantized network as an ONNX file: for stock ONNX Runtime, or for tools that read QONNX."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment import onnx_any
from haq.deployment.exporter import SUMMARIES, AnySamples, Exporter, OnProgress, Samples, Verdict
from haq.deployment.graph import Graph, Node, Shape
from haq.deployment.interpreter import OUTPUT_SHARE, fake_quantized
from haq.deployment.lowering import check_integers, integer_activations, integer_weights
from haq.deployment.onnx_any import package
from haq.deployment.program import BYTE_BITS, Codes
from haq.store.files import write
from haq.store.units import percent

FLAVOURS = ("onnx", "qonnx")
# Old enough for every ONNX Runtime since 2022: DequantizeLinear per channel is of opset 13.
OPSET = 17
IR_VERSION = 8
# The first whose QuantizeLinear and DequantizeLinear take integers of 16 bits.
WIDE_OPSET = 21
WIDE_IR_VERSION = 10
QONNX_DOMAIN = "qonnx.custom_op.general"
BATCH = 64
CHECKED = 4  # images on which a file is compared before it is put in its place
INPUT = ":input"  # ends the names of tensors that enter layers

Array = NDArray[Any]


def export(graph: Graph, network: nn.Module, path: str | Path, *, flavour: str = "onnx") -> None:
    """Write a captured network with its present weights, scales and bits to an ONNX file, for images (N, C, H, W) in float.

    The flavours are

        onnx    weights are int8 and DequantizeLinear per output channel; inputs of layers go through QuantizeLinear, a Clip
                of the integers where they have fewer than 8 bits, and DequantizeLinear; signs are Where. Integers of 16 bits
                are int16 or uint16, and the file is of opset 21 then. Any batch size.
        qonnx   the same with the nodes Quant and BipolarQuant of QONNX (Pappalardo et al. 2022, arXiv 2206.07527), weights
                being float32. The batch size is 1, as the tools that read it want.

    What the policy leaves in float has no such nodes, a layer's weights or its input or both. All else is computed in float32,
    as the fake-quantized network does, and ONNX Runtime is kept from making integer kernels with other results of it: the file
    says what the network computes, and runs no faster for it. A layer's input, quantized, is the tensor NAME:input, NAME being
    the layer's name, and name@2 at its second call.

    Args:
        graph: The operations of the network.
        network: The quantized network.
        path: The file.
        flavour: "onnx" or "qonnx".

    Raises:
        ValueError: Naming the layer and its scheme, for weights or activations that are not integers times a scale.
        ImportError: Naming what to install.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"unknown flavour {flavour!r} of ONNX; known: {', '.join(FLAVOURS)}")
    model = _Writer(graph, network, flavour).model()
    if flavour == "qonnx":
        # QONNX executes no file that lacks the shape of any tensor.
        wrapper = package("qonnx.core.modelwrapper").ModelWrapper(model)
        model = wrapper.transform(package("qonnx.transformation.infer_shapes").InferShapes()).model
    else:
        package("onnx").checker.check_model(model, full_check=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, model.SerializeToString())


@dataclass(frozen=True)
class Verification:
    """An ONNX file against the fake-quantized network it was made of.

    same_answers        the share of images with the same largest output
    output_difference   the largest difference of outputs, and `largest_output` the largest output there is
    values, different   how many integers enter layers, and how many of them are others; by how many steps at most (`steps`)
    fault               in words that continue "it", where the file differs by more than rounding; nothing if it doesn't
    """

    flavour: str
    images: int
    same_answers: float
    output_difference: float
    largest_output: float
    values: int
    different: int
    steps: int
    fault: str = ""

    def __str__(self) -> str:
        """Describe it in a sentence."""
        by = ""
        if self.different:
            by = f", by up to {self.steps}"
        return (
            f"{self.flavour}: same answer on {percent(self.same_answers)} of {self.images} images, outputs differ by up to "
            f"{self.output_difference:.3g} (the largest is {self.largest_output:.3g}); of {self.values} integers that enter "
            f"layers {self.different} differ{by}"
        )


def verify(path: str | Path, network: nn.Module, images: Tensor) -> Verification:
    """Run a file of `export` on images (N, C, H, W), as its user would, beside the network in PyTorch.

    ONNX Runtime on the CPU, with the optimizations that it makes by default, or the interpreter of the package `qonnx`. They
    add in another order: where a float32 sum falls on the other side of a tie, an integer differs by one step, and in deep
    networks at 8 bits many do behind it (see `haq.deployment.interpreter.compare`).

    Args:
        path: The file.
        network: The quantized network that it was made of.
        images: Images (N, C, H, W).

    Returns:
        What differs.

    Raises:
        ValueError: Without images, for NaN or infinity in them, and for a file that isn't ONNX.
        ImportError: Naming what to install.
    """
    if not len(images):
        raise ValueError("a file is verified on images, and there are none")
    images = images.float()
    if not images.isfinite().all():
        raise ValueError("a file is verified on images of finite numbers, and these have NaN or infinity")
    model = _read_model(path)
    flavour = "onnx"
    make_runner = _onnx_runner
    if any(opset.domain == QONNX_DOMAIN for opset in model.opset_import):
        flavour = "qonnx"
        make_runner = _qonnx_runner
    run = make_runner(model)
    inputs = {}
    for name, layer in Q.quant_layers(network).items():
        if layer.activation_bits is not None:
            inputs[name] = integer_activations(name, layer)
    rounded = {output for node in model.graph.node for output in node.output if output.endswith(INPUT)}
    same = values = different = steps = 0
    worst = largest = 0.0
    fault = ""
    for batch in images.split(BATCH):
        expected, integers = fake_quantized(network, batch)
        other = {f"{name}{INPUT}" for name in integers} ^ rounded
        fault = fault or _other_layers(other, rounded)
        names = [name for name in integers if f"{name}{INPUT}" in rounded]
        outputs, entered = run(batch.numpy(), [f"{name}{INPUT}" for name in names])
        real = expected.numpy()
        outputs = outputs.reshape(real.shape)
        same += int((outputs.argmax(1) == real.argmax(1)).reshape(len(real), -1).all(1).sum())
        worst = max(worst, float(np.abs(outputs - real).max()))
        largest = max(largest, float(np.abs(real).max()))
        equal = np.ones(len(real), bool)  # images all of whose integers were the same so far
        for name, x in zip(names, entered, strict=True):
            codes, q = inputs[name.partition("@")[0]], integers[name]
            gap = np.abs(np.rint(x / np.float32(codes.scale)).astype(int).reshape(q.shape) - q)
            values += q.size
            different += int((gap > 0).sum())
            steps = max(steps, int(gap.max()))
            of_image = gap.reshape(len(gap), -1).max(1)
            most = int(of_image[equal].max(initial=0))
            if most > codes.one_step:
                fault = fault or f"gives layer {name!r} integers that are off by up to {most}, from the same ones before"
            equal &= of_image == 0
        apart = float(np.abs(outputs - real)[equal].max(initial=0))
        if not apart <= OUTPUT_SHARE * np.abs(real).max():
            fault = fault or f"gives outputs that are off by {apart:.3g} where every layer gets the same integers"
    return Verification(flavour, len(images), same / len(images), worst, largest, values, different, steps, fault)


def _other_layers(other: set[str], rounded: set[str]) -> str:
    """Say which of some tensors enters a layer otherwise than in the network."""
    for tensor in sorted(other):
        name = tensor.removesuffix(INPUT)
        if tensor in rounded:
            return f"rounds what enters layer {name!r}, which the network doesn't"
        return f"doesn't round what enters layer {name!r}, which the network does"
    return ""


def _read_model(path: str | Path) -> Any:
    reader = package("onnx")
    try:
        return reader.load(str(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # those of protobuf, which is onnx's affair
        raise ValueError(f"{path} is not a file of ONNX: {error}") from error


# The outputs for images, and the tensors of these names.
Runner = Callable[[Array, list[str]], tuple[Array, list[Array]]]


def _onnx_runner(model: Any) -> Runner:
    runtime = package("onnxruntime")
    helper = package("onnx").helper
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def session(model: Any) -> Any:
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    # What is looked into can't be optimized away, so the file is run as it is, too.
    plain = session(model)
    opened = None

    def run(images: Array, names: list[str]) -> tuple[Array, list[Array]]:
        nonlocal opened
        if opened is None:
            model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
            opened = session(model)
        entered = []
        if names:
            entered = opened.run(names, {"input": images})
        return plain.run(["output"], {"input": images})[0], entered

    return run


def _qonnx_runner(model: Any) -> Runner:
    execution = package("qonnx.core.onnx_exec")
    make = execution.qonnx_make_model
    wrapper = package("qonnx.core.modelwrapper").ModelWrapper(model)
    resize = package("qonnx.transformation.change_batchsize").ChangeBatchSize
    infer = package("qonnx.transformation.infer_shapes").InferShapes

    def run(images: Array, names: list[str]) -> tuple[Array, list[Array]]:
        sized = wrapper.transform(resize(len(images))).transform(infer())
        # QONNX has ONNX Runtime execute each node as a file of onnx's newest version, which it may not know yet.
        with mock.patch.object(execution, "qonnx_make_model", functools.partial(make, ir_version=IR_VERSION)):
            held = execution.execute_onnx(sized, {"input": images}, return_full_exec_context=True)
        return held["output"], [held[name] for name in names]

    return run


class _Writer:
    """Writes ONNX nodes for those of a graph. A tensor has the name of the graph's node that makes it."""

    def __init__(self, graph: Graph, network: nn.Module, flavour: str) -> None:
        self.onnx = package("onnx")
        self.graph = graph
        self.qonnx = flavour == "qonnx"
        self.layers: Mapping[str, Q.QuantLayer] = Q.quant_layers(network)
        self.shapes = {node.name: node.shape for node in graph.nodes}
        # Results that others than batch norms read.
        self.followed = {name for node in graph.nodes if node.kind != "batch_norm" for name in node.inputs}
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.weights: dict[str, tuple[str, int]] = {}
        self.calls: dict[str, int] = {}
        self.opset, self.ir_version = OPSET, IR_VERSION

    def model(self) -> Any:
        helper = self.onnx.helper
        first, *_, last = self.graph.nodes
        for node in self.graph.nodes[1:]:
            with torch.no_grad():
                self._write(node)
        kinds = {node.kind for node in self.graph.nodes}
        graph = helper.make_graph(
            self.nodes,
            "haq",
            [self._value("input", first.shape, vector=not kinds & {"conv", "max_pool", "avg_pool"})],
            [self._value("output", last.shape, vector=bool(kinds & {"linear", "flatten"}))],
            [self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if self.qonnx:
            opsets.append(helper.make_opsetid(QONNX_DOMAIN, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="haq")

    def _value(self, name: str, shape: Shape, vector: bool) -> Any:
        height, width, channels = shape
        size: list[Any] = ["N", channels]
        if self.qonnx:
            size[0] = 1
        if not vector or (height, width) != (1, 1):
            size += [height, width]
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, size)

    def _op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = np.asarray(value, dtype)
        return name

    def _write(self, node: Node) -> None:
        name, inputs = node.name, list(node.inputs)
        if node.kind in ("conv", "linear"):
            self._layer(node)
        elif node.kind == "batch_norm":
            assert node.scale is not None
            values = {"scale": node.scale, "shift": node.shift, "mean": 0 * node.scale, "variance": 0 * node.scale + 1}
            inputs += [self._constant(f"{name}:{key}", value) for key, value in values.items()]
            self._op("BatchNormalization", inputs, name, epsilon=0.0)
        elif node.kind in ("relu", "clamp"):
            if (node.low, node.high) == (0, math.inf):
                self._op("Relu", inputs, name)
                return
            bounds = {"low": node.low, "high": node.high}
            self._op("Clip", inputs + [self._constant(f"{name}:{key}", bound) for key, bound in bounds.items()], name)
        elif node.kind == "add":
            self._op("Add", inputs, name)
        elif node.kind == "max_pool":
            self._op("MaxPool", inputs, name, **self._window(node))
        elif node.kind == "avg_pool":
            window = self._window(node)
            del window["dilations"]
            self._op("AveragePool", inputs, name, count_include_pad=1, **window)
        elif node.kind == "flatten":
            self._op("Flatten", inputs, name)
        else:
            self._op("Identity", inputs, "output")

    def _window(self, node: Node) -> dict[str, Any]:
        window = node.window
        assert window is not None
        ends = window.end_padding(self.shapes[node.inputs[0]][:2], node.shape[:2])
        return {
            "kernel_shape": window.kernel,
            "strides": window.stride,
            # Rows that aren't looked at at the end need no cutting off: ONNX rounds sizes down.
            "pads": (*window.padding, *(max(0, end) for end in ends)),
            "dilations": window.dilation,
        }

    def _layer(self, node: Node) -> None:
        name = node.module
        layer = self.layers[name]
        (source,) = node.inputs
        self.calls[name] = self.calls.get(name, 0) + 1
        step = name
        if self.calls[name] > 1:
            step = f"{name}@{self.calls[name]}"
        if name not in self.weights:
            self.weights[name] = self._weight(name, layer)
        weight, bits = self.weights[name]
        if layer.activation_bits is not None:
            source = self._activation(step, name, layer, source, bits, node.kind == "linear")
        inputs = [source, weight]
        made = node.name
        bias = None
        real_bias = layer.effective_bias()
        if real_bias is not None:
            bias = real_bias.detach().float().numpy()
        # Between quantized layers, ONNX Runtime would round a layer's bias to multiples of both scales' product, which at few
        # bits is far off, and round its result in another way than is written. An addition in between keeps it from that.
        apart = layer.activation_bits is not None and (bias is not None or node.name in self.followed)
        if apart:
            made = f"{node.name}:sums"
        elif bias is not None:
            inputs.append(self._constant(f"{name}.bias", bias))
        if node.kind == "linear":
            self._op("Gemm", inputs, made, transB=1)
        else:
            assert node.window is not None
            self._op("Conv", inputs, made, group=node.window.groups, **self._window(node))
        if apart:
            if bias is None:
                bias = np.zeros(node.shape[2])
            if node.kind == "conv":
                bias = bias.reshape(-1, 1, 1)
            self._op("Add", [made, self._constant(f"{name}.bias", bias)], node.name)

    def _activation(self, step: str, name: str, layer: Q.QuantLayer, source: str, w_bits: int, linear: bool) -> str:
        """Write what enters a layer: codes times their scale."""
        codes = integer_activations(name, layer)
        made = f"{step}{INPUT}"
        scale = self._constant(f"{step}:input_scale", codes.scale)
        if self.qonnx:
            return self._quant(source, made, scale, codes, codes.narrow and codes.signed)
        if codes.bits == 1 and codes.signed:
            zero = self._constant("zero", 0)
            minus = self._constant(f"{step}:minus_input_scale", -codes.scale)
            positive = self._op("GreaterOrEqual", [source, zero], f"{step}:sign")
            return self._op("Where", [positive, scale, minus], made)
        dtype = self._integer_type(codes.bits, codes.signed)
        zero = self._constant(f"zero_{dtype}_{codes.zero_point}", codes.zero_point, dtype)
        bounds = [bound + codes.zero_point for bound in codes.range]
        clips = bounds != [np.iinfo(dtype).min, np.iinfo(dtype).max]
        if clips and codes.bits > BYTE_BITS:
            # ONNX Runtime has no Clip of integers of 16 bits. What is clipped before it is divided rounds to the same.
            ends = [np.float32(bound) * np.float32(codes.scale) for bound in codes.range]
            low, high = (self._constant(f"{step}:{end}", value) for end, value in zip(("low", "high"), ends, strict=True))
            source = self._op("Clip", [source, low, high], f"{step}:clipped")
        integers = self._op("QuantizeLinear", [source, scale, zero], f"{step}:integers")
        if clips and codes.bits <= BYTE_BITS:
            low, high = (self._constant(f"{dtype}_{bound}", bound, dtype) for bound in bounds)
            integers = self._op("Clip", [integers, low, high], f"{step}:clipped")
        # Where ONNX Runtime sees DequantizeLinear, it makes float weights 8 bits wide, and adds a linear layer's products by
        # pairs: on x86 without VNNI in 16 bits, too few for weights of 8 bits, unless inputs are unsigned and of less.
        narrow = linear and w_bits == 8 and (codes.bits == 8 or codes.signed)
        if w_bits and not narrow:
            return self._op("DequantizeLinear", [integers, scale, zero], made)
        real = self._op("Cast", [integers], f"{step}:real", to=self.onnx.TensorProto.FLOAT)
        if codes.zero_point:
            zero = self._constant(f"zero_{codes.zero_point}", codes.zero_point)
            real = self._op("Sub", [real, zero], f"{step}:centred")
        return self._op("Mul", [real, scale], made)

    def _weight(self, name: str, layer: Q.QuantLayer) -> tuple[str, int]:
        """Write a layer's weights, and return the bits of their integers with them; 0 if they are float."""
        if layer.weight_bits is None:
            return self._constant(f"{name}.weight", layer.weight.detach().float().numpy()), 0
        q, scales, bits = integer_weights(name, layer)
        made = f"{name}:weight"
        if self.qonnx:
            each = scales.astype(np.float32).reshape(-1, *[1] * (q.ndim - 1))
            real = self._constant(f"{name}.weight", q * each)
            scale = self._constant(f"{name}:weight_scale", each)
            return self._quant(real, made, scale, Codes(1.0, bits, True), int(q.min()) > -(2 ** (bits - 1))), bits
        dtype = self._integer_type(bits, True)
        zeros = self._constant(f"{name}:weight_zero", np.zeros(len(q)), dtype)
        scale = self._constant(f"{name}:weight_scale", scales)
        return self._op("DequantizeLinear", [self._constant(f"{name}.weight", q, dtype), scale, zeros], made, axis=0), bits

    def _integer_type(self, bits: int, signed: bool) -> np.dtype[Any]:
        """Return the type in which a file holds integers of a width; one of 16 bits needs a newer opset."""
        size = 1
        if bits > BYTE_BITS:
            size = 2
            self.opset, self.ir_version = WIDE_OPSET, WIDE_IR_VERSION
        letter = "u"
        if signed:
            letter = "i"
        return np.dtype(f"{letter}{size}")

    def _quant(self, source: str, made: str, scale: str, codes: Codes, narrow: bool) -> str:
        if codes.bits == 1 and codes.signed:
            return self._op("BipolarQuant", [source, scale], made, domain=QONNX_DOMAIN)
        zero = self._constant(f"zero_{codes.zero_point}", codes.zero_point)
        inputs = [source, scale, zero, self._constant(f"bits_{codes.bits}", codes.bits)]
        attributes = {"signed": int(codes.signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return self._op("Quant", inputs, made, domain=QONNX_DOMAIN, **attributes)


class OnnxExporter(Exporter):
    """A file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others."""

    name = "onnx"
    summary = SUMMARIES["onnx"]
    output = "network.onnx"

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless what is quantized are integers times a scale."""
        check_integers(network, always_weights=True)

    def export(
        self,
        network: nn.Module,
        graph: Graph,
        images: Tensor,
        path: Path,
        *,
        notes: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: OnProgress,
    ) -> None:
        """Write a network, if the file computes what it does; see `Exporter.export`."""
        with tempfile.TemporaryDirectory() as place:
            made = Path(place, "network.onnx")
            export(graph, network, made, flavour=self.name)
            self._check(network, made, images[:CHECKED])
            write(path, made.read_bytes())

    def _check(self, network: nn.Module, path: Path, images: Tensor) -> Verification:
        found = verify(path, network, images)
        if found.fault:
            raise ValueError(f"{type(network).__name__} can't be deployed: as a file of {self.name} it {found.fault}")
        return found

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Run the file on some test images; see `Exporter.compare`."""
        found = self._check(network, path, samples.compared)
        same = round(found.same_answers * found.images)
        others = f"{found.different:,}"
        if found.different:
            others = f"{found.different:,}, by up to {found.steps}"
        rows = (
            ("same answer as in PyTorch", f"{same:,} of {found.images:,} test images"),
            ("integers that enter layers", f"{found.values:,}, of {found.images:,} images"),
            ("  other than in PyTorch", others),
            ("largest difference of outputs from PyTorch's", f"{found.output_difference:.3g}"),
            ("largest output", f"{found.largest_output:.3g}"),
        )
        return Verdict(found.same_answers == 1, rows)

    def export_any(self, network: nn.Module, samples: AnySamples, path: Path) -> None:
        """Write a network of any operations and inputs; see `onnx_any.export_any`."""
        onnx_any.export_any(network, samples, path)

    def compare_any(self, network: nn.Module, samples: AnySamples, path: Path) -> Verdict:
        """Run the file on some test samples, and compare all outputs; see `onnx_any.compare_any`."""
        return onnx_any.compare_any(network, samples, path)


class QonnxExporter(OnnxExporter):
    """A file of QONNX, for tools of FPGAs."""

    name = "qonnx"
    summary = SUMMARIES["qonnx"]
    output = "network-qonnx.onnx"

    @classmethod
    def takes_any(cls) -> bool:
        """Say that networks must take images, and be of the operations that `haq.deployment.graph` knows."""
        return False
