"""Photographs in folders: labelled ones by class (imagefolder:PATH), and any without labels (images:PATH)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from haq.data.dataset import SPLIT_SEED, UNLABELLED, Dataset, ImageFiles, Split, for_search, without

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_SEARCHED = 2000  # images of the search split
# What file managers and storage boxes put beside photographs; so do names that begin with a dot.
JUNK = ("__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db")


def imagefolder(path: Path, image_size: int) -> Dataset:
    """Load photographs that lie in PATH/train/CLASS/ and PATH/val/CLASS/; a part of `train` becomes the search split.

    Args:
        path: The folder.
        image_size: Height and width that images are brought to, in pixels.

    Returns:
        The data set, decoded when it is used.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: For classes without images, for classes of val/ that train/ doesn't have, and for what is named
            like an image and is no file.
    """
    train_folder = path / "train"
    test_folder = path / "val"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: imagefolder:PATH wants PATH/train/CLASS/* and PATH/val/CLASS/*")
    classes = tuple(_classes(train_folder))
    unknown = sorted(set(_classes(test_folder)) - set(classes))
    if not classes or unknown:
        raise ValueError(f"{path}: classes {unknown or '(none)'} of val/ are not among the {len(classes)} of train/")
    everything = _split(train_folder, classes, image_size)
    counts = torch.bincount(everything.labels, minlength=len(classes)).tolist()
    if 0 in counts:
        # Left out, it would give other numbers to the classes after it.
        empty = train_folder / classes[counts.index(0)]
        raise ValueError(f"{empty} holds no image ending in {', '.join(IMAGE_ENDINGS)}: add some, or remove the folder")
    count = min(MOST_SEARCHED, len(everything) // 5) // len(classes)
    search = for_search(everything.labels, count, str(train_folder))
    train = without(len(everything), search)
    test = _split(test_folder, classes, image_size)
    return Dataset(f"imagefolder:{path}", classes, everything.subset(train), everything.subset(search), test, str(path))


def images(path: Path, image_size: int) -> Dataset:
    """Load photographs in any layout of folders, without labels, cut into three splits at random.

    Args:
        path: The folder.
        image_size: Height and width that images are brought to, in pixels.

    Returns:
        The data set, decoded when it is used.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: For fewer than five images.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: images:PATH wants one with photographs, in folders of any kind")
    files = _images_of(path, path.rglob("*"))
    held = min(MOST_SEARCHED, len(files) // 5)
    if not held:
        raise ValueError(
            f"{path} holds {len(files)} images ending in {', '.join(IMAGE_ENDINGS)}; three splits take at least 5"
        )
    everything = Split(_files(files, image_size), torch.full((len(files),), UNLABELLED))
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(files)))
    search, test, train = (everything.subset(index) for index in order.split([held, held, len(files) - 2 * held]))
    return Dataset(f"images:{path}", (), train, search, test, str(path))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _classes(folder: Path) -> list[str]:
    """List the folders that stand for classes."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_junk(entry.name))


def _images_of(folder: Path, found: Iterable[Path]) -> list[Path]:
    """List the images among what was found in a folder, sorted.

    Raises ValueError for what is named like one and is neither a file nor a folder: a pipe would be waited for.
    """
    files = []
    for path in sorted(found):
        if path.suffix.lower() not in IMAGE_ENDINGS or any(map(_is_junk, path.relative_to(folder).parts)):
            continue
        if path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise ValueError(f"{path} is named like an image and is no readable file (a pipe, a broken link): remove it")
    return files


def _split(folder: Path, classes: tuple[str, ...], image_size: int) -> Split:
    """List the images of a folder for each class."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = _images_of(folder / name, (folder / name).glob("*"))
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        raise ValueError(f"{folder} holds no image ending in {', '.join(IMAGE_ENDINGS)}")
    return Split(_files(files, image_size), torch.tensor(labels))


def _files(paths: list[Path], size: int) -> ImageFiles:
    # 256/224 is the customary margin of ImageNet's evaluation.
    return ImageFiles(tuple(paths), size, round(size * 256 / 224))
