"""Layers that know their bits. Whole networks are made of them in `quantizers.network`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from quantizers.backward import quantized_input
from quantizers.cache import TensorCache
from quantizers.copying import class_on
from quantizers.functional import MAX_BITS, WIDTHS, differentiated, followed, row, row_of
from quantizers.observers import input_name
from quantizers.policy import QUANTIZABLE, Bits
from quantizers.scheme import Scheme, started

ERRORS = ("weight_error", "activation_error")
PLAIN_OPTIONS = (bool, int, float, str, type(None))  # types of values that nobody can change in place
# What a layer has that the float layer hasn't, beside its scheme's tensors.
OWN_ATTRIBUTES = frozenset(
    (
        *("scheme", "weight_bits", "activation_bits", "backward_mode", "signed", "calibrated", "state_names", "cache"),
        *("resting", "name_in_network", "tailored_for", "tailored", "only_bits"),
    )
)
# Tensors that post-training quantization adds, where it was asked for; None elsewhere.
FOUND_AFTER_TRAINING = ("bias_shift", "weight_offset", "tailored_shift", "tailored_offset")
# The parameters from which a weight is computed where it isn't one itself (weight_norm,
# spectral_norm, prune).
WEIGHTS = ("weight", "weight_orig", "weight_g", "weight_v")


class QuantLayer(nn.Module):
    """What QuantConv1d, QuantConv2d and QuantLinear share. They keep the float layer's parameters and `state_dict` keys.

    Attributes:
        scheme: How values become few-bit ones. Its tensors (see its docstring) are attributes of
            the layer; those that are learned are parameters, but none of them is in the
            `state_dict`: `quantizer_state` has them.
        weight_bits: 1..8 or 16, or None for float. Can be set at any time (`set_policy`).
        activation_bits: Likewise, of the layer's input.
        backward_mode: What the gradient does at the quantized input (`quantizers.backward_mode`).
        signed: Whether the input was negative during calibration; True if it wasn't seen.
        calibrated: Whether the input was seen.
        name_in_network: What the policy calls it.
        resting: Names of parameters that take part in nothing at the present bits, and therefore
            require no gradient until they do (`set_policy`).
        bias_shift: What bias correction adds to the bias at each width of the weights, (9, C_out).
        weight_offset: What is added to the weight's integers after rounding to nearest (GPTQ), int8,
            (8, *weight.shape); 16 bits are rounded to nearest.
        tailored_for: The bits of this layer in the one policy of the network that `tailored_shift`,
            (C_out,), and `tailored_offset`, int8 of the weight's shape, were found for; either may
            be None. They take the place of the other two where `tailored` says so.
        tailored: Whether the network has that policy now (`set_policy`).
        only_bits: The only bits that it can have beside float, if it was calibrated for these alone.
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
    name_in_network: str
    resting: set[str]
    bias_shift: Tensor | None
    weight_offset: Tensor | None
    tailored_shift: Tensor | None
    tailored_offset: Tensor | None
    tailored_for: Bits | None
    tailored: bool
    only_bits: Bits | None = None
    # Tensors of the linear scheme and its relatives.
    weight_scale: Tensor
    activation_scale: Tensor
    activation_signed: Tensor
    # Tensors of every scheme: relative squared errors by width.
    weight_error: Tensor
    activation_error: Tensor

    def start_quantizing(self, scheme: Scheme, name: str) -> bool:
        """Take a scheme and its tensors; bits stay float.

        Args:
            scheme: The scheme.
            name: What the policy calls the layer.

        Returns:
            Whether the scheme has no errors of its own, so that they must be measured.
        """
        self.scheme, self.name_in_network = scheme, name
        self.weight_bits = self.activation_bits = None
        self.signed, self.calibrated = True, False
        self.cache = TensorCache()
        self.resting = set()
        self.tailored_for, self.tailored = None, False
        for own in FOUND_AFTER_TRAINING:
            self.register_buffer(own, None, persistent=False)
        tensors = started(scheme, self)
        lacking = [name for name in ERRORS if name not in tensors]
        for name in lacking:
            tensors[name] = torch.ones(len(WIDTHS))
        self.state_names = tuple(tensors)
        for name, tensor in tensors.items():
            if name in scheme.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)
        return bool(lacking)

    def check_known(self, weight_bits: int | None, activation_bits: int | None) -> None:
        """Check that something is known of these bits: a state of 1 to 8 bits has no rows for 16.

        Args:
            weight_bits: 1 to 8 or 16, or None for float.
            activation_bits: Likewise.

        Raises:
            ValueError: For bits that the layer's tensors have no rows for, or that it wasn't calibrated for.
        """
        for bits, errors in ((weight_bits, self.weight_error), (activation_bits, self.activation_error)):
            if bits is not None and row_of(bits) >= len(errors):
                raise ValueError(not_known(bits, len(errors)))
        if self.only_bits is None:
            return
        for bits, only in zip((weight_bits, activation_bits), self.only_bits, strict=True):
            if bits not in (None, only):
                raise ValueError(
                    f"nothing is known of {bits} bits, since it was calibrated for the bits of one policy alone: quantize the "
                    "network anew without `alone`"
                )

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with its input and its weight at their bits."""
        return self._apply_weight(self._quantized_input(input), self._weight_to_use())

    def _quantized_input(self, x: Tensor) -> Tensor:
        bits = self.activation_bits
        if bits is None:
            return x
        if not self.calibrated and self.scheme.needs_data_at(None, bits):
            raise ValueError(f"layer {self.name_in_network!r}: {no_scale(bits)}")
        if self.backward_mode == "ste" or not differentiated(x):
            return self.scheme.activation(self, x, bits)
        return quantized_input(self.scheme, self, x, bits, self.backward_mode)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer by itself")

    def idle_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that take part in nothing at the present bits, by name.

        Returns:
            Parameters by name, as `named_parameters` has them.
        """
        scheme = self.scheme
        names: list[str] = []
        for name in scheme.learned:
            of_both = scheme.of_weight is None
            of_weight = of_both or name in scheme.of_weight  # type: ignore[operator]
            by_weight = self.weight_bits is not None and of_weight
            by_activation = self.activation_bits is not None and (of_both or not of_weight)
            if not by_weight and not by_activation:
                names.append(name)
        weight_is_idle = self.weight_bits is not None and not scheme.trains_weight
        if weight_is_idle:
            names += WEIGHTS
        own: dict[str, Any] = self._parameters
        if weight_is_idle and "parametrizations" in self._modules:
            own = dict(self.named_parameters())
            names += [name for name in own if name.startswith("parametrizations.weight.")]
        return {name: own[name] for name in names if own.get(name) is not None}

    def effective_bias(self) -> Tensor | None:
        """Return the bias that the layer computes with at its present bits, corrections included; None if it has none.

        Returns:
            Shape (C_out,), or None.
        """
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        shift = self.shift_of_bias()
        if shift is None:
            return bias
        if bias is None:
            return shift.to(self.weight.dtype)
        return bias + shift.to(bias.dtype)

    def shift_of_bias(self) -> Tensor | None:
        """Return what is added to the layer's bias at its present bits; None for nothing.

        Returns:
            Shape (C_out,), or None.
        """
        if self._is_tailored() and self.tailored_shift is not None:
            return self.tailored_shift
        if self.bias_shift is None or self.weight_bits is None:
            return None
        return row(self.bias_shift, self.weight_bits)

    def offset_of_rounding(self, bits: int) -> Tensor | None:
        """Return what is added to the weight's integers after rounding to nearest, at a width.

        Args:
            bits: 1 to 8, or 16.

        Returns:
            Integers in the shape of the weight; None for nothing.
        """
        if self._is_tailored() and self.tailored_offset is not None and bits == self.weight_bits:
            return self.tailored_offset
        if self.weight_offset is None or bits > MAX_BITS:
            return None
        return row(self.weight_offset, bits)

    def _is_tailored(self) -> bool:
        """Say whether the values that were found for one policy count; bits may have been set since, layer by layer."""
        return self.tailored and self.tailored_for == (self.weight_bits, self.activation_bits)

    def quantized_weight(self) -> Tensor:
        """Return the weight as the layer uses it: real values on the grid of its bits.

        It is a tensor of the caller's own, but for a weight in float, which is the layer's.

        Returns:
            A tensor in the shape of the weight.
        """
        made = self._kept_weight()
        # Nothing is kept where somebody looks on; `torch.jit.trace` does so twice, with gradients and
        # without, and wants the same operations both times.
        if self.weight_bits is None or made.requires_grad or followed(made):
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
        of_weight = scheme.of_weight
        if of_weight is None:
            of_weight = self.state_names

        def sources() -> list[Tensor]:
            offsets = [offset for offset in (self.weight_offset, self.tailored_offset) if offset is not None]
            return [self.weight, *(getattr(self, name) for name in of_weight), *offsets]

        settings = self._settings()
        if settings is None or (torch.is_grad_enabled() and differentiated(*sources())):
            return scheme.weight(self, bits)
        return self.cache.get(("weight", bits), sources, lambda: scheme.weight(self, bits), settings)

    def _settings(self) -> tuple[Any, ...] | None:
        """Return what the quantized weight depends on beside tensors; None if nobody can tell whether it is what it was."""
        # A property in place of the weight (`torch.nn.utils.parametrize`) computes it whenever it is read.
        if torch.compiler.is_compiling() or hasattr(type(self), "weight"):
            return None
        options = vars(self.scheme)
        if not all(isinstance(value, PLAIN_OPTIONS) for value in options.values()):
            return None
        return type(self.scheme), self.training, self.signed, self._is_tailored(), *options.items()

    def __getstate__(self) -> Any:
        """Copy and pickle a weight that was computed from others as a value without a past, since torch copies no other."""
        inherited = getattr(super(), "__getstate__", self.__dict__.copy)  # object has one from Python 3.11 on
        state = inherited()
        if isinstance(state, dict):
            state = {key: _without_past(value) for key, value in state.items()}
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.state_names:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in self.state_names]


def _without_past(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach()
    return value


def no_scale(bits: int | None) -> str:
    """Say why a layer that calibration never reached can't have activations of so many bits."""
    return (
        f"its input has no scale for {bits} bits, since calibration saw none of it: quantize the network anew and give "
        "`calibrate` inputs that reach it"
    )


def not_known(bits: int, most: int) -> str:
    """Say why a layer can't have so many bits, though its scheme can: its quantizer state knows fewer widths."""
    return (
        f"nothing is known of {bits} bits, since the state of its quantizers is from before there were any, and has 1 to "
        f"{most} bits: quantize the network anew and give `calibrate`"
    )


def tailor(layer: QuantLayer, *, shift: Tensor | None = None, offset: Tensor | None = None) -> None:
    """Set what was found for the policy that a layer's network has now.

    It counts until another policy is set, and again whenever this one is (`set_policy`). What isn't
    given stays as it is, if it is of the same policy.

    Args:
        layer: The layer, at its bits in that policy.
        shift: What is added to its bias, (C_out,).
        offset: What is added to its weight's integers after rounding to nearest, of the weight's shape.
    """
    bits = (layer.weight_bits, layer.activation_bits)
    if not layer.tailored or layer.tailored_for != bits:
        layer.tailored_shift = layer.tailored_offset = None
    layer.tailored_for, layer.tailored = bits, True
    if shift is not None:
        layer.tailored_shift = shift.detach().to(layer.weight).clone()
    if offset is not None:
        layer.tailored_offset = offset.detach().to(layer.weight.device, torch.int8, copy=True)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """Conv1d whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.effective_bias())


class QuantConv2d(QuantLayer, nn.Conv2d):
    """Conv2d whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.effective_bias())


class QuantLinear(QuantLayer, nn.Linear):
    """Linear whose input and weight are quantized to its bits."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.effective_bias())


class _QuantCustom(QuantLayer):
    """A Conv1d, Conv2d or Linear subclass of somebody else's: its own forward is called with the quantized weight in place.

    Attributes:
        input_name: What its own forward calls its input.
    """

    input_name: str

    def _weight_to_use(self) -> Tensor:
        # Somebody else's forward may change the weight in place, or hand it on.
        return self.quantized_weight()

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Compute the layer with its input, whatever its class calls it, and its weight at their bits.

        What else its class takes is passed on as it is.
        """
        weight = self._weight_to_use()
        if not inputs and self.input_name in named:
            named[self.input_name] = self._quantized_input(named[self.input_name])
            return self._own_forward(weight, **named)
        x, *others = inputs
        return self._own_forward(weight, self._quantized_input(x), *others, **named)

    def _own_forward(self, weight: Tensor, *inputs: Any, **named: Any) -> Tensor:
        kind = type(self)
        values = {"weight": weight}
        bias = self.effective_bias()
        if bias is not None and self.shift_of_bias() is not None:
            values["bias"] = bias
        # An attribute of the object hides a parameter, but no property.
        properties = [name for name in values if isinstance(getattr(kind, name, None), property)]
        if properties:
            self.__class__ = type(kind.__name__, (kind,), dict.fromkeys(properties))
        before = {name: self.__dict__[name] for name in values if name in self.__dict__}  # weight_norm has its weight here
        self.__dict__.update(values)
        try:
            result: Tensor = super(QuantLayer, self).forward(*inputs, **named)
        finally:
            for name in values:
                del self.__dict__[name]
            self.__dict__.update(before)
            self.__class__ = kind
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the float class, since nobody finds the quantized one by its name."""
        return _empty_layer, (float_class(self),), self.__getstate__()


def _empty_layer(kind: type[nn.Module]) -> QuantLayer:
    made = quantized_class(kind)
    return made.__new__(made)


_CLASSES: dict[type[nn.Module], type[QuantLayer]] = dict(
    zip(QUANTIZABLE, (QuantConv1d, QuantConv2d, QuantLinear), strict=True)
)


def quantized_class(kind: type[nn.Module]) -> type[QuantLayer]:
    """Return the class that takes the place of a Conv1d, Conv2d or Linear, or of a subclass of them."""
    if kind not in _CLASSES:
        content = {"__doc__": f"Quantized {kind.__name__}.", "input_name": input_name(kind)}
        _CLASSES[kind] = type(f"Quant{kind.__name__}", (_QuantCustom, kind), content)
    return _CLASSES[kind]


def make_quantized(module: nn.Module) -> QuantLayer:
    """Turn a Conv1d, Conv2d or Linear into a quantized layer that hasn't started (`start_quantizing`), and return it.

    It stays the same object, so that whoever holds it (other names, lists, hooks) holds the
    quantized layer.
    """
    if parametrize.is_parametrized(module):
        module.__class__ = class_on(quantized_class(type(module).__bases__[0]), module)
    else:
        module.__class__ = quantized_class(type(module))
    assert isinstance(module, QuantLayer)
    return module


def make_unquantized(layer: QuantLayer) -> None:
    """Turn a quantized layer back into the float layer that it was, with the weight as it is now; the same object."""
    for name in layer.resting:
        layer.get_parameter(name).requires_grad_(True)
    for name in (*layer.state_names, *FOUND_AFTER_TRAINING):
        delattr(layer, name)
    for name in OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
    layer.__class__ = float_class(layer)  # type: ignore[assignment]


def float_class(layer: QuantLayer) -> type[nn.Module]:
    """Return the class whose place a quantized layer's class took."""
    kind: type[nn.Module] = next(base for base in type(layer).__mro__[1:] if not issubclass(base, QuantLayer))  # type: ignore[assignment]
    if parametrize.is_parametrized(layer):
        return class_on(kind, layer)
    return kind
