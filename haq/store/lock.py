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

PATIENCE = 1.0  # seconds; whoever only looks whether a lock is held, holds it for an instant


@contextmanager
def writing(folder: Path, go_on: str, *, wait_s: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of a folder, made if need be, while it is written.

    `go_on`: the command that goes on, should the disk be full. Raises BlockingIOError if another process holds it for
    `wait_s`, ValueError if something in it is a link out of it, and OSError if it can't be written.
    """
    with _told(folder, go_on):
        folder.mkdir(parents=True, exist_ok=True)
    files.check_links(folder)
    with holding(folder / files.LOCK, folder, go_on, wait_s=wait_s):
        yield


@contextmanager
def holding(lock: Path, what: Path, go_on: str, *, wait_s: float = PATIENCE) -> Iterator[None]:
    """The same with a lock file of any name, for what isn't a folder."""
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        raise ValueError(f"{lock} is no ordinary file, so {what} can't be locked: delete it")
    held = filelock.FileLock(lock)
    with _told(what, go_on):
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


def is_held(folder: Path) -> bool:
    """Whether a process is writing a folder."""
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
def _told(what: Path, go_on: str) -> Iterator[None]:
    """Errors of a file system that takes nothing more, with the way out."""
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        at = f" ({named})" if named else ""
        if files.full(error):
            begun = not what.is_dir() or any((what / name).is_file() for name in (files.CONFIG, files.SWEEP))
            remedy = f"go on with {go_on}" if begun else "give the same command again"
            sentence = (
                f"the disk is full, {what} can't be written{at}: what was finished is kept; free some space, then {remedy}"
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and _within(named, what):
            why = "its file system is read-only" if error.errno == errno.EROFS else "you lack the permission"
            sentence = f"{what} can't be written{at}, {why}: copy it to where you may write, or name another place with --out"
        else:
            raise
        raise Unwritable(error.errno, sentence) from error


def _within(named: Path | None, what: Path) -> bool:
    return named is None or named.resolve().is_relative_to(what.resolve().parent)


class Unwritable(OSError):
    """A file system that takes nothing more, and the way out, in one sentence."""

    def __str__(self) -> str:
        return str(self.args[1])
