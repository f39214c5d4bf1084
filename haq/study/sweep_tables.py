"""What a user is shown of a sweep: what it will do, a table for each target, and what policies cost on other targets."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from haq.console.tables import Column, key_table, print_columns, say
from haq.problem.chance import FEW, value_with_error
from haq.store.records import (
    ROBUST,
    SPLITS,
    FinishedSweepRecord,
    FrontRecord,
    JudgedRecord,
    Measurement,
    SpecialisationRecord,
    SweepFound,
    SweepPolicy,
    SweepTarget,
    short_reference,
)
from haq.store.units import PERCENT, counted, describe_amount, metric_words, show, show_error
from haq.study.sweep_run import SweepContext, shares_sensitivities
from haq.study.sweep_sharing import evaluations_of, groups
from haq.study.tables import errors_words, pruning_words, residuals_words, rounding_words, scheme_words
from hw_models.registry import join_words


def print_plan(console: Console, context: SweepContext, folder: Path | None, workers: str) -> None:
    """Say what a sweep will do.

    Args:
        console: Where.
        context: What its searches stand on.
        folder: Where results go; None if nothing is written.
        workers: Who works, in words.
    """
    sweep, task = context.sweep, context.first
    workload = task.problem.workload
    draws = "one seed"
    if sweep.seeds > 1:
        draws = f"{counted(sweep.seeds, 'seeds')} of those that draw"
    sensitivities = "none"
    if shares_sensitivities(sweep):
        sensitivities = f"{sweep.settings.sensitivity_kind}, once for all"
    results_in = "nothing is written (--dry-run)"
    if folder is not None:
        results_in = str(folder)
    rows = {"network": f"{task.network.name}: {len(workload)} quantizable layers, {workload.macs / 1e6:.2f} M MACs"}
    if workload.unpriced:
        rows["not priced"] = workload.unpriced_words
    rows |= {
        "data": task.dataset.describe(),
        "scheme": scheme_words(task.problem),
        "weights": rounding_words(task.problem, task.config.correction),
        **residuals_words(task.problem),
        **pruning_words(task.problem),
        "metric": f"{metric_words(sweep.settings.metric)}, as a fraction of {_reference_of(context)}",
        **{f"on {hw}": _target_words(context, hw) for hw in context.tasks},
        "solvers": f"{', '.join(sweep.solvers)}; {counted(context.first.evaluations, 'evaluations')}, {draws}",
        "sensitivities": sensitivities,
        **_sharing_words(context),
        "searches": f"{len(context.cells())}, {workers}",
        "results in": results_in,
    }
    console.print(key_table(rows.items()))


def _sharing_words(context: SweepContext) -> dict[str, str]:
    """Say of each solver whose searches learn from each other's trials how many evaluations these share."""
    found = {}
    for group in groups(context.cells()):
        words = f"{len(group)} searches by {group[0].solver} share {counted(evaluations_of(group, context), 'evaluations')}"
        if context.sweep.seeds > 1:
            words += ", of each seed"
        found[group[0].solver] = words
    if not found:
        return {}
    return {"shared": "; ".join(found.values())}


def _target_words(context: SweepContext, hw: str) -> str:
    problem = context.tasks[hw].problem
    reached = [budget for budget in context.sweep.budgets if budget not in context.unreachable[hw]]
    words = f"{problem.target.description}; {problem.table.provenance}; budgets {', '.join(reached) or 'none'}"
    if context.sweep.max_drops:
        unit = problem.objective.unit
        if unit == PERCENT:
            unit = "points"
        drops = f"{', '.join(context.sweep.max_drops)} {unit} of {problem.objective.title}"
        words += f"; the cheapest that lose at most {drops}"
    left_out = context.left_out(hw)
    if left_out:
        words += f"; {left_out}"
    return words


def _uniform_words(bits: int | str) -> str:
    """Name a uniform policy: "uniform 8 bits", "uniform 4/8", "uniform float"."""
    if isinstance(bits, str):
        return f"uniform {bits}"
    return f"uniform {bits} bits"


def _reference_of(context: SweepContext) -> str:
    """Name what budgets are fractions of, on all targets."""
    words = {short_reference(task.problem.reference_words) for task in context.tasks.values()}
    if len(words) == 1:
        return words.pop()
    return "the reference of each target"


def _fraction_heading(target: SweepTarget) -> str:
    """Head the column of fractions: "of uniform 8 bits" in three lines."""
    words = target.reference_short.split(" ")
    if len(words) < 3:
        return "\n".join(["", "of the", words[-1]])
    return "\n".join(["of", words[0], " ".join(words[1:])])


def print_result(console: Console, sweep: FinishedSweepRecord) -> None:
    """Print a table for each target, what was out of reach, and what each policy costs on the other targets."""
    for target in sweep.targets.values():
        if target.found:
            _print_target(console, sweep, target)
        for front in target.fronts:
            _print_front(console, sweep, target, front)
        if target.left_out:
            say(console, f"{target.name}: budgets {target.left_out}.")
        if target.missed:
            say(console, f"{target.name}: nothing good enough was found for {'; '.join(target.missed)}.")
    for shared in sweep.shared:
        say(console, f"{shared.words}.")
    if sweep.specialisation is not None:
        _print_specialisation(console, sweep, sweep.specialisation)


def _print_target(console: Console, sweep: FinishedSweepRecord, target: SweepTarget) -> None:
    rows: list[SweepPolicy] = [*target.found, *target.uniform]
    budgets = [found.asked for found in target.found] + [""] * len(target.uniform)
    sections = [row for row in range(1, len(rows)) if budgets[row] != budgets[row - 1]]
    shown = [""] * len(rows)
    for row in (0, *sections):
        shown[row] = budgets[row]
    names = [found.solver for found in target.found] + [_uniform_words(row.bits) for row in target.uniform]
    columns = [
        Column(_asked_words(sweep), shown),
        Column("policy", names),
        Column(
            f"\n{metric_words(sweep.metric)}\n({target.kind})",
            [describe_amount(row.cost, sweep.metric) for row in rows],
            "right",
        ),
        Column(_fraction_heading(target), [f"{row.fraction:.3f}" for row in rows], "right"),
    ]
    for split in SPLITS:
        heading = f"{split}\n{_called(sweep)}\n(measured)"
        columns.append(Column(heading, [_share(sweep, row, split) for row in rows], "right"))
    columns.append(Column("Pareto\nfront", [_mark(row.pareto) for row in rows]))
    title = f"{sweep.network} on {sweep.data}, {target.name}"
    print_columns(console, title, columns, keys=2, sections=sections, caption=_caption(sweep, target))


def _asked_words(sweep: FinishedSweepRecord) -> str:
    """Head the column of what was asked for."""
    if not sweep.asked.max_drops:
        return "budget"
    if not sweep.asked.budgets:
        return "at most"
    return "budget\nor drop"


def _print_front(console: Console, sweep: FinishedSweepRecord, target: SweepTarget, front: FrontRecord) -> None:
    """Print the policies that no other one is as good as in every respect and better in one."""
    columns = [
        Column("policy", [member.called for member in front.policies]),
        Column(f"test\n{_called(sweep)}", [sweep.show(member.value) for member in front.policies], "right"),
    ]
    for place, metric in enumerate(front.metrics):
        costs = [describe_amount(member.costs[place], metric) for member in front.policies]
        columns.append(Column(metric, costs, "right"))
    respects = ["test " + _called(sweep), *front.metrics]
    title = f"{target.name}: {len(front.policies)} of {front.of} policies are on the front of {join_words(respects)}"
    print_columns(console, title, columns, caption=hypervolume_words(sweep, target, front))


def hypervolume_words(sweep: FinishedSweepRecord, target: SweepTarget, front: FrontRecord) -> str:
    """Say how large the hypervolume of a front is, and of which reference point.

    Args:
        sweep: What the front is of.
        target: On which target.
        front: The front.

    Returns:
        The words.
    """
    value, *costs = front.reference
    amounts = " and ".join(describe_amount(cost, metric) for cost, metric in zip(costs, front.metrics, strict=True))
    return (
        f"hypervolume {front.hypervolume:.4f}: of {sweep.show(value)} and {amounts} ({target.reference_short}), costs as "
        "fractions of these"
    )


def _called(sweep: FinishedSweepRecord) -> str:
    """Name the objective: one whose inputs are attacked as it is asked for, since the caption says what its title does."""
    if sweep.objective.endswith(ROBUST):
        return sweep.objective
    return sweep.objective_title


def _caption(sweep: FinishedSweepRecord, target: SweepTarget) -> str:
    objective = _called(sweep)
    sizes = " and ".join(f"{count:,} {split}" for split, count in sweep.images.items())
    measured = objective
    if sweep.objective_is != objective:
        measured = f"{objective} ({sweep.objective_is})"
    of_float = _shown(sweep, sweep.of_float, "test")
    errors = ""
    if min(sweep.images[split] for split in SPLITS) < FEW:
        errors = errors_words(sweep, [sweep.of_float.error(split, sweep.objective) for split in SPLITS])
    if errors:
        errors = f"; {errors}"
    errors += _paired_words(sweep, target)
    seeds = ""
    if sweep.asked.seeds > 1:
        seeds = "; means of several seeds, below them smallest and largest"
    return (
        f"float: {of_float} on the test split; {sizes} {sweep.samples_are}{errors}; {measured} "
        f"{sweep.accuracy_is}; cost {target.cost_is}{seeds}. *: nothing costs less and has a better test {objective}. "
        "Uniform policies keep the fixed layers' bits"
    )


def _paired_words(sweep: FinishedSweepRecord, target: SweepTarget) -> str:
    """Say how large the paired standard errors of differences from float are on the test split; nothing if none is known."""
    known = [row.paired_error("test", sweep.objective, "float") for row in (*target.found, *target.uniform)]
    errors = [error for error in known if error]
    if not errors:
        return ""
    low, high = (show_error(error, sweep.objective_unit) for error in (min(errors), max(errors)))
    unit = sweep.objective_unit
    if unit == PERCENT:
        unit = "points"
    errors_are = f"{low} to {high} {unit}".rstrip()
    return f"; differences from float have paired standard errors of {errors_are}, smaller ones say nothing"


def _print_specialisation(console: Console, sweep: FinishedSweepRecord, special: SpecialisationRecord) -> None:
    policies = special.policies
    names = [f"{hw} by {policy.solver}" for hw, policy in policies.items()]
    values = [_shown(sweep, policy, "test") for policy in policies.values()]
    columns = [Column("found for", names), Column(f"test\n{_called(sweep)}\n(measured)", values, "right")]
    for hw in policies:
        heading = f"\non {hw}\n({sweep.targets[hw].kind})"
        cells = [f"{policy.fraction_words(hw)} {_mark(own == hw)}" for own, policy in policies.items()]
        columns.append(Column(heading, cells, "right"))
    references = {target.reference_short for target in sweep.targets.values()}
    reference = "the reference"
    if len(references) == 1:
        reference = references.pop()
    metric = metric_words(sweep.metric)
    title = f"What a policy found for one target costs on another: {metric} as a fraction of {reference} there"
    caption = f"budget {special.budget}. *: the target's own policy, the best on the search split of those found for it"
    if any(None in policy.fractions.values() for policy in policies.values()):
        caption += ". –: the target can't do one of the policy's pairs of widths"
    print_columns(console, title, columns, caption=caption)


def _share(sweep: FinishedSweepRecord, row: JudgedRecord, split: str) -> str:
    """A value; of several seeds their mean, below it the smallest and the largest."""
    value = _shown(sweep, row, split)
    if not isinstance(row, SweepFound) or len(row.runs) == 1:
        return value
    low, high = sweep.spread(row, split)
    if sweep.objective_unit == PERCENT:
        return f"{value}\n{100 * low:.2f}–{100 * high:.2f}"
    return f"{value}\n{show(low, '')}–{show(high, '')}"


def _shown(sweep: FinishedSweepRecord, row: Measurement | JudgedRecord, split: str) -> str:
    """A value, with its standard error where it is of few samples."""
    value, error = sweep.value(row, split), row.error(split, sweep.objective)
    return value_with_error(sweep, value, sweep.images[split], error)


def _mark(is_marked: bool) -> str:
    if is_marked:
        return "*"
    return " "
