"""`haq/MixedPrecision-v0` satisfies both checkers without a warning, and no episode can miss the budget."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.env_checker import check_env as sb3_check
from torch import nn

import envs
import haq
import quantizers as Q
from haq.problem.decision import Decision
from haq.solvers import ilp
from tests.conftest import make_problem, small_network

PROBLEM = make_problem(small_network(), 0.55)
SMALLEST = make_problem(small_network(), PROBLEM.smallest / PROBLEM.reference)


PAPER = "haq/HAQ-v0"
both = pytest.mark.parametrize("name", ["haq/MixedPrecision-v0", PAPER])


def make(problem: haq.Problem, name: str = "haq/MixedPrecision-v0") -> gymnasium.Env[Any, Any]:
    return gymnasium.make(name, problem=problem)


def play(env: gymnasium.Env[Any, Any], actions: Any) -> tuple[float, dict[str, Any]]:
    env.reset(seed=0)
    total, done, info, step = 0.0, False, {}, 0
    while not done:
        _, reward, done, truncated, info = env.step(np.asarray(actions(step), np.float32))
        assert not truncated
        total, step = total + float(reward), step + 1
    return total, info


@both
def test_gymnasium_checker_has_nothing_to_say(name: str, recwarn: pytest.WarningsRecorder) -> None:
    gymnasium_check(make(PROBLEM, name).unwrapped)
    assert not [str(w.message) for w in recwarn]


@both
def test_stable_baselines_checker_has_nothing_to_say(name: str, recwarn: pytest.WarningsRecorder) -> None:
    sb3_check(make(PROBLEM, name), warn=True)
    assert not [str(w.message) for w in recwarn]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=3), st.booleans())
def test_every_episode_meets_the_budget(actions: list[tuple[float, float]], smallest: bool) -> None:
    problem = SMALLEST if smallest else PROBLEM
    _, info = play(make(problem), lambda step: actions[step])
    assert problem.within_budget(problem.policy_cost(info["policy"]))
    assert info["cost"] == pytest.approx(problem.policy_cost(info["policy"]))
    bits = np.array(list(info["policy"].values()))
    assert bits.min() >= 2
    assert bits.max() <= 8


@pytest.mark.parametrize("corner", [(1, 1), (-1, -1), (1, -1), (0, 0), (5, -7)])
def test_saturated_actions_are_no_wall(corner: tuple[float, float]) -> None:
    _, info = play(make(PROBLEM), lambda step: corner)
    assert PROBLEM.within_budget(info["cost"])
    assert info["saturated"] == np.mean([abs(a) >= 1 for a in corner])


def test_haqs_environment_takes_back_from_the_last_layer() -> None:
    """Equation 2 of the paper, and the walk of its section 3.4."""
    free = make_problem(small_network(), 1.0)
    _, info = play(make(free, PAPER), lambda step: [(step - 2.5) / 2.5])
    # 6 actions from -1 to 1: x = 0, 0.2 ... 1, bits = round(1.5 + 7 x), then the nearest pair worth choosing.
    asked = [(2, 3), (4, 6), (7, 8)]
    for decision, bits in zip(free.decisions[1:-1], asked, strict=True):
        name = free.workload.names[decision.layers[0]]
        assert info["policy"][name] == tuple(decision.pairs[np.square(decision.pairs - np.array(bits)).sum(1).argmin()])
    _, info = play(make(PROBLEM, PAPER), lambda step: [1.0])
    assert PROBLEM.within_budget(info["cost"])
    assert info["saturated"] == 1
    wide = [sum(info["policy"][PROBLEM.workload.names[d.layers[0]]]) for d in PROBLEM.decisions[1:-1]]  # type: ignore[arg-type]
    assert wide[0] >= wide[-1]  # the wall eats the end


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.booleans())
def test_haqs_environment_meets_the_budget_too(actions: list[float], smallest: bool) -> None:
    problem = SMALLEST if smallest else PROBLEM
    _, info = play(make(problem, PAPER), lambda step: [actions[step]])
    assert problem.within_budget(problem.policy_cost(info["policy"]))
    assert info["cost"] == pytest.approx(problem.policy_cost(info["policy"]))


def test_asking_for_nothing_in_particular_follows_the_plan() -> None:
    """Action 0 is what the integer programme finds; -1 stays at the cheapest policy."""
    errors = PROBLEM.quantization_error
    noise = errors[:, 0, :, None] + errors[:, 1, None, :]
    _, planned = play(make(PROBLEM), lambda step: (0, 0))
    _, least = play(make(PROBLEM), lambda step: (-1, -1))
    assert least["cost"] == pytest.approx(PROBLEM.smallest)

    def predicted(policy: Q.BitPolicy) -> float:
        return sum(float(noise[i, w - 1, a - 1]) for i, (w, a) in enumerate(zip(*PROBLEM.bit_arrays(policy), strict=True)))

    assert predicted(planned["policy"]) == pytest.approx(predicted(ilp.propose(PROBLEM, noise)), rel=0.01)


@given(st.data())
def test_a_plan_is_the_least_that_can_be_had(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 50), min_size=1, max_size=4)
    prices = [np.array(data.draw(numbers), float) for _ in range(count)]
    losses = [np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(p), max_size=len(p))), float) for p in prices]
    total = sum(p.min() for p in prices) + data.draw(st.integers(0, 100))
    plan = envs.Plan(losses, prices, total)
    left, lost = total, 0.0
    for decision in range(count):
        option = plan.option(decision, left)
        left, lost = left - prices[decision][option], lost + losses[decision][option]
    every = [
        sum(loss[i] for loss, i in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(len(p)) for p in prices))
        if sum(p[i] for p, i in zip(prices, picks, strict=True)) <= total
    ]
    assert left >= -1e-9
    assert lost <= plan.least(0, total) + 1e-9  # rounding prices up, it may only find more than it thought
    # With as much more as rounding takes, it does as well as is possible.
    more = total + 2 * count * plan.step
    assert envs.Plan(losses, prices, more).least(0, more) <= min(every) + 1e-9


def test_first_and_last_layer_keep_eight_bits() -> None:
    _, info = play(make(PROBLEM), lambda step: (-1, -1))
    assert info["policy"]["stem"] == info["policy"]["classifier"] == (8, 8)


def test_the_reward_is_the_accuracy_lost_on_held_out_images() -> None:
    reward, info = play(make(PROBLEM), lambda step: (0.3, -0.2))
    assert reward == pytest.approx(10 * (info["accuracy"] - PROBLEM.float_accuracy))
    assert info["accuracy"] == PROBLEM.evaluate(info["policy"]).accuracy


def test_observations_stay_in_their_space_and_tell_layers_apart() -> None:
    env = make(PROBLEM)
    observation, _ = env.reset(seed=1)
    seen = [observation, *(env.step(env.action_space.sample())[0] for _ in range(3))]
    assert all(env.observation_space.contains(o) for o in seen)
    assert len({o.tobytes() for o in seen}) == 4
    assert len(seen[0]) == len(envs.MixedPrecisionEnv.FEATURES) + 2 * 3


def test_a_finished_episode_must_be_reset() -> None:
    env = make(PROBLEM).unwrapped
    play(env, lambda step: (0, 0))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2, np.float32))


@both
@pytest.mark.parametrize(
    "wrong",
    [np.nan, np.inf, -np.inf, "scalar", "none", "short", "long", "row", "words", "bool", "complex", "object", "ragged"],
)
def test_an_action_that_is_none_is_named_at_its_step(name: str, wrong: Any) -> None:
    env = make(PROBLEM, name).unwrapped
    size = env.action_space.shape[0]  # type: ignore[index]
    right = np.full(size, 0.25, np.float32)
    actions: dict[Any, Any] = {
        "scalar": 0.5,
        "none": None,
        "short": right[1:],
        "long": np.append(right, right),
        "row": right[None],
        "words": ["0.5"] * size,
        "bool": [True] * size,
        "complex": right + 0j,
        "object": [None] * size,
        "ragged": [[0.5], 0.5, [0.1, 0.2]],
    }
    action = actions.get(wrong, np.append(right[1:], np.float32(wrong) if isinstance(wrong, float) else 0))
    env.reset()
    env.step(right)
    with pytest.raises(ValueError, match=rf"^the action of step 1 is .*; it must be {size} finite numbers from -1 to 1"):
        env.step(action)
    # It is as if nothing had been asked.
    untouched = make(PROBLEM, name).unwrapped
    untouched.reset()
    untouched.step(right)
    for again in ([1] * size, np.full(size, 7.0)):
        assert np.array_equal(env.step(again)[0], untouched.step(np.clip(again, -1, 1))[0])


def test_nothing_to_decide_is_an_error(network: nn.Module) -> None:
    problem = make_problem(network, 1.0)
    problem.decisions = [Decision((i,), np.array([[8, 8]]), np.ones(1)) for i in range(5)]
    for env in (envs.MixedPrecisionEnv, envs.HaqEnv):
        with pytest.raises(ValueError, match="nothing to decide"):
            env(problem)


def test_costs_that_are_not_monotone_are_no_obstacle(network: nn.Module) -> None:
    problem = make_problem(network, 0.7)
    random = np.random.default_rng(0)
    problem.cost = problem.cost * random.uniform(0.5, 1.5, problem.cost.shape)
    problem.decisions = [d._replace(prices=d.of(problem.cost[i])) for i, d in enumerate(problem.decisions)]
    problem.limit = 1.2 * sum(float(d.prices.min()) for d in problem.decisions)
    env = make(problem)
    env.action_space.seed(0)
    for _ in range(50):
        _, info = play(env, lambda step: env.action_space.sample())
        assert problem.within_budget(problem.policy_cost(info["policy"]))


def test_vector_environments_and_agents_of_stable_baselines_run_on_it() -> None:
    vector = gymnasium.make_vec("haq/MixedPrecision-v0", num_envs=2, vectorization_mode="sync", problem=PROBLEM)
    vector.reset(seed=0)
    for _ in range(4):
        vector.step(vector.action_space.sample())
    vector.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (DDPG, TD3, SAC):
            kind("MlpPolicy", make(PROBLEM), learning_starts=4, device="cpu", seed=0).learn(9)
        PPO("MlpPolicy", make(PROBLEM), n_steps=6, batch_size=6, device="cpu", seed=0).learn(9)


def test_it_needs_no_more_of_a_problem_than_it_says() -> None:
    """Any object with the fields of SearchProblem will do."""

    class Bare:
        workload, cost, decisions, limit, quantization_error = (
            getattr(PROBLEM, name) for name in ("workload", "cost", "decisions", "limit", "quantization_error")
        )
        float_accuracy = 1.0

        def decide(self, pairs: Any) -> Q.BitPolicy:
            return PROBLEM.decide(pairs)

        def evaluate(self, policy: Q.BitPolicy) -> Any:
            return PROBLEM.evaluate(policy)

    assert play(envs.MixedPrecisionEnv(Bare()), lambda step: (0, 0)) == play(make(PROBLEM), lambda step: (0, 0))


@both
def test_whoever_is_given_as_the_judge_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the problem isn't."""
    asked: list[Q.BitPolicy] = []

    def judge(policy: Q.BitPolicy) -> SimpleNamespace:
        asked.append(policy)
        return SimpleNamespace(accuracy=0.25, loss=3.0)

    def refuse(policy: Q.BitPolicy) -> None:
        raise AssertionError("the problem was asked")

    monkeypatch.setattr(PROBLEM, "evaluate", refuse)
    env = gymnasium.make(name, problem=PROBLEM, judge=judge)
    reward, info = play(env, lambda step: np.zeros(env.action_space.shape or ()))
    assert asked == [info["policy"]]
    assert (info["accuracy"], info["loss"]) == (0.25, 3.0)
    assert reward == pytest.approx(10 * (0.25 - PROBLEM.float_accuracy))


def test_the_predicted_increase_of_the_loss_makes_the_plan() -> None:
    """Where only one layer is said to matter, it keeps its bits."""
    increase = np.zeros((len(PROBLEM.decisions), 8, 8))
    middle = PROBLEM.decisions[2]
    increase[2] = 16 - np.add.outer(np.arange(1, 9), np.arange(1, 9))
    env = gymnasium.make("haq/MixedPrecision-v0", problem=PROBLEM, loss_increase=increase)
    _, info = play(env, lambda step: (0, 0))
    assert info["policy"][PROBLEM.workload.names[middle.layers[0]]] == (8, 8)
