"""Operations that take values to other places as ONNX operators of opset 17, for any number of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from haq.deployment.nodes import Node

PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def write_move(writer: Any, node: Node, inputs: list[str], made: str, zero: str = "") -> None:
    """Write a move, of values of any type.

    Args:
        writer: The `onnx_nodes.GraphWriter`.
        node: A node of kind "move".
        inputs: The names of the tensors that it reads.
        made: The name of the tensor that it makes.
        zero: The name of the constant that stands for zero; empty for that of float.

    Raises:
        ValueError: Naming the operation, for a move that mixes images.
    """
    write = WRITERS.get(node.operation)
    if write is None or not write(_Move(writer, node, inputs, made, zero)):
        _write_gather(_Move(writer, node, inputs, made, zero))


class _Move:
    """A move with what it reads and makes in the file."""

    def __init__(self, writer: Any, node: Node, inputs: list[str], made: str, zero: str) -> None:
        self.writer = writer
        self.node = node
        self.inputs = inputs
        self.made = made
        self.zero = zero
        self.before = writer.dims[node.inputs[0]]
        self.dims = node.dims
        self.given = node.arguments

    def last(self, kind: str, inputs: list[str], **attributes: Any) -> bool:
        """Write the operator that makes the result."""
        self.writer.op(kind, inputs, self.made, **attributes)
        return True

    def between(self, kind: str, inputs: list[str], what: str, **attributes: Any) -> str:
        """Write an operator in between."""
        made: str = self.writer.op(kind, inputs, f"{self.made}:{what}", **attributes)
        return made

    def integers(self, *values: int) -> str:
        """Write whole numbers."""
        made: str = self.writer.integers(*values)
        return made


def _reshape(move: _Move) -> bool:
    return move.last("Reshape", [*move.inputs, move.integers(-1, *move.dims[1:])])


def _permute(move: _Move) -> bool:
    return move.last("Transpose", move.inputs, perm=move.given["dims"])


def _slice(move: _Move) -> bool:
    given = move.given
    if given["dim"] == 0:
        return False
    names = [move.integers(given[key]) for key in ("start", "end", "dim", "step")]
    return move.last("Slice", [*move.inputs, *names])


def _select(move: _Move) -> bool:
    if move.given["dim"] == 0:
        return False
    index = move.writer.constant(f"index_{move.given['index']}", move.given["index"], np.int64)
    return move.last("Gather", [*move.inputs, index], axis=move.given["dim"])


def _cat(move: _Move) -> bool:
    if move.given["dim"] == 0:
        return False
    return move.last("Concat", move.inputs, axis=move.given["dim"])


def _stack(move: _Move) -> bool:
    dim = move.given["dim"]
    if dim == 0:
        return False
    axes = move.integers(dim)
    parts = [move.between("Unsqueeze", [name, axes], f"part{place}") for place, name in enumerate(move.inputs)]
    return move.last("Concat", parts, axis=dim)


def _pad(move: _Move) -> bool:
    pad = move.given["pad"]
    mode = PADS.get(move.given["mode"])
    if mode is None or min(pad) < 0 or len(pad) > 2 * (len(move.dims) - 1):
        return False
    starts, ends = [0] * len(move.dims), [0] * len(move.dims)
    for place in range(len(pad) // 2):  # torch begins with the last dimension
        starts[-1 - place], ends[-1 - place] = pad[2 * place], pad[2 * place + 1]
    inputs = [*move.inputs, move.integers(*starts, *ends)]
    if mode == "constant" and move.zero:
        inputs.append(move.zero)
    return move.last("Pad", inputs, mode=mode)


def _pixel_shuffle(move: _Move) -> bool:
    if len(move.before) != 4:
        return False
    return move.last("DepthToSpace", move.inputs, blocksize=move.given["upscale_factor"], mode="CRD")


def _channel_shuffle(move: _Move) -> bool:
    groups = move.given["groups"]
    _, channels, *places = move.before
    apart = move.between("Reshape", [*move.inputs, move.integers(-1, groups, channels // groups, *places)], "groups")
    order = [0, 2, 1, *range(3, 3 + len(places))]
    turned = move.between("Transpose", [apart], "turned", perm=order)
    return move.last("Reshape", [turned, move.integers(-1, *move.dims[1:])])


def _repeat(move: _Move) -> bool:
    repeats = list(move.given["repeats"])
    if len(repeats) != len(move.before) or repeats[0] != 1:
        return False
    return move.last("Tile", [*move.inputs, move.integers(*repeats)])


def _expand(move: _Move) -> bool:
    if len(move.dims) != len(move.before) or move.dims[0] != 1:
        return False
    return move.last("Expand", [*move.inputs, move.integers(*move.dims)])


def _upsample_nearest(move: _Move) -> bool:
    """Take the rows and columns that the index says; whole factors are what Resize does."""
    index = move.node.index
    assert index is not None
    sizes, outputs = move.before[2:], move.dims[2:]
    # Where the values of the first channel come from.
    first = np.unravel_index(index[: math.prod(outputs)].reshape(outputs), sizes)
    taken = []
    for axis in range(len(outputs)):
        along = np.moveaxis(first[axis], axis, 0).reshape(outputs[axis], -1)[:, 0]
        taken.append(along)
    factors = [after // before for before, after in zip(sizes, outputs, strict=True)]
    whole = all(
        before * factor == after and (along == np.arange(after) // factor).all()
        for before, after, factor, along in zip(sizes, outputs, factors, taken, strict=True)
    )
    if whole:
        scales = move.writer.constant(f"{move.made}:scales", [1, 1, *factors])
        inputs = [*move.inputs, "", scales]
        return move.last("Resize", inputs, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    source = move.inputs[0]
    for axis, along in enumerate(taken[:-1]):
        rows = move.writer.constant(f"{move.made}:places{axis}", along, np.int64)
        source = move.between("Gather", [source, rows], f"rows{axis}", axis=2 + axis)
    columns = move.writer.constant(f"{move.made}:places", taken[-1], np.int64)
    return move.last("Gather", [source, columns], axis=1 + len(taken))


def _write_gather(move: _Move) -> None:
    """Write any move within images: all values of an image in a row, those that are wanted, and the shape of the result."""
    shapes = [move.writer.dims[name] for name in move.node.inputs]
    if any(dims[0] != 1 for dims in (*shapes, move.dims)):
        raise ValueError(f"operation {move.node.name!r} can't be deployed: it takes values from one image to another")
    index = move.node.index
    assert index is not None
    rows = [move.between("Flatten", [name], f"row{place}") for place, name in enumerate(move.inputs)]
    source = rows[0]
    if len(rows) > 1:
        source = move.between("Concat", rows, "rows", axis=1)
    zeros = index < 0
    if zeros.any():
        # A zero is put behind the values.
        inputs = [source, move.integers(0, 0, 0, 1)]
        if move.zero:
            inputs.append(move.zero)
        source = move.between("Pad", inputs, "with_zero", mode="constant")
        index = np.where(zeros, sum(math.prod(dims) for dims in shapes), index)
    places = move.writer.constant(f"{move.made}:places", index, np.int64)
    taken = move.between("Gather", [source, places], "taken", axis=1)
    move.last("Reshape", [taken, move.integers(-1, *move.dims[1:])])


WRITERS = {
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "stack": _stack,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
    "repeat": _repeat,
    "expand": _expand,
    "upsample_nearest": _upsample_nearest,
}
