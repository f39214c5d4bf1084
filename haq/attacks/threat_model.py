"""What an attacker may do: how far a perturbation may go, on the scale of images in [0, 1] and in a network's input space."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from haq.data import Split
from haq.networks import Network

DEFAULT_EPS = "8/255"
NORMS = {"linf": "Linf", "l2": "L2"}
TOLERANCE = 1e-6


def parse_eps(text: str, most: float = 1.0) -> float:
    """The size of a perturbation, on the scale of images in [0, 1], from a fraction, "8/255", or a decimal, "0.03". Raises
    ValueError for anything else, and for what isn't above 0 and at most `most`: 1 for a pixel, more for an L2 norm."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(?:/\s*([0-9.]+)\s*)?", str(text))
    try:
        if match is None:
            raise ValueError
        eps = float(match[1]) / (float(match[2]) if match[2] else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps {text!r} is not understood: give a fraction such as 8/255, or a decimal such as 0.03") from None
    return check_eps(eps, text, most)


def check_eps(eps: float, text: object = None, most: float = 1.0) -> float:
    """eps itself. Raises ValueError, naming `text` (what was given), unless it is above 0 and at most `most`."""
    given = eps if text is None else text
    if most > 1 and not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0 and finite, not {given}")
    if not 0 < eps <= most:
        raise ValueError(
            f"eps is on the scale of images in [0, 1]: 8/255, not 8; it must be above 0 and at most 1, not {given}"
        )
    return eps


def describe_eps(eps: float) -> str:
    """The way it is mostly written: "8/255", or a decimal where it isn't a multiple of 1/255."""
    levels = 255 * eps
    whole = abs(levels - round(levels)) < 1e-6 and round(levels) > 0
    return f"{round(levels)}/255" if whole else f"{eps:.4g}"


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: change an image x in [0, 1] to any x' in [0, 1] with ||x' - x|| <= eps, in the norm `linf` or
    `l2`. Raises ValueError for another norm, and for an eps that isn't on the scale of such images."""

    eps: float = 8 / 255
    norm: str = "linf"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if not 0 < self.eps < math.inf or (self.norm == "linf" and self.eps > 1):
            raise ValueError(f"eps is {self.eps!r}; images are in [0, 1], so it is above 0 and at most 1: 8/255, not 8")

    def sizes(self, change: Tensor) -> Tensor:
        """The norm of each image's change, (N,)."""
        flat = change.flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else torch.linalg.vector_norm(flat, dim=1)

    def within(self, images: Tensor, found: Tensor) -> bool:
        """Whether images that were found are allowed, up to `TOLERANCE`."""
        size, least, most = self.sizes(found.double() - images.double()).max(), found.min(), found.max()
        return bool(size <= self.eps + TOLERANCE and least >= -TOLERANCE and most <= 1 + TOLERANCE)

    def __str__(self) -> str:
        unit = f"{255 * self.eps:.4g}/255" if self.norm == "linf" else f"{self.eps:.4g}"
        return f"{self.norm}, eps {unit}"


@dataclass(frozen=True, eq=False)
class PerturbationBall:
    """Where a perturbed input may lie: within `radius` of the input, entry by entry, and from `low` to `high`.

    eps: on the scale of images in [0, 1], what the radius was made from.
    radius, low, high: in the network's input space, of shape (C, 1, 1) or one that broadcasts against it.
    """

    eps: float
    radius: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, network: Network, eps: float) -> PerturbationBall:
        """In the input space of a network that takes (image - mean) / std."""
        check_eps(eps)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (network.mean, network.std))
        # Computed as `Network.preprocess` does it, so that black and white are exactly the bounds.
        return cls(eps, eps / std, (0 - mean) / std, (1 - mean) / std)

    def to(self, device: torch.device) -> PerturbationBall:
        return PerturbationBall(self.eps, self.radius.to(device), self.low.to(device), self.high.to(device))

    def around(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of every entry, (N, C, H, W) each."""
        return torch.maximum(inputs - self.radius, self.low), torch.minimum(inputs + self.radius, self.high)

    def project(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The nearest allowed point to x, for each of the inputs."""
        return torch.clamp(x, *self.around(inputs))


def check_images(split: Split, name: str = "the data set") -> None:
    """Raise ValueError unless the images' range is known, in which an attack must stay."""
    dtype = split.images[torch.arange(1)].dtype
    if dtype != torch.uint8:
        raise ValueError(
            f"the images of {name} are {str(dtype).removeprefix('torch.')}, taken as they are, so the range that an attack "
            "must stay in isn't known: give uint8 images, from 0 to 255"
        )
