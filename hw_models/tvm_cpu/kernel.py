"""What all kernels share: a convolution with its bits, its buffers, and the padding of its image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.tvm_cpu.builder import LANES, Argument, Builder, Code, Epilogue, Frame, Planes, pieces, up
from hw_models.tvm_cpu.conv import Conv, check_codes, weight_range, zero_point
from hw_models.tvm_cpu.cpu import Cpu


@dataclass(frozen=True)
class Kernel(Code):
    """One way to compute a layer, for weights and activations of at most these bits.

    `input` are bytes (batch, height, width, channels); `constants` makes the buffers that come from the weights. `zero` is
    the byte of real zero among unsigned ones: the sums are those of the bytes less that. If it is `framed`, the input lies
    within its padding already (`frame`).
    """

    conv: Conv
    w_bits: int
    a_bits: int
    signed: bool
    cpu: Cpu
    epilogue: Epilogue = field(default=Epilogue(), kw_only=True)
    zero: int = field(default=0, kw_only=True)
    framed: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """Its family, what it is for, and its tile."""
        raise NotImplementedError

    @property
    def threads(self) -> int:  # type: ignore[override]
        """How many threads compute it."""
        return self.cpu.threads

    @property
    def is_float(self) -> bool:
        """Whether it is for float32 weights and activations, which have no bits."""
        return self.w_bits == 0

    @property
    def key(self) -> str:
        """Text that is the same for the same code, and only then; widths that make no difference aren't in it."""
        return repr((self.name, self.conv, self._zero, self.framed, self.epilogue, self.cpu))

    def constants(
        self, weights: NDArray[Any], multiplier: NDArray[np.floating], offset: NDArray[np.floating]
    ) -> dict[str, NDArray[Any]]:
        """Make the buffers that come from the weights and the epilogue's factors.

        Args:
            weights: Integers (C_out, C_in / groups, kh, kw); floats for a kernel on floats.
            multiplier: A factor per output channel (C_out,).
            offset: What is added to each, the same shape.

        Returns:
            The buffers by name.

        Raises:
            ValueError: For weights that aren't of the kernel's bits.
        """
        conv = self.conv
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
        if weights.shape != shape:
            raise ValueError(f"weights of shape {weights.shape} given where {shape} are needed")
        if not self.is_float:
            check_codes(f"weights of {self.w_bits} bits", weights, weight_range(self.w_bits))
            if self.w_bits == 1 and not weights.all():
                raise ValueError("weights of 1 bit must be -1 or +1, found 0")
            weights = weights.astype(np.int64)
        made = self._constants(weights)
        made |= self.epilogue.constants(multiplier, offset)
        names = {a.name: a for arguments in self.arguments().values() for a in arguments}
        return {
            name: np.ascontiguousarray(array.reshape(-1), dtype=names[name].dtype)
            for name, array in made.items()
            if name in names
        }

    def _constants(self, weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def unpack(self, b: Builder, buffers: dict[str, Any], weight: Callable[[Any], Any]) -> None:
        """Write the code that makes the buffers which come from the weights: the same numbers as `constants`.

        Args:
            b: Builds the function.
            buffers: Those of `of_weights`, by name.
            weight: Writes the code that reads a weight, as int32 or float32, by its place in (C_out, C_in / groups, kh, kw).
        """
        raise NotImplementedError

    def of_weights(self) -> list[str]:
        """List the buffers that come from the weights."""
        names = {a.name for arguments in self.arguments().values() for a in arguments}
        return [name for name in ("weights", "initial", "border") if name in names]

    # Shared by all kernels.

    @property
    def _zero(self) -> int:
        return self.zero or zero_point(self.a_bits, self.signed)

    @property
    def _padded_size(self) -> tuple[int, int]:
        top, left = self.conv.padding
        bottom, right = self.conv.end_padding
        height, width = self.conv.input_size
        return height + top + max(bottom, 0), width + left + max(right, 0)

    def frame(self) -> Frame | None:
        """Return what whoever writes the input can put around it, so that nothing is copied; None if that isn't enough."""
        conv = self.conv
        if self.framed or not conv.padded or conv.batch > 1 or not replace(self, framed=True)._prepared:
            return None
        high, wide = self._padded_size
        (height, width), (top, left) = conv.input_size, conv.padding
        sides = top, high - top - height, left, wide - left - width
        return Frame((height, width, conv.in_channels), *sides, self._zero)

    @property
    def whole_blocks(self) -> bool:
        """Whether outputs are written 16 at a time, from a multiple of 16 on."""
        conv = self.conv
        return conv.groups in (1, conv.out_channels) or conv.out_channels // conv.groups % LANES == 0

    def planes(self) -> Planes | None:
        """Return how whoever writes the input can write it as bits, so that nothing is packed; None where it isn't read so."""
        return None

    @property
    def _prepared(self) -> bool:
        """Whether the image is read as it comes."""
        raise NotImplementedError

    def _input(self) -> Argument:
        conv = self.conv
        size = conv.input_size
        if self.framed:
            size = self._padded_size
        return Argument("input", (conv.batch, *size, conv.in_channels), self._dtype)

    @property
    def _dtype(self) -> str:
        if self.is_float:
            return "float32"
        return "uint8"

    def _ends(self) -> list[Argument]:
        return self.epilogue.arguments((self.conv.batch, *self.conv.output_size, self.conv.out_channels))

    def _pad(self, b: Builder, buffers: dict[str, Any], groups: int, to: int) -> None:
        """Copy the image into the middle of one that is padded, each group's channels to a multiple of `to`."""
        conv = self.conv
        height, width = conv.input_size
        high, wide = self._padded_size
        top, left = conv.padding
        inputs = conv.in_channels // groups
        padded = up(inputs, to)
        source = buffers["input"]
        target = buffers["padded"]
        pixel = groups * padded

        def fill(at: Any, count: int) -> None:
            # What pads is written each time: a buffer is used by one layer after another.
            pieces(b, count, lambda offset, lanes: b.put(target, at + offset, b.splat(self._zero, self._dtype, lanes), lanes))

        with b.loop(conv.batch) as image:
            with b.once(self.threads):
                for start, count in ((0, top), (top + height, high - top - height)):
                    fill((image * high + start) * wide * pixel, count * wide * pixel)
            with b.loop(height, self.threads) as y:
                line = (image * high + y + top) * wide * pixel
                fill(line, left * pixel)
                fill(line + (left + width) * pixel, (wide - left - width) * pixel)
                to_line = line + left * pixel
                from_line = (image * height + y) * width * conv.in_channels
                if padded == inputs:
                    pieces(
                        b,
                        width * pixel,
                        lambda offset, lanes: b.put(
                            target, to_line + offset, b.vector(source, from_line + offset, lanes), lanes
                        ),
                    )
                else:
                    with b.loop(width * groups) as x:
                        from_pixel = from_line + x * inputs
                        to_pixel = to_line + x * padded

                        def copy(offset: Any, lanes: int, source_at: Any = from_pixel, at: Any = to_pixel) -> None:
                            b.put(target, at + offset, b.vector(source, source_at + offset, lanes), lanes)

                        pieces(b, inputs, copy)
                        for channel in range(inputs, padded):
                            b.T.buffer_store(target, b.const(self._zero, self._dtype), [to_pixel + channel])
