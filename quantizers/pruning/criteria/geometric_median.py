"""Filters near the geometric median are what the others can stand in for.

He, Liu, Wang, Hu and Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR
2019, arXiv 1811.00250: of the filters of a layer those are removed whose summed distance to all filters,
g(x) = sum over j of |x - F_j|_2, is smallest (equations 5 and 6). Unlike a norm it doesn't change when all filters are
moved by the same amount, and needs neither norms that differ much nor small ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantizers.pruning.channels import ChannelGroup
from quantizers.pruning.criterion import Criterion
from quantizers.pruning.weights import writer_filters, writing_layers

MOST_SUBTRACTED = 1 << 32  # pairs of weights, which take some seconds; layers of VGG have a hundred times as many


def summed_distances(filters: Tensor) -> Tensor:
    """Return of every filter the sum of its Euclidean distances to all filters.

    Args:
        filters: Shape (filters, values).

    Returns:
        Sums of shape (filters,), in the weights' own units; the smallest is next to the geometric median.
    """
    # By way of products only where it would take too long without: their rounding parts filters that are equal.
    mode = "donot_use_mm_for_euclid_dist"
    if len(filters) * filters.numel() > MOST_SUBTRACTED:
        mode = "use_mm_for_euclid_dist"
    centred = filters - filters.mean(0)
    return torch.cdist(centred, centred, compute_mode=mode).sum(1)


class GeometricMedian(Criterion, name="fpgm"):
    """Scores a channel by the summed distance of its filter to those of all channels; the filter is all layers' that write it.

    Of several layers (that write into a sum of branches) the filters are put together into one. Each layer's are first divided
    by the root mean square of their distance to their mean, so that layers count alike whatever their size, and a common
    shift of a layer's filters still changes nothing. Units: multiples of that root mean square.
    """

    summary = "summed distance to the other filters (He et al. 2019, geometric median)"

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the summed distances of the channels' filters."""
        writers = writing_layers(network, group)
        parts = [spread_to_one(writer_filters(network, group, writer)) for writer in writers]
        return summed_distances(torch.cat(parts, 1))


def spread_to_one(filters: Tensor) -> Tensor:
    """Divide filters by the root mean square of their distance to their mean; filters that are all equal stay as they are.

    Args:
        filters: Shape (filters, values).

    Returns:
        The same shape.
    """
    spread = (filters - filters.mean(0)).square().sum(1).mean().sqrt()
    # Equal filters are apart by what their mean was rounded by.
    if spread <= 1e-12 * filters.abs().max():
        return filters
    return filters / spread
