"""The experiment on the choice at the end: it runs, and its rule is the one of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import haq
from experiments import choice as experiment
from haq.solvers import choice
from haq.solvers.base import Session, solve


def test_it_runs_on_tables(tmp_path: Path) -> None:
    assert experiment.main(["--quick", "--networks", "--tables", "digres", "--solvers", "random", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "choice.md").read_text()
    for word in ("| best | +0.00 ± 0.00", "| ranks |", "| ilp |", "digres, 0.15"):
        assert word in page


def test_its_rule_is_that_of_the_package() -> None:
    problem = haq.Problem.tabular("digres", budget="0.3")
    session = Session(problem, 40)
    returned = solve("random", session, 1)
    trials = sorted(filter(choice.is_candidate, session.trials), key=lambda one: one.rank)
    assert trials[experiment.ranked(experiment._judged(problem, trials))].policy == returned.policy


def test_every_rule_is_given_the_same_searches() -> None:
    random = np.random.default_rng(0)
    right = (random.random((30, 400)) < 0.9).astype(np.float32)
    pool = experiment.Pool(right, random.random((30, 400), np.float32), random.random((30, 400), np.float32))
    found = experiment.on_network(pool, 100, 4)
    assert {len(gains) for gains in found.values()} == {4}
    assert found["best"] == [0.0] * 4
    assert set(experiment.RULES) < set(found)
    mean, spread = experiment.fit(pool)
    assert mean == pytest.approx(0.16, abs=0.02)  # a little less than 2 x 0.9 x 0.1
    assert spread < 0.2
