"""Defensive quantization (Lin, Gan, Han, ICLR 2019) against plain quantization, on small data.

The paper's table, and next to it what attacks and checks of today say.

    python -m experiments.defensive_quantization        (needs the extra `robustness`; an hour of one core)

Four convolutions and a linear layer with ReLU6, with and without batch norm, on Fashion-MNIST (8,000 training images), with
activations in float and at 5, 4, 3 and 2 bits (weights stay in float, as in the paper's comparison of activations), with the
Lipschitz penalty (beta 2e-3, fixed beforehand) and without.

All networks have the same budget, twice 5 epochs of Adam with a cosine rate: first in float, which is done once for all
widths, then at the width (or once more in float). Quantizers are PACT, their clips starting from calibration, which at 2
bits trains better than a start at 6. The rate, 1e-2, is the best of 1e-3, 3e-3 and 1e-2 by the search accuracy of plain
networks without norms (seed 0); defensive ones are better at it than at 3e-3, too.

Attacked in the infinity norm at 8/255 on 300 test images. As in the paper: FGSM, R+FGSM and PGD with straight-through
gradients, and a black box, PGD's images of another network (plain, in float, of another seed). Beside it, through
`haq.attacks.assessment` at standard effort: APGD on two losses, Square with 1,000 queries, noise, transfer from the float
twin; the per-image worst case over all; and the checks for masked gradients. Means of three seeds with smallest and largest;
the differences are between pairs of the same seed.

Prints and saves tables, what they say about whether the defence works here, and a picture of how far the worst perturbations
grow from layer to layer.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantizers as Q
from experiments.shared import verdict
from haq import data, networks, training
from haq.attacks.assessment import Assessment, assess
from haq.console.progress import progress

SEEDS, WIDTHS, BETA, EPS = (0, 1, 2), (None, 5, 4, 3, 2), 2e-3, 8 / 255
EPOCHS, RATE, IMAGES = 5, 1e-2, 300
# As they are called in the tables: the paper's, and those of today.
PAPER = {"FGSM": "fgsm", "R+FGSM": "rfgsm", "PGD": "pgd", "black box": "transfer-another"}
TODAY = {"APGD": "apgd-ce", "APGD-DLR": "apgd-dlr", "Square": "square", "twin": "transfer-twin", "noise": "noise"}
ATTACKS = {**PAPER, **TODAY}
OUT = Path("docs/experiments")


class Outcome(NamedTuple):
    norm: bool
    bits: int | None
    beta: float
    seed: int
    clean: float
    attacked: dict[str, float]
    worst: float
    masked: str  # checks that fail
    norms: float  # product of the layers' spectral norms (reshaped weights)
    growth: float  # amplification after the last convolution over that after the first
    amplification: dict[str, float]  # by layer


def network(norm: bool) -> nn.Sequential:
    layers: list[tuple[str, nn.Module]] = []
    channels = 1
    for index, (width, stride) in enumerate(((16, 2), (32, 1), (32, 2), (64, 1)), 1):
        layers.append((f"conv{index}", nn.Conv2d(channels, width, 3, stride, 1)))
        if norm:
            layers.append((f"norm{index}", nn.BatchNorm2d(width)))
        layers.append((f"relu{index}", nn.ReLU6()))
        channels = width
    layers += [("pool", nn.AdaptiveAvgPool2d(2)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(256, 10))]
    made = nn.Sequential()
    for name, layer in layers:
        made.add_module(name, layer)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # torch's own start is too narrow for five layers without norms
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.get_parameter("bias"))
    return made


def train(module: nn.Module, split: data.Split, beta: float, seed: int) -> nn.Module:
    """Train a network in place for one half of the budget."""
    penalty = None
    if beta:
        penalty = partial(Q.lipschitz_penalty, beta=beta)
    training.fit(
        networks.Network("small", module, (1, 28, 28)),
        split,
        training.TrainConfig(
            epochs=EPOCHS,
            learning_rate=RATE,
            optimizer="adam",
            seed=seed,
            penalty=penalty,
        ),
    )
    return module.eval()


def started(split: data.Split, norm: bool, beta: float, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return train(network(norm), split, beta, seed)


def finished(start: nn.Module, split: data.Split, bits: int | None, beta: float, seed: int) -> nn.Module:
    module = copy.deepcopy(start)
    if bits is not None:
        names = list(Q.BitPolicy.uniform(module, w=None, a=None))
        policy = Q.BitPolicy({**dict.fromkeys(names, (None, bits)), "conv1": (None, None)})
        images, _ = next(split.batches(500))
        inputs = networks.Network("small", module, (1, 28, 28)).preprocess(images)
        module = Q.quantize(module, policy, scheme=Q.PACT(clip=None), calibrate=inputs)
    return train(module, split, beta, 1000 + seed)


def attacked(module: nn.Module, another: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Assessment:
    quantized = bool(Q.quant_layers(module))
    sources = {"another": another}
    if quantized:
        sources["twin"] = Q.float_copy(module)
    names = [name for name in ATTACKS.values() if quantized or name != "transfer-twin"]
    return assess(module, images, labels, eps=EPS, attacks=",".join(names), sources=sources, seed=seed)


def study(setting: tuple[bool, float, int]) -> list[Outcome]:
    """Every width of one kind of network, one beta and one seed."""
    norm, beta, seed = setting
    torch.set_num_threads(1)
    dataset = data.load("fashion-mnist-12k")
    net = networks.Network("small", network(False), (1, 28, 28))
    pictures, labels = next(dataset.test.batches(IMAGES))
    images = net.preprocess(pictures).contiguous()
    another = finished(started(dataset.train, norm, 0.0, 100 + seed), dataset.train, None, 0.0, 100 + seed)
    start = started(dataset.train, norm, beta, seed)
    outcomes = []
    for bits in WIDTHS:
        module = finished(start, dataset.train, bits, beta, seed)
        found = attacked(module, another, images, labels, seed)
        amplification = Q.error_amplification(module, images, found.examples)
        # One iteration: of the two norms of a layer only that of the reshaped weight is used, which takes none.
        norms = torch.tensor([rho for rho, _ in Q.spectral_norms(module, iterations=1).values()]).prod().item()
        outcomes.append(
            Outcome(
                norm,
                bits,
                beta,
                seed,
                training.accuracy(net, dataset.test, module),
                {name: found.attacks.get(called, math.nan) for name, called in ATTACKS.items()},
                found.worst,
                "; ".join(check.name for check in found.checks if not check.passed),
                norms,
                amplification["conv4"] / amplification["conv1"],
                amplification,
            )
        )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.defensive_quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="the figures don't depend on it")
    options = parser.parse_args()
    settings = [(norm, beta, seed) for norm in (False, True) for beta in (0.0, BETA) for seed in SEEDS]
    outcomes: list[Outcome] = []
    console = Console()
    context = multiprocessing.get_context("spawn")
    with progress(console) as bar, ProcessPoolExecutor(options.processes, context) as pool:
        task = bar.add_task("training and attacking", total=len(settings), note="")
        for found in pool.map(study, settings):
            outcomes += found
            bar.advance(task)
    OUT.mkdir(parents=True, exist_ok=True)
    tables = [results(outcomes), differences(outcomes)]
    sentences = conclusions(outcomes)
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False)
    save(outcomes, tables, sentences)
    curves = {}
    for o in outcomes:
        if not o.norm and o.bits in (None, 4) and o.seed == 0:
            trained = "plain"
            if o.beta:
                trained = "defensive"
            curves[f"{label(o.bits)}, {trained}"] = o.amplification
    Q.draw_amplification(curves, OUT / "error_amplification.png")
    console.print(f"written: {OUT}/defensive_quantization.md, .csv, error_amplification.png")


def label(bits: int | None) -> str:
    if bits is None:
        return "float"
    return f"{bits} bits"


def kind(norm: bool) -> str:
    if norm:
        return "with norms"
    return "without norms"


def spread(values: list[float], percent: bool = True) -> str:
    if math.isnan(values[0]):  # a float network has no twin
        return "–"
    scale = 1
    if percent:
        scale = 100
    return f"{scale * mean(values):.1f} ({scale * min(values):.1f}–{scale * max(values):.1f})"


def results(outcomes: list[Outcome]) -> Table:
    title = f"Fashion-MNIST, accuracy in %, infinity norm {EPS * 255:.0f}/255, {len(SEEDS)} seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    last = ("worst case", "gradients masked", "product of norms", "growth")
    for heading in ("network", "activations", "beta", "clean", *ATTACKS, *last):
        table.add_column(heading)
    for (norm, bits), beta in itertools.product(settings(), (0.0, BETA)):
        some = of(outcomes, norm, bits, beta)
        under = [spread([o.attacked[name] for o in some]) for name in ATTACKS]
        cells = [spread([o.clean for o in some]), *under, spread([o.worst for o in some])]
        cells += [f"{sum(bool(o.masked) for o in some)} of {len(some)}"]
        cells += [spread([o.norms for o in some], False), spread([o.growth for o in some], False)]
        table.add_row(kind(norm), label(bits), f"{beta:g}", *cells)
    return table


def settings() -> list[tuple[bool, int | None]]:
    return [(norm, bits) for norm in (False, True) for bits in WIDTHS]


def of(outcomes: list[Outcome], norm: bool, bits: int | None, beta: float) -> list[Outcome]:
    """The outcomes of a setting in the order of the seeds."""
    return sorted((o for o in outcomes if o[:3] == (norm, bits, beta)), key=lambda o: o.seed)


def gains(outcomes: list[Outcome], norm: bool, bits: int | None, key: str) -> list[float]:
    """Defensive minus plain in points, by seed."""
    pairs = zip(of(outcomes, norm, bits, BETA), of(outcomes, norm, bits, 0.0), strict=True)
    return [100 * (getattr(a, key) - getattr(b, key)) for a, b in pairs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def differences(outcomes: list[Outcome]) -> Table:
    table = Table(title="Defensive minus plain, points, same seed", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("network", "activations", "clean", "worst case", "each seed's worst case"):
        table.add_column(heading)
    for norm, bits in settings():
        clean, worst = (gains(outcomes, norm, bits, key) for key in ("clean", "worst"))
        each = " ".join(f"{value:+.1f}" for value in worst)
        table.add_row(kind(norm), label(bits), f"{mean(clean):+.1f}", f"{mean(worst):+.1f}", each)
    return table


def conclusions(outcomes: list[Outcome]) -> list[str]:
    """What the numbers say about "the worst case of defensive networks is above that of plain ones", and how surely."""
    sentences: list[str] = []
    mostly = held = clear = hidden = 0
    dear: list[str] = []
    blind: list[str] = []
    for norm, bits in settings():
        worst, clean = (gains(outcomes, norm, bits, key) for key in ("worst", "clean"))
        both = [of(outcomes, norm, bits, beta) for beta in (0.0, BETA)]
        apart = max(100 * (max(o.worst for o in some) - min(o.worst for o in some)) for some in both)
        above = sum(value > 0 for value in worst)
        holds = above == len(worst)
        beyond = mean(worst) > apart
        mostly += mean(worst) > 0
        held += holds
        clear += holds and beyond
        more = "no more"
        if beyond:
            more = "more"
        sentences.append(
            f"{kind(norm)}, {label(bits)}: defensive above plain {verdict(holds, 'does not hold')} ({above} of "
            f"{len(worst)} seeds, {mean(worst):+.1f} points in the mean, {more} than the "
            f"{apart:.1f} between seeds of the same networks)."
        )
        if mean(clean) < -1:
            dear.append(f"{label(bits)} {kind(norm)} ({mean(clean):+.1f})")
        hidden += sum(bool(o.masked) for some in both for o in some)
        if any(mean([o.attacked["Square"] - o.attacked["PGD"] for o in some]) < 0 for some in both):
            blind.append(f"{label(bits)} {kind(norm)}")
    sentences += [
        f"Of {len(settings())} settings it holds in every seed in {held}, in {clear} of them by more than seeds differ, and "
        f"in the mean in {mostly}.",
        f"It costs more than 1 point of clean accuracy at: {', '.join(dear) or 'none'}.",
        f"Square, without gradients, leaves fewer images than PGD at: {', '.join(blind) or 'none'}. There straight-through "
        "gradients mislead, and a longer search without gradients may find more.",
        *bar(outcomes),
        *fooled(outcomes),
        f"A check for masked gradients fails for {hidden} of {len(outcomes)} networks; the worst case of these is an upper "
        "bound of their robustness.",
    ]
    return sentences


def bar(outcomes: list[Outcome]) -> list[str]:
    """Whether the defence does at 4 bits what is asked of it: a higher worst case in the mean, for at most a point."""
    made = []
    for norm in (False, True):
        worst, clean = (mean(gains(outcomes, norm, 4, key)) for key in ("worst", "clean"))
        says = verdict(worst > 0 and clean >= -1, "does not hold")
        made.append(
            f"At 4 bits {kind(norm)}, a higher worst case in the mean of {len(SEEDS)} seeds for at most 1 point of clean "
            f"accuracy {says}: {worst:+.1f} for {clean:+.1f}."
        )
    return made


def fooled(outcomes: list[Outcome]) -> list[str]:
    """What the paper's own attacks would have said, beside the worst case over all."""
    made = []
    for norm in (False, True):
        for attack in ("FGSM", "PGD"):
            few, whole = (mean([o.attacked[attack] for o in of(outcomes, norm, bits, 0.0)]) for bits in (2, None))
            worst_few, worst_whole = (mean([o.worst for o in of(outcomes, norm, bits, 0.0)]) for bits in (2, None))
            by = 100 * (few - whole)
            truly = 100 * (worst_few - worst_whole)
            made.append(
                f"Plain networks {kind(norm)}, 2 bits beside float: {by:+.1f} points under {attack} alone, {truly:+.1f} in "
                "the worst case."
            )
    return made


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return ""
    return f"{value:.4f}"


def save(outcomes: list[Outcome], tables: list[Table], sentences: list[str]) -> None:
    with (OUT / "defensive_quantization.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["norms", "bits", "beta", "seed", "clean", *ATTACKS, "worst", "masked", "product_of_norms", "growth"])
        for o in outcomes:
            row = [*o[:5], *(o.attacked[name] for name in ATTACKS), o.worst, o.masked, o.norms, o.growth]
            writer.writerow([_cell(value) for value in row])
    lines = ["# Defensive quantization against plain quantization", ""]
    lines += ["`python -m experiments.defensive_quantization`; measured, see the script for what was done.", ""]
    for table in tables:
        lines += [f"## {table.title}", "", "| " + " | ".join(str(c.header) for c in table.columns) + " |"]
        lines += ["|" + "---|" * len(table.columns)]
        columns = [list(column.cells) for column in table.columns]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in zip(*columns, strict=True)] + [""]
    lines += ["## What it says", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += ["![error amplification](error_amplification.png)", ""]
    (OUT / "defensive_quantization.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
