"""A cheap attack that stands for an attacker while policies are searched.

It is no evaluation of robustness: that takes many attacks, and `haq.robustness` is for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haq.attacks.gradient import input_gradient, pgd
from haq.attacks.threat_model import PerturbationBall, check_images, check_steps, describe_eps
from haq.data import Split
from haq.networks import Network

PROXY_STEPS = 3


@dataclass(frozen=True, eq=False)
class ProxyAttack:
    """A few steps of PGD on the cross-entropy, always the same.

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
        generator = torch.Generator().manual_seed(self.seed + number)
        labels = labels.to(inputs.device)
        # Summed, not averaged: one image's gradient is not made smaller by the others, down to where its sign is lost.
        gradient = input_gradient(module, lambda outputs: F.cross_entropy(outputs, labels, reduction="sum"))
        return pgd(gradient, inputs, self.ball.to(inputs.device), self.steps, generator)


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
