"""Fine-tuning: a quantized network back to its accuracy, with the float network as teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.data import Split
from haq.networks import Network
from haq.problem.evaluator import one_thread
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import Adversary
from haq.training.config import OnEpoch, OnStep, TrainConfig, no_epoch, no_step
from haq.training.loop import batch_norms, fit

TUNING_BATCH = 32  # images of a step: many small steps, since with few images it is their number that counts
SMALL = 64  # pixels; a small batch of images up to this size is done sooner by one thread than by several


def finetune(
    network: Network,
    qnetwork: nn.Module,
    split: Split,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 0.005,
    steps: int | None = None,
    norm_images: int = 4000,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    adversary: Adversary | None = None,
    state: Checkpoint | None = None,
    on_epoch: OnEpoch = no_epoch,
    on_step: OnStep = no_step,
) -> nn.Module:
    """Train a copy of a quantized network at its bits, with the float network as teacher; labels play no part.

    What the layers' schemes learn is trained with the weights, and so are activation scales that a scheme keeps fixed by
    itself. Batch norms first take their statistics anew from the quantized network, and then keep them: with few images,
    statistics that wander cost more than they adapt.

    Args:
        network: The float network.
        qnetwork: The quantized one, of any scheme; it is left as it is.
        split: The images.
        epochs: How often they are gone through.
        seed: Of all that is random.
        learning_rate: The highest.
        steps: Batches in all, in place of `epochs`.
        norm_images: The first images of the split, on which batch norms take their statistics.
        penalty: Of the network: a number that is added to the loss.
        adversary: What it is trained against.
        state: Keeps what it takes to go on after every epoch; what it holds is gone on from.
        on_epoch: Told the epochs done and the last one's mean loss.
        on_step: Told the steps done and in all.

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        FloatingPointError: If the loss stops being a number.
        ValueError: For an adversary on images of unknown range, and a state of something else.
    """
    config = TrainConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        batch_size=TUNING_BATCH,
        steps=steps,
        fixed_norms=True,
        train_scales=True,
        penalty=penalty,
        adversary=adversary,
    )
    tuned = Q.copy_network(qnetwork)
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    small = max(network.input_shape[1:]) <= SMALL
    with torch.random.fork_rng(devices=[]):
        # What the network itself draws (dropout) comes from the seed too, whatever was computed before.
        torch.manual_seed(seed)
        refresh_norms(network, tuned, split, norm_images)
        with one_thread() if small else nullcontext():
            fit(
                network,
                split,
                config,
                module=tuned,
                teacher=network.module.eval(),
                state=state,
                on_epoch=on_epoch,
                on_step=on_step,
            )
    return tuned


@dataclass(frozen=True)
class ShortTuning:
    """Fine-tuning in the loop of a search, as HAQ does it (Wang et al., CVPR 2019). A callable for `haq.Problem(tune=)`.

    It is some steps of `finetune` from the float weights, for every policy alike and always the same.

    Attributes:
        network: The float network.
        split: The images.
        steps: How many.
        seed: Of all that is random.
    """

    network: Network
    split: Split
    steps: int
    seed: int

    def __call__(self, qnetwork: nn.Module) -> nn.Module:
        """Return a trained copy of a quantized network."""
        return finetune(
            self.network,
            qnetwork,
            self.split,
            epochs=0,
            steps=self.steps,
            seed=self.seed,
            norm_images=max(500, TUNING_BATCH * self.steps),
        )


@torch.no_grad()
def refresh_norms(network: Network, module: nn.Module, split: Split, images: int = 4000) -> None:
    """Give batch norms the mean and variance of what they see now, in place.

    Args:
        network: What preprocesses the images.
        module: What the norms are in; it is left in evaluation mode.
        split: The images.
        images: How many of the first are looked at.
    """
    norms = batch_norms(module)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    module.train()
    for batch, _ in split.subset(torch.arange(min(images, len(split)))).batches(500):
        module(network.preprocess(batch))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    module.eval()
