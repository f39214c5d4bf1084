"""What is best to do with what is left, if the loss that every choice is predicted to add adds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRAIN = 8192  # steps that the slack is divided into


class Plan:
    """Options with the least predicted loss for the decisions from any one on, within any amount.

    Found by dynamic programming. What a choice costs beyond the decision's cheapest is rounded up to 1 / 8192 of what `total`
    leaves beyond the cheapest everywhere, so that a plan never costs more than there is.
    """

    def __init__(self, losses: Sequence[Array], prices: Sequence[Array], total: float) -> None:
        """Plan for every amount at once.

        Args:
            losses: For each decision, what its options are predicted to add to the loss, shape (options,).
            prices: For each decision, what its options cost, shape (options,).
            total: What all decisions together may cost.
        """
        cheapest = np.array([price.min() for price in prices])
        # cheapest_from[i]: the least that the decisions from i on cost.
        self.cheapest_from = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)
        self.step = max(total - self.cheapest_from[0], 0.0) / GRAIN
        # A billionth of a step is rounding, not cost.
        unit = self.step
        if unit <= 0:
            unit = 1e-30
        self.losses = losses
        self.steps = [np.ceil((price - price.min()) / unit - 1e-9).clip(0, GRAIN + 1).astype(int) for price in prices]
        # values[i][s]: the least loss of the decisions from i on with s steps of slack left.
        self.values = [np.zeros(GRAIN + 1)]
        for loss, steps in zip(reversed(losses), reversed(self.steps), strict=True):
            after = self.values[0]
            best = np.full(GRAIN + 1, np.inf)
            for option, count in enumerate(steps):
                if count <= GRAIN:
                    reached = loss[option] + after[: GRAIN + 1 - count]
                    np.minimum(best[count:], reached, out=best[count:])
            self.values.insert(0, best)

    def slack(self, decision: int, left: float) -> int:
        """Return the whole steps that the decisions from one on may spend beyond their cheapest options."""
        if self.step <= 0:
            return 0
        spare = left - self.cheapest_from[decision]
        return int(np.clip(spare / self.step + 1e-9, 0, GRAIN))

    def least(self, decision: int, left: float) -> float:
        """Return the least loss that the decisions from one on add within what is left."""
        return float(self.values[decision][self.slack(decision, left)])

    def option(self, decision: int, left: float) -> int:
        """Return the option to take now for the least loss in the end."""
        slack = self.slack(decision, left)
        steps = self.steps[decision]
        rest = self.values[decision + 1][np.maximum(slack - steps, 0)]
        total = np.where(steps <= slack, self.losses[decision] + rest, np.inf)
        return int(total.argmin())
