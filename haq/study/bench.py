"""How far from the best policy solvers stay on problems of which every policy is known.

The regret after n evaluations is the accuracy of the best policy within the budget minus that of the best that was evaluated
by then, both on the search images: it is the search that is measured. Beside it is told how the policy that is returned does
on the test images.

A solver may spend 400 evaluations otherwise than 50, so that every count is a search of its own. Where the shorter searches
of the first seed are beginnings of the longest, one search tells all counts of the other seeds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch

from haq.console.tables import Column
from haq.problem.evaluator import one_thread
from haq.problem.table_file import TableFile, read
from haq.problem.tabular import TabularProblem
from haq.solvers import SOLVERS
from haq.solvers.base import NothingFound, Session, find_solver, solve
from haq.store.units import NOTHING, counted
from haq.study.workers.processes import Crew

SCHEMA = "haq-bench-1"
POINTS = 100  # of a share


class Place(NamedTuple):
    """A table and one of its budgets."""

    table: str
    budget: str

    @property
    def words(self) -> str:
        """Name it."""
        return f"{self.table} {self.budget}"


class Asked(NamedTuple):
    """One search."""

    place: Place
    solver: str
    evaluations: int
    seed: int


class Searched(NamedTuple):
    """What came of one search."""

    asked: Asked
    policies: list[Any]  # the pairs of bits of every trial, in order
    regrets: list[float]  # after each of them, in points; what is left of nothing is the whole accuracy
    seconds: float  # of the processor
    tested: float | None  # accuracy on the test images of the policy that was returned
    tested_best: float | None  # and of the one that is best on the search images

    def after(self, count: int) -> float:
        """Return the regret after so many evaluations; a solver may have ended before."""
        return self.regrets[min(count, len(self.regrets)) - 1]


class Bench:
    """Searches that are to be done, and what came of them.

    Attributes:
        places: The problems.
        solvers: Their names.
        seeds: How many seeds; one for a solver that draws nothing.
        counts: The numbers of evaluations, ascending.
        found: What came of every search so far.
    """

    def __init__(self, files: Sequence[TableFile], solvers: Sequence[str], seeds: int, counts: Sequence[int]) -> None:
        """Take what is asked for.

        Args:
            files: The tables; every one of their budgets is a problem.
            solvers: Names of solvers, or `module:Name`.
            seeds: How many.
            counts: After how many evaluations the regret is told.
        """
        self.problems = {}
        for file in files:
            for budget in file.limits:
                self.problems[Place(file.name, budget)] = TabularProblem(file, budget)
        self.places = list(self.problems)
        self.solvers = list(solvers)
        self.seeds = seeds
        self.counts = sorted(counts)
        self.draws = {name: bool(getattr(find_solver(name), "draws", True)) for name in solvers}
        self.found: dict[Asked, Searched] = {}

    def seeds_of(self, solver: str) -> range:
        """Return the seeds of a solver."""
        if self.draws[solver]:
            return range(self.seeds)
        return range(1)

    def first_searches(self) -> list[Asked]:
        """List the searches of the first seed, one for every count, the longest first."""
        return [
            Asked(place, solver, count, 0)
            for place in self.places
            for solver in self.solvers
            for count in reversed(self.counts)
        ]

    def other_searches(self) -> list[Asked]:
        """List the searches of the other seeds, now that the first seed's are there."""
        asked = []
        for place in self.places:
            for solver in self.solvers:
                counts = self.counts
                if self.is_one_search(place, solver):
                    counts = self.counts[-1:]
                asked += [
                    Asked(place, solver, count, seed) for seed in self.seeds_of(solver)[1:] for count in reversed(counts)
                ]
        return asked

    def is_one_search(self, place: Place, solver: str) -> bool:
        """Say whether one search tells all counts: whether each of the first seed's is the beginning of the next longer one.

        Args:
            place: The problem.
            solver: The solver's name.

        Returns:
            Whether it does, as far as the first seed tells.
        """
        longest = self.found[Asked(place, solver, self.counts[-1], 0)].policies
        for count in self.counts:
            policies = self.found[Asked(place, solver, count, 0)].policies
            if policies != longest[:count]:
                return False
        return True

    def most_evaluations(self) -> int:
        """Count the evaluations that are asked for at most, for a progress bar."""
        first = sum(one.evaluations for one in self.first_searches())
        others = 0
        for solver in self.solvers:
            others += sum(self.counts) * (len(self.seeds_of(solver)) - 1) * len(self.places)
        return first + others

    def run(self, workers: int | None, on_search: Callable[[Searched], None]) -> None:
        """Do all searches.

        Args:
            workers: Processes that search; None is this one.
            on_search: Told each search that is done.

        Raises:
            ValueError: As `haq.solvers.base.solve` does for a solver that fails.
        """
        with ExitStack() as held:
            crew = None
            if workers is None:
                held.enter_context(one_thread())
            else:
                classes = {name: SOLVERS.get(name) for name in self.solvers}
                crew = Crew(_searching, (self.problems, classes), workers)
                held.callback(crew.close)
            for stage in (self.first_searches, self.other_searches):
                for searched in self._done(stage(), crew):
                    self.found[searched.asked] = searched
                    on_search(searched)

    def _done(self, asked: list[Asked], crew: Crew | None) -> Iterator[Searched]:
        """Do searches here, in their order, or let a crew do them, in any."""
        if crew is None:
            for one in asked:
                yield search(self.problems[one.place], one, one.solver)
            return
        pending = {crew.submit(one) for one in asked}
        while pending:
            done = crew.wait(pending)
            pending -= done
            for future in done:
                yield future.result()

    def rows(self) -> list[Row]:
        """Sum up every problem and solver whose searches are done."""
        rows = []
        for place in self.places:
            for solver in self.solvers:
                with suppress(KeyError):
                    rows.append(self._row(place, solver))
        return rows

    def _row(self, place: Place, solver: str) -> Row:
        """Sum up one solver on one problem. Raises KeyError if a search is missing."""
        problem, last = self.problems[place], self.counts[-1]
        one_search = self.is_one_search(place, solver)
        seeds = self.seeds_of(solver)
        by_seed = {}
        for count in self.counts:
            length = count
            if one_search:
                length = last
            by_seed[count] = [self.found[Asked(place, solver, length, seed)].after(count) for seed in seeds]
        longest = [self.found[Asked(place, solver, last, seed)] for seed in seeds]
        nothing = sum(one.tested is None for one in longest)
        return Row(
            place=place,
            solver=solver,
            seeds=len(seeds),
            one_search=one_search,
            best=problem.best_value,
            image=POINTS / problem.file.search_images,
            regrets={count: statistics.mean(values) for count, values in by_seed.items()},
            errors={count: _error_of(values) for count, values in by_seed.items()},
            by_seed=by_seed,
            nothing=nothing,
            milliseconds=1000 * statistics.median(one.seconds / len(one.regrets) for one in longest),
            tested=_mean([one.tested for one in longest]),
            tested_best=_mean([one.tested_best for one in longest]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain data."""
        return {
            "schema": SCHEMA,
            "evaluations": self.counts,
            "seeds": self.seeds,
            "results": [row.to_dict() for row in self.rows()],
            "means": [row.to_dict() for row in means(self.rows())],
        }


class Row(NamedTuple):
    """A solver on one problem, or the mean over problems."""

    place: Place | None
    solver: str
    seeds: int
    one_search: bool
    best: float | None  # the best accuracy within the budget
    image: float | None  # points that one search image is worth
    regrets: dict[int, float]  # mean over seeds by count of evaluations, in points
    errors: dict[int, float | None]  # their standard errors; None of a single seed
    by_seed: dict[int, list[float]]  # the same of every seed; of a mean over problems nothing
    nothing: int  # searches that found no policy within the budget
    milliseconds: float  # of the processor per evaluation, the median over the longest searches
    tested: float | None  # mean accuracy on test images of the policies that the longest searches returned
    tested_best: float | None  # and of those that are best on the search images

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        made = self._asdict()
        place = made.pop("place")
        if place is not None:
            made = {"table": place.table, "budget": place.budget, **made}
        return made


def means(rows: Sequence[Row]) -> list[Row]:
    """Take the mean over problems for every solver.

    Args:
        rows: Of all problems.

    Returns:
        A row for each solver; the standard errors are those of the mean, over seeds alone.
    """
    made = []
    for solver in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == solver]
        counts = own[0].regrets
        errors: dict[int, float | None] = {}
        for count in counts:
            found = [row.errors[count] for row in own]
            known = [error for error in found if error is not None]
            errors[count] = None
            if len(known) == len(found):
                errors[count] = math.sqrt(sum(error**2 for error in known)) / len(known)
        made.append(
            Row(
                place=None,
                solver=solver,
                seeds=own[0].seeds,
                one_search=all(row.one_search for row in own),
                best=None,
                image=None,
                regrets={count: statistics.mean(row.regrets[count] for row in own) for count in counts},
                errors=errors,
                by_seed={},
                nothing=sum(row.nothing for row in own),
                milliseconds=statistics.median(row.milliseconds for row in own),
                tested=_mean([row.tested for row in own]),
                tested_best=_mean([row.tested_best for row in own]),
            )
        )
    return made


def search(problem: TabularProblem, asked: Asked, solver: Any) -> Searched:
    """Do one search.

    Args:
        problem: The problem.
        asked: What is asked for.
        solver: The solver, or its name.

    Returns:
        What came of it.
    """
    session = Session(problem, asked.evaluations)
    returned = None
    begin = time.process_time()
    # A regret is counted all the same.
    with suppress(NothingFound):
        returned = solve(solver, session, asked.seed)
    seconds = time.process_time() - begin
    best, regret = problem.best_value, POINTS * problem.best_value
    regrets = []
    for trial in session.trials:
        if trial.feasible and math.isfinite(trial.loss):
            regret = min(regret, POINTS * (best - trial.value))
        regrets.append(max(regret, 0.0))
    policies = [problem.evaluator.pairs_of(trial.policy) for trial in session.trials]  # type: ignore[attr-defined]
    tested = tested_best = None
    if returned is not None and session.best is not None:
        tested = problem.test(returned.policy).value
        tested_best = problem.test(session.best.policy).value
    return Searched(asked, policies, regrets or [regret], seconds, tested, tested_best)


def load(tables: Sequence[str]) -> list[TableFile]:
    """Read tables. Raises ValueError for a file that is none.

    Args:
        tables: Names of those that ship with the package, or paths.

    Returns:
        What they hold; where two have the same name, the second is called by its path.
    """
    files: list[TableFile] = []
    for table in tables:
        file = read(table)
        if file.name in [one.name for one in files]:
            file = dataclasses.replace(file, name=table)
        files.append(file)
    return files


def columns(bench: Bench) -> list[Column]:
    """Make the columns of the table of results; the last rows are means."""
    rows = bench.rows()
    several = len(bench.places) > 1
    totals = []
    if several:
        totals = means(rows)
    shown = [*rows, *totals]
    names, bests = [], []
    for row in shown:
        name, best = "mean", ""
        if row.place is not None:
            name, best = row.place.words, _percent(row.best)
        names.append(name)
        bests.append(best)
    made = [Column("problem", names), Column("solver", [row.solver for row in shown]), Column("best, %", bests, "right")]
    for count in bench.counts:
        cells = [_with_error(row.regrets[count], row.errors[count]) for row in shown]
        made.append(Column(f"after {count}", cells, "right"))
    made.append(Column("ms each", [f"{row.milliseconds:.2g}" for row in shown], "right"))
    made.append(Column("test:\nreturned", [_percent(row.tested) for row in shown], "right"))
    made.append(Column("best of\nsearch", [_percent(row.tested_best) for row in shown], "right"))
    return made


def caption(bench: Bench) -> list[str]:
    """Say what the table of results shows."""
    rows = bench.rows()
    images = [row.image for row in rows if row.image is not None]
    over_seeds = "."
    if any(error is not None for row in rows for error in row.errors.values()):
        over_seeds = "; mean and standard error over seeds."
    lines = [
        "Regret in points after so many evaluations: the best accuracy within the budget minus that of the best policy "
        f"evaluated, on the search images{over_seeds}"
    ]
    if images:
        one = f"{min(images):.2g}"
        if max(images) > min(images):
            one += f" to {max(images):.2g}"
        lines.append(f"One search image is {one} points.")
    last = bench.counts[-1]
    lines.append(
        f"Test accuracies, in %, are of searches of {counted(last, 'evaluations')}; milliseconds are the processor's."
    )
    for solver in bench.solvers:
        own = [row for row in rows if row.solver == solver]
        if not own:
            continue
        seeds = counted(own[0].seeds, "seeds")
        if own[0].seeds == 1:
            seeds = "one seed"
        if not bench.draws[solver]:
            seeds = "one search, as it draws nothing"
        how = f"one search of {last} tells all counts (the shorter ones of the first seed are its beginnings)"
        if len(bench.counts) == 1:
            how = f"searches of {last}"
        elif not all(row.one_search for row in own):
            how = "a search for every count, as it spends other allowances otherwise"
        sentence = f"{solver}: {seeds}; {how}."
        nothing = sum(row.nothing for row in own)
        if nothing:
            sentence += f" In {nothing} of its longest searches it found nothing within the budget."
        lines.append(sentence)
    return lines


def _searching(tell: Any, problems: dict[Place, TabularProblem], classes: dict[str, Any]) -> Callable[[Asked], Searched]:
    """Begin a worker that searches."""
    torch.set_num_threads(1)
    return lambda asked: search(problems[asked.place], asked, classes[asked.solver])


def _error_of(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.mean(known)


def _with_error(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.2f}"
    return f"{value:.2f} ± {error:.2f}"


def _percent(share: float | None) -> str:
    if share is None:
        return NOTHING
    return f"{POINTS * share:.2f}"
