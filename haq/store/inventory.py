"""What runs and sweeps there are, from their files alone: without torch, and whatever state they are in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haq.store import history
from haq.store.files import CONFIG, HISTORY, LEFTOVERS, LOCK, PROBLEM, RESULT, SENSITIVITIES, SWEEP
from haq.store.history import HistoryRow
from haq.store.lock import is_held
from haq.store.records import (
    ConfigRecord,
    FinishedSweepRecord,
    JudgingRecord,
    ProblemRecord,
    ResultRecord,
    SweepRecord,
    objective_title,
)
from haq.store.units import PERCENT, finite, show

FINISHED, INTERRUPTED, RUNNING, DAMAGED = "finished", "interrupted", "running", "damaged"


@dataclass(frozen=True)
class RunSummary:
    """A run, or a sweep, as its folder tells.

    Attributes:
        folder: Where it is.
        kind: "search" or "sweep".
        state: finished, interrupted, running (not finished, and a process holds its lock) or damaged; `reason` says why it
            is that.
        settings: What was asked for, by the names of a search's options; of a sweep, lists parted by commas.
        config: The file of a run that says what it was asked for.
        sweep: The file of a sweep.
        result: What a finished search found.
        done: Evaluations by the run's own solver; of a sweep, finished searches.
        asked: How many were asked for; of a sweep, at most, until it is finished: budgets may be out of reach.
        judging: What says unit and direction of the objective; None where nothing has been said of it yet.
        search: The objective's value on the search split: the best within the budget so far, or what was found.
        test: Its value on the test split of what was found, fine-tuned if it was.
    """

    folder: Path
    kind: str
    state: str
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: ConfigRecord | None = None
    sweep: SweepRecord | None = None
    result: ResultRecord | None = None
    done: int | None = None
    asked: int | None = None
    judging: JudgingRecord | None = None
    search: float | None = None
    test: float | None = None

    @property
    def signature(self) -> dict[str, str]:
        """Return what network, data and target were, by name."""
        record = self.config or self.sweep
        return record.signature if record else {}

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions that it began with, by package."""
        record = self.config or self.sweep
        return record.versions if record else {}

    @property
    def objective(self) -> str:
        """Name what policies are judged by."""
        return str(self.settings.get("objective", "accuracy"))

    @property
    def objective_title(self) -> str:
        """Name what policies are judged by in a word or two."""
        if self.judging is None:
            return objective_title(self.objective)
        return self.judging.objective_title

    @property
    def objective_unit(self) -> str:
        """Return the objective's unit."""
        if self.judging is None:
            return PERCENT
        return self.judging.objective_unit

    @property
    def higher_is_better(self) -> bool:
        """Return the objective's direction."""
        return self.judging is None or self.judging.higher_is_better

    def show(self, value: float | None) -> str:
        """Write a value of the objective with its unit."""
        return show(value, self.objective_unit)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what `list --json` prints."""
        names = (
            "network",
            "data",
            "hw",
            "metric",
            "budget",
            "max_drop",
            "at_least",
            "tradeoff",
            "solver",
            "seed",
            "objective",
        )
        given = {name: self.settings[name] for name in ("prune", "criterion") if name in self.settings}
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "state": self.state,
            "reason": self.reason,
            **{name: self.settings.get(name) for name in names},
            **given,
            "done": self.done,
            "asked": self.asked,
            "bytes": sum(size for _, size in file_sizes(self.folder)),
            "search_accuracy": finite(self.search),
            "test_accuracy": finite(self.test),
            "objective_title": self.objective_title,
            "objective_unit": self.objective_unit,
            "higher_is_better": self.higher_is_better,
        }


def find_runs(folder: Path) -> list[RunSummary]:
    """Summarize what a folder is, a run or a sweep with its runs, or else those in it, by name.

    Raises FileNotFoundError if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if is_run(folder):
        return [summarize(folder)]
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    inside = [path for path in folders if is_run(path) or is_sweep(path) or is_just_created(path)]
    if is_sweep(folder):
        # What it measured for all its searches is no search.
        inside = [folder, *(path for path in inside if path.name != SENSITIVITIES)]
    return [summarize(path) for path in inside]


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's."""
    return os.path.lexists(folder / CONFIG)


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder is a sweep's."""
    return os.path.lexists(folder / SWEEP)


def is_just_created(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a process leaves that is killed while it makes it."""
    names = {path.name for path in folder.iterdir()}
    return bool(names) and names <= LEFTOVERS


def summarize(folder: Path, *, held: bool = False) -> RunSummary:
    """Say all there is to know of one run or sweep.

    Args:
        folder: Its folder.
        held: This process has its lock.

    Returns:
        The summary; of what can't be read, as damaged and with the reason.

    Raises:
        FileNotFoundError: If the folder is neither's.
    """
    running = not held and is_held(folder)
    if is_sweep(folder):
        read, kind = _read_sweep, "sweep"
    elif is_run(folder):
        read, kind = _read_run, "search"
    elif folder.is_dir() and is_just_created(folder):
        state = RUNNING if running else INTERRUPTED
        return RunSummary(folder, "search", state, "it had hardly begun")
    else:
        raise FileNotFoundError(f"{folder} is neither the folder of a run nor of a sweep: it has no {CONFIG} and no {SWEEP}")
    try:
        found = read(folder)
    except (ValueError, OSError) as error:
        found = {"state": DAMAGED, "reason": " ".join(str(error).split())}
    if running and found["state"] != FINISHED:  # what holds a finished run, such as a backup, doesn't search
        found["state"] = RUNNING
    return RunSummary(folder, kind, **found)


def file_sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """List every file in a folder, but for locks, relative to it, with its bytes; links are not followed."""
    for inside, _, names in os.walk(folder):
        for name in sorted(names):
            if name != LOCK:
                path = Path(inside, name)
                yield path.relative_to(folder), path.lstat().st_size


def _read_run(folder: Path) -> dict[str, Any]:
    config = ConfigRecord.read(folder / CONFIG)
    result: ResultRecord | None = None
    judging: JudgingRecord | None = None
    if os.path.lexists(folder / RESULT):
        judging = result = ResultRecord.read(folder / RESULT)
    elif os.path.lexists(folder / PROBLEM):
        judging = ProblemRecord.read(folder / PROBLEM)
    rows = []
    if (folder / HISTORY).exists():
        limits = history.SHARES
        if judging is not None:
            limits = history.Limits.of(judging)
        may_be_returned = (config.solver, history.SHARED)
        rows = [row for row in history.read(folder / HISTORY, limits=limits) if row.solver in may_be_returned]
    found: dict[str, Any] = {
        "settings": config.settings,
        "config": config,
        "done": sum(row.solver == config.solver for row in rows),
        "asked": config.evaluations,
        "judging": judging,
    }
    if result is not None:
        return found | {
            "state": FINISHED,
            "result": result,
            "search": result.value(result.found, "search"),
            "test": result.value(result.last, "test"),
        }
    within = [row for row in rows if row.within_budget and row.whole]
    best = None
    if within:
        best = min(within, key=lambda row: _rank(row, judging)).accuracy
    return found | {"state": INTERRUPTED, "search": best}


def _rank(row: HistoryRow, judging: JudgingRecord | None) -> tuple[float, float, float]:
    """Order policies that may be chosen, better ones first, as far as it is known what is looked for."""
    if isinstance(judging, ProblemRecord):
        return judging.rank(row.accuracy, row.loss, row.cost)
    return row.rank_by(judging is None or judging.higher_is_better)


def _read_sweep(folder: Path) -> dict[str, Any]:
    sweep = SweepRecord.read(folder / SWEEP)
    asked = sweep.asked
    state = INTERRUPTED
    judging: JudgingRecord | None = None
    # What draws nothing has one seed; no more is said of it here, where the solvers aren't loaded.
    most = len(asked.hw) * (len(asked.budgets) + len(asked.max_drops)) * len(asked.solvers) * asked.seeds
    if isinstance(sweep, FinishedSweepRecord):
        state = FINISHED
        judging = sweep
        most = sum(len(found.runs) for found in sweep.found)
    lists = {"hw": asked.hw, "budget": asked.budgets, "solver": asked.solvers}
    if asked.max_drops:
        lists["max_drop"] = asked.max_drops
    return {
        "settings": {**asked.settings, **{name: ",".join(values) for name, values in lists.items()}},
        "sweep": sweep,
        "judging": judging,
        "state": state,
        "done": sum((inside / RESULT).is_file() for inside in folder.iterdir() if inside.is_dir()),
        "asked": most,
    }
