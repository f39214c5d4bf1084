"""The BISMO overlay itself: its fetch, execute and write stages, and how far they overlap.

The overlay multiplies bit planes with a Dm x Dn array of dot-product units, each taking one word of Dk bits from both operands
per cycle. Rows of both operands are padded in memory to whole words and 64 bytes, M and N to whole tiles:

    tm = ceil(M / Dm)    tn = ceil(N / Dn)    tk = words per row and bit plane

A stripe is all words and all bit planes of one tile's rows. The schedule, with w weight bits and a activation bits:

    for each of the tn column tiles:  fetch the right stripe
        for each of the tm row tiles:  fetch the left stripe; w a execute runs, one per pair of planes; write the tile

so the right operand is read once and the left operand tn times. What each run takes, in cycles:

    fetch      beats + 26 + 2 (Dm + Dn) + 2 (blocks - 1)    one beat moves 64 bits; the data hop along a chain of Dm + Dn
                                                            buffers; one block a plane, one in all if there is one tile only
    execute    tk + 16 + 15                                 words, pipeline, idle until the next run
    write      34 + Dn (3 + 2 beats)                        the results leave row by row

Each stage does one run at a time, in order, and tokens couple the stages: a fetch of a row tile's operands waits until at
most four stripes are under way (each operand buffer has four regions, of which a stripe takes one), the first execute run
of a tile waits for its stripes and until at most two results are under way. The host sees the end when it next polls.

Recurrence for the i-th tile (f, e, c: cycles of its fetches, its execute runs and its write):

    F[i] = max(F[i-1], E[i-4]) + f    E[i] = max(F[i], E[i-1], W[i-2]) + e    W[i] = max(E[i], W[i-1]) + c

It is linear in (max, +), so tm tiles are a matrix power and tn columns a power of that: exact, and as fast for millions of
runs as for ten.

If a stripe doesn't fit its region of the buffer, K is split into slices of as many words as both operands' regions hold, the
last one shorter. A tile's slices follow each other and accumulate in place; only the last one is written. A right stripe that
fits is still fetched once per column tile, one that doesn't is fetched in slices for every tile. A slice's rows aren't
neighbours in memory, so each row and plane is a block of its own. This case is by reasoning; nothing published measures it.

Layers become matrix products, weights (M x K) times activations (K x N):

    conv, pointwise   M = C_out             K = C_in k k   N = H_out W_out   once per image
    grouped           M = C_out / groups    K = C_in / groups k k            once per group and image
    depthwise         M = Dm C_out / C_in   K = Dm k k, a block-diagonal group of Dm channels: ceil(C_in / Dm) groups per image
    linear            M = C_out             K = C_in       N = rows x batch  once

Nothing is charged for splitting activations into bit planes, for im2col, or for what isn't a matrix product.

Sources: Umuroglu, Rasnayake and Sjalander, "BISMO: A Scalable Bit-Serial Matrix Multiplication Overlay for Reconfigurable
Computing", FPL 2018 (schedule, resources); Umuroglu et al., "Optimizing Bit-Serial Matrix Multiplication for Reconfigurable
Computing", TRETS 2019. The cycle constants are those of the version-1 RTL in cycle-accurate emulation (2x64x2 and 8x64x8
arrays, buffers of 1024 words), whose counts this model reproduces exactly.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from hw_models.bismo import matrix_products
from hw_models.cost import CostTable, Floats, Integers
from hw_models.machine import PoweredMachine
from hw_models.storage import BITS
from hw_models.workload import Workload

BOUNDS = ("execute", "fetch", "write")

RESULT_BITS = 32  # accumulators, and what is written of each
BRAM_BITS, BRAM_ENTRIES = 32, 1024  # one 36 Kb block RAM as the overlay uses it

# Per run of the version-1 RTL, found from its cycle counts; the two array sizes there leave no other integers. How the write's
# 44 cycles at 2x2 and 122 at 8x8 divide into the three numbers is a choice: no count there is bound by writing.
FETCH_CYCLES = 26  # request, memory latency and hand-over
FETCH_HOP_CYCLES = 2  # per buffer of the chain, because the next fetch waits until the last word has passed all of them
FETCH_BLOCK_CYCLES = 2  # per further block of memory
EXECUTE_PIPELINE_CYCLES = 16
EXECUTE_IDLE_CYCLES = 15  # between runs; tokens are exchanged in this time
WRITE_CYCLES = 34
WRITE_ROW_CYCLES = 3  # each row of results is a block of memory
WRITE_BEAT_CYCLES = 2  # no bursts: request, then data


class Gemm(NamedTuple):
    """What one matrix product costs."""

    cycles: int  # from start until the host sees the end
    read_bytes: int
    write_bytes: int
    execute_cycles: int  # ideal: every cycle multiplies
    execute_runs: int
    fetch_runs: int


class _Gemms(NamedTuple):
    """The same for many pairs of widths, and the cycles that each of BOUNDS is busy."""

    cycles: Integers
    read_bytes: Integers
    write_bytes: Integers
    execute_cycles: Integers
    execute_runs: Integers
    fetch_runs: Integers
    busy: Integers  # (bounds, ...)


class BismoOverlayTarget(PoweredMachine):
    """An instance of the BISMO overlay: every field is a key of its YAML file, with its unit in the name."""

    model: Literal["bismo-overlay"]
    dm: int = Field(gt=0, description="rows of the array: rows of the left operand per tile")
    dk: int = Field(gt=0, description="bits that one dot-product unit takes from each operand per cycle")
    dn: int = Field(gt=0, description="columns of the array: columns of the right operand per tile")
    lhs_entries: int = Field(gt=0, description="words of Dk bits in each of the Dm left buffers")
    rhs_entries: int = Field(gt=0, description="words of Dk bits in each of the Dn right buffers")
    dram_read_bits_per_cycle: int = Field(default=64, gt=0)
    dram_write_bits_per_cycle: int = Field(default=64, gt=0)
    row_alignment_bytes: int = Field(default=64, gt=0, description="rows in memory are padded to whole multiples of it")
    fetch_execute_tokens: int = Field(default=4, gt=0, description="regions of each operand buffer")
    execute_write_tokens: int = Field(default=2, gt=0, description="regions of the result buffer")
    poll_cycles: int = Field(default=6, gt=0, description="interval at which the host looks whether all is written")

    @model_validator(mode="after")
    def _check(self) -> BismoOverlayTarget:
        for name in ("lhs_entries", "rhs_entries"):
            if getattr(self, name) // self.fetch_execute_tokens < BITS:
                needed = BITS * self.fetch_execute_tokens
                raise ValueError(f"{name} is {getattr(self, name)}; one word of {BITS} bit planes per region needs {needed}")
        return self

    @property
    def peak_binary_tops(self) -> float:
        """Binary operations per second, in 10^12: an AND and an addition for each bit of each unit."""
        return 2 * self.dm * self.dk * self.dn * self.clock_mhz * 1e-6

    @property
    def luts(self) -> float:
        """Look-up tables of the array, by the paper's fit: a unit's popcount, accumulator and share of the rest."""
        return self.dm * self.dn * (1.17 * self.dk + 44.1 + 120.1)

    @property
    def brams(self) -> int:
        """Block RAMs (36 Kb) of the operand buffers."""
        left, right = (math.ceil(entries / BRAM_ENTRIES) for entries in (self.lhs_entries, self.rhs_entries))
        return math.ceil(self.dk / BRAM_BITS) * (self.dm * left + self.dn * right)

    def gemm(self, m: int, k: int, n: int, w_bits: int, a_bits: int) -> Gemm:
        """Price one product of an m x k matrix of w_bits and a k x n matrix of a_bits.

        Args:
            m: Rows of the left matrix.
            k: Columns of the left matrix and rows of the right one.
            n: Columns of the right matrix.
            w_bits: Width of the left matrix.
            a_bits: Width of the right matrix.

        Returns:
            Its cycles and traffic.

        Raises:
            ValueError: For sizes below 1, bits outside 1..8, and for what isn't an integer.
        """
        for name, value in (("m", m), ("k", k), ("n", n), ("w_bits", w_bits), ("a_bits", a_bits)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
            if name.endswith("bits") and value > BITS:
                raise ValueError(f"{name} must be from 1 to {BITS}, not {value!r}")
        gemms = self._gemms(int(m), int(k), int(n), np.array([w_bits], np.int64), np.array([a_bits], np.int64))
        return Gemm(*(int(figure[0]) for figure in gemms[: len(Gemm._fields)]))

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Price every layer at every pair of widths, for one batch: cycles, latency, and energy where the power is known.

        `batch=None` takes the target's own. Raises ValueError for a batch that isn't a positive integer.
        """
        images = self.images(workload, batch)
        w, a = np.meshgrid(np.arange(1, BITS + 1), np.arange(1, BITS + 1), indexing="ij")
        known: dict[tuple[int, int, int], _Gemms] = {}  # networks repeat their layers
        totals = np.zeros((len(Gemm._fields), len(workload), BITS, BITS), np.int64)
        busy = np.zeros((len(workload), len(BOUNDS), BITS, BITS), np.int64)
        for index, layer in enumerate(workload.layers):
            for *shape, times in matrix_products(layer, images, self.dm):
                m, k, n = shape
                if (m, k, n) not in known:
                    known[m, k, n] = self._gemms(m, k, n, w, a)
                *figures, stages = known[m, k, n]
                totals[:, index] += times * np.stack(figures)
                busy[index] += times * stages
        counters = dict(zip(Gemm._fields, totals, strict=True))
        cycles = counters.pop("cycles")
        return self.table(workload, images, cycles, self.energy(cycles), busy.argmax(1), BOUNDS, counters)

    def _gemms(self, m: int, k: int, n: int, w: Integers, a: Integers) -> _Gemms:
        """The product of an m x k and a k x n matrix at each pair of widths of the arrays w and a."""
        tm = math.ceil(m / self.dm)
        tn = math.ceil(n / self.dn)
        tiles = tm * tn
        row_bits = math.lcm(self.dk, 8 * self.row_alignment_bytes)
        tk = math.ceil(k / row_bits) * row_bits // self.dk

        # Slices of K: all of `words` words, but the last one of `last`.
        lhs_region = self.lhs_entries // self.fetch_execute_tokens
        rhs_region = self.rhs_entries // self.fetch_execute_tokens
        words = np.minimum(tk, np.minimum(lhs_region // w, rhs_region // a))
        slices = -(-tk // words)
        last = tk - (slices - 1) * words
        resident = tk * a <= rhs_region  # the right stripe is fetched once per column tile, else in slices for every tile

        # What the stages take for one slice; the resident right stripe comes first, and on its own.
        left_blocks: Integers = np.ones_like(w)
        if tm > 1:
            left_blocks = w
        left_blocks = np.where(slices > 1, self.dm * w, left_blocks)
        right_blocks: Integers = np.ones_like(a)
        if tn > 1:
            right_blocks = a

        def fetch_slice(words: Integers) -> Integers:
            left = self._fetch(self.dm * w * words, left_blocks)
            return left + np.where(resident, 0, self._fetch(self.dn * a * words, self.dn * a))

        def execute_slice(words: Integers) -> Integers:
            return w * a * (words + EXECUTE_PIPELINE_CYCLES + EXECUTE_IDLE_CYCLES)

        fetch_right = np.where(resident, self._fetch(self.dn * a * tk, right_blocks), 0)
        beats = math.ceil(self.dm * RESULT_BITS / self.dram_write_bits_per_cycle)
        write = WRITE_CYCLES + self.dn * (WRITE_ROW_CYCLES + WRITE_BEAT_CYCLES * beats)

        # The recurrence: slices make a tile, tiles a column, columns the product. All buffers are free at time 0.
        inner = self._step(fetch_slice(words), execute_slice(words), None)
        final = self._step(fetch_slice(last), execute_slice(last), write)
        tile = _then(_power(inner, slices - 1), final)
        column = _then(self._step(fetch_right, None, None), _power(tile, np.full_like(w, tm)))
        end = _power(column, np.full_like(w, tn)).max(-1)[..., 1 + self.fetch_execute_tokens].astype(np.int64)

        row_bytes = tk * self.dk // 8
        right_reads: Integers = np.where(resident, tn, tiles)  # how often a right stripe is read
        return _Gemms(
            # The counter stops with the read that sees the end; the first one comes after poll_cycles - 1.
            cycles=-(-(end + 1) // self.poll_cycles) * self.poll_cycles - 1,
            read_bytes=row_bytes * (tiles * self.dm * w + right_reads * self.dn * a),
            write_bytes=np.full_like(w, tiles * self.dm * self.dn * RESULT_BITS // 8),
            execute_cycles=tiles * tk * w * a,
            execute_runs=tiles * slices * w * a,
            fetch_runs=tiles * slices + np.where(resident, tn, tiles * slices),
            busy=np.stack(
                [
                    tiles * ((slices - 1) * execute_slice(words) + execute_slice(last)),
                    tiles * ((slices - 1) * fetch_slice(words) + fetch_slice(last)) + tn * fetch_right,
                    np.full_like(w, tiles * write),
                ]
            ),
        )

    def _fetch(self, words: Integers, blocks: Integers) -> Integers:
        """Cycles of a fetch run for so many words of Dk bits in so many blocks of memory."""
        beats = -(-words * self.dk // self.dram_read_bits_per_cycle)
        hops = FETCH_HOP_CYCLES * (self.dm + self.dn)
        return np.asarray(beats + FETCH_CYCLES + hops + FETCH_BLOCK_CYCLES * (blocks - 1))

    def _step(self, fetch: Integers, execute: Integers | None, write: int | None) -> Floats:
        """One step of the recurrence as (max, +) matrices (..., states, states); None: that stage has no part in it.

        The states are the times F, E[-1] .. E[-fetch_execute_tokens], W[-1] .. W[-execute_write_tokens].
        """
        states = 1 + self.fetch_execute_tokens + self.execute_write_tokens
        first_e = 1
        last_e = self.fetch_execute_tokens
        first_w = last_e + 1
        last_w = states - 1
        before = _identity(states, fetch.shape)
        after = before.copy()
        # A fetch follows the one before and needs a free region of the buffers.
        after[..., 0, :] = np.maximum(before[..., 0, :], before[..., last_e, :]) + fetch[..., None]
        if execute is not None:
            start = np.maximum(after[..., 0, :], before[..., first_e, :])
            if write is not None:
                start = np.maximum(start, before[..., last_w, :])
            after[..., first_e + 1 : last_e + 1, :] = before[..., first_e:last_e, :]
            after[..., first_e, :] = start + execute[..., None]
        if write is not None:
            after[..., first_w + 1 :, :] = before[..., first_w:last_w, :]
            after[..., first_w, :] = np.maximum(after[..., first_e, :], before[..., first_w, :]) + write
        return after


def _identity(states: int, shape: tuple[int, ...]) -> Floats:
    """The (max, +) matrix that changes nothing. Floats, for -inf; times are integers far below 2^53, so they are exact."""
    identity = np.where(np.eye(states, dtype=bool), 0.0, -np.inf)
    return np.broadcast_to(identity, (*shape, states, states)).copy()


def _then(first: Floats, second: Floats) -> Floats:
    """The (max, +) matrices that do `first` and after it `second`."""
    return np.asarray((second[..., :, :, None] + first[..., None, :, :]).max(-2))


def _power(step: Floats, times: Integers) -> Floats:
    """Each (max, +) matrix done `times` times, by squaring."""
    result = _identity(step.shape[-1], times.shape)
    left = times.copy()
    while left.any():
        result = np.where((left % 2 == 1)[..., None, None], _then(result, step), result)
        left //= 2
        if left.any():
            step = _then(step, step)
    return result
