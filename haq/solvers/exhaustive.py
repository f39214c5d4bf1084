"""Every policy within the budgets: the truth, where there are few enough of them."""

from __future__ import annotations

import itertools
import math

from haq.problem.problem import Problem
from haq.solvers.base import Session, Solver
from haq.solvers.random_search import policy

HOPELESS = 1000  # times as many policies as evaluations, which it would take too long to count


class Exhaustive(Solver):
    """Evaluates all policies within all budgets."""

    name = "exhaustive"
    summary = "every policy within the budget, where there are few"
    draws = False

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Evaluate all of them. Raises ValueError, evaluating none, if they are more than are allowed."""
        options = [range(len(decision.pairs)) for decision in problem.decisions]
        count = math.prod(map(len, options))
        if count > HOPELESS * session.evaluations:
            raise ValueError(
                f"there are {count:.3g} policies; exhaustive search of {session.evaluations} evaluations is hopeless"
            )
        every = map(list, itertools.product(*options))
        chosen = [picks for picks in every if problem.fits(picks)]
        if len(chosen) > session.evaluations:
            raise ValueError(
                f"{len(chosen):,} policies are within the budget: allow as many evaluations, or take another solver"
            )
        session.expect(policy(problem, picks) for picks in chosen)
        for picks in chosen:
            session.evaluate(policy(problem, picks))
