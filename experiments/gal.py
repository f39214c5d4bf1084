"""Whether channels that GAL leaves out are better left out than random ones.

    python -m experiments.gal [--seeds N] [--images N] [--epochs N] [--quick]

Lin, Ji, Yan, Zhang, Cao, Ye, Huang, Doermann, "Towards Optimal Structured CNN Pruning via Generative Adversarial Learning",
CVPR 2019: channels get soft masks that are learned against a discriminator, without labels, and those that become zero are
removed. The paper reports next to no loss (ResNet-56 on CIFAR-10: 0.3 points at 38 % fewer multiplications).

Here: a plain network of four convolutions on Fashion-MNIST. It is trained; then `gal` takes half of as many epochs again to
learn masks, and the other half to fine-tune what is left. The penalty was chosen by the multiplications that it leaves, before
any accuracy was looked at. Beside it, all from the same trained network, in as many epochs, and with labels in all of them:

    unpruned               all channels, trained on
    random, same widths    random channels, in every layer as many as GAL left
    random, even widths    random channels, in all layers the same share: the largest that costs no more than GAL's network

and Scratch-B (Liu et al., ICLR 2019): GAL's small network from random weights, for the multiplications that the training of
the whole network took, at most twice its epochs.
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
from haq.training.gal import GenerativeAdversarial
from quantizers.pruning import ChannelGroups, channel_groups, remove_channels

NAME = "gal"
BATCH, RATE, TUNING_RATE = 64, 0.1, 0.02
PENALTY, MASK_RATE = 0.35, 0.003
CUT = 30.0  # percent of the multiply-accumulates, at least
UNPRUNED, GAL, SAME, EVEN, SCRATCH = "unpruned", "GAL", "random, same widths", "random, even widths", "Scratch-B"
ORDER = (UNPRUNED, GAL, SAME, EVEN, SCRATCH)
EXAMPLE = torch.zeros(1, 1, 28, 28)


class Outcome(NamedTuple):
    """One network that was trained."""

    seed: int
    who: str
    accuracy: float  # percent
    macs: float  # percent of the unpruned network's
    channels: str  # of every convolution
    epochs: int  # after the training of the whole network


class Job(NamedTuple):
    """What is trained on, and how long."""

    train: data.Split
    test: data.Split
    epochs: int
    penalty: float = PENALTY


def macs(module: nn.Module) -> int:
    """Count the multiply-accumulates of a network, for one image."""
    return sum(layer.macs for layer in hw_models.trace(copy.deepcopy(module).eval(), EXAMPLE).layers)


def widths(module: nn.Module) -> tuple[int, ...]:
    """Return the output channels of every convolution."""
    return tuple(layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d))


def drawn(groups: ChannelGroups, counts: Sequence[int], seed: int) -> dict[str, tuple[int, ...]]:
    """Draw so many channels of every group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group, count in zip(groups.groups, counts, strict=True):
        order = torch.randperm(group.channels, generator=generator)
        kept[group.name] = tuple(sorted(order[:count].tolist()))
    return kept


def even_counts(module: nn.Module, groups: ChannelGroups, most: int) -> list[int]:
    """Find the largest share of all groups at which a network costs no more than so many multiply-accumulates."""
    best = [1 for _ in groups.groups]
    for sixteenths in range(1, 65):
        counts = [group.count(sixteenths / 64) for group in groups.groups]
        if macs(remove_channels(module, groups, drawn(groups, counts, 0))) <= most:
            best = counts
    return best


def one_seed(job: Job, seed: int) -> list[Outcome]:
    """Train a network, prune it in all ways, and fine-tune what is left."""
    whole = shared.seeded(seed, shared.convolutional)
    config = training.TrainConfig(epochs=job.epochs, learning_rate=RATE, seed=seed, batch_size=BATCH)
    shared.trained(whole, job.train, config)
    full = macs(whole)
    groups = channel_groups(whole, EXAMPLE)
    tuning = training.TrainConfig(epochs=job.epochs, learning_rate=TUNING_RATE, seed=seed + 100, batch_size=BATCH)

    outcomes = []

    def add(who: str, module: nn.Module, epochs: int) -> None:
        words = "-".join(map(str, widths(module)))
        outcomes.append(Outcome(seed, who, shared.tested(module, job.test), 100 * macs(module) / full, words, epochs))

    method = GenerativeAdversarial(job.penalty, rate=MASK_RATE)
    masked = shared.trained(copy.deepcopy(whole), job.train, tuning, method)
    smaller = method.rebuilt(masked)
    left = macs(smaller)
    add(GAL, smaller, job.epochs)
    add(UNPRUNED, shared.trained(copy.deepcopy(whole), job.train, tuning), job.epochs)
    for who, counts in ((SAME, widths(smaller)), (EVEN, even_counts(whole, groups, left))):
        pruned = remove_channels(whole, groups, drawn(groups, counts, seed))
        add(who, shared.trained(pruned, job.train, tuning), job.epochs)
    epochs = min(2 * job.epochs, round(job.epochs * full / left))
    scratch = shared.seeded(seed + 200, lambda: shared.convolutional(widths(smaller)))
    config = training.TrainConfig(epochs=epochs, learning_rate=RATE, seed=seed + 200, batch_size=BATCH)
    add(SCRATCH, shared.trained(scratch, job.train, config), epochs)
    return outcomes


def of(outcomes: Sequence[Outcome], who: str, what: str = "accuracy") -> list[float]:
    """Return what was measured of one kind of network, seed by seed."""
    return [getattr(o, what) for o in outcomes if o.who == who]


def page(job: Job, outcomes: Sequence[Outcome]) -> shared.Page:
    """Make the page."""

    def gains(other: str) -> list[float]:
        pairs = zip(of(outcomes, GAL), of(outcomes, other), strict=True)
        return [mine - its for mine, its in pairs]

    cuts = [100 - share for share in of(outcomes, GAL, "macs")]
    each = ", ".join(f"{cut:.0f} %" for cut in cuts)
    claims = [
        shared.Claim(f"at least {CUT:.0f} % of the multiplications are gone, with every seed", min(cuts) >= CUT, each),
        shared.within("the paper's direction: GAL is at most 0.5 points below the unpruned network", gains(UNPRUNED), 0.5),
        shared.above("GAL is above random channels of the same widths", gains(SAME)),
        shared.within("GAL is no worse than random channels of the same widths, in the mean", gains(SAME), 0.0),
        shared.above("GAL is above random channels of even widths", gains(EVEN)),
        shared.above("GAL is above the small network from scratch (Scratch-B)", gains(SCRATCH)),
    ]
    rows = []
    for who in ORDER:
        share = shared.spread(of(outcomes, who, "macs"))
        channels = ", ".join(o.channels for o in outcomes if o.who == who)
        rows.append([who, str(shared.spread(of(outcomes, who))), f"{share.mean:.0f}", channels])
    about = [
        f"four convolutions on {len(job.train):,} images of Fashion-MNIST, tested on {len(job.test):,}",
        f"{job.epochs} epochs of training; then {job.epochs} epochs of what the table says, for GAL half with masks against "
        f"the discriminator (penalty {job.penalty:g}, rate of masks {MASK_RATE:g}) and half of fine-tuning",
    ]
    columns = ("network", "accuracy", "multiplications, % of all", "channels of each seed")
    return shared.Page("GAL against random channels", about, claims, columns, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = shared.parser_of(NAME, __doc__)
    parser.add_argument("--images", type=int, default=4032, help="to train on")
    parser.add_argument("--epochs", type=int, default=8, help="of training, and of pruning with fine-tuning")
    parser.add_argument("--penalty", type=float, default=PENALTY, help="of masks")
    options = parser.parse_args(arguments)
    job = prepared(options)
    return shared.run(NAME, options, lambda seed: one_seed(job, seed), lambda outcomes: page(job, outcomes))


def prepared(options: argparse.Namespace) -> Job:
    """Load what is trained on."""
    if options.quick:
        options.images, options.epochs, options.seeds = 128, 2, min(options.seeds, 2)
    train, test = shared.samples(options.images)
    job = Job(train, test, options.epochs, options.penalty)
    if options.quick:
        job = job._replace(test=test.subset(torch.arange(200)))
    return job


if __name__ == "__main__":
    sys.exit(run_command(main))
