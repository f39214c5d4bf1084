"""Latency, energy, storage, bytes and shares, as a user reads and writes them."""

from __future__ import annotations

import decimal

from hw_models.files import describe_bytes as describe_bytes

UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6},
    "storage": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
}
DIGITS = 4  # of an amount
EXACT = 12  # digits that are meant of a float
DOWN, NEAREST, UP = decimal.ROUND_FLOOR, decimal.ROUND_HALF_EVEN, decimal.ROUND_CEILING
NOTHING = "–"  # what stands where there is no number


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
        amount: Seconds, joules or bytes.
        metric: "latency", "energy" or "storage".
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
