"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.pruning.criteria import L1, L2, BatchNormScale, GeometricMedian, KernelSparsityEntropy, Random, Taylor
from quantizers.pruning.criterion import Criterion, Ranking, ScoreRanking, criterion_names, criterion_rows, select
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
    "L1",
    "L2",
    "BatchNormScale",
    "ChannelGroup",
    "ChannelGroups",
    "Criterion",
    "GeometricMedian",
    "KernelSparsityEntropy",
    "MainSubsidiary",
    "Member",
    "Random",
    "Ranking",
    "ScoreRanking",
    "Taylor",
    "WithConstants",
    "channel_groups",
    "criterion_names",
    "criterion_rows",
    "kept_channels",
    "kept_share",
    "layerwise_pruning",
    "mask_channels",
    "masked_layers",
    "remove_channels",
    "remove_filters",
    "select",
]
