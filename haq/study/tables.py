"""What a user is shown of a run: what it will do, a table of layers and one of results."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import quantizers as Q
from haq.console.tables import Column, key_table, print_columns, say, say_next
from haq.problem.chance import FEW, doubts, value_with_error
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF
from haq.problem.objective import Objective
from haq.problem.problem import Problem
from haq.problem.schemes import lacking_integers
from haq.solvers.base import Trial, find_solver
from haq.solvers.choice import LAST
from haq.solvers.sensitivity import COMPUTED, evaluations_for_all
from haq.solvers.spending import proposed, spending, time_words, words_of
from haq.store.files import SENSITIVITY
from haq.store.records import (
    COST_KEYS,
    FINETUNED,
    SAME,
    SPLITS,
    UNIFORM_8,
    ChannelsRecord,
    ChoiceRecord,
    ContributionRecord,
    GoalRecord,
    JudgingRecord,
    ObjectiveRecord,
    PruningRecord,
    RacingRecord,
    ReachedRecord,
    ReconstructionRecord,
    TuningRecord,
    error_key,
    paired_key,
    share_key,
    short_reference,
    span_words,
)
from haq.store.units import (
    COUNTED,
    NOTHING,
    PERCENT,
    begin,
    best_unit,
    counted,
    describe_amount,
    heading_of,
    kind_of_cost,
    metric_words,
    percent,
    show,
    show_error,
)
from haq.study.channels import channels_of, pruning_entry, smaller
from haq.study.channels import words_of as channels_words
from haq.study.config import ADAROUND, NONE
from haq.study.task import SearchTask, adversary_of, objective_of
from hw_models.notebook import html_table
from hw_models.registry import join_words
from hw_models.widths import FLOAT, pair_words, places, width_words

PINNED_MARK = "*"
FEW_PAIRS = 8  # of widths, that a plan names one by one
MOST_REASONS, MOST_NAMES = 4, 4  # why channels are fixed, and groups that are named for each, in a plan


def print_plan(
    console: Console, task: SearchTask, folder: Path | None, rivals: Sequence[str], of_rivals: str, workers: str
) -> None:
    """Say what a search will do.

    Args:
        console: Where.
        task: The search.
        folder: Where results go; None if nothing is written.
        rivals: Solvers for comparison.
        of_rivals: What these cost, in words, or why there are none.
        workers: Who evaluates policies, in words.
    """
    problem = task.problem
    config = task.config
    results_in = "nothing is written (--dry-run)"
    if folder is not None:
        results_in = str(folder)
    rows = {"network": _network_words(task)}
    if unpriced := problem.workload.unpriced_words:
        rows["not priced"] = unpriced
    rows |= {
        "data": task.dataset.describe(),
        "target": f"{problem.target.name}: {problem.target.description}; batch {problem.table.batch}; costs are "
        f"{problem.table.provenance}",
        "metric": problem.metric,
        **_asked_words(problem),
        "bits": _bits_words(problem),
        **pruning_words(problem),
        "scheme": scheme_words(problem),
        "weights": rounding_words(problem, task.config.correction),
        **residuals_words(problem),
        "solver": _solver_words(task),
        "evaluations": _evaluations_words(task, workers),
        "spent on": "\n".join(_spending_lines(task)),
        "sensitivities": _sensitivities_words(task, folder, rivals),
        "for comparison": "; ".join(filter(None, [_rivals_allowance(rivals), of_rivals])),
        "objective": problem.objective.words,
        **_confirmation_words(task),
        "fine-tuning": _finetuning_words(task),
        "seed": str(config.seed),
        "results in": results_in,
    }
    console.print(key_table(rows.items()))


def _asked_words(problem: Problem) -> dict[str, str]:
    """Say what is looked for, within which budgets, and what these are fractions of, by the names of a plan's rows."""
    rows = {}
    if problem.goal.kind != BEST.kind:
        rows["goal"] = _goal_words(problem)
    given = [limit for limit in problem.limits if limit.is_given]
    if [limit.metric for limit in given] == [problem.metric] and problem.reference_words == UNIFORM_8:
        amount, of_all = (describe_amount(amount, problem.metric) for amount in (problem.limit, problem.reference))
        return rows | {"budget": f"{amount}, {problem.budget:.3g} of {UNIFORM_8} ({of_all})"}
    lines = []
    for limit in given:
        amount, of_all = (describe_amount(amount, limit.metric) for amount in (limit.amount, limit.reference))
        lines.append(f"{metric_words(limit.metric)} {amount}, {limit.fraction:.3g} of {of_all}")
    rows["budget"] = "\n".join(lines) or NONE
    if given:
        rows["reference"] = f"fractions are of {problem.reference_words}"
    return rows


def _goal_words(problem: Problem) -> str:
    """Say what is looked for; of the cheapest policy also what value that takes."""
    words = problem.goal.words(problem.objective)
    if problem.goal.kind == TRADEOFF:
        target = describe_amount(problem.tradeoff_target, problem.metric)
        share = problem.tradeoff_target / problem.reference
        return f"{words}; budget {target} of {metric_words(problem.metric)}, {share:.3g} of {problem.reference_words}"
    words = f"{words}, by {metric_words(problem.metric)}"
    if problem.goal.max_drop is None:
        return words
    least = problem.goal.threshold(problem.objective, problem.float_result.value)
    bound = "at least"
    if not problem.objective.higher_is_better:
        bound = "at most"
    return f"{words} ({bound} {show(least, problem.objective.unit)} on the search split)"


def _bits_words(problem: Problem) -> str:
    """Say which widths may be chosen, in how many layers, and what is fixed."""
    free = [decision for decision in problem.decisions if len(decision.pairs) > 1]
    if not free:
        free = list(problem.decisions)  # what is fixed without being pinned
    layers = counted(sum(len(decision.layers) for decision in free), "layers")
    weights, activations = (span_words(operand) for operand in problem.widths)
    words = f"{weights} for weights and activations of {layers}"
    if weights != activations:
        words = f"{weights} for weights, {activations} for activations, of {layers}"
    pairs = {(int(w), int(a)) for decision in free for w, a in decision.pairs}
    fixed = "fixed (weights/activations)"
    if 0 < len(pairs) <= FEW_PAIRS:
        # All else the target can't do, or it costs as much as one of these.
        words = f"{join_words([pair_words(*pair) for pair in sorted(pairs)], 'or')} (weights/activations) in {layers}"
        fixed = "fixed"
    if problem.pinned:
        pinned = ", ".join(f"{name} {pair_words(w, a)}" for name, (w, a) in problem.pinned.items())
        words += f"; {fixed}: {pinned}"
    if constant := _layers_of_one_value(problem):
        words += (
            f"; 1 bit makes one value of inputs that are never negative ({join_words(_few(constant))}): give activations "
            "2 bits or more, behind the slash of --bits W/A"
        )
    return words


def _layers_of_one_value(problem: Problem) -> list[str]:
    """List the layers whose inputs were never negative, and whose activations may get one bit that is a sign."""
    layers = Q.quant_layers(problem.evaluator.network)
    found = []
    for decision in problem.decisions:
        if not (decision.pairs[:, 1] == 1).any():
            continue
        for index in decision.layers:
            name = problem.workload.names[index]
            if problem.schemes[name].has_signed_inputs(layers[name], 1) and not layers[name].signed:
                found.append(name)
    return found


def pruning_words(problem: Problem) -> dict[str, str]:
    """Say which channels may be pruned, and which can't and why, by the name of a plan's row; nothing if none may be."""
    entry = pruning_entry(problem)
    if not entry:
        return {}
    record = PruningRecord.from_dict(entry["pruning"], "the channels")
    lines = [record.words]
    by_reason: dict[str, list[str]] = {}
    for name, reason in record.fixed.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"fixed: {join_words(_few(names))} ({reason})" for reason, names in list(by_reason.items())[:MOST_REASONS]]
    if len(by_reason) > MOST_REASONS:
        lines.append(f"fixed for {len(by_reason) - MOST_REASONS} further reasons: others")
    return {"channels": "\n".join(lines)}


def _few(names: Sequence[str]) -> list[str]:
    """Return the first names, and how many more there are."""
    if len(names) <= MOST_NAMES:
        return list(names)
    return [*names[:MOST_NAMES], f"{len(names) - MOST_NAMES} more"]


def _network_words(task: SearchTask) -> str:
    problem = task.problem
    words = (
        f"{task.network.name} ({task.network.origin}): {counted(len(problem.workload), 'quantizable layers')}, "
        f"{problem.workload.macs / 1e6:.2f} M MACs"
    )
    if problem.objective.compares_with_float:
        return words
    measured = problem.objective.title
    if problem.objective.attacked:
        measured = f"{_plain_title(problem.objective)} ({problem.objective.words})"
    result = problem.float_result
    value = value_with_error(objective_of(problem), result.accuracy, problem.evaluator.count, result.error)
    return f"{words}, float {measured} {value} on the search split"


def _plain_title(objective: Objective) -> str:
    """Name what is measured, where it is the worst of images as they are and attacked that counts."""
    if objective.also:
        return objective.also[0].title
    return objective.title


def scheme_words(problem: Problem) -> str:
    """Say which layers have which scheme, and what of it can't be deployed."""
    layers: dict[str, list[str]] = {}
    for name, scheme in problem.schemes.items():
        layers.setdefault(scheme.name, []).append(name)
    main = max(layers, key=lambda name: len(layers[name]))
    words = main
    others = [f"{name} for {', '.join(layers[name])}" for name in layers if name != main]
    if others:
        words += f"; {'; '.join(others)}"
    lacking = {s.name for s in problem.schemes.values() if lacking_integers(s)}
    if lacking:
        words += f"; can't be deployed: {', '.join(sorted(lacking))} doesn't compute with integers"
    untrained = {s.name for s in problem.schemes.values() if s.for_training}
    if untrained and problem.evaluator.tune is None:
        words += f"; {join_words(sorted(untrained))} is for training, and policies are judged untrained: see --finetune-steps"
    for name, widths in _widths_without_integers(problem, lacking).items():
        words += f"; weights of {join_words([str(bits) for bits in widths], 'or')} bits in {name} can't be deployed"
    return words


def rounding_words(problem: Problem, correction: str) -> str:
    """Say how weights are rounded, and why some layers' are rounded otherwise, and what is done about it."""
    words = "rounded to nearest"
    if "gptq" in problem.roundings.values():
        words = "rounded by GPTQ"
        nearest = [name for name, rounding in problem.roundings.items() if rounding == "nearest"]
        few = [name for name in nearest if problem.schemes[name].takes_offsets]
        fixed = [name for name in nearest if name not in few]
        if few:
            words += f"; to nearest, for too few calibration images: {', '.join(few)}"
        if fixed:
            words += f"; to nearest, by their scheme: {', '.join(fixed)}"
    if correction == NONE:
        return f"{words}; biases are not corrected"
    return f"{words}; biases get the {correction} correction"


def residuals_words(problem: Problem) -> dict[str, str]:
    """Say how wide what additions and average pools take is, by the name of a plan's row; nothing for float."""
    if problem.residuals is None:
        return {}
    return {"residuals": problem.residuals_words}


def _widths_without_integers(problem: Problem, lacking: set[str]) -> dict[str, list[int]]:
    """List, by scheme, the weight widths that may be chosen although no integers of 8 bits hold them."""
    found: dict[str, set[int]] = {}
    for decision in problem.decisions:
        for index in decision.layers:
            scheme = problem.schemes[problem.workload.names[index]]
            if scheme.name in lacking:
                continue
            for bits in set(decision.pairs[:, 0].tolist()):
                try:
                    scheme.integer_weight_bits(bits)
                except ValueError:
                    found.setdefault(scheme.name, set()).add(bits)
    return {name: sorted(widths) for name, widths in found.items()}


def _solver_words(task: SearchTask) -> str:
    if task.config.agent is not None:
        return f"{task.config.solver}, from {task.config.agent}"
    if task.config.iterate:
        return f"{task.config.solver}, iterated"
    return task.config.solver


def _rivals_allowance(rivals: Sequence[str]) -> str:
    if not rivals:
        return ""
    return f"{' and '.join(rivals)}, at most as many evaluations each"


def _spending_lines(task: SearchTask) -> list[str]:
    """Say what evaluations go into, and about how long they take."""
    config, problem = task.config, task.problem
    found = find_solver(config.solver, config.iterate)
    known = config.sensitivity is not None
    parts = spending(found, problem, task.evaluations, config.sensitivity_kind, known, config.env)
    lines = words_of(parts, task.evaluations)
    lines.append(time_words(problem, task.evaluations))
    return [line for line in lines if line]


def _sensitivities_words(task: SearchTask, folder: Path | None, rivals: Sequence[str]) -> str:
    config, needed = task.config, evaluations_for_all(task.problem)
    uses = find_solver(config.solver, config.iterate).uses_sensitivities
    if not uses and not rivals and not config.sensitivity:
        return NONE
    return f"{config.sensitivity_kind}, {_source_words(task, folder, uses, needed)}"


def _source_words(task: SearchTask, folder: Path | None, uses: bool, needed: int) -> str:
    """Say where sensitivities are from.

    Args:
        task: The search.
        folder: Of the run; None if there is none.
        uses: Whether the search's own solver works with them.
        needed: How many evaluations it takes to measure all of them.
    """
    config = task.config
    if config.sensitivity:
        source = Path(config.sensitivity)
        if folder is not None and (folder / SENSITIVITY).is_file():
            source = folder / SENSITIVITY  # a run that goes on has a copy of its own
        known = task.read_sensitivities(source).known
        words = f"from {config.sensitivity}"
        if known + 1 < needed:
            words += f", which has {known} of {needed - 1}: the rest is guessed from them"
        return words
    if config.sensitivity_kind in COMPUTED:
        return "computed, without evaluations"
    if not uses:
        return f"not needed by {config.solver}"
    words = "measured by each solver that needs them"
    if task.evaluations <= needed:
        words += f"; all of them take {counted(needed, 'evaluations')}, and what {task.evaluations} leave out is guessed"
    return words


def _evaluations_words(task: SearchTask, workers: str) -> str:
    words = str(task.evaluations)
    usual = proposed(task.problem)
    if usual != task.evaluations:
        words += f" ({usual} are proposed for this size)"
    if task.problem.evaluator.count:
        words += f", each on {task.problem.evaluator.count:,} search {task.problem.samples_are}"
    if task.config.finetune_steps:
        words += f" after {counted(task.config.finetune_steps, 'steps')} of fine-tuning"
    return f"{words}, {workers}"


def _confirmation_words(task: SearchTask) -> dict[str, str]:
    """Say by what the best few policies are judged again, by the name of a plan's row."""
    if task.to_confirm is None:
        return {}
    count = len(task.to_confirm)
    return {
        "confirmation": f"the best {LAST} are judged again on {count:,} {task.problem.samples_are} of the train split, which "
        "are set apart for it: neither calibration nor fine-tuning sees them"
    }


def _finetuning_words(task: SearchTask) -> str:
    rounding = ""
    if task.config.rounding == ADAROUND:
        rounding = "biases and roundings of the policy that was found, without labels"
    if not task.config.finetune_epochs:
        return rounding or "none"
    if rounding:
        rounding += "; then "
    epochs = counted(task.config.finetune_epochs, "epochs")
    words = f"{rounding}{epochs} on {len(task.to_train_on):,} train {task.problem.samples_are}"
    if adversary_of(task.config):
        words += f", against R+FGSM at eps {task.config.eps}"
    return words


def print_layers(console: Console, problem: Problem, policy: Q.BitPolicy) -> None:
    """Print bits, cost before and after, and what bounds it, per layer.

    Args:
        console: Where; its width counts.
        problem: What the policy is of.
        policy: Its bits.
    """
    w, a = problem.bit_arrays(policy)
    before, after = _costs_of(problem, problem.reference_policy), _costs_of(problem, policy)
    unit, size = best_unit(float(before.max()), problem.metric)
    names = [layer.name for layer in problem.workload.layers]
    marks = [PINNED_MARK * (name in problem.pinned) for name in names]
    shares = [percent(cost / before.sum(), 1) for cost in before]
    channels = channels_of(problem, policy)
    made = smaller(problem, policy)
    columns = [
        Column("layer", [*names, "total, mean"]),
        *_channel_columns(channels),
        Column("weight\nbits", _bits_cells(w, marks), "right"),
        Column("activ.\nbits", _bits_cells(a, marks), "right"),
        Column(f"before,\n{before_words(problem)}", [f"{cost / size:.4g}" for cost in (*before, before.sum())], "right"),
        Column("after", [f"{cost / size:.4g}" for cost in (*after, after.sum())], "right"),
        Column("share\nbefore", [*shares, ""], "right"),
    ]
    if problem.metric == "latency" and made.table.bound is not None:
        bounds = made.table.bound[np.arange(len(w)), places(w), places(a)]
        columns.append(Column("bound by", [*(made.table.bounds[index] for index in bounds), ""]))
    columns += [_column_of(made, limit.metric, w, a) for limit in problem.limits[1:] if limit.is_sum]
    kind = kind_of_cost(problem.metric, problem.table.provenance)
    if kind != COUNTED:
        kind = problem.table.provenance
    title = f"{_decided_words(channels)} per layer on {problem.target.name}; {metric_words(problem.metric)} in {unit}, {kind}"
    print_columns(console, title, columns, totals=1, caption=_layers_caption(problem, policy))


def before_words(problem: Problem) -> str:
    """Write the widths that every layer has in the reference, such as 8/8; or "reference" if they differ."""
    pairs = set(problem.reference_policy.values())
    if len(pairs) == 1:
        return pair_words(*next(iter(pairs)))
    return "reference"


def _costs_of(problem: Problem, policy: Q.BitPolicy) -> NDArray[np.float64]:
    """Return what every layer costs in a policy, in the metric's unit."""
    w, a = problem.bit_arrays(policy)
    found: NDArray[np.float64] = smaller(problem, policy).cost[np.arange(len(w)), places(w), places(a)]
    return found


def _decided_words(channels: ChannelsRecord | None) -> str:
    """Say what a table of layers shows."""
    if channels is None:
        return "Bits"
    return "Channels and bits"


def _channel_columns(channels: ChannelsRecord | None) -> list[Column]:
    """Make the column of the output channels that layers keep; none where no channels are searched."""
    if channels is None:
        return []
    cells = [layer.outputs_words for layer in channels.layers]
    kept = sum(layer.outputs for layer in channels.layers)
    whole = sum(layer.of_outputs for layer in channels.layers)
    return [Column("channels\nkept", [*cells, f"{kept}/{whole}"], "right")]


def _bits_cells(widths: NDArray[np.int64], marks: Sequence[str]) -> list[str]:
    """Write the widths of an operand, with their marks, and below them their mean, in which float counts 32."""
    cells = [f"{width_words(width)}{mark}" for width, mark in zip(widths, marks, strict=True)]
    return [*cells, f"{widths.mean():.1f}"]


def _column_of(problem: Problem, metric: str, w: NDArray[np.int64], a: NDArray[np.int64]) -> Column:
    """Make the column of what layers take of a further metric that is limited.

    Args:
        problem: What is searched.
        metric: The metric, a sum over layers.
        w: The widths of weights.
        a: The widths of activations.

    Returns:
        The column.
    """
    costs = problem.table.metric(metric)[np.arange(len(w)), places(w), places(a)]
    total = float(problem.table.total(metric, w, a))
    unit, size = best_unit(total, metric)
    return Column(heading_of(metric, unit), [f"{cost / size:.4g}" for cost in (*costs, total)], "right")


def _layers_caption(problem: Problem, policy: Q.BitPolicy) -> str:
    """Say what stands behind marks and means in a table of layers."""
    parts = []
    if problem.pinned:
        parts.append(f"{PINNED_MARK} fixed")
    if any(None in pair for pair in policy.values()):
        parts.append(f"float counts {FLOAT} bits in the means")
    if before_words(problem) == "reference":
        parts.append(f"reference: {problem.reference_words}")
    return "; ".join(parts)


class PolicyTable:
    """Bits and costs per layer of a policy: text for a terminal (`print`), a table in a notebook."""

    def __init__(self, problem: Problem, policy: Q.BitPolicy) -> None:
        """Take a policy of a problem."""
        self.problem = problem
        self.policy = policy

    def __repr__(self) -> str:
        """Write the table as text."""
        console = Console(width=100, color_system=None, file=io.StringIO(), force_jupyter=False)
        with console.capture() as captured:
            print_layers(console, self.problem, self.policy)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        """Make a table for a notebook."""
        problem = self.problem
        w, a = problem.bit_arrays(self.policy)
        before, after = _costs_of(problem, problem.reference_policy), _costs_of(problem, self.policy)
        channels = channels_of(problem, self.policy)
        kept = [""] * len(w)
        if channels is not None:
            kept = [layer.outputs_words for layer in channels.layers]
        rows: list[tuple[str, ...]] = [
            (
                layer.name,
                kept[i],
                width_words(w[i]),
                width_words(a[i]),
                describe_amount(before[i], problem.metric),
                describe_amount(after[i], problem.metric),
            )
            for i, layer in enumerate(problem.workload.layers)
        ]
        metric, kind = metric_words(problem.metric), kind_of_cost(problem.metric, problem.table.provenance)
        if kind != COUNTED:
            kind = problem.table.provenance
        caption = f"{_decided_words(channels)} per layer on {problem.target.name}; {metric} is {kind}"
        before_at = f"{metric} at {before_words(problem)}"
        headings: tuple[str, ...] = ("layer", "channels kept", "weight bits", "activation bits", before_at, f"{metric} now")
        if channels is None:
            headings = (headings[0], *headings[2:])
            rows = [(row[0], *row[2:]) for row in rows]
        return html_table(caption, headings, rows)


def print_result(console: Console, task: SearchTask, policy: Q.BitPolicy, result: Mapping[str, Any]) -> None:
    """Show the two tables, and one sentence each on the budget and on the rivals.

    Args:
        console: Where.
        task: The search.
        policy: What was found.
        result: What result.json holds.
    """
    print_layers(console, task.problem, policy)
    _print_comparison(console, task, result)
    if sentence := differences_sentence(objective_of(task.problem), result):
        say(console, sentence)
    if result.get("choice"):
        say(console, choice_sentence(result["choice"]))
    if result.get("goal"):
        say(console, goal_sentence(result))
    if result.get("channels"):
        say(console, f"Channels: {channels_words(result['channels'])}.")
    for budget in result.get("budgets") or [result["budget"]]:
        say(console, budget_sentence(budget, reference_label(result)))
    if result.get("racing"):
        say(console, racing_sentence(result["racing"]))
    if result.get("contribution"):
        say(console, f"{begin(ContributionRecord.from_dict(result['contribution']).words)}.")
    for name, share in result.get("saturated_actions", {}).items():
        say(console, f"Actions of {name} at a bound: {percent(share, 1)}.")
    if result["rivals"]:
        say(console, _rivals_sentence(task.problem, result))
    for name in result["evaluations"]:
        if name != result["solver"] and name not in result["rivals"]:
            say(console, f"{name} found no policy that is good enough.")
    if result.get("reconstruction"):
        say(console, reconstruction_sentence(result["reconstruction"]))
    if result.get("tuning"):
        say(console, tuning_sentence(result["tuning"]))
    print_doubts(console, task)


def racing_sentence(entry: Mapping[str, Any]) -> str:
    """Say how many evaluations ended early, and what that saved (`haq.study.result.racing_entries`)."""
    return f"{begin(RacingRecord.from_dict(entry, 'the racing').words)}."


def choice_sentence(entry: Mapping[str, Any]) -> str:
    """Say which policy was chosen, and why (`haq.study.result.choice_entry`)."""
    return f"{begin(ChoiceRecord.from_dict(entry, 'the choice').words)}."


def differences_sentence(judging: JudgingRecord, result: Mapping[str, Any]) -> str:
    """Say how far what was found is from what it is held against, on the test split, with paired standard errors.

    Args:
        judging: What values are of.
        result: What result.json holds.

    Returns:
        A sentence; nothing where no standard error is known.
    """
    key = share_key("test", judging.objective)
    value = judging.checked(result["found"][key], key)
    of_float, errors = paired_key(key, "float"), paired_key(key, "found")
    parts = []
    if result["found"].get(of_float) is not None:
        other = judging.checked(result["float"][key], key)
        parts.append(judging.difference(value, other, result["found"][of_float], "float"))
    rows = {reference_label(result): result["uniform8"]}
    rows |= {f"{name}'s": row for name, row in result["rivals"].items()}
    for name, row in rows.items():
        if row.get(errors) is not None:
            parts.append(judging.difference(value, judging.checked(row[key], key), row[errors], name))
    tuned = result["finetuned"]
    if tuned is not None and tuned.get(errors) is not None:
        words = judging.difference(judging.checked(tuned[key], key), value, tuned[errors], "it")
        parts.append(f"{FINETUNED[result.get('finetuned_by', 'train')]}, {words}")
    if not parts:
        return ""
    return f"On the test split what was found is {'; '.join(parts)} (± is the paired standard error)."


def print_doubts(console: Console, task: SearchTask) -> None:
    """Say what must be known before values are believed: float accuracy at chance, few samples."""
    for sentence in doubts(task.problem):
        say(console, sentence)


def tuning_sentence(tuning: Mapping[str, Any]) -> str:
    """Say whether fine-tuning helped (`haq.study.result.tuning_entry`)."""
    record = TuningRecord.from_dict(tuning, "what fine-tuning came to")
    before = value_with_error(record, record.before, record.images, record.before_error)
    best = value_with_error(record, record.best, record.images, record.best_error)
    judged = f"on {record.images:,} train {record.samples_are} that were held out"
    ended = ""
    if record.diverged:
        ended = "; it ended early, since its loss was no number any more"
    if record.stopped is not None:
        ended = f"; it ended after epoch {record.stopped}"
    if record.earlier is not None:
        earlier = value_with_error(record, record.earlier, record.images)
        return (
            f"Fine-tuning did not help, {judged}: {best} is no better than the network that was fine-tuned earlier "
            f"({earlier}), which was kept{ended}."
        )
    if record.kept:
        return (
            f"Fine-tuning, {judged}: {before} before, {best} after epoch {record.kept} of {record.epochs}, whose network was "
            f"kept{ended}."
        )
    tried = f"no epoch of {record.epochs}"
    if record.stopped is not None:
        tried, ended = f"no epoch of {record.epochs} until it ended early, after epoch {record.stopped},", ""
    return (
        f"Fine-tuning did not help, {judged}: {tried} was better than the network before ({before}), "
        f"which was kept{ended}. Try a lower --learning-rate, or more {record.samples_are}."
    )


def reconstruction_sentence(entry: Mapping[str, Any]) -> str:
    """Say whether a reconstruction helped (`haq.study.result.reconstruction_entry`)."""
    record = ReconstructionRecord.from_dict(entry, "what the reconstruction came to")
    before = value_with_error(record, record.before, record.images, record.before_error)
    after = value_with_error(record, record.after, record.images, record.after_error)
    samples = record.samples_are
    how = f"{record.calibration_images:,} calibration {samples}, no labels, seed {record.seed}, {record.seconds:.0f} s"
    judged = f"on {record.images:,} train {samples} that were held out"
    divergences = f"{record.divergence_before:.4f} and {record.divergence_after:.4f} {record.divergence_unit}".rstrip()
    sentence = (
        f"Post-training quantization ({how}), {judged}: {before} before, {after} after, divergence from the float network "
        f"{divergences}"
    )
    if record.earlier is not None:
        earlier = value_with_error(record, record.earlier, record.images)
        return f"{sentence}; the network that was fine-tuned earlier ({earlier}) is no worse, and was kept."
    if record.kept:
        return f"{sentence}."
    return f"{sentence}; that is no better, and the network before was kept."


def _print_comparison(console: Console, task: SearchTask, result: Mapping[str, Any]) -> None:
    """Print what was found beside the float network, uniform 8 bits and the rivals."""
    problem = task.problem
    tuned = f"  {FINETUNED[result.get('finetuned_by', 'train')]}"
    if result.get("finetuned_scheme"):
        tuned += f", {result['finetuned_scheme']}"
    rows: dict[str, Mapping[str, float | None] | None] = {
        "float": result["float"],
        reference_label(result): result["uniform8"],
        f"found by {result['solver']}": result["found"],
        tuned: result["finetuned"],
        **{f"found by {name}{_bits_only(result, name)}": row for name, row in result["rivals"].items()},
    }
    shown = {label: row for label, row in rows.items() if row is not None}
    columns = [Column("policy", list(shown), least=14)]
    for heading, split, objective in _value_columns(problem.objective):
        count = len(getattr(task.dataset, split))
        judging = ObjectiveRecord.of(objective, problem.samples_are)
        columns.append(Column(heading, [_value_cell(judging, row, split, count) for row in shown.values()], "right"))
    limited = [limit.metric for limit in problem.limits[1:]]
    for metric in dict.fromkeys([*problem.metrics, problem.metric, *limited]):
        # Bytes and bits are counted on every target. What was measured, and where, stands below the table.
        kind = kind_of_cost(metric, problem.table.provenance)
        columns.append(Column(heading_of(metric, f"({kind})"), [_cost_cell(row, metric) for row in shown.values()], "right"))
    title = f"{result['network']} on {result['data']}, {result['target']}"
    print_columns(console, title, columns, caption=_caption(task, result))


def _bits_only(result: Mapping[str, Any], name: str) -> str:
    """Say of a rival that it searched no channels, beside a solver that did; nothing otherwise."""
    if name in result.get("bits_only", ()):
        return " (bits only)"
    return ""


def _value_columns(objective: Objective) -> list[tuple[str, str, Objective]]:
    """List the headings, splits and objectives of the columns of values."""
    if not objective.also:
        return [(f"{split}\n{objective.short}\n(measured)", split, objective) for split in ("test", "search")]
    # That these are measured stands below the table.
    words = objective.short.replace(" ", "\n")
    columns = [(f"\ntest\n{other.short}", "test", other) for other in objective.also]
    return columns + [(f"{split}\n{words}", split, objective) for split in ("test", "search")]


def _value_cell(judging: ObjectiveRecord, row: Mapping[str, float | None], split: str, count: int) -> str:
    """Write a value, with its standard error where it is of few samples."""
    key = share_key(split, judging.objective)
    return value_with_error(judging, judging.checked(row[key], key), count, row.get(error_key(key)))


def _cost_cell(row: Mapping[str, float | None], metric: str) -> str:
    cost = row.get(COST_KEYS[metric])
    if cost is None:
        return NOTHING
    return describe_amount(cost, metric)


def _caption(task: SearchTask, result: Mapping[str, Any]) -> str:
    """Say below a table of results on how many samples they stand, and where they were measured."""
    objective, judging = task.problem.objective, objective_of(task.problem)
    parts = []
    if task.problem.evaluator.count:
        parts.append(f"{len(task.dataset.test):,} test and {len(task.dataset.search):,} search {judging.samples_are}")
    if min(len(task.dataset.test), len(task.dataset.search)) < FEW:
        known = [result["float"].get(error_key(share_key(split, objective.name))) for split in SPLITS]
        if errors := errors_words(judging, known):
            parts.append(errors)
    if task.config.finetune_steps:
        parts.append(f"every policy fine-tuned for {counted(task.config.finetune_steps, 'steps')}")
    if objective.note:
        parts.append(objective.note)
    measured = [other.title for other in objective.also] or [objective.title]
    parts.append(f"{' and '.join(measured)} {result['accuracy_is']}")
    parts.append(f"cost {result['cost_is']}")
    if not result.get("reference", UNIFORM_8).startswith("uniform "):
        parts.append(f"reference: {result['reference']}")
    return "; ".join(parts)


def errors_words(judging: JudgingRecord, known: Sequence[float | None]) -> str:
    """Say what stands behind a ± in a table of values of few samples.

    Args:
        judging: What the values are of.
        known: Standard errors of values that are no shares of samples.

    Returns:
        The words; nothing where no standard error is known.
    """
    if not judging.counts_samples and all(error is None for error in known):
        return ""
    if judging.objective_unit == PERCENT:
        return "± is the standard error in points"
    return "± is the standard error"


def reference_label(result: Mapping[str, Any]) -> str:
    """Name the row of the reference in a table of results."""
    return short_reference(str(result.get("reference", UNIFORM_8)))


def budget_sentence(budget: Mapping[str, Any], reference: str = UNIFORM_8) -> str:
    """Say how much of a budget is used.

    Args:
        budget: One of `haq.study.result.budgets_used`.
        reference: What fractions are of, in words.

    Returns:
        A sentence.
    """
    metric = metric_words(budget["metric"])
    used = describe_amount(budget["used"], budget["metric"])
    fraction = f"{budget['used_fraction']:.3f} of {reference}"
    if budget["limit"] is None:
        return f"{begin(metric)}: {used}, {fraction}; no budget limits it."
    limit = describe_amount(budget["limit"], budget["metric"])
    verdict = "EXCEEDED"
    if budget["holds"]:
        verdict = "holds"
    share = percent(budget["used"] / budget["limit"], 1)
    return f"Budget: {used} of {limit} {metric} used ({share}, {fraction}): {verdict}."


def goal_sentence(result: Mapping[str, Any]) -> str:
    """Say what was looked for, and whether what was found is that, on the search split and on the test split."""
    goal = GoalRecord.from_dict(result["goal"], "what was looked for")
    if "reached" not in result:
        return f"Goal: {goal.words}."
    reached = ReachedRecord.from_dict(result["reached"], "what was found")
    told = []
    for split in SPLITS:
        key = share_key(split, reached.objective)
        value, of_float = (reached.checked(result[name][key], key) for name in ("found", "float"))
        told.append(
            f"{reached.show(value)}, {_difference_words(reached, split, value, of_float)}, on the {split} split: "
            f"{reached.certainty(split, value)}"
        )
    sentence = f"Goal: {goal.words}. Found: {'; '.join(told)}"
    if reached.search_holds and not reached.test_holds:
        sentence += ", so the test split disagrees"
    if reached.search_error is None:
        sentence += f"; {reached.objective_title} is no mean over samples, so no standard error is known"
    elif not reached.paired:
        sentence += "; ± is at most the standard error"
    return f"{sentence}."


def _difference_words(reached: ReachedRecord, split: str, value: float, of_float: float) -> str:
    """Say how far a value is from the float network's, with the standard error of that: "0.42 ± 0.11 points below float"."""
    words = reached.held_against(value, of_float)
    error = getattr(reached, f"{split}_error")
    if not error:
        return f"{words} float"
    shown = show_error(error, reached.objective_unit)
    number, space, rest = words.partition(" ")
    if not number[0].isdigit():
        return f"{words} float (± {shown}{_points(reached)})"
    return f"{number} ± {shown}{space}{rest} float"


def _points(judging: JudgingRecord) -> str:
    """Name the unit of a difference of values, with a blank before it."""
    if judging.objective_unit == PERCENT:
        return " points"
    return f" {judging.objective_unit}".rstrip()


def share_words(problem: Problem, trial: Trial) -> str:
    """Say how much of its budgets a policy uses, of the tightest of them; without any what it costs."""
    costs = problem.costs(trial.policy)
    shares = [costs[limit.metric] / limit.amount for limit in problem.limits if limit.is_given]
    if not shares:
        return describe_amount(trial.cost, problem.metric)
    return f"{max(shares):.3f}"


def best_words(problem: Problem, best: Trial | None) -> str:
    """Say what the best policy so far has: its value, and where the cheapest is looked for its cost."""
    if best is None:
        return "none within it"
    value = show(best.value, best.unit)
    if problem.goal.kind == CHEAPEST:
        return f"{describe_amount(best.cost, problem.metric)} with {value}"
    return value


def _rivals_sentence(problem: Problem, result: Mapping[str, Any]) -> str:
    """Hold what was found against the best of the rivals, by what is looked for."""
    objective, judging = problem.objective, objective_of(problem)
    key = share_key("search", objective.name)
    values = {name: judging.checked(row[key], key) for name, row in result["rivals"].items()}
    if problem.goal.kind == CHEAPEST:
        return _cheaper_sentence(problem, result, values)
    if problem.goal.kind == TRADEOFF:
        return _traded_sentence(problem, result, key)
    name = max(values, key=lambda name: judging.score(values[name]))
    error = result["rivals"][name].get(paired_key(key, "found"))
    than = judging.difference(values[name], judging.checked(result["found"][key], key), error, f"{result['solver']}'s")
    measured = ""
    if objective.also:
        measured = f" ({objective.words})"
    return (
        f"{_rivals_words(problem, result)} ({', '.join(result['rivals'])}): the best is {name} with "
        f"{judging.show(values[name])} on the search split{measured}, {than}."
    )


def _rivals_words(problem: Problem, result: Mapping[str, Any]) -> str:
    """Name solvers that were asked for the same, of channels or of bits alone."""
    words = "Rivals"
    if result.get("bits_only"):
        words = "Rivals of bits alone, with all channels,"
    if problem.goal.kind != BEST.kind:
        return f"{words} with the same goal"
    if len(problem.limits) > 1:
        return f"{words} at the same budgets"
    return f"{words} at the same budget"


def _traded_sentence(problem: Problem, result: Mapping[str, Any], key: str) -> str:
    """Hold what was found against the best of the rivals, by value and cost in one number.

    Args:
        problem: What was searched.
        result: What result.json holds.
        key: That of values on the search split.

    Returns:
        A sentence.
    """

    def worth(row: Mapping[str, Any]) -> float:
        return problem.goal.worth(float(row[key]), float(row[COST_KEYS[problem.metric]]), problem.tradeoff_target)

    rivals = result["rivals"]
    name = max(rivals, key=lambda rival: worth(rivals[rival]))
    return (
        f"{_rivals_words(problem, result)} ({', '.join(rivals)}): the best is {name} with {worth(rivals[name]):.4f}, "
        f"{result['solver']} has {worth(result['found']):.4f}."
    )


def _cheaper_sentence(problem: Problem, result: Mapping[str, Any], values: Mapping[str, float]) -> str:
    """Hold what was found against the cheapest of the rivals that is good enough.

    Args:
        problem: What was searched.
        result: What result.json holds.
        values: The rivals' values on the search split, by name.

    Returns:
        A sentence.
    """
    names = ", ".join(result["rivals"])
    float_value = problem.float_result.value
    good = [name for name, value in values.items() if problem.goal.is_met(problem.objective, value, float_value)]
    if not good:
        return f"{_rivals_words(problem, result)} ({names}): none of them found a policy that is good enough."
    key = COST_KEYS[problem.metric]
    name = min(good, key=lambda name: float(result["rivals"][name][key]))
    cost, own = float(result["rivals"][name][key]), float(result["found"][key])
    than = f"{percent(abs(cost / own - 1), 1)} more than"
    if math.isclose(cost, own, rel_tol=SAME):
        than = "as much as"
    elif cost < own:
        than = than.replace("more", "less")
    amount = describe_amount(cost, problem.metric)
    return (
        f"{_rivals_words(problem, result)} ({names}): the cheapest is {name}'s with {amount} of "
        f"{metric_words(problem.metric)}, {than} {result['solver']}'s."
    )


def print_next(console: Console, folder: Path, commands: Sequence[Sequence[Any]]) -> None:
    """Say what was written into a run's folder, and what to type next.

    Args:
        console: Where.
        folder: The folder.
        commands: The words of each command, after `haq`.
    """
    say(console, f"Written: {folder} (policy.json, policy.png, history.csv, result.json)", wrap=False)
    for name, *words in commands:
        say_next(console, "python", "-m", f"haq.{name}", *words)
