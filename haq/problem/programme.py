"""Several budgets at once, as an exact integer programme: what fits all of them, what is best, and which ones conflict."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from haq.problem.budget import ROUNDING
from haq.problem.decision import Decision
from hw_models import Workload

SCALE = 1e4  # HiGHS works to absolute tolerances near 1e-7: numbers of this size make them harmless
FLOAT_BITS = 32  # what a buffer that no layer reads is held in
MOST_KEPT = 200_000  # answers that are remembered

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Sums = Sequence[tuple[Floats, float]]  # what every option costs, and the limit of the total cost


@dataclass(frozen=True)
class Peak:
    """The most memory that activations take at one time, as a limit on what decisions take together.

    It is no sum over decisions: a buffer is as wide as the widest of its readers reads it.

    Attributes:
        widths: Activation bits of every option, shape (decisions, options); 0 where a decision has fewer options.
        elements: How many values each buffer holds, shape (buffers,).
        reads: Which decision reads which buffer, shape (buffers, decisions); one that none reads is held in float32.
        alive: Which buffers are held together, shape (moments, buffers).
        limit: Bytes.
    """

    widths: NDArray[np.int64]
    elements: NDArray[np.int64]
    reads: Flags
    alive: Flags
    limit: float

    @classmethod
    def of(cls, workload: Workload, decisions: Sequence[Decision], batch: int, limit: float) -> Peak:
        """Describe the peak of a workload by its decisions; see `hw_models.storage.peak_activation_bytes`.

        Args:
            workload: Traced layers.
            decisions: What there is to decide.
            batch: Images at a time.
            limit: Bytes.

        Returns:
            The peak; of moments that hold nothing that another one doesn't hold as well only one is kept.
        """
        widths = _padded([decision.pairs[:, 1] for decision in decisions], 0).astype(np.int64)
        of_layer = {layer: index for index, decision in enumerate(decisions) for layer in decision.layers}
        first, last, elements = np.array([(b.first, b.last, b.elements * batch) for b in workload.buffers]).T
        reads = np.zeros((len(elements), len(decisions)), bool)
        for row, buffer in zip(reads, workload.buffers, strict=True):
            row[[of_layer[layer] for layer in buffer.readers]] = True
        moments = np.unique(first)[:, None]
        alive = np.unique((first <= moments) & (moments <= last), axis=0)
        within = (alive[:, None] <= alive[None]).all(2)
        return cls(widths, elements, reads, alive[within.sum(1) == 1], limit)

    def sizes(self, widest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of buffers (..., buffers) of which the widest reader's bits are given; 0 bits: no reader."""
        return -(-self.elements * np.where(self.reads.any(1), widest, FLOAT_BITS) // 8)

    def widest(self, options: Sequence[int]) -> NDArray[np.int64]:
        """Return the bits of every buffer if the first decisions take these options, and no other reads any."""
        count = len(options)
        taken = self.widths[np.arange(count), np.asarray(options, int)]
        found: NDArray[np.int64] = np.where(self.reads[:, :count], taken, 0).max(1, initial=0)
        return found

    def moments(self, widest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes held at each moment (..., moments), for buffers of given bits (..., buffers)."""
        held: NDArray[np.int64] = self.sizes(widest) @ self.alive.T.astype(np.int64)
        return held

    def amount(self, options: Sequence[int]) -> float:
        """Return the bytes of an option for every decision."""
        return float(self.moments(self.widest(options)).max())


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

    def __init__(self, decisions: Sequence[Decision], limits: Sequence[float], peak: Peak | None = None) -> None:
        """Prepare the programme.

        Args:
            decisions: What there is to decide; `prices` belong to the first limit, `others` to those that follow.
            limits: Of the total costs, one at least.
            peak: The limit of the peak of memory; its widths are those of the decisions.
        """
        rows = [_padded([decision.prices for decision in decisions], np.inf)]
        for index in range(len(limits) - 1):
            rows.append(_padded([decision.others[index] for decision in decisions], np.inf))
        self.prices = np.array(rows)
        self.limits = np.asarray(limits, float)
        self.peak = peak
        self.counts = [len(decision.pairs) for decision in decisions]
        self._ceilings = self.limits * (1 + 0.9 * ROUNDING)
        self._available = np.isfinite(self.prices[0])

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

    def best(self, losses: Any, start: Sequence[int] = ()) -> list[int] | None:
        """Find the options with the least total loss that fit.

        Args:
            losses: What every option loses, by decision: arrays (options,), or one array (decisions, options).
            start: The options that the first decisions take.

        Returns:
            An option for every decision; None if nothing fits.
        """
        table = _padded([np.asarray(row, float)[:count] for row, count in zip(losses, self.counts, strict=True)], np.inf)
        available = self._open(start) & np.isfinite(table)
        if not available.any(1).all():
            return None
        available &= self._worth(table, available)
        if (available.sum(1) == 1).all():
            # What is left is the cheapest in every respect, and the best.
            options: list[int] = available.argmax(1).tolist()
        else:
            sums = [(cost, float(limit)) for cost, limit in zip(self.prices, self._ceilings, strict=True)]
            found = minimise(table, available, sums, peak=self.peak)
            if found is None:
                return None
            options = found.tolist()
        if not self.fits(options):
            return None
        return options

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

    def completes(self, start: Sequence[int]) -> bool:
        """Say whether the decisions that follow can be chosen so that all limits hold."""
        return self.feasible(start) is not None

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
            respects.append(np.where(self.peak.reads.any(0)[:, None], self.peak.widths, 0).astype(float))
        values = np.where(available, np.array(respects), np.inf)
        better = np.ones((*available.shape, available.shape[1]), bool)
        same = better.copy()
        for value in values:
            better &= value[:, :, None] <= value[:, None, :]
            same &= value[:, :, None] == value[:, None, :]
        # Of options that are alike in all respects the first stays.
        later = np.tril(np.ones(available.shape[1:] * 2, bool)).T
        np.einsum("doo->do", better)[:] = False
        beaten = better & ~(same & ~later) & available[:, :, None]
        return ~beaten.any(1)


def minimise(
    losses: Floats,
    available: Flags,
    limits: Sums,
    *,
    peak: Peak | None = None,
    tied: Sequence[Sequence[int]] = (),
    of_peak: bool = False,
) -> NDArray[np.int64] | None:
    """Choose one option per row with the least total loss within limits, proven optimal.

    Args:
        losses: What every option loses, shape (rows, options).
        available: Which options may be taken, same shape; one in every row at least.
        limits: What every option costs, same shape, and the limit of the total; each is kept to about 1e-11 of it.
        peak: A limit of the peak of memory.
        tied: Groups of rows that must take the same option.
        of_peak: Make the peak of memory as small as it can be, whatever its limit, instead of losses.

    Returns:
        Option indices, shape (rows,); None if nothing fits.

    Raises:
        RuntimeError: If HiGHS finds neither a solution nor a proof that there is none.
    """
    rows, options = losses.shape
    goal = _goal(losses, available).ravel()
    upper = available.ravel().astype(float)
    constraints = [*_structure(rows, options, tied), *(_sum(costs, limit, available) for costs, limit in limits)]
    integrality = np.ones(rows * options)
    if peak is not None:
        memory, held = _memory(peak, of_peak)
        constraints = [_widened(one, held) for one in constraints] + memory
        goal = np.append(goal, np.zeros(held))
        if of_peak:
            goal[-1] = 1.0
        upper = np.append(upper, np.full(held, np.inf))
        integrality = np.append(integrality, np.zeros(held))
    with _silent():
        result: Any = milp(
            goal,
            integrality=integrality,
            bounds=Bounds(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    # Presolve may tell no more than that it is infeasible or unbounded, which losses from 0 up are not.
    if result.status == 2 or (result.status == 4 and "nfeasible" in result.message):
        return None
    if result.status != 0:
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    chosen: NDArray[np.int64] = result.x[: rows * options].reshape(rows, options).argmax(1)
    return chosen


def _padded(rows: Sequence[Any], value: float) -> Floats:
    """Make one array of rows of different lengths; the shorter ones end in a value."""
    padded = np.full((len(rows), max(map(len, rows))), value, float)
    for row, given in zip(padded, rows, strict=True):
        row[: len(given)] = given
    return padded


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
    one_each = csr_array(np.kron(np.eye(rows), np.ones(options)))
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


def _memory(peak: Peak, of_peak: bool) -> tuple[list[LinearConstraint], int]:
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
def _silent() -> Iterator[None]:
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
