"""Charts that compare: budgets and solvers of a sweep, networks under attack, runs with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

from haq.reporting.drawing import (
    STAR,
    UNIFORM,
    CostAxis,
    Picture,
    Row,
    amount,
    color_by,
    cost_axes,
    edge_of,
    edge_words,
    finished,
    front,
    is_beyond,
    level,
    micro,
    palette,
    plot,
    priced,
    rounded,
    scale_of,
    shape_by,
    within,
)
from haq.reporting.reading import RunFolder
from haq.store.records import FinishedSweepRecord, RobustnessRecord, SweepFound, SweepTarget, SweepUniform
from haq.store.units import begin, best_unit, counted, metric_words, percent
from hw_models.registry import join_words

YES_OR_NO = {True: "yes", False: "no"}


def sweep(content: FinishedSweepRecord, target: SweepTarget) -> Picture:
    """Draw test values against the cost on one target of a sweep, with the Pareto front and uniform policies."""
    metric, objective = content.metric, content.objective_title
    edge = edge_of(content, [content.value(row, "test") for row in target.found], 1.0)
    solvers = list(dict.fromkeys(row.solver for row in target.found))
    rows = [_of_search(content, row, edge) for row in target.found]
    rows += [_of_uniform(content, uniform, edge) for uniform in target.uniform]
    cells = []
    for row in rows:
        front = ""
        if row["front"] == "yes":
            front = "yes"
        policy = f"{row['policy']} {row['label']}".strip()
        cells.append([policy, row["budget"], row["cost"], f"{row['x']:.3f}", row["is"], row["seeds"], front])
    return Picture(
        f"{target.name}: {objective} against {metric_words(metric)}",
        _sweep_says(content, target, sum(row["front"] == "yes" for row in rows)),
        [_panel(content, target, rows, solvers, edge)],
        [
            "policy",
            "budget",
            f"{metric_words(metric)} ({target.kind})",
            f"of {target.reference_short}",
            f"test {objective}",
            "seeds",
            "Pareto front",
        ],
        cells,
        _sweep_note(content, target, edge),
    )


def _sweep_says(content: FinishedSweepRecord, target: SweepTarget, on_front: int) -> str:
    """Say what the chart of a sweep shows."""
    solvers = dict.fromkeys(row.solver for row in target.found)
    budgets = dict.fromkeys(row.budget for row in target.found if row.budget)
    drops = dict.fromkeys(row.max_drop for row in target.found if row.max_drop)
    asked = []
    if budgets:
        asked.append(f"budgets {', '.join(budgets)}")
    if drops:
        asked.append(f"largest drops {', '.join(drops)}")
    best = max(target.found, key=lambda row: content.score(content.value(row, "test")))
    value = content.show(content.value(best, "test"))
    of_float = content.show(content.value(content.of_float, "test"))
    return (
        f"{', '.join(solvers)} at {' and '.join(asked)}; {on_front} policies are on the Pareto front. The best one, "
        f"by {best.solver} at {best.asked_words}, has {value} on the test split at {best.fraction:.3f} of "
        f"{target.reference_short}; float has {of_float}."
    )


def _sweep_note(content: FinishedSweepRecord, target: SweepTarget, edge: float) -> str:
    """Say how the chart of a sweep is to be read."""
    note = "Ringed: on the Pareto front, nothing costs less and is better. Numbers are the bits of uniform policies."
    beyond = sum(is_beyond(content, content.value(uniform, "test"), edge) for uniform in target.uniform)
    if beyond:
        note += f" {beyond} of them, {edge_words(content, edge, ', are')}."
    if content.asked.seeds > 1:
        note += " Marks are means over the seeds, bars reach from the smallest to the largest."
    return f"{note} {begin(content.objective_title)} is measured, cost is {target.cost_is}."


def _of_search(content: FinishedSweepRecord, row: SweepFound, edge: float) -> Row:
    value = content.value(row, "test")
    low, high = content.spread(row, "test")
    seeds = "one"
    if len(row.runs) > 1:
        seeds = f"{content.show(low)} to {content.show(high)}, {len(row.runs)} seeds"
    return {
        "policy": row.solver,
        "budget": row.asked,
        "label": "",
        "seeds": seeds,
        "is": content.show(value),
        "cost": amount(row.cost, content.metric),
        "front": YES_OR_NO[row.pareto],
        "x": rounded(row.fraction),
        **_places(content, {"y": value, "low": low, "high": high}, edge),
    }


def _places(content: FinishedSweepRecord, values: dict[str, float], edge: float) -> Row:
    """Return where values are drawn, by the names of their fields; infinite ones at the edge."""
    places: Row = {}
    for name, value in values.items():
        if math.isinf(value):
            value = within(content, value, edge)
        places[name] = rounded(content.plotted(value))
    return places


def _of_uniform(content: FinishedSweepRecord, row: SweepUniform, edge: float) -> Row:
    value = content.value(row, "test")
    return {
        "policy": UNIFORM,
        "budget": "",
        "label": str(row.bits),
        "seeds": "",
        "is": content.show(value),
        "cost": amount(row.cost, content.metric),
        "front": YES_OR_NO[row.pareto],
        "x": rounded(row.fraction),
        "y": rounded(content.plotted(within(content, value, edge))),
    }


def _panel(
    content: FinishedSweepRecord, target: SweepTarget, rows: list[Row], solvers: list[str], edge: float
) -> dict[str, Any]:
    objective, names = content.objective_title, [*solvers, UNIFORM]
    of_float = content.value(content.of_float, "test")
    title = f"{metric_words(content.metric)}, fraction of {target.reference_short} ({target.kind})"
    x = alt.X("x:Q", title=title, scale=alt.Scale(zero=False))
    shown = [content.value(row, "test") for row in (*target.found, *target.uniform)]
    scale = scale_of(content, edge, max([of_float, *shown], key=content.score))
    title = f"{content.on_axis(f'test {objective}')} (measured)"
    y = alt.Y("y:Q", title=title, scale=scale)
    low = alt.Y("low:Q", title=title, scale=scale)
    color = color_by("policy", names, [*palette(solvers), "var(--muted)"])
    searched = plot([row for row in rows if row["policy"] != UNIFORM])
    tooltip = [
        "policy:N",
        alt.Tooltip("label:N", title="bits"),
        "budget:N",
        alt.Tooltip("is:N", title=f"test {objective} (measured)"),
        "seeds:N",
        alt.Tooltip("cost:N", title=f"{metric_words(content.metric)} ({target.kind})"),
        alt.Tooltip("front:N", title="Pareto front"),
    ]
    marks = plot(rows).mark_point(size=60, filled=True, opacity=0.9)
    rings = plot([row for row in rows if row["front"] == "yes"]).mark_point(size=200, strokeWidth=1.5, color="var(--ink)")
    return finished(
        alt.layer(
            *level(of_float, "float", y, content.objective_unit),
            searched.mark_line(strokeWidth=1.4).encode(x=x, y=y, color=color),
            searched.mark_rule(strokeWidth=1.5).encode(x=x, y=low, y2="high:Q", color=color),
            rings.encode(x=x, y=y),
            marks.encode(x=x, y=y, color=color, shape=shape_by("policy", names), tooltip=tooltip),
            plot(rows).mark_text(dx=11, dy=6, fontSize=11, color="var(--muted)").encode(x=x, y=y, text="label:N"),
        ),
        320,
    )


def attacked(found: RobustnessRecord) -> Picture:
    """Draw accuracy against eps under PGD, a line for each network, and its worst case over all attacks."""
    first = next(iter(found.networks.values()))
    unit, scale, after = 1, "of images in [0, 1]", ""
    if first.threat.norm == "linf":
        unit, scale, after = 255, "1/255 of the range of a pixel", "/255"
    curve: list[Row] = []
    worst: list[Row] = []
    says = []
    for name, network in found.networks.items():
        for eps, share in network.curve:
            curve.append({"network": name, "eps": rounded(unit * eps), "y": rounded(100 * share), "is": percent(share)})
        at_most = ""
        if network.masked:
            at_most = "at most "
        worst_case = f"{at_most}{percent(network.worst)}"
        worst.append(
            {
                "network": name,
                "eps": rounded(unit * network.threat.eps),
                "y": rounded(100 * network.worst),
                "is": worst_case,
                "verdict": network.verdict,
            }
        )
        says.append(f"{name}: {percent(network.clean)} clean, {worst_case} in the worst case")
    title = f"eps, {scale} ({first.threat.norm})"
    layers = _lines_and_stars(curve, worst, list(found.networks), title, 1 / first.classes)
    return Picture(
        "Accuracy against the size of a perturbation",
        f"{'; '.join(says)}.",
        [finished(alt.layer(*layers), 300)],
        ["network", "eps", "accuracy under PGD"],
        [[str(row["network"]), f"{row['eps']:g}{after}", str(row["is"])] for row in curve],
        f"Lines: PGD alone, on {counted(first.curve_images, 'images')}. Stars: the worst case over all attacks, on "
        f"{found.images:,}.",
    )


def _lines_and_stars(curve: list[Row], worst: list[Row], names: list[str], title: str, chance: float) -> list[alt.Chart]:
    """Draw the layers of the chart of networks under attack."""
    color, shape = color_by("network", names, palette(names)), shape_by("network", names)
    # Stars at the largest eps need room.
    most = 1.04 * max(row["eps"] for row in [*curve, *worst])
    x = alt.X("eps:Q", title=title, scale=alt.Scale(domain=[0, rounded(most)], nice=False))
    y = alt.Y("y:Q", title="accuracy, % (measured)", scale=alt.Scale(domain=[0, 100]))
    tooltip = ["network:N", "eps:Q", alt.Tooltip("is:N", title="accuracy under PGD")]
    tooltip_worst = ["network:N", alt.Tooltip("is:N", title="worst case over all attacks"), "verdict:N"]
    marks = plot(curve).mark_point(size=40, filled=True)
    stars = plot(worst).mark_point(size=220, strokeWidth=2, shape=STAR)
    return [
        *level(chance, "chance", y),
        plot(curve).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color),
        marks.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
        stars.encode(x=x, y=y, color=color, tooltip=tooltip_worst),
    ]


def together(runs: Sequence[tuple[str, RunFolder]]) -> Picture:
    """Draw several searches of one network on one target: their fronts, and what each found.

    Args:
        runs: The runs, each with its name.

    Returns:
        The chart.
    """
    problem = runs[0][1].problem
    objective = problem.objective_title
    axes = [axis for axis in cost_axes(problem) if all(axis.metric in _axes_of(run) for _, run in runs)]
    names = [metric_words(axis.metric) for axis in axes]
    drawn = [_fronts(runs, axis) for axis in axes]
    first = drawn[0]
    says = "; ".join(f"{one['run']}: {one['is']} at {one['cost']}" for one in first.found) or "nothing yet"
    note = (
        "Each line is the Pareto front of what a run's own solver tried, the large empty mark its best within its budget. "
        f"{begin(objective)} is measured on the search split."
    )
    if first.edge_words:
        note += f" What is {first.edge_words}."
    return Picture(
        f"{problem.network} on {problem.target.name}: {objective} against {join_words(names)}",
        f"The best within each budget: {says}. Float has {problem.show(problem.float_value)}.",
        [one.spec for one in drawn],
        ["run", f"{objective} (measured)", f"{names[0]} ({axes[0].kind})"],
        [[one["run"], one["is"], one["cost"]] for one in first.steps],
        note,
    )


class _Fronts(NamedTuple):
    """A chart of the fronts of several runs against one metric, and what is on it."""

    spec: dict[str, Any]
    steps: list[Row]
    found: list[Row]
    edge_words: str  # of what is drawn at its worse edge; nothing if nothing is


def _fronts(runs: Sequence[tuple[str, RunFolder]], axis: CostAxis) -> _Fronts:
    """Draw the fronts of several runs against one metric.

    Args:
        runs: The runs, each with its name.
        axis: The metric, as the first of them has it.

    Returns:
        The chart.
    """
    problem = runs[0][1].problem
    objective, metric, kind = problem.objective_title, axis.metric, axis.kind
    metric_is = metric_words(metric)
    unit, size = best_unit(axis.whole, metric)
    fronts = {name: front(_priced(run, metric), problem.higher_is_better) for name, run in runs}
    values = [value for points in fronts.values() for _, value in points]
    edge = edge_of(problem, values)

    def row(name: str, cost: float, value: float) -> Row:
        place = {"x": rounded(cost / size), "y": rounded(problem.plotted(within(problem, value, edge)))}
        return {"run": name, **place, "is": problem.show(value), "cost": amount(cost, metric)}

    steps = [row(name, *point) for name, points in fronts.items() for point in points]
    found = []
    for name, run in runs:
        if run.best is not None:
            found.append(row(name, _axes_of(run)[metric].cost(run.best), run.best.accuracy))
    names = list(fronts)
    x = alt.X("x:Q", title=f"{metric_is}, {micro(unit)} ({kind})", scale=alt.Scale(zero=False))
    top = max([problem.float_value, *values], key=problem.score)
    y = alt.Y("y:Q", title=problem.on_axis(f"{objective} on the search split"), scale=scale_of(problem, edge, top))
    color, shape = color_by("run", names, palette(names)), shape_by("run", names)
    tooltip = [
        "run:N",
        alt.Tooltip("is:N", title=f"{objective} (measured)"),
        alt.Tooltip("cost:N", title=f"{metric_is} ({kind})"),
    ]
    marks = plot(steps).mark_point(size=35, filled=True)
    rings = plot(found).mark_point(size=230, strokeWidth=2)
    layers = alt.layer(
        *level(problem.float_value, "float", y, problem.objective_unit),
        plot(steps).mark_line(interpolate="step-after", strokeWidth=1.4).encode(x=x, y=y, color=color),
        marks.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
        rings.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
    )
    beyond = ""
    if any(is_beyond(problem, value, edge) for value in values):
        beyond = edge_words(problem, edge, "is")
    return _Fronts(finished(layers, 340), steps, found, beyond)


def _axes_of(run: RunFolder) -> dict[str, CostAxis]:
    """Return the metrics that a run tells costs by, by name."""
    return {axis.metric: axis for axis in cost_axes(run.problem)}


def _priced(run: RunFolder, metric: str) -> list[tuple[float, float]]:
    """Cost, by a metric, and value of what a run's solver tried and the target can do."""
    return priced([one for one in run.history if one.solver == run.solver], _axes_of(run)[metric])
