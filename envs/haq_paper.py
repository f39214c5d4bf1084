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
    rungs,
    scale_columns,
    unit_box,
)

WEIGHTS, ACTIVATIONS = 0, 1


class HaqEnv(PolicyEnv):
    """Choose the bits of every layer freely; what exceeds the budget in the end is taken back (Wang et al., CVPR 2019).

    ## Description
    One episode decides one policy, two steps one layer: its weights, then its activations (layers with a single allowed pair
    are decided already). Nothing is said of the budget until the end. If the policy exceeds it, bits are taken away one by
    one, from the last layer to the first and again, until it holds (section 3.4). Likewise until several budgets hold; where
    taking bits away doesn't lead there, the nearest policy within all of them is taken.

    ## Action space
    Box(-1, 1, (1,), float32): with x = (action + 1) / 2, round(smallest - 0.5 + x (largest - smallest + 1)) bits (equation
    2), 16 bits being one step above 8 and float the next; of the pairs that the layer may take, the nearest is taken.

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
        self._asked[layer, operand] = np.clip(bits, self._low, self._high)
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
        self._asked = np.array([of_options[-1] for of_options in self._rungs])

    def _within_budget(self) -> list[int]:
        """Choose an option per decision, the nearest to what was asked for, and take bits away until the budget holds.

        They are taken from the last decision to the first, again and again, an operand at a time.
        """
        decisions = self.problem.decisions
        steps = [rungs(decision.pairs) for decision in decisions]
        chosen = [0] * len(decisions)
        for index, asked in zip(self.free, self._asked, strict=True):
            chosen[index] = int(np.square(steps[index] - asked).sum(1).argmin())

        def exceeded() -> bool:
            if self._programme is not None:
                return not self._programme.fits(chosen)
            total = sum(float(d.prices[option]) for d, option in zip(decisions, chosen, strict=True))
            return total > self.problem.limit * (1 + 1e-9)

        while exceeded():
            before = list(chosen)
            for index in reversed(range(len(decisions))):
                for operand in (ACTIVATIONS, WEIGHTS):
                    pair = steps[index][chosen[index]]
                    lower = (steps[index][:, operand] < pair[operand]) & self._saves(chosen, index)
                    if lower.any() and exceeded():
                        chosen[index] = int(np.where(lower, np.square(steps[index] - pair).sum(1), np.inf).argmin())
            if chosen == before:  # fewer bits save nothing more, though another pair may
                chosen = self._nearest(chosen, steps)
        return chosen

    def _saves(self, chosen: list[int], index: int) -> NDArray[np.bool_]:
        """Tell which options of a decision come closer to the budgets than the chosen one does."""
        prices = self.problem.decisions[index].prices
        if self._programme is not None:
            excess = self._programme.excess(chosen, index)
            # What is nearer by rounding alone would lead in a circle.
            nearer: NDArray[np.bool_] = excess < excess[chosen[index]] - 1e-9
            return nearer
        saves: NDArray[np.bool_] = prices < prices[chosen[index]]
        return saves

    def _nearest(self, chosen: list[int], steps: list[NDArray[np.intp]]) -> list[int]:
        """Choose the cheapest of every decision; of several budgets, what is nearest of all that is within them."""
        if self._programme is None:
            return [int(decision.prices.argmin()) for decision in self.problem.decisions]
        distances = []
        for of_options, option in zip(steps, chosen, strict=True):
            distances.append(np.square(of_options - of_options[option]).sum(1).astype(float))
        return self._programme.choose(distances)

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
