"""A quantized network as an ONNX file with the nodes of QONNX: for tools of FPGAs."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.exporter import SUMMARIES, OnProgress, Samples, Verdict, check_is_no_folder
from haq.deployment.fpga import FLOWS, check_flow, codes_of, is_relu_for
from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import check_integers, integer_activations, integer_weights
from haq.deployment.nodes import is_own
from haq.deployment.onnx_any import package
from haq.deployment.onnx_compact import INPUT
from haq.deployment.onnx_moves import write_move
from haq.deployment.onnx_nodes import IR_VERSION, Array, GraphWriter
from haq.deployment.onnx_verify import CHECKED, Runner, Verification, VerifiedExporter, compare
from haq.deployment.program import Codes
from haq.store.files import write

QONNX_DOMAIN = "qonnx.custom_op.general"


def export(graph: Graph, network: nn.Module, path: str | Path) -> None:
    """Write a captured network with its present weights, scales and bits to a file of QONNX, for one image (1, C, H, W).

    Weights are float32, and go through the nodes Quant and BipolarQuant of QONNX (Pappalardo et al. 2022, arXiv 2206.07527),
    as inputs of layers do. What the policy leaves in float has no such nodes, a layer's weights or its input or both. A
    layer's input, quantized, is the tensor NAME:input, NAME being the layer's name, and name@2 at its second call.

    Args:
        graph: The operations of the network.
        network: The quantized network.
        path: The file.

    Raises:
        ValueError: Naming the layer and its scheme, for weights or activations that are not integers times a scale.
        ImportError: Naming what to install.
    """
    helper = package("onnx").helper
    model = _Writer(graph, network).model(1, (helper.make_opsetid(QONNX_DOMAIN, 1),))
    # QONNX executes no file that lacks the shape of any tensor.
    wrapper = package("qonnx.core.modelwrapper").ModelWrapper(model)
    model = wrapper.transform(package("qonnx.transformation.infer_shapes").InferShapes()).model
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, model.SerializeToString())


def verify(path: str | Path, network: nn.Module, images: Tensor) -> Verification:
    """Run a file of `export` on images (N, C, H, W) beside the network in PyTorch.

    The interpreter of the package `qonnx` runs it; see `onnx_verify.compare`.

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
    return compare(path, network, images, flavour="qonnx", make_runner=_runner)


def _runner(model: Any) -> Runner:
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


class _Writer(GraphWriter):
    """Writes quantizers with Quant and BipolarQuant, and all else in the form that tools of FPGAs take."""

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        super().__init__(graph, network)
        self.known = {node.name: node for node in graph.nodes}
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)

    def model(self, batch: int | str, further: tuple[Any, ...] = ()) -> Any:
        """Write everything; see `GraphWriter.model`. No Identity stands behind the last operation."""
        for node in self.graph.nodes[1:]:
            with torch.no_grad():
                self.write(node)
        last = self.nodes[-1]
        (result,) = last.input
        if result != "input":
            self.nodes.remove(last)
            for node in self.nodes:
                for names in (node.input, node.output):
                    names[:] = ["output" if name == result else name for name in names]
        self._drop_unread()
        return self.assemble(batch, further)

    def _drop_unread(self) -> None:
        """Leave out operators and constants that nobody reads: clamps that quantizers do, and moves that layers do."""
        read = {"output"}
        kept = []
        for node in reversed(self.nodes):
            if node.output[0] in read:
                read.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in read}

    # ------------------------------------------------------------------------------------------------------- operations

    def window(self, node: Node) -> dict[str, Any]:
        """Return the attributes of a convolution or pooling, padded evenly where that changes nothing.

        hls4ml pools evenly padded maps alone.
        """
        made = super().window(node)
        rank = len(node.dims) - 2
        starts, ends = made["pads"][:rank], list(made["pads"][rank:])
        for axis in range(rank):
            size, outputs = self.dims[node.inputs[0]][2 + axis], node.dims[2 + axis]
            extent = made["dilations"][axis] * (made["kernel_shape"][axis] - 1) + 1
            if (size + 2 * starts[axis] - extent) // made["strides"][axis] + 1 == outputs:
                ends[axis] = starts[axis]
        return {**made, "pads": (*starts, *ends)}

    def _write_avg_pool(self, node: Node, inputs: list[str]) -> None:
        if self.is_global(node):
            self.op("GlobalAveragePool", inputs, node.name)
        else:
            super()._write_avg_pool(node, inputs)

    def _write_quantize(self, node: Node, inputs: list[str]) -> None:
        codes = codes_of(node)
        source = self._before_quantizer(inputs[0], node.name, codes)
        self._quant(source, node.name, self.constant(f"{node.name}:scale", codes.scale), codes, codes.narrow and codes.signed)

    def layer(self, node: Node) -> None:
        """Write a convolution or linear layer.

        Signs are -1 and 1, and what the layer sums is multiplied by their scales: of scaled signs, qonnx infers float.
        """
        name, linear = node.module, node.kind == "linear"
        layer = self.layers[name]
        step = self.call(name)
        factor = np.ones(1, np.float32)
        codes = None
        if layer.activation_bits is not None:
            codes = integer_activations(name, layer)
            if _is_sign(codes):
                factor = factor * np.float32(codes.scale)
        weight, scale_of_signs = self._weight(step, name, layer, linear)
        factor = factor * scale_of_signs
        inputs = [self._enter(node, step, codes), weight]
        further: list[tuple[str, str]] = []  # operators that follow, with their constants
        if (factor != 1).any():
            further.append(("Mul", self.constant(f"{step}:scale_of_signs", _along_channels(factor, node))))
        bias = layer.effective_bias()
        if bias is not None:
            numbers = bias.detach().float().numpy()
            if linear or further:
                further.append(("Add", self.constant(f"{step}.bias", _along_channels(numbers, node))))
            else:
                inputs.append(self.constant(f"{step}.bias", numbers))
        between = [f"{node.name}:sums", f"{node.name}:scaled"][: len(further)]
        made = [*between, node.name]
        if linear:
            self.op("MatMul", inputs, made[0])
        else:
            assert node.window is not None
            self.op("Conv", inputs, made[0], group=node.window.groups, **self.window(node))
        for place, (operator, constant) in enumerate(further):
            self.op(operator, [made[place], constant], made[place + 1])

    # -------------------------------------------------------------------------------------------------------- quantizers

    def _enter(self, node: Node, step: str, codes: Codes | None) -> str:
        """Write what enters a layer: codes times their scale, and behind them what the layer does to its own input."""
        own = []
        source = self.known[node.inputs[0]]
        while source.kind == "move" and is_own(source.module, node.module):
            own.append(source)
            source = self.known[source.inputs[0]]
        names = [*(f"{step}:own{place}" for place in range(len(own))), f"{step}{INPUT}"]
        made = source.name
        if codes is not None:
            scale = self.constant(f"{step}:input_scale", codes.scale)
            made = self._before_quantizer(made, step, codes)
            made = self._quant(made, names[0], scale, codes, codes.narrow and codes.signed)
        for move, moved in zip(reversed(own), names[1:], strict=True):
            write_move(self, move, [made], moved)
            made = moved
        return made

    def _before_quantizer(self, name: str, step: str, codes: Codes) -> str:
        """Return the tensor that a quantizer reads.

        Every quantizer of unsigned integers has a ReLU of its own in front, which changes nothing: FINN makes one node of the
        two, and takes the ReLU away from whoever else reads it; without one, it takes one unsigned bit for a sign. A clamp is
        a ReLU in front of a quantizer that ends before the clamp does: neither FINN nor hls4ml has clamps.
        """
        if codes.signed or codes.zero_point:
            return name
        node = self.known[name]
        if not is_relu_for(node, codes):
            return self.op("Relu", [name], f"{step}:relu")
        if node.high == math.inf and self.readers[name] == 1:
            return name
        return self.op("Relu", list(node.inputs), f"{step}:relu")

    def _weight(self, step: str, name: str, layer: Q.QuantLayer, linear: bool) -> tuple[str, Array]:
        """Write a layer's weights, those of a linear layer transposed.

        FINN takes no quantized weights that several layers read, so every call of a layer has its own; and no constant is
        read twice, since qonnx would copy it to one with a random name.

        Returns:
            The name, and what the layer's sums must be multiplied by: the scales of signs, one for all or one per channel.
        """
        unscaled = np.ones(1, np.float32)
        if layer.weight_bits is None:
            weight = layer.weight.detach().float().numpy()
            if linear:
                weight = weight.T
            return self.constant(f"{step}.weight", weight), unscaled
        q, scales, bits = integer_weights(name, layer)
        scales = scales.astype(np.float32)
        if (scales == scales[0]).all():
            scales = scales[:1]
        codes = Codes(1.0, bits, True)
        made = f"{step}:weight"
        if _is_sign(codes):
            if linear:
                q = q.T
            return self._quant(self.constant(f"{step}.weight", q), made, "", codes, False), scales
        each = scales.reshape(-1, *[1] * (q.ndim - 1))
        real = q * each
        if linear:
            real, each = real.T, each.T
        if len(scales) == 1:
            each = scales[0]
        constant = self.constant(f"{step}.weight", real)
        narrow = int(q.min()) > -(2 ** (bits - 1))
        return self._quant(constant, made, self.constant(f"{step}:weight_scale", each), codes, narrow), unscaled

    def _quant(self, source: str, made: str, scale: str, codes: Codes, narrow: bool) -> str:
        """Write what quantizes a tensor; signs have scale 1 instead of the one that is named."""
        if _is_sign(codes):
            return self.op("BipolarQuant", [source, self.constant(f"{made}:scale", 1)], made, domain=QONNX_DOMAIN)
        zero = self.constant(f"{made}:zero_point", codes.zero_point)
        inputs = [source, scale, zero, self.constant(f"{made}:bits", codes.bits)]
        attributes = {"signed": int(codes.signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return self.op("Quant", inputs, made, domain=QONNX_DOMAIN, **attributes)


def _is_sign(codes: Codes) -> bool:
    """Tell whether numbers are -1 and 1."""
    return codes.bits == 1 and codes.signed


def _along_channels(values: Array, node: Node) -> Array:
    """Shape one value, or one per channel, to broadcast against a layer's result."""
    if len(values) == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * (len(node.dims) - 2))


class QonnxExporter(VerifiedExporter):
    """A file of QONNX, for tools of FPGAs."""

    name = "qonnx"
    summary = SUMMARIES["qonnx"]
    output = "network-qonnx.onnx"
    options = ("flavour", "residuals")
    flavours = tuple(FLOWS)

    def check_path(self, path: Path) -> None:
        """Raise ValueError for a folder."""
        check_is_no_folder(path, self.name)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless what is quantized are integers times a scale."""
        check_integers(network, always_weights=True)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what can't be written, or what the tool doesn't take that it is for."""
        self._check_flow(network, graph, options)
        _Writer(graph, network).model(1)

    def _check_flow(self, network: nn.Module, graph: Graph, options: Mapping[str, Any]) -> None:
        flavour = options.get("flavour")
        if flavour is not None:
            check_flow(FLOWS[flavour], graph, Q.quant_layers(network))

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
        self._check_flow(network, graph, options)
        with tempfile.TemporaryDirectory() as place:
            made = Path(place, "network-qonnx.onnx")
            export(graph, network, made)
            self.check_written(made, network, images[:CHECKED])
            write(path, made.read_bytes())

    def verify(self, path: Path, network: nn.Module, images: Tensor) -> Verification:
        """Run a file beside the network; see `VerifiedExporter.verify`."""
        return verify(path, network, images)

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Run the file on some test images; see `Exporter.compare`."""
        return self.check_written(path, network, samples.compared).verdict()
