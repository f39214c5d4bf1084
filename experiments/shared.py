"""What several experiments print or ask for in the same way."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table


def verdict(holds: bool, otherwise: str = "FALLS SHORT") -> str:
    """Say whether something holds."""
    if holds:
        return "holds"
    return otherwise


def folder_for(asked: Path | None, quick: bool, usual: Path) -> Path | None:
    """Choose where tables are written: where it is asked for, or else nowhere for a quick look, and at the usual place.

    Args:
        asked: What --out says.
        quick: Whether it is only to be seen that everything runs.
        usual: Where tables are kept.

    Returns:
        The folder, or None.
    """
    if asked is not None or quick:
        return asked
    return usual


def rounded(row: Iterable[Any]) -> list[Any]:
    """Round the floats of a row to four digits after the point."""
    made = []
    for value in row:
        if isinstance(value, float):
            value = round(value, 4)
        made.append(value)
    return made


def number(value: float | None, digits: int, absent: str = "–") -> str:
    """Write a number with so many digits after the point, or what stands for one that isn't there."""
    if value is None:
        return absent
    return f"{value:.{digits}f}"


def add_columns(table: Table, columns: Iterable[str], left: Collection[str]) -> None:
    """Add columns to a table: some to the left, all others, which are numbers, to the right."""
    for column in columns:
        side: Any = "right"
        if column in left:
            side = "left"
        table.add_column(column, justify=side)
