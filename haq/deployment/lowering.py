"""From the graph of a quantized network to its program of integers.

Operations are put into groups that a step each does (`haq.deployment.groups`). Then, from the last to the first, every group
asks those before it for what it reads; at last each writes its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.groups import Group, Grouping
from haq.deployment.nodes import Graph, evaluate
from haq.deployment.program import (
    BYTE_BITS,
    Array,
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    Float,
    FloatConvolution,
    Lookup,
    Move,
    Output,
    Pool,
    Product,
    Program,
    Quantize,
    Representation,
    Residual,
    Resize,
    Step,
    Sum,
    Value,
)
from haq.deployment.tables import entries, make_table
from hw_models.tvm_cpu.conv import Conv

# A value may become so many times larger than in calibration before Fixed clips it.
HEADROOM = 8
FIXED_LIMIT = 2**30
# A Fixed value of fewer steps, for the sums of large windows, is one beside that of other readers.
COARSE_LIMIT = 2**24


def integer_weights(name: str, layer: Q.QuantLayer) -> tuple[NDArray[np.int8] | NDArray[np.int16], NDArray[np.float64], int]:
    """Return a layer's weights as integers, the scale of each output channel, and the bits that two's complement takes.

    They are int8, and int16 where they take more than 8 bits.

    See `quantizers.Scheme.integer_weights`. Raises ValueError, naming the layer and its scheme, where there are none.
    """
    try:
        weights = layer.scheme.integer_weights(layer)
    except ValueError as reason:
        raise ValueError(f"layer {name!r} can't be deployed: {reason}") from reason
    return weights.codes.numpy(), weights.scale.numpy(), weights.bits


def integer_activations(name: str, layer: Q.QuantLayer) -> Codes:
    """Return what enters a layer.

    See `quantizers.Scheme.integer_activations`. Raises ValueError, naming the layer and its scheme, where it isn't integers
    times a scale.
    """
    try:
        codes = Codes(*layer.scheme.integer_activations(layer))
        assert layer.activation_bits is not None
        return replace(codes, zero_point=layer.scheme.zero_point(layer, layer.activation_bits))
    except ValueError as reason:
        raise ValueError(f"layer {name!r} can't be deployed: {reason}") from reason


def check_integers(network: nn.Module, *, always_weights: bool = False) -> None:
    """Check that what the layers of a quantized network compute with are integers times a scale.

    Args:
        network: The network.
        always_weights: Whether quantized weights must be integers even where activations stay in float.

    Raises:
        ValueError: Naming the layer and its scheme, if they aren't.
    """
    for name, layer in Q.quant_layers(network).items():
        if layer.weight_bits is not None and layer.activation_bits is not None:
            integer_weights(name, layer)
        elif layer.weight_bits is not None and always_weights:
            _check_weights_alone(name, layer)
        if layer.activation_bits is not None:
            integer_activations(name, layer)


def _check_weights_alone(name: str, layer: Q.QuantLayer) -> None:
    """Check that the weights of a layer whose input stays in float are integers times a scale."""
    try:
        integer_weights(name, layer)
    except ValueError as error:
        raise ValueError(f"{error}; its input is in float ({layer.weight_bits}/float), and so --to tvm computes it") from error


def lower(graph: Graph, network: nn.Module, calibrate: Tensor) -> Program:
    """Make the program of a captured graph at the network's present weights, scales and bits.

    Args:
        graph: What `capture` made of the network.
        network: The quantized network.
        calibrate: A batch of images (N, C, H, W), to find how large values become that are kept as Fixed.

    Returns:
        The program.

    Raises:
        ValueError: Naming the layer and its scheme, for weights or activations that are not integers times a scale.
    """
    return _Lowering(graph, network, calibrate).program()


class _Lowering:
    def __init__(self, graph: Graph, network: nn.Module, calibrate: Tensor) -> None:
        everything = Q.quant_layers(network)
        self.layers = {name: everything[name] for name in graph.layers}
        self.weights = {}
        self.codes = {}
        for name, layer in self.layers.items():
            if layer.weight_bits is not None and layer.activation_bits is not None:
                self.weights[name] = integer_weights(name, layer)
            if layer.activation_bits is not None:
                self.codes[name] = integer_activations(name, layer)
        with torch.no_grad():
            largest = {node.name: float(x.abs().max()) for node, x in evaluate(graph, self.layers, calibrate)}
        grouping = Grouping(graph, largest)
        self.groups, self.output = grouping.groups, grouping.output
        self.ends = graph.nodes[0].dims, graph.nodes[-1].dims
        self.values: dict[str, Value] = {}
        self.found: dict[tuple[Group, Representation], str] = {}
        self.fixed: dict[Group, Fixed] = {}
        self.pooled: dict[Group, Fixed] = {}
        self.calls: dict[str, int] = {}

    def program(self) -> Program:
        for group in reversed(self.groups):
            if group.wanted:
                _settle(group)
                self._ask(group)
        self._fix()
        steps: list[Step] = []
        for group in self.groups:
            if group.wanted:
                steps += self._steps(group)
        output = self.found[self.output, Float()]
        return Program(tuple(steps), self.values, _name("input", Float()), output, *self.ends)

    # ------------------------------------------------------------------------------------------------------------ asking

    def _ask(self, group: Group) -> None:
        """Ask the groups before for what this one reads."""
        for residual in group.residuals:
            self._ask_integers(residual, FIXED_LIMIT)
        kind = group.head.kind
        if kind == "move":
            for source in group.sources:
                self._ask_alike(group, source)
        elif kind == "quantize":
            _ask_codes(group.sources[0], quantizer_codes(group))
        elif group.multiplies:
            codes = self.codes.get(group.head.module)
            if codes is None:
                group.sources[0].wants_float = True
            else:
                _ask_codes(group.sources[0], codes)
        elif group.pools_codes and not group.sources[0].quantizes:
            for codes in group.codes:
                _ask_codes(group.sources[0], codes)
        else:
            limit = FIXED_LIMIT
            if kind == "avg_pool":
                limit = _pool_limit(group)
            for source in group.sources:
                if limit < COARSE_LIMIT and not source.quantizes:
                    source.pool_limit = min(source.pool_limit or limit, limit)
                else:
                    self._ask_integers(source, limit)

    def _ask_alike(self, group: Group, source: Group) -> None:
        """Ask for all that is wanted of a move."""
        for codes in group.codes:
            _ask_codes(source, codes)
        if group.fixed_limit is not None:
            self._ask_fixed(source, group.fixed_limit)
        source.wants_float = source.wants_float or group.wants_float

    def _ask_integers(self, group: Group, limit: int) -> None:
        """Ask for integers: those that a quantizer between layers has, or Fixed."""
        if group.quantizes:
            group.is_read = True
        else:
            self._ask_fixed(group, limit)

    def _ask_fixed(self, group: Group, limit: int) -> None:
        group.fixed_limit = min(group.fixed_limit or FIXED_LIMIT, limit)

    def _fix(self) -> None:
        """Find the step of every Fixed value. Those that a move puts together have one: that of the largest."""
        together: dict[Group, list[Group]] = {}
        for group in self.groups:
            if group.fixed_limit is not None:
                together[group] = [group]
        for group in together:
            if group.head.kind != "move":
                continue
            for source in group.sources:
                if together[source] is not together[group]:
                    members = together[source] + together[group]
                    together.update(dict.fromkeys(members, members))
        for group, members in together.items():
            limit = min(member.fixed_limit or FIXED_LIMIT for member in members)
            self.fixed[group] = Fixed(max(self._fixed_step(member, limit) for member in members), limit)
        for group in self.groups:
            if group.pool_limit is not None:
                self.pooled[group] = Fixed(self._fixed_step(group, group.pool_limit), group.pool_limit)

    def _fixed_step(self, group: Group, limit: int) -> float:
        """Return the least step in which a group's values fit, with headroom, or 0 for a move, which has none of its own."""
        if group.head.kind == "move":
            return 0.0
        largest = group.largest or 1.0
        if not math.isfinite(largest):
            raise ValueError(f"operation {group.value!r} gives values that are not finite on the images of `calibrate`")
        return float(2.0 ** math.ceil(math.log2(HEADROOM * largest / limit)))

    # ----------------------------------------------------------------------------------------------------------- writing

    def _steps(self, group: Group) -> Iterator[Step]:
        kind = group.head.kind
        if kind == "input":
            yield from self._input_steps(group)
        elif kind == "move":
            yield from self._move_steps(group)
        elif kind == "quantize":
            yield from self._quantizer_steps(group)
        elif group.multiplies:
            yield self._convolution(group)
        elif group.pools_codes and not group.sources[0].quantizes:
            (codes,) = group.codes
            yield self._pool(group, self.found[group.sources[0], codes], codes.scale)
        elif self._looks_up(group):
            yield self._lookup(group)
        else:
            source = group.sources[0]
            value, step = self._integers(source)
            if group.head.kind == "avg_pool" and source in self.pooled and _pool_limit(group) < COARSE_LIMIT:
                fixed = self.pooled[source]
                value, step = self.found[source, fixed], fixed.step
            yield self._step(group, value, step)

    def _step(self, group: Group, value: str, step: float) -> Step:
        """Write the step of a group that reads integers, whose unit is `step`."""
        head = group.head
        if head.kind in ("max_pool", "avg_pool"):
            return self._pool(group, value, step)
        if head.kind == "mul":
            other, unit = self._integers(group.sources[1])
            return Product(group.value, value, other, self._epilogue(group, np.full(1, step * unit)))
        if head.kind == "resize":
            assert head.rows is not None
            assert head.columns is not None
            return Resize(group.value, value, head.rows, head.columns, self._epilogue(group, np.full(1, step)))
        return Sum(group.value, value, self._epilogue(group, np.full(1, step)))

    def _input_steps(self, group: Group) -> Iterator[Step]:
        """Quantize the network's input for each layer that reads it, and hold what else is wanted of it."""
        value = self._hold(group, group.head.name, Float())
        if group.plain:
            for codes in group.codes:
                yield Quantize(f"quantize {codes.kind}", value, self._hold(group, group.head.name, codes))
            group.codes = []
            group.wants_float = False
        if group.wanted:
            yield Sum(group.value, value, self._epilogue(group, np.ones(1)))

    def _move_steps(self, group: Group) -> Iterator[Step]:
        """Move each representation that is wanted by itself: what is rounded is the same before and after."""
        assert group.view is not None
        index = group.view.stored.reshape(group.shape).astype(np.int32)
        for representation in self._wanted(group):
            inputs = tuple(self.found[source, representation] for source in group.sources)
            value = self._hold(group, group.value, representation)
            yield Move(value, inputs, index, value)

    def _quantizer_steps(self, group: Group) -> Iterator[Step]:
        """Write what is wanted of a quantizer between layers beside its integers, which the step before has written."""
        own = quantizer_codes(group)
        value = self.found[group.sources[0], own]
        self.found[group, own] = value
        group.codes = [codes for codes in group.codes if codes != own]
        if self._wanted(group):
            yield Sum(group.value, value, self._epilogue(group, np.full(1, own.scale)))

    def _looks_up(self, group: Group) -> bool:
        """Say whether a group is a function of so few different integers that there can be an entry for each."""
        source = group.sources[0]
        return group.head.kind == "function" and source.quantizes and quantizer_codes(source).bits <= BYTE_BITS

    def _lookup(self, group: Group) -> Lookup:
        source = group.sources[0]
        codes = quantizer_codes(source)
        wanted = self._wanted(group)
        outputs = tuple(self._hold(group, group.value, representation) for representation in wanted)
        made = tuple(entries(group.head, codes, group.low, group.high, representation) for representation in wanted)
        return Lookup(group.value, self.found[source, codes], outputs, made)

    def _pool(self, group: Group, value: str, step: float) -> Pool:
        head = group.head
        size = _size(group)
        if head.kind == "max_pool":
            return Pool(group.value, "max", value, head.window, size, self._epilogue(group, np.full(1, step)))
        if head.ranges is not None:
            epilogue = self._epilogue(group, np.full(1, step))
            factors = (1 / head.ranges.divisors).astype(np.float32)
            return Pool(group.value, "avg", value, None, size, epilogue, head.ranges, factors)
        assert head.window is not None
        mean = step / math.prod(head.window.kernel)
        return Pool(group.value, "avg", value, head.window, size, self._epilogue(group, np.full(1, mean)))

    def _convolution(self, group: Group) -> Convolution | FloatConvolution:
        name = group.head.module
        layer = self.layers[name]
        source = group.sources[0]
        codes = self.codes.get(name)
        step = self._step_name(name)
        bias = _bias(layer)
        value = self.found[source, codes or Float()]
        if name not in self.weights:
            real = layer.quantized_weight().detach().float().contiguous().numpy()
            conv, floats = _sizes(group, real)
            return FloatConvolution(step, name, value, conv, floats, self._epilogue(group, np.ones(1), bias))
        integers, scale, bits = self.weights[name]
        conv, weights = _sizes(group, integers)
        assert codes is not None
        epilogue = self._epilogue(group, scale * codes.scale, bias)
        return Convolution(step, name, value, conv, bits, codes.bits, codes.signed, weights, epilogue)

    def _step_name(self, layer: str) -> str:
        """Name a layer's step: by the layer, and of a later call of it by the call too."""
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if self.calls[layer] == 1:
            return layer
        return f"{layer}@{self.calls[layer]}"

    def _epilogue(self, group: Group, scale: NDArray[np.float64], bias: NDArray[np.float64] | float = 0.0) -> Epilogue:
        """Make the end of a group's step; `scale` is what one of the head's sums is worth."""
        wanted = self._wanted(group)
        unit = wanted[0].unit
        before = unit  # of v, in front of a table
        table = None
        if group.function is not None:
            before = 1.0
            table = make_table(group.function, group.given, HEADROOM, unit)
        residuals = []
        for residual in group.residuals:
            value, step = self._integers(residual)
            residuals.append(Residual(value, float(np.float32(step / before))))
        outputs = []
        for representation in wanted:
            value = self._hold(group, group.value, representation)
            outputs.append(Output(value, float(np.float32(unit / representation.unit))))
        slope = None
        if group.slope is not None:
            slope = group.slope.astype(np.float32)
        return Epilogue(
            (scale * group.multiplier / before).astype(np.float32),
            ((bias * group.multiplier + group.offset) / before).astype(np.float32),
            tuple(residuals),
            # As torch divides what it clipped: where many values are exactly a bound, all of them round as they do there.
            float(np.float32(group.low) / np.float32(unit)),
            float(np.float32(group.high) / np.float32(unit)),
            tuple(outputs),
            slope,
            table,
        )

    def _wanted(self, group: Group) -> list[Representation]:
        """List the representations that others want of a group."""
        wanted: list[Representation] = [*group.codes]
        if group.fixed_limit is not None:
            wanted.append(self.fixed[group])
        if group.pool_limit is not None:
            wanted.append(self.pooled[group])
        if group.wants_float:
            wanted.append(Float())
        return wanted

    def _integers(self, group: Group) -> tuple[str, float]:
        """Return a group's integers, and what one is worth."""
        if group.quantizes:
            codes = quantizer_codes(group)
            return self.found[group, codes], codes.scale
        fixed = self.fixed[group]
        return self.found[group, fixed], fixed.step

    def _hold(self, group: Group, name: str, representation: Representation) -> str:
        name = _name(name, representation)
        while name in self.values:  # codes of the same width but another scale
            name += "'"
        self.values[name] = Value(representation, group.shape)
        self.found[group, representation] = name
        return name


def quantizer_codes(group: Group) -> Codes:
    """Return the integers of a quantizer between layers, which has 2^bits of them, or one less that lie evenly around zero.

    Raises ValueError, naming it, where it has another number of them.
    """
    node = group.head
    assert node.scale is not None
    count = int(node.high - node.low) + 1
    if node.zero_point == 0 and node.low == -node.high and count + 1 in (4, 8, 16, 32, 64, 128, 256):
        return Codes(float(node.scale), count.bit_length(), signed=True)
    bits = count.bit_length() - 1
    if count != 2**bits or bits > 2 * BYTE_BITS:
        raise ValueError(
            f"layer {node.module!r} can't be deployed: it quantizes to {count} integers, not to 2, 4, 8, ... or 65536"
        )
    zero_point = node.zero_point - int(node.low)
    if zero_point == 2 ** (bits - 1) and bits <= BYTE_BITS and node.low < 0:
        return Codes(float(node.scale), bits, signed=True, narrow=False)
    return Codes(float(node.scale), bits, signed=False, zero_point=zero_point)


def _ask_codes(group: Group, codes: Codes) -> None:
    if codes not in group.codes:
        group.codes.append(codes)


def _size(group: Group) -> tuple[int, int]:
    return group.head.shape[:2]


def _settle(group: Group) -> None:
    """Let one Fixed value do for a group that only large windows read, and for a move, which has that of its sources."""
    if group.pool_limit is not None and (group.fixed_limit is None or group.head.kind == "move"):
        group.fixed_limit = min(group.fixed_limit or FIXED_LIMIT, group.pool_limit)
        group.pool_limit = None


def _pool_limit(group: Group) -> int:
    """Return how large integers may be that an average pooling adds up: the sum of a window must fit into 32 bits, too."""
    ranges = group.head.ranges
    if ranges is not None:
        area = int(np.diff(ranges.rows).max() * np.diff(ranges.columns).max())
    else:
        assert group.head.window is not None
        area = math.prod(group.head.window.kernel)
    return FIXED_LIMIT >> math.ceil(math.log2(area))


def _bias(layer: Q.QuantLayer) -> NDArray[np.float64]:
    bias = layer.effective_bias()
    if bias is None:
        return np.zeros(1)
    return bias.detach().double().numpy()


def _name(group: str, representation: Representation) -> str:
    return f"{group}:{representation.kind}"


def _sizes(group: Group, weights: Array) -> tuple[Conv, Array]:
    """Return a layer's convolution on one image, and its weights in our order: (C_out, C_in / groups, kh, kw)."""
    node = group.head
    height, width, channels = group.sources[0].shape
    try:
        if node.kind == "linear":
            columns = group.columns
            if columns is None:
                columns = np.arange(weights.shape[1])
            # torch flattens with the channels first, here they are last.
            weights = np.ascontiguousarray(weights[:, columns, None, None])
            return Conv(len(columns), len(weights), (1, 1), (1, 1)), weights
        if weights.ndim == 3:  # of a Conv1d
            weights = weights[:, :, None]
        window = node.window
        assert window is not None
        sizes = (window.kernel, window.stride, window.padding, window.dilation, window.groups)
        return Conv(channels, len(weights), (height, width), node.shape[:2], *sizes), weights
    except ValueError as reason:
        raise ValueError(f"layer {node.module!r} can't be deployed: {reason}") from reason
