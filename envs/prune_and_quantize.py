"""The Gymnasium environment in which an agent chooses channels and bits of a network together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.base import Array, Judge, Observation, PolicyEnv, Step, checked_action, unit_box
from envs.joint_episodes import JointEpisodes, JointProblem


class PruneAndQuantizeEnv(PolicyEnv):
    """Choose the channels that every group keeps, and then both widths of every layer, within all hardware budgets.

    ## Description
    One episode decides one policy. First come the groups of channels (`quantizers.pruning`), one step each, in the order of
    the network; then the layers, or layers that are tied. What can be chosen in one way only is decided already. Costs are
    those of the really smaller layers.

    Every finished episode meets all budgets, and none can hit a wall at its end: a step takes nothing after which the
    cheapest that may follow doesn't fit. For groups that are the channels at which the budgets leave most room, found once
    for the problem, with the cheapest pair in every layer; this holds on targets too where fewer channels cost more.

    There is a plan: shares and pairs with a small sum of predicted losses within the budgets. Actions are relative to it.
    That of the channels is made once; that of the widths for the channels that were decided, anew after each step.

    ## Action space
    Box(-1, 1, (2,), float32). Of a group the first entry asks for the share of its channels, and the second isn't looked at;
    of a layer they ask for the widths of weights and activations.

    | action | share asked for | width asked for |
    |---|---|---|
    | -1 | the smallest allowed | the smallest allowed |
    | 0 | what the plan keeps | what the plan gives this layer |
    | +1 | all channels | the largest allowed |

    and linear between, in the order of the shares and of the widths. The nearest of what may be taken is taken.

    ## Observation space
    Box(-1, 1, (47 + 2 x steps,), float32): `features`, then what was decided so far, two entries a step (0 for those to
    come). The first features describe the layer, or the layers that a group makes smaller; the next what each share, each
    width of weights and each width of activations is predicted to add to the loss; the last how many channels are kept, how
    much of the tightest budget is used in the end at least, what the plan is, and what loss is predicted.

    ## Rewards
    0, and at the end of the episode 10 x (accuracy of the policy - accuracy of the unpruned float network); of an objective
    whose values are no shares see `envs.base.reward_of`.

    ## Starting state
    The first group, or the first layer where no group can be chosen.

    ## Episode end
    Terminates when everything is decided; `info` then holds `policy`, `accuracy`, `loss`, `cost` and `saturated`, the share of
    the episode's actions that lay at a bound. Never truncates.

    ## Arguments
    `gymnasium.make("haq/PruneAndQuantize-v0", problem=problem, losses=losses, judge=judge)`. `losses` is how much every
    option is predicted to add to the loss, a row for every group and then for every decision; without it the relative squared
    errors of calibration, and the part of the squared weights that is removed, stand for it. `judge(policy)` evaluates the
    policy of a finished episode; without it `problem.evaluate` does.
    """

    problem: JointProblem

    def __init__(self, problem: JointProblem, losses: Sequence[Array] | None = None, judge: Judge | None = None) -> None:
        """Make the environment of a problem of channels and widths.

        Args:
            problem: What is to be searched.
            losses: What every option is predicted to add to the loss, by place in an option vector.
            judge: Evaluates the policy of a finished episode; None is `problem.evaluate`.

        Raises:
            ValueError: For a problem without channels to choose, and if there is nothing to decide.
        """
        if not hasattr(problem, "joint"):
            raise ValueError(
                "the problem has no channels to choose: make it with prune, such as haq.Problem(..., prune='0.25:1'), or take "
                "haq/MixedPrecision-v0"
            )
        self.problem = problem
        self.judge = judge or problem.evaluate
        self.action_space = unit_box(2)
        self.episodes = JointEpisodes(problem, losses)
        self.features = self.episodes.features
        self.observation_space = unit_box(self.episodes.size)
        self._start()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Decide the channels of the next group, or the bits of the next layer.

        Raises ValueError, changing nothing, for anything but two finite numbers.
        """
        episodes = self.episodes
        if episodes.is_over:
            raise RuntimeError("the episode is over: call reset()")
        asked = checked_action(action, 2, episodes.step)
        self._seen = episodes.act(asked[None])[0]
        if not episodes.is_over:
            return self._observe(), 0.0, False, False, {}
        options = episodes.options
        groups = episodes.joint.groups
        pairs = [of[option] for of, option in zip(episodes.joint.pairs, options[0, groups:].tolist(), strict=True)]
        policy = self.problem.decide(pairs, self.problem.keep_of(options[0, :groups]))
        return self._judged(policy, float(episodes.joint.totals(options)[0, 0]), float(episodes.saturation[0]))

    def _start(self) -> None:
        self._seen = self.episodes.begin(1)[0]

    def _observe(self) -> Observation:
        return self._seen
