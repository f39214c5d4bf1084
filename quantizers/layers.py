"""Layers that know their bits. Whole networks are made of them in `quantizers.network`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers.backward import quantized_input
from quantizers.cache import TensorCache
from quantizers.functional import MAX_BITS, differentiated, followed
from quantizers.policy import QUANTIZABLE
from quantizers.scheme import Scheme, started

ERRORS = ("weight_error", "activation_error")
PLAIN_OPTIONS = (bool, int, float, str, type(None))  # types of values that nobody can change in place
# What a layer has that the float layer hasn't, beside its scheme's tensors.
OWN_ATTRIBUTES = frozenset(
    ("scheme", "weight_bits", "activation_bits", "backward_mode", "signed", "calibrated", "state_names", "cache")
)


class QuantLayer(nn.Module):
    """What QuantConv1d, QuantConv2d and QuantLinear share. They keep the float layer's parameters and `state_dict` keys.

    Attributes:
        scheme: How values become few-bit ones. Its tensors (see its docstring) are attributes of
            the layer; those that are learned are parameters, but none of them is in the
            `state_dict`: `quantizer_state` has them.
        weight_bits: 1..8, or None for float. Can be set at any time (`set_policy`).
        activation_bits: Likewise, of the layer's input.
        backward_mode: What the gradient does at the quantized input (`quantizers.backward_mode`).
        signed: Whether the input was negative during calibration; True if it wasn't seen.
        calibrated: Whether the input was seen.
    """

    scheme: Scheme
    weight: Tensor
    weight_bits: int | None
    activation_bits: int | None
    signed: bool
    calibrated: bool
    backward_mode: str = "ste"
    state_names: tuple[str, ...]
    cache: TensorCache
    # Tensors of the linear scheme and its relatives.
    weight_scale: Tensor
    activation_scale: Tensor
    activation_signed: Tensor
    # Tensors of every scheme: relative squared errors at widths 1..8.
    weight_error: Tensor
    activation_error: Tensor

    def start_quantizing(self, scheme: Scheme) -> bool:
        """Take a scheme and its tensors; bits stay float.

        Args:
            scheme: The scheme.

        Returns:
            Whether the scheme has no errors of its own, so that they must be measured.
        """
        self.scheme = scheme
        self.weight_bits = self.activation_bits = None
        self.signed, self.calibrated = True, False
        self.cache = TensorCache()
        tensors = started(scheme, self)
        lacking = [name for name in ERRORS if name not in tensors]
        for name in lacking:
            tensors[name] = torch.ones(MAX_BITS)
        self.state_names = tuple(tensors)
        for name, tensor in tensors.items():
            if name in scheme.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)
        return bool(lacking)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its input and its weight at their bits."""
        bits = self.activation_bits
        if bits is not None:
            if self.backward_mode == "ste" or not differentiated(x):
                x = self.scheme.activation(self, x, bits)
            else:
                x = quantized_input(self.scheme, self, x, bits, self.backward_mode)
        return self._apply_weight(x, self._weight_to_use())

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer by itself")

    def quantized_weight(self) -> Tensor:
        """Return the weight as the layer uses it: real values on the grid of its bits.

        It is a tensor of the caller's own, but for a weight in float, which is the layer's.
        """
        made = self._kept_weight()
        if self.weight_bits is None or made.requires_grad:
            return made
        return made.clone()

    def _weight_to_use(self) -> Tensor:
        """Return the weight for a forward pass that doesn't change it."""
        return self._kept_weight()

    def _kept_weight(self) -> Tensor:
        """Return the quantized weight, which nobody may change.

        Without gradients it is kept per width, as long as the weight and what else it depends on
        stay the same.
        """
        bits, scheme = self.weight_bits, self.scheme
        if bits is None:
            return self.weight
        settings = self._settings()
        if settings is None:
            return scheme.weight(self, bits)
        of_weight = scheme.of_weight
        if of_weight is None:
            of_weight = self.state_names

        def sources() -> list[Tensor]:
            return [self.weight, *(getattr(self, name) for name in of_weight)]

        if differentiated(*sources()):
            return scheme.weight(self, bits)
        return self.cache.get(("weight", bits), sources, lambda: scheme.weight(self, bits), settings)

    def _settings(self) -> tuple[Any, ...] | None:
        """Return what the quantized weight depends on beside tensors; None if nobody can tell whether it is what it was."""
        # A property in place of the weight (`torch.nn.utils.parametrize`) computes it whenever it is read.
        if followed() or hasattr(type(self), "weight"):
            return None
        options = vars(self.scheme)
        if not all(isinstance(value, PLAIN_OPTIONS) for value in options.values()):
            return None
        return type(self.scheme), self.training, self.signed, *options.items()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.state_names:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in self.state_names]


class QuantConv1d(QuantLayer, nn.Conv1d):
    """Conv1d whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """Conv2d whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class QuantLinear(QuantLayer, nn.Linear):
    """Linear whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _QuantCustom(QuantLayer):
    """A Conv1d, Conv2d or Linear subclass of somebody else's: its own forward is called with the quantized weight in place."""

    def _weight_to_use(self) -> Tensor:
        # Somebody else's forward may change the weight in place, or hand it on.
        return self.quantized_weight()

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        parameter = self._parameters.pop("weight")
        object.__setattr__(self, "weight", weight)
        try:
            result: Tensor = super(QuantLayer, self).forward(x)
        finally:
            object.__delattr__(self, "weight")
            # Parameters keep their order, and with it that of the optimizer's groups.
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({"weight": parameter, **others})
        return result


_CLASSES: dict[type[nn.Module], type[QuantLayer]] = dict(
    zip(QUANTIZABLE, (QuantConv1d, QuantConv2d, QuantLinear), strict=True)
)


def quantized_class(kind: type[nn.Module]) -> type[QuantLayer]:
    """Return the class that takes the place of a Conv1d, Conv2d or Linear, or of a subclass of them."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Quant{kind.__name__}", (_QuantCustom, kind), {"__doc__": f"Quantized {kind.__name__}."})
    return _CLASSES[kind]


def float_class(layer: QuantLayer) -> type[nn.Module]:
    """Return the class whose place a quantized layer's class took."""
    kind: type[nn.Module] = next(base for base in type(layer).__mro__[1:] if not issubclass(base, QuantLayer))  # type: ignore[assignment]
    return kind
