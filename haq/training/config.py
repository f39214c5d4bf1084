"""How a network is trained. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haq.training.adversaries import Adversary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    import quantizers as Q

OPTIMIZERS = ("sgd", "adam")

OnEpoch = Callable[[int, float], None]  # epochs done, and the mean loss of the last
OnStep = Callable[[int, int], None]  # steps done, and in all


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
        epochs: How often the images are gone through.
        learning_rate: The highest; it rises for a few steps, then falls to 0 along a cosine.
        seed: Of all that is random, but for what the network itself draws (dropout).
        batch_size: Images of a step.
        weight_decay: Of weights; biases, norms and what a quantization scheme learns have nothing to decay towards.
        optimizer: `sgd` (Nesterov, momentum 0.9), `adam`, or a function that makes optimizers for a module, whose own
            learning rates then stand for `learning_rate`.
        steps: Batches in all, in place of `epochs`.
        fixed_norms: Whether batch norms keep their statistics.
        train_scales: Whether the activation scales of quantized layers are trained, where their scheme doesn't train them
            anyway. They stay positive.
        penalty: Of the module: a number that is added to the loss.
        clipping: Clips weights after every step.
        adversary: What inputs are perturbed by, to raise the loss. Of `free`, every batch is replayed, in as many times
            fewer epochs.
    """

    epochs: int
    learning_rate: float
    seed: int
    batch_size: int = 128
    weight_decay: float = 1e-4
    optimizer: str | Callable[[nn.Module], Sequence[torch.optim.Optimizer]] = "sgd"
    steps: int | None = None
    fixed_norms: bool = False
    train_scales: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None
    clipping: Q.WeightClipping | None = None
    adversary: Adversary | None = None

    def __post_init__(self) -> None:
        """Check the optimizer's name."""
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")


def no_epoch(epoch: int, loss: float) -> None:
    """Report an epoch to nobody."""


def no_step(step: int, steps: int) -> None:
    """Report a step to nobody."""
