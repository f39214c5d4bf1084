"""Several budgets at once: every solver keeps all of them, and no episode of either environment can miss one."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs
import haq
from haq.problem.peak import PeakOfDecisions
from haq.solvers import ilp
from tests.solvers import chips
from tests.solvers.test_chip_with_few_pairs import AGENTS, OTHERS, check_agents, check_programme, quick_agents  # noqa: F401

THREE = ("latency", "storage", "peak_memory")
COUNTED = ("bops", "memory_traffic", "average_weight_bits")
# 4/4 is fast and large, 4/8 slow and small: what saves one costs the other.
CASES = {
    "8 and 4 bits": (chips.FEW, (), THREE),
    "options that conflict": (chips.FEW, ((4, 4),), THREE),
    "16 bits and float too": (chips.WIDE, ((4, 4), (16, 16)), THREE),
    "counted": (chips.WIDE, (), COUNTED),
}
each = pytest.mark.parametrize("case", CASES)


def base(case: str) -> haq.Problem:
    return chips.base_problem(*CASES[case])


@each
def test_the_integer_programme_is_that_of_brute_force(case: str) -> None:
    check_programme(base(case), budgets=12, seed=0)


@pytest.mark.slow
@each
def test_so_it_is_within_200_budgets(case: str) -> None:
    check_programme(base(case), budgets=200, seed=4)


@each
def test_all_ways_to_tell_what_fits_agree(case: str) -> None:
    random = np.random.default_rng(0)
    for problem in chips.random_budgets(base(case), 5, seed=5):
        choices = np.array([[random.integers(len(decision.pairs)) for decision in problem.decisions] for _ in range(30)])
        costs = chips.costs_of(problem, choices)
        for options, amounts in zip(choices.tolist(), costs, strict=True):
            fits = bool((amounts <= chips.amounts(problem) * (1 + 1e-9)).all())
            assert problem.several is not None
            assert problem.several.fits(options) == problem.fits(options) == fits
            assert problem.holds(chips.policy_of(problem, options)) == fits
            if problem.peak is not None:
                peak = PeakOfDecisions.of(problem.workload, problem.decisions, 1, 1.0)
                assert peak.amount(options) == amounts[-1]


@each
@pytest.mark.parametrize("solver", OTHERS)
def test_every_solver_keeps_all_budgets(case: str, solver: str) -> None:
    budgets = 3
    if solver == "surrogate":
        budgets = 1  # it takes most of the time; 200 are below
    for problem in chips.random_budgets(base(case), budgets, seed=1):
        found, tried = chips.tried_by(problem, solver, 25)
        chips.check(problem, found.policy)
        if solver in ("random", "evolution"):
            assert all(trial.feasible for trial in tried)


@pytest.mark.slow
@each
@pytest.mark.parametrize("solver", OTHERS)
def test_so_it_does_within_200_budgets(case: str, solver: str) -> None:
    for problem in chips.random_budgets(base(case), 200, seed=2):
        found, _ = chips.tried_by(problem, solver, 25)
        chips.check(problem, found.policy)


def test_exhaustive_search_tries_what_is_within_all() -> None:
    problem_of_all = base("options that conflict")
    choices = chips.every(problem_of_all)
    costs = chips.costs_of(problem_of_all, choices)
    for problem in chips.random_budgets(problem_of_all, 10, seed=3):
        fits = (costs <= chips.amounts(problem) * (1 + 1e-9)).all(1)
        _, tried = chips.tried_by(problem, "exhaustive", len(choices))
        assert {trial.policy for trial in tried} == {chips.policy_of(problem, options) for options in choices[fits]}


@each
@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.usefixtures("quick_agents")
def test_agents_keep_all_budgets(case: str, env: str) -> None:
    check_agents(base(case), "ddpg", env, budgets=2, seed=6)


@pytest.mark.slow
@each
@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.parametrize("solver", AGENTS)
@pytest.mark.usefixtures("quick_agents")
def test_so_they_do_within_200_budgets(case: str, solver: str, env: str) -> None:
    check_agents(base(case), solver, env, budgets=200, seed=7)


def played(env: Any, act: Any) -> dict[str, Any]:
    env.reset()
    done, step, info = False, 0, {}
    while not done:
        observation, _, done, _, info = env.step(act(step))
        assert env.observation_space.contains(observation)
        step += 1
    return info


def environments(problem: haq.Problem) -> list[Any]:
    return [envs.MixedPrecisionEnv(problem), envs.HaqEnv(problem)]


@each
def test_every_episode_keeps_all_budgets_whatever_the_actions(case: str) -> None:
    random = np.random.default_rng(1)
    for problem in chips.random_budgets(base(case), 6, seed=8):
        for env in environments(problem):
            size = env.action_space.shape[0]
            for extreme in (False, True):

                def act(step: int, extreme: bool = extreme, size: int = size) -> NDArray[np.float32]:
                    if extreme:
                        return random.choice([-1.0, 1.0], size).astype(np.float32)
                    return random.uniform(-1, 1, size).astype(np.float32)

                for _ in range(4):
                    info = played(env, act)
                    chips.check(problem, info["policy"])
                    assert info["cost"] == pytest.approx(problem.policy_cost(info["policy"]))


@each
def test_all_that_fits_can_be_asked_for(case: str) -> None:
    problem_of_all = base(case)
    choices = chips.every(problem_of_all)
    costs = chips.costs_of(problem_of_all, choices)
    random = np.random.default_rng(2)
    for problem in chips.random_budgets(problem_of_all, 10, seed=9):
        env = envs.MixedPrecisionEnv(problem)
        fits = choices[(costs <= chips.amounts(problem) * (1 + 1e-9)).all(1)]
        for options in fits[random.permutation(len(fits))[:15]]:
            policy = chips.policy_of(problem, options)
            info = played(env, lambda step, env=env, policy=policy: env.action_for(*policy[env.next_layer()]))
            assert info["policy"] == policy


@each
def test_asking_for_nothing_in_particular_gives_what_the_programme_finds(case: str) -> None:
    for seed, problem in enumerate(chips.random_budgets(base(case), 10, seed=10)):
        table = chips.loss_table(seed)
        env = envs.MixedPrecisionEnv(problem, table)
        assert played(env, lambda step: np.zeros(2, np.float32))["policy"] == ilp.propose(problem, table)


@each
def test_both_checkers_have_nothing_to_say(case: str) -> None:
    (problem,) = chips.random_budgets(base(case), 1, seed=11)
    for name in ("haq/MixedPrecision-v0", "haq/HAQ-v0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gymnasium_check(gymnasium.make(name, problem=problem).unwrapped)
            sb3_check(gymnasium.make(name, problem=problem), warn=True)


def test_features_are_named_one_by_one() -> None:
    """For widths of 1 to 8 and one budget they are what they were; others come with what they tell of."""
    few = envs.MixedPrecisionEnv(chips.base_problem(chips.FEW))
    assert few.features == envs.MixedPrecisionEnv.FEATURES
    wide = envs.MixedPrecisionEnv(base("16 bits and float too"))
    assert len(wide.features) == len(few.features) + 8 + 2
    assert [name for name in wide.features if name not in few.features] == [
        "loss_increase_at_16_weight_bits",
        "loss_increase_at_float_weight_bits",
        "loss_increase_at_16_activation_bits",
        "loss_increase_at_float_activation_bits",
        "cost_at_16_weight_bits",
        "cost_at_float_weight_bits",
        "cost_at_16_activation_bits",
        "cost_at_float_activation_bits",
        "storage_used_at_least",
        "peak_memory_used_at_least",
    ]
    for env in (few, wide):
        assert env.observation_space.shape == (len(env.features) + 2 * len(env.free),)


def test_16_bits_and_float_are_one_step_above_8_each() -> None:
    env = envs.MixedPrecisionEnv(base("16 bits and float too"))
    env.reset()
    assert env.action_for(None, None).tolist() == [1, 1]
    assert env.action_for(32, 32).tolist() == [1, 1]
    planned = np.array([{8: 8, 16: 9, 32: 10}.get(width, width) for width in env.planned()])
    reach = np.where(planned > 9, planned - 4, np.maximum(10 - planned, 1))
    assert env.action_for(16, 16) == pytest.approx((9 - planned) / reach)
