"""The picture of a policy: bits per layer over each layer's share of the cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import quantizers as Q
from haq.problem.problem import Problem
from haq.store.units import describe_amount
from haq.study.result import cost_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 40  # layers, above which letters are smaller


def draw_policy(problem: Problem, policy: Q.BitPolicy) -> Figure:
    """Draw bits per layer, weights up and activations down, over each layer's share of the cost.

    Args:
        problem: What the policy is of.
        policy: Its bits.

    Returns:
        A figure that belongs to no window; a notebook shows it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w, a = problem.bit_arrays(policy)
    x = np.arange(len(w))
    kind = cost_kind(problem)
    before = problem.cost[:, 7, 7] / problem.reference
    after = problem.cost[x, w - 1, a - 1] / problem.reference
    figure = Figure(figsize=(max(7.0, 0.42 * len(x) + 2), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    number_size, name_size = 9, 8
    if len(x) > MANY:
        number_size, name_size = 6, 5
    bits, share = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    bits.bar(x, w, 0.8, color="#3b6fb6", label="weight bits")
    bits.bar(x, -a, 0.8, color="#d9822b", label="activation bits")
    for i in x:
        bits.text(i, w[i] + 0.2, str(w[i]), ha="center", va="bottom", fontsize=number_size)
        bits.text(i, -a[i] - 0.2, str(a[i]), ha="center", va="top", fontsize=number_size)
    bits.axhline(0, color="black", linewidth=0.8)
    bits.set_ylim(-10, 10)
    bits.set_yticks([-8, -4, 0, 4, 8], ["8", "4", "0", "4", "8"])
    bits.set_ylabel("activations      bits      weights")
    bits.legend(loc="upper center", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 1.1))
    used = problem.policy_cost(policy)
    amounts = f"{describe_amount(used, problem.metric)} of {describe_amount(problem.limit, problem.metric)}"
    bits.set_title(
        f"{problem.target.name}: {amounts} {problem.metric}, {used / problem.reference:.3g} of uniform 8 bits ({kind})",
        fontsize=10,
        pad=22,
    )
    share.bar(x, 100 * before, 0.8, color="#cccccc", label="at 8/8 bits")
    share.bar(x, 100 * after, 0.8, color="#4c9a5b", label="at these bits")
    share.set_ylabel(f"{problem.metric}, % of the\n8-bit network ({kind})", fontsize=9)
    share.legend(fontsize=8, frameon=False)
    share.set_xticks(x, problem.workload.names, rotation=90, fontsize=name_size)
    for axes in (bits, share):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.7, len(x) - 0.3)
    return figure


def save_picture(problem: Problem, policy: Q.BitPolicy, path: Path) -> None:
    """Write the picture of a policy as a PNG file, beside and renamed."""
    partial = path.with_name(f"{path.name}.part")
    draw_policy(problem, policy).savefig(partial, dpi=130, format="png")
    partial.replace(path)
