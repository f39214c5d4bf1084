"""BISMO, the bit-serial matrix multiplier, as HAQ used it (targets `cloud` and `edge`): the exact schedule.

An array of `array_rows` x `array_columns` dot-product units, each one word (`word_bits`) wide, computes one bit plane by bit
plane tile product per cycle. A layer becomes matrix products, weights (M x K) times activations (K x N):

    conv, pointwise   M = C_out              K = C_in k k    N = H_out W_out   once per image
    grouped           M = C_out / groups     K = C_in / groups k k             once per group and image
    depthwise         M = G C_out / C_in     K = G k k       as one block-diagonal group of G = `depthwise_group` channels,
                                                             ceil(C_in / G) groups per image
    linear            M = C_out              K = C_in        N = rows x batch  once

K fills kt = ceil(K / word_bits) words per row and bit plane; what pads the last word is computed but not fetched: a row and
plane takes its port ceil(bits / port width) cycles per word. One matrix product:

 1. Tiles are `array_rows` rows or `array_columns` columns. Each operand's buffer holds a number of tile-planes (one word of
    every row of a tile, one bit plane), so N is split into chunks of floor(buffer / (kt a)) column tiles and M into chunks of
    floor(buffer / (kt w)) row tiles, one at least. Blocks don't overlap: their times add.
 2. A block of m row tiles and n column tiles takes X = m n kt w a unit steps of a cycle each; a partial tile executes at full
    cost. Order A: for column tile, row tile, word, weight plane, activation plane. Order B: the operands' roles swapped.
 3. Planes are fetched in the order of their first use, each operand through its own port, real rows only. A plane is there
    after F cycles, the fetch time of everything up to it.
 4. T = max(X, max over planes of F + X - 1 - step of first use).
 5. The layer takes the order with the smaller sum of T over the blocks.

Nothing is charged for results, instructions, activation functions, normalisation, pooling and additions. F minus the step of
first use is linear in tile, word and plane, so the maximum stands at a corner: that is the closed form below.

`cloud` reproduces all 3392 cells of the latency table of MobileNetV2 that HAQ's authors published. `edge`, which they never
described, was inferred from eight published latencies with the same rules: see docs/explanation/edge.md. Both could also run a
depthwise layer one channel at a time, with the images of the batch (16 and 1) side by side in the block-diagonal product; the
two readings differ only for other batches.

Sources: Umuroglu et al., "BISMO: A Scalable Bit-Serial Matrix Multiplication Overlay", FPL 2018; HAQ (Wang et al., CVPR
2019).
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from hw_models.cost import CostTable, Floats, Integers
from hw_models.machine import PoweredMachine
from hw_models.storage import BITS
from hw_models.workload import Layer, Workload

BOUNDS = ("compute", "activation fetch", "weight fetch")


class MatrixProduct(NamedTuple):
    """Weights (m x k) times activations (k x n), `times` over."""

    m: int
    k: int
    n: int
    times: int


def matrix_products(layer: Layer, images: int, depthwise_group: int) -> list[MatrixProduct]:
    """Turn a layer into matrix products (see the module's table), one entry per call.

    Args:
        layer: The layer.
        images: The batch.
        depthwise_group: Channels of a depthwise layer in one block-diagonal product.

    Returns:
        The products, each with how often it is done.
    """
    area = layer.kernel[0] * layer.kernel[1]
    m = layer.out_channels // layer.groups
    k = layer.in_channels // layer.groups * area
    repeats = layer.groups
    if layer.kind == "depthwise":
        m = depthwise_group * m
        k = depthwise_group * area
        repeats = math.ceil(layer.in_channels / depthwise_group)
    if layer.kind == "linear":
        return [MatrixProduct(m, k, call.positions * images, 1) for call in layer.calls]
    return [MatrixProduct(m, k, call.positions, repeats * images) for call in layer.calls]


class _Operand(NamedTuple):
    """One side of matrix products, as arrays that broadcast to (products, 8, 8)."""

    rows: Integers  # rows of weights or columns of activations
    tile: int
    bits: Integers
    chunk: Integers  # rows that fit the buffer, in whole tiles
    beats: int  # cycles of the port for a whole word of one row
    last_beats: Integers  # and for the last word, of which only what isn't padding is fetched


class BismoTarget(PoweredMachine):
    """A BISMO machine: every field is a key of its YAML file, with its unit in the name."""

    model: Literal["bismo"]
    array_rows: int = Field(gt=0, description="dot-product units down the array: rows of weights in a tile")
    array_columns: int = Field(gt=0, description="dot-product units across the array: columns of activations in a tile")
    word_bits: int = Field(gt=0, description="bits that one dot-product unit takes from each operand per cycle")
    depthwise_group: int = Field(gt=0, description="channels of a depthwise layer in one block-diagonal matrix product")
    weight_port_bits_per_cycle: int = Field(gt=0)
    activation_port_bits_per_cycle: int = Field(gt=0)
    weight_buffer_tile_planes: int = Field(gt=0, description="tile-planes that the weight buffer holds")
    activation_buffer_tile_planes: int = Field(gt=0, description="tile-planes that the activation buffer holds")

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Price every layer at every pair of widths, for one batch: cycles, latency, and energy where the power is known.

        `batch=None` takes the target's own. Raises ValueError for a batch that isn't a positive integer.
        """
        images = self.images(workload, batch)
        products: list[MatrixProduct] = []
        owners: list[int] = []
        for index, layer in enumerate(workload.layers):
            of_layer = matrix_products(layer, images, self.depthwise_group)
            products += of_layer
            owners += [index] * len(of_layer)
        m, k, n, times = np.array(products, dtype=np.int64).T.reshape(4, -1, 1, 1)
        steps, cycles, terms = self._price(m, k, n)
        starts = np.searchsorted(owners, np.arange(len(workload)))  # a layer's calls stand next to each other
        cycles = np.add.reduceat(cycles * times, starts)
        compute = np.add.reduceat(steps * times, starts)
        bound = np.add.reduceat(terms * times[None], starts, axis=1).argmax(0)
        counters = {"compute_cycles": compute, "stall_cycles": cycles - compute}
        return self.table(workload, images, cycles, self.energy(cycles), bound, BOUNDS, counters)

    def _price(self, m: Integers, k: Integers, n: Integers) -> tuple[Integers, Integers, Floats]:
        """Unit steps, cycles, and the time that each of BOUNDS would take alone, for products of shape (P, 1, 1)."""
        w, a = np.meshgrid(np.arange(1, BITS + 1), np.arange(1, BITS + 1), indexing="ij")
        words = -(-k // self.word_bits)

        def operand(rows: Integers, tile: int, bits: Integers, planes: int, port: int) -> _Operand:
            chunk = tile * np.maximum(1, planes // (words * bits))
            last_beats = -(-(k - (words - 1) * self.word_bits) // port)
            return _Operand(rows, tile, bits, chunk, math.ceil(self.word_bits / port), last_beats)

        weights = operand(m, self.array_rows, w, self.weight_buffer_tile_planes, self.weight_port_bits_per_cycle)
        activations = operand(
            n, self.array_columns, a, self.activation_buffer_tile_planes, self.activation_port_bits_per_cycle
        )
        cycles = np.minimum(_total(activations, weights, words), _total(weights, activations, words))
        steps = -(-m // self.array_rows) * -(-n // self.array_columns) * words * w * a
        fetch = (_row(operand, words) * operand.bits * operand.rows for operand in (activations, weights))
        return steps, cycles, np.stack([np.broadcast_to(term, cycles.shape) for term in (steps, *fetch)]).astype(float)


def _total(outer: _Operand, inner: _Operand, words: Integers) -> Integers:
    """Cycles over all blocks, the outer operand's tiles in the outer loop.

    At most four blocks differ: the full chunks and the last one, of either operand.
    """
    total = np.zeros((), dtype=np.int64)
    for (outer_rows, outer_count), (inner_rows, inner_count) in itertools.product(_chunks(outer), _chunks(inner)):
        block = _block(outer._replace(rows=outer_rows), inner._replace(rows=inner_rows), words)
        total = total + outer_count * inner_count * block
    return total


def _chunks(operand: _Operand) -> list[tuple[Integers, Integers]]:
    """Rows and number of the full chunks, and of the last one."""
    full = -(-operand.rows // operand.chunk) - 1
    one = np.ones((), dtype=np.int64)
    return [(np.minimum(operand.chunk, operand.rows), full), (operand.rows - full * operand.chunk, one)]


def _block(outer: _Operand, inner: _Operand, words: Integers) -> Integers:
    """Cycles of one block: rule 4 at the corners of tile, word and plane."""
    outer_tiles = -(-outer.rows // outer.tile)
    inner_tiles = -(-inner.rows // inner.tile)
    per_tile = words * outer.bits * inner.bits
    steps = outer_tiles * inner_tiles * per_tile
    # First use of plane (tile, word, bit). The innermost loop runs over the outer operand's planes.
    outer_first = (inner_tiles * per_tile, outer.bits * inner.bits, np.ones_like(words))
    inner_first = (per_tile, outer.bits * inner.bits, outer.bits)
    latest = np.maximum(_lateness(outer, words, outer_first), _lateness(inner, words, inner_first))
    cycles: Integers = np.maximum(steps, latest + steps - 1)
    return cycles


def _row(operand: _Operand, words: Integers) -> Integers:
    """Cycles of the port for one row and bit plane."""
    return (words - 1) * operand.beats + operand.last_beats


def _lateness(operand: _Operand, words: Integers, first: tuple[Integers, Integers, Integers]) -> Integers:
    """The largest F - step of first use over an operand's planes.

    It is linear in tiles, words and planes but for the last tile and the last word, which may be shorter.
    """
    tiles = -(-operand.rows // operand.tile)
    last = operand.rows - (tiles - 1) * operand.tile
    full = np.where(tiles > 1, operand.tile, last)
    zero = np.zeros_like(tiles)
    corners = itertools.product(
        ((zero, full), (np.maximum(tiles - 2, 0), full), (tiles - 1, last)),
        (zero, np.maximum(words - 2, 0), words - 1),
        (zero, operand.bits - 1),
    )
    latest: Integers = np.full((), np.iinfo(np.int64).min)
    for (tile, rows), word, plane in corners:
        beats = np.where(word == words - 1, operand.last_beats, operand.beats)
        within = rows * (word * operand.beats * operand.bits + beats * (plane + 1))
        fetched = tile * operand.tile * _row(operand, words) * operand.bits + within
        latest = np.maximum(latest, fetched - (tile * first[0] + word * first[1] + plane * first[2]))
    return latest
