"""Evolution: policies are crossed and mutated, and the best survive."""

from __future__ import annotations

import numpy as np

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers.base import Session, Solver
from haq.solvers.joint_space import option_counts
from haq.solvers.random_search import MOST_STALE_ROUNDS, draw, policy, unseen

POPULATION = 20
TOURNAMENT = 4  # parents are the better of so many

# A policy's rank, and the option that each of its decisions takes.
Member = tuple[tuple[float, float, float], list[int]]


class Evolution(Solver):
    """A steady state: a population of random policies that fill the budget, then one child after another.

    A child is of two tournament winners, crossed uniformly, one decision in expectation drawn anew, repaired to the budget; it
    takes the place of the worst if it is better. What SPOS (Guo et al., ECCV 2020) and others search architectures with, one
    child at a time.
    """

    name = "evolution"
    summary = "policies are crossed and mutated, and the best survive"
    chooses_ahead = True
    races = True

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Fill a population, then breed until the evaluations are used or nothing new is found."""
        random = np.random.default_rng(seed)
        first = min(POPULATION, session.evaluations)
        population: list[Member] = []
        waiting: dict[Q.BitPolicy, list[int]] = {}  # chosen, in this order, and not in the population yet
        stale_rounds = 0
        while True:
            while stale_rounds < MOST_STALE_ROUNDS and len(waiting) < session.left:
                if len(population) + len(waiting) < first:
                    child = draw(problem, random)
                elif len(waiting) < session.ahead:
                    child = breed(problem, population, random)
                else:
                    break
                repaired = unseen(problem, session, waiting, child, random)
                stale_rounds += 1
                if repaired is not None:
                    stale_rounds = 0
                    chosen = policy(problem, repaired)
                    waiting[chosen] = repaired
                    session.expect([chosen], beat_of(problem, session, population))
            if not waiting:
                return
            chosen = next(iter(waiting))
            options = waiting.pop(chosen)
            session.evaluate(chosen)
            # What was cut short is worse than the worst, whatever it is worth.
            if session.trials[-1].whole:
                population.append((session.trials[-1].rank, options))
                population = sorted(population)[:POPULATION]


def beat_of(problem: Problem, session: Session, population: list[Member]) -> float | None:
    """Tell which value a child must reach to be worth a whole evaluation.

    Args:
        problem: What is searched.
        session: Knows what may still be chosen in the end.
        population: The members so far, the worst of them last.

    Returns:
        The value below which it is neither taken into the population nor chosen, so that the search is the same as if every
        child were evaluated whole; None for a population that takes every child.
    """
    beat = session.racing_beat()
    if beat is None or len(population) < POPULATION:
        return None
    worst = float(problem.objective.signed(-population[-1][0][0]))
    return min(beat, worst, key=problem.objective.signed)


def breed(problem: Problem, population: list[Member], random: np.random.Generator) -> list[int]:
    """Cross the winners of two tournaments, and draw one decision in expectation anew; returns an option per decision.

    Args:
        problem: What is searched.
        population: Who may win.
        random: What is drawn from.

    Returns:
        An option per decision.
    """
    parents = []
    for _ in range(2):
        rivals = random.integers(len(population), size=TOURNAMENT)
        parents.append(min(population[i] for i in rivals)[1])
    child = [int(random.choice(genes)) for genes in zip(*parents, strict=True)]
    counts = option_counts(problem)
    for i in np.flatnonzero(random.random(len(child)) < 1 / len(child)):
        child[i] = int(random.integers(counts[i]))
    return child
