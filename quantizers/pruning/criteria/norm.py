"""Norms of filters: what is small does little.

Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1: filters with the
smallest sum of absolute weights are removed. L2 in its place is the norm of He et al., "Soft Filter Pruning", IJCAI 2018,
equation 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from quantizers.pruning.channels import ChannelGroup
from quantizers.pruning.criterion import Criterion
from quantizers.pruning.weights import writer_filters, writing_layers


def filter_norms(filters: Tensor, order: int) -> Tensor:
    """Return the norm of every filter, (sum of |w|^order)^(1/order).

    Args:
        filters: Shape (filters, values).
        order: 1 or 2.

    Returns:
        Norms of shape (filters,), in the weights' own units.
    """
    return torch.linalg.vector_norm(filters, ord=order, dim=1)


def relative(scores: Tensor) -> Tensor:
    """Return scores as multiples of their mean; zeros stay zeros.

    The size of a layer's weights is arbitrary where a batch norm follows. Layers that write the same channels (into a sum of
    branches) are to count alike, so each one's scores are divided by their mean before they are added.

    Args:
        scores: Not negative, shape (channels,).

    Returns:
        The same order, of mean 1.
    """
    mean = scores.mean()
    if mean == 0:
        return scores
    return scores / mean


class Norm(Criterion):
    """Scores a channel by the norm of its filters: per layer that writes it, relative to the layer's mean; the mean of these.

    Biases and batch norms play no part. Units: multiples of a layer's mean norm.
    """

    order: ClassVar[int]

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the mean over the layers that write the group of the channels' relative norms."""
        made = []
        for writer in writing_layers(network, group):
            norms = filter_norms(writer_filters(network, group, writer), self.order)
            made.append(relative(norms))
        return torch.stack(made).mean(0)


class L1(Norm, name="l1"):
    """Scores a channel by the sum of its filters' absolute weights (Li et al. 2017)."""

    summary = "sum of a filter's absolute weights (Li et al. 2017)"
    order = 1


class L2(Norm, name="l2"):
    """Scores a channel by the Euclidean norm of its filters (He et al. 2018)."""

    summary = "Euclidean norm of a filter (He et al. 2018, soft filter pruning)"
    order = 2
