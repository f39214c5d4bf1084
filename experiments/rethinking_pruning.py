"""Whether a pruned network needs the weights that pruning leaves, or only its shape.

    python -m experiments.rethinking_pruning [--seeds N] [--images N] [--epochs N] [--quick]

Liu, Sun, Zhou, Huang, Darrell, "Rethinking the Value of Network Pruning", ICLR 2019: for structured pruning the smaller
network, trained from random weights, reaches what fine-tuning the pruned one does. Here: four convolutions on
Fashion-MNIST, the channels of the smallest L1 norm removed from every layer (Li et al., ICLR 2017, `quantizers.prune`),
and the smaller network

    fine-tuned   for a third of the epochs, at a tenth of the learning rate, as is usual
    Scratch-E    from random weights, for as many epochs as the whole network was trained
    Scratch-B    from random weights, for as many MACs as the whole network was trained with: MACs of a sample times
                 samples, at most twice the epochs, as in the paper

All with SGD and a cosine schedule. Any pruning is worth what it adds to Scratch-B, so that these rows stand beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

import hw_models
import quantizers as Q
from experiments import training_methods as shared
from haq import data, training
from haq.console.errors import run_command

NAME = "rethinking_pruning"
WHOLE, PRUNED, TUNED, SCRATCH_E, SCRATCH_B = "whole", "pruned", "fine-tuned", "Scratch-E", "Scratch-B"
ROWS = (PRUNED, TUNED, SCRATCH_E, SCRATCH_B)
KEEPS = (0.75, 0.5)  # shares of every layer's channels
BATCH, RATE = 64, 0.1  # `haq train` would take this rate for such batches
TUNING_EPOCHS, TUNING_RATE = 1 / 3, 0.1  # of those of the whole network
MOST = 2.0  # times as many epochs, at most
OTHER = 1000  # added to a seed for weights that are newly drawn
CLOSE = 0.3  # points


class Outcome(NamedTuple):
    """One network that was trained."""

    seed: int
    keep: float
    who: str
    macs: int  # of a sample
    steps: int
    samples: int  # that it was trained on, in all
    accuracy: float  # percent

    @property
    def budget(self) -> int:
        """Return the MACs of forward passes over all samples that it was trained on."""
        return self.macs * self.samples


class Job(NamedTuple):
    """What is trained on, and how long."""

    train: data.Split
    test: data.Split
    epochs: int

    @property
    def steps(self) -> int:
        """Return the steps of the whole network."""
        return self.epochs * (len(self.train) // BATCH)


def macs_of(module: nn.Module) -> int:
    """Return the MACs of a sample."""
    return hw_models.trace(module, torch.zeros(1, 1, 28, 28)).macs


def scratch_b_steps(steps: int, whole: int, pruned: int) -> int:
    """Return for how many steps a smaller network is trained with the MACs of the whole one.

    Args:
        steps: Of the whole network.
        whole: Its MACs for a sample.
        pruned: Those of the smaller one.

    Returns:
        The steps, at most `MOST` times as many.
    """
    return round(steps * min(MOST, whole / pruned))


def fitted(job: Job, module: nn.Module, steps: int, rate: float, seed: int) -> nn.Module:
    """Train a network in place for so many steps."""
    config = training.TrainConfig(epochs=0, steps=steps, learning_rate=rate, seed=seed, batch_size=BATCH)
    return shared.trained(module, job.train, config)


def one_seed(job: Job, seed: int) -> list[Outcome]:
    """Train the whole network, prune it, and train the smaller ones."""
    outcomes = []
    whole = fitted(job, shared.seeded(seed, shared.convolutional), job.steps, RATE, seed)
    macs = macs_of(whole)

    def note(keep: float, who: str, module: nn.Module, steps: int) -> None:
        accuracy = shared.tested(module, job.test)
        outcomes.append(Outcome(seed, keep, who, macs_of(module), steps, steps * BATCH, accuracy))

    note(1.0, WHOLE, whole, job.steps)
    for keep in KEEPS:
        pruned = Q.prune(whole, keep, criterion="l1", example=torch.zeros(2, 1, 28, 28))
        note(keep, PRUNED, pruned, 0)
        steps = round(TUNING_EPOCHS * job.steps)
        note(keep, TUNED, fitted(job, Q.copy_network(pruned), steps, TUNING_RATE * RATE, seed), steps)
        for who in (SCRATCH_E, SCRATCH_B):
            steps = job.steps
            if who == SCRATCH_B:
                steps = scratch_b_steps(job.steps, macs, macs_of(pruned))
            widths = [layer.out_channels for layer in pruned.modules() if isinstance(layer, nn.Conv2d)]
            fresh = shared.seeded(seed + OTHER, lambda widths=widths: shared.convolutional(widths))  # type: ignore[misc]
            note(keep, who, fitted(job, fresh, steps, RATE, seed), steps)
    return outcomes


def of(outcomes: Sequence[Outcome], keep: float, who: str, what: str = "accuracy") -> list[float]:
    """Return what is known of one kind of network, seed by seed."""
    return [getattr(o, what) for o in outcomes if (o.keep, o.who) == (keep, who)]


def page(job: Job, outcomes: Sequence[Outcome]) -> shared.Page:
    """Make the page."""
    claims, rows = [], []
    (whole_macs, *_), (whole_budget, *_) = (of(outcomes, 1.0, WHOLE, what) for what in ("macs", "budget"))
    rows.append(["100 %", WHOLE, f"{whole_macs:,}", f"{job.steps:,}", "1.00", str(shared.spread(of(outcomes, 1.0, WHOLE)))])
    for keep in KEEPS:
        tuned = of(outcomes, keep, TUNED)
        named = f"with {100 * keep:.0f} % of the channels"
        for who in (SCRATCH_E, SCRATCH_B):
            behind = [a - b for a, b in zip(of(outcomes, keep, who), tuned, strict=True)]
            claims.append(shared.within(f"{named} {who} reaches the fine-tuned network, within {CLOSE} points", behind, CLOSE))
        behind = [a - b for a, b in zip(of(outcomes, keep, SCRATCH_B), tuned, strict=True)]
        claims.append(shared.above(f"{named} Scratch-B is above the fine-tuned network", behind))
        claims.append(budget_claim(outcomes, keep, whole_macs, whole_budget))
        for who in ROWS:
            macs, steps, budget = (of(outcomes, keep, who, what)[0] for what in ("macs", "steps", "budget"))
            share = f"{budget / whole_budget:.2f}"
            rows.append(
                [f"{100 * keep:.0f} %", who, f"{macs:,}", f"{steps:,}", share, str(shared.spread(of(outcomes, keep, who)))]
            )
    about = [
        f"four convolutions on {len(job.train):,} images of Fashion-MNIST, {job.epochs} epochs of the whole network, tested "
        f"on {len(job.test):,}",
        "the rows of pruned and fine-tuned networks leave out the training of the whole network, from which both start",
        *undertrained(outcomes),
    ]
    columns = ("channels", "network", "MACs of a sample", "steps", "MACs of the training, of the whole one's", "accuracy")
    return shared.Page("What pruned networks are worth beside the same ones from scratch", about, claims, columns, rows)


def undertrained(outcomes: Sequence[Outcome]) -> list[str]:
    """Say so where a smaller network becomes better than the whole one by more epochs, which that one could gain by, too."""
    made = []
    for keep in KEEPS:
        gains = [a - b for a, b in zip(of(outcomes, keep, SCRATCH_B), of(outcomes, 1.0, WHOLE), strict=True)]
        if shared.spread(gains).mean > 0:
            made.append(
                f"with {100 * keep:.0f} % of the channels Scratch-B is {shared.spread(gains).mean:.2f} points above the whole "
                "network, which has fewer epochs: these trainings are short, so that epochs count for more than in the paper"
            )
    return made


def budget_claim(outcomes: Sequence[Outcome], keep: float, whole_macs: float, whole_budget: float) -> shared.Claim:
    """Say whether Scratch-B was trained with the MACs of the whole network, or with the most that it may have."""
    macs, budget = (of(outcomes, keep, SCRATCH_B, what)[0] for what in ("macs", "budget"))
    allowed = min(1.0, MOST * macs / whole_macs)
    share = budget / whole_budget
    words = f"with {100 * keep:.0f} % of the channels Scratch-B has the MACs of the whole network's training, within 1 %"
    if allowed < 1:
        words = (
            f"with {100 * keep:.0f} % of the channels Scratch-B has twice the epochs, the most that it may have, within 1 %"
        )
    return shared.Claim(words, abs(share / allowed - 1) <= 0.01, f"{share:.3f} of them")


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = shared.parser_of(NAME, __doc__)
    parser.add_argument("--images", type=int, default=4032, help="to train on, a multiple of the batch")
    parser.add_argument("--epochs", type=int, default=12, help="of the whole network")
    options = parser.parse_args(arguments)
    job = prepared(options)
    return shared.run(NAME, options, lambda seed: one_seed(job, seed), lambda outcomes: page(job, outcomes))


def prepared(options: argparse.Namespace) -> Job:
    """Load what is trained on."""
    if options.quick:
        options.images, options.epochs, options.seeds = 256, 3, 2
    if options.images % BATCH:
        raise ValueError(f"--images is {options.images}; it must be a multiple of {BATCH}, so that budgets are exact")
    train, test = shared.samples(options.images)
    if options.quick:
        test = test.subset(torch.arange(200))
    return Job(train, test, options.epochs)


if __name__ == "__main__":
    sys.exit(run_command(main))
