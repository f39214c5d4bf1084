"""A target that is a table of measurements: `lut:FILE`, one row per layer and pair of widths.

    layer,w_bits,a_bits,latency_ms,energy_mj
    stem,1,1,0.0123,0.0045
    ...

`latency_` ends in s, ms, us or ns, `energy_` in j, mj, uj, nj or pj; one of the two is enough. All 64 pairs of every layer of
the network must be there. An optional column `batch` holds the number of images that all rows were measured with (1 without).
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from hw_models.cost import CostTable, Floats, check_batch
from hw_models.files import quoted, read_bytes
from hw_models.storage import BITS, storage_bytes
from hw_models.workload import Workload

SECONDS = {"latency_s": 1.0, "latency_ms": 1e-3, "latency_us": 1e-6, "latency_ns": 1e-9}
JOULES = {"energy_j": 1.0, "energy_mj": 1e-3, "energy_uj": 1e-6, "energy_nj": 1e-9, "energy_pj": 1e-12}
ALIASES = {"weight_bits": "w_bits", "wbits": "w_bits", "activation_bits": "a_bits", "abits": "a_bits"}
KEYS = ("layer", "w_bits", "a_bits")
KNOWN = {*KEYS, *SECONDS, *JOULES, "batch"}
MOST = 4 * 1024**2  # bytes of a table: two thousand layers
MOST_COLUMNS, MOST_BATCH, LONGEST = 10, 2**16, 200
LEAST_COST, MOST_COST = 1e-30, 1e30  # in the unit of its column
ACCEPTED = f"{', '.join(KEYS)}, and {' or '.join((*SECONDS, *JOULES))}; batch may be added"


@dataclass(frozen=True)
class LookupTarget:
    """Measured costs by layer name: arrays (8, 8) of seconds and joules, None where the table has no such column."""

    name: str
    description: str
    batch: int
    latency_s: dict[str, Floats] | None
    energy_j: dict[str, Floats] | None
    # Whoever measured it knows what his kernels compute.
    zero_points: ClassVar[bool] = True

    @property
    def provenance(self) -> str:
        """Say that its costs were measured."""
        return "measured"

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Return the table's costs in the order of the workload.

        Raises ValueError naming the layers that the table lacks, and for another batch than it was measured with.
        """
        if batch is not None and check_batch(batch) != self.batch:
            raise ValueError(f"{self.name} was measured with a batch of {self.batch}, not {batch}")
        known = self.latency_s or self.energy_j or {}
        if lacking := [name for name in workload.names if name not in known]:
            close = difflib.get_close_matches(lacking[0], known, n=3) or list(known)
            raise ValueError(
                f"{self.name} lacks {len(lacking)} of {len(workload)} layers: {_some(lacking, 8)}; "
                f"it has {_some(close, 3, of=len(known))}"
            )

        def stacked(values: dict[str, Floats] | None) -> Floats | None:
            if values is None:
                return None
            return np.stack([values[name] for name in workload.names])

        return CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=self.batch,
            latency_s=stacked(self.latency_s),
            energy_j=stacked(self.energy_j),
            storage_bytes=storage_bytes(workload),
        )


def load_lookup_table(path: Path) -> LookupTarget:
    """Read a table.

    Raises ValueError naming the line, the layer and the bits of what is wrong, twice there or missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no table {path}")
    rows = _rows(path)
    header = [_column(cell) for cell in next(rows, [])]
    latency = next((name for name in header if name in SECONDS), None)
    energy = next((name for name in header if name in JOULES), None)
    wrong = [c for c in header if c not in (*KEYS, "batch", latency, energy)]
    missing = [c for c in KEYS if c not in header]
    if missing or wrong or not (latency or energy) or len(set(header)) < len(header):
        raise ValueError(f"{path}: the first line must name the columns {ACCEPTED}; it is {_described(header)}")
    values: dict[str, dict[str, Floats]] = {name: {} for name in (latency, energy) if name}
    batches = set()
    for number, line in enumerate(rows, 2):
        where = f"{path}, row {number}: "
        if len(line) != len(header):
            raise ValueError(f"{where}{len(line)} cells, the first line has {len(header)}")
        row = {name: cell.strip() for name, cell in zip(header, line, strict=True)}
        layer = row["layer"]
        w = _integer(where, "w_bits", row["w_bits"], BITS)
        a = _integer(where, "a_bits", row["a_bits"], BITS)
        batches.add(_integer(where, "batch", row.get("batch", "1"), MOST_BATCH))
        for column, table in values.items():
            if layer not in table:
                _check_layer(where, layer)
                table[layer] = np.full((BITS, BITS), np.nan)
            if not np.isnan(table[layer][w - 1, a - 1]):
                raise ValueError(f"{where}layer {quoted(layer)} at w{w}/a{a} is there twice")
            table[layer][w - 1, a - 1] = _positive(where, column, row[column])
    if not batches:
        raise ValueError(f"{path} has no rows below its first line")
    if len(batches) > 1:
        raise ValueError(f"{path} mixes batches of {', '.join(map(str, sorted(batches)))} images")
    _check_complete(path, next(iter(values.values())))
    return LookupTarget(
        name=f"lut:{path}",
        description=f"measured table {path}",
        batch=batches.pop(),
        latency_s=_scaled(values, latency, SECONDS),
        energy_j=_scaled(values, energy, JOULES),
    )


def _rows(path: Path) -> Iterator[list[str]]:
    """Read one row after the other, empty ones left out."""
    try:
        text = read_bytes(path, MOST).decode("utf-8")
        yield from filter(None, csv.reader(io.StringIO(text, newline=""), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a table of comma-separated values: byte {error.start} is no text") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of comma-separated values: {error}") from None


def _described(header: list[str]) -> str:
    """Name the columns of a first line; nothing of one that has none of a table's, for the file may be anything."""
    if not header:
        return "empty"
    if not KNOWN & set(header):
        return "something else"
    return ", ".join(name if name in KNOWN else quoted(name[:20]) for name in header[:MOST_COLUMNS])


def _check_layer(where: str, cell: str) -> None:
    """Raise ValueError for a name that no layer has."""
    if len(cell) > LONGEST or not cell.isprintable():
        raise ValueError(f"{where}layer is {quoted(cell)}; it must be the name of a layer, at most {LONGEST} characters")


def _column(cell: str) -> str:
    name = "_".join(cell.strip().lstrip("\ufeff").lower().split())
    return ALIASES.get(name, name)


def _integer(where: str, column: str, cell: str, largest: int) -> int:
    if cell.isascii() and cell.isdecimal() and len(cell) <= 10 and 1 <= int(cell) <= largest:
        return int(cell)
    raise ValueError(f"{where}{column} is {quoted(cell[:20])}; it must be an integer from 1 to {largest:,}")


def _positive(where: str, column: str, cell: str) -> float:
    value = math.nan
    if "_" not in cell:
        with suppress(ValueError):
            value = float(cell)
    if not LEAST_COST <= value <= MOST_COST:
        raise ValueError(
            f"{where}{column} is {quoted(cell[:20])}; it must be a positive number, from {LEAST_COST:g} to {MOST_COST:g}"
        )
    return value


def _check_complete(path: Path, cells: dict[str, Floats]) -> None:
    holes = {name: np.argwhere(np.isnan(table)) + 1 for name, table in cells.items() if np.isnan(table).any()}
    if not holes:
        return
    name, pairs = next(iter(holes.items()))
    others = ""
    if len(holes) > 1:
        others = f"; {len(holes) - 1} other layers have holes too"
    missing = _some([f"w{w}/a{a}" for w, a in pairs], 4)
    raise ValueError(f"{path} lacks {len(pairs)} of 64 pairs of bits for layer {quoted(name)}: {missing}{others}")


def _some(words: Sequence[str], most: int, of: int | None = None) -> str:
    """List the first words, and dots if there are more: `of` in all, if they are but some themselves."""
    shown = list(words[:most])
    if (of or len(words)) > len(shown):
        shown.append("...")
    return ", ".join(shown)


def _scaled(values: dict[str, dict[str, Floats]], column: str | None, units: dict[str, float]) -> dict[str, Floats] | None:
    """The tables of a column by layer, in seconds or joules; None if there is no such column."""
    if column is None:
        return None
    return {layer: table * units[column] for layer, table in values[column].items()}
