"""What a network asks of hardware: its convolutions and linear layers, with every size a cost model needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hw_models.notebook import html_table

Size = tuple[int, int]


def end_padding(kernel: Size, stride: Size, padding: Size, dilation: Size, input_size: Size, output_size: Size) -> Size:
    """Return the padding at the bottom and right that a window with `padding` at the top and left needs.

    Args:
        kernel: Height and width, as all that follow.
        stride: Of the window.
        padding: At the top and left.
        dilation: Of the kernel.
        input_size: Of the image.
        output_size: Of the result.

    Returns:
        Rows and columns; negative where the last ones of the image aren't looked at.
    """
    sizes = zip(output_size, stride, dilation, kernel, padding, input_size, strict=True)
    bottom, right = ((out - 1) * s + d * (k - 1) + 1 - pad - size for out, s, d, k, pad, size in sizes)
    return bottom, right


def kind_of(in_channels: int, groups: int, kernel: Size) -> str:
    """Name the kind of a convolution.

    Args:
        in_channels: Of its input.
        groups: How many groups of channels are convolved by themselves.
        kernel: Height and width.

    Returns:
        "conv", "pointwise", "depthwise" or "grouped".
    """
    if groups > 1 and groups == in_channels:
        return "depthwise"
    if groups > 1:
        return "grouped"
    if kernel == (1, 1):
        return "pointwise"
    return "conv"


@dataclass(frozen=True)
class Call:
    """One use of a layer on one image: input and output positions (height, width); a linear layer has (rows, 1)."""

    input_size: Size
    output_size: Size

    @property
    def positions(self) -> int:
        """Positions of the output."""
        return self.output_size[0] * self.output_size[1]


@dataclass(frozen=True)
class Layer:
    """One quantizable operation.

    Sizes are per image, (height, width); a Conv1d has height 1; `padding` is that of the top and left. A layer that is
    called twice has two `calls`. `weight_of` and `bias_of` name the earlier layer whose weight, or bias, it has too; empty
    for its own.
    """

    name: str
    kind: str  # "conv", "pointwise", "depthwise", "grouped" or "linear"
    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    groups: int
    bias: bool
    calls: tuple[Call, ...]
    weight_of: str = ""
    bias_of: str = ""
    is_1d: bool = False  # a Conv1d

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layer that it is to hardware: a Conv1d is `conv1d`, and `depthwise` and so on beside that."""
        if not self.is_1d:
            return (self.kind,)
        if self.kind == "conv":
            return ("conv1d",)
        return (self.kind, "conv1d")

    @property
    def weights(self) -> int:
        """Weights, without bias."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.out_channels * self.bias

    @property
    def own_weights(self) -> int:
        """Weights that no earlier layer has, without bias."""
        if self.weight_of:
            return 0
        return self.weights

    @property
    def own_biases(self) -> int:
        """Biases that no earlier layer has."""
        if self.bias_of or not self.bias:
            return 0
        return self.out_channels

    @property
    def own_parameters(self) -> int:
        """Weights and biases that no earlier layer has."""
        return self.own_weights + self.own_biases

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, over all calls."""
        return self.weights * sum(call.positions for call in self.calls)

    @property
    def input_size(self) -> Size:
        """Height and width of the input of the first call."""
        return self.calls[0].input_size

    @property
    def output_size(self) -> Size:
        """Height and width of the output of the first call."""
        return self.calls[0].output_size

    def resized(self, in_channels: int, out_channels: int, groups: int) -> Layer:
        """Make the same layer with other numbers of channels, as a network has it from which channels were removed.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            groups: Groups of a convolution; both are multiples of it.

        Returns:
            The layer; its kind follows: a depthwise convolution of a single channel is an ordinary one.
        """
        kind = self.kind
        if kind != "linear":
            kind = kind_of(in_channels, groups, self.kernel)
        return replace(self, kind=kind, in_channels=in_channels, out_channels=out_channels, groups=groups)

    @property
    def shape(self) -> str:
        """Channels, kernel and output size in words: "16→32, 3x3 to 14x14"."""
        channels = f"{self.in_channels}→{self.out_channels}"
        if self.kind == "linear":
            return channels
        return f"{channels}, {_times(self.kernel)} to {_times(self.output_size)}"


@dataclass(frozen=True)
class Buffer:
    """An activation in memory.

    It has `elements` per image, and is alive from operation `first` to operation `last` of the forward pass; `readers` are
    the indices of the layers that take it as input.
    """

    elements: int
    first: int
    last: int
    readers: tuple[int, ...]


@dataclass(frozen=True)
class ElementWise:
    """Operations outside of layers that compute each element of their result by itself: those of one operation in one module.

    `operands` is how many activations they combine: 1 for an activation function, 2 for an addition. `read` and `written` are
    elements per image. Batch norms aren't counted, as they are folded into the layers before them.
    """

    name: str
    operation: str
    operands: int
    read: int
    written: int


@dataclass(frozen=True)
class Unpriced:
    """Products that no cost model prices: those of one operation of torch in one module, with their MACs per image.

    `name` is the module's, empty for the network itself.
    """

    name: str
    operation: str
    macs: int


@dataclass(frozen=True, repr=False)
class Workload:
    """The layers of a network at one input shape, in the order of their first call.

    `other_parameters` counts what is in no layer (norms, embeddings, layers never called), `other_values` the floating-point
    buffers (running means and variances) and what is read of a layer's weights in float: these stay in float. `buffers` are
    the activations, for the peak of memory. `unpriced` lists the products outside of layers (attention, computed weights):
    no cost has them. `branches` has, for each activation that several layers read, their indices; `element_wise` lists what
    is computed between layers.
    """

    layers: tuple[Layer, ...]
    other_parameters: int = 0
    other_values: int = 0
    buffers: tuple[Buffer, ...] = ()
    unpriced: tuple[Unpriced, ...] = ()
    branches: tuple[tuple[int, ...], ...] = ()
    element_wise: tuple[ElementWise, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers per image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def unpriced_share(self) -> float:
        """The part of all multiply-accumulates, from 0 to 1, that is in no layer and so in no cost."""
        unpriced = sum(product.macs for product in self.unpriced)
        return unpriced / max(1, unpriced + self.macs)

    @property
    def unpriced_words(self) -> str:
        """Say which share of the MACs isn't priced, by operation and module; empty if there is none."""
        if not self.unpriced:
            return ""
        parts: dict[str, list[Unpriced]] = {}
        for product in sorted(self.unpriced, key=lambda product: -product.macs):
            parts.setdefault(product.operation, []).append(product)
        words = []
        for operation, products in parts.items():
            where = products[0].name or "the network itself"
            if len(products) > 1:
                where += f" and {len(products) - 1} more"
            words.append(f"{operation} {sum(product.macs for product in products) / 1e6:.3g} M in {where}")
        return f"{100 * self.unpriced_share:.1f} % of the MACs ({', '.join(words)})"

    @property
    def parameters(self) -> int:
        """All parameters of the network; what layers share counts once."""
        return sum(layer.own_parameters for layer in self.layers) + self.other_parameters

    @cached_property
    def tied_weights(self) -> tuple[tuple[int, ...], ...]:
        """The layers that have one weight together, by their indices."""
        groups: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault(layer.weight_of or layer.name, []).append(index)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def __len__(self) -> int:
        """Count the layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        """Say on one line how large it is."""
        unpriced = ""
        if self.unpriced:
            unpriced = f", not priced: {100 * self.unpriced_share:.1f} % of the MACs"
        return f"Workload({len(self)} layers, {self.macs:,} MACs per image, {self.parameters:,} parameters{unpriced})"

    def _repr_html_(self) -> str:
        rows = [(layer.name, layer.kind, layer.shape, f"{layer.macs:,}", f"{layer.parameters:,}") for layer in self.layers]
        total = ("total", "", "", f"{self.macs:,}", f"{self.parameters:,}")
        headings = ("layer", "kind", "shape", "MACs per image", "parameters")
        return html_table(repr(self), headings, [*rows, total])


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
