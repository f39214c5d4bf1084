"""Smaller networks: channels removed by plain selection of weights, without a new trace."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from quantizers.copying import copy_network
from quantizers.pruning.groups import IN, OUT, ChannelGroup, ChannelGroups, is_depthwise

RECORD = "_kept_channels"  # the attribute of a network that says what was removed from it


def kept_channels(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return which channels of each group are kept in a network from which channels were removed.

    Args:
        network: Any; a copy of a network from which channels were removed knows them too.

    Returns:
        The numbers that the channels had in the network that nothing was removed from, by group; empty if
        nothing was removed. Groups that keep all of their channels aren't named.
    """
    return dict(getattr(network, RECORD, {}))


def remove_channels(network: nn.Module, groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Make a smaller copy of a network.

    Weights, biases and statistics of norms are selected; in_channels, num_features and the like follow.
    Nothing is traced, so that this takes little time.

    Args:
        network: The network that the groups are of; it is left alone.
        groups: What `channel_groups` returned for it.
        kept: The channels that are kept, by group, in rising order; groups that it doesn't name keep all.

    Returns:
        The smaller network, in the modes of the network.

    Raises:
        ValueError: For a group that isn't there or is fixed, and for channels that can't be kept.
    """
    chosen = check_kept(groups, kept)
    selections = _selections(groups, chosen)
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, dims in selections.items():
            _select_tensors(network.get_submodule(name), dims, memo)
        made = copy.deepcopy(network, memo)
        for name, dims in selections.items():
            _set_sizes(made.get_submodule(name), dims)
    record = kept_channels(network)
    for name, channels in chosen.items():
        before = record.get(name)
        if before is not None:
            channels = tuple(before[channel] for channel in channels)
        if len(channels) < groups[name].channels or before is not None:
            record[name] = channels
    setattr(made, RECORD, record)
    return made


def mask_channels(network: nn.Module, groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Make a copy of a network in which removed channels count as zeros for all layers that read them.

    Its outputs are what those of the smaller network must equal.

    Args:
        network: The network that the groups are of; it is left alone.
        groups: What `channel_groups` returned for it.
        kept: As in `remove_channels`.

    Returns:
        The copy, of the same shapes.

    Raises:
        ValueError: As `remove_channels` does.
    """
    chosen = check_kept(groups, kept)
    made = copy_network(network)
    with torch.inference_mode(False), torch.no_grad():
        for name, channels in chosen.items():
            removed = set(range(groups[name].channels)).difference(channels)
            for member in groups[name].members:
                if member.dim == IN:
                    places = [place for channel in sorted(removed) for place in member.places[channel]]
                    _zero_inputs(made.get_submodule(member.module), places)
    return made


def check_kept(groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Check which channels are to be kept.

    Args:
        groups: The groups of the network.
        kept: The channels that are kept, by group.

    Returns:
        The same, as tuples of integers.

    Raises:
        ValueError: For a group that isn't there or is fixed; for channels that are no integers, out of
            range, not in rising order, or none; for a part of a unit.
    """
    found = {}
    for name, channels in kept.items():
        if name not in groups:
            if name in groups.fixed:
                raise ValueError(f"no channels of {name!r} can be removed: {groups.fixed[name]}")
            raise ValueError(f"there is no group of channels {str(name)[:80]!r}; there are {', '.join(groups) or 'none'}")
        found[name] = _checked(groups[name], channels)
    return found


def _checked(group: ChannelGroup, channels: Any) -> tuple[int, ...]:
    try:
        numbers = tuple(operator.index(channel) for channel in channels)
    except TypeError:
        raise ValueError(f"the kept channels of {group.name!r} must be a list of integers") from None
    if not numbers:
        raise ValueError(f"group {group.name!r} must keep at least one of its channels")
    if any(one >= other for one, other in itertools.pairwise(numbers)):
        raise ValueError(f"the kept channels of {group.name!r} must be in rising order, each once")
    if numbers[0] < 0 or numbers[-1] >= group.channels:
        raise ValueError(
            f"group {group.name!r} has channels 0 to {group.channels - 1}, and can't keep {numbers[0]} to {numbers[-1]}"
        )
    if group.unit > 1:
        units = sorted({channel // group.unit for channel in numbers})
        if len(units) * group.unit != len(numbers):
            raise ValueError(f"channels of {group.name!r} are kept in runs of {group.unit}: 0 to {group.unit - 1}, and so on")
    return numbers


Selections = dict[str, dict[str, Tensor]]  # what is kept, by module and dimension


def _selections(groups: ChannelGroups, chosen: Mapping[str, tuple[int, ...]]) -> Selections:
    """Return the positions that are kept of every dimension of which some are removed."""
    removed: dict[tuple[str, str], set[int]] = {}
    for name, channels in chosen.items():
        group = groups[name]
        gone = set(range(group.channels)).difference(channels)
        if not gone:
            continue
        for member in group.members:
            places = removed.setdefault((member.module, member.dim), set())
            for channel in gone:
                places.update(member.places[channel])
    found: Selections = {}
    for (module, dim), places in removed.items():
        found.setdefault(module, {})[dim] = places  # type: ignore[assignment]
    return found


def _kept_places(size: int, removed: Any) -> Tensor:
    return torch.tensor([place for place in range(size) if place not in removed])


def _size(module: nn.Module, dim: str) -> int:
    if isinstance(module, _ConvNd):
        return {OUT: module.out_channels, IN: module.in_channels}[dim]
    if isinstance(module, nn.Linear):
        return {OUT: module.out_features, IN: module.in_features}[dim]
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    raise TypeError(f"{type(module).__name__} has no channels")


def _select_tensors(module: nn.Module, dims: dict[str, Any], memo: dict[int, Any]) -> None:
    """Make the smaller tensors of a module, where a deep copy takes them from."""
    for dim in list(dims):
        dims[dim] = _kept_places(_size(module, dim), dims[dim])
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        smaller = tensor.detach()
        if OUT in dims and tensor.dim() > 0:
            smaller = smaller.index_select(0, dims[OUT].to(tensor.device))
        if IN in dims and name == "weight":
            smaller = smaller.index_select(1, dims[IN].to(tensor.device))
        if smaller.data_ptr() == tensor.data_ptr():
            continue
        made = smaller.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(smaller, tensor.requires_grad)
        memo[id(tensor)] = made


def _set_sizes(module: nn.Module, dims: dict[str, Any]) -> None:
    for dim, places in dims.items():
        count = len(places)
        if isinstance(module, _ConvNd):
            if is_depthwise(module):
                module.in_channels = module.out_channels = module.groups = count
            elif dim == OUT:
                module.out_channels = count
            else:
                module.in_channels = count
        elif isinstance(module, nn.Linear):
            if dim == OUT:
                module.out_features = count
            else:
                module.in_features = count
        elif isinstance(module, nn.PReLU):
            module.num_parameters = count
        else:
            module.num_features = count  # type: ignore[assignment]


def _zero_inputs(module: nn.Module, places: list[int]) -> None:
    """Let a layer read zeros at some positions of its input."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight[:, places] = 0
