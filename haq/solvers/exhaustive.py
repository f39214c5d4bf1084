"""Every policy within the budgets: the truth, where there are few enough of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from haq.problem.channels import ChannelProblem, chooses_channels
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF
from haq.problem.limits import ROUNDING
from haq.problem.problem import Problem
from haq.solvers.base import Session, Solver
from haq.solvers.joint_space import option_counts
from haq.solvers.random_search import policy, total_price

AHEAD = 16  # policies that workers may begin with, of which the first may end the search
TOGETHER = 4096  # policies of channels and widths whose costs are looked up at once
HOPELESS = 1000  # times as many policies as evaluations, which it would take too long to count


class Exhaustive(Solver):
    """Evaluates all policies within all budgets.

    Where the cheapest is looked for it begins with the cheapest, and the first that is good enough is the optimum, proven.
    """

    name = "exhaustive"
    summary = "every policy within the budget, where there are few"
    draws = False
    goals = (BEST.kind, CHEAPEST, TRADEOFF)

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Evaluate all of them. Raises ValueError, evaluating none, if they are more than are allowed.

        Where the cheapest is looked for they may be more: it isn't known before how many it takes.
        """
        options = [range(count) for count in option_counts(problem)]
        count = math.prod(map(len, options))
        if count > HOPELESS * session.evaluations:
            raise ValueError(
                f"there are {count:.3g} policies; exhaustive search of {session.evaluations} evaluations is hopeless"
            )
        every = map(list, itertools.product(*options))
        if chooses_channels(problem):
            chosen = _fitting(problem, every)
        else:
            chosen = [picks for picks in every if problem.fits(picks)]
        if problem.goal.kind == CHEAPEST:
            self._from_below(problem, session, chosen)
            return
        if len(chosen) > session.evaluations:
            raise ValueError(
                f"{len(chosen):,} policies are within the budget: allow as many evaluations, or take another solver"
            )
        session.expect(policy(problem, picks) for picks in chosen)
        for picks in chosen:
            session.evaluate(policy(problem, picks))

    @staticmethod
    def _from_below(problem: Problem, session: Session, chosen: list[list[int]]) -> None:
        """Evaluate policies from the cheapest to the first that is good enough, and those that cost the same.

        Args:
            problem: What is searched.
            session: Evaluates policies.
            chosen: All within the budgets, an option per decision each.
        """
        prices = np.array([total_price(problem, picks) for picks in chosen])
        order = np.argsort(prices, kind="stable").tolist()
        policies = [policy(problem, chosen[index]) for index in order]
        for place, index in enumerate(order):
            found = session.best
            if not session.left or (found is not None and prices[index] > found.cost * (1 + ROUNDING)):
                return
            if place % AHEAD == 0:
                session.expect(policies[place : place + min(AHEAD, session.left)])
            session.evaluate(policies[place])


def _fitting(problem: ChannelProblem, every: Iterator[list[int]]) -> list[list[int]]:
    """List the policies of channels and widths that are within all budgets.

    Args:
        problem: What is searched.
        every: An option for each channel decision, then for each decision of widths.
    """
    found = []
    while part := list(itertools.islice(every, TOGETHER)):
        fits = problem.joint.fits(np.array(part))
        found += [picks for picks, fit in zip(part, fits.tolist(), strict=True) if fit]
    return found
