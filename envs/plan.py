"""What is best to do with what is left, if the loss that every choice is predicted to add adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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

    def slack(self, decision: int, left: Any) -> NDArray[np.int64]:
        """Return the whole steps that the decisions from one on may spend beyond their cheapest options.

        Args:
            decision: Its index.
            left: What there is to spend, one amount or an array of any shape.

        Returns:
            Steps, of that shape.
        """
        left = np.asarray(left, float)
        if self.step <= 0:
            return np.zeros(left.shape, np.int64)
        steps: NDArray[np.int64] = np.clip((left - self.cheapest_from[decision]) / self.step + 1e-9, 0, GRAIN).astype(np.int64)
        return steps

    def least(self, decision: int, left: Any) -> Array:
        """Return the least loss that the decisions from one on add within what is left (any shape)."""
        found: Array = self.values[decision][self.slack(decision, left)]
        return found

    def option(self, decision: int, left: Any) -> NDArray[np.int64]:
        """Return the option to take now for the least loss in the end, for what is left (any shape)."""
        slack = self.slack(decision, left)[..., None]
        steps = self.steps[decision]
        rest = self.values[decision + 1][np.maximum(slack - steps, 0)]
        total = np.where(steps <= slack, self.losses[decision] + rest, np.inf)
        found: NDArray[np.int64] = total.argmin(-1)
        return found


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
        count = len(losses)
        surrogates = programme.surrogates(losses)
        self.prices = np.array([prices for prices, _ in surrogates])  # (surrogates, decisions, options)
        self.totals = np.array([total for _, total in surrogates])
        self.plans = []
        for prices, total in surrogates:
            rows = [row[: len(loss)] for row, loss in zip(prices, losses, strict=True)]
            self.plans.append(Plan(losses, rows, total))
        # Of each decision, by surrogate: the steps that its options take, and the least losses that follow.
        self.steps = [np.array([plan.steps[decision] for plan in self.plans]) for decision in range(count)]
        self.values = [np.array([plan.values[decision] for plan in self.plans]) for decision in range(count + 1)]
        self.cheapest_from = np.array([plan.cheapest_from for plan in self.plans])
        self.grains = np.array([plan.step or np.inf for plan in self.plans])
        self._rows = np.arange(len(self.plans))
        self._known: dict[tuple[int, ...], tuple[int, float]] = {}

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
        return self._plan(taken)[1]

    def option(self, taken: Sequence[int]) -> int:
        """Return the option to take now, after those that were taken."""
        return self._plan(taken)[0]

    def _plan(self, taken: Sequence[int]) -> tuple[int, float]:
        """Return the option to take now, and the least loss that is added from now on."""
        key = tuple(taken)
        if key not in self._known:
            if len(self._known) >= MOST_KEPT:
                self._known.clear()
            self._known[key] = self._planned(key)
        return self._known[key]

    def _planned(self, taken: tuple[int, ...]) -> tuple[int, float]:
        decision = len(taken)
        if decision == len(self.losses):
            return 0, 0.0
        if list(taken) == self.best[:decision]:
            rest = zip(self.losses[decision:], self.best[decision:], strict=True)
            return self.best[decision], float(sum(loss[option] for loss, option in rest))
        left = self.totals - self.prices[:, np.arange(decision), list(taken)].sum(1)
        # What `Plan.slack` tells, of all at once.
        slack = np.clip((left - self.cheapest_from[:, decision]) / self.grains + 1e-9, 0, GRAIN).astype(int)
        after = np.maximum(slack[:, None] - self.steps[decision], 0)
        rest_of = self.values[decision + 1][self._rows[:, None], after].max(0)
        option = self.first(taken, self.losses[decision] + rest_of)
        return option, float(self.values[decision][self._rows, slack].max())
