"""The history of a run: every evaluation, in order, one a line.

A line that doesn't end was being written when the run was killed, and doesn't count. All others must be evaluations.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from haq.store import files

COLUMNS = (
    "solver",
    "evaluation",
    "weight_bits",
    "activation_bits",
    "accuracy",
    "loss",
    "cost",
    "within_budget",
    "divergence",
)
HEADER = ",".join(COLUMNS) + "\n"
_BITS = re.compile(r"[1-8](-[1-8])*")


def read(path: Path, layers: int | None = None) -> list[list[str]]:
    """The rows of a history, each a text per column. `layers`: how many the network has.

    Raises ValueError naming the line and the column that is wrong, or the limit if the file is larger than any history.
    """
    text = files.read_text(path, files.MOST_HISTORY)
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    if not text.startswith(HEADER):
        found = lines[0] if lines else text
        raise ValueError(f"{path} has the columns {found[:200]!r}, not {HEADER.strip()}: start a new run")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        row = line.split(",")
        if wrong := _wrong(row, layers):
            raise ValueError(f"{path}, line {number}: {wrong}; put the file back as it was, or start a new run")
        rows.append(row)
    return rows


def _wrong(row: list[str], layers: int | None) -> str:
    """What is wrong with a row; nothing if it is one."""
    if len(row) != len(COLUMNS):
        return f"{len(row)} columns, not {len(COLUMNS)}"
    if not re.fullmatch(r"[a-z0-9_]{1,40}", row[0]):
        return f"the solver is {row[0][:40]!r}"
    if not re.fullmatch(r"[1-9][0-9]{0,8}", row[1]):
        return f"the evaluation is {row[1][:40]!r}, not a number from 1"
    for name, bits in (("weight", row[2]), ("activation", row[3])):
        if not _BITS.fullmatch(bits):
            return f"the {name} bits are {bits[:40]!r}, not widths from 1 to 8 such as 8-4-8"
        if layers is not None and bits.count("-") + 1 != layers:
            return f"{name} bits of {bits.count('-') + 1} layers, the network has {layers}"
    # A divergence of nothing may come out a rounding below 0.
    limits = (("accuracy", row[4], 0.0, 1.0), ("loss", row[5], -1e-3, 1e30), ("cost", row[6], 0.0, 1e30))
    for name, value, low, high in (*limits, *([("divergence", row[8], -1e-3, 1e30)] if row[8] else [])):
        if not low <= _number(value) <= high:
            return f"the {name} is {value[:40]!r}, not a number from 0{' to 1' if high == 1 else ''}"
    return "" if row[7] in ("0", "1") else f"within_budget is {row[7][:40]!r}, not 0 or 1"


def _number(text: str) -> float:
    try:
        return float(text) if len(text) <= 40 else math.nan
    except ValueError:
        return math.nan
