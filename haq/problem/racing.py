"""What a policy must reach to be worth a whole evaluation.

A policy is chosen in the end among those within one standard error of the best, the error being that of the difference of two
policies on the same samples. What is beaten here is further below: by the standard error of the difference of two policies
that err independently of each other. Policies of one network are wrong about much the same samples, so that this is about two
of the paired standard errors; the value to beat is certainly below all that may still be chosen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from haq.problem.problem import Problem


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


def beat(problem: Problem, best: float) -> float:
    """Tell the value below which policies aren't evaluated to their end.

    Args:
        problem: What is searched, whose values are shares.
        best: The best value so far.

    Returns:
        The value.
    """
    if problem.objective.higher_is_better:
        return best - margin(best, problem.evaluator.count)
    return best + margin(1 - best, problem.evaluator.count)
