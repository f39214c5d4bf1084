"""Batches of any structure: their samples counted, taken out, put together and told apart.

A *batch* is what a loader gives: inputs alone, (inputs, targets), or values by name (`quantizers.calling`).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haq.data.labels import INTEGERS, native
from quantizers.calling import count_of, inputs_of, leaves, samples

MARKS = 16384  # values of a batch that its fingerprint is of

Batch = Any


def fingerprint(batch: Batch) -> tuple[Any, ...]:
    """Return what tells a batch from another: shapes, types, and a checksum of values all over it."""
    found: list[Any] = []
    for leaf in leaves(batch):
        values = leaf.detach().cpu().flatten()
        values = values[:: max(1, len(values) // MARKS)].contiguous()
        # The reinterpretation as bytes isn't there for all types.
        found.append((tuple(leaf.shape), str(leaf.dtype), zlib.crc32(values.view(torch.uint8).numpy().tobytes())))
    return tuple(found)


def class_numbers_in(targets: Any, count: int) -> Tensor | None:
    """Return targets as int64 if they are class numbers: integers of shape (count,); otherwise None."""
    if isinstance(targets, list) and targets and all(isinstance(one, int) for one in targets):
        targets = torch.tensor(targets)
    if isinstance(targets, Tensor) and targets.shape == (count,) and targets.dtype in INTEGERS:
        return targets.long()
    return None


def rows(batch: Batch, count: int, index: Tensor) -> Batch:
    """Return some samples of a batch.

    Args:
        batch: The batch.
        count: The samples in it.
        index: Which ones.

    Returns:
        The same structure; what isn't there for every sample stays whole.
    """
    if len(index) and torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index))):
        return samples(batch, count, int(index[0]), int(index[-1]) + 1)
    if isinstance(batch, Tensor):
        if batch.dim() and len(batch) == count:
            return batch[index]
        return batch
    if isinstance(batch, list) and len(batch) == count:
        return [batch[number] for number in index.tolist()]
    return each_part(batch, lambda part: rows(part, count, index))


def joined(batches: Sequence[Batch], called: str) -> Batch:
    """Put the samples of several batches into one.

    Args:
        batches: Of the same structure.
        called: What they are called in messages.

    Returns:
        One batch.

    Raises:
        ValueError: For what can't be put together.
    """
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat(list(batches))
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(one.shape)) for one in batches[:2])
            raise ValueError(f"{called} gives batches of shapes such as {shapes}, which can't be put together") from error
    if isinstance(first, Mapping):
        return {key: joined([one[key] for one in batches], called) for key in first}
    if isinstance(first, tuple):
        parts = [joined(part, called) for part in zip(*batches, strict=True)]
        if hasattr(first, "_make"):
            return first._make(parts)
        return tuple(parts)
    if isinstance(first, list):
        return [entry for one in batches for entry in one]
    return first


def each_part(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Rebuild a mapping or a tuple of what a function makes of its parts; anything else stays as it is."""
    if isinstance(structure, Mapping):
        return {key: function(value) for key, value in structure.items()}
    if isinstance(structure, tuple):
        parts = [function(part) for part in structure]
        if hasattr(structure, "_make"):
            return structure._make(parts)
        return tuple(parts)
    return structure


def each_column(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Rebuild a batch of all samples, whose columns are tensors, lists and files."""
    if isinstance(batch, (Mapping, tuple)):
        return each_part(batch, lambda part: each_column(part, function))
    return function(batch)


def columns(batch: Batch) -> list[Any]:
    """List the tensors, lists and files that a batch is made of."""
    if isinstance(batch, Mapping):
        return [column for part in batch.values() for column in columns(part)]
    if isinstance(batch, tuple):
        return [column for part in batch for column in columns(part)]
    return [batch]


def is_lazy(column: Any) -> bool:
    """Say whether a column gives its entries by an index of many, as files do, and isn't in memory."""
    if isinstance(column, (Tensor, list, tuple, Mapping, str)):
        return False
    return hasattr(column, "__getitem__") and hasattr(column, "__len__")


def without_files(batch: Batch) -> Batch:
    """Return a batch with None for what isn't in memory."""
    return each_column(batch, lambda column: None if is_lazy(column) else column)


def entries(column: Any, index: Tensor) -> Any:
    """Return the entries of a column at these indices; what has none, such as a name for all, stays whole."""
    if isinstance(column, list):
        return [column[number] for number in index.tolist()]
    if isinstance(column, Tensor) or is_lazy(column):
        return column[index]
    return column


def length(batch: Batch) -> int:
    """Count the samples of a batch."""
    for column in columns(batch):
        if isinstance(column, Tensor) and column.dim():
            return len(column)
        if isinstance(column, list) or is_lazy(column):
            return len(column)
    return count_of(batch)


def pieces(batch: Batch, count: int, size: int) -> Iterator[Batch]:
    """Divide a batch into smaller ones.

    Args:
        batch: The batch.
        count: The samples in it.
        size: The samples of each part, at most.

    Returns:
        The parts. What has no entry for each sample stays whole in them, and so does a batch of nothing else.
    """
    if count <= size or not any(_has_entries(column, count) for column in columns(batch)):
        yield batch
        return
    for first in range(0, count, size):
        yield samples(batch, count, first, min(first + size, count))


def divides(batch: Batch) -> bool:
    """Say whether all that is in a batch has an entry for each sample, so that batches can be put together and divided."""
    count = length(batch)
    return all(_has_entries(column, count) for column in columns(batch))


def _has_entries(column: Any, count: int) -> bool:
    if isinstance(column, Tensor):
        return column.dim() > 0 and len(column) == count
    return isinstance(column, list) and len(column) == count


def bytes_of(structure: Any) -> int:
    """Count the bytes that a structure takes in memory, about."""
    found = leaves(structure)
    if found:
        return sum(leaf.numel() * leaf.element_size() for leaf in found)
    parts = structure if isinstance(structure, (tuple, list)) else [structure]
    return sum(_bytes_of_thing(part) for part in parts)


def _bytes_of_thing(thing: Any) -> int:
    if hasattr(thing, "width") and hasattr(thing, "height"):
        return int(thing.width * thing.height * 4)  # a picture of Pillow, with the fourth byte of a pixel that it has
    return sys.getsizeof(thing)


def normal(batch: Any, called: str) -> Batch:
    """Return a batch in the form that is understood here: arrays as tensors, (inputs, targets) in a tuple.

    Raises ValueError for arrays that no tensor can hold, and for tensors that aren't whole and in memory.
    """
    batch = _as_tensors(batch, called)
    if isinstance(batch, list):
        batch = tuple(batch)
    if isinstance(batch, tuple) and batch and not hasattr(batch, "_make"):
        return (inputs_of(batch), *batch[1:])
    return batch


def _as_tensors(structure: Any, called: str) -> Any:
    if isinstance(structure, np.ndarray):
        try:
            return torch.as_tensor(native(structure))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{called} gave an array of type {structure.dtype}; it must be one of float32") from error
    if isinstance(structure, Tensor):
        if structure.layout != torch.strided or structure.is_meta or structure.is_nested:
            raise ValueError(
                f"{called} gave a sparse, nested or meta tensor; it must be a dense one, with its numbers in memory"
            )
        return structure
    if isinstance(structure, list):
        return [_as_tensors(part, called) for part in structure]
    return each_part(structure, lambda part: _as_tensors(part, called))


def as_sample(batch: Any, sample: Any) -> Any:
    """Return a batch with tuples where a sample has them: torch makes lists of them."""
    if isinstance(batch, list) and isinstance(sample, tuple) and len(batch) == len(sample):
        return tuple(as_sample(*parts) for parts in zip(batch, sample, strict=True))
    return batch


def is_array(value: Any) -> bool:
    """Say whether a value is a tensor or an array."""
    return isinstance(value, (Tensor, np.ndarray))


def is_number(value: Any) -> bool:
    """Say whether a value is a single number of Python's."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
