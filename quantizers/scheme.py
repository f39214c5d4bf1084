"""A scheme says how weights and activations become few-bit values; one object serves all layers of a network."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from quantizers.functional import MAX_BITS, integer_range

if TYPE_CHECKING:
    from quantizers.calibrate import Observer
    from quantizers.layers import QuantLayer


class Scheme:
    """The base of all schemes. A scheme has options of its own; what belongs to a layer are tensors that the layer holds.

    Subclasses name themselves (`class Linear(Scheme, name="linear")`), and are then known by that name to `quantize`.
    """

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, type[Scheme]]] = {}
    # Tensors of the layer that are trained: parameters that aren't in its state_dict, which stays the float network's.
    learned: ClassVar[tuple[str, ...]] = ()
    # Tensors of the layer, beside its weight, that the quantized weight depends on.
    of_weight: ClassVar[tuple[str, ...]] = ()
    # Whether `calibrate` looks at the layer's input.
    needs_data: ClassVar[bool] = True

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            cls.name = name
            Scheme.known[name] = cls

    @staticmethod
    def named(scheme: str | Scheme) -> Scheme:
        """A scheme, or the one of that name with its default options. Raises ValueError listing the close ones."""
        if isinstance(scheme, Scheme):
            return scheme
        if scheme not in Scheme.known:
            close = difflib.get_close_matches(str(scheme), Scheme.known, n=2, cutoff=0.3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ";"
            raise ValueError(f"unknown scheme {scheme!r}{hint} known: {', '.join(Scheme.known)}")
        return Scheme.known[scheme]()

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Raise ValueError, naming the scheme and the bits, for widths that mean nothing to it. `signed` says whether the
        layer's input was ever negative."""
        for bits in (weight_bits, activation_bits):
            if bits is not None:
                integer_range(bits, False)

    def start(self, layer: QuantLayer) -> dict[str, Tensor]:
        """The tensors that a layer holds for this scheme, before calibration. Row b - 1 of a tensor of MAX_BITS rows is for
        width b, so that a layer can change its width at any time."""
        raise NotImplementedError

    def calibrate(self, layer: QuantLayer, observer: Observer | None) -> None:
        """Set the layer's tensors from its weight and from what its input was like (None: it was never called)."""
        raise NotImplementedError

    def weight(self, layer: QuantLayer, bits: int) -> Tensor:
        """The layer's weight as real values on the grid of so many bits, with the gradient that training uses."""
        raise NotImplementedError

    def activation(self, layer: QuantLayer, x: Tensor, bits: int) -> Tensor:
        """The layer's input, likewise."""
        raise NotImplementedError

    def activation_step(self, layer: QuantLayer, bits: int) -> Tensor:
        """What the integers of a layer's input are multiplied by, a positive number: the distance of its levels, but for the
        two of one signed bit, -1 and +1 times it."""
        raise NotImplementedError


def row(table: Tensor, bits: int) -> Tensor:
    """The entry of a width in a tensor whose rows are widths 1..8."""
    assert len(table) == MAX_BITS
    return table[bits - 1]


def along_channels(values: Tensor, weight: Tensor) -> Tensor:
    """One value per output channel, shaped to broadcast against a weight (C_out, ...)."""
    return values.view(-1, *[1] * (weight.dim() - 1))
