"""Photographs in folders: labelled ones by class (imagefolder:PATH), and any without labels (images:PATH)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from haq.data.dataset import SPLIT_SEED, UNLABELLED, Dataset, ImageFiles, Split, balanced, without

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MOST_SEARCHED = 2000  # images of the search split


def imagefolder(path: Path, image_size: int) -> Dataset:
    """Load photographs that lie in PATH/train/CLASS/ and PATH/val/CLASS/; a part of `train` becomes the search split.

    Args:
        path: The folder.
        image_size: Height and width that images are brought to, in pixels.

    Returns:
        The data set, decoded when it is used.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: For folders without images, and for classes of val/ that train/ doesn't have.
    """
    train_folder = path / "train"
    test_folder = path / "val"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: imagefolder:PATH wants PATH/train/CLASS/* and PATH/val/CLASS/*")
    classes = tuple(sorted(entry.name for entry in train_folder.iterdir() if entry.is_dir()))
    unknown = sorted({entry.name for entry in test_folder.iterdir() if entry.is_dir()} - set(classes))
    if not classes or unknown:
        raise ValueError(f"{path}: classes {unknown or '(none)'} of val/ are not among the {len(classes)} of train/")
    everything = _split(train_folder, classes, image_size)
    count = min(MOST_SEARCHED, len(everything) // 5) // len(classes)
    search = balanced(everything.labels, 0, max(1, count))
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
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    held = min(MOST_SEARCHED, len(files) // 5)
    if not held:
        raise ValueError(
            f"{path} holds {len(files)} images ending in {', '.join(IMAGE_ENDINGS)}; three splits take at least 5"
        )
    everything = Split(_files(files, image_size), torch.full((len(files),), UNLABELLED))
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(files)))
    search, test, train = (everything.subset(index) for index in order.split([held, held, len(files) - 2 * held]))
    return Dataset(f"images:{path}", (), train, search, test, str(path))


def _split(folder: Path, classes: tuple[str, ...], image_size: int) -> Split:
    """List the images of a folder for each class."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() in IMAGE_ENDINGS:
                files.append(file)
                labels.append(label)
    if not files:
        raise ValueError(f"{folder} holds no image ending in {', '.join(IMAGE_ENDINGS)}")
    return Split(_files(files, image_size), torch.tensor(labels))


def _files(paths: list[Path], size: int) -> ImageFiles:
    # 256/224 is the customary margin of ImageNet's evaluation.
    return ImageFiles(tuple(paths), size, round(size * 256 / 224))
