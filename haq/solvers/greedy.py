"""Greedy descent: lower, step by step, whatever costs the least loss for what it saves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers import sensitivity
from haq.solvers.base import Session, Solver


class Greedy(Solver):
    """Measures sensitivities, then evaluates the policy that descent finds."""

    name = "greedy"
    summary = "measured sensitivities, and step by step what costs the least for what it saves"
    uses_sensitivities = True
    draws = False

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Measure sensitivities, then evaluate one policy."""
        session.evaluate(propose(problem, sensitivity.measure(problem, session, keep=1)))


def propose(problem: Problem, loss_increase: NDArray[np.float64]) -> Q.BitPolicy:
    """Descend from the largest widths until the budget holds, then give back, best first, what still fits.

    Args:
        problem: What is searched.
        loss_increase: How much (nats) every pair of bits raises the loss, shape (decisions, 8, 8).

    Returns:
        A policy within the budget.
    """
    losses = [decision.of(table) for decision, table in zip(problem.decisions, loss_increase, strict=True)]
    costs = [decision.prices for decision in problem.decisions]
    chosen = [int(cost.argmax()) for cost in costs]
    while not problem.within_budget(total := sum(cost[pick] for cost, pick in zip(costs, chosen, strict=True))):
        steps = [
            ((losses[i][j] - losses[i][pick]) / (costs[i][pick] - costs[i][j]), i, j)
            for i, pick in enumerate(chosen)
            for j in np.flatnonzero(costs[i] < costs[i][pick])
        ]
        _, layer, option = min(steps)
        chosen[layer] = int(option)
    while gains := [
        (losses[i][j] - losses[i][pick], i, j)
        for i, pick in enumerate(chosen)
        for j in np.flatnonzero(losses[i] < losses[i][pick])
        if problem.within_budget(total - costs[i][pick] + costs[i][j])
    ]:
        _, layer, option = min(gains)
        total += costs[layer][option] - costs[layer][chosen[layer]]
        chosen[layer] = int(option)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))
