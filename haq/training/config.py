"""How a network is trained. Importing this needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from haq.problem.chance import standard_error
from haq.training.adversaries import Adversary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    import quantizers as Q

OPTIMIZERS = ("sgd", "adam")

ENOUGH_STEPS = 100  # of fine-tuning: with fewer, its default learning rate is lower

OnEpoch = Callable[[int, float], None]  # epochs done, and the mean loss of the last
OnStep = Callable[[int, int], None]  # steps done, and in all


class Judgement(NamedTuple):
    """What a network is worth on held-out images.

    Attributes:
        accuracy: The share of them that it answers as it should, 0 to 1.
        loss: Its mean loss (nats).
        images: How many they are; 0 if that plays no part.
    """

    accuracy: float
    loss: float
    images: int = 0

    def beats(self, other: Judgement) -> bool:
        """Say whether this is the better one of two: of less loss, and no less accurate by more than a standard error.

        The loss comes first: among a few hundred answers, one more or less is chance.
        """
        margin = 0.0
        if self.images:
            margin = standard_error(other.accuracy, self.images)
        return self.loss < other.loss and self.accuracy >= other.accuracy - margin


@dataclass(frozen=True)
class Outcome:
    """What became of a training whose network was judged after every epoch.

    Attributes:
        images: How many held-out images the judgements stand on.
        before: The judgement of the network before; None if it wasn't among those that could be kept.
        epochs: The judgements after the epochs.
        kept: The number of the epoch whose network was kept, from 1; 0 for the network before.
        diverged: Whether training ended early, since the loss was no number any more.
    """

    images: int
    before: Judgement | None
    epochs: tuple[Judgement, ...]
    kept: int
    diverged: bool = False

    @property
    def best(self) -> Judgement:
        """Return the judgement of the network that was kept."""
        if self.kept:
            return self.epochs[self.kept - 1]
        assert self.before is not None
        return self.before


OnJudged = Callable[[int, Judgement], None]  # epochs done, and what the network is worth
OnOutcome = Callable[[Outcome], None]


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
        """Check the numbers and the optimizer's name."""
        if self.steps is None and self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs!r}; it must be at least 0")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"steps is {self.steps!r}; it must be an integer of at least 1, or None for whole epochs")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be a number, not below 0")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be at least 2, since norms need two images")
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")


def rate_for(rate: float, steps: int) -> float:
    """Return what of a default learning rate suits so many steps.

    Few steps can't make good what a high rate does at first: below ENOUGH_STEPS it falls with the root of their number.
    """
    return rate * min(1.0, math.sqrt(steps / ENOUGH_STEPS))


def no_judgement(epoch: int, judgement: Judgement) -> None:
    """Report a judgement to nobody."""


def no_outcome(outcome: Outcome) -> None:
    """Report an outcome to nobody."""


def no_epoch(epoch: int, loss: float) -> None:
    """Report an epoch to nobody."""


def no_step(step: int, steps: int) -> None:
    """Report a step to nobody."""
