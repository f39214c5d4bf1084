"""Pairs of bits that a target can't do are in no policy that is found, and no budget is measured by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import haq
import hw_models
from haq.study.result import costs, uniform_policies
from tests.conftest import images

STEM, DEPTHWISE, POINTWISE, HIDDEN, CLASSIFIER = range(5)


class Mine:
    """Milliseconds by the product of the bits; `value` where a layer can't be done at 8/8, or at other pairs."""

    name = "mine"
    description = "a target with holes"
    provenance = "measured"

    def __init__(self, value: float, *cells: tuple[object, ...]) -> None:
        self.value = value
        self.cells = cells

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        latency = np.ones((len(workload), 8, 8)) * np.arange(1, 9)[:, None] * np.arange(1, 9) * 1e-3
        for cell in self.cells:
            latency[cell] = self.value
        return hw_models.CostTable("mine", "measured", workload, 1, latency, None, hw_models.storage_bytes(workload))


def problem_on(network: nn.Module, target: Mine, **options: object) -> haq.Problem:
    inputs = images(32)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    return haq.Problem(network, calibrate=inputs, search=(inputs, labels), target=target, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_fraction_is_of_the_widest_pair_where_8_bits_can_not_be_done(network: nn.Module, value: float) -> None:
    target = Mine(value, (POINTWISE, 7, 7), (HIDDEN, 7, 7))
    problem = problem_on(network, target)
    assert problem.reference == pytest.approx(3 * 64e-3 + 2 * 56e-3)
    assert problem.limit == pytest.approx(problem.reference / 2)
    assert problem.reference_policy["pointwise"] == (8, 7)
    assert np.isfinite(problem.cost).all()
    assert not any((7, 7) in (d.pairs - 1).tolist() for d in problem.decisions if POINTWISE in d.layers or HIDDEN in d.layers)
    assert "of 8 bits, 8/7 in pointwise, 8/7 in hidden, where 8/8 can't be done" in repr(problem)


def test_what_can_be_reached_is_a_fraction_of_that(network: nn.Module) -> None:
    target = Mine(math.nan, (POINTWISE, 7, 7))
    problem = problem_on(network, target, budget="280ms", bits=(4, 8))
    reference = "of 8 bits, 8/7 in pointwise, where 8/8 can't be done"
    assert (
        problem.reach == f"on mine, latency can be from 176 ms (0.565 {reference}) to 312 ms (1.0); bits 1:8 would reach 0.420"
    )
    for budget in ("176ms", "312ms"):
        assert problem.on(target, budget).limit > 0
    with pytest.raises(ValueError, match="^budget 3s is out of reach: on mine, latency can be from 176 ms .* to 312 ms"):
        problem.on(target, "3s")


@pytest.mark.parametrize("solver", ["random", "greedy", "ilp", "evolution", "ddpg"])
def test_no_solver_returns_a_pair_that_can_not_be_done(network: nn.Module, solver: str) -> None:
    """Under a budget that everything would fit, were it not for the holes."""
    problem = problem_on(network, Mine(math.nan, (POINTWISE, 7, 7), (HIDDEN, 7, slice(5, 8))), budget="303ms")
    result = haq.solve(problem, solver, evaluations=24, seed=0)
    w, a = problem.bit_arrays(result.policy)
    assert problem.table.supported[range(5), w - 1, a - 1].all()
    assert problem.within_budget(problem.policy_cost(result.policy))
    assert (w[HIDDEN], a[HIDDEN]) != (8, 8)
    assert all(trial.cost < math.inf for trial in result.history if trial.feasible)


def test_what_can_not_be_done_can_be_evaluated_but_not_priced(network: nn.Module) -> None:
    problem = problem_on(network, Mine(1e30, (POINTWISE, 7, 7)), budget="290ms")
    eights = problem.uniform(8)
    assert problem.evaluate(eights).accuracy > 0.9
    assert problem.policy_cost(eights) == math.inf
    assert not problem.within_budget(math.inf)
    assert not problem.means_something(eights)
    assert 8 not in uniform_policies(problem)
    assert costs(problem, eights) == {"latency_s": None, "energy_j": None, "storage_bytes": None}
    with pytest.raises(ValueError, match="mine can't do layer 'pointwise' at w8/a8"):
        problem.table.price(*problem.bit_arrays(eights))


def test_what_must_be_chosen_and_can_not_be_done_is_named(network: nn.Module) -> None:
    without = Mine(math.inf, (STEM, 7, 7))
    with pytest.raises(ValueError, match=r"layer 'stem' is fixed at 8/8 \(weights/activations\), which mine can't do"):
        problem_on(network, without, budget="200ms", pinned={"stem": (8, 8)})
    # Where nobody says it, the first layer is fixed at the nearest pair.
    assert problem_on(network, without, budget="200ms").pinned["stem"] == (8, 7)
    free = problem_on(network, Mine(math.inf, (STEM, 7, 7)), budget="200ms", pinned={"stem": (4, 8)})
    assert free.decisions[0].pairs.tolist() == [[4, 8]]
    holes = Mine(math.inf, (HIDDEN, slice(1, 8)))
    with pytest.raises(ValueError, match="'hidden' has no pair of bits within 2 to 8 that its scheme has and mine can do"):
        problem_on(network, holes, budget="200ms")
    with pytest.raises(ValueError, match="is not a positive number for 'hidden', whatever the pair of widths"):
        problem_on(network, Mine(math.inf, (HIDDEN,)), budget="200ms")


def test_layers_with_one_weight_have_one_width_where_bytes_are_the_metric() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)), nn.Flatten(), nn.Linear(64, 4)).eval()
    network[2].weight = network[1].weight
    inputs = images(16)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()

    def made(metric: str) -> haq.Problem:
        return haq.Problem(network, inputs, (inputs, labels), "edge", metric=metric, budget=1.0)

    assert made("latency").groups == [(0,), (1,), (2,), (3,), (4,)]
    problem = made("storage")
    assert problem.groups == [(0,), (1, 2), (3,), (4,)]
    for policy in (problem.uniform(8), problem.uniform(3, keep_pinned=True)):
        stored = problem.table.price(*problem.bit_arrays(policy)).storage_bytes
        assert problem.policy_cost(policy) == stored
