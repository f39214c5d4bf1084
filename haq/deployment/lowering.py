"""From the graph of a quantized network to its program of integers.

Operations are put into groups that a step each does: a convolution with the batch norm, the addition and the ReLU behind it.
Then, from the last to the first, every group asks those before it for what it reads; at last each writes its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.graph import Graph, Node, Shape, evaluate
from haq.deployment.program import (
    Array,
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    Float,
    FloatConvolution,
    Output,
    Pool,
    Program,
    Quantize,
    Representation,
    Residual,
    Step,
    Sum,
    Value,
)
from hw_models.tvm_cpu.conv import Conv

# A value may become so many times larger than in calibration before Fixed clips it.
HEADROOM = 8
FIXED_LIMIT = 2**30
ELEMENTWISE = ("batch_norm", "relu", "clamp", "add")
LOWERED = (*ELEMENTWISE, "input", "conv", "linear", "max_pool", "avg_pool", "flatten", "output")


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


@dataclass(eq=False)
class _Group:
    """An operation and those after it that its epilogue does: y multiplier + offset + residuals, then clipped."""

    head: Node
    sources: tuple[str, ...]  # of the head: names of groups
    shape: Shape
    multiplier: NDArray[np.float64]
    offset: NDArray[np.float64]
    value: str = ""  # the last operation's name, which is the group's
    residuals: list[str] = field(default_factory=list)
    low: float = -math.inf
    high: float = math.inf
    # What others want of it.
    codes: list[Codes] = field(default_factory=list)
    fixed_limit: int | None = None
    wants_float: bool = False

    def absorb(self, node: Node, sources: tuple[str, ...], known: Mapping[str, _Group]) -> bool:
        """Do the work of one more operation, if it can be done here."""
        clipped = self.low > -math.inf or self.high < math.inf
        if node.kind in ("relu", "clamp"):
            self.low = min(max(self.low, node.low), node.high)
            self.high = min(max(self.high, node.low), node.high)
        elif node.kind == "batch_norm" and not clipped and not self.residuals:
            self._absorb_batch_norm(node)
        elif node.kind == "add" and not clipped:
            others = [source for source in sources if source != self.value]
            if len(others) != 1 or others[0] not in known or known[others[0]].shape != self.shape:
                return False
            self.residuals.append(others[0])
        else:
            return False
        self.value = node.name
        return True

    def _absorb_batch_norm(self, node: Node) -> None:
        assert node.scale is not None
        assert node.shift is not None
        if len(node.scale) != len(self.multiplier):
            raise ValueError(f"layer {node.module!r} can't be deployed: it is a batch norm of a flattened map")
        self.multiplier = self.multiplier * node.scale
        self.offset = self.offset * node.scale + node.shift

    @property
    def wanted(self) -> bool:
        """Whether anything reads it."""
        return bool(self.codes) or self.fixed_limit is not None or self.wants_float

    @property
    def pools_codes(self) -> bool:
        """Whether the largest of codes can be taken in place of the codes of the largest: all want the same ones."""
        alone = len(self.codes) == 1 and self.fixed_limit is None and not self.wants_float
        return self.head.kind == "max_pool" and self.plain and alone

    @property
    def plain(self) -> bool:
        """Whether nothing was absorbed."""
        return self.value == self.head.name and self.head.kind not in ELEMENTWISE

    @property
    def multiplies(self) -> bool:
        """Whether it begins with a layer that has weights."""
        return self.head.kind in ("conv", "linear")


def _groups(graph: Graph) -> tuple[dict[str, _Group], str]:
    """Put the graph's operations into groups that a step each will do, in order; return them and the group of the output."""
    for node in graph.nodes:
        if node.kind not in LOWERED or node.ranges is not None or len(node.dims) == 3:
            raise ValueError(f"layer {node.module!r} can't be deployed: operation {node.name} ({node.kind})")
    sources, readers = _sources_and_readers(graph)
    groups: dict[str, _Group] = {}
    done: set[str] = set()
    for node in graph.nodes:
        if node.kind in ("flatten", "output") or node.name in done:
            continue
        group = _begin_group(node, sources[node.name], groups)
        while len(after := readers.get(group.value, [])) == 1 and group.absorb(after[0], sources[after[0].name], groups):
            done.add(group.value)
        groups[group.value] = group
    last = graph.nodes[-1]
    result = groups[sources[last.name][0]]
    if result.shape != last.shape:
        raise ValueError("a network whose output is a flattened map can't be deployed")
    result.wants_float = True
    return groups, result.value


def _sources_and_readers(graph: Graph) -> tuple[dict[str, tuple[str, ...]], dict[str, list[Node]]]:
    """Tell what every operation reads and which ones read it, as if there were no flattens in between."""
    flat: dict[str, str] = {}  # what is flattened, by the name of the flatten
    readers: dict[str, list[Node]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        sources[node.name] = tuple(flat.get(name, name) for name in node.inputs)
        if node.kind == "flatten":
            flat[node.name] = sources[node.name][0]
            continue
        for name in sources[node.name]:
            readers.setdefault(name, []).append(node)
    return sources, readers


def _begin_group(node: Node, sources: tuple[str, ...], groups: Mapping[str, _Group]) -> _Group:
    """Begin a group with an operation that none before it could do."""
    elementwise = node.kind in ELEMENTWISE
    shape = node.shape
    if elementwise:
        # A map that is flattened in between still is one.
        shape = groups[sources[0]].shape
    group = _Group(node, sources, shape, np.ones(shape[2]), np.zeros(shape[2]), node.name)
    if node.kind == "add":
        first, second = sources
        if groups[first].shape != groups[second].shape:
            raise ValueError(f"operation {node.name!r} can't be deployed: it adds flattened maps of different shapes")
        group.residuals.append(second)
    elif elementwise:
        group.absorb(node, sources, groups)
    return group


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
        self.groups, self.output = _groups(graph)
        self.ends = graph.nodes[0].dims, graph.nodes[-1].dims
        with torch.no_grad():
            self.largest = {node.name: float(x.abs().max()) for node, x in evaluate(graph, self.layers, calibrate)}
        self.values: dict[str, Value] = {}
        self.found: dict[tuple[str, Representation], str] = {}
        self.calls: dict[str, int] = {}

    def program(self) -> Program:
        for group in reversed(self.groups.values()):
            if group.wanted:
                self._ask(group)
        steps: list[Step] = []
        for group in self.groups.values():
            if group.wanted:
                steps += self._steps(group)
        output = self.found[self.output, Float()]
        return Program(tuple(steps), self.values, _name("input", Float()), output, *self.ends)

    def _ask(self, group: _Group) -> None:
        """Ask the groups before for what this one reads."""
        for name in group.residuals:
            self._ask_fixed(name, FIXED_LIMIT)
        if group.head.kind == "input":
            return
        source = self.groups[group.sources[0]]
        if group.multiplies:
            codes = self.codes.get(group.head.module)
            if codes is None:
                source.wants_float = True
            elif codes not in source.codes:
                source.codes.append(codes)
        elif group.pools_codes:
            source.codes += [codes for codes in group.codes if codes not in source.codes]
        else:
            area = 1
            if group.head.kind == "avg_pool" and group.head.window is not None:
                # The sum of a window must fit into 32 bits, too.
                area = math.prod(group.head.window.kernel)
            self._ask_fixed(group.sources[0], FIXED_LIMIT >> math.ceil(math.log2(area)))

    def _ask_fixed(self, name: str, limit: int) -> None:
        group = self.groups[name]
        group.fixed_limit = min(group.fixed_limit or FIXED_LIMIT, limit)

    def _steps(self, group: _Group) -> Iterator[Step]:
        if group.head.kind == "input":
            yield from self._input_steps(group)
        elif group.multiplies:
            yield self._convolution(group)
        elif group.pools_codes:
            (codes,) = group.codes
            yield self._pool(group, self.found[group.sources[0], codes], codes.scale)
        elif group.head.kind in ELEMENTWISE:
            value, step = self._fixed(group.sources[0])
            yield Sum(group.value, value, self._epilogue(group, np.full(1, step)))
        else:
            value, step = self._fixed(group.sources[0])
            yield self._pool(group, value, step)

    def _input_steps(self, group: _Group) -> Iterator[Step]:
        """Quantize the network's input for each layer that reads it, and hold what else is wanted of it."""
        name = group.head.name
        value = self._hold(name, group.shape, Float())
        if group.plain:
            for codes in group.codes:
                yield Quantize(f"quantize {codes.kind}", value, self._hold(name, group.shape, codes))
            group.codes = []
            group.wants_float = False
        if group.wanted:
            yield Sum(group.value, value, self._epilogue(group, np.ones(1)))

    def _pool(self, group: _Group, value: str, step: float) -> Pool:
        window = group.head.window
        assert window is not None
        size = group.head.shape[:2]
        if group.head.kind == "max_pool":
            return Pool(group.value, "max", value, window, size, self._epilogue(group, np.full(1, step)))
        mean = step / math.prod(window.kernel)
        return Pool(group.value, "avg", value, window, size, self._epilogue(group, np.full(1, mean)))

    def _convolution(self, group: _Group) -> Convolution | FloatConvolution:
        name = group.head.module
        layer = self.layers[name]
        source = self.groups[group.sources[0]]
        codes = self.codes.get(name)
        step = self._step_name(name)
        bias = _bias(layer)
        value = self.found[source.value, codes or Float()]
        if name not in self.weights:
            real = layer.quantized_weight().detach().float().contiguous().numpy()
            conv, floats = _sizes(group.head, source.shape, real)
            return FloatConvolution(step, name, value, conv, floats, self._epilogue(group, np.ones(1), bias))
        integers, scale, bits = self.weights[name]
        conv, weights = _sizes(group.head, source.shape, integers)
        assert codes is not None
        epilogue = self._epilogue(group, scale * codes.scale, bias)
        return Convolution(step, name, value, conv, bits, codes.bits, codes.signed, weights, epilogue)

    def _step_name(self, layer: str) -> str:
        """Name a layer's step: by the layer, and of a later call of it by the call too."""
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if self.calls[layer] == 1:
            return layer
        return f"{layer}@{self.calls[layer]}"

    def _epilogue(self, group: _Group, scale: NDArray[np.float64], bias: NDArray[np.float64] | float = 0.0) -> Epilogue:
        """Make the end of a group's step; `scale` is what one of the head's sums is worth."""
        wanted = self._wanted(group)
        unit = wanted[0].unit
        residuals = []
        for name in group.residuals:
            value, step = self._fixed(name)
            residuals.append(Residual(value, float(np.float32(step / unit))))
        outputs = []
        for representation in wanted:
            value = self._hold(group.value, group.shape, representation)
            outputs.append(Output(value, float(np.float32(unit / representation.unit))))
        return Epilogue(
            (scale * group.multiplier / unit).astype(np.float32),
            ((bias * group.multiplier + group.offset) / unit).astype(np.float32),
            tuple(residuals),
            # As torch divides what it clipped: where many values are exactly a bound, all of them round as they do there.
            float(np.float32(group.low) / np.float32(unit)),
            float(np.float32(group.high) / np.float32(unit)),
            tuple(outputs),
        )

    def _wanted(self, group: _Group) -> list[Representation]:
        """List the representations that others want of a group."""
        wanted: list[Representation] = [*group.codes]
        if group.fixed_limit is not None:
            largest = self.largest[group.value] or 1.0
            if not math.isfinite(largest):
                raise ValueError(f"operation {group.value!r} gives values that are not finite on the images of `calibrate`")
            wanted.append(Fixed(2.0 ** math.ceil(math.log2(HEADROOM * largest / group.fixed_limit)), group.fixed_limit))
        if group.wants_float:
            wanted.append(Float())
        return wanted

    def _fixed(self, group: str) -> tuple[str, float]:
        """Return a group's Fixed value, and its step."""
        for (name, representation), value in self.found.items():
            if name == group and isinstance(representation, Fixed):
                return value, representation.step
        raise AssertionError(f"{group} was not asked for Fixed")

    def _hold(self, group: str, shape: Shape, representation: Representation) -> str:
        name = _name(group, representation)
        while name in self.values:  # codes of the same width but another scale
            name += "'"
        self.values[name] = Value(representation, shape)
        self.found[group, representation] = name
        return name


def _bias(layer: Q.QuantLayer) -> NDArray[np.float64]:
    bias = layer.effective_bias()
    if bias is None:
        return np.zeros(1)
    return bias.detach().double().numpy()


def _name(group: str, representation: Representation) -> str:
    return f"{group}:{representation.kind}"


def _sizes(node: Node, source: Shape, weights: Array) -> tuple[Conv, Array]:
    """Return a layer's convolution on one image, and its weights in our order: (C_out, C_in / groups, kh, kw)."""
    height, width, channels = source
    try:
        if node.kind == "linear":
            # torch flattens with the channels first, here they are last.
            columns = np.arange(height * width * channels).reshape(channels, height, width).transpose(1, 2, 0).reshape(-1)
            weights = np.ascontiguousarray(weights[:, columns, None, None])
            return Conv(len(columns), len(weights), (1, 1), (1, 1)), weights
        window = node.window
        assert window is not None
        sizes = (window.kernel, window.stride, window.padding, window.dilation, window.groups)
        return Conv(channels, len(weights), (height, width), node.shape[:2], *sizes), weights
    except ValueError as reason:
        raise ValueError(f"layer {node.module!r} can't be deployed: {reason}") from reason
