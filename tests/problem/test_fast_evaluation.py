"""Evaluation takes short cuts: it begins where policies part, and ends when the answer is known. Neither changes a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.problem.evaluator import RISK, Evaluation, Evaluator
from haq.problem.prefix_cache import Prefix
from haq.solvers import sensitivity
from haq.solvers.base import Session
from tests.conftest import images, make_problem, small_network

# One of the networks has attention, which stays in float.
pytestmark = pytest.mark.filterwarnings("ignore::quantizers.LeftInFloat")


class Branched(nn.Module):
    """What makes keeping activations hard: residual sums, a branch that lives long, views, operations in place, a layer
    that is called twice, and inputs of layers large enough for the memory that quantizers use again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 48, 3, 1, 1)
        self.first = nn.Sequential(nn.Conv2d(48, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.twice = nn.Conv2d(8, 8, 3, 1, 1)
        self.side = nn.Conv2d(48, 8, 1)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.first(x)
        y = torch.relu_(y + self.twice(y))
        y += self.twice(y)
        half, other = torch.chunk(y, 2, dim=1)
        z = self.side(x)
        z[:, :4].add_(half)
        pooled = torch.cat([z.mean((2, 3)), other.amax((2, 3)), half.flatten(2).std(2)], 1)
        return self.classifier(F.relu(pooled, inplace=True))


class OverwritesWhatIsKept(nn.Module):
    """After the second layer has read x, x itself is written over: to start from there would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.second(x)
        x.sub_(0.5).relu_()
        return self.classifier((self.third(y) + x).mean((2, 3)))


class DecidesAsItGoes(nn.Module):
    """torch.fx can't follow a decision that hangs on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.sum() > 0 else -x)


class HidesLayers(nn.Module):
    """Layers in a module of torch's own that is not looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, 4)
        self.mixer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.mixer(self.stem(x).flatten(2).mT).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": small_network,
    "branched": Branched,
    "overwrites": OverwritesWhatIsKept,
    "decides": DecidesAsItGoes,
    "hides": HidesLayers,
}
COUNT = 300  # three batches, the last of another size


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def quantized(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "out_proj" not in n]
    return Q.quantize(network, Q.BitPolicy(dict.fromkeys(layers, (8, 8))), calibrate=images(64, 1))


def made(name: str, **options: object) -> Evaluator:
    labels = torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(2))
    return Evaluator(quantized(name), images(COUNT), labels, **options)


def walk(evaluator: Evaluator, seed: int, steps: int) -> Iterator[Q.BitPolicy]:
    """Policies of which each differs from the one before in one layer, or in some, or in all."""
    random = np.random.default_rng(seed)
    names = list(Q.quant_layers(evaluator.network))
    bits = dict.fromkeys(names, (8, 8))
    for _ in range(steps):
        for layer in random.choice(names, random.choice([1, 1, 2, len(names)]), replace=False):
            bits[str(layer)] = int(random.integers(2, 9)), int(random.integers(2, 9))
        yield Q.BitPolicy(bits)


@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_those_of_whole_forward_passes(name: str, threads: int) -> None:
    evaluator = made(name)
    for policy in walk(evaluator, 0, 24 // threads):
        result = evaluator.evaluate(policy)
        assert result == evaluator.measure(evaluator.network), policy
        assert result.images == COUNT
    assert (evaluator.prefix is None) == (name == "decides")


@settings(max_examples=40)
@given(st.sampled_from(list(NETWORKS)), st.integers(0, 2**32 - 1), st.integers(0, 3_000_000))
def test_at_any_limit_of_memory(name: str, seed: int, limit: int) -> None:
    if name not in EVALUATORS:
        EVALUATORS[name] = made(name)
    evaluator = EVALUATORS[name]
    evaluator.cache.clear()
    evaluator.kept_bytes = limit
    evaluator.__dict__.pop("prefix", None)
    for policy in walk(evaluator, seed, 4):
        result = evaluator.evaluate(policy)
        Q.set_policy(evaluator.network, policy)  # one that the walk comes back to is known, and its bits aren't set again
        assert result == evaluator.measure(evaluator.network)
    if evaluator.prefix is not None:
        assert held(evaluator.prefix) <= limit


EVALUATORS: dict[str, Evaluator] = {}


def held(prefix: Prefix) -> int:
    """Bytes of all that is kept, every piece of memory once."""
    states = [state for kept in prefix.kept for state, _ in kept.states.values()]
    storages = [value.untyped_storage() for state in states for value in state if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def calls(evaluator: Evaluator) -> dict[str, int]:
    """How often every quantized layer is called from now on."""
    count = dict.fromkeys(Q.quant_layers(evaluator.network), 0)

    def counted(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            count[name] += 1

        return hook

    for name, layer in Q.quant_layers(evaluator.network).items():
        layer.register_forward_hook(counted(name))
    return count


def test_layers_before_the_change_are_not_computed() -> None:
    evaluator = made("branched")
    base = Q.BitPolicy(dict.fromkeys(Q.quant_layers(evaluator.network), (6, 6)))
    evaluator.evaluate(base)
    count = calls(evaluator)
    evaluator.evaluate(Q.BitPolicy({**base, "side": (4, 4)}))
    assert count == {"stem": 0, "first.0": 0, "twice": 0, "side": 3, "classifier": 3}
    evaluator.evaluate(Q.BitPolicy({**base, "side": (4, 4), "classifier": (4, 4)}))
    assert count == {"stem": 0, "first.0": 0, "twice": 0, "side": 3, "classifier": 6}
    evaluator.evaluate(Q.BitPolicy({**base, "twice": (3, 6)}))  # called twice: from its first call on
    assert count == {"stem": 0, "first.0": 0, "twice": 6, "side": 6, "classifier": 9}


def test_what_was_written_over_is_not_started_from() -> None:
    evaluator = made("overwrites")
    base = Q.BitPolicy(dict.fromkeys(Q.quant_layers(evaluator.network), (6, 6)))
    evaluator.evaluate(base)
    count = calls(evaluator)
    evaluator.evaluate(Q.BitPolicy({**base, "second": (2, 2)}))
    assert count == {"stem": 3, "second": 3, "third": 3, "classifier": 3}
    evaluator.evaluate(Q.BitPolicy({**base, "second": (2, 2), "third": (3, 3)}))
    assert count == {"stem": 3, "second": 3, "third": 6, "classifier": 6}


def test_smallest_states_are_kept_first() -> None:
    evaluator = made("small", kept_bytes=COUNT * 4 * (4 + 16 + 64))  # outputs, and the inputs of the two linear layers
    evaluator.evaluate(Q.BitPolicy(dict.fromkeys(Q.quant_layers(evaluator.network), (6, 6))))
    assert evaluator.prefix is not None
    assert evaluator.prefix.cuts == {3, 4, 5}
    assert held(evaluator.prefix) == evaluator.kept_bytes


def test_without_memory_nothing_is_kept() -> None:
    evaluator = made("small", kept_bytes=0)
    policies = list(walk(evaluator, 1, 3))
    assert [evaluator.evaluate(policy) for policy in policies] == [made("small").evaluate(policy) for policy in policies]
    assert evaluator.prefix is not None
    assert not held(evaluator.prefix)


def test_an_evaluation_that_fails_leaves_nothing_wrong_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = made("branched")
    first, second = walk(evaluator, 3, 2)
    evaluator.evaluate(first)
    layer = Q.quant_layers(evaluator.network)["side"]
    with monkeypatch.context() as broken:
        broken.setattr(layer, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluator.evaluate(Q.BitPolicy({**second, "side": (2, 2)}))
    for policy in (second, first):
        evaluator.cache.clear()
        assert evaluator.evaluate(policy) == evaluator.measure(evaluator.network)


def test_sensitivities_are_measured_from_the_last_layer_to_the_first() -> None:
    problem = make_problem(small_network())
    tried: list[Q.BitPolicy] = []
    session = Session(problem, 40, lambda found: tried.append(found.policy))
    count = calls(problem.evaluator)
    sensitivity.measure(problem, session, keep=1)
    base, *others = tried
    changed = [
        next((layer, min(bits)) for layer, bits in enumerate(policy.values()) if bits != base[problem.workload.names[layer]])  # type: ignore[type-var]
        for policy in others
    ]
    assert [bits for _, bits in changed] == sorted((bits for _, bits in changed), key=sensitivity.ORDER.index)
    for width in {bits for _, bits in changed}:
        layers = [layer for layer, bits in changed if bits == width]
        assert layers == sorted(layers, reverse=True)
    # The stem is pinned, so once is enough for it, and two more runs tell where the network can be cut; the layer behind it
    # runs for its own changes and when a width begins.
    assert count["stem"] <= 3
    assert count["depthwise"] < len(tried) * 2 / 3


class Told(nn.Module):
    """Answers what the input says: so the accuracy is known, and any number of policies is tried in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data = torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


POLICY = Q.BitPolicy({"layer": (8, 8)})
TOLD = Q.quantize(Told(), POLICY, calibrate=torch.eye(2))


def told(right: int, count: int, seed: int) -> Evaluator:
    """An evaluator whose network is right on a random choice of `right` of `count` images."""
    index = torch.zeros(count, dtype=torch.long)
    index[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[right:]] = 1
    return Evaluator(TOLD, torch.eye(2)[index], torch.zeros(count, dtype=torch.long), kept_bytes=0)


def test_a_policy_that_just_reaches_the_accuracy_is_stopped_with_the_risk_that_was_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At a risk of 1 in 5, so that a bound that were wrong would be seen: 100 draws, 15 looks each.
    monkeypatch.setattr("haq.problem.evaluator.RISK", 0.2)
    count, right = 2000, 1800
    stopped = [told(right, count, seed).evaluate(POLICY, beat=right / count).images < count for seed in range(100)]
    assert sum(stopped) <= 0.2 * 100
    # The union bound is not exact, but neither is it so wide that nothing is ever stopped.
    assert sum(stopped) >= 0.02 * 100
    monkeypatch.setattr("haq.problem.evaluator.RISK", 3.0)  # a fifth of a look: no longer a bound
    assert sum(told(right, count, seed).evaluate(POLICY, beat=right / count).images < count for seed in range(40)) > 0.2 * 40


def test_what_beats_is_evaluated_on_all_images() -> None:
    assert RISK == 1e-3
    for seed in range(60):
        evaluator = told(905, 1000, seed)
        assert evaluator.evaluate(POLICY, beat=0.9) == Evaluation(0.905, evaluator.cache[POLICY].loss, 1000)
        assert told(900, 1000, seed).evaluate(POLICY, beat=0.9).images == 1000  # as good as what was to beat


def test_what_is_far_below_is_stopped_early_and_completed_when_asked() -> None:
    evaluator, count = told(1000, 2000, 0), 2000
    part = evaluator.evaluate(POLICY, beat=0.9)
    assert part.images == 125
    assert part.accuracy == pytest.approx(0.5, abs=0.2)
    assert evaluator.evaluate(POLICY, beat=0.9) is part
    assert evaluator.evaluate(POLICY, beat=0.95) is part
    less = evaluator.evaluate(POLICY, beat=0.6)
    assert part.images < less.images < count
    assert evaluator.evaluate(POLICY, beat=0.45).images == count
    whole = told(1000, 2000, 0).evaluate(POLICY)
    assert evaluator.evaluate(POLICY) == evaluator.evaluate(POLICY, beat=0.9) == whole
    assert whole.accuracy == 0.5


@pytest.mark.parametrize(("beat", "images_seen"), [(-1.0, 1000), (0.0, 1000), (1.0, 125), (2.0, 125)])
def test_any_number_can_be_given_to_beat(beat: float, images_seen: int) -> None:
    assert told(500, 1000, 0).evaluate(POLICY, beat=beat).images == images_seen


def test_order_of_images_is_no_order_of_classes() -> None:
    """Data often come sorted: a part of them says something about all only if it is drawn at random."""
    problem = make_problem(small_network())
    inputs, labels = images(1000), torch.arange(4).repeat_interleave(250)
    evaluator = Evaluator(problem.evaluator.network, inputs, labels)
    assert all(len(labels.unique()) == 4 for _, labels in evaluator.batches)
    seen = torch.cat([inputs for inputs, _ in evaluator.batches])
    assert torch.equal(seen[evaluator.order.argsort()], inputs)


def test_stopping_does_not_depend_on_threads_and_leaves_what_is_kept_right(threads: int) -> None:
    evaluator, other = made("branched"), made("branched")
    for policy in walk(evaluator, 5, 12 // threads):
        part = evaluator.evaluate(policy, beat=0.5)
        torch.set_num_threads(1)
        assert other.evaluate(policy, beat=0.5) == part
        torch.set_num_threads(threads)
        assert evaluator.evaluate(policy) == other.measure(other.network)
    assert torch.get_num_threads() == threads


def test_labels_or_a_teacher() -> None:
    network = quantized("small")
    with pytest.raises(ValueError, match="labels or a teacher, or both"):
        Evaluator(network, images(8))
    labels = torch.zeros(8, dtype=torch.long)
    told, taught = Evaluator(network, images(8), labels), Evaluator(network, images(8), teacher=network)
    with pytest.raises(ValueError, match="no teacher"):
        told.measure_teacher()
    policy = Q.BitPolicy(dict.fromkeys(Q.quant_layers(network), (3, 3)))
    both = Evaluator(network, images(8), labels, teacher=network).evaluate(policy)
    assert both[:3] == told.evaluate(policy)[:3]
    assert told.evaluate(policy).divergence is None
    assert both.divergence == taught.evaluate(policy).divergence == taught.evaluate(policy).loss
