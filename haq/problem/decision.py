"""What is decided together: the layers, the pairs of bits that they may take, and what these cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Decision(NamedTuple):
    """Layers that take one pair of bits together, and what they may take."""

    layers: tuple[int, ...]  # in the order of the workload
    pairs: NDArray[np.int64]  # (options, 2): weight bits, activation bits
    prices: NDArray[np.float64]  # (options,) in the metric's unit

    def of(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take the options' entries of a table (8, 8); returns shape (options,)."""
        return table[self.pairs[:, 0] - 1, self.pairs[:, 1] - 1]
