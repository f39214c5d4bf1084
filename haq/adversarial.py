"""Cheap attacks on a network's inputs, to train against and to search with. They are no evaluation of its robustness: that
takes many attacks, with libraries' own code, and `haq.robustness` is for it.

An attacker may change every pixel by up to eps (infinity norm; eps is on the scale of images in [0, 1]) and must leave an
image an image. Everything is computed where the network's inputs are, (image - mean) / std, so that eps and the range of
images become numbers per channel (`Ball`). Quantizers pass the gradient straight through, as they do in training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haq.data import Split
from haq.models import Network

DEFAULT_EPS = "8/255"
STEPS = {"pgd": 7, "free": 4, "rfgsm": 1}  # by default, by kind
PROXY_STEPS = 3

Loss = Callable[[Tensor], Tensor]  # of a network's outputs: a number


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
class Adversary:
    """An attacker that a network is trained against.

    kind
        `pgd`: projected gradient ascent from a random start in the ball (Madry et al., ICLR 2018), in `steps` (default 7) of
        2.5 eps / steps. `rfgsm`: a random step of eps / 2, then a gradient step of the rest (Tramer et al., ICLR 2018).
        `free`: every batch is trained on `steps` times in a row (default 4), and the perturbation is moved by the gradient
        that moves the weights; there are as many times fewer epochs, so that it costs what ordinary training does (Shafahi et
        al., NeurIPS 2019).
    eps
        largest change of a pixel, on the scale of images in [0, 1].

    Raises ValueError for a kind that there isn't, for eps out of range and for steps that the kind can't take.
    """

    kind: str = "pgd"
    eps: float = 8 / 255
    steps: int | None = None  # the kind's default

    def __post_init__(self) -> None:
        if self.kind not in STEPS:
            raise ValueError(f"unknown adversary {self.kind!r}; known: {', '.join(STEPS)}")
        check_eps(self.eps)
        check_steps(self.count)
        if self.kind == "rfgsm" and self.count > 1:
            raise ValueError(f"rfgsm takes one gradient step, not {self.steps}: leave the number of steps out, or choose pgd")

    @property
    def count(self) -> int:
        """The number of steps, its default included."""
        return STEPS[self.kind] if self.steps is None else self.steps

    @property
    def replays(self) -> int:
        """How many times in a row every batch is trained on."""
        return self.count if self.kind == "free" else 1

    def passes(self, epochs: int) -> int:
        """How many times the images are gone through in so many epochs' worth of training."""
        return math.ceil(epochs / self.replays)


def check_steps(steps: int) -> None:
    """Raise ValueError unless a number of steps is an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of attack steps is {steps!r}; it must be an integer of at least 1")


@dataclass(frozen=True, eq=False)
class Ball:
    """Where a perturbed input may lie: within `radius` of the input, entry by entry, and from `low` to `high`.

    eps: on the scale of images in [0, 1], what the radius was made from.
    radius, low, high: in the network's input space, of shape (C, 1, 1) or one that broadcasts against it.
    """

    eps: float
    radius: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, network: Network, eps: float) -> Ball:
        """In the input space of a network that takes (image - mean) / std."""
        check_eps(eps)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (network.mean, network.std))
        # Computed as `Network.preprocess` does it, so that black and white are exactly the bounds.
        return cls(eps, eps / std, (0 - mean) / std, (1 - mean) / std)

    def to(self, device: torch.device) -> Ball:
        return Ball(self.eps, self.radius.to(device), self.low.to(device), self.high.to(device))

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


def input_gradient(module: nn.Module, loss: Loss) -> Callable[[Tensor], Tensor]:
    """The gradient of a loss of the outputs in the inputs; no parameter's gradient is touched."""

    def gradient(x: Tensor) -> Tensor:
        # Whoever calls may have switched gradients off, and in a thread of its own they have their own switch.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(module(x)), x)
        return found

    return gradient


def pgd(gradient: Callable[[Tensor], Tensor], inputs: Tensor, ball: Ball, steps: int, generator: torch.Generator) -> Tensor:
    """x <- project(x + 2.5 eps / steps sign(gradient(x))), from a uniformly random point of the ball (Madry et al., ICLR 2018,
    equation 3)."""
    x = ball.project(inputs + ball.radius * (2 * _random(torch.rand, inputs, generator) - 1), inputs)
    for _ in range(steps):
        x = ball.project(x + 2.5 / steps * ball.radius * gradient(x).sign(), inputs)
    return x


def rfgsm(gradient: Callable[[Tensor], Tensor], inputs: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """x' = x + alpha sign(N(0, 1)), then x' + (eps - alpha) sign(gradient(x')), alpha = eps / 2 (Tramer et al., ICLR 2018,
    section 4.1); both are kept within the range of images."""
    half = ball.radius / 2
    x = ball.project(inputs + half * _random(torch.randn, inputs, generator).sign(), inputs)
    return ball.project(x + half * gradient(x).sign(), inputs)


def _random(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    return draw(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it, every part of a module is in evaluation mode: what is attacked is the network as it will be used, and neither
    statistics of norms nor random numbers (dropout, stochastic rounding) are touched."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass
class Attack:
    """An adversary at work in a training: for every step, `perturb` the inputs and, once the loss has its gradients, `learn`.

    delta: the perturbation that `free` keeps from step to step, (batch, C, H, W) in input space; None before the first.
    """

    adversary: Adversary
    ball: Ball
    delta: Tensor | None = None

    def perturb(self, module: nn.Module, inputs: Tensor, loss: Loss, generator: torch.Generator) -> Tensor:
        """Inputs to train on in place of these. For `free` they ask for a gradient: that of the step that trains on them."""
        if self.adversary.kind == "free":
            if self.delta is None:
                self.delta = torch.zeros_like(inputs)
            # The last batch of a pass may be smaller.
            return self.ball.project(inputs + self.delta[: len(inputs)], inputs).requires_grad_()
        gradient = input_gradient(module, loss)
        with evaluating(module):
            if self.adversary.kind == "rfgsm":
                return rfgsm(gradient, inputs, self.ball, generator)
            return pgd(gradient, inputs, self.ball, self.adversary.count, generator)

    def learn(self, perturbed: Tensor) -> None:
        """Move the kept perturbation by eps along the sign of the gradient that the step left in the perturbed inputs (Shafahi
        et al., algorithm 1)."""
        if self.adversary.kind != "free":
            return
        assert self.delta is not None
        assert perturbed.grad is not None
        part = self.delta[: len(perturbed)]
        part.add_(self.ball.radius * perturbed.grad.sign())
        torch.clamp(part, -self.ball.radius, self.ball.radius, out=part)


@dataclass(frozen=True, eq=False)
class Proxy:
    """A few steps of PGD on the cross-entropy, always the same: what stands for an attacker while policies are searched.

    ball: see `Ball.of`. steps: of the attack. seed: of its random starts, which depend on nothing but a batch's number.
    """

    ball: Ball
    steps: int = PROXY_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @classmethod
    def of(cls, network: Network, eps: float, steps: int = PROXY_STEPS, seed: int = 0) -> Proxy:
        """For inputs that `network.preprocess` made of uint8 images."""
        return cls(Ball.of(network, eps), steps, seed)

    def __str__(self) -> str:
        return f"PGD-{self.steps} at eps {describe_eps(self.ball.eps)}"

    def __call__(self, module: nn.Module, inputs: Tensor, labels: Tensor, number: int) -> Tensor:
        """Adversarial inputs for the batch of that number: inputs (N, C, H, W), labels (N,). The module is in evaluation mode.
        It is differentiated straight through its quantizers."""
        generator = torch.Generator().manual_seed(self.seed + number)
        labels = labels.to(inputs.device)
        # Summed, not averaged: one image's gradient is not made smaller by the others, down to where its sign is lost.
        gradient = input_gradient(module, lambda outputs: F.cross_entropy(outputs, labels, reduction="sum"))
        return pgd(gradient, inputs, self.ball.to(inputs.device), self.steps, generator)


def worst_case(network: Network, split: Split, module: nn.Module, proxy: Proxy, batch_size: int = 250) -> float:
    """The share of `split` that `module` classifies correctly both as it is and attacked, 0..1. Raises ValueError for images
    of unknown range."""
    check_images(split)
    module.eval()
    right = 0
    for number, (images, labels) in enumerate(split.batches(batch_size)):
        inputs = network.preprocess(images)
        attacked = proxy(module, inputs, labels, number)
        with torch.inference_mode():
            answers = torch.stack([module(inputs).argmax(1), module(attacked).argmax(1)])
        right += int((answers == labels).all(0).sum())
    return right / len(split)
