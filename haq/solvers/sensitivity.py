"""How much the loss rises when one operand of one layer is given fewer bits: what greedy and the integer programme know."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haq.problem import Problem
from haq.solvers import Session

# A width in the middle says most; from it and the calibrated error the others can be guessed until they are measured.
ORDER = (4, 3, 5, 2, 6, 7, 1, 8)
LEAST = 1e-6  # nats: what a rise that drowns in noise is taken for


def measure(problem: Problem, session: Session, keep: int) -> NDArray[np.float64]:
    """The rise of the loss (nats) of every decision at every pair of bits, shape (decisions, 8, 8), taken as a sum of the
    weights' and the activations' parts, each measured with everything else at the largest width.

    All but `keep` of the session's evaluations may be used. What is not measured is scaled from the nearest width that
    was, or from the other layers, by the quantization error found in calibration. More bits are never taken to be worse.
    """
    highest = np.array([decision.pairs.max(0) for decision in problem.decisions])
    rise = np.full((len(highest), 2, 8), np.nan)
    wanted = [
        (layer, operand, bits)
        for bits in ORDER
        for layer, decision in enumerate(problem.decisions)
        for operand in (0, 1)
        if bits < highest[layer, operand] and bits in decision.pairs[:, operand]
    ]
    # Those that can be paid for; within a width from the last layer to the first, so that what comes before the changed layer
    # is already computed (haq/prefix.py).
    affordable = wanted[: max(session.left - keep - 1, 0)]
    affordable.sort(key=lambda item: (ORDER.index(item[2]), -item[0]))
    base = None
    for layer, operand, bits in affordable:
        if session.left <= keep + (base is None):
            break
        if base is None:
            base = session.evaluate(problem.decide(highest)).loss
        changed = highest.copy()
        changed[layer, operand] = bits
        rise[layer, operand, bits - 1] = max(session.evaluate(problem.decide(changed)).loss - base, LEAST)
    _fill(rise, problem.noise)
    for layer in range(len(highest)):
        for operand in (0, 1):
            rise[layer, operand, highest[layer, operand] - 1 :] = 0.0
    rise = np.maximum.accumulate(rise[:, :, ::-1], axis=2)[:, :, ::-1]
    return rise[:, 0, :, None] + rise[:, 1, None, :]


def _fill(rise: NDArray[np.float64], noise: NDArray[np.float64]) -> None:
    """Replace NaN by noise x (rise / noise) of the nearest measured width, or of the median layer, in place."""
    error = np.maximum(noise, 1e-12)
    measured = ~np.isnan(rise)
    ratio = rise / error
    for operand in (0, 1):
        known = ratio[:, operand][measured[:, operand]]
        typical = float(np.median(known)) if known.size else 1.0
        for layer in range(len(rise)):
            widths = np.flatnonzero(measured[layer, operand])
            for bits in np.flatnonzero(~measured[layer, operand]):
                near = widths[np.abs(widths - bits).argmin()] if widths.size else None
                scale = typical if near is None else ratio[layer, operand, near]
                rise[layer, operand, bits] = scale * error[layer, operand, bits]
