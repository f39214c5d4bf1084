"""The loss that a channel's removal costs, to first order.

Molchanov, Mallya, Tyree, Frosio and Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771:
the importance of a filter is the squared change of the loss without it, which to first order is (sum of g_s w_s)^2 over its
parameters s, or for a gate z = 1 that multiplies its output (dL/dz)^2 (equations 8 to 10); it is averaged over what the loss
is of.
"""

from __future__ import annotations

import torch
from torch import nn

from quantizers.batches import Batches
from quantizers.calling import Forward
from quantizers.pruning.channels import ChannelGroups
from quantizers.pruning.criterion import Criterion, Loss, Ranking, ScoreRanking, checked_scores
from quantizers.pruning.gates import gate_gradients


class Taylor(Criterion, name="taylor"):
    """Scores a channel by the mean over samples of (dL/dz)^2, with its gate z where the channel is read.

    That is the squared sum of gradient times activation. The mean is of each sample's own square, so that it doesn't depend on
    how samples are divided into batches. Units: the loss's, squared.
    """

    summary = "squared change of the loss to first order (Molchanov et al. 2019); needs data and a loss"
    needs_data = True
    needs_loss = True

    def rank(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        batches: Batches | None,
        loss: Loss | None,
        generator: torch.Generator | None,
        forward: Forward | None,
    ) -> Ranking:
        """Rank channels by one pass forward and backward over the data.

        Args:
            network: The network.
            groups: Its groups of channels.
            batches: Inputs, or pairs of inputs and targets.
            loss: Function of outputs and targets: the mean over samples.
            generator: Plays no part.
            forward: What runs the network on a batch.

        Returns:
            The ranking by these scores.
        """
        assert batches is not None
        assert loss is not None
        scores = {}
        gradients = gate_gradients(network, groups, batches, loss, forward)
        for group in groups.groups:
            scores[group.name] = checked_scores(self.name, group, gradients[group.name].square().mean(0))
        return ScoreRanking(groups, scores)
