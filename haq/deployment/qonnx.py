"""A quantized network as an ONNX file with the nodes of QONNX: for tools of FPGAs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.exporter import SUMMARIES, Exporter, OnProgress, Samples, Verdict
from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import check_integers, integer_activations, integer_weights
from haq.deployment.onnx_any import package
from haq.deployment.onnx_nodes import IR_VERSION, Array, GraphWriter
from haq.deployment.onnx_verify import CHECKED, INPUT, Runner, Verification, compare
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
    """Writes quantized layers with Quant and BipolarQuant."""

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        super().__init__(graph, network)
        # Results that others than batch norms read.
        self.followed = {name for node in graph.nodes if node.kind != "batch_norm" for name in node.inputs}
        self.weights: dict[str, str] = {}

    def layer(self, node: Node) -> None:
        """Write a convolution or linear layer."""
        name = node.module
        layer = self.layers[name]
        (source,) = node.inputs
        step = self.call(name)
        if name not in self.weights:
            self.weights[name] = self._weight(name, layer)
        if layer.activation_bits is not None:
            source = self._activation(step, name, layer, source)
        inputs = [source, self.weights[name]]
        made = node.name
        bias = None
        real_bias = layer.effective_bias()
        if real_bias is not None:
            bias = real_bias.detach().float().numpy()
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

    def _activation(self, step: str, name: str, layer: Q.QuantLayer, source: str) -> str:
        """Write what enters a layer: codes times their scale."""
        codes = integer_activations(name, layer)
        scale = self.constant(f"{step}:input_scale", codes.scale)
        return self._quant(source, f"{step}{INPUT}", scale, codes, codes.narrow and codes.signed)

    def _weight(self, name: str, layer: Q.QuantLayer) -> str:
        """Write a layer's weights."""
        if layer.weight_bits is None:
            return self.constant(f"{name}.weight", layer.weight.detach().float().numpy())
        q, scales, bits = integer_weights(name, layer)
        each = scales.astype(np.float32).reshape(-1, *[1] * (q.ndim - 1))
        real = self.constant(f"{name}.weight", q * each)
        scale = self.constant(f"{name}:weight_scale", each)
        return self._quant(real, f"{name}:weight", scale, Codes(1.0, bits, True), int(q.min()) > -(2 ** (bits - 1)))

    def _quant(self, source: str, made: str, scale: str, codes: Codes, narrow: bool) -> str:
        if codes.bits == 1 and codes.signed:
            return self.op("BipolarQuant", [source, scale], made, domain=QONNX_DOMAIN)
        zero = self.constant(f"zero_{codes.zero_point}", codes.zero_point)
        inputs = [source, scale, zero, self.constant(f"bits_{codes.bits}", codes.bits)]
        attributes = {"signed": int(codes.signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return self.op("Quant", inputs, made, domain=QONNX_DOMAIN, **attributes)


class QonnxExporter(Exporter):
    """A file of QONNX, for tools of FPGAs."""

    name = "qonnx"
    summary = SUMMARIES["qonnx"]
    output = "network-qonnx.onnx"

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
            made = Path(place, "network-qonnx.onnx")
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
