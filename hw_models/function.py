"""A target that is a function of one's own: (layer, w, a) -> seconds.

    # mychip.py; then: haq search --hw mychip:latency
    def latency(layer, w, a):
        if (w, a) not in ((8, 8), (4, 8)):
            return None
        return layer.macs * w * a / 64 / 2e9

`layer` is a `hw_models.Layer`. `w` and `a` are the widths of weights and activations as in a policy: 1 to 8, 16, and None for
float. The function returns the seconds of a batch, or a mapping with "latency_s", "energy_j" or both; None, NaN or infinity
says that the hardware can't do the pair. It is called once for every layer and pair: layers of the same shape are asked for
each by itself, since a function may look at the name.

What it may say of itself by attributes: `capabilities` (then only the pairs that these support are asked for), `provenance`
("estimated"), `batch` (1), `zero_points` (False), `description` (the first line of its docstring).

Without capabilities a function is asked for all pairs. Many are written for 1 to 8 bits alone: where one fails at 16 bits or
float, it can't do the pair, and a warning says so. Any other failure is an error.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hw_models.capabilities import Capabilities, capabilities_of, within
from hw_models.cost import CostTable, Floats, check_batch
from hw_models.registry import printable
from hw_models.storage import BITS, storage_bytes
from hw_models.widths import FLOAT, PLACES, WIDTHS, pair_words
from hw_models.workload import Layer, Workload

KEYS = ("latency_s", "energy_j")
ESTIMATED = "estimated"
ARGUMENTS = "(layer, w, a)"


@dataclass(frozen=True)
class FunctionTarget:
    """A target whose costs are what a function of (layer, w, a) returns; see the module.

    Attributes:
        function: The function.
        name: What it is called, such as "mychip:latency".
    """

    function: Callable[[Layer, int | None, int | None], Any]
    name: str

    def __post_init__(self) -> None:
        """Raise ValueError for an attribute of the function that isn't what it is for."""
        for name in ("provenance", "batch", "capabilities", "zero_points"):
            getattr(self, name)

    @property
    def description(self) -> str:
        """Its own `description`, or the first line of its docstring."""
        documented = self.function
        while isinstance(documented, functools.partial):
            documented = documented.func
        said = getattr(self.function, "description", None) or inspect.getdoc(documented) or ""
        return printable(str(said).strip().partition("\n")[0]) or f"costs by the function {self.name}"

    @property
    def provenance(self) -> str:
        """Its own, or "estimated".

        Raises:
            ValueError: For one that is no text.
        """
        said = getattr(self.function, "provenance", ESTIMATED)
        if not isinstance(said, str) or not said.strip():
            raise ValueError(f"`provenance` of {self.name} is {said!r}; it must be a text, such as 'measured on a board'")
        return printable(said)

    @property
    def batch(self) -> int:
        """Images at a time.

        Raises:
            ValueError: For what is no positive integer.
        """
        try:
            return check_batch(getattr(self.function, "batch", 1))
        except ValueError as error:
            raise ValueError(f"`batch` of {self.name}: {error}") from error

    @property
    def zero_points(self) -> bool:
        """Whether it computes with activations that have zero points.

        Raises:
            ValueError: For anything but True or False.
        """
        said = getattr(self.function, "zero_points", False)
        if not isinstance(said, bool):
            raise ValueError(f"`zero_points` of {self.name} is {str(said)[:40]!r}; it must be True or False")
        return said

    @property
    def capabilities(self) -> Capabilities | None:
        """What it can do. Raises ValueError for what isn't `Capabilities`, or a mapping of its keys."""
        return capabilities_of(_Named(self.name, getattr(self.function, "capabilities", None)))

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Ask the function for every layer and pair of widths that its capabilities support.

        Args:
            workload: The layers.
            batch: Images at a time; None is the function's own, and no other is taken.

        Returns:
            The costs, in seconds, joules and bytes.

        Raises:
            ValueError: Naming the function, the layer and the pair, if it fails or returns anything but costs; for a layer
                that it can't do at any pair, and for another batch than it is for.
        """
        if batch is not None and check_batch(batch) != self.batch:
            raise ValueError(f"{self.name} is for a batch of {self.batch}, not {batch}")
        asked = np.ones((len(workload), PLACES, PLACES), bool)
        if self.capabilities is not None:
            try:
                asked = self.capabilities.supported(workload)
            except ValueError as error:
                raise ValueError(printable(f"hardware target {self.name!r}: {error}")) from error
        costs = np.full((len(KEYS), *asked.shape), np.nan)
        failures: list[str] = []
        for index, row, column in np.argwhere(asked):
            layer, w, a = workload.layers[index], WIDTHS[row], WIDTHS[column]
            costs[:, index, row, column] = self._ask(layer, w, a, failures)
        if failures:
            logging.getLogger("haq").warning(
                "%s is taken to have no 16 bits or float where it fails there: %s; to say what it can do, return None for the "
                "other pairs, or give it the attribute `capabilities`",
                self.name,
                failures[0],
            )
        latency, energy = self._whole(workload, costs)
        table = CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=self.batch,
            latency_s=latency,
            energy_j=energy,
            storage_bytes=storage_bytes(workload),
        )
        return within(self, table)

    def _ask(self, layer: Layer, w: int, a: int, failures: list[str]) -> tuple[float, float]:
        """Return seconds and joules of a layer at a pair, NaN for what isn't told; a failure beyond 8 bits is noted."""
        try:
            told = self.function(layer, _as_in_policies(w), _as_in_policies(a))
        except (Exception, SystemExit) as error:
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
            sentence = f"{self.name} failed for layer {layer.name!r} at {pair_words(w, a)}: {reason}"
            if self.capabilities is None and max(w, a) > BITS:
                failures.append(sentence)
                return math.nan, math.nan
            raise ValueError(sentence) from error
        if told is None:
            return math.nan, math.nan
        where = f"for layer {layer.name!r} at {pair_words(w, a)}"
        if not isinstance(told, Mapping):
            return self._number(told, "", where), math.nan
        if not told or not set(told) <= set(KEYS):
            wrong = ", ".join(map(repr, told)) or "nothing"
            raise ValueError(printable(f"{self.name} returns {wrong} {where}; it may return {' and '.join(KEYS)}"))
        latency, energy = (self._number(told.get(key), f"{key} ", where) for key in KEYS)
        if len(told) == len(KEYS) and math.isnan(latency) != math.isnan(energy):
            raise ValueError(
                f"{self.name} returns only one of {' and '.join(KEYS)} {where}: return None for a pair that it can't do"
            )
        return latency, energy

    def _number(self, value: Any, what: str, where: str) -> float:
        """Return a cost, NaN for a pair that can't be done. Raises ValueError for what is none."""
        if value is None:
            return math.nan
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # a scalar of NumPy or torch
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            shown = printable(f"{type(value).__name__} {str(value)[:40]!r}")
            raise ValueError(
                f"{self.name} returns {what}{shown} {where}; it must return a positive number, or None for a pair that "
                "it can't do"
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
            if value < 0:
                number = -math.inf
        if number <= 0:
            raise ValueError(
                f"{self.name} returns {what}{number:g} {where}; it must return a positive number, or None for a pair that it "
                "can't do"
            )
        if math.isinf(number):
            return math.nan
        return number

    def _whole(self, workload: Workload, costs: Floats) -> tuple[Floats | None, Floats | None]:
        """Return what is told of latency and of energy, None for nothing.

        Raises ValueError, naming the layer, for one that the function can't do, and for a metric that it tells of some pairs
        only.
        """
        told = np.isfinite(costs)
        able = told[0] | told[1]
        possible = able.reshape(len(workload), -1).any(1)
        if not possible.all():
            layer = workload.names[int(np.argmin(possible))]
            raise ValueError(f"{self.name} can't do layer {layer!r} at any pair of widths")
        found: list[Floats | None] = []
        for key, of_key, cost in zip(KEYS, told, costs, strict=True):
            if not of_key.any():
                found.append(None)
                continue
            if (of_key != able).any():
                index, row, column = np.argwhere(of_key != able)[0]
                raise ValueError(
                    f"{self.name} returns no {key} for layer {workload.names[index]!r} at "
                    f"{pair_words(WIDTHS[row], WIDTHS[column])}, and does so elsewhere: return the same everywhere"
                )
            found.append(cost)
        return found[0], found[1]


@dataclass(frozen=True)
class _Named:
    """Capabilities with the name of what they belong to."""

    name: str
    capabilities: Any


def is_function(thing: Any) -> bool:
    """Say whether something is a function of (layer, w, a), and no factory that takes no arguments."""
    if not callable(thing) or isinstance(thing, type):
        return False
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return False
    return _takes(signature, 3) and not _takes(signature, 0)


def _takes(signature: inspect.Signature, count: int) -> bool:
    """Say whether a call with so many arguments fits a signature."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _as_in_policies(width: int) -> int | None:
    if width == FLOAT:
        return None
    return width
