"""Several budgets at once, as an exact integer programme: what fits all of them, what is best, and which ones conflict."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, eye_array, kron, vstack

from haq.problem.decision import Decision
from haq.problem.limits import ROUNDING
from haq.problem.peak import FLOAT_BITS, PeakOfDecisions, padded
from haq.problem.stock import Stock

SCALE = 1e4  # HiGHS works to absolute tolerances near 1e-7: numbers of this size make them harmless
TIGHTER = 0.75
STEP = 1e-9  # in parts of a limit: what is nearer by less may be so by rounding alone, and would lead in a circle
MOST_KEPT = 50_000  # answers that are remembered

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Sums = Sequence[tuple[Floats, float]]  # what every option costs, and the limit of the total cost


class Conflict(NamedTuple):
    """Limits that can't be met together, and the least that each could be within the others of them."""

    limits: tuple[int, ...]  # in the order in which they were given; the peak comes last
    least: tuple[float, ...]


class Programme:
    """What decisions can take within all limits at once. Every answer is exact, but for rounding.

    Attributes:
        prices: What every option costs, shape (limits, decisions, options); infinite where a decision has fewer options.
        limits: Of the total costs, shape (limits,).
        peak: The limit of the peak of memory, or None.
    """

    def __init__(self, decisions: Sequence[Decision], limits: Sequence[float], peak: PeakOfDecisions | None = None) -> None:
        """Prepare the programme.

        Args:
            decisions: What there is to decide; `prices` belong to the first limit, `others` to those that follow.
            limits: Of the total costs, one at least.
            peak: The limit of the peak of memory; its widths are those of the decisions.
        """
        self.limits = np.asarray(limits, float)
        self.peak = peak
        self.counts = [len(decision.pairs) for decision in decisions]
        self.prices = np.full((len(limits), len(decisions), max(self.counts)), np.inf)
        for row, decision in enumerate(decisions):
            self.prices[0, row, : self.counts[row]] = decision.prices
            if len(limits) > 1:
                self.prices[1:, row, : self.counts[row]] = decision.others
        self._ceilings = self.limits * (1 + 0.9 * ROUNDING)
        self._available = np.isfinite(self.prices[0])
        self._answers: dict[tuple[int, ...], tuple[int, ...] | None] = {}

    def totals(self, options: Sequence[int]) -> Floats:
        """Return what the first decisions cost together if they take these options, shape (limits,)."""
        return self.prices[:, np.arange(len(options)), np.asarray(options, int)].sum(1)

    def fits(self, options: Sequence[int]) -> bool:
        """Say whether an option for every decision is within all limits, but for rounding."""
        if (self.totals(options) > self.limits * (1 + ROUNDING)).any():
            return False
        return self.peak is None or self.peak.amount(options) <= self.peak.limit * (1 + ROUNDING)

    def feasible(self, start: Sequence[int] = ()) -> list[int] | None:
        """Find an option for every decision that fits, the first ones being given; None if there is none."""
        return self.best(np.zeros(self._available.shape), start)

    def best(self, losses: Any, start: Sequence[int] = (), beside: Sequence[Sequence[int]] = ()) -> list[int] | None:
        """Find the options with the least total loss that fit.

        Args:
            losses: What every option loses, by decision: arrays (options,), or one array (decisions, options).
            start: The options that the first decisions take.
            beside: Options of all decisions that are not to be found again. What is found beside them has no option that is
                worse than another one of its decision in every respect.

        Returns:
            An option for every decision; None if nothing fits.
        """
        table = padded([np.asarray(row, float)[:count] for row, count in zip(losses, self.counts, strict=True)], np.inf)
        available = self._open(start) & np.isfinite(table)
        if not available.any(1).all():
            return None
        available &= self._worth(table, available)
        if (available.sum(1) == 1).all():
            # What is left is the cheapest in every respect, and the best.
            options: list[int] = available.argmax(1).tolist()
        else:
            sums = [(cost, float(limit)) for cost, limit in zip(self.prices, self._ceilings, strict=True)]
            found = minimise(table, available, sums, peak=self.peak, beside=beside)
            if found is None:
                return None
            options = found.tolist()
        if not self.fits(options) or options in [list(one) for one in beside]:
            return None
        return options

    def choose(self, losses: Any) -> list[int]:
        """Return what `best` does. Raises ValueError where nothing is within all limits."""
        found = self.best(losses)
        if found is None:
            raise ValueError("no policy is within all budgets")
        return found

    def least(self, limit: int, within: Sequence[int] = ()) -> float:
        """Find the least that a limit's amount can be.

        Args:
            limit: Its index; `len(limits)` is the peak of memory.
            within: Indices of the limits that hold.

        Returns:
            The amount; infinity if those limits can't be met.
        """
        peak = None
        if self.peak is not None and len(self.limits) in within:
            peak = self.peak
        sums = [(self.prices[index], float(self._ceilings[index])) for index in within if index < len(self.limits)]
        if limit < len(self.limits):
            found = minimise(self.prices[limit], self._available, sums, peak=peak)
            if found is None:
                return float(np.inf)
            return float(self.totals(found.tolist())[limit])
        assert self.peak is not None
        found = minimise(np.zeros(self._available.shape), self._available, sums, peak=self.peak, of_peak=True)
        if found is None:
            return float(np.inf)
        return self.peak.amount(found.tolist())

    def room(self, options: Sequence[int], decision: int) -> Flags:
        """Tell which options of a decision fit, all others taking theirs, shape (options,)."""
        fits: Flags = np.all(self._totals_instead(options, decision) <= self.limits[:, None] * (1 + ROUNDING), axis=0)
        if self.peak is not None:
            fits &= self._held_instead(options, decision).max(1) <= self.peak.limit * (1 + ROUNDING)
        return fits

    def rooms(self, options: Sequence[int], wanted: Flags) -> Flags:
        """Tell which of the wanted options fit, each instead of its decision's own, shape (decisions, options)."""
        rows = np.arange(len(options))
        rest = self.totals(options)[:, None] - self.prices[:, rows, np.asarray(options, int)]
        fits: Flags = np.all(rest[:, :, None] + self.prices <= self.limits[:, None, None] * (1 + ROUNDING), axis=0)
        fits &= wanted
        if self.peak is not None:
            for decision in np.flatnonzero(fits.any(1)).tolist():
                fits[decision, : self.counts[decision]] &= self.room(options, decision)
        return fits

    def excesses(self, options: Sequence[int]) -> Floats:
        """Tell what `excess` does of all decisions, shape (decisions, options); infinite where there is no option."""
        if self.peak is None:
            rows = np.arange(len(options))
            rest = self.totals(options)[:, None] - self.prices[:, rows, np.asarray(options, int)]
            parts = (rest[:, :, None] + self.prices) / self.limits[:, None, None] - 1
            found: Floats = np.where(parts > ROUNDING, parts, 0.0).sum(0)
            return np.where(self._available, found, np.inf)
        return padded([self.excess(options, decision) for decision in range(len(options))], np.inf)

    def excess(self, options: Sequence[int], decision: int) -> Floats:
        """Tell by how much limits are exceeded with each option of a decision, all others taking theirs, shape (options,).

        That is the sum over the limits of what exceeds them, in parts of them; 0 where all hold. For the peak it is the sum
        over the moments. What counts there is half what the widest reader of a buffer asks for and half what all of them do
        on average: to narrow one of two readers is a step, though the buffer is as large as before.
        """
        parts = self._totals_instead(options, decision) / self.limits[:, None] - 1
        found: Floats = np.where(parts > ROUNDING, parts, 0.0).sum(0)
        if self.peak is not None:
            held, limit = self._held_instead(options, decision), self.peak.limit
            over = held > limit * (1 + ROUNDING)
            if over.any():
                found += np.where(over, held - limit + self._asked_instead(options, decision), 0.0).sum(1) / limit
        return found

    def _totals_instead(self, options: Sequence[int], decision: int) -> Floats:
        """Return the totals with each option of a decision, all others taking theirs, shape (limits, options)."""
        prices = self.prices[:, decision, : self.counts[decision]]
        found: Floats = (self.totals(options) - prices[:, options[decision]])[:, None] + prices
        return found

    def _held_instead(self, options: Sequence[int], decision: int) -> Floats:
        """Return the bytes at every moment with each option of a decision, shape (options, moments)."""
        peak = self.peak
        assert peak is not None
        # Only the buffers that the decision reads are other ones.
        now, touched, read = self._read_instead(options, decision)
        widest = now.max(1)
        before = peak.sizes(widest)
        instead = np.repeat(widest[None], len(read), axis=0)
        instead[:, touched] = read.max(2)
        change = peak.sizes(instead)[:, touched] - before[touched]
        alive = peak.alive.T.astype(np.int64)
        return (before @ alive + change @ alive[touched]).astype(float)

    def _asked_instead(self, options: Sequence[int], decision: int) -> Floats:
        """Return the same with buffers as large as their readers ask for on average."""
        peak = self.peak
        assert peak is not None
        now, touched, read = self._read_instead(options, decision)
        together = np.repeat(now.sum(1)[None], len(read), axis=0)
        together[:, touched] = read.sum(2)
        found: Floats = (peak.elements * together / (8 * np.maximum(peak.reads.sum(1), 1))) @ peak.alive.T
        return found

    def _read_instead(
        self, options: Sequence[int], decision: int
    ) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.int64]]:
        """Tell with which bits buffers are read, now and with each option of a decision.

        Returns:
            The bits of every reader now, shape (buffers, decisions), 0 for one that doesn't read it; the buffers that the
            decision reads; and the bits of their readers with each option, shape (options, these, decisions).
        """
        peak = self.peak
        assert peak is not None
        taken = peak.widths[np.arange(len(options)), np.asarray(options, int)]
        now: NDArray[np.int64] = np.where(peak.reads, taken, 0)
        touched = np.flatnonzero(peak.reads[:, decision])
        read = np.repeat(now[touched][None], self.counts[decision], axis=0)
        read[:, :, decision] = peak.widths[decision, : self.counts[decision], None]
        return now, touched, read

    def used(self, start: Sequence[int]) -> Floats:
        """Tell the least of each limit that is used in the end if the first decisions take these options, as shares of them.

        The peak of memory comes last.
        """
        return self._stock.used(tuple(start))

    def possible(self, start: Sequence[int]) -> Flags:
        """Tell which options of the next decision simple bounds leave possible, shape (options,); `completes` is exact."""
        decision = len(start)
        return self._stock.possible(tuple(start))[: self.counts[decision]]

    def completes(self, start: Sequence[int]) -> bool:
        """Say whether the decisions that follow can be chosen so that all limits hold."""
        return self.completion(start) is not None

    def used_after(self, starts: NDArray[np.int64]) -> Floats:
        """Tell of many starts, shape (n, first decisions), what `used` tells of one; shape (n, limits)."""
        return self._stock.used_after(starts)

    def possible_after(self, starts: NDArray[np.int64]) -> Flags:
        """Tell of many starts, shape (n, first decisions), what `possible` tells of one; shape (n, options)."""
        return self._stock.possible_after(starts)[:, : self.counts[starts.shape[1]]]

    def completes_surely(self, starts: NDArray[np.int64]) -> Flags:
        """Tell which of many starts, shape (n, first decisions), simple bounds show to complete; of others see `completes`."""
        return self._stock.completes_after(starts)

    def completion(self, start: Sequence[int]) -> tuple[int, ...] | None:
        """Find an option for every decision that fits, the first ones being given; None if there is none.

        It answers as `feasible` does, and remembers. Most answers come from simple bounds, and from what was found before.
        """
        key = tuple(start)
        if key in self._answers:
            return self._answers[key]
        found = None
        before = self._answers.get(key[:-1])
        if key and before is not None and before[len(key) - 1] == key[-1]:
            found = before
        elif not key or self._stock.possible(key[:-1])[key[-1]]:
            found = self._stock.complete(key)
            if found is None:
                found, impossible = self._stock.search(key)
                if found is None and not impossible:
                    found = self._exactly(key)
                if found is not None:
                    self._stock.keep(found)
        if len(self._answers) >= MOST_KEPT:
            self._answers.clear()
        self._answers[key] = found
        return found

    def conflict(self) -> Conflict | None:
        """Find the fewest limits that can't be met together; None if all of them can."""
        if self.feasible() is not None:
            return None
        amounts = [*self.limits.tolist()]
        if self.peak is not None:
            amounts.append(self.peak.limit)
        for size in range(1, len(amounts) + 1):
            for chosen in itertools.combinations(range(len(amounts)), size):
                others = chosen[1:]
                if self.least(chosen[0], others) > amounts[chosen[0]] * (1 + ROUNDING):
                    least = [self.least(one, [other for other in chosen if other != one]) for one in chosen]
                    return Conflict(chosen, tuple(least))
        return Conflict(tuple(range(len(amounts))), tuple(self.least(one) for one in range(len(amounts))))

    def surrogates(self, losses: Any) -> list[tuple[Floats, float]]:
        """Return single budgets that whatever fits all limits keeps as well.

        They are the limits of sums themselves, and limits weighted by their multipliers in the linear relaxation (Glover,
        "Surrogate constraints", Operations Research 1968): the tightest for these losses, and those that are so where more of
        one limit is used up than of the others.

        Args:
            losses: What every option loses, by decision.

        Returns:
            For each what the options cost, shape (decisions, options), and the limit of the total; both in parts of a limit.
        """
        table = padded([np.asarray(row, float)[:count] for row, count in zip(losses, self.counts, strict=True)], np.inf)
        found = [
            (prices / limit, float(ceiling / limit))
            for prices, limit, ceiling in zip(self.prices, self.limits, self._ceilings, strict=True)
        ]
        sums = [(cost, float(limit)) for cost, limit in zip(self.prices, self._ceilings, strict=True)]
        for tightened in (None, *range(len(sums))):
            relaxed = relaxation(table, self._available & np.isfinite(table), sums, self.peak, tightened)
            if relaxed is not None:
                found.append(relaxed)
        return found

    def _exactly(self, start: tuple[int, ...]) -> tuple[int, ...] | None:
        options = self.feasible(start)
        if options is None:
            return None
        return tuple(options)

    @cached_property
    def _stock(self) -> Stock:
        return Stock(self.prices, self._ceilings, self.peak)

    def _open(self, start: Sequence[int]) -> Flags:
        """Tell which options may still be taken after the first decisions took theirs, shape (decisions, options)."""
        available = self._available.copy()
        count = len(start)
        available[:count] = False
        available[np.arange(count), np.asarray(start, int)] = True
        return available

    def _worth(self, losses: Floats, available: Flags) -> Flags:
        """Leave out options beside which another one of their decision is no worse in any respect."""
        respects = [losses, *self.prices]
        if self.peak is not None:
            # What a decision reads is no smaller at more bits.
            reads: Flags = np.any(self.peak.reads, axis=0)
            respects.append(np.where(reads[:, None], self.peak.widths, 0).astype(float))
        values: Floats = np.where(available, np.array(respects), np.inf)
        # Indexed [decision, option, other option].
        no_worse: Flags = np.all(values[:, :, :, None] <= values[:, :, None, :], axis=0)
        better = no_worse & ~no_worse.transpose(0, 2, 1)
        # Of options that are alike in all respects the first stays.
        first = no_worse & np.triu(np.ones(available.shape[1:] * 2, bool), 1)
        beaten: Flags = np.any((better | first) & available[:, :, None], axis=1)
        return ~beaten


def minimise(
    losses: Floats,
    available: Flags,
    limits: Sums,
    *,
    peak: PeakOfDecisions | None = None,
    tied: Sequence[Sequence[int]] = (),
    of_peak: bool = False,
    beside: Sequence[Sequence[int]] = (),
) -> NDArray[np.int64] | None:
    """Choose one option per row with the least total loss within limits, proven optimal.

    Args:
        losses: What every option loses, shape (rows, options).
        available: Which options may be taken, same shape; one in every row at least.
        limits: What every option costs, same shape, and the limit of the total; each is kept to about 1e-11 of it.
        peak: A limit of the peak of memory.
        tied: Groups of rows that must take the same option.
        of_peak: Make the peak of memory as small as it can be, whatever its limit, instead of losses.
        beside: Options of all rows that are not to be found again.

    Returns:
        Option indices, shape (rows,); None if nothing fits.

    Raises:
        RuntimeError: If HiGHS finds neither a solution nor a proof that there is none.
    """
    rows, options = losses.shape
    equal, within, held = _constraints(available, limits, peak, tied, of_peak)
    within += _others(beside, available, held)
    goal = np.append(_goal(losses, available).ravel(), np.zeros(held))
    if of_peak:
        goal[-1] = 1.0
    upper = np.append(available.ravel().astype(float), np.full(held, np.inf))
    integrality = np.append(np.ones(rows * options), np.zeros(held))
    with silent():
        result: Any = milp(
            goal,
            integrality=integrality,
            bounds=Bounds(0, upper),
            constraints=[*equal, *within],
            options={"mip_rel_gap": 0.0},
        )
    # Presolve may tell no more than that it is infeasible or unbounded, which losses from 0 up are not.
    if result.status == 2 or (result.status == 4 and "nfeasible" in result.message):
        return None
    if result.status != 0:
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    chosen: NDArray[np.int64] = result.x[: rows * options].reshape(rows, options).argmax(1)
    return chosen


def relaxation(
    losses: Floats, available: Flags, limits: Sums, peak: PeakOfDecisions | None, tightened: int | None = None
) -> tuple[Floats, float] | None:
    """Weigh limits by their multipliers in the linear relaxation of `minimise`, so that they become one.

    Args:
        losses: What every option loses, shape (rows, options).
        available: Which options may be taken, same shape.
        limits: What every option costs, same shape, and the limit of the total.
        peak: A limit of the peak of memory.
        tightened: Take the multipliers that there are where this one of the limits is tighter than it is.

    Returns:
        What every option costs by that one limit, shape (rows, options), and the limit; None if no limit binds, or nothing
        fits.
    """
    equal, within, held = _constraints(available, limits, peak, (), False)
    goal = np.append(_goal(losses, available).ravel(), np.zeros(held))
    upper = np.append(available.ravel().astype(float), np.full(held, np.inf))
    matrix = csr_array(vstack([csr_array(one.A) for one in within]))
    most = np.concatenate([np.atleast_1d(one.ub) * np.ones(csr_array(one.A).shape[0]) for one in within])
    within_reach = most.copy()
    if tightened is not None:
        within_reach[tightened] *= TIGHTER
    with silent():
        result = linprog(
            goal,
            A_ub=matrix,
            b_ub=within_reach,
            A_eq=csr_array(equal[0].A),
            b_eq=np.ones(len(losses)),
            bounds=np.stack([np.zeros(len(upper)), upper], axis=1),
        )
    if result.status != 0:
        return None
    multipliers = np.maximum(-result.ineqlin.marginals, 0.0)
    limit = float(multipliers @ most)
    if limit <= 0:
        return None
    # What a buffer takes is at least what its readers ask for, so these can stand in its place.
    prices = (matrix.T @ multipliers)[: losses.size].reshape(losses.shape)
    return np.where(available, prices / limit, np.inf), 1.0


def _constraints(
    available: Flags, limits: Sums, peak: PeakOfDecisions | None, tied: Sequence[Sequence[int]], of_peak: bool
) -> tuple[list[LinearConstraint], list[LinearConstraint], int]:
    """Write down what holds; see `minimise`.

    Args:
        available: Which options may be taken.
        limits: Of totals.
        peak: A limit of the peak of memory.
        tied: Groups of rows that must take the same option.
        of_peak: Whether that limit is a variable.

    Returns:
        Equations, inequalities, and how many variables there are beside those of the options.
    """
    rows, options = available.shape
    equal = _structure(rows, options, tied)
    within = [_sum(costs, limit, available) for costs, limit in limits]
    if peak is None:
        return equal, within, 0
    memory, held = _memory(peak, of_peak)
    equal = [_widened(one, held) for one in equal]
    return equal, [*(_widened(one, held) for one in within), *memory], held


def _others(beside: Sequence[Sequence[int]], available: Flags, held: int) -> list[LinearConstraint]:
    """Say that a solution differs from given ones (Balas and Jeroslow, "Canonical cuts on the unit hypercube", 1972).

    Args:
        beside: An option for every row each.
        available: Which options may be taken.
        held: How many variables there are beside those of the options.

    Returns:
        A constraint for all of them.
    """
    rows, options = available.shape
    if not beside:
        return []
    cuts = np.zeros((len(beside), rows * options + held))
    for cut, chosen in zip(cuts, beside, strict=True):
        cut[np.arange(rows) * options + np.asarray(chosen, int)] = 1
    return [LinearConstraint(csr_array(cuts), -np.inf, rows - 1)]


def _goal(losses: Floats, available: Flags) -> Floats:
    """Scale losses, of which only differences within a row matter, to numbers that suit HiGHS."""
    goal = np.where(available, losses, 0.0)
    goal -= np.where(available, losses, np.inf).min(1, keepdims=True)
    goal = np.where(available, goal, 0.0)
    return SCALE * (goal / (goal.max() or 1.0))


def _sum(costs: Floats, limit: float, available: Flags) -> LinearConstraint:
    """Say that what the options cost together is within a limit."""
    prices = np.where(available, costs, 0.0)
    unit = np.abs(prices).max() or 1.0
    prices = prices / unit
    # No sum of prices exceeds the number of rows, so a larger limit is no limit.
    ceiling = min(limit, unit * len(costs)) / unit
    grain = SCALE / max(abs(ceiling), 1e-9)
    return LinearConstraint(csr_array(prices.ravel()[None] * grain), -np.inf, ceiling * grain)


def _structure(rows: int, options: int, tied: Sequence[Sequence[int]]) -> list[LinearConstraint]:
    """Say that every row takes one option, and tied ones the same."""
    one_each = csr_array(kron(eye_array(rows), np.ones((1, options))))
    alike = []
    for group in tied:
        for other in group[1:]:
            for option in range(options):
                # x[first, option] - x[other, option] = 0
                row = np.zeros(rows * options)
                row[group[0] * options + option] = 1
                row[other * options + option] = -1
                alike.append(csr_array(row[None]))
    if not alike:
        return [LinearConstraint(one_each, 1, 1)]
    return [LinearConstraint(one_each, 1, 1), LinearConstraint(vstack(alike), 0, 0)]


def _memory(peak: PeakOfDecisions, of_peak: bool) -> tuple[list[LinearConstraint], int]:
    """Say what buffers take, and that those held together are within the limit.

    A variable for each buffer is at least the size that each reader's option asks for; at every moment the sum over what is
    alive is within the limit. Sizes are in parts of it.

    Args:
        peak: The limit.
        of_peak: Whether the limit is one more variable, the last, instead.

    Returns:
        The constraints, and how many variables there are beside those of the options.
    """
    rows, options = peak.widths.shape
    buffers = len(peak.elements)
    held = buffers + int(of_peak)
    unit = peak.limit / SCALE
    if of_peak:
        unit = float(peak.sizes(np.full(buffers, FLOAT_BITS)).sum()) / SCALE
    sized = []
    for buffer in range(buffers):
        for reader in np.flatnonzero(peak.reads[buffer]):
            # size of the option - buffer <= 0
            row = np.zeros(rows * options + held)
            sizes = -(-peak.elements[buffer] * peak.widths[reader] // 8)
            row[reader * options : (reader + 1) * options] = sizes / unit
            row[rows * options + buffer] = -1
            sized.append(csr_array(row[None]))
    unread = ~peak.reads.any(1)
    constant = np.where(unread, peak.sizes(np.zeros(buffers, np.int64)), 0) / unit
    together = np.zeros((len(peak.alive), rows * options + held))
    together[:, rows * options : rows * options + buffers] = peak.alive & ~unread
    limit = SCALE
    if of_peak:
        together[:, -1] = -1
        limit = 0.0
    moments = LinearConstraint(csr_array(together), -np.inf, limit * (1 + 0.9 * ROUNDING) - peak.alive @ constant)
    if not sized:
        return [moments], held
    return [LinearConstraint(vstack(sized), -np.inf, 0), moments], held


def _widened(constraint: LinearConstraint, count: int) -> LinearConstraint:
    """Give a constraint so many variables more that play no part in it."""
    matrix = csr_array(constraint.A)
    matrix.resize(matrix.shape[0], matrix.shape[1] + count)
    return LinearConstraint(matrix, constraint.lb, constraint.ub)


@contextmanager
def silent() -> Iterator[None]:
    """Send standard output nowhere.

    HiGHS leaves a line of its debugging there, even when it is told not to display anything, and what is there may be JSON.
    """
    flush = ctypes.CDLL(None).fflush  # it prints through C, which has a buffer of its own
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
