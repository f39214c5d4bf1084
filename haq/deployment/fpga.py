"""What the tools take that make circuits for FPGAs of a file of QONNX: FINN (finn-plus 1.6) and hls4ml (1.3).

Either refuses much in the middle of its conversion, without the layer's name, and makes circuits of some of it that compute
something else. So it is looked at before a file is written for one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import quantizers as Q
from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import integer_activations, integer_weights
from haq.deployment.program import Codes


@dataclass(frozen=True)
class Flow:
    """What a tool takes.

    Attributes:
        name: What it is called.
        kinds: Kinds of operations (`nodes.Node`).
        words: The same in words.
        most_bits: The most bits of activations.
        power_of_two: Whether scales must be powers of two.
        per_channel: Whether each output channel can have its own weight scale.
        grouped: Whether convolutions may have groups of more than one channel.
        dilated: Whether windows may be dilated.
        pads_averages: Whether average pooling may pad.
        signals: Whether it takes signals (N, C, L).
    """

    name: str
    kinds: tuple[str, ...]
    words: str
    most_bits: int
    power_of_two: bool
    per_channel: bool
    grouped: bool
    dilated: bool
    pads_averages: bool
    signals: bool


KINDS = ("input", "output", "conv", "linear", "batch_norm", "relu", "clamp", "add", "max_pool", "avg_pool", "flatten")
WORDS = "convolutions, linear layers, batch norms, ReLU, additions, max pooling, average pooling and flatten"
FLOWS = {
    "finn": Flow(
        "finn",
        KINDS,
        WORDS,
        most_bits=8,
        power_of_two=False,
        per_channel=True,
        grouped=True,
        dilated=True,
        pads_averages=True,
        signals=True,
    ),
    "hls4ml": Flow(
        "hls4ml",
        KINDS,
        WORDS,
        most_bits=16,
        power_of_two=True,
        per_channel=False,
        grouped=False,
        dilated=False,
        pads_averages=False,
        signals=False,
    ),
}


def check_flow(flow: Flow, graph: Graph, layers: dict[str, Q.QuantLayer]) -> None:
    """Check that a tool makes a circuit of a network that computes what the network does.

    Args:
        flow: The tool.
        graph: The network's operations.
        layers: Its quantized layers by name.

    Raises:
        ValueError: Naming the first layer that it doesn't take, the reason, and what it takes.
    """
    for node in graph.nodes:
        reason = next(_faults(flow, node, graph, layers), "")
        if reason:
            where = node.module or node.name
            raise ValueError(f"layer {where!r} can't be built by {flow.name}: {reason}")


def _faults(flow: Flow, node: Node, graph: Graph, layers: dict[str, Q.QuantLayer]) -> Iterator[str]:
    """Say what a tool doesn't take of an operation."""
    if node.kind not in flow.kinds and node.kind != "quantize":
        what = node.function or node.operation or node.kind
        yield f"it has no operation {what!r}; it has {flow.words}"
    if len(node.dims) == 3 and not flow.signals:
        yield "it computes with signals, and it takes images and vectors"
    if node.window is not None and node.window.dilation != (1, 1) and not flow.dilated:
        yield f"its window is dilated by {max(node.window.dilation)}, and it takes none that are"
    if node.kind in ("conv", "linear"):
        yield from _layer_faults(flow, node, layers[node.module])
    elif node.kind == "add" and len({graph[name].dims for name in node.inputs}) > 1:
        shapes = " and ".join(str(graph[name].dims) for name in node.inputs)
        yield f"it adds shapes {shapes}, and it takes additions of one shape"
    elif node.kind == "avg_pool":
        yield from _average_faults(flow, node)
    elif node.kind == "quantize" and node.zero_point:
        yield f"the quantizer {node.name!r} has a zero point, {node.zero_point}, and it takes none"
    elif node.kind in ("relu", "clamp") and (node.low, node.high) != (0, math.inf):
        yield from _clamp_faults(node, graph, layers)


def _layer_faults(flow: Flow, node: Node, layer: Q.QuantLayer) -> Iterator[str]:
    name = node.module
    if layer.weight_bits is None or layer.activation_bits is None:
        yield "its weights or its input stay in float, and circuits are made of integers: give it 1 to 8 bits"
        return
    codes = integer_activations(name, layer)
    if codes.bits > flow.most_bits:
        yield f"its input has {codes.bits} bits, and it takes up to {flow.most_bits}"
    if codes.zero_point:
        yield f"its input has a zero point, {codes.zero_point}, and it takes none: scheme linear has none"
    window = node.window
    if window is not None and not flow.grouped and window.groups not in (1, layer.weight.shape[0]):
        yield f"it has {window.groups} groups of several channels, and it takes one group or one channel a group"
    search = f"search with --hw {flow.name}, which keeps to what it takes"
    _, scales, bits = integer_weights(name, layer)
    real = []  # scales that aren't multiplied behind the sums, as those of signs are
    if bits > 1:
        real.append(("weights have", float(scales[0])))
        if not flow.per_channel and (scales != scales[0]).any():
            yield f"its output channels have scales of their own, and it takes one for all: {search}"
    if codes.bits > 1 or not codes.signed:
        real.append(("input has", codes.scale))
    for what, scale in real:
        if flow.power_of_two and not _is_power_of_two(scale):
            yield f"its {what} scale {scale:.6g}, and it takes powers of two: {search}"


def _average_faults(flow: Flow, node: Node) -> Iterator[str]:
    if node.window is None:
        yield "it averages windows of different sizes, and it takes windows of one size"
    elif max(node.window.padding) and not flow.pads_averages:
        yield "it averages over padding, too, and it takes none there"


def _clamp_faults(node: Node, graph: Graph, layers: dict[str, Q.QuantLayer]) -> Iterator[str]:
    """Say which reader sees more of a clamp than a ReLU."""
    for reader in graph.nodes:
        if node.name not in reader.inputs:
            continue
        codes = codes_of_reader(reader, layers)
        if codes is None or not is_relu_for(node, codes):
            yield (
                f"it is a clamp from {node.low:g} to {node.high:g} that {reader.module or reader.name!r} reads; there is ReLU "
                "alone, and quantizers that end before the clamp does"
            )


def codes_of_reader(node: Node, layers: dict[str, Q.QuantLayer]) -> Codes | None:
    """Return the integers that a layer or a quantizer makes of what it reads; None for other operations, and in float."""
    if node.kind == "quantize":
        return codes_of(node)
    if node.kind in ("conv", "linear") and layers[node.module].activation_bits is not None:
        return integer_activations(node.module, layers[node.module])
    return None


def codes_of(node: Node) -> Codes:
    """Return the integers of a quantizer between layers."""
    assert node.scale is not None
    signed = node.low < 0
    bits = int(node.high - node.low).bit_length()
    return Codes(float(node.scale), bits, signed, narrow=signed and node.low > -(2 ** (bits - 1)), zero_point=node.zero_point)


def is_relu_for(node: Node, codes: Codes) -> bool:
    """Tell whether a quantizer can't tell a clamp from a ReLU: it starts at 0 and ends behind the quantizer's integers."""
    if node.kind not in ("relu", "clamp") or node.low != 0 or codes.signed or codes.zero_point:
        return False
    return node.high > (codes.range[1] - 0.5) * codes.scale


def _is_power_of_two(scale: float) -> bool:
    return bool(np.frexp(scale)[0] == 0.5)
