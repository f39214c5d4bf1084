"""Weight sharing: every weight of a layer is one of a few learned values (k-means, Deep Compression)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.functional import FEW_BITS, MAX_BITS, refuse_infinite, row
from quantizers.observers import Observer
from quantizers.scheme import SchemeLayer, tensor_of
from quantizers.schemes.linear import Linear

ENTRIES = 1 << MAX_BITS
ENTRY_BYTES = 4  # of a value in the codebook, as it is stored
LLOYD_ROUNDS = 300


@dataclass(frozen=True)
class KMeans(Linear, name="kmeans"):
    """Han et al., "Deep Compression" (ICLR 2016), section 3: a layer's weights are clustered and replaced by centroids.

    There are 2^b centroids C, found by k-means:

        minimise the sum over k of the sum over w in c_k of (w - C_k)^2                             (equation 2)
        dL/dC_k = the sum over i, j of dL/dW_ij where weight i, j is of cluster k                   (equation 3)

    Training moves the centroids only: which weight belongs to which cluster stays, and so does the
    layer's float `weight`, which gets no gradient. A layer with at most 2^b distinct weights loses
    nothing. As the gradient is a sum, the fewer centroids a layer has, the larger are their steps:
    train them at a lower rate than the weights would be.

    The clusters of numbers are intervals, so that they are kept as the 2^b - 1 borders between
    them, and a weight's index is found from its value when it is needed: indices aren't part of the
    state, are the same after saving and loading, don't depend on what training makes of the
    centroids, and are never those of another weight.

    Weights have 1 to 8 bits: 65,536 centroids would be no codebook. A layer's tensors: codebook (8,
    256), learned; codebook_border (8, 255) and zeros_kept (); weight_error (9,), before training;
    and `Linear`'s of activations.

    Attributes:
        calibration: Of activations, as in `Linear`.
        power_of_two: Likewise.
        activations: Likewise.
        keep_zeros: Whether weights that are exactly 0, pruned ones, stay 0 and take one of the 2^b
            values, if the layer has any.
    """

    keep_zeros: bool = True
    summary: ClassVar[str] = "every weight is one of 2^b values that training moves; saves storage only (Han et al. 2016)"
    learned: ClassVar[tuple[str, ...]] = ("codebook",)
    takes_offsets: ClassVar[bool] = False
    learned_rate: ClassVar[float] = 0.1  # a centroid's gradient is the sum over its weights
    of_weight: ClassVar[tuple[str, ...]] = ("codebook", "codebook_border", "zeros_kept")
    trains_weight: ClassVar[bool] = False
    has_integer_weights: ClassVar[bool] = False
    most_weight_bits: ClassVar[int] = MAX_BITS
    choices: ClassVar[Mapping[str, str]] = {
        "power_of_two": "power_of_two",
        "activations": "activations",
        "zero_points": "asymmetric",
    }
    habits: ClassVar[Mapping[str, Any]] = {"per_channel": False}  # one codebook for all channels

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return an empty codebook, and `Linear`'s tensors of activations."""
        tensors = super().start(layer)
        del tensors["weight_scale"]
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        return {
            "codebook": torch.zeros(MAX_BITS, ENTRIES, dtype=dtype),
            "codebook_border": torch.full((MAX_BITS, ENTRIES - 1), torch.inf, dtype=dtype),
            "zeros_kept": torch.zeros((), dtype=torch.bool),
            **tensors,
        }

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Cluster the weights for every width, and find the scales of the input if it was seen."""
        weight = layer.weight.detach()
        refuse_infinite(weight)
        values, kept = weight.double().flatten(), tensor_of(layer, "zeros_kept")
        kept.fill_(self.keep_zeros and bool((values == 0).any()))
        if kept:
            values = values[values != 0]
        energy = values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
        codebooks = cluster(values, [2**bits - int(kept) for bits in FEW_BITS])
        for bits, (centroids, borders) in zip(FEW_BITS, codebooks, strict=True):
            row(tensor_of(layer, "codebook"), bits)[: len(centroids)] = centroids
            row(tensor_of(layer, "codebook_border"), bits)[: len(borders)] = borders
            left = weight - self.weight(layer, bits)
            layer.weight_error[bits - 1] = left.double().square().sum() / energy
        if observer is not None:
            self._calibrate_activations(layer, observer)

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the centroid of every weight's cluster."""
        weight = layer.weight.detach()
        codebook = row(tensor_of(layer, "codebook"), bits)
        # The gradient of picking is the sum over those that were picked: equation 3.
        shared = codebook.index_select(0, _kept_assignment(layer, weight, bits).flatten().int()).view(weight.shape)
        shared = torch.where(tensor_of(layer, "zeros_kept") & (weight == 0), 0, shared)
        return shared.to(weight.dtype)

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Raise ValueError: centroids are no multiples of a step."""
        raise ValueError(f"weights of scheme {self.name!r} are no multiples of a step")

    def storage_overhead_bytes(self, bits: int, weights: int | None = None) -> int:
        """Return the bytes of a layer's codebook: 2^bits float32 values, or as many as the layer has weights."""
        entries = 2**bits
        if weights is not None:
            entries = min(entries, weights)
        return ENTRY_BYTES * entries


def assignment(layer: SchemeLayer, bits: int) -> Tensor:
    """Find the index into the codebook of every weight of a layer: uint8, of the weight's shape.

    Kept zeros have an index too, which means nothing.
    """
    return _kept_assignment(layer, layer.weight.detach(), bits).clone()


def _kept_assignment(layer: SchemeLayer, weight: Tensor, bits: int) -> Tensor:
    """Return the indices of a layer's weight, which nobody may change: found again only if it or the borders have changed."""

    def sources() -> tuple[Tensor, Tensor]:
        return weight, tensor_of(layer, "codebook_border")

    def find() -> Tensor:
        borders = tensor_of(layer, "codebook_border")
        values = weight.reshape(-1).to(borders.dtype)
        inner = row(borders, bits)[: 2**bits - 1]
        return torch.bucketize(values, inner, out_int32=True).to(torch.uint8).view(weight.shape)

    return layer.cache.get(("index", bits), sources, find)


def cluster(values: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Cluster numbers by k-means, into at most so many clusters for each of some sizes.

    A value belongs to cluster i if it is above border i - 1 and not above border i. Both are
    float64, but borders separate the values in float32 too. The order of the values doesn't matter.
    The squared error of a size is never above that of the one before, and 0 if there are no more
    distinct values than clusters.

    Lloyd's algorithm on sorted values, where a cluster is a slice and its sums are differences of
    running sums, so that an iteration takes time for clusters, not values. Of two starts the better
    result counts: centroids spread evenly over minimum..maximum, which is what Han et al. found
    best; and the clusters of the size before, with the worst of them split (Linde, Buzo and Gray
    1980). Clusters that become empty are replaced by splitting the worst.

    Args:
        values: Numbers, in any order.
        sizes: The largest numbers of clusters, ascending.

    Returns:
        For each size the centroids in order, and the borders between them.
    """
    values = values.detach().double().sort().values
    if not len(values):
        return [(values, values) for _ in sizes]
    sorted_values = _Sorted(values)
    found, cuts = [], torch.tensor([0, len(values)], device=values.device)
    for size in sizes:
        even = torch.linspace(0, 1, size, dtype=values.dtype, device=values.device)
        even = sorted_values.nearest(values[0] + even * (values[-1] - values[0]))
        tried = [sorted_values.lloyd(start, size) for start in (cuts, even)]
        cuts = min(tried, key=lambda trial: float(sorted_values.errors(trial).sum()))
        found.append((sorted_values.means(cuts), sorted_values.borders(cuts)))
    return found


class _Sorted:
    """Sorted values, and what can be said at once of slices of them.

    A clustering is the tensor of its cuts: the position at which each cluster starts, and the
    number of values at the end; equal values are never apart.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        # Sums of small differences from the mean keep more digits than sums of the values.
        self.mean = values.mean()
        centred = values - self.mean
        self.sums = torch.cat([centred.new_zeros(1), centred.cumsum(0)])
        self.squares = torch.cat([centred.new_zeros(1), centred.square().cumsum(0)])

    def centroids(self, cuts: Tensor) -> Tensor:
        """Return the mean of each cluster."""
        return self.sums[cuts].diff() / cuts.diff() + self.mean

    def errors(self, cuts: Tensor) -> Tensor:
        """Return the squared error of each cluster."""
        error = self.squares[cuts].diff() - self.sums[cuts].diff().square() / cuts.diff()
        return torch.where(self.values[cuts[:-1]] < self.values[cuts[1:] - 1], error.clamp_min(0), 0)

    def nearest(self, centroids: Tensor) -> Tensor:
        """Return the clustering by the nearest of some centroids, in order, without those that are nobody's nearest."""
        cuts = torch.searchsorted(self.values, (centroids[1:] + centroids[:-1]) / 2)
        return torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([len(self.values)])]).unique()

    def filled(self, cuts: Tensor, size: int) -> Tensor:
        """Split the worst clusters at their means until there are `size`, or one per value."""
        while (room := size - (len(cuts) - 1)) > 0:
            several = (self.values[cuts[:-1]] < self.values[cuts[1:] - 1]).nonzero().flatten()
            if not len(several):
                break
            worst = several[self.errors(cuts)[several].argsort(descending=True, stable=True)][:room]
            # A mean that is rounded down to the smallest of nearly equal values would split
            # nothing.
            first, last = self.values[cuts[worst]], self.values[cuts[worst + 1] - 1]
            middle = torch.minimum(self.centroids(cuts)[worst], last)
            middle = torch.where(middle > first, middle, last)
            cuts = torch.cat([cuts, torch.searchsorted(self.values, middle)]).unique()
        return cuts

    def lloyd(self, cuts: Tensor, size: int) -> Tensor:
        """Let centroids and clusters take turns until nothing moves."""
        cuts = self.filled(cuts, size)
        for _ in range(LLOYD_ROUNDS):
            moved = self.filled(self.nearest(self.centroids(cuts)), size)
            if torch.equal(moved, cuts):
                break
            cuts = moved
        return cuts

    def means(self, cuts: Tensor) -> Tensor:
        """Return the centroids, summed value by value: exact if all values of a cluster are the same."""
        index = torch.repeat_interleave(cuts.diff())
        return torch.bincount(index, weights=self.values) / cuts.diff()

    def borders(self, cuts: Tensor) -> Tensor:
        """Return what is half way between neighbouring clusters, unless rounding makes that the upper one's smallest."""
        lower, upper = self.values[cuts[1:-1] - 1], self.values[cuts[1:-1]]
        middle = ((lower + upper) / 2).float().double()
        return torch.where((lower <= middle) & (middle < upper), middle, lower)
