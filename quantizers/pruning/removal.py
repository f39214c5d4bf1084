"""Smaller networks: channels removed by plain selection of weights, without a new trace."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quantizers.copying import copy_network
from quantizers.kept import record_kept
from quantizers.pruning.channels import IN, ChannelGroup, ChannelGroups
from quantizers.pruning.layers import has_one_input_per_group, set_size, size_of

MOST_SHOWN = 10**9  # of a wrong number, in messages
Kept = Mapping[str, Sequence[int]]


def remove_channels(network: nn.Module, groups: ChannelGroups, kept: Kept) -> nn.Module:
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
        ValueError: For a group that isn't there or is fixed, for channels that can't be kept, and for
            groups that are another network's.
    """
    chosen = check_kept(groups, kept)
    selections = _selections(network, groups, chosen)
    replacing: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for selection in selections:
            replacing.update(_smaller_tensors(selection))
        made = copy_network(network, replacing)
    for selection in selections:
        if selection.module is not None:
            module = made.get_submodule(selection.name)
            for dim, is_kept in selection.is_kept.items():
                set_size(module, dim, int(is_kept.sum()))
    sizes = {group.name: (group.channels, group.unit) for group in groups.groups}
    record_kept(network, made, sizes, chosen)
    return made


def mask_channels(network: nn.Module, groups: ChannelGroups, kept: Kept) -> nn.Module:
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
        for selection in _selections(made, groups, chosen):
            if IN in selection.is_kept:
                _zero_inputs(selection)
    return made


def check_kept(groups: ChannelGroups, kept: Kept) -> dict[str, tuple[int, ...]]:
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
    if not isinstance(kept, Mapping):
        raise ValueError(f"kept channels must be lists of integers by name of a group, not {type(kept).__name__}")
    return {name: _checked(_known(groups, name), channels) for name, channels in kept.items()}


def _known(groups: ChannelGroups, name: Any) -> ChannelGroup:
    if isinstance(name, str) and name in groups:
        return groups[name]
    if isinstance(name, str) and name in groups.fixed:
        raise ValueError(f"no channels of {name!r} can be removed: {groups.fixed[name]}")
    raise ValueError(f"there is no group of channels {str(name)[:80]!r}; there are {_listed(groups)}")


def _listed(groups: ChannelGroups) -> str:
    names = list(groups)
    if len(names) > 6:
        return f"{', '.join(names[:6])} and {len(names) - 6} more"
    return ", ".join(names) or "none"


def _checked(group: ChannelGroup, channels: Any) -> tuple[int, ...]:
    if isinstance(channels, str | bytes | Mapping) or not hasattr(channels, "__len__"):
        raise ValueError(f"the kept channels of {group.name!r} must be a list of integers, not {type(channels).__name__}")
    if len(channels) > group.channels:
        raise ValueError(f"group {group.name!r} can't keep {len(channels)} channels: it has {group.channels}")
    numbers = tuple(_number(group, channel) for channel in channels)
    if not numbers:
        raise ValueError(f"group {group.name!r} must keep at least one of its channels")
    if any(one >= other for one, other in itertools.pairwise(numbers)):
        raise ValueError(f"the kept channels of {group.name!r} must be in rising order, each once")
    if group.unit > 1:
        units = {number // group.unit for number in numbers}
        if len(units) * group.unit != len(numbers):
            raise ValueError(
                f"channels of {group.name!r} are kept in runs of {group.unit} (0 to {group.unit - 1}, and so on), "
                f"and a part of a run is not kept"
            )
    return numbers


def _number(group: ChannelGroup, channel: Any) -> int:
    try:
        number = operator.index(channel)
    except TypeError:
        number = -1
    if isinstance(channel, bool) or not 0 <= number < group.channels:
        shown = f"of type {type(channel).__name__}"
        if isinstance(channel, int | float) and abs(channel) < MOST_SHOWN:
            shown = repr(channel)
        raise ValueError(f"group {group.name!r} has no channel {shown}: they are 0 to {group.channels - 1}")
    return number


class _Selection(NamedTuple):
    """What is kept of a module, or of a tensor that is no layer's.

    Attributes:
        name: Its name.
        module: The module; None for a tensor.
        tensors: Its parameters and buffers by name; the one tensor.
        is_kept: Whether each position is kept, by dimension.
        axes: The axis of the weight, by dimension.
    """

    name: str
    module: nn.Module | None
    tensors: Mapping[str, Tensor]
    is_kept: dict[str, np.ndarray]
    axes: dict[str, int]


def _selections(network: nn.Module, groups: ChannelGroups, chosen: Mapping[str, tuple[int, ...]]) -> list[_Selection]:
    """Return what is kept of everything of which something is removed."""
    found: dict[str, _Selection] = {}
    for name, channels in chosen.items():
        group = groups[name]
        gone = np.setdiff1d(np.arange(group.channels), channels)
        if not len(gone):
            continue
        for member in group.members:
            if member.module not in found:
                found[member.module] = _selection(network, member.module)
            selection = found[member.module]
            if member.dim not in selection.is_kept:
                selection.axes[member.dim] = member.axis
                selection.is_kept[member.dim] = np.ones(_size(selection, member.dim), bool)
            positions = member.positions[gone]
            if positions.max() >= len(selection.is_kept[member.dim]):
                raise ValueError(f"the groups of channels are another network's: {member.module!r} has fewer channels here")
            selection.is_kept[member.dim][positions] = False
    return list(found.values())


def _selection(network: nn.Module, name: str) -> _Selection:
    owner_name, _, tensor_name = name.rpartition(".")
    try:
        owner = network.get_submodule(owner_name)
        held = getattr(owner, tensor_name)
    except AttributeError:
        raise ValueError(f"the groups of channels are another network's: this one has no {name!r}") from None
    if isinstance(held, nn.Module):
        tensors = {**held._parameters, **held._buffers}
        return _Selection(name, held, {key: tensor for key, tensor in tensors.items() if tensor is not None}, {}, {})
    return _Selection(name, None, {tensor_name: held}, {}, {})


def _size(selection: _Selection, dim: str) -> int:
    """Return how many positions there are."""
    if selection.module is not None:
        return size_of(selection.module, dim)
    (tensor,) = selection.tensors.values()
    return tensor.shape[selection.axes[dim]]


def _smaller_tensors(selection: _Selection) -> dict[int, Tensor]:
    """Return the smaller tensors of a module, by the `id` of those that it has."""
    made: dict[int, Tensor] = {}
    for name, tensor in selection.tensors.items():
        smaller = tensor.detach()
        for dim in selection.is_kept:
            axis, is_kept = _along(selection, dim, name, tensor)
            if is_kept is not None:
                places = torch.from_numpy(is_kept.nonzero()[0]).to(tensor.device)
                smaller = smaller.index_select(axis, places)
        if smaller.shape == tensor.shape:
            continue
        if isinstance(tensor, nn.Parameter):
            made[id(tensor)] = nn.Parameter(smaller, tensor.requires_grad)
        else:
            made[id(tensor)] = smaller
    return made


def _along(selection: _Selection, dim: str, name: str, tensor: Tensor) -> tuple[int, np.ndarray | None]:
    """Return along which axis of a tensor positions are kept, and which; None if all are."""
    module, is_kept = selection.module, selection.is_kept[dim]
    if tensor.dim() == 0:
        return 0, None
    if module is None or name == "weight":
        if isinstance(module, _ConvNd) and dim == IN and module.groups > 1:
            if has_one_input_per_group(module):
                return 0, None
            return 1, is_kept[: module.in_channels // module.groups]
        return selection.axes[dim], is_kept
    if dim == IN:
        return 0, None
    return 0, is_kept


def _zero_inputs(selection: _Selection) -> None:
    """Let a layer read zeros in place of what is removed."""
    module, weight = selection.module, selection.tensors["weight"]
    places = (~selection.is_kept[IN]).nonzero()[0]
    if not isinstance(module, _ConvNd) or module.groups == 1:
        weight.index_fill_(selection.axes[IN], torch.from_numpy(places).to(weight.device), 0)
        return
    in_group, out_group = module.in_channels // module.groups, module.out_channels // module.groups
    for place in places:
        first = place // in_group * out_group
        weight[first : first + out_group, place % in_group] = 0
