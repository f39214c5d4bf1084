"""GPTQ: weights that are rounded one input after another, each making up for the errors of those before."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from quantizers.functional import FEW_BITS, MAX_BITS, integer_range, refuse_infinite, sign
from quantizers.moments import InputMoments

BLOCK = 32  # inputs whose errors reach the inputs behind the block together
MOST_VALUES = 1 << 23  # weights times widths that are rounded at once, float32
LARGEST_OFFSET = 127
TOLERANCE = 1e-5  # of the terms that a gain is the sum of: what float32 can tell


def gptq(
    weight: Tensor,
    scales: Tensor,
    moments: InputMoments,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    widths: Iterable[int] = FEW_BITS,
) -> Tensor:
    """Round a layer's weight at every width from 1 to 8 bits so that the layer's output changes little: GPTQ.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (ICLR 2023). Weights are rounded one input after another; the error of each is
    made up for by the inputs that follow, as well as dw^T C dw allows, where C is the second
    moment of the layer's patches. It is computed from the Cholesky factor C = L L^T itself and not
    from that of its inverse, which gives the same integers: an input i whose followers have left
    dw_j is rounded to the nearest of w_i + sum_j L_ji dw_j / L_ii. All widths and all output
    channels share the factor and go through it together.

    An output channel whose error dw^T C dw isn't smaller than that of rounding to nearest keeps
    the latter. An input that never varied is rounded to nearest, too.

    Args:
        weight: The weight (C_out, ...).
        scales: Its scales at widths 1..8, (8, C_out); further rows aren't looked at.
        moments: What its input was like.
        act_order: Whether inputs that vary most come first, while others can still make up for
            them; False: in the order in which they lie.
        damping: What is added to the diagonal of C, as a multiple of its mean.
        widths: The widths for which there shall be offsets; not 16, where rounding to nearest loses nothing.

    Returns:
        Offsets, int8 (8, *weight.shape): what must be added to the weight's integers at width b, rounded
        to nearest and clamped (`quantize_tensor`). Zeros at widths that weren't asked for.

    Raises:
        ValueError: For fewer patches than inputs of an output, for a weight or moments that aren't
            finite, and for damping that isn't positive.
    """
    refuse_infinite(weight)
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive, as 0.01, not {damping!r}")
    refuse_few_patches(moments)
    widths = list(widths)
    made = torch.zeros(MAX_BITS, *weight.shape, dtype=torch.int8, device=weight.device)
    if not widths or not weight.numel():
        return made
    covariance = moments.covariance()
    rows = moments.grouped(weight.detach().to(covariance))
    steps = scales.detach().to(covariance).unflatten(1, (moments.groups, -1)).movedim(1, 0)
    steps = steps.repeat_interleave(moments.parts, 0)[:, [bits - 1 for bits in widths]]
    order, factor = _factor(covariance, act_order, damping)
    # A few output channels at a time, so that memory is bounded.
    count = max(1, MOST_VALUES // (len(rows) * len(widths) * moments.inputs))
    pieces = []
    for some, step in zip(rows.split(count, 1), steps.split(count, 2), strict=True):
        grid = _Grid(step, widths)
        chosen = _round_in_turn(some, grid, order, factor)
        pieces.append(_kept_offsets(some, grid, chosen, covariance, moments.parts))
    made[[bits - 1 for bits in widths]] = moments.ungrouped(torch.cat(pieces, 2))
    return made


def refuse_few_patches(moments: InputMoments) -> None:
    """Raise ValueError, saying how many images would be enough, for fewer patches than inputs of an output.

    So few leave directions in which nothing is known of an error, and rounding would put as much of
    it there as it can.
    """
    if not moments.is_product:
        raise ValueError(
            f"layer {moments.layer!r} calls neither F.linear nor torch's convolution with a weight of its shape, so that GPTQ "
            "can't know what its weight is multiplied with: round it to nearest"
        )
    needed = moments.inputs * moments.parts
    if moments.suffice():
        return
    images = needed
    if moments.patches:
        images = -(-needed * moments.images // moments.patches)
    raise ValueError(
        f"layer {moments.layer!r}: GPTQ needs at least {needed} patches of its input, one for each input of an output, and "
        f"calibration gave {moments.patches} in {moments.images} images: calibrate with at least {images} images, or round to "
        "nearest"
    )


def _factor(covariance: Tensor, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """Return the order in which inputs are rounded, last first (groups, k), and L / diag(L) in that order (groups, k, k)."""
    variances = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
    order = torch.arange(covariance.shape[1], device=covariance.device).flip(0).expand(len(covariance), -1)
    if act_order:
        order = variances.argsort(dim=1, stable=True)
    added = damping * variances.mean(1, keepdim=True)
    added = torch.where(added > 0, added, 1.0).double()
    ordered = torch.take_along_dim(covariance, order[:, :, None], 1).take_along_dim(order[:, None], 2).double()
    ordered.diagonal(dim1=1, dim2=2).copy_(torch.take_along_dim(variances, order, 1) + added)
    factor = torch.linalg.cholesky(ordered)
    factor /= factor.diagonal(dim1=1, dim2=2)[:, None].clone()
    return order, factor.to(covariance.dtype)


class _Grid:
    """The levels of some widths and output channels: the integers times * clamp(floor(w / step + half), low, high) + plus.

    That is rounding to nearest; at one bit, where the step is twice the scale, it is the sign.

    Attributes:
        widths: The widths.
        scales: (groups, widths, channels).
    """

    def __init__(self, scales: Tensor, widths: list[int]) -> None:
        """Take the scales and their widths."""
        self.widths, self.scales = widths, scales
        rows = []
        for bits in widths:
            row = (1.0, 0.5, *map(float, integer_range(bits, True)), 0.0)
            if bits == 1:
                row = (2.0, 0.0, -1.0, 0.0, 1.0)
            rows.append(row)
        self.times, self.half, self.low, self.high, self.plus = scales.new_tensor(rows).T[:, None, :, None]

    def nearest(self, rows: Tensor) -> Tensor:
        """Return weights (groups, channels, k) as integers (groups, widths, channels, k)."""
        made = (rows[:, None] / self.scales[..., None]).round_()
        for index, bits in enumerate(self.widths):
            if bits == 1:
                made[:, index] = sign(rows)
        high = self.high * self.times + self.plus
        return made.clamp_(-high[..., None], high[..., None])


def _round_in_turn(rows: Tensor, grid: _Grid, order: Tensor, factor: Tensor) -> Tensor:
    """Round weights from the last input of an order to the first, each making up for those before.

    Args:
        rows: The weights (groups, channels, k).
        grid: Their levels.
        order: The order of inputs (groups, k).
        factor: L / diag(L) in that order (groups, k, k).

    Returns:
        Integers (groups, widths, channels, k).
    """
    groups, channels, k = rows.shape
    shape = (groups, len(grid.widths), channels)

    def flat(values: Tensor) -> Tensor:
        return values.expand(shape).reshape(groups, -1)

    half, low, high = flat(grid.half), flat(grid.low), flat(grid.high)
    step = grid.scales * grid.times
    inverse, times, plus = flat(1 / step), flat(step), flat(grid.scales * grid.plus)
    # Inputs come first, so that one input of all channels and widths is one piece of memory.
    weights = torch.take_along_dim(rows, order[:, None], 2).mT
    weights = weights.repeat(1, 1, len(grid.widths))
    target = weights.clone()  # what is rounded: the weight and what others have left to it
    integers = torch.empty_like(target)
    for end in range(k, 0, -BLOCK):
        start = max(0, end - BLOCK)
        for i in range(end - 1, start - 1, -1):
            z = integers[:, i]
            torch.addcmul(half, target[:, i], inverse, out=z)
            z.floor_().clamp_(low, high)
            left = weights[:, i]
            left.sub_(plus).addcmul_(z, times, value=-1)
            if i > start:
                target[:, start:i].baddbmm_(factor[:, i, start:i, None], left[:, None])
        if start:
            target[:, :start].baddbmm_(factor[:, start:end, :start].mT, weights[:, start:end])
    del weights, target
    integers = integers.mul_(flat(grid.times)[:, None]).add_(flat(grid.plus)[:, None])
    made = torch.empty_like(integers).scatter_(1, order[:, :, None].expand_as(integers), integers)
    return made.unflatten(2, shape[1:]).movedim(1, -1)


def _kept_offsets(rows: Tensor, grid: _Grid, chosen: Tensor, covariance: Tensor, parts: int) -> Tensor:
    """Return chosen integers as offsets from rounding to nearest, int8, zero in channels where that is as good.

    Args:
        rows: The weights (groups, channels, k).
        grid: Their levels.
        chosen: The integers (groups, widths, channels, k).
        covariance: The second moments (groups, k, k).
        parts: How many consecutive groups belong to the same channels.

    Returns:
        Offsets of the shape of `chosen`.
    """
    nearest = grid.nearest(rows)
    # An offset that int8 doesn't hold stands for nothing.
    chosen = torch.where((chosen - nearest).abs() <= LARGEST_OFFSET, chosen, nearest)
    scales = grid.scales[..., None]
    first, second = rows[:, None] - scales * nearest, rows[:, None] - scales * chosen
    # x^T C x - y^T C y = (x - y)^T C (x + y)
    product = (first + second).flatten(1, 2) @ covariance
    terms = product.view_as(first).mul_(first - second)
    gain = terms.sum(3).unflatten(0, (-1, parts)).sum(1)
    doubt = terms.abs_().sum(3).unflatten(0, (-1, parts)).sum(1)
    better = (gain > TOLERANCE * doubt).repeat_interleave(parts, 0)[..., None]
    return torch.where(better, chosen - nearest, 0).to(torch.int8)
