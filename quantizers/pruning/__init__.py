"""What of a network isn't needed: groups of channels, criteria that say which, and binary filters whose masks are off."""

from quantizers.pruning.filters import (
    MainSubsidiary,
    WithConstants,
    kept_share,
    layerwise_pruning,
    masked_layers,
    remove_filters,
)

__all__ = ["MainSubsidiary", "WithConstants", "kept_share", "layerwise_pruning", "masked_layers", "remove_filters"]
