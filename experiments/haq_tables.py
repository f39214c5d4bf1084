"""HAQ's own tables with what can be had of them here: the costs exactly, the accuracies on another data set.

    OMP_NUM_THREADS=1 python -m experiments.haq_tables [--quick] [--data NAME] [--steps N] [--out FOLDER]

1. Costs. MobileNetV1, MobileNetV2 and ResNet-50 at uniform 8, 6, 5 and 4 bits on edge, cloud and bitfusion: latency and energy
   of all layers at these bits, latency without first and last layer beside HAQ's (Wang et al., CVPR 2019; three of its values
   seem to include the first layer, docs/explanation/edge.md), and the bytes of parameters with k-means weights, norms in
   float32 left out.
   All of it is estimated: it needs no weights and no images.
2. Accuracies. HAQ's are those of ImageNet, which can't be had here. Printed after them, for the same comparison but not for
   the same numbers, are ours on Fashion-MNIST, of the default network and of a residual one of nine times its parameters,
   trained here: policies found (by the integer programme, and at 4 bits by DDPG) beside the uniform ones of the same cost,
   first and last layer at 8 bits in both; nothing is fine-tuned.
3. Specialisation: the policies found at the cost of 4 bits on one target, priced on the others, as in HAQ's table 1.
4. Headline: how much less than at fixed 8 bits at no more than half a point of accuracy. Of the budgets below, the smallest is
   taken for which the programme's policy, fine-tuned with one seed, loses at most 0.5 points on the search split against fixed
   8 bits; it is looked for downwards, or upwards, from the smallest one that loses at most 1.5 points before fine-tuning. That
   policy is fine-tuned with three seeds and reported on the test split. Fixed 8 bits are calibrated, or fine-tuned in the same
   way: what is better counts. The bar is twice as good.

Policies are found on the first 2,000 images of the search split, budgets chosen on all of it. One process, one thread.
`--quick` is a look at whether it runs: the data set that ships with haq, and hardly any training. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

import haq
import hw_models
import quantizers as Q
from experiments import shared
from experiments.published_hardware import HAQ_LATENCIES_MS, WITH_FIRST
from experiments.published_hardware import WIDTHS as PUBLISHED_WIDTHS
from experiments.quantizer_accuracy import Table, Values
from haq import data, networks, training
from haq.console.errors import run_command
from haq.solvers import ilp, sensitivity
from haq.solvers.base import Session, Trial, solve

NAME = "haq_tables"
TARGETS = ("edge", "cloud", "bitfusion")
WIDTHS = (8, 6, 5, 4)
NETWORKS = {"MobileNetV1": "mobilenetv1_100", "MobileNetV2": "mobilenetv2_100", "ResNet-50": "resnet50"}
BITFUSION_V1 = {"latency": 20.08, "energy": 31.03}  # at 8 bits: ms, mJ
# Target -> MobileNetV1's latency in ms on bitfusion, edge and cloud with the policy found for that target.
SPECIALISED = {"bitfusion": (16.29, 85.24, 117.44), "edge": (19.95, 64.29, 108.64), "cloud": (19.94, 66.15, 99.68)}
# ImageNet, top-1 in percent.
PUBLISHED_ACCURACY = (
    (
        "MobileNetV1, latency of 4 / 5 / 6 bits",
        "62.44 / 67.00 / 70.46",
        "67.40 / 70.58 / 71.20",
        "65.33 / 69.97 / 71.20",
        "70.82",
    ),
    (
        "MobileNetV2, latency of 4 / 5 / 6 bits",
        "61.39 / 68.84 / 71.25",
        "66.99 / 70.90 / 71.89",
        "67.01 / 69.45 / 71.85",
        "71.81",
    ),
)
PUBLISHED_BITFUSION = (
    ("energy", "31.03 mJ: 70.82", "16.30 mJ: 70.37", "1.90"),
    ("energy", "31.03 mJ: 70.82", "26.67 mJ: 70.90", "1.16"),
    ("latency", "20.08 ms: 70.82", "11.09 ms: 70.40", "1.81"),
)
PUBLISHED_SIZE = (
    ("MobileNetV1", "37.62", "57.14"),
    ("MobileNetV2", "58.07", "66.75"),
    ("ResNet-50", "68.95", "70.63"),
)
BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
ALLOWED, HOPEFUL = 0.5, 1.5  # points
BAR = 2.0
# Worded after an earlier run, of which it has its numbers.
REASONS = """In table 3 every policy meets the budget of its own target, and no other: the budgets are different fractions of
8 bits.

Where the bar is missed: on bitfusion the default network is bound by memory in every layer, and of its traffic, 98 million
bits in a batch at 8 bits, 93 million are outputs, which are 32 bits wide whatever the operands are. On edge and cloud its
policies at half of the latency lose more than half a point on the search split after 1,000 steps; the next
budget that was tried is 0.6."""
JUDGED = 2000  # images of the search split that solvers see
CALIBRATION = 512
RATE = 0.2  # of training the float network


@dataclass(frozen=True)
class Effort:
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3  # of training the residual network
    steps: int = 1000  # of fine-tuning
    evaluations: int = 150  # of DDPG
    judged: int = JUDGED
    budgets: tuple[float, ...] = BUDGETS


QUICK = Effort((0, 1), 1, 10, 12, 250, (0.5, 0.6))


class Result(NamedTuple):
    """One accuracy on the test split, in percent, and what its policy costs as a fraction of fixed 8 bits."""

    network: str
    target: str
    part: str
    seed: int | None
    budget: float | None
    latency: float
    energy: float | None
    accuracy: float
    policy: str


def untrained_residual() -> networks.Network:
    """The larger network: dense 3x3 convolutions, which a BitFusion array can do something with at fewer bits."""

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]

    def block(width: int) -> nn.Module:
        return networks.Residual(*convolution(width, width), nn.ReLU(inplace=True), *convolution(width, width))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            *(*convolution(1, 32, 2), nn.ReLU(inplace=True)),
            *(*convolution(32, 64, 2), nn.ReLU(inplace=True), block(64)),
            *(*convolution(64, 128, 2), nn.ReLU(inplace=True), block(128)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return networks.Network("residual", module, (1, 28, 28))


def residual(epochs: int, dataset: data.Dataset) -> networks.Network:
    """The larger network, trained."""
    network = untrained_residual()
    training.fit(network, dataset.train, training.TrainConfig(epochs, RATE, seed=0))
    return network


@dataclass
class Study:
    """A network on all targets. What a policy is worth doesn't depend on the target, so all problems share one evaluator."""

    network: networks.Network
    dataset: data.Dataset
    effort: Effort
    problems: dict[str, haq.Problem] = field(default_factory=dict)
    rises: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    tuned: dict[tuple[Q.BitPolicy, int], nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        judged = self.dataset.search.subset(torch.arange(min(self.effort.judged, len(self.dataset.search))))
        search = [(self.network.preprocess(images), labels) for images, labels in judged.batches(250)]
        calibrate = self.network.preprocess(self.dataset.train.images[self.dataset.fair(CALIBRATION)])
        for name in TARGETS:
            problem = haq.Problem(self.network.module, calibrate=calibrate, search=search, target=name, budget=1.0)
            if self.problems:
                problem.evaluator = next(iter(self.problems.values())).evaluator
            self.problems[name] = problem
            self.rises[name] = sensitivity.measure(problem, Session(problem, sys.maxsize), keep=1)

    def limited(self, name: str, limit: float) -> haq.Problem:
        """The problem with another budget, in seconds."""
        problem = copy.copy(self.problems[name])
        problem.limit = limit
        return problem

    def uniform(self, bits: int) -> Q.BitPolicy:
        """The same bits everywhere but in the first and last layer."""
        problem = self.problems["edge"]
        return Q.BitPolicy({layer: problem.pinned.get(layer, (bits, bits)) for layer in problem.workload.names})

    def module(self, policy: Q.BitPolicy, seed: int | None) -> nn.Module:
        """The quantized network at a policy's bits: calibrated, or fine-tuned with a seed."""
        network = self.problems["edge"].evaluator.network
        Q.set_policy(network, policy)
        if seed is None:
            return network
        if (policy, seed) not in self.tuned:
            self.tuned[policy, seed] = training.finetune(
                self.network, network, self.dataset.train, epochs=0, steps=self.effort.steps, seed=seed
            )
        return self.tuned[policy, seed]

    def accuracy(self, policy: Q.BitPolicy, seed: int | None, split: str) -> float:
        """In percent."""
        return 100 * training.accuracy(self.network, getattr(self.dataset, split), self.module(policy, seed))

    def report(self, target: str, part: str, policy: Q.BitPolicy, seed: int | None, budget: float | None = None) -> float:
        """The accuracy on the test split in percent, written down."""
        ratios = self.fractions(target, policy)
        accuracy = self.accuracy(policy, seed, "test")
        bits = " ".join(f"{w}/{a}" for w, a in policy.values())
        self.results.append(Result(self.network.name, target, part, seed, budget, *ratios, accuracy, bits))
        return accuracy

    def fractions(self, target: str, policy: Q.BitPolicy) -> tuple[float, float | None]:
        """Latency and energy of a policy, as fractions of fixed 8 bits."""
        problem = self.problems[target]
        whole, own = (problem.table.price(*problem.bit_arrays(p)) for p in (problem.uniform(8), policy))
        energy = None
        if own.energy_j is not None and whole.energy_j is not None:
            energy = float(own.energy_j / whole.energy_j)
        assert own.latency_s is not None
        assert whole.latency_s is not None
        return float(own.latency_s / whole.latency_s), energy

    def found(self, target: str, limit: float) -> Q.BitPolicy:
        """The integer programme's policy within a budget in seconds."""
        return ilp.propose(self.limited(target, limit), self.rises[target])

    def agent(self, target: str, limit: float) -> Q.BitPolicy:
        problem = self.limited(target, limit)
        found: Trial = solve("ddpg", Session(problem, self.effort.evaluations), 0)
        return found.policy


def cost_tables() -> list[Table]:
    whole = Table(
        "1a. Costs of all layers at uniform bits, per batch (1 image on edge, 16 on cloud and bitfusion); estimated",
        ("network", "bits", *(f"{t}, ms" for t in TARGETS), "edge, mJ", "bitfusion, mJ", "k-means, MB"),
    )
    body = Table(
        "1b. Latency without first and last layer, ms per batch, beside HAQ's; estimated in both",
        ("network", "target", "bits", "HAQ", "ours", "ours / HAQ", "with first layer at 8 bits / HAQ"),
    )
    fusion = Table(
        "1c. MobileNetV1 on BitFusion at 8 bits, beside HAQ's, whose batch and whose way with depthwise layers aren't known; "
        "estimated in both",
        ("metric", "HAQ", "ours, 16 images", "ours / HAQ", "ours, 1 image", "ours / HAQ"),
    )
    for label, name in NETWORKS.items():
        module = networks.load(f"timm:{name}", pretrained=False).module
        workload = hw_models.trace(module, torch.zeros(1, 3, 224, 224))
        costs = {target: hw_models.load_target(target).cost_table(workload) for target in TARGETS}
        kmeans = hw_models.storage_bytes(workload, "kmeans")
        for bits in WIDTHS:
            at = bits - 1
            cells = [f"{1e3 * _metric(costs[t], 'latency')[:, at, at].sum():.2f}" for t in TARGETS]
            cells += [f"{1e3 * _metric(costs[t], 'energy')[:, at, at].sum():.1f}" for t in ("edge", "bitfusion")]
            whole.rows.append((label, str(bits), *cells, f"{kmeans[:, at, at].sum() / 1e6:.2f}"))
        for target in TARGETS[:2]:
            published = dict(zip(PUBLISHED_WIDTHS, HAQ_LATENCIES_MS.get((target, name), ()), strict=False))
            latency = 1e3 * _metric(costs[target], "latency")
            for bits in WIDTHS:
                ours = latency[1:-1, bits - 1, bits - 1].sum()
                theirs = published.get(bits)
                beside = ["–", f"{ours:.2f}", "–", ""]
                if theirs is not None:
                    beside = [f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.4f}", ""]
                    if (target, name, bits) in WITH_FIRST:
                        beside[-1] = f"{(ours + latency[0, 7, 7]) / theirs:.4f}"
                body.rows.append((label, target, str(bits), *beside))
        if label == "MobileNetV1":
            single = hw_models.load_target("bitfusion").cost_table(workload, batch=1)
            for metric, theirs in BITFUSION_V1.items():
                sums = [1e3 * _metric(table, metric)[:, 7, 7].sum() for table in (costs["bitfusion"], single)]
                pairs = [cell for value in sums for cell in (f"{value:.2f}", f"{value / theirs:.2f}")]
                unit = {"latency": "ms", "energy": "mJ"}[metric]
                fusion.rows.append((f"{metric}, {unit}", f"{theirs:.2f}", *pairs))
    return [whole, body, fusion]


def _metric(table: hw_models.CostTable, name: str) -> NDArray[np.float64]:
    return table.metric(name)


def published_tables() -> list[Table]:
    accuracy = Table(
        "2a. What HAQ reports on ImageNet, top-1 in % (not measured here)",
        ("network and budget", "PACT, uniform", "HAQ on edge", "HAQ on cloud", "8 bits"),
        list(PUBLISHED_ACCURACY),
    )
    fusion = Table(
        "2b. What HAQ reports for MobileNetV1 on BitFusion, top-1 in % (not measured here)",
        ("budget on", "fixed 8 bits", "HAQ", "times better"),
        list(PUBLISHED_BITFUSION),
    )
    size = Table(
        "2c. What HAQ reports for k-means at the size of 2 bits, ImageNet top-1 in % (not measured here)",
        ("network", "Deep Compression", "HAQ"),
        list(PUBLISHED_SIZE),
    )
    return [accuracy, fusion, size]


def equal_cost(study: Study) -> Table:
    """Policies beside uniform ones at their cost, before fine-tuning."""
    made = Table(
        f"2d. {study.network.name}: policies found at the latency of uniform bits; % of {len(study.dataset.test):,} test "
        "images, measured, no fine-tuning; latency estimated",
        ("target", "bits", "of fixed 8 bits' latency", "uniform", "ilp", "ddpg"),
    )
    for target, problem in study.problems.items():
        for bits in WIDTHS[1:]:
            policy = study.uniform(bits)
            limit = min(problem.policy_cost(policy), problem.reference)
            cells = [f"{study.report(target, f'uniform {bits} bits', policy, None):.2f}"]
            cells += [f"{study.report(target, f'ilp at {bits} bits', study.found(target, limit), None):.2f}"]
            if bits == WIDTHS[-1]:
                cells += [f"{study.report(target, f'ddpg at {bits} bits', study.agent(target, limit), None):.2f}"]
            made.rows.append((target, str(bits), f"{limit / problem.reference:.3f}", *cells, *[""] * (3 - len(cells))))
    return made


def specialisation(studies: list[Study]) -> Table:
    columns = ("network", "policy for", *(f"on {target}, ms" for target in SPECIALISED))
    made = Table(
        "3. A policy found (ilp, at the latency of uniform 4 bits) for one target, on each: estimated; HAQ's first", columns
    )
    for target, row in SPECIALISED.items():
        made.rows.append(("MobileNetV1 (HAQ)", target, *(f"{ms:.2f}" for ms in row)))
    for study in studies:
        for target in SPECIALISED:
            limit = study.problems[target].policy_cost(study.uniform(4))
            policy = study.found(target, limit)
            cells = [f"{1e3 * study.problems[on].policy_cost(policy):.4f}" for on in SPECIALISED]
            made.rows.append((study.network.name, target, *cells))
    return made


def headline(study: Study, made: Table) -> Iterator[str]:
    """One row for each target; yields the bars."""
    eight, seeds = study.problems["edge"].uniform(8), study.effort.seeds
    reference = max(study.accuracy(eight, seed, "search") for seed in (None, seeds[0]))
    calibrated = study.report("edge", "8 bits, calibrated", eight, None)
    tuned = Values(tuple(study.report("edge", "8 bits, fine-tuned", eight, seed) for seed in seeds))
    fixed = max(calibrated, tuned.mean)
    plain = 100 * training.accuracy(study.network, study.dataset.test)
    name = study.network.name
    made.rows.append((name, "float", "", "", "", f"{plain:.2f}", "", ""))
    made.rows.append(
        (name, "8 bits, calibrated", "1.000", "1.00", "1.00", f"{calibrated:.2f}", "", f"{fixed - calibrated:.2f}")
    )
    made.rows.append((name, "8 bits", "1.000", "1.00", "1.00", "", str(tuned), f"{fixed - tuned.mean:.2f}"))
    for target, problem in study.problems.items():
        budget = choose(study, target, reference)
        if budget is None:
            least = problem.smallest / problem.reference
            made.rows.append((name, target, f"none (least {least:.3f})", "", "", "", "", ""))
            yield (
                f"FALLS SHORT: {name} on {target}: at least {BAR} times less at a loss of at most {ALLOWED} points "
                f"(none of the budgets; with all bits at their smallest, {1 / least:.2f} times)"
            )
            continue
        policy = study.found(target, budget * problem.reference)
        before = study.report(target, "ilp, calibrated", policy, None, budget)
        after = Values(tuple(study.report(target, "ilp, fine-tuned", policy, seed, budget) for seed in seeds))
        loss = fixed - after.mean
        gains = []
        for part in study.fractions(target, policy):
            gain = ""
            if part is not None:
                gain = f"{1 / part:.2f}"
            gains.append(gain)
        made.rows.append((name, target, f"{budget:.3f}", *gains, f"{before:.2f}", str(after), f"{loss:.2f}"))
        for metric, part in zip(("latency", "energy"), study.fractions(target, policy), strict=True):
            if part is not None:
                holds = shared.verdict(1 / part >= BAR and loss <= ALLOWED)
                claim = f"{metric} at least {BAR} times less at a loss of at most {ALLOWED} points"
                yield f"{holds}: {name} on {target}: {claim} ({1 / part:.2f} times, {loss:.2f} points)"


def choose(study: Study, target: str, reference: float) -> float | None:
    """The smallest budget that loses at most `ALLOWED` points on the search split, fine-tuned with the first seed."""
    problem = study.problems[target]
    budgets = [budget for budget in study.effort.budgets if budget * problem.reference >= problem.smallest]

    def loss(budget: float, seed: int | None) -> float:
        return reference - study.accuracy(study.found(target, budget * problem.reference), seed, "search")

    hopeful = [budget for budget in budgets if loss(budget, None) <= HOPEFUL]
    if not hopeful:
        return None
    at, first = budgets.index(hopeful[0]), study.effort.seeds[0]
    if loss(budgets[at], first) > ALLOWED:
        return next((budget for budget in budgets[at + 1 :] if loss(budget, first) <= ALLOWED), None)
    while at and loss(budgets[at - 1], first) <= ALLOWED:
        at -= 1
    return budgets[at]


def sizes(dataset: data.Dataset) -> str:
    parts = ((len(getattr(dataset, name)), name) for name in ("train", "search", "test"))
    return f"Data: {dataset.name}, {' / '.join(f'{count:,} {name}' for count, name in parts)} images."


def save(folder: Path, about: str, tables: list[Table], bars: list[str], results: list[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    intro = (
        f"Made by `experiments/{NAME}.py`, which says how; every accuracy with its policy is in `{NAME}.csv`.\n\n    {about}"
    )
    parts = ["# HAQ's tables", intro, *(table.markdown() for table in tables), "\n".join(f"* {bar}" for bar in bars), REASONS]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(shared.rounded(result) for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--data", help="a name as in haq.data (default: fashion-mnist; with --quick fashion-mnist-12k)")
    parser.add_argument("--steps", type=int, help=f"of fine-tuning (default: {Effort.steps})")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: docs/experiments)")
    options = parser.parse_args()
    effort = Effort()
    name = "fashion-mnist"
    if options.quick:
        effort = QUICK
        name = "fashion-mnist-12k"
    if options.steps:
        effort = replace(effort, steps=options.steps)
    out = shared.folder_for(options.out, options.quick, Path("docs/experiments"))
    dataset = data.load(options.data or name)
    console = Console(width=160)
    start = time.monotonic()

    def show(tables: list[Table]) -> list[Table]:
        for table in tables:
            console.print(table.rich())
        console.print(f"[{(time.monotonic() - start) / 60:.1f} minutes]", markup=False)
        return tables

    made = show([*cost_tables(), *published_tables()])
    studies = []
    for network in (networks.load(), residual(effort.epochs, dataset)):
        studies.append(Study(network, dataset, effort))
        made += show([equal_cost(studies[-1])])
    made += show([specialisation(studies)])
    ratios = Table(
        f"4. Times better than fixed 8 bits, after {effort.steps:,} steps of fine-tuning: % of {len(dataset.test):,} test "
        f"images, mean (min..max) of {len(effort.seeds)} seeds; accuracy measured, latency and energy estimated",
        (
            "network",
            "target",
            "budget",
            "latency, times less",
            "energy, times less",
            "calibrated",
            "fine-tuned",
            "loss, points",
        ),
    )
    bars = [bar for study in studies for bar in headline(study, ratios)]
    made += show([ratios])
    console.print("\n".join(bars))
    if out is not None:
        minutes = (time.monotonic() - start) / 60
        given = f"{' --quick' * options.quick}{f' --data {options.data}' * bool(options.data)}"
        given += f" --steps {options.steps}" * bool(options.steps)
        about = f"OMP_NUM_THREADS=1 python -m experiments.{NAME}{given}\n\n{sizes(dataset)} "
        about += f"It took {minutes:.0f} minutes of one core."
        save(out, about, made, bars, [result for study in studies for result in study.results])
        console.print(f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
