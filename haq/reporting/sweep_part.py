"""What a report says of a sweep, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haq.reporting import comparisons
from haq.reporting.overview import joint, line, listed
from haq.reporting.reading import SweepFolder
from haq.reporting.sections import ESTIMATED, Fact, Part, Section, Table, configuration, resume_command
from haq.store.records import (
    AskedRecord,
    FinishedSweepRecord,
    FrontRecord,
    SpecialisationRecord,
    SweepRecord,
    SweepTarget,
    short_reference,
)
from haq.store.units import COUNTED, begin, describe_amount, metric_words
from hw_models.registry import join_words

# Settings that vary from search to search; and a sweep never fine-tunes.
VARIED = ("hw", "budget", "solver", "seed", "finetune_epochs")


def of_sweep(source: SweepFolder, name: str, anchor: str) -> Part:
    """Tell all there is to tell of a sweep.

    Args:
        source: The sweep.
        name: What its folder is called on the page.
        anchor: Where on the page it stands.

    Returns:
        Its part of the page.
    """
    if isinstance(source.record, FinishedSweepRecord):
        return _of_finished(source.record, name, anchor)
    return _of_begun(source, name, anchor)


def _of_finished(sweep: FinishedSweepRecord, name: str, anchor: str) -> Part:
    targets = sweep.targets.values()
    sections = [_front(sweep, target) for target in targets]
    if sweep.specialisation is not None:
        sections.append(Section("Specialisation", tables=[_specialised(sweep, sweep.specialisation)]))
    sections += [_provenance(sweep), _configuration(sweep)]
    searches = sum(len(row.runs) for row in sweep.found)
    return Part(
        anchor,
        f"Sweep of {sweep.network} on {', '.join(target.name for target in targets)}",
        name,
        True,
        [
            f"{searches} searches of {sweep.network} on {sweep.data}, for {sweep.metric}, by "
            f"{', '.join(sweep.asked.solvers)}. {begin(sweep.objective_title)} is of policies as they were found, without "
            "fine-tuning.",
            *(f"By {shared.words}." for shared in sweep.shared),
        ],
        _facts(sweep),
        sections,
    )


def _of_begun(source: SweepFolder, name: str, anchor: str) -> Part:
    sweep, runs = source.record, source.runs
    done = sum(run.finished for run in runs)
    sections = []
    if runs:
        named = [(run.folder.name, run) for run in runs]
        table = listed("Searches", [line(run, run.folder.name) for run in runs], {})
        sections.append(Section("Searches so far", pictures=joint(named), tables=[table]))
    sections.append(_configuration(sweep))
    return Part(
        anchor,
        f"Sweep of {sweep.asked.settings.get('network', '')} on {', '.join(sweep.asked.hw)}",
        name,
        False,
        [f"This sweep is not finished: {len(runs)} searches are begun, {done} of them finished."],
        [],
        sections,
        resume_command("haq.sweep", source.folder),
    )


def _facts(sweep: FinishedSweepRecord) -> list[Fact]:
    """Tell what the float network has, and the best policy on each target."""
    of_float = sweep.show(sweep.value(sweep.of_float, "test"))
    facts = [Fact("Float", of_float, f"test {sweep.objective_title}, measured")]
    for target in sweep.targets.values():
        if not target.found:
            continue
        best = min(target.found, key=lambda row: (-sweep.score(sweep.value(row, "test")), row.fraction))
        cost = f"{best.fraction:.3f} of {target.reference_short} ({target.kind})"
        what = f"test {sweep.objective_title}, measured, by {best.solver} at {cost}"
        facts.append(Fact(f"Best on {target.name}", sweep.show(sweep.value(best, "test")), what))
    return facts


def _front(sweep: FinishedSweepRecord, target: SweepTarget) -> Section:
    """Show what was found on one target."""
    missed, pictures = [], []
    if target.left_out:
        missed.append(f"Budgets {target.left_out}.")
    if target.missed:
        missed.append(f"Nothing good enough was found for {'; '.join(target.missed)}.")
    if target.found:
        pictures.append(comparisons.sweep(sweep, target))
    tables = [_of_front(sweep, target, front) for front in target.fronts]
    return Section(f"Pareto front on {target.name}", sentences=missed, pictures=pictures, tables=tables)


def _of_front(sweep: FinishedSweepRecord, target: SweepTarget, front: FrontRecord) -> Table:
    """Make a table of the policies that no other one is as good as in every respect and better in one."""
    names = [metric_words(metric) for metric in front.metrics]
    head = ["policy", f"test {sweep.objective_title} (measured)", *names]
    rows = []
    for member in front.policies:
        costs = [describe_amount(cost, metric) for cost, metric in zip(member.costs, front.metrics, strict=True)]
        rows.append([member.called, sweep.show(member.value), *costs])
    value, *reference = front.reference
    amounts = " and ".join(describe_amount(cost, metric) for cost, metric in zip(reference, front.metrics, strict=True))
    note = (
        f"{len(front.policies)} of {front.of} policies. Hypervolume {front.hypervolume:.4f}, of the reference point "
        f"{sweep.show(value)} and {amounts} ({target.reference_short}); costs count as fractions of these."
    )
    return Table(f"Not to be bettered in test {sweep.objective_title}, {join_words(names)}", head, rows, note)


def _specialised(sweep: FinishedSweepRecord, special: SpecialisationRecord) -> Table:
    """Make HAQ's table of policies found for one target and run on another."""
    names = list(special.policies)
    head = ["found for", "by", f"test {sweep.objective_title} (measured)"]
    for name in names:
        kind = ""
        if name in sweep.targets:
            kind = f" ({sweep.targets[name].kind})"
        head.append(f"{metric_words(sweep.metric)} on {name}{kind}")
    rows = []
    for name, policy in special.policies.items():
        fractions = {other: policy.fraction_words(other) for other in names if other in policy.fractions}
        if name in fractions:
            fractions[name] += " *"
        rows.append([name, policy.solver, sweep.show(sweep.value(policy, "test")), *fractions.values()])
    note = (
        f"{begin(metric_words(sweep.metric))} as a fraction of {_references(sweep)} on that target; budget {special.budget}. "
        "*: the target's own policy, the best on the search split of those found for it."
    )
    return Table("What a policy found for one target costs on another", head, rows, note)


def _references(sweep: FinishedSweepRecord) -> str:
    """Name what costs are fractions of, on all targets."""
    names = {target.reference_short for target in sweep.targets.values()}
    if len(names) == 1:
        return names.pop()
    return "the reference"


def _provenance(sweep: FinishedSweepRecord) -> Section:
    sizes = " and ".join(f"{count:,} {split}" for split, count in sweep.images.items())
    what = ""
    if sweep.objective_is != sweep.objective_title:
        what = f" ({sweep.objective_is})"
    sentences = [f"{begin(sweep.objective_title)}{what} is {sweep.accuracy_is}, on {sizes} {sweep.samples_are}."]
    for target in sweep.targets.values():
        told = f"{target.kind}, as on every target"
        if target.kind != COUNTED:
            told = target.cost_is
        sentences.append(f"On {target.name}, {metric_words(sweep.metric)} is {told}.")
        if short_reference(target.reference) != target.reference:
            sentences.append(f"The reference on {target.name}: {target.reference}.")
    if any(target.kind == "estimated" for target in sweep.targets.values()):
        sentences.append(ESTIMATED)
    return Section("What is estimated, what is measured", sentences=sentences)


def _configuration(sweep: SweepRecord) -> Section:
    asked = sweep.asked
    rows = [
        ["targets", ", ".join(asked.hw)],
        ["budgets", ", ".join(asked.budgets) or "none"],
        *_drops(asked),
        ["solvers", ", ".join(asked.solvers)],
        ["seeds", str(asked.seeds)],
    ]
    return configuration(rows, _shared(asked.settings), sweep.versions, sweep.command)


def _drops(asked: AskedRecord) -> list[list[str]]:
    if not asked.max_drops:
        return []
    return [["largest drops", ", ".join(asked.max_drops)]]


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in VARIED}
