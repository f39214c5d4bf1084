"""Whole networks of quantized layers: made, set to a policy, saved, restored, and turned back into float ones."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantizers.backward import BACKWARD
from quantizers.batches import Batches, collect
from quantizers.calling import Forward
from quantizers.copying import copy_network, evaluating
from quantizers.correction import MeanInput, correct_bias, correct_weights
from quantizers.functional import FEW_BITS, MAX_BITS, WIDE_BITS, WIDTHS, row_of
from quantizers.kept import check_pruned_to
from quantizers.layers import (
    ERRORS,
    FOUND_AFTER_TRAINING,
    QuantLayer,
    make_quantized,
    make_unquantized,
    no_scale,
    not_known,
)
from quantizers.left_in_float import Guard, Reads, close_fast_paths, make_float, read_by_others, warn_of_float
from quantizers.moments import InputMoments, Passes
from quantizers.observers import Observer, OnProgress, no_progress, observe
from quantizers.policy import QUANTIZABLE, BitPolicy, Bits
from quantizers.residuals import (
    FirstReaders,
    ResidualGrid,
    calibrate_residuals,
    read_residual_state,
    remove_residual_quantizers,
    residual_quantizers,
    residual_state,
)
from quantizers.rounding import gptq
from quantizers.scheme import Scheme, failing_as, try_out

Schemes = str | Scheme | Mapping[str, str | Scheme]
Roundings = str | Mapping[str, str]
FLAGS = ("signed", "calibrated")  # of a layer, in the quantizer state
TAILORED_FOR = "tailored_for"  # likewise, where there is one: two integers, 0 for float
CORRECTIONS = (None, "analytic", "sequential")
ROUNDINGS = ("nearest", "gptq")


def quant_layers(network: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a network by name, in the order of its modules.

    Args:
        network: The network; a float one has none.

    Returns:
        Layers by their dotted module names.
    """
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantLayer)}


def quantize(
    network: nn.Module,
    policy: Mapping[str, Bits],
    *,
    scheme: Schemes = "linear",
    calibrate: Batches | None = None,
    state: Mapping[str, Tensor] | None = None,
    correction: str | None = None,
    rounding: Roundings = "nearest",
    on_progress: OnProgress = no_progress,
    forward: Forward | None = None,
    alone: bool = False,
) -> nn.Module:
    """Make a copy of a network whose convolutions and linear layers compute at the bits of a policy.

    What belongs to a width is found for every width at once, so that bits can be set again with
    `set_policy` at no cost.

    Args:
        network: A float network; it is left alone.
        policy: (weight bits, activation bits) by layer, each 1..8, 16 or None; must name every
            Conv1d, Conv2d and Linear that is called. None leaves that operand in float, and (None,
            None) the layer. Shares of channels that it keeps must be those that the network was pruned
            to (`remove_channels`).
        scheme: A name (`Scheme.named`), a scheme with its options, such as
            Linear(calibration="kl"), or one per layer of the policy, by name.
        calibrate: Inputs, as one tensor or an iterable of tensors or (inputs, labels). Inputs may have
            any structure: a tuple is spread over the network's arguments, a mapping over those by
            name (`quantizers.calling`). Batches whose activations would take more than 256 MiB in
            one module are gone through in parts (`quantizers.batches`). Not needed where the scheme
            needs no data at the policy's bits (`Scheme.needs_data_at`), as where all activations stay
            in float. Or instead
        state: What `quantizer_state` returned for the same network and scheme.
        correction: "analytic" adds to biases what quantized weights take away from the mean of each
            layer's outputs, for every width; "sequential" does that too, and then corrects the biases
            once more for this policy (`correct_bias`); None leaves biases alone.
        rounding: How weights become integers: to the "nearest", or by "gptq" (`quantizers.rounding`),
            for every width; or one per layer of the policy, by name. Layers that calibration never
            reaches are rounded to nearest.
        on_progress: Is told how many of how many steps are done, in batches and layers.
        forward: `forward(network, batch)` runs the network on a batch as it was given, labels included,
            on the network's device. None: the network is called with the inputs.
        alone: Whether the network will never have other bits than the policy's, or float: then nothing need be
            found for other widths, which takes a part of the time. What it computes is the same.

    Returns:
        The quantized copy, in the mode (training or not) of the network.

    Raises:
        ValueError: For unknown or missing layers, for bits out of range or without meaning in the
            scheme, for calibration without data, for a correction or rounding without it, for
            shares of channels that the network wasn't pruned to, and for
            GPTQ with too few images, saying how many are enough.

    Warns:
        LeftInFloat: Naming what multiplies by weights and isn't quantized (a ConvTranspose2d, a GRU).
    """
    if not isinstance(policy, BitPolicy):
        policy = BitPolicy(policy)
    check_pruned_to(network, policy.keep)
    # What is made in inference mode can't be trained, ever.
    with torch.inference_mode(False):
        wanted = Wanted(_schemes(scheme, policy), correction, _roundings(rounding, policy), forward, alone)
        if correction == "sequential" and calibrate is not None:
            calibrate = _kept(calibrate, network, forward)  # to go through it again
        made, reads = _quantized(network, policy, wanted, calibrate, state, on_progress)
        if correction == "sequential" and calibrate is not None:
            correct_bias(made, network, calibrate, on_progress=on_progress, forward=forward)
    warn_of_float(made, policy, reads, stacklevel=2)
    return made


class Wanted(NamedTuple):
    """How a network is to be quantized: schemes and roundings by layer, the correction, what runs it, and for which bits."""

    schemes: Mapping[str, Scheme]
    correction: str | None
    roundings: Mapping[str, str]
    forward: Forward | None = None
    alone: bool = False


def _kept(calibrate: Batches, network: nn.Module, forward: Forward | None) -> list[Any]:
    """Return all batches as a list."""
    parts = collect(calibrate, network, forward)
    if forward is not None:
        return parts
    return [(inputs,) for inputs in parts]


def _quantized(
    network: nn.Module,
    policy: Mapping[str, Bits],
    wanted: Wanted,
    calibrate: Batches | None,
    state: Mapping[str, Tensor] | None,
    on_progress: OnProgress,
) -> tuple[nn.Module, dict[str, str]]:
    """Return the quantized copy of a network, and the functions that read weights past their layers (`Reads`)."""
    schemes = wanted.schemes
    _check_sources(schemes, policy, calibrate, state, bool(residual_quantizers(network)))
    _check_wanted(wanted, calibrate)
    if already := quant_layers(network):
        raise ValueError(f"the network is quantized already (layer {next(iter(already))}): use set_policy")
    if hasattr(network, "_orig_mod"):
        raise ValueError("the network is compiled: quantize what was compiled (its `_orig_mod`), and compile the result")
    made = copy_network(network)
    residuals: dict[str, nn.Module] = dict(residual_quantizers(made))
    floats: dict[str, nn.Module] = {name: m for name, m in made.named_modules() if isinstance(m, QUANTIZABLE)}
    _check_names(policy, floats, made)
    close_fast_paths(made)
    observers: dict[str, Observer] = {}
    reads = Reads(made)
    uncorrected: list[str] = []
    means: dict[str, MeanInput] = {}
    if wanted.correction is not None:
        means = {name: MeanInput() for name in policy}
    passes = _passes(made, wanted, floats, calibrate)
    first = FirstReaders(residuals, policy)
    if calibrate is not None:
        also = (means, passes.hooks(), first.hooks())
        observers = observe(made, {**floats, **residuals}, calibrate, reads, also, on_progress, wanted.forward)
    readers = read_by_others(made, reads.found)
    if state is None:
        _check_complete(policy, floats, observers, readers)
    _check_called(policy, floats, observers, readers)
    for done, name in enumerate(policy):
        on_progress(done, len(policy), "layers")
        module = floats[name]
        with evaluating(module):
            before = module.weight.detach().clone()  # type: ignore[operator]
            layer = make_quantized(module)
            lacks_errors = _start(name, layer, schemes[name])
            if wanted.alone:
                layer.only_bits = policy[name]
            layer.to(before.device)
            if state is None:
                moments = passes.take(name)
                _calibrate(name, layer, observers.get(name), policy[name], lacks_errors, moments)
                if wanted.roundings[name] == "gptq":
                    _round(layer, moments, policy[name])
                if name in means and not correct_weights(layer, means[name]):
                    uncorrected.append(name)
            if not torch.allclose(layer.weight, before, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"layer {name!r}: scheme {layer.scheme.name!r} changes `layer.weight` in place: change a copy"
                )
    for name, module in floats.items():
        if name not in policy:
            module.register_forward_pre_hook(Guard(name))
    if state is not None:
        load_quantizer_state(made, state)
    else:
        calibrate_residuals(made, observers, quant_layers(made), first.found)
    set_policy(made, policy)
    _warn_of_uncorrected(uncorrected)
    return made, reads.found


def _warn_of_uncorrected(uncorrected: list[str]) -> None:
    if uncorrected:
        warnings.warn(
            f"{len(uncorrected)} layers stay without bias correction, since their outputs are more than the products of one "
            f"input with their weight: {', '.join(uncorrected)}",
            stacklevel=4,
        )


def _schemes(scheme: Schemes, policy: Mapping[str, Bits]) -> dict[str, Scheme]:
    """Return the scheme of every layer of a policy."""
    if not isinstance(scheme, Mapping):
        return dict.fromkeys(policy, Scheme.named(scheme))
    if differing := sorted(set(scheme) ^ set(policy)):
        raise ValueError(f"`scheme` must name the policy's layers, and only those; {differing[0]!r} is in one of the two only")
    return {name: Scheme.named(chosen) for name, chosen in scheme.items()}


def _roundings(rounding: Roundings, policy: Mapping[str, Bits]) -> dict[str, str]:
    """Return how the weights of every layer of a policy are rounded."""
    if not isinstance(rounding, Mapping):
        rounding = dict.fromkeys(policy, rounding)
    for name in rounding:
        if name not in policy:
            raise ValueError(f"`rounding` names {name!r}, which is no layer of the policy")
    for name in policy:
        if name not in rounding:
            raise ValueError(f"`rounding` lacks layer {name!r}: name every layer of the policy, or give one rounding for all")
    for chosen in rounding.values():
        if chosen in ("adaround", "brecq"):
            raise ValueError(f"rounding {chosen!r} is learned for one policy: call `reconstruct` with what `quantize` returns")
        if chosen not in ROUNDINGS:
            raise ValueError(f"unknown rounding {chosen!r}; known: {', '.join(ROUNDINGS)}")
    return dict(rounding)


def _passes(made: nn.Module, wanted: Wanted, floats: Mapping[str, nn.Module], calibrate: Batches | None) -> Passes:
    """Return the second moments that schemes and roundings ask for."""
    moments = {}
    if calibrate is not None:
        for name in wanted.schemes:
            if wanted.schemes[name].needs_moments() or wanted.roundings[name] == "gptq":
                centred, rounds = wanted.correction is not None, wanted.roundings[name] == "gptq"
                moments[name] = InputMoments(name, floats[name], centred, rounds)

    def look(hooks: Mapping[str, InputMoments]) -> None:
        assert calibrate is not None
        observe(made, {name: floats[name] for name in hooks}, calibrate, also=(hooks,), forward=wanted.forward)

    return Passes(moments, calibrate, look)


def _check_sources(
    schemes: Mapping[str, Scheme],
    policy: Mapping[str, Bits],
    calibrate: Batches | None,
    state: Mapping[str, Tensor] | None,
    has_residuals: bool,
) -> None:
    if calibrate is not None and state is not None:
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), not both")
    needing = has_residuals or any(schemes[name].needs_data_at(*bits) for name, bits in policy.items())
    if calibrate is None and state is None and needing:
        raise ValueError("give `calibrate` (batches of inputs) or `state` (of quantizer_state), one of the two")


def _check_wanted(wanted: Wanted, calibrate: Batches | None) -> None:
    if wanted.correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {wanted.correction!r}; it can be 'analytic', 'sequential', or None")
    rounded = [name for name, rounding in wanted.roundings.items() if rounding != "nearest"]
    for name in rounded:
        scheme = wanted.schemes[name]
        if not scheme.takes_offsets:
            able = [known for known, kind in Scheme.known.items() if kind.takes_offsets]
            raise ValueError(
                f"layer {name!r}: weights of scheme {scheme.name!r} can't be rounded by {wanted.roundings[name]!r}: give "
                f"rounding='nearest', or a scheme with integers to choose between ({', '.join(able)})"
            )
    if calibrate is None and (wanted.correction is not None or rounded):
        asked = "rounding='gptq'"
        if wanted.correction is not None:
            asked = f"correction={wanted.correction!r}"
        raise ValueError(f"{asked} needs inputs to look at: give `calibrate` (batches of inputs)")


def _check_complete(
    policy: Mapping[str, Bits],
    floats: Mapping[str, nn.Module],
    observers: Mapping[str, Observer],
    readers: Mapping[nn.Module, str],
) -> None:
    """Refuse a policy without some layer, unless calibration shows that it is never called."""
    lacking = [name for name in floats if name not in policy]
    if observers:
        unseen = [name for name in lacking if observers[name].values]
    else:
        unseen = [name for name in lacking if floats[name] not in readers]
    if unseen:
        raise ValueError(f"the policy lacks layers {', '.join(unseen)}; (None, None) leaves a layer in float")


def _check_called(
    policy: Mapping[str, Bits],
    floats: Mapping[str, nn.Module],
    observers: Mapping[str, Observer],
    readers: Mapping[nn.Module, str],
) -> None:
    """Refuse bits for layers that are never called because somebody reads their weight, and computes in float."""
    for name, bits in policy.items():
        seen = name in observers and observers[name].values
        if floats[name] in readers and not seen and bits != (None, None):
            raise ValueError(
                f"layer {name!r} is never called: {readers[floats[name]]} reads its weight and computes in float; "
                "give it (None, None), or leave it out of the policy"
            )


def _start(name: str, layer: QuantLayer, scheme: Scheme) -> bool:
    """Give a layer its scheme and its tensors; returns whether errors must be measured."""
    try:
        return layer.start_quantizing(scheme, name)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason


@torch.no_grad()
def _round(layer: QuantLayer, moments: InputMoments | None, bits: Bits) -> None:
    """Set a layer's `weight_offset` by GPTQ, if calibration reached the layer; 16 bits need none."""
    if moments is None or not moments.images:
        return
    if bits[0] in (None, WIDE_BITS) and not moments.suffice():
        return
    scheme = layer.scheme
    widths = [width for width in FEW_BITS if scheme.takes(width, None, layer.signed)]
    if layer.only_bits is not None:
        widths = [width for width in widths if width == layer.only_bits[0]]
    scales = layer.weight.new_ones(MAX_BITS, layer.weight.shape[0])
    for width in widths:
        scales[width - 1] = scheme.weight_step(layer, width)
    layer.weight_offset = gptq(layer.weight, scales, moments, widths=widths)


@torch.no_grad()
def _calibrate(
    name: str, layer: QuantLayer, observer: Observer | None, bits: Bits, lacks_errors: bool, moments: InputMoments | None
) -> None:
    """Set a layer's scheme's tensors from what an observer and moments saw."""
    if observer is not None and not observer.values:
        observer = None
    if observer is None and layer.scheme.needs_data_at(*bits):
        raise ValueError(f"layer {name!r} was never called during calibration, so its input has no scale")
    if observer is not None:
        layer.signed, layer.calibrated = observer.signed, True
        observer.moments = moments
    try:
        with failing_as(layer.scheme, "calibrate"):
            layer.scheme.calibrate(layer, observer)
        if observer is not None:
            observer.moments = None  # which is large
        layer.weight_bits, layer.activation_bits = bits
        try_out(layer, layer.scheme, _sample(layer, observer))
        layer.weight_bits = layer.activation_bits = None
        if lacks_errors:
            with failing_as(layer.scheme, "measure_errors"):
                layer.scheme.measure_errors(layer, observer)
    except ValueError as reason:
        if str(reason).startswith(f"layer {name!r}"):
            raise
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


def float_copy(network: nn.Module, *, keep_residuals: bool = False) -> nn.Module:
    """Make a copy of a quantized network as a float network again, with the weights as they are now.

    Args:
        network: The quantized network.
        keep_residuals: Whether residual quantizers stay where they are, and quantize: torch.export then writes them down as
            `fake_quantize_per_tensor_affine`, with numbers for scale, zero point and bounds.

    Returns:
        The copy.
    """
    made = copy_network(network)
    if not keep_residuals:
        remove_residual_quantizers(made)
    for layer in quant_layers(made).values():
        make_unquantized(layer)
    make_float(made)
    return made


def set_policy(network: nn.Module, policy: Mapping[str, Bits]) -> None:
    """Set the bits of every quantized layer.

    Parameters that take part in nothing at these bits (the step of an operand in float, the float
    weight behind a codebook) require no gradient until they do again; those of an optimizer's that
    is made before are left alone by it meanwhile.

    Args:
        network: A quantized network; it is changed in place.
        policy: Pairs of widths (weights, input) by layer; None is float. It must name every quantized layer.

    Raises:
        ValueError: Changing nothing, for unknown or missing layers, for bits that mean nothing in a
            layer's scheme, for bits that need calibration data where there were none, and for shares of
            channels that the network wasn't pruned to.
    """
    layers = quant_layers(network)
    if not isinstance(policy, BitPolicy):
        policy = BitPolicy(policy)
    check_pruned_to(network, policy.keep)
    _check_names(policy, layers, network)
    if missing := [name for name in layers if name not in policy]:
        raise ValueError(f"the policy lacks layers {', '.join(missing)}")
    for name, bits in policy.items():
        _check_bits(name, layers[name], bits, layers[name].signed, layers[name].calibrated)
    for name, bits in policy.items():
        layers[name].weight_bits, layers[name].activation_bits = bits
    # What was found for one whole policy means nothing in another.
    tailored = all(layers[name].tailored_for == bits for name, bits in policy.items())
    for layer in layers.values():
        layer.tailored = tailored
    _let_rest(network, layers.values())


def _let_rest(network: nn.Module, layers: Collection[QuantLayer]) -> None:
    """Let parameters that take part in nothing at the present bits require no gradient, until they do.

    DistributedDataParallel waits for the gradient of every parameter that requires one.
    """
    if all(layer.scheme.trains_weight and not layer.scheme.learned for layer in layers):
        return
    idle = {layer: layer.idle_parameters() for layer in layers}
    # To look through the whole network for who shares a parameter takes longer than all the rest.
    if all(layer.resting <= idle[layer].keys() and not _any_requires_grad(idle[layer]) for layer in layers):
        return
    used = _ids_of_used(network, idle)
    for layer in layers:
        for name in tuple(layer.resting):
            parameter = layer.get_parameter(name)
            if id(parameter) in used:
                parameter.requires_grad_(True)
                layer.resting.remove(name)
    tired = {(layer, name) for layer in layers for name, p in idle[layer].items() if p.requires_grad and id(p) not in used}
    for layer, name in tired:
        # Every layer that shares it notes it, so that any of them can wake it.
        layer.resting.add(name)
        idle[layer][name].requires_grad_(False)


def _any_requires_grad(parameters: Mapping[str, nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters.values())


def _ids_of_used(network: nn.Module, idle: Mapping[QuantLayer, Mapping[str, nn.Parameter]]) -> set[int]:
    """Return the ids of the parameters that aren't idle, or not everywhere: two modules may share one."""
    places = set()
    for layer, parameters in idle.items():
        for name in parameters:
            owner, _, key = name.rpartition(".")
            places.add((layer.get_submodule(owner), key))
    return {id(p) for module in network.modules() for key, p in module._parameters.items() if (module, key) not in places}


def _check_bits(name: str, layer: QuantLayer, bits: Bits, signed: bool, calibrated: bool) -> None:
    if not calibrated and layer.scheme.needs_data_at(*bits):
        raise ValueError(f"layer {name!r}: {no_scale(bits[1])}")
    try:
        layer.scheme.check_widest(*bits)
        layer.scheme.check(*bits, signed=signed)
        layer.check_known(*bits)
    except ValueError as reason:
        raise ValueError(f"layer {name!r}: {reason}") from reason


def get_policy(network: nn.Module) -> BitPolicy:
    """Return the bits that a quantized network has now.

    Args:
        network: A quantized network.

    Returns:
        The policy, in the order of the network's modules.
    """
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

    Args:
        network: A quantized network.

    Returns:
        The parameters, in the order of the layers.
    """
    return [layer.get_parameter(name) for layer in quant_layers(network).values() for name in layer.scheme.learned]


def activation_scales(network: nn.Module) -> list[Tensor]:
    """Return the activation scales of a quantized network, now requiring gradients.

    Give them to an optimizer and they are learned (LSQ, Esser et al., ICLR 2020). Keep them positive.

    Args:
        network: A quantized network.

    Returns:
        A tensor (9,) for each layer: a scale by width.

    Raises:
        ValueError: Naming the layer, for a scheme that has no such scales.
    """
    layers = quant_layers(network)
    for name, layer in layers.items():
        if "activation_scale" not in layer.state_names:
            raise ValueError(f"layer {name!r} has scheme {layer.scheme.name!r}, which has no activation scales")
    return [layer.activation_scale.requires_grad_(True) for layer in layers.values()]


def quantizer_state(network: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a quantized network's schemes: what its `state_dict` (the float network's) doesn't hold.

    Keys are the layer's name, a dot, and the tensor's; beside the scheme's there are `signed` and
    `calibrated`, and what post-training quantization found (`bias_shift` and others), where it did.
    Residual quantizers have `scale`, `zero_point`, `low` and `high`.

    Args:
        network: A quantized network.

    Returns:
        Copies of the tensors, by name.

    Raises:
        ValueError: For a network that was quantized for the bits of one policy `alone`.
    """
    state = residual_state(network)
    for name, layer in quant_layers(network).items():
        if layer.only_bits is not None:
            raise ValueError(
                f"layer {name!r} was calibrated for the bits of one policy alone, and has no state of all widths: quantize "
                "the network without `alone`"
            )
        for key in layer.state_names:
            state[f"{name}.{key}"] = getattr(layer, key).detach().clone()
        for flag in FLAGS:
            state[f"{name}.{flag}"] = torch.tensor(getattr(layer, flag))
        for key in FOUND_AFTER_TRAINING:
            tensor = getattr(layer, key)
            if tensor is not None:
                state[f"{name}.{key}"] = tensor.detach().clone()
        if layer.tailored_for is not None:
            state[f"{name}.{TAILORED_FOR}"] = torch.tensor([bits or 0 for bits in layer.tailored_for])
    return state


def load_quantizer_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all that `quantizer_state` returned.

    A state from before there were 16 bits has tensors of 8 rows: so have the layer's then, and
    `set_policy` refuses 16 bits.

    Args:
        network: A network that was quantized with the same schemes; it is changed in place.
        state: Tensors by name.

    Raises:
        ValueError: Changing nothing, if `state` is of another network or scheme, or says nothing of
            the present bits.
    """
    layers = quant_layers(network)
    expected = [f"{name}.{key}" for name, layer in layers.items() for key in layer.state_names]
    flags = {f"{name}.{flag}": (layer, flag) for name, layer in layers.items() for flag in FLAGS}
    found = {f"{name}.{key}" for name in layers for key in (*FOUND_AFTER_TRAINING, TAILORED_FOR)}
    expected += [f"{name}.{key}" for name in residual_quantizers(network) for key in ResidualGrid._fields]
    if wrong := sorted((set(expected) | set(flags)) ^ (set(state) - found)):
        raise ValueError(f"the quantizer state is of another network: {len(wrong)} names differ, such as {wrong[0]}")
    for name, layer in layers.items():
        _check_shapes(name, layer, state)
        signed, calibrated = (bool(state[f"{name}.{flag}"]) for flag in FLAGS)
        bits = (layer.weight_bits, layer.activation_bits)
        _check_bits(name, layer, bits, signed, calibrated)
        _check_known(name, bits, state)
        _check_found(name, layer, state)
    grids = read_residual_state(network, state)
    for quantizer, grid in grids.items():
        quantizer.set_grid(grid)
    for name, layer in layers.items():
        for key in layer.state_names:
            _load_tensor(layer, key, state[f"{name}.{key}"])
    for key, (layer, flag) in flags.items():
        setattr(layer, flag, bool(state[key]))
    for name, layer in layers.items():
        _load_found(name, layer, state)
    if layers:
        set_policy(network, get_policy(network))


def _check_shapes(name: str, layer: QuantLayer, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor of another shape; all that have a row for each width may lack that of 16 bits."""
    rows = [(len(of_layer), len(saved)) for of_layer, saved in _errors(name, layer, state)]
    is_of_other_widths = rows[0] == rows[1] and set(rows[0]) == {len(FEW_BITS), len(WIDTHS)}
    for key in layer.state_names:
        shape, saved = tuple(getattr(layer, key).shape), tuple(state[f"{name}.{key}"].shape)
        if shape == saved:
            continue
        if not is_of_other_widths or (shape[:1], saved[:1]) != ((rows[0][0],), (rows[0][1],)) or shape[1:] != saved[1:]:
            raise ValueError(f"the quantizer state is of another network: {name}.{key} has shape {saved}")


def _errors(name: str, layer: QuantLayer, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the errors of a layer, by width, of weights and of inputs: its own and those of a state."""
    pairs = [(getattr(layer, key), state[f"{name}.{key}"]) for key in ERRORS]
    for key, (_, saved) in zip(ERRORS, pairs, strict=True):
        if saved.dim() != 1:
            raise ValueError(f"the quantizer state is of another network: {name}.{key} has shape {tuple(saved.shape)}")
    return pairs


def _check_known(name: str, bits: Bits, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the layer, for bits that a state has no rows for."""
    for width, key in zip(bits, ERRORS, strict=True):
        rows = len(state[f"{name}.{key}"])
        if width is not None and row_of(width) >= rows:
            raise ValueError(f"layer {name!r}: {not_known(width, rows)}")


@torch.no_grad()
def _load_tensor(layer: QuantLayer, key: str, saved: Tensor) -> None:
    """Set a tensor of a layer's scheme; one that lacks the row of 16 bits, or has it again, takes its place."""
    tensor: Tensor = getattr(layer, key)
    if tensor.shape == saved.shape:
        tensor.copy_(saved)
        return
    made = saved.detach().to(tensor, copy=True)
    if isinstance(tensor, nn.Parameter):
        # The same object, since optimizers may hold it.
        tensor.data = made
        tensor.grad = None
    else:
        setattr(layer, key, made)


def _check_found(name: str, layer: QuantLayer, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if what post-training quantization found is not of this layer."""
    weight = layer.weight
    channels = weight.shape[:1]
    shapes = {
        "bias_shift": (len(state[f"{name}.{ERRORS[0]}"]), *channels),
        "weight_offset": (MAX_BITS, *weight.shape),
        "tailored_shift": tuple(channels),
        "tailored_offset": tuple(weight.shape),
        TAILORED_FOR: (2,),
    }
    for key, shape in shapes.items():
        tensor = state.get(f"{name}.{key}")
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"the quantizer state is damaged: {name}.{key} is a {type(tensor).__name__} and no tensor")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the quantizer state is of another network: {name}.{key} has shape {tuple(tensor.shape)}")
        is_float = key.endswith("shift")
        if is_float != tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"the quantizer state is damaged: {name}.{key} holds {tensor.dtype}, or isn't finite")
        if key.endswith("offset") and (tensor.dtype != torch.int8 or not layer.scheme.takes_offsets):
            raise ValueError(f"the quantizer state is of another scheme: {name}.{key} is none of {layer.scheme.name!r}")
    bits = state.get(f"{name}.{TAILORED_FOR}")
    if bits is not None and not all(int(width) in (0, *WIDTHS) for width in bits):
        raise ValueError(f"the quantizer state is damaged: {name}.{TAILORED_FOR} is {bits.tolist()}")


def _load_found(name: str, layer: QuantLayer, state: Mapping[str, Tensor]) -> None:
    for key in FOUND_AFTER_TRAINING:
        tensor = state.get(f"{name}.{key}")
        if tensor is not None:
            tensor = tensor.detach().to(layer.weight.device, copy=True)
        setattr(layer, key, tensor)
    layer.tailored_for = None
    bits = state.get(f"{name}.{TAILORED_FOR}")
    if bits is not None:
        of_weight, of_activation = (int(width) or None for width in bits)
        layer.tailored_for = (of_weight, of_activation)


def scheme_records(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the schemes of a quantized network as plain data, by layer: {"name": ..., "options": {...}}.

    `schemes_from_records` makes the schemes again.

    Args:
        network: A quantized network.

    Returns:
        Name and options of the scheme, by layer.

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


def _check_names(policy: Mapping[str, Bits], known: Mapping[str, nn.Module], network: nn.Module) -> None:
    for name in policy:
        if name not in known:
            modules = dict(network.named_modules(remove_duplicate=False))
            first = [other for other, module in known.items() if module is modules.get(name)]
            if first:
                raise ValueError(f"the policy names {name!r}, which is layer {first[0]!r} too: a policy names a layer once")
            close = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
            raise ValueError(f"the policy names {name!r}, which is no layer of the network; close: {', '.join(close)}")
