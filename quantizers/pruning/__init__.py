"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.kept import (
    kept_channels,
)
from quantizers.pruning.blocks import ResidualBlock, remove_blocks, removed_blocks, residual_blocks
from quantizers.pruning.channels import (
    ChannelGroup,
    ChannelGroups,
    Member,
)
from quantizers.pruning.criteria import (
    L1,
    L2,
    BatchNormScale,
    CollaborativeChannels,
    GeometricMedian,
    KernelSparsityEntropy,
    Random,
    Taylor,
)
from quantizers.pruning.criterion import (
    Criterion,
    Ranking,
    ScoreRanking,
    criterion_names,
    criterion_rows,
    select,
)
from quantizers.pruning.filter_overlap import (
    filter_overlaps,
    orthogonal_filters,
    overlapping_filters,
)
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
from quantizers.pruning.gal import (
    Discriminator,
    Fista,
    SoftMasks,
    discriminator_loss,
    generator_loss,
    soft_threshold,
)
from quantizers.pruning.groups import (
    apply_kept,
    channel_groups,
)
from quantizers.pruning.kernel_clusters import (
    share_kernels,
)
from quantizers.pruning.lottery_ticket import (
    magnitude_masks,
    mask_density,
    maskable_weights,
    shuffled_masks,
)
from quantizers.pruning.removal import (
    mask_channels,
    remove_channels,
)
from quantizers.pruning.shrinking import (
    prune,
)

__all__ = [
    "BatchNormScale",
    "ChannelGroup",
    "ChannelGroups",
    "CollaborativeChannels",
    "Criterion",
    "Discriminator",
    "Fista",
    "GeometricMedian",
    "GroupedConv2d",
    "Grouping",
    "KernelSparsityEntropy",
    "L1",
    "L2",
    "LearnedGroupConv2d",
    "MainSubsidiary",
    "Member",
    "Random",
    "Ranking",
    "ScoreRanking",
    "ResidualBlock",
    "SoftMasks",
    "Taylor",
    "WithConstants",
    "apply_kept",
    "channel_groups",
    "criterion_names",
    "criterion_rows",
    "discriminator_loss",
    "filter_overlaps",
    "generator_loss",
    "group_convolutions",
    "kept_channels",
    "kept_share",
    "layerwise_pruning",
    "learn_groups",
    "learned_groups",
    "magnitude_masks",
    "make_dense",
    "mask_channels",
    "mask_density",
    "maskable_weights",
    "masked_layers",
    "orthogonal_filters",
    "overlapping_filters",
    "prune",
    "remove_blocks",
    "remove_channels",
    "remove_filters",
    "removed_blocks",
    "residual_blocks",
    "select",
    "share_kernels",
    "shuffled_masks",
    "soft_threshold",
]
