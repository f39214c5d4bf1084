"""The bars of searches: a rival is a solver like ours, every search is a row that is read back, and a verdict can fail."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import search_bars, search_rivals
from experiments.search_bars import Row, Searches
from haq.problem.table_file import TableFile, read
from haq.problem.tabular import TabularProblem
from haq.solvers import random_search
from haq.solvers.base import Session, solve
from tests.experiments.test_regret import known  # noqa: F401

COUNTS = (25, 50, 100, 200)


@pytest.fixture(scope="module")
def plain() -> TableFile:
    return read("plain")


def test_variables_stand_for_every_policy(plain: TableFile, known: TabularProblem) -> None:  # noqa: F811
    """Of a grid of widths, and of pairs that are none."""
    for problem in (TabularProblem(plain, "0.2"), known):
        variables, random = search_rivals.Variables(problem), np.random.default_rng(0)
        assert variables.counts
        for _ in range(20):
            options = random_search.draw(problem, random)
            assert variables.options(variables.values(options)) == options
            assert variables.over(variables.repaired(options, random)) <= 1e-9


@pytest.mark.parametrize("name", search_bars.OUTSIDE)
def test_a_rival_searches_as_ours_do(name: str, plain: TableFile) -> None:
    pytest.importorskip(search_bars.OUTSIDE[name][1])
    ways = []
    for seed in (1, 1):
        session = Session(TabularProblem(plain, "0.2"), 6)
        solve(search_bars.solver_of(name), session, seed)
        assert session.used == 6
        assert all(trial.feasible for trial in session.trials)
        ways.append([trial.policy for trial in session.trials])
    assert ways[0] == ways[1]


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna is not installed: pip install 'optuna>="):
        search_rivals.imported("optuna")
    assert search_bars.main(["--quick", "--solvers", "random", "optuna", "--tables", "plain", "--processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "without optuna: optuna is not installed" in printed
    assert "plain 0.2" in printed


def test_a_search_is_a_row_that_is_read_back(plain: TableFile, tmp_path: Path) -> None:
    row = search_bars.one_search(TabularProblem(plain, "0.2"), "plain", "0.2", "surrogate", 26, 0)
    assert list(row.regrets) == list(row.began) == [25]
    assert row.regrets[25] >= 0
    assert row.origin in ("start", "random", "plan", "neighbour")
    path = tmp_path / "search.csv"
    lines = [",".join(search_bars.COLUMNS), ",".join(search_bars.line_of(row)), "plain,0.2,rand"]
    path.write_text("\n".join(lines))
    (found,) = search_bars.load_rows(path)
    assert found.key == row.key
    assert found.began == row.began
    assert found.tested == pytest.approx(row.tested)


def made(plain: TableFile, regrets: dict[str, float]) -> Searches:
    """What is told of searches that all had a regret by solver, some more and some less."""
    searches = Searches([dataclasses.replace(plain, limits={"0.2": plain.limits["0.2"]})], list(regrets), 3, COUNTS)
    for solver, regret in regrets.items():
        for seed in range(3):
            values = dict.fromkeys(COUNTS, regret + 0.01 * seed)
            row = Row("plain", "0.2", solver, 200, seed, values, dict.fromkeys(COUNTS, "a"), 1.0, 80 - regret, 80.0, "")
            searches.rows[row.key] = row
        for count in COUNTS[:-1]:
            row = Row("plain", "0.2", solver, count, 0, values, dict.fromkeys(COUNTS, "a"), 1.0, 80.0, 80.0, "")
            searches.rows[row.key] = row
    return searches


def test_verdicts_say_what_falls_short(plain: TableFile) -> None:
    searches = made(plain, {"surrogate": 0.1, "random": 0.2})
    assert searches.complete == [("plain", "0.2")]
    lines = list(search_bars.regret_bars(searches))
    assert [line.split(":")[0] for line in lines] == ["holds", "holds", "holds", "FALLS SHORT by 0.05", "FALLS SHORT by 0.06"]
    (line,) = search_bars.rival_bars(searches)
    assert line.startswith("holds")
    (line,) = search_bars.rival_bars(made(plain, {"surrogate": 0.4, "random": 0.2}))
    error = 2**0.5 * statistics.stdev((0, 0.01, 0.02)) / 3**0.5
    assert line.startswith(f"FALLS SHORT by {0.2 - error:.2f}")
    assert "plain 0.2 after 50: 0.41 against 0.21" in line
    (line,) = search_bars.test_bars(searches)
    assert line.startswith("FALLS SHORT by 0.100")


def test_searches_that_begin_alike_are_done_once(plain: TableFile) -> None:
    searches = made(plain, {"surrogate": 0.1})
    assert not searches.wanted()
    key = ("plain", "0.2", "surrogate", 50, 0)
    searches.rows[key] = searches.rows[key]._replace(began=dict.fromkeys(COUNTS, "b"))
    wanted = {(count, seed) for *_, count, seed in searches.wanted()}
    assert wanted == {(count, seed) for count in (25, 50, 100) for seed in (1, 2)}
    assert not searches.complete


def test_the_time_of_a_solver_is_without_evaluations() -> None:
    assert search_bars.chain(3).decisions[1].pairs.shape == (49, 2)
    assert 0 < search_bars.milliseconds("random", 3, 20) < 1000
