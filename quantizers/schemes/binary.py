"""Binary layers: one-bit weights and activations are signs.

A sign is +1 at zero (0 would make a third value of it). Its derivative is nought nearly everywhere,
so training uses another slope in its place, one of `ESTIMATORS`. All are written out as masks,
never as the gradient of a clamp: that gradient at its bounds differs between versions of torch, and
clipped weights stay exactly at the bounds.

What else trains binary networks is in `quantizers.binary_training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.functional import WIDE_BITS, along_channels, applied, relative_error_up_to_a_factor, sign
from quantizers.observers import Observer
from quantizers.scheme import Scheme, SchemeLayer
from quantizers.schemes.linear import Linear

SWISH = 5.0


def _clipped(x: Tensor) -> Tensor:
    return (x.abs() <= 1).to(x.dtype)


def _approx_sign(x: Tensor) -> Tensor:
    return torch.where(x.abs() <= 1, 2 - 2 * x.abs(), 0.0)


def _swish_sign(x: Tensor) -> Tensor:
    # Beyond 60 the slope is nought in every type, and cosh would overflow.
    scaled = (SWISH * x).clamp(-60, 60)
    return SWISH * (2 - scaled * (scaled / 2).tanh()) / (1 + scaled.cosh())


# The slope that stands for the derivative of a sign. A sign jumps by 2, and so does the integral of
# each slope but the first.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "clipped": _clipped,
    "approx_sign": _approx_sign,
    "swish_sign": _swish_sign,
    "stochastic": _clipped,
}


class _Binarized(torch.autograd.Function):
    """alpha * sign(x), or +1 with probability clip((x + 1) / 2, 0, 1) if `random`; see `binarize` and `Binary`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: str, random: bool, alpha: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.estimator = estimator
        if random:
            # torch's own generator, as dropout's: `torch.manual_seed` repeats it, and checkpointing
            # replays it.
            signs = torch.where(torch.rand_like(x) < (x + 1) / 2, 1.0, -1.0).to(x.dtype)
        else:
            signs = sign(x)
        if alpha is not None:
            signs = signs * alpha
        return signs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, alpha = ctx.saved_tensors
        slope = ESTIMATORS[ctx.estimator](x)
        if alpha is not None:
            slope = slope * alpha + 1 / x[0].numel()
        return gradients[0] * slope, None, None, None


def binarize(x: Tensor, estimator: str = "clipped", *, random: bool = False) -> Tensor:
    """Compute sign(x) in {-1, +1}, +1 at zero, with the slope s(x) of an estimator in place of the sign's derivative.

    identity
        s = 1 (Bengio et al. 2013, arXiv 1308.3432; "vanilla" in Alizadeh et al., ICLR 2019).
    clipped
        s = 1 where |x| <= 1, both bounds included (Hubara et al., NeurIPS 2016, section 1.3).
    approx_sign
        s = 2 - 2|x| where |x| <= 1 (Bi-Real Net, Liu et al., ECCV 2018, section 3.3).
    swish_sign
        s = b (2 - b x tanh(b x / 2)) / (1 + cosh(b x)), b = 5 (BNN+, Darabi et al. 2018, arXiv 1812.11800).
    stochastic
        the slope of `clipped`; with `random`, the value is +1 with probability clip((x + 1) / 2, 0, 1) and -1 otherwise
        (BinaryConnect, Courbariaux et al., NIPS 2015, section 2.2), drawn from torch's global generator.

    Args:
        x: Real values.
        estimator: One of the above.
        random: Whether `stochastic` draws its values; else they are signs.

    Returns:
        Signs, of x's shape and type.

    Raises:
        ValueError: For an unknown estimator.
    """
    known_name("estimator", estimator, ESTIMATORS)
    return applied(_Binarized, x, estimator, random and estimator == "stochastic", None)


def known_name(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError for a name that isn't among the choices, listing them.

    Args:
        what: What is named.
        value: The name.
        choices: The names that there are.
    """
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(choices)}")


WIDER = Linear()  # what widths above one bit are


@dataclass(frozen=True)
class Binary(Scheme, name="binary"):
    """Signs at one bit, and the linear scheme at 2 to 8 and 16 bits, each for weights and activations by themselves.

    Bits may be (1, 1); (1, None), which is BinaryConnect; (1, 4), or any others, so that a search
    can choose among all. Activations of more than one bit need data for their scale, signs need
    none. Padding stays zero.

    `stochastic` wants weights that fill -1..1 from the start, and clipping: near 0 it is a coin
    toss. Only training draws `stochastic` weights: in training mode and with gradients enabled.
    Otherwise they are the sign, the likelier value (BinaryConnect, section 2.6, first method). The
    authors of the empirical study evaluate with the float weights instead: that would be a network
    of 32 bits under a policy of one.

    XNOR-Net's scale K of the activations is not here: it is a float operation at every position.

    A layer's tensors are those of `Linear`, for the wider bits. The errors of one bit are those
    that are left after the best factor, which a batch norm or a scale brings: one factor per
    channel for weights, one for activations.

    Attributes:
        weight_estimator: The slope of a one-bit weight's sign, a name in `ESTIMATORS`, described at
            `binarize`.
        activation_estimator: Likewise of a one-bit activation's.
        scaling: Of one-bit weights. `none`: they are -1 and +1, so that sums of binary products are
            integers. `xnor`: times alpha = mean |w| of each output channel, where the squared error
            is smallest (XNOR-Net, Rastegari et al., ECCV 2016, equation 6). Its gradient is that of
            section 3.1, with the estimator's slope s in place of 1{|w| <= 1}: dL/dw = dL/dw^ (1 / n
            + alpha s(w)), n weights to a channel. (It leaves out how a weight moves its neighbours
            through alpha.) A channel of zeros stays zeros.
    """

    weight_estimator: str = "clipped"
    activation_estimator: str = "clipped"
    scaling: str = "none"
    summary: ClassVar[str] = "signs at 1 bit, linear at 2 to 8; for training (Courbariaux et al. 2015, Rastegari et al. 2016)"
    of_weight: ClassVar[tuple[str, ...]] = WIDER.of_weight
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True
    most_weight_bits: ClassVar[int] = WIDE_BITS
    most_activation_bits: ClassVar[int] = WIDE_BITS

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown estimator or scaling."""
        known_name("estimator", self.weight_estimator, ESTIMATORS)
        known_name("estimator", self.activation_estimator, ESTIMATORS)
        known_name("scaling", self.scaling, ("none", "xnor"))

    def needs_data_at(self, weight_bits: int | None, activation_bits: int | None) -> bool:
        """Return whether activations have more than one bit."""
        return activation_bits is not None and activation_bits > 1

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return `Linear`'s tensors."""
        return WIDER.start(layer)

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Find the scales of the wider bits, and measure the errors of signs."""
        WIDER.calibrate(layer, observer)
        if observer is not None:
            sample = observer.sample()
            layer.activation_error[0] = relative_error_up_to_a_factor(sample, sign(sample))

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight's signs, scaled or not; at more bits the weight on its grid."""
        if bits > 1:
            return WIDER.weight(layer, bits)
        weight, alpha = layer.weight, None
        if self.scaling == "xnor":
            alpha = along_channels(weight.detach().flatten(1).abs().mean(1), weight)
        return applied(_Binarized, weight, self.weight_estimator, self._random(layer, self.weight_estimator), alpha)

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input's signs; at more bits the input on its grid."""
        if bits > 1:
            return WIDER.activation(layer, x, bits)
        estimator = self.activation_estimator
        return binarize(x, estimator, random=self._random(layer, estimator))

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return 1 for signs; at more bits the input's scale."""
        if bits > 1:
            return WIDER.activation_step(layer, bits)
        return layer.weight.new_ones(())

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return what the signs of each channel are multiplied by; at more bits the scale of each channel."""
        if bits > 1:
            return WIDER.weight_step(layer, bits)
        return layer.quantized_weight().float().flatten(1).abs().amax(1)

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Return whether the integers are signs, or calibration saw a negative input."""
        return bits == 1 or layer.signed

    @staticmethod
    def _random(layer: SchemeLayer, estimator: str) -> bool:
        # A layer keeps the weight that it makes without gradients, for evaluation too: a drawn one
        # must not be kept.
        return estimator == "stochastic" and layer.training and torch.is_grad_enabled()
