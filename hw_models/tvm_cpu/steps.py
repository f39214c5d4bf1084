"""What a network does between its convolutions: quantizing its input, adding, pooling, and rounding again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hw_models.tvm_cpu.builder import LANES, Argument, Builder, Code, Epilogue, Output, segments
from hw_models.workload import Size

Shape = tuple[int, int, int]  # height, width, channels


@dataclass(frozen=True)
class Interleave(Code):
    """An image of float32 with its channels first, as networks are given it, to one with its channels last.

    As it is, or as codes of x / scale (the output's factor isn't looked at: torch divides).
    """

    shape: Shape
    output: Output
    scale: float = 1.0

    def arguments(self) -> dict[str, list[Argument]]:
        """List the image as it comes and as it goes."""
        height, width, channels = self.shape
        planes = Argument("input", (channels, height, width), "float32")
        return {"main": [planes, Argument("output0", self.shape, self.output.dtype)]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        height, width, channels = self.shape
        source = buffers["input"]
        target = buffers["output0"]
        for first, rounds, count in segments(height * width, LANES):
            with b.loop(rounds) as step:
                at = first + step * LANES
                for channel in range(channels):
                    x = b.some(source, channel * height * width + at, "float32", count)
                    made = self._rounded(b, x)
                    if channels == 1:
                        b.put_some(target, at, made, self.output.dtype, count)
                        continue
                    beside = b.T.alloc_buffer((LANES,), self.output.dtype)
                    b.put(beside, 0, made, LANES)
                    for lane in range(count):
                        b.T.buffer_store(target, beside[lane], [(at + lane) * channels + channel])

    def _rounded(self, b: Builder, x: Any) -> Any:
        output = self.output
        if output.kind == "float":
            return x
        ratio = b.T.bind(x / b.splat(self.scale, "float32"))
        return b.rounded(ratio, output)


@dataclass(frozen=True)
class Elementwise(Code):
    """An epilogue on a map of float32, of fixed point numbers, or of codes with a zero point."""

    shape: Shape
    dtype: str
    epilogue: Epilogue
    zero: int = 0

    def arguments(self) -> dict[str, list[Argument]]:
        """List the map and what the epilogue takes."""
        return {"main": [Argument("input", self.shape, self.dtype), *self.epilogue.arguments(self.shape)]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        height, width, channels = self.shape

        def block(at: Any, channel: Any, count: int) -> None:
            stored = b.some(buffers["input"], at, self.dtype, count)
            if self.dtype in ("uint8", "uint16"):
                stored = stored.astype("int32x16") - b.splat(self.zero, "int32")
            b.epilogue(buffers, self.epilogue, b.T.bind(stored), channel, at, count)

        with b.loop(height * width) as pixel:
            _blocks(b, channels, lambda channel, count: block(pixel * channels + channel, channel, count))


@dataclass(frozen=True)
class Pool(Code):
    """The largest (`max`), or the sum (`sum`), of the numbers in each window.

    Fixed point numbers, then an epilogue; or the largest codes, which stay codes of their type (no epilogue).
    """

    kind: str
    shape: Shape
    output_size: Size
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    epilogue: Epilogue | None
    codes: str = "uint8"

    @property
    def _dtype(self) -> str:
        if self.epilogue is None:
            return self.codes
        return "int32"

    def arguments(self) -> dict[str, list[Argument]]:
        """List the map and what is written of it."""
        shape = (*self.output_size, self.shape[2])
        ends = [Argument("output0", shape, self.codes)]
        if self.epilogue is not None:
            ends = self.epilogue.arguments(shape)
        return {"main": [Argument("input", self.shape, self._dtype), *ends]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        height, width = self.output_size
        with b.loop(height) as y, b.loop(width) as x:
            _blocks(b, self.shape[2], lambda channel, count: self._block(b, buffers, y, x, channel, count))

    def _block(self, b: Builder, buffers: dict[str, Any], y: Any, x: Any, channel: Any, count: int) -> None:
        T = b.T
        dtype = self._dtype
        height, width, channels = self.shape
        source = buffers["input"]
        least = 0
        # Codes are numbers whose order is that of the values, and none is below 0.
        if self.kind == "max" and self.epilogue is not None:
            least = -(2**31)
        found = T.alloc_buffer((LANES,), dtype)
        b.put(found, 0, b.splat(least, dtype), LANES)

        def take(row: Any, column: Any) -> None:
            stored = b.some(source, (row * width + column) * channels + channel, dtype, count)
            before = b.vector(found, 0, LANES)
            after = T.max
            if self.kind == "sum":
                after = operator.add
            b.put(found, 0, after(before, stored), LANES)

        with b.loop(self.kernel[0]) as ky, b.loop(self.kernel[1]) as kx:
            row = y * self.stride[0] - self.padding[0] + ky * self.dilation[0]
            column = x * self.stride[1] - self.padding[1] + kx * self.dilation[1]
            bounds = []
            if self._overhangs(0):
                bounds.append((row, height))
            if self._overhangs(1):
                bounds.append((column, width))
            _if_inside(b, bounds, lambda: take(row, column))
        at = (y * self.output_size[1] + x) * channels + channel
        if self.epilogue is None:
            b.put_some(buffers["output0"], at, b.vector(found, 0, LANES), dtype, count)
        else:
            b.epilogue(buffers, self.epilogue, T.bind(b.vector(found, 0, LANES)), channel, at, count)

    def _overhangs(self, axis: int) -> bool:
        last = (self.output_size[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis]
        return self.padding[axis] > 0 or last - self.padding[axis] >= self.shape[axis]


def _if_inside(b: Builder, bounds: list[tuple[Any, int]], do: Callable[[], None]) -> None:
    if not bounds:
        do()
        return
    (index, size), *rest = bounds
    with b.T.If(b.T.And(index >= 0, index < size)), b.T.Then():
        _if_inside(b, rest, do)


def _blocks(b: Builder, channels: int, do: Callable[[Any, int], None]) -> None:
    """Go over channels 16 at a time."""
    for first, rounds, count in segments(channels, LANES):
        with b.loop(rounds) as step:
            do(first + step * LANES, count)
