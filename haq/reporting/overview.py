"""What a report says of several runs: all of them in one table, and those of one problem in one chart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from haq.reporting import comparisons
from haq.reporting.drawing import Picture, amount
from haq.reporting.reading import RunFolder, SweepFolder
from haq.reporting.sections import Part, Section, Table
from haq.store.units import NOTHING, percent


def overview(sources: Sequence[RunFolder | SweepFolder], told: Sequence[Part]) -> Section:
    """All of them in one table, and searches of the same problem in one chart."""
    rows = [line(source, part.folder) for source, part in zip(sources, told, strict=True)]
    runs = [(part.folder, source) for source, part in zip(sources, told, strict=True) if isinstance(source, RunFolder)]
    links = {part.folder: part.anchor for part in told}
    return Section("Overview", pictures=joint(runs), tables=[listed("Runs and sweeps", rows, links)])


def listed(caption: str, rows: list[list[str]], links: Mapping[str, str]) -> Table:
    head = ["folder", "state", "network", "target", "metric", "solver", "used of budget", "float", "found", "fine-tuned"]
    note = (
        "Float, found and fine-tuned: measured on the test split; of a run that isn't finished, on the search split, by which "
        "policies are chosen. What is estimated and what is measured of the costs is told in each section."
    )
    return Table(caption, head, rows, note, links)


def line(source: RunFolder | SweepFolder, name: str) -> list[str]:
    if isinstance(source, SweepFolder):
        record = source.record
        state = "finished sweep" if record.finished else "unfinished sweep"
        asked, settings = record.asked, record.asked.settings
        told = [str(settings.get("network", "")), ", ".join(asked.hw), str(settings.get("metric", ""))]
        return [name, state, *told, ", ".join(asked.solvers), f"{len(asked.budgets)} budgets", "–", "–", "–"]
    problem, result = source.problem, source.result
    told = [problem.network, problem.target.name, problem.metric, source.solver]
    limit = amount(problem.limit, problem.metric)
    if result is None:
        used = f"{amount(source.best.cost, problem.metric)} of {limit}" if source.best else f"– of {limit}"
        found = f"{percent(source.best.accuracy)} (search)" if source.best else "–"
        return [name, "unfinished", *told, used, f"{percent(problem.float_share)} (search)", found, "–"]
    shares = [percent(row.share("test", result.objective)) for row in (result.of_float, result.found)]
    if result.finetuned is None:
        shares.append(NOTHING)
    else:
        shares.append(percent(result.finetuned.share("test", result.objective)))
    return [name, "finished", *told, f"{amount(result.budget.used, problem.metric)} of {limit}", *shares]


def joint(runs: Sequence[tuple[str, RunFolder]]) -> list[Picture]:
    def problem(run: tuple[str, RunFolder]) -> tuple[str, ...]:
        one = run[1].problem
        return one.network, one.data, one.target.name, one.metric, one.objective

    groups = [list(group) for _, group in itertools.groupby(sorted(runs, key=problem), key=problem)]
    return [comparisons.together(group) for group in groups if len(group) > 1 and any(run.history for _, run in group)]
