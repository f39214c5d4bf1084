"""Experiments on GAL and on learned groups run through; what they compare costs the same, and begins the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import gal, learned_groups
from experiments import training_methods as shared
from quantizers.pruning import channel_groups, remove_channels

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("experiment", [gal, learned_groups], ids=lambda module: module.NAME)
def test_a_quick_look_prints_and_saves_a_page(
    experiment: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["experiment"])
    assert experiment.main(["--quick", "--seeds", "2", "--out", str(tmp_path)]) == 0  # type: ignore[attr-defined]
    name: str = experiment.NAME  # type: ignore[attr-defined]
    page = (tmp_path / f"{name}.md").read_text()
    assert page in capsys.readouterr().out
    claims = [line for line in page.splitlines() if line.startswith(("* holds: ", "* doesn't hold: "))]
    assert len(claims) >= 3
    assert "the paper's direction" in page
    assert len((tmp_path / f"{name}.csv").read_text().splitlines()) >= 4


def test_random_channels_cost_what_gals_do() -> None:
    module = shared.seeded(0, shared.convolutional)
    groups = channel_groups(module, gal.EXAMPLE)
    counts = [10, 12, 20, 7]
    pruned = remove_channels(module, groups, gal.drawn(groups, counts, 0))
    assert gal.widths(pruned) == tuple(counts)
    assert gal.drawn(groups, counts, 0) != gal.drawn(groups, counts, 1)
    left = gal.macs(pruned)
    even = gal.even_counts(module, groups, left)
    smaller = remove_channels(module, groups, gal.drawn(groups, even, 0))
    assert 0.8 * left < gal.macs(smaller) <= left


def test_claims_are_computed_from_pairs() -> None:
    rows = []
    for seed, (mine, other) in enumerate([(80.0, 79.0), (81.0, 79.5), (82.0, 81.0)]):
        rows.append(gal.Outcome(seed, gal.GAL, mine, 60.0, "8-8-8-8", 8))
        others = (gal.UNPRUNED, gal.SAME, gal.EVEN, gal.SCRATCH)
        rows += [gal.Outcome(seed, who, other, 60.0, "8-8-8-8", 8) for who in others]
    train, test = shared.samples(64)
    claims = gal.page(gal.Job(train, test, 1), rows).claims
    assert all(claim.holds for claim in claims)
    assert "+1.17 ± 0.17 points; seed by seed +1.00, +1.50, +1.00" in str(claims[2])
