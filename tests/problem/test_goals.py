"""What is looked for: the cheapest policy that is good enough, MnasNet's trade-off, and how certain a drop is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import haq
from haq.problem.evaluator import Evaluation
from haq.problem.goal import Goal, read_exponents, read_goal
from haq.problem.objective import find_objective
from haq.problem.paired import paired_error
from haq.solvers.base import Session, Trial, solve
from haq.store.records import ReachedRecord
from haq.study.config import SearchConfig
from haq.study.result import entry, goal_entries
from haq.study.tables import goal_sentence
from haq.study.task import SearchTask
from tests.commands.test_search_command import MODULE
from tests.conftest import enter, images, small_network

ACCURACY = find_objective("accuracy")


@pytest.mark.parametrize(
    ("kind", "latency", "reward"),
    [
        ("soft", 40, 1.04498),
        ("soft", 75, 1.0),
        ("soft", 80, 0.99550),
        ("soft", 150, 0.95264),
        ("hard", 40, 1.0),
        ("hard", 80, 0.9375),
        ("hard", 150, 0.5),
    ],
)
def test_the_reward_of_mnasnet(kind: str, latency: float, reward: float) -> None:
    """Tan et al., CVPR 2019, equation 2, with T = 75 ms."""
    goal = read_goal(ACCURACY, None, None, kind)
    assert goal.worth(1.0, latency, 75) == pytest.approx(reward, abs=1e-5)
    assert goal.worth(0.5, latency, 75) == pytest.approx(reward / 2, abs=1e-5)


def test_exponents_of_ones_own() -> None:
    assert read_exponents("-0.07,-1") == read_exponents((-0.07, -1)) == (-0.07, -1.0)
    for wrong in ("firm", "1,2", "-1", (0.1, 0.1), True):
        with pytest.raises(ValueError, match="tradeoff is .*; it must be soft, hard, or two exponents"):
            read_exponents(wrong)


def trial(goal: Goal, cost: float, value: float, loss: float = 1.0, **fields: Any) -> Trial:
    policy: Any = {}
    return Trial(policy, Evaluation(value, loss, 10), cost, fields.pop("feasible", True), goal=goal.kind, **fields)


def test_ranks_follow_the_goal() -> None:
    cheap, good = (5.0, 0.8), (9.0, 0.9)
    by_goal = {
        Goal(): good,
        Goal("cheapest", max_drop=0.2): cheap,
    }
    for goal, first in by_goal.items():
        assert min((trial(goal, *one) for one in (cheap, good)), key=lambda one: one.rank).cost == first[0]
    goal = read_goal(ACCURACY, None, None, "soft")
    worths = [goal.worth(value, cost, 5.0) for cost, value in (cheap, good)]
    trials = [trial(goal, *one, worth=worth) for one, worth in zip((cheap, good), worths, strict=True)]
    assert min(trials, key=lambda one: one.rank).worth == max(worths)
    # Among equals the better value, then the smaller loss.
    goal = Goal("cheapest", max_drop=0.2)
    assert trial(goal, 5, 0.9).rank < trial(goal, 5, 0.8).rank < trial(goal, 5, 0.8, 2.0).rank


def test_trials_say_why_they_may_not_be_chosen() -> None:
    goal = Goal("cheapest", max_drop=0.2)
    words = {
        "good enough": {"within": True},
        "not good enough": {"within": True, "feasible": False},
        "over the budget": {"within": False, "feasible": False},
    }
    for word, fields in words.items():
        assert repr(trial(goal, 5, 0.9, **fields)).endswith(f", {word})")


def problem_with(**options: Any) -> haq.Problem:
    network = small_network()
    inputs = images(96)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    return haq.Problem(network, images(32, 1), (inputs, labels), "edge", correction=None, **options)


def test_feasible_is_good_enough_and_within_all_budgets() -> None:
    problem = problem_with(max_drop=5, budget={"latency": 0.9, "storage": 0.9})
    for bits in (2, 8):
        policy = problem.uniform(bits, keep_pinned=True)
        made = Trial.of(problem, policy, problem.evaluate(policy))
        assert made.within == problem.holds(policy)
        assert made.feasible == (made.within and made.value >= 0.95 - 1e-9)
        assert not made.feasible
    assert made.within is False


def test_a_drop_is_found_in_python() -> None:
    problem = problem_with(max_drop=5)
    result = haq.solve(problem, "ilp", evaluations=40)
    assert result.trial.value >= 0.95 - 1e-9
    feasible = [one for one in result.trials if one.feasible]
    assert result.trial.cost == min(one.cost for one in feasible) < problem.reference


def test_a_trade_off_is_no_wall_and_other_budgets_are() -> None:
    problem = problem_with(tradeoff="soft", budget={"latency": 0.5, "storage": 0.7})
    session = Session(problem, 30)
    found = solve("random", session, 0)
    assert problem.costs(found.policy)["storage"] <= problem.limits[1].amount * (1 + 1e-9)
    assert problem.tradeoff_target == pytest.approx(0.5 * problem.reference)
    assert any(one.cost > problem.tradeoff_target for one in session.trials)
    assert found.worth == max(one.worth for one in session.trials if one.feasible)


def test_a_trade_off_takes_positive_values_that_are_better_when_higher() -> None:
    goal = read_goal(ACCURACY, None, None, "soft")
    goal.check(ACCURACY, 0.9)
    lower = find_objective("accuracy")
    lower.higher_is_better = False
    for objective, value in ((ACCURACY, 0.0), (lower, 0.9)):
        with pytest.raises(
            ValueError, match="a trade-off multiplies the objective's value, which must be positive and better"
        ):
            goal.check(objective, value)


@pytest.fixture
def task(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> SearchTask:
    enter(tmp_path, monkeypatch, MODULE)
    return SearchTask.build(SearchConfig(network="small_job:network", data="small_job:splits", max_drop=10.0, bits="1:8"))


def test_errors_of_drops_are_of_differences_by_sample(task: SearchTask) -> None:
    problem, split = task.problem, task.dataset.test
    policy = problem.uniform(1, keep_pinned=True)
    module = problem.evaluator.prepared(policy)
    right = []
    inputs, labels = split.take(torch.arange(len(split)))
    for one in (task.network.module, module):
        with torch.inference_mode():
            right.append((one(task.network.preprocess(inputs)).argmax(1) == labels).double())
    differences = right[0] - right[1]
    found = paired_error(problem.objective, task.network, split, module)
    assert found == pytest.approx(float(differences.std() / len(split) ** 0.5), rel=1e-9)
    assert float(differences.mean()) == pytest.approx(
        entry(task, None)["test_accuracy"] - entry(task, policy)["test_accuracy"]  # type: ignore[operator]
    )
    # That of two independent values is larger.
    assert 0 < found < float(torch.stack([one.var() / len(split) for one in right]).sum().sqrt())
    assert paired_error(problem.objective, task.network, split, task.network.module) == 0


def test_the_result_says_both_drops_with_their_errors(task: SearchTask) -> None:
    policy = task.problem.uniform(1, keep_pinned=True)
    result = {**goal_entries(task, policy), "found": entry(task, policy), "float": entry(task, None)}
    reached = ReachedRecord.from_dict(result["reached"], "a test")
    assert reached.paired
    assert reached.search_error is not None
    assert reached.test_error is not None
    sentence = goal_sentence(result)
    assert f"± {100 * reached.search_error:.2f} points below float, on the search split" in sentence
    assert f"± {100 * reached.test_error:.2f} points below float, on the test split" in sentence


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.92, 0.001, "holds"),
        (0.902, 0.01, "holds, but within its standard error"),
        (0.898, 0.01, "MISSED by less than its standard error"),
        (0.88, 0.01, "MISSED"),
        (0.898, None, "MISSED"),
    ],
)
def test_how_certain_it_is(value: float, error: float | None, words: str) -> None:
    told = {"least": 0.9, "test_least": 0.9, "search": value, "test": value}
    holds = value >= 0.9
    record = ReachedRecord.from_dict(
        {"objective": "accuracy", **told, "search_holds": holds, "test_holds": holds, "test_error": error}, "a test"
    )
    assert record.certainty("test", value) == words
