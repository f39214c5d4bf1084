"""What every layer costs at every pair of bits, and what a policy costs in sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw_models.notebook import html_table
from hw_models.storage import BITS, untied_bytes
from hw_models.workload import Workload

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

UNITS = {"latency": "s", "energy": "J", "storage": "B"}
METRICS = tuple(UNITS)
FLOATS = ("latency_s", "energy_j", "storage_bytes")
# A cost of so much, or so many times what the layer's cheapest pair costs, says that the pair can't be had. Pairs that can
# differ by some hundreds.
ABSURD = 1e30
ABSURD_RATIO = 1e6


class Costs(NamedTuple):
    """Costs of policies, summed over the layers; None where the target has no such metric."""

    latency_s: Floats | None
    energy_j: Floats | None
    storage_bytes: Floats | None
    cycles: Integers | None


@dataclass(frozen=True, repr=False)
class CostTable:
    """Costs of every layer at every pair of widths on one target, for one batch.

    Arrays have shape (layers, 8, 8) and are indexed [layer, weight bits - 1, activation bits - 1]. `latency_s` is in
    seconds, `energy_j` in joules, `storage_bytes` in bytes; a metric that the target doesn't have is None. A pair that the
    target can't do in a layer is NaN in all of these (it is made so, if infinity, NaN or an absurdly large cost is given in
    one). `bound` holds the index in `bounds` of what limits each cell. `counters` are further integer arrays of the same
    shape, by name.
    """

    target: str
    provenance: str  # "estimated" or "measured", and how
    workload: Workload
    batch: int
    latency_s: Floats | None
    energy_j: Floats | None
    storage_bytes: Floats
    cycles: Integers | None = None
    bound: Integers | None = None
    bounds: tuple[str, ...] = ()
    counters: Mapping[str, Integers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every cost is positive, that each layer can be done, and that all has the shape of the workload."""
        shape = (len(self.workload), BITS, BITS)
        if self.storage_bytes is None:
            raise ValueError(f"storage_bytes of {self.target} is None; every target has storage")
        for name in ("latency_s", "energy_j", "storage_bytes", "cycles"):
            array: object = getattr(self, name)
            if array is None:
                continue
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} of {self.target} must be a NumPy array, not {type(array).__name__}")
            if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name} of {self.target} must hold numbers, not {array.dtype}")
            if array.shape != shape:
                raise ValueError(f"{name} of {self.target} has shape {array.shape}, not {shape}")
            if (array <= 0).any():
                layer = int(np.argwhere(array <= 0)[0][0])
                raise ValueError(f"{name} of {self.target} is not a positive number for {self.workload.names[layer]!r}")
        self._mark_unsupported()

    def _mark_unsupported(self) -> None:
        """Make the costs NaN of what the target can't do."""
        arrays = {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}
        supported = np.ones((len(self.workload), BITS, BITS), bool)
        for array in arrays.values():
            sane = np.isfinite(array) & (array < ABSURD)
            cheapest = np.where(sane, array, ABSURD).min((1, 2), keepdims=True)
            supported &= sane & (array <= ABSURD_RATIO * cheapest)
        if supported.all():
            return
        able = supported.any((1, 2))
        if not able.all():
            layer = self.workload.names[int(np.argmin(able))]
            raise ValueError(
                f"{' or '.join(arrays)} of {self.target} is not a positive number for {layer!r}, whatever the pair of widths"
            )
        for name, array in arrays.items():
            object.__setattr__(self, name, np.where(supported, array, np.nan))

    @cached_property
    def supported(self) -> NDArray[np.bool_]:
        """Tell which pairs of widths the target can do in each layer, shape (layers, 8, 8)."""
        return np.isfinite(self.storage_bytes)

    def __repr__(self) -> str:
        """Say on one line what was priced where, and what it costs at 8 bits."""
        costs = [f"{metric} {_digits(self._at_most_bits(metric), metric, UNITS[metric])}" for metric in self.metrics]
        return f"CostTable({self._about}; at w{BITS}/a{BITS} {', '.join(costs)})"

    def _repr_html_(self) -> str:
        rows = []
        for metric in self.metrics:
            array = self.metric(metric)
            least, most = np.nanmin(array, (1, 2)).sum(), np.nanmax(array, (1, 2)).sum()
            amounts = (self._at_most_bits(metric), float(least), float(most))
            rows.append((metric, UNITS[metric], *(_digits(amount, metric) for amount in amounts)))
        headings = ("metric", "unit", f"at w{BITS}/a{BITS}", "least of any policy", "most of any policy")
        return html_table(self._about, headings, rows)

    @property
    def _about(self) -> str:
        images = "1 image"
        if self.batch > 1:
            images = f"{self.batch} images"
        return f"{len(self.workload)} layers on {self.target}, {self.provenance}, one batch of {images}"

    def _at_most_bits(self, metric: str) -> float:
        """The cost of all layers at the largest widths."""
        return float(self.metric(metric)[:, -1, -1].sum())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics this target has."""
        present = {"latency": self.latency_s, "energy": self.energy_j, "storage": self.storage_bytes}
        return tuple(name for name, array in present.items() if array is not None)

    def metric(self, name: str) -> Floats:
        """Return the array of `latency` (s), `energy` (J) or `storage` (B).

        Raises ValueError listing what there is.
        """
        if name not in self.metrics:
            raise ValueError(f"target {self.target} has no metric {name!r}; it has {', '.join(self.metrics)}")
        array = {"latency": self.latency_s, "energy": self.energy_j, "storage": self.storage_bytes}[name]
        assert array is not None
        return array

    def price(self, w_bits: object, a_bits: object) -> Costs:
        """Sum the costs of policies over their layers.

        Args:
            w_bits: Weight widths, integers of shape (..., layers).
            a_bits: Activation widths, the same shape.

        Returns:
            Costs of shape (...): seconds, joules, bytes and cycles; None where the target has no such metric.

        Raises:
            ValueError: For bits outside 1..8, for another number of layers, for bits that aren't integers, and for a pair that
                the target can't do, naming it and the layer.
        """
        w, a = self._checked("w_bits", w_bits), self._checked("a_bits", a_bits)
        # One index into each flattened table: four times as fast as three.
        cell = BITS * w.astype(np.intp) + a - (BITS + 1)
        cell += BITS * BITS * np.arange(len(self.workload))

        def total(table: NDArray[np.generic] | None) -> NDArray[np.generic] | None:
            if table is None:
                return None
            return table.reshape(-1).take(cell).sum(-1)

        stored: Any = total(self.storage_bytes)
        if np.isnan(stored).any():
            first = tuple(np.argwhere(~self.supported.reshape(-1).take(cell))[0])
            w_first, a_first = np.broadcast_arrays(w, a)
            name = self.workload.names[first[-1]]
            raise ValueError(f"{self.target} can't do layer {name!r} at w{w_first[first]}/a{a_first[first]}")
        if self.workload.tied_weights:
            stored = stored + untied_bytes(self.workload, w)
        return Costs(
            total(self.latency_s),  # type: ignore[arg-type]
            total(self.energy_j),  # type: ignore[arg-type]
            stored,
            total(self.cycles),  # type: ignore[arg-type]
        )

    def _checked(self, name: str, bits: object) -> NDArray[np.integer]:
        array = np.asarray(bits)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be integers, not {array.dtype}")
        if array.ndim == 0 or array.shape[-1] != len(self.workload):
            raise ValueError(f"{name} has shape {array.shape}; its last dimension must be {len(self.workload)} layers")
        if array.size and not (array.min() >= 1 and array.max() <= BITS):
            raise ValueError(f"{name} must be from 1 to {BITS}, found {array.min()} to {array.max()}")
        return array


def _digits(amount: float, metric: str, unit: str = "") -> str:
    """Write an amount with four digits, and its unit if one is given; bytes are whole."""
    if np.isnan(amount):
        return "not supported"
    if UNITS[metric] == "B":
        return f"{amount:,.0f} {unit}".strip()
    return f"{amount:.4g} {unit}".strip()


def check_batch(batch: object) -> int:
    """Return a batch as it was given. Raises ValueError unless it is a positive integer."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a positive integer, not {batch!r}")
    return batch


def undominated(cost: Floats, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the allowed pairs worth choosing: no other allowed pair has at least their bits at no more cost.

    `cost` and `allowed` have shape (layers, 8, 8), and so has what is returned. It assumes that more bits never hurt
    accuracy, and nothing about cost.
    """
    worth = allowed.copy()
    priced = np.where(allowed, cost, np.inf)
    for w in range(BITS):
        for a in range(BITS):
            above = priced[:, w:, a:].copy()
            above[:, 0, 0] = np.inf
            worth[:, w, a] &= above.min((1, 2)) > cost[:, w, a]
    return worth
