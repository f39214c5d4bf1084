"""Which criterion keeps the better channels, at equal multiplications, before and after the same short fine-tuning.

    OMP_NUM_THREADS=1 python -m experiments.pruning_criteria [--seeds N] [--networks NAME ...] [--quick] [--anew]
                                                             [--out FOLDER]

Two networks and the 8,000 training images of Fashion-MNIST that ship with haq, judged on the 2,000 test images: the default
network (mobilenet-mini, trained on 55,000 images for 30 epochs), and a small residual network that is trained here on the
8,000, for every seed anew. Every group of channels keeps the same share, the one at which the multiplications come closest
to 0.5 and 0.3 of the network's: all criteria keep as many channels of every group, and so they are compared at equal cost.
Batch norms take their statistics anew from 512 training images, which criteria that need data see with their labels
(cross-entropy). Fine-tuning is the same for all, 40 batches of 64 images: the unpruned network is the teacher, and the seed
draws the images.

A seed draws the 512 images, what `random` keeps, the order of fine-tuning and, of the small network, all of its training.
Differences are against `random` of the same seed; ± is the standard error of their mean over the seeds. The bar is that a
criterion is at least as good as random channels after fine-tuning, in the mean over the seeds, wherever it was compared.

The row Scratch-B (Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019) is the same smaller architecture,
trained from random weights by labels for as many multiplications as the whole network was, but at most twice the epochs. It
is of the small network: the training of the default one took 200 times as many images as there is time for here.

Every finished row is a line of pruning_criteria.csv, which a call goes on with; --anew forgets them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import hw_models
import quantizers as Q
from experiments import shared
from experiments.quantizer_accuracy import Table
from haq import data, networks, training
from haq.console.errors import run_command
from haq.console.tables import say
from haq.networks import Network
from haq.problem.evaluator import one_thread
from haq.store import files
from quantizers.pruning.criterion import select
from quantizers.pruning.shrinking import refresh_norms

NAME = "pruning_criteria"
FOLDER = Path("docs/experiments")
CRITERIA = ("l1", "l2", "bn-scale", "fpgm", "kse", "taylor", "ccp")
RANDOM, SCRATCH, WHOLE = "random", "Scratch-B", "unpruned"
TARGETS = (0.5, 0.3)  # of the multiplications
DEFAULT, SMALL = "mobilenet-mini", "small residual"
STEPS = 64  # shares that are tried, of all channels
SEEN = 512  # images for norms and criteria
TUNED_AT, SCRATCH_AT = 0.02, 0.1  # learning rates
BATCH = 64
SEEDS = 3


class Effort(NamedTuple):
    """How long everything is trained, and on how much it is judged."""

    images: int  # of the training split
    epochs: int  # of the small network
    tuning: int  # steps of a batch
    tested: int  # images of the test split


FULL = Effort(8000, 4, 40, 2000)
QUICK = Effort(600, 1, 2, 200)


class Row(NamedTuple):
    """One smaller network."""

    network: str
    target: float
    criterion: str
    seed: int
    macs: float  # of the whole network's
    share: float  # of every group's channels
    before: float  # accuracy in percent before fine-tuning
    after: float

    @property
    def key(self) -> tuple[str, float, str, int]:
        """What was asked for."""
        return self.network, self.target, self.criterion, self.seed


class Branch(nn.Sequential):
    """x + f(x), f being the modules in sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what the modules make of x to x."""
        made: Tensor = super().forward(x)
        return torch.relu(made + x)


def small_residual() -> nn.Module:
    """Make a residual network of dense convolutions for images of 28x28, with random weights."""

    def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]

    parts: list[nn.Module] = [*convolution(1, 16, 2), nn.ReLU(), *convolution(16, 32, 2), nn.ReLU()]
    branches = [Branch(*convolution(32, 32, 1), nn.ReLU(), *convolution(32, 32, 1)) for _ in range(2)]
    parts += [*branches, *convolution(32, 64, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*parts)


def build(name: str, seed: int) -> nn.Module:
    """Make a network with random weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == SMALL:
            return small_residual()
        return networks.load(DEFAULT, pretrained=False).module


def macs_of(module: nn.Module) -> int:
    """Count the multiplications for an image."""
    return hw_models.trace(module, torch.zeros(1, 1, 28, 28)).macs


class Bench:
    """One network of one seed, and what it is compared on."""

    def __init__(self, name: str, seed: int, dataset: data.Dataset, effort: Effort) -> None:
        """Load or train the network, and draw the images that criteria see."""
        self.name, self.seed, self.effort = name, seed, effort
        self.train = dataset.train.subset(torch.arange(effort.images))
        self.test = dataset.test.subset(torch.arange(effort.tested))
        if name == DEFAULT:
            self.network = networks.load(DEFAULT)
        else:
            self.network = Network(SMALL, build(SMALL, seed), (1, 28, 28), mean=(0.286,), std=(0.353,))
            config = training.TrainConfig(effort.epochs, SCRATCH_AT, seed)
            training.fit(self.network, self.train, config)
        self.network.module.eval()
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        chosen = self.train.subset(order[:SEEN])
        self.seen = [(self.network.preprocess(chosen.images), chosen.labels)]
        self.groups = Q.channel_groups(self.network.module, self.seen[0][0][:2])
        self.whole = macs_of(self.network.module)

    def accuracy(self, module: nn.Module) -> float:
        """Return the accuracy on the test split in percent."""
        return 100 * training.accuracy(self.network, self.test, module)

    @functools.cache  # noqa: B019  a bench lives as long as its rows are made
    def share_for(self, target: float) -> float:
        """Return the share of all groups' channels at which the multiplications come closest to a part of the whole's."""
        least, most = 1, STEPS
        while most - least > 1:
            middle = (least + most) // 2
            if self.macs_at(middle / STEPS) > target:
                most = middle
            else:
                least = middle
        return min((least / STEPS, most / STEPS), key=lambda share: abs(self.macs_at(share) - target))

    def macs_at(self, share: float) -> float:
        """Return the multiplications at a share, of the whole network's."""
        return macs_of(self.architecture(self.network.module, share)) / self.whole

    def architecture(self, module: nn.Module, share: float) -> nn.Module:
        """Make a smaller network of the first channels of every group."""
        kept = {name: tuple(range(group.count(share))) for name, group in self.groups.items()}
        return Q.remove_channels(module, self.groups, kept)

    @functools.cache  # noqa: B019  a bench lives as long as its rows are made
    def ranking(self, criterion: str) -> Q.Ranking:
        """Rank the channels of the network."""
        generator = torch.Generator().manual_seed(self.seed)
        found = Q.Criterion.named(criterion)
        return found.prepare(self.network.module, self.groups, self.seen, F.cross_entropy, generator)

    def row(self, target: float, criterion: str) -> Row:
        """Prune by a criterion, and fine-tune."""
        share = self.share_for(target)
        if criterion == SCRATCH:
            module, before = self.from_scratch(share), math.nan
        else:
            kept = select(self.ranking(criterion), self.groups, dict.fromkeys(self.groups, share))
            module = Q.remove_channels(self.network.module, self.groups, kept)
            refresh_norms(module, self.seen)
            before = self.accuracy(module)
            config = training.TrainConfig(1, TUNED_AT, self.seed, BATCH, steps=self.effort.tuning)
            training.fit(self.network, self.train, config, module=module, teacher=self.network.module)
            self.network.module.eval()
        macs = macs_of(module) / self.whole
        return Row(self.name, target, criterion, self.seed, macs, share, before, self.accuracy(module))

    def from_scratch(self, share: float) -> nn.Module:
        """Train the smaller architecture from random weights, by labels."""
        module = self.architecture(build(self.name, self.seed), share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + self.seed)
            for part in module.modules():
                reset = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()  # as of so few inputs
        epochs = self.effort.epochs * min(2.0, self.whole / macs_of(module))
        steps = max(1, round(epochs * len(self.train) / BATCH))
        config = training.TrainConfig(1, SCRATCH_AT, self.seed, BATCH, steps=steps)
        training.fit(self.network, self.train, config, module=module)
        return module


def asked(network: str, seed: int) -> list[tuple[str, float, str, int]]:
    """List the keys of the rows of a network and a seed."""
    criteria = [RANDOM, *CRITERIA]
    if network == SMALL:
        criteria.append(SCRATCH)
    keys = [(network, 1.0, WHOLE, seed)]
    for target in TARGETS:
        keys += [(network, target, criterion, seed) for criterion in criteria]
    return keys


def rows_of(bench: Bench, keys: Sequence[tuple[str, float, str, int]]) -> Iterator[Row]:
    """Make rows of a network and a seed."""
    for _, target, criterion, _ in keys:
        if criterion == WHOLE:
            value = bench.accuracy(bench.network.module)
            yield Row(bench.name, 1.0, WHOLE, bench.seed, 1.0, 1.0, value, value)
        else:
            yield bench.row(target, criterion)


class Spread(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return them; nothing is known of the error of a single value."""
        error = math.nan
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        return Spread(statistics.mean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {of_error(self.error)}"


def of(rows: Sequence[Row], network: str, target: float, criterion: str) -> list[Row]:
    """Return the rows of all seeds, in their order."""
    chosen = [row for row in rows if (row.network, row.target, row.criterion) == (network, target, criterion)]
    return sorted(chosen, key=lambda row: row.seed)


def against_random(rows: Sequence[Row], network: str, target: float, criterion: str, field: str) -> Spread:
    """Return the differences to random channels of the same seed, in points."""
    by_seed = {row.seed: getattr(row, field) for row in of(rows, network, target, RANDOM)}
    own = of(rows, network, target, criterion)
    return Spread.of([getattr(row, field) - by_seed[row.seed] for row in own if row.seed in by_seed])


def table(rows: Sequence[Row], network: str, target: float) -> Table:
    """Compare the criteria on a network at some multiplications."""
    whole = Spread.of([row.after for row in of(rows, network, 1.0, WHOLE)])
    example = of(rows, network, target, RANDOM)[0]
    title = (
        f"{network}: {example.macs:.3f} of the multiplications, {example.share:.3f} of every group's channels; unpruned "
        f"{whole} %"
    )
    made = Table(title, ("criterion", "before, %", "against random", "after fine-tuning, %", "against random", "seeds"))
    for criterion in (*CRITERIA, RANDOM, SCRATCH):
        own = of(rows, network, target, criterion)
        if not own:
            continue
        after, before, differs = str(Spread.of([row.after for row in own])), "–", "–"
        if criterion != SCRATCH:
            before = str(Spread.of([row.before for row in own]))
        differences = "–"
        if criterion != RANDOM:
            differences = signed(against_random(rows, network, target, criterion, "after"))
            if criterion != SCRATCH:
                differs = signed(against_random(rows, network, target, criterion, "before"))
        made.rows.append((criterion, before, differs, after, differences, str(len(own))))
    return made


def signed(found: Spread) -> str:
    return f"{found.mean:+.2f} ± {of_error(found.error)}"


def of_error(error: float) -> str:
    if math.isnan(error):
        return "?"
    return f"{error:.2f}"


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Hold every criterion against random channels, after fine-tuning."""
    for criterion in CRITERIA:
        parts, least = [], math.inf
        for network, target in compared(rows):
            if not of(rows, network, target, criterion):
                continue
            found = against_random(rows, network, target, criterion, "after")
            parts.append(f"{network} at {target:g} {signed(found)}")
            least = min(least, found.mean)
        if parts:
            yield f"{shared.verdict(least >= 0)}: {criterion} is at least as good as random ({', '.join(parts)})"


def compared(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Return the networks and multiplications that there are rows of."""
    return list(dict.fromkeys((row.network, row.target) for row in rows if row.criterion == RANDOM))


def document(rows: Sequence[Row], command: str) -> str:
    """Write the page."""
    about = (__doc__ or "").split("\n\n")
    parts = [
        "# Criteria of pruning at equal multiplications",
        f"Made by `experiments/{NAME}.py`; every smaller network is in `{NAME}.csv`.",
        f"    {command}",
        *(paragraph.replace("\n", " ") for paragraph in about[2:5]),
        *unfinished(rows),
        "\n".join(f"* {line}" for line in verdicts(rows)),
        *(table(rows, network, target).markdown() for network, target in compared(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def unfinished(rows: Sequence[Row]) -> Iterator[str]:
    """Say so if seeds are lacking: what the figures stand on is less than it was to be."""
    known = {row.key for row in rows}
    wanted = [key for name in (DEFAULT, SMALL) for seed in range(SEEDS) for key in asked(name, seed)]
    lacking = [key for key in wanted if key not in known]
    if lacking:
        yield (
            f"Not finished: {len(lacking)} of {len(wanted)} rows for {SEEDS} seeds are lacking. The last column says of "
            "how many seeds a row is; an error of few seeds says little. The same call goes on with them."
        )


def load_rows(path: Path) -> list[Row]:
    """Read the rows of an earlier call."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    made = []
    for line in lines:
        numbers = [float(line[name]) for name in ("macs", "share", "before", "after")]
        made.append(Row(line["network"], float(line["target"]), line["criterion"], int(line["seed"]), *numbers))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--networks", nargs="+", choices=(DEFAULT, SMALL), default=[DEFAULT, SMALL])
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one seed, few images and steps")
    parser.add_argument("--anew", action="store_true", help="forget the rows that there are")
    parser.add_argument("--out", type=Path, help=f"folder for page and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    effort, seeds = FULL, options.seeds
    if options.quick:
        effort, seeds = QUICK, 1
    rows: list[Row] = []
    path = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{NAME}.csv"
        if not options.anew:
            rows = load_rows(path)
    dataset = data.load("fashion-mnist-12k")
    command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *(arguments or sys.argv[1:])])
    with one_thread():
        for seed in range(seeds):
            for name in options.networks:
                known = {row.key for row in rows}
                missing = [key for key in asked(name, seed) if key not in known]
                if not missing:
                    continue
                begun = time.process_time()
                for row in rows_of(Bench(name, seed, dataset, effort), missing):
                    rows.append(row)
                    words = f"{name}, {row.target:g}, {row.criterion}, seed {seed}: {row.before:.2f} %, then {row.after:.2f} %"
                    say(console, f"{words} ({time.process_time() - begun:.0f} s)")
                    if path is not None and out is not None:
                        save(rows, out, command)
    for network, target in compared(rows):
        console.print(table(rows, network, target).rich())
    for line in verdicts(rows):
        console.print(line, markup=False, highlight=False)
    if out is not None:
        save(rows, out, command)
        say(console, f"written: {out / NAME}.md and .csv")
    return 0


def save(rows: Sequence[Row], out: Path, command: str) -> None:
    """Write what there is: the page, and the table of all rows."""
    lines = [Row._fields, *[shared.rounded(row) for row in rows]]
    files.write(out / f"{NAME}.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    if compared(rows):
        files.write(out / f"{NAME}.md", document(rows, command))


if __name__ == "__main__":
    sys.exit(run_command(main))
