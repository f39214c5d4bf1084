"""A network as a program of integers: what compiled code must compute, step by step.

A value is an array of (images, height, width, channels) in one of three representations:

    Codes   bytes, as in `hw_models.tvm_cpu.conv`: the few-bit integers q that enter a layer; real value q scale. Where a
            scheme's integers have a zero point, q is what lies between the two. Of 16 bits they are uint16 in place of bytes
    Fixed   int32, real value i step: what is added up, or pooled, before it is quantized
    Float   float32: the network's input and output, and what enters and leaves layers that the policy leaves in float

A step sums integers and ends in an `Epilogue`, which is float32 for each output by itself:

    v = fma(acc, multiplier[c], offset[c]);   v = fma(i, factor, v) for each residual;   v = clip(v, low, high)
    and for each output, u = v factor:    Codes clip(round(u)), one signed bit +1 where u >= 0, else -1
                                          Fixed clip(round(u))        Float u

v is in units of the first output's step, whose factor is 1. Rounding is half to even; integers become float32 before they
are multiplied. Batch norms, biases and scales are folded into multiplier and offset in float64 and rounded once.

`haq.deployment.lowering` makes a program, `haq.deployment.interpreter` computes it slowly and compares it with the network.
A flatten is no step: channels last bytes stay where they are, and the columns of the linear layer are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.deployment.graph import Shape, Window
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
    """v += value factor; `value` is Fixed."""

    value: str
    factor: float


@dataclass(frozen=True)
class Output:
    """`value` = v factor, rounded to its representation. A float32 number."""

    value: str
    factor: float


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of a sum; see the module. `multiplier` and `offset` are float32 of (channels,)."""

    multiplier: NDArray[np.float32]
    offset: NDArray[np.float32]
    residuals: tuple[Residual, ...]
    low: float
    high: float
    outputs: tuple[Output, ...]


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
    """acc = the integers of `input` (Fixed), or its values (the network's input, Float). Additions are residuals."""

    name: str
    input: str
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Pool:
    """acc = the largest of each window, or the sum of each.

    `kind` "max": of Fixed, or of the q of Codes, whose order is that of real values; padding is never the largest. "avg": the
    int32 sum of Fixed; padding is zero. If the input is Codes the output is one value of the same Codes, and the epilogue
    changes nothing.
    """

    name: str
    kind: str
    input: str
    window: Window
    output_size: tuple[int, int]
    epilogue: Epilogue


Step: TypeAlias = Quantize | Convolution | FloatConvolution | Sum | Pool


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order, and the values they read and write by name.

    `input` and `output` are Float; the input is images with their channels last, the output of a classifier is of
    (1, 1, classes).
    """

    steps: tuple[Step, ...]
    values: Mapping[str, Value]
    input: str
    output: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the convolution steps, in order."""
        return tuple(step.name for step in self.steps if isinstance(step, Convolution | FloatConvolution))
