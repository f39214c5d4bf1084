"""Which of ShuffleNetV2's guidelines for efficient networks a network breaks, and what depthwise separable layers save in it.

Ma, Zhang, Zheng and Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (ECCV 2018), section 2.
Memory access cost is counted as there, in elements that a layer reads and writes once: its input, its weights, its output; at
8 bits these are bytes.

G1  Equal channels move least. A 1x1 layer from c1 to c2 channels at h w positions does B = h w c1 c2 multiplications and moves

        h w (c1 + c2) + c1 c2  >=  2 sqrt(h w B) + B / (h w)

    with equality if and only if c1 = c2. Looked at are pointwise convolutions whose output is as large as their input, and
    linear layers, which are that on their rows.

G2  Groups move more. With g groups a layer of the same B = h w c1 c2 / g moves

        h w (c1 + c2) + c1 c2 / g  =  h w c1 + B g / c1 + B / (h w)

    which grows with g, and is held against the layer of the same input and multiplications without groups, of c2 / g outputs.
    With a kernel, weights and multiplications are k^2 times as many and the rest is the same. A depthwise layer has g = c1.

G3  Fragments are slow. Layers that read one activation are branches side by side, each too small for a parallel machine. What
    is known is which layers read an activation; a branch without a layer of its own (a pooling, a shortcut), and one that
    begins with an activation function or a norm of its own, isn't counted. So there may be more.

G4  Element-wise operations aren't free: little arithmetic, but all elements move. Additions and products of two activations
    are told apart from activation functions, which most engines compute within the layer before. The paper counts depthwise
    layers among them, too, for their many elements per multiplication; here they are under G2 and below.

Depthwise separable layers (Howard et al., "MobileNets", 2017): a depthwise layer of kernel K and the pointwise one behind it,
to C_out channels, do 1 / C_out + 1 / K^2 of the multiplications of one full convolution. The 1 / K^2 is the pointwise layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from hw_models.metrics import moved
from hw_models.workload import Layer, Workload

EVENED = ("pointwise", "linear")  # kinds of layers that G1 is about
GROUPED = ("grouped", "depthwise")  # and G2
NOTABLE = 1.05  # times as much as the least; of a classifier's unequal channels hardly anything comes


class Excess(NamedTuple):
    """A layer that moves more than another of as many multiplications would, in elements per image."""

    layer: str
    shape: str
    moves: float
    least: float

    @property
    def ratio(self) -> float:
        """How many times as much it moves."""
        return self.moves / self.least


class Separable(NamedTuple):
    """A depthwise layer and the pointwise one behind it: their multiplications over those of one full convolution."""

    depthwise: str
    pointwise: str
    macs: int
    full_macs: int

    @property
    def ratio(self) -> float:
        """1 / C_out + 1 / K^2."""
        return self.macs / self.full_macs


@dataclass(frozen=True)
class Guidelines:
    """What the guidelines say of a network; see the module. Elements are per image.

    Attributes:
        layers_move: Elements that all layers read and write.
        channels: G1, the layers of unequal channels, the worst first.
        groups: G2, the layers with groups, the worst first.
        branches: G3, the names of layers that read one activation, the most of them first.
        combined: G4, elements that additions and products of activations read and write.
        functions: G4, elements that activation functions read and write.
        combining: The modules of the former, those that move most first.
        separable: Depthwise layers with the pointwise ones behind them.
        macs: Multiply-accumulates of all layers.
        depthwise_macs: Of the depthwise layers among them.
        pointwise_macs: Of the pointwise ones.
    """

    layers_move: int
    channels: tuple[Excess, ...]
    groups: tuple[Excess, ...]
    branches: tuple[tuple[str, ...], ...]
    combined: int
    functions: int
    combining: tuple[str, ...]
    separable: tuple[Separable, ...]
    macs: int
    depthwise_macs: int
    pointwise_macs: int

    @property
    def broken(self) -> tuple[str, ...]:
        """List the guidelines that the network breaks: "G1" to "G4"; G1 and G2 where a layer moves 1.05 times the least."""
        found = {
            "G1": any(excess.ratio >= NOTABLE for excess in self.channels),
            "G2": any(excess.ratio >= NOTABLE for excess in self.groups),
            "G3": bool(self.branches),
            "G4": self.combined + self.functions > 0,
        }
        return tuple(name for name, is_broken in found.items() if is_broken)

    @property
    def element_wise_share(self) -> float:
        """The part of all elements moved, 0 to 1, that element-wise operations move, activation functions included."""
        between = self.combined + self.functions
        return between / (between + self.layers_move)

    @property
    def combined_share(self) -> float:
        """The part, 0 to 1, that additions and products move where activation functions are computed within layers."""
        return self.combined / (self.combined + self.layers_move)

    def saved(self, excesses: tuple[Excess, ...]) -> float:
        """Return the part of what all layers move, 0 to 1, that `channels` or `groups` move beyond the least."""
        return sum(excess.moves - excess.least for excess in excesses) / self.layers_move


def check(workload: Workload) -> Guidelines:
    """Hold a network against the guidelines.

    Args:
        workload: Its layers. G3 and G4 are only known of a workload that was traced.

    Returns:
        What was found.
    """
    combined = [found for found in workload.element_wise if found.operands > 1]
    combined.sort(key=lambda found: -(found.read + found.written))
    functions = [found for found in workload.element_wise if found.operands == 1]
    by_kind = {kind: sum(layer.macs for layer in workload.layers if layer.kind == kind) for kind in ("depthwise", "pointwise")}
    return Guidelines(
        layers_move=sum(_moves(layer) for layer in workload.layers),
        channels=tuple(_worst(_uneven(layer) for layer in workload.layers)),
        groups=tuple(_worst(_grouped(layer) for layer in workload.layers)),
        branches=tuple(_fragments(workload)),
        combined=sum(found.read + found.written for found in combined),
        functions=sum(found.read + found.written for found in functions),
        combining=tuple(dict.fromkeys(found.name for found in combined)),
        separable=tuple(_separable(workload)),
        macs=workload.macs,
        depthwise_macs=by_kind["depthwise"],
        pointwise_macs=by_kind["pointwise"],
    )


def unequal_channels(positions: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Count what a 1x1 layer moves, and the least for its multiplications (G1).

    Args:
        positions: Height times width.
        inputs: Channels c1.
        outputs: Channels c2.

    Returns:
        h w (c1 + c2) + c1 c2, and 2 sqrt(h w B) + B / (h w) with B = h w c1 c2.
    """
    product = positions * inputs * outputs
    moves = positions * (inputs + outputs) + inputs * outputs
    return float(moves), 2 * math.sqrt(positions * product) + product / positions


def separable_ratio(outputs: int, kernel: int) -> float:
    """Return the multiplications of a depthwise and a pointwise layer over a full convolution's: 1 / C_out + 1 / K^2.

    Args:
        outputs: C_out.
        kernel: K^2, the positions of the kernel.

    Returns:
        The ratio.
    """
    return 1 / outputs + 1 / kernel


def _moves(layer: Layer) -> int:
    """Elements that a layer reads and writes, over all calls."""
    return sum(moved(layer)) + layer.weights * len(layer.calls)


def _uneven(layer: Layer) -> Excess | None:
    """Hold a layer against G1; None if it has equal channels, or is none that G1 is about."""
    same_size = all(call.input_size == call.output_size for call in layer.calls)
    if layer.kind not in EVENED or not same_size or layer.in_channels == layer.out_channels:
        return None
    pairs = [unequal_channels(call.positions, layer.in_channels, layer.out_channels) for call in layer.calls]
    moves, least = (sum(amounts) for amounts in zip(*pairs, strict=True))
    return Excess(layer.name, layer.shape, moves, least)


def _grouped(layer: Layer) -> Excess | None:
    """Hold a layer against G2; None if it has no groups."""
    if layer.kind not in GROUPED:
        return None
    read, written = moved(layer)
    weights = layer.weights * len(layer.calls)
    return Excess(layer.name, layer.shape, read + weights + written, read + weights + written / layer.groups)


def _worst(found: Iterable[Excess | None]) -> list[Excess]:
    """Sort what breaks a guideline, the worst first."""
    excesses = [excess for excess in found if excess is not None]
    return sorted(excesses, key=lambda excess: -excess.ratio)


def _fragments(workload: Workload) -> list[tuple[str, ...]]:
    """List the layers that stand side by side (G3), the most branches first."""
    names = workload.names
    groups = [tuple(names[index] for index in group) for group in workload.branches]
    return sorted(groups, key=lambda group: -len(group))


def _separable(workload: Workload) -> list[Separable]:
    """Find depthwise layers that a pointwise one follows."""
    found = []
    for first, second in zip(workload.layers, workload.layers[1:], strict=False):
        follows = first.kind == "depthwise" and second.kind == "pointwise" and second.in_channels == first.out_channels
        if not follows or len(first.calls) != len(second.calls):
            continue
        kernel = first.kernel[0] * first.kernel[1]
        positions = sum(call.positions for call in first.calls)
        full = kernel * first.in_channels * second.out_channels * positions
        found.append(Separable(first.name, second.name, first.macs + second.macs, full))
    return found
