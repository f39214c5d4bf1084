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
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hw_models.cost import CostTable, Floats, check_batch
from hw_models.storage import BITS, storage_bytes
from hw_models.workload import Workload

SECONDS = {"latency_s": 1.0, "latency_ms": 1e-3, "latency_us": 1e-6, "latency_ns": 1e-9}
JOULES = {"energy_j": 1.0, "energy_mj": 1e-3, "energy_uj": 1e-6, "energy_nj": 1e-9, "energy_pj": 1e-12}
ALIASES = {"weight_bits": "w_bits", "wbits": "w_bits", "activation_bits": "a_bits", "abits": "a_bits"}
KEYS = ("layer", "w_bits", "a_bits")
MOST = 64 * 1024**2  # bytes of a table
ACCEPTED = f"{', '.join(KEYS)}, and {' or '.join((*SECONDS, *JOULES))}; batch may be added"


@dataclass(frozen=True)
class LookupTarget:
    """Measured costs by layer name: arrays (8, 8) of seconds and joules, None where the table has no such column."""

    name: str
    description: str
    batch: int
    latency_s: dict[str, Floats] | None
    energy_j: dict[str, Floats] | None

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
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}")
    if path.stat().st_size > MOST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes and was not read; a table has at most {MOST:,}")
    header, lines = _read_lines(path)
    latency = next((name for name in header if name in SECONDS), None)
    energy = next((name for name in header if name in JOULES), None)
    wrong = [c for c in header if c not in (*KEYS, "batch", latency, energy)]
    missing = [c for c in KEYS if c not in header]
    if missing or wrong or not (latency or energy) or len(set(header)) < len(header):
        raise ValueError(f"{path}: the first line must name the columns {ACCEPTED}; it is {', '.join(header) or 'empty'}")
    values: dict[str, dict[str, Floats]] = {name: {} for name in (latency, energy) if name}
    batches = set()
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ValueError(f"{path}, row {number}: {len(line)} cells, the first line has {len(header)}")
        row = dict(zip(header, (cell.strip() for cell in line), strict=True))
        w = _integer(row["w_bits"], f"{path}, row {number}: w_bits", BITS)
        a = _integer(row["a_bits"], f"{path}, row {number}: a_bits", BITS)
        batches.add(_integer(row.get("batch", "1"), f"{path}, row {number}: batch", None))
        for column, table in values.items():
            cells = table.setdefault(row["layer"], np.full((BITS, BITS), np.nan))
            if not np.isnan(cells[w - 1, a - 1]):
                raise ValueError(f"{path}, row {number}: layer {row['layer']!r} at w{w}/a{a} is there twice")
            cells[w - 1, a - 1] = _positive(row[column], f"{path}, row {number}: {column}")
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


def _read_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the names of the columns, and the cells of each row below them."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            lines = [line for line in csv.reader(file, strict=True) if line]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a table of comma-separated values: {error}") from error
    if not lines:
        return [], []
    return [_column(cell) for cell in lines[0]], lines[1:]


def _column(cell: str) -> str:
    name = "_".join(cell.strip().lstrip("\ufeff").lower().split())
    return ALIASES.get(name, name)


def _integer(cell: str, where: str, largest: int | None) -> int:
    if cell.isdecimal() and int(cell) >= 1 and (largest is None or int(cell) <= largest):
        return int(cell)
    accepted = "of 1 or more"
    if largest is not None:
        accepted = f"from 1 to {largest}"
    raise ValueError(f"{where} is {cell!r}; it must be an integer {accepted}")


def _positive(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where} is {cell!r}; it must be a positive number")
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
    raise ValueError(f"{path} lacks {len(pairs)} of 64 pairs of bits for layer {name!r}: {missing}{others}")


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
