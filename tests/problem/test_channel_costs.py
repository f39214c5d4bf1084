"""Costs of policies that keep a part of the channels are those of the really smaller network, in every number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import haq
import hw_models
import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.channels import ChannelProblem
from hw_models.metrics import METRICS
from tests.problem.pruned import NETWORKS, drawn, images, network_of, problem_of, samples

TARGETS = ("edge", "bitfusion", "nvidia-a100", "bismo-overlay")


def smaller(problem: ChannelProblem, keep: Mapping[str, float]) -> torch.nn.Module:
    kept = {name: range(problem.channel_groups[name].count(share)) for name, share in keep.items()}
    return Q.remove_channels(problem.network, problem.channel_groups, kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_of_the_traced_smaller_network(name: str) -> None:
    problem = problem_of(name)
    assert problem.channel_decisions
    for seed in range(6):
        keep = drawn(problem, seed).keep
        traced = hw_models.trace(smaller(problem, keep), images(1))
        workload, _ = problem.shape_of(keep)
        assert workload == traced


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["residual", "separable"])
def test_tables_are_those_of_the_traced_smaller_network(name: str, target: str) -> None:
    problem = problem_of(name, target, budget=None, bits="8:8" if target == "nvidia-a100" else None, max_drop=0.5)
    for seed in range(3):
        policy = drawn(problem, seed)
        traced = hw_models.trace(smaller(problem, policy.keep), images(1))
        expected = problem.target.cost_table(traced)
        _, table = problem.shape_of(policy.keep)
        for metric in expected.metrics:
            np.testing.assert_array_equal(table.metric(metric), expected.metric(metric))
        for attribute in ("cycles", "bound"):
            np.testing.assert_array_equal(getattr(table, attribute), getattr(expected, attribute))
        for counter, array in expected.counters.items():
            np.testing.assert_array_equal(table.counters[counter], array)
        w, a = problem.bit_arrays(policy)
        assert problem.policy_cost(policy) == pytest.approx(float(expected.total(problem.metric, w, a)))


def test_every_metric_that_is_limited_is_that_of_the_smaller_network() -> None:
    metrics = [metric for metric in METRICS if metric != "energy"]
    problem = problem_of("residual", budget=dict.fromkeys(metrics, 1.0))
    policies = [drawn(problem, seed) for seed in range(8)]
    numbers = np.array([problem.numbers_of(policy.keep) for policy in policies])
    w, a = (np.array(bits) for bits in zip(*map(problem.bit_arrays, policies), strict=True))
    totals = problem.totals(numbers, w, a)
    assert totals.shape == (8, len(metrics))
    for policy, row in zip(policies, totals, strict=True):
        table = problem.target.cost_table(hw_models.trace(smaller(problem, policy.keep), images(1)))
        expected = {limit.metric: float(table.total(limit.metric, *problem.bit_arrays(policy))) for limit in problem.limits}
        assert problem.costs(policy) == pytest.approx(expected)
        assert list(row) == pytest.approx([expected[limit.metric] for limit in problem.limits])
    np.testing.assert_array_equal(problem.within(totals), [problem.holds(policy) for policy in policies])


def test_a_policy_that_keeps_all_channels_costs_what_it_does_without_pruning() -> None:
    network = network_of("residual")
    options: dict[str, Any] = {"budget": {"latency": 0.97, "peak_memory": 0.9}, "objective": "agreement", "pinned": {}}
    plain = haq.Problem(network, images(24), samples(), "bitfusion", **options)
    problem = problem_of(network, "bitfusion", **options)
    for seed in range(3):
        policy = drawn(problem, seed).with_keep(None)
        assert problem.costs(policy) == plain.costs(policy)
        w, a = problem.bit_arrays(policy)
        [found] = problem.totals(problem.numbers_of({})[None], w[None], a[None])
        assert list(found) == pytest.approx(list(plain.costs(policy).values()), rel=1e-12)
    assert problem.reference == plain.reference


class Counting:
    """A target of somebody's that counts how often it is asked, and prices layers by their weights."""

    name, description, provenance = "counting", "weights", "estimated"

    def __init__(self, beside: bool = False, most: int = 0) -> None:
        self.asked, self.beside, self.most = 0, beside, most

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        self.asked += 1
        few = [layer.name for layer in workload.layers if layer.out_channels < self.most]
        if few:
            raise ValueError(f"nobody has measured {few[0]!r}")
        bits = np.arange(1, 9)
        macs = np.array([layer.macs for layer in workload.layers], float)
        if self.beside:
            macs += macs.sum()
        latency = macs[:, None, None] * bits[:, None] * bits * 1e-12
        return hw_models.CostTable(self.name, self.provenance, workload, 1, latency, None, latency)


def test_layers_are_priced_when_they_are_asked_for_and_once() -> None:
    target = Counting()
    problem = problem_of("residual", target)
    policies = [drawn(problem, seed) for seed in range(20)]
    costs = [problem.policy_cost(policy) for policy in policies]
    asked = target.asked
    assert [problem.policy_cost(policy) for policy in policies] == costs
    assert target.asked == asked


def test_a_target_that_prices_layers_by_their_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="'counting' prices layer 'stem.0' by what stands beside it"):
        problem_of("residual", Counting(beside=True))


def test_a_target_that_knows_no_smaller_layer_is_refused() -> None:
    class Known(Counting):
        def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
            if workload.layers[1].out_channels < 16:
                raise ValueError("nobody has measured so few")
            return super().cost_table(workload, batch=batch)

    with pytest.raises(ValueError, match="counting can't price layer .* with fewer channels: .*nobody has measured so few"):
        problem_of("residual", Known())


def test_a_table_by_the_names_of_layers_is_refused(tmp_path: Any) -> None:
    network = network_of("residual")
    rows = ["layer,w_bits,a_bits,latency_ms"]
    rows += [f"{name},8,8,1\n{name},4,4,0.5" for name in hw_models.trace(network, images(1)).names]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="tells costs by the names of layers, and so none of layers with fewer channels"):
        problem_of(network, f"lut:{tmp_path / 'table.csv'}", bits="4:8")


def test_a_budget_below_what_pruning_can_reach_says_what_it_can() -> None:
    problem = problem_of("residual", budget=0.5)
    least = problem.smallest / problem.reference
    plain = haq.Problem(network_of("residual"), images(24), samples(), "edge", objective="agreement", pinned={})
    assert least < plain.smallest / plain.reference
    assert problem_of("residual", budget=1.01 * least).limit == pytest.approx(1.01 * problem.smallest)
    with pytest.raises(OutOfReach, match="budget .* is out of reach: .*the least is that of 0.25 of the channels"):
        problem_of("residual", budget=0.9 * least)


def test_the_problem_at_chosen_channels_is_one_of_widths_alone() -> None:
    problem = problem_of("residual", budget={"latency": 0.4, "peak_memory": 0.8})
    keep = problem.keep_of([2] * len(problem.channel_decisions))
    at = problem.at(keep)
    assert at.channel_decisions == ()
    assert [len(decision.layers) for decision in at.decisions] == [len(decision.layers) for decision in problem.decisions]
    chosen = [0] * len(at.decisions)
    policy = at.decide(decision.pairs[0] for decision in at.decisions)
    assert policy.keep == keep
    assert sum(decision.prices[0] for decision in at.decisions) == pytest.approx(problem.policy_cost(policy))
    assert at.costs(policy) == problem.costs(policy)
    assert at.fits(chosen) == problem.holds(policy)
    assert at.evaluate(policy) == problem.evaluate(policy)
    for one, other in zip(at.decisions, problem.decisions, strict=True):
        assert {tuple(pair) for pair in one.pairs.tolist()} <= {tuple(pair) for pair in other.pairs.tolist()}


def test_another_target_and_another_limit() -> None:
    problem = problem_of("residual", budget=0.5)
    other = problem.on("bitfusion", 0.97)
    assert isinstance(other, ChannelProblem)
    policy = drawn(problem, 0)
    expected = other.target.cost_table(hw_models.trace(smaller(problem, policy.keep), images(1)))
    assert other.policy_cost(policy) == pytest.approx(float(expected.total("latency", *other.bit_arrays(policy))))
    limited = problem.limited_to(problem.smallest * 1.1)
    assert limited.limit == pytest.approx(problem.smallest * 1.1)
    assert limited.policy_cost(policy) == problem.policy_cost(policy)
