"""The samples that policies are judged on, in batches that are gone through again for every policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantizers.calling import Forward, call, count_of, first_sample, inputs_of, leaves, map_tensors, samples, to_device

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
        counts = [samples_in(batch) for batch in batches]
        self.count = sum(counts)
        if not self.count:
            raise ValueError("there are no samples")
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


def outputs_of(network: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Compute a network's outputs on a batch.

    Args:
        network: The network.
        batch: As a loader gives it; it stays as it is, since the network is given copies of its tensors.
        forward: Computes outputs of (network, batch), if that takes more than calling the network with the inputs.

    Returns:
        What the network, or `forward`, returns.
    """
    copied = map_tensors(batch, torch.clone)
    if forward is not None:
        return forward(network, copied)
    return call(network, inputs_of(copied, network))


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
