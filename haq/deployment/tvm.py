"""A program of integers as machine code: one library whose functions go over arenas of memory, one for each type of number.

What is written is a folder of three files (`haq.deployment.folder`). `Deployed` runs it: once the functions `unpack` of its
description, which make the arenas of constants of what the file has packed, then for every image the `calls` in order, each
with the input, the output and all arenas. The code of a network reads and writes nothing but these arrays.

Kernels multiply integers of up to 8 bits. A layer with an operand of 16 bits, or in float, is computed in float32: its
quantized operands are the same integers, and their products are summed as PyTorch sums them.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment import folder as folders
from haq.deployment import interpreter
from haq.deployment.answers import compare_answers
from haq.deployment.exporter import SUMMARIES, Exporter, OnProgress, Samples, Verdict, check_own_folder, policy_storage_bytes
from haq.deployment.folder import CONSTANTS, DESCRIPTION, INPUT, LIBRARY, OUTPUT, PACKED
from haq.deployment.graph import Graph
from haq.deployment.lowering import check_integers, lower
from haq.deployment.nodes import Window
from haq.deployment.program import (
    Codes,
    Convolution,
    Fixed,
    Float,
    FloatConvolution,
    Lookup,
    Move,
    Pool,
    Product,
    Program,
    Quantize,
    Representation,
    Resize,
    Sum,
    Value,
    read_by,
)
from haq.deployment.program import Epilogue as ProgramEpilogue
from haq.store import npz
from haq.store.units import counted
from hw_models.tvm_cpu import builder, kernels, move, packing, steps
from hw_models.tvm_cpu.builder import Code
from hw_models.tvm_cpu.conv import Conv
from hw_models.tvm_cpu.cpu import use_threads
from hw_models.tvm_cpu.kernel import Kernel

if TYPE_CHECKING:
    from hw_models.tvm_cpu.target import CpuTarget

ALIGNMENT = 64  # bytes, of everything that kernels look at
TOGETHER = 8  # steps in a function: one of all of them takes long to compile
TIMED = 200  # calls
SHOWN = 3  # names in a line
WEIGHTS = "weights of the program"  # among the constants of a part
CONSTANT = "const_"  # begins the names of arenas that hold constants
CHECKED = 8  # images on which a network is compared before it is compiled, and its code afterwards

Layer = tuple[Conv, int, int, bool]


@dataclass(frozen=True)
class Part:
    """Code for a step, with the names of the program's values that its buffers are, and its constants.

    `weights` are those of a kernel as its program has them, (C_out, C_in / groups, kh, kw). What they become isn't stored.
    """

    name: str
    code: Code
    values: Mapping[str, str]
    constants: Mapping[str, NDArray[Any]]
    weights: NDArray[Any] | None = None

    @property
    def bits(self) -> list[str]:
        """The buffers of codes that are stored as planes of bits."""
        return [a.name for some in self.code.arguments().values() for a in some if a.dtype == "uint32"]

    @property
    def made(self) -> list[str]:
        """The constants that come from the weights."""
        if self.weights is None or not isinstance(self.code, Kernel):
            return []
        return self.code.of_weights()


def layers(program: Program) -> list[Layer]:
    """List the integer convolutions for which there are kernels to choose from: sizes, bits, whether inputs are signed."""
    return [_layer(step) for step in program.steps if isinstance(step, Convolution) and step.is_low_bit]


def computed_in_float(program: Program) -> list[str]:
    """Name the layers whose products are summed in float32: those with an operand in float or of 16 bits."""
    low_bit = {step.name for step in program.steps if isinstance(step, Convolution) and step.is_low_bit}
    return [name for name in program.layers if name not in low_bit]


def _layer(step: Convolution) -> Layer:
    return step.conv, step.w_bits, step.a_bits, step.signed


def parts(program: Program, chosen: Mapping[Layer, Kernel], target: CpuTarget, *, planes: bool = True) -> list[Part]:
    """Write code for every step of a program.

    Args:
        program: The program.
        chosen: The kernels of its integer convolutions.
        target: The processor.
        planes: Whether codes may be written as bits, for layers that read them so.

    Returns:
        A part for each step, and what brings the input and float layers their numbers.
    """
    made: list[Part] = []
    values = program.values
    image = values[program.input].shape
    if any(program.input in read_by(step) and not isinstance(step, Quantize) for step in program.steps):
        interleave = steps.Interleave(image, builder.Output("float"), threads=target.cpu.threads)
        made.append(Part("input", interleave, {"input": INPUT, "output0": program.input}, {}))
    writer = _Writer(values, target)
    for step in program.steps:
        if isinstance(step, Quantize):
            made.append(_quantize(step, values, image, target.cpu.threads))
        elif isinstance(step, Convolution) and step.is_low_bit:
            made.append(writer.convolution(step, chosen[_layer(step)]))
        elif isinstance(step, Convolution | FloatConvolution):
            made += writer.float_convolution(step)
        else:
            made.append(writer.between_layers(step))
    _frame(made, program, planes)
    return made


def _frame(made: list[Part], program: Program, planes: bool) -> None:
    """Let maps be written into the padding of the layer that reads them, where it is the only one that does.

    Args:
        made: The parts, which are changed.
        program: Their program.
        planes: Whether codes may be written as bits, for layers that read them so.
    """
    readers: dict[str, list[int]] = {}
    for index, part in enumerate(made):
        for name, value in part.values.items():
            if not name.startswith("output"):
                readers.setdefault(value, []).append(index)
    for index, part in enumerate(made):
        epilogue = getattr(part.code, "epilogue", None)
        if epilogue is None:
            continue
        outputs = list(epilogue.outputs)
        for place in range(len(outputs)):
            value = part.values[f"output{place}"]
            if value == program.output or len(readers.get(value, ())) != 1:
                continue
            (reader,) = readers[value]
            reading = made[reader].code
            if not isinstance(reading, Kernel) or made[reader].values["input"] != value:
                continue
            if _map(program.values, value) != (*reading.conv.input_size, reading.conv.in_channels):
                continue
            frame = reading.frame()
            bits = reading.planes()
            if bits is not None and not (planes and getattr(part.code, "whole_blocks", True)):
                continue
            if frame is not None:
                outputs[place] = replace(outputs[place], frame=frame, planes=bits)
                made[reader] = replace(made[reader], code=replace(reading, framed=True))
        # Not the part as it was above: it may be framed itself by now.
        code: Any = made[index].code
        made[index] = replace(made[index], code=replace(code, epilogue=replace(epilogue, outputs=tuple(outputs))))


def _map(values: Mapping[str, Value], name: str) -> tuple[int, ...] | None:
    """Return the sizes of a value; None for what isn't one of the program's, such as codes as real numbers."""
    if name not in values:
        return None
    return values[name].shape


def _quantize(step: Quantize, values: Mapping[str, Value], image: tuple[int, int, int], threads: int) -> Part:
    codes = values[step.output].representation
    assert isinstance(codes, Codes)
    code = steps.Interleave(image, _output(codes, 1.0), codes.scale, threads)
    return Part(step.name, code, {"input": INPUT, "output0": step.output}, {})


class _Writer:
    """Writes code for steps, given the program's values and the processor."""

    def __init__(self, values: Mapping[str, Value], target: CpuTarget) -> None:
        self.values = values
        self.cpu = target.cpu

    def convolution(self, step: Convolution, chosen: Kernel) -> Part:
        epilogue, names, constants = self._epilogue(step.epilogue)
        codes = self.values[step.input].representation
        assert isinstance(codes, Codes)
        kernel = replace(chosen, epilogue=epilogue, zero=codes.zero_point)
        constants |= kernel.constants(step.weights, step.epilogue.multiplier, step.epilogue.offset)
        return Part(step.name, kernel, {**names, "input": step.input}, constants, step.weights.astype(np.int64))

    def float_convolution(self, step: Convolution | FloatConvolution) -> list[Part]:
        """Write code for a layer in float32: of a float operand, or of one of 16 bits.

        There are no kernels for integers of 16 bits, whose sums take 64. In float32 they are summed as exactly as PyTorch does
        it.
        """
        epilogue, names, constants = self._epilogue(step.epilogue)
        names["input"] = step.input
        made = []
        if isinstance(self.values[step.input].representation, Codes):
            made.append(self._real(step, self.values[step.input]))
            names["input"] = made[-1].values["output0"]
        kernel = kernels.float_kernel(step.conv, self.cpu, epilogue)
        constants |= kernel.constants(step.weights.astype(np.float32), step.epilogue.multiplier, step.epilogue.offset)
        return [*made, Part(step.name, kernel, names, constants, step.weights)]

    def _real(self, step: Convolution | FloatConvolution, source: Value) -> Part:
        """Turn codes into the float32 numbers that a layer takes: real values beside float weights, else the integers."""
        codes = source.representation
        assert isinstance(codes, Codes)
        epilogue = builder.Epilogue((builder.Output("float"),))
        code = steps.Elementwise(self._stored(step.input), epilogue, self.cpu.threads)
        channels = source.shape[2]
        scale = 1.0
        if isinstance(step, FloatConvolution):
            scale = codes.scale
        factors = np.full(channels, scale), np.zeros(channels)
        names = {"input": step.input, "output0": f"{step.name}:real"}
        return Part(f"{step.name}, its input", code, names, epilogue.constants(*factors))

    def between_layers(self, step: Sum | Pool | Product | Resize | Move | Lookup) -> Part:
        """Write code for a step without weights."""
        if isinstance(step, Sum):
            return self._sum(step)
        if isinstance(step, Pool):
            return self._pool(step)
        if isinstance(step, Product):
            return self._product(step)
        if isinstance(step, Resize):
            return self._resize(step)
        if isinstance(step, Move):
            return self._move(step)
        return self._lookup(step)

    def _sum(self, step: Sum) -> Part:
        source = self._stored(step.input)
        epilogue, names, constants = self._epilogue(step.epilogue)
        constants |= _factors(epilogue, source.shape, step.epilogue)
        code = steps.Elementwise(source, epilogue, self.cpu.threads)
        return Part(step.name, code, {**names, "input": step.input}, constants)

    def _pool(self, step: Pool) -> Part:
        source = self._stored(step.input)
        wanted = step.epilogue.outputs
        epilogue, names, constants = self._epilogue(step.epilogue)
        of_epilogue: builder.Epilogue | None = epilogue
        constants |= _factors(epilogue, source.shape, step.epilogue)
        codes = self.values[step.input].representation
        if (
            step.kind == "max"
            and isinstance(codes, Codes)
            and [self.values[o.value].representation for o in wanted] == [codes]
        ):
            # The largest of codes is a code.
            of_epilogue = None
            constants = {}
        window = step.window or Window((1, 1))
        if step.ranges is not None:
            constants |= {"rows": step.ranges.rows, "columns": step.ranges.columns}
        if step.factors is not None:
            constants["factors"] = step.factors
        code = steps.Pool(
            {"max": "max", "avg": "sum"}[step.kind],
            source,
            step.output_size,
            window.kernel,
            window.stride,
            window.padding,
            window.dilation,
            of_epilogue,
            step.ranges is not None,
            step.factors is not None,
            self.cpu.threads,
        )
        return Part(step.name, code, {**names, "input": step.input}, constants)

    def _product(self, step: Product) -> Part:
        first, second = self._stored(step.input), self._stored(step.other)
        epilogue, names, constants = self._epilogue(step.epilogue)
        code = steps.Product(first, second, epilogue, self.cpu.threads)
        constants |= _factors(epilogue, first.shape, step.epilogue)
        return Part(step.name, code, {**names, "input0": step.input, "input1": step.other}, constants)

    def _resize(self, step: Resize) -> Part:
        source = self._stored(step.input)
        epilogue, names, constants = self._epilogue(step.epilogue)
        constants |= _factors(epilogue, source.shape, step.epilogue)
        for name, taps in (("row", step.rows), ("column", step.columns)):
            constants[f"{name}s"] = np.stack([taps.first, taps.second], 1).astype(np.int32)
            constants[f"{name}_weights"] = taps.weight.astype(np.float32)
        size = len(step.rows.first), len(step.columns.first)
        code = steps.Resize(source, size, epilogue, self.cpu.threads)
        return Part(step.name, code, {**names, "input": step.input}, constants)

    def _move(self, step: Move) -> Part:
        stored = self._stored(step.output)
        zero = stored.zero
        codes = self.values[step.output].representation
        if isinstance(codes, Codes) and codes.one_step == 2:
            zero += 1  # one signed bit has no zero; torch takes it for +1
        sizes = tuple(math.prod(self.values[name].shape) for name in step.inputs)
        code = move.Move(step.index, sizes, stored.shape[2], stored.dtype, zero, self.cpu.threads)
        names = {f"input{number}": name for number, name in enumerate(step.inputs)}
        return Part(step.name, code, {**names, "output0": step.output}, code.constants())

    def _lookup(self, step: Lookup) -> Part:
        dtypes = tuple(self.values[name].representation.dtype for name in step.outputs)
        code = steps.Lookup(math.prod(self.values[step.input].shape), dtypes, self.cpu.threads)
        names = {f"output{number}": name for number, name in enumerate(step.outputs)}
        entries = {f"entries{number}": array for number, array in enumerate(step.entries)}
        return Part(step.name, code, {**names, "input": step.input}, entries)

    def _stored(self, name: str) -> steps.Stored:
        value = self.values[name]
        return steps.Stored(value.shape, value.representation.dtype, _zero(value.representation))

    def _epilogue(self, epilogue: ProgramEpilogue) -> tuple[builder.Epilogue, dict[str, str], dict[str, NDArray[Any]]]:
        """Translate an epilogue for the kernels.

        Returns it, which of the program's values its buffers are, and its constants beside multiplier and offset.
        """
        outputs = tuple(_output(self.values[o.value].representation, o.factor) for o in epilogue.outputs)
        names = {f"output{index}": output.value for index, output in enumerate(epilogue.outputs)}
        residuals = []
        for index, residual in enumerate(epilogue.residuals):
            representation = self.values[residual.value].representation
            residuals.append(builder.Residual(representation.dtype, residual.factor, _zero(representation)))
            names[f"residual{index}"] = residual.value
        table = None
        constants: dict[str, NDArray[Any]] = {}
        if epilogue.slope is not None:
            channels = self.values[epilogue.outputs[0].value].shape[2]
            constants |= builder.per_channel("slope", np.broadcast_to(epilogue.slope, channels))
        if epilogue.table is not None:
            few = epilogue.table.segments <= builder.IN_REGISTERS and self.cpu.has("avx512f")
            table = builder.Table(epilogue.table.segments, epilogue.table.inverse, epilogue.table.start, few)
            constants |= table.constants(epilogue.table.coefficients)
        bounds = (epilogue.low, epilogue.high)
        made = builder.Epilogue(outputs, tuple(residuals), *bounds, epilogue.slope is not None, table)
        return made, names, constants


def _zero(representation: Representation) -> int:
    """Return the number that stands for real zero."""
    if isinstance(representation, Codes):
        return representation.zero
    return 0


def _factors(epilogue: builder.Epilogue, shape: tuple[int, int, int], factors: ProgramEpilogue) -> dict[str, NDArray[Any]]:
    channels = (shape[2],)
    return epilogue.constants(np.broadcast_to(factors.multiplier, channels), np.broadcast_to(factors.offset, channels))


def _output(representation: Representation, factor: float) -> builder.Output:
    if isinstance(representation, Fixed):
        return builder.Output("fixed", factor, -representation.limit, representation.limit)
    if isinstance(representation, Float):
        return builder.Output("float", factor)
    if representation.signed and representation.bits == 1:
        return builder.Output("sign", factor)
    return builder.Output("codes", factor, *representation.range, representation.zero)


class Memory:
    """Places in arenas, one for each type of number: a place is free again once what it held was read for the last time."""

    def __init__(self, reuse: bool = True) -> None:
        """Begin with empty arenas; without `reuse` no place is ever free again."""
        self.sizes: dict[str, int] = {}  # elements, by type
        self._reuse = reuse
        self._free: dict[str, list[tuple[int, int]]] = {}

    def take(self, elements: int, dtype: str) -> int:
        """Return the start of a place for so many elements: the smallest free one that is large enough, or a new one."""
        unit = ALIGNMENT // np.dtype(dtype).itemsize
        size = builder.up(elements, unit)
        free = self._free.setdefault(dtype, [])
        if fitting := [place for place in free if place[1] >= size]:
            start, length = min(fitting, key=lambda place: place[1])
            free.remove((start, length))
            if length > size:
                free.append((start + size, length - size))
            return start
        start = self.sizes.get(dtype, 0)
        self.sizes[dtype] = start + size
        return start

    def give(self, start: int, elements: int, dtype: str) -> None:
        """Free a place.

        Args:
            start: Where it begins.
            elements: For how many elements it was taken.
            dtype: Their type.
        """
        if not self._reuse:
            return
        size = builder.up(elements, ALIGNMENT // np.dtype(dtype).itemsize)
        free = sorted([*self._free.setdefault(dtype, []), (start, size)])
        joined: list[tuple[int, int]] = []
        for place in free:
            if joined and sum(joined[-1]) == place[0]:
                joined[-1] = joined[-1][0], joined[-1][1] + place[1]
            else:
                joined.append(place)
        self._free[dtype] = joined


Places = dict[str, tuple[str, int, tuple[int, ...], str]]  # buffer -> arena, start, shape, type


@dataclass(frozen=True)
class Plan:
    """Where everything is: for each part the places of its buffers, and the arenas.

    arenas       by name: type, elements
    constants    what the arenas of constants hold
    packed       what the file has of them
    stored       for each part how `packed` holds its weights (WEIGHTS), and those of its constants that don't come from them
    """

    places: list[Places]
    arenas: dict[str, tuple[str, int]]
    constants: dict[str, NDArray[Any]]
    packed: NDArray[np.uint8]
    stored: list[dict[str, packing.Stored]]


def plan(made: list[Part], program: Program, *, reuse: bool = True) -> Plan:
    """Give every buffer a place.

    Args:
        made: The code of all steps.
        program: Their program.
        reuse: False: all values are still there at the end, for whoever wants to look at them.

    Returns:
        The places.
    """
    memory, fixed = Memory(reuse), Memory(reuse=False)
    last_read = {name: index for index, part in enumerate(made) for name in part.values.values()}
    held: dict[str, tuple[int, tuple[int, ...], str]] = {}
    places: list[Places] = []
    contents: list[tuple[str, int, NDArray[Any]]] = []
    outside = {INPUT: INPUT, program.output: OUTPUT}
    for index, part in enumerate(made):
        here: Places = {}
        own: list[tuple[int, int, str]] = []
        for argument in {a.name: a for arguments in part.code.arguments().values() for a in arguments}.values():
            name, shape, dtype = argument
            value = part.values.get(name)
            if value in outside:
                here[name] = outside[value], 0, shape, dtype
            elif value is not None:
                if value not in held:
                    held[value] = memory.take(math.prod(shape), dtype), shape, dtype
                here[name] = f"work_{dtype}", held[value][0], shape, dtype
            elif name in part.constants:
                start = fixed.take(math.prod(shape), dtype)
                contents.append((dtype, start, part.constants[name]))
                here[name] = f"{CONSTANT}{dtype}", start, shape, dtype
            else:
                start = memory.take(math.prod(shape), dtype)
                own.append((start, math.prod(shape), dtype))
                here[name] = f"work_{dtype}", start, shape, dtype
        for place in own:
            memory.give(*place)
        for value in set(part.values.values()) & set(held):
            if last_read[value] == index:
                start, shape, dtype = held[value]
                memory.give(start, math.prod(shape), dtype)
        places.append(here)
    constants = {f"{CONSTANT}{dtype}": np.zeros(size, dtype) for dtype, size in fixed.sizes.items()}
    for dtype, start, array in contents:
        constants[f"{CONSTANT}{dtype}"][start : start + array.size] = array.reshape(-1)
    arenas = {f"work_{dtype}": (dtype, size) for dtype, size in memory.sizes.items()}
    arenas |= {name: (str(array.dtype), array.size) for name, array in constants.items()}
    return Plan(places, arenas, constants, *_pack(made))


def _pack(made: list[Part]) -> tuple[NDArray[np.uint8], list[dict[str, packing.Stored]]]:
    """Write what a network's code needs of numbers as a file holds them, and say where each is."""
    names: list[tuple[int, str]] = []
    arrays: list[NDArray[Any]] = []
    for index, part in enumerate(made):
        if part.made and part.weights is not None:
            names.append((index, WEIGHTS))
            arrays.append(part.weights)
        for name, array in part.constants.items():
            # Arenas are 0 where nothing is written.
            content = np.trim_zeros(array.reshape(-1), "b")
            if name not in part.made and content.size:
                names.append((index, name))
                arrays.append(content)
    packed, found = packing.pack(arrays)
    stored: list[dict[str, packing.Stored]] = [{} for _ in made]
    for (index, name), where in zip(names, found, strict=True):
        stored[index][name] = where
    return packed, stored


def compile_program(
    program: Program,
    target: CpuTarget,
    folder: Path,
    notes: Mapping[str, Any],
    *,
    reuse: bool = True,
    on_progress: OnProgress = lambda done, of, what: None,
) -> Deployed:
    """Choose kernels by measuring them, compile, and write the folder.

    Args:
        program: The program.
        target: The processor.
        folder: Where it is written.
        notes: What the description says besides.
        reuse: False keeps all values in places of their own, so that `Deployed.value` can show them.
        on_progress: Told what is done, of how much, and what it is.

    Returns:
        What was written, loaded.

    Raises:
        ValueError: For what TVM can't compile.
    """
    import tvm

    chosen = {layer: choice.kernel for layer, choice in target.fastest(layers(program)).items()}
    made = parts(program, chosen, target, planes=reuse)  # who looks at values wants to see codes
    planned = plan(made, program, reuse=reuse)
    shapes = {INPUT: _planar(program.values[program.input]), OUTPUT: program.values[program.output].shape}
    arguments = [builder.Argument(name, shape, "float32") for name, shape in shapes.items()]
    arguments += [builder.Argument(name, (size,), dtype) for name, (dtype, size) in planned.arenas.items()]
    arguments.append(builder.Argument(PACKED, planned.packed.shape, "uint8"))
    unpack = {}
    functions = {}
    for start in range(0, len(made), TOGETHER):
        of = slice(start, start + TOGETHER)
        symbol = f"unpack_{start}"
        unpack[symbol] = _function(symbol, arguments, made[of], planned.places[of], planned.stored[of], 1)
        symbol = f"steps_{start}"
        functions[symbol] = _function(symbol, arguments, made[of], planned.places[of], None, target.cpu.threads)
    on_progress(0, 1, "compiling the network")
    module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.cpu.target))
    # It runs once, in less time than it would take to be compiled well.
    plainly = tvm.target.Target({**target.cpu.target, "opt-level": 0})
    unpacking = tvm.compile(tvm.IRModule(unpack), target=plainly)
    folder.mkdir(parents=True, exist_ok=True)
    # The description is written last: until then the folder isn't taken for a network, nor for the one it held before.
    for name in (DESCRIPTION, LIBRARY, CONSTANTS):
        (folder / name).unlink(missing_ok=True)  # it may be a link to somewhere
    with tempfile.TemporaryDirectory() as place:
        # Not as a module that the other imports: then the library would hold both as data, too.
        unpacking.mod.write_to_file(f"{place}/unpack.o")
        module.export_library(str(folder / LIBRARY), addons=[f"{place}/unpack.o"])
    write_packed(folder / CONSTANTS, planned.packed)
    step_names = [{"name": part.name, "code": getattr(part.code, "name", type(part.code).__name__.lower())} for part in made]
    content = {
        **notes,
        "target": target.cpu.target,
        "threads": target.cpu.threads,
        "machine": target.key,
        "unpack": list(unpack),
        "calls": list(functions),
        "arguments": [[a.name, list(a.shape), a.dtype] for a in arguments],
        "input_dims": list(program.input_dims),
        "output_dims": list(program.output_dims),
        "steps": step_names,
        "values": {
            value: [*places[name][:2], list(program.values[value].shape)]
            for part, places in zip(made, planned.places, strict=True)
            for name, value in part.values.items()
            if value in program.values and name not in part.bits
        },
        "frames": _frames(made),
    }
    folders.write(folder, content)
    on_progress(1, 1, "")
    deployed = Deployed(folder)
    for name, expected in planned.constants.items():
        if deployed.arena(name).tobytes() != expected.tobytes():
            (folder / DESCRIPTION).unlink()
            raise ValueError(
                f"{folder} isn't a network: its constants {name!r} are unpacked as others; this is a mistake of haq's"
            )
    return deployed


def write_packed(file: Path | IO[bytes], packed: NDArray[np.uint8]) -> None:
    """Write the file of constants."""
    np.savez_compressed(file, **{PACKED: packed})  # type: ignore[arg-type]


def _frames(made: list[Part]) -> dict[str, list[int]]:
    """Say of every value that lies within padding how many rows of it are above and below, and columns left and right."""
    found = {}
    for part in made:
        epilogue = getattr(part.code, "epilogue", None)
        if epilogue is None:
            continue
        for index, output in enumerate(epilogue.outputs):
            if output.frame is not None and output.planes is None:
                frame = output.frame
                found[part.values[f"output{index}"]] = [frame.top, frame.bottom, frame.left, frame.right]
    return found


def _function(
    symbol: str,
    arguments: list[builder.Argument],
    made: list[Part],
    places: list[Places],
    stored: list[dict[str, packing.Stored]] | None,
    threads: int,
) -> Any:
    """Build a function of some parts.

    Args:
        symbol: Its name.
        arguments: What it takes.
        made: The parts.
        places: Those of each part's buffers.
        stored: How each part's constants are held, for the function that unpacks them; None for the one that computes.
        threads: How many compute it.

    Returns:
        TVM's function.
    """
    b = builder.Builder()

    def body(arenas: dict[str, Any]) -> None:
        stages: list[tuple[Code, str]] = []
        buffers: list[dict[str, Any]] = []
        for index, part in enumerate(made):
            views = {
                name: b.view(arenas[arena], at, shape, dtype) for name, (arena, at, shape, dtype) in places[index].items()
            }
            if stored is not None:
                _unpack(b, part, views, arenas[PACKED], stored[index])
                continue
            stages += [(part.code, stage) for stage in part.code.arguments()]
            buffers += [views for _ in part.code.arguments()]
        if stored is None:
            builder.write_stages(b, threads, stages, buffers)

    return b.function(symbol, arguments, body)


def _unpack(b: builder.Builder, part: Part, views: dict[str, Any], packed: Any, stored: Mapping[str, packing.Stored]) -> None:
    """Write the code that makes a part's constants.

    Args:
        b: Builds the function.
        part: The part.
        views: Its buffers, by name.
        packed: The buffer of what the file holds.
        stored: How that has them.
    """
    for name, where in stored.items():
        if name != WEIGHTS:
            assert isinstance(where, packing.Planes)
            with b.loop(where.count) as index:
                b.T.buffer_store(views[name], where.value(b, packed, index), [index])
            continue
        assert isinstance(part.code, Kernel)
        dtype = "int32"
        if part.code.is_float:
            dtype = "float32"

        def weight(index: Any, where: packing.Stored = where, dtype: str = dtype) -> Any:
            return where.value(b, packed, index).astype(dtype)

        part.code.unpack(b, {name: views[name] for name in part.made}, weight)


def _planar(value: Value) -> tuple[int, int, int]:
    height, width, channels = value.shape
    return channels, height, width


class Deployed:
    """A compiled network.

    Called with images (N, C, H, W) of float32, or with (N, C, L) if that is what the network takes, it returns outputs
    (N, classes), (N, C, H, W) or (N, C, L): as a torch tensor if it was given one, else as a NumPy array. Several threads may
    call it; their images are computed one after the other.

    Raises FileNotFoundError and ValueError for a folder that isn't one or is damaged, and for a machine that can't run its
    code. What it loads is a library, and thus code: load nothing that you wouldn't run.
    """

    def __init__(self, folder: str | Path) -> None:
        """Check a folder, and load what is in it."""
        self.folder = Path(folder)
        self.description = folders.read(self.folder)
        library = _load_library(self.folder, self.description)
        self._calls = [library[name] for name in self.description["calls"]]
        self._arrays = _load_arrays(self.folder, self.description)
        self._threads: int = self.description["threads"]
        for name in self.description["unpack"]:
            library[name](*self._arrays.values())
        self._shapes = {name: tuple(shape) for name, shape, _ in self.description["arguments"]}
        self._arguments = list(self._arrays.values())
        self._input = np.from_dlpack(self._arrays[INPUT]).reshape(self._shapes[INPUT])
        self._output = np.from_dlpack(self._arrays[OUTPUT]).reshape(self._shapes[OUTPUT])
        self._lock = threading.Lock()  # the arrays hold one image at a time

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an image: channels, height and width, or channels and length."""
        return self._dims("input_dims", self._shapes[INPUT])

    def _dims(self, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """Return torch's shape of what goes in or comes out, for one image and without the batch."""
        dims = self.description.get(name)
        if dims is None:  # a folder of an older version of haq
            return otherwise
        return tuple(dims[1:])

    def __call__(self, images: Any) -> Any:
        """Compute the outputs of images; ValueError unless they are finite, float32 and of the network's shape."""
        if not isinstance(images, torch.Tensor):
            return self._outputs(np.asarray(images))
        if images.dtype != torch.float32 or images.layout != torch.strided or images.is_meta:
            raise ValueError(f"the network takes dense float32 images, not {images.dtype} ({images.layout}, {images.device})")
        outputs = self._outputs(images.detach().cpu().resolve_neg().numpy())
        return torch.from_numpy(outputs).to(images.device)

    def _outputs(self, given: NDArray[Any]) -> NDArray[np.float32]:
        interpreter.check_images(given, self.input_shape, "the network takes float32 images")
        made = np.empty((len(given), *self._shapes[OUTPUT]), np.float32)
        for number, image in enumerate(given):
            with self._lock:
                self._input[...] = image.reshape(self._input.shape)
                self.run()
                made[number] = self._output
        # Inside, channels are last.
        made = made.transpose(0, 3, 1, 2)
        shape = made.shape[1:]
        if shape[1:] == (1, 1):
            shape = shape[:1]
        return np.ascontiguousarray(made.reshape(len(made), *self._dims("output_dims", shape)))

    def run(self) -> None:
        """Compute the output of the image that the input buffer holds: what is timed, by one thread and no other at work."""
        use_threads(self._threads)
        for call in self._calls:
            call(*self._arguments)

    def arena(self, name: str) -> NDArray[Any]:
        """Return an array that the code works on."""
        content: NDArray[Any] = self._arrays[name].numpy()
        return content

    def value(self, name: str) -> NDArray[Any]:
        """Return a value of the program as the last image left it, of a network that was compiled without reusing memory."""
        arena, start, shape = self.description["values"][name]
        if name not in self.description["frames"]:
            return self.arena(arena)[start : start + math.prod(shape)].reshape(shape)
        top, bottom, left, right = self.description["frames"][name]
        height, width, channels = shape
        framed = (top + height + bottom, left + width + right, channels)
        whole = self.arena(arena)[start : start + math.prod(framed)].reshape(framed)
        return whole[top : top + height, left : left + width]


def _load_library(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Load the functions of a folder that was checked, from a copy.

    What becomes of the folder afterwards is nothing to a process that runs its network: a library that is written over in its
    place would end it, and one of the same path isn't loaded anew.
    """
    import tvm

    from hw_models.tvm_cpu.target import check_runs_here

    path = folder / LIBRARY
    check_runs_here(description["target"], json.dumps(description["target"]))
    try:
        with tempfile.TemporaryDirectory() as place:
            copy = shutil.copy(path, place)
            library = tvm.runtime.load_module(copy)
        return {name: library[name] for name in (*description["unpack"], *description["calls"])}
    except Exception as error:
        # Errors of TVM, of the system's loader, and of a folder for copies that no code may run from.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path} can't be loaded, from a copy in {tempfile.gettempdir()}: {reason}") from error


def _load_arrays(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arrays of a folder that was checked: what is packed, and the arenas."""
    import tvm

    arguments = description["arguments"]
    arrays = {}
    for name, shape, dtype in arguments:
        content: NDArray[Any] = np.zeros(math.prod(shape), dtype)
        if name == PACKED:
            content = _load_packed(folder, description, content.size)
        arrays[name] = tvm.runtime.tensor(content)
    return arrays


def _load_packed(folder: Path, description: Mapping[str, Any], size: int) -> NDArray[np.uint8]:
    path = folder / CONSTANTS
    try:
        file = npz.read(path, {PACKED}, description["files"][CONSTANTS]["bytes"], size + npz.HEADER)
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    packed = file[PACKED]
    if packed.shape != (size,) or packed.dtype != np.uint8:
        raise ValueError(f"{path} has {PACKED!r} of another size or type than {DESCRIPTION} says")
    return packed


def compile_network(
    network: nn.Module,
    graph: Graph,
    images: Tensor,
    folder: Path,
    *,
    threads: int | None = None,
    target: str | None = None,
    cold: bool = False,
    notes: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda done, of, what: None,
    reuse: bool = True,
) -> Deployed:
    """Compile a quantized network, at its present bits, for this machine's processor.

    Args:
        network: The network.
        graph: Its operations.
        images: A batch (N, C, H, W), to find how large the sums of residual additions become.
        folder: Where it is written.
        threads: How many threads it computes with; None for one.
        target: JSON of a TVM target, or a processor's name; None for this machine's.
        cold: Whether kernels are measured with their data out of the caches.
        notes: What the description says besides bits and schemes.
        on_progress: Told what is done, of how much, and what it is.
        reuse: False keeps all values in places of their own, so that `Deployed.value` can show them.

    Returns:
        What was written, loaded.

    Raises:
        ValueError: Naming the layer and the reason, before anything is compiled, for what no kernel covers, and for a
            network whose integers would be others than in PyTorch by more than rounding.
    """
    from hw_models import load_target

    program = lower(graph, network, images)
    interpreter.check(network, program, images[:CHECKED])
    measured: Any = load_target("cpu", threads=threads, target=target, cold=cold, progress=on_progress)
    notes = {"policy": Q.get_policy(network).to_dict(), "schemes": Q.scheme_records(network), **(notes or {})}
    deployed = compile_program(program, measured, folder, notes, reuse=reuse, on_progress=on_progress)
    _check_compiled(deployed, program, images[:CHECKED].numpy())
    return deployed


def _check_compiled(deployed: Deployed, program: Program, images: NDArray[Any]) -> None:
    """Raise ValueError, and take the folder's description away, unless code computes what its program says, bit for bit."""
    if computed_in_float(program):
        return  # which add in an order of their own
    expected, _ = interpreter.run(program, images)
    unequal = int((deployed(images) != expected).sum())
    if unequal:
        (deployed.folder / DESCRIPTION).unlink()
        raise ValueError(
            f"{deployed.folder} isn't a network: {unequal:,} of {expected.size:,} outputs of the compiled code are other than "
            "the integer program's; this is a mistake of haq's or of the compiler's"
        )


class TvmExporter(Exporter):
    """A folder with one library for this machine's processor, integers from end to end."""

    name = "tvm"
    summary = SUMMARIES["tvm"]
    output = "deployed"
    options = ("threads", "target", "cold", "residuals")

    def check_path(self, path: Path) -> None:
        """Raise ValueError for a file, and for a folder with files of somebody else's."""
        check_own_folder(path, self.name, (), DESCRIPTION, folders.FORMATS)

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless quantized layers compute with integers times a scale."""
        check_integers(network)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what has no integer program; see `Exporter.check_operations`."""
        lower(graph, network, images)

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
        """Compile a network; see `Exporter.export`."""
        compile_network(network, graph, images, path, notes=notes, on_progress=on_progress, **options)

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Compare answers on all test images, integers layer by layer on some of them, and time it; see `Exporter.compare`."""
        deployed = Deployed(path)
        answers = compare_answers(network, deployed, samples)
        program = lower(graph, network, samples.calibration)
        comparison = interpreter.compare(network, program, samples.compared)
        if comparison.fault:
            self._refuse(network, program, samples.compared, path)
        reference, _ = interpreter.run(program, samples.compared.numpy())
        unequal = int((deployed(samples.compared.numpy()) != reference).sum())
        rows = answers.rows()
        processor = deployed.description["machine"]["processor"]
        latency_s = _latency_s(deployed)
        in_float = computed_in_float(program)
        if in_float:
            rows.append(("layers computed in float32", _some(in_float, len(program.layers))))
        of_own = f"{comparison.different:,}, {comparison.own:,} of them by a layer's own rounding"
        rows += [
            ("integers that enter layers", f"{comparison.values:,}, of {counted(len(samples.compared), 'images')}"),
            ("  other than in PyTorch", of_own),
            ("outputs other than the integer program's", f"{unequal:,} of {reference.size:,}"),
            ("constants in the file", _constants(deployed, policy_storage_bytes(network, samples.compared))),
            ("latency, measured", f"{1e6 * latency_s:.1f} us ({processor}, median of {TIMED})"),
        ]
        # Layers in float32 are added up in another order than the program's.
        exact = bool(in_float) or not unequal
        return Verdict(answers.all_same and exact, tuple(rows), latency_s, deployed.description["machine"])

    def _refuse(self, network: nn.Module, program: Program, images: Tensor, path: Path) -> None:
        try:
            interpreter.check(network, program, images)
        except ValueError:
            (path / DESCRIPTION).unlink()
            raise


def _some(names: list[str], total: int) -> str:
    """Say how many of all layers these are, and which, as far as a line holds them."""
    shown = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        shown += ", ..."
    return f"{len(names)} of {total}: {shown}"


def _constants(deployed: Deployed, storage: int) -> str:
    """Say how large the file of constants is, beside what a search counts for the policy."""
    size = deployed.description["files"][CONSTANTS]["bytes"]
    return f"{size:,} bytes, {size / storage:.2f} x the policy's storage of {storage:,}"


def _latency_s(deployed: Deployed) -> float:
    """Time calls; the median."""
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        deployed.run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
