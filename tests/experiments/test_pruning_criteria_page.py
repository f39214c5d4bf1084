"""The experiment on criteria of pruning: it runs, goes on with what there is, and holds criteria against random channels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments import pruning_criteria
from experiments.pruning_criteria import DEFAULT, RANDOM, SCRATCH, SMALL, Row, Spread, against_random, table, verdicts


def test_it_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning_criteria, "CRITERIA", ("l1", "ccp"))
    monkeypatch.setattr(pruning_criteria, "TARGETS", (0.5,))
    arguments = ["--quick", "--networks", SMALL, "--out", str(tmp_path)]
    assert pruning_criteria.main(arguments) == 0
    page = (tmp_path / "pruning_criteria.md").read_text()
    for word in ("| l1 |", "| ccp |", "| random |", "| Scratch-B |", "l1 is at least as good as random"):
        assert word in page
    rows = pruning_criteria.load_rows(tmp_path / "pruning_criteria.csv")
    assert [row.criterion for row in rows] == ["unpruned", "random", "l1", "ccp", "Scratch-B"]
    # All are of the same cost.
    assert len({(row.macs, row.share) for row in rows[1:]}) == 1
    assert abs(rows[1].macs - 0.5) < 0.05
    capsys.readouterr()
    (tmp_path / "pruning_criteria.csv").write_text(
        "".join((tmp_path / "pruning_criteria.csv").read_text().splitlines(keepends=True)[:-1])
    )
    assert pruning_criteria.main(arguments) == 0
    again = pruning_criteria.load_rows(tmp_path / "pruning_criteria.csv")
    assert again[:-1] == rows[:-1]
    assert again[-1].after == rows[-1].after
    assert "l1, seed 0" not in capsys.readouterr().out


def row(criterion: str, seed: int, before: float, after: float, network: str = DEFAULT) -> Row:
    return Row(network, 0.5, criterion, seed, 0.5, 0.7, before, after)


def test_differences_are_of_the_same_seed() -> None:
    rows = [row(RANDOM, 0, 50, 80), row(RANDOM, 1, 60, 84), row("l1", 0, 55, 82), row("l1", 1, 61, 88)]
    rows += [row(SCRATCH, 0, math.nan, 70), row("fpgm", 0, 50, 79), row("fpgm", 1, 50, 84.5)]
    rows += [Row(DEFAULT, 1.0, "unpruned", seed, 1.0, 1.0, 92, 92) for seed in (0, 1)]
    assert against_random(rows, DEFAULT, 0.5, "l1", "after") == Spread(3.0, pytest.approx(1.0))
    assert against_random(rows, DEFAULT, 0.5, "l1", "before") == Spread(3.0, pytest.approx(2.0))
    lines = {line[0]: line[1:] for line in table(rows, DEFAULT, 0.5).rows}
    assert lines["l1"] == ("58.00 ± 3.00", "+3.00 ± 2.00", "85.00 ± 3.00", "+3.00 ± 1.00", "2")
    assert lines[SCRATCH] == ("–", "–", "70.00 ± ?", "-10.00 ± ?", "1")
    assert lines[RANDOM][1] == lines[RANDOM][3] == "–"
    said = list(verdicts(rows))
    assert said[0].startswith("holds: l1 is at least as good as random (mobilenet-mini at 0.5 +3.00 ± 1.00)")
    assert said[1].startswith("FALLS SHORT: fpgm is at least as good as random (mobilenet-mini at 0.5 -0.25 ± 0.75)")
