"""What a search returns can't be told from the best on the search samples, and is more likely to be as good on others."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import haq
import quantizers as Q
from haq.problem.evaluator import Evaluation, Kept
from haq.problem.goal import CHEAPEST, Goal
from haq.problem.objective import ValueObjective, find_objective
from haq.problem.paired import APART, error_of_difference, estimated_error
from haq.solvers import choice
from haq.solvers.base import Session, Trial
from haq.store.records import ChoiceRecord
from haq.study.result import choice_entry
from tests.conftest import images, make_problem, small_network

ERROR = 0.01


def trial(number: int, value: float, loss: float, divergence: float | None, **more: Any) -> Trial:
    """A trial of policy `number`, within the budget."""
    policy = Q.BitPolicy({"layer": (1 + number // 8, 1 + number % 8)})
    higher = more.pop("higher_is_better", True)
    made = Trial(policy, Evaluation(value, loss, 100, divergence, higher), more.pop("cost", 1.0), True)
    return replace(made, **more)


def chosen(trials: list[Trial], error: float | None = ERROR, goal: Goal | None = None) -> haq.solvers.base.Choice:
    """What is chosen of trials whose differences have one standard error."""
    problem: Any = SimpleNamespace(
        objective=find_objective("accuracy"),
        goal=goal or Goal(),
        tradeoff_target=1.0,
        paired_error=lambda policy, other: error,
    )
    session = Session(problem, len(trials), trials=trials)
    session.best = min((one for one in trials if one.whole and one.feasible), key=lambda one: one.rank)
    return choice.choose(session)


BEST = trial(1, 0.90, 0.40, 0.20)


def test_of_what_cannot_be_told_apart_the_best_rank_is_returned() -> None:
    closer = trial(2, 0.895, 0.35, 0.10)
    found = chosen([BEST, closer, trial(3, 0.893, 0.39, 0.19)])
    assert found.trial is closer
    assert found.best is BEST
    assert found.compared == 3
    assert found.below == pytest.approx(0.005)
    assert found.error == ERROR


def test_nothing_beyond_one_standard_error_is_returned() -> None:
    assert chosen([BEST, trial(2, 0.88, 0.1, 0.01)]).trial is BEST
    assert chosen([BEST, trial(2, 0.895, 0.1, 0.01)], error=0.004).trial is BEST


def test_a_smaller_divergence_alone_does_not_outweigh_value_and_loss() -> None:
    assert chosen([BEST, trial(2, 0.895, 0.45, 0.10)]).trial is BEST


def test_without_a_standard_error_the_best_is_returned() -> None:
    found = chosen([BEST, trial(2, 0.90, 0.41, 0.01)], error=None)
    assert found.trial is BEST
    assert found.compared == 1


@pytest.mark.parametrize("more", [{"whole": False}, {"feasible": False}])
def test_trials_that_were_cut_short_or_exceed_the_budget_are_never_returned(more: dict[str, bool]) -> None:
    assert chosen([BEST, trial(2, 0.895, 0.1, 0.01, **more)]).trial is BEST


def test_networks_whose_outputs_are_not_finite_are_never_returned() -> None:
    assert chosen([BEST, trial(2, 0.899, math.inf, math.inf)]).trial is BEST
    assert chosen([BEST]).trial is BEST


def test_lower_values_can_be_better() -> None:
    best = trial(1, 3.0, 3.0, 0.2, higher_is_better=False)
    closer = trial(2, 3.005, 2.9, 0.1, higher_is_better=False)
    assert chosen([closer, best]).trial is closer
    assert chosen([best, trial(2, 2.5, 2.9, 0.1, higher_is_better=False)]).trial.value == 2.5


def test_where_nobody_knows_a_divergence_value_and_loss_count() -> None:
    best = trial(1, 0.90, 0.40, None)
    assert chosen([best, trial(2, 0.899, 0.3, None)]).trial is best  # equal ranks, and the better value
    assert chosen([trial(2, 0.9, 0.3, None), best]).trial.loss == 0.3


def test_the_cheapest_stays_the_cheapest() -> None:
    goal = Goal(CHEAPEST, max_drop=0.02)
    best = trial(1, 0.90, 0.40, 0.20, goal=CHEAPEST, cost=1.0)
    safer = trial(2, 0.93, 0.10, 0.01, goal=CHEAPEST, cost=1.01)
    assert chosen([best, safer], goal=goal).trial is best
    as_cheap = replace(safer, cost=1.0 + 1e-9)
    assert chosen([best, as_cheap], goal=goal).trial is as_cheap


def test_of_a_trade_off_nothing_dearer_is_returned() -> None:
    goal = Goal("tradeoff", exponents=(-0.07, -0.07))
    best = trial(1, 0.90, 0.40, 0.20, goal="tradeoff", worth=0.90, cost=1.0)
    dearer = trial(2, 0.91, 0.30, 0.10, goal="tradeoff", worth=0.899, cost=1.2)
    assert chosen([best, dearer], goal=goal).trial is best
    cheaper = replace(dearer, cost=0.9)
    assert chosen([best, cheaper], goal=goal).trial is cheaper


def test_only_so_many_are_held_against_each_other() -> None:
    trials = [trial(number, 0.90 - 1e-5 * number, 1.0, 1.0) for number in range(32)]
    assert chosen(trials).compared == choice.MOST


# The standard errors


def test_the_paired_error_of_shares_is_mcnemars() -> None:
    """With b and c samples that only one answers rightly: sqrt(b + c - (b - c)^2 / n) / sqrt(n (n - 1))."""
    one = torch.tensor([True] * 60 + [False] * 40)
    other = one.clone()
    other[:9] = False
    other[60:64] = True
    b, c, n = 9, 4, 100
    assert error_of_difference(one, other) == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / n) / math.sqrt(n * (n - 1)))
    assert error_of_difference(one, one) == 0
    assert error_of_difference(one, None) is None
    assert error_of_difference(one[:1], other[:1]) is None
    assert error_of_difference(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])) is None


def test_the_error_of_a_table_grows_with_the_divergences() -> None:
    one, other = Evaluation(0.9, 0.1, 600, 0.04), Evaluation(0.89, 0.1, 600, 0.05)
    error = estimated_error(one, other)
    assert error == pytest.approx(math.sqrt((APART * 0.3 - 0.01**2) / 599))
    assert estimated_error(one, other._replace(divergence=0.5)) > error  # type: ignore[operator]
    assert estimated_error(one, other._replace(divergence=None)) is None
    # The share of samples that differ is at least the difference itself.
    assert estimated_error(one._replace(divergence=0.0), other._replace(divergence=0.0)) == pytest.approx(
        math.sqrt((0.01 - 0.01**2) / 599)
    )


@pytest.fixture(scope="module")
def searched() -> tuple[haq.Problem, haq.solvers.base.Session]:
    problem = make_problem(small_network())
    return problem, haq.solve(problem, "random", evaluations=12).session


def test_values_by_sample_are_those_whose_mean_is_the_value(searched: tuple[haq.Problem, Session]) -> None:
    problem, session = searched
    for one in session.trials:
        values = problem.evaluator.by_sample(one.policy)
        assert values is not None
        assert values.dtype == torch.bool
        assert float(values.double().mean()) == pytest.approx(one.value)
    first, second = session.trials[0].policy, session.trials[1].policy
    difference = problem.evaluator.by_sample(first).double() - problem.evaluator.by_sample(second).double()  # type: ignore[union-attr]
    assert problem.paired_error(first, second) == pytest.approx(float(difference.std() / 96**0.5))


def test_what_is_not_remembered_is_computed_again_and_comes_out_the_same(searched: tuple[haq.Problem, Session]) -> None:
    """So it is of trials that workers evaluated, and of those that an interrupted search has in its history."""
    problem, session = searched
    again = Session(problem, 12, trials=session.trials, best=session.best)
    problem.evaluator._values = Kept()
    assert choice.choose(again) == session.choice


class Distance(ValueObjective):
    """A mean of values by sample, lower being better."""

    name = "distance"
    unit = ""
    higher_is_better = False

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.softmax(1) - targets).square().sum(1)


def test_values_that_are_no_shares_are_paired_too() -> None:
    inputs = images(24)
    problem = haq.Problem(
        small_network(), calibrate=images(8, 1), search=(inputs, torch.rand(24, 4)), target="edge", objective=Distance()
    )
    one, other = problem.uniform(2, keep_pinned=True), problem.uniform(4, keep_pinned=True)
    values = [problem.evaluator.by_sample(policy) for policy in (one, other)]
    assert values[0] is not None
    assert values[1] is not None
    assert float(values[0].mean()) == pytest.approx(problem.evaluate(one).value)
    assert problem.paired_error(one, other) == pytest.approx(float((values[0] - values[1]).std() / 24**0.5))


# Further samples


def test_the_best_few_are_judged_again(searched: tuple[haq.Problem, Session]) -> None:
    problem, session = searched
    again = Session(problem, 12, trials=session.trials, best=session.best)
    inputs = images(40, 5)
    with torch.inference_mode():
        labels = problem.network(inputs).argmax(1).clone()
    again.confirm = problem.judging((inputs, labels))
    found = choice.choose(again)
    assert found.confirmed == 40
    assert found.finalists == min(choice.LAST, sum(map(choice.is_candidate, session.trials)))
    assert found.confirmed_trial == again.confirm.evaluate(found.trial.policy)
    together = found.trial.evaluation.together(found.confirmed_trial)
    assert together.images == 136
    assert together.value == pytest.approx((96 * found.trial.value + 40 * found.confirmed_trial.value) / 136)
    best = found.best.evaluation.together(found.confirmed_best)  # type: ignore[arg-type]
    assert found.below == pytest.approx(best.value - together.value)
    words = ChoiceRecord.from_dict(choice_entry(problem, found)).words
    assert "on 40 further images" in words


def test_further_samples_overrule_luck() -> None:
    """The best on the search samples is the worst on the others."""
    trials = [BEST, trial(2, 0.88, 0.5, 0.3)]
    confirm: Any = SimpleNamespace(
        count=300,
        evaluate=lambda policy: Evaluation({BEST.policy: 0.5}.get(policy, 0.9), 0.4, 300, 0.2),
        by_sample=lambda policy: torch.arange(300) % 2 == 0,
    )
    problem: Any = SimpleNamespace(
        objective=find_objective("accuracy"),
        goal=Goal(),
        policy_cost=lambda policy: 1.0,
        holds=lambda policy: True,
        meets=lambda evaluation: True,
        evaluator=SimpleNamespace(count=100, by_sample=lambda policy: torch.arange(100) % 3 == 0),
        float_result=Evaluation(0.95, 0.1, 100, 0.0),
    )
    session = Session(problem, 2, trials=trials, best=BEST)
    session.confirm = confirm
    assert choice.choose(session).trial is trials[1]


# What is said


def test_the_record_says_what_was_chosen_and_why(searched: tuple[haq.Problem, Session]) -> None:
    problem, session = searched
    assert session.choice is not None
    entry = choice_entry(problem, session.choice)
    assert ChoiceRecord.from_dict(entry).to_dict() == entry
    other = entry | {
        "best": 0.921,
        "chosen": 0.92,
        "is_best": False,
        "below": 0.001,
        "error": 0.0025,
        "best_divergence": 0.142,
        "chosen_divergence": 0.101,
        "compared": 7,
    }
    assert ChoiceRecord.from_dict(other).words == (
        "best on the search split: 92.10 % (0.142 nats from float); chosen: 92.00 % (0.101 nats from float), 0.10 ± 0.25 "
        "points below the best, with the best rank by value, divergence and loss (7 are within one standard error)"
    )
    same = other | {"is_best": True, "chosen": 0.921, "below": 0.0, "compared": 1}
    assert ChoiceRecord.from_dict(same).words == (
        "best on the search split: 92.10 % (0.142 nats from float); chosen: the same (no other is within one standard error)"
    )
