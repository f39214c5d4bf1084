"""The charts of one run: its bits, what it tried, and how it got there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import altair as alt

from haq.reporting.drawing import (
    UNIFORM,
    Picture,
    Row,
    amount,
    color_by,
    edge_of,
    edge_words,
    finished,
    front,
    is_beyond,
    legend,
    level,
    limit,
    micro,
    palette,
    plot,
    rounded,
    scale_of,
    shape_by,
    within,
)
from haq.reporting.reading import RunFolder
from haq.store.history import HistoryRow
from haq.store.records import LayerRecord, ProblemRecord
from haq.store.units import begin, best_unit, percent

LABELLED = 40  # layers, at most, whose bars have their bits written at them in full size
OPERANDS = ("weights", "activations")
WHEN = ("before, 8/8", "after")
WITHIN = {True: "within", False: "above"}


class _Cost(NamedTuple):
    """A layer with its bits, and what it costs before, at 8/8 bits, and after."""

    layer: LayerRecord
    weight_bits: int
    activation_bits: int
    before: float
    after: float


def bits(run: RunFolder) -> Picture:
    """Draw weight bits up and activation bits down, over each layer's share of the cost, as in HAQ's paper."""
    problem = run.problem
    assert run.policy is not None
    costs = []
    for layer, (weight_bits, activation_bits) in zip(problem.layers, run.policy, strict=True):
        after = layer.cost[weight_bits - 1][activation_bits - 1]
        costs.append(_Cost(layer, weight_bits, activation_bits, layer.cost[-1][-1], after))
    bars: list[Row] = []
    shares: list[Row] = []
    for cost in costs:
        chosen = "searched"
        if cost.layer.fixed:
            chosen = "fixed"
        bar = {"layer": cost.layer.name, "kind": cost.layer.kind, "chosen": chosen}
        bars.append({**bar, "operand": "weights", "bits": cost.weight_bits, "height": cost.weight_bits})
        bars.append({**bar, "operand": "activations", "bits": cost.activation_bits, "height": -cost.activation_bits})
        widths = f"{cost.weight_bits}/{cost.activation_bits}"
        for when, value, at in ((WHEN[0], cost.before, "8/8"), (WHEN[1], cost.after, widths)):
            share = rounded(100 * value / problem.uniform8)
            amounts = {"cost": amount(value, problem.metric), "share": share}
            shares.append({"layer": cost.layer.name, "when": when, "bits": at, **amounts})
    metric = problem.metric
    return Picture(
        "Bits per layer, and what each layer costs",
        _bits_say(run, costs),
        [_bars(bars, len(costs)), _shares(shares, metric, problem.cost_kind)],
        ["layer", "kind", "MACs", "parameters", "weight bits", "activation bits", f"{metric} at 8/8", "after", "share at 8/8"],
        [_bits_row(cost, problem) for cost in costs],
        _bits_note(problem),
        columns=len(costs),
    )


def _bits_say(run: RunFolder, costs: list[_Cost]) -> str:
    """Say what the chart of bits shows."""
    problem, metric = run.problem, run.problem.metric
    weights = [cost.weight_bits for cost in costs]
    activations = [cost.activation_bits for cost in costs]
    used = amount(sum(cost.after for cost in costs), metric)
    uniform8 = amount(problem.uniform8, metric)
    most = max(costs, key=lambda cost: cost.before)
    before, after = amount(most.before, metric), amount(most.after, metric)
    return (
        f"{len(costs)} layers; weights have {min(weights)} to {max(weights)} bits, {statistics.mean(weights):.1f} on average, "
        f"activations {min(activations)} to {max(activations)}, {statistics.mean(activations):.1f} on average. Together they "
        f"take {used} of {metric} instead of {uniform8} at 8/8 bits ({problem.cost_kind}). The layer that costs most at 8/8, "
        f"{most.layer.name}, goes from {before} to {after} at {most.weight_bits}/{most.activation_bits} bits."
    )


def _bits_note(problem: ProblemRecord) -> str:
    """Say how the chart of bits is to be read."""
    note = (
        "Weights up, activations (a layer's input) down, as in HAQ's paper; below them each layer's share of the "
        f"{problem.metric} ({problem.cost_kind})."
    )
    if any(layer.fixed for layer in problem.layers):
        note += " Pale bars, with a * in the table, are fixed and not searched."
    return note


def _bits_row(cost: _Cost, problem: ProblemRecord) -> list[str]:
    """Make a row of the data of the chart of bits."""
    star = ""
    if cost.layer.fixed:
        star = "*"
    return [
        cost.layer.name,
        cost.layer.kind,
        f"{cost.layer.macs:,}",
        f"{cost.layer.parameters:,}",
        f"{cost.weight_bits}{star}",
        f"{cost.activation_bits}{star}",
        amount(cost.before, problem.metric),
        amount(cost.after, problem.metric),
        percent(cost.before / problem.uniform8, 1),
    ]


# Two charts, one above the other, whose columns must meet.
_AXIS: dict[str, Any] = {"minExtent": 34, "maxExtent": 34}


def _bars(rows: list[Row], layers: int) -> dict[str, Any]:
    colors = ["var(--weights)", "var(--activations)"]
    axis = alt.Axis(values=[-8, -4, 0, 4, 8], labelExpr="abs(datum.value)", **_AXIS)
    base = plot(rows).encode(x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labels=False, ticks=False)))
    bars = base.mark_bar(strokeWidth=1.5).encode(
        y=alt.Y("height:Q", title="activations ← bits → weights", scale=alt.Scale(domain=[-9.5, 9.5], nice=False), axis=axis),
        color=color_by("operand", OPERANDS, colors),
        stroke=alt.Stroke("operand:N", scale=alt.Scale(domain=list(OPERANDS), range=colors), legend=legend(OPERANDS)),
        fillOpacity=alt.condition("datum.chosen == 'fixed'", alt.value(0.15), alt.value(1)),
        tooltip=[f"{name}:N" for name in ("layer", "kind", "operand", "bits", "chosen")],
    )
    size = 11
    if layers > LABELLED:
        size = 8
    texts = [
        base.transform_filter(f"datum.operand == '{operand}'")
        .mark_text(dy=dy, fontSize=size, color="var(--ink)")
        .encode(y="height:Q", text="bits:Q")
        for operand, dy in (("weights", -7), ("activations", 8))
    ]
    zero = plot([{"zero": 0}]).mark_rule(color="var(--muted)").encode(y="zero:Q")
    return finished(alt.layer(bars, *texts, zero), 240)


def _shares(rows: list[Row], metric: str, kind: str) -> dict[str, Any]:
    bars = plot(rows).mark_bar(strokeWidth=1)
    return finished(
        bars.encode(
            x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=170, labelOverlap=False)),
            xOffset=alt.XOffset("when:N", sort=list(WHEN)),
            y=alt.Y("share:Q", title=f"{metric}, % of 8/8", axis=alt.Axis(**_AXIS, tickCount=4)),
            color=color_by("when", WHEN, ["var(--before)", "var(--after)"]),
            stroke=alt.value("var(--after)"),
            tooltip=[
                "layer:N",
                "when:N",
                "bits:N",
                alt.Tooltip("cost:N", title=f"{metric} ({kind})"),
                alt.Tooltip("share:Q", title="% of the 8-bit network", format=".2f"),
            ],
        ),
        260,
    )


class _Uniform(NamedTuple):
    """A uniform policy on the chart of what was tried."""

    bits: int
    cost: float
    value: float


def tried(run: RunFolder) -> Picture:
    """Draw every policy tried, its value against its cost, with the Pareto front, uniform policies, budget and float."""
    problem, objective = run.problem, run.problem.objective_title
    uniform: list[_Uniform] = []
    if run.result is not None:
        uniform = [_Uniform(row.bits, row.cost, problem.value(row, "search")) for row in run.result.uniform]
    points = [(one.cost, one.accuracy) for one in run.history if one.cost < math.inf]  # the target can't do the others
    points += [(one.cost, one.value) for one in uniform]
    best = front(points, problem.higher_is_better)
    edge = edge_of(problem, [value for _, value in points])
    best_points = set(best)
    beyond = sum(is_beyond(problem, value, edge) for _, value in points)
    cells = []
    for one in run.history:
        on_front = ""
        if (one.cost, one.accuracy) in best_points:
            on_front = "yes"
        widths = [" ".join(map(str, bits)) for bits in (one.weight_bits, one.activation_bits)]
        figures = [problem.show(one.accuracy), amount(one.cost, problem.metric), WITHIN[one.within_budget]]
        cells.append([one.solver, str(one.evaluation), *figures, on_front, *widths])
    return Picture(
        f"{begin(objective)} against {problem.metric}: every policy tried",
        _tried_says(run),
        [_points(run, uniform, best, edge)],
        ["solver", "evaluation", objective, problem.metric, "budget", "Pareto front", "weight bits", "activation bits"],
        cells,
        _tried_note(problem, bool(uniform), beyond, edge),
    )


def _tried_says(run: RunFolder) -> str:
    """Say what the chart of everything tried shows."""
    problem, metric = run.problem, run.problem.metric
    inside = sum(one.within_budget for one in run.history)
    says = (
        f"{len(run.history):,} evaluations by {', '.join(_solvers(run))}, {inside:,} of them within the budget of "
        f"{amount(problem.limit, metric)} ({problem.cost_kind}). "
    )
    if run.best is not None:
        found = f"{problem.show(run.best.accuracy)} at {amount(run.best.cost, metric)}"
        says += f"The best of {run.best.solver} within the budget, ringed, has {found}; "
    says += f"float has {problem.show(problem.float_value)}"
    if problem.images:
        says += f" on the same {problem.samples_words}"
    return f"{says}."


def _tried_note(problem: ProblemRecord, uniform: bool, beyond: int, edge: float) -> str:
    """Say how the chart of everything tried is to be read.

    Args:
        problem: What is searched.
        uniform: There are uniform policies on it.
        beyond: How many marks are drawn at its worse edge.
        edge: Where that is.
    """
    note = (
        "A filled mark is within the budget, an empty one above it. The line is the Pareto front: nothing tried costs less "
        f"and is better. {begin(problem.objective_title)} is measured on the search split, by which policies are chosen; what "
        "they are worth is told by the test split."
    )
    if uniform:
        note += " Numbers are the bits of uniform policies (fixed layers keep theirs)."
    if beyond:
        note += f" {beyond:,} {edge_words(problem, edge, 'are')}."
    return note


def _solvers(run: RunFolder) -> list[str]:
    return list(dict.fromkeys(one.solver for one in run.history))


def _points(run: RunFolder, uniform: list[_Uniform], best: list[tuple[float, float]], edge: float) -> dict[str, Any]:
    """Draw the chart of everything tried.

    Args:
        run: The run.
        uniform: Uniform policies.
        best: The Pareto front.
        edge: Where the scale ends on its worse side.
    """
    problem, objective = run.problem, run.problem.objective_title
    metric, kind = problem.metric, problem.cost_kind
    unit, size = best_unit(problem.uniform8, metric)

    def at(cost: float, value: float) -> Row:
        return {"x": rounded(cost / size), "y": rounded(problem.plotted(within(problem, value, edge)))}

    def mark(policy: str, mean: str, cost: float, value: float, holds: bool) -> Row:
        words = {"is": problem.show(value), "cost": amount(cost, metric), "within": WITHIN[holds]}
        return {"policy": policy, "mean": mean, **at(cost, value), **words}

    rows: list[Row] = []
    for one in run.history:
        if one.cost == math.inf:
            continue
        row = mark(one.solver, _means(one), one.cost, one.accuracy, one.within_budget)
        rows.append({**row, "evaluation": one.evaluation})
    names = _solvers(run)
    colors = palette(names)
    if uniform:
        names.append(UNIFORM)
        colors.append("var(--muted)")
    for bits, cost, value in uniform:
        rows.append(mark(UNIFORM, str(bits), cost, value, cost <= problem.limit * (1 + 1e-9)))
    top = max([problem.float_value, *(value for _, value in best)], key=problem.score)
    x = alt.X("x:Q", title=f"{metric}, {micro(unit)} ({kind})", scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title=problem.on_axis(f"{objective} on the search split"), scale=scale_of(problem, edge, top))
    marks = plot(rows).mark_point(size=55, strokeWidth=1.3)
    marks = marks.encode(
        x=x,
        y=y,
        color=color_by("policy", names, colors),
        fill=alt.Fill("policy:N", scale=alt.Scale(domain=names, range=colors), legend=legend(names)),
        shape=shape_by("policy", names),
        fillOpacity=alt.condition("datum.within == 'within'", alt.value(0.6), alt.value(0)),
        tooltip=[
            "policy:N",
            "evaluation:Q",
            alt.Tooltip("is:N", title=f"{objective} (measured)"),
            alt.Tooltip("cost:N", title=f"{metric} ({kind})"),
            alt.Tooltip("within:N", title="budget"),
            alt.Tooltip("mean:N", title="bits, on average"),
        ],
    )
    steps = plot([at(*point) for point in best]).mark_line(interpolate="step-after", color="var(--ink)", strokeWidth=1.2)
    layers = [
        *level(problem.float_value, "float", y, problem.objective_unit),
        *limit(problem.limit / size, "budget", x),
        steps.encode(x=x, y=y),
        marks,
    ]
    if uniform:
        widths = plot([row for row in rows if row["policy"] == UNIFORM])
        layers.append(widths.mark_text(dx=10, fontSize=11, color="var(--muted)").encode(x=x, y=y, text="mean:N"))
    if run.best is not None:
        ring = plot([at(run.best.cost, run.best.accuracy)]).mark_point(size=260, strokeWidth=2, color="var(--ink)")
        layers.append(ring.encode(x=x, y=y))
    return finished(alt.layer(*layers), 360)


def convergence(run: RunFolder) -> Picture:
    """Draw the best value within the budget so far, against evaluations, for each solver."""
    problem, objective = run.problem, run.problem.objective_title
    solvers = _solvers(run)
    rises: list[Row] = []
    ends: list[Row] = []
    values: list[float] = []
    says = []
    for solver in solvers:
        mine = [one for one in run.history if one.solver == solver]
        better = list(_records(problem, mine))
        if not better:
            says.append(f"{solver}: nothing within the budget in {mine[-1].evaluation} evaluations")
            continue
        for one in better:
            at = {"evaluation": one.evaluation, "y": rounded(problem.plotted(one.accuracy))}
            rises.append({"solver": solver, **at, "is": problem.show(one.accuracy)})
        values += [one.accuracy for one in better]
        ends.append({**rises[-1], "evaluation": mine[-1].evaluation})
        best = better[-1]
        says.append(f"{solver}: {problem.show(best.accuracy)}, first at evaluation {best.evaluation} of {mine[-1].evaluation}")
    edge = edge_of(problem, values, 0.75)
    top = max([problem.float_value, *values], key=problem.score)
    longest = max(one.evaluation for one in run.history)
    x = alt.X("evaluation:Q", title="evaluation", scale=alt.Scale(domain=[0, rounded(1.02 * longest)], nice=False))
    y = alt.Y("y:Q", title=problem.on_axis(f"best {objective} so far"), scale=scale_of(problem, edge, top))
    color = color_by("solver", solvers, palette(solvers))
    line = plot([*rises, *ends]).mark_line(interpolate="step-after", strokeWidth=1.6).encode(x=x, y=y, color=color)
    tooltip = ["solver:N", "evaluation:Q", alt.Tooltip("is:N", title=f"best {objective} (measured)")]
    marks = plot(rises).mark_point(size=50, filled=True, opacity=0.9)
    marks = marks.encode(x=x, y=y, color=color, shape=shape_by("solver", solvers), tooltip=tooltip)
    moved = "raise"
    if not problem.higher_is_better:
        moved = "lower"
    note = (
        f"{begin(objective)} on the search split (measured) of the best policy within the budget. Evaluations above it, such "
        f"as those that measure what single layers bear, {moved} no line."
    )
    if any(is_beyond(problem, value, edge) for value in values):
        note += f" What is {edge_words(problem, edge, 'is')}."
    of_float = level(problem.float_value, "float", y, problem.objective_unit)
    return Picture(
        "Convergence: the best so far",
        "; ".join(says) + ".",
        [finished(alt.layer(*of_float, line, marks), 260)],
        ["solver", "evaluation", f"best {objective} so far"],
        [[row["solver"], str(row["evaluation"]), row["is"]] for row in rises],
        note,
    )


def _records(problem: ProblemRecord, rows: list[HistoryRow]) -> Iterator[HistoryRow]:
    """Yield the evaluations within the budget that are better than all before them."""
    best = -math.inf
    for one in rows:
        score = problem.score(one.accuracy)
        if one.within_budget and score > best:
            best = score
            yield one


def _means(one: HistoryRow) -> str:
    return "/".join(f"{statistics.fmean(widths):.1f}" for widths in (one.weight_bits, one.activation_bits))
