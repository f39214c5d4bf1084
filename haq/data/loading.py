"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haq.data import DATASETS, DEFAULT
from haq.data.dataset import Dataset, Split, check_images, check_labels, for_search, without
from haq.data.image_folder import imagefolder, images
from haq.data.labels import class_numbers

_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

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
    made = call_with(name, source, image_size=image_size)
    if isinstance(made, Dataset):
        return made
    return _from_dict(name, made)


def has_any_size(name: str) -> bool:
    """Say whether the images of a data set can be asked for in any size, so that a network's input decides it."""
    form, _, path = name.partition(":")
    if form in FOLDERS and path:
        return True
    try:
        return "image_size" in inspect.signature(DATASETS.get(name)).parameters
    except (TypeError, ValueError):
        return False  # written in C, without a signature


def fetch(name: str) -> None:
    """Download what a data set needs, checksummed, into `cache_folder()`; nothing is done for what is already there.

    Raises ValueError for an unknown name, FileNotFoundError for what can't be had.
    """
    if name.partition(":")[0] in FOLDERS:
        return
    fetch_source = getattr(DATASETS.get(name), "fetch", None)
    if fetch_source is not None:
        fetch_source()


def call_with(name: str, function: Callable[..., Any], **options: Any) -> Any:
    """Call a function of somebody's own with those of some options that it takes by name.

    Args:
        name: What the function is called, for messages.
        function: The function.
        options: What it is given, as far as it takes it.

    Returns:
        What it returned.

    Raises:
        ValueError: In one sentence, if it needs other arguments, and for whatever `module:function` raises.
        FileNotFoundError, ImportError: As a registered function raises them.
    """
    if not callable(function):
        raise ValueError(f"{name} is a {type(function).__name__}; it must be a function")
    try:
        taken = inspect.signature(function).parameters
    except ValueError:
        taken = {}  # type: ignore[assignment]  # written in C, without a signature
    needed = [one.name for one in taken.values() if one.default is one.empty and one.kind not in _COLLECTING]
    if unknown := [one for one in needed if one not in options]:
        raise ValueError(
            f"{name} needs the argument {unknown[0]!r}; a function that is named may only need {' or '.join(options)}"
        )
    try:
        return function(**{option: value for option, value in options.items() if option in taken})
    except Exception as error:
        # What is registered says by itself what is wrong; a function that is only named may raise anything.
        if ":" not in name and isinstance(error, (ValueError, OSError, ImportError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} raised {type(error).__name__} ({reason}): mend that function") from error


def _from_dict(name: str, made: Any) -> Dataset:
    """Make a data set of (images, labels) under train, test and perhaps search."""
    if not isinstance(made, dict) or not {"train", "test"} <= set(made) <= {"train", "search", "test"}:
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return a haq.data.Dataset, or a dict with train and test "
            "(and perhaps search), each (images, labels)"
        )
    splits = {key: _split_of(pair, f"the {key} split of {name}") for key, pair in made.items()}
    classes = tuple(str(i) for i in range(int(max(split.labels.max() for split in splits.values())) + 1))
    if "search" not in splits:
        everything = splits["train"]
        held = for_search(everything.labels, len(everything) // 5 // len(classes), f"the train split of {name}")
        splits["search"] = everything.subset(held)
        splits["train"] = everything.subset(without(len(everything), held))
    return Dataset(name, classes, splits["train"], splits["search"], splits["test"], "your function")


def _split_of(pair: Any, called: str) -> Split:
    """Make a split of (images, labels). Raises ValueError, in one sentence, for anything else."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{called} is a {type(pair).__name__}; it must be (images, labels)")
    try:
        images, labels = (torch.as_tensor(part) for part in pair)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{called} holds what is no tensor or array of numbers ({error}); give (images, labels)") from error
    check_labels(labels, called)
    labels = class_numbers(labels, called)
    check_images(images, called)
    if len(images) != len(labels):
        raise ValueError(f"{called} has {len(images)} images but {len(labels)} labels; it must have as many of both")
    if int(labels.min()) < 0:
        raise ValueError(f"{called} has labels from {int(labels.min())} to {int(labels.max())}; they must be 0, 1, 2 ...")
    return Split(images, labels)
