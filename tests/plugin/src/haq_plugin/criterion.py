"""A criterion: the largest weight of each filter."""

from __future__ import annotations

from torch import Tensor, nn

from quantizers.pruning import ChannelGroup, Criterion


class LargestWeight(Criterion):
    """Scores a channel by the largest weight of the filter that writes it."""

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the score of every channel."""
        layer = network.get_submodule(group.writers[0])
        return layer.weight.flatten(1).abs().amax(1)
