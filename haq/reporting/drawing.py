"""What all charts of a report are drawn with: colours, shapes, scales, and what a chart says to those who can't see it.

Colours are names of the page's CSS variables, so that a chart is light, dark or printed with its page; whatever a colour
tells, a shape, a side or an outline tells too. Shares are drawn in percent, other values of objectives as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import altair as alt

from haq.store.history import HistoryRow
from haq.store.records import JudgingRecord, ProblemRecord
from haq.store.units import PERCENT, describe_amount, kind_of_cost, plotted, show

Row = dict[str, Any]
UNIFORM = "uniform bits"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-right", "triangle-left")
CROSS = "cross"  # of what isn't searched
STAR = "M0,-1L0.25,-0.33L0.95,-0.31L0.4,0.13L0.59,0.81L0,0.42L-0.59,0.81L-0.4,0.13L-0.95,-0.31L-0.25,-0.33Z"
COLORS = 8  # --series-0 .. of the style sheet
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "aria": False,  # what a chart says stands beside it in words, not mark by mark
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--grid)",
        "domainColor": "var(--muted)",
        "tickColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "axisX": {"grid": False},
    "legend": {
        "orient": "top",
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "labelLimit": 220,
        "symbolSize": 80,
    },
}


@dataclass(frozen=True)
class Picture:
    """A chart (or several, one below the other), and what it says for those who can't see it."""

    title: str
    says: str
    specs: Sequence[dict[str, Any]]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    columns: int = 0  # that must have room; a chart with many of them scrolls in its box


class CostAxis(NamedTuple):
    """A metric against which values are drawn, with what policies cost by it."""

    metric: str
    limit: float | None  # in its unit
    whole: float  # what the reference takes
    kind: str  # estimated, measured or counted
    column: int  # of a row's further costs; -1 is the main metric's own

    def cost(self, row: HistoryRow) -> float:
        """Return what a policy costs by this metric; infinity if the target can't do it."""
        if self.column < 0:
            return row.cost
        return row.others[self.column]


def priced(rows: Iterable[HistoryRow], axis: CostAxis) -> list[tuple[float, float]]:
    """List cost and value of what may be on a front: of what the target can do, and what was evaluated on all samples."""
    return [(axis.cost(row), row.accuracy) for row in rows if row.whole and axis.cost(row) < math.inf]


def cost_axes(problem: ProblemRecord) -> list[CostAxis]:
    """List the metrics against which values are drawn: the main one, then the others that are limited."""
    found = [CostAxis(problem.metric, problem.limit, problem.uniform8, problem.cost_kind, -1)]
    for column, further in enumerate(problem.further):
        kind = kind_of_cost(further.metric, problem.target.provenance)
        found.append(CostAxis(further.metric, further.amount, further.reference, kind, column))
    return found


def micro(unit: str) -> str:
    """Write a unit with a proper micro: µs."""
    return unit.replace("u", "µ")


def micro_words(words: str) -> str:
    """Write amounts in a sentence with a proper micro, as `amount` does."""
    return words.replace(" us ", " µs ").replace(" uJ ", " µJ ")


def amount(value: float, metric: str) -> str:
    """Write an amount as commands print it, but with a proper micro."""
    return describe_amount(value, metric).replace(" u", " µ")


def plot(rows: Sequence[Row]) -> alt.Chart:
    """Make a chart of some rows, with nothing on it yet."""
    return alt.Chart(alt.Data(values=list(rows)))


def finished(chart: Any, height: int) -> dict[str, Any]:
    """Return what Vega-Lite draws, as wide as its box."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    made: dict[str, Any] = chart.properties(width="container", height=height, autosize=fit).to_dict()
    # Without the schema's address no library minds another's version; what the chart says is the same in all of them.
    return {key: value for key, value in made.items() if key != "$schema"} | {"config": CONFIG}


def palette(names: Sequence[str]) -> list[str]:
    """Choose a colour for each name, in their order."""
    return [f"var(--series-{i % COLORS})" for i in range(len(names))]


def legend(names: Sequence[str]) -> alt.Legend:
    """Put as many names beside each other as a phone has room for."""
    columns = 4
    while columns > 1 and sum(26 + 6.5 * max(map(len, names[i::columns])) for i in range(min(columns, len(names)))) > 300:
        columns -= 1
    return alt.Legend(title=None, columns=columns)


def color_by(field: str, names: Sequence[str], colors: Sequence[str]) -> alt.Color:
    """Colour marks by a field of their rows.

    Args:
        field: The field.
        names: Its values, as the legend lists them.
        colors: A colour for each.

    Returns:
        The encoding.
    """
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=list(colors)), legend=legend(names))


def shape_by(field: str, names: Sequence[str]) -> alt.Shape:
    """Shape marks by a field of their rows, whose values are `names`; what isn't searched is a cross."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    if UNIFORM in names:
        shapes[list(names).index(UNIFORM)] = CROSS
    return alt.Shape(f"{field}:N", scale=alt.Scale(domain=list(names), range=shapes), legend=legend(names))


def level(value: float, label: str, y: alt.Y, unit: str = PERCENT) -> list[alt.Chart]:
    """Draw a level across a chart, with its name and value.

    Args:
        value: Where.
        label: Its name.
        y: The axis that all layers of the chart share.
        unit: Of the value.

    Returns:
        The layers.
    """
    told = plot([{"y": rounded(plotted(value, unit)), "label": f"{label} {show(value, unit)}"}])
    line = told.mark_rule(color="var(--muted)", strokeDash=[2, 3]).encode(y=y)
    text = told.mark_text(align="left", baseline="bottom", dx=4, dy=-3, fontSize=11, color="var(--muted)")
    return [line, text.encode(y=y, x=alt.value(0), text="label:N")]


def limit(value: float, label: str, x: alt.X) -> list[alt.Chart]:
    """Draw a limit from top to bottom, with its name.

    Args:
        value: Where, on the axis' scale.
        label: Its name.
        x: The axis that all layers of the chart share.

    Returns:
        The layers.
    """
    told = plot([{"x": rounded(value), "label": label}])
    line = told.mark_rule(color="var(--ink)", strokeDash=[6, 3]).encode(x=x)
    text = told.mark_text(align="left", baseline="bottom", dx=4, dy=-4, fontSize=11, color="var(--ink)")
    return [line, text.encode(x=x, y=alt.value("height"), text="label:N")]


def edge_of(judging: JudgingRecord, values: Iterable[float], quantile: float = 0.5) -> float:
    """Say where the scale of a chart ends on its worse side: what is far worse than the rest would press the rest together.

    Args:
        judging: What the values are of.
        values: What is drawn.
        quantile: The share of values, the better ones, that are to have room.

    Returns:
        A value; what is worse is drawn there (`within`).
    """
    scores = sorted((judging.score(value) for value in values if math.isfinite(value)), reverse=True)
    if not scores:
        return 0.0
    top, typical = scores[0], scores[min(int(quantile * len(scores)), len(scores) - 1)]
    least = 0.02  # two points
    if judging.objective_unit != PERCENT:
        least *= abs(top)
    return judging.score(max(scores[-1], top - max(least, 2 * (top - typical))))


def is_beyond(judging: JudgingRecord, value: float, edge: float) -> bool:
    """Tell whether a value is worse than all that a chart has room for.

    Args:
        judging: What the value is of.
        value: The value.
        edge: Where the chart's scale ends.

    Returns:
        Whether it is drawn at the edge.
    """
    return judging.score(value) < judging.score(edge)


def within(judging: JudgingRecord, value: float, edge: float) -> float:
    """Return where a value is drawn: at the edge, if it is worse than that.

    Args:
        judging: What the value is of.
        value: The value.
        edge: Where the chart's scale ends.

    Returns:
        A value.
    """
    return judging.score(max(judging.score(value), judging.score(edge)))


def edge_words(judging: JudgingRecord, edge: float, are: str) -> str:
    """Say what becomes of values that are worse than a chart has room for, to follow what they are of.

    Args:
        judging: What the values are of.
        edge: Where its scale ends.
        are: "are", or "is"; with a comma before it, if it follows one.

    Returns:
        Words such as "below 89.1 % are drawn at the lower edge".
    """
    beyond, side = "below", "lower"
    if not judging.higher_is_better:
        beyond, side = "above", "upper"
    return f"{beyond} {judging.show(edge, 1)} {are} drawn at the {side} edge".replace(" ,", ",")


def scale_of(judging: JudgingRecord, edge: float, best: float) -> alt.Scale:
    """Make a scale of values with a little room at both ends; what lies outside is drawn at its end.

    Args:
        judging: What the values are of.
        edge: Where it ends on its worse side.
        best: The best value on it.

    Returns:
        The scale.
    """
    least = 0.002
    if judging.objective_unit != PERCENT:
        least = 0.005 * max(abs(edge), abs(best)) or 1.0
    margin = max(0.05 * abs(best - edge), least)
    low, high = edge - margin, best + 2 * margin
    if not judging.higher_is_better:
        low, high = best - 2 * margin, edge + margin
        if best >= 0:
            low = max(low, 0.0)  # an error isn't negative
    return alt.Scale(domain=[rounded(judging.plotted(low)), rounded(judging.plotted(high))], nice=False, clamp=True)


def front(points: Iterable[tuple[float, float]], higher_is_better: bool = True) -> list[tuple[float, float]]:
    """Keep the (cost, value) that no other is as good as in both and better in one, cheapest first."""
    sign = 1.0
    if not higher_is_better:
        sign = -1.0
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((cost, value))
    return kept


def rounded(value: float) -> float:
    """Keep six digits: they are more than a chart shows, and sixteen would be most of the page."""
    return float(f"{value:.6g}")
