"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haq.data import DATASETS, DEFAULT
from haq.data.dataset import Dataset, Split, balanced, without
from haq.data.image_folder import imagefolder, images

FOLDERS: dict[str, Callable[[Path, int], Dataset]] = {"imagefolder": imagefolder, "images": images}


def load(name: str = DEFAULT, *, image_size: int = 224) -> Dataset:
    """Load a data set by name.

    Args:
        name: What `haq.data.DATASETS` lists: a name, imagefolder:PATH, images:PATH or module:function.
        image_size: Height and width in pixels, where images have no size of their own.

    Returns:
        The data set.

    Raises:
        ValueError: For an unknown name, with the close ones, and for data that are damaged or fit nothing.
        FileNotFoundError: For missing data, with the command that gets them.
    """
    form, _, path = name.partition(":")
    if form in FOLDERS and path:
        return FOLDERS[form](Path(path), image_size)
    source = DATASETS.get(name)
    made = call_with(source, image_size=image_size)
    if isinstance(made, Dataset):
        return made
    return _from_dict(name, made)


def fetch(name: str) -> None:
    """Download what a data set needs, checksummed, into `cache_folder()`; nothing is done for what is already there.

    Raises ValueError for an unknown name, FileNotFoundError for what can't be had.
    """
    if name.partition(":")[0] in FOLDERS:
        return
    fetch_source = getattr(DATASETS.get(name), "fetch", None)
    if fetch_source is not None:
        fetch_source()


def call_with(function: Callable[..., Any], **options: Any) -> Any:
    """Call a function of somebody's own with those of some options that it takes by name."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in taken})


def _from_dict(name: str, made: Any) -> Dataset:
    """Make a data set of (images, labels) under train, test and perhaps search."""
    if not isinstance(made, dict) or not {"train", "test"} <= set(made) <= {"train", "search", "test"}:
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return a haq.data.Dataset, or a dict with train and test "
            "(and perhaps search), each (images, labels)"
        )
    splits = {key: Split(torch.as_tensor(x), torch.as_tensor(y).long()) for key, (x, y) in made.items()}
    classes = tuple(str(i) for i in range(int(max(split.labels.max() for split in splits.values())) + 1))
    if "search" not in splits:
        everything = splits["train"]
        held = balanced(everything.labels, 0, max(1, len(everything) // 5 // len(classes)))
        splits["search"] = everything.subset(held)
        splits["train"] = everything.subset(without(len(everything), held))
    return Dataset(name, classes, splits["train"], splits["search"], splits["test"], "your function")
