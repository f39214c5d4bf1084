"""What runs and sweeps there are, from their files alone: without torch, and whatever state they are in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haq.store import files, history
from haq.store.files import CONFIG, HISTORY, LEFTOVERS, LOCK, RESULT, SWEEP
from haq.store.lock import is_held

SENSITIVITIES = "sensitivity"  # the folder in a sweep's
FINISHED, INTERRUPTED, RUNNING, DAMAGED = "finished", "interrupted", "running", "damaged"


@dataclass(frozen=True)
class Entry:
    """A run, or a sweep, as its folder tells.

    state
        finished, interrupted, running (a process holds its lock) or damaged; `reason` says why the last.
    done, asked
        evaluations by the run's own solver, and how many were asked for; of a sweep, searches (asked: at most, until it is
        finished: budgets may be out of reach).
    search, test
        accuracy (or what else the objective is), 0..1: the best within the budget so far, or what was found, on the search
        split, and of what was found, fine-tuned if it was, on the test split.
    """

    folder: Path
    kind: str
    state: str
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    done: int | None = None
    asked: int | None = None
    search: float | None = None
    test: float | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data: what `--json` prints."""
        names = ("network", "data", "hw", "metric", "budget", "solver", "seed", "objective")
        told = {name: self.settings.get(name) for name in names}
        accuracies = {"search_accuracy": self.search, "test_accuracy": self.test}
        counts = {"done": self.done, "asked": self.asked, "bytes": sum(size for _, size in sizes(self.folder))}
        return {"folder": str(self.folder), "kind": self.kind, "state": self.state, "reason": self.reason, **told} | (
            counts | accuracies
        )


def find(folder: Path) -> list[Entry]:
    """What a folder is, a run or a sweep with its runs, or else those in it, by name. Raises FileNotFoundError if there is no
    such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if is_run(folder):
        return [look(folder)]
    inside = [
        path for path in sorted(folder.iterdir()) if path.is_dir() and (is_run(path) or is_sweep(path) or just_created(path))
    ]
    if is_sweep(folder):
        # What it measured for all its searches is no search.
        inside = [folder, *(path for path in inside if path.name != SENSITIVITIES)]
    return [look(path) for path in inside]


def is_run(folder: Path) -> bool:
    return os.path.lexists(folder / CONFIG)


def is_sweep(folder: Path) -> bool:
    return os.path.lexists(folder / SWEEP)


def just_created(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process leaves that is killed while it makes it."""
    names = {path.name for path in folder.iterdir()}
    return bool(names) and names <= LEFTOVERS


def look(folder: Path, *, held: bool = False) -> Entry:
    """What there is to know about one run or sweep; `held`: this process has its lock. Raises FileNotFoundError if the folder
    is neither."""
    if is_sweep(folder):
        read, kind = _sweep, "sweep"
    elif is_run(folder):
        read, kind = _run, "search"
    elif folder.is_dir() and just_created(folder):
        return Entry(folder, "search", RUNNING if not held and is_held(folder) else INTERRUPTED, "it had hardly begun")
    else:
        raise FileNotFoundError(f"{folder} is neither the folder of a run nor of a sweep: it has no {CONFIG} and no {SWEEP}")
    try:
        found = read(folder)
    except (ValueError, OSError) as error:
        found = {"state": DAMAGED, "reason": " ".join(str(error).split())}
    if not held and is_held(folder):
        found["state"] = RUNNING
    return Entry(folder, kind, **found)


def _run(folder: Path) -> dict[str, Any]:
    config = files.read_config(folder)
    settings, solver = config["settings"], config["settings"]["solver"]
    asked = settings.get("evaluations")
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run: setting 'evaluations' must be an integer")
    path = folder / HISTORY
    rows = [row for row in (history.read(path) if path.exists() else []) if row[0] == solver]
    found: dict[str, Any] = {"settings": settings, "config": config, "done": len(rows), "asked": asked}
    if not os.path.lexists(folder / RESULT):
        best = max((float(row[4]) for row in rows if row[7] == "1"), default=None)
        return found | {"state": INTERRUPTED, "search": best}
    result = files.read_result(folder)
    last, key = result["finetuned"] or result["found"], result["objective"]
    accuracies = {"search": result["found"][f"search_{key}"], "test": last[f"test_{key}"]}
    return found | {"state": FINISHED, "result": result, **accuracies}


def _sweep(folder: Path) -> dict[str, Any]:
    path = folder / SWEEP
    content = files.read_json(path, "the file of a sweep")
    files.check_schema(path, content.get("schema"), files.SWEEP_SCHEMA, "the file of a sweep")
    asked: Any = content.get("asked")
    try:
        lists = [asked[name] for name in ("hw", "budgets", "solvers")]
        if not all(isinstance(value, str) for values in lists for value in values) or not isinstance(asked["seeds"], int):
            raise TypeError("'asked' has values of the wrong type")
        # What draws nothing has one seed; no more is said of it here, where the solvers aren't loaded.
        most = len(lists[0]) * len(lists[1]) * len(lists[2]) * asked["seeds"]
        if content["finished"]:
            most = sum(len(row["runs"]) for target in content["targets"].values() for row in target["found"])
        settings = {**asked["settings"]} | {
            name: ",".join(values) for name, values in zip(("hw", "budget", "solver"), lists, strict=True)
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the file of a sweep: {error}") from error
    done = sum(1 for inside in folder.iterdir() if inside.is_dir() and (inside / RESULT).is_file())
    state = FINISHED if content["finished"] else INTERRUPTED
    config = {name: content.get(name, {}) for name in ("signature", "versions")} | {"asked": asked}
    return {"settings": settings, "config": config, "state": state, "done": done, "asked": most}


def sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file in a folder, but for locks, relative to it, with its bytes; links are not followed."""
    for inside, _, names in os.walk(folder):
        for name in sorted(names):
            if name != LOCK:
                path = Path(inside, name)
                yield path.relative_to(folder), path.lstat().st_size
