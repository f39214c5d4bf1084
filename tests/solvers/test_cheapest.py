"""The cheapest policy that is good enough, and trade-offs: every solver finds some, and those that can the best there is."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import haq
from haq.problem.evaluator import Evaluation
from haq.problem.goal import read_goal
from haq.solvers import SOLVERS
from haq.solvers.base import Session, Trial, solve
from haq.solvers.cheapest import Luck, Surrogate, cheapest_within, undominated
from haq.store.units import percent
from tests.conftest import make_problem, small_network
from tests.solvers.chips import FEW, base_problem, check, costs_of, every, policy_of

SEARCHING = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("td3", "sac") else []) for name in SOLVERS if name != "exhaustive"
]
DROPS = (1.5, 4.0, 8.0)  # points


@functools.cache
def chip_problem(metrics: tuple[str, ...] = ("latency",)) -> haq.Problem:
    """Six layers on a chip of three pairs, judged by a formula; what is fast takes more memory."""
    problem = copy.copy(base_problem(FEW, ((4, 4),), metrics))
    problem.float_result = problem.evaluate(problem.uniform(8))
    return problem


def looking_for(problem: haq.Problem, **goal: Any) -> haq.Problem:
    """The same problem with another goal; without a budget of the main metric."""
    made = copy.copy(problem)
    given = {"max_drop": None, "at_least": None, "tradeoff": None} | goal
    made.goal = read_goal(made.objective, **given)
    made.limit = made.limits[0].largest
    return made


def truth(problem: haq.Problem) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Every choice of options, what it costs, and its value."""
    choices = every(problem)
    values = np.array([problem.evaluate(policy_of(problem, one)).value for one in choices])
    return choices, costs_of(problem, choices)[:, 0], values


def cheapest_of(problem: haq.Problem) -> float:
    choices, costs, values = truth(problem)
    good = values >= problem.goal.threshold(problem.objective, problem.float_accuracy) - 1e-9
    within = (costs_of(problem, choices) <= [limit.amount * (1 + 1e-9) for limit in problem.limits]).all(1)
    return float(costs[good & within].min())


def found_by(name: str, problem: haq.Problem, evaluations: int = 60, **options: Any) -> tuple[Trial, list[Trial], Session]:
    tried: list[Trial] = []
    session = Session(problem, evaluations, tried.append, **options)
    return solve(name, session, 0), tried, session


@pytest.mark.parametrize("name", SEARCHING)
def test_every_solver_finds_a_policy_that_is_good_enough(name: str) -> None:
    problem = looking_for(chip_problem(), max_drop=2.0)
    found, tried, session = found_by(name, problem, 30)
    assert found.feasible
    assert problem.meets(found.evaluation)
    check(problem, found.policy)
    assert found.cost == min(trial.cost for trial in tried if trial.feasible)
    assert len(tried) == session.used <= 30
    assert len({trial.policy for trial in tried}) == len(tried)
    assert found.cost <= 1.25 * cheapest_of(problem)


@pytest.mark.parametrize("name", ["ilp", "greedy"])
@pytest.mark.parametrize("drop", DROPS)
def test_what_refinement_finds_is_within_two_percent_of_the_truth(name: str, drop: float) -> None:
    problem = looking_for(chip_problem(), max_drop=drop)
    assert found_by(name, problem)[0].cost <= 1.02 * cheapest_of(problem)


@pytest.mark.parametrize("drop", DROPS)
def test_exhaustive_search_ends_at_the_cheapest(drop: float) -> None:
    problem = looking_for(chip_problem(), max_drop=drop)
    found, tried, session = found_by("exhaustive", problem, 300)
    assert found.cost == pytest.approx(cheapest_of(problem), rel=1e-12)
    assert session.used < len(every(problem))
    assert [trial.cost for trial in tried] == sorted(trial.cost for trial in tried)


@pytest.mark.parametrize("name", ["exhaustive", "ilp", "evolution"])
def test_budgets_and_the_drop_hold_together(name: str) -> None:
    problem = looking_for(chip_problem(("latency", "storage")), max_drop=8.0)
    free = found_by("exhaustive", problem, 300)[0]
    problem = looking_for(problem.on(problem.target, {"latency": 1.0, "storage": 0.55}), max_drop=8.0)
    assert problem.costs(free.policy)["storage"] > problem.limits[1].amount
    found, tried, _ = found_by(name, problem, 300 if name == "exhaustive" else 60)
    check(problem, found.policy)
    assert problem.meets(found.evaluation)
    assert found.cost >= free.cost
    assert any(trial.within is False for trial in tried) or name != "ilp"
    if name != "evolution":
        assert found.cost <= 1.02 * cheapest_of(problem)


def test_a_value_may_be_asked_for_instead() -> None:
    problem = looking_for(chip_problem(), at_least="40%")
    found = found_by("exhaustive", problem, 300)[0]
    assert found.value >= 0.4
    assert found.cost == pytest.approx(cheapest_of(problem), rel=1e-12)


@pytest.mark.parametrize("name", ["ilp", "random"])
def test_where_nothing_is_good_enough_the_best_is_named_with_its_drop(name: str) -> None:
    problem = looking_for(chip_problem(), at_least=0.9)
    with pytest.raises(
        ValueError, match=r"no policy that is good enough: of \d+ evaluated the best within the budgets has "
    ) as told:
        found_by(name, problem, 50)
    assert f"as good as the float network's {percent(problem.float_accuracy)}, and asked was the cheapest" in str(told.value)


@pytest.mark.parametrize("name", ["ilp", "ddpg", "evolution"])
def test_the_same_again_and_from_what_was_evaluated(name: str) -> None:
    """A search that is resumed asks for the same, with its history at hand."""
    tried = []
    cache: dict[Any, Evaluation] = {}
    for _ in range(2):
        problem = make_problem(small_network())
        problem.evaluator.cache.update(cache)
        problem = looking_for(problem, max_drop=5.0)
        tried.append(found_by(name, problem, 24)[1])
        cache = dict(problem.evaluator.cache)
    assert tried[0] == tried[1]


def test_sensitivities_are_measured_once_and_shared_by_all_stages() -> None:
    problem = looking_for(chip_problem(), max_drop=2.0)
    told: list[Any] = []
    session = found_by("ilp", problem, on_sensitivities=told.append)[2]
    assert told == [session.sensitivities]
    known = found_by("greedy", problem, 30, sensitivities=session.sensitivities)[2]
    assert known.used <= 30
    assert known.sensitivities is session.sensitivities


def test_policies_are_chosen_ahead() -> None:
    problem = looking_for(chip_problem(), max_drop=2.0)
    one, several = (found_by("ilp", problem, 60, ahead=ahead)[0] for ahead in (1, 4))
    assert one.feasible
    assert several.feasible


def test_where_lower_is_better() -> None:
    problem = looking_for(chip_problem())
    problem.objective = copy.copy(problem.objective)
    problem.objective.unit = "dB"
    problem.objective.higher_is_better = False
    judge = problem.evaluate

    def evaluate(policy: Any) -> Evaluation:
        found = judge(policy)
        return Evaluation(found.loss, found.loss, 8, higher_is_better=False)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    problem.float_result = problem.evaluate(problem.uniform(8))
    problem = looking_for(problem, max_drop=0.3)
    choices, costs, values = truth(problem)
    found = found_by("ilp", problem)[0]
    least = problem.float_result.value + 0.3
    assert found.value <= least + 1e-9
    assert found.cost <= 1.02 * costs[values <= least].min()
    assert len(choices) == 243


@pytest.mark.parametrize("kind", ["soft", "hard", (-0.5, -0.7)])
@pytest.mark.parametrize("name", ["exhaustive", "ilp", "random"])
def test_trade_offs(name: str, kind: Any) -> None:
    problem = looking_for(chip_problem(), tradeoff=kind)
    problem.tradeoff_target = 0.6 * problem.reference
    _, costs, values = truth(problem)
    worths = [problem.goal.worth(value, cost, problem.tradeoff_target) for value, cost in zip(values, costs, strict=True)]
    found, tried, session = found_by(name, problem, 300 if name == "exhaustive" else 60)
    assert found.worth == pytest.approx(max(trial.worth for trial in tried))
    assert session.used <= 300
    least = {"exhaustive": 1.0, "ilp": 0.999}.get(name, 0.97)
    assert found.worth >= least * max(worths) * (1 - 1e-12)


def test_the_least_within_other_budgets() -> None:
    problem = chip_problem(("latency", "storage"))
    tight = problem.on(problem.target, {"latency": 1.0, "storage": 1.1})
    choices = every(tight)
    costs = costs_of(tight, choices)
    within = costs[:, 1] <= tight.limits[1].amount * (1 + 1e-9)
    assert cheapest_within(tight) == pytest.approx(costs[within, 0].min())


def test_options_beside_which_none_is_as_cheap_and_loses_less() -> None:
    prices = np.array([1.0, 2.0, 2.0, 3.0, 4.0])
    losses = np.array([5.0, 4.0, 3.0, 3.5, 1.0])
    assert undominated(prices, losses).tolist() == [0, 2, 4]


def test_the_surrogate_knows_what_it_saw_and_is_unsure_of_the_rest() -> None:
    random = np.random.default_rng(0)
    widths = random.integers(2, 9, (40, 12))
    predicted = random.uniform(0.01, 0.1, 40)
    losses = 0.2 + predicted + random.normal(0, 0.002, 40)
    drops = 30 * (losses - 0.2) + random.normal(0, 0.2, 40)
    surrogate = Surrogate(widths, predicted, losses, drops, 0.05)
    assert surrogate.of_loss.line == pytest.approx([0.2, 1.0], rel=0.1)
    assert surrogate.of_drop.line[1] == pytest.approx(30, rel=0.2)
    seen, unsure = surrogate.predict(widths[:1], predicted[:1])
    far, more_unsure = surrogate.predict(np.full((1, 12), 20), predicted[:1])
    assert unsure[0] < more_unsure[0] == pytest.approx(surrogate.deviation, rel=1e-3)
    assert abs(seen[0] - drops[0]) < abs(far[0] - drops[0])
    assert far[0] == pytest.approx(surrogate.trend(predicted[:1])[0], abs=0.05)


def test_luck_is_told_apart_by_the_widths_that_have_it() -> None:
    random = np.random.default_rng(0)
    widths = random.integers(2, 9, (200, 4))
    line_of = random.uniform(0, 1, 200)
    values = line_of + 0.5 * (widths[:, 2] == 3)
    luck = Luck(widths, line_of, values, np.ones(200), 0.9)
    found = luck.by_width(range(2, 9))
    assert found.shape == (4, 7)
    assert np.unravel_index(found.argmax(), found.shape) == (2, 1)
    assert found[2, 1] - found[2].min() > 0.3
