"""Ways to go on that are known to fit: what tells most of the time whether all budgets can still be met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from haq.problem.limits import ROUNDING
from haq.problem.peak import PeakOfDecisions

MOST = 64  # ways that are kept
MOST_STATES = 20_000  # what the first decisions took, of which is remembered what it leaves
MOST_BOUNDS = 32  # weights of the limits that are kept
TURNS = 40  # in which a search for a way that fits weighs the limits anew
PACE = 3.0  # at which weights grow
SMALL = 1e-9  # the least weight
BEYOND = 1e-9  # of what is left: what shows that something is impossible
CLOSE = 1e-12  # in parts of a limit: sums of floats depend on their order

Floats = NDArray[np.float64]


class Stock:
    """Options for all decisions, any end of which may complete what the first decisions took, and bounds.

    It begins with what is cheapest by each limit, by all of them together, and likewise at the least activation widths. Where
    one choice is the cheapest in every respect, that is all there is to know.
    """

    def __init__(self, prices: Floats, limits: Floats, peak: PeakOfDecisions | None) -> None:
        """Begin the stock.

        Args:
            prices: What every option costs, shape (limits, decisions, options); infinite where a decision has fewer options.
            limits: Of the total costs, shape (limits,).
            peak: The limit of the peak of memory, or None.
        """
        self._prices = prices
        self._limits = limits
        self._peak = peak
        self._there = np.isfinite(prices[0])
        self._finite = np.where(self._there, prices, 0.0)
        count = prices.shape[1]
        buffers = 0
        if peak is not None:
            buffers = len(peak.elements)
        self._kept: list[tuple[int, ...]] = []
        self._states: dict[tuple[int, ...], tuple[Floats, NDArray[np.int64]]] = {}
        self._possible: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        # What the decisions from each one on cost in each of the stock, and which bits they read every buffer with.
        self._costs_from = np.zeros((0, count + 1, len(limits)))
        self._widest_from = np.zeros((0, count + 1, buffers), np.int64)
        # Limits one by one, and all together, in parts of them.
        self._weights = np.vstack([np.eye(len(limits)), np.ones(len(limits))]) / limits
        parts = prices / limits[:, None, None]
        weighed = [*parts, parts.sum(0)]
        self._least_from = np.array([_from_each(row.min(1)) for row in weighed])
        for row in weighed:
            self.keep(tuple(row.argmin(1).tolist()))
        if peak is not None:
            widths = np.where(self._there, peak.widths, np.iinfo(np.int64).max)
            narrow = widths == widths.min(1, keepdims=True)
            for row in weighed:
                self.keep(tuple(np.where(narrow, row, np.inf).argmin(1).tolist()))
            self._narrowest_from = self._widest_of_rest(narrow.argmax(1).tolist())
        self._first = len(self._kept)

    def keep(self, options: tuple[int, ...]) -> None:
        """Put an option for every decision into the stock; where there are many, the oldest leaves but for the first ones."""
        if options in self._kept:
            return
        if len(self._kept) >= MOST:
            self._kept.pop(self._first)
            self._costs_from = np.delete(self._costs_from, self._first, 0)
            self._widest_from = np.delete(self._widest_from, self._first, 0)
        costs = self._prices[:, np.arange(len(options)), list(options)]
        costs_from = np.array([_from_each(row) for row in costs]).T
        self._kept.append(options)
        self._costs_from = np.concatenate([self._costs_from, costs_from[None]])
        self._widest_from = np.concatenate([self._widest_from, self._widest_of_rest(options)[None]])

    def possible(self, start: tuple[int, ...]) -> NDArray[np.bool_]:
        """Tell which options of the next decision simple bounds leave possible, shape (options,)."""
        if start not in self._possible:
            self._forget_if_many()
            self._possible[start] = self._bounded(len(start), *self._state(start))
        return self._possible[start]

    def possible_after(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell of many starts (n, first decisions) what `possible` tells of one, shape (n, options)."""
        return self._bounded(starts.shape[1], *self._states_of(starts))

    def _bounded(self, count: int, left: Floats, widest: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell what simple bounds leave possible of a decision.

        Args:
            count: Its index.
            left: What is left of the limits, shape (..., limits).
            widest: Which bits every buffer is read with, shape (..., buffers).

        Returns:
            Shape (..., options).
        """
        weighed = self._weights @ (left[..., None] - self._finite[:, count])
        possible: NDArray[np.bool_] = np.all(weighed >= self._least_from[:, count + 1, None] - CLOSE, axis=-2)
        possible &= self._there[count]
        if self._peak is None:
            return possible
        rest = np.maximum(widest, self._narrowest_from[count + 1])[..., None, :]
        with_option = np.maximum(rest, np.where(self._peak.reads[:, count], self._peak.widths[count, :, None], 0))
        possible &= self._peak.moments(with_option).max(-1) <= self._peak.limit * (1 + ROUNDING)
        return possible

    def used(self, start: tuple[int, ...]) -> Floats:
        """Tell the least of each limit that is used in the end, as a share of it; the peak of memory comes last."""
        return self.used_after(np.array([start], np.int64).reshape(1, len(start)))[0]

    def used_after(self, starts: NDArray[np.int64]) -> Floats:
        """Tell of many starts (n, first decisions) what `used` tells of one, shape (n, limits)."""
        count = starts.shape[1]
        left, widest = self._states_of(starts)
        used: Floats = 1 - left / self._limits + self._least_from[: len(self._limits), count]
        if self._peak is None:
            return used
        rest = np.maximum(widest, self._narrowest_from[count])
        peaks = self._peak.moments(rest).max(-1) / self._peak.limit
        return np.concatenate([used, peaks[:, None]], axis=1)

    def completes_after(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of many starts (n, first decisions) the end of anything in stock completes, shape (n,)."""
        fits: NDArray[np.bool_] = np.any(self._fits(starts.shape[1], *self._states_of(starts)), axis=-1)
        return fits

    def complete(self, start: tuple[int, ...]) -> tuple[int, ...] | None:
        """Complete the first decisions' options by the end of what is in stock, if any of it fits."""
        fits = self._fits(len(start), *self._state(start))
        if not fits.any():
            return None
        return start + self._kept[int(fits.argmax())][len(start) :]

    def _fits(self, count: int, left: Floats, widest: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which ends of what is in stock fit.

        Args:
            count: How many decisions are made.
            left: What they leave of the limits, shape (..., limits).
            widest: Which bits they read every buffer with, shape (..., buffers).

        Returns:
            Shape (..., kept).
        """
        within = self._costs_from[:, count] <= left[..., None, :] + CLOSE * self._limits
        fits: NDArray[np.bool_] = np.all(within, axis=-1)
        if self._peak is not None and fits.any():
            together = np.maximum(widest[..., None, :], self._widest_from[:, count])
            fits &= self._peak.moments(together).max(-1) <= self._peak.limit * (1 + ROUNDING)
        return fits

    def search(self, start: tuple[int, ...]) -> tuple[tuple[int, ...] | None, bool]:
        """Look for options that complete the first decisions', by weights of the limits that grow where a limit is exceeded.

        The weights that show that there are none are kept as a bound (Plotkin, Shmoys and Tardos, "Fast approximation
        algorithms for fractional packing and covering problems", Mathematics of Operations Research 1995).

        Args:
            start: The options of the first decisions.

        Returns:
            Options for all decisions, or None; and whether it is certain that there are none.
        """
        count = len(start)
        left = self._state(start)[0]
        if (left <= 0).any():
            return None, False
        rest = self._prices[:, count:] / left[:, None, None]
        rows = np.arange(rest.shape[1])
        weights = np.full(len(left), 1 / len(left))
        nearest, least = rest[0].argmin(1), np.inf
        for turn in range(TURNS):
            weighed = np.tensordot(weights, rest, 1)
            chosen = weighed.argmin(1)
            if weighed[rows, chosen].sum() > 1 + BEYOND:
                self._bound(weights / left)
                return None, True
            totals = rest[:, rows, chosen].sum(1)
            if totals.max() < least:
                nearest, least = chosen, totals.max()
            if least <= 1:
                break
            weights = np.maximum(weights * np.exp((totals - totals.max()) * PACE / (1 + turn / 10)), SMALL)
            weights /= weights.sum()
        nearest = _swapped(rest, nearest)
        options = start + tuple(nearest.tolist())
        fits = bool((rest[:, rows, nearest].sum(1) <= 1).all())
        if fits and (self._peak is None or self._peak.amount(options) <= self._peak.limit):
            return options, False
        return None, False

    def _bound(self, weights: Floats) -> None:
        """Keep weights of the limits that showed that something is impossible; where there are many, the oldest leave."""
        weights = weights / (weights @ self._limits)
        weighed = np.where(self._there, np.tensordot(weights, self._finite, 1), np.inf)
        first = len(self._limits) + 1
        if len(self._weights) >= first + MOST_BOUNDS:
            self._weights = np.delete(self._weights, first, 0)
            self._least_from = np.delete(self._least_from, first, 0)
        self._weights = np.vstack([self._weights, weights])
        self._least_from = np.vstack([self._least_from, _from_each(weighed.min(1))])
        self._possible.clear()

    def _state(self, start: tuple[int, ...]) -> tuple[Floats, NDArray[np.int64]]:
        """Tell what the first decisions leave of the limits, and which bits they read every buffer with."""
        found = self._states.get(start)
        if found is None:
            left, widest = self._states_of(np.array([start], np.int64).reshape(1, len(start)))
            found = (left[0], widest[0])
            self._forget_if_many()
            self._states[start] = found
        return found

    def _states_of(self, starts: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
        """Tell of many starts (n, first decisions) what `_state` tells of one, shapes (n, limits) and (n, buffers)."""
        taken = np.arange(starts.shape[1])
        left = self._limits - self._prices[:, taken, starts].sum(-1).T
        widest = np.zeros((len(starts), self._widest_from.shape[2]), np.int64)
        if self._peak is not None:
            widest = self._peak.widest(starts)
        return left, widest

    def _forget_if_many(self) -> None:
        for kept in (self._states, self._possible):
            if len(kept) >= MOST_STATES:
                kept.clear()

    def _widest_of_rest(self, options: Sequence[int]) -> NDArray[np.int64]:
        """Return the bits that the decisions from each one on read every buffer with, shape (decisions + 1, buffers)."""
        found = np.zeros((len(options) + 1, self._widest_from.shape[2]), np.int64)
        if self._peak is not None:
            taken = self._peak.widths[np.arange(len(options)), np.asarray(options, int)]
            read = np.where(self._peak.reads, taken, 0).T
            found[:-1] = np.maximum.accumulate(read[::-1], axis=0)[::-1]
        return found


def _swapped(prices: Floats, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """Change one option after another, each time that which comes nearest to all limits, which are 1, while any does.

    Args:
        prices: What every option costs, shape (limits, decisions, options).
        chosen: An option per decision.
    """
    rows = np.arange(len(chosen))
    chosen = chosen.copy()
    while True:
        now = prices[:, rows, chosen]
        totals = now.sum(1)
        excess = np.maximum(totals - 1, 0).sum()
        if excess <= 0:
            return chosen
        instead = (totals[:, None] - now)[:, :, None] + prices
        exceeded = np.maximum(instead - 1, 0).sum(0)
        place = int(exceeded.argmin())
        row, option = divmod(place, prices.shape[2])
        # What is nearer by rounding alone would lead in a circle.
        if exceeded[row, option] >= excess * (1 - 1e-6):
            return chosen
        chosen[row] = option


def _from_each(values: Floats) -> Floats:
    """Sum numbers from each one on, and 0 after the last, shape (count + 1,)."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
