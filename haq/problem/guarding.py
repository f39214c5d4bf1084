"""What keeps results right whatever somebody's objective does: it gets copies, and leaves nothing changed behind it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SEED = 0  # that everything random begins from, whenever an objective is given a network


def is_ours(objective: object) -> bool:
    """Say whether an objective is of this package alone, with no function or metric of somebody's in it."""
    return is_class_of_ours(type(objective)) and not hasattr(objective, "given")


def is_class_of_ours(kind: type) -> bool:
    """Say whether a class is of this package."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def apart(objective: object, structure: Any) -> Any:
    """Return what an objective is given: copies of all tensors, which it may change, unless it is ours.

    Args:
        objective: Who is given it.
        structure: Outputs, targets, or a tuple of both.
    """
    if is_ours(objective):
        return structure
    import torch

    from quantizers.calling import map_tensors

    return map_tensors(structure, torch.clone)


@contextmanager
def left_as_it_was() -> Iterator[None]:
    """Let somebody's code run within, and put back what it may change for all others.

    That is whether gradients are taken, the number of threads, and what is random. The last begins from the same seed every
    time, so that whoever draws samples within draws the same ones for every network.
    """
    import numpy as np
    import torch

    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    of_numpy, of_python = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(SEED)
            np.random.seed(SEED)
            random.seed(SEED)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def check_said(objective: Any) -> None:
    """Check what an objective says of itself.

    Args:
        objective: The objective.

    Raises:
        ValueError: Naming what it said, for a direction that is neither True nor False, and for words that are no text on one
            line.
    """
    better = objective.higher_is_better
    if not isinstance(better, bool):
        raise ValueError(
            f"higher_is_better of objective {objective.name!r} is {better!r}: say True if larger values are better, or False"
        )
    for word in ("name", "unit", "title", "short", "words"):
        check_word(word, getattr(objective, word, ""), objective.name)


def check_word(word: str, given: object, name: object) -> None:
    """Check one of the words that an objective is described by.

    Args:
        word: Which it is, such as "unit".
        given: What it is.
        name: The objective's, for the message.

    Raises:
        ValueError: Unless it is a text on one line.
    """
    if not isinstance(given, str) or not all(map(str.isprintable, given)):
        raise ValueError(f"{word} of objective {name!r} is {given!r}: it must be a text on one line")
