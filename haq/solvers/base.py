"""Solvers: all of them get the same problem and the same number of evaluations, and report in the same way.

A solver is a function `solve(problem, session, seed)`. It evaluates policies through the session, which counts them and
keeps the best that meets the budget; what the solver found is `session.best`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import quantizers as Q
from haq.problem.evaluator import Evaluation
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities
from haq.store.checkpoint import Checkpoint

# Name -> function of this package; its module is imported when it is asked for, so that only its own libraries are needed.
SOLVERS = {
    "ddpg": "agents.ddpg",
    "td3": "agents.td3",
    "sac": "agents.sac",
    "ilp": "ilp.solve",
    "greedy": "greedy.solve",
    "evolution": "evolution.solve",
    "random": "random_search.solve",
    "exhaustive": "exhaustive.solve",
}
ENVS = ("plan", "haq")
USE_SENSITIVITIES = ("ddpg", "td3", "sac", "ilp", "greedy")
CHOOSE_AHEAD = ("ddpg", "td3", "sac", "evolution")
DRAW_NOTHING = ("ilp", "greedy", "exhaustive")


@dataclass(frozen=True)
class Trial:
    """A policy with what it was measured to give and what it costs (in the problem's metric)."""

    policy: Q.BitPolicy
    result: Evaluation
    cost: float

    @property
    def rank(self) -> tuple[float, float, float]:
        """Sorts better policies first: accuracy, then loss, then cost."""
        return -self.result.accuracy, self.result.loss, self.cost


@dataclass
class Session:
    """One solver's allowance of evaluations on a problem. A policy asked for twice counts once.

    `env` is the environment of agents, "plan" or "haq"; they note the share of actions at a bound, by episode, in `saturated`.
    `ahead` is the number of policies that a solver may choose before it learns what the first of them is worth; it says by
    `expect` what it will ask for, so that others can evaluate it meanwhile. An agent keeps its state in `checkpoint`.
    `sensitivities` are what a solver that works with them need not measure; otherwise it measures those of `sensitivity_kind`,
    and tells `on_sensitivities`.
    """

    problem: Problem
    evaluations: int
    on_evaluation: Callable[[int, Trial, bool], None] = lambda count, found, feasible: None
    sensitivities: Sensitivities | None = None
    sensitivity_kind: str = "loss"
    on_sensitivities: Callable[[Sensitivities], None] = lambda measured: None
    env: str = "plan"
    ahead: int = 1
    checkpoint: Checkpoint | None = None
    best: Trial | None = None
    saturated: list[float] = field(default_factory=list)
    _seen: set[Q.BitPolicy] = field(default_factory=set)

    @property
    def used(self) -> int:
        return len(self._seen)

    @property
    def left(self) -> int:
        return self.evaluations - len(self._seen)

    def seen(self, policy: Q.BitPolicy) -> bool:
        """Whether a policy was asked for before."""
        return policy in self._seen

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Say that these policies will be asked for, probably in this order. It changes no result: they count, and come, in
        the order in which they are asked for."""
        self.problem.expect(policies)

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Accuracy and loss of a policy. Raises RuntimeError beyond the allowance."""
        if policy in self._seen:
            return self.problem.evaluate(policy)
        if not self.left:
            raise RuntimeError(f"all {self.evaluations} evaluations are used")
        found = Trial(policy, self.problem.evaluate(policy), self.problem.policy_cost(policy))
        self._seen.add(policy)
        feasible = self.problem.within_budget(found.cost)
        if feasible and (self.best is None or found.rank < self.best.rank):
            self.best = found
        self.on_evaluation(self.used, found, feasible)
        return found.result


def solve(name: str, session: Session, seed: int) -> Trial:
    """Run a solver by name and return the best policy that it evaluated within the budget."""
    module, _, function = SOLVERS[check_name(name)].partition(".")
    getattr(importlib.import_module(f"haq.solvers.{module}"), function)(session.problem, session, seed)
    if session.best is None:
        raise RuntimeError(f"{name} evaluated no policy within the budget")
    return session.best


def check_env(name: str) -> str:
    """The name itself, or ValueError with those that are known."""
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVS)}")
    return name


def check_name(name: str) -> str:
    """The name itself, or ValueError with the names that are close to it."""
    if name not in SOLVERS:
        close = difflib.get_close_matches(name, SOLVERS, n=2, cutoff=0.3) or list(SOLVERS)
        raise ValueError(f"unknown solver {name!r}; did you mean {' or '.join(close)}? Known: {', '.join(SOLVERS)}")
    return name
