"""What an evaluator keeps is of the network and the images as they are, whoever changed them and however."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from haq.problem import snapshot
from haq.problem.evaluator import Evaluator
from haq.problem.prefix_cache import Prefix
from tests.conftest import images, make_problem, small_network

COUNT = 130  # two batches
LABELS = torch.arange(COUNT) % 4


class Shifted(nn.Linear):
    """A layer with a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__(64, 16)
        self.shift = torch.zeros(16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def made(network: nn.Module) -> Evaluator:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    quantized = Q.quantize(network, Q.BitPolicy(dict.fromkeys(names, (8, 8))), calibrate=images(32, 1))
    return Evaluator(quantized, images(COUNT), LABELS)


def uniform(evaluator: Evaluator, bits: int) -> Q.BitPolicy:
    return Q.BitPolicy(dict.fromkeys(Q.quant_layers(evaluator.network), (bits, bits)))


def anew(evaluator: Evaluator) -> Evaluator:
    """An evaluator of copies of what another one has now."""
    order = evaluator.order.argsort()
    inputs = torch.cat([inputs for inputs, _ in evaluator.batches])[order]
    return Evaluator(copy.deepcopy(evaluator.network), inputs, LABELS)


def train_fused(network: nn.Module) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, fused=True)
    nn.functional.cross_entropy(network(images(8)), torch.arange(8) % 4).backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES: dict[str, Callable[[Evaluator], object]] = {
    "data": lambda e: e.network.hidden.weight.data.mul_(-1),
    "numpy": lambda e: e.network.stem.weight.detach().numpy().__imul__(-1),
    "fused": lambda e: train_fused(e.network),
    "buffer": lambda e: e.network.norm.running_mean.data.add_(1),
    "scale": lambda e: e.network.hidden.activation_scale.data.mul_(3),
    "loose tensor": lambda e: e.network.hidden.shift.data.add_(1),
    "module": lambda e: setattr(e.network, "relu2", nn.Tanh()),
    "number": lambda e: setattr(e.network.norm, "eps", 1.0),
    "images": lambda e: e.batches[0][0].numpy().__isub__(0.5),
}


@pytest.mark.parametrize("large", [snapshot.LARGE, 100], ids=["copies", "checksums"])
@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_nothing_is_as_before(name: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "LARGE", large)
    network = small_network()
    if name == "loose tensor":
        network.hidden = Shifted()
    evaluator = made(network)
    low, lower = uniform(evaluator, 4), uniform(evaluator, 3)
    before = evaluator.evaluate(low), evaluator.evaluate(lower)
    CHANGES[name](evaluator)
    fresh = anew(evaluator)
    after = evaluator.evaluate(low), evaluator.evaluate(lower)
    assert after == (fresh.evaluate(low), fresh.evaluate(lower))
    assert after != before


def test_a_change_of_the_images_is_one_of_the_teachers_answers_too() -> None:
    network = small_network()
    evaluator = Evaluator(made(network).network, images(COUNT), teacher=network)
    evaluator.evaluate(uniform(evaluator, 3))
    evaluator.batches[0][0].neg_()
    inputs = torch.cat([inputs for inputs, _ in evaluator.batches])[evaluator.order.argsort()]
    fresh = Evaluator(copy.deepcopy(evaluator.network), inputs, teacher=network)
    assert evaluator.evaluate(uniform(evaluator, 3)) == fresh.evaluate(uniform(evaluator, 3))


def test_a_network_that_was_trained_on_is_judged_in_evaluation_mode() -> None:
    evaluator = made(small_network())
    before = evaluator.evaluate(uniform(evaluator, 3)), evaluator.evaluate(uniform(evaluator, 5))
    evaluator.network.train()
    evaluator.cache.clear()
    assert (evaluator.evaluate(uniform(evaluator, 3)), evaluator.evaluate(uniform(evaluator, 5))) == before
    assert not any(module.training for module in evaluator.network.modules())


def test_what_did_not_change_is_not_evaluated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.body = small_network()
            self.body.norm.register_buffer("unused", torch.tensor(float("nan")))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x)

    evaluator = made(Counts())
    first = evaluator.evaluate(uniform(evaluator, 3))
    monkeypatch.setattr(Evaluator, "prepared", lambda self, policy: 1 / 0)
    assert evaluator.evaluate(uniform(evaluator, 3)) is first


class WritesUnseen(nn.Module):
    """Halves a value that a later layer reads, where torch doesn't count it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.second = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.third, self.classifier = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        rows = x[:, 2:]  # a view, which the change of x is a change of, too
        y = self.second(x)
        if self.how == "data":
            x.data.mul_(0.5)
        elif self.how == "numpy":
            x.numpy().__imul__(0.5)
        y = self.third(y) + x
        return self.classifier(y.mean((2, 3)) + rows.sum((1, 2, 3))[:, None])


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_what_was_written_over_unseen_is_not_started_from(how: str) -> None:
    torch.manual_seed(0)
    evaluator = made(WritesUnseen(how))
    policy = uniform(evaluator, 6)
    for layer in ("classifier", "third", "second", "third"):
        policy = Q.BitPolicy({**policy, layer: (policy[layer][0] - 2, 4)})  # type: ignore[operator]
        assert evaluator.evaluate(policy) == evaluator.measure(evaluator.network)
    assert evaluator.prefix is not None
    assert evaluator.prefix.copied
    assert not made(small_network()).prefix.copied  # type: ignore[union-attr]


def test_copies_of_states_are_within_the_limit() -> None:
    torch.manual_seed(0)
    evaluator = made(WritesUnseen("data"))
    evaluator.kept_bytes = COUNT * 1000
    evaluator.evaluate(uniform(evaluator, 6))
    assert isinstance(evaluator.prefix, Prefix)
    kept = [state for kept in evaluator.prefix.kept for state, _ in kept.states.values()]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for state in kept for value in state}
    assert 0 < sum(storages.values()) <= evaluator.kept_bytes


class Centred(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.body = small_network()

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x.sub_(0.5).mul_(2)
            return self.body(x)
        return self.body((x - 0.5) * 2)


def test_a_network_may_change_its_input() -> None:
    inputs, few = images(COUNT), images(32, 1)
    before = inputs.clone(), few.clone()
    losses = []
    for in_place in (False, True):
        problem = haq.Problem(Centred(in_place), few, (inputs, LABELS), "edge", budget=0.9)
        losses.append([problem.float_result, *(problem.evaluate(problem.uniform(bits)) for bits in (6, 3, 6))])
        problem.evaluator.cache.clear()
        losses[-1].append(problem.evaluate(problem.uniform(3)))
        assert torch.equal(inputs, before[0])
        assert torch.equal(few, before[1])
    assert losses[0] == losses[1]


def test_tuning_cannot_change_the_network_that_policies_are_made_of() -> None:
    def tune(network: nn.Module) -> nn.Module:
        network.train().get_submodule("hidden").weight.data.mul_(-1)  # type: ignore[operator, union-attr]
        return network

    problem = make_problem(small_network())
    problem.evaluator.tune = tune
    first = problem.evaluate(problem.uniform(4))
    problem.evaluator.cache.clear()
    assert problem.evaluate(problem.uniform(4)) == first
    problem.evaluator.tune = None
    problem.evaluator.cache.clear()
    assert problem.evaluate(problem.uniform(4)) == make_problem(small_network()).evaluate(problem.uniform(4))
