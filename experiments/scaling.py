"""How far a search can be spread: what is gained on this machine, what an evaluation moves and costs, what gives out first.

    python -m experiments.scaling [--repeats N] [--quick]

Measured here, on the default search: evaluations per second of `random`, whose policies are known ahead, and of `ddpg` with
`--ahead 4`, which learns from each; by this process with one thread and with all, by one and two processes, by one and two
workers of a Ray cluster of two nodes that is started for it. Workers are started before the clock is; medians over repeats,
which take turns, so that a busy moment of the machine hits all alike. All must find the same. Then what bounds a larger
cluster: the bytes that go to each machine once and with each policy, the policies per second that the first process can give
out and take back (with workers that do nothing), and the time that a solver itself takes for an evaluation.

Modelled from these, and said so: N workers finish N / e evaluations a second, if one takes e seconds, but no more than are
given out, and no more than the solver asks for: it takes s seconds for each, and agents wait for the first of those they chose
ahead, a policies, so they ask for at most a / (e + s).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import haq
import quantizers as Q
from experiments.shared import folder_for, verdict
from haq.console.errors import run_command
from haq.console.progress import progress
from haq.problem.evaluator import Evaluation
from haq.solvers.base import Session, Trial, solve
from haq.study.config import SearchConfig
from haq.study.task import SearchTask
from haq.study.workers.processes import Processes, working

NAME = "scaling"
FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
BAR = {"2 processes": 1.7, "2 workers of Ray": 1.5}  # times the evaluations per second of one
WORKERS = (1, 2, 10, 100, 1000)
AHEAD = 4  # policies that ddpg chooses before it learns from the first
SLOW = 60.0  # seconds of an evaluation, as of a large network on a few thousand images


class Nothing:
    """An evaluator that does nothing, to see what giving out costs."""

    worker_threads = 1

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        return Evaluation(0.5, 1.0, 1)


class Timed(NamedTuple):
    rate: float  # evaluations per second
    found: str  # a hash of all that was evaluated, in order


def run(problem: haq.Problem, solver: str, evaluations: int) -> Timed:
    """One search, workers warm."""
    problem.evaluator.cache.clear()
    if problem.evaluator.pool is not None:
        warm = [problem.policy([bits] * len(problem.workload), [8] * len(problem.workload)) for bits in range(1, 9)]
        problem.expect(warm)
        for policy in warm:
            problem.evaluate(policy)
        problem.evaluator.cache.clear()
    digest = hashlib.sha256()

    def on_trial(found: Trial) -> None:
        digest.update(repr((session.used, found.evaluation, sorted(found.policy.items()))).encode())

    session = Session(problem, evaluations, on_trial, ahead=AHEAD)
    began = time.perf_counter()
    solve(solver, session, seed=0)
    return Timed(session.used / (time.perf_counter() - began), digest.hexdigest()[:12])


def own_seconds(problem: haq.Problem, solver: str, evaluations: int) -> float:
    """Measure what a solver itself takes for an evaluation: what is left of the time if all is known already.

    It is that of the last fifth: an agent has its sensitivities then.
    """
    ahead = AHEAD
    solve(solver, Session(problem, evaluations, ahead=ahead), seed=0)
    moments: list[float] = []
    began = time.perf_counter()
    solve(solver, Session(problem, evaluations, lambda *_: moments.append(time.perf_counter()), ahead=ahead), seed=0)
    if solver == "random":  # draws all of them first
        return (moments[-1] - began) / len(moments)
    last = moments[-(evaluations // 5) - 1 :]
    return (last[-1] - last[0]) / (len(last) - 1)


def tasks_per_second(pool: Any, problem: haq.Problem, count: int) -> float:
    """How many policies a pool whose workers do nothing gives out and takes back."""
    layers = len(problem.workload)
    policies = [problem.policy([1 + (i >> j) % 8 for j in range(layers)], [8] * layers) for i in range(1, count + 1)]
    policies = list(dict.fromkeys(policies))
    pool.evaluate(policies[0])
    began = time.perf_counter()
    pool.expect(policies[1:])
    for policy in policies[1:]:
        pool.evaluate(policy)
    return (len(policies) - 1) / (time.perf_counter() - began)


def nodes() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a processor each."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    made.add_node(**options)
    try:
        yield made.address
    finally:
        made.shutdown()


def modelled(count: int, seconds: float, given_out: float, own: float, ahead: int | None) -> tuple[float, str]:
    """Evaluations per second with so many workers, and what bounds them."""
    bounds = {"the workers": count / seconds, "giving out": given_out, "the solver itself": 1 / own}
    if ahead is not None:
        bounds[f"choosing {ahead} ahead"] = ahead / (seconds + own)
    name = min(bounds, key=bounds.__getitem__)
    return bounds[name], name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only see that it runs: saves nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the page (default: {FOLDER})")
    options = parser.parse_args(arguments)
    evaluations = {"random": 60, "ddpg": 200}
    repeats, tasks = options.repeats, 3000
    if options.quick:
        evaluations = {"random": 8, "ddpg": 40}
        repeats, tasks = 1, 200
    console = Console()
    if not sys.stdout.isatty():
        console = Console(width=110)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    problem = SearchTask.build(SearchConfig()).problem
    rates: dict[tuple[str, str], list[float]] = {}
    found: dict[str, set[str]] = {}
    address_of = nodes()
    address = next(address_of)
    ways: dict[str, tuple[int | None, str | None, int]] = {
        "this process, 1 thread": (None, None, 1),
        f"this process, {cores} threads": (None, None, cores),
        "1 process": (1, None, 1),
        "2 processes": (2, None, 1),
        "1 worker of Ray": (1, address, 1),
        "2 workers of Ray": (2, address, 1),
    }
    with progress(console) as bar:
        task = bar.add_task("searches", total=repeats * len(ways) * len(evaluations), note="")
        for _ in range(repeats):
            for way, (count, ray, threads) in ways.items():
                torch.set_num_threads(threads)
                with working(problem.evaluator, count, ray):
                    for solver, number in evaluations.items():
                        timed = run(problem, solver, number)
                        rates.setdefault((solver, way), []).append(timed.rate)
                        found.setdefault(solver, set()).add(timed.found)
                        bar.update(task, advance=1, note=f"{solver}, {way}")
    torch.set_num_threads(1)
    # Everything that ddpg asks for is known now.
    own = {solver: own_seconds(problem, solver, number) for solver, number in evaluations.items()}
    policy = problem.uniform(8)
    moved = {
        "with the evaluator, once to each machine": len(cloudpickle.dumps(problem.evaluator)),
        "with each policy": len(pickle.dumps(policy)),
        "with each answer": len(pickle.dumps(problem.evaluate(policy))),
    }
    pool = Processes(Nothing(), 1)  # type: ignore[arg-type]
    given_out = {"processes": tasks_per_second(pool, problem, tasks)}
    pool.close()
    with ExitStack() as stack:
        from haq.study.workers import ray as ray_workers

        stack.enter_context(ray_workers.connected(address))
        given_out["Ray"] = tasks_per_second(ray_workers.Evaluations(Nothing(), 1), problem, tasks)  # type: ignore[arg-type]
    address_of.close()  # type: ignore[attr-defined]

    lines = [
        f"`{sys.platform}`, {cores} cores; medians of {repeats} repeats; accuracy of the default network on its search images."
    ]
    shown = [["by", *evaluations, "times one", ""]]
    medians = {key: statistics.median(values) for key, values in rates.items()}
    for way in ways:
        one = {"2 processes": "1 process", "2 workers of Ray": "1 worker of Ray"}.get(way)
        times = []
        if one:
            times = [medians[solver, way] / medians[solver, one] for solver in evaluations]
        said = [f"{solver}: {verdict(share >= BAR[way])}" for solver, share in zip(evaluations, times, strict=bool(one))]
        spread = [f"{medians[s, way]:.2f} ({min(rates[s, way]):.2f}-{max(rates[s, way]):.2f})" for s in evaluations]
        shown.append([way, *spread, ", ".join(f"{share:.2f}" for share in times), " ".join(said)])
    same = all(len(hashes) == 1 for hashes in found.values())
    answer = "NO"
    if same:
        answer = "yes"
    seconds = 1 / medians["random", "1 process"]
    facts = [
        f"the same evaluations in the same order, whoever did them: {answer}",
        f"one evaluation: {seconds:.3f} s on one thread",
        *(f"moved {what}: {count:,} bytes" for what, count in moved.items()),
        *(f"policies given out and taken back by {who}: {rate:,.0f} a second" for who, rate in given_out.items()),
        *(f"{solver} itself: {1000 * spent:.2f} ms an evaluation" for solver, spent in own.items()),
    ]
    model = modelled_rows(seconds, given_out["Ray"], own)
    print_table(console, "Evaluations per second (measured)", shown)
    for line in facts:
        console.print(f"* {line}", highlight=False)
    print_table(console, "Speed of N workers on Ray (modelled)", model)
    out = folder_for(options.out, options.quick, FOLDER)
    if out is not None:
        save(out, lines, shown, facts, model)
        console.print(f"written: {out / NAME}.md")
    return int(not same)


def modelled_rows(seconds: float, given_out: float, own: dict[str, float]) -> list[list[str]]:
    """Say how fast many workers would be, as times the speed of one.

    Args:
        seconds: Of an evaluation of the default network; beside it stands one of `SLOW`.
        given_out: How many policies a second are given out and taken back.
        own: Seconds that each solver itself takes for an evaluation.

    Returns:
        A row for every number of workers, after the headings.
    """
    cases = [(each, solver) for each in (seconds, SLOW) for solver in own]
    made = [["workers", *(f"{solver}, {each:.3g} s each" for each, solver in cases)]]
    for count in WORKERS:
        cells = []
        for each, solver in cases:
            ahead = None
            if solver == "ddpg":
                ahead = AHEAD
            rate, bound = modelled(count, each, given_out, own[solver], ahead)
            cells.append(f"{rate * each:,.1f} ({bound})")
        made.append([str(count), *cells])
    return made


def print_table(console: Console, title: str, rows: list[list[str]]) -> None:
    table = Table(*rows[0], title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def save(folder: Path, lines: list[str], shown: list[list[str]], facts: list[str], model: list[list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page = [
        "# How far a search can be spread",
        "",
        f"Made by `experiments/{NAME}.py`, which says how: `python -m experiments.{NAME}`.",
        "",
        *lines,
        "",
        "## Evaluations per second (measured)",
        "",
        *_markdown(shown),
        "",
        *(f"* {fact}" for fact in facts),
        "",
        "## N workers on Ray, as times the speed of one (modelled from these, not measured)",
        "",
        *_markdown(model),
        "",
        "With an agent it is what it chooses ahead (`--ahead`, 4 here) that gives out first: more workers than that are",
        "idle, but for the sensitivities it begins with. A larger cluster takes a larger `--ahead`, or a sweep, whose",
        "searches need nothing of each other. With policies that are known ahead it is the first process, which gives out",
        "and takes back, and the solver.",
    ]
    (folder / f"{NAME}.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def _markdown(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}", *(f"| {' | '.join(row)} |" for row in rows[1:])]


if __name__ == "__main__":
    sys.exit(run_command(main))
