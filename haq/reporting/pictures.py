"""The pictures that commands write, drawn with matplotlib from the records of a run; figures that belong to no window."""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq.reporting.heights import height_of, ticks_of, top_of
from haq.store import files
from haq.store.records import (
    UNIFORM_8,
    ChannelsRecord,
    FinishedSweepRecord,
    JudgedRecord,
    Measurement,
    PolicyRecord,
    ProblemRecord,
    RobustnessRecord,
    SweepFound,
    SweepTarget,
)
from haq.store.units import PERCENT, counted, describe_amount, metric_words
from hw_models.registry import join_words
from hw_models.widths import pair_words, width_of, width_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
# Colours that the colour-blind can tell apart (Okabe and Ito, "Color Universal Design", 2008). In grey, marks and lines tell.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7a6a2f")
MARKS = ("o", "s", "^", "D", "v", "P", "<", ">")
LINES = ("-", "--", "-.", ":")
WEIGHTS, ACTIVATIONS = "#0072b2", "#e69f00"
BEFORE, AFTER, KEPT = "#cccccc", "#009e73", "#aa5f88"
MANY = 40  # layers from which on their names are written small
WIDEST = 120.0  # inches
LONGEST_NAME = 40  # characters of a layer's name; of a longer one the end tells more
LETTER = 0.083  # inches that a letter of a title takes


def draw_policy(problem: ProblemRecord, policy: PolicyRecord, channels: ChannelsRecord | None = None) -> Figure:
    """Draw bits per layer, weights up and activations down, over each layer's share of the cost.

    Where channels are searched too, the share of its output channels that every layer keeps stands between them.

    Args:
        problem: What every layer costs at every pair of widths.
        policy: Widths for all its layers.
        channels: What the policy keeps of the layers' channels, and what the smaller layers cost; None where there are all.

    Returns:
        A figure; a notebook shows it, `save` writes it.

    Raises:
        ValueError: If the policy is of other layers, or has widths that the target can't do.
    """
    width = min(max(7.0, 0.42 * len(problem.layers) + 2), WIDEST)
    names = [_short(layer.name) for layer in problem.layers]
    for_names = 0.07 * max(map(len, names))
    if channels is None:
        figure = _figure(width, 5.4 + for_names)
        bits, share = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        panels = [bits, share]
    else:
        figure = _figure(width, 7.0 + for_names)
        panels = list(figure.subplots(3, 1, sharex=True, height_ratios=[2, 0.9, 1]))
        bits, _, share = panels
    widths = _widths(problem, policy)
    x = range(len(widths))
    number_size, name_size = 9, 8
    if len(widths) > MANY:
        number_size, name_size = 6, 5
    bits.bar(x, [height_of(w) for w, _ in widths], 0.8, color=WEIGHTS, label="weight bits")
    bits.bar(x, [-height_of(a) for _, a in widths], 0.8, color=ACTIVATIONS, label="activation bits")
    for i, (w, a) in enumerate(widths):
        bits.text(i, height_of(w) + 0.2, width_words(w), ha="center", va="bottom", fontsize=number_size)
        bits.text(i, -height_of(a) - 0.2, width_words(a), ha="center", va="top", fontsize=number_size)
    bits.axhline(0, color="black", linewidth=0.8)
    both = [width for pair in widths for width in pair]
    bits.set_ylim(-top_of(both) - 2, top_of(both) + 2)
    marks = ticks_of(both)
    below = [-height for height in reversed(marks)]
    bits.set_yticks([*below, 0, *marks], [*reversed(marks.values()), "0", *marks.values()])
    bits.set_ylabel("activations      bits      weights")
    _legend_above(bits)
    before = _costs(problem, problem.before)
    after = _costs(problem, widths)
    if channels is not None:
        after = _costs_of_smaller(problem, channels)
        _draw_channels(panels[1], channels, number_size)
    figure.suptitle(_wrapped(_title(problem, sum(after)), width), fontsize=10)
    share.bar(x, [100 * cost / problem.uniform8 for cost in before], 0.8, color=BEFORE, label=_at_before(problem))
    # Narrower, so that both are seen where the policy takes more than what it is held against.
    share.bar(x, [100 * cost / problem.uniform8 for cost in after], 0.5, color=AFTER, label=_with_these(channels))
    of_what = "8-bit network"
    if problem.reference != UNIFORM_8:
        of_what = "reference"
    share.set_ylabel(f"{metric_words(problem.metric)}, % of the\n{of_what} ({problem.cost_kind})", fontsize=9)
    _legend_above(share)
    share.set_xticks(x, names, rotation=90, fontsize=name_size)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.7, len(widths) - 0.3)
    return figure


def _legend_above(axes: Any) -> None:
    """Put a legend between a panel and what stands above it, where it covers nothing."""
    axes.legend(loc="lower right", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _wrapped(text: str, width: float) -> str:
    """Break the lines of a title that are longer than a figure of some inches is wide."""
    letters = int((width - 0.4) / LETTER)
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, letters))


def _short(name: str) -> str:
    """Leave out the beginning of a long name."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"…{name[1 - LONGEST_NAME :]}"


def _with_these(channels: ChannelsRecord | None) -> str:
    """Say what the bright bars are of."""
    if channels is None:
        return "at these bits"
    return "with these channels and bits"


def _draw_channels(axes: Any, channels: ChannelsRecord, size: int) -> None:
    """Draw the share of its output channels that every layer keeps, over all of them, with the number that is kept.

    Args:
        axes: Where.
        channels: What is kept.
        size: Of the numbers.
    """
    layers = channels.layers
    x = range(len(layers))
    shares = [100 * layer.outputs / layer.of_outputs for layer in layers]
    axes.bar(x, [100] * len(layers), 0.8, color=BEFORE, label="all")
    axes.bar(x, shares, 0.8, color=KEPT, label="kept")
    for place, layer in enumerate(layers):
        axes.text(place, shares[place] + 3, str(layer.outputs), ha="center", va="bottom", fontsize=size)
    axes.set_ylim(0, 125)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel("output channels\nkept, %", fontsize=9)
    axes.set_title(
        f"{channels.short} channels kept, {channels.macs / 1e6:.3g} of {channels.of_macs / 1e6:.3g} M MACs",
        fontsize=8,
    )
    _legend_above(axes)


def _costs_of_smaller(problem: ProblemRecord, channels: ChannelsRecord) -> list[float]:
    """Return what the smaller layers cost. Raises ValueError, naming the layer, if one has no cost or isn't the problem's."""
    found = []
    for layer, left in zip(problem.layers, channels.layers, strict=True):
        if layer.name != left.name or left.cost is None:
            raise ValueError(f"what is left of layer {left.name!r} has no cost, or is of another problem")
        found.append(left.cost)
    return found


def _at_before(problem: ProblemRecord) -> str:
    """Say what the pale bars are of."""
    if problem.before_words == "reference":
        return "in the reference"
    return f"at {problem.before_words} bits"


def _title(problem: ProblemRecord, used: float) -> str:
    """Name network, data and objective; below them say what the policy costs, of which budget, and what else is limited."""
    metric = problem.metric
    words = f"{_of_what(problem.network, problem.data)}, judged by {problem.objective_title}"
    if problem.samples_words:
        words += f" on {problem.samples_words}"
    words += f"\n{problem.target.name}: {describe_amount(used, metric)} "
    if problem.limit is not None:
        words += f"of {describe_amount(problem.limit, metric)} "
    reference = problem.reference
    if problem.before_words == "reference":
        reference = "the reference"
    words += f"{metric_words(metric)}, {used / problem.uniform8:.3g} of {reference} ({problem.cost_kind})"
    others = [f"{describe_amount(limit.amount, limit.metric)} {metric_words(limit.metric)}" for limit in problem.further]
    if others:
        words += f"\nwithin {join_words(others)} too"
    return words


def _of_what(network: str, data: str) -> str:
    """Name a network and its data; of a description of data only what it begins with."""
    name = re.split(r" \(|: ", data)[0]
    if not name:
        return network
    return f"{network} on {name}"


def _costs(problem: ProblemRecord, widths: Sequence[tuple[int | None, int | None]]) -> list[float]:
    """Return what the layers cost at some widths. Raises ValueError, naming the layer, if one can't be done."""
    found = []
    for layer, (w, a) in zip(problem.layers, widths, strict=True):
        cost = layer.cost_at(w, a)
        if cost is None:
            raise ValueError(f"the policy has layer {layer.name!r} at {pair_words(w, a)}, which has no cost")
        found.append(cost)
    return found


def draw_sweep(sweep: FinishedSweepRecord) -> Figure:
    """Draw test values over cost, as a fraction of uniform 8 bits, a panel for each target.

    Returns a figure; a notebook shows it, `save` writes it.
    """
    targets = [target for target in sweep.targets.values() if target.found]
    width = 5.2 * len(targets) + 1.8
    figure = _figure(width, 5.2)
    judged: list[Measurement | JudgedRecord] = [sweep.of_float]
    judged += [run for found in sweep.found for run in found.runs]
    scores = [sweep.score(sweep.value(row, "test")) for row in judged]
    worst = min((score for score in scores[1:] if math.isfinite(score)), default=scores[0])
    spare = 0.02  # two points, within which a uniform policy that is worse is still drawn
    if sweep.objective_unit != PERCENT:
        spare = 0.1 * (max(scores) - worst)
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for axes, target in zip(panels, targets, strict=True):
        axes.axhline(
            sweep.plotted(sweep.value(sweep.of_float, "test")),
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="float",
        )
        for number, solver in enumerate(sweep.asked.solvers):
            _draw_solver(axes, sweep, target, solver, number)
        _draw_uniform_and_front(axes, sweep, target, worst - spare)
        axes.set_title(f"{target.name} ({target.kind})", fontsize=10)
        axes.set_xlabel(f"{metric_words(sweep.metric)}, fraction of {target.reference_short}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{sweep.on_axis(f'test {sweep.objective_title}')} (measured)", fontsize=9)
    title = f"{_of_what(sweep.network, sweep.data)}, judged by {sweep.objective_title}"
    figure.suptitle(_wrapped(f"{title}\n{_bars_words(sweep)}", width), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_robustness(found: RobustnessRecord, curve_steps: int) -> Figure:
    """Draw accuracy against eps under PGD, a line for each network, and its worst case over all attacks as a mark.

    Args:
        found: What attacks found.
        curve_steps: The steps of PGD that the lines are of.

    Returns:
        A figure; a notebook shows it, `save` writes it.
    """
    figure = _figure(7.5, 4.5)
    axes = figure.subplots()
    first = next(iter(found.networks.values()))
    norm = first.threat.norm
    unit, scale = 1, "of images in [0, 1]"
    if norm == "linf":
        unit, scale = 255, "1/255"
    for number, (name, network) in enumerate(found.networks.items()):
        eps = [unit * size for size, _ in network.curve]
        accuracies = [100 * share for _, share in network.curve]
        color = COLORS[number % len(COLORS)]
        axes.plot(eps, accuracies, color=color, marker="o", markersize=3, linestyle=LINES[number % len(LINES)], label=name)
        mark = "*"
        if network.masked:
            mark = "v"
        worst = (unit * network.threat.eps, 100 * network.worst)
        axes.plot(*worst, color=color, marker=mark, markersize=11, linestyle="", clip_on=False, alpha=0.8)
    chance = 100 / first.classes
    axes.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    axes.text(0, chance + 1, "chance", color="grey", fontsize=8)
    axes.set(xlabel=f"eps, {scale} ({norm})", ylabel="accuracy, %", ylim=(0, 100), xlim=(0, None))
    axes.set_title(
        f"Lines: PGD, {counted(curve_steps, 'steps')}, {counted(first.curve_images, 'images')}. "
        "Stars: worst case over all attacks\n"
        "(triangles: an upper bound, gradients are masked)",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, beside its place and renamed."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    files.write(path, content.getvalue())


def _widths(problem: ProblemRecord, policy: PolicyRecord) -> list[tuple[int, int]]:
    """Return a policy's widths in the order of a problem's layers; float is 32."""
    given = policy.widths()
    names = {layer.name for layer in problem.layers}
    if set(given) != names:
        raise ValueError(f"the policy is of other layers than the problem: {sorted(set(given) ^ names)[0]!r} is in one only")
    widths = []
    for layer in problem.layers:
        weight_bits, activation_bits = given[layer.name]
        widths.append((width_of(weight_bits), width_of(activation_bits)))
    return widths


def _draw_solver(axes: Any, sweep: FinishedSweepRecord, target: SweepTarget, solver: str, number: int) -> None:
    """Draw what a solver found: means over its seeds with their standard errors, and every seed as a small dot.

    Args:
        axes: Where.
        sweep: The sweep.
        target: The target.
        solver: The solver's name.
        number: Its place in the list of solvers, which gives colour, mark and line.
    """
    color, mark, line = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)], LINES[number % len(LINES)]
    rows = sorted((row for row in target.found if row.solver == solver), key=lambda row: row.fraction)
    means = [sweep.plotted(sweep.value(row, "test")) for row in rows]
    fractions = [row.fraction for row in rows]
    errors = [_standard_error(sweep, row) for row in rows]
    bars = None
    if any(error is not None for error in errors):
        bars = [math.nan if error is None else sweep.plotted(error) for error in errors]
    axes.errorbar(
        fractions, means, bars, color=color, marker=mark, markersize=5, linestyle=line, linewidth=1.3, capsize=3, label=solver
    )
    seeds = [run for row in rows if len(row.runs) > 1 for run in row.runs]
    values = [sweep.plotted(sweep.value(run, "test")) for run in seeds]
    axes.plot([run.fraction for run in seeds], values, ".", color=color, markersize=3, alpha=0.6)


def _standard_error(sweep: FinishedSweepRecord, row: SweepFound) -> float | None:
    """Return the standard error of a mean over seeds, or of one run's value on the test samples; None if it isn't known."""
    values = [sweep.value(run, "test") for run in row.runs]
    if not all(map(math.isfinite, values)):
        return None
    if len(values) > 1:
        return statistics.stdev(values) / math.sqrt(len(values))
    if sweep.counts_samples:
        return math.sqrt(values[0] * (1 - values[0]) / sweep.images["test"])
    return row.error("test", sweep.objective)


def _bars_words(sweep: FinishedSweepRecord) -> str:
    """Say what the error bars are: of means over seeds, of single runs, or of both."""
    counts = sorted({len(row.runs) for row in sweep.found if len(row.runs) > 1})
    single = any(len(row.runs) == 1 and _standard_error(sweep, row) is not None for row in sweep.found)
    test = f"{sweep.images['test']:,} test {sweep.samples_are}"
    if not counts and not single:
        return "one run each, no standard error is known"
    if not counts:
        return f"bars: standard error of one run on {test}"
    words = f"bars: standard error of the mean over {join_words(list(map(str, counts)))} seeds (dots: seeds)"
    if single:
        words += f"; of solvers with one run: on {test}"
    return words


def _draw_uniform_and_front(axes: Any, sweep: FinishedSweepRecord, target: SweepTarget, least: float) -> None:
    """Draw uniform policies, but for those of a lower score than the least, and ring what is on the Pareto front."""
    shown = [row for row in target.uniform if sweep.score(sweep.value(row, "test")) >= least]
    label = "uniform bits"
    if len(shown) < len(target.uniform):
        label = "uniform bits (some lie further down)"
        if not sweep.higher_is_better:
            label = "uniform bits (some lie further up)"
    fractions = [row.fraction for row in shown]
    values = [sweep.plotted(sweep.value(row, "test")) for row in shown]
    axes.plot(fractions, values, "x", color="#777777", label=label)
    for row, fraction, value in zip(shown, fractions, values, strict=True):
        axes.annotate(str(row.bits), (fraction, value), (4, -9), textcoords="offset points", fontsize=7)
    front = [row for row in [*target.found, *shown] if row.pareto]
    axes.plot(
        [row.fraction for row in front],
        [sweep.plotted(sweep.value(row, "test")) for row in front],
        "o",
        markersize=9,
        fillstyle="none",
        color="#333333",
        linestyle="none",
        label="Pareto front",
    )


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, that no window knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
