"""Searches of a large network, and the default job: what is judged, and verdicts that can fail. Here of a small network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import default_job, large_search
from experiments.large_search import Divergence, Study
from haq.store.files import write
from tests.conftest import images, small_network


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(small_network(), images(16, 1), images(32, 2), images(32, 3), "")


def test_a_policy_is_worth_its_divergence() -> None:
    logits, others = torch.randn(6, 4), torch.randn(6, 4)
    objective = Divergence()
    assert torch.allclose(objective.values(logits, logits), torch.zeros(6, dtype=torch.double), atol=1e-12)
    expected = (others.softmax(1) * (others.log_softmax(1) - logits.log_softmax(1))).sum(1)
    assert torch.allclose(objective.values(logits, others).float(), expected, atol=1e-5)


@pytest.mark.parametrize("budget", list(large_search.BUDGETS))
def test_a_search_is_judged_on_other_crops_and_read_back(budget: str, study: Study, tmp_path: Path) -> None:
    problem = large_search.problem_of(study, budget)
    row = large_search.one_search(study, problem, budget, "random", 0, 5, "32 of 8")
    policy = large_search.read_policy(problem, row.bits)
    assert problem.holds(policy)
    assert problem.evaluate(policy).value == pytest.approx(row.search)
    assert float(large_search.tested(study, problem, policy).mean()) == pytest.approx(row.test) != row.search
    lines = [large_search.Row._fields, row]
    write(tmp_path / "rows.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    assert large_search.load_rows(tmp_path / "rows.csv") == [row]
    # The same, held against itself and against what is better.
    other = row._replace(solver="surrogate")
    assert [line.split(":")[0] for line in large_search.bars([row, other])] == ["holds", "holds"]
    worse = other._replace(test=row.test + 0.02)
    assert "FALLS SHORT by 0.0200" in "\n".join(large_search.bars([row, worse]))
    (line,) = large_search.paired(study, problem, [row, other])
    assert "surrogate less random +0.0000 ± 0.0000 nats" in line
    large_search.save(tmp_path, "words", "about", [row, other], [line])
    assert "| surrogate |" in (tmp_path / "large_search.md").read_text()


def test_verdicts_on_the_default_job() -> None:
    rows = [
        default_job.Row(code, solver, 0, 200, 92.6, 91.0, 90.9, seconds)
        for code, solver, seconds in (
            ("now", "start", 5.0),
            ("old", "start", 6.0),
            ("now", "ddpg", 30.0),
            ("now", "surrogate", 65.0),
            ("old", "ddpg", 106.0),
        )
    ]
    lines = list(default_job.bars(rows, "old"))
    assert [line.split(":")[0] for line in lines] == ["holds"] * 5 + ["FALLS SHORT by 0.10"]
    assert "25 s against 100 s: 0.25" in lines[2]
    poor = [row._replace(search=92.0, test=90.0) for row in rows]
    assert [line.split(":")[0] for line in default_job.bars(poor, "old")][:2] == ["FALLS SHORT by 0.50", "FALLS SHORT by 0.90"]
    assert ("old", "ddpg", "1", "92.60") in [row[:4] for row in default_job.table(rows).rows]
