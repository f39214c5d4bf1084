"""The cheapest policy within an allowed drop: what every solver finds, beside sweeps over budgets.

    python -m experiments.max_drop [--drops 0.1 0.2 ...] [--solvers NAME ...] [--sweep NAME ...] [--budgets N] [--quick]

`haq search --hw edge --max-drop DROP` on the default network, for every drop and solver, with the default number of
evaluations; those that measure sensitivities count. Beside it, what a user would do without `--max-drop`: search within N
budgets from the cheapest policy to uniform 8 bits, and take the cheapest of all policies that those searches evaluated whose
drop is allowed. A sweep measures sensitivities once, and each of its searches has as many evaluations as one search for a
drop. The bar is a cost within 2 % of the cheapest that any sweep has.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import haq
from experiments import shared
from haq.console.errors import run_command
from haq.problem.evaluator import one_thread
from haq.problem.sensitivity import Sensitivities
from haq.solvers import SOLVERS
from haq.solvers.base import Session, Trial, solve
from haq.solvers.sensitivity import by_evaluation
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

NAME = "max_drop"
FOLDER = Path("docs/experiments")
DROPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # points
SHOWN = ("ddpg", "ilp", "greedy", "evolution", "random")
SWEPT = ("ilp", "ddpg")
BUDGETS = 40
EVALUATIONS = 200
BAR = 0.02
COLUMNS = ("by", "drop allowed", "cost", "drop", "evaluations", "searches", "seconds")


class Row(NamedTuple):
    """What was found for one drop: cost as a fraction of uniform 8 bits, drops in points."""

    by: str
    allowed: float
    cost: float | None
    drop: float | None
    evaluations: int
    searches: int
    seconds: float


def search_for(task: SearchTask, drop: float, solver: str, evaluations: int) -> Row:
    """Search for the cheapest policy within a drop; no cost where none was found."""
    problem = task.problem.on(task.problem.target, None, max_drop=drop)
    session = Session(problem, evaluations)
    start = time.perf_counter()
    cost, lost = None, None
    try:
        found = solve(solver, session, 0)
        cost, lost = found.cost / problem.reference, _points(problem, found)
    except ValueError as error:
        print(f"{solver} at {drop}: {error}", file=sys.stderr)
    return Row(solver, drop, cost, lost, session.used, 1, time.perf_counter() - start)


def sweep(task: SearchTask, solver: str, budgets: Sequence[float], evaluations: int, known: Sensitivities) -> list[Trial]:
    """List every policy that searches within some budgets evaluate."""
    tried: list[Trial] = []
    for budget in budgets:
        problem = task.problem.on(task.problem.target, budget)
        given = None
        if SOLVERS.get(solver).uses_sensitivities:
            given = known
        solve(solver, Session(problem, evaluations, tried.append, given), 0)
    return tried


def cheapest(problem: haq.Problem, tried: Sequence[Trial], drop: float) -> Trial | None:
    """Return the cheapest trial within a drop, if there is one."""
    allowed = [trial for trial in tried if _points(problem, trial) <= drop + 1e-6]
    return min(allowed, key=lambda trial: trial.cost, default=None)


def _points(problem: haq.Problem, trial: Trial) -> float:
    return 100 * (problem.float_accuracy - trial.value)


def table_of(rows: Sequence[Row], drops: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Make a table of costs: a line for every solver and sweep, a column for every drop."""
    head = ["by", *(f"at most {drop:g}" for drop in drops)]
    lines = []
    for by in dict.fromkeys(row.by for row in rows):
        found = {row.allowed: _cell(row) for row in rows if row.by == by}
        lines.append([by, *(found[drop] for drop in drops)])
    return head, lines


def _cell(row: Row) -> str:
    if row.cost is None or row.drop is None:
        return "none"
    return f"{row.cost:.4f} ({row.drop:.2f})"


def verdicts(rows: Sequence[Row], drops: Sequence[float], solvers: Sequence[str]) -> list[str]:
    """Say for each drop how far the solvers are from the cheapest that a sweep found."""
    said = []
    for drop in drops:
        of_sweeps = [row.cost for row in rows if row.allowed == drop and row.searches > 1 and row.cost is not None]
        if not of_sweeps:
            continue
        parts = []
        for solver in solvers:
            found = next(row for row in rows if (row.by, row.allowed) == (solver, drop))
            if found.cost is None:
                parts.append(f"{solver} found none")
                continue
            more = found.cost / min(of_sweeps) - 1
            parts.append(f"{solver} {100 * more:+.1f} % ({shared.verdict(more <= BAR)})")
        said.append(f"at most {drop:g} points: {', '.join(parts)}")
    return said


def document(command: str, rows: Sequence[Row], drops: Sequence[float], solvers: Sequence[str]) -> str:
    """Write the page."""
    head, lines = table_of(rows, drops)
    text = [
        "# The cheapest policy within an allowed drop",
        "",
        f"`{command}`: default network, data and target; latency as a fraction of uniform 8 bits, in brackets the drop on the "
        "2,000 search images in points. Latency is estimated, accuracy is measured.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
        "Against the cheapest of the sweeps (the bar is 2 %):",
        "",
        *(f"* {sentence}" for sentence in verdicts(rows, drops, solvers)),
        "",
        *(
            f"* {by}: {sum(row.evaluations for row in rows if row.by == by):,} evaluations"
            for by in dict.fromkeys(row.by for row in rows)
        ),
        "",
    ]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", nargs="+", type=float, default=list(DROPS))
    parser.add_argument("--solvers", nargs="+", default=list(SHOWN))
    parser.add_argument("--sweep", nargs="*", default=list(SWEPT))
    parser.add_argument("--budgets", type=int, default=BUDGETS)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--quick", action="store_true", help="few drops, budgets and evaluations; only to see that it runs")
    parser.add_argument("--network", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--data", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.quick:
        given.drops, given.budgets, given.evaluations = given.drops[-2:], 2, 20
    named: dict[str, Any] = {name: getattr(given, name) for name in ("network", "data") if getattr(given, name)}
    task = SearchTask.build(SearchConfig(budget="1.0", **named))
    problem = task.problem
    console = Console()
    rows: list[Row] = []
    with one_thread():
        for solver in given.solvers:
            for drop in given.drops:
                rows.append(search_for(task, drop, solver, given.evaluations))
                console.print(f"{solver}, at most {drop:g}: {_cell(rows[-1])}, {rows[-1].seconds:.0f} s")
        measuring = Session(problem, 10 * given.evaluations)
        known = by_evaluation(problem, measuring, 0)
        budgets = np.linspace(1.02 * problem.smallest / problem.reference, 1.0, given.budgets).tolist()
        for solver in given.sweep:
            start = time.perf_counter()
            tried = sweep(task, solver, budgets, given.evaluations, known)
            seconds = time.perf_counter() - start
            for drop in given.drops:
                best = cheapest(problem, tried, drop)
                cost, lost = None, None
                if best is not None:
                    cost, lost = best.cost / problem.reference, _points(problem, best)
                rows.append(Row(f"sweep by {solver}", drop, cost, lost, len(tried), given.budgets, seconds))
    head, lines = table_of(rows, given.drops)
    table = Table(box=box.SIMPLE_HEAD, title="cost of uniform 8 bits (drop in points)")
    shared.add_columns(table, head, ("by",))
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    for sentence in verdicts(rows, given.drops, given.solvers):
        console.print(sentence)
    out = shared.folder_for(given.out, given.quick, FOLDER)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m experiments.max_drop", *(arguments or sys.argv[1:])])
        (out / f"{NAME}.md").write_text(document(command, rows, given.drops, given.solvers), encoding="utf-8")
        with (out / f"{NAME}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(shared.rounded(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
