"""What a report is made of, before it is HTML: facts, sentences, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haq.reporting.drawing import Picture
from haq.store.shell import command_line

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
    """A heading with what stands below it.

    Attributes:
        title: The heading.
        stamp: What must not be overlooked.
        sentences: Paragraphs.
        points: A list below them.
        pictures: Charts.
        tables: Tables.
        command: What to type.
    """

    title: str
    stamp: str = ""
    sentences: Sequence[str] = ()
    points: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    command: str = ""


@dataclass(frozen=True)
class Part:
    """A run or a sweep.

    Attributes:
        anchor: Where on the page it stands.
        title: Its heading.
        folder: What its folder is called on the page.
        finished: Whether it is.
        sentences: What is said of it first.
        facts: Figures that are shown large.
        sections: All else.
        command: What goes on with it, if it isn't finished.
    """

    anchor: str
    title: str
    folder: str
    finished: bool
    sentences: Sequence[str]
    facts: Sequence[Fact]
    sections: Sequence[Section]
    command: str = ""


def configuration(
    problem: list[list[str]], settings: Mapping[str, Any], versions: Mapping[str, str], command: str | None
) -> Section:
    """Tell what was asked for.

    Args:
        problem: What the problem is: names and values; nothing if the settings say it all.
        settings: Those of a search, by field.
        versions: What it was run with, by package.
        command: What repeats it, if that is known.

    Returns:
        The section.
    """
    rows = [[f"--{name.replace('_', '-')}", str(value)] for name, value in settings.items() if value is not None]
    tables = [
        Table("Settings", ["option", "value"], rows, words=True),
        Table("Versions", ["package", "version"], [list(one) for one in versions.items()], words=True),
    ]
    if problem:
        tables.insert(0, Table("Problem", ["what", "value"], problem, words=True))
    sentences = []
    if command:
        sentences.append("This command repeats it; the same seed on the same machine gives the same files.")
    return Section("Configuration", sentences=sentences, tables=tables, command=command or "")


def resume_command(module: str, folder: Path) -> str:
    """Write the command that goes on with a run or a sweep, quoted for a shell."""
    return command_line("python", "-m", module, "--resume", folder)
