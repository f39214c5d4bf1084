"""Search on many targets, within many budgets, and compare:  python -m haq.sweep --hw edge,cloud --budgets 0.3:0.9:0.1"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from haq.console import cli
from haq.problem.sensitivity import KINDS, Sensitivities
from haq.solvers import SOLVERS
from haq.reporting import pictures
from haq.store.files import SWEEP
from haq.store.lock import writing
from haq.store.records import FinishedSweepRecord
from haq.store.units import describe_amount, percent
from haq.study import sweep_run
from haq.study.config import SearchConfig
from haq.study.search_run import check_unused, has_tensorboard, unused_folder
from haq.study.sweep_run import SweepConfig, SweepContext

PICTURE = "sweep.png"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = SearchConfig()
    parser = argparse.ArgumentParser(prog="python -m haq.sweep", description=__doc__)
    add = parser.add_argument
    add("--hw", metavar="NAME,NAME", help="hardware targets, as haq.search takes them, parted by commas (default: edge,cloud)")
    add(
        "--budgets",
        metavar="FIRST:LAST:STEP",
        help="fractions of uniform 8 bits, or budgets parted by commas (default: 0.3:0.9:0.1)",
    )
    add("--seeds", type=int, help="searches of each solver that draws: seeds 0, 1, 2 ... (default: 1)")
    add("--solvers", metavar="NAME,NAME", help=f"of {', '.join(SOLVERS.names())} (default: ilp,ddpg)")
    cli.add_measuring(parser)
    add("--bits", metavar="SMALLEST:LARGEST", help=f"widths that a solver may choose (default: {default.bits})")
    add("--metric", help=f"latency, energy or storage (default: {default.metric})")
    add("--network", help=f"a name as in haq.networks (default: {default.network})")
    add("--data", help=f"a name as in haq.data (default: {default.data})")
    add(
        "--evaluations",
        type=int,
        help=f"policies that each search may evaluate, and as many for sensitivities, once (default: {default.evaluations})",
    )
    cli.add_objective(parser, default.objective, default.eps)
    add("--sensitivity-kind", help=f"{', '.join(KINDS)} (default: {default.sensitivity_kind})")
    add("--workers", type=int, help="processes that search, one thread each; results are the same (default: 1)")
    cli.add_ray(parser)
    add("--out", type=Path, help="folder of the sweep (default: one under runs/)")
    add("--resume", type=Path, metavar="SWEEP", help="go on with an interrupted sweep")
    add("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    options = parser.parse_args(arguments)
    cli.check_workers(options)
    cli.check_eps(options)
    varied = ("hw", "budgets", "seeds", "solvers")
    given = {name: getattr(options, name, None) for name in SearchConfig.model_fields if name not in varied}
    options.settings = {name: value for name, value in given.items() if value is not None}
    if options.resume and (options.settings or options.out or options.dry_run or any(getattr(options, x) for x in varied)):
        raise ValueError(
            "--resume SWEEP goes on with what the sweep was asked for: no other option but --workers, --ray and --json goes"
        )
    return options


def asked(options: argparse.Namespace) -> SweepConfig:
    """The sweep that options of the command ask for."""
    return SweepConfig(
        settings=SearchConfig(**options.settings, finetune_epochs=0),
        hw=options.hw or "edge,cloud",
        budgets=options.budgets or "0.3:0.9:0.1",
        solvers=options.solvers or "ilp,ddpg",
        seeds=1 if options.seeds is None else options.seeds,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the sweep's folder, once there is one, until the end; each search holds its own."""
    console = Console(stderr=options.json)
    if options.resume:
        sweep_run.read(options.resume)  # nothing is locked that isn't a sweep's
        held.enter_context(writing(options.resume, sweep_run.go_on(options.resume)))
    earlier = sweep_run.read(options.resume) if options.resume else None
    if earlier and earlier.finished:
        raise ValueError(f"{options.resume} is finished; what it found is in {options.resume / SWEEP}")
    sweep = sweep_run.asked_of(earlier) if earlier else asked(options)
    folder = options.resume or options.out or unused_folder(f"sweep-{sweep.settings.metric}")
    if not earlier:
        check_unused(folder)
    with cli.follow_loading(console, "loading network and data, calibrating, pricing") as follow:
        context = SweepContext.load(sweep, **follow)
    print_plan(console, context, options, None if options.dry_run else folder)
    if options.dry_run:
        return 0
    if earlier:
        sweep_run.check(folder, earlier, context)
    else:
        held.enter_context(writing(folder, sweep_run.go_on(folder)))
        sweep_run.begin(folder, sweep, context)
    try:
        record = run(console, context, folder, options)
    except (ConnectionError, ChildProcessError) as error:
        raise type(error)(f"{error}; finished searches are kept, go on with: python -m haq.sweep --resume {folder}") from None
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. Finished searches are kept in {folder}; go on with")
        console.print(f"  python -m haq.sweep --resume {folder}", soft_wrap=True)
        return cli.EXIT_INTERRUPTED
    pictures.save(pictures.draw_sweep(record), folder / PICTURE)
    content = record.to_dict()
    print_result(console, content)
    console.print(f"Written: {folder} ({SWEEP}, {PICTURE}, and a folder for each search)", soft_wrap=True)
    example = next(found["runs"][0]["folder"] for target in content["targets"].values() for found in target["found"])
    console.print(f"Next: [bold]python -m haq.finetune {folder / example}[/], or another of them", soft_wrap=True)
    console.print(f"Next: [bold]python -m haq.report {folder}[/]", soft_wrap=True)
    if options.json:
        print(json.dumps(content, indent=2))
    return 0


def run(console: Console, context: SweepContext, folder: Path, options: argparse.Namespace) -> FinishedSweepRecord:
    """Sensitivities, then every search, with progress bars. Returns what sweep.json holds."""
    cells, sensitivities = context.cells(), None
    with cli.progress(console) as bar:
        if sweep_run.shares_sensitivities(context.sweep):
            sensitivities = _measure_sensitivities(bar, context, folder)
        sweep_run.judge_uniform(context)
        bar_task = bar.add_task("searches", total=len(cells), note="")
        kind = sensitivities.kind if sensitivities else context.sweep.settings.sensitivity_kind
        done = lambda cell: bar.update(bar_task, advance=1, note=cell.folder)  # noqa: E731
        sweep_run.run_all(folder, context, cells, kind, options.workers, done, options.ray)
        return sweep_run.finish(folder, context, cells, sensitivities)


def _measure_sensitivities(bar: Any, context: SweepContext, folder: Path) -> Sensitivities:
    bar_task = bar.add_task("sensitivities", total=context.sweep.settings.evaluations, note="")
    found = sweep_run.measure_sensitivities(folder, context, lambda count: bar.update(bar_task, completed=count))
    bar.update(bar_task, completed=found.known, total=found.known)
    return found


def print_plan(console: Console, context: SweepContext, options: argparse.Namespace, folder: Path | None) -> None:
    """What a sweep will do."""
    sweep, task = context.sweep, context.first
    settings, cells = sweep.settings, context.cells()
    drawn = f"{sweep.seeds} seeds of those that draw" if sweep.seeds > 1 else "one seed"
    rows = {
        "network": f"{task.network.name}: {len(task.problem.workload)} quantizable layers, "
        f"{task.problem.workload.macs / 1e6:.2f} M MACs",
        "data": task.dataset.describe(),
        "metric": f"{settings.metric}, as a fraction of uniform 8 bits",
        **{
            f"on {hw}": f"{one.problem.target.description}; {one.problem.table.provenance}; budgets "
            + (", ".join(b for b in sweep.budgets if b not in context.unreachable[hw]) or "none")
            + (f"; {left_out}" if (left_out := context.left_out(hw)) else "")
            for hw, one in context.tasks.items()
        },
        "solvers": f"{', '.join(sweep.solvers)}; {settings.evaluations} evaluations, {drawn}",
        "sensitivities": f"{settings.sensitivity_kind}, once for all" if sweep_run.shares_sensitivities(sweep) else "none",
        "searches": f"{len(cells)}, {cli.describe_workers(options)}",
        "results in": str(folder) if folder else "nothing is written (--dry-run)",
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)
    if not has_tensorboard():
        console.print("TensorBoard events: none (pip install 'haq\\[report]' to have them)")


def print_result(console: Console, content: dict[str, Any]) -> None:
    """A table for each target, what was out of reach, and what each policy costs on the other targets."""
    for target in content["targets"].values():
        if target["found"]:
            console.print(_target_table(content, target))
        if target["left_out"]:
            console.print(f"{target['name']}: budgets {target['left_out']}.", soft_wrap=True, highlight=False)
    if content["specialisation"]:
        console.print(_specialisation_table(content))


def _target_table(content: dict[str, Any], target: dict[str, Any]) -> Table:
    objective, metric = content["objective"], content["metric"]
    title = f"{content['network']} on {content['data']}, {target['name']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("budget", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    table.add_column(f"\n{metric}\n({target['kind']})", justify="right", no_wrap=True)
    table.add_column("of\nuniform\n8 bits", justify="right")
    for split in ("search", "test"):
        table.add_column(f"{split}\n{objective}\n(measured)", justify="right", no_wrap=True)
    table.add_column("Pareto\nfront")

    def add(row: dict[str, Any], runs: list[dict[str, Any]], *cells: str) -> None:
        accuracies = [_spread([run[f"{split}_{objective}"] for run in runs]) for split in ("search", "test")]
        amount = describe_amount(row["cost"], metric)
        table.add_row(*cells, amount, f"{row['fraction']:.3f}", *accuracies, "*" if row["pareto"] else "")

    before = None
    for row in target["found"]:
        if before is not None and row["budget"] != before:
            table.add_section()
        add(row, row["runs"], row["budget"] if row["budget"] != before else "", row["solver"])
        before = row["budget"]
    table.add_section()
    for row in target["uniform"]:
        add(row, [row], "", f"uniform {row['bits']} bits")
    sizes = " and ".join(f"{count:,} {split}" for split, count in content["images"].items())
    seeds = "; means of several seeds, below them smallest and largest" if content["asked"]["seeds"] > 1 else ""
    measured = f"{objective} ({content['objective_is']})" if objective == "accuracy+robust" else objective
    table.caption = (
        f"float: {percent(content['float'][f'test_{objective}'])} on the test split; {sizes} images; {measured} "
        f"{content['accuracy_is']}; cost {target['cost_is']}{seeds}. *: nothing costs less and has a better test {objective}. "
        "Uniform policies keep the fixed layers' bits"
    )
    return table


def _specialisation_table(content: dict[str, Any]) -> Table:
    special, objective = content["specialisation"], content["objective"]
    title = f"What a policy found for one target costs on another: {content['metric']} as a fraction of uniform 8 bits there"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("found for", no_wrap=True)
    table.add_column(f"test\n{objective}\n(measured)", justify="right")
    for hw in special["policies"]:
        table.add_column(f"\non {hw}\n({content['targets'][hw]['kind']})", justify="right")
    for hw, row in special["policies"].items():
        cells = [f"{share:.3f} {'*' if other == hw else ' '}" for other, share in row["fractions"].items()]
        table.add_row(f"{hw} by {row['solver']}", percent(row[f"test_{objective}"]), *cells)
    table.caption = (
        f"budget {special['budget']}. *: the target's own policy, the best on the search split of those found for it"
    )
    return table


def _spread(values: list[float]) -> str:
    mean = percent(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean}\n{100 * min(values):.2f}–{100 * max(values):.2f}"


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
