"""What searches lose that share what they learn: a sweep of 21 problems in the evaluations of three searches.

    python -m experiments.sweep_sharing [--hw NAME ...] [--budgets F ...] [--evaluations N ...] [--seeds N] [--quick]

`haq sweep --hw edge,cloud,bismo-overlay --budgets 0.3:0.9:0.1 --solvers surrogate` on the default network, and beside it a
search of its own for each of these problems, with N evaluations each, once with the seed of the sweep and once with another,
which tells how far a search is from itself. The bars: at most 3.5 times the evaluations of one search, and every result within
one standard error of that of the search of its own, paired by sample, on the search split.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import haq
from experiments import shared
from haq.console.errors import run_command
from haq.problem.evaluator import one_thread
from haq.solvers.base import Session, Trial, find_solver
from haq.solvers.sharing import Sharing, allowance
from haq.solvers.surrogate import Search
from haq.study.config import SweepConfig
from haq.study.sweep_run import SweepContext

NAME = "sweep_sharing"
FOLDER = Path("docs/experiments")
HW = ("edge", "cloud", "bismo-overlay")
BUDGETS = tuple(f"0.{tenths}" for tenths in range(3, 10))
EVALUATIONS = (50, 100)
OTHER = 1000  # added to a seed for another search of its own
MOST = 3.5  # times the evaluations of one search
COLUMNS = ("evaluations", "seed", "hw", "budget", "shared", "own", "other_seed", "error", "other_error", "spent")


class Row(NamedTuple):
    """What was found for one problem: values on the search split, in percent; errors are of differences, in points."""

    evaluations: int
    seed: int
    hw: str
    budget: str
    shared: float
    own: float
    other_seed: float
    error: float
    other_error: float
    spent: int  # evaluations of the sweep, all problems together

    @property
    def difference(self) -> float:
        """Return by how many points the sweep's result is better."""
        return self.shared - self.own

    @property
    def holds(self) -> bool:
        """Say whether the sweep's result is at most one standard error worse."""
        return self.difference >= -max(self.error, 1e-9)


def alone(problem: haq.Problem, evaluations: int, seed: int) -> Trial:
    """Search for one problem alone, and return the best on the search split."""
    session = Session(problem, evaluations)
    find_solver("surrogate").solve(problem, session, seed)
    assert session.best is not None
    return session.best


def together(problems: Sequence[haq.Problem], evaluations: int, seed: int) -> tuple[list[Trial], int]:
    """Search for all problems together; returns the best for each, and how many policies were evaluated."""
    total = allowance(len(problems), evaluations)
    sessions = [Session(problem, total) for problem in problems]
    sharing = Sharing([Search(problem, session, seed) for problem, session in zip(problems, sessions, strict=True)], total)
    sharing.run()
    return [session.best for session in sessions if session.best is not None], len(sharing.spent)


def compare(named: Sequence[tuple[str, str, haq.Problem]], evaluations: int, seed: int) -> list[Row]:
    """Hold a sweep's results against those of searches of their own.

    Args:
        named: Hardware, budget and problem; all problems share an evaluator.
        evaluations: Of one search.
        seed: Of the sweep and of the searches.

    Returns:
        A row for each problem.
    """
    problems = [problem for _, _, problem in named]
    found, spent = together(problems, evaluations, seed)
    rows = []
    for (hw, budget, problem), best in zip(named, found, strict=True):
        own, other = (alone(problem, evaluations, one) for one in (seed, seed + OTHER))
        error, other_error = (100 * (problem.paired_error(one.policy, own.policy) or 0.0) for one in (best, other))
        values = 100 * best.value, 100 * own.value, 100 * other.value
        rows.append(Row(evaluations, seed, hw, budget, values[0], values[1], values[2], error, other_error, spent))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say for each number of evaluations whether the bars hold."""
    said = []
    for evaluations in dict.fromkeys(row.evaluations for row in rows):
        mine = [row for row in rows if row.evaluations == evaluations]
        times = max(row.spent for row in mine) / evaluations
        held = sum(row.holds for row in mine)
        mean = statistics.mean(row.difference for row in mine)
        others = [row.other_seed - row.own for row in mine]
        near = sum(other >= -max(row.other_error, 1e-9) for row, other in zip(mine, others, strict=True))
        said.append(
            f"{evaluations} evaluations: the sweep took {times:.2f} times those of one search (at most {MOST}: "
            f"{shared.verdict(times <= MOST)}); {held} of {len(mine)} results are within one standard error of a search of "
            f"their own, or better ({shared.verdict(held == len(mine))}), on average {mean:+.2f} points; another search of "
            f"their own is for {near} of {len(mine)}, on average {statistics.mean(others):+.2f} points"
        )
    return said


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Make a table: a line for every problem."""
    head = ["evaluations", "hw", "budget", "sweep", "own search", "difference", "± paired", "own, other seed"]
    lines = []
    for row in rows:
        values = [f"{row.shared:.2f}", f"{row.own:.2f}", f"{row.difference:+.2f}", f"{row.error:.2f}", f"{row.other_seed:.2f}"]
        lines.append([str(row.evaluations), row.hw, row.budget, *values])
    return head, lines


def document(command: str, rows: Sequence[Row]) -> str:
    """Write the page."""
    head, lines = table_of(rows)
    text = [
        "# Searches that share what they learn",
        "",
        f"`{command}`: default network and data; the best accuracy on the 2,000 search images, in percent (measured).",
        "",
        *(f"* {sentence}" for sentence in verdicts(rows)),
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
    ]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hw", nargs="+", default=list(HW))
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--evaluations", nargs="+", type=int, default=list(EVALUATIONS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few problems and evaluations; only to see that it runs")
    parser.add_argument("--network", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--data", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.quick:
        given.hw, given.budgets, given.evaluations = given.hw[:2], given.budgets[-2:], [6]
    named: dict[str, Any] = {name: getattr(given, name) for name in ("network", "data") if getattr(given, name)}
    asked = {"hw": tuple(given.hw), "budgets": tuple(given.budgets), "solvers": ("surrogate",), **named}
    context = SweepContext.load(SweepConfig.from_options(asked))
    problems = []
    for cell in context.cells():
        base = context.tasks[cell.hw].problem
        problems.append((cell.hw, cell.budget, base.on(base.target, cell.budget)))
    console = Console()
    rows: list[Row] = []
    with one_thread():
        for evaluations in given.evaluations:
            for seed in range(given.seeds):
                start = time.perf_counter()
                rows += compare(problems, evaluations, seed)
                console.print(f"{evaluations} evaluations, seed {seed}: {time.perf_counter() - start:.0f} s")
    for sentence in verdicts(rows):
        console.print(sentence)
    out = shared.folder_for(given.out, given.quick, FOLDER)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m experiments.sweep_sharing", *(arguments or sys.argv[1:])])
        (out / f"{NAME}.md").write_text(document(command, rows), encoding="utf-8")
        with (out / f"{NAME}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(shared.rounded(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
