"""Greedy descent: lower, step by step, whatever costs the least loss for what it saves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.channels import chooses_channels
from haq.problem.decision import Decision
from haq.problem.peak import padded
from haq.problem.problem import Problem
from haq.problem.programme import STEP, Programme
from haq.solvers import sensitivity
from haq.solvers.base import Session, Solver, check_searches_channels


class Greedy(Solver):
    """Measures sensitivities, then evaluates the policy that descent finds."""

    name = "greedy"
    summary = "measured sensitivities, and step by step what costs the least for what it saves"
    uses_sensitivities = True
    draws = False
    searches_channels = False

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Measure sensitivities, then evaluate one policy. Raises ValueError where channels are to be chosen."""
        if chooses_channels(problem):
            check_searches_channels(self)
        session.evaluate(propose(problem, sensitivity.measure(problem, session, keep=1)))


def propose(problem: Problem, loss_increase: NDArray[np.float64]) -> Q.BitPolicy:
    """Descend from the largest widths until all budgets hold, then give back, best first, what still fits.

    Args:
        problem: What is searched.
        loss_increase: How much (nats) every pair of bits raises the loss, shape (decisions, 10, 10).

    Returns:
        A policy within all budgets.
    """
    losses = [decision.of(table) for decision, table in zip(problem.decisions, loss_increase, strict=True)]
    if problem.several is not None:
        chosen = _within_all(problem.several, losses, problem.decisions)
    else:
        chosen = _within(problem, losses)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def _within(problem: Problem, losses: Sequence[NDArray[np.float64]]) -> list[int]:
    """Descend within one budget; returns an option per decision."""
    loss, cost = padded(losses, np.inf), padded([decision.prices for decision in problem.decisions], np.inf)
    rows = np.arange(len(cost))
    chosen = np.array([decision.prices.argmax() for decision in problem.decisions])
    taken = cost[rows, chosen].tolist()
    # What each option costs in loss for what it saves. A step changes one row of it alone.
    steps = np.array([_steps(loss[row], cost[row], chosen[row]) for row in rows])
    while not problem.within_budget(total := sum(taken)):
        # Of steps that are alike the first is taken.
        row, option = divmod(int(steps.argmin()), steps.shape[1])
        chosen[row] = option
        taken[row] = float(cost[row, option])
        steps[row] = _steps(loss[row], cost[row], option)
    while True:
        gains = loss - loss[rows, chosen][:, None]
        price = total - cost[rows, chosen][:, None] + cost
        gains[(gains >= 0) | ~problem.limits[0].holds(price)] = np.inf
        row, option = divmod(int(gains.argmin()), gains.shape[1])
        if not np.isfinite(gains[row, option]):
            picks: list[int] = chosen.tolist()
            return picks
        total += float(cost[row, option] - cost[row, chosen[row]])
        chosen[row] = option


def _steps(loss: NDArray[np.float64], cost: NDArray[np.float64], pick: int) -> NDArray[np.float64]:
    """Tell what options of one decision add to the loss for what they save; infinite for those that save nothing."""
    saved = cost[pick] - cost
    cheaper = saved > 0
    found: NDArray[np.float64] = np.full(len(loss), np.inf)
    found[cheaper] = (loss[cheaper] - loss[pick]) / saved[cheaper]
    return found


def _within_all(programme: Programme, losses: Sequence[NDArray[np.float64]], decisions: Sequence[Decision]) -> list[int]:
    """Descend within several budgets: a step costs the least loss for what it takes off what exceeds them in sum.

    Where no single step comes closer (an option that saves latency may cost storage), the exact programme chooses.

    Args:
        programme: The budgets.
        losses: What every option loses, by decision.
        decisions: What there is to decide.

    Returns:
        An option per decision.
    """
    chosen = [int(decision.prices.argmax()) for decision in decisions]
    loss, rows = padded(losses, np.inf), np.arange(len(decisions))
    while not programme.fits(chosen):
        excess = programme.excesses(chosen)
        saved = excess[rows, chosen][:, None] - excess
        closer = saved > STEP
        if not closer.any():
            return programme.choose(losses)
        steps: NDArray[np.float64] = np.full(saved.shape, np.inf)
        steps[closer] = (loss - loss[rows, chosen][:, None])[closer] / saved[closer]
        layer, option = divmod(int(steps.argmin()), steps.shape[1])
        chosen[layer] = option
    while True:
        gains = loss - loss[rows, chosen][:, None]
        gains[gains >= 0] = np.inf
        gains[~programme.rooms(chosen, np.isfinite(gains))] = np.inf
        layer, option = divmod(int(gains.argmin()), gains.shape[1])
        if not np.isfinite(gains[layer, option]):
            return chosen
        chosen[layer] = option
