"""`haq/PruneAndQuantize-v0` satisfies both checkers without a warning, and no episode can miss a budget."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import DDPG, PPO, SAC
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs
import quantizers as Q
from haq.problem.channels import ChannelProblem
from tests.conftest import make_problem, small_network
from tests.solvers.joint_problems import formula_losses, joint_problem

NAME = "haq/PruneAndQuantize-v0"
PROBLEMS = {
    "one": joint_problem(0.3),
    "narrow": joint_problem(0.16),
    "three": joint_problem({"latency": 0.45, "storage": 0.6, "peak_memory": 0.85}),
    "backwards": joint_problem(0.2, "backwards"),
}
STEPS = 7  # three groups, and four layers that aren't pinned
each = pytest.mark.parametrize("name", PROBLEMS)


def make(problem: ChannelProblem, **options: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(NAME, problem=problem, **options)


def play(env: gymnasium.Env[Any, Any], actions: Any) -> tuple[float, dict[str, Any]]:
    env.reset(seed=0)
    total, done, info, step = 0.0, False, {}, 0
    while not done:
        _, reward, done, truncated, info = env.step(np.asarray(actions(step), np.float32))
        assert not truncated
        total, step = total + float(reward), step + 1
    assert step == STEPS
    return total, info


ENVS = {name: make(problem) for name, problem in PROBLEMS.items()}


@each
def test_both_checkers_have_nothing_to_say(name: str, recwarn: pytest.WarningsRecorder) -> None:
    gymnasium_check(make(PROBLEMS[name]).unwrapped)
    sb3_check(make(PROBLEMS[name]), warn=True)
    assert not [str(w.message) for w in recwarn]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=STEPS, max_size=STEPS), st.sampled_from(list(PROBLEMS))
)
def test_every_episode_meets_all_budgets(actions: list[tuple[float, float]], name: str) -> None:
    problem = PROBLEMS[name]
    _, info = play(ENVS[name], lambda step: actions[step])
    assert problem.holds(info["policy"])
    assert problem.allows(info["policy"])
    assert info["cost"] == pytest.approx(problem.policy_cost(info["policy"]))


@each
@pytest.mark.parametrize("corner", [(1, 1), (-1, -1), (1, -1), (-1, 1), (0, 0), (5, -7)])
def test_saturated_actions_are_no_wall(corner: tuple[float, float], name: str) -> None:
    problem = PROBLEMS[name]
    _, info = play(make(problem), lambda step: corner)
    assert problem.holds(info["policy"])
    assert info["saturated"] == np.mean([abs(a) >= 1 for a in corner])


def draw_actions(count: int, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    actions = random.uniform(-1, 1, (STEPS, count, 2)).astype(np.float32)
    actions[:, ::4] = random.choice([-1, 0, 1], actions[:, ::4].shape)
    return actions


@each
def test_episodes_at_once_are_those_one_by_one(name: str) -> None:
    problem = PROBLEMS[name]
    env, episodes = envs.PruneAndQuantizeEnv(problem), envs.JointEpisodes(problem)
    actions = draw_actions(8)
    for _ in range(2):  # they begin anew
        seen = [episodes.begin(8), *(episodes.act(one) for one in actions)]
        assert episodes.is_over
        assert problem.joint.fits(episodes.options).all()
        for index in range(8):
            assert np.array_equal(env.reset()[0], seen[0][index])
            info: dict[str, Any] = {}
            for step, one in enumerate(actions):
                observation, _, _, _, info = env.step(one[index])
                assert np.array_equal(observation, seen[step + 1][index])
            assert info["saturated"] == episodes.saturation[index]


@each
def test_options_are_taken_by_the_actions_that_ask_for_them(name: str) -> None:
    problem = PROBLEMS[name]
    episodes, again = envs.JointEpisodes(problem), envs.JointEpisodes(problem)
    episodes.begin(12)
    for one in draw_actions(12, seed=1):
        episodes.act(one)
    wanted = episodes.options.copy()
    by_action, by_option = again.begin(12), episodes.begin(12)
    while not again.is_over:
        assert np.array_equal(by_action, by_option)
        options = wanted[:, again.free[again.step]]
        by_action = again.act(again.actions_taking(options))
        by_option = episodes.take(options)
    assert np.array_equal(again.options, wanted)
    assert np.array_equal(episodes.options, wanted)


def test_asking_for_nothing_in_particular_follows_the_plan() -> None:
    problem = PROBLEMS["one"]
    losses = formula_losses(problem)
    env = make(problem, losses=losses)
    _, info = play(env, lambda step: (0, 0))
    _, least = play(make(problem, losses=losses), lambda step: (-1, -1))
    planned = problem.joint.planned(losses)
    kept = dict(info["policy"].keep)
    assert kept == problem.keep_of(planned[:3])
    # The plan of the widths is one of a few prices of a unit of cost: near the best.
    assert problem.evaluate(info["policy"]).loss <= 1.3 * problem.evaluate(policy(problem, planned)).loss
    assert problem.evaluate(info["policy"]).loss < problem.evaluate(least["policy"]).loss


def policy(problem: ChannelProblem, options: Any) -> Q.BitPolicy:
    pairs = [decision.pairs[pick] for decision, pick in zip(problem.decisions, options[3:], strict=True)]
    return problem.decide(pairs, problem.keep_of(options[:3]))


def test_channels_come_first_and_make_room_for_bits() -> None:
    problem = PROBLEMS["one"]
    env = make(problem)
    _, few = play(env, lambda step: (-1, 0) if step < 3 else (1, 1))
    _, many = play(env, lambda step: (1, 0) if step < 3 else (1, 1))
    assert len(few["policy"].keep) == 3
    assert sum(many["policy"].keep.values()) + 3 - len(many["policy"].keep) > sum(few["policy"].keep.values())
    bits = [sum(w + a for w, a in one["policy"].values()) for one in (few, many)]
    assert bits[0] > bits[1]


def test_observations_stay_in_their_space_and_tell_steps_apart() -> None:
    env = make(PROBLEMS["one"])
    observation, _ = env.reset(seed=1)
    env.action_space.seed(0)
    seen = [observation, *(env.step(env.action_space.sample())[0] for _ in range(STEPS))]
    assert all(env.observation_space.contains(o) for o in seen)
    assert len({o.tobytes() for o in seen}) == STEPS + 1
    assert len(seen[0]) == len(env.unwrapped.features) + 2 * STEPS  # type: ignore[attr-defined]


def test_the_reward_is_what_the_judge_says() -> None:
    asked: list[Q.BitPolicy] = []

    def judge(policy: Q.BitPolicy) -> SimpleNamespace:
        asked.append(policy)
        return SimpleNamespace(accuracy=0.25, loss=3.0)

    problem = PROBLEMS["one"]
    reward, info = play(make(problem, judge=judge), lambda step: (0.3, -0.2))
    assert asked == [info["policy"]]
    assert reward == pytest.approx(10 * (0.25 - problem.float_accuracy))


def test_wrong_use_is_named() -> None:
    env = make(PROBLEMS["one"]).unwrapped
    env.reset()
    for wrong in (0.5, None, [np.nan, 0], np.zeros(3), ["a", "b"]):
        with pytest.raises(ValueError, match=r"the action of step 0 is .*; it must be 2 finite numbers from -1 to 1"):
            env.step(wrong)
    play(env, lambda step: (0, 0))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="the problem has no channels to choose: make it with prune"):
        envs.PruneAndQuantizeEnv(make_problem(small_network()))  # type: ignore[arg-type]


def test_agents_of_stable_baselines_run_on_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (DDPG, SAC):
            kind("MlpPolicy", make(PROBLEMS["one"]), learning_starts=4, device="cpu", seed=0).learn(9)
        PPO("MlpPolicy", make(PROBLEMS["one"]), n_steps=6, batch_size=6, device="cpu", seed=0).learn(9)
