"""What of a sweep can't be had better in one respect without being worse in another, and how much of all it dominates.

Hypervolumes (Zitzler & Thiele, IEEE Transactions on Evolutionary Computation 1999) are exact, computed by moocore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hw_models
import quantizers as Q
from haq.store.records import PolicyRecord, share_key
from haq.store.units import PERCENT
from haq.study import result as summary
from haq.study.task import SearchTask, objective_of

SECOND = ("storage", "energy", "latency")  # what a third respect is, the first that the target has beside the main metric

Floats = NDArray[np.float64]


def fronts(task: SearchTask, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tell the fronts of all policies of a target: of the test value and the main metric, and of a second metric besides.

    Args:
        task: The target's.
        found: What solvers found there, as `haq.store.records.SweepFound` has it.

    Returns:
        Plain data, as `haq.store.records.FrontRecord` has it; none where nothing was found.
    """
    problem = task.problem
    policies = _policies(task, found)
    known = [one for one in policies if one["value"] is not None]
    if not known:
        return []
    second = [name for name in SECOND if name != problem.metric and name in problem.metrics]
    respects = [[problem.metric]]
    if second:
        respects.append([problem.metric, second[0]])
    return [_front(task, known, metrics) for metrics in respects]


def _policies(task: SearchTask, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List every policy of a target with its value on the test split: those that were found, and uniform ones."""
    key = share_key("test", task.problem.objective.name)
    listed = []
    for row in found:
        asked = row["budget"] or f"drop {row['max_drop']}"
        for run in row["runs"]:
            record = PolicyRecord.from_dict(run["policy"])
            policy = Q.BitPolicy(record.widths(), record.kept)
            called = f"{row['solver']}, {asked}"
            if len(row["runs"]) > 1:
                called += f", seed {run['seed']}"
            listed.append({"called": called, "folder": run["folder"], "policy": policy, "value": run[key]})
    for bits, policy in summary.uniform_policies(task.problem).items():
        value = summary.entry(task, policy)[key]
        listed.append({"called": f"uniform {bits}", "folder": "", "policy": policy, "value": value})
    return listed


def _front(task: SearchTask, policies: Sequence[dict[str, Any]], metrics: list[str]) -> dict[str, Any]:
    """Tell one front.

    Args:
        task: The target's.
        policies: All policies there, with finite values.
        metrics: By which they cost.

    Returns:
        Plain data, as `haq.store.records.FrontRecord` has it.
    """
    problem, judging = task.problem, objective_of(task.problem)
    costs = np.array([_costs(problem.table, *problem.bit_arrays(one["policy"]), metrics) for one in policies])
    values = np.array([one["value"] for one in policies])
    scores = np.array([judging.score(value) for value in values])
    # What is no share has no worst value but that of what was found.
    worst = float(values[scores.argmin()])
    if judging.objective_unit == PERCENT and judging.higher_is_better:
        worst = 0.0
    reference = _costs(problem.table, *problem.bit_arrays(problem.reference_policy), metrics)
    points = np.column_stack([scores, -costs / reference])
    on_front = nondominated(points)
    order = sorted(np.flatnonzero(on_front).tolist(), key=lambda index: (*costs[index].tolist(), -scores[index]))
    members = []
    for index in dict.fromkeys(order):
        one = policies[index]
        member = {"called": one["called"], "value": float(values[index]), "costs": costs[index].tolist()}
        if one["folder"]:
            member["folder"] = one["folder"]
        members.append(member)
    return {
        "metrics": metrics,
        "reference": [worst, *reference.tolist()],
        "hypervolume": hypervolume(points, np.array([judging.score(worst), *np.full(len(metrics), -1.0)])),
        "of": len(policies),
        "policies": members,
    }


def _costs(table: hw_models.CostTable, w: NDArray[np.int64], a: NDArray[np.int64], metrics: Sequence[str]) -> Floats:
    """Return what a policy costs by some metrics."""
    return np.array([float(table.total(metric, w, a)) for metric in metrics])


def nondominated(points: Floats) -> NDArray[np.bool_]:
    """Tell which points (points, respects) no other is as good as in every respect and better in one; more is better."""
    import moocore

    found: NDArray[np.bool_] = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    return found


def hypervolume(points: Floats, reference: Floats) -> float:
    """Return the volume of what is dominated by points and dominates a reference point; more is better in every respect.

    Args:
        points: Shape (points, respects).
        reference: Shape (respects,).
    """
    import moocore

    return float(moocore.hypervolume(points, ref=reference, maximise=True))


def pareto(cells: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which of some (cost, score) no other is as good as in both and better in one; a larger score is better."""
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in cells) for cost, score in cells]
