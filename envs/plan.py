"""What is best to do with what is left, if the loss that every choice is predicted to add adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRAIN = 8192  # steps that the slack is divided into
MOST_KEPT = 50_000  # plans that are remembered


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


class Programme(Protocol):
    """What there is to know of several budgets; `haq.Problem.several` has it."""

    def choose(self, losses: Sequence[Array]) -> list[int]:
        """Find the options with the least total loss within all limits."""
        ...

    def possible(self, start: Sequence[int]) -> NDArray[np.bool_]:
        """Tell which options of the next decision are not out of the question, shape (options,)."""
        ...

    def completes(self, start: Sequence[int]) -> bool:
        """Say whether the decisions that follow can be chosen so that all limits hold."""
        ...

    def used(self, start: Sequence[int]) -> Array:
        """Tell the least of each limit, the peak of memory being the last, that is used in the end, as shares of them."""
        ...

    def fits(self, options: Sequence[int]) -> bool:
        """Say whether an option for every decision is within all limits."""
        ...

    def excess(self, options: Sequence[int], decision: int) -> Array:
        """Tell by how much limits are exceeded with each option of a decision, all others taking theirs."""
        ...

    def surrogates(self, losses: Sequence[Array]) -> list[tuple[Array, float]]:
        """Return single budgets, prices (decisions, options) and a limit, that whatever fits all limits keeps as well."""
        ...


class PlanWithin:
    """The same within several budgets, whose state is the options that were taken so far.

    As long as these are those of the best policy (`Programme.choose`, exact), the plan is to go on with it. Beside it, the
    loss of what follows is taken from the plans for single budgets that stand in for the several (`Programme.surrogates`),
    the largest of them; and of the options after which all budgets can still be met the one is taken for which it is least.
    """

    def __init__(self, losses: Sequence[Array], programme: Programme) -> None:
        """Plan for the best policy, and for every single budget.

        Args:
            losses: For each decision, what its options are predicted to add to the loss, shape (options,).
            programme: The budgets; some policy meets them all.
        """
        self.programme = programme
        self.losses = losses
        self.best = programme.choose(losses)
        self.surrogates = programme.surrogates(losses)
        counts = [len(loss) for loss in losses]
        self.plans = []
        for prices, limit in self.surrogates:
            rows = [row[:count] for row, count in zip(prices, counts, strict=True)]
            self.plans.append(Plan(losses, rows, limit))
        self._options: dict[tuple[int, ...], int] = {}

    def first(self, taken: Sequence[int], preference: Array) -> int:
        """Return the option of the next decision after which all budgets can still be met, and that is preferred.

        Args:
            taken: The options of the decisions before.
            preference: A number for every option; the least is preferred.
        """
        possible = self.programme.possible(taken)
        for option in np.argsort(preference, kind="stable").tolist():
            if possible[option] and self.programme.completes([*taken, option]):
                return int(option)
        raise ValueError(f"after the options {list(taken)} no policy is within all budgets")

    def least(self, taken: Sequence[int]) -> float:
        """Return about the least loss that the decisions that follow add."""
        decision = len(taken)
        if list(taken) == self.best[:decision]:
            return float(sum(loss[option] for loss, option in list(zip(self.losses, self.best, strict=True))[decision:]))
        return max(plan.least(decision, left) for plan, left in zip(self.plans, self._left(taken), strict=True))

    def option(self, taken: Sequence[int]) -> int:
        """Return the option to take now, after those that were taken."""
        key = tuple(taken)
        if key not in self._options:
            if len(self._options) >= MOST_KEPT:
                self._options.clear()
            self._options[key] = self._option(taken)
        return self._options[key]

    def _option(self, taken: Sequence[int]) -> int:
        decision = len(taken)
        if list(taken) == self.best[:decision]:
            return self.best[decision]
        rest = np.zeros(len(self.losses[decision]))
        for plan, left in zip(self.plans, self._left(taken), strict=True):
            steps = plan.steps[decision]
            rest = np.maximum(rest, plan.values[decision + 1][np.maximum(plan.slack(decision, left) - steps, 0)])
        return self.first(taken, self.losses[decision] + rest)

    def _left(self, taken: Sequence[int]) -> list[float]:
        """Tell what is left of every single budget."""
        rows = np.arange(len(taken))
        options = list(taken)
        return [limit - float(prices[rows, options].sum()) for prices, limit in self.surrogates]
