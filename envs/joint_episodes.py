"""Episodes that decide channels and then widths, any number of them at once: `PruneAndQuantizeEnv` plays one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.base import SATURATED, Array, Observation, SearchProblem, rungs, scale_columns
from hw_models.widths import PLACES, WIDTHS, width_words
from quantizers import BitPolicy

Options = NDArray[np.int64]
Flags = NDArray[np.bool_]

TINY = 1e-12
ROUNDING = 1e-9  # relative slack of a budget
SLOTS = 8  # shares of channels that an observation has an entry for
DECADES = 4  # over which predicted losses are told apart


class Plans(Protocol):
    """What is best for any channels if losses add up; `haq.problem.joint.Grades` has it."""

    def values(self, numbers: Options) -> Array:
        """Tell about the least total loss within the budgets for given channels, shape (episodes,)."""
        ...

    def after(self, numbers: Options) -> tuple[Array, Array, Options]:
        """Tell, by price of a unit of cost, what the decisions from any one on use and lose, and which pairs they take.

        Shapes are (prices, episodes, decisions + 1) twice, and (prices, episodes, decisions).
        """
        ...


class Joint(Protocol):
    """What there is to know of the costs of channels and widths; `haq.problem.joint.JointCosts` has it."""

    groups: int
    pairs: list[NDArray[np.int64]]
    counts: NDArray[np.int64]
    free: NDArray[np.intp]
    anchor: NDArray[np.int64]

    def planned(self, losses: Sequence[Array]) -> tuple[int, ...]:
        """Find the options with a small total loss within all budgets."""
        ...

    def plans(self, losses: Sequence[Array]) -> Plans:
        """Return what is best for any channels if losses add up."""
        ...

    def leaves_room(self, numbers: Options) -> Flags:
        """Tell for which channels the cheapest pairs are within all budgets."""
        ...

    def cheapest(self, numbers: Options) -> Options:
        """Return the pairs that use least of the limits for given channels."""
        ...

    def used(self, options: Options) -> Array:
        """Return what policies use of every limit, in parts of it."""
        ...

    def totals(self, options: Options) -> Array:
        """Return what policies cost by every limit that is a sum, the main one first."""
        ...

    def parts(self, options: Options) -> Array:
        """Return what every decision uses of the limits that are sums, all in the mean, shape (episodes, decisions)."""
        ...

    def used_instead(self, options: Options, place: int) -> Array:
        """Return what is used of every limit with each option of one place."""
        ...


class JointProblem(SearchProblem, Protocol):
    """What the environment needs of a problem of channels and widths; `haq.Problem(..., prune=...)` has it."""

    @property
    def channel_decisions(self) -> Sequence[Any]:
        """What there is to choose of channels, each with shares, counts, errors and layers."""
        ...

    @property
    def joint(self) -> Any:
        """The costs (`Joint`)."""
        ...

    def keep_of(self, numbers: Any) -> dict[str, float]:
        """Return what policies call `keep` for an option of every channel decision.

        Args:
            numbers: The number of an option for each channel decision, in order.

        Returns:
            Shares of channels, by the group's name.
        """
        ...

    def decide(self, pairs: Any, keep: Any = None) -> BitPolicy:
        """Make a policy of a pair of widths for every decision, float being 32, and of what is kept."""
        ...


FEATURES = (
    "position",
    "widths",
    "depthwise",
    "linear",
    "in_channels",
    "out_channels",
    "kernel",
    "stride",
    "positions",
    "weights",
    "macs",
    *(f"loss_increase_at_share_{slot}" for slot in range(SLOTS)),
    *(f"loss_increase_at_{width_words(width)}_weight_bits" for width in WIDTHS),
    *(f"loss_increase_at_{width_words(width)}_activation_bits" for width in WIDTHS),
    "share_kept",
    "used_at_least",
    "planned_share_or_weight_bits",
    "planned_activation_bits",
    "previous_share_or_weight_bits",
    "previous_activation_bits",
    "loss_increase_so_far",
    "loss_increase_in_the_end",
)


class JointEpisodes:
    """Any number of episodes on one problem of channels and widths, all of them at the same step.

    What observations and actions mean is said at `envs.PruneAndQuantizeEnv`, which plays one of these. Nothing is random, and
    what one episode does changes nothing in another.

    Attributes:
        problem: What is searched.
        features: The names of the first entries of an observation; two for every step follow, what was decided so far.
        free: The places in an option vector that are decided, in this order: channels, then widths.
        step: How many steps were made.
        options: The options taken, shape (episodes, places); those to come hold what is cheapest.
        saturated: The actions' entries that lay at a bound, shape (episodes,).
    """

    features = FEATURES

    def __init__(self, problem: JointProblem, losses: Sequence[Array] | None = None) -> None:
        """Make the plan of a problem, and begin no episode.

        Args:
            problem: What is to be searched.
            losses: What every option is predicted to add to the loss, by place in an option vector; None takes the relative
                squared errors of calibration, and of channels the part of the squared weights that goes with them.

        Raises:
            ValueError: If there is nothing to decide.
        """
        self.problem = problem
        self.joint: Joint = problem.joint
        self.free = [int(place) for place in self.joint.free]
        if not self.free:
            raise ValueError(
                "every group has a single share and every layer a single pair of bits: there is nothing to decide"
            )
        if losses is None:
            losses = default_losses(problem)
        self._losses = [np.asarray(row, float) for row in losses]
        self._rungs = [rungs(pairs) for pairs in self.joint.pairs]
        every = np.concatenate(
            [self._rungs[place - self.joint.groups] for place in self.free if self._is_widths(place)] or [[1]]
        )
        self._low, self._high = int(np.min(every)), int(np.max(every))
        self._plans = self.joint.plans(self._losses)
        self._plan = np.array(self.joint.planned(self._losses), np.int64)
        self._fixed = self._describe_steps()
        self._least_of_all = max(self._sum_of(self._plan), TINY)
        self.begin(0)

    @property
    def is_over(self) -> bool:
        """Say whether everything is decided."""
        return self.step == len(self.free)

    @property
    def size(self) -> int:
        """Count the entries of an observation."""
        return len(self.features) + 2 * len(self.free)

    @property
    def saturation(self) -> Array:
        """Return the share of the actions that lay at a bound, of episodes that are over, shape (episodes,)."""
        share: Array = self.saturated / (2 * len(self.free))
        return share

    def begin(self, count: int) -> Observation:
        """Begin so many episodes anew.

        Args:
            count: How many.

        Returns:
            What is seen before the first step, shape (episodes, entries).
        """
        self.step = 0
        groups = self.joint.groups
        self.options: Options = np.zeros((count, len(self.joint.counts)), np.int64)
        self.options[:, :groups] = self.joint.anchor
        self.saturated = np.zeros(count, np.int64)
        self._lost = np.zeros(count)
        self._decided = np.zeros((count, len(self.free), 2))
        self._has_widths = False
        self._make_plan()
        return self._observe()

    def act(self, actions: NDArray[np.floating]) -> Observation:
        """Decide the channels of the next group, or the bits of the next layers, in every episode.

        Args:
            actions: From -1 to 1, shape (episodes, 2).

        Returns:
            What is seen then, shape (episodes, entries).
        """
        return self.take(self._chosen(np.asarray(actions, float)), actions)

    def take(self, options: Options, actions: NDArray[np.floating] | None = None) -> Observation:
        """Take options of the next decision, after which the budgets can be kept, whatever action asks for them.

        Args:
            options: Indices, shape (episodes,).
            actions: What asked for them, of which those at a bound are counted.

        Returns:
            What is seen then, shape (episodes, entries).
        """
        place = self.free[self.step]
        self.options[:, place] = options
        self._decided[:, self.step] = self._scaled(place, options)
        self._lost = self._lost + self._losses[place][options]
        if actions is not None:
            self.saturated += (np.abs(actions) > SATURATED).sum(1)
        self.step += 1
        self._make_plan()
        return self._observe()

    def planned(self) -> Options:
        """Return the options that the plan gives to what this step decides.

        Returns:
            Numbers of options, shape (episodes,).
        """
        return self._planned

    def actions_taking(self, options: Options) -> NDArray[np.float32]:
        """Return the actions that ask for just these options of the present step.

        Args:
            options: Numbers of options, shape (episodes,).

        Returns:
            Actions in [-1, 1], float32, shape (episodes, 2).
        """
        place = self.free[self.step]
        asked, planned = self._coordinates(place, options), self._coordinates(place, self._planned)
        low, high = self._bounds(place)
        reach = np.where(asked > planned, high - planned, planned - low)
        return np.clip((asked - planned) / np.where(reach > 0, reach, 1), -1, 1).astype(np.float32)

    def possible(self) -> Flags:
        """Tell after which options of the present step all budgets can be kept.

        Returns:
            Booleans, shape (episodes, options).
        """
        place = self.free[self.step]
        if self._is_widths(place):
            found: Flags = np.all(self.joint.used_instead(self.options, place) <= 1 + ROUNDING, axis=-1)
            return found
        groups, count = self.joint.groups, int(self.joint.counts[place])
        numbers = np.repeat(self.options[:, None, :groups], count, axis=1)
        numbers[:, :, place] = np.arange(count)
        return self.joint.leaves_room(numbers.reshape(-1, groups)).reshape(-1, count)

    def _is_widths(self, place: int) -> bool:
        return place >= self.joint.groups

    def _coordinates(self, place: int, options: Options) -> Array:
        """Return options as points, shape (episodes, 2): the number of a share twice, or of both widths."""
        if self._is_widths(place):
            return self._rungs[place - self.joint.groups][options].astype(float)
        return np.repeat(np.asarray(options, float)[:, None], 2, axis=1)

    def _bounds(self, place: int) -> tuple[int, int]:
        """Return the least and the largest coordinate."""
        if self._is_widths(place):
            return self._low, self._high
        return 0, int(self.joint.counts[place]) - 1

    def _scaled(self, place: int, options: Options) -> Array:
        """Return options as entries of an observation, from -1 to 1, shape (episodes, 2)."""
        low, high = self._bounds(place)
        return 2 * (self._coordinates(place, options) - low) / max(high - low, 1) - 1

    def _chosen(self, actions: Array) -> Options:
        """The options nearest to what is asked for, of those after which all budgets can be kept."""
        place = self.free[self.step]
        planned = self._coordinates(place, self._planned)
        low, high = self._bounds(place)
        asked = planned + np.where(actions > 0, actions * (high - planned), actions * (planned - low))
        every = self._coordinates(place, np.arange(self.joint.counts[place]))
        if not self._is_widths(place):
            # Of channels there is one number to choose.
            every, asked = every[:, :1], asked[:, :1]
        distance = np.square(every - asked[:, None]).sum(2)
        possible = self.possible()
        chosen: Options = np.where(possible, distance, np.inf).argmin(1)
        # What is there already leads within the budgets, if anything does.
        return np.where(possible.any(1), chosen, self.options[:, place])

    def _make_plan(self) -> None:
        """Find what the plan gives to this step, and what loss it predicts for those that follow."""
        count, groups = len(self.options), self.joint.groups
        place = len(self.joint.counts)
        if not self.is_over:
            place = self.free[self.step]
        if not self._is_widths(place):
            self._planned = np.full(count, self._plan[place])
            numbers = self.options[:, :groups].copy()
            numbers[:, place:] = self._plan[place:groups]
            values = self._plans.values(numbers)
            rest = values - self._lost
            self._rest = np.where(np.isfinite(rest), np.maximum(rest, 0.0), self._least_of_all)
            return
        if not self._has_widths:
            self._begin_widths()
        decision = place - groups
        left = 1 - self.joint.parts(self.options)[:, :decision].sum(1)
        amounts, losses, picks = self._after
        fits = amounts[:, :, decision] <= left + ROUNDING
        grade = np.where(fits.any(0), fits.argmax(0), len(amounts) - 1)
        every = np.arange(count)
        self._rest = losses[grade, every, decision]
        self._planned = np.zeros(count, np.int64)
        if not self.is_over:
            self._planned = picks[grade, every, decision]

    def _begin_widths(self) -> None:
        """Go over to widths: channels are decided, and all layers take the cheapest pair until they are decided too."""
        groups = self.joint.groups
        self._has_widths = True
        numbers = self.options[:, :groups]
        self.options[:, groups:] = self.joint.cheapest(numbers)
        self._after = self._plans.after(numbers)

    def _sum_of(self, options: Options) -> float:
        return float(sum(row[option] for row, option in zip(self._losses, options, strict=True)))

    def _describe_steps(self) -> Array:
        """The features of the steps that never change, each scaled to -1..1 over the steps."""
        layers = self.problem.workload.layers
        columns, increases = [], []
        for number, place in enumerate(self.free):
            if self._is_widths(place):
                of_place = [layers[index] for index in self.problem.decisions[place - self.joint.groups].layers]
            else:
                of_place = [layers[index] for index in self.problem.channel_decisions[place].layers]
            first = of_place[0]
            columns.append(
                [
                    number,
                    float(self._is_widths(place)),
                    float(first.kind == "depthwise"),
                    float(first.kind == "linear"),
                    np.log(first.in_channels),
                    np.log(first.out_channels),
                    first.kernel[0],
                    first.stride[0],
                    np.log(first.calls[0].positions),
                    np.log(sum(layer.weights for layer in of_place)),
                    np.log(sum(layer.macs for layer in of_place)),
                ]
            )
            increases.append(self._increases_at(place))
        largest = max(float(np.max(increases)), TINY)
        scaled = np.log10(np.maximum(np.array(increases) / largest, 10.0**-DECADES)) / (DECADES / 2) + 1
        return np.concatenate([scale_columns(np.array(columns, float)), scaled], axis=1)

    def _increases_at(self, place: int) -> Array:
        """Return what a step's options are predicted to add to the loss: by share, by width of weights and of activations."""
        found = np.zeros(SLOTS + 2 * PLACES)
        losses = self._losses[place]
        if not self._is_widths(place):
            slots = np.linspace(0, len(losses) - 1, SLOTS)
            found[:SLOTS] = np.interp(slots, np.arange(len(losses)), losses)
            return found
        numbers = self._rungs[place - self.joint.groups]
        for operand in (0, 1):
            for rung in np.unique(numbers[:, operand]):
                # With the most bits of the other operand.
                found[SLOTS + operand * PLACES + rung - 1] = losses[numbers[:, operand] == rung].min()
        return found

    def _observe(self) -> Observation:
        count, steps = len(self.options), len(self.free)
        last = min(self.step, steps - 1)
        place = self.free[last]
        previous = np.ones((count, 2))
        if self.step > 0:
            previous = self._decided[:, self.step - 1]
        planned = previous
        if not self.is_over:
            planned = self._scaled(place, self._planned)
        expected = self._lost + self._rest
        dynamic = [
            2 * self._kept() - 1,
            2 * np.clip(self._least_used(), 0, 1) - 1,
            *planned.T,
            *previous.T,
            2 * self._lost / np.maximum(expected, TINY) - 1,
            np.log2(np.maximum(expected / self._least_of_all, 1.0)) / 2 - 1,
        ]
        fixed = np.broadcast_to(self._fixed[last], (count, self._fixed.shape[1]))
        parts = (fixed, np.stack(dynamic, axis=1), self._decided.reshape(count, 2 * steps))
        return np.clip(np.concatenate(parts, axis=1), -1, 1).astype(np.float32)

    def _kept(self) -> Array:
        """Return the share of all channels that is kept, as far as it is decided, shape (episodes,)."""
        kept, every = np.zeros(len(self.options)), 0.0
        for number, channel in enumerate(self.problem.channel_decisions):
            counts = np.asarray(channel.counts, float)
            kept = kept + counts[self.options[:, number]]
            every += float(counts[-1])
        return kept / max(every, 1.0)

    def _least_used(self) -> Array:
        """Return the part of the tightest limit that is used in the end at least, shape (episodes,)."""
        groups = self.joint.groups
        options = self.options
        if not self._has_widths:
            options = np.concatenate([options[:, :groups], self.joint.cheapest(options[:, :groups])], axis=1)
        if not len(options):
            return np.zeros(0)
        found: Array = self.joint.used(options).max(1)
        return found


def default_losses(problem: JointProblem) -> list[Array]:
    """Return what options are taken to lose where nothing is predicted, by place in an option vector.

    That are the relative squared errors of calibration, of weights and activations in sum; of channels the part of the squared
    weights that is removed with them.

    Args:
        problem: What is to be searched.
    """
    found = [np.asarray(channel.errors, float) for channel in problem.channel_decisions]
    for table, pairs in zip(problem.quantization_error, problem.joint.pairs, strict=True):
        numbers = rungs(pairs) - 1
        found.append(table[0, numbers[:, 0]] + table[1, numbers[:, 1]])
    return found
