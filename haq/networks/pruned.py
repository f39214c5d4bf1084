"""Networks of fewer channels in files: which channels are kept, and the float network brought to the sizes of the tensors.

A file tells the channels that are kept of every group in its header, under "channels": {group: [numbers]}. What the layers
look like then follows from the shapes of the tensors alone, so that nothing is traced to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import quantizers as Q
from haq.store.files import kind_of, quoted
from quantizers.pruning.removal import RECORD

MOST_GROUPS = 10_000
MOST_CHANNELS = 2**20  # of a network, that are named
CHANNELS = "channels"  # the key of the header
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Shape = tuple[int, ...]
Kept = dict[str, tuple[int, ...]]


def channels_note(network: nn.Module) -> dict[str, str]:
    """Return what a header says of the channels that a network keeps; nothing of one that keeps all."""
    kept = Q.kept_channels(network)
    if not kept:
        return {}
    return {CHANNELS: json.dumps({name: list(channels) for name, channels in kept.items()})}


def read_channels(text: str) -> Kept:
    """Read what a header says of the channels that are kept.

    Args:
        text: The note, from anywhere; its length is bounded by whoever reads the file.

    Returns:
        The numbers of the channels by group, in rising order.

    Raises:
        ValueError: In a sentence, for anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its channels are no JSON") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"its channels are {kind_of(content)}, where lists of numbers by group are wanted")
    if len(content) > MOST_GROUPS or sum(len(one) for one in content.values() if isinstance(one, list)) > MOST_CHANNELS:
        raise ValueError(f"its channels are of more than {MOST_GROUPS:,} groups, or more than {MOST_CHANNELS:,}")
    return {name: _numbers(name, channels) for name, channels in content.items()}


def _numbers(name: str, channels: Any) -> tuple[int, ...]:
    wanted = "a list of whole numbers from 0, each larger than the one before"
    if not isinstance(channels, list) or not channels:
        raise ValueError(f"its channels of group {quoted(name)} are {quoted(channels)}; they must be {wanted}")
    before = -1
    for number in channels:
        if type(number) is not int or not before < number < MOST_CHANNELS:
            raise ValueError(f"its channels of group {quoted(name)} have {quoted(number)}; they must be {wanted}")
        before = number
    return tuple(channels)


def shrunk(module: nn.Module, shapes: Mapping[str, Shape], kept: Kept) -> nn.Module:
    """Make a copy of a float network with the sizes that its layers have in a file, and the channels that it keeps noted.

    Its weights are those of the file's shapes, of any values: whoever calls fills them.

    Args:
        module: The float network, which stays as it is. One that keeps these channels already is returned itself.
        shapes: Those of the file's float tensors, by name.
        kept: The channels that are kept, by group.

    Returns:
        The smaller network.

    Raises:
        ValueError: In a sentence, where the shapes or the channels can't be those of such a network with fewer channels.
    """
    if Q.kept_channels(module) == kept:
        return module
    if Q.kept_channels(module):
        raise ValueError("the network that is given lost other channels: give the network that it was pruned from")
    made = Q.copy_network(module)
    with torch.no_grad():
        for name, part in made.named_modules():
            prefix = ""
            if name:
                prefix = f"{name}."
            _resize(part, prefix, shapes)
    for name, channels in kept.items():
        _check_group(module, name, channels)
    setattr(made, RECORD, dict(kept))
    return made


class _Size(NamedTuple):
    """A module's sizes: of what it writes and of what it reads."""

    outputs: int
    inputs: int


def _resize(part: nn.Module, prefix: str, shapes: Mapping[str, Shape]) -> None:
    """Bring a module to the shapes that its own tensors have in a file."""
    tensors = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
    differing = [name for name, tensor in tensors.items() if shapes.get(prefix + name, tensor.shape) != tuple(tensor.shape)]
    if not differing:
        return
    name = differing[0]
    shape = shapes[prefix + name]
    refused = (
        f"{quoted(prefix + name)} of shape {tuple(shape)}, which {tuple(tensors[name].shape)} can't become by leaving "
        "channels out"
    )
    size = _size_of(part, shape, shapes.get(f"{prefix}weight"))
    if size is None:
        raise ValueError(f"it has {refused}")
    for name, tensor in tensors.items():
        expected = _expected(name, tuple(tensor.shape), part, size)
        if shapes.get(prefix + name, tuple(tensor.shape)) != expected:
            raise ValueError(f"it has {refused}")
        if expected == tuple(tensor.shape):
            continue
        smaller = tensor.new_zeros(expected)
        if isinstance(tensor, nn.Parameter):
            part.register_parameter(name, nn.Parameter(smaller, tensor.requires_grad))
        else:
            part.register_buffer(name, smaller, name not in part._non_persistent_buffers_set)
    _set_sizes(part, size)


def _size_of(part: nn.Module, differing: Shape, shape: Shape | None) -> _Size | None:
    """Return the sizes that a module has in a file.

    Args:
        part: The module.
        differing: The shape there of one of its tensors that has another here.
        shape: The shape there of its weight, if it has one.

    Returns:
        The sizes; None if it can't get there by leaving channels out.
    """
    if isinstance(part, _BatchNorm | _InstanceNorm | nn.PReLU):
        return _of_channels(part, differing)
    if shape is None or not isinstance(part, (*CONVOLUTIONS, nn.Linear)):
        return None
    whole = tuple(part.weight.shape)
    fits = len(shape) == len(whole) and tuple(shape[2:]) == whole[2:]
    if not fits or not 0 < shape[0] <= whole[0] or not 0 < shape[1] <= whole[1]:
        return None
    if isinstance(part, nn.Linear):
        return _Size(shape[0], shape[1])
    if _is_depthwise(part):
        return _Size(shape[0], shape[0])
    if shape[0] % part.groups:
        return None
    return _Size(shape[0], shape[1] * part.groups)


def _of_channels(part: Any, shape: Shape) -> _Size | None:
    """Return the sizes of a norm, or of an activation with a weight for each channel."""
    if isinstance(part, nn.PReLU):
        whole = part.num_parameters
    else:
        whole = part.num_features
    if len(shape) != 1 or not 0 < shape[0] <= whole:
        return None
    return _Size(shape[0], shape[0])


def _is_depthwise(part: Any) -> bool:
    """Say whether a convolution makes each channel of the same channel of its input."""
    return bool(part.groups == part.in_channels == part.out_channels > 1)


def _expected(name: str, whole: Shape, part: nn.Module, size: _Size) -> Shape:
    """Return the shape that a tensor of a module has at its sizes."""
    if not whole:
        return whole  # a counter
    if name != "weight" or len(whole) == 1:
        return (size.outputs,)
    inputs = whole[1]
    if not isinstance(part, CONVOLUTIONS):
        inputs = size.inputs
    elif not _is_depthwise(part):
        inputs = size.inputs // part.groups
    return (size.outputs, inputs, *whole[2:])


def _set_sizes(part: Any, size: _Size) -> None:
    if isinstance(part, nn.PReLU):
        part.num_parameters = size.outputs
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = size.outputs, size.inputs
    elif isinstance(part, CONVOLUTIONS):
        if _is_depthwise(part):
            part.groups = size.outputs
        part.out_channels, part.in_channels = size.outputs, size.inputs
    else:
        part.num_features = size.outputs


def _check_group(module: nn.Module, name: str, channels: Sequence[int]) -> None:
    """Raise ValueError for channels that a group of a network can't have, which is named after the layer that writes them."""
    layer = name.partition("#")[0]
    modules = dict(module.named_modules())
    if layer not in modules:
        raise ValueError(f"its channels are of {quoted(name)}, and there is no such layer")
    weight = getattr(modules[layer], "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.dim() or channels[-1] >= weight.shape[0]:
        raise ValueError(f"its channels of group {quoted(name)} go up to {channels[-1]}, which that layer doesn't have")
