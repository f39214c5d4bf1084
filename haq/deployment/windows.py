"""Where poolings and interpolations look, as torch does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from haq.deployment.nodes import Ranges, Taps, Window
from hw_models.workload import Size


def adaptive_ranges(size: Size, output_size: Size) -> Ranges:
    """Return what an adaptive average pooling sums up: from floor(i size / outputs) to ceil((i + 1) size / outputs).

    Args:
        size: Height and width of the map.
        output_size: Those of the result.

    Returns:
        The ranges, and their areas as divisors.
    """
    along = []
    for length, outputs in zip(size, output_size, strict=True):
        i = np.arange(outputs)
        along.append(np.stack([i * length // outputs, -((i + 1) * length // -outputs)], 1))
    rows, columns = along
    return _ranges(rows, columns, _areas(rows, columns))


def window_ranges(window: Window, size: Size, output_size: Size, *, padding_counts: bool, divisor: int | None) -> Ranges:
    """Return what an average pooling sums up, at the borders too.

    Args:
        window: Where it looks.
        size: Height and width of the map.
        output_size: Those of the result.
        padding_counts: Whether padding is counted; what `ceil_mode` puts beyond it isn't.
        divisor: What all sums are divided by in place of that.

    Returns:
        The ranges.
    """
    inside = []
    counted = []
    for axis in (0, 1):
        start = np.arange(output_size[axis]) * window.stride[axis] - window.padding[axis]
        end = start + window.kernel[axis]
        counted.append(np.stack([start, np.minimum(end, size[axis] + window.padding[axis])], 1))
        inside.append(np.stack([np.maximum(start, 0), np.minimum(end, size[axis])], 1))
    divisors = _areas(inside[0], inside[1])
    if padding_counts:
        divisors = _areas(counted[0], counted[1])
    if divisor is not None:
        divisors = np.full(output_size, float(divisor))
    rows, columns = inside
    return _ranges(rows, columns, divisors)


def _areas(rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float64]:
    made: NDArray[np.float64] = np.outer(rows[:, 1] - rows[:, 0], columns[:, 1] - columns[:, 0]).astype(np.float64)
    return made


def _ranges(rows: NDArray[Any], columns: NDArray[Any], divisors: NDArray[np.float64]) -> Ranges:
    return Ranges(rows.astype(np.int32), columns.astype(np.int32), divisors)


def bilinear_taps(size: int, outputs: int, *, align_corners: bool, scale: float | None) -> Taps:
    """Return between which two places each output of a bilinear interpolation lies, along one dimension.

    Args:
        size: Rows of the map.
        outputs: Rows of the result.
        align_corners: As torch has it: whether the first and last places stay where they are.
        scale: How many outputs a row becomes; None is outputs / size.

    Returns:
        The places.
    """
    i = np.arange(outputs)
    if align_corners:
        at = i * ((size - 1) / max(outputs - 1, 1))
    else:
        step = size / outputs
        if scale is not None:
            step = 1 / scale
        at = np.maximum((i + 0.5) * step - 0.5, 0.0)
    first = np.minimum(np.floor(at).astype(np.int32), size - 1)
    second = np.minimum(first + 1, size - 1)
    return Taps(first, second.astype(np.int32), np.clip(at - first, 0.0, 1.0))
