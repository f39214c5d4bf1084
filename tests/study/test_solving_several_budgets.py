"""`haq.solve` within several budgets: what its result says, saves and shows."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

import haq
from haq.store import history
from haq.store.records import PolicyRecord, ProblemRecord
from haq.study import sweep_run
from haq.study.result import uniform_policies
from hw_models.widths import FLOAT
from tests.conftest import images
from tests.solvers.chips import Chip

PAIRS = ((8, 8), (4, 8), (8, 16), (FLOAT, FLOAT))


def problem(**asked: object) -> haq.Problem:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 4))
    given = images(16)
    return haq.Problem(network, given, (given, network(given).argmax(1)), Chip(PAIRS), **asked)  # type: ignore[arg-type]


def test_all_budgets_are_told_and_saved(tmp_path: Path) -> None:
    found = haq.solve(problem(budget={"latency": 20.0, "storage": 1.0, "bops": "1 Gbops"}), "random", evaluations=3)
    assert ", storage " in repr(found)
    assert ", bit operations " in repr(found)
    assert "<th>storage</th><th>bit operations</th>" in found._repr_html_()
    text = repr(found.table())
    assert "storage" in text
    assert "32" not in "".join(line.split()[1] for line in text.splitlines() if line.strip()[:2] in ("0 ", "2 ", "4 "))
    folder = found.save(tmp_path / "found")
    record = ProblemRecord.read(folder / "problem.json")
    assert [limit.metric for limit in record.limits] == ["latency", "storage", "bops"]
    rows = history.read(folder / "history.csv", 3, others=["storage", "bops"])
    assert [row.others for row in rows] == [tuple(found.problem.costs(trial.policy).values())[1:] for trial in found.trials]
    assert PolicyRecord.read(folder / "policy.json").widths() == dict(found.policy)
    budgets = json.loads((folder / "solution.json").read_text())["budgets"]
    assert [budget["holds"] for budget in budgets] == [True] * 3


def test_uniform_policies_are_those_that_the_chip_can_do() -> None:
    few = problem(budget="700ms", bits="4,8,float/8,16,float")
    assert list(uniform_policies(few)) == ["4/8", 8, "8/16", "float"]


def test_the_cheapest_says_what_is_good_enough() -> None:
    found = haq.solve(problem(max_drop=100.0), "random", evaluations=3)
    assert repr(found.trials).endswith("good enough)")
    assert found.to_dict()["goal"]["is"] == "the cheapest that loses at most 100 points of accuracy"
    assert found.to_dict()["budget"]["limit"] is None


def test_sensitivities_are_shared_by_targets_of_the_same_widest_bits() -> None:
    few, wide = problem(budget="180ms", bits="4,8"), problem(budget="180ms", bits="4,8/8,16")
    assert sweep_run._can_share(few, few)
    assert not sweep_run._can_share(few, wide)
    assert not sweep_run._can_share(wide, few)
