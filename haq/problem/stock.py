"""Ways to go on that are known to fit: what tells most of the time whether all budgets can still be met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from haq.problem.limits import ROUNDING
from haq.problem.peak import PeakOfDecisions

MOST = 64  # ways that are kept
MOST_STATES = 20_000  # what the first decisions took, of which is remembered what it leaves
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
            widths = np.where(np.isfinite(prices[0]), peak.widths, np.iinfo(np.int64).max)
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
            self._possible[start] = self._bounded(start)
        return self._possible[start]

    def _bounded(self, start: tuple[int, ...]) -> NDArray[np.bool_]:
        count = len(start)
        left, widest = self._state(start)
        prices = self._prices[:, count]
        possible: NDArray[np.bool_] = np.all(np.isfinite(prices), axis=0)
        weighed = self._weights @ (left[:, None] - np.where(possible, prices, 0.0))
        possible &= np.all(weighed >= self._least_from[:, count + 1, None] - CLOSE, axis=0)
        if self._peak is None:
            return possible
        rest = np.maximum(widest, self._narrowest_from[count + 1])
        with_option = np.maximum(rest, np.where(self._peak.reads[:, count], self._peak.widths[count, :, None], 0))
        possible &= self._peak.moments(with_option).max(1) <= self._peak.limit * (1 + ROUNDING)
        return possible

    def used(self, start: tuple[int, ...]) -> Floats:
        """Tell the least of each limit that is used in the end, as a share of it; the peak of memory comes last."""
        count = len(start)
        left, widest = self._state(start)
        used: Floats = 1 - left / self._limits + self._least_from[: len(self._limits), count]
        if self._peak is None:
            return used
        rest = np.maximum(widest, self._narrowest_from[count])
        return np.append(used, self._peak.moments(rest).max() / self._peak.limit)

    def complete(self, start: tuple[int, ...]) -> tuple[int, ...] | None:
        """Complete the first decisions' options by the end of what is in stock, if any of it fits."""
        count = len(start)
        left, widest = self._state(start)
        fits = (self._costs_from[:, count] <= left + CLOSE * self._limits).all(1)
        if self._peak is not None and fits.any():
            together = np.maximum(widest, self._widest_from[:, count])
            fits &= self._peak.moments(together).max(1) <= self._peak.limit * (1 + ROUNDING)
        if not fits.any():
            return None
        return start + self._kept[int(fits.argmax())][count:]

    def _state(self, start: tuple[int, ...]) -> tuple[Floats, NDArray[np.int64]]:
        """Tell what the first decisions leave of the limits, and which bits they read every buffer with."""
        found = self._states.get(start)
        if found is None:
            left = self._limits - self._prices[:, np.arange(len(start)), list(start)].sum(1)
            widest = np.zeros(self._widest_from.shape[2], np.int64)
            if self._peak is not None:
                widest = self._peak.widest(start)
            found = (left, widest)
            self._forget_if_many()
            self._states[start] = found
        return found

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


def _from_each(values: Floats) -> Floats:
    """Sum numbers from each one on, and 0 after the last, shape (count + 1,)."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
