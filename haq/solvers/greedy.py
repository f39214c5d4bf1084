"""Greedy descent: lower, step by step, whatever costs the least loss for what it saves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers import sensitivity
from haq.solvers.base import Session


def propose(problem: Problem, rise: NDArray[np.float64]) -> Q.BitPolicy:
    """From the largest widths, take the step with the least rise of the loss per cost saved until the budget holds; then
    give back, best first, what still fits. `rise` has shape (decisions, 8, 8)."""
    losses = [decision.of(table) for decision, table in zip(problem.decisions, rise, strict=True)]
    costs = [decision.prices for decision in problem.decisions]
    chosen = [int(cost.argmax()) for cost in costs]
    while not problem.within_budget(total := sum(cost[pick] for cost, pick in zip(costs, chosen, strict=True))):
        _, layer, option = min(
            ((losses[i][j] - losses[i][pick]) / (costs[i][pick] - costs[i][j]), i, j)
            for i, pick in enumerate(chosen)
            for j in np.flatnonzero(costs[i] < costs[i][pick])
        )
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


def solve(problem: Problem, session: Session, seed: int) -> None:
    """Measure sensitivities, then evaluate the policy that descent finds."""
    session.evaluate(propose(problem, sensitivity.measure(problem, session, keep=1)))
