"""The files of a run or a sweep: their names, reading them without trust and writing them without loss.

Nothing that is read is executed, waited for, or read whole before its size is known, and torch isn't needed. What stands in
the files is told by `haq.store.records`. Every function raises OSError or ValueError with one sentence that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hw_models.files import check_file as check_file
from hw_models.files import kind_of as kind_of
from hw_models.files import parse_yaml
from hw_models.files import quoted as quoted
from hw_models.files import read_text as read_text

CONFIG, PROBLEM, HISTORY, POLICY, RESULT = "config.yaml", "problem.json", "history.csv", "policy.json", "result.json"
SWEEP, LOCK, SENSITIVITY, REPORT = "sweep.json", ".lock", "sensitivity.json", "report.html"
TRIALS = "trials.csv"  # of earlier searches, as a history has them
POLICY_PICTURE, SWEEP_PICTURE, ROBUSTNESS_PICTURE = "policy.png", "sweep.png", "robustness.png"
ROBUSTNESS, ATTACKED = Path("robustness"), "robustness.json"  # a folder, and what comes of it
SENSITIVITIES = "sensitivity"  # the run in a sweep that measured for all of them
CHECKPOINT = Path("checkpoint") / "quantized.safetensors"
PART = ".part"  # the end of a name, while its file is written

# The versions of the files that are written, and the only ones that are read.
RUN_SCHEMA, PROBLEM_SCHEMA, RESULT_SCHEMA = "haq-run-2", "haq-problem-2", "haq-result-2"
SWEEP_SCHEMA, ROBUSTNESS_SCHEMA, SENSITIVITY_SCHEMA = "haq-sweep-2", "haq-robustness-2", "haq-sensitivity-2"
AGENT_SCHEMA = "haq-agent-1"

# Bytes up to which a file is read. What we write is far smaller: the largest history so far has 3 MB.
MOST_CONFIG, MOST_JSON, MOST_HISTORY = 64 * 1024, 32 * 1024**2, 64 * 1024**2
WRITTEN = (LOCK, PART, ".json", ".npz", ".png")  # what is put into a folder that isn't a run's, by attacks on a model
# All there is, if a process was killed while it made a folder.
LEFTOVERS = {LOCK, TRIALS, *(f"{name}{PART}" for name in (CONFIG, SWEEP, TRIALS))}


def read_json(path: Path, what: str = "JSON") -> dict[str, Any]:
    """Read an object from a JSON file.

    Args:
        path: The file.
        what: What it is to be, for messages: "the result of a run".

    Returns:
        The object.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: Naming the file, if it is anything else, or too large.
    """
    text = read_text(path, MOST_JSON)
    try:
        content = json.loads(text, object_pairs_hook=_without_twice)
    except RecursionError:
        raise ValueError(f"{path} is not {what}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it must be an object, not a {kind_of(content)}")
    return content


def read_yaml(path: Path, what: str = "YAML") -> dict[str, Any]:
    """Read a mapping from a YAML file; plain data only, see `hw_models.files`.

    Args:
        path: The file.
        what: What it is to be, for messages: "the configuration of a run".

    Returns:
        The mapping.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: Naming the file, if it is anything else, or too large.
    """
    text = read_text(path, MOST_CONFIG)
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it must be a mapping, not a {kind_of(content)}")
    return content


def check_schema(path: Path, found: object, ours: str, what: str, remedy: str = "make it anew") -> None:
    """Raise ValueError unless a file is of our schema.

    Args:
        path: The file, for the message.
        found: What the file says its schema is.
        ours: The schema that is read, such as "haq-run-2".
        what: What the file is, for one of no schema of ours: "the result of a run".
        remedy: What to do about a file of an earlier version: "search again".
    """
    if found == ours:
        return
    base, _, number = ours.rpartition("-")
    if isinstance(found, str) and (match := re.fullmatch(rf"{re.escape(base)}-([0-9]{{1,6}})", found)):
        if int(match[1]) > int(number):
            raise ValueError(
                f"{path} was made by a newer version of haq ({found}, this one reads {ours}): upgrade haq to use it"
            )
        raise ValueError(
            f"{path} was made by an older version of haq ({found}, this one reads {ours}): {remedy}, or use that version"
        )
    raise ValueError(f"{path} is not {what}: its schema is {quoted(found)}, not {ours!r}")


def check_links(folder: Path) -> None:
    """Raise ValueError if anything in a folder that is to be written is a symbolic link out of it."""
    home = folder.resolve()
    begun = any(os.path.lexists(folder / name) for name in (CONFIG, SWEEP))
    for inside, folders, names in os.walk(folder):
        if not begun:
            # Somebody's folder that results are put into; links of other names and further down are their own affair.
            folders.clear()
        for name in (*folders, *names):
            if name in names and not begun and not name.endswith(WRITTEN):
                continue
            path = Path(inside, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise ValueError(f"{path} is a symbolic link out of {folder}: nothing is written through it; put a copy there")


def write(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that there is always the old one or the new one.

    What can't be written leaves nothing behind.
    """
    if isinstance(content, str):
        content = content.encode()
    partial = path.with_name(f"{path.name}{PART}")
    try:
        partial.unlink(missing_ok=True)  # it may be a link to somewhere
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def reserve(path: Path, size: int) -> None:
    """Make a file of zeros of a size in bytes, beside its place and renamed; it takes space only as it is written into.

    Several processes may make one at a time: the last one's stays. What can't be made leaves nothing behind.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=PART)
    partial = Path(name)
    try:
        with open(descriptor, "wb") as file:
            file.truncate(size)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk, or what one may use of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of JSON, in which a key that is there twice would count once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{quoted(name)} is there twice")
            seen.add(name)
    return made


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > 200:
        return f"{text[:197]}..."
    return text
