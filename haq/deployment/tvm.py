"""A program of integers as machine code: one library whose functions go over one arena of memory for each type of number.

What is written is a folder of three files:

    network.so        the code; `calls` in order, each with the input, the output and all arenas
    network.json      the sizes of the arenas, the calls, what the network is and what it was compiled for
    constants.npz     the arenas of constants: weights and factors

`Deployed` runs it. The code of a network reads and writes nothing but these arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from haq.deployment.lowering import (
    Codes,
    Convolution,
    Fixed,
    Float,
    FloatConvolution,
    Pool,
    Program,
    Quantize,
    Representation,
    Value,
)
from haq.deployment.lowering import Epilogue as ProgramEpilogue
from hw_models.tvm_cpu import builder, kernels, steps
from hw_models.tvm_cpu.builder import Code
from hw_models.tvm_cpu.conv import Conv, zero_point

if TYPE_CHECKING:
    from hw_models.tvm_cpu.kernel import Kernel
    from hw_models.tvm_cpu.target import CpuTarget

FORMAT = "haq-deployed-1"
LIBRARY, DESCRIPTION, CONSTANTS = "network.so", "network.json", "constants.npz"
ALIGNMENT = 64  # bytes, of everything that kernels look at
TOGETHER = 8  # steps in a function: one of all of them takes long to compile
INPUT, OUTPUT = "input", "output"

Layer = tuple[Conv, int, int, bool]


@dataclass(frozen=True)
class Part:
    """Code for a step, with the names of the program's values that its buffers are, and its constants."""

    name: str
    code: Code
    values: Mapping[str, str]
    constants: Mapping[str, NDArray[Any]]


def layers(program: Program) -> list[Layer]:
    """The integer convolutions for which there are kernels to choose from: sizes, bits, and whether inputs are signed."""
    return [_layer(step) for step in program.steps if isinstance(step, Convolution)]


def _layer(step: Convolution) -> Layer:
    return step.conv, step.w_bits, step.a_bits, step.signed


def parts(program: Program, chosen: Mapping[Layer, Kernel], target: CpuTarget) -> list[Part]:
    """Code for every step of a program, the convolutions by the kernels that were `chosen` for them."""
    made: list[Part] = []
    code: Code
    image = program.values[program.input].shape
    if any(step.input == program.input and not isinstance(step, Quantize) for step in program.steps):
        interleave = steps.Interleave(image, builder.Output("float"))
        made.append(Part("input", interleave, {"input": INPUT, "output0": program.input}, {}))
    for step in program.steps:
        values = program.values
        if isinstance(step, Quantize):
            codes = values[step.output].representation
            code = steps.Interleave(image, _output(codes, 1.0), _scale(codes))
            made.append(Part(step.name, code, {"input": INPUT, "output0": step.output}, {}))
            continue
        epilogue, names = _epilogue(step.epilogue, values)
        names["input"] = step.input
        factors = step.epilogue.multiplier, step.epilogue.offset
        if isinstance(step, Convolution):
            kernel = replace(chosen[_layer(step)], epilogue=epilogue)
            made.append(Part(step.name, kernel, names, kernel.constants(step.weights, *factors)))
        elif isinstance(step, FloatConvolution):
            source = values[step.input]
            if isinstance(source.representation, Codes):
                made.append(_real(step, source))
                names["input"] = made[-1].values["output0"]
            kernel = kernels.float_kernel(step.conv, target.cpu, epilogue)
            made.append(Part(step.name, kernel, names, kernel.constants(step.weights, *factors)))
        elif isinstance(step, Pool):
            source = values[step.input]
            of_codes = isinstance(source.representation, Codes)
            window = step.window
            sizes = (window.kernel, window.stride, window.padding, window.dilation)
            kind = "max" if step.kind == "max" else "sum"
            code = steps.Pool(kind, source.shape, step.output_size, *sizes, None if of_codes else epilogue)
            made.append(Part(step.name, code, names, {} if of_codes else _factors(epilogue, source.shape, factors)))
        else:
            source = values[step.input]
            code = steps.Elementwise(source.shape, _dtype(source.representation), epilogue)
            made.append(Part(step.name, code, names, _factors(epilogue, source.shape, factors)))
    return made


def _real(step: FloatConvolution, source: Value) -> Part:
    """Codes as the real values that a layer of float weights takes."""
    codes = source.representation
    assert isinstance(codes, Codes)
    epilogue = builder.Epilogue((builder.Output("float"),))
    code = steps.Elementwise(source.shape, "uint8", epilogue, zero_point(codes.bits, codes.signed))
    channels = source.shape[2]
    factors = np.full(channels, codes.scale), np.zeros(channels)
    names = {"input": step.input, "output0": f"{step.name}:real"}
    return Part(f"{step.name}, its input", code, names, epilogue.constants(*factors))


def _factors(
    epilogue: builder.Epilogue, shape: tuple[int, int, int], factors: tuple[NDArray[Any], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    multiplier, offset = (np.broadcast_to(values, (shape[2],)) for values in factors)
    return epilogue.constants(multiplier, offset)


def _epilogue(epilogue: ProgramEpilogue, values: Mapping[str, Value]) -> tuple[builder.Epilogue, dict[str, str]]:
    """For the kernels, and which of a program's values its buffers are."""
    outputs = tuple(_output(values[o.value].representation, o.factor) for o in epilogue.outputs)
    residuals = tuple(builder.Residual("int32", residual.factor) for residual in epilogue.residuals)
    names = {f"output{index}": output.value for index, output in enumerate(epilogue.outputs)}
    names |= {f"residual{index}": residual.value for index, residual in enumerate(epilogue.residuals)}
    return builder.Epilogue(outputs, residuals, epilogue.low, epilogue.high), names


def _output(representation: Representation, factor: float) -> builder.Output:
    if isinstance(representation, Fixed):
        return builder.Output("fixed", factor, -representation.limit, representation.limit)
    if isinstance(representation, Float):
        return builder.Output("float", factor)
    if representation.signed and representation.bits == 1:
        return builder.Output("sign", factor)
    return builder.Output("codes", factor, *representation.range, zero_point(representation.bits, representation.signed))


def _scale(representation: Representation) -> float:
    assert isinstance(representation, Codes)
    return representation.scale


def _dtype(representation: Representation) -> str:
    return "uint8" if isinstance(representation, Codes) else "int32" if isinstance(representation, Fixed) else "float32"


class Memory:
    """Places in arenas, one for each type of number: a place is free again once what it held was read for the last time."""

    def __init__(self, reuse: bool = True) -> None:
        self.sizes: dict[str, int] = {}  # elements, by type
        self._reuse = reuse
        self._free: dict[str, list[tuple[int, int]]] = {}

    def take(self, elements: int, dtype: str) -> int:
        """The start of a place for so many elements: the smallest free one that is large enough, or a new one."""
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
    """Where everything is: for each part the places of its buffers, and the arenas."""

    places: list[Places]
    arenas: dict[str, tuple[str, int]]  # name -> type, elements
    constants: dict[str, NDArray[Any]]


def plan(made: list[Part], program: Program, *, reuse: bool = True) -> Plan:
    """Give every buffer a place. Without `reuse` all values are still there at the end, for whoever wants to look at them."""
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
                here[name] = f"const_{dtype}", start, shape, dtype
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
    constants = {f"const_{dtype}": np.zeros(size, dtype) for dtype, size in fixed.sizes.items()}
    for dtype, start, array in contents:
        constants[f"const_{dtype}"][start : start + array.size] = array.reshape(-1)
    arenas = {f"work_{dtype}": (dtype, size) for dtype, size in memory.sizes.items()}
    arenas |= {name: (str(array.dtype), array.size) for name, array in constants.items()}
    return Plan(places, arenas, constants)


def compile_program(
    program: Program,
    target: CpuTarget,
    folder: Path,
    notes: Mapping[str, Any],
    *,
    reuse: bool = True,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> Deployed:
    """Choose kernels by measuring them, compile, and write the folder. Raises ValueError for what TVM can't compile."""
    import tvm

    chosen = {layer: choice.kernel for layer, choice in target.fastest(layers(program)).items()}
    made = parts(program, chosen, target)
    planned = plan(made, program, reuse=reuse)
    shapes = {INPUT: _planar(program.values[program.input]), OUTPUT: program.values[program.output].shape}
    arguments = [builder.Argument(name, shape, "float32") for name, shape in shapes.items()]
    arguments += [builder.Argument(name, (size,), dtype) for name, (dtype, size) in planned.arenas.items()]
    functions = {}
    for start in range(0, len(made), TOGETHER):
        b = builder.Builder()
        some = list(zip(made, planned.places, strict=True))[start : start + TOGETHER]

        def body(arenas: dict[str, Any], b: builder.Builder = b, some: list[tuple[Part, Places]] = some) -> None:
            for part, places in some:
                views = {name: b.view(arenas[arena], at, shape, dtype) for name, (arena, at, shape, dtype) in places.items()}
                for stage in part.code.arguments():
                    part.code.emit(b, stage, views)

        symbol = f"steps_{start}"
        functions[symbol] = b.function(symbol, arguments, body)
    progress(0, 1, "compiling the network")
    module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.cpu.target))
    folder.mkdir(parents=True, exist_ok=True)
    # Written last: until then the folder isn't taken for a network, nor for the one it held before.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    module.export_library(str(folder / LIBRARY))
    np.savez(folder / CONSTANTS, **planned.constants)  # type: ignore[arg-type]
    content = {
        "format": FORMAT,
        **notes,
        "target": target.cpu.target,
        "threads": target.cpu.threads,
        "machine": target.key,
        "calls": list(functions),
        "arguments": [[a.name, list(a.shape), a.dtype] for a in arguments],
        "steps": [{"name": part.name, "code": getattr(part.code, "name", type(part.code).__name__.lower())} for part in made],
        "values": {
            value: [*places[name][:2], list(program.values[value].shape)]
            for part, places in zip(made, planned.places, strict=True)
            for name, value in part.values.items()
            if value in program.values
        },
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    progress(1, 1, "")
    return Deployed(folder)


def _planar(value: Value) -> tuple[int, int, int]:
    height, width, channels = value.shape
    return channels, height, width


class Deployed:
    """A compiled network. Called with images (N, C, H, W) of float32, it returns outputs (N, classes), or (N, C, H, W): as a
    torch tensor if it was given one, else as a NumPy array.

    Raises FileNotFoundError and ValueError for a folder that isn't one, and for a machine that can't run its code. What it
    loads is a library, and thus code: load nothing that you wouldn't run.
    """

    def __init__(self, folder: str | Path) -> None:
        import tvm

        from hw_models.tvm_cpu.target import check_runs_here

        self.folder = Path(folder)
        path = self.folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {DESCRIPTION}: python -m haq.deploy RUN --to tvm writes such a folder"
            )
        try:
            self.description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if self.description.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {self.description.get('format')!r}, not {FORMAT!r}: deploy the run again")
        check_runs_here(self.description["target"], json.dumps(self.description["target"]))
        tvm.get_global_func("runtime.config_threadpool")(1, self.description["threads"])
        library = tvm.runtime.load_module(str(self.folder / LIBRARY))
        self._calls = [library[name] for name in self.description["calls"]]
        with np.load(self.folder / CONSTANTS, allow_pickle=False) as constants:
            self._arrays = {
                name: tvm.runtime.tensor(constants[name] if name in constants else np.zeros(math.prod(shape), dtype))
                for name, shape, dtype in self.description["arguments"]
            }
        self._shapes = {name: tuple(shape) for name, shape, _ in self.description["arguments"]}
        self._arguments = list(self._arrays.values())

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self._shapes[INPUT]
        return channels, height, width

    def __call__(self, images: Any) -> Any:
        given = images.detach().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
        if given.ndim != 4 or given.shape[1:] != self.input_shape or given.dtype != np.float32:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"the network takes float32 images (N, {shape}), not {given.dtype} of {given.shape}")
        found = []
        for image in given:
            self._arrays[INPUT].copyfrom(np.ascontiguousarray(image).reshape(-1))
            self.run()
            found.append(self._arrays[OUTPUT].numpy().copy())
        made = np.array(found, np.float32).reshape(-1, *self._shapes[OUTPUT])
        # Inside, channels are last.
        made = np.ascontiguousarray(made.transpose(0, 3, 1, 2))
        made = made[:, :, 0, 0] if made.shape[2:] == (1, 1) else made
        return torch.from_numpy(made) if isinstance(images, torch.Tensor) else made

    def run(self) -> None:
        """Compute the output of the image that the input buffer holds: what is timed."""
        for call in self._calls:
            call(*self._arguments)

    def value(self, name: str) -> NDArray[Any]:
        """A value of the program as the last image left it; only of a network that was compiled without reusing memory."""
        arena, start, shape = self.description["values"][name]
        values: NDArray[Any] = self._arrays[arena].numpy()[start : start + math.prod(shape)].reshape(shape)
        return values
