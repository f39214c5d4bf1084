"""The environment of HAQ's paper, as it was: what the other one is to be compared with."""

from __future__ import annotations

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

WEIGHTS, ACTIVATIONS = 0, 1


class HaqEnv(PolicyEnv):
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
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the float network) (equation 3). Of
    an objective whose values are no shares see `envs.base.reward_of`.

    ## Starting state
    The weights of the first undecided layer.

    ## Episode end
    Terminates when every layer is decided; `info` then holds `policy`, `accuracy`, `loss`, `cost` and `saturated`, the share
    of the episode's actions that lay at a bound. Never truncates.

    ## Arguments
    `gymnasium.make("haq/HAQ-v0", problem=problem, judge=judge)`. `judge(policy)` evaluates the policy of a finished episode;
    without it `problem.evaluate` does.
    """

    def __init__(self, problem: SearchProblem, judge: Judge | None = None) -> None:
        """Make the environment of a problem.

        Args:
            problem: What is to be searched.
            judge: Evaluates the policy of a finished episode; None is `problem.evaluate`.

        Raises:
            ValueError: If there is nothing to decide.
        """
        super().__init__(problem, judge)
        self.action_space = unit_box(1)
        self.observation_space = unit_box(10)
        self._features = self._describe_layers()
        self._start()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Give the next operand its bits. Raises ValueError, changing nothing, for anything but one finite number."""
        if len(self._actions) >= 2 * len(self.free):
            raise RuntimeError("the episode is over: call reset()")
        layer, operand = divmod(len(self._actions), 2)
        asked = float(checked_action(action, 1, len(self._actions))[0])
        bits = round(self._low - 0.5 + (asked + 1) / 2 * (self._high - self._low + 1))
        self._bits[self.free[layer], operand] = np.clip(bits, self._low, self._high)
        self._actions.append(asked)
        if len(self._actions) < 2 * len(self.free):
            return self._observe(), 0.0, False, False, {}
        decided = list(zip(self.problem.decisions, self._within_budget(), strict=True))
        pairs = [decision.pairs[option] for decision, option in decided]
        cost = sum(float(decision.prices[option]) for decision, option in decided)
        saturated = float((np.abs(self._actions) > SATURATED).mean())
        return self._finish(pairs, cost, saturated)

    def _start(self) -> None:
        self._actions: list[float] = []
        self._bits = np.array([decision.pairs[-1] for decision in self.problem.decisions])

    def _within_budget(self) -> list[int]:
        """Choose an option per decision, the nearest to what was asked for, and take bits away until the budget holds.

        They are taken from the last decision to the first, again and again, an operand at a time.
        """
        decisions = self.problem.decisions
        chosen = []
        for decision, bits in zip(decisions, self._bits, strict=True):
            chosen.append(int(np.square(decision.pairs - bits).sum(1).argmin()))

        def exceeded() -> bool:
            total = sum(float(d.prices[option]) for d, option in zip(decisions, chosen, strict=True))
            return total > self.problem.limit * (1 + 1e-9)

        while exceeded():
            before = list(chosen)
            for index in reversed(range(len(decisions))):
                pairs = decisions[index].pairs
                prices = decisions[index].prices
                for operand in (ACTIVATIONS, WEIGHTS):
                    pair = pairs[chosen[index]]
                    lower = (pairs[:, operand] < pair[operand]) & (prices < prices[chosen[index]])
                    if lower.any() and exceeded():
                        chosen[index] = int(np.where(lower, np.square(pairs - pair).sum(1), np.inf).argmin())
            if chosen == before:  # fewer bits save nothing more, though another pair may
                chosen = [int(decision.prices.argmin()) for decision in decisions]
        return chosen

    def _describe_layers(self) -> Array:
        layers = [self.problem.workload.layers[decision.layers[0]] for decision in self.decisions]
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
        return scale_columns(columns)

    def _observe(self) -> Observation:
        layer, operand = divmod(min(len(self._actions), 2 * len(self.free) - 1), 2)
        last = 1.0
        if self._actions:
            last = self._actions[-1]
        return np.array([*self._features[layer], 2 * operand - 1, last], np.float32)
