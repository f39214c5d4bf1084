"""Timings on disk: one JSON file for each machine, target, compiler and version of the kernels.

A file is written beside and renamed, so it is whole at any moment. Two processes that measure the same agree: what was
written first stands. The lock between reading and renaming is the operating system's, so it goes with its process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hw_models.measured.timing import Timing

Notice = Callable[[str], None]
Key = Mapping[str, str | int]


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/haq`, or ~/.cache/haq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "haq"


def warn(sentence: str) -> None:
    """Give notice to someone who said of no other way."""
    warnings.warn(sentence, stacklevel=2)


class TimingCache:
    """The timings measured under one key, by the text that names a kernel.

    `notice` is told, in one sentence, when a file is damaged or another machine's: it is then rebuilt, not trusted.
    """

    def __init__(self, key: Key, notice: Notice = warn) -> None:
        """Find the file; where it can't be written, a copy for as long as this process lives takes its place."""
        self.key = dict(key)
        self._notice = notice
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"timings-{name}.json"
        # Now, and not after minutes of measuring: can it be written?
        try:
            with self._locked():
                pass
        except OSError as error:
            reason = error.strerror or type(error).__name__
            notice(f"measured times can't be kept in {self.path.parent} ({reason}): they are lost when this process ends")
            kept = self.path
            self.path = Path(_own_folder().name) / kept.name
            if not self.path.exists():
                with contextlib.suppress(OSError):
                    self.path.write_bytes(kept.read_bytes())

    def read(self) -> dict[str, Timing]:
        """Read what is on disk; nothing if there is no file or none to be trusted."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return _checked(json.loads(text), self.key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._notice(f"the measured times in {self.path} are not trusted ({error}); measuring them again")
            self.path.unlink(missing_ok=True)
            return {}

    def save(self, timings: Mapping[str, Timing], *, replacing: bool = False) -> dict[str, Timing]:
        """Add timings to the file; returns all of it.

        What another process wrote first stands, unless these are `replacing` it.
        """
        with self._locked():
            merged = {**timings, **self.read()}
            if replacing:
                merged |= timings
            partial = self.path.with_suffix(f".{os.getpid()}.part")
            partial.write_text(json.dumps({"key": self.key, "timings": merged}, indent=0), encoding="utf-8")
            partial.replace(self.path)
        return merged

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a") as file:
            try:
                import fcntl
            except ImportError:
                pass  # Windows: of two processes, one's last save may be lost, and is measured again
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="haq-")


def _checked(content: Any, key: Mapping[str, str | int]) -> dict[str, Timing]:
    """The timings of a file. Raises ValueError and the like with the reason if they are not what was measured here."""
    if content["key"] != key:
        different = sorted(name for name in {*key, *content["key"]} if content["key"].get(name) != key.get(name))
        raise ValueError(f"they were measured with another {' and '.join(different)}")
    timings = {}
    for kernel, (median, spread, repeats, *marks) in content["timings"].items():
        numbers = all(type(value) in (float, int) and math.isfinite(value) for value in (median, spread, repeats))
        if not (numbers and median > 0 and spread >= 0 and repeats >= 1):
            raise ValueError(f"the time of {kernel!r} is {median!r}")
        trusted = marks or [True]  # files of earlier versions have no mark
        if trusted not in ([True], [False]):
            raise ValueError(f"the mark of {kernel!r} is {marks!r}")
        timings[kernel] = Timing(float(median), float(spread), int(repeats), bool(trusted[0]))
    return timings
