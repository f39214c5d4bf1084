"""Whole networks of quantized layers: made, set to a policy, saved, restored, and turned back into float ones."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.backward import BACKWARD
from quantizers.layers import OWN_ATTRIBUTES, QuantLayer, float_class, quantized_class
from quantizers.observers import Batches, Observer, observe
from quantizers.policy import QUANTIZABLE, BitPolicy, Bits
from quantizers.scheme import Scheme, failing_as, try_out

Schemes = str | Scheme | Mapping[str, str | Scheme]
FLAGS = ("signed", "calibrated")  # of a layer, in the quantizer state


def quant_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a network by name, in the order of its modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLayer)}


def quantize(
    network: nn.Module,
    policy: Mapping[str, Bits],
    *,
    scheme: Schemes = "linear",
    calibrate: Batches | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Make a copy of a network whose convolutions and linear layers compute at the bits of a policy.

    What belongs to a width is found for every width at once, so that bits can be set again with
    `set_policy` at no cost.

    Args:
        network: A float network; it is left alone.
        policy: (weight bits, activation bits) by layer; must name every Conv1d, Conv2d and Linear
            that is called. (None, None) leaves one in float.
        scheme: A name (`Scheme.named`), a scheme with its options, such as
            Linear(calibration="kl"), or one per layer of the policy, by name.
        calibrate: Inputs, as one tensor or an iterable of tensors or (inputs, labels). Not needed
            where the scheme needs no data at the policy's bits (`Scheme.needs_data_at`), as where
            all activations stay in float. Or instead
        state: What `quantizer_state` returned for the same network and scheme.

    Returns:
        The quantized copy, in the mode (training or not) of the network.

    Raises:
        ValueError: For unknown or missing layers, for bits out of range or without meaning in the
            scheme, and for calibration without data.
    """
    schemes = _schemes(scheme, policy)
    _check_sources(schemes, policy, calibrate, state)
    floats = {name: m for name, m in network.named_modules() if isinstance(m, QUANTIZABLE)}
    if already := quant_layers(network):
        raise ValueError(f"the network is quantized already (layer {next(iter(already))}): use set_policy")
    _check_names(policy, floats)
    made = copy.deepcopy(network)
    observers: dict[str, Observer] = {}
    if calibrate is not None:
        observers = observe(made, {name: made.get_submodule(name) for name in floats}, calibrate)
    if state is None:
        _check_complete(policy, floats, observers)
    for name in policy:
        module = made.get_submodule(name)
        layer = quantized_class(type(module)).__new__(quantized_class(type(module)))
        layer.__dict__.update(_copied_containers(module))
        before = module.weight.detach().clone()  # type: ignore[operator]
        lacks_errors = _start(name, layer, schemes[name])
        layer.to(module.weight.device)  # type: ignore[arg-type]
        made = _replace(made, name, layer)
        if state is None:
            _calibrate(name, layer, observers.get(name), policy[name], lacks_errors)
        if not torch.allclose(layer.weight, before, rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"layer {name!r}: scheme {layer.scheme.name!r} changes `layer.weight` in place: change a copy")
    if state is not None:
        load_quantizer_state(made, state)
    set_policy(made, policy)
    return made


def _schemes(scheme: Schemes, policy: Mapping[str, Bits]) -> dict[str, Scheme]:
    """Return the scheme of every layer of a policy."""
    if not isinstance(scheme, Mapping):
        return dict.fromkeys(policy, Scheme.named(scheme))
    if differing := sorted(set(scheme) ^ set(policy)):
        raise ValueError(f"`scheme` must name the policy's layers, and only those; {differing[0]!r} is in one of the two only")
    return {name: Scheme.named(chosen) for name, chosen in scheme.items()}


def _check_sources(
    schemes: Mapping[str, Scheme],
    policy: Mapping[str, Bits],
    calibrate: Batches | None,
    state: Mapping[str, Tensor] | None,
) -> None:
    if calibrate is not None and state is not None:
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), not both")
    needing = any(schemes[name].needs_data_at(*bits) for name, bits in policy.items())
    if calibrate is None and state is None and needing:
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), one of the two")


def _check_complete(policy: Mapping[str, Bits], floats: Mapping[str, nn.Module], observers: Mapping[str, Observer]) -> None:
    """Refuse a policy without some layer, unless calibration shows that it is never called."""
    unseen = [name for name in floats if name not in policy and (not observers or observers[name].values)]
    if unseen:
        raise ValueError(f"the policy lacks layers {', '.join(unseen)}; (None, None) leaves a layer in float")


def _copied_containers(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes with containers of their own: its hooks and parameters stay what they are."""
    attributes = dict(module.__dict__)
    for key, value in attributes.items():
        if isinstance(value, dict):
            attributes[key] = copy.copy(value)
    return attributes


def _replace(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in another's place; the network itself may be the one. Returns the network."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
    return network


def _start(name: str, layer: QuantLayer, scheme: Scheme) -> bool:
    """Give a layer its scheme and its tensors; returns whether errors must be measured."""
    try:
        return layer.start_quantizing(scheme)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason


@torch.no_grad()
def _calibrate(name: str, layer: QuantLayer, observer: Observer | None, bits: Bits, lacks_errors: bool) -> None:
    """Set a layer's scheme's tensors from what an observer saw."""
    if observer is not None and not observer.values:
        observer = None
    if observer is None and layer.scheme.needs_data_at(*bits):
        raise ValueError(f"layer {name!r} was never called during calibration, so its input has no scale")
    if observer is not None:
        layer.signed, layer.calibrated = observer.signed, True
    try:
        with failing_as(layer.scheme, "calibrate"):
            layer.scheme.calibrate(layer, observer)
        layer.weight_bits, layer.activation_bits = bits
        try_out(layer, layer.scheme, _sample(layer, observer))
        layer.weight_bits = layer.activation_bits = None
        if lacks_errors:
            with failing_as(layer.scheme, "measure_errors"):
                layer.scheme.measure_errors(layer, observer)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason


def _sample(layer: QuantLayer, observer: Observer | None) -> Tensor:
    """Make a small input of a layer, of values that calibration saw."""
    if layer.weight.dim() == 2:
        shape = [2, layer.weight.shape[1]]
    else:
        shape = [2, layer.in_channels, *(max(5, side) for side in layer.weight.shape[2:])]  # type: ignore[list-item]
    values = torch.linspace(-1, 1, 101)
    if observer is not None:
        values = observer.sample()
    count = math.prod(shape)
    repeated = values.repeat(-(-count // len(values)))[:count]
    return repeated.reshape(shape).to(layer.weight)


def float_copy(network: nn.Module) -> nn.Module:
    """Make a copy of a quantized network as a float network again, with the weights as they are now."""
    made = copy.deepcopy(network)
    for name, layer in quant_layers(made).items():
        kind = float_class(layer)
        module: nn.Module = kind.__new__(kind)
        module.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in OWN_ATTRIBUTES})
        for tensors in (module._parameters, module._buffers):
            for key in layer.state_names:
                tensors.pop(key, None)
        module._non_persistent_buffers_set -= set(layer.state_names)
        made = _replace(made, name, module)
    return made


def set_policy(network: nn.Module, policy: Mapping[str, Bits]) -> None:
    """Set the bits of every quantized layer.

    Raises:
        ValueError: Changing nothing, for unknown or missing layers, for bits that mean nothing in a
            layer's scheme, and for bits that need calibration data where there were none.
    """
    layers = quant_layers(network)
    if not isinstance(policy, BitPolicy):
        policy = BitPolicy(policy)
    _check_names(policy, layers)
    if missing := [name for name in layers if name not in policy]:
        raise ValueError(f"the policy lacks layers {', '.join(missing)}")
    for name, bits in policy.items():
        _check_bits(name, layers[name], bits)
    for name, bits in policy.items():
        layers[name].weight_bits, layers[name].activation_bits = bits


def _check_bits(name: str, layer: QuantLayer, bits: Bits) -> None:
    try:
        layer.scheme.check(*bits, signed=layer.signed)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason
    if not layer.calibrated and layer.scheme.needs_data_at(*bits):
        raise ValueError(
            f"layer {name!r}: its input has no scale for {bits[1]} bits, since calibration saw none of it: quantize the "
            "network anew and give `calibrate`"
        )


def get_policy(network: nn.Module) -> BitPolicy:
    """Return the bits that a quantized network has now."""
    return BitPolicy({name: (m.weight_bits, m.activation_bits) for name, m in quant_layers(network).items()})


@contextmanager
def backward_mode(network: nn.Module, mode: str) -> Iterator[None]:
    """Let gradients pass the quantized inputs of a network's layers as a mode says, within a `with`.

    Networks without quantized layers have nothing to change. Raises ValueError for a mode that
    isn't in `BACKWARD`.
    """
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


def learned_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return what the layers' schemes learn beside the weights: steps, offsets, clips, codebooks.

    Give them to an optimizer in a group without weight decay, which would pull them to zero.
    """
    return [layer.get_parameter(name) for layer in quant_layers(network).values() for name in layer.scheme.learned]


def activation_scales(network: nn.Module) -> list[Tensor]:
    """Return the activation scales of a quantized network, (8,) per layer, now requiring gradients.

    Give them to an optimizer and they are learned (LSQ, Esser et al., ICLR 2020). Keep them
    positive. Raises ValueError, naming the layer, for a scheme that has no such scales.
    """
    layers = quant_layers(network)
    for name, layer in layers.items():
        if "activation_scale" not in layer.state_names:
            raise ValueError(f"layer {name!r} has scheme {layer.scheme.name!r}, which has no activation scales")
    return [layer.activation_scale.requires_grad_(True) for layer in layers.values()]


def quantizer_state(network: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a quantized network's schemes: what its `state_dict` (the float network's) doesn't hold.

    Keys are the layer's name, a dot, and the tensor's; beside the scheme's there are `signed` and
    `calibrated`.
    """
    state = {}
    for name, layer in quant_layers(network).items():
        for key in layer.state_names:
            state[f"{name}.{key}"] = getattr(layer, key).detach().clone()
        for flag in FLAGS:
            state[f"{name}.{flag}"] = torch.tensor(getattr(layer, flag))
    return state


def load_quantizer_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all that `quantizer_state` returned.

    Raises:
        ValueError: Changing nothing, if `state` is of another network or scheme.
    """
    layers = quant_layers(network)
    expected = {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in layer.state_names}
    flags = {f"{name}.{flag}": (layer, flag) for name, layer in layers.items() for flag in FLAGS}
    if wrong := sorted((set(expected) | set(flags)) ^ set(state)):
        raise ValueError(f"the quantizer state is of another network: {len(wrong)} names differ, such as {wrong[0]}")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"the quantizer state is of another network: {key} has shape {tuple(state[key].shape)}")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])
    for key, (layer, flag) in flags.items():
        setattr(layer, flag, bool(state[key]))


def scheme_records(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the schemes of a quantized network as plain data, by layer: {"name": ..., "options": {...}}.

    `schemes_from_records` makes the schemes again.

    Raises:
        ValueError: Naming the layer, for a scheme that can't be found again, or doesn't say its
            options.
    """
    records = {}
    for name, layer in quant_layers(network).items():
        try:
            records[name] = layer.scheme.record()
        except ValueError as reason:
            raise ValueError(f"layer {name!r}: {reason}") from reason
    return records


def _check_names(policy: Mapping[str, Bits], known: Mapping[str, object]) -> None:
    for name in policy:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
            raise ValueError(f"the policy names {name!r}, which is no layer of the network; close: {', '.join(close)}")
