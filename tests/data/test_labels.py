"""Labels are class numbers, of any integer type; everything else is refused in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from haq import data
from haq.data import loading
from haq.data.labels import class_numbers

NUMBERS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "numpy", "numpy16", "list"]
)
def test_every_integer_type_is_taken(kind: str) -> None:
    given: Any = NUMBERS.tolist()
    if kind == "numpy":
        given = NUMBERS.numpy()
    elif kind == "numpy16":
        given = NUMBERS.numpy().astype(np.uint16)
    elif kind != "list":
        given = NUMBERS.to(getattr(torch, kind))
    labels = class_numbers(given, "`search`", 3)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, NUMBERS)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (NUMBERS.float(), r"type torch.float32 and shape \(3,\)"),
        (NUMBERS.bool(), "type torch.bool"),
        (NUMBERS[:, None], r"shape \(3, 1\)"),
        (torch.eye(3).long(), r"shape \(3, 3\)"),
        (torch.zeros(3, 8, 8).long(), r"shape \(3, 8, 8\)"),
        (torch.tensor(1), r"shape \(\)"),
        (NUMBERS.numpy().astype(float), "type torch.float64"),
        (["cat", "dog"], "labels in a list that is no array of numbers"),
        (None, "labels in a NoneType"),
        (torch.tensor([0, 3]), "has the label 3; with 3 classes labels must be from 0 to 2"),
        (torch.tensor([0, -100]), "has the label -100; with 3 classes"),
    ],
)
def test_what_is_no_class_number_is_refused(labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^`search` .*{sentence}"):
        class_numbers(labels, "`search`", 3)


@pytest.mark.parametrize("kind", ["int8", "int32", "uint8", "uint16"])
def test_data_sets_take_every_integer_type(kind: str) -> None:
    images, labels = torch.zeros(3, 1, 8, 8), NUMBERS.to(getattr(torch, kind))
    split = data.Split(images, labels)
    assert torch.equal(data.Dataset("mine", tuple("abc"), split, split, split).train.labels, NUMBERS)
    made = loading._from_dict(
        "mine", dict.fromkeys(("train", "search"), (images, labels)) | {"test": (images.numpy(), labels.numpy())}
    )
    assert made.test.labels.dtype == torch.int64
