"""Steps along the gradient of a loss in a network's inputs: what cheap attacks are made of.

Everything is computed where the network's inputs are, (image - mean) / std. Quantizers pass the gradient straight through, as
they do in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from haq.attacks.threat_model import PerturbationBall

Loss = Callable[[Tensor], Tensor]  # of a network's outputs: a number


def input_gradient(module: nn.Module, loss: Loss) -> Callable[[Tensor], Tensor]:
    """The gradient of a loss of the outputs in the inputs; no parameter's gradient is touched."""

    def gradient(x: Tensor) -> Tensor:
        # Whoever calls may have switched gradients off, and in a thread of its own they have their own switch.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(module(x)), x)
        return found

    return gradient


def pgd(
    gradient: Callable[[Tensor], Tensor], inputs: Tensor, ball: PerturbationBall, steps: int, generator: torch.Generator
) -> Tensor:
    """x <- project(x + 2.5 eps / steps sign(gradient(x))), from a uniformly random point of the ball (Madry et al., ICLR 2018,
    equation 3)."""
    x = ball.project(inputs + ball.radius * (2 * _random(torch.rand, inputs, generator) - 1), inputs)
    for _ in range(steps):
        x = ball.project(x + 2.5 / steps * ball.radius * gradient(x).sign(), inputs)
    return x


def rfgsm(gradient: Callable[[Tensor], Tensor], inputs: Tensor, ball: PerturbationBall, generator: torch.Generator) -> Tensor:
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


def check_steps(steps: int) -> None:
    """Raise ValueError unless a number of steps is an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of attack steps is {steps!r}; it must be an integer of at least 1")
