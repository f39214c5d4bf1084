"""What can be believed of an accuracy: how far chance moves it, and whether guessing would do as well.

Of values that are no shares of samples only the standard error is told, where it is known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from haq.problem.objective import BlackBox
from haq.store.units import PERCENT, SAME, percent, show_error

if TYPE_CHECKING:
    from torch import Tensor

    from haq.problem.problem import Problem
    from haq.store.records import JudgingRecord

FEW = 200  # images: of fewer, a single one moves an accuracy by more than half a point
SURE = 2.0  # standard errors


def standard_error(accuracy: float, count: int) -> float:
    """Return the standard error of a share: sqrt(p (1 - p) / n).

    Args:
        accuracy: The share p, 0 to 1.
        count: How many samples n it was measured on.

    Returns:
        The error, a share itself.
    """
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / count)


def with_error(share: float | None, count: int) -> str:
    """Write a share in percent, with its standard error in points where it is of few images: 91.67 % ± 4.89."""
    if share is None or count >= FEW:
        return percent(share)
    return f"{percent(share)} ± {100 * standard_error(share, count):.2f}"


def value_with_error(judging: JudgingRecord, value: float | None, count: int, error: float | None = None) -> str:
    """Write an objective's value, with its standard error where it is known and the value is of few samples.

    Args:
        judging: What the value is of. Of a share of samples the standard error follows from the share.
        value: The value.
        count: On how many samples.
        error: The standard error of another value.

    Returns:
        Words such as 91.67 % ± 4.89 or 28.41 dB ± 0.3.
    """
    if judging.counts_samples:
        return with_error(value, count)
    words = judging.show(value)
    if count >= FEW or not _matters(error, value):
        return words
    assert error is not None
    return f"{words} ± {show_error(error, judging.objective_unit)}"


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


def chance_sentence(accuracy: float, guessing: float, count: int, split: str, samples_are: str = "images") -> str:
    """Warn of an accuracy at chance.

    Args:
        accuracy: The float network's.
        guessing: What guessing gives.
        count: The number of samples.
        split: What their split is called.
        samples_are: What they are called.

    Returns:
        One sentence; nothing for an accuracy that is more than chance.
    """
    if not is_chance(accuracy, guessing, count):
        return ""
    points = 100 * standard_error(accuracy, count)
    hint = ""
    if samples_are == "images":
        hint = " (see --mean and --std)"
    return (
        f"WARNING: the float network's accuracy is {percent(accuracy)} (standard error {points:.2f} points) on {count:,} "
        f"{samples_are} of the {split} split, and guessing gives {percent(guessing)}: it may not be trained for these "
        f"classes, or be given other {samples_are} than it was trained on{hint}"
    )


def few_sentence(count: int, split: str, measured: str = "accuracy", samples_are: str = "images") -> str:
    """Warn of a share of few samples; nothing for enough of them.

    Args:
        count: The number of samples.
        split: What their split is called.
        measured: What is measured on them.
        samples_are: What they are called.

    Returns:
        One sentence or nothing.
    """
    if count >= FEW or not count:
        return ""
    points = 100 * standard_error(0.5, count)
    return (
        f"WARNING: the {split} split has {count} {samples_are}, so one of them moves {measured} by {100 / count:.1f} points, "
        f"and its standard error is up to {points:.1f}: smaller differences say nothing"
    )


def _matters(error: float | None, value: float | None) -> bool:
    """Say whether a standard error is known and more than a rounding, as that of the float network held against itself."""
    return error is not None and error > SAME * abs(value or 0.0)


def error_sentence(problem: Problem) -> str:
    """Warn of a value, no share, that is of few samples, with its standard error; nothing where that isn't known."""
    count, error, objective = problem.evaluator.count, problem.float_result.error, problem.objective
    if count >= FEW or not _matters(error, problem.float_result.value):
        return ""
    assert error is not None
    number = show_error(error, objective.unit)
    if objective.unit == PERCENT:
        number += " points"
    return (
        f"WARNING: the search split has {count} {problem.samples_are}, and the standard error of the float network's "
        f"{objective.title} is {number}: smaller differences say little"
    )


def doubts(problem: Problem) -> list[str]:
    """List what must be said of the values of a problem before they are believed: sentences, none if all is well."""
    evaluator, objective = problem.evaluator, problem.objective
    if isinstance(objective, BlackBox):
        sentence = (
            f"NOTE: objective {objective.name!r} is given the network itself, so every policy's network is run as a whole "
            "(nothing that its first layers computed is reused), and no evaluation ends early"
        )
        if not objective.takes_split:
            sentence += (
                '. It takes no `split` ("search" or "test"), so what is said of the test split is of what policies are '
                "chosen by"
            )
        return [sentence]
    if not objective.takes_scores or objective.unit != PERCENT:
        return [sentence for sentence in [error_sentence(problem)] if sentence]
    sentences = [few_sentence(evaluator.count, "search", objective.title, problem.samples_are)]
    scores = evaluator.expected
    # Of an objective of somebody's own nobody knows what guessing gives.
    if objective.name in ("accuracy", "accuracy+robust") and scores is not None:
        labels = evaluator.labels
        accuracy = float((scores.argmax(1).cpu() == labels).double().mean())
        guessing = guessing_share(labels, scores.shape[1])
        sentences.append(chance_sentence(accuracy, guessing, evaluator.count, "search", problem.samples_are))
    return [sentence for sentence in sentences if sentence]
