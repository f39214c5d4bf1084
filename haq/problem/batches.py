"""Inputs and labels from whatever a user has: tensors, a DataLoader, a Dataset, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

BATCH = 250  # images of a Dataset that are put together at a time

Batches = Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]


def read_batches(data: Batches, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Read all there is into memory.

    Args:
        data: A tensor of inputs; a pair of tensors, inputs and labels; a Dataset of single inputs or of pairs
            (input, label); a DataLoader, or another iterable, of batches of inputs or of (inputs, labels).
        name: What the data are called in messages.

    Returns:
        Batches: inputs of shape (images, ...), and labels of shape (images,) or None.

    Raises:
        ValueError: If there is nothing in it, or something that is neither inputs nor (inputs, labels).
    """
    if isinstance(data, Tensor):
        return [(data, None)]
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, BATCH)
    batches = [_pair(batch, name) for batch in data]
    if not batches:
        raise ValueError(f"`{name}` gave no images")
    return batches


def read_inputs(data: Batches, name: str) -> list[Tensor]:
    """Read batches of inputs, without their labels; see `read_batches`."""
    return [inputs for inputs, _ in read_batches(data, name)]


def read_tensors(data: Batches, name: str, with_labels: bool) -> tuple[Tensor, Tensor | None]:
    """Read all inputs as one tensor, and their labels as another.

    Args:
        data: See `read_batches`.
        name: What the data are called in messages.
        with_labels: Whether labels play a part; otherwise they are left out.

    Returns:
        Inputs of shape (images, ...), and labels of shape (images,) or None.

    Raises:
        ValueError: If there is nothing in it, if labels are missing, or if they are not as many as the inputs.
    """
    batches = read_batches(data, name)
    inputs = batches[0][0]
    if len(batches) > 1:
        inputs = torch.cat([part for part, _ in batches])
    labels = None
    count = len(inputs)
    if with_labels:
        parts = [part for _, part in batches if part is not None]
        if len(parts) < len(batches):
            raise ValueError(
                f'`{name}` has no labels to tell the accuracy by: give (inputs, labels), or objective="agreement"'
            )
        labels = torch.cat(parts)
        count = len(labels)
    if len(inputs) != count or not count:
        raise ValueError(f"`{name}` needs as many images as labels, at least one; got {len(inputs)} and {count}")
    return inputs, labels


def _pair(batch: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Take one batch apart."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        labels = None
        if len(batch) > 1 and batch[1] is not None:
            labels = torch.as_tensor(batch[1])
        return batch[0], labels
    kind = type(batch).__name__
    raise ValueError(f"`{name}` gave a {kind}; it must give tensors of inputs, or pairs (inputs, labels) of tensors")
