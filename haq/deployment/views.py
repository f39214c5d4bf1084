"""Results that are values of other results in other places: chains of operations that move values and compute nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from haq.deployment.nodes import shape_of

Source = TypeVar("Source")
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class View(Generic[Source]):
    """A result of torch's shape `dims` for one image, as values of sources that are computed.

    `index` says of each value, in torch's order, where it is in the flattened sources (`sizes`, in torch's order too), one
    behind the other; -1 is a zero.
    """

    sources: tuple[Source, ...]
    sizes: tuple[tuple[int, ...], ...]
    index: Index
    dims: tuple[int, ...]
    is_whole: bool = False  # the source itself

    @staticmethod
    def of(source: Source, dims: tuple[int, ...]) -> View[Source]:
        """Return a source itself."""
        return View((source,), (dims,), np.arange(math.prod(dims)), dims, is_whole=True)

    def again(self, source: Source) -> View[Source]:
        """Return the same places of another source, that has the shape of the only one."""
        return replace(self, sources=(source,))

    def expanded(self, dims: tuple[int, ...]) -> View[Source]:
        """Return it as torch broadcasts it to a larger shape."""
        index = np.broadcast_to(self.index.reshape(self.dims), dims).reshape(-1)
        return View(self.sources, self.sizes, index, dims)

    @cached_property
    def is_complete(self) -> bool:
        """Whether it has every value of its sources, once."""
        if self.is_whole:
            return True
        if len(self.index) != sum(math.prod(size) for size in self.sizes):
            return False
        return bool((np.sort(self.index) == np.arange(len(self.index))).all())

    @property
    def is_permutation(self) -> bool:
        """Whether it has every value of one source, once."""
        return len(self.sources) == 1 and self.is_complete

    def per_channel(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]] | None:
        """Return what each source's channels get where each channel of this has a value.

        None where a channel of a source would get different ones, or where some values of sources are missing.
        """
        if not self.is_complete:
            return None
        given = np.empty(len(self.index))
        given[self.index] = np.repeat(values, math.prod(self.dims[2:]))
        found = []
        start = 0
        for size in self.sizes:
            count = math.prod(size)
            of_channels = given[start : start + count].reshape(size[1], -1)
            if not (of_channels == of_channels[:, :1]).all():
                return None
            found.append(of_channels[:, 0].copy())
            start += count
        return found

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is its source, in the order in which that is stored."""
        if self.is_whole:
            return True
        if not self.is_permutation or shape_of(self.dims) != shape_of(self.sizes[0]):
            return False
        return bool((self.stored == np.arange(len(self.index))).all())

    @cached_property
    def stored(self) -> Index:
        """The index with channels last, on both sides."""
        places = []
        start = 0
        for dims in self.sizes:
            stored = np.empty(math.prod(dims), np.int64)
            stored[channels_last(dims)] = np.arange(len(stored))
            places.append(stored + start)
            start += len(stored)
        return _taken(np.concatenate(places), self.index[channels_last(self.dims)])


def channels_last(dims: tuple[int, ...]) -> Index:
    """Return the places in torch's order of a shape (1, C, ...), in the order of (..., C)."""
    return np.moveaxis(np.arange(math.prod(dims)).reshape(dims[1:]), 0, -1).reshape(-1)


def moved(views: Sequence[View[Source]], index: NDArray[np.int32] | None, dims: tuple[int, ...]) -> View[Source]:
    """Put a move behind those that its inputs are made of.

    Args:
        views: Its inputs.
        index: Where each value of its result is in its inputs; None leaves all where they are.
        dims: The shape of its result.

    Returns:
        The result, of those sources only of which it has values.
    """
    starts: dict[int, int] = {}  # where each source begins, by its identity
    sources: list[Source] = []
    sizes: list[tuple[int, ...]] = []
    total = 0
    parts = []
    for view in views:
        places = []
        for source, size in zip(view.sources, view.sizes, strict=True):
            if id(source) not in starts:
                starts[id(source)] = total
                sources.append(source)
                sizes.append(size)
                total += math.prod(size)
            places.append(np.arange(math.prod(size), dtype=np.int64) + starts[id(source)])
        parts.append(_taken(np.concatenate(places), view.index))
    together = np.concatenate(parts)
    if index is not None:
        together = _taken(together, index.astype(np.int64))
    return _pruned(sources, sizes, together, dims)


def _taken(values: Index, index: Index) -> Index:
    """Return values at places, and -1 at -1."""
    return np.where(index < 0, -1, values[index])


def _pruned(sources: list[Source], sizes: list[tuple[int, ...]], index: Index, dims: tuple[int, ...]) -> View[Source]:
    """Leave out the sources of which there are no values."""
    kept = []
    made = index.copy()
    start = 0
    gone = 0
    for place, size in enumerate(sizes):
        count = math.prod(size)
        here = (index >= start) & (index < start + count)
        if here.any():
            kept.append(place)
            made[here] -= gone
        else:
            gone += count
        start += count
    if not kept:  # nothing but zeros
        return View((sources[0],), (sizes[0],), index, dims)
    return View(tuple(sources[place] for place in kept), tuple(sizes[place] for place in kept), made, dims)
