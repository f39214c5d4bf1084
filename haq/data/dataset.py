"""`Dataset`: images and labels in the three splits that a search needs.

`train` is for training and fine-tuning, `search` is what a policy is evaluated on while searching, `test` is what results
are reported on. The three are disjoint and depend on nothing but the data set (never on a run's seed), so that a network
trained on `train` has seen neither of the others.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from haq.data.labels import INTEGERS

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT_SEED = 0
UNLABELLED = -1
_one_large = threading.Lock()
COMPARED = 64  # images of each split whose values are compared
MOST_PIXELS = 89_478_485  # of an image file: above it Pillow itself warns
LARGE = 2**24  # pixels; of images above it one is decoded at a time
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # by content, whatever a file's name ends in
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
ORIENTATIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
MOST_APART = 50.0  # times that values of two splits may differ on average: 0..1 and 0..255 are 255 times apart


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
        """Make labels of any integer type int64. Raise ValueError unless there are as many labels as images."""
        if isinstance(self.labels, Tensor) and self.labels.dtype in INTEGERS:
            object.__setattr__(self, "labels", self.labels.long())
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels), in order, or shuffled by `generator`; a last single image joins the batch before it."""
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        count = batch_count(len(self), size)
        for batch in range(count):
            end = (batch + 1) * size
            if batch + 1 == count:
                end = len(self)
            index = order[batch * size : end]
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
        """Decode the images of these indices: uint8 (N, 3, size, size). Raises ValueError for a file that can't be one."""
        with warnings.catch_warnings():
            # Of what Pillow warns of, too many pixels are an error here, and broken EXIF data are no fault of the picture.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with ThreadPoolExecutor() as pool:
                return torch.stack(list(pool.map(lambda i: self._decode(self.paths[i]), index.tolist())))

    def subset(self, index: Tensor) -> ImageFiles:
        """Take the files of these indices."""
        return ImageFiles(tuple(self.paths[i] for i in index.tolist()), self.size, self.resize)

    def _decode(self, path: Path) -> Tensor:
        image = read_image(path)
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels, too long a strip to be cut to {self.size} x {self.size}: "
                "leave it out"
            )
        left = (width - self.size) // 2
        top = (height - self.size) // 2
        image = image.resize((width, height), _pillow().Resampling.BICUBIC)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _pillow() -> Any:
    # It is needed only where images are files.
    from PIL import Image

    return Image


def read_image(path: Path) -> Image:
    """Read an image file as a viewer shows it: in RGB, upright, what is transparent on white, of an animation the first image.

    Raises ValueError, in one sentence, for a file that isn't a readable image of at most MOST_PIXELS pixels.
    """
    # A pipe or a device would be waited for.
    if not path.is_file():
        raise ValueError(f"{path} is not a readable image: it is no regular file")
    pillow = _pillow()
    # Pillow raises its own errors for too many pixels, and almost any for a damaged file.
    try:
        with pillow.open(path, formats=FORMATS) as file:
            pixels = file.width * file.height
            if pixels > MOST_PIXELS:
                raise pillow.DecompressionBombError(f"its {file.width} x {file.height} pixels are too many")
            if pixels <= LARGE:
                return _as_seen(file)
            with _one_large:
                return _as_seen(file)
    except pillow.DecompressionBombError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is refused ({reason}): an image may have {MOST_PIXELS:,} pixels, make it smaller") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a readable image: {reason or type(error).__name__}") from error


def _as_seen(file: Any) -> Image:
    """Decode an image to RGB, and turn it upright."""
    pillow = _pillow()
    file.load()
    image = file
    if file.mode == "I" or file.mode.startswith("I;16"):
        # Pillow itself cuts values off at 255.
        values = np.asarray(file)
        if values.min() < 0 or values.max() > 65535 or (file.mode == "I" and file.format != "PNG"):
            raise ValueError("its values are 32-bit integers of unknown range; save it with 8 or 16 bits")
        image = pillow.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif file.mode == "F":
        raise ValueError("its values are floats of unknown range; save it with 8 or 16 bits")
    elif "A" in file.mode.upper().replace("LAB", "") or "transparency" in file.info:
        layer = file.convert("RGBA")
        image = pillow.new("RGB", file.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    try:
        orientation = file.getexif().get(ORIENTATION)
    except Exception:
        orientation = None  # damaged EXIF data: the picture is as it is
    image = image.convert("RGB")
    if orientation in ORIENTATIONS:
        image = image.transpose(getattr(pillow.Transpose, ORIENTATIONS[orientation]))
    made: Image = image
    return made


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
        """Raise ValueError, naming the split, if one is empty, holds what is no data, or isn't like the train split."""
        for name in ("train", "search", "test"):
            called = f"the {name} split of {self.name}"
            split = getattr(self, name)
            labels = split.labels
            check_labels(labels, called)
            if labels.dtype != torch.int64:
                raise ValueError(f"{called} has labels of type {labels.dtype}; they must be torch.int64")
            self._check_alike(split, called)
            if self.classes and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise ValueError(
                    f"the {name} split of {self.name} has labels from {int(labels.min())} to {int(labels.max())}, "
                    f"outside its {len(self.classes)} classes"
                )

    def _check_alike(self, split: Split, called: str) -> None:
        """Raise ValueError unless a split's images are of the kind, the shape and about the scale of the train split's."""
        # A file is decoded when it is asked for; all of them are of one kind.
        if isinstance(split.images, ImageFiles) and isinstance(self.train.images, ImageFiles):
            return
        few = split.images[torch.arange(min(COMPARED, len(split)))]
        of_train = self.train.images[torch.arange(min(COMPARED, len(self.train)))]
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
    """Return the indices 0..count-1 that are not in `index`, ascending."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[index] = False
    return keep.nonzero().flatten()
