"""The Gymnasium environment in which an agent chooses the bits of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

import hw_models
from envs.plan import Plan
from quantizers import BitPolicy

Array = NDArray[np.float64]
SATURATED = 0.99  # an action beyond it lies at a bound
TINY = 1e-12


class SearchProblem(Protocol):
    """What the environment needs of a problem; `haq.Problem` has it."""

    workload: hw_models.Workload
    cost: Array  # (layers, 8, 8), indexed [layer, w_bits - 1, a_bits - 1]
    limit: float
    noise: Array  # (decisions, 2, 8)

    @property
    def decisions(self) -> Sequence[Any]: ...  # with layers, pairs (options, 2), prices (options,), of(table (8, 8))

    @property
    def float_accuracy(self) -> float: ...

    def decide(self, pairs: Any) -> BitPolicy: ...

    def evaluate(self, policy: BitPolicy) -> Any: ...


class MixedPrecisionEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Choose weight and activation bits for every layer, within a hardware budget.

    ## Description
    One episode decides one policy, one step one decision: a layer, or layers that are tied (those with a single allowed pair
    are decided already). The budget shapes the action: what a step may spend is what is left after the cheapest choice for
    every later layer, so every finished episode meets the budget and none can hit a wall at its end.

    At every step there is a plan for what is left: the pairs with the least predicted rise of the loss that fit the budget
    (`envs.Plan`). Actions are relative to it, and it is made anew after each step, so a deviation is made good, as far as it
    can be, by the layers that follow.

    ## Action space
    Box(-1, 1, (2,), float32): weights and activations.

    | action | width asked for |
    |---|---|
    | -1 | the smallest allowed |
    | 0 | what the plan gives this layer |
    | +1 | the largest allowed |

    and linear between. The nearest pair worth choosing that can be afforded is taken (`problem.decisions` leaves out pairs
    that cost as much as one with more bits). Spending much on one layer leaves less for the later ones, so asking for the
    largest width everywhere is no way to fill the budget.

    ## Observation space
    Box(-1, 1, (51 + 2 x decisions,), float32): `FEATURES`, then the bits decided so far (0 for those to come). The first
    features describe the layer, as in HAQ (Wang et al., CVPR 2019, section 3.1); the next what each width of its weights and
    of its activations is predicted to add to the loss, and what it costs; the last what is left of the budget, what the plan
    is, and what loss is predicted.

    ## Rewards
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the float network): HAQ's equation 3 with
    accuracies as fractions.

    ## Starting state
    The first undecided layer, nothing spent but what the pinned layers cost.

    ## Episode end
    Terminates when every layer is decided; `info` then holds `policy`, `accuracy`, `loss`, `cost` and `saturated`, the share
    of the episode's actions that lay at a bound. Never truncates.

    ## Arguments
    `gymnasium.make("haq/MixedPrecision-v0", problem=problem, rise=rise)`. `rise`, of shape (decisions, 8, 8), is the rise of
    the loss that every pair of bits is predicted to cause; without it the relative squared errors of calibration stand for
    it (`problem.noise`).
    """

    metadata: dict[str, Any] = {"render_modes": []}

    FEATURES = (
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
        *(f"rise_at_{b}_{operand}_bits" for operand in ("weight", "activation") for b in range(1, 9)),
        *(f"cost_at_{b}_{operand}_bits" for operand in ("weight", "activation") for b in range(1, 9)),
        "budget_left",
        "slack_left",
        "planned_weight_bits",
        "planned_activation_bits",
        "previous_weight_bits",
        "previous_activation_bits",
        "rise_so_far",
        "rise_in_the_end",
    )

    def __init__(self, problem: SearchProblem, rise: Array | None = None) -> None:
        self.problem = problem
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.free = [index for index, decision in enumerate(problem.decisions) if len(decision.pairs) > 1]
        if not self.free:
            raise ValueError("every layer has a single allowed pair of bits: there is nothing to decide")
        self.observation_space = spaces.Box(-1.0, 1.0, (len(self.FEATURES) + 2 * len(self.free),), np.float32)
        self.decisions = [problem.decisions[index] for index in self.free]
        chosen = np.concatenate([decision.pairs for decision in self.decisions])
        self._low, self._high = int(chosen.min()), int(chosen.max())
        fixed = sum(float(decision.prices[0]) for decision in problem.decisions if len(decision.pairs) == 1)
        self._total = problem.limit - fixed
        tables = problem.noise[:, 0, :, None] + problem.noise[:, 1, None, :] if rise is None else rise
        self._rise = tables[self.free]
        self._losses = [decision.of(table) for decision, table in zip(self.decisions, self._rise, strict=True)]
        self._plan = Plan(self._losses, [decision.prices for decision in self.decisions], self._total)
        self._features = self._describe_layers()
        self._start()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._start()
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self._step >= len(self.decisions):
            raise RuntimeError("the episode is over: call reset()")
        asked = np.clip(np.asarray(action, float), -1, 1)
        option = self._choose(asked)
        decision = self.decisions[self._step]
        self._pairs[self.free[self._step]] = decision.pairs[option]
        self._left -= float(decision.prices[option])
        self._rise_so_far += float(self._losses[self._step][option])
        self._saturated += int((np.abs(asked) > SATURATED).sum())
        self._step += 1
        if self._step < len(self.decisions):
            return self._observe(), 0.0, False, False, {}
        policy = self.problem.decide(self._pairs)
        result = self.problem.evaluate(policy)
        info = {
            "policy": policy,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "cost": float(self.problem.limit - self._left),
            "saturated": self._saturated / (2 * len(self.decisions)),
        }
        return self._observe(), 10 * (result.accuracy - self.problem.float_accuracy), True, False, info

    def planned(self) -> tuple[int, int]:
        """The pair of bits that the plan gives to what this step decides."""
        w, a = self.decisions[self._step].pairs[self._plan.option(self._step, self._left)]
        return int(w), int(a)

    def action_for(self, w: int, a: int) -> NDArray[np.float32]:
        """The action that asks for just these widths at the present step."""
        planned, asked = np.array(self.planned(), float), np.array([w, a], float)
        reach = np.where(asked > planned, self._high - planned, planned - self._low)
        return np.clip((asked - planned) / np.where(reach > 0, reach, 1), -1, 1).astype(np.float32)

    def next_layer(self) -> str:
        """The name of the (first) layer that the next step decides."""
        return self.problem.workload.names[self.decisions[self._step].layers[0]]

    def _start(self) -> None:
        self._step = 0
        self._left = self._total
        self._pairs = np.array([decision.pairs[-1] for decision in self.problem.decisions])
        self._rise_so_far, self._saturated = 0.0, 0

    def _choose(self, action: Array) -> int:
        """The option nearest to what is asked for, of those that can be afforded."""
        decision = self.decisions[self._step]
        affordable = decision.prices <= self._left - self._plan.cheapest_from[self._step + 1] + 1e-9 * self.problem.limit
        planned = np.array(self.planned(), float)
        asked = planned + np.where(action > 0, action * (self._high - planned), action * (planned - self._low))
        distance = np.square(decision.pairs - asked).sum(1)
        return int(np.where(affordable, distance, np.inf).argmin())

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
        span = np.ptp(columns, axis=0)
        columns = 2 * (columns - columns.min(0)) / np.where(span > 0, span, 1) - 1
        rises = np.concatenate([self._rise[:, :, -1], self._rise[:, -1, :]], axis=1)
        # Rises differ by orders of magnitude: what counts is how large one is beside the largest.
        rises = np.log10(np.maximum(rises / max(rises.max(), TINY), 1e-4)) / 2 + 1
        costs = np.concatenate([cost[:, :, self._high - 1], cost[:, self._high - 1, :]], axis=1) / highest[:, None]
        return np.concatenate([columns, rises, 2 * costs - 1], axis=1)

    def _observe(self) -> NDArray[np.float32]:
        last = min(self._step, len(self.decisions) - 1)
        over = self._step == len(self.decisions)
        previous = self._pairs[self.free[last - 1]] if self._step > 0 else np.full(2, self._high)
        planned = previous if over else np.array(self.planned())
        slack = self._total - self._plan.cheapest_from[0]
        left = self._left - self._plan.cheapest_from[self._step]
        least = max(self._plan.least(0, self._total), TINY)
        expected = self._rise_so_far + self._plan.least(self._step, self._left)
        dynamic = [
            self._left / max(self._total, TINY),
            left / slack if slack > 0 else 0.0,
            *((planned - self._low) / max(self._high - self._low, 1)),
            *((previous - self._low) / max(self._high - self._low, 1)),
            self._rise_so_far / max(expected, TINY),
            np.log2(max(expected / least, 1.0)) / 4,
        ]
        decided = 2 * (self._pairs[self.free] - self._low) / max(self._high - self._low, 1) - 1
        decided[self._step :] = 0
        parts = (self._features[last], 2 * np.array(dynamic) - 1, decided.ravel())
        return np.clip(np.concatenate(parts), -1, 1).astype(np.float32)
