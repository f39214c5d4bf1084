"""Experiments of training methods run through, and say what holds by computation."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from experiments import lottery_ticket, repr, rethinking_pruning
from experiments import training_methods as shared


@pytest.mark.parametrize("experiment", [repr, lottery_ticket, rethinking_pruning], ids=lambda module: module.NAME)
def test_a_quick_look_prints_and_saves_a_page(
    experiment: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["experiment"])
    assert experiment.main(["--quick", "--out", str(tmp_path)]) == 0  # type: ignore[attr-defined]
    name: str = experiment.NAME  # type: ignore[attr-defined]
    page = (tmp_path / f"{name}.md").read_text()
    assert page in capsys.readouterr().out
    claims = [line for line in page.splitlines() if line.startswith(("* holds: ", "* doesn't hold: "))]
    assert len(claims) >= 3
    rows = (tmp_path / f"{name}.csv").read_text().splitlines()
    assert len(rows) >= 5
    assert "| ---: |" in page


def test_what_holds_is_computed() -> None:
    assert shared.spread([1.0, 2.0, 3.0]) == (2.0, pytest.approx(3**-0.5))
    assert shared.spread([5.0]) == (5.0, 0.0)
    clear = shared.above("it is above", [1.0, 2.0, 3.0])
    assert clear.holds
    assert str(clear) == "holds: it is above (+2.00 ± 0.58 points; seed by seed +1.00, +2.00, +3.00)"
    assert not shared.above("it is above", [-1.0, 2.0, 0.0]).holds
    assert not shared.above("by more than 2", [1.0, 2.0, 3.0], by=2).holds
    assert shared.within("it is close", [-0.2, -0.3], 0.3).holds
    assert str(shared.above("it is above", [1.0])).startswith("not judged by one seed: it is above (+1.00")
    assert str(shared.within("it is close", [-0.5, -0.3], 0.3)).startswith("doesn't hold: it is close (-0.40")


def test_scratch_b_has_the_macs_of_the_whole_training() -> None:
    for whole, pruned in ((1_157_504, 656_448), (1_157_504, 600_000), (10, 9)):
        steps = rethinking_pruning.scratch_b_steps(756, whole, pruned)
        assert steps * pruned == pytest.approx(756 * whole, rel=0.01)
    assert rethinking_pruning.scratch_b_steps(756, 1_157_504, 296_512) == 2 * 756  # at most twice the epochs
    options = argparse.Namespace(quick=False, images=100, epochs=1)
    with pytest.raises(ValueError, match="--images is 100; it must be a multiple of 64"):
        rethinking_pruning.prepared(options)
    with pytest.raises(ValueError, match="--images is 10000; there are 8000 images to train on"):
        shared.samples(10_000)


def test_networks_of_a_seed_are_the_same_and_keep_the_random_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (shared.seeded(seed, shared.convolutional) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
