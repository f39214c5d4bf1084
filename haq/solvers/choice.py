"""Which of the policies that a search evaluated it returns.

The best of many values on the search samples is the best of what is measured and of luck, and on other samples the luck is
gone (the winner's curse). Policies whose values differ by less than the standard error of the difference, paired by sample,
can't be told apart by their values. Two other measures can tell more of them, since both hang on every output and not only on
the few samples whose answers change: how far the outputs are from the float network's (the divergence), and the loss. So of
the policies within one paired standard error of the best (the rule of Breiman et al., "Classification and Regression Trees",
1984, section 3.4.3) the one is returned that has the best rank by value, divergence and loss, all three together.
`experiments/choice.py` holds it against others.

* At most `MOST` policies, the best by their values, are held against the best.
* Where values aren't means over samples (a metric, a function of the network), the best is returned.
* Of a trade-off the value is value x (cost / budget)^w, the error is that of values times the larger of both factors, and a
  policy that costs more than the best isn't returned: it would be closer to float for that alone.
* Of the cheapest policies that are good enough the cheapest is returned, as was asked for: one that costs more isn't, however
  safely it is good enough. Where several cost the same the rule is applied to these.

With further held-out samples (`Session.confirm`) the best few by the search samples are judged again, and the rule is applied
to what they are worth on both together, weighted by the number of samples: both tell the same, and together more than either
alone. The cheapest must then be good enough on both together; where none of the few is, the nearest to it is returned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch

import quantizers as Q
from haq.problem.evaluator import Evaluator
from haq.problem.goal import CHEAPEST, TRADEOFF
from haq.problem.paired import error_of_difference
from haq.solvers.base import Choice, Session, Trial
from haq.store.records import SAME

MOST = 24  # policies that are held against each other
LAST = 16  # policies that are judged again

# Of two policies: the standard error of the difference of their values, None where it isn't known.
PairedError = Callable[[Q.BitPolicy, Q.BitPolicy], float | None]


def choose(session: Session) -> Choice:
    """Choose what a search returns.

    Everything follows from the trials and from what the chosen ones are worth on every sample, which is computed again where
    it isn't remembered: who evaluated them, and whether the search was interrupted, changes nothing.

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


def finalists(trials: Iterable[Trial], best: Trial) -> list[Trial]:
    """List the trials that may be returned, as far as their values are near enough.

    Args:
        trials: All of a search.
        best: The best of them.

    Returns:
        At most `MOST`, the best first.
    """
    found = [trial for trial in trials if is_candidate(trial) and trial.policy != best.policy]
    if best.goal == CHEAPEST:
        found = [trial for trial in found if math.isclose(trial.cost, best.cost, rel_tol=SAME)]
    if best.goal == TRADEOFF:
        found = [trial for trial in found if trial.cost <= best.cost * (1 + SAME)]
    return [best, *sorted(found, key=lambda trial: trial.rank)][:MOST]


def is_candidate(trial: Trial) -> bool:
    """Say whether a trial may be returned: it is feasible, looked at whole, and its network's outputs are finite."""
    return trial.feasible and trial.whole and math.isfinite(trial.loss) and math.isfinite(trial.value)


def preferred(session: Session, trials: Sequence[Trial], paired_error: PairedError) -> Choice:
    """Choose one of a few trials by the rule.

    Args:
        session: The search.
        trials: Those that may be returned, the best first.
        paired_error: Of the values of two policies.

    Returns:
        The choice.
    """
    best = trials[0]
    alike, errors = [best], [0.0]
    for trial in trials[1:]:
        error = paired_error(best.policy, trial.policy)
        if error is None:
            continue
        if best.goal == TRADEOFF:
            error *= max(_factor(session, one) for one in (best, trial))
        if best.score - trial.score <= error:
            alike.append(trial)
            errors.append(error)
    total = [sum(parts) for parts in zip(*map(ranks, _measures(alike)), strict=True)]
    place = total.index(min(total))
    chosen = alike[place]
    return Choice(chosen, best, best.score - chosen.score, errors[place], len(alike))


def ranks(numbers: Sequence[float]) -> list[int]:
    """Count for each number how many are smaller."""
    return [sum(other < number for other in numbers) for number in numbers]


def _measures(trials: Sequence[Trial]) -> list[list[float]]:
    """List what trials are ranked by, smaller being better: values, losses, and divergences where all are known."""
    found = [[-trial.score for trial in trials], [trial.loss for trial in trials]]
    divergences = [trial.evaluation.divergence for trial in trials]
    known = [divergence for divergence in divergences if divergence is not None]
    if len(known) == len(trials):
        found.append(known)
    return found


def _factor(session: Session, trial: Trial) -> float:
    """Return what the value of a trial is multiplied by in a trade-off: (cost / budget)^w."""
    return session.problem.goal.worth(1.0, trial.cost, session.problem.tradeoff_target)


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
        values = []
        for one in (policy, other):
            parts = [evaluator.by_sample(one) for evaluator in (problem.evaluator, confirm)]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            values.append(torch.cat(known))
        return error_of_difference(*values)

    good_ones = [trial for trial in pooled if is_candidate(trial)]
    if good_ones:
        first = min(good_ones, key=lambda trial: trial.rank)
        choice = preferred(session, finalists(good_ones, first), paired_error)
        returned, compared = choice.trial, choice.compared
    else:
        returned, compared = min(pooled, key=lambda trial: (-trial.evaluation.score, trial.loss)), 1
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
