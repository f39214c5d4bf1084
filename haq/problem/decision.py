"""What is decided together: the layers, the pairs of bits that they may take, and what these cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw_models.cost import CostTable


class Decision(NamedTuple):
    """Layers that take one pair of bits together, and what they may take."""

    layers: tuple[int, ...]  # in the order of the workload
    pairs: NDArray[np.int64]  # (options, 2): weight bits, activation bits
    prices: NDArray[np.float64]  # (options,) in the metric's unit

    def of(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take the options' entries of a table (8, 8); returns shape (options,)."""
        return table[self.pairs[:, 0] - 1, self.pairs[:, 1] - 1]


def priced(table: CostTable, metric: str) -> NDArray[np.float64]:
    """Return a metric's costs, finite everywhere: what the target can't do costs as much as the layer's dearest pair.

    Such a pair is no option of a `Decision`; its cost is a stand-in for scales and tables alone.
    """
    cost = table.metric(metric)
    if table.supported.all():
        return cost
    return np.where(table.supported, cost, np.nanmax(cost, axis=(1, 2), keepdims=True))


def joined(groups: Iterable[tuple[int, ...]], tied: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Join the groups that have a layer in one group of `tied`: a weight that is stored once has one width."""
    made = list(groups)
    for together in tied:
        touched = [group for group in made if not set(together).isdisjoint(group)]
        made = [group for group in made if group not in touched]
        made.append(tuple(sorted(layer for group in touched for layer in group)))
    return sorted(made)
