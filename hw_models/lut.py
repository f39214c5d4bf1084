"""A target that is a table of measurements: `lut:FILE`, one row per layer and pair of widths.

    layer,w_bits,a_bits,latency_ms,energy_mj
    stem,8,8,0.0123,0.0045
    stem,4,8,0.0101,0.0032
    ...

Widths are 1 to 8, 16 or float. A pair that has no row can't be done in that layer; every layer of the network needs one row at
least. `latency_` ends in s, ms, us or ns, `energy_` in j, mj, uj, nj or pj; one of the two is enough. An optional column
`batch` holds the number of images that all rows were measured with (1 without).

In place of `layer`, rows may say the shape that was measured, so that a table serves any network that is made of these:

    kind,in_channels,out_channels,kernel,stride,groups,input_size,w_bits,a_bits,latency_ms
    conv,3,16,3,2,1,224,8,8,0.81
    depthwise,16,16,3x3,1,16,112x112,8,8,0.42
    linear,1280,1000,,,,,8,8,0.12

`kind` is one of `Layer.kinds`, so a Conv1d is `conv1d`. Sizes are of one image, height x width, or one number for both. A
Conv1d has 1 x length, for which `conv1d` takes the one number; a linear layer has a kernel of 1x1, and sizes of rows x 1, for
which `linear` takes the number of rows. `input_size` may be `output_size`, or
both may be there. A column `dilation` may be added; rows without it are for a dilation of 1. An empty cell fits anything. A
layer that is called several times costs the sum of its calls. A shape that no row fits is an error, and so is one that rows of
different shapes fit.
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
from hw_models.storage import storage_bytes
from hw_models.widths import ACCEPTED, PLACES, pair_words, place_of, width_of
from hw_models.workload import Call, Layer, Size, Workload

SECONDS = {"latency_s": 1.0, "latency_ms": 1e-3, "latency_us": 1e-6, "latency_ns": 1e-9}
JOULES = {"energy_j": 1.0, "energy_mj": 1e-3, "energy_uj": 1e-6, "energy_nj": 1e-9, "energy_pj": 1e-12}
ALIASES = {"weight_bits": "w_bits", "wbits": "w_bits", "activation_bits": "a_bits", "abits": "a_bits"}
WIDTHS = ("w_bits", "a_bits")
BY_NAME = ("layer",)
KINDS = ("conv", "depthwise", "pointwise", "grouped", "linear", "conv1d")
COUNTS = ("in_channels", "out_channels", "groups")
SIZES = ("input_size", "output_size")
SHAPE = ("kind", "in_channels", "out_channels", "kernel", "stride", "groups")
SHAPE_COLUMNS = (*SHAPE, *SIZES, "dilation")
KNOWN = {"layer", *SHAPE_COLUMNS, *WIDTHS, *SECONDS, *JOULES, "batch"}
MOST = 4 * 1024**2  # bytes of a table: two thousand layers
MOST_COLUMNS, MOST_BATCH, MOST_SIZE, LONGEST = 16, 2**16, 10**9, 200
LEAST_COST, MOST_COST = 1e-30, 1e30  # in the unit of its column
COLUMNS = (
    f"layer, {', '.join(WIDTHS)}, and {' or '.join((*SECONDS, *JOULES))}; batch may be added, and in place of layer there may "
    f"be {', '.join(SHAPE)} with {' or '.join(SIZES)}"
)

Value = str | int | Size | None  # of a shape's column; None fits anything
Key = tuple[Value, ...]  # the name of a layer, or a shape
Tables = dict[Key, Floats]


@dataclass(frozen=True)
class LookupTarget:
    """Measured costs by layer or shape: arrays (10, 10) of seconds and joules, NaN for pairs that weren't measured.

    `columns` are what the keys of `latency_s` and `energy_j` hold: ("layer",), or those of a shape. The two are None where the
    table has no such column.
    """

    name: str
    description: str
    batch: int
    latency_s: Tables | None
    energy_j: Tables | None
    columns: tuple[str, ...] = BY_NAME
    # Whoever measured it knows what his kernels compute.
    zero_points: ClassVar[bool] = True

    @property
    def provenance(self) -> str:
        """Say that its costs were measured."""
        return "measured"

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Return the table's costs in the order of the workload.

        Raises ValueError naming the layers that the table lacks, for a shape that fits rows of several shapes, for a layer
        whose calls have no pair in common, and for another batch than it was measured with.
        """
        if batch is not None and check_batch(batch) != self.batch:
            raise ValueError(f"{self.name} was measured with a batch of {self.batch}, not {batch}")
        if self.columns == BY_NAME:
            keys = self._by_name(workload)
        else:
            keys = self._by_shape(workload)

        def stacked(values: Tables | None) -> Floats | None:
            if values is None:
                return None
            return np.stack([np.sum([values[key] for key in of_layer], axis=0) for of_layer in keys])

        latency, energy = stacked(self.latency_s), stacked(self.energy_j)
        costs = latency
        if costs is None:
            costs = energy
        assert costs is not None
        able = np.isfinite(costs).any((1, 2))
        if not able.all():
            raise ValueError(
                f"{self.name} has no pair of widths for layer {workload.names[int(np.argmin(able))]!r} that all its calls have"
            )
        return CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=self.batch,
            latency_s=latency,
            energy_j=energy,
            storage_bytes=storage_bytes(workload),
        )

    @property
    def _keys(self) -> list[Key]:
        return list(self.latency_s or self.energy_j or {})

    def _by_name(self, workload: Workload) -> list[list[Key]]:
        """Find the rows of every layer by its name."""
        known = {str(key[0]): key for key in self._keys}
        if lacking := [name for name in workload.names if name not in known]:
            close = difflib.get_close_matches(lacking[0], known, n=3) or list(known)
            raise ValueError(
                f"{self.name} lacks {len(lacking)} of {len(workload)} layers: {_some(lacking, 8)}; "
                f"it has {_some(close, 3, of=len(known))}"
            )
        return [[known[name]] for name in workload.names]

    def _by_shape(self, workload: Workload) -> list[list[Key]]:
        """Find the rows of every call of every layer by its shape."""
        found: list[list[Key]] = []
        lacking: dict[str, str] = {}
        for layer in workload.layers:
            of_layer = []
            for call in layer.calls:
                shape = _shape_of(layer, call)
                fitting = [key for key in self._keys if self._fits(key, shape)]
                if len(fitting) > 1:
                    both = " and ".join(_shape_words(dict(zip(self.columns, key, strict=True))) for key in fitting[:2])
                    raise ValueError(
                        f"{self.name} has rows of {len(fitting)} shapes that fit layer {layer.name!r} "
                        f"({_shape_words(shape)}): {both}; leave one"
                    )
                if not fitting:
                    lacking.setdefault(layer.name, _shape_words(shape))
                of_layer += fitting
            found.append(of_layer)
        if lacking:
            name, words = next(iter(lacking.items()))
            raise ValueError(
                f"{self.name} has no row that fits {len(lacking)} of {len(workload)} layers: {_some(list(lacking), 8)}; "
                f"{name!r} is {words}"
            )
        return found

    def _fits(self, key: Key, shape: dict[str, Value]) -> bool:
        """Say whether rows of a key are for a shape; a table without dilations has those of 1."""
        if "dilation" not in self.columns and shape["dilation"] != (1, 1):
            return False
        for column, value in zip(self.columns, key, strict=True):
            if column == "kind" and value is not None:
                if value not in str(shape["kind"]).split():
                    return False
            elif value is not None and value != shape[column]:
                return False
        return True


def load_lookup_table(path: Path) -> LookupTarget:
    """Read a table.

    Args:
        path: The CSV file; the module says which columns it has.

    Returns:
        A target that costs what was measured.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Naming the line, the layer or shape and the widths of what is wrong or twice there.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no table {path}")
    rows = _rows(path)
    header = [_column(cell) for cell in next(rows, [])]
    latency = next((name for name in header if name in SECONDS), None)
    energy = next((name for name in header if name in JOULES), None)
    columns = _key_columns(path, header)
    wrong = [c for c in header if c not in (*columns, *WIDTHS, "batch", latency, energy)]
    missing = [c for c in WIDTHS if c not in header]
    if not columns or missing or wrong or not (latency or energy) or len(set(header)) < len(header):
        raise ValueError(f"{path}: the first line must name the columns {COLUMNS}; it is {_described(header)}")
    values: dict[str, Tables] = {name: {} for name in (latency, energy) if name}
    batches = set()
    for number, line in enumerate(rows, 2):
        where = f"{path}, row {number}: "
        if len(line) != len(header):
            raise ValueError(f"{where}{len(line)} cells, the first line has {len(header)}")
        row = {name: cell.strip() for name, cell in zip(header, line, strict=True)}
        key = tuple(_key_value(where, column, row) for column in columns)
        w, a = (_width(where, column, row[column]) for column in WIDTHS)
        batches.add(_integer(where, "batch", row.get("batch", "1"), MOST_BATCH))
        for column, table in values.items():
            cells = table.setdefault(key, np.full((PLACES, PLACES), np.nan))
            cell = place_of(w), place_of(a)
            if not np.isnan(cells[cell]):
                raise ValueError(f"{where}{_key_words(columns, key)} at {_pair_words(w, a)} is there twice")
            cells[cell] = _positive(where, column, row[column])
    if not batches:
        raise ValueError(f"{path} has no rows below its first line")
    if len(batches) > 1:
        raise ValueError(f"{path} mixes batches of {', '.join(map(str, sorted(batches)))} images")
    return LookupTarget(
        name=f"lut:{path}",
        description=f"measured table {path}",
        batch=batches.pop(),
        latency_s=_scaled(values, latency, SECONDS),
        energy_j=_scaled(values, energy, JOULES),
        columns=columns,
    )


def _key_columns(path: Path, header: list[str]) -> tuple[str, ...]:
    """Return the columns by which rows are found; none if they are missing. Raises ValueError for names and shapes in one."""
    of_shape = [column for column in header if column in SHAPE_COLUMNS]
    if "layer" not in header:
        if set(SHAPE) <= set(of_shape) and set(SIZES) & set(of_shape):
            return tuple(of_shape)
        return ()
    if of_shape:
        raise ValueError(
            f"{path}: rows are found by layer or by shape, and the first line has both layer and {', '.join(of_shape)}: "
            "leave out one of the two"
        )
    return BY_NAME


def _key_value(where: str, column: str, row: dict[str, str]) -> Value:
    """Read a cell by which rows are found. Raises ValueError for what can't be there."""
    cell = row[column]
    if column == "layer":
        _check_layer(where, cell)
        return cell
    if not cell:
        return None
    if column == "kind":
        if cell not in KINDS:
            raise ValueError(f"{where}kind is {quoted(cell[:20])}; it must be {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        return cell
    if column in COUNTS:
        return _integer(where, column, cell, MOST_SIZE)
    return _size(where, column, cell, row["kind"])


def _size(where: str, column: str, cell: str, kind: str) -> Size:
    """Read height x width, or one number. Raises ValueError for anything else."""
    parts = cell.lower().split("x")
    if len(parts) > 2:
        raise ValueError(f"{where}{column} is {quoted(cell[:20])}; it must be height x width, such as 3x3, or one number")
    sizes = [_integer(where, column, part.strip(), MOST_SIZE) for part in parts]
    if len(sizes) == 1 and kind == "conv1d":
        return 1, sizes[0]
    if len(sizes) == 1 and kind == "linear":
        return sizes[0], 1
    return sizes[0], sizes[-1]


def _shape_of(layer: Layer, call: Call) -> dict[str, Value]:
    """Return what the columns of a shape are for a call of a layer; its kinds with a blank between them."""
    return {
        "kind": " ".join(layer.kinds),
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "groups": layer.groups,
        "input_size": call.input_size,
        "output_size": call.output_size,
        "dilation": layer.dilation,
    }


def _shape_words(shape: dict[str, Value]) -> str:
    """Write a shape for a message, column by column."""
    words = []
    for column, value in shape.items():
        if value is None:
            words.append(f"any {column}")
        elif column == "kind":
            words.append(str(value))
        elif isinstance(value, tuple):
            words.append(f"{column} {value[0]}x{value[1]}")
        else:
            words.append(f"{column} {value}")
    return ", ".join(words)


def _key_words(columns: tuple[str, ...], key: Key) -> str:
    """Name what rows are for."""
    if columns == BY_NAME:
        return f"layer {quoted(key[0])}"
    return f"the shape {_shape_words(dict(zip(columns, key, strict=True)))}"


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


def _width(where: str, column: str, cell: str) -> int:
    """Read a width, float being 32."""
    try:
        return width_of(cell.lower())
    except ValueError:
        raise ValueError(f"{where}{column} is {quoted(cell[:20])}; it must be an integer from {ACCEPTED}") from None


def _pair_words(w: int, a: int) -> str:
    """Write a pair as w3/a4, or as it is written everywhere where an operand is in float."""
    if max(w, a) > 16:
        return pair_words(w, a)
    return f"w{w}/a{a}"


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


def _some(words: Sequence[str], most: int, of: int | None = None) -> str:
    """List the first words, and dots if there are more: `of` in all, if they are but some themselves."""
    shown = list(words[:most])
    if (of or len(words)) > len(shown):
        shown.append("...")
    return ", ".join(shown)


def _scaled(values: dict[str, Tables], column: str | None, units: dict[str, float]) -> Tables | None:
    """The tables of a column by layer or shape, in seconds or joules; None if there is no such column."""
    if column is None:
        return None
    return {key: table * units[column] for key, table in values[column].items()}
