"""What the removal of channels is predicted to lose: how far the outputs on the calibration inputs move, a group at a time."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from haq.problem.channels import ChannelProblem
from haq.problem.distribution import Distribution
from haq.problem.evaluator import Evaluator, evaluation_mode
from haq.problem.samples import outputs_of, pieces, samples_in

Floats = NDArray[np.float64]

logger = logging.getLogger("haq")

MOST_SHARES = 3  # of a group that are measured, others being interpolated
MOST_SAMPLES = 256  # calibration samples that are looked at
BATCH = 128
LEAST = 1e-6  # nats: what a loss that drowns in noise is taken for

# By what judges a problem's policies, which all its variations (other targets, other limits) have in common.
_KNOWN: weakref.WeakKeyDictionary[Evaluator, list[Floats] | None] = weakref.WeakKeyDictionary()


def removal_losses(problem: ChannelProblem) -> list[Floats] | None:
    """Tell what every choice of channels is predicted to lose, all other groups keeping theirs; it costs no evaluation.

    That is the divergence of the outputs on calibration inputs from the float network's, once statistics of norms are taken
    anew, in nats where outputs are scores; nothing is quantized. Fewer channels are never taken to be better.

    Args:
        problem: A problem of channels and widths.

    Returns:
        By channel decision, shape (options,) each, 0 for all channels; None where outputs can't be held against the float
        network's, or, with a warning, where that fails.
    """
    if problem.evaluator not in _KNOWN:
        found = None
        if problem.has_gradients:
            try:
                found = _measured(problem, problem.objective.distribution)
            except (ValueError, RuntimeError) as error:
                words = " ".join(str(error).split())
                logger.warning(f"the search begins without what the removal of channels is predicted to lose: {words}")
        _KNOWN[problem.evaluator] = found
    return _KNOWN[problem.evaluator]


def _measured(problem: ChannelProblem, distribution: Distribution | None) -> list[Floats]:
    """Measure them. Raises ValueError or RuntimeError for networks without some channels that can't be run."""
    assert distribution is not None
    parts = list(_parts(problem.calibration))
    with evaluation_mode(problem.network), torch.no_grad():
        expected = [outputs_of(problem.network, part, problem.forward) for part in parts]
    whole = [len(channel.shares) - 1 for channel in problem.channel_decisions]
    found = []
    for group, channel in enumerate(problem.channel_decisions):
        last = len(channel.shares) - 1
        places = sorted({round(place) for place in np.linspace(0, last - 1, MOST_SHARES)})
        measured = []
        for number in places:
            numbers = list(whole)
            numbers[group] = number
            loss = _divergence(problem, distribution, numbers, parts, expected)
            if not math.isfinite(loss):
                loss = 1 / LEAST  # as bad as anything
            measured.append(max(loss, LEAST))
        # Losses fall by about the same factor from share to share.
        losses = np.append(np.exp(np.interp(np.arange(last), places, np.log(measured))), 0.0)
        found.append(np.maximum.accumulate(losses[::-1])[::-1])
    return found


def _divergence(
    problem: ChannelProblem, distribution: Distribution, numbers: Iterable[int], parts: list[Any], expected: list[Any]
) -> float:
    """Return how far outputs are from the float network's, in the mean, for given channels, in float."""
    network = problem.pruned(problem.keep_of(numbers))
    total, count = 0.0, 0
    with evaluation_mode(network), torch.no_grad():
        for part, outputs in zip(parts, expected, strict=True):
            divergence = distribution.divergence(outputs_of(network, part, problem.forward), outputs)
            total += float(divergence.sum(dtype=torch.float64))
            count += len(divergence)
    return total / max(count, 1)


def _parts(batches: Iterable[Any]) -> Iterable[Any]:
    """Yield parts of the first calibration batches."""
    seen = 0
    for batch in batches:
        for part, _ in pieces(batch, BATCH):
            if seen >= MOST_SAMPLES:
                return
            yield part
            seen += samples_in(part)
