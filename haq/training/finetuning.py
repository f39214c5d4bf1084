"""Fine-tuning: a quantized network back to its accuracy, with the float network as teacher."""

from __future__ import annotations

import copy
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
from haq.training.loop import fit

TUNING_BATCH = 32  # images of a step of `finetune`
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
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> nn.Module:
    """A copy of a quantized network, trained at its bits with straight-through gradients and the float network as teacher, for
    `epochs`, or for `steps` if these are given. Labels play no part. `penalty`, `adversary` and `state` are those of `fit`.

    The activation scales are trained as well. Batch norms first take their statistics anew from the quantized network, on the
    first `norm_images`, and then keep them: with few images, statistics that wander cost more than they adapt.
    """
    tuned = copy.deepcopy(qnetwork)
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    small = max(network.input_shape[1:]) <= SMALL
    with torch.random.fork_rng(devices=[]):
        # What the network itself draws (dropout) comes from the seed too, whatever was computed before.
        torch.manual_seed(seed)
        refresh_norms(network, tuned, split, norm_images)
        scales = Q.activation_scales(tuned)
        with one_thread() if small else nullcontext():
            fit(
                network,
                split,
                module=tuned,
                teacher=network.module.eval(),
                scales=scales,
                fixed_norms=True,
                batch_size=TUNING_BATCH,  # many small steps: with few images it is their number that counts
                epochs=epochs,
                learning_rate=learning_rate,
                seed=seed,
                penalty=penalty,
                adversary=adversary,
                state=state,
                steps=steps,
                on_epoch=on_epoch,
                on_step=on_step,
            )
    for scale in scales:
        scale.requires_grad_(False)
    return tuned


@dataclass(frozen=True)
class ShortTuning:
    """Fine-tuning in the loop of a search, as HAQ does it (Wang et al., CVPR 2019): some steps of `finetune` from
    the float weights, for every policy alike and always the same. A callable for `haq.Problem(tune=)`."""

    network: Network
    split: Split
    steps: int
    seed: int

    def __call__(self, qnetwork: nn.Module) -> nn.Module:
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
    """Give the batch norms of `module` the mean and variance over the first images of a split, in place."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
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
