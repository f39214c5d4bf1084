"""Whether groups that a convolution learns are better than fixed random ones.

    python -m experiments.learned_groups [--seeds N] [--images N] [--epochs N] [--quick]

Wang, Kan, Shan, Chen, "Fully Learnable Group Convolution for Acceleration of Deep Neural Networks", CVPR 2019: input channels
and filters learn which group they belong to, together with the weights, and the paper finds them better than groups that are
given (MobileNetV2 on CIFAR-10: 1.3 points below the dense network with 8 groups). A reproduction says that what is gained is
less than the half point by which its runs differ.

Here: a plain network of four convolutions on Fashion-MNIST, trained from random weights with `flgc(groups=G)`, with the same
groups that are not learned (even, drawn at random; `learned=False`), and without groups. Whatever is compared has the same
weights and the same groups at the start, and the same order of images. Learned groups may become uneven, so that they take
more or fewer multiplications than even ones: the table has them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

import hw_models
from experiments import training_methods as shared
from haq import data, training
from haq.console.errors import run_command
from haq.training.flgc import LearnedGroups
from quantizers.pruning import learned_groups

NAME = "learned_groups"
BATCH, RATE = 64, 0.1
GROUPS = (4, 8)
DENSE, LEARNED, FIXED = "no groups", "learned", "fixed, random"
EXAMPLE = torch.zeros(1, 1, 28, 28)


class Outcome(NamedTuple):
    """One network that was trained."""

    seed: int
    who: str
    groups: int
    accuracy: float  # percent
    macs: float  # percent of the dense network's
    moved: float  # percent of the channels that are in another group than at the start
    dead: int  # input channels that no filter reads, and filters that read none


class Job(NamedTuple):
    """What is trained on, and how long."""

    train: data.Split
    test: data.Split
    epochs: int
    groups: Sequence[int] = GROUPS


def macs(module: nn.Module) -> int:
    """Count the multiply-accumulates of a network, for one image."""
    return sum(layer.macs for layer in hw_models.trace(copy.deepcopy(module).eval(), EXAMPLE).layers)


def one_seed(job: Job, seed: int) -> list[Outcome]:
    """Train the same network without groups, and with learned and fixed ones."""
    config = training.TrainConfig(epochs=job.epochs, learning_rate=RATE, seed=seed, batch_size=BATCH)
    dense = shared.trained(shared.seeded(seed, shared.convolutional), job.train, config)
    full = macs(dense)
    outcomes = [Outcome(seed, DENSE, 1, shared.tested(dense, job.test), 100.0, 0.0, 0)]
    for groups in job.groups:
        made = {}
        for who in (FIXED, LEARNED):
            method = LearnedGroups(groups, learned=who == LEARNED)
            module = shared.trained(shared.seeded(seed, shared.convolutional), job.train, config, method)
            made[who] = method.rebuilt(module).eval()
        # Fixed groups are those that learned ones began with.
        start, end = learned_groups(made[FIXED]), learned_groups(made[LEARNED])
        moved = count = 0
        for name, first in start.items():
            before, after = (*first.inputs, *first.outputs), (*end[name].inputs, *end[name].outputs)
            moved += sum(one != other for one, other in zip(before, after, strict=True))
            count += len(before)
        dead = sum(len(grouping.dead_inputs) + len(grouping.dead_outputs) for grouping in end.values())
        for who, share, lost in ((FIXED, 0.0, 0), (LEARNED, 100 * moved / count, dead)):
            accuracy = shared.tested(made[who], job.test)
            outcomes.append(Outcome(seed, who, groups, accuracy, 100 * macs(made[who]) / full, share, lost))
    return outcomes


def of(outcomes: Sequence[Outcome], who: str, groups: int, what: str = "accuracy") -> list[float]:
    """Return what was measured of one kind of network, seed by seed."""
    return [getattr(o, what) for o in outcomes if o.who == who and o.groups == groups]


def page(job: Job, outcomes: Sequence[Outcome]) -> shared.Page:
    """Make the page."""
    claims = []
    everything: list[float] = []
    rows = [[DENSE, "1", str(shared.spread(of(outcomes, DENSE, 1))), "100", "–", "–"]]
    for groups in job.groups:
        learned, fixed = of(outcomes, LEARNED, groups), of(outcomes, FIXED, groups)
        gains = [a - b for a, b in zip(learned, fixed, strict=True)]
        everything += gains
        claims.append(shared.within(f"{groups} groups: learned ones are no worse than fixed ones, in the mean", gains, 0.0))
        claims.append(shared.above(f"{groups} groups, the paper's direction: learned ones are above fixed ones", gains))
        for who in (LEARNED, FIXED):
            row = [who, str(groups), str(shared.spread(of(outcomes, who, groups)))]
            for what, digits in (("macs", 1), ("moved", 0), ("dead", 1)):
                row.append(f"{shared.spread(of(outcomes, who, groups, what)).mean:.{digits}f}")
            rows.append(row)
    words = f"over {len(everything)} pairs of all numbers of groups: learned ones are above fixed ones"
    claims.append(shared.above(words, everything))
    about = [
        f"four convolutions on {len(job.train):,} images of Fashion-MNIST, {job.epochs} epochs, tested on {len(job.test):,}; "
        "the first convolution, which has one input channel, stays as it is",
        "accuracies and multiplications are those of the network of group convolutions that comes out",
    ]
    columns = ("groups", "number", "accuracy", "multiplications, % of all", "channels that moved, %", "dead channels")
    return shared.Page("Learned groups against fixed ones", about, claims, columns, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = shared.parser_of(NAME, __doc__)
    parser.add_argument("--images", type=int, default=3008, help="to train on")
    parser.add_argument("--epochs", type=int, default=10, help="of every training")
    options = parser.parse_args(arguments)
    job = prepared(options)
    return shared.run(NAME, options, lambda seed: one_seed(job, seed), lambda outcomes: page(job, outcomes))


def prepared(options: argparse.Namespace) -> Job:
    """Load what is trained on."""
    if options.quick:
        options.images, options.epochs, options.seeds = 128, 1, min(options.seeds, 2)
    train, test = shared.samples(options.images)
    job = Job(train, test, options.epochs)
    if options.quick:
        job = job._replace(test=test.subset(torch.arange(200)), groups=(4,))
    return job


if __name__ == "__main__":
    sys.exit(run_command(main))
