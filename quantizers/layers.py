"""Layers that know their bits, and whole networks made of them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers import calibrate as calibration
from quantizers.backward import BACKWARD, quantized_input
from quantizers.functional import differentiated
from quantizers.policy import QUANTIZABLE, BitPolicy, Bits
from quantizers.scheme import Scheme


class QuantLayer(nn.Module):
    """What QuantConv1d, QuantConv2d and QuantLinear share. They keep the float layer's parameters and `state_dict` keys.

    weight_bits, activation_bits
        1..8, or None for float. Can be set at any time (`set_policy`).
    backward_mode
        what the gradient does at the quantized input (`quantizers.backward_mode`).
    scheme
        how values become few-bit ones. Its tensors (see its docstring) are attributes of the layer; those that are learned
        are parameters, but none of them is in the `state_dict`: `quantizer_state` has them.
    """

    weight: Tensor
    backward_mode: str = "ste"
    # Tensors of the linear scheme and its relatives.
    weight_scale: Tensor
    activation_scale: Tensor
    activation_signed: Tensor
    weight_error: Tensor
    activation_error: Tensor

    def _start(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.weight_bits: int | None = None
        self.activation_bits: int | None = None
        self.signed = True  # whether the input was negative during calibration
        tensors = scheme.start(self)
        self.state_names = tuple(tensors)
        for name, tensor in tensors.items():
            if name in scheme.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)
        self._bank: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits is not None:
            plain = self.backward_mode == "ste" or not differentiated(x)
            x = (self.scheme.activation if plain else quantized_input)(self, x, self.activation_bits)
        return self._apply_weight(x, self.quantized_weight())

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a layer by itself")

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: real values on the grid of its bits.

        Without gradients the result is kept per width until the weight, or what else it depends on, changes.
        """
        bits = self.weight_bits
        if bits is None:
            return self.weight
        sources = [self.weight, *(getattr(self, name) for name in self.scheme.of_weight)]
        learning = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        # Nobody counts the changes of inference tensors.
        if learning or torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            return self.scheme.weight(self, bits)
        # torch counts in-place changes of a tensor; a replaced tensor has another address.
        state = tuple(number for source in sources for number in (source._version, source.data_ptr()))
        kept = self._bank.get(bits)
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = state, self.scheme.weight(self, bits).detach()
            self._bank[bits] = kept
        return kept[1]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.state_names:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in self.state_names]

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


def _replace(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in another's place; the network itself may be the one. Returns the network."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
    return network


def quant_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a network by name, in the order of its modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLayer)}


def quantize(
    network: nn.Module,
    policy: Mapping[str, Bits],
    *,
    scheme: str | Scheme | Mapping[str, str | Scheme] = "linear",
    calibrate: calibration.Batches | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a network whose convolutions and linear layers compute at the bits of a policy.

    scheme: a name (`Scheme.known`), a scheme with its options, such as Linear(calibration="kl"), or one per layer of the
        policy, by name. What belongs to a width is found for every width at once, so that bits can be set again with
        `set_policy` at no cost.
    calibrate: inputs, as one tensor or an iterable of tensors or (inputs, labels). Not needed by schemes that look at no
        data, nor if all activations stay in float. Or instead
    state: what `quantizer_state` returned for the same network and scheme.
    policy: must name every Conv1d, Conv2d and Linear that is called; (None, None) leaves one in float.

    Raises ValueError for unknown or missing layers, for bits out of range or without meaning in the scheme, and for
    calibration without data.
    """
    schemes = _schemes(scheme, policy)
    blind = all(activation is None or not schemes[name].needs_data for name, (_, activation) in policy.items())
    if calibrate is not None and state is not None:
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), not both")
    if calibrate is None and state is None and not blind:
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
    if unseen and state is None:
        raise ValueError(f"the policy lacks layers {', '.join(unseen)}; (None, None) leaves a layer in float")
    for name in policy:
        module = made.get_submodule(name)
        layer = _quant_class(type(module)).__new__(_quant_class(type(module)))
        # Containers of their own: hooks and parameters of the float layer stay what they are.
        layer.__dict__.update({key: copy.copy(x) if isinstance(x, dict) else x for key, x in module.__dict__.items()})
        layer._start(schemes[name])
        layer.to(module.weight.device)  # type: ignore[arg-type]
        made = _replace(made, name, layer)
        if state is None:
            _calibrate(name, layer, observers[name] if observers else None, policy[name])
    if state is not None:
        load_quantizer_state(made, state)
    set_policy(made, policy)
    return made


def _schemes(scheme: str | Scheme | Mapping[str, str | Scheme], policy: Mapping[str, Bits]) -> dict[str, Scheme]:
    if not isinstance(scheme, Mapping):
        return dict.fromkeys(policy, Scheme.named(scheme))
    if differing := sorted(set(scheme) ^ set(policy)):
        raise ValueError(f"`scheme` must name the policy's layers, and only those; {differing[0]!r} is in one of the two only")
    return {name: Scheme.named(chosen) for name, chosen in scheme.items()}


@torch.no_grad()
def _calibrate(name: str, layer: QuantLayer, observer: calibration.Observer | None, bits: Bits) -> None:
    seen = observer if observer is not None and observer.values else None
    if seen is None and bits[1] is not None and layer.scheme.needs_data:
        raise ValueError(f"layer {name!r} was never called during calibration, so its input has no scale")
    try:
        layer.scheme.calibrate(layer, seen)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason
    layer.signed = seen.signed if seen is not None else True


def float_copy(network: nn.Module) -> nn.Module:
    """A copy of a quantized network as a float network again, with the weights as they are now."""
    made = copy.deepcopy(network)
    for name, layer in quant_layers(made).items():
        kind = next(base for base in type(layer).__mro__ if not issubclass(base, QuantLayer))
        module: nn.Module = kind.__new__(kind)  # type: ignore[assignment]
        ours = {"scheme", "weight_bits", "activation_bits", "backward_mode", "signed", "state_names", "_bank"}
        module.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in ours})
        for tensors in (module._parameters, module._buffers):
            for key in layer.state_names:
                tensors.pop(key, None)
        module._non_persistent_buffers_set -= set(layer.state_names)
        made = _replace(made, name, module)
    return made


def set_policy(network: nn.Module, policy: Mapping[str, Bits]) -> None:
    """Set the bits of every quantized layer. Raises ValueError, changing nothing, for unknown or missing layers."""
    layers = quant_layers(network)
    checked = policy if isinstance(policy, BitPolicy) else BitPolicy(policy)
    _check_names(checked, layers)
    if missing := [name for name in layers if name not in checked]:
        raise ValueError(f"the policy lacks layers {', '.join(missing)}")
    for name, bits in checked.items():
        try:
            layers[name].scheme.check(*bits, signed=layers[name].signed)
        except ValueError as reason:
            raise ValueError(f"layer {name!r}: {reason}") from reason
    for name, (weight, activation) in checked.items():
        layer = layers[name]
        layer.weight_bits, layer.activation_bits = weight, activation


@contextmanager
def backward_mode(network: nn.Module, mode: str) -> Iterator[None]:
    """Within it, gradients pass the quantized inputs of a network's layers as `mode` says. Networks without quantized layers
    have nothing to change. Raises ValueError for a mode that there isn't."""
    if mode not in BACKWARD:
        raise ValueError(f"unknown backward mode {mode!r}; known: {', '.join(BACKWARD)}")
    layers = list(quant_layers(network).values())
    before = [layer.backward_mode for layer in layers]
    try:
        for layer in layers:
            layer.backward_mode = mode
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.backward_mode = mode


def activation_scales(network: nn.Module) -> list[Tensor]:
    """The activation scales of a quantized network, of shape (8,) per layer, now requiring gradients: give them to an
    optimizer and they are learned (LSQ, Esser et al., ICLR 2020). Keep them positive."""
    layers = quant_layers(network)
    if without := [name for name, layer in layers.items() if "activation_scale" not in layer.state_names]:
        raise ValueError(f"layer {without[0]!r} has scheme {layers[without[0]].scheme.name!r}, which has no activation scales")
    return [layer.activation_scale.requires_grad_(True) for layer in layers.values()]


def get_policy(network: nn.Module) -> BitPolicy:
    """The bits that a quantized network has now."""
    return BitPolicy({name: (m.weight_bits, m.activation_bits) for name, m in quant_layers(network).items()})


def quantizer_state(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a quantized network's scheme, by layer: what its `state_dict` (the float network's) doesn't hold."""
    state = {}
    for name, layer in quant_layers(network).items():
        for key in layer.state_names:
            state[f"{name}.{key}"] = getattr(layer, key).detach().clone()
        state[f"{name}.signed"] = torch.tensor(layer.signed)
    return state


def load_quantizer_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all of it. Raises ValueError, changing nothing, if `state` is of another network or scheme."""
    layers = quant_layers(network)
    expected = {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in layer.state_names}
    signs = {f"{name}.signed": layer for name, layer in layers.items()}
    if wrong := sorted((set(expected) | set(signs)) ^ set(state)):
        raise ValueError(f"the quantizer state is of another network: {len(wrong)} names differ, such as {wrong[0]}")
    if wrong := [key for key, tensor in expected.items() if tensor.shape != state[key].shape]:
        raise ValueError(f"the quantizer state is of another network: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])
    for key, layer in signs.items():
        layer.signed = bool(state[key])


def _check_names(policy: Mapping[str, Bits], known: Mapping[str, object]) -> None:
    for name in policy:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
            raise ValueError(f"the policy names {name!r}, which is no layer of the network; close: {', '.join(close)}")
