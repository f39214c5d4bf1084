"""Kernels of a channel share weights: how many by what the channel is worth, and training moves what is shared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import quantizers as Q
from quantizers.pruning.criteria.kse import kernel_importance
from quantizers.pruning.kernel_clusters import SharedKernels, cluster_kernels, kernel_counts
from quantizers.pruning.weights import input_kernels


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 12, 3, groups=2),
    ).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_counts_of_kernels_by_hand() -> None:
    values = torch.tensor([0.0, 0.19, 0.2, 0.39, 0.4, 0.6, 0.79, 0.81, 1.0])
    assert kernel_counts(values, 64, levels=5).tolist() == [0, 0, 8, 8, 16, 32, 32, 64, 64]
    assert kernel_counts(values, 64, levels=5, shift=1).tolist() == [0, 0, 4, 4, 8, 16, 16, 64, 64]
    # Rounded up, and never more than there are.
    assert kernel_counts(torch.tensor([0.3, 0.55]), 10, levels=4).tolist() == [3, 5]
    assert kernel_counts(torch.tensor([0.5]), 10, levels=4, shift=-3).tolist() == [10]
    with pytest.raises(ValueError, match="at least 2 levels, not 1"):
        kernel_counts(values, 64, levels=1)


def test_clusters_that_are_apart_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 9, generator=generator)
    kind = torch.arange(40) % 4
    kernels = centres[kind] + 0.1 * torch.randn(40, 9, generator=generator)
    index = cluster_kernels(kernels, 4)
    for cluster in range(4):
        assert len(index[kind == cluster].unique()) == 1
    assert len(index.unique()) == 4
    assert torch.equal(cluster_kernels(kernels, 4), index)


def test_every_cluster_has_a_kernel() -> None:
    """Where kernels are alike, too."""
    for kernels in (torch.ones(6, 9), torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0], [9.0]])):
        for count in range(1, 7):
            assert len(cluster_kernels(kernels, count).unique()) == count
    assert cluster_kernels(torch.ones(6, 9), 6).tolist() == list(range(6))
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"6 kernels can be divided among 1 to 6 clusters, not {count}"):
            cluster_kernels(torch.ones(6, 9), count)


def test_error_falls_with_the_number_of_clusters() -> None:
    kernels = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    errors = []
    for count in (1, 2, 8, 32, 64):
        index = cluster_kernels(kernels, count)
        means = torch.stack([kernels[index == cluster].mean(0) for cluster in range(count)])
        errors.append(float((kernels - means[index]).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_as_many_kernels_as_there_are_change_nothing(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantizers.pruning import kernel_clusters

    monkeypatch.setattr(kernel_clusters, "kernel_counts", lambda values, kernels, *_: torch.full((len(values),), kernels))
    shared, report = Q.share_kernels(network)
    assert [layer.name for layer in report] == ["2", "5"]
    assert all(layer.kept == layer.kernels for layer in report)
    assert torch.equal(shared(images()), network(images()))
    assert torch.equal(shared[5].weight, network[5].weight)


def test_kernels_of_a_layer_are_as_many_as_its_channels_are_worth(network: nn.Module) -> None:
    shared, report = Q.share_kernels(network, levels=5)
    for number in (2, 5):
        layer, plain = shared[number], network[number]
        kernels = input_kernels(plain)
        counts = kernel_counts(kernel_importance(kernels), kernels.shape[1], 5)
        assert counts.min() == 0
        made = input_kernels(layer)
        for channel, count in enumerate(counts.tolist()):
            of_channel = made[channel].unique(dim=0)
            assert len(of_channel) == max(count, 1)
            if count == 0:
                assert (of_channel == 0).all()
            if count == len(kernels[channel]):
                assert torch.equal(made[channel], kernels[channel])
        centroids = layer.parametrizations.weight.original
        assert centroids.shape == (int(counts.sum()), 9)
    assert [layer.kept for layer in report] == [len(shared[number].parametrizations.weight.original) for number in (2, 5)]
    assert [layer.kernels for layer in report] == [8 * 16, 8 * 12]
    # The rest stays, and so does the network.
    for number in (0, 4):
        assert torch.equal(shared[number].weight, network[number].weight)
    assert not any(parametrize.is_parametrized(module) for module in network.modules())


def test_centroids_are_means() -> None:
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[1, 0], [1, 3], [2, 3], [1, 3]])
    shared = SharedKernels(index, tuple(weight.shape))
    centroids = shared.right_inverse(weight)
    assert torch.allclose(centroids[0], weight[[0, 1, 3], 0].mean(0).flatten())
    assert torch.equal(centroids[1], weight[2, 0].flatten())
    made = shared(centroids)
    assert torch.equal(made[0, 0], made[3, 0])
    assert (made[0, 1] == 0).all()


def test_training_moves_what_is_shared(network: nn.Module) -> None:
    shared, _ = Q.share_kernels(network, levels=5, shift=1)
    index = shared[2].parametrizations.weight[0].index.clone()
    centroids = shared[2].parametrizations.weight.original
    assert any(parameter is centroids for parameter in shared.parameters())
    optimizer = torch.optim.SGD(shared.parameters(), 0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (shared(images()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    made = shared[2].weight.flatten(2)
    for one in index.unique():
        assert len(made[index == one].unique(dim=0)) == 1
    assert (made[index == 0] == 0).all()


def test_a_copy_a_saved_and_a_plain_network_are_the_same(network: nn.Module) -> None:
    shared, _ = Q.share_kernels(network)
    expected = shared(images())
    assert torch.equal(Q.copy_network(shared)(images()), expected)
    other, _ = Q.share_kernels(network)
    with torch.no_grad():
        other[2].parametrizations.weight.original.zero_()
    other.load_state_dict(shared.state_dict())
    assert torch.equal(other(images()), expected)
    for number in (2, 5):
        parametrize.remove_parametrizations(shared[number], "weight")
    assert torch.equal(shared(images()), expected)


def test_layers_that_cannot_share_are_named(network: nn.Module) -> None:
    for name in ("1", "nothing"):
        with pytest.raises(ValueError, match=f"the kernels of '{name}' can't be shared: name convolutions"):
            Q.share_kernels(network, layers=[name])
    with torch.no_grad():
        network[2].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer '2': a weight of shape \(16, 8, 3, 3\) holds values that are not finite"):
        Q.share_kernels(network)
