"""Whether RePr trains better filters than the same training without it.

    python -m experiments.repr [--seeds N] [--images N] [--epochs N] [--quick]

Prakash, Storer, Florencio, Zhang, "RePr: Improved Training of Convolutional Filters", CVPR 2019: filters that overlap
most with others of their layer are dropped for a while, and come back orthogonal to these. The paper reports gains
everywhere, most of all for small plain networks; two reproductions on CIFAR that we know of saw little or none.

Here: a plain network of four convolutions on Fashion-MNIST, SGD with a cosine schedule. Three cycles of 2 epochs with
all filters and 1 without 30 % of them, and then all to the end of 16 epochs (`haq train --method "repr(share=0.3,
cycles=3, full=2, reduced=1)"`). In the paper cycles fill nine tenths of the training, at a constant rate; with a rate
that falls to nothing, what comes back late would have no time to learn, so that here they fill nine sixteenths.
Standard training has the same network, order of images, schedule and epochs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from experiments import training_methods as shared
from haq import data, training
from haq.console.errors import run_command
from haq.training.repr_method import RePr, ranked_layers
from quantizers.pruning.filter_overlap import mean_overlap

NAME = "repr"
STANDARD, WITH = "standard", "RePr"
BATCH, RATE = 64, 0.1  # `haq train` would take this rate for such batches
CYCLES, FULL, REDUCED, SHARE = 3, 2, 1, 0.3


class Outcome(NamedTuple):
    """One network that was trained."""

    seed: int
    who: str
    accuracy: float  # percent
    overlap: float  # mean over the ranked filters, in the end


class Job(NamedTuple):
    """What is trained on, and how long."""

    train: data.Split
    test: data.Split
    epochs: int
    cycles: int = CYCLES
    full: int = FULL
    reduced: int = REDUCED


def one_seed(job: Job, seed: int) -> list[Outcome]:
    """Train the same network with RePr and without."""
    outcomes = []
    for who in (STANDARD, WITH):
        method = None
        if who == WITH:
            method = RePr(share=SHARE, cycles=job.cycles, full=job.full, reduced=job.reduced)
        config = training.TrainConfig(epochs=job.epochs, learning_rate=RATE, seed=seed, batch_size=BATCH)
        module = shared.trained(shared.seeded(seed, shared.convolutional), job.train, config, method)
        overlap = mean_overlap({name: layer.weight for name, layer in ranked_layers(module).items()})
        outcomes.append(Outcome(seed, who, shared.tested(module, job.test), overlap))
    return outcomes


def of(outcomes: Sequence[Outcome], who: str, what: str = "accuracy") -> list[float]:
    """Return what was measured of one kind of training, seed by seed."""
    return [getattr(o, what) for o in outcomes if o.who == who]


def page(job: Job, outcomes: Sequence[Outcome]) -> shared.Page:
    """Make the page."""
    gains = [a - b for a, b in zip(of(outcomes, WITH), of(outcomes, STANDARD), strict=True)]
    falls = [a - b for a, b in zip(of(outcomes, WITH, "overlap"), of(outcomes, STANDARD, "overlap"), strict=True)]
    means = [shared.spread(of(outcomes, who, "overlap")).mean for who in (STANDARD, WITH)]
    overlap = shared.Claim(
        "filters overlap less in the end than with standard training, with every seed",
        all(fall < 0 for fall in falls),
        f"{means[1]:.4f} against {means[0]:.4f} in the mean",
    )
    claims = [
        shared.above("RePr is above standard training", gains),
        shared.within("RePr is at most 0.5 points below standard training", gains, 0.5),
        overlap,
    ]
    rows = []
    for who in (STANDARD, WITH):
        words = f"{shared.spread(of(outcomes, who, 'overlap')).mean:.4f}"
        rows.append([who, str(shared.spread(of(outcomes, who))), words])
    epochs = f"{job.full} epochs with all filters and {job.reduced} without {100 * SHARE:.0f} % of them"
    about = [
        f"four convolutions on {len(job.train):,} images of Fashion-MNIST, {job.epochs} epochs, tested on {len(job.test):,}",
        f"{job.cycles} cycles of {epochs}, then all to the end",
        f"a cycle is {(job.full + job.reduced) * len(job.train) // BATCH} steps, where the paper has 30 epochs of 50,000 "
        "images: filters that come back, and what the next layers do with them, have little time to learn here",
    ]
    return shared.Page("RePr against standard training", about, claims, ("training", "accuracy", "mean overlap"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = shared.parser_of(NAME, __doc__)
    parser.add_argument("--images", type=int, default=3072, help="to train on")
    parser.add_argument("--epochs", type=int, default=16, help="of every training")
    options = parser.parse_args(arguments)
    job = prepared(options)
    return shared.run(NAME, options, lambda seed: one_seed(job, seed), lambda outcomes: page(job, outcomes))


def prepared(options: argparse.Namespace) -> Job:
    """Load what is trained on."""
    if options.quick:
        options.images, options.epochs, options.seeds = 128, 3, 2
    train, test = shared.samples(options.images)
    job = Job(train, test, options.epochs)
    if options.quick:
        job = job._replace(test=test.subset(torch.arange(200)), cycles=1, full=1, reduced=1)
    return job


if __name__ == "__main__":
    sys.exit(run_command(main))
