"""Pruning in one call: groups of channels, a criterion, and the smaller network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from quantizers.batches import Batches, batches_of, collect, copied, prepared
from quantizers.calling import Forward, count_of, first_sample
from quantizers.norms import is_frozen, running_norms, take_statistics
from quantizers.pruning.criterion import Criterion, Loss, select
from quantizers.pruning.groups import channel_groups
from quantizers.pruning.removal import remove_channels


def prune(
    network: nn.Module,
    keep: Mapping[str, float] | float,
    *,
    criterion: str | Criterion | Callable[..., Any] = "l1",
    example: Any = None,
    batches: Batches | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Make a smaller copy of a network, from which the channels are removed that a criterion thinks least of.

        import quantizers as Q

        print(Q.channel_groups(network, images[:1]).groups)  # what can be pruned
        half = Q.prune(network, 0.5, criterion="fpgm", batches=[images])
        keep = {"layer1.0.conv1": 0.5, "layer3.0.conv1": 0.25}
        small = Q.prune(network, keep, criterion="taylor", batches=loader, loss=torch.nn.functional.cross_entropy)
        qnetwork = Q.quantize(small, Q.BitPolicy.uniform(small, w=4, a=8), calibrate=loader)

    Args:
        network: The network, in float; it is left alone.
        keep: By the group's name (`channel_groups`) the share of its channels that is kept, above 0 and at most 1; or one
            share for all groups.
        criterion: Which channels these are: the name of a criterion (`criterion_names`), a criterion, or a function
            (network, group) -> scores.
        example: Inputs to follow the network with, a tensor or what it takes; None: the first sample of the batches.
        batches: Inputs, or pairs of inputs and labels, as `quantize` takes them for calibration. Batch norms take their
            statistics anew from them in the smaller network, and criteria that need data see them.
        loss: Function of outputs and labels, the mean over samples, for criteria that need it.
        generator: Source of random numbers of criteria that draw any; None: a new one of seed 0.
        forward: What runs the network on a batch, as in `quantize`.

    Returns:
        The smaller network. Without batches, batch norms keep the statistics that they had for the channels that are left.

    Raises:
        ValueError: For a network whose groups can't be found, a group that isn't there or can't be pruned, a share that leaves
            no channel, an unknown criterion, and one that lacks data or a loss.
    """
    found = Criterion.named(criterion)
    given: list[Any] | None = None
    if batches is not None:
        given = list(batches_of(batches, network))
        if not given:
            raise ValueError("pruning needs at least one sample; `batches` gave none")
    if example is None:
        if given is None:
            raise ValueError("pruning needs inputs to follow the network with: give an example, or batches")
        first = prepared(given[0], network, forward)
        example = first_sample(first, count_of(first))
    groups = channel_groups(network, example, forward=forward)
    if not isinstance(keep, Mapping):
        keep = dict.fromkeys(groups, keep)
    ranking = found.prepare(network, groups, given, loss, generator, forward=forward)
    pruned = remove_channels(network, groups, select(ranking, groups, keep))
    if given is not None:
        refresh_norms(pruned, given, forward)
    return pruned


def refresh_norms(network: nn.Module, batches: Batches, forward: Forward | None = None) -> None:
    """Give batch norms the mean and variance of what they see now, in place, in one pass; frozen ones keep theirs.

    Args:
        network: A network from which channels were removed.
        batches: Inputs, as `quantize` takes them for calibration.
        forward: What runs the network on a batch, as in `quantize`.

    Raises:
        ValueError: If a norm sees a single value of each channel, so that there is no variance.
    """
    norms = [norm for norm in running_norms(network) if not is_frozen(norm)]
    if norms:
        take_statistics(network, norms, map(copied, collect(batches, network, forward)), forward)
