"""Writes a program of integers as C99: one file and its header, and a main.c that shows how they are used.

The code is that of `steps.c`, a plain function for each kind of step. What is written here is what they are called with: a
constant for each step, with its sizes, its factors, its weights at their bits, and where in the arena its values are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haq.deployment.fixed_point import FixedEpilogue, FixedProgram, FixedTable, Head, weights_of, zero_of
from haq.deployment.program import (
    BYTE_BITS,
    Codes,
    Convolution,
    Fixed,
    Lookup,
    Move,
    Pool,
    Product,
    Quantize,
    Resize,
    Step,
    Sum,
    Value,
    read_by,
    written_by,
)

CODE = Path(__file__).with_name("steps.c")
WORD = 4  # bytes
TOGETHER = 4  # output channels that steps.c computes at once
PER_LINE = 20  # numbers
NOWHERE = -(2**31)
TAKEN = ("main", "stdint", "stdio", "string")  # names of other files


# ------------------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Arena:
    """Where every value begins, in bytes, and how long all of it is. `scratch` is by the number of a step."""

    places: Mapping[str, int]
    scratch: Mapping[int, int]
    size: int


@dataclass
class _Block:
    """Bytes that are needed from one step to another, both included, by values that take the same place in turn."""

    size: int
    first: int
    last: int
    start: int = 0

    def meets(self, other: _Block) -> bool:
        return self.first <= other.last and other.first <= self.last


def value_bytes(value: Value) -> int:
    """Return what a value takes in memory."""
    size = math.prod(value.shape)
    if isinstance(value.representation, Fixed):
        return size * WORD
    return size


def plan(fixed: FixedProgram) -> Arena:
    """Give every value a place: bytes that are needed at the same time never share one.

    The largest are placed first, each as far to the front as it fits.

    Args:
        fixed: The program.

    Returns:
        The places.
    """
    blocks: dict[str, _Block] = {}
    last_read = {name: index for index, step in enumerate(fixed.steps) for name in read_by(step)}
    for image in fixed.image:
        blocks[image.value] = _Block(value_bytes(fixed.values[image.value]), -1, -1)
    for index, step in enumerate(fixed.steps):
        for name in read_by(step):
            blocks[name].last = index
        taken: list[_Block] = []
        for output in written_by(step):
            size = value_bytes(fixed.values[output])
            over = [blocks[name] for name in _read_in_step(step) if last_read[name] == index]
            fitting = [block for block in over if block.size == size and block.last == index and block not in taken]
            block = next(iter(fitting), None) or _Block(size, index, index)
            block.last = index
            taken.append(block)
            blocks[output] = block
    blocks[fixed.output].last = len(fixed.steps)
    scratch = {index: _Block(size, index, index) for index, size in _scratch(fixed)}
    placed: list[_Block] = []
    everything = {id(block): block for block in [*blocks.values(), *scratch.values()]}
    for block in sorted(everything.values(), key=lambda block: -block.size):
        block.start = _first_gap(block, placed)
        placed.append(block)
    size = max(block.start + block.size for block in placed)
    places = {name: block.start for name, block in blocks.items()}
    return Arena(places, {index: block.start for index, block in scratch.items()}, -(-size // WORD) * WORD)


def _first_gap(block: _Block, placed: Sequence[_Block]) -> int:
    start = 0
    for other in sorted((other for other in placed if other.meets(block)), key=lambda other: other.start):
        if start + block.size <= other.start:
            break
        start = max(start, -(-(other.start + other.size) // WORD) * WORD)
    return start


def _read_in_step(step: Step) -> list[str]:
    """Name what a step reads number by number, each just before the output's number of the same place is written.

    That may be written over, if nothing else reads it, nor the step in any other order.
    """
    if isinstance(step, Move | Lookup | Quantize):
        return []
    alone = [residual.value for residual in step.epilogue.residuals]
    if isinstance(step, Sum):
        return [step.input, *alone]
    others = {step.input}
    if isinstance(step, Product):
        others.add(step.other)
    return [name for name in alone if name not in others]


def _scratch(fixed: FixedProgram) -> Iterator[tuple[int, int]]:
    """Tell of each step with packed weights how many bytes those of the channels that are computed together take unpacked."""
    for index, step in enumerate(fixed.steps):
        if isinstance(step, Convolution) and step.w_bits < BYTE_BITS:
            together = min(TOGETHER, step.conv.out_channels // step.conv.groups)
            yield index, together * step.conv.taps


# --------------------------------------------------------------------------------------------------------------------- code


@dataclass(frozen=True)
class CCode:
    """A network's files by name, and what they describe."""

    name: str
    files: Mapping[str, str]
    arena: Arena
    bytes: Mapping[str, int]  # of weights, factors and tables


def pack(weights: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Put integers one after the other at their bits, the lowest bit first.

    Args:
        weights: Integers of two's complement; of one bit -1 and 1.
        bits: From 1 to 8.

    Returns:
        Bytes, and one more: a reader takes two at a time.
    """
    numbers = weights.reshape(-1).astype(np.int64)
    if bits == 1:
        numbers = (numbers + 1) // 2
    digits = (numbers[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(digits.reshape(-1).astype(np.uint8), bitorder="little")
    return np.append(packed, np.uint8(0))


def identifier(text: str) -> str:
    """Make a name for C of any text: letters, digits and underscores, a letter first."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    if not name or not name[0].isalpha():
        name = f"network_{name}".rstrip("_")
    if name in TAKEN:
        name += "_network"
    return name


def generate(fixed: FixedProgram, name: str) -> CCode:
    """Write a program's C code.

    Args:
        fixed: The program.
        name: What its functions begin with; an identifier.

    Returns:
        The files NAME.c, NAME.h and main.c.
    """
    writer = _Writer(fixed, name, plan(fixed))
    source = writer.source()
    made = {f"{name}.c": source, f"{name}.h": writer.header(), "main.c": writer.example()}
    return CCode(name, made, writer.arena, writer.bytes)


@dataclass(frozen=True, eq=False)
class Piece:
    """Channels of a move's output, from `first` on, that come from one input.

    Number (y, x, first + c) is the input's number rows[y] + columns[x] + channels[c], or real zero where one is `NOWHERE`.
    """

    source: int
    first: int
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    channels: list[int]


def find_pieces(step: Move, sizes: Sequence[int]) -> list[Piece] | None:
    """Describe a move by few numbers: by rows, columns and channels of each run of channels that is moved alike.

    Args:
        step: The move.
        sizes: How many numbers each input has.

    Returns:
        The pieces; None where an index for each number is shorter, or there is no such pattern.
    """
    ends = np.cumsum(sizes)
    pieces: list[Piece] = []
    for channel in range(step.index.shape[2]):
        found = _piece(step.index[:, :, channel].astype(np.int64), channel, ends)
        if found is None:
            return None
        before = pieces[-1] if pieces else None
        if (
            before is not None
            and before.source == found.source
            and np.array_equal(before.rows, found.rows)
            and np.array_equal(before.columns, found.columns)
        ):
            before.channels.extend(found.channels)
        else:
            pieces.append(found)
    numbers = sum(len(piece.rows) + len(piece.columns) + len(piece.channels) + 8 for piece in pieces)
    if numbers > step.index.size:
        return None
    return pieces


def _piece(plane: NDArray[np.int64], channel: int, ends: NDArray[np.int64]) -> Piece | None:
    """Describe the move of one channel; None if it isn't one of rows and columns."""
    given: NDArray[np.bool_] = plane >= 0
    of_row: NDArray[np.bool_] = np.any(given, axis=1)
    of_column: NDArray[np.bool_] = np.any(given, axis=0)
    rows, columns = np.full(len(of_row), NOWHERE), np.full(len(of_column), NOWHERE)
    if not given.any():
        return Piece(0, channel, rows, columns, [NOWHERE])
    y, x = int(of_row.argmax()), int(of_column.argmax())
    start = plane[y, x]
    source = int(np.searchsorted(ends, start, "right"))
    rows[of_row] = plane[of_row, x] - start
    columns[of_column] = plane[y, of_column] - start
    made = np.where(given, rows[:, None] + columns + start, plane)
    inside = np.searchsorted(ends, plane[given], "right") == source
    if not np.array_equal(given, of_row[:, None] & of_column) or not np.array_equal(made, plane) or not inside.all():
        return None
    begin = 0
    if source:
        begin = ends[source - 1]
    return Piece(source, channel, rows, columns, [int(start - begin)])


def _parts() -> dict[str, str]:
    """Read `steps.c` as parts by their names."""
    text = CODE.read_text(encoding="utf-8")
    found = re.split(r"^/\* part (\w+) \*/\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


class _Writer:
    def __init__(self, fixed: FixedProgram, name: str, arena: Arena) -> None:
        self.fixed = fixed
        self.name = name
        self.arena = arena
        self.bytes = {"weights": 0, "factors": 0, "tables": 0}
        self.used = {"types", "left_shift", "round_shift", "scaled", "near", "store", "load", "finish"}
        self.calls: list[str] = []
        self.tables: dict[tuple[str, bytes], str] = {}  # their names by type and content

    def source(self) -> str:
        """Write NAME.c."""
        constants = [self._image(), *(self._step(index) for index in range(len(self.fixed.steps)))]
        epilogues = [epilogue for epilogue in self.fixed.epilogues if epilogue is not None]
        self._add_parts(epilogues)
        lines = [
            f"/* A quantized network in integers, made by haq; see {self.name}.h. One image at a time. */",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            f'#include "{self.name}.h"',
            "",
            f"#define ARENA_WORDS {self.arena.size // WORD}",
            f"#define MOST_RESIDUALS {max([1, *(len(epilogue.residuals) for epilogue in epilogues)])}",
            f"#define MOST_OUTPUTS {max([1, *(len(epilogue.outputs) for epilogue in epilogues)])}",
            "",
            *(text for part, text in _parts().items() if part in self.used),
            *constants,
            self._functions(),
        ]
        return "\n".join(lines)

    def _add_parts(self, epilogues: Sequence[FixedEpilogue]) -> None:
        """Add what the steps need: a function that nothing calls is a warning."""
        packed = {step.w_bits < BYTE_BITS for step in self.fixed.steps if isinstance(step, Convolution)}
        if packed:
            kind = "weights_of_both"
            if len(packed) == 1:
                kind = {True: "weights_of_bits", False: "weights_of_bytes"}[True in packed]
            self.used |= {"convolution_type", kind}
            if True in packed:
                self.used.add("unpacked")
        slopes = any(epilogue.slope is not None for epilogue in epilogues)
        tables = any(epilogue.table is not None for epilogue in epilogues)
        kinds = {(False, False): "none", (True, False): "slopes", (False, True): "tables", (True, True): "both"}
        self.used.add(f"function_of_{kinds[slopes, tables]}")
        if slopes:
            self.used.add("times")
        if tables:
            self.used.add("bent")

    def header(self) -> str:
        """Write NAME.h."""
        height, width, channels = self.fixed.shape
        rows, columns, outputs = self.fixed.values[self.fixed.output].shape
        upper = self.name.upper()
        guard = f"{upper}_H"
        lines = [
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            "#include <stdint.h>",
            "",
            "/* An image is float numbers as the network was trained with, (channels, height, width). */",
            f"#define {upper}_INPUT_CHANNELS {channels}",
            f"#define {upper}_INPUT_HEIGHT {height}",
            f"#define {upper}_INPUT_WIDTH {width}",
            f"#define {upper}_INPUT_SIZE {height * width * channels}",
            "",
            "/* Outputs are integers worth so much, (height, width, channels); the largest is a classifier's answer. */",
            f"#define {upper}_OUTPUT_SIZE {rows * columns * outputs}",
            f"#define {upper}_OUTPUT_SCALE {_float(self.fixed.output_scale)}",
            "",
            "/* What the network holds of memory, statically, beside its constants. */",
            f"#define {upper}_ARENA_BYTES {self.arena.size}",
            "",
            "/* Put an image into the network. The digits of floats are taken for integers: no unit for floats is needed. */",
            f"void {self.name}_quantize_input(const float *image);",
            "",
            *self._header_of_codes(),
            "/* Compute the outputs of the image that was put in. Both calls are needed for every image. */",
            f"const int32_t *{self.name}_run(void);",
            "",
            "#endif",
            "",
        ]
        return "\n".join(lines)

    def _header_of_codes(self) -> list[str]:
        """Offer the place of the input's numbers, if they are of one kind, to who has integers already."""
        codes = self._input_codes()
        if codes is None:
            return []
        low, high = codes.range
        upper = self.name.upper()
        if codes.bits == 1 and codes.signed:
            what = "x >= 0 ? 1 : -1"
        else:
            what = f"round(x / {upper}_INPUT_SCALE) from {low} to {high}"
        return [
            "/* Where the image is, for who has integers in place of floats: bytes (height, width, channels), of a number x",
            f"   {what}, plus {codes.zero}. */",
            f"#define {upper}_INPUT_SCALE {_float(codes.scale)}",
            f"uint8_t *{self.name}_input(void);",
            "",
        ]

    def _input_codes(self) -> Codes | None:
        if len(self.fixed.image) != 1:
            return None
        representation = self.fixed.values[self.fixed.image[0].value].representation
        if isinstance(representation, Codes):
            return representation
        return None

    def example(self) -> str:
        """Write main.c."""
        upper = self.name.upper()
        return f"""\
/* Reads images of {upper}_INPUT_SIZE floats and prints the outputs of each: integers, worth {upper}_OUTPUT_SCALE. */
#include <stdio.h>

#include "{self.name}.h"

int main(void)
{{
    static float image[{upper}_INPUT_SIZE];

    while (fread(image, sizeof image, 1, stdin) == 1) {{
        const int32_t *outputs;
        {self.name}_quantize_input(image);
        outputs = {self.name}_run();
        for (int i = 0; i < {upper}_OUTPUT_SIZE; i++)
            printf("%ld ", (long)outputs[i]);
        printf("\\n");
    }}
    return 0;
}}
"""

    def _functions(self) -> str:
        """Write the functions that are called from outside."""
        height, width, channels = self.fixed.shape
        lines = [
            f"void {self.name}_quantize_input(const float *image)",
            "{",
            f"    for (int32_t place = 0; place < {height * width}; place++)",
            f"        for (int32_t channel = 0; channel < {channels}; channel++) {{",
            f"            const float x = image[channel * {height * width} + place];",
            f"            for (int i = 0; i < {len(self.fixed.image)}; i++)",
            f"                store(&images[i].value, place * {channels} + channel, quantized(x, &images[i]));",
            "        }",
            "}",
            "",
        ]
        if self._input_codes() is not None:
            place = self.arena.places[self.fixed.image[0].value]
            lines += [f"uint8_t *{self.name}_input(void)", "{", f"    return &arena.bytes[{place}];", "}", ""]
        lines += [
            f"const int32_t *{self.name}_run(void)",
            "{",
            *self.calls,
            f"    return &arena.words[{self.arena.places[self.fixed.output] // WORD}];",
            "}",
            "",
        ]
        return "\n".join(lines)

    def _image(self) -> str:
        self.used.add("image")
        rows = []
        for image in self.fixed.image:
            factor = f"{image.factor.mantissa}, {image.factor.shift}"
            rows.append(f"    {{{self._value(image.value)}, {image.low}, {image.high}, {factor}, {int(image.sign)}}},")
        return "\n".join(["static const struct image images[] = {", *rows, "};", ""])

    # -------------------------------------------------------------------------------------------------------------- steps

    def _step(self, index: int) -> str:
        """Write a step's constants, and remember the call of its function."""
        writers: dict[type[Any], Any] = {
            Convolution: self._convolution,
            Pool: self._pool,
            Sum: self._sum,
            Product: self._product,
            Resize: self._resize,
            Move: self._move,
            Lookup: self._lookup,
        }
        step = self.fixed.steps[index]
        text: str = writers[type(step)](index, step, self.fixed.heads[index])
        return text

    def _convolution(self, index: int, step: Convolution, head: Head) -> str:
        conv = step.conv
        kernel = f"{conv.kernel[0]}x{conv.kernel[1]}"
        what = f"{identifier(step.name)}: {kernel}, {conv.in_channels} to {conv.out_channels} channels"
        # A channel's weights lie as its inputs do.
        weights: NDArray[Any] = np.ascontiguousarray(step.weights.transpose(0, 2, 3, 1))
        fields = [
            self._window(conv.input_size, conv.in_channels, conv.output_size, conv.out_channels, conv),
            f"    .groups = {conv.groups},",
            f"    .bits = {step.w_bits},",
        ]
        if step.w_bits < BYTE_BITS:
            table, name = self._table("uint8_t", f"weights_{index}", pack(weights, step.w_bits), "weights")
            fields += ["    .weights = 0,", f"    .packed = {name},", f"    .scratch = {self.arena.scratch[index]},"]
        else:
            table, name = self._table("int8_t", f"weights_{index}", weights, "weights")
            fields += [f"    .weights = {name},", "    .packed = 0,", "    .scratch = 0,"]
        function = "convolution"
        if conv.groups == conv.in_channels and conv.groups > 1:
            function = "depthwise"
        self.used.add(function)
        return table + self._declare(index, "convolution", function, step, what, fields)

    def _pool(self, index: int, step: Pool, head: Head) -> str:
        height, width, channels = self.fixed.values[step.input].shape
        if step.ranges is not None:
            return self._average(index, step, head)
        sizes: Any = step.window
        window = self._window((height, width), channels, step.output_size, channels, sizes)
        kind = {"max": "max_pool", "avg": "sum_pool"}[step.kind]
        self.used |= {"pool_type", kind}
        what = f"{identifier(step.name)}: pooling of {sizes.kernel[0]}x{sizes.kernel[1]}"
        return self._declare(index, "pool", kind, step, what, [window])

    def _average(self, index: int, step: Pool, head: Head) -> str:
        assert step.ranges is not None
        assert head.factors is not None
        _, width, channels = self.fixed.values[step.input].shape
        self.used |= {"average", "times"}
        rows, row_name = self._table("int32_t", f"rows_{index}", step.ranges.rows, "tables")
        columns, column_name = self._table("int32_t", f"columns_{index}", step.ranges.columns, "tables")
        places, place_name = self._table("int32_t", f"places_{index}", head.factors.mantissas, "tables")
        fields = [
            f"    .in_width = {width},",
            f"    .channels = {channels},",
            f"    .out_height = {step.output_size[0]},",
            f"    .out_width = {step.output_size[1]},",
            f"    .rows = {row_name},",
            f"    .columns = {column_name},",
            f"    .factors = {{{place_name}, {head.factors.left}, {head.factors.shift}}},",
        ]
        what = f"{identifier(step.name)}: average pooling"
        return rows + columns + places + self._declare(index, "average", "average", step, what, fields)

    def _sum(self, index: int, step: Sum, head: Head) -> str:
        shape = self.fixed.values[step.input].shape
        self.used.add("each")
        fields = [f"    .size = {math.prod(shape)},", f"    .channels = {shape[2]},"]
        return self._declare(index, "each", "each", step, f"{identifier(step.name)}: number by number", fields)

    def _product(self, index: int, step: Product, head: Head) -> str:
        shape, other = self.fixed.values[step.input].shape, self.fixed.values[step.other].shape
        self.used.add("product")
        fields = [
            f"    .other = {self._value(step.other)},",
            f"    .size = {math.prod(shape)},",
            f"    .channels = {shape[2]},",
            f"    .of_channel = {int(other != shape and other[:2] == (1, 1))},",
            f"    .of_place = {int(other != shape and other[:2] == shape[:2])},",
            f"    .right = {head.right},",
        ]
        return self._declare(index, "product", "product", step, f"{identifier(step.name)}: product", fields)

    def _resize(self, index: int, step: Resize, head: Head) -> str:
        _, width, channels = self.fixed.values[step.input].shape
        self.used.add("resize")
        tables, names = [], []
        for name, taps in (("rows", step.rows), ("columns", step.columns)):
            triples = np.stack([taps.first, taps.second, weights_of(taps)], 1)
            table, name = self._table("int32_t", f"{name}_{index}", triples, "tables")
            tables.append(table)
            names.append(name)
        fields = [
            f"    .in_width = {width},",
            f"    .channels = {channels},",
            f"    .out_height = {len(step.rows.first)},",
            f"    .out_width = {len(step.columns.first)},",
            f"    .rows = {names[0]},",
            f"    .columns = {names[1]},",
            f"    .left = {head.left},",
        ]
        what = f"{identifier(step.name)}: bilinear interpolation"
        return "".join(tables) + self._declare(index, "resize", "resize", step, what, fields)

    def _move(self, index: int, step: Move, head: Head) -> str:
        value = self.fixed.values[step.output]
        height, width, channels = value.shape
        fields = [f"    .output = {self._value(step.output)},", f"    .zero = {zero_of(value.representation)},"]
        what = f"{identifier(step.output)}: values in other places"
        pieces = find_pieces(step, [math.prod(self.fixed.values[name].shape) for name in step.inputs])
        if pieces is None:
            self.used.add("scatter")
            table, name = self._table("int32_t", f"indices_{index}", step.index, "tables")
            sizes = np.array([math.prod(self.fixed.values[given].shape) for given in step.inputs])
            of_sizes, size_name = self._table("int32_t", f"sizes_{index}", sizes, "tables")
            inputs = ", ".join(self._value(given) for given in step.inputs)
            table += of_sizes + f"static const struct value inputs_{index}[] = {{{inputs}}};\n"
            fields += [f"    .size = {step.index.size},", f"    .input_count = {len(step.inputs)},"]
            fields += [f"    .inputs = inputs_{index},", f"    .sizes = {size_name},", f"    .indices = {name},"]
            return table + self._call(index, "scatter", "scatter", what, fields)
        self.used |= {"move_type", "move"}
        table, rows = "", []
        for number, piece in enumerate(pieces):
            names = []
            parts = (("rows", piece.rows), ("columns", piece.columns), ("channels", np.array(piece.channels)))
            for part, numbers in parts:
                made, name = self._table("int32_t", f"{part}_{index}_{number}", numbers, "tables")
                table += made
                names.append(name)
            source = self._value(step.inputs[piece.source])
            rows.append(f"    {{{source}, {piece.first}, {len(piece.channels)}, {', '.join(names)}}},\n")
        table += f"static const struct piece pieces_{index}[] = {{\n{''.join(rows)}}};\n"
        fields += [f"    .height = {height},", f"    .width = {width},", f"    .channels = {channels},"]
        fields += [f"    .piece_count = {len(pieces)},", f"    .pieces = pieces_{index},"]
        return table + self._call(index, "move", "move", what, fields)

    def _lookup(self, index: int, step: Lookup, head: Head) -> str:
        self.used.add("lookup")
        text = ""
        for number, (output, entries) in enumerate(zip(step.outputs, step.entries, strict=True)):
            kind, fields = "int32_t", ["    .bytes = 0,", "    .words = {},"]
            if isinstance(self.fixed.values[output].representation, Codes):
                kind, fields = "uint8_t", ["    .bytes = {},", "    .words = 0,"]
            table, name = self._table(kind, f"entries_{index}_{number}", entries, "tables")
            fields = [field.format(name) for field in fields]
            fields.append(f"    .size = {math.prod(self.fixed.values[output].shape)},")
            fields += [f"    .input = {self._value(step.input)},", f"    .output = {self._value(output)},"]
            what = f"{identifier(step.name)}: a function of bytes"
            text += table + self._call(f"{index}_{number}", "lookup", "lookup", what, fields)
        return text

    def _declare(self, index: int, kind: str, function: str, step: Any, what: str, fields: list[str]) -> str:
        """Write the constant of a step that reads a value and has an epilogue."""
        stated = self.fixed.epilogues[index]
        assert stated is not None
        tables, epilogue = self._epilogue(index, stated)
        fields = [f"    .input = {self._value(step.input)},", *fields, *epilogue]
        return tables + self._call(index, kind, function, what, fields)

    def _call(self, index: int | str, kind: str, function: str, what: str, fields: list[str]) -> str:
        """Write a step's constant, and remember the call of its function."""
        self.calls.append(f"    {function}(&step_{index}); /* {what} */")
        return "\n".join([f"/* {what} */", f"static const struct {kind} step_{index} = {{", *fields, "};", ""])

    def _table(self, kind: str, name: str, numbers: NDArray[Any], of: str) -> tuple[str, str]:
        """Write an array, unless there is one of the same content; return the text and the array's name."""
        flat = np.ascontiguousarray(numbers, kind.removesuffix("_t")).reshape(-1)
        known = self.tables.setdefault((kind, flat.tobytes()), name)
        if known != name:
            return "", known
        self.bytes[of] += flat.nbytes
        return _array(kind, name, flat), name

    def _window(self, in_size: Any, in_channels: int, out_size: Any, out_channels: int, sizes: Any) -> str:
        numbers = (*in_size, in_channels, *out_size, out_channels)
        numbers += (*sizes.kernel, *sizes.stride, *sizes.padding, *sizes.dilation)
        return f"    .window = {{{', '.join(map(str, numbers))}}},"

    def _epilogue(self, index: int, epilogue: FixedEpilogue) -> tuple[str, list[str]]:
        tables = ""
        size = max(len(epilogue.multiplier), len(epilogue.offset))
        if epilogue.slope is not None:
            size = max(size, epilogue.slope.mantissas.size)
        columns: list[tuple[str, str, NDArray[Any]]] = [
            ("multipliers", "int32_t", epilogue.multiplier),
            ("lefts", "uint8_t", epilogue.left),
            ("offsets", "int32_t", epilogue.offset),
        ]
        names = {}
        for name, kind, numbers in columns:
            table, names[name] = self._table(kind, f"{name}_{index}", np.broadcast_to(numbers, size), "factors")
            tables += table
        fields = [
            "    .epilogue = {",
            f"        .per_channel = {int(size > 1)},",
            f"        .offset_left = {epilogue.offset_left},",
            f"        .residual_count = {len(epilogue.residuals)},",
            f"        .output_count = {len(epilogue.outputs)},",
            *(f"        .{column} = {name}," for column, name in names.items()),
        ]
        if epilogue.residuals:
            rows = ", ".join(f"{{{self._value(x.value)}, {x.factor}, {x.left}}}" for x in epilogue.residuals)
            fields.append(f"        .residuals = {{{rows}}},")
        fields.append("        .outputs = {")
        for output in epilogue.outputs:
            factor, shift = 0, epilogue.shift
            if output.factor is not None:
                factor, shift = output.factor.mantissa, output.factor.shift
            stated = f"{output.low}, {output.high}, {factor}, {shift}, {int(output.sign)}, {output.left}"
            fields.append(f"            {{{self._value(output.value)}, {stated}}},")
        fields.append("        },")
        if epilogue.slope is not None:
            slopes = np.broadcast_to(epilogue.slope.mantissas, size)
            table, name = self._table("int32_t", f"slopes_{index}", slopes, "factors")
            tables += table
            fields.append(f"        .slopes = {{{name}, {epilogue.slope.left}, {epilogue.slope.shift}}},")
        if epilogue.table is not None:
            tables += self._function(index, epilogue.table)
            fields.append(f"        .table = &function_{index},")
        return tables, [*fields, "    },"]

    def _function(self, index: int, table: FixedTable) -> str:
        text, name = self._table("int32_t", f"segments_{index}", table.coefficients, "tables")
        numbers = f"{len(table.coefficients)}, {table.start}, {table.fraction}, {table.guard}"
        return text + f"static const struct table function_{index} = {{{name}, {numbers}}};\n"

    def _value(self, name: str) -> str:
        representation = self.fixed.values[name].representation
        if isinstance(representation, Codes):
            return f"{{{self.arena.places[name]}, 0, {representation.zero}}}"
        return f"{{{self.arena.places[name]}, 1, 0}}"


def _float(number: float) -> str:
    return f"{float(np.float32(number))!r}f"


def _array(kind: str, name: str, numbers: NDArray[np.integer]) -> str:
    words = [str(number) for number in numbers.tolist()]
    lines = [", ".join(words[start : start + PER_LINE]) for start in range(0, len(words), PER_LINE)]
    return f"static const {kind} {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"
