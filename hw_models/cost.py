"""What every layer costs at every pair of bits, and what a policy costs in sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw_models.metrics import COUNTED, METRICS, PEAK, UNITS
from hw_models.notebook import html_table
from hw_models.storage import BITS, IN_FLOAT, peak_activation_bytes, untied_bytes
from hw_models.widths import ACCEPTED, FLOAT, PLACES, WIDTHS, at_places, pair_words, places
from hw_models.workload import Workload

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FLOATS = ("latency_s", "energy_j", "storage_bytes")
# A cost of so much, or so many times what the layer's cheapest pair costs, says that the pair can't be had. Pairs that can
# differ by some hundreds.
ABSURD = 1e30
ABSURD_RATIO = 1e6
MOST_BATCH = 2**16  # images; with many more, integers of cycles and bytes would overflow
MOST_PAIRS = 12  # of widths, in a message


class Costs(NamedTuple):
    """Costs of policies, summed over the layers; None where the target has no such metric."""

    latency_s: Floats | None
    energy_j: Floats | None
    storage_bytes: Floats | None
    cycles: Integers | None


@dataclass(frozen=True, repr=False)
class CostTable:
    """Costs of every layer at every pair of widths on one target, for one batch.

    Arrays have shape (layers, 10, 10) and are indexed [layer, place of the weights' width, place of the activations'], places
    being those of `hw_models.widths`: bits - 1 for 1 to 8 bits, then 16 bits and float. Arrays (layers, 8, 8) are taken too,
    of a target that does neither of these, and (layers, 9, 9) of one without float. `latency_s` is in seconds, `energy_j` in
    joules, `storage_bytes` in bytes; a metric that the target doesn't have is None. A pair that the target can't do in a layer
    is NaN in all of these (it is made so, if infinity, NaN or an absurdly large cost is given in one), and 0 in `cycles`.
    `bound` holds the index in `bounds` of what limits each cell. `counters` are further integer arrays of the same shape, by
    name.

    Raises:
        ValueError: For a cost that isn't positive, a layer that can't be done at any pair, and arrays of other shapes.
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
    within: object = None  # the `hw_models.Capabilities` that the costs have been brought within; None: none yet

    def __post_init__(self) -> None:
        """Check that every cost is positive, that each layer can be done, and that all has the shape of the workload."""
        if self.storage_bytes is None:
            raise ValueError(f"storage_bytes of {self.target} is None; every target has storage")
        for name in (*FLOATS, "cycles", "bound"):
            array: object = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, self._complete(name, array))
        counters = {name: self._complete(name, array) for name, array in self.counters.items()}
        object.__setattr__(self, "counters", counters)
        for name in FLOATS:
            self._check_positive(name, True)
        self._mark_unsupported()
        self._check_positive("cycles", self.supported)

    def _check_positive(self, name: str, where: Any) -> None:
        """Raise ValueError, naming a layer and a pair, for a cost that isn't positive."""
        array = getattr(self, name)
        if array is None:
            return
        wrong = where & (array <= 0)
        if name == "storage_bytes":
            wrong = where & (array < 0)
        if wrong.any():
            layer, w, a = np.argwhere(wrong)[0]
            raise ValueError(
                f"{name} of {self.target} is not a positive number for {self.workload.names[layer]!r} at "
                f"{pair_words(*at_places([w, a]))}"
            )

    def _complete(self, name: str, array: object) -> NDArray[Any]:
        """Check an array, and give one of fewer widths the places of 16 bits and float."""
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} of {self.target} must be a NumPy array, not {type(array).__name__}")
        if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} of {self.target} must hold numbers, not {array.dtype}")
        layers = len(self.workload)
        if array.shape == (layers, PLACES, PLACES):
            return array
        if array.shape not in ((layers, BITS, BITS), (layers, IN_FLOAT, IN_FLOAT)):
            raise ValueError(f"{name} of {self.target} has shape {array.shape}, not {(layers, PLACES, PLACES)}")
        if name in FLOATS:
            complete: NDArray[Any] = np.full((layers, PLACES, PLACES), np.nan)
        else:
            complete = np.zeros((layers, PLACES, PLACES), array.dtype)
        given = array.shape[-1]
        complete[:, :given, :given] = array
        return complete

    def _mark_unsupported(self) -> None:
        """Make the costs NaN, and the cycles 0, of what the target can't do."""
        arrays = {name: getattr(self, name) for name in FLOATS if getattr(self, name) is not None}
        supported = np.ones((len(self.workload), PLACES, PLACES), bool)
        for array in arrays.values():
            sane = np.isfinite(array) & (array < ABSURD)
            cheapest = np.where(sane, array, ABSURD).min((1, 2), keepdims=True)
            # A layer that has an earlier one's weight stores nothing of its own in float.
            supported &= sane & ((array <= ABSURD_RATIO * cheapest) | (cheapest <= 0))
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
        if self.cycles is not None:
            object.__setattr__(self, "cycles", np.where(supported, self.cycles, 0))

    @cached_property
    def supported(self) -> NDArray[np.bool_]:
        """Tell which pairs of widths the target can do in each layer, shape (layers, 10, 10)."""
        return np.isfinite(self.storage_bytes)

    def pairs_of(self, layer: int) -> list[tuple[int, int]]:
        """List the pairs of widths that the target can do in a layer, float being 32.

        Args:
            layer: The layer's place in the workload.

        Returns:
            Pairs of weight and activation widths, ascending.
        """
        found = at_places(np.argwhere(self.supported[layer]))
        return [(int(w), int(a)) for w, a in found]

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
        return float(self.metric(metric)[:, BITS - 1, BITS - 1].sum())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics this target has."""
        present = {"latency": self.latency_s, "energy": self.energy_j, "storage": self.storage_bytes}
        return tuple(name for name, array in present.items() if array is not None)

    def metric(self, name: str) -> Floats:
        """Return a metric's costs by layer and pair of widths.

        Args:
            name: The metric: one of `all_metrics`.

        Returns:
            Costs in the metric's unit (`hw_models.UNITS`), shape (layers, 10, 10).

        Raises:
            ValueError: For a metric that the target doesn't have, listing what there is, and for `peak_memory`, which is no
                sum over layers: see `total`.
        """
        if name == PEAK:
            raise ValueError(f"{PEAK} is no sum over layers, so no layer has a part of it: `total` tells what a policy takes")
        if name in COUNTED:
            return self._counted(name)
        if name not in self.metrics:
            raise ValueError(f"target {self.target} has no metric {name!r}; it has {', '.join(self.all_metrics)}")
        array = {"latency": self.latency_s, "energy": self.energy_j, "storage": self.storage_bytes}[name]
        assert array is not None
        return array

    def _counted(self, name: str) -> Floats:
        """Count a metric that doesn't depend on the target, but for what it can't do; once."""
        if name not in self._kept:
            self._kept[name] = np.where(self.supported, COUNTED[name](self.workload), np.nan)
        return self._kept[name]

    @cached_property
    def _kept(self) -> dict[str, Floats]:
        return {}

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """List the metrics that a budget can be of: the target's own, and those that are counted from the workload."""
        return tuple(name for name in METRICS if name in self.metrics or name in COUNTED or self._has_peak(name))

    def _has_peak(self, name: str) -> bool:
        return name == PEAK and bool(self.workload.buffers)

    def total(self, name: str, w_bits: object, a_bits: object) -> Floats:
        """Tell what policies cost by one metric.

        Args:
            name: The metric.
            w_bits: Weight widths, integers of shape (..., layers), float being 32.
            a_bits: Activation widths, the same shape.

        Returns:
            Costs of shape (...), in the metric's unit (`hw_models.UNITS`); `peak_memory` is for the table's batch.

        Raises:
            ValueError: As `metric` and `price` do.
        """
        w, a = self._checked("w_bits", w_bits), self._checked("a_bits", a_bits)
        cell = self._cells(w, a)
        if name == PEAK:
            return peak_activation_bytes(self.workload, np.broadcast_to(a, cell.shape), batch=self.batch).astype(np.float64)
        found: Floats = self.metric(name).reshape(-1).take(cell).sum(-1)
        if name == "storage" and self.workload.tied_weights:
            found = found + untied_bytes(self.workload, np.broadcast_to(w, cell.shape))
        return found

    def price(self, w_bits: object, a_bits: object) -> Costs:
        """Sum the costs of policies over their layers.

        Args:
            w_bits: Weight widths, integers of shape (..., layers).
            a_bits: Activation widths, the same shape.

        Returns:
            Costs of shape (...): seconds, joules, bytes and cycles; None where the target has no such metric.

        Raises:
            ValueError: For what are no widths (float is 32), for another number of layers, for bits that aren't integers, and
                for a pair that the target can't do, naming it, the layer and what it can do.
        """
        w, a = self._checked("w_bits", w_bits), self._checked("a_bits", a_bits)
        cell = self._cells(w, a)

        def total(table: NDArray[np.generic] | None) -> NDArray[np.generic] | None:
            if table is None:
                return None
            return table.reshape(-1).take(cell).sum(-1)

        stored: Any = total(self.storage_bytes)
        if self.workload.tied_weights:
            stored = stored + untied_bytes(self.workload, w)
        return Costs(
            total(self.latency_s),  # type: ignore[arg-type]
            total(self.energy_j),  # type: ignore[arg-type]
            stored,
            total(self.cycles),  # type: ignore[arg-type]
        )

    def _cells(self, w: NDArray[np.integer], a: NDArray[np.integer]) -> NDArray[np.intp]:
        """Return the index into a flattened table for every layer of policies.

        Raises ValueError for a pair that the target can't do.
        """
        # One index into each flattened table: four times as fast as three.
        cell = PLACES * places(w) + places(a)
        cell += PLACES * PLACES * np.arange(len(self.workload))
        able = self.supported.reshape(-1).take(cell)
        if not able.all():
            first = tuple(np.argwhere(~able)[0])
            w_all, a_all = np.broadcast_arrays(w, a)
            layer = int(first[-1])
            raise ValueError(
                f"{self.target} can't do layer {self.workload.names[layer]!r} at w{w_all[first]}/a{a_all[first]}; "
                f"it can do {describe_pairs(self.pairs_of(layer))}"
            )
        return cell

    def _checked(self, name: str, bits: object) -> NDArray[np.integer]:
        array = np.asarray(bits)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be integers, float being {FLOAT}, not {array.dtype}")
        if array.ndim == 0 or array.shape[-1] != len(self.workload):
            raise ValueError(f"{name} has shape {array.shape}; its last dimension must be {len(self.workload)} layers")
        wrong = array[~np.isin(array, WIDTHS)]
        if wrong.size:
            raise ValueError(f"{name} must be from {ACCEPTED} ({FLOAT}), found {wrong.reshape(-1)[0]}")
        return array


def describe_pairs(pairs: Iterable[tuple[int, int]]) -> str:
    """List pairs of widths for a message: "8/8, 4/8", and a full square of widths as "1 to 8 bits"."""
    given = list(pairs)
    widths = sorted({w for w, _ in given})
    square = [(w, a) for w in widths for a in widths]
    if len(widths) > 2 and widths == list(range(widths[0], widths[-1] + 1)) and sorted(given) == square:
        return f"{widths[0]} to {widths[-1]} bits"
    shown = [pair_words(w, a) for w, a in given]
    if len(shown) > MOST_PAIRS:
        shown = [*shown[:MOST_PAIRS], f"and {len(shown) - MOST_PAIRS} more"]
    return ", ".join(shown)


def _digits(amount: float, metric: str, unit: str = "") -> str:
    """Write an amount with four digits, and its unit if one is given; bytes are whole."""
    if np.isnan(amount):
        return "not supported"
    if UNITS[metric] == "B":
        return f"{amount:,.0f} {unit}".strip()
    return f"{amount:.4g} {unit}".strip()


def check_batch(batch: object) -> int:
    """Return a batch as it was given. Raises ValueError unless it is a positive integer, and no larger than any is."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a positive integer, not {batch!r}")
    if batch > MOST_BATCH:
        raise ValueError(f"batch must be at most {MOST_BATCH:,} images, not {str(batch)[:40]}")
    return batch


def undominated(cost: Floats, allowed: NDArray[np.bool_], *others: Floats) -> NDArray[np.bool_]:
    """Mark the allowed pairs worth choosing: no other allowed pair has at least their bits at no more cost.

    It assumes that more bits never hurt accuracy, and nothing about cost.

    Args:
        cost: Costs, shape (layers, 10, 10).
        allowed: Which pairs may be chosen, same shape.
        others: Further costs; a pair must be no dearer by any of them to make another not worth choosing.

    Returns:
        Same shape.
    """
    if others:
        return _undominated_by_all((cost, *others), allowed)
    worth = allowed.copy()
    priced = np.where(allowed, cost, np.inf)
    for w in range(cost.shape[1]):
        for a in range(cost.shape[2]):
            above = priced[:, w:, a:].copy()
            above[:, 0, 0] = np.inf
            worth[:, w, a] &= above.min((1, 2)) > cost[:, w, a]
    return worth


def _undominated_by_all(costs: Iterable[Floats], allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the pairs to which no pair of at least their bits is preferable by all costs; see `undominated`."""
    costs = [np.where(allowed, cost, np.inf) for cost in costs]
    worth = allowed.copy()
    for w in range(allowed.shape[1]):
        for a in range(allowed.shape[2]):
            no_dearer = allowed[:, w:, a:].copy()
            no_dearer[:, 0, 0] = False
            for cost in costs:
                no_dearer &= cost[:, w:, a:] <= cost[:, w : w + 1, a : a + 1]
            worth[:, w, a] &= ~no_dearer.any((1, 2))
    return worth
