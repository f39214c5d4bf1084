"""Chips with few pairs, 16 bits and float, several budgets, another goal: what a page and a picture show of such runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from haq.reporting import charts, comparisons, pictures
from haq.reporting.heights import height_of, ticks_of
from haq.reporting.overview import line
from haq.reporting.reading import RunFolder, read_folder
from haq.reporting.run_part import of_run
from tests.reporting.written_runs import change, write_run, write_wide_run


def read(folder: Path) -> RunFolder:
    run = read_folder(folder)
    assert isinstance(run, RunFolder)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return read(write_wide_run(tmp_path / "wide"))


@pytest.fixture
def cheapest(tmp_path: Path) -> RunFolder:
    """The cheapest was looked for, within budgets of storage and peak memory alone."""
    return read(write_wide_run(tmp_path / "cheapest", goal=True, budget=False))


def values(spec: Any, name: str) -> list[Any]:
    """All values of a field in the data of a chart."""
    rows = [row for data in spec.get("datasets", {}).values() for row in data]
    for layer in spec.get("layer", []):
        rows += layer.get("data", {}).get("values", [])
    return [row[name] for row in rows if name in row]


def test_wide_bars_are_a_step_above_the_others() -> None:
    assert [height_of(width) for width in (1, 8, 16, 32)] == [1, 8, 10, 12]
    assert ticks_of([2, 8]) == {4: "4", 8: "8"}
    assert ticks_of([8, 32]) == {4: "4", 8: "8", 10: "16", 12: "float"}


def test_the_chart_of_bits_says_float_and_not_32(run: RunFolder) -> None:
    picture = charts.bits(run)
    assert run.policy is not None
    assert 32 in [width for pair in run.policy for width in pair]
    heights = values(picture.specs[0], "height")
    assert max(map(abs, heights)) == 12
    cells = [cell for row in picture.rows for cell in row[4:6]]
    assert "float" in cells
    assert not any("32" in cell for cell in cells)
    assert "16 bits and float are drawn a step above 8 bits each, not to scale. Float counts 32 bits" in picture.note
    assert "in the reference" in picture.head[6]
    axis = json.dumps(picture.specs[0])
    assert "'float'" in axis
    assert "'16'" in axis


def test_values_are_drawn_against_every_metric_that_is_limited(run: RunFolder) -> None:
    picture = charts.tried(run)
    assert picture.title == "Accuracy against latency, storage and peak memory: every policy tried"
    assert len(picture.specs) == 3
    for spec, title in zip(picture.specs, ("latency, ms", "storage, kB", "peak memory, kB"), strict=True):
        text = json.dumps(spec)
        assert title in text
        assert '"label": "budget"' in text
    assert picture.head[3:6] == ["latency", "storage", "peak memory"]
    inside = sum(row.within_budget for row in run.history)
    assert f"{inside} of them within 2.016 ms of latency, 40 kB of storage and 256 kB of peak memory" in picture.says
    # One in float costs a hundred times as much: it would press all others to the left.
    assert "lie beyond the right edge: float (" in picture.note


def test_everything_said_of_a_run_names_every_budget(run: RunFolder) -> None:
    part = of_run(run, "run", "run")
    verdict = part.sentences[0]
    for words in (
        "The budget of 2.016 ms of latency holds.",
        "The budget of 40 kB of storage holds.",
        "256 kB of peak memory",
    ):
        assert words in verdict
    facts = {fact.label: fact for fact in part.facts}
    assert facts["Budget"].value == "✓ all hold"
    assert facts["Peak memory"].detail.startswith("counted; ")
    assert "8 bits, 8/16 in layer0" in facts["Against the reference"].detail
    table = part.sections[0].tables[0]
    assert [head for head in table.head if "counted" in head] == ["storage (counted)", "peak memory (counted)"]
    assert [row[0] for row in table.rows][:2] == ["float", "the reference"]
    problem = part.sections[-1].tables[0].rows
    assert [row[1].partition(",")[0] for row in problem if row[0] == "budget"] == [
        "2.016 ms latency",
        "40 kB storage",
        "256 kB peak memory",
    ]
    assert line(run, "run")[-4].count(" of ") == 3


def test_the_cheapest_is_told_by_its_cost(cheapest: RunFolder) -> None:
    best = cheapest.best
    assert best is not None
    good = [row for row in cheapest.history if row.solver == "ilp" and row.within_budget]
    assert best.cost == min(row.cost for row in good)
    picture = charts.convergence(cheapest)
    assert picture.title == "Convergence: the cheapest so far"
    costs = [row[2] for row in picture.rows if row[0] == "ilp"]
    assert costs == sorted(costs, key=lambda text: float(text.split()[0]), reverse=True)
    tried = charts.tried(cheapest)
    assert "good enough from" in json.dumps(tried.specs[0])
    assert '"label": "budget"' not in json.dumps(tried.specs[0])
    assert '"label": "budget"' in json.dumps(tried.specs[1])
    part = of_run(cheapest, "run", "run")
    assert "Looked for was the cheapest that loses at most 2 points of accuracy." in part.sentences[0]
    assert (
        "is good enough on the search split, and is NOT good enough on the test split, which disagrees." in part.sentences[0]
    )
    facts = {fact.label: fact for fact in part.facts}
    assert facts["Goal"].value == "✗ not on test"
    assert facts["Latency"].detail == "estimated; no budget limits it"


@pytest.mark.parametrize("goal", [False, True])
def test_a_run_that_is_not_finished_names_every_budget_too(goal: bool, tmp_path: Path) -> None:
    folder = write_wide_run(tmp_path / "run", goal=goal, budget=not goal)
    (folder / "result.json").unlink()
    part = of_run(read(folder), "run", "run")
    assert "of at most 40 kB storage and " in part.sentences[0]
    assert "of at most 256 kB peak memory" in part.sentences[0]
    assert ("the cheapest that is good enough so far".capitalize() in part.sentences[0]) == goal
    assert [fact.value for fact in part.facts if fact.label == "Budget"][-2:] == ["40 kB", "256 kB"]
    assert line(read(folder), "run")[-4].count(" of ") == 3 - goal


def test_runs_are_compared_by_what_both_limit(tmp_path: Path) -> None:
    several = [read(write_wide_run(tmp_path / name)) for name in "ab"]
    alone = read(write_run(tmp_path / "c"))
    both = comparisons.together([("a", several[0]), ("b", several[1])])
    assert len(both.specs) == 3
    assert both.title.endswith("accuracy against latency, storage and peak memory")
    mixed = comparisons.together([("a", several[0]), ("c", alone)])
    assert len(mixed.specs) == 1


def test_a_trade_off_is_ranked_by_value_and_cost_in_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    problem = read(folder).problem
    target = problem.uniform8 / 2
    goal = {"kind": "tradeoff", "is": "the largest", "alpha": 0.0, "beta": -1.0, "target": target}
    change(folder / "problem.json", limit=None, goal=goal)
    problem = read(folder).problem
    # MnasNet's hard exponents: no cost counts within the target, and twice the target halves the value.
    assert problem.traded(0.9, target / 2) == problem.traded(0.9, target) == 0.9
    assert problem.traded(0.9, 2 * target) == pytest.approx(0.45)
    assert problem.rank(0.9, 0.1, target) < problem.rank(0.95, 0.1, 1.1 * target)
    assert '"label": "aimed at"' in json.dumps(charts.tried(read(folder)).specs[0])


def test_the_picture_of_a_policy_has_room_for_wide_bars(run: RunFolder, cheapest: RunFolder) -> None:
    from haq.store.records import PolicyRecord

    for one, title in ((run, "1.92 ms of 2.016 ms latency, 1.43 of the reference"), (cheapest, "6.144 ms latency, 4.57 of")):
        figure = pictures.draw_policy(one.problem, PolicyRecord.read(one.folder / "policy.json"))
        axes = figure.axes[0]
        assert axes.get_ylim() == (-14, 14)
        assert "float" in [label.get_text() for label in axes.get_yticklabels()]
        assert title in figure.get_suptitle()
        assert "within 40 kB storage and 256 kB peak memory too" in figure.get_suptitle()


def test_a_policy_that_has_no_cost_is_named(run: RunFolder) -> None:
    policy = json.loads((run.folder / "policy.json").read_text())
    policy["layers"][1] |= {"weight_bits": 2, "activation_bits": None}
    change(run.folder / "policy.json", **policy)
    with pytest.raises(ValueError, match=r"has layer 'layer1' at 2/float \(weights/activations\), which has no cost in"):
        read_folder(run.folder)
