"""Kernels that share weights: those of an input channel are replaced by fewer, as many as the channel is worth.

Li et al., "Exploiting Kernel Sparsity and Entropy for Interpretable CNN Compression", CVPR 2019, arXiv 1812.04368, section
3.3: all layers at once and without data, the 2-D kernels of input channel c are clustered to q_c centroids by k-means, with an
index that says which centroid each kernel is. The centroids are fine-tuned, the index stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from quantizers.copying import copy_network
from quantizers.functional import refuse_infinite
from quantizers.pruning.criteria.kse import NEIGHBOURS, kernel_importance
from quantizers.pruning.weights import input_kernels

LEVELS = 4
ROUNDS = 100  # of k-means, which ends when nothing moves any more


def kernel_counts(importance: Tensor, kernels: int, levels: int = LEVELS, shift: int = 0) -> Tensor:
    """Return how many kernels every input channel gets (equation 8 of the paper).

    With g = floor(v G): none where g is 0, all N where v G is above G - 1, else N / 2^(G - g + T - 1), rounded up.

    Args:
        importance: Indicators v from 0 to 1, shape (inputs,), as `kernel_importance` returns them.
        kernels: How many kernels N there are of each input channel.
        levels: G, 2 or more: into how many levels the indicators are divided.
        shift: T: by how many powers of two fewer kernels the levels between none and all have.

    Returns:
        Counts q from 0 to N, integers of shape (inputs,).

    Raises:
        ValueError: For fewer than two levels.
    """
    if levels < 2:
        raise ValueError(f"kernels need at least 2 levels, not {levels!r}")
    made = []
    for value in importance.tolist():
        level = math.floor(value * levels)
        if level == 0:
            made.append(0)
        elif math.ceil(value * levels) == levels:
            made.append(kernels)
        else:
            made.append(min(math.ceil(kernels / 2 ** (levels - level + shift - 1)), kernels))
    return torch.tensor(made)


def cluster_kernels(kernels: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Divide kernels among clusters by k-means, started by k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        kernels: Shape (kernels, values).
        count: How many clusters, at least one. As many as kernels: each is one of its own.
        generator: Source of random numbers on the CPU; None: a new one of seed 0.

    Returns:
        The number of each kernel's cluster, shape (kernels,); every cluster has a kernel.

    Raises:
        ValueError: For a count that isn't from 1 to the number of kernels.
    """
    if not 1 <= count <= len(kernels):
        raise ValueError(f"{len(kernels)} kernels can be divided among 1 to {len(kernels)} clusters, not {count}")
    if count == len(kernels):
        return torch.arange(count)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    kernels = kernels.double().cpu()
    centroids = _first_centroids(kernels, count, generator)
    index = torch.full((len(kernels),), -1)
    for _ in range(ROUNDS):
        distances = torch.cdist(kernels, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        moved = _filled(distances.argmin(1), distances, count)
        if torch.equal(moved, index):
            break
        index = moved
        centroids = _means(kernels, index, count)
    return index


def _first_centroids(kernels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw kernels as centroids, one after the other, each in proportion to the squared distance to the nearest before."""
    chosen = [int(torch.randint(len(kernels), (), generator=generator))]
    nearest = (kernels - kernels[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        if nearest.max() > 0:
            new = int(torch.multinomial(nearest, 1, generator=generator))
        else:
            new = next(number for number in range(len(kernels)) if number not in chosen)
        chosen.append(new)
        nearest = torch.minimum(nearest, (kernels - kernels[new]).square().sum(1))
    return kernels[chosen]


def _filled(index: Tensor, distances: Tensor, count: int) -> Tensor:
    """Give every cluster that is empty the kernel that is furthest from its centroid, of clusters that have several."""
    index = index.clone()
    own = distances.gather(1, index[:, None])[:, 0]
    for cluster in range(count):
        sizes = torch.bincount(index, minlength=count)
        if sizes[cluster]:
            continue
        furthest = int(torch.where(sizes[index] > 1, own, -1.0).argmax())
        index[furthest], own[furthest] = cluster, 0.0
    return index


def _means(kernels: Tensor, index: Tensor, count: int) -> Tensor:
    sums = kernels.new_zeros(count, kernels.shape[1]).index_add_(0, index, kernels)
    return sums / torch.bincount(index, minlength=count)[:, None]


class SharedKernels(nn.Module):
    """Makes a convolution's weight of fewer kernels: a parametrization whose parameter is the centroids.

    A centroid's gradient is the sum over the kernels that share it.

    Attributes:
        index: Which centroid each kernel of the weight is, shape (outputs, inputs of each); 0 stands for zeros, and so the
            centroids are counted from 1.
    """

    index: Tensor

    def __init__(self, index: Tensor, shape: tuple[int, ...]) -> None:
        """Take the index, and the shape of the weight."""
        super().__init__()
        self.register_buffer("index", index)
        self.shape = shape

    def forward(self, centroids: Tensor) -> Tensor:
        """Return the weight."""
        with_zeros = torch.cat([torch.zeros_like(centroids[:1]), centroids])
        return with_zeros[self.index].view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the centroids of a weight: the means of the kernels that share them."""
        kernels = weight.detach().double().flatten(2).flatten(0, 1)
        means = _means(kernels, self.index.flatten(), int(self.index.max()) + 1)
        return means[1:].to(weight.dtype)


class ClusteredLayer(NamedTuple):
    """What became of the kernels of a layer."""

    name: str
    kernels: int  # how many there were
    kept: int  # how many centroids there are


def share_kernels(
    network: nn.Module,
    *,
    levels: int = LEVELS,
    shift: int = 0,
    layers: Iterable[str] | None = None,
    neighbours: int = NEIGHBOURS,
    entropy_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, list[ClusteredLayer]]:
    """Replace the kernels of convolutions by fewer that are shared, without data.

    The copy is trained as any network: what is learned are the centroids. `torch.nn.utils.parametrize.remove_parametrizations`
    makes plain weights of them.

    Args:
        network: The network, in float; it is left alone.
        levels: As in `kernel_counts`: 4 or 5 in the paper.
        shift: As in `kernel_counts`.
        layers: The names of the convolutions; None: all that read more than one channel with each filter, but for the first,
            which reads the network's inputs.
        neighbours: As in `kernel_entropy`.
        entropy_weight: As in `kernel_importance`.
        generator: Source of random numbers of k-means, on the CPU; None: a new one of seed 0.

    Returns:
        The copy, and for each of its layers that share kernels how many there are.

    Raises:
        ValueError: Naming the layer, for one that isn't there, is no convolution, or has weights that aren't finite; for fewer
            than two levels.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    made = copy_network(network)
    modules = dict(made.named_modules())
    if layers is None:
        convolutions = [name for name, module in modules.items() if isinstance(module, _ConvNd) and not module.transposed]
        layers = [name for name in convolutions[1:] if modules[name].in_channels > modules[name].groups]
    report = []
    for name in layers:
        layer = modules.get(name)
        if not isinstance(layer, _ConvNd) or layer.transposed or parametrize.is_parametrized(layer):
            raise ValueError(f"the kernels of {name!r} can't be shared: name convolutions of the network with plain weights")
        try:
            refuse_infinite(layer.weight)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        kernels = input_kernels(layer)
        importance = kernel_importance(kernels, neighbours, entropy_weight)
        counts = kernel_counts(importance, kernels.shape[1], levels, shift)
        index = _index_of(layer, kernels, counts, generator)
        shared = SharedKernels(index.to(layer.weight.device), tuple(layer.weight.shape))
        parametrize.register_parametrization(layer, "weight", shared)
        report.append(ClusteredLayer(name, index.numel(), int(counts.sum())))
    return made, report


def _index_of(layer: _ConvNd, kernels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Cluster the kernels of every input channel: which centroid each kernel of a weight is, 0 for none."""
    first = 1
    of_inputs = []
    for channel, count in zip(kernels, counts.tolist(), strict=True):
        if count == 0:
            of_inputs.append(torch.zeros(len(channel), dtype=torch.long))
            continue
        of_inputs.append(first + cluster_kernels(channel, count, generator))
        first += count
    # (groups, inputs of each, outputs of each) as (outputs, inputs of each).
    by_input = torch.stack(of_inputs).unflatten(0, (layer.groups, -1))
    return by_input.transpose(1, 2).flatten(0, 1)
