"""Reading files that nobody vouches for: none is waited for, read beyond a size that is known, or shown in a message.

YAML is plain here: mappings, lists, text, numbers, truth values and nothing. What else YAML has (tags, anchors and aliases, a
key that is there twice) is refused, since a few lines of it can stand for more than any memory holds, or for something else
than a reader sees.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_NODES, MOST_DEPTH, MOST_DIGITS = 10_000, 20, 40  # of YAML: values in all, one within the other, characters of a number
_BYTE_UNITS = ("kB", "MB", "GB", "TB")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_KINDS: dict[type, str] = {
    dict: "mapping",
    list: "list",
    str: "text",
    bool: "truth value",
    int: "whole number",
    float: "number",
    type(None): "nothing",
}


def check_file(path: Path, most: int) -> None:
    """Raise an error unless a path is a file of at most `most` bytes.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: For a file that has more bytes, a folder, or a pipe, which would be waited for.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder and was not read; a file is expected, of at most {describe_bytes(most)}")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is no ordinary file (a pipe or a device) and was not read; "
            f"a file is expected, of at most {describe_bytes(most)}"
        )
    if found.st_size > most:
        raise ValueError(
            f"{path} has {describe_bytes(found.st_size)} and was not read; at most {describe_bytes(most)} are accepted"
        )


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes, as many as it says it has.

    What the kernel makes up, below /proc, says that it has none: nothing of it is read. Raises what `check_file` raises.
    """
    check_file(path, most)
    with path.open("rb") as file:
        return file.read(path.stat().st_size)


def read_text(path: Path, most: int) -> str:
    """Read a text file of at most `most` bytes, with its line ends as they are.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it isn't UTF-8, or is no file of such a size.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def parse_yaml(text: str) -> Any:
    """Read plain data from YAML. Raises ValueError with the line and what is wrong there, but not with what stands there."""
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = ""
        if mark:
            line = f"line {mark.line + 1}: "
        raise ValueError(f"{line}{_without_quotes(error.problem or error.context or 'it is damaged')}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"it has the character U+{int(error.character):04X}, which YAML doesn't take") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def quoted(value: object) -> str:
    """Write a value of a file into a message: only text and numbers, and not all of them if they are long."""
    if value is None:
        return "nothing"
    if not isinstance(value, (str, int, float)):
        return f"a {kind_of(value)}"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a huge number"
    if isinstance(value, str):
        value = value[:200]  # text of megabytes isn't escaped for the few characters that are shown
    text = repr(value)
    if len(text) > 60:
        return f"{text[:57]}..."
    return text


def kind_of(value: object) -> str:
    """Name the kind of a value as a user of YAML and JSON would."""
    return _KINDS.get(type(value), type(value).__name__)


def describe_bytes(count: int) -> str:
    """Write the size of a file: 512 bytes, 3.2 MB."""
    if count < 1000:
        return f"{count} bytes"
    scaled = count / 1000
    for unit in _BYTE_UNITS[:-1]:
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:.3g} {_BYTE_UNITS[-1]}"


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain data. A date, a merge key (<<) and the like are the text that they are."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in ("null", "bool", "int", "float")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"in line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.YAMLError(f"it has an alias (*) or an anchor (&) {where}, which no file of ours has")
        if event.tag is not None:
            raise yaml.YAMLError(f"it has a tag (!) {where}, which no file of ours has")
        self._nodes += 1
        self._depth += 1
        if self._nodes > MOST_NODES:
            raise yaml.YAMLError(f"it has more than {MOST_NODES:,} values")
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested too deeply {where}: at most {MOST_DEPTH} values, one within the other")
        node = super().compose_node(parent, index)
        self._depth -= 1
        _check_number(node, where)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.YAMLError(f"a key in line {line} is no text")
            if key.value in seen:
                raise yaml.YAMLError(f"{quoted(key.value)} is given twice, the second time in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_number(node: Any, where: str) -> None:
    """Raise YAMLError for a number that no reader takes for what YAML does: 010 is 8 there, and 1:30 is 90."""
    kind = node.tag.rpartition(":")[2]
    if kind not in ("int", "float") or node.tag == kind:
        return
    strange = ":" in node.value or len(node.value) > MOST_DIGITS
    if strange or (kind == "int" and not _WHOLE.fullmatch(node.value)):
        raise yaml.YAMLError(f"a number {where} isn't written in decimal digits, at most {MOST_DIGITS} of them")


def _without_quotes(problem: str) -> str:
    """Leave out of PyYAML's words what stands in the file."""
    return " ".join(re.sub(r"(['\"]).*\1", "something", problem).split())[:120]
