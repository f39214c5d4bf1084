"""What labels are: class numbers, one for each image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def class_numbers(labels: Any, called: str, classes: int | None = None) -> Tensor:
    """Return labels as int64.

    Args:
        labels: A tensor, an array or a list: integers of any type, of shape (images,).
        called: What they belong to, for messages: "`search`", "the train split of mydata".
        classes: How many classes there are; None if that isn't known.

    Returns:
        Labels, int64 of shape (images,).

    Raises:
        ValueError: In one sentence, for anything else, such as scores, one-hot rows or maps, and for a label that is no
            class.
    """
    try:
        numbers = torch.as_tensor(native(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{called} has labels in a {type(labels).__name__} that is no array of numbers; they must be class numbers, "
            "integers of shape (images,)"
        ) from error
    if numbers.dim() != 1 or numbers.dtype not in INTEGERS:
        raise ValueError(
            f"{called} has labels of type {numbers.dtype} and shape {tuple(numbers.shape)}; they must be class numbers, "
            "integers of shape (images,)"
        )
    numbers = numbers.long()
    if classes is not None:
        outside = numbers[(numbers < 0) | (numbers >= classes)]
        if len(outside):
            raise ValueError(
                f"{called} has the label {int(outside[0])}; with {classes} classes labels must be from 0 to {classes - 1}"
            )
    return numbers


def native(array: Any) -> Any:
    """Return an array with the bytes and the order in which torch takes it, and anything else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    # Flipped and read-only ones and those of another machine's byte order are no tensors.
    if array.dtype.isnative and array.flags.writeable and min(array.strides, default=0) >= 0:
        return array
    return array.astype(array.dtype.newbyteorder("="), order="C")
