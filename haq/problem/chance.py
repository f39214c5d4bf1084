"""What can be believed of a value: how far chance moves it, and whether guessing would do as well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from haq.problem.objective import BlackBox
from haq.store.units import percent

if TYPE_CHECKING:
    from torch import Tensor

    from haq.problem.problem import Problem

FEW = 200  # images: of fewer, a single one moves an accuracy by more than half a point
SURE = 2.0  # standard errors


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a share of `count` images, as a share itself."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / count)


def with_error(share: float | None, count: int) -> str:
    """Write a share in percent, with its standard error in points where it is of few images: 91.67 % ± 4.89."""
    if share is None or count >= FEW:
        return percent(share)
    return f"{percent(share)} ± {100 * standard_error(share, count):.2f}"


def guessing_share(labels: Tensor, classes: int) -> float:
    """Return the share of images that guessing answers rightly: at random, or the class that most of them are of."""
    return max(1 / classes, float(labels.bincount().max()) / len(labels))


def is_chance(accuracy: float, guessing: float, count: int) -> bool:
    """Say whether an accuracy is within two standard errors of what guessing gives, or below it.

    Args:
        accuracy: The accuracy, 0 to 1.
        guessing: What guessing gives.
        count: On how many images.

    Returns:
        Whether it is no more than chance.
    """
    return accuracy <= guessing + SURE * standard_error(guessing, count)


def chance_sentence(accuracy: float, guessing: float, count: int, split: str) -> str:
    """Warn of an accuracy at chance.

    Args:
        accuracy: The float network's.
        guessing: What guessing gives.
        count: The number of images.
        split: What they are called.

    Returns:
        One sentence; nothing for an accuracy that is more than chance.
    """
    if not is_chance(accuracy, guessing, count):
        return ""
    points = 100 * standard_error(accuracy, count)
    return (
        f"WARNING: the float network's accuracy is {percent(accuracy)} (standard error {points:.2f} points) on {count:,} "
        f"images of the {split} split, and guessing gives {percent(guessing)}: it may not be trained for these classes, or "
        "be given other images than it was trained on (see --mean and --std)"
    )


def few_sentence(count: int, split: str, measured: str = "accuracy") -> str:
    """Warn of few images; nothing for enough of them.

    Args:
        count: The number of images.
        split: What they are called.
        measured: What is measured on them.

    Returns:
        One sentence or nothing.
    """
    if count >= FEW or not count:
        return ""
    points = 100 * standard_error(0.5, count)
    return (
        f"WARNING: the {split} split has {count} images, so one of them moves {measured} by {100 / count:.1f} points, and its "
        f"standard error is up to {points:.1f}: smaller differences say nothing"
    )


def few_of_numbers(problem: Problem) -> str:
    """Warn of few samples where values are no shares of them; nothing for enough of them."""
    count, title = problem.evaluator.count, problem.objective.title
    if count >= FEW or not count:
        return ""
    known = "how far chance moves it isn't known"
    if problem.float_result.error is not None:
        known = f"the standard error of the float network's is {problem.float_result.error:.2g}"
    return f"WARNING: the search split has {count} samples, by which {title} is told, and {known}: smaller differences say nothing"


def doubts(problem: Problem) -> list[str]:
    """List what must be said of the values of a problem before they are believed: sentences, none if all is well."""
    evaluator = problem.evaluator
    objective = problem.objective
    if isinstance(objective, BlackBox):
        return [
            f"NOTE: objective {objective.name!r} is given the network itself, so every policy's network is run as a whole "
            "(nothing that its first layers computed is reused), and no evaluation ends early"
        ]
    if not objective.takes_scores:
        return [sentence for sentence in (few_of_numbers(problem),) if sentence]
    measured = "accuracy"
    if objective.name not in ("accuracy", "accuracy+robust"):
        measured = objective.title
    sentences = [few_sentence(evaluator.count, "search", measured)]
    scores = evaluator.expected
    # Of an objective of somebody's own nobody knows what guessing gives.
    if objective.name in ("accuracy", "accuracy+robust") and scores is not None:
        labels = evaluator.labels
        accuracy = float((scores.argmax(1).cpu() == labels).double().mean())
        guessing = guessing_share(labels, scores.shape[1])
        sentences.append(chance_sentence(accuracy, guessing, evaluator.count, "search"))
    return [sentence for sentence in sentences if sentence]
