"""A problem checks what it is given, says what is reachable, and evaluates a policy once."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import haq
import quantizers as Q
from haq.problem.budget import OutOfReach, parse_budget
from haq.problem.evaluator import Evaluator
from haq.problem.problem import describe_amount
from tests.conftest import images, make_problem, small_network


def test_fractions_and_amounts(problem: haq.Problem, network: nn.Module) -> None:
    assert problem.limit == pytest.approx(0.6 * problem.cost[:, 7, 7].sum())
    assert problem.budget == pytest.approx(0.6)
    same = make_problem(network, f"{problem.limit * 1e6!r}us")
    assert same.limit == pytest.approx(problem.limit)
    storage = make_problem(network, "1.2 kB", "storage")
    assert (storage.limit, storage.unit) == (1200, "B")


@pytest.mark.parametrize("budget", [0.01, 1.5, "1us", 50])
def test_a_budget_out_of_reach_names_the_reachable_range(network: nn.Module, budget: float | str) -> None:
    with pytest.raises(ValueError, match=r"out of reach: on edge, latency can be from .* us \(0\.\d+ of .*\) to .* us"):
        make_problem(network, budget)


def test_the_smallest_budget_that_is_named_is_accepted(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="out of reach") as error:
        make_problem(network, 0.001)
    named = str(error.value).partition("(")[2].partition(" of")[0]
    assert make_problem(network, named).budget == pytest.approx(float(named))


@settings(max_examples=60)
@given(st.sampled_from(["latency", "storage"]), st.floats(-9, 9), st.integers(0, 2**32 - 1))
def test_every_bound_that_is_named_is_accepted(metric: str, magnitude: float, seed: int) -> None:
    one = copy.copy(of_metric(metric))
    one.cost = one.cost * 10**magnitude * np.random.default_rng(seed).uniform(0.5, 1.5, (len(one.workload), 1, 1))
    one.reference = float(one.cost[:, 7, 7].sum())
    one._choose()
    for asked in (0.5 * one.smallest / one.reference, 2.0):
        with pytest.raises(OutOfReach) as error:
            one.on(one.target, asked)
        bounds = re.search(r"can be from (.*?) \((.*?) of uniform 8 bits\) to (.*?) \(", str(error.value))
        assert bounds is not None
        for words in bounds.groups():
            assert one.smallest * (1 - 1e-9) <= one.on(one.target, words).limit <= one.reference
    # What tables say of 8 bits is accepted as well, and is no more than they cost.
    for words in (describe_amount(one.reference, metric), describe_amount(one.reference, metric).replace("us", "µs")):
        assert one.on(one.target, words).limit <= one.reference
    with pytest.raises(OutOfReach):
        one.on(one.target, describe_amount(one.reference * 1.002, metric))


@functools.cache
def of_metric(metric: str) -> haq.Problem:
    inputs = images(8)
    return haq.Problem(small_network(), inputs, (inputs, torch.zeros(8).long()), "edge", metric, 1.0, pinned={})


def test_layers_are_named_if_the_budget_is_out_of_reach_because_they_are_pinned(network: nn.Module) -> None:
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    with pytest.raises(
        OutOfReach, match=r"for the pinned layers, 'stem' at 8/8 and 'classifier' at 8/8: without them"
    ) as error:
        haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.3)
    named = str(error.value).rpartition(" from ")[2]
    assert haq.Problem(network, inputs, (inputs, labels), "edge", budget=named, pinned={}).budget < 0.3
    for budget in (0.001, 2.0):  # out of reach in any case
        with pytest.raises(OutOfReach, match=r"out of reach: ((?!pinned).)*$"):
            haq.Problem(network, inputs, (inputs, labels), "edge", budget=budget)


def test_one_bit_is_named_where_it_would_reach_further(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"; bits 1:8 would reach 0\.\d+$") as error:
        make_problem(network, 0.001)
    reached = float(str(error.value).rpartition(" ")[2])
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    one = haq.Problem(network, inputs, (inputs, labels), "edge", budget=reached, bits=(1, 8))
    assert one.smallest / one.reference <= one.budget < make_problem(network, 1.0).smallest / one.reference


@pytest.mark.parametrize("budget", ["half", "3 bits", "", "12kB", "-1", "1..2"])
def test_a_budget_that_is_not_understood(network: nn.Module, budget: str) -> None:
    with pytest.raises(ValueError, match="not understood: give a fraction .* or an amount in s, ms, us"):
        make_problem(network, budget)


def test_units() -> None:
    assert parse_budget("2.5e-1", "latency", 8.0) == 2.0
    assert parse_budget("3mJ", "energy", 8.0) == pytest.approx(3e-3)
    assert parse_budget("2 KiB", "storage", 8.0) == 2048
    assert describe_amount(0.0012345, "latency") == "1.234 ms"
    assert describe_amount(12.5, "storage") == "12.5 B"
    assert describe_amount(4.5e4, "storage") == "45 kB"


def test_a_policy_is_evaluated_once(problem: haq.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prepared = Evaluator.prepared
    monkeypatch.setattr(Evaluator, "prepared", lambda self, policy: calls.append(1) or prepared(self, policy))
    first = problem.evaluate(problem.uniform(4))
    assert problem.evaluate(problem.uniform(4)) == first
    assert len(calls) == 1


def test_evaluation_equals_the_straightforward_way(problem: haq.Problem, network: nn.Module) -> None:
    inputs = images(96)
    with torch.inference_mode():
        labels = network(inputs).argmax(1)
        for bits in (8, 3, 5):
            policy = problem.policy([bits] * 5, [bits] * 5)
            qnetwork = Q.quantize(network, policy, calibrate=images(32, 1))
            outputs = qnetwork(inputs)
            result = problem.evaluate(policy)
            assert result.accuracy == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
            assert result.loss == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)


def test_the_network_is_left_alone(network: nn.Module) -> None:
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    inputs = images(16)
    problem = haq.Problem(network, images(8), (inputs, torch.zeros(16, dtype=torch.long)), "edge", budget=0.9)
    problem.evaluate(problem.uniform(2))
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_pinned_layers_can_be_chosen(network: nn.Module) -> None:
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    problem = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.9, pinned={"hidden": (4, 6)})
    assert problem.decisions[3].pairs.tolist() == [[4, 6]]
    assert len(problem.decisions[0].pairs) > 1
    free = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.9, pinned={})
    assert all(len(decision.pairs) > 1 for decision in free.decisions)


def test_tied_layers_take_the_same_bits(network: nn.Module) -> None:
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    tied = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.7, tied=[("hidden", "depthwise")], bits=(3, 6))
    assert [decision.layers for decision in tied.decisions] == [(0,), (1, 3), (2,), (4,)]
    assert tied.quantization_error.shape == (4, 2, 10)
    decision = tied.decisions[1]
    w, a = decision.pairs[0] - 1
    assert decision.prices[0] == pytest.approx(tied.cost[1, w, a] + tied.cost[3, w, a])
    policy = tied.decide([(8, 8), (3, 4), (5, 6), (8, 8)])
    assert policy["hidden"] == policy["depthwise"] == (3, 4)
    with pytest.raises(ValueError, match="tied layers stem, hidden have no pair of bits in common"):
        haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.7, tied=[("hidden", "stem")], bits=(3, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tied": [("hiden",)]}, "tied layer 'hiden'"),
        ({"tied": [("hidden", "stem"), ("hidden",)]}, "'hidden' is tied twice"),
        ({"target": "edgy"}, "did you mean edge"),
        ({"metric": "energy", "target": "cloud"}, "no metric 'energy'; it has latency, storage"),
        ({"bits": (0, 8)}, "bits must be"),
        ({"bits": (5, 4)}, "bits must be"),
        ({"pinned": {"nope": (8, 8)}}, "pinned layer 'nope'"),
        ({"pinned": {"stem": (9, 8)}}, "'stem'"),
        ({"search": []}, "no images"),
        ({"search": (images(4), torch.zeros(3, dtype=torch.long))}, "as many images as labels"),
        ({"search": (images(4), torch.full((4,), 7))}, "don't fit outputs"),
        ({"search": (images(4) * float("nan"), torch.zeros(4, dtype=torch.long))}, "not finite"),
        ({"batch": 0}, "batch must be"),
    ],
)
def test_bad_input_is_named(network: nn.Module, change: dict[str, Any], message: str) -> None:
    options = {
        "calibrate": images(8),
        "search": (images(8), torch.zeros(8, dtype=torch.long)),
        "target": "edge",
        "budget": 0.9,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        haq.Problem(network, **options)


def test_loaders_are_taken_as_well(network: nn.Module) -> None:
    inputs, labels = images(8), torch.arange(8) % 4
    loader = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    one = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.9)
    other = haq.Problem(network, [inputs], loader, "edge", budget=0.9)
    assert one.evaluate(one.uniform(5)) == other.evaluate(other.uniform(5))


def objective_class(**methods: Any) -> type[haq.Objective]:
    return type("Mine", (haq.Objective,), methods)


def right(outputs: Any, labels: Any) -> Any:
    return outputs[0].argmax(1) == labels


@pytest.mark.parametrize(
    ("correct", "given"),
    [
        (lambda self, outputs, labels: right(outputs, labels)[:, None].expand(-1, 4), r"bool of shape \(125, 4\)"),
        (lambda self, outputs, labels: right(outputs, labels).all(), "the bool (True|False)"),
        (lambda self, outputs, labels: right(outputs, labels)[:5], r"bool of shape \(5,\)"),
        (lambda self, outputs, labels: right(outputs, labels).long() * 40, r"int64 of shape \(125,\)"),
        (lambda self, outputs, labels: right(outputs, labels).tolist(), r"list \["),
        (lambda self, outputs, labels: None, "NoneType None"),
        (lambda self, outputs, labels: "all", "str 'all'"),
    ],
)
def test_an_objective_says_of_every_image_whether_it_is_correct(network: nn.Module, correct: Any, given: str) -> None:
    message = rf"^`correct` of objective 'Mine' must return a boolean tensor of shape \(125,\), .*, not {given}"
    search = images(130), torch.zeros(130, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        haq.Problem(network, images(8), search, "edge", objective=objective_class(correct=correct))


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (lambda self, outputs, labels, divergence: outputs[0], r"float32 of shape \(8, 4\)"),
        (lambda self, outputs, labels, divergence: outputs[0][:1, 0], r"float32 of shape \(1,\)"),
        (lambda self, outputs, labels, divergence: labels.sum(), "the int64 0"),
        (lambda self, outputs, labels, divergence: None, "NoneType None"),
        (lambda self, outputs, labels, divergence: "1.5", "str '1.5'"),
        (lambda self, outputs, labels, divergence: True, "bool True"),
        (lambda self, outputs, labels, divergence: float("nan"), "float nan"),
        (lambda self, outputs, labels, divergence: outputs[0].sum() * torch.inf, "the float32 -?inf"),
    ],
)
def test_an_objectives_loss_is_one_finite_number(network: nn.Module, loss: Any, given: str) -> None:
    search = images(8), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=f"^`loss` of objective 'Mine' must return one finite number, .*, not {given}"):
        haq.Problem(network, images(8), search, "edge", objective=objective_class(loss=loss))


def test_an_objective_that_fails_is_named(network: nn.Module) -> None:
    search = images(8), torch.zeros(8, dtype=torch.long)
    for name in ("correct", "loss"):
        broken = objective_class(**{name: lambda self, *given: {}["nothing"]})
        with pytest.raises(ValueError, match=f"^`{name}` of objective 'Mine' failed: KeyError: 'nothing'"):
            haq.Problem(network, images(8), search, "edge", objective=broken)
    with pytest.raises(ValueError, match=r"Mine.* can't be made \(ZeroDivisionError: .*\)"):
        haq.Problem(network, images(8), search, "edge", objective=objective_class(__init__=lambda self: 1 / 0))
    attacked = objective_class(attacked=True, more_inputs=lambda self, network, inputs, *rest: (inputs[:3],))
    with pytest.raises(ValueError, match=r"`more_inputs` of objective 'Mine' must .* of shape \(8, 1, 8, 8\), not float32"):
        haq.Problem(network, images(8), search, "edge", objective=attacked)


def test_an_objectives_loss_may_be_a_tensor_of_one_number(network: nn.Module) -> None:
    search = images(8), torch.zeros(8, dtype=torch.long)
    mine = objective_class(loss=lambda self, outputs, labels, divergence: outputs[0].square().mean())
    found = haq.Problem(network, images(8), search, "edge", objective=mine).float_result
    assert isinstance(found.loss, float)
