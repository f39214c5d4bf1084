"""A policy whose network's outputs aren't finite is worth nothing, and every solver goes on with the others."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import envs
import haq
from haq.problem.evaluator import Evaluation
from haq.problem.objective import Accuracy, count_correct
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities
from haq.solvers import SOLVERS, ilp, sensitivity
from haq.solvers.base import Session, Trial, solve
from haq.store import history
from tests.conftest import brightest, images, small_network

WORTHLESS = Evaluation(0.0, math.inf, 64, math.inf)
X = images(64)


class Breaks(nn.Module):
    """Gives NaN or infinity to some images, if its hidden layer has fewer than so many bits."""

    def __init__(self, least: int = 5, value: float = math.nan, share: int = 1) -> None:
        super().__init__()
        self.body = small_network()
        self.least, self.value, self.share = least, value, share

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        if x.isnan().any():  # torch.fx can't follow that, and would take the bits for a constant
            return scores
        bits = getattr(self.body.hidden, "weight_bits", None)
        if bits is not None and bits < self.least:
            scores[:: self.share, 0] = self.value
        return scores


@functools.cache
def problem(least: int = 5, value: float = math.nan, share: int = 1) -> Problem:
    return haq.Problem(
        Breaks(least, value, share), images(16, 1), (X, brightest(X)), "edge", "storage", 0.8, bits=(3, 8), pinned={}
    )


@pytest.mark.parametrize(("value", "share"), [(math.nan, 1), (math.nan, 64), (math.inf, 64)])
def test_one_output_is_enough(value: float, share: int) -> None:
    one = problem(5, value, share)
    assert one.evaluate(one.uniform(4)) == WORTHLESS
    assert one.evaluator.evaluate(one.uniform(3), beat=0.5) == WORTHLESS
    assert math.isfinite(one.evaluate(one.uniform(5)).loss)


def test_a_class_that_is_ruled_out_may_be_at_minus_infinity() -> None:
    one = problem(9, -math.inf, 1)
    inputs = X[brightest(X) != 0]
    found = haq.Problem(one.network, images(16, 1), (inputs, brightest(inputs)), "edge", "storage", 0.6).float_result
    assert math.isfinite(found.loss)


def test_a_float_network_of_such_outputs_is_refused() -> None:
    class Broken(Breaks):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) / torch.zeros(1)

    with pytest.raises(ValueError, match="the network's outputs are not finite on the search images"):
        haq.Problem(Broken(), images(16, 1), (X, brightest(X)), "edge")


def test_of_a_share_such_images_are_wrong() -> None:
    scores = torch.eye(4)
    scores[0, 3] = math.nan
    assert count_correct(Accuracy(), [scores], torch.arange(4)) == 3


SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in (("td3", "plan"), ("sac", "plan"), ("ddpg", "haq"))]
SEARCHES = [(name, "plan") for name in SOLVERS if name not in ("td3", "sac")]


@pytest.mark.parametrize(("name", "env"), [*SEARCHES, *SLOW])
def test_every_solver_goes_on(name: str, env: str) -> None:
    one = problem()
    evaluations = 16
    if name == "exhaustive":
        evaluations = 64
        one = haq.Problem(
            one.network, images(16, 1), (X, brightest(X)), "edge", "storage", 0.75, bits=(4, 5), pinned={"body.stem": (8, 8)}
        )
    tried: list[Trial] = []
    session = Session(one, evaluations, tried.append, env=env)
    found = solve(name, session, 0)
    assert math.isfinite(found.loss)
    assert one.within_budget(found.cost)
    assert any(trial.loss == math.inf for trial in tried)
    if session.sensitivities is not None:
        assert not np.isinf(session.sensitivities.loss_increases).any()
        assert one.evaluate(ilp.propose(one, session.sensitivities.table(one))).accuracy > 0


@pytest.mark.parametrize("kind", [envs.MixedPrecisionEnv, envs.HaqEnv])
def test_an_episode_has_a_finite_reward(kind: Any) -> None:
    one = problem(9)
    env = kind(one)
    env.reset()
    done = False
    while not done:
        _, reward, done, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert info["loss"] == math.inf
    assert reward == pytest.approx(-10 * one.float_accuracy)


def test_what_was_measured_can_be_written_and_read(tmp_path: Path) -> None:
    result = haq.solve(problem(), "greedy", evaluations=30)
    assert result.sensitivities is not None
    result.sensitivities.to_json(tmp_path / "sensitivity.json")
    read = Sensitivities.from_json(tmp_path / "sensitivity.json")
    assert np.array_equal(read.loss_increases, result.sensitivities.loss_increases, equal_nan=True)
    history.write(tmp_path / "history.csv", result._rows())
    rows = history.read(tmp_path / "history.csv")
    assert [row.loss for row in rows] == [trial.loss for trial in result.trials]
    assert math.inf in [row.loss for row in rows]
    assert "inf" in result.trials._repr_html_()


def test_nothing_is_told_from_a_base_that_is_not_finite() -> None:
    one = problem(9)
    session = Session(one, 10)
    measured = sensitivity.measure(one, session, keep=1)
    assert session.used == 1
    assert np.isfinite(measured).all()
    with pytest.raises(ValueError, match="'greedy' evaluated no policy within the budget whose outputs are finite, 2 in all"):
        solve("greedy", session, 0)
