"""What evaluations go into, told before a search starts; and how many of them its size asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from haq.problem.goal import BEST
from haq.problem.problem import Problem
from haq.solvers import PLAN
from haq.solvers.base import Solver, Spending
from haq.solvers.cheapest import MEASURED
from haq.solvers.joint_space import option_counts
from haq.solvers.sensitivity import COMPUTED, evaluations_for_all
from haq.store.units import counted

PER_ROOT = 24  # evaluations for the root of a bit of choice
STEP = 10  # proposals are multiples of it
MINUTE, HOUR = 60, 3600  # seconds


def proposed(problem: Problem) -> int:
    """Propose how many policies a solver should evaluate, by what there is to decide.

    That is 24 times the root of the choice in bits, the sum over free decisions of log2(options), to the nearest ten: 200 for
    12 layers of 49 pairs of widths each, 420 for 54 and 980 for 300; but never more than there are policies. What is found
    grows with the logarithm of what is tried, and what solvers learn of one layer helps with others: less than twice as much
    for twice as many layers is enough to be as near to the best.

    Args:
        problem: What is to be solved.

    Returns:
        The number.
    """
    counts = option_counts(problem)
    choice = sum(map(math.log2, counts))
    found = max(STEP * round(PER_ROOT * math.sqrt(choice) / STEP), STEP)
    if choice < math.log2(found):
        return math.prod(counts)
    return found


def spending(
    solver: Solver, problem: Problem, evaluations: int, kind: str, known: bool = False, env: str = PLAN
) -> list[Spending]:
    """Tell what a solver's evaluations will go into, those of sensitivities included.

    Args:
        solver: The solver.
        problem: What it is to solve.
        evaluations: How many policies it may evaluate.
        kind: The kind of sensitivities.
        known: Whether there are some already.
        env: The environment of agents.

    Returns:
        What they go into, in their order.
    """
    parts = []
    left = evaluations
    if solver.uses_sensitivities and not known and kind not in COMPUTED:
        needed = evaluations_for_all(problem)
        count = min(needed, most_for_sensitivities(solver, problem, evaluations))
        if count > 1:
            parts.append(Spending("sensitivities, one operand at a time", count, needed))
            left -= count
    as_haq = env != PLAN and getattr(solver, "takes_agent", False)
    knows_goal = problem.goal.kind in getattr(solver, "goals", ()) and not as_haq
    if problem.goal.kind != BEST.kind and not knows_goal:
        return [*parts, Spending("searches within one budget after the other, and what follows from them", left)]
    if as_haq:
        return [*parts, Spending("episodes that the agent plays, the first ones at random", left)]
    # Somebody's own solver need not say.
    tell = getattr(solver, "spending", None)
    if tell is None:
        return [*parts, Spending("policies that it chooses", left)]
    return [*parts, *tell(problem, left)]


def most_for_sensitivities(solver: Solver, problem: Problem, evaluations: int) -> int:
    """Return how many evaluations sensitivities may take of a solver's.

    Args:
        solver: The solver.
        problem: What is to be solved.
        evaluations: How many it is allowed.

    Returns:
        The number of evaluations.
    """
    share = getattr(solver, "most_measured", 1.0)
    if problem.goal.kind != BEST.kind and problem.goal.kind not in getattr(solver, "goals", ()):
        share = MEASURED
    return min(int(share * evaluations), evaluations - 1)


def words_of(parts: Sequence[Spending], evaluations: int) -> list[str]:
    """Write what evaluations go into, a line each, with what is left out.

    Args:
        parts: What they go into.
        evaluations: How many there are.
    """
    lines = []
    for part in parts:
        count, wanted = part.count, part.wanted
        if not count and not wanted:
            continue
        line = f"{count} for {part.words}"
        if wanted is not None and wanted > count:
            line += f" ({wanted} would be all; {wanted - count} are left out, for {evaluations} evaluations)"
        lines.append(line)
    rest = evaluations - sum(part.count for part in parts)
    if rest > 0:
        lines.append(f"{rest} are not needed")
    return lines


def duration_words(seconds: float) -> str:
    """Write how long something takes, roughly: "0.3 s", "4 min", "2.5 h"."""
    if seconds < MINUTE:
        return f"{seconds:.2g} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.2g} min"
    return f"{seconds / HOUR:.2g} h"


def time_words(problem: Problem, evaluations: int) -> str:
    """Say about how long evaluations take, by how long the float network's took; nothing where nothing is computed.

    Args:
        problem: What is searched.
        evaluations: How many policies are evaluated.
    """
    seconds = getattr(problem, "float_seconds", 0.0)
    if not seconds:
        return ""
    each, together = duration_words(seconds), duration_words(seconds * evaluations)
    all_of_them = counted(evaluations, "evaluations")
    pace = f"at that pace {all_of_them} would take {together}, and quantized networks up to a few times as long"
    return f"the float network took {each} on the same samples; {pace}"
