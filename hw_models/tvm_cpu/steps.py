"""What a network does between its convolutions: quantizing its input, adding, pooling, and rounding again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hw_models.tvm_cpu.builder import LANES, Argument, Builder, Code, Epilogue, Output, segments, useful
from hw_models.workload import Size

Shape = tuple[int, int, int]  # height, width, channels
ENTRIES = 256  # of a byte


@dataclass(frozen=True)
class Interleave(Code):
    """An image of float32 with its channels first, as networks are given it, to one with its channels last.

    As it is, or as codes of x / scale (the output's factor isn't looked at: torch divides).
    """

    shape: Shape
    output: Output
    scale: float = 1.0
    threads: int = 1

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
            with b.loop(rounds, useful(self.threads, height * width * channels)) as step:
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
class Stored:
    """How a map is stored: its sizes, the type of its numbers, and the number that stands for real zero."""

    shape: Shape
    dtype: str
    zero: int = 0

    def read(self, b: Builder, buffer: Any, pixel: Any, channel: Any, count: int) -> Any:
        """Return 16 numbers of a pixel as float32.

        Args:
            b: Builds the function.
            buffer: The map.
            pixel: Which one.
            channel: The first one.
            count: How many channels there are to be read.

        Returns:
            A vector.
        """
        stored = b.some(buffer, pixel * self.shape[2] + channel, self.dtype, count)
        return b.real(stored, self.dtype, self.zero)


@dataclass(frozen=True)
class Elementwise(Code):
    """An epilogue on a map."""

    image: Stored
    epilogue: Epilogue
    threads: int = 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List the map and what the epilogue takes."""
        shape = self.image.shape
        return {"main": [Argument("input", shape, self.image.dtype), *self.epilogue.arguments(shape)]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        def block(pixel: Any, channel: Any, at: Any, count: int) -> None:
            values = self.image.read(b, buffers["input"], pixel, channel, count)
            b.epilogue(buffers, self.epilogue, values, channel, at, count)

        _pixels(b, self.image.shape, self.threads, block)


@dataclass(frozen=True)
class Product(Code):
    """The products of a map with another one, with a number for each channel or with one for each pixel, and an epilogue."""

    first: Stored
    second: Stored
    epilogue: Epilogue
    threads: int = 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List both maps and what the epilogue takes."""
        maps = [Argument(f"input{i}", x.shape, x.dtype) for i, x in enumerate((self.first, self.second))]
        return {"main": [*maps, *self.epilogue.arguments(self.first.shape)]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        height, width, _ = self.second.shape

        def block(pixel: Any, channel: Any, at: Any, count: int) -> None:
            x = self.first.read(b, buffers["input0"], pixel, channel, count)
            if self.second.shape == self.first.shape:
                y = self.second.read(b, buffers["input1"], pixel, channel, count)
            elif (height, width) == (1, 1):
                y = self.second.read(b, buffers["input1"], 0, channel, count)
            else:
                y = b.real(b.T.broadcast(buffers["input1"][pixel], LANES), self.second.dtype, self.second.zero)
            b.epilogue(buffers, self.epilogue, b.T.bind(x * y), channel, at, count)

        _pixels(b, self.first.shape, self.threads, block)


@dataclass(frozen=True)
class Lookup(Code):
    """Bytes, each replaced by the entry of a table of 256, for as many outputs as there are tables."""

    elements: int
    dtypes: tuple[str, ...]
    threads: int = 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List the bytes, the tables and what is written."""
        made = [Argument("input", (self.elements,), "uint8")]
        made += [Argument(f"entries{i}", (ENTRIES,), dtype) for i, dtype in enumerate(self.dtypes)]
        made += [Argument(f"output{i}", (self.elements,), dtype) for i, dtype in enumerate(self.dtypes)]
        return {"main": made}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        def block(at: Any, count: int) -> None:
            for lane in range(count):
                index = b.T.bind(buffers["input"][at + lane].astype("int32"))
                for i in range(len(self.dtypes)):
                    b.T.buffer_store(buffers[f"output{i}"], buffers[f"entries{i}"][index], [at + lane])

        for first, rounds, count in segments(self.elements, LANES):
            with b.loop(rounds, useful(self.threads, self.elements)) as step:
                block(first + step * LANES, count)


@dataclass(frozen=True)
class Resize(Code):
    """Values between four neighbours, and an epilogue: bilinear upsampling.

    Row y of the result lies between two rows of the image, `rows` (two for each), with the weight `row_weights` of the second;
    columns likewise. In float32: a + (b - a) weight in one rounding, above, below, and between the two.
    """

    image: Stored
    output_size: Size
    epilogue: Epilogue
    threads: int = 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List the map, where it is looked at and what the epilogue takes."""
        height, width = self.output_size
        places = [Argument("rows", (height, 2), "int32"), Argument("columns", (width, 2), "int32")]
        places += [Argument("row_weights", (height,), "float32"), Argument("column_weights", (width,), "float32")]
        shape = (height, width, self.image.shape[2])
        return {
            "main": [Argument("input", self.image.shape, self.image.dtype), *places, *self.epilogue.arguments(shape)],
        }

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        T = b.T
        height, width = self.output_size
        channels = self.image.shape[2]
        work = height * width * channels
        with b.loop(height, useful(self.threads, work)) as y, b.loop(width) as x:
            down = T.broadcast(buffers["row_weights"][y], LANES)
            across = T.broadcast(buffers["column_weights"][x], LANES)

            def block(channel: Any, count: int) -> None:
                between = []
                for row in range(2):
                    line = buffers["rows"][2 * y + row] * self.image.shape[1]
                    pair = []
                    for column in range(2):
                        pixel = line + buffers["columns"][2 * x + column]
                        pair.append(T.bind(self.image.read(b, buffers["input"], pixel, channel, count)))
                    between.append(b.fma(pair[1] - pair[0], across, pair[0]))
                value = b.fma(between[1] - between[0], down, between[0])
                b.epilogue(buffers, self.epilogue, value, channel, (y * width + x) * channels + channel, count)

            _blocks(b, channels, block)


@dataclass(frozen=True)
class Pool(Code):
    """The largest (`max`), or the sum (`sum`), of the numbers in each window, and an epilogue.

    Without an epilogue the largest codes stay codes of their type. With `ranges` a window is not the same everywhere: row y of
    the result is of the rows from `rows[y, 0]` to `rows[y, 1]`, which isn't one of them, and columns likewise. With `divided`
    every sum is float32 and multiplied by its pixel's factor.
    """

    kind: str
    image: Stored
    output_size: Size
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    epilogue: Epilogue | None
    ranges: bool = False
    divided: bool = False
    threads: int = 1

    @property
    def _dtype(self) -> str:
        """What is compared, or summed."""
        if self.epilogue is None or self.image.dtype == "float32":
            return self.image.dtype
        return "int32"

    def arguments(self) -> dict[str, list[Argument]]:
        """List the map and what is written of it."""
        height, width = self.output_size
        shape = (height, width, self.image.shape[2])
        places = []
        if self.ranges:
            places += [Argument("rows", (height, 2), "int32"), Argument("columns", (width, 2), "int32")]
        if self.divided:
            places.append(Argument("factors", (height, width), "float32"))
        ends = [Argument("output0", shape, self.image.dtype)]
        if self.epilogue is not None:
            ends = self.epilogue.arguments(shape)
        return {"main": [Argument("input", self.image.shape, self.image.dtype), *places, *ends]}

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        height, width = self.output_size
        work = height * width * self.image.shape[2] * self.kernel[0] * self.kernel[1]
        with b.loop(height, useful(self.threads, work)) as y, b.loop(width) as x:
            _blocks(b, self.image.shape[2], lambda channel, count: self._block(b, buffers, y, x, channel, count))

    def _block(self, b: Builder, buffers: dict[str, Any], y: Any, x: Any, channel: Any, count: int) -> None:
        T = b.T
        dtype = self._dtype
        width, channels = self.image.shape[1:]
        source = buffers["input"]
        found = T.alloc_buffer((LANES,), dtype)
        b.put(found, 0, b.splat(self._least, dtype), LANES)

        def take(row: Any, column: Any) -> None:
            stored = b.some(source, (row * width + column) * channels + channel, self.image.dtype, count)
            if self.image.dtype != dtype:
                stored = stored.astype("int32x16") - b.splat(self.image.zero, "int32")
            before = b.vector(found, 0, LANES)
            after = T.max
            if self.kind == "sum":
                after = operator.add
            b.put(found, 0, after(before, stored), LANES)

        if self.ranges:
            rows, columns = buffers["rows"], buffers["columns"]
            with T.serial(rows[2 * y], rows[2 * y + 1]) as row, T.serial(columns[2 * x], columns[2 * x + 1]) as column:
                take(row, column)
        else:
            self._window(b, y, x, take)
        pixel = y * self.output_size[1] + x
        at = pixel * channels + channel
        if self.epilogue is None:
            b.put_some(buffers["output0"], at, b.vector(found, 0, LANES), dtype, count)
            return
        sums = T.bind(b.vector(found, 0, LANES))
        if self.divided:
            sums = T.bind(sums.astype("float32x16") * T.broadcast(buffers["factors"][pixel], LANES))
        b.epilogue(buffers, self.epilogue, sums, channel, at, count)

    @property
    def _least(self) -> float:
        """What is there before the first number."""
        # Codes are numbers whose order is that of the values, and none is below 0.
        if self.kind == "sum" or self.epilogue is None:
            return 0
        if self._dtype == "float32":
            return -math.inf
        return -(2**31)

    def _window(self, b: Builder, y: Any, x: Any, take: Callable[[Any, Any], None]) -> None:
        height, width = self.image.shape[:2]
        with b.loop(self.kernel[0]) as ky, b.loop(self.kernel[1]) as kx:
            row = y * self.stride[0] - self.padding[0] + ky * self.dilation[0]
            column = x * self.stride[1] - self.padding[1] + kx * self.dilation[1]
            bounds = []
            if self._overhangs(0):
                bounds.append((row, height))
            if self._overhangs(1):
                bounds.append((column, width))
            _if_inside(b, bounds, lambda: take(row, column))

    def _overhangs(self, axis: int) -> bool:
        last = (self.output_size[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis]
        return self.padding[axis] > 0 or last - self.padding[axis] >= self.image.shape[axis]


def _if_inside(b: Builder, bounds: list[tuple[Any, int]], do: Callable[[], None]) -> None:
    if not bounds:
        do()
        return
    (index, size), *rest = bounds
    with b.T.If(b.T.And(index >= 0, index < size)), b.T.Then():
        _if_inside(b, rest, do)


def _pixels(b: Builder, shape: Shape, threads: int, do: Callable[[Any, Any, Any, int], None]) -> None:
    """Go over a map 16 channels of a pixel at a time: `do` is told the pixel, the first channel, its place and how many."""
    height, width, channels = shape
    with b.loop(height * width, useful(threads, height * width * channels)) as pixel:
        _blocks(b, channels, lambda channel, count: do(pixel, channel, pixel * channels + channel, count))


def _blocks(b: Builder, channels: int, do: Callable[[Any, int], None]) -> None:
    """Go over channels 16 at a time."""
    for first, rounds, count in segments(channels, LANES):
        with b.loop(rounds) as step:
            do(first + step * LANES, count)
