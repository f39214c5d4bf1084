"""What a quantized network computes, as a flat list of named operations: what every deployment starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F

import quantizers as Q
from hw_models.workload import Size, end_padding
from quantizers import graph as captured

Shape = tuple[int, int, int]

# Operations of torch by what they become. A trailing underscore, in place, is taken off before.
KINDS = {
    "conv2d": "conv",
    "linear": "linear",
    "batch_norm": "batch_norm",
    "relu": "relu",
    "relu6": "clamp",
    "hardtanh": "clamp",
    "clamp": "clamp",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "add": "add",
    "max_pool2d": "max_pool",
    "avg_pool2d": "avg_pool",
    "adaptive_avg_pool2d": "avg_pool",
    "mean": "avg_pool",
    "flatten": "flatten",
    "reshape": "flatten",
    "view": "flatten",
    "squeeze": "flatten",
}
NOTHING = {"dropout", "feature_dropout", "alpha_dropout", "detach", "alias", "clone", "contiguous", "to"}
DEPLOYABLE = (
    "Conv2d and Linear, batch norms, ReLU, ReLU6, Hardtanh and clamp, addition of two maps of one shape, max and average "
    "pooling (adaptive where the sizes divide, mean over height and width), flatten, dropout and identity"
)


@dataclass(frozen=True)
class Window:
    """Where a convolution or pooling looks.

    `padding` is that of the top and left; at the bottom and right there is as much as the output's size needs.
    """

    kernel: Size
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1

    def end_padding(self, input_size: Size, output_size: Size) -> Size:
        """Return the padding at the bottom and right; negative where the last rows or columns aren't looked at."""
        return end_padding(self.kernel, self.stride, self.padding, self.dilation, input_size, output_size)

    def padded(self, x: Tensor, output_size: Size, value: float) -> Tensor:
        """Put this padding around images (N, C, H, W), and cut off what isn't looked at.

        Args:
            x: The images.
            output_size: Height and width of what is computed.
            value: What the padding holds.

        Returns:
            The padded images.
        """
        height, width = x.shape[2:]
        bottom, right = self.end_padding((height, width), output_size)
        return F.pad(x, (self.padding[1], right, self.padding[0], bottom), value=value)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. `shape` is that of its result for one image, (height, width, channels); a vector's is (1, 1, channels).

    kind        "input", "conv", "linear", "batch_norm", "relu", "clamp", "add", "max_pool", "avg_pool", "flatten", "output"
    inputs      names of the nodes whose results it takes
    module      the dotted name of the module it is in; of a convolution or linear layer: of that layer
    window      of convolutions and poolings
    scale, shift   of a batch norm: y = x scale + shift, per channel
    low, high   of a clamp (of a ReLU: 0 and infinity)
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: Shape
    module: str = ""
    window: Window | None = None
    scale: NDArray[np.float64] | None = None
    shift: NDArray[np.float64] | None = None
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed: the first is the input, the last the output."""

    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Node:
        """Return the node of a name."""
        return next(node for node in self.nodes if node.name == name)

    @property
    def layers(self) -> tuple[str, ...]:
        """The convolutions and linear layers by name, in the order of their first call."""
        return tuple(dict.fromkeys(node.module for node in self.nodes if node.kind in ("conv", "linear")))


@torch.no_grad()
def capture(network: nn.Module, example: Tensor) -> Graph:
    """List the operations of a network that `quantizers.quantize` made, in evaluation mode.

    Args:
        network: The quantized network.
        example: Images (N, C, H, W); the graph is for one like the first.

    Returns:
        The graph.

    Raises:
        ValueError: Naming the module and the operation, for what can't be deployed, and for a network whose operations depend
            on the values of its input; and without images, or for NaN or infinity in them.
    """
    if not len(example):
        raise ValueError("a network is deployed with images, and there are none")
    finite = example.reshape(len(example), -1).isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"a network is deployed with images of finite numbers; image {int(finite.int().argmin())} has NaN or infinity"
        )
    plain: Any = Q.float_copy(network, keep_residuals=True).eval()
    image = example[:1].clone()
    expected = plain(image.clone())
    try:
        exported = torch.export.export(plain, (image,))
    except Exception as error:
        # Whatever in a network torch can't follow shows as one of many kinds of errors.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{type(network).__name__} can't be deployed: torch can't write down what it does ({reason})"
        ) from error
    graph = _Reader(plain, exported, tuple(Q.quant_layers(network))).read()
    layers = {name: plain.get_submodule(name) for name in graph.layers}
    *_, (_, result) = evaluate(graph, layers, image)
    if not torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max().clamp_min(1e-6))):
        worst = float((result - expected).abs().max())
        raise ValueError(
            f"{type(network).__name__} can't be deployed: its operations one by one give something else, by up to {worst:.3g};"
            " does it change a tensor in place that it uses again?"
        )
    return graph


def evaluate(graph: Graph, layers: Mapping[str, nn.Module], images: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """Compute a graph, node by node.

    Args:
        graph: The graph.
        layers: What computes the convolutions and linear layers, by name.
        images: Images (N, C, H, W).

    Yields:
        Each node with its result.
    """
    results: dict[str, Tensor] = {}
    for node in graph.nodes:
        x = results[node.inputs[0]] if node.inputs else images
        size = node.shape[:2]
        if node.kind in ("conv", "linear"):
            x = layers[node.module](x)
        elif node.kind == "batch_norm":
            x = x * _along_channels(node.scale, x) + _along_channels(node.shift, x)
        elif node.kind in ("relu", "clamp"):
            x = x.clamp(node.low, node.high)
        elif node.kind == "add":
            x = x + results[node.inputs[1]]
        elif node.kind == "max_pool":
            x = max_pool(x, node.window, size)
        elif node.kind == "avg_pool":
            assert node.window is not None
            x = sum_pool(x, node.window, size) / math.prod(node.window.kernel)
        elif node.kind == "flatten":
            x = x.reshape(len(x), -1)
        results[node.name] = x
        yield node, x


def _along_channels(values: Any, x: Tensor) -> Tensor:
    """Shape one value per channel to broadcast against maps or vectors."""
    return torch.tensor(values, dtype=x.dtype).view(-1, *[1] * (x.dim() - 2))


def max_pool(x: Tensor, window: Window | None, output_size: Size) -> Tensor:
    """Return the largest value in each window; padding is never the largest.

    Args:
        x: Values (N, C, H, W).
        window: Where it is laid; None is over everything.
        output_size: Height and width of the result.

    Returns:
        Values (N, C, *output_size).
    """
    assert window is not None
    x = window.padded(x, output_size, -math.inf)
    return F.max_pool2d(x, window.kernel, window.stride, dilation=window.dilation)


def sum_pool(x: Tensor, window: Window, output_size: Size) -> Tensor:
    """Return the sum of each window; padding is zero.

    Args:
        x: Values (N, C, H, W).
        window: Where it is laid.
        output_size: Height and width of the result.

    Returns:
        Values (N, C, *output_size).
    """
    return F.avg_pool2d(window.padded(x, output_size, 0.0), window.kernel, window.stride, divisor_override=1)


class _Reader:
    """Reads nodes off what torch.export made of the float network."""

    def __init__(self, network: nn.Module, exported: Any, layers: tuple[str, ...]) -> None:
        self.exported = exported
        signature = exported.graph_signature
        targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
        self.constants = {name: tensors[target] for name, target in targets.items() if target in tensors}
        self.layers = {name: network.get_submodule(name) for name in layers}
        self.nodes: dict[str, Node] = {}
        self.names: dict[fx.Node, str] = {}  # the node that holds a tensor's present value
        self.pads: dict[fx.Node, tuple[int, ...]] = {}  # zeros put around a convolution's input: left, right, top, bottom

    def read(self) -> Graph:
        images = set(self.exported.graph_signature.user_inputs)
        for operation in self.exported.graph.nodes:
            if operation.op == "placeholder":
                if operation.name in images:
                    self._hold(operation, Node("input", "input", (), _shape(operation)))
            elif operation.op == "output":
                results = operation.args[0]
                if len(results) != 1 or not isinstance(results[0], fx.Node):
                    raise ValueError(f"a network with {len(results)} outputs can't be deployed: it must return one tensor")
                source = self.nodes[self.names[results[0]]]
                self.nodes["output"] = Node("output", "output", (source.name,), source.shape)
            elif operation.op != "call_function" or not isinstance(operation.target, torch._ops.OpOverload):
                raise self._refusal(operation)
            else:
                self._read(operation)
        return Graph(tuple(self.nodes.values()))

    def _read(self, operation: fx.Node) -> None:
        target: Any = operation.target
        base = _base(operation)
        in_place = target._schema.name.endswith("_")
        arguments = captured.arguments(operation)
        source = next(iter(operation.args), None)
        if base in NOTHING and isinstance(source, fx.Node) and source.meta["val"].dtype == operation.meta["val"].dtype:
            self.names[operation] = self._name(operation, source)
            return
        if base in ("pad", "constant_pad_nd") and all(KINDS.get(_base(user)) == "conv" for user in operation.users):
            self._read_pad(operation, source, arguments)
            return
        if base not in KINDS:
            raise self._refusal(operation)
        before = self._name(operation, source)
        read = getattr(self, f"_read_{KINDS[base]}")
        name = operation.name
        fields: dict[str, Any] = {"inputs": (before,), "module": captured.module_of(operation)[0]}
        fields |= read(operation, arguments)
        self._hold(operation, Node(name, KINDS[base], shape=_shape(operation), **fields))
        if base == "mean" and not arguments["keepdim"]:
            flat = Node(f"{name}_flat", "flatten", (name,), _shape(operation), fields["module"])
            self._hold(operation, flat)
        if in_place:
            # Whoever looks at the changed tensor from here on, looks at the result.
            for tensor, held in self.names.items():
                if held == before:
                    self.names[tensor] = name

    def _read_pad(self, operation: fx.Node, source: Any, arguments: dict[str, Any]) -> None:
        """Keep the zeros that are put around a map for the convolution that reads it."""
        self.names[operation] = self._name(operation, source)
        self.pads[operation] = tuple(arguments["pad"])
        if len(arguments["pad"]) != 4 or arguments.get("mode", "constant") != "constant" or arguments["value"]:
            raise self._refusal(operation, "other than with zeros, of height and width")

    def _hold(self, operation: fx.Node, node: Node) -> None:
        self.nodes[node.name] = node
        self.names[operation] = node.name

    def _name(self, operation: fx.Node, tensor: Any) -> str:
        if not isinstance(tensor, fx.Node) or tensor not in self.names:
            raise self._refusal(operation, "of a constant or a parameter")
        return self.names[tensor]

    def _refusal(self, operation: fx.Node, why: str = "") -> ValueError:
        module, kind = captured.module_of(operation)
        where = "the network"
        if module:
            where = f"layer {module!r} ({kind})"
        what = str(operation.target).rpartition(".")[0] or str(operation.target)
        return ValueError(f"{where} can't be deployed: operation {f'{what} {why}'.strip()}; deployable are {DEPLOYABLE}")

    def _layer(self, operation: fx.Node, weight: Any) -> str:
        tensor = None
        if isinstance(weight, fx.Node):
            tensor = self.constants.get(weight.name)
        names = [name for name, layer in self.layers.items() if layer.weight is tensor]
        if len(names) > 1:  # layers that share one weight
            names = [name for name in names if name == captured.module_of(operation)[0]]
        if len(names) != 1:
            raise self._refusal(operation, "with a weight that is no quantized layer's own")
        return names[0]

    def _read_conv(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        module = self._layer(operation, given["weight"])
        kernel = _pair(given["weight"].meta["val"].shape[2:])
        padding = given["padding"]
        dilation = _pair(given["dilation"])
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        elif padding == "valid":
            padding = 0
        top, left = _pair(padding)
        if given["input"] in self.pads:
            # What a layer does to its own input, it does when it is quantized already, and zeros are zeros then.
            if not f"{captured.module_of(given['input'])[0]}.".startswith(f"{module}."):
                raise self._refusal(given["input"], "in another place than in the layer that it is for")
            pads = self.pads[given["input"]]
            left += pads[0]
            top += pads[2]
        window = Window(kernel, _pair(given["stride"]), (top, left), dilation, given["groups"])
        return {"module": module, "window": window}

    def _read_linear(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        if given["input"].meta["val"].dim() != 2:
            raise self._refusal(operation, f"on {given['input'].meta['val'].dim()} dimensions instead of 2")
        return {"module": self._layer(operation, given["weight"])}

    def _read_batch_norm(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        if given["training"] or given["running_mean"] is None:
            raise self._refusal(operation, "with the statistics of each batch")
        of = [given[key] for key in ("running_mean", "running_var", "weight", "bias")]
        if any(tensor is not None and getattr(tensor, "name", None) not in self.constants for tensor in of):
            raise self._refusal(operation, "with parameters that are computed")
        mean = self.constants[given["running_mean"].name].double()
        var = self.constants[given["running_var"].name].double()
        scale = (var + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * self.constants[given["weight"].name].double()
        shift = 0 - mean * scale
        if given["bias"] is not None:
            shift = self.constants[given["bias"].name].double() - mean * scale
        return {"scale": scale.numpy(), "shift": shift.numpy()}

    def _read_relu(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        return {"low": 0.0}

    def _read_clamp(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        if "relu6" in str(operation.target):
            return {"low": 0.0, "high": 6.0}
        low, high = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
        if isinstance(low, fx.Node) or isinstance(high, fx.Node):
            raise self._refusal(operation, "with bounds that are tensors")
        bounds = {}
        if low is not None:
            bounds["low"] = float(low)
        if high is not None:
            bounds["high"] = float(high)
        return bounds

    def _read_add(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        inputs = self._name(operation, given["self"]), self._name(operation, given["other"])
        if given["alpha"] != 1:
            raise self._refusal(operation, f"with factor {given['alpha']}")
        shapes = [tensor.meta["val"].shape for tensor in (given["self"], given["other"])]
        if shapes[0] != shapes[1]:
            raise self._refusal(operation, f"of shapes {tuple(shapes[0])} and {tuple(shapes[1])}")
        return {"inputs": inputs}

    def _read_max_pool(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        stride = given["stride"] or given["kernel_size"]
        window = Window(_pair(given["kernel_size"]), _pair(stride), _pair(given["padding"]), _pair(given["dilation"]))
        return {"window": window}

    def _read_avg_pool(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        _, _, height, width = _four(given["self"])
        result = operation.meta["val"].shape
        if "mean" in str(operation.target):
            if sorted(dim % 4 for dim in given["dim"] or ()) != [2, 3] or given["dtype"] is not None:
                raise self._refusal(operation, "over other dimensions than height and width")
            return {"window": Window((height, width), (height, width))}
        if "adaptive" in str(operation.target):
            if height % result[2] or width % result[3]:
                raise self._refusal(operation, f"from {height}x{width} to {result[2]}x{result[3]}, which doesn't divide")
            kernel = height // result[2], width // result[3]
            return {"window": Window(kernel, kernel)}
        stride = given["stride"] or given["kernel_size"]
        window = Window(_pair(given["kernel_size"]), _pair(stride), _pair(given["padding"]))
        padded = max(window.padding) > 0 and not given["count_include_pad"]
        ends = zip(window.end_padding((height, width), (result[2], result[3])), window.padding, strict=True)
        if padded or any(end > start for end, start in ends) or given["divisor_override"] is not None:
            raise self._refusal(operation, "with another divisor than the window's size")
        return {"window": window}

    def _read_flatten(self, operation: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        before, after = given["self"].meta["val"].shape, operation.meta["val"].shape
        single = all(size == 1 for size in (*before[2:], *after[2:])) and before[1] == after[1]
        if before[0] != after[0] or not (len(after) == 2 or (single and len(after) <= len(before))):
            raise self._refusal(operation, f"from {tuple(before)} to {tuple(after)}")
        return {}


def _base(operation: fx.Node) -> str:
    """Return the name of an operation, without the underscore of one in place."""
    schema = getattr(operation.target, "_schema", None)
    if not schema:
        return ""
    name: str = schema.name
    return name.removeprefix("aten::").removesuffix("_")


def _four(tensor: fx.Node) -> tuple[int, int, int, int]:
    count, channels, height, width = (*tensor.meta["val"].shape, 1, 1)[:4]
    return count, channels, height, width


def _shape(operation: fx.Node) -> Shape:
    _, channels, height, width = _four(operation)
    return height, width, channels


def _pair(size: Any) -> Size:
    if isinstance(size, int):
        return size, size
    return int(size[0]), int(size[-1])
