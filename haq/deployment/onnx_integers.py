"""Writes quantized layers so that runtimes compute them in integers.

ONNX Runtime makes a QLinearConv of a Conv whose input and weights come from DequantizeLinear and whose result goes into
one QuantizeLinear; a QGemm of a Gemm whose inputs do, and whose bias, if there is one, is int32. Both round a bias to a
multiple of the input's scale times the weights'. So integers of few bits are moved up in their bytes, and scales are as much
smaller. Where a bias would be far off all the same, and where there is no QuantizeLinear behind a convolution, weights are
written as real numbers that the runtime computes from the stored integers when it loads the file: no DequantizeLinear is left
to be computed with every image then.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from haq.deployment.graph import Graph, Node
from haq.deployment.lowering import integer_activations, integer_weights
from haq.deployment.nodes import is_own
from haq.deployment.onnx_compact import INPUT
from haq.deployment.onnx_grids import Grid, grid_of_codes, grid_of_node, wanted_grids
from haq.deployment.onnx_moves import write_move
from haq.deployment.onnx_nodes import Array, GraphWriter
from haq.deployment.onnx_weights import FoldedWeights, Packer
from haq.deployment.program import BYTE_BITS, Codes

# The first whose QuantizeLinear and DequantizeLinear take integers of 16 bits.
WIDE_OPSET = 21
WIDE_IR_VERSION = 10
HALF_BYTE_BITS = 4
BETWEEN = {"add", "mul", "function", "prelu", "avg_pool", "resize", "batch_norm", "output"}  # that nothing is fused with
FLAVOUR = "for"  # among a file's properties: what it is for
# Half a step of the sums may be so many steps of the integers that these are rounded to next.
LARGEST_ROUNDING = 1 / 8
# Integers of few bits are moved up in their bytes, as weights always are, where it would be more than this.
FINE = 1 / 512


class IntegerWriter(GraphWriter):
    """Writes quantized layers with QuantizeLinear and DequantizeLinear.

    The result of a node of the graph is a real tensor of the node's name, or integers on a grid (`integers_of`), of which the
    real tensor is made where somebody wants it.
    """

    def __init__(self, graph: Graph, network: nn.Module, flavour: str | None = None) -> None:
        """Have written nothing."""
        super().__init__(graph, network)
        self.flavour = flavour
        self.signed = flavour == "tensorrt"
        self.codes: dict[str, Codes] = {}
        for name in graph.layers:
            if self.layers[name].activation_bits is not None:
                self.codes[name] = integer_activations(name, self.layers[name])
        of_readers: dict[str, Grid] = {}
        for node in graph.nodes:
            grid = self._grid_of_reader(node)
            if grid is not None:
                of_readers[node.name] = grid
        self.of_readers = of_readers
        self.wanted: dict[str, Grid] = {}
        if not self.signed:  # TensorRT fuses a convolution with the ReLU behind it
            self.wanted = wanted_grids(graph, of_readers)
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.real = {"input"}  # nodes whose real tensor is there
        # By the name of a node and the key of a grid: the tensor of its integers, and between what they lie.
        self.whole: dict[tuple[str, tuple[float, int]], tuple[str, int, int]] = {}
        # The same, clipped to the ends of a grid.
        self.clipped: dict[tuple[str, tuple[float, int], tuple[int, int]], str] = {}
        self.scales: dict[float, str] = {}  # the names of constants
        self.folded: set[str] = set()  # batch norms that layers before them do
        self.packer = Packer(self)
        self.stored: dict[tuple[bytes, int, int], str] = {}  # tensors of int8 by the integers, their bits and their shift

    def _grid_of_reader(self, node: Node) -> Grid | None:
        if node.kind == "quantize":
            return grid_of_node(node, self.signed)
        if node.kind in ("conv", "linear") and node.module in self.codes:
            return grid_of_codes(self.codes[node.module], self.signed)
        return None

    def model(self, batch: int | str, further: tuple[Any, ...] = ()) -> Any:
        """Write everything; see `GraphWriter.model`."""
        for node in self.graph.nodes[1:]:
            with torch.no_grad():
                self.write(node)
        self.packer.write()
        made = self.assemble(batch, further)
        if self.flavour is not None:
            self.onnx.helper.set_model_props(made, {FLAVOUR: self.flavour})
        return made

    # ------------------------------------------------------------------------------------------------ integers and real

    def scalar(self, value: float, what: str) -> str:
        """Write a scale; the same number is written once."""
        value = float(np.float32(value))
        if value not in self.scales:
            self.scales[value] = self.constant(self.free(f"{what}:scale"), value)
        return self.scales[value]

    def zero(self, grid: Grid) -> str:
        """Write the integer that stands for zero."""
        return self.constant(f"{grid.dtype}_{grid.zero}", grid.zero, grid.dtype)

    def integers_of(self, name: str, grid: Grid) -> str:
        """Return the tensor with a node's result as integers on a grid, writing it if need be."""
        key = name, grid.key
        if key not in self.whole and self.flavour is None:
            self._round(name, grid)
        if key in self.whole:
            tensor, low, high = self.whole[key]
            if grid.low <= low and high <= grid.high:
                return tensor
        ends = grid.low, grid.high
        clipped = (name, grid.key, ends)
        if clipped not in self.clipped:
            if self.flavour is not None:
                self._round(name, grid)
            else:
                made = self.free(f"{name}:clipped")
                bounds = [self.constant(f"{grid.dtype}_{bound}", bound, grid.dtype) for bound in ends]
                self.clipped[clipped] = self.op("Clip", [tensor, *bounds], made)
        return self.clipped[clipped]

    def _round(self, name: str, grid: Grid) -> None:
        """Put a node's real result on a grid."""
        source = self.real_of(name)
        low, high = int(np.iinfo(grid.dtype).min), int(np.iinfo(grid.dtype).max)
        if self.flavour is not None:
            # These fuse a Clip with what is before it, and want DequantizeLinear right behind QuantizeLinear. What is clipped
            # before it is divided rounds to the same.
            source = self._clipped(name, source, grid, low, high)
            low, high = grid.low, grid.high
        made = self.free(f"{name}:integers")
        self.op("QuantizeLinear", [source, self.scalar(grid.scale, name), self.zero(grid)], made)
        if self.flavour is not None:
            self.clipped[name, grid.key, (low, high)] = made
        else:
            self.whole[name, grid.key] = made, low, high

    def _clipped(self, name: str, source: str, grid: Grid, low: int, high: int) -> str:
        """Clip a node's real result to a grid's ends, but for an end that it can't be beyond, or that the bytes have."""
        ends = [-math.inf, math.inf]
        if grid.low > low and not (grid.low == grid.zero and self._is_positive(name)):
            ends[0] = float(np.float32(grid.low - grid.zero) * np.float32(grid.scale))
        if grid.high < high:
            ends[1] = float(np.float32(grid.high - grid.zero) * np.float32(grid.scale))
        if ends == [-math.inf, math.inf]:
            return source
        if ends == [0, math.inf]:
            return self.op("Relu", [source], self.free(f"{name}:clipped"))
        bounds = ["", ""]
        for place, end in enumerate(ends):
            if not math.isinf(end):
                bounds[place] = self.constant(self.free(f"{name}:bound"), end)
        return self.op("Clip", [source, *bounds], self.free(f"{name}:clipped"))

    def _is_positive(self, name: str) -> bool:
        """Tell whether a node's result is nowhere negative."""
        node = self.graph[name]
        if node.kind in ("relu", "clamp"):
            return node.low >= 0
        if node.kind == "quantize":
            return node.low >= node.zero_point
        if node.kind in ("max_pool", "avg_pool", "flatten", "move"):
            return all(self._is_positive(before) for before in node.inputs)
        return False

    def free(self, name: str) -> str:
        """Return a name that no tensor has yet."""
        taken = {output for node in self.nodes for output in node.output} | self.constants.keys()
        made, count = name, 1
        while made in taken:
            count += 1
            made = f"{name}{count}"
        return made

    def real_of(self, name: str) -> str:
        """Return the tensor with a node's real result, writing it if it is there as integers."""
        if name not in self.real:
            (scale, zero), tensor = next((key[1], held[0]) for key, held in self.whole.items() if key[0] == name)
            self._dequantize(tensor, Grid(scale, zero, 0, 0, self.signed), name, name)
            self.real.add(name)
        return name

    def _dequantize(self, tensor: str, grid: Grid, made: str, what: str) -> str:
        return self.op("DequantizeLinear", [tensor, self.scalar(grid.scale, what), self.zero(grid)], made)

    def write(self, node: Node) -> None:
        """Write what a node of the graph computes."""
        if node.name in self.folded:
            return
        grid = self.wanted.get(node.name)
        if node.kind == "quantize":
            own = self.of_readers[node.name]
            tensor = self.integers_of(node.inputs[0], own)
            self.whole[node.name, own.key] = tensor, own.low, own.high
        elif grid is not None and node.kind in ("relu", "clamp"):
            grid = grid.clamped(node.low, node.high)
            tensor = self.integers_of(node.inputs[0], grid)
            self.whole[node.name, grid.key] = tensor, grid.low, grid.high
        elif grid is not None and node.kind in ("flatten", "move"):
            sources = [self.integers_of(name, grid) for name in node.inputs]
            made = f"{node.name}:integers"
            if node.kind == "flatten":
                self.op("Flatten", sources, made)
            else:
                write_move(self, node, sources, made, self.zero(grid))
            self.whole[node.name, grid.key] = made, grid.low, grid.high
        elif grid is not None and node.kind == "max_pool":
            self._max_pool(node, grid)
        else:
            if node.kind not in ("conv", "linear"):
                for name in node.inputs:
                    self.real_of(name)
            super().write(node)
            self.real.add(node.name)

    def _max_pool(self, node: Node, grid: Grid) -> None:
        """Write a maximum between DequantizeLinear and QuantizeLinear of one grid, which runtimes leave away."""
        source = self.integers_of(node.inputs[0], grid)
        real = self._dequantize(source, grid, f"{node.name}:real", node.inputs[0])
        pooled = self.op("MaxPool", [real], f"{node.name}:largest", **self.window(node))
        made = self.op(
            "QuantizeLinear", [pooled, self.scalar(grid.scale, node.name), self.zero(grid)], f"{node.name}:integers"
        )
        self.whole[node.name, grid.key] = made, grid.low, grid.high

    def _write_avg_pool(self, node: Node, inputs: list[str]) -> None:
        if self.is_global(node) and len(node.dims) == 4:
            self.op("GlobalAveragePool", inputs, node.name)
        else:
            super()._write_avg_pool(node, inputs)

    # ------------------------------------------------------------------------------------------------------------ layers

    def layer(self, node: Node) -> None:
        """Write a convolution or linear layer with the batch norms behind it."""
        name, step = node.module, self.call(node.module)
        layer = self.layers[name]
        scale, shift, made = self._following(node)
        bias = np.zeros(len(scale))
        real_bias = layer.effective_bias()
        if real_bias is not None:
            bias = real_bias.detach().double().numpy()
        bias = bias * scale + shift
        codes, wanted = self.codes.get(name), self.wanted.get(made)
        weights = None
        if layer.weight_bits is not None:
            q, steps, bits = integer_weights(name, layer)
            if self.signed:
                bits = BYTE_BITS  # they are in int8, whatever they take
            if q.dtype == np.int8:
                weights = FoldedWeights(q.astype(np.int8), bits, steps * scale, bias).positive()
        form = None
        if weights is not None and codes is not None and codes.bits <= BYTE_BITS:
            form = self._integer_form(node, weights, codes, wanted)
        if form is not None:
            self._integer_layer(node, step, form, made)
            return
        if self.signed and weights is not None:
            real = self._real_for_tensorrt(node, step, weights)
        elif weights is not None:
            shifted = 0
            if self.flavour is None:
                shifted = weights.shift(True)
            integers = self._stored(f"{step}.weight", weights, shifted)
            real = self._real_weights(step, integers, weights.scale / 2.0**shifted, weights.q.ndim)
        elif layer.weight_bits is not None:
            integers = self.constant(f"{step}.weight", q, np.int16)
            real = self._real_weights(step, integers, steps * scale, q.ndim)
        else:
            whole = layer.weight.detach().double().numpy()
            real = self.constant(f"{step}.weight", whole * _along(scale, whole.ndim))
        inputs = [self._enter(node, step, plain=not self._may_be_rounded(node, made)), real]
        if bias.any():
            inputs.append(self.constant(f"{step}.bias", bias))
        self._multiply(node, inputs, made)

    def _may_be_rounded(self, node: Node, made: str) -> bool:
        """Tell whether a QuantizeLinear may stand behind a layer with real weights.

        Where ONNX Runtime sees it, and a DequantizeLinear in front of them, it makes these weights 8 bits wide. Linear layers
        have theirs made so whatever is behind.
        """
        kinds = {reader.kind for reader in self.readers.get(made, [])}
        return node.kind == "linear" or not kinds <= BETWEEN

    def _following(self, node: Node) -> tuple[Array, Array, str]:
        """Return what batch norms behind a layer do to its channels, and the name of the last of them."""
        scale, shift, made = np.ones(node.dims[1]), np.zeros(node.dims[1]), node.name
        while True:
            readers = self.readers.get(made, [])
            if len(readers) != 1 or readers[0].kind != "batch_norm":
                return scale, shift, made
            (after,) = readers
            assert after.scale is not None
            assert after.shift is not None
            if self.signed and not self._can_turn(node, scale * after.scale):
                return scale, shift, made
            scale, shift = scale * after.scale, shift * after.scale + after.shift
            self.folded.add(after.name)
            made = after.name

    def _can_turn(self, node: Node, scale: Array) -> bool:
        """Tell whether integers of 8 bits have a positive scale, as TensorRT wants it: -128 can't be turned."""
        layer = self.layers[node.module]
        if layer.weight_bits is None:
            return True
        q, _, _ = integer_weights(node.module, layer)
        return bool((q.reshape(len(q), -1).min(1)[scale < 0] > -(2 ** (BYTE_BITS - 1))).all())

    def _real_for_tensorrt(self, node: Node, step: str, weights: FoldedWeights) -> str:
        """Write weights whose input is real: of 4 bits where TensorRT takes such ones, in linear layers, and else real."""
        bits = self.layers[node.module].weight_bits
        assert bits is not None
        if node.kind == "linear" and bits <= HALF_BYTE_BITS:
            scale = self.constant(f"{step}.scale", weights.scale)
            integers = self.constant(f"{step}.weight", weights.q, self._int4())
            return self.op("DequantizeLinear", [integers, scale], f"{step}:weight", axis=0)
        return self.constant(f"{step}.weight", weights.q * _along(weights.scale, weights.q.ndim))

    def _int4(self) -> np.dtype[Any]:
        """Return the type of integers of 4 bits, which newer files have."""
        self.opset, self.ir_version = WIDE_OPSET, WIDE_IR_VERSION
        return self.onnx.helper.tensor_dtype_to_np_dtype(self.onnx.TensorProto.INT4)

    def _integer_form(self, node: Node, weights: FoldedWeights, codes: Codes, wanted: Grid | None) -> _Form | None:
        """Return a layer's weights as integer kernels take them; None where none fits."""
        if self.signed:
            # ONNX Runtime, which checks the file, makes integers of its biases; in TensorRT they stay real.
            return _Form(weights.with_small_bias(codes.scale), 0, wanted)
        if self.flavour is not None:
            return _Form(weights, 0, wanted)
        if node.kind == "conv" and wanted is None:
            return None
        if not weights.bias.any():
            return _Form(weights, 0, wanted)
        form = _Form(weights, weights.shift(codes.bits == BYTE_BITS), wanted)
        if codes.bits < BYTE_BITS and (wanted is None or form.rounding(codes) > FINE * wanted.scale):
            form = _Form(weights, weights.shift(True), wanted, up=_room(codes))
        if wanted is not None and form.rounding(codes) > LARGEST_ROUNDING * wanted.scale:
            return None
        step = codes.scale / 2.0 ** (form.shift + form.up)
        return dataclasses.replace(form, weights=weights.with_small_bias(step))

    def _integer_layer(self, node: Node, step: str, form: _Form, made: str) -> None:
        """Write a layer between DequantizeLinear."""
        weights = form.weights
        codes = self.codes[node.module]
        scales = (weights.scale / 2.0**form.shift).astype(np.float32)
        scale = self.constant(f"{step}.scale", scales)
        stored = [self._stored(f"{step}.weight", weights, form.shift, integers=True), scale]
        if node.kind == "linear" or self.signed:
            # ONNX Runtime makes no QGemm without one, and knows no zero of its own where it turns int8 into uint8.
            stored.append(self.constant(f"{step}.zero", np.zeros(len(scales)), np.int8))
        inputs = [self._enter(node, step, plain=True, up=form.up)]
        inputs.append(self.op("DequantizeLinear", stored, f"{step}:weight", axis=0))
        if not weights.bias.any():
            self._multiply(node, inputs, made)
        elif node.kind == "conv" or self.flavour is not None:
            self._multiply(node, [*inputs, self.constant(f"{step}.bias", weights.bias)], made)
        elif form.wanted is not None:
            step_of_input = np.float32(codes.scale / 2.0**form.up)
            steps = step_of_input * scales
            limit = 2.0**31 - 1
            rounded = np.rint(weights.bias / steps.astype(np.float64)).clip(-limit, limit)
            # OpenVINO takes long with a scale that the file has it compute.
            given = [self.constant(f"{step}.bias", rounded, np.int32), self.constant(f"{step}.bias_scale", steps)]
            self._multiply(node, [*inputs, self.op("DequantizeLinear", given, f"{step}:bias", axis=0)], made)
        else:
            # Nothing is rounded behind it, so the bias isn't either.
            self._multiply(node, inputs, f"{made}:sums")
            self.op("Add", [f"{made}:sums", self.constant(f"{step}.bias", weights.bias)], made)
            self.real.add(made)

    def _multiply(self, node: Node, inputs: list[str], made: str) -> None:
        if node.kind == "linear":
            self.op("Gemm", inputs, made, transB=1)
        else:
            assert node.window is not None
            self.op("Conv", inputs, made, group=node.window.groups, **self.window(node))
        self.real.add(made)

    def _stored(self, name: str, weights: FoldedWeights, shift: int, *, integers: bool = False) -> str:
        """Write a layer's integers at their bits; the same ones are written once.

        Args:
            name: The tensor's name.
            weights: The integers.
            shift: By how many bits they are moved up.
            integers: Whether integer kernels take them.

        Returns:
            The tensor of int8 that holds them, moved up.
        """
        key = weights.q.tobytes(), weights.bits, shift
        if integers or weights.q.ndim == 2:
            # ONNX Runtime makes no two QGemm of one tensor, and no two QLinearConv of one if it turns int8 into uint8.
            key = name.encode(), weights.bits, shift
        if key not in self.stored:
            self.stored[key] = name
            if weights.bits == BYTE_BITS or (self.flavour is not None and weights.bits > HALF_BYTE_BITS):
                self.constant(name, weights.q * 2**shift, np.int8)
            elif self.flavour is not None:
                halves = self.constant(f"{name}4", weights.q, self._int4())
                self.op("Cast", [halves], name, to=self.onnx.TensorProto.INT8)
            else:
                self.packer.add(name, weights.q, weights.bits, shift)
        return self.stored[key]

    def _real_weights(self, step: str, integers: str, scale: Array, dimensions: int) -> str:
        """Write real weights as runtimes compute them when they load the file."""
        real = self.op("Cast", [integers], f"{step}:weight_integers", to=self.onnx.TensorProto.FLOAT)
        return self.op("Mul", [real, self.constant(f"{step}.scale", _along(scale, dimensions))], f"{step}:weight")

    # ------------------------------------------------------------------------------------------------ what enters layers

    def _enter(self, node: Node, step: str, *, plain: bool, up: int = 0) -> str:
        """Write what enters a layer, and return the name of the real tensor.

        Args:
            node: The layer.
            step: The name of its call.
            plain: Whether with a DequantizeLinear; else with operators in which ONNX Runtime doesn't see one.
            up: By how many bits integers are moved up before.
        """
        source = node.inputs[0]
        codes = self.codes.get(node.module)
        if codes is None:
            return self.real_of(source)
        grid = self.of_readers.get(node.name)
        before = source
        while (own := self.graph[before]).kind == "move" and is_own(own.module, node.module):
            before = own.inputs[0]
        made = self._entered(before, codes, grid, f"{step}{INPUT}", plain, up)
        if before != source:
            # What a layer does to its own input moves values, before they are quantized or behind it.
            made = self._entered(source, codes, grid, f"{step}:moved", plain, up)
        return made

    def _entered(self, source: str, codes: Codes, grid: Grid | None, made: str, plain: bool, up: int) -> str:
        """Write a node's result as a layer takes it; see `_enter`."""
        if grid is None and codes.bits == 1:
            return self._signs(source, codes, made, plain, up)
        if grid is None:
            return self._wide(source, codes, made, plain)
        integers = self.integers_of(source, grid)
        if up:
            integers = self.op(
                "BitShift", [integers, self.constant(f"uint8_{up}", up, np.uint8)], f"{made}:up", direction="LEFT"
            )
            grid = dataclasses.replace(grid, scale=grid.scale / 2.0**up, zero=grid.zero << up)
        scale = self.scalar(grid.scale, source)
        return self._real(integers, scale, self.zero(grid), grid.zero, made, plain)

    def _signs(self, source: str, codes: Codes, made: str, plain: bool, up: int) -> str:
        zero = 2 ** (BYTE_BITS - 1)
        positive = self.op("GreaterOrEqual", [self.real_of(source), self.constant("float_0", 0)], f"{made}:sign")
        scale = self.scalar(codes.scale / 2.0**up, made)
        if not plain:
            minus = self.constant(f"{made}:minus", -codes.scale)
            return self.op("Where", [positive, scale, minus], made)
        ends = [self.constant(f"uint8_{zero + sign}", zero + sign, np.uint8) for sign in (2**up, -(2**up))]
        integers = self.op("Where", [positive, *ends], f"{made}:integers")
        return self.op("DequantizeLinear", [integers, scale, self.constant(f"uint8_{zero}", zero, np.uint8)], made)

    def _wide(self, source: str, codes: Codes, made: str, plain: bool) -> str:
        """Write integers of 16 bits.

        ONNX Runtime has no Clip of them. What is clipped before it is divided rounds to the same.
        """
        self.opset, self.ir_version = WIDE_OPSET, WIDE_IR_VERSION
        dtype: np.dtype[Any] = np.dtype(np.uint16)
        if codes.signed:
            dtype = np.dtype(np.int16)
        scale = self.scalar(codes.scale, made)
        zero = self.constant(f"{dtype}_{codes.zero_point}", codes.zero_point, dtype)
        real = self.real_of(source)
        if [bound + codes.zero_point for bound in codes.range] != [np.iinfo(dtype).min, np.iinfo(dtype).max]:
            ends = [np.float32(bound) * np.float32(codes.scale) for bound in codes.range]
            low, high = (self.constant(f"{made}:{end}", value) for end, value in zip(("low", "high"), ends, strict=True))
            real = self.op("Clip", [real, low, high], f"{made}:clipped")
        integers = self.op("QuantizeLinear", [real, scale, zero], f"{made}:integers")
        return self._real(integers, scale, zero, codes.zero_point, made, plain)

    def _real(self, integers: str, scale: str, zero: str, zero_point: int, made: str, plain: bool) -> str:
        """Write the real values of integers, with a DequantizeLinear if it may be seen; see `_enter`."""
        if plain:
            return self.op("DequantizeLinear", [integers, scale, zero], made)
        real = self.op("Cast", [integers], f"{made}:real", to=self.onnx.TensorProto.FLOAT)
        if zero_point:
            real = self.op("Sub", [real, self.constant(f"float_{zero_point}", zero_point)], f"{made}:centred")
        return self.op("Mul", [real, scale], made)


@dataclass(frozen=True)
class _Form:
    """Weights of a layer for integer kernels, moved up by `shift` bits, what enters it by `up`, and the grid of its result."""

    weights: FoldedWeights
    shift: int
    wanted: Grid | None
    up: int = 0

    def rounding(self, codes: Codes) -> float:
        """Return by how much a bias may be rounded, on average: half of what 1 is worth in a channel's sums."""
        return float(np.abs(self.weights.scale).mean()) / 2**self.shift * codes.scale / 2**self.up / 2


def _room(codes: Codes) -> int:
    """Return by how many bits what enters a layer may be moved up in its byte."""
    if codes.bits == 1 and codes.signed:
        return BYTE_BITS - 2
    return BYTE_BITS - codes.bits


def _along(values: Array, dimensions: int) -> Array:
    """Shape one value per output channel to multiply weights."""
    return values.reshape(-1, *[1] * (dimensions - 1))
