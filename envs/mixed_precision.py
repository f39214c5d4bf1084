"""The Gymnasium environment in which an agent chooses the bits of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.base import (
    SATURATED,
    Array,
    Judge,
    Observation,
    PolicyEnv,
    SearchProblem,
    Step,
    checked_action,
    scale_columns,
    unit_box,
)
from envs.plan import Plan, PlanWithin
from hw_models import BITS
from hw_models.widths import PLACES, WIDTHS, place_of, width_words

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


class MixedPrecisionEnv(PolicyEnv):
    """Choose weight and activation widths for every layer, within one hardware budget or several.

    ## Description
    One episode decides one policy, one step one decision: a layer, or layers that are tied (those with a single allowed pair
    are decided already). The budget shapes the action: what a step may spend is what is left after the cheapest choice for
    every later layer, so every finished episode meets the budget and none can hit a wall at its end. Of several budgets all
    are met: a step takes nothing after which no choice for the later layers is within all of them.

    At every step there is a plan for what is left: the pairs with the least predicted loss that fit the budget
    (`envs.Plan`; several: `envs.PlanWithin`). Actions are relative to it, and it is made anew after each step, so a deviation
    is made good, as far as it can be, by the layers that follow.

    ## Action space
    Box(-1, 1, (2,), float32): weights and activations.

    | action | width asked for |
    |---|---|
    | -1 | the smallest allowed |
    | 0 | what the plan gives this layer |
    | +1 | the largest allowed |

    and linear between, in the order of the widths: 16 bits is one step above 8, float the next. The nearest pair worth
    choosing that can be afforded is taken (`problem.decisions` leaves out pairs that cost as much as one with more bits).
    Spending much on one layer leaves less for the later ones, so asking for the largest width everywhere is no way to fill
    the budget.

    ## Observation space
    Box(-1, 1, (51 + 2 x decisions,), float32): `FEATURES`, then the bits decided so far (0 for those to come). The first
    features describe the layer, as in HAQ (Wang et al., CVPR 2019, section 3.1); the next what each width of its weights and
    of its activations is predicted to add to the loss, and what it costs; the last what is left of the budget, what the plan
    is, and what loss is predicted. Where a layer can take 16 bits or float there are 8 more, of these two widths; and each
    budget beside the first has one, how much of it is used in the end at least. `features` lists them all.

    ## Rewards
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the float network): HAQ's equation 3 with
    accuracies as fractions. Of an objective whose values are no shares see `envs.base.reward_of`.

    ## Starting state
    The first undecided layer, nothing spent but what the pinned layers cost.

    ## Episode end
    Terminates when every layer is decided; `info` then holds `policy`, `accuracy`, `loss`, `cost` and `saturated`, the share
    of the episode's actions that lay at a bound. Never truncates.

    ## Arguments
    `gymnasium.make("haq/MixedPrecision-v0", problem=problem, loss_increase=loss_increase, judge=judge)`. `loss_increase`, of
    shape (decisions, 10, 10), is how much every pair of bits is predicted to add to the loss; without it the relative squared
    errors of calibration stand for it (`problem.quantization_error`). `judge(policy)` evaluates the policy of a finished
    episode; without it `problem.evaluate` does.
    """

    FEATURES = feature_names(BITS)

    def __init__(self, problem: SearchProblem, loss_increase: Array | None = None, judge: Judge | None = None) -> None:
        """Make the environment of a problem.

        Args:
            problem: What is to be searched.
            loss_increase: What every pair of bits is predicted to add to the loss, shape (decisions, 10, 10); None takes
                `problem.quantization_error`, of weights and of activations, in sum.
            judge: Evaluates the policy of a finished episode; None is `problem.evaluate`.

        Raises:
            ValueError: If there is nothing to decide.
        """
        super().__init__(problem, judge)
        if loss_increase is None:
            errors = problem.quantization_error
            loss_increase = errors[:, 0, :, None] + errors[:, 1, None, :]
        self.action_space = unit_box(2)
        self._count = BITS
        if self._high > BITS:
            self._count = PLACES
        further = []
        if self._programme is not None:
            # The peak of memory, which is no sum, comes last.
            limits = sorted(problem.limits[1:], key=lambda limit: not limit.is_sum)  # type: ignore[attr-defined]
            further = [limit.metric for limit in limits]
        self.features = feature_names(self._count, further)
        self.observation_space = unit_box(len(self.features) + 2 * len(self.free))
        fixed = sum(float(decision.prices[0]) for decision in problem.decisions if len(decision.pairs) == 1)
        self._total = problem.limit - fixed
        self._loss_increase = loss_increase[self.free]
        self._losses = [decision.of(table) for decision, table in zip(self.decisions, self._loss_increase, strict=True)]
        self._plan = Plan(self._losses, [decision.prices for decision in self.decisions], self._total)
        self._within: PlanWithin | None = None
        if self._programme is not None:
            losses = [np.zeros(len(decision.pairs)) for decision in problem.decisions]
            for index, loss in zip(self.free, self._losses, strict=True):
                losses[index] = loss
            self._within = PlanWithin(losses, self._programme)
        self._features = self._describe_layers()
        self._start()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Decide the bits of the next layer, or of layers that are tied.

        Raises ValueError, changing nothing, for anything but two finite numbers.
        """
        if self._step >= len(self.decisions):
            raise RuntimeError("the episode is over: call reset()")
        asked = checked_action(action, 2, self._step)
        option = self._choose(asked)
        decision = self.decisions[self._step]
        self._pairs[self.free[self._step]] = decision.pairs[option]
        self._decided[self._step] = self._rungs[self._step][option]
        self._left -= float(decision.prices[option])
        self._lost += float(self._losses[self._step][option])
        self._saturated += int((np.abs(asked) > SATURATED).sum())
        self._step += 1
        self._taken.append(option)
        self._pass_decided()
        if self._step < len(self.decisions):
            return self._observe(), 0.0, False, False, {}
        cost = float(self.problem.limit - self._left)
        return self._finish(self._pairs, cost, self._saturated / (2 * len(self.decisions)))

    def planned(self) -> tuple[int, int]:
        """Return the pair of widths, float being 32, that the plan gives to what this step decides."""
        w, a = self.decisions[self._step].pairs[self._planned_option()]
        return int(w), int(a)

    def action_for(self, w: int | None, a: int | None) -> NDArray[np.float32]:
        """Return the action that asks for just these widths at the present step; None or 32 is float."""
        planned = self._rungs[self._step][self._planned_option()].astype(float)
        asked = np.array([place_of(w) + 1, place_of(a) + 1], float)
        reach = np.where(asked > planned, self._high - planned, planned - self._low)
        return np.clip((asked - planned) / np.where(reach > 0, reach, 1), -1, 1).astype(np.float32)

    def next_layer(self) -> str:
        """Return the name of the (first) layer that the next step decides."""
        return self.problem.workload.names[self.decisions[self._step].layers[0]]

    def _start(self) -> None:
        self._step = 0
        self._left = self._total
        self._pairs = np.array([decision.pairs[-1] for decision in self.problem.decisions])
        self._decided = np.array([of_options[-1] for of_options in self._rungs])
        self._taken: list[int] = []  # options of the first of all decisions
        self._pass_decided()
        self._lost = 0.0  # what the decided layers are predicted to add to the loss
        self._saturated = 0

    def _pass_decided(self) -> None:
        """Take the only option of what is decided already, up to what this step decides."""
        following = len(self.problem.decisions)
        if self._step < len(self.free):
            following = self.free[self._step]
        self._taken.extend([0] * (following - len(self._taken)))

    def _planned_option(self) -> int:
        if self._within is not None:
            return self._within.option(self._taken)
        return self._plan.option(self._step, self._left)

    def _choose(self, action: Array) -> int:
        """The option nearest to what is asked for, of those that can be afforded."""
        options = self._rungs[self._step]
        planned = options[self._planned_option()].astype(float)
        asked = planned + np.where(action > 0, action * (self._high - planned), action * (planned - self._low))
        distance = np.square(options - asked).sum(1)
        if self._within is None:
            prices = self.decisions[self._step].prices
            affordable = prices <= self._left - self._plan.cheapest_from[self._step + 1] + 1e-9 * self.problem.limit
            return int(np.where(affordable, distance, np.inf).argmin())
        return self._within.first(self._taken, distance)

    def _describe_layers(self) -> Array:
        """The features of the decided layers that never change, each scaled to -1..1 over the layers."""
        layers = [self.problem.workload.layers[decision.layers[0]] for decision in self.decisions]
        cost = np.array([self.problem.cost[list(decision.layers)].sum(0) for decision in self.decisions])
        highest = cost[:, self._high - 1, self._high - 1]
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
        by_weights = cost[:, : self._count, self._high - 1]
        costs = np.concatenate([by_weights, cost[:, self._high - 1, : self._count]], axis=1) / highest[:, None]
        return np.concatenate([scale_columns(columns), increases, 2 * costs - 1], axis=1)

    def _observe(self) -> Observation:
        last = min(self._step, len(self.decisions) - 1)
        previous = np.full(2, self._high)
        if self._step > 0:
            previous = self._decided[last - 1]
        planned = previous
        if self._step < len(self.decisions):
            planned = self._rungs[self._step][self._planned_option()]
        reach = max(self._high - self._low, 1)
        expected, least = self._predicted()
        dynamic = [
            self._left / max(self._total, TINY),
            self._slack_left(),
            *((planned - self._low) / reach),
            *((previous - self._low) / reach),
            self._lost / max(expected, TINY),
            np.log2(max(expected / least, 1.0)) / 4,
        ]
        if self._programme is not None:
            dynamic += self._programme.used(self._taken)[1:].tolist()
        decided = 2 * (self._decided - self._low) / reach - 1
        decided[self._step :] = 0
        parts = (self._features[last], 2 * np.array(dynamic) - 1, decided.ravel())
        return np.clip(np.concatenate(parts), -1, 1).astype(np.float32)

    def _predicted(self) -> tuple[float, float]:
        """Predict the loss in the end, and what it is if every step follows the plan."""
        if self._within is not None:
            return self._lost + self._within.least(self._taken), max(self._within.least(()), TINY)
        return self._lost + self._plan.least(self._step, self._left), max(self._plan.least(0, self._total), TINY)

    def _slack_left(self) -> float:
        """The share that is left of what the budget leaves beyond the cheapest policy."""
        slack = self._total - self._plan.cheapest_from[0]
        if slack <= 0:
            return 0.0
        return float((self._left - self._plan.cheapest_from[self._step]) / slack)
