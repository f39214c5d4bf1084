"""Uniform quantization of a tensor: real values to integers and back, and the gradient that training uses.

    q = clamp(round(x / scale) + zero point, low, high)          x^ = scale * (q - zero point)

Rounding is half to even (`torch.round`). Without a zero point real 0 is exact, and with one too, if
it is an integer. One signed bit, where there is room for a sign only, is q = sign(x) in {-1, +1}
with sign(0) = +1. float16 and bfloat16 are computed in float32 and come back as they were.

The lower half of the file is what schemes are built of: exact gradients at bounds, and arithmetic
that stays in the cache.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_BITS = 8  # the widest of the few-bit widths
WIDE_BITS = 16  # the one wider width: rounding to it loses next to nothing
FEW_BITS = range(1, MAX_BITS + 1)
WIDTHS = (*FEW_BITS, WIDE_BITS)  # of integers: 1 to 8 bits, and 16
ACCEPTED = f"1 to {MAX_BITS}, {WIDE_BITS} or float"  # of an operand, in messages
# Elements that are divided, rounded, clamped and multiplied while they are in the processor's
# cache.
BLOCK = 1 << 18
PLAIN_TYPES = (Tensor, nn.Parameter)
# Learned steps and clips are used as max(|s|, FLOOR): whatever an optimizer makes of them, they are
# positive.
FLOOR = 1e-8


def integer_range(bits: int, signed: bool, narrow: bool = True) -> tuple[int, int]:
    """Return the smallest and the largest integer of a width.

    Args:
        bits: The width, 1..8 or 16.
        signed: False: 0..2^b - 1. True: symmetric, -(2^(b-1) - 1)..2^(b-1) - 1; one signed bit
            stands for -1 and +1.
        narrow: False adds one signed integer below, -2^(b-1).

    Returns:
        The two integers.

    Raises:
        ValueError: For bits that aren't in `WIDTHS`, and for one signed bit that isn't narrow.

    Examples:
        >>> integer_range(4, signed=True), integer_range(4, signed=False)
        ((-7, 7), (0, 15))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WIDTHS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, or {WIDE_BITS}, not {bits!r}")
    if not signed:
        return 0, 2**bits - 1
    if bits == 1 and not narrow:
        raise ValueError("one signed bit has no range from -1 to 0: use the narrow one, -1 and +1")
    largest = max(1, 2 ** (bits - 1) - 1)
    if narrow:
        return -largest, largest
    return -largest - 1, largest


def quantize_tensor(
    x: Tensor, scale: Tensor, bits: int, signed: bool, *, zero_point: Tensor | None = None, narrow: bool = True
) -> Tensor:
    """Round a tensor to integers.

    Args:
        x: Real values.
        scale: The real value of 1, positive; must broadcast against x.
        bits: The width, 1..8 or 16.
        signed: Whether the integers are.
        zero_point: The integer that stands for real 0; must broadcast against x. None: 0.
        narrow: As in `integer_range`.

    Returns:
        Integers, kept in x's floating type.

    Raises:
        ValueError: For a width without such integers.
    """
    if bits == 1 and signed:
        return sign(x)
    q = rounded(x, scale, *_bounds(bits, signed, narrow, zero_point), rescale=False)
    if zero_point is None:
        return q
    return q.add_(zero_point.to(q.dtype))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Turn integers into real values.

    Args:
        q: Integers, in a floating type.
        scale: The real value of 1; must broadcast against q.
        zero_point: The integer that stands for real 0. None: 0.

    Returns:
        scale * (q - zero_point), in q's type.
    """
    centred = q
    if zero_point is not None:
        centred = q - zero_point.to(q.dtype)
    return (centred.to(computed_in(q)) * scale).to(q.dtype)


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
    """Compute `dequantize(quantize_tensor(x))`, bit for bit, with a gradient that training can use.

    It is the straight-through gradient of Bengio et al. 2013 (arXiv 1308.3432): it passes where low
    <= x / scale + zero point <= high, both included, and is zero where x was clipped; at one signed
    bit it passes everywhere. A scale that requires a gradient gets that of LSQ (Esser et al., ICLR
    2020, equation 3): round(x / scale) - x / scale where x passes, the bound where it was clipped;
    sign(x) at one signed bit.

    Args:
        x: Real values.
        scale: The real value of 1, positive; must broadcast against x.
        bits: The width, 1..8 or 16.
        signed: Whether the integers are.
        zero_point: The integer that stands for real 0; must broadcast against x. None: 0.
        narrow: As in `integer_range`.
        reuse: With gradients disabled, the result may lie in memory that the thread uses again
            once nothing refers to the result any more.

    Returns:
        Real values on the grid, of x's shape and type.

    Raises:
        ValueError: For a width without such integers.

    Examples:
        >>> fake_quantize(torch.tensor([0.1, 0.26, 9.0]), torch.tensor(0.25), bits=2, signed=False)
        tensor([0.0000, 0.2500, 0.7500])
    """
    low, high = _bounds(bits, signed, narrow, zero_point)
    if differentiated(x, scale):
        result: Tensor = _FakeQuantize.apply(x, scale, low, high, bits == 1 and signed)
        return result
    if bits == 1 and signed:
        return dequantize(sign(x), scale)
    return rounded(x, scale, low, high, rescale=True, reuse=reuse)


def _bounds(bits: int, signed: bool, narrow: bool, zero_point: Tensor | None) -> tuple[Any, Any]:
    """Return the bounds of q - zero point: numbers, or tensors if there is a zero point."""
    low, high = integer_range(bits, signed, narrow)
    if zero_point is None:
        return low, high
    return low - zero_point, high - zero_point


def sign(x: Tensor) -> Tensor:
    """Return -1 or +1 for every value, +1 at zero, in x's type."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """Return the type in which a tensor's values are computed: float32 for the half precisions, else its own."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return x.dtype


def differentiated(*tensors: Tensor) -> bool:
    """Say whether autograd is to record what is computed from these tensors.

    `torch.jit.trace` can't write down gradients of our own, and checks what it traced without any:
    a traced network has none at its roundings, and a warning says so.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():
        return True
    warnings.warn("a traced network isn't one to train: its roundings have no gradient", torch.jit.TracerWarning, stacklevel=2)
    return False


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Compute an autograd function.

    Args:
        function: Its class.
        *arguments: What its `forward` takes after the context.

    Returns:
        Its result. Where nothing is differentiated it is computed in torch's own operations, which
        `torch.jit.trace` can write down.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    made: Tensor
    if differentiated(*tensors):
        made = function.apply(*arguments)
    else:
        made = function.forward(_NoContext(), *arguments)
    return made


class _NoContext:
    """What stands for an autograd function's context where there is no backward pass."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save nothing."""


def followed(*tensors: Tensor) -> bool:
    """Say whether more than torch's plain arithmetic happens with these tensors.

    That is where the compiler, `torch.jit.trace`, a transform such as `vmap`, or a mode such as
    `FakeTensorMode` looks on, and with tensors of a class of their own. Results that were kept, or
    that are written in pieces, would be wrong there, or an error.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(tensor) not in PLAIN_TYPES for tensor in tensors)


def blockwise(*tensors: Tensor) -> bool:
    """Say whether `blocks` divides tensors like these: autograd can't follow results that are written in pieces."""
    return tensors[0].numel() > BLOCK and not differentiated(*tensors) and not followed(*tensors)


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Divide tensors of one shape into pieces along the first dimension.

    What one operation leaves in the processor's cache is there for the next.
    """
    if not blockwise(*tensors):
        return [tensors]
    rows = max(1, BLOCK // tensors[0][0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def rounded(x: Tensor, scale: Tensor, low: Any, high: Any, *, rescale: bool, reuse: bool = False) -> Tensor:
    """Compute clamp(round(x / scale), low, high), without a gradient of its own.

    Args:
        x: Real values.
        scale: The real value of 1; must broadcast against x.
        low: The smallest integer, a number or a tensor.
        high: The largest, likewise.
        rescale: Whether the integers are multiplied by the scale again.
        reuse: As in `fake_quantize`.

    Returns:
        Integers or real values, of x's shape and type.
    """
    dtype = computed_in(x)
    per_tensor = scale.dim() == 0 and (isinstance(low, int) or low.dim() == high.dim() == 0)
    if not blockwise(x, scale) or not per_tensor or x.dtype != dtype:
        q = (x.to(dtype) / scale).round_().clamp_(low, high)
        if rescale:
            q = q.mul_(scale)
        return q.to(x.dtype)
    made = result_like(x, reuse)
    for source, target in blocks(x, made):
        torch.div(source, scale, out=target).round_()
        if isinstance(low, int):
            target.clamp_(low, high)
        else:
            # With bounds that are tensors, clamp takes twice as long as these two.
            torch.maximum(torch.minimum(target, high, out=target), low, out=target)
        if rescale:
            target.mul_(scale)
    return made


REUSED = {torch.float32: "float32", torch.float64: "float64"}  # types that NumPy has, too
_local = threading.local()


def result_like(x: Tensor, reuse: bool) -> Tensor:
    """Return an empty tensor like x; if `reuse`, and if it can be done, in memory that this thread keeps.

    Getting tens of megabytes anew for every layer takes as long as a quarter of the arithmetic.
    """
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    # With gradients enabled, a layer whose input needs none keeps it all the same, for the gradient
    # of its weight.
    if not reuse or x.device.type != "cpu" or not dense or x.dtype not in REUSED or torch.is_grad_enabled():
        return torch.empty_like(x)
    # The tensor that was given out last refers to an array of ours, which dies with the last view of
    # it, wherever that is: in a layer around this one, in what a layer returned, in a hook, in
    # another thread.
    given = getattr(_local, "given", None)
    if given is not None and given() is not None:
        return torch.empty_like(x)
    memory: np.ndarray | None = getattr(_local, "memory", None)
    if memory is None or memory.nbytes < x.nbytes:
        memory = _local.memory = torch.empty(x.nbytes, dtype=torch.uint8).numpy()
    strides = [step * x.itemsize for step in x.stride()]
    array: np.ndarray = np.ndarray(tuple(x.shape), REUSED[x.dtype], memory, strides=strides)
    _local.given = weakref.ref(array)
    return torch.from_numpy(array)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, bipolar: bool) -> Tensor:
        dtype = computed_in(x)
        learns_scale = ctx.needs_input_grad[1]
        ctx.scale_shape = scale.shape
        slope = None
        if bipolar:
            q = sign(x)
            if learns_scale:
                slope = q.to(dtype)
            ctx.save_for_backward(None, slope)
            return dequantize(q, scale)
        ratio = x.to(dtype) / scale
        q = torch.round(ratio).clamp_(low, high)
        if learns_scale:
            slope = torch.where((ratio >= low) & (ratio <= high), q - ratio, q)
        ctx.save_for_backward(ratio, slope)
        ctx.bounds = low, high
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        ratio, slope = ctx.saved_tensors
        to_x = to_scale = None
        if slope is not None:
            to_scale = (gradient * slope).sum_to_size(ctx.scale_shape)
        if ctx.needs_input_grad[0]:
            to_x = gradient
            if ratio is not None:
                to_x = inside(gradient, ratio, *ctx.bounds)
        return to_x, to_scale, None, None, None


def inside(gradient: Tensor, x: Tensor, low: Any, high: Any, *, strict: bool = False) -> Tensor:
    """Let a gradient pass where x is between two bounds, and make it zero elsewhere.

    It is an explicit mask, since the gradient of clamp at its bound differs between versions of
    torch.

    Args:
        gradient: The gradient, of x's shape.
        x: The values that are looked at.
        low: The lower bound, a number or a tensor.
        high: The upper bound, likewise.
        strict: Whether values exactly on a bound are outside.

    Returns:
        The gradient where low <= x <= high (`strict`: low < x < high), else zero.
    """
    plain = not isinstance(low, Tensor) and not isinstance(high, Tensor) and x.dtype == gradient.dtype == torch.float32
    if not plain or torch.compiler.is_compiling():
        if strict:
            mask = (x > low) & (x < high)
        else:
            mask = (x >= low) & (x <= high)
        return torch.where(mask, gradient, 0)
    # One pass over memory instead of four. The operator's own bounds are the next floats outside
    # (or inside), so that what becomes of low and high themselves doesn't hang on whether its
    # bounds are in or out.
    below, above = _neighbours(float(low), float(high), not strict)
    return torch.ops.aten.hardtanh_backward(gradient, x, below, above)  # type: ignore[no-any-return]


@functools.cache
def _neighbours(low: float, high: float, outside: bool) -> tuple[float, float]:
    """Return the float32 next to low and to high, outside or inside of them."""
    towards_low, towards_high = -torch.inf, torch.inf
    if not outside:
        towards_low, towards_high = torch.inf, -torch.inf
    return _next_float(low, towards_low), _next_float(high, towards_high)


def _next_float(value: float, towards: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(towards)).item()


def positive(x: Tensor) -> Tensor:
    """Compute max(|x|, FLOOR) with the gradient of |x|, 1 at zero: below the floor too, so that what fell there can leave."""
    return applied(_Positive, x)


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().clamp_(min=max(FLOOR, torch.finfo(x.dtype).tiny))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x >= 0, gradients[0], -gradients[0])


def scaled_gradient(scale: Tensor, factor: float) -> Tensor:
    """Return the scale itself, with its gradient multiplied by a factor.

    In LSQ the factor is 1 / sqrt(values x largest integer) (Esser et al., section 2.2).
    """
    if not differentiated(scale):
        return scale
    scaled: Tensor = _ScaledGradient.apply(scale, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """Return a value in the place of x: what gradients reach it goes on to x."""
    return applied(_WithValue, x, value)


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def relative_error(x: Tensor, quantized: Tensor) -> Tensor:
    """Compute sum (x - x^)^2 / sum x^2 in float64; 0 where x is all zero."""
    x = x.double()
    return (x - quantized).square().sum() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def relative_error_up_to_a_factor(x: Tensor, quantized: Tensor) -> Tensor:
    """Compute the smallest relative error over all multiples of x^, which a batch norm makes up for.

    It is 1 - cos^2 of the angle between the two; 0 where one of them is all zero.
    """
    x, y = x.double(), quantized.double()
    product = x.square().sum() * y.square().sum()
    if product > 0:
        return 1 - (x * y).sum().square() / product
    return x.new_zeros(())


def refuse_infinite(weight: Tensor) -> None:
    """Raise ValueError, saying its shape, for a weight that holds infinities or NaN."""
    if not weight.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite")


def row_of(bits: int) -> int:
    """Return which row of a tensor by width belongs to a width.

    Args:
        bits: 1 to 8, or 16.

    Returns:
        0 for 1 bit, 7 for 8 bits, 8 for 16 bits.

    Examples:
        >>> row_of(8), row_of(16)
        (7, 8)
    """
    return WIDTHS.index(bits)


def row(table: Tensor, bits: int) -> Tensor:
    """Return the entry of a width in a tensor whose rows are `WIDTHS`, or the first eight of them.

    Raises:
        ValueError: For 16 bits, in a tensor that has no row for it.
    """
    place = row_of(bits)
    if place >= len(table):
        raise ValueError(f"nothing is known of {bits} bits: there are values for 1 to {len(table)} bits only")
    return table[place]


def set_rows(table: Tensor, values: Tensor) -> None:
    """Copy values by width into a tensor, into as many rows as it has."""
    table.copy_(values[: len(table)])


def along_channels(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value per output channel to broadcast against a weight (C_out, ...)."""
    return values.view(-1, *[1] * (weight.dim() - 1))
