"""What the quantizers do to accuracy: a small convolutional network on Fashion-MNIST, by scheme and bits.

    python -m experiments.quantizer_accuracy [--quick] [--data NAME] [--out FOLDER] [--processes N]

Three comparisons, each for three seeds. A seed is a float network with its own start and its own order of images; whatever is
compared within a seed starts from that same network. The network: four 3x3 convolutions with batch norm and ReLU, and a linear
layer (72,602 parameters). Its channels are what one bit needs: with 16, 32, 32 and 48 (28,538 parameters), signs were about
5 points below float on the search split after three passes.

1. Quantization-aware training with linear (straight-through, scales as calibrated), DoReFa, PACT and LSQ at 8, 4, 3 and 2 bits
   of weights and activations, and with signs (binary); beside it the float network trained on for as long. First and last
   layer are linear at 8 bits. Binary: the slope of Bi-Real Net for the activations' signs, XNOR-Net's scale for the weights,
   no ReLU between a norm and the next sign, Adam, no weight decay.
2. Calibration alone (no training), by its four rules, at 8 to 2 bits; first and last layer at 8 bits.
3. Weights alone, in all layers: k-means against linear, before and after as much training. Of k-means only the centroids (at a
   tenth of the rate), the norms and the bias are trained.

Budget: float networks see every training image 5 times (batches of 128); everything after that, float included, two passes of
batches of 64, which is 1,720 steps on Fashion-MNIST's 55,000 images, and tuning one; on a smaller data set more passes, to
about the same number of images. Every rate falls along a cosine. All rates are chosen on the search split, with the first
seed: at 4 bits for 8 and 4, at 2 bits for 3 and 2, and for k-means at 2 bits; the linear weights of the third comparison take
those of the linear scheme. Binary's slope, its scale and the network were chosen there too. The test split is only reported
on. Every training has one core; the figures don't depend on how many run at a time. About half an hour of one core.

`--quick` is a look at whether it runs: the data set that ships with haq, two seeds, one pass, one rate. Its figures mean
little.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

import hw_models
import quantizers as Q
from experiments import shared
from haq import data, networks, training
from haq.console.errors import run_command
from haq.console.progress import progress
from quantizers.observers import RULES

NAME = "quantizer_accuracy"
LAYERS = ((16, 2), (48, 2), (64, 2), (64, 1))  # channels and stride of the convolutions
WIDEST = 140  # characters of a table
CALIBRATION_IMAGES = 500
FLOAT_RATE = 0.2
PENALTY = 1e-4  # PACT's; the weights' decay, as in the paper
WIDTHS = (8, 4, 3, 2)
TUNED_AT = {8: 4, 4: 4, 3: 2, 2: 2}
PTQ_WIDTHS = (8, 6, 4, 3, 2)
SHARED_WIDTHS = (4, 3, 2)
SCHEMES: dict[str, Q.Scheme] = {
    "linear": Q.Linear(),
    "DoReFa": Q.DoReFa(),
    "PACT": Q.PACT(clip=None),  # starts where calibration puts it: from 10, one pass was too short to come down
    "LSQ": Q.LSQ(),
}
BINARY = Q.Binary(activation_estimator="approx_sign", scaling="xnor")
SGD_RATES = (0.01, 0.03, 0.1)
ADAM_RATES = (3e-3, 1e-2, 3e-2)
SHARING_RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Budget:
    seeds: tuple[int, ...] = (0, 1, 2)
    float_images: int = 275_000
    images: int = 110_000  # of everything after the float network,
    tuning_images: int = 55_000  # and while its rate is looked for
    grid: bool = True  # or the middle rate of each

    def rates(self, rates: tuple[float, ...]) -> tuple[float, ...]:
        if self.grid:
            return rates
        return rates[1:2]


QUICK = Budget((0, 1), 16_000, 8_000, 8_000, False)


class Run(NamedTuple):
    """What is made of a seed's float network: quantized so, and trained if there is a rate."""

    part: str
    method: str
    weight_bits: int | None
    activation_bits: int | None
    seed: int
    learning_rate: float | None = None

    @property
    def of_weights(self) -> bool:
        return self.weight_bits is not None and self.activation_bits is None


class Result(NamedTuple):
    """A run, and its accuracy in percent."""

    part: str
    method: str
    weight_bits: int | None
    activation_bits: int | None
    seed: int
    learning_rate: float | None
    accuracy: float
    bytes: int | None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def rich(self) -> RichTable:
        made = RichTable(title=self.title, box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            made.add_column(column, justify="right", no_wrap=True)
        made.columns[0].justify = "left"
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


class Values(NamedTuple):
    """Accuracies of one method at one width, by seed."""

    all: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.all)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({min(self.all):.2f}..{max(self.all):.2f})"


def network(seed: int) -> networks.Network:
    """The float network before training, its random start that of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        inputs = 1
        for outputs, stride in LAYERS:
            parts += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return networks.Network("four convolutions", module, (1, 28, 28))


load = functools.cache(data.load)


@dataclass
class Maker:
    """Makes what a run says, in any process: sent there without the data, which every process loads for itself."""

    name: str
    budget: Budget
    floats: dict[int, networks.Network] = field(default_factory=dict)  # by seed

    @property
    def dataset(self) -> data.Dataset:
        return load(self.name)

    def passes(self, images: int) -> int:
        return max(1, round(images / len(self.dataset.train)))

    def epochs(self, run: Run) -> int:
        if run.learning_rate is None:
            return 0
        if run.part == "tuning":
            return self.passes(self.budget.tuning_images)
        return self.passes(self.budget.images)

    def float_network(self, seed: int) -> networks.Network:
        made = network(seed)
        epochs = self.passes(self.budget.float_images)
        training.fit(made, self.dataset.train, training.TrainConfig(epochs, FLOAT_RATE, seed, batch_size=128))
        return made

    def accuracy(self, run: Run) -> float:
        """In percent, on the search split while tuning, else on the test split."""
        module = self.start(run)
        if run.learning_rate is not None:
            self.train(run, module, run.learning_rate)
        split = self.dataset.test
        if run.part == "tuning":
            split = self.dataset.search
        return 100 * training.accuracy(self.floats[run.seed], split, module)

    def start(self, run: Run) -> nn.Module:
        """A copy of the seed's float network as a run has it before training."""
        if run.method == "float":
            return copy.deepcopy(self.floats[run.seed].module)
        if run.of_weights:
            module = self.floats[run.seed].module
            policy = Q.BitPolicy.uniform(module, w=run.weight_bits, a=None)
            return Q.quantize(module, policy, scheme=run.method.replace("-", ""))
        if run.part == "calibrated":
            return self.quantized(run, Q.Linear(calibration=run.method))
        if run.method == "binary":
            return self.binary(run)
        return self.quantized(run, SCHEMES[run.method])

    def train(self, run: Run, module: nn.Module, rate: float) -> None:
        optimizer: str | Callable[[nn.Module], Sequence[torch.optim.Optimizer]] = "sgd"
        penalty = None
        weight_decay = 1e-4
        if run.method == "binary":
            optimizer = "adam"
            weight_decay = 0.0
        elif run.method == "PACT":
            penalty = functools.partial(Q.pact_penalty, strength=PENALTY)
        elif run.method == "k-means":
            optimizer = lambda m: [sharing_optimizer(m, rate)]  # noqa: E731
        training.fit(
            self.floats[run.seed],
            self.dataset.train,
            training.TrainConfig(
                epochs=self.epochs(run),
                learning_rate=rate,
                seed=100 + run.seed,
                batch_size=64,
                optimizer=optimizer,
                penalty=penalty,
                weight_decay=weight_decay,
            ),
            module=module,
        )

    def quantized(self, run: Run, scheme: Q.Scheme) -> nn.Module:
        """The seed's network, calibrated; first and last layer linear at 8 bits, by the rule of a linear scheme."""
        made = self.floats[run.seed]
        names = list(Q.BitPolicy.uniform(made.module, w=None, a=None))
        ends = scheme
        if type(scheme) is not Q.Linear:
            ends = Q.Linear()
        policy = dict.fromkeys(names, (run.weight_bits, run.activation_bits))
        schemes = dict.fromkeys(names, scheme)
        for name in (names[0], names[-1]):
            policy[name] = (8, 8)
            schemes[name] = ends
        images = next(self.dataset.train.batches(CALIBRATION_IMAGES))[0]
        return Q.quantize(made.module, policy, scheme=schemes, calibrate=made.preprocess(images))

    def binary(self, run: Run) -> nn.Module:
        """With the ReLUs before signs left out: behind a ReLU, every sign is +1."""
        module = self.quantized(run, BINARY)
        relus = [name for name, part in module.named_children() if isinstance(part, nn.ReLU)]
        for name in relus[:-1]:
            setattr(module, name, nn.Identity())
        return module


class Study:
    """Every result so far."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.budget = maker.budget
        # Of a network of its own: what the maker holds may be on its way to a process at any time.
        self.workload = hw_models.trace(network(0).module, torch.zeros(1, 1, 28, 28))
        self.results: list[Result] = []
        self.tuned: dict[tuple[str, int | None], float] = {}
        self.tuning = Table(
            "Accuracy on the search split by learning rate, first seed, %", ("scheme", "bits", "rate: accuracy", "chosen")
        )

    def run(self, pool: Executor, advance: Callable[[str, int], None]) -> None:
        maker, seeds = self.maker, self.budget.seeds
        floats = {}
        for seed, made in zip(seeds, pool.map(maker.float_network, seeds), strict=True):
            floats[seed] = made
            advance(f"float, seed {seed}", maker.passes(self.budget.float_images))
        maker.floats = floats

        def accuracies(runs: Sequence[Run]) -> Iterator[tuple[Run, float]]:
            for run, accuracy in zip(runs, pool.map(maker.accuracy, runs), strict=True):
                yield run, accuracy
                advance(f"{run.part}: {run.method}, seed {run.seed}", maker.epochs(run))

        found: dict[tuple[str, int | None], dict[float, float]] = {}
        for run, accuracy in accuracies(tuning_runs(self.budget)):
            found.setdefault((run.method, run.weight_bits), {})[run.learning_rate or 0.0] = accuracy
        for (method, bits), by_rate in found.items():
            best = max(by_rate, key=lambda rate: by_rate[rate])
            self.tuned[method, bits] = best
            cells = ", ".join(f"{rate:g}: {accuracy:.2f}" for rate, accuracy in by_rate.items())
            self.tuning.rows.append((method, str(bits or "float"), cells, f"{best:g}"))
        for run, accuracy in accuracies(final_runs(self.budget, self.tuned)):
            size = None
            if run.of_weights:
                size = sum(weight_bytes(self.workload, run.method, run.weight_bits or 0))
            self.results.append(Result(*run, accuracy, size))

    def values(self, part: str, method: str, bits: int | None) -> Values:
        found = [r.accuracy for r in self.results if (r.part, r.method, r.weight_bits) == (part, method, bits)]
        return Values(tuple(found))


def tuning_runs(budget: Budget) -> list[Run]:
    made: list[tuple[str, int | None, int | None, tuple[float, ...]]] = [("float", None, None, SGD_RATES)]
    made += [(scheme, bits, bits, SGD_RATES) for scheme in SCHEMES for bits in sorted(set(TUNED_AT.values()), reverse=True)]
    made += [("binary", 1, 1, ADAM_RATES), ("k-means", 2, None, SHARING_RATES)]
    return [
        Run("tuning", method, weight, activation, budget.seeds[0], rate)
        for method, weight, activation, rates in made
        for rate in budget.rates(rates)
    ]


def final_runs(budget: Budget, tuned: dict[tuple[str, int | None], float]) -> list[Run]:
    """Everything that the tables report on, with the rates of these schemes at these bits."""
    made: list[Run] = []
    for seed in budget.seeds:
        made.append(Run("at the start", "float", None, None, seed))
        made.append(Run("trained", "float", None, None, seed, tuned["float", None]))
        for scheme in SCHEMES:
            made += [Run("trained", scheme, bits, bits, seed, tuned[scheme, TUNED_AT[bits]]) for bits in WIDTHS]
        made.append(Run("trained", "binary", 1, 1, seed, tuned["binary", 1]))
        made += [Run("calibrated", rule, bits, bits, seed) for rule in RULES for bits in PTQ_WIDTHS]
        for bits in SHARED_WIDTHS:
            for scheme, rate in (("linear", tuned["linear", TUNED_AT[bits]]), ("k-means", tuned["k-means", 2])):
                made.append(Run("weights", scheme, bits, None, seed))
                made.append(Run("weights, trained", scheme, bits, None, seed, rate))
    return made


def sharing_optimizer(module: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The centroids at a tenth of the rate: their gradients are sums over many weights."""
    shared = Q.learned_parameters(module)
    known = {id(parameter) for parameter in shared}
    others = [parameter for parameter in module.parameters() if id(parameter) not in known]
    groups = [{"params": shared, "lr": rate / 10}, {"params": others, "lr": rate}]
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)


def weight_bytes(workload: hw_models.Workload, scheme: str, bits: int) -> tuple[int, int]:
    """Bytes of the weights at so many bits, and of the codebooks or scales that go with them."""
    parts = hw_models.storage_parts(workload, scheme.replace("-", ""))
    # Activations stay in float: the scale of each layer's input isn't needed.
    scales = parts["scales"] - hw_models.storage_parts(workload, "kmeans")["scales"]
    return int(parts["weights"][:, bits - 1].sum()), int((parts["codebooks"] + scales)[:, bits - 1].sum())


def tables(study: Study) -> list[Table]:
    count = len(study.maker.dataset.test)
    per = f"% of {count:,} test images: mean (min..max) of {len(study.budget.seeds)} seeds"
    start, after = study.values("at the start", "float", None), study.values("trained", "float", None)
    widths = tuple(f"{bits} bits" for bits in WIDTHS)
    aware = Table(f"1. Quantization-aware training, first and last layer at 8 bits; {per}", ("scheme", *widths))
    aware.rows.extend([("float, at the start", str(start), "", "", ""), ("float, trained on", str(after), "", "", "")])
    for scheme in SCHEMES:
        aware.rows.append((scheme, *(str(study.values("trained", scheme, bits)) for bits in WIDTHS)))
    aware.rows.append(("binary (1 bit)", str(study.values("trained", "binary", 1)), "", "", ""))
    calibrated = Table(
        f"2. Calibration alone, first and last layer at 8 bits; {per}", ("rule", *(f"{bits} bits" for bits in PTQ_WIDTHS))
    )
    for rule in RULES:
        calibrated.rows.append((rule, *(str(study.values("calibrated", rule, bits)) for bits in PTQ_WIDTHS)))
    columns = ("weights", "bits", "before training", "trained", "bytes", "codebooks or scales", "of float")
    shared = Table(f"3. Weights alone, in all layers; {per}", columns)
    whole = 4 * sum(layer.weights for layer in study.workload.layers)
    shared.rows.append(("float", "32", str(start), str(after), f"{whole:,}", "", ""))
    for scheme in ("linear", "k-means"):
        for bits in SHARED_WIDTHS:
            values = [str(study.values(part, scheme, bits)) for part in ("weights", "weights, trained")]
            size = weight_bytes(study.workload, scheme, bits)
            sizes = (f"{size[0]:,}", f"{size[1]:,}", f"1/{whole / sum(size):.1f}")
            shared.rows.append((scheme, str(bits), *values, *sizes))
    return [study.tuning, aware, calibrated, shared]


def findings(study: Study) -> Table:
    """What was expected, and whether it came out; differences of means over the seeds, in points."""

    def mean(part: str, method: str, bits: int | None) -> float:
        return study.values(part, method, bits).mean

    made = Table("What was expected", ("claim", "difference", "allowed", "verdict"))

    def check(claim: str, below: float, allowed: float) -> None:
        at_most = "0.0"
        if allowed:
            at_most = f"{-allowed:+.1f}"
        made.rows.append((claim, f"{-below:+.2f}", at_most, shared.verdict(below <= allowed, "FAILS")))

    reference = mean("trained", "float", None)
    for scheme, bits, allowed in (("LSQ", 4, 0.5), ("LSQ", 2, 2.5), ("binary", 1, 5.0)):
        check(f"{scheme} at {bits} bit{'s' * (bits > 1)} against float", reference - mean("trained", scheme, bits), allowed)
    for bits in (width for width in WIDTHS if width <= 4):
        rule = max(RULES, key=lambda rule: mean("calibrated", rule, bits))
        for scheme in SCHEMES:
            below = mean("calibrated", rule, bits) - mean("trained", scheme, bits)
            check(f"{scheme} trained at {bits} bits against the best calibration ({rule})", below, 0.0)
    for bits in (3, 2):
        check(f"LSQ against DoReFa at {bits} bits", mean("trained", "DoReFa", bits) - mean("trained", "LSQ", bits), 0.5)
    return made


def sentence(table: Table) -> str:
    failed = [
        f"{claim} ({difference} points, allowed {allowed})" for claim, difference, allowed, v in table.rows if v == "FAILS"
    ]
    if failed:
        return f"Did not come out as expected: {'; '.join(failed)}."
    return "All of it came out as expected."


def setting(study: Study) -> str:
    """The data and the budget, in one sentence each."""
    dataset, budget = study.maker.dataset, study.budget
    sizes = [len(split) for split in (dataset.train, dataset.search, dataset.test)]
    first, then, tuning = (study.maker.passes(images) for images in (budget.float_images, budget.images, budget.tuning_images))
    steps = then * -(-sizes[0] // 64)
    return (
        f"Data: {dataset.name}, {sizes[0]:,} train / {sizes[1]:,} search / {sizes[2]:,} test images. "
        f"Budget: float networks {first} pass{'es' * (first > 1)}; everything after that {then} ({steps:,} steps of 64), "
        f"tuning {tuning}."
    )


def save(folder: Path, command: str, about: str, made: Iterable[Table], closing: str, results: Sequence[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    intro = (
        "Made by `experiments/quantizer_accuracy.py`, which says what is compared; "
        f"every single result is in `{NAME}.csv`.\n\n    {command}\n\n{about}"
    )
    parts = ["# Accuracy of the quantizers", intro, *(table.markdown() for table in made), closing]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(result._replace(accuracy=round(result.accuracy, 4)) for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--data", help="a name as in haq.data (default: fashion-mnist; with --quick fashion-mnist-12k)")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: docs/experiments)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="trainings at a time (default: one a core)")
    options = parser.parse_args()
    out = shared.folder_for(options.out, options.quick, Path("docs/experiments"))
    budget = Budget()
    name = "fashion-mnist"
    if options.quick:
        budget = QUICK
        name = "fashion-mnist-12k"
    maker = Maker(options.data or name, budget)
    study = Study(maker)
    console = Console()
    if console.width < WIDEST:
        console = Console(width=WIDEST)
    about = setting(study)
    console.print(about)
    rates = dict.fromkeys(((run.method, run.weight_bits) for run in tuning_runs(budget)), 0.0)
    runs = [*tuning_runs(budget), *final_runs(budget, rates)]
    total = len(budget.seeds) * maker.passes(budget.float_images) + sum(maker.epochs(run) for run in runs)
    # Spawned, not forked: a fork of a process whose torch has threads can hang.
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (1,)) as pool,
        progress(console) as bar,
    ):
        task = bar.add_task("passes", total=total, note="")
        study.run(pool, lambda note, passes: bar.update(task, advance=passes, note=note))
    expected = findings(study)
    made = [*tables(study), expected]
    for table in made:
        console.print(table.rich())
    closing = sentence(expected)
    console.print(closing)
    if out is not None:
        words = [f"python -m experiments.{NAME}"]
        if options.quick:
            words.append("--quick")
        if options.data:
            words.append(f"--data {options.data}")
        save(out, " ".join(words), about, made, closing, study.results)
        console.print(f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
