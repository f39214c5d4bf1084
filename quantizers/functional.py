"""Uniform quantization of a tensor: real values to integers and back, and the gradient that training uses.

    q = clamp(round(x / scale) + zero point, low, high)          x^ = scale * (q - zero point)

Rounding is half to even (`torch.round`). Without a zero point real 0 is exact, and with one too, if it is an integer. One
signed bit, where there is room for a sign only, is q = sign(x) in {-1, +1} with sign(0) = +1. float16 and bfloat16 are
computed in float32 and come back as they were.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MAX_BITS = 8
# Elements that are divided, rounded, clamped and multiplied while they are in the processor's cache.
BLOCK = 1 << 18


def integer_range(bits: int, signed: bool, narrow: bool = True) -> tuple[int, int]:
    """Smallest and largest integer of a width: 0..2^b - 1 unsigned; -(2^(b-1) - 1)..2^(b-1) - 1 signed, symmetric; with
    `narrow=False` one more below, -2^(b-1).

    One signed bit stands for -1 and +1. Raises ValueError for bits outside 1..8, and for one signed bit that isn't narrow.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, not {bits!r}")
    if not signed:
        return 0, 2**bits - 1
    if bits == 1 and not narrow:
        raise ValueError("one signed bit has no range from -1 to 0: use the narrow one, -1 and +1")
    largest = max(1, 2 ** (bits - 1) - 1)
    return -largest if narrow else -largest - 1, largest


def quantize(
    x: Tensor, scale: Tensor, bits: int, signed: bool, *, zero_point: Tensor | None = None, narrow: bool = True
) -> Tensor:
    """Integers, kept in x's floating type. `scale` (> 0) and the integer-valued `zero_point` must broadcast against x."""
    if bits == 1 and signed:
        return _sign(x)
    q = _rounded(x, scale, *_bounds(bits, signed, narrow, zero_point), rescale=False)
    return q if zero_point is None else q.add_(zero_point.to(q.dtype))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Real values of integers, in q's type."""
    centred = q if zero_point is None else q - zero_point.to(q.dtype)
    return (centred.to(_computed_in(q)) * scale).to(q.dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signed: bool,
    *,
    zero_point: Tensor | None = None,
    narrow: bool = True,
    reuse: bool = False,
) -> Tensor:
    """`dequantize(quantize(x))`, bit for bit, with the straight-through gradient of Bengio et al. 2013 (arXiv 1308.3432).

    The gradient passes where low <= x / scale + zero point <= high, both included, and is zero where x was clipped; at one
    signed bit it passes everywhere. A scale that requires a gradient gets that of LSQ (Esser et al., ICLR 2020, equation 3):
    round(x / scale) - x / scale where x passes, the bound where it was clipped; sign(x) at one signed bit.

    With `reuse`, and with gradients disabled, the result may lie in memory that the thread's next call with it writes over.
    """
    low, high = _bounds(bits, signed, narrow, zero_point)
    if differentiated(x, scale):
        result: Tensor = _FakeQuantize.apply(x, scale, low, high, bits == 1 and signed)
        return result
    if bits == 1 and signed:
        return dequantize(_sign(x), scale)
    return _rounded(x, scale, low, high, rescale=True, reuse=reuse)


def _bounds(bits: int, signed: bool, narrow: bool, zero_point: Tensor | None) -> tuple[Any, Any]:
    """Bounds of q - zero point: numbers, or tensors if there is a zero point."""
    low, high = integer_range(bits, signed, narrow)
    return (low, high) if zero_point is None else (low - zero_point, high - zero_point)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def differentiated(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def blockwise(*tensors: Tensor) -> bool:
    """Whether `blocks` divides tensors like these: autograd and the compiler can't follow results written piece by piece."""
    return tensors[0].numel() > BLOCK and not torch.compiler.is_compiling() and not differentiated(*tensors)


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces along the first dimension, so that what one operation leaves in the processor's cache is
    there for the next."""
    if not blockwise(*tensors):
        return [tensors]
    rows = max(1, BLOCK // tensors[0][0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _rounded(x: Tensor, scale: Tensor, low: Any, high: Any, *, rescale: bool, reuse: bool = False) -> Tensor:
    """clamp(round(x / scale), low, high), times the scale if `rescale`."""
    dtype = _computed_in(x)
    per_tensor = scale.dim() == 0 and isinstance(low, int)
    if not blockwise(x, scale) or not per_tensor or x.dtype != dtype:
        q = (x.to(dtype) / scale).round_().clamp_(low, high)
        return (q.mul_(scale) if rescale else q).to(x.dtype)
    made = _workspace(x) if reuse else torch.empty_like(x)
    for source, target in blocks(x, made):
        torch.div(source, scale, out=target).round_().clamp_(low, high)
        if rescale:
            target.mul_(scale)
    return made


_local = threading.local()


def _workspace(x: Tensor) -> Tensor:
    """A tensor like x in memory that this thread keeps: getting tens of megabytes anew for every layer takes as long as a
    quarter of the arithmetic."""
    kept: Tensor | None = getattr(_local, "kept", None)
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    # With gradients enabled, a layer whose input needs none keeps it all the same, for the gradient of its weight.
    if x.device.type != "cpu" or not dense or torch.is_grad_enabled():
        return torch.empty_like(x)
    if (
        kept is None
        or kept.numel() < x.numel()
        or kept.dtype != x.dtype
        or kept.is_inference() != torch.is_inference_mode_enabled()
    ):
        kept = _local.kept = torch.empty(x.numel(), dtype=x.dtype)
    return kept.as_strided(x.shape, x.stride())


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, bipolar: bool) -> Tensor:
        dtype = _computed_in(x)
        if bipolar:
            q = _sign(x)
            ctx.save_for_backward(None, q.to(dtype) if ctx.needs_input_grad[1] else None)
            ctx.scale_shape = scale.shape
            return dequantize(q, scale)
        ratio = x.to(dtype) / scale
        q = torch.round(ratio).clamp_(low, high)
        slope = None
        if ctx.needs_input_grad[1]:
            slope = torch.where((ratio >= low) & (ratio <= high), q - ratio, q)
        ctx.save_for_backward(ratio, slope)
        ctx.bounds, ctx.scale_shape = (low, high), scale.shape
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        ratio, slope = ctx.saved_tensors
        to_scale = None if slope is None else (gradient * slope).sum_to_size(ctx.scale_shape)
        to_x = gradient
        if ratio is not None and ctx.needs_input_grad[0]:
            to_x = inside(gradient, ratio, *ctx.bounds)
        return to_x if ctx.needs_input_grad[0] else None, to_scale, None, None, None


def inside(gradient: Tensor, x: Tensor, low: Any, high: Any, *, strict: bool = False) -> Tensor:
    """The gradient where low <= x <= high (`strict`: low < x < high), and zero elsewhere: an explicit mask, since the gradient
    of clamp at its bound differs between versions of torch."""
    plain = not isinstance(low, Tensor) and not isinstance(high, Tensor) and x.dtype == gradient.dtype == torch.float32
    if not plain or torch.compiler.is_compiling():
        mask = (x > low) & (x < high) if strict else (x >= low) & (x <= high)
        return torch.where(mask, gradient, 0)
    # One pass over memory instead of four. The operator's own bounds are the next floats outside (or inside), so that what
    # becomes of low and high themselves doesn't hang on whether its bounds are in or out.
    below, above = _neighbours(float(low), float(high), not strict)
    return torch.ops.aten.hardtanh_backward(gradient, x, below, above)  # type: ignore[no-any-return]


@functools.cache
def _neighbours(low: float, high: float, outside: bool) -> tuple[float, float]:
    """The float32 next to low and to high, outside or inside of them."""
    ends = (-torch.inf, torch.inf) if outside else (torch.inf, -torch.inf)
    low, high = (torch.nextafter(torch.tensor(x), torch.tensor(end)).item() for x, end in zip((low, high), ends, strict=True))
    return low, high
