"""Linear (uniform) quantization: the default scheme, whose scales are found from data for every width at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantizers.functional import (
    MAX_BITS,
    along_channels,
    dequantize,
    differentiated,
    fake_quantize,
    integer_range,
    quantize_tensor,
    row,
    scaled_gradient,
    with_value,
)
from quantizers.observers import RULES, Observer, fit_activation_scales, fit_weight_scales
from quantizers.scheme import Scheme, SchemeLayer


@dataclass(frozen=True)
class Linear(Scheme, name="linear"):
    """Uniform quantization, x^ = s clamp(round(x / s), low, high), with scales from data.

    Weights are symmetric per output channel; activations are per tensor, unsigned where the
    calibration data are. Gradients are straight-through (Bengio et al. 2013).

    A layer's tensors: weight_scale (8, C_out), activation_scale (8,), activation_signed (), and the
    relative squared errors weight_error (8,), activation_error (8,).

    Attributes:
        calibration: How scales are found: `mse` (smallest squared error, over clipping points),
            `max` (largest magnitude), `percentile` (the 99.99th of magnitudes) or `kl` (smallest
            Kullback-Leibler divergence of histograms: Migacz, "8-bit Inference with TensorRT", GTC
            2017; activations only, weights take the maximum). At one bit it is always `mse`.
        power_of_two: Whether scales are rounded to powers of two, for hardware that shifts.
    """

    calibration: str = "mse"
    power_of_two: bool = False
    summary: ClassVar[str] = "evenly spaced levels, scales from calibration data (the default)"
    of_weight: ClassVar[tuple[str, ...]] = ("weight_scale",)
    takes_offsets: ClassVar[bool] = True
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that there isn't."""
        if self.calibration not in RULES:
            raise ValueError(f"unknown calibration {self.calibration!r}; known: {', '.join(RULES)}")

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return scales and errors of 1."""
        return {
            "weight_scale": torch.ones(MAX_BITS, layer.weight.shape[0]),
            "activation_scale": torch.ones(MAX_BITS),
            "activation_signed": torch.ones(()),
            "weight_error": torch.ones(MAX_BITS),
            "activation_error": torch.ones(MAX_BITS),
        }

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Find the scales of the weights, and of the input if it was seen."""
        scale, error = fit_weight_scales(layer.weight, self.calibration, self.power_of_two)
        layer.weight_scale.copy_(scale)
        layer.weight_error.copy_(error)
        if observer is not None:
            self._calibrate_activations(layer, observer)

    def _calibrate_activations(self, layer: SchemeLayer, observer: Observer) -> None:
        sample, largest, signed = observer.sample(), observer.largest, observer.signed
        scale, error = fit_activation_scales(sample, largest, signed, self.calibration, self.power_of_two)
        layer.activation_scale.copy_(scale)
        layer.activation_error.copy_(error)
        layer.activation_signed.fill_(signed)

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight on its grid."""
        weight = layer.weight
        scale = along_channels(row(layer.weight_scale, bits), weight)
        made = fake_quantize(weight, scale, bits, True)
        offset = layer.offset_of_rounding(bits)
        if offset is None:
            return made
        low, high = integer_range(bits, True)
        integers = quantize_tensor(weight.detach(), scale, bits, True).add_(offset).clamp_(low, high)
        return with_value(made, dequantize(integers, scale.detach()))

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input on its grid; a scale that is trained gets LSQ's gradient."""
        scale, signed = row(layer.activation_scale, bits), layer.signed
        if differentiated(scale) and x.numel():
            scale = scaled_gradient(scale, (x[0].numel() * integer_range(bits, signed)[1]) ** -0.5)
        return fake_quantize(x, scale, bits, signed, reuse=True)

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the input's scale."""
        return row(layer.activation_scale, bits)

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the scale of each output channel."""
        return row(layer.weight_scale, bits)
