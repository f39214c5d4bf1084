"""One process at a time writes a folder; a dead one doesn't hold it, since the system frees its lock."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from haq.store import files

PATIENCE_S = 1.0  # whoever only looks whether a lock is held, holds it for an instant


class Unwritable(OSError):
    """A file system that takes nothing more, and what to do about it, in one sentence."""

    def __str__(self) -> str:
        """Say the sentence alone."""
        return str(self.args[1])


@contextmanager
def writing(folder: Path, go_on: str, *, wait_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of a folder, made if need be, while it is written.

    Args:
        folder: The folder of a run or a sweep.
        go_on: The command that goes on, should the disk be full.
        wait_s: Seconds for which another process that holds the lock is waited for.

    Raises:
        BlockingIOError: If another process holds it for longer.
        ValueError: If something in the folder is a link out of it.
        OSError: If it can't be written.
    """
    with _explained(folder, go_on):
        folder.mkdir(parents=True, exist_ok=True)
    files.check_links(folder)
    with holding(folder / files.LOCK, folder, go_on, wait_s=wait_s):
        yield


@contextmanager
def holding(lock: Path, what: Path, go_on: str, *, wait_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a lock file of any name; as `writing`, for what isn't a folder.

    Args:
        lock: The lock file, made if need be.
        what: What is written meanwhile, for messages.
        go_on: The command that goes on, should the disk be full.
        wait_s: Seconds for which another process that holds the lock is waited for.

    Raises:
        BlockingIOError: If another process holds it for longer.
        ValueError: If the lock is a link or no file.
        OSError: If `what` can't be written.
    """
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        raise ValueError(f"{lock} is no ordinary file, so {what} can't be locked: delete it")
    held = filelock.FileLock(lock)
    with _explained(what, go_on):
        try:
            held.acquire(timeout=wait_s)
        except filelock.Timeout:
            raise BlockingIOError(
                f"{what} is being written by another process: wait until it ends, or end it; nothing was changed"
            ) from None
        try:
            yield
        finally:
            held.release()


def check_can_be_made(folder: Path) -> None:
    """Check that a folder is there or can be made, before anything is loaded for it; nothing is left behind.

    Args:
        folder: The folder that --out names, or that of the file that it names.

    Raises:
        ValueError: In one sentence, if it can't be made.
        OSError: If its file system takes nothing more.
    """
    try:
        if os.path.lexists(folder):
            return
        first = folder
        while not first.parent.exists():
            first = first.parent
        with _explained(folder, "the same command"):
            first.mkdir()
            first.rmdir()
    except Unwritable:
        raise
    except OSError as error:
        if error.errno == errno.EEXIST and folder.is_dir():
            return  # another process has made it meanwhile
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"--out {folder} can't be made ({reason}): name a folder in a place where folders can be made"
        ) from error


def is_held(folder: Path) -> bool:
    """Tell whether a process is writing a folder."""
    try:
        file = os.open(folder / files.LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(file)
    return False


@contextmanager
def _explained(what: Path, go_on: str) -> Iterator[None]:
    """Turn errors of a file system that takes nothing more into a sentence that says what to do."""
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        sentence = _sentence(error, what, go_on)
        if sentence is None:
            raise
        raise Unwritable(error.errno, sentence) from error


def _sentence(error: OSError, what: Path, go_on: str) -> str | None:
    """Say what to do about an error in writing; None if it is of another kind."""
    named, at = None, ""
    if error.filename is not None:
        named = Path(os.fsdecode(error.filename))
        at = f" ({named})"
    if files.is_full(error):
        begun = not what.is_dir() or any((what / name).is_file() for name in (files.CONFIG, files.SWEEP))
        remedy = "give the same command again"
        if begun:
            remedy = f"go on with {go_on}"
        return f"the disk is full, {what} can't be written{at}: what was finished is kept; free some space, then {remedy}"
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return None
    if named is not None and not named.resolve().is_relative_to(what.resolve().parent):
        return None
    why = "you lack the permission"
    if error.errno == errno.EROFS:
        why = "its file system is read-only"
    return f"{what} can't be written{at}, {why}: copy it to where you may write, or name another place with --out"
