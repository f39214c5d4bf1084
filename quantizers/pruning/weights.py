"""The weights of a channel: its filters in the layers that write it, its kernels in the layers that read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quantizers.pruning.channels import IN, OUT, ChannelGroup
from quantizers.pruning.layers import is_depthwise


def writing_layers(network: nn.Module, group: ChannelGroup) -> list[str]:
    """Return the names of all layers that write the channels of a group.

    These are its `writers`, and layers that aren't quantized: transposed convolutions, embeddings.
    """
    modules = dict(network.named_modules())
    kinds = _ConvNd | nn.Linear | nn.Embedding
    return [member.module for member in group.members if member.dim == OUT and isinstance(modules.get(member.module), kinds)]


def reading_layers(network: nn.Module, group: ChannelGroup) -> list[str]:
    """Return the names of all layers that read the channels of a group: its `readers`, and transposed convolutions."""
    modules = dict(network.named_modules())
    found = []
    for member in group.members:
        module = modules.get(member.module)
        if isinstance(module, _ConvNd | nn.Linear) and (member.dim == IN or is_depthwise(module)):
            found.append(member.module)
    return found


def output_filters(layer: nn.Module) -> Tensor:
    """Return the filter of every output channel of a convolution, linear or embedding layer, shape (outputs, values).

    Raises:
        ValueError: For a layer of another kind.
    """
    if isinstance(layer, nn.Embedding):
        return layer.weight.detach().double().cpu().T
    weight = _weight_of(layer)
    if isinstance(layer, _ConvTransposeNd):
        # (inputs, outputs / groups, ...): the inputs of a group are together.
        parts = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        weight = parts.flatten(0, 1)
    return weight.flatten(1)


def input_kernels(layer: nn.Module) -> Tensor:
    """Return the kernels that read every input channel of a convolution or linear layer, shape (inputs, kernels, values).

    Of a grouped convolution an input channel is read by the filters of its own group alone.

    Raises:
        ValueError: For a layer of another kind.
    """
    weight = _weight_of(layer)
    if isinstance(layer, _ConvTransposeNd):
        return weight.flatten(2)
    groups = 1
    if isinstance(layer, _ConvNd):
        groups = layer.groups
    else:
        weight = weight[:, :, None]
    parts = weight.flatten(2).unflatten(0, (groups, -1)).transpose(1, 2)
    return parts.flatten(0, 1)


def writer_filters(network: nn.Module, group: ChannelGroup, writer: str) -> Tensor:
    """Return what writes each channel of a group in one layer.

    Args:
        network: The network.
        group: Its group of channels.
        writer: The name of a layer that writes them.

    Returns:
        Filters of shape (channels, values), float64 on the CPU; those of all places of a channel one after the other.
    """
    return gathered(output_filters(network.get_submodule(writer)), group, writer, OUT)


def reader_kernels(network: nn.Module, group: ChannelGroup, reader: str) -> Tensor:
    """Return what reads each channel of a group in one layer.

    Args:
        network: The network.
        group: Its group of channels.
        reader: The name of a layer that reads them.

    Returns:
        Kernels of shape (channels, outputs, values), float64 on the CPU. Of a linear layer behind a flatten, the weights of
        all places of a channel are one kernel: it is a convolution as large as its map.
    """
    layer = network.get_submodule(reader)
    dim = IN
    if is_depthwise(layer):  # its channels have one name for both sides
        dim = OUT
    kernels = input_kernels(layer).transpose(1, 2)  # places and values become neighbours
    outputs = kernels.shape[-1]
    return gathered(kernels.flatten(1), group, reader, dim).unflatten(1, (-1, outputs)).transpose(1, 2)


def gathered(rows: Tensor, group: ChannelGroup, module: str, dim: str) -> Tensor:
    """Put together the rows that belong to each channel of a group.

    Args:
        rows: A row for every position of a dimension of a module, shape (positions, values).
        group: The group.
        module: The module's name.
        dim: Which dimension of the module the rows are of, "in" or "out".

    Returns:
        Shape (channels, places * values).

    Raises:
        ValueError: Naming the module, if it is no part of the group.
    """
    members = [member for member in group.members if (member.module, member.dim) == (module, dim)]
    if not members:
        raise ValueError(f"layer {module!r} is no part of group {group.name!r}")
    return torch.cat([rows[torch.from_numpy(member.positions)].flatten(1) for member in members], 1)


def _weight_of(layer: nn.Module) -> Tensor:
    if not isinstance(layer, _ConvNd | nn.Linear):
        raise ValueError(f"{type(layer).__name__} is neither a convolution nor a linear layer: it has no filters")
    weight: Tensor = layer.weight
    return weight.detach().double().cpu()
