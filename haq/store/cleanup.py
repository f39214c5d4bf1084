"""What of runs can be deleted, and deleting it: never what is being written, what a link leads to, or what isn't ours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from haq.store.files import (
    CHECKPOINT,
    CONFIG,
    HISTORY,
    LOCK,
    PART,
    POLICY,
    POLICY_PICTURE,
    PROBLEM,
    REPORT,
    RESULT,
    ROBUSTNESS,
    SENSITIVITY,
    SWEEP,
    SWEEP_PICTURE,
    TRIALS,
)
from haq.store.inventory import (
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunSummary,
    find_runs,
    is_just_created,
    is_run,
    is_sweep,
    summarize,
)
from haq.store.lock import holding, is_held

# All that haq writes into the folder of a run or a sweep.
FILES = (
    CONFIG,
    PROBLEM,
    HISTORY,
    POLICY,
    RESULT,
    SENSITIVITY,
    TRIALS,
    SWEEP,
    LOCK,
    POLICY_PICTURE,
    SWEEP_PICTURE,
    REPORT,
)
EXPORTED = ("network.onnx", "network-qonnx.onnx", "onnx.onnx", "qonnx.onnx")  # the last two by earlier versions
PATTERNS = (*FILES, *(f"{name}{PART}" for name in FILES), "events.*", *EXPORTED)
FOLDERS = (CHECKPOINT.parent.name, ROBUSTNESS.name, "deployed")
# What can be made again by haq.search, haq.finetune and haq.robustness, and is most of a run's bytes. A fine-tuning's state
# is not among them: it may be one that somebody means to go on with.
REMAKEABLE = (
    f"{CHECKPOINT.parent}/*.safetensors",
    f"{CHECKPOINT.parent}/ddpg.state",
    f"{CHECKPOINT.parent}/td3.state",
    f"{CHECKPOINT.parent}/sac.state",
    f"{ROBUSTNESS}/*.safetensors",
    f"{ROBUSTNESS}/*.npz",
    f"*{PART}",
)
SECONDS_OF_A_DAY = 24 * 3600


@dataclass(frozen=True)
class Removal:
    """What is to be deleted of a run: some files, or all of its folder. Or why it is left alone.

    Attributes:
        run: The run or sweep.
        what: What it is that is deleted, in words.
        paths: The files.
        whole_folder: The folder goes too.
        kept_because: Why nothing is deleted; then there are no files.
    """

    run: RunSummary
    what: str = ""
    paths: tuple[Path, ...] = ()
    whole_folder: bool = False
    kept_because: str = ""

    @property
    def bytes(self) -> int:
        """Add up the bytes of the files."""
        return sum(path.lstat().st_size for path in self.paths)


def plan_removals(folder: Path, *, unfinished: bool, checkpoints: bool, older_than_days: float | None = None) -> list[Removal]:
    """Choose what of the runs in a folder is to go; nothing is deleted.

    Args:
        folder: A run, a sweep, or a folder of them.
        unfinished: Interrupted runs and sweeps go, all of them.
        checkpoints: Of finished ones, networks, agents and attacks go.
        older_than_days: Only what was last written so long ago.

    Returns:
        What is to go, and what of the same kind is left alone and why.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    runs = find_runs(folder)
    if is_run(folder) or (runs and runs[0].folder == folder):
        runs = runs[:1]  # a sweep goes as a whole
    removals = []
    for run in runs:
        if older_than_days is not None and not _is_older(run.folder, older_than_days):
            continue
        removal = _removal(run, unfinished=unfinished, checkpoints=checkpoints)
        if removal is not None:
            removals.append(removal)
    return removals


def remove(removal: Removal) -> bool:
    """Delete what was chosen, while holding the run's lock.

    Returns False, and nothing is deleted, if another process holds it, or if it isn't any more what it was.
    """
    folder = removal.run.folder
    try:
        with holding(folder / LOCK, folder, "the same command", wait_s=0):
            orphans = any(is_held(path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
            now = summarize(folder, held=True)
            if orphans or now.state != removal.run.state:
                return False
            if removal.whole_folder and _remove_folder(now).kept_because:
                return False
            for path in removal.paths:
                path.unlink(missing_ok=True)
            if removal.whole_folder:
                shutil.rmtree(folder)  # empty folders, and the lock
    except BlockingIOError:
        return False
    return True


def _removal(run: RunSummary, *, unfinished: bool, checkpoints: bool) -> Removal | None:
    """Choose what of one run or sweep is to go; None if it isn't asked for."""
    if run.state == RUNNING or is_held(run.folder):
        return Removal(run, kept_because="it is being written")
    if run.folder.is_symlink():
        return Removal(run, kept_because="it is a symbolic link")
    if unfinished and run.kind == "search" and is_sweep(run.folder.resolve().parent):
        return Removal(run, kept_because="it is part of a sweep, which goes as a whole")
    if unfinished and run.state == INTERRUPTED:
        return _remove_folder(run)
    if checkpoints and run.state == FINISHED:
        paths = tuple(_remakeable(run))
        if paths:
            return Removal(run, "networks, agents and attacks", paths)
    return None


def _remove_folder(run: RunSummary) -> Removal:
    paths = tuple(_files(run.folder))
    for path in paths:
        name = path.relative_to(run.folder)
        if not _is_ours(run, name):
            return Removal(run, kept_because=f"{name} in it isn't of haq")
    return Removal(run, "all of it", paths, whole_folder=True)


def _remakeable(run: RunSummary) -> Iterator[Path]:
    folders = [run.folder]
    if run.kind == "sweep":
        folders += [path for path in sorted(run.folder.iterdir()) if not path.is_symlink() and is_run(path)]
    for folder in folders:
        for path in _files(folder):
            if any(fnmatch(str(path.relative_to(folder)), pattern) for pattern in REMAKEABLE):
                yield path


def _is_ours(run: RunSummary, path: Path) -> bool:
    """Tell whether haq writes a file of that name, relative to the folder of a run or a sweep."""
    first = run.folder / path.parts[0]
    if run.kind == "sweep" and len(path.parts) > 1 and (is_run(first) or is_just_created(first)):
        path = Path(*path.parts[1:])
    if len(path.parts) > 1:
        return path.parts[0] in FOLDERS
    return any(fnmatch(path.name, pattern) for pattern in PATTERNS)


def _files(folder: Path) -> Iterator[Path]:
    """List all files, and links as they are, in a folder; nothing that a link leads to."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _is_older(folder: Path, days: float) -> bool:
    last = max(path.lstat().st_mtime for path in (folder, *_files(folder)))
    return time.time() - last > days * SECONDS_OF_A_DAY
