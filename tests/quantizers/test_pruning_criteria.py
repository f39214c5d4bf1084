"""Criteria say which channels to keep: their papers' vectors, what doesn't change them, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers.pruning import ChannelGroup, ChannelGroups, Member, ScoreRanking, select
from quantizers.pruning.criteria import geometric_median
from quantizers.pruning.criteria.geometric_median import summed_distances
from quantizers.pruning.criteria.kse import kernel_entropy, kernel_importance, kernel_sparsity
from quantizers.pruning.criteria.norm import filter_norms
from quantizers.pruning.criterion import channels_of
from quantizers.pruning.weights import input_kernels, output_filters, reader_kernels, writer_filters

SCORED = ("l1", "l2", "bn-scale", "fpgm", "kse", "taylor", "random")
OWN = (*SCORED, "ccp")


class Residual(nn.Module):
    """Two layers write into a sum, whose channels a depthwise convolution hands on, and a linear layer reads all places of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x)).relu()
        x = (x + self.norm2(self.branch(x))).relu()
        x = self.depthwise(x).relu()
        return self.head(x.flatten(1))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Residual().eval()
    for norm in (made.norm1, made.norm2):
        nn.init.uniform_(norm.weight, 0.2, 2)
    return made


@pytest.fixture
def groups(network: nn.Module) -> ChannelGroups:
    return Q.channel_groups(network, inputs(1))


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def data() -> list[tuple[Tensor, Tensor]]:
    return [(inputs(8, seed), torch.arange(8) % 5) for seed in range(2)]


def prepared(name: str, network: nn.Module, groups: ChannelGroups) -> Q.Ranking:
    return Q.Criterion.named(name).prepare(network, groups, data(), nn.functional.cross_entropy)


def scores(name: str, network: nn.Module, groups: ChannelGroups) -> Tensor:
    ranking = prepared(name, network, groups)
    assert isinstance(ranking, ScoreRanking)
    return ranking.scores["stem"]


def one_group(channels: int, unit: int = 1) -> ChannelGroups:
    member = Member("0", "out", tuple((channel,) for channel in range(channels)))
    return ChannelGroups((ChannelGroup("0", channels, unit, (member,), ("0",), ("1",)),), {"1": "they are outputs"})


def dropped_first(scores: Tensor) -> int:
    return int(scores.argmin())


# Norms


def test_norms_of_filters() -> None:
    filters = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 1.0]])
    assert filter_norms(filters, 1).tolist() == [7, 0, 2]
    assert filter_norms(filters, 2).tolist() == [5, 0, pytest.approx(math.sqrt(2))]


def test_norms_order_the_channels_of_one_layer_as_the_paper_does() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 1.0]]))
    groups = Q.channel_groups(network, torch.zeros(1, 2))
    for name, kept in (("l1", 1), ("l2", 0)):
        ranking = Q.Criterion.named(name).prepare(network, groups)
        assert ranking.keep("0", 1) == (kept,)
        assert ranking.keep("0", 2) == (0, 1)


def test_layers_that_write_the_same_channels_count_alike(network: nn.Module, groups: ChannelGroups) -> None:
    """However large the weights of one of them are, which a batch norm divides out."""
    before = {name: scores(name, network, groups) for name in ("l1", "l2", "fpgm")}
    with torch.no_grad():
        network.branch.weight.mul_(100)
    for name, expected in before.items():
        assert torch.allclose(scores(name, network, groups), expected)


# Batch norms


def test_scales_of_batch_norms(network: nn.Module, groups: ChannelGroups) -> None:
    first, second = network.norm1.weight.detach().double(), network.norm2.weight.detach().double()
    expected = (first / first.mean() + second / second.mean()) / 2
    assert torch.allclose(scores("bn-scale", network, groups), expected)
    with torch.no_grad():
        network.norm1.weight.neg_()
    assert torch.allclose(scores("bn-scale", network, groups), expected)


def test_a_group_without_a_batch_norm_is_named() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="'bn-scale' can't rank group '0': it has no batch norm with a scale; use another"):
        prepared("bn-scale", network, Q.channel_groups(network, torch.zeros(1, 2)))


# Geometric median


def test_the_filter_next_to_the_geometric_median_goes_first() -> None:
    cross = torch.tensor([[3, 0], [0, 3], [-3, 0], [0, -3], [0.1, 0]], dtype=torch.float64)
    assert summed_distances(cross).tolist() == pytest.approx([17.385, 17.487, 17.585, 17.487, 12.003], abs=5e-4)
    assert dropped_first(summed_distances(cross)) == 4
    assert dropped_first(filter_norms(cross, 2)) == 4


def test_geometric_median_and_norm_differ() -> None:
    filters = torch.tensor([[10, 10], [10, 11], [10, 9], [0.2, 0], [20, 0]], dtype=torch.float64)
    assert summed_distances(filters).tolist() == pytest.approx([30.14, 32.60, 29.76, 61.84, 62.26], abs=5e-3)
    assert dropped_first(summed_distances(filters)) == 2
    assert dropped_first(filter_norms(filters, 2)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_geometric_median_is_invariant_under_translation(seed: int, network: nn.Module, groups: ChannelGroups) -> None:
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(20, 9, dtype=torch.float64, generator=generator)
    moved = filters + 3 * torch.randn(9, dtype=torch.float64, generator=generator)
    assert torch.allclose(summed_distances(moved), summed_distances(filters))
    assert not torch.equal(filter_norms(moved, 2).argsort(), filter_norms(filters, 2).argsort())
    before = scores("fpgm", network, groups)
    with torch.no_grad():
        for layer in (network.stem, network.branch, network.depthwise):
            layer.weight.add_(torch.randn(layer.weight.shape[1:], generator=generator))
    assert torch.allclose(scores("fpgm", network, groups), before, rtol=1e-4)


def test_distances_of_large_layers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    expected = summed_distances(filters)
    monkeypatch.setattr(geometric_median, "MOST_SUBTRACTED", 0)
    assert torch.allclose(summed_distances(filters), expected)


# Kernel sparsity and entropy


def test_sparsity_and_entropy_by_hand() -> None:
    kernels = torch.tensor([[[0.0], [1.0], [3.0]], [[5.0], [-5.0], [0.0]]], dtype=torch.float64)
    assert kernel_sparsity(kernels).tolist() == [4, 10]
    # One neighbour: distances 1, 1 and 2; 5, 5 and 5.
    first = -(2 * 0.25 * math.log2(0.25) + 0.5 * math.log2(0.5))
    assert kernel_entropy(kernels, 1).tolist() == pytest.approx([first, math.log2(3)])
    # All others, though fewer than five: 4, 3 and 5; 15, 15 and 10.
    shares = ([4 / 12, 3 / 12, 5 / 12], [15 / 40, 15 / 40, 10 / 40])
    expected = [-sum(share * math.log2(share) for share in row) for row in shares]
    assert kernel_entropy(kernels, 5).tolist() == pytest.approx(expected)


def test_entropy_is_highest_where_kernels_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(4, 12, 9, dtype=torch.float64, generator=generator)
    kernels[1] = kernels[1, :1]  # all of them the same
    entropy = kernel_entropy(kernels)
    assert entropy[1] == pytest.approx(math.log2(12))
    assert (entropy[[0, 2, 3]] < math.log2(12) - 1e-3).all()
    assert (kernel_entropy(kernels[:, :1]) == 0).all()  # a single kernel


def test_importance_of_kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(6, 12, 9, dtype=torch.float64, generator=generator)
    kernels *= torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 0.0], dtype=torch.float64)[:, None, None]
    values = kernel_importance(kernels)
    assert values.min() == values[5] == 0  # zeros say nothing
    assert values.max() == 1
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(kernel_importance(kernels[order]), values[order])
    # The formula, from sparsity and entropy.
    s, e = kernel_sparsity(kernels), kernel_entropy(kernels)
    s, e = (s - s.min()) / (s.max() - s.min()), (e - e.min()) / (e.max() - e.min())
    v = (s / (1 + e)).sqrt()
    assert torch.allclose(values, (v - v.min()) / (v.max() - v.min()))


def test_importance_of_constant_kernels() -> None:
    for kernels, expected in ((torch.ones(3, 8, 9), 1.0), (torch.zeros(3, 8, 9), 0.0), (torch.ones(3, 1, 9), 1.0)):
        assert kernel_importance(kernels.double()).tolist() == [expected] * 3


def test_entropy_is_of_the_same_channel_as_sparsity() -> None:
    """Where a reshape in place of a transpose would take that of an output."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight[:, 2] = layer.weight[:1, 2]
    assert kernel_entropy(input_kernels(layer)).argmax() == 2


def test_a_channel_that_is_read_by_zeros_is_dropped_first(network: nn.Module, groups: ChannelGroups) -> None:
    with torch.no_grad():
        for name in groups["stem"].readers:
            kernels = network.get_submodule(name).weight
            if name == "head":
                kernels[:, 4 * 16 : 5 * 16] = 0
            elif name == "depthwise":
                kernels[4] = 0
            else:
                kernels[:, 4] = 0
    ranking = prepared("kse", network, groups)
    assert scores("kse", network, groups)[4] == 0
    kept = {"stem": ranking.keep("stem", 5)}
    assert kept["stem"] == (0, 1, 2, 3, 5)
    assert torch.allclose(Q.remove_channels(network, groups, kept)(inputs(3)), network(inputs(3)), atol=1e-6)


# Weights


def test_filters_and_kernels_of_layers() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    assert torch.equal(output_filters(grouped), grouped.weight.detach().double().flatten(1))
    kernels = input_kernels(grouped)
    assert kernels.shape == (4, 3, 9)
    assert torch.equal(kernels[2], grouped.weight[3:, 0].detach().double().flatten(1))
    # A transposed convolution is the same with inputs and outputs exchanged.
    transposed = nn.ConvTranspose2d(6, 4, 3, groups=2)
    with torch.no_grad():
        transposed.weight.copy_(grouped.weight)
    assert torch.equal(input_kernels(transposed), transposed.weight.detach().double().flatten(2))
    assert torch.equal(output_filters(transposed)[2], transposed.weight[3:, 0].detach().double().flatten())
    with pytest.raises(ValueError, match="ReLU is neither a convolution nor a linear layer"):
        output_filters(nn.ReLU())


def test_weights_of_a_groups_channels(network: nn.Module, groups: ChannelGroups) -> None:
    group = groups["stem"]
    assert torch.equal(writer_filters(network, group, "branch"), output_filters(network.branch))
    # Behind a flatten a channel's places are one kernel.
    kernels = reader_kernels(network, group, "head")
    assert kernels.shape == (6, 5, 16)
    assert torch.equal(kernels[2, 3], network.head.weight[3, 32:48].detach().double())
    assert reader_kernels(network, group, "depthwise").shape == (6, 1, 9)


# Rankings


@pytest.mark.parametrize("name", SCORED)
def test_kept_channels_are_nested_and_the_same_every_time(name: str, network: nn.Module, groups: ChannelGroups) -> None:
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    ranking = prepared(name, network, groups)
    again = prepared(name, network, groups)
    for group in groups.values():
        smaller: set[int] = set()
        for count in range(1, group.channels + 1):
            kept = ranking.keep(group.name, count)
            assert kept == again.keep(group.name, count)
            assert list(kept) == sorted(kept)
            assert len(kept) == count
            assert smaller < set(kept)
            smaller = set(kept)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_equal_scores_keep_the_first_channels() -> None:
    ranking = ScoreRanking(one_group(6), {"0": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])})
    assert ranking.keep("0", 2) == (1, 3)
    assert ranking.keep("0", 4) == (0, 1, 3, 5)


@pytest.mark.parametrize("name", OWN)
def test_equal_channels_can_be_ranked(name: str, network: nn.Module, groups: ChannelGroups) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.0)
    assert len(prepared(name, network, groups).keep("stem", 3)) == 3
    if name != "random":
        assert prepared(name, network, groups).keep("stem", 3) == (0, 1, 2)


def test_units_are_kept_whole() -> None:
    groups = one_group(6, unit=2)
    ranking = ScoreRanking(groups, {"0": torch.tensor([9.0, 0.0, 5.0, 5.0, 1.0, 2.0])})
    assert ranking.keep("0", 2) == (2, 3)
    assert ranking.keep("0", 4) == (0, 1, 2, 3)
    assert channels_of(groups["0"], [2, 0]) == (0, 1, 4, 5)
    with pytest.raises(ValueError, match="group '0' keeps multiples of 2 channels, not 3"):
        ranking.keep("0", 3)


def test_shares_become_channels() -> None:
    groups = one_group(8)
    ranking = ScoreRanking(groups, {"0": torch.arange(8.0)})
    assert select(ranking, groups, {"0": 0.5}) == {"0": (4, 5, 6, 7)}
    assert select(ranking, groups, {"0": 1}) == {"0": tuple(range(8))}
    assert select(ranking, groups, {"0": 0.01}) == {"0": (7,)}
    for share in (0, -0.5, 1.5, math.nan, True, "half"):
        with pytest.raises(ValueError, match="group '0' can't keep a share of .*: give a number above 0 and at most 1"):
            select(ranking, groups, {"0": share})
    with pytest.raises(ValueError, match="the channels of '1' can't be removed: they are outputs"):
        select(ranking, groups, {"1": 0.5})
    with pytest.raises(ValueError, match="there is no group of channels '2'; there are 0"):
        select(ranking, groups, {"2": 0.5})


@pytest.mark.parametrize("count", [0, 9, -1, 2.0, True])
def test_counts_that_cannot_be(count: object) -> None:
    with pytest.raises(ValueError, match=r"channels to keep must be an integer|keep 1 to 8 of them"):
        ScoreRanking(one_group(8), {"0": torch.arange(8.0)}).keep("0", count)


def test_random_channels_follow_the_generator(network: nn.Module, groups: ChannelGroups) -> None:
    state = torch.get_rng_state()
    criterion = Q.Criterion.named("random")
    by_seed = []
    for seed in (0, 0, 1):
        ranking = criterion.prepare(network, groups, generator=torch.Generator().manual_seed(seed))
        by_seed.append([ranking.keep("stem", count) for count in range(1, 6)])
    assert by_seed[0] == by_seed[1]
    assert by_seed[0] != by_seed[2]
    assert criterion.prepare(network, groups).keep("stem", 2) == by_seed[0][1]
    assert torch.equal(torch.get_rng_state(), state)


# What is refused


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float, network: nn.Module, groups: ChannelGroups) -> None:
    with torch.no_grad():
        network.branch.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"channels can't be ranked: 'branch\.weight' holds values that are not finite"):
        prepared(name, network, groups)


def test_what_a_criterion_needs_is_said(network: nn.Module, groups: ChannelGroups) -> None:
    taylor = Q.Criterion.named("taylor")
    with pytest.raises(ValueError, match="criterion 'taylor' needs data: give batches"):
        taylor.prepare(network, groups)
    with pytest.raises(ValueError, match="criterion 'taylor' needs a loss: give a function of outputs and labels"):
        taylor.prepare(network, groups, data())
