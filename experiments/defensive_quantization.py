"""Defensive quantization (Lin, Gan, Han, ICLR 2019) against plain quantization, on small data.

    python -m experiments.defensive_quantization        (needs the extra `robustness`; about 20 minutes)

Four convolutions and a linear layer with ReLU6, with and without batch norm, on Fashion-MNIST (8,000 training images), with
activations in float and at 8, 4 and 2 bits (PACT, clips starting at 6; weights stay in float, as in the paper's comparison
of activations), trained for 8 epochs with Adam, with the Lipschitz penalty (beta 2e-3, fixed beforehand) and without.
Attacked in the infinity norm at 8/255 on 300 test images: FGSM, PGD with 20 steps (straight-through gradients) and Square
with 150 queries, which needs no gradients. The number that counts is the per-image worst case over all three. Means of three
seeds with smallest and largest; the differences are between pairs of the same seed.

Prints and saves tables, and a picture of how far a PGD perturbation grows from layer to layer. What a stronger suite would
say is another matter: these attacks give upper bounds of robustness.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantizers as Q
from haq import cli, data, models, training

SEEDS, WIDTHS, BETA, EPS = (0, 1, 2), (None, 8, 4, 2), 2e-3, 8 / 255
EPOCHS, IMAGES = 8, 300
UNTRAINED = 0.3  # an accuracy below which a network says nothing about robustness
ATTACKS = ("FGSM", "PGD", "Square")
OUT = Path("docs/experiments")


class Outcome(NamedTuple):
    norm: bool
    bits: int | None
    beta: float
    seed: int
    clean: float
    attacked: dict[str, float]
    worst: float
    norms: float  # product of the layers' spectral norms (reshaped weights)
    growth: float  # amplification after the last convolution over that after the first


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
    return made


def trained(split: data.Split, norm: bool, bits: int | None, beta: float, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = network(norm)
        net = models.Network("small", module, (1, 28, 28))
        if bits is not None:
            names = list(Q.BitPolicy.uniform(module, w=None, a=None))
            policy = Q.BitPolicy({name: (None, None if name == "conv1" else bits) for name in names})
            images, _ = next(split.batches(500))
            module = Q.quantize(module, policy, scheme=Q.PACT(clip=6.0), calibrate=net.preprocess(images))
        training.fit(
            net,
            split,
            module=module,
            epochs=EPOCHS,
            learning_rate=3e-3,
            optimizer="adam",
            seed=seed,
            penalty=(lambda m: Q.lipschitz_penalty(m, beta=beta)) if beta else None,
        )
    return module.eval()


def attack(module: nn.Module, images: Tensor, labels: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Which images each attack leaves correctly classified, and PGD's images."""
    import foolbox
    from pyautoattack.square import SquareAttack

    target = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    right: dict[str, Tensor] = {}
    torch.manual_seed(seed)
    pgd: Any = None
    for name, made in (
        ("FGSM", foolbox.attacks.LinfFastGradientAttack()),
        ("PGD", foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.1)),
    ):
        _, found, success = made(target, images, labels, epsilons=EPS)
        right[name] = ~success
        pgd = found
    square = SquareAttack(module, norm="Linf", n_queries=150, eps=EPS, seed=seed, device="cpu")
    with torch.no_grad():
        found = square.perturb(images, labels)
        right["Square"] = module(found).argmax(1) == labels
    assert float((found - images).abs().max()) <= EPS + 1e-6
    return right, pgd


def main() -> None:
    argparse.ArgumentParser(prog="python -m experiments.defensive_quantization", description=__doc__).parse_args()
    torch.set_num_threads(1)
    dataset = data.load("fashion-mnist-12k")
    net = models.Network("small", network(False), (1, 28, 28))
    pictures, labels = next(dataset.test.batches(IMAGES))
    images = net.preprocess(pictures).contiguous()
    outcomes: list[Outcome] = []
    curves: dict[str, dict[str, float]] = {}
    jobs = [(norm, bits, beta, seed) for norm in (False, True) for bits in WIDTHS for beta in (0.0, BETA) for seed in SEEDS]
    console = Console()
    with cli.progress(console) as bar:
        task = bar.add_task("training and attacking", total=len(jobs), note="")
        for norm, bits, beta, seed in jobs:
            module = trained(dataset.train, norm, bits, beta, seed)
            clean = training.accuracy(net, dataset.test, module)
            right, pgd = attack(module, images, labels, seed)
            worst = torch.stack(list(right.values())).all(0)
            amplification = Q.error_amplification(module, images, pgd)
            attacked = {name: float(kept.float().mean()) for name, kept in right.items()}
            norms = torch.tensor([rho for rho, _ in Q.spectral_norms(module).values()]).prod().item()
            growth = amplification["conv4"] / amplification["conv1"]
            outcomes.append(Outcome(norm, bits, beta, seed, clean, attacked, float(worst.float().mean()), norms, growth))
            if not norm and bits in (None, 4) and seed == 0:
                curves[f"{label(bits)}, {'defensive' if beta else 'plain'}"] = amplification
            bar.advance(task)
    OUT.mkdir(parents=True, exist_ok=True)
    tables = [results(outcomes), differences(outcomes)]
    for table in tables:
        console.print(table)
    save(outcomes, tables)
    Q.draw_amplification(curves, OUT / "error_amplification.png")
    console.print(f"written: {OUT}/defensive_quantization.md, .csv, error_amplification.png")


def label(bits: int | None) -> str:
    return "float" if bits is None else f"{bits} bits"


def spread(values: list[float], percent: bool = True) -> str:
    scale = 100 if percent else 1
    mean = scale * sum(values) / len(values)
    return f"{mean:.1f} ({scale * min(values):.1f}–{scale * max(values):.1f})"


def results(outcomes: list[Outcome]) -> Table:
    title = f"Fashion-MNIST, accuracy in %, infinity norm {EPS * 255:.0f}/255, {len(SEEDS)} seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("network", "activations", "beta", "clean", *ATTACKS, "worst case", "product of norms", "growth"):
        table.add_column(heading)
    for norm in (False, True):
        for bits in WIDTHS:
            for beta in (0.0, BETA):
                some = [o for o in outcomes if (o.norm, o.bits, o.beta) == (norm, bits, beta)]
                attacked = [spread([o.attacked[name] for o in some]) for name in ATTACKS]
                cells = [spread([o.clean for o in some]), *attacked, spread([o.worst for o in some])]
                cells += [spread([o.norms for o in some], False), spread([o.growth for o in some], False)]
                table.add_row("with norms" if norm else "without norms", label(bits), f"{beta:g}", *cells)
    return table


def differences(outcomes: list[Outcome]) -> Table:
    table = Table(title="Defensive minus plain, points, same seed", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("network", "activations", "clean", "worst case", "each seed's worst case"):
        table.add_column(heading)
    for norm in (False, True):
        for bits in WIDTHS:
            pairs = [
                tuple(next(o for o in outcomes if o[:4] == (norm, bits, beta, seed)) for beta in (BETA, 0.0)) for seed in SEEDS
            ]
            worst = [100 * (a.worst - b.worst) for a, b in pairs]
            clean = [100 * (a.clean - b.clean) for a, b in pairs]
            means = [f"{sum(values) / len(values):+.1f}" for values in (clean, worst)]
            each = " ".join(f"{value:+.1f}" for value in worst)
            if any(plain.clean < UNTRAINED for _, plain in pairs):
                each += " (plain didn't train)"
            table.add_row("with norms" if norm else "without norms", label(bits), *means, each)
    return table


def save(outcomes: list[Outcome], tables: list[Table]) -> None:
    with (OUT / "defensive_quantization.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["norms", "bits", "beta", "seed", "clean", *ATTACKS, "worst", "product_of_norms", "growth"])
        for o in outcomes:
            row = [*o[:5], *(o.attacked[name] for name in ATTACKS), o.worst, o.norms, o.growth]
            writer.writerow([f"{x:.4f}" if isinstance(x, float) else x for x in row])
    lines = ["# Defensive quantization against plain quantization", ""]
    lines += ["`python -m experiments.defensive_quantization`; measured, see the script for what was done.", ""]
    for table in tables:
        lines += [f"## {table.title}", "", "| " + " | ".join(str(c.header) for c in table.columns) + " |"]
        lines += ["|" + "---|" * len(table.columns)]
        columns = [list(column.cells) for column in table.columns]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in zip(*columns, strict=True)] + [""]
    lines += ["![error amplification](error_amplification.png)", ""]
    (OUT / "defensive_quantization.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
