"""Low-bit convolutions as TVM functions: what they compute is `conv.reference`, bit for bit.

Four ways to multiply, one loop nest around them (`Direct`), which goes over the image in channels-last order without an
im2col and holds the sums of a tile of pixels by blocks of 16 output channels in registers:

    bytes     weights of 8 bits, four products summed by one instruction where the processor has one (VNNI, dot product)
    packed    the same with weights of 4 or 2 bits in memory, unpacked in registers: for layers that wait for weights
    float     float32, one product at a time: for layers that a policy leaves as they are
    bits      weights and activations as planes of bits, 32 channels to a word: and, count, add for every pair of planes.
              The planes' weights are applied in Horner's fashion over the sum of their positions, so that one set of sums
              serves all pairs (Cowan et al., "Automatic generation of high-performance quantized machine learning
              kernels", CGO 2020). Two's complement makes the highest plane negative and nothing else special. A bipolar bit,
              -1 or +1, is 2u - 1, and where both sides are bipolar, an exclusive or counts the products that are -1
              (Rastegari et al., "XNOR-Net", ECCV 2016).

Depthwise convolutions have kernels of their own (`depthwise`). `candidates` says which ones are worth measuring for a layer.

What follows the sums (`Epilogue`) is fused behind them: scale and offset per channel, residual additions, clipping, and
rounding half to even to the codes of the next layer. Sums don't wrap: `Conv` refuses what might exceed 32 bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.storage import BITS
from hw_models.tvm_cpu.builder import (
    LANES,
    LESS_EVEN,
    WORD,
    WORTH_DIVIDING,
    Argument,
    Builder,
    Epilogue,
    Frame,
    Output,
    Planes,
    Shares,
    segments,
    useful,
)
from hw_models.tvm_cpu.conv import Conv, border_sums, border_taps
from hw_models.tvm_cpu.cpu import Cpu
from hw_models.tvm_cpu.depthwise import Depthwise, DepthwiseDot
from hw_models.tvm_cpu.kernel import Kernel

VERSION = 5  # of the code that is generated: what was measured with another isn't comparable
# Pairs of planes up to which a kernel on bits is tried: measured, it wins up to 4 with VNNI or with AVX2, and up to 6 in fully
# connected layers, which wait for their weights.
MOST_PAIRS = 8


@dataclass(frozen=True)
class Direct(Kernel):
    """A convolution over the image as it lies.

    `how` is `bytes`, `packed`, `bits` or `float`, `tile` pixels down and across by blocks of 16 output channels.
    """

    how: str = "bytes"
    tile: tuple[int, int, int] = (1, 4, 4)

    @property
    def name(self) -> str:
        """Its family, what it is for, and its tile."""
        kinds = {"bytes": "int8", "packed": f"packed w{self.w_bits}", "bits": f"bits w{self.w_bits}a{self.a_bits}"}
        return f"{kinds.get(self.how, self.how)} {'x'.join(map(str, self.tile))}"

    # Sizes

    @property
    def _bipolar(self) -> bool:
        return self.signed and self.a_bits == 1

    @property
    def _biased(self) -> bool:
        """Whether bytes are those of two's complement with the sign turned."""
        return self.signed and not self._bipolar

    @property
    def _inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    @property
    def _outputs(self) -> int:
        return self.conv.out_channels // self.conv.groups

    @property
    def _blocks(self) -> int:
        """Of a group."""
        return -(-self._outputs // LANES)

    @property
    def _chunks(self) -> int:
        """Of the channels of a group: what one step of the innermost loop takes of a pixel."""
        return -(-self._inputs // self._chunk)

    @property
    def _chunk(self) -> int:
        """Channels of a chunk."""
        return {"bits": WORD, "float": 1}.get(self.how, 4)

    @property
    def _elements(self) -> int:
        """Of a chunk, in the image: bytes, words or numbers."""
        if self.how == "bits":
            return self.a_bits
        return self._chunk

    @property
    def _parts(self) -> int:
        """Chunks whose weights share a vector."""
        if self.how == "packed":
            return 8 // self.w_bits
        return 1

    @property
    def _runs(self) -> tuple[int, int]:
        """Columns of the kernel that are gone through one by one, and chunks that lie one behind the other in each."""
        conv = self.conv
        if conv.groups == 1 and conv.dilation[1] == 1:
            return 1, conv.kernel[1] * self._chunks
        return conv.kernel[1], self._chunks

    @property
    def _vectors_of_run(self) -> int:
        return -(-self._runs[1] // self._parts)

    @property
    def _prepared(self) -> bool:
        """Whether the image is read as it comes."""
        if self.how == "bits":
            return self.framed
        return (self.framed or not self.conv.padded) and self._inputs % self._chunk == 0

    def planes(self) -> Planes | None:
        """Return how whoever writes the input can write it as bits; see `Kernel.planes`."""
        conv = self.conv
        if self.how != "bits" or self.zero or self._inputs % WORD or conv.batch > 1:
            return None
        positions = tuple(range(self.a_bits))
        if self._bipolar:
            positions = (1,)
        return Planes(positions, self._biased)

    def frame(self) -> Frame | None:
        """Return what whoever writes the input can put around it; see `Kernel.frame`. Of planes there is always one."""
        if self.how != "bits":
            return super().frame()
        if self.framed or self.planes() is None:
            return None
        high, wide = self._padded_size
        (height, width), (top, left) = self.conv.input_size, self.conv.padding
        sides = top, high - top - height, left, wide - left - width
        return Frame((height, width, self.conv.groups * self._chunks * self.a_bits), *sides)

    @property
    def _border(self) -> bool:
        return self.how == "bits" and self._bipolar and self.conv.padded

    @property
    def _row_sums(self) -> bool:
        return self.how == "bits" and self.w_bits == 1 and not self._bipolar

    @property
    def _initial(self) -> bool:
        if self.how == "float":
            return False
        if self.how == "bits":
            return self.zero != 0 or (self._bipolar and not self._border)  # which includes it
        return self._zero != 0 or self.cpu.dot == "sdot"

    def arguments(self) -> dict[str, list[Argument]]:
        """List the buffers of what comes before the convolution, if anything does, and of the convolution."""
        conv = self.conv
        high, wide = self._padded_size
        height, width = conv.output_size
        image = self._image()
        stages: dict[str, list[Argument]] = {}
        if not self._prepared:
            stages["prepare"] = [self._input(), image]
        main = [image, self._weights()]
        if self._row_sums:
            sums = Argument("row_sums", (conv.batch, height, width, conv.groups), "int32")
            stages["sums"] = [image, sums]
            if not self._flat:
                pixels = Argument("pixel_sums", (conv.batch, high, wide, conv.groups), "int32")
                stages["sums"] = [image, pixels, sums]
            main.append(sums)
        if self._initial:
            main.append(Argument("initial", (conv.groups, self._blocks * LANES), "int32"))
        if self._border:
            borders = len(border_taps(conv)[0])
            main.append(Argument("border", (borders, conv.groups, self._blocks * LANES), "int32"))
            main += [Argument("rows", (height,), "int32"), Argument("columns", (width,), "int32")]
        stages["main"] = main + self._ends()
        return stages

    def _image(self) -> Argument:
        """The image as the convolution reads it."""
        conv = self.conv
        if self.how == "bits":
            name = "planes"
            if self.framed:
                name = "input"
            return Argument(name, (conv.batch, *self._padded_size, conv.groups, self._chunks, self.a_bits), "uint32")
        if self._prepared:
            return self._input()
        channels = self._chunks * self._chunk
        return Argument("padded", (conv.batch, *self._padded_size, conv.groups, channels), self._dtype)

    def _weights(self) -> Argument:
        conv = self.conv
        vectors = conv.groups * self._blocks * conv.kernel[0] * self._runs[0] * self._vectors_of_run
        if self.how == "bits":
            return Argument("weights", (vectors, self.w_bits, LANES), "uint32")
        if self.how == "float":
            return Argument("weights", (vectors, LANES), "float32")
        if self.cpu.dot == "madd":
            return Argument("weights", (vectors, 2, LANES, 2), "int16")
        return Argument("weights", (vectors, LANES * 4), "int8")

    # Weights

    def _constants(self, weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        conv = self.conv
        kh, kw = conv.kernel
        made: dict[str, NDArray[Any]] = {}
        lanes = self._blocks * LANES

        def by_group(values: NDArray[Any]) -> NDArray[Any]:
            """(..., C_out) to (..., groups, blocks * 16)."""
            split = values.reshape(*values.shape[:-1], conv.groups, self._outputs)
            return np.pad(split, [(0, 0)] * (split.ndim - 1) + [(0, lanes - self._outputs)])

        size = self._chunk
        w = np.zeros((conv.groups, lanes, self._chunks * size, kh, kw), weights.dtype)
        w[:, : self._outputs, : self._inputs] = weights.reshape(conv.groups, self._outputs, self._inputs, kh, kw)
        # group, block, ky, run, chunk of the run, lane, channel of the chunk
        w = w.reshape(conv.groups, self._blocks, LANES, self._chunks, size, kh, kw).transpose(0, 1, 5, 6, 3, 2, 4)
        w = w.reshape(conv.groups, self._blocks, kh, self._runs[0], self._runs[1], LANES, size)
        if self.how == "bits":
            made["weights"] = self._planes(w)
            if self._bipolar and self.w_bits == 1:
                made["initial"] = by_group(np.full(conv.out_channels, conv.taps))
            elif self._bipolar:
                made["initial"] = by_group(-weights.sum((1, 2, 3)))
            elif self.zero:
                made["initial"] = by_group(-self.zero * weights.sum((1, 2, 3)))
            if self._border:
                border, made["rows"], made["columns"] = border_sums(conv, weights)
                made["border"] = by_group(border) + made.pop("initial")
            return made
        if self.how == "float":
            return {"weights": w}
        if self.how == "packed":
            parts = self._parts
            rest = -self._runs[1] % parts
            w = np.pad(w, [(0, 0)] * 4 + [(0, rest), (0, 0), (0, 0)])
            w = w.reshape(*w.shape[:4], -1, parts, LANES, 4) & (2**self.w_bits - 1)
            w = (w << (self.w_bits * np.arange(parts))[:, None, None]).sum(-3).astype(np.uint8).view(np.int8)
        elif self.cpu.dot == "madd":
            w = w.reshape(*w.shape[:5], LANES, 2, 2).swapaxes(-3, -2)
        elif self.cpu.dot == "plain":
            w = w.swapaxes(-1, -2)
        made["weights"] = w
        made["initial"] = by_group(weights.sum((1, 2, 3)) * (128 * (self.cpu.dot == "sdot") - self._zero))
        if self.how == "packed":
            made["initial"] <<= 8 - self.w_bits
        return made

    def _planes(self, w: NDArray[Any]) -> NDArray[np.uint32]:
        """The bits of weights whose last axis are the channels of a chunk, a word for each plane."""
        if self.w_bits == 1:
            # A weight of +1 is a bit that is set; channels that aren't there have none.
            w = w > 0
        codes = w.astype(np.uint32)
        planes = (codes[..., None, :, :] >> np.arange(self.w_bits, dtype=np.uint32)[:, None, None]) & 1
        words = (planes.astype(np.uint64) << np.arange(WORD, dtype=np.uint64)).sum(-1)
        return words.astype(np.uint32).reshape(-1)

    def unpack(self, b: Builder, buffers: dict[str, Any], weight: Callable[[Any], Any]) -> None:
        """Write the code that makes the buffers which come from the weights; see `Kernel.unpack`."""
        conv = self.conv
        length = self._runs[1]
        with (
            b.loop(conv.groups * self._blocks) as block,
            b.loop(conv.kernel[0]) as ky,
            b.loop(self._runs[0]) as kx,
            b.loop(self._vectors_of_run) as step,
        ):
            run = (block * conv.kernel[0] + ky) * self._runs[0] + kx
            vector = run * self._vectors_of_run + step

            def element(part: int, lane: Any, channel: Any) -> Any:
                chunk = step * self._parts + part
                return self._element(b, weight, block, ky, kx * length, chunk, lane, channel)

            if self.how == "bits":
                self._unpack_planes(b, buffers["weights"], vector, element)
            else:
                self._unpack_vector(b, buffers["weights"], vector, element)
        if self._initial or self._border:
            with b.loop(conv.groups * self._blocks * LANES) as lane:
                self._unpack_initial(b, buffers, weight, lane)

    def _element(
        self, b: Builder, weight: Callable[[Any], Any], block: Any, ky: Any, start: Any, chunk: Any, lane: Any, channel: Any
    ) -> Any:
        """The weight at a place of the layout, 0 where none is.

        Args:
            b: Builds the function.
            weight: Reads a weight by its place.
            block: Of 16 output channels, counted over all groups.
            ky: Row of the kernel.
            start: Of the run, in chunks of a row.
            chunk: Within the run.
            lane: Of the block.
            channel: Within the chunk.

        Returns:
            The weight.
        """
        kh, kw = self.conv.kernel
        output = block % self._blocks * LANES + lane
        kx = (start + chunk) // self._chunks
        inside = (start + chunk) % self._chunks * self._chunk + channel
        at = (block // self._blocks * self._outputs + output) * self._inputs + inside
        conditions: list[Any] = []
        if self._outputs % LANES:
            conditions.append(output < self._outputs)
        if self._inputs % self._chunk:
            conditions.append(inside < self._inputs)
        if self._runs[1] % self._parts:
            conditions.append(chunk < self._runs[1])
        nothing = b.const(0, "int32")
        if self.how == "float":
            nothing = b.const(0.0, "float32")
        return b.where(conditions, lambda: weight((at * kh + ky) * kw + kx), nothing)

    def _unpack_vector(self, b: Builder, made: Any, vector: Any, element: Callable[[int, Any, Any], Any]) -> None:
        size = self._chunk
        with b.loop(LANES) as lane, b.loop(size) as channel:
            place = lane * size + channel
            if self.how == "bytes" and self.cpu.dot == "madd":
                place = (channel // 2 * LANES + lane) * 2 + channel % 2
            elif self.how == "bytes" and self.cpu.dot == "plain":
                place = channel * LANES + lane
            value = element(0, lane, channel)
            if self.how == "packed":
                value = b.const(0, "int32")
                for part in range(self._parts):
                    value = value | ((element(part, lane, channel) & (2**self.w_bits - 1)) << (self.w_bits * part))
            b.T.buffer_store(made, value.astype(self._weights().dtype), [vector * LANES * size + place])

    def _unpack_planes(self, b: Builder, made: Any, vector: Any, element: Callable[[int, Any, Any], Any]) -> None:
        T = b.T
        with b.loop(LANES) as lane:
            words = T.alloc_buffer((self.w_bits,), "uint32")
            for plane in range(self.w_bits):
                T.buffer_store(words, b.const(0, "uint32"), [plane])
            with b.loop(WORD) as channel:
                value = T.bind(element(0, lane, channel))
                if self.w_bits == 1:
                    value = T.Select(value > 0, b.const(1, "int32"), b.const(0, "int32"))
                for plane in range(self.w_bits):
                    bit = ((value >> plane) & 1).astype("uint32") << channel.astype("uint32")
                    T.buffer_store(words, words[plane] | bit, [plane])
            for plane in range(self.w_bits):
                T.buffer_store(made, words[plane], [(vector * self.w_bits + plane) * LANES + lane])

    def _unpack_initial(self, b: Builder, buffers: dict[str, Any], weight: Callable[[Any], Any], lane: Any) -> None:
        """What the sums of a channel begin at, and what borders add: sums of its weights."""
        conv = self.conv
        T = b.T
        lanes = self._blocks * LANES
        of_tap = conv.kernel[0] * conv.kernel[1]
        output = lane % lanes
        first = (lane // lanes * self._outputs + output) * self._inputs * of_tap
        sums = T.alloc_buffer((of_tap,), "int32")
        for tap in range(of_tap):
            T.buffer_store(sums, b.const(0, "int32"), [tap])
        start = T.alloc_buffer((1,), "int32")
        T.buffer_store(start, b.const(0, "int32"), [0])
        with T.If(output < self._outputs), T.Then():
            with b.loop(self._inputs) as channel, b.loop(of_tap) as tap:
                T.buffer_store(sums, sums[tap] + weight(first + channel * of_tap + tap), [tap])
            total = sums[0]
            for tap in range(1, of_tap):
                total = total + sums[tap]
            T.buffer_store(start, self._begin(b, total), [0])
        if self._initial:
            T.buffer_store(buffers["initial"], start[0], [lane])
        if self._border:
            for border, taps in enumerate(border_taps(conv)[0]):
                total = start[0]
                for outside in np.flatnonzero(taps):
                    total = total + sums[int(outside)]
                T.buffer_store(buffers["border"], total, [border * conv.groups * lanes + lane])

    def _begin(self, b: Builder, total: Any) -> Any:
        """What the sums of a channel whose weights sum up to `total` begin at."""
        if self.how == "bits":
            if self._bipolar and self.w_bits == 1:
                return b.const(self.conv.taps, "int32")
            if self._bipolar:
                return total * -1
            return total * -self.zero
        begin = total * (128 * (self.cpu.dot == "sdot") - self._zero)
        if self.how == "packed":
            return begin << (8 - self.w_bits)
        return begin

    # Code

    def _prepare(self, b: Builder, buffers: dict[str, Any]) -> None:
        if self.how == "bits":
            self._pack(b, buffers)
        else:
            self._pad(b, buffers, self.conv.groups, self._chunk)

    def _pack(self, b: Builder, buffers: dict[str, Any]) -> None:
        """Bytes to planes of bits: a word for each plane of 32 channels. Padding has the bits of zero set."""
        conv = self.conv
        T = b.T
        height, width = conv.input_size
        high, wide = self._padded_size
        top, left = conv.padding
        pixel = conv.groups * self._chunks * self.a_bits
        source = buffers["input"]
        planes = buffers["planes"]
        no_bits = 0  # a byte without any
        if self._biased:
            no_bits = 128

        def clear(at: Any, count: int) -> None:
            if count and self.zero:
                self._fill_with_zero(b, planes, at, count // (self._chunks * self.a_bits))
            elif count:
                with b.loop(count) as index:
                    T.buffer_store(planes, b.const(0, "uint32"), [at + index])

        of_rows = of_columns = 1
        if height > 1:
            of_rows = self.threads
        else:
            of_columns = useful(self.threads, width * conv.in_channels)
        with b.loop(conv.batch) as image:
            with b.once(self.threads):
                for start, count in ((0, top), (top + height, high - top - height)):
                    clear((image * high + start) * wide * pixel, count * wide * pixel)
            with b.loop(height, of_rows) as y:
                line = (image * high + y + top) * wide * pixel
                clear(line, left * pixel)
                clear(line + (left + width) * pixel, (wide - left - width) * pixel)
                with b.loop(width * conv.groups, of_columns) as x:
                    start = (image * height + y) * width * conv.in_channels + x * self._inputs
                    to = line + left * pixel + x * self._chunks * self.a_bits
                    whole, rest = divmod(self._inputs, WORD)
                    if whole:
                        with b.loop(whole) as chunk:
                            self._words(b, b.vector(source, start + chunk * WORD, WORD), planes, to + chunk * self.a_bits)
                    if rest:
                        some = T.alloc_buffer((WORD,), "uint8")
                        b.put(some, 0, b.splat(no_bits, "uint8", WORD), WORD)
                        done = 0
                        for size in (16, 8, 4, 2, 1):
                            if rest & size:
                                b.put(some, done, b.vector(source, start + whole * WORD + done, size), size)
                                done += size
                        self._words(b, b.vector(some, 0, WORD), planes, to + whole * self.a_bits)

    def _fill_with_zero(self, b: Builder, planes: Any, at: Any, count: int) -> None:
        """Write the bits of a zero point into the channels of so many groups of pixels; those that don't exist have none."""
        whole, rest = divmod(self._inputs, WORD)

        def chunk(start: Any, word: int) -> None:
            for plane in range(self.a_bits):
                bits = word * (self.zero >> plane & 1)
                b.T.buffer_store(planes, b.const(bits, "uint32"), [start + plane])

        with b.loop(count) as group:
            start = at + group * self._chunks * self.a_bits
            if whole:
                with b.loop(whole) as index:
                    chunk(start + index * self.a_bits, 2**WORD - 1)
            if rest:
                chunk(start + whole * self.a_bits, 2**rest - 1)

    def _words(self, b: Builder, x: Any, planes: Any, at: Any) -> None:
        """Write the bits of 32 bytes, a word for each plane."""
        T = b.T
        if self._biased:
            x = x ^ b.splat(128, "uint8", WORD)
        for plane in range(self.a_bits):
            position = plane
            if self._bipolar:
                position = 1
            if self.cpu.gathers_signs:
                # Bytes have no shift of their own: what comes over from a neighbour is below the top bit.
                words = T.reinterpret("uint32x8", x) << b.splat(7 - position, "uint32", 8)
                word = T.call_llvm_pure_intrin("int32", "llvm.x86.avx2.pmovmskb", T.reinterpret("int8x32", words))
                word = T.reinterpret("uint32", word)
            else:
                # Eight bytes of 0 or 1 become one: the product adds up shifts that put byte i's bit to bit 56 + i.
                eights = (T.reinterpret("uint64x4", x) >> b.splat(position, "uint64", 4)) & b.splat(
                    0x0101010101010101, "uint64", 4
                )
                bits = ((eights * b.splat(0x0102040810204080, "uint64", 4)) >> b.splat(56, "uint64", 4)).astype("uint8x4")
                word = T.reinterpret("uint32", bits)
            T.buffer_store(planes, word, [at + plane])

    def _sums(self, b: Builder, buffers: dict[str, Any]) -> None:
        """The sum of the activations that meet each output, for weights of one bit: w = 2 bit - 1."""
        conv = self.conv
        T = b.T
        high, wide = self._padded_size
        height, width = conv.output_size
        kh, kw = conv.kernel
        planes = buffers[self._image().name]
        worth = [2**plane for plane in range(self.a_bits)]
        if self.signed:
            worth[-1] *= -1
        sums = buffers["row_sums"]
        if not self._flat:
            sums = buffers["pixel_sums"]
        pixels = conv.batch * high * wide * conv.groups
        threads = useful(self.threads, pixels * self._inputs)
        with b.stage(threads, True), b.loop(pixels, threads) as pixel:
            # As many words at once as hold a whole number of chunks.
            at_once = LANES // self.a_bits
            whole = self._chunks // at_once
            total = b.const(0, "int32")
            if whole:
                lanes = at_once * self.a_bits
                counts = T.alloc_buffer((lanes,), "int32")
                b.put(counts, 0, b.splat(0, "int32", lanes), lanes)
                worths = T.Shuffle([b.const(value, "int32") for value in worth * at_once], list(range(lanes)))
                with b.loop(whole) as step:
                    words = b.vector(planes, pixel * self._chunks * self.a_bits + step * lanes, lanes)
                    ones = T.popcount(words).astype(f"int32x{lanes}") * worths
                    b.put(counts, 0, b.vector(counts, 0, lanes) + ones, lanes)
                total = T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.add.v{lanes}i32", b.vector(counts, 0, lanes))
            for chunk in range(whole * at_once, self._chunks):
                for plane in range(self.a_bits):
                    word = planes[(pixel * self._chunks + chunk) * self.a_bits + plane]
                    total = total + T.popcount(word).astype("int32") * worth[plane]
            T.buffer_store(sums, total, [pixel])
        if self._flat:
            return
        with b.loop(conv.batch) as image, b.loop(height, threads) as y, b.loop(width) as x, b.loop(conv.groups) as group:
            total = b.const(0, "int32")
            for ky in range(kh):
                for kx in range(kw):
                    row = image * high + y * conv.stride[0] + ky * conv.dilation[0]
                    column = x * conv.stride[1] + kx * conv.dilation[1]
                    total = total + sums[(row * wide + column) * conv.groups + group]
            T.buffer_store(buffers["row_sums"], total, [((image * height + y) * width + x) * conv.groups + group])

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        conv = self.conv
        down, across, blocks = self.tile
        images = conv.batch
        height, width = conv.output_size
        if self._flat:
            width = images * height * width
            images = height = 1
        spans = segments(self._blocks, blocks)
        partial = self._outputs % LANES
        if partial and spans[-1][1] > 1:
            # The last block has channels that don't exist: its code is another.
            start, rounds, size = spans[-1]
            spans[-1:] = [(start, rounds - 1, size), (start + (rounds - 1) * size, 1, size)]
        rows = segments(height, down)
        columns = segments(width, across)
        shares = {
            axis: Shares(tuple((rounds, size) for _, rounds, size in of), self.threads)
            for axis, of in (("blocks", spans), ("rows", rows), ("columns", columns))
        }
        divided = self._divided(shares)
        with b.loop(images) as image, b.loop(conv.groups) as group:
            for index, (first, _, size) in enumerate(spans):
                count = LANES
                if partial and index == len(spans) - 1:
                    count = partial
                with b.share_if(divided == "blocks", shares["blocks"], index) as step:
                    block = first + step * size
                    for y_index, (y0, _, of_rows) in enumerate(rows):
                        with b.share_if(divided == "rows", shares["rows"], y_index) as y_step:
                            for x_index, (x0, _, of_columns) in enumerate(columns):
                                with b.share_if(divided == "columns", shares["columns"], x_index) as x_step:
                                    corner = image, y0 + y_step * of_rows, x0 + x_step * of_columns
                                    self._tile(b, buffers, group, block, size, count, corner, (of_rows, of_columns))

    def _divided(self, shares: dict[str, Shares]) -> str:
        """Say which loops threads divide, of those over blocks, rows and columns.

        Outputs of neighbouring blocks are in the same cache lines, so that rows are better; unless most of what is read are
        weights: divided by blocks, each thread has its own.
        """
        conv = self.conv
        if self.threads == 1 or conv.macs < WORTH_DIVIDING:
            return ""
        axes = ["rows", "columns", "blocks"]
        pixels = conv.batch * conv.input_size[0] * conv.input_size[1]
        if conv.taps * conv.out_channels * self.w_bits > 2 * pixels * conv.in_channels * self.a_bits:
            axes = ["blocks", "rows", "columns"]
        most = max(some.gain for some in shares.values())
        if most == 1:
            return ""
        return next(axis for axis in axes if shares[axis].gain > LESS_EVEN * most)

    @property
    def _flat(self) -> bool:
        """Whether all pixels of all images can be taken for one row."""
        conv = self.conv
        return conv.kernel == (1, 1) and conv.stride == (1, 1) and conv.input_size == conv.output_size

    def _tile(
        self,
        b: Builder,
        buffers: dict[str, Any],
        group: Any,
        block: Any,
        blocks: int,
        count: int,
        corner: tuple[Any, Any, Any],
        tile: tuple[int, int],
    ) -> None:
        """The outputs of a tile of pixels, from `corner` on, in some blocks of channels; the last has `count` of them."""
        conv = self.conv
        T = b.T
        image, y, x = corner
        high, wide = self._padded_size
        height, width = conv.output_size
        if self._flat:
            wide = conv.batch * high * wide
            width = conv.batch * height * width
            high = height = 1
        pixels = list(np.ndindex(*tile))
        first = (group * self._blocks + block) * LANES
        sums = self._start(b, buffers, len(pixels), blocks, first)
        pixel = conv.groups * self._chunks * self._elements
        outputs = range(blocks)
        steps = conv.kernel[0] * self._runs[0] * self._vectors_of_run
        shifts = range(1)
        if self.how == "bits":
            shifts = range(self.w_bits + self.a_bits - 2, -1, -1)
        for shift in shifts:
            if shift != shifts[0]:
                for s in sums:
                    for at in range(0, blocks * LANES, LANES):
                        b.put(s, at, b.vector(s, at, LANES) << b.splat(1, "int32"), LANES)
            with b.loop(conv.kernel[0]) as ky, b.loop(self._runs[0]) as kx:
                row = (image * high + y * conv.stride[0] + ky * conv.dilation[0]) * wide
                start_at = (row + x * conv.stride[1] + kx * conv.dilation[1]) * pixel + group * self._chunks * self._elements
                weight_at = (group * self._blocks + block) * steps + (ky * self._runs[0] + kx) * self._vectors_of_run
                vectors = [weight_at + index * steps for index in outputs]
                places = [start_at + (dy * conv.stride[0] * wide + dx * conv.stride[1]) * pixel for dy, dx in pixels]
                whole, rest = divmod(self._runs[1], self._parts)
                if whole:
                    with b.loop(whole) as step:
                        self._step(b, buffers, sums, vectors, places, step, self._parts, shift)
                if rest:
                    self._step(b, buffers, sums, vectors, places, whole, rest, shift)
        with b.tile(buffers, self.epilogue, len(pixels) * blocks):
            for (dy, dx), s in zip(pixels, sums, strict=True):
                at = (image * height + y + dy) * width + x + dx
                for index in outputs:
                    value = b.vector(s, index * LANES, LANES)
                    value = T.bind(self._true(b, buffers, value, first + index * LANES, group, at, y + dy, x + dx))
                    channel = group * self._outputs + (block + index) * LANES
                    some = LANES
                    if index == blocks - 1:
                        some = count
                    b.epilogue(buffers, self.epilogue, value, channel, at * conv.out_channels + channel, some)

    def _start(self, b: Builder, buffers: dict[str, Any], pixels: int, blocks: int, first: Any) -> list[Any]:
        """Sums for each pixel of some blocks, from channel `first` on, with what they begin at."""
        dtype = "int32"
        if self.how == "float":
            dtype = "float32"
        # One array for each pixel: of a larger one the compiler would not make registers.
        sums = [b.T.alloc_buffer((blocks * LANES,), dtype) for _ in range(pixels)]
        start = b.splat(0, dtype)
        for at in range(0, blocks * LANES, LANES):
            if self._initial and self.how != "bits":
                start = b.vector(buffers["initial"], first + at, LANES)
            for s in sums:
                b.put(s, at, start, LANES)
        return sums

    def _step(
        self,
        b: Builder,
        buffers: dict[str, Any],
        sums: list[Any],
        vectors: list[Any],
        places: list[Any],
        step: Any,
        parts: int,
        shift: int,
    ) -> None:
        """One vector of weights of each block, by the channels it belongs to, of each pixel."""
        vectors = [vector + step for vector in vectors]
        places = [place + step * self._parts * self._elements for place in places]
        if self.how == "bits":
            self._count(b, buffers, sums, vectors, places, shift)
        else:
            self._multiply(b, buffers, sums, vectors, places, parts)

    def _count(
        self, b: Builder, buffers: dict[str, Any], sums: list[Any], vectors: list[Any], places: list[Any], shift: int
    ) -> None:
        """Add up the products of all pairs of planes whose positions sum up to `shift`."""
        T = b.T
        image = buffers[self._image().name]
        weights = buffers["weights"]
        for i in range(self.w_bits):
            j = shift - i
            if not 0 <= j < self.a_bits:
                continue
            negative_weight = self.w_bits > 1 and i == self.w_bits - 1
            negative_image = self.signed and not self._bipolar and j == self.a_bits - 1
            add = operator.add
            if negative_weight != negative_image:
                add = operator.sub
            multiply = operator.and_
            if self._bipolar and self.w_bits == 1:
                multiply = operator.xor
            for s, place in zip(sums, places, strict=True):
                x = T.broadcast(image[place + j], LANES)
                for index, vector in enumerate(vectors):
                    w = b.vector(weights, (vector * self.w_bits + i) * LANES, LANES)
                    ones = T.popcount(multiply(w, x)).astype("int32x16")
                    b.put(s, index * LANES, add(b.vector(s, index * LANES, LANES), ones), LANES)

    def _multiply(
        self, b: Builder, buffers: dict[str, Any], sums: list[Any], vectors: list[Any], places: list[Any], parts: int
    ) -> None:
        """Add the products of four channels, in each of `parts` chunks."""
        image = buffers[self._image().name]
        weights = buffers["weights"]
        if self.how == "float":
            for s, place in zip(sums, places, strict=True):
                for index, vector in enumerate(vectors):
                    w = b.vector(weights, vector * LANES, LANES)
                    at = index * LANES
                    b.put(s, at, b.fma(b.T.broadcast(image[place], LANES), w, b.vector(s, at, LANES)), LANES)
            return
        for part in range(parts):
            for s, place in zip(sums, places, strict=True):
                x = b.T.reinterpret("uint32", b.vector(image, place + part * 4, 4))
                for index, vector in enumerate(vectors):
                    _DOTS[self.cpu.dot](self, b, s, index * LANES, x, weights, vector, part)

    def _vnni(self, b: Builder, s: Any, at: int, x: Any, weights: Any, vector: Any, part: int) -> None:
        T = b.T
        w = b.vector(weights, vector * 64, 64)
        if self.how == "packed":
            # Weights at the top of their bytes: the sums come out so many times as large.
            words = T.reinterpret("uint32x16", w) << b.splat(8 - self.w_bits * (part + 1), "uint32")
            top = 0x01010101 * (256 - 2 ** (8 - self.w_bits))
            w = T.reinterpret("int8x64", words & b.splat(top, "uint32"))
        x = T.reinterpret("uint8x64", T.broadcast(x, LANES))
        dot = T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", b.vector(s, at, LANES), x, w)
        b.put(s, at, dot, LANES)

    def _sdot(self, b: Builder, s: Any, at: int, x: Any, weights: Any, vector: Any, part: int) -> None:
        T = b.T
        signed = T.reinterpret("int8x16", T.broadcast(x ^ b.const(0x80808080, "uint32"), 4))
        for lane in range(0, LANES, 4):
            w = b.vector(weights, vector * 64 + lane * 4, 16)
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            dot = T.call_llvm_pure_intrin("int32x4", name, b.vector(s, at + lane, 4), signed, w)
            b.put(s, at + lane, dot, 4)

    def _madd(self, b: Builder, s: Any, at: int, x: Any, weights: Any, vector: Any, part: int) -> None:
        """Two products of 16 bits at a time."""
        T = b.T
        name, lanes = self.cpu.madd
        for pair in range(2):
            low = (x >> b.const(16 * pair, "uint32")) & b.const(0xFF, "uint32")
            high = (x >> b.const(16 * pair + 8, "uint32")) & b.const(0xFF, "uint32")
            both = T.reinterpret(f"int16x{2 * lanes}", T.broadcast(low | (high << b.const(16, "uint32")), lanes))
            for lane in range(0, LANES, lanes):
                w = b.vector(weights, ((vector * 2 + pair) * LANES + lane) * 2, 2 * lanes)
                products = T.call_llvm_pure_intrin(f"int32x{lanes}", name, both, w)
                b.put(s, at + lane, b.vector(s, at + lane, lanes) + products, lanes)

    def _plain(self, b: Builder, s: Any, at: int, x: Any, weights: Any, vector: Any, part: int) -> None:
        for byte in range(4):
            value = ((x >> b.const(8 * byte, "uint32")) & b.const(0xFF, "uint32")).astype("int32")
            w = b.vector(weights, vector * 64 + byte * LANES, LANES).astype("int32x16")
            b.put(s, at, b.vector(s, at, LANES) + b.T.broadcast(value, LANES) * w, LANES)

    def _true(self, b: Builder, buffers: dict[str, Any], raw: Any, lane: Any, group: Any, at: Any, y: Any, x: Any) -> Any:
        """The sum of products, from what was counted."""
        conv = self.conv
        if self.how == "packed":
            return raw >> b.splat(8 - self.w_bits, "int32")
        if self.how in ("bytes", "float"):
            return raw
        if self._bipolar:
            raw = raw << b.splat(1, "int32")
            if self._border:
                border = buffers["rows"][y] + buffers["columns"][x]
                start = b.vector(buffers["border"], border * conv.groups * self._blocks * LANES + lane, LANES)
            else:
                start = b.vector(buffers["initial"], lane, LANES)
            if self.w_bits == 1:
                return start - raw
            return start + raw
        if self._row_sums:
            total = buffers["row_sums"][at * conv.groups + group]
            raw = (raw << b.splat(1, "int32")) - b.T.broadcast(total, LANES)
        if self._initial:
            raw = raw + b.vector(buffers["initial"], lane, LANES)
        return raw


_DOTS = {"vnni": Direct._vnni, "sdot": Direct._sdot, "madd": Direct._madd, "plain": Direct._plain}


def candidates(
    conv: Conv, w_bits: int, a_bits: int, signed: bool, cpu: Cpu, *, epilogue: Epilogue | None = None, tiles: int = 2
) -> list[Kernel]:
    """List the kernels worth measuring for a layer at some bits: the best of each kind, by a simple model of instructions.

    Args:
        conv: The layer's sizes.
        w_bits: Width of the weights.
        a_bits: Width of the activations.
        signed: Whether activations may be negative.
        cpu: What they are compiled for.
        epilogue: What follows the sums; None is codes of 8 bits.
        tiles: How many of each kind.

    Returns:
        The kernels; each serves these bits.

    Raises:
        ValueError: For bits out of range.
    """
    for bits in (w_bits, a_bits):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= BITS:
            raise ValueError(f"bits must be an integer from 1 to {BITS}, not {bits!r}")
    epilogue = epilogue or Epilogue((Output(factor=2.0**-10),))
    if conv.groups == conv.in_channels == conv.out_channels:
        return _depthwise_candidates(conv, w_bits, a_bits, signed, cpu, epilogue, tiles)
    widest = BITS
    if signed and a_bits == 1:
        widest = 1  # a bipolar bit's bytes are others
    ways = [("bytes", BITS, widest)]
    if cpu.dot == "vnni" and w_bits <= 4:
        packed_bits = 4
        if w_bits <= 2:
            packed_bits = 2
        ways.append(("packed", packed_bits, widest))
    if w_bits * a_bits <= MOST_PAIRS:
        ways.append(("bits", w_bits, a_bits))
    made: list[Kernel] = []
    for how, w, a in ways:
        some = [Direct(conv, w, a, signed, cpu, how, tile, epilogue=epilogue) for tile in _tiles(conv, how, cpu)]
        made += sorted(some, key=_instructions)[:tiles]
    return made


def _depthwise_candidates(
    conv: Conv, w_bits: int, a_bits: int, signed: bool, cpu: Cpu, epilogue: Epilogue, tiles: int
) -> list[Kernel]:
    """The same for a depthwise convolution, each for the widest bits that its code serves."""
    made: list[Kernel] = []
    wide = not Depthwise.fits(conv, w_bits, a_bits, signed)
    bipolar = signed and a_bits == 1  # whose bytes are others
    if DepthwiseDot.can(conv, cpu):
        widest = BITS
        if bipolar:
            widest = 1
        made += [DepthwiseDot(conv, BITS, widest, signed, cpu, tile=t, epilogue=epilogue) for t in (6, 12)[:tiles]]
        if wide:
            return made
    while a_bits < BITS and not bipolar and (wide or Depthwise.fits(conv, w_bits, a_bits + 1, signed)):
        a_bits += 1
    while w_bits < BITS and (wide or Depthwise.fits(conv, w_bits + 1, a_bits, signed)):
        w_bits += 1
    sums = "int16"
    if wide:
        sums = "int32"
    plain = [Depthwise(conv, w_bits, a_bits, signed, cpu, sums, tile, epilogue=epilogue) for tile in (4, 7)[:tiles]]
    return plain + made


def float_kernel(conv: Conv, cpu: Cpu, epilogue: Epilogue) -> Kernel:
    """Return the kernel for a layer that is left in float32.

    Args:
        conv: The layer.
        cpu: The processor.
        epilogue: What becomes of its sums.

    Returns:
        The one that takes the fewest instructions.
    """
    if conv.groups == conv.in_channels == conv.out_channels:
        return Depthwise(conv, 0, 0, False, cpu, "float32", epilogue=epilogue)
    made = [Direct(conv, 0, 0, False, cpu, "float", tile, epilogue=epilogue) for tile in _tiles(conv, "float", cpu)]
    return min(made, key=_instructions)


def _tiles(conv: Conv, how: str, cpu: Cpu) -> list[tuple[int, int, int]]:
    """Every tile whose sums fit into registers."""
    free = cpu.vectors - 1
    if how == "bits":
        free = cpu.vectors - 3
    height, width = conv.output_size
    if conv.kernel == (1, 1) and conv.stride == (1, 1) and conv.input_size == conv.output_size:
        width = conv.batch * height * width
        height = 1
    most = -(-(conv.out_channels // conv.groups) // LANES)
    found = []
    for blocks in (1, 2, 3, 4, 6, 8):
        for down in (1, 2, 3, 4):
            for across in (1, 2, 3, 4, 6, 7, 8, 14, 16, 28):
                # Sums, one weight for each block (none is kept if there is one pixel only), and the image's own.
                registers = down * across * blocks + 1
                if down * across > 1:
                    registers = down * across * blocks + blocks
                whole = across == width or (down == 1 and across < width)
                if blocks <= most and down <= height and whole and registers <= max(free, 2):
                    found.append((down, across, blocks))
    return found


def _instructions(kernel: Direct) -> float:
    """A rough count of instructions, for choosing between tiles."""
    conv = kernel.conv
    down, across, blocks = kernel.tile
    height, width = conv.output_size
    if kernel._flat:
        width = conv.batch * height * width
        height = 1
    loads = 1
    each = 1
    if kernel.how == "bits":
        loads = kernel.w_bits * kernel.a_bits
        each = 3 * loads
    steps = conv.kernel[0] * kernel._runs[0] * kernel._runs[1]
    total = 0.0
    for _, block_rounds, size in segments(kernel._blocks, blocks):
        for _, y_rounds, rows in segments(height, down):
            for _, x_rounds, columns in segments(width, across):
                pixels = rows * columns
                # Less than eight sums at a time wait for each other.
                busy = max(pixels * size, 8)
                work = steps * (busy * each + loads * (pixels + size)) + 12 * pixels * size + 8
                total += block_rounds * y_rounds * x_rounds * work
    return total
