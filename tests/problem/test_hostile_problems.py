"""What nobody should give a problem is told in a sentence that names it, and nothing is computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import haq
import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.goal import read_exponents, read_goal
from haq.problem.objective import Objective, find_objective
from tests.problem.test_budgets import Chip, problem_of


def mean_square(outputs: Any, targets: Any) -> Any:
    """Return the mean square of outputs."""
    return (outputs**2).mean(1)


def of_mean_square() -> Objective:
    return haq.objective(mean_square, higher_is_better=False)


@pytest.mark.parametrize("budget", [{"peak_memory": 1.0}, "peak_memory=1.0"])
def test_nothing_is_traded_against_what_is_no_sum(budget: Any) -> None:
    with pytest.raises(ValueError, match="a trade-off is with a cost that is a sum over layers, which peak_memory isn't"):
        problem_of(budget=budget, tradeoff="soft")
    with pytest.raises(ValueError, match="which peak_memory isn't"):
        problem_of(metric="peak_memory", budget=1.0, tradeoff="soft")


@pytest.mark.parametrize("budget", [0, "0us", 1e-9, 1e300, "1e300s"])
def test_a_trade_off_is_with_a_budget_near_what_policies_cost(budget: Any) -> None:
    with pytest.raises(OutOfReach, match="is too far to trade against: on edge, latency can be from 4.905 us"):
        problem_of(budget=budget, tradeoff="soft")
    assert problem_of(budget=20, tradeoff="soft").tradeoff_target > 0


@pytest.mark.parametrize("exponents", [(-1e300, -1), (0, -11), "-1e9,-1", (float("-inf"), 0)])
def test_exponents_that_overflow_are_no_trade_off(exponents: Any) -> None:
    with pytest.raises(ValueError, match="two exponents from -10 to 0"):
        read_exponents(exponents)


def test_a_percentage_is_of_a_share() -> None:
    with pytest.raises(ValueError, match="at_least is '50%'; mean_square is no share: give a value of it"):
        read_goal(of_mean_square(), None, "50%", None)
    assert read_goal(of_mean_square(), None, "0.5", None).at_least == 0.5
    assert read_goal(find_objective("accuracy"), None, "50%", None).at_least == 0.5


@pytest.mark.parametrize("pair", [None, 8, "8/8", True])
def test_a_policy_of_what_are_no_pairs(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"layer 'stem' needs \(weight bits, activation bits\), not"):
        Q.BitPolicy({"stem": pair})
    with pytest.raises(ValueError, match="layer 'stem' needs"):
        problem_of(reference=dict.fromkeys(("stem", "depthwise", "pointwise", "hidden", "classifier"), pair))


def test_names_of_any_type_are_no_layers() -> None:
    with pytest.raises(ValueError, match="pinned layer 1 is not in the workload"):
        problem_of(pinned={1: (8, 8), "other": (8, 8)})
    with pytest.raises(ValueError, match="the reference policy must name the workload's layers; 1 is in one of the two only"):
        problem_of(reference={1: (8, 8), "other": (8, 8)})


@pytest.mark.parametrize("tied", [None, 5, "stem", ["stem", "hidden"], [["stem"], 5], [["stem", ["hidden"]]]])
def test_groups_are_lists_of_lists_of_names(tied: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="tied"):
        problem_of(tied=tied)


def test_a_reference_is_a_path_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    Q.BitPolicy(problem_of().uniform(4)).to_json(path)
    problem = problem_of(budget=1.0, reference=path)
    assert problem.limit == problem_of(budget=1.0, reference="w4a4").limit
    problem_of(budget=1.0, reference={**problem.reference_policy})


@pytest.mark.parametrize("target", [None, 5, object(), Chip])
def test_another_target_must_be_one(target: Any) -> None:
    with pytest.raises(TypeError, match="it must be a name, such as 'edge', or a hardware target"):
        problem_of().on(target, 0.5)


def test_a_policy_without_a_layer_is_named() -> None:
    problem = problem_of()
    for ask in (problem.policy_cost, problem.costs, problem.holds, problem.means_something, problem.bit_arrays):
        with pytest.raises(ValueError, match="the policy has no layer 'depthwise'"):
            ask({"stem": (8, 8)})


def test_the_range_of_a_single_policy_is_no_riddle() -> None:
    """Bounds are rounded inwards, and must not pass each other."""
    pinned = dict.fromkeys(("stem", "depthwise", "pointwise", "hidden", "classifier"), (7, 7))
    with pytest.raises(OutOfReach, match=r"latency can be from (\S+ us) \(\S+ of uniform 7/7\) to \1"):
        problem_of(pinned=pinned, reference="w7a7", budget=0.2)


@pytest.mark.parametrize("batch", [10**6, 10**30])
def test_a_batch_is_one_that_can_be(batch: int) -> None:
    with pytest.raises(ValueError, match="batch must be at most 65,536 images, not 10"):
        problem_of(batch=batch, budget={"peak_memory": 1.0})
    assert problem_of(batch=65536, budget={"peak_memory": 1.0}).limits[1].amount == 65536 * 1280


def test_an_average_is_no_fraction() -> None:
    with pytest.raises(OutOfReach, match="budget 4 is out of reach: .*; a number without a unit is a fraction"):
        problem_of(budget={"average_weight_bits": 4})
    assert problem_of(budget={"average_weight_bits": "4 bits"}).limit == 4
