"""Searches of one network that share what they learn: what a policy is worth depends on neither hardware nor budget.

Every search chooses by its own problem, learns from the trials of all, and may return each that is within its own budgets.
They have one allowance together: `allowance`. First each begins with a few policies, as many in all as one search begins with,
and chooses one. From then on the search chooses whose last choice promised most; every few times the next one in turn does,
whose promise may be out of date.

Everything follows from the seed, from the searches in their order and from what was evaluated, in its order; who evaluates
changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import quantizers as Q
from haq.problem.evaluator import Evaluation
from haq.problem.goal import CHEAPEST
from haq.solvers.base import Session
from haq.solvers.surrogate import Search, wanted_start

FURTHER = 8  # each further search adds one part in so many of a search's evaluations
IN_TURN = 8  # one choice in so many is that of the next search in turn


def allowance(searches: int, evaluations: int) -> int:
    """Return how many policies searches may evaluate together: those of one, and an eighth as many for each further one.

    Args:
        searches: How many there are.
        evaluations: How many policies one that is alone may evaluate.

    Returns:
        The number of policies.
    """
    return evaluations + (searches - 1) * evaluations // FURTHER


class Sharing:
    """Searches that take turns.

    Attributes:
        searches: The searches, whose sessions evaluate.
        spent: Every policy that was evaluated, in order.
    """

    def __init__(
        self,
        searches: Sequence[Search],
        evaluations: int,
        on_trial: Callable[[int, Q.BitPolicy, Evaluation], None] = lambda place, policy, evaluation: None,
    ) -> None:
        """Begin.

        Args:
            searches: Just begun, of problems of the same network, samples and quantization.
            evaluations: How many policies may be evaluated, by all together.
            on_trial: Told every policy that is new, with the place of the search that chose it, once all have learned of it.
        """
        self.searches = list(searches)
        self.evaluations = evaluations
        self.on_trial = on_trial
        self.spent: dict[Q.BitPolicy, Evaluation] = {}
        self._waiting: deque[int] = deque()  # places of searches, in the order of their choices
        self._over: set[int] = set()  # searches that find nothing new
        self._turns = 0  # taken one after the other
        self._chosen = [0] * len(self.searches)
        self._share_start()

    def run(self) -> None:
        """Choose and evaluate, until all evaluations are used or nobody finds anything new."""
        ahead = max(search.session.ahead for search in self.searches)
        while True:
            while len(self._waiting) < min(ahead, self.evaluations - len(self.spent)):
                if not self._choose():
                    break
            if not self._waiting:
                return
            self._evaluate(self._waiting.popleft())

    def _share_start(self) -> None:
        """Leave each search a few of the policies to begin with, each other ones: they differ in kind."""
        for place, search in enumerate(self.searches):
            each = math.ceil(wanted_start(len(search.space.free)) / len(self.searches))
            search.begin_with(each, place)

    def _choose(self) -> bool:
        """Let a search choose a policy; False if nobody finds any that is new."""
        while len(self._over) < len(self.searches):
            place = self._next()
            search = self.searches[place]
            options = search.choose()
            if options is None:
                self._over.add(place)
                continue
            self._chosen[place] += 1
            self._expect(place, options)
            self._waiting.append(place)
            return True
        return False

    def _expect(self, place: int, options: tuple[int, ...]) -> None:
        """Let a policy that a search chose be evaluated; no other chooses it too."""
        chooser = self.searches[place]
        policy = chooser.space.policy(options)
        others = [search for search in self.searches if search is not chooser]
        chooser.expect(options, [search.session for search in others if may_return(search.session, policy)])
        for search in others:
            search.leave(policy)

    def _next(self) -> int:
        """Return the place of the search that chooses now."""
        there = [place for place in range(len(self.searches)) if place not in self._over]
        promises = {place: self._promise(place) for place in there}
        if sum(self._chosen) % IN_TURN and math.isfinite(max(promises.values())):
            return max(there, key=lambda place: (promises[place], -place))
        while self._turns % len(self.searches) in self._over:
            self._turns += 1
        place = self._turns % len(self.searches)
        self._turns += 1
        return place

    def _promise(self, place: int) -> float:
        """Return what the last choice of a search was expected to gain, of costs in parts of the reference's."""
        search = self.searches[place]
        if search.problem.goal.kind == CHEAPEST and search.model.best is not None:
            return search.gain / search.problem.reference
        return search.gain

    def _evaluate(self, place: int) -> None:
        """Evaluate the policy that a search chose first, and let all learn from it."""
        chooser = self.searches[place]
        policy, evaluation = chooser.evaluate()
        if policy in self.spent:
            return
        self.spent[policy] = evaluation
        for search in self.searches:
            if search is chooser:
                continue
            search.know(policy, evaluation)
            is_whole = evaluation.images >= search.problem.evaluator.count
            if is_whole and may_return(search.session, policy):
                search.session.adopt(policy, evaluation)
        self.on_trial(place, policy, evaluation)


def may_return(session: Session, policy: Q.BitPolicy) -> bool:
    """Say whether a policy is one that the search of a session may return, as far as its costs say."""
    return session.problem.allows(policy) and session.problem.holds(policy)
