"""One layer as an ONNX model: what an exported network has of it, several times side by side.

At 8/8 there are QuantizeLinear and DequantizeLinear around the operator (activations uint8, weights int8 with a scale per
output channel, scales and zero points of activations scalars), from which a runtime makes one integer operator. The zero
point of activations is 0, as behind a ReLU: with another one OpenVINO takes longer where there is padding. Few-bit weights of
linear layers alone are MatMulNBits. In float it is the operator itself.

The copies have weights of their own and one input. All that a runtime does for the whole graph is done once, and is little
beside many copies. What it would do to hand an output out, in another layout of memory than the layers have among themselves,
is avoided: integers are channels last outside, or go as floats do through a pool that looks at one position only.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.tvm_cpu.conv import Conv
from hw_models.widths import FLOAT, pair_words

Pair = tuple[int, int]

INTEGER: Pair = (8, 8)
WHOLE_FLOAT: Pair = (FLOAT, FLOAT)
PACKED_BITS = (2, 4, 8)  # of weights alone: what MatMulNBits takes
BLOCKS = (128, 64, 32, 16)  # weights with one scale in MatMulNBits
VERSION = 2  # of the graphs: what was measured of other ones is not used
OPSET = 21
IR_VERSION = 10  # older than the newest, so that runtimes of the last years take it
MOST_BYTES = 2**31 - 2**20  # of a model: what protobuf can hold, less what isn't weights
X_SCALE = 0.02
X_ZERO = 0  # as behind a ReLU
WEIGHT_SCALE = 0.01


@dataclass(frozen=True)
class Operator:
    """A layer at a pair of widths, `copies` times in one model.

    `form` is "conv", "conv1d" (whose tensors have three dimensions) or "linear".
    """

    conv: Conv
    form: str
    pair: Pair
    copies: int = 1

    def __str__(self) -> str:
        """Name it, as a cache of timings does."""
        sizes = ",".join(str(size).replace(" ", "") for size in astuple(self.conv))
        return f"{self.form} {pair_words(*self.pair)} x{self.copies} {sizes}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy's weights."""
        return weight_bytes(self.conv.taps * self.conv.out_channels, self.pair)

    def model(self, joined: bool = False) -> bytes:
        """Make the ONNX model, serialized.

        Args:
            joined: Whether all copies end in one output, for a runtime in which every output costs some microseconds.

        Returns:
            The bytes of its file.

        Raises:
            ValueError: For weights that no ONNX model without further files can hold.
        """
        if self.weight_bytes * self.copies > MOST_BYTES:
            raise ValueError(f"its weights take {self.weight_bytes * self.copies:,} bytes, more than an ONNX file holds")
        return _Graph(self, joined).model()


def form_of(conv: Conv, linear: bool) -> str:
    """Tell which operator of ONNX a layer becomes.

    An image of one row, and a kernel of one, are a Conv1d's.
    """
    if linear:
        return "linear"
    if conv.kernel[0] == conv.input_size[0] == conv.output_size[0] == 1 and conv.input_size[1] > 1:
        return "conv1d"
    return "conv"


def weight_bytes(weights: int, pair: Pair) -> int:
    """Return the bytes of so many weights at a pair of widths."""
    return -(-weights * pair[0] // 8)


class _Graph:
    """Nodes and constants of a model while it is made."""

    def __init__(self, operator: Operator, joined: bool) -> None:
        import onnx

        self._onnx = onnx
        self._operator = operator
        self._conv = operator.conv
        self._joined = joined
        self._channels_last = operator.pair == INTEGER and operator.form != "linear" and not joined
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._constants: dict[str, NDArray[Any]] = {}

    def model(self) -> bytes:
        onnx = self._onnx
        kind = onnx.TensorProto.FLOAT
        if self._operator.pair == INTEGER:
            kind = onnx.TensorProto.UINT8
            self._constants["x_scale"] = np.array(X_SCALE, np.float32)
            self._constants["x_zero"] = np.array(X_ZERO, np.uint8)
        x = self._begin()
        outputs = [self._copy(x, str(number)) for number in range(self._operator.copies)]
        if self._joined and self._operator.form != "linear":
            # Another reader of the input: OpenVINO would move the strides of 1x1 convolutions in front of what quantizes it,
            # where these are its only readers, and compute them in float. In a network with such a layer they aren't.
            outputs.append(self._end(x, "other"))
        if self._joined:
            outputs = [self._add("Concat", outputs, "y", axis=1)]
        graph = onnx.helper.make_graph(
            self._nodes,
            "layer",
            [onnx.helper.make_tensor_value_info("x", kind, self._input_shape())],
            [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self._constants.items()],
        )
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets)
        model.ir_version = IR_VERSION
        made: bytes = model.SerializeToString()
        return made

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _sizes(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Of an image: height and width, or the width alone."""
        if self._operator.form == "conv1d":
            return size[1:]
        return size

    def _input_shape(self) -> list[int]:
        conv = self._conv
        if self._operator.form == "linear":
            return [conv.input_size[0], conv.in_channels]
        if self._channels_last:
            return [conv.batch, *self._sizes(conv.input_size), conv.in_channels]
        return [conv.batch, conv.in_channels, *self._sizes(conv.input_size)]

    def _begin(self) -> str:
        """Add what all copies share; returns their input."""
        x = "x"
        if self._operator.pair != INTEGER:
            return x
        if self._channels_last:
            last = len(self._input_shape()) - 1
            x = self._add("Transpose", [x], "first", perm=(0, last, *range(1, last)))
        return self._add("DequantizeLinear", [x, "x_scale", "x_zero"], "real")

    def _copy(self, x: str, number: str) -> str:
        """Add one copy of the layer; returns its output."""
        conv = self._conv
        bias = f"bias{number}"
        self._constants[bias] = self._random.uniform(0.5, 1.5, conv.out_channels).astype(np.float32)
        if self._operator.pair not in (INTEGER, WHOLE_FLOAT):
            return self._packed(x, number, bias)
        weight = self._weight(number)
        if self._operator.form == "linear":
            y = self._add("Gemm", [x, weight, bias], f"sum{number}", transB=1)
        else:
            ends = [max(0, end) for end in conv.end_padding]
            y = self._add(
                "Conv",
                [x, weight, bias],
                f"sum{number}",
                kernel_shape=self._sizes(conv.kernel),
                strides=self._sizes(conv.stride),
                pads=(*self._sizes(conv.padding), *self._sizes((ends[0], ends[1]))),
                dilations=self._sizes(conv.dilation),
                group=conv.groups,
            )
        return self._end(y, number)

    def _weight(self, number: str) -> str:
        """Add the weights of a copy, float or dequantized."""
        conv = self._conv
        shape: tuple[int, ...] = (conv.out_channels, conv.in_channels // conv.groups)
        if self._operator.form != "linear":
            shape = (*shape, *self._sizes(conv.kernel))
        name = f"weight{number}"
        if self._operator.pair == WHOLE_FLOAT:
            # Nowhere near zero: denormal numbers are slow.
            self._constants[name] = self._random.uniform(0.5, 1.5, shape).astype(np.float32)
            return name
        self._constants[name] = self._random.integers(-127, 128, shape, np.int8)
        self._constants["weight_scale"] = np.full(conv.out_channels, WEIGHT_SCALE, np.float32)
        self._constants["weight_zero"] = np.zeros(conv.out_channels, np.int8)
        return self._add("DequantizeLinear", [name, "weight_scale", "weight_zero"], f"real_{name}", axis=0)

    def _packed(self, x: str, number: str, bias: str) -> str:
        """Add a linear layer of few-bit weights in blocks, each with a scale, and float activations."""
        conv = self._conv
        bits = self._operator.pair[0]
        block = next((size for size in BLOCKS if conv.in_channels % size == 0), BLOCKS[-1])
        blocks = -(-conv.in_channels // block)
        codes = self._random.integers(0, 256, (conv.out_channels, blocks, block * bits // 8), np.uint8)
        self._constants[f"codes{number}"] = codes
        self._constants[f"scales{number}"] = np.full(conv.out_channels * blocks, WEIGHT_SCALE, np.float32)
        sizes = {"K": conv.in_channels, "N": conv.out_channels, "bits": bits, "block_size": block}
        inputs = [x, f"codes{number}", f"scales{number}"]
        y = self._add("MatMulNBits", inputs, f"product{number}", domain="com.microsoft", **sizes)
        return self._add("Add", [y, bias], f"y{number}")

    def _end(self, y: str, number: str) -> str:
        """Hand the output out as the next layer would take it."""
        if self._operator.pair == INTEGER:
            y = self._add("QuantizeLinear", [y, "x_scale", "x_zero"], f"quantized{number}")
        if self._operator.form == "linear":
            return y
        if self._channels_last:
            last = len(self._input_shape()) - 1
            return self._add("Transpose", [y], f"y{number}", perm=(0, *range(2, last + 1), 1))
        # As far apart as the image is large, so one position is left.
        (height, width), (out_height, out_width) = self._conv.input_size, self._conv.output_size
        size = self._sizes((max(height, out_height), max(width, out_width)))
        return self._add("MaxPool", [y], f"y{number}", kernel_shape=[1] * len(size), strides=size)
