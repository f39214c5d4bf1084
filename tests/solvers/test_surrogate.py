"""The surrogate learns from every trial, keeps all budgets, finds the best of small problems, and repeats itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import check_grad

import haq
from haq.problem.evaluator import Evaluation
from haq.solvers import surrogate
from haq.solvers.base import Session, Trial, solve
from haq.solvers.process import Process
from haq.solvers.space import Space
from haq.solvers.surrogate import Model, Search, start_of
from tests.conftest import images, make_problem, small_network
from tests.solvers import chips

Floats = NDArray[np.float64]


def run(problem: haq.Problem, evaluations: int, seed: int = 0, **options: Any) -> list[Trial]:
    session = Session(problem, evaluations, **options)
    solve("surrogate", session, seed)
    return session.trials


def made_up(x: Floats) -> Floats:
    values: Floats = 0.8 - 0.3 * x[:, 0] - 0.2 * np.square(x[:, 1]) - 0.4 * x[:, 0] * x[:, 2]
    return values


def test_the_process_has_the_gradient_that_it_says() -> None:
    draws = np.random.default_rng(0)
    process = Process(4)
    x = draws.random((20, 4))
    process.learn(x, made_up(x), 1 + draws.random(20), extra=1e-3 * draws.random(20))
    at = process._parameters + 0.3
    wrong = check_grad(lambda p: process._objective(p)[0], lambda p: process._objective(p)[1], at)
    assert wrong < 1e-4 * np.linalg.norm(process._objective(at)[1])


def test_the_process_predicts_what_it_has_not_seen() -> None:
    draws = np.random.default_rng(0)
    x, new = draws.random((40, 4)), draws.random((200, 4))
    process = Process(4)
    process.learn(x, made_up(x))
    mean, deviation = process.predict(new)
    assert np.abs(mean - made_up(new)).max() < 0.2 * np.std(made_up(new))
    seen, certain = process.predict(x)
    assert np.abs(seen - made_up(x)).max() < 0.01
    assert certain.mean() < deviation.mean()


def test_a_value_with_more_variance_says_less() -> None:
    x = np.random.default_rng(0).random((15, 3))
    y = made_up(x)
    y[7] += 1.0
    process = Process(3)
    process.learn(x, y, extra=np.where(np.arange(15) == 7, 4.0, 0.0))
    assert abs(float(process.predict(x[7:8])[0][0]) - (y[7] - 1.0)) < 0.3


@pytest.mark.parametrize("case", [(chips.FEW, (), ("latency", "storage", "peak_memory")), (chips.WIDE, (), ("latency",))])
def test_all_that_is_drawn_keeps_all_budgets(case: Any) -> None:
    draws = np.random.default_rng(0)
    for problem in chips.random_budgets(chips.base_problem(*case), 4, seed=1):
        space = Space(problem)
        drawn = space.random(60, draws)
        assert len(drawn) > 30
        assert all(problem.fits(row) for row in drawn.tolist())
        anything = space.drawn(60, draws)
        assert space.fits(anything).tolist() == [problem.fits(row) for row in anything.tolist()]
        lowered = space.lowered(anything, draws)
        assert all(problem.fits(row) for row in lowered.tolist())
        losses = [draws.random(count) for count in space.counts]
        assert problem.fits(space.planned(losses))
        assert space.options(space.policy(drawn[0])) == tuple(drawn[0].tolist())


def test_what_is_filled_has_no_room_left() -> None:
    problem = make_problem(small_network())
    space = Space(problem)
    for row in space.random(20, np.random.default_rng(0)).tolist():
        for index, decision in enumerate(problem.decisions):
            pair = decision.pairs[row[index]]
            for other in range(len(decision.pairs)):
                more = (decision.pairs[other] >= pair).all() and (decision.pairs[other] > pair).any()
                changed = [*row[:index], other, *row[index + 1 :]]
                assert not (more and problem.fits(changed) and decision.prices[other] > decision.prices[row[index]])


def test_policies_are_described_by_what_their_widths_leave() -> None:
    problem = make_problem(small_network())
    space = Space(problem)
    options = space.random(5, np.random.default_rng(0))
    features = space.features(options)
    assert ((features >= 0) & (features <= 1)).all()
    for row, described in zip(options, features, strict=True):
        assert np.allclose(space.features_of(space.policy(row)), described)


class Table:
    """Evaluates policies of a problem by a formula of their features."""

    def __init__(self, problem: haq.Problem, *, lower: bool = False) -> None:
        self.problem, self.lower = problem, lower
        self.space = Space(problem)

    def __call__(self, policy: Any) -> Evaluation:
        features = self.space.features_of(policy)
        harm = float(np.square(features) @ np.linspace(1, 3, len(features)))
        value = 1 / (1 + harm)
        if self.lower:
            value = harm
        return Evaluation(value, harm + 0.1, self.problem.evaluator.count, harm, not self.lower)

    def best(self) -> float:
        rows = np.array(list(itertools.product(*[range(count) for count in self.space.counts])))
        return min(self(self.space.policy(row)).loss for row in rows[self.space.fits(rows)])


def small_problem(bits: str = "4,6,8", **options: Any) -> haq.Problem:
    network, inputs = small_network(), images(32)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    given = {"budget": 0.6} | options
    return haq.Problem(network, images(32, 1), (inputs, labels), "edge", bits=bits, correction=None, **given)


def test_it_finds_the_best_of_a_small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem()
    table = Table(problem)
    monkeypatch.setattr(problem, "evaluate", table)
    trials = run(problem, 40)
    assert min(trial.loss for trial in trials if trial.feasible) == pytest.approx(table.best())


def test_every_policy_is_evaluated_where_there_are_few() -> None:
    problem = small_problem("7,8", budget=0.9)
    space = Space(problem)
    rows = np.array(list(itertools.product(*[range(count) for count in space.counts])))
    trials = run(problem, 1000)
    assert {space.options(trial.policy) for trial in trials} == set(map(tuple, rows[space.fits(rows)].tolist()))


@pytest.mark.parametrize("evaluations", [1, 2, 3, 7])
def test_few_evaluations_are_enough_to_begin(evaluations: int) -> None:
    assert len(run(make_problem(small_network()), evaluations)) == evaluations


def test_at_most_half_of_the_evaluations_are_the_start() -> None:
    assert start_of(12, 200) == 15
    assert start_of(4, 200) == 10
    assert start_of(54, 60) == 30
    assert start_of(12, 1) == 1
    problem = make_problem(small_network())
    session = Session(problem, 8)
    search = Search(problem, session, 0)
    search.run()
    assert search.origins.count("start") == 4
    assert sum(part.count for part in surrogate.Surrogate().spending(problem, 8)) == 8


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_search_is_a_function_of_seed_and_trials(ahead: int) -> None:
    first = run(small_problem(), 16, seed=3, ahead=ahead)
    assert run(small_problem(), 16, seed=3, ahead=ahead) == first
    assert run(small_problem(), 16, seed=4, ahead=ahead) != first


def test_what_comes_ahead_is_not_the_same_policy_again() -> None:
    trials = run(make_problem(small_network()), 22, ahead=5)
    assert len({trial.policy for trial in trials}) == 22


def test_smaller_values_are_better_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem(objective=haq.objective(lambda out, _: out.square().mean(1), higher_is_better=False, unit="K"))
    table = Table(problem, lower=True)
    monkeypatch.setattr(problem, "evaluate", table)
    trials = run(problem, 40)
    assert min(trial.loss for trial in trials if trial.feasible) == pytest.approx(table.best())


def test_outputs_that_are_not_finite_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem(budget=0.8)
    table = Table(problem)

    def evaluate(policy: Any) -> Evaluation:
        found = table(policy)
        if policy["hidden"][0] == 4:
            return Evaluation(0.0, math.inf, found.images, math.inf)
        return found

    monkeypatch.setattr(problem, "evaluate", evaluate)
    trials = run(problem, 40)
    rows = np.array(list(itertools.product(*[range(count) for count in table.space.counts])))
    policies = [table.space.policy(row) for row in rows[table.space.fits(rows)]]
    assert min(trial.loss for trial in trials) == min(evaluate(policy).loss for policy in policies)


def test_all_policies_may_be_worth_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(small_network())
    count = problem.evaluator.count
    monkeypatch.setattr(problem, "evaluate", lambda policy: Evaluation(0.5, 0.0, count))
    assert len(run(problem, 25)) == 25
    monkeypatch.setattr(problem, "evaluate", lambda policy: Evaluation(0.0, math.inf, count))
    with pytest.raises(ValueError, match="finite"):
        run(problem, 25)


def test_what_is_cut_short_is_known_less_well() -> None:
    problem = make_problem(small_network())
    space = Space(problem)
    rows = space.random(12, np.random.default_rng(0))
    count = problem.evaluator.count
    deviations = []
    for seen in (count, max(count // 4, 1)):
        model = Model(space, count)
        for number, row in enumerate(rows):
            model.learn(space.policy(row), tuple(row.tolist()), Evaluation(0.5 + 0.01 * number, 1.0 - 0.02 * number, seen))
        deviations.append(float(model.predict(rows)[1].mean()))
    assert deviations[1] > deviations[0]
    assert model.best is None  # none of them is whole


def test_known_trials_are_learned_from_and_not_counted() -> None:
    problem = make_problem(small_network())
    before = run(problem, 12)
    session = Session(problem, 6, known=[(trial.policy, trial.evaluation) for trial in before])
    solve("surrogate", session, 1)
    assert session.used == 6
    best = min(before, key=lambda trial: trial.rank)
    assert session.trials[0].policy == best.policy


def test_the_cheapest_policy_that_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem(budget=None, max_drop=5.0)
    table = Table(problem)
    monkeypatch.setattr(problem, "evaluate", table)
    monkeypatch.setattr(haq.Problem, "float_accuracy", property(lambda self: 1.0))
    space = table.space
    rows = np.array(list(itertools.product(*[range(count) for count in space.counts])))
    costs = space.costs(rows)
    good = [problem.meets(table(space.policy(row))) for row in rows]
    trials = run(problem, 40)
    found = min(trial.cost for trial in trials if trial.feasible)
    assert found <= 1.02 * costs[good].min()


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    problem = make_problem(small_network())
    whole = run(problem, 16)
    # A search that is done again meets what was evaluated before, and goes on.
    replayed = make_problem(small_network())
    for trial in whole[:11]:
        replayed.evaluator.cache[trial.policy] = trial.evaluation
    assert [trial.policy for trial in run(replayed, 16)] == [trial.policy for trial in whole]


def test_a_network_without_gradients_is_searched_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Blind(torch.nn.Sequential):
        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    network, inputs = Blind(*small_network().children()), images(32)
    problem = haq.Problem(network, images(32, 1), (inputs, network(inputs).argmax(1)), "edge", budget=0.6, bits="4,6,8")
    assert len(run(problem, 12)) == 12
    assert "without what gradients predict" in caplog.text
