"""What every `python -m haq.X` shares: errors in one sentence, and a console that stays out of the way of `--json`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[], int]) -> int:
    """Run a command; bad input ends it with one sentence on stderr and status 2 (a traceback too if $HAQ_DEBUG is set)."""
    try:
        return main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("HAQ_DEBUG"):
            raise
        # A name from somebody's folder may hold what breaks a line or steers a terminal.
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(error))
        print(f"error: {text}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def follow_training(bar: Progress) -> dict[str, Any]:
    """What `training.finetune` takes to report to a progress bar: epoch, loss, and steps done."""
    task = bar.add_task("fine-tuning", total=None, note="")
    return {
        "on_epoch": lambda epoch, loss: bar.update(task, note=f"epoch {epoch}, loss {loss:.3f}"),
        "on_step": lambda step, steps: bar.update(task, completed=step, total=steps),
    }


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The options of targets that are measured."""
    parser.add_argument("--threads", type=int, help="of measured kernels, for the targets cpu and rpc:HOST:PORT (default: 1)")
    parser.add_argument(
        "--target", metavar="JSON|PROCESSOR", help="TVM's target for measured kernels (default: this machine's processor)"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        default=None,
        help="measure kernels with their data out of the caches (default: in them)",
    )


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Where the workers are."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on a Ray cluster, on every processor or on as many as there are --workers: auto on one of its machines, "
        "HOST:PORT, or local (default: none)",
    )


def check_workers(options: argparse.Namespace) -> None:
    """Raise ValueError if --workers is no number of workers."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; it must be at least 1")


def describe_workers(options: argparse.Namespace) -> str:
    """Who works, in words."""
    if options.ray is not None:
        return f"by {options.workers or 'all'} processors of the Ray cluster {options.ray}"
    return "in this process" if options.workers is None else f"in {options.workers} processes"


def add_objective(parser: argparse.ArgumentParser, objective: str, eps: str) -> None:
    """What policies are judged by; the defaults are told."""
    parser.add_argument(
        "--objective",
        help="what a policy is judged by: accuracy; on images without labels, agreement with the float network; or "
        f"accuracy+robust, right both as images are and under a cheap attack (default: {objective})",
    )
    parser.add_argument(
        "--eps",
        help="of that attack: largest change of a pixel, on the scale of images in [0, 1], such as 8/255 or 0.03 "
        f"(default: {eps})",
    )


def check_eps(options: argparse.Namespace) -> None:
    """Raise ValueError if --eps is given without the objective that it belongs to."""
    if options.eps is not None and options.objective != "accuracy+robust":
        raise ValueError(f"--eps {options.eps} is of an attack: it goes with --objective accuracy+robust")


@contextmanager
def follow_loading(console: Console, what: str) -> Iterator[dict[str, Any]]:
    """Say that something is loading, and show a bar with time left while kernels are compiled and measured.

    Gives the callbacks `progress` and `notice` of `hw_models.load_target`.
    """
    status = console.status(what)
    bar = progress(console)
    task = bar.add_task("kernels", total=None, note="")

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
        yield {"progress": on_progress, "notice": lambda sentence: console.print(sentence, soft_wrap=True, markup=False)}
    finally:
        bar.stop()
        status.stop()


def progress(console: Console) -> Progress:
    """A progress bar with time gone and time left; nothing where the output isn't a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


class Live(Progress):
    """A table that follows a search: a line for each solver, and for what comes after them, whose `note` takes the place of an
    accuracy. Nothing where the output isn't a terminal."""

    COLUMNS = {
        "": TextColumn("{task.description}"),
        "evaluation": MofNCompleteColumn(),
        "accuracy": TextColumn("{task.fields[accuracy]}", justify="right"),
        "of budget": TextColumn("{task.fields[cost]}", justify="right"),
        "best so far": TextColumn("{task.fields[best]}{task.fields[note]}", justify="right"),
        "gone": TimeElapsedColumn(),
        "left": TimeRemainingColumn(),
    }

    def __init__(self, console: Console) -> None:
        super().__init__(*self.COLUMNS.values(), console=console, disable=not console.is_terminal)

    def add_task(self, description: str, *arguments: Any, **fields: Any) -> TaskID:
        return super().add_task(description, *arguments, **{"accuracy": "", "cost": "", "best": "", "note": ""} | fields)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = super().make_tasks_table(tasks)
        table.show_header = True
        for heading, column in zip(self.COLUMNS, table.columns, strict=True):
            column.header = heading
            column.no_wrap = True
        return table
