"""The experiment on channels and bits: it runs, goes on with what is missing, and says where joint search is better."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from experiments import prune_and_quantize as experiment
from experiments.prune_and_quantize import BITS, CHANNELS, JOINT, RETRAINED, TWO_STEPS, Row


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the network small, and keep it nowhere else."""

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            experiment.Block(4, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )

    monkeypatch.setattr(experiment, "residual", network)
    monkeypatch.setenv("HAQ_DATA", str(tmp_path / "cache"))


def test_every_method_runs_and_only_what_is_missing_is_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = ["--quick", "--out", str(out), "--targets", "edge", "--budgets", "0.7"]
    assert experiment.main(asked) == 0
    rows = (out / "prune_and_quantize.csv").read_text().splitlines()
    assert rows[0] == ",".join(Row._fields)
    assert [row.split(",")[2] for row in rows[1:]] == list(experiment.METHODS)
    page = (out / "prune_and_quantize.md").read_text()
    for word in ("| edge | 0.7 | joint |", "joint better than bits only, two steps, retrained"):
        assert word in page
    assert (out / "prune_and_quantize.png").stat().st_size > 1000
    # A killed call has written the cells that it finished.
    (out / "prune_and_quantize.csv").write_text("\n".join(rows[:-1]) + "\n")
    done = []
    cell_of = experiment.cell_of
    monkeypatch.setattr(experiment, "cell_of", lambda bench, *cell: done.append(cell) or cell_of(bench, *cell))
    assert experiment.main(asked) == 0
    assert done == [(JOINT, "edge", 0.7)]
    again = (out / "prune_and_quantize.csv").read_text().splitlines()
    assert [row.split(",")[:14] for row in again] == [row.split(",")[:14] for row in rows]
    with pytest.raises(ValueError, match="has cells of 6 evaluations and 1 epochs, and 40 and 3 are asked for"):
        experiment.main(["--out", str(out)])


def test_what_a_method_cant_reach_is_said_and_its_cheapest_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--quick", "--targets", "edge", "--budgets", "0.01", "--methods", BITS, CHANNELS]
    assert experiment.main(asked) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("edge, 0.01, bits only, seed 0: out of reach (at least 0.")
    assert second.startswith("edge, 0.01, channels, seed 0: out of reach (at least 0.")


def row(method: str, seed: int, after: float, target: str = "edge", budget: float = 0.2, least: float | None = None) -> Row:
    return Row(target, budget, method, seed, least, budget, 0.5, 4.0, 4.0, 0.9, 0.5, after, 60, 4, 1.0, "")


def test_verdicts_are_of_paired_differences() -> None:
    rows = []
    for target in ("edge", "finn"):
        for budget in experiment.JUDGED:
            for seed, luck in enumerate((0.0, 0.05, -0.05)):
                rows += [row(JOINT, seed, 0.82 + luck, target, budget), row(BITS, seed, 0.8 + luck, target, budget)]
                for method in (TWO_STEPS, RETRAINED):
                    rows.append(row(method, seed, 0.81 + luck + 0.001 * seed, target, budget))
    apart = experiment.difference(rows, "edge", 0.2, TWO_STEPS)
    assert apart is not None
    assert apart.mean == pytest.approx(0.009)
    assert apart.error == pytest.approx(0.001 / 3**0.5)
    said = experiment.verdicts(rows)
    assert said[0] == "edge, 0.2: joint against bits only +2.00 ± 0.00 points: holds"
    assert said[-1].endswith("at least 2 targets: holds (edge, finn)")
    worse = [one._replace(after=0.7) if one.cell[:3] == ("finn", 0.1, JOINT) else one for one in rows]
    assert experiment.verdicts(worse)[-1].endswith("doesn't hold (edge)")
    assert "isn't known" in experiment.verdicts([one for one in rows if one.method != BITS])[0]
    # What isn't within the budget isn't better, whatever it is worth; joint must be within it.
    dearer = [one._replace(least=0.3, cost=0.3, after=0.9) if one.method == BITS else one for one in rows]
    holds, line = experiment.judged(dearer, "edge", 0.2, BITS)
    assert holds
    assert "out of reach of bits only, whose cheapest has 90.00 ± 0.00 % at 0.300" in line
    beyond = [one._replace(least=0.3) if one.method == JOINT else one for one in dearer]
    assert experiment.judged(beyond, "edge", 0.2, BITS) == (False, "edge, 0.2: out of reach of joint: doesn't hold")


def test_the_first_of_two_steps_leaves_what_bits_can_save() -> None:
    assert experiment.first_budget(0.25, 0.2) == 0.5
    # Bits save at most a fifth: channels must leave little more than the budget.
    assert experiment.first_budget(0.25, 0.8) == pytest.approx(0.28125)
