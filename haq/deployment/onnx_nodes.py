"""What every flavour of ONNX file writes in the same way: constants, and a graph's operations in float."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import quantizers as Q
from haq.deployment.graph import Graph, Node, Shape
from haq.deployment.onnx_any import package

# Old enough for every ONNX Runtime since 2022: DequantizeLinear per channel is of opset 13.
OPSET = 17
IR_VERSION = 8

Array = NDArray[Any]


class GraphWriter:
    """Writes ONNX nodes for those of a graph. A tensor has the name of the graph's node that makes it.

    Attributes:
        layers: The quantized layers by name.
        shapes: Of the graph's nodes: (height, width, channels).
        nodes: What was written.
        constants: The file's initializers, by name.
    """

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        """Have written nothing."""
        self.onnx = package("onnx")
        self.graph = graph
        self.layers = Q.quant_layers(network)
        self.shapes = {node.name: node.shape for node in graph.nodes}
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
        helper = self.onnx.helper
        first, *_, last = self.graph.nodes
        for node in self.graph.nodes[1:]:
            with torch.no_grad():
                self.write(node)
        kinds = {node.kind for node in self.graph.nodes}
        graph = helper.make_graph(
            self.nodes,
            "haq",
            [self._value("input", batch, first.shape, vector=not kinds & {"conv", "max_pool", "avg_pool"})],
            [self._value("output", batch, last.shape, vector=bool(kinds & {"linear", "flatten"}))],
            [self.onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset), *further]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="haq")

    def _value(self, name: str, batch: int | str, shape: Shape, vector: bool) -> Any:
        height, width, channels = shape
        size: list[Any] = [batch, channels]
        if not vector or (height, width) != (1, 1):
            size += [height, width]
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, size)

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

    def write(self, node: Node) -> None:
        """Write what a node of the graph computes."""
        name, inputs = node.name, list(node.inputs)
        if node.kind in ("conv", "linear"):
            self.layer(node)
        elif node.kind == "batch_norm":
            assert node.scale is not None
            values = {"scale": node.scale, "shift": node.shift, "mean": 0 * node.scale, "variance": 0 * node.scale + 1}
            inputs += [self.constant(f"{name}:{key}", value) for key, value in values.items()]
            self.op("BatchNormalization", inputs, name, epsilon=0.0)
        elif node.kind in ("relu", "clamp"):
            if (node.low, node.high) == (0, math.inf):
                self.op("Relu", inputs, name)
                return
            bounds = {"low": node.low, "high": node.high}
            self.op("Clip", inputs + [self.constant(f"{name}:{key}", bound) for key, bound in bounds.items()], name)
        elif node.kind == "add":
            self.op("Add", inputs, name)
        elif node.kind == "max_pool":
            self.op("MaxPool", inputs, name, **self.window(node))
        elif node.kind == "avg_pool":
            window = self.window(node)
            del window["dilations"]
            self.op("AveragePool", inputs, name, count_include_pad=1, **window)
        elif node.kind == "flatten":
            self.op("Flatten", inputs, name)
        else:
            self.op("Identity", inputs, "output")

    def window(self, node: Node) -> dict[str, Any]:
        """Return the attributes of a convolution or pooling."""
        window = node.window
        assert window is not None
        ends = window.end_padding(self.shapes[node.inputs[0]][:2], node.shape[:2])
        return {
            "kernel_shape": window.kernel,
            "strides": window.stride,
            # Rows that aren't looked at at the end need no cutting off: ONNX rounds sizes down.
            "pads": (*window.padding, *(max(0, end) for end in ends)),
            "dilations": window.dilation,
        }

    def call(self, module: str) -> str:
        """Name a call of a layer: by the layer's name, and name@2 at its second call."""
        self.calls[module] = self.calls.get(module, 0) + 1
        if self.calls[module] > 1:
            return f"{module}@{self.calls[module]}"
        return module
