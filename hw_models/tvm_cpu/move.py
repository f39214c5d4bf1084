"""Numbers that only change their places: concatenation, shuffles, slices, padding, permutations, repeated pixels.

Where every number of the result comes from is one array of indices. It is looked at once, when code is written, for what can
be copied together: long runs in vectors, and rows of the result that all take their numbers in the same pattern, by shuffles
of vectors. Whatever is neither is copied one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.tvm_cpu.builder import LANES, Argument, Builder, Code, useful

Index = NDArray[np.int64]

NOTHING = -1  # the source of zeros
LONG = 8  # numbers: what is shorter on average is shuffled
MOST_LENGTHS = 32  # of runs: each has a loop of its own
MOST_PATTERNS = 8
MOST_BLOCKS = 128  # of 16 numbers in a pattern: each has code of its own
MOST_LOADS = 8  # of vectors that are shuffled together
MOST_PIXELS = 16  # that are taken for a row together
WIDEST = 64  # numbers that are copied at once


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of one length that come from one source: to these places, from these."""

    source: int
    length: int
    to: Index
    start: Index


@dataclass(frozen=True, eq=False)
class Pattern:
    """Rows of the result whose numbers come from the same places of each source, counted from where the row's begin there.

    `to` are the rows' first places; `starts` are, by source, where each row's numbers begin there. `sources` and `offsets` are
    of the numbers in a row.
    """

    to: Index
    starts: dict[int, Index]
    sources: Index
    offsets: Index


@dataclass(frozen=True, eq=False)
class Move(Code):
    """A map whose numbers are those of others: number i of it is `index[i]` of all inputs in a row; -1 is `zero`.

    All numbers are of one type. `sizes` are the numbers of each input.
    """

    index: NDArray[np.int32]
    sizes: tuple[int, ...]
    row: int
    dtype: str
    zero: int = 0
    threads: int = 1

    def arguments(self) -> dict[str, list[Argument]]:
        """List the inputs, the places that are kept in tables, and what is written."""
        made = [Argument(f"input{i}", (size,), self.dtype) for i, size in enumerate(self.sizes)]
        made += [Argument(name, places.shape, "int32") for name, places in self.constants().items()]
        return {"main": [*made, Argument("output0", (self.index.size,), self.dtype)]}

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the tables of places."""
        tables = {}
        for number, places in enumerate(self._places()):
            if not _even(places):
                tables[f"places{number}"] = places.astype(np.int32)
        return tables

    def _places(self) -> Iterator[Index]:
        """Go over all lists of places, in the order in which code looks at them."""
        for part in self.parts:
            yield part.to
            if isinstance(part, Pattern):
                yield from part.starts.values()
            elif part.source != NOTHING:
                yield part.start

    @cached_property
    def parts(self) -> list[Runs | Pattern]:
        """What is copied together."""
        source, start = self._origins()
        runs = _runs(source, start)
        alike = len({(run.source, run.length) for run in runs})
        if self.index.size >= LONG * sum(len(run.to) for run in runs) and alike <= MOST_LENGTHS:
            return list(runs)
        patterns = self._patterns(source, start)
        if patterns:
            return list(patterns)
        return list(_singly(source, start))

    def _origins(self) -> tuple[Index, Index]:
        """Return the input that each number comes from, and its place there."""
        index = self.index.reshape(-1).astype(np.int64)
        ends = np.cumsum(self.sizes)
        source = np.where(index < 0, NOTHING, np.searchsorted(ends, index, side="right"))
        first = ends - np.array(self.sizes)
        start = np.where(index < 0, 0, index - first[source])
        return source, start

    def _patterns(self, source: Index, start: Index) -> list[Pattern]:
        """Find rows that take their numbers alike; nothing where there are too many kinds of rows."""
        for row in self._rows():
            found = _alike(source.reshape(-1, row), start.reshape(-1, row))
            if len(found) <= MOST_PATTERNS and len(found) * -(-row // LANES) <= MOST_BLOCKS:
                return found
        return []

    def _rows(self) -> list[int]:
        """List the sizes of rows worth a try: of whole vectors, then the shortest that hold one, then of one pixel."""
        pixels = self.index.size // self.row
        longer = [count * self.row for count in range(1, MOST_PIXELS + 1) if pixels % count == 0]
        whole = [row for row in longer if row % LANES == 0]
        enough = [row for row in longer if row >= LANES]
        return list(dict.fromkeys([*whole[:1], *enough[:1], self.row]))

    def _main(self, b: Builder, buffers: dict[str, Any]) -> None:
        numbers = iter(range(2 * len(self.parts) * (len(self.sizes) + 1)))

        def at(places: Index) -> Callable[[Any], Any]:
            """Return what gives the place of a round."""
            number = next(numbers)
            if _even(places):
                step = 0
                if len(places) > 1:
                    step = int(places[1] - places[0])
                return lambda index: int(places[0]) + index * step
            return lambda index: buffers[f"places{number}"][index]

        for part in self.parts:
            if isinstance(part, Runs):
                self._copy_runs(b, buffers, part, at)
            else:
                self._shuffle(b, buffers, part, at)

    def _copy_runs(self, b: Builder, buffers: dict[str, Any], runs: Runs, at: Callable[[Index], Callable[[Any], Any]]) -> None:
        target = buffers["output0"]
        to = at(runs.to)
        if runs.source != NOTHING:
            start = at(runs.start)
        with b.loop(len(runs.to), useful(self.threads, len(runs.to) * runs.length)) as index:
            first = b.T.bind(to(index))
            if runs.source == NOTHING:
                _pieces(b, runs.length, lambda i, n: b.put(target, first + i, b.splat(self.zero, self.dtype, n), n))
                return
            source = buffers[f"input{runs.source}"]
            origin = b.T.bind(start(index))
            _pieces(b, runs.length, lambda i, n: b.put(target, first + i, b.vector(source, origin + i, n), n))

    def _shuffle(
        self, b: Builder, buffers: dict[str, Any], part: Pattern, at: Callable[[Index], Callable[[Any], Any]]
    ) -> None:
        row = len(part.sources)
        to = at(part.to)
        starts = {source: at(places) for source, places in part.starts.items()}
        with b.loop(len(part.to), useful(self.threads, len(part.to) * row)) as index:
            first = b.T.bind(to(index))
            origins = {source: b.T.bind(start(index)) for source, start in starts.items()}
            for begin in range(0, row, LANES):
                self._block(b, buffers, part, slice(begin, begin + LANES), first + begin, origins)

    def _block(
        self, b: Builder, buffers: dict[str, Any], part: Pattern, lanes: slice, to: Any, origins: dict[int, Any]
    ) -> None:
        """Write up to 16 numbers of a row."""
        sources, offsets = part.sources[lanes], part.offsets[lanes]
        target = buffers["output0"]
        loads = self._loads(part, sources, offsets)
        zero = b.const(self.zero, self.dtype)
        if loads is None or len(sources) < LANES:
            for lane, (source, offset) in enumerate(zip(sources.tolist(), offsets.tolist(), strict=True)):
                number = zero
                if source != NOTHING:
                    number = buffers[f"input{source}"][origins[source] + offset]
                b.T.buffer_store(target, number, [to + lane])
            return
        vectors = [b.T.bind(b.vector(buffers[f"input{source}"], origins[source] + start, LANES)) for source, start in loads]
        if NOTHING in sources:
            vectors.append(b.splat(self.zero, self.dtype))
        picked = []
        for source, offset in zip(sources.tolist(), offsets.tolist(), strict=True):
            if source == NOTHING:
                picked.append(len(loads) * LANES)
                continue
            number = next(i for i, (of, start) in enumerate(loads) if of == source and 0 <= offset - start < LANES)
            picked.append(number * LANES + offset - loads[number][1])
        b.put(target, to, b.T.Shuffle(vectors, picked), LANES)

    def _loads(self, part: Pattern, sources: Index, offsets: Index) -> list[tuple[int, int]] | None:
        """List the vectors (source, first number) that hold what a block takes; None where there are too many, or none can."""
        loads: list[tuple[int, int]] = []
        for source in sorted(set(sources.tolist()) - {NOTHING}):
            before = int(part.starts[source].min())
            behind = self.sizes[source] - int(part.starts[source].max()) - LANES
            wanted = sorted(set(offsets[sources == source].tolist()))
            while wanted:
                # No vector begins before the input, nor ends behind it.
                start = max(min(wanted[0], behind), -before)
                rest = [offset for offset in wanted if not 0 <= offset - start < LANES]
                if start > behind or len(rest) == len(wanted) or len(loads) == MOST_LOADS:
                    return None
                loads.append((source, start))
                wanted = rest
        return loads


def _runs(source: Index, start: Index) -> list[Runs]:
    """Cut the numbers into runs of neighbours, and put those of one source and length together."""
    stays = (source[1:] == source[:-1]) & ((source[1:] == NOTHING) | (start[1:] == start[:-1] + 1))
    first = np.flatnonzero(np.concatenate([[True], ~stays]))
    lengths = np.diff(np.append(first, len(source)))
    made = []
    for of, length in dict.fromkeys(zip(source[first].tolist(), lengths.tolist(), strict=True)):
        some = first[(source[first] == of) & (lengths == length)]
        made.append(Runs(of, length, some, start[some]))
    return made


def _alike(source: Index, start: Index) -> list[Pattern]:
    """Put rows together that have the same sources and the same distances from the first number of each."""
    offsets = start.copy()
    starts = {}
    for of in np.unique(source[source != NOTHING]).tolist():
        own = source == of
        first = start[np.arange(len(start)), own.argmax(1)]
        starts[of] = first
        offsets -= np.where(own, first[:, None], 0)
    offsets[source == NOTHING] = 0
    kinds: dict[bytes, list[int]] = {}
    for number, kind in enumerate(np.concatenate([source, offsets], 1)):
        kinds.setdefault(kind.tobytes(), []).append(number)
        if len(kinds) > MOST_PATTERNS:
            break
    made = []
    for numbers in kinds.values():
        rows = np.array(numbers)
        of = source[rows[0]]
        own_starts = {key: first[rows] for key, first in starts.items() if key in of}
        made.append(Pattern(rows * source.shape[1], own_starts, of, offsets[rows[0]]))
    return made


def _singly(source: Index, start: Index) -> list[Runs]:
    """Take every number for a run."""
    made = []
    for of in np.unique(source).tolist():
        some = np.flatnonzero(source == of)
        made.append(Runs(of, 1, some, start[some]))
    return made


def _even(places: Index) -> bool:
    """Whether places are equally far from each other."""
    return len(places) < 3 or bool((np.diff(places) == places[1] - places[0]).all())


def _pieces(b: Builder, count: int, do: Callable[[Any, int], None]) -> None:
    """Go over numbers 64 at a time, or by the largest power of two there is; the rest is a piece that reaches back."""
    size = min(WIDEST, 2 ** int(math.log2(count)))
    whole, rest = divmod(count, size)
    with b.loop(whole) as index:
        do(index * size, size)
    if rest:
        size = 2 ** math.ceil(math.log2(rest))
        do(count - size, size)
