"""A program of integers without any float: what generated C computes, and a slow, exact reference of it.

`haq.deployment.program` ends every sum in float32. Here all is integers. A step makes a number acc of 32 bits for each output:

    Convolution, Sum, Pool   the sum, the number, the largest, as there
    Pool of factors          acc = round(sum factors[y, x])
    Product                  acc = round(a b / 2^right)
    Resize                   x 2^left in place of x;   between two numbers: a + round((b - a) weight / 2^30)

    v = acc multiplier[c] 2^left[c] + offset[c] 2^offset_left;   v += i factor 2^left for each residual
    v = round(v slope[c]) where v < 0, if there is a slope;   v = table(v), if there is a table
    and each output is round(v / 2^shift) or round(v factor / 2^its shift), clipped

All factors are int32, v has 64 bits and one unit per step: 2^-shift of the first output's step, or of 1 where there is a
table. Rounding is to the nearest integer, ties to even, but within a table. The unit is as fine as the largest possible v
allows: v stays below 2^62, by bounds that weights and limits give, so that nothing overflows whatever the image. Clipping
commutes with rounding, and is done afterwards.

Codes and Fixed are what they are in the program, moves and lookups do what they do there. Float is left at the two ends: an
image becomes integers by `image_integers`, and what is Float in the program, the network's output, is int32 here, whose step
is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from haq.deployment import interpreter
from haq.deployment.interpreter import Comparison, LayerDifference
from haq.deployment.nodes import Taps, Window, max_pool, sum_pool, sum_ranges
from haq.deployment.program import (
    BYTE_BITS,
    Array,
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    Float,
    FloatConvolution,
    Lookup,
    Move,
    Output,
    Pool,
    Product,
    Program,
    Quantize,
    Representation,
    Resize,
    Step,
    Sum,
    Table,
    Value,
)
from hw_models.tvm_cpu.conv import Conv

Integers = NDArray[np.int64]

LARGEST = 2**31 - 1  # of int32
ROOM = 62  # v stays below 2^ROOM
MOST_SHIFT = 60
FEWEST_SHIFT, LAST_SHIFT = 32, 93  # of products of 62 and 31 bits
FLOAT_DIGITS = 24  # binary ones, of float32
IMAGE_LIMIT = 2**30
WEIGHT_DIGITS = 30  # of interpolation
PLACE_DIGITS = 30  # of the place within a segment of a table
FEWEST_GUARD, MOST_GUARD = 8, 28  # digits by which what a table gives is finer than its coefficients
# An image's channel may be so much flatter than the steepest before it is clipped earlier.
FLATTEST = 2.0**-10
SAME_TABLE = 2.0**-22  # how close the coefficients of two tables are that are one function's, rounded to float32 twice
OUTPUT_SHARE = 1e-3  # of the largest output: what may be between outputs of the same integers, in float32 and without it


@dataclass(frozen=True)
class Factor:
    """The number mantissa / 2^shift; `mantissa` has 31 binary digits, but for zero."""

    mantissa: int
    shift: int

    @staticmethod
    def of(number: float) -> Factor:
        """Return the nearest factor to a number."""
        fraction, exponent = math.frexp(number)
        mantissa = round(fraction * 2**31)
        if abs(mantissa) == 2**31:
            mantissa //= 2
            exponent += 1
        return Factor(mantissa, 31 - exponent)


@dataclass(frozen=True, eq=False)
class Factors:
    """Numbers with one exponent: times x each is round(x 2^left mantissa / 2^shift)."""

    mantissas: NDArray[np.int32]
    left: int
    shift: int

    @staticmethod
    def of(numbers: NDArray[Any], left: int = 0) -> Factors:
        """Return the factors nearest to numbers, whose products come 2^left times as large; `left` may become larger."""
        _, exponent = math.frexp(float(np.abs(numbers).max()))
        mantissas = np.rint(numbers.astype(np.float64) * 2.0 ** (31 - exponent)).clip(-LARGEST, LARGEST).astype(np.int32)
        shift = 31 - exponent
        return Factors(mantissas, left + max(0, FEWEST_SHIFT - shift), max(shift, FEWEST_SHIFT))

    def times(self, x: Integers) -> Integers:
        """Multiply, and round."""
        return scaled(x << self.left, self.mantissas.astype(np.int64), self.shift)


@dataclass(frozen=True, eq=False)
class FixedTable:
    """A `program.Table` in integers; its coefficients are int32, 2^(shift - guard) of them being 1.

    A segment of its domain is 2^fraction of v. With i = clip((v >> fraction) + start, 0, segments - 1), r, the place in
    segment i, is v - ((i - start) << fraction), and the table gives

        in the first and last segment    c0 2^guard + round(r c1 / 2^(fraction - guard))
        in all others                    c0 2^guard + ((c1 + (c2 p >> 30)) p >> (30 - guard)),  p = r >> (fraction - 30)
    """

    start: int
    fraction: int
    guard: int
    shift: int
    coefficients: NDArray[np.int32]


@dataclass(frozen=True)
class FixedOutput:
    """`value` = round(v factor), clipped to [low, high]; without a factor round(v / 2^shift) of the epilogue.

    Of signs, -1 and 1, it is the sign of v. Of a value that is much finer than v, v 2^left is taken in place of v, clipped
    before to 2^(61 - left), which is far beyond what the value holds.
    """

    value: str
    factor: Factor | None
    low: int
    high: int
    sign: bool = False
    left: int = 0


@dataclass(frozen=True)
class FixedResidual:
    """v += i factor 2^left, for the integers i of `value`."""

    value: str
    factor: int
    left: int


@dataclass(frozen=True, eq=False)
class FixedEpilogue:
    """What becomes of a sum; see the module. `multiplier`, `left` and `offset` are of (channels,) or (1,)."""

    multiplier: NDArray[np.int32]
    left: NDArray[np.uint8]
    offset: NDArray[np.int32]
    offset_left: int
    shift: int
    residuals: tuple[FixedResidual, ...]
    outputs: tuple[FixedOutput, ...]
    slope: Factors | None = None
    table: FixedTable | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """How acc of a step is made of 32 bits, where it isn't plain: `right` of a product, `left` of interpolation, `factors`."""

    right: int = 0
    left: int = 0
    factors: Factors | None = None


@dataclass(frozen=True)
class ImageValue:
    """The network's input as integers: `value` = clip(round(x factor)), or its sign."""

    value: str
    factor: Factor
    low: int
    high: int
    sign: bool = False


@dataclass(frozen=True, eq=False)
class FixedProgram:
    """A program without floats.

    steps       those of the program but for what quantizes the image; what read the image reads integers of it
    heads       how each of the steps begins, and
    epilogues   how it ends; None of moves and lookups
    values      Codes and Fixed
    image       the integers that an image becomes
    shape       (height, width, channels) of an image
    output      the value that is the network's output, Fixed
    input_dims, output_dims   torch's shapes for one image, as of the program
    """

    steps: tuple[Step, ...]
    heads: tuple[Head, ...]
    epilogues: tuple[FixedEpilogue | None, ...]
    values: Mapping[str, Value]
    image: tuple[ImageValue, ...]
    shape: tuple[int, int, int]
    output: str
    input_dims: tuple[int, ...]
    output_dims: tuple[int, ...]

    @property
    def output_scale(self) -> float:
        """The real value of 1 in the output."""
        return self.values[self.output].representation.unit


def fixed_point(program: Program) -> FixedProgram:
    """Turn the float32 of a program into integers.

    Args:
        program: The program.

    Returns:
        The program without floats.

    Raises:
        ValueError: Naming the layer, for one with an operand in float or of 16 bits, and for one whose sums are worth so much
            more than its results that they don't fit.
    """
    return _Conversion(program).convert()


def _check_layers(program: Program) -> None:
    for step in program.steps:
        if isinstance(step, FloatConvolution):
            raise ValueError(f"layer {step.layer!r} has no integer form: an operand of it is in float")
        if isinstance(step, Convolution) and not step.is_low_bit:
            bits = f"{step.w_bits}/{step.a_bits}"
            raise ValueError(f"layer {step.layer!r} has no integer form here: it is of {bits} bits, more than {BYTE_BITS}")
    for name, value in program.values.items():
        if isinstance(value.representation, Codes) and value.representation.bits > BYTE_BITS:
            bits = f"{value.representation.bits}"
            raise ValueError(f"value {name!r} has no integer form here: it is of {bits} bits, more than {BYTE_BITS}")


class _Conversion:
    def __init__(self, program: Program) -> None:
        _check_layers(program)
        self.program = program
        self.values = dict(program.values)
        del self.values[program.input]
        self.image: list[ImageValue] = []
        self.output_step = 1.0
        self.tables: list[tuple[Table, NDArray[np.float64], NDArray[np.int32], int]] = []

    def convert(self) -> FixedProgram:
        program = self.program
        steps: list[Step] = []
        for step in program.steps:
            if isinstance(step, Quantize):
                self._quantize_image(step)
            elif isinstance(step, Sum) and step.input == program.input:
                steps.append(self._of_image(step))
            else:
                steps.append(step)
        self._replace_floats(steps)
        steps = [self._without_floats(step) for step in steps]
        heads = tuple(self._head(step) for step in steps)
        epilogues = tuple(self._epilogue(step, head) for step, head in zip(steps, heads, strict=True))
        shape = program.values[program.input].shape
        ends = program.input_dims, program.output_dims
        return FixedProgram(tuple(steps), heads, epilogues, self.values, tuple(self.image), shape, program.output, *ends)

    # -------------------------------------------------------------------------------------------------------- the two ends

    def _quantize_image(self, step: Quantize) -> None:
        codes = self.values[step.output].representation
        assert isinstance(codes, Codes)
        self.image.append(ImageValue(step.output, Factor.of(1 / codes.scale), *codes.range, _is_sign(codes)))

    def _of_image(self, step: Sum) -> Step:
        """Give a step that reads the image its integers, as fine as 31 bits allow where the results don't clip it."""
        epilogue = step.epilogue
        slopes = np.abs(epilogue.multiplier).astype(np.float64)
        flattest = slopes[slopes >= slopes.max() * FLATTEST].min()
        reach = (self._wanted_reach(epilogue) + np.abs(epilogue.offset).max()) / (flattest or 1.0)
        unit = _power_of_two(reach / IMAGE_LIMIT)
        name = self._image_value(f"{step.name}:image", unit)
        scaled_up = replace(epilogue, multiplier=(epilogue.multiplier * np.float64(unit)).astype(np.float32))
        return replace(step, input=name, epilogue=scaled_up)

    def _image_value(self, name: str, unit: float) -> str:
        self.values[name] = Value(Fixed(unit, IMAGE_LIMIT), self.program.values[self.program.input].shape)
        self.image.append(ImageValue(name, Factor.of(1 / unit), -IMAGE_LIMIT, IMAGE_LIMIT))
        return name

    def _wanted_reach(self, epilogue: Epilogue) -> float:
        """Return how large v may become before all outputs clip it."""
        if epilogue.table is not None:
            # Beyond its domain it is straight, and what is there is clipped soon.
            return 8 * epilogue.table.start / epilogue.table.inverse
        limits = [_limit(self.values[output.value].representation) / output.factor for output in epilogue.outputs]
        return min(max(limits), max(abs(epilogue.low), abs(epilogue.high)))

    def _replace_floats(self, steps: list[Step]) -> None:
        """Make the network's output int32, of a step by which the largest possible number fits."""
        floats = [name for name, value in self.values.items() if isinstance(value.representation, Float)]
        reach = 0.0
        for step in steps:
            if isinstance(step, Move):
                continue
            if isinstance(step, Lookup):
                written = zip(step.outputs, step.entries, strict=True)
                reach = max([reach, *(float(np.abs(entries).max()) for name, entries in written if name in floats)])
            elif not isinstance(step, Quantize) and any(output.value in floats for output in step.epilogue.outputs):
                unit = self.values[step.epilogue.outputs[0].value].representation.unit
                bound = max(abs(step.epilogue.low), abs(step.epilogue.high))
                reach = max(reach, unit * min(self._result_reach(step), bound))
        self.output_step = _power_of_two((reach or 1.0) / (LARGEST >> 1))
        for name in floats:
            self.values[name] = replace(self.values[name], representation=Fixed(self.output_step, LARGEST))

    def _without_floats(self, step: Step) -> Step:
        """Let moves and lookups have integers in place of floats."""
        if isinstance(step, Move) and self.program.input in step.inputs:
            name = f"{step.name}:image"
            self._image_value(name, self.output_step)
            return replace(step, inputs=tuple({self.program.input: name}.get(given, given) for given in step.inputs))
        if isinstance(step, Lookup):
            return replace(step, entries=tuple(self._entries(*both) for both in zip(step.outputs, step.entries, strict=True)))
        return step

    def _entries(self, output: str, entries: Array) -> Array:
        if isinstance(self.program.values[output].representation, Float):
            return np.rint(entries.astype(np.float64) / self.output_step).astype(np.int32)
        return entries

    # ------------------------------------------------------------------------------------------------------------- bounds

    def _limit_of(self, name: str) -> int:
        return _limit(self.values[name].representation)

    def _numbers(self, step: Any) -> NDArray[np.float64]:
        """Bound acc as the program has it, by channel."""
        largest = float(self._limit_of(step.input))
        if isinstance(step, Convolution):
            return np.abs(step.weights.astype(np.float64)).sum((1, 2, 3)) * largest
        if isinstance(step, Pool) and step.kind == "avg":
            largest *= _most_in_window(step)
            if step.factors is not None:
                largest *= float(np.abs(step.factors).max())
        if isinstance(step, Product):
            largest *= self._limit_of(step.other)
        return np.full(1, largest)

    def _reach(self, step: Any) -> float:
        """Bound v in front of a slope or table, as the program has it."""
        epilogue = step.epilogue
        reach = self._numbers(step) * np.abs(epilogue.multiplier.astype(np.float64)) + np.abs(epilogue.offset)
        residuals = sum(self._limit_of(x.value) * abs(x.factor) for x in epilogue.residuals)
        return float(reach.max()) + residuals

    def _result_reach(self, step: Any) -> float:
        """Bound v behind it, in units of the first output of the program's step."""
        reach = self._reach(step)
        slope, table = step.epilogue.slope, step.epilogue.table
        if slope is not None:
            reach *= max(1.0, float(np.abs(slope).max()))
        if table is not None:
            reach = _table_reach(table, reach)
        return reach

    # ---------------------------------------------------------------------------------------------- how steps begin and end

    def _head(self, step: Step) -> Head:
        """Find how acc is made of 32 bits, of as many digits as fit."""
        if isinstance(step, Product):
            digits = _exponent(self._numbers(step).max()) + 1
            return Head(right=max(0, digits - 30))
        if isinstance(step, Resize):
            return Head(left=max(0, 29 - _exponent(float(self._limit_of(step.input)))))
        if isinstance(step, Pool) and step.factors is not None:
            sums = self._limit_of(step.input) * _most_in_window(step)
            if sums > LARGEST:
                raise ValueError(f"step {step.name!r} has no integer form: its sums may take more than 32 bits")
            finer = 29 - _exponent(float(self._numbers(step).max()))
            factors = Factors.of(step.factors)
            # Sums are made as large as 62 bits hold, so that no digit of a factor is lost.
            up = ROOM - 2 - _exponent(float(sums))
            return Head(left=finer, factors=Factors(factors.mantissas, up, factors.shift - factors.left + up - finer))
        if not isinstance(step, Move | Lookup) and self._numbers(step).max() > LARGEST:
            raise ValueError(f"step {step.name!r} has no integer form: its sums may take more than 32 bits")
        return Head()

    def _epilogue(self, step: Any, head: Head) -> FixedEpilogue | None:
        if isinstance(step, Move | Lookup):
            return None
        epilogue: Epilogue = step.epilogue
        first = epilogue.outputs[0]
        finer = self._finer(first)
        if epilogue.table is not None:
            finer = 1.0  # v is a real value
        # What acc is worth less than the program's, as it comes with more digits.
        multiplier = epilogue.multiplier.astype(np.float64) * finer * 2.0 ** (head.right - head.left)
        offset = epilogue.offset.astype(np.float64) * finer
        slope = None
        reach = self._reach(step) * finer
        if epilogue.slope is not None:
            slope = Factors.of(epilogue.slope)
            reach *= 2.0 ** max(slope.left, _exponent(float(np.abs(epilogue.slope).max()) or 1.0) + 1)
        if epilogue.table is not None:
            reach += epilogue.table.start / epilogue.table.inverse
        shift = min(MOST_SHIFT, _exponent((2.0**ROOM - 2.0**48) / (reach or 1.0)))
        if shift < 1:
            worth = float(np.abs(multiplier).max())
            raise ValueError(f"step {step.name!r} has no integer form: one in its sums is worth {worth:.3g} in its results")
        mantissas, lefts = zip(*(_in_units(number, shift) for number in multiplier.tolist()), strict=True)
        # Offsets have as many digits as the largest of them needs; one shift is enough for all.
        _, offset_left = _in_units(float(np.abs(offset).max()), shift)
        offsets = np.rint(offset * 2.0 ** (shift - offset_left)).clip(-LARGEST, LARGEST).astype(np.int32)
        residuals = [
            FixedResidual(residual.value, *_in_units(residual.factor * finer, shift)) for residual in epilogue.residuals
        ]
        table = None
        unit = 1 / finer  # of v, in units of the program's first output
        if epilogue.table is not None:
            table = self._table(step, epilogue.table, shift)
            shift = table.shift
            unit = 1 / self.program.values[first.value].representation.unit
        outputs = [self._output(epilogue, output, unit, shift) for output in epilogue.outputs]
        if table is None:
            outputs[0] = replace(outputs[0], factor=None)
        return FixedEpilogue(
            np.array(mantissas, np.int32),
            np.array(lefts, np.uint8),
            offsets,
            offset_left,
            shift,
            tuple(residuals),
            tuple(outputs),
            slope,
            table,
        )

    def _finer(self, output: Output) -> float:
        """Return how many steps an output has now to one that it had in the program."""
        if isinstance(self.program.values[output.value].representation, Float):
            return 1 / self.output_step
        return 1.0

    def _output(self, epilogue: Epilogue, output: Output, unit: float, shift: int) -> FixedOutput:
        representation = self.values[output.value].representation
        factor = Factor.of(output.factor * self._finer(output) * unit)
        factor = Factor(factor.mantissa, factor.shift + shift)
        left = max(0, FEWEST_SHIFT - factor.shift)
        if left:
            factor = Factor(factor.mantissa, FEWEST_SHIFT)
        if factor.shift > LAST_SHIFT:
            factor = Factor(factor.mantissa >> min(31, factor.shift - LAST_SHIFT), LAST_SHIFT)
        if isinstance(representation, Codes) and _is_sign(representation):
            return FixedOutput(output.value, factor, _sign(epilogue.low), _sign(epilogue.high), True)
        low, high = _range(representation)
        if self._finer(output) == 1:
            # Where the float program clips, rounded as it rounds there.
            below = np.rint(np.float32(epilogue.low) * np.float32(output.factor))
            above = np.rint(np.float32(epilogue.high) * np.float32(output.factor))
        else:
            below = np.rint(epilogue.low * output.factor * self._finer(output))
            above = np.rint(epilogue.high * output.factor * self._finer(output))
        return FixedOutput(output.value, factor, int(np.clip(below, low, high)), int(np.clip(above, low, high)), left=left)

    def _table(self, step: Any, table: Table, shift: int) -> FixedTable:
        """Turn a table into integers of real values; of one function in many layers there is one."""
        outputs = step.epilogue.outputs
        unit = self.program.values[outputs[0].value].representation.unit
        reach = _table_reach(table, self._reach(step)) * unit
        integers, digits = self._coefficients(table, table.coefficients.astype(np.float64) * unit)
        finest = max(output.factor * self._finer(output) / unit for output in outputs)
        fraction = shift - _exponent(table.inverse)
        most = min(MOST_GUARD, fraction - FEWEST_SHIFT, ROOM - 1 - _exponent(reach) - digits)
        guard = min(most, max(FEWEST_GUARD, FEWEST_SHIFT - Factor.of(finest).shift - digits))
        if guard < FEWEST_GUARD:
            raise ValueError(f"step {step.name!r} has no integer form: its function is of larger numbers than a table is for")
        return FixedTable(int(table.start), fraction, guard, digits + guard, integers)

    def _coefficients(self, table: Table, real: NDArray[np.float64]) -> tuple[NDArray[np.int32], int]:
        """Return coefficients as integers, and how many binary digits they have behind the point."""
        for known, coefficients, integers, digits in self.tables:
            alike = (known.start, known.inverse, known.segments) == (table.start, table.inverse, table.segments)
            if alike and np.allclose(coefficients, real, SAME_TABLE, 0):
                return integers, digits
        digits = 30 - _exponent(float(np.abs(real).max()) or 1.0)
        integers = np.rint(real * 2.0**digits).clip(-LARGEST, LARGEST).astype(np.int32)
        self.tables.append((table, real, integers, digits))
        return integers, digits


def _most_in_window(step: Pool) -> int:
    """Return how many numbers an average pooling adds up at most."""
    if step.ranges is not None:
        return int(np.diff(step.ranges.rows).max() * np.diff(step.ranges.columns).max())
    assert step.window is not None
    return math.prod(step.window.kernel)


def _table_reach(table: Table, reach: float) -> float:
    """Bound what a table gives of numbers up to `reach`."""
    places = reach * table.inverse + table.segments
    ends = np.abs(table.coefficients[[0, -1]].astype(np.float64))
    inner = np.abs(table.coefficients.astype(np.float64)).sum(1).max()
    return float(max(inner, (ends[:, 0] + ends[:, 1] * places).max()))


def _is_sign(codes: Codes) -> bool:
    return codes.bits == 1 and codes.signed


def _sign(number: float) -> int:
    if number >= 0:
        return 1
    return -1


def _range(representation: Representation) -> tuple[int, int]:
    """Return the smallest and the largest integer of a representation."""
    if isinstance(representation, Codes):
        return representation.range
    assert isinstance(representation, Fixed)
    return -representation.limit, representation.limit


def _limit(representation: Representation) -> int:
    if isinstance(representation, Float):
        return 2**FLOAT_DIGITS
    return max(map(abs, _range(representation)))


def _in_units(number: float, shift: int) -> tuple[int, int]:
    """Return an int32 m and a shift left with m 2^left the nearest to number 2^shift; no digits are lost but those below 1."""
    left = max(0, shift - Factor.of(number).shift)
    mantissa = round(number * 2.0 ** (shift - left))
    return max(-LARGEST, min(mantissa, LARGEST)), left


def _exponent(number: float) -> int:
    """Return the largest e with 2^e <= number."""
    return math.frexp(number)[1] - 1


def _power_of_two(number: float) -> float:
    """Return the smallest power of two that isn't below a number."""
    return 2.0 ** math.ceil(math.log2(number))


# ------------------------------------------------------------------------------------------------------- exact arithmetic


def round_shift(values: Integers, shift: int | Integers) -> Integers:
    """Divide by a power of two and round to the nearest integer, ties to even.

    Args:
        values: Integers below 2^62.
        shift: The exponents, from 1 to 62.

    Returns:
        Integers.
    """
    # Half but for one is added to even quotients, and half to odd ones: only then a tie goes up.
    odd = (values >> shift) & 1
    half = np.int64(1) << (np.asarray(shift, np.int64) - 1)
    rounded: Integers = (values + (half - 1) + odd) >> shift
    return rounded


def scaled(values: Integers, factor: Integers | int, shift: int) -> Integers:
    """Return values * factor / 2^shift, rounded once to the nearest integer, ties to even.

    The product has up to 93 bits: it is computed in two halves, as the C code does.

    Args:
        values: Integers below 2^62.
        factor: Integers of 32 bits.
        shift: From 32 to 93.

    Returns:
        Integers.
    """
    mask = np.int64(LARGEST)
    low = (values & mask) * factor
    top = (values >> 31) * factor + (low >> 31)
    rest = low & mask
    kept = top >> (shift - 31)
    lost = top - (kept << (shift - 31))
    half = np.int64(1) << (shift - 32)
    up = (lost > half) | ((lost == half) & ((rest > 0) | (kept & 1 == 1)))
    rounded: Integers = kept + up
    return rounded


def image_integers(images: NDArray[np.float32], value: ImageValue) -> Integers:
    """Turn float32 into integers by their digits: no product of floats rounds in between.

    Args:
        images: Finite numbers.
        value: By what, and to where.

    Returns:
        Integers of the same shape.
    """
    if value.sign:
        return np.where(images >= 0, 1, -1).astype(np.int64)
    fraction, exponent = np.frexp(images)
    digits = np.rint(fraction.astype(np.float64) * 2.0**FLOAT_DIGITS).astype(np.int64)
    shift = value.factor.shift + FLOAT_DIGITS - exponent.astype(np.int64)
    # 24 digits times 31: below 22 it is beyond 32 bits, above 60 it rounds to zero.
    whole = round_shift(digits * value.factor.mantissa, shift.clip(22, ROOM - 2))
    whole = np.where(shift < 22, np.sign(digits) * LARGEST, whole)
    return whole.clip(value.low, value.high)


# ------------------------------------------------------------------------------------------------------------ interpreter


def run_integers(
    fixed: FixedProgram, images: Array, given: Mapping[str, Array] | None = None
) -> tuple[Integers, dict[str, NDArray[np.int32]]]:
    """Compute what a program does with images, in integers alone.

    Args:
        fixed: The program.
        images: Images (N, C, H, W).
        given: Integers by the names of convolution steps, that layers compute with in place of those that reach them.

    Returns:
        The output's integers (N, height, width, channels), and the integers that enter each layer, (N, C, H, W), by name.

    Raises:
        ValueError: For images of another shape than the program's, not of float32, or with NaN or infinity in them.
    """
    interpreter.check_images(images, fixed.input_dims[1:])
    height, width, channels = fixed.shape
    last = np.ascontiguousarray(images.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
    held = {value.value: image_integers(last, value) for value in fixed.image}
    entered: dict[str, NDArray[np.int32]] = {}
    for step, head, epilogue in zip(fixed.steps, fixed.heads, fixed.epilogues, strict=True):
        if isinstance(step, Move):
            held[step.output] = _moved(step, held, fixed.values[step.output])
            continue
        if isinstance(step, Lookup):
            _look_up(step, held, fixed.values)
            continue
        assert epilogue is not None
        x = held[step.input]
        if isinstance(step, Convolution):
            entered[step.name] = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.int32)
            if given is not None and step.name in given:
                x = given[step.name].reshape(entered[step.name].shape).transpose(0, 2, 3, 1).astype(np.int64)
            sums = _convolve(step.conv, x, step.weights)
        elif isinstance(step, Pool):
            sums = _pool(step, head, x)
        elif isinstance(step, Product):
            sums = x * held[step.other]
            if head.right:
                sums = round_shift(sums, head.right)
        elif isinstance(step, Resize):
            sums = _between_rows(step, x << head.left)
        else:
            sums = x
        _finish(epilogue, sums, held)
    return held[fixed.output], entered


def run(
    fixed: FixedProgram, images: Array, given: Mapping[str, Array] | None = None
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int32]]]:
    """Compute what a program does with images; see `run_integers`.

    Args:
        fixed: The program.
        images: Images (N, C, H, W).
        given: As there.

    Returns:
        The outputs as real numbers, (N, classes) or (N, C, H, W), and the integers that enter each layer.
    """
    integers, entered = run_integers(fixed, images, given)
    real = (integers * fixed.output_scale).astype(np.float32).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(real).reshape(-1, *fixed.output_dims[1:]), entered


def _convolve(conv: Conv, x: Integers, weights: Array) -> Integers:
    window = Window(conv.kernel, conv.stride, conv.padding, conv.dilation)
    # float64 is exact: sums are below 2^31.
    image = _first(x.reshape(len(x), *conv.input_size, conv.in_channels))
    image = window.padded(image, conv.output_size, 0.0)
    made = F.conv2d(image, torch.from_numpy(weights).double(), None, conv.stride, 0, conv.dilation, conv.groups)
    return _last(made)


def _pool(step: Pool, head: Head, x: Integers) -> Integers:
    if step.kind == "max":
        return _last(max_pool(_first(x), step.window, step.output_size))
    if step.ranges is not None:
        sums = _last(sum_ranges(_first(x), step.ranges))
        assert head.factors is not None
        return replace(head.factors, mantissas=head.factors.mantissas[:, :, None]).times(sums)
    assert step.window is not None
    return _last(sum_pool(_first(x), step.window, step.output_size))


def _between_rows(step: Resize, x: Integers) -> Integers:
    """Interpolate bilinearly: along the rows' columns, then between the rows."""
    across = weights_of(step.columns)[:, None]
    left, right = step.columns.first, step.columns.second
    above, below = x[:, step.rows.first], x[:, step.rows.second]
    top = _between(above[:, :, left], above[:, :, right], across)
    bottom = _between(below[:, :, left], below[:, :, right], across)
    return _between(top, bottom, weights_of(step.rows)[:, None, None])


def _between(first: Integers, second: Integers, weights: Integers) -> Integers:
    return first + round_shift((second - first) * weights, WEIGHT_DIGITS)


def weights_of(taps: Taps) -> Integers:
    """Return the weights of interpolation as integers, 2^30 for 1."""
    weights: Integers = np.rint(taps.weight * 2.0**WEIGHT_DIGITS).astype(np.int64)
    return weights


def zero_of(representation: Representation) -> int:
    """Return the integer that real zero is."""
    if isinstance(representation, Codes) and _is_sign(representation):
        return 1
    return 0


def _moved(step: Move, held: Mapping[str, Integers], value: Value) -> Integers:
    count = len(held[step.inputs[0]])
    zero = np.full((count, 1), zero_of(value.representation), np.int64)
    flat = np.concatenate([*(held[name].reshape(count, -1) for name in step.inputs), zero], 1)
    return flat[:, step.index.reshape(-1)].reshape(count, *value.shape)


def _look_up(step: Lookup, held: dict[str, Integers], values: Mapping[str, Value]) -> None:
    codes = values[step.input].representation
    assert isinstance(codes, Codes)
    stored = held[step.input] + codes.zero
    for output, entries in zip(step.outputs, step.entries, strict=True):
        made = entries.astype(np.int64)[stored]
        representation = values[output].representation
        if isinstance(representation, Codes):
            made = made - representation.zero
        held[output] = made


def _first(x: Integers) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).double()


def _last(x: Tensor) -> Integers:
    return np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)).astype(np.int64)


def _finish(epilogue: FixedEpilogue, sums: Integers, held: dict[str, Integers]) -> None:
    v = sums * epilogue.multiplier << epilogue.left.astype(np.int64)
    v = v + (epilogue.offset.astype(np.int64) << epilogue.offset_left)
    for residual in epilogue.residuals:
        v = v + (held[residual.value] * residual.factor << residual.left)
    if epilogue.slope is not None:
        v = np.where(v < 0, epilogue.slope.times(v), v)
    if epilogue.table is not None:
        v = apply_table(epilogue.table, v)
    for output in epilogue.outputs:
        if output.sign:
            u = np.where(v >= 0, 1, -1)
        elif output.factor is None:
            u = round_shift(v, epilogue.shift)
        else:
            near = v
            if output.left:
                near = v.clip(-(2 ** (61 - output.left)), 2 ** (61 - output.left)) << output.left
            u = scaled(near, output.factor.mantissa, output.factor.shift)
        held[output.value] = u.clip(output.low, output.high).astype(np.int64)


def apply_table(table: FixedTable, v: Integers) -> Integers:
    """Compute a table's function as `FixedTable` says."""
    last = len(table.coefficients) - 1
    i = ((v >> table.fraction) + table.start).clip(0, last)
    r = v - ((i - table.start) << table.fraction)
    constant, linear, square = table.coefficients.astype(np.int64)[i].transpose(-1, *range(v.ndim))
    straight = scaled(r, linear, table.fraction - table.guard)
    # Beyond the outermost segments the parabola isn't taken.
    inside = (i > 0) & (i < last)
    place = np.where(inside, r, 0) >> (table.fraction - PLACE_DIGITS)
    bent = (linear + (square * place >> PLACE_DIGITS)) * place >> (PLACE_DIGITS - table.guard)
    return (constant << table.guard) + np.where(inside, bent, straight)


def compare(network: nn.Module, program: Program, fixed: FixedProgram, images: Tensor) -> Comparison:
    """Compare a program without floats with the fake-quantized network, and its roundings with the float program's.

    Args:
        network: The quantized network.
        program: Its program, which ends sums in float32.
        fixed: The same without floats.
        images: Images (N, C, H, W).

    Returns:
        As of `interpreter.compare`; own roundings are those that differ from the float program's where both get the same.

    Raises:
        ValueError: If there are no images.
    """
    plain = images.float().numpy()
    if not len(plain):
        raise ValueError("a program is compared on images, and there are none")
    expected, before = interpreter.fake_quantized(network, images)
    outputs, entered = run(fixed, plain)
    reference, of_program = interpreter.run(program, plain, before)
    alone, of_fixed = run(fixed, plain, before)
    layers = []
    for name, q in before.items():
        if name not in entered:
            continue
        gap = np.abs(entered[name].reshape(q.shape) - q)
        own = np.abs(of_fixed[name] - of_program[name])
        counts = (int((gap > 0).sum()), int(gap.max()), int((own > 0).sum()), int(own.max()))
        layers.append(LayerDifference(name, q.size, *counts))
    real = expected.numpy().reshape(outputs.shape)
    same = outputs.argmax(1) == real.argmax(1)
    fault = _fault(fixed, layers, interpreter.between_layers(network))
    apart = float(np.abs(alone - reference).max())
    if not fault and not apart <= OUTPUT_SHARE * float(np.abs(reference).max()):
        fault = f"gives outputs that are off by {apart:.3g} from the float program's"
    return Comparison(tuple(layers), float(same.mean()), float(np.abs(outputs - real).max()), fault)


def _fault(fixed: FixedProgram, layers: list[LayerDifference], between: float) -> str:
    """Say which layer gets integers that are off from the float program's by more than roundings make them."""
    inputs = {step.name: step.input for step in fixed.steps if isinstance(step, Convolution)}
    for layer in layers:
        codes = fixed.values[inputs[layer.layer]].representation
        assert isinstance(codes, Codes)
        if layer.own_largest > codes.one_step + between / codes.scale:
            return f"gives layer {layer.layer!r} integers that are off by up to {layer.own_largest} from the float program's"
    return ""
