"""The searches of a sweep that learn from each other's trials: one search over all their problems, for each solver and seed.

Every search has a run of its own, as complete as any other. Its history has what it chose, by its solver, and what the others
chose, as `shared`; these within its budgets may be returned too, since all are evaluated alike. Written in the order of
evaluations, they let a sweep that was killed go on: it is done again with them at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import quantizers as Q
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities, decided_layers, largest_widths
from haq.solvers import SOLVERS
from haq.solvers.base import NothingGoodEnough, Session, Trial, conclude, find_solver
from haq.solvers.sensitivity import predicted
from haq.solvers.sharing import Sharing, allowance
from haq.store.history import SHARED
from haq.store.records import SharedRecord
from haq.study import sweep_run
from haq.study.config import SweepCell, WorkersConfig
from haq.study.search_run import SearchRun
from haq.study.sweep_run import SweepContext
from haq.study.task import SearchTask
from haq.study.workers.processes import working

Group = tuple[SweepCell, ...]


def groups(cells: Sequence[SweepCell]) -> list[Group]:
    """List the searches that learn from each other's trials, by solver and seed."""
    found: dict[tuple[str, int], list[SweepCell]] = {}
    for cell in cells:
        if SOLVERS.get(cell.solver).shares:
            found.setdefault((cell.solver, cell.seed), []).append(cell)
    return [tuple(group) for group in found.values()]


def evaluations_of(group: Group, context: SweepContext) -> int:
    """Return how many policies searches may evaluate together."""
    return allowance(len(group), context.first.evaluations)


def search(
    folder: Path,
    context: SweepContext,
    group: Group,
    workers: WorkersConfig,
    on_evaluation: Callable[[int], None] = lambda count: None,
) -> None:
    """Run searches that learn from each other's trials, or go on with them; nothing is done if all are finished.

    Args:
        folder: The sweep's.
        context: What its searches stand on.
        group: The searches.
        workers: Who evaluates policies.
        on_evaluation: Told how many policies were evaluated so far, by all together.
    """
    kind = context.sweep.settings.sensitivity_kind
    tasks = [context.task(cell, folder, kind) for cell in group]
    with ExitStack() as held, one_thread():
        runs = [
            held.enter_context(sweep_run.opened(folder / cell.folder, task, len(group)))
            for cell, task in zip(group, tasks, strict=True)
        ]
        if all(run.finished for run in runs):
            return
        evaluator = context.first.problem.evaluator
        held.enter_context(working(evaluator, workers.workers, workers.ray, context.sweep.settings.device))
        _Group(runs, tasks, evaluations_of(group, context), on_evaluation).run()


class _Group:
    """Searches that share what they try, with the run and the session of each."""

    def __init__(
        self,
        runs: Sequence[SearchRun],
        tasks: Sequence[SearchTask],
        evaluations: int,
        on_evaluation: Callable[[int], None],
    ) -> None:
        """Begin the searches.

        Args:
            runs: Open, ready to go on.
            tasks: What is searched, in the same order.
            evaluations: How many policies may be evaluated, by all together.
            on_evaluation: Told how many were.
        """
        self.runs, self.tasks = runs, tasks
        self.on_evaluation = on_evaluation
        self.evaluations = evaluations
        config = tasks[0].config
        self.solver = find_solver(config.solver)
        self._shared = [0] * len(runs)  # trials of others that were written
        self._known_losses: dict[Any, Sensitivities | None] = {}
        self.sessions = [self._session(run, task) for run, task in zip(runs, tasks, strict=True)]
        sharing: Any = self.solver  # its class says that it has `begin`
        searches = [sharing.begin(task.problem, one, config.seed) for task, one in zip(tasks, self.sessions, strict=True)]
        self.sharing = Sharing(searches, evaluations, self._share)

    def run(self) -> None:
        """Search, and write what each search found."""
        self.sharing.run()
        config = self.tasks[0].config
        shared = SharedRecord(
            solver=config.solver,
            seed=config.seed,
            searches=len(self.runs),
            evaluations=len(self.sharing.spent),
            alone=self.tasks[0].evaluations,
            known=len(self.sessions[0].known),
        )
        for run, task, session in zip(self.runs, self.tasks, self.sessions, strict=True):
            if run.finished:
                continue
            try:
                found = conclude(self.solver, session)
            except NothingGoodEnough:
                continue  # it has its history, and no result
            run.save_policy(found.policy)
            sweep_run.finish(run, task, session, shared)

    def _session(self, run: SearchRun, task: SearchTask) -> Session:
        def record(trial: Trial) -> None:
            run.record(task.config.solver, session.used, trial, task.problem, session.best)
            self._keep_best(run, session, trial.policy)

        session = Session(
            task.problem,
            self.evaluations,
            record,
            sensitivities=self._predicted(task.problem),
            known=run.known(task.problem).pairs,
            env=task.config.env,
            ahead=task.config.ahead,
            confirm=task.confirm,
            race=run.races,
            recorded=run.recorded(task.config.solver),
        )
        return session

    def _predicted(self, problem: Problem) -> Sensitivities | None:
        """Tell what gradients predict of the loss, computed once for all problems that decide the same."""
        asked = (decided_layers(problem), problem.bits, problem.decide(largest_widths(problem)))
        if asked not in self._known_losses:
            self._known_losses[asked] = predicted(problem)
        return self._known_losses[asked]

    def _share(self, place: int, policy: Q.BitPolicy, evaluation: Evaluation) -> None:
        """Write a policy that one search evaluated into the runs of the others."""
        for other, (run, task, session) in enumerate(zip(self.runs, self.tasks, self.sessions, strict=True)):
            if other == place:
                continue
            self._shared[other] += 1
            run.record(SHARED, self._shared[other], Trial.of(task.problem, policy, evaluation), task.problem)
            self._keep_best(run, session, policy)
        self.on_evaluation(len(self.sharing.spent))

    def _keep_best(self, run: SearchRun, session: Session, policy: Q.BitPolicy) -> None:
        is_best = session.best is not None and session.best.policy == policy
        if is_best and not run.is_behind:  # what is met again may still be refused
            run.save_policy(policy)
