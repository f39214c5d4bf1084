"""Which of the policies that a search evaluated is best on images that it hasn't seen: rules held against each other.

    python -m experiments.choice [--networks NAME ...] [--tables PATH ...] [--splits N] [--seeds N] [--quick]

Networks: those of `experiments.regret`. Evolution searches once; of what it tried, the outputs of the best policies on all
held-out images are computed. Then, again and again, these images are divided anew: so many judge policies as a search does,
the others test what a rule returns. So every rule meets hundreds of searches and not one, and the standard errors are those
of real answers. What is told is the accuracy of the returned policy on the test part, in points, beside that of the policy
that is best on the search part.

Tables: enumerated problems (`haq.Problem.tabular`), as they are, and with search and test images swapped: so few images test,
and good policies are so few, that one table is one throw of a coin. Every solver searches with every seed; standard errors
are estimated (`haq.problem.paired.estimated_error`). Beside the rules there is ilp's policy.

With --networks it also tells how well that estimate fits: the share of images that just one of two policies answers rightly,
over the square root of the sum of their divergences.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from experiments import regret, shared
from haq import data, networks
from haq.console.errors import run_command
from haq.problem.paired import APART
from haq.problem.table_file import TableFile, find, read
from haq.problem.tabular import TabularProblem
from haq.solvers import choice
from haq.solvers.base import Session, Trial, solve

NAME = "choice"
FOLDER = Path("docs/experiments")
NETWORKS = {"deep": 0.3, "plain": 0.3, "separable": 0.4}  # and the budget, as a share of the way from cheapest to dearest
EPOCHS = 6
EVALUATIONS, KEPT = 300, 200  # of the search, and how many of its policies are looked at
DRAWN = 100  # of these, in a search of its own
SIZES = (600, 2000)  # images that judge policies
ALLOWED = (50, 100, 200)  # evaluations on tables
SOLVERS = ("random", "evolution")
PAIRS = 2000
FURTHER = 500  # images that judge the best few again

Floats = NDArray[np.float64]


class Judged(NamedTuple):
    """What is known of the policies of a search, the best first; errors are those of the difference from the best."""

    values: Floats
    divergences: Floats
    losses: Floats
    errors: Floats

    def within(self, errors: float) -> NDArray[np.int64]:
        """Return the policies that are at most so many standard errors worse than the best."""
        near = self.values[0] - self.values <= errors * self.errors
        near[0] = True
        return np.flatnonzero(near)


def ranked(judged: Judged, errors: float = 1.0, most: int = choice.MOST) -> int:
    """Choose by the sum of the ranks by value, divergence and loss: what `haq.solvers.choice` does."""
    near = judged.within(errors)
    near = near[near < most]
    measures = (-judged.values[near], judged.divergences[near], judged.losses[near])
    total = np.sum([choice.ranks(measure.tolist()) for measure in measures], axis=0)
    return int(near[total.argmin()])


def least(numbers: Floats, among: NDArray[np.int64]) -> int:
    """Return the policy among some with the least of some numbers."""
    return int(among[numbers[among].argmin()])


def traded(judged: Judged, worth: float) -> int:
    """Choose by the part of a standard error that is given up, and the part of the divergence that is left."""
    given_up = (judged.values[0] - judged.values) / np.maximum(judged.errors, 1e-12)
    given_up[0] = 0
    price = given_up + worth * judged.divergences / max(float(judged.divergences[0]), 1e-12)
    return least(price, judged.within(1.0))


RULES: dict[str, Callable[[Judged], int]] = {
    "best": lambda judged: 0,
    "ranks": ranked,
    "ranks within half an error": lambda judged: ranked(judged, 0.5),
    "least divergence": lambda judged: least(judged.divergences, judged.within(1.0)),
    "least loss": lambda judged: least(judged.losses, judged.within(1.0)),
    "error traded for divergence": lambda judged: traded(judged, 1.0),
    "accuracy less 0.1 divergence": lambda judged: int((judged.values - 0.1 * judged.divergences).argmax()),
}


class Pool(NamedTuple):
    """What policies answer on many images, shape (policies, images)."""

    right: NDArray[np.float32]
    divergences: NDArray[np.float32]
    losses: NDArray[np.float32]

    def judged(self, policies: NDArray[np.int64], images: NDArray[np.int64]) -> tuple[NDArray[np.int64], Judged]:
        """Judge policies by some images; returns them in their order, and what is known of them."""
        right = self.right[np.ix_(policies, images)]
        values = right.mean(1, dtype=np.float64)
        losses = self.losses[np.ix_(policies, images)].mean(1, dtype=np.float64)
        order = np.lexsort((losses, -values))
        right = right[order]
        errors = (right - right[0]).std(1, ddof=1, dtype=np.float64) / len(images) ** 0.5
        divergences = self.divergences[np.ix_(policies, images)].mean(1, dtype=np.float64)
        return policies[order], Judged(values[order], divergences[order], losses[order], errors)


@torch.inference_mode()
def pool_of(name: str, quick: bool) -> Pool:
    """Search once, and look at the best policies on all held-out images."""
    epochs, evaluations, kept = EPOCHS, EVALUATIONS, KEPT
    if quick:
        epochs, evaluations, kept = 1, 20, 12
    dataset = data.load()
    with torch.inference_mode(False):
        problem = regret.trained(name, regret.NETWORKS[name].build, epochs)[0]
        reach = problem.smallest + NETWORKS[name] * (problem.largest - problem.smallest)
        session = Session(problem.limited_to(reach), evaluations)
        solve("evolution", session, 0)
    parts = [next(split.batches(len(split))) for split in (dataset.search, dataset.test)]
    network = networks.Network(name, problem.network, (1, 28, 28), (0.286,), (0.353,))
    images = network.preprocess(torch.cat([part[0] for part in parts]))
    labels = torch.cat([part[1] for part in parts])
    expected = _scores(problem.network.eval(), images)
    trials = sorted((one for one in session.trials if one.feasible), key=lambda one: one.rank)[:kept]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for trial in trials:
        scores = _scores(problem.evaluator.prepared(trial.policy), images)
        apart = F.kl_div(scores, expected, reduction="none", log_target=True).sum(1)
        found.append((scores.argmax(1) == labels, apart, F.nll_loss(scores, labels, reduction="none")))
    return Pool(*(torch.stack(part).float().numpy() for part in zip(*found, strict=True)))


def _scores(network: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in images.split(250)]).log_softmax(1)


def on_network(pool: Pool, size: int, splits: int) -> dict[str, list[float]]:
    """Divide the images again and again, and tell what every rule gains over the best on the search part, in points."""
    random = np.random.default_rng(0)
    policies, images = pool.right.shape
    size = min(size, images // 2)
    gains: dict[str, list[float]] = {}
    for _ in range(splits):
        order = random.permutation(images)
        drawn = random.permutation(policies)[:DRAWN]
        ordered, judged = pool.judged(drawn, order[:size])
        further = min(FURTHER, images // 4)
        tested = 100 * pool.right[:, order[size + further :]].mean(1)
        picks = {name: int(ordered[rule(judged)]) for name, rule in RULES.items()}
        again, together = pool.judged(ordered[: choice.LAST], order[: size + further])
        picks[f"ranks, {further} images confirm"] = int(again[ranked(together)])
        again, alone = pool.judged(ordered[: choice.LAST], order[size : size + further])
        picks[f"ranks by these {further} alone"] = int(again[ranked(alone)])
        for name, policy in picks.items():
            gains.setdefault(name, []).append(float(tested[policy] - tested[picks["best"]]))
    return gains


def fit(pool: Pool) -> tuple[float, float]:
    """Tell the share of images that just one of two policies answers rightly over what `APART` is multiplied by.

    Returns:
        The mean over pairs of the better half of the policies, and the standard deviation over the mean.
    """
    random = np.random.default_rng(0)
    order = (-pool.right.mean(1)).argsort()[: max(len(pool.right) // 2, 2)]
    divergences = pool.divergences.mean(1)
    found = []
    for _ in range(PAIRS):
        one, other = random.choice(order, 2, replace=False)
        apart = float((pool.right[one] != pool.right[other]).mean())
        found.append(apart / float(divergences[one] + divergences[other]) ** 0.5)
    return statistics.mean(found), statistics.stdev(found) / statistics.mean(found)


def swapped(file: TableFile) -> TableFile:
    """Let the test images judge, and the search images test: twice as many problems of the same policies."""
    return dataclasses.replace(
        file,
        accuracy=file.accuracy_test,
        loss=file.loss_test,
        accuracy_test=file.accuracy,
        loss_test=file.loss,
        search_images=file.test_images,
        test_images=file.search_images,
    )


def on_table(problem: TabularProblem, solvers: Sequence[str], allowed: Iterable[int], seeds: int) -> dict[str, list[float]]:
    """Search a table with every solver and seed, and tell what every rule gains over the best on the search images."""
    gains: dict[str, list[float]] = {}
    for evaluations in allowed:
        ilp = _tested(problem, solve("ilp", Session(problem, evaluations), 0))
        for solver in solvers:
            for seed in range(seeds):
                session = Session(problem, evaluations)
                solve(solver, session, seed)
                assert session.best is not None
                trials = [one for one in session.trials if choice.is_candidate(one)]
                trials.sort(key=lambda one: one.rank)
                judged = _judged(problem, trials)
                best = _tested(problem, session.best)
                for name, rule in RULES.items():
                    gains.setdefault(name, []).append(_tested(problem, trials[rule(judged)]) - best)
                gains.setdefault("ilp", []).append(ilp - best)
    return gains


def _judged(problem: TabularProblem, trials: Sequence[Trial]) -> Judged:
    rows: list[tuple[Any, ...]] = []
    for trial in trials:
        error = problem.paired_error(trials[0].policy, trial.policy)
        rows.append((trial.value, trial.evaluation.divergence, trial.loss, error))
    return Judged(*np.array(rows, dtype=np.float64).T)


def _tested(problem: TabularProblem, trial: Trial) -> float:
    return 100 * problem.test(trial.policy).value


def table_of(found: dict[str, dict[str, list[float]]]) -> tuple[list[str], list[list[str]]]:
    """Make a table of mean gains with their standard errors: a line for every rule, a column for every problem."""
    rules = list(dict.fromkeys(rule for gains in found.values() for rule in gains))
    lines = []
    for rule in rules:
        cells, means = [], []
        for gains in found.values():
            if rule not in gains:
                cells.append("")
                continue
            mean = statistics.mean(gains[rule])
            means.append(mean)
            cells.append(f"{mean:+.2f} ± {statistics.stdev(gains[rule]) / len(gains[rule]) ** 0.5:.2f}")
        lines.append([rule, *cells, f"{statistics.mean(means):+.3f}", f"{min(means):+.2f}"])
    return ["rule", *found, "mean", "least"], lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="few policies, splits and seeds; only to see that it runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    allowed: Sequence[int] = ALLOWED
    if given.quick:
        given.splits, given.seeds, allowed = 3, 2, (12,)
    console = Console()
    found: dict[str, dict[str, list[float]]] = {}
    fits = []
    for name in given.networks:
        pool = pool_of(name, given.quick)
        mean, spread = fit(pool)
        fits.append(f"{name}: {mean:.3f} ± {100 * spread:.0f} % (estimates take {APART})")
        for size in SIZES:
            found[f"{name}, {size}"] = on_network(pool, size, given.splits)
    for path in given.tables:
        file = read(find(path))
        for budget in file.limits:
            for called, one in ((file.name, file), (f"{file.name} swapped", swapped(file))):
                problem = TabularProblem(one, budget)
                found[f"{called}, {budget}"] = on_table(problem, given.solvers, allowed, given.seeds)
    head, lines = table_of(found)
    table = Table(box=box.SIMPLE_HEAD, title="test accuracy beside that of the best on the search images, points")
    shared.add_columns(table, head, ("rule",))
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    for sentence in fits:
        console.print(f"disagreement / sqrt(divergences), {sentence}")
    out = shared.folder_for(given.out, given.quick, FOLDER)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m experiments.choice", *(arguments or sys.argv[1:])])
        text = ["# The choice at the end", "", f"`{command}`", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        text += [f"| {' | '.join(cells)} |" for cells in lines]
        text += ["", *(f"* disagreement / sqrt(divergences), {sentence}" for sentence in fits), ""]
        (out / f"{NAME}.md").write_text("\n".join(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
