"""The Gymnasium environment in which an agent chooses the bits of a network, layer by layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.base import Array, Judge, Observation, PolicyEnv, SearchProblem, Step, checked_action, unit_box
from envs.episodes import Episodes, feature_names
from hw_models import BITS
from hw_models.widths import place_of


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
        self.action_space = unit_box(2)
        self.episodes = Episodes(problem, loss_increase)
        self.features = self.episodes.features
        self.observation_space = unit_box(self.episodes.size)
        self._start()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Decide the bits of the next layer, or of layers that are tied.

        Raises ValueError, changing nothing, for anything but two finite numbers.
        """
        if self.episodes.is_over:
            raise RuntimeError("the episode is over: call reset()")
        asked = checked_action(action, 2, self.episodes.step)
        self._seen = self.episodes.act(asked[None])[0]
        if not self.episodes.is_over:
            return self._observe(), 0.0, False, False, {}
        options = self.episodes.options[0].tolist()
        pairs = [decision.pairs[option] for decision, option in zip(self.problem.decisions, options, strict=True)]
        cost = float(self.problem.limit - self.episodes.left[0])
        return self._finish(np.array(pairs), cost, float(self.episodes.saturation[0]))

    def planned(self) -> tuple[int, int]:
        """Return the pair of widths that the plan gives to what this step decides.

        Returns:
            The widths of weights and inputs, float being 32.
        """
        w, a = self.decisions[self.episodes.step].pairs[int(self.episodes.planned()[0])]
        return int(w), int(a)

    def action_for(self, w: int | None, a: int | None) -> NDArray[np.float32]:
        """Return the action that asks for just these widths at the present step.

        Args:
            w: The width of weights; None or 32 is float.
            a: The width of inputs.

        Returns:
            The action in [-1, 1], float32, shape (2,).
        """
        return self.episodes.actions_for(np.array([[place_of(w) + 1, place_of(a) + 1]]))[0]

    def next_layer(self) -> str:
        """Return the name of the (first) layer that the next step decides.

        Returns:
            Its dotted module name.
        """
        return self.problem.workload.names[self.decisions[self.episodes.step].layers[0]]

    def _start(self) -> None:
        self._seen = self.episodes.begin(1)[0]

    def _observe(self) -> Observation:
        return self._seen
