"""Weight sharing: every weight of a layer is one of a few learned values (k-means, Deep Compression)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from quantizers import calibrate as calibration
from quantizers.functional import MAX_BITS
from quantizers.linear import Linear
from quantizers.scheme import row

if TYPE_CHECKING:
    from quantizers.calibrate import Observer
    from quantizers.layers import QuantLayer

ENTRIES = 1 << MAX_BITS


@dataclass(frozen=True)
class KMeans(Linear, name="kmeans"):
    """Han et al., "Deep Compression" (ICLR 2016), section 3: the weights of a layer are clustered, and each is replaced by the
    centroid of its cluster. There are 2^b centroids C, found by k-means:

        minimise the sum over k of the sum over w in c_k of (w - C_k)^2                             (equation 2)
        dL/dC_k = the sum over i, j of dL/dW_ij where weight i, j is of cluster k                   (equation 3)

    Training moves the centroids only: which weight belongs to which cluster stays, and so does the layer's float `weight`,
    which gets no gradient. A layer with at most 2^b distinct weights loses nothing. As the gradient is a sum, the fewer
    centroids a layer has, the larger are their steps: train them at a lower rate than the weights would be.

    The clusters of numbers are intervals, so that they are kept as the 2^b - 1 borders between them, and a weight's index
    is found from its value when it is needed: indices aren't part of the state, are the same after saving and loading, don't
    depend on what training makes of the centroids, and are never those of another weight.

    keep_zeros
        weights that are exactly 0, pruned ones, stay 0 and take one of the 2^b values, if the layer has any.
    calibration, power_of_two
        of activations, which are `Linear`'s.

    A layer's tensors: codebook (8, 256), learned; codebook_border (8, 255) and zeros_kept (); weight_error (8,), before
    training; and `Linear`'s of activations.
    """

    keep_zeros: bool = True
    learned: ClassVar[tuple[str, ...]] = ("codebook",)
    of_weight: ClassVar[tuple[str, ...]] = ("codebook", "codebook_border", "zeros_kept")

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        tensors = super().start(layer)
        del tensors["weight_scale"]
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        return {
            "codebook": torch.zeros(MAX_BITS, ENTRIES, dtype=dtype),
            "codebook_border": torch.full((MAX_BITS, ENTRIES - 1), torch.inf, dtype=dtype),
            "zeros_kept": torch.zeros((), dtype=torch.bool),
            **tensors,
        }

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        weight = layer.weight.detach()
        if not weight.isfinite().all():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite")
        values, kept = weight.double().flatten(), _tensor(layer, "zeros_kept")
        kept.fill_(self.keep_zeros and bool((values == 0).any()))
        values = values[values != 0] if kept else values
        energy = values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
        codebooks = cluster(values, [2**bits - int(kept) for bits in range(1, MAX_BITS + 1)])
        for index, (centroids, borders) in enumerate(codebooks):
            _tensor(layer, "codebook")[index, : len(centroids)] = centroids
            _tensor(layer, "codebook_border")[index, : len(borders)] = borders
            left = weight - self.weight(layer, index + 1)
            layer.weight_error[index] = left.double().square().sum() / energy
        if observer is not None:
            scale, error = calibration.activation_scales(
                observer.sample(), observer.largest, observer.signed, self.calibration, self.power_of_two
            )
            layer.activation_scale.copy_(scale)
            layer.activation_error.copy_(error)
            layer.activation_signed.fill_(observer.signed)

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        weight = layer.weight.detach()
        codebook = row(_tensor(layer, "codebook"), bits)
        # The gradient of picking is the sum over those that were picked: equation 3.
        shared = codebook.index_select(0, assignment(layer, bits).flatten().int()).view(weight.shape)
        shared = torch.where(_tensor(layer, "zeros_kept") & (weight == 0), 0, shared)
        return shared.to(weight.dtype)


def assignment(layer: QuantLayer, bits: int) -> Tensor:
    """The index into the codebook of every weight of a layer: uint8, of the weight's shape. Kept zeros have an index too,
    which means nothing. It is found again only if the float weight or the borders have changed."""
    weight, borders = layer.weight.detach(), _tensor(layer, "codebook_border")
    counted = not (torch.compiler.is_compiling() or weight.is_inference() or borders.is_inference())
    state = (weight._version, weight.data_ptr(), borders._version, borders.data_ptr()) if counted else ()
    # The bank's other entries are weights under their bits: indices go under the negative.
    kept = layer._bank.get(-bits)
    if kept is not None and counted and kept[0] == state:
        return kept[1]
    values = weight.reshape(-1).to(borders.dtype)
    made = torch.bucketize(values, row(borders, bits)[: 2**bits - 1], out_int32=True).to(torch.uint8).view(weight.shape)
    if counted:
        layer._bank[-bits] = state, made
    return made


def cluster(values: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For each size, ascending: the centroids of at most so many clusters, in order, and the borders between them.

    A value belongs to cluster i if it is above border i - 1 and not above border i. Both are float64, but borders separate
    the values in float32 too. The order of the values doesn't matter. The squared error of a size is never above that of
    the one before, and 0 if there are no more distinct values than clusters.

    Lloyd's algorithm on sorted values, where a cluster is a slice and its sums are differences of running sums, so that an
    iteration takes time for clusters, not values. Of two starts the better result counts: centroids spread evenly over
    minimum..maximum, which is what Han et al. found best; and the clusters of the size before, with the worst of them split
    (Linde, Buzo and Gray 1980). Clusters that become empty are replaced by splitting the worst.
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
    """Sorted values, and what can be said at once of slices of them. A clustering is the tensor of its cuts: the position at
    which each cluster starts, and the number of values at the end; equal values are never apart."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        # Sums of small differences from the mean keep more digits than sums of the values.
        self.mean = values.mean()
        centred = values - self.mean
        self.sums = torch.cat([centred.new_zeros(1), centred.cumsum(0)])
        self.squares = torch.cat([centred.new_zeros(1), centred.square().cumsum(0)])

    def centroids(self, cuts: Tensor) -> Tensor:
        return self.sums[cuts].diff() / cuts.diff() + self.mean

    def errors(self, cuts: Tensor) -> Tensor:
        """The squared error of each cluster."""
        error = self.squares[cuts].diff() - self.sums[cuts].diff().square() / cuts.diff()
        return torch.where(self.values[cuts[:-1]] < self.values[cuts[1:] - 1], error.clamp_min(0), 0)

    def nearest(self, centroids: Tensor) -> Tensor:
        """The clustering by the nearest of some centroids, in order; those that are nobody's nearest are left out."""
        cuts = torch.searchsorted(self.values, (centroids[1:] + centroids[:-1]) / 2)
        return torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([len(self.values)])]).unique()

    def filled(self, cuts: Tensor, size: int) -> Tensor:
        """The clustering with its worst clusters split at their means until there are `size`, or one per value."""
        while (room := size - (len(cuts) - 1)) > 0:
            several = (self.values[cuts[:-1]] < self.values[cuts[1:] - 1]).nonzero().flatten()
            if not len(several):
                break
            worst = several[self.errors(cuts)[several].argsort(descending=True, stable=True)][:room]
            # A mean that is rounded down to the smallest of nearly equal values would split nothing.
            first, last = self.values[cuts[worst]], self.values[cuts[worst + 1] - 1]
            middle = torch.minimum(self.centroids(cuts)[worst], last)
            middle = torch.where(middle > first, middle, last)
            cuts = torch.cat([cuts, torch.searchsorted(self.values, middle)]).unique()
        return cuts

    def lloyd(self, cuts: Tensor, size: int) -> Tensor:
        cuts = self.filled(cuts, size)
        for _ in range(300):
            moved = self.filled(self.nearest(self.centroids(cuts)), size)
            if torch.equal(moved, cuts):
                break
            cuts = moved
        return cuts

    def means(self, cuts: Tensor) -> Tensor:
        """The centroids summed value by value: exact if all values of a cluster are the same."""
        index = torch.repeat_interleave(cuts.diff())
        return torch.bincount(index, weights=self.values) / cuts.diff()

    def borders(self, cuts: Tensor) -> Tensor:
        """Half way between neighbouring clusters, unless rounding makes that the upper one's smallest value."""
        lower, upper = self.values[cuts[1:-1] - 1], self.values[cuts[1:-1]]
        middle = ((lower + upper) / 2).float().double()
        return torch.where((lower <= middle) & (middle < upper), middle, lower)


def _tensor(layer: QuantLayer, name: str) -> Tensor:
    tensor: Tensor = getattr(layer, name)
    return tensor
