"""Attackers that a network is trained against. Importing this needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haq.attacks.threat_model import PerturbationBall, check_eps, check_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haq.attacks.gradient import Loss

STEPS = {"pgd": 7, "free": 4, "rfgsm": 1}  # by default, by kind


@dataclass(frozen=True)
class Adversary:
    """An attacker that a network is trained against.

    Attributes:
        kind: `pgd`: projected gradient ascent from a random start in the ball (Madry et al., ICLR 2018), in `steps` of
            2.5 eps / steps. `rfgsm`: a random step of eps / 2, then a gradient step of the rest (Tramer et al., ICLR 2018).
            `free`: every batch is trained on `steps` times in a row, and the perturbation is moved by the gradient that
            moves the weights; there are as many times fewer epochs, so that it costs what ordinary training does (Shafahi et
            al., NeurIPS 2019).
        eps: The largest change of a pixel, on the scale of images in [0, 1]; may be given as a text, "8/255".
        steps: How many; None: 7 of pgd, 4 of free, 1 of rfgsm.

    Raises:
        ValueError: For a kind that there isn't, for eps out of range and for steps that the kind can't take.
    """

    kind: str = "pgd"
    eps: float = 8 / 255
    steps: int | None = None

    def __post_init__(self) -> None:
        """Check everything."""
        if self.kind not in STEPS:
            raise ValueError(f"unknown adversary {self.kind!r}; known: {', '.join(STEPS)}")
        object.__setattr__(self, "eps", check_eps(self.eps))
        check_steps(self.count)
        if self.kind == "rfgsm" and self.count > 1:
            raise ValueError(f"rfgsm takes one gradient step, not {self.steps}: leave the number of steps out, or choose pgd")

    @property
    def count(self) -> int:
        """The number of steps, its default included."""
        if self.steps is None:
            return STEPS[self.kind]
        return self.steps

    @property
    def replays(self) -> int:
        """How many times in a row every batch is trained on."""
        if self.kind == "free":
            return self.count
        return 1

    def passes(self, epochs: int) -> int:
        """Return how many times the images are gone through in so many epochs' worth of training.

        Args:
            epochs: Epochs' worth of training.

        Returns:
            Passes: with `free` replays, fewer than epochs.
        """
        return math.ceil(epochs / self.replays)


@dataclass
class TrainingAttack:
    """An adversary at work in a training: for every step, `perturb` the inputs and, once the loss has its gradients, `learn`.

    Attributes:
        adversary: What it does.
        ball: Where perturbed inputs may lie.
        delta: The perturbation that `free` keeps from step to step, (batch, C, H, W) in input space; None before the first.
    """

    adversary: Adversary
    ball: PerturbationBall
    delta: Tensor | None = None

    def perturb(self, module: nn.Module, inputs: Tensor, loss: Loss, generator: torch.Generator) -> Tensor:
        """Return inputs to train on in place of these.

        Args:
            module: What is trained.
            inputs: (N, C, H, W), in the network's input space.
            loss: Of the outputs, which is raised.
            generator: Of random starts.

        Returns:
            Inputs of the same shape. Those of `free` ask for a gradient: that of the step that trains on them.
        """
        import torch

        from haq.attacks.gradient import evaluating, input_gradient, pgd, rfgsm

        if self.adversary.kind == "free":
            if self.delta is None:
                self.delta = torch.zeros_like(inputs)
            # The last batch of a pass may be smaller, or larger by one.
            more = inputs[len(self.delta) :]
            if len(more):
                self.delta = torch.cat([self.delta, torch.zeros_like(more)])
            return self.ball.project(inputs + self.delta[: len(inputs)], inputs).requires_grad_()
        gradient = input_gradient(module, loss)
        with evaluating(module):
            if self.adversary.kind == "rfgsm":
                return rfgsm(gradient, inputs, self.ball, generator)
            return pgd(gradient, inputs, self.ball, self.adversary.count, generator)

    def learn(self, perturbed: Tensor) -> None:
        """Move the perturbation that `free` keeps (Shafahi et al., algorithm 1).

        It moves by eps along the sign of the gradient that the step left in the perturbed inputs.

        Args:
            perturbed: The perturbed inputs of the step, whose `grad` is set.
        """
        if self.adversary.kind != "free":
            return
        assert self.delta is not None
        assert perturbed.grad is not None
        part = self.delta[: len(perturbed)]
        part.add_(self.ball.radius * perturbed.grad.sign())
        part.clamp_(-self.ball.radius, self.ball.radius)
