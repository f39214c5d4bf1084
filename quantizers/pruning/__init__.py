"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.pruning.filters import (
    MainSubsidiary,
    WithConstants,
    kept_share,
    layerwise_pruning,
    masked_layers,
    remove_filters,
)
from quantizers.pruning.flgc import (
    GroupedConv2d,
    Grouping,
    LearnedGroupConv2d,
    group_convolutions,
    learn_groups,
    learned_groups,
    make_dense,
)
from quantizers.pruning.gal import Discriminator, Fista, SoftMasks, discriminator_loss, generator_loss, soft_threshold
from quantizers.pruning.groups import ChannelGroup, ChannelGroups, Member, channel_groups
from quantizers.pruning.removal import kept_channels, mask_channels, remove_channels

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "Discriminator",
    "Fista",
    "GroupedConv2d",
    "Grouping",
    "LearnedGroupConv2d",
    "MainSubsidiary",
    "Member",
    "SoftMasks",
    "WithConstants",
    "channel_groups",
    "discriminator_loss",
    "generator_loss",
    "group_convolutions",
    "kept_channels",
    "kept_share",
    "layerwise_pruning",
    "learn_groups",
    "learned_groups",
    "make_dense",
    "mask_channels",
    "masked_layers",
    "remove_channels",
    "remove_filters",
    "soft_threshold",
]
