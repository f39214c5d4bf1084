"""What the gradient does at a quantized input, for those who attack or study a network: training has its scheme's own.

Rounding has no slope almost everywhere, so an attack that follows the true gradient finds nothing and reports robustness that
isn't there (Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018). What passes forward never
changes, to the last bit; what passes backward is one of `BACKWARD`:

    ste             what the scheme trains with: the gradient passes where the value wasn't clipped (for most schemes)
    bpda-identity   it passes everywhere, clipped or not (BPDA, Athalye et al., section 4.1, with g(x) = x)
    bpda-soft       the slope of the quantizer smoothed by windows of half a step to four steps: larger near a threshold, and
                    not zero up to two steps beyond the clipping points
    hard            the true one: zero. To show masking, not to measure robustness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantizers.layers import QuantLayer

BACKWARD = ("ste", "bpda-identity", "bpda-soft", "hard")
HALF_WINDOWS = (0.25, 0.5, 1.0, 2.0)  # steps; the slopes over the four are averaged


def quantized_input(layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
    """A layer's input at its bits, with the gradient of the layer's mode."""
    with torch.no_grad():
        value = layer.scheme.activation(layer, x, bits)
        if layer.backward_mode == "hard":
            slope: Tensor | None = torch.zeros_like(x)
        elif layer.backward_mode == "bpda-identity":
            slope = None
        else:
            # Copies, since without gradients a scheme's result may lie in memory that its next call writes over.
            value, slope = value.clone(), torch.zeros_like(x)
            step = layer.scheme.activation_step(layer, bits)
            for half in (step * share for share in HALF_WINDOWS):
                above = layer.scheme.activation(layer, x + half, bits).clone()
                slope += (above - layer.scheme.activation(layer, x - half, bits)) / (2 * half * len(HALF_WINDOWS))
    made: Tensor = _Replace.apply(x, value, slope)
    return made


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] if slope is None else gradients[0] * slope, None, None
