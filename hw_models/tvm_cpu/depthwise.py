"""Depthwise convolutions, which multiply channel by channel: what they compute is `conv.reference`, bit for bit.

`Depthwise` has 16-bit sums where they can't overflow, which is what few bits buy there; `DepthwiseDot` multiplies four at a
time where the processor has VNNI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.tvm_cpu.builder import LANES, LESS_EVEN, WORTH_DIVIDING, Argument, Builder, Shares, segments, up
from hw_models.tvm_cpu.conv import Conv, activation_range, weight_range
from hw_models.tvm_cpu.cpu import Cpu
from hw_models.tvm_cpu.kernel import Kernel


@dataclass(frozen=True)
class Depthwise(Kernel):
    """One filter for each channel, 32 or 16 channels at a time; `sums` are int32, int16 or float32, `tile` pixels across."""

    sums: str = "int32"
    tile: int = 4

    @property
    def name(self) -> str:
        """Its family, its sums, and its tile."""
        return f"depthwise {self.sums} {self.tile}"

    @staticmethod
    def fits(conv: Conv, w_bits: int, a_bits: int, signed: bool) -> bool:
        """Say whether no sum, and no part of one, exceeds 16 bits.

        Args:
            conv: The layer.
            w_bits: Of its weights.
            a_bits: Of its input.
            signed: Whether the input is.

        Returns:
            Whether all sums fit.
        """
        weight = max(map(abs, weight_range(w_bits)))
        activation = max(map(abs, activation_range(a_bits, signed)))
        return conv.taps * weight * activation < 2**15

    @property
    def _channels(self) -> int:
        return up(self.conv.in_channels, LANES)

    @property
    def _prepared(self) -> bool:
        """Whether the image is read as it comes."""
        return (self.framed or not self.conv.padded) and self.conv.in_channels % LANES == 0

    def _source(self, buffers: dict[str, Any]) -> Any:
        if self._prepared:
            return buffers["input"]
        return buffers["padded"]

    def arguments(self) -> dict[str, list[Argument]]:
        """List the buffers of padding, if there is any, and of the convolution."""
        conv = self.conv
        stages = {}
        image = self._input()
        if not self._prepared:
            image = Argument("padded", (conv.batch, *self._padded_size, self._channels), self._dtype)
            stages["prepare"] = [self._input(), image]
        dtype = "int16"
        if self.is_float:
            dtype = "float32"
        weights = Argument("weights", (*conv.kernel, self._channels), dtype)
        stages["main"] = [image, weights, *self._ends()]
        return stages

    def _constants(self, weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if self.sums == "int16" and not self.fits(self.conv, self.w_bits, self.a_bits, self.signed):
            raise ValueError(f"sums of {self.w_bits} by {self.a_bits} bits don't fit into 16 bits")
        padding = [(0, 0), (0, 0), (0, self._channels - self.conv.in_channels)]
        return {"weights": np.pad(weights[:, 0].transpose(1, 2, 0), padding)}

    def unpack(self, b: Builder, buffers: dict[str, Any], weight: Callable[[Any], Any]) -> None:
        """Write the code that makes the weights' buffer; see `Kernel.unpack`."""
        taps = self.conv.kernel[0] * self.conv.kernel[1]
        dtype = "int16"
        if self.is_float:
            dtype = "float32"
        with b.loop(taps) as tap, b.loop(self._channels) as channel:

            def value(at: Any = channel * taps + tap) -> Any:
                return weight(at).astype(dtype)

            made = b.where([channel < self.conv.in_channels], value, b.const(0, dtype))
            b.T.buffer_store(buffers["weights"], made, [tap * self._channels + channel])

    def _prepare(self, b: Builder, buffers: dict[str, Any]) -> None:
        self._pad(b, buffers, 1, LANES)

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        conv = self.conv
        height, width = conv.output_size
        size = LANES
        if self.sums == "int16":
            size = 2 * LANES
        missing = self._channels - conv.out_channels  # channels that the last block lacks
        blocks = []  # first channel, rounds, channels, and how many of these exist
        for first, rounds, lanes in segments(self._channels, size):
            partial = int(missing > 0 and first + rounds * lanes == self._channels)
            whole = rounds - partial
            for start, count, here in ((first, whole, lanes), (first + whole * lanes, partial, lanes - missing)):
                if count:
                    blocks.append((start, count, lanes, here))
        # Threads divide rows, unless blocks of channels can be divided more evenly.
        of_rows = Shares(((height, 1),), self.threads)
        of_blocks = Shares(tuple((count, lanes) for _, count, lanes, _ in blocks), self.threads)
        divided = ""
        if self.threads > 1 and conv.macs >= WORTH_DIVIDING and max(of_rows.gain, of_blocks.gain) > 1:
            divided = "blocks"
            if of_rows.gain > LESS_EVEN * of_blocks.gain:
                divided = "rows"
        with b.loop(conv.batch) as image, b.share_if(divided == "rows", of_rows, 0) as y:
            for index, (start, _, lanes, here) in enumerate(blocks):
                with b.share_if(divided == "blocks", of_blocks, index) as step:
                    channel = start + step * lanes
                    for x0, x_rounds, columns in segments(width, self.tile):
                        with b.loop(x_rounds) as x_step:
                            self._tile(b, buffers, image, y, x0 + x_step * columns, columns, channel, lanes, here)

    def _tile(
        self,
        b: Builder,
        buffers: dict[str, Any],
        image: Any,
        y: Any,
        x: Any,
        columns: int,
        channel: Any,
        lanes: int,
        count: int,
    ) -> None:
        """`columns` pixels of a row, in `lanes` channels of which `count` exist."""
        conv = self.conv
        T = b.T
        high, wide = self._padded_size
        height, width = conv.output_size
        source = self._source(buffers)
        weights = buffers["weights"]
        sums: list[Any] = [None] * columns
        for ky, kx in np.ndindex(*conv.kernel):
            w = b.vector(weights, (ky * conv.kernel[1] + kx) * self._channels + channel, lanes)
            row = (image * high + y * conv.stride[0] + ky * conv.dilation[0]) * wide
            for column in range(columns):
                place = row + (x + column) * conv.stride[1] + kx * conv.dilation[1]
                stored = b.vector(source, place * self._channels + channel, lanes)
                before = sums[column]
                if self.is_float:
                    if before is None:
                        before = b.splat(0.0, "float32")
                    sums[column] = b.fma(stored, w, before)
                    continue
                q = stored.astype(f"int16x{lanes}")
                if self._zero:
                    q = q - b.splat(self._zero, "int16", lanes)
                # 255 x 128 fits into 16 bits.
                total = q * w
                if self.sums == "int32":
                    total = total.astype("int32x16")
                if before is not None:
                    total = before + total
                sums[column] = T.bind(total)
        with b.tile(buffers, self.epilogue, columns * lanes // LANES):
            for column, total in enumerate(sums):
                at = ((image * height + y) * width + x + column) * conv.out_channels + channel
                if lanes == LANES:
                    b.epilogue(buffers, self.epilogue, total, channel, at, count)
                    continue
                both = T.alloc_buffer((lanes,), "int16")
                b.put(both, 0, total, lanes)
                for half in (0, LANES):
                    if count > half:
                        value = T.bind(b.vector(both, half, LANES).astype("int32x16"))
                        b.epilogue(buffers, self.epilogue, value, channel + half, at + half, min(LANES, count - half))


@dataclass(frozen=True)
class DepthwiseDot(Depthwise):
    """The same with the instruction that sums four products: of four neighbours in a row, channel by channel.

    A window of four serves as many outputs as fit into it, each with the weights at another place.
    """

    @property
    def name(self) -> str:
        """Its family and its tile."""
        return f"depthwise dot {self.tile}"

    @staticmethod
    def can(conv: Conv, cpu: Cpu) -> bool:
        """Say whether it can compute a convolution on a processor."""
        return cpu.dot == "vnni" and conv.kernel[1] <= 4 and conv.dilation[1] == 1

    @property
    def _of_window(self) -> int:
        """Outputs of a window."""
        return (4 - self.conv.kernel[1]) // self.conv.stride[1] + 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List the buffers of padding, if there is any, and of the convolution."""
        stages = super().arguments()
        image, _, *ends = stages["main"]
        main = [image, Argument("weights", (self.conv.kernel[0], self._of_window, self._channels, 4), "int8")]
        if self._zero:
            main.append(Argument("initial", (self._channels,), "int32"))
        return stages | {"main": main + ends}

    def _constants(self, weights: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        conv = self.conv
        kh, kw = conv.kernel
        made = np.zeros((kh, self._of_window, self._channels, 4), np.int64)
        for index in range(self._of_window):
            start = index * conv.stride[1]
            made[:, index, : conv.in_channels, start : start + kw] = weights[:, 0].transpose(1, 0, 2)
        initial = np.pad(-self._zero * weights.sum((1, 2, 3)), (0, self._channels - conv.in_channels))
        return {"weights": made, "initial": initial}

    def unpack(self, b: Builder, buffers: dict[str, Any], weight: Callable[[Any], Any]) -> None:
        """Write the code that makes the buffers which come from the weights; see `Kernel.unpack`."""
        conv = self.conv
        T = b.T
        kh, kw = conv.kernel
        with b.loop(self._channels) as channel:
            exists = channel < conv.in_channels
            with b.loop(kh) as ky:
                for index in range(self._of_window):
                    at = ((ky * self._of_window + index) * self._channels + channel) * 4
                    for part in range(4):
                        kx = part - index * conv.stride[1]
                        made = b.const(0, "int8")
                        if 0 <= kx < kw:
                            place = (channel * kh + ky) * kw + kx
                            made = b.where([exists], lambda place=place: weight(place).astype("int8"), made)  # type: ignore[misc]
                        T.buffer_store(buffers["weights"], made, [at + part])
            if "initial" in buffers:
                total = T.alloc_buffer((1,), "int32")
                T.buffer_store(total, b.const(0, "int32"), [0])
                with T.If(exists), T.Then(), b.loop(kh * kw) as tap:
                    T.buffer_store(total, total[0] + weight(channel * kh * kw + tap), [0])
                T.buffer_store(buffers["initial"], total[0] * -self._zero, [channel])

    def _tile(
        self,
        b: Builder,
        buffers: dict[str, Any],
        image: Any,
        y: Any,
        x: Any,
        columns: int,
        channel: Any,
        lanes: int,
        count: int,
    ) -> None:
        conv = self.conv
        T = b.T
        high, wide = self._padded_size
        height, width = conv.output_size
        kh, kw = conv.kernel
        down, across = conv.stride
        source = self._source(buffers)
        weights = buffers["weights"]
        start = b.splat(0, "int32")
        if self._zero:
            start = b.vector(buffers["initial"], channel, LANES)
        sums: list[Any] = [start] * columns
        interleaved = [lane + LANES * part for lane in range(LANES) for part in range(4)]
        for ky in range(kh):
            row = (image * high + y * down + ky * conv.dilation[0]) * wide
            for first in range(0, columns, self._of_window):
                served = min(self._of_window, columns - first)
                needed = (served - 1) * across + kw
                # What lies behind the last one needed may not exist, and meets weights of zero.
                places = [row + (x + first) * across + min(part, needed - 1) for part in range(4)]
                pixels = [b.vector(source, place * self._channels + channel, LANES) for place in places]
                window = T.bind(T.reinterpret("uint8x64", T.Shuffle(pixels, interleaved)))
                for index in range(served):
                    at = ((ky * self._of_window + index) * self._channels + channel) * 4
                    dot = ("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums[first + index], window, b.vector(weights, at, 64))
                    sums[first + index] = T.bind(T.call_llvm_pure_intrin(*dot))
        with b.tile(buffers, self.epilogue, columns):
            for column, total in enumerate(sums):
                at = ((image * height + y) * width + x + column) * conv.out_channels + channel
                b.epilogue(buffers, self.epilogue, total, channel, at, count)
