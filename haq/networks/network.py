"""`Network`: a module together with the images that it wants to see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.calling import Forward, call, device_of, map_tensors, to_device
from quantizers.copying import evaluating

IMAGE_SIZE = 224  # of images that can be had in any size, for a network that takes any
WORDS = (torch.int64, torch.int32)  # types of inputs that are words of a text
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of images in [0, 1], by channel
IMAGENET_STD = (0.229, 0.224, 0.225)  # their standard deviations


@dataclass(frozen=True)
class Network:
    """A network and what it wants to see: images of `input_shape` (C, H, W), scaled to [0, 1], minus mean, over std.

    A network without an input shape, (), takes whatever the data set gives.
    With a `forward`, that computes its outputs of (module, batch), a batch being (inputs, targets) as the data set gives them.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    origin: str = ""
    memory_format: torch.memory_format = torch.channels_last
    forward: Forward | None = None

    @property
    def image_size(self) -> int:
        """Return height and width, in pixels, that images are brought to which can be had in any size."""
        if self.input_shape:
            return self.input_shape[-1]
        return IMAGE_SIZE

    @property
    def device(self) -> torch.device:
        """Return where the network's parameters are; the CPU if it has none."""
        return device_of(self.module)

    def to(self, device: torch.device | str) -> Network:
        """Move the module to a device, in place.

        Args:
            device: As torch names it, such as "cuda:0".

        Returns:
            The network itself.
        """
        self.module.to(device)
        return self

    def run(self, module: nn.Module, inputs: Any, targets: Any = None) -> Any:
        """Compute the outputs of a module of this network's kind.

        Args:
            module: The network's own, or a quantized one.
            inputs: Of a batch, preprocessed, of any structure; the module is given copies of them, on the network's device.
            targets: Of the batch, for a `forward` that looks at them.

        Returns:
            What the module, or `forward`, returns.
        """
        copied = map_tensors(to_device(inputs, self.device), torch.clone)
        if self.forward is not None:
            return self.forward(module, (copied, to_device(targets, self.device)))
        return call(module, copied)

    def preprocess(self, images: Any) -> Any:
        """Turn images into what the network takes. Float images are taken as they are.

        Args:
            images: Images (N, C, H, W), uint8 or float. Grey images are repeated over three channels. Inputs that are no
                images, such as texts or several tensors, come back as they are, and so do images for a network without an
                input shape, but for uint8, which is scaled.

        Returns:
            Inputs (N, C, H, W), float32, on the network's device.

        Raises:
            ValueError: For images of a shape that the network wasn't made for.
        """
        # As bytes they are moved four times as fast.
        images = to_device(images, self.device)
        if not isinstance(images, Tensor):
            return map_tensors(images, _as_float32)
        if not self.input_shape:
            return self._unshaped(images)
        if images.dtype in WORDS:
            return images
        if images.dtype != torch.uint8:
            self._check_shape(images)
            return images.float()
        channels = self.input_shape[0]
        if images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        self._check_shape(images)
        return self._scaled(images.contiguous(memory_format=self.memory_format))

    def _scaled(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        # In place: images that are streamed are scaled for every policy.
        return images.float().div_(255).sub_(mean).div_(std)

    def _unshaped(self, inputs: Tensor) -> Tensor:
        """Preprocess inputs for a network that takes any shape."""
        if inputs.dtype == torch.uint8 and inputs.dim() == 4:
            return self._scaled(inputs)
        return _as_float32(inputs)

    def normalized(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Network:
        """Return the network with another mean and standard deviation of its images, on the scale of images in [0, 1].

        Args:
            mean: A number for each channel, or one for all; None: as it is.
            std: The same.

        Returns:
            The network, of the same module.

        Raises:
            ValueError: For neither one number nor one for each channel.
        """
        if not self.input_shape:
            # Nobody knows how many channels there are.
            return replace(self, mean=tuple(mean or self.mean), std=tuple(std or self.std))
        channels = self.input_shape[0]
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(
                    f"--{name} has {len(values)} numbers; {self.name} takes images of {channels} channels: give one number "
                    f"for all of them, or {channels}"
                )
        return replace(self, mean=tuple(mean or self.mean), std=tuple(std or self.std))

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{self.name} takes images of shape {self.input_shape}, the data set has {tuple(images.shape[1:])}"
            )

    def signature(self) -> str:
        """Hash every parameter and buffer: what a resumed run compares.

        Returns:
            16 hexadecimal digits of SHA-256.
        """
        digest = hashlib.sha256()
        for key, tensor in sorted(self.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def ordered(self) -> Network:
        """Put the network in evaluation mode, its weights in the order that convolutions are fastest in, if that works.

        Returns:
            The same module, and how it lays tensors out.
        """
        network = self
        for memory_format in (torch.channels_last, torch.contiguous_format):
            network = replace(self, memory_format=memory_format)
            network.module.eval()
            if not self.input_shape:
                return replace(self, memory_format=torch.contiguous_format)
            network.module.to(memory_format=memory_format)  # type: ignore[call-overload]
            try:
                with torch.inference_mode():
                    zeros = torch.zeros(1, *self.input_shape, device=self.device)
                    network.module(zeros.contiguous(memory_format=memory_format))
                break
            except RuntimeError:
                # Some networks flatten with `view`, which needs the ordinary order. Any other fault shows when it is used.
                continue
        return network


def _as_float32(tensor: Tensor) -> Tensor:
    """Convert floats of another type; integers are words of a text."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor


def answer_to_zeros(network: Network) -> Any:
    """Return what a network answers to an image of zeros.

    Args:
        network: The network.

    Returns:
        Its outputs for a batch of one, of whatever structure they are.

    Raises:
        ValueError: If it doesn't say what size it takes, or fails on images of that size.
    """
    if not network.input_shape:
        raise ValueError(
            f"{network.name} doesn't say what it takes: set module.input_shape = (channels, height, width), or return a "
            "haq.networks.Network"
        )
    try:
        with torch.inference_mode(), evaluating(network.module):
            return network.module(torch.zeros(1, *network.input_shape, device=network.device))
    except Exception as error:
        size = "x".join(map(str, network.input_shape))
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{network.name} can't take images of {size}, which it or its file says that it takes: "
            f"{type(error).__name__} ({reason})"
        ) from error


def output_count(network: Network) -> int:
    """Count the classes that a network tells apart, by one forward pass of zeros.

    Args:
        network: The network.

    Returns:
        The number of its class scores.

    Raises:
        ValueError: For a network that doesn't return class scores of shape (batch, classes).
    """
    output = answer_to_zeros(network)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError(f"{network.name} returns {type(output).__name__}, not class scores of shape (batch, classes)")
    return output.shape[1]
