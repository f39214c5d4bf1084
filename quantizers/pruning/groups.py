"""Which channels of a float network must be removed together: groups, read from the dependency graph of torch-pruning.

A channel of a convolution goes to every layer that reads it, through norms, sums, concatenations
and depthwise convolutions; all of their weights for it have to go with it. `torch-pruning` (Fang et
al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900) says layer by layer
what depends on what. `channel_groups` reads that once into plain data, so that nothing is traced
again when channels are removed, and tries every group out before anybody gets it: where removal is
other than masking, the group is fixed, for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from quantizers.batches import copied
from quantizers.calling import Forward, as_tensors, call, count_of, device_of, samples, to_device
from quantizers.copying import copy_network
from quantizers.layers import QuantLayer
from quantizers.policy import QUANTIZABLE
from quantizers.pruning.channels import IN, OUT, ChannelGroup, ChannelGroups, Member
from quantizers.pruning.dependencies import read_groups
from quantizers.pruning.layers import MAKERS, is_depthwise
from quantizers.pruning.removal import Kept, remove_channels
from quantizers.pruning.trial import Trial

__all__ = ["IN", "OUT", "ChannelGroup", "ChannelGroups", "Member", "apply_kept", "channel_groups", "is_depthwise"]
SAMPLES = 2  # of the example, which are enough to follow channels


def channel_groups(network: nn.Module, example: Any, *, forward: Forward | None = None) -> ChannelGroups:
    """Find which channels of a network must be removed together, and which can be removed at all.

    Channels of the network's inputs are in no group, and groups of its outputs (classes) are fixed.

    Args:
        network: A float network; it is left alone.
        example: Inputs: a tensor, or any structure that the network takes (`quantizers.calling`).
        forward: `forward(network, example)` runs the network; None: it is called with the example.

    Returns:
        The groups. Removal of any of their channels is what masking them is, as was tried out on the example.

    Raises:
        ValueError: For a network that can't be followed, naming what stands in the way; if torch-pruning
            isn't installed.
    """
    _check(network)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng([]):
        made = copy_network(network).eval()
        for parameter in made.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        given = _example(made, to_device(as_tensors(example), device_of(made)), forward or call)
        trial = Trial(made, given, forward)
        read = read_groups(made, given, forward)
        failed = trial.failures(read.groups)
    groups = tuple(group for group in read.groups if group.name not in failed)
    return ChannelGroups(groups, {**read.fixed, **failed})


def apply_kept(network: nn.Module, example: Any, kept: Kept, *, forward: Forward | None = None) -> nn.Module:
    """Remove from a network what was removed from another of its kind, as a file says it.

    Args:
        network: A float network, as it was made; it is left alone.
        example: What its channels are followed with, as in `channel_groups`.
        kept: What `kept_channels` returned for the other; lists of integers will do. None of it is trusted.
        forward: As in `channel_groups`.

    Returns:
        The smaller network; the network itself if nothing is removed.

    Raises:
        ValueError: As `channel_groups` and `remove_channels` do.
    """
    if not isinstance(kept, Mapping):
        raise ValueError(f"kept channels must be lists of integers by name of a group, not {type(kept).__name__}")
    if not kept:
        return network
    return remove_channels(network, channel_groups(network, example, forward=forward), kept)


def _check(network: nn.Module) -> None:
    """Refuse networks that can't be copied smaller."""
    if hasattr(network, "_orig_mod"):
        raise ValueError("the network is compiled: prune what was compiled (its `_orig_mod`), and compile the result")
    if not any(isinstance(module, MAKERS) for module in network.modules()):
        raise ValueError(f"{type(network).__name__} has no convolution or linear layer whose channels could be removed")
    for name, module in network.named_modules():
        if isinstance(module, QuantLayer):
            raise ValueError(f"the network is quantized (layer {name!r}): prune the float network, and quantize what is left")
        if parametrize.is_parametrized(module):
            raise ValueError(f"the weight of {name!r} is computed from others (a parametrization): remove that before pruning")
        if isinstance(module, QUANTIZABLE) and not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {name!r} is computed from others (weight_norm, prune): remove that before pruning"
            )


def _example(network: nn.Module, example: Any, forward: Forward) -> Any:
    """Return as much of an example as is needed, or all of it, for a network that takes no part of it."""
    few = samples(example, count_of(example), 0, SAMPLES)
    for given in (few, example):
        try:
            forward(network, copied(given))
            return given
        except Exception as error:  # whatever a network raises for inputs that aren't its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            refused = ValueError(f"the network can't be run on the example, so its channels can't be followed ({reason})")
            refused.__cause__ = error
    raise refused
