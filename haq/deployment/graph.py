"""What a quantized network computes, as a flat list of named operations: what every deployment starts from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

import quantizers as Q
from haq.deployment import moves
from haq.deployment.functions import name_functions
from haq.deployment.nodes import Graph, Node, Ranges, Shape, Taps, Window, evaluate, is_own, max_pool, shape_of, sum_pool
from haq.deployment.windows import adaptive_ranges, bilinear_taps, window_ranges
from hw_models.workload import Size
from quantizers import graph as captured

__all__ = ["Graph", "Node", "Ranges", "Shape", "Taps", "Window", "capture", "evaluate", "max_pool", "sum_pool"]

# Operations of torch by what they become. A trailing underscore, in place, is taken off before.
KINDS = {
    **dict.fromkeys(("conv1d", "conv2d"), "conv"),
    "linear": "linear",
    "batch_norm": "batch_norm",
    "relu": "relu",
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), "clamp"),
    **dict.fromkeys(("prelu", "leaky_relu"), "prelu"),
    **dict.fromkeys(("add", "sub", "rsub"), "add"),
    **dict.fromkeys(("mul", "div"), "mul"),
    "neg": "neg",
    **dict.fromkeys(("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax"), "max_pool"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"), "avg_pool"),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_linear1d"), "resize"),
    **dict.fromkeys(("fake_quantize_per_tensor_affine",), "quantize"),
}
# Functions of each value. Sharp bends and jumps lie on the grid of `haq.deployment.tables`, or are refused there.
FUNCTIONS = {"silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "gelu", "elu", "selu", "celu", "mish", "softplus"}
FUNCTIONS |= {"log_sigmoid", "erf", "exp", "expm1", "log1p", "abs", "square", "sqrt", "rsqrt", "reciprocal", "pow", "sin"}
FUNCTIONS |= {"cos", "atan", "sinh", "cosh", "asinh", "hardshrink", "softshrink", "threshold", "log"}
NOTHING = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "detach", "alias", "clone", "contiguous"}
NOTHING |= {"to", "_to_copy", "lift_fresh_copy"}
SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
DEPLOYABLE = (
    "Conv2d, Conv1d and Linear, batch norms, sums and products with numbers or a constant per channel, activations (ReLU, "
    "ReLU6, clamp, PReLU, SiLU, Hardswish, GELU, sigmoid, tanh and other functions of each value), sums and products of two "
    "maps, max and average pooling, mean over height and width, bilinear and nearest interpolation, concatenation, splits, "
    "reshapes, permutations, shuffles, padding and whatever else moves values, flatten, dropout and identity"
)


@torch.no_grad()
def capture(network: nn.Module, example: Tensor) -> Graph:
    """List the operations of a network that `quantizers.quantize` made, in evaluation mode.

    Args:
        network: The quantized network.
        example: Images (N, C, H, W), or signals (N, C, L) or vectors; the graph is for one like the first.

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
    graph = name_functions(_Reader(plain, exported, tuple(Q.quant_layers(network))).read())
    if isinstance(expected, Tensor) and not expected.isfinite().all():
        raise ValueError(
            f"{type(network).__name__} can't be deployed: it gives NaN or infinity for the first image, and what is written"
            " is compared with it by its outputs; leave out what makes them so, such as a logarithm behind the last layer"
        )
    layers = {name: plain.get_submodule(name) for name in graph.layers}
    worst = _difference(graph, layers, image, expected)
    if worst and any(node.kind == "quantize" for node in graph.nodes):
        # At a tie, quantizers between layers round to other integers for the last digit of float32.
        unquantized = _without_quantizers(graph)
        worst = _difference(unquantized, layers, image, Q.float_copy(network).eval()(image.clone()))
    if worst:
        raise ValueError(
            f"{type(network).__name__} can't be deployed: its operations one by one give something else, by up to {worst:.3g};"
            " does it change a tensor in place that it uses again?"
        )
    return graph


def _difference(graph: Graph, layers: dict[str, nn.Module], image: Tensor, expected: Tensor) -> float:
    """Return by how much a graph's result is another one; 0 where it is only by rounding."""
    *_, (_, result) = evaluate(graph, layers, image)
    if torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max().clamp_min(1e-6))):
        return 0.0
    return float((result - expected).abs().max())


def _without_quantizers(graph: Graph) -> Graph:
    """Return a graph whose quantizers between layers do nothing."""
    nodes = []
    for node in graph.nodes:
        if node.kind == "quantize":
            node = replace(node, kind="clamp", low=-math.inf, high=math.inf)
        nodes.append(node)
    return Graph(tuple(nodes))


class _Reader:
    """Reads nodes off what torch.export made of the float network."""

    def __init__(self, network: nn.Module, exported: Any, layers: tuple[str, ...]) -> None:
        self.exported = exported
        signature = exported.graph_signature
        tensors = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
        tensors |= exported.constants
        targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        targets |= signature.inputs_to_lifted_tensor_constants
        self.of_inputs = {name: tensors[target] for name, target in targets.items() if target in tensors}
        self.layers = {name: network.get_submodule(name) for name in layers}
        self.constants: dict[fx.Node, Tensor] = {}  # parameters, and what is computed of nothing else
        self.nodes: dict[str, Node] = {}
        self.names: dict[fx.Node, str] = {}  # the node that holds a tensor's present value
        self.several: dict[fx.Node, Any] = {}  # the labels of the results of an operation that gives a list
        self.pads: dict[fx.Node, tuple[int, ...]] = {}  # zeros put around a convolution's input: left, right, top, bottom

    def read(self) -> Graph:
        images = set(self.exported.graph_signature.user_inputs)
        for operation in self.exported.graph.nodes:
            if operation.op == "placeholder":
                if operation.name in images:
                    self._hold(operation, "input", "input", ())
                elif operation.name in self.of_inputs:
                    self.constants[operation] = self.of_inputs[operation.name]
            elif operation.op == "output":
                self._read_output(operation)
            elif operation.op == "call_function" and captured.base_name(operation) == "getitem":
                self._read_item(operation)
            elif operation.op != "call_function" or not isinstance(operation.target, torch._ops.OpOverload):
                raise self._refusal(operation)
            else:
                self._read(operation)
        return Graph(tuple(self.nodes.values()))

    def _read_output(self, operation: fx.Node) -> None:
        results: Any = operation.args[0]
        if len(results) != 1 or not isinstance(results[0], fx.Node):
            raise ValueError(f"a network with {len(results)} outputs can't be deployed: it must return one tensor")
        source = self.nodes[self._map(operation, results[0])]
        self.nodes["output"] = Node("output", "output", (source.name,), source.shape, dims=source.dims)

    def _read(self, operation: fx.Node) -> None:
        base = captured.base_name(operation)
        held = [node for node in operation.all_input_nodes if node not in self.constants]
        source = next(iter(operation.args), None)
        if not held or (base in SHAPES_ONLY and len(operation.all_input_nodes) == 1):
            self._compute(operation)
        elif base in NOTHING and isinstance(source, fx.Node) and source.meta["val"].dtype == operation.meta["val"].dtype:
            self.names[operation] = self._name(operation, source)
        elif base in moves.PADS and self._reads_pad(operation):
            return
        elif base in moves.MOVES:
            self._read_move(operation)
        elif base in FUNCTIONS:
            self._read_function(operation, base)
        elif base in KINDS:
            getattr(self, f"_read_{KINDS[base]}")(operation, captured.arguments(operation))
        else:
            raise self._refusal(operation)
        if captured.base_in_place(operation) and isinstance(source, fx.Node) and operation in self.names:
            self._replace(source, operation)

    def _compute(self, operation: fx.Node) -> None:
        """Compute an operation that reads nothing but constants, or nothing but the shape of what it reads."""
        target: Any = operation.target
        args, kwargs = fx.map_arg((operation.args, dict(operation.kwargs)), self._constant_or_empty)
        self.constants[operation] = target(*args, **kwargs)

    def _constant_or_empty(self, node: fx.Node) -> Tensor:
        if node in self.constants:
            return self.constants[node]
        return torch.empty(tuple(node.meta["val"].shape), dtype=node.meta["val"].dtype)

    def _replace(self, source: fx.Node, operation: fx.Node) -> None:
        """Let whoever looks at a tensor that was changed in place, look at the result from here on."""
        before = self.names.get(source)
        for tensor, held in self.names.items():
            if held == before:
                self.names[tensor] = self.names[operation]

    # ------------------------------------------------------------------------------------------------------- helpers

    def _hold(self, of: fx.Node, name: str, kind: str, inputs: tuple[str, ...], **fields: Any) -> str:
        """Add a node for an operation whose result it holds."""
        dims = fields.pop("dims", None) or tuple(of.meta["val"].shape)
        fields.setdefault("module", captured.module_of(of)[0])
        self.nodes[name] = Node(name, kind, inputs, shape_of(dims), dims=dims, **fields)
        self.names[of] = name
        return name

    def _between(self, of: fx.Node, suffix: str, kind: str, source: str, **fields: Any) -> str:
        """Add a node that an operation needs beside its own; its result is as large as its source's."""
        name = f"{of.name}_{suffix}"
        dims = fields.pop("dims", self.nodes[source].dims)
        module = captured.module_of(of)[0]
        self.nodes[name] = Node(name, kind, (source,), shape_of(dims), module=module, dims=dims, **fields)
        return name

    def _name(self, operation: fx.Node, tensor: Any) -> str:
        """Name the node that holds what an operation reads."""
        if not isinstance(tensor, fx.Node) or tensor not in self.names:
            raise self._refusal(operation, "of a constant or a parameter")
        return self.names[tensor]

    def _map(self, operation: fx.Node, tensor: Any) -> str:
        """Name the node that holds a map, a signal or a vector, of one image."""
        name = self._name(operation, tensor)
        dims = tuple(tensor.meta["val"].shape)
        if len(dims) < 2 or dims[0] != 1:
            raise self._refusal(operation, f"of shape {dims}, whose first dimension isn't the image's")
        if not tensor.meta["val"].dtype.is_floating_point:
            raise self._refusal(operation, f"of {tensor.meta['val'].dtype}")
        if 0 in dims:
            raise self._refusal(operation, f"of shape {dims}, without a number in it")
        return name

    def _refusal(self, operation: fx.Node, why: str = "") -> ValueError:
        module, kind = captured.module_of(operation)
        where = "the network"
        if module:
            where = f"layer {module!r} ({kind})"
        what = str(operation.target).rpartition(".")[0] or str(operation.target)
        return ValueError(f"{where} can't be deployed: operation {f'{what} {why}'.strip()}; deployable are {DEPLOYABLE}")

    def _layer(self, operation: fx.Node, weight: Any) -> str:
        tensor = self.constants.get(weight)
        names = [name for name, layer in self.layers.items() if layer.weight is tensor]
        if len(names) > 1:  # layers that share one weight
            names = [name for name in names if name == captured.module_of(operation)[0]]
        if len(names) != 1:
            raise self._refusal(operation, "with a weight that is no quantized layer's own")
        return names[0]

    # -------------------------------------------------------------------------------------------------------- layers

    def _read_conv(self, operation: fx.Node, given: dict[str, Any]) -> None:
        module = self._layer(operation, given["weight"])
        rank = given["weight"].meta["val"].dim() - 2
        kernel = _pair(given["weight"].meta["val"].shape[2:], 1, rank)
        padding = given["padding"]
        dilation = _pair(given["dilation"], 1, rank)
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)][-rank:]
        elif padding == "valid":
            padding = 0
        top, left = _pair(padding, 0, rank)
        if given["input"] in self.pads:
            pads = (*self.pads[given["input"]], 0, 0)
            left += pads[0]
            top += pads[2]
        window = Window(kernel, _pair(given["stride"], 1, rank), (top, left), dilation, given["groups"])
        source = self._map(operation, given["input"])
        self._check_own(operation, module, source)
        self._hold(operation, operation.name, "conv", (source,), module=module, window=window)

    def _check_own(self, operation: fx.Node, module: str, source: str) -> None:
        """Refuse a layer that does more to its own input than its padding mode says."""
        before = self.nodes[source]
        layer: Any = self.layers[module]
        if not is_own(before.module, module):
            return
        mode = getattr(layer, "padding_mode", "zeros")
        pads = before.kind == "move" and before.operation == "pad" and before.arguments["mode"] == mode
        if not pads or is_own(self.nodes[before.inputs[0]].module, module):
            raise self._refusal(operation, "on an input that the layer itself has changed")

    def _read_linear(self, operation: fx.Node, given: dict[str, Any]) -> None:
        if given["input"].meta["val"].dim() != 2:
            raise self._refusal(operation, f"on {given['input'].meta['val'].dim()} dimensions instead of 2")
        source = self._map(operation, given["input"])
        module = self._layer(operation, given["weight"])
        self._check_own(operation, module, source)
        self._hold(operation, operation.name, "linear", (source,), module=module)

    # -------------------------------------------------------------------------------- constants, sums and products

    def _read_batch_norm(self, operation: fx.Node, given: dict[str, Any]) -> None:
        if given["training"] or given["running_mean"] is None:
            raise self._refusal(operation, "with the statistics of each batch")
        of = [given[key] for key in ("running_mean", "running_var", "weight", "bias")]
        if any(tensor is not None and tensor not in self.constants for tensor in of):
            raise self._refusal(operation, "with parameters that are computed")
        mean = self.constants[given["running_mean"]].double()
        var = self.constants[given["running_var"]].double()
        scale = (var + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * self.constants[given["weight"]].double()
        shift = 0 - mean * scale
        if given["bias"] is not None:
            shift = self.constants[given["bias"]].double() - mean * scale
        source = self._map(operation, given["input"])
        self._hold(operation, operation.name, "batch_norm", (source,), scale=scale.numpy(), shift=shift.numpy())

    def _read_affine(self, operation: fx.Node, tensor: Any, scale: Any = 1.0, shift: Any = 0.0) -> None:
        """Hold the product with and the sum with something that doesn't depend on the images."""
        source = self._map(operation, tensor)
        dims = tuple(operation.meta["val"].shape)
        if dims != self.nodes[source].dims:
            raise self._refusal(operation, f"of shape {self.nodes[source].dims} with a constant, which gives {dims}")
        along = [self._along_channels(operation, value) for value in (scale, shift)]
        self._hold(operation, operation.name, "batch_norm", (source,), scale=along[0], shift=along[1])

    def _along_channels(self, operation: fx.Node, value: Any) -> NDArray[np.float64]:
        """Return a constant as one value per channel."""
        dims = tuple(operation.meta["val"].shape)
        whole = torch.as_tensor(value, dtype=torch.float64).expand(dims)[0].reshape(dims[1], -1)
        if not (whole == whole[:, :1]).all():
            raise self._refusal(operation, "with a constant that differs from place to place")
        return whole[:, 0].contiguous().numpy()

    def _constant(self, operand: Any) -> Any:
        """Return a number or a constant tensor in float64; None if it is computed of the images."""
        if not isinstance(operand, fx.Node):
            return operand
        if operand in self.constants:
            return self.constants[operand].double()
        return None

    def _read_neg(self, operation: fx.Node, given: dict[str, Any]) -> None:
        self._read_affine(operation, given["self"], -1.0)

    def _read_add(self, operation: fx.Node, given: dict[str, Any]) -> None:
        """Read self + alpha other, self - alpha other and other - alpha self."""
        base = captured.base_name(operation)
        first, second, factor = given["self"], given["other"], given["alpha"]
        if base == "rsub":
            first, second = second, first
        if base != "add":
            factor = -factor
        constants = self._constant(first), self._constant(second)
        if constants[1] is not None:
            self._read_affine(operation, first, 1.0, constants[1] * factor)
        elif constants[0] is not None:
            self._read_affine(operation, second, factor, constants[0])
        else:
            inputs = [self._map(operation, first), self._map(operation, second)]
            if factor != 1:
                channels = self.nodes[inputs[1]].dims[1]
                inputs[1] = self._between(
                    operation,
                    "factor",
                    "batch_norm",
                    inputs[1],
                    scale=np.full(channels, float(factor)),
                    shift=np.zeros(channels),
                )
            self._read_pair(operation, "add", inputs)

    def _read_mul(self, operation: fx.Node, given: dict[str, Any]) -> None:
        """Read products and quotients."""
        first, second = given["self"], given["other"]
        divides = captured.base_name(operation) == "div"
        if given.get("rounding_mode") is not None:
            raise self._refusal(operation, f"that rounds to {given['rounding_mode']}")
        constants = self._constant(first), self._constant(second)
        if constants[1] is not None:
            factor = torch.as_tensor(constants[1], dtype=torch.float64)
            if divides:
                factor = 1 / factor
            if not factor.isfinite().all():
                raise self._refusal(operation, "by zero or by what isn't finite")
            self._read_affine(operation, first, factor)
            return
        if not divides and constants[0] is not None:
            self._read_affine(operation, second, constants[0])
            return
        if divides:
            divisor = self._map(operation, second)
            divisor = self._between(operation, "reciprocal", "function", divisor, function="reciprocal")
            if constants[0] is not None:
                whole = self._along_channels(operation, constants[0])
                shift = np.zeros(len(whole))
                self._hold(operation, operation.name, "batch_norm", (divisor,), scale=whole, shift=shift)
                return
            self._read_pair(operation, "mul", [self._map(operation, first), divisor])
            return
        self._read_pair(operation, "mul", [self._map(operation, first), self._map(operation, second)])

    def _read_pair(self, operation: fx.Node, kind: str, inputs: list[str]) -> None:
        """Hold the sum or product of two results, whose shapes are equal or broadcast."""
        result = tuple(operation.meta["val"].shape)
        for name in inputs:
            if len(self.nodes[name].dims) != len(result):
                shapes = " and ".join(str(self.nodes[name].dims) for name in inputs)
                raise self._refusal(operation, f"of shapes {shapes}")
        self._hold(operation, operation.name, kind, tuple(inputs))

    # ----------------------------------------------------------------------------------------- functions of each value

    def _read_relu(self, operation: fx.Node, given: dict[str, Any]) -> None:
        self._hold(operation, operation.name, "relu", (self._map(operation, given["self"]),), low=0.0)

    def _read_clamp(self, operation: fx.Node, given: dict[str, Any]) -> None:
        low, high = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
        if captured.base_name(operation) == "relu6":
            low, high = 0.0, 6.0
        if isinstance(low, fx.Node) or isinstance(high, fx.Node):
            raise self._refusal(operation, "with bounds that are tensors")
        bounds = {}
        if low is not None:
            bounds["low"] = float(low)
        if high is not None:
            bounds["high"] = float(high)
        self._hold(operation, operation.name, "clamp", (self._map(operation, given["self"]),), **bounds)

    def _read_prelu(self, operation: fx.Node, given: dict[str, Any]) -> None:
        source = self._map(operation, given["self"])
        channels = self.nodes[source].dims[1]
        slope = torch.as_tensor(given.get("negative_slope", 0.0), dtype=torch.float64)
        if "weight" in given:
            slope = self._constant(given["weight"])
            if slope is None:
                raise self._refusal(operation, "with slopes that are computed")
        scale = slope.reshape(-1).expand(channels).contiguous().numpy()
        self._hold(operation, operation.name, "prelu", (source,), scale=scale)

    def _read_function(self, operation: fx.Node, base: str) -> None:
        given = captured.arguments(operation)
        tensor = given.pop("self", None)
        given.pop("dtype", None)
        if any(isinstance(value, fx.Node) for value in given.values()):
            raise self._refusal(operation, "with arguments that are tensors")
        source = self._map(operation, tensor)
        self._hold(operation, operation.name, "function", (source,), function=base, arguments=given)

    def _read_quantize(self, operation: fx.Node, given: dict[str, Any]) -> None:
        scale, zero_point = self._constant(given["scale"]), self._constant(given["zero_point"])
        if scale is None or zero_point is None:
            raise self._refusal(operation, "with a scale that is computed")
        fields = {"low": float(given["quant_min"]), "high": float(given["quant_max"]), "zero_point": int(zero_point)}
        source = self._map(operation, given["self"])
        self._hold(operation, operation.name, "quantize", (source,), scale=np.array(float(scale)), **fields)

    # ------------------------------------------------------------------------------------------------------- poolings

    def _read_max_pool(self, operation: fx.Node, given: dict[str, Any]) -> None:
        source = self._map(operation, given.get("self", given.get("input")))
        base = captured.base_name(operation)
        if base == "amax":
            self._read_reduction(operation, "max_pool", source, given)
            return
        result = operation.meta["val"]
        if "adaptive" in base:
            result = result[0]
        if not isinstance(result, Tensor):
            raise self._refusal(operation, "that gives the places of the largest values, too")
        height, width, _ = self.nodes[source].shape
        if "adaptive" in base:
            outputs = shape_of(tuple(result.shape))
            if height % outputs[0] or width % outputs[1]:
                raise self._refusal(operation, f"from {height}x{width} to {outputs[0]}x{outputs[1]}, which doesn't divide")
            kernel = height // outputs[0], width // outputs[1]
            dims = tuple(result.shape)
            # The operation gives the places of the largest values too, which nobody may read.
            self.several[operation] = self._between(
                operation, "max", "max_pool", source, dims=dims, window=Window(kernel, kernel)
            )
            return
        rank = result.dim() - 2
        stride = given["stride"] or given["kernel_size"]
        window = Window(
            _pair(given["kernel_size"], 1, rank),
            _pair(stride, 1, rank),
            _pair(given["padding"], 0, rank),
            _pair(given["dilation"], 1, rank),
        )
        self._hold(operation, operation.name, "max_pool", (source,), window=window)

    def _read_avg_pool(self, operation: fx.Node, given: dict[str, Any]) -> None:
        source = self._map(operation, given.get("self", given.get("input")))
        base = captured.base_name(operation)
        if base == "mean":
            self._read_reduction(operation, "avg_pool", source, given)
            return
        height, width, _ = self.nodes[source].shape
        rows, columns, _ = shape_of(tuple(operation.meta["val"].shape))
        fields: dict[str, Any]
        if "adaptive" in base:
            kernel = height // rows, width // columns
            fields = {"window": Window(kernel, kernel)}
            if height % rows or width % columns:
                fields = {"ranges": adaptive_ranges((height, width), (rows, columns))}
        else:
            rank = operation.meta["val"].dim() - 2
            stride = given["stride"] or given["kernel_size"]
            padding = _pair(given["padding"], 0, rank)
            window = Window(_pair(given["kernel_size"], 1, rank), _pair(stride, 1, rank), padding)
            ranges = window_ranges(
                window,
                (height, width),
                (rows, columns),
                padding_counts=given["count_include_pad"],
                divisor=given.get("divisor_override"),
            )
            fields = {"ranges": ranges}
            if (ranges.divisors == math.prod(window.kernel)).all():
                fields = {"window": window}
        self._hold(operation, operation.name, "avg_pool", (source,), **fields)

    def _read_reduction(self, operation: fx.Node, kind: str, source: str, given: dict[str, Any]) -> None:
        """Hold a mean or the largest value over height, width or both."""
        before = self.nodes[source]
        rank = len(before.dims)
        # Without dimensions, as in x.mean(), it is over the batch, too.
        over = sorted(dim % rank for dim in given.get("dim") or ())
        if rank not in (3, 4) or not over or over[0] < 2 or given.get("dtype") is not None:
            raise self._refusal(operation, "over other dimensions than height and width")
        dims = list(before.dims)
        kernel = [1, 1]
        for dim in over:
            kernel[dim - rank] = dims[dim]
            dims[dim] = 1
        size = kernel[0], kernel[1]
        window = Window(size, size)
        if given["keepdim"]:
            self._hold(operation, operation.name, kind, (source,), window=window)
            return
        pooled = self._hold(operation, operation.name, kind, (source,), dims=tuple(dims), window=window)
        after = tuple(operation.meta["val"].shape)
        if len(after) == 2:
            self.names[operation] = self._between(operation, "flat", "flatten", pooled, dims=after)
            return
        index = moves.index_of(moves.labels(after, 0))
        self.names[operation] = self._between(operation, "flat", "move", pooled, dims=after, operation="reshape", index=index)

    def _read_resize(self, operation: fx.Node, given: dict[str, Any]) -> None:
        source = self._map(operation, given.get("self", given.get("input")))
        rank = operation.meta["val"].dim() - 2
        scales = [None, None]
        factors = given.get("scale_factors")
        if factors is not None:
            scales = [None] * (2 - rank) + list(factors)
        for place, key in enumerate(("scales_h", "scales_w")):
            if given.get(key) is not None:
                scales[place] = given[key]
        if given.get("scales") is not None:
            scales[1] = given["scales"]
        outputs = shape_of(tuple(operation.meta["val"].shape))
        taps = []
        for axis in (0, 1):
            size = self.nodes[source].shape[axis]
            align = given["align_corners"]
            taps.append(bilinear_taps(size, outputs[axis], align_corners=align, scale=scales[axis]))
        arguments = {"output_size": list(operation.meta["val"].shape[2:]), "align_corners": given["align_corners"]}
        fields = {"operation": captured.base_name(operation), "arguments": arguments}
        self._hold(operation, operation.name, "resize", (source,), rows=taps[0], columns=taps[1], **fields)

    # ---------------------------------------------------------------------------------------------------------- moves

    def _reads_pad(self, operation: fx.Node) -> bool:
        """Keep the zeros that a layer puts around its own input for its window, and say whether that is done.

        What a layer does to its own input, it does when it is quantized already, and zeros are zeros then. Zeros that are put
        before are quantized, and one signed bit makes them +1.
        """
        given = captured.arguments(operation)
        source = next(iter(operation.args), None)
        module = captured.module_of(operation)[0]
        own = all(KINDS.get(captured.base_name(user)) == "conv" for user in operation.users) and all(
            is_own(module, self._layer(user, captured.arguments(user)["weight"])) for user in operation.users
        )
        if not own or not operation.users or moves.described(operation)[1]["mode"] != "constant":
            return False
        rank = operation.meta["val"].dim() - 2
        if len(given["pad"]) > 2 * rank or given.get("value"):
            raise self._refusal(operation, "other than with zeros, of height and width")
        self.names[operation] = self._map(operation, source)
        self.pads[operation] = tuple(given["pad"])
        return True

    def _read_move(self, operation: fx.Node) -> None:
        base = captured.base_name(operation)
        held = [node for node in operation.all_input_nodes if node not in self.constants]
        inputs = tuple(self._name(operation, node) for node in held)
        start = 0
        of: dict[fx.Node, Tensor] = {}
        for node in held:
            of[node] = moves.labels(tuple(node.meta["val"].shape), start)
            start += of[node].numel()
        try:
            made = moves.move_labels(operation, of, self.constants)
        except ValueError as reason:
            raise self._refusal(operation, str(reason)) from reason
        if base in moves.PARTS:
            self.several[operation] = made
            return
        dims = tuple(made.shape)
        first = self.nodes[inputs[0]].dims
        if base in moves.RESHAPES and len(dims) == 2 and dims[0] == first[0] == 1:
            self._hold(operation, operation.name, "flatten", inputs)
            return
        name, arguments = moves.described(operation)
        index = moves.index_of(made)
        self._hold(operation, operation.name, "move", inputs, operation=name, arguments=arguments, index=index)

    def _read_item(self, operation: fx.Node) -> None:
        """Hold one of several results of an operation."""
        source: Any = operation.args[0]
        part: Any = operation.args[1]
        made = self.several.get(source)
        if isinstance(made, str) and part == 0:
            self.names[operation] = made
            return
        if not operation.users:
            return
        if made is None or isinstance(made, str):
            raise self._refusal(source, f"whose result number {part} is used")
        name, arguments = moves.described(source, part)
        index = moves.index_of(made[part])
        before = self._name(operation, source.args[0])
        module = captured.module_of(source)[0]
        self._hold(
            operation,
            operation.name,
            "move",
            (before,),
            operation=name,
            arguments=arguments,
            index=index,
            module=module,
        )


def _pair(size: Any, least: int, rank: int = 2) -> Size:
    """Return height and width; of one number both, and of a Conv1d's a height of `least`."""
    if isinstance(size, int):
        size = [size] * rank
    sizes = [int(one) for one in size]
    if len(sizes) == 1 and rank == 2:
        sizes *= 2
    if len(sizes) == 1:
        return least, sizes[0]
    return sizes[0], sizes[1]
