"""`Dataset`: images and labels in the three splits that a search needs.

`train` is for training and fine-tuning, `search` is what a policy is evaluated on while searching, `test` is what results
are reported on. The three are disjoint and depend on nothing but the data set (never on a run's seed), so that a network
trained on `train` has seen neither of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from haq.data.image_files import ORIENTATIONS as ORIENTATIONS
from haq.data.image_files import ImageFiles as ImageFiles
from haq.data.image_files import read_image as read_image
from haq.data.labels import INTEGERS
from haq.data.sources import Columns, Source, Stream
from haq.data.structures import Batch, length, pieces
from quantizers.calling import inputs_of, leaves, targets_of

SPLIT_SEED = 0  # of what is held out of the train split for the search
UNLABELLED = -1  # in place of a label where there is none
COMPARED = 64  # images of each split whose values are compared
FEW = 8  # of those that aren't in memory
MOST_APART = 50.0  # times that values of two splits may differ on average: 0..1 and 0..255 are 255 times apart


class Images(Protocol):
    """Anything that gives images by index: a tensor, or files decoded when they are asked for."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images of these indices, (N, C, H, W)."""
        ...

    def __len__(self) -> int:
        """Count the images."""
        ...


class Split:
    """Samples: inputs and targets of any structure.

    Those of image classification are images, uint8 of shape (N, C, H, W) (or float, taken as they are), and labels, int64 of
    shape (N,).

    Attributes:
        source: Where they come from.
        groups: The group of every sample, int64 (N,), such as the person that a picture shows; None where there are no groups.
    """

    def __init__(self, images: Any, labels: Any = None, groups: Any = None) -> None:
        """Take samples.

        Args:
            images: Inputs: a tensor, a structure of tensors and lists with an entry for each sample, or what gives images by
                index. Or samples of any kind, without `labels` (`haq.data.sources`).
            labels: Targets, likewise; labels of any integer type become int64. None: inputs alone.
            groups: The group of every sample: numbers or names.

        Raises:
            ValueError: Unless there are as many labels as images, and as many groups.
        """
        source = images
        if not isinstance(images, Source):
            batch = images
            if labels is not None:
                if isinstance(labels, Tensor) and labels.dtype in INTEGERS:
                    labels = labels.long()
                if length(images) != length(labels):
                    raise ValueError(f"{length(images)} images but {length(labels)} labels")
                batch = (images, labels)
            source = Columns(batch)
        self.source: Source = source
        self.groups = group_numbers(groups, len(self), source.called)

    def __len__(self) -> int:
        """Count the samples."""
        return self.source.count

    def __repr__(self) -> str:
        """Say how many samples there are, and where they are."""
        return f"Split({len(self):,} samples, {type(self.source).__name__})"

    @property
    def images(self) -> Any:
        """Return the inputs, which give those of some samples by index."""
        batch = getattr(self.source, "batch", None)
        if isinstance(batch, tuple) and batch:
            return batch[0]
        if isinstance(batch, Tensor):
            return batch
        return Inputs(self)

    @property
    def labels(self) -> Any:
        """Return class numbers, int64 (N,), where targets are such; otherwise None.

        Of samples that are neither in memory nor in files all are read for it, the first time.
        """
        return self.source.labels

    @property
    def targets(self) -> Any:
        """Return all targets, if they are at hand in one piece; otherwise None."""
        batch = getattr(self.source, "batch", None)
        if isinstance(batch, tuple) and len(batch) > 1:
            return batch[1]
        return None

    @property
    def is_of_images(self) -> bool:
        """Say whether inputs are images, (C, H, W) of uint8 or floats each."""
        images = self.images
        if isinstance(images, ImageFiles):
            return True
        if isinstance(images, Inputs):
            images = self.take(torch.arange(1))[0]
        return isinstance(images, Tensor) and images.dim() == 4 and (images.dtype == torch.uint8 or images.is_floating_point())

    @property
    def samples_are(self) -> str:
        """Name the samples, several of them: images, or samples where inputs are anything else."""
        if len(self) and not self.is_of_images:
            return "samples"
        return "images"

    @property
    def compared(self) -> int:
        """Tell how many samples are looked at to see whether splits are alike: few, where each must be read for it."""
        if self.source.is_kept:
            return COMPARED
        return FEW

    def take(self, index: Tensor) -> tuple[Any, Any]:
        """Return inputs and targets of the samples of these indices, in this order.

        Args:
            index: Integers, shape (count,).

        Returns:
            Inputs and targets of the samples, put together as one batch; targets are None where there are none.
        """
        return _pair(self.source.take(index))

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield (inputs, targets), in order, or shuffled by `generator`; a last single sample joins the batch before it.

        Samples that can't be put together otherwise, and those that are streamed and not in memory, stay in the batches and in
        the order in which they are given.

        Args:
            size: Samples of a batch, at most.
            generator: Shuffles.

        Yields:
            Inputs and targets; targets are None where there are none.
        """
        if isinstance(self.source, Stream):
            for batch in self.source.shuffled(generator):
                yield from map(_pair, pieces(batch, length(batch), size))
            return
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        yield from map(_pair, self.source.batches(parts_of(order, size)))

    def subset(self, index: Tensor) -> Split:
        """Take the samples of these indices; files stay undecoded.

        Args:
            index: Integers, shape (count,).

        Returns:
            A split of these samples alone, in this order, with their groups.
        """
        made = Split(self.source.subset(index))
        if self.groups is not None:
            made.groups = self.groups[index]
        return made


class Inputs:
    """The inputs of a split by index, without their targets."""

    def __init__(self, split: Split) -> None:
        """Take the split."""
        self.split = split

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.split)

    def __getitem__(self, index: Tensor) -> Any:
        """Return the inputs of the samples of these indices."""
        return self.split.take(index)[0]


@dataclass(frozen=True)
class Dataset:
    """A named data set: its class names and its three disjoint splits.

    One without labels has no classes, and UNLABELLED for every label.

    Raises:
        ValueError: Naming the split, if one is empty, holds what is no data, or isn't like the train split.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    search: Split
    test: Split
    origin: str = field(default="")

    def __post_init__(self) -> None:
        """Raise ValueError, naming the split, if one is empty, holds what is no data, or isn't like the train split."""
        of_images = self.train.is_of_images
        for name in ("train", "search", "test"):
            called = f"the {name} split of {self.name}"
            split = getattr(self, name)
            if not len(split):
                raise ValueError(f"{called} is empty; it must have at least one image")
            labels = split.source.known_labels
            if labels is None:
                labels = split.targets
            if self.classes and labels is not None:
                check_labels(labels, called)
                if labels.dtype != torch.int64:
                    raise ValueError(f"{called} has labels of type {labels.dtype}; they must be torch.int64")
            if of_images:
                self._check_alike(split, called)
            else:
                self._check_same_kind(split, called)
            if self.classes and labels is not None and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise ValueError(
                    f"the {name} split of {self.name} has labels from {int(labels.min())} to {int(labels.max())}, "
                    f"outside its {len(self.classes)} classes"
                )
        self._check_groups()

    def _check_groups(self) -> None:
        """Raise ValueError if splits share a group, naming it."""
        seen: dict[int, str] = {}
        for name in ("train", "search", "test"):
            groups = getattr(self, name).groups
            if groups is None:
                continue
            for group in groups.unique().tolist():
                if group in seen:
                    raise ValueError(
                        f"{self.name} has samples of one group (number {group}) in its {seen[group]} and in its {name} split; "
                        "every group must be in one split only"
                    )
                seen[group] = name

    def _check_same_kind(self, split: Split, called: str) -> None:
        """Raise ValueError unless a split's samples have the structure and the types of the train split's."""
        first, of_train = (part.take(torch.arange(1)) for part in (split, self.train))
        kinds, kinds_of_train = ([f"{leaf.dim()}-d {leaf.dtype}" for leaf in leaves(one)] for one in (first, of_train))
        if kinds != kinds_of_train:
            raise ValueError(
                f"{called} has batches of {', '.join(kinds) or 'no tensors'}, its train split of "
                f"{', '.join(kinds_of_train) or 'no tensors'}; all splits must be alike"
            )
        for leaf in leaves(first):
            if leaf.is_floating_point() and not leaf.isfinite().all():
                raise ValueError(f"{called} has values that are not finite (NaN or infinity): mend or leave them out")

    def _check_alike(self, split: Split, called: str) -> None:
        """Raise ValueError unless a split's images are of the kind, the shape and about the scale of the train split's."""
        # A file is decoded when it is asked for; all of them are of one kind.
        if isinstance(split.images, ImageFiles) and isinstance(self.train.images, ImageFiles):
            return
        few, of_train = (part.images[torch.arange(min(part.compared, len(part)))] for part in (split, self.train))
        check_images(few, called)
        if few.dtype != of_train.dtype:
            raise ValueError(
                f"{called} has images of type {few.dtype}, its train split {of_train.dtype}; both must be of one type"
            )
        if few.shape[1:] != of_train.shape[1:]:
            raise ValueError(
                f"{called} has images of shape {tuple(few.shape[1:])}, its train split {tuple(of_train.shape[1:])}; both must "
                "be of one shape (channels, height, width)"
            )
        if few.dtype == torch.uint8:
            return
        size, size_of_train = (float(images.double().abs().mean()) for images in (few, of_train))
        if min(size, size_of_train) > 0 and not 1 / MOST_APART < size / size_of_train < MOST_APART:
            raise ValueError(
                f"{called} has values of {size:.3g} on average, its train split {size_of_train:.3g}; both must be on one "
                "scale, such as from 0 to 1"
            )

    def describe(self) -> str:
        """Describe the splits in one line.

        Returns:
            Name, origin, classes, sizes of the splits and the seed that made them.
        """
        by_group = ""
        if self.train.groups is not None:
            count = sum(len(part.groups.unique()) for part in (self.train, self.search, self.test) if part.groups is not None)
            by_group = f" by group ({count:,} groups)"
        return (
            f"{self.name} ({self.origin}): {self._classes_words()}, {len(self.train):,} train / "
            f"{len(self.search):,} search / {len(self.test):,} test {self.train.samples_are}, disjoint{by_group}, "
            f"split seed {SPLIT_SEED}"
        )

    @property
    def has_targets(self) -> bool:
        """Say whether samples have targets, labels or other ones."""
        targets = self.search.take(torch.arange(1))[1]
        if isinstance(targets, Tensor) and not self.classes and targets.tolist() == [UNLABELLED]:
            return False
        return targets is not None

    def _classes_words(self) -> str:
        if self.classes:
            return f"{len(self.classes)} classes"
        if self.has_targets:
            return "targets that are no classes"
        return "no labels"

    def fair(self, count: int) -> Tensor:
        """Return indices of `count` train samples, of every class as many, in an order that never changes.

        Where classes aren't known without reading all samples, they are drawn from all of them alike.

        Args:
            count: How many samples.

        Returns:
            Integers, shape (count,), or fewer where a class has too few samples.
        """
        labels = self.train.source.known_labels
        classes = len(self.classes)
        if not self.classes or labels is None:
            labels = torch.zeros(len(self.train), dtype=torch.long)
            classes = 1
        return balanced(labels, 0, -(-count // classes))[:count]

    def signature(self) -> str:
        """Hash the targets of every split and the first search samples: what a resumed run compares.

        Returns:
            16 hexadecimal digits of SHA-256.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.search, self.test):
            digest.update(_signed_targets(split))
        if isinstance(self.search.source, Stream):
            return digest.hexdigest()[:16]
        inputs, _ = self.search.take(torch.arange(min(64, len(self.search))))
        for leaf in leaves(inputs):
            digest.update(_bits(leaf))
        return digest.hexdigest()[:16]


def _signed_targets(split: Split) -> bytes:
    """Return what tells the targets of one split from those of another."""
    if isinstance(split.source, Stream):
        return repr((split.source.fingerprints, len(split))).encode()
    labels = split.source.known_labels
    if labels is not None:
        return labels.numpy().tobytes()
    if isinstance(split.source, Columns):
        return b"".join(map(_bits, leaves(split.targets)))
    few = split.take(torch.arange(min(64, len(split))))
    return f"{len(split)}".encode() + b"".join(map(_bits, leaves(few)))


def _bits(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    return values.numpy().tobytes()


def _pair(batch: Batch) -> tuple[Any, Any]:
    # What is a tuple of inputs, and what a list of samples, was told when the samples were read.
    if isinstance(batch, tuple) and len(batch) > 1:
        return batch[0], batch[1]
    return inputs_of(batch), targets_of(batch)


def group_numbers(groups: Any, count: int, called: str) -> Tensor | None:
    """Number the groups of samples.

    Args:
        groups: A number or a name for every sample; None: there are no groups.
        count: The number of samples.
        called: What they are called in messages.

    Returns:
        Numbers, int64 (N,), the same for the same group, in whatever split; None if there are no groups.

    Raises:
        ValueError: If they are not as many as samples.
    """
    if groups is None:
        return None
    if isinstance(groups, Tensor) and groups.dtype == torch.int64 and groups.shape == (count,):
        return groups
    try:
        names = np.asarray(groups)
    except ValueError as error:
        raise ValueError(f"{called} has groups that are no list of numbers or names ({error})") from error
    if names.shape != (count,):
        raise ValueError(f"{called} has {count:,} samples and groups of shape {names.shape}; it must have one for each sample")
    if names.dtype.kind in "iu":
        return torch.from_numpy(names.astype(np.int64))
    # The same in every split, whatever other names there are.
    different, places = np.unique(names, return_inverse=True)
    numbers = [int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:7], "big") for name in different]
    return torch.tensor(numbers)[torch.from_numpy(places)]


def parts_of(order: Tensor, size: int) -> list[Tensor]:
    """Divide indices into batches of `size`; a last single one joins the batch before it."""
    parts = []
    count = batch_count(len(order), size)
    for batch in range(count):
        end = (batch + 1) * size
        if batch + 1 == count:
            end = len(order)
        parts.append(order[batch * size : end])
    return parts


def check_labels(labels: Tensor, called: str) -> None:
    """Raise ValueError, in one sentence, unless there are labels that are whole numbers, one for each image.

    Args:
        labels: The labels.
        called: What they belong to, for messages.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"{called} has labels in a {type(labels).__name__}; they must be in a tensor of shape (images,)")
    if labels.dim() != 1:
        raise ValueError(
            f"{called} has labels of shape {tuple(labels.shape)}; they must be class numbers of shape (images,), not one-hot"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{called} has labels of type {labels.dtype}; they must be whole numbers, such as torch.int64")
    if not len(labels):
        raise ValueError(f"{called} is empty; it must have at least one image")


def check_images(images: Tensor, called: str) -> None:
    """Raise ValueError, in one sentence, unless images have a type and a shape that are accepted.

    Args:
        images: The images.
        called: What they belong to, for messages.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"{called} has images in a {type(images).__name__}; they must be in a tensor")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise ValueError(f"{called} has images of type {images.dtype}; they must be torch.uint8 (0 to 255) or torch.float32")
    if images.dim() != 4:
        raise ValueError(f"{called} has images of shape {tuple(images.shape)}; it must be (images, channels, height, width)")
    if images.dtype != torch.uint8 and images.numel():
        ends = torch.stack(images.aminmax())
        if not ends.isfinite().all():
            raise ValueError(f"{called} has images with values that are not finite (NaN or infinity): mend or leave them out")


def for_search(labels: Tensor, take: int, called: str) -> Tensor:
    """Choose images of a train split that become the search split: of every class as many, but never more than half of it.

    Args:
        labels: The class of every image, int64 (N,).
        take: How many of each class, at least one.
        called: What they belong to, for messages.

    Returns:
        Their indices, in an order that never changes.

    Raises:
        ValueError: If no class has two images.
    """
    chosen = balanced(labels, 0, max(1, take), share=0.5)
    if not len(chosen):
        raise ValueError(f"{called} has no class with two images, one of which could be held out for the search: add images")
    return chosen


def cut(split: Split, take: int, called: str) -> tuple[Split, Split]:
    """Cut samples off a split for another one: of every class as many, or whole groups where there are groups.

    The choice never changes.

    Args:
        split: The samples.
        take: How many in all; of classes and groups about as many.
        called: What they are called in messages.

    Returns:
        Those that were taken, and those that are left.

    Raises:
        ValueError: If nothing can be taken without leaving nothing.
    """
    count = len(split)
    if split.groups is not None:
        chosen = whole_groups(split.groups, take, called)
    elif (labels := split.labels) is not None and int(labels.min()) >= 0:
        classes = int(labels.max()) + 1
        chosen = for_search(labels, take // classes, called)
    else:
        if count < 2:
            raise ValueError(f"{called} has {count} samples; it takes two to hold one out for the search: add some")
        random = np.random.RandomState(SPLIT_SEED).permutation(count)
        chosen = torch.from_numpy(random[: min(max(1, take), count // 2)])
    return split.subset(chosen), split.subset(without(count, chosen))


def whole_groups(groups: Tensor, take: int, called: str) -> Tensor:
    """Choose whole groups of samples at random, until there are enough samples.

    Args:
        groups: The group of every sample, int64 (N,).
        take: How many samples are enough; at most half of all are taken, but one group at least.
        called: What they are called in messages.

    Returns:
        The indices of the samples, ascending. The choice never changes.

    Raises:
        ValueError: If there is only one group.
    """
    names, counts = groups.unique(return_counts=True)
    if len(names) < 2:
        raise ValueError(f"{called} has samples of one group only; a group must be held out for the search: add others")
    chosen: list[int] = []
    size = 0
    for number in np.random.RandomState(SPLIT_SEED).permutation(len(names)):
        if size >= take:
            break
        if size + int(counts[number]) <= len(groups) // 2:
            chosen.append(int(names[number]))
            size += int(counts[number])
    if not chosen:
        chosen = [int(names[counts.argmin()])]
    return torch.isin(groups, torch.tensor(chosen)).nonzero().flatten()


def balanced(labels: Tensor, skip: int, take: int, share: float = 1.0) -> Tensor:
    """Choose items of every class, in a random order that never changes.

    NumPy's RandomState is used because its stream is frozen: a split must be the same under every version.

    Args:
        labels: The class of every item, int64 (N,).
        skip: How many items of each class are left out first.
        take: How many of each class are then taken, as far as there are.
        share: The largest share of a class that is taken.

    Returns:
        Their indices.
    """
    random = np.random.RandomState(SPLIT_SEED)
    chosen = []
    for label in range(int(labels.max()) + 1):
        of_class = random.permutation(np.flatnonzero(labels.numpy() == label))
        most = min(take, int(share * len(of_class)))
        chosen.append(of_class[skip : skip + most])
    return torch.from_numpy(random.permutation(np.concatenate(chosen)))


def stratified(labels: Tensor, take: int) -> Tensor:
    """Choose items at random, of every class its share, in an order in which any part has every class alike.

    The choice never changes.

    Args:
        labels: The class of every item, integers (N,).
        take: How many, at most N.

    Returns:
        Their indices.
    """
    random = np.random.RandomState(SPLIT_SEED)
    order = random.permutation(len(labels))
    # Sorted by class, and at random within one; then every n-th.
    order = order[labels.numpy()[order].argsort(kind="stable")]
    chosen = order[np.arange(take) * len(labels) // max(take, 1)]
    return torch.from_numpy(random.permutation(chosen))


def batch_count(count: int, size: int) -> int:
    """Count the batches of `size` that so many images make: a last single image joins the batch before it.

    A norm over maps of one pixel has no variance to take from a single image.
    """
    batches, rest = divmod(count, size)
    if rest > 1 or batches == 0:
        batches += 1
    return min(batches, count)


def without(count: int, index: Tensor) -> Tensor:
    """Return the indices 0..count-1 that are not in `index`, ascending.

    Args:
        count: How many indices there are.
        index: Those to leave out, integers of any shape (n,).

    Returns:
        The others, ascending, shape (count - n,).

    Examples:
        >>> without(5, torch.tensor([1, 3]))
        tensor([0, 2, 4])
    """
    keep = torch.ones(count, dtype=torch.bool)
    keep[index] = False
    return keep.nonzero().flatten()
