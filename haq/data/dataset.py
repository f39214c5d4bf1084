"""`Dataset`: images and labels in the three splits that a search needs.

`train` is for training and fine-tuning, `search` is what a policy is evaluated on while searching, `test` is what results
are reported on. The three are disjoint and depend on nothing but the data set (never on a run's seed), so that a network
trained on `train` has seen neither of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0
UNLABELLED = -1


class Images(Protocol):
    """Anything that gives images by index: a tensor, or files decoded when they are asked for."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images of these indices, (N, C, H, W)."""
        ...

    def __len__(self) -> int:
        """Count the images."""
        ...


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, C, H, W) (or float, taken as they are), and their labels, int64 of shape (N,)."""

    images: Images
    labels: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError unless there are as many labels as images."""
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels), in order, or shuffled by `generator`."""
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        for index in order.split(size):
            yield self.images[index], self.labels[index]

    def subset(self, index: Tensor) -> Split:
        """Take the images of these indices; files stay undecoded."""
        if isinstance(self.images, ImageFiles):
            return Split(self.images.subset(index), self.labels[index])
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded when asked for: shorter side resized to `resize`, centre `size` x `size` kept."""

    paths: tuple[Path, ...]
    size: int
    resize: int

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Decode the images of these indices: uint8 (N, 3, size, size)."""
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda i: self._decode(self.paths[i]), index.tolist())))

    def subset(self, index: Tensor) -> ImageFiles:
        """Take the files of these indices."""
        return ImageFiles(tuple(self.paths[i] for i in index.tolist()), self.size, self.resize)

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is not a readable image: {error}") from error
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left = (width - self.size) // 2
        top = (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Dataset:
    """A named data set: its class names and its three disjoint splits.

    One without labels has no classes, and UNLABELLED for every label.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    search: Split
    test: Split
    origin: str = field(default="")

    def __post_init__(self) -> None:
        """Raise ValueError, naming the split, if one is empty or has labels that are no classes."""
        for name in ("train", "search", "test"):
            labels = getattr(self, name).labels
            if len(labels) == 0:
                raise ValueError(f"the {name} split of {self.name} is empty")
            if self.classes and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise ValueError(
                    f"the {name} split of {self.name} has labels from {int(labels.min())} to {int(labels.max())}, "
                    f"outside its {len(self.classes)} classes"
                )

    def describe(self) -> str:
        """Describe the splits in one line."""
        classes = "no labels"
        if self.classes:
            classes = f"{len(self.classes)} classes"
        return (
            f"{self.name} ({self.origin}): {classes}, {len(self.train):,} train / "
            f"{len(self.search):,} search / {len(self.test):,} test images, disjoint, split seed {SPLIT_SEED}"
        )

    def fair(self, count: int) -> Tensor:
        """Return indices of `count` train images, of every class as many, in an order that never changes."""
        labels = self.train.labels
        classes = len(self.classes)
        if not self.classes:
            labels = torch.zeros_like(labels)
            classes = 1
        return balanced(labels, 0, -(-count // classes))[:count]

    def signature(self) -> str:
        """Hash the labels of every split and the first search images: what a resumed run compares."""
        digest = hashlib.sha256()
        for split in (self.train, self.search, self.test):
            digest.update(split.labels.numpy().tobytes())
        digest.update(self.search.images[torch.arange(min(64, len(self.search)))].numpy().tobytes())
        return digest.hexdigest()[:16]


def balanced(labels: Tensor, skip: int, take: int) -> Tensor:
    """Choose items of every class, in a random order that never changes.

    NumPy's RandomState is used because its stream is frozen: a split must be the same under every version.

    Args:
        labels: The class of every item, int64 (N,).
        skip: How many items of each class are left out first.
        take: How many of each class are then taken, as far as there are.

    Returns:
        Their indices.
    """
    random = np.random.RandomState(SPLIT_SEED)
    chosen = []
    for label in range(int(labels.max()) + 1):
        of_class = random.permutation(np.flatnonzero(labels.numpy() == label))
        chosen.append(of_class[skip : skip + take])
    return torch.from_numpy(random.permutation(np.concatenate(chosen)))


def without(count: int, index: Tensor) -> Tensor:
    """Return the indices 0..count-1 that are not in `index`, ascending."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[index] = False
    return keep.nonzero().flatten()
