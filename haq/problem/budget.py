"""Budgets: a fraction of a reference, or an amount with a unit."""

from __future__ import annotations

import re

from haq.store.units import UNITS


class OutOfReach(ValueError):
    """A budget is below the cheapest policy of a target, or above the dearest."""


def parse_budget(budget: float | str, metric: str, reference: float) -> float:
    """Turn a budget into an amount in the metric's unit.

    Args:
        budget: 0.5 and "0.5" are fractions of `reference`; "12ms" is absolute.
        metric: One of `hw_models.METRICS`.
        reference: What the reference policy costs, in the metric's unit.

    Returns:
        In the metric's unit.

    Raises:
        ValueError: For anything else, naming the units.
    """
    units = UNITS.get(metric, {})
    # Tables and pages write a micro as such.
    text = str(budget).replace("µ", "u").replace("μ", "u")
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        if not match:
            raise ValueError
        number = float(match[1])
        if not match[2]:
            return number * reference
        if match[2] in units:
            return number * units[match[2]]
        raise ValueError
    except ValueError:
        raise ValueError(
            f"budget {budget!r} is not understood: give a fraction of the reference such as 0.5, or an amount in "
            f"{', '.join(units)}"
        ) from None
