"""What every flavour of ONNX file writes in the same way: constants, and a graph's operations in float."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import quantizers as Q
from haq.deployment.graph import Graph, Node
from haq.deployment.onnx_any import package
from haq.deployment.onnx_functions import write_function
from haq.deployment.onnx_moves import write_move
from haq.deployment.windows import bilinear_taps

# Old enough for every ONNX Runtime since 2022: DequantizeLinear per channel is of opset 13.
OPSET = 17
IR_VERSION = 8

Array = NDArray[Any]


class GraphWriter:
    """Writes ONNX nodes for those of a graph. A tensor has the name of the graph's node that makes it.

    Attributes:
        layers: The quantized layers by name.
        shapes: Of the graph's nodes: (height, width, channels).
        dims: Of the graph's nodes: torch's shape for one image.
        nodes: What was written.
        constants: The file's initializers, by name.
    """

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        """Have written nothing."""
        self.onnx = package("onnx")
        self.graph = graph
        self.layers = Q.quant_layers(network)
        self.shapes = {node.name: node.shape for node in graph.nodes}
        self.dims = {node.name: node.dims for node in graph.nodes}
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.calls: dict[str, int] = {}
        self.opset, self.ir_version = OPSET, IR_VERSION

    def layer(self, node: Node) -> None:
        """Write a convolution or linear layer."""
        raise NotImplementedError

    def model(self, batch: int | str, further: tuple[Any, ...] = ()) -> Any:
        """Write everything.

        Args:
            batch: The number of images, or the name of any number.
            further: Operator sets beside onnx's own.

        Returns:
            onnx's ModelProto.
        """
        for node in self.graph.nodes[1:]:
            with torch.no_grad():
                self.write(node)
        return self.assemble(batch, further)

    def assemble(self, batch: int | str, further: tuple[Any, ...] = ()) -> Any:
        """Put what was written into onnx's ModelProto; see `model`."""
        helper = self.onnx.helper
        first, *_, last = self.graph.nodes
        graph = helper.make_graph(
            self.nodes,
            "haq",
            [self._value("input", batch, first)],
            [self._value("output", batch, last)],
            [self.onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset), *further]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="haq")

    def _value(self, name: str, batch: int | str, node: Node) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, [batch, *node.dims[1:]])

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Write a node.

        Args:
            kind: The operator.
            inputs: The names of what it reads.
            output: The name of what it makes, and of the node.
            attributes: The operator's.

        Returns:
            `output`.
        """
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Write a constant.

        Args:
            name: The name of the initializer.
            value: Numbers; a number alone becomes a tensor of no dimensions.
            dtype: Its type in the file.

        Returns:
            The name.
        """
        self.constants[name] = np.asarray(value, dtype, order="C")
        return name

    def integers(self, *values: int) -> str:
        """Write whole numbers that operators take as shapes, axes and the like; the same ones are written once."""
        return self.constant(f"int64_{'_'.join(map(str, values))}", values, np.int64)

    def write(self, node: Node) -> None:
        """Write what a node of the graph computes."""
        inputs = list(node.inputs)
        if node.kind in ("conv", "linear"):
            self.layer(node)
        elif node.kind in ("add", "mul"):
            self.op(node.kind.capitalize(), inputs, node.name)
        elif node.kind == "flatten":
            self.op("Flatten", inputs, node.name)
        elif node.kind == "output":
            self.op("Identity", inputs, "output")
        else:
            getattr(self, f"_write_{node.kind}")(node, inputs)

    def _write_batch_norm(self, node: Node, inputs: list[str]) -> None:
        assert node.scale is not None
        values = {"scale": node.scale, "shift": node.shift, "mean": 0 * node.scale, "variance": 0 * node.scale + 1}
        inputs += [self.constant(f"{node.name}:{key}", value) for key, value in values.items()]
        self.op("BatchNormalization", inputs, node.name, epsilon=0.0)

    def _write_relu(self, node: Node, inputs: list[str]) -> None:
        if (node.low, node.high) == (0, math.inf):
            self.op("Relu", inputs, node.name)
        else:
            self._write_clamp(node, inputs)

    def _write_clamp(self, node: Node, inputs: list[str]) -> None:
        bounds = {"low": node.low, "high": node.high}
        inputs += [self.constant(f"{node.name}:{key}", bound) for key, bound in bounds.items()]
        self.op("Clip", inputs, node.name)

    def _write_prelu(self, node: Node, inputs: list[str]) -> None:
        assert node.scale is not None
        if (node.scale == node.scale[0]).all():
            self.op("LeakyRelu", inputs, node.name, alpha=float(node.scale[0]))
            return
        slope = node.scale.reshape(-1, *[1] * (len(node.dims) - 2))
        self.op("PRelu", [*inputs, self.constant(f"{node.name}:slope", slope)], node.name)

    def _write_function(self, node: Node, inputs: list[str]) -> None:
        write_function(self, node, inputs[0])

    def _write_move(self, node: Node, inputs: list[str]) -> None:
        write_move(self, node, inputs, node.name)

    def _write_max_pool(self, node: Node, inputs: list[str]) -> None:
        self.op("MaxPool", inputs, node.name, **self.window(node))

    def _write_avg_pool(self, node: Node, inputs: list[str]) -> None:
        if node.ranges is not None:
            self._write_ranges(node, inputs[0])
            return
        window = self.window(node)
        del window["dilations"]
        self.op("AveragePool", inputs, node.name, count_include_pad=1, **window)

    def _write_ranges(self, node: Node, source: str) -> None:
        """Write sums over ranges of rows and columns, as products with matrices of zeros and ones."""
        ranges = node.ranges
        assert ranges is not None
        height, width = self.shapes[node.inputs[0]][:2]
        across = _taken(ranges.columns, width).T
        made = self.op("MatMul", [source, self.constant(f"{node.name}:columns", across)], f"{node.name}:across")
        factors = 1 / ranges.divisors
        if len(node.dims) == 4:
            down = self.constant(f"{node.name}:rows", _taken(ranges.rows, height))
            made = self.op("MatMul", [down, made], f"{node.name}:sums")
        else:
            factors = factors[0]
        self.op("Mul", [made, self.constant(f"{node.name}:factors", factors)], node.name)

    def _write_resize(self, node: Node, inputs: list[str]) -> None:
        """Write a bilinear interpolation."""
        assert node.rows is not None
        assert node.columns is not None
        size = self.shapes[node.inputs[0]][:2]
        align = bool(node.arguments.get("align_corners"))
        plain = True
        scales = [1.0, 1.0]
        for before, taps, rank in zip(size, (node.rows, node.columns), (4, 3), strict=True):
            outputs = len(taps.first)
            usual = bilinear_taps(before, outputs, align_corners=align, scale=None)
            plain &= np.allclose(usual.first + usual.weight, taps.first + taps.weight, atol=1e-6)
            if len(node.dims) >= rank:
                scales.append(outputs / before)
                plain &= math.floor(before * np.float32(outputs / before)) == outputs
        if plain:
            mode = "half_pixel"
            if align:
                mode = "align_corners"
            factors = self.constant(f"{node.name}:scales", scales)
            self.op("Resize", [*inputs, "", factors], node.name, mode="linear", coordinate_transformation_mode=mode)
            return
        across = self.constant(f"{node.name}:columns", _weights(node.columns, size[1]).T)
        if len(node.dims) == 3:
            self.op("MatMul", [*inputs, across], node.name)
            return
        made = self.op("MatMul", [*inputs, across], f"{node.name}:across")
        self.op("MatMul", [self.constant(f"{node.name}:rows", _weights(node.rows, size[0])), made], node.name)

    def _write_quantize(self, node: Node, inputs: list[str]) -> None:
        dtype: np.dtype[Any] = np.dtype("uint8")
        if node.low < 0:
            dtype = np.dtype("int8")
        scale = self.constant(f"{node.name}:scale", node.scale)
        zero = self.constant(f"zero_{dtype}_{node.zero_point}", node.zero_point, dtype)
        made = self.op("QuantizeLinear", [*inputs, scale, zero], f"{node.name}:integers")
        if (node.low, node.high) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
            bounds = [self.constant(f"{dtype}_{int(bound)}", bound, dtype) for bound in (node.low, node.high)]
            made = self.op("Clip", [made, *bounds], f"{node.name}:clipped")
        self.op("DequantizeLinear", [made, scale, zero], node.name)

    def window(self, node: Node) -> dict[str, Any]:
        """Return the attributes of a convolution or pooling."""
        window = node.window
        assert window is not None
        ends = window.end_padding(self.shapes[node.inputs[0]][:2], node.shape[:2])
        rank = len(node.dims) - 2  # 1 for signals, whose windows have a height of 1
        return {
            "kernel_shape": window.kernel[-rank:],
            "strides": window.stride[-rank:],
            # Rows that aren't looked at at the end need no cutting off: ONNX rounds sizes down.
            "pads": (*window.padding[-rank:], *(max(0, end) for end in ends[-rank:])),
            "dilations": window.dilation[-rank:],
        }

    def is_global(self, node: Node) -> bool:
        """Tell whether a pooling is over the whole map."""
        if node.window is None:
            return False
        whole = node.window.kernel == self.shapes[node.inputs[0]][:2]
        return whole and node.shape[:2] == (1, 1) and node.window.padding == (0, 0)

    def call(self, module: str) -> str:
        """Name a call of a layer: by the layer's name, and name@2 at its second call."""
        self.calls[module] = self.calls.get(module, 0) + 1
        if self.calls[module] > 1:
            return f"{module}@{self.calls[module]}"
        return module


def _taken(ranges: NDArray[np.int32], size: int) -> Array:
    """Return which places each range takes, (ranges, size), 0 or 1."""
    place = np.arange(size)
    return (place >= ranges[:, :1]) & (place < ranges[:, 1:])


def _weights(taps: Any, size: int) -> Array:
    """Return how much of each place goes into each output, (outputs, size)."""
    made = np.zeros((len(taps.first), size))
    outputs = np.arange(len(made))
    np.add.at(made, (outputs, taps.first), 1 - taps.weight)
    np.add.at(made, (outputs, taps.second), taps.weight)
    return made
