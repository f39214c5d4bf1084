"""The experiment on sweeps that share what they learn: it runs, and says whether the bars hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import sweep_sharing
from experiments.sweep_sharing import Row
from tests.commands.test_search_command import MODULE
from tests.conftest import enter


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    arguments = ["--quick", "--network", "small_job:network", "--data", "small_job:splits", "--out", "out"]
    assert sweep_sharing.main(arguments) == 0
    page = Path("out/sweep_sharing.md").read_text()
    assert "6 evaluations: the sweep took 1.33 times those of one search (at most 3.5: holds)" in page
    lines = Path("out/sweep_sharing.csv").read_text().splitlines()
    assert lines[0] == ",".join(sweep_sharing.COLUMNS)
    assert len(lines) == 1 + 4


def test_verdicts_are_by_the_paired_error() -> None:
    near = Row(50, 0, "edge", "0.5", 91.0, 91.2, 91.3, 0.25, 0.25, 170)
    far = near._replace(shared=90.9)
    assert "2 of 2 results are within one standard error" in sweep_sharing.verdicts([near, near])[0]
    words = sweep_sharing.verdicts([near, far._replace(spent=180)])[0]
    assert "1 of 2 results are within one standard error" in words
    assert "3.60 times those of one search (at most 3.5: FALLS SHORT)" in words
    assert "on average -0.25 points" in words
