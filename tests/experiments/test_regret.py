"""The regret that is printed is against the true best policy: every one was evaluated, as the evaluator does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import haq
from experiments import regret
from haq.solvers.base import Session, solve
from tests.conftest import images

PAIRS = [(2, 2), (3, 4), (6, 6)]


@pytest.fixture(scope="module")
def known() -> regret.Known:
    torch.manual_seed(0)
    network = nn.Sequential(*regret.conv(1, 4, 3, 2), *regret.conv(4, 6), nn.Flatten(), *regret.dense(96, 8, 8, 4)).eval()
    inputs = images(64)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    problem = haq.Problem(network, images(16, 1), (inputs, labels), "edge", budget=1.0, bits=(1, 8))
    problem.decisions = [d if len(d.pairs) == 1 else regret.restricted(problem, d, PAIRS) for d in problem.decisions]
    accuracy, loss = regret.enumerate_all(problem, inputs, labels)
    assert accuracy.shape == (1, 3, 3, 3, 1)
    regret.check(problem, accuracy, loss)
    with pytest.raises(RuntimeError, match="were enumerated as"):
        regret.check(problem, accuracy, loss + 0.01)
    return regret.Known(problem, "small", 0.4, accuracy, loss)


def test_the_best_is_what_exhaustive_search_finds(known: regret.Known) -> None:
    assert known.policies == 27
    assert 1 < known.within < 27
    tried: list[float] = []
    found = solve("exhaustive", Session(known, 27, lambda one: tried.append(one.accuracy)), 0)
    assert len(tried) == known.within
    assert found.accuracy == max(tried) == pytest.approx(known.best)


def test_a_search_is_told_with_its_regret_evaluation_by_evaluation(
    known: regret.Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regret, "known", lambda name, quick: [known])
    outcome = regret.one_search(("small", True, 0, "random", 10, 0, 1))
    assert len(outcome.curve) == 10
    assert (np.diff(outcome.curve) <= 0).all()
    assert outcome.regret == pytest.approx(outcome.curve[-1])
    assert outcome.regret >= 0
    rival = outcome._replace(solver="random", evaluations=200, regret=0.3)
    for found, verdict in ((0.34, "holds"), (0.36, "FALLS SHORT")):
        (line,) = (
            line
            for line in regret.bars([rival._replace(solver="ddpg", regret=found), rival], {"small": 1.0})
            if "nowhere more than 0.05 worse" in line
        )
        assert line.startswith(verdict)


def test_published_problems_have_their_proven_optimum() -> None:
    given = json.loads(regret.HAWQ.read_text(encoding="utf-8"))
    most = float((np.array(given["trace"]) * given["dw2_4bit"]).sum())
    for problem, case in zip(regret.published(given), ("modelsize_0.5", "bops_0.5", "latency_0.5"), strict=True):
        assert problem.best == pytest.approx(1 - given["cases"][case]["optimal_objective"] / most)
        assert problem.policies == 2**16
        found = solve("ilp", Session(problem, 100), 0)
        assert found.accuracy == pytest.approx(problem.best)
