"""The Gymnasium environment in which an agent chooses the bits of a network, layer by layer."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

import hw_models
from quantizers import BitPolicy

Array = NDArray[np.float64]


class SearchProblem(Protocol):
    """What the environment needs of a problem; `haq.Problem` has it. Arrays are indexed [layer, w_bits - 1, a_bits - 1]."""

    workload: hw_models.Workload
    cost: Array
    choices: NDArray[np.bool_]
    limit: float
    noise: Array

    @property
    def float_accuracy(self) -> float: ...

    def policy(self, w_bits: Any, a_bits: Any) -> BitPolicy: ...

    def evaluate(self, policy: BitPolicy) -> Any: ...


class MixedPrecisionEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Choose weight and activation bits for every layer, within a hardware budget.

    ## Description
    One episode decides one policy, one step one layer (layers with a single allowed pair are decided already). The budget
    shapes the action: what a step may spend is what is left after the cheapest choice for every later layer, so every
    finished episode meets the budget and none can hit a wall at its end.

    ## Action space
    Box(-1, 1, (2,), float32): weights and activations.

    | action | width asked for |
    |---|---|
    | -1 | the smallest allowed |
    | 0 | the *level*: the width at which all layers still to decide would use up what is left of the budget |
    | +1 | the largest allowed |

    and linear between. The nearest pair worth choosing that can be afforded is taken (`problem.choices` leaves out pairs
    that cost as much as one with more bits). Spending much on one layer lowers the level of the later ones, so asking for
    the largest width everywhere is no way to fill the budget.

    ## Observation space
    Box(-1, 1, (18,), float32): see `FEATURES`. The first ones describe the layer, as in HAQ (Wang et al., CVPR 2019,
    section 3.1); the next what its cost and its quantization error do as bits fall; the last the state of the budget.

    ## Rewards
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the float network): HAQ's equation 3 with
    accuracies as fractions.

    ## Starting state
    The first undecided layer, nothing spent but what the pinned layers cost.

    ## Episode end
    Terminates when every layer is decided; `info` then holds `policy`, `accuracy`, `loss` and `cost`. Never truncates.

    ## Arguments
    `gymnasium.make("haq/MixedPrecision-v0", problem=problem)`
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
        "cost_at_low_weight_bits",
        "cost_at_low_activation_bits",
        "weight_noise",
        "activation_noise",
        "budget_left",
        "level",
        "previous_bits",
    )

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, (len(self.FEATURES),), np.float32)
        choices, cost = problem.choices, problem.cost
        self._pairs = [np.argwhere(layer) + 1 for layer in choices]  # per layer: rows of (w, a)
        self._prices = [layer_cost[layer] for layer, layer_cost in zip(choices, cost, strict=True)]
        self.decisions = [index for index, pairs in enumerate(self._pairs) if len(pairs) > 1]
        if not self.decisions:
            raise ValueError("every layer has a single allowed pair of bits: there is nothing to decide")
        chosen = np.concatenate([self._pairs[index] for index in self.decisions])
        self._low, self._high = int(chosen.min()), int(chosen.max())
        cheapest = np.array([prices.min() for prices in self._prices])
        fixed = np.delete(cheapest, self.decisions).sum()
        self._total = problem.limit - fixed
        # _later[i]: the least that the decisions after i cost; _levels[b, i]: all decisions from i on at width b.
        order = np.array(self.decisions)
        self._later = np.append(np.cumsum(cheapest[order][::-1])[::-1][1:], 0.0)
        widths = np.arange(self._low, self._high + 1)
        self._levels = np.cumsum(np.stack([cost[order, b - 1, b - 1] for b in widths])[:, ::-1], axis=1)[:, ::-1]
        self._widths = widths.astype(float)
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
        layer = self.decisions[self._step]
        w, a = self._choose(layer, np.clip(np.asarray(action, float), -1, 1))
        self._bits[layer] = w, a
        self._left -= self.problem.cost[layer, w - 1, a - 1]
        self._step += 1
        if self._step < len(self.decisions):
            return self._observe(), 0.0, False, False, {}
        policy = self.problem.policy(self._bits[:, 0], self._bits[:, 1])
        result = self.problem.evaluate(policy)
        info = {
            "policy": policy,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "cost": float(self.problem.limit - self._left),
        }
        return self._observe(), 10 * (result.accuracy - self.problem.float_accuracy), True, False, info

    def level(self) -> float:
        """The width, not always whole, at which everything still undecided would use up what is left."""
        return float(np.interp(self._left, self._levels[:, self._step], self._widths))

    def action_for(self, w: int, a: int) -> NDArray[np.float32]:
        """The action that asks for just these widths at the present step."""
        level, asked = self.level(), np.array([w, a], float)
        reach = np.where(asked > level, self._high - level, level - self._low)
        return np.clip((asked - level) / np.where(reach > 0, reach, 1), -1, 1).astype(np.float32)

    def next_layer(self) -> str:
        """The name of the layer that the next step decides."""
        return self.problem.workload.names[self.decisions[self._step]]

    def _start(self) -> None:
        self._step = 0
        self._left = self._total
        self._bits = np.array([pairs[-1] for pairs in self._pairs])

    def _choose(self, layer: int, action: Array) -> tuple[int, int]:
        pairs, prices = self._pairs[layer], self._prices[layer]
        affordable = prices <= self._left - self._later[self._step] + 1e-9 * self.problem.limit
        level = self.level()
        asked = level + np.where(action > 0, action * (self._high - level), action * (level - self._low))
        distance = np.square(pairs - asked).sum(1)
        w, a = pairs[np.where(affordable, distance, np.inf).argmin()]
        return int(w), int(a)

    def _describe_layers(self) -> Array:
        """The features of the decided layers that never change, each scaled to -1..1 over the layers."""
        layers = [self.problem.workload.layers[index] for index in self.decisions]
        cost, noise = self.problem.cost[self.decisions], self.problem.noise[self.decisions]
        low, high, middle = self._low - 1, self._high - 1, (self._low + self._high) // 2 - 1
        highest = cost[:, high, high]
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
                cost[:, low, high] / highest,
                cost[:, high, low] / highest,
                np.log(noise[:, 0, middle] + 1e-12),
                np.log(noise[:, 1, middle] + 1e-12),
            ],
            dtype=float,
        )
        span = np.ptp(columns, axis=1, keepdims=True)
        return (2 * (columns - columns.min(1, keepdims=True)) / np.where(span > 0, span, 1) - 1).T

    def _observe(self) -> NDArray[np.float32]:
        last = min(self._step, len(self.decisions) - 1)
        previous = self._bits[self.decisions[last - 1]].mean() if self._step > 0 else self._high
        span = max(self._high - self._low, 1)
        level = self.level() if self._step < len(self.decisions) else self._low
        dynamic = [
            2 * self._left / max(self._total, 1e-30) - 1,
            2 * (level - self._low) / span - 1,
            2 * (previous - self._low) / span - 1,
        ]
        return np.clip(np.concatenate([self._features[last], dynamic]), -1, 1).astype(np.float32)
