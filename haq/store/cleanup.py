"""What of runs can be deleted, and deleting it: never what is being written, what a link leads to, or what isn't ours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from haq.store.files import CHECKPOINT, CONFIG, HISTORY, LOCK, POLICY, PROBLEM, RESULT, ROBUSTNESS, SENSITIVITY, SWEEP
from haq.store.inventory import FINISHED, INTERRUPTED, RUNNING, Entry, find, is_run, is_sweep, just_created, look
from haq.store.lock import holding, is_held

# All that haq writes into the folder of a run or a sweep.
FILES = (CONFIG, PROBLEM, HISTORY, POLICY, RESULT, SENSITIVITY, SWEEP, LOCK, "policy.png", "sweep.png", "report.html")
PATTERNS = (*FILES, *(f"{name}.part" for name in FILES), "events.*", "onnx.onnx", "qonnx.onnx")
PARTS = (CHECKPOINT.parent.name, ROBUSTNESS.name, "deployed")
# What can be made again by haq.search, haq.finetune and haq.robustness, and is most of a run's bytes.
AGENTS = tuple(f"{CHECKPOINT.parent}/{solver}.state" for solver in ("ddpg", "td3", "sac"))
REMAKEABLE = (f"{CHECKPOINT.parent}/*.safetensors", *AGENTS, f"{ROBUSTNESS}/*.safetensors", f"{ROBUSTNESS}/*.npz", "*.part")


@dataclass(frozen=True)
class Victim:
    """What is to be deleted of a run: some files, or all of its folder. Or why it is left alone."""

    entry: Entry
    what: str
    paths: tuple[Path, ...] = ()
    whole: bool = False
    spared: str = ""

    @property
    def bytes(self) -> int:
        return sum(path.lstat().st_size for path in self.paths)


def choose(folder: Path, *, unfinished: bool, checkpoints: bool, older_than_days: float | None = None) -> list[Victim]:
    """What of the runs in a folder is to go. Raises FileNotFoundError if there is no such folder."""
    entries = find(folder)
    if is_run(folder) or (entries and entries[0].folder == folder):
        entries = entries[:1]  # a sweep goes as a whole
    found = []
    for entry in entries:
        if older_than_days is not None and not _older(entry.folder, older_than_days):
            continue
        if entry.state == RUNNING:
            found.append(Victim(entry, "", spared="it is being written"))
        elif entry.folder.is_symlink():
            found.append(Victim(entry, "", spared="it is a symbolic link"))
        elif entry.kind == "search" and unfinished and is_sweep(entry.folder.resolve().parent):
            found.append(Victim(entry, "", spared="it is part of a sweep, which goes as a whole"))
        elif entry.state == INTERRUPTED and unfinished:
            found.append(_whole(entry))
        elif entry.state == FINISHED and checkpoints and (paths := tuple(_remakeable(entry))):
            found.append(Victim(entry, "networks, agents and attacks", paths))
    return found


def delete(victim: Victim) -> bool:
    """Delete what was chosen, while holding the run's lock. False, and nothing is deleted, if another process holds it, or if
    it isn't any more what it was."""
    folder = victim.entry.folder
    try:
        with holding(folder / LOCK, folder, "the same command", wait_s=0):
            orphans = any(is_held(path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
            now = look(folder, held=True)
            if orphans or now.state != victim.entry.state or (victim.whole and _whole(now).spared):
                return False
            for path in victim.paths:
                path.unlink(missing_ok=True)
            if victim.whole:
                shutil.rmtree(folder)  # empty folders, and the lock
    except BlockingIOError:
        return False
    return True


def _whole(entry: Entry) -> Victim:
    paths = tuple(_files(entry.folder))
    if foreign := [path for path in paths if not _ours(entry, path.relative_to(entry.folder))]:
        name = foreign[0].relative_to(entry.folder)
        return Victim(entry, "", spared=f"{name} in it isn't of haq")
    return Victim(entry, "all of it", paths, whole=True)


def _remakeable(entry: Entry) -> Iterator[Path]:
    runs = [entry.folder]
    if entry.kind == "sweep":
        runs += [path for path in sorted(entry.folder.iterdir()) if not path.is_symlink() and is_run(path)]
    for run in runs:
        for path in _files(run):
            if any(fnmatch(str(path.relative_to(run)), pattern) for pattern in REMAKEABLE):
                yield path


def _ours(entry: Entry, path: Path) -> bool:
    """Whether haq writes a file of that name, relative to the folder of a run or a sweep."""
    first = entry.folder / path.parts[0]
    if entry.kind == "sweep" and len(path.parts) > 1 and (is_run(first) or just_created(first)):
        path = Path(*path.parts[1:])
    return path.parts[0] in PARTS if len(path.parts) > 1 else any(fnmatch(path.name, pattern) for pattern in PATTERNS)


def _files(folder: Path) -> Iterator[Path]:
    """All files, and links as they are, in a folder; nothing that a link leads to."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _older(folder: Path, days: float) -> bool:
    last = max(path.lstat().st_mtime for path in (folder, *_files(folder)))
    return time.time() - last > days * 24 * 3600
