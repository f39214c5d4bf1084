"""Searches of a sweep share what they try: one allowance, one result whatever happens on the way, and every run complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import haq
from haq import report, search, sweep
from haq.console import errors
from haq.problem.evaluator import Evaluator
from haq.solvers.base import Session
from haq.solvers.sharing import Sharing, allowance
from haq.solvers.surrogate import Search
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, call, history
from tests.conftest import enter, make_problem, small_network

SMALL = ["--network", "small_job:network", "--data", "small_job:splits"]
# Six problems: on edge and cloud, two budgets and one drop.
ASKED = [*SMALL, "--hw", "edge,cloud", "--budgets", "0.6,0.8", "--max-drops", "2", "--solvers", "surrogate"]
FEW = [*ASKED, "--evaluations", "8"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def files(folder: str) -> dict[str, bytes]:
    """What a sweep wrote, but for events, which have times in them; paths of its own folder left out."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("events.")]
    return {str(path.relative_to(folder)): path.read_bytes().replace(folder.encode(), b"SWEEP") for path in sorted(paths)}


def policies(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["weight_bits"], row["activation_bits"]) for row in rows]


def test_all_problems_take_little_more_than_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    prepared = Evaluator.prepared
    monkeypatch.setattr(Evaluator, "prepared", lambda self, policy: [prepared(self, policy), evaluated.append(policy)][0])
    assert call(sweep.main, *FEW, "--out", "run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 searches by surrogate share 13 evaluations" in out
    assert "surrogate, seed 0: 6 searches shared 13 evaluations; one alone may evaluate 8." in out
    content = json.loads(Path("run/sweep.json").read_text())
    assert content["shared"] == [{"solver": "surrogate", "seed": 0, "searches": 6, "evaluations": 13, "alone": 8, "known": 0}]
    cells = sorted(path.parent for path in Path("run").rglob("history.csv"))
    assert len(cells) == 6
    of_cells = {cell.name: history(cell) for cell in cells}
    own = {name: [row for row in rows if row["solver"] == "surrogate"] for name, rows in of_cells.items()}
    # Every policy is one search's own, and every history has all of them, in the order in which they were evaluated.
    assert sum(map(len, own.values())) == 13
    assert len({tuple(policies(rows)) for rows in of_cells.values()}) == 1
    assert len(set(policies(of_cells[cells[0].name]))) == 13
    assert {row["solver"] for rows in of_cells.values() for row in rows} == {"surrogate", "shared"}
    # Who reads a run sees what the search itself evaluated, and what it returned: the best of all that its problem allows.
    for name, rows in of_cells.items():
        result = json.loads(Path("run", name, "result.json").read_text())
        assert result["evaluations"] == {"surrogate": len(own[name])}
        assert result["shared"] == content["shared"][0]
        if "drop" not in name:
            within = [float(row["accuracy"]) for row in rows if row["within_budget"] == "1"]
            assert result["choice"]["best"] == max(within)
    assert call(report.main, "run", "run/edge-0.6-surrogate-seed0", "--out", "report.html") == 0
    assert "6 searches shared 13 evaluations" in Path("report.html").read_text()


def test_one_search_that_shares_with_nobody_is_that_search() -> None:
    asked = [*SMALL, "--evaluations", "9"]
    further = ["--solvers", "surrogate", "--hw", "edge", "--budgets", "0.7", "--out", "together"]
    assert call(sweep.main, *asked, *further) == 0
    further = ["--solver", "surrogate", "--hw", "edge", "--budget", "0.7", "--finetune-epochs", "0", "--out", "alone"]
    assert call(search.main, *asked, *further) == 0
    together, alone = Path("together/edge-0.7-surrogate-seed0"), Path("alone")
    assert history(together) == [row for row in history(alone) if row["solver"] == "surrogate"]
    assert (together / "policy.json").read_bytes() == (alone / "policy.json").read_bytes()


def test_a_sweep_killed_anywhere_goes_on_as_if_nothing_had_happened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*SMALL, "--hw", "edge,cloud", "--budgets", "0.8", "--max-drops", "2", "--solvers", "surrogate"]
    asked += ["--evaluations", "6"]
    assert call(sweep.main, *asked, "--out", "whole") == 0
    whole = files("whole")
    record, left = SearchRun.record, [0]

    def interrupted(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    # 4 rows are written for each of 8 evaluations: the kill may come between them, and after the last one.
    for number, after in enumerate((1, 14, 32)):
        left[0] = after
        with monkeypatch.context() as patch:
            patch.setattr(SearchRun, "record", interrupted)
            assert call(sweep.main, *asked, "--out", f"cut{number}") == errors.EXIT_INTERRUPTED
        capsys.readouterr()
        if number == 1:
            assert call(search.main, "--resume", "cut1/cloud-0.8-surrogate-seed0") == 2
            words = "is one of a sweep's searches, which share what they try: go on with python -m haq.sweep --resume cut1"
            assert words in capsys.readouterr().err
        workers = ["--workers", "2"] if number == 2 else []
        assert call(sweep.main, "--resume", f"cut{number}", *workers) == 0
        cut = files(f"cut{number}")
        assert whole.keys() == cut.keys()
        assert [name for name in whole if whole[name] != cut[name]] == []


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing() -> None:
    asked = [*SMALL, "--hw", "edge,cloud", "--budgets", "0.6,0.8", "--solvers", "surrogate", "--evaluations", "12"]
    assert call(sweep.main, *asked, "--ahead", "3", "--out", "here") == 0
    assert call(sweep.main, *asked, "--ahead", "3", "--workers", "2", "--out", "there") == 0
    here, there = files("here"), files("there")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_seeds_share_apart_and_other_solvers_are_left_alone() -> None:
    asked = [*SMALL, "--hw", "edge", "--budgets", "0.6,0.8", "--evaluations", "4", "--seeds", "2"]
    assert call(sweep.main, *asked, "--solvers", "random,surrogate", "--out", "both") == 0
    assert call(sweep.main, *asked, "--solvers", "random", "--out", "alone") == 0
    shared = json.loads(Path("both/sweep.json").read_text())["shared"]
    assert [(one["solver"], one["seed"], one["searches"], one["evaluations"]) for one in shared] == [
        ("surrogate", 0, 2, 4),
        ("surrogate", 1, 2, 4),
    ]
    for path in Path("alone").glob("edge-*/*"):
        if path.is_file() and not path.name.startswith("events."):
            other = Path("both", path.parent.name, path.name)
            assert other.read_bytes().replace(b"both", b"alone") == path.read_bytes(), path


def test_a_sweep_is_given_trials_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(sweep.main, *FEW, "--out", "first") == 0
    asked = [*SMALL, "--hw", "edge", "--budgets", "0.7,0.9", "--evaluations", "4"]
    assert call(sweep.main, *asked, "--solvers", "random", "--trials", "first", "--out", "second") == 2
    assert "solver 'random' learns nothing from trials" in capsys.readouterr().err
    assert call(sweep.main, *asked, "--solvers", "surrogate,random", "--trials", "first", "--out", "second") == 0
    assert "trials: 13 known from earlier searches" in " ".join(capsys.readouterr().out.split())
    assert len(Path("second/trials.csv").read_text().splitlines()) == 14
    assert json.loads(Path("second/sweep.json").read_text())["shared"][0]["known"] == 13
    assert not Path("second/edge-0.7-random-seed0/trials.csv").exists()
    # The best of them that fits is evaluated here before it is returned.
    problem = SearchRun.load(Path("second/edge-0.7-surrogate-seed0")).load_problem()
    known = history(Path("first/edge-0.6-surrogate-seed0"))
    fitting = [float(row["accuracy"]) for row in known if float(row["cost"]) <= problem.limit]
    tried = history(Path("second/edge-0.7-surrogate-seed0"))
    assert max(float(row["accuracy"]) for row in tried if row["within_budget"] == "1") >= max(fitting)


def test_what_one_search_found_the_others_know() -> None:
    problem = make_problem(small_network())
    problems = [problem.on("edge", budget) for budget in (0.5, 0.7, 0.9)]
    total = allowance(3, 12)
    sessions = [Session(one, total) for one in problems]
    seen: list[tuple[int, Any]] = []
    sharing = Sharing(
        [Search(one, session, 0) for one, session in zip(problems, sessions, strict=True)],
        total,
        lambda place, policy, evaluation: seen.append((place, policy)),
    )
    sharing.run()
    assert len(sharing.spent) == len(seen) == sum(session.used for session in sessions) == total == 15
    assert [policy for _, policy in seen] == list(sharing.spent)
    # Nobody waits for long, and nobody evaluates what another has.
    assert min(session.used for session in sessions) >= 2
    for searching in sharing.searches:
        assert len(searching.model.trials) == total


def test_an_adopted_trial_may_be_returned_and_does_not_count() -> None:
    problem = make_problem(small_network())
    session = Session(problem, 2)
    wide, narrow = problem.uniform(4, keep_pinned=True), problem.uniform(2, keep_pinned=True)
    told: list[Any] = []
    session.on_trial = told.append
    session.adopt(narrow, problem.evaluate(narrow))
    assert (session.used, session.left, len(session.trials)) == (0, 2, 1)
    assert session.best is not None
    assert session.evaluate(narrow) == problem.evaluate(narrow)
    assert session.used == 0
    session.evaluate(wide)
    assert (session.used, session.left) == (1, 1)
    assert [trial.policy for trial in told] == [wide]
    assert isinstance(haq.solvers.SOLVERS.get("surrogate").shares, bool)
