"""Operations that take values to other places: what they are called, and where each value of their result comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from quantizers import graph as captured

ZERO = -1  # the label of a zero
RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
PERMUTES = {"permute", "transpose", "t", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims"}
PARTS = {"split", "split_with_sizes", "chunk", "tensor_split", "unbind"}  # that give several results
PADS = {"constant_pad_nd": "constant", "reflection_pad1d": "reflect", "reflection_pad2d": "reflect"}
PADS |= {"replication_pad1d": "replicate", "replication_pad2d": "replicate", "pad": "", "_pad_circular": "circular"}
NEAREST = {"upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"}
# Those whose arguments are told as they are.
PLAIN = {"pixel_shuffle": ("upscale_factor",), "pixel_unshuffle": ("downscale_factor",), "channel_shuffle": ("groups",)}
PLAIN |= {"repeat": ("repeats",)}
OTHERS = {"slice", "narrow", "select", "cat", "concat", "concatenate", "stack", "roll", "flip", "expand", "expand_as"}
OTHERS |= {"repeat_interleave", "index_select", "index", "diagonal", "tile"}
MOVES = RESHAPES | PERMUTES | PARTS | set(PADS) | NEAREST | set(PLAIN) | OTHERS


def labels(dims: tuple[int, ...], start: int) -> Tensor:
    """Number the values of a tensor of this shape from `start` on. In float64, which every operation of torch takes."""
    return torch.arange(start, start + math.prod(dims), dtype=torch.float64).view(dims)


def move_labels(operation: fx.Node, of: dict[fx.Node, Tensor], constants: dict[fx.Node, Tensor]) -> Any:
    """Run a move on labels in place of values.

    Args:
        operation: The move.
        of: The labels of the results that it reads.
        constants: The constants that it reads.

    Returns:
        The labels of what it gives: a tensor, or a list of them.

    Raises:
        ValueError: Saying, in words that follow the operation's name, why it is no move.
    """

    def taken(node: fx.Node) -> Any:
        if node in of:
            return of[node]
        constant = constants[node]
        if not constant.is_floating_point():
            return constant
        if constant.any():
            raise ValueError("of a constant or a parameter")
        return torch.full(constant.shape, float(ZERO), dtype=torch.float64)

    target: Any = operation.target
    args, kwargs = fx.map_arg((operation.args, dict(operation.kwargs)), taken)
    base = captured.base_name(operation)
    if PADS.get(base) == "constant" or base == "pad":
        given = captured.arguments(operation)
        if given.get("mode", "constant") == "constant":
            if given.get("value"):
                raise ValueError(f"with {given['value']} instead of zeros")
            tensor: Any = args[0]
            return torch.nn.functional.pad(tensor, given["pad"], value=float(ZERO))
    return target(*args, **kwargs)


def index_of(moved: Tensor) -> NDArray[np.int32]:
    """Return labels as the index of a node."""
    return moved.reshape(-1).to(torch.int32).numpy()


def described(operation: fx.Node, part: int | None = None) -> tuple[str, dict[str, Any]]:
    """Describe a move in the words of `nodes.Node`.

    Args:
        operation: The move.
        part: Of an operation that gives several results, the number of one of them.

    Returns:
        Its operation and its arguments.
    """
    base = captured.base_name(operation)
    given = captured.arguments(operation)
    if base in RESHAPES:
        return "reshape", {}
    if base in PERMUTES:
        return "permute", {"dims": _permutation(operation)}
    if base in ("expand", "expand_as"):
        return "expand", {}
    if base in PADS:
        return "pad", {"pad": list(given["pad" if "pad" in given else "padding"]), "mode": PADS[base] or given["mode"]}
    if base in NEAREST:
        return "upsample_nearest", {"output_size": list(operation.meta["val"].shape[2:])}
    if base in PLAIN:
        return base, {key: given[key] for key in PLAIN[base]}
    if base in ("cat", "concat", "concatenate"):
        return "cat", {"dim": given["dim"] % operation.meta["val"].dim()}
    if base == "stack":
        return "stack", {"dim": given["dim"] % operation.meta["val"].dim()}
    if base in ("roll", "flip"):
        rank = operation.meta["val"].dim()
        if not given["dims"]:
            return "gather", {}
        words: dict[str, Any] = {"dims": [dim % rank for dim in given["dims"]]}
        if base == "roll":
            words["shifts"] = list(given["shifts"])
        return base, words
    return _part(operation, base, given, part)


def _part(operation: fx.Node, base: str, given: dict[str, Any], part: int | None) -> tuple[str, dict[str, Any]]:
    """Describe an operation that takes a part of a tensor along a dimension."""
    tensor = given.get("self", given.get("input"))
    if "dim" not in given or not isinstance(tensor, fx.Node):
        return "gather", {}
    before = tensor.meta["val"].shape
    dim = given["dim"] % len(before)
    size = before[dim]
    if base == "select":
        return "select", {"dim": dim, "index": given["index"] % size}
    if base == "unbind" and part is not None:
        return "select", {"dim": dim, "index": part}
    if base == "slice":
        start, end, step = slice(given["start"], given["end"], given["step"]).indices(size)
    elif base == "narrow" and isinstance(given["start"], int):
        start, step = given["start"] % size, 1
        end = start + given["length"]
    elif base in PARTS and part is not None:
        parts = [one.shape[dim] for one in operation.meta["val"]]
        start, step = sum(parts[:part]), 1
        end = start + parts[part]
    else:
        return "gather", {}
    return "slice", {"dim": dim, "start": start, "end": end, "step": step}


def _permutation(operation: fx.Node) -> list[int]:
    """Find out to which order an operation brings the dimensions, by running it on one whose sizes all differ."""
    source: Any = operation.args[0]
    sizes = range(1, source.meta["val"].dim() + 1)
    target: Any = operation.target
    made = target(torch.empty(tuple(sizes), device="meta"), *operation.args[1:], **operation.kwargs)
    return [size - 1 for size in made.shape]
