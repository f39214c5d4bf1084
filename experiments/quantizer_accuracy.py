"""What the quantizers do to accuracy: a small convolutional network on Fashion-MNIST, by scheme and bits.

    python -m experiments.quantizer_accuracy [--quick] [--data NAME] [--out FOLDER]

Three comparisons, each for three seeds. A seed is a float network with its own start and its own order of images; whatever is
compared within a seed starts from that same network. The network: four 3x3 convolutions with batch norm and ReLU, and a linear
layer (28,538 parameters).

1. Quantization-aware training with linear (straight-through, scales as calibrated), DoReFa, PACT and LSQ at 8, 4, 3 and 2 bits
   of weights and activations, and with signs (binary, Adam); beside it the float network trained on for as long. First and
   last layer are linear at 8 bits.
2. Calibration alone (no training), by its four rules, at 8 to 2 bits; first and last layer at 8 bits.
3. Weights alone, in all layers: k-means against linear, before and after as much training. Of k-means only the centroids (at a
   tenth of the rate), the norms and the bias are trained.

Budget: float networks see every training image 5 times (batches of 128); everything after that, float and tuning included,
one pass of batches of 64, which is 860 steps on Fashion-MNIST's 55,000 images; on a smaller data set more passes, to about
the same number of images. Every rate falls along a cosine. All rates are chosen on the search split, with the first seed: at
4 bits for 8 and 4, at 2 bits for 3 and 2, and for k-means at 2 bits; the linear weights of the third comparison take those of
the linear scheme. The test split is only reported on. About 20 minutes on one core.

`--quick` is a look at whether it runs: the data set that ships with haq, two seeds, one pass, one rate. Its figures mean
little.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq import cli, data, models, training
from quantizers.calibrate import RULES

NAME = "quantizer_accuracy"
LAYERS = ((16, 2), (32, 2), (32, 2), (48, 1))  # channels and stride of the convolutions
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
    "PACT": Q.PACT(clip=None),  # starts where calibration puts it: from 10, one pass is too short to come down
    "LSQ": Q.LSQ(),
}
SGD_RATES = (0.01, 0.03, 0.1)
ADAM_RATES = (1e-3, 3e-3, 1e-2)
SHARING_RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Budget:
    seeds: tuple[int, ...] = (0, 1, 2)
    float_images: int = 275_000
    images: int = 55_000  # of everything after the float network
    grid: bool = True  # or the middle rate of each

    def rates(self, rates: tuple[float, ...]) -> tuple[float, ...]:
        return rates if self.grid else rates[1:2]


QUICK = Budget((0, 1), 16_000, 8_000, False)


class Result(NamedTuple):
    """One trained or calibrated network; accuracies in percent."""

    part: str
    method: str
    weight_bits: int | None
    activation_bits: int | None
    seed: int
    learning_rate: float | None
    accuracy: float
    bytes: int | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def rich(self) -> RichTable:
        made = RichTable(title=self.title, box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(self.columns):
            made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" if i == 0 else "---:" for i in range(len(self.columns))), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


class Values(NamedTuple):
    """Accuracies of one method at one width, by seed."""

    all: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.all)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({min(self.all):.2f}..{max(self.all):.2f})"


def network(seed: int) -> models.Network:
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
    return models.Network("four convolutions", module, (1, 28, 28))


class Study:
    """The data, the float networks by seed, and every result so far."""

    def __init__(self, dataset: data.Dataset, budget: Budget, advance: Callable[[str, int], None]) -> None:
        self.dataset, self.budget, self.advance = dataset, budget, advance
        self.floats: dict[int, models.Network] = {}
        self.results: list[Result] = []
        self.tuned: dict[tuple[str, int | None], float] = {}
        self.tuning = Table(
            "Accuracy on the search split by learning rate, first seed, %", ("scheme", "bits", "rate: accuracy", "chosen")
        )
        self.calibration = next(dataset.train.batches(CALIBRATION_IMAGES))[0]

    def run(self) -> None:
        budget = self.budget
        for seed in budget.seeds:
            made = network(seed)
            self.fit(made, None, f"float, seed {seed}", FLOAT_RATE, seed, budget.float_images, batch_size=128)
            self.floats[seed] = made
        self.tune()
        for seed in budget.seeds:
            self.record("float", "at the start", None, None, seed, None, self.floats[seed].module)
            self.aware(seed)
            self.calibrated(seed)
            self.shared(seed)

    def tune(self) -> None:
        self.choose("float", None, SGD_RATES)
        for scheme in SCHEMES:
            for bits in sorted(set(TUNED_AT.values()), reverse=True):
                self.choose(scheme, bits, SGD_RATES)
        self.choose("binary", 1, ADAM_RATES)
        self.choose("k-means", 2, SHARING_RATES)

    def choose(self, scheme: str, bits: int | None, rates: tuple[float, ...]) -> None:
        seed, found = self.budget.seeds[0], {}
        for rate in self.budget.rates(rates):
            module = self.trained(scheme, bits, seed, rate, "tuning ")
            found[rate] = 100 * training.accuracy(self.floats[seed], self.dataset.search, module)
        best = max(found, key=lambda rate: found[rate])
        self.tuned[scheme, bits] = best
        cells = ", ".join(f"{rate:g}: {accuracy:.2f}" for rate, accuracy in found.items())
        self.tuning.rows.append((scheme, str(bits or "float"), cells, f"{best:g}"))

    def aware(self, seed: int) -> None:
        runs: list[tuple[str, int | None, int | None]] = [("float", None, None)]
        runs += [(scheme, bits, TUNED_AT[bits]) for scheme in SCHEMES for bits in WIDTHS]
        for scheme, bits, tuned_at in [*runs, ("binary", 1, 1)]:
            rate = self.tuned[scheme, tuned_at]
            self.record("trained", scheme, bits, bits, seed, rate, self.trained(scheme, bits, seed, rate))

    def calibrated(self, seed: int) -> None:
        for rule in RULES:
            for bits in PTQ_WIDTHS:
                module = self.quantized(seed, Q.Linear(calibration=rule), bits, bits)
                self.record("calibrated", rule, bits, bits, seed, None, module)

    def shared(self, seed: int) -> None:
        workload = hw_models.trace(self.floats[seed].module, torch.zeros(1, 1, 28, 28))
        for bits in SHARED_WIDTHS:
            for scheme, rate in (
                ("linear", self.tuned["linear", TUNED_AT[bits]]),
                ("k-means", self.tuned["k-means", 2]),
            ):
                start = self.weights_only(scheme, seed, bits)
                size = sum(weight_bytes(workload, scheme, bits))
                self.record("weights", scheme, bits, None, seed, None, start, size)
                module = self.trained(f"{scheme} weights", bits, seed, rate)
                self.record("weights, trained", scheme, bits, None, seed, rate, module, size)

    def trained(self, scheme: str, bits: int | None, seed: int, rate: float, what: str = "") -> nn.Module:
        """The seed's float network as a scheme has it at so many bits, trained."""
        optimizer: str | Callable[[nn.Module], Sequence[torch.optim.Optimizer]] = "sgd"
        penalty: Callable[[nn.Module], Tensor] | None = None
        decay = 1e-4
        if scheme == "float":
            module: nn.Module = copy.deepcopy(self.floats[seed].module)
        elif scheme == "binary":
            module, optimizer, decay = self.binary(seed), "adam", 0.0
        elif scheme.startswith("k-means"):
            module, optimizer = self.weights_only("k-means", seed, bits), lambda m: [sharing_optimizer(m, rate)]
        elif scheme == "linear weights":
            module = self.weights_only("linear", seed, bits)
        else:
            module = self.quantized(seed, SCHEMES[scheme], bits, bits)
            if scheme == "PACT":
                penalty = lambda m: Q.pact_penalty(m, PENALTY)  # noqa: E731
        title = f"{what}{scheme}{'' if bits is None else f' at {bits}'}, seed {seed}"
        self.fit(
            self.floats[seed],
            module,
            title,
            rate,
            100 + seed,
            self.budget.images,
            optimizer=optimizer,
            penalty=penalty,
            weight_decay=decay,
        )
        return module

    def fit(
        self,
        made: models.Network,
        module: nn.Module | None,
        title: str,
        rate: float,
        seed: int,
        images: int,
        *,
        batch_size: int = 64,
        optimizer: str | Callable[[nn.Module], Sequence[torch.optim.Optimizer]] = "sgd",
        penalty: Callable[[nn.Module], Tensor] | None = None,
        weight_decay: float = 1e-4,
    ) -> None:
        split = self.dataset.train
        epochs = passes(images, len(split))
        seen = 0

        def on_step(step: int, steps: int) -> None:
            nonlocal seen
            now = step * epochs * len(split) // steps
            self.advance(title, now - seen)
            seen = now

        training.fit(
            made,
            split,
            module=module,
            epochs=epochs,
            learning_rate=rate,
            seed=seed,
            batch_size=batch_size,
            optimizer=optimizer,
            penalty=penalty,
            weight_decay=weight_decay,
            on_step=on_step,
        )

    def quantized(self, seed: int, scheme: Q.Scheme, weight: int | None, activation: int | None) -> nn.Module:
        """The seed's network, calibrated; first and last layer linear at 8 bits, by the rule of a linear scheme."""
        module = self.floats[seed].module
        names = list(Q.BitPolicy.uniform(module, w=weight, a=activation))
        ends = scheme if type(scheme) is Q.Linear else Q.Linear()
        policy = {name: (8, 8) if name in (names[0], names[-1]) else (weight, activation) for name in names}
        schemes = {name: ends if name in (names[0], names[-1]) else scheme for name in names}
        return Q.quantize(module, policy, scheme=schemes, calibrate=self.floats[seed].preprocess(self.calibration))

    def binary(self, seed: int) -> nn.Module:
        """With the ReLUs before signs left out: behind a ReLU, every sign is +1."""
        module = self.quantized(seed, Q.Binary(), 1, 1)
        relus = [name for name, part in module.named_children() if isinstance(part, nn.ReLU)]
        for name in relus[:-1]:
            setattr(module, name, nn.Identity())
        return module

    def weights_only(self, scheme: str, seed: int, bits: int | None) -> nn.Module:
        module = self.floats[seed].module
        return Q.quantize(module, Q.BitPolicy.uniform(module, w=bits, a=None), scheme=scheme.replace("-", ""))

    def record(
        self,
        part: str,
        method: str,
        weight: int | None,
        activation: int | None,
        seed: int,
        rate: float | None,
        module: nn.Module,
        size: int | None = None,
    ) -> None:
        accuracy = 100 * training.accuracy(self.floats[seed], self.dataset.test, module)
        self.results.append(Result(part, method, weight, activation, seed, rate, accuracy, size))

    def values(self, part: str, method: str, bits: int | None) -> Values:
        found = [r.accuracy for r in self.results if (r.part, r.method, r.weight_bits) == (part, method, bits)]
        return Values(tuple(found))


def passes(images: int, split: int) -> int:
    return max(1, round(images / split))


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


def run_count(budget: Budget) -> int:
    """Trainings after those of the float networks."""
    tuned = len(SCHEMES) * len(set(TUNED_AT.values())) + 3
    per_seed = 2 + len(SCHEMES) * len(WIDTHS) + 2 * len(SHARED_WIDTHS)
    return tuned * len(budget.rates(SGD_RATES)) + per_seed * len(budget.seeds)


def tables(study: Study) -> list[Table]:
    count = len(study.dataset.test)
    per = f"% of {count:,} test images: mean (min..max) of {len(study.budget.seeds)} seeds"
    start, after = study.values("float", "at the start", None), study.values("trained", "float", None)
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
    workload = hw_models.trace(next(iter(study.floats.values())).module, torch.zeros(1, 1, 28, 28))
    whole = 4 * sum(layer.weights for layer in workload.layers)
    shared.rows.append(("float", "32", str(start), str(after), f"{whole:,}", "", ""))
    for scheme in ("linear", "k-means"):
        for bits in SHARED_WIDTHS:
            values = [str(study.values(part, scheme, bits)) for part in ("weights", "weights, trained")]
            size = weight_bytes(workload, scheme, bits)
            sizes = (f"{size[0]:,}", f"{size[1]:,}", f"1/{whole / sum(size):.1f}")
            shared.rows.append((scheme, str(bits), *values, *sizes))
    return [study.tuning, aware, calibrated, shared]


def findings(study: Study) -> Table:
    """What was expected, and whether it came out; differences of means over the seeds, in points."""

    def mean(part: str, method: str, bits: int | None) -> float:
        return study.values(part, method, bits).mean

    made = Table("What was expected", ("claim", "difference", "allowed", "verdict"))

    def check(claim: str, below: float, allowed: float) -> None:
        made.rows.append(
            (claim, f"{-below:+.2f}", f"{-allowed:+.1f}" if allowed else "0.0", "holds" if below <= allowed else "FAILS")
        )

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
    return f"Did not come out as expected: {'; '.join(failed)}." if failed else "All of it came out as expected."


def setting(dataset: data.Dataset, budget: Budget) -> str:
    """The data and the budget, in one sentence each."""
    sizes = [len(split) for split in (dataset.train, dataset.search, dataset.test)]
    first, then = (passes(images, sizes[0]) for images in (budget.float_images, budget.images))
    steps = then * -(-sizes[0] // 64)
    return (
        f"Data: {dataset.name}, {sizes[0]:,} train / {sizes[1]:,} search / {sizes[2]:,} test images. "
        f"Budget: float networks {first} pass{'es' * (first > 1)}; everything after that {then} ({steps:,} steps of 64)."
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.data or ("fashion-mnist-12k" if options.quick else "fashion-mnist")
    out = options.out or (None if options.quick else Path("docs/experiments"))
    budget = QUICK if options.quick else Budget()
    dataset = data.load(name)
    split = len(dataset.train)
    total = split * (len(budget.seeds) * passes(budget.float_images, split) + run_count(budget) * passes(budget.images, split))
    console = Console()
    if console.width < WIDEST:
        console = Console(width=WIDEST)
    about = setting(dataset, budget)
    console.print(about)
    with cli.progress(console) as bar:
        task = bar.add_task("images", total=total, note="")
        study = Study(dataset, budget, lambda title, images: bar.update(task, advance=images, note=title))
        study.run()
    expected = findings(study)
    made = [*tables(study), expected]
    for table in made:
        console.print(table.rich())
    closing = sentence(expected)
    console.print(closing)
    if out is not None:
        words = [f"python -m experiments.{NAME}", *(["--quick"] if options.quick else [])]
        words += [f"--data {options.data}"] if options.data else []
        save(out, " ".join(words), about, made, closing, study.results)
        console.print(f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
