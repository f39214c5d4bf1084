"""What each sample's loss says about each channel, which Taylor's criterion and collaborative pruning stand on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.pruning import ScoreRanking
from quantizers.pruning.gates import gate_gradients


class Branches(nn.Module):
    """A sum of branches, a depthwise convolution, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.branch = nn.Conv2d(5, 5, 3, padding=1)
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.inner = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.branch(x)).relu()
        x = self.inner(self.depthwise(x).relu()).relu()
        return self.head(x.flatten(1))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Branches()
    nn.init.uniform_(made.norm.running_mean, -1, 1)
    nn.init.uniform_(made.norm.running_var, 0.5, 2)
    return made.double()


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def gated(network: nn.Module, groups: Q.ChannelGroups, group: str, channel: int, gate: float) -> nn.Module:
    """Multiply a channel where it is read, by the weights of its readers."""
    made = Q.copy_network(network)
    with torch.no_grad():
        for member in groups[group].members:
            if member.dim == "in":
                made.get_submodule(member.module).weight[:, list(member.places[channel])] *= gate
    return made.eval()


def test_derivatives_are_what_the_loss_changes_by(network: nn.Module) -> None:
    x, y = data()
    groups = Q.channel_groups(network, x[:1])
    assert list(groups) == ["stem", "inner"]
    found = gate_gradients(network, groups, [(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy)
    step = 1e-5
    for name, group in groups.items():
        assert found[name].shape == (6, group.channels)
        for channel in range(group.channels):
            losses = []
            for gate in (1 + step, 1 - step):
                with torch.no_grad():
                    outputs = gated(network, groups, name, channel, gate)(x)
                losses.append(F.cross_entropy(outputs, y, reduction="none"))
            expected = (losses[0] - losses[1]) / (2 * step)
            assert torch.allclose(found[name][:, channel], expected, atol=1e-7)


def test_derivatives_are_gradient_times_weight_where_there_is_no_bias() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    groups = Q.channel_groups(network, x[:1])
    found = gate_gradients(network, groups, [(x, y)], F.cross_entropy)["0"]
    for sample in range(5):
        network.zero_grad()
        F.cross_entropy(network(x[sample : sample + 1]), y[sample : sample + 1]).backward()
        expected = (network[0].weight.grad * network[0].weight).sum(1).double()
        assert torch.allclose(found[sample], expected, atol=1e-6)


def test_division_into_batches_plays_no_part(network: nn.Module) -> None:
    x, y = data()
    groups = Q.channel_groups(network, x[:1])
    whole = gate_gradients(network, groups, [(x, y)], F.cross_entropy)
    parts = gate_gradients(network, groups, [(x[:1], y[:1]), (x[1:], y[1:])], F.cross_entropy)
    for name in groups:
        assert torch.allclose(whole[name], parts[name])


def test_the_network_stays_as_it_is(network: nn.Module) -> None:
    x, y = data()
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        gate_gradients(network, Q.channel_groups(network, x[:1]), [(x, y)], F.cross_entropy)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_without_labels_the_own_answers_stand_for_them(network: nn.Module) -> None:
    x, _ = data()
    groups = Q.channel_groups(network, x[:1])
    own = network.eval()(x).argmax(1)
    found = gate_gradients(network, groups, [x], F.cross_entropy)
    expected = gate_gradients(network, groups, [(x, own)], F.cross_entropy)
    for name in groups:
        assert torch.equal(found[name], expected[name])
        assert found[name].abs().max() > 0


def test_taylor_is_the_squared_change_of_the_loss_to_first_order(network: nn.Module) -> None:
    x, y = data(1)
    groups = Q.channel_groups(network, x)
    ranking = Q.Criterion.named("taylor").prepare(network, groups, [(x, y)], F.cross_entropy)
    assert isinstance(ranking, ScoreRanking)
    with torch.no_grad():
        before = F.cross_entropy(network.eval()(x), y)
        for name, group in groups.items():
            for channel in range(group.channels):
                step = 1e-4
                after = F.cross_entropy(gated(network, groups, name, channel, 1 - step)(x), y)
                change = float((after - before) / step)
                assert ranking.scores[name][channel].sqrt() == pytest.approx(abs(change), rel=1e-2, abs=1e-4)


def test_taylor_is_the_mean_of_each_samples_square(network: nn.Module) -> None:
    x, y = data()
    groups = Q.channel_groups(network, x[:1])
    ranking = Q.Criterion.named("taylor").prepare(network, groups, [(x, y)], F.cross_entropy)
    assert isinstance(ranking, ScoreRanking)
    expected = gate_gradients(network, groups, [(x, y)], F.cross_entropy)["stem"].square().mean(0)
    assert torch.allclose(ranking.scores["stem"], expected)


def test_tokens_of_a_sample_count_as_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3), nn.Flatten(), nn.Linear(15, 2))
    x, y = torch.randn(3, 5, 4), torch.tensor([0, 1, 1])
    groups = Q.channel_groups(network, x[:1])
    found = gate_gradients(network, groups, [(x, y)], F.cross_entropy)["0"]
    alone = gate_gradients(network, groups, [(x[1:2], y[1:2])], F.cross_entropy)["0"]
    assert found.shape == (3, 6)
    assert torch.allclose(found[1:2], alone, atol=1e-6)


def test_what_cannot_be_is_said(network: nn.Module) -> None:
    x, y = data()
    groups = Q.channel_groups(network, x[:1])

    def no_number(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    def constant(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.ones(())

    def infinite(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum() / 0

    for loss in (no_number, infinite):
        with pytest.raises(ValueError, match="the loss must be one finite number: the mean over samples"):
            gate_gradients(network, groups, [(x, y)], loss)
    with pytest.raises(ValueError, match="the loss doesn't depend on any channel"):
        gate_gradients(network, groups, [(x, y)], constant)
    with pytest.raises(ValueError, match="needs at least one sample; the batches gave none"):
        gate_gradients(network, groups, [], F.cross_entropy)
    scores = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match="the batches have no targets, and the outputs are no scores of classes"):
        gate_gradients(scores, Q.channel_groups(scores, torch.ones(2, 4)), [torch.ones(2, 4)], F.mse_loss)
