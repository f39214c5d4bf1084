"""A search can be followed: a table on a terminal, the same in TensorBoard, nothing where nobody looks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from haq import search
from haq.console import output
from haq.console.progress import Live, progress
from tests.commands.test_search_command import AGENTS, SMALL, call, history, place  # noqa: F401


def test_the_table_has_a_line_for_each_solver_and_tells_what_there_is_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(output, "Console", lambda **options: console)
    assert call(search.main, *AGENTS, "--out", "run") == 0
    shown = screen.getvalue()
    for heading in Live.COLUMNS:
        assert heading in shown
    last = shown[shown.rindex("of budget") : shown.rindex("Bits per layer")].splitlines()
    lines = {line.split()[0]: " ".join(line.split()) for line in last if line.split()}
    rows = [row for row in history(Path("run")) if row["solver"] == "ddpg"]
    assert f"ddpg {len(rows)}/{len(rows)} {100 * float(rows[-1]['accuracy']):.2f} %" in lines["ddpg"]
    best = max(float(row["accuracy"]) for row in rows if row["within_budget"] == "1")
    limit = json.loads(Path("run/result.json").read_text())["budget"]["limit"]
    assert f"{float(rows[-1]['cost']) / limit:.3f} {100 * best:.2f} %" in lines["ddpg"]
    assert lines["greedy"].split()[1] == lines["ilp"].split()[1]
    assert "epoch 1, loss" in lines["fine-tuning"]


def test_it_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Live(console) as live:
        live.add_task("evolution", total=100000, accuracy="92.30 %", cost="0.998", best="92.50 %")
        table = live.make_tasks_table(live.tasks)
    assert console.measure(table).minimum <= 80


def test_without_a_terminal_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *AGENTS, "--out", "run") == 0
    out, err = capsys.readouterr()
    assert "of budget" not in out + err
    assert "━" not in out + err
    assert call(search.main, *AGENTS, "--solver", "random", "--out", "other", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(Path("other/result.json").read_text())
    assert "━" not in err


def test_into_a_file_goes_a_line_a_minute() -> None:
    now = 100.0
    written = io.StringIO()
    console = Console(file=written, width=80, get_time=lambda: now)
    bars = Live(console)
    task = bars.add_task("ddpg", total=200, accuracy="92.20 %", cost="0.998", best="92.30 %")
    for done in range(200):
        now += 1.5
        bars.update(task, completed=done + 1)
    said = written.getvalue().splitlines()
    assert len(said) == 4  # of five minutes; at the end there is nothing to wait for
    assert said[1] == "ddpg: 80 of 200, 0:02:00 gone, about 0:03:00 left; best so far 92.30 %"
    slow = bars.add_task("slow", total=10)
    for done in range(3):  # of minutes each
        now += 120
        bars.update(slow, completed=done + 1)
    assert written.getvalue().splitlines()[-1] == "slow: 3 of 10, 0:06:00 gone, about 0:14:00 left"
    said = written.getvalue().splitlines()
    quiet = progress(Console(file=written, quiet=True, get_time=lambda: now))
    now += 100
    quiet.update(quiet.add_task("steps", total=None, note="[stem]"), completed=3)
    assert len(written.getvalue().splitlines()) == len(said)
    loud = progress(console)
    number = loud.add_task("steps", total=None, note="[stem]")
    now += 100
    loud.update(number, completed=3)
    assert written.getvalue().splitlines()[-1] == "steps: 3, 0:01:40 gone; [stem]"


def test_the_same_goes_to_tensorboard() -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert (
        call(search.main, *SMALL, "--solver", "random", "--evaluations", "12", "--finetune-epochs", "0", "--out", "run") == 0
    )
    events = loading.EventAccumulator("run")
    events.Reload()
    rows = [row for row in history(Path("run")) if row["solver"] == "random"]
    limit = json.loads(Path("run/result.json").read_text())["budget"]["limit"]

    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(f"random/{tag}")]

    steps = list(range(1, len(rows) + 1))
    assert scalars("accuracy") == [(i, pytest.approx(float(row["accuracy"]))) for i, row in zip(steps, rows, strict=True)]
    shares = [(i, pytest.approx(float(row["cost"]) / limit)) for i, row in zip(steps, rows, strict=True)]
    assert scalars("share_of_budget") == shares
    best = [max(float(row["accuracy"]) for row in rows[:i]) for i in steps]
    assert scalars("best_accuracy") == [(i, pytest.approx(value)) for i, value in zip(steps, best, strict=True)]
    left = scalars("seconds_left")
    assert [step for step, _ in left] == steps[1:]
    assert left[-1] == (len(rows), 0.0)
