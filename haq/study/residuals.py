"""Residuals of 8 bits for a network that was searched with them in float, and the other way round: what that changes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import quantizers as Q
from haq.attacks.threat_model import parse_eps
from haq.problem.objective import build_objective
from haq.problem.tally import measure
from haq.store.records import ObjectiveRecord
from haq.study.config import FLOAT
from haq.study.task import LoadedNetwork


class OtherResiduals(NamedTuple):
    """A network with other residuals than it was searched with.

    Attributes:
        network: The network, in evaluation mode.
        rows: What each of the two is worth on the whole test split, as rows of a table; nothing if they are one.
        values: The same as numbers, by the residuals: "8" and "float".
    """

    network: nn.Module
    rows: tuple[tuple[str, str], ...] = ()
    values: dict[str, float] = {}


def residuals_of(network: nn.Module) -> str:
    """Return what additions and average pools of a quantized network take, as `--residuals` says it."""
    if Q.residual_quantizers(network):
        return str(Q.MAX_BITS)
    return FLOAT


def with_residuals(loaded: LoadedNetwork, network: nn.Module, residuals: str | None) -> OtherResiduals:
    """Give the network of a run the residuals that are asked for, and measure what that changes.

    Quantizers that the network hasn't had are calibrated on the run's calibration images, as the quantized network computes
    them.

    Args:
        loaded: The run's network and data.
        network: Its quantized network, which is left alone.
        residuals: "8" or "float"; None for those that it has.

    Returns:
        The network; the same one if it has these residuals.

    Raises:
        ValueError: If torch.fx can't follow the network.
    """
    before = residuals_of(network)
    if residuals in (None, before):
        return OtherResiduals(network)
    if residuals == FLOAT:
        made = Q.copy_network(network)
        Q.remove_residual_quantizers(made)
    else:
        made = Q.add_residual_quantizers(network, loaded.calibration(), **loaded.called_by())
    made.eval()
    config = loaded.config
    objective = build_objective(config.objective, loaded.network, loaded.dataset, parse_eps(config.eps))
    record = ObjectiveRecord.of(objective, "images")
    values = {}
    for width, module in ((before, network), (residuals, made)):
        values[width] = measure(objective, loaded.network, loaded.dataset.test, module.eval())
    rows = tuple((f"test {objective.title}, residuals {words(width)}", record.show(value)) for width, value in values.items())
    return OtherResiduals(made, rows, values)


def words(residuals: str) -> str:
    """Say how wide what additions and average pools take is."""
    if residuals == FLOAT:
        return "in float"
    return f"of {residuals} bits"
