"""Pages, charts, tables and lists say what policies are judged by: its name, its unit, and which values are better."""

from __future__ import annotations

import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from haq import report, runs
from haq.reporting import pictures, reading
from haq.reporting.charts import convergence, tried
from haq.reporting.drawing import edge_of, edge_words, is_beyond, scale_of, within
from haq.store.records import FinishedSweepRecord, ObjectiveRecord, SweepRecord
from haq.study import sweep_tables
from tests.reporting.judged_runs import ALL, ERROR, LOSS, PSNR, Judged, write_judged, write_sweep
from tests.reporting.test_report import Page, drawn

each = pytest.mark.parametrize("judged", ALL, ids=[judged.name for judged in ALL])
# Shares of samples are written with two digits behind the point, those of costs with one.
SHARE = re.compile(r"\.\d\d %|\bpoints?\b")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record_of(judged: Judged) -> ObjectiveRecord:
    return ObjectiveRecord(objective=judged.name, **judged.fields)


@functools.cache
def page_of(judged: Judged) -> Page:
    """The report of a finished run, one that was interrupted, and a sweep."""
    folders = [write_judged(Path("run"), judged), write_judged(Path("cut"), judged, finished=False)]
    folders.append(write_sweep(Path("swept"), judged))
    assert report.main([*map(str, folders), "--out", "page.html"]) == 0
    return Page(Path("page.html"))


def titles(spec: Any) -> set[str]:
    """The titles of all axes and tooltips of charts."""
    found = set()
    if isinstance(spec, list):
        for one in spec:
            found |= titles(one)
    elif isinstance(spec, dict):
        for key, one in spec.items():
            if key == "title" and isinstance(one, str):
                found.add(one)
            elif key != "data":
                found |= titles(one)
    return found


def ending(judged: Judged) -> str:
    """What follows an objective in the title of an axis."""
    words = ""
    if judged.unit:
        words += f", {judged.unit}"
    if not judged.higher_is_better:
        words += ", lower is better"
    return words


@each
def test_a_page_calls_nothing_accuracy_that_is_none(judged: Judged) -> None:
    page = page_of(judged)
    assert "accura" not in page.text.lower()
    assert "accura" not in json.dumps(page.specs).lower()
    assert bool(SHARE.search(page.text)) == (judged.unit == "%")
    named = judged.title
    if named in ("PSNR", "negative log-likelihood"):
        named = named[0].upper() + named[1:]
    assert f"Data: {named} against latency: every policy tried" in page.tables
    assert f"{named} is measured on the search split" in page.text
    assert f"1,000 {judged.samples_are}" in page.text


@each
def test_values_and_axes_have_their_unit_on_every_chart(judged: Judged) -> None:
    specs = list(page_of(judged).specs.values())
    values = [row["is"] for row in drawn(specs) if "is" in row]
    assert len(values) > 50
    assert all(value.endswith(f" {judged.unit}".rstrip()) for value in values)
    if not judged.unit:
        assert all(float(value.replace("∞", "inf")) > 0 for value in values)
    axes = {f"{judged.title} on the search split", f"best {judged.title} so far"}
    wanted = {f"{axis}{ending(judged)}" for axis in axes}
    wanted.add(f"test {judged.title}{ending(judged)} (measured)")
    assert wanted <= titles(specs)


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        (PSNR, f"29.35 dB PSNR on the test split, {0.0118 * 19:.3g} dB below float"),
        (LOSS, f"0.8034 nats negative log-likelihood on the test split, {0.0118 * 3.5:.3g} nats worse than float"),
        (ERROR, f"0.08716 my_error on the test split, {0.0118 * 0.89:.3g} worse than float"),
        (ALL[3], "91.33 % mIoU on the test split, 1.18 points below float"),
    ],
)
def test_the_verdict_is_in_words_of_the_direction(judged: Judged, words: str) -> None:
    write_judged(Path("run"), judged)
    assert report.main(["run"]) == 0
    assert f"The policy found by ddpg has {words}; fine-tuned" in Page(Path("run/report.html")).text


@each
def test_what_is_worst_is_drawn_at_the_edge_of_its_side(judged: Judged) -> None:
    run = reading.read_folder(write_judged(Path("run"), judged))
    assert isinstance(run, reading.RunFolder)
    picture = tried(run)
    marks = {(row["policy"], row["evaluation"]): row["y"] for row in drawn(picture.specs[0]) if "evaluation" in row}
    worst_of, best_of, side = min, max, "lower"
    if not judged.higher_is_better:
        worst_of, best_of, side = max, min, "upper"
    edge = worst_of(marks.values())
    for one in run.history:
        y = marks[one.solver, one.evaluation]
        assert y == edge or y == pytest.approx(run.problem.plotted(one.accuracy), rel=1e-4)
    assert list(marks.values()).count(edge) > 1
    assert f"drawn at the {side} edge" in picture.note
    # What is best of all is on the front, the last of its steps; and it is what lines end with.
    best = best_of(one.accuracy for one in run.history)
    on_front = [row[2] for row in picture.rows if row[5]]
    assert run.problem.show(best) in on_front
    lines = [row["y"] for row in drawn(convergence(run).specs[0]) if row.get("solver") == "ddpg"]
    within_budget = [one.accuracy for one in run.history if one.solver == "ddpg" and one.within_budget]
    assert best_of(lines) == pytest.approx(run.problem.plotted(best_of(within_budget)), rel=1e-4)
    assert lines[0] != lines[-1]


def test_edges_and_scales_of_either_direction() -> None:
    higher = ObjectiveRecord(objective="a", objective_unit="dB")
    lower = ObjectiveRecord(objective="b", objective_unit="", higher_is_better=False)
    values = [30.0, 29.9, 29.8, 29.7, 5.0, float("-inf")]
    edge = edge_of(higher, values)
    assert 29.0 < edge < 29.7
    assert edge_of(lower, [-value for value in values]) == -edge
    assert edge_of(higher, []) == 0.0
    assert is_beyond(higher, 5.0, edge)
    assert is_beyond(lower, float("inf"), -edge)
    assert not is_beyond(lower, -40.0, -edge)
    assert within(higher, 5.0, edge) == edge
    assert within(lower, float("inf"), -edge) == -edge
    assert within(lower, -40.0, -edge) == -40.0
    assert edge_words(higher, 29.3, "are") == "below 29.3 dB are drawn at the lower edge"
    assert edge_words(lower, 0.5, ", are") == "above 0.5, are drawn at the upper edge"
    low, high = scale_of(higher, 29.0, 30.0).domain
    assert low < 29.0
    assert high > 30.0
    low, high = scale_of(lower, 0.5, 0.01).domain
    assert low == 0.0  # an error isn't negative
    assert high > 0.5
    low, high = scale_of(lower, 0.0, 0.0).domain
    assert low < high


@each
def test_lists_and_comparisons_of_runs(judged: Judged, capsys: pytest.CaptureFixture[str]) -> None:
    write_judged(Path("runs/a"), judged)
    write_judged(Path("runs/cut"), judged, finished=False)
    test = record_of(judged).show(judged.of(0.9224))
    told = {}
    for arguments in (["list"], ["show", "runs/a"], ["show", "runs/cut"], ["compare", "runs/a", "runs/cut"]):
        assert runs.main(arguments) == 0
        told[" ".join(arguments)] = out = " ".join(capsys.readouterr().out.split())
        assert "accurac" not in out.lower()
        assert ("%" in out) == (judged.unit == "%")
    assert test in told["list"]
    assert f"{test} test {judged.title} (measured)" in told["show runs/a"]
    assert f"test {judged.title}, fine-tuned" in told["compare runs/a runs/cut"]
    assert test in told["compare runs/a runs/cut"]


@each
def test_the_table_of_a_sweep(judged: Judged) -> None:
    sweep = SweepRecord.read(write_sweep(Path("swept"), judged) / "sweep.json")
    assert isinstance(sweep, FinishedSweepRecord)
    console = Console(width=200, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        sweep_tables.print_result(console, sweep)
    text = captured.get()
    assert "accurac" not in text.lower()
    assert ("%" in text) == (judged.unit == "%")
    assert f"1,000 test and 1,000 search {judged.samples_are}" in text
    assert f"float: {record_of(judged).show(judged.of(0.92))} on the test split" in text
    assert f"has a better test {judged.title}" in text


@each
def test_the_picture_of_a_sweep(judged: Judged) -> None:
    sweep = SweepRecord.read(write_sweep(Path("swept"), judged) / "sweep.json")
    assert isinstance(sweep, FinishedSweepRecord)
    axes = pictures.draw_sweep(sweep).axes[0]
    assert axes.get_ylabel() == f"test {judged.title}{ending(judged)} (measured)"
    side = "down"
    if not judged.higher_is_better:
        side = "up"
    lines = {str(line.get_label()): line.get_ydata() for line in axes.lines}
    assert f"uniform bits (some lie further {side})" in lines
    assert lines["float"][0] == pytest.approx(record_of(judged).plotted(judged.of(0.92)))


def test_what_is_not_said_is_as_it_is_for_accuracy() -> None:
    record = ObjectiveRecord(objective="accuracy")
    assert (record.objective_title, record.show(0.9133), record.on_axis("accuracy")) == ("accuracy", "91.33 %", "accuracy, %")
    assert record.held_against(0.9133, 0.9251) == "1.18 points below"
    assert record.differences() == {}


def test_an_overview_names_objectives_that_are_not_accuracy() -> None:
    write_judged(Path("all/a"), PSNR)
    write_judged(Path("all/b"), LOSS)
    assert report.main(["all/a", "all/b"]) == 0
    head, *rows = Page(Path("all/report.html")).tables["Runs and sweeps"]
    assert [row[head.index("objective")] for row in rows] == [PSNR.title, LOSS.title]
