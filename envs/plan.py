"""What is best to do with what is left, if the loss that every choice is predicted to add adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
        """Return the least loss that the decisions from one on add within what is left.

        Args:
            decision: The first of the decisions that are left.
            left: What is left of the budget, an array of any shape in the units of the plan's costs.

        Returns:
            Losses, same shape.
        """
        found: Array = self.values[decision][self.slack(decision, left)]
        return found

    def option(self, decision: int, left: Any) -> NDArray[np.int64]:
        """Return the option to take now for the least loss in the end.

        Args:
            decision: The decision.
            left: What is left of the budget, an array of any shape in the units of the plan's costs.

        Returns:
            Numbers of options, same shape.
        """
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

    def used_after(self, starts: NDArray[np.int64]) -> Array:
        """Tell the least of each limit, the peak of memory being the last, that is used in the end, as shares of them.

        It is asked about many starts at once, shape (n, first decisions), and answers in the shape (n, limits).
        """
        ...

    def possible_after(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell of many starts what `possible` tells of one, shape (n, options)."""
        ...

    def completes_surely(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of many starts certainly complete, shape (n,); of others `completes` tells."""
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

    def first(self, taken: Sequence[int], preference: Array) -> int:
        """Return the option of the next decision after which all budgets can still be met, and that is preferred.

        Args:
            taken: The options of the decisions before.
            preference: A number for every option; the least is preferred.

        Returns:
            The number of the option.

        Raises:
            ValueError: If no option leaves a policy that is within all budgets.
        """
        possible = self.programme.possible(taken)
        for option in np.argsort(preference, kind="stable").tolist():
            if possible[option] and self.programme.completes([*taken, option]):
                return int(option)
        raise ValueError(f"after the options {list(taken)} no policy is within all budgets")

    def firsts(self, taken: NDArray[np.int64], preferences: Array) -> NDArray[np.int64]:
        """Return what `first` does of many episodes.

        Args:
            taken: The options of the decisions before, shape (episodes, decisions).
            preferences: A number for every option of the next one, shape (episodes, options); the least is preferred.

        Returns:
            Options, shape (episodes,).
        """
        possible = self.programme.possible_after(taken)
        order = np.argsort(preferences, axis=1, kind="stable")
        place = np.take_along_axis(possible, order, axis=1).argmax(1)
        found: NDArray[np.int64] = np.take_along_axis(order, place[:, None], axis=1)
        sure = self.programme.completes_surely(np.concatenate([taken, found], axis=1))
        sure &= np.take_along_axis(possible, found, axis=1)[:, 0]
        for episode in np.flatnonzero(~sure):
            found[episode] = self.first(taken[episode].tolist(), preferences[episode])
        return found[:, 0]

    def plan(self, taken: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
        """Plan what follows, of many episodes.

        Args:
            taken: The options of the decisions before, shape (episodes, decisions).

        Returns:
            The options to take now (0 where nothing is left to decide), and about the least losses that are added from now
            on, each of shape (episodes,).
        """
        count, decision = taken.shape
        options, least = np.zeros(count, np.int64), np.zeros(count)
        if decision == len(self.losses):
            return options, least
        as_best = (taken == self.best[:decision]).all(1)
        options[as_best] = self.best[decision]
        rest = zip(self.losses[decision:], self.best[decision:], strict=True)
        least[as_best] = float(sum(loss[option] for loss, option in rest))
        others = taken[~as_best]
        if not len(others):
            return options, least
        left = self.totals - self.prices[:, np.arange(decision), others].sum(-1).T
        # What `Plan.slack` tells, of all at once; shape (episodes, surrogates).
        slack = np.clip((left - self.cheapest_from[:, decision]) / self.grains + 1e-9, 0, GRAIN).astype(int)
        after = np.maximum(slack[:, :, None] - self.steps[decision], 0)
        rest_of = self.values[decision + 1][self._rows[:, None], after].max(1)
        options[~as_best] = self.firsts(others, self.losses[decision] + rest_of)
        least[~as_best] = self.values[decision][self._rows, slack].max(1)
        return options, least
