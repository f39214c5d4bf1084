"""The default network: small, MobileNet-style, shipped with weights trained on Fashion-MNIST."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

import torch
from torch import Tensor, nn

from haq.networks.checkpoint import restore
from haq.networks.network import Network

NAME = "mobilenet-mini"
WEIGHTS = "assets/mobilenet-mini.safetensors"
# Output channels and stride of every pair of a depthwise and a pointwise convolution.
BLOCKS = ((48, 1), (48, 1), (96, 2), (96, 1), (96, 1), (192, 1))


class Residual(nn.Sequential):
    """relu(x + f(x)), f being the modules in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what the modules make of x to x."""
        result: Tensor = super().forward(x)
        return torch.relu_(result + x)


def build(classes: int | None = None, pretrained: bool = True) -> Network:
    """Build the network, with the weights that are shipped or with random ones.

    Args:
        classes: The number of outputs of a network with random weights; None for 10.
        pretrained: Whether it has its weights.

    Returns:
        The network.
    """
    if pretrained:
        network = Network(NAME, mobilenet_mini(), (1, 28, 28))
        shipped = resources.files("haq").joinpath(WEIGHTS)
        with resources.as_file(shipped) as path:
            return replace(restore(network, path), origin="shipped with haq")
    return Network(NAME, mobilenet_mini(classes=classes or 10), (1, 28, 28), origin="random weights")


def mobilenet_mini(channels: int = 1, classes: int = 10) -> nn.Module:
    """Make a small network of MobileNet's layers for 28x28 images, with random weights.

    A dense stem, depthwise-separable pairs (Howard et al. 2017) with a residual connection where shapes allow (Sandler et al.
    2018), and a linear classifier.
    """
    width = 32
    network = nn.Sequential()
    _add_convolution(network, "stem", (channels, width, 3), stride=2)
    network.add_module("stem_relu", nn.ReLU(inplace=True))
    for number, (outputs, stride) in enumerate(BLOCKS, 1):
        network.add_module(f"block{number}", _block(width, outputs, stride))
        width = outputs
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(width, classes))
    return network


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Make a depthwise and a pointwise convolution, with a residual connection where their shapes allow it."""
    residual = outputs == inputs and stride == 1
    block = nn.Sequential()
    if residual:
        block = Residual()
    _add_convolution(block, "depthwise", (inputs, inputs, 3), stride, groups=inputs)
    block.add_module("depthwise_relu", nn.ReLU(inplace=True))
    _add_convolution(block, "pointwise", (inputs, outputs, 1))
    if not residual:
        block.add_module("pointwise_relu", nn.ReLU(inplace=True))
    return block


def _add_convolution(to: nn.Sequential, name: str, shape: tuple[int, int, int], stride: int = 1, groups: int = 1) -> None:
    """Add a convolution of (inputs, outputs, kernel) and its batch norm."""
    inputs, outputs, kernel = shape
    to.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    to.add_module(f"{name}_norm", nn.BatchNorm2d(outputs))
