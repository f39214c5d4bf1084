"""DoReFa: weights squashed into -1..1 and activations clipped to 0..1. The gradient is written out, ties included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.functional import (
    MAX_BITS,
    WIDE_BITS,
    WIDTHS,
    applied,
    blocks,
    blockwise,
    computed_in,
    differentiated,
    inside,
    integer_range,
    refuse_infinite,
    relative_error_up_to_a_factor,
    result_like,
    row_of,
    sign,
)
from quantizers.observers import Observer
from quantizers.scheme import Scheme, SchemeLayer


@dataclass(frozen=True)
class DoReFa(Scheme, name="dorefa"):
    """Zhou et al. 2016, "DoReFa-Net" (arXiv 1606.06160), with q_k(r) = round((2^k - 1) r) / (2^k - 1).

        weights, k > 1     2 q_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1          (section 2.3)
        weights, k = 1     sign(w) mean|w|, one mean per layer, sign(0) = +1
        activations        q_k(clip(x, 0, 1))                                  (section 2.4)

    Rounding passes the gradient on; the rest of the weights' formula has its own, that of the
    maximum included. At one bit it passes as it is; activations pass it where 0 <= x <= 1, both
    included. Gradients themselves aren't quantized.

    Weights end up in -1..1 whatever they were, without a level at zero, and activations above 1 or
    below 0 are lost: this is for training a network with batch norms, not for quantizing one that
    is trained. It needs no data.

    As integers, weights of k > 1 bits are odd multiples of 1 / (2^k - 1): there is no zero among
    them, and they take one bit more.

    A layer's tensors: weight_error (9,), relative and up to a factor, and activation_error (9,), 1
    if there are no data.
    """

    summary: ClassVar[str] = "weights through tanh into -1..1, inputs clipped to 0..1; for training (Zhou et al. 2016)"
    of_weight: ClassVar[tuple[str, ...]] = ()
    needs_data: ClassVar[bool] = False
    for_training: ClassVar[bool] = True
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True
    most_weight_bits: ClassVar[int] = WIDE_BITS
    most_activation_bits: ClassVar[int] = WIDE_BITS
    habits: ClassVar[Mapping[str, Any]] = {"per_channel": False, "power_of_two": False, "activations": "unsigned"}

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return errors of 1."""
        return {"weight_error": torch.ones(len(WIDTHS)), "activation_error": torch.ones(len(WIDTHS))}

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Measure the errors; nothing else depends on data."""
        refuse_infinite(layer.weight)
        for bits in WIDTHS:
            layer.weight_error[row_of(bits)] = relative_error_up_to_a_factor(layer.weight, self.weight(layer, bits))
        if observer is not None:
            self.measure_activation_errors(layer, observer)

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight on its grid."""
        return dorefa_weight(layer.weight, bits)

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input on its grid."""
        return dorefa_activation(x, bits, reuse=True)

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return 1 / (2^k - 1)."""
        return layer.weight.new_tensor(1 / integer_range(bits, False)[1])

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return half the distance of two levels; at one bit the mean magnitude."""
        if bits == 1:
            return layer.quantized_weight().float().flatten(1).abs().amax(1)
        return torch.tensor(1 / integer_range(bits, False)[1], device=layer.weight.device)

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Return False: negative inputs become 0."""
        return False

    def integer_weight_bits(self, bits: int) -> int:
        """Return one bit more than the weights have; ValueError where that would be more than 8."""
        if bits == 1:
            return 1
        if bits >= MAX_BITS:
            raise ValueError(
                f"weights of {bits} bits in scheme {self.name!r} are odd integers of {bits + 1} bits; at most 7 bits are"
            )
        return bits + 1


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """Compute the weights of `DoReFa`, with their gradient."""
    w = weight.to(computed_in(weight))
    if bits == 1:
        return applied(_SignTimesMean, w).to(weight.dtype)
    levels = integer_range(bits, False)[1]
    squashed = torch.tanh(w)
    largest = w.new_ones(())
    if w.numel():
        largest = squashed.abs().max()
    squashed = squashed / (2 * torch.where(largest > 0, largest, 1)) + 0.5
    codes = applied(_Round, squashed * levels)
    return (2 * (codes / levels) - 1).to(weight.dtype)


def dorefa_activation(x: Tensor, bits: int, *, reuse: bool = False) -> Tensor:
    """Compute the activations of `DoReFa`, round((2^k - 1) clip(x, 0, 1)) / (2^k - 1), with their gradient.

    Args:
        x: A layer's input.
        bits: The width k, 1..8 or 16.
        reuse: As in `fake_quantize`.

    Returns:
        Values in 0..1, of x's shape and type.
    """
    levels = integer_range(bits, False)[1]
    if not differentiated(x):
        return _unit_range(x, levels, reuse)
    made: Tensor = _UnitRange.apply(x, levels)
    return made


class _Round(torch.autograd.Function):
    """Half to even; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _SignTimesMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sign(x) * x.abs().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _unit_range(x: Tensor, levels: int, reuse: bool = False) -> Tensor:
    wide = x.to(computed_in(x))
    if not blockwise(wide):
        return wide.clamp(0, 1).mul_(levels).round_().div_(levels).to(x.dtype)
    made = result_like(wide, reuse)
    for source, target in blocks(wide, made):
        torch.clamp(source, 0, 1, out=target).mul_(levels).round_().div_(levels)
    return made.to(x.dtype)


class _UnitRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x)
        return _unit_range(x, levels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return inside(gradients[0], x, 0, 1), None
