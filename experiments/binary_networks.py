"""Binary networks trained in four comparisons: what trains them, what stands for a sign's slope, ensembles, fewer filters.

    python -m experiments.binary_networks [a|b|c|d ...] [--quick] [--save FOLDER]

a   ADAM, SGD and SGD with momentum; clipping of the slope and of the weights, with the share of weights that it clipped; the
    recipe of two stages.
b   estimators, for weights and activations alike, with and without XNOR scaling; Bop, which has no float weights behind.
c   BENN: 1, 3, 6 and 9 networks that vote, by bagging and by SAMME boosting, for what they cost and under noise; beside them
    one network of the bytes of nine, and a float network.
d   main/subsidiary pruning of filters against random filters of the same number, and no pruning.

Data: fashion-mnist-12k, 8,000 images to train on, all of them in every epoch; learning rates are chosen on the 2,000 search
images, and all that is printed is of the 2,000 test images: mean (lowest..highest) of three seeds, accuracy in %. Batches of
128, images shifted and mirrored, cosine learning rates, no weight decay.

Networks: in a, b and c 784 - W - W - W - W - 10 linear layers, W = 128 in a and b and 24 in c; in d convolutions of 16, 32
and 32 channels with stride 2, and a linear layer. Batch norm behind every layer but the last. The first and the last layer
are float; the others have one-bit weights and inputs. Epochs: a 20, b 15, c 12 for each network, d 6, and 2 more per pruned
layer, for all alike. Learning rates: the best by the search accuracy, of three in a (the mean of three seeds), of four in b
and c (seed 0), of two in d (seed 0); * marks one at the end of those tried in a, b or c. Some 30 minutes on a core shared
with other work.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import quantizers as Q
from experiments.shared import add_columns, verdict
from haq import data, training
from haq.networks import Network

SEEDS = (0, 1, 2)
ADAM_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
# Part a: three each, a factor of three apart, around what is best on the search split. SGD's third diverges.
COMPARED_RATES = {
    "ADAM": ADAM_RATES[1:],
    "SGD": (1.0, 3.0, 10.0),
    "SGD, momentum 0.9": (0.3, 1.0, 3.0),
    "ADAM, two stages": ADAM_RATES[1:],
}
BOP_RATES = (1e-4, 1e-3, 1e-2)  # gamma
BOP_THRESHOLD, BOP_ADAM = 1e-6, 1e-2
TARGETS = (75, 78)  # % of the test images, that the epochs are counted to
NOISE = 0.3  # standard deviation, of pixels in 0..1
MEMBERS = (1, 3, 6, 9)
STRENGTHS = (0.4,)  # of the penalty on kept filters
MEAN, STD = 0.286, 0.353

Optimizers = Callable[[nn.Module], Sequence[torch.optim.Optimizer]]


@dataclass
class Budget:
    train: data.Split
    search: data.Split
    test: data.Split
    wide: int = 128
    narrow: int = 24
    epochs: dict[str, int] = field(default_factory=lambda: {"a": 20, "b": 15, "c": 12, "d": 6, "mask": 2, "weights": 2})
    members: tuple[int, ...] = MEMBERS
    on_epoch: Callable[[], None] = lambda: None


class Run(NamedTuple):
    """One trained network: accuracies in %, that of the test split after every epoch too."""

    search: float
    test: float
    trace: list[float]
    network: Network
    clipped: float | None = None  # share of the weights, over all steps, in %

    def epochs_to(self, target: float) -> int:
        return next((i + 1 for i, value in enumerate(self.trace) if value >= target), len(self.trace) + 1)

    @property
    def outside(self) -> float:
        """The share of the float weights behind one-bit ones that are outside -1..1, in %."""
        weights = Q.split_parameters(self.network.module)[0]
        return 100 * sum(int((w.abs() > 1).sum()) for w in weights) / sum(w.numel() for w in weights)


Cell = str | list[float]


@dataclass
class Result:
    """A table; a cell is text, or one value per seed."""

    part: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]] = field(default_factory=list)
    digits: dict[str, int] = field(default_factory=dict)

    def text(self, row: list[Cell]) -> list[str]:
        made = []
        for column, cell in zip(self.columns, row, strict=True):
            if not isinstance(cell, str):
                cell = spread(cell, self.digits.get(column, 1))
            made.append(cell)
        return made


@dataclass(frozen=True)
class Direction:
    """What the literature leads to expect, and whether it is so here."""

    name: str
    claim: str
    holds: bool
    figures: str
    otherwise: str = ""

    def text(self) -> str:
        said = f"{self.name}: {self.claim}: {verdict(self.holds, 'does not hold')} here. {self.figures}"
        if self.otherwise and not self.holds:
            said += f" {self.otherwise}"
        return said


Made = tuple[list[Result], list[Direction]]


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def marked(rate: float, rates: Sequence[float]) -> str:
    """A rate chosen among some, in rising order, with a star where a better one may lie beyond them."""
    if rate in (rates[0], rates[-1]):
        return f"{rate:g}*"
    return f"{rate:g}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    if min(values) == max(values):
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def linear_network(width: int, seed: int, scheme: Q.Scheme | None, uniform: bool = False) -> Network:
    """Make a network of four hidden layers, all but the first of one bit.

    Without a scheme it is a float one with ReLUs. `uniform` draws the float weights behind one-bit ones from -1..1 instead of
    torch's narrow start.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, width, width, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width)]
        if scheme is None:
            layers.append(nn.ReLU())
    module: nn.Module = nn.Sequential(*layers, nn.Linear(width, 10))
    if scheme is not None:
        module = _binarized(module, scheme)
    if uniform:
        for weight in Q.split_parameters(module)[0]:
            nn.init.uniform_(weight, -1, 1)
    return Network(f"linear-{width}", module, (1, 28, 28), (MEAN,), (STD,))


def convolutional_network(seed: int) -> Network:
    torch.manual_seed(seed)
    module = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)),
        *(nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    network = Network("convolutional", _binarized(module, Q.MainSubsidiary()), (1, 28, 28), (MEAN,), (STD,))
    for layer in Q.quant_layers(network.module).values():
        layer.get_parameter("filter_mask").requires_grad_(False)
    return network


def _binarized(module: nn.Module, scheme: Q.Scheme) -> nn.Module:
    names = list(Q.BitPolicy.uniform(module, 1, 1))
    bits: dict[str, tuple[int | None, int | None]] = dict.fromkeys(names, (1, 1))
    bits[names[0]] = bits[names[-1]] = (None, None)
    return Q.quantize(module, Q.BitPolicy(bits), scheme=scheme)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adam(rate: float) -> Optimizers:
    return lambda module: [torch.optim.Adam(trainable(module), rate)]


def sgd(rate: float, momentum: float = 0.0) -> Optimizers:
    return lambda module: [torch.optim.SGD(trainable(module), rate, momentum=momentum)]


def bop(gamma: float) -> Optimizers:
    def made(module: nn.Module) -> list[torch.optim.Optimizer]:
        binary, others = Q.split_parameters(module)
        return [Q.Bop(binary, gamma, BOP_THRESHOLD), torch.optim.Adam(others, BOP_ADAM)]

    return made


def train(
    budget: Budget,
    network: Network,
    optimizers: Sequence[tuple[int, Optimizers]],
    seed: int,
    *,
    split: data.Split | None = None,
    clipping: Q.WeightClipping | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    fixed_norms: bool = False,
) -> Run:
    """Train a network in stages, each of so many epochs with optimizers of its own.

    Where the loss overflows training ends, and the accuracies are those of guessing, 10 %.
    """
    trace: list[float] = []

    def on_epoch(epoch: int, loss: float) -> None:
        trace.append(100 * training.accuracy(network, budget.test))
        budget.on_epoch()

    torch.manual_seed(seed)
    for stage, (epochs, optimizer) in enumerate(optimizers):
        try:
            training.fit(
                network,
                split or budget.train,
                training.TrainConfig(
                    epochs=epochs,
                    learning_rate=0.0,  # the optimizers have their own
                    seed=seed + 1000 * stage,
                    optimizer=optimizer,
                    clipping=clipping,
                    penalty=penalty,
                    fixed_norms=fixed_norms,
                ),
                on_epoch=on_epoch,
            )
        except FloatingPointError:
            return Run(10.0, 10.0, [*trace, 10.0], network)
    found = 100 * training.accuracy(network, budget.search)
    clipped = None
    if clipping:
        clipped = 100 * clipping.mean_share
    return Run(found, trace[-1], trace, network, clipped)


def best(rates: Sequence[float], run: Callable[[float, int], Run], tuned: Sequence[int] = SEEDS) -> tuple[float, list[Run]]:
    """The rate that is best on the search split, by the mean over the seeds `tuned`, and the run of every seed at it."""
    tried = {rate: [run(rate, seed) for seed in tuned] for rate in rates}
    rate = max(rates, key=lambda one: mean(r.search for r in tried[one]))
    return rate, tried[rate] + [run(rate, seed) for seed in SEEDS if seed not in tuned]


# a: optimizers and clipping

CLIPPED = (
    ("neither", "identity", False),
    ("slope", "clipped", False),
    ("slope and weights", "clipped", True),
)


def clipped_run(budget: Budget, estimator: str, clip: bool, uniform: bool = False) -> Callable[[float, int], Run]:
    """Make what trains with an estimator, whose weights may be clipped and may start anywhere in -1..1."""

    def run(rate: float, seed: int) -> Run:
        network = linear_network(budget.wide, seed, Q.Binary(weight_estimator=estimator), uniform)
        clipping = None
        if clip:
            clipping = Q.clip_weights(network.module)
        return train(budget, network, [(budget.epochs["a"], adam(rate))], seed, clipping=clipping)

    return run


def staged_run(budget: Budget) -> Callable[[float, int], Run]:
    """Make what trains in two stages."""

    def run(rate: float, seed: int) -> Run:
        network = linear_network(budget.wide, seed, Q.Binary())
        shares = []

        def entering(stage: Q.Stage) -> Optimizers:
            def made(module: nn.Module) -> list[torch.optim.Optimizer]:
                optimizer = torch.optim.Adam(trainable(module), stage.lr)
                if clipping := stage.enter(module, optimizer):
                    shares.append(clipping)
                return [optimizer]

            return made

        stages = Q.two_stages(budget.epochs["a"], rate)
        made = train(budget, network, [(stage.epochs, entering(stage)) for stage in stages], seed)
        if shares:
            made = made._replace(clipped=100 * shares[0].mean_share)
        return made

    return run


def optimisers(budget: Budget) -> Made:
    epochs, width = budget.epochs["a"], budget.wide

    def plain(optimizer: Callable[[float], Optimizers]) -> Callable[[float, int], Run]:
        return lambda rate, seed: train(budget, linear_network(width, seed, Q.Binary()), [(epochs, optimizer(rate))], seed)

    # The second row of the clipping table is ADAM's of the first one: every run is made once.
    of_slope = clipped_run(budget, "clipped", False)
    slope = {(rate, seed): of_slope(rate, seed) for rate in COMPARED_RATES["ADAM"] for seed in SEEDS}
    runs_of: dict[str, Callable[[float, int], Run]] = {
        "ADAM": lambda rate, seed: slope[rate, seed],
        "SGD": plain(sgd),
        "SGD, momentum 0.9": plain(lambda rate: sgd(rate, 0.9)),
        "ADAM, two stages": staged_run(budget),
    }
    compared = {name: best(rates, runs_of[name]) for name, rates in COMPARED_RATES.items()}
    columns = ("optimizer", "rate", "accuracy", *(f"epochs to {target} %" for target in TARGETS))
    table = Result("a", f"a. Optimizers, {epochs} epochs ({epochs + 1}: never reached)", columns)
    for name, (rate, runs) in compared.items():
        reached: list[Cell] = [[r.epochs_to(target) for r in runs] for target in TARGETS]
        table.rows.append([name, marked(rate, COMPARED_RATES[name]), [r.test for r in runs], *reached])

    columns = ("clipping of", "start", "rate", "accuracy", "after 5 epochs", "clipped per step, %", "outside at the end, %")
    clipping = Result("a", "a. Clipping, ADAM at each rate", columns, digits=dict.fromkeys(columns[5:], 2))

    def add(name: str, start: str, rate: float, runs: list[Run]) -> None:
        early = [r.trace[min(4, len(r.trace) - 1)] for r in runs]
        share: Cell = [r.clipped for r in runs if r.clipped is not None] or "–"
        clipping.rows.append([name, start, f"{rate:g}", [r.test for r in runs], early, share, [r.outside for r in runs]])

    shares: dict[str, float] = {}
    gains: list[str] = []
    for rate in COMPARED_RATES["ADAM"]:
        of = {}
        for name, estimator, clip in CLIPPED:
            run = clipped_run(budget, estimator, clip)
            if name == "slope":
                runs = [slope[rate, seed] for seed in SEEDS]
            else:
                runs = [run(rate, seed) for seed in SEEDS]
            add(name, "narrow", rate, runs)
            of[name] = mean(r.test for r in runs)
            if clip:
                shares[f"at {rate:g}"] = mean(r.clipped or 0.0 for r in runs)
        gains.append(f"{of['slope and weights'] - of['neither']:+.1f} at {rate:g}")
    # The other way to make clipping matter: weights that start all over the interval.
    of, rate = {}, compared["ADAM"][0]
    for name, estimator, clip in (CLIPPED[0], CLIPPED[2]):
        run = clipped_run(budget, estimator, clip, uniform=True)
        runs = [run(rate, seed) for seed in SEEDS]
        add(name, "-1..1", rate, runs)
        of[name] = mean(r.test for r in runs)
    shares[f"at {rate:g} from -1..1"] = mean(r.clipped or 0.0 for r in runs)
    gains.append(f"{of['slope and weights'] - of['neither']:+.1f} at {rate:g} from -1..1")
    rate, runs = compared["ADAM, two stages"]
    add("two stages", "narrow", rate, runs)

    accuracies = {name: mean(r.test for r in runs) for name, (_, runs) in compared.items()}
    gap, second = (accuracies["ADAM"] - accuracies[name] for name in ("SGD", "SGD, momentum 0.9"))
    reach = {name: [mean(r.epochs_to(target) for r in runs) for target in TARGETS] for name, (_, runs) in compared.items()}
    pairs = list(zip(reach["ADAM"], reach["SGD"], strict=True))
    times = ", ".join(f"{x:.1f} against {y:.1f} to {target} %" for (x, y), target in zip(pairs, TARGETS, strict=True))
    return [table, clipping], [
        Direction(
            "B-1",
            "ADAM is at least 3 points above SGD without momentum",
            gap >= 3,
            f"{gap:+.1f} points; {second:+.1f} above SGD with momentum.",
            f"Given {compared['SGD'][0] / compared['ADAM'][0]:.0f} times ADAM's rate, SGD does most of what ADAM does.",
        ),
        Direction(
            "B-2",
            "ADAM takes at most half of SGD's epochs to an accuracy",
            all(2 * x <= y for x, y in pairs),
            f"{times}.",
            "The claim was measured at one untuned rate for each, whereas SGD has its best of three here.",
        ),
        Direction(
            "B-3",
            "clipping is put to the test: in some runs it clips over 1 % of the weights per step",
            max(shares.values()) > 1,
            ", ".join(f"{share:.2f} % {where}" for where, share in shares.items())
            + f". Accuracy of clipping both over neither: {', '.join(gains)}.",
        ),
    ]


# b: estimators and Bop


def estimators(budget: Budget) -> Made:
    epochs = budget.epochs["b"]

    def run(scheme: Q.Binary, optimizer: Callable[[float], Optimizers], uniform: bool = False) -> Callable[[float, int], Run]:
        def made(rate: float, seed: int) -> Run:
            network = linear_network(budget.wide, seed, scheme, uniform)
            clipping = None
            if uniform:
                clipping = Q.clip_weights(network.module)
            return train(budget, network, [(epochs, optimizer(rate))], seed, clipping=clipping)

        return made

    columns = ("estimator", "scaling", "rate", "accuracy", "after 5 epochs")
    table = Result("b", f"b. Estimators under ADAM, and Bop, {epochs} epochs", columns)
    accuracies = {}

    def add(name: str, scaling: str, rates: Sequence[float], run: Callable[[float, int], Run]) -> None:
        rate, runs = best(rates, run, SEEDS[:1])
        early = [r.trace[min(4, len(r.trace) - 1)] for r in runs]
        table.rows.append([name, scaling, marked(rate, rates), [r.test for r in runs], early])
        accuracies[name, scaling] = mean(r.test for r in runs)

    for name in ("identity", "clipped", "approx_sign", "swish_sign", "stochastic"):
        for scaling in ("none", "xnor"):
            add(name, scaling, ADAM_RATES, run(Q.Binary(name, name, scaling), adam))
    # Weights of torch's narrow start, near 0, are drawn as coins are tossed.
    drawn = Q.Binary("stochastic", "stochastic")
    add("stochastic, from -1..1, clipped", "none", ADAM_RATES, run(drawn, adam, uniform=True))
    add("Bop", "none", BOP_RATES, run(Q.Binary(), bop))
    against = accuracies["clipped", "none"]
    over, approx = accuracies["Bop", "none"] - against, accuracies["approx_sign", "none"] - against
    scaled = [accuracies[name, "xnor"] - accuracies[name, "none"] for name, scaling in accuracies if scaling == "xnor"]
    return [table], [
        Direction(
            "Bop",
            "within 1 point of ADAM on float weights (clipped, no scaling)",
            over >= -1,
            f"{over:+.1f} points.",
            f"The threshold, {BOP_THRESHOLD:g}, and the rate of its ADAM, {BOP_ADAM:g}, are not tuned, only gamma is.",
        ),
        Direction("approx_sign", "at most 0.5 points below clipped", approx >= -0.5, f"{approx:+.1f} points."),
        Direction(
            "XNOR scaling",
            "within 1 point of no scaling for every estimator, as a norm behind takes scales away",
            max(map(abs, scaled)) <= 1,
            f"{', '.join(f'{x:+.1f}' for x in scaled)} points, in the order of the table.",
        ),
    ]


# c: ensembles


def ensembles(budget: Budget) -> Made:
    epochs, width = budget.epochs["c"], budget.narrow
    labels, classes = budget.train.labels, 10

    def run(width: int, scheme: Q.Scheme | None) -> Callable[[float, int], Run]:
        return lambda rate, seed: train(budget, linear_network(width, seed, scheme), [(epochs, adam(rate))], seed)

    rate, singles = best(ADAM_RATES, run(width, Q.Binary()), SEEDS[:1])
    size, operations = cost(singles[0].network.module)
    most = budget.members[-1]
    wide = width
    while cost(linear_network(wide + 1, 0, Q.Binary()).module)[0] <= most * size:
        wide += 1
    columns = ("networks", "K", "rate", "accuracy", "a member alone", "changed by noise, %", "kB", "MBOPs", "cost")
    title = f"c. Ensembles of networks of width {width}, soft vote, {epochs} epochs each; noise {NOISE:g} of the pixels' range"
    table = Result("c", title, columns)

    def add(name: str, k: int, rate: float, made: Sequence[nn.Module], alone: Cell, factor: str) -> list[list[float]]:
        pairs = [judged(module, budget.test, seed) for seed, module in zip(SEEDS, made, strict=True)]
        accuracies = [accuracy for accuracy, _ in pairs]
        changes = [change for _, change in pairs]
        member = made[0]
        if isinstance(member, Q.Ensemble):
            member = member.members[0]
        kilobytes, megabops = (k * x for x in cost(member))
        costs = f"{kilobytes / 1e3:.1f}", f"{megabops / 1e6:.1f}"
        table.rows.append([name, str(k), marked(rate, ADAM_RATES), accuracies, alone, changes, *costs, factor])
        return [accuracies, changes]

    single = add("one", 1, rate, [r.network.module for r in singles], "–", "1x")
    seen: dict[tuple[str, int], list[list[float]]] = {}
    alone: dict[tuple[str, int], list[float]] = {}  # accuracy and change of a member, the mean over seeds and members
    for name in ("bagging", "SAMME"):
        made = []
        for seed in SEEDS:

            def member(samples: Tensor, number: int) -> nn.Module:
                network = linear_network(width, number, Q.Binary())
                drawn = budget.train.subset(samples)
                return train(budget, network, [(epochs, adam(rate))], number, split=drawn).network.module

            first = 100 + 100 * seed  # ensembles share no member
            if name == "bagging":
                made.append(Q.bagging(member, len(labels), most, seed=first))
            else:
                made.append(Q.boosting(member, lambda m: predicted(m, budget.train), labels, classes, most, seed=first))
        for k in budget.members:
            parts = [Q.Ensemble(list(one.members)[:k], one.alphas[:k].tolist()) for one in made]
            pairs = [[judged(m, budget.test, seed) for m in one.members] for seed, one in zip(SEEDS, parts, strict=True)]
            members = [mean(accuracy for accuracy, _ in of) for of in pairs]
            alone[name, k] = [mean(members), mean(change for of in pairs for _, change in of)]
            seen[name, k] = add(name, k, rate, parts, members, f"{parts[0].cost_factor}x")
    wide_rate, runs = best(ADAM_RATES, run(wide, Q.Binary()), SEEDS[:1])
    large = add(f"one of width {wide}", 1, wide_rate, [r.network.module for r in runs], "–", f"bytes of {most}")
    rate, runs = best(ADAM_RATES, run(width, None), SEEDS[:1])
    floats = add("one in float", 1, rate, [r.network.module for r in runs], "–", "–")

    chosen = most
    if 6 in budget.members:
        chosen = 6
    together = mean(seen["bagging", chosen][0])
    gain, apart = together - alone["bagging", chosen][0], together - mean(single[0])
    room = mean(floats[0]) - alone["bagging", chosen][0]
    boosted = mean(seen["SAMME", chosen][0]) - mean(single[0])
    share = {name: mean(seen[name, chosen][1]) / alone[name, chosen][1] for name in ("bagging", "SAMME")}
    steady = {name: mean(seen[name, chosen][1]) / mean(single[1]) for name in share}
    votes = ", ".join(f"{mean(seen['bagging', k][0]):.1f} %" for k in budget.members[1:])
    beyond = {name: mean(seen[name, most][0]) - mean(large[0]) for name in ("bagging", "SAMME")}
    factor = f"K = {', '.join(map(str, budget.members))} cost {', '.join(f'{k}x' for k in budget.members)} the bytes and BOPs"
    return [table], [
        Direction(
            "D-1",
            f"{chosen} bagged networks are at least 3 points above the mean of their members",
            gain >= 3,
            f"{gain:+.1f}; {apart:+.1f} over one trained on all samples ({boosted:+.1f} by SAMME).",
            f"{', '.join(map(str, budget.members[1:]))} members reach {votes}; a float network of this width is {room:+.1f} "
            "over a member.",
        ),
        Direction(
            "D-2",
            f"noise changes at most 0.6 times as many predictions of {chosen} bagged networks as of a member",
            share["bagging"] <= 0.6,
            f"{share['bagging']:.2f} times ({share['SAMME']:.2f} by SAMME); of one trained on all samples "
            f"{steady['bagging']:.2f} times ({steady['SAMME']:.2f} by SAMME).",
            f"It changes {mean(seen['bagging', most][1]):.1f} % of the predictions of {most}, and {mean(floats[1]):.1f} % of "
            "those of a float network.",
        ),
        Direction(
            "Cost",
            f"{most} networks are above one of as many bytes",
            max(beyond.values()) >= 0,
            ", ".join(f"{x:+.1f} by {name}" for name, x in beyond.items()) + f". {factor}; one has {size / 1e3:.1f} kB and "
            f"{operations / 1e6:.1f} MBOPs, nearly all of them in its float layers.",
            "A member has the float first layer, most of the bytes, all over again, where one wide network makes use of it.",
        ),
    ]


def cost(module: nn.Module) -> tuple[float, float]:
    """Bytes of the weights and bit operations per image of a network of linear layers; float counts as 32 bits."""
    size = operations = 0.0
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for layer in linear:
        bits = [(getattr(layer, key, None) or 32) for key in ("weight_bits", "activation_bits")]
        size += layer.weight.numel() * bits[0] / 8
        operations += layer.weight.numel() * bits[0] * bits[1]
    return size, operations


@torch.inference_mode()
def judged(module: nn.Module, split: data.Split, seed: int) -> tuple[float, float]:
    """Accuracy, and the share of predictions that input noise changes, in %."""
    clean, inputs = predicted(module, split), _inputs(split)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)) * NOISE / STD
    changed = (module(inputs + noise).argmax(1) != clean).float().mean()
    return 100 * float((clean == split.labels).float().mean()), 100 * float(changed)


@torch.inference_mode()
def predicted(module: nn.Module, split: data.Split) -> Tensor:
    result: Tensor = module.eval()(_inputs(split)).argmax(1)
    return result


def _inputs(split: data.Split) -> Tensor:
    pixels = split.images[torch.arange(len(split))]
    return (pixels.float() / 255 - MEAN) / STD


# d: filters


def filters(budget: Budget) -> Made:
    epochs = budget.epochs

    def whole(rate: float, seed: int) -> Run:
        return train(budget, convolutional_network(seed), [(epochs["d"], adam(rate))], seed)

    rate, bases = best(ADAM_RATES[1:3], whole, SEEDS[:1])
    masked = list(Q.masked_layers(bases[0].network.module))
    kept: dict[tuple[float, int], dict[str, int]] = {}

    def pruned(kind: str, strength: float) -> Callable[[float, int], Run]:
        def run(rate: float, seed: int) -> Run:
            network, generator = copy.deepcopy(bases[seed].network), torch.Generator().manual_seed(seed)
            done: Run | None = None
            for number, (name, phase, parameters) in enumerate(Q.layerwise_pruning(network.module, masked, generator)):
                if phase == "weights":
                    done = train(budget, network, [(epochs["weights"], adam(rate))], 10 * seed + number)
                elif kind == "learned":
                    learn_mask(budget, network, name, strength, 10 * seed + number)
                else:
                    switches = parameters[0]
                    count = len(switches)
                    if kind == "random":
                        count = kept[strength, seed][name]
                    with torch.no_grad():
                        switches.fill_(-1.0)[torch.randperm(len(switches), generator=generator)[:count]] = 1.0
            assert done is not None
            return done

        return run

    columns = ("filters", "penalty", "rate", "kept, %", "one-bit weights left, %", "accuracy", "logits moved by removal")
    title = (
        f"d. Filters of two binary convolutions; {epochs['mask']} epochs for each mask, {epochs['weights']} for the weights "
        "after it (as many for all rows)"
    )
    table = Result("d", title, columns)
    images = _inputs(budget.test)
    accuracies: dict[tuple[str, float], list[float]] = {}

    def add(name: str, strength: float, rate: float, runs: list[Run]) -> None:
        shares, left, moved = [], [], []
        for r in runs:
            removed = Q.remove_filters(r.network.module, exact=False).eval()
            with torch.inference_mode():
                moved.append(float((removed(images) - r.network.module.eval()(images)).abs().max()))
                shares.append(100 * float(Q.kept_share(r.network.module, masked)))
            left.append(100 * one_bit_weights(removed) / one_bit_weights(bases[0].network.module))
        accuracies[name, strength] = [r.test for r in runs]
        penalty = "–"
        if name != "all":
            penalty = f"{strength:g}"
        table.rows.append([name, penalty, f"{rate:g}", shares, left, accuracies[name, strength], f"{max(moved):.0e}"])

    rates = ADAM_RATES[:2]  # of networks that are trained already
    table.rows.append(["all, before", "–", f"{rate:g}", [100.0] * 3, [100.0] * 3, [r.test for r in bases], "–"])
    add("all", 0.0, *best(rates, pruned("all", 0.0), SEEDS[:1]))
    for strength in STRENGTHS:
        rate, runs = best(rates, pruned("learned", strength), SEEDS[:1])
        for seed, r in zip(SEEDS, runs, strict=True):
            kept[strength, seed] = {name: int((mask(r, name) >= 0).sum()) for name in masked}
        add("learned", strength, rate, runs)
        add("random", strength, *best(rates, pruned("random", strength), SEEDS[:1]))

    norms = masks_alone(budget, bases, masked)
    strength = STRENGTHS[0]
    over = mean(accuracies["learned", strength]) - mean(accuracies["random", strength])
    under = mean(accuracies["learned", strength]) - mean(accuracies["all", 0.0])
    pairs = zip(accuracies["learned", strength], accuracies["random", strength], strict=True)
    count = sum(len(mask(bases[0], name)) for name in masked)
    share = mean(100 * sum(kept[strength, seed].values()) / count for seed in SEEDS)
    return [table, norms], [
        Direction(
            "E-3",
            f"at {share:.0f} % of the filters, learned masks are no worse than random ones and within 1 point of all filters",
            over >= 0 and under >= -1,
            f"{over:+.1f} over random ({', '.join(f'{x - y:+.1f}' for x, y in pairs)} by seed), "
            f"{under:+.1f} over all filters.",
            "Retraining makes up for nearly any choice of filters: what is left is within the spread of the seeds.",
        )
    ]


def masks_alone(budget: Budget, bases: list[Run], masked: list[str]) -> Result:
    """Learn masks while norms are fixed, and while they follow their batches.

    In the second case nothing in the loss tells one kept filter from another.
    """
    columns = ("norms while a mask is learned", "penalty", "kept, %")
    made = Result("d", "d. Share of filters kept by masks alone, both layers, weights as they were", columns)
    strength = 3.0
    for words, fixed in (("fixed", True), ("follow their batches", False)):
        shares = []
        for seed in SEEDS:
            network = copy.deepcopy(bases[seed].network)
            generator = torch.Generator().manual_seed(seed)
            for name, phase, _ in Q.layerwise_pruning(network.module, masked, generator):
                if phase == "mask":
                    learn_mask(budget, network, name, strength, seed, fixed=fixed)
            with torch.no_grad():
                shares.append(100 * float(Q.kept_share(network.module, masked)))
        made.rows.append([words, f"{strength:g}", shares])
    return made


def mask(run: Run, name: str) -> Tensor:
    return Q.masked_layers(run.network.module)[name].get_parameter("filter_mask")


def learn_mask(budget: Budget, network: Network, name: str, strength: float, seed: int, *, fixed: bool = True) -> None:
    """Train one mask.

    Norms keep their statistics: behind a norm that follows its batches, the size of a kept filter, and so its mask, has no
    gradient, and that of a filter that is off is multiplied by 1 / sqrt(eps).
    """
    stage = [(budget.epochs["mask"], adam(1e-4))]
    train(budget, network, stage, seed, penalty=lambda m: strength * Q.kept_share(m, [name]), fixed_norms=fixed)


def one_bit_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in Q.quant_layers(module).values() if layer.weight_bits == 1)


# all of them

PARTS: dict[str, Callable[[Budget], Made]] = {"a": optimisers, "b": estimators, "c": ensembles, "d": filters}


def planned(budget: Budget, part: str) -> int:
    """Epochs of a part, about."""
    n, rates, e = len(SEEDS), len(ADAM_RATES), budget.epochs
    if part == "a":
        return e["a"] * n * (6 * len(COMPARED_RATES["ADAM"]) + 2)
    if part == "b":
        return e["b"] * 12 * (rates + n - 1)
    if part == "c":
        return e["c"] * (3 * (rates + n - 1) + 2 * n * budget.members[-1])
    layers, runs = 2, 2 + n - 1
    masks = e["mask"] * layers * (len(STRENGTHS) * runs + 2 * n)
    return e["d"] * runs + e["weights"] * layers * (1 + 2 * len(STRENGTHS)) * runs + masks


def quick(budget: Budget) -> None:
    first = torch.arange(1000)
    budget.train, budget.search, budget.test = (s.subset(first) for s in (budget.train, budget.search, budget.test))
    budget.epochs = {"a": 2, "b": 1, "c": 1, "d": 1, "mask": 1, "weights": 1}
    budget.members = (1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.binary_networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="a|b|c|d", help="the parts to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="few images and epochs, to see that it runs")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write binary_networks.md and .csv there, after every part"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; known: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    dataset = data.load("fashion-mnist-12k")
    start = time.perf_counter()
    budget = Budget(dataset.train, dataset.search, dataset.test)
    if options.quick:
        quick(budget)
    made: list[tuple[Made, float]] = []
    parts = sorted(set(options.parts)) or list(PARTS)
    shown = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    for part in parts:
        begun = time.perf_counter()
        with Progress(*shown, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"part {part}", total=planned(budget, part))
            budget.on_epoch = lambda progress=progress, task=task: progress.advance(task)  # type: ignore[misc]
            results, directions = PARTS[part](budget)
        made.append(((results, directions), time.perf_counter() - begun))
        show(results, directions, made[-1][1])
        if options.save:
            words = sorted(set(options.parts))
            if options.quick:
                words.append("--quick")
            shown_folder = options.save
            if shown_folder.is_absolute():
                shown_folder = shown_folder.name
            save(options.save, made, dataset.describe(), " ".join([*words, f"--save {shown_folder}"]))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")


def show(results: list[Result], directions: list[Direction], seconds: float) -> None:
    console = Console(width=127)
    for result in results:
        table = Table(title=result.title, box=box.SIMPLE_HEAD, pad_edge=False)
        add_columns(table, result.columns, left=result.columns[:1])
        for row in result.rows:
            table.add_row(*result.text(row))
        console.print(table)
    for direction in directions:
        console.print(direction.text(), highlight=False)
    console.print(f"{seconds / 60:.1f} minutes\n", highlight=False)


def save(folder: Path, made: list[tuple[Made, float]], described: str, arguments: str) -> None:
    """Write the tables as they were printed, and every value by seed."""
    lines = ["# Binary networks", "", f"`python -m experiments.binary_networks {arguments}` printed this. Reasons for a"]
    lines += ["direction that does not hold were worded after an earlier run.", ""]
    lines += ["```text", *(__doc__ or "").strip().splitlines(), "```", "", f"Data: {described}.", ""]
    rows = []
    for (results, directions), seconds in made:
        for result in results:
            lines += [f"## {result.title}", "", f"| {' | '.join(result.columns)} |", f"|{' --- |' * len(result.columns)}"]
            for row in result.rows:
                lines.append(f"| {' | '.join(result.text(row))} |")
                labels = ", ".join(f"{k}: {c}" for k, c in zip(result.columns, row, strict=True) if isinstance(c, str))
                for column, cell in zip(result.columns, row, strict=True):
                    if not isinstance(cell, str):
                        values = [f"{x:.6g}" for x in (mean(cell), min(cell), max(cell), *cell)]
                        rows.append([result.part, result.title, labels, column, *values])
            lines.append("")
        lines += [f"- {direction.text()}" for direction in directions]
        lines += ["", f"{seconds / 60:.1f} minutes on one core.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "binary_networks.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    with (folder / "binary_networks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "table", "row", "quantity", "mean", "lowest", "highest", *(f"seed {seed}" for seed in SEEDS)])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
