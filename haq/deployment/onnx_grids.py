"""Grids of integers that tensors of an ONNX file lie on, and where in a graph values are put on them.

ONNX Runtime makes an integer convolution of a Conv between DequantizeLinear and a QuantizeLinear that stands right behind it.
So a value is put on the grid of the layer that reads it as early as that changes nothing: before a ReLU, a maximum or a
flatten, which do the same to the integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from haq.deployment.graph import Graph, Node
from haq.deployment.program import BYTE_BITS, Codes


@dataclass(frozen=True)
class Grid:
    """Real values (integer - zero) scale, the integers from `low` to `high`; a file holds them in bytes.

    `signed` says whether in int8, then symmetric (zero is 0) and clipped before they are rounded, as TensorRT wants it, or in
    uint8.
    """

    scale: float
    zero: int
    low: int
    high: int
    signed: bool = False

    @property
    def dtype(self) -> np.dtype[np.int8] | np.dtype[np.uint8]:
        """The type of the integers."""
        if self.signed:
            return np.dtype(np.int8)
        return np.dtype(np.uint8)

    @property
    def key(self) -> tuple[float, int]:
        """What grids have in common that differ in their ends alone."""
        return self.scale, self.zero

    def integer(self, value: float) -> float:
        """Return where a real value lies: rounded as torch rounds what it divides in float32; infinity stays what it is."""
        if math.isinf(value):
            return value
        return float(np.rint(np.float32(value) / np.float32(self.scale))) + self.zero

    def clamped(self, low: float, high: float) -> Grid:
        """Return the grid of what is clamped to real bounds."""
        ends = [min(max(end, self.integer(low)), self.integer(high)) for end in (self.low, self.high)]
        return dataclasses.replace(self, low=int(ends[0]), high=int(ends[1]))


def grid_of_codes(codes: Codes, signed: bool = False) -> Grid | None:
    """Return the grid of what enters a layer; None for one signed bit and for what is wider than a byte.

    In bytes, signed integers of b bits lie around 2^(b-1): ONNX Runtime fuses no int8 inputs with uint8 outputs, and on x86
    without VNNI it adds products by pairs in 16 bits, which those of bytes below 128 with weights of 8 bits fit into.
    """
    if codes.bits > BYTE_BITS or (codes.bits == 1 and codes.signed):
        return None
    low, high = codes.range
    if signed:
        return Grid(codes.scale, 0, low, high, True)
    zero = codes.zero_point
    if codes.signed:
        zero = 2 ** (codes.bits - 1)
    return Grid(codes.scale, zero, low + zero, high + zero)


def grid_of_node(node: Node, signed: bool = False) -> Grid:
    """Return the grid of a node of kind "quantize"."""
    assert node.scale is not None
    low, high = int(node.low), int(node.high)
    zero = node.zero_point
    if signed:
        return Grid(float(node.scale), 0, low - zero, high - zero, True)
    shift = 0
    if low < 0:
        shift = 2 ** (BYTE_BITS - 1)
    return Grid(float(node.scale), zero + shift, low + shift, high + shift)


def wanted_grids(graph: Graph, of_readers: Mapping[str, Grid]) -> dict[str, Grid]:
    """Find the values that are wanted on one grid and in no other form.

    Args:
        graph: The operations.
        of_readers: By the name of a node, the grid that its input is put on: of layers and quantizers.

    Returns:
        By the name of a node, the grid of all who read its result; it ends where the widest of theirs does.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    wanted: dict[str, Grid] = {}
    for node in reversed(graph.nodes):
        asked = [_asked(reader, of_readers, wanted) for reader in readers.get(node.name, [])]
        grids = [grid for grid in asked if grid is not None]
        if not grids or len(grids) < len(asked) or len({grid.key for grid in grids}) > 1:
            continue
        low, high = min(grid.low for grid in grids), max(grid.high for grid in grids)
        wanted[node.name] = dataclasses.replace(grids[0], low=low, high=high)
    return wanted


def _asked(reader: Node, of_readers: Mapping[str, Grid], wanted: Mapping[str, Grid]) -> Grid | None:
    """Return the grid on which an operation may read its input; None where it wants real values."""
    if reader.name in of_readers:
        return of_readers[reader.name]
    grid = wanted.get(reader.name)
    if grid is None:
        return None
    if reader.kind in ("relu", "clamp"):
        return grid.clamped(reader.low, reader.high)
    if reader.kind in ("max_pool", "flatten"):
        return grid
    if reader.kind == "move":
        assert reader.index is not None
        # What is put beside the values is a zero, which must lie on the grid.
        if grid.low <= grid.zero <= grid.high or (reader.index >= 0).all():
            return grid
    return None
