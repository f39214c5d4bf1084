"""What the gradient does at a quantized input, for those who attack or study a network: training has its scheme's own.

Rounding has no slope almost everywhere, so an attack that follows the true gradient finds nothing
and reports robustness that isn't there (Athalye et al., "Obfuscated Gradients Give a False Sense of
Security", ICML 2018). What passes forward never changes, to the last bit; what passes backward is
one of `BACKWARD`:

    ste             what the scheme trains with: the gradient passes where the value wasn't clipped (for most schemes)
    bpda-identity   it passes everywhere, clipped or not (BPDA, Athalye et al., section 4.1, with g(x) = x)
    bpda-soft       the slope of the quantizer smoothed by windows of half a step to four steps: larger near a threshold, and
                    not zero up to two steps beyond the clipping points
    hard            the true one: zero. To show masking, not to measure robustness.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantizers.scheme import Scheme, SchemeLayer

# How gradients can pass quantized inputs, as `backward_mode` takes it.
BACKWARD = ("ste", "bpda-identity", "bpda-soft", "hard")
HALF_WINDOWS = (0.25, 0.5, 1.0, 2.0)  # steps; the slopes over the four are averaged


def quantized_input(scheme: Scheme, layer: SchemeLayer, x: Tensor, bits: int, mode: str) -> Tensor:
    """Quantize a layer's input with the gradient of a mode.

    Args:
        scheme: The layer's scheme.
        layer: The layer.
        x: Its input.
        bits: The width, 1..8.
        mode: One of `BACKWARD` but the first, which is the scheme's own gradient.

    Returns:
        What the scheme makes of the input.
    """
    slope = None
    with torch.no_grad():
        value = scheme.activation(layer, x, bits)
        if mode == "hard":
            slope = torch.zeros_like(x)
        elif mode == "bpda-soft":
            slope = _smoothed_slope(scheme, layer, x, bits)
    made: Tensor = _Replace.apply(x, value, slope)
    return made


def _smoothed_slope(scheme: Scheme, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
    slope = torch.zeros_like(x)
    step = scheme.activation_step(layer, bits)
    for share in HALF_WINDOWS:
        half = step * share
        above = scheme.activation(layer, x + half, bits)
        below = scheme.activation(layer, x - half, bits)
        slope += (above - below) / (2 * half * len(HALF_WINDOWS))
    return slope


class _Replace(torch.autograd.Function):
    """A value in place of x; the gradient is multiplied by the slope (None: 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        (gradient,) = gradients
        if slope is not None:
            gradient = gradient * slope
        return gradient, None, None
