"""Every policy within the budget: the truth, where there are few enough of them."""

from __future__ import annotations

import itertools
import math

from haq.problem.problem import Problem
from haq.solvers.base import Session
from haq.solvers.random_search import policy


def solve(problem: Problem, session: Session, seed: int) -> None:
    """Evaluate all policies within the budget. Raises ValueError, evaluating none, if they are more than are allowed."""
    options = [range(len(decision.pairs)) for decision in problem.decisions]
    total = math.prod(map(len, options))
    if total > 1000 * session.evaluations:
        raise ValueError(f"there are {total:.3g} policies; exhaustive search of {session.evaluations} evaluations is hopeless")
    prices = [decision.prices for decision in problem.decisions]
    chosen = [
        list(picks)
        for picks in itertools.product(*options)
        if problem.within_budget(sum(float(price[i]) for price, i in zip(prices, picks, strict=True)))
    ]
    if len(chosen) > session.evaluations:
        raise ValueError(f"{len(chosen):,} policies are within the budget: allow as many evaluations, or take another solver")
    session.expect(policy(problem, picks) for picks in chosen)
    for picks in chosen:
        session.evaluate(policy(problem, picks))
