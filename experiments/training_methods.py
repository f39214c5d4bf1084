"""What experiments of training methods have in common: samples, a small network, paired differences, and a page.

All of them compare on Fashion-MNIST (the 12,000 images that are shipped) with a few seeds: a seed draws the network and
the order of images, and whatever is compared has the same of both. What is said of a paper is computed: a difference
holds if the mean over the seeds is beyond its standard error.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments import shared
from haq import data, training
from haq.networks import Network

FOLDER = Path("docs/experiments")
DATA = "fashion-mnist-12k"
HOLDS, DOES_NOT = "holds", "doesn't hold"


class Spread(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        """Write both, with their unit left to the heading."""
        return f"{self.mean:.2f} ± {self.error:.2f}"


class Claim(NamedTuple):
    """What a paper says, or what is asked of it, and whether it holds here."""

    words: str
    holds: bool
    found: str
    seeds: int = 2  # that it is judged by; by one alone it isn't

    def __str__(self) -> str:
        """Write it as a sentence of a page."""
        verdict = shared.verdict(self.holds, DOES_NOT)
        if self.seeds < 2:
            verdict = "not judged by one seed"
        return f"{verdict}: {self.words} ({self.found})"


class Page(NamedTuple):
    """What is printed and saved.

    Attributes:
        title: Of the page.
        about: What was done, a sentence each.
        claims: What holds.
        columns: Of the table.
        rows: Of the table, in words.
    """

    title: str
    about: Sequence[str]
    claims: Sequence[Claim]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of values and its standard error; that of a single value is unknown, and told as 0."""
    error = 0.0
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
    return Spread(statistics.mean(values), error)


def above(words: str, differences: Sequence[float], by: float = 0.0) -> Claim:
    """Claim that paired differences, in points, are above a number: by more than the standard error of their mean."""
    found = spread(differences)
    return Claim(words, found.mean - by > found.error, _each(found, differences), len(differences))


def within(words: str, differences: Sequence[float], by: float) -> Claim:
    """Claim that the mean of paired differences, in points, isn't further below 0 than a number."""
    found = spread(differences)
    return Claim(words, found.mean >= -by, _each(found, differences), len(differences))


def _each(found: Spread, differences: Sequence[float]) -> str:
    each = ", ".join(f"{value:+.2f}" for value in differences)
    return f"{found.mean:+.2f} ± {found.error:.2f} points; seed by seed {each}"


def samples(count: int) -> tuple[data.Split, data.Split]:
    """Return the first `count` images to train on, and all that are tested on."""
    dataset = data.load(DATA)
    if count > len(dataset.train):
        raise ValueError(f"--images is {count}; there are {len(dataset.train)} images to train on")
    return dataset.train.subset(torch.arange(count)), dataset.test


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Make a module whose weights are drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def convolutional(widths: Sequence[int] = (16, 16, 32, 32)) -> nn.Module:
    """Make a plain network of four convolutions with batch norms, of strides 2, 1, 2, 1, for images of 28 x 28."""
    network = nn.Sequential()
    channels = 1
    for number, (width, stride) in enumerate(zip(widths, (2, 1, 2, 1), strict=True), 1):
        network.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, stride, 1, bias=False))
        network.add_module(f"norm{number}", nn.BatchNorm2d(width))
        network.add_module(f"relu{number}", nn.ReLU())
        channels = width
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(channels, 10))
    return network


def network_of(module: nn.Module) -> Network:
    """Return a module with how the images are preprocessed."""
    return Network("small", module, (1, 28, 28), mean=(0.286,), std=(0.353,)).ordered()


def trained(module: nn.Module, split: data.Split, config: training.TrainConfig, method: Any = None) -> nn.Module:
    """Train a module in place, from labels, and return it."""
    training.fit(network_of(module), split, config, method=method)
    return module


def tested(module: nn.Module, split: data.Split) -> float:
    """Return the accuracy in percent."""
    return 100 * training.accuracy(network_of(module), split)


def parser_of(name: str, about: str | None) -> argparse.ArgumentParser:
    """Make the parser of an experiment, with what all of them have."""
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--quick", action="store_true", help="only see that it runs: few images and epochs; saves nothing")
    made.add_argument("--out", type=Path, help=f"folder for page and table (default: {FOLDER})")
    return made


def run(
    name: str, options: argparse.Namespace, one_seed: Callable[[int], list[Any]], page: Callable[[list[Any]], Page]
) -> int:
    """Run an experiment seed by seed; what was measured is saved after each.

    Args:
        name: Of the experiment.
        options: What its parser read.
        one_seed: Measures everything with a seed: rows, named tuples of one kind.
        page: Makes the page of all rows so far.

    Returns:
        The exit status.
    """
    torch.set_num_threads(1)
    folder = shared.folder_for(options.out, options.quick, FOLDER)
    outcomes: list[Any] = []
    start = time.process_time()
    for seed in range(options.seeds):
        outcomes += one_seed(seed)
        minutes = (time.process_time() - start) / 60
        made = page(outcomes)
        made = made._replace(about=[*made.about, f"seeds 0 to {seed}; {minutes:.1f} minutes of one core in all"])
        print(f"seed {seed} is done after {minutes:.1f} minutes of one core", flush=True)
        if folder is not None:
            save(folder, name, made, outcomes)
    print(written(name, made))
    return 0


def written(name: str, page: Page) -> str:
    """Write a page in Markdown."""
    command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{name}", *sys.argv[1:]])
    lines = [list(page.columns), ["---", *["---:"] * (len(page.columns) - 1)], *page.rows]
    parts = [
        f"# {page.title}",
        f"Made by `experiments/{name}.py`, which says what is compared and how; every network is in `{name}.csv`.",
        f"    {command}",
        "\n".join(f"* {line}" for line in page.about),
        "## What holds",
        "\n".join(f"* {claim}" for claim in page.claims),
        "## Test accuracy in %, mean over seeds ± its standard error",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    ]
    return "\n\n".join(parts) + "\n"


def save(folder: Path, name: str, page: Page, outcomes: Sequence[Any]) -> None:
    """Save the page and the table of all outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(written(name, page), encoding="utf-8")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(outcomes[0]._fields)
        writer.writerows(map(shared.rounded, outcomes))
