"""Rounding that is learned: a quantized network's parts compute again what they compute in float, without labels.

AdaRound (Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for
Post-Training Quantization", ICML 2020) learns for every weight whether it is rounded up or down, so
that a layer's output is close to the float layer's. BRECQ (Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang
and Gu, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021)
does so for the output of a whole block. Leaving input values in float at random (QDrop, Wei et al.,
ICLR 2022) was tried: in so few steps it gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from quantizers.batches import BATCH as MOST_TOGETHER
from quantizers.batches import Batches, collect, copied
from quantizers.calling import Forward, call
from quantizers.copying import evaluating
from quantizers.correction import distance, float_layers
from quantizers.functional import along_channels, integer_range, quantize_tensor
from quantizers.layers import QuantLayer, tailor
from quantizers.network import quant_layers
from quantizers.observers import OnProgress, Output, first_input, no_progress
from quantizers.scheme import Scheme, SchemeLayer

METHODS = ("adaround", "brecq")
ITERATIONS = 300  # of each part
BATCH = 32  # images of an iteration
ROUNDING_RATE, SHIFT_RATE = 0.02, 1e-3  # of Adam
# The rectified sigmoid, which reaches 0 and 1 (AdaRound, equation 23).
ZETA, GAMMA = 1.1, -0.1
WARM_START = 0.2  # share of the iterations in which nothing pulls towards 0 and 1
FIRST_BETA, LAST_BETA = 20.0, 2.0
PULL = 5.0  # weight of the regulariser's mean, where the part's error before is 1
# Weight of the weights' own squared error, where a channel has as many weights as it is seen to have
# outputs, all images and places counted. With few of them, rounding would follow their accidents.
RIDGE = 0.5
MOST_VALUES = 1 << 21  # inputs and outputs of a part in a step, if these are at least
LEAST_BATCH = 4  # images
MOST_LAYERS = 8  # of a block
CACHED_BYTES = 1 << 30  # of one part's inputs and outputs


@dataclass(frozen=True)
class ReconstructedPart:
    """What was learned at once: a layer or a block, with what directly follows it.

    Attributes:
        name: The module's name.
        layers: Names of its quantized layers.
        before: The relative squared error of its outputs on the calibration images, with the inputs
            that it has in the quantized network; NaN for a layer that needs more than one input, or
            makes something else of some images than of all, which is left as it was.
        after: The same afterwards.
        is_kept: Whether what was learned is kept: only where the error is smaller.
    """

    name: str
    layers: tuple[str, ...]
    before: float
    after: float
    is_kept: bool


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did.

    Attributes:
        parts: The layers or blocks, in the order of calls.
        before: How far the network's outputs were from the float network's on the calibration
            images (`correction.distance`).
        after: The same with all that the parts keep.
        is_kept: Whether it is kept at all: only where the network's outputs are no further away.
    """

    parts: tuple[ReconstructedPart, ...]
    before: float
    after: float
    is_kept: bool

    def __str__(self) -> str:
        """Say it in a sentence."""
        kept = sum(part.is_kept for part in self.parts)
        change = f"the divergence from the float network goes from {self.before:.4g} to {self.after:.4g}"
        if not self.is_kept:
            return f"nothing is kept of the reconstruction: {change}"
        return f"{kept} of {len(self.parts)} parts are better than before; {change}"


@torch.inference_mode(False)
def reconstruct(
    qnetwork: nn.Module,
    network: nn.Module,
    batches: Batches,
    *,
    method: str = "brecq",
    iterations: int = ITERATIONS,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
    forward: Forward | None = None,
) -> Reconstruction:
    """Learn the rounding of a quantized network's weights, and shifts of its biases, for the policy that it has now.

    Part after part, in the order of calls: inputs are those of the quantized network so far, and what
    is aimed at are the float network's outputs. It begins with the rounding and the biases that
    the network has. What is found counts as long as the network has this policy (`layers.tailor`).
    No labels are needed.

    Of every part at most 1 GiB of inputs and outputs is kept: of more, every so manyth image is
    looked at.

    Args:
        qnetwork: The quantized network; changed in place.
        network: The float network that it was made of; it is left alone.
        batches: Inputs, as `quantize` takes them for calibration.
        method: "adaround": a part is one layer. "brecq": it is a block, which is a module of the
            network that has several layers, one input and one output; layers outside of blocks are
            parts by themselves. What directly follows a layer (batch norm, activation) belongs to it.
        iterations: Steps of each part, of 32 images each.
        seed: Of all that is random.
        on_progress: Is told how many of how many parts are done.
        forward: What runs a network on a batch, as in `quantize`.

    Returns:
        The errors of every part before and after, and what is kept.

    Raises:
        ValueError: For an unknown method; for a network without quantized weights; for layers whose
            scheme can't round otherwise than to the nearest level; without inputs.
    """
    _check(qnetwork, network, method, iterations, seed)
    layers = quant_layers(qnetwork)
    inputs = _in_small_batches(collect(batches, qnetwork, forward))
    saved = {name: _Found.of(layer) for name, layer in layers.items()}
    done: list[ReconstructedPart] = []
    is_kept = False
    with evaluating(qnetwork), evaluating(network), _straight_through(list(layers.values())):
        before = _distance(qnetwork, network, inputs, forward)
        try:
            parts = _parts(qnetwork, inputs[0], method, forward)
            for number, modules in enumerate(parts):
                on_progress(number, len(parts), "parts")
                learner = _Learner(qnetwork, network, modules, seed + number, forward)
                done += learner.learn(inputs, iterations)
            on_progress(len(parts), len(parts), "parts")
            for layer in layers.values():
                tailor(layer)
            after = _distance(qnetwork, network, inputs, forward)
            is_kept = after <= before
        finally:
            if not is_kept:
                _restore(layers, saved)
    return Reconstruction(tuple(done), before, after, is_kept)


def _in_small_batches(batches: Sequence[Any]) -> list[Any]:
    """Divide batches that are tensors, so that no pass holds many images at once."""
    small: list[Any] = []
    for inputs in batches:
        if isinstance(inputs, Tensor) and inputs.dim():
            small += [part for part in inputs.split(MOST_TOGETHER) if len(part)]
        else:
            small.append(inputs)
    return small


@torch.no_grad()
def _distance(qnetwork: nn.Module, network: nn.Module, inputs: list[Any], forward: Forward | None) -> float:
    return distance(qnetwork, network, inputs, forward)


def _check(qnetwork: nn.Module, network: nn.Module, method: str, iterations: int, seed: int) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a positive integer, not {iterations!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, not {seed!r}")
    layers = quant_layers(qnetwork)
    float_layers(network, layers)
    quantized = {name: layer for name, layer in layers.items() if layer.weight_bits is not None}
    if not quantized:
        raise ValueError("no layer has quantized weights at the present policy: there is no rounding to learn")
    fixed = {name: layer.scheme.name for name, layer in quantized.items() if not layer.scheme.takes_offsets}
    if fixed:
        described = ", ".join(f"{name} ({scheme})" for name, scheme in fixed.items())
        raise ValueError(f"these layers' schemes can't round otherwise than to the nearest level: {described}; linear can")


class _Found(NamedTuple):
    """What a layer has of a policy of its own."""

    bits: Any
    counts: bool
    shift: Tensor | None
    offset: Tensor | None

    @staticmethod
    def of(layer: QuantLayer) -> _Found:
        return _Found(layer.tailored_for, layer.tailored, layer.tailored_shift, layer.tailored_offset)


def _restore(layers: Mapping[str, QuantLayer], saved: Mapping[str, _Found]) -> None:
    for name, found in saved.items():
        layer = layers[name]
        layer.tailored_for, layer.tailored, layer.tailored_shift, layer.tailored_offset = found


@contextmanager
def _straight_through(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """Let gradients pass quantized inputs straight, within a `with`."""
    modes = [layer.backward_mode for layer in layers]
    try:
        for layer in layers:
            layer.backward_mode = "ste"
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.backward_mode = mode


class _Modules(NamedTuple):
    """The modules of a part.

    Attributes:
        names: What is computed one after the other: a layer or a block, and what directly follows it.
        layers: The quantized layers in it whose rounding is learned, in the order of calls.
        calls: How often it is called in one pass.
        singles: The layers of a block as parts by themselves, for a block that turns out to need
            more than its input.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    calls: int
    singles: tuple[_Modules, ...] = ()


class _Trace:
    """What one pass shows of a network: calls in their order, and what directly follows a layer."""

    def __init__(self, network: nn.Module, inputs: Any, forward: Forward | None) -> None:
        """Run the network on inputs, in the mode in which it is."""
        self.names = {module: name for name, module in network.named_modules()}
        self.calls: dict[nn.Module, int] = {}
        self.takes_more: set[nn.Module] = set()  # modules with more than one tensor in and one out
        self.chains: dict[nn.Module, list[nn.Module]] = {}
        self._open: list[_Chain] = []
        handles = []
        for module in network.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.no_grad():
                (forward or call)(network, copied(inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        tensors = [leaf for leaf in tree_leaves((inputs, dict(named))) if isinstance(leaf, Tensor)]
        first = first_input(module, inputs, named)
        if len(tensors) != 1 or tensors[0] is not first:
            self.takes_more.add(module)
        elif _is_pointwise(module):
            for chain in self._open:
                if chain.output is not None and chain.output.is_unchanged(first):
                    chain.modules.append(module)
                    chain.output = None

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            self.takes_more.add(module)
            return
        for chain in self._open:
            if chain.output is None and chain.modules[-1] is module:
                chain.output = Output(output)
        if isinstance(module, QuantLayer):
            chain = _Chain([module], Output(output))
            self._open.append(chain)
            earlier = self.chains.setdefault(module, chain.modules)
            if earlier is not chain.modules:
                # Called more than once: what follows may differ.
                self.chains[module] = [module]

    def layers_of(self, module: nn.Module) -> list[QuantLayer]:
        """Return the quantized layers in a module that are called, in the order of their first calls."""
        inside = set(module.modules())
        return [layer for layer in self.calls if layer in inside and isinstance(layer, QuantLayer)]

    def single(self, layer: nn.Module) -> _Modules:
        """Return a layer, with what follows it, as a part."""
        names = tuple(self.names[module] for module in self.chains.get(layer, [layer]))
        return _Modules(names, (self.names[layer],), self.calls[layer])

    def is_block(self, module: nn.Module) -> bool:
        """Say whether a module is one of several layers that are computed from one input, and no sequence of such modules."""
        layers = self.layers_of(module)
        if not 2 <= len(layers) <= MOST_LAYERS or module in self.takes_more or module not in self.calls:
            return False
        if any(self.calls[layer] != self.calls[module] for layer in layers):
            return False
        return sum(len(self.layers_of(child)) > 1 for child in module.children()) < 2


@dataclass
class _Chain:
    """A layer and what directly follows it; `output` is None while the last module is being called."""

    modules: list[nn.Module]
    output: Output | None


def _is_pointwise(module: nn.Module) -> bool:
    """Say whether a module is a batch norm, an activation or a dropout."""
    kinds = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
    return isinstance(module, _BatchNorm) or any(base.__module__ in kinds for base in type(module).__mro__)


def _parts(qnetwork: nn.Module, inputs: Any, method: str, forward: Forward | None) -> list[_Modules]:
    """Divide a quantized network into parts, in the order of calls."""
    trace = _Trace(qnetwork, inputs, forward)
    parts: list[_Modules] = []

    def learns(part: _Modules) -> bool:
        return any(qnetwork.get_submodule(name).weight_bits is not None for name in part.layers)

    def divide(module: nn.Module) -> None:
        layers = trace.layers_of(module)
        if isinstance(module, QuantLayer) and layers:
            parts.append(trace.single(module))
        elif method == "brecq" and module is not qnetwork and trace.is_block(module):
            singles = tuple(trace.single(layer) for layer in layers)
            names = tuple(trace.names[layer] for layer in layers)
            parts.append(_Modules((trace.names[module],), names, trace.calls[module], singles))
        else:
            for child in dict.fromkeys(module.children()):
                divide(child)

    divide(qnetwork)
    order = {trace.names[module]: place for place, module in enumerate(trace.calls)}
    unique = {part.names[0]: part for part in parts if learns(part)}
    return sorted(unique.values(), key=lambda part: order[part.layers[0]])


class _Rounding(Scheme):
    """A layer's scheme while its rounding is learned; activations are as in the scheme that it stands for.

    Every weight lies between two levels, lower and lower + step: it is scale * (lower + step * h(v)),
    h(v) = clamp(sigmoid(v) (zeta - gamma) + gamma, 0, 1) (AdaRound, equations 22 and 23).
    """

    def __init__(self, layer: QuantLayer) -> None:
        """Begin so that h is the fraction of the weight, or nearer to the level at which the layer has it now."""
        assert layer.weight_bits is not None
        bits = layer.weight_bits
        self.inner = layer.scheme
        weight = layer.weight.detach().float()
        low, high = integer_range(bits, True)
        self.scale = along_channels(layer.scheme.weight_step(layer, bits).float().expand(len(weight)), weight)
        self.step = 1
        if bits == 1:
            self.step = 2
        self.nearest = quantize_tensor(weight, self.scale, bits, True)
        self.ratio = ratio = (weight / self.scale).clamp(low, high)
        self.least = (self.nearest - ratio).square().mean().clamp_min(1e-12)
        self.lower = ratio.floor().clamp(max=high - self.step)
        if bits == 1:
            self.lower = torch.full_like(ratio, low)
        offset = layer.offset_of_rounding(bits)
        fraction = (ratio - self.lower) / self.step
        if offset is not None:
            now = (self.nearest + offset).clamp(low, high)
            self.lower = torch.where(now > ratio, now - self.step, now).clamp(low, high - self.step)
            fraction = ((ratio - self.lower) / self.step).clamp(0, 1)
            chosen = (now - self.lower) / self.step
            fraction = torch.where(now == self.nearest, fraction, (fraction + 2 * chosen) / 3)
        share = (fraction - GAMMA) / (ZETA - GAMMA)
        self.value = torch.logit(share).requires_grad_()

    def up(self) -> Tensor:
        """Return h, how far every weight is on its way from the level below to the one above."""
        return (torch.sigmoid(self.value) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the weight between its two levels."""
        return ((self.lower + self.step * self.up()) * self.scale).to(layer.weight.dtype)

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the quantized input."""
        return self.inner.activation(layer, x, bits)

    def moved(self) -> Tensor:
        """Return the squared error of the weights as a multiple of that of rounding to nearest."""
        return (self.lower + self.step * self.up() - self.ratio).square().mean() / self.least

    def offset(self) -> Tensor:
        """Return the integers that were learned minus those of rounding to nearest."""
        integers = self.lower + self.step * (self.value.detach() >= 0)
        return integers - self.nearest


class _Piece(NamedTuple):
    """Inputs of one shape of a part, along the first dimension, and what is aimed at."""

    inputs: Tensor  # in the quantized network so far
    floats: Tensor  # in the float network
    targets: Tensor  # outputs in the float network


class _Learner:
    """Learns one part."""

    def __init__(self, qnetwork: nn.Module, network: nn.Module, part: _Modules, seed: int, forward: Forward | None) -> None:
        self.qnetwork, self.network, self.part, self.seed = qnetwork, network, part, seed
        self.forward = forward or call
        self.modules = [qnetwork.get_submodule(name) for name in part.names]
        self.float_modules = [network.get_submodule(name) for name in part.names]
        self.layers: dict[str, QuantLayer] = {}
        for name in part.layers:
            layer = qnetwork.get_submodule(name)
            assert isinstance(layer, QuantLayer)
            if layer.weight_bits is not None:
                self.layers[name] = layer

    def learn(self, inputs: Sequence[Any], iterations: int) -> list[ReconstructedPart]:
        """Learn the part, and keep it if it is better than before; returns what came out."""
        pieces = self._gather(inputs)
        if not pieces:
            done: list[ReconstructedPart] = []
            if not self.part.singles:
                return [ReconstructedPart(self.part.names[0], tuple(self.layers), math.nan, math.nan, False)]
            for single in self.part.singles:
                if self.layers.keys() & set(single.layers):
                    done += _Learner(self.qnetwork, self.network, single, self.seed, self.forward).learn(inputs, iterations)
            return done
        before = self._error(pieces)
        after = before
        if 0 < before < math.inf:
            saved = {name: _Found.of(layer) for name, layer in self.layers.items()}
            try:
                self._optimize(pieces, before, iterations)
                after = self._error(pieces)
            finally:
                if not after < before:
                    _restore(self.layers, saved)
        return [ReconstructedPart(self.part.names[0], tuple(self.layers), before, after, after < before)]

    @torch.no_grad()
    def _gather(self, batches: Sequence[Any]) -> list[_Piece]:
        """Return inputs and targets; nothing for a part that needs more than its input."""
        found: dict[torch.Size, list[_Piece]] = {}
        every = 1
        for number, batch in enumerate(batches):
            calls = _captured(partial(self.forward, self.qnetwork), self.modules[0], self.part.calls, batch)
            float_calls = _captured(partial(self.forward, self.network), self.float_modules[0], self.part.calls, batch)
            if number == 0:
                if not all(_is_whole(self.modules[0], *call) for call in calls):
                    return []
                size = sum(2 * x.nbytes + made.nbytes for x, made in calls)
                every = max(1, math.ceil(size * len(batches) / CACHED_BYTES))
            for (x, _), (floats, _) in zip(calls, float_calls, strict=True):
                x, floats = x[::every].clone(), floats[::every].clone()
                piece = _Piece(x, floats, _run(self.float_modules, floats))
                found.setdefault(x.shape[1:], []).append(piece)
        return [_Piece(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True))) for pieces in found.values()]

    @torch.no_grad()
    def _error(self, pieces: Sequence[_Piece]) -> float:
        """Return the relative squared error of the part's outputs."""
        error = energy = 0.0
        for piece in pieces:
            for x, target in zip(piece.inputs.split(BATCH), piece.targets.split(BATCH), strict=True):
                error += float((_run(self.modules, x) - target).double().square().sum())
                energy += float(target.double().square().sum())
        if not math.isfinite(error):
            return math.inf
        return error / max(energy, torch.finfo(torch.double).tiny)

    def _optimize(self, pieces: Sequence[_Piece], before: float, iterations: int) -> None:
        """Learn rounding and shifts, and tailor the layers to them."""
        device = pieces[0].inputs.device
        generator = torch.Generator().manual_seed(self.seed)  # of the CPU, so that all devices draw the same
        spread: dict[str, float] = {}
        freedom: dict[str, float] = {}
        starts: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            expected = self._correct_mean(name, pieces)
            spread[name] = expected.spread()
            freedom[name] = layer.weight[0].numel() / expected.count
            start = layer.shift_of_bias()
            assert start is not None
            starts[name] = start.float()
        roundings = {name: _Rounding(layer) for name, layer in self.layers.items()}
        moves = {name: torch.zeros_like(start).requires_grad_() for name, start in starts.items()}
        values = [rounding.value for rounding in roundings.values()]
        optimizer = torch.optim.Adam(
            [{"params": values, "lr": ROUNDING_RATE}, {"params": list(moves.values()), "lr": SHIFT_RATE}]
        )
        energy = sum(float(piece.targets.double().square().mean()) * len(piece.inputs) for piece in pieces)
        unit = before * energy / sum(len(piece.inputs) for piece in pieces)
        weights = torch.tensor([float(len(piece.inputs)) for piece in pieces])
        choice = torch.Generator().manual_seed(self.seed)
        with ExitStack() as stack, torch.enable_grad():
            for name, layer in self.layers.items():
                stack.callback(setattr, layer, "scheme", layer.scheme)
                layer.scheme = roundings[name]
            for step in range(iterations):
                piece = pieces[int(torch.multinomial(weights, 1, generator=choice))]
                rows = torch.randint(len(piece.inputs), (_batch(piece),), generator=generator).to(device)
                for name, layer in self.layers.items():
                    layer.tailored_shift = starts[name] + spread[name] * moves[name]
                made = _run(self.modules, piece.inputs[rows])
                loss = (made - piece.targets[rows]).float().square().mean() / unit
                loss = loss + _pull(roundings.values(), step / iterations)
                for name, rounding in roundings.items():
                    loss = loss + RIDGE * freedom[name] * rounding.moved()
                optimizer.zero_grad()
                loss.backward(inputs=[*values, *moves.values()])
                optimizer.param_groups[1]["lr"] = SHIFT_RATE * (1 + math.cos(math.pi * step / iterations)) / 2
                optimizer.step()
        for name, layer in self.layers.items():
            tailor(layer, shift=starts[name] + spread[name] * moves[name], offset=roundings[name].offset())
        if len(self.layers) == 1:
            self._correct_mean(next(iter(self.layers)), pieces)

    @torch.no_grad()
    def _correct_mean(self, name: str, pieces: Sequence[_Piece]) -> _Outputs:
        """Shift a layer's bias so that the mean of its outputs is the float layer's; returns these."""
        layer, of = self.layers[name], self.network.get_submodule(name)
        is_linear = isinstance(layer, nn.Linear)
        found, expected = _Outputs(is_linear), _Outputs(is_linear)
        for piece in pieces:
            for x, floats in zip(piece.inputs.split(BATCH), piece.floats.split(BATCH), strict=True):
                with found.watching(layer):
                    _run(self.modules, x)
                with expected.watching(of):
                    _run(self.float_modules, floats)
        shift = expected.mean() - found.mean()
        before = layer.shift_of_bias()
        if before is not None:
            shift = shift + before
        tailor(layer, shift=shift)
        return expected


def _batch(piece: _Piece) -> int:
    """Return of how many images a step is: fewer where they are large, since then every image has many places."""
    values = piece.inputs[0].numel() + piece.targets[0].numel()
    return min(BATCH, max(LEAST_BATCH, MOST_VALUES // values))


def _pull(roundings: Any, time: float) -> Tensor | float:
    """Return what pulls weights to one of their two levels: the mean of 1 - |2 h - 1|^beta (AdaRound, equation 24).

    Args:
        roundings: Those of a part.
        time: From 0 at the begin to 1 at the end.

    Returns:
        The mean, times PULL; beta falls from 20 to 2 after the warm start.
    """
    if time < WARM_START:
        return 0.0
    beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - (time - WARM_START) / (1 - WARM_START))
    terms = [1 - (2 * rounding.up() - 1).abs().pow(beta) for rounding in roundings]
    total = torch.stack([term.sum() for term in terms]).sum()
    return PULL * total / sum(term.numel() for term in terms)


class _Outputs:
    """Mean and spread of a layer's outputs."""

    def __init__(self, is_linear: bool) -> None:
        self.dim = 1
        if is_linear:
            self.dim = -1
        self.sums: list[Tensor] = []
        self.squares, self.count = 0.0, 0

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """Look at what a layer returns within a `with`."""
        handle = layer.register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        rows = output.detach().movedim(self.dim, -1).flatten(0, -2)
        self.sums.append(rows.sum(0, dtype=torch.float64))
        self.squares += float(rows.double().square().sum())
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Return the mean of each channel."""
        return torch.stack(self.sums).sum(0) / self.count

    def spread(self) -> float:
        """Return the standard deviation of values from their channel's mean."""
        mean = self.mean()
        return math.sqrt(max(0.0, self.squares / self.count / len(mean) - float(mean.square().mean())))


class _Reached(BaseException):
    """Ends a pass where all has been seen."""


def _captured(network: Callable[[Any], Any], module: nn.Module, calls: int, inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """Run a network until a module was called so often; returns copies of its inputs and outputs, call by call."""
    given: list[Tensor] = []
    made: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given.append(first_input(module, inputs, named).detach().clone())

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        made.append(output.detach().clone())
        if len(made) == calls:
            raise _Reached

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        network(copied(inputs))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(given, made, strict=True))


def _is_whole(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    """Say whether a module makes the same of a part of its input, along the first dimension, called by itself."""
    if not given.dim() or not made.dim() or len(given) != len(made):
        return False
    count = max(1, len(given) // 2)
    try:
        alone = module(given[:count].clone())
    except Exception:  # whatever it needs beside its input
        return False
    if not isinstance(alone, Tensor) or alone.shape != made[:count].shape:
        return False
    return torch.allclose(alone, made[:count], rtol=1e-3, atol=1e-4 * float(made.abs().max()))


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute modules one after the other; the first gets a copy, since it may change its input in place."""
    made = x.clone()
    for module in modules:
        made = module(made)
    return made
