"""A scheme: levels up to the largest magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import quantizers as Q
from quantizers.observers import Observer
from quantizers.scheme import tensor_of


class LargestMagnitude(Q.Scheme):
    """Evenly spaced levels, the outermost at the largest magnitude of a layer's weights, and of its input."""

    summary: ClassVar[str] = "levels up to the largest magnitude"
    has_integer_weights: ClassVar[bool] = True
    has_integer_activations: ClassVar[bool] = True
    least_bits: ClassVar[int] = 2

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        """Return the largest magnitude of the input, and errors that nothing is known of."""
        return {"largest_input": torch.ones(()), "weight_error": torch.ones(8), "activation_error": torch.ones(8)}

    def calibrate(self, layer: Q.SchemeLayer, observer: Observer | None) -> None:
        """Keep the largest magnitude of the input, and what each width costs."""
        if observer is not None:
            tensor_of(layer, "largest_input").copy_(torch.as_tensor(observer.largest))
        self.measure_errors(layer, observer)

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Refuse one bit, which has no level beside zero."""
        super().check(weight_bits, activation_bits, signed)
        if 1 in (weight_bits, activation_bits):
            raise ValueError(f"scheme {self.name!r} takes 2 to 8 bits, not 1")

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        """Return the weight on its grid."""
        return rounded(layer.weight, self.weight_step(layer, bits), bits, signed=True)

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the input on its grid."""
        return rounded(x, self.activation_step(layer, bits), bits, layer.signed)

    def weight_step(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        """Return the distance of the weights' levels."""
        return layer.weight.detach().abs().max() / largest_integer(bits, signed=True)

    def activation_step(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        """Return the distance of the input's levels."""
        return tensor_of(layer, "largest_input") / largest_integer(bits, layer.signed)


def largest_integer(bits: int, signed: bool) -> int:
    """Return the largest integer of a width."""
    if signed:
        return 2 ** (bits - 1) - 1
    return 2**bits - 1


def rounded(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """Round to multiples of a step; the gradient passes straight through."""
    high = largest_integer(bits, signed)
    low = -high if signed else 0
    grid = (x / step).round().clamp(low, high) * step
    return grid.detach() + (x - x.detach())
