"""Optimizers of other packages as solvers: optuna's TPE and nevergrad's portfolio, as somebody would use them here.

    pip install -c constraints.txt -e ".[rivals]"

Where all pairs of some widths can be chosen, a decision is two whole numbers, the places of its widths of weights and of
activations; otherwise it is one, the place of the pair by its price. Widths are ordered, which categories would hide. There
are two ways to keep the budget:

    repaired        what is proposed is lowered until it is within the budget, and filled, as random search does; TPE is told
                    the accuracy as that of the repaired policy, nevergrad as that of what it proposed
    constrained     what is over the budget isn't evaluated, and costs no evaluation: TPE is told by how much a constraint is
                    violated
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from haq.problem.decision import Decision
from haq.problem.problem import Problem
from haq.solvers import random_search
from haq.solvers.base import Session, Solver
from hw_models.extras import install_line

FEWEST = 20  # proposals of one of nevergrad's optimizers
PROPOSALS = 60  # that an optimizer may make for an evaluation: those that are known already, or over the budget, cost none


def imported(module: str) -> Any:
    """Import a package of the extra. Raises ImportError, with what to install, without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {install_line('rivals')}") from error


class Variables:
    """The decisions of a problem as whole numbers."""

    def __init__(self, problem: Problem) -> None:
        """Lay out the variables: their names and how many values each has."""
        self.problem = problem
        self.counts: dict[str, int] = {}
        self._grids: list[list[list[int]] | None] = []
        for number, decision in enumerate(problem.decisions):
            grid = _grid(decision)
            self._grids.append(grid)
            if len(decision.pairs) == 1:
                continue
            if grid is None:
                self.counts[f"pair {number}"] = len(decision.pairs)
                continue
            for operand, widths in zip("wa", grid, strict=True):
                if len(widths) > 1:
                    self.counts[f"{operand} {number}"] = len(widths)

    def options(self, values: dict[str, int]) -> list[int]:
        """Return the option of every decision."""
        found = []
        for number, (decision, grid) in enumerate(zip(self.problem.decisions, self._grids, strict=True)):
            if len(decision.pairs) == 1:
                found.append(0)
            elif grid is None:
                found.append(_by_price(decision)[values[f"pair {number}"]])
            else:
                pair = [widths[values.get(f"{operand} {number}", 0)] for operand, widths in zip("wa", grid, strict=True)]
                found.append(decision.pairs.tolist().index(pair))
        return found

    def values(self, options: Sequence[int]) -> dict[str, int]:
        """Return what stands for an option of every decision."""
        found = {}
        for number, (option, decision, grid) in enumerate(zip(options, self.problem.decisions, self._grids, strict=True)):
            if grid is None:
                found[f"pair {number}"] = _by_price(decision).index(option)
                continue
            for operand, widths, width in zip("wa", grid, decision.pairs[option].tolist(), strict=True):
                found[f"{operand} {number}"] = widths.index(width)
        return {name: value for name, value in found.items() if name in self.counts}

    def over(self, options: list[int]) -> float:
        """Tell by how much options exceed the budget, as a part of it; 0 and less where they don't."""
        return random_search.total_price(self.problem, options) / self.problem.limit - 1

    def repaired(self, options: list[int], random: np.random.Generator) -> list[int]:
        """Lower options until the budget holds, and fill it."""
        return random_search.filled(self.problem, random_search.lowered(self.problem, options, random), random)


def _grid(decision: Decision) -> list[list[int]] | None:
    """Return the widths of weights and of activations, ascending, if all pairs of them can be chosen."""
    widths = [sorted(set(decision.pairs[:, operand].tolist())) for operand in (0, 1)]
    if sorted(map(tuple, decision.pairs.tolist())) != list(itertools.product(*widths)):
        return None
    return widths


def _by_price(decision: Decision) -> list[int]:
    """Order options by what they cost."""
    order: list[int] = np.argsort(decision.prices, kind="stable").tolist()
    return order


class Tpe(Solver):
    """optuna's sampler, with its default settings but for `multivariate`, which takes decisions together."""

    name = "optuna"
    summary = "optuna's tree-structured Parzen estimator, policies repaired into the budget"
    repairs = True

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Ask the sampler until the evaluations are used, or it proposes nothing new."""
        optuna = imported("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        variables, random = Variables(problem), np.random.default_rng(seed)
        spaces = {name: optuna.distributions.IntDistribution(0, count - 1) for name, count in variables.counts.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental there
            constraints = None
            if not self.repairs:
                constraints = _violation
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constraints_func=constraints)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for _ in range(PROPOSALS * session.evaluations):
                if not session.left:
                    return
                self._step(study, spaces, variables, session, random)

    def _step(self, study: Any, spaces: Any, variables: Variables, session: Session, random: np.random.Generator) -> None:
        trial = study.ask(spaces)
        options = variables.options(trial.params)
        if self.repairs:
            values = variables.values(variables.repaired(options, random))
            score = self._score(variables, variables.options(values), session)
            # The proposal goes into the study as the policy that was evaluated.
            optuna = imported("optuna")
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            study.add_trial(optuna.trial.create_trial(params=values, distributions=spaces, value=score))
            return
        over = variables.over(options)
        trial.set_user_attr("over", over)
        score = 0.0
        if over <= 0:
            score = self._score(variables, options, session)
        study.tell(trial, score)

    def _score(self, variables: Variables, options: list[int], session: Session) -> float:
        return session.evaluate(random_search.policy(variables.problem, options)).score


def _violation(trial: Any) -> tuple[float]:
    """Tell optuna by how much a trial exceeds the budget."""
    return (trial.user_attrs["over"],)


class ConstrainedTpe(Tpe):
    """The same with the budget as a constraint."""

    name = "optuna-constrained"
    summary = "optuna's tree-structured Parzen estimator, the budget as a constraint"
    repairs = False


class Portfolio(Solver):
    """nevergrad's choice for so many variables and evaluations."""

    name = "nevergrad"
    summary = "nevergrad's NGOpt, policies repaired into the budget"
    optimizer = "NGOpt"

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Ask the optimizer until the evaluations are used, or it proposes nothing new."""
        nevergrad = imported("nevergrad")
        variables, random = Variables(problem), np.random.default_rng(seed)
        choices = {name: nevergrad.p.TransitionChoice(range(count)) for name, count in variables.counts.items()}
        space = nevergrad.p.Dict(**choices)
        space.random_state = np.random.RandomState(seed)  # what it draws from
        proposals = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A proposal that is known already costs no evaluation: those that are left are another optimizer's.
            while session.left and proposals < PROPOSALS * session.evaluations:
                budget = max(session.left, FEWEST)
                optimizer = nevergrad.optimizers.registry[self.optimizer](space, budget=budget, num_workers=1)
                for _ in range(budget):
                    if not session.left:
                        return
                    asked = optimizer.ask()
                    options = variables.repaired(variables.options(asked.value), random)
                    optimizer.tell(asked, -session.evaluate(random_search.policy(problem, options)).score)
                proposals += budget


class NamedPortfolio(Portfolio):
    """nevergrad's own mixture of optimizers that share the evaluations."""

    name = "nevergrad-portfolio"
    summary = "nevergrad's Portfolio, policies repaired into the budget"
    optimizer = "Portfolio"
