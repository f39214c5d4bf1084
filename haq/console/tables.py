"""What commands share on text and tables: nothing of a file steers a terminal, and every table fits its width.

Text that comes from a file, a folder's name or a user's module goes through `plain`: Rich then takes no markup and no emoji
codes from it, and control characters are shown by their escapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haq.store.shell import command_line as command_line
from hw_models.registry import printable

GAP = 2  # characters between columns; 1 where a table fits only so


def plain(value: Any) -> Text:
    """Make text of a value that shows it as it is: no markup, no emoji codes, control characters escaped line by line."""
    if isinstance(value, Path):
        # A line break in the name of a folder is no line break of ours.
        return Text(printable(str(value)))
    return Text("\n".join(printable(line) for line in str(value).split("\n")))


def say(console: Console, sentence: str, *, wrap: bool = True) -> None:
    """Print a sentence that may name files, whose line breaks are none of ours.

    Args:
        console: Where to.
        sentence: What to print, as it is; before it there may be empty lines.
        wrap: Whether it is broken at the console's width. False for what is copied, such as a command or a path.
    """
    line = sentence.lstrip("\n")
    above = sentence[: len(sentence) - len(line)]
    console.print(Text(above + printable(line)), soft_wrap=not wrap, highlight=False)


def say_next(console: Console, *words: Any, hint: str = "") -> None:
    """Print the command that comes next, quoted and on one line, so that it can be copied.

    Args:
        console: Where to.
        words: The command, word by word.
        hint: What is said before it; behind it, it would be copied too.
    """
    text = Text.assemble(f"Next{printable(hint)}: ", (command_line(*words), "bold"))
    console.print(text, soft_wrap=True, highlight=False)


def new_table(title: str = "", caption: str = "") -> Table:
    """Make a table in the style of all commands, with neither columns nor rows.

    Args:
        title: One line above it.
        caption: Sentences below it.

    Returns:
        The table. Cells that may come from files are added as `plain(...)`.
    """
    return Table(
        title=plain(title) if title else None,
        caption=plain(caption) if caption else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
    )


def key_table(rows: Iterable[tuple[str, Any]]) -> Table:
    """Make a table of two columns without headings: what something is called, and what it is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(key, "bold"), plain(value))
    return table


@dataclass
class Column:
    """A column that `print_columns` may put into a later part of its table."""

    heading: str
    cells: Sequence[Any]
    justify: Literal["left", "right"] = "left"
    least: int | None = None  # characters to which it may be wrapped; None: it is never wrapped, as half a number is another

    @property
    def width(self) -> int:
        """The width of the widest line in it."""
        texts = [self.heading, *(str(cell) for cell in self.cells)]
        return max(cell_len(printable(line)) for text in texts for line in text.split("\n"))

    @property
    def needed(self) -> int:
        """The width that it can't do without."""
        if self.least is None:
            return self.width
        return min(self.width, self.least)


def parts(columns: Sequence[Column], width: int, keys: int = 1) -> list[list[Column]]:
    """Break columns into as few tables as fit a width; nothing is left out.

    Args:
        columns: The columns, in order.
        width: Characters of a line.
        keys: How many of the first columns every table begins with.

    Returns:
        The columns of each table. A single column beside the keys may still be too wide: it is wrapped.
    """
    if _width(columns, 1) <= width:
        return [list(columns)]
    head, rest = list(columns[:keys]), list(columns[keys:])
    # What names the rows leaves room for at least one thing that is said about them.
    room = width - min(_width(head), width // 2)
    found: list[list[Column]] = []
    free = 0
    for column in rest:
        if not found or column.needed + GAP > free:
            found.append(list(head))
            free = room
        found[-1].append(column)
        free -= column.needed + GAP
    return found or [head]


def print_columns(
    console: Console,
    title: str,
    columns: Sequence[Column],
    *,
    keys: int = 1,
    totals: int = 0,
    sections: Collection[int] = (),
    caption: str = "",
) -> None:
    """Print a table; where it is wider than the console, as several tables below each other.

    Args:
        console: Where to; its width counts.
        title: One line above the first of them.
        columns: The columns, all with as many cells.
        keys: How many of the first columns name the rows: every one of the tables begins with them.
        totals: How many of the last rows stand below a line.
        sections: Numbers of other rows, from 0, that begin below a line.
        caption: Sentences below the last of them.
    """
    tables = parts(columns, console.width, keys)
    if title:
        console.print(plain(title), style="table.title")
    for part in tables:
        table = new_table()
        if _width(part) > console.width >= _width(part, 1):
            table.padding = (0, 0, 0, 0)
        is_too_wide = len(tables) > 1 or _width(part, 1) > console.width
        are_names_wrapped = is_too_wide and _width(part[:keys]) > console.width // 2
        is_alone = len(part) == keys + 1
        for index, column in enumerate(part):
            wraps = column.least is not None
            if index < keys:
                wraps = wraps or are_names_wrapped
            elif column.justify == "left":
                wraps = wraps or is_alone
            table.add_column(plain(column.heading), justify=column.justify, no_wrap=not wraps, overflow="fold")
        rows = len(part[0].cells)
        for row in range(rows):
            if row in sections or (totals and row == rows - totals):
                table.add_section()
            table.add_row(*(plain(column.cells[row]) for column in part))
        console.print(table)
    if caption:
        console.print(plain(caption), style="table.caption")


def _width(columns: Sequence[Column], gap: int = GAP) -> int:
    """The characters that columns can't do without, side by side."""
    return sum(column.needed + gap for column in columns)
