"""On a chip that does a few pairs of widths, no solver leaves them, and every budget is met."""

from __future__ import annotations

import pytest

from haq.solvers import SOLVERS, greedy, ilp
from tests.solvers import chips

AGENTS = ("ddpg", "td3", "sac")
OTHERS = tuple(name for name in SOLVERS if name not in (*AGENTS, "exhaustive"))
both = pytest.mark.parametrize("pairs", [chips.FEW, chips.WIDE], ids=["8 and 4 bits", "16 bits and float too"])


@both
def test_the_integer_programme_is_that_of_brute_force(pairs: chips.Pairs) -> None:
    base = chips.base_problem(pairs)
    choices = chips.every(base)
    costs = chips.costs_of(base, choices)
    for seed, problem in enumerate(chips.random_budgets(base, 200)):
        table = chips.loss_table(seed)
        fits = (costs <= chips.amounts(problem) * (1 + 1e-9)).all(1)
        best = ilp.propose(problem, table)
        for policy in (best, greedy.propose(problem, table)):
            chips.check(problem, policy)
        options = chips.options_of(problem, best)
        assert chips.lost(problem, table, options[None])[0] == pytest.approx(chips.lost(problem, table, choices[fits]).min())


@both
@pytest.mark.parametrize("solver", OTHERS)
def test_no_solver_leaves_the_pairs_or_the_budget(solver: str, pairs: chips.Pairs) -> None:
    for problem in chips.random_budgets(chips.base_problem(pairs), 20):
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


@both
@pytest.mark.parametrize("env", ["plan", "haq"])
def test_agents_leave_neither(env: str, pairs: chips.Pairs) -> None:
    evaluations = 25
    if env == "haq":
        evaluations = 6
    for problem in chips.random_budgets(chips.base_problem(pairs), 2):
        found, tried = chips.tried_by(problem, "ddpg", evaluations, env)
        chips.check(problem, found.policy)
        # Those before measure sensitivities, at the largest widths.
        assert all(trial.feasible for trial in tried[-2:])


@pytest.mark.slow
@both
@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.parametrize("solver", AGENTS)
def test_nor_do_all_agents_within_200_budgets(solver: str, env: str, pairs: chips.Pairs) -> None:
    for problem in chips.random_budgets(chips.base_problem(pairs), 200, seed=2):
        found, _ = chips.tried_by(problem, solver, 6, env)
        chips.check(problem, found.policy)
