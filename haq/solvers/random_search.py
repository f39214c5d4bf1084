"""Random policies that fill the budget: what any other solver must beat to be worth its name."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers.base import Session

AHEAD = 256  # policies that are drawn before the first of them is evaluated
MOST_STALE_ROUNDS = 100  # draws in a row that are no new policy, after which there seem to be none


def solve(problem: Problem, session: Session, seed: int) -> None:
    """Draw every decision's pair uniformly among those worth choosing, and repair it: a naive draw would leave much of the
    budget unused."""
    random = np.random.default_rng(seed)
    stale_rounds = 0
    while session.left and stale_rounds < MOST_STALE_ROUNDS:
        drawn: list[Q.BitPolicy] = []
        while len(drawn) < min(AHEAD, session.left) and stale_rounds < MOST_STALE_ROUNDS:
            found = unseen(problem, session, drawn, draw(problem, random), random)
            stale_rounds = stale_rounds + 1 if found is None else 0
            if found is not None:
                drawn.append(policy(problem, found))
        session.expect(drawn)
        for one in drawn:
            session.evaluate(one)


def unseen(
    problem: Problem, session: Session, waiting: Collection[Q.BitPolicy], chosen: list[int], random: np.random.Generator
) -> list[int] | None:
    """Options repaired to a policy that is new, neither evaluated nor waiting for it: one that fills the budget, or else one
    within it. None if neither is."""
    within = lowered(problem, chosen, random)
    full = filled(problem, within, random)
    made = ((picks, policy(problem, picks)) for picks in (full, within))
    return next((picks for picks, one in made if not session.seen(one) and one not in waiting), None)


def draw(problem: Problem, random: np.random.Generator) -> list[int]:
    """An option of every decision, uniformly, whatever it costs."""
    return [int(random.integers(len(decision.pairs))) for decision in problem.decisions]


def policy(problem: Problem, chosen: list[int]) -> Q.BitPolicy:
    """The policy of an option per decision."""
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def lowered(problem: Problem, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Options that meet the budget: random decisions are lowered until it holds."""
    prices, chosen = [decision.prices for decision in problem.decisions], list(chosen)
    while not problem.within_budget(_total(problem, chosen)):
        layer = int(random.integers(len(prices)))
        cheaper = np.flatnonzero(prices[layer] < prices[layer][chosen[layer]])
        if len(cheaper):
            chosen[layer] = int(random.choice(cheaper))
    return chosen


def filled(problem: Problem, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Options that fill the budget: in random order, decisions get more bits as far as what is left allows. First any that
    fit, so that every policy that fills the budget can be met; then the dearest."""
    chosen = list(chosen)
    total = _total(problem, chosen)
    for dearest in (False, True):
        for layer in random.permutation(len(chosen)).tolist():
            _, pairs, prices = problem.decisions[layer]
            now, pair = prices[chosen[layer]], pairs[chosen[layer]]
            more = (pairs >= pair).all(1) & (pairs > pair).any(1)
            fits = np.flatnonzero(more & (total - now + prices <= problem.limit))
            if len(fits):
                chosen[layer] = int(fits[prices[fits].argmax()] if dearest else random.choice(fits))
                total += float(prices[chosen[layer]] - now)
    return chosen


def _total(problem: Problem, chosen: list[int]) -> float:
    return sum(float(decision.prices[pick]) for decision, pick in zip(problem.decisions, chosen, strict=True))
