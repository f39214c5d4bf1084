"""Random policies that fill the budget: what any other solver must beat to be worth its name."""

from __future__ import annotations

import numpy as np

from haq.problem import Problem
from haq.solvers import Session


def solve(problem: Problem, session: Session, seed: int) -> None:
    """Draw every layer's pair uniformly among those worth choosing; lower random layers until the budget holds, then
    raise layers, in random order, as far as what is left allows. A naive draw would leave much of the budget unused."""
    random = np.random.default_rng(seed)
    pairs = [np.argwhere(layer) + 1 for layer in problem.choices]
    prices = [cost[layer] for cost, layer in zip(problem.cost, problem.choices, strict=True)]
    # Where a problem has fewer policies than evaluations, drawing goes on in vain: so the draws are counted, not the finds.
    for _ in range(session.evaluations):
        chosen = [int(random.integers(len(options))) for options in pairs]

        def price(layer: int, picks: list[int] = chosen) -> float:
            return float(prices[layer][picks[layer]])

        total = sum(price(layer) for layer in range(len(pairs)))
        while not problem.within_budget(total):
            layer = int(random.integers(len(pairs)))
            cheaper = np.flatnonzero(prices[layer] < price(layer))
            if len(cheaper):
                total -= price(layer)
                chosen[layer] = int(random.choice(cheaper))
                total += price(layer)
        for layer in random.permutation(len(pairs)).tolist():
            now = price(layer)
            fits = np.flatnonzero((prices[layer] > now) & (total - now + prices[layer] <= problem.limit))
            if len(fits):
                chosen[layer] = int(fits[prices[layer][fits].argmax()])
                total += price(layer) - now
        bits = np.array([options[pick] for options, pick in zip(pairs, chosen, strict=True)])
        session.evaluate(problem.policy(bits[:, 0], bits[:, 1]))
