"""Agents propose candidates to the surrogate: what they learn from, must not disturb, and what is counted as theirs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import envs
import haq
from haq.problem.evaluator import Evaluation
from haq.solvers import actor, agents
from haq.solvers.base import Session, Trial, solve
from haq.solvers.contribution import contribution
from haq.solvers.surrogate import CHANGED, START, Search, Surrogate
from haq.store.records import ContributionRecord
from tests.conftest import make_problem, small_network
from tests.solvers import chips

NAMES = ("ddpg", pytest.param("td3", marks=pytest.mark.slow), "sac")  # td3's actor is of ddpg's kind, sac's draws


def several() -> haq.Problem:
    (problem,) = chips.random_budgets(
        chips.base_problem(chips.WIDE, ((4, 4),), ("latency", "storage", "peak_memory")), 1, seed=5
    )
    return problem


class OfWidths:
    """A model that likes some policies best: those that differ least from one."""

    def __init__(self, best: Any) -> None:
        self.best = best

    def reward(self, options: Any) -> Any:
        return -np.abs(options - self.best).sum(1).astype(float)


@pytest.mark.parametrize("name", NAMES)
def test_an_actor_proposes_what_is_within_all_budgets(name: str) -> None:
    for problem in (make_problem(small_network(), 0.5), several()):
        proposer = actor.Actor(name, problem, 0)
        model: Any = OfWidths(np.zeros(len(problem.decisions)))
        planned = proposer.play(np.zeros(1))[2][0]
        proposer.learn(tuple(planned.tolist()), Evaluation(0.5, 1.0, problem.evaluator.count))
        for _ in range(2):
            proposed = proposer.propose(model, 20)
            assert len(proposed) == 20
            for options in proposed:
                policy = chips.policy_of(problem, np.array(options))
                assert problem.holds(policy)


def test_an_actor_that_learned_nothing_follows_the_plan() -> None:
    problem = make_problem(small_network(), 0.5)
    proposer = actor.Actor("ddpg", problem, 0)
    with torch.no_grad():
        _, done, options = proposer.play(np.zeros(1))
    assert np.abs(done).max() < 0.05
    episodes = envs.Episodes(problem)
    episodes.begin(1)
    while not episodes.is_over:
        episodes.act(np.zeros((1, 2)))
    assert np.array_equal(options, episodes.options)


@pytest.mark.parametrize("name", NAMES)
def test_an_agent_learns_from_imagined_episodes_what_the_model_likes(name: str) -> None:
    """Nothing but the model tells it."""
    problem = make_problem(small_network(), 0.6)
    liked = np.array(actor.Actor(name, problem, 7).propose(OfWidths(0), 40)[30])  # type: ignore[arg-type]
    model: Any = OfWidths(liked)
    proposer = actor.Actor(name, problem, 0)
    planned = model.reward(proposer.play(np.zeros(1))[2])[0]
    for _ in range(30):
        proposed = np.array(proposer.propose(model, 32))
    assert planned < -10
    assert model.reward(proposed[:1])[0] > 2 * planned / 3


def test_what_is_remembered_is_what_was_played_with_its_return() -> None:
    problem = make_problem(small_network(), 0.5)
    proposer = actor.Actor("ddpg", problem, 0)
    seen, done, options = proposer.play(np.array([0.5, 0.5, 0.5]))
    proposer.memory.remember(seen, done, options, np.full(3, np.nan))
    for row, value in zip(options, (0.6, 0.4, 0.2), strict=True):
        proposer.learn(tuple(row.tolist()), Evaluation(value, 1.0, problem.evaluator.count))
    proposer.learn(tuple(options[0].tolist()), Evaluation(0.1, 1.0, 1))  # cut short: the model tells more
    memory = proposer.memory
    assert np.isnan(memory.real).tolist() == [True] * 3 + [False] * 3 + [True]
    assert memory.real[3:6] == pytest.approx([10 * (value - problem.float_accuracy) for value in (0.6, 0.4, 0.2)])
    for index in range(3):
        assert np.array_equal(memory.seen[index], memory.seen[index + 3])
    rewards = np.array([1.0, 2.0, 6.0, 1.0, 2.0, 6.0, 1.0])
    memory.judge(rewards)
    drawn = memory.sample(50)
    assert bool((drawn.dones == 1).all())
    rows = [(memory._seen == one).all(1).nonzero()[0, 0] // len(done[0]) for one in drawn.observations]
    scaled = (rewards - rewards.mean()) / rewards.std()
    for row, value, action in zip(rows, drawn.rewards[:, 0], drawn.actions, strict=True):
        alike = [index for index in range(7) if np.array_equal(memory.seen[index], memory.seen[int(row)])]
        assert any(np.isclose(float(value), scaled[index]) for index in range(7))
        assert alike
        assert any((torch.as_tensor(memory.done[index]) == action).all(1).any() for index in range(7))


def test_memory_keeps_what_was_evaluated_and_the_newest_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "MOST_EPISODES", 6)
    proposer = actor.Actor("ddpg", make_problem(small_network(), 0.5), 0)
    seen, done, options = proposer.play(np.full(5, 0.9))
    proposer.memory.remember(seen[:1], done[:1], options[:1], np.array([1.0]))
    proposer.memory.remember(seen, done, options, np.full(5, np.nan))
    proposer.memory.remember(seen[:2], done[:2], options[:2], np.full(2, np.nan))
    assert proposer.memory.real[0] == 1.0
    assert len(proposer.memory.seen) == len(proposer.memory.real) == len(proposer.memory.options) == 6


def searched(problem: haq.Problem, solver: Any, evaluations: int = 16, **options: Any) -> Session:
    session = Session(problem, evaluations, **options)
    solve(solver, session, 0)
    return session


def test_an_agent_begins_as_the_surrogate_does_and_measures_no_sensitivities() -> None:
    problem = make_problem(small_network())
    with_agent, without = searched(problem, "ddpg"), searched(problem, "surrogate")
    start = without.origins.count(START)
    assert start >= 8
    assert [trial.policy for trial in with_agent.trials[:start]] == [trial.policy for trial in without.trials[:start]]
    # From then on the agent's candidates are in turn the only ones, and some of all.
    assert all(origin == "ddpg" for origin in with_agent.origins[start + 1 - start % 2 :: 2])
    assert with_agent.sensitivities is None
    assert len(with_agent.trials) == 16
    assert with_agent.saturated
    assert all(0 <= share <= 1 for share in with_agent.saturated)


def test_other_generators_draw_what_they_would_without_the_agent() -> None:
    """Their random numbers don't depend on it, so that it takes nothing from them."""
    problem = make_problem(small_network())
    candidates: list[dict[str, list[Any]]] = []
    for proposers in ([], [actor.Actor("ddpg", problem, 0)]):
        search = Search(problem, Session(problem, 30), 0, proposers)  # type: ignore[arg-type]
        for _ in range(6):
            options = search.choose()
            assert options is not None
            policy = search.space.policy(options)
            search.learn(options, policy, problem.evaluate(policy))
        found = search._candidates()
        by_origin: dict[str, list[Any]] = {}
        for row, origin in zip(found.options.tolist(), found.origins, strict=True):
            by_origin.setdefault(origin, []).append(row)
        candidates.append(by_origin)
    without, with_agent = candidates
    with_agent.pop("ddpg", None)
    assert with_agent == without


def test_alone_an_agent_is_the_only_one_that_proposes() -> None:
    session = searched(make_problem(small_network()), agents.DDPG(alone=True))
    assert set(session.origins) == {START, "ddpg"}
    found = contribution(session)
    assert found is not None
    assert found.choices == found.proposed == session.origins.count("ddpg")


def test_what_came_from_the_actor_is_counted() -> None:
    problem = make_problem(small_network())
    session = searched(problem, "random", 14)
    assert contribution(session) is None
    session.proposers = ["ddpg"]
    session.origins = [START] * 4 + ["ddpg", "neighbour", "ddpg" + CHANGED, "ddpg", "random"] * 2
    found = contribution(session)
    assert found is not None
    assert (found.choices, found.proposed, found.changed) == (10, 4, 2)
    feasible = [index for index, trial in enumerate(session.trials) if trial.feasible]
    best = sorted(feasible, key=lambda index: session.trials[index].rank)[:10]
    assert found.best == len(best)
    assert found.best_proposed == sum(session.origins[index] == "ddpg" for index in best)
    words = ContributionRecord.from_dict(found._asdict()).words
    assert "of 10 policies that were chosen after the first ones the actor of ddpg proposed 4 (40 %)" in words


def test_an_evaluation_that_draws_from_global_generators_changes_nothing() -> None:
    problem = make_problem(small_network())
    quiet = [trial.policy for trial in searched(problem, "sac", 12).trials]

    def on_trial(trial: Trial) -> None:
        random.random()
        np.random.rand(3)
        torch.rand(3)

    loud = Session(problem, 12, on_trial=on_trial)
    solve("sac", loud, 0)
    assert [trial.policy for trial in loud.trials] == quiet


@pytest.mark.parametrize("ahead", [pytest.param(1, marks=pytest.mark.slow), 3])  # of 1 it is a solver's contract
def test_what_is_done_depends_on_how_many_are_chosen_ahead_and_on_nothing_else(ahead: int) -> None:
    problem = make_problem(small_network())
    first, again = (searched(problem, "ddpg", ahead=ahead) for _ in range(2))
    assert [trial.policy for trial in first.trials] == [trial.policy for trial in again.trials]
    assert first.origins == again.origins


def test_agents_know_the_goals_that_the_surrogate_knows() -> None:
    assert agents.DDPG.goals == Surrogate.goals
    assert not agents.DDPG.uses_sensitivities
