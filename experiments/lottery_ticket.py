"""Whether a lottery ticket trains better than its mask with other weights, and better than its weights under another mask.

    python -m experiments.lottery_ticket [--seeds N] [--images N] [--epochs N] [--quick]

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019: train, mask the weights of the smallest magnitude in
every layer, put the others back to where they began, and so on. Their networks at a tenth of the weights learn faster
than the whole one and reach what it does; the same masks on newly drawn weights fall off. Here it is LeNet-300-100
(Glorot initialisation, Adam at 1.2e-3, batches of 60, as there) on Fashion-MNIST, without augmentation. A round masks
32 % of what survives (16 % of the last layer, the paper's half), so that 6 rounds leave a tenth; the paper takes 20 %.

Compared at the same density, with the same order of images and as many steps:

    ticket     the survivors, put back to their first values          (`haq train --method lottery`)
    reinit     the same masks, all weights newly drawn
    shuffled   the same weights, each layer's mask shuffled
    whole      no mask

Accuracy after the first epoch says who learns faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments import training_methods as shared
from haq import data, training
from haq.console.errors import run_command
from haq.networks import Network
from haq.training.lottery_ticket import LotteryTicket, MaskedWeights
from quantizers.pruning.lottery_ticket import mask_density, shuffled_masks

NAME = "lottery_ticket"
WHOLE, TICKET, REINIT, SHUFFLED = "whole", "ticket", "reinit", "shuffled"
SHARE, TENTH, LAST = 0.32, 6, 9  # of a round; rounds that leave a tenth; rounds in all
COMPARED = (TENTH, LAST)  # rounds after which other networks have the same masks
OTHER = 1000  # added to a seed for weights that are newly drawn


class Outcome(NamedTuple):
    """One network that was trained."""

    seed: int
    rounds: int
    density: float  # percent of the weights
    who: str
    first: float  # accuracy after the first epoch, percent
    accuracy: float  # in the end, percent


class Job(NamedTuple):
    """What is trained on, and how long."""

    train: data.Split
    test: data.Split
    epochs: int
    rounds: int = LAST
    compared: tuple[int, ...] = COMPARED


def lenet() -> nn.Module:
    """Make LeNet-300-100, for flattened images of 28 x 28."""
    made = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return made


def flattened(split: data.Split) -> data.Split:
    """Return images as rows of normalised numbers, which aren't mirrored or moved."""
    images, labels = split.take(torch.arange(len(split)))
    return data.Split((images.float().flatten(1) / 255 - 0.286) / 0.353, labels)


def fitted(job: Job, module: nn.Module, method: Any, seed: int, parts: int = 1) -> list[tuple[float, float]]:
    """Train a network, once or in as many parts as a method makes of it.

    Returns:
        For every part the accuracy after its first and after its last epoch, in percent.
    """
    network = Network("lenet-300-100", module, (784,))
    config = training.TrainConfig(
        epochs=parts * job.epochs,
        learning_rate=1.2e-3,
        seed=seed,
        batch_size=60,
        weight_decay=0.0,
        optimizer="adam",
        schedule="constant",
    )
    first: list[float] = []
    last: list[float] = []

    def on_epoch(epoch: int, _: float) -> None:
        place = (epoch - 1) % job.epochs
        if place in (0, job.epochs - 1):
            accuracy = 100 * training.accuracy(network, job.test)
            if place == 0:
                first.append(accuracy)
            if place == job.epochs - 1:
                last.append(accuracy)
        if isinstance(method, Noted):
            method.note()

    training.fit(network, job.train, config, method=method, on_epoch=on_epoch)
    return list(zip(first, last, strict=True))


class Noted(LotteryTicket):
    """A lottery ticket that keeps the masks of all its rounds."""

    def __init__(self, rounds: int) -> None:
        """Take the number of rounds."""
        super().__init__(rounds=rounds, share=SHARE)
        self.by_round: list[dict[str, Tensor]] = []

    def note(self) -> None:
        """Note the masks after an epoch, if they are new."""
        if not self.by_round or self.by_round[-1] is not self.masks:
            self.by_round.append(self.masks)


def one_seed(job: Job, seed: int) -> list[Outcome]:
    """Find the tickets of a seed, and train what they are held against."""
    method = Noted(job.rounds)
    found = fitted(job, shared.seeded(seed, lenet), method, seed, job.rounds + 1)
    outcomes = []
    for number, (first, last) in enumerate(found):
        density = 100 * mask_density(method.by_round[number])
        who = TICKET
        if number == 0:
            who = WHOLE
        outcomes.append(Outcome(seed, number, density, who, first, last))
    for number in job.compared:
        masks = method.by_round[number]
        elsewhere = shuffled_masks(masks, torch.Generator().manual_seed(seed))
        for who, drawn, given in ((REINIT, seed + OTHER, masks), (SHUFFLED, seed, elsewhere)):
            ((first, last),) = fitted(job, shared.seeded(drawn, lenet), MaskedWeights(given), seed)
            outcomes.append(Outcome(seed, number, 100 * mask_density(given), who, first, last))
    return outcomes


def of(outcomes: Sequence[Outcome], rounds: int, who: str, what: str = "accuracy") -> list[float]:
    """Return what was measured of one kind of network, seed by seed."""
    return [getattr(o, what) for o in outcomes if (o.rounds, o.who) == (rounds, who)]


def differences(outcomes: Sequence[Outcome], rounds: int, other: str, what: str = "accuracy") -> list[float]:
    """Return by how many points the ticket is better than another of the same density, seed by seed."""
    return [a - b for a, b in zip(of(outcomes, rounds, TICKET, what), of(outcomes, rounds, other, what), strict=True)]


def row(outcomes: Sequence[Outcome], number: int) -> list[str]:
    """Write what is known of one density: the accuracies, and in brackets those after the first epoch."""
    owners = [TICKET, REINIT, SHUFFLED]
    if number == 0:
        owners[0] = WHOLE
    cells = []
    for who in owners:
        words = "–"
        if of(outcomes, number, who):
            accuracy, first = (shared.spread(of(outcomes, number, who, what)) for what in ("accuracy", "first"))
            words = f"{accuracy} ({first.mean:.1f})"
        cells.append(words)
    return [str(number), f"{of(outcomes, number, owners[0], 'density')[0]:.1f} %", *cells]


def page(job: Job, outcomes: Sequence[Outcome]) -> shared.Page:
    """Make the page."""
    whole = of(outcomes, 0, WHOLE)
    claims = []
    for number in job.compared:
        density = f"{of(outcomes, number, TICKET, 'density')[0]:.1f} %"
        for other, words in ((REINIT, "its mask on newly drawn weights"), (SHUFFLED, "its weights under shuffled masks")):
            claims.append(
                shared.above(f"at {density} of the weights the ticket is above {words}", differences(outcomes, number, other))
            )
        faster = differences(outcomes, number, REINIT, "first")
        claims.append(shared.above(f"at {density} the ticket learns faster: after one epoch it is above reinit", faster))
        against = [a - b for a, b in zip(of(outcomes, number, TICKET), whole, strict=True)]
        claims.append(shared.within(f"at {density} the ticket reaches the whole network, within 0.3 points", against, 0.3))
    rows = [row(outcomes, number) for number in range(job.rounds + 1)]
    about = [
        f"LeNet-300-100 on {len(job.train):,} images of Fashion-MNIST, {job.epochs} epochs of Adam each, tested on "
        f"{len(job.test):,}; in brackets the accuracy after the first epoch",
        "the whole network stands in the column of tickets, at 100 %",
    ]
    return shared.Page(
        "Lottery tickets against other weights and other masks",
        about,
        claims,
        ("rounds", "weights that survive", TICKET, REINIT, SHUFFLED),
        rows,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment."""
    parser = shared.parser_of(NAME, __doc__)
    parser.add_argument("--images", type=int, default=6000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4, help="of every training")
    options = parser.parse_args(arguments)
    job = prepared(options)
    return shared.run(NAME, options, lambda seed: one_seed(job, seed), lambda outcomes: page(job, outcomes))


def prepared(options: argparse.Namespace) -> Job:
    """Load what is trained on."""
    if options.quick:
        options.images, options.epochs, options.seeds = 600, 1, 2
    train, test = map(flattened, shared.samples(options.images))
    job = Job(train, test, options.epochs)
    if options.quick:
        job = job._replace(rounds=2, compared=(2,), test=test.subset(torch.arange(200)))
    return job


if __name__ == "__main__":
    sys.exit(run_command(main))
