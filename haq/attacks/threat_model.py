"""What an attacker may do: how far a perturbation may go, on the scale of images in [0, 1] and in a network's input space.

Importing this imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haq.store.files import quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from haq.data import Split
    from haq.networks import Network

DEFAULT_EPS = "8/255"
NORMS = {"linf": "Linf", "l2": "L2"}
TOLERANCE = 1e-6


def parse_eps(text: str, most: float = 1.0) -> float:
    """Read the size of a perturbation, on the scale of images in [0, 1].

    Args:
        text: A fraction, "8/255", or a decimal, "0.03".
        most: The largest that is allowed: 1 for a pixel, more for an l2 norm.

    Returns:
        The number.

    Raises:
        ValueError: For anything else, and for what isn't above 0 and at most `most`.
    """
    return check_eps(_number(text), text, most)


def _number(given: object) -> float:
    """Return a number, or the one that a text says."""
    try:
        if isinstance(given, bool):
            raise TypeError
        if not isinstance(given, str):
            return float(given)  # type: ignore[arg-type]
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:/\s*([0-9.]+)\s*)?", given)
        if match is None:
            raise ValueError
        eps = float(match[1])
        if match[2]:
            eps /= float(match[2])
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"eps {quoted(given)} is not understood: give a fraction such as 8/255, or a decimal such as 0.03"
        ) from None
    return eps


def check_eps(eps: object, text: object = None, most: float = 1.0) -> float:
    """Return the number, if it can be the size of a perturbation.

    Args:
        eps: A number, or a text as `parse_eps` reads it.
        text: What was given for it, for the message.
        most: The largest that is allowed.

    Returns:
        The number.

    Raises:
        ValueError: Unless it is above 0 and at most `most`.
    """
    given = eps if text is None else text
    eps = _number(eps)
    if most > 1 and not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0 and finite, not {given}")
    if not 0 < eps <= most:
        raise ValueError(
            f"eps is on the scale of images in [0, 1]: 8/255, not 8; it must be above 0 and at most 1, not {given}"
        )
    return eps


def describe_eps(eps: float) -> str:
    """Write eps as it is mostly written: "8/255", or a decimal where it isn't a multiple of 1/255."""
    levels = round(255 * eps)
    if levels > 0 and abs(255 * eps - levels) < 1e-6:
        return f"{levels}/255"
    return f"{eps:.4g}"


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: change an image x in [0, 1] to any x' in [0, 1] with ||x' - x|| <= eps.

    Attributes:
        eps: The size of the ball, above 0; in linf at most 1. May be given as a text, "8/255".
        norm: `linf` or `l2`.

    Raises:
        ValueError: For another norm, and for an eps that isn't on the scale of such images.
    """

    eps: float = 8 / 255
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check both."""
        if self.norm not in tuple(NORMS):
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        eps = _number(self.eps)
        if not 0 < eps < math.inf or (self.norm == "linf" and eps > 1):
            raise ValueError(f"eps is {self.eps!r}; images are in [0, 1], so it is above 0 and at most 1: 8/255, not 8")
        object.__setattr__(self, "eps", eps)

    def sizes(self, change: Tensor) -> Tensor:
        """Return the norm of each image's change, (N,).

        Args:
            change: What was added to images, shape (N, C, H, W).

        Returns:
            The largest magnitude of each (linf) or its Euclidean norm (l2), shape (N,).
        """
        flat = change.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.norm(dim=1)

    def within(self, images: Tensor, found: Tensor) -> bool:
        """Tell whether images that were found are allowed, up to `TOLERANCE`.

        Args:
            images: As they were, in [0, 1], shape (N, C, H, W).
            found: What an attack made of them, same shape.

        Returns:
            Whether all changes are at most `eps` and all values in [0, 1], both up to `TOLERANCE`.
        """
        size = self.sizes(found.double() - images.double()).max()
        allowed = size <= self.eps + TOLERANCE and found.min() >= -TOLERANCE and found.max() <= 1 + TOLERANCE
        return bool(allowed)

    def __str__(self) -> str:
        """Name norm and eps: "linf, eps 8/255"."""
        if self.norm == "linf":
            return f"linf, eps {255 * self.eps:.4g}/255"
        return f"{self.norm}, eps {self.eps:.4g}"


@dataclass(frozen=True, eq=False)
class PerturbationBall:
    """Where a perturbed input may lie: within `radius` of the input, entry by entry, and from `low` to `high`.

    Attributes:
        eps: On the scale of images in [0, 1], what the radius was made from.
        radius: In the network's input space, of shape (C, 1, 1) or one that broadcasts against it.
        low: What black is there, likewise.
        high: What white is there, likewise.
    """

    eps: float
    radius: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, network: Network, eps: float | str) -> PerturbationBall:
        """Make the ball in the input space of a network that takes (image - mean) / std."""
        import torch

        eps = check_eps(eps)
        mean = torch.tensor(network.mean).view(-1, 1, 1)
        std = torch.tensor(network.std).view(-1, 1, 1)
        # Computed as `Network.preprocess` does it, so that black and white are exactly the bounds.
        return cls(eps, eps / std, (0 - mean) / std, (1 - mean) / std)

    def to(self, device: torch.device) -> PerturbationBall:
        """Move it to a device."""
        return PerturbationBall(self.eps, self.radius.to(device), self.low.to(device), self.high.to(device))

    def around(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value of every entry, (N, C, H, W) each."""
        return (inputs - self.radius).maximum(self.low), (inputs + self.radius).minimum(self.high)

    def project(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return the nearest allowed point to x, for each of the inputs."""
        return x.clamp(*self.around(inputs))


def check_images(split: Split, name: str = "the data set") -> None:
    """Raise ValueError unless the images' range is known, in which an attack must stay."""
    import torch

    first = split.images[torch.arange(1)]
    if not isinstance(first, torch.Tensor) or first.dim() != 4:
        raise ValueError(f"the samples of {name} are no images, and an attack is of images: give uint8 images, from 0 to 255")
    dtype = first.dtype
    if dtype != torch.uint8:
        raise ValueError(
            f"the images of {name} are {str(dtype).removeprefix('torch.')}, taken as they are, so the range that an attack "
            "must stay in isn't known: give uint8 images, from 0 to 255"
        )


def check_steps(steps: int) -> None:
    """Raise ValueError unless a number of steps is an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of attack steps is {steps!r}; it must be an integer of at least 1")
