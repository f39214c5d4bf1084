"""Filters are ranked by their overlap over all layers, and new ones are orthogonal to what is there (RePr, CVPR 2019)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.pruning.filter_overlap import filter_overlaps, mean_overlap, orthogonal_filters, overlapping_filters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    rows, others = (torch.nn.functional.normalize(filters.flatten(1).double()) for filters in (one, other))
    return (rows @ others.T).abs()


def test_overlaps_of_a_hand_case() -> None:
    """cos 45 degrees to two others, nothing to the fourth; 0 and 1 are at right angles."""
    half = math.sqrt(0.5)
    weight = torch.tensor([[2.0, 0, 0], [0, -3, 0], [1, 1, 0], [0, 0, 0.1]]).view(4, 3, 1, 1)
    expected = torch.tensor([half, half, 2 * half, 0], dtype=torch.float64) / 4
    torch.testing.assert_close(filter_overlaps(weight), expected)
    assert mean_overlap({"a": weight}) == pytest.approx(half / 4)
    assert mean_overlap({}) == 0


def test_overlap_is_of_directions_alone() -> None:
    weight = random_weight(6, 3, 3, 3)
    lengths = torch.tensor([0.1, 1, -2, 30, 4, 0.5]).view(-1, 1, 1, 1)
    torch.testing.assert_close(filter_overlaps(weight * lengths), filter_overlaps(weight))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(filter_overlaps(weight[order]), filter_overlaps(weight)[order])
    assert filter_overlaps(torch.ones(5, 2, 3, 3)).allclose(torch.tensor(4 / 5).double())
    assert filter_overlaps(torch.linalg.qr(random_weight(8, 8)).Q).max() < 1e-6
    weight[2] = 0
    assert filter_overlaps(weight)[2] == 0


def test_the_ranking_is_of_all_layers_together() -> None:
    apart = torch.linalg.qr(random_weight(8, 8)).Q  # all at right angles
    alike = torch.ones(4, 8) + 0.01 * random_weight(4, 8, seed=1)
    chosen = overlapping_filters({"apart": apart, "alike": alike}, 3 / 12)
    assert list(chosen) == ["alike"]
    assert len(chosen["alike"]) == 3
    stays = int(filter_overlaps(alike).argmin())
    assert stays not in chosen["alike"]
    # One of a layer always stays; what is over goes to the other layer.
    more = overlapping_filters({"apart": apart, "alike": alike}, 0.5)
    assert more["alike"] == chosen["alike"]
    assert len(more["apart"]) == 3
    assert overlapping_filters({"apart": apart}, 0.0) == {}
    assert sum(map(len, overlapping_filters({"apart": apart, "alike": alike}, 0.99).values())) == 10
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"share is {share}; it must be a share of all filters"):
            overlapping_filters({"apart": apart}, share)


@given(kept=st.integers(0, 6), new=st.integers(1, 5), seed=st.integers(0, 99))
def test_new_filters_are_orthogonal_to_kept_and_old_ones_while_there_is_room(kept: int, new: int, seed: int) -> None:
    held, old = random_weight(kept, 3, 2, 2, seed=seed), random_weight(new, 3, 2, 2, seed=seed + 1)
    made = orthogonal_filters(held, old, generator(seed))
    assert made.shape == old.shape
    assert made.dtype == torch.float32
    own = cosines(made, old).diagonal()
    assert own.max() < 1e-5
    if kept:
        assert cosines(made, held).max() < 1e-5
        length = held.flatten(1).norm(dim=1).mean()
    else:
        length = torch.ones(())
    torch.testing.assert_close(made.flatten(1).norm(dim=1), length.expand(new))
    if kept + new < 12:
        assert (cosines(made, made) - torch.eye(new)).abs().max() < 1e-5


def test_without_a_null_space_new_filters_are_random() -> None:
    held, old = random_weight(20, 2, 2, 2), random_weight(3, 2, 2, 2, seed=1)
    made = orthogonal_filters(held, old, generator())
    assert torch.isfinite(made).all()
    assert cosines(made, made)[~torch.eye(3, dtype=torch.bool)].max() < 0.999
    assert not torch.equal(made, orthogonal_filters(held, old, generator(1)))
    torch.testing.assert_close(made, orthogonal_filters(held, old, generator()))


def test_dependent_and_zero_filters_take_no_room() -> None:
    one = random_weight(1, 2, 2, 1)
    held = torch.cat([one, 2 * one, -one, torch.zeros_like(one)])
    made = orthogonal_filters(held, one.expand(2, 2, 2, 1), generator())
    assert cosines(made, one).max() < 1e-5
    assert cosines(made[:1], made[1:]).max() < 1e-5
    assert orthogonal_filters(held, held[:0], generator()).shape == (0, 2, 2, 1)
    assert torch.isfinite(orthogonal_filters(held[3:], one, generator())).all()
