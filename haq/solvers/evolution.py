"""Evolution: policies are crossed and mutated, and the best survive."""

from __future__ import annotations

import numpy as np

import quantizers as Q
from haq.problem.problem import Problem
from haq.solvers.base import Session, Trial
from haq.solvers.random_search import MOST_STALE_ROUNDS, draw, policy, unseen

POPULATION = 20
TOURNAMENT = 4  # parents are the better of so many


def solve(problem: Problem, session: Session, seed: int) -> None:
    """A steady state: a population of random policies that fill the budget; then, one by one, a child of two tournament
    winners, crossed uniformly, one decision in expectation drawn anew, repaired to the budget; it takes the place of the
    worst if it is better. What SPOS (Guo et al., ECCV 2020) and others search architectures with, one child at a time."""
    random = np.random.default_rng(seed)
    first = min(POPULATION, session.evaluations)
    population: list[tuple[tuple[float, float, float], list[int]]] = []
    waiting: dict[Q.BitPolicy, list[int]] = {}  # chosen, in this order, and not in the population yet
    stale_rounds = 0
    while True:
        while stale_rounds < MOST_STALE_ROUNDS and len(waiting) < session.left:
            if len(population) + len(waiting) < first:
                child = draw(problem, random)
            elif len(waiting) < session.ahead:
                parents = [min(population[i] for i in random.integers(len(population), size=TOURNAMENT))[1] for _ in range(2)]
                child = [int(random.choice(genes)) for genes in zip(*parents, strict=True)]
                for i in np.flatnonzero(random.random(len(child)) < 1 / len(child)):
                    child[i] = int(random.integers(len(problem.decisions[i].pairs)))
            else:
                break
            found = unseen(problem, session, waiting, child, random)
            stale_rounds = stale_rounds + 1 if found is None else 0
            if found is not None:
                born = policy(problem, found)
                waiting[born] = found
                session.expect([born])
        if not waiting:
            return
        born = next(iter(waiting))
        found = waiting.pop(born)
        population.append((Trial(born, session.evaluate(born), problem.policy_cost(born)).rank, found))
        population = sorted(population)[:POPULATION]
