"""Trials of earlier searches teach another one, whatever they were searched for; and nothing else is believed of them."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import haq
import quantizers as Q
from haq import search, sweep
from haq.console.errors import EXIT_INTERRUPTED
from haq.solvers.base import Session
from haq.solvers.space import Space
from haq.study import known_trials
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, call, history
from tests.conftest import enter, images, make_problem, small_network

SMALL = ["--network", "small_job:network", "--data", "small_job:splits", "--finetune-epochs", "0"]
SOLVER = """
import haq

SEEN = []

class Listens(haq.Solver):
    uses_trials = True

    def solve(self, problem, session, seed):
        SEEN.append(session)
        haq.solvers.SOLVERS.get("random")().solve(problem, session, seed)
"""
LISTENS = ["--solver", "small_job:Listens", "--evaluations", "6"]
TRUST = [word for name in ("network", "splits", "Listens") for word in ("--trust", f"small_job:{name}")]
RANDOM = ["--solver", "random", "--evaluations", "8"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with a job in it, and with a solver that does what random search does, and remembers its sessions."""
    enter(tmp_path, monkeypatch, MODULE + SOLVER)


def seen() -> list[Session]:
    sessions: list[Session] = importlib.import_module("small_job").SEEN
    return sessions


def known(session: Session) -> dict[Q.BitPolicy, tuple[float, float]]:
    return {policy: (evaluation.accuracy, evaluation.loss) for policy, evaluation in session.known}


def tried(folder: str) -> dict[Q.BitPolicy, tuple[float, float]]:
    """What the history of a run says, by policy."""
    run = SearchRun.load(Path(folder))
    names = [layer.name for layer in run.load_problem().layers]
    found = {}
    for row in history(Path(folder)):
        pairs = zip(names, row["weight_bits"].split("-"), row["activation_bits"].split("-"), strict=True)
        policy = Q.BitPolicy({name: (int(w), int(a)) for name, w, a in pairs})
        found[policy] = float(row["accuracy"]), float(row["loss"])
    return found


def test_runs_and_sweeps_for_other_hardware_and_budgets_are_known() -> None:
    assert call(search.main, *SMALL, "--hw", "cloud", "--budget", "0.8", *RANDOM, "--out", "one") == 0
    arguments = [*SMALL[:4], "--hw", "edge", "--budgets", "0.5,0.7", "--solvers", "random", "--evaluations", "3"]
    assert call(sweep.main, *arguments, "--metric", "storage", "--out", "two") == 0
    asked = [*SMALL, "--hw", "edge", "--budget", "0.6", *LISTENS, "--trials", "one,two", "--out", "new"]
    assert call(search.main, *asked) == 0
    expected = tried("two/edge-0.7-random-seed0") | tried("two/edge-0.5-random-seed0") | tried("one")
    assert known(seen()[0]) == expected
    # They aren't counted, and rivals are told nothing of them.
    assert seen()[0].used == 6
    assert len([row for row in history(Path("new")) if row["solver"].endswith("Listens")]) == 6
    copied = Path("new/trials.csv").read_text().splitlines()
    assert len(copied) == 1 + len(expected)


def test_a_run_goes_on_although_the_trials_it_was_given_are_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(search.main, *SMALL, "--budget", "0.8", *RANDOM, "--out", "one") == 0
    asked = [*SMALL, "--budget", "0.6", *LISTENS, "--trials", "one", "--out"]
    assert call(search.main, *asked, "whole") == 0
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", interrupted)
        assert call(search.main, *asked, "cut") == EXIT_INTERRUPTED
    shutil.rmtree("one")
    assert call(search.main, "--resume", "cut", *TRUST) == 0
    for name in ("history.csv", "trials.csv", "policy.json", "result.json"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()
    assert known(seen()[-1]) == known(seen()[0])


def test_trials_of_something_else_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *SMALL, "--budget", "0.8", *RANDOM, "--out", "one") == 0
    asked = [*SMALL, "--budget", "0.6", "--out", "new", "--trials", "one"]
    for further, message in (
        (["--solver", "random"], "solver 'random' learns nothing from trials of earlier searches"),
        ([*LISTENS, "--scheme", "dorefa"], "has trials of another scheme"),
        ([*LISTENS, "--correction", "none"], "has trials of another correction"),
        ([*LISTENS, "--objective", "agreement"], "has trials judged with objective accuracy, here it is agreement"),
        ([*LISTENS, "--trials", "nowhere"], "nowhere has no trials: it must be the folder of a run or of a sweep"),
    ):
        assert call(search.main, *asked, *further) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not Path("new").exists()
    content = yaml.safe_load(Path("one/config.yaml").read_text())
    content["signature"]["network"] = "other"
    Path("one/config.yaml").write_text(yaml.safe_dump(content))
    assert call(search.main, *asked, *LISTENS) == 2
    assert "has trials of another network" in capsys.readouterr().err


def test_in_python_a_result_and_a_folder_are_known(tmp_path: Path) -> None:
    problem = make_problem(small_network())
    first = haq.solve(problem, "random", evaluations=6)
    other = problem.on("cloud", 0.8)
    haq.solve(other, "small_job:Listens", evaluations=3, trials=first)
    assert known(seen()[0]) == {trial.policy: (trial.accuracy, trial.loss) for trial in first.trials}
    first.save(tmp_path / "saved")
    again = make_problem(small_network(), budget=0.7)
    haq.solve(again, "small_job:Listens", evaluations=3, trials=[tmp_path / "saved", first])
    assert known(seen()[1]) == known(seen()[0])


def test_the_best_that_is_known_is_evaluated_first_and_teaches() -> None:
    problem = make_problem(small_network())
    first = haq.solve(problem, "random", evaluations=12)
    other = problem.on("cloud", 0.7)
    found = haq.solve(other, "surrogate", evaluations=3, trials=first)
    fitting = [trial for trial in first.trials if other.holds(trial.policy)]
    best = min(fitting, key=lambda trial: (-trial.value, trial.loss))
    assert found.trials[0].policy == best.policy
    assert found.session.used == 3
    assert found.session.best is not None
    assert found.session.best.value >= best.value
    # What is known takes the place of the policies that a search begins with.
    alone = haq.solve(other, "surrogate", evaluations=3)
    assert found.trials[1].policy not in {trial.policy for trial in alone.trials[:1]}


def test_in_python_another_network_is_found_out() -> None:
    first = haq.solve(make_problem(small_network()), "random", evaluations=4)
    with pytest.raises(ValueError, match="result 1 are of another network, other data or another quantization"):
        haq.solve(make_problem(small_network(1)), "small_job:Listens", evaluations=3, trials=first)
    few = haq.Problem(
        small_network(), calibrate=images(32, 1), search=(images(32), torch.zeros(32, dtype=torch.long)), target="edge"
    )
    with pytest.raises(ValueError, match="has trials on 96 images, here they are 32"):
        haq.solve(few, "small_job:Listens", evaluations=3, trials=first)
    with pytest.raises(TypeError, match="trials is a int; it must be a result"):
        haq.solve(few, "small_job:Listens", evaluations=3, trials=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver 'random' learns nothing"):
        haq.solve(few, "random", evaluations=3, trials=first)


def test_policies_that_differ_where_nothing_can_be_chosen_are_left_out() -> None:
    problem = make_problem(small_network())
    is_describable = Space(problem).describes
    at_four = problem.uniform(4, keep_pinned=True)
    assert is_describable(at_four)
    # Widths that can't be chosen here, in layers that can be.
    assert is_describable(problem.uniform(16, keep_pinned=True))
    assert is_describable(problem.uniform(1, keep_pinned=True))
    # The first and the last layer are pinned at 8 bits.
    assert not is_describable(problem.uniform(4))
    tied = haq.Problem(
        problem.network,
        calibrate=images(32, 1),
        search=(images(8), torch.zeros(8, dtype=torch.long)),
        target="edge",
        tied=[["depthwise", "pointwise"]],
    )
    assert Space(tied).describes(at_four)
    assert not Space(tied).describes(Q.BitPolicy({**at_four, "depthwise": (8, 8)}))
    result = haq.solve(
        haq.Problem(
            problem.network,
            calibrate=images(32, 1),
            search=(images(8), torch.zeros(8, dtype=torch.long)),
            target="edge",
            pinned={},
        ),
        "random",
        evaluations=5,
    )
    found = known_trials.gather(result, tied)
    assert found.left_out
    assert f"{found.left_out} left out" in found.words(tied)
    assert len(found.trials) + found.left_out == 5
