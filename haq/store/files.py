"""The folder of a run or a sweep, read without torch and without trust: nothing in it is executed, waited for, or read whole
before its size is known.

Every function raises OSError or ValueError with one sentence that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

CONFIG, PROBLEM, HISTORY, POLICY, RESULT = "config.yaml", "problem.json", "history.csv", "policy.json", "result.json"
SWEEP, LOCK, SENSITIVITY, REPORT = "sweep.json", ".lock", "sensitivity.json", "report.html"
ROBUSTNESS, ATTACKED = Path("robustness"), "robustness.json"  # a folder, and what comes of it
CHECKPOINT = Path("checkpoint") / "quantized.safetensors"
RUN_SCHEMA, PROBLEM_SCHEMA, RESULT_SCHEMA = "haq-run-1", "haq-problem-1", "haq-result-1"
SWEEP_SCHEMA, ROBUSTNESS_SCHEMA = "haq-sweep-1", "haq-robustness-1"

# Bytes up to which a file is read. What we write is far smaller: the largest history so far has 3 MB.
MOST_CONFIG, MOST_JSON, MOST_HISTORY = 64 * 1024, 32 * 1024**2, 64 * 1024**2
WRITTEN = (LOCK, ".part", ".json", ".npz", ".png")  # what is put into a folder that isn't a run's, by attacks on a model
LEFTOVERS = {LOCK, f"{CONFIG}.part", f"{SWEEP}.part"}  # all there is, if a process was killed while it made a folder


def check_file(path: Path, most: int) -> None:
    """Raise FileNotFoundError, or ValueError if it isn't a file (a pipe would be waited for) or has more than `most` bytes."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file (a pipe or a device)"
        raise ValueError(f"{path} is {kind} and was not read; a file of at most {size(most)} is expected there")
    if found.st_size > most:
        raise ValueError(f"{path} has {size(found.st_size)} and was not read; at most {size(most)} are expected there")


def read_text(path: Path, most: int) -> str:
    """A text file of at most `most` bytes."""
    check_file(path, most)
    try:
        # Line ends as they are: what is written back must not differ.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def read_json(path: Path, what: str = "JSON") -> dict[str, Any]:
    """An object from a JSON file, which is to be `what`."""
    text = read_text(path, MOST_JSON)
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not {what}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {_short(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it must be an object, not a {_kind(content)}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """What config.yaml says: schema, settings (name -> plain value), signature and versions (name -> text)."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    wrong = f"{path} is not the configuration of a run"
    text = read_text(path, MOST_CONFIG)
    try:
        content = yaml.load(text, _Plain)
    except RecursionError:
        raise ValueError(f"{wrong}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date of month 13
        raise ValueError(f"{wrong}: {_short(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{wrong}: it must be a mapping, not a {_kind(content)}")
    check_schema(path, content.get("schema"), RUN_SCHEMA, "the configuration of a run")
    for part, kinds in (("settings", (str, int, float, type(None))), ("signature", (str,)), ("versions", (str,))):
        given = content.get(part)
        if not isinstance(given, dict):
            raise ValueError(f"{wrong}: {part!r} must be a mapping, not a {_kind(given)}")
        for name, value in given.items():
            if not isinstance(name, str) or not isinstance(value, kinds):
                raise ValueError(f"{wrong}: {part!r} has a {_kind(value)} for {_quoted(name)}")
    for name in ("network", "data", "hw", "metric", "budget", "solver"):
        if not isinstance(content["settings"].get(name), str):
            raise ValueError(f"{wrong}: setting {name!r} must be text, not a {_kind(content['settings'].get(name))}")
    return content


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json holds, of the types that are relied on."""
    path = folder / RESULT
    content = read_json(path, "the result of a run")
    check_schema(path, content.get("schema"), RESULT_SCHEMA, "the result of a run")
    try:
        objective = _have(content, "objective", str)
        for name in ("network", "data", "target", "solver", "accuracy_is", "cost_is"):
            _have(content, name, str)
        budget = _have(content, "budget", dict)
        for name, kind in _BUDGET.items():
            _have(budget, name, kind)
        for name in ("float", "uniform8", "found", *(["finetuned"] if content.get("finetuned") is not None else [])):
            _check_row(_have(content, name, dict), objective)
        for row in _have(content, "rivals", dict).values():
            if not isinstance(row, dict):
                raise ValueError(f"a rival is a {_kind(row)}")
            _check_row(row, objective)
        for bits in _have(content, "rival_policies", dict).values():
            if not isinstance(bits, dict) or not all(isinstance(pair, list) for pair in bits.values()):
                raise ValueError("'rival_policies' must map names to bits by layer")
        for name, of in _COUNTS.items():
            for key in (counts := _have(content, name, dict)):
                _have(counts, key, of)
    except ValueError as error:
        raise ValueError(f"{path} is not the result of a run: {error}") from None
    return content


def check_schema(path: Path, found: Any, ours: str, what: str) -> None:
    """Raise ValueError unless a file is of our schema, such as "haq-run-1"; of a later one it says so."""
    if found == ours:
        return
    base, _, number = ours.rpartition("-")
    later = re.fullmatch(rf"{re.escape(base)}-([0-9]{{1,6}})", found) if isinstance(found, str) else None
    if later and int(later[1]) > int(number):
        raise ValueError(f"{path} was made by a newer version of haq ({found}, this one reads {ours}): upgrade haq to use it")
    raise ValueError(f"{path} is not {what}: its schema is {_quoted(found)}, not {ours!r}")


def check_links(folder: Path) -> None:
    """Raise ValueError if anything in a folder that is to be written is a symbolic link out of it."""
    home, begun = folder.resolve(), any(os.path.lexists(folder / name) for name in (CONFIG, SWEEP))
    for inside, folders, files in os.walk(folder):
        if not begun:
            # Somebody's folder that results are put into; links of other names and further down are their own affair.
            folders.clear()
        for name in (*folders, *(name for name in files if begun or name.endswith(WRITTEN))):
            path = Path(inside, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise ValueError(f"{path} is a symbolic link out of {folder}: nothing is written through it; put a copy there")


def write(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: whatever happens, there is the old one or the new one. What can't be
    written leaves nothing behind."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.unlink(missing_ok=True)  # it may be a link to somewhere
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def size(count: int) -> str:
    """Bytes in words: 3.2 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = next((power for power in (1, 2, 3) if count < 999.5 * 1000**power), 4)
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def full(error: BaseException) -> bool:
    """Whether an error says that the disk, or what one may use of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _Plain(yaml.SafeLoader):
    """YAML without aliases: nothing of ours has any, and a few lines of them can stand for more text than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which no file of a run has")
        return super().compose_node(parent, index)


def _check_row(row: dict[str, Any], objective: str) -> None:
    for split in ("search", "test"):
        _have(row, f"{split}_{objective}", float)
    for name, value in row.items():
        if value is not None:
            _have(row, name, float)


def _have(content: dict[str, Any], name: str, kind: type) -> Any:
    """The value of a key. Raises ValueError unless it is of a type; a float may be an int, and is finite."""
    value: Any = content.get(name)
    fits = isinstance(value, (float, int) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{_quoted(name)} is a {_kind(value)}, not a {_NAMES[kind]}")
    if kind is float and not abs(value) < 1e300:
        raise ValueError(f"{_quoted(name)} is no finite number")
    return value


_BUDGET: dict[str, type] = {"metric": str, "unit": str, "holds": bool, "limit": float, "used": float, "used_fraction": float}
_COUNTS: dict[str, type] = {"evaluations": int, "saturated_actions": float}
_NAMES: dict[type, str] = {
    dict: "mapping",
    list: "list",
    str: "text",
    bool: "truth value",
    int: "whole number",
    float: "number",
    type(None): "nothing",
}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _quoted(value: Any) -> str:
    """A value in a message: only if it is text or a number, and not all of it if it is long."""
    if not isinstance(value, (str, int, float)):
        return f"a {_kind(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
