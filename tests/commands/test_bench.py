"""`haq bench` tells how far solvers stay from the best policy, on tables; what it prints is what the searches found."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from haq import bench
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.problem.tabular import TabularProblem
from haq.solvers.base import Session, Solver, solve
from haq.solvers.random_search import RandomSearch
from haq.study.bench import Asked, Bench, Place, Searched, _searching, load
from haq.study.workers import moving
from tests.problem.test_tabular import made


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    np.savez(tmp_path / "made.npz", **made(pairs=((2, 2), (2, 4), (4, 4), (4, 8))))  # type: ignore[arg-type]
    return tmp_path / "made.npz"


class Hasty(RandomSearch):
    """Draws otherwise when it has less to spend."""

    name = "hasty"

    def solve(self, problem: object, session: Session, seed: int) -> None:
        super().solve(problem, session, seed + session.left)  # type: ignore[arg-type]


class Dear(Solver):
    """Never meets a budget."""

    name = "dear"
    draws = False

    def solve(self, problem: object, session: Session, seed: int) -> None:
        session.evaluate(problem.decide([(8, 8), (4, 8), (4, 8), (8, 8)]))  # type: ignore[attr-defined]


def test_regret_is_that_of_the_best_within_the_budget(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--solver", "random", "--solver", "evolution,ilp", "--evaluations", "2,9,3", "--seeds", "3", "--json"]
    assert bench.main([*words, "--out", "found.json", str(table)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads(Path("found.json").read_text())
    assert found["evaluations"] == [2, 3, 9]
    rows = {(row["table"], row["budget"], row["solver"]): row for row in found["results"]}
    assert list(rows) == [("made", budget, solver) for budget in ("tight", "0.6") for solver in ("random", "evolution", "ilp")]
    problem = TabularProblem(table, "0.6")
    row = rows["made", "0.6", "random"]
    for count in (2, 9):
        regrets, returned = [], []
        for seed in range(3):
            session = Session(problem, count)
            returned.append(problem.test(solve("random", session, seed).policy).value)
            assert session.best is not None
            regrets.append(100 * (problem.best_value - session.best.value))
        assert row["by_seed"][str(count)] == pytest.approx(regrets)
        assert row["regrets"][str(count)] == pytest.approx(statistics.mean(regrets))
        assert row["errors"][str(count)] == pytest.approx(statistics.stdev(regrets) / math.sqrt(3))
    assert row["tested"] == pytest.approx(statistics.mean(returned))
    assert row["one_search"]
    assert row["seeds"] == 3
    assert rows["made", "0.6", "ilp"]["seeds"] == 1
    (mean,) = (one for one in found["means"] if one["solver"] == "random")
    assert mean["regrets"]["9"] == pytest.approx((row["regrets"]["9"] + rows["made", "tight", "random"]["regrets"]["9"]) / 2)
    assert f"{row['regrets']['9']:.2f} ± {row['errors']['9']:.2f}" in printed.err
    assert "ilp: one search, as it draws nothing" in printed.err
    assert "mean and standard error over seeds" in " ".join(printed.err.split())


def measured(table: Path, workers: int | None) -> tuple[Bench, list[Asked]]:
    made = Bench(load([str(table)]), [f"{__name__}:Hasty", "random"], 2, [2, 5])
    done: list[Asked] = []
    made.run(workers, lambda searched: done.append(searched.asked))
    return made, done


def test_a_solver_that_spends_otherwise_is_searched_for_every_count(table: Path) -> None:
    found, done = measured(table, None)
    place = Place("made", "tight")
    assert found.is_one_search(place, "random")
    assert not found.is_one_search(place, f"{__name__}:Hasty")
    # All of the first seed; of the second every count for one of them alone.
    assert len(done) == 2 * (2 + 2) + 2 * (2 + 1)
    # What a worker is given, and does.
    problems, classes = moving.load(moving.dumps((found.problems, {"random": RandomSearch})))
    asked = Asked(place, "random", 5, 1)
    there = _searching(None, problems, classes)(asked)
    assert there._replace(seconds=0.0) == found.found[asked]._replace(seconds=0.0)


@pytest.mark.slow
def test_workers_change_nothing(table: Path) -> None:
    here, there = (measured(table, workers)[0] for workers in (None, 2))
    assert [row._replace(milliseconds=0.0) for row in here.rows()] == [row._replace(milliseconds=0.0) for row in there.rows()]


def test_what_is_done_is_told_when_it_is_interrupted(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Bench.run

    def interrupted(self: Bench, workers: int | None, on_search: Callable[[Searched], None]) -> None:
        def stop(searched: Searched) -> None:
            on_search(searched)
            if searched.asked.place.budget == "0.6":
                raise KeyboardInterrupt

        run(self, workers, stop)

    monkeypatch.setattr(Bench, "run", interrupted)
    words = ["--solver", "random", "--tables", str(table), "--evaluations", "2", "--seeds", "1", "--out", "part.json"]
    assert bench.main(words) == EXIT_INTERRUPTED
    assert "Interrupted" in capsys.readouterr().out
    (row, *others) = json.loads(Path("part.json").read_text())["results"]
    assert row["budget"] == "tight"
    assert len(others) <= 1


def test_tables_of_one_name_are_told_apart(table: Path) -> None:
    found = Bench(load(["made.npz", "./made.npz"]), ["random"], 1, [2])
    assert [place.table for place in found.places] == ["made", "made", "./made.npz", "./made.npz"]


def test_a_solver_that_finds_nothing_is_told(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--solver", f"{__name__}:Dear", "--tables", str(table), "--evaluations", "4"]) == 0
    printed = capsys.readouterr().out
    assert "In 2 of its longest searches it found nothing within the budget" in printed
    assert "standard error" not in " ".join(printed.split())  # --seeds is 1
    best = TabularProblem(table).best_value
    assert f"{100 * best:.2f}" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--solver is missing: give at least one of ddpg"),
        (["--solver", "rundom"], "unknown solver 'rundom'"),
        (["--solver", "random,random"], "each of them can be given once"),
        (["--solver", "random", "--seeds", "0"], "--seeds is 0; it must be an integer from 1"),
        (["--solver", "random", "--evaluations", "5,0"], "--evaluations is '5,0'; it must be integers of at least 1"),
        (["--solver", "random", "--tables", "nowhere"], "there is no nowhere: give the .npz file of an enumerated problem"),
        (["--solver", "random", "--tables", "there.json"], "is not the .npz file of an enumerated problem"),
        (["--solver", "random", "--workers", "0"], "--workers is 0"),
        (["--solver", "random", "--out", "there.json"], "there.json exists and is not overwritten"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    table: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.json").write_text("{}")
    assert run_command(lambda: bench.main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert Path("there.json").read_text() == "{}"
