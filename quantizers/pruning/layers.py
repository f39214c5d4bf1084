"""The modules whose channels are followed, and how many they have."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from quantizers.pruning.channels import IN, OUT

MAKERS = (_ConvNd, nn.Linear, nn.Embedding)  # of new channels
FOLLOWED = (*MAKERS, nn.PReLU, _BatchNorm, _InstanceNorm, nn.GroupNorm)


def is_depthwise(module: nn.Module) -> bool:
    """Say whether a module is a convolution that makes each channel of the same channel of its input."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def size_of(module: nn.Module, dim: str) -> int:
    """Return how many channels a module has in a dimension.

    Args:
        module: One of those that are followed.
        dim: "out" or "in".

    Returns:
        The count.

    Raises:
        TypeError: For a module that isn't followed.
    """
    if isinstance(module, _ConvNd):
        return {OUT: module.out_channels, IN: module.in_channels}[dim]
    if isinstance(module, nn.Linear):
        return {OUT: module.out_features, IN: module.in_features}[dim]
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    heads = heads_of(module)
    if heads is None:
        raise TypeError(f"the channels of a {type(module).__name__} aren't known")
    return heads.channels


def has_one_input_per_group(module: _ConvNd) -> bool:
    """Say whether each group of a convolution reads one channel, of which it makes one or several."""
    return 1 < module.groups == module.in_channels


class Heads(NamedTuple):
    """The heads of an attention: how many channels they have together, and each of them."""

    channels: int
    width: int


def heads_of(module: nn.Module) -> Heads | None:
    """Return the heads of an attention whose number may be another one.

    That is one whose `forward` goes by its attributes num_heads, head_dim and attn_dim, as timm's does; the heads of
    torch's MultiheadAttention have as many channels together as its inputs, always.

    Args:
        module: Any.

    Returns:
        The heads; None for what is no such attention.
    """
    sizes = [getattr(module, name, None) for name in ("num_heads", "head_dim", "attn_dim")]
    qkv, proj = (getattr(module, name, None) for name in ("qkv", "proj"))
    if not all(type(size) is int for size in sizes) or not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        return None
    count, width, channels = sizes
    if count * width != channels or qkv.out_features != 3 * channels or proj.in_features != channels:  # type: ignore[operator]
        return None
    return Heads(channels, width)  # type: ignore[arg-type]


def set_size(module: nn.Module, dim: str, count: int) -> None:
    """Write down how many channels a module has now.

    Args:
        module: One of those that are followed; its weights have as many already.
        dim: "out" or "in".
        count: How many.
    """
    held: Any = module  # whose attributes type checkers take for tensors or modules
    if not isinstance(module, FOLLOWED):
        held.num_heads = count // held.head_dim
        held.attn_dim = count
    elif is_depthwise(module):
        held.in_channels = held.out_channels = held.groups = count
    elif isinstance(module, _ConvNd):
        if dim == OUT:
            held.out_channels = count
            return
        if has_one_input_per_group(module):
            held.groups = count
        held.in_channels = count
    elif isinstance(module, nn.Linear):
        held.in_features, held.out_features = {IN: (count, held.out_features), OUT: (held.in_features, count)}[dim]
    elif isinstance(module, nn.GroupNorm):
        held.num_groups = count // (held.num_channels // held.num_groups)
        held.num_channels = count
    elif isinstance(module, nn.PReLU):
        held.num_parameters = count
    elif isinstance(module, nn.Embedding):
        held.embedding_dim = count
    else:
        held.num_features = count
