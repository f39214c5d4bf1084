"""A network as a program of integers: what compiled code must compute, step by step.

A value is an array of (images, height, width, channels) in one of three representations:

    Codes   bytes, as in `hw_models.tvm_cpu.conv`: the few-bit integers q that enter a layer; real value q scale. Where a
            scheme's integers have a zero point, q is what lies between the two. Of 16 bits they are uint16 in place of bytes
    Fixed   int32, real value i step: what is added up, or pooled, before it is quantized
    Float   float32: the network's input and output, and what enters and leaves layers that the policy leaves in float

A step makes a number acc for each output and ends in an `Epilogue`, which is float32 for each output by itself:

    v = fma(acc, multiplier[c], offset[c]);   v = fma(i, factor, v) for each residual
    v = v where v >= 0 else v slope[c], where there is a slope;   v = table(v), where there is a `Table`
    v = clip(v, low, high)
    and for each output, u = v factor:    Codes clip(round(u)), one signed bit +1 where u >= 0, else -1
                                          Fixed clip(round(u))        Float u

v is in units of the first output's step, whose factor is 1; before a table it is a real value, and the table gives units.
Rounding is half to even; integers become float32 before they are multiplied, and Codes are taken without their zero: q, not
the byte. Batch norms, biases and scales are folded into multiplier and offset in float64 and rounded once.

`haq.deployment.lowering` makes a program, `haq.deployment.interpreter` computes it slowly and compares it with the network.
A flatten in front of a linear layer is no step: channels last bytes stay where they are, and the columns of the layer are
permuted. Other operations that move values are a `Move`, one for a chain of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.deployment.nodes import Ranges, Shape, Taps, Window
from hw_models.tvm_cpu.conv import Conv, zero_point

Array: TypeAlias = NDArray[Any]
# The widest integers that low-bit kernels multiply, and that a byte holds.
BYTE_BITS = 8


@dataclass(frozen=True)
class Codes:
    """Unsigned numbers q + zero, bytes up to 8 bits. `narrow`: the smallest signed q is -(2^(b-1) - 1), not -2^(b-1)."""

    scale: float
    bits: int
    signed: bool
    narrow: bool = True
    zero_point: int = 0  # of unsigned integers

    @property
    def zero(self) -> int:
        """The number that stands for real zero."""
        if self.zero_point:
            return self.zero_point
        if self.signed and self.bits > BYTE_BITS:
            return int(2 ** (self.bits - 1))
        return zero_point(self.bits, self.signed)

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest q."""
        low, high = Q.integer_range(self.bits, self.signed, self.narrow)
        return low - self.zero_point, high - self.zero_point

    @property
    def one_step(self) -> int:
        """By how much neighbours differ: signs are -1 and 1."""
        if self.bits == 1 and self.signed:
            return 2
        return 1

    @property
    def unit(self) -> float:
        """The real value of 1."""
        return self.scale

    @property
    def kind(self) -> str:
        """Its name in the name of a value: s4, u8, u8z12."""
        if self.signed:
            return f"s{self.bits}"
        if self.zero_point:
            return f"u{self.bits}z{self.zero_point}"
        return f"u{self.bits}"

    @property
    def dtype(self) -> str:
        """The type of its numbers."""
        if self.bits > BYTE_BITS:
            return "uint16"
        return "uint8"


@dataclass(frozen=True)
class Fixed:
    """int32 from -limit to limit; `step` is a power of two."""

    step: float
    limit: int

    @property
    def unit(self) -> float:
        """The real value of 1."""
        return self.step

    @property
    def kind(self) -> str:
        """Its name in the name of a value."""
        return "int32"

    @property
    def dtype(self) -> str:
        """The type of its numbers."""
        return "int32"


@dataclass(frozen=True)
class Float:
    """float32."""

    @property
    def unit(self) -> float:
        """The real value of 1."""
        return 1.0

    @property
    def kind(self) -> str:
        """Its name in the name of a value."""
        return "float32"

    @property
    def dtype(self) -> str:
        """The type of its numbers."""
        return "float32"


Representation: TypeAlias = Codes | Fixed | Float


@dataclass(frozen=True)
class Value:
    """`shape` is (height, width, channels) of one image. A layer may take it as one row of height x width x channels."""

    representation: Representation
    shape: Shape


@dataclass(frozen=True)
class Residual:
    """v += value factor; `value` is Fixed, or the q of Codes, of the step's shape."""

    value: str
    factor: float


@dataclass(frozen=True)
class Output:
    """`value` = v factor, rounded to its representation. A float32 number."""

    value: str
    factor: float


@dataclass(frozen=True, eq=False)
class Table:
    """A function of one value as a piece of a parabola for each of `segments` equal parts of its domain.

    In float32, each operation rounded once:

        t = fma(v, inverse, start);   i = clip(floor(t), 0, segments - 1);   r = fma(v, inverse, start - i)
        v = fma(fma(coefficients[i, 2], r, coefficients[i, 1]), r, coefficients[i, 0])

    `inverse` is a power of two, the segments per unit; `start` is a whole number, so that start - i is exact. Beyond the ends
    the outermost segments go on, and they are straight lines: coefficients[0, 2] = coefficients[-1, 2] = 0.
    """

    start: float
    inverse: float
    coefficients: NDArray[np.float32]

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self.coefficients)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of a sum; see the module. `multiplier`, `offset` and `slope` are float32 of (channels,).

    There is a slope (of a PReLU or leaky ReLU), or a table (of any other function of each value), or neither.
    """

    multiplier: NDArray[np.float32]
    offset: NDArray[np.float32]
    residuals: tuple[Residual, ...]
    low: float
    high: float
    outputs: tuple[Output, ...]
    slope: NDArray[np.float32] | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Quantize:
    """The network's input to Codes: q = clip(round(x / scale)), one signed bit its sign, divided in float32 as torch does."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Convolution:
    """acc = exact sums of weights (C_out, C_in / groups, kh, kw) and activations q of `conv`, whose batch is 1 for one image.

    `weights` are int8 of `w_bits` bits in two's complement (one bit: -1 and +1), or int16 of 16; `input` is Codes of a_bits
    and signed, with any zero point: what pads an image has q = 0. Sums fit into 32 bits where neither operand has more than 8
    (`is_low_bit`), else into 64: as many products of 16 bits as a `Conv` may have taps are below 2^48.

    A linear layer is a 1x1 convolution on (1, 1); of a flattened map its channels are in order of (height, width, channels).
    `name` is the layer's; of a later call of the same layer name@2, name@3.
    """

    name: str
    layer: str
    input: str
    conv: Conv
    w_bits: int
    a_bits: int
    signed: bool
    weights: NDArray[np.int8] | NDArray[np.int16]
    epilogue: Epilogue

    @property
    def is_low_bit(self) -> bool:
        """Whether both operands are bytes: what low-bit kernels compute."""
        return max(self.w_bits, self.a_bits) <= BYTE_BITS


@dataclass(frozen=True, eq=False)
class FloatConvolution:
    """The same in float32: acc is what the layer gives without its bias.

    `input` is Float, or Codes whose real values float32(q) scale are taken (a layer of float weights and quantized
    activations).
    """

    name: str
    layer: str
    input: str
    conv: Conv
    weights: NDArray[np.float32]
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Sum:
    """acc = the integers of `input` (Fixed, or the q of Codes), or its values (Float). Additions are residuals."""

    name: str
    input: str
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Pool:
    """acc = the largest of each window, or the sum of each.

    `kind` "max": of Fixed, or of the q of Codes, whose order is that of real values; padding is never the largest. "avg": the
    exact sum of Fixed or of the q of Codes, which fits into 32 bits; padding is zero. If the input is Codes and the only
    output is one value of the same Codes, the epilogue changes nothing.

    An average whose divisor isn't the same everywhere has no window: it sums up the rows and columns of `ranges`, and
    acc = float32(sum) factors[y, x], rounded once; `factors` is float32 of (H_out, W_out), one over the divisors.
    """

    name: str
    kind: str
    input: str
    window: Window | None
    output_size: tuple[int, int]
    epilogue: Epilogue
    ranges: Ranges | None = None
    factors: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """acc = float32(input) float32(other), rounded once, of the integers of Fixed or Codes, or the values of Float.

    `input` is of the output's shape (height, width, channels); `other` is too, or it is (1, 1, channels), one factor per
    channel, or (height, width, 1), one per place.
    """

    name: str
    input: str
    other: str
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Resize:
    """Bilinear interpolation of Fixed or Codes, in float32, each operation rounded once.

    With the rows y0 and y1 between which output row y lies (`rows.first`, `rows.second`), its weight wy (`rows.weight`, in
    float32), and columns likewise:

        top = fma(x[y0, x1] - x[y0, x0], wx, x[y0, x0]);   bottom = fma(x[y1, x1] - x[y1, x0], wx, x[y1, x0])
        acc = fma(bottom - top, wy, top)
    """

    name: str
    input: str
    rows: Taps
    columns: Taps
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Move:
    """Takes values to other places, for any chain of operations that compute nothing.

    The inputs are flattened, each in its order (height, width, channels), and put one behind the other; `index`, int32 of the
    output's shape (height, width, channels), says which of them each value of `output` is. -1 is real zero: 0 of Fixed and
    Float, the zero of Codes, and +1 of one signed bit, as which zero is quantized. All inputs and the output are of one
    representation.
    """

    name: str
    inputs: tuple[str, ...]
    index: NDArray[np.int32]
    output: str


@dataclass(frozen=True, eq=False)
class Lookup:
    """A function of Codes of at most 8 bits: each output is entries[stored byte].

    `outputs` are the names of values of any representation. `entries` holds an array of 256 for each, of its type: codes as
    they are stored. Bytes that don't occur have the entry of the nearest one that does.
    """

    name: str
    input: str
    outputs: tuple[str, ...]
    entries: tuple[Array, ...]


Step: TypeAlias = Quantize | Convolution | FloatConvolution | Sum | Pool | Product | Resize | Move | Lookup


def written_by(step: Step) -> tuple[str, ...]:
    """Name the values that a step writes."""
    if isinstance(step, Quantize | Move):
        return (step.output,)
    if isinstance(step, Lookup):
        return step.outputs
    return tuple(output.value for output in step.epilogue.outputs)


def read_by(step: Step) -> tuple[str, ...]:
    """Name the values that a step reads, what its epilogue adds included."""
    if isinstance(step, Move):
        return step.inputs
    if isinstance(step, Quantize | Lookup):
        return (step.input,)
    read = [step.input]
    if isinstance(step, Product):
        read.append(step.other)
    return (*read, *(residual.value for residual in step.epilogue.residuals))


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order, and the values they read and write by name.

    `input` and `output` are Float; the input is images with their channels last, the output of a classifier is of
    (1, 1, classes). `input_dims` and `output_dims` are torch's shapes for one image, (1, C, H, W), (1, C, L) or (1, C).
    """

    steps: tuple[Step, ...]
    values: Mapping[str, Value]
    input: str
    output: str
    input_dims: tuple[int, ...]
    output_dims: tuple[int, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the convolution steps, in order."""
        return tuple(step.name for step in self.steps if isinstance(step, Convolution | FloatConvolution))
