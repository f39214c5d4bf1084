"""When a part of the samples tells that a policy isn't worth a whole evaluation.

That can be told of shares: of samples that count as right, and of means of values by sample whose unit is "%", so that each
is from 0 to 1. Of other means nobody knows how large the values of samples that weren't looked at are, a metric over all
samples has no value by sample, and what is given the network looks at what it likes. They are always evaluated whole.

A policy is chosen in the end among those within one standard error of the best, the error being that of the difference of two
policies on the same samples. What is beaten here is further below: by the standard error of the difference of two policies
that err independently of each other. Policies of one network are wrong about much the same samples, so that this is about two
of the paired standard errors; the value to beat is certainly below all that may still be chosen.
"""

from __future__ import annotations

import math

from haq.problem.objective import MetricObjective, Objective, ValueObjective
from haq.store.units import PERCENT


def has_shares(objective: Objective) -> bool:
    """Say whether an objective's values are shares of samples, or means of values by sample from 0 to 1."""
    if isinstance(objective, ValueObjective):
        return objective.unit == PERCENT and not isinstance(objective, MetricObjective)
    return objective.takes_scores


def chance_of_counted(good: float, seen: int, share: float, count: int) -> float:
    """Tell how probable it is that so few are good of samples drawn without replacement.

    Args:
        good: How many of those drawn are good.
        seen: How many were drawn.
        share: Of all samples that are good.
        count: All samples.

    Returns:
        The probability that as few or fewer are, which follows the hypergeometric distribution.
    """
    # The share may be one that was reached itself, rounded.
    needed = min(max(math.ceil(share * count - 1e-6), 0), count)
    if round(good) * count >= needed * seen:
        return 1.0
    from scipy.stats import hypergeom  # it takes half a second to import

    return float(hypergeom.cdf(round(good), count, needed, seen))


def chance_of_bounded(good: float, seen: int, mean: float, count: int) -> float:
    """Bound how probable it is that the mean of values from 0 to 1, drawn without replacement, is so small.

    Args:
        good: The sum of those drawn.
        seen: How many were drawn.
        mean: Of all values.
        count: All values.

    Returns:
        The smaller one of two bounds of Hoeffding ("Probability inequalities for sums of bounded random variables", 1963,
        theorem 1 and section 6): for the mean of those drawn to be so small, and for that of the others to be so large.
    """
    mean = min(max(mean - 1e-9, 0.0), 1.0)
    drawn, left = good / seen, (mean * count - good) / max(count - seen, 1)
    if drawn >= mean:
        return 1.0
    if left > 1:
        return 0.0
    return math.exp(-max(seen * _divergence(drawn, mean), (count - seen) * _divergence(left, mean)))


def _divergence(share: float, other: float) -> float:
    """Return the divergence (nats) of Kullback and Leibler of two shares."""
    total = 0.0
    for part, whole in ((share, other), (1 - share, 1 - other)):
        if part > 0:
            if whole <= 0:
                return math.inf
            total += part * math.log(part / whole)
    return max(total, 0.0)


def margin(share: float, count: int) -> float:
    """Tell how far below the best share another is that can't be chosen any more.

    Args:
        share: The best, 0 to 1.
        count: The number of samples that shares are of.

    Returns:
        One sample, and the m with m = sqrt((p (1 - p) + q (1 - q)) / count) for p the best share and q = p - m: the standard
        error of the difference of two shares of independent samples.
    """
    # Squared, that is (count + 1) m^2 - (2 p - 1) m - 2 p (1 - p) = 0.
    half = (2 * share - 1) / 2
    root = math.sqrt(half**2 + 2 * (count + 1) * share * (1 - share))
    return (half + root) / (count + 1) + 1 / count


def beat(objective: Objective, best: float, count: int) -> float:
    """Tell the value below which policies aren't evaluated to their end.

    Args:
        objective: What policies are judged by, in shares.
        best: The best value so far.
        count: The number of samples.

    Returns:
        The value.
    """
    if objective.higher_is_better:
        return best - margin(best, count)
    return best + margin(1 - best, count)
