"""What a network knows of the channels that were removed from it, and whether a policy says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

RECORD = "_kept_channels"  # the attribute of a network that says what was removed from it


def kept_channels(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return which channels of each group are kept in a network from which channels were removed.

    Args:
        network: Any; a copy of a network from which channels were removed knows them too.

    Returns:
        The numbers that the channels had in the network that nothing was removed from, by group; empty if
        nothing was removed. Groups that keep all of their channels aren't named.
    """
    return dict(_record(network)["kept"])


def channel_sizes(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Return how many channels each group of a network had before channels were removed from it, and their unit.

    Args:
        network: Any, as for `kept_channels`.

    Returns:
        Channels and unit, by group; empty if nothing was removed.
    """
    return dict(_record(network)["sizes"])


def record_kept(network: nn.Module, made: nn.Module, sizes: Mapping[str, tuple[int, int]], kept: Mapping[str, Any]) -> None:
    """Let a smaller network know which channels it has.

    Args:
        network: What channels were removed from now, perhaps not for the first time.
        made: The smaller one.
        sizes: Channels and unit of every group of the network.
        kept: The numbers of channels in the network, by group.
    """
    record = _record(network)
    known = {**sizes, **record["sizes"]}
    all_kept = dict(record["kept"])
    for name, channels in kept.items():
        if len(channels) == sizes[name][0]:
            continue
        if name in all_kept:
            channels = tuple(all_kept[name][channel] for channel in channels)
        all_kept[name] = channels
    setattr(made, RECORD, {"sizes": known, "kept": all_kept})


def check_pruned_to(network: nn.Module, keep: Mapping[str, float]) -> None:
    """Refuse a policy's shares of channels that aren't those of a network.

    Args:
        network: The network.
        keep: The shares, by group. None at all: the policy says nothing of channels, and fits any network.

    Raises:
        ValueError: Naming the first group of which the network keeps other than the policy says.
    """
    if not keep:
        return
    record = _record(network)
    for name in (*keep, *record["kept"]):
        if name not in record["sizes"]:
            raise ValueError(
                f"the policy keeps {keep[name]:.3g} of the channels of {name!r}, but the network was not pruned to that: "
                "remove the channels first (`remove_channels`)"
            )
        channels, unit = record["sizes"][name]
        wanted = count_at(channels, unit, keep.get(name, 1.0))
        has = len(record["kept"].get(name, range(channels)))
        if wanted != has:
            raise ValueError(
                f"the policy keeps {wanted} of the {channels} channels of {name!r}, but the network was pruned to {has}"
            )


def count_at(channels: int, unit: int, share: float) -> int:
    """Return how many channels are kept at a share.

    Args:
        channels: How many there are.
        unit: Channels are kept in runs of so many.
        share: Beyond 0, at most 1.

    Returns:
        The nearest multiple of the unit, half a unit rounded up; at least one unit, at most all channels.
    """
    units = channels // unit
    return min(max(math.floor(share * units + 0.5), 1), units) * unit


def _record(network: nn.Module) -> dict[str, Any]:
    return getattr(network, RECORD, {"sizes": {}, "kept": {}})
