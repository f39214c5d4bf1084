"""Find a weight and activation bit width for every layer under a hardware budget:  python -m haq.search --hw edge"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

import quantizers as Q
from haq import training
from haq.attacks.threat_model import parse_eps
from haq.console import cli
from haq.problem.sensitivity import KINDS, Sensitivities
from haq.solvers import SOLVERS
from haq.solvers.base import Session, Trial
from haq.store.files import ROBUSTNESS
from haq.store.lock import writing
from haq.store.records import ResultRecord
from haq.store.units import percent
from haq.study import result as summary
from haq.study import tables
from haq.study.config import SearchConfig
from haq.study.picture import save_picture
from haq.study.search_run import SearchRun, check_unused, default_folder, has_tensorboard
from haq.study.task import SearchTask, adversary_of, load_target
from haq.study.workers.processes import working

RIVALS = ("greedy", "ilp")
VERIFIED = 200  # images


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = SearchConfig()
    parser = argparse.ArgumentParser(prog="python -m haq.search", description=__doc__)
    add = parser.add_argument
    add(
        "--hw",
        help="hardware target: a name, a .yaml file, lut:TABLE.csv, cpu (measured here) or rpc:HOST:PORT (measured there) "
        f"(default: {default.hw})",
    )
    add(
        "--budget",
        help=f"a fraction of uniform 8 bits, or an amount such as 0.8ms, 40kB (default: {default.budget})",
    )
    add("--bits", metavar="SMALLEST:LARGEST", help=f"widths that a solver may choose (default: {default.bits})")
    cli.add_measuring(parser)
    add("--metric", help=f"latency, energy or storage (default: {default.metric})")
    add("--network", help=f"a name as in haq.networks (default: {default.network})")
    add("--data", help=f"a name as in haq.data (default: {default.data})")
    add("--solver", help=f"{', '.join(SOLVERS.names())} (default: {default.solver})")
    add(
        "--evaluations",
        type=int,
        help=f"policies that a solver may evaluate (default: {default.evaluations})",
    )
    add(
        "--ahead",
        type=int,
        metavar="N",
        help="policies that agents and evolution choose before they learn what the first of them is worth, so that workers "
        f"have something to do; results depend on it (default: {default.ahead})",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that evaluate policies; results don't depend on their number (default: this one, with all threads)",
    )
    cli.add_ray(parser)
    add("--env", help="of agents: plan (relative to a plan for what is left) or haq (HAQ's own) (default: plan)")
    add("--seed", type=int, help=f"of everything random but the data's splits (default: {default.seed})")
    add("--finetune-epochs", type=int, help=f"0 leaves fine-tuning out (default: {default.finetune_epochs})")
    add(
        "--finetune-steps",
        type=int,
        help=f"steps by which every policy is fine-tuned before it is judged (default: {default.finetune_steps})",
    )
    cli.add_objective(parser, default.objective, default.eps)
    add(
        "--sensitivity-kind",
        help=f"what solvers know of single layers: {', '.join(KINDS)}; the last costs no evaluation "
        f"(default: {default.sensitivity_kind})",
    )
    add(
        "--sensitivity",
        metavar="RUN|FILE",
        help="take it from an earlier run of this network and data, for whatever target and budget, instead of measuring it",
    )
    add("--out", type=Path, help="folder of the run (default: one under runs/)")
    add("--resume", type=Path, metavar="RUN", help="go on with an interrupted run")
    add("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name, None) for name in SearchConfig.model_fields}
    options.settings = {name: value for name, value in given.items() if value is not None}
    if options.resume and (options.settings or options.out or options.dry_run):
        raise ValueError(
            "--resume RUN goes on with what the run was asked for: no other option but --workers, --ray and --json goes"
        )
    cli.check_workers(options)
    cli.check_eps(options)
    if options.sensitivity and options.sensitivity_kind:
        raise ValueError("--sensitivity brings its kind along: leave --sensitivity-kind out")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the run's folder, once there is one, until the end."""
    console = Console(stderr=options.json)
    earlier = SearchRun.load(options.resume) if options.resume else None
    if earlier:
        held.enter_context(writing(earlier.folder, earlier.go_on))
    if earlier and earlier.finished:
        earlier.drop_checkpoint("finetuning")  # it may have been killed just before it did so itself
        raise ValueError(f"{earlier.folder} is finished; see it with python -m haq.evaluate {earlier.folder}")
    settings = earlier.config if earlier else SearchConfig(**options.settings)
    folder = earlier.folder if earlier else options.out or default_folder(settings)
    if not earlier:
        check_unused(folder)
    with cli.follow_loading(console, "loading network and data, calibrating") as follow:
        task = earlier.build(**follow) if earlier else SearchTask.build(settings, load_target(settings, **follow))
    if settings.sensitivity and not earlier:
        kind = task.read_sensitivities(Path(settings.sensitivity)).kind
        task = replace(task, config=settings.replace(sensitivity_kind=kind))
        settings = task.config
    if task.problem.objective.attacked:
        import haq.attacks.evaluation_attacks  # noqa: F401 - what verifies the outcome is missed before the search rather than after it
    rivals = tuple(name for name in RIVALS if name != settings.solver)
    tables.print_plan(console, task, None if options.dry_run else folder, rivals, _workers(options, settings))
    if not has_tensorboard():
        console.print("TensorBoard events: none (pip install 'haq\\[report]' to have them)")
    if options.dry_run:
        return 0

    if earlier:
        earlier.check(task, same_versions=True)
        earlier.complete(task)
        console.print(f"resuming: {earlier.prepare_resume(task.problem)} evaluations are there already")
    else:
        held.enter_context(writing(folder, f"python -m haq.search --resume {folder}"))
    run = earlier or SearchRun.create(folder, task)
    try:
        with working(task.problem.evaluator, options.workers, options.ray):
            result, policy = _search(console, task, run, rivals)
    except (ConnectionError, ChildProcessError) as error:
        raise type(error)(f"{error}; what was found is kept, go on with: python -m haq.search --resume {run.folder}") from None
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. What was found so far is kept in {run.folder}; go on with")
        console.print(f"  python -m haq.search --resume {run.folder}", soft_wrap=True)
        return cli.EXIT_INTERRUPTED
    finally:
        run.close()
    tables.print_result(console, task, policy, result)
    tuned = settings.finetune_epochs > 0
    if "verified" in result:
        console.print(_verdict(result["verified"]), soft_wrap=True, markup=False)
    verify = (f"robustness {folder} --attacks full",) if task.problem.objective.attacked else ()
    tables.print_next(
        console, run.folder, (f"evaluate {folder}" if tuned else f"finetune {folder}", f"report {folder}", *verify)
    )
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if result["budget"]["holds"] else 1


def _workers(options: argparse.Namespace, settings: SearchConfig) -> str:
    """Who evaluates policies, and what keeps the solver from using all of them."""
    described = cli.describe_workers(options)
    more = options.ray is not None if options.workers is None else options.workers > settings.ahead
    if not more or not SOLVERS.get(settings.solver).chooses_ahead:
        return described
    return f"{described}; beyond sensitivities {settings.solver} keeps {settings.ahead} of them busy (--ahead)"


def _search(console: Console, task: SearchTask, run: SearchRun, rivals: tuple[str, ...]) -> tuple[dict[str, Any], Q.BitPolicy]:
    settings = task.config
    sensitivities = run.sensitivities(task)
    with cli.Live(console) as bar:
        found: dict[str, Trial] = {}
        used: dict[str, int] = {}
        saturated: dict[str, float] = {}
        for name in (settings.solver, *rivals):
            session = _solve(bar, task, run, name, sensitivities)
            assert session.best is not None
            found[name], used[name] = session.best, session.used
            if session.saturated:
                saturated[name] = statistics.mean(session.saturated)
        policy = found[settings.solver].policy
        tuned = None
        if settings.finetune_epochs:
            network = task.problem.evaluator.network
            Q.set_policy(network, policy)
            state = run.checkpoint("finetuning", task, epochs=settings.finetune_epochs, policy=policy)
            tuned = training.finetune(
                task.network,
                network,
                task.dataset.train,
                epochs=settings.finetune_epochs,
                seed=settings.seed,
                adversary=adversary_of(settings),
                state=state,
                **cli.follow_training(bar),
            )
            run.save_checkpoint(tuned, task)
        result = summary.collect(task, policy, tuned, {name: found[name].policy for name in rivals}, used, saturated)
        if task.problem.objective.attacked:
            network = tuned or task.problem.evaluator.prepared(policy)
            result["verified"] = _verify(bar, task, network, run.folder / ROBUSTNESS)
    save_picture(task.problem, policy, run.folder / "policy.png")
    run.save_result(ResultRecord.from_dict(result))
    run.drop_checkpoint("finetuning")
    return result, policy


def _verify(bar: Progress, task: SearchTask, network: nn.Module, folder: Path) -> dict[str, Any]:
    """What was found for its accuracy under a cheap attack, under the full suite."""
    from haq.attacks.assessment import assess
    from haq.study.comparison import ComparedNetworks

    bar_task = bar.add_task("verifying", total=None)
    gathered = ComparedNetworks(task.network, task.dataset, {"found": network}, {})
    found = assess(
        gathered.classifier(network),
        *gathered.images(VERIFIED),
        eps=parse_eps(task.config.eps),
        attacks="full",
        sources=gathered.sources("found"),
        seed=task.config.seed,
        folder=folder,
        on_progress=lambda done, total, note: bar.update(bar_task, completed=int(done), total=int(total) or 1, note=note),
    )
    return found.summary()


def _verdict(verified: dict[str, Any]) -> str:
    failed = "; ".join(f"{check['name']}: {check['figures']}" for check in verified["checks"] if not check["passed"])
    return (
        f"Verified by the full suite on {verified['images']} test images: {percent(verified['worst'])} right in the "
        f"worst case, {verified['verdict']}{f' ({failed})' if failed else ''}."
    )


def _solve(bar: Progress, task: SearchTask, run: SearchRun, name: str, sensitivities: Sensitivities | None) -> Session:
    """Run one solver, and show where it is."""
    bar_task = bar.add_task(name, total=task.config.evaluations)

    def on_evaluation(count: int, found: Trial, best: Trial | None) -> None:
        share = found.cost / task.problem.limit
        so_far = percent(best.accuracy) if best else "none within it"
        last = percent(found.accuracy)
        bar.update(bar_task, completed=count, accuracy=last, cost=f"{share:.3f}", best=so_far)

    session = run.search(task, name, sensitivities, on_evaluation)
    bar.update(bar_task, completed=session.used, total=session.used)
    return session


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
