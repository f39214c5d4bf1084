"""It is said where an accuracy means little: at chance, and of few images."""

from __future__ import annotations

import math

import pytest
import torch

import haq
from haq.problem.chance import chance_sentence, doubts, is_chance, standard_error, with_error
from tests.conftest import brightest, fitted_network, images, small_network


def test_the_standard_error() -> None:
    assert haq.problem.standard_error(0.9, 100) == pytest.approx(0.03)
    assert standard_error(1.0, 5) == 0.0
    assert with_error(0.9, 100) == "90.00 % ± 3.00"
    assert with_error(0.9, 200) == "90.00 %"
    assert with_error(None, 5) == "–"


@pytest.mark.parametrize(
    ("accuracy", "classes", "count", "expected"),
    [
        (0.10, 10, 2000, True),
        (0.10 + 1.9 * math.sqrt(0.09 / 2000), 10, 2000, True),
        (0.10 + 2.1 * math.sqrt(0.09 / 2000), 10, 2000, False),
        (0.02, 10, 2000, True),  # below chance the labels are others
        (0.001, 1000, 2000, True),
        (0.75, 4, 40, False),
    ],
)
def test_chance_is_two_standard_errors_wide(accuracy: float, classes: int, count: int, expected: bool) -> None:
    assert is_chance(accuracy, 1 / classes, count) is expected
    assert bool(chance_sentence(accuracy, 1 / classes, count, "search")) is expected


def problem_of(network: torch.nn.Module, count: int, labels: torch.Tensor | None = None) -> haq.Problem:
    x = images(count, 3)
    if labels is None:
        labels = brightest(x)
    return haq.Problem(network, calibrate=images(32, 1), search=(x, labels), target="edge", budget=0.6)


def test_what_must_be_said_of_a_problem() -> None:
    assert doubts(problem_of(fitted_network(), 200)) == []
    (few,) = doubts(problem_of(fitted_network(), 100))
    assert "the search split has 100 images, so one of them moves accuracy by 1.0 points" in few
    (chance,) = doubts(problem_of(small_network(), 200))
    assert "guessing gives" in chance
    # Whoever always answers the commonest class is right nine times in ten.
    labels = (torch.arange(200) % 10 == 0).long()
    network = fitted_network()
    network.get_submodule("classifier").bias.data[0] += 1000.0
    (chance,) = doubts(problem_of(network, 200, labels))
    assert "accuracy is 90.00 % (standard error 2.12 points) on 200 images" in chance
    assert "guessing gives 90.00 %" in chance
    assert "--mean and --std" in chance


def test_an_objective_of_few_images_says_so_without_labels() -> None:
    problem = haq.Problem(small_network(), images(32, 1), images(50), "edge", budget=0.6, objective="agreement")
    assert ["50 images" in sentence for sentence in doubts(problem)] == [True]
