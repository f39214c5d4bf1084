"""A quantized network as a C99 file that any compiler takes: for microcontrollers, and wherever nothing else runs.

What is written is a folder of four files, two of them named after it:

    NAME.c, NAME.h    the network: weights at their bits, integers end to end, no allocation, nothing of a library but memcpy
    main.c            an example that reads images and prints their outputs
    network.json      what the network is, where in its arena every value lies, and what it takes of flash and RAM

The code is `haq/deployment/steps.c`, a plain function for each kind of step, and a constant for each step that says of what
sizes it is and where its weights are. It computes what `haq.deployment.fixed_point` does, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq.deployment import fixed_point, interpreter
from haq.deployment.exporter import SUMMARIES, Exporter, OnProgress, Samples, Verdict
from haq.deployment.fixed_point import FixedEpilogue, FixedProgram
from haq.deployment.graph import Graph
from haq.deployment.lowering import check_integers, lower
from haq.deployment.program import BYTE_BITS, Codes, Convolution, Fixed, Pool, Step, Sum, Value
from haq.store import files
from haq.store.units import describe_bytes, percent

FORMAT = "haq-c-1"
DESCRIPTION = "network.json"
TAKEN = ("main", "stdint", "stdio", "string")  # names of other files
CODE = Path(__file__).with_name("steps.c")
WORD = 4  # bytes
CHECKED = 8  # images on which a network is compared before it is written
TOGETHER = 4  # output channels that steps.c computes at once
PER_LINE = 20  # numbers
# Compilers whose sizes are told, the first that is there, with the options of a usual target.
COMPILERS = (
    ("arm-none-eabi-gcc", ("-mcpu=cortex-m4", "-mthumb")),
    ("arm-linux-gnueabihf-gcc", ("-mthumb",)),
    ("gcc", ()),
)
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")


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

    names: list[str]
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
    for image in fixed.image:
        blocks[image.value] = _Block([image.value], value_bytes(fixed.values[image.value]), -1, -1)
    for index, (step, epilogue) in enumerate(zip(fixed.steps, fixed.epilogues, strict=True)):
        read = _read(step, epilogue)
        for name in read:
            blocks[name].last = index
        for output in epilogue.outputs:
            size = value_bytes(fixed.values[output.value])
            block = _written_over(step, epilogue, output.value, index, blocks, fixed)
            if block is None:
                block = _Block([], size, index, index)
            block.names.append(output.value)
            block.last = index
            blocks[output.value] = block
    blocks[fixed.output].last = len(fixed.steps)
    scratch = {index: _Block([], size, index, index) for index, size in _scratch(fixed)}
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


def _read(step: Step, epilogue: FixedEpilogue) -> list[str]:
    return [step.input, *(residual.value for residual in epilogue.residuals)]


def _written_over(
    step: Step, epilogue: FixedEpilogue, output: str, index: int, blocks: Mapping[str, _Block], fixed: FixedProgram
) -> _Block | None:
    """Return the block of something that a step reads for the last time, number by number, and that an output replaces.

    A number of a residual is read just before the output's number of the same place is written.
    """
    over = [residual.value for residual in epilogue.residuals]
    if isinstance(step, Sum):
        over.append(step.input)
    if isinstance(step, Convolution | Pool) and step.input in over:
        over.remove(step.input)
    taken = {id(blocks[other.value]) for other in epilogue.outputs if other.value in blocks}
    for name in over:
        block = blocks[name]
        last_read = max(at for at, (s, e) in enumerate(zip(fixed.steps, fixed.epilogues, strict=True)) if name in _read(s, e))
        alike = value_bytes(fixed.values[name]) == value_bytes(fixed.values[output]) == block.size
        if last_read == index and alike and id(block) not in taken:
            return block
    return None


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
    weight_bytes: int
    factor_bytes: int


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
    return CCode(name, made, writer.arena, writer.weight_bytes, writer.factor_bytes)


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
        self.weight_bytes = 0
        self.factor_bytes = 0
        self.used = {"types", "left_shift", "round_shift", "scaled", "store", "load", "finish"}
        self.calls: list[str] = []

    def source(self) -> str:
        """Write NAME.c."""
        constants = [self._image(), *(self._step(index) for index in range(len(self.fixed.steps)))]
        self._add_parts()
        epilogues = self.fixed.epilogues
        lines = [
            f"/* A quantized network in integers, made by haq; see {self.name}.h. One image at a time. */",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            f'#include "{self.name}.h"',
            "",
            f"#define ARENA_WORDS {self.arena.size // WORD}",
            f"#define MOST_RESIDUALS {max([1, *(len(epilogue.residuals) for epilogue in epilogues)])}",
            f"#define MOST_OUTPUTS {max(len(epilogue.outputs) for epilogue in epilogues)}",
            "",
            *(text for part, text in _parts().items() if part in self.used),
            *constants,
            self._functions(),
        ]
        return "\n".join(lines)

    def _add_parts(self) -> None:
        """Add what the steps need: a function that nothing calls is a warning."""
        convolutions = [step for step in self.fixed.steps if isinstance(step, Convolution)]
        if convolutions:
            self.used.add("convolution_type")
            packed = {step.w_bits < BYTE_BITS for step in convolutions}
            self.used.add({(True,): "weights_of_bits", (False,): "weights_of_bytes"}.get(tuple(packed), "weights_of_both"))
            if True in packed:
                self.used.add("unpacked")

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
            "/* Outputs are integers worth this much each, (height, width, channels); the largest is the answer of a classifier. */",
            f"#define {upper}_OUTPUT_SIZE {rows * columns * outputs}",
            f"#define {upper}_OUTPUT_SCALE {_float(self.fixed.output_scale)}",
            "",
            "/* What the network holds of memory, statically, beside its constants. */",
            f"#define {upper}_ARENA_BYTES {self.arena.size}",
            "",
            "/* Put an image into the network as integers. It computes with the digits of floats: no unit for floats is needed. */",
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
            fields = (self._value(image.value), image.low, image.high, image.factor.mantissa, image.factor.shift, image.sign)
            rows.append(f"    {{{', '.join(str(_plain(field)) for field in fields)}}},")
        return "\n".join(["static const struct image images[] = {", *rows, "};", ""])

    def _step(self, index: int) -> str:
        step = self.fixed.steps[index]
        if isinstance(step, Convolution):
            return self._convolution(index, step)
        if isinstance(step, Pool):
            return self._pool(index, step)
        assert isinstance(step, Sum)
        return self._sum(index, step)

    def _convolution(self, index: int, step: Convolution) -> str:
        conv = step.conv
        what = f"{identifier(step.name)}: {conv.kernel[0]}x{conv.kernel[1]}, {conv.in_channels} to {conv.out_channels} channels"
        # A channel's weights lie as its inputs do.
        weights = np.ascontiguousarray(step.weights.transpose(0, 2, 3, 1))
        if step.w_bits < BYTE_BITS:
            packed = pack(weights, step.w_bits)
            self.weight_bytes += packed.nbytes
            table = _array("uint8_t", f"weights_{index}", packed)
            pointers = ["    .weights = 0,", f"    .packed = weights_{index},", f"    .scratch = {self.arena.scratch[index]},"]
        else:
            self.weight_bytes += weights.nbytes
            table = _array("int8_t", f"weights_{index}", weights.reshape(-1))
            pointers = [f"    .weights = weights_{index},", "    .packed = 0,", "    .scratch = 0,"]
        window = self._window(conv.input_size, conv.in_channels, conv.output_size, conv.out_channels, conv)
        fields = [window, f"    .groups = {conv.groups},", f"    .bits = {step.w_bits},", *pointers]
        function = "convolution"
        if conv.groups == conv.in_channels and conv.groups > 1:
            function = "depthwise"
        self.used.add(function)
        return table + self._declare(index, "convolution", function, step, what, fields)

    def _pool(self, index: int, step: Pool) -> str:
        height, width, channels = self.fixed.values[step.input].shape
        window = self._window((height, width), channels, step.output_size, channels, step.window)
        kind = {"max": "max_pool", "avg": "sum_pool"}[step.kind]
        self.used |= {"pool_type", kind}
        what = f"{identifier(step.name)}: pooling of {step.window.kernel[0]}x{step.window.kernel[1]}"
        return self._declare(index, "pool", kind, step, what, [window])

    def _sum(self, index: int, step: Sum) -> str:
        shape = self.fixed.values[step.input].shape
        self.used.add("each")
        fields = [f"    .size = {math.prod(shape)},", f"    .channels = {shape[2]},"]
        return self._declare(index, "each", "each", step, f"{identifier(step.name)}: number by number", fields)

    def _declare(self, index: int, kind: str, function: str, step: Step, what: str, fields: list[str]) -> str:
        """Write a step's constant, and the call of its function."""
        self.calls.append(f"    {function}(&step_{index}); /* {what} */")
        tables, epilogue = self._epilogue(index, self.fixed.epilogues[index])
        head = [f"/* {what} */", f"static const struct {kind} step_{index} = {{", f"    .input = {self._value(step.input)},"]
        return tables + "\n".join([*head, *fields, *epilogue, "};", ""])

    def _window(self, in_size: Any, in_channels: int, out_size: Any, out_channels: int, sizes: Any) -> str:
        numbers = (*in_size, in_channels, *out_size, out_channels)
        numbers += (*sizes.kernel, *sizes.stride, *sizes.padding, *sizes.dilation)
        return f"    .window = {{{', '.join(map(str, numbers))}}},"

    def _epilogue(self, index: int, epilogue: FixedEpilogue) -> tuple[str, list[str]]:
        tables = ""
        size = max(len(epilogue.multiplier), len(epilogue.offset))
        columns = (("multipliers", "int32_t"), ("lefts", "uint8_t"), ("offsets", "int32_t"))
        for (name, kind), numbers in zip(columns, (epilogue.multiplier, epilogue.left, epilogue.offset), strict=True):
            numbers = np.broadcast_to(numbers, size)
            self.factor_bytes += numbers.nbytes
            tables += _array(kind, f"{name}_{index}", numbers)
        fields = [
            "    .epilogue = {",
            f"        .per_channel = {int(size > 1)},",
            f"        .offset_left = {epilogue.offset_left},",
            f"        .residual_count = {len(epilogue.residuals)},",
            f"        .output_count = {len(epilogue.outputs)},",
            *(f"        .{name} = {name}_{index}," for name, _ in columns),
        ]
        if epilogue.residuals:
            rows = ", ".join(f"{{{self._value(x.value)}, {x.factor}, {x.left}}}" for x in epilogue.residuals)
            fields.append(f"        .residuals = {{{rows}}},")
        fields.append("        .outputs = {")
        for output in epilogue.outputs:
            factor, shift = 0, epilogue.shift
            if output.factor is not None:
                factor, shift = output.factor.mantissa, output.factor.shift
            numbers = f"{output.low}, {output.high}, {factor}, {shift}, {int(output.sign)}"
            fields.append(f"            {{{self._value(output.value)}, {numbers}}},")
        return tables, [*fields, "        },", "    },"]

    def _value(self, name: str) -> str:
        representation = self.fixed.values[name].representation
        if isinstance(representation, Codes):
            return f"{{{self.arena.places[name]}, 0, {representation.zero}}}"
        return f"{{{self.arena.places[name]}, 1, 0}}"


def _plain(field: object) -> object:
    if isinstance(field, bool):
        return int(field)
    return field


def _float(number: float) -> str:
    return f"{float(np.float32(number))!r}f"


def _array(kind: str, name: str, numbers: NDArray[np.integer]) -> str:
    words = [str(number) for number in numbers.tolist()]
    lines = [", ".join(words[start : start + PER_LINE]) for start in range(0, len(words), PER_LINE)]
    return f"static const {kind} {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


# --------------------------------------------------------------------------------------------------------- what it compiles to


@dataclass(frozen=True)
class Sizes:
    """Bytes of the compiled network: `flash` holds code and constants, `ram` what is written; by which compiler."""

    flash: int
    ram: int
    compiler: str


def compiled_sizes(folder: Path, name: str) -> Sizes | None:
    """Compile a network for size and ask how large it became; None without a compiler."""
    for compiler, options in COMPILERS:
        size = shutil.which(compiler.replace("gcc", "size"))
        if shutil.which(compiler) is None or size is None:
            continue
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / "network.o"
            command = [compiler, "-std=c99", "-Os", *options, "-c", str(folder / f"{name}.c"), "-o", str(made)]
            _run(command)
            text, data, bss = map(int, _run([size, str(made)]).decode().splitlines()[1].split()[:3])
        return Sizes(text + data, data + bss, " ".join([compiler, *options, "-Os"]))
    return None


def _run(command: Sequence[str], given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"{command[0]} ended with {done.returncode}: {message[-500:]}")
    return done.stdout


class Compiled:
    """A folder's network with its main.c, compiled: called with float32 images (N, C, H, W) it returns integers (N, outputs).

    Usable in a `with` statement, which takes the compiled program away.
    """

    def __init__(self, folder: Path, compiler: Sequence[str] = ("gcc", "-O3"), runner: Sequence[str] = ()) -> None:
        """Compile.

        Args:
            folder: What was written.
            compiler: The compiler and its options.
            runner: What runs its programs, if this machine doesn't.
        """
        name = _described(folder)["name"]
        self._place = tempfile.TemporaryDirectory()
        program = Path(self._place.name) / "network"
        self._command = [*runner, str(program)]
        try:
            _run([*compiler, *STRICT, str(folder / f"{name}.c"), str(folder / "main.c"), "-o", str(program)])
        except ValueError:
            self._place.cleanup()
            raise

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Compute the outputs' integers."""
        lines = _run(self._command, np.ascontiguousarray(images, "<f4").tobytes()).decode().splitlines()
        return np.array([line.split() for line in lines], np.int64).reshape(len(images), -1)

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *error: object) -> None:
        self._place.cleanup()


# ----------------------------------------------------------------------------------------------------------------- exporter


def convert(network: nn.Module, graph: Graph, images: Tensor) -> FixedProgram:
    """Make the program without floats of a quantized network, and check it on some images.

    Args:
        network: The quantized network.
        graph: Its operations.
        images: Images (N, C, H, W) of the train split.

    Returns:
        The program.

    Raises:
        ValueError: Naming the layer, for what has no integer form, and where integers would be others than in PyTorch by more
            than rounding.
    """
    program = lower(graph, network, images)
    interpreter.check(network, program, images[:CHECKED])
    fixed = fixed_point.fixed_point(program)
    if fault := fixed_point.compare(network, program, fixed, images[:CHECKED]).fault:
        raise ValueError(f"{type(network).__name__} can't be written in C: its program without floats {fault}")
    return fixed


def write(folder: Path, fixed: FixedProgram, notes: Mapping[str, Any]) -> None:
    """Write a network's folder, its description last.

    Args:
        folder: The folder; it may be there.
        fixed: The program.
        notes: What the description says besides.
    """
    code = generate(fixed, identifier(folder.resolve().name))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --to c writes a folder")
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / DESCRIPTION
    description.unlink(missing_ok=True)
    for name, text in code.files.items():
        files.write(folder / name, text)
    content = {"format": FORMAT, "name": code.name, **notes, **_description(fixed, code)}
    sizes = compiled_sizes(folder, code.name)
    if sizes is not None:
        content |= {"flash_bytes": sizes.flash, "ram_bytes": sizes.ram, "compiler": sizes.compiler}
    content["files"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in code.files.items()}
    files.write(description, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _description(fixed: FixedProgram, code: CCode) -> dict[str, Any]:
    height, width, channels = fixed.shape
    return {
        "input": {"shape": [channels, height, width], "values": [image.value for image in fixed.image]},
        "output": {"shape": list(fixed.values[fixed.output].shape), "scale": fixed.output_scale},
        "arena_bytes": code.arena.size,
        "weight_bytes": code.weight_bytes,
        "factor_bytes": code.factor_bytes,
        "steps": [_described_step(step) for step in fixed.steps],
        "values": {
            name: {"at": place, "bytes": value_bytes(fixed.values[name]), "shape": list(fixed.values[name].shape)}
            | {"numbers": fixed.values[name].representation.kind, "scale": fixed.values[name].representation.unit}
            for name, place in code.arena.places.items()
        },
    }


def _described_step(step: Step) -> dict[str, Any]:
    described: dict[str, Any] = {"name": step.name, "step": type(step).__name__.lower(), "input": step.input}
    if isinstance(step, Convolution):
        described |= {"weight_bits": step.w_bits, "activation_bits": step.a_bits, "macs": step.conv.macs}
    return described


def _described(folder: Path) -> dict[str, Any]:
    """Read what describes a folder, and check that its files are as they were written.

    Raises FileNotFoundError and ValueError for a folder that isn't one, and for files that changed.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION}: haq deploy RUN --to c writes such a folder")
    content = files.read_json(path, "the description of a network in C")
    if content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        raise ValueError(f"{path} isn't of format {FORMAT!r}: deploy the network again")
    for name, digest in content["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name} isn't as it was written, by its SHA-256: deploy the network again")
    return content


def policy_storage_bytes(network: nn.Module, images: Tensor) -> int:
    """Return what a search prints as the storage of a network at its present bits: weights, scales, biases and norms."""
    workload = hw_models.trace(Q.float_copy(network).eval(), images[:1])
    policy = Q.get_policy(network)
    stored = hw_models.storage_bytes(workload)
    total = float(hw_models.float_bytes(workload))
    for row, layer in zip(stored, workload.layers, strict=True):
        w_bits, a_bits = policy[layer.name]
        total += row[w_bits - 1, a_bits - 1]
    return int(total)


class CExporter(Exporter):
    """A folder with a network in C99, for microcontrollers."""

    name = "c"
    summary = SUMMARIES["c"]
    output = "network"
    options = ("residuals",)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless all layers are of 1 to 8 bits, integers times a scale."""
        for name, layer in Q.quant_layers(network).items():
            for what, bits in (("weights", layer.weight_bits), ("activations", layer.activation_bits)):
                if bits is None:
                    raise ValueError(f"layer {name!r} can't be written in C: its {what} are in float; --to c takes 1 to 8 bits")
                if bits > BYTE_BITS:
                    raise ValueError(
                        f"layer {name!r} can't be written in C: its {what} are of {bits} bits; --to c takes 1 to 8 bits"
                    )
        check_integers(network)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what has no program without floats; see `Exporter.check_operations`."""
        fixed_point.fixed_point(lower(graph, network, images))

    def export(
        self,
        network: nn.Module,
        graph: Graph,
        images: Tensor,
        path: Path,
        *,
        notes: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: OnProgress,
    ) -> None:
        """Write a network; see `Exporter.export`."""
        fixed = convert(network, graph, images)
        notes = {"policy": Q.get_policy(network).to_dict(), "schemes": Q.scheme_records(network), **notes}
        write(path, fixed, {**notes, "policy_storage_bytes": policy_storage_bytes(network, images)})

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Compare the program's answers on all test images, and compiled code with it on some; see `Exporter.compare`.

        Code that is compiled with whatever gcc is there isn't fast enough for all images of any network.
        """
        described = _described(path)
        program = lower(graph, network, samples.calibration)
        fixed = fixed_point.fixed_point(program)
        comparison = fixed_point.compare(network, program, fixed, samples.compared)
        answers = _answers(network, fixed, samples)
        rows = [("same answer as in PyTorch", f"{answers.same:,} of {answers.count:,} test images")]
        if samples.labelled:
            before = answers.right_in_torch / answers.count
            rows.append(("accuracy", f"{percent(answers.right / answers.count)} (in PyTorch {percent(before)})"))
        of_own = f"{comparison.different:,}, {comparison.own:,} of them by an end in integers instead of float32"
        rows += [
            ("integers that enter layers", f"{comparison.values:,}, of {len(samples.compared)} images"),
            ("  other than in PyTorch", of_own),
            ("largest difference of outputs from PyTorch's", f"{comparison.output_difference:.3g}"),
        ]
        unequal = 0
        if shutil.which("gcc"):
            expected, _ = fixed_point.run_integers(fixed, samples.compared.numpy())
            with Compiled(path) as code:
                unequal = int((code(samples.compared.numpy()) != expected.reshape(len(expected), -1)).sum())
            rows.append(("outputs of compiled code other than the program's", f"{unequal:,} of {expected.size:,}"))
        else:
            rows.append(("compiled code", "not run here: there is no gcc; answers are its integer program's"))
        rows += _size_rows(described)
        return Verdict(answers.same == answers.count and not unequal, tuple(rows))


def _size_rows(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights, factors = described["weight_bytes"], described["factor_bytes"]
    parts = f"weights {describe_bytes(weights)}, factors {describe_bytes(factors)}"
    flash = f"{describe_bytes(weights + factors)} of constants alone, as there is no compiler here: {parts}"
    ram = f"{describe_bytes(described['arena_bytes'])}, the arena; no compiler here to ask for more"
    if "compiler" in described:
        code = described["flash_bytes"] - weights - factors
        flash = f"{describe_bytes(described['flash_bytes'])}: {parts}, code and sizes {describe_bytes(code)}"
        ram = f"{describe_bytes(described['ram_bytes'])}, of which the arena {describe_bytes(described['arena_bytes'])}"
        flash += f" ({described['compiler']})"
    storage = describe_bytes(described["policy_storage_bytes"])
    return [("flash", flash), ("RAM, beside the stack", ram), ("storage of the policy", storage)]


@dataclass
class _Answers:
    """Of so many images, how many are answered as in PyTorch, and how many rightly by both."""

    count: int = 0
    same: int = 0
    right: int = 0
    right_in_torch: int = 0


def _answers(network: nn.Module, fixed: FixedProgram, samples: Samples) -> _Answers:
    found = _Answers()
    for images, labels in samples.test():
        with torch.inference_mode():
            expected = network(images).argmax(1)
        integers, _ = fixed_point.run_integers(fixed, images.numpy())
        answers = torch.from_numpy(integers.argmax(3)).reshape(expected.shape)
        found.count += len(labels)
        found.same += int((answers == expected).sum())
        found.right += int((answers == labels).sum())
        found.right_in_torch += int((expected == labels).sum())
    return found
