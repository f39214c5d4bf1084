"""A quantized network as a program of integers: what compiled code must compute, step by step.

A value is an array of (images, height, width, channels) in one of three representations:

    Codes   bytes, as in `hw_models.tvm_cpu.conv`: the few-bit integers q that enter a layer; real value q scale
    Fixed   int32, real value i step: what is added up, or pooled, before it is quantized
    Float   float32: the network's input and output, and what enters and leaves layers that the policy leaves in float

A step sums integers and ends in an `Epilogue`, which is float32 for each output by itself:

    v = fma(acc, multiplier[c], offset[c]);   v = fma(i, factor, v) for each residual;   v = clip(v, low, high)
    and for each output, u = v factor:    Codes clip(round(u)), one signed bit +1 where u >= 0, else -1
                                          Fixed clip(round(u))        Float u

v is in units of the first output's step, whose factor is 1. Rounding is half to even; integers become float32 before they
are multiplied. Batch norms, biases and scales are folded into multiplier and offset in float64 and rounded once.
`haq.deployment.interpreter` computes all that slowly, and compares it with the network.

A flatten is no step: channels last bytes stay where they are, and the columns of the linear layer are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from haq.deployment.graph import Graph, Node, Shape, Window, evaluate
from hw_models.tvm_cpu.conv import Conv

# A value may become so many times larger than in calibration before Fixed clips it.
HEADROOM = 8
FIXED_LIMIT = 2**30

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Codes:
    """Bytes q + zero_point(bits, signed). `narrow`: the smallest signed integer is -(2^(b-1) - 1), not -2^(b-1)."""

    scale: float
    bits: int
    signed: bool
    narrow: bool = True

    @property
    def range(self) -> tuple[int, int]:
        return Q.integer_range(self.bits, self.signed, self.narrow)


@dataclass(frozen=True)
class Fixed:
    """int32 from -limit to limit; `step` is a power of two."""

    step: float
    limit: int


@dataclass(frozen=True)
class Float:
    """float32."""


Representation: TypeAlias = Codes | Fixed | Float


@dataclass(frozen=True)
class Value:
    """`shape` is (height, width, channels) of one image. A layer may take it as one row of height x width x channels."""

    representation: Representation
    shape: Shape


@dataclass(frozen=True)
class Residual:
    """v += value factor; `value` is Fixed."""

    value: str
    factor: float


@dataclass(frozen=True)
class Output:
    """`value` = v factor, rounded to its representation. A float32 number."""

    value: str
    factor: float


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of a sum; see the module. `multiplier` and `offset` are float32 of (channels,)."""

    multiplier: NDArray[np.float32]
    offset: NDArray[np.float32]
    residuals: tuple[Residual, ...]
    low: float
    high: float
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Quantize:
    """The network's input to Codes: q = clip(round(x / scale)), one signed bit its sign, divided in float32 as torch does."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Convolution:
    """acc = int32 sums of weights (C_out, C_in / groups, kh, kw) and activations q of `conv`, whose batch is 1 for one image.

    `weights` are int8 of `w_bits` bits in two's complement (one bit: -1 and +1), `input` is Codes of a_bits and signed. A
    linear layer is a 1x1 convolution on (1, 1); of a flattened map its channels are in order of (height, width, channels).
    `name` is the layer's; of a later call of the same layer name@2, name@3.
    """

    name: str
    layer: str
    input: str
    conv: Conv
    w_bits: int
    a_bits: int
    signed: bool
    weights: NDArray[np.int8]
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class FloatConvolution:
    """The same in float32: acc is what the layer gives without its bias. `input` is Float, or Codes whose real values
    float32(q) scale are taken (a layer of float weights and quantized activations)."""

    name: str
    layer: str
    input: str
    conv: Conv
    weights: NDArray[np.float32]
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Sum:
    """acc = the integers of `input` (Fixed), or its values (the network's input, Float). Additions are residuals."""

    name: str
    input: str
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class Pool:
    """acc = the largest of each window (`kind` "max": of Fixed, or of the q of Codes, whose order is that of real values;
    padding is never the largest), or their int32 sum ("avg": of Fixed; padding is zero). If the input is Codes the output is
    one value of the same Codes, and the epilogue changes nothing."""

    name: str
    kind: str
    input: str
    window: Window
    output_size: tuple[int, int]
    epilogue: Epilogue


Step: TypeAlias = Quantize | Convolution | FloatConvolution | Sum | Pool


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order, and the values they read and write by name. `input` and `output` are Float; the input is images with
    their channels last, the output of a classifier is of (1, 1, classes)."""

    steps: tuple[Step, ...]
    values: Mapping[str, Value]
    input: str
    output: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the convolution steps, in order."""
        return tuple(step.name for step in self.steps if isinstance(step, Convolution | FloatConvolution))


def integer_weights(name: str, layer: Q.QuantLayer) -> tuple[NDArray[np.int8], NDArray[np.float64], int]:
    """Return a layer's weights as integers, the scale of each output channel, and the bits that two's complement takes.

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
        return Codes(*layer.scheme.integer_activations(layer))
    except ValueError as reason:
        raise ValueError(f"layer {name!r} can't be deployed: {reason}") from reason


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
            self.low, self.high = (min(max(bound, node.low), node.high) for bound in (self.low, self.high))
        elif node.kind == "batch_norm" and not clipped and not self.residuals:
            assert node.scale is not None
            assert node.shift is not None
            if len(node.scale) != len(self.multiplier):
                raise ValueError(f"layer {node.module!r} can't be deployed: it is a batch norm of a flattened map")
            self.multiplier, self.offset = self.multiplier * node.scale, self.offset * node.scale + node.shift
        elif node.kind == "add" and not clipped:
            others = [source for source in sources if source != self.value]
            if len(others) != 1 or others[0] not in known or known[others[0]].shape != self.shape:
                return False
            self.residuals.append(others[0])
        else:
            return False
        self.value = node.name
        return True

    @property
    def wanted(self) -> bool:
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


ELEMENTWISE = ("batch_norm", "relu", "clamp", "add")


def _groups(graph: Graph) -> tuple[dict[str, _Group], str]:
    """The graph's operations in groups that a step each will do, in order, and the group of the output."""
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
    groups: dict[str, _Group] = {}
    done: set[str] = set()
    for node in graph.nodes:
        if node.kind in ("flatten", "output") or node.name in done:
            continue
        shape = groups[sources[node.name][0]].shape if node.kind in ELEMENTWISE else node.shape
        group = _Group(node, sources[node.name], shape, np.ones(shape[2]), np.zeros(shape[2]), node.name)
        if node.kind == "add":
            first, second = sources[node.name]
            if groups[first].shape != groups[second].shape:
                raise ValueError(f"operation {node.name!r} can't be deployed: it adds flattened maps of different shapes")
            group.residuals.append(second)
        elif node.kind in ELEMENTWISE:
            group.absorb(node, sources[node.name], groups)
        while len(after := readers.get(group.value, [])) == 1 and group.absorb(after[0], sources[after[0].name], groups):
            done.add(group.value)
        groups[group.value] = group
    last = graph.nodes[-1]
    result = groups[sources[last.name][0]]
    if result.shape != last.shape:
        raise ValueError("a network whose output is a flattened map can't be deployed")
    result.wants_float = True
    return groups, result.value


def lower(graph: Graph, network: nn.Module, calibrate: Tensor) -> Program:
    """The program of a captured graph at the network's present weights, scales and bits.

    calibrate: a batch of images, to find how large values become that are kept as Fixed.

    Raises ValueError, naming the layer and its scheme, for weights or activations that are not integers times a scale.
    """
    return _Lowering(graph, network, calibrate).program()


class _Lowering:
    def __init__(self, graph: Graph, network: nn.Module, calibrate: Tensor) -> None:
        everything = Q.quant_layers(network)
        self.layers = {name: everything[name] for name in graph.layers}
        self.weights = {name: integer_weights(name, layer) for name, layer in self.layers.items() if self._is_integer(name)}
        self.codes = {
            name: integer_activations(name, layer) for name, layer in self.layers.items() if layer.activation_bits is not None
        }
        self.groups, self.output = _groups(graph)
        with torch.no_grad():
            self.largest = {node.name: float(x.abs().max()) for node, x in evaluate(graph, self.layers, calibrate)}
        self.values: dict[str, Value] = {}
        self.found: dict[tuple[str, Representation], str] = {}
        self.calls: dict[str, int] = {}

    def _is_integer(self, name: str) -> bool:
        return self.layers[name].weight_bits is not None and self.layers[name].activation_bits is not None

    def program(self) -> Program:
        for group in reversed(self.groups.values()):
            if group.wanted:
                self._ask(group)
        steps = [step for group in self.groups.values() if group.wanted for step in self._steps(group)]
        return Program(tuple(steps), self.values, _name("input", Float()), self.found[self.output, Float()])

    def _ask(self, group: _Group) -> None:
        """Ask the groups before for what this one reads."""
        fixed = [(name, FIXED_LIMIT) for name in group.residuals]
        if group.head.kind in ("conv", "linear"):
            source = self.groups[group.sources[0]]
            codes = self.codes.get(group.head.module)
            if codes is None:
                source.wants_float = True
            elif codes not in source.codes:
                source.codes.append(codes)
        elif group.pools_codes:
            source = self.groups[group.sources[0]]
            source.codes += [codes for codes in group.codes if codes not in source.codes]
        elif group.head.kind != "input":
            # The sum of a window must fit into 32 bits, too.
            area = math.prod(group.head.window.kernel) if group.head.kind == "avg_pool" and group.head.window else 1
            fixed.append((group.sources[0], FIXED_LIMIT >> math.ceil(math.log2(area))))
        for name, limit in fixed:
            self.groups[name].fixed_limit = min(self.groups[name].fixed_limit or FIXED_LIMIT, limit)

    def _steps(self, group: _Group) -> Iterable[Step]:
        kind, head = group.head.kind, group.head
        if kind == "input":
            value = self._hold(head.name, group.shape, Float())
            if group.plain:
                for codes in group.codes:
                    yield Quantize(f"quantize {_kind(codes)}", value, self._hold(head.name, group.shape, codes))
                group.codes, group.wants_float = [], False
            if group.wanted:
                yield Sum(group.value, value, self._epilogue(group, np.ones(1)))
        elif kind in ("conv", "linear"):
            yield self._convolution(group)
        elif group.pools_codes:
            (codes,) = group.codes
            yield self._pool(group, self.found[group.sources[0], codes], codes.scale)
        else:
            value, step = self._fixed(group.sources[0])
            if kind in ELEMENTWISE:
                yield Sum(group.value, value, self._epilogue(group, np.full(1, step)))
            else:
                yield self._pool(group, value, step)

    def _pool(self, group: _Group, value: str, step: float) -> Pool:
        window = group.head.window
        assert window is not None
        largest = group.head.kind == "max_pool"
        scale = np.full(1, step if largest else step / math.prod(window.kernel))
        size = group.head.shape[:2]
        return Pool(group.value, "max" if largest else "avg", value, window, size, self._epilogue(group, scale))

    def _convolution(self, group: _Group) -> Convolution | FloatConvolution:
        name = group.head.module
        layer, source, codes = self.layers[name], self.groups[group.sources[0]], self.codes.get(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        step = name if self.calls[name] == 1 else f"{name}@{self.calls[name]}"
        bias = _bias(layer)
        value = self.found[source.value, codes or Float()]
        integers, scale, bits = self.weights.get(name, (None, np.ones(1), 0))
        real = layer.quantized_weight().detach().float().contiguous().numpy()
        try:
            conv, weights = _sizes(group.head, source.shape, real if integers is None else integers)
        except ValueError as reason:
            raise ValueError(f"layer {name!r} can't be deployed: {reason}") from reason
        if integers is None:
            return FloatConvolution(step, name, value, conv, weights, self._epilogue(group, np.ones(1), bias))
        assert codes is not None
        epilogue = self._epilogue(group, scale * codes.scale, bias)
        return Convolution(step, name, value, conv, bits, codes.bits, codes.signed, weights, epilogue)

    def _epilogue(self, group: _Group, scale: NDArray[np.float64], bias: NDArray[np.float64] | float = 0.0) -> Epilogue:
        """`scale`: what one of the head's sums is worth."""
        wanted: list[Representation] = [*group.codes]
        if group.fixed_limit is not None:
            largest = self.largest[group.value] or 1.0
            if not math.isfinite(largest):
                raise ValueError(f"operation {group.value!r} gives values that are not finite on the images of `calibrate`")
            wanted.append(Fixed(2.0 ** math.ceil(math.log2(HEADROOM * largest / group.fixed_limit)), group.fixed_limit))
        if group.wants_float:
            wanted.append(Float())
        unit = _step(wanted[0])
        residuals = [(value, step) for value, step in map(self._fixed, group.residuals)]
        return Epilogue(
            (scale * group.multiplier / unit).astype(np.float32),
            ((bias * group.multiplier + group.offset) / unit).astype(np.float32),
            tuple(Residual(value, float(np.float32(step / unit))) for value, step in residuals),
            # As torch divides what it clipped: where many values are exactly a bound, all of them round as they do there.
            float(np.float32(group.low) / np.float32(unit)),
            float(np.float32(group.high) / np.float32(unit)),
            tuple(Output(self._hold(group.value, group.shape, rep), float(np.float32(unit / _step(rep)))) for rep in wanted),
        )

    def _fixed(self, group: str) -> tuple[str, float]:
        """A group's Fixed value, and its step."""
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


def _bias(layer: nn.Module) -> NDArray[np.float64]:
    bias = layer.bias
    return np.zeros(1) if not isinstance(bias, Tensor) else bias.detach().double().numpy()


def _kind(representation: Representation) -> str:
    if isinstance(representation, Codes):
        return f"{'s' if representation.signed else 'u'}{representation.bits}"
    return "int32" if isinstance(representation, Fixed) else "float32"


def _name(group: str, representation: Representation) -> str:
    return f"{group}:{_kind(representation)}"


def _step(representation: Representation) -> float:
    """The real value of 1."""
    if isinstance(representation, Codes):
        return representation.scale
    return representation.step if isinstance(representation, Fixed) else 1.0


def _sizes(node: Node, source: Shape, weights: Array) -> tuple[Conv, Array]:
    """A layer's convolution on one image, and its weights (C_out, C_in / groups, kh, kw) in the order of our channels."""
    height, width, channels = source
    if node.kind == "linear":
        # torch flattens with the channels first, here they are last.
        columns = np.arange(height * width * channels).reshape(channels, height, width).transpose(1, 2, 0).reshape(-1)
        weights = np.ascontiguousarray(weights[:, columns, None, None])
        return Conv(len(columns), len(weights), (1, 1), (1, 1)), weights
    window = node.window
    assert window is not None
    sizes = (window.kernel, window.stride, window.padding, window.dilation, window.groups)
    return Conv(channels, len(weights), (height, width), node.shape[:2], *sizes), weights
