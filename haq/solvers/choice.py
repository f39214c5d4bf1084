"""Which of the policies that a search evaluated it returns.

The best of many values on the search samples is the best of what is measured and of luck, and on other samples the luck is
gone (the winner's curse). Policies whose values differ by less than the standard error of the difference, paired by sample,
can't be told apart by their values. How far their outputs are from the float network's can: it hangs on every output, and not
on the few samples whose answers change. So another policy is returned in place of the best where the share of that standard
error which it gives up is less than the share of the divergence which it saves:

    (best value - value) / error + divergence / best divergence

is the least of all; 1 for the best itself. What is more than one standard error worse is never returned. (The one standard
error rule of Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3, with a price on it.)

* Only a policy with a smaller divergence than all that are better can be returned, so few are looked at.
* Where values aren't means over samples (a metric, a function of the network), and where there is no divergence, the best is
  returned.
* Of a trade-off the value is value x (cost / budget)^w, and the error is that of values times the larger of both factors.
* Of the cheapest policies that are good enough the cheapest is returned, as was asked for: one that costs more isn't, however
  safely it is good enough. Where several cost the same the rule is applied to these.

With further held-out samples (`Session.confirm`) the best few by the search samples are judged again, and the rule is applied
to what they are worth on both together, weighted by the number of samples: both tell the same, and together more than either
alone. The cheapest must then be good enough on both together; where none of the few is, the nearest to it is returned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch

import quantizers as Q
from haq.problem.evaluator import Evaluator
from haq.problem.goal import CHEAPEST, TRADEOFF
from haq.problem.paired import error_of_difference
from haq.solvers.base import Choice, Session, Trial
from haq.store.records import SAME

MOST = 12  # policies that are held against the best
LAST = 8  # policies that are judged again

# Of two policies: the standard error of the difference of their values, None where it isn't known.
PairedError = Callable[[Q.BitPolicy, Q.BitPolicy], float | None]


def choose(session: Session) -> Choice:
    """Choose what a search returns.

    Everything follows from the trials in their order and from what the chosen ones are worth on every sample, which is
    computed again here: who evaluated them, and whether the search was interrupted, changes nothing.

    Args:
        session: The search, with a `best`.

    Returns:
        The choice.
    """
    best = session.best
    assert best is not None
    if session.confirm is not None:
        return confirmed(session, best, session.confirm)
    return preferred(session, finalists(session.trials, best), session.problem.paired_error)


def preferred(session: Session, trials: list[Trial], paired_error: PairedError) -> Choice:
    """Choose one of a few trials by the rule.

    Args:
        session: The search.
        trials: The best, and those that may be returned in its place.
        paired_error: Of the values of two policies.

    Returns:
        The choice.
    """
    best = trials[0]
    chosen, error, least = best, 0.0, 1.0
    compared = 0
    for trial in trials[1:]:
        found = paired_error(best.policy, trial.policy)
        if found is None:
            continue
        compared += 1
        if best.goal == TRADEOFF:
            found *= max(factor(session, one) for one in (best, trial))
        price = price_of(best, trial, found)
        if price < least:
            chosen, error, least = trial, found, price
    return Choice(chosen, best, best.score - chosen.score, error, compared)


def confirmed(session: Session, best: Trial, confirm: Evaluator) -> Choice:
    """Choose by the samples of the search and further ones together.

    Args:
        session: The search.
        best: Its best trial.
        confirm: Judges policies on further samples.

    Returns:
        The choice, whose trials are those of the search.
    """
    problem = session.problem
    last = sorted(filter(is_candidate, session.trials), key=lambda trial: trial.rank)[:LAST]
    again = [confirm.evaluate(trial.policy) for trial in last]
    of_float = problem.float_result.value
    if problem.goal.kind == CHEAPEST:
        of_float = problem.float_result.together(confirm.measure_teacher()).value
    pooled = []
    for trial, evaluation in zip(last, again, strict=True):
        both = trial.evaluation.together(evaluation)
        good = problem.goal.is_met(problem.objective, both.value, of_float)
        pooled.append(dataclasses.replace(Trial.of(problem, trial.policy, both), feasible=good))

    def paired_error(policy: Q.BitPolicy, other: Q.BitPolicy) -> float | None:
        found = []
        for one in (policy, other):
            parts = [evaluator.by_sample(one) for evaluator in (problem.evaluator, confirm)]
            if parts[0] is None or parts[1] is None:
                return None
            found.append(torch.cat([parts[0], parts[1]]))
        return error_of_difference(*found)

    good_ones = [trial for trial in pooled if is_candidate(trial)]
    if good_ones:
        first = min(good_ones, key=lambda trial: trial.rank)
        choice = preferred(session, finalists(good_ones, first), paired_error)
        returned, compared = choice.trial, choice.compared
    else:
        returned, compared = min(pooled, key=lambda trial: (-trial.evaluation.score, trial.loss)), 0
    places = {trial.policy: place for place, trial in enumerate(last)}
    chosen, before = places[returned.policy], places[best.policy]
    error = paired_error(pooled[before].policy, returned.policy) or 0.0
    return Choice(
        last[chosen],
        best,
        pooled[before].score - returned.score,
        error,
        compared,
        finalists=len(last),
        confirmed=confirm.count,
        confirmed_trial=again[chosen],
        confirmed_best=again[before],
    )


def finalists(trials: Iterable[Trial], best: Trial) -> list[Trial]:
    """List the trials that may be returned: whole and feasible ones that are closer to float than all that are better.

    Args:
        trials: All of a search.
        best: The best of them.

    Returns:
        At most `MOST` beside the best, which is the first.
    """
    found = [best]
    if divergence_of(best) is None:
        return found
    for trial in sorted(filter(is_candidate, trials), key=lambda trial: trial.rank):
        if best.goal == CHEAPEST and not math.isclose(trial.cost, best.cost, rel_tol=SAME):
            continue
        divergence, least = divergence_of(trial), divergence_of(found[-1])
        if divergence is not None and least is not None and divergence < least:
            found.append(trial)
    return found[: MOST + 1]


def is_candidate(trial: Trial) -> bool:
    """Say whether a trial may be returned: it is feasible, evaluated on all samples, and its outputs are finite."""
    return trial.feasible and trial.whole and math.isfinite(trial.loss) and math.isfinite(trial.value)


def divergence_of(trial: Trial) -> float | None:
    """Return how far a policy's outputs are from the float network's; None where nobody knows."""
    divergence = trial.evaluation.divergence
    if divergence is None or not math.isfinite(divergence) or divergence < 0:
        return None
    return divergence


def factor(session: Session, trial: Trial) -> float:
    """Return what the value of a trial is multiplied by in a trade-off: (cost / budget)^w."""
    return session.problem.goal.worth(1.0, trial.cost, session.problem.tradeoff_target)


def price_of(best: Trial, trial: Trial, error: float) -> float:
    """Tell what a trial gives up and leaves, of a standard error and of the divergence of the best: below 1 it is preferred.

    Args:
        best: The best by its value.
        trial: Another.
        error: The paired standard error of their difference.

    Returns:
        The sum of both shares; infinity for more than one standard error.
    """
    below = best.score - trial.score
    given_up = 0.0
    if below > 0:
        given_up = math.inf
        if error > 0:
            given_up = below / error
    most, divergence = divergence_of(best), divergence_of(trial)
    assert most is not None
    assert divergence is not None
    if most == 0 or given_up > 1:
        return math.inf
    return given_up + divergence / most
