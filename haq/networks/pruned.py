"""Networks of fewer channels in files: which channels are kept, and the float network brought to the sizes of the tensors.

A file tells the channels that are kept of every group in its header, under "channels": {group: [numbers]}, and under
"channel_sizes" how many channels every group has, and in runs of how many they are kept: {group: [channels, unit]}. What the
layers look like then follows from the shapes of the tensors alone, so that nothing is traced to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import quantizers as Q
from haq.store.files import quoted
from quantizers.kept import channel_sizes, record_kept
from quantizers.pruning.channels import IN, OUT
from quantizers.pruning.layers import FOLLOWED, has_one_input_per_group, is_depthwise, set_size

MOST_GROUPS = 10_000
MOST_CHANNELS = 2**20  # of a network
CHANNELS, SIZES = "channels", "channel_sizes"  # keys of the header

Shape = tuple[int, ...]


class Kept(NamedTuple):
    """What of a network's channels is kept.

    Attributes:
        channels: Their numbers by group, in rising order; groups that keep all aren't named.
        sizes: How many channels every group has, and in runs of how many they are kept.
    """

    channels: dict[str, tuple[int, ...]]
    sizes: dict[str, tuple[int, int]]


def channels_notes(network: nn.Module) -> dict[str, str]:
    """Return what a header says of the channels that a network keeps; nothing of one that keeps all."""
    kept = Q.kept_channels(network)
    if not kept:
        return {}
    channels = {name: list(numbers) for name, numbers in kept.items()}
    return {CHANNELS: json.dumps(channels), SIZES: json.dumps(channel_sizes(network))}


def read_channels(notes: Mapping[str, str]) -> Kept:
    """Read what a header says of the channels that are kept.

    Args:
        notes: The header, from anywhere; how long its notes are is bounded by whoever reads the file.

    Returns:
        What is kept.

    Raises:
        ValueError: In a sentence, for anything else.
    """
    channels, sizes = _mapping(notes[CHANNELS]), _mapping(notes.get(SIZES, "null"))
    for name, size in sizes.items():
        are_numbers = isinstance(size, list) and [type(one) for one in size] == [int, int]
        if not are_numbers or not 0 < size[1] <= size[0] <= MOST_CHANNELS or size[0] % size[1]:
            raise ValueError(
                f"its group {quoted(name)} of channels is {quoted(size)}; it must be how many there are, and in runs of how "
                "many they are kept"
            )
    kept = {}
    for name, numbers in channels.items():
        if name not in sizes:
            raise ValueError(f"its channels are of group {quoted(name)}, of which it doesn't say how many there are")
        kept[name] = _numbers(name, numbers, *sizes[name])
    return Kept(kept, {name: (size[0], size[1]) for name, size in sizes.items()})


def _mapping(text: str) -> dict[str, Any]:
    """Read what a note says by group of channels. ValueError for anything but a mapping, and for a large one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its channels are no JSON") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"its channels are {quoted(content)}, where lists of numbers by group are wanted")
    if len(content) > MOST_GROUPS or sum(len(one) for one in content.values() if isinstance(one, list)) > MOST_CHANNELS:
        raise ValueError(f"its channels are of more than {MOST_GROUPS:,} groups, or more than {MOST_CHANNELS:,}")
    return content


def _numbers(name: str, numbers: Any, channels: int, unit: int) -> tuple[int, ...]:
    """Return the numbers of the channels that a group keeps. Raises ValueError for what can't be such numbers.

    Args:
        name: The group.
        numbers: From anywhere.
        channels: How many channels there are.
        unit: In runs of how many they are kept.
    """
    refused = f"its channels of group {quoted(name)}"
    wanted = f"whole numbers from 0 to {channels - 1}, each larger than the one before"
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"{refused} are {quoted(numbers)}; they must be {wanted}")
    before = -1
    for number in numbers:
        if type(number) is not int or not before < number < channels:
            raise ValueError(f"{refused} have {quoted(number)}; they must be {wanted}")
        before = number
    if len({number // unit for number in numbers}) * unit != len(numbers):
        raise ValueError(f"{refused} aren't whole runs of {unit}, in which they are kept")
    return tuple(numbers)


def shrunk(module: nn.Module, shapes: Mapping[str, Shape], kept: Kept) -> nn.Module:
    """Make a copy of a float network with the sizes that its tensors have in a file, which knows the channels that it keeps.

    Its tensors have any values: whoever calls fills them.

    Args:
        module: The float network, which stays as it is. One that keeps these channels already is returned itself.
        shapes: Those of the file's float tensors, by name.
        kept: The channels that are kept.

    Returns:
        The smaller network.

    Raises:
        ValueError: In a sentence, for shapes that no network with fewer channels has.
    """
    if Q.kept_channels(module) == kept.channels:
        return module
    if Q.kept_channels(module):
        raise ValueError("the network that is given lost other channels: give the network that it was pruned from")
    made = Q.copy_network(module)
    for name, part in made.named_modules():
        prefix = ""
        if name:
            prefix = f"{name}."
        if _resize(part, prefix, shapes) and isinstance(part, FOLLOWED):
            _set_sizes(part)
    record_kept(module, made, kept.sizes, kept.channels)
    return made


@torch.no_grad()
def _resize(part: nn.Module, prefix: str, shapes: Mapping[str, Shape]) -> bool:
    """Bring a module's own tensors to the shapes that they have in a file; returns whether one had another."""
    tensors: dict[str, Tensor] = {}
    tensors.update(part.named_parameters(recurse=False))
    tensors.update(part.named_buffers(recurse=False))
    changed = False
    for name, tensor in tensors.items():
        whole = tuple(tensor.shape)
        shape = tuple(shapes.get(prefix + name, whole))
        if shape == whole:
            continue
        if len(shape) != len(whole) or any(not 0 < size <= most for size, most in zip(shape, whole, strict=True)):
            raise ValueError(
                f"it has {quoted(prefix + name)} of shape {shape}, which {whole} can't become by leaving channels out"
            )
        smaller = tensor.new_zeros(shape)
        if isinstance(tensor, nn.Parameter):
            setattr(part, name, nn.Parameter(smaller, tensor.requires_grad))
        else:
            setattr(part, name, smaller)
        changed = True
    return changed


def _set_sizes(part: Any) -> None:
    """Write down how many channels a module has, by the shapes of its tensors."""
    tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
    first = next(tensor.shape for tensor in tensors if tensor.dim())
    if isinstance(part, _ConvTransposeNd):
        counts = {IN: first[0], OUT: first[1] * part.groups}
    elif isinstance(part, _ConvNd):
        counts = {OUT: first[0], IN: first[1] * part.groups}
        if is_depthwise(part):
            counts = {OUT: first[0]}
        elif has_one_input_per_group(part):
            counts = {IN: first[0] * part.in_channels // part.out_channels, OUT: first[0]}
    elif isinstance(part, nn.Linear):
        counts = {OUT: first[0], IN: first[1]}
    elif isinstance(part, nn.Embedding):
        counts = {OUT: first[1]}
    else:
        counts = {OUT: first[0]}
    for dim, count in counts.items():
        set_size(part, dim, count)
