"""Linear (uniform) quantization: the default scheme, whose scales are found from data for every width at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantizers.functional import (
    WIDE_BITS,
    WIDTHS,
    along_channels,
    dequantize,
    differentiated,
    fake_quantize,
    integer_range,
    quantize_tensor,
    relative_error,
    row,
    scaled_gradient,
    set_rows,
    with_value,
)
from quantizers.observers import WEIGHT_RULES, Observer, fit_activation_scales, fit_weight_scales, widest_grid
from quantizers.scheme import Scheme, SchemeLayer, check_activations, later_option, refuse_negative, tensor_of

OUTPUT = "output"  # a rule for what the layer's output loses
ZERO = "activation_zero_point"


@dataclass(frozen=True)
class Linear(Scheme, name="linear"):
    """Uniform quantization, x^ = s clamp(round(x / s), low, high), with scales from data.

    Weights are symmetric per output channel; activations are per tensor, unsigned where the
    calibration data are. Gradients are straight-through (Bengio et al. 2013). At 16 bits nothing is
    clipped, whatever the rule: scales reach to the largest weight, and to twice the largest input
    that was seen, since others come.

    A layer's tensors, by width (`WIDTHS`): weight_scale (9, C_out), activation_scale (9,), and the
    relative squared errors weight_error (9,), activation_error (9,); with `asymmetric`
    activation_zero_point (9,), too; and activation_signed ().

    Attributes:
        calibration: How scales are found: `mse` (smallest squared error, over clipping points),
            `max` (largest magnitude), `percentile` (the 99.99th of magnitudes), `kl` (smallest
            Kullback-Leibler divergence of histograms: Migacz, "8-bit Inference with TensorRT", GTC
            2017; activations only, weights take the maximum), at one bit always `mse`; or `output`,
            the smallest squared error of the layer's output. For weights that needs `calibrate`, and
            is `mse` where calibration never reaches the layer; of activations it counts all values
            that calibration sees, not a sample, each weighted by its channel (`quantizers.histogram`).
        power_of_two: Whether scales are rounded to powers of two, for hardware that shifts.
        asymmetric: Whether signed inputs have a zero point z for each width, x^ = s (q - z) with
            integers q and z in 0..2^b - 1, in which real 0 is exact: for activations that are a
            little negative, such as those of SiLU, Hardswish and GELU (Jacob et al., CVPR 2018,
            section 2.1). Unsigned inputs are as they are without it, and so is one signed bit,
            which stands for -s and s.
        per_channel: One weight scale per output channel; False: one per tensor, and weight_scale is
            (9, 1).
        activations: `auto`: integers of inputs are signed where calibration saw a negative value.
            `signed`: they always are, as hardware without unsigned ones has it; with `asymmetric`
            that changes nothing, since integers with a zero point may be told less 2^(b-1).
            `unsigned`: they never are; a layer whose input is negative is refused, unless it has a
            zero point.

    Raises:
        ValueError: For a calibration rule that isn't known, and for `kl` of asymmetric inputs, for which it finds no zero
            points.
    """

    calibration: str = "mse"
    power_of_two: bool = False
    asymmetric: bool = False
    per_channel: bool = later_option(True)
    activations: str = later_option("auto")
    summary: ClassVar[str] = "evenly spaced levels, scales from calibration data (the default)"
    of_weight: ClassVar[tuple[str, ...]] = ("weight_scale",)
    takes_offsets: ClassVar[bool] = True
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True
    most_weight_bits: ClassVar[int] = WIDE_BITS
    most_activation_bits: ClassVar[int] = WIDE_BITS
    choices: ClassVar[Mapping[str, str]] = {
        "per_channel": "per_channel",
        "power_of_two": "power_of_two",
        "activations": "activations",
        "zero_points": "asymmetric",
    }

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that there isn't, or that finds no zero points, and for integers that there aren't."""
        check_activations(self.activations)
        if self.calibration not in WEIGHT_RULES:
            raise ValueError(f"unknown calibration {self.calibration!r}; known: {', '.join(WEIGHT_RULES)}")
        if self.asymmetric and self.calibration == "kl":
            others = ", ".join(rule for rule in WEIGHT_RULES if rule != "kl")
            raise ValueError(f"calibration 'kl' finds no zero points for asymmetric inputs; those that do: {others}")

    def needs_moments(self) -> bool:
        """Say whether scales of weights depend on what the layer's output loses."""
        return self.calibration == OUTPUT

    @property
    def has_zero_points(self) -> bool:  # type: ignore[override]
        """Whether signed inputs have zero points."""
        return self.asymmetric

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Refuse negative inputs where integers are unsigned and there is no zero point."""
        super().check(weight_bits, activation_bits, signed)
        if activation_bits is None or not signed or self.activations != "unsigned":
            return
        if activation_bits == 1 or not self.asymmetric:
            refuse_negative(self, activation_bits)

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return scales and errors of 1, and zero points of 0."""
        rows, sharing = len(WIDTHS), 1
        if self.per_channel:
            sharing = layer.weight.shape[0]
        tensors = {
            "weight_scale": torch.ones(rows, sharing),
            "activation_scale": torch.ones(rows),
            "activation_signed": torch.ones(()),
            "weight_error": torch.ones(rows),
            "activation_error": torch.ones(rows),
        }
        if self.asymmetric:
            tensors[ZERO] = torch.zeros(rows)
        return tensors

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Find the scales of the weights, and of the input if it was seen."""
        moments = None
        if observer is not None:
            moments = observer.moments
        of_weight, _ = _asked(layer)
        scale, error = fit_weight_scales(
            layer.weight, self.calibration, self.power_of_two, moments, per_channel=self.per_channel, widths=of_weight
        )
        set_rows(layer.weight_scale, scale)
        set_rows(layer.weight_error, error)
        if observer is not None:
            self._calibrate_activations(layer, observer)

    def _calibrate_activations(self, layer: SchemeLayer, observer: Observer) -> None:
        layer.activation_signed.fill_(observer.signed)
        asymmetric = self.asymmetric and observer.signed
        signed = self._has_signed_integers(observer.signed)
        _, widths = _asked(layer)
        if self.calibration == OUTPUT or asymmetric:
            assert observer.histogram is not None
            grids = observer.histogram.grids(
                observer.low,
                observer.high,
                self.calibration,
                signed=signed,
                asymmetric=asymmetric,
                power_of_two=self.power_of_two,
                widths=widths,
            )
            scale, error, zero_point = grids
        else:
            sample = observer.sample()
            scale, error = fit_activation_scales(sample, observer.largest, signed, self.calibration, self.power_of_two)
            zero_point = torch.zeros_like(scale)
        widest = widest_grid(observer, signed, asymmetric, self.power_of_two)
        set_rows(layer.activation_scale, torch.cat([scale, scale.new_tensor([widest.scale])]))
        origin = None
        if asymmetric:
            origin = torch.tensor(widest.zero_point)
            set_rows(tensor_of(layer, ZERO), torch.cat([zero_point, zero_point.new_tensor([widest.zero_point])]))
        if WIDE_BITS not in widths:
            set_rows(layer.activation_error, torch.cat([error, error.new_ones(1)]))
            return
        sample = observer.sample()
        if origin is not None:
            origin = origin.to(sample)
        is_signed = signed and not asymmetric
        made = fake_quantize(sample, sample.new_tensor(widest.scale), WIDE_BITS, is_signed, zero_point=origin, reuse=True)
        set_rows(layer.activation_error, torch.cat([error, relative_error(sample, made).view(1).to(error)]))

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
        scale, signed = row(layer.activation_scale, bits), self.has_signed_inputs(layer, bits)
        zero_point = None
        if self._has_zero_point(layer, bits):
            zero_point = row(tensor_of(layer, ZERO), bits)
        if differentiated(scale) and x.numel():
            scale = scaled_gradient(scale, (x[0].numel() * integer_range(bits, signed)[1]) ** -0.5)
        return fake_quantize(x, scale, bits, signed, zero_point=zero_point, reuse=True)

    def _has_zero_point(self, layer: SchemeLayer, bits: int) -> bool:
        """Say whether a layer's input has a zero point: where it is signed, of two bits or more."""
        return self.asymmetric and layer.signed and bits > 1

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Say whether the integers of a layer's input are signed: with a zero point they aren't."""
        return self._has_signed_integers(layer.signed) and not self._has_zero_point(layer, bits)

    def _has_signed_integers(self, signed: bool) -> bool:
        """Say whether integers without a zero point are signed, for an input that is negative in places or not."""
        return signed or (self.activations == "signed" and not self.asymmetric)

    def zero_point(self, layer: SchemeLayer, bits: int) -> int:
        """Return the integer that stands for real 0."""
        if not self._has_zero_point(layer, bits):
            return 0
        return int(row(tensor_of(layer, ZERO), bits))

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the input's scale."""
        return row(layer.activation_scale, bits)

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the scale of each output channel."""
        return row(layer.weight_scale, bits)


def _asked(layer: SchemeLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths of weights and of inputs that may ever be asked for."""
    if layer.only_bits is None:
        return WIDTHS, WIDTHS
    of_weight, of_input = (tuple(bits for bits in (only,) if bits is not None) for only in layer.only_bits)
    return of_weight, of_input


@dataclass(frozen=True)
class AsymmetricLinear(Linear, name="linear-asymmetric"):
    """Linear whose signed inputs have zero points, by a name of its own for the command line."""

    calibration: str = OUTPUT
    asymmetric: bool = True
    summary: ClassVar[str] = "linear with zero points for signed inputs, for activations such as SiLU and Hardswish"
