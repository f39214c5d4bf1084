"""Attackers that a network is trained against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.attacks.gradient import Loss, check_steps, evaluating, input_gradient, pgd, rfgsm
from haq.attacks.threat_model import PerturbationBall, check_eps

STEPS = {"pgd": 7, "free": 4, "rfgsm": 1}  # by default, by kind


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


@dataclass
class TrainingAttack:
    """An adversary at work in a training: for every step, `perturb` the inputs and, once the loss has its gradients, `learn`.

    delta: the perturbation that `free` keeps from step to step, (batch, C, H, W) in input space; None before the first.
    """

    adversary: Adversary
    ball: PerturbationBall
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
