"""How a network is trained. Importing this needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from haq.problem.chance import standard_error
from haq.training.adversaries import Adversary
from haq.training.optimizers import check_optimizer, check_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    import quantizers as Q

AUXILIARY = 0.3  # weight of an auxiliary output's loss (Szegedy et al., "Going deeper with convolutions", CVPR 2015)

SHARE_OF_USUAL = 0.3  # of the learning rate that an optimizer of torch has by default, for fine-tuning
GIVE_UP_AFTER = 200  # steps of the fine-tuning of a search, after which it ends if it came no nearer to the float network
ENOUGH_STEPS = 100  # of fine-tuning: with fewer, its default learning rate is lower

OnEpoch = Callable[[int, float], None]  # epochs done, and the mean loss of the last
OnStep = Callable[[int, int], None]  # steps done, and in all


class Judgement(NamedTuple):
    """What a network is worth on held-out samples.

    Attributes:
        accuracy: The objective's value; of classification the share of samples that are answered as they should be, 0 to 1.
        loss: The mean loss, which is lower for a better network: the divergence of the outputs from the float network's
            (nats, for class scores), or the loss that is trained.
        images: How many samples there are; 0 if that plays no part.
        higher_is_better: Whether a larger value is better.
        error: The standard error of the value; None: that of a share of so many samples.
    """

    accuracy: float
    loss: float
    images: int = 0
    higher_is_better: bool = True
    error: float | None = None

    @property
    def value(self) -> float:
        """Return the objective's value."""
        return self.accuracy

    @property
    def score(self) -> float:
        """Return a number that is larger for a better value."""
        if self.higher_is_better:
            return self.accuracy
        return -self.accuracy

    def beats(self, other: Judgement) -> bool:
        """Say whether this is the better one of two: of less loss, and no worse in its value by more than a standard error.

        The loss comes first: among a few hundred answers, one more or less is chance.

        Args:
            other: The judgement that is the best so far.

        Returns:
            False for equal ones.
        """
        margin = 0.0
        if other.error is not None:
            margin = other.error
        elif self.images:
            margin = standard_error(other.accuracy, self.images)
        if not math.isfinite(margin):
            margin = 0.0
        return self.loss < other.loss and self.score >= other.score - margin


@dataclass(frozen=True)
class Outcome:
    """What became of a training whose network was judged after every epoch.

    Attributes:
        images: How many held-out images the judgements stand on.
        before: The judgement of the network before; None if it wasn't among those that could be kept.
        epochs: The judgements after the epochs.
        kept: The number of the epoch whose network was kept, from 1; 0 for the network before.
        diverged: Whether training ended early, since the loss was no number any more.
        stopped: Whether it ended early, since so many epochs in a row were no better (`TrainConfig.patience`), or none was
            better than the network before (`TrainConfig.give_up_after`).
    """

    images: int
    before: Judgement | None
    epochs: tuple[Judgement, ...]
    kept: int
    diverged: bool = False
    stopped: bool = False

    @property
    def best(self) -> Judgement:
        """Return the judgement of the network that was kept."""
        if self.kept:
            return self.epochs[self.kept - 1]
        assert self.before is not None
        return self.before


OnJudged = Callable[[int, Judgement], None]  # epochs done, and what the network is worth
OnOutcome = Callable[[Outcome], None]  # told how a training ended


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
        epochs: How often the samples are gone through.
        learning_rate: The highest; it rises for a few steps, then goes as `schedule` says.
        seed: Of all that is random, but for what the network itself draws (dropout).
        batch_size: Samples of a step.
        weight_decay: Of weights; biases, norms and what a quantization scheme learns have nothing to decay towards.
        optimizer: `sgd` (Nesterov, momentum 0.9), `adam`, the name of a class of `torch.optim`, such as AdamW, or a function
            that makes optimizers for a module, whose own learning rates then stand for `learning_rate`.
        schedule: Of the learning rate. `cosine`: it falls to 0 along a cosine. `linear`: along a line. `step`: it is divided
            by 10 after half and after three quarters of the steps (He et al., CVPR 2016). `constant`. Or the name of a class
            of `torch.optim.lr_scheduler`, with arguments if need be: "StepLR,step_size=10,gamma=0.5". These are without the
            rise, and step after every epoch, OneCycleLR and CyclicLR after every batch.
        steps: Batches in all, in place of `epochs`.
        fixed_norms: Whether batch norms keep their statistics.
        train_scales: Whether the activation scales of quantized layers are trained, where their scheme doesn't train them
            anyway. They stay positive.
        penalty: Of the module: a number that is added to the loss.
        clipping: Clips weights after every step.
        adversary: What inputs are perturbed by, to raise the loss. Of `free`, every batch is replayed, in as many times
            fewer epochs.
        patience: So many epochs in a row without a lower loss on held-out samples end a training; None: none do.
        amp: Whether networks compute in half precision where that is safe (`torch.autocast`): bfloat16, or float16 with scaled
            losses on GPUs that can't do that. Parameters and quantization scales stay float32, and so do losses.
        auxiliary: Weight of the losses of auxiliary outputs, which some networks have in training mode.
        give_up_after: A training ends after the epoch in which it has taken so many steps, if none until then had a lower loss
            on held-out samples than the network before, where that was judged; None: it doesn't.

    Raises:
        ValueError: Naming the setting and its value, for what no training can have.
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
    schedule: str = "cosine"
    patience: int | None = None
    amp: bool = False
    auxiliary: float = AUXILIARY
    give_up_after: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers, and the names of the optimizer and the schedule."""
        if self.steps is None and self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs!r}; it must be at least 0")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"steps is {self.steps!r}; it must be an integer of at least 1, or None for whole epochs")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be a number, not below 0")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be at least 2, since norms need two images")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise ValueError(f"patience is {self.patience!r}; it must be a number of epochs of at least 1, or None for no end")
        if self.give_up_after is not None and (not isinstance(self.give_up_after, int) or self.give_up_after < 1):
            raise ValueError(
                f"give_up_after is {self.give_up_after!r}; it must be a number of steps of at least 1, or None for no end"
            )
        if not (math.isfinite(self.auxiliary) and self.auxiliary >= 0):
            raise ValueError(f"auxiliary is {self.auxiliary!r}; it must be a number, not below 0")
        if not callable(self.optimizer):
            check_optimizer(self.optimizer)
        check_schedule(self.schedule)


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
