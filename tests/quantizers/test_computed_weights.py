"""Weights that torch computes from other tensors (parametrizations, weight_norm, spectral_norm, prune) are quantized, copied
and folded like others, and training reaches what they are computed from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import quantizers as Q

ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrized weight norm": parametrizations.weight_norm,
    "parametrized spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}
way = pytest.mark.parametrize("name", WAYS)


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


@way
@pytest.mark.parametrize("kind", [nn.Linear, Scaled])
@pytest.mark.parametrize("training", [False, True])
def test_they_are_quantized_and_trained(name: str, kind: type[nn.Linear], training: bool) -> None:
    network = nn.Sequential(WAYS[name](kind(8, 4))).train(training)
    network(ROWS)  # with gradients: the weight is a result of a calculation from now on
    before = {key: value.clone() for key, value in network.state_dict().items()}
    qnetwork = Q.quantize(network, {"0": (8, 8)}, calibrate=ROWS)
    assert list(qnetwork.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert qnetwork.training == training
    out, expected = qnetwork.eval()(ROWS), network.eval()(ROWS)
    assert (out - expected).norm() < 0.02 * expected.norm()
    out.square().sum().backward()
    for parameter in qnetwork.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    with torch.no_grad():
        for copied in (copy.deepcopy(qnetwork), Q.copy_network(qnetwork)):
            assert torch.equal(copied(ROWS), out)
        again = Q.float_copy(qnetwork)
        assert torch.equal(again(ROWS), expected)
        assert list(again.state_dict()) == list(before)
        assert type(again[0]).__name__ == type(network[0]).__name__


@way
def test_kept_weights_follow_what_they_are_computed_from(name: str) -> None:
    network = nn.Sequential(WAYS[name](nn.Linear(8, 4)))
    qnetwork = Q.quantize(network, {"0": (8, None)}).eval()
    with torch.no_grad():
        before = qnetwork(ROWS)
        assert torch.equal(qnetwork(ROWS), before)
        for key, parameter in qnetwork.named_parameters():
            if key != "0.bias":
                parameter[0, :] = parameter[0].flip(-1) * -0.9
        after = qnetwork(ROWS)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, qnetwork(ROWS).detach())


def test_scales_are_those_of_the_weight_as_it_is_now() -> None:
    """Without calibration no forward pass computes it again after an optimizer's step."""
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 4)))
    with torch.no_grad():
        network[0].weight_g.mul_(3)
    qnetwork = Q.quantize(network, {"0": (8, None)})
    torch.testing.assert_close(qnetwork(ROWS), network(ROWS), atol=0.05, rtol=0.05)


def test_a_parametrization_can_be_removed_and_put_on_afterwards() -> None:
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4)))
    qnetwork = Q.quantize(network, {"0": (8, 8)}, calibrate=ROWS)
    expected = qnetwork(ROWS)
    parametrize.remove_parametrizations(qnetwork[0], "weight")
    assert type(qnetwork[0]) is Q.QuantLinear
    torch.testing.assert_close(qnetwork(ROWS), expected)
    assert parametrize.is_parametrized(network[0])
    parametrizations.weight_norm(qnetwork[0])
    torch.testing.assert_close(qnetwork(ROWS), expected)
    again = Q.float_copy(qnetwork)
    assert type(again[0]).__name__ == "ParametrizedLinear"
    torch.testing.assert_close(again(ROWS), network(ROWS))


class OwnProperty(nn.Linear):
    """Computes its weight itself."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.raw = self._parameters.pop("weight")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        assert self.raw is not None
        return 2 * self.raw

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_a_weight_that_is_a_property() -> None:
    network = nn.Sequential(OwnProperty())
    qnetwork = Q.quantize(network, {"0": (8, 8)}, calibrate=ROWS)
    torch.testing.assert_close(qnetwork(ROWS), network(ROWS), atol=0.05, rtol=0.05)
    qnetwork(ROWS).sum().backward()
    assert qnetwork.get_parameter("0.raw").grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(qnetwork))(ROWS), qnetwork(ROWS))


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.features: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        self.features.append({"last": (x,)})
        return x


def test_a_network_that_remembers_its_features_can_be_copied() -> None:
    network = Remembering()
    network(ROWS)
    made = Q.copy_network(network)
    kept = made.features[0]["last"][0]
    assert torch.equal(kept, network.features[0]["last"][0])
    assert not kept.requires_grad
    assert Q.quantize(network, {"linear": (4, 4)}, calibrate=ROWS)(ROWS).requires_grad


def norm() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(4)
    for tensor in (made.weight.data, made.running_var):
        tensor.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


@way
def test_norms_are_folded_into_them(name: str) -> None:
    network = nn.Sequential(WAYS[name](nn.Conv2d(3, 4, 3)), norm()).eval()
    expected = network(PICTURES)
    folded = Q.fold_batch_norm(network, PICTURES)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(PICTURES), expected, atol=1e-4, rtol=1e-4)
    assert type(folded[0]) is nn.Conv2d
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in (folded[0].weight, folded[0].bias))
    assert torch.equal(network(PICTURES), expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_norms_whose_weight_is_computed_are_folded() -> None:
    for computed in (prune.l1_unstructured(norm(), "weight", 0.5), norm()):
        if isinstance(computed.weight, nn.Parameter):
            parametrize.register_parametrization(computed, "weight", Doubled())
        network = nn.Sequential(nn.Conv2d(3, 4, 3), computed).eval()
        folded = Q.fold_batch_norm(network, PICTURES)
        assert isinstance(folded[1], nn.Identity)
        torch.testing.assert_close(folded(PICTURES), network(PICTURES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["linear", "dorefa", "pact", "lsq", "lsqplus", "kmeans", "binary", "main-subsidiary"])
def test_a_weight_is_computed_once_in_a_forward_pass(scheme: str) -> None:
    """In training spectral_norm goes on with its iteration whenever the weight is read."""
    bits = 4
    if scheme in ("binary", "main-subsidiary"):
        bits = 1
    network = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 4)))
    qnetwork = Q.quantize(network, {"0": (bits, bits)}, scheme=scheme, calibrate=ROWS).train()
    computed = []
    qnetwork[0].parametrizations.weight[0].register_forward_hook(lambda *call: computed.append(call))
    qnetwork(ROWS)
    assert len(computed) == 1
    with torch.no_grad():
        qnetwork(ROWS)
    assert len(computed) == 2
