"""How much the loss rises when one operand of one layer is given fewer bits: what greedy and the integer programme know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities, decided_layers, largest_widths
from haq.solvers.hessian import curvature

if TYPE_CHECKING:
    from haq.solvers.base import Session

# A width in the middle says most; from it and the calibrated error the others can be guessed until they are measured. But for
# one bit, where that error is far too kind.
ORDER = (4, 1, 3, 5, 2, 6, 7, 8)
LEAST = 1e-6  # nats: what a rise that drowns in noise is taken for


def measure(problem: Problem, session: Session, keep: int) -> NDArray[np.float64]:
    """The rise of the loss (nats) of every decision at every pair of bits, shape (decisions, 8, 8): from what the session
    knows, or else measured, for which all but `keep` of its evaluations may be used, and told to the session."""
    if session.sensitivities is None:
        hessian = session.sensitivity_kind == "hessian"
        session.sensitivities = by_hessian(problem) if hessian else by_evaluation(problem, session, keep)
        session.on_sensitivities(session.sensitivities)
    return session.sensitivities.table(problem)


def by_evaluation(problem: Problem, session: Session, keep: int, also: Sequence[Problem] = ()) -> Sensitivities:
    """Evaluate one policy for each operand and width worth choosing, with everything else at the largest width, as far as all
    but `keep` of the session's evaluations go. `also` are the same problem on other targets, where other widths are worth
    choosing."""
    highest = largest_widths(problem)
    rise = np.full((len(highest), 2, 8), np.nan)
    pairs = [np.concatenate([same.decisions[i].pairs for same in (problem, *also)]) for i in range(len(highest))]
    wanted = [
        (decision, operand, bits)
        for bits in ORDER
        for decision in range(len(highest))
        for operand in (0, 1)
        if bits < highest[decision, operand] and bits in pairs[decision][:, operand]
    ]
    # Those that can be paid for; within a width from the last layer to the first, so that what comes before the changed layer
    # is already computed (haq/problem/prefix_cache.py).
    affordable = wanted[: max(session.left - keep - 1, 0)]
    affordable.sort(key=lambda item: (ORDER.index(item[2]), -item[0]))
    divergence = session.sensitivity_kind == "kl"

    def loss(pairs: NDArray[np.int64]) -> float:
        result = session.evaluate(problem.decide(pairs))
        if not divergence:
            return result.loss
        if result.divergence is None:
            raise ValueError("the evaluator has no teacher to tell the divergence from")
        return result.divergence

    def changed(decision: int, operand: int, bits: int) -> NDArray[np.int64]:
        pairs = highest.copy()
        pairs[decision, operand] = bits
        return pairs

    if affordable:
        session.expect(map(problem.decide, [highest, *(changed(*item) for item in affordable)]))
    base = None
    for decision, operand, bits in affordable:
        if session.left <= keep + (base is None):
            break
        if base is None:
            base = loss(highest)
        rise[decision, operand, bits - 1] = max(loss(changed(decision, operand, bits)) - base, LEAST)
    # Judged by agreement, the loss is the divergence.
    kind = "kl" if divergence or problem.objective == "agreement" else "loss"
    return _sensitivities(problem, kind, rise)


def by_hessian(problem: Problem) -> Sensitivities:
    """HAWQ-V2's sensitivities (Dong et al., NeurIPS 2020, equation 2), which cost no evaluation: the average Hessian trace of
    a layer's weight times the squared error of its quantization, |Q(W) - W|^2, and likewise for its input; halved, as in the
    second-order expansion of the loss, so that they are nats. Traces are taken on the calibration images
    (`hessian.curvature`), errors as calibration found them."""
    layers = Q.quant_layers(problem.evaluator.network)
    bent = curvature(problem.network, problem.workload.names, problem.calibration)
    halves = {}
    for name in problem.workload.names:
        layer, bend = layers[name], bent[name]
        of_weight = bend.weight * float(layer.weight.detach().double().square().sum())
        of_input = sum(trace * power for trace, power in bend.inputs)
        errors = np.array([layer.weight_error.tolist(), layer.activation_error.tolist()])
        halves[name] = 0.5 * np.array([[of_weight], [of_input]]) * errors
    rise = np.array([sum(halves[name] for name in names) for names in decided_layers(problem)])
    # What the base leaves is no rise.
    highest = largest_widths(problem)[:, :, None] - 1
    rise = np.maximum(rise - np.take_along_axis(rise, highest, 2), LEAST)
    return _sensitivities(problem, "hessian", rise)


def _sensitivities(problem: Problem, kind: str, rises: NDArray[np.float64]) -> Sensitivities:
    return Sensitivities(kind, rises, decided_layers(problem), problem.bits, problem.decide(largest_widths(problem)))
