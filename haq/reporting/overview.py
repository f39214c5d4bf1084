"""What a report says of several runs: all of them in one table, and those of one problem in one chart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from haq.reporting import comparisons
from haq.reporting.drawing import Picture, amount
from haq.reporting.reading import RunFolder, SweepFolder
from haq.reporting.sections import Part, Section, Table
from haq.store.records import AskedRecord, FinishedSweepRecord, objective_title
from haq.store.units import NOTHING, metric_words

HEAD = (
    "folder",
    "state",
    "network",
    "objective",
    "target",
    "metric",
    "solver",
    "used of budget",
    "float",
    "found",
    "fine-tuned",
)
USUAL = "accuracy"  # an objective that needn't be named
NOTE = (
    "Float, found and fine-tuned: measured on the test split; of a run that isn't finished, on the search split, by which "
    "policies are chosen. What is estimated and what is measured of the costs is told in each section."
)


def overview(sources: Sequence[RunFolder | SweepFolder], told: Sequence[Part]) -> Section:
    """Show all runs and sweeps in one table, and searches of the same problem in one chart."""
    rows = [line(source, part.folder) for source, part in zip(sources, told, strict=True)]
    runs = [(part.folder, source) for source, part in zip(sources, told, strict=True) if isinstance(source, RunFolder)]
    links = {part.folder: part.anchor for part in told}
    return Section("Overview", pictures=joint(runs), tables=[listed("Runs and sweeps", rows, links)])


def listed(caption: str, rows: list[list[str]], links: Mapping[str, str]) -> Table:
    """Make a table of runs.

    Args:
        caption: What stands above it.
        rows: A `line` for each of them.
        links: Where on the page a name leads to.

    Returns:
        The table; it names objectives if one of them isn't accuracy.
    """
    place = HEAD.index("objective")
    if any(row[place] != USUAL for row in rows):
        return Table(caption, HEAD, rows, NOTE, links)
    narrower = [row[:place] + row[place + 1 :] for row in rows]
    return Table(caption, HEAD[:place] + HEAD[place + 1 :], narrower, NOTE, links)


def line(source: RunFolder | SweepFolder, name: str) -> list[str]:
    """Make the row of a run or a sweep, of which the first cell is a name."""
    if isinstance(source, SweepFolder):
        return _line_of_sweep(source, name)
    if source.result is None:
        return _line_of_unfinished(source, name)
    result = source.result
    used = "; ".join(_used(budget.metric, budget.used, budget.limit) for budget in result.all_budgets)
    of_float, found = (result.show(result.value(row, "test")) for row in (result.of_float, result.found))
    tuned = NOTHING
    if result.finetuned is not None:
        tuned = result.show(result.value(result.finetuned, "test"))
    return [name, "finished", *_problem_of(source), used, of_float, found, tuned]


def _used(metric: str, used: float, limit: float | None) -> str:
    """Write what is used of a budget, or of a metric that none limits."""
    if limit is None:
        return amount(used, metric)
    return f"{amount(used, metric)} of {amount(limit, metric)}"


def joint(runs: Sequence[tuple[str, RunFolder]]) -> list[Picture]:
    """Draw searches of the same problem in one chart each; every run comes with its name."""
    groups = [list(group) for _, group in itertools.groupby(sorted(runs, key=_problem_key), key=_problem_key)]
    return [comparisons.together(group) for group in groups if len(group) > 1 and any(run.history for _, run in group)]


def _line_of_sweep(source: SweepFolder, name: str) -> list[str]:
    asked = source.record.asked
    state = "unfinished sweep"
    if source.finished:
        state = "finished sweep"
    objective = objective_title(str(asked.settings.get("objective", USUAL)))
    if isinstance(source.record, FinishedSweepRecord):
        objective = source.record.objective_title
    return [
        name,
        state,
        str(asked.settings.get("network", "")),
        objective,
        ", ".join(asked.hw),
        str(asked.settings.get("metric", "")),
        ", ".join(asked.solvers),
        _asked_words(asked),
        NOTHING,
        NOTHING,
        NOTHING,
    ]


def _asked_words(asked: AskedRecord) -> str:
    """Count the budgets of a sweep, and the drops that it allows."""
    words = []
    if asked.budgets or not asked.max_drops:
        words.append(f"{len(asked.budgets)} budgets")
    if asked.max_drops:
        words.append(f"{len(asked.max_drops)} drops")
    return ", ".join(words)


def _line_of_unfinished(source: RunFolder, name: str) -> list[str]:
    problem = source.problem
    found = NOTHING
    used = " of ".join([NOTHING, *_limits(problem.metric, problem.limit)])
    if source.best is not None:
        parts = [_used(problem.metric, source.best.cost, problem.limit)]
        further = zip(problem.further, source.best.others, strict=True)
        used = "; ".join([*parts, *(_used(limit.metric, cost, limit.amount) for limit, cost in further)])
        found = f"{problem.show(source.best.accuracy)} (search)"
    of_float = f"{problem.show(problem.float_value)} (search)"
    return [name, "unfinished", *_problem_of(source), used, of_float, found, NOTHING]


def _limits(metric: str, limit: float | None) -> list[str]:
    """Write a limit, if there is one."""
    if limit is None:
        return []
    return [amount(limit, metric)]


def _problem_of(run: RunFolder) -> list[str]:
    problem = run.problem
    metrics = [problem.metric, *(limit.metric for limit in problem.further)]
    return [problem.network, problem.objective_title, problem.target.name, ", ".join(map(metric_words, metrics)), run.solver]


def _problem_key(run: tuple[str, RunFolder]) -> tuple[str, ...]:
    problem = run[1].problem
    judged = problem.objective, problem.objective_unit, str(problem.higher_is_better)
    return problem.network, problem.data, problem.target.name, problem.metric, *judged
