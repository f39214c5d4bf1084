"""What several experiments print or ask for in the same way."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from hw_models.extras import install_line


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


def package_file(package: str, path: str) -> Path:
    """Return a file of an installed package, which isn't imported. Raises ImportError, with what to install, without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed: {install_line('tasks')}")
    return Path(spec.submodule_search_locations[0]) / path


def imported(module: str) -> Any:
    """Import a module of the extra, on builds of torch without torchvision's operators as well.

    Raises ImportError, with what to install, without it.
    """
    from haq.networks.zoo import import_zoo  # imports torch

    import_zoo("torchvision")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {install_line('tasks')}") from error
