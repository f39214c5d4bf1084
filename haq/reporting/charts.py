"""The charts of one run: its bits, what it tried, and how it got there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import altair as alt

from haq.reporting.drawing import (
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
    legend,
    level,
    limit,
    micro,
    micro_words,
    palette,
    plot,
    priced,
    rounded,
    scale_of,
    shape_by,
    within,
)
from haq.reporting.heights import NOT_TO_SCALE, height_of, ticks_of, top_of
from haq.reporting.reading import RunFolder
from haq.store.history import HistoryRow, share_words
from haq.store.records import ChannelsRecord, LayerChannels, LayerRecord, ProblemRecord
from haq.store.units import NOTHING, begin, best_unit, counted, metric_words, percent
from hw_models.registry import join_words
from hw_models.storage import BITS
from hw_models.widths import FLOAT, pair_words, width_words

LABELLED = 40  # layers, at most, whose bars have their bits written at them in full size
OPERANDS = ("weights", "activations")
AFTER = "after"
MUCH_DEARER = 1.5  # times what all else costs at most: there a uniform policy isn't drawn any more


class _Cost(NamedTuple):
    """A layer with its widths, float being 32, and what it costs before, in the reference, and after."""

    layer: LayerRecord
    weight_bits: int
    activation_bits: int
    before: float
    after: float | None  # None where channels are pruned and what the smaller layers cost isn't told yet
    channels: LayerChannels | None  # what is left of it; None where all is

    @property
    def words(self) -> str:
        """Write the widths of weights and activations."""
        return pair_words(self.weight_bits, self.activation_bits)


def bits(run: RunFolder) -> Picture:
    """Draw weight bits up and activation bits down, over each layer's share of the cost, as in HAQ's paper.

    Where channels are searched too, the share of its output channels that every layer keeps stands between them.
    """
    problem = run.problem
    assert run.policy is not None
    costs = []
    for place, (layer, (weight_bits, activation_bits)) in enumerate(zip(problem.layers, run.policy, strict=True)):
        left = None
        after: float | None = layer.cost_at(weight_bits, activation_bits) or 0.0
        if run.channels is not None:
            left = run.channels.layers[place]
            after = left.cost or 0.0
        elif run.keep:
            after = None
        before = layer.cost_at(*problem.before[place]) or 0.0
        costs.append(_Cost(layer, weight_bits, activation_bits, before, after, left))
    when = (f"before, {problem.before_words}", AFTER)
    bars: list[Row] = []
    shares: list[Row] = []
    for cost in costs:
        chosen = "searched"
        if cost.layer.fixed:
            chosen = "fixed"
        bar = {"layer": cost.layer.name, "kind": cost.layer.kind, "chosen": chosen}
        for operand, width, sign in (("weights", cost.weight_bits, 1), ("activations", cost.activation_bits, -1)):
            bars.append({**bar, "operand": operand, "bits": _bar_label(width), "height": sign * height_of(width)})
        for time, value, at in ((when[0], cost.before, problem.before_words), (AFTER, cost.after, cost.words)):
            if value is None:
                continue
            share = rounded(100 * value / problem.uniform8)
            amounts = {"cost": amount(value, problem.metric), "share": share}
            shares.append({"layer": cost.layer.name, "when": time, "bits": at, **amounts})
    metric = metric_words(problem.metric)
    widths = [width for cost in costs for width in (cost.weight_bits, cost.activation_bits)]
    title = "Bits per layer, and what each layer costs"
    specs = [_bars(bars, len(costs), widths), _shares(shares, problem, when)]
    kept = []
    if run.channels is not None:
        title = "Channels and bits per layer, and what each layer costs"
        specs.insert(1, _kept(run.channels))
        kept = ["output channels kept"]
    return Picture(
        title,
        _bits_say(run, costs),
        specs,
        [
            "layer",
            "kind",
            "MACs",
            "parameters",
            *kept,
            "weight bits",
            "activation bits",
            f"{metric} {_at(problem)}",
            "after",
            f"share {_at(problem)}",
        ],
        [_bits_row(cost, problem) for cost in costs],
        _bits_note(problem, widths) + _channels_note(run),
        columns=len(costs),
    )


def _bar_label(width: int) -> int | str:
    """Return what stands at a bar: its width."""
    if width == FLOAT:
        return width_words(width)
    return width


def _at(problem: ProblemRecord) -> str:
    """Say what costs before are of: "at 8/8"."""
    if problem.before_words == "reference":
        return "in the reference"
    return f"at {problem.before_words}"


def _bits_say(run: RunFolder, costs: list[_Cost]) -> str:
    """Say what the chart of bits shows."""
    problem, metric = run.problem, run.problem.metric
    weights = [cost.weight_bits for cost in costs]
    activations = [cost.activation_bits for cost in costs]
    least_w, most_w, least_a, most_a = map(width_words, (min(weights), max(weights), min(activations), max(activations)))
    says = (
        f"{counted(len(costs), 'layers')}; weights have {least_w} to {most_w} bits, {statistics.mean(weights):.1f} on "
        f"average, activations {least_a} to {most_a}, {statistics.mean(activations):.1f} on average."
    )
    if run.channels is not None:
        says += f" {begin(run.channels.words)}."
    afterwards = [cost.after for cost in costs if cost.after is not None]
    if len(afterwards) < len(costs):
        return says
    used = amount(sum(afterwards), metric)
    uniform8 = amount(problem.uniform8, metric)
    most = max(costs, key=lambda cost: cost.before)
    before, after = amount(most.before, metric), amount(most.after or 0.0, metric)
    return (
        f"{says} Together they "
        f"take {used} of {metric_words(metric)} instead of {uniform8} {problem.at_before} ({problem.cost_kind}). The layer "
        f"that costs most {_at(problem)}, {most.layer.name}, goes from {before} to {after} at {most.words} bits."
    )


def _channels_note(run: RunFolder) -> str:
    """Say how channels are shown, or which are kept of a run that isn't finished; nothing where none are searched."""
    if run.channels is not None:
        return " Channels: the output channels of a layer that are kept, of all; costs after are of the smaller layers."
    if not run.keep:
        return ""
    kept = ", ".join(f"{name} {share:.4g}" for name, share in run.keep.items())
    return f" Of its channels it keeps a part, so that layers cost less than at these bits alone: {kept}."


def _bits_note(problem: ProblemRecord, widths: list[int]) -> str:
    """Say how the chart of bits is to be read.

    Args:
        problem: What is searched.
        widths: All that are drawn.

    Returns:
        Sentences.
    """
    note = (
        "Weights up, activations (a layer's input) down, as in HAQ's paper; below them each layer's share of the "
        f"{metric_words(problem.metric)} ({problem.cost_kind})."
    )
    if max(widths) > BITS:
        note += f" {NOT_TO_SCALE}"
    if FLOAT in widths:
        note += f" Float counts {FLOAT} bits in averages."
    if any(layer.fixed for layer in problem.layers):
        note += " Pale bars, with a * in the table, are fixed and not searched."
    return note


def _bits_row(cost: _Cost, problem: ProblemRecord) -> list[str]:
    """Make a row of the data of the chart of bits."""
    star = ""
    if cost.layer.fixed:
        star = "*"
    macs, parameters = f"{cost.layer.macs:,}", f"{cost.layer.parameters:,}"
    kept = []
    if cost.channels is not None:
        macs, parameters = f"{cost.channels.macs:,}", f"{cost.channels.parameters:,}"
        kept = [cost.channels.outputs_words]
    after = NOTHING
    if cost.after is not None:
        after = amount(cost.after, problem.metric)
    return [
        cost.layer.name,
        cost.layer.kind,
        macs,
        parameters,
        *kept,
        f"{width_words(cost.weight_bits)}{star}",
        f"{width_words(cost.activation_bits)}{star}",
        amount(cost.before, problem.metric),
        after,
        percent(cost.before / problem.uniform8, 1),
    ]


# Two charts, one above the other, whose columns must meet.
_AXIS: dict[str, Any] = {"minExtent": 34, "maxExtent": 34}


def _bars(rows: list[Row], layers: int, widths: list[int]) -> dict[str, Any]:
    """Draw bars of bits, weights up and activations down.

    Args:
        rows: A row for each bar.
        layers: How many layers there are.
        widths: All that are drawn, float being 32.

    Returns:
        What Vega-Lite draws.
    """
    colors = ["var(--weights)", "var(--activations)"]
    marks = ticks_of(widths)
    edge = top_of(widths) + 1.5
    values = [*(-height for height in reversed(marks)), 0, *marks]
    # Vega leaves out values of which there are more than it counts.
    axis = alt.Axis(values=values, tickCount=len(values), labelExpr=_label_of(marks), labelOverlap=False, **_AXIS)
    base = plot(rows).encode(x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labels=False, ticks=False)))
    bars = base.mark_bar(strokeWidth=1.5).encode(
        y=alt.Y(
            "height:Q", title="activations ← bits → weights", scale=alt.Scale(domain=[-edge, edge], nice=False), axis=axis
        ),
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
        .encode(y="height:Q", text="bits:N")
        for operand, dy in (("weights", -7), ("activations", 8))
    ]
    zero = plot([{"zero": 0}]).mark_rule(color="var(--muted)").encode(y="zero:Q")
    return finished(alt.layer(bars, *texts, zero), 240)


def _kept(channels: ChannelsRecord) -> dict[str, Any]:
    """Draw the share of its output channels that every layer keeps, with their number.

    Args:
        channels: What is kept.

    Returns:
        What Vega-Lite draws.
    """
    rows: list[Row] = [
        {
            "layer": layer.name,
            "kept": layer.outputs_words,
            "share": rounded(100 * layer.outputs / max(layer.of_outputs, 1)),
            "of": 100,
        }
        for layer in channels.layers
    ]
    base = plot(rows).encode(x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labels=False, ticks=False)))
    scale = alt.Scale(domain=[0, 120], nice=False)
    axis = alt.Axis(values=[0, 50, 100], **_AXIS)
    tooltip = ["layer:N", alt.Tooltip("kept:N", title="output channels kept")]
    whole = base.mark_bar(color="var(--before)").encode(y=alt.Y("of:Q", title="channels kept, %", scale=scale, axis=axis))
    bars = base.mark_bar(color="var(--after)").encode(y=alt.Y("share:Q", scale=scale, axis=axis), tooltip=tooltip)
    size = 11
    if len(rows) > LABELLED:
        size = 8
    number = alt.Text("number:N")
    texts = (
        base.transform_calculate(number="split(datum.kept, '/')[0]")
        .mark_text(dy=-7, fontSize=size, color="var(--ink)")
        .encode(y=alt.Y("share:Q", scale=scale, axis=axis), text=number)
    )
    return finished(alt.layer(whole, bars, texts), 130)


def _label_of(marks: dict[int, str]) -> str:
    """Write the expression by which Vega labels an axis of bits, whose wide bars aren't as tall as their widths."""
    expression = "abs(datum.value)"
    for height, words in marks.items():
        if words != str(height):
            expression = f"abs(datum.value) == {height} ? '{words}' : {expression}"
    return expression


def _shares(rows: list[Row], problem: ProblemRecord, when: tuple[str, str]) -> dict[str, Any]:
    """Draw each layer's share of the cost, before and after.

    Args:
        rows: A row for each bar.
        problem: What is searched.
        when: What the two are called.

    Returns:
        What Vega-Lite draws.
    """
    metric, kind = metric_words(problem.metric), problem.cost_kind
    of_what, whole = "8/8", "the 8-bit network"
    if problem.before_words != "8/8":
        of_what = whole = "the reference"
    bars = plot(rows).mark_bar(strokeWidth=1)
    return finished(
        bars.encode(
            x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=170, labelOverlap=False)),
            xOffset=alt.XOffset("when:N", sort=list(when)),
            y=alt.Y("share:Q", title=f"{metric}, % of {of_what}", axis=alt.Axis(**_AXIS, tickCount=4)),
            color=color_by("when", when, ["var(--before)", "var(--after)"]),
            stroke=alt.value("var(--after)"),
            tooltip=[
                "layer:N",
                "when:N",
                "bits:N",
                alt.Tooltip("cost:N", title=f"{metric} ({kind})"),
                alt.Tooltip("share:Q", title=f"% of {whole}", format=".2f"),
            ],
        ),
        260,
    )


class _Uniform(NamedTuple):
    """A uniform policy on the chart of what was tried."""

    bits: int | str
    cost: float
    value: float


def tried(run: RunFolder) -> Picture:
    """Draw every policy tried, its value against its costs, with the Pareto front, uniform policies, budgets and float."""
    problem, objective = run.problem, run.problem.objective_title
    axes = cost_axes(problem)
    uniform: list[_Uniform] = []
    if run.result is not None:
        uniform = [_Uniform(row.bits, row.cost, problem.value(row, "search")) for row in run.result.uniform]
    uniform, dear = _with_room(run, uniform)
    points = [(one.cost, one.accuracy) for one in run.history if one.cost < math.inf]  # the target can't do the others
    points += [(one.cost, one.value) for one in uniform]
    best = front([*priced(run.history, axes[0]), *((one.cost, one.value) for one in uniform)], problem.higher_is_better)
    edge = edge_of(problem, [value for _, value in points])
    best_points = set(best)
    beyond = sum(is_beyond(problem, value, edge) for _, value in points)
    cells = []
    for one in run.history:
        on_front = ""
        if one.whole and (one.cost, one.accuracy) in best_points:
            on_front = "yes"
        widths = [" ".join(map(width_words, bits)) for bits in (one.weight_bits, one.activation_bits)]
        if problem.pruning is not None:
            widths.append(" ".join(map(share_words, one.keep)))
        costs = [_amount(axis.cost(one), axis.metric) for axis in axes]
        cells.append(
            [
                one.solver,
                str(one.evaluation),
                problem.show(one.accuracy),
                *costs,
                problem.verdicts[one.within_budget],
                on_front,
                *widths,
            ]
        )
    specs = [_points(run, axes[0], uniform, best, edge)]
    for axis in axes[1:]:
        best_by_axis = front(priced(run.history, axis), problem.higher_is_better)
        specs += [_points(run, axis, [], best_by_axis, edge)]
    verdict = "budget"
    if problem.goal is not None or len(axes) > 1:
        verdict = "verdict"
    names = [metric_words(axis.metric) for axis in axes]
    kept = []
    if problem.pruning is not None:
        kept = ["shares of channels kept"]
    return Picture(
        f"{begin(objective)} against {join_words(names)}: every policy tried",
        _tried_says(run),
        specs,
        [
            "solver",
            "evaluation",
            objective,
            *names,
            verdict,
            "Pareto front",
            "weight bits",
            "activation bits",
            *kept,
        ],
        cells,
        _tried_note(problem, bool(uniform), beyond, edge) + _dear_words(problem, dear),
    )


def _with_room(run: RunFolder, uniform: list[_Uniform]) -> tuple[list[_Uniform], list[_Uniform]]:
    """Part uniform policies from those that are so dear that all else would be pressed to the left, such as one in float."""
    problem = run.problem
    costs = [one.cost for one in run.history if one.cost < math.inf]
    most = MUCH_DEARER * max([*costs, problem.uniform8, problem.limit or 0.0])
    return [one for one in uniform if one.cost <= most], [one for one in uniform if one.cost > most]


def _dear_words(problem: ProblemRecord, dear: list[_Uniform]) -> str:
    """Say which uniform policies lie beyond the right edge; nothing if none do."""
    if not dear:
        return ""
    named = [f"{one.bits} ({problem.show(one.value)} at {amount(one.cost, problem.metric)})" for one in dear]
    return f" Uniform policies that cost much more lie beyond the right edge: {', '.join(named)}."


def _amount(cost: float, metric: str) -> str:
    """Write what a policy costs; a dash where the target can't do it."""
    if math.isinf(cost):
        return NOTHING
    return amount(cost, metric)


def _tried_says(run: RunFolder) -> str:
    """Say what the chart of everything tried shows."""
    problem, metric = run.problem, run.problem.metric
    inside = sum(one.within_budget for one in run.history)
    evaluations = counted(len(run.history), "evaluations")
    says = f"{evaluations} by {', '.join(_solvers(run))}, {inside:,} of them {_inside_words(problem)}. "
    if cut := sum(not one.whole for one in run.history):
        says += f"{cut:,} ended early, and have the value of the {problem.samples_are} that were looked at. "
    if run.best is not None:
        found = f"{problem.show(run.best.accuracy)} at {amount(run.best.cost, metric)}"
        says += f"The {_best_words(problem)} of {run.best.solver}, ringed, has {found}; "
    says += f"float has {problem.show(problem.float_value)}"
    if problem.images:
        says += f" on the same {problem.samples_words}"
    return f"{says}."


def _inside_words(problem: ProblemRecord) -> str:
    """Say what policies are that may be chosen, as a sentence goes on."""
    if problem.is_cheapest:
        assert problem.goal is not None
        words = f"good enough ({problem.show(problem.goal.least)} or better)"
        if problem.limit_words:
            words += f" within {micro_words(problem.limit_words)}"
        return words
    if problem.further:
        return f"within {micro_words(problem.limit_words)}"
    if problem.limit is None:
        return "free to be chosen"
    return f"within the budget of {amount(problem.limit, problem.metric)} ({problem.cost_kind})"


def _best_words(problem: ProblemRecord) -> str:
    """Name what is looked for."""
    if problem.is_cheapest:
        return "cheapest"
    if problem.is_tradeoff:
        return "best trade-off"
    if problem.further:
        return "best within all budgets"
    return "best within the budget"


def _tried_note(problem: ProblemRecord, uniform: bool, beyond: int, edge: float) -> str:
    """Say how the chart of everything tried is to be read.

    Args:
        problem: What is searched.
        uniform: There are uniform policies on it.
        beyond: How many marks are drawn at its worse edge.
        edge: Where that is.
    """
    filled = "A filled mark is within the budget, an empty one above it."
    if problem.is_cheapest or problem.further:
        filled = "A filled mark may be chosen, an empty one misses a budget."
    if problem.is_cheapest:
        filled = "A filled mark is good enough and within the budgets, if there are any; an empty one isn't."
    if problem.is_tradeoff:
        filled = f"Looked for is {problem.goal_words}."
    note = (
        f"{filled} The line is the Pareto front: nothing tried costs less "
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


def _points(
    run: RunFolder, axis: CostAxis, uniform: list[_Uniform], best: list[tuple[float, float]], edge: float
) -> dict[str, Any]:
    """Draw the chart of everything tried, against one metric.

    Args:
        run: The run.
        axis: The metric.
        uniform: Uniform policies.
        best: The Pareto front.
        edge: Where the scale ends on its worse side.
    """
    problem, objective = run.problem, run.problem.objective_title
    metric, kind = axis.metric, axis.kind
    unit, size = best_unit(axis.whole, metric)
    yes = problem.verdicts[True]

    def at(cost: float, value: float) -> Row:
        return {"x": rounded(cost / size), "y": rounded(problem.plotted(within(problem, value, edge)))}

    def mark(policy: str, mean: str, cost: float, value: float, holds: bool) -> Row:
        words = {"is": problem.show(value), "cost": amount(cost, metric), "within": problem.verdicts[holds]}
        return {"policy": policy, "mean": mean, **at(cost, value), **words}

    rows: list[Row] = []
    for one in run.history:
        if axis.cost(one) == math.inf:
            continue
        row = mark(one.solver, _means(one), axis.cost(one), one.accuracy, one.within_budget)
        rows.append({**row, "evaluation": one.evaluation})
    names = _solvers(run)
    colors = palette(names)
    if uniform:
        names.append(UNIFORM)
        colors.append("var(--muted)")
    for bits, cost, value in uniform:
        rows.append(mark(UNIFORM, str(bits), cost, value, _may_be_chosen(problem, cost, value)))
    top = max([problem.float_value, *(value for _, value in best)], key=problem.score)
    x = alt.X("x:Q", title=f"{metric_words(metric)}, {micro(unit)} ({kind})", scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title=problem.on_axis(f"{objective} on the search split"), scale=scale_of(problem, edge, top))
    marks = plot(rows).mark_point(size=55, strokeWidth=1.3)
    marks = marks.encode(
        x=x,
        y=y,
        color=color_by("policy", names, colors),
        fill=alt.Fill("policy:N", scale=alt.Scale(domain=names, range=colors), legend=legend(names)),
        shape=shape_by("policy", names),
        fillOpacity=alt.condition(f"datum.within == '{yes}'", alt.value(0.6), alt.value(0)),
        tooltip=[
            "policy:N",
            "evaluation:Q",
            alt.Tooltip("is:N", title=f"{objective} (measured)"),
            alt.Tooltip("cost:N", title=f"{metric_words(metric)} ({kind})"),
            alt.Tooltip("within:N", title="budget"),
            alt.Tooltip("mean:N", title="bits, on average"),
        ],
    )
    steps = plot([at(*point) for point in best]).mark_line(interpolate="step-after", color="var(--ink)", strokeWidth=1.2)
    layers = [
        *level(problem.float_value, "float", y, problem.objective_unit),
        *_bounds(problem, axis, size, x, y),
        steps.encode(x=x, y=y),
        marks,
    ]
    if uniform:
        widths = plot([row for row in rows if row["policy"] == UNIFORM])
        layers.append(widths.mark_text(dx=10, fontSize=11, color="var(--muted)").encode(x=x, y=y, text="mean:N"))
    if run.best is not None:
        ring = plot([at(axis.cost(run.best), run.best.accuracy)]).mark_point(size=260, strokeWidth=2, color="var(--ink)")
        layers.append(ring.encode(x=x, y=y))
    return finished(alt.layer(*layers), 360)


def _may_be_chosen(problem: ProblemRecord, cost: float, value: float) -> bool:
    """Tell whether a policy is good enough and within the main budget, but for rounding."""
    holds = problem.limit is None or cost <= problem.limit * (1 + 1e-9)
    if not problem.is_cheapest:
        return holds
    assert problem.goal is not None
    assert problem.goal.least is not None
    return holds and problem.score(value) >= problem.score(problem.goal.least)


def _bounds(problem: ProblemRecord, axis: CostAxis, size: float, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Draw the budget of a metric, what a trade-off aims at, and the value that is good enough.

    Args:
        problem: What is searched.
        axis: The metric.
        size: Of the unit on its axis.
        x: Its axis.
        y: The axis of values.

    Returns:
        The layers.
    """
    layers: list[alt.Chart] = []
    if axis.limit is not None:
        layers += limit(axis.limit / size, "budget", x)
    goal = problem.goal
    if goal is not None and goal.target is not None and axis.column < 0:
        layers += limit(goal.target / size, "aimed at", x)
    if goal is not None and goal.least is not None:
        layers += level(goal.least, "good enough from", y, problem.objective_unit)
    return layers


def convergence(run: RunFolder) -> Picture:
    """Draw the best so far, against evaluations, for each solver: its value, or the cost of the cheapest."""
    if run.problem.is_cheapest:
        return _cheapest_so_far(run)
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
            says.append(f"{solver}: nothing within the budget in {counted(mine[-1].evaluation, 'evaluations')}")
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
    """Yield the evaluations that may be chosen, and are better than all before them by what is looked for."""
    best = math.inf
    for one in rows:
        rank = problem.rank(one.accuracy, one.loss, one.cost)[0]
        if one.within_budget and one.whole and rank < best:
            best = rank
            yield one


def _cheapest_so_far(run: RunFolder) -> Picture:
    """Draw what the cheapest policy so far costs that is good enough, against evaluations, for each solver."""
    problem, metric, solvers = run.problem, run.problem.metric, _solvers(run)
    unit, size = best_unit(problem.uniform8, metric)
    falls: list[Row] = []
    ends: list[Row] = []
    says = []
    for solver in solvers:
        mine = [one for one in run.history if one.solver == solver]
        better = list(_records(problem, mine))
        if not better:
            says.append(f"{solver}: nothing good enough in {counted(mine[-1].evaluation, 'evaluations')}")
            continue
        for one in better:
            at = {"evaluation": one.evaluation, "y": rounded(one.cost / size)}
            falls.append({"solver": solver, **at, "is": amount(one.cost, metric), "value": problem.show(one.accuracy)})
        ends.append({**falls[-1], "evaluation": mine[-1].evaluation})
        best = better[-1]
        found = f"{amount(best.cost, metric)} with {problem.show(best.accuracy)}"
        says.append(f"{solver}: {found}, first at evaluation {best.evaluation} of {mine[-1].evaluation}")
    longest = max(one.evaluation for one in run.history)
    title = f"cheapest {metric_words(metric)} so far"
    x = alt.X("evaluation:Q", title="evaluation", scale=alt.Scale(domain=[0, rounded(1.02 * longest)], nice=False))
    y = alt.Y("y:Q", title=f"{title}, {micro(unit)} ({problem.cost_kind})", scale=alt.Scale(zero=False))
    color = color_by("solver", solvers, palette(solvers))
    line = plot([*falls, *ends]).mark_line(interpolate="step-after", strokeWidth=1.6).encode(x=x, y=y, color=color)
    tooltip = [
        "solver:N",
        "evaluation:Q",
        alt.Tooltip("is:N", title=title),
        alt.Tooltip("value:N", title=problem.objective_title),
    ]
    marks = plot(falls).mark_point(size=50, filled=True, opacity=0.9)
    marks = marks.encode(x=x, y=y, color=color, shape=shape_by("solver", solvers), tooltip=tooltip)
    return Picture(
        "Convergence: the cheapest so far",
        "; ".join(says) + ".",
        [finished(alt.layer(line, marks), 260)],
        ["solver", "evaluation", title, problem.objective_title],
        [[row["solver"], str(row["evaluation"]), row["is"], row["value"]] for row in falls],
        f"Of policies that are good enough on the search split: {problem.goal_words}.",
    )


def _means(one: HistoryRow) -> str:
    return "/".join(f"{statistics.fmean(widths):.1f}" for widths in (one.weight_bits, one.activation_bits))
