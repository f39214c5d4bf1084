"""A problem has several budgets, of any metric, as fractions of a reference that is stated; what can't be is named."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import haq
import hw_models
import quantizers as Q
from haq.problem.budget import OutOfReach
from hw_models import CostTable, Workload
from hw_models.widths import FLOAT, place_of
from tests.conftest import images, small_network

X = images(24)


class Chip:
    """A target that does a few pairs of widths, and takes as long as their product."""

    description = "a chip with a few pairs"
    provenance = "estimated"

    def __init__(self, *pairs: tuple[int | None, int | None], stem: tuple[tuple[int | None, int | None], ...] = ()) -> None:
        self.name = "chip"
        self.pairs = pairs
        self.stem = stem or pairs

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        latency = np.full((len(workload), 10, 10), np.nan)
        for index, layer in enumerate(workload.layers):
            pairs = self.pairs
            if index == 0:
                pairs = self.stem
            for w, a in pairs:
                latency[index, place_of(w), place_of(a)] = layer.macs * (w or FLOAT) * (a or FLOAT) * 1e-12
        return CostTable("chip", "estimated", workload, batch or 1, latency, None, hw_models.storage_bytes(workload))


class Free(Chip):
    """Latency by activation bits alone."""

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        latency = np.ones((len(workload), 8, 8)) * np.arange(1, 9) * 1e-6
        return CostTable("chip", "estimated", workload, batch or 1, latency, None, hw_models.storage_bytes(workload))


@functools.cache
def labels() -> torch.Tensor:
    with torch.inference_mode():
        return small_network()(X).argmax(1).clone()


def problem_of(target: Any = "edge", **options: Any) -> haq.Problem:
    return haq.Problem(small_network(), X, (X, labels()), target, **options)


def test_all_budgets_hold_and_the_first_is_the_main_one() -> None:
    problem = problem_of(budget={"latency": 0.6, "storage": "1.4kB", "peak_memory": 0.95})
    assert [limit.metric for limit in problem.limits] == ["latency", "storage", "peak_memory"]
    assert problem.metric == "latency"
    assert problem.limits[0].amount == pytest.approx(0.6 * problem.reference)
    assert problem.limits[1].amount == pytest.approx(1400)
    eights = problem.uniform(8)
    costs = problem.costs(eights)
    assert costs["storage"] == problem.table.storage_bytes[:, 7, 7].sum()
    assert costs["peak_memory"] == hw_models.peak_activation_bytes(problem.workload, np.full(5, 8))
    assert not problem.holds(eights)
    smallest = [int(decision.prices.argmin()) for decision in problem.decisions]
    policy = problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, smallest, strict=True))
    assert problem.fits(smallest) == problem.holds(policy)


@pytest.mark.parametrize("asked", ["latency=0.6,storage=1.4kB", {"latency": "0.6", "storage": "1.4kB"}])
def test_budgets_as_text_or_by_metric(asked: Any) -> None:
    problem = problem_of(budget=asked)
    assert [(limit.metric, limit.unit) for limit in problem.limits] == [("latency", "s"), ("storage", "B")]


def test_a_metric_that_is_the_same_for_all_policies_has_one_amount() -> None:
    with pytest.raises(OutOfReach, match=r"peak_memory can be from (\S+ MB) \(1.000 of uniform 8 bits\) to \1$"):
        problem_of(budget={"latency": 1.0, "peak_memory": "1kB"}, bits="4,8/8", batch=1001)


def test_options_are_left_out_only_if_they_are_no_better_by_any_budget() -> None:
    """More weight bits that cost no time are better, unless they are stored."""
    one = problem_of(Free(), budget=0.6)
    both = problem_of(Free(), budget={"latency": 0.6, "storage": 0.8})
    for alone, together in zip(one.decisions, both.decisions, strict=True):
        pairs = {tuple(pair) for pair in together.pairs.tolist()}
        assert {tuple(pair) for pair in alone.pairs.tolist()} <= pairs
        assert together.others.shape == (1, len(together.pairs))
    assert sum(len(d.pairs) for d in both.decisions) > sum(len(d.pairs) for d in one.decisions)


def test_a_budget_of_any_metric() -> None:
    for metric in hw_models.METRICS:
        problem = problem_of(metric=metric, budget=0.9)
        limited = problem.limits[-1]
        assert limited.metric == metric
        assert limited.amount == pytest.approx(0.9 * limited.reference)
        result = haq.solve(problem, "ilp", evaluations=2)
        assert problem.costs(result.policy)[metric] <= limited.amount * (1 + 1e-9)


def test_widths_of_a_chip_are_its_own() -> None:
    chip = Chip((8, 8), (4, 8), (8, 16), (None, None), (4, None))
    problem = problem_of(chip, budget=1.0)
    assert problem.widths.weights == (2, 3, 4, 5, 6, 7, 8, FLOAT)
    assert problem.widths.activations == (2, 3, 4, 5, 6, 7, 8, 16, FLOAT)
    free = problem.decisions[1]
    assert {tuple(pair) for pair in free.pairs.tolist()} == {(8, 8), (4, 8), (8, 16), (FLOAT, FLOAT), (4, FLOAT)}
    policy = problem.decide([decision.pairs[-1] for decision in problem.decisions])
    assert policy["depthwise"] == (None, None)
    assert problem.bit_arrays(policy)[0].tolist() == [8, 32, 32, 32, 8]
    problem.check_policy(policy)
    assert problem.evaluate(policy).accuracy == pytest.approx(1.0)
    assert problem.policy_cost(policy) == pytest.approx(float(problem.table.total("latency", *problem.bit_arrays(policy))))
    with pytest.raises(ValueError, match=r"'depthwise' can't take 9/8|must be 1 to 8|must be an integer"):
        problem.check_policy(Q.BitPolicy(dict(policy) | {"depthwise": (9, 8)}))


def test_only_what_is_asked_for_may_be_chosen() -> None:
    chip = Chip((8, 8), (4, 8), (8, 16), (None, None))
    problem = problem_of(chip, budget=1.0, bits="4,8/8")
    assert {tuple(pair) for pair in problem.decisions[1].pairs.tolist()} == {(8, 8), (4, 8)}
    with pytest.raises(ValueError, match="'depthwise' can't take 8/16 .*: widths 4,8/8 are allowed"):
        problem.check_policy(Q.BitPolicy(dict(problem.uniform(8)) | {"depthwise": (8, 16)}))
    with pytest.raises(ValueError, match="asks for weights of width 16, which chip can't do"):
        problem_of(chip, bits="4,8,16")
    with pytest.raises(ValueError, match="no pair of bits within 2 to 3 that its scheme has and chip can do; it can do 4/8"):
        problem_of(Chip((8, 8), (4, 8)), bits="2:3")


def test_the_ends_are_fixed_at_the_nearest_pair_that_there_is() -> None:
    sixteen = problem_of(Chip((8, 8), (4, 8), (16, 16), stem=((16, 16), (None, None), (4, 4))), budget=1.0)
    assert sixteen.pinned == {"stem": (16, 16), "classifier": (8, 8)}
    assert problem_of(Chip((8, 8), stem=((4, 8), (4, 4))), budget=1.0).pinned["stem"] == (4, 8)
    assert problem_of(Chip((8, 8), (4, 8)), budget=1.0, pinned={"hidden": (4, 8)}).pinned == {"hidden": (4, 8)}
    in_float = problem_of(Chip((8, 8), (None, None)), budget=5.0, pinned={"stem": (None, None)})
    assert in_float.decisions[0].pairs.tolist() == [[FLOAT, FLOAT]]


def test_fractions_are_of_the_reference_that_is_named(tmp_path: Path) -> None:
    chip = Chip((8, 8), (4, 8), (16, 16), (None, None))
    plain = problem_of(chip, budget=0.9)
    assert plain.reference_words == "uniform 8 bits"
    twice = problem_of(chip, budget=0.5, reference="w16a16")
    assert twice.reference == pytest.approx(4 * plain.reference)
    assert twice.reference_words == "uniform 16/16"
    assert problem_of(chip, budget=0.5, reference="float").reference_words == "uniform float"
    of_float = problem_of(chip, budget=0.06, reference="float")
    assert of_float.limit == pytest.approx(0.06 * 16 * plain.reference)
    policy = dict(plain.uniform(8)) | {"hidden": (4, 8)}
    path = tmp_path / "policy.json"
    Q.BitPolicy(policy).to_json(path)
    for given in (policy, str(path)):
        mine = problem_of(chip, budget=1.0, reference=given)
        assert mine.limit == pytest.approx(plain.policy_cost(Q.BitPolicy(policy)))
    without = problem_of(Chip((4, 8), (4, 4), stem=((8, 8),)), budget=1.0)
    assert without.reference_words.startswith("8 bits, 4/8 in depthwise, 4/8 in pointwise, 4/8 in hidden, others in 1 more")
    with pytest.raises(ValueError, match="the reference has layer 'stem' at 4/4, which chip can't do; it can do 4/8"):
        problem_of(chip, reference="4/4")
    with pytest.raises(ValueError, match="reference 'best' is no pair of widths such as w16a16"):
        problem_of(chip, reference="best")
    with pytest.raises(ValueError, match="the reference policy must name the workload's layers; 'other'"):
        problem_of(chip, reference=policy | {"other": (8, 8)})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"latency": 0.45, "bops": "10kbops"}, "budget 10kbops is out of reach: on edge, bops can be from"),
        ("latency=0.5,flops=1", "unknown metric 'flops'; known: latency, energy, storage, bops"),
        ("latency=0.5,latency=0.4", "limits latency twice"),
        ("latency=", "has an empty part"),
        ({}, "budget is empty"),
        ({"latency": None}, "budget of latency is 'None'"),
        ({"storage": "3ms"}, "budget '3ms' is not understood"),
        ({"latency": 0.45, "storage": "0.9kB"}, "budget 0.9kB is out of reach: on edge, storage can be from 1.064 kB"),
    ],
)
def test_wrong_budgets_are_named(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem_of(budget=budget)


class Torn(Chip):
    """What is fast is large: 8 bits take no time, and 4 bits take much."""

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        table = super().cost_table(workload, batch=batch)
        assert table.latency_s is not None
        latency = table.latency_s.copy()
        latency[:, 3, 7] *= 100
        return CostTable("chip", "estimated", workload, 1, latency, None, table.storage_bytes)


def test_budgets_that_conflict_are_named_with_what_each_could_be() -> None:
    torn = Torn((8, 8), (4, 8))
    assert problem_of(torn, budget={"latency": 1.0, "storage": 1.0}).several is not None
    with pytest.raises(OutOfReach) as caught:
        problem_of(torn, budget={"latency": 1.0, "storage": 0.8})
    message = str(caught.value)
    assert message.startswith(
        "budgets latency=1.0 and storage=0.8 can't be met together on chip: with storage within 1.706 kB, "
    )
    assert "latency is at least" in message
    assert "with latency within" in message
    assert "storage is at least 2.132 kB" in message
    three = {"latency": 1.0, "storage": 0.8, "bops": 1.0}
    with pytest.raises(OutOfReach, match="budgets latency=1.0 and storage=0.8 can't be met together"):
        problem_of(torn, budget=three)
