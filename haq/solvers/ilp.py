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
from haq.solvers.base import Session, Solver

SCALE = 1e4  # HiGHS works to absolute tolerances near 1e-7: numbers of this size make them harmless


class IntegerProgramme(Solver):
    """Measures sensitivities, then evaluates the policy that is optimal if they add up."""

    name = "ilp"
    summary = "measured sensitivities, and the policy that is optimal if they add up"
    uses_sensitivities = True
    draws = False

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Measure sensitivities, then evaluate one policy."""
        session.evaluate(propose(problem, sensitivity.measure(problem, session, keep=1)))


def propose(problem: Problem, loss_increase: NDArray[np.float64]) -> Q.BitPolicy:
    """Find the policy within budget that is optimal if increases of the loss add up.

    Args:
        problem: What is searched.
        loss_increase: How much (nats) every pair of bits raises the loss, shape (decisions, 8, 8).

    Returns:
        A policy within the budget.
    """
    most = max(len(decision.pairs) for decision in problem.decisions)
    loss = np.full((len(problem.decisions), most), np.inf)
    cost = np.full((len(problem.decisions), most), np.inf)
    for row, (decision, table) in enumerate(zip(problem.decisions, loss_increase, strict=True)):
        loss[row, : len(decision.pairs)] = decision.of(table)
        cost[row, : len(decision.pairs)] = decision.prices
    chosen = allocate(loss, cost, problem.limit)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def allocate(loss: ArrayLike, cost: ArrayLike, limit: float, tied: Sequence[Sequence[int]] = ()) -> NDArray[np.int64]:
    """Choose one option per layer with the least total loss and a total cost within a limit, proven optimal.

    Args:
        loss: What every option loses, shape (layers, options); one that is infinite here or in `cost` is not available.
        cost: What every option costs, same shape.
        limit: Of the total cost; it is kept to about 1e-11 of it.
        tied: Groups of layers that must take the same option.

    Returns:
        Option indices, shape (layers,).

    Raises:
        ValueError: If shapes differ, numbers are NaN or nothing fits, naming the least cost that can be reached.
    """
    losses = np.asarray(loss, float)
    costs = np.asarray(cost, float)
    available = _available(losses, costs, limit, tied)
    layers, options = losses.shape
    prices = np.where(available, costs, 0.0)
    unit = np.abs(prices).max() or 1.0
    prices = prices / unit
    # No sum of prices exceeds the number of layers, so a larger limit is no limit.
    ceiling = min(limit, unit * layers) / unit
    grain = SCALE / max(abs(ceiling), 1e-9)
    structure = _structure(layers, options, tied)

    def solve(goal: NDArray[np.float64], extra: list[LinearConstraint]) -> Any:
        with _silent():
            return milp(
                goal.ravel(),
                integrality=np.ones(layers * options),
                bounds=Bounds(0, available.ravel().astype(float)),
                constraints=[*structure, *extra],
                options={"mip_rel_gap": 0.0},
            )

    budget = LinearConstraint(csr_array(prices.ravel()[None] * grain), -np.inf, ceiling * grain)
    result = solve(_goal(losses, available), [budget])
    if result.status != 0:
        least = solve(SCALE * prices, [])
        if least.status == 0 and least.fun / SCALE * unit > limit:
            raise ValueError(f"no choice costs at most {limit:.6g}; the least is {least.fun / SCALE * unit:.6g}")
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    chosen: NDArray[np.int64] = result.x.reshape(layers, options).argmax(1)
    return chosen


def _available(
    losses: NDArray[np.float64], costs: NDArray[np.float64], limit: float, tied: Sequence[Sequence[int]]
) -> NDArray[np.bool_]:
    """Check what `allocate` is given; returns which options may be taken, shape (layers, options)."""
    if losses.ndim != 2 or losses.shape != costs.shape or not losses.size:
        raise ValueError(f"loss and cost must be two arrays (layers, options), not {losses.shape} and {costs.shape}")
    if np.isnan(losses).any() or np.isnan(costs).any() or np.isnan(limit):
        raise ValueError("loss, cost and limit must not be NaN")
    available = np.isfinite(losses) & np.isfinite(costs)
    for group in tied:
        available[list(group)] = available[list(group)].all(0)
    if not available.any(1).all():
        raise ValueError(f"layer {int(np.argmin(available.any(1)))} has no available option")
    return available


def _goal(losses: NDArray[np.float64], available: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scale losses, of which only differences within a layer matter, to numbers that suit HiGHS."""
    goal = np.where(available, losses, 0.0)
    goal -= np.where(available, losses, np.inf).min(1, keepdims=True)
    goal = np.where(available, goal, 0.0)
    return SCALE * (goal / (goal.max() or 1.0))


def _structure(layers: int, options: int, tied: Sequence[Sequence[int]]) -> list[LinearConstraint]:
    """Say that every layer takes one option, and tied ones the same."""
    one_each = csr_array(np.kron(np.eye(layers), np.ones(options)))
    rows = []
    for group in tied:
        for other in group[1:]:
            for option in range(options):
                # x[first, option] - x[other, option] = 0
                row = np.zeros(layers * options)
                row[group[0] * options + option] = 1
                row[other * options + option] = -1
                rows.append(csr_array(row[None]))
    if not rows:
        return [LinearConstraint(one_each, 1, 1)]
    return [LinearConstraint(one_each, 1, 1), LinearConstraint(vstack(rows), 0, 0)]


@contextmanager
def _silent() -> Iterator[None]:
    """Send standard output nowhere.

    HiGHS leaves a line of its debugging there, even when it is told not to display anything, and what is there may be JSON.
    """
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
