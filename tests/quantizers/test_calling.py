"""A network is called with whatever structure a loader gives, and inputs and targets are found in it."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from quantizers import calling


class Echo(nn.Module):
    """Returns what it is called with."""


class One(Echo):
    def forward(self, x: Any) -> Any:
        return x


class Two(Echo):
    def forward(self, x: Any, y: Any) -> Any:
        return "two", x, y


class Optional(Echo):
    def forward(self, images: Any, targets: Any = None) -> Any:
        return "optional", images, targets


class Named(Echo):
    def forward(self, input_ids: Any = None, mask: Any = None, labels: Any = None) -> Any:
        return "named", input_ids, mask, labels


class NeedsLabels(Echo):
    def forward(self, x: Any, labels: Any) -> Any:
        return "needs", x, labels


X, Y, N = torch.rand(4, 3), torch.rand(4, 5), torch.arange(4)
IMAGES = [torch.rand(3, 6, 5), torch.rand(3, 4, 7)]
BOXES = [{"boxes": torch.rand(2, 4)}, {"boxes": torch.rand(1, 4)}]


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as tokenizers give."""


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    words: list[str]
    parts: tuple[Tensor, Tensor]


def parallel(network: nn.Module) -> nn.Module:
    """Wrap a network as a machine without GPUs does."""
    with mock.patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):
        return nn.DataParallel(network)


def same(one: Any, other: Any) -> bool:
    """Compare structures with tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict | UserDict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    ("network", "inputs", "expected"),
    [
        (One(), X, X),
        (One(), IMAGES, IMAGES),
        (One(), (X, Y), (X, Y)),
        (One(), (X,), X),
        (One(), {"a": X}, {"a": X}),
        (One(), {"x": X}, X),
        (One(), {1: X}, {1: X}),
        (Two(), (X, Y), ("two", X, Y)),
        (Two(), [X, Y], ("two", X, Y)),
        (Two(), {"y": Y, "x": X}, ("two", X, Y)),
        (Two(), Pair(X, Y), ("two", X, Y)),
        (Optional(), (X, Y), ("optional", X, Y)),
        (Optional(), IMAGES, ("optional", IMAGES, None)),
        (Named(), Encoding(mask=Y, input_ids=X), ("named", X, Y, None)),
        (parallel(One()), {"a": X}, {"a": X}),
    ],
)
def test_tuples_and_mappings_are_spread_where_the_signature_has_room(network: nn.Module, inputs: Any, expected: Any) -> None:
    assert same(calling.call(network, inputs), expected)


def test_a_packed_sequence_is_one_input() -> None:
    packed = pack_sequence([torch.rand(3, 2), torch.rand(1, 2)])
    assert calling.call(nn.LSTM(2, 3), packed)[0].data.shape == (4, 3)
    assert calling.count_of(packed) == 2
    assert isinstance(calling.to_device(packed, "cpu"), PackedSequence)
    doubled = calling.map_tensors(packed, lambda tensor: tensor * 2)
    assert torch.equal(doubled.data, packed.data * 2)


@pytest.mark.parametrize(
    ("network", "batch", "inputs", "targets"),
    [
        (None, X, X, None),
        (None, X.numpy(), X, None),
        (None, (X,), X, None),
        (None, (X, N), X, N),
        (None, [X.numpy(), N.numpy()], X, N),
        (None, (X, N, "ignored", 3), X, N),
        (None, ((X, Y), N), (X, Y), N),
        (None, [[X, Y], N], (X, Y), N),  # as a DataLoader puts ((x, y), n) together
        (None, [[X[:2], Y[:2]], N[:2]], (X[:2], Y[:2]), N[:2]),
        (Two(), ([X, Y],), (X, Y), None),
        (None, ({"a": X}, N), {"a": X}, N),
        (None, (IMAGES, BOXES), IMAGES, BOXES),
        (None, (tuple(IMAGES), tuple(BOXES)), IMAGES, tuple(BOXES)),  # as zip(*samples) puts them together
        (None, ((*IMAGES, IMAGES[0]), N[:3]), [*IMAGES, IMAGES[0]], N[:3]),
        (None, ((X, Y), (N, N)), (X, Y), (N, N)),
        (Optional(), (IMAGES,), IMAGES, None),
        (None, {"x": X, "labels": N}, {"x": X}, N),
        (None, {"x": X, "target": N, "label": Y}, {"x": X, "target": N}, Y),
        (None, Encoding(input_ids=X, labels=N), Encoding(input_ids=X), N),
        (NeedsLabels(), {"x": X, "labels": Y, "target": N}, {"x": X, "labels": Y}, N),
        (NeedsLabels(), {"x": X, "labels": Y}, {"x": X, "labels": Y}, None),
        (Named(), {"input_ids": X, "labels": N}, {"input_ids": X}, N),
    ],
)
def test_inputs_and_targets_are_found_in_every_form_of_a_batch(network: Any, batch: Any, inputs: Any, targets: Any) -> None:
    assert same(calling.inputs_of(batch, network), inputs)
    assert same(calling.targets_of(batch, network), targets)
    assert type(calling.inputs_of(batch, network)) is type(inputs)


@pytest.mark.parametrize(
    ("structure", "count", "first"),
    [
        (X, 4, X[:1]),
        ((X, Y), 4, (X[:1], Y[:1])),
        ({"x": X, "temperature": torch.tensor(1.0), "table": torch.rand(2)}, 4, None),
        (IMAGES, 2, IMAGES[:1]),
        ({"images": IMAGES, "x": X[:2]}, 2, {"images": IMAGES[:1], "x": X[:1]}),
        (([{"x": X}, {"x": Y}, {"x": N}], N[:3]), 3, ([{"x": X}], N[:1])),
        (5, 1, 5),
        (torch.tensor(3.0), 1, torch.tensor(3.0)),
    ],
)
def test_samples_are_counted_and_cut(structure: Any, count: int, first: Any) -> None:
    assert calling.count_of(structure) == count
    if first is None:
        first = {**structure, "x": X[:1]}
    assert same(calling.first_sample(structure, count), first)
    again = calling.samples(structure, count, 0, count)
    assert same(again, structure)


def test_every_structure_keeps_its_kind_and_is_left_alone() -> None:
    record = Record(X, ["a"], (Y, N))
    made = calling.map_tensors({"record": record, "array": X.numpy(), "none": None}, lambda tensor: tensor.float() + 1)
    assert isinstance(made["record"], Record)
    assert torch.equal(made["record"].parts[1], N + 1.0)
    assert made["record"].words == ["a"]
    assert torch.equal(record.x, X)
    assert torch.equal(made["array"], X + 1)
    assert made["none"] is None
    assert isinstance(calling.map_tensors(Pair(X, Y), lambda tensor: tensor), Pair)
    assert isinstance(calling.to_device(Encoding(x=X), "meta"), Encoding)


def test_leaves_are_all_tensors_in_order_in_outputs_of_hugging_face_too() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.SequenceClassifierOutput(logits=X, hidden_states=(Y, N))
    assert same(calling.leaves(output), [X, Y, N])
    moved = calling.to_device(output, "meta")
    assert isinstance(moved, outputs.SequenceClassifierOutput)
    assert moved.logits.device.type == "meta"
    assert output.logits.device.type == "cpu"
    assert same(calling.leaves(Record(X, ["a"], (Y, N))), [X, Y, N])
    assert same(calling.leaves([np.array(["a"]), N.numpy(), {"a": X}]), [N, X])


class Movable:
    """Somebody's own class of inputs."""

    device = "cpu"

    def to(self, device: Any) -> Movable:
        made = Movable()
        made.device = str(device)
        return made


def test_everything_in_a_batch_is_moved() -> None:
    moved = calling.to_device((X, [Movable(), {"a": X.numpy()}], "text"), "meta")
    assert [leaf.device.type for leaf in calling.leaves(moved)] == ["meta", "meta"]
    assert moved[1][0].device == "meta"
    assert calling.device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert calling.device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert calling.device_of(nn.ReLU()).type == "cpu"
