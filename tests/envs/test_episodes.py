"""Many episodes at once are what the environment would have played one by one, and an agent sees the same of every problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs
import haq
from envs.view import FEATURES
from tests.conftest import make_problem, small_network
from tests.solvers import chips

THREE = ("latency", "storage", "peak_memory")


def problems() -> dict[str, haq.Problem]:
    """One budget, narrow and wide widths, and several budgets."""
    (wide,) = chips.random_budgets(chips.base_problem(chips.WIDE), 1, seed=2)
    several = list(chips.random_budgets(chips.base_problem(chips.WIDE, ((4, 4), (16, 16)), THREE), 2, seed=3))
    return {"one": make_problem(small_network(), 0.55), "wide": wide, "three": several[0], "three others": several[1]}


PROBLEMS = problems()
each = pytest.mark.parametrize("name", PROBLEMS)


def draw_actions(steps: int, count: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    actions = random.uniform(-1, 1, (steps, count, 2)).astype(np.float32)
    actions[:, ::4] = random.choice([-1, 0, 1], actions[:, ::4].shape)
    return actions


@each
def test_episodes_at_once_are_those_one_by_one(name: str) -> None:
    problem = PROBLEMS[name]
    env, episodes = envs.MixedPrecisionEnv(problem), envs.Episodes(problem)
    actions = draw_actions(len(env.decisions), 12)
    for _ in range(2):  # they begin anew
        seen = [episodes.begin(12), *(episodes.act(one) for one in actions)]
        assert episodes.is_over
        for index in range(12):
            assert np.array_equal(env.reset()[0], seen[0][index])
            info: dict[str, Any] = {}
            for step, one in enumerate(actions):
                observation, _, _, _, info = env.step(one[index])
                assert np.array_equal(observation, seen[step + 1][index])
            assert info["policy"] == chips.policy_of(problem, episodes.options[index])
            assert info["saturated"] == episodes.saturation[index]


@each
def test_options_are_taken_by_the_actions_that_ask_for_them(name: str) -> None:
    problem = PROBLEMS[name]
    episodes, again = envs.Episodes(problem), envs.Episodes(problem)
    episodes.begin(12)
    for one in draw_actions(len(episodes.decisions), 12, seed=1):
        episodes.act(one)
    wanted = episodes.options
    by_action, by_option = again.begin(12), episodes.begin(12)
    while not again.is_over:
        assert np.array_equal(by_action, by_option)
        options = wanted[:, again.free[again.step]]
        by_action = again.act(again.actions_taking(options))
        by_option = episodes.take(options)
    assert np.array_equal(again.options, wanted)
    assert np.array_equal(episodes.options, wanted)


def test_an_agent_sees_the_same_features_of_every_problem() -> None:
    for problem in PROBLEMS.values():
        env = envs.MixedPrecisionEnv(problem)
        view = envs.ViewEnv(env)
        whole, seen = env.reset()[0], view.reset()[0]
        assert seen.shape == (len(FEATURES),)
        assert {name: value for name, value in zip(FEATURES, seen, strict=True) if name in env.features} == dict(
            zip(env.features, whole[: len(env.features)], strict=True)
        )
        assert not any(seen[FEATURES.index(name)] for name in FEATURES if name not in env.features)
        many = envs.View(env.features)(envs.Episodes(problem).begin(3))
        assert np.array_equal(many, np.tile(seen, (3, 1)))
        assert view.observation_space.contains(seen)
        sb3_check(view, warn=True)
