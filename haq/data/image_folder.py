"""Photographs in folders: labelled ones by class (imagefolder:PATH), and any without labels (images:PATH)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from haq.data.dataset import SPLIT_SEED, UNLABELLED, Dataset, ImageFiles, Split, for_search, without
from haq.data.memory import default_bytes

# The ends of names of files that are taken for images.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_SEARCHED = 2000  # images of the search split, where nobody says otherwise
# What file managers and storage boxes put beside photographs; so do names that begin with a dot.
JUNK = ("__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db")


def imagefolder(path: Path, image_size: int, memory: int | None = None, searched: int | None = None) -> Dataset:
    """Load photographs that lie in PATH/train/CLASS/ and PATH/val/CLASS/; a part of `train` becomes the search split.

    Args:
        path: The folder.
        image_size: Height and width that images are brought to, in pixels.
        memory: How many bytes the decoded images may take in memory, where they are kept once they are decoded; if that isn't
            enough they are kept on disk. None: a quarter of the machine's memory.
        searched: Images of the search split; None: a fifth, at most 2,000.

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
    if memory is None:
        memory = default_bytes()
    everything = _split(train_folder, classes, image_size, memory)
    counts = torch.bincount(everything.labels, minlength=len(classes)).tolist()
    if 0 in counts:
        # Left out, it would give other numbers to the classes after it.
        empty = train_folder / classes[counts.index(0)]
        raise ValueError(f"{empty} holds no image ending in {', '.join(IMAGE_ENDINGS)}: add some, or remove the folder")
    count = _held_out(searched, len(everything), path) // len(classes)
    search = for_search(everything.labels, count, str(train_folder))
    train = without(len(everything), search)
    test = _split(test_folder, classes, image_size, memory)
    return Dataset(f"imagefolder:{path}", classes, everything.subset(train), everything.subset(search), test, str(path))


def images(path: Path, image_size: int, memory: int | None = None, searched: int | None = None) -> Dataset:
    """Load photographs in any layout of folders, without labels, cut into three splits at random.

    Args:
        path: The folder.
        image_size: Height and width that images are brought to, in pixels.
        memory: How many bytes the decoded images may take in memory, where they are kept once they are decoded; if that isn't
            enough they are kept on disk. None: a quarter of the machine's memory.
        searched: Images of the search split; None: a fifth, at most 2,000.

    Returns:
        The data set, decoded when it is used.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: For fewer than five images.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: images:PATH wants one with photographs, in folders of any kind")
    files = _images_of(path, path.rglob("*"))
    tested = min(MOST_SEARCHED, len(files) // 5)
    if not tested:
        raise ValueError(
            f"{path} holds {len(files)} images ending in {', '.join(IMAGE_ENDINGS)}; three splits take at least 5"
        )
    held = _held_out(searched, len(files) - tested, path, tested)
    everything = Split(_files(files, image_size, memory), torch.full((len(files),), UNLABELLED))
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(files)))
    search, test, train = (everything.subset(index) for index in order.split([held, tested, len(files) - held - tested]))
    return Dataset(f"images:{path}", (), train, search, test, str(path))


def _held_out(searched: int | None, count: int, path: Path, usual: int | None = None) -> int:
    """Tell how many of so many images are held out for the search. Raises ValueError for more than half of them."""
    if searched is None:
        return usual or min(MOST_SEARCHED, count // 5)
    if searched > count // 2:
        raise ValueError(
            f"--search-images is {searched:,}; the search split is cut from the train split, of which {path} has {count:,} "
            f"images: it can be up to {count // 2:,}"
        )
    return searched


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


def _split(folder: Path, classes: tuple[str, ...], image_size: int, memory: int) -> Split:
    """List the images of a folder for each class."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = _images_of(folder / name, (folder / name).glob("*"))
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        raise ValueError(f"{folder} holds no image ending in {', '.join(IMAGE_ENDINGS)}")
    return Split(_files(files, image_size, memory), torch.tensor(labels))


def _files(paths: list[Path], size: int, memory: int | None) -> ImageFiles:
    """List files whose images are kept once they are decoded, in memory if they take at most `memory` bytes."""
    if memory is None:
        memory = default_bytes()
    # 256/224 is the customary margin of ImageNet's evaluation.
    return ImageFiles(tuple(paths), size, round(size * 256 / 224)).keeping(memory)
