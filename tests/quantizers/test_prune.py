"""Pruning in one call: what is kept, what batch norms see, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q

CRITERIA = ("l1", "l2", "bn-scale", "fpgm", "kse", "ccp", "taylor", "random")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x)).relu()
        x = (x + self.norm2(self.branch(x))).relu()
        return self.head(self.norm3(self.inner(x)).relu().mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    for _ in range(20):
        made(inputs(16, 7))
    return made.eval()


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.5


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(inputs(16, seed), torch.arange(16) % 5) for seed in range(3)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_in_one_call(criterion: str, network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = Q.prune(network, {"stem": 0.5, "inner": 0.25}, criterion=criterion, batches=batches(), loss=F.cross_entropy)
    assert small.stem.weight.shape == (4, 3, 3, 3)
    assert small.branch.weight.shape == (4, 4, 3, 3)
    assert small.inner.weight.shape == (3, 4, 1, 1)
    assert small.head.weight.shape == (5, 3)
    assert not small.training
    assert small(inputs(2)).isfinite().all()
    kept = Q.kept_channels(small)
    assert {name: len(channels) for name, channels in kept.items()} == {"stem": 4, "inner": 3}
    assert torch.equal(small.stem.weight, network.stem.weight[list(kept["stem"])])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_without_batches_nothing_but_channels_changes(network: nn.Module) -> None:
    groups = Q.channel_groups(network, inputs(1))
    small = Q.prune(network, 0.5, example=inputs(1))
    masked = Q.mask_channels(network, groups, Q.kept_channels(small))
    assert torch.allclose(small(inputs(4)), masked(inputs(4)), atol=1e-6)


def test_batch_norms_see_the_smaller_network(network: nn.Module) -> None:
    small = Q.prune(network, 0.5, batches=batches())
    images = torch.cat([images for images, _ in batches()])
    # In training mode each norm sees what those before it make of these very images.
    training = Q.copy_network(small).train()
    seen = {}
    for name in ("norm1", "norm2", "norm3"):

        def note(norm: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = given[0]

        training.get_submodule(name).register_forward_pre_hook(note)
    training(images)
    for name, x in seen.items():
        norm = small.get_submodule(name)
        assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=0.05)
        assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=0.05)
    untouched = Q.prune(network, 0.5, example=inputs(1))
    assert not torch.allclose(untouched.norm2.running_mean, small.norm2.running_mean, atol=1e-2)


def test_keeping_everything_is_a_copy(network: nn.Module) -> None:
    same = Q.prune(network, 1.0, example=inputs(1))
    assert torch.equal(same(inputs(4)), network(inputs(4)))
    assert Q.kept_channels(same) == {}


def test_the_same_call_gives_the_same_network(network: nn.Module) -> None:
    for criterion in ("ccp", "random"):
        options = {"criterion": criterion, "batches": batches(), "loss": F.cross_entropy}
        one, other = (Q.prune(network, 0.5, **options) for _ in range(2))
        assert torch.equal(one(inputs(4)), other(inputs(4)))
    generator = torch.Generator().manual_seed(3)
    drawn = Q.prune(network, 0.5, criterion="random", batches=batches(), generator=generator)
    assert Q.kept_channels(drawn) != Q.kept_channels(one)


def test_batches_may_be_gone_through_once(network: nn.Module) -> None:
    once = Q.prune(network, 0.5, criterion="taylor", batches=iter(batches()), loss=F.cross_entropy)
    often = Q.prune(network, 0.5, criterion="taylor", batches=batches(), loss=F.cross_entropy)
    assert torch.equal(once(inputs(4)), often(inputs(4)))


def test_a_network_that_is_run_otherwise(network: nn.Module) -> None:
    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["pictures"])

    given = [{"pictures": images, "labels": labels} for images, labels in batches()]
    options = {"criterion": "taylor", "loss": F.cross_entropy}
    small = Q.prune(network, 0.5, batches=given, forward=forward, **options)
    expected = Q.prune(network, 0.5, batches=batches(), **options)
    assert torch.equal(small(inputs(4)), expected(inputs(4)))


def test_what_is_pruned_can_be_quantized(network: nn.Module) -> None:
    small = Q.prune(network, 0.5, batches=batches())
    qnetwork = Q.quantize(small, Q.BitPolicy.uniform(small, w=8, a=8), calibrate=[images for images, _ in batches()])
    assert (qnetwork(inputs(4)) - small(inputs(4))).abs().max() < 0.1


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ({"branch": 0.5}, "there is no group of channels 'branch'; there are stem, inner"),
        ({"head": 0.5}, "the channels of 'head' can't be removed: they are outputs of the network"),
        ({"stem": 0.0}, "group 'stem' can't keep a share of 0.0: give a number above 0 and at most 1"),
        (2.0, "group 'stem' can't keep a share of 2.0: give a number above 0 and at most 1"),
    ],
)
def test_shares_that_cannot_be(keep: object, reason: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=reason):
        Q.prune(network, keep, example=inputs(1))


def test_what_lacks_is_said(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="pruning needs inputs to follow the network with: give an example, or batches"):
        Q.prune(network, 0.5)
    with pytest.raises(ValueError, match="pruning needs at least one sample; `batches` gave none"):
        Q.prune(network, 0.5, batches=[])
    with pytest.raises(ValueError, match="criterion 'taylor' needs data"):
        Q.prune(network, 0.5, criterion="taylor", example=inputs(1), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="criterion 'ccp' needs a loss"):
        Q.prune(network, 0.5, criterion="ccp", batches=batches())
    with pytest.raises(ValueError, match="unknown criterion 'taylro'; did you mean taylor"):
        Q.prune(network, 0.5, criterion="taylro", example=inputs(1))
