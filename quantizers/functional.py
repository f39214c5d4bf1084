"""Uniform quantization of a tensor: real values to integers and back, and the gradient that training uses.

    q = clamp(round(x / scale), low, high)          x^ = scale * q

Rounding is half to even (`torch.round`). The zero point is 0, so real 0 is exact and padding costs nothing. One bit, where
there is room for a sign only, is q = sign(x) in {-1, +1} with sign(0) = +1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_BITS = 8


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of a width: 0..2^b - 1 unsigned; symmetric -(2^(b-1) - 1)..2^(b-1) - 1 signed.

    One signed bit stands for -1 and +1. Raises ValueError for bits outside 1..8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, not {bits!r}")
    if not signed:
        return 0, 2**bits - 1
    largest = max(1, 2 ** (bits - 1) - 1)
    return -largest, largest


def quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Integers, kept in x's floating type, of a tensor. `scale` (> 0) must broadcast against x."""
    if bits == 1 and signed:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    low, high = integer_range(bits, signed)
    return (x / scale).round_().clamp_(low, high)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Real values of integers."""
    return q * scale


def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """`dequantize(quantize(x))`, bit for bit, with the straight-through gradient of Bengio et al. 2013 (arXiv 1308.3432).

    The gradient passes where low <= x / scale <= high, both included, and is zero where x was clipped; at one signed bit
    it passes everywhere. A scale that requires a gradient gets that of LSQ (Esser et al., ICLR 2020, equation 3):
    round(x / scale) - x / scale where x passes, the bound where it was clipped; sign(x) at one signed bit.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, scale, bits, signed)
        return result
    return quantize(x, scale, bits, signed).mul_(scale)


class _FakeQuantize(torch.autograd.Function):
    # The mask is written out because the gradient of clamp at its bound differs between versions of torch.

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        q = quantize(x, scale, bits, signed)
        low, high = integer_range(bits, signed)
        ratio = x / scale
        everywhere = bits == 1 and signed
        inside = torch.ones_like(x, dtype=torch.bool) if everywhere else (ratio >= low) & (ratio <= high)
        slope = None
        if ctx.needs_input_grad[1]:
            slope = q.clone() if everywhere else torch.where(inside, q - ratio, q)
        ctx.save_for_backward(inside, slope)
        ctx.scale_shape = scale.shape
        return q.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        to_scale = None if slope is None else (gradient * slope).sum_to_size(ctx.scale_shape)
        return gradient * inside if ctx.needs_input_grad[0] else None, to_scale, None, None
