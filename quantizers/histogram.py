"""Histograms of all that enters a layer, and the grids with which its output loses least.

What a layer's output loses where its input x is rounded to x^ is, of errors that don't hang together,

    sum over input channels c of |W_c|^2 E[(x_c - x^_c)^2],    |W_c|^2 the sum of squares of the weights that meet c:

the squared error, in which a channel weighs what the layer makes of it. Ranges from a histogram of
all values are those of Migacz, "8-bit Inference with TensorRT" (GTC 2017); the error of a layer's
output as what to minimise is in Nagel et al., "A White Paper on Neural Network Quantization" (arXiv
2106.08295, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantizers.functional import FEW_BITS, MAX_BITS, integer_range

BINS = 2048  # on either side of zero
GROUPS = 8  # of channels that weigh nearly the same
LIGHTEST = 2.0**-24  # of what the heaviest channel weighs: what is less is all the same
CHUNK = 1 << 17  # values that are counted while they are in the processor's cache
# Candidates for where a grid ends: from one to the next, and how many; the last is about 1 / 250 of
# the largest value.
FINER, CLIPS = 0.975, 220
# The same for either end of a grid with a zero point, and of the finer steps around the best.
COARSER, ENDS = 0.85, 24
PERCENTILE = 0.9999


class Grids(NamedTuple):
    """Grids s (q - z) of an input for widths 1..8, and what each loses."""

    scales: Tensor  # (8,)
    errors: Tensor  # (8,), relative
    zero_points: Tensor  # (8,), integers as floats; 0 where the grid has none


class Grid(NamedTuple):
    """A grid s (q - z) of one width."""

    scale: float
    zero_point: float


class Row(NamedTuple):
    """A grid s (q - z) of one width, and the squared error that it leaves."""

    scale: float
    zero_point: float
    error: float


class Histogram:
    """How often values occurred: all of them are counted, in bins of equal width and in bounded memory.

    The width of bins is a power of two, and their edges are multiples of it. When a value lies
    beyond the last bin the width is doubled, by which every two neighbours become one: the counts
    are those of all values at once, whatever batches they came in.

    Channels are put into `GROUPS` by their weight, so that one histogram for each is enough.

    Attributes:
        width: Of a bin; 0 until there is a value other than 0.
        counts: Integers (GROUPS, 2 BINS); bin i begins at (i - BINS) width.
        weights: What a value of each group weighs, (GROUPS,).
    """

    def __init__(self, importance: Tensor | None = None) -> None:
        """Begin with no values.

        Args:
            importance: What a value of each channel weighs, (C,); None: all the same.
        """
        self.width = 0.0
        self.counts = torch.zeros(GROUPS, 2 * BINS, dtype=torch.long)
        self.weights = torch.zeros(GROUPS, dtype=torch.double)
        self._group = torch.zeros(1)  # of each channel; all in one
        if importance is None:
            self.weights[0] = 1
        else:
            self._divide(importance.detach().double().cpu())

    def _divide(self, importance: Tensor) -> None:
        """Put channels into groups by the logarithm of their weight: the heaviest first."""
        largest = importance.max()
        if not 0 < largest < torch.inf:
            # A weight that isn't finite is refused elsewhere; one that is all zero weighs nothing.
            self.weights[0] = 1
            return
        share = (importance / largest).clamp_min(LIGHTEST)
        span = max(float(-share.log2().min()), 1e-6)
        group = (-share.log2() * (GROUPS / span)).floor_().clamp_(0, GROUPS - 1)
        members = torch.zeros_like(self.weights).index_add_(0, group.long(), torch.ones_like(share))
        sums = torch.zeros_like(self.weights).index_add_(0, group.long(), share)
        self.weights = sums / members.clamp_min(1)
        self._group = group

    def add(self, values: Tensor, largest: float, channels: int = -1) -> None:
        """Count the values of a batch.

        Args:
            values: Finite numbers of any shape.
            largest: Their largest magnitude.
            channels: The dimension of the channels.
        """
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        if largest > 0:
            self._reach(largest)
        inverse = 1 / (self.width or 1.0)
        keys = len(self.weights) * 2 * BINS
        found = torch.zeros(keys, dtype=torch.long, device=values.device)
        for rows, group in self._rows(values, channels):
            # An edge is exact where the floor comes before the sum. Integers of 16 bits are counted in
            # two thirds of the time of longer ones.
            places = torch.floor(rows * inverse).add_(group * (2 * BINS) + BINS).to(torch.int16)
            found += torch.bincount(places.reshape(-1), minlength=keys)
        self.counts += found.view(GROUPS, 2 * BINS).cpu()

    def _reach(self, largest: float) -> None:
        """Make bins so wide that the last ends beyond a value."""
        needed = 2.0 ** max(math.frexp(largest)[1], -100) / BINS
        if self.width == 0:
            # What was counted before are zeros, which are where they were.
            self.width = needed
        while self.width < needed:
            merged = self.counts.view(GROUPS, BINS, 2).sum(2)
            self.counts.zero_()
            self.counts[:, BINS // 2 : BINS // 2 + BINS] = merged
            self.width *= 2

    def _rows(self, values: Tensor, channels: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through values in pieces, each with the group of what it holds, which broadcasts against it."""
        group = self._group.to(values.device, values.dtype)
        known = values.dim() >= -channels and values.shape[channels] == len(group)
        last = values
        if values.dim() >= -channels:
            last = values.movedim(channels, -1)
        if len(group) == 1 or not known:
            # In the order of memory, which is that of the channels last where it isn't that of the dimensions.
            if values.is_contiguous():
                last = values
            for piece in last.reshape(-1).split(CHUNK):
                yield piece, group[:1]
            return
        if last.is_contiguous() or not values.is_contiguous():
            # Channels beside each other.
            table = last.reshape(-1, len(group))
            for rows in table.split(max(1, CHUNK // len(group))):
                yield rows, group
            return
        inner = math.prod(values.shape[channels:][1:])
        table = values.view(-1, inner)
        owner = group.repeat(len(table) // len(group))[:, None]
        count = max(1, CHUNK // inner)
        yield from zip(table.split(count), owner.split(count), strict=True)

    def grids(
        self,
        low: float,
        high: float,
        rule: str = "output",
        *,
        signed: bool | None = None,
        asymmetric: bool = False,
        power_of_two: bool = False,
        widths: Collection[int] = FEW_BITS,
    ) -> Grids:
        """Find a grid for each width from 1 to 8 bits.

        Args:
            low: The smallest of the values.
            high: The largest.
            rule: `output`: the smallest error, each value weighted by its channel. `mse`: all
                weighted the same. `max`: from the smallest to the largest value. `percentile`:
                without the 0.01 % of the values at either end.
            signed: Whether integers are signed, without a zero point; None: where a value is negative.
            asymmetric: Whether the grids of signed values have a zero point: s (q - z) with q and z
                in 0..2^b - 1. One bit stands for -s and s all the same.
            power_of_two: Whether scales are powers of two.
            widths: Those that are looked at; the others get a grid of step 1, and an error of 1.

        Returns:
            A grid for each width.
        """
        if self.width == 0:
            return Grids(torch.ones(MAX_BITS), torch.zeros(MAX_BITS), torch.zeros(MAX_BITS))
        if signed is None:
            signed = low < 0
        fit = _Fit(self, low, high, rule, power_of_two)
        rows = []
        for bits in FEW_BITS:
            if bits not in widths:
                rows.append(Row(1.0, 0.0, fit.energy))
            elif bits == 1 and signed:
                rows.append(fit.signs())
            elif asymmetric and low < 0:
                rows.append(fit.affine(bits))
            else:
                rows.append(fit.symmetric(bits, signed))
        scales, zero_points, errors = zip(*rows, strict=True)
        relative = torch.tensor(errors, dtype=torch.double).clamp_min(0) / fit.energy
        return Grids(torch.tensor(scales), relative.float(), torch.tensor(zero_points))


class _Fit:
    """Squared errors of grids over a histogram, from sums up to every bin: a grid costs as much as it has levels."""

    def __init__(self, histogram: Histogram, low: float, high: float, rule: str, power_of_two: bool) -> None:
        self.width, self.power_of_two = histogram.width, power_of_two
        weights = histogram.weights
        if rule != "output":
            weights = torch.ones_like(weights)
        self.counts = (histogram.counts * weights[:, None]).sum(0)
        self.centres = (torch.arange(-BINS, BINS, dtype=torch.double) + 0.5) * self.width
        moments = torch.stack([self.counts, self.counts * self.centres])
        self.sums = torch.cat([torch.zeros(2, 1, dtype=torch.double), moments.cumsum(1)], 1)
        self.total = float((self.counts * self.centres.square()).sum())
        self.energy = max(self.total, torch.finfo(torch.double).tiny)
        # The ends of the grids to choose from, as shares of the outermost two.
        self.searches = rule in ("output", "mse")
        if rule == "percentile":
            low, high = self._quantile(1 - PERCENTILE, low, high), self._quantile(PERCENTILE, low, high)
        self.below, self.above = max(0.0, -low), max(0.0, high)

    def _quantile(self, share: float, low: float, high: float) -> float:
        """Return below what so large a share of the values lies: the centre of a bin."""
        index = int(torch.searchsorted(self.sums[0, 1:], share * self.sums[0, -1]))
        return float(self.centres[min(index, 2 * BINS - 1)].clamp(low, high))

    def _shares(self, ratio: float, count: int) -> Tensor:
        if not self.searches:
            count = 1
        return ratio ** torch.arange(count, dtype=torch.double)

    def errors(self, scales: Tensor, zero_points: Tensor, levels: int) -> Tensor:
        """Return the error of each of some grids.

        Args:
            scales: Their steps, (K,).
            zero_points: How many levels of each lie below 0, (K,).
            levels: How many levels they have.

        Returns:
            Squared errors, (K,).
        """
        level = torch.arange(levels, dtype=torch.double) - zero_points[:, None]
        # Below the middle between a level and the next lie the bins of all levels up to it.
        middles = (level[:, :-1] + 0.5) * (scales[:, None] / self.width)
        ends = (middles + (BINS - 0.5)).ceil_().clamp_(0, 2 * BINS).long()
        edge = torch.zeros(len(scales), 1, dtype=torch.long)
        ends = torch.cat([edge, ends, edge + 2 * BINS], 1)
        count, total = (of[ends].diff(dim=1) for of in self.sums)
        real = level * scales[:, None]
        return self.total + (real * (real * count - 2 * total)).sum(1)

    def symmetric(self, bits: int, signed: bool) -> Row:
        """Return the best grid without a zero point."""
        low, high = integer_range(bits, signed)
        scales = self._allowed(max(self.above, self.below) * self._shares(FINER, CLIPS) / high)
        best = self._best(scales, torch.full_like(scales, -low), high - low + 1)
        return best._replace(zero_point=0.0)

    def affine(self, bits: int) -> Row:
        """Return the best grid with a zero point; where there is a choice, none is worse than the best symmetric one."""
        most = 2**bits - 1
        shares = self._shares(COARSER, ENDS)
        if self.searches:
            # A grid may end at 0, too.
            shares = torch.cat([shares, shares.new_zeros(1)])
        spans = torch.cartesian_prod(self.below * shares, self.above * shares)
        spans = spans[spans.sum(1) > 0]
        scales = self._allowed(spans.sum(1) / most)
        zeros = (spans[:, 0].repeat(len(scales) // len(spans)) / scales).round().clamp(0, most)
        if not self.searches:
            return self._best(scales, zeros, most + 1)
        best = self._best(scales, zeros, most + 1)
        # Around the best in small steps, with the zero points beside it.
        near = self._allowed(best.scale * FINER ** torch.arange(-6, 7, dtype=torch.double))
        beside = (best.zero_point + torch.arange(-1, 2, dtype=torch.double)).clamp(0, most).unique()
        scales, zeros = torch.cartesian_prod(near, beside).unbind(1)
        _, middle = integer_range(bits, True)
        scales = torch.cat([scales, scales.new_tensor([self.symmetric(bits, True).scale])])
        zeros = torch.cat([zeros, zeros.new_tensor([float(middle)])])
        return self._best(scales, zeros, most + 1)

    def _best(self, scales: Tensor, zero_points: Tensor, levels: int) -> Row:
        errors = self.errors(scales, zero_points, levels)
        index = int(errors.argmin())
        return Row(float(scales[index]), float(zero_points[index]), float(errors[index]))

    def signs(self) -> Row:
        """Return the best two levels -s and s: s is the mean magnitude."""
        mean = (self.counts * self.centres.abs()).sum() / self.counts.sum()
        scales = self._allowed(mean.view(1))
        errors = (self.counts * (self.centres.abs() - scales[:, None]).square()).sum(1)
        index = int(errors.argmin())
        return Row(float(scales[index]), 0.0, float(errors[index]))

    def _allowed(self, scales: Tensor) -> Tensor:
        """Return scales as float32 has them; or the powers of two beside them, first all those below."""
        if self.power_of_two:
            scales = torch.cat([2 ** scales.log2().floor(), 2 ** scales.log2().ceil()])
        return scales.float().clamp_min(torch.finfo(torch.float32).tiny).double()


def importance_of_inputs(layer: nn.Module) -> Tensor | None:
    """Return what a convolution or linear layer makes of each input channel: the sum of squares of its weights.

    Where channels stay apart (a convolution in groups), a small output may be made large again by
    what follows, and a large one small. There channels differ less in what they weigh: w becomes
    min(w, 16 median)^0.7, as did best with MobileNets and EfficientNets of 3 to 8 bits.

    Args:
        layer: The layer.

    Returns:
        Sums (C_in,); None for a module that has no such weight.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    groups = getattr(layer, "groups", 1)
    inputs = weight.shape[1]
    squares = weight.detach().double().square().reshape(groups, -1, inputs, math.prod(weight.shape[2:]))
    sums = squares.sum((1, 3)).reshape(-1)
    if groups == 1:
        return sums
    return sums.clamp(max=16 * float(sums.median())) ** 0.7
