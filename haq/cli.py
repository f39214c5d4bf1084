"""What every `python -m haq.X` shares: errors in one sentence, and a console that stays out of the way of `--json`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[], int]) -> int:
    """Run a command; bad input ends it with one sentence on stderr and status 2 (a traceback too if $HAQ_DEBUG is set)."""
    try:
        return main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("HAQ_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
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


def progress(console: Console) -> Progress:
    """A progress bar with time gone and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
        console=console,
    )
