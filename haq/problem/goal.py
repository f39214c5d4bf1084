"""What is looked for: the best policy within the budgets, the cheapest that is good enough, or a trade-off of both."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from haq.problem.objective import Objective
from haq.store.units import PERCENT, show

CHEAPEST, TRADEOFF = "cheapest", "tradeoff"
# The exponents of MnasNet (Tan et al., CVPR 2019, section 3.1), within and beyond the target: soft, where twice the latency is
# worth 5 % of accuracy, and hard.
EXPONENTS = {"soft": (-0.07, -0.07), "hard": (0.0, -1.0)}
STEEPEST = -10  # exponent; a steeper one is a wall, which a budget is for, and its powers overflow
SLACK = 1e-9  # of values that are equal but for rounding


@dataclass(frozen=True)
class Goal:
    """What is looked for.

    Attributes:
        kind: "best", "cheapest" or "tradeoff".
        max_drop: Of the cheapest: how much worse than float's the objective may be; a share where the objective's unit is "%".
        at_least: Instead of that, the value that it must have.
        exponents: Of a trade-off: those of cost / target within the target, and beyond it.
    """

    kind: str = "best"
    max_drop: float | None = None
    at_least: float | None = None
    exponents: tuple[float, float] = (0.0, 0.0)

    def threshold(self, objective: Objective, float_value: float) -> float:
        """Return the worst value of the objective that is good enough; infinitely bad where any is."""
        if self.at_least is not None:
            return self.at_least
        if self.max_drop is None:
            return -float(objective.signed(math.inf))
        return float_value - float(objective.signed(self.max_drop))

    def is_met(self, objective: Objective, value: float, float_value: float) -> bool:
        """Say whether a value of the objective is good enough.

        Args:
            objective: What policies are judged by.
            value: The policy's.
            float_value: The float network's.

        Returns:
            Whether it is.
        """
        if self.kind != CHEAPEST:
            return True
        threshold = self.threshold(objective, float_value)
        slack = SLACK * max(1.0, abs(threshold))
        return bool(objective.signed(value) >= objective.signed(threshold) - slack)

    def drop(self, objective: Objective, value: float, float_value: float) -> float:
        """Tell how much worse a value is than the float network's.

        Args:
            objective: What policies are judged by.
            value: The policy's.
            float_value: The float network's.

        Returns:
            The difference in the objective's unit, a share for "%"; negative if the value is better.
        """
        return float(objective.signed(float_value) - objective.signed(value))

    def worth(self, value: float, cost: float, target: float) -> float:
        """Return MnasNet's objective: value x (cost / target)^w, w being the first exponent within the target.

        Args:
            value: Of the objective, positive and better when higher.
            cost: Of the policy.
            target: What it should cost, in the same unit.

        Returns:
            The value of the trade-off.
        """
        exponent = self.exponents[int(cost > target)]
        return float(value * (cost / target) ** exponent)

    def words(self, objective: Objective) -> str:
        """Say what is looked for: "the cheapest that loses at most 0.5 points"."""
        if self.kind == TRADEOFF:
            within, beyond = self.exponents
            return f"the largest {objective.title} x (cost / budget)^w, w = {within:g} within it and {beyond:g} beyond"
        if self.at_least is not None:
            bound = "at least"
            if not objective.higher_is_better:
                bound = "at most"
            return f"the cheapest with {objective.title} of {bound} {show(self.at_least, objective.unit)}"
        if self.max_drop is not None:
            amount = f"{self.max_drop:g} {objective.unit}".strip()
            if objective.unit == PERCENT:
                amount = f"{100 * self.max_drop:g} points"
                if amount == "1 points":
                    amount = "1 point"
            return f"the cheapest that loses at most {amount} of {objective.title}"
        return "the best"

    def check(self, objective: Objective, float_value: float) -> None:
        """Raise ValueError for a goal that means nothing now that the float network's value is known."""
        if self.kind == TRADEOFF and not (objective.higher_is_better and math.isfinite(float_value) and float_value > 0):
            raise ValueError(
                f"a trade-off multiplies the objective's value, which must be positive and better when higher; "
                f"{objective.name!r} is {show(float_value, objective.unit)} for the float network: use max_drop instead"
            )


BEST = Goal()


def read_goal(objective: Objective, max_drop: Any, at_least: Any, tradeoff: Any) -> Goal:
    """Make the goal of what a user gives.

    Args:
        objective: What policies are judged by.
        max_drop: Points of a share, or an amount in the objective's unit; None for nothing.
        at_least: A value of the objective; of a share 0.92 or "92%".
        tradeoff: "soft", "hard", "ALPHA,BETA" or the two exponents.

    Returns:
        The goal.

    Raises:
        ValueError: For what can't be, naming it, and if more than one is given.
    """
    given = [
        name for name, value in (("max_drop", max_drop), ("at_least", at_least), ("tradeoff", tradeoff)) if value is not None
    ]
    if not given:
        return BEST
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} don't go together: give one of them")
    if max_drop is not None:
        return Goal(CHEAPEST, max_drop=_drop(objective, max_drop))
    if at_least is not None:
        return Goal(CHEAPEST, at_least=_value(objective, at_least))
    return Goal(TRADEOFF, exponents=read_exponents(tradeoff))


def _drop(objective: Objective, given: Any) -> float:
    number = _number(given)
    if number is None or number < 0:
        raise ValueError(
            f"max_drop is {str(given)[:40]!r}; it must be a number from 0: points of a share, or the objective's unit"
        )
    if objective.unit != PERCENT:
        return number
    if number > 100:
        raise ValueError(f"max_drop is {number:g} points, more than a share can lose")
    return number / 100


def _value(objective: Objective, given: Any) -> float:
    text = str(given).strip()
    number = _number(text.removesuffix("%").strip())
    if number is None:
        raise ValueError(f"at_least is {text[:40]!r}; it must be a value of the objective, such as 0.92 or 92%")
    if text.endswith("%"):
        if objective.unit != PERCENT:
            raise ValueError(f"at_least is {text[:40]!r}; {objective.name} is no share: give a value of it")
        number /= 100
    if objective.unit == PERCENT and not 0 <= number <= 1:
        raise ValueError(f"at_least is {text[:40]!r}; {objective.name} is a share: give 0.92 or 92%")
    return number


def read_exponents(given: Any) -> tuple[float, float]:
    """Read the exponents of a trade-off.

    Args:
        given: "soft", "hard", "ALPHA,BETA" or two numbers.

    Returns:
        The exponents within and beyond the target, neither of them positive.

    Raises:
        ValueError: For anything else, naming it.
    """
    if isinstance(given, str) and given in EXPONENTS:
        return EXPONENTS[given]
    parts: list[Any] = []
    if isinstance(given, str):
        parts = re.split(r"\s*,\s*", given.strip())
    elif isinstance(given, tuple | list):
        parts = list(given)
    numbers = [_number(part) for part in parts]
    if len(numbers) != 2 or any(number is None or not STEEPEST <= number <= 0 for number in numbers):
        raise ValueError(
            f"tradeoff is {str(given)[:40]!r}; it must be soft, hard, or two exponents from {STEEPEST} to 0 such as -0.07,-1"
        )
    within, beyond = numbers
    assert within is not None
    assert beyond is not None
    return within, beyond


def _number(given: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(given, bool):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return number
