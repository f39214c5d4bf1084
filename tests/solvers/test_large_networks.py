"""From 6 to 300 layers: what is proposed and spent is told before, and no solver's own work grows beyond an evaluation's."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import haq
from haq import search
from haq.problem.decision import Decision
from haq.solvers import SOLVERS, greedy, spending
from haq.solvers.base import Session, Solver, Spending, find_solver, solve
from haq.solvers.cheapest import MOST_MOVES, _best_moves
from haq.solvers.ilp import IntegerProgramme
from haq.solvers.sensitivity import evaluations_for_all
from haq.solvers.spending import duration_words, proposed, time_words, words_of
from haq.study.search_steps import RIVALS, rivals_of
from tests.commands.test_search_command import MODULE, SMALL, call
from tests.conftest import enter, make_problem, small_network
from tests.solvers.chips import FEW, base_problem


def stack(layers: int, budget: Any = 0.5) -> haq.Problem:
    """A problem of so many small linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for _ in range(layers):
            layer = nn.Linear(8, 8)
            nn.init.orthogonal_(layer.weight, 1.4)
            parts += [layer, nn.ReLU()]
        network = nn.Sequential(*parts[:-1]).eval()
        inputs = torch.randn(24, 8)
    labels = torch.arange(24) % 8
    return haq.Problem(network, calibrate=inputs, search=(inputs, labels), target="edge", budget=budget)


def of_options(counts: Sequence[int]) -> haq.Problem:
    """What is asked of a problem for its size."""
    return SimpleNamespace(  # type: ignore[return-value]
        decisions=[Decision((i,), np.full((n, 2), 8), np.ones(n)) for i, n in enumerate(counts)]
    )


# ---- How many evaluations


@pytest.mark.parametrize(
    ("counts", "number"),
    [
        ([1, *[49] * 12, 1], 200),  # the default job
        ([49] * 6, 140),
        ([49] * 52, 410),
        ([49] * 300, 980),
        ([9] * 5, 100),
        ([3, 3], 9),  # never more than there are policies
        ([1, 1], 1),
    ],
)
def test_the_number_of_evaluations_is_proposed_from_the_size(counts: list[int], number: int) -> None:
    assert proposed(of_options(counts)) == number


def test_what_is_proposed_is_what_is_taken_where_nothing_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    base = base_problem(FEW, ((4, 4),))
    problem = base.on(base.target, 0.7)
    with caplog.at_level("INFO", logger="haq"):
        result = haq.solve(problem, "random")
    number = proposed(problem)
    assert result.session.evaluations == number
    assert result.session.used <= number == 70
    assert "random, 70 evaluations: 70 for policies that it chooses one after the other; the float network took" in caplog.text


# ---- What they are spent on


@pytest.mark.parametrize("solver", [*SOLVERS, IntegerProgramme(iterate=True)], ids=[*SOLVERS, "ilp iterated"])
@pytest.mark.parametrize("evaluations", [1, 5, 400])
def test_every_solver_says_what_its_evaluations_go_into(solver: Any, evaluations: int) -> None:
    problem = make_problem(small_network(), 0.5)
    parts = spending.spending(find_solver(solver), problem, evaluations, "loss")
    assert sum(part.count for part in parts) <= evaluations
    assert all(part.count >= 0 and part.words for part in parts)
    lines = words_of(parts, evaluations)
    told = [int(line.split()[0]) for line in lines]
    assert sum(told) == evaluations


@pytest.mark.parametrize("evaluations", [1, 2, 12, 30])
def test_what_is_said_is_what_is_done(evaluations: int) -> None:
    problem = make_problem(small_network(), 0.5)
    for solver in ("ilp", "greedy", IntegerProgramme(iterate=True)):
        parts = spending.spending(find_solver(solver), problem, evaluations, "loss")
        session = Session(problem, evaluations)
        find_solver(solver).solve(problem, session, 0)
        measured = sum(part.count for part in parts if "sensitivities," in part.words)
        known = 0
        if session.sensitivities is not None:
            known = session.sensitivities.known
        assert max(known + 1, 1) == max(measured, 1)
        assert session.used <= sum(part.count for part in parts)


def test_what_is_left_out_for_want_of_evaluations_is_said() -> None:
    problem = make_problem(small_network(), 0.5)
    needed = evaluations_for_all(problem)
    parts = spending.spending(find_solver("ilp"), problem, 10, "loss")
    assert words_of(parts, 10) == [
        f"9 for sensitivities, one operand at a time ({needed} would be all; {needed - 9} are left out, for 10 evaluations)",
        "1 for the policy that is optimal if sensitivities add up",
    ]
    # What costs none, or is known, isn't spent on.
    for kind, known in (("hessian", False), ("loss", True)):
        lines = words_of(spending.spending(find_solver("ilp"), problem, 10, kind, known), 10)
        assert lines == ["1 for the policy that is optimal if sensitivities add up", "9 are not needed"]


def test_a_solver_of_ones_own_need_not_say_anything() -> None:
    problem = make_problem(small_network(), 0.5)
    says = {"uses_sensitivities": False, "draws": True, "chooses_ahead": False}
    duck = SimpleNamespace(solve=lambda problem, session, seed: None, **says)
    assert spending.spending(duck, problem, 7, "loss") == [Spending("policies that it chooses", 7)]  # type: ignore[arg-type]

    class Mine(Solver):
        def solve(self, problem: haq.Problem, session: Session, seed: int) -> None:
            """Do nothing."""

    assert sum(part.count for part in spending.spending(Mine(), problem, 7, "loss")) == 7


def test_durations_are_told_from_the_float_network() -> None:
    assert [duration_words(one) for one in (0.034, 12.0, 90.0, 5400.0)] == ["0.034 s", "12 s", "1.5 min", "1.5 h"]
    problem = make_problem(small_network(), 0.5)
    assert problem.float_seconds > 0
    problem.float_seconds = 0.5
    assert time_words(problem, 240).startswith(
        "the float network took 0.5 s on the same samples; at that pace 240 evaluations would take 2 min"
    )
    assert not time_words(haq.Problem.tabular("digres", budget="0.15"), 100)


# ---- Rivals


def asked(evaluations: int, solver: str = "random", **more: Any) -> Any:
    problem = make_problem(small_network(), 0.5)
    config = SimpleNamespace(**({"solver": solver, "sensitivity": None, "sensitivity_kind": "loss", "iterate": False} | more))
    return SimpleNamespace(config=config, problem=problem, evaluations=evaluations)


def test_rivals_never_measure_longer_than_the_search_itself() -> None:
    task = asked(200)
    found = rivals_of(task)
    assert (found.names, found.kind) == (RIVALS, "gradient")
    assert found.words == "greedy and ilp know sensitivities of kind gradient, which cost no evaluation"
    # Without outputs that can be held against each other they are measured, if that doesn't take longer than the search.
    needed = evaluations_for_all(task.problem)
    task.problem.objective = SimpleNamespace(distribution=None)
    found = rivals_of(task)
    assert (found.names, found.kind) == (RIVALS, None)
    assert f"greedy and ilp measure sensitivities together: {needed} evaluations beside the search's own 200" in found.words
    task.evaluations = needed
    found = rivals_of(task)
    assert not found.names
    assert found.words.startswith("none: to measure sensitivities for greedy and ilp would take")
    # Whoever has them already, or has them for nothing, shares them.
    for more in ({"sensitivity": "runs/a"}, {"sensitivity_kind": "gradient"}):
        assert rivals_of(asked(5, **more)).kind is None
    assert rivals_of(asked(5, "ilp")).names == ("greedy",)


def test_a_search_says_what_it_spends_and_its_rivals_cost_no_more(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    plan = [*SMALL, "--solver", "random", "--evaluations", "6", "--finetune-epochs", "0"]
    assert call(search.main, *plan, "--out", "a") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 for policies that it chooses one after the other" in out
    assert "greedy and ilp know sensitivities of kind gradient, which cost no evaluation" in out
    rows = (tmp_path / "a" / "history.csv").read_text().splitlines()[1:]
    by = [row.split(",")[0] for row in rows]
    assert [by.count(name) for name in ("random", "greedy", "ilp")] == [6, 1, 1]


def test_a_dry_run_proposes_the_evaluations(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    assert call(search.main, *SMALL, "--solver", "ilp", "--iterate", "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "solver ilp, iterated evaluations 100, each on 64 search images" in out
    assert re.search(
        r"\d+ for sensitivities, one operand at a time 1 for the policy that is optimal if sensitivities add up", out
    )
    assert call(search.main, *SMALL, "--solver", "random", "--iterate", "--dry-run") == 2
    assert "has no first solution to go on from: only ilp iterates" in capsys.readouterr().err


# ---- Hundreds of layers


def test_descent_by_steps_is_what_it_was_when_every_step_was_looked_at_anew() -> None:
    problem = make_problem(small_network(), 0.5)
    random = np.random.default_rng(0)
    for number in range(20):
        table = random.random((len(problem.decisions), 10, 10))
        if number % 2:
            table = np.round(table, 1)  # steps that are alike
        problem.limit = problem.smallest + random.random() * (problem.reference - problem.smallest)
        assert greedy.propose(problem, table) == problem.decide(_descended(problem, table))


def _descended(problem: haq.Problem, table: Any) -> list[Any]:
    """Greedy descent within one budget, from its definition."""
    losses = [decision.of(one) for decision, one in zip(problem.decisions, table, strict=True)]
    costs = [decision.prices for decision in problem.decisions]
    chosen = [int(cost.argmax()) for cost in costs]
    while not problem.within_budget(total := sum(cost[pick] for cost, pick in zip(costs, chosen, strict=True))):
        steps = [
            ((losses[i][j] - losses[i][pick]) / (costs[i][pick] - costs[i][j]), i, int(j))
            for i, pick in enumerate(chosen)
            for j in np.flatnonzero(costs[i] < costs[i][pick])
        ]
        _, layer, option = min(steps)
        chosen[layer] = option
    while True:
        gains = [
            (losses[i][j] - losses[i][pick], i, int(j))
            for i, pick in enumerate(chosen)
            for j in np.flatnonzero(losses[i] < losses[i][pick])
            if problem.within_budget(total - costs[i][pick] + costs[i][j])
        ]
        if not gains:
            return [decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True)]
        _, layer, option = min(gains)
        total += costs[layer][option] - costs[layer][chosen[layer]]
        chosen[layer] = option


def test_of_many_changes_the_best_trades_are_looked_at_in_pairs() -> None:
    random = np.random.default_rng(0)
    cheaper, worse = random.normal(size=5000), random.normal(size=5000)
    worse[7], cheaper[7] = -50.0, -50.0  # better and cheaper at once
    moves = _best_moves(cheaper, worse)
    assert len(moves) == MOST_MOVES
    assert 7 in moves
    assert np.array_equal(_best_moves(cheaper[:30], worse[:30]), np.arange(30))


@pytest.mark.parametrize(
    "budget", [0.5, pytest.param({"latency": 0.5, "storage": 0.7}, marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_54_layers_are_searched_by_all_that_needs_no_agent(budget: Any) -> None:
    problem = stack(54, budget)
    for solver in ("greedy", IntegerProgramme(iterate=True), "random"):
        session = Session(problem, 5)
        solve(solver, session, 0)
        assert session.used <= 5
        assert session.best is not None
        assert problem.holds(session.best.policy)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [54, 300])
def test_every_solver_searches_hundreds_of_layers(layers: int) -> None:
    problem = stack(layers)
    solvers = [name for name in SOLVERS if name != "exhaustive"]
    for solver in (*solvers, IntegerProgramme(iterate=True)):
        session = Session(problem, 12)
        solve(solver, session, 0)
        assert session.used <= 12
        assert session.best is not None
        assert problem.holds(session.best.policy)


@pytest.mark.slow
def test_the_cheapest_of_300_layers_is_searched_in_bounded_memory() -> None:
    problem = stack(300)
    made = problem.on(problem.target, None, max_drop=50.0)
    session = Session(made, 30)
    solve("ilp", session, 0)
    assert session.used <= 30
    assert session.best is not None
    assert math.isfinite(session.best.cost)


def test_a_plan_is_printed_in_lines_that_fit() -> None:
    console = Console(file=io.StringIO(), width=80)
    for line in words_of([Spending("first policies", 3, 30), Spending("the rest", 3)], 6):
        console.print(line)
    assert "3 for first policies (30 would be all; 27 are left out, for 6 evaluations)" in console.file.getvalue()  # type: ignore[attr-defined]
