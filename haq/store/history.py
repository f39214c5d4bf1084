"""The history of a run: every evaluation, in order, one a line.

A row has the widths of each layer, such as 8-16-float, and the cost in the unit of the run's metric. Where further metrics are
limited, what they cost stands behind, in columns of their names. Where evaluations may end early, a column `images` before
these tells how many samples were looked at, and is empty for all of them. Where channels are pruned, a column `keep` behind
that has the share of channels that is kept of each group, such as 1-0.5-0.875, in the order of problem.json.

A line that doesn't end was being written when the run was killed, and doesn't count. All others must be evaluations, those of
each solver numbered 1, 2, 3 and so on.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haq.store import files
from haq.store.units import PERCENT, UNITS, worst_of
from hw_models.widths import FLOAT_WORD, width_of, width_words

if TYPE_CHECKING:
    from haq.store.records import JudgingRecord

SHARED = "shared"  # in place of a solver: what other searches of the same sweep evaluated, which the run may return too
_WIDTH = rf"(?:[1-8]|16|{FLOAT_WORD})"
_BITS = re.compile(rf"{_WIDTH}(?:-{_WIDTH})*")
_SHARE = r"(?:1|0\.[0-9]{1,400})"  # as many digits as the smallest float has
_KEEP = re.compile(rf"{_SHARE}(?:-{_SHARE})*")
_SOLVER = re.compile(r"[A-Za-z0-9_.:+-]{1,80}")  # module:Name, too
_EVALUATION = re.compile(r"[1-9][0-9]{0,8}")
# A loss or a divergence of nothing may come out a rounding below 0.
# Where a network's outputs weren't finite loss and divergence are infinite, and the accuracy is 0, or infinite where it is no
# share; the cost is infinite where the hardware can't do a policy.
_MAYBE_INFINITE = ("loss", "divergence", "cost")
_WITH_KEEP = {True: "has a", False: "has no"}
_PRUNED = {True: "channels are pruned here", False: "no channels are pruned here"}
_MOST = sys.float_info.max
_LIMITS = {"accuracy": (0.0, 1.0), "loss": (-1e-3, 1e30), "cost": (0.0, _MOST), "divergence": (-1e-3, 1e30)}


class Limits(NamedTuple):
    """What the values and losses of a history can be; the defaults are those of accuracy.

    Attributes:
        unit: The objective's; "%" for shares, 0 to 1.
        higher_is_better: Its direction: what is worth nothing is infinitely low, or high.
        counts_samples: Whether the value is a share of samples. Losses are those of class scores then, which aren't negative.
    """

    unit: str = PERCENT
    higher_is_better: bool = True
    counts_samples: bool = True

    @classmethod
    def of(cls, judging: JudgingRecord) -> Limits:
        """Return those of what a record says policies are judged by."""
        return cls(judging.objective_unit, judging.higher_is_better, judging.counts_samples)

    def number(self, column: str, text: str, name: str = "") -> float:
        """Read the number of a column.

        Args:
            column: Which of the columns it is like.
            text: The number.
            name: What the column is called, if that is something else.

        Returns:
            The number.

        Raises:
            ValueError: Saying what is accepted, for anything else.
        """
        low, high = _LIMITS[column]
        accepted = "a number from 0"
        infinite = str(math.inf)
        may_be_infinite = column in _MAYBE_INFINITE
        if column == "accuracy":
            worst = worst_of(self.unit, self.higher_is_better)
            infinite, may_be_infinite = str(worst), math.isinf(worst)
            accepted = "a number from 0 to 1"
            if self.unit != PERCENT:
                low, high, accepted = -_MOST, _MOST, "a number"
        elif column == "loss" and not self.counts_samples:
            low, high, accepted = -_MOST, _MOST, "a number"
        if may_be_infinite and text == infinite:
            return float(infinite)
        value = math.nan
        if len(text) <= 40:
            with suppress(ValueError):
                value = float(text)
        if low <= value <= high:
            return value
        raise ValueError(f"the {name or column} is {text[:40]!r}, not {accepted}")


SHARES = Limits()


class HistoryRow(NamedTuple):
    """One evaluation: loss and divergence are in nats, cost is in the metric's unit."""

    solver: str
    evaluation: int  # of this solver, from 1
    weight_bits: tuple[int, ...]  # of each layer; float is 32
    activation_bits: tuple[int, ...]
    accuracy: float  # the objective's value: a share for accuracy
    loss: float
    cost: float
    within_budget: bool
    divergence: float | None
    others: tuple[float, ...] = ()  # costs of the further metrics that are limited, in their units
    images: int | None = None  # samples that were looked at, if the evaluation was cut short
    keep: tuple[float, ...] = ()  # the share of channels of each group; nothing where none are pruned

    @classmethod
    def parse(
        cls,
        line: str,
        layers: int | None = None,
        limits: Limits = SHARES,
        others: Sequence[str] = (),
        tells_images: bool = False,
        tells_keep: bool = False,
        groups: int | None = None,
    ) -> HistoryRow:
        """Read a line, without its end.

        Args:
            line: The line, a cell per column.
            layers: How many layers the network has; None if that isn't known.
            limits: What its values can be.
            others: The further metrics that are limited.
            tells_images: Whether there is a column `images`.
            tells_keep: Whether there is a column `keep`.
            groups: How many groups of channels may be pruned; None if that isn't known.

        Returns:
            The row, which `line` writes again as it was.

        Raises:
            ValueError: Saying which column is wrong, and what it must be.
        """
        cells = line.split(",")
        columns = _columns(others, tells_images, tells_keep)
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} columns, not {len(columns)}")
        text = dict(zip(columns, cells, strict=True))
        if not _SOLVER.fullmatch(text["solver"]):
            raise ValueError(f"the solver is {text['solver'][:40]!r}")
        if not _EVALUATION.fullmatch(text["evaluation"]):
            raise ValueError(f"the evaluation is {text['evaluation'][:40]!r}, not a number from 1")
        weight_bits = _widths("weight", text["weight_bits"], layers)
        activation_bits = _widths("activation", text["activation_bits"], layers)
        accuracy = limits.number("accuracy", text["accuracy"])
        loss = limits.number("loss", text["loss"])
        cost = limits.number("cost", text["cost"])
        divergence = None
        if text["divergence"]:
            divergence = limits.number("divergence", text["divergence"])
        images = None
        if text.get(IMAGES):
            if not _EVALUATION.fullmatch(text[IMAGES]):
                raise ValueError(f"the images are {text[IMAGES][:40]!r}, not a number from 1, or nothing for all of them")
            images = int(text[IMAGES])
        keep: tuple[float, ...] = ()
        if tells_keep:
            keep = _shares(text[KEEP], groups)
        if text["within_budget"] not in ("0", "1"):
            raise ValueError(f"within_budget is {text['within_budget'][:40]!r}, not 0 or 1")
        return cls(
            text["solver"],
            int(text["evaluation"]),
            weight_bits,
            activation_bits,
            accuracy,
            loss,
            cost,
            text["within_budget"] == "1",
            divergence,
            tuple(limits.number("cost", text[name], name) for name in others),
            images,
            keep,
        )

    def line(self, tells_images: bool = False) -> str:
        """Write the row as a line of the file, with its end; floats to their last bit.

        Args:
            tells_images: Whether the file has a column `images`.

        Returns:
            The line.
        """
        divergence = ""
        if self.divergence is not None:
            divergence = repr(self.divergence)
        cells = [
            self.solver,
            str(self.evaluation),
            "-".join(map(width_words, self.weight_bits)),
            "-".join(map(width_words, self.activation_bits)),
            repr(self.accuracy),
            repr(self.loss),
            repr(self.cost),
            str(int(self.within_budget)),
            divergence,
        ]
        if tells_images:
            cells.append(str(self.images or ""))
        if self.keep:
            cells.append("-".join(map(share_words, self.keep)))
        cells += map(repr, self.others)
        return ",".join(cells) + "\n"

    @property
    def whole(self) -> bool:
        """Say whether all samples were looked at: only then may the policy be chosen."""
        return self.images is None

    @property
    def rank(self) -> tuple[float, float, float]:
        """Order rows, better ones first, where a higher value is better: by it, then loss, then cost."""
        return self.rank_by(True)

    def rank_by(self, higher_is_better: bool) -> tuple[float, float, float]:
        """Order rows, better ones first: by the objective's value, of which direction, then loss, then cost."""
        if higher_is_better:
            return -self.accuracy, self.loss, self.cost
        return self.accuracy, self.loss, self.cost


COLUMNS = HistoryRow._fields[: HistoryRow._fields.index("others")]
HEADER = ",".join(COLUMNS) + "\n"
IMAGES, KEEP = "images", "keep"


def read(
    path: Path,
    layers: int | None = None,
    limits: Limits = SHARES,
    others: Sequence[str] | None = None,
    groups: int | None = None,
) -> list[HistoryRow]:
    """Read a history.

    Args:
        path: The file.
        layers: How many layers the network has; None if that isn't known.
        limits: What its values can be.
        others: The further metrics whose costs it must tell, in their order; None if any will do.
        groups: Of how many groups of channels it must tell what is kept, 0 for none; None if any will do.

    Returns:
        Its rows, in order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Naming the line and the column that is wrong, such as an evaluation that is there twice, or the limit if
            the file is larger than any history.
    """
    text = files.read_text(path, files.MOST_HISTORY)
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    tells_images, tells_keep, told = _told(path, lines)
    if groups is not None and tells_keep != bool(groups):
        raise ValueError(
            f"{path} {_WITH_KEEP[tells_keep]} column {KEEP!r}, and {_PRUNED[bool(groups)]}: put the file back as it was, or "
            "start a new run"
        )
    if others is not None and told != tuple(others):
        raise ValueError(
            f"{path} tells what policies cost in {' and '.join(told) or 'no further metric'}, where it is "
            f"{' and '.join(others) or 'no further metric'} that is limited: put the file back as it was, or start a new run"
        )
    rows = []
    counts: dict[str, int] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            row = HistoryRow.parse(line, layers, limits, told, tells_images, tells_keep, groups)
            _check_count(row, counts)
            rows.append(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; put the file back as it was, or start a new run") from None
    return rows


def tells_images(path: Path) -> bool:
    """Say whether a history tells how many samples were looked at; ValueError if the file is none."""
    text = files.read_text(path, files.MOST_HISTORY)
    return _told(path, text[:1000].split("\n"))[0]


def write(
    path: Path,
    rows: Iterable[HistoryRow] = (),
    others: Sequence[str] = (),
    tells_images: bool | None = None,
    tells_keep: bool = False,
) -> None:
    """Write a whole history.

    Args:
        path: The file.
        rows: Its rows.
        others: The further metrics that are limited, of which the rows tell what they cost.
        tells_images: Whether there is a column `images`; None: if one of the rows needs it.
        tells_keep: Whether there is a column `keep`, of which every row has shares then.
    """
    rows = list(rows)
    if tells_images is None:
        tells_images = not all(row.whole for row in rows)
    header = ",".join(_columns(others, tells_images, tells_keep)) + "\n"
    files.write(path, header + "".join(row.line(tells_images) for row in rows))


def append(path: Path, row: HistoryRow, tells_images: bool = False) -> None:
    """Add a row at the end of a history.

    Args:
        path: The file.
        row: The row.
        tells_images: Whether there is a column `images`.
    """
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(row.line(tells_images))


def _columns(others: Sequence[str], tells_images: bool, tells_keep: bool) -> tuple[str, ...]:
    """List the columns of a history."""
    columns = [*COLUMNS]
    if tells_images:
        columns.append(IMAGES)
    if tells_keep:
        columns.append(KEEP)
    return (*columns, *others)


def _told(path: Path, lines: Sequence[str]) -> tuple[bool, bool, tuple[str, ...]]:
    """Tell what the header of a history has beside the columns of all: images, what is kept, and which further metrics.

    Args:
        path: The file, for messages.
        lines: Its lines.

    Returns:
        Whether it tells images, whether it tells what is kept of channels, and the metrics.

    Raises:
        ValueError: If it is the header of no history.
    """
    columns: list[str] = []
    if lines:
        columns = lines[0][:1000].split(",")
    others = tuple(columns[len(COLUMNS) :])
    has_images = others[:1] == (IMAGES,)
    if has_images:
        others = others[1:]
    has_keep = others[:1] == (KEEP,)
    if has_keep:
        others = others[1:]
    is_known = set(others) <= set(UNITS) and len(set(others)) == len(others)
    if tuple(columns[: len(COLUMNS)]) == COLUMNS and is_known:
        return has_images, has_keep, others
    # What else stands there is nobody's to read: the file may be a link to anything.
    known = [name for name in dict.fromkeys(columns) if name in COLUMNS]
    raise ValueError(f"{path} has the columns {','.join(known) or 'of no history'}, not {HEADER.strip()}: start a new run")


def _check_count(row: HistoryRow, counts: dict[str, int]) -> None:
    """Count a row. Raises ValueError unless it is its solver's next: those of each solver are numbered 1, 2, 3 and so on.

    Args:
        row: The row.
        counts: How many rows there were before it, by solver.
    """
    expected = counts.get(row.solver, 0) + 1
    if row.evaluation < expected:
        raise ValueError(f"evaluation {row.evaluation} of {row.solver} is there twice")
    if row.evaluation > expected:
        raise ValueError(f"evaluation {row.evaluation} of {row.solver}, where its evaluation {expected} must be")
    counts[row.solver] = expected


def share_words(share: float) -> str:
    """Write a share of channels so that the same float is read again, without an exponent: 0.875, 1."""
    if share == 1:
        return "1"
    return format(Decimal(repr(share)), "f")


def _shares(text: str, groups: int | None) -> tuple[float, ...]:
    """Read the shares of channels that are kept. Raises ValueError for what are none, or of another number of groups."""
    if not _KEEP.fullmatch(text):
        raise ValueError(f"keep is {text[:40]!r}, not shares beyond 0 and at most 1, such as 0.5-1-0.875")
    shares = tuple(map(float, text.split("-")))
    if min(shares) == 0:
        raise ValueError("keep has a share of 0, and there is no layer without channels")
    if groups is not None and len(shares) != groups:
        raise ValueError(f"keep is of {len(shares)} groups of channels, the problem has {groups}")
    return shares


def _widths(operand: str, text: str, layers: int | None) -> tuple[int, ...]:
    if not _BITS.fullmatch(text):
        raise ValueError(f"the {operand} bits are {text[:40]!r}, not widths, 1 to 8, 16 or float, such as 8-4-16-float")
    widths = tuple(map(width_of, text.split("-")))
    if layers is not None and len(widths) != layers:
        raise ValueError(f"{operand} bits of {len(widths)} layers, the network has {layers}")
    return widths
