"""Functions of one value as tables: pieces of parabolas for any number, or an entry for each of 256 bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from haq.deployment.nodes import Node, apply_function
from haq.deployment.program import Array, Codes, Fixed, Representation, Table

Values = NDArray[np.float64]
NARROWEST, WIDEST = 2.0**-6, 2.0**20  # the least and the largest domain, from minus this to it
STRAIGHT_BY = 64.0  # functions that become straight at all are so from here on
FEWEST, MOST = 8, 4096  # segments; Hardswish and other functions of few pieces need no more than 8
FLOAT32_LARGEST = float(np.finfo(np.float32).max)
TOLERANCE = 2.0**-22  # of the largest value in calibration: nearly as close as float32 is
STRAIGHT = 2.0**-20  # likewise, of what is taken for straight
ALLOWED = 2.0**-10  # beyond it a function is refused: a quarter of a step of 8 bits
PLACES = 16  # in each segment, where a table is looked at,
LOOKED_AT = 4096  # and in the whole domain at least


def make_table(node: Node, largest: float, headroom: float, unit: float) -> Table:
    """Make the table of a function.

    Its domain is the smallest, from minus a power of two to it, beyond which the function is straight (or constant); where it
    never is, `headroom` times the largest value of calibration. Its segments are as many as are needed to be nearly as close
    as float32 is. They are given by the function at three places of each: its ends and its middle.

    Args:
        node: A node of kind "function".
        largest: The largest value, without its sign, that the function gets in calibration.
        headroom: How many times as large values may become.
        unit: What the table gives is in units of this.

    Returns:
        The table.

    Raises:
        ValueError: Naming the layer, for a function that has no such table: that jumps or bends within a segment, or isn't
            finite.
    """
    largest = min(max(largest, NARROWEST / headroom), WIDEST)
    end = _domain(node, largest, headroom)
    segments = FEWEST
    while True:
        pieces = _pieces(node, end, segments)
        error, scale = _error(node, pieces, end, largest)
        if error <= TOLERANCE * scale or segments == MOST:
            break
        segments *= 2
    if not error <= ALLOWED * scale:
        raise ValueError(
            f"layer {node.module!r} can't be deployed: function {node.function} has no table from {-end:g} to {end:g} that is"
            f" closer to it than {error:.3g}"
        )
    return Table(segments / 2, segments / (2 * end), (pieces / unit).astype(np.float32))


def _compute(node: Node, x: Values) -> Values:
    made: Values = apply_function(node, torch.from_numpy(x)).numpy()
    return made


def _domain(node: Node, largest: float, headroom: float) -> float:
    """Return where the function begins to be straight, or where it need not be known any more."""
    scale = float(np.abs(_compute(node, np.linspace(-largest, largest, 65))).max())
    end = NARROWEST
    while end <= STRAIGHT_BY:
        if _is_straight(node, -1.0, end, scale) and _is_straight(node, 1.0, end, scale):
            return end
        end *= 2
    end = float(2.0 ** math.ceil(math.log2(headroom * largest)))
    # What float32 doesn't hold isn't known either.
    while end >= 2 * largest and not _is_finite(node, end):
        end /= 2
    return end


def _is_straight(node: Node, side: float, end: float, scale: float) -> bool:
    """Say whether a function continues on one side as it ends there."""
    # From where the outermost segment begins, were there the fewest.
    x = side * np.concatenate([[end * (1 - 2 / FEWEST), end], end * np.geomspace(1.01, 1000, 60)])
    y = _compute(node, x)
    if not np.isfinite(y).all():
        return False
    line = y[0] + (y[1] - y[0]) / (x[1] - x[0]) * (x - x[0])
    return bool((np.abs(line - y) <= STRAIGHT * np.maximum(scale, np.abs(y))).all())


def _is_finite(node: Node, end: float) -> bool:
    y = _compute(node, np.linspace(-end, end, 65))
    return bool((np.abs(y) < FLOAT32_LARGEST / 2**8).all())


def _pieces(node: Node, end: float, segments: int) -> Values:
    """Return the coefficients of each segment, (segments, 3): of the place in it, from 0 to 1."""
    x = np.linspace(-end, end, 2 * segments + 1)
    y = _compute(node, x)
    left, middle, right = y[:-1:2], y[1::2], y[2::2]
    pieces = np.stack([left, 4 * middle - 3 * left - right, 2 * left + 2 * right - 4 * middle], 1)
    pieces[0] = left[0], right[0] - left[0], 0.0
    pieces[-1] = left[-1], right[-1] - left[-1], 0.0
    return pieces


def _error(node: Node, pieces: Values, end: float, largest: float) -> tuple[float, float]:
    """Return how far a table is from its function where values are in calibration, and the function's largest value there."""
    inverse = len(pieces) / (2 * end)
    step = 2 * end / max(len(pieces) * PLACES, LOOKED_AT)
    # Behind its end the table goes on as it ends, and so does the function, nearly: a few places tell.
    near = min(largest, 2 * end)
    x = np.arange(-near, near + step, step)
    if largest > near:
        far = np.geomspace(near, largest, LOOKED_AT)
        x = np.concatenate([-far, x, far])
    at = (x + end) * inverse
    i = np.floor(at).clip(0, len(pieces) - 1).astype(int)
    r = at - i
    y = _compute(node, x)
    made = (pieces[i, 2] * r + pieces[i, 1]) * r + pieces[i, 0]
    with np.errstate(invalid="ignore"):
        error = np.abs(made - y).max()
    if not math.isfinite(error):
        error = math.inf
    return float(error), float(np.abs(y).max())


def entries(node: Node, codes: Codes, low: float, high: float, output: Representation) -> Array:
    """Return what a function makes of every byte of codes, as torch computes it in float32.

    Args:
        node: A node of kind "function".
        codes: What it gets.
        low: The least value it may give; smaller ones are clipped.
        high: The largest.
        output: What is stored.

    Returns:
        256 entries of the output's type.
    """
    q = np.arange(256, dtype=np.int32) - codes.zero
    if codes.bits == 1 and codes.signed:
        q = np.where(q >= 0, 1, -1)
    real = q.clip(*codes.range).astype(np.float32) * np.float32(codes.scale)
    y = apply_function(node, torch.from_numpy(real.astype(np.float32))).clamp(low, high).numpy()
    return stored(y, output)


def stored(values: Array, output: Representation) -> Array:
    """Return real values of float32 as a representation stores them: divided by its unit and rounded, as torch does."""
    made: Any = values.astype(np.float32)
    if isinstance(output, Codes):
        made = to_codes(made / np.float32(output.scale), output)
    elif isinstance(output, Fixed):
        made = np.rint(made / np.float32(output.step)).clip(-output.limit, output.limit).astype(np.int32)
    return made


def to_codes(ratio: Array, codes: Codes) -> Array:
    """Round values in units of a scale to stored codes; of one signed bit the sign counts."""
    if codes.bits == 1 and codes.signed:
        q: Array = np.where(ratio >= 0, 1, -1)
    else:
        q = np.rint(ratio).clip(*codes.range)
    made: Array = (q + codes.zero).astype(codes.dtype)
    return made
