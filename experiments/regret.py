"""How far from the best policy every solver stays, on problems small enough for the best to be known.

    python -m experiments.regret [--problems NAME ...] [--solvers NAME ...] [--seeds N] [--ahead N] [--processes N] [--quick]
    python -m experiments.regret --write-tables haq/problem/tables

Problems. Small networks, trained on the default data set, of which *every* policy within the larger budget was evaluated,
with real quantized forward passes on the 2,000 search and the 2,000 test images, on the target `edge`; first and last layer
at 8 bits. Their tables ship with the package; the second line makes them anew:

    plain       four free layers, 12 pairs of bits each: 20,736 policies
    low         the same network at 1 to 4 weight and 1 to 3 activation bits: 20,736
    separable   eight free layers, depthwise and pointwise, 4 pairs each: 65,536
    deep        nine free layers, convolutions and linear ones, 4 pairs each: 262,144

each at two budgets, given as the share of the way from the cheapest policy to the dearest. And HAWQ-V3's published tables of
ResNet-18 (Yao et al., ICML 2021; three costs, half of the way), where what is found is a predicted rise of the loss: regret is
counted in points of what 4 bits everywhere cost.

Regret: accuracy of the best policy within the budget minus that of the policy found, in points, on the images that judged
both (it is the search that is measured here, not how it generalises). A solver that is allowed 400 evaluations may spend them
otherwise than one that is allowed 50, so every allowance is a search of its own. `ilp` and `greedy` have no randomness.

"Additive" says how much of the loss the integer programme understands: the correlation, over 300 random policies within the
budget, of the loss with what the sensitivities predict.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import haq
import hw_models
from experiments import shared
from haq import data, networks, training
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.problem.decision import Decision, read_bits
from haq.problem.limits import ROUNDING
from haq.problem.sensitivity import largest_widths
from haq.problem.table_file import UNKNOWN, TableFile, find, read
from haq.problem.tabular import TabularProblem
from haq.solvers import SOLVERS, random_search, sensitivity
from haq.solvers.base import Session, Trial, solve
from haq.store.units import counted
from haq.study.config import SearchConfig
from hw_models.widths import PLACES, WIDTHS

NAME = "regret"
FOLDER = Path("docs/experiments")
HAWQ = Path(__file__).with_name("hawqv3_resnet18.json")
ALLOWED = (50, 100, 200, 400)
NEAR = 0.1  # points: a run this close has found it
EPOCHS = 15
IMAGENET = 50_000  # images that HAWQ-V3 is judged on
CERTAIN = ("ilp", "greedy")
SHOWN = ("ddpg", "ilp", "greedy", "evolution", "random")
COLUMNS = ("problem", "solver", "evaluations", "mean regret", "least", "most", f"within {NEAR}", "seconds")
BAR = "ddpg"

Floats = NDArray[np.float64]


# Networks of which every policy is evaluated


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(out), nn.ReLU()]


def dense(*widths: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        parts += [nn.Linear(wide, narrow), nn.ReLU()]
    return parts[:-1]


def plain() -> list[nn.Module]:
    return [*conv(1, 12, 3, 2), *conv(12, 16, 3, 2), *conv(16, 24), *conv(24, 16, 3, 2), nn.Flatten(), *dense(256, 32, 10)]


def separable() -> list[nn.Module]:
    parts = conv(1, 12, 3, 2)
    for channels, out, stride in ((12, 16, 2), (16, 24, 1), (24, 24, 2)):
        parts += [*conv(channels, channels, 3, stride, channels), *conv(channels, out, 1)]
    return [*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *dense(96, 32, 24, 10)]


def deep() -> list[nn.Module]:
    parts = [*conv(1, 12, 3, 2), *conv(12, 12, 3, 2), *conv(12, 16), *conv(16, 16, 3, 2), *conv(16, 16)]
    return [*parts, nn.Flatten(), *dense(256, 48, 32, 32, 32, 32, 10)]


class Enumerated(NamedTuple):
    build: Callable[[], list[nn.Module]]
    pairs: list[tuple[int, int]]
    budgets: tuple[float, float]


NETWORKS = {
    "plain": Enumerated(plain, list(itertools.product((2, 3, 4, 8), (2, 4, 8))), (0.2, 0.35)),
    "low": Enumerated(plain, list(itertools.product((1, 2, 3, 4), (1, 2, 3))), (0.2, 0.35)),
    "separable": Enumerated(separable, [(2, 2), (3, 3), (4, 4), (6, 6)], (0.3, 0.6)),
    "deep": Enumerated(deep, [(2, 3), (3, 3), (4, 4), (6, 6)], (0.3, 0.5)),
}


def load(name: str) -> dict[str, TabularProblem]:
    """The problems of one name, by title: a network's at each of its budgets, or HAWQ-V3's three."""
    if name == "hawqv3":
        files = published(json.loads(HAWQ.read_text(encoding="utf-8")))
        return {f"{file.name}, budget 0.5": TabularProblem(file) for file in files}
    file = read(find(name))
    return {f"{file.name}, budget {budget}": TabularProblem(file, budget) for budget in file.limits}


def write_tables(folder: Path, names: Sequence[str], quick: bool, console: Console) -> None:
    """Train networks, evaluate every policy of theirs within the larger budget, and write their tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in NETWORKS:
            continue
        given = NETWORKS[name]
        start = time.perf_counter()
        pairs, epochs = given.pairs, EPOCHS
        if quick:
            pairs, epochs = given.pairs[-2:], 1
        problem, test = trained(name, given.build, epochs)
        for number, decision in enumerate(problem.decisions):
            if len(decision.pairs) > 1:
                problem.decisions[number] = restricted(problem, decision, pairs)
        with console.status(f"{name}: every policy"):
            made = enumerated(problem, name, given.budgets, test)
        made.write(folder / f"{name}.npz")
        known, seconds = int((made.accuracy >= 0).sum()), time.perf_counter() - start
        console.print(f"{folder / name}.npz: {known:,} of {len(made.accuracy):,} policies evaluated, {seconds:.0f} s")


def trained(name: str, build: Callable[[], list[nn.Module]], epochs: int) -> tuple[haq.Problem, tuple[Tensor, Tensor]]:
    """A problem, and the images and labels of the test split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = networks.Network(name, nn.Sequential(*build()), (1, 28, 28), (0.286,), (0.353,))
    dataset = data.load()
    training.fit(network, dataset.train, training.TrainConfig(epochs, learning_rate=0.1, seed=0))
    splits = []
    for split in (dataset.search, dataset.test):
        images, labels = next(split.batches(len(split)))
        splits.append((network.preprocess(images).contiguous(), labels))
    calibrate = network.preprocess(dataset.train.images[dataset.fair(512)]).contiguous()
    return haq.Problem(network.module, calibrate, splits[0], "edge", budget=1.0, bits=(1, 8)), splits[1]


def restricted(problem: haq.Problem, decision: Decision, pairs: Sequence[tuple[int, int]]) -> Decision:
    made = decision._replace(pairs=np.array(pairs))
    return made._replace(prices=made.of(problem.cost[list(decision.layers)].sum(0)))


def enumerated(problem: haq.Problem, name: str, budgets: Sequence[float], test: tuple[Tensor, Tensor]) -> TableFile:
    """Evaluate every policy of a sequential network within the larger budget, and those that sensitivities ask for."""
    low, high = (sum(float(pick(d.prices)) for d in problem.decisions) for pick in (np.min, np.max))
    limits = {str(budget): low + budget * (high - low) for budget in budgets}
    samples = problem.evaluator.samples
    assert samples is not None
    # The evaluator's own, as they were given.
    images, labels = (torch.cat(parts)[problem.evaluator.order.argsort()] for parts in zip(*samples, strict=True))
    values = enumerate_all(problem, max(limits.values()), [(images, labels), test])
    check(problem, max(limits.values()), values[0])
    bits = hw_models.BITS
    nothing = np.full((len(problem.workload.layers), PLACES, PLACES), np.nan)
    cost = nothing.copy()
    cost[:, :bits, :bits] = problem.cost[:, :bits, :bits]
    return TableFile(
        name=name,
        metric=problem.metric,
        target=problem.target.name,
        widths=problem.widths,
        float_accuracy=problem.float_accuracy,
        search_images=len(labels),
        test_images=len(test[1]),
        limits=limits,
        workload=hw_models.Workload(problem.workload.layers),
        groups=problem.groups,
        cost=cost,
        noise=problem.quantization_error,
        pairs=[decision.pairs for decision in problem.decisions],
        prices=[decision.prices for decision in problem.decisions],
        accuracy=values[0].accuracy,
        loss=values[0].loss,
        kl=values[0].kl,
        accuracy_test=values[1].accuracy,
        loss_test=values[1].loss,
        extra=further(problem),
    )


def further(problem: haq.Problem) -> dict[tuple[tuple[int, int], ...], tuple[float, float, float]]:
    """Evaluate the widest policy, and those in which one decision takes another pair, or one operand another width."""
    highest = largest_widths(problem)
    asked = [highest]
    for number, decision in enumerate(problem.decisions):
        widths = [sorted(set(decision.pairs[:, operand].tolist())) for operand in (0, 1)]
        for pair in itertools.product(*widths):
            changed = highest.copy()
            changed[number] = pair
            asked.append(changed)
    found = {}
    for pairs in asked:
        judged = problem.evaluate(problem.decide(pairs))
        assert judged.divergence is not None
        found[tuple((w, a) for w, a in pairs.tolist())] = (judged.accuracy, judged.loss, judged.divergence)
    return found


class Values(NamedTuple):
    """Of every policy, on one split; the accuracy is -1 where it wasn't evaluated."""

    accuracy: Floats
    loss: Floats
    kl: Floats


@torch.inference_mode()
def enumerate_all(problem: haq.Problem, limit: float, splits: Sequence[tuple[Tensor, Tensor]]) -> list[Values]:
    """Measure every policy of a sequential network within a limit, on several splits.

    Each layer's output is computed once for all that follows from it.
    """
    order = {problem.workload.names[decision.layers[0]]: i for i, decision in enumerate(problem.decisions)}
    counts = [len(decision.pairs) for decision in problem.decisions]
    values = [Values(np.full(counts, UNKNOWN), np.zeros(counts), np.zeros(counts)) for _ in splits]
    parts = list(problem.evaluator.network.named_children())
    cheapest = [float(decision.prices.min()) for decision in problem.decisions]
    images, labels = (torch.cat(both) for both in zip(*splits, strict=True))
    sizes = [len(of_split) for _, of_split in splits]
    wanted = torch.log_softmax(problem.network(images).double(), 1)
    shares = wanted.exp()
    # Of a split's images; the Kullback-Leibler divergence is the difference of this and what follows from the scores.
    entropies = [float(rows.sum(1).mean()) for rows in (shares * wanted).split(sizes)]

    def judge(scores: Tensor, index: tuple[int, ...]) -> None:
        logs = torch.log_softmax(scores.double(), 1)
        right = (scores.argmax(1) == labels).double().split(sizes)
        losses = logs.gather(1, labels[:, None]).neg().split(sizes)
        crossed = (shares * logs).sum(1).split(sizes)
        for number, found in enumerate(values):
            found.accuracy[index] = float(right[number].mean())
            found.loss[index] = float(losses[number].mean())
            found.kl[index] = entropies[number] - float(crossed[number].mean())

    def follow(position: int, x: Tensor, index: tuple[int, ...], spent: float) -> None:
        for place, (name, part) in enumerate(parts[position:], start=position):
            if name not in order:
                x = part(x)
                continue
            decision = problem.decisions[order[name]]
            for option, (w, a) in enumerate(decision.pairs.tolist()):
                least = spent + float(decision.prices[option]) + sum(cheapest[len(index) + 1 :])
                if least > limit * (1 + ROUNDING):
                    continue
                part.weight_bits, part.activation_bits = w, a
                # A layer may return what its next call writes over.
                follow(place + 1, part(x).clone(), (*index, option), spent + float(decision.prices[option]))
            return
        judge(x, index)

    follow(0, images, (), 0.0)
    return [Values(*(array.reshape(-1) for array in found)) for found in values]


def check(problem: haq.Problem, limit: float, values: Values) -> None:
    """Raise RuntimeError if what was enumerated isn't what the evaluator says, or misses a policy within the limit."""
    random = np.random.default_rng(0)
    limited = problem.limited_to(limit)
    for _ in range(20):
        picks = tuple(random_search.lowered(limited, random_search.draw(problem, random), random))
        found = problem.evaluate(random_search.policy(problem, list(picks)))
        place = np.ravel_multi_index(picks, [len(decision.pairs) for decision in problem.decisions])
        enumerated = [float(array[place]) for array in values]
        assert found.divergence is not None
        wanted = [found.accuracy, found.loss, found.divergence]
        if not np.allclose(enumerated, wanted, rtol=0, atol=[1e-9, 1e-5, 1e-5]):
            raise RuntimeError(f"options {picks} were enumerated as {enumerated} but are {found}")


def published(given: dict[str, Any]) -> list[TableFile]:
    """HAWQ-V3's problems: 19 layers of ResNet-18 at 4 or 8 bits, some of them tied."""
    network = networks.load("torchvision:resnet18", pretrained=False).module
    traced = hw_models.trace(network.eval(), torch.zeros(1, 3, 224, 224))
    workload = hw_models.Workload(traced.layers[1:-1])
    first = {other: one for one, other in given["tied_pairs"]}
    groups = [(i, *(o for o, one in first.items() if one == i)) for i in range(given["layers"]) if i not in first]
    harm = np.array(given["trace"])[:, None] * np.stack([given["dw2_4bit"], given["dw2_8bit"]], axis=1)
    # Published are millions of parameters (of 2^20) and of bit operations, and milliseconds.
    parameters, bops = np.array(given["parameters"]) * 2**20, np.array(given["bops"]) * 1e6
    latency = np.stack([given["latency_int4"], given["latency_int8"]], axis=1) / 1000
    costs = {
        "modelsize": ("storage", np.stack([parameters * 4 / 8, parameters], axis=1)),
        "bops": ("bops", np.stack([bops / 4, bops], axis=1)),
        "latency": ("latency", latency),
    }
    total = functools.reduce(np.add.outer, [harm[list(group)].sum(0) for group in groups]).reshape(-1)
    # The loss is all that is predicted; the share of it that is left stands for the accuracy.
    accuracy = 1 - total / harm[:, 0].sum()
    nothing = np.zeros(PLACES)
    noise = np.stack([[np.interp(WIDTHS, (4, 8), harm[list(g)].sum(0)), nothing] for g in groups]) / harm.sum()
    pairs = np.array([(4, 8), (8, 8)])  # its sensitivities are those of weights; activations follow
    made = []
    for case, (metric, of_layers) in costs.items():
        # Between and below the two widths that were published, cost is taken to be linear in bits; nothing chooses them.
        per_bit = (of_layers[:, 1] - of_layers[:, 0]) / 4
        cost = np.full((len(of_layers), PLACES, PLACES), np.nan)
        widths = np.arange(1, hw_models.BITS + 1)
        cost[:, : hw_models.BITS, : hw_models.BITS] = (of_layers[:, :1] + per_bit[:, None] * (widths - 4))[:, :, None]
        prices = [of_layers[list(group)].sum(0) for group in groups]
        low, high = (sum(float(pick(of_decision)) for of_decision in prices) for pick in (np.min, np.max))
        made.append(
            TableFile(
                name=f"hawqv3 {case}",
                metric=metric,
                target="published",
                widths=read_bits("4,8"),
                float_accuracy=1.0,
                search_images=IMAGENET,
                test_images=IMAGENET,
                limits={"0.5": low + 0.5 * (high - low)},
                workload=workload,
                groups=groups,
                cost=cost,
                noise=noise,
                pairs=[pairs] * len(groups),
                prices=prices,
                accuracy=accuracy,
                loss=total,
                kl=total,
                accuracy_test=accuracy,
                loss_test=total,
                extra={},
            )
        )
    return made


# What the solvers find


class Outcome(NamedTuple):
    """One search: regret in points, how it fell with every evaluation, seconds."""

    problem: str
    solver: str
    evaluations: int
    seed: int
    regret: float
    curve: list[float]
    seconds: float


@functools.cache
def known(name: str) -> dict[str, TabularProblem]:
    return load(name)


def one_search(asked: tuple[str, str, str, int, int, int]) -> Outcome:
    name, title, solver, evaluations, seed, ahead = asked
    torch.set_num_threads(1)
    problem = known(name)[title]
    most = problem.best_value
    curve: list[float] = []

    def on_trial(found: Trial) -> None:
        best = 100 * most
        if curve:
            best = curve[-1]
        if found.feasible:
            best = min(best, 100 * (most - found.accuracy))
        curve.append(best)

    start = time.perf_counter()
    session = Session(problem, evaluations, on_trial, ahead=ahead)
    solve(solver, session, seed)
    seconds = time.perf_counter() - start
    assert session.best is not None
    return Outcome(title, solver, evaluations, seed, 100 * (most - session.best.accuracy), curve, seconds)


def additivity(problem: TabularProblem) -> float:
    """Correlation of the loss of random policies with the sum of the rises that were measured."""
    rise = sensitivity.measure(problem, Session(problem, 10000), keep=1)
    random = np.random.default_rng(0)
    losses, sums = [], []
    for _ in range(300):
        picks = random_search.lowered(problem, random_search.draw(problem, random), random)
        losses.append(problem.evaluate(random_search.policy(problem, picks)).loss)
        sums.append(sum(float(d.of(table)[i]) for d, table, i in zip(problem.decisions, rise, picks, strict=True)))
    return float(np.corrcoef(losses, sums)[0, 1])


# What is printed


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    made = []
    for (problem, solver, evaluations), group in itertools.groupby(
        outcomes, key=lambda o: (o.problem, o.solver, o.evaluations)
    ):
        found = list(group)
        regrets = [o.regret for o in found]
        near = sum(regret <= NEAR + 1e-9 for regret in regrets)
        figures = [f"{statistics.mean(regrets):.2f}", f"{min(regrets):.2f}", f"{max(regrets):.2f}"]
        seconds = statistics.median(o.seconds for o in found)
        made.append([problem, solver, str(evaluations), *figures, f"{near}/{len(found)}", f"{seconds:.1f}"])
    return made


def bars(outcomes: Sequence[Outcome], additive: dict[str, float]) -> list[str]:
    means: dict[tuple[str, str, int], float] = {}
    for key, group in itertools.groupby(outcomes, key=lambda o: (o.problem, o.solver, o.evaluations)):
        means[key] = statistics.mean(o.regret for o in group)
    made = []

    def say(holds: bool, claim: str) -> None:
        made.append(f"{shared.verdict(holds)}: {claim}")

    for problem in dict.fromkeys(o.problem for o in outcomes):
        agent = {n: means[key] for n in ALLOWED if (key := (problem, BAR, n)) in means}
        if 200 in agent:
            say(
                agent[200] <= 0.1 + 1e-9,
                f"{problem}: {BAR}'s mean regret after 200 evaluations at most 0.1 point ({agent[200]:.2f})",
            )
        rivals = ("ilp", "greedy", "evolution", "random")
        worse = [
            f"{rival} after {n}: {agent[n]:.2f} against {means[problem, rival, n]:.2f}"
            for n, rival in itertools.product(agent, rivals)
            if (problem, rival, n) in means and agent[n] > means[problem, rival, n] + 0.05
        ]
        say(not worse, f"{problem}: {BAR} nowhere more than 0.05 worse than a rival ({'; '.join(worse) or 'nowhere'})")
        if (problem, "ilp", 200) in means and 200 in agent and means[problem, "ilp", 200] > 0:
            figures = f"{agent[200]:.2f} against {means[problem, 'ilp', 200]:.2f}; additive to {additive[problem]:.2f}"
            say(agent[200] < means[problem, "ilp", 200], f"{problem}: {BAR} better than ilp after 200 ({figures})")
    return made


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Regret against evaluations, the mean over seeds of the longest searches, a panel per problem."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(o.problem for o in outcomes))
    columns = min(4, len(problems))
    lines = -(-len(problems) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    solvers = list(dict.fromkeys(o.solver for o in outcomes))
    for panel, problem in itertools.zip_longest(panels, problems):
        panel.set_visible(problem is not None)
        for color, solver in enumerate(solvers):
            mine = [o for o in outcomes if (o.problem, o.solver) == (problem, solver)]
            longest = max((o.evaluations for o in mine), default=0)
            curves = [o.curve + o.curve[-1:] * (longest - len(o.curve)) for o in mine if o.evaluations == longest]
            if curves:
                mean = np.mean(curves, axis=0)
                panel.plot(np.arange(1, len(mean) + 1), np.maximum(mean, 0.01), color=f"C{color}", label=solver, linewidth=1.4)
        panel.set(title=problem, yscale="log", ylim=(0.009, 100))
        panel.axhline(NEAR, color="grey", linewidth=0.6, linestyle=":")
        panel.set_yticks([0.01, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlabel="evaluations", ylabel="regret, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(solvers), frameon=False)
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def save(folder: Path, command: str, setting: str, outcomes: Sequence[Outcome], about: list[str], made: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *rows(outcomes)]
    parts = [
        "# How far from the best policy every solver stays",
        f"Made by `experiments/{NAME}.py`, which says what is compared and how; every search is in `{NAME}.csv`.",
        f"    {command}",
        setting,
        "\n".join(f"* {line}" for line in about),
        f"![regret against evaluations]({NAME}.png)",
        "\n".join(f"* {line}" for line in made),
        "\n".join(f"| {' | '.join(line)} |" for line in table),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field for field in Outcome._fields if field != "curve"])
        writer.writerows([getattr(o, field) for field in Outcome._fields if field != "curve"] for o in outcomes)
    draw(outcomes, folder / f"{NAME}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*NETWORKS, "hawqv3"]
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SHOWN), metavar="NAME")
    parser.add_argument("--evaluations", nargs="+", type=int, default=list(ALLOWED), metavar="N")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--ahead", type=int, default=SearchConfig().ahead, help="policies chosen before the first is learned from"
    )
    parser.add_argument("--processes", type=int, default=2, help="searches at a time; the figures don't depend on it")
    parser.add_argument(
        "--quick", action="store_true", help="only see that it runs: one seed, or 2 pairs a layer; saves nothing"
    )
    parser.add_argument(
        "--write-tables", type=Path, metavar="FOLDER", help="train and enumerate the networks, and search nothing"
    )
    parser.add_argument("--out", type=Path, help=f"folder for page, picture and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    seeds, allowed = options.seeds, options.evaluations
    if options.quick:
        seeds, allowed = 1, [30]
    console = Console()
    if not sys.stdout.isatty():
        console = Console(width=110)
    torch.set_num_threads(1)
    if options.write_tables is not None:
        write_tables(options.write_tables, options.problems, options.quick, console)
        return 0
    out = shared.folder_for(options.out, options.quick, FOLDER)
    about = []
    additive = {}
    asked = []
    for name in options.problems:
        with console.status(f"{name}: how additive it is"):
            problems = known(name)
        for title, problem in problems.items():
            additive[title] = additivity(problem)
            within = int((problem.file.all_prices() <= problem.limit * (1 + ROUNDING)).sum())
            about.append(
                f"{title}: {within:,} of {len(problem.file.accuracy):,} policies within the budget, the best at "
                f"{100 * problem.best_value:.2f} %; additive to {additive[title]:.2f}"
            )
            console.print(about[-1])
            for solver, evaluations in itertools.product(options.solvers, allowed):
                repeats = seeds
                if solver in CERTAIN:
                    repeats = 1
                asked += [(name, title, solver, evaluations, seed, options.ahead) for seed in range(repeats)]
    # Forked, so that what is known comes along.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("fork")) as pool, progress(console) as bar:
        task = bar.add_task("searches", total=len(asked), note="")
        outcomes = []
        for outcome in pool.map(one_search, asked):
            outcomes.append(outcome)
            bar.update(task, advance=1, note=f"{outcome.problem}, {outcome.solver}, {outcome.evaluations}")
    made = bars(outcomes, additive)
    table = Table(title="Regret in points; mean, least and most over seeds", box=box.SIMPLE_HEAD, pad_edge=False)
    shared.add_columns(table, COLUMNS, left=COLUMNS[:2])
    for row in rows(outcomes):
        table.add_row(*row)
    console.print(table)
    for line in made:
        console.print(line, markup=False, highlight=False)
    if out is not None:
        workers = counted(options.processes, "workers")
        setting = f"{seeds} seeds, {workers} with one thread each; seconds are those of the search alone."
        command = " ".join([f"python -m experiments.{NAME}", *sys.argv[1:]])
        save(out, command, setting, outcomes, about, made)
        console.print(f"written: {out / NAME}.md, .csv and .png")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
