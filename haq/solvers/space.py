"""The policies of a problem as rows of option numbers, many at a time: what they cost, what is known of them, and new ones.

An option vector has the number of an option for every decision of the problem; one that is decided already has one option, 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from envs.plan import Plan
from haq.problem.limits import ROUNDING
from haq.problem.problem import Problem
from haq.problem.programme import STEP
from hw_models.widths import places

Floats = NDArray[np.float64]
Options = NDArray[np.int64]  # (policies, decisions)
Flags = NDArray[np.bool_]

MOST_LOWERED = 50  # rounds, times the number of decisions, after which a draw that isn't within the budgets is given up
STILL = 4  # the same, without a decision that leads towards them


class Space:
    """What a problem lets one choose.

    Attributes:
        problem: The problem.
        counts: How many options every decision has.
        errors: The square root of the relative squared error that each option leaves of weights and of activations, from
            calibration, shape (decisions, options, 2).
        prices: What options cost by every limit that is a sum, shape (limits, decisions, options); infinite where a decision
            has fewer options.
    """

    def __init__(self, problem: Problem) -> None:
        """Lay out the options of a problem."""
        self.problem = problem
        decisions = problem.decisions
        self.counts = np.array([len(decision.pairs) for decision in decisions])
        most = int(self.counts.max())
        self.free = np.flatnonzero(self.counts > 1)
        self._pairs = np.zeros((len(decisions), most, 2), np.int64)
        self.errors = np.zeros((len(decisions), most, 2))
        for row, decision in enumerate(decisions):
            self._pairs[row, : self.counts[row]] = decision.pairs
            self.errors[row, : self.counts[row]] = self._errors_of(row, decision.pairs)
        self.there = np.arange(most) < self.counts[:, None]
        self._set_limits()
        pairs = self._pairs
        no_less: Flags = np.all(pairs[:, None, :] >= pairs[:, :, None], axis=-1)
        differs: Flags = np.any(pairs[:, None, :] != pairs[:, :, None], axis=-1)
        # Indexed [decision, option, other]: whether the other has more bits somewhere, and nowhere less.
        self._more = no_less & differs & self.there[:, None, :]
        self._number = [{(int(w), int(a)): i for i, (w, a) in enumerate(decision.pairs)} for decision in decisions]
        # Operands whose width makes a difference: the others would only be zeros in every distance.
        spans = np.ptp(np.where(self.there[..., None], self.errors, self.errors[:, :1]), axis=1)
        self._columns = np.argwhere(spans > 0)
        self._fixed = np.argwhere(spans <= 0)
        self._scale = max(float(self.errors[self.free].max(initial=0.0)), 1e-12)

    def _errors_of(self, decision: int, pairs: NDArray[np.int64]) -> Floats:
        """Return the roots of the errors of pairs of widths, shape (pairs, 2)."""
        where = places(pairs)
        table = self.problem.quantization_error[decision]
        return np.sqrt(np.maximum(np.stack([table[0, where[:, 0]], table[1, where[:, 1]]], axis=1), 0.0))

    def _set_limits(self) -> None:
        """Set prices and limits, of one budget or of several."""
        programme = self.problem.several
        self._peak = None
        if programme is not None:
            self.prices = programme.prices
            self.limits = programme.limits
            self._peak = programme.peak
            return
        self.prices = np.full((1, *self.there.shape), np.inf)
        for row, decision in enumerate(self.problem.decisions):
            self.prices[0, row, : self.counts[row]] = decision.prices
        self.limits = np.array([self.problem.limit])

    def policy(self, options: Sequence[int] | Options) -> Q.BitPolicy:
        """Make the policy of an option vector."""
        return self.problem.decide(
            decision.pairs[pick] for decision, pick in zip(self.problem.decisions, options, strict=True)
        )

    def options(self, policy: Q.BitPolicy) -> tuple[int, ...] | None:
        """Return the option vector of a policy; None if it takes a pair that isn't among the options."""
        w, a = self.problem.bit_arrays(policy)
        found = []
        for decision, numbers in zip(self.problem.decisions, self._number, strict=True):
            number = numbers.get((int(w[decision.layers[0]]), int(a[decision.layers[0]])))
            if number is None:
                return None
            found.append(number)
        return tuple(found)

    def features(self, options: Options) -> Floats:
        """Describe policies by the errors that their widths leave, shape (policies, features), from 0 to 1."""
        rows, operands = self._columns.T
        return self.errors[rows, options[:, rows], operands] / self._scale

    def features_of(self, policy: Q.BitPolicy) -> Floats:
        """Describe any policy of the network, one with pairs that aren't among the options too, shape (features,)."""
        w, a = self.problem.bit_arrays(policy)
        first = [decision.layers[0] for decision in self.problem.decisions]
        pairs = np.stack([w[first], a[first]], axis=1)
        errors = np.array([self._errors_of(row, pair[None])[0] for row, pair in enumerate(pairs)])
        return errors[self._columns[:, 0], self._columns[:, 1]] / self._scale

    def describes(self, policy: Q.BitPolicy) -> bool:
        """Tell whether the features of a policy of the network say all of it.

        Not if layers that are tied here have different widths, or an operand that can't be chosen here has another width.
        """
        pairs = np.stack(self.problem.bit_arrays(policy), axis=1)
        for decision in self.problem.decisions:
            if (pairs[list(decision.layers)] != pairs[decision.layers[0]]).any():
                return False
        first = [decision.layers[0] for decision in self.problem.decisions]
        errors = np.array([self._errors_of(row, pair[None])[0] for row, pair in enumerate(pairs[first])])
        rows, operands = self._fixed.T
        return bool((errors[rows, operands] == self.errors[rows, 0, operands]).all())

    def totals(self, options: Options) -> Floats:
        """Return what policies cost by every limit that is a sum, shape (policies, limits)."""
        return self.prices[:, np.arange(len(self.counts)), options].sum(-1).T

    def costs(self, options: Options) -> Floats:
        """Return what policies cost by the main metric, shape (policies,)."""
        return self.totals(options)[:, 0]

    def fits(self, options: Options) -> Flags:
        """Tell which policies are within all budgets, shape (policies,)."""
        within: Flags = np.all(self.totals(options) <= self.limits * (1 + ROUNDING), axis=1)
        if self._peak is not None:
            peak = self._peak
            widths = peak.widths[np.arange(len(self.counts)), options]
            read = np.where(peak.reads, widths[:, None], 0).max(2)
            within &= peak.moments(read).max(1) <= peak.limit * (1 + ROUNDING)
        return within

    def planned(self, losses: Sequence[Floats]) -> tuple[int, ...]:
        """Find the options with the least total loss within all budgets.

        Args:
            losses: What every option loses, by decision.

        Returns:
            An option vector. Within one budget it is optimal but for the grain of `envs.plan.Plan`.
        """
        if self.problem.several is not None:
            return tuple(self.problem.several.choose(losses))
        return self._within_one(losses, [decision.prices for decision in self.problem.decisions], self.problem.limit)

    def planned_quickly(self, losses: Sequence[Floats], draws: np.random.Generator) -> Options:
        """Find options with a small total loss within all budgets.

        Args:
            losses: What every option loses, by decision.
            draws: What is drawn from.

        Returns:
            One policy, shape (1, decisions). Within several budgets it is planned for a single one, their sum under random
            weights, and then brought within each; there may be none, shape (0, decisions).
        """
        if self.problem.several is None:
            return np.array([self.planned(losses)])
        weights = draws.random(len(self.limits))
        prices = np.tensordot(weights / self.limits, np.where(self.there, self.prices, 0.0), axes=1)
        rows = [row[:count] for row, count in zip(prices, self.counts, strict=True)]
        planned = np.array([self._within_one(losses, rows, float(weights.sum()))])
        return self.filled(self.lowered(planned, draws), draws)

    def _within_one(self, losses: Sequence[Floats], prices: Sequence[Floats], limit: float) -> tuple[int, ...]:
        """Plan within one budget of a sum."""
        plan = Plan(losses, prices, limit)
        left = limit
        chosen = []
        for row, price in enumerate(prices):
            option = int(plan.option(row, left))
            chosen.append(option)
            left -= float(price[option])
        return tuple(chosen)

    def losses(self, increases: Floats) -> list[Floats]:
        """Return what every option is predicted to lose, by decision.

        Args:
            increases: How much every pair of widths raises the loss, shape (decisions, 10, 10).
        """
        return [decision.of(table) for decision, table in zip(self.problem.decisions, increases, strict=True)]

    def drawn(self, count: int, draws: np.random.Generator) -> Options:
        """Draw policies, every option as likely as the others, whatever they cost."""
        return (draws.random((count, len(self.counts))) * self.counts).astype(np.int64)

    def random(self, count: int, draws: np.random.Generator) -> Options:
        """Draw policies that fill the budgets: so many, or fewer, but one at least."""
        found = self.lowered(self.drawn(count, draws), draws)
        if not len(found):
            # No decision alone led within the budgets: of all that fit, the one with the least sum of random numbers.
            found = np.array([self.planned([draws.random(size) for size in self.counts])])
        return self.filled(found, draws)

    def changed(self, options: Options, changes: NDArray[np.int64], draws: np.random.Generator) -> Options:
        """Draw the options of some decisions anew.

        Args:
            options: Policies.
            changes: How many decisions of each policy are drawn anew.
            draws: What is drawn from.

        Returns:
            Policies, whatever they cost.
        """
        places_of = draws.random((len(options), len(self.free))).argsort(1).argsort(1)
        anew = np.zeros(options.shape, bool)
        anew[:, self.free] = places_of < changes[:, None]
        return np.where(anew, self.drawn(len(options), draws), options)

    def lowered(self, options: Options, draws: np.random.Generator) -> Options:
        """Lower random decisions until all budgets hold.

        Args:
            options: Policies.
            draws: What is drawn from.

        Returns:
            Those that could be brought within the budgets in that way, perhaps fewer.
        """
        options = options.copy()
        over = np.flatnonzero(~self.fits(options))
        still = np.zeros(len(options), np.int64)  # rounds since a policy was last lowered
        stuck = np.zeros(len(options), bool)
        for _ in range(MOST_LOWERED * len(self.free)):
            if not len(over):
                break
            rows = options[over]
            decision = self.free[draws.integers(len(self.free), size=len(over))]
            excess = self._excess(rows, decision)
            now = np.take_along_axis(excess, rows[np.arange(len(rows)), decision][:, None], 1)
            closer = (excess < now - STEP) & self.there[decision]
            picked = _picked(closer, draws)
            moved = picked >= 0
            options[over[moved], decision[moved]] = picked[moved]
            still[over] += 1
            still[over[moved]] = 0
            # Within several budgets there may be no single decision that leads towards them.
            stuck[over] = still[over] > STILL * len(self.free)
            over = over[~self.fits(options[over]) & ~stuck[over]]
        stuck[over] = True
        return options[~stuck]

    def filled(self, options: Options, draws: np.random.Generator) -> Options:
        """Fill the budgets: in random order, decisions get more bits as far as what is left of all of them allows.

        First any that fit, so that every policy that fills the budget can be met; then the dearest.

        Args:
            options: Policies within the budgets.
            draws: What is drawn from.

        Returns:
            As many.
        """
        options = options.copy()
        every = np.arange(len(options))
        for dearest in (False, True):
            order = self.free[draws.random((len(options), len(self.free))).argsort(1)]
            for step in range(len(self.free)):
                decision = order[:, step]
                fitting = self._room(options, decision) & self._more[decision, options[every, decision]]
                if dearest:
                    prices = np.where(fitting, self.prices[0, decision], -np.inf)
                    picked = np.where(fitting.any(1), prices.argmax(1), -1)
                else:
                    picked = _picked(fitting, draws)
                moved = picked >= 0
                options[every[moved], decision[moved]] = picked[moved]
        return options

    def _instead(self, options: Options, decision: NDArray[np.int64]) -> Floats:
        """Return totals with each option of one decision per policy, all others taking theirs: (limits, policies, options)."""
        every = np.arange(len(options))
        prices = self.prices[:, decision]
        now = prices[:, every, options[every, decision]]
        found: Floats = (self.totals(options).T - now)[:, :, None] + prices
        return found

    def _peaks(self, options: Options, decision: NDArray[np.int64]) -> Floats:
        """Return the peak of memory with each option of one decision per policy, all others taking theirs."""
        peak = self._peak
        assert peak is not None
        columns = np.arange(len(self.counts))
        widths = np.repeat(peak.widths[columns, options][:, None], self.there.shape[1], axis=1)
        widths[np.arange(len(options)), :, decision] = peak.widths[decision]
        read = np.where(peak.reads, widths[:, :, None], 0).max(3)
        return peak.moments(read).max(2).astype(float)

    def _room(self, options: Options, decision: NDArray[np.int64]) -> Flags:
        """Tell which options of one decision per policy fit, all others taking theirs, shape (policies, options)."""
        fits: Flags = np.all(self._instead(options, decision) <= (self.limits * (1 + ROUNDING))[:, None, None], axis=0)
        if self._peak is not None:
            fits &= self._peaks(options, decision) <= self._peak.limit * (1 + ROUNDING)
        return fits

    def _excess(self, options: Options, decision: NDArray[np.int64]) -> Floats:
        """Tell by how much limits are exceeded, in parts of them, with each option of one decision per policy."""
        parts = self._instead(options, decision) / self.limits[:, None, None] - 1
        found: Floats = np.where(parts > ROUNDING, parts, 0.0).sum(0)
        if self._peak is not None:
            parts = self._peaks(options, decision) / self._peak.limit - 1
            found += np.where(parts > ROUNDING, parts, 0.0)
        return found


def _picked(among: Flags, draws: np.random.Generator) -> NDArray[np.int64]:
    """Draw one true entry of every row, -1 where there is none."""
    scores = np.where(among, draws.random(among.shape), -1.0)
    return np.where(among.any(1), scores.argmax(1), -1)
