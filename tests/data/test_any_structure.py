"""Samples of any structure: whatever a function returns becomes three splits that share no sample, and no group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from haq import data
from haq.data.sources import source_of
from quantizers.calling import leaves

N = 40
X = torch.arange(N).float().view(N, 1).repeat(1, 6)  # every sample is its own number
MASKS = torch.randint(0, 3, (N, 4, 4), generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(N).view(N, 1).repeat(1, 7)


def load(made: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> data.Dataset:
    monkeypatch.setattr(sys.modules[__name__], "made_here", lambda: made, raising=False)
    return data.load(f"{__name__}:made_here", **options)


def numbers(split: data.Split) -> list[int]:
    """The numbers of a split's samples."""
    return [int(leaf) for inputs, _ in split.batches(7) for leaf in leaves(inputs)[0].flatten(1)[:, 0]]


class Pairs(Dataset[Any]):
    """Samples of a map-style data set: boxes of a picture by name, as many as there are."""

    def __init__(self, count: int = N) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.full((3, 4, 4 + index % 2), float(index)), {"boxes": torch.zeros(index % 3, 4)}


def pictures(samples: list[Any]) -> Any:
    return [image for image, _ in samples], [target for _, target in samples]


class Stream(IterableDataset[Any]):
    """Single samples, one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, MASKS, strict=True))


class Batches:
    """Batches from the beginning, whenever it is asked to."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def texts() -> list[Any]:
    """Batches of sentences of different lengths, by name."""
    return [
        {
            "input_ids": torch.full((4, 3 + n % 5), n),
            "attention_mask": torch.ones(4, 3 + n % 5),
            "labels": torch.ones(4, 2),
        }
        for n in range(10)
    ]


FORMS: dict[str, Any] = {
    "regression": (X, X[:, 0] / N),
    "segmentation": (X, MASKS),
    "NumPy": (X.numpy(), MASKS.numpy()[::-1]),
    "tokens without targets": TOKENS,
    "two inputs": ((X, TOKENS), X[:, :1]),
    "by name": {"pixels": X, "words": TOKENS, "labels": MASKS},
    "a Dataset": TensorDataset(X, MASKS),
    "a DataLoader": DataLoader(TensorDataset(X, MASKS), 6),
    "a loader that shuffles": DataLoader(TensorDataset(X, MASKS), 6, shuffle=True),
    "a loader with workers": DataLoader(TensorDataset(X, MASKS), 6, num_workers=1),
    "an IterableDataset": Stream(),
    "batches": Batches(list(zip(X.split(6), MASKS.split(6), strict=True))),
    "a generator": zip(X.split(6), MASKS.split(6), strict=True),
    "ragged texts": Batches(texts()),
    "pictures with boxes": DataLoader(Pairs(), 5, collate_fn=pictures),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_three_disjoint_splits_that_never_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "pictures with boxes":
        dataset = load({"train": FORMS[name]}, monkeypatch)
        found = [int(image[0, 0, 0]) for split in splits(dataset) for images, _ in split.batches(7) for image in images]
        assert sorted(found) == list(range(N))
        return
    made = FORMS[name]
    if name == "a generator":
        made = zip(X.split(6), MASKS.split(6), strict=True)
    dataset = load({"train": made}, monkeypatch)
    assert [len(split) for split in splits(dataset)] == [24, 8, 8]
    assert dataset.classes == ()
    assert "24 train / 8 search / 8 test samples, disjoint, split seed 0" in dataset.describe()
    if name == "ragged texts":
        return
    of_splits = [numbers(split) for split in splits(dataset)]
    assert sorted(of_splits[0] + of_splits[1] + of_splits[2]) == list(range(N))
    plain = load({"train": FORMS["segmentation"]}, monkeypatch)
    assert of_splits == [numbers(split) for split in splits(plain)]


def splits(dataset: data.Dataset) -> tuple[data.Split, data.Split, data.Split]:
    return dataset.train, dataset.search, dataset.test


def test_inputs_and_targets_keep_their_structure() -> None:
    inputs, targets = data.Split((X, {"words": TOKENS}), [{"boxes": row} for row in X]).take(torch.tensor([3, 1]))
    assert isinstance(inputs, tuple)
    assert inputs[1]["words"][:, 0].tolist() == [3, 1]
    assert [int(target["boxes"][0]) for target in targets] == [3, 1]
    split = data.Split(source_of(DataLoader(Pairs(), 5, collate_fn=pictures), "it", 10**9))
    (images, targets), *_ = split.batches(4)
    assert [tuple(image.shape) for image in images] == [(3, 4, 4), (3, 4, 5), (3, 4, 4), (3, 4, 5)]
    assert [len(target["boxes"]) for target in targets] == [0, 1, 2, 0]
    split = data.Split(source_of(Batches(texts()), "it", 10**9))
    inputs, targets = next(iter(split.batches(3)))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (3, 3)
    assert targets.shape == (3, 2)


def test_a_stream_gives_any_of_its_samples() -> None:
    kept = data.Split(source_of(Batches(list(zip(X.split(6), MASKS.split(6), strict=True))), "it", 10**9))
    streamed = data.Split(source_of(Batches(list(zip(X.split(6), MASKS.split(6), strict=True))), "it", 10))
    assert (kept.source.is_kept, streamed.source.is_kept) == (True, False)
    index = torch.tensor([39, 0, 17, 5, 6])
    for split in (kept, streamed):
        inputs, targets = split.take(index)
        assert inputs[:, 0].tolist() == index.tolist()
        assert torch.equal(targets, MASKS[index])
        part = split.subset(torch.tensor([1, 5, 30, 31]))
        assert sorted(numbers(part)) == [1, 5, 30, 31]
    parts = [torch.arange(4), torch.arange(4, 11), torch.arange(30, 40)]
    assert [batch[0][:, 0].tolist() for batch in streamed.source.batches(parts)] == [part.tolist() for part in parts]


def test_labels_are_told_where_targets_are_class_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(N) % 4
    for made in (TensorDataset(X, labels), Batches(list(zip(X.split(6), labels.split(6), strict=True))), (X, labels)):
        dataset = load({"train": made, "test": (X, labels)}, monkeypatch)
        assert dataset.classes == ("0", "1", "2", "3")
        assert torch.bincount(dataset.search.labels).tolist() == [2, 2, 2, 2]
        assert torch.bincount(dataset.train.labels[dataset.fair(8)]).tolist() == [2, 2, 2, 2]
    assert data.Split(X, MASKS).labels is None
    named = load({"train": (X, labels), "test": (X, labels), "classes": list("abcd")}, monkeypatch)
    assert named.classes == ("a", "b", "c", "d")


class Listed(Dataset[Any]):
    """Lists its labels as torchvision's data sets do, and counts how often a sample is read."""

    def __init__(self, targets: Tensor) -> None:
        self.targets, self.read = targets.tolist(), 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        return torch.zeros(3), index % 7


def test_labels_that_a_data_set_lists_are_taken_if_they_are_right() -> None:
    right, wrong = Listed(torch.arange(1000) % 7), Listed(torch.arange(1000) % 6)
    for dataset in (right, wrong):
        source = source_of(dataset, "it", 100)
        assert torch.equal(data.Split(source).labels, torch.arange(1000) % 7)
    assert right.read < 200
    assert wrong.read >= 1000


PEOPLE = np.array([f"person {number // 3}" for number in range(N)])


@pytest.mark.parametrize("form", ["beside", "by split", "attribute", "numbers"])
def test_splits_share_no_group(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"train": (X, MASKS)}
    if form == "attribute":
        made["train"] = TensorDataset(X, MASKS)
        made["train"].groups = PEOPLE.tolist()
    elif form == "by split":
        made["groups"] = {"train": PEOPLE}
    elif form == "numbers":
        made["groups"] = torch.arange(N) // 3
    else:
        made["groups"] = PEOPLE
    dataset = load(made, monkeypatch)
    groups = [{number // 3 for number in numbers(split)} for split in splits(dataset)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert sum(map(len, splits(dataset))) == N
    assert 4 <= len(dataset.search) <= 10
    assert "disjoint by group (14 groups)" in dataset.describe()


def test_groups_that_are_no_groups_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"has 40 samples and groups of shape \(3,\); it must have one for each"):
        load({"train": (X, MASKS), "groups": [1, 2, 3]}, monkeypatch)
    with pytest.raises(ValueError, match="has samples of one group only; a group must be held out"):
        load({"train": (X, MASKS), "groups": ["a"] * N}, monkeypatch)
    shared = {"train": np.array(["a", "b"] * 20), "test": ["a"] * N}
    with pytest.raises(ValueError, match="samples of one group .* in its train and in its test split; every group must"):
        load({"train": (X, MASKS), "test": (X, MASKS), "groups": shared, "search": (X, MASKS)}, monkeypatch)


def test_orders_of_ones_own_are_respected_or_refused() -> None:
    both = TensorDataset(X, MASKS)
    part = source_of(DataLoader(both, 4, sampler=SubsetRandomSampler([3, 5, 8])), "it", 10**9)
    assert [int(row[0]) for row in part.take(torch.arange(3))[0]] == [3, 5, 8]
    backwards = source_of(DataLoader(both, 4, sampler=list(range(9, -1, -1))), "it", 10**9)
    assert [int(row[0]) for row in backwards.take(torch.arange(10))[0]] == list(range(9, -1, -1))
    fixed = source_of(DataLoader(both, batch_sampler=[[1, 2], [7, 9]]), "it", 10**9)
    assert [int(row[0]) for row in fixed.take(torch.arange(4))[0]] == [1, 2, 7, 9]
    weighted = DataLoader(both, 8, sampler=WeightedRandomSampler(torch.ones(N), N))
    with pytest.raises(ValueError, match="`search` gives other data each time it is read .* leave shuffling"):
        source_of(weighted, "`search`", 10**9)


class Noisy(Dataset[Any]):
    """Another sample each time."""

    def __init__(self, quiet: int = 0) -> None:
        self.quiet = quiet

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        if index < self.quiet:
            return X[index]
        return torch.rand(6)


class Changing:
    """Batches of which a later one is another in the second pass over all."""

    def __init__(self, how: str) -> None:
        self.how, self.passes = how, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for number, batch in enumerate(X.split(6)):
            if self.passes > 2 and self.how == "more" and number == 0:
                yield batch
            if self.passes > 2 and self.how == "fewer" and number == 6:
                return
            if self.passes > 2 and self.how == "others" and number == 4:
                yield batch + 1
            else:
                yield batch


def test_data_that_change_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the train split of .* gives other data each time it is read .its first samples"):
        load({"train": Noisy()}, monkeypatch)
    # Once it is in memory it changes no more.
    assert len(load({"train": Noisy(quiet=10)}, monkeypatch).train) == 24


@pytest.mark.parametrize("how", ["others", "more", "fewer"])
def test_a_stream_that_changes_later_is_named(how: str) -> None:
    # The first pass counts, the second looks at the first batch.
    source = source_of(Changing(how), "`search`", 10)
    with pytest.raises(ValueError, match="`search` gives other data each time it is read"):
        list(source)  # type: ignore[call-overload]


class Broken(Pairs):
    """Can't read a sample."""

    def __getitem__(self, index: int) -> Any:
        raise KeyError(f"no file {index}\n")


def test_a_sample_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"`search` raised KeyError for sample 0 .'no file 0.*: mend it"):
        source_of(Broken(), "`search`", 10**6)


def test_what_can_be_gone_through_once_is_kept_or_refused() -> None:
    assert source_of((batch for batch in X.split(6)), "it", 10**6).is_kept
    with pytest.raises(
        ValueError, match=r"`search` can be gone through only once .it is a generator., and doesn't fit into the 100 B"
    ):
        source_of((batch for batch in X.split(6)), "`search`", 100)
    with pytest.raises(ValueError, match="gave no samples"):
        source_of((batch for batch in ()), "`search`", 100)
    with pytest.raises(TypeError, match="`search` is 3; it must be a tensor, a pair"):
        source_of(3, "`search`", 100)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"train": (X, MASKS[:30])}, "the train split of .* has parts of 30 and of 40 samples"),
        (
            {"train": (X, MASKS), "test": (X, MASKS.float())},
            "the test split of .* has batches of 2-d .*float32, 3-d .*float32",
        ),
        ({"train": (X * np.nan, MASKS)}, "has values that are not finite"),
        ({"train": 3}, "the train split of .* is 3; it must be a tensor, a pair"),
        ({"train": (["a"], ["b"])}, "holds what is no tensor or array of numbers"),
        ({"train": X, "tests": X}, "returned dict; it must return a haq.data.Dataset, or a dict with train and test"),
        ({"train": X[:1]}, "has 1 samples; it takes two"),
        ({"train": X, "test": X}, "search-images is 21; the search split is cut from .*, of 40 samples: it can be up to 20"),
        ({"train": X, "search": X}, "search-images is 5, and .* gives a search split of its own"),
    ],
)
def test_what_cannot_be_samples_is_one_sentence(made: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {}
    if "search-images is" in message:
        options["search_images"] = int(message.split()[2].rstrip(",;"))
    with pytest.raises(ValueError, match=message) as error:
        load(made, monkeypatch, **options)
    assert "\n" not in str(error.value)


def test_a_loader_that_fills_the_same_memory_is_copied() -> None:
    memory = torch.zeros(6, 6)

    def refilled() -> Iterator[Tensor]:
        for batch in X.split(6)[:6]:
            yield memory.copy_(batch)

    source = source_of(refilled(), "it", 10**6)
    assert [int(row[0]) for row in source.take(torch.arange(36))] == list(range(36))


def test_reading_draws_from_no_common_generator() -> None:
    before = torch.get_rng_state()
    split = data.Split(source_of(DataLoader(TensorDataset(X, MASKS), 6, shuffle=True, num_workers=1), "it", 100))
    assert numbers(split) == list(range(N))
    assert torch.equal(torch.get_rng_state(), before)


class Duck:
    """A data set that is none of torch's, as those of Hugging Face, which gives lists of numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": [number, 1, 2, 3, 4], "label": number % 3}


@pytest.mark.parametrize("kind", ["data set", "list of mappings", "list of pairs", "list of tensors"])
def test_samples_by_index_are_samples_and_no_batches(kind: str) -> None:
    given: Any = Duck()
    if kind == "list of mappings":
        given = [Duck()[number] for number in range(N)]
    elif kind == "list of pairs":
        given = [(X[number], number % 3) for number in range(N)]
    elif kind == "list of tensors":
        given = [(X[number], torch.tensor(number % 3)) for number in range(N)]
    source = source_of(given, "`search`", 10**6)
    assert source.count == N
    first = leaves(source.take(torch.tensor([7, 9])))[0]
    assert first[:, 0].tolist() == [7, 9]
    assert source.labels is not None
    assert source.labels.tolist() == [number % 3 for number in range(N)]


def test_a_list_of_batches_stays_one() -> None:
    batches = [(X[first : first + 8], MASKS[first : first + 8]) for first in range(0, N, 8)]
    assert source_of(batches, "`search`", 10**6).count == N
    assert source_of([{"x": X[:8], "labels": torch.zeros(8)}] * 2, "`search`", 10**6).count == 16
