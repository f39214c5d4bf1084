"""Budgets: a fraction of a reference, or an amount with a unit."""

from __future__ import annotations

import re

from haq.store.units import UNITS

ROUNDING = 1e-9  # relative slack of a budget: sums of floats depend on their order


class OutOfReach(ValueError):
    """No policy costs so little, or none so much, on a target."""


def parse_budget(budget: float | str, metric: str, reference: float) -> float:
    """A budget in the metric's unit. "0.5" and 0.5 are fractions of `reference`; "12ms" is absolute."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(budget))
    units = UNITS.get(metric, {})
    try:
        if not match or (match[2] and match[2] not in units):
            raise ValueError
        return float(match[1]) * (units[match[2]] if match[2] else reference)
    except ValueError:
        raise ValueError(
            f"budget {budget!r} is not understood: give a fraction of uniform 8 bits such as 0.5, or an amount in "
            f"{', '.join(units)}"
        ) from None
