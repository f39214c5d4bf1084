"""What a low-bit kernel computes: one integer convolution, said exactly, and slowly in NumPy.

Weights are integers of two's complement, -2^(b-1)..2^(b-1)-1 (one bit: -1 and +1). Activations are integers q >= 0, or
signed ones, and travel as bytes q + zero point, channels last, so that what pads an image is a byte as well:

    activations             q                      zero point    byte
    unsigned, b bits        0..2^b - 1             0             q
    signed, b >= 2 bits     -2^(b-1)..2^(b-1)-1    128           q + 128
    signed, 1 bit           -1, +1                 1             0 or 2 (padding, real zero, is 1)
    asymmetric, b bits      -z..2^b - 1 - z        z             0..2^b - 1 (padding is z)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_models.workload import Call, Layer, Size, end_padding

# The largest bytes that kernels multiply are 255 and 128; their sum over the taps must fit into 32 bits.
MAX_TAPS = (2**31 - 1) // (255 * 128)


@dataclass(frozen=True)
class Conv:
    """The sizes of a convolution. A linear layer is a 1x1 convolution of an image of (rows, 1).

    `padding` is that of the top and left; at the bottom and right there is as much as the output's size needs.

    Raises:
        ValueError: For sizes that don't belong together, and where 32 bits might not hold a sum.
    """

    in_channels: int
    out_channels: int
    input_size: Size
    output_size: Size
    kernel: Size = (1, 1)
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        """Check that the sizes belong together and that sums fit into 32 bits."""
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"{self.groups} groups don't divide {self.in_channels} and {self.out_channels} channels")
        if self.taps > MAX_TAPS:
            raise ValueError(f"a sum of {self.taps} products of 8 bits may overflow 32 bits; at most {MAX_TAPS} are allowed")
        for axis in (0, 1):
            if self.end_padding[axis] < 0 and -self.end_padding[axis] >= self.input_size[axis]:
                raise ValueError(f"an output of {self.output_size} doesn't belong to an input of {self.input_size}")

    @staticmethod
    def of(layer: Layer, call: Call | None = None, batch: int = 1) -> Conv:
        """Return a layer's convolution.

        Args:
            layer: The layer.
            call: One of its calls; None is the first.
            batch: Images; a linear layer takes them for rows.

        Returns:
            The sizes.
        """
        call = call or layer.calls[0]
        input_size = call.input_size
        output_size = call.output_size
        if layer.kind == "linear":
            input_size = (batch * input_size[0], 1)
            output_size = (batch * output_size[0], 1)
            batch = 1
        return Conv(
            layer.in_channels,
            layer.out_channels,
            input_size,
            output_size,
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            batch,
        )

    @property
    def end_padding(self) -> Size:
        """Padding at the bottom and right; negative where the last rows or columns aren't looked at."""
        return end_padding(self.kernel, self.stride, self.padding, self.dilation, self.input_size, self.output_size)

    @property
    def taps(self) -> int:
        """Products per output."""
        return self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the batch."""
        return self.taps * self.out_channels * self.output_size[0] * self.output_size[1] * self.batch

    @property
    def padded(self) -> bool:
        """Whether any output looks beyond the image."""
        return max(*self.padding, *self.end_padding) > 0


def zero_point(bits: int, signed: bool) -> int:
    """Return what is added to an activation to make it a byte."""
    if not signed:
        return 0
    if bits == 1:
        return 1
    return 128


def weight_range(bits: int) -> tuple[int, int]:
    """Return the least and the largest weight; one bit is -1 or +1."""
    if bits == 1:
        return -1, 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def activation_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the least and the largest activation; one signed bit is -1 or +1."""
    if signed:
        return weight_range(bits)
    return 0, 2**bits - 1


def reference(conv: Conv, weights: NDArray[np.integer], activations: NDArray[np.integer]) -> NDArray[np.int64]:
    """Compute a convolution in the plainest way: slow, and what kernels are tested against.

    Args:
        conv: Its sizes.
        weights: Integers (C_out, C_in / groups, kh, kw).
        activations: Integers (batch, height, width, C_in).

    Returns:
        The sums (batch, height, width, C_out).
    """
    top, left = conv.padding
    bottom, right = conv.end_padding
    x = np.pad(activations.astype(np.int64), ((0, 0), (top, max(bottom, 0)), (left, max(right, 0)), (0, 0)))
    height, width = conv.output_size
    down, across = conv.stride
    sums = np.zeros((conv.batch, height, width, conv.out_channels), np.int64)
    of_group = conv.out_channels // conv.groups
    inputs = conv.in_channels // conv.groups
    for ky, kx in np.ndindex(*conv.kernel):
        y = ky * conv.dilation[0]
        z = kx * conv.dilation[1]
        window = x[:, y : y + (height - 1) * down + 1 : down, z : z + (width - 1) * across + 1 : across]
        for group in range(conv.groups):
            w = weights[group * of_group : (group + 1) * of_group, :, ky, kx].astype(np.int64)
            part = window[..., group * inputs : (group + 1) * inputs]
            sums[..., group * of_group : (group + 1) * of_group] += part @ w.T
    return sums


def border_taps(conv: Conv) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int32]]:
    """Say which taps meet padding.

    Returns the taps (kh, kw) that are outside for each different border, and the border of each output row and of each output
    column, so that output (y, x) has border rows[y] + columns[x].
    """
    hit: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    for axis in (0, 1):
        start = np.arange(conv.output_size[axis])[:, None] * conv.stride[axis] - conv.padding[axis]
        position = start + np.arange(conv.kernel[axis])[None] * conv.dilation[axis]
        outside = (position < 0) | (position >= conv.input_size[axis])
        different, index = np.unique(outside, axis=0, return_inverse=True)
        hit.append((index.reshape(-1).astype(np.int32), different))
    (rows, vertical), (columns, horizontal) = hit
    # Taps that are outside in either direction.
    taps = vertical[:, None, :, None] | horizontal[None, :, None, :]
    return taps.reshape(-1, *conv.kernel), rows * len(horizontal), columns


def border_sums(conv: Conv, weights: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Sum up the weights that meet padding.

    Returns a row of C_out for each border of `border_taps`, and the borders of rows and columns.
    """
    taps, rows, columns = border_taps(conv)
    whole = weights.astype(np.int64).sum(1)
    return np.array([(whole * some).sum((1, 2)) for some in taps], np.int32), rows, columns


def fma(
    x: NDArray[np.float32], y: NDArray[np.float32] | np.float32 | float, z: NDArray[np.float32] | np.float32 | float
) -> NDArray[np.float32]:
    """Return x * y + z in float32, rounded once.

    Args:
        x: Numbers.
        y: Of a shape that x's can be broadcast with.
        z: Likewise.

    Returns:
        Of the shape of x * y.
    """
    product = x.astype(np.float64) * np.float32(y).astype(np.float64)  # exact
    addend = np.broadcast_to(np.float32(z).astype(np.float64), product.shape)
    total = product + addend
    # What float64 rounded off (Knuth's two-sum) goes into its last bit, so that rounding again doesn't see a tie.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def check_codes(what: str, values: NDArray[np.integer], bounds: tuple[int, int]) -> None:
    """Raise ValueError, saying `what` they are, for values that are out of bounds.

    Args:
        what: What the values are.
        values: Integers of any shape.
        bounds: The smallest and the largest that may be.
    """
    low, high = bounds
    if values.size and not (values.min() >= low and values.max() <= high):
        raise ValueError(f"{what} must be from {low} to {high}, found {values.min()} to {values.max()}")
