"""A quantized network as an ONNX file that runtimes compute in integers."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment import onnx_any, onnx_runtimes, onnx_tensorrt
from haq.deployment.answers import compare_answers
from haq.deployment.exporter import (
    SUMMARIES,
    AnySamples,
    OnProgress,
    Samples,
    Verdict,
    check_is_no_folder,
    policy_storage_bytes,
)
from haq.deployment.graph import Graph
from haq.deployment.lowering import check_integers, integer_activations
from haq.deployment.onnx_any import package
from haq.deployment.onnx_compact import compacted
from haq.deployment.onnx_integers import IntegerWriter
from haq.deployment.onnx_verify import CHECKED, Runner, Verification, VerifiedExporter, compare, read_model
from haq.store.files import write
from haq.store.units import describe_amount

FLAVOURS = ("tensorrt", "openvino")


def export(graph: Graph, network: nn.Module, path: str | Path, flavour: str | None = None) -> None:
    """Write a captured network with its present weights, scales and bits to an ONNX file, for images (N, C, H, W) in float.

    Weights are integers and DequantizeLinear per output channel, with the batch norms behind the layer folded in; inputs of
    layers go through QuantizeLinear, a Clip of the integers where they have fewer than 8 bits, and DequantizeLinear; signs are
    Where. They are put on their grid as early as that changes nothing, so that ONNX Runtime makes integer kernels of most
    layers (see `onnx_integers`). Weights of fewer than 8 bits are packed, and unpacked when the file is loaded. Integers of
    16 bits are int16 or uint16, and the file is of opset 21 then. Any batch size.

    What the policy leaves in float has no such nodes, a layer's weights or its input or both. A layer's input, quantized, is
    the tensor NAME:input, NAME being the layer's name, and name@2 at its second call; in small files, where names would take
    much of the room, ~5 of the network's sixth layer, and ~5@2.

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
    model = _model(graph, network, flavour)
    package("onnx").checker.check_model(model, full_check=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, model.SerializeToString())


def _model(graph: Graph, network: nn.Module, flavour: str | None) -> Any:
    """Make onnx's ModelProto; see `export`."""
    if flavour is not None and flavour not in FLAVOURS:
        raise ValueError(f"unknown flavour {flavour!r} of ONNX; known: {', '.join(FLAVOURS)}")
    if flavour == "tensorrt":
        onnx_tensorrt.check(network)
        network, graph = onnx_tensorrt.signed_network(network), onnx_tensorrt.signed_graph(graph)
    model = IntegerWriter(graph, network, flavour).model("N")
    return compacted(model, list(Q.quant_layers(network)))


def verify(path: str | Path, network: nn.Module, images: Tensor) -> Verification:
    """Run a file of `export` on images (N, C, H, W), as its user would, beside the network in PyTorch.

    ONNX Runtime on the CPU runs it, with the optimizations that it makes by default, or OpenVINO what is for it; see
    `onnx_verify.compare`. A file for TensorRT, which has no processor here, is run by ONNX Runtime too.

    Args:
        path: The file.
        network: The quantized network that it was made of.
        images: Images (N, C, H, W).

    Returns:
        What differs, with lines about the operators that are computed in integers, and about the size of the file.

    Raises:
        ValueError: Without images, for NaN or infinity in them, and for a file that isn't ONNX.
        ImportError: Naming what to install.
    """
    flavour = onnx_runtimes.flavour_of(path)
    held = None
    if flavour == "tensorrt":
        held = onnx_tensorrt.signed_network(network)
    found = compare(path, network, images, flavour=flavour or "onnx", make_runner=_runtime_for(flavour), held=held)
    rows = (*onnx_runtimes.operators(path, flavour), _size(path, network, images))
    if flavour == "tensorrt":
        rows = (*rows, *_halved(network))
    if overflow := onnx_runtimes.overflow_words(network, flavour):
        rows = (*rows, ("on x86 without VNNI", overflow))
    fault = found.fault
    if fault:
        fault += onnx_runtimes.overflows_here(network, flavour)
    return dataclasses.replace(found, further=rows, fault=fault)


def _runtime_for(flavour: str | None) -> Callable[[Any], Runner]:
    """Return what runs files of a flavour: OpenVINO those that are for it, ONNX Runtime all others."""
    if flavour == "openvino":
        return onnx_runtimes.openvino_runner
    return onnx_runtimes.onnxruntime_runner


def _size(path: str | Path, network: nn.Module, images: Tensor) -> tuple[str, str]:
    """Tell how large a file is, and how large what the policy stores."""
    size = Path(path).stat().st_size
    stored = policy_storage_bytes(network, images)
    of = f"{size / stored:.2f} of the {describe_amount(stored, 'storage')} that layers store"
    return "size of the file", f"{describe_amount(size, 'storage')}, {of}"


def _halved(network: nn.Module) -> tuple[tuple[str, str], ...]:
    """Tell how many inputs of layers lose a bit in TensorRT's signed integers."""
    count = 0
    for name, layer in Q.quant_layers(network).items():
        if layer.activation_bits is not None:
            count += onnx_tensorrt.is_halved(integer_activations(name, layer))
    if not count:
        return ()
    return (("inputs of 8 unsigned bits that TensorRT has 7 of", f"{count:,}"),)


class OnnxExporter(VerifiedExporter):
    """A file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others."""

    name = "onnx"
    summary = SUMMARIES["onnx"]
    output = "network.onnx"
    options = ("flavour", "residuals")
    flavours = FLAVOURS

    def check_path(self, path: Path) -> None:
        """Raise ValueError for a folder."""
        check_is_no_folder(path, self.name)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless what is quantized are integers times a scale."""
        check_integers(network, always_weights=True)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError for what can't be written; see `Exporter.check_operations`."""
        _model(graph, network, options.get("flavour"))

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
        if options.get("flavour") == "openvino":
            onnx_runtimes.openvino()
        with tempfile.TemporaryDirectory() as place:
            made = Path(place, "network.onnx")
            export(graph, network, made, options.get("flavour"))
            self.check_written(made, network, images[:CHECKED])
            write(path, made.read_bytes())

    def verify(self, path: Path, network: nn.Module, images: Tensor) -> Verification:
        """Run a file beside the network; see `VerifiedExporter.verify`."""
        return verify(path, network, images)

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Compare answers on all test images, and integers layer by layer on some of them; see `Exporter.compare`."""
        found = self.check_written(path, network, samples.compared)
        run = _runtime_for(onnx_runtimes.flavour_of(path))(read_model(path))
        answers = compare_answers(network, lambda images: torch.from_numpy(run(images.numpy(), [])[0]), samples)
        return found.verdict(answers)

    def export_any(self, network: nn.Module, samples: AnySamples, path: Path) -> None:
        """Write a network of any operations and inputs; see `onnx_any.export_any`."""
        onnx_any.export_any(network, samples, path)

    def compare_any(self, network: nn.Module, samples: AnySamples, path: Path) -> Verdict:
        """Run the file on some test samples, and compare all outputs; see `onnx_any.compare_any`."""
        return onnx_any.compare_any(network, samples, path)
