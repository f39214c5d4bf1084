"""Many searches of one network: every target, budget, solver and seed, with all they can share measured once.

    sweep.json               what was asked; in the end, everything that was found
    sweep.png                the objective's value against cost, a panel for each target
    sensitivity/             the run that measured sensitivities
    TARGET-BUDGET-SOLVER-seedN/      a run each, as `python -m haq.search` writes them

What a policy is worth doesn't depend on the target: network, data, scales and evaluations are shared by all searches of a
process, and sensitivities by all of them. A search's result depends on nothing but its own settings, so neither their order
nor the number of processes does anything to it. Only the searches of a solver that learns from others' trials are one search
over all their problems (`haq.study.sweep_sharing`), one for every seed, of which the same holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.device import kind_of, spread
from haq.problem.evaluator import one_thread
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities, largest_widths
from haq.solvers import SOLVERS
from haq.solvers.base import NothingGoodEnough, Session, Solver, Trial, find_solver
from haq.solvers.sensitivity import by_evaluation, computed
from haq.store.files import CONFIG, SENSITIVITIES, SENSITIVITY, SWEEP, SWEEP_SCHEMA, TRIALS
from haq.store.lock import writing
from haq.store.records import (
    UNIFORM_8,
    FinishedSweepRecord,
    PolicyRecord,
    ResultRecord,
    SharedRecord,
    SweepRecord,
    error_key,
    paired_key,
    share_key,
)
from haq.store.shell import command_line
from haq.store.units import kind_of_cost
from haq.study import result as summary
from haq.study.config import ADAROUND, MEASURED, SearchConfig, SweepCell, SweepConfig
from haq.study.front import fronts, pareto
from haq.study.known_trials import KnownTrials
from haq.study.search_run import SearchRun, check_unused, read_trials, write_trials
from haq.study.task import (
    SearchTask,
    check_signature,
    check_versions,
    load_target,
    objective_of,
    read_agent,
    threads,
    versions,
)
from haq.study.workers.processes import Crew
from hw_models.target import is_compiled, is_measured

ORPHAN_S = 60.0  # a worker whose sweep was killed ends after the evaluation it is at; its search is waited for

Results = dict["SweepCell", ResultRecord]
Policies = dict["SweepCell", Q.BitPolicy]


@dataclass
class SweepContext:
    """What a sweep's searches stand on: a task for each target, which share what they evaluate, and the budgets in reach."""

    sweep: SweepConfig
    tasks: dict[str, SearchTask]
    unreachable: dict[str, list[str]]  # budgets by target

    @classmethod
    def load(cls, sweep: SweepConfig, **callbacks: Any) -> SweepContext:
        """Load all that is named.

        Args:
            sweep: What is asked for.
            callbacks: Those of `hw_models.load_target`.

        Returns:
            The context.

        Raises:
            ValueError: If no budget is in reach of any target, and what the parts raise.
        """
        check_iterates(sweep)
        agent = read_agent(sweep.settings, sweep.solvers)
        targets = {hw: load_target(settings_on(sweep, hw), **callbacks) for hw in sweep.hw}
        tasks: dict[str, SearchTask] = {}
        first: SearchTask | None = None
        for hw, target in targets.items():
            settings = settings_on(sweep, hw)
            if first is None:
                tasks[hw] = first = replace(SearchTask.build(settings, target), agent=agent)
                # All searches are allowed the same, which the file of the sweep then says.
                sweep = sweep.replace(settings=sweep.settings.replace(evaluations=first.evaluations))
            else:
                tasks[hw] = first.on(settings, target)
        unreachable: dict[str, list[str]] = {hw: [] for hw in tasks}
        for hw, task in tasks.items():
            for budget in sweep.budgets:
                try:
                    task.problem.on(task.problem.target, budget)
                except OutOfReach:
                    unreachable[hw].append(budget)
        if not sweep.max_drops and not any(len(missed) < len(sweep.budgets) for missed in unreachable.values()):
            ranges = "; ".join(task.problem.reach for task in tasks.values())
            raise ValueError(f"none of the budgets {', '.join(sweep.budgets)} is in reach of any target: {ranges}")
        return cls(sweep, tasks, unreachable)

    def left_out(self, hw: str) -> str:
        """Say which budgets are out of reach on a target, and what is in reach; nothing if all are."""
        if not self.unreachable[hw]:
            return ""
        return f"out of reach: {', '.join(self.unreachable[hw])} ({self.tasks[hw].problem.reach})"

    @property
    def first(self) -> SearchTask:
        """Return the task on the first target."""
        return self.tasks[self.sweep.hw[0]]

    def cells(self) -> list[SweepCell]:
        """List every search, by targets, what is asked for, solvers and seeds. Solvers that draw nothing have one seed."""
        cells = []
        for hw in self.sweep.hw:
            for budget, drop in self.sweep.asked:
                if budget in self.unreachable[hw]:
                    continue
                for solver in self.sweep.solvers:
                    seeds = 1
                    if solver_of(self.sweep.settings, solver).draws:
                        seeds = self.sweep.seeds
                    cells += [SweepCell(hw, budget, solver, seed, drop) for seed in range(seeds)]
        return cells

    def task(self, cell: SweepCell, folder: Path, kind: str) -> SearchTask:
        """Return what one search is given.

        Args:
            cell: The search.
            folder: The sweep's.
            kind: Of the sweep's sensitivities, which solvers that work with them get.

        Returns:
            Its task.
        """
        task = self.tasks[cell.hw]
        changes: dict[str, Any] = {"budget": cell.budget, "solver": cell.solver, "seed": cell.seed, "sensitivity_kind": kind}
        if cell.max_drop:
            changes["max_drop"] = float(cell.max_drop)
        if not SOLVERS.get(cell.solver).uses_trials:
            changes["trials"] = None
        changes["iterate"] = task.config.iterate and _iterates(cell.solver)
        settings = task.config.replace(**changes)
        if SOLVERS.get(cell.solver).uses_sensitivities and _can_share(self.first.problem, task.problem):
            settings = settings.replace(sensitivity=str(folder / SENSITIVITIES / SENSITIVITY))
        if task.agent is not None and not getattr(SOLVERS.get(cell.solver), "takes_agent", False):
            task, settings = replace(task, agent=None), settings.replace(agent=None)
        return task.on(settings, task.problem.target)

    def signature(self) -> dict[str, str]:
        """Return what must be the same for a sweep to be continued."""
        shared = self.first.network_signature()
        signature = dict(shared)
        for hw, task in self.tasks.items():
            for name, value in task.signature().items():
                if name not in shared:
                    signature[f"{name} of {hw}"] = value
        return signature


def asked_of(record: SweepRecord) -> SweepConfig:
    """Return what the file of a sweep says was asked for; ValueError if that can't have been."""
    return SweepConfig.read(record.asked.to_dict())


def settings_on(sweep: SweepConfig, hw: str) -> SearchConfig:
    """Return the settings that all runs on a target share; options of measured targets only where they are measured."""
    settings = sweep.settings.replace(hw=hw, budget="1.0")
    if any(is_measured(name) for name in sweep.hw) and not is_measured(hw):
        return settings.replace(**dict.fromkeys(MEASURED))
    if any(is_compiled(name) for name in sweep.hw) and not is_compiled(hw):
        return settings.replace(target=None)
    return settings


def _can_share(first: Problem, other: Problem) -> bool:
    """Tell whether sensitivities of one target's problem are those of another's: whether the widest bits are the same there.

    Where they aren't, such as with 16 bits on one of two chips, searches measure their own.
    """
    bases = [problem.decide(largest_widths(problem)) for problem in (first, other)]
    return bases[0] == bases[1] and first.bits[0] <= other.bits[0]


def solver_of(settings: SearchConfig, name: str) -> Solver:
    """Return a solver of a sweep, which iterates if that is asked for and it can."""
    return find_solver(name, settings.iterate and _iterates(name))


def _iterates(solver: str) -> bool:
    return bool(getattr(SOLVERS.get(solver), "iterates", False))


def check_iterates(sweep: SweepConfig) -> None:
    """Raise ValueError if solvers of a sweep are to iterate and none of them can."""
    if sweep.settings.iterate and not any(map(_iterates, sweep.solvers)):
        raise ValueError(f"--iterate is of ilp, which --solvers {','.join(sweep.solvers)} leaves out: add it")


def shares_sensitivities(sweep: SweepConfig) -> bool:
    """Tell whether any solver works with sensitivities."""
    return any(SOLVERS.get(solver).uses_sensitivities for solver in sweep.solvers)


def begin(folder: Path, sweep: SweepConfig, context: SweepContext, given: KnownTrials | None = None) -> None:
    """Start a sweep's folder.

    Args:
        folder: Where.
        sweep: What is asked for.
        context: What its searches stand on.
        given: Trials of earlier searches, of which the folder gets a copy.

    Raises:
        ValueError: Touching nothing, if there is anything in the folder.
    """
    check_unused(folder)
    content = {
        "schema": SWEEP_SCHEMA,
        "finished": False,
        "command": sweep.command(),
        "asked": sweep.to_dict(),
        "signature": context.signature(),
        "versions": versions(context.first.network.device),
    }
    if given is not None:
        # First: the folders that they are from may be gone when the sweep goes on.
        write_trials(folder / TRIALS, given.trials, context.first.problem)
    SweepRecord.from_dict(content).write(folder / SWEEP)


def read(folder: Path) -> SweepRecord:
    """Read what sweep.json holds.

    Raises FileNotFoundError, or ValueError with the reason, if the folder isn't a sweep's, or nobody can have asked for it.
    """
    path = folder / SWEEP
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it has no {SWEEP}")
    record = SweepRecord.read(path)
    try:
        asked_of(record)
    except ValueError as error:
        raise ValueError(f"{path} is not the file of a sweep: {error}") from error
    return record


def go_on(folder: Path, asked: SweepConfig | SearchConfig) -> str:
    """Return the command that goes on with a sweep, which was asked for in that way."""
    return command_line("python", "-m", "haq.sweep", "--resume", folder, *asked.trust_words())


def known(folder: Path, context: SweepContext) -> KnownTrials:
    """Return the trials of earlier searches that a sweep was given: what stands in its folder."""
    if context.sweep.settings.trials is None:
        return KnownTrials()
    return read_trials(folder / TRIALS, context.first.problem)


def check(folder: Path, record: SweepRecord, context: SweepContext) -> None:
    """Check that a sweep can be continued here.

    Args:
        folder: The sweep's.
        record: What its file holds.
        context: What its searches stand on here.

    Raises:
        ValueError: With what to do, if it can't.
    """
    signature, settings = context.signature(), context.sweep.settings
    called = {name: name for name in signature}
    called |= {"network": f"network ({settings.network})", "data": f"data ({settings.data})"}
    check_signature(folder, record.signature, signature, called)
    check_versions(folder, record.versions, context.first.network.device)


def measure_sensitivities(folder: Path, context: SweepContext, on_evaluation: Callable[[int], None]) -> Sensitivities:
    """Measure what is known of single operands, or read it in the sweep's folder if it is there.

    Args:
        folder: The sweep's.
        context: What its searches stand on.
        on_evaluation: Told the number of evaluations so far.

    Returns:
        The sensitivities.
    """
    task = context.first
    with opened(folder / SENSITIVITIES, task) as run:
        if (run.folder / SENSITIVITY).is_file():
            return task.read_sensitivities(run.folder)

        def record(trial: Trial) -> None:
            run.record("sensitivity", session.used, trial, task.problem)
            on_evaluation(session.used)

        settings = context.sweep.settings
        measured = computed(task.problem, settings.sensitivity_kind)
        if measured is None:
            session = Session(task.problem, task.evaluations, record, sensitivity_kind=settings.sensitivity_kind)
            others = [other.problem for other in context.tasks.values()]
            measured = by_evaluation(task.problem, session, 0, others)
        run.save_sensitivities(measured, task)
        return measured


def judge_uniform(context: SweepContext) -> None:
    """Measure, once for all runs, what isn't searched for: the float network and uniform policies."""
    problem = context.first.problem
    for policy in (None, problem.reference_policy, *summary.uniform_policies(problem).values()):
        summary.entry(context.first, policy)


def search(folder: Path, task: SearchTask, on_evaluation: Callable[[], None] = lambda: None) -> None:
    """Run one search of a sweep on one thread, or go on with it; nothing is done if it is finished.

    Args:
        folder: The search's.
        task: What is searched.
        on_evaluation: Called after every evaluation.
    """
    name = task.config.solver
    with opened(folder, task) as run, one_thread():
        if not run.finished:
            try:
                session = run.search(task, name, run.sensitivities(task), lambda count, trial, best: on_evaluation())
            except NothingGoodEnough:
                return  # the others go on; it has its history, and no result
            finish(run, task, session)


def finish(run: SearchRun, task: SearchTask, session: Session, shared: SharedRecord | None = None) -> None:
    """Measure what a search of a sweep found, and write its result.

    Args:
        run: The search's.
        task: What was searched.
        session: What was tried, and what was chosen.
        shared: What it shared with other searches.
    """
    assert session.chosen is not None
    policy = session.chosen.policy
    tuned, further = None, dict[str, Any]()
    if task.config.rounding == ADAROUND:
        found = task.reconstruct(policy, task.config.seed)
        tuned = found.network
        run.save_checkpoint(tuned, task)
        judged = summary.judged_by(task.problem, found.before)
        judged |= summary.reconstruction_entry(found, task.config.seed)
        further = {"reconstruction": judged, "finetuned_by": "ptq"}
    if shared is not None:
        further["shared"] = shared.to_dict()
    used = {task.config.solver: session.used}
    content = summary.collect(task, policy, tuned, {}, used, choice=session.choice, trials=session.own) | further
    run.save_result(ResultRecord.from_dict(content))


def run_all(
    folder: Path,
    context: SweepContext,
    cells: Sequence[SweepCell],
    kind: str,
    workers: int | None,
    on_search: Callable[[SweepCell], None],
    ray: str | None = None,
) -> None:
    """Run searches here, in processes, or on a Ray cluster.

    Args:
        folder: The sweep's.
        context: What its searches stand on.
        cells: The searches.
        kind: Of the sensitivities that they share.
        workers: How many processes, or at most how many workers of the cluster; None or 1 for this process alone.
        on_search: Told each search that is finished.
        ray: The address of a Ray cluster.

    Raises:
        ChildProcessError: If processes are killed again and again. What the first failing search raises is raised too; the
            others are stopped, and can be continued.
    """
    if ray is not None:
        _run_on_cluster(folder, context, cells, kind, workers, on_search, ray)
    elif workers is None or workers == 1:
        for cell in cells:
            search(folder / cell.folder, context.task(cell, folder, kind))
            on_search(cell)
    else:
        _run_in_processes(folder, context, cells, kind, workers, on_search)


def _run_on_cluster(
    folder: Path,
    context: SweepContext,
    cells: Sequence[SweepCell],
    kind: str,
    workers: int | None,
    on_search: Callable[[SweepCell], None],
    address: str,
) -> None:
    from haq.study.workers import ray as ray_workers

    there = context, kind, context.first.problem.evaluator.cache, context.first.measured
    with ExitStack() as held:
        left = {}
        for cell in cells:
            run = held.enter_context(opened(folder / cell.folder, context.task(cell, folder, kind)))
            if not run.finished:
                left[cell] = run.folder
        with ray_workers.connected(address):
            kind_of_device = kind_of(context.sweep.settings.device)
            ray_workers.run_folders(there, _search_there, left, workers, on_search, kind_of_device)


def _run_in_processes(
    folder: Path,
    context: SweepContext,
    cells: Sequence[SweepCell],
    kind: str,
    workers: int,
    on_search: Callable[[SweepCell], None],
) -> None:
    there = context, kind, context.first.problem.evaluator.cache, context.first.measured
    devices = spread(context.sweep.settings.device)
    if not cells:
        return
    crew = Crew(_searching, (folder, there, torch.get_num_threads()), min(workers, len(cells)), devices=devices)
    try:
        waiting = {crew.submit(cell): cell for cell in cells}
        while waiting:
            for done in crew.wait(waiting):
                cell = waiting.pop(done)
                done.result()
                on_search(cell)
    finally:
        crew.close()


def _searching(tell: Any, folder: Path, there: Any, threads: int) -> Callable[[SweepCell], None]:
    """Return what a process does with a search: one that was begun is gone on with."""
    torch.set_num_threads(threads)
    return lambda cell: _search_there(there, cell, folder / cell.folder, lambda: None)


def _search_there(given: Any, cell: SweepCell, folder: Path, on_evaluation: Callable[[], None]) -> None:
    """A search in another process or on another machine."""
    context, kind, cache, judged = given
    context.first.problem.evaluator.cache.update(cache)
    context.first.measured.update(judged)
    search(folder, context.task(cell, folder.parent, kind), on_evaluation)


def collect(
    folder: Path, context: SweepContext, cells: Sequence[SweepCell], sensitivities: Sensitivities | None
) -> FinishedSweepRecord:
    """Put together what a sweep found, from its runs.

    Args:
        folder: The sweep's.
        context: What its searches stand on.
        cells: The searches, all of them finished but those that found nothing good enough.
        sensitivities: What they shared.

    Returns:
        What sweep.json holds.

    Raises:
        ValueError: If no search found a policy that is good enough.
    """
    task = context.first
    results: Results = {}
    policies: Policies = {}
    missed: list[SweepCell] = []
    for cell in cells:
        run = SearchRun.load(folder / cell.folder)
        if not run.finished:
            missed.append(cell)
            continue
        results[cell], policies[cell] = run.load_result(), run.load_policy()
        run.check_found(results[cell], policies[cell])
    if not results:
        drops = ", ".join(context.sweep.max_drops)
        raise ValueError(f"no search of {folder} found a policy that loses at most {drops}: allow more with --max-drops")
    shared = None
    if sensitivities is not None:
        shared = {
            "kind": sensitivities.kind,
            "known": sensitivities.known,
            "file": f"{SENSITIVITIES}/{SENSITIVITY}",
        }
    begun = read(folder)
    assert asked_of(begun) == context.sweep
    content = {
        **begun.to_dict(),
        "finished": True,
        "network": task.network.name,
        "data": task.dataset.name,
        **objective_of(task.problem).differences(),
        "objective": task.problem.objective.name,
        "objective_is": task.problem.objective.words,
        "metric": task.problem.metric,
        "unit": task.problem.unit,
        "accuracy_is": f"measured on {threads(task.network.device)}",
        "images": {"test": len(task.dataset.test), "search": len(task.dataset.search)},
        "float": summary.entry(task, None),
        "sensitivities": shared,
        **_shared(folder, cells),
        "targets": {hw: _of_target(context, hw, results, policies) | _missed(hw, missed) for hw in context.tasks},
        "specialisation": _specialisation(context, results, policies),
    }
    record = SweepRecord.from_dict(content)
    assert isinstance(record, FinishedSweepRecord)
    return record


def _shared(folder: Path, cells: Sequence[SweepCell]) -> dict[str, Any]:
    """Say what searches shared that learn from each other's trials; nothing if none do."""
    found = {}
    for cell in cells:
        run = SearchRun.load(folder / cell.folder)
        if run.finished:
            record = run.load_result().shared
            if record is not None:
                found[cell.solver, cell.seed] = record.to_dict()
    if not found:
        return {}
    return {"shared": list(found.values())}


def _missed(hw: str, cells: Sequence[SweepCell]) -> dict[str, Any]:
    """Say which searches on a target found nothing that is good enough."""
    words = [f"drop {cell.max_drop} by {cell.solver}, seed {cell.seed}" for cell in cells if cell.hw == hw]
    if not words:
        return {}
    return {"missed": words}


def _of_target(context: SweepContext, hw: str, results: Results, policies: Policies) -> dict[str, Any]:
    """Return what was found on one target, and its uniform policies."""
    task = context.tasks[hw]
    problem = task.problem
    judging = objective_of(problem)
    search_key, test_key = _keys(problem.objective.name)
    uniform = []
    for bits, policy in summary.uniform_policies(problem).items():
        judged, cost = summary.entry(task, policy), problem.policy_cost(policy)
        uniform.append(
            {
                "bits": bits,
                "cost": cost,
                "fraction": cost / problem.reference,
                **_judged(judged, search_key, test_key),
            }
        )
    found = []
    for budget, drop, solver in dict.fromkeys((cell.budget, cell.max_drop, cell.solver) for cell in results if cell.hw == hw):
        runs = [
            _of_seed(cell, result, policies[cell])
            for cell, result in results.items()
            if (cell.hw, cell.budget, cell.max_drop, cell.solver) == (hw, budget, drop, solver)
        ]
        means = {
            key: _mean([run[key] for run in runs]) for key in ("cost", "fraction", *_judged(runs[0], search_key, test_key))
        }
        asked: dict[str, Any] = {"budget": "", "max_drop": drop, "solver": solver, "limit": None}
        if not drop:
            limit = problem.on(problem.target, budget).limit
            asked = {"budget": budget, "solver": solver, "limit": limit}
        found.append({**asked, **means, "runs": runs})
    rows: list[dict[str, Any]] = [*uniform, *found]
    scores = [judging.score(judging.checked(row[test_key], test_key)) for row in rows]
    costs = [row["cost"] for row in rows]
    for row, is_best in zip(rows, pareto(list(zip(costs, scores, strict=True))), strict=True):
        row["pareto"] = is_best
    kind = kind_of_cost(problem.metric, problem.table.provenance)
    return {
        "name": problem.target.name,
        "cost_is": f"{problem.table.provenance}, {problem.target.description}, batch {problem.table.batch}",
        "kind": kind,
        "uniform8": problem.reference,
        **_reference(problem),
        "least_fraction": problem.smallest / problem.reference,
        "unreachable": context.unreachable[hw],
        "left_out": context.left_out(hw),
        "uniform": uniform,
        "found": found,
        "fronts": fronts(task, found),
    }


def _reference(problem: Problem) -> dict[str, str]:
    """Say what fractions are of, where that isn't uniform 8 bits."""
    if problem.reference_words == UNIFORM_8:
        return {}
    return {"reference": problem.reference_words}


def _of_seed(cell: SweepCell, result: ResultRecord, policy: Q.BitPolicy) -> dict[str, Any]:
    """Return what one search found."""
    return {
        "seed": cell.seed,
        "folder": cell.folder,
        "evaluations": result.evaluations[cell.solver],
        "cost": result.budget.used,
        "fraction": result.budget.used_fraction,
        **_shares(result),
        "policy": PolicyRecord.of(policy).to_dict(),
    }


def _specialisation(context: SweepContext, results: Results, policies: Policies) -> dict[str, Any] | None:
    """Return HAQ's table of policies found for one target and run on another.

    It is at the middle one of the budgets in reach of the most targets; a target's policy is the one that is best on the
    search split. None if no budget is in reach of two.
    """
    if not context.sweep.budgets:
        return None
    within = {b: [hw for hw in context.tasks if b not in context.unreachable[hw]] for b in context.sweep.budgets}
    most = max(map(len, within.values()))
    if most < 2:
        return None
    common = [b for b, targets in within.items() if len(targets) == most]
    budget = common[(len(common) - 1) // 2]
    rows = {}
    for hw in within[budget]:
        candidates = [cell for cell in results if (cell.hw, cell.budget) == (hw, budget)]
        best = max(candidates, key=lambda cell: _score(results[cell]))
        fractions: dict[str, float | None] = {}
        for other in within[budget]:
            problem = context.tasks[other].problem
            cost = problem.policy_cost(policies[best])
            fractions[other] = None  # the target can't do one of its pairs
            if cost < math.inf:
                fractions[other] = cost / problem.reference
        rows[hw] = {
            "folder": best.folder,
            "solver": best.solver,
            **_shares(results[best]),
            "fractions": fractions,
        }
    return {"budget": budget, "policies": rows}


def _keys(objective: str) -> tuple[str, str]:
    return share_key("search", objective), share_key("test", objective)


def _shares(result: ResultRecord) -> dict[str, float | None]:
    """Return the values of what a search found, under the names that files give them."""
    return _judged(result.found.root, *_keys(result.objective))


def _judged(row: Mapping[str, Any], *keys: str) -> dict[str, float | None]:
    """Return values under their names, and their standard errors and those of their differences from float, where known."""
    found = {}
    for key in keys:
        found[key] = row[key]
        for further in (error_key(key), paired_key(key, "float")):
            if further in row:
                found[further] = row[further]
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of values; None if one of them is infinite, which None stands for."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return sum(known) / len(known)


def _score(result: ResultRecord) -> float:
    """Tell what a search found is worth on the search split; larger for better."""
    return result.score(result.value(result.found, "search"))


@contextmanager
def opened(folder: Path, task: SearchTask, searches: int = 0) -> Iterator[SearchRun]:
    """Open the run of a folder in a sweep's, ready to go on, or a new one; its folder is held meanwhile.

    Args:
        folder: The run's.
        task: What is searched.
        searches: How many searches share what they try, if it is one of them.

    Returns:
        The run, within a `with` statement.
    """
    with writing(folder, go_on(folder.parent, task.config), wait_s=ORPHAN_S):
        if (folder / CONFIG).exists():
            run = SearchRun.load(folder)
            run.check(task, same_versions=True)
            run.complete(task)
            run.prepare_resume(task.problem)
        else:
            given = None
            if task.config.trials is not None:
                given = read_trials(folder.parent / TRIALS, task.problem)
            run = SearchRun.create(folder, task, given, searches)
        try:
            yield run
        finally:
            run.close()
