"""How far from the best policy every solver stays, on problems small enough for the best to be known.

    python -m experiments.regret [--problems NAME ...] [--solvers NAME ...] [--seeds N] [--ahead N] [--processes N] [--quick]

Problems. Small networks, trained here on the default data set, of which *every* policy is evaluated, with real quantized
forward passes on the 2,000 search images, on the target `edge`; first and last layer at 8 bits:

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
import hashlib
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import hw_models
import quantizers as Q
from experiments import shared
from haq import data, networks, training
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.problem.decision import Decision, read_bits
from haq.problem.evaluator import Evaluation
from haq.problem.goal import BEST
from haq.problem.limits import ROUNDING, Limit
from haq.problem.objective import find_objective
from haq.solvers import SOLVERS, random_search, sensitivity
from haq.solvers.base import Session, Trial, solve
from haq.study.config import SearchConfig
from hw_models.widths import WIDTHS, places

NAME = "regret"
FOLDER = Path("docs/experiments")
HAWQ = Path(__file__).with_name("hawqv3_resnet18.json")
ALLOWED = (50, 100, 200, 400)
NEAR = 0.1  # points: a run this close has found it
EPOCHS = 15
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


class Known(haq.Problem):
    """A problem of which every policy's evaluation is known already, and the best within the budget with it."""

    def __init__(self, of: Any, title: str, fraction: float, accuracy: Floats, loss: Floats) -> None:
        """Keep what is known of every policy.

        Args:
            of: What a problem holds: workload, cost, widths, groups, decisions, quantization_error, metric, float_result.
            title: What it is called.
            fraction: The budget, from the cheapest policy (0) to the dearest (1).
            accuracy: One axis per decision, one entry per option.
            loss: Likewise.
        """
        for field in ("workload", "cost", "widths", "groups", "decisions", "quantization_error", "metric", "float_result"):
            setattr(self, field, getattr(of, field))
        self.objective = find_objective("accuracy")
        self.title, self._elsewhere = title, getattr(of, "evaluate", None)
        self._accuracy, self._loss = accuracy, loss
        self._option = [{tuple(pair): i for i, pair in enumerate(d.pairs.tolist())} for d in self.decisions]
        low, high = (sum(float(pick(d.prices)) for d in self.decisions) for pick in (np.min, np.max))
        amount = low + fraction * (high - low)
        self.limits = (Limit(self.metric, "", amount, high, low, high),)
        self.peak, self.goal = None, BEST
        price = functools.reduce(np.add.outer, [decision.prices for decision in self.decisions])
        within = price <= self.limit * (1 + ROUNDING)
        self.best, self.policies, self.within = float(accuracy[within].max()), accuracy.size, int(within.sum())

    def check_policy(self, policy: object) -> None:
        """Take every policy: what is known has no pinned layers and no schemes."""

    def policy_cost(self, policy: Mapping[str, tuple[int | None, int | None]]) -> float:
        """Add up what the layers cost; every pair can be done."""
        w, a = self.bit_arrays(policy)
        return float(self.cost[np.arange(len(w)), places(w), places(a)].sum())

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Everything is known already."""

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        pairs = [policy[self.workload.names[group[0]]] for group in self.groups]
        try:
            index = tuple(options[pair] for options, pair in zip(self._option, pairs, strict=True))  # type: ignore[index]
        except KeyError:
            # Sensitivities change one operand at a time, which need not be an option.
            assert self._elsewhere is not None
            found: Evaluation = self._elsewhere(policy)
            return found
        return Evaluation(float(self._accuracy[index]), float(self._loss[index]), 1)


def load(name: str, quick: bool = False) -> list[Known]:
    """The problems of one name: its network at two budgets, or HAWQ-V3's three."""
    if name == "hawqv3":
        return published(json.loads(HAWQ.read_text(encoding="utf-8")))
    given = NETWORKS[name]
    pairs, epochs = given.pairs, EPOCHS
    if quick:
        pairs, epochs = given.pairs[-2:], 1
    problem, images, labels = trained(name, given.build, epochs)
    for number, decision in enumerate(problem.decisions):
        if len(decision.pairs) > 1:
            problem.decisions[number] = restricted(problem, decision, pairs)
    state = b"".join(t.numpy().tobytes() for t in problem.network.state_dict().values())
    key = hashlib.sha256(state + repr([d.pairs.tolist() for d in problem.decisions]).encode()).hexdigest()[:16]
    path = data.cache_folder() / f"{NAME}-{name}-{key}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, *enumerate_all(problem, images, labels))
        partial.replace(path)
    with np.load(path, allow_pickle=False) as kept:
        accuracy, loss = kept.values()
    check(problem, accuracy, loss)
    return [Known(problem, f"{name}, budget {budget}", budget, accuracy, loss) for budget in given.budgets]


def trained(name: str, build: Callable[[], list[nn.Module]], epochs: int) -> tuple[haq.Problem, Tensor, Tensor]:
    """A problem, and the images and labels that judge it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = networks.Network(name, nn.Sequential(*build()), (1, 28, 28), (0.286,), (0.353,))
    dataset = data.load()
    training.fit(network, dataset.train, training.TrainConfig(epochs, learning_rate=0.1, seed=0))
    images, labels = next(dataset.search.batches(len(dataset.search)))
    images = network.preprocess(images).contiguous()
    calibrate = network.preprocess(dataset.train.images[dataset.fair(512)]).contiguous()
    return haq.Problem(network.module, calibrate, (images, labels), "edge", budget=1.0, bits=(1, 8)), images, labels


def restricted(problem: haq.Problem, decision: Decision, pairs: Sequence[tuple[int, int]]) -> Decision:
    made = decision._replace(pairs=np.array(pairs))
    return made._replace(prices=made.of(problem.cost[list(decision.layers)].sum(0)))


@torch.inference_mode()
def enumerate_all(problem: haq.Problem, images: Tensor, labels: Tensor) -> tuple[Floats, Floats]:
    """Measure accuracy and loss of every policy of a sequential network, one axis per decision.

    Each layer's output is computed once for all that follows from it.
    """
    order = {problem.workload.names[decision.layers[0]]: i for i, decision in enumerate(problem.decisions)}
    shape = [len(decision.pairs) for decision in problem.decisions]
    accuracy, loss = np.zeros(shape), np.zeros(shape)
    parts = list(problem.evaluator.network.named_children())

    def follow(position: int, x: Tensor, index: tuple[int, ...]) -> None:
        for place, (name, part) in enumerate(parts[position:], start=position):
            if name in order:
                for option, (w, a) in enumerate(problem.decisions[order[name]].pairs.tolist()):
                    part.weight_bits, part.activation_bits = w, a
                    # A layer may return what its next call writes over.
                    follow(place + 1, torch.cat([part(batch).clone() for batch in x.split(500)]), (*index, option))
                return
            x = part(x)
        accuracy[index] = float((x.argmax(1) == labels).double().mean())
        loss[index] = float(F.cross_entropy(x.double(), labels))

    follow(0, images, ())
    return accuracy, loss


def check(problem: haq.Problem, accuracy: Floats, loss: Floats) -> None:
    """Raise RuntimeError if what was enumerated isn't what the evaluator says."""
    random = np.random.default_rng(0)
    for picks in (tuple(random_search.draw(problem, random)) for _ in range(20)):
        found = problem.evaluate(random_search.policy(problem, list(picks)))
        if abs(found.accuracy - accuracy[picks]) > 1e-9 or abs(found.loss - loss[picks]) > 1e-5:
            raise RuntimeError(f"options {picks} were enumerated as {accuracy[picks]}, {loss[picks]} but are {found}")


def published(given: dict[str, Any]) -> list[Known]:
    """HAWQ-V3's problems: 19 layers of ResNet-18 at 4 or 8 bits, some of them tied."""
    network = networks.load("torchvision:resnet18", pretrained=False).module
    traced = hw_models.trace(network.eval(), torch.zeros(1, 3, 224, 224))
    workload = hw_models.Workload(traced.layers[1:-1])
    first = {other: one for one, other in given["tied_pairs"]}
    groups = [(i, *(o for o, one in first.items() if one == i)) for i in range(given["layers"]) if i not in first]
    harm = np.array(given["trace"])[:, None] * np.stack([given["dw2_4bit"], given["dw2_8bit"]], axis=1)
    parameters, bops = np.array(given["parameters"]), np.array(given["bops"])
    costs = {
        "modelsize": np.stack([parameters * 4, parameters * 8], axis=1),
        "bops": np.stack([bops / 4, bops], axis=1),
        "latency": np.stack([given["latency_int4"], given["latency_int8"]], axis=1),
    }
    total = functools.reduce(np.add.outer, [harm[list(group)].sum(0) for group in groups])
    made = []
    for case, cost in costs.items():
        of = SimpleNamespace(
            workload=workload, groups=groups, metric="latency", float_result=Evaluation(1.0, 0.0, 1), widths=read_bits((4, 8))
        )
        # Between and below the two widths that were published, cost is taken to be linear in bits; nothing chooses them.
        per_bit = (cost[:, 1] - cost[:, 0]) / 4
        of.cost = np.repeat((cost[:, :1] + per_bit[:, None] * (np.array(WIDTHS) - 4))[:, :, None], len(WIDTHS), axis=2)
        pairs = np.array([(4, 8), (8, 8)])  # its sensitivities are those of weights; activations follow
        of.decisions = [Decision(group, pairs, cost[list(group)].sum(0)) for group in groups]
        nothing = np.zeros(len(WIDTHS))
        noise = np.stack([[np.interp(WIDTHS, (4, 8), harm[list(g)].sum(0)), nothing] for g in groups])
        of.quantization_error = noise / harm.sum()
        made.append(Known(of, f"hawqv3 {case}, budget 0.5", 0.5, 1 - total / harm[:, 0].sum(), total))
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
def known(name: str, quick: bool) -> list[Known]:
    return load(name, quick)


def one_search(asked: tuple[str, bool, int, str, int, int, int]) -> Outcome:
    name, quick, number, solver, evaluations, seed, ahead = asked
    torch.set_num_threads(1)
    problem = known(name, quick)[number]
    curve: list[float] = []

    def on_trial(found: Trial) -> None:
        best = 100 * problem.best
        if curve:
            best = curve[-1]
        if found.feasible:
            best = min(best, 100 * (problem.best - found.accuracy))
        curve.append(best)

    start = time.perf_counter()
    found = solve(solver, Session(problem, evaluations, on_trial, ahead=ahead), seed)
    seconds = time.perf_counter() - start
    return Outcome(problem.title, solver, evaluations, seed, 100 * (problem.best - found.accuracy), curve, seconds)


def additivity(problem: Known) -> float:
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
        "--quick", action="store_true", help="only see that it runs: 2 pairs per layer, one seed; saves nothing"
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
    out = shared.folder_for(options.out, options.quick, FOLDER)
    about = []
    additive = {}
    asked = []
    for name in options.problems:
        with console.status(f"{name}: every policy"):
            problems = known(name, options.quick)
        for number, problem in enumerate(problems):
            additive[problem.title] = additivity(problem)
            about.append(
                f"{problem.title}: {problem.within:,} of {problem.policies:,} policies within the budget, the best at "
                f"{100 * problem.best:.2f} %; additive to {additive[problem.title]:.2f}"
            )
            console.print(about[-1])
            for solver, evaluations in itertools.product(options.solvers, allowed):
                repeats = seeds
                if solver in CERTAIN:
                    repeats = 1
                asked += [(name, options.quick, number, solver, evaluations, seed, options.ahead) for seed in range(repeats)]
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
        setting = (
            f"{seeds} seeds, {options.processes} searches at a time, one thread each; seconds are those of the search alone."
        )
        command = " ".join([f"python -m experiments.{NAME}", *sys.argv[1:]])
        save(out, command, setting, outcomes, about, made)
        console.print(f"written: {out / NAME}.md, .csv and .png")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
