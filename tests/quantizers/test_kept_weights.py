"""Quantized weights that are kept without gradients are always those of the present weights, however these were changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import quantizers as Q
from quantizers.cache import TensorCache
from quantizers.layers import QuantLayer

SCHEMES = ("linear", "lsq", "pact", "dorefa", "kmeans", "binary", Q.Binary(scaling="xnor"))
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def quantized(scheme: str | Q.Scheme = "linear", bits: int = 4) -> nn.Module:
    return copy.deepcopy(template(scheme, bits))


@functools.cache
def template(scheme: str | Q.Scheme, bits: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=bits, a=8), calibrate=X, scheme=scheme).eval()


def layer_of(network: nn.Module) -> QuantLayer:
    layer = network[0]  # type: ignore[index]
    assert isinstance(layer, QuantLayer)
    return layer


def check(network: nn.Module) -> None:
    """What a network gives without gradients is what it gives with nothing kept."""
    with torch.no_grad():
        seen = network(X)
        fresh = copy.deepcopy(network)  # copies keep nothing
        assert torch.equal(seen, fresh(X))


def fused_step(network: nn.Module) -> None:
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 0.1, fused=True)
    F.cross_entropy(network(X), torch.arange(16) % 3).backward()
    optimizer.step()


def through_numpy(network: nn.Module) -> None:
    layer_of(network).weight.detach().numpy()[:] *= -0.5


def by_another_owner(network: nn.Module) -> None:
    """A tensor over the same memory, as another process has it, with counts of its own."""
    weight = layer_of(network).weight
    other = torch.empty(0).set_(weight.detach().untyped_storage())
    other.mul_(-0.5)


def averaged(network: nn.Module) -> None:
    averages = AveragedModel(copy.deepcopy(network).apply(lambda m: m.requires_grad_(False)))
    with torch.no_grad():
        for mean, now in zip(averages.module.parameters(), network.parameters(), strict=True):
            now.data.copy_(mean.data * 0.7)


def pruned(network: nn.Module) -> None:
    prune.l1_unstructured(layer_of(network), "weight", 0.5)
    with torch.no_grad():
        network(X)
    layer_of(network).weight_mask.data.zero_()  # type: ignore[operator, union-attr]


def one_bit_of_zero(network: nn.Module) -> None:
    layer_of(network).weight.data.zero_()
    with torch.no_grad():
        network(X)
    layer_of(network).weight.data.neg_()  # 0.0 becomes -0.0


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "fused optimizer": fused_step,
    "data": lambda network: layer_of(network).weight.data.mul_(-0.5),
    "other data": lambda network: setattr(layer_of(network).weight, "data", torch.ones(5, 6) / 3),
    "NumPy": through_numpy,
    "shared memory": by_another_owner,
    "average": averaged,
    "state_dict": lambda network: network.state_dict()["0.weight"].mul_(-1),
    "new parameter": lambda network: setattr(layer_of(network), "weight", nn.Parameter(torch.ones(5, 6) / 3)),
    "prune": pruned,
    "weight_norm": lambda network: nn.utils.weight_norm(layer_of(network)).weight_g.data.mul_(3),  # type: ignore[union-attr]
    "sign of zero": one_bit_of_zero,
    "other type": lambda network: network.double().float(),
    "scale": lambda network: getattr(layer_of(network), "weight_scale", torch.ones(1)).data.mul_(1.5),
    "codebook": lambda network: getattr(layer_of(network), "codebook", torch.ones(1)).data.mul_(1.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(change: str) -> None:
    for scheme in SCHEMES:
        if change == "fused optimizer" and scheme == "kmeans":
            continue
        for bits in (1, 4):
            if bits == 1 and scheme == "lsq":
                continue
            network = quantized(scheme, bits)
            check(network)
            CHANGES[change](network)
            check(network)


def test_parametrizations_are_computed_when_they_are_read() -> None:
    network = quantized()
    check(network)
    nn.utils.parametrizations.weight_norm(layer_of(network))
    check(network)
    layer_of(network).parametrizations.weight.original0.data.mul_(3)  # type: ignore[union-attr, operator]
    check(network)


def test_what_the_scheme_is_counts_too() -> None:
    network = quantized(Q.Binary(), 1)
    check(network)
    layer = layer_of(network)
    layer.scheme = dataclasses.replace(layer.scheme, scaling="xnor")  # type: ignore[type-var, call-arg]
    check(network)


class Shrinking(Q.Scheme):
    """A scheme whose option can be set, and that doesn't say on which tensors the weight depends."""

    learned: ClassVar[tuple[str, ...]] = ("factor",)
    needs_data: ClassVar[bool] = False

    def __init__(self) -> None:
        self.share, self.parts = 0.5, [1.0]

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        return {"factor": torch.ones(())}

    def calibrate(self, layer: Q.SchemeLayer, observer: object) -> None:
        pass

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        return layer.weight * layer.factor * self.share * self.parts[0]  # type: ignore[attr-defined, no-any-return]

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        return x


def test_schemes_of_ones_own_are_safe_without_saying_anything() -> None:
    network = quantized(Shrinking())
    layer = layer_of(network)
    scheme: Any = layer.scheme
    check(network)
    layer.factor.data.mul_(2)  # type: ignore[operator, union-attr]
    check(network)
    scheme.share = 0.25
    with torch.no_grad():
        assert torch.equal(layer.quantized_weight(), layer.weight * 0.5)
        scheme.parts[0] = 2.0  # a list: nobody sees it change
        assert torch.equal(layer.quantized_weight(), layer.weight)


class Meddling(nn.Linear):
    """Somebody else's layer, which changes its weight in place and gives it away."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [self.weight]
        if torch.is_grad_enabled():
            return F.linear(x, self.weight * 2)
        return F.linear(x, self.weight.mul_(2))


def test_nobody_can_change_what_is_kept() -> None:
    network = Q.quantize(nn.Sequential(Meddling(6, 5)), {"0": (4, 8)}, calibrate=X).eval()
    layer = layer_of(network)
    expected = network(X).detach()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(network(X), expected)
            layer.seen[0].zero_()  # type: ignore[index, union-attr]
            layer.quantized_weight().zero_()
        assert layer.quantized_weight().any()


def test_it_is_computed_once_per_width_and_kept_twice_for_none() -> None:
    made = []

    def make() -> Tensor:
        made.append(1)
        return source * 2

    source, cache = torch.tensor([1.0, float("nan"), 0.0]), TensorCache()
    for _ in range(3):
        for bits in (2, 4):
            cache.get(("weight", bits), lambda: [source], make)
    assert len(made) == 2
    source.neg_()
    cache.get(("weight", 2), lambda: [source], make)
    cache.get(("weight", 4), lambda: [source], make)
    assert len(made) == 4
    strided = torch.randn(4, 3).t()
    for expected in (strided, strided.contiguous()):
        sources = [expected]
        assert cache.get(("weight", 1), sources.copy, expected.clone).stride() == expected.stride()


def test_what_changes_while_it_is_computed_is_not_kept() -> None:
    source, cache = torch.ones(3), TensorCache()

    def interrupted() -> Tensor:
        made = source * 2
        source.data.mul_(3)
        return made

    cache.get(("weight", 2), lambda: [source], interrupted)
    source.data.div_(3)  # as before: only what was computed from it may be used
    assert torch.equal(cache.get(("weight", 2), lambda: [source], lambda: source * 5), torch.full((3,), 5.0))


def test_threads_that_evaluate_one_network_agree() -> None:
    network = quantized()
    with torch.no_grad():
        expected = copy.deepcopy(network)(X)
    start = threading.Barrier(4)

    def run(_: int) -> Tensor:
        start.wait()
        with torch.inference_mode():
            result: Tensor = network(X)
        return result

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(run, range(8)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_made_in_inference_mode(scheme: str | Q.Scheme) -> None:
    bits = 4
    if scheme in ("binary", "dorefa"):
        bits = 1
    with torch.inference_mode():
        network = quantized(scheme, bits)
        before = network(X)
        layer_of(network).weight.mul_(-3)
        assert not torch.equal(network(X), before)
        check(network)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functional_calls_and_vmap() -> None:
    networks = [quantized(), quantized()]
    networks[1][0].weight.data.mul_(-2)  # type: ignore[index]
    with torch.no_grad():
        expected = torch.stack([copy.deepcopy(network)(X) for network in networks])
        first = networks[0]
        for number in (0, 1, 0):
            values = dict(networks[number].named_parameters())
            assert torch.equal(functional_call(first, values, (X,)), expected[number])
        parameters, _ = stack_module_state(networks)
        parameters = {name: value.detach() for name, value in parameters.items()}
        together = vmap(lambda values: functional_call(first, values, (X,)))(parameters)
        torch.testing.assert_close(together, expected)
        check(first)


def test_fake_and_moved_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    network = quantized()
    check(network)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert network(torch.empty(16, 6)).shape == (16, 3)
    check(network)
    assert copy.deepcopy(network).to("meta")(X.to("meta")).device.type == "meta"
    half: Any = network.to(torch.bfloat16)
    with torch.no_grad():
        assert half(X.bfloat16()).dtype == torch.bfloat16
    check(half.float())
