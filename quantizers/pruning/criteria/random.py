"""Channels drawn at random: what every other criterion is to be better than."""

from __future__ import annotations

import torch
from torch import nn

from quantizers.batches import Batches
from quantizers.calling import Forward
from quantizers.pruning.channels import ChannelGroups
from quantizers.pruning.criterion import Criterion, Loss, Ranking, ScoreRanking


class Random(Criterion, name="random"):
    """Gives every channel a random score, uniform in 0..1; what is kept at a small count is kept at a larger one too."""

    summary = "random scores, to compare with"

    def rank(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        batches: Batches | None,
        loss: Loss | None,
        generator: torch.Generator | None,
        forward: Forward | None,
    ) -> Ranking:
        """Draw scores for all groups, one after the other.

        Args:
            network: Plays no part.
            groups: Groups of channels.
            batches: Play no part.
            loss: Plays no part.
            generator: Source of random numbers, on the CPU; None: a new one of seed 0.
            forward: Plays no part.

        Returns:
            The ranking by these scores.
        """
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        scores = {}
        for group in groups.groups:
            scores[group.name] = torch.rand(group.channels, generator=generator, dtype=torch.float64)
        return ScoreRanking(groups, scores)
