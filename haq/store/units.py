"""Amounts of latency, energy and storage, and shares, as a user reads and writes them."""

from __future__ import annotations

UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6},
    "storage": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
}


def best_unit(amount: float, metric: str) -> tuple[str, float]:
    """The unit in which an amount reads best, and its size: ("ms", 0.001)."""
    units = [(name, size) for name, size in UNITS[metric].items() if not name.endswith("iB")]
    fitting = [unit for unit in units if abs(amount) >= unit[1]] or [min(units, key=lambda unit: unit[1])]
    return max(fitting, key=lambda unit: unit[1])


def describe_amount(amount: float, metric: str) -> str:
    """An amount with the unit that reads best: 1.234 ms, 45.6 kB."""
    name, size = best_unit(amount, metric)
    return f"{amount / size:.4g} {name}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
