"""What commands show while they work: bars with time gone and left, and a table that follows a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from haq.console.tables import plain, say
from haq.store.units import PERCENT, show

EVERY = 60.0  # seconds between two lines of progress where the output isn't a terminal
PACE_S = 3600.0  # what time is left is told by the pace of so many seconds: steps may be minutes long


class Bars(Progress):
    """Bars in a terminal; where the output goes to a file or a pipe, a line a minute says how far the work is."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        """Show columns on a console."""
        super().__init__(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=PACE_S)
        self._said = self.get_time()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Say what has changed of a line, as Rich does, and print it if it is time to."""
        super().update(task_id, **fields)
        now = self.get_time()
        if not self.disable or now - self._said < EVERY:
            return
        task = next(task for task in self.tasks if task.id == task_id)
        if task.finished:
            return
        self._said = now
        self.console.print(self.sentence(task), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def sentence(self, task: Task) -> str:
        """Say how far a task is: what it is, how much of it is done, time gone and time left."""
        words = f"{task.description}: {task.completed:.0f}"
        if task.total is not None:
            words += f" of {task.total:.0f}"
        words += f", {_clock(task.elapsed or 0)} gone"
        if task.time_remaining is not None:
            words += f", about {_clock(task.time_remaining)} left"
        if task.fields.get("best"):
            words += f"; best so far {task.fields['best']}"
        if task.fields.get("note"):
            words += f"; {task.fields['note']}"
        return words


def _clock(seconds: float) -> str:
    """Write hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def progress(console: Console) -> Progress:
    """Make a progress bar with time gone and time left; where the output isn't a terminal, it prints a line a minute."""
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}", markup=False),
        console=console,
    )


def follow_training(bar: Progress, unit: str = PERCENT) -> dict[str, Any]:
    """Make the callbacks by which `training.finetune` reports epoch, loss and steps to a progress bar.

    Args:
        bar: Where they are shown.
        unit: Of what held-out samples are judged by.

    Returns:
        The callbacks, by their names.
    """
    task = bar.add_task("fine-tuning", total=None, note="")
    value = 0.0

    def on_epoch(epoch: int, loss: float) -> None:
        bar.update(task, note=f"epoch {epoch}, loss {loss:.3f}, held-out {show(value, unit, 1)}")

    def on_judged(epoch: int, judgement: tuple[float, float]) -> None:
        nonlocal value
        value = judgement[0]

    def on_step(step: int, steps: int) -> None:
        bar.update(task, completed=step, total=steps)

    return {"on_epoch": on_epoch, "on_step": on_step, "on_judged": on_judged}


def follow_steps(bar: Progress, what: str) -> Callable[[int, int, str], None]:
    """Make the callback by which calibration and reconstruction report how many of how many steps are done, and of what."""
    line = bar.add_task(what, total=None, note="")

    def on_progress(done: int, total: int, note: str) -> None:
        bar.update(line, completed=done, total=total, note=note)

    return on_progress


@contextmanager
def follow_loading(console: Console, what: str) -> Iterator[dict[str, Any]]:
    """Say that something is loading, and show a bar with time left while kernels are measured, or a network is calibrated.

    Args:
        console: Where it is shown.
        what: What is being done: "loading network and data".

    Yields:
        The callbacks `progress` and `notice` of `hw_models.load_target`; the first is also one of `quantizers.quantize`.
    """
    status = console.status(what)
    bar = progress(console)
    task = bar.add_task("steps", total=None, note="")

    def on_progress(done: int, total: int, note: str) -> None:
        # There is one live display at a time.
        if done < total:
            status.stop()
            bar.start()
        bar.update(task, completed=done, total=total, note=note)
        if done == total:
            bar.stop()
            status.start()

    status.start()
    try:
        yield {"progress": on_progress, "notice": lambda sentence: say(console, sentence)}
    finally:
        bar.stop()
        status.stop()


class Live(Bars):
    """A table that follows a search, with a line for each solver and for what comes after them.

    Such later work has a `note`, which takes the place of a value.
    """

    COLUMNS = {
        "": TextColumn("{task.description}", markup=False),
        "evaluation": MofNCompleteColumn(),
        "accuracy": TextColumn("{task.fields[accuracy]}", justify="right", markup=False),
        "of budget": TextColumn("{task.fields[cost]}", justify="right", markup=False),
        "best so far": TextColumn("{task.fields[best]}{task.fields[note]}", justify="right", markup=False),
        "gone": TimeElapsedColumn(),
        "left": TimeRemainingColumn(),
    }

    def __init__(self, console: Console, title: str = "accuracy") -> None:
        """Show the table on a console; `title` is what the objective is called."""
        self.headings = list(self.COLUMNS)
        self.headings[self.headings.index("accuracy")] = title
        super().__init__(*self.COLUMNS.values(), console=console)

    def add_task(self, description: str, *arguments: Any, **fields: Any) -> TaskID:
        """Add a line; its fields are empty until they are updated."""
        return super().add_task(description, *arguments, **{"accuracy": "", "cost": "", "best": "", "note": ""} | fields)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Put a heading above every column."""
        table = super().make_tasks_table(tasks)
        table.show_header = True
        for heading, column in zip(self.headings, table.columns, strict=True):
            column.header = plain(heading)
            column.no_wrap = True
        return table
