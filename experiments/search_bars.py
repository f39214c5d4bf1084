"""Whether the searches keep what is claimed of them, on problems of which every policy is known, beside other packages.

    python -m experiments.search_bars [--tables NAME|PATH ...] [--solvers NAME ...] [--seeds N] [--processes N] [--quick]
                                      [--anew] [--no-times] [--out FOLDER]

Problems are the tables that ship with the package, and ../shared/reference/tabular_digres.npz where it is. Rivals from outside
are optuna's TPE and two of nevergrad's portfolios; experiments/search_rivals.py says how they are used. Without their packages
the script says what to install, and does without.

Every search counts the policies that it evaluates, those that sensitivities take included. Regret is the accuracy of the best
policy within the budget minus that of the best that was evaluated, in points, on the search images. A solver may spend 200
evaluations otherwise than 50, so every number is a search of its own, unless the first seed's searches are beginnings of the
longest. The bars:

    regret      of `surrogate` and `ddpg` after 50, 100 and 200 evaluations, on every problem and on average; what is less than
                one or two images of the search split is nothing
    rivals      nowhere worse by more than a standard error of the difference
    time        milliseconds of the processor for an evaluation, without it: on a made-up network of 12 decisions after 100
                trials, and on one of 54 decisions, 108 features, after 300
    test        accuracy on test images of the policy that is returned, beside that of the best on the search images, and ilp's
    actor       how many of the best policies of `ddpg` were proposed by its actor

Every finished search is a row of search.csv, which a call with other solvers, tables or seeds goes on with; --anew forgets it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import nn

import haq
import quantizers as Q
from experiments import shared
from experiments.quantizer_accuracy import Table
from experiments.search_rivals import ConstrainedTpe, NamedPortfolio, Portfolio, Tpe, imported
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.console.tables import say
from haq.problem.evaluator import Evaluation
from haq.problem.table_file import TableFile, read, shipped
from haq.problem.tabular import TabularProblem
from haq.solvers import surrogate
from haq.solvers.base import Session, find_solver
from haq.solvers.ilp import IntegerProgramme
from haq.store import files
from haq.study.bench import Asked, Place, search

NAME = "search"
FOLDER = Path("docs/experiments")
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "tabular_digres.npz"
COUNTS = (25, 50, 100, 200)
ITERATED = "ilp --iterate"
OWN = ("surrogate", "ddpg", "evolution", "random", "ilp", ITERATED, "greedy")
OUTSIDE: dict[str, tuple[type[Tpe] | type[Portfolio], str]] = {
    "optuna": (Tpe, "optuna"),
    "optuna, constrained": (ConstrainedTpe, "optuna"),
    "nevergrad NGOpt": (Portfolio, "nevergrad"),
    "nevergrad Portfolio": (NamedPortfolio, "nevergrad"),
}
CERTAIN = ("ilp", "greedy")  # nothing is drawn
HELD = ("surrogate", "ddpg")  # to the bars
# After so many evaluations: points at most on a problem, and on average, and images of the search split, whichever is more.
BARS = {50: (0.3, 0.18, 2), 100: (0.12, 0.06, 1), 200: (0.05, None, 1)}
# Decisions, trials, and milliseconds an evaluation at most.
TIMES = {"surrogate": ((12, 100, 15.0), (54, 300, 150.0)), "ddpg": ((12, 100, 60.0),)}
TINY = 1e-9


class Row(NamedTuple):
    """One search."""

    table: str
    budget: str
    solver: str
    evaluations: int
    seed: int
    regrets: dict[int, float]  # points, after some of COUNTS
    began: dict[int, str]  # digest of the policies evaluated by then
    milliseconds: float  # of the processor per evaluation
    tested: float | None  # accuracy on test images of the policy returned, in percent
    tested_best: float | None  # and of the best on the search images
    origin: str  # who proposed the best policy, where a surrogate chose

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What was asked for."""
        return self.table, self.budget, self.solver, self.evaluations, self.seed


def solver_of(name: str) -> Any:
    """Return the solver of a name in this experiment."""
    if name in OUTSIDE:
        return OUTSIDE[name][0]
    if name == ITERATED:
        return IntegerProgramme(iterate=True)
    return name


def tables(asked: Sequence[str]) -> list[TableFile]:
    """Read what is asked for: by default what ships, and the reference where it is."""
    if asked:
        return [read(name) for name in asked]
    found = [read(name) for name in shipped()]
    if REFERENCE.is_file():
        given = read(REFERENCE)
        same = [file for file in found if file.name == given.name]
        if not same:
            found.append(given)
        elif not np.array_equal(same[0].accuracy, given.accuracy):
            found.append(dataclasses.replace(given, name=f"{given.name} (reference)"))
    return found


@contextmanager
def told_origins() -> Iterator[list[surrogate.Search]]:
    """Keep the searches of surrogates that are made within a `with`."""
    made: list[surrogate.Search] = []
    begin = surrogate.Search.__init__

    def kept(self: surrogate.Search, *given: Any, **options: Any) -> None:
        begin(self, *given, **options)
        made.append(self)

    surrogate.Search.__init__ = kept  # type: ignore[method-assign]
    try:
        yield made
    finally:
        surrogate.Search.__init__ = begin  # type: ignore[method-assign]


def one_search(problem: TabularProblem, table: str, budget: str, solver: str, evaluations: int, seed: int) -> Row:
    """Do one search, and tell what came of it."""
    torch.set_num_threads(1)
    with told_origins() as made:
        found = search(problem, Asked(Place(table, budget), solver, evaluations, seed), solver_of(solver))
    counts = [count for count in COUNTS if count <= evaluations]
    regrets = {count: found.after(count) for count in counts}
    began = {count: hashlib.sha256(repr(found.policies[:count]).encode()).hexdigest()[:12] for count in counts}
    best = int(np.argmin(found.regrets))
    origin = ""
    if made and len(made[-1].origins) > best:
        origin = made[-1].origins[best]
    milliseconds = 1000 * found.seconds / len(found.regrets)
    tested, tested_best = (_percent(value) for value in (found.tested, found.tested_best))
    return Row(table, budget, solver, evaluations, seed, regrets, began, milliseconds, tested, tested_best, origin)


def _percent(share: float | None) -> float | None:
    if share is None:
        return None
    return 100 * share


# What is done, and kept


class Searches:
    """All searches, of which some are there."""

    def __init__(self, found: Sequence[TableFile], solvers: Sequence[str], seeds: int, counts: Sequence[int]) -> None:
        self.problems = {}
        for file in found:
            for budget in file.limits:
                self.problems[file.name, budget] = TabularProblem(file, budget)
        self.solvers, self.seeds, self.counts = list(solvers), seeds, sorted(counts)
        self.rows: dict[tuple[str, str, str, int, int], Row] = {}

    def wanted(self) -> list[tuple[str, str, str, int, int]]:
        """List what is to be done, as far as is known now: the other seeds once the first one's searches are there."""
        asked = []
        for (table, budget), solver in itertools.product(self.problems, self.solvers):
            seeds = self.seeds
            if solver in CERTAIN:
                seeds = 1
            first = [(table, budget, solver, count, 0) for count in reversed(self.counts)]
            asked += first
            if all(key in self.rows for key in first):
                asked += [
                    (table, budget, solver, count, seed)
                    for seed in range(1, seeds)
                    for count in self.lengths(table, budget, solver)
                ]
        return [key for key in asked if key not in self.rows]

    def lengths(self, table: str, budget: str, solver: str) -> list[int]:
        """Return how long a solver's searches must be, the longest first: one does, if the others are its beginnings."""
        longest = self.rows[table, budget, solver, self.counts[-1], 0]
        for count in self.counts:
            if self.rows[table, budget, solver, count, 0].began[count] != longest.began[count]:
                return self.counts[::-1]
        return self.counts[-1:]

    def regrets(self, table: str, budget: str, solver: str, count: int) -> list[float]:
        """Return the regrets after so many evaluations, by seed."""
        length = count
        if len(self.lengths(table, budget, solver)) == 1:
            length = self.counts[-1]
        keys = [(table, budget, solver, length, seed) for seed in range(self.seeds)]
        return [self.rows[key].regrets[count] for key in keys if key in self.rows]

    def longest(self, table: str, budget: str, solver: str) -> list[Row]:
        """Return the longest searches, by seed."""
        keys = [(table, budget, solver, self.counts[-1], seed) for seed in range(self.seeds)]
        return [self.rows[key] for key in keys if key in self.rows]

    @property
    def complete(self) -> list[tuple[str, str]]:
        """Return the problems of which everything is there."""
        missing = {(table, budget) for table, budget, *_ in self.wanted()}
        return [place for place in self.problems if place not in missing]


def run(searches: Searches, processes: int, keep: Callable[[Row], None], console: Console) -> None:
    """Do what isn't there yet, some at a time."""
    # Forked, so that the tables come along.
    global _PROBLEMS  # what a child that is forked searches
    _PROBLEMS = searches.problems
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool, progress(console) as bar:
        while asked := searches.wanted():
            task = bar.add_task("searches", total=len(asked), note="")
            for row in pool.map(_asked_search, asked):
                searches.rows[row.key] = row
                keep(row)
                bar.update(task, advance=1, note=f"{row.table} {row.budget}, {row.solver}, {row.evaluations}, seed {row.seed}")


_PROBLEMS: dict[tuple[str, str], TabularProblem] = {}


def _asked_search(key: tuple[str, str, str, int, int]) -> Row:
    table, budget, solver, evaluations, seed = key
    return one_search(_PROBLEMS[table, budget], table, budget, solver, evaluations, seed)


# The time of solvers


def chain(decisions: int) -> haq.Problem:
    """Make a problem of so many small layers that are free, and two that aren't."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for _ in range(decisions + 2):
            parts += [nn.Conv2d(8, 8, 1), nn.ReLU()]
        network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        images = torch.randn(8, 8, 2, 2)
    return haq.Problem(network, images, images, "edge", budget=0.7, objective="agreement")


def milliseconds(solver: str, decisions: int, trials: int) -> float:
    """Tell what a solver takes for an evaluation: the processor's time of a search, less what evaluations take."""
    problem = chain(decisions)
    random = np.random.default_rng(0)
    weights = random.lognormal(size=(len(problem.workload.names), 2))
    spent = [0.0]

    def evaluate(policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        begin = time.process_time()
        widths = np.array([policy[name] for name in problem.workload.names], float)
        loss = float((weights * 4.0**-widths).sum() + 0.01 * np.abs(np.sin(widths * weights)).mean())
        spent[0] += time.process_time() - begin
        return Evaluation(math.exp(-loss), loss, problem.evaluator.count)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    problem.expect = lambda *given: None  # type: ignore[method-assign]
    session = Session(problem, trials, race=False)
    begin = time.process_time()
    # The choice at the end, which looks at images, isn't the solver's.
    find_solver(solver).solve(problem, session, 0)
    return 1000 * (time.process_time() - begin - spent[0]) / max(session.used, 1)


# What is claimed


def error_of(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 of a single value, that of a solver that draws nothing."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))


def said(short: float, claim: str, digits: int = 2) -> str:
    """Say whether a claim holds: what it is short by is 0 or less."""
    if short <= TINY:
        return f"holds: {claim}"
    return f"FALLS SHORT by {short:.{digits}f}: {claim}"


def regret_bars(searches: Searches) -> Iterator[str]:
    """Hold regrets against what they may be."""
    for solver, (count, (most, most_mean, images)) in itertools.product(HELD, BARS.items()):
        if solver not in searches.solvers or count not in searches.counts or not searches.complete:
            continue
        means = []
        worst = (-math.inf, "")
        for table, budget in searches.complete:
            found = searches.regrets(table, budget, solver, count)
            means.append(statistics.mean(found))
            allowed = max(most, 100 * images / searches.problems[table, budget].file.search_images)
            figures = f"{table} {budget}: {means[-1]:.2f} ± {error_of(found):.2f}, at most {allowed:.2f}"
            worst = max(worst, (means[-1] - allowed, figures))
        yield said(worst[0], f"{solver}'s mean regret after {count} on every problem (nearest or most beyond: {worst[1]})")
        if most_mean is not None:
            mean = statistics.mean(means)
            claim = f"{solver}'s mean regret after {count} over all problems ({mean:.3f}, at most {most_mean})"
            yield said(mean - most_mean, claim)


def rival_bars(searches: Searches) -> Iterator[str]:
    """Hold regrets against the rivals'."""
    for solver, rival in itertools.product(HELD, searches.solvers):
        if solver == rival or solver not in searches.solvers:
            continue
        worse = []
        most = -math.inf
        for (table, budget), count in itertools.product(searches.complete, searches.counts):
            own, other = (searches.regrets(table, budget, name, count) for name in (solver, rival))
            difference = statistics.mean(own) - statistics.mean(other)
            beyond = difference - math.hypot(error_of(own), error_of(other))
            most = max(most, beyond)
            if beyond > TINY:
                worse.append(
                    f"{table} {budget} after {count}: {statistics.mean(own):.2f} against {statistics.mean(other):.2f}"
                )
        if most > -math.inf:
            where = "; ".join(worse) or "nowhere"
            yield said(most, f"{solver} nowhere worse than {rival} by more than a standard error ({where})")


def test_bars(searches: Searches) -> Iterator[str]:
    """Hold accuracies on test images against those of other policies."""
    for solver in HELD:
        if solver not in searches.solvers or not searches.complete:
            continue
        rows = [row for place in searches.complete for row in searches.longest(*place, solver)]
        pairs = [(row.tested, row.tested_best) for row in rows if row.tested is not None and row.tested_best is not None]
        gains = [tested - best for tested, best in pairs]
        figures = f"{statistics.mean(gains):+.3f} ± {error_of(gains):.3f} points over {len(gains)} searches"
        claim = f"the policy that {solver} returns is better on test images than its best on the search images ({figures})"
        yield said(-statistics.mean(gains), claim, digits=3)
        if "ilp" not in searches.solvers:
            continue
        worst = (-math.inf, "")
        for place in searches.complete:
            own, other = (_tested(searches.longest(*place, name)) for name in (solver, "ilp"))
            problem = searches.problems[place]
            # ilp draws nothing: how its policy differs from another on other images is as uncertain as on these.
            error = max(error_of(own), 100 * problem_error(problem))
            short = statistics.mean(other) - error - statistics.mean(own)
            worst = max(worst, (short, f"{' '.join(place)}: {statistics.mean(own):.2f} against {statistics.mean(other):.2f}"))
        claim = f"on no problem {solver} is below ilp on test images by more than a standard error (nearest: {worst[1]})"
        yield said(worst[0], claim)


def problem_error(problem: TabularProblem) -> float:
    """Guess the standard error of the difference of two policies on the test images: they differ on one image in fifty."""
    return math.sqrt(0.02 / problem.file.test_images)


def _tested(rows: Sequence[Row]) -> list[float]:
    return [row.tested for row in rows if row.tested is not None]


def time_bars(solvers: Sequence[str]) -> Iterator[str]:
    """Measure what solvers take, and hold it against what they may."""
    for solver in HELD:
        if solver not in solvers:
            continue
        for decisions, trials, most in TIMES[solver]:
            took = milliseconds(solver, decisions, trials)
            size = f"{decisions} decisions and {trials} trials"
            yield said(took - most, f"{solver} takes {took:.1f} ms an evaluation with {size}, at most {most:.0f}", digits=1)


def actor_lines(searches: Searches) -> Iterator[str]:
    """Say where the best policies came from."""
    for solver in HELD:
        rows = [row for place in searches.complete for row in searches.longest(*place, solver) if row.origin]
        if not rows:
            continue
        counts = {origin: sum(row.origin == origin for row in rows) for origin in sorted({row.origin for row in rows})}
        words = ", ".join(f"{origin} {100 * count / len(rows):.0f} %" for origin, count in counts.items())
        yield f"{solver}'s best policies of {len(rows)} searches of {searches.counts[-1]} were proposed by: {words}"


# What is printed and written


def made_table(searches: Searches) -> Table:
    """Make the table of regrets."""
    after = [f"after {count}" for count in searches.counts]
    columns = ("problem", "solver", *after, "ms each", "test: returned", "best of search")
    rows: list[tuple[str, ...]] = []
    for place in searches.complete:
        for solver in searches.solvers:
            cells = []
            for count in searches.counts:
                found = searches.regrets(*place, solver, count)
                cells.append(f"{statistics.mean(found):.2f} ± {error_of(found):.2f}")
            rows.append((" ".join(place), solver, *cells, *_ends(searches.longest(*place, solver))))
    for solver in searches.solvers:
        if not searches.complete:
            break
        cells = []
        for count in searches.counts:
            groups = [searches.regrets(*place, solver, count) for place in searches.complete]
            mean = statistics.mean(statistics.mean(group) for group in groups)
            error = math.sqrt(sum(error_of(group) ** 2 for group in groups)) / len(groups)
            cells.append(f"{mean:.3f} ± {error:.3f}")
        longest = [row for place in searches.complete for row in searches.longest(*place, solver)]
        rows.append(("mean", solver, *cells, *_ends(longest)))
    return Table("Regret, points: mean and standard error over seeds", columns, rows)


def _ends(rows: Sequence[Row]) -> list[str]:
    """Return the cells of time and of accuracies on test images."""
    best = [row.tested_best for row in rows if row.tested_best is not None]
    accuracies = []
    for values in (_tested(rows), best):
        cell = "–"
        if values:
            cell = f"{statistics.mean(values):.2f}"
        accuracies.append(cell)
    return [f"{statistics.median(row.milliseconds for row in rows):.1f}", *accuracies]


def draw(searches: Searches, path: Path) -> None:
    """Draw mean regret against evaluations, a panel per problem."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = searches.complete
    columns = min(4, len(places))
    lines = -(-len(places) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    for panel, (table, budget) in zip(panels, places, strict=False):
        for color, solver in enumerate(searches.solvers):
            means = [statistics.mean(searches.regrets(table, budget, solver, count)) for count in searches.counts]
            shown = np.maximum(means, 0.01)
            panel.plot(searches.counts, shown, color=f"C{color % 10}", marker=".", label=solver, linewidth=1.2)
        panel.set(title=f"{table} {budget}", xscale="log", yscale="log", ylim=(0.009, None))
        panel.set_xticks(searches.counts, [str(count) for count in searches.counts])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlabel="evaluations", ylabel="regret, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


COLUMNS = Row._fields


def line_of(row: Row) -> list[str]:
    """Return a row as it stands in the file."""
    regrets = " ".join(f"{count}:{value:.4f}" for count, value in row.regrets.items())
    began = " ".join(f"{count}:{digest}" for count, digest in row.began.items())
    numbers = [shared.number(value, 4, "") for value in (row.milliseconds, row.tested, row.tested_best)]
    return [row.table, row.budget, row.solver, str(row.evaluations), str(row.seed), regrets, began, *numbers, row.origin]


def load_rows(path: Path) -> list[Row]:
    """Read what is there; a last line that is cut short doesn't count."""
    if not path.is_file():
        return []
    made = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if None in line.values():
                continue
            pairs = {name: dict(part.split(":") for part in line[name].split()) for name in ("regrets", "began")}
            tested, tested_best = (float(line[name]) if line[name] else None for name in ("tested", "tested_best"))
            made.append(
                Row(
                    line["table"],
                    line["budget"],
                    line["solver"],
                    int(line["evaluations"]),
                    int(line["seed"]),
                    {int(count): float(value) for count, value in pairs["regrets"].items()},
                    {int(count): digest for count, digest in pairs["began"].items()},
                    float(line["milliseconds"]),
                    tested,
                    tested_best,
                    line["origin"],
                )
            )
    return made


def save(folder: Path, command: str, searches: Searches, made: Sequence[str]) -> None:
    """Write the page and the picture."""
    parts = [
        "# How far from the best policy searches stay, beside other packages",
        f"Made by `experiments/search_bars.py`, which says what is compared and how; every search is in `{NAME}.csv`.",
        f"    {command}",
        "\n".join(f"* {line}" for line in made),
    ]
    if searches.complete:
        draw(searches, folder / f"{NAME}.png")
        parts += [f"![regret against evaluations]({NAME}.png)", made_table(searches).markdown()]
    files.write(folder / f"{NAME}.md", "\n\n".join(parts) + "\n")


def installed(console: Console, asked: Sequence[str]) -> list[str]:
    """Leave out rivals whose package isn't there, and say so."""
    found = []
    for name in asked:
        if name in OUTSIDE:
            try:
                imported(OUTSIDE[name][1])
            except ImportError as error:
                say(console, f"without {name}: {error}")
                continue
        found.append(name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.search_bars", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*OWN, *OUTSIDE]
    parser.add_argument("--tables", nargs="+", default=[], metavar="NAME|PATH", help="(default: all)")
    parser.add_argument("--solvers", nargs="+", choices=every, default=every, metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2, help="searches at a time; only the times depend on it")
    parser.add_argument("--anew", action="store_true", help="forget the searches that are there")
    parser.add_argument("--no-times", action="store_true", help="leave out the two made-up networks")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one table, seed and count; saves nothing")
    parser.add_argument("--out", type=Path, help=f"folder for page, picture and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    torch.set_num_threads(1)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    found = tables(options.tables)
    seeds, counts = options.seeds, list(COUNTS)
    if options.quick:
        found, seeds, counts = found[:1], 1, counts[:1]
    searches = Searches(found, installed(console, options.solvers), seeds, counts)
    path = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{NAME}.csv"
        if options.anew:
            path.unlink(missing_ok=True)
        searches.rows = {row.key: row for row in load_rows(path)}
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *map(line_of, searches.rows.values())])

    def keep(row: Row) -> None:
        if path is not None:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(line_of(row))

    run(searches, options.processes, keep, console)
    made = [*regret_bars(searches), *rival_bars(searches), *test_bars(searches), *actor_lines(searches)]
    if not (options.quick or options.no_times):
        made += time_bars(searches.solvers)
    console.print(made_table(searches).rich())
    for line in made:
        console.print(line, markup=False, highlight=False)
    if out is not None:
        command = " ".join(["python -m experiments.search_bars", *sys.argv[1:]])
        save(out, command, searches, made)
        say(console, f"written: {out / NAME}.md, .csv and .png")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
