"""A solver: uniform policies first, then single decisions of the best."""

from __future__ import annotations

import numpy as np

import haq
from haq.solvers.base import Session, Solver


class Downhill(Solver):
    """Changes one decision of the best policy at a time, at random, and keeps what is better."""

    name = "plugin_solver"
    summary = "changes one decision at a time"

    def solve(self, problem: haq.Problem, session: Session, seed: int) -> None:
        """Start with the cheapest policy; stop when all evaluations are used."""
        random = np.random.default_rng(seed)
        best = [int(decision.prices.argmin()) for decision in problem.decisions]
        session.evaluate(self.policy(problem, best))
        for _ in range(20 * session.left):
            if not session.left:
                return
            tried = list(best)
            layer = int(random.integers(len(tried)))
            tried[layer] = int(random.integers(len(problem.decisions[layer].pairs)))
            cost = sum(float(one.prices[pick]) for one, pick in zip(problem.decisions, tried, strict=True))
            if not problem.within_budget(cost):
                continue
            before = session.best
            session.evaluate(self.policy(problem, tried))
            if session.best is not before:
                best = tried

    def policy(self, problem: haq.Problem, picks: list[int]) -> object:
        """Make the policy of an option per decision."""
        pairs = [decision.pairs[pick] for decision, pick in zip(problem.decisions, picks, strict=True)]
        return problem.decide(pairs)
