"""Sweeps over allowed drops, the fronts of all that they find, and searches for the cheapest that were killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haq import report, search, sweep
from haq.store.records import FinishedSweepRecord, SweepRecord
from haq.study.config import NONE, SweepCell, SweepConfig
from haq.study.front import hypervolume, nondominated
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, call, history
from tests.conftest import enter
from tests.study.test_exact_resume import cut, same

SMALL = ["--network", "small_job:network", "--data", "small_job:splits"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def test_a_sweep_over_budgets_and_drops(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--hw", "edge", "--budgets", "0.6", "--max-drops", "2,30", "--solvers", "ilp,random", "--evaluations", "24"]
    assert call(sweep.main, *SMALL, *asked, "--out", "run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    record = SweepRecord.read(Path("run/sweep.json"))
    assert isinstance(record, FinishedSweepRecord)
    assert record.asked.max_drops == ["2", "30"]
    target = record.targets["edge"]
    assert [(row.asked, row.solver) for row in target.found] == [
        (asked, solver) for asked in ("0.6", "drop 2", "drop 30") for solver in ("ilp", "random")
    ]
    assert Path("run/edge-drop30-ilp-seed0/result.json").is_file()
    of_float = record.value(record.of_float, "search")
    for row in target.found:
        if row.max_drop:
            assert row.limit is None
            assert record.value(row, "search") >= of_float - float(row.max_drop) / 100 - 1e-9
        else:
            assert row.limit is not None
            assert row.cost <= row.limit * (1 + 1e-9)
    tight, loose = (next(row for row in target.found if (row.max_drop, row.solver) == (drop, "ilp")) for drop in ("2", "30"))
    assert loose.cost <= tight.cost

    assert [front.metrics for front in target.fronts] == [["latency"], ["latency", "storage"]]
    policies = [run.policy for row in target.found for run in row.runs]
    for front in target.fronts:
        assert front.of == len(policies) + len(target.uniform)
        points = [[member.value, *(-cost for cost in member.costs)] for member in front.policies]
        assert nondominated(np.array(points)).all()
        assert 0 < front.hypervolume < 1
        assert front.reference[0] == 0
    assert target.fronts[0].reference[1] == pytest.approx(target.uniform8)
    assert len(target.fronts[1].policies) >= len(target.fronts[0].policies)
    for word in ("are on the front of test accuracy, latency and storage", "hypervolume 0.", "of 0.00 % and", "drop 30"):
        assert word in shown
    assert call(report.main, "run", "--out", "report.html") == 0
    page = Path("report.html").read_text()
    assert "Not to be bettered in test accuracy, latency, storage" in page or "latency and storage" in page
    assert "largest drops" in page


def test_a_sweep_over_drops_goes_on_as_if_nothing_had_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*SMALL, "--hw", "edge", "--max-drops", "10", "--solvers", "ilp", "--evaluations", "24"]
    assert call(sweep.main, *asked, "--out", "whole") == 0
    assert json.loads(Path("whole/sweep.json").read_text())["asked"]["budgets"] == []
    cut(monkeypatch, SearchRun, "record", 30, sweep.main, *asked, "--out", "cut")
    assert call(sweep.main, "--resume", "cut") == 0
    assert history(Path("whole/edge-drop10-ilp-seed0")) == history(Path("cut/edge-drop10-ilp-seed0"))
    assert Path("whole/sweep.json").read_bytes().replace(b"whole", b"cut") == Path("cut/sweep.json").read_bytes()


@pytest.mark.parametrize(("solver", "moments"), [("ddpg", (20,)), ("evolution", (17,)), ("ilp", (20,))])
def test_a_search_for_the_cheapest_goes_on_as_if_nothing_had_happened(
    solver: str, moments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*SMALL, "--hw", "edge", "--max-drop", "10", "--solver", solver, "--evaluations", "24", "--finetune-epochs", "0"]
    assert call(search.main, *asked, "--out", "whole") == 0
    for moment in moments:
        cut(monkeypatch, SearchRun, "record", moment, search.main, *asked, "--out", "cut")
        assert call(search.main, "--resume", "cut") == 0
        assert same("whole", "cut") == []
        shutil.rmtree("cut")
    result = json.loads(Path("whole/result.json").read_text())
    assert result["reached"]["search_holds"]
    assert result["evaluations"][solver] <= 24


def test_a_search_that_finds_nothing_good_enough_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*SMALL, "--hw", "edge", "--solvers", "random", "--evaluations", "3", "--bits", "1:1", "--max-drops"]
    assert call(sweep.main, *asked, "0,100", "--out", "some") == 0
    assert "edge: nothing good enough was found for drop 0 by random, seed 0." in " ".join(capsys.readouterr().out.split())
    assert [row.asked for row in SweepRecord.read(Path("some/sweep.json")).found] == ["drop 100"]  # type: ignore[attr-defined]
    assert call(sweep.main, *asked, "0", "--out", "none") == 2
    assert "no search of none found a policy that loses at most 0: allow more with --max-drops" in capsys.readouterr().err


def test_cells_are_named_after_what_is_asked_for() -> None:
    assert SweepCell("edge", "0.5", "ilp", 0).folder == "edge-0.5-ilp-seed0"
    assert SweepCell("mine/chip.yaml", NONE, "ilp", 1, "0.5").folder == "chip-drop0.5-ilp-seed1"


def test_what_a_sweep_is_asked_for() -> None:
    assert SweepConfig(max_drops="0.2,1").asked == [(NONE, "0.2"), (NONE, "1")]
    both = SweepConfig(budgets="0.5,0.6", max_drops="1")
    assert both.asked == [("0.5", ""), ("0.6", ""), (NONE, "1")]
    assert SweepConfig.read(both.to_dict()) == both
    assert "--max-drops 1" in both.command()
    assert "max_drops" not in SweepConfig().to_dict()
    assert SweepConfig().asked[0] == ("0.3", "")


@pytest.mark.parametrize("drops", ["-1", "half", "1,1", "nan", "1,"])
def test_drops_that_are_none(drops: str) -> None:
    with pytest.raises(ValueError, match="--max-drops (has|is) '"):
        SweepConfig(max_drops=drops)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 3), st.integers(1, 12), st.integers(0, 10_000))
def test_hypervolumes_are_what_random_points_say(respects: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.random((count, respects))
    thrown = random.random((20_000, respects))
    dominated = np.any(np.all(thrown[:, None, :] <= points[None], axis=2), axis=1)
    found = hypervolume(points, np.zeros(respects))
    assert found == pytest.approx(dominated.mean(), abs=0.02)
    on_front = nondominated(points)
    assert hypervolume(points[on_front], np.zeros(respects)) == pytest.approx(found)
    for point, is_on_front in zip(points, on_front, strict=True):
        beaten = ((points >= point).all(1) & (points > point).any(1)).any()
        assert is_on_front == (not beaten)


def test_equal_policies_share_the_front() -> None:
    assert nondominated(np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])).tolist() == [True, True, False]
