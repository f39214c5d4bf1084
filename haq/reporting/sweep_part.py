"""What a report says of a sweep, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haq.reporting import comparisons
from haq.reporting.overview import joint, line, listed
from haq.reporting.reading import SweepFolder
from haq.reporting.sections import ESTIMATED, Fact, Part, Section, Table, configuration
from haq.store.records import FinishedSweepRecord, SpecialisationRecord, SweepRecord
from haq.store.units import percent


def of_sweep(source: SweepFolder, name: str, anchor: str) -> Part:
    if isinstance(source.record, FinishedSweepRecord):
        return _done(source.record, name, anchor)
    return _begun(source, name, anchor)


def _done(content: FinishedSweepRecord, name: str, anchor: str) -> Part:
    objective, judge = content.objective_title, content.objective
    asked = content.asked
    sizes = " and ".join(f"{count:,} {split}" for split, count in content.images.items())
    facts = [Fact("Float", percent(content.of_float.share("test", judge)), f"test {objective}, measured")]
    for target in content.targets.values():
        if target.found:
            best = min(target.found, key=lambda row: (-row.share("test", judge), row.fraction))
            what = f"test {objective}, measured, by {best.solver} at {best.fraction:.3f} of uniform 8 bits ({target.kind})"
            facts.append(Fact(f"Best on {target.name}", percent(best.share("test", judge)), what))
    sections = []
    for target in content.targets.values():
        missed = [f"Budgets {target.left_out}."] if target.left_out else []
        pictures = [comparisons.sweep(content, target)] if target.found else []
        sections.append(Section(f"Pareto front on {target.name}", sentences=missed, pictures=pictures))
    if content.specialisation is not None:
        sections.append(Section("Specialisation", tables=[_specialised(content, content.specialisation)]))
    kinds = [f"On {target.name}, {content.metric} is {target.cost_is}." for target in content.targets.values()]
    what = "" if content.objective_is == objective else f" ({content.objective_is})"
    measured = f"{objective.capitalize()}{what} is {content.accuracy_is}, on {sizes} images."
    estimated = [ESTIMATED] if any(target.kind == "estimated" for target in content.targets.values()) else []
    sections.append(Section("What is estimated, what is measured", sentences=[measured, *kinds, *estimated]))
    sections.append(configuration(_asked_of(content), _shared(asked.settings), content.versions, content.command))
    return Part(
        anchor,
        f"Sweep of {content.network} on {', '.join(target.name for target in content.targets.values())}",
        name,
        True,
        [
            f"{sum(len(row.runs) for row in content.found)} searches of {content.network} on {content.data}, for "
            f"{content.metric}, by {', '.join(asked.solvers)}. Accuracies are of policies as they were found, without "
            "fine-tuning."
        ],
        facts,
        sections,
    )


def _specialised(content: FinishedSweepRecord, special: SpecialisationRecord) -> Table:
    objective, names = content.objective_title, list(special.policies)
    head = ["found for", "by", f"test {objective} (measured)"]
    head += [f"{content.metric} on {name}{_kind(content, name)}" for name in names]
    rows = []
    for name, row in special.policies.items():
        shares = [f"{row.fractions[other]:.3f}{' *' if other == name else ''}" for other in names if other in row.fractions]
        rows.append([name, row.solver, percent(row.share("test", content.objective)), *shares])
    note = (
        f"{content.metric.capitalize()} as a fraction of uniform 8 bits on that target; budget {special.budget}. *: the "
        "target's own policy, the best on the search split of those found for it."
    )
    return Table("What a policy found for one target costs on another", head, rows, note)


def _kind(content: FinishedSweepRecord, name: str) -> str:
    return f" ({content.targets[name].kind})" if name in content.targets else ""


def _asked_of(content: SweepRecord) -> list[list[str]]:
    asked = content.asked
    return [
        ["targets", ", ".join(asked.hw)],
        ["budgets", ", ".join(asked.budgets)],
        ["solvers", ", ".join(asked.solvers)],
        ["seeds", str(asked.seeds)],
    ]


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that don't vary from search to search; a sweep never fine-tunes."""
    return {key: value for key, value in settings.items() if key not in ("hw", "budget", "solver", "seed", "finetune_epochs")}


def _begun(source: SweepFolder, name: str, anchor: str) -> Part:
    content, runs = source.record, source.runs
    done = sum(run.finished for run in runs)
    rows = [line(run, run.folder.name) for run in runs]
    named = [(run.folder.name, run) for run in runs]
    sections = [Section("Searches so far", pictures=joint(named), tables=[listed("Searches", rows, {})])] if runs else []
    sections.append(configuration(_asked_of(content), _shared(content.asked.settings), content.versions, content.command))
    return Part(
        anchor,
        f"Sweep of {content.asked.settings.get('network', '')} on {', '.join(content.asked.hw)}",
        name,
        False,
        [f"This sweep is not finished: {len(runs)} searches are begun, {done} of them finished."],
        [],
        sections,
        f"python -m haq.sweep --resume {source.folder}",
    )
