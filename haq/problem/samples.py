"""The samples that policies are judged on, in batches that are gone through again for every policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from haq.data.dataset import Split
from haq.data.sources import Items, Source, Stream, changed, made_ahead
from haq.data.structures import fingerprint
from quantizers.calling import (
    Forward,
    call,
    count_of,
    first_sample,
    inputs_of,
    leaves,
    map_tensors,
    samples,
    targets_of,
    to_device,
)

COPIES = 3  # that are in memory at a time while samples are put together, and one is kept to notice changes
CUT = 250  # samples that are preprocessed at a time
BATCH = 125  # samples; small enough for a layer's activations to stay in the processor's cache
SHUFFLE_SEED = 0


class Samples(ABC):
    """Batches in an order that is always the same.

    Attributes:
        count: The number of samples.
        sizes: The samples of every batch.
        order: The place of every sample, as it was given, in the order in which they are looked at.
        is_shuffled: Whether any first part of them is a fair sample: only then can an evaluation end early.
        is_kept: Whether all are in memory: only then is it worth keeping what first layers compute.
    """

    count: int
    sizes: Sequence[int]
    order: Tensor
    is_shuffled: bool = False
    is_kept: bool = False

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, as they were given: a batch of inputs, or (inputs, targets), or by name."""

    @abstractmethod
    def example(self) -> Any:
        """Return a batch of one sample, or the smallest that there is."""

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.sizes)

    def tensors(self) -> list[Tensor]:
        """List the tensors that are kept, changes of which change results."""
        return []

    def labels(self) -> Tensor | None:
        """Return the class of every sample as it was given, int64 (samples,), if all are at hand without reading samples."""
        return None

    def to(self, device: torch.device | str) -> Samples:
        """Return the samples, with what is kept of them on a device."""
        return self


class KeptSamples(Samples):
    """Samples in memory.

    Those that can be put together (tensors of one shape by sample) are shuffled and divided into batches of `BATCH`; others
    (texts of different lengths, lists of images) stay in the batches in which they were given.
    """

    is_kept = True

    def __init__(self, batches: Sequence[Any]) -> None:
        """Take batches.

        Args:
            batches: As a loader gives them; they are copied.

        Raises:
            ValueError: If there are none.
        """
        # The last batch of some loaders is empty.
        batches = [batch for batch in batches if samples_in(batch)]
        counts = [samples_in(batch) for batch in batches]
        self.count = sum(counts)
        if not self.count:
            raise ValueError("`search` gave no samples")
        with torch.inference_mode(False), torch.no_grad():  # changes of inference tensors can't be noticed
            together = _together(batches, counts)
            if together is None:
                self.order = torch.arange(self.count)
                self.sizes = counts
                self.batches = [map_tensors(batch, torch.clone) for batch in batches]
                self._first = first_sample(self.batches[0], counts[0])
                return
            # Whatever part of them is looked at first is a fair sample.
            self.is_shuffled = True
            self.order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(self.count))
            parts = self.order.split(BATCH)
            self.sizes = [len(part) for part in parts]
            self.batches = [_rows_of(together, part) for part in parts]
            self._first = _rows_of(together, torch.arange(1))

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        return iter(self.batches)

    def __getitem__(self, number: int) -> Any:
        """Return one batch."""
        return self.batches[number]

    def example(self) -> Any:
        """Return a batch of the first sample."""
        return self._first

    def tensors(self) -> list[Tensor]:
        """List all tensors."""
        return leaves(self.batches)

    def to(self, device: torch.device | str) -> KeptSamples:
        """Move all tensors to a device, in place."""
        self.batches = [to_device(batch, device) for batch in self.batches]
        self._first = to_device(self._first, device)
        return self


class StreamedSamples(Samples):
    """Samples that are read, decoded or preprocessed anew for every policy, in advance.

    Those that can be had by index and be put together come in the same order and in the same batches as `KeptSamples`, so that
    results are the same to the last bit. Others come as they are given.
    """

    def __init__(self, source: Source, prepare: Callable[[Any], Any] | None = None) -> None:
        """Take the samples.

        Args:
            source: Where they come from.
            prepare: Turns a batch into one that the network takes, such as one of preprocessed images.
        """
        self.source = source
        self.prepare = prepare
        self.count = source.count
        self.order = torch.arange(self.count)
        self.parts: Sequence[Tensor] = []
        self._marks: dict[int, Any] = {}  # fingerprints of batches that were read
        if isinstance(source, Stream):
            self.sizes = source.sizes()
            return
        size = source.size
        if source.is_even:
            self.is_shuffled = True
            self.order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(self.count))
            size = BATCH
        self.parts = self.order.split(size)
        self.sizes = [len(part) for part in self.parts]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; a thread makes the next ones."""
        batches: Iterator[Any] = self.source.batches(self.parts)
        if isinstance(self.source, Stream):
            batches = iter(self.source)
        elif isinstance(self.source, Items):
            batches = self._checked(batches)
        if self.prepare is None:
            yield from batches
            return
        # One alone: as the network takes them they are large.
        yield from made_ahead(self.prepare, batches, 1)

    def _checked(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches. Raises ValueError for one that isn't what it was the first time."""
        for number, batch in enumerate(batches):
            mark = fingerprint(batch)
            if self._marks.setdefault(number, mark) != mark:
                raise changed(self.source.called, f"batch {number + 1}")
            yield batch

    def labels(self) -> Tensor | None:
        """Return the class of every sample, if that is known."""
        return self.source.known_labels

    def example(self) -> Any:
        """Return a batch of the first sample."""
        if isinstance(self.source, Stream):
            batch = next(iter(self))
            return next(pieces(batch, 1))[0]
        batch = self.source.take(torch.arange(1))
        if self.prepare is not None:
            batch = self.prepare(batch)
        return batch


def samples_of(split: Split, preprocess: Callable[[Any], Any], most: int) -> Samples | list[Any]:
    """Make what policies are judged on of the samples of a data set.

    Args:
        split: The samples.
        preprocess: Turns inputs into what the network takes. It must be possible to send it to other processes.
        most: How many bytes they may take in memory.

    Returns:
        Batches, preprocessed, if they fit as such, with the copies that are made of them; otherwise samples that are
        preprocessed anew for every policy, and read anew if they don't fit as they came either.
    """
    prepare = Prepared(preprocess)
    whole = prepare(next(iter(split.source.batches([torch.arange(1)]))))
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves(whole)) * len(split)
    in_memory = split.source.is_kept or not isinstance(split.source, Stream)
    if in_memory and size * COPIES <= most:
        return [prepare(batch) for batch in split.batches(CUT)]
    return StreamedSamples(split.source, prepare)


class Prepared:
    """Preprocesses the inputs of a batch, and leaves its targets alone."""

    def __init__(self, preprocess: Callable[[Any], Any]) -> None:
        """Take what is done to inputs."""
        self.preprocess = preprocess

    def __call__(self, batch: Any) -> Any:
        """Return the batch as (inputs, targets), or inputs alone where there are no targets."""
        inputs = self.preprocess(inputs_of(batch))
        targets = targets_of(batch)
        if targets is None:
            return inputs
        return inputs, targets


def outputs_of(network: nn.Module, batch: Any, forward: Forward | None = None, *, copy: bool = True) -> Any:
    """Compute a network's outputs on a batch.

    Args:
        network: The network.
        batch: As a loader gives it.
        forward: Computes outputs of (network, batch), if that takes more than calling the network with the inputs.
        copy: Whether the network is given copies of the tensors: some networks change their inputs.

    Returns:
        What the network, or `forward`, returns.
    """
    if copy:
        batch = map_tensors(batch, torch.clone)
    if forward is not None:
        return forward(network, batch)
    return call(network, inputs_of(batch, network))


def samples_in(batch: Any) -> int:
    """Count the samples of a batch, as a loader gives it."""
    return count_of(inputs_of(batch))


def pieces(batch: Any, size: int) -> Iterator[tuple[Any, int]]:
    """Divide a batch into smaller ones, with the number of samples of each.

    A batch that can't be divided comes as it is.

    Args:
        batch: As a loader gives it.
        size: Samples of each, at most.
    """
    count = samples_in(batch)
    if isinstance(batch, list):
        batch = tuple(batch)  # (inputs, targets): a list would be one of samples
    for first in range(0, count, size):
        last = min(first + size, count)
        part = samples(batch, count, first, last)
        if samples_in(part) != last - first:
            yield batch, count
            return
        yield part, last - first


def _together(batches: Sequence[Any], counts: Sequence[int]) -> Any:
    """Put batches into one; None if they can't be."""
    flat = [tree_flatten(batch) for batch in batches]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        return None
    joined = []
    for column in zip(*(values for values, _ in flat), strict=True):
        first = column[0]
        if not isinstance(first, Tensor):
            if any(type(value) is not type(first) or value != first for value in column):
                return None
            joined.append(first)
            continue
        for value, count in zip(column, counts, strict=True):
            if not isinstance(value, Tensor) or not value.dim() or len(value) != count:
                return None
            if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
                return None
        if len(column) == 1:
            joined.append(first)
        else:
            joined.append(torch.cat(column))
    return tree_unflatten(joined, spec)


def _rows_of(together: Any, index: Tensor) -> Any:
    """Take some of the samples, in the memory order that they have."""

    def rows(tensor: Tensor) -> Tensor:
        taken = torch.empty_like(tensor[: len(index)])
        return torch.index_select(tensor, 0, index.to(tensor.device), out=taken)

    return map_tensors(together, rows)
