"""The environment of HAQ's paper, as it was: what the other one is to be compared with."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.mixed_precision import SATURATED, Array, SearchProblem

WEIGHTS, ACTIVATIONS = 0, 1


class HaqEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Choose the bits of every layer freely; what exceeds the budget in the end is taken back (Wang et al., CVPR 2019).

    ## Description
    One episode decides one policy, two steps one layer: its weights, then its activations (layers with a single allowed pair
    are decided already). Nothing is said of the budget until the end. If the policy exceeds it, bits are taken away one by
    one, from the last layer to the first and again, until it holds (section 3.4).

    ## Action space
    Box(-1, 1, (1,), float32): with x = (action + 1) / 2, round(smallest - 0.5 + x (largest - smallest + 1)) bits (equation
    2); of the pairs that the layer may take, the nearest is taken.

    ## Observation space
    Box(-1, 1, (10,), float32), the features of section 3.1 scaled over the layers: index, input channels, output channels,
    kernel, stride, size of the feature map, parameters, depthwise or not, weights or activations, last action.

    ## Rewards
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the float network) (equation 3).

    ## Starting state
    The weights of the first undecided layer.

    ## Episode end
    Terminates when every layer is decided; `info` then holds `policy`, `accuracy`, `loss`, `cost` and `saturated`, the share
    of the episode's actions that lay at a bound. Never truncates.

    ## Arguments
    `gymnasium.make("haq/HAQ-v0", problem=problem)`
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, (10,), np.float32)
        self.free = [index for index, decision in enumerate(problem.decisions) if len(decision.pairs) > 1]
        if not self.free:
            raise ValueError("every layer has a single allowed pair of bits: there is nothing to decide")
        chosen = np.concatenate([problem.decisions[index].pairs for index in self.free])
        self._low, self._high = int(chosen.min()), int(chosen.max())
        self._features = self._describe_layers()
        self._start()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._start()
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if len(self._actions) >= 2 * len(self.free):
            raise RuntimeError("the episode is over: call reset()")
        layer, operand = divmod(len(self._actions), 2)
        asked = float(np.clip(np.asarray(action, float), -1, 1)[0])
        bits = round(self._low - 0.5 + (asked + 1) / 2 * (self._high - self._low + 1))
        self._bits[self.free[layer], operand] = np.clip(bits, self._low, self._high)
        self._actions.append(asked)
        if len(self._actions) < 2 * len(self.free):
            return self._observe(), 0.0, False, False, {}
        options = self._within_budget()
        decided = list(zip(self.problem.decisions, options, strict=True))
        policy = self.problem.decide([decision.pairs[option] for decision, option in decided])
        result = self.problem.evaluate(policy)
        info = {
            "policy": policy,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "cost": sum(float(decision.prices[option]) for decision, option in decided),
            "saturated": float((np.abs(self._actions) > SATURATED).mean()),
        }
        return self._observe(), 10 * (result.accuracy - self.problem.float_accuracy), True, False, info

    def _start(self) -> None:
        self._actions: list[float] = []
        self._bits = np.array([decision.pairs[-1] for decision in self.problem.decisions])

    def _within_budget(self) -> list[int]:
        """An option per decision: the nearest to what was asked for, then lowered from the last to the first, again and again,
        an operand at a time."""
        decisions = self.problem.decisions
        chosen = [int(np.square(d.pairs - bits).sum(1).argmin()) for d, bits in zip(decisions, self._bits, strict=True)]

        def total() -> float:
            return sum(float(d.prices[option]) for d, option in zip(decisions, chosen, strict=True))

        while total() > self.problem.limit * (1 + 1e-9):
            before = list(chosen)
            for index in reversed(range(len(decisions))):
                for operand in (ACTIVATIONS, WEIGHTS):
                    pairs, prices = decisions[index].pairs, decisions[index].prices
                    pair = pairs[chosen[index]]
                    lower = (pairs[:, operand] < pair[operand]) & (prices < prices[chosen[index]])
                    if lower.any() and total() > self.problem.limit * (1 + 1e-9):
                        chosen[index] = int(np.where(lower, np.square(pairs - pair).sum(1), np.inf).argmin())
            if chosen == before:  # fewer bits save nothing more, though another pair may
                chosen = [int(decision.prices.argmin()) for decision in decisions]
        return chosen

    def _describe_layers(self) -> Array:
        layers = [self.problem.workload.layers[self.problem.decisions[index].layers[0]] for index in self.free]
        columns = np.array(
            [
                np.arange(len(layers)),
                [layer.in_channels for layer in layers],
                [layer.out_channels for layer in layers],
                [layer.kernel[0] for layer in layers],
                [layer.stride[0] for layer in layers],
                [layer.calls[0].positions for layer in layers],
                [layer.parameters for layer in layers],
                [layer.kind == "depthwise" for layer in layers],
            ],
            dtype=float,
        ).T
        span = np.ptp(columns, axis=0)
        scaled: Array = 2 * (columns - columns.min(0)) / np.where(span > 0, span, 1) - 1
        return scaled

    def _observe(self) -> NDArray[np.float32]:
        layer, operand = divmod(min(len(self._actions), 2 * len(self.free) - 1), 2)
        last = self._actions[-1] if self._actions else 1.0
        return np.array([*self._features[layer], 2 * operand - 1, last], np.float32)
