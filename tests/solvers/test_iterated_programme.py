"""`--solver ilp --iterate`: better than the first solution, never the same policy twice, and an end when nothing is new."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import haq
from haq import search
from haq.console.errors import EXIT_INTERRUPTED
from haq.problem.evaluator import Evaluation
from haq.problem.goal import read_goal
from haq.solvers import ilp, iterated, sensitivity
from haq.solvers.base import Session, Trial, find_solver, solve
from haq.solvers.ilp import IntegerProgramme
from haq.solvers.iterated import Model, Terms, within_budgets
from haq.solvers.random_search import draw, lowered, policy
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, SMALL, call, history
from tests.conftest import enter, make_problem, small_network
from tests.solvers.chips import FEW, base_problem, costs_of, every, policy_of

ITERATED = IntegerProgramme(iterate=True)


def searched(problem: haq.Problem, evaluations: int, seed: int = 0, **options: Any) -> Session:
    session = Session(problem, evaluations, **options)
    solve(ITERATED, session, seed)
    return session


def chip(metrics: tuple[str, ...] = ("latency",), **limits: float) -> haq.Problem:
    """Six layers of three pairs, judged by a formula, within budgets that bind."""
    problem = base_problem(FEW, ((4, 4),), metrics)
    return problem.on(problem.target, limits or {"latency": 0.55})


def model_of(problem: haq.Problem) -> Model:
    loss_increase = problem.quantization_error[:, 0, :, None] + problem.quantization_error[:, 1, None, :]
    return Model(problem, loss_increase, ilp.propose(problem, loss_increase))


# ---- What it finds


@pytest.mark.parametrize("budget", ["0.15", pytest.param("0.3", marks=pytest.mark.slow)])
def test_it_is_nearer_to_the_best_than_the_first_solution_at_the_same_count_of_evaluations(budget: str) -> None:
    problem = haq.Problem.tabular("digres", budget=budget)
    plain, found = Session(problem, 50), Session(problem, 50)
    IntegerProgramme().solve(problem, plain, 0)
    ITERATED.solve(problem, found, 0)
    assert plain.best is not None
    assert found.best is not None
    # Of 600 images: four tenths of a point are two or three.
    assert problem.best_value - found.best.value < 0.006
    assert found.best.value >= plain.best.value
    if budget == "0.15":
        assert found.best.value > plain.best.value + 0.02
    assert found.used <= 50


def test_what_adds_up_is_learned_from_whole_policies() -> None:
    """Sensitivities that are wrong by a factor for every operand are set right, and the policy found is the best there is."""
    problem = chip()
    truth = sensitivity.measure(problem, Session(problem, 10**6), keep=1)
    wrong = truth * np.exp(np.random.default_rng(20).normal(0, 2.0, len(truth)))[:, None, None]
    choices = every(problem)
    within = costs_of(problem, choices)[:, 0] <= problem.limit * (1 + 1e-9)

    def added(options: Any) -> float:
        return float(sum(d.of(t)[o] for d, t, o in zip(problem.decisions, truth, options, strict=True)))

    least = min(added(options) for options in choices[within])
    made = copy.copy(problem)
    model = _Options(made)

    def evaluate(policy: Any) -> Evaluation:
        loss = added(model.options_of(policy))
        return Evaluation(-loss, loss, 8)

    made.evaluate = evaluate  # type: ignore[method-assign]
    given = Session(made, 10)
    first = ilp.propose(made, wrong)
    iterated.search(made, given, first, wrong, seed=0)
    assert given.best is not None
    assert added(model.options_of(first)) > 4 * least  # there is something to learn
    assert given.best.loss == pytest.approx(least, rel=1e-6)


class _Options:
    def __init__(self, problem: haq.Problem) -> None:
        self.problem = problem
        self.known = [{tuple(pair): index for index, pair in enumerate(d.pairs.tolist())} for d in problem.decisions]

    def options_of(self, made: Any) -> list[int]:
        w, a = self.problem.bit_arrays(made)
        first = [decision.layers[0] for decision in self.problem.decisions]
        return [known[int(w[i]), int(a[i])] for known, i in zip(self.known, first, strict=True)]


def test_no_policy_is_evaluated_twice_and_it_ends_when_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterated, "PATIENCE", 4)
    trials: list[Trial] = []
    session = searched(chip(), 3000, on_trial=trials.append)
    assert session.best is not None
    last = [trial.policy for trial in trials].index(session.best.policy)
    assert len({trial.policy for trial in trials}) == len(trials) == session.used
    assert len(trials) - last <= 4 + len(session.problem.decisions) + 1


def test_it_ends_when_the_programme_proposes_nothing_new() -> None:
    problem = copy.copy(chip())
    problem.limit = problem.smallest * 1.02
    session = searched(problem, 3000)
    within = costs_of(problem, every(problem))[:, 0] <= problem.limit * (1 + 1e-9)
    assert within.sum() < 8
    assert session.used < 40
    assert {trial.policy for trial in session.trials if trial.within}


def test_the_same_seed_is_the_same_search_and_another_one_is_another() -> None:
    problem = make_problem(small_network(), 0.5)
    tried = [[trial.policy for trial in searched(problem, 34, seed).trials] for seed in (0, 0, 1)]
    assert tried[0] == tried[1] != tried[2]


def test_policies_are_chosen_ahead() -> None:
    problem = make_problem(small_network(), 0.5)
    expected: list[int] = []
    session = Session(problem, 40, ahead=3)
    session.expect = lambda policies, beat=None: expected.append(len(list(policies)))  # type: ignore[method-assign,misc]
    solve(ITERATED, session, 0)
    assert 3 in expected[1:]  # the first are sensitivities


# ---- Whatever is searched


@pytest.mark.parametrize("metrics", [("latency",), ("latency", "storage")])
def test_several_budgets_are_kept(metrics: tuple[str, ...]) -> None:
    problem = chip(metrics, **dict(zip(metrics, (0.7, 0.75), strict=False)))
    session = searched(problem, 30)
    assert session.best is not None
    assert problem.holds(session.best.policy)
    choices = every(problem)
    limits = [limit.amount * (1 + 1e-9) for limit in problem.limits]
    within = (costs_of(problem, choices) <= limits).all(1)
    best = max(problem.evaluate(policy_of(problem, one)).value for one in choices[within])
    assert session.best.value == pytest.approx(best, abs=0.01)


def test_tied_layers_stay_tied() -> None:
    problem = haq.Problem(
        small_network(),
        calibrate=problem_images(),
        search=(problem_images(), problem_labels()),
        target="edge",
        budget=0.6,
        tied=[["depthwise", "pointwise"]],
    )
    session = searched(problem, 45)
    assert session.best is not None
    assert all(trial.policy["depthwise"] == trial.policy["pointwise"] for trial in session.trials)


def problem_images() -> Any:
    from tests.conftest import images

    return images(32)


def problem_labels() -> Any:
    import torch

    with torch.inference_mode():
        return small_network()(problem_images()).argmax(1).clone()


def test_the_cheapest_policy_that_is_good_enough_is_found() -> None:
    base = base_problem(FEW, ((4, 4),))
    made = copy.copy(base)
    made.float_result = made.evaluate(made.uniform(8))
    made.goal = read_goal(made.objective, max_drop=4.0, at_least=None, tradeoff=None)
    made.limit = made.limits[0].largest
    session = searched(made, 40)
    plain = Session(made, 40)
    solve("ilp", plain, 0)
    assert session.best is not None
    assert plain.best is not None
    assert made.meets(session.best.evaluation)
    assert session.best.cost <= plain.best.cost * 1.02


def test_outputs_that_are_not_finite_teach_nothing_and_stop_nothing() -> None:
    problem = copy.copy(chip())
    judge = problem.evaluate
    narrow = problem.workload.names[4]

    def evaluate(p: Any) -> Evaluation:
        if p[narrow][0] == 4:
            return Evaluation(0.25, math.inf, 8)
        return judge(p)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    session = searched(problem, 30)
    assert session.best is not None
    assert math.isfinite(session.best.loss)
    assert any(math.isinf(trial.loss) for trial in session.trials)


def test_smaller_values_can_be_better() -> None:
    problem = copy.copy(chip())
    judge = problem.evaluate
    problem.objective = copy.copy(problem.objective)
    problem.objective.higher_is_better = False  # type: ignore[misc]

    def evaluate(p: Any) -> Evaluation:
        found = judge(p)
        return Evaluation(1 - found.accuracy, found.loss, 8, None, False)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    session, other = searched(problem, 25), searched(chip(), 25)
    assert session.best is not None
    assert other.best is not None
    assert session.best.value == pytest.approx(1 - other.best.value)


# ---- The model and the programme


@pytest.mark.parametrize("metrics", [("latency",), ("latency", "storage")])
def test_the_linear_programme_is_exact_also_beside_what_was_found(metrics: tuple[str, ...]) -> None:
    problem = chip(metrics, **dict(zip(metrics, (0.7, 0.75), strict=False)))
    random = np.random.default_rng(0)
    losses = [random.random(len(decision.pairs)) for decision in problem.decisions]
    choices = [one for one in every(problem).tolist() if problem.fits(one)]
    total = {tuple(one): sum(float(row[pick]) for row, pick in zip(losses, one, strict=True)) for one in choices}
    best = within_budgets(problem, losses)
    assert best is not None
    assert tuple(best) == min(total, key=total.__getitem__)
    beside = [best]
    other = within_budgets(problem, losses, beside)
    assert other is not None
    assert other != best
    assert problem.fits(other)
    # The next best of the options beside which none of their decision is as good in every respect.
    rows = [np.stack([loss, d.prices, *d.others]) for loss, d in zip(losses, problem.decisions, strict=True)]
    worth = [[not ((r <= r[:, [i]]).all(0) & (r < r[:, [i]]).any(0)).any() for i in range(r.shape[1])] for r in rows]
    left = [o for o in total if o != tuple(best) and all(w[pick] for w, pick in zip(worth, o, strict=True))]
    assert tuple(other) == min(left, key=total.__getitem__)


def test_terms_of_two_layers_make_it_better_than_without_them() -> None:
    problem = chip()
    model = model_of(problem)
    random = np.random.default_rng(1)
    choices = [one for one in every(problem).tolist() if problem.fits(one)]
    for _ in range(5):
        two = {pair: random.normal(size=(10, 10)) for pair in model.twos}
        terms = Terms(random.random(model.scale.shape), two)
        found = model.best(terms, [])
        losses, between = model._alone(terms), model._between(terms)
        total = [model._total(losses, between, one) for one in choices]
        assert found is not None
        assert problem.fits(found)
        start = within_budgets(problem, losses)
        assert start is not None
        assert model._total(losses, between, found) <= model._total(losses, between, start)
        assert model._total(losses, between, found) >= min(total) - 1e-9


def test_terms_of_two_operands_are_nothing_where_trials_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # As it comes, the worst third is as bad as its best, which doesn't add up.
    monkeypatch.setattr(iterated, "_clipped", lambda values, weights: values)
    problem = make_problem(small_network(), 0.6)
    model = model_of(problem)
    random = np.random.default_rng(0)
    policies = [policy(problem, lowered(problem, draw(problem, random), random)) for _ in range(40)]
    rows = np.array([model._places(one) for one in policies])
    predicted = model._predicted(rows)

    def trials(values: Any) -> list[Trial]:
        return [Trial(one, Evaluation(0.5, float(value), 96), 0.0, True) for one, value in zip(policies, values, strict=True)]

    assert model.learn(trials(1 + 3 * predicted), of_value=False)
    assert model.of_two == 0
    assert np.corrcoef(model._values_of(model.expected()), predicted)[0, 1] > 0.99
    joined = model.sensitivities[model.twos[0][0], rows[:, model.twos[0][0]]]
    joined = joined * model.sensitivities[model.twos[0][1], rows[:, model.twos[0][1]]] / model.around
    assert model.learn(trials(1 + 3 * predicted + 30 * joined), of_value=False)
    assert model.of_two > 0


# ---- Where it can be asked for


def test_only_a_solver_that_has_a_first_solution_iterates() -> None:
    with pytest.raises(ValueError, match="solver 'random' has no first solution to go on from: only ilp iterates"):
        find_solver("random", iterate=True)
    assert isinstance(find_solver("ilp", iterate=True), IntegerProgramme)
    assert find_solver("ilp", iterate=True).draws
    assert not find_solver("ilp").draws
    result = haq.solve(make_problem(small_network(), 0.5), "ilp", evaluations=30, iterate=True)
    assert 26 < result.session.used <= 30


@pytest.mark.slow
def test_an_interrupted_run_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    asked = [*SMALL, "--solver", "ilp", "--iterate", "--evaluations", "24", "--finetune-epochs", "0"]
    assert call(search.main, *asked, "--out", "whole") == 0
    record = SearchRun.record
    count = itertools.count(1)

    def interrupted(self: SearchRun, *rest: Any) -> None:
        if next(count) == 18:
            raise KeyboardInterrupt
        record(self, *rest)

    monkeypatch.setattr(SearchRun, "record", interrupted)
    assert call(search.main, *asked, "--out", "parts") == EXIT_INTERRUPTED
    monkeypatch.setattr(SearchRun, "record", record)
    assert call(search.main, "--resume", "parts") == 0
    assert history(Path("parts")) == history(Path("whole"))
    results = [json.loads((Path(name) / "result.json").read_text()) for name in ("parts", "whole")]
    assert results[0]["policy"] == results[1]["policy"]
    rows = [row for row in history(Path("whole")) if row["solver"] == "ilp"]
    assert len(rows) == 24
    assert "--iterate" in (Path("whole") / "config.yaml").read_text()
