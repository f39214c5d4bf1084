"""ShuffleNetV2's guidelines: what a network moves beyond the least, its branches, and what is computed between its layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hw_models
from hw_models.guidelines import check, separable_ratio, unequal_channels
from hw_models.workload import Call, ElementWise, Layer, Workload

SIZES = st.integers(1, 64)
CHANNELS = st.integers(1, 512)


def layer(kind: str, inputs: int, outputs: int, size: int, kernel: int = 1, groups: int = 1) -> Layer:
    call = Call((size, size), (size, size))
    return Layer(kind, kind, inputs, outputs, (kernel, kernel), (1, 1), (0, 0), (1, 1), groups, False, (call,))


@given(SIZES, CHANNELS, CHANNELS)
def test_equal_channels_alone_move_least(size: int, inputs: int, outputs: int) -> None:
    moves, least = unequal_channels(size * size, inputs, outputs)
    if inputs == outputs:
        assert moves == pytest.approx(least, rel=1e-12)
    else:
        assert moves > least


def test_unequal_channels_of_a_network_the_worst_first() -> None:
    """By hand: 14x14, 16 to 96 channels move 196 (16 + 96) + 16 x 96 = 23,488 elements."""
    wide, even, mild = layer("pointwise", 16, 96, 14), layer("pointwise", 64, 64, 14), layer("pointwise", 64, 96, 14)
    found = check(Workload((mild, even, wide)))
    assert [excess.shape for excess in found.channels] == [wide.shape, mild.shape]
    assert found.channels[0].moves == 23_488
    assert found.channels[0].least == pytest.approx(2 * 196 * (16 * 96) ** 0.5 + 16 * 96)
    assert found.channels[0].ratio == pytest.approx(1.3899, abs=1e-4)
    assert found.saved(found.channels) == pytest.approx(
        sum(excess.moves - excess.least for excess in found.channels) / found.layers_move
    )
    assert "G1" in found.broken
    assert "G1" not in check(Workload((even,))).broken


def test_of_a_classifier_and_of_strides_unequal_channels_say_little() -> None:
    classifier = layer("linear", 512, 1000, 1)
    found = check(Workload((classifier,)))
    assert found.channels[0].ratio < 1.01
    assert found.broken == ()
    strided = Layer("s", "pointwise", 8, 16, (1, 1), (2, 2), (0, 0), (1, 1), 1, False, (Call((8, 8), (4, 4)),))
    assert check(Workload((strided,))).channels == ()


def test_more_groups_move_more_at_as_many_multiplications() -> None:
    """c2 grows with g, so that B = h w c1 c2 / g stays."""
    ratios = []
    macs = set()
    for groups in (1, 2, 4, 8):
        grouped = layer("grouped" if groups > 1 else "pointwise", 64, 64 * groups, 14, groups=groups)
        macs.add(grouped.macs)
        found = check(Workload((grouped,)))
        ratios.append(found.groups[0].ratio if found.groups else 1.0)
        # The formula of the paper: h w c1 + B g / c1 + B / (h w).
        product = grouped.macs
        assert found.layers_move == 196 * 64 + product * groups / 64 + product / 196
    assert len(macs) == 1
    assert ratios == sorted(ratios)
    assert ratios[0] == 1.0 < ratios[1]


def test_a_depthwise_layer_is_held_against_one_output() -> None:
    """By hand: 32 channels of 3x3 at 8x8 read 2048, write 2048, have 288 weights; without groups 64 are written."""
    (excess,) = check(Workload((layer("depthwise", 32, 32, 8, kernel=3, groups=32),))).groups
    assert (excess.moves, excess.least) == (2048 + 288 + 2048, 2048 + 288 + 64)


class Branches(nn.Module):
    """Three branches over one activation, a pooling beside them that isn't seen, a residual, and one layer after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two, self.three = (nn.Conv2d(4, 4, size, padding=size // 2) for size in (1, 3, 5))
        self.last = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.one(x) + self.two(x) + self.three(x) + nn.functional.avg_pool2d(x, 3, 1, 1)
        result: Tensor = self.last(self.relu(y)) + y
        return result


def test_layers_that_read_one_activation_are_branches() -> None:
    workload = hw_models.trace(Branches(), torch.zeros(2, 1, 8, 8))
    assert workload.branches == ((1, 2, 3),)
    found = check(workload)
    assert found.branches == (("one", "two", "three"),)
    assert "G3" in found.broken


def test_what_is_changed_in_place_is_another_activation() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            x += self.one(x)
            result: Tensor = self.two(x)
            return result

    assert hw_models.trace(InPlace(), torch.zeros(1, 2, 4, 4)).branches == ()


def test_element_wise_operations_are_counted_by_hand() -> None:
    """4 x 8 x 8 = 256 elements: three additions and the residual read 2 and write 1 of them, two ReLUs read and write one."""
    workload = hw_models.trace(Branches(), torch.zeros(3, 1, 8, 8))
    assert workload.element_wise == (
        ElementWise("relu", "relu", 1, 2 * 256, 2 * 256),
        ElementWise("", "add", 2, 4 * 2 * 256, 4 * 256),
    )
    found = check(workload)
    assert (found.combined, found.functions) == (12 * 256, 4 * 256)
    # The stem reads 64 and writes 256, the others read and write 256.
    layers = 64 + 36 + 256 + 4 * 512 + 16 * (1 + 9 + 25 + 1)
    assert found.layers_move == layers
    assert found.element_wise_share == pytest.approx(16 * 256 / (16 * 256 + layers))
    assert found.combined_share == pytest.approx(12 * 256 / (12 * 256 + layers))
    assert "G4" in found.broken


def test_nothing_is_found_where_nothing_is_broken() -> None:
    workload = hw_models.trace(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), torch.zeros(1, 8, 4, 4))
    found = check(workload)
    assert found.broken == ()
    assert found.element_wise_share == 0
    assert found.separable == ()


@pytest.mark.parametrize(("outputs", "kernel"), [(64, 3), (16, 5), (1, 1)])
def test_depthwise_and_pointwise_over_a_full_convolution(outputs: int, kernel: int) -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8), nn.Conv2d(8, outputs, 1))
    full = hw_models.trace(nn.Conv2d(8, outputs, kernel, padding=kernel // 2), torch.zeros(1, 8, 6, 6)).macs
    (pair,) = check(hw_models.trace(network, torch.zeros(1, 8, 6, 6))).separable
    assert pair.full_macs == full
    assert pair.ratio == pytest.approx(separable_ratio(outputs, kernel**2)) == pytest.approx(1 / outputs + 1 / kernel**2)


def test_the_depthwise_share_of_the_small_network(network: nn.Module) -> None:
    found = check(hw_models.trace(network, torch.zeros(1, 1, 8, 8)))
    assert (found.depthwise_macs, found.pointwise_macs) == (16 * 9 * 16, 16 * 16 * 16)
    assert [(pair.depthwise, pair.pointwise) for pair in found.separable] == [("depthwise", "pointwise")]
