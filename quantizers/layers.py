"""Layers that know their bits, and whole networks made of them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers import calibrate as calibration
from quantizers.functional import MAX_BITS, fake_quantize, integer_range
from quantizers.policy import QUANTIZABLE, BitPolicy, Bits

SCHEMES = ("linear",)


class QuantLayer(nn.Module):
    """What QuantConv1d, QuantConv2d and QuantLinear share. They keep the float layer's parameters and `state_dict` keys.

    weight_bits, activation_bits
        1..8, or None for float. Can be set at any time (`set_policy`): the scales of every width are there already.
    weight_scale (8, C_out), activation_scale (8,)
        row b-1 is for width b; symmetric per output channel, and per tensor.
    weight_error, activation_error (8,)
        squared error relative to the squared values, as calibrated.
    activation_signed
        whether the calibration data were ever negative; unsigned inputs use their whole range for the positive side.
    """

    weight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor
    activation_signed: Tensor
    weight_error: Tensor
    activation_error: Tensor
    # The names are part of what `quantizer_state` saves.
    STATE = ("weight_scale", "activation_scale", "activation_signed", "weight_error", "activation_error")

    def _start(self) -> None:
        self.weight_bits: int | None = None
        self.activation_bits: int | None = None
        channels = self.weight.shape[0]
        shapes = ((MAX_BITS, channels), (MAX_BITS,), (), (MAX_BITS,), (MAX_BITS,))
        for name, shape in zip(self.STATE, shapes, strict=True):
            # Not persistent: the state_dict is the float network's.
            self.register_buffer(name, torch.ones(shape), persistent=False)
        self._signed = False
        self._bank: dict[int, tuple[tuple[int, int, int, int], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is not None:
            scale = self.activation_scale[self.activation_bits - 1]
            if scale.requires_grad and torch.is_grad_enabled():
                # LSQ's step size gradient scale (section 2.2): 1 / sqrt(features x largest integer).
                largest = integer_range(self.activation_bits, self._signed)[1]
                factor = (x[0].numel() * largest) ** -0.5
                scale = scale.clone()
                scale.register_hook(lambda gradient: gradient * factor)
            x = fake_quantize(x, scale, self.activation_bits, self._signed)
        return self._apply_weight(x, self.quantized_weight())

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer by itself")

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: real values on the grid of its bits.

        Without gradients the result is kept per width until the weight or its scale changes.
        """
        bits = self.weight_bits
        if bits is None:
            return self.weight
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return fake_quantize(self.weight, self._channel_scale(bits), bits, True)
        if self.weight.is_inference() or self.weight_scale.is_inference():
            return fake_quantize(self.weight, self._channel_scale(bits), bits, True)  # whose changes nobody counts
        # torch counts in-place changes of a tensor; a replaced tensor has another address.
        state = (
            self.weight._version,
            self.weight.data_ptr(),
            self.weight_scale._version,
            self.weight_scale.data_ptr(),
        )
        kept = self._bank.get(bits)
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = state, fake_quantize(self.weight.detach(), self._channel_scale(bits), bits, True)
            self._bank[bits] = kept
        return kept[1]

    def _channel_scale(self, bits: int) -> Tensor:
        return self.weight_scale[bits - 1].view(-1, *[1] * (self.weight.dim() - 1))

    def __deepcopy__(self, memo: dict[int, object]) -> QuantLayer:
        # The bank can be many times the layer's size and is made again when needed.
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_bank"}, memo))
        made._bank = {}
        return made


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


def _quant_class(kind: type[nn.Module]) -> type[QuantLayer]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Quant{kind.__name__}", (_QuantCustom, kind), {"__doc__": f"Quantized {kind.__name__}."})
    return _CLASSES[kind]


def quant_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a network by name, in the order of its modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLayer)}


def quantize(
    network: nn.Module,
    policy: Mapping[str, Bits],
    *,
    scheme: str = "linear",
    calibrate: calibration.Batches | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a network whose convolutions and linear layers compute at the bits of a policy.

    Weights are symmetric per output channel, activations (each layer's input) per tensor, unsigned where the calibration
    data are; the scales minimise the squared error and are found for every width at once, so that bits can be set again
    with `set_policy` at no cost.

    calibrate: inputs, as one tensor or an iterable of tensors or (inputs, labels); or instead
    state: what `quantizer_state` returned for the same network, which needs no data.
    policy: must name every Conv1d, Conv2d and Linear that is called; (None, None) leaves one in float.

    Raises ValueError for unknown or missing layers, for bits out of range, and for calibration without data.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if (calibrate is None) == (state is None):
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), one of the two")
    floats = {name: m for name, m in network.named_modules() if isinstance(m, QUANTIZABLE)}
    if already := quant_layers(network):
        raise ValueError(f"the network is quantized already (layer {next(iter(already))}): use set_policy")
    _check_names(policy, floats)
    made = copy.deepcopy(network)
    observers = None
    if calibrate is not None:
        observers = calibration.observe(made, {name: made.get_submodule(name) for name in floats}, calibrate)
    unseen = [name for name in floats if name not in policy and (observers is None or observers[name].values)]
    if observers is not None and unseen:
        raise ValueError(f"the policy lacks layers {', '.join(unseen)}; (None, None) leaves a layer in float")
    for name in policy:
        module = made.get_submodule(name)
        layer = _quant_class(type(module)).__new__(_quant_class(type(module)))
        layer.__dict__.update(module.__dict__)
        layer._start()
        layer.to(module.weight.device)  # type: ignore[arg-type]
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, layer)
        if observers is not None:
            _calibrate(name, layer, observers[name], policy[name])
    if state is not None:
        load_quantizer_state(made, state)
    set_policy(made, policy)
    return made


@torch.no_grad()
def _calibrate(name: str, layer: QuantLayer, observer: calibration.Observer, bits: Bits) -> None:
    try:
        scale, error = calibration.weight_scales(layer.weight)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason
    layer.weight_scale.copy_(scale)
    layer.weight_error.copy_(error)
    if observer.values:
        scale, error = calibration.activation_scales(observer.sample(), observer.largest, observer.signed)
        layer.activation_scale.copy_(scale)
        layer.activation_error.copy_(error)
        layer.activation_signed.fill_(observer.signed)
        layer._signed = observer.signed
    elif bits[1] is not None:
        raise ValueError(f"layer {name!r} was never called during calibration, so its input has no scale")


def set_policy(network: nn.Module, policy: Mapping[str, Bits]) -> None:
    """Set the bits of every quantized layer. Raises ValueError, changing nothing, for unknown or missing layers."""
    layers = quant_layers(network)
    checked = policy if isinstance(policy, BitPolicy) else BitPolicy(policy)
    _check_names(checked, layers)
    if missing := [name for name in layers if name not in checked]:
        raise ValueError(f"the policy lacks layers {', '.join(missing)}")
    for name, (weight, activation) in checked.items():
        layer = layers[name]
        layer.weight_bits, layer.activation_bits = weight, activation


def activation_scales(network: nn.Module) -> list[Tensor]:
    """The activation scales of a quantized network, of shape (8,) per layer, now requiring gradients: give them to an
    optimizer and they are learned (LSQ, Esser et al., ICLR 2020). Keep them positive."""
    return [layer.activation_scale.requires_grad_(True) for layer in quant_layers(network).values()]


def get_policy(network: nn.Module) -> BitPolicy:
    """The bits that a quantized network has now."""
    return BitPolicy({name: (m.weight_bits, m.activation_bits) for name, m in quant_layers(network).items()})


def quantizer_state(network: nn.Module) -> dict[str, Tensor]:
    """Every scale of a quantized network, by layer: what its `state_dict` (the float network's) doesn't hold."""
    return {
        f"{name}.{key}": getattr(layer, key).detach().clone()
        for name, layer in quant_layers(network).items()
        for key in QuantLayer.STATE
    }


def load_quantizer_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set every scale. Raises ValueError, changing nothing, if `state` is of another network."""
    layers = quant_layers(network)
    expected = {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in QuantLayer.STATE}
    if wrong := sorted(set(expected) ^ set(state)):
        raise ValueError(f"the quantizer state is of another network: {len(wrong)} names differ, such as {wrong[0]}")
    if wrong := [key for key, tensor in expected.items() if tensor.shape != state[key].shape]:
        raise ValueError(f"the quantizer state is of another network: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])
    for layer in layers.values():
        layer._signed = bool(layer.activation_signed)


def _check_names(policy: Mapping[str, Bits], known: Mapping[str, object]) -> None:
    for name in policy:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
            raise ValueError(f"the policy names {name!r}, which is no layer of the network; close: {', '.join(close)}")
