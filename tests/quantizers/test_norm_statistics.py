"""Norms take the statistics of what they see in the quantized network, one after the other, every image alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers import norms


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


def network(norm: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Sequential:
    """Two layers, each with a norm that has its statistics from the images."""
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), norm(6, **options), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3), norm(4, **options), nn.Flatten(), nn.Linear(16, 3)),
    )
    norms.take_statistics(made, norms.running_norms(made), [images()])
    return made.eval()


def quantized(of: nn.Module, bits: int = 2) -> Any:
    policy = dict.fromkeys(Q.BitPolicy.uniform(of, w=8, a=8), (bits, 8))
    policy[list(policy)[-1]] = (8, 8)
    return Q.quantize(of, policy, calibrate=images())


@torch.no_grad()
def seen(network: nn.Sequential, place: int) -> Tensor:
    """Return what enters a norm, its channels first."""
    return network[:place](images()).transpose(0, 1).flatten(1).double()


@pytest.mark.parametrize("size", [60, 7, 1])
def test_statistics_are_those_of_all_images_with_the_norms_before_renewed(size: int) -> None:
    """However the images are divided into batches, batches of one included."""
    of = network()
    qnetwork = quantized(of)
    old = seen(qnetwork, 4).mean(1)
    assert Q.reestimate_norms(qnetwork, images().split(size), keep_worse=True) == 2
    for place in (1, 4):
        values = seen(qnetwork, place)
        torch.testing.assert_close(qnetwork[place].running_mean, values.mean(1).float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(qnetwork[place].running_var, values.var(1).float(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(qnetwork[4].running_mean.double(), old, atol=1e-3)


def test_the_quantized_network_comes_closer() -> None:
    of = network()
    qnetwork = quantized(of, 3)
    with torch.no_grad():
        expected = of(images()).log_softmax(1)
        before = (expected.exp() * (expected - qnetwork(images()).log_softmax(1))).sum()
        assert Q.reestimate_norms(qnetwork, images(), network=of) == 2
        after = (expected.exp() * (expected - qnetwork(images()).log_softmax(1))).sum()
    assert after < before


def test_what_is_worse_is_not_kept_unless_asked() -> None:
    """At 8 bits nothing is wrong; statistics of other images make it so."""
    of = network()
    qnetwork = quantized(of, 8)
    state = {name: tensor.clone() for name, tensor in qnetwork.state_dict().items()}
    others = images() * 5
    assert Q.reestimate_norms(qnetwork, others) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in qnetwork.state_dict().items())
    assert Q.reestimate_norms(qnetwork, others, keep_worse=True) == 2
    assert not torch.equal(qnetwork[1].running_mean, state["1.running_mean"])


@pytest.mark.parametrize(
    ("norm", "options"),
    [(nn.BatchNorm2d, {"momentum": None}), (nn.SyncBatchNorm, {}), (nn.InstanceNorm2d, {"track_running_stats": True})],
)
def test_every_kind_of_norm_that_keeps_statistics(norm: type[nn.Module], options: dict[str, Any]) -> None:
    of = network(norm, **options)
    qnetwork = quantized(of)
    momentum = qnetwork[1].momentum
    assert Q.reestimate_norms(qnetwork, images().split(25), keep_worse=True) == 2
    for place in (1, 4):
        torch.testing.assert_close(qnetwork[place].running_mean, seen(qnetwork, place).mean(1).float(), atol=1e-5, rtol=1e-4)
        assert qnetwork[place].momentum == momentum


def test_frozen_norms_stay_and_so_does_all_else() -> None:
    of = network()
    of[1].requires_grad_(False)
    qnetwork = quantized(of)
    qnetwork.train()
    qnetwork[4].eval()
    before = qnetwork[1].running_mean.clone(), qnetwork[4].running_mean.clone(), of[4].running_mean.clone()
    assert Q.reestimate_norms(qnetwork, images(), keep_worse=True) == 1
    assert torch.equal(qnetwork[1].running_mean, before[0])
    assert not torch.equal(qnetwork[4].running_mean, before[1])
    assert torch.equal(of[4].running_mean, before[2])
    assert [module.training for module in qnetwork] == [True, True, True, True, False, True, True]
    assert not any(module._forward_pre_hooks for module in qnetwork.modules())


def test_a_norm_that_is_never_called_is_left_alone() -> None:

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = nn.BatchNorm2d(3), network()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    assert Q.reestimate_norms(quantized(Partly().eval()), images(), keep_worse=True) == 2


def test_what_has_no_statistics_is_said() -> None:
    of = network()
    folded = Q.fold_batch_norm(of, images(2))
    with pytest.raises(ValueError, match="no norms with running statistics, such as batch norms that aren't folded"):
        Q.reestimate_norms(quantized(folded), images())
    qnetwork = quantized(of)
    qnetwork.requires_grad_(False)
    with pytest.raises(ValueError, match="all norms of the network are frozen"):
        Q.reestimate_norms(qnetwork, images())
    flat = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    qnetwork = Q.quantize(flat, {"0": (4, 8)}, calibrate=torch.rand(9, 3))
    before = qnetwork[1].running_mean.clone()
    with pytest.raises(ValueError, match="give at least 2 images"):
        Q.reestimate_norms(qnetwork, torch.rand(1, 3))
    assert torch.equal(qnetwork[1].running_mean, before)
