"""How certain the difference of two networks is that are judged on the same samples.

Both are right about most samples, and wrong about the same ones, so that their difference is far more certain than either of
their values (the paired test of Gosset, 1908).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from haq.problem.evaluator import evaluation_mode
from haq.problem.objective import MetricObjective, Objective, ValueObjective, per_sample, which_correct
from haq.problem.tally import wanted_of
from quantizers.calling import count_of, to_device

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
        The standard deviation of the difference by sample over the square root of their number; None where values aren't
        means over samples, or there is but one.
    """
    if not has_values_by_sample(objective):
        return None
    differences: list[Tensor] = []
    for given, targets in split.batches(batch_size):
        inputs = to_device(network.preprocess(given), network.device)
        wanted = wanted_of(objective, network, inputs, targets)
        values = []
        for one in (network.module, module):
            with torch.inference_mode(), evaluation_mode(one):
                outputs = objective.read(network.run(one, inputs, targets))
                values.append(_values(objective, outputs, wanted, count_of(inputs)))
        differences.append(values[0] - values[1])
    found = torch.cat(differences)
    if len(found) < 2 or not bool(found.isfinite().all()):
        return None
    return float(found.std() / len(found) ** 0.5)


def _values(objective: Objective, outputs: Tensor, wanted: Tensor, count: int) -> Tensor:
    """Return what an objective says of every sample of a batch."""
    if isinstance(objective, ValueObjective):
        return per_sample(objective, "values", objective.values(outputs, wanted), count)
    return which_correct(objective, (outputs,), wanted).double().cpu()
