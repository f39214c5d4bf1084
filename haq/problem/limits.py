"""What a policy may cost: one limit for each metric that is budgeted, all of which it must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_models.metrics import PEAK
from hw_models.storage import peak_activation_bytes
from hw_models.workload import Workload

ROUNDING = 1e-9  # relative slack of a budget: sums of floats depend on their order


@dataclass(frozen=True)
class Limit:
    """The most that a policy may cost by one metric.

    Attributes:
        metric: Its name.
        unit: Of all amounts here (`hw_models.UNITS`).
        amount: What is allowed.
        reference: What the reference policy costs, of which a budget can be a fraction.
        smallest: The least that a policy can cost.
        largest: The most that a budget needs to be.
        is_given: False for a metric that is minimised, or priced, without a budget of its own.
    """

    metric: str
    unit: str
    amount: float
    reference: float
    smallest: float
    largest: float
    is_given: bool = True

    @property
    def fraction(self) -> float:
        """Return the limit as a fraction of the reference policy's cost."""
        return self.amount / self.reference

    @property
    def is_sum(self) -> bool:
        """Say whether the metric is a sum over layers."""
        return self.metric != PEAK

    def holds(self, cost: float) -> bool:
        """Say whether a cost is within the limit, but for rounding."""
        return cost <= self.amount * (1 + ROUNDING)


@dataclass(frozen=True)
class PeakLimit:
    """The limit of the memory that activations take at one time, which is no sum over layers.

    It never falls when a layer's activations get more bits.

    Attributes:
        workload: The layers, and the activations between them.
        batch: Images at a time.
        amount: Bytes.
    """

    workload: Workload
    batch: int
    amount: float

    def of(self, a_bits: object) -> NDArray[np.int64]:
        """Return the peak of activation widths, integers (..., layers) with 32 for float: bytes, shape (...)."""
        return peak_activation_bytes(self.workload, a_bits, batch=self.batch)

    def holds(self, a_bits: object) -> bool:
        """Say whether activation widths, integers (layers,), keep the limit."""
        return bool(self.of(a_bits) <= self.amount * (1 + ROUNDING))


def budgets_of(budget: object, metric: str) -> dict[str, float | str]:
    """Bring what a user gives as a budget into one form: amounts or fractions by metric.

    Args:
        budget: A number or a text for `metric`; a mapping by metric; or a text such as "latency=0.5,storage=40kB".
        metric: What a budget without a name is of.

    Returns:
        Budgets by metric, in the order in which they were given.

    Raises:
        ValueError: For an empty budget, and for a metric that is there twice.
    """
    if isinstance(budget, Mapping):
        found = {str(name): value for name, value in budget.items()}
    elif isinstance(budget, str) and ("=" in budget or "," in budget):
        found = _named(budget, metric)
    else:
        found = {metric: budget}
    if not found:
        raise ValueError("budget is empty: give at least one, such as {'latency': 0.5}")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float | np.floating | np.integer):
            raise ValueError(
                f"budget of {name} is {str(value)[:40]!r}; it must be a fraction such as 0.5, or a text with a unit"
            )
    return found  # type: ignore[return-value]


def _named(text: str, metric: str) -> dict[str, object]:
    """Read budgets that are parted by commas, METRIC=LIMIT each, or LIMIT alone."""
    found: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = metric, part
        name, value = name.strip(), value.strip()
        if not value:
            raise ValueError(f"budget {text[:80]!r} has an empty part; write METRIC=LIMIT, such as latency=0.5,storage=40kB")
        if name in found:
            raise ValueError(f"budget {text[:80]!r} limits {name} twice")
        found[name] = value
    return found
