"""TVM's builder of functions, with what kernels write again and again; and what follows a kernel's sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LANES = 16  # output channels in a block
WORD = 32  # channels in a word of bits
WORTH_DIVIDING = 2**12  # elements of a loop that is worth several threads
LESS_EVEN = 0.9  # of the most that threads could gain, which is taken if other things speak for it
POWERS = 3  # of a parabola
IN_REGISTERS = 2 * LANES  # segments of a table
TABLE_ROW = 4  # numbers of a parabola, the last of them nothing


class Argument(NamedTuple):
    """A buffer that a function takes."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Frame:
    """What lies around a map of (height, width, channels): the padding of the layer that reads it, numbers for real zero."""

    shape: tuple[int, int, int]
    top: int
    bottom: int
    left: int
    right: int
    zero: int = 0

    @property
    def size(self) -> tuple[int, int, int]:
        """The height, width and channels of both together."""
        height, width, channels = self.shape
        return self.top + height + self.bottom, self.left + width + self.right, channels

    @property
    def _before(self) -> int:
        """Numbers before the map's first one."""
        return (self.top * self.size[1] + self.left) * self.shape[2]

    @property
    def _between(self) -> int:
        """Numbers between two rows."""
        return (self.left + self.right) * self.shape[2]

    def place(self, at: Any) -> Any:
        """Return where a number of the map is."""
        return at + at // (self.shape[1] * self.shape[2]) * self._between + self._before

    def fill(self, b: Builder, buffer: Any, dtype: str) -> None:
        """Write the code that writes it.

        Args:
            b: Builds the function.
            buffer: Of the map and what lies around it.
            dtype: Of a number.
        """

        def zeros(at: Any, count: int) -> None:
            pieces(b, count, lambda offset, lanes: b.put(buffer, at + offset, b.splat(self.zero, dtype, lanes), lanes))

        height, width, channels = self.shape
        zeros(0, self._before)
        if self._between:
            with b.loop(height - 1) as row:
                zeros(self._before + width * channels + row * self.size[1] * channels, self._between)
        end = self._before + ((height - 1) * self.size[1] + width) * channels
        zeros(end, math.prod(self.size) - end)


@dataclass(frozen=True)
class Planes:
    """How codes are written as bits: for every pixel and 32 channels a word of 32 bits for each bit of a code.

    `positions` are those of the bits in a byte; `turned` says that the byte's highest bit is turned first (two's complement).
    """

    positions: tuple[int, ...]
    turned: bool

    def write(self, b: Builder, words: Any, place: Any, half: Any, codes: Any) -> None:
        """Write the code that writes 16 channels: a half of each word.

        Args:
            b: Builds the function.
            words: The buffer.
            place: The first word of the 32 channels.
            half: 0 or 1.
            codes: A vector of 16 bytes.
        """
        T = b.T
        # All processors that there are kernels for have the lower half of a word first in memory.
        halves = T.decl_buffer(
            (2 * words.shape[0],), "uint16", data=words.data, elem_offset=2 * words.elem_offset, offset_factor=1
        )
        whole = codes.astype("int32x16")
        if self.turned:
            whole = whole ^ b.splat(128, "int32")
        whole = T.bind(whole)
        for plane, position in enumerate(self.positions):
            is_set = (whole & b.splat(2**position, "int32")) != b.splat(0, "int32")
            # 16 truth values are as many bits, which `T.reinterpret` doesn't know.
            T.buffer_store(halves, T.call_intrin("uint16", "tirx.reinterpret", is_set), [2 * (place + plane) + half])


@dataclass(frozen=True)
class Output:
    """What an epilogue writes of its real values v, with f = `factor`.

    codes   bytes clip(round(f v), low, high) + zero; 16-bit numbers where bytes don't hold them
    sign    bytes 2 where v >= 0, else 0: one bipolar bit
    fixed   32-bit integers clip(round(f v), low, high), at most 2^30 in size
    float   f v
    sums    the integer sums themselves, before any epilogue

    With a `frame` they are written into the middle of it, and it around them. As `planes` codes are written as bits; a frame's
    channels are then words.
    """

    kind: str = "codes"
    factor: float = 1.0
    low: int = 0
    high: int = 255
    zero: int = 0
    frame: Frame | None = None
    planes: Planes | None = None

    @property
    def stored(self) -> str:
        """The type of its buffer."""
        if self.planes is not None:
            return "uint32"
        return self.dtype

    @property
    def dtype(self) -> str:
        """What a number is."""
        if self.kind == "codes" and self.high + self.zero > 255:
            return "uint16"
        return {"codes": "uint8", "sign": "uint8", "fixed": "int32", "float": "float32", "sums": "int32"}[self.kind]


@dataclass(frozen=True)
class Residual:
    """Something to be added: real value = factor * (stored number - zero)."""

    dtype: str
    factor: float
    zero: int = 0


@dataclass(frozen=True)
class Table:
    """A function as so many parabolas, one behind the other: of v, with t = v inverse + start, that of i = floor(t).

    The first and the last go on to infinity. With r = v inverse + (start - i), it is (c2 r + c1) r + c0. Every operation is
    rounded once. With `in_registers` there are at most 32, and instructions of AVX-512 pick from them.
    """

    segments: int
    inverse: float
    start: float
    in_registers: bool = False

    @property
    def size(self) -> int:
        """How many numbers its buffer has."""
        if self.in_registers:
            return POWERS * up(self.segments, LANES)
        return TABLE_ROW * self.segments

    def constants(self, coefficients: NDArray[np.floating]) -> dict[str, NDArray[Any]]:
        """Return its coefficients, of (segments, 3), as a buffer.

        There are four numbers for each segment, which are read at once; in registers all of one power are side by side.
        """
        numbers = coefficients.astype(np.float32)
        if self.in_registers:
            missing = up(self.segments, LANES) - self.segments
            return {"table": np.pad(numbers.T, ((0, 0), (0, missing))).reshape(-1)}
        return {"table": np.pad(numbers, ((0, 0), (0, TABLE_ROW - POWERS))).reshape(-1)}


@dataclass(frozen=True)
class Epilogue:
    """v = clip(f(sum * multiplier[c] + offset[c] + residuals), low, high), and what is written of it.

    In float32: the sum is rounded, then every product is added with one rounding (`conv.fma`). f(v) is v; with `slope` it is
    v slope[c] where v < 0; with a `table` it is that.
    """

    outputs: tuple[Output, ...] = (Output(),)
    residuals: tuple[Residual, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    slope: bool = False
    table: Table | None = None

    def arguments(self, shape: tuple[int, ...]) -> list[Argument]:
        """List the buffers of an epilogue on a map whose channels are last.

        Its factors can be read 16 at a time from any on.
        """
        made = [Argument(f"residual{i}", shape, residual.dtype) for i, residual in enumerate(self.residuals)]
        for i, output in enumerate(self.outputs):
            size = shape
            if output.frame is not None:
                size = output.frame.size
            made.append(Argument(f"output{i}", size, output.stored))
        if any(output.kind != "sums" for output in self.outputs):
            names = ["multiplier", "offset"]
            if self.slope:
                names.append("slope")
            made += [Argument(name, (shape[-1] + LANES,), "float32") for name in names]
        if self.table is not None:
            made.append(Argument("table", (self.table.size,), "float32"))
        return made

    def constants(self, multiplier: NDArray[np.floating], offset: NDArray[np.floating]) -> dict[str, NDArray[Any]]:
        """Return its factors, of (channels,), as buffers."""
        return {**per_channel("multiplier", multiplier), **per_channel("offset", offset)}


def per_channel(name: str, values: NDArray[np.floating]) -> dict[str, NDArray[Any]]:
    """Return numbers of (channels,) as a buffer that can be read 16 at a time from any on."""
    return {name: np.pad(values.astype(np.float32), (0, LANES))}


@dataclass(frozen=True)
class Shares:
    """Loops one behind the other that threads share: `loops` are (rounds, what one round costs).

    Each thread does what lies in its part of all that they cost together, round by round: by the middle of a round.
    """

    loops: tuple[tuple[int, int], ...]
    threads: int

    def first(self, loop: int, thread: Any) -> Any:
        """Return the first round of a loop that isn't done by a thread before this one.

        Args:
            loop: Which loop.
            thread: The thread's number, or an expression of TVM's.

        Returns:
            From 0 to all rounds.
        """
        rounds, cost = self.loops[loop]
        before = sum(count * each for count, each in self.loops[:loop])
        # Middles lie at (2 before + (2 round + 1) cost) / 2, and the thread begins at thread / threads of everything.
        distance = 2 * thread * self._total - self.threads * (2 * before + cost)
        least = (distance + 2 * self.threads * cost - 1) // (2 * self.threads * cost)
        if isinstance(thread, int):
            return min(max(least, 0), rounds)
        from tvm import tirx

        return tirx.min(tirx.max(least, 0), rounds)

    @property
    def _total(self) -> int:
        return sum(rounds * cost for rounds, cost in self.loops)

    @property
    def gain(self) -> float:
        """How many times as fast as one thread they are at most."""
        most = 0
        for thread in range(self.threads):
            done = 0
            for loop, (_, cost) in enumerate(self.loops):
                done += cost * (self.first(loop, thread + 1) - self.first(loop, thread))
            most = max(most, done)
        return self._total / most


class Builder:
    """TVM's builder, and what is written with it again and again.

    Threads go through a function together (`together`) and wait for each other behind every stage (`stage`). Within a stage
    they divide loops, and what writes anything is in such a loop, or is said to be done `once`.
    """

    def __init__(self) -> None:
        """Import TVM."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script import builder

        self.T: Any = builder
        self._ir = IRBuilder
        self._tile: _Tile | None = None
        self.divides = False  # whether threads divided anything
        self._alone = False  # whether one thread does what is written now

    @contextmanager
    def together(self, threads: int) -> Iterator[None]:
        """Let all threads go through what is written."""
        if threads == 1:
            yield
            return
        with self.T.attr(self.const(0, "int32"), "pragma_parallel_launch_point", self.const(1, "int32")):
            yield

    @contextmanager
    def stage(self, threads: int, divided: bool) -> Iterator[None]:
        """Let threads wait for each other behind what is written; one of them does it, unless it is `divided`."""
        if threads == 1:
            yield
            return
        with self.T.attr(self.const(0, "int32"), "pragma_parallel_barrier_when_finish", self.const(1, "int32")):
            if divided:
                yield
            else:
                with self.once(threads):
                    yield

    @contextmanager
    def once(self, threads: int) -> Iterator[None]:
        """Let one thread do what is written."""
        if threads == 1 or self._alone:
            yield
            return
        # Of a loop of one round the compiler would make none, and only what is in a parallel loop has memory of its own.
        with self.T.parallel(0, 2) as index, self.T.If(index == 0), self.T.Then():
            self._alone = True
            yield
            self._alone = False

    @contextmanager
    def share(self, shares: Shares, loop: int) -> Iterator[Any]:
        """Write one of the loops that threads share."""
        self.divides = True
        T = self.T
        with (
            T.parallel(0, shares.threads) as thread,
            T.serial(shares.first(loop, thread), shares.first(loop, thread + 1)) as index,
        ):
            yield index

    def function(self, symbol: str, arguments: Sequence[Argument], body: Callable[[dict[str, Any]], None]) -> Any:
        """Build a function.

        Args:
            symbol: Its name.
            arguments: The buffers that it takes.
            body: Writes its code, given the buffers by name.

        Returns:
            TVM's function.
        """
        T = self.T
        with self._ir() as ir, T.prim_func():
            T.func_name(symbol)
            T.func_attr({"global_symbol": symbol, "tirx.noalias": True, "tir.noalias": True})
            body({a.name: T.arg(a.name, T.buffer((math.prod(a.shape),), a.dtype)) for a in arguments})
        return ir.get()

    def view(self, buffer: Any, start: int, shape: tuple[int, ...], dtype: str) -> Any:
        """Take a part of a buffer for a buffer by itself.

        Args:
            buffer: The whole of it.
            start: The first element.
            shape: Of the part.
            dtype: Of an element, in TVM's words.

        Returns:
            The part, a buffer of one dimension.
        """
        size = math.prod(shape)
        return self.T.decl_buffer((size,), dtype, data=buffer.data, elem_offset=start, offset_factor=1)

    @contextmanager
    def loop(self, extent: int, threads: int = 1) -> Iterator[Any]:
        """Write a loop, run by several threads if there are; one round of it isn't a loop."""
        if extent == 1:
            with self.once(threads):
                yield 0
        elif threads > 1:
            self.divides = True
            with self.T.parallel(0, extent) as index:
                yield index
        else:
            with self.T.serial(0, extent) as index:
                yield index

    def share_if(self, divided: bool, shares: Shares, loop: int) -> AbstractContextManager[Any]:
        """Write one of some loops: one that threads share, or that each of them goes through.

        Args:
            divided: Which.
            shares: The loops.
            loop: Which of them.

        Returns:
            What gives the round.
        """
        if divided:
            return self.share(shares, loop)
        return self.loop(shares.loops[loop][0])

    def vector(self, buffer: Any, at: Any, lanes: int) -> Any:
        """Read so many lanes from a place on.

        Args:
            buffer: What is read.
            at: The first element.
            lanes: How many.

        Returns:
            The vector, or the element where there is one lane.
        """
        return buffer[self._lanes(at, lanes)]

    def put(self, buffer: Any, at: Any, value: Any, lanes: int) -> None:
        """Write so many lanes from a place on.

        Args:
            buffer: What is written to.
            at: The first element.
            value: A vector.
            lanes: How many it has.
        """
        self.T.buffer_store(buffer, value, [self._lanes(at, lanes)])

    def _lanes(self, at: Any, lanes: int) -> Any:
        if lanes == 1:
            return at
        return self.T.ramp(at, 1, lanes)

    def const(self, value: float, dtype: str) -> Any:
        """Return a number of a type."""
        from tvm import tirx

        return tirx.const(value, dtype)

    def put_some(self, buffer: Any, at: Any, value: Any, dtype: str, count: int) -> None:
        """Write the first of the 16 lanes of a vector; as powers of two from a place beside, where there are fewer.

        Args:
            buffer: What is written to.
            at: The first element.
            value: A vector of 16 lanes.
            dtype: Of an element.
            count: How many lanes are written; 16 or more: all.
        """
        if count >= LANES:
            self.put(buffer, at, value, LANES)
            return
        beside = self.T.alloc_buffer((LANES,), dtype)
        self.put(beside, 0, value, LANES)
        start = 0
        for size in (8, 4, 2, 1):
            if count & size:
                self.put(buffer, at + start, self.vector(beside, start, size), size)
                start += size

    def where(self, conditions: Sequence[Any], value: Callable[[], Any], otherwise: Any) -> Any:
        """Return a value that is looked up only where all conditions are true.

        Args:
            conditions: What must be true; those that always are may be the Python value.
            value: Gives the value.
            otherwise: What is returned elsewhere.

        Returns:
            The one or the other.
        """
        made = value()
        for condition in conditions:
            if condition is not True:
                made = self.T.if_then_else(condition, made, otherwise)
        return made

    def splat(self, value: float, dtype: str, lanes: int = LANES) -> Any:
        """Return a vector that holds the same number in all lanes.

        Args:
            value: The number.
            dtype: Of an element.
            lanes: How many.

        Returns:
            The vector, or the number where there is one lane.
        """
        if lanes == 1:
            return self.const(value, dtype)
        return self.T.broadcast(self.const(value, dtype), lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """Return x * y + z, rounded once: said so, as the compiler would do it here and not there.

        Args:
            x: A vector of 16 float32.
            y: Likewise.
            z: Likewise.

        Returns:
            Likewise.
        """
        return self.T.bind(self.T.call_llvm_pure_intrin("float32x16", "llvm.fma.v16f32", x, y, z))

    def epilogue(self, buffers: dict[str, Any], epilogue: Epilogue, sums: Any, channel: Any, at: Any, count: int) -> None:
        """Write 16 sums to the outputs.

        Args:
            buffers: What the function takes.
            epilogue: What follows the sums.
            sums: Of int32 or float32.
            channel: The first sum's.
            at: Where in the outputs the first one goes.
            count: How many of the channels exist.
        """
        T = self.T
        splat = self.splat
        kinds = [output.kind for output in epilogue.outputs]
        if kinds == ["sums"]:
            self.put_some(buffers["output0"], at, sums, "int32", count)
            return
        assert "sums" not in kinds
        scale, offset = (self.vector(buffers[name], channel, LANES) for name in ("multiplier", "offset"))
        v = self.fma(sums.astype("float32x16"), scale, offset)
        for index, residual in enumerate(epilogue.residuals):
            stored = self.some(buffers[f"residual{index}"], at, residual.dtype, count)
            v = self.fma(self.real(stored, residual.dtype, residual.zero), splat(residual.factor, "float32"), v)
        if epilogue.slope:
            slope = self.vector(buffers["slope"], channel, LANES)
            v = T.bind(v)
            v = T.Select(v >= splat(0.0, "float32"), v, v * slope)
        if epilogue.table is None:
            self._finish(buffers, epilogue, v, at, count)
        elif self._tile is None:
            self._finish(buffers, epilogue, self.looked_up(buffers["table"], epilogue.table, v), at, count)
        else:
            self._tile.add(v, lambda looked_up: self._finish(buffers, epilogue, looked_up, at, count))

    @contextmanager
    def tile(self, buffers: dict[str, Any], epilogue: Epilogue, most: int) -> Iterator[None]:
        """Let the epilogues that are written here look up their functions in one loop: the code for it is long.

        Args:
            buffers: What the function takes.
            epilogue: The epilogue of all of them.
            most: How many they are at most.

        Yields:
            Nothing.
        """
        table = epilogue.table
        if table is None or table.in_registers or most == 1:
            yield
            return
        values = self.T.alloc_buffer((most * LANES,), "float32")
        self._tile = tile = _Tile(self, values)
        yield
        self._tile = None
        with self.loop(len(tile.finish)) as index:
            looked_up = self.looked_up(buffers["table"], table, self.vector(values, index * LANES, LANES))
            self.put(values, index * LANES, looked_up, LANES)
        for index, finish in enumerate(tile.finish):
            finish(self.T.bind(self.vector(values, index * LANES, LANES)))

    def _finish(self, buffers: dict[str, Any], epilogue: Epilogue, v: Any, at: Any, count: int) -> None:
        """Write 16 values that a function was applied to."""
        T = self.T
        splat = self.splat
        if epilogue.low > -math.inf:
            v = T.max(v, splat(epilogue.low, "float32"))
        if epilogue.high < math.inf:
            v = T.min(v, splat(epilogue.high, "float32"))
        v = T.bind(v)
        for index, output in enumerate(epilogue.outputs):
            made = v
            if output.factor != 1:
                made = v * splat(output.factor, "float32")
            place = at
            if output.planes is not None:
                place = at // WORD * len(output.planes.positions)
            if output.frame is not None:
                place = output.frame.place(place)
            if output.planes is not None:
                half = at // LANES % 2
                output.planes.write(self, buffers[f"output{index}"], place, half, self.rounded(made, output))
                continue
            self.put_some(buffers[f"output{index}"], place, self.rounded(made, output), output.dtype, count)

    def real(self, stored: Any, dtype: str, zero: int = 0) -> Any:
        """Return 16 stored numbers as float32, less the number that stands for zero.

        Args:
            stored: A vector of 16.
            dtype: Of an element.
            zero: What stands for real zero.

        Returns:
            A vector of 16 float32.
        """
        if dtype == "float32":
            return stored
        whole = stored.astype("int32x16")
        if zero:
            whole = whole - self.splat(zero, "int32")
        return self.T.bind(whole.astype("float32x16"))

    def looked_up(self, coefficients: Any, table: Table, v: Any) -> Any:
        """Return a function of 16 values.

        Args:
            coefficients: The buffer of `Table.constants`.
            table: What it is of.
            v: A vector of 16 float32.

        Returns:
            Likewise.
        """
        T = self.T
        splat = self.splat
        v = T.bind(v)
        inverse = splat(table.inverse, "float32")
        start = splat(table.start, "float32")
        t = self.fma(v, inverse, start)
        floor = T.call_llvm_pure_intrin("float32x16", "llvm.floor.v16f32", t)
        # A value that isn't a number is in the first: no index is outside of the buffer.
        floor = T.max(floor, splat(0.0, "float32"))
        floor = T.bind(T.min(floor, splat(table.segments - 1.0, "float32")))
        r = self.fma(v, inverse, start - floor)
        c0, c1, c2 = self._coefficients(coefficients, table, T.bind(floor.astype("int32x16")))
        return self.fma(self.fma(c2, r, c1), r, c0)

    def _coefficients(self, coefficients: Any, table: Table, segment: Any) -> list[Any]:
        """Return the coefficients of 16 segments: a vector for each power."""
        T = self.T
        if not table.in_registers:
            index = T.alloc_buffer((LANES,), "int32")
            self.put(index, 0, segment, LANES)
            rows = [T.bind(self.vector(coefficients, index[lane] * TABLE_ROW, TABLE_ROW)) for lane in range(LANES)]
            return [T.Shuffle(rows, [TABLE_ROW * lane + power for lane in range(LANES)]) for power in range(POWERS)]
        size = up(table.segments, LANES)
        picked = []
        for power in range(POWERS):
            first = self.vector(coefficients, power * size, LANES)
            if size == LANES:
                found = T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", first, segment)
            else:
                second = self.vector(coefficients, power * size + LANES, LANES)
                found = T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", first, segment, second)
            picked.append(T.bind(found))
        return picked

    def rounded(self, values: Any, output: Output) -> Any:
        """Return 16 values as an output stores them."""
        T = self.T
        splat = self.splat
        if output.kind == "float":
            return values
        if output.kind == "sign":
            return T.Select(values >= splat(0.0, "float32"), splat(2, "int32"), splat(0, "int32")).astype("uint8x16")
        values = T.max(T.min(values, splat(output.high, "float32")), splat(output.low, "float32"))
        # Rounds and converts in one instruction, where there is one.
        made = T.call_llvm_pure_intrin("int32x16", "llvm.lrint.v16i32.v16f32", values)
        if output.kind == "fixed":
            return made
        if output.zero:
            made = made + splat(output.zero, "int32")
        return made.astype(f"{output.dtype}x16")

    def some(self, buffer: Any, at: Any, dtype: str, count: int) -> Any:
        """Return 16 lanes of which only the first `count` are read.

        Args:
            buffer: What is read.
            at: The first element.
            dtype: Of an element.
            count: How many are there to be read; 16 or more: all lanes.

        Returns:
            A vector of 16 lanes, 0 in those that aren't read.
        """
        if count >= LANES:
            return self.vector(buffer, at, LANES)
        beside = self.T.alloc_buffer((LANES,), dtype)
        self.put(beside, 0, self.splat(0, dtype), LANES)
        for lane in range(count):
            self.T.buffer_store(beside, buffer[at + lane], [lane])
        return self.vector(beside, 0, LANES)


class _Tile:
    """Values that wait for their function, and what is done with each afterwards."""

    def __init__(self, b: Builder, values: Any) -> None:
        self.finish: list[Callable[[Any], None]] = []
        self._b = b
        self._values = values

    def add(self, v: Any, finish: Callable[[Any], None]) -> None:
        self._b.put(self._values, len(self.finish) * LANES, v, LANES)
        self.finish.append(finish)


class Code:
    """Functions that are called in order, each with the buffers that `arguments` names; equal names are equal buffers.

    `input`, `output0`.. and `residual0`.. come from and go to other code: images with their channels last. `multiplier`,
    `offset` and others that `workspace` doesn't have are constants. The others are between the functions.
    """

    threads: int = 1
    constant = ("weights", "multiplier", "offset", "slope", "table", "initial", "border", "rows", "columns")

    def arguments(self) -> dict[str, list[Argument]]:
        """List what each function takes, by its stage."""
        raise NotImplementedError

    def functions(self, symbol: str) -> dict[str, Any]:
        """Build the TVM functions, by their symbols in the order to be called."""
        made = {}
        for stage, arguments in self.arguments().items():
            b = Builder()

            def body(given: dict[str, Any], b: Builder = b, stage: str = stage) -> None:
                write_stages(b, self.threads, [(self, stage)], [given])

            made[f"{symbol}_{stage}"] = b.function(f"{symbol}_{stage}", arguments, body)
        return made

    def is_shared(self, stage: str) -> bool:
        """Say whether threads divide a stage, by writing it once."""
        if self.threads == 1:
            return False
        b = Builder()
        b.function("trial", self.arguments()[stage], functools.partial(self.emit, b, stage))
        return b.divides

    def emit(self, b: Builder, stage: str, buffers: dict[str, Any]) -> None:
        """Write the code of a stage into the function that is being built.

        Args:
            b: Builds the function.
            stage: Which one.
            buffers: What the function takes, by name.
        """
        getattr(self, f"_{stage}")(b, buffers)
        epilogue = getattr(self, "epilogue", None)
        if stage != "main" or epilogue is None:
            return
        for index, output in enumerate(epilogue.outputs):
            if output.frame is not None:
                with b.once(self.threads):
                    output.frame.fill(b, buffers[f"output{index}"], output.stored)

    def workspace(self) -> dict[str, Argument]:
        """List the buffers between the functions, by name."""
        every = [a for arguments in self.arguments().values() for a in arguments]
        return {
            a.name: a for a in every if not a.name.startswith(("input", "output", "residual")) and a.name not in self.constant
        }


def write_stages(b: Builder, threads: int, stages: Sequence[tuple[Code, str]], buffers: Sequence[dict[str, Any]]) -> None:
    """Write stages one after the other, as threads go through them together if there are several.

    Args:
        b: Builds the function.
        threads: How many there are.
        stages: Code, and which stage of it.
        buffers: For each what it takes, by name.
    """
    divided = [code.is_shared(stage) for code, stage in stages]
    if not any(divided):
        threads = 1
    with b.together(threads):
        for (code, stage), shared, given in zip(stages, divided, buffers, strict=True):
            with b.stage(threads, shared):
                code.emit(b, stage, given)


def up(count: int, to: int) -> int:
    """Return the next multiple."""
    return -(-count // to) * to


def pieces(b: Builder, count: int, do: Callable[[Any, int], None]) -> None:
    """Go over bytes 64 at a time, and the rest in powers of two.

    Args:
        b: Builds the function.
        count: Bytes in all.
        do: Writes the code for some: told the first byte, and how many.
    """
    whole, rest = divmod(count, 64)
    if whole:
        with b.loop(whole) as index:
            do(index * 64, 64)
    start = whole * 64
    for size in (32, 16, 8, 4, 2, 1):
        if rest & size:
            do(start, size)
            start += size


def segments(total: int, size: int) -> list[tuple[int, int, int]]:
    """Return (start, rounds, size) of a loop over `total` in steps of `size`, and of what is left over."""
    rounds, rest = divmod(total, size)
    made = []
    if rounds:
        made.append((0, rounds, size))
    if rest:
        made.append((rounds * size, 1, rest))
    return made


def useful(threads: int, elements: int) -> int:
    """Return how many threads a loop over so many elements is worth: to wait for each other takes as long as some thousand."""
    if elements < WORTH_DIVIDING:
        return 1
    return threads
