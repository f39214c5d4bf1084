"""Many searches of one network: every target, budget, solver and seed, with all they can share measured once.

    sweep.json               what was asked; in the end, everything that was found
    sweep.png                accuracy against cost, a panel for each target
    sensitivity/             the run that measured sensitivities
    TARGET-BUDGET-SOLVER-seedN/      a run each, as `python -m haq.search` writes them

How accurate a policy is doesn't depend on the target: network, data, scales and evaluations are shared by all searches of a
process, and sensitivities by all of them. A search's result depends on nothing but its own settings, so neither their order
nor the number of processes does anything to it.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import torch

import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.sensitivity import Sensitivities
from haq.solvers.base import DRAW_NOTHING, USE_SENSITIVITIES, Session, Trial, check_name
from haq.solvers.sensitivity import by_evaluation, by_hessian
from haq.store import files
from haq.store.files import CONFIG, SENSITIVITY, SWEEP, SWEEP_SCHEMA
from haq.store.lock import writing
from haq.study import result as summary
from haq.study.config import SearchConfig
from haq.study.search_run import Run, check_unused
from haq.study.task import SearchTask, check_signature, check_versions, load_target, threads, versions
from haq.study.workers.processes import live_with_parent
from hw_models.tvm_cpu.target import LOCAL, REMOTE

MOST_BUDGETS = 1000
ORPHAN_S = 60.0  # a worker whose sweep was killed ends after the evaluation it is at; its search is waited for


class SweepCell(NamedTuple):
    """One search of a sweep."""

    hw: str
    budget: str
    solver: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its run's folder."""
        hw = self.hw.replace(":", "-") if self.hw.startswith(REMOTE) else Path(self.hw).stem.replace(":", "-")
        return f"{hw}-{self.budget}-{self.solver}-seed{self.seed}"


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is asked to do: `settings` of every run, but for the target, budget, solver and seed, which vary."""

    settings: SearchConfig
    hw: tuple[str, ...]
    budgets: tuple[str, ...]
    solvers: tuple[str, ...]
    seeds: int

    def __post_init__(self) -> None:
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds!r}; it must be an integer of at least 1: so many are 0, 1, 2 ...")
        for option, values in (("hw", self.hw), ("budgets", self.budgets), ("solvers", self.solvers)):
            if not all(isinstance(value, str) for value in values):
                raise ValueError(f"--{option} must be names, not {type(values[0]).__name__}")
            if not values or not all(values) or len(set(values)) < len(values):
                raise ValueError(f"--{option} is {','.join(values)!r}; it must be names parted by commas, each of them once")
        for solver in self.solvers:
            check_name(solver)
        names = [SweepCell(hw, budget, "", 0).folder for hw in self.hw for budget in self.budgets]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"--hw or --budgets have a '/' in {outside[0][:80]!r}: runs are named after them")
        if len(set(names)) < len(names):
            raise ValueError(f"--hw is {','.join(self.hw)!r}; its files must have different names: runs are named after them")

    @property
    def shares_sensitivities(self) -> bool:
        return bool(set(self.solvers) & set(USE_SENSITIVITIES))

    def command(self) -> str:
        """The command that asks for this; options of the runs that are as they come are left out."""
        lists = {"hw": ",".join(self.hw), "budgets": ",".join(self.budgets), "solvers": ",".join(self.solvers)}
        words = [f"--{name} {shlex.quote(value)}" for name, value in lists.items()]
        if self.seeds != 1:
            words.append(f"--seeds {self.seeds}")
        # A sweep never fine-tunes, so it has no option for that.
        shared = replace(self.settings, finetune_epochs=SearchConfig.finetune_epochs).command().partition("haq.search")[2]
        return f"python -m haq.sweep {' '.join(words)}{shared}"

    def settings_on(self, hw: str) -> SearchConfig:
        """The settings that all runs on a target share; options of measured targets only where they are measured."""
        settings = replace(self.settings, hw=hw, budget="1.0")
        if any(_measured(name) for name in self.hw) and not _measured(hw):
            settings = replace(settings, threads=None, target=None, cold=None)
        return settings


@dataclass
class SweepContext:
    """What a sweep's searches stand on: a job for each target, which share what they evaluate, and the budgets in reach."""

    sweep: SweepConfig
    tasks: dict[str, SearchTask]
    unreachable: dict[str, list[str]]  # budgets by target

    @classmethod
    def load(cls, sweep: SweepConfig, **callbacks: Any) -> SweepContext:
        """Load all that is named. Raises ValueError if no budget is in reach of any target, and what the parts raise."""
        targets = {hw: load_target(sweep.settings_on(hw), **callbacks) for hw in sweep.hw}
        tasks: dict[str, SearchTask] = {}
        for hw, target in targets.items():
            settings = sweep.settings_on(hw)
            tasks[hw] = next(iter(tasks.values())).on(settings, target) if tasks else SearchTask.build(settings, target)
        unreachable: dict[str, list[str]] = {hw: [] for hw in tasks}
        for hw, task in tasks.items():
            for budget in sweep.budgets:
                try:
                    task.problem.on(task.problem.target, budget)
                except OutOfReach:
                    unreachable[hw].append(budget)
        if not any(len(missed) < len(sweep.budgets) for missed in unreachable.values()):
            ranges = "; ".join(task.problem.reach for task in tasks.values())
            raise ValueError(f"none of the budgets {', '.join(sweep.budgets)} is in reach of any target: {ranges}")
        return cls(sweep, tasks, unreachable)

    def left_out(self, hw: str) -> str:
        """The budgets that are out of reach on a target, and what is in reach, in words; nothing if all are."""
        missed = ", ".join(self.unreachable[hw])
        return missed and f"out of reach: {missed} ({self.tasks[hw].problem.reach})"

    @property
    def first(self) -> SearchTask:
        return self.tasks[self.sweep.hw[0]]

    def cells(self) -> list[SweepCell]:
        """Every search, in the order of targets, budgets, solvers and seeds. Solvers that draw nothing have one seed."""
        return [
            SweepCell(hw, budget, solver, seed)
            for hw in self.sweep.hw
            for budget in self.sweep.budgets
            if budget not in self.unreachable[hw]
            for solver in self.sweep.solvers
            for seed in range(1 if solver in DRAW_NOTHING else self.sweep.seeds)
        ]

    def task(self, cell: SweepCell, folder: Path, kind: str) -> SearchTask:
        """What one search is given; solvers that work with sensitivities get the sweep's, which are of that kind."""
        task = self.tasks[cell.hw]
        settings = replace(task.config, budget=cell.budget, solver=cell.solver, seed=cell.seed, sensitivity_kind=kind)
        if cell.solver in USE_SENSITIVITIES:
            settings = replace(settings, sensitivity=str(folder / "sensitivity" / SENSITIVITY))
        return task.on(settings, task.problem.target)

    def signature(self) -> dict[str, str]:
        """What must be the same for a sweep to be continued."""
        return {
            **self.first.network_signature(),
            **{
                f"{name} of {hw}": value
                for hw, task in self.tasks.items()
                for name, value in task.signature().items()
                if name not in self.first.network_signature()
            },
        }


def budgets(text: str) -> tuple[str, ...]:
    """FIRST:LAST:STEP, fractions of uniform 8 bits, or budgets parted by commas. Raises ValueError for anything else.

    >>> budgets("0.3:0.5:0.1")
    ('0.3', '0.4', '0.5')
    """
    if ":" not in text:
        return tuple(text.split(","))
    try:
        first, last, step = (Decimal(part) for part in text.split(":"))
        if not (0 < first <= last <= 1 and step > 0 and (last - first) / step < MOST_BUDGETS):
            raise ValueError
    except (ValueError, InvalidOperation):
        raise ValueError(
            f"--budgets is {text!r}; it must be FIRST:LAST:STEP, fractions of uniform 8 bits such as 0.3:0.9:0.1, at most "
            f"{MOST_BUDGETS} of them, or budgets parted by commas such as 0.5,0.7"
        ) from None
    return tuple(str(first + step * i) for i in range(int((last - first) / step) + 1))


def begin(folder: Path, sweep: SweepConfig, context: SweepContext) -> None:
    """Start a sweep's folder. Raises ValueError, touching nothing, if there is anything in it."""
    check_unused(folder)
    _write(
        folder,
        {
            "schema": SWEEP_SCHEMA,
            "finished": False,
            "command": sweep.command(),
            "asked": asdict(sweep),
            "signature": context.signature(),
            "versions": versions(),
        },
    )


def read(folder: Path) -> dict[str, Any]:
    """What sweep.json holds. Raises FileNotFoundError, or ValueError with the reason, if the folder isn't a sweep's."""
    path = folder / SWEEP
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it has no {SWEEP}")
    content = files.read_json(path, "the file of a sweep")
    files.check_schema(path, content.get("schema"), SWEEP_SCHEMA, "the file of a sweep")
    try:
        asked(content)
        for part in ("signature", "versions"):
            if not all(isinstance(value, str) for value in content[part].values()):
                raise ValueError(f"{part!r} must map names to text")
        if not isinstance(content["finished"], bool):
            raise ValueError("'finished' must be true or false")
    except KeyError as error:
        raise ValueError(f"{path} is not the file of a sweep: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the file of a sweep: {error}") from error
    return content


def go_on(folder: Path) -> str:
    """The command that goes on with a sweep."""
    return f"python -m haq.sweep --resume {folder}"


def asked(content: dict[str, Any]) -> SweepConfig:
    """The sweep that sweep.json says was asked for."""
    lists = {name: tuple(content["asked"][name]) for name in ("hw", "budgets", "solvers")}
    return SweepConfig(SearchConfig.read(content["asked"]["settings"]), seeds=content["asked"]["seeds"], **lists)


def check(folder: Path, content: dict[str, Any], context: SweepContext) -> None:
    """Raise ValueError, with the way out, if a sweep can't be continued here."""
    signature, settings = context.signature(), context.sweep.settings
    called = {name: name for name in signature} | {
        "network": f"network ({settings.network})",
        "data": f"data ({settings.data})",
    }
    check_signature(folder, content["signature"], signature, called)
    check_versions(folder, content["versions"])


def measure_sensitivities(folder: Path, context: SweepContext, on_evaluation: Callable[[int], None]) -> Sensitivities:
    """What is known of single operands, in the sweep's folder; measured, unless they are there."""
    task = context.first
    with _opened(folder / "sensitivity", task) as run:
        if (run.folder / SENSITIVITY).is_file():
            return task.read_sensitivities(run.folder)

        def record(count: int, found: Trial, within_budget: bool) -> None:
            run.record("sensitivity", count, found, within_budget, task.problem)
            on_evaluation(count)

        settings = context.sweep.settings
        session = Session(task.problem, settings.evaluations, record, sensitivity_kind=settings.sensitivity_kind)
        others = [other.problem for other in context.tasks.values()]
        hessian = settings.sensitivity_kind == "hessian"
        measured = by_hessian(task.problem) if hessian else by_evaluation(task.problem, session, 0, others)
        run.save_sensitivities(measured, task)
        return measured


def judge_uniform(context: SweepContext) -> None:
    """Measure, once for all runs, what isn't searched for: the float network and uniform policies."""
    problem = context.first.problem
    for policy in (None, problem.uniform(8), *summary.uniform_policies(problem).values()):
        summary.entry(context.first, policy)


def search(folder: Path, task: SearchTask, on_evaluation: Callable[[], None] = lambda: None) -> None:
    """One search of a sweep, on one thread, begun or gone on with. Nothing is done if it is finished."""
    name = task.config.solver
    with _opened(folder, task) as run, one_thread():
        if not run.finished:
            session = run.search(task, name, run.sensitivities(task), lambda count, found, best: on_evaluation())
            assert session.best is not None
            run.save_result(summary.collect(task, session.best.policy, None, {}, {name: session.used}))


def run_all(
    folder: Path,
    context: SweepContext,
    cells: Sequence[SweepCell],
    kind: str,
    workers: int | None,
    on_search: Callable[[SweepCell], None],
    ray: str | None = None,
) -> None:
    """Run searches in so many processes, or in this one if it is one or no number; or, given its address, on a Ray cluster, by
    at most so many workers. `on_search` is told each that is finished.

    Raises what the first failing search raises, and ChildProcessError if a process was killed; the others stop after the
    evaluation they are at, and can be continued.
    """
    if ray is not None:
        from haq.study.workers import ray as ray_workers

        there = context, kind, context.first.problem.evaluator.cache, context.first.judged
        with ExitStack() as held:
            begun = [held.enter_context(_opened(folder / cell.folder, context.task(cell, folder, kind))) for cell in cells]
            left = {cell: run.folder for cell, run in zip(cells, begun, strict=True) if not run.finished}
            with ray_workers.connected(ray):
                ray_workers.run_folders(there, _search_there, left, workers, on_search)
        return
    if workers in (None, 1):
        for cell in cells:
            search(folder / cell.folder, context.task(cell, folder, kind))
            on_search(cell)
        return
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    known = context.first.problem.evaluator.cache, context.first.judged
    given = folder, context.sweep, kind, torch.get_num_threads(), known, stop
    pool = ProcessPoolExecutor(min(workers or 1, len(cells)), spawn, _start_worker, given)
    try:
        waiting = {pool.submit(_search_in_worker, cell): cell for cell in cells}
        for done in as_completed(waiting):
            done.result()
            on_search(waiting[done])
    except BrokenProcessPool:
        raise ChildProcessError("a worker was killed, perhaps for want of memory: go on with fewer") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    """What a process of `run_all` keeps from search to search."""

    folder: Path
    kind: str
    context: SweepContext
    stop: Any


_worker: _Worker | None = None


def _start_worker(
    folder: Path,
    sweep: SweepConfig,
    kind: str,
    threads: int,
    known: tuple[dict[Q.BitPolicy, Evaluation], dict[Q.BitPolicy | None, dict[str, float]]],
    stop: Any,
) -> None:
    global _worker
    live_with_parent()
    torch.set_num_threads(threads)
    context = SweepContext.load(sweep)
    context.first.problem.evaluator.cache.update(known[0])
    context.first.judged.update(known[1])
    _worker = _Worker(folder, kind, context, stop)


def _search_in_worker(cell: SweepCell) -> None:
    assert _worker is not None
    stop = _worker.stop

    def on_evaluation() -> None:
        if stop.is_set():
            raise InterruptedError("stopped")

    search(_worker.folder / cell.folder, _worker.context.task(cell, _worker.folder, _worker.kind), on_evaluation)


def _search_there(given: Any, cell: SweepCell, folder: Path, on_evaluation: Callable[[], None]) -> None:
    """A search on another machine, in a folder that was begun here."""
    context, kind, cache, judged = given
    context.first.problem.evaluator.cache.update(cache)
    context.first.judged.update(judged)
    search(folder, context.task(cell, folder.parent, kind), on_evaluation)


def finish(
    folder: Path, context: SweepContext, cells: Sequence[SweepCell], sensitivities: Sensitivities | None
) -> dict[str, Any]:
    """Put together what a sweep found, from its runs, and write it. Returns what sweep.json holds."""
    task, sweep = context.first, context.sweep
    problem, objective = task.problem, task.problem.objective
    results = {cell: Run.load(folder / cell.folder).load_result() for cell in cells}
    policies = {cell: Run.load(folder / cell.folder).load_policy() for cell in cells}
    content = read(folder) | {
        "finished": True,
        "network": task.network.name,
        "data": task.dataset.name,
        "objective": objective,
        "objective_is": problem.objective_is,
        "metric": problem.metric,
        "unit": problem.unit,
        "accuracy_is": f"measured on {threads()}",
        "images": {"test": len(task.dataset.test), "search": len(task.dataset.search)},
        "float": summary.entry(task, None),
        "sensitivities": sensitivities
        and {"kind": sensitivities.kind, "known": sensitivities.known, "file": f"sensitivity/{SENSITIVITY}"},
        "targets": {hw: _of_target(context, hw, results, policies) for hw in context.tasks},
        "specialisation": _specialisation(context, results, policies),
    }
    assert asked(content) == sweep
    _write(folder, content)
    return content


def _of_target(
    context: SweepContext, hw: str, results: dict[SweepCell, dict[str, Any]], policies: dict[SweepCell, Q.BitPolicy]
) -> dict[str, Any]:
    task = context.tasks[hw]
    problem, objective = task.problem, task.problem.objective
    keys = (f"search_{objective}", f"test_{objective}")
    uniform = []
    for bits, policy in summary.uniform_policies(problem).items():
        judged, cost = summary.entry(task, policy), problem.policy_cost(policy)
        row = {"cost": cost, "fraction": cost / problem.reference, **{key: judged[key] for key in keys}}
        uniform.append({"bits": bits, **row})
    found = []
    for budget, solver in dict.fromkeys((cell.budget, cell.solver) for cell in results if cell.hw == hw):
        runs = [
            {
                "seed": cell.seed,
                "folder": cell.folder,
                "evaluations": result["evaluations"][solver],
                "cost": result["budget"]["used"],
                "fraction": result["budget"]["used_fraction"],
                **{key: result["found"][key] for key in keys},
                "policy": {name: list(bits) for name, bits in policies[cell].items()},
            }
            for cell, result in results.items()
            if cell[:3] == (hw, budget, solver)
        ]
        means = {key: sum(run[key] for run in runs) / len(runs) for key in ("cost", "fraction", *keys)}
        limit = problem.on(problem.target, budget).limit
        found.append({"budget": budget, "solver": solver, "limit": limit, **means, "runs": runs})
    rows: list[dict[str, Any]] = [*uniform, *found]
    for row, is_best in zip(rows, pareto([(row["cost"], row[keys[1]]) for row in rows]), strict=True):
        row["pareto"] = is_best
    return {
        "name": problem.target.name,
        "cost_is": f"{problem.table.provenance}, {problem.target.description}, batch {problem.table.batch}",
        "kind": "counted" if problem.metric == "storage" else summary.cost_kind(problem),
        "uniform8": problem.reference,
        "least_fraction": problem.smallest / problem.reference,
        "unreachable": context.unreachable[hw],
        "left_out": context.left_out(hw),
        "uniform": uniform,
        "found": found,
    }


def _specialisation(
    context: SweepContext, results: dict[SweepCell, dict[str, Any]], policies: dict[SweepCell, Q.BitPolicy]
) -> dict[str, Any] | None:
    """HAQ's table of policies found for one target and run on another, at the middle one of the budgets in reach of the most
    targets; a target's policy is the one that is best on the search split. None if no budget is in reach of two."""
    within = {b: [hw for hw in context.tasks if b not in context.unreachable[hw]] for b in context.sweep.budgets}
    most = max(map(len, within.values()))
    if most < 2:
        return None
    common = [b for b, targets in within.items() if len(targets) == most]
    budget, objective = common[(len(common) - 1) // 2], context.first.problem.objective
    rows = {}
    for hw in within[budget]:
        candidates = [cell for cell in results if (cell.hw, cell.budget) == (hw, budget)]
        best = max(candidates, key=lambda cell: results[cell]["found"][f"search_{objective}"])
        rows[hw] = {
            "folder": best.folder,
            "solver": best.solver,
            **{key: results[best]["found"][key] for key in (f"search_{objective}", f"test_{objective}")},
            "fractions": {
                other: context.tasks[other].problem.policy_cost(policies[best]) / context.tasks[other].problem.reference
                for other in within[budget]
            },
        }
    return {"budget": budget, "policies": rows}


def pareto(cells: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of some (cost, accuracy) no other is as good as in both and better in one."""
    return [not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in cells) for cost, accuracy in cells]


@contextmanager
def _opened(folder: Path, task: SearchTask) -> Iterator[Run]:
    """The run of a folder, ready to go on, or a new one; its folder is held meanwhile."""
    with writing(folder, go_on(folder.parent), wait_s=ORPHAN_S):
        if (folder / CONFIG).exists():
            run = Run.load(folder)
            run.check(task, same_versions=True)
            run.complete(task)
            run.prepare_resume(task.problem)
        else:
            run = Run.create(folder, task)
        try:
            yield run
        finally:
            run.close()


def _measured(hw: str) -> bool:
    return hw == LOCAL or hw.startswith(REMOTE)


def _write(folder: Path, content: dict[str, Any]) -> None:
    files.write(folder / SWEEP, json.dumps(content, indent=2) + "\n")
