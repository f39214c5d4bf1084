"""The charts of one run: its bits, what it tried, and how it got there."""

from __future__ import annotations

import statistics
from typing import Any

import altair as alt

from haq.reporting.drawing import (
    UNIFORM,
    Picture,
    Row,
    amount,
    color_by,
    finished,
    front,
    legend,
    level,
    limit,
    lowest,
    palette,
    plot,
    rounded,
    scale_of,
    shape_by,
)
from haq.reporting.reading import RunFolder
from haq.store.history import HistoryRow
from haq.store.units import best_unit, percent

LABELLED = 40  # layers, at most, whose bars have their bits written at them in full size
OPERANDS = ("weights", "activations")
WHEN = ("before, 8/8", "after")


def bits(run: RunFolder) -> Picture:
    """Weight bits up and activation bits down, over each layer's share of the cost before and after, as in HAQ's paper."""
    problem, policy = run.problem, run.policy
    assert policy is not None
    metric, kind = problem.metric, problem.cost_kind
    costs = [
        (layer, w, a, layer.cost[7][7], layer.cost[w - 1][a - 1]) for layer, (w, a) in zip(problem.layers, policy, strict=True)
    ]
    w_bits, a_bits = zip(*policy, strict=True)
    used = sum(after for *_, after in costs)
    layer, w, a, before, after = max(costs, key=lambda one: one[3])
    says = (
        f"{len(policy)} layers; weights have {min(w_bits)} to {max(w_bits)} bits, {statistics.mean(w_bits):.1f} on average, "
        f"activations {min(a_bits)} to {max(a_bits)}, {statistics.mean(a_bits):.1f} on average. Together they take "
        f"{amount(used, metric)} of {metric} instead of {amount(problem.uniform8, metric)} at 8/8 bits ({kind}). The layer "
        f"that costs most at 8/8, {layer.name}, goes from {amount(before, metric)} to {amount(after, metric)} at {w}/{a} bits."
    )
    note = (
        "Weights up, activations (a layer's input) down, as in HAQ's paper; below them each layer's share of the "
        f"{metric} ({kind})."
    )
    if any(layer.fixed for layer in problem.layers):
        note += " Pale bars, with a * in the table, are fixed and not searched."
    rows, shares = [], []
    for layer, w, a, before, after in costs:
        told = {"layer": layer.name, "kind": layer.kind, "chosen": "fixed" if layer.fixed else "searched"}
        rows += [{**told, "operand": "weights", "bits": w, "height": w}]
        rows += [{**told, "operand": "activations", "bits": a, "height": -a}]
        for when, cost, widths in ((WHEN[0], before, "8/8"), (WHEN[1], after, f"{w}/{a}")):
            share = rounded(100 * cost / problem.uniform8)
            shares.append({"layer": layer.name, "when": when, "bits": widths, "cost": amount(cost, metric), "share": share})
    star = {True: "*", False: ""}
    return Picture(
        "Bits per layer, and what each layer costs",
        says,
        [_bars(rows, len(costs)), _shares(shares, metric, kind)],
        ["layer", "kind", "MACs", "parameters", "weight bits", "activation bits", f"{metric} at 8/8", "after", "share at 8/8"],
        [
            [
                layer.name,
                layer.kind,
                f"{layer.macs:,}",
                f"{layer.parameters:,}",
                f"{w}{star[layer.fixed]}",
                f"{a}{star[layer.fixed]}",
                amount(before, metric),
                amount(after, metric),
                f"{100 * before / problem.uniform8:.1f} %",
            ]
            for layer, w, a, before, after in costs
        ],
        note,
        columns=len(costs),
    )


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
    texts = [
        base.transform_filter(f"datum.operand == '{operand}'")
        .mark_text(dy=dy, fontSize=11 if layers <= LABELLED else 8, color="var(--ink)")
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


def tried(run: RunFolder) -> Picture:
    """Every policy tried as accuracy against cost, by solver, with the Pareto front, uniform policies, budget and float."""
    problem, objective = run.problem, run.problem.objective_title
    metric, kind = problem.metric, problem.cost_kind
    solvers = list(dict.fromkeys(one.solver for one in run.history))
    uniform = [
        (one.bits, one.cost, one.share("search", problem.objective)) for one in (run.result.uniform if run.result else [])
    ]
    points = [(one.cost, one.accuracy) for one in run.history] + [(cost, accuracy) for _, cost, accuracy in uniform]
    best, least = front(points), lowest([accuracy for _, accuracy in points])
    note = (
        "A filled mark is within the budget, an empty one above it. The line is the Pareto front: nothing tried costs less "
        f"and is better. {objective.capitalize()} is measured on the search split, by which policies are chosen; what they "
        "are worth is told by the test split."
    )
    if uniform:
        note += " Numbers are the bits of uniform policies (fixed layers keep theirs)."
    if lower := sum(accuracy < least for _, accuracy in points):
        note += f" {lower:,} below {100 * least:.1f} % are drawn at the lower edge."
    inside = sum(one.within_budget for one in run.history)
    says = (
        f"{len(run.history):,} evaluations by {', '.join(solvers)}, {inside:,} of them within the budget of "
        f"{amount(problem.limit, metric)} ({kind}). "
    )
    if run.best is not None:
        found = f"{percent(run.best.accuracy)} at {amount(run.best.cost, metric)}"
        says += f"The best of {run.best.solver} within the budget, ringed, has {found}; "
    says += f"float has {percent(problem.float_share)} on the same {problem.images:,} images."
    on_front = set(best)
    return Picture(
        f"{objective.capitalize()} against {metric}: every policy tried",
        says,
        [_points(run, solvers, uniform, best, least)],
        ["solver", "evaluation", objective, metric, "budget", "Pareto front", "weight bits", "activation bits"],
        [
            [
                one.solver,
                str(one.evaluation),
                percent(one.accuracy),
                amount(one.cost, metric),
                "within" if one.within_budget else "above",
                "yes" if (one.cost, one.accuracy) in on_front else "",
                *(" ".join(map(str, widths)) for widths in (one.weight_bits, one.activation_bits)),
            ]
            for one in run.history
        ],
        note,
    )


def _points(
    run: RunFolder,
    solvers: list[str],
    uniform: list[tuple[int, float, float]],
    best: list[tuple[float, float]],
    least: float,
) -> dict[str, Any]:
    problem, objective = run.problem, run.problem.objective_title
    metric, kind = problem.metric, problem.cost_kind
    unit, size = best_unit(problem.uniform8, metric)

    def at(cost: float, accuracy: float) -> Row:
        return {"x": rounded(cost / size), "y": rounded(100 * max(accuracy, least))}

    def told(cost: float, accuracy: float, within: bool) -> Row:
        words = {"is": percent(accuracy), "cost": amount(cost, metric), "within": "within" if within else "above"}
        return {**at(cost, accuracy), **words}

    rows: list[Row] = [
        {"policy": one.solver, "evaluation": one.evaluation, "mean": _means(one)}
        | told(one.cost, one.accuracy, one.within_budget)
        for one in run.history
    ]
    rows += [
        {"policy": UNIFORM, "mean": str(width)} | told(cost, accuracy, cost <= problem.limit * (1 + 1e-9))
        for width, cost, accuracy in uniform
    ]
    names = [*solvers, UNIFORM] if uniform else solvers
    colors = [*palette(solvers), "var(--muted)"] if uniform else palette(solvers)
    most = max([problem.float_share, *(accuracy for _, accuracy in best)])
    x = alt.X("x:Q", title=f"{metric}, {unit.replace('u', 'µ')} ({kind})", scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title=f"{objective} on the search split, %", scale=scale_of(least, most))
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
        *level(problem.float_share, "float", y),
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
    """The best accuracy within the budget so far, against evaluations, for each solver."""
    objective = run.problem.objective_title
    solvers = list(dict.fromkeys(one.solver for one in run.history))
    rises: list[Row] = []
    ends: list[Row] = []
    says = []
    for solver in solvers:
        mine = [one for one in run.history if one.solver == solver]
        best = -1.0
        for one in mine:
            if one.within_budget and one.accuracy > best:
                best = one.accuracy
                rises.append({"solver": solver, "evaluation": one.evaluation, "y": rounded(100 * best), "is": percent(best)})
        if best < 0:
            says.append(f"{solver}: nothing within the budget in {mine[-1].evaluation} evaluations")
        else:
            ends.append({**rises[-1], "evaluation": mine[-1].evaluation})
            says.append(f"{solver}: {percent(best)}, first at evaluation {rises[-1]['evaluation']} of {mine[-1].evaluation}")
    least = lowest([row["y"] / 100 for row in rises], 0.75)
    most = max([run.problem.float_share, *(row["y"] / 100 for row in rises)])
    longest = max(one.evaluation for one in run.history)
    x = alt.X("evaluation:Q", title="evaluation", scale=alt.Scale(domain=[0, rounded(1.02 * longest)], nice=False))
    y = alt.Y("y:Q", title=f"best {objective} so far, %", scale=scale_of(least, most))
    color = color_by("solver", solvers, palette(solvers))
    line = plot([*rises, *ends]).mark_line(interpolate="step-after", strokeWidth=1.6).encode(x=x, y=y, color=color)
    tooltip = ["solver:N", "evaluation:Q", alt.Tooltip("is:N", title=f"best {objective} (measured)")]
    marks = plot(rises).mark_point(size=50, filled=True, opacity=0.9)
    marks = marks.encode(x=x, y=y, color=color, shape=shape_by("solver", solvers), tooltip=tooltip)
    note = (
        f"{objective.capitalize()} on the search split (measured) of the best policy within the budget. Evaluations above it, "
        "such as those that measure what single layers bear, raise no line."
    )
    if any(row["y"] / 100 < least for row in rises):
        note += f" What is below {100 * least:.1f} % is drawn at the lower edge."
    return Picture(
        "Convergence: the best so far",
        "; ".join(says) + ".",
        [finished(alt.layer(*level(run.problem.float_share, "float", y), line, marks), 260)],
        ["solver", "evaluation", f"best {objective} so far"],
        [[row["solver"], str(row["evaluation"]), row["is"]] for row in rises],
        note,
    )


def _means(one: HistoryRow) -> str:
    return "/".join(f"{statistics.fmean(widths):.1f}" for widths in (one.weight_bits, one.activation_bits))
