"""How many of the choices of a search, and how many of the best policies, came from an agent's actor."""

from __future__ import annotations

from typing import NamedTuple

from haq.solvers.base import Session, Trial
from haq.solvers.surrogate import CHANGED, KNOWN, START

MOST_BEST = 10  # what is called the best policies of a search


class Contribution(NamedTuple):
    """How much of a search came from an agent: what its actor proposed, and the surrogate chose.

    Attributes:
        agent: Its name.
        choices: Policies that were chosen after the first ones.
        proposed: Of these, what the actor proposed.
        changed: Of these, neighbours of what the actor proposed.
        best: The best policies that were found, at most ten.
        best_proposed: Of these, what the actor proposed.
        best_changed: Of these, neighbours of what the actor proposed.
    """

    agent: str
    choices: int
    proposed: int
    changed: int
    best: int
    best_proposed: int
    best_changed: int


def contribution(session: Session) -> Contribution | None:
    """Count what an agent's actor contributed to a search; None where none proposed anything."""
    if not session.proposers:
        return None
    name = session.proposers[0]
    pairs = list(zip(session.origins, session.trials, strict=False))
    chosen = [origin for origin, _ in pairs if origin not in (START, KNOWN)]
    sound = [pair for pair in pairs if pair[1].feasible and pair[1].whole]
    best = [origin for origin, _ in sorted(sound, key=_rank)[:MOST_BEST]]
    return Contribution(
        name,
        len(chosen),
        chosen.count(name),
        chosen.count(name + CHANGED),
        len(best),
        best.count(name),
        best.count(name + CHANGED),
    )


def _rank(pair: tuple[str, Trial]) -> tuple[float, float, float]:
    return pair[1].rank
