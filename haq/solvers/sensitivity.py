"""How much the loss rises when one operand of one layer is given fewer bits: what greedy and the integer programme know."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.decision import ten_places
from haq.problem.distribution import Distribution
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities, decided_layers, largest_widths
from haq.solvers.base import Session
from haq.solvers.hessian import curvature
from haq.solvers.layer_outputs import gradient_increases, remaining_errors
from hw_models.storage import BITS
from hw_models.widths import PLACES, place_of, places

logger = logging.getLogger("haq")

# A width in the middle says most; from it and the calibrated error the others can be guessed until they are measured. But for
# one bit, where that error is far too kind.
ORDER = (4, 1, 3, 5, 2, 6, 7, 8, 16)
LEAST = 1e-6  # nats: what an increase that drowns in noise is taken for

Operand = tuple[int, int, int]  # of a decision: weights (0) or activations (1), at so many bits


def measure(problem: Problem, session: Session, keep: int) -> NDArray[np.float64]:
    """Tell how much every pair of bits raises the loss: from what the session knows, or else measured.

    Args:
        problem: What is searched.
        session: Its `sensitivities`, if there are any, are taken; otherwise they are measured, left there and told.
        keep: How many of the session's evaluations must be left.

    Returns:
        Nats, shape (decisions, 10, 10).
    """
    if session.sensitivities is None:
        session.sensitivities = computed(problem, session.sensitivity_kind)
        if session.sensitivities is None:
            session.sensitivities = by_evaluation(problem, session, keep)
        session.on_sensitivities(session.sensitivities)
    return session.sensitivities.table(problem)


def by_evaluation(problem: Problem, session: Session, keep: int, also: Sequence[Problem] = ()) -> Sensitivities:
    """Evaluate one policy for each operand and width worth choosing, with everything else at the largest width.

    Args:
        problem: What is searched.
        session: Evaluates policies, as far as its evaluations go.
        keep: How many of these must be left.
        also: The same problem on other targets, where other widths are worth choosing.

    Returns:
        What was found.
    """
    highest = largest_widths(problem)
    loss_increases = np.full((len(highest), 2, PLACES), np.nan)
    affordable = _wanted(highest, (problem, *also))[: max(session.left - keep - 1, 0)]
    # Within a width from the last layer to the first, so that what comes before the changed layer is already computed
    # (haq/problem/prefix_cache.py).
    affordable.sort(key=lambda item: (ORDER.index(item[2]), -item[0]))
    divergence = session.sensitivity_kind == "kl"

    def loss(pairs: NDArray[np.int64]) -> float:
        result = session.evaluate(problem.decide(pairs))
        if not divergence:
            return result.loss
        if result.divergence is None:
            raise ValueError(
                f"sensitivities of kind 'kl' need outputs to tell a divergence by, which objective {problem.objective.name!r} "
                "doesn't have here: choose another kind"
            )
        return result.divergence

    def changed(item: Operand) -> NDArray[np.int64]:
        decision, operand, bits = item
        pairs = highest.copy()
        pairs[decision, operand] = bits
        return pairs

    if affordable:
        session.expect(map(problem.decide, [highest, *map(changed, affordable)]))
    base = None
    for item in affordable:
        if session.left <= keep + (base is None):
            break
        if base is None:
            base = loss(highest)
        if math.isinf(base):
            break  # nothing can be told from outputs that aren't finite
        decision, operand, bits = item
        loss_increases[decision, operand, place_of(bits)] = max(loss(changed(item)) - base, LEAST)
    _bound(loss_increases)
    kind = "loss"
    if divergence or problem.objective.compares_with_float:
        kind = "kl"
    return _sensitivities(problem, kind, loss_increases)


def _bound(loss_increases: NDArray[np.float64]) -> None:
    """Make infinite increases, those of outputs that aren't finite, larger than all others together, in place."""
    infinite = np.isinf(loss_increases)
    if infinite.any():
        loss_increases[infinite] = 1.0 + np.nansum(np.where(infinite, 0.0, loss_increases))


def evaluations_for_all(problem: Problem) -> int:
    """Count the evaluations that it takes to measure every operand at every width worth choosing."""
    return 1 + len(_wanted(largest_widths(problem), [problem]))


def _wanted(highest: NDArray[np.int64], problems: Sequence[Problem]) -> list[Operand]:
    """List what there is to measure, what says most first."""
    pairs = [np.concatenate([problem.decisions[i].pairs for problem in problems]) for i in range(len(highest))]
    return [
        (decision, operand, bits)
        for bits in ORDER
        for decision in range(len(highest))
        for operand in (0, 1)
        if bits < highest[decision, operand] and bits in pairs[decision][:, operand]
    ]


def by_hessian(problem: Problem) -> Sensitivities:
    """Estimate sensitivities as HAWQ-V2 does, which costs no evaluation.

    Dong et al., NeurIPS 2020, equation 2: the average Hessian trace of a layer's weight times the squared error of its
    quantization, |Q(W) - W|^2, and likewise for its input; halved, as in the second-order expansion of the loss, so that they
    are nats. Traces are taken on the calibration images (`hessian.curvature`), errors as calibration found them. Of the error
    of a weight counts what correction and rounding leave of it in the layer's output (`layer_outputs.remaining_errors`).
    """
    layers = Q.quant_layers(problem.evaluator.network)
    names = problem.workload.names
    left = remaining_errors(
        problem.network,
        problem.evaluator.network,
        names,
        problem.calibration,
        problem.forward,
        widths=_measured_widths(problem),
    )
    distribution = _distribution_of(problem, "hessian")
    curvatures = curvature(problem.network, names, problem.calibration, distribution=distribution, forward=problem.forward)
    halves = {}
    for index, name in enumerate(names):
        weight = layers[name].weight
        of_weight = curvatures[name].weight * float(weight.detach().double().square().sum())
        of_input = sum(trace * power for trace, power in curvatures[name].inputs)
        halves[name] = 0.5 * np.array([[of_weight], [of_input]]) * problem.layer_errors[index]
        halves[name][0] *= ten_places(left[name], 1.0)
    return _of_layers(problem, "hessian", halves)


def by_gradient(problem: Problem) -> Sensitivities:
    """Estimate sensitivities from gradients, as ModelOpt's auto_quantize does, which costs no evaluation.

    See `layer_outputs.gradient_increases`: on the calibration images, with one backward pass for each batch of them.
    """
    increases = gradient_increases(
        problem.network,
        problem.evaluator.network,
        problem.workload.names,
        problem.calibration,
        widths=_measured_widths(problem),
        distribution=_distribution_of(problem, "gradient"),
        forward=problem.forward,
    )
    return _of_layers(problem, "gradient", increases)


def _measured_widths(problem: Problem) -> Sequence[int]:
    """Return the widths at which a layer's output is looked at: 16 bits where they can be chosen."""
    if problem.bits[1] > BITS:
        return Q.WIDTHS
    return Q.WIDTHS[:BITS]


def _distribution_of(problem: Problem, kind: str) -> Distribution:
    """Return what outputs say of answers. Raises ValueError if they can't be held against each other."""
    distribution = problem.objective.distribution
    if distribution is None:
        raise ValueError(
            f"sensitivities of kind {kind!r} need outputs that can be held against the float network's, which objective "
            f"{problem.objective.name!r} has none of: choose kind 'loss'"
        )
    return distribution


COMPUTED: dict[str, Callable[[Problem], Sensitivities]] = {"hessian": by_hessian, "gradient": by_gradient}


def predicted(problem: Problem) -> Sensitivities | None:
    """Tell what gradients predict of the loss, which costs no evaluation; None, with a warning, where they can't be had."""
    if not problem.has_gradients:
        return None
    try:
        return by_gradient(problem)
    except (ValueError, RuntimeError) as error:
        # A network whose outputs have no gradient can be searched all the same.
        logger.warning(f"the search begins without what gradients predict of the loss: {' '.join(str(error).split())}")
        return None


def computed(problem: Problem, kind: str) -> Sensitivities | None:
    """Compute the sensitivities of a kind that costs no evaluation; None for the other kinds."""
    compute = COMPUTED.get(kind)
    if compute is None:
        return None
    return compute(problem)


def _of_layers(problem: Problem, kind: str, losses: dict[str, NDArray[np.float64]]) -> Sensitivities:
    """Make sensitivities of what every layer's operand alone adds to the loss: nats (2, widths) by layer."""
    complete = {name: np.array([ten_places(row, 0.0) for row in rows]) for name, rows in losses.items()}
    loss_increases = np.array([sum(complete[name] for name in names) for names in decided_layers(problem)])
    _bound(loss_increases)
    # What the base leaves is no increase.
    highest = places(largest_widths(problem))[:, :, None]
    loss_increases = np.maximum(loss_increases - np.take_along_axis(loss_increases, highest, 2), LEAST)
    return _sensitivities(problem, kind, loss_increases)


def _sensitivities(problem: Problem, kind: str, loss_increases: NDArray[np.float64]) -> Sensitivities:
    base = problem.decide(largest_widths(problem))
    if problem.bits[1] <= BITS:
        loss_increases[:, :, BITS:] = np.nan  # nobody can choose 16 bits or float
    return Sensitivities(kind, loss_increases, decided_layers(problem), problem.bits, base)
