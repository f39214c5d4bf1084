"""What a report is made of, before it is HTML: facts, sentences, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from haq.reporting.drawing import Picture

ESTIMATED = "Estimated means computed by a model of the hardware: nothing of it was run there."


@dataclass(frozen=True)
class Fact:
    """A figure that is shown large, with what it is."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. A cell of `links` leads to a part of the page."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    words: bool = False  # rather than numbers


@dataclass(frozen=True)
class Section:
    title: str
    stamp: str = ""  # what must not be overlooked
    sentences: Sequence[str] = ()
    points: Sequence[str] = ()  # a list below the sentences
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    command: str = ""


@dataclass(frozen=True)
class Part:
    """A run or a sweep."""

    anchor: str
    title: str
    folder: str
    finished: bool
    sentences: Sequence[str]
    facts: Sequence[Fact]
    sections: Sequence[Section]
    command: str = ""  # what goes on with it, if it isn't finished


def configuration(
    told: list[list[str]], settings: Mapping[str, Any], versions: Mapping[str, str], command: str | None
) -> Section:
    rows = [[f"--{name.replace('_', '-')}", str(value)] for name, value in settings.items() if value is not None]
    tables = [Table("Problem", ["what", "value"], told, words=True)] if told else []
    return Section(
        "Configuration",
        sentences=["This command repeats it; the same seed on the same machine gives the same files." if command else ""],
        tables=[
            *tables,
            Table("Settings", ["option", "value"], rows, words=True),
            Table("Versions", ["package", "version"], [list(one) for one in versions.items()], words=True),
        ],
        command=command or "",
    )
