"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haq.data import DATASETS, DEFAULT
from haq.data.dataset import Dataset, Split, check_images, check_labels, cut, group_numbers
from haq.data.image_folder import imagefolder, images
from haq.data.labels import class_numbers, native
from haq.data.memory import default_bytes
from haq.data.sources import Columns, source_of
from quantizers.calling import leaves

_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

FOLDERS: dict[str, Callable[[Path, int, int, int | None], Dataset]] = {"imagefolder": imagefolder, "images": images}
SPLITS = ("train", "search", "test")
TOKENS = (torch.int64, torch.int32)  # inputs of these types are words of a text


def load(
    name: str = DEFAULT, *, image_size: int = 224, memory: int | None = None, search_images: int | None = None
) -> Dataset:
    """Load a data set by name.

    Args:
        name: What `haq.data.DATASETS` lists: a name, imagefolder:PATH, images:PATH or module:function.
        image_size: Height and width in pixels, where images have no size of their own.
        memory: How many bytes of samples may be kept in memory; None: a quarter of the machine's. What doesn't fit is read,
            or decoded, whenever it is needed.
        search_images: Samples of the search split, where that is cut from the train split; None: a fifth of it, of
            photographs 2,000 at most.

    Returns:
        The data set.

    Raises:
        ValueError: For an unknown name, with the close ones, and for data that are damaged or fit nothing.
        FileNotFoundError: For missing data, with the command that gets them.
    """
    if memory is None:
        memory = default_bytes()
    form, _, path = name.partition(":")
    if form in FOLDERS and path:
        return FOLDERS[form](Path(path), image_size, memory, search_images)
    source = DATASETS.get(name)
    made = call_with(name, source, image_size=image_size)
    if isinstance(made, Dataset):
        if search_images is not None:
            raise ValueError(
                f"--search-images is {search_images}, and {name} has a search split of its own, of {len(made.search):,} "
                "samples: leave it out"
            )
        return made
    return _from_dict(name, made, memory, search_images)


def has_any_size(name: str) -> bool:
    """Say whether the images of a data set can be asked for in any size, so that a network's input decides it.

    Args:
        name: The data set's name, as `load` takes it.

    Returns:
        True for folders of photographs and for a source that takes `image_size`.
    """
    form, _, path = name.partition(":")
    if form in FOLDERS and path:
        return True
    try:
        return "image_size" in inspect.signature(DATASETS.get(name)).parameters
    except (TypeError, ValueError):
        return False  # written in C, without a signature


def fetch(name: str) -> None:
    """Download what a data set needs, checksummed, into `cache_folder()`; nothing is done for what is already there.

    Args:
        name: The data set's name, as `load` takes it.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: For what can't be had.
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
    except (Exception, SystemExit) as error:
        # What is registered says by itself what is wrong; a function that is only named may raise anything.
        if ":" not in name and isinstance(error, (ValueError, OSError, ImportError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} raised {type(error).__name__} ({reason}): mend that function") from error


def _from_dict(name: str, made: Any, memory: int | None = None, search_images: int | None = None) -> Dataset:
    """Make a data set of samples under train and perhaps test and search, with `groups` and `classes` beside them."""
    if memory is None:
        memory = default_bytes()
    if not isinstance(made, Mapping) or "train" not in made or not set(made) <= {*SPLITS, "groups", "classes"}:
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return a haq.data.Dataset, or a dict with train and test "
            "(and perhaps search, groups, classes), each split (images, labels), a torch Dataset, a DataLoader or an "
            "iterable of batches"
        )
    if search_images is not None and "search" in made:
        raise ValueError(f"--search-images is {search_images}, and {name} gives a search split of its own: leave it out")
    splits: dict[str, Split] = {}
    for key in SPLITS:
        if key not in made:
            continue
        called = f"the {key} split of {name}"
        splits[key] = _split_of(made[key], called, memory, splits.get("train"))
        splits[key].groups = _groups_of(made, key, splits[key], called)
        if splits[key].source.is_kept:
            memory = max(0, memory - splits[key].source.nbytes)
    called = f"the train split of {name}"
    classes = _classes_of(made, splits)
    fifth = len(splits["train"]) // 5
    most = len(splits["train"]) // 2
    if search_images is not None and search_images > most:
        raise ValueError(
            f"--search-images is {search_images:,}; the search split is cut from {called}, of {len(splits['train']):,} "
            f"samples: it can be up to {most:,}"
        )
    if "test" not in splits:
        splits["test"], splits["train"] = cut(splits["train"], fifth, called)
    if "search" not in splits:
        splits["search"], splits["train"] = cut(splits["train"], search_images or fifth, called)
    return Dataset(name, classes, splits["train"], splits["search"], splits["test"], "your function")


def _split_of(given: Any, called: str, memory: int, train: Split | None) -> Split:
    """Make a split of whatever stands for it. Raises ValueError, in one sentence, for what is none."""
    if isinstance(given, Split):
        return given
    of_classes = _is_of_classes(given)
    if train is not None:
        # The train split tells what all of them must be.
        of_classes = train.is_of_images and train.labels is not None and isinstance(train.source, Columns)
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2 and not _is_of_batches(given)
    if of_classes and (is_pair or isinstance(given, (Tensor, np.ndarray))):
        return _images_with_labels(given, called)
    try:
        source = source_of(given, called, memory, is_pair=is_pair)
    except TypeError as error:
        raise ValueError(f"{error}, or the pair (inputs, targets)") from error
    if not leaves(source.take(torch.arange(1))):
        raise ValueError(f"{called} holds what is no tensor or array of numbers; give (images, labels)")
    return Split(source)


def _is_of_batches(given: Any) -> bool:
    """Say whether a list of two is one of batches (inputs, targets), of which one may lack its targets."""
    if not isinstance(given, list) or not all(isinstance(one, (tuple, list)) and len(one) == 2 for one in given):
        return False
    if any(one[1] is None for one in given):
        return True
    (first, one), (second, other) = given
    are_arrays = all(isinstance(part, (Tensor, np.ndarray)) for part in (first, second, one, other))
    return are_arrays and first.shape[1:] == second.shape[1:] and one.shape[1:] == other.shape[1:]


def _is_of_classes(given: Any) -> bool:
    """Say whether a pair is of images and class numbers, as far as can be told without looking at values."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    try:
        images, labels = (torch.as_tensor(native(part)) for part in given)
    except (TypeError, ValueError, RuntimeError):
        return False
    return images.dim() == 4 and labels.dim() == 1 and not labels.is_floating_point() and images.dtype not in TOKENS


def _images_with_labels(pair: Any, called: str) -> Split:
    """Make a split of (images, labels). Raises ValueError, in one sentence, for anything else."""
    if not isinstance(pair, (tuple, list)):
        raise ValueError(f"{called} is a {type(pair).__name__}; it must be (images, labels)")
    try:
        images, labels = (torch.as_tensor(native(part)) for part in pair)
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


def _classes_of(made: Mapping[str, Any], splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Tell the names of the classes; none, if targets are no class numbers.

    They stand under `classes`, or are an attribute of the train split, as of data sets of torchvision; otherwise they are
    numbers up to the largest label.
    """
    train = splits["train"]
    named = made.get("classes", getattr(getattr(made["train"], "dataset", made["train"]), "classes", None))
    if isinstance(named, (list, tuple)) and (named or "classes" in made):
        return tuple(map(str, named))
    labels = train.labels
    if labels is None or int(labels.min()) < 0:
        return ()
    found = [split.source.known_labels for split in splits.values()]
    most = max(int(labels.max()) for labels in found if labels is not None)
    return tuple(str(number) for number in range(most + 1))


def _groups_of(made: Mapping[str, Any], key: str, split: Split, called: str) -> Tensor | None:
    """Number the groups of a split: of `groups` beside it (for the train split alone, or by split), or of its attribute."""
    groups = made.get("groups")
    if isinstance(groups, Mapping):
        groups = groups.get(key)
    elif key != "train":
        groups = None
    if groups is None:
        groups = getattr(made[key], "groups", None)
    if groups is None:
        groups = getattr(getattr(made[key], "dataset", None), "groups", None)
    return group_numbers(groups, len(split), called)
