"""A quantized network as an exported program of PyTorch with its own Q/DQ operators, and as a program of ExecuTorch.

    network.pt2    of torch.export: `torch.ops.quantized_decomposed` in front of layers and behind their integer weights. Any
                   number of images
    network.pte    the same for one image, lowered to XNNPACK: what ExecuTorch's runtime executes on a phone. It is written
                   where the package executorch is installed

XNNPACK's integer kernels take int8 on both sides: an activation with one scale and a zero point, weights with a scale for
each output channel, a bias of int32, and a result that is rounded to int8 at once. So batch norms are folded, a result is
clipped as its reader wants it before it is rounded, and fewer bits are a part of int8's range. What isn't so stays in float32
in network.pte, with the same values: a layer of 16 bits, one beside float, and one whose result others read unrounded, as
the last layer's is, and an addition's operands without `--residuals 8`; and one whose bias would move by more than
BIAS_STEPS, rounded as XNNPACK rounds it, to a multiple of both operands' scales.

The weights of few bits, and in network.pte the inputs of few bits, are multiplied by a power of two, and their scales divided
by it. That changes no value, and the bias is rounded to finer multiples.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.answers import compare_answers
from haq.deployment.exporter import SUMMARIES, Exporter, OnProgress, Samples, Verdict, check_is_no_folder, policy_storage_bytes
from haq.deployment.graph import Graph, Node
from haq.deployment.interpreter import OUTPUT_SHARE, fake_quantized
from haq.deployment.lowering import check_integers, integer_activations, integer_weights
from haq.deployment.nodes import COMPUTED, is_own
from haq.deployment.program import BYTE_BITS, Codes
from haq.store.files import write
from haq.store.units import counted, describe_bytes

INSTALL = "pip install executorch"
PT2, PTE = ".pt2", ".pte"
CHECKED = 4  # images on which a program is compared before it is put in its place
TIMED = 200  # calls
SHOWN = 3  # names in a line
TRANSPARENT = ("max_pool", "flatten", "move")  # kinds that do the same to rounded values as to others
BYTE = 2**BYTE_BITS - 1
SUMS = 2**31  # what sums in int32 stay below
BIAS_STEPS = 1 / 64  # of the result's step, by which rounding the bias may move it
RATIOS = (2.0**-32, 2.0**8)  # of scales, input times weight over output, between which XNNPACK has kernels


class Rounding(NamedTuple):
    """How values become integers, as `quantize_per_tensor` has it: clip(round(x / scale) + zero, low, high).

    `wide` integers are of 16 bits, others of 8. With `sign` they are +1 where x >= 0, else -1. With `in_float` they stay
    round(x / scale) in float32, without the operators that XNNPACK has for 8 bits alone.
    """

    scale: float
    zero: int
    low: int
    high: int
    wide: bool = False
    sign: bool = False
    in_float: bool = False

    @classmethod
    def of(cls, codes: Codes) -> Rounding:
        """Return that of a layer's input."""
        low, high = codes.range
        if codes.bits == 1 and codes.signed:
            return cls(codes.scale, 0, -1, 1, sign=True)
        return cls.placed(codes.scale, low, high, wide=codes.bits > BYTE_BITS)

    @classmethod
    def placed(cls, scale: float, low: int, high: int, *, wide: bool = False) -> Rounding:
        """Find integers a place among signed ones: as they are, or else from the smallest on.

        Args:
            scale: The real value of 1.
            low: The smallest integer.
            high: The largest.
            wide: Whether they are put into 16 bits, not 8.

        Returns:
            The rounding.
        """
        smallest = np.iinfo(np.int8).min
        if wide:
            smallest = np.iinfo(np.int16).min
        zero = 0
        if low < smallest or high > -smallest - 1:
            zero = smallest - low
        return cls(scale, zero, low + zero, high + zero, wide)

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest multiple of the scale."""
        return self.low - self.zero, self.high - self.zero

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest real value."""
        low, high = self.integers
        return low * self.scale, high * self.scale

    @property
    def dtype(self) -> torch.dtype:
        """The type of its integers."""
        if self.wide:
            return torch.int16
        return torch.int8

    @property
    def is_whole(self) -> bool:
        """Whether it has all integers of its type, so that nothing need be clipped before."""
        info = torch.iinfo(self.dtype)
        return (self.low, self.high) == (info.min, info.max)

    @property
    def of_xnnpack(self) -> bool:
        """Whether XNNPACK rounds so."""
        return not self.wide and not self.sign

    def round(self, x: Tensor, *, clipped: bool = False) -> Tensor:
        """Round real values to integers; those that lie within `bounds` need no clipping."""
        if self.sign:
            x = torch.where(x >= 0, self.scale, -self.scale)
        elif not self.is_whole and not clipped:
            x = F.hardtanh(x, *self.bounds)
        if self.in_float:
            return (x * (1.0 / self.scale)).round()
        made: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor(
            x, self.scale, self.zero, self.low, self.high, self.dtype
        )
        return made

    def real(self, q: Tensor) -> Tensor:
        """Return the real values of integers."""
        if self.in_float:
            return q * self.scale
        made: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(
            q, self.scale, self.zero, self.low, self.high, self.dtype
        )
        return made


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of a layer, with the batch norms behind it folded.

    call      its name: the layer's, and name@2 at its second call
    weight    integers and the scale of each output channel; None where weights are float
    real      the weights in float
    bias      None without
    rounding  of its input; None where that is float
    finer     the same numbers as larger integers, that XNNPACK is given instead; None: those of `rounding`
    """

    call: str
    weight: tuple[NDArray[Any], NDArray[np.float32]] | None
    real: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    rounding: Rounding | None
    finer: Rounding | None = None

    @property
    def fits(self) -> bool:
        """Whether XNNPACK can hold it: 8 bits on both sides, and sums and bias within 32 bits."""
        if self.weight is None or self.rounding is None or self.rounding.wide:
            return False
        integers, steps = self.weight
        if integers.dtype != np.int8:
            return False
        entering = self.finer or self.rounding
        most = max(abs(bound) for bound in entering.integers)
        sums = np.abs(integers.astype(np.int64)).reshape(len(integers), -1).sum(1) * float(most)
        if self.bias is not None:
            sums = sums + np.abs(self.bias / (steps.astype(np.float64) * entering.scale))
        return bool((sums < SUMS).all())


class Plan:
    """What is rounded where, of a graph.

    Attributes:
        nodes: The operations that are left, in order: batch norms behind layers are folded.
        layers: The layers by the names of their operations.
        watched: Layers and quantizers between them, with the names of their calls.
        in_integers: The layers that XNNPACK has integer kernels for.
    """

    def __init__(self, graph: Graph, network: nn.Module, *, for_xnnpack: bool = False) -> None:
        """Look at a graph and the quantized network that it is of.

        Args:
            graph: The operations.
            network: The quantized network.
            for_xnnpack: Whether what XNNPACK has no integer kernels for is in float: weights of such layers, and what is
                rounded to 16 bits.

        Raises:
            ValueError: Naming the layer and its scheme, for what isn't integers times a scale.
        """
        self.for_xnnpack = for_xnnpack
        modules = Q.quant_layers(network)
        before = {node.name: node for node in graph.nodes}
        behind: dict[str, list[Node]] = {node.name: [] for node in graph.nodes}
        for node in graph.nodes:
            for name in node.inputs:
                behind[name].append(node)
        self.nodes: list[Node] = []
        self.layers: dict[str, Layer] = {}
        self.watched: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of every operation, the one whose result is its own
        self._owners: dict[str, str] = {}  # of what a layer does to its own input, the layer's operation
        calls: dict[str, int] = {}
        for node in graph.nodes:
            if node.name in self._names:
                continue
            self._names[node.name] = node.name
            self.nodes.append(node)
            if node.kind in ("conv", "linear", "quantize"):
                calls[node.module] = calls.get(node.module, 0) + 1
                self.watched[node.name] = _call(node.module, calls[node.module])
            if node.kind in ("conv", "linear"):
                norms = _norms_behind(node, behind)
                self._names |= dict.fromkeys((norm.name for norm in norms), node.name)
                layer = _folded(node, modules[node.module], norms, calls[node.module])
                if for_xnnpack:
                    layer = _for_xnnpack(layer)
                self.layers[node.name] = layer
                source = before[node.inputs[0]]
                while source.kind == "move" and is_own(source.module, node.module):
                    self._owners[source.name] = node.name
                    source = before[source.inputs[0]]
        # Who reads the result of an operation, and in which ways; None is float.
        self.readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        self.asked: dict[str, list[Rounding | None]] = {node.name: [] for node in self.nodes}
        for node in reversed(self.nodes):
            rounding = self.read_as(node)
            for name in self.inputs(node):
                self.readers[name].append(node)
                if rounding not in self.asked[name]:
                    self.asked[name].append(rounding)
        self.in_integers = {name for name in self.layers if self._is_in_integers(name)}

    def inputs(self, node: Node) -> list[str]:
        """Name the operations whose results a node reads."""
        return [self._names[name] for name in node.inputs]

    def sole(self, name: str) -> Rounding | None:
        """Return the only way in which a result is read; None where there are several, or where it is read in float."""
        asked = self.asked[name]
        if len(asked) == 1:
            return asked[0]
        return None

    def read_as(self, node: Node) -> Rounding | None:
        """Return how a node reads its inputs; None is float."""
        if node.kind == "quantize":
            return rounding_between(node)
        layer = self.layers.get(self._owners.get(node.name, node.name))
        if layer is None:
            if node.kind in TRANSPARENT:
                return self.sole(node.name)
            return None
        if layer.rounding is not None and node.inputs[0] in self._owners:
            # What it did to its own input, it did to what was rounded already: zeros of a padding have no sign.
            return layer.rounding._replace(sign=False)
        return layer.rounding

    def _is_in_integers(self, name: str) -> bool:
        """Say whether XNNPACK has an integer kernel for a layer: its result is rounded to int8, and read in no other way."""
        layer = self.layers[name]
        if not layer.fits:
            return False
        assert layer.weight is not None
        assert layer.rounding is not None
        after = self.readers[name]
        output = self.sole(name)
        if len(after) == 1 and after[0].kind in ("relu", "clamp"):
            output = self.sole(after[0].name)
        if output is None or output.wide or output.sign:
            return False
        entering = layer.finer or layer.rounding
        ratios = entering.scale * layer.weight[1].astype(np.float64) / output.scale
        if ratios.min() < RATIOS[0] or ratios.max() >= RATIOS[1]:
            return False
        if layer.bias is None:
            return True
        exact = layer.bias / output.scale
        moved = np.abs(np.rint(exact / ratios) * ratios - exact)
        return bool(moved.max() <= BIAS_STEPS)


def _for_xnnpack(layer: Layer) -> Layer:
    """Keep a layer's input of 16 bits in float, and let one of few bits fill a byte, so that its bias has a finer unit."""
    rounding = layer.rounding
    if rounding is None:
        return layer
    if rounding.wide:
        return replace(layer, rounding=rounding._replace(in_float=True))
    low, high = rounding.integers
    factor = 2 ** int(math.log2(BYTE / (high - low)))
    if factor == 1:
        return layer
    return replace(layer, finer=Rounding.placed(rounding.scale / factor, low * factor, high * factor))


def rounding_between(node: Node) -> Rounding:
    """Return the rounding of a quantizer between layers."""
    assert node.scale is not None
    return Rounding.placed(float(node.scale), int(node.low) - node.zero_point, int(node.high) - node.zero_point)


def _norms_behind(node: Node, behind: Mapping[str, list[Node]]) -> list[Node]:
    """List the batch norms that a layer can do too: those that alone read its result, one after the other."""
    norms: list[Node] = []
    last = node
    while len(after := behind[last.name]) == 1 and after[0].kind == "batch_norm" and after[0].dims == node.dims:
        last = after[0]
        norms.append(last)
    return norms


def _folded(node: Node, layer: Q.QuantLayer, norms: list[Node], number: int) -> Layer:
    """Read a layer at one of its calls, with the batch norms behind it."""
    channels = node.shape[2]
    factor, shift = np.ones(channels), np.zeros(channels)
    bias = layer.effective_bias()
    if bias is not None:
        shift = bias.detach().double().numpy()
    for norm in norms:
        assert norm.scale is not None
        assert norm.shift is not None
        factor, shift = factor * norm.scale, shift * norm.scale + norm.shift
    by_channel = (-1, *[1] * (layer.weight.dim() - 1))
    weight = None
    if layer.weight_bits is None:
        real = layer.weight.detach().double().numpy() * factor.reshape(by_channel)
    else:
        codes, scale, _ = integer_weights(node.module, layer)
        real = codes * (scale * factor).reshape(by_channel)
        weight = _filled(codes, scale * factor)
    rounding = None
    if layer.activation_bits is not None:
        rounding = Rounding.of(integer_activations(node.module, layer))
    folded = None
    if bias is not None or norms:
        folded = shift.astype(np.float32)
    return Layer(_call(node.module, number), weight, real.astype(np.float32), folded, rounding)


def _filled(codes: NDArray[Any], scale: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
    """Give integers positive scales, and let those of few bits fill a byte; the values stay what they are.

    Returns None where the smallest integer would have to change its sign.
    """
    by_channel = (-1, *[1] * (codes.ndim - 1))
    info = np.iinfo(codes.dtype)
    integers = codes.astype(np.int32) * np.where(scale < 0, -1, 1).reshape(by_channel)
    if integers.max(initial=0) > info.max:
        return None
    factor = 1
    largest = int(np.abs(integers).max(initial=0))
    if codes.dtype == np.int8 and 0 < largest <= info.max:
        factor = 2 ** int(math.log2(info.max // largest))
    steps = (np.abs(scale) / factor).astype(np.float32)
    # Scales must be normal numbers. Where they aren't, all values are zero but for float32's smallest.
    silent = steps < np.finfo(np.float32).tiny
    silent |= ~integers.reshape(len(integers), -1).any(1)
    integers[silent] = 0
    steps[silent] = 1.0
    return (integers * factor).astype(codes.dtype), steps


class QdqNetwork(nn.Module):
    """The operations of a graph, computed with Q/DQ operators: what torch.export is given.

    Called with images it returns what the fake-quantized network does, but for the rounding of sums.

    Attributes:
        watch: Told the rounded values that enter a layer or leave a quantizer, with the name of its call; None: nobody is.
    """

    def __init__(self, plan: Plan) -> None:
        """Hold the integers of a plan."""
        super().__init__()
        self.plan = plan
        self.watch: Callable[[str, Tensor, Rounding], None] | None = None
        self._numbers = {node.name: number for number, node in enumerate(plan.nodes)}
        for name, layer in plan.layers.items():
            self._hold(name, "bias", layer.bias)
            if layer.weight is None or (plan.for_xnnpack and name not in plan.in_integers):
                self._hold(name, "real", layer.real)
                continue
            integers, steps = layer.weight
            self._hold(name, "integers", integers)
            self._hold(name, "steps", steps)
            self._hold(name, "zeros", np.zeros(len(steps), np.int64))
        dims = {node.name: node.dims for node in plan.nodes}
        self._said = set()  # moves that torch has words for
        for node in plan.nodes:
            if node.kind == "move":
                index = _index(node, [dims[name] for name in plan.inputs(node)])
                if index is None:
                    self._said.add(node.name)
                self._hold(node.name, "index", index)

    def _hold(self, name: str, kind: str, array: NDArray[Any] | None) -> None:
        tensor = None
        if array is not None:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
        self.register_buffer(f"{kind}_{self._numbers[name]}", tensor)

    def _held(self, name: str, kind: str) -> Any:
        return getattr(self, f"{kind}_{self._numbers[name]}", None)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the outputs of images (N, C, H, W), or of what else the network takes."""
        real: dict[str, Tensor] = {}
        rounded: dict[tuple[str, Rounding], Tensor] = {}
        clipped: dict[str, Rounding] = {}  # results that lie within a rounding's bounds
        between: dict[str, Rounding] = {}  # results of quantizers between layers; XNNPACK wants a DQ for each that reads them

        def read(name: str, rounding: Rounding | None) -> Tensor:
            if rounding is None and name not in between:
                return real[name]
            rounding = rounding or between[name]
            if (name, rounding) not in rounded:
                rounded[name, rounding] = rounding.round(real[name], clipped=clipped.get(name) == rounding)
            return rounding.real(rounded[name, rounding])

        made = images
        for node in self.plan.nodes:
            rounding = self.plan.read_as(node)
            names = self.plan.inputs(node)
            inputs = [read(name, rounding) for name in names]
            if self.watch is not None and rounding is not None and node.name in self.plan.watched:
                self.watch(self.plan.watched[node.name], inputs[0], rounding)
            if node.kind in ("relu", "clamp"):
                made = self._clip(node, inputs[0], clipped)
            elif node.name in self.plan.layers:
                finer = self.plan.layers[node.name].finer
                if finer is not None and node.name in self.plan.in_integers:
                    inputs[0] = finer.real(finer.round(inputs[0], clipped=True))
                made = self._multiply(node, inputs[0])
            elif node.kind == "move":
                made = self._move(node, inputs, images.shape[0])
            elif node.kind != "input":
                made = _compute(node, inputs)
            if rounding is not None and node.name not in self.plan.layers:
                # Rounded values that went to another place, or are the largest of some, are rounded ones.
                clipped[node.name] = rounding
            if node.kind == "quantize":
                assert rounding is not None
                between[node.name] = rounding
                rounded[node.name, rounding] = rounded[names[0], rounding]
            real[node.name] = made
        return made

    def _clip(self, node: Node, x: Tensor, clipped: dict[str, Rounding]) -> Tensor:
        """Compute a ReLU or a clamp, and the clipping of what rounds its result, if that is all that reads it."""
        low, high = node.low, node.high
        rounding = self.plan.sole(node.name)
        if rounding is not None and not rounding.sign:
            least, most = rounding.bounds
            low, high = min(max(low, least), most), max(min(high, most), least)
            if low == 0 and node.high >= most and rounding.high == torch.iinfo(rounding.dtype).max:
                high = math.inf  # rounding clips there itself, and a ReLU says less
            clipped[node.name] = rounding
        if (low, high) == (0, math.inf):
            return F.relu(x)
        if math.isfinite(low) and math.isfinite(high):
            return F.hardtanh(x, low, high)
        return x.clamp(_finite(low), _finite(high))

    def _multiply(self, node: Node, x: Tensor) -> Tensor:
        weight = self._held(node.name, "real")
        if weight is None:
            integers = self._held(node.name, "integers")
            info = torch.iinfo(integers.dtype)
            weight = torch.ops.quantized_decomposed.dequantize_per_channel(
                integers,
                self._held(node.name, "steps"),
                self._held(node.name, "zeros"),
                0,
                info.min,
                info.max,
                integers.dtype,
            )
        bias = self._held(node.name, "bias")
        if node.kind == "linear":
            return F.linear(x, weight, bias)
        return _convolve(node, x, weight, bias)

    def _move(self, node: Node, inputs: list[Tensor], count: int) -> Tensor:
        if node.name in self._said:
            return _say(node, inputs)
        flat = torch.cat([*(x.reshape(count, -1) for x in inputs), inputs[0].new_zeros(count, 1)], 1)
        return flat.index_select(1, self._held(node.name, "index")).reshape(-1, *node.dims[1:])


def _finite(bound: float) -> float | None:
    if math.isfinite(bound):
        return bound
    return None


def _convolve(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    window = node.window
    assert window is not None
    padding = window.padding
    # At the end fewer rows than at the start are looked at without being told, and more must be put there.
    ends = window.end_padding(_size(x), node.shape[:2])
    if _is_longer(ends, padding):
        x = F.pad(x, (padding[1], ends[1], padding[0], ends[0])[: 2 * x.dim() - 4])
        padding = (0, 0)
    if x.dim() == 3:
        return F.conv1d(x, weight, bias, window.stride[1], padding[1], window.dilation[1], window.groups)
    return F.conv2d(x, weight, bias, window.stride, padding, window.dilation, window.groups)


def _size(x: Tensor) -> tuple[int, int]:
    """Return height and width of maps; signals have a height of 1."""
    if x.dim() == 3:
        return 1, int(x.shape[2])
    return int(x.shape[2]), int(x.shape[3])


def _is_longer(ends: tuple[int, int], starts: tuple[int, int]) -> bool:
    return ends[0] > starts[0] or ends[1] > starts[1]


def _compute(node: Node, inputs: list[Tensor]) -> Tensor:
    """Compute an operation that is no layer, with what XNNPACK knows where there is such a thing."""
    x = inputs[0]
    if node.kind == "flatten":
        return x.flatten(1)
    if node.kind == "quantize":
        return x  # it was read so
    if node.kind in ("max_pool", "avg_pool") and node.window is not None and x.dim() == 4:
        window = node.window
        ends = window.end_padding(_size(x), node.shape[:2])
        padded = window.padding != (0, 0)
        if node.kind == "avg_pool" and window.kernel == _size(x) and not padded:
            return x.mean((2, 3), keepdim=True)
        if node.kind == "avg_pool" and not padded and not _is_longer(ends, window.padding):
            return F.avg_pool2d(x, window.kernel, window.stride)
        small = 2 * window.padding[0] <= window.kernel[0] and 2 * window.padding[1] <= window.kernel[1]
        if node.kind == "max_pool" and small and not _is_longer(ends, window.padding):
            return F.max_pool2d(x, window.kernel, window.stride, window.padding, window.dilation)
    return COMPUTED[node.kind](node, *inputs)


# What torch calls a move, of its inputs and of a node with its arguments.
WORDS: dict[str, Callable[[list[Tensor], Node], Tensor]] = {
    "reshape": lambda x, node: x[0].reshape(-1, *node.dims[1:]),
    "expand": lambda x, node: x[0].expand(-1, *node.dims[1:]),
    "permute": lambda x, node: x[0].permute(node.arguments["dims"]),
    "slice": lambda x, node: torch.ops.aten.slice(x[0], *(node.arguments[key] for key in ("dim", "start", "end", "step"))),
    "select": lambda x, node: x[0].select(node.arguments["dim"], node.arguments["index"]),
    "cat": lambda x, node: torch.cat(x, node.arguments["dim"]),
    "stack": lambda x, node: torch.stack(x, node.arguments["dim"]),
    "pad": lambda x, node: F.pad(x[0], node.arguments["pad"], node.arguments["mode"]),
    "roll": lambda x, node: x[0].roll(node.arguments["shifts"], node.arguments["dims"]),
    "flip": lambda x, node: x[0].flip(node.arguments["dims"]),
    "pixel_shuffle": lambda x, node: F.pixel_shuffle(x[0], node.arguments["upscale_factor"]),
    "pixel_unshuffle": lambda x, node: F.pixel_unshuffle(x[0], node.arguments["downscale_factor"]),
    "channel_shuffle": lambda x, node: F.channel_shuffle(x[0], node.arguments["groups"]),
    "upsample_nearest": lambda x, node: F.interpolate(x[0], size=node.arguments["output_size"]),
}


def _say(node: Node, inputs: list[Tensor]) -> Tensor:
    return WORDS[node.operation](inputs, node)


def _index(node: Node, dims: list[tuple[int, ...]]) -> NDArray[np.int32] | None:
    """Return where values come from in a move that torch has no words for; None where it has.

    Args:
        node: The move.
        dims: The shapes of its inputs, for one image.

    Returns:
        The index in the flattened inputs and a zero behind them.
    """
    assert node.index is not None
    sizes = [math.prod(one) for one in dims]
    index = np.where(node.index < 0, sum(sizes), node.index).astype(np.int32)
    if node.operation not in WORDS or node.dims[0] != 1 or any(one[0] != 1 for one in dims):
        return index
    # Words are tried on two images of numbers, of which none is zero.
    flat = torch.arange(1.0, 1 + 2 * sum(sizes), dtype=torch.float64).view(2, -1)
    inputs = [part.reshape(2, *one[1:]) for part, one in zip(flat.split(sizes, 1), dims, strict=True)]
    expected = F.pad(flat, (0, 1))[:, torch.from_numpy(index.astype(np.int64))]
    try:
        found = _say(node, inputs)
    except (RuntimeError, NotImplementedError):
        return index
    if found.numel() == expected.numel() and torch.equal(found.reshape(2, -1), expected):
        return None
    return index


def exported(network: QdqNetwork, images: Tensor, *, any_number: bool = False) -> Any:
    """Write down a network with torch.export.

    Args:
        network: The network.
        images: Images (N, C, H, W), or of what else it takes.
        any_number: Whether the program is to take any number of images, if that can be; else it takes one.

    Returns:
        The torch.export.ExportedProgram.
    """
    zeros = torch.zeros(2, *images.shape[1:])  # no image of anybody's is kept in the file
    with torch.no_grad():
        program = torch.export.export(network, (zeros,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        if not any_number or is_concrete_int(_input(program).shape[0]):
            program = torch.export.export(network, (zeros[:1],))
    for node in program.graph.nodes:
        # Nor is it told where on this machine which line of code was.
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(key, None)
    return program


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _input(program: Any) -> Tensor:
    """Return what a program takes, without its values."""
    (name,) = program.graph_signature.user_inputs
    made: Tensor = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    return made


class Lowered(NamedTuple):
    """A program of ExecuTorch, and which operators XNNPACK took and which it left."""

    content: bytes
    taken: int
    left: tuple[str, ...]


def lowered(program: Any) -> Lowered:
    """Lower an exported program to XNNPACK.

    Args:
        program: What `exported` wrote down.

    Returns:
        The content of a file for ExecuTorch's runtime.

    Raises:
        ImportError: With what to install.
    """
    partitioners = package("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    lower = package("executorch.exir").to_edge_transform_and_lower
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = lower(program, partitioner=[partitioners.XnnpackPartitioner()])
        whole = edge.exported_program().graph_module
        taken = 0
        for name, part in whole.named_children():
            if name.startswith("lowered_module"):
                taken += len(_operators(part.original_module.graph_module))
        left = tuple(_operators(whole))
        return Lowered(bytes(edge.to_executorch().buffer), taken, left)


def _operators(module: Any) -> list[str]:
    """List the operators of a graph module; calls of lowered parts aren't among them."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [target._schema.name.removeprefix("aten::") for target in targets if hasattr(target, "_schema")]


def package(name: str) -> Any:
    """Import a part of executorch, which is optional. Raises ImportError with what to install."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it is made with
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"ExecuTorch's programs need the package executorch: {INSTALL}") from error


def is_installed() -> bool:
    """Say whether executorch is there."""
    return importlib.util.find_spec("executorch") is not None


class Running:
    """A program of ExecuTorch in its runtime: called with images it computes one after the other."""

    def __init__(self, path: Path) -> None:
        """Load it. Raises ImportError with what to install."""
        self._program = package("executorch.runtime").Runtime.get().load_program(path)
        self._method = self._program.load_method("forward")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the outputs of images."""
        return torch.cat([self.run(image) for image in images.split(1)])

    def run(self, image: Tensor) -> Tensor:
        """Return the output of one image (1, C, H, W)."""
        made: Tensor = self._method.execute([image.contiguous()])[0]
        return made.clone()  # the runtime writes the next one there


@dataclass
class _Integers:
    """What enters layers, against the fake-quantized network: how many integers, how many others, by how many steps."""

    values: int = 0
    different: int = 0
    steps: int = 0
    fault: str = ""


@torch.no_grad()
def _compare_integers(qdq: QdqNetwork, network: nn.Module, images: Tensor) -> _Integers:
    """Compare what enters layers and leaves quantizers between them, and the outputs of images for which all is equal."""
    found = _Integers()
    expected, integers = fake_quantized(network, images)
    between = _between(network, images)
    equal = np.ones(len(images), bool)  # images all of whose integers were the same so far

    def watch(call: str, x: Tensor, rounding: Rounding) -> None:
        nonlocal equal
        q = between.get(call)
        if q is None:
            q = integers.pop(call)
        gap = np.abs((x / rounding.scale).round().to(torch.int32).numpy().reshape(q.shape) - q)
        of_image = gap.reshape(len(gap), -1).max(1)
        most = int(of_image[equal].max(initial=0))
        one_step = 1
        if (rounding.low, rounding.high) == (-1, 1):
            one_step = 2
        if most > one_step:
            found.fault = found.fault or f"gives {call!r} integers that are off by up to {most}, from the same ones before"
        equal = equal & (of_image == 0)
        if call not in between:
            found.values += q.size
            found.different += int((gap > 0).sum())
            found.steps = max(found.steps, int(gap.max()))

    qdq.watch = watch
    try:
        outputs = qdq(images)
    finally:
        qdq.watch = None
    if integers:
        found.fault = found.fault or f"doesn't round what enters layer {next(iter(integers))!r}, which the network does"
    apart = (outputs - expected).abs()[torch.from_numpy(equal)]
    if apart.numel() and not float(apart.max()) <= OUTPUT_SHARE * float(expected.abs().max()):
        found.fault = found.fault or f"gives outputs that are off by {float(apart.max()):.3g} where all layers get the same"
    return found


def _between(network: nn.Module, images: Tensor) -> dict[str, NDArray[np.int32]]:
    """Return the multiples of their scales that quantizers between layers give, by the names of their calls."""
    found: dict[str, NDArray[np.int32]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, Any, Tensor], None]:
        def after(module: Any, inputs: Any, made: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            found[_call(name, calls[name])] = (made / module.scale).round().to(torch.int32).numpy()

        return after

    quantizers = Q.residual_quantizers(network)
    hooks = [module.register_forward_hook(watch(name)) for name, module in quantizers.items()]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _call(name: str, number: int) -> str:
    """Name a call of a module: by the module, and of a later call of it by the call too."""
    if number == 1:
        return name
    return f"{name}@{number}"


class ExecutorchExporter(Exporter):
    """An exported program with Q/DQ operators, and one for ExecuTorch's runtime."""

    name = "executorch"
    summary = SUMMARIES["executorch"]
    output = "network.pt2"
    options = ("residuals",)

    def __init__(self) -> None:
        """Have lowered nothing."""
        self._lowered: Lowered | None = None
        self._fault = ""  # why it couldn't be

    def check_path(self, path: Path) -> None:
        """Raise ValueError for a folder, and for a name with another end than the two that are written."""
        check_is_no_folder(path, self.name)
        if path.suffix != PT2:
            raise ValueError(f"--to {self.name} writes NAME{PT2}, and NAME{PTE} beside it, and {path} ends otherwise")

    def check(self, network: nn.Module) -> None:
        """Raise ValueError, naming the layer, unless what is quantized are integers times a scale."""
        check_integers(network, always_weights=True)

    def check_operations(self, network: nn.Module, graph: Graph, images: Tensor, *, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the layer, for what has no Q/DQ operators; see `Exporter.check_operations`."""
        with torch.no_grad():
            QdqNetwork(Plan(graph, network)).eval()(images[:1])

    def _made(self, network: nn.Module, graph: Graph, images: Tensor) -> QdqNetwork:
        qdq = QdqNetwork(Plan(graph, network)).eval()
        found = _compare_integers(qdq, network, images[:CHECKED])
        if found.fault:
            raise ValueError(f"{type(network).__name__} can't be deployed: as a program of {self.name} it {found.fault}")
        return qdq

    def export(
        self,
        network: nn.Module,
        graph: Graph,
        images: Tensor,
        path: Path,
        *,
        notes: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: OnProgress,
    ) -> None:
        """Write both programs, the second where executorch is installed; see `Exporter.export`."""
        qdq = self._made(network, graph, images)
        content = io.BytesIO()
        torch.export.save(exported(qdq, images, any_number=True), content, extra_files={"haq.json": json.dumps(dict(notes))})
        if is_installed():
            on_progress(0, 1, "lowering to XNNPACK")
            for_xnnpack = QdqNetwork(Plan(graph, network, for_xnnpack=True)).eval()
            try:
                self._lowered = lowered(exported(for_xnnpack, images))
            except Exception as error:
                # Whatever the package can't do shows as one of many kinds of errors; the other file does without it.
                self._fault = _first_line(error)
            on_progress(1, 1, "")
        write(path.with_suffix(PT2), content.getvalue())
        if self._lowered is not None:
            write(path.with_suffix(PTE), self._lowered.content)

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Run both programs on all test images; see `Exporter.compare`."""
        path = path.with_suffix(PT2)
        program = torch.export.load(path)
        run: Any = program.module()
        if is_concrete_int(_input(program).shape[0]):
            run = _one_by_one(run)
        runs = {path.name: run}
        if self._lowered is not None:
            runs[path.with_suffix(PTE).name] = Running(path.with_suffix(PTE))
        found = {name: compare_answers(network, run, samples) for name, run in runs.items()}
        integers = _compare_integers(QdqNetwork(Plan(graph, network)).eval(), network, samples.compared)
        if integers.fault:
            for suffix in (PT2, PTE):
                path.with_suffix(suffix).unlink(missing_ok=True)
            raise ValueError(f"{type(network).__name__} can't be deployed: as a program of {self.name} it {integers.fault}")
        others = f"{integers.different:,}"
        if integers.different:
            others = f"{integers.different:,}, by up to {integers.steps}"
        rows = [
            *found[path.name].rows(),
            ("integers that enter layers", f"{integers.values:,}, of {counted(len(samples.compared), 'images')}"),
            ("  other than in PyTorch", others),
            ("size of the file", _size_words(path, network, samples.compared)),
        ]
        if self._lowered is None:
            rows.append((path.with_suffix(PTE).name, self._why_not(path)))
            return Verdict(found[path.name].all_same, tuple(rows))
        path = path.with_suffix(PTE)
        rows += [
            (f"{path.name}, in ExecuTorch's runtime", ""),
            *found[path.name].rows(),
            ("operators in XNNPACK", _taken_words(self._lowered)),
            ("layers in integers there", _integer_words(Plan(graph, network, for_xnnpack=True))),
            ("size of the file", _size_words(path, network, samples.compared)),
            ("latency, measured", f"{1e6 * _latency_s(runs[path.name], samples.compared[:1]):.1f} us (median of {TIMED})"),
        ]
        return Verdict(all(answers.all_same for answers in found.values()), tuple(rows))

    def _why_not(self, path: Path) -> str:
        """Say why there is no program for the runtime."""
        words = f"not written: {self._fault or INSTALL}"
        if path.with_suffix(PTE).exists():
            words = f"{words} (the one that is there is of an earlier deployment)"
        return words


def _one_by_one(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.cat([run(image) for image in images.split(1)])


def _size_words(path: Path, network: nn.Module, images: Tensor) -> str:
    """Say how large a file is, and what the policy's parameters take at their bits."""
    stored = policy_storage_bytes(network, images)
    return f"{describe_bytes(path.stat().st_size)} (the policy's parameters at their bits: {describe_bytes(stored)})"


def _taken_words(found: Lowered) -> str:
    words = f"{found.taken} of {found.taken + len(found.left)}"
    if found.left:
        words = f"{words}; not {_some(list(dict.fromkeys(found.left)))}"
    return words


def _integer_words(plan: Plan) -> str:
    """Say how many layers XNNPACK computes in integers, and which it doesn't."""
    others = [layer.call for name, layer in plan.layers.items() if name not in plan.in_integers]
    words = f"{len(plan.in_integers)} of {len(plan.layers)}"
    if others:
        words = f"{words}; in float32: {_some(others)}"
    return words


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        shown = f"{shown}, ..."
    return shown


def _latency_s(run: Any, image: Tensor) -> float:
    """Time calls; the median."""
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        run.run(image)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
