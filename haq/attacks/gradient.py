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
Gradient = Callable[[Tensor], Tensor]  # of inputs: of the same shape


def input_gradient(module: nn.Module, loss: Loss) -> Gradient:
    """Make a function of the inputs: the gradient of a loss of the outputs, 0 where it is NaN.

    No parameter's gradient is touched.
    """

    def gradient(x: Tensor) -> Tensor:
        # Whoever calls may have switched gradients off, and in a thread of its own they have their own switch.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(module(x)), x)
        return found.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    return gradient


def pgd(gradient: Gradient, inputs: Tensor, ball: PerturbationBall, steps: int, generator: torch.Generator) -> Tensor:
    """Climb from a uniformly random point of the ball (Madry et al., ICLR 2018, equation 3).

    x <- project(x + 2.5 eps / steps sign(gradient(x)))

    Args:
        gradient: Of the loss that is raised, in the inputs.
        inputs: (N, C, H, W), in the network's input space.
        ball: Where perturbed inputs may lie.
        steps: How many.
        generator: Of the random start.

    Returns:
        Perturbed inputs.
    """
    start = 2 * _random(torch.rand, inputs, generator) - 1
    x = ball.project(inputs + ball.radius * start, inputs)
    for _ in range(steps):
        x = ball.project(x + 2.5 / steps * ball.radius * gradient(x).sign(), inputs)
    return x


def rfgsm(gradient: Gradient, inputs: Tensor, ball: PerturbationBall, generator: torch.Generator) -> Tensor:
    """Go half of the way at random, and the other half along the gradient (Tramer et al., ICLR 2018, section 4.1).

    x' = x + alpha sign(N(0, 1)), then x' + (eps - alpha) sign(gradient(x')), alpha = eps / 2; both are kept within the range
    of images.

    Args:
        gradient: Of the loss that is raised, in the inputs.
        inputs: (N, C, H, W), in the network's input space.
        ball: Where perturbed inputs may lie.
        generator: Of the random half.

    Returns:
        Perturbed inputs.
    """
    half = ball.radius / 2
    x = ball.project(inputs + half * _random(torch.randn, inputs, generator).sign(), inputs)
    return ball.project(x + half * gradient(x).sign(), inputs)


def _random(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    return draw(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of a module in evaluation mode, within it.

    What is attacked is the network as it will be used, and neither statistics of norms nor random numbers (dropout,
    stochastic rounding) are touched.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
