"""What layers cost with fewer channels: priced when they are first asked for, and looked up for many policies at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.schemes import full_range, overhead_bytes
from hw_models.capabilities import FIRST, LAST, capabilities_of
from hw_models.cost import FLOATS, CostTable
from hw_models.lut import BY_NAME
from hw_models.metrics import PEAK
from hw_models.runtimes.target import RuntimeTarget
from hw_models.target import Target, price
from hw_models.widths import PLACES, WIDTHS
from hw_models.workload import Layer, Workload

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CELLS = PLACES * PLACES
MEAN_BITS = "average_weight_bits"  # no sum over layers by itself: it is divided by all weights of the smaller network
OURS = "hw_models"  # the package whose targets price every layer by itself, but for what stands first and last


class VariantCosts:
    """The costs of a workload's layers at other numbers of channels, by the metrics that are limited.

    A variant is a layer with so many input and output channels; it is priced where it stands in the workload, by the problem's
    target. One that the target can't price at all costs infinity, as does a pair of widths that it can't do.

    Attributes:
        target: The hardware target.
        table: Its costs of the unpruned workload, with what schemes store besides.
        metrics: The metrics that are sums over layers, in the order in which they are looked up.
    """

    def __init__(
        self, target: Target, table: CostTable, schemes: Mapping[str, Q.Scheme], batch: int | None, metrics: Sequence[str]
    ) -> None:
        """Begin with the layers as they are.

        Args:
            target: The hardware target.
            table: Its costs of the workload.
            schemes: A quantization scheme by layer.
            batch: Images at a time; None is the target's own.
            metrics: What is limited; peak memory is left out.

        Raises:
            ValueError: For a target whose costs don't depend on channels.
        """
        if getattr(target, "columns", None) == BY_NAME:
            raise ValueError(
                f"{target.name} tells costs by the names of layers, and so none of layers with fewer channels: give a table "
                "by shapes (kind, in_channels, out_channels, kernel, ...), or another target"
            )
        self.target, self.table = target, table
        self.metrics = tuple(metric for metric in metrics if metric != PEAK)
        self.refused: dict[str, str] = {}  # why a variant can't be priced, by the layer's name
        self._schemes, self._batch = schemes, batch
        layers = table.workload.layers
        self._widest = np.array([layer.out_channels + 1 for layer in layers], np.int64)
        kinds = np.array([(layer.in_channels + 1) * (layer.out_channels + 1) for layer in layers], np.int64)
        self._begin = np.concatenate([[0], kinds.cumsum()[:-1]])
        self._codes = np.empty(0, np.int64)  # of the variants, rising
        self._rows = np.empty(0, np.int64)  # where each stands in the tables
        self._count = 0
        self._tables: dict[str, NDArray[Any]] = {}  # of a cost table by attribute, (variants, 10, 10)
        self._sums = np.empty((len(self.metrics), 0, CELLS))  # what is looked up, infinite for what can't be done
        self._weights = np.empty(0, np.int64)  # own weights of every variant
        self._take([(index, layer) for index, layer in enumerate(layers)], table, list(range(len(layers))))

    def rows(self, sizes: Integers) -> NDArray[np.intp]:
        """Find variants, which are priced if they are new.

        Args:
            sizes: Input channels, output channels and convolution groups of all layers, shape (shapes, 3, layers).

        Returns:
            Their rows in the tables, shape (shapes, layers).
        """
        codes = self._begin + sizes[:, 0] * self._widest + sizes[:, 1]
        places = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(places, len(self._codes) - 1)] == codes
        if not known.all():
            self._price_new(sizes, codes, known)
            places = np.searchsorted(self._codes, codes)
        return self._rows[places]

    def totals(self, rows: NDArray[np.intp], cells: NDArray[np.intp]) -> Floats:
        """Sum what policies cost.

        Args:
            rows: Of the variants of all layers, shape (policies, layers).
            cells: The place of every layer's pair of widths in a flattened table (10, 10), the same shape.

        Returns:
            Shape (policies, metrics); infinite where the target can't do it.
        """
        where = rows * CELLS
        where += cells
        found = np.empty((len(rows), len(self.metrics)))
        for column, (metric, sums) in enumerate(zip(self.metrics, self._sums, strict=True)):
            total = sums.reshape(-1).take(where).sum(1)
            if metric == MEAN_BITS:
                total /= self.weights(rows)
            found[:, column] = total
        return found

    def of_cells(self, rows: NDArray[np.intp]) -> Floats:
        """Return what variants cost at every pair of widths, shape (shapes, metrics, layers, 100).

        It is infinite for what can't be done; a mean of bits is not yet divided by `weights`.
        """
        return self._sums[:, rows].swapaxes(0, 1)

    def weights(self, rows: NDArray[np.intp]) -> Integers:
        """Count the weights of networks, those that layers have in common once, shape (shapes,)."""
        return np.maximum(self._weights[rows].sum(1), 1)

    def table_of(self, workload: Workload, rows: NDArray[np.intp]) -> CostTable:
        """Make the cost table of a smaller network.

        Args:
            workload: Its layers.
            rows: Their variants, shape (layers,).

        Returns:
            The table, with what schemes store besides.

        Raises:
            ValueError: Naming the layer and the target, for one that the target can't price.
        """
        arrays: dict[str, Any] = {name: stacked[rows] for name, stacked in self._tables.items()}
        unpriced = ~np.isfinite(arrays["storage_bytes"]).any((1, 2))
        if unpriced.any():
            name = workload.names[int(np.argmax(unpriced))]
            raise ValueError(f"{self.target.name} can't do the smaller layer {name!r}: {self.refused.get(name, 'no pair')}")
        counters = {name: arrays.pop(name) for name in self.table.counters}
        return replace(self.table, workload=workload, counters=counters, **arrays)

    def check_independent(self, sizes: Integers) -> None:
        """Check, for somebody else's target, that layers cost what they cost whatever stands beside them.

        Args:
            sizes: Of all layers of a network in which some have fewer channels and others don't, shape (1, 3, layers).

        Raises:
            ValueError: Naming the target and the layer, if they don't.
        """
        if _is_ours(self.target):
            return
        layers = self._resized(sizes[0])
        whole = self._priced(layers)
        mine = self._tables
        rows = self.rows(sizes)[0]
        for name in FLOATS:
            array = getattr(whole, name)
            if array is None:
                continue
            same = np.isclose(array, mine[name][rows], rtol=1e-6, equal_nan=True).all((1, 2))
            if not same.all():
                layer = layers[int(np.argmin(same))].name
                raise ValueError(
                    f"hardware target {self.target.name!r} prices layer {layer!r} by what stands beside it, so that what a "
                    "smaller network costs is no sum over its layers: channels can't be searched on it"
                )

    def _resized(self, sizes: Integers) -> list[Layer]:
        layers = self.table.workload.layers
        return [layer.resized(*size) for layer, size in zip(layers, sizes.T.tolist(), strict=True)]

    def _price_new(self, sizes: Integers, codes: Integers, known: NDArray[np.bool_]) -> None:
        """Price the variants that aren't known, each once."""
        new: list[list[Layer]] = [[] for _ in self.table.workload.layers]
        layers = self.table.workload.layers
        for index in np.flatnonzero(~known.all(0)):
            shapes = np.flatnonzero(~known[:, index])
            _, first = np.unique(codes[shapes, index], return_index=True)
            for size in sizes[shapes[first], :, index].tolist():
                new[index].append(layers[index].resized(*size))
        if isinstance(self.target, RuntimeTarget):
            # It measures a layer with as many bytes of weights around it as the whole network has.
            self._price_alone([(index, variant) for index, variants in enumerate(new) for variant in variants])
            return
        while any(new):
            asked, places, workload = self._next(new)
            try:
                table = self._priced(workload)
            except ValueError:
                self._price_alone(asked)
            else:
                self._take(asked, table, places)

    def _next(self, new: list[list[Layer]]) -> tuple[list[tuple[int, Layer]], list[int], list[Layer]]:
        """Put together the layers that are priced next, and take them from what is new.

        Some targets look at what stands first and last, or at the first convolution, so that these places have one layer each.
        Of our own targets, none looks at what stands between: there all variants of a layer are priced at once.

        Returns:
            The variants, each with the layer's place in the network; where they are in the list; and the list.
        """
        layers = self.table.workload.layers
        ours = _is_ours(self.target)
        first_convolution = next((index for index, layer in enumerate(layers) if layer.kind != "linear"), 0)
        named = self._named_by_rules()
        asked: list[Any] = []
        places: list[Any] = []
        chosen: list[Any] = []
        for index, layer in enumerate(layers):
            alone = not ours or index <= first_convolution or index == len(layers) - 1
            count = len(new[index])
            if alone:
                count = min(count, 1)
            for variant in new[index][:count]:
                asked.append((index, variant))
                places.append(len(chosen))
                chosen.append(variant)
            del new[index][:count]
            if not count and (alone or layer.name in named):
                chosen.append(layer)
        return asked, places, chosen

    def _named_by_rules(self) -> set[str]:
        """Return the layers that the target's capabilities have rules for, which must be there."""
        capabilities = capabilities_of(self.target)
        if capabilities is None:
            return set()
        return set(capabilities.layers) - {FIRST, LAST}

    def _price_alone(self, asked: list[tuple[int, Layer]]) -> None:
        """Price variants one by one, among the layers as they are; one that can't be priced costs infinity."""
        layers = list(self.table.workload.layers)
        for index, variant in asked:
            one = [(index, variant)]
            try:
                table = self._priced([*layers[:index], variant, *layers[index + 1 :]])
            except ValueError as error:
                self.refused.setdefault(variant.name, str(error))
                self._take(one, None, [index])
            else:
                self._take(one, table, [index])

    def _priced(self, layers: Sequence[Layer]) -> CostTable:
        workload = replace(self.table.workload, layers=tuple(layers))
        table = price(self.target, workload, self._batch, full_range=full_range(self._schemes))
        overhead = overhead_bytes(self._schemes, workload)
        if overhead.any():
            table = replace(table, storage_bytes=table.storage_bytes + overhead)
        return table

    def _take(self, asked: list[tuple[int, Layer]], table: CostTable | None, places: list[int]) -> None:
        """Add variants to the tables.

        Args:
            asked: The variants, each with the layer's place in the network.
            table: Where their costs are; None: they can't be priced.
            places: Where they are in it.
        """
        codes = [self._begin[i] + layer.in_channels * self._widest[i] + layer.out_channels for i, layer in asked]
        every = np.concatenate([self._codes, np.array(codes, np.int64)])
        rows = np.concatenate([self._rows, np.arange(self._count, self._count + len(asked))])
        order = np.argsort(every)
        self._codes, self._rows = every[order], rows[order]
        self._count += len(asked)
        weights = np.array([layer.own_weights for _, layer in asked], np.int64)
        self._weights = np.concatenate([self._weights, weights])
        for name in (*FLOATS, "cycles", "bound", *self.table.counters):
            self._append(name, table, places)
        sums = np.full((len(self.metrics), len(asked), CELLS), np.inf)
        if table is not None:
            supported = table.supported[places]
            for row, metric in zip(sums, self.metrics, strict=True):
                if metric == MEAN_BITS:
                    costs = weights[:, None, None] * np.array(WIDTHS, float)[:, None] * np.ones(PLACES)
                else:
                    costs = table.metric(metric)[places]
                row[:] = np.where(supported, costs, np.inf).reshape(-1, CELLS)
        self._sums = np.concatenate([self._sums, sums], axis=1)

    def _append(self, name: str, table: CostTable | None, places: list[int]) -> None:
        """Add rows to the tables of one attribute."""
        whole = self.table.counters.get(name)
        if whole is None:
            whole = getattr(self.table, name, None)
        if whole is None:
            return
        if table is None:
            rows = np.zeros((len(places), PLACES, PLACES), whole.dtype)
            if name in FLOATS:
                rows[:] = np.nan
        else:
            found = table.counters.get(name)
            if found is None:
                found = getattr(table, name)
            rows = found[places]
        before = self._tables.get(name)
        if before is not None:
            rows = np.concatenate([before, rows])
        self._tables[name] = rows


def _is_ours(target: object) -> bool:
    return type(target).__module__.partition(".")[0] == OURS
