"""Channels chosen together: pairs count, the optimum is one, and what the model predicts comes true."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.pruning.criteria.ccp import CollaborativeChannels, LossModel, QuadraticRanking, best_removal, loss_model
from quantizers.pruning.gates import gate_gradients


def drawn(samples: int, units: int, seed: int) -> LossModel:
    """Make a model of derivatives that are correlated, and whose size differs by unit."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, units, generator=generator) @ torch.randn(units, units, generator=generator)
    sizes = torch.randn(units, generator=generator).exp()
    return loss_model(mixed * sizes + torch.randn(units, generator=generator))


def cheapest(model: LossModel, count: int) -> float:
    """Try all sets."""
    units = len(model.linear)
    sets = list(itertools.combinations(range(units), count))
    removed = torch.zeros(len(sets), units)
    for row, chosen in enumerate(sets):
        removed[row, list(chosen)] = 1
    return float(model.change(removed).min())


def set_of(units: int, chosen: tuple[int, ...]) -> Tensor:
    removed = torch.zeros(units)
    removed[list(chosen)] = 1
    return removed


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_that_of_brute_force(seed: int) -> None:
    model = drawn(50, 10, seed)
    for count in range(11):
        choice = best_removal(model, count)
        assert choice.proven
        assert len(choice.removed) == count
        assert choice.change == pytest.approx(cheapest(model, count), rel=1e-9, abs=1e-9)
        assert choice.change == pytest.approx(float(model.change(set_of(10, choice.removed))), rel=1e-9, abs=1e-9)


def test_the_solver_finds_what_a_local_search_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantizers.pruning.criteria import ccp

    model = drawn(50, 10, 0)
    expected = [best_removal(model, count) for count in range(11)]

    def last(linear: object, pairs: object, count: int) -> object:
        found = np.zeros(10, dtype=bool)
        found[10 - count :] = True
        return found

    monkeypatch.setattr(ccp, "_local_search", last)
    for count in range(2, 9):
        assert best_removal(model, count).removed == expected[count].removed


def test_two_equal_channels_cost_four_times_one() -> None:
    derivatives = torch.tensor([[0.5], [-0.25], [0.25], [-0.5]])
    model = loss_model(derivatives.expand(4, 2))
    assert model.linear.abs().max() == 0
    one, both = float(model.change(set_of(2, (0,)))), float(model.change(set_of(2, (0, 1))))
    assert one == pytest.approx(0.5 * float(derivatives.square().mean()))
    assert both == pytest.approx(4 * one)


def test_equal_channels_of_a_network_are_priced_so() -> None:
    network, points, labels = trained(0)
    with torch.no_grad():
        network[0].weight[1], network[0].bias[1] = network[0].weight[0], network[0].bias[0]
        network[2].weight[:, 1] = network[2].weight[:, 0]
    groups = Q.channel_groups(network, points[:1])
    model = loss_model(gate_gradients(network, groups, [(points, labels)], F.cross_entropy)["0"])
    of_pairs = LossModel(torch.zeros(16, dtype=torch.float64), model.pairs)
    one, both = float(of_pairs.change(set_of(16, (0,)))), float(of_pairs.change(set_of(16, (0, 1))))
    assert one > 0
    assert both == pytest.approx(4 * one, rel=1e-5)


def test_of_two_equal_channels_one_is_kept() -> None:
    """Where each alone seems worth less than a third one."""
    generator = torch.Generator().manual_seed(0)
    same, other = torch.randn(200, 1, generator=generator), torch.randn(200, 1, generator=generator)
    model = loss_model(torch.cat([same, same, 1.2 * other], 1) - torch.cat([same, same, 1.2 * other], 1).mean(0))
    alone = 0.5 * model.pairs.diag()
    assert alone.argsort(stable=True)[:2].tolist() == [0, 1]
    assert 2 in best_removal(model, 2).removed


def test_channels_that_undo_each_other_cost_nothing_together() -> None:
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(100, 1, generator=generator)
    model = loss_model(torch.cat([one, 0.1 * torch.randn(100, 2, generator=generator), -one], 1))
    choice = best_removal(model, 2)
    assert choice.removed == (0, 3)
    assert choice.change == pytest.approx(0, abs=1e-12)


def test_equal_sets_are_chosen_by_position() -> None:
    model = LossModel(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    assert best_removal(model, 2).removed == (4, 5)
    zeros = LossModel(torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64))
    assert best_removal(zeros, 3).removed == (3, 4, 5)
    assert best_removal(zeros, 3).proven


def test_large_groups_are_searched_and_not_called_proven() -> None:
    model = drawn(300, 256, 0)
    choice = best_removal(model, 128)
    assert not choice.proven
    assert len(choice.removed) == 128
    assert best_removal(model, 128) == choice
    # No exchange of two lessens the change.
    removed = set_of(256, choice.removed).bool()
    exchanged = []
    for one in removed.nonzero().flatten()[:20]:
        for other in (~removed).nonzero().flatten():
            tried = removed.clone()
            tried[one], tried[other] = False, True
            exchanged.append(tried)
    assert float(model.change(torch.stack(exchanged)).min()) >= choice.change - 1e-6 * abs(choice.change)


@pytest.mark.parametrize("count", [-1, 11])
def test_counts_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match=f"0 to 10 units can be removed, not {count}"):
        best_removal(drawn(50, 10, 0), count)


def trained(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Train a small network on four clouds that overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 10, generator=generator)
    labels = torch.randint(0, 4, (400,), generator=generator)
    points = centres[labels] + 1.5 * torch.randn(400, 10, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(points), labels).backward()
        optimizer.step()
    return network, points, labels


def loss_without(network: nn.Module, groups: Q.ChannelGroups, removed: Tensor, points: Tensor, labels: Tensor) -> float:
    kept = (removed == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        return float(F.cross_entropy(Q.mask_channels(network, groups, {"0": kept})(points), labels))


@pytest.mark.parametrize("seed", range(3))
def test_predicted_losses_come_true(seed: int) -> None:
    network, points, labels = trained(seed)
    groups = Q.channel_groups(network, points[:1])
    model = loss_model(gate_gradients(network, groups, [(points, labels)], F.cross_entropy)["0"])
    draws = np.random.default_rng(seed)
    sets = torch.stack([set_of(16, tuple(draws.permutation(16)[:3])) for _ in range(150)])
    true = [loss_without(network, groups, removed, points, labels) for removed in sets]

    def agreement(predicted: Tensor) -> float:
        return float(spearmanr(predicted.numpy(), true)[0])

    first_order = sets.double() @ model.linear
    without_pairs = first_order + 0.5 * sets.double() @ model.pairs.diag()
    assert agreement(model.change(sets)) > 0.8
    assert agreement(model.change(sets)) > agreement(without_pairs) + 0.1
    assert agreement(model.change(sets)) > agreement(first_order) + 0.1


def test_the_criterion_chooses_better_sets_than_most(caplog: pytest.LogCaptureFixture) -> None:
    network, points, labels = trained(0)
    groups = Q.channel_groups(network, points[:1])
    batches = [(points[:250], labels[:250]), (points[250:], labels[250:])]
    with caplog.at_level(logging.WARNING, "haq"):
        ranking = CollaborativeChannels().prepare(network, groups, batches, F.cross_entropy)
    assert not caplog.records
    assert isinstance(ranking, QuadraticRanking)
    assert ranking.choice("0", 8).proven
    kept = ranking.keep("0", 8)
    assert sorted({*kept, *ranking.choice("0", 8).removed}) == list(range(16))
    chosen = loss_without(network, groups, set_of(16, ranking.choice("0", 8).removed), points, labels)
    draws = np.random.default_rng(0)
    others = [loss_without(network, groups, set_of(16, tuple(draws.permutation(16)[:8])), points, labels) for _ in range(100)]
    assert np.mean([chosen < other for other in others]) >= 0.95


def test_what_is_not_proven_is_said(caplog: pytest.LogCaptureFixture) -> None:
    network, points, labels = trained(0)
    groups = Q.channel_groups(network, points[:1])
    with caplog.at_level(logging.WARNING, "haq"):
        ranking = CollaborativeChannels(most_proven=8).prepare(network, groups, [(points, labels)], F.cross_entropy)
    (record,) = caplog.records
    assert record.getMessage() == (
        "criterion 'ccp': sets of groups with more than 8 units are of a local search, not proven to be the best: 0"
    )
    assert isinstance(ranking, QuadraticRanking)
    assert not ranking.choice("0", 8).proven
    assert ranking.choice("0", 15).proven


def test_without_data_or_loss_it_says_so() -> None:
    network, points, labels = trained(0)
    groups = Q.channel_groups(network, points[:1])
    with pytest.raises(ValueError, match="criterion 'ccp' needs data: give batches of inputs, or of pairs"):
        Q.Criterion.named("ccp").prepare(network, groups)
    with pytest.raises(ValueError, match="criterion 'ccp' needs a loss: give a function of outputs and labels"):
        Q.Criterion.named("ccp").prepare(network, groups, [(points, labels)])
