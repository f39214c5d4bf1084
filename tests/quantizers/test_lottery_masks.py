"""Masks of weights are nested, as dense as said, and of the smallest magnitudes (Lottery Ticket Hypothesis, ICLR 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantizers.pruning.lottery_ticket import magnitude_masks, mask_density, maskable_weights, shuffled_masks


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(10, 10, generator=generator), "b": 0.1 * torch.randn(20, 30, generator=generator)}


def test_the_smallest_go() -> None:
    weight = {"a": torch.tensor([[3.0, -1.0], [0.5, -2.0]])}
    first = magnitude_masks(weight, 0.25)
    assert first["a"].tolist() == [[True, True], [False, True]]
    # What is masked doesn't count again, however large it has become.
    second = magnitude_masks({"a": torch.tensor([[3.0, -1.0], [9.0, -2.0]])}, 1 / 3, first)
    assert second["a"].tolist() == [[True, False], [False, True]]
    assert mask_density(second) == 0.5
    ties = magnitude_masks({"a": torch.ones(4)}, 0.5)
    assert ties["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("across", ["layer", "network"])
def test_masks_are_nested_and_as_dense_as_said(across: str) -> None:
    share, masks = 0.2, None
    for number in range(1, 9):
        before = masks
        masks = magnitude_masks(weights(number), share, masks, across=across)
        if before is not None:
            assert all((before[name] | ~masks[name]).all() for name in masks)
        assert mask_density(masks) == pytest.approx((1 - share) ** number, abs=number / 700)
        if across == "layer":
            for mask in masks.values():
                assert mask.float().mean() == pytest.approx((1 - share) ** number, abs=number / mask.numel())


def test_across_the_network_the_smallest_layer_loses_most_and_a_share_of_its_own_counts() -> None:
    masks = magnitude_masks(weights(), 0.5, across="network")
    assert masks["a"].float().mean() > 0.85
    assert masks["b"].float().mean() < 0.5
    masks = magnitude_masks(weights(), 0.5, across="network", shares={"b": 0.1})
    assert masks["a"].sum() == 50
    assert masks["b"].sum() == 540
    masks = magnitude_masks(weights(), 0.5, shares={"b": 0.0})
    assert masks["a"].sum() == 50
    assert masks["b"].all()


def test_shuffled_masks_have_as_many_survivors_elsewhere() -> None:
    masks = magnitude_masks(weights(), 0.7)
    shuffled = shuffled_masks(masks, torch.Generator().manual_seed(0))
    for name, mask in masks.items():
        assert mask.sum() == shuffled[name].sum()
        assert mask.shape == shuffled[name].shape
        assert (mask != shuffled[name]).float().mean() > 0.2
    again = shuffled_masks(masks, torch.Generator().manual_seed(0))
    assert all(torch.equal(shuffled[name], again[name]) for name in masks)


def test_what_masks_are_of() -> None:
    shared = nn.Linear(3, 3)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), shared, shared, nn.Conv1d(1, 1, 1))
    assert list(maskable_weights(network)) == ["0.weight", "3.weight", "5.weight"]
    assert list(maskable_weights(shared)) == ["weight"]


def test_bad_values_are_named() -> None:
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"share is {share}; it must be a share of the weights"):
            magnitude_masks(weights(), share)
    with pytest.raises(ValueError, match="across is 'layers'; it must be layer or network"):
        magnitude_masks(weights(), 0.1, across="layers")
    with pytest.raises(ValueError, match="no weight 'c' to mask a share of; there are a, b"):
        magnitude_masks(weights(), 0.1, shares={"c": 0.1})
    with pytest.raises(ValueError, match="the masks are of other weights"):
        magnitude_masks(weights(), 0.1, {"a": torch.ones(2)})
    assert mask_density({}) == 1
