"""What channels and widths cost together: a layer's prices depend on how many channels are kept before it and behind it.

A joint option vector has the number of an option for every channel decision, and then that of a pair of widths for every
decision. For given channels costs are sums over the decisions. So prices are kept in rows, one for each decision and each
choice of the channels that it has to do with, which are computed once they are met; what any number of vectors cost are then
look-ups.

Among the pairs of a decision there are some that cost as much as one with more bits: which ones these are depends on the
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.plan import Plan
from haq.problem.channel_costs import MEAN_BITS
from haq.problem.decision import Decision
from haq.problem.limits import ROUNDING, Limit, PeakLimit
from haq.problem.peak import FLOAT_BITS, PeakOfDecisions
from haq.problem.programme import Programme
from hw_models import Workload

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Options = NDArray[np.int64]  # (policies, decisions of channels and then of widths)

DENSE = 1 << 18  # choices of channels up to which a decision's rows are found by a table
ROOM = 256  # rows that there is room for in the beginning
GRADES = 32  # prices of a unit of cost that a plan tries
STEEP, FLAT = 1e3, 1e-4  # the highest and the lowest of them, in parts of what all losses are to all costs
FAR = 1e6  # parts of a limit that stand for more than any
ROUNDS = 60  # changes of one group's channels that a plan makes at most
FEW_GROUPS = 8  # up to which plans within several limits look at what is nearby
NEARBY_ROUNDS = 2
AT_ONCE = 512  # choices of channels that are priced together
CHUNK = 1 << 15  # vectors that are looked at together


class PricedChannels(Protocol):
    """What costs are made of; `haq.problem.channels.ChannelProblem` has it."""

    limits: tuple[Limit, ...]
    peak: PeakLimit | None

    @property
    def workload(self) -> Workload:
        """The unpruned network's layers."""
        ...

    @property
    def decisions(self) -> Sequence[Decision]:
        """What there is to decide of widths."""
        ...

    @property
    def channel_decisions(self) -> Sequence[Any]:
        """What there is to decide of channels."""
        ...

    def prices_at(self, numbers: Options) -> Floats:
        """Return what layers cost at every pair of widths, shape (policies, limits that are sums, layers, 10, 10)."""
        ...

    def elements_at(self, numbers: Options) -> NDArray[np.int64]:
        """Return how many values every buffer holds for one image, shape (policies, buffers)."""
        ...


class JointCosts:
    """Costs of a problem of channels and widths, within its limits, of any number of option vectors at once.

    Attributes:
        groups: How many channel decisions there are: they come first in an option vector.
        pairs: The pairs of widths of every decision, shape (options, 2) each.
        counts: How many options everything has that is decided, shape (channel decisions + decisions,).
        free: The places in an option vector that have more than one option.
        limits: Of the costs that are sums, the main one first, shape (limits,).
        anchor: Options of the channel decisions at which the budgets leave most room, shape (channel decisions,).
        kept: What others make of these costs and keep with them, by name.
    """

    def __init__(self, problem: PricedChannels) -> None:
        """Lay out a problem.

        Args:
            problem: What is searched.

        Raises:
            ValueError: If no policy within all budgets is found, and for a limit that is no sum over the layers that are kept.
        """
        self.problem = problem
        self.kept: dict[str, Any] = {}
        self._decisions = problem.decisions
        channels = problem.channel_decisions
        self.groups = len(channels)
        self.pairs = [decision.pairs for decision in problem.decisions]
        self.counts = np.array([*(len(one.shares) for one in channels), *map(len, self.pairs)], np.int64)
        self.free = np.flatnonzero(self.counts > 1)
        sums = [limit for limit in problem.limits if limit.is_sum]
        self.limits = np.array([limit.amount for limit in sums])
        if any(limit.metric == MEAN_BITS for limit in sums):
            raise ValueError(
                f"a budget of {MEAN_BITS} is a mean over the weights that are kept, which channels can't be chosen within: "
                "limit storage instead"
            )
        most = max(map(len, self.pairs))
        self.there = np.arange(most) < self.counts[self.groups :, None]
        self._set_keys()
        self._prices = np.full((len(sums), ROOM, most), np.inf)
        self._decision_of = np.zeros(ROOM, np.int64)
        self._rows = 0
        self._peak = None
        if problem.peak is not None:
            self._peak = PeakOfDecisions.of(problem.workload, problem.decisions, problem.peak.batch, problem.peak.amount)
        self.anchor = self._find_anchor()

    def _set_keys(self) -> None:
        """Give every decision a number for each choice of the channels that it has to do with: a sum over the groups."""
        count = len(self._decisions)
        sizes = self.counts[: self.groups].tolist()
        self._of_share = [np.zeros((size, count), np.int64) for size in sizes]
        self._touched = [set(one.layers) for one in self.problem.channel_decisions]
        self._dense = np.ones(count, bool)
        starts = np.zeros(count, np.int64)
        draws = np.random.default_rng(0)
        total = 0
        for place in range(count):
            beside = self.touching(place)
            size = 1
            for group in beside:
                size *= sizes[group]
            starts[place] = total
            self._dense[place] = size <= DENSE
            stride = 1
            for group in beside:
                if self._dense[place]:
                    self._of_share[group][:, place] = stride * np.arange(sizes[group])
                    stride *= sizes[group]
                else:
                    # Sums of such numbers are different ones, but for a chance of one in 2 ** 40 or so.
                    self._of_share[group][:, place] = draws.integers(1 << 60, size=sizes[group])
            if self._dense[place]:
                total += size
        self._starts = starts
        self._row_of = np.full(max(total, 1), -1, np.int64)
        self._sparse: dict[int, dict[int, int]] = {int(place): {} for place in np.flatnonzero(~self._dense)}

    @property
    def has_peak(self) -> bool:
        """Say whether there is a limit of peak memory."""
        return self._peak is not None

    @property
    def has_several(self) -> bool:
        """Say whether there is more than one limit, of a sum."""
        return self._peak is not None or len(self.limits) > 1

    def touching(self, decision: int) -> list[int]:
        """List the groups whose channels the layers of a decision read or write."""
        layers = set(self._decisions[decision].layers)
        return [group for group in range(self.groups) if self._touched[group] & layers]

    def rows(self, numbers: Options) -> Options:
        """Return the rows of prices of every decision, shape (policies, decisions), for channels (policies, groups)."""
        keys = np.zeros((len(numbers), len(self._decisions)), np.int64)
        for group, of_share in enumerate(self._of_share):
            keys += of_share[numbers[:, group]]
        found = self._found(keys)
        missing = np.flatnonzero((found < 0).any(1))
        if len(missing):
            for begin in range(0, len(missing), AT_ONCE):
                part = missing[begin : begin + AT_ONCE]
                self._learn(numbers[part], keys[part])
            found[missing] = self._found(keys[missing])
        return found

    def _found(self, keys: Options) -> Options:
        """Return the rows that are known, -1 for others."""
        found: Options = self._row_of[np.where(self._dense, self._starts + keys, 0)]
        for place, known in self._sparse.items():
            found[:, place] = [known.get(key, -1) for key in keys[:, place].tolist()]
        return found

    def _learn(self, numbers: Options, keys: Options) -> None:
        """Compute the rows of prices that are missing for choices of channels, all together."""
        tables = self.problem.prices_at(numbers)
        for index, of_index in enumerate(keys):
            missing = np.flatnonzero(self._found(of_index[None])[0] < 0)
            for place in missing.tolist():
                self._add_row(place, int(of_index[place]), tables[index])

    def _add_row(self, place: int, key: int, tables: Floats) -> None:
        """Keep what a decision's pairs cost.

        Args:
            place: The decision's.
            key: Of the choice of channels.
            tables: What layers cost, shape (limits, layers, 10, 10).
        """
        if self._rows == len(self._decision_of):
            self._prices = np.concatenate([self._prices, np.full(self._prices.shape, np.inf)], axis=1)
            self._decision_of = np.concatenate([self._decision_of, np.zeros_like(self._decision_of)])
        decision = self._decisions[place]
        w, a = decision.places.T
        self._prices[:, self._rows, : len(w)] = tables[:, list(decision.layers)].sum(1)[:, w, a]
        self._decision_of[self._rows] = place
        if self._dense[place]:
            self._row_of[self._starts[place] + key] = self._rows
        else:
            self._sparse[place][key] = self._rows
        self._rows += 1

    def prices(self, numbers: Options) -> Floats:
        """Return what pairs cost for given channels, shape (limits, policies, decisions, options)."""
        rows = self.rows(numbers)  # first: it may make `_prices` larger
        return self._prices[:, rows]

    def totals(self, options: Options) -> Floats:
        """Return what policies cost by every limit that is a sum, shape (policies, limits)."""
        rows = self.rows(options[:, : self.groups])
        return self._prices[:, rows, options[:, self.groups :]].sum(-1).T

    def parts(self, options: Options) -> Floats:
        """Return what every decision uses of the limits that are sums, all in the mean, shape (policies, decisions)."""
        rows = self.rows(options[:, : self.groups])
        prices = self._prices[:, rows, options[:, self.groups :]]
        found: Floats = (prices / self.limits[:, None, None]).mean(0)
        return found

    def plans(self, losses: Sequence[Floats]) -> Grades:
        """Return what is best for any channels if losses add up.

        Args:
            losses: What every option loses, by place.
        """
        return Grades(self, losses)

    def peaks(self, options: Options) -> Floats:
        """Return the peaks of policies' memory in bytes, shape (policies,)."""
        peak = self._peak
        assert peak is not None
        widths = peak.widths[np.arange(len(self._decisions)), options[:, self.groups :]]
        widest = np.where(peak.reads, widths[:, None], 0).max(2)
        bits = np.where(peak.reads.any(1), widest, FLOAT_BITS)
        sizes = -(-self._elements(options[:, : self.groups]) * bits // 8)
        held: Floats = (sizes.astype(float) @ peak.alive.T.astype(float)).max(1)
        return held

    def used(self, options: Options) -> Floats:
        """Return what policies use of every limit, in parts of it, the peak coming last: shape (policies, limits)."""
        parts = self.totals(options) / self.limits
        if self._peak is not None:
            parts = np.concatenate([parts, self.peaks(options)[:, None] / self._peak.limit], axis=1)
        return parts

    def _elements(self, numbers: Options) -> NDArray[np.int64]:
        """Return how many values every buffer holds in all images of the target's batch, shape (policies, buffers)."""
        assert self.problem.peak is not None
        return self.problem.elements_at(numbers) * self.problem.peak.batch

    def fits(self, options: Options) -> Flags:
        """Tell which policies are within all budgets, shape (policies,)."""
        found: Flags = np.all(self.used(options) <= 1 + ROUNDING, axis=1)
        return found

    def instead(self, options: Options, place: int) -> Options:
        """Return policies with each option of one place, shape (policies, options, places)."""
        count = int(self.counts[place])
        found = np.repeat(options[:, None], count, axis=1)
        found[:, :, place] = np.arange(count)
        return found

    def used_instead(self, options: Options, place: int) -> Floats:
        """Return what is used of every limit with each option of one place, shape (policies, options, limits)."""
        if place < self.groups:
            wide = self.instead(options, place)
            parts = [self.used(part) for part in np.array_split(wide.reshape(-1, options.shape[1]), 1 + wide.size // CHUNK)]
            return np.concatenate(parts).reshape(len(options), wide.shape[1], -1)
        decision = place - self.groups
        rows = self.rows(options[:, : self.groups])
        taken = self._prices[:, rows, options[:, self.groups :]]
        taken[:, :, decision] = 0
        others = taken.sum(-1)
        sums = others[:, :, None] + self._prices[:, rows[:, decision], : self.counts[place]]
        found: Floats = sums.transpose(1, 2, 0) / self.limits
        if self._peak is not None:
            peaks = self._peaks_instead(options, decision)
            found = np.concatenate([found, peaks[:, :, None] / self._peak.limit], axis=2)
        return found

    def _peaks_instead(self, options: Options, decision: int) -> Floats:
        """Return the peaks of memory with each pair of one decision, shape (policies, options)."""
        peak = self._peak
        assert peak is not None
        elements = self._elements(options[:, : self.groups])
        widths = peak.widths[np.arange(len(self._decisions)), options[:, self.groups :]]
        read = np.where(peak.reads, widths[:, None], 0)
        bits = np.where(peak.reads.any(1), read.max(2), FLOAT_BITS)
        sizes = -(-elements * bits // 8)
        alive = peak.alive.T.astype(float)
        held = sizes.astype(float) @ alive
        # Only the buffers that the decision reads are other ones.
        touched = np.flatnonzero(peak.reads[:, decision])
        read[:, :, decision] = 0
        by_others = read[:, touched].max(2)
        asked = np.maximum(by_others[:, None], peak.widths[decision, : self.counts[self.groups + decision], None])
        changes = -(-elements[:, None, touched] * asked // 8) - sizes[:, None, touched]
        found: Floats = (held[:, None] + changes.astype(float) @ alive[touched]).max(2)
        return found

    def cheapest(self, numbers: Options) -> Options:
        """Return the pairs that use least of the limits, all in sum, for given channels, shape (policies, decisions).

        Of pairs that use as little of the sums the one with the narrowest activations is taken.
        """
        parts = (self.prices(numbers) / self.limits[:, None, None, None]).sum(0)
        least = parts.min(-1, keepdims=True)
        narrow = np.zeros(self.there.shape)
        for row, pairs in zip(narrow, self.pairs, strict=True):
            row[: len(pairs)] = pairs[:, 1]
        alike = parts <= least * (1 + ROUNDING)
        found: Options = np.where(alike, narrow, np.inf).argmin(-1)
        return found

    def at_least(self, numbers: Options) -> Floats:
        """Tell what channels use of every limit at the cheapest pairs, in parts of it, shape (policies, limits)."""
        return self.used(np.concatenate([numbers, self.cheapest(numbers)], axis=1))

    def leaves_room(self, numbers: Options) -> Flags:
        """Tell for which channels the cheapest pairs are within all budgets, shape (policies,)."""
        found: Flags = np.all(self.at_least(numbers) <= 1 + ROUNDING, axis=1)
        return found

    def _find_anchor(self) -> NDArray[np.int64]:
        """Find the channels at which the cheapest pairs use least of the limits: one group after the other."""
        sizes = self.counts[: self.groups]
        best = np.zeros(self.groups, np.int64)
        least = np.inf
        for start in self.diagonals():
            now = start.copy()
            value = float(self.at_least(now[None]).max())
            improved = self.groups > 0
            while improved:
                improved = False
                for group in range(self.groups):
                    every = np.repeat(now[None], sizes[group], axis=0)
                    every[:, group] = np.arange(sizes[group])
                    values = self.at_least(every).max(1)
                    if values.min() < value * (1 - ROUNDING):
                        now, value, improved = every[int(values.argmin())], float(values.min()), True
            if value < least:
                best, least = now, value
        if least > 1 + ROUNDING:
            raise ValueError(
                f"no channels and widths were found that are within all budgets: the least that was found is {least:.3f} of "
                "one of them; allow a larger budget, fewer channels or fewer bits"
            )
        return best

    def planned(self, losses: Sequence[Floats], start: Options | None = None) -> tuple[int, ...]:
        """Find the options with a small total loss within all budgets.

        Channels are changed group by group as long as what is best for them is better (`Grades`); for the channels that are
        found the widths are optimal, within one budget but for the grain of `envs.plan.Plan`.

        Args:
            losses: What every option loses, by place.
            start: Channels to begin from, shape (any, groups); None: equal shares everywhere, and those of `anchor`.

        Returns:
            An option vector within all budgets.
        """
        if start is None:
            start = self.diagonals()
        start = np.concatenate([start, self.anchor[None]])
        # Of several limits any may be the one that counts.
        weights = [np.full(len(self.limits), 1 / len(self.limits))]
        if len(self.limits) > 1:
            weights += list(np.eye(len(self.limits)))
        found = [(*self.anchor.tolist(), *self.cheapest(self.anchor[None])[0].tolist())]
        tried: set[tuple[int, ...]] = set()
        for weight in weights:
            numbers = Grades(self, losses, weight).best_from(start)
            if tuple(numbers.tolist()) in tried:
                continue
            tried.add(tuple(numbers.tolist()))
            picks = self.best_widths(numbers, losses[self.groups :])
            if picks is not None:
                found.append((*numbers.tolist(), *picks))
        if len(found) == 1:
            picks = self.best_widths(self.anchor, losses[self.groups :])
            if picks is not None:
                found.append((*self.anchor.tolist(), *picks))
        best = min(found, key=lambda options: sum_of(losses, options))
        if self.has_several and self.groups <= FEW_GROUPS:
            return self._better_nearby(best, losses)
        return best

    def _better_nearby(self, options: tuple[int, ...], losses: Sequence[Floats]) -> tuple[int, ...]:
        """Change single groups by a share, with the widths that are optimal then, as long as that is better."""
        groups = self.groups
        for _ in range(NEARBY_ROUNDS):
            found = [options]
            for group in range(groups):
                for step in (-1, 1):
                    numbers = np.array(options[:groups], np.int64)
                    numbers[group] += step
                    if not 0 <= numbers[group] < self.counts[group]:
                        continue
                    picks = self.best_widths(numbers, losses[groups:])
                    if picks is not None:
                        found.append((*numbers.tolist(), *picks))
            best = min(found, key=lambda one: sum_of(losses, one))
            if best == options:
                break
            options = best
        return options

    def diagonals(self) -> Options:
        """Return equal shares of all groups, from all channels to the fewest, shape (shares, groups)."""
        channels = self.problem.channel_decisions
        shares = sorted({float(share) for one in channels for share in one.shares}, reverse=True)
        found = np.zeros((max(len(shares), 1), self.groups), np.int64)
        for row, share in zip(found, shares, strict=False):
            row[:] = [int(np.abs(one.shares - share).argmin()) for one in channels]
        return found

    def best_widths(self, numbers: NDArray[np.int64], losses: Sequence[Floats]) -> list[int] | None:
        """Find the pairs of widths with the least total loss for given channels, within all budgets.

        Args:
            numbers: The channels, shape (groups,).
            losses: What every pair loses, by decision; infinite for one that may not be taken.

        Returns:
            The options of the decisions; None if nothing fits.
        """
        prices = self.prices(numbers[None])[:, 0]
        programme = self._programme_at(numbers, prices)
        if programme is not None:
            return programme.best(losses)
        rows, kept, given = [], [], []
        for row, loss in zip(prices[0], losses, strict=True):
            open_ones = np.flatnonzero(np.isfinite(loss))
            kept.append(open_ones)
            given.append(np.asarray(loss, float)[open_ones])
            rows.append(row[open_ones])
        plan = Plan(given, rows, float(self.limits[0]))
        left = float(self.limits[0])
        if plan.cheapest_from[0] > left * (1 + ROUNDING):
            return None
        chosen = []
        for place, row in enumerate(rows):
            pick = int(plan.option(place, left))
            chosen.append(int(kept[place][pick]))
            left -= float(row[pick])
        return chosen

    def _programme_at(self, numbers: NDArray[np.int64], prices: Floats) -> Programme | None:
        """Make the programme of several budgets for given channels; None where there is one, of a sum."""
        if not self.has_several:
            return None
        made = []
        for place, (decision, pairs) in enumerate(zip(self._decisions, self.pairs, strict=True)):
            of_pairs = prices[:, place, : len(pairs)]
            made.append(Decision(decision.layers, pairs, of_pairs[0], of_pairs[1:]))
        peak = None
        if self._peak is not None:
            elements = self._elements(numbers[None])[0]
            peak = PeakOfDecisions(self._peak.widths, elements, self._peak.reads, self._peak.alive, self._peak.limit)
        return Programme(made, self.limits.tolist(), peak)


def sum_of(losses: Sequence[Floats], options: Sequence[int]) -> float:
    """Sum what the options of a vector lose."""
    return float(sum(row[option] for row, option in zip(losses, options, strict=True)))


class Grades:
    """What is best for any channels if losses add up, seen at a few prices of a unit of cost (Lagrange multipliers).

    At each price every row of prices has its best pair, so that the best for given channels is a sum of look-ups. Several
    limits are one, weighted.
    """

    def __init__(self, costs: JointCosts, losses: Sequence[Floats], weights: Floats | None = None) -> None:
        """Take what options lose.

        Args:
            costs: Of the problem.
            losses: By place.
            weights: What the limits that are sums count, shape (limits,), 1 in sum; None: all alike.
        """
        self.costs = costs
        if weights is None:
            weights = np.full(len(costs.limits), 1 / len(costs.limits))
        self.weights = weights
        groups = costs.groups
        self.of_groups = [np.asarray(loss, float) for loss in losses[:groups]]
        self.of_pairs = np.full(costs.there.shape, np.inf)
        for row, loss in zip(self.of_pairs, losses[groups:], strict=True):
            row[: len(loss)] = loss
        finite = np.isfinite(self.of_pairs)
        spans = np.where(finite, self.of_pairs, -np.inf).max(1) - np.where(finite, self.of_pairs, np.inf).min(1)
        scale = max(float(spans.sum()), 1e-12)
        self.multipliers = scale * np.concatenate([[0.0], np.geomspace(FLAT, STEEP, GRADES - 2)])
        self._amounts = np.zeros((GRADES, 0))
        self._losses = np.zeros((GRADES, 0))
        self._picks = np.zeros((GRADES, 0), np.int64)

    def _extend(self) -> None:
        """Take the rows of prices that are new."""
        costs, known = self.costs, self._amounts.shape[1]
        if known == costs._rows:
            return
        rows = slice(known, costs._rows)
        # What can't be done is far beyond any limit, whatever it is weighted.
        prices = costs._prices[:, rows]
        able = np.isfinite(prices).all(0)
        parts = np.where(able, np.tensordot(self.weights / costs.limits, np.where(able, prices, 0.0), axes=1), FAR)
        losses = self.of_pairs[costs._decision_of[rows]]
        picks = [np.argmin(losses + multiplier * parts, axis=1) for multiplier in self.multipliers]
        # The last is what costs least, at any loss.
        priced_ones = np.where(np.isfinite(losses), parts, np.inf)
        cheapest = priced_ones.min(1, keepdims=True)
        picks.append(np.where(priced_ones <= cheapest * (1 + ROUNDING), losses, np.inf).argmin(1))
        every = np.arange(len(parts))
        self._picks = np.concatenate([self._picks, np.array(picks)], axis=1)
        self._amounts = np.concatenate([self._amounts, np.array([parts[every, pick] for pick in picks])], axis=1)
        self._losses = np.concatenate([self._losses, np.array([losses[every, pick] for pick in picks])], axis=1)

    def values(self, numbers: Options) -> Floats:
        """Tell about the least total loss within the budgets for given channels, shape (policies,).

        Where not even the cheapest pairs fit it is infinite.
        """
        rows = self.costs.rows(numbers)
        self._extend()
        amounts, losses = self._amounts[:, rows].sum(-1), self._losses[:, rows].sum(-1)
        found = self._between(amounts, losses)
        if self.costs.has_several:
            found = np.where(self.costs.leaves_room(numbers), found, np.inf)
        for group, loss in enumerate(self.of_groups):
            found = found + loss[numbers[:, group]]
        return found

    @staticmethod
    def _between(amounts: Floats, losses: Floats) -> Floats:
        """Return the loss at just the limit, between the grades beside it, shape (policies,)."""
        fits = amounts <= 1 + ROUNDING
        first = np.where(fits.any(0), fits.argmax(0), 0)
        every = np.arange(amounts.shape[1])
        before = np.maximum(first - 1, 0)
        of_first, of_before = amounts[first, every], amounts[before, every]
        gap = of_before - of_first
        share = np.where(gap > 0, (1 - of_first) / np.where(gap > 0, gap, 1.0), 0.0)
        share = np.where(first > 0, np.clip(share, 0.0, 1.0), 0.0)
        loss_first, loss_before = losses[first, every], losses[before, every]
        found = loss_first + share * (np.minimum(loss_before, loss_first) - loss_first)
        return np.where(fits.any(0), found, np.inf)

    def best_from(self, starts: Options, rounds: int = ROUNDS) -> NDArray[np.int64]:
        """Change channels, one group at a time, as long as that is better, and return the best, shape (groups,).

        Args:
            starts: Channels to begin from, shape (any, groups); the best of them is.
            rounds: How many changes there are at most.
        """
        values = self.values(starts)
        now, value = starts[int(values.argmin())], float(values.min())
        counts = self.costs.counts[: self.costs.groups]
        changes = [(group, number) for group, count in enumerate(counts.tolist()) for number in range(count)]
        for _ in range(rounds):
            near = np.repeat(now[None], len(changes) + 2, axis=0)
            for row, (group, number) in zip(near, changes, strict=False):
                row[group] = number
            near[-2] = np.maximum(now - 1, 0)
            near[-1] = np.minimum(now + 1, counts - 1)
            values = self.values(near)
            best = int(values.argmin())
            if not values[best] < value:
                break
            now, value = near[best], float(values[best])
        return now

    def after(self, numbers: Options) -> tuple[Floats, Floats, Options]:
        """Tell, by price of a unit of cost, what the decisions from any one on use and lose, and which pairs they take.

        Args:
            numbers: Channels, shape (policies, groups).

        Returns:
            What is used of the limits, all in the mean, and the losses, shape (prices, policies, decisions + 1) each, and
            options, shape (prices, policies, decisions). The last price is that at which the cheapest pairs are best.
        """
        rows = self.costs.rows(numbers)
        self._extend()
        found = []
        for table in (self._amounts, self._losses):
            of_rows = table[:, rows]
            rest = np.zeros((*of_rows.shape[:2], of_rows.shape[2] + 1))
            rest[:, :, :-1] = np.cumsum(of_rows[:, :, ::-1], axis=2)[:, :, ::-1]
            found.append(rest)
        return found[0], found[1], self._picks[:, rows]

    def widths(self, numbers: Options) -> Options:
        """Return the pairs of the flattest grade whose sum fits, for given channels, shape (policies, decisions).

        Where nothing fits these are the cheapest pairs.
        """
        rows = self.costs.rows(numbers)
        self._extend()
        fits = self._amounts[:, rows].sum(-1) <= 1 + ROUNDING
        grade = np.where(fits.any(0), fits.argmax(0), GRADES - 1)
        return self._picks[grade[:, None], rows]
