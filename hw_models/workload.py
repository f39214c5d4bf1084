"""What a network asks of hardware: its convolutions and linear layers, with every size a cost model needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One use of a layer on one image: input and output positions (height, width); a linear layer has (rows, 1)."""

    input_size: Size
    output_size: Size

    @property
    def positions(self) -> int:
        return self.output_size[0] * self.output_size[1]


@dataclass(frozen=True)
class Layer:
    """One quantizable operation. Sizes are per image; a layer that is called twice has two `calls`."""

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

    @property
    def weights(self) -> int:
        """Weights, without bias."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, over all calls."""
        return self.weights * sum(call.positions for call in self.calls)

    @property
    def input_size(self) -> Size:
        return self.calls[0].input_size

    @property
    def output_size(self) -> Size:
        return self.calls[0].output_size


@dataclass(frozen=True)
class Workload:
    """The layers of a network at one input shape, in the order of their first call."""

    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def trace(network: nn.Module, *example: Any) -> Workload:
    """Run a network once on example inputs (the first one's leading dimension is the batch) and record its layers.

    Conv2d and Linear are recorded where they are called; what is never called is left out. The network comes back in the
    mode it was in. Raises ValueError, listing the modules found, if there is no such layer.
    """
    if not example or not isinstance(example[0], Tensor) or example[0].dim() == 0 or len(example[0]) == 0:
        raise ValueError("trace needs an example input: a tensor whose first dimension is a batch of at least one")
    batch = len(example[0])
    calls: dict[str, list[Call]] = {}
    names: dict[nn.Module, str] = {
        module: name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        source: Tensor = inputs[0]
        if isinstance(module, nn.Conv2d):
            # Images folded into the batch (patches, frames) count as more rows of positions.
            images = output.shape[0] // batch if output.dim() == 4 else 1
            call = Call(
                (source.shape[-2] * images, source.shape[-1]),
                (output.shape[-2] * images, output.shape[-1]),
            )
        else:
            rows = source.shape[:-1].numel() // batch
            call = Call((rows, 1), (rows, 1))
        calls.setdefault(names[module], []).append(call)

    handles = [module.register_forward_hook(record) for module in names]
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            network(*example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not calls:
        kinds = sorted({type(m).__name__ for m in network.modules() if not list(m.children())})
        raise ValueError(
            f"{type(network).__name__} calls no Conv2d or Linear layer, so there is nothing to quantize; "
            f"it is made of {', '.join(kinds)}"
        )
    modules = {name: module for module, name in names.items()}
    return Workload(tuple(_layer(name, modules[name], tuple(found)) for name, found in calls.items()))


def _layer(name: str, module: nn.Module, calls: tuple[Call, ...]) -> Layer:
    if isinstance(module, nn.Linear):
        one, none = (1, 1), (0, 0)
        has_bias = module.bias is not None
        return Layer(name, "linear", module.in_features, module.out_features, one, one, none, one, 1, has_bias, calls)
    assert isinstance(module, nn.Conv2d)
    kernel, groups = _pair(module.kernel_size), module.groups
    if groups == 1:
        kind = "pointwise" if kernel == (1, 1) else "conv"
    else:
        kind = "depthwise" if groups == module.in_channels else "grouped"
    # 'same' padding is a string; its size is what the strides leave of the kernel.
    padding = (
        tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, kernel, strict=True))
        if module.padding == "same"
        else (0, 0)
        if isinstance(module.padding, str)
        else module.padding
    )
    return Layer(
        name,
        kind,
        module.in_channels,
        module.out_channels,
        kernel,
        _pair(module.stride),
        _pair(padding),
        _pair(module.dilation),
        groups,
        module.bias is not None,
        calls,
    )


def _pair(value: Any) -> Size:
    first, second = value
    return int(first), int(second)
