"""Equalization: a float network with the same outputs whose ranges are easier to quantize.

What multiplies a channel in one layer and divides it in the next changes no output if everything
between is positively homogeneous (`quantizers.graph`). Layers that were balanced so lose less when
all their channels share one scale.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from quantizers.batches import Batches, batches_of, copied, prepared, running
from quantizers.calling import Forward, device_of, leaves, to_device
from quantizers.copying import copy_network, make_plain
from quantizers.folding import called_with, fold_norms, outputs_of
from quantizers.graph import FIXED, ChannelGraph, Clip, LayerChannels, capture
from quantizers.layers import QuantLayer
from quantizers.observers import first_input, observe
from quantizers.policy import QUANTIZABLE

TOLERANCE = 1e-5  # by which outputs may differ, of the size of the outputs
ROUNDINGS = 64  # or so many roundings to the network's type, if that is more
CONVERGED = 1e-4  # the relative change of scales below which a sweep is the last
MOST_SWEEPS = 500
DEAD = 1e-8  # of the largest weight in a layer; channels that are smaller keep their scale
ROOM = 1.25  # how far, as a factor, a ReLU6's bound must be above the data's largest output for it to be ReLU
AIMS = ("weights", "activations")
CLIPS = ("keep", "clamp")
PLAIN = tuple(kind.forward for kind in QUANTIZABLE)


class ChannelClamp(nn.Module):
    """Computes min(max(x, 0), high) with a bound `high` per channel: a ReLU6 between equalized layers."""

    high: Tensor

    def __init__(self, high: Tensor, dim: int) -> None:
        """Take the bounds (C) and the dimension of the channels."""
        super().__init__()
        self.register_buffer("high", high)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x.relu().minimum(self.high.view(-1, *[1] * (x.dim() - 1 - self.dim)))


class _Ranges:
    """What the data shows: largest and smallest values by channel, in a network before it is changed."""

    def __init__(self, network: nn.Module, graph: ChannelGraph) -> None:
        self.inputs: dict[str, Tensor] = {}  # max |x| of each layer's input channels
        self.lowest: dict[str, Tensor] = {}  # the smallest output of each layer's channels
        self.clipped: dict[tuple[str, int], Tensor] = {}  # the largest output of each call of a ReLU6
        self._calls: Counter[str] = Counter()
        self._handles = []
        for name in graph.layers:
            module = dict(network.named_modules()).get(name)
            if isinstance(module, QUANTIZABLE):
                self._handles.append(module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
                # What else a layer does to its output isn't known.
                if type(module).forward in PLAIN and not module._forward_hooks:
                    self._handles.append(module.register_forward_hook(self._output_hook(name)))
        for module in {clip.module for clip in graph.clips}:
            clips = [clip for clip in graph.clips if clip.module == module]
            self._handles.append(network.get_submodule(module).register_forward_hook(self._clip_hook(clips)))

    def _input_hook(self, name: str) -> Any:
        def see(module: nn.Module, inputs: Any, named: Any) -> None:
            _keep_largest(self.inputs, name, _by_channel(first_input(module, inputs, named).abs(), _dim(module), "amax"))

        return see

    def _output_hook(self, name: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            low = _by_channel(output, _dim(module), "amin")
            self.lowest[name] = torch.minimum(low, self.lowest.get(name, low))

        return see

    def _clip_hook(self, clips: list[Clip]) -> Any:
        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            clip = clips[self._calls[clips[0].module] % len(clips)]
            self._calls[clip.module] += 1
            _keep_largest(self.clipped, (clip.module, clip.call), _by_channel(output, clip.dim, "amax"))

        return see

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's channels, from the last."""
    if isinstance(layer, nn.Linear):
        return -1
    if isinstance(layer, nn.Conv1d):
        return -2
    return -3


def _by_channel(values: Tensor, dim: int, what: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError("an activation that isn't finite appeared on the batches that show ranges: look at the images")
    rows = values.detach().movedim(dim, 0).flatten(1)
    return getattr(rows, what)(1)  # type: ignore[no-any-return]


def _keep_largest(kept: dict[Any, Tensor], key: Any, seen: Tensor) -> None:
    kept[key] = torch.maximum(seen, kept.get(key, seen))


@torch.inference_mode(False)
@torch.no_grad()
def equalize(
    network: nn.Module,
    *example: Any,
    batches: Batches | None = None,
    layers: Collection[str] | None = None,
    by: str = "weights",
    relu6: str = "clamp",
    absorb: bool = True,
    forward: Forward | None = None,
) -> nn.Module:
    """Make a copy of a float network whose channels have even ranges, and that computes the same.

    Cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight Equalization and
    Bias Correction", ICCV 2019, equation 11): with r1 the largest weight that a channel is computed
    with, and r2 the largest that reads it, weights and bias of the channel are divided by s, and
    those that read it multiplied, where

        s = sqrt(r1 r2) / r2

    repeated over all layers until nothing changes. Channels that a residual sum adds share one s;
    r1 and r2 are geometric means over the layers then. Chains lead through what is positively
    homogeneous: ReLU, LeakyReLU, PReLU, pooling, flatten, zero padding, concatenation, and products
    with a gate; depthwise convolutions are layers of it. Batch norms behind layers are folded
    (`fold_batch_norm`). Weights that are computed (weight_norm, prune) become parameters. Channels
    of weights that are zero, or read elsewhere, keep their scale.

    ReLU6 cuts off at one value for all channels. Where no output on the data comes near its bound
    (times `ROOM`), it becomes ReLU; outputs are then the same on inputs that don't exceed the data's
    largest value by more than this factor. Elsewhere `relu6` says what happens, exactly for all
    inputs. (To let channels keep ReLU6 that are below its bound on the data isn't enough: ranges of 30
    images for EfficientNet-Lite0 it moved the outputs of others by 0.03 nats.)

    High-bias absorption (section 4.1.3): a channel that is at least c > 0 on all the data passes
    ReLU as it is; c moves from its bias to those of the layers that read it, and its range gets
    smaller. Only where c reaches them as it is: not through padding or sums. The paper's c is mean
    - 3 standard deviations of the batch norm; the smallest value is exact on the data.

    Args:
        network: The float network; it is left alone.
        *example: Its inputs, at least one image; of any structure (`quantizers.calling`).
        batches: Inputs for the ranges of activations, as in `quantize`; None: the example is all.
        layers: Names of layers whose outputs are equalized, with what shares their scales; None:
            all that can be.
        by: `weights` is the above, for weights with one scale per tensor. `activations`: s is
            sqrt(max |x| / r2) with the channel's largest value x on the data, for activations with
            one scale per tensor and weights with one per output channel.
        relu6: What becomes of a ReLU6 whose bound is reached. `clamp`: if it is called once in a
            pass, a `ChannelClamp`, which has a bound per channel; exporters may not know that. `keep`,
            and if it is called more often: it stays, and its channels keep their scale.
        absorb: Whether high biases are absorbed.
        forward: `forward(network, *example)` runs the network on the example, and `forward(network, batch)`
            on a batch, as in `quantize`; None: it is called with the inputs.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: For a network that can't be captured or in which nothing can be equalized, for
            `layers` that can't be (naming them), and if the copy's outputs on the example differ
            from the network's by more than 1e-5 of their size.
    """
    if by not in AIMS:
        raise ValueError(f"unknown aim {by!r}; known: {', '.join(AIMS)}")
    if isinstance(layers, str) or (layers is not None and not len(layers)):
        raise ValueError(f"`layers` must be a collection of names of layers, at least one, or None for all; it is {layers!r}")
    if relu6 not in CLIPS:
        raise ValueError(f"unknown choice {relu6!r} for `relu6`; known: {', '.join(CLIPS)}")
    run = running(forward)
    example = to_device(example, device_of(network))
    made, expected = _prepared(network, example, run)
    graph = capture(made, copied(example), forward)
    wanted = _wanted(graph, layers)
    ranges = _watch(made, graph, example, run, batches, forward)
    unclipped, clamped, held = _sorted_clips(made, graph, ranges, relu6 == "clamp")
    _check_held(graph, wanted, held, layers)
    if by == "weights":
        scales = _balanced(made, graph, wanted & ~held)
    else:
        scales = _smoothed(made, graph, ranges, wanted, held, 0.5)
    _apply(made, graph, scales)
    _replace_clips(made, unclipped, clamped, scales)
    if absorb:
        _absorb(made, graph, ranges, scales, wanted, [clip.node for clip in unclipped])
    _check_same(made, expected, example, run)
    return made


@torch.inference_mode(False)
@torch.no_grad()
def smooth(network: nn.Module, batches: Batches, alpha: float = 0.5, forward: Forward | None = None) -> nn.Module:
    """Make a copy of a float network in which norms leave less to quantize, and the layers behind them more.

    SmoothQuant (Xiao et al., ICML 2023, equation 4): channel j of a norm's output is divided by s_j,
    in its weight and bias, and the weights of all layers that read it are multiplied, where

        s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)

    LayerNorm, RMSNorm, GroupNorm, batch norms that aren't folded, and norms written by hand that
    end in a product with a parameter. Norms without a weight get one. A norm whose output goes
    elsewhere than to layers stays as it is.

    Args:
        network: The float network; it is left alone.
        batches: Inputs for the ranges of activations, as in `quantize`.
        alpha: How much of the difficulty goes from activations to weights, 0 to 1.
        forward: What runs the network on a batch, as in `quantize`.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: For alpha outside 0 to 1, for a network that can't be captured or in which no
            norm can be smoothed, and if the copy's outputs on the first batch differ from the
            network's by more than 1e-5 of their size.
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha!r}")
    given = iter(batches_of(batches, network))
    first = next(given, None)
    if first is None:
        raise ValueError("smoothing needs at least one image; `batches` gave none")
    example = (prepared(first, network, forward),)
    run = running(forward)
    made, expected = _prepared(network, example, run, fold=False)
    given_weights = _give_weights(made)
    graph = capture(made, copied(example), forward)
    wanted = _behind_norms(graph)
    ranges = _watch(made, graph, example, run, itertools.chain([first], given), forward)
    unclipped, clamped, held = _sorted_clips(made, graph, ranges, False)
    scales = _smoothed(made, graph, ranges, wanted, held, alpha)
    _apply(made, graph, scales)
    _replace_clips(made, unclipped, clamped, scales)
    for norm in given_weights:
        if bool((norm.weight == 1).all()):
            norm.weight = None
    _check_same(made, expected, example, run)
    return made


def _give_weights(network: nn.Module) -> list[Any]:
    """Give norms without a weight one of ones, for what they are divided by; returns them."""
    given: list[Any] = []
    for module in network.modules():
        shape: Any = None
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = module.normalized_shape
        elif isinstance(module, nn.GroupNorm):
            shape = module.num_channels
        elif isinstance(module, _NormBase):
            shape = module.num_features
        if shape is not None and module.weight is None:
            module.weight = nn.Parameter(torch.ones(shape, device=device_of(network)))
            given.append(module)
    return given


def _behind_norms(graph: ChannelGraph) -> Tensor:
    """Return which channels a norm makes, or a product with a parameter, and layers read: bool (count,)."""
    found = torch.zeros(graph.count, dtype=torch.bool)
    for channels in graph.vectors.values():
        found[channels.flatten()] = True
    read = torch.zeros_like(found)
    for layer in graph.layers.values():
        read[layer.inputs.flatten()] = True
    for layer in graph.layers.values():
        found[layer.outputs] = False
    found[FIXED] = False
    found &= read
    if not found.any():
        raise ValueError(
            "nothing can be smoothed: there is no norm whose output goes to layers alone (LayerNorm, RMSNorm, GroupNorm, "
            "batch norms, products with a parameter that has one value per channel)"
        )
    return found


def _prepared(network: nn.Module, example: tuple[Any, ...], run: Forward, fold: bool = True) -> tuple[nn.Module, list[Tensor]]:
    """Copy a network with its batch norms folded and its weights plain; returns it with the outputs that it must have."""
    if not example:
        raise ValueError("equalization needs an example: give the inputs of at least one image")
    if any(isinstance(module, QuantLayer) for module in network.modules()):
        raise ValueError("equalization is of float networks, before `quantize`; this one has quantized layers")
    if any(not tensor.numel() for tensor in leaves(example)):
        raise ValueError("equalization needs an example of at least one image; this one is empty")
    made = copy_network(network).eval()
    expected = called_with(made, example, run)
    if not all(bool(tensor.isfinite().all()) for tensor in expected):
        raise ValueError("the network's outputs on the example aren't finite, so that they can't be compared")
    if fold:
        # Where a layer's output is used beside its norm, norms stay and end the chains.
        with suppress(ValueError):
            made = fold_norms(copy_network(made), example, run)
    for module in list(made.modules()):
        if isinstance(module, QUANTIZABLE):
            make_plain(module)
    return made, expected


def _wanted(graph: ChannelGraph, layers: Collection[str] | None) -> Tensor:
    """Return which channels are to be equalized: bool (count,)."""
    written, read = torch.zeros(graph.count, dtype=torch.bool), torch.zeros(graph.count, dtype=torch.bool)
    for layer in graph.layers.values():
        written[layer.outputs] = True
        read[layer.inputs.flatten()] = True
    possible = written & read
    possible[FIXED] = False
    if layers is None:
        if not possible.any():
            ends = "; ".join(f"{layer.name!r}: {layer.end or 'nothing reads it'}" for layer in list(graph.layers.values())[:3])
            raise ValueError(
                f"nothing can be equalized: no layer's output reaches another layer alone ({ends or 'no layers'})"
            )
        return possible
    chosen = torch.zeros_like(possible)
    for name in layers:
        if name not in graph.layers:
            raise ValueError(
                f"layer {name!r} can't be equalized: the network calls no such layer; it has {_listed(graph.layers)}"
            )
        layer = graph.layers[name]
        if not possible[layer.outputs].any():
            reason = layer.end or "no layer reads it"
            raise ValueError(f"layer {name!r} can't be equalized, since its output has no layer as successor alone: {reason}")
        chosen[layer.outputs] = True
    return chosen & possible


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = ""
    if len(names) > 8:
        more = ", ..."
    return ", ".join(names[:8]) + more


def _watch(
    network: nn.Module,
    graph: ChannelGraph,
    example: Any,
    run: Forward,
    batches: Batches | None,
    forward: Forward | None,
) -> _Ranges:
    ranges = _Ranges(network, graph)
    try:
        if batches is None:
            outputs_of(network, example, run)
        else:
            observe(network, {}, batches, forward=forward)
    finally:
        ranges.close()
    return ranges


def _sorted_clips(
    network: nn.Module, graph: ChannelGraph, ranges: _Ranges, clamp: bool
) -> tuple[list[Clip], list[Clip], Tensor]:
    """Sort the calls of ReLU6 by what becomes of them.

    Args:
        network: The network.
        graph: Its graph.
        ranges: What the data shows.
        clamp: Whether they may have a bound per channel.

    Returns:
        Those that can be ReLU; those that get a bound per channel; and the channels, bool (count,),
        that the others hold at their scale.
    """
    held = torch.zeros(graph.count, dtype=torch.bool)
    unclipped: list[Clip] = []
    clamped: list[Clip] = []
    for module in dict.fromkeys(clip.module for clip in graph.clips):
        clips = [clip for clip in graph.clips if clip.module == module]
        owner = network.get_submodule(module)
        # What somebody hung on a ReLU6 would be lost with it.
        hooked = bool(owner._forward_hooks or owner._forward_pre_hooks)
        below = all(float(ranges.clipped[module, clip.call].max()) * ROOM < clip.high for clip in clips)
        if below and not hooked:
            unclipped.extend(clips)
        elif clamp and len(clips) == 1 and not hooked:
            clamped.extend(clips)
        else:
            for clip in clips:
                held[clip.channels] = True
    return unclipped, clamped, held


def _check_held(graph: ChannelGraph, wanted: Tensor, held: Tensor, layers: Collection[str] | None) -> None:
    """Refuse layers all of whose channels a ReLU6 holds at their scale."""
    modules = ", ".join(dict.fromkeys(repr(clip.module) for clip in graph.clips if held[clip.channels].any()))
    why = f"outputs reach the bound of a ReLU6 ({modules}), one for all channels; relu6='clamp' gives each channel its own"
    for name in layers or ():
        channels = graph.layers[name].outputs
        if not (wanted & ~held)[channels].any():
            raise ValueError(f"layer {name!r} can't be equalized: {why}, if it is called once and has no hooks")
    if not (wanted & ~held).any():
        raise ValueError(f"nothing can be equalized: {why}, if it is called once and has no hooks")


def _replace_clips(network: nn.Module, unclipped: list[Clip], clamped: list[Clip], scales: Tensor) -> None:
    """Put ReLU and ChannelClamp in the places of ReLU6."""
    for clip in clamped:
        like = next(network.parameters())
        high = (clip.high * scales[clip.channels]).to(like.device, like.dtype)
        _replace(network, network.get_submodule(clip.module), ChannelClamp(high, clip.dim))
    for module in {clip.module for clip in unclipped}:
        _replace(network, network.get_submodule(module), nn.ReLU())


def _magnitudes(network: nn.Module, layer: LayerChannels) -> Tensor:
    """Return the largest weight between each pair of channels: (C_out, C_in / groups)."""
    weight = network.get_parameter(layer.weight).detach().abs().double().cpu()
    sizes = weight.reshape(*weight.shape[:2], -1).amax(2)
    return torch.where(sizes > DEAD * sizes.max(), sizes, 0.0)


class _Balance:
    """The largest weights of channels, as scales change."""

    def __init__(self, network: nn.Module, graph: ChannelGraph) -> None:
        self.graph = graph
        self.sizes = {name: _magnitudes(network, layer) for name, layer in graph.layers.items()}
        self.written = self._met(lambda layer: layer.outputs)
        self.read = self._met(lambda layer: layer.inputs.flatten())

    def _met(self, channels: Any) -> dict[str, Tensor]:
        return {name: channels(layer).unique() for name, layer in self.graph.layers.items()}

    def written_range(self, name: str, scales: Tensor) -> Tensor:
        """Return the largest weight (count,) that a layer computes each channel with; 0 for others."""
        layer = self.graph.layers[name]
        rows = (self.sizes[name] / scales[layer.inputs]).amax(1) * scales[layer.outputs]
        return torch.zeros_like(scales).scatter_reduce(0, layer.outputs, rows, "amax")

    def read_range(self, name: str, scales: Tensor) -> Tensor:
        """Return the largest weight (count,) that a layer reads each channel with; 0 for others."""
        layer = self.graph.layers[name]
        sizes = self.sizes[name] * scales[layer.outputs][:, None] / scales[layer.inputs]
        return torch.zeros_like(scales).scatter_reduce(0, layer.inputs.flatten(), sizes.flatten(), "amax")


def _mean_range(ranges: list[Tensor]) -> Tensor:
    """Return the geometric mean (count,) of layers' ranges where they aren't 0; 0 where all are."""
    stacked = torch.stack(ranges)
    live = stacked > 0
    logs = torch.where(live, stacked, 1.0).log().sum(0) / live.sum(0).clamp_min(1)
    return torch.where(live.any(0), logs.exp(), 0.0)


def _balanced(network: nn.Module, graph: ChannelGraph, wanted: Tensor) -> Tensor:
    """Return the factors (count,) after which weights that compute a channel are as large as those that read it."""
    balance = _Balance(network, graph)
    scales = torch.ones(graph.count, dtype=torch.float64)
    blocks = _blocks(balance, wanted)
    for _ in range(MOST_SWEEPS):
        before = scales.clone()
        for channels, writers, readers in blocks:
            written = _mean_range([balance.written_range(name, scales) for name in writers])[channels]
            read = _mean_range([balance.read_range(name, scales) for name in readers])[channels]
            change = torch.where((written > 0) & (read > 0), (read / written).sqrt(), 1.0)
            scales[channels] *= change
        if (scales / before - 1).abs().max() < CONVERGED:
            break
    return scales


def _blocks(balance: _Balance, wanted: Tensor) -> list[tuple[Tensor, list[str], list[str]]]:
    """Group channels by the layers that write and read them, in the order of the layers."""
    writers: dict[int, list[str]] = {}
    readers: dict[int, list[str]] = {}
    for names, met in ((writers, balance.written), (readers, balance.read)):
        for name, channels in met.items():
            for channel in channels[wanted[channels]].tolist():
                names.setdefault(channel, []).append(name)
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for channel in writers:
        groups.setdefault((tuple(writers[channel]), tuple(readers[channel])), []).append(channel)
    return [(torch.tensor(channels), list(by), list(to)) for (by, to), channels in groups.items()]


def _smoothed(network: nn.Module, graph: ChannelGraph, ranges: _Ranges, wanted: Tensor, held: Tensor, alpha: float) -> Tensor:
    """Return the factors (count,) max |w|^(1 - alpha) / max |x|^alpha of channels; 1 where either is 0."""
    balance = _Balance(network, graph)
    ones = torch.ones(graph.count, dtype=torch.float64)
    weights, values = torch.zeros_like(ones), torch.zeros_like(ones)
    for name, layer in graph.layers.items():
        weights = torch.maximum(weights, balance.read_range(name, ones))
        if name in ranges.inputs:
            seen = ranges.inputs[name].double().cpu()
            # One row of each group together are all input channels.
            groups = max(1, len(seen) // layer.inputs.shape[1])
            inputs = layer.inputs[:: len(layer.inputs) // groups].flatten()
            if len(inputs) == len(seen):  # a subclass may do something else to its input first
                values.scatter_reduce_(0, inputs, seen, "amax")
    usable = wanted & (weights > 0) & (values > 0)
    scales = torch.where(usable, weights ** (1 - alpha) / values**alpha, 1.0)
    kept = usable & held
    for channels, _, _ in _blocks(balance, wanted):
        # Beside channels that keep their scale, the others' mean something only in relation to theirs.
        known = channels[kept[channels]]
        if len(known):
            scales[channels] = scales[channels] / scales[known].log().mean().exp()
    return torch.where(usable & ~held, scales, 1.0)


def _apply(network: nn.Module, graph: ChannelGraph, scales: Tensor) -> None:
    """Multiply every parameter by its channels' factors, and divide what reads them."""
    for layer in graph.layers.values():
        factors = scales[layer.outputs][:, None] / scales[layer.inputs]
        weight = network.get_parameter(layer.weight)
        factors = factors.view(*factors.shape, *[1] * (weight.dim() - 2))
        weight.copy_(weight.double() * factors.to(weight.device))
    for name, channels in graph.vectors.items():
        vector = network.get_parameter(name)
        vector.copy_(vector.double() * scales[channels].view(vector.shape).to(vector.device))


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put another module in all places where one is."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _absorb(
    network: nn.Module, graph: ChannelGraph, ranges: _Ranges, scales: Tensor, wanted: Tensor, unclipped: list[Any]
) -> None:
    """Move what a layer's channels always are at least from its bias to those of the layers that read it."""
    writers = torch.zeros(graph.count)
    biases: Counter[str] = Counter()
    for layer in graph.layers.values():
        writers.index_add_(0, layer.outputs, torch.ones(len(layer.outputs)))
        biases[layer.bias] += 1
    vectors = {channel for name, of in graph.vectors.items() if not biases[name] for channel in of.tolist()}
    for name, layer in graph.layers.items():
        if name not in ranges.lowest or not layer.bias or biases[layer.bias] > 1:
            continue
        readers = [graph.layers[other] for other in graph.readers(name)]
        if not all(_takes_bias(network, reader, biases) for reader in readers):
            continue
        if len(layer.calls) > 1 or not graph.carries_constant(name, unclipped):
            continue
        own = wanted[layer.outputs] & (writers[layer.outputs] == 1)
        own &= torch.tensor([channel not in vectors for channel in layer.outputs.tolist()])
        moved = torch.where(own, ranges.lowest[name].double().cpu().clamp_min(0) * scales[layer.outputs], 0.0)
        if not moved.any():
            continue
        bias = network.get_parameter(layer.bias)
        bias.copy_(bias.double() - moved.to(bias.device))
        by_channel = torch.zeros_like(scales).index_copy(0, layer.outputs[own], moved[own])
        for reader in readers:
            _add_constant(network, reader, by_channel)


def _takes_bias(network: nn.Module, layer: LayerChannels, biases: Counter[str]) -> bool:
    if len(layer.calls) > 1:
        return False
    if layer.bias:
        return biases[layer.bias] == 1
    return isinstance(dict(network.named_modules()).get(layer.name), QUANTIZABLE)


def _add_constant(network: nn.Module, layer: LayerChannels, by_channel: Tensor) -> None:
    """Add to a layer's bias what it computes of a constant per input channel."""
    weight = network.get_parameter(layer.weight)
    sums = weight.double().reshape(*weight.shape[:2], -1).sum(2)
    added = (sums * by_channel[layer.inputs].to(sums.device)).sum(1)
    if layer.bias:
        bias = network.get_parameter(layer.bias)
        bias.copy_(bias.double() + added)
        return
    module: Any = network.get_submodule(layer.name)
    module.bias = nn.Parameter(added.to(weight.dtype), weight.requires_grad)
    layer.bias = f"{layer.name}.bias".lstrip(".")


def _check_same(made: nn.Module, expected: list[Tensor], example: Any, run: Forward) -> None:
    found = outputs_of(made, example, run)
    for number, (old, new) in enumerate(zip(expected, found, strict=True)):
        if not old.is_floating_point() or not old.numel():
            continue
        kind = torch.finfo(old.dtype)
        worst = float((old - new).abs().max() / old.abs().max().clamp_min(kind.tiny))
        # Not a number is a difference, too.
        if not worst <= max(TOLERANCE, ROUNDINGS * kind.eps):
            raise ValueError(
                f"equalization changes what the network computes: output {number} by up to {worst:.3g} of its size; "
                "does something in it depend on the size of values in a way that torch.export doesn't see?"
            )
