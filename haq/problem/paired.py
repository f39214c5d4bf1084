"""How certain the difference of two networks is that are judged on the same samples.

Both are right about most samples, and wrong about the same ones, so that their difference is far more certain than either of
their values (the paired test of Gosset, 1908).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from haq.problem.evaluator import evaluation_mode
from haq.problem.objective import MetricObjective, Objective, ValueObjective
from haq.problem.tally import Evaluation, measure_by_sample

if TYPE_CHECKING:
    from haq.data import Split
    from haq.networks import Network


APART = 0.22  # see `estimated_error`


def has_values_by_sample(objective: Objective) -> bool:
    """Say whether an objective is a mean of values by sample, of samples as they are."""
    if objective.attacked:
        return False  # each network is attacked in its own way
    if isinstance(objective, ValueObjective):
        return not isinstance(objective, MetricObjective)
    return objective.takes_scores


def error_of_difference(values: Tensor | None, others: Tensor | None) -> float | None:
    """Tell the standard error of the difference of two means over the same samples.

    Of shares it is that of McNemar's test (Psychometrika 12, 1947): with b samples that only one network answers rightly and
    c that only the other does, sqrt(b + c - (b - c)^2 / n) / n, but for n - 1 in place of n.

    Args:
        values: Of every sample, shape (samples,): numbers, or booleans.
        others: Likewise of the same samples, in the same order.

    Returns:
        The standard deviation of the difference by sample over the square root of their number; None where something isn't
        known or not finite, and of a single sample.
    """
    if values is None or others is None or len(values) != len(others) or len(values) < 2:
        return None
    difference = values.double() - others.double()
    if not bool(difference.isfinite().all()):
        return None
    return float(difference.std() / len(difference) ** 0.5)


def estimated_error(one: Evaluation, other: Evaluation) -> float | None:
    """Estimate the paired standard error of two shares of samples of which no answers are known.

    The share of samples that just one of two networks answers rightly grows with the square root of the sum of their
    divergences from the float network: `APART` times that (in nats) was measured for pairs of policies near the best of five
    problems (0.20 to 0.26 on average), within 16 to 30 % for two pairs in three (`experiments/choice.py`); the error, which is
    the square root of it, within 8 to 15 %.

    Args:
        one: A policy's share, and its divergence.
        other: Another's, on the same samples.

    Returns:
        As `error_of_difference` tells; None where a divergence isn't known.
    """
    if one.divergence is None or other.divergence is None or one.images < 2:
        return None
    difference = one.value - other.value
    summed = one.divergence + other.divergence
    if not 0 <= summed < math.inf or not math.isfinite(difference):
        return None
    apart = min(max(APART * math.sqrt(summed), abs(difference)), 1.0)
    return math.sqrt(max(apart - difference**2, 0.0) / (one.images - 1))


def paired_error(
    objective: Objective, network: Network, split: Split, module: nn.Module, batch_size: int = 250
) -> float | None:
    """Tell the standard error of how much worse a network is than the float network.

    Args:
        objective: What both are judged by.
        network: The float network, which preprocesses the inputs.
        split: The samples.
        module: The other network.
        batch_size: Samples at a time.

    Returns:
        As `error_of_difference` tells; None where values aren't means over samples.
    """
    if not has_values_by_sample(objective):
        return None
    values = []
    for one in (network.module, module):
        with evaluation_mode(one):
            values.append(measure_by_sample(objective, network, split, one, batch_size).by_sample)
    return error_of_difference(*values)
