"""What all charts of a report are drawn with: colours, shapes, scales, and what a chart says to those who can't see it.

Colours are names of the page's CSS variables, so that a chart is light, dark or printed with its page; whatever a colour
tells, a shape, a side or an outline tells too. Accuracies come as shares and are drawn in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from haq.store.units import describe_amount, percent

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


def micro(unit: str) -> str:
    """Write a unit with a proper micro: µs."""
    return unit.replace("u", "µ")


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


def level(share: float, label: str, y: alt.Y) -> list[alt.Chart]:
    """Draw a level across a chart, with its name and value.

    Args:
        share: Where.
        label: Its name.
        y: The axis that all layers of the chart share.

    Returns:
        The layers.
    """
    told = plot([{"y": rounded(100 * share), "label": f"{label} {percent(share)}"}])
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


def lowest(shares: Sequence[float], quantile: float = 0.5) -> float:
    """Say where the scale of a chart begins: what lies far below the rest would press the rest together."""
    if not shares:
        return 0.0
    ordered = sorted(shares, reverse=True)
    top, typical = ordered[0], ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]
    return max(ordered[-1], top - max(0.02, 2 * (top - typical)))


def scale_of(least: float, most: float) -> alt.Scale:
    """Make a scale of percents with a little room at both ends; what lies outside is drawn at its end."""
    margin = max(0.05 * (most - least), 0.002)
    return alt.Scale(domain=[rounded(100 * (least - margin)), rounded(100 * (most + 2 * margin))], nice=False, clamp=True)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the (cost, accuracy) that no other is as good as in both and better in one, cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, accuracy in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((cost, accuracy))
    return kept


def rounded(value: float) -> float:
    """Keep six digits: they are more than a chart shows, and sixteen would be most of the page."""
    return float(f"{value:.6g}")
