"""Charts that compare: budgets and solvers of a sweep, networks under attack, runs with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from haq.reporting.drawing import (
    STAR,
    UNIFORM,
    Picture,
    Row,
    amount,
    color_by,
    finished,
    front,
    level,
    lowest,
    palette,
    plot,
    rounded,
    scale_of,
    shape_by,
)
from haq.reporting.reading import RunFolder
from haq.store.records import FinishedSweepRecord, RobustnessRecord, SweepFound, SweepTarget, SweepUniform
from haq.store.units import best_unit, percent


def sweep(content: FinishedSweepRecord, target: SweepTarget) -> Picture:
    """Test accuracy against the cost on one target of a sweep, by solver, with the Pareto front and uniform policies."""
    objective, metric = content.objective_title, content.metric
    judge = content.objective
    least = lowest([row.share("test", judge) for row in target.found], 1.0)
    solvers = list(dict.fromkeys(row.solver for row in target.found))
    rows = [_of_search(content, row) for row in target.found]
    rows += [_of_uniform(content, uniform, least) for uniform in target.uniform]
    best = max(target.found, key=lambda row: row.share("test", judge))
    of_float = content.of_float.share("test", judge)
    says = (
        f"{', '.join(solvers)} at budgets {', '.join(dict.fromkeys(row.budget for row in target.found))}; "
        f"{sum(row['front'] == 'yes' for row in rows)} policies are on the Pareto front. The most accurate, by {best.solver} "
        f"at budget {best.budget}, has {percent(best.share('test', judge))} on the test split at {best.fraction:.3f} of "
        f"uniform 8 bits; float has {percent(of_float)}."
    )
    note = "Ringed: on the Pareto front, nothing costs less and is better. Numbers are the bits of uniform policies."
    if lower := sum(uniform.share("test", judge) < least for uniform in target.uniform):
        note += f" {lower} of them, below {100 * least:.1f} %, are drawn at the lower edge."
    if content.asked.seeds > 1:
        note += " Marks are means over the seeds, bars reach from the smallest to the largest."
    return Picture(
        f"{target.name}: {objective} against {metric}",
        says,
        [_panel(content, target, rows, solvers, least)],
        ["policy", "budget", f"{metric} ({target.kind})", "of uniform 8 bits", f"test {objective}", "seeds", "Pareto front"],
        [
            [f"{row['policy']} {row['label']}".strip(), row["budget"], row["cost"], f"{row['x']:.3f}", row["is"], row["seeds"]]
            + (["yes"] if row["front"] == "yes" else [""])
            for row in rows
        ],
        f"{note} {objective.capitalize()} is measured, cost is {target.cost_is}.",
    )


def _of_search(content: FinishedSweepRecord, row: SweepFound) -> Row:
    share = row.share("test", content.objective)
    low, high = row.spread("test", content.objective)
    seeds = "one"
    if len(row.runs) > 1:
        seeds = f"{percent(low)} to {percent(high)}, {len(row.runs)} seeds"
    return {
        "policy": row.solver,
        "budget": row.budget,
        "label": "",
        "seeds": seeds,
        "is": percent(share),
        "cost": amount(row.cost, content.metric),
        "front": "yes" if row.pareto else "no",
        "x": rounded(row.fraction),
        "y": rounded(100 * share),
        "low": rounded(100 * low),
        "high": rounded(100 * high),
    }


def _of_uniform(content: FinishedSweepRecord, row: SweepUniform, least: float) -> Row:
    share = row.share("test", content.objective)
    return {
        "policy": UNIFORM,
        "budget": "",
        "label": str(row.bits),
        "seeds": "",
        "is": percent(share),
        "cost": amount(row.cost, content.metric),
        "front": "yes" if row.pareto else "no",
        "x": rounded(row.fraction),
        "y": rounded(100 * max(share, least)),
    }


def _panel(
    content: FinishedSweepRecord, target: SweepTarget, rows: list[Row], solvers: list[str], least: float
) -> dict[str, Any]:
    objective, names = content.objective_title, [*solvers, UNIFORM]
    of_float = content.of_float.share("test", content.objective)
    x = alt.X("x:Q", title=f"{content.metric}, fraction of uniform 8 bits ({target.kind})", scale=alt.Scale(zero=False))
    scale = scale_of(least, max(of_float, *(row["y"] / 100 for row in rows)))
    y = alt.Y("y:Q", title=f"test {objective}, % (measured)", scale=scale)
    low = alt.Y("low:Q", title=f"test {objective}, % (measured)", scale=scale)
    color = color_by("policy", names, [*palette(solvers), "var(--muted)"])
    searched = plot([row for row in rows if row["policy"] != UNIFORM])
    tooltip = [
        "policy:N",
        alt.Tooltip("label:N", title="bits"),
        "budget:N",
        alt.Tooltip("is:N", title=f"test {objective} (measured)"),
        "seeds:N",
        alt.Tooltip("cost:N", title=f"{content.metric} ({target.kind})"),
        alt.Tooltip("front:N", title="Pareto front"),
    ]
    marks = plot(rows).mark_point(size=60, filled=True, opacity=0.9)
    rings = plot([row for row in rows if row["front"] == "yes"]).mark_point(size=200, strokeWidth=1.5, color="var(--ink)")
    return finished(
        alt.layer(
            *level(of_float, "float", y),
            searched.mark_line(strokeWidth=1.4).encode(x=x, y=y, color=color),
            searched.mark_rule(strokeWidth=1.5).encode(x=x, y=low, y2="high:Q", color=color),
            rings.encode(x=x, y=y),
            marks.encode(x=x, y=y, color=color, shape=shape_by("policy", names), tooltip=tooltip),
            plot(rows).mark_text(dx=11, dy=6, fontSize=11, color="var(--muted)").encode(x=x, y=y, text="label:N"),
        ),
        320,
    )


def attacked(found: RobustnessRecord) -> Picture:
    """Accuracy against eps under PGD, a line for each network, and its worst case over all attacks."""
    first = next(iter(found.networks.values()))
    of_pixels = first.threat.norm == "linf"
    unit, names = 255 if of_pixels else 1, list(found.networks)
    curve: list[Row] = [
        {"network": name, "eps": rounded(unit * eps), "y": rounded(100 * share), "is": percent(share)}
        for name, one in found.networks.items()
        for eps, share in one.curve
    ]
    worst: list[Row] = [
        {
            "network": name,
            "eps": rounded(unit * one.threat.eps),
            "y": rounded(100 * one.worst),
            "is": f"{'at most ' if one.masked else ''}{percent(one.worst)}",
            "verdict": one.verdict,
        }
        for name, one in found.networks.items()
    ]
    says = "; ".join(
        f"{name}: {percent(one.clean)} clean, {'at most ' if one.masked else ''}{percent(one.worst)} in the worst case"
        for name, one in found.networks.items()
    )
    color, shape = color_by("network", names, palette(names)), shape_by("network", names)
    scale = "1/255 of the range of a pixel" if of_pixels else "of images in [0, 1]"
    # Stars at the largest eps need room.
    most = 1.04 * max(row["eps"] for row in [*curve, *worst])
    title = f"eps, {scale} ({first.threat.norm})"
    x = alt.X("eps:Q", title=title, scale=alt.Scale(domain=[0, rounded(most)], nice=False))
    y = alt.Y("y:Q", title="accuracy, % (measured)", scale=alt.Scale(domain=[0, 100]))
    told = ["network:N", "eps:Q", alt.Tooltip("is:N", title="accuracy under PGD")]
    told_worst = ["network:N", alt.Tooltip("is:N", title="worst case over all attacks"), "verdict:N"]
    marks, stars = (
        plot(curve).mark_point(size=40, filled=True),
        plot(worst).mark_point(size=220, strokeWidth=2, shape=STAR),
    )
    layers = (
        *level(1 / first.classes, "chance", y),
        plot(curve).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color),
        marks.encode(x=x, y=y, color=color, shape=shape, tooltip=told),
        stars.encode(x=x, y=y, color=color, tooltip=told_worst),
    )
    return Picture(
        "Accuracy against the size of a perturbation",
        f"{says}.",
        [finished(alt.layer(*layers), 300)],
        ["network", "eps", "accuracy under PGD"],
        [[str(row["network"]), f"{row['eps']:g}{'/255' if of_pixels else ''}", str(row["is"])] for row in curve],
        f"Lines: PGD alone, on {first.curve_images:,} images. Stars: the worst case over all attacks, on {found.images:,}.",
    )


def together(runs: Sequence[tuple[str, RunFolder]]) -> Picture:
    """Several searches of one network on one target: their fronts, and what each found. Each run comes with its label."""
    problem = runs[0][1].problem
    objective, metric, kind = problem.objective_title, problem.metric, problem.cost_kind
    unit, size = best_unit(problem.uniform8, metric)
    fronts = {name: front((one.cost, one.accuracy) for one in run.history if one.solver == run.solver) for name, run in runs}
    least = lowest([accuracy for points in fronts.values() for _, accuracy in points])

    def row(name: str, cost: float, accuracy: float) -> Row:
        place = {"x": rounded(cost / size), "y": rounded(100 * max(accuracy, least))}
        return {"run": name, **place, "is": percent(accuracy), "cost": amount(cost, metric)}

    steps = [row(name, *point) for name, points in fronts.items() for point in points]
    found = [row(name, run.best.cost, run.best.accuracy) for name, run in runs if run.best is not None]
    says = "; ".join(f"{one['run']}: {one['is']} at {one['cost']}" for one in found) or "nothing yet"
    names = list(fronts)
    most = max([problem.float_share, *(accuracy for points in fronts.values() for _, accuracy in points)])
    x = alt.X("x:Q", title=f"{metric}, {unit.replace('u', 'µ')} ({kind})", scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title=f"{objective} on the search split, %", scale=scale_of(least, most))
    color, shape = color_by("run", names, palette(names)), shape_by("run", names)
    tooltip = [
        "run:N",
        alt.Tooltip("is:N", title=f"{objective} (measured)"),
        alt.Tooltip("cost:N", title=f"{metric} ({kind})"),
    ]
    marks, rings = plot(steps).mark_point(size=35, filled=True), plot(found).mark_point(size=230, strokeWidth=2)
    layers = alt.layer(
        *level(problem.float_share, "float", y),
        plot(steps).mark_line(interpolate="step-after", strokeWidth=1.4).encode(x=x, y=y, color=color),
        marks.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
        rings.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
    )
    note = (
        "Each line is the Pareto front of what a run's own solver tried, the large empty mark its best within its budget. "
        f"{objective.capitalize()} is measured on the search split."
    )
    if any(accuracy < least for points in fronts.values() for _, accuracy in points):
        note += f" What is below {100 * least:.1f} % is drawn at the lower edge."
    return Picture(
        f"{problem.network} on {problem.target.name}: {objective} against {metric}",
        f"The best within each budget: {says}. Float has {percent(problem.float_share)}.",
        [finished(layers, 340)],
        ["run", f"{objective} (measured)", f"{metric} ({kind})"],
        [[one["run"], one["is"], one["cost"]] for one in steps],
        note,
    )
