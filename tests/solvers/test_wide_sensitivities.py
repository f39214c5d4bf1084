"""Sensitivities of 16 bits and float: what is measured, estimated and guessed goes on beyond 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import haq
from haq.problem import KINDS
from haq.problem.sensitivity import Sensitivities, largest_widths
from haq.solvers import sensitivity
from haq.solvers.base import Session
from hw_models.widths import FLOAT, place_of
from tests.conftest import fitted_network, images
from tests.solvers.chips import Chip

PAIRS = [(w, a) for w in (4, 8, 16, FLOAT) for a in (4, 8, 16, FLOAT)]
EIGHT, SIXTEEN, NO_BITS = place_of(8), place_of(16), place_of(FLOAT)


def made(bits: str) -> haq.Problem:
    inputs = images(48)
    network = fitted_network()
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    chip = Chip(PAIRS, depthwise=PAIRS)
    return haq.Problem(network, images(16, 1), (inputs, labels), chip, budget=1.0, bits=bits, correction="analytic")


def measured(problem: haq.Problem, kind: str, evaluations: int = 200) -> Sensitivities:
    session = Session(problem, evaluations, sensitivity_kind=kind)
    table = sensitivity.measure(problem, session, keep=1)
    assert table.shape == (len(problem.decisions), 10, 10)
    assert np.isfinite(table).all()
    assert (np.diff(table, axis=1) <= 0).all()
    assert (np.diff(table, axis=2) <= 0).all()
    assert session.sensitivities is not None
    return session.sensitivities


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_lose_less_than_8_and_float_loses_nothing(kind: str) -> None:
    problem = made("4,8,16,float")
    found = measured(problem, kind)
    free = [index for index, decision in enumerate(problem.decisions) if len(decision.pairs) > 1]
    increases = found.loss_increases[free]
    assert (largest_widths(problem)[free] == FLOAT).all()
    assert (increases[:, :, SIXTEEN] <= increases[:, :, place_of(4)]).all()
    if kind in ("hessian", "gradient"):
        # What is measured drowns in chance, and in what the range of the scales cuts off at 8 bits as well as at 16.
        assert increases[:, :, SIXTEEN].mean() < increases[:, :, EIGHT].mean() / 2
    assert (found.table(problem)[:, NO_BITS, NO_BITS] == 0).all()


@pytest.mark.parametrize("kind", ["hessian", "gradient"])
def test_estimates_of_few_bits_are_what_they_are_without_wider_ones(kind: str) -> None:
    few, wide = measured(made("4,8"), kind), measured(made("4,8,16"), kind)
    of_four = place_of(4)
    # What the base leaves, 8 bits here and 16 there, is no increase.
    assert few.loss_increases[1:-1, :, of_four] == pytest.approx(wide.loss_increases[1:-1, :, of_four], rel=0.1)


def test_evaluations_measure_every_width_but_the_largest() -> None:
    problem = made("4,8,16,float")
    # A base, and three widths of each operand of three layers.
    assert sensitivity.evaluations_for_all(problem) == 1 + 3 * 2 * 3
    found = measured(problem, "loss", evaluations=1 + 18 + 1)
    assert found.known == 18
    assert found.base["hidden"] == (None, None)
    few = measured(problem, "loss", evaluations=5)
    assert few.known == 3
