"""A quantized network as an ONNX file: for stock ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment import onnx_any
from haq.deployment.exporter import SUMMARIES, AnySamples, Exporter, OnProgress, Samples, Verdict
from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import check_integers, integer_activations, integer_weights
from haq.deployment.onnx_any import package
from haq.deployment.onnx_nodes import Array, GraphWriter
from haq.deployment.onnx_verify import CHECKED, INPUT, Runner, Verification, compare
from haq.deployment.program import BYTE_BITS
from haq.store.files import write

# The first whose QuantizeLinear and DequantizeLinear take integers of 16 bits.
WIDE_OPSET = 21
WIDE_IR_VERSION = 10


def export(graph: Graph, network: nn.Module, path: str | Path) -> None:
    """Write a captured network with its present weights, scales and bits to an ONNX file, for images (N, C, H, W) in float.

    Weights are int8 and DequantizeLinear per output channel; inputs of layers go through QuantizeLinear, a Clip of the
    integers where they have fewer than 8 bits, and DequantizeLinear; signs are Where. Integers of 16 bits are int16 or uint16,
    and the file is of opset 21 then. Any batch size.

    What the policy leaves in float has no such nodes, a layer's weights or its input or both. All else is computed in float32,
    as the fake-quantized network does, and ONNX Runtime is kept from making integer kernels with other results of it: the file
    says what the network computes, and runs no faster for it. A layer's input, quantized, is the tensor NAME:input, NAME being
    the layer's name, and name@2 at its second call.

    Args:
        graph: The operations of the network.
        network: The quantized network.
        path: The file.

    Raises:
        ValueError: Naming the layer and its scheme, for weights or activations that are not integers times a scale.
        ImportError: Naming what to install.
    """
    model = _Writer(graph, network).model("N")
    package("onnx").checker.check_model(model, full_check=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, model.SerializeToString())


def verify(path: str | Path, network: nn.Module, images: Tensor) -> Verification:
    """Run a file of `export` on images (N, C, H, W), as its user would, beside the network in PyTorch.

    ONNX Runtime on the CPU runs it, with the optimizations that it makes by default; see `onnx_verify.compare`.

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
    return compare(path, network, images, flavour="onnx", make_runner=_runner)


def _runner(model: Any) -> Runner:
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


class _Writer(GraphWriter):
    """Writes quantized layers with QuantizeLinear and DequantizeLinear."""

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        super().__init__(graph, network)
        # Results that others than batch norms read.
        self.followed = {name for node in graph.nodes if node.kind != "batch_norm" for name in node.inputs}
        self.weights: dict[str, tuple[str, int]] = {}

    def layer(self, node: Node) -> None:
        """Write a convolution or linear layer."""
        name = node.module
        layer = self.layers[name]
        (source,) = node.inputs
        step = self.call(name)
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
            inputs.append(self.constant(f"{name}.bias", bias))
        if node.kind == "linear":
            self.op("Gemm", inputs, made, transB=1)
        else:
            assert node.window is not None
            self.op("Conv", inputs, made, group=node.window.groups, **self.window(node))
        if apart:
            if bias is None:
                bias = np.zeros(node.shape[2])
            if node.kind == "conv":
                bias = bias.reshape(-1, 1, 1)
            self.op("Add", [made, self.constant(f"{name}.bias", bias)], node.name)

    def _activation(self, step: str, name: str, layer: Q.QuantLayer, source: str, w_bits: int, linear: bool) -> str:
        """Write what enters a layer: codes times their scale."""
        codes = integer_activations(name, layer)
        made = f"{step}{INPUT}"
        scale = self.constant(f"{step}:input_scale", codes.scale)
        if codes.bits == 1 and codes.signed:
            zero = self.constant("zero", 0)
            minus = self.constant(f"{step}:minus_input_scale", -codes.scale)
            positive = self.op("GreaterOrEqual", [source, zero], f"{step}:sign")
            return self.op("Where", [positive, scale, minus], made)
        dtype = self._integer_type(codes.bits, codes.signed)
        zero = self.constant(f"zero_{dtype}_{codes.zero_point}", codes.zero_point, dtype)
        bounds = [bound + codes.zero_point for bound in codes.range]
        clips = bounds != [np.iinfo(dtype).min, np.iinfo(dtype).max]
        if clips and codes.bits > BYTE_BITS:
            # ONNX Runtime has no Clip of integers of 16 bits. What is clipped before it is divided rounds to the same.
            ends = [np.float32(bound) * np.float32(codes.scale) for bound in codes.range]
            low, high = (self.constant(f"{step}:{end}", value) for end, value in zip(("low", "high"), ends, strict=True))
            source = self.op("Clip", [source, low, high], f"{step}:clipped")
        integers = self.op("QuantizeLinear", [source, scale, zero], f"{step}:integers")
        if clips and codes.bits <= BYTE_BITS:
            low, high = (self.constant(f"{dtype}_{bound}", bound, dtype) for bound in bounds)
            integers = self.op("Clip", [integers, low, high], f"{step}:clipped")
        # Where ONNX Runtime sees DequantizeLinear, it makes float weights 8 bits wide, and adds a linear layer's products by
        # pairs: on x86 without VNNI in 16 bits, too few for weights of 8 bits, unless inputs are unsigned and of less.
        narrow = linear and w_bits == 8 and (codes.bits == 8 or codes.signed)
        if w_bits and not narrow:
            return self.op("DequantizeLinear", [integers, scale, zero], made)
        real = self.op("Cast", [integers], f"{step}:real", to=self.onnx.TensorProto.FLOAT)
        if codes.zero_point:
            zero = self.constant(f"zero_{codes.zero_point}", codes.zero_point)
            real = self.op("Sub", [real, zero], f"{step}:centred")
        return self.op("Mul", [real, scale], made)

    def _weight(self, name: str, layer: Q.QuantLayer) -> tuple[str, int]:
        """Write a layer's weights, and return the bits of their integers with them; 0 if they are float."""
        if layer.weight_bits is None:
            return self.constant(f"{name}.weight", layer.weight.detach().float().numpy()), 0
        q, scales, bits = integer_weights(name, layer)
        made = f"{name}:weight"
        dtype = self._integer_type(bits, True)
        zeros = self.constant(f"{name}:weight_zero", np.zeros(len(q)), dtype)
        scale = self.constant(f"{name}:weight_scale", scales)
        return self.op("DequantizeLinear", [self.constant(f"{name}.weight", q, dtype), scale, zeros], made, axis=0), bits

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


class OnnxExporter(Exporter):
    """A file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others."""

    name = "onnx"
    summary = SUMMARIES["onnx"]
    output = "network.onnx"

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless what is quantized are integers times a scale."""
        check_integers(network, always_weights=True)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what has no nodes; see `Exporter.check_operations`."""
        _Writer(graph, network).model("N")

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
            export(graph, network, made)
            self._check(network, made, images[:CHECKED])
            write(path, made.read_bytes())

    def _check(self, network: nn.Module, path: Path, images: Tensor) -> Verification:
        found = verify(path, network, images)
        if found.fault:
            raise ValueError(f"{type(network).__name__} can't be deployed: as a file of {self.name} it {found.fault}")
        return found

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Run the file on some test images; see `Exporter.compare`."""
        return self._check(network, path, samples.compared).verdict()

    def export_any(self, network: nn.Module, samples: AnySamples, path: Path) -> None:
        """Write a network of any operations and inputs; see `onnx_any.export_any`."""
        onnx_any.export_any(network, samples, path)

    def compare_any(self, network: nn.Module, samples: AnySamples, path: Path) -> Verdict:
        """Run the file on some test samples, and compare all outputs; see `onnx_any.compare_any`."""
        return onnx_any.compare_any(network, samples, path)
