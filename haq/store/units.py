"""Latency, energy, storage, bytes, shares and values of objectives, as a user reads and writes them."""

from __future__ import annotations

import decimal
import math

from hw_models.files import describe_bytes as describe_bytes

_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2}
# Units by metric, in which amounts are written and read; that of size 1 is the one in which they are kept.
UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6},
    "storage": _BYTES,
    "bops": {"bops": 1.0, "kbops": 1e3, "Mbops": 1e6, "Gbops": 1e9, "Tbops": 1e12},
    "average_weight_bits": {"bits": 1.0},
    "memory_traffic": _BYTES,
    "peak_memory": _BYTES,
}
# Where the name isn't what an amount is of: "4 bits of average weight width".
_WORDS = {"bops": "bit operations", "average_weight_bits": "average weight width"}
# What a hardware target tells, estimated or measured; everything else is counted from the policy and the network.
TOLD_BY_TARGET = ("latency", "energy")
COUNTED = "counted"
DIGITS = 4  # of an amount
EXACT = 12  # digits that are meant of a float
DOWN, NEAREST, UP = decimal.ROUND_FLOOR, decimal.ROUND_HALF_EVEN, decimal.ROUND_CEILING
NOTHING = "–"  # what stands where there is no number
PERCENT = "%"  # the unit of an objective whose values are shares, 0 to 1
SAME = 1e-6  # the relative difference of two values that are the same but for rounding


def metric_words(metric: str) -> str:
    """Write a metric as sentences and tables do: "peak memory"."""
    return _WORDS.get(metric, metric.replace("_", " "))


def heading_of(metric: str, last: str) -> str:
    """Head the column of a metric, in three lines at most.

    Args:
        metric: The metric.
        last: What stands in the last of them, such as "(counted)".

    Returns:
        The lines; above a short one an empty one.
    """
    words = metric_words(metric).split(" ")
    if len(words) > 2:
        words = [" ".join(words[:-1]), words[-1]]
    return "\n".join(["", *words, last][-3:])


def kind_of_cost(metric: str, provenance: str) -> str:
    """Say of a metric whether its amounts are "estimated", "measured" or "counted".

    Args:
        metric: The metric.
        provenance: Of the target's latencies and energies: "estimated" or "measured", perhaps with how.

    Returns:
        The word.
    """
    if metric not in TOLD_BY_TARGET:
        return COUNTED
    return provenance.split(" ")[0]


def best_unit(amount: float, metric: str) -> tuple[str, float]:
    """Choose the unit in which an amount reads best; returns its name and size: ("ms", 0.001)."""
    units = [(name, size) for name, size in UNITS[metric].items() if not name.endswith("iB")]
    fitting = [unit for unit in units if abs(amount) >= unit[1]]
    if not fitting:
        return min(units, key=lambda unit: unit[1])
    return max(fitting, key=lambda unit: unit[1])


def describe_amount(amount: float, metric: str, rounding: str = NEAREST) -> str:
    """Write an amount with the unit that reads best: 1.234 ms, 45.6 kB.

    Args:
        amount: In the metric's own unit: seconds, joules, bytes, bit operations, bits.
        metric: One of UNITS.
        rounding: DOWN or UP make of it a bound that isn't above or below the amount.

    Returns:
        Up to four digits and the unit.
    """
    name, size = best_unit(amount, metric)
    number = amount / size
    if rounding != NEAREST:
        # 45.6 is a little more or less as a float, and is meant.
        meant = decimal.Context(EXACT).create_decimal_from_float(number)
        number = float(decimal.Context(DIGITS, rounding).create_decimal(meant))
    return f"{number:.{DIGITS}g} {name}"


def percent(share: float | None, digits: int = 2) -> str:
    """Write a share from 0 to 1 in percent: 92.50 %; a dash where there is none."""
    if share is None:
        return NOTHING
    return f"{100 * share:.{digits}f} %"


def worst_of(unit: str, higher_is_better: bool) -> float:
    """Return the value of a network whose outputs aren't finite: no sample is answered rightly, or it is infinite."""
    if not higher_is_better:
        return math.inf
    if unit == PERCENT:
        return 0.0
    return -math.inf


def finite(value: float | None) -> float | None:
    """Return a value as JSON holds it: None where it is infinite or no number."""
    if value is None or not math.isfinite(value):
        return None
    return value


def show(value: float | None, unit: str, digits: int = 2) -> str:
    """Write an objective's value: 92.50 %, 28.41 dB, 0.0123; a dash where there is none.

    Args:
        value: The value; of the unit "%" a share from 0 to 1.
        unit: The objective's unit, or nothing.
        digits: Of a percentage, behind its point; other values have four digits.

    Returns:
        The number with its unit.
    """
    if value is None or math.isnan(value):
        return NOTHING
    if unit != PERCENT:
        return f"{_number(value, DIGITS)} {unit}".rstrip()
    if math.isinf(value):
        return f"{_number(value, DIGITS)} %"
    return percent(value, digits)


def show_error(error: float, unit: str) -> str:
    """Write the standard error of a value, to follow the value and ±: in points for shares, with two digits for others."""
    if unit == PERCENT:
        return f"{100 * error:.2f}"
    return _number(error, 2)


def show_difference(better_by: float, unit: str, higher_is_better: bool = True) -> str:
    """Say how far a value is from another, to be followed by what the other is of: "0.70 points below", "as good as".

    Args:
        better_by: How much better it is; negative if it is worse. Of the unit "%" a difference of shares.
        unit: The objective's unit, or nothing.
        higher_is_better: Where a lower value is better, below and above would mislead: "0.12 nats worse than".

    Returns:
        The words.
    """
    number = f"{_number(abs(better_by), 3)} {unit}".rstrip()
    if unit == PERCENT:
        number = f"{100 * abs(better_by):.2f} points"
    if better_by == 0 or number == "0.00 points":
        return "as good as"
    worse, better = "worse than", "better than"
    if higher_is_better:
        worse, better = "below", "above"
    if better_by < 0:
        return f"{number} {worse}"
    return f"{number} {better}"


def held_against(value: float, other: float, unit: str, higher_is_better: bool = True) -> str:
    """Say how far a value is from another, as `show_difference` does; none if they are the same but for rounding.

    Args:
        value: The value.
        other: What it is held against.
        unit: The objective's unit, or nothing.
        higher_is_better: Its direction.

    Returns:
        The words, to be followed by what the other value is of.
    """
    if math.isclose(value, other, rel_tol=SAME):
        return show_difference(0.0, unit, higher_is_better)
    better_by = value - other
    if not higher_is_better:
        better_by = other - value
    return show_difference(better_by, unit, higher_is_better)


def plotted(value: float, unit: str) -> float:
    """Return a value as it is drawn: shares in percent, others as they are."""
    if unit == PERCENT:
        return 100 * value
    return value


def counted(number: int, things: str) -> str:
    """Write how many things there are: "12 epochs", "1 epoch".

    Args:
        number: How many.
        things: What, in the plural that an s makes.

    Returns:
        The words, with commas between thousands.
    """
    if number == 1:
        things = things.removesuffix("s")
    return f"{number:,} {things}"


def _number(value: float, digits: int) -> str:
    """Write a number with some digits; large ones without an exponent as long as that can be read."""
    if math.isinf(value):
        return str(value).replace("inf", "∞")
    if 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def begin(title: str) -> str:
    """Write what an objective is called at the beginning of a sentence: "Accuracy", but "mIoU" and "my_loss" as they are."""
    if title.islower() and title[0].isalpha() and "_" not in title:
        return title[0].upper() + title[1:]
    return title
