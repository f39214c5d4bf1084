"""Bit operations, the average width, memory traffic and the peak of memory are what a count by hand gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hw_models
from hw_models.cost import CostTable
from hw_models.widths import places


class Residual(nn.Module):
    """8 channels at 6x6: a convolution, another beside its input, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Conv2d(8, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.second(x))


class Concat(nn.Module):
    """Two branches of 4 and 6 channels from one input, side by side into a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 1, bias=False)
        self.right = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.head = nn.Conv2d(10, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


class Separable(nn.Module):
    """A depthwise convolution of stride 2, and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 16, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Shared(nn.Module):
    """One convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def table_of(network: nn.Module, *shape: int) -> CostTable:
    """A table of a target that does everything at the same latency."""
    workload = hw_models.trace(network.eval(), torch.zeros(1, *shape))
    latency = np.ones((len(workload), 10, 10))
    return CostTable("mine", "estimated", workload, 1, latency, None, hw_models.storage_bytes(workload))


def linear_only() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False))


# By network: input, widths of weights and of activations by layer, and what is counted by hand.
HAND = {
    "residual": (
        Residual(),
        (4, 6, 6),
        ([8, 4, 16], [8, 2, 32]),
        {
            # 36 positions: 9*4*8, 9*8*8 and 8*2 products at each.
            "bops": 36 * (288 * 64 + 576 * 8 + 16 * 16 * 32),
            "average_weight_bits": (288 * 8 + 576 * 4 + 16 * 16) / (288 + 576 + 16),
            # Weights, then what is read and written at each layer's activation width.
            "memory_traffic": (288 * 8 + 36 * 12 * 8 + 576 * 4 + 36 * 16 * 2 + 16 * 16 + 36 * 10 * 32) / 8,
            # At `second`: its input, which after the addition goes to the head in float, and its output, which no layer reads.
            "peak_memory": 36 * (8 + 8) * 4,
        },
    ),
    "concat": (
        Concat(),
        (2, 4, 4),
        ([4, 8, 8], [8, 8, 4]),
        {
            "bops": 16 * (8 * 32 + 108 * 64 + 50 * 32),
            "average_weight_bits": (8 * 4 + 108 * 8 + 50 * 8) / 166,
            "memory_traffic": (8 * 4 + 16 * 6 * 8 + 108 * 8 + 16 * 8 * 8 + 50 * 8 + 16 * 15 * 4) / 8,
            # At the concatenation: both branches in float, which no layer reads, and their copy at the head's 4 bits.
            "peak_memory": 16 * (4 + 6) * 4 + 16 * 10 // 2,
        },
    ),
    "depthwise": (
        Separable(),
        (8, 8, 8),
        ([8, 2], [4, 8]),
        {
            # 16 positions: 9 products for each of 8 channels, then 8*16.
            "bops": 16 * (72 * 32 + 128 * 16),
            "average_weight_bits": (72 * 8 + 128 * 2) / 200,
            "memory_traffic": (72 * 8 + (64 * 8 + 16 * 8) * 4 + 128 * 2 + (16 * 8 + 16 * 16) * 8) / 8,
            # Input at 4 bits beside the depthwise output at 8; then that beside 16 channels in float, which nobody reads.
            "peak_memory": max(64 * 8 // 2 + 16 * 8, 16 * 8 + 16 * 16 * 4),
        },
    ),
    "shared": (
        Shared(),
        (3, 5, 5),
        ([4], [8]),
        {
            "bops": 2 * 25 * 81 * 32,
            "average_weight_bits": 4,
            "memory_traffic": 2 * (81 * 4 + 25 * 6 * 8) / 8,
            # At the second call: its input at 8 bits, its output in float.
            "peak_memory": 75 + 75 * 4,
        },
    ),
    "linear": (
        linear_only(),
        (10,),
        ([8, 4], [8, 4]),
        {
            "bops": 200 * 64 + 100 * 16,
            "average_weight_bits": (200 * 8 + 100 * 4) / 300,
            "memory_traffic": (200 * 8 + 30 * 8 + 100 * 4 + 25 * 4) / 8,
            "peak_memory": max(10 + 10, 10 + 20),
        },
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_counts_by_hand(name: str) -> None:
    network, shape, (w, a), expected = HAND[name]
    table = table_of(network, *shape)
    for metric, amount in expected.items():
        assert table.total(metric, np.array(w), np.array(a)) == pytest.approx(amount), metric
        if metric != "peak_memory":
            cells = places(np.array(w)), places(np.array(a))
            by_layer = table.metric(metric)[np.arange(len(w)), cells[0], cells[1]]
            assert by_layer.sum() == pytest.approx(amount), metric


def test_traffic_of_8_bits_is_shufflenets_memory_access_cost() -> None:
    """h w (c1 + c2) + c1 c2 / g elements of a byte (Ma et al., ECCV 2018)."""
    table = table_of(nn.Sequential(nn.Conv2d(12, 24, 1, groups=3, bias=False)), 12, 7, 7)
    assert table.total("memory_traffic", np.array([8]), np.array([8])) == 49 * (12 + 24) + 12 * 24 / 3


def test_many_policies_at_once_and_what_can_not_be_counted() -> None:
    table = table_of(linear_only(), 10)
    w, a = np.random.default_rng(0).choice([2, 4, 8, 16, 32], (2, 5, 3, 2))
    for metric in hw_models.METRICS:
        if metric == "energy":
            continue
        totals = table.total(metric, w, a)
        assert totals.shape == (5, 3)
        assert totals[4, 2] == table.total(metric, w[4, 2], a[4, 2])
    with pytest.raises(ValueError, match="mine has no metric 'energy'; it has latency, storage, bops"):
        table.total("energy", w, a)
    with pytest.raises(ValueError, match="peak_memory is no sum over layers"):
        table.metric("peak_memory")
    with pytest.raises(ValueError, match="w_bits must be from 1 to 8, 16 or float .32., found 12"):
        table.total("bops", np.array([12, 8]), np.array([8, 8]))


def test_what_a_target_can_not_do_has_no_count() -> None:
    table = hw_models.load_target("edge").cost_table(hw_models.trace(linear_only(), torch.zeros(1, 10)))
    assert np.isnan(table.metric("bops")[:, 8:]).all()
    with pytest.raises(ValueError, match="edge can't do layer '0' at w16/a8; it can do 1 to 8 bits"):
        table.total("bops", np.array([16, 8]), np.array([8, 8]))
