"""What is decided together: the layers, the pairs of widths that they may take, and what these cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw_models.cost import CostTable
from hw_models.widths import PLACES, WIDTHS, places, read_widths, width_words

NO_OTHERS: NDArray[np.float64] = np.empty((0, 0))


class Decision(NamedTuple):
    """Layers that take one pair of widths together, and what they may take."""

    layers: tuple[int, ...]  # in the order of the workload
    pairs: NDArray[np.int64]  # (options, 2): widths of weights and of activations, float being 32
    prices: NDArray[np.float64]  # (options,) of the problem's metric, in its unit
    others: NDArray[np.float64] = NO_OTHERS  # (k, options), of the other limits that are sums, in the order of the limits

    @property
    def places(self) -> NDArray[np.intp]:
        """Return where the options' widths stand in a table, shape (options, 2)."""
        return places(self.pairs)

    def of(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take the options' entries of a table (10, 10); returns shape (options,)."""
        found = self.places
        return table[found[:, 0], found[:, 1]]


class WidthsAsked(NamedTuple):
    """The widths that a solver may choose, float being 32."""

    weights: tuple[int, ...]
    activations: tuple[int, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Tell which pairs these are, shape (10, 10)."""
        return np.isin(WIDTHS, self.weights)[:, None] & np.isin(WIDTHS, self.activations)

    @property
    def words(self) -> str:
        """Write them as a user gives them: "2:8", "4,8/8,16"."""
        weights, activations = _words(self.weights), _words(self.activations)
        if weights == activations:
            return weights
        return f"{weights}/{activations}"


def read_bits(bits: Any) -> WidthsAsked:
    """Read the widths that may be chosen.

    Args:
        bits: (smallest, largest), or a text: "2:8", "4,8,16,float", "4,8/8,16" (weights/activations).

    Returns:
        The widths.

    Raises:
        ValueError: For anything else, naming it.
    """
    if isinstance(bits, str):
        of_weights, slash, of_activations = bits.partition("/")
        weights = read_widths(of_weights)
        if not slash:
            return WidthsAsked(weights, weights)
        return WidthsAsked(weights, read_widths(of_activations))
    low, high = bits
    if not 1 <= low <= high <= 8:
        raise ValueError(
            f"bits must be (smallest, largest) within 1..8, not {(low, high)!r}; 16 bits and float are given as text: '2:8,16'"
        )
    return WidthsAsked(tuple(range(low, high + 1)), tuple(range(low, high + 1)))


def _words(widths: tuple[int, ...]) -> str:
    """Write widths, those that follow each other as a span."""
    parts = []
    few = [width for width in widths if width <= 8]
    start = None
    for index, width in enumerate(few):
        if start is None:
            start = width
        if index + 1 < len(few) and few[index + 1] == width + 1:
            continue
        if width == start:
            parts.append(str(width))
        else:
            parts.append(f"{start}:{width}")
        start = None
    parts += [width_words(width) for width in widths if width > 8]
    return ",".join(parts)


def priced(table: CostTable, metric: str) -> NDArray[np.float64]:
    """Return a metric's costs, finite everywhere: what the target can't do costs as much as the layer's dearest pair.

    Such a pair is no option of a `Decision`; its cost is a stand-in for scales and tables alone.
    """
    cost = table.metric(metric)
    if table.supported.all():
        return cost
    return np.where(table.supported, cost, np.nanmax(cost, axis=(1, 2), keepdims=True))


def ten_places(values: Any, float_value: float) -> NDArray[np.float64]:
    """Bring what a scheme says by width to ten places: the last is float's, and where there is none for 16 bits, 8 bits'."""
    given = np.asarray(values, float)
    if len(given) == PLACES:
        return given
    missing = PLACES - 1 - len(given)
    return np.concatenate([given, np.repeat(given[-1:], missing), [float_value]])


def joined(groups: Iterable[tuple[int, ...]], tied: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Join the groups that have a layer in one group of `tied`: a weight that is stored once has one width."""
    made = list(groups)
    for together in tied:
        touched = [group for group in made if not set(together).isdisjoint(group)]
        made = [group for group in made if group not in touched]
        made.append(tuple(sorted(layer for group in touched for layer in group)))
    return sorted(made)
