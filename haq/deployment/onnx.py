"""A quantized network as an ONNX file that runtimes compute in integers."""

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
from haq.deployment.graph import Graph
from haq.deployment.lowering import check_integers
from haq.deployment.onnx_any import package
from haq.deployment.onnx_integers import IntegerWriter
from haq.deployment.onnx_nodes import Array
from haq.deployment.onnx_verify import CHECKED, Runner, Verification, compare
from haq.store.files import write


def export(graph: Graph, network: nn.Module, path: str | Path, flavour: str | None = None) -> None:
    """Write a captured network with its present weights, scales and bits to an ONNX file, for images (N, C, H, W) in float.

    Weights are integers and DequantizeLinear per output channel, with the batch norms behind the layer folded in; inputs of
    layers go through QuantizeLinear, a Clip of the integers where they have fewer than 8 bits, and DequantizeLinear; signs are
    Where. They are put on their grid as early as that changes nothing, so that ONNX Runtime makes integer kernels of most
    layers (see `onnx_integers`). Weights of fewer than 8 bits are packed, and unpacked when the file is loaded. Integers of
    16 bits are int16 or uint16, and the file is of opset 21 then. Any batch size.

    What the policy leaves in float has no such nodes, a layer's weights or its input or both. A layer's input, quantized, is
    the tensor NAME:input, NAME being the layer's name, and name@2 at its second call.

    Args:
        graph: The operations of the network.
        network: The quantized network.
        path: The file.
        flavour: None; or "openvino" or "tensorrt", whose files only hold what these take.

    Raises:
        ValueError: Naming the layer and its scheme, for weights or activations that are not integers times a scale, or not of
            a kind that the flavour takes.
        ImportError: Naming what to install.
    """
    model = IntegerWriter(graph, network, flavour).model("N")
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
        IntegerWriter(graph, network, options.get("flavour")).model("N")

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
