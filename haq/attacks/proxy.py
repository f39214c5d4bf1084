"""A cheap attack that stands for an attacker while policies are searched.

It raises the loss of an objective: the cross-entropy, or whatever else a network is judged by. Where nothing but the network's
worth is known, `AttackedNetwork` attacks its own inputs.

It is no evaluation of robustness: that takes many attacks, and `haq.robustness` is for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haq.attacks.gradient import input_gradient, pgd
from haq.attacks.threat_model import TOLERANCE, PerturbationBall, check_images, check_steps, describe_eps
from haq.data import Split
from haq.networks import Network

PROXY_STEPS = 3


class Attackable(Protocol):
    """An objective, as far as an attack looks at it (`haq.problem.objective.Objective`)."""

    def attacked_loss(self, network: nn.Module, inputs: Tensor, targets: Any) -> Callable[[Any], Tensor]:
        """Make the loss that an attack raises.

        Args:
            network: The network that is attacked.
            inputs: As they are without an attack.
            targets: Of the batch; None where nobody knows them.

        Returns:
            A function of the network's outputs that returns a scalar.
        """


@dataclass(frozen=True, eq=False)
class ProxyAttack:
    """A few steps of PGD on a loss, mostly the cross-entropy, always the same.

    Attributes:
        ball: Where perturbed inputs may lie, see `PerturbationBall.of`.
        steps: Of the attack.
        seed: Of its random starts, which depend on nothing but a batch's number.
    """

    ball: PerturbationBall
    steps: int = PROXY_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the steps."""
        check_steps(self.steps)

    @classmethod
    def of(cls, network: Network, eps: float | str, steps: int = PROXY_STEPS, seed: int = 0) -> ProxyAttack:
        """Make the attack for inputs that `network.preprocess` made of uint8 images.

        Args:
            network: The network, with its mean and standard deviation.
            eps: The largest change of a pixel, on the scale of images in [0, 1]; a number or a text such as "8/255".
            steps: Of the attack.
            seed: Of its random starts.

        Returns:
            The attack.

        Raises:
            ValueError: For an eps on another scale, and for no number of steps.
        """
        return cls(PerturbationBall.of(network, eps), steps, seed)

    def __str__(self) -> str:
        """Name the attack: "PGD-3 at eps 8/255"."""
        return f"PGD-{self.steps} at eps {describe_eps(self.ball.eps)}"

    def __call__(self, module: nn.Module, inputs: Tensor, labels: Tensor, number: int) -> Tensor:
        """Return adversarial inputs for a batch; the gradient passes straight through the quantizers.

        Args:
            module: The network, in evaluation mode.
            inputs: (N, C, H, W), in the network's input space.
            labels: int64 (N,).
            number: The batch's.

        Returns:
            Inputs of the same shape.
        """
        labels = labels.to(inputs.device)
        # Summed, not averaged: one image's gradient is not made smaller by the others, down to where its sign is lost.
        return self._climb(module, lambda outputs: F.cross_entropy(outputs, labels, reduction="sum"), inputs, number)

    def raise_loss(self, module: nn.Module, loss: Callable[[Any], Tensor], inputs: Tensor, number: int) -> Tensor:
        """Return inputs for a batch that raise any loss.

        Args:
            module: The network, in evaluation mode.
            loss: Of the network's outputs: a scalar, the sum over the samples.
            inputs: Shape (N, C, H, W), in the network's input space.
            number: The batch's.

        Returns:
            Inputs of the same shape.

        Raises:
            ValueError: For inputs that are no images of the range that the ball is of.
        """
        self._check(inputs)
        return self._climb(module, loss, inputs, number)

    def attacking(self, module: nn.Module, objective: Attackable) -> AttackedNetwork:
        """Return the network that attacks its own inputs, to be judged by who is given it.

        Args:
            module: The network.
            objective: Gives the loss that the attack raises.

        Returns:
            A module that perturbs its inputs before the network sees them.
        """
        return AttackedNetwork(module, self, objective)

    def _climb(self, module: nn.Module, loss: Callable[[Any], Tensor], inputs: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + number)
        return pgd(input_gradient(module, loss), inputs, self.ball.to(inputs.device), self.steps, generator)

    def _check(self, inputs: object) -> None:
        """Raise ValueError unless inputs are images of the range that the ball is of."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() != 4:
            what = type(inputs).__name__
            if isinstance(inputs, Tensor):
                what = f"{str(inputs.dtype).removeprefix('torch.')} of shape {tuple(inputs.shape)}"
            raise ValueError(f"an attack is of images, one tensor of floats of shape (N, C, H, W), not {what}")
        ball = self.ball.to(inputs.device)
        channels = ball.radius.numel()
        if channels not in (1, inputs.shape[1]):
            raise ValueError(f"the attack is of images of {channels} channels, not {inputs.shape[1]}")
        if bool((inputs < ball.low - TOLERANCE).any()) or bool((inputs > ball.high + TOLERANCE).any()):
            raise ValueError(
                f"inputs from {float(inputs.min()):.4g} to {float(inputs.max()):.4g} leave the range of images that the "
                f"attack is of, {float(ball.low.min()):.4g} to {float(ball.high.max()):.4g}: give the ball of their range "
                "(haq.attacks.threat_model.PerturbationBall)"
            )


class AttackedNetwork(nn.Module):
    """Attacks its inputs before it looks at them: what they say is moved as far as it goes from what it would be.

    For who is given a network and nobody knows what it looks at. Its parameters are those of the network.
    """

    def __init__(self, module: nn.Module, proxy: ProxyAttack, objective: Attackable) -> None:
        """Take what is attacked.

        Args:
            module: The network, in evaluation mode.
            proxy: The attack.
            objective: Tells the loss that is raised.
        """
        super().__init__()
        self.module = module
        self.proxy = proxy
        self.objective = objective
        self.calls = 0
        self.eval()

    def forward(self, inputs: Tensor) -> Any:
        """Return what the network says of attacked inputs. Raises ValueError for what are no images."""
        self.proxy._check(inputs)
        with torch.inference_mode(False), torch.no_grad():
            inputs = inputs.detach().clone()
            loss = self.objective.attacked_loss(self.module, inputs, None)
            attacked = self.proxy.raise_loss(self.module, loss, inputs, self.calls)
        self.calls += 1
        return self.module(attacked)


def worst_case(network: Network, split: Split, module: nn.Module, proxy: ProxyAttack, batch_size: int = 250) -> float:
    """Measure the share of a split that is classified correctly both as it is and attacked.

    Args:
        network: What preprocesses the images.
        split: The images, uint8, and their labels.
        module: The network that is measured; it is put in evaluation mode.
        proxy: The attack.
        batch_size: Images at a time, on which the attack's random starts depend.

    Returns:
        The share, 0..1.

    Raises:
        ValueError: For images of unknown range.
    """
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
