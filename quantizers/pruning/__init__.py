"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.kept import (
    kept_channels,
)
from quantizers.pruning.channels import (
    ChannelGroup,
    ChannelGroups,
    Member,
)
from quantizers.pruning.criteria import (
    L1,
    L2,
    BatchNormScale,
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
from quantizers.pruning.filters import (
    MainSubsidiary,
    WithConstants,
    kept_share,
    layerwise_pruning,
    masked_layers,
    remove_filters,
)
from quantizers.pruning.groups import (
    apply_kept,
    channel_groups,
)
from quantizers.pruning.removal import (
    mask_channels,
    remove_channels,
)

__all__ = [
    "BatchNormScale",
    "ChannelGroup",
    "ChannelGroups",
    "Criterion",
    "GeometricMedian",
    "KernelSparsityEntropy",
    "L1",
    "L2",
    "MainSubsidiary",
    "Member",
    "Random",
    "Ranking",
    "ScoreRanking",
    "Taylor",
    "WithConstants",
    "apply_kept",
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
