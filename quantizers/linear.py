"""Linear (uniform) quantization: the default scheme, whose scales are found from data for every width at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantizers import calibrate as calibration
from quantizers.functional import MAX_BITS, differentiated, fake_quantize, integer_range
from quantizers.scheme import Scheme, along_channels, row

if TYPE_CHECKING:
    from quantizers.calibrate import Observer
    from quantizers.layers import QuantLayer


@dataclass(frozen=True)
class Linear(Scheme, name="linear"):
    """x^ = s clamp(round(x / s), low, high): weights symmetric per output channel, activations per tensor, unsigned where the
    calibration data are. Gradients are straight-through (Bengio et al. 2013).

    calibration
        how scales are found: `mse` (smallest squared error, over clipping points), `max` (largest magnitude), `percentile`
        (the 99.99th of magnitudes) or `kl` (smallest Kullback-Leibler divergence of histograms: Migacz, "8-bit Inference
        with TensorRT", GTC 2017; activations only, weights take the maximum). At one bit it is always `mse`.
    power_of_two
        scales are rounded to powers of two, for hardware that shifts.

    A layer's tensors: weight_scale (8, C_out), activation_scale (8,), activation_signed (), and the relative squared errors
    weight_error (8,), activation_error (8,).
    """

    calibration: str = "mse"
    power_of_two: bool = False
    of_weight: ClassVar[tuple[str, ...]] = ("weight_scale",)

    def __post_init__(self) -> None:
        if self.calibration not in calibration.RULES:
            raise ValueError(f"unknown calibration {self.calibration!r}; known: {', '.join(calibration.RULES)}")

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        return {
            "weight_scale": torch.ones(MAX_BITS, layer.weight.shape[0]),
            "activation_scale": torch.ones(MAX_BITS),
            "activation_signed": torch.ones(()),
            "weight_error": torch.ones(MAX_BITS),
            "activation_error": torch.ones(MAX_BITS),
        }

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        scale, error = calibration.weight_scales(layer.weight, self.calibration, self.power_of_two)
        layer.weight_scale.copy_(scale)
        layer.weight_error.copy_(error)
        if observer is not None:
            sample, largest, signed = observer.sample(), observer.largest, observer.signed
            scale, error = calibration.activation_scales(sample, largest, signed, self.calibration, self.power_of_two)
            layer.activation_scale.copy_(scale)
            layer.activation_error.copy_(error)
            layer.activation_signed.fill_(signed)

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        return fake_quantize(layer.weight, along_channels(row(layer.weight_scale, bits), layer.weight), bits, True)

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        scale, signed = row(layer.activation_scale, bits), layer.signed
        if differentiated(scale) and x.numel():
            scale = scaled_gradient(scale, (x[0].numel() * integer_range(bits, signed)[1]) ** -0.5)
        return fake_quantize(x, scale, bits, signed, reuse=True)

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        return row(layer.activation_scale, bits)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scaled_gradient(scale: Tensor, factor: float) -> Tensor:
    """The scale itself, its gradient times a factor: 1 / sqrt(values x largest integer) in LSQ (Esser et al., section 2.2)."""
    if not differentiated(scale):
        return scale
    scaled: Tensor = _ScaledGradient.apply(scale, factor)
    return scaled
