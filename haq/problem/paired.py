"""How certain the difference of two networks is that are judged on the same samples.

Both are right about most samples, and wrong about the same ones, so that their difference is far more certain than either of
their values (the paired test of Gosset, 1908).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from haq.problem.evaluator import evaluation_mode
from haq.problem.objective import MetricObjective, Objective, ValueObjective
from haq.problem.tally import measure_by_sample

if TYPE_CHECKING:
    from haq.data import Split
    from haq.networks import Network


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
