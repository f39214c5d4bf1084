"""Episodes of the environment, any number of them at once: `MixedPrecisionEnv` plays one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.base import SATURATED, Array, Choices, Observation, SearchProblem, scale_columns
from envs.plan import Plan, PlanWithin
from hw_models import BITS
from hw_models.widths import PLACES, WIDTHS, width_words

Options = NDArray[np.int64]

TINY = 1e-12


def feature_names(count: int, further: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the features, of so many of the widths and of further budgets."""
    by_width = [f"{width_words(width)}_{operand}_bits" for operand in ("weight", "activation") for width in WIDTHS[:count]]
    return (
        "position",
        "depthwise",
        "linear",
        "in_channels",
        "out_channels",
        "kernel",
        "stride",
        "positions",
        "weights",
        "macs",
        "cost_share",
        *(f"loss_increase_at_{width}" for width in by_width),
        *(f"cost_at_{width}" for width in by_width),
        "budget_left",
        "slack_left",
        "planned_weight_bits",
        "planned_activation_bits",
        "previous_weight_bits",
        "previous_activation_bits",
        "loss_increase_so_far",
        "loss_increase_in_the_end",
        *(f"{metric}_used_at_least" for metric in further),
    )


class Episodes(Choices):
    """Any number of episodes on one problem, all of them at the same step.

    What observations and actions mean is said at `envs.MixedPrecisionEnv`, which plays one of these. Nothing is random, and
    what one episode does changes nothing in another.

    Attributes:
        features: The names of the first entries of an observation; two for every step follow, the bits decided so far.
        step: How many steps were made.
        options: The options taken, shape (episodes, the problem's decisions); decisions to come have 0.
        lost: What the options taken are predicted to add to the loss, shape (episodes,).
        left: What is left of the budget, in the metric's unit, same shape.
        saturated: The actions' entries that lay at a bound, same shape.
    """

    def __init__(self, problem: SearchProblem, loss_increase: Array | None = None) -> None:
        """Make the plan of a problem, and begin no episode.

        Args:
            problem: What is to be searched.
            loss_increase: What every pair of bits is predicted to add to the loss, shape (decisions, 10, 10); None takes
                `problem.quantization_error`, of weights and of activations, in sum.

        Raises:
            ValueError: If there is nothing to decide.
        """
        super().__init__(problem)
        if loss_increase is None:
            errors = problem.quantization_error
            loss_increase = errors[:, 0, :, None] + errors[:, 1, None, :]
        self._count = BITS
        if self.high > BITS:
            self._count = PLACES
        further = []
        if self.programme is not None:
            # The peak of memory, which is no sum, comes last.
            limits = sorted(problem.limits[1:], key=lambda limit: not limit.is_sum)  # type: ignore[attr-defined]
            further = [limit.metric for limit in limits]
        self.features = feature_names(self._count, further)
        fixed = sum(float(decision.prices[0]) for decision in problem.decisions if len(decision.pairs) == 1)
        self._total = problem.limit - fixed
        self._loss_increase = loss_increase[self.free]
        self._losses = [decision.of(table) for decision, table in zip(self.decisions, self._loss_increase, strict=True)]
        self._plan = Plan(self._losses, [decision.prices for decision in self.decisions], self._total)
        self._within: PlanWithin | None = None
        if self.programme is not None:
            losses = [np.zeros(len(decision.pairs)) for decision in problem.decisions]
            for index, loss in zip(self.free, self._losses, strict=True):
                losses[index] = loss
            self._within = PlanWithin(losses, self.programme)
        self._layers = self._describe_layers()
        # What is added to the loss if every step follows the plan.
        planned = self._plan.least(0, self._total)
        if self._within is not None:
            planned = self._within.plan(np.zeros((1, 0), np.int64))[1][0]
        self._least_of_all = max(float(planned), TINY)
        self.begin(0)

    @property
    def is_over(self) -> bool:
        """Say whether every decision is made."""
        return self.step == len(self.decisions)

    @property
    def size(self) -> int:
        """Count the entries of an observation."""
        return len(self.features) + 2 * len(self.decisions)

    @property
    def saturation(self) -> Array:
        """Return the share of the actions that lay at a bound, of episodes that are over, shape (episodes,)."""
        share: Array = self.saturated / (2 * len(self.decisions))
        return share

    def begin(self, count: int) -> Observation:
        """Begin so many episodes anew.

        Args:
            count: How many.

        Returns:
            What is seen before the first step, shape (episodes, entries).
        """
        self.step = 0
        self.options: Options = np.zeros((count, len(self.problem.decisions)), np.int64)
        self.left = np.full(count, self._total)
        self.lost = np.zeros(count)
        self.saturated = np.zeros(count, np.int64)
        self._decided = np.tile(np.array([of_options[-1] for of_options in self.rungs]), (count, 1, 1))
        self._make_plan()
        return self._observe()

    def act(self, actions: NDArray[np.floating]) -> Observation:
        """Decide the bits of the next layer, or of layers that are tied, in every episode.

        Args:
            actions: From -1 to 1, shape (episodes, 2).

        Returns:
            What is seen then, shape (episodes, entries).
        """
        return self.take(self._chosen(np.asarray(actions, float)), actions)

    def take(self, options: Options, actions: NDArray[np.floating] | None = None) -> Observation:
        """Take options of the next decision, which must be affordable, whatever action asks for them.

        Args:
            options: Indices, shape (episodes,).
            actions: What asked for them, of which those at a bound are counted.

        Returns:
            What is seen then, shape (episodes, entries).
        """
        step = self.step
        self.options[:, self.free[step]] = options
        self._decided[:, step] = self.rungs[step][options]
        self.left = self.left - self.decisions[step].prices[options]
        self.lost = self.lost + self._losses[step][options]
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

    def actions_for(self, widths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the actions that ask for just these widths at the present step.

        Args:
            widths: Numbers in the order of the widths (`envs.base.rungs`), shape (episodes, 2).

        Returns:
            Actions, same shape.
        """
        planned = self.rungs[self.step][self._planned].astype(float)
        asked = widths.astype(float)
        reach = np.where(asked > planned, self.high - planned, planned - self.low)
        return np.clip((asked - planned) / np.where(reach > 0, reach, 1), -1, 1).astype(np.float32)

    def actions_taking(self, options: Options) -> NDArray[np.float32]:
        """Return the actions that ask for just these options of the present step.

        Args:
            options: Numbers of options, shape (episodes,).

        Returns:
            Actions in [-1, 1], float32, shape (episodes, 2).
        """
        return self.actions_for(self.rungs[self.step][options])

    def _taken(self) -> Options:
        """Return the options of all decisions before the one of this step, shape (episodes, decisions)."""
        following = len(self.problem.decisions)
        if not self.is_over:
            following = self.free[self.step]
        return self.options[:, :following]

    def _make_plan(self) -> None:
        """Find what the plan gives to this step, and what loss it predicts for those that follow."""
        if self._within is not None:
            self._planned, self._rest = self._within.plan(self._taken())
            return
        self._rest = self._plan.least(self.step, self.left)
        self._planned = np.zeros(len(self.options), np.int64)
        if not self.is_over:
            self._planned = self._plan.option(self.step, self.left)

    def _chosen(self, actions: Array) -> Options:
        """The options nearest to what is asked for, of those that can be afforded."""
        rungs = self.rungs[self.step]
        planned = rungs[self._planned].astype(float)
        asked = planned + np.where(actions > 0, actions * (self.high - planned), actions * (planned - self.low))
        distance = np.square(rungs - asked[:, None]).sum(2)
        if self._within is not None:
            return self._within.firsts(self._taken(), distance)
        prices = self.decisions[self.step].prices
        spare = self.left - self._plan.cheapest_from[self.step + 1] + 1e-9 * self.problem.limit
        chosen: Options = np.where(prices <= spare[:, None], distance, np.inf).argmin(1)
        return chosen

    def _describe_layers(self) -> Array:
        """The features of the decided layers that never change, each scaled to -1..1 over the layers."""
        layers = [self.problem.workload.layers[decision.layers[0]] for decision in self.decisions]
        cost = np.array([self.problem.cost[list(decision.layers)].sum(0) for decision in self.decisions])
        highest = cost[:, self.high - 1, self.high - 1]
        columns = np.array(
            [
                np.arange(len(layers)),
                [layer.kind == "depthwise" for layer in layers],
                [layer.kind == "linear" for layer in layers],
                np.log([layer.in_channels for layer in layers]),
                np.log([layer.out_channels for layer in layers]),
                [layer.kernel[0] for layer in layers],
                [layer.stride[0] for layer in layers],
                np.log([layer.calls[0].positions for layer in layers]),
                np.log([layer.weights for layer in layers]),
                np.log([layer.macs for layer in layers]),
                highest,
            ],
            dtype=float,
        ).T
        top = self._count - 1
        by_weights = self._loss_increase[:, : self._count, top]
        increases = np.concatenate([by_weights, self._loss_increase[:, top, : self._count]], axis=1)
        # They differ by orders of magnitude: what counts is how large one is beside the largest.
        increases = np.log10(np.maximum(increases / max(increases.max(), TINY), 1e-4)) / 2 + 1
        by_weights = cost[:, : self._count, self.high - 1]
        costs = np.concatenate([by_weights, cost[:, self.high - 1, : self._count]], axis=1) / highest[:, None]
        return np.concatenate([scale_columns(columns), increases, 2 * costs - 1], axis=1)

    def _observe(self) -> Observation:
        count, steps, step = len(self.options), len(self.decisions), self.step
        last = min(step, steps - 1)
        previous = np.full((count, 2), self.high)
        if step > 0:
            previous = self._decided[:, last - 1]
        planned = previous
        if not self.is_over:
            planned = self.rungs[step][self._planned]
        reach = max(self.high - self.low, 1)
        expected = self.lost + self._rest
        dynamic = [
            self.left / max(self._total, TINY),
            self._slack_left(),
            *((planned - self.low) / reach).T,
            *((previous - self.low) / reach).T,
            self.lost / np.maximum(expected, TINY),
            np.log2(np.maximum(expected / self._least_of_all, 1.0)) / 4,
        ]
        if self.programme is not None:
            dynamic += [*self.programme.used_after(self._taken())[:, 1:].T]
        decided = 2 * (self._decided - self.low) / reach - 1
        decided[:, step:] = 0
        fixed = np.broadcast_to(self._layers[last], (count, self._layers.shape[1]))
        parts = (fixed, 2 * np.stack(dynamic, axis=1) - 1, decided.reshape(count, 2 * steps))
        return np.clip(np.concatenate(parts, axis=1), -1, 1).astype(np.float32)

    def _slack_left(self) -> Array:
        """The share that is left of what the budget leaves beyond the cheapest policy, shape (episodes,)."""
        slack = self._total - self._plan.cheapest_from[0]
        if slack <= 0:
            return np.zeros(len(self.left))
        share: Array = (self.left - self._plan.cheapest_from[self.step]) / slack
        return share
