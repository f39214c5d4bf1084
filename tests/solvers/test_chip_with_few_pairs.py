"""On a chip that does a few pairs of widths, no solver leaves them, and every budget is met."""

from __future__ import annotations

import pytest

import haq
from haq.solvers import SOLVERS, actor, agents, greedy, ilp
from tests.solvers import chips

AGENTS = ("ddpg", "td3", "sac")
OTHERS = tuple(name for name in SOLVERS if name not in (*AGENTS, "exhaustive"))
both = pytest.mark.parametrize("pairs", [chips.FEW, chips.WIDE], ids=["8 and 4 bits", "16 bits and float too"])


def check_programme(base: haq.Problem, budgets: int, seed: int) -> None:
    choices = chips.every(base)
    costs = chips.costs_of(base, choices)
    for count, problem in enumerate(chips.random_budgets(base, budgets, seed)):
        table = chips.loss_table(count)
        fits = (costs <= chips.amounts(problem) * (1 + 1e-9)).all(1)
        best = ilp.propose(problem, table)
        for policy in (best, greedy.propose(problem, table)):
            chips.check(problem, policy)
        options = chips.options_of(problem, best)
        assert chips.lost(problem, table, options[None])[0] == pytest.approx(chips.lost(problem, table, choices[fits]).min())


@both
def test_the_integer_programme_is_that_of_brute_force(pairs: chips.Pairs) -> None:
    check_programme(chips.base_problem(pairs), budgets=40, seed=0)


@pytest.mark.slow
@both
def test_so_it_is_within_200_budgets(pairs: chips.Pairs) -> None:
    check_programme(chips.base_problem(pairs), budgets=200, seed=3)


@both
@pytest.mark.parametrize("solver", OTHERS)
def test_no_solver_leaves_the_pairs_or_the_budget(solver: str, pairs: chips.Pairs) -> None:
    for problem in chips.random_budgets(chips.base_problem(pairs), 8):
        found, tried = chips.tried_by(problem, solver, 25)
        chips.check(problem, found.policy)
        for trial in tried:
            # Sensitivities are measured at widths alone, whatever the pair.
            if trial.feasible or solver in ("random", "evolution"):
                chips.check(problem, trial.policy)


@pytest.mark.slow
@both
@pytest.mark.parametrize("solver", OTHERS)
def test_nor_within_200_budgets(solver: str, pairs: chips.Pairs) -> None:
    for problem in chips.random_budgets(chips.base_problem(pairs), 200, seed=1):
        found, _ = chips.tried_by(problem, solver, 25)
        chips.check(problem, found.policy)


def test_exhaustive_search_tries_all_that_fit_and_no_other() -> None:
    base = chips.base_problem(chips.FEW)
    choices = chips.every(base)
    costs = chips.costs_of(base, choices)
    for problem in chips.random_budgets(base, 20):
        fits = (costs <= chips.amounts(problem) * (1 + 1e-9)).all(1)
        _, tried = chips.tried_by(problem, "exhaustive", len(choices))
        assert {trial.policy for trial in tried} == {chips.policy_of(problem, options) for options in choices[fits]}


@pytest.fixture
def quick_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let agents learn little: what they may choose doesn't depend on it."""
    monkeypatch.setattr(agents, "UPDATES", 1)
    monkeypatch.setattr(actor, "UPDATES", 1)
    monkeypatch.setattr(actor, "CRITICS_FIRST", 1)


def check_agents(base: haq.Problem, solver: str, env: str, budgets: int, seed: int) -> None:
    for problem in chips.random_budgets(base, budgets, seed):
        found, tried = chips.tried_by(problem, solver, 12, env)
        for trial in (found, *tried):
            chips.check(problem, trial.policy)


@both
@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.usefixtures("quick_agents")
def test_agents_leave_neither(env: str, pairs: chips.Pairs) -> None:
    check_agents(chips.base_problem(pairs), "ddpg", env, budgets=3, seed=0)


@pytest.mark.slow
@both
@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.parametrize("solver", AGENTS)
@pytest.mark.usefixtures("quick_agents")
def test_nor_do_they_within_200_budgets(solver: str, env: str, pairs: chips.Pairs) -> None:
    check_agents(chips.base_problem(pairs), solver, env, budgets=200, seed=2)
