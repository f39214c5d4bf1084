"""The network that is attacked, as a function of images in [0, 1]."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q


class Classifier(nn.Module):
    """A network with its normalisation inside: takes images (N, C, H, W) in [0, 1], returns logits (N, classes).

    The network is copied, in evaluation mode and without gradients of its parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        requantize: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Copy a network.

        Args:
            network: Takes images minus mean, over std.
            mean: Of every channel, on the scale of images in [0, 1].
            std: Of every channel, likewise.
            requantize: Images are first rounded to 8 bits, as a camera or a file would, with the straight-through gradient.
            memory_format: In which the network takes its input.
        """
        super().__init__()
        self.network = Q.copy_network(network)
        device = torch.device("cpu")
        for parameter in network.parameters():
            device = parameter.device
            break
        self.register_buffer("mean", torch.tensor(mean, device=device).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(1, -1, 1, 1))
        self.requantize = requantize
        self.memory_format = memory_format
        self.eval().requires_grad_(False)

    @property
    def quantized(self) -> bool:
        """Whether any input of a layer is rounded."""
        return any(layer.activation_bits is not None for layer in Q.quant_layers(self.network).values())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.mean.device

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        if self.requantize:
            x = Q.fake_quantize(x, x.new_tensor(1 / 255), 8, False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits: Tensor = self.network(x)
        return logits

    def twin(self) -> Classifier:
        """Make the same with the network in float: its weights as they are now, unrounded."""
        made = copy.copy(self)
        made._modules = {"network": Q.float_copy(self.network).eval().requires_grad_(False)}
        return made

    @torch.no_grad()
    def right(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return which images are classified as labelled, (N,) of bool."""
        return self(x).argmax(1) == labels


class TwinnedClassifier(nn.Module):
    """The logits of one network, to the last bit, with the gradient of another."""

    def __init__(self, network: nn.Module, twin: nn.Module) -> None:
        """Keep both."""
        super().__init__()
        self.network = network
        self.twin = twin

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        with torch.no_grad():
            logits = self.network(x)
        made: Tensor = _BorrowedGradient.apply(logits, self.twin(x))
        return made


class _BorrowedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, lender: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
