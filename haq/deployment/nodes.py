"""The operations of a network by kind, and what each computes in real numbers: torch's order, (N, C, H, W)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hw_models.workload import Size, end_padding

Shape = tuple[int, int, int]


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
class Ranges:
    """The rows and columns that each output of an average pooling sums up, and what the sum is divided by.

    `rows` is (H_out, 2) and `columns` (W_out, 2): the first, and the one after the last, both in the image. `divisors` is
    (H_out, W_out).
    """

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    divisors: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Taps:
    """Between which two rows (or columns) each output row lies: first (1 - weight) + second weight. Arrays of (outputs,)."""

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    weight: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    `dims` is torch's shape of its result for one image, batch 1 included: (1, C, H, W), (1, C, L) or (1, C). `shape` is the
    same as (height, width, channels): that of (1, C, L) is (1, L, C), that of (1, C) is (1, 1, C), and of more than two
    dimensions behind the channels all but the last are the height. A move may have a result whose first dimension isn't 1;
    nothing but moves reads it.

    The kinds, and the fields that they have beside `inputs`, names of the nodes whose results they take:

    input, output
    conv        `window`; a Conv1d has a height of 1, in its kernel too. What a layer does to its own input, before it
                convolves and after it quantizes it, comes as a move before it, whose `module` is the layer's too; zeros
                that a layer puts around its input are in the window
    linear
    batch_norm  y = x scale + shift, float64 of (channels,): batch norms, and every product with and sum with constants
    relu, clamp   `low`, `high`: of a ReLU 0 and infinity
    prelu       y = x where x >= 0 else x scale, (channels,); leaky ReLU too
    function    `function`, torch's name of a function of each value, with `arguments`: torch.ops.aten.NAME(x, **arguments)
    add, mul    of two results; shapes are equal or broadcast as torch does, dimensions of 1 against others
    max_pool    `window`
    avg_pool    `window`, whose size is the divisor everywhere and whose padding is zeros; or `ranges`
    flatten     (1, C, H, W) or (1, C, L) to (1, C H W), channels first
    move        takes values to other places and computes nothing. `index`, int32, says for every value of the result, in
                torch's order, where it comes from in the flattened inputs one behind the other; -1 is a zero. `operation`
                and `arguments` say the same in torch's words:
                reshape (to `dims`), permute (dims), slice (dim, start, end, step), select (dim, index), cat (dim), stack
                (dim), pad (pad, mode: constant, with zeros, reflect, replicate or circular), roll (shifts, dims), flip
                (dims), pixel_shuffle (upscale_factor), pixel_unshuffle (downscale_factor), channel_shuffle (groups),
                upsample_nearest (output_size), repeat (repeats), expand (to `dims`); or gather: what only `index` says
    resize      bilinear interpolation: `rows` and `columns`, `operation` and `arguments` torch's
    quantize    q = clip(round(x / scale) + zero_point, low, high), and y = (q - zero_point) scale: a quantizer between
                layers. `scale` is an array of ()

    `module` is the dotted name of the module it is in; of a convolution or linear layer: of that layer.
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
    dims: tuple[int, ...] = ()
    function: str = ""
    operation: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    index: NDArray[np.int32] | None = None
    ranges: Ranges | None = None
    rows: Taps | None = None
    columns: Taps | None = None
    zero_point: int = 0


def shape_of(dims: Sequence[int]) -> Shape:
    """Return height, width and channels of torch's shape for one image (1, C, ...)."""
    if len(dims) < 2 or dims[0] != 1:
        return 1, 1, math.prod(dims)
    _, channels, *places = dims
    if not places:
        return 1, 1, channels
    return math.prod(places[:-1]), places[-1], channels


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


def evaluate(graph: Graph, layers: Mapping[str, nn.Module], images: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """Compute a graph, node by node.

    Args:
        graph: The graph.
        layers: What computes the convolutions and linear layers, by name.
        images: Images (N, C, H, W), or what else the network takes, N of them.

    Yields:
        Each node with its result.
    """
    nodes = {node.name: node for node in graph.nodes}
    results: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.kind == "input":
            made = images
        elif node.kind in ("conv", "linear"):
            made = layers[node.module](results[_before_layer(node, nodes)])
        elif node.kind == "move":
            made = _move(node, len(images), [results[name] for name in node.inputs])
        else:
            made = COMPUTED[node.kind](node, *(results[name] for name in node.inputs))
        results[node.name] = made
        yield node, made


def _before_layer(node: Node, nodes: Mapping[str, Node]) -> str:
    """Name what a layer is given: what it does to its own input it does itself."""
    name = node.inputs[0]
    while nodes[name].kind == "move" and is_own(nodes[name].module, node.module):
        name = nodes[name].inputs[0]
    return name


def is_own(module: str, layer: str) -> bool:
    """Say whether an operation in a module is a layer's own."""
    return bool(layer) and f"{module}.".startswith(f"{layer}.")


def _along_channels(values: Any, x: Tensor) -> Tensor:
    """Shape one value per channel to broadcast against maps or vectors."""
    return torch.tensor(values, dtype=x.dtype).view(-1, *[1] * (x.dim() - 2))


def _batch_norm(node: Node, x: Tensor) -> Tensor:
    return x * _along_channels(node.scale, x) + _along_channels(node.shift, x)


def _prelu(node: Node, x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * _along_channels(node.scale, x))


def apply_function(node: Node, x: Tensor) -> Tensor:
    """Apply a node's function to each value."""
    made: Tensor = getattr(torch.ops.aten, node.function)(x, **node.arguments)
    return made


def _max_pool(node: Node, x: Tensor) -> Tensor:
    return max_pool(_maps(x), node.window, node.shape[:2]).reshape(-1, *node.dims[1:])


def _avg_pool(node: Node, x: Tensor) -> Tensor:
    if node.ranges is not None:
        made = sum_ranges(_maps(x), node.ranges) / torch.tensor(node.ranges.divisors, dtype=x.dtype)
    else:
        assert node.window is not None
        made = sum_pool(_maps(x), node.window, node.shape[:2]) / math.prod(node.window.kernel)
    return made.reshape(-1, *node.dims[1:])


def _maps(x: Tensor) -> Tensor:
    """Shape (N, C, L) as maps with a height of 1; maps stay what they are."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x


def _move(node: Node, count: int, inputs: Sequence[Tensor]) -> Tensor:
    assert node.index is not None
    flat = torch.cat([*(x.reshape(count, -1) for x in inputs), inputs[0].new_zeros(count, 1)], 1)
    return flat[:, torch.from_numpy(node.index.astype(np.int64))].reshape(-1, *node.dims[1:])


def _resize(node: Node, x: Tensor) -> Tensor:
    assert node.rows is not None
    assert node.columns is not None
    maps = _maps(x)
    made = _between(_between(maps, node.columns, 3), node.rows, 2)
    return made.reshape(-1, *node.dims[1:])


def _between(x: Tensor, taps: Taps, dim: int) -> Tensor:
    """Interpolate between two places along a dimension."""
    first = x.index_select(dim, torch.from_numpy(taps.first.astype(np.int64)))
    second = x.index_select(dim, torch.from_numpy(taps.second.astype(np.int64)))
    weight = torch.tensor(taps.weight, dtype=x.dtype).view(-1, *[1] * (3 - dim))
    return first + (second - first) * weight


def _quantize(node: Node, x: Tensor) -> Tensor:
    assert node.scale is not None
    made: Tensor = torch.fake_quantize_per_tensor_affine(
        x.float(), float(node.scale), node.zero_point, int(node.low), int(node.high)
    )
    return made.to(x.dtype)


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


def sum_ranges(x: Tensor, ranges: Ranges) -> Tensor:
    """Return the sum over each pair of a range of rows and a range of columns.

    Args:
        x: Values (N, C, H, W).
        ranges: The ranges.

    Returns:
        Values (N, C, H_out, W_out).
    """
    height, width = x.shape[2:]
    down = _taken(ranges.rows, height).to(x.dtype)
    across = _taken(ranges.columns, width).to(x.dtype)
    return down @ x @ across.T


def _taken(ranges: NDArray[np.int32], size: int) -> Tensor:
    """Return which places each range takes, (ranges, size), 0 or 1."""
    place = np.arange(size)
    return torch.from_numpy((place >= ranges[:, :1]) & (place < ranges[:, 1:]))


COMPUTED: dict[str, Callable[..., Tensor]] = {
    "batch_norm": _batch_norm,
    "relu": lambda node, x: x.clamp(node.low, node.high),
    "clamp": lambda node, x: x.clamp(node.low, node.high),
    "prelu": _prelu,
    "function": apply_function,
    "add": lambda node, a, b: a + b,
    "mul": lambda node, a, b: a * b,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "flatten": lambda node, x: x.reshape(len(x), -1),
    "resize": _resize,
    "quantize": _quantize,
    "output": lambda node, x: x,
}
