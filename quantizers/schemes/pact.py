"""PACT: activations are clipped where training wants it. The gradient is written out, ties included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantizers.functional import computed_in, differentiated, integer_range, positive, rounded, row, sign
from quantizers.network import quant_layers
from quantizers.observers import Observer, fit_activation_scales
from quantizers.scheme import SchemeLayer, tensor_of
from quantizers.schemes.dorefa import DoReFa

CLIP = "activation_clip"  # the tensor of a layer


@dataclass(frozen=True)
class PACT(DoReFa, name="pact"):
    """Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (arXiv 1805.06085).

    Activations are clipped at a learned alpha, one per layer, and the weights are DoReFa's.

        y = clip(x, 0, alpha)     y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)     (equations 1 and 2)
        dy_q/dalpha = 1 where x >= alpha, else 0        dy_q/dx = 1 where 0 <= x < alpha, else 0     (equation 3)

    At x = alpha the gradient goes to alpha alone. The paper's inputs follow a ReLU. An input that
    is negative in the calibration data is clipped at -alpha as well, with the symmetric integers
    -(2^(k-1) - 1)..2^(k-1) - 1 (one bit: -alpha and +alpha), and its gradient to alpha is -1 where
    x <= -alpha.

    Add `pact_penalty` to the loss, which makes alpha find its place. A layer's tensors:
    activation_clip (), learned, and the errors of DoReFa.

    Attributes:
        clip: alpha before training: 10, as in the paper; None takes what leaves the smallest
            squared error at 4 bits on the calibration data.

    Raises:
        ValueError: Unless `clip` is positive and finite, or None.
    """

    clip: float | None = 10.0
    summary: ClassVar[str] = "inputs clipped at a learned value, weights of dorefa; for training (Choi et al. 2018)"
    learned: ClassVar[tuple[str, ...]] = (CLIP,)
    needs_data: ClassVar[bool] = True
    trains_step: ClassVar[bool] = True
    habits: ClassVar[Mapping[str, Any]] = {"per_channel": False, "power_of_two": False}

    def __post_init__(self) -> None:
        """Raise ValueError for a clip that clips nothing or everything."""
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"PACT's clip must be positive and finite, or None, not {self.clip!r}")

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return the clip, 10 until calibration if it is to be found, and DoReFa's errors."""
        clip = 10.0
        if self.clip is not None:
            clip = float(self.clip)
        return {CLIP: torch.tensor(clip), **super().start(layer)}

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Find the clip if it wasn't given, and measure the errors."""
        if self.clip is None and observer is not None:
            scales, _ = fit_activation_scales(observer.sample(), observer.largest, observer.signed)
            tensor_of(layer, CLIP).copy_(row(scales, 4) * integer_range(4, observer.signed)[1])
        super().calibrate(layer, observer)

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the clipped input on its grid."""
        return pact(x, positive(tensor_of(layer, CLIP)), bits, layer.signed, reuse=True)

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return alpha over the largest integer."""
        return positive(tensor_of(layer, CLIP)) / integer_range(bits, layer.signed)[1]

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Return whether calibration saw a negative input."""
        return layer.signed


def pact_penalty(network: nn.Module, strength: float) -> Tensor:
    """Compute strength x the sum of alpha^2 over the layers whose input PACT clips, to be added to the loss.

    The larger, the further down move the clips (Choi et al. 2018, section 3.1; their strength is that of the weights' decay).

    Args:
        network: A quantized network.
        strength: The factor.

    Returns:
        One number, with gradients to the clips.

    Raises:
        ValueError: If PACT clips nothing in the network.
    """
    clips = [
        tensor_of(layer, CLIP)
        for layer in quant_layers(network).values()
        if CLIP in layer.scheme.learned and layer.activation_bits is not None
    ]
    if not clips:
        raise ValueError("no layer of the network has its input clipped by PACT")
    return strength * torch.stack(clips).square().sum()


def pact(x: Tensor, clip: Tensor, bits: int, signed: bool = False, *, reuse: bool = False) -> Tensor:
    """Compute equations 1 to 3 of PACT, and their symmetric twin for signed inputs.

    Args:
        x: A layer's input.
        clip: alpha, one positive number.
        bits: The width k, 1..8 or 16.
        signed: Whether the input has negative values.
        reuse: As in `fake_quantize`.

    Returns:
        Values in 0..alpha or -alpha..alpha, of x's shape and type, with their gradient.
    """
    if not differentiated(x, clip):
        return _clipped(x, clip, bits, signed, reuse)
    made: Tensor = _Clip.apply(x, clip, bits, signed)
    return made


def _clipped(x: Tensor, clip: Tensor, bits: int, signed: bool, reuse: bool = False) -> Tensor:
    if signed and bits == 1:
        return (sign(x).to(computed_in(x)) * clip).to(x.dtype)
    low, high = integer_range(bits, signed)
    return rounded(x, clip / high, low, high, rescale=True, reuse=reuse)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, signed: bool) -> Tensor:
        wide = x.to(computed_in(x))
        ctx.save_for_backward(wide, clip)
        ctx.signed = signed
        return _clipped(x, clip, bits, signed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        x, clip = ctx.saved_tensors
        above = x >= clip
        to_clip = torch.where(above, gradient, 0).sum()
        if ctx.signed:
            below = x <= -clip
            to_clip = to_clip - torch.where(below, gradient, 0).sum()
        else:
            below = x < 0
        return torch.where(above | below, 0, gradient), to_clip, None, None
