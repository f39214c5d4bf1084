"""The regret that is printed is against the true best policy: every one was evaluated, as the evaluator does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import haq
from experiments import regret
from haq.problem.tabular import TabularProblem
from haq.solvers.base import Session, solve
from tests.conftest import images

PAIRS = [(2, 2), (3, 4), (6, 6)]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> TabularProblem:
    torch.manual_seed(0)
    network = nn.Sequential(*regret.conv(1, 4, 3, 2), *regret.conv(4, 6), nn.Flatten(), *regret.dense(96, 8, 8, 4)).eval()
    inputs, others = images(64), images(32, 2)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    problem = haq.Problem(network, images(16, 1), (inputs, labels), "edge", budget=1.0, bits=(1, 8))
    problem.decisions = [d if len(d.pairs) == 1 else regret.restricted(problem, d, PAIRS) for d in problem.decisions]
    made = regret.enumerated(problem, "small", (0.4, 0.7), (others, torch.zeros(32, dtype=torch.long)))
    assert made.counts == (1, 3, 3, 3, 1)
    path = tmp_path_factory.mktemp("tables") / "small.npz"
    made.write(path)
    found = haq.Problem.tabular(path, "0.4")
    assert isinstance(found, TabularProblem)
    # What a table says is what its network gives, of single operands too.
    for option in (0, 5, 13):
        picks = np.unravel_index(option, made.counts)
        policy = problem.decide(d.pairs[pick] for d, pick in zip(problem.decisions, picks, strict=True))
        if made.accuracy[option] >= 0:
            judged = problem.evaluate(policy)
            assert found.evaluate(policy)[:4] == pytest.approx(judged[:4], abs=1e-5)
            assert found.policy_cost(policy) == pytest.approx(problem.policy_cost(policy))
    for solver in ("ilp", "greedy"):
        ours = solve(solver, Session(found, 40), 0)
        theirs = solve(solver, Session(problem.limited_to(found.limit), 40), 0)
        assert ours.policy == theirs.policy
    values = regret.Values(made.accuracy, made.loss + 0.01, made.kl)
    with pytest.raises(RuntimeError, match="were enumerated as"):
        regret.check(problem, max(made.limits.values()), values)
    return found


def test_the_best_is_what_exhaustive_search_finds(known: TabularProblem) -> None:
    assert len(known.file.accuracy) == 27
    within = int((known.file.all_prices() <= known.limit).sum())
    # Only what the larger budget allows was evaluated.
    assert 1 < within < int((known.file.accuracy >= 0).sum()) < 27
    tried: list[float] = []
    found = solve("exhaustive", Session(known, 27, lambda one: tried.append(one.accuracy)), 0)
    assert len(tried) == within
    assert found.accuracy == max(tried) == known.best_value


def test_a_search_is_told_with_its_regret_evaluation_by_evaluation(
    known: TabularProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regret, "known", lambda name: {"small, budget 0.4": known})
    outcome = regret.one_search(("small", "small, budget 0.4", "random", 10, 0, 1))
    assert len(outcome.curve) == 10
    assert (np.diff(outcome.curve) <= 0).all()
    assert outcome.regret == pytest.approx(outcome.curve[-1])
    assert outcome.regret >= 0
    rival = outcome._replace(solver="random", evaluations=200, regret=0.3)
    for found, verdict in ((0.34, "holds"), (0.36, "FALLS SHORT")):
        (line,) = (
            line
            for line in regret.bars([rival._replace(solver="ddpg", regret=found), rival], {"small, budget 0.4": 1.0})
            if "nowhere more than 0.05 worse" in line
        )
        assert line.startswith(verdict)


def test_published_problems_have_their_proven_optimum(tmp_path: Path) -> None:
    given = json.loads(regret.HAWQ.read_text(encoding="utf-8"))
    most = float((np.array(given["trace"]) * given["dw2_4bit"]).sum())
    for file, case in zip(regret.published(given), ("modelsize_0.5", "bops_0.5", "latency_0.5"), strict=True):
        problem = TabularProblem(file)
        assert problem.best_value == pytest.approx(1 - given["cases"][case]["optimal_objective"] / most)
        assert len(file.accuracy) == 2**16
        found = solve("ilp", Session(problem, 100), 0)
        assert found.accuracy == pytest.approx(problem.best_value)
    file.write(tmp_path / "published.npz")
    assert haq.Problem.tabular(tmp_path / "published.npz").limit == problem.limit
