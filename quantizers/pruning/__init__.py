"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.pruning.filters import (
    MainSubsidiary,
    WithConstants,
    kept_share,
    layerwise_pruning,
    masked_layers,
    remove_filters,
)
from quantizers.pruning.groups import ChannelGroup, ChannelGroups, Member, channel_groups
from quantizers.pruning.removal import kept_channels, mask_channels, remove_channels

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "MainSubsidiary",
    "Member",
    "WithConstants",
    "channel_groups",
    "kept_channels",
    "kept_share",
    "layerwise_pruning",
    "mask_channels",
    "masked_layers",
    "remove_channels",
    "remove_filters",
]
