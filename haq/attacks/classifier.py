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

    The network is copied, in evaluation mode and without gradients of its parameters. Where a pixel's gradient is NaN,
    attacks see none: one such pixel would end them all.
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

        Raises:
            ValueError: For a mean and std that aren't finite numbers, and a std that isn't above 0.
        """
        super().__init__()
        self.network = Q.copy_network(network)
        device = torch.device("cpu")
        for parameter in network.parameters():
            device = parameter.device
            break
        self.register_buffer("mean", _by_channel("mean", mean).to(device))
        self.register_buffer("std", _by_channel("std", std).to(device))
        if not (self.std > 0).all():
            raise ValueError(f"std is {std!r}; it must be numbers above 0")
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

    @property
    def channels(self) -> int:
        """How many channels have a mean and std of their own."""
        return max(self.mean.shape[1], self.std.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(_without_nan)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the same, with gradients as they are.

        Raises:
            ValueError: If the network's outputs are no tensor.
        """
        if self.requantize:
            x = Q.fake_quantize(x, x.new_tensor(1 / 255), 8, False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits = self.network(x)
        if not isinstance(logits, Tensor):
            raise ValueError(f"the network's outputs are logits (images, two classes or more), not a {type(logits).__name__}")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # what attacks compute with
        return logits

    def twin(self) -> Classifier:
        """Make the same with the network in float: its weights as they are now, unrounded."""
        made = copy.copy(self)
        made._modules = {"network": Q.float_copy(self.network).eval().requires_grad_(False)}
        return made

    @torch.no_grad()
    def right(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return which images are classified as labelled, (N,) of bool; an answer with NaN is wrong."""
        logits = self(x)
        return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def _by_channel(name: str, values: Sequence[float]) -> Tensor:
    """Return numbers in the shape (1, channels, 1, 1). Raises ValueError unless they are finite numbers, one at least."""
    try:
        made = torch.as_tensor(values, dtype=torch.float32).detach().clone().view(1, -1, 1, 1)
    except (TypeError, ValueError, RuntimeError):
        made = torch.empty(1, 0, 1, 1)
    if not made.numel() or not made.isfinite().all():
        raise ValueError(f"{name} is {values!r}; it must be finite numbers, one for each channel or one for all")
    return made


def _without_nan(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


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


class JoinedMembers(nn.Module):
    """The sum of the logits of a network's members: of all parts of it, none within another, that answer with as many."""

    def __init__(self, network: Classifier, names: Sequence[str]) -> None:
        """Keep the network, and the names of its members."""
        super().__init__()
        self.network = network
        self.names = list(names)

    @classmethod
    def of(cls, network: Classifier, example: Tensor, classes: int) -> JoinedMembers | None:
        """Find the members of a network.

        Args:
            network: The network.
            example: Images in [0, 1], float (N, C, H, W).
            classes: How many logits it returns.

        Returns:
            The sum; None where there are less than two members.
        """
        shapes: dict[str, set[Any]] = {}

        def watch(name: str) -> Any:
            def note(module: nn.Module, given: Any, made: Any) -> None:
                shapes.setdefault(name, set()).add(getattr(made, "shape", None))

            return note

        parts = [(name, part) for name, part in network.network.named_modules() if name]
        handles = [part.register_forward_hook(watch(name)) for name, part in parts]
        try:
            with torch.no_grad():
                network(example)
        finally:
            for handle in handles:
                handle.remove()
        answering = [name for name, found in shapes.items() if found == {(len(example), classes)}]
        outer = [name for name in answering if not any(name.startswith(f"{other}.") for other in answering)]
        if len(outer) < 2:
            return None
        return cls(network, outer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum (N, classes) of all members' logits, of images (N, C, H, W) in [0, 1]."""
        logits: list[Tensor] = []
        parts = [self.network.network.get_submodule(name) for name in self.names]
        handles = [part.register_forward_hook(lambda part, given, made: logits.append(made)) for part in parts]
        try:
            self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(logits).sum(0)


class _BorrowedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, lender: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
