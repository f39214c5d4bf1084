"""Random policies that fill the budget: what any other solver must beat to be worth its name."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

import quantizers as Q
from haq.problem.channels import chooses_channels
from haq.problem.problem import Problem
from haq.problem.programme import STEP, Programme
from haq.solvers.base import Session, Solver
from haq.solvers.joint_space import JointSpace, drawing_space, option_counts

AHEAD = 256  # policies that are drawn before the first of them is evaluated
RACED = 16  # policies that are begun with before the first of them is evaluated, where those after it are to beat it
MOST_STALE_ROUNDS = 100  # draws in a row that are no new policy, after which there seem to be none


class RandomSearch(Solver):
    """Draws every decision's pair uniformly among those worth choosing, and repairs it; of channels every group's share too.

    A naive draw would leave much of the budget unused.
    """

    name = "random"
    summary = "random policies that fill the budget"
    races = True

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Draw and evaluate until the evaluations are used or nothing new is drawn."""
        random = np.random.default_rng(seed)
        stale_rounds = 0
        while session.left and stale_rounds < MOST_STALE_ROUNDS:
            drawn: list[Q.BitPolicy] = []
            while len(drawn) < min(AHEAD, session.left) and stale_rounds < MOST_STALE_ROUNDS:
                repaired = unseen(problem, session, drawn, draw(problem, random), random)
                stale_rounds += 1
                if repaired is not None:
                    stale_rounds = 0
                    drawn.append(policy(problem, repaired))
            window = AHEAD
            if session.races:
                window = RACED
            expected = 0
            for place, one in enumerate(drawn):
                soon = drawn[expected : place + window]
                session.expect(soon, session.racing_beat())
                expected += len(soon)
                session.evaluate(one)


def unseen(
    problem: Problem, session: Session, waiting: Collection[Q.BitPolicy], chosen: list[int], random: np.random.Generator
) -> list[int] | None:
    """Repair options to a policy that is new: one that fills the budget, or else one within it.

    Args:
        problem: What is searched.
        session: Knows what was evaluated.
        waiting: What was chosen already and isn't evaluated yet.
        chosen: An option per decision, whatever it costs.
        random: What is drawn from.

    Returns:
        An option per decision, or None if neither policy is new.
    """
    within = lowered(problem, chosen, random)
    full = filled(problem, within, random)
    for picks in (full, within):
        made = policy(problem, picks)
        if not session.seen(made) and made not in waiting:
            return picks
    return None


def draw(problem: Problem, random: np.random.Generator) -> list[int]:
    """Draw an option of every decision, uniformly, whatever it costs; of channels too, if there are any to choose."""
    return [int(random.integers(count)) for count in option_counts(problem)]


def policy(problem: Problem, chosen: list[int]) -> Q.BitPolicy:
    """Make the policy of an option per decision."""
    if chooses_channels(problem):
        return drawing_space(problem).policy(chosen)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def lowered(problem: Problem, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Lower random decisions until all budgets hold.

    Args:
        problem: What is searched.
        chosen: An option per decision.
        random: What is drawn from.

    Returns:
        An option per decision.
    """
    if chooses_channels(problem):
        return _lowered_jointly(drawing_space(problem), chosen, random)
    if problem.several is not None:
        return _lowered_within_all(problem.several, chosen, random)
    prices = [decision.prices for decision in problem.decisions]
    chosen = list(chosen)
    taken = [float(row[pick]) for row, pick in zip(prices, chosen, strict=True)]
    while not problem.within_budget(sum(taken)):
        layer = int(random.integers(len(prices)))
        cheaper = np.flatnonzero(prices[layer] < prices[layer][chosen[layer]])
        if len(cheaper):
            chosen[layer] = int(random.choice(cheaper))
            taken[layer] = float(prices[layer][chosen[layer]])
    return chosen


def _lowered_jointly(space: JointSpace, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Lower random decisions, of channels and of widths, until all budgets hold; if that leads nowhere, take a random plan."""
    found = space.lowered(np.array([chosen]), random)
    if not len(found):
        return list(space.planned([random.random(count) for count in space.counts.tolist()]))
    lower: list[int] = found[0].tolist()
    return lower


def _lowered_within_all(programme: Programme, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Lower random decisions, always towards the budgets; if no single one leads there, any policy within them is drawn.

    Args:
        programme: The budgets.
        chosen: An option per decision.
        random: What is drawn from.

    Returns:
        An option per decision.
    """
    chosen = list(chosen)
    while not programme.fits(chosen):
        for layer in random.permutation(len(chosen)).tolist():
            excess = programme.excess(chosen, layer)
            closer = np.flatnonzero(excess < excess[chosen[layer]] - STEP)
            if len(closer):
                chosen[layer] = int(random.choice(closer))
                break
        else:
            return drawn_within(programme, random)
    return chosen


def drawn_within(programme: Programme, random: np.random.Generator) -> list[int]:
    """Draw an option per decision within all budgets: of all that fit the one with the least sum of random numbers."""
    return programme.choose([random.random(count) for count in programme.counts])


def filled(problem: Problem, chosen: list[int], random: np.random.Generator) -> list[int]:
    """Fill the budgets: in random order, decisions get more bits as far as what is left of all of them allows.

    First any that fit, so that every policy that fills the budget can be met; then the dearest.

    Args:
        problem: What is searched.
        chosen: An option per decision.
        random: What is drawn from.

    Returns:
        An option per decision.
    """
    if chooses_channels(problem):
        full: list[int] = drawing_space(problem).filled(np.array([chosen]), random)[0].tolist()
        return full
    chosen = list(chosen)
    total = total_price(problem, chosen)
    for dearest in (False, True):
        for layer in random.permutation(len(chosen)).tolist():
            pairs, prices = problem.decisions[layer].pairs, problem.decisions[layer].prices
            now = prices[chosen[layer]]
            pair = pairs[chosen[layer]]
            more = (pairs >= pair).all(1) & (pairs > pair).any(1)
            fitting = more & (total - now + prices <= problem.limit)
            if problem.several is not None:
                fitting &= problem.several.room(chosen, layer)
            fits = np.flatnonzero(fitting)
            if not len(fits):
                continue
            if dearest:
                chosen[layer] = int(fits[prices[fits].argmax()])
            else:
                chosen[layer] = int(random.choice(fits))
            total += float(prices[chosen[layer]] - now)
    return chosen


def total_price(problem: Problem, chosen: list[int]) -> float:
    """Sum the prices of an option per decision, in the metric's unit."""
    if chooses_channels(problem):
        return float(problem.joint.totals(np.array([chosen]))[0, 0])
    return sum(float(decision.prices[pick]) for decision, pick in zip(problem.decisions, chosen, strict=True))
