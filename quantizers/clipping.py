"""Scales of weights by what the layer's output loses, for every width from 1 to 8 bits at once."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from quantizers.functional import FEW_BITS, fake_quantize, integer_range
from quantizers.moments import InputMoments

# An error that is a multiple of the output itself counts so much more than one that isn't: it has the
# same sign everywhere, and adds up from layer to layer.
GAIN_WEIGHT = 10.0
# Where clipping ends, as a share of the largest weight, at widths 2..8; at one bit, between which
# multiples of the mean magnitude the scale lies.
LEAST_CLIPS = (0.3, 0.44, 0.58, 0.65, 0.72, 0.79, 0.86)
ONE_BIT = (0.5, 1.75)
# Candidates that are evenly spaced, at 2 to 4 bits and at other widths, where little depends on them; then, so
# often, two more halfway to the neighbours of the best.
COARSE = (16, 6)
FINE = (2, 1)
RANK = 32  # of what is kept of a covariance beside its diagonal
DENSE = 64  # inputs up to which all of it is
CHUNK = 1 << 18  # float32 numbers of all candidates that are measured at once


class OutputErrors:
    """The squared errors of a layer's output that scales of its weight leave.

    For the error dw of an output channel's weights it is dw^T C dw, and GAIN_WEIGHT times the part
    of it that is a multiple of the output: (dw^T C w)^2 / (w^T C w). Where an output has many
    inputs, C is approximated by its Nystroem approximation of RANK columns (Halko et al., SIAM
    Review 2011) and the diagonal of what that leaves out.
    """

    def __init__(self, weight: Tensor, moments: InputMoments, per_channel: bool = True) -> None:
        """Take what errors are of.

        Args:
            weight: A weight (C_out, ...).
            moments: What its layer's input was like.
            per_channel: Whether each output channel has a scale of its own; False: all have one.
        """
        self._per_channel, self._channels = per_channel, len(weight)
        covariance = moments.covariance()
        self._parts, self._groups = moments.parts, moments.groups
        self._rows = moments.grouped(weight.to(covariance))
        self._pull = self._rows @ covariance
        self._power = self._joined((self._rows * self._pull).sum(2)).clamp_min(torch.finfo(covariance.dtype).tiny)
        self._factor, self._rest = covariance, covariance.new_zeros(0)
        if moments.inputs > DENSE:
            self._factor, self._rest = _approximation(covariance)

    def of(self, scales: Tensor, bits: int) -> Tensor:
        """Return the errors (candidates, C_out) of candidate scales (candidates, C_out) at a width.

        Both are (candidates, 1) where all channels have one scale.
        """
        if not self._per_channel:
            return self._of_channels(scales.expand(-1, self._channels), bits).sum(1, keepdim=True)
        return self._of_channels(scales, bits)

    def _of_channels(self, scales: Tensor, bits: int) -> Tensor:
        count = len(scales)
        given = scales.to(self._rows).unflatten(1, (self._groups, -1)).transpose(0, 1).repeat_interleave(self._parts, 0)
        groups, channels, k = self._rows.shape
        some_channels = max(1, min(channels, CHUNK // (count * k)))
        some_groups = max(1, CHUNK // (count * k * some_channels))
        errors = given.new_empty(groups, count, channels)
        along = given.new_empty(groups, count, channels)
        for g in range(0, groups, some_groups):
            here = slice(g, g + some_groups)
            for c in range(0, channels, some_channels):
                piece = (here, slice(None), slice(c, c + some_channels))
                self._measure(piece, given[piece], bits, errors[piece], along[piece])
        errors, along = self._joined(errors), self._joined(along)
        return (errors + GAIN_WEIGHT * along.square() / self._power[:, None]).transpose(0, 1).flatten(1)

    def _measure(self, piece: tuple[slice, slice, slice], scales: Tensor, bits: int, errors: Tensor, along: Tensor) -> None:
        groups, _, channels = piece
        rows, steps = self._rows[groups, None, channels], scales[..., None]
        if bits == 1:
            left = torch.copysign(steps, rows)
        else:
            low, high = integer_range(bits, True)
            left = torch.mul(rows, 1 / steps).round_().clamp_(low, high).mul_(steps)
        torch.sub(rows, left, out=left)
        flat = left.flatten(1, 2)
        product = (flat @ self._factor[groups]).view(*left.shape[:3], -1)
        along.copy_((left * self._pull[groups, None, channels]).sum(3))
        if self._rest.numel():
            errors.copy_(product.square_().sum(3))
            errors += (flat.square_() @ self._rest[groups]).view_as(errors)
        else:
            errors.copy_(product.mul_(left).sum(3))

    def _joined(self, values: Tensor) -> Tensor:
        """Add up what belongs to parts of the same inputs: (groups x parts, ...) to (groups, ...)."""
        if self._parts == 1:
            return values
        return values.unflatten(0, (-1, self._parts)).sum(1)


def _approximation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return L (groups, k, RANK) and v (groups, k, 1), so that C is about L L^T + diag(v)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(covariance.shape[1], RANK, generator=generator).to(covariance)
    basis = torch.linalg.qr(covariance @ start).Q
    seen = covariance @ basis
    # C is nearly singular in some directions, where float32 knows no better.
    core = (basis.mT @ seen).double()
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    known = values > 1e-6 * values[:, -1:].clamp_min(torch.finfo(core.dtype).tiny)
    inverse = torch.where(known, values, 1.0).rsqrt() * known
    factor = seen @ (vectors * inverse[:, None]).to(seen)
    rest = covariance.diagonal(dim1=1, dim2=2) - factor.square().sum(2)
    return factor, rest.clamp_min(0)[..., None]


def output_scales(
    weight: Tensor,
    moments: InputMoments,
    power_of_two: bool = False,
    *,
    per_channel: bool = True,
    widths: Collection[int] = FEW_BITS,
) -> tuple[Tensor, Tensor]:
    """Find the scales of a weight that change the layer's output least (`OutputErrors`).

    Clipping points from the largest magnitude downwards are tried, then those around the best of
    them; at one bit multiples of mean |w|.

    Args:
        weight: The weight (C_out, ...), finite.
        moments: What the layer's input was like.
        power_of_two: Whether scales are rounded to powers of two.
        per_channel: Whether each output channel has a scale of its own; False: all have one.
        widths: Those that are looked at; the rows of others are 1.

    Returns:
        Scales (8, C_out), or (8, 1), 1 for a channel of zeros; and relative errors sum (w - w^)^2 /
        sum w^2 of the whole tensor (8,), both float32.
    """
    weight = weight.detach()
    magnitudes = weight.flatten(1).abs().float()
    if not per_channel:
        magnitudes = magnitudes.reshape(1, -1)
    errors = OutputErrors(weight, moments, per_channel)
    live = magnitudes.amax(1) > 0
    made = []
    for bits in FEW_BITS:
        if bits not in widths:
            made.append(torch.ones_like(magnitudes[:, 0]))
            continue
        if bits == 1:
            unit, (least, most) = magnitudes.mean(1), ONE_BIT
        else:
            unit, (least, most) = magnitudes.amax(1) / integer_range(bits, True)[1], (LEAST_CLIPS[bits - 2], 1.0)
        unit = torch.where(live, unit, 1.0)
        scale = _search(errors, unit, bits, least, most)
        if power_of_two:
            around = torch.stack([2 ** scale.log2().floor(), 2 ** scale.log2().ceil()])
            scale = _best(around, errors.of(around, bits))[0]
        made.append(torch.where(live, scale, 1.0))
    scales = torch.stack(made)
    return scales, _relative_errors(weight, scales, widths)


def _relative_errors(weight: Tensor, scales: Tensor, widths: Collection[int]) -> Tensor:
    """Return sum (w - w^)^2 / sum w^2 of a whole weight at some of the widths 1..8, with scales (8, C_out) or (8, 1)."""
    scales = scales.expand(-1, len(weight))
    rows = weight.flatten(1).float()
    left = rows.new_zeros(len(scales), dtype=torch.float64)
    count = max(1, CHUNK // max(1, rows.shape[1]))
    for some, steps in zip(rows.split(count), scales.split(count, 1), strict=True):
        for index, bits in enumerate(FEW_BITS):
            if bits not in widths:
                continue
            quantized = fake_quantize(some, steps[index][:, None], bits, True)
            left[index] += torch.sub(some, quantized, out=quantized).square_().sum(dtype=torch.float64)
    energy = rows.square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    asked = torch.tensor([bits in widths for bits in FEW_BITS], device=left.device)
    return torch.where(asked, left / energy, 1.0).float()


def _search(errors: OutputErrors, unit: Tensor, bits: int, least: float, most: float) -> Tensor:
    """Return the best multiples of a unit between two numbers, coarse steps first."""
    others = bits not in (2, 3, 4)
    count = COARSE[others]
    shares = torch.linspace(most, least, count, device=unit.device)
    if bits == 1:
        shares = torch.cat([torch.ones_like(shares[:1]), shares])
    distance = (most - least) / (count - 1)
    candidates = shares[:, None] * unit
    best, error = _best(candidates, errors.of(candidates, bits))
    for _ in range(FINE[others]):
        distance /= 2
        around = torch.stack([best + distance * unit, best - distance * unit])
        if bits > 1:
            around = torch.minimum(around, unit)
        found, left = _best(around, errors.of(around, bits))
        best, error = torch.where(left < error, found, best), torch.minimum(left, error)
    return best


def _best(candidates: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each channel the candidate of the smallest error, the first of equals, and its error."""
    least, index = errors.min(0)
    return candidates.gather(0, index[None])[0], least
