"""The exact integer programme over measured sensitivities."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers import sensitivity
from haq.solvers.base import Session

SCALE = 1e4  # HiGHS works to absolute tolerances near 1e-7: numbers of this size make them harmless


def allocate(loss: ArrayLike, cost: ArrayLike, limit: float, tied: Sequence[Sequence[int]] = ()) -> NDArray[np.int64]:
    """One option per layer with the least total loss and a total cost within `limit` (to about 1e-11 of it), proven optimal.

    loss, cost
        arrays (layers, options); an option that is infinite in either is not available.
    tied
        groups of layers that must take the same option.

    Returns option indices, shape (layers,). Raises ValueError if shapes differ, numbers are NaN or nothing fits, naming the
    least cost that can be reached.
    """
    losses, costs = np.asarray(loss, float), np.asarray(cost, float)
    if losses.ndim != 2 or losses.shape != costs.shape or not losses.size:
        raise ValueError(f"loss and cost must be two arrays (layers, options), not {losses.shape} and {costs.shape}")
    if np.isnan(losses).any() or np.isnan(costs).any() or np.isnan(limit):
        raise ValueError("loss, cost and limit must not be NaN")
    layers, options = losses.shape
    available = np.isfinite(losses) & np.isfinite(costs)
    for group in tied:
        available[list(group)] = available[list(group)].all(0)
    if not available.any(1).all():
        raise ValueError(f"layer {int(np.argmin(available.any(1)))} has no available option")
    objective = np.where(available, losses, 0.0)
    objective -= np.where(available, losses, np.inf).min(1, keepdims=True)
    objective = np.where(available, objective, 0.0)
    objective = SCALE * (objective / (objective.max() or 1.0))
    prices = np.where(available, costs, 0.0)
    unit = np.abs(prices).max() or 1.0
    prices = prices / unit
    # No sum of prices exceeds the number of layers, so a larger limit is no limit.
    ceiling = min(limit, unit * layers) / unit
    grain = SCALE / max(abs(ceiling), 1e-9)

    one_each = csr_array(np.kron(np.eye(layers), np.ones(options)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    links = [(group[0], other) for group in tied for other in group[1:]]
    if links:
        # x[first, option] - x[other, option] = 0
        rows = []
        for first, other in links:
            for option in range(options):
                row = np.zeros(layers * options)
                row[first * options + option], row[other * options + option] = 1, -1
                rows.append(csr_array(row[None]))
        constraints.append(LinearConstraint(vstack(rows), 0, 0))

    def solve(goal: NDArray[np.float64], extra: list[LinearConstraint]) -> Any:
        with _silent():
            return milp(
                goal.ravel(),
                integrality=np.ones(layers * options),
                bounds=Bounds(0, available.ravel().astype(float)),
                constraints=[*constraints, *extra],
                options={"mip_rel_gap": 0.0},
            )

    budget = LinearConstraint(csr_array(prices.ravel()[None] * grain), -np.inf, ceiling * grain)
    result = solve(objective, [budget])
    if result.status != 0:
        least = solve(SCALE * prices, [])
        if least.status == 0 and least.fun / SCALE * unit > limit:
            raise ValueError(f"no choice costs at most {limit:.6g}; the least is {least.fun / SCALE * unit:.6g}")
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    chosen: NDArray[np.int64] = result.x.reshape(layers, options).argmax(1)
    return chosen


@contextmanager
def _silent() -> Iterator[None]:
    """Standard output goes nowhere: HiGHS leaves a line of its debugging there, even when it is told not to display anything,
    and what is there may be JSON."""
    flush = ctypes.CDLL(None).fflush  # it prints through C, which has a buffer of its own
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def propose(problem: Problem, rise: NDArray[np.float64]) -> Q.BitPolicy:
    """The policy within budget that is optimal if the rises of the loss, shape (decisions, 8, 8), add up."""
    most = max(len(decision.pairs) for decision in problem.decisions)
    loss, cost = np.full((2, len(problem.decisions), most), np.inf)
    for row, (decision, table) in enumerate(zip(problem.decisions, rise, strict=True)):
        loss[row, : len(decision.pairs)], cost[row, : len(decision.pairs)] = decision.of(table), decision.prices
    chosen = allocate(loss, cost, problem.limit)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def solve(problem: Problem, session: Session, seed: int) -> None:
    """Measure sensitivities, then evaluate the policy that is optimal if they add up."""
    session.evaluate(propose(problem, sensitivity.measure(problem, session, keep=1)))
