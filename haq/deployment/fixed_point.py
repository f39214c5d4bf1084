"""A program of integers without any float: what generated C computes, and a slow, exact reference of it.

`haq.deployment.program` ends every sum in float32. Here the end of a sum is integers of 64 bits, all of one unit per step,
2^-shift of its first output's step:

    v = acc multiplier[c] 2^left[c] + offset[c] 2^offset_left;   v += i factor 2^left for each residual
    the first output is round(v / 2^shift), another one round(v factor / 2^its shift), and each is clipped

`multiplier`, `offset` and all factors are int32, `left` is from 0 to 62. Rounding is to the nearest integer, ties to even. The
unit is as fine as the largest possible v allows: v stays below 2^62, by bounds that weights and limits give, so that nothing
overflows whatever the image. Clipping commutes with rounding, and is done afterwards.

Codes and Fixed are what they are in the program. Float is left at its two ends: an image becomes integers by
`image_integers`, and what is Float in the program, the network's output, is int32 here, whose step is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from haq.deployment import interpreter
from haq.deployment.graph import Window, max_pool, sum_pool
from haq.deployment.interpreter import Comparison, LayerDifference
from haq.deployment.program import (
    BYTE_BITS,
    Array,
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    Float,
    FloatConvolution,
    Output,
    Pool,
    Program,
    Quantize,
    Representation,
    Step,
    Sum,
    Value,
)
from hw_models.tvm_cpu.conv import Conv

Integers = NDArray[np.int64]

LARGEST = 2**31 - 1  # of int32
ROOM = 62  # v stays below 2^ROOM
MOST_SHIFT = 60
FLOAT_DIGITS = 24  # binary ones, of float32
IMAGE_LIMIT = 2**30
# An image's channel may be so much flatter than the steepest before it is clipped earlier.
FLATTEST = 2.0**-10


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


@dataclass(frozen=True)
class FixedOutput:
    """`value` = round(v factor), clipped to [low, high]; without a factor it is the first output: round(v / 2^shift).

    Of signs, -1 and 1, it is the sign of v.
    """

    value: str
    factor: Factor | None
    low: int
    high: int
    sign: bool = False


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

    steps       those of the program but for what quantizes the image; `input` of what read the image names its integers
    epilogues   how each of the steps ends
    values      Codes and Fixed
    image       the integers that an image becomes
    shape       (height, width, channels) of an image
    output      the value that is the network's output, Fixed
    """

    steps: tuple[Step, ...]
    epilogues: tuple[FixedEpilogue, ...]
    values: Mapping[str, Value]
    image: tuple[ImageValue, ...]
    shape: tuple[int, int, int]
    output: str

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


class _Conversion:
    def __init__(self, program: Program) -> None:
        _check_layers(program)
        self.program = program
        self.values = dict(program.values)
        del self.values[program.input]
        self.image: list[ImageValue] = []
        self.output_step = 1.0

    def convert(self) -> FixedProgram:
        steps: list[Step] = []
        for step in self.program.steps:
            if isinstance(step, Quantize):
                self._quantize_image(step)
            elif step.input == self.program.input:
                steps.append(self._of_image(step))
            else:
                steps.append(step)
        self._replace_floats(steps)
        epilogues = tuple(self._epilogue(step) for step in steps)
        shape = self.program.values[self.program.input].shape
        return FixedProgram(tuple(steps), epilogues, self.values, tuple(self.image), shape, self.program.output)

    def _quantize_image(self, step: Quantize) -> None:
        codes = self.values[step.output].representation
        assert isinstance(codes, Codes)
        self.image.append(ImageValue(step.output, Factor.of(1 / codes.scale), *codes.range, _is_sign(codes)))

    def _of_image(self, step: Step) -> Step:
        """Give a step that reads the image its integers, as fine as 31 bits allow where the results don't clip it."""
        assert isinstance(step, Sum)
        epilogue = step.epilogue
        limits = [_limit(self.values[output.value].representation) / output.factor for output in epilogue.outputs]
        largest = min(max(limits), max(abs(epilogue.low), abs(epilogue.high)))
        slopes = np.abs(epilogue.multiplier).astype(np.float64)
        flattest = slopes[slopes >= slopes.max() * FLATTEST].min()
        reach = (largest + np.abs(epilogue.offset).max()) / (flattest or 1.0)
        unit = _power_of_two(reach / IMAGE_LIMIT)
        name = f"{step.name}:image"
        shape = self.program.values[self.program.input].shape
        self.values[name] = Value(Fixed(unit, IMAGE_LIMIT), shape)
        self.image.append(ImageValue(name, Factor.of(1 / unit), -IMAGE_LIMIT, IMAGE_LIMIT))
        scaled = replace(epilogue, multiplier=(epilogue.multiplier * np.float64(unit)).astype(np.float32))
        return replace(step, input=name, epilogue=scaled)

    def _replace_floats(self, steps: list[Step]) -> None:
        """Make the network's output int32, of a step by which the largest possible number fits."""
        floats = [name for name, value in self.values.items() if isinstance(value.representation, Float)]
        reach = 0.0
        for step in steps:
            outputs = step.epilogue.outputs
            if any(output.value in floats for output in outputs):
                unit = self.values[outputs[0].value].representation.unit
                reach = max(reach, unit * min(self._reach(step), _clip(step.epilogue)))
        self.output_step = _power_of_two((reach or 1.0) / (LARGEST >> 1))
        for name in floats:
            self.values[name] = replace(self.values[name], representation=Fixed(self.output_step, LARGEST))

    def _sums(self, step: Step) -> NDArray[np.float64]:
        """Bound a step's sums, by channel."""
        largest = _limit(self.values[step.input].representation)
        if isinstance(step, Convolution):
            return np.abs(step.weights.astype(np.float64)).sum((1, 2, 3)) * largest
        if isinstance(step, Pool) and step.kind == "avg":
            largest *= math.prod(step.window.kernel)
        return np.full(1, float(largest))

    def _reach(self, step: Step) -> float:
        """Bound v, in units of the first output of the program's step."""
        epilogue = step.epilogue
        reach = self._sums(step) * np.abs(epilogue.multiplier.astype(np.float64)) + np.abs(epilogue.offset)
        residuals = sum(_limit(self.values[x.value].representation) * abs(x.factor) for x in epilogue.residuals)
        return float(reach.max()) + residuals

    def _epilogue(self, step: Step) -> FixedEpilogue:
        epilogue = step.epilogue
        finer = self._finer(epilogue.outputs[0])
        multiplier = epilogue.multiplier.astype(np.float64) * finer
        offset = epilogue.offset.astype(np.float64) * finer
        if self._sums(step).max() > LARGEST:
            raise ValueError(f"step {step.name!r} has no integer form: its sums may take more than 32 bits")
        shift = min(MOST_SHIFT, _exponent((2.0**ROOM - 2.0**48) / (self._reach(step) * finer or 1.0)))
        if shift < 1:
            worth = float(np.abs(multiplier).max())
            raise ValueError(f"step {step.name!r} has no integer form: one in its sums is worth {worth:.3g} in its results")
        mantissas, lefts = zip(*(_in_units(number, shift) for number in multiplier.tolist()), strict=True)
        # Offsets have as many digits as the largest of them needs; one shift is enough for all.
        _, offset_left = _in_units(float(np.abs(offset).max()), shift)
        residuals = [
            FixedResidual(residual.value, *_in_units(residual.factor * finer, shift)) for residual in epilogue.residuals
        ]
        outputs = [self._output(epilogue, output, finer, shift) for output in epilogue.outputs]
        outputs[0] = replace(outputs[0], factor=None)
        return FixedEpilogue(
            np.array(mantissas, np.int32),
            np.array(lefts, np.uint8),
            np.rint(offset * 2.0 ** (shift - offset_left)).clip(-LARGEST, LARGEST).astype(np.int32),
            offset_left,
            shift,
            tuple(residuals),
            tuple(outputs),
        )

    def _finer(self, output: Output) -> float:
        """Return how many steps an output has now to one that it had in the program."""
        if isinstance(self.program.values[output.value].representation, Float):
            return 1 / self.output_step
        return 1.0

    def _output(self, epilogue: Epilogue, output: Output, finer: float, shift: int) -> FixedOutput:
        representation = self.values[output.value].representation
        factor = Factor.of(output.factor * self._finer(output) / finer)
        factor = Factor(factor.mantissa, factor.shift + shift)
        if factor.shift < 32:
            raise ValueError(f"value {output.value!r} has no integer form: it is much finer than what is computed with it")
        if isinstance(representation, Codes) and _is_sign(representation):
            return FixedOutput(output.value, factor, _sign(epilogue.low), _sign(epilogue.high), True)
        low, high = _range(representation)
        # Where the float program clips, rounded as it rounds there.
        below = np.rint(np.float32(epilogue.low) * np.float32(output.factor)) * self._finer(output)
        above = np.rint(np.float32(epilogue.high) * np.float32(output.factor)) * self._finer(output)
        if self._finer(output) != 1:
            below = np.rint(epilogue.low * output.factor * self._finer(output))
            above = np.rint(epilogue.high * output.factor * self._finer(output))
        return FixedOutput(output.value, factor, int(np.clip(below, low, high)), int(np.clip(above, low, high)))


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


def _clip(epilogue: Epilogue) -> float:
    return max(abs(epilogue.low), abs(epilogue.high))


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
    if shift - 31 > ROOM:
        return np.zeros_like(top)
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
    height, width, channels = fixed.shape
    interpreter.check_images(images, (channels, height, width))
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    held = {value.value: image_integers(last, value) for value in fixed.image}
    entered: dict[str, NDArray[np.int32]] = {}
    for step, epilogue in zip(fixed.steps, fixed.epilogues, strict=True):
        x = held[step.input]
        if isinstance(step, Convolution):
            entered[step.name] = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.int32)
            if given is not None and step.name in given:
                x = given[step.name].reshape(entered[step.name].shape).transpose(0, 2, 3, 1).astype(np.int64)
            sums = _convolve(step.conv, x, step.weights)
        elif isinstance(step, Pool):
            sums = _pool(step, x)
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
    if real.shape[2:] == (1, 1):
        real = real[:, :, 0, 0]
    return np.ascontiguousarray(real), entered


def _convolve(conv: Conv, x: Integers, weights: Array) -> Integers:
    window = Window(conv.kernel, conv.stride, conv.padding, conv.dilation)
    # float64 is exact: sums are below 2^31.
    image = _first(x.reshape(len(x), *conv.input_size, conv.in_channels))
    image = window.padded(image, conv.output_size, 0.0)
    made = F.conv2d(image, torch.from_numpy(weights).double(), None, conv.stride, 0, conv.dilation, conv.groups)
    return _last(made)


def _pool(step: Pool, x: Integers) -> Integers:
    if step.kind == "max":
        return _last(max_pool(_first(x), step.window, step.output_size))
    return _last(sum_pool(_first(x), step.window, step.output_size))


def _first(x: Integers) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).double()


def _last(x: Tensor) -> Integers:
    return np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)).astype(np.int64)


def _finish(epilogue: FixedEpilogue, sums: Integers, held: dict[str, Integers]) -> None:
    v = (sums * epilogue.multiplier << epilogue.left.astype(np.int64)) + (epilogue.offset.astype(np.int64) << epilogue.offset_left)
    for residual in epilogue.residuals:
        v = v + (held[residual.value] * residual.factor << residual.left)
    for output in epilogue.outputs:
        if output.sign:
            u = np.where(v >= 0, 1, -1)
        elif output.factor is None:
            u = round_shift(v, epilogue.shift)
        else:
            u = scaled(v, output.factor.mantissa, output.factor.shift)
        held[output.value] = u.clip(output.low, output.high).astype(np.int64)


def compare(network: nn.Module, program: Program, fixed: FixedProgram, images: Tensor) -> Comparison:
    """Compare a program without floats with the fake-quantized network, and its roundings with the float program's.

    Args:
        network: The quantized network.
        program: Its program, which ends sums in float32.
        fixed: The same without floats.
        images: Images (N, C, H, W).

    Returns:
        As of `interpreter.compare`; own roundings are those that differ from the float program's where both get the same.
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
    fault = _fault(fixed, layers)
    apart = float(np.abs(alone - reference).max())
    if not fault and not apart <= 1e-3 * float(np.abs(reference).max()):
        fault = f"gives outputs that are off by {apart:.3g} from the float program's"
    return Comparison(tuple(layers), float(same.mean()), float(np.abs(outputs - real).max()), fault)


def _fault(fixed: FixedProgram, layers: list[LayerDifference]) -> str:
    """Say which layer gets integers that are off by more than a rounding from the float program's."""
    inputs = {step.name: step.input for step in fixed.steps if isinstance(step, Convolution)}
    for layer in layers:
        codes = fixed.values[inputs[layer.layer]].representation
        assert isinstance(codes, Codes)
        if layer.own_largest > codes.one_step:
            return f"gives layer {layer.layer!r} integers that are off by up to {layer.own_largest} from the float program's"
    return ""
