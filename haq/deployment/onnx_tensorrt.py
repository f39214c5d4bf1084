"""What TensorRT holds of a quantized network: signed integers of 8 bits around zero, and weights alone of 4.

What enters layers after a ReLU are unsigned integers of 8 bits here. TensorRT has no such ones, so they become seven bits of
its signed ones, with steps twice as large; so do quantizers in front of additions and poolings, whose zero moves to 0. The
network of `signed_network` has that already, and the file says what it computes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import integer_activations
from haq.deployment.program import BYTE_BITS, Codes

LARGEST = 2 ** (BYTE_BITS - 1) - 1
HELD = "TensorRT has signed integers of 2 to 8 bits around zero, or float"


def check(network: nn.Module) -> None:
    """Raise ValueError, naming the layer and what TensorRT takes in its place, for what it can't hold."""
    for name, layer in Q.quant_layers(network).items():
        for what, bits in (("weights have", layer.weight_bits), ("input has", layer.activation_bits)):
            if bits is not None and not 2 <= bits <= BYTE_BITS:
                width = f"{bits} bits"
                if bits == 1:
                    width = "1 bit"
                raise ValueError(f"layer {name!r} can't be deployed for TensorRT: its {what} {width}, and {HELD}")
        if layer.activation_bits is not None and integer_activations(name, layer).zero_point:
            raise ValueError(
                f"layer {name!r} can't be deployed for TensorRT: its input is asymmetric, with zero at "
                f"{integer_activations(name, layer).zero_point}, and {HELD}"
            )


def signed_codes(codes: Codes) -> Codes:
    """Return what enters a layer as TensorRT holds it; all of 8 bits change."""
    if codes.bits < BYTE_BITS:
        return codes
    if codes.signed:
        return dataclasses.replace(codes, narrow=False)
    highest = codes.range[1]
    return Codes(codes.scale * highest / LARGEST, BYTE_BITS - 1, False)


def is_halved(codes: Codes) -> bool:
    """Tell whether integers lose a bit."""
    return codes.bits == BYTE_BITS and not codes.signed


class _SignedInputs(Q.Scheme):
    """A layer's scheme with its input in signed integers of 8 bits."""

    def __init__(self, inner: Q.Scheme, codes: Codes) -> None:
        self.inner = inner
        self.codes = codes

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        """Return the quantized weight."""
        return self.inner.weight(layer, bits)

    def integer_weights(self, layer: Q.SchemeLayer) -> Q.IntegerWeights:
        """Return the weights' integers."""
        return self.inner.integer_weights(layer)

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the quantized input."""
        return (x / self.codes.scale).round().clamp(*self.codes.range) * self.codes.scale

    def integer_activations(self, layer: Q.SchemeLayer) -> Q.IntegerActivations:
        """Return how the input is integers."""
        return Q.IntegerActivations(self.codes.scale, self.codes.bits, self.codes.signed, self.codes.narrow)

    def zero_point(self, layer: Q.SchemeLayer, bits: int) -> int:
        """Return 0."""
        return 0


@torch.no_grad()
def signed_network(network: nn.Module) -> nn.Module:
    """Make a copy of a quantized network that computes with what TensorRT holds.

    Args:
        network: A network that `check` takes.

    Returns:
        The copy, in evaluation mode.
    """
    made = Q.copy_network(network).eval()
    for name, layer in Q.quant_layers(made).items():
        if layer.activation_bits is not None:
            codes = integer_activations(name, layer)
            if signed_codes(codes) != codes:
                layer.scheme = _SignedInputs(layer.scheme, signed_codes(codes))
    for quantizer in Q.residual_quantizers(made).values():
        if quantizer.calibrated:
            scale, zero, low, high = quantizer.grid
            quantizer.set_grid(type(quantizer.grid)(*_symmetric(scale, zero, low, high)))
    return made


def signed_graph(graph: Graph) -> Graph:
    """Return a graph with its quantizers as TensorRT holds them, as `signed_network` has them."""
    return Graph(tuple(_signed_node(node) for node in graph.nodes))


def _signed_node(node: Node) -> Node:
    if node.kind != "quantize":
        return node
    assert node.scale is not None
    scale, zero, low, high = _symmetric(float(node.scale), node.zero_point, int(node.low), int(node.high))
    return dataclasses.replace(node, scale=node.scale * 0 + scale, zero_point=zero, low=float(low), high=float(high))


def _symmetric(scale: float, zero: int, low: int, high: int) -> tuple[float, int, int, int]:
    """Return scale, zero, least and largest integer of a quantizer whose zero is 0 and whose integers fit into 8 bits."""
    ends = low - zero, high - zero
    largest = max(-ends[0], ends[1])
    if largest <= LARGEST + 1 and ends[1] <= LARGEST:
        return scale, 0, ends[0], ends[1]
    wider = scale * largest / LARGEST
    least = 0
    if ends[0] < 0:
        least = -LARGEST - 1
    return wider, 0, least, LARGEST
