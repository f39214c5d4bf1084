"""The policies of a problem of channels and widths as rows of option numbers: what `haq.solvers.space` is for widths alone.

A row has an option for every channel decision, and then for every decision of widths. What it costs is no sum over them
(`haq.problem.joint`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import quantizers as Q
from haq.problem.channels import ChannelProblem, chooses_channels
from haq.problem.joint import Grades
from haq.problem.limits import ROUNDING
from haq.problem.problem import NotAllowed, Problem
from haq.problem.programme import STEP
from haq.solvers.removal import removal_losses
from haq.solvers.space import MOST_LOWERED, Flags, Floats, Options, Space
from hw_models.widths import places

NEAR_ROUNDS = 4  # changes of channels that a quick plan makes at most
DRAWN_STARTS = 6  # channels at random that it begins from
DRAWING = "drawing space"  # what `drawing_space` is kept as
BALANCE = 1.5  # standard deviation of the logarithm of what channels count beside widths, in random plans


class JointSpace(Space):
    """What a problem of channels and widths lets one choose.

    Attributes:
        groups: How many channel decisions there are: they come first in an option vector.
        joint: What policies cost.
    """

    problem: ChannelProblem

    def __init__(self, problem: ChannelProblem, removal: Sequence[Floats] | None = None) -> None:
        """Lay out the options of a problem.

        Args:
            problem: The problem.
            removal: What the removal of channels is predicted to lose, by channel decision, shape (options,) each; None: the
                part of the squared weights that goes with them.
        """
        self.problem = problem
        self.joint = problem.joint
        self.groups = self.joint.groups
        self.counts = self.joint.counts
        self.free = self.joint.free
        self.limits = np.ones(len(self.joint.limits))
        most = int(self.counts.max())
        self.there = np.arange(most) < self.counts[:, None]
        if removal is None:
            removal = [channel.errors for channel in problem.channel_decisions]
        self.removal = [np.asarray(of_group, float) for of_group in removal]
        self.errors = np.zeros((len(self.counts), most, 2))
        self._pairs = np.zeros((len(self.joint.pairs), most, 2), np.int64)
        for row, pairs in enumerate(self.joint.pairs):
            self._pairs[row, : len(pairs)] = pairs
            self.errors[self.groups + row, : len(pairs)] = self._errors_of(row, pairs)
        self._scale = max(float(self.errors.max(initial=0.0)), 1e-12)
        largest = max([float(of_group.max(initial=0.0)) for of_group in self.removal], default=0.0) or 1.0
        for row, of_group in enumerate(self.removal):
            # Roots, as those of the widths, and as large as these: a process takes both for alike until it knows more.
            self.errors[row, : len(of_group), 0] = self._scale * np.sqrt(np.maximum(of_group / largest, 0.0))
        self._set_more()
        self._number = [{(int(w), int(a)): i for i, (w, a) in enumerate(pairs)} for pairs in self.joint.pairs]
        spans = np.ptp(np.where(self.there[..., None], self.errors, self.errors[:, :1]), axis=1)
        self._columns = np.argwhere(spans > 0)
        self._fixed = np.argwhere(spans <= 0)

    def _set_more(self) -> None:
        """Tell which options have more channels, or more bits somewhere and nowhere less: [place, option, other]."""
        count, most = self.there.shape
        self._more = np.zeros((count, most, most), bool)
        numbers = np.arange(most)
        self._more[: self.groups] = numbers[None, :] > numbers[:, None]
        pairs = self._pairs
        no_less: Flags = np.all(pairs[:, None, :] >= pairs[:, :, None], axis=-1)
        differs: Flags = np.any(pairs[:, None, :] != pairs[:, :, None], axis=-1)
        self._more[self.groups :] = no_less & differs
        self._more &= self.there[:, None, :]
        # Of options that cost the same the one with more is dearer by a trifle.
        self._size = np.zeros((count, most))
        self._size[: self.groups] = numbers
        self._size[self.groups :] = pairs.sum(2)
        self._size *= 1e-12

    def policy(self, options: Sequence[int] | Options) -> Q.BitPolicy:
        """Make the policy of an option vector."""
        numbers = [int(option) for option in options[: self.groups]]
        pairs = [of[int(pick)] for of, pick in zip(self.joint.pairs, options[self.groups :], strict=True)]
        return self.problem.decide(pairs, self.problem.keep_of(numbers))

    def options(self, policy: Q.BitPolicy) -> tuple[int, ...] | None:
        """Return the option vector of a policy; None if it takes something that isn't among the options."""
        try:
            found = [int(number) for number in self.problem.numbers_of(policy.keep)]
        except NotAllowed:
            return None
        w, a = self.problem.bit_arrays(policy)
        for decision, numbers in zip(self.problem.decisions, self._number, strict=True):
            number = numbers.get((int(w[decision.layers[0]]), int(a[decision.layers[0]])))
            if number is None:
                return None
            found.append(number)
        return tuple(found)

    def features_of(self, policy: Q.BitPolicy) -> Floats:
        """Describe any policy of the network whose channels are among the options, shape (features,)."""
        errors = self._errors_at(policy)
        return errors[self._columns[:, 0], self._columns[:, 1]] / self._scale

    def describes(self, policy: Q.BitPolicy) -> bool:
        """Tell whether the features of a policy of the network say all of it; see `Space.describes`."""
        pairs = np.stack(self.problem.bit_arrays(policy), axis=1)
        for decision in self.problem.decisions:
            if (pairs[list(decision.layers)] != pairs[decision.layers[0]]).any():
                return False
        try:
            errors = self._errors_at(policy)
        except NotAllowed:
            return False
        rows, operands = self._fixed.T
        return bool((errors[rows, operands] == self.errors[rows, 0, operands]).all())

    def _errors_at(self, policy: Q.BitPolicy) -> Floats:
        """Return the roots of errors that a policy leaves, by place, shape (places, 2)."""
        found = np.zeros((len(self.counts), 2))
        for row, number in enumerate(self.problem.numbers_of(policy.keep)):
            found[row] = self.errors[row, int(number)]
        w, a = self.problem.bit_arrays(policy)
        for row, decision in enumerate(self.problem.decisions):
            pair = np.array([[w[decision.layers[0]], a[decision.layers[0]]]])
            found[self.groups + row] = self._errors_of(row, pair)[0]
        return found

    def totals(self, options: Options) -> Floats:
        """Return what policies cost by every limit that is a sum, shape (policies, limits)."""
        return self.joint.totals(options)

    def fits(self, options: Options) -> Flags:
        """Tell which policies are within all budgets, shape (policies,)."""
        return self.joint.fits(options)

    def planned(self, losses: Sequence[Floats]) -> tuple[int, ...]:
        """Find options with a small total loss within all budgets; see `haq.problem.joint.JointCosts.planned`."""
        return self.joint.planned(losses)

    def planned_quickly(self, losses: Sequence[Floats], draws: np.random.Generator) -> Options:
        """Find options with a small total loss within all budgets; shape (1, places), or (0, places) where none is found."""
        grades = Grades(self.joint, losses)
        drawn = (draws.random((DRAWN_STARTS, self.groups)) * self.counts[: self.groups]).astype(np.int64)
        starts = np.concatenate([drawn, self.joint.anchor[None]])
        numbers = grades.best_from(starts, NEAR_ROUNDS)[None]
        found = np.concatenate([numbers, grades.widths(numbers)], axis=1)
        return self.filled(self.lowered(found, draws), draws)

    def balanced(self, weights: Floats, draws: np.random.Generator) -> Floats:
        """Weigh all channels against all widths by one more random factor: from few bits to few channels.

        Args:
            weights: A random weight of every place and operand, shape (places, 1, 2).
            draws: What is drawn from.

        Returns:
            Weights of that shape.
        """
        found = weights.copy()
        found[: self.groups] *= np.exp(BALANCE * draws.standard_normal())
        return found

    def losses(self, increases: Floats) -> list[Floats]:
        """Return what every option is predicted to lose, by place.

        Args:
            increases: How much every pair of widths raises the loss, shape (decisions, 10, 10).
        """
        found = list(self.removal)
        for table, pairs in zip(increases, self.joint.pairs, strict=True):
            where = places(pairs)
            found.append(table[where[:, 0], where[:, 1]])
        return found

    def first_policies(self, losses: Sequence[Floats]) -> list[tuple[int, ...]]:
        """List the policies that every search of channels and widths should know of.

        Args:
            losses: What options are predicted to lose, by place.

        Returns:
            The plan for these losses; the best widths with all channels, and with every equal share of them; and the channels
            that are best if all widths are the largest. Those that don't fit are left out.
        """
        found = [self.planned(losses)]
        widest = [np.where(self._is_widest(row), loss, np.inf) for row, loss in enumerate(losses[self.groups :])]
        grades = Grades(self.joint, [*losses[: self.groups], *widest])
        diagonals = self.joint.diagonals()
        starts = [(numbers, losses[self.groups :]) for numbers in diagonals]
        at_widest = grades.best_from(np.concatenate([diagonals, self.joint.anchor[None]]))
        starts.insert(1, (at_widest, widest))
        for numbers, of_pairs in starts:
            picks = self.joint.best_widths(numbers, of_pairs)
            if picks is not None:
                found.append((*numbers.tolist(), *picks))
        return list(dict.fromkeys(found))

    def _is_widest(self, decision: int) -> Flags:
        """Tell which pairs of a decision no other has more bits than, shape (options,)."""
        count = self.counts[self.groups + decision]
        has_more: Flags = np.any(self._more[self.groups + decision, :count, :count], axis=1)
        return ~has_more

    def random(self, count: int, draws: np.random.Generator) -> Options:
        """Draw policies that fill the budgets: so many, or fewer, but one at least."""
        found = self.lowered(self.drawn(count, draws), draws)
        if not len(found):
            found = np.array([self.planned([draws.random(size) for size in self.counts])])
        return self.filled(found, draws)

    def lowered(self, options: Options, draws: np.random.Generator) -> Options:
        """Lower decisions at random, channels as well as widths, until all budgets hold; see `Space.lowered`."""
        options = options.copy()
        order = self.free[draws.permutation(len(self.free))]
        for turn in range(MOST_LOWERED * len(self.free)):
            over = np.flatnonzero(~self.fits(options))
            if not len(over):
                return options
            if turn % len(order) == 0:
                order = self.free[draws.permutation(len(self.free))]
            place = int(order[turn % len(order)])
            # Policies differ in which decisions are lowered, and not only in the options.
            rows = over[draws.random(len(over)) < 0.5]
            if not len(rows):
                continue
            excess = self._excess_at(options[rows], place)
            now = np.take_along_axis(excess, options[rows, place][:, None], 1)
            picked = _picked(excess < now - STEP, draws)
            moved = picked >= 0
            options[rows[moved], place] = picked[moved]
        return options[self.fits(options)]

    def _excess_at(self, options: Options, place: int) -> Floats:
        """Tell by how much limits are exceeded, in parts of them, with each option of a place, shape (policies, options)."""
        parts = self.joint.used_instead(options, place) - 1
        found: Floats = np.where(parts > ROUNDING, parts, 0.0).sum(-1)
        return found

    def filled(self, options: Options, draws: np.random.Generator) -> Options:
        """Fill the budgets: in random order, decisions get more channels or bits as far as all limits allow.

        First any that fit, then the most that fits; see `Space.filled`.
        """
        options = options.copy()
        if not len(options):
            return options
        every = np.arange(len(options))
        for dearest in (False, True):
            for place in self.free[draws.permutation(len(self.free))].tolist():
                used = self.joint.used_instead(options, place)
                count = used.shape[1]
                fitting = np.all(used <= 1 + ROUNDING, axis=-1) & self._more[place, options[:, place], :count]
                if dearest:
                    prices = np.where(fitting, used[:, :, 0] + self._size[place, :count], -np.inf)
                    picked = np.where(fitting.any(1), prices.argmax(1), -1)
                else:
                    picked = _picked(fitting, draws)
                moved = picked >= 0
                options[every[moved], place] = picked[moved]
        return options


def _picked(among: Flags, draws: np.random.Generator) -> Options:
    """Draw one true entry of every row, -1 where there is none."""
    scores = np.where(among, draws.random(among.shape), -1.0)
    return np.where(among.any(1), scores.argmax(1), -1)


def space_of(problem: Problem) -> Space:
    """Lay out the options of a problem: of widths, or of channels and widths.

    Args:
        problem: The problem.

    Returns:
        Its space.
    """
    if chooses_channels(problem):
        return JointSpace(problem, removal_losses(problem))
    return Space(problem)


def drawing_space(problem: ChannelProblem) -> JointSpace:
    """Lay out the options of a problem of channels and widths for one who draws at random; it is made once for its limits."""
    kept = problem.joint.kept
    found = kept.get(DRAWING)
    if found is None:
        found = kept[DRAWING] = JointSpace(problem)
    assert isinstance(found, JointSpace)
    return found


def option_counts(problem: Problem) -> list[int]:
    """Count the options of everything that a problem lets one decide: of channels, if there are any, then of widths."""
    if chooses_channels(problem):
        counts: list[int] = problem.joint.counts.tolist()
        return counts
    return [len(decision.pairs) for decision in problem.decisions]
