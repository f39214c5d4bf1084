"""The experiment on allowed drops: it runs, and says how far solvers are from the cheapest of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import max_drop
from experiments.max_drop import Row
from tests.commands.test_search_command import MODULE
from tests.conftest import enter


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    arguments = ["--quick", "--network", "small_job:network", "--data", "small_job:splits", "--drops", "5", "30"]
    arguments += ["--solvers", "ilp", "random", "--sweep", "ilp", "--out", "out"]
    assert max_drop.main(arguments) == 0
    page = Path("out/max_drop.md").read_text()
    for word in ("| ilp |", "| random |", "| sweep by ilp |", "at most 30 points: ilp"):
        assert word in page
    lines = Path("out/max_drop.csv").read_text().splitlines()
    assert lines[0] == ",".join(max_drop.COLUMNS)
    assert len(lines) == 1 + 3 * 2


def test_verdicts_are_against_the_cheapest_sweep() -> None:
    rows = [
        Row("ilp", 1.0, 0.505, 0.9, 200, 1, 1.0),
        Row("random", 1.0, None, None, 200, 1, 1.0),
        Row("sweep by ilp", 1.0, 0.6, 0.9, 40, 40, 1.0),
        Row("sweep by ddpg", 1.0, 0.5, 0.9, 8000, 40, 1.0),
    ]
    assert max_drop.verdicts(rows, [1.0], ["ilp", "random"]) == ["at most 1 points: ilp +1.0 % (holds), random found none"]
    assert max_drop.verdicts([row._replace(cost=0.52) for row in rows[:1]] + rows[3:], [1.0], ["ilp"]) == [
        "at most 1 points: ilp +4.0 % (FALLS SHORT)"
    ]
