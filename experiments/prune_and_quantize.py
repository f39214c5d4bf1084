"""Channels and bits under one budget: what searching both together is worth beside either alone, and one after the other.

    python -m experiments.prune_and_quantize [--targets NAME ...] [--budgets B ...] [--methods NAME ...] [--seeds N] [--again]

A residual network of eight layers is trained on the default data set, once for every seed. For every target and every budget,
a share of the latency of the unpruned network at 8 bits, four methods have the same number of evaluations, and what they find
is fine-tuned for as many epochs, on as many images, with the float network as teacher:

    bits only   widths of 2 to 8 bits, all channels
    channels    which share of its channels each group keeps, at 8 bits
    two steps   channels at 8 bits first, for the root of the budget (0.45 of the latency where 0.2 is asked for), then bits of
                what is left, for all of it. Where bits can't save as much, channels save more, and are searched again with
                four fifths for as long as that takes. Each search has half of the evaluations
    retrained   two steps with one of the epochs of fine-tuning between them
    joint       both at once

First and last layer stay at 8 bits. All methods search with the same solver, and choose in the same way: of a search's best
policies, a few that differ in kind are fine-tuned for a few steps each, and the one with the best accuracy on the search
images is then fine-tuned from its start. Accuracies are on the test split, which nothing else sees. A seed is one of the
network's training, of the search and of fine-tuning, so that differences are paired by it.

A budget that a method can't reach isn't left out: the cheapest that the method can make stands in its place, which is dearer
than what the others may cost.

Each cell is written as soon as it is there, and a call goes on with what is missing; `--again` does all of them anew.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import itertools
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import haq
import hw_models
import quantizers as Q
from experiments import shared
from haq import data, networks, training
from haq.console.errors import run_command
from haq.data.dataset import stratified
from haq.problem.budget import OutOfReach
from haq.problem.evaluator import one_thread
from haq.problem.problem import Problem
from haq.solvers.base import Trial
from haq.solvers.choice import is_candidate

NAME = "prune_and_quantize"
FOLDER = Path("docs/experiments")
TARGETS = ("edge", "bitfusion-small", "finn")
BUDGETS = (0.2, 0.1, 0.5, 0.3)  # in the order in which they are done
JUDGED = (0.2, 0.1)  # budgets of the verdicts
MOST_TARGETS = 2  # on which joint must be better
BITS, CHANNELS, TWO_STEPS, RETRAINED, JOINT = METHODS = ("bits only", "channels", "two steps", "retrained", "joint")
RIVALS = (BITS, TWO_STEPS, RETRAINED)
LEFT, AGAIN = 0.9, 0.8  # what bits may use of the budget at least, and how much further channels go where they would use more
SEEDS = 3
SOLVER = "surrogate"
CALIBRATION = 256  # images
PRUNE = "0.125:1"
CRITERION = "l1"


@dataclass(frozen=True)
class Effort:
    """How much is done for a cell: the same for every method.

    Attributes:
        evaluations: Of a search, of both searches of two steps together.
        epochs: Of fine-tuning what was found.
        finalists: Policies of a search that are fine-tuned for some steps, to choose one of them; 1: the search chooses.
        steps: These steps.
        images: Of the train split, by which networks are fine-tuned.
        search_images: By which policies are judged.
        training: Epochs of the float network's own training.
    """

    evaluations: int = 40
    epochs: int = 3
    finalists: int = 3
    steps: int = 40
    images: int = 2000
    search_images: int = 500
    training: int = 10


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


def residual(widths: Sequence[int] = (8, 64, 96)) -> nn.Module:
    """Make the network: a convolution and two blocks, each of half the resolution, and a linear layer."""
    stem, middle, last = widths
    return nn.Sequential(
        nn.Conv2d(1, stem, 3, 2, 1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        Block(stem, middle, 2),
        Block(middle, last, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 10),
    )


class Row(NamedTuple):
    """A cell: what a method found for a target, a budget and a seed. Accuracies are shares of the test split."""

    target: str
    budget: float
    method: str
    seed: int
    least: float | None  # what the method can reach, where that is more than the budget
    cost: float  # as a share of the unpruned network's at 8 bits, as the budget
    macs: float  # what is left of the unpruned network's
    weights: float  # mean width
    activations: float
    float_accuracy: float
    before: float
    after: float
    evaluations: int
    epochs: int
    seconds: float
    policy: str

    @property
    def cell(self) -> tuple[str, float, str, int]:
        """Say which cell it is."""
        return self[:4]


class Found(NamedTuple):
    """What a method found, not fine-tuned yet."""

    network: nn.Module
    policy: Q.BitPolicy
    keep: dict[str, float]
    cost: float
    least: float | None
    epochs: int  # of fine-tuning that are left


class Bench:
    """A network of one seed with its data, and the problems that are made of it, which all targets and budgets share."""

    def __init__(self, seed: int, effort: Effort) -> None:
        """Train the network.

        Args:
            seed: Of its weights and its training.
            effort: How long.
        """
        self.seed = seed
        self.effort = effort
        dataset = data.load()
        self.network = trained(seed, effort.training, dataset.train)
        self.calibration = self.network.preprocess(dataset.train.images[dataset.fair(CALIBRATION)]).contiguous()
        self.tuned_on = _part(dataset.train, effort.images)
        self.judged_by = _part(dataset.search, effort.search_images)
        self.search = self._tensors(self.judged_by)
        self.test = self._tensors(dataset.test)
        self.float_accuracy = accuracy(self.network.module, self.test)
        self.macs = macs_of(self.network.module, self.calibration)
        self._problems: dict[tuple[str, str], Problem] = {}

    def _tensors(self, split: data.Split) -> tuple[Tensor, Tensor]:
        images, labels = next(split.batches(len(split)))
        return self.network.preprocess(images).contiguous(), labels

    def problem(self, kind: str, target: str) -> Problem:
        """Return the problem of a method on a target, within all that it can cost."""
        if (kind, target) in self._problems:
            return self._problems[kind, target]
        others = [problem for (known, _), problem in self._problems.items() if known == kind]
        if others:
            self._problems[kind, target] = others[0].on(target, 1.0)
        else:
            asked: dict[str, Any] = {}
            if kind != BITS:
                asked = {"prune": PRUNE, "criterion": CRITERION}
            if kind == CHANNELS:
                asked["bits"] = "8:8"
            self._problems[kind, target] = haq.Problem(
                self.network.module, self.calibration, self.search, target, budget=1.0, **asked
            )
        return self._problems[kind, target]

    def tune(self, network: nn.Module, epochs: int, steps: int | None = None) -> nn.Module:
        """Fine-tune a network, with the float network as teacher."""
        if not epochs:
            return network
        return training.finetune(
            self.network,
            network,
            self.tuned_on,
            epochs=epochs,
            steps=steps,
            seed=self.seed,
            norm_images=self.effort.images // 2,
        )


def trained(seed: int, epochs: int, split: data.Split) -> networks.Network:
    """Train the network; what was trained before is read from where downloads are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = networks.Network("residual", residual().eval(), (1, 28, 28), (0.286,), (0.353,))
    config = training.TrainConfig(epochs, learning_rate=0.1, seed=seed)
    digest = hashlib.sha256(f"{config} {len(split)}".encode())
    for tensor in network.module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    file = data.cache_folder() / f"{NAME}-{digest.hexdigest()[:12]}.safetensors"
    if file.is_file():
        network.module.load_state_dict(load_file(file))
        return network
    training.fit(network, split, config)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.part")
    save_file({key: tensor.contiguous() for key, tensor in network.module.state_dict().items()}, partial)
    partial.replace(file)
    network.module.eval()
    return network


def _part(split: data.Split, count: int) -> data.Split:
    """Return some samples of a split, of every class its share."""
    if count >= len(split):
        return split
    return split.subset(stratified(split.labels, count))


@torch.inference_mode()
def accuracy(network: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that are answered rightly."""
    network.eval()
    images, labels = samples
    answers = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return float((answers == labels).double().mean())


def macs_of(network: nn.Module, images: Tensor) -> float:
    """Count the multiply-accumulates of a network for an image."""
    return float(hw_models.trace(network, images[:1].clone()).macs)


# Methods


def find(bench: Bench, method: str, target: str, budget: float) -> Found:
    """Search with a method.

    Args:
        bench: The network.
        method: One of METHODS.
        target: The hardware.
        budget: What the result may cost, of the unpruned network's latency at 8 bits.

    Returns:
        What is to be fine-tuned: within the budget, or the cheapest that the method can make.
    """
    if method in (TWO_STEPS, RETRAINED):
        return find_in_two_steps(bench, target, budget, int(method == RETRAINED))
    effort = bench.effort
    problem, least = within(bench.problem(method, target), budget)
    policy = search(bench, problem, effort.evaluations)
    cost = problem.policy_cost(policy) / problem.reference
    return Found(problem.quantized(policy), policy, dict(policy.keep), cost, least, effort.epochs)


def find_in_two_steps(bench: Bench, target: str, budget: float, between: int) -> Found:
    """Remove channels at 8 bits, and then choose bits for what is left.

    Args:
        bench: The network.
        target: The hardware.
        budget: As of `find`.
        between: Epochs of fine-tuning between the steps.

    Returns:
        What is to be fine-tuned.
    """
    effort = bench.effort
    bits = bench.problem(BITS, target)
    share = first_budget(budget, bits.smallest / bits.reference)
    while True:
        first, cheapest = within(bench.problem(CHANNELS, target), share)
        # Finalists are the second step's alone.
        pruned = solved(bench, first, effort.evaluations // 2).policy
        smaller = refreshed(bench, remove(bench.network.module, first, pruned))
        whole = haq.Problem(smaller, bench.calibration, bench.search, target, budget=1.0)
        if whole.smallest <= LEFT * budget * bits.reference or cheapest is not None:
            break
        share *= AGAIN
    if between:
        smaller = bench.tune(smaller, between)
        whole = haq.Problem(smaller, bench.calibration, bench.search, target, budget=1.0)
    allowed = budget * bits.reference / whole.reference
    second, least = within(whole, min(allowed, whole.largest / whole.reference))
    if least is not None:
        least *= whole.reference / bits.reference
    policy = search(bench, second, effort.evaluations - effort.evaluations // 2)
    cost = second.policy_cost(policy) / bits.reference
    return Found(second.quantized(policy), policy, dict(pruned.keep), cost, least, effort.epochs - between)


def first_budget(budget: float, least_by_bits: float) -> float:
    """Return what the first of two steps leaves, at 8 bits.

    Args:
        budget: Of both together.
        least_by_bits: What bits alone leave at least, as a share of the latency of the same network at 8 bits.

    Returns:
        The root of the budget; less where bits couldn't save the rest.
    """
    return min(budget**0.5, LEFT * budget / least_by_bits)


def within(problem: Problem, budget: float) -> tuple[Problem, float | None]:
    """Put a problem within a budget, or within the least that it can cost.

    Returns:
        The problem; and that least cost, as a share of the reference's, where the budget is out of reach.
    """
    try:
        return problem.on(problem.target, budget), None
    except OutOfReach:
        least = problem.smallest / problem.reference
        return problem.on(problem.target, least), least


def solved(bench: Bench, problem: Problem, evaluations: int) -> haq.Result:
    """Search a problem."""
    return haq.solve(problem, SOLVER, evaluations=evaluations, seed=bench.seed)


def search(bench: Bench, problem: Problem, evaluations: int) -> Q.BitPolicy:
    """Search a problem, fine-tune a few policies of different kinds for some steps, and choose the best of these."""
    result = solved(bench, problem, evaluations)
    candidates = finalists(problem, result, bench.effort.finalists)
    if len(candidates) == 1:
        return candidates[0]
    values = []
    for policy in candidates:
        tuned = bench.tune(problem.quantized(policy), 1, bench.effort.steps)
        values.append(accuracy(tuned, bench.search))
    return candidates[int(np.argmax(values))]


def finalists(problem: Problem, result: haq.Result, count: int) -> list[Q.BitPolicy]:
    """Choose policies that differ in kind: what the search returns, then the best of every other kind, then the next best.

    What a policy is worth before fine-tuning tells little of policies that keep different shares of the channels: removing
    channels costs more at first, and more of it comes back. So the best by that alone would mostly be of one kind.
    """
    trials = [result.trial, *sorted(filter(is_candidate, result.history), key=lambda trial: trial.rank)]
    chosen = []
    kinds = set()
    for trial in trials:
        if kind_of(problem, trial) not in kinds:
            kinds.add(kind_of(problem, trial))
            chosen.append(trial.policy)
    others = [trial.policy for trial in trials if trial.policy not in chosen]
    return list(dict.fromkeys([*chosen, *others]))[:count]


def kind_of(problem: Any, trial: Trial) -> tuple[float, float]:
    """Return about how many channels a policy keeps, and about how many bits they have."""
    keep = dict(trial.policy.keep)
    shares = [1.0]
    if keep:
        groups = len(problem.channel_decisions)
        shares = [*keep.values(), *[1.0] * (groups - len(keep))]
    return round(4 * statistics.mean(shares)) / 4, float(round(statistics.mean(mean_widths(trial.policy))))


def mean_widths(policy: Q.BitPolicy) -> tuple[float, float]:
    """Return the mean widths of weights and of activations."""
    weights, activations = zip(*policy.values(), strict=True)
    return statistics.mean(weights), statistics.mean(activations)


def remove(network: nn.Module, problem: Any, policy: Q.BitPolicy) -> nn.Module:
    """Remove the channels of a float network that a policy doesn't keep."""
    chosen = Q.pruning.select(problem.ranking, problem.channel_groups, dict(policy.keep))
    return Q.pruning.remove_channels(network, problem.channel_groups, chosen)


def refreshed(bench: Bench, network: nn.Module) -> nn.Module:
    """Let batch norms of a pruned network take their statistics from the images that networks are fine-tuned on."""
    training.refresh_norms(bench.network, network, bench.tuned_on)
    return network


# Cells


def cell_of(bench: Bench, method: str, target: str, budget: float) -> Row:
    """Search, fine-tune and test."""
    start = time.perf_counter()
    effort = bench.effort
    found = find(bench, method, target, budget)
    before = accuracy(found.network, bench.test)
    tuned = bench.tune(found.network, found.epochs)
    weights, activations = mean_widths(found.policy)
    words = [f"{name} {w}/{a}" for name, (w, a) in found.policy.items()]
    words += [f"{group} keeps {share:g}" for group, share in found.keep.items()]
    return Row(
        target,
        budget,
        method,
        bench.seed,
        found.least,
        found.cost,
        macs_of(found.network, bench.calibration) / bench.macs,
        weights,
        activations,
        bench.float_accuracy,
        before,
        accuracy(tuned, bench.test),
        effort.evaluations,
        effort.epochs,
        time.perf_counter() - start,
        "; ".join(words),
    )


# What is said of them


class Mean(NamedTuple):
    """A mean over seeds with its standard error; None of one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Take values, one for each seed."""
        error = None
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.mean(values), error)

    def words(self, sign: str = "") -> str:
        """Write both in points."""
        error = ""
        if self.error is not None:
            error = f" ± {100 * self.error:.2f}"
        return f"{100 * self.mean:{sign}.2f}{error}"


def difference(rows: Sequence[Row], target: str, budget: float, rival: str) -> Mean | None:
    """Return by how much joint is better than a rival after fine-tuning, paired by seed; None where cells are missing."""
    found = {row.cell: row.after for row in rows}
    seeds = {row.seed for row in rows}
    pairs = [[found.get((target, budget, method, seed)) for method in (JOINT, rival)] for seed in sorted(seeds)]
    known = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if not known:
        return None
    return Mean.of(known)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say where joint is better than its rivals by more than a standard error, and whether that is enough."""
    lines = []
    good = []
    for target in _present(row.target for row in rows):
        better = [judged(rows, target, budget, rival) for budget, rival in itertools.product(JUDGED, RIVALS)]
        lines += [line for _, line in better]
        if all(holds for holds, _ in better):
            good.append(target)
    on = "none"
    if good:
        on = ", ".join(good)
    budgets = " and ".join(f"{budget:g}" for budget in JUDGED)
    lines.append(
        f"joint better than {', '.join(RIVALS)} by more than a paired standard error, at {budgets} on at least {MOST_TARGETS} "
        f"targets: {_holds(len(good) >= MOST_TARGETS)} ({on})"
    )
    return lines


def judged(rows: Sequence[Row], target: str, budget: float, rival: str) -> tuple[bool, str]:
    """Say whether joint is better than a rival for one target and budget.

    A rival that has nothing within the budget is no better, whatever its cheapest is worth, which is told.

    Returns:
        Whether it is, and a line about it.
    """
    ours, theirs = (_of(rows, target, budget, method) for method in (JOINT, rival))
    apart = difference(rows, target, budget, rival)
    where = f"{target}, {budget:g}"
    if apart is None or apart.error is None:
        return False, f"{where}: joint against {rival} isn't known"
    if any(row.least is not None for row in ours):
        return False, f"{where}: out of reach of joint: {_holds(False)}"
    if all(row.least is not None for row in theirs):
        dearer = statistics.mean(row.cost for row in theirs)
        return True, (
            f"{where}: out of reach of {rival}, whose cheapest has {Mean.of([row.after for row in theirs]).words()} % at "
            f"{dearer:.3f}; joint has {Mean.of([row.after for row in ours]).words()} % within the budget: {_holds(True)}"
        )
    holds = apart.mean > apart.error
    return holds, f"{where}: joint against {rival} {apart.words('+')} points: {_holds(holds)}"


def _of(rows: Sequence[Row], target: str, budget: float, method: str) -> list[Row]:
    return [row for row in rows if (row.target, row.budget, row.method) == (target, budget, method)]


def _holds(holds: bool) -> str:
    return shared.verdict(holds, "doesn't hold")


def _present(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


Lines = list[list[str]]


def table_of(rows: Sequence[Row], seeds: int) -> tuple[list[str], Lines]:
    """Make the main table: a line for every target, budget and method."""
    head = ["target", "budget", "method", "latency", "MACs left", "bits", "before", "after fine-tuning", "joint better by"]
    lines = []
    for target, budget in itertools.product(_present(row.target for row in rows), sorted({r.budget for r in rows})[::-1]):
        for method in METHODS:
            own = _of(rows, target, budget, method)
            lines.append([target, f"{budget:g}", method, *_cells(rows, own, seeds)])
    return head, lines


def _cells(rows: Sequence[Row], own: Sequence[Row], seeds: int) -> list[str]:
    """Write the figures of one method for one target and budget."""
    if not own:
        return ["not run", "", "", "", "", ""]
    cost = f"{statistics.mean(row.cost for row in own):.3f}"
    least = [row.least for row in own if row.least is not None]
    if least:
        cost = f"out of reach; {cost} of at least {min(least):.3f}"
    better = ""
    first = own[0]
    if first.method != JOINT:
        apart = difference(rows, first.target, first.budget, first.method)
        if apart is not None:
            better = apart.words("+")
    after = Mean.of([row.after for row in own]).words()
    if len(own) < seeds:
        after += f" ({len(own)} of {seeds} seeds)"
    return [
        cost,
        f"{statistics.mean(row.macs for row in own):.2f}",
        f"{statistics.mean(row.weights for row in own):.1f}/{statistics.mean(row.activations for row in own):.1f}",
        Mean.of([row.before for row in own]).words(),
        after,
        better,
    ]


def markdown(head: Sequence[str], lines: Lines) -> str:
    """Write a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def document(command: str, rows: Sequence[Row], effort: Effort, seeds: int) -> str:
    """Write the page."""
    of_float = {row.seed: row.float_accuracy for row in rows}
    minutes = sum(row.seconds for row in rows) / 60
    parts = [
        "# Channels and bits under one budget",
        f"Made by `experiments/{NAME}.py`, which says what is compared and how; every cell with its policy is in "
        f"`{NAME}.csv`.",
        f"    {command}",
        "Latency is estimated, and a share of the unpruned network's at 8 bits. Accuracies are measured on the test split, in "
        f"percent: means over {seeds} seeds with their standard errors. The float network has "
        f"{Mean.of(list(of_float.values())).words()}. Searches have {effort.evaluations} evaluations on "
        f"{effort.search_images:,} images; {effort.finalists} finalists have {effort.steps} steps of fine-tuning, and what is "
        f"chosen has {effort.epochs} epochs of {effort.images:,} images. By how much joint is better is paired by seed, in "
        f"points. Where a budget is out of reach of a method, the cheapest that it can make stands in. All cells took "
        f"{minutes:.0f} minutes of one thread.",
        f"![accuracy after fine-tuning against latency]({NAME}.png)",
        markdown(*table_of(rows, seeds)),
        "Against bits only and two steps:",
        "\n".join(f"* {line}" for line in verdicts(rows)),
    ]
    absent = missing(rows, seeds)
    if absent:
        parts.append(f"Not run for this page: {'; '.join(absent)}.")
    parts.append(NOTES)
    return "\n\n".join(parts) + "\n"


def missing(rows: Sequence[Row], seeds: int) -> list[str]:
    """Name the cells that aren't there: budgets without any, and others one by one."""
    there = {row.cell for row in rows}
    found = []
    targets = _present([*TARGETS, *(row.target for row in rows)])
    for budget in _present([*BUDGETS, *(row.budget for row in rows)]):
        cells = list(itertools.product(targets, [budget], METHODS, range(seeds)))
        absent = [cell for cell in cells if cell not in there]
        if len(absent) == len(cells):
            found.append(f"budget {budget:g}")
            continue
        found += [f"{target}, {budget:g}, {method}, seed {seed}" for target, _, method, seed in absent]
    return found


NOTES = """`bitfusion-small`, of 64 fusion units, stands for BitFusion here: on the 512 of `bitfusion` a network of this size
takes a third of its latency at 8 bits even with an eighth of its channels at 2 bits, since outputs of 32 bits are moved and 16
columns are there whether they have work or not."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the accuracy after fine-tuning against the latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    targets = _present(row.target for row in rows)
    figure = Figure(figsize=(4.4 * len(targets), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, target in zip(figure.subplots(1, len(targets), squeeze=False, sharey=True)[0], targets, strict=True):
        for color, method in enumerate(METHODS):
            points = []
            for budget in sorted({row.budget for row in rows}):
                own = _of(rows, target, budget, method)
                if own:
                    mean = Mean.of([row.after for row in own])
                    points.append((statistics.mean(row.cost for row in own), 100 * mean.mean, 100 * (mean.error or 0)))
            if points:
                x, y, error = zip(*sorted(set(points)), strict=True)
                panel.errorbar(
                    x, y, error, color=f"C{color}", label=method, marker="o", markersize=4, capsize=2, linewidth=1.2
                )
        panel.set(title=target, xlabel="latency, of 8 bits (estimated)", xscale="log")
        panel.set_xticks([0.1, 0.2, 0.3, 0.5, 1.0], ["0.1", "0.2", "0.3", "0.5", "1"])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("test accuracy after fine-tuning, %")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


# Files


def written(value: Any) -> str:
    """Write a figure for the csv."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def write_rows(path: Path, rows: Sequence[NamedTuple]) -> None:
    """Write all rows, beside the file first."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows([written(value) for value in row] for row in rows)
    partial.replace(path)


def read_rows(path: Path, effort: Effort) -> list[Row]:
    """Read the cells of an earlier call; raises ValueError for those of another effort."""
    rows = []
    for line in _lines(path):
        evaluations, epochs = int(line["evaluations"]), int(line["epochs"])
        if (evaluations, epochs) != (effort.evaluations, effort.epochs):
            raise ValueError(
                f"{path} has cells of {evaluations} evaluations and {epochs} epochs, and {effort.evaluations} and "
                f"{effort.epochs} are asked for: give another --out, or --again"
            )
        least = None
        if line["least"]:
            least = float(line["least"])
        row = Row(
            target=line["target"],
            budget=float(line["budget"]),
            method=line["method"],
            seed=int(line["seed"]),
            least=least,
            cost=float(line["cost"]),
            macs=float(line["macs"]),
            weights=float(line["weights"]),
            activations=float(line["activations"]),
            float_accuracy=float(line["float_accuracy"]),
            before=float(line["before"]),
            after=float(line["after"]),
            evaluations=evaluations,
            epochs=epochs,
            seconds=float(line["seconds"]),
            policy=line["policy"],
        )
        rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what searches say of their plans, and fine-tuning of networks that it couldn't improve."""
    logger = logging.getLogger("haq")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    usual = Effort()
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), metavar="B")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--evaluations", type=int, default=usual.evaluations, help=f"(default: {usual.evaluations})")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help=f"(default: {usual.epochs})")
    parser.add_argument("--again", action="store_true", help="do all cells anew")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help=f"folder for page, picture and table (default: {FOLDER})")
    given = parser.parse_args(arguments)
    effort = Effort(given.evaluations, given.epochs)
    if given.quick:
        given.seeds, given.budgets = 1, given.budgets[:1]
        effort = Effort(evaluations=6, epochs=1, finalists=2, steps=3, images=320, search_images=100, training=1)
    out = shared.folder_for(given.out, given.quick, FOLDER)
    command = shlex.join(["python", "-m", f"experiments.{NAME}", *(arguments or sys.argv[1:])])
    rows: list[Row] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if not given.again:
            rows = read_rows(out / f"{NAME}.csv", effort)
    console = Console(width=180)
    bench = functools.lru_cache(lambda seed: Bench(seed, effort))

    def save() -> None:
        if out is None:
            return
        if rows:
            write_rows(out / f"{NAME}.csv", rows)
            draw(rows, out / f"{NAME}.png")
        (out / f"{NAME}.md").write_text(document(command, rows, effort, given.seeds), encoding="utf-8")

    with one_thread(), quiet():
        for budget, seed, target, method in itertools.product(given.budgets, range(given.seeds), given.targets, given.methods):
            cell = (target, budget, method, seed)
            if any(row.cell == cell for row in rows):
                continue
            row = stand_in(rows, cell) or cell_of(bench(seed), method, target, budget)
            rows.append(row)
            console.print(f"{target}, {budget:g}, {method}, seed {seed}: {_words(row)}", markup=False, highlight=False)
            save()
    save()
    for line in verdicts(rows):
        console.print(line, markup=False, highlight=False)
    return 0


def stand_in(rows: Sequence[Row], cell: tuple[str, float, str, int]) -> Row | None:
    """Return the row of a larger budget that was out of reach already, whose cheapest stands in for this one, too."""
    target, budget, method, seed = cell
    if method in (TWO_STEPS, RETRAINED):
        # Its first step depends on the budget.
        return None
    for row in rows:
        if (row.target, row.method, row.seed) == (target, method, seed) and row.least is not None and row.budget > budget:
            return row._replace(budget=budget)
    return None


def _words(row: Row) -> str:
    reach = ""
    if row.least is not None:
        reach = f"out of reach (at least {row.least:.3f}), "
    return (
        f"{reach}latency {row.cost:.3f}, MACs {row.macs:.2f}, bits {row.weights:.1f}/{row.activations:.1f}, "
        f"{100 * row.before:.2f} -> {100 * row.after:.2f} %, {row.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
