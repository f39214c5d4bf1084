"""BitFusion, the accelerator whose multipliers fuse to the width they are asked for (target `bitfusion` and its relatives).

N rows (input channels) x M columns (output channels) of fusion units, three double-buffered on-chip memories, and DRAM. All
rules are those of the authors' simulator, whose layer results they reproduce (cycles and traffic as integers).

Throughput. One unit does pf = int(F / max(a, 2)) int(F / max(w, 2)) products per cycle, F = `fusion_bits`: with F = 8, 1 bit
computes as 2, 3 as 4 and 5 to 7 as 8. Memory traffic uses the true bits, so those widths still save traffic. With F = 16 there
are operands of 16 bits, too, and pf = 64 where both have 2. No variant computes in float.

Compute cycles of a tile of b images, ow x oh outputs, ic input and oc output channels, kernel kw x kh:
    b ceil(oc / M) ow oh kw kh ceil(ic / (N pf))         convolution and linear (a linear layer has one output position)
    b ceil(oc / M) ow oh ceil(kw kh ic / (N pf))         the first convolution of a workload, as im2col
so that gains stop once N pf reaches the input channels.

Tiles in bits: weights ceil(kw kh ic / (N pf)) N pf oc w; activations, the input window of the tile, times ic b a (im2col:
ow oh kw kh ic b a); outputs ow oh ceil(oc / M) M b 32, read and written. Each must fit half its buffer.

Schedule: b, ow = oh and ic from min(2^k, dimension), oc from min(M 2^k, dimension) (im2col: min(2^k, dimension)), and every
order of the five loops over tiles; the smallest number of cycles wins, then the smallest energy. Walking the loops from the
inside, an operand stays on the chip while what it needs fits half its buffer; from there on every loop fetches it again.

    total  = compute + stall
    stall  = max(0, ceil((reads + writes - resident) / bw) - compute) + fill and drain of what is resident
    energy = compute cycles x core + buffer bits x SRAM energy per bit + DRAM bits x 15 pJ; no leakage

Energy is not monotone in bits (w4/a6 can cost more than w4/a8): another width takes another schedule.

Not known to the authors' simulator, and priced by these rules:
    grouped       each group is a layer of its own, one after the other
    depthwise     `depthwise: broadcast` takes the layer as one input channel to C_out outputs: the columns work on different
                  channels, and the input is fetched as one channel, which leaves out some traffic beside the 32-bit outputs.
                  `depthwise: per_channel` runs every channel as a layer of its own, one input to C_out / C_in outputs: one
                  column works, and the simulator moves the 32-bit outputs of the idle ones too. The array as published can't
                  give each column its own input, so the truth lies between. The targets use `broadcast`, because HAQ's authors
                  must have used something like it: they report 20.08 ms for MobileNetV1 at 8 bits and 11.09 ms after their
                  search, `bitfusion-small` gives 21.9 ms at 8 bits and 10.0 at 4 with it, but 58 and 46 per channel.
    rectangular   height and width keep their own kernel, stride and output size; a tile is 2^k x 2^k, cut to the output
    dilated       as many products as without, on a window as wide as the dilated kernel

Source: Sharma et al., "Bit Fusion: Bit-Level Dynamically Composable Architecture for Accelerating Deep Neural Networks",
ISCA 2018; SRAM energies are CACTI's at 45 nm.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hw_models.cost import CostTable, Floats, Integers
from hw_models.machine import Machine
from hw_models.widths import WIDTHS
from hw_models.workload import Call, Layer, Size, Workload

BOUNDS = ("compute", "DRAM")
OUTPUT_BITS = 32
COUNTERS = (
    "compute_cycles",
    "stall_cycles",
    "dram_read_bits",
    "dram_write_bits",
    "weight_buffer_read_bits",
    "weight_buffer_write_bits",
    "activation_buffer_read_bits",
    "activation_buffer_write_bits",
    "output_buffer_read_bits",
    "output_buffer_write_bits",
)
# The loops over tiles, and which of them change an operand's tile.
BATCH, WIDTH, HEIGHT, INPUTS, OUTPUTS = range(5)
DEPENDS = {
    "weights": (INPUTS, OUTPUTS),
    "activations": (BATCH, WIDTH, HEIGHT, INPUTS),
    "outputs": (BATCH, WIDTH, HEIGHT, OUTPUTS),
}
ORDERS = np.array(list(itertools.permutations(range(5))))  # from the innermost loop to the outermost
# Width and height play the same part: where they have as many tiles, one order of the two is enough.
SQUARE_ORDERS = ORDERS[(ORDERS == WIDTH).argmax(1) < (ORDERS == HEIGHT).argmax(1)]


class Shape(NamedTuple):
    """What the machine runs in one go: sizes as (height, width), channels of one group, images."""

    kernel: Size
    window: Size  # the kernel with its dilation
    stride: Size
    output: Size
    inputs: int
    outputs: int
    images: int
    im2col: bool


class Schedule(NamedTuple):
    """The best schedule of one shape at P pairs of widths: total cycles (P,), joules (P,), and COUNTERS (P,) by name."""

    cycles: Integers
    energy_j: Floats
    counters: dict[str, Integers]


class _Tilings(NamedTuple):
    """T tilings at P pairs of widths: `loops` (5, T) are the numbers of tiles, the rest has shape (P, T) or (T,)."""

    loops: Integers
    weights: Integers
    activations: Integers
    outputs: Integers
    compute: Integers
    smallest: Integers  # no order of the loops takes fewer cycles


class BitFusionTarget(Machine):
    """A BitFusion machine: every field is a key of its YAML file, with its unit in the name."""

    model: Literal["bitfusion"]
    array_rows: int = Field(gt=0, description="fusion units down the array: input channels")
    array_columns: int = Field(gt=0, description="fusion units across the array: output channels")
    fusion_bits: Literal[8, 16] = Field(description="widest operand that one fusion unit multiplies in a cycle")
    weight_buffer_bytes: int = Field(gt=0)
    activation_buffer_bytes: int = Field(gt=0)
    output_buffer_bytes: int = Field(gt=0)
    dram_bits_per_cycle: int = Field(gt=0)
    core_pj_per_cycle: float = Field(gt=0, allow_inf_nan=False, description="the whole array, at any width")
    weight_buffer_read_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    weight_buffer_write_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    activation_buffer_read_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    activation_buffer_write_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    output_buffer_read_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    output_buffer_write_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    dram_pj_per_bit: float = Field(gt=0, allow_inf_nan=False)
    depthwise: Literal["per_channel", "broadcast"] = Field(description="how a depthwise layer is run")

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Price every layer at every pair of widths, for one batch of images: cycles, latency, energy and traffic.

        `batch=None` takes the target's own. Raises ValueError for a batch that isn't a positive integer, and for a layer of
        which no tile fits the buffers.
        """
        images = self.images(workload, batch)
        widths = [width for width in WIDTHS if width <= self.fusion_bits]  # the first places of a cost table
        w, a = (grid.ravel() for grid in np.meshgrid(widths, widths, indexing="ij"))
        first = next((i for i, layer in enumerate(workload.layers) if layer.kind != "linear"), None)
        found: dict[Shape, Schedule] = {}  # networks repeat their layers
        pairs = (len(widths), len(widths))
        totals = {name: np.zeros((len(workload), *pairs), np.int64) for name in ("cycles", *COUNTERS)}
        energy = np.zeros((len(workload), *pairs))
        for i, layer in enumerate(workload.layers):
            for call in layer.calls:
                shape, repeats = self.shape(layer, call, images, im2col=i == first)
                if shape not in found:
                    try:
                        found[shape] = self.schedule(shape, w, a)
                    except ValueError as error:
                        raise ValueError(f"layer {layer.name!r} can't be priced on {self.name}: {error}") from error
                best = found[shape]
                totals["cycles"][i] += repeats * best.cycles.reshape(pairs)
                energy[i] += repeats * best.energy_j.reshape(pairs)
                for name in COUNTERS:
                    totals[name][i] += repeats * best.counters[name].reshape(pairs)
        cycles = totals.pop("cycles")
        traffic = (totals["dram_read_bits"] + totals["dram_write_bits"]) / self.dram_bits_per_cycle
        bound = (traffic > totals["compute_cycles"]).astype(np.int64)
        return self.table(workload, images, cycles, energy, bound, BOUNDS, totals)

    def shape(self, layer: Layer, call: Call, images: int, *, im2col: bool) -> tuple[Shape, int]:
        """Say what one call of a layer asks of the machine, and how many times over.

        Args:
            layer: The layer.
            call: Its sizes.
            images: The batch.
            im2col: Whether it is run as im2col, as the first convolution of a workload is.

        Returns:
            What is run in one go, and how often.
        """
        (kh, kw), (dh, dw) = layer.kernel, layer.dilation
        window = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
        if layer.kind == "linear":
            # Rows of a sequence are independent of each other, as the images of a batch are.
            rows = images * call.positions
            return Shape((1, 1), (1, 1), (1, 1), (1, 1), layer.in_channels, layer.out_channels, rows, False), 1
        inputs = layer.in_channels // layer.groups
        outputs = layer.out_channels // layer.groups
        repeats = layer.groups
        if layer.kind == "depthwise" and self.depthwise == "broadcast":
            outputs = layer.out_channels
            repeats = 1
        return Shape(layer.kernel, window, layer.stride, call.output_size, inputs, outputs, images, im2col), repeats

    def schedule(self, shape: Shape, w_bits: NDArray[np.integer], a_bits: NDArray[np.integer]) -> Schedule:
        """Find the best schedule of a shape at P pairs of widths.

        Args:
            shape: What is run.
            w_bits: Weight widths from 1 to `fusion_bits`, shape (P,).
            a_bits: Activation widths, the same shape.

        Returns:
            The schedule with the fewest cycles, and of these the one with the least energy, for each pair.

        Raises:
            ValueError: For bits out of range, and if no tile fits the buffers.
        """
        w = np.asarray(w_bits, np.int64)
        a = np.asarray(a_bits, np.int64)
        for bits in (w, a):
            if bits.min() < 1 or bits.max() > self.fusion_bits:
                raise ValueError(f"bits must be from 1 to {self.fusion_bits}, found {bits.min()} to {bits.max()}")
        tilings, tiles = self._tilings(shape, w, a)
        if (tilings.smallest == _NEVER).all(1).any():
            raise ValueError("no tile of it fits half the buffers")
        orders = ORDERS
        if (tilings.loops[WIDTH] == tilings.loops[HEIGHT]).all():
            orders = SQUARE_ORDERS
        # The most promising tiling of each pair gives a number of cycles that few others can beat.
        pairs = np.arange(len(w))
        reached = self._run(tilings, pairs, tilings.smallest.argmin(1), orders)[0].min(0)
        pair, tiling = np.nonzero(tilings.smallest <= reached[:, None])
        cycles, reads, writes, filled = self._run(tilings, pair, tiling, orders)
        best = np.full(len(w), _NEVER)
        np.minimum.at(best, pair, cycles.min(0))
        chosen = np.nonzero(cycles == best[pair])
        row = chosen[1]
        counters = self._count(shape, tiles, tilings, w, a, pair[row], tiling[row])
        counters["stall_cycles"] = cycles[chosen] - counters["compute_cycles"]
        counters["dram_read_bits"] = reads[chosen]
        counters["dram_write_bits"] = writes[chosen]
        counters["weight_buffer_write_bits"] = filled[0][chosen]
        counters["activation_buffer_write_bits"] = filled[1][chosen]
        counters["output_buffer_read_bits"] += writes[chosen]
        counters["output_buffer_write_bits"] += writes[chosen]
        energy = self._energy(counters)
        ranked = np.lexsort((energy, pair[row]))
        winners = ranked[np.searchsorted(pair[row][ranked], pairs)]
        return Schedule(best, energy[winners], {name: counters[name][winners] for name in COUNTERS})

    def _tilings(self, shape: Shape, w: Integers, a: Integers) -> tuple[_Tilings, Integers]:
        """All tilings whose outputs fit, and their sizes (b, oh, ow, ic, oc) as an array (5, T)."""
        kh, kw = shape.kernel
        oh, ow = shape.output
        sides = range(math.ceil(math.log2(max(oh, ow))) + 1)
        unit = self.array_columns
        if shape.im2col:
            unit = 1
        sizes = itertools.product(
            _sizes(shape.images),
            [(min(2**k, oh), min(2**k, ow)) for k in sides],
            _sizes(shape.inputs),
            _sizes(shape.outputs, unit),
        )
        tiles = np.array([(b, *side, ic, oc) for b, side, ic, oc in sizes], np.int64).T
        b, th, tw, ic, oc = tiles
        columns = _ceil(oc, self.array_columns)
        outputs = tw * th * columns * self.array_columns * b * OUTPUT_BITS
        fits = outputs <= self.output_buffer_bytes * 4
        tiles = tiles[:, fits]
        outputs = outputs[fits]
        columns = columns[fits]
        b, th, tw, ic, oc = tiles

        whole = np.array([[shape.images], [ow], [oh], [shape.inputs], [shape.outputs]])
        loops = _ceil(whole, np.stack([b, tw, th, ic, oc]))
        depth = self._depth(w, a)[:, None]
        weights = _ceil(kw * kh * ic, depth) * depth * oc * w[:, None]
        if shape.im2col:
            activations = tw * th * kw * kh * ic * b * a[:, None]
            compute = b * tw * th * columns * _ceil(kw * kh * ic, depth)
        else:
            across = shape.window[1] + (tw - 1) * shape.stride[1]
            down = shape.window[0] + (th - 1) * shape.stride[0]
            activations = across * down * ic * b * a[:, None]
            compute = b * tw * th * columns * kw * kh * _ceil(ic, depth)
        compute = compute * loops.prod(0)
        # Bounds from below: everything is moved once, and what is resident is at least a tile.
        moved = sum(
            tile * loops[list(DEPENDS[name])].prod(0)
            for name, tile in (("weights", weights), ("activations", activations), ("outputs", 2 * outputs))
        )
        ends = _ceil(weights + activations + outputs, self.dram_bits_per_cycle) + _ceil(outputs, self.dram_bits_per_cycle)
        smallest = np.maximum(compute + ends, _ceil(moved, self.dram_bits_per_cycle))
        fits_pair = (weights <= self.weight_buffer_bytes * 4) & (activations <= self.activation_buffer_bytes * 4)
        return _Tilings(loops, weights, activations, outputs, compute, np.where(fits_pair, smallest, _NEVER)), tiles

    def _depth(self, w: Integers, a: Integers) -> Integers:
        """Products that the rows of one column do in a cycle."""
        return self.array_rows * (self.fusion_bits // np.maximum(a, 2)) * (self.fusion_bits // np.maximum(w, 2))

    def _run(
        self, tilings: _Tilings, pair: Integers, tiling: Integers, orders: Integers
    ) -> tuple[Integers, Integers, Integers, tuple[Integers, Integers]]:
        """Run K combinations of a pair of widths and a tiling in every order.

        Returns total cycles, DRAM reads and writes, and what fills the weight and activation buffers, each (orders, K).
        """
        walked = []
        for name, size, buffer_bytes in (
            ("weights", tilings.weights[pair, tiling], self.weight_buffer_bytes),
            ("activations", tilings.activations[pair, tiling], self.activation_buffer_bytes),
            ("outputs", tilings.outputs[tiling], self.output_buffer_bytes),
        ):
            # Most pairs of widths share an operand's tile, and so its walk.
            limit = buffer_bytes * 4
            _, some, same = np.unique(tiling * (limit + 1) + size, return_index=True, return_inverse=True)
            traffic, resident = _walk(size[some], limit, tilings.loops[:, tiling[some]], orders, DEPENDS[name])
            walked.append((traffic[:, same], resident[:, same]))
        (weights, _), (activations, _), (outputs, last) = walked
        held = walked[0][1] + walked[1][1] + last
        reads = weights + activations + outputs
        bw = self.dram_bits_per_cycle
        ends = _ceil(held, bw) + _ceil(last, bw)
        middle = _ceil(reads + outputs - held - last, bw)
        cycles = np.maximum(tilings.compute[pair, tiling], middle) + ends
        return cycles, reads, outputs, (weights, activations)

    def _count(
        self, shape: Shape, tiles: Integers, tilings: _Tilings, w: Integers, a: Integers, pair: Integers, tiling: Integers
    ) -> dict[str, Integers]:
        """Compute cycles and on-chip traffic of the cheapest of input-, output- and weight-stationary (ties in that order)."""
        b, th, tw, ic, oc = tiles[:, tiling]
        w = w[pair]
        a = a[pair]
        depth = self._depth(w, a)
        area = shape.kernel[0] * shape.kernel[1]
        columns = _ceil(oc, self.array_columns) * self.array_columns
        positions = b * th * tw
        padded = _ceil(ic, depth) * depth * area
        if shape.im2col:
            padded = _ceil(ic * area, depth) * depth
        input_stationary = padded * positions * (a + columns * (w + OUTPUT_BITS))
        output_stationary = columns * positions * (OUTPUT_BITS + padded * (a + w))
        weight_stationary = padded * columns * (w + positions * (a + OUTPUT_BITS))
        choice = np.stack([input_stationary, output_stationary, weight_stationary]).argmin(0)
        products = area * ic * positions
        times = tilings.loops[:, tiling].prod(0)
        activations = np.choose(choice, [products * a, products * oc * a, products * oc * a])
        outputs = np.choose(choice, [products * oc, oc * positions, products * oc]) * OUTPUT_BITS
        weights = np.choose(choice, [products * oc * w, products * oc * w, area * ic * oc * w])
        return {
            "compute_cycles": tilings.compute[pair, tiling],
            "weight_buffer_read_bits": weights * times,
            "activation_buffer_read_bits": activations * times,
            "output_buffer_read_bits": outputs * times,
            "output_buffer_write_bits": outputs * times,
        }

    def _energy(self, counters: dict[str, Integers]) -> Floats:
        """Joules."""
        picojoules: Floats = np.multiply(counters["compute_cycles"], self.core_pj_per_cycle)
        for operand in ("weight", "activation", "output"):
            for access in ("read", "write"):
                bits = counters[f"{operand}_buffer_{access}_bits"]
                picojoules = picojoules + bits * getattr(self, f"{operand}_buffer_{access}_pj_per_bit")
        moved = counters["dram_read_bits"] + counters["dram_write_bits"]
        return np.asarray((picojoules + moved * self.dram_pj_per_bit) * 1e-12)


_NEVER = np.iinfo(np.int64).max


def _walk(
    tile: Integers, limit: int, loops: Integers, orders: Integers, depends: tuple[int, ...]
) -> tuple[Integers, Integers]:
    """DRAM traffic of an operand and what of it is resident, (orders, K): loops from the inside; see the module."""
    traffic = np.broadcast_to(tile, (len(orders), len(tile)))
    resident = traffic
    promoted = np.ones(traffic.shape, bool)
    for loop in orders.T:
        changes = np.isin(loop, depends)[:, None]
        traffic = traffic * np.where(changes | ~promoted, loops[loop], 1)
        promoted = promoted & ~(changes & (traffic > limit))
        resident = np.where(changes & promoted, traffic, resident)
    return traffic, resident


def _sizes(dimension: int, unit: int = 1) -> list[int]:
    """unit, 2 unit, 4 unit, ... up to and cut to the dimension."""
    steps = max(0, math.ceil(math.log2(dimension / unit)))
    return [min(unit * 2**k, dimension) for k in range(steps + 1)]


def _ceil(numerator: Integers, denominator: Integers | int) -> Integers:
    return -(-numerator // denominator)
