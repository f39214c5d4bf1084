"""Search on many targets, within many budgets, and compare.

Every search is a run in a folder of the sweep's. What they can share is measured once: the float network, uniform policies and
the sensitivities of single layers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import flag, option, options_of, output_options, part_of, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading, progress
from haq.console.tables import say, say_next
from haq.console.values import FILE, FOLDER
from haq.solvers import SOLVERS
from haq.study.config import FOLDERS, SearchConfig, SweepConfig, WorkersConfig
from hw_models.extras import install_line

if TYPE_CHECKING:
    from rich.progress import Progress

    from haq.problem.sensitivity import Sensitivities
    from haq.store.records import FinishedSweepRecord
    from haq.study.known_trials import KnownTrials
    from haq.study.sweep_run import SweepCell, SweepContext


@command(
    "sweep",
    __doc__,
    examples=(
        "haq sweep --hw edge,cloud --budgets 0.3:0.9:0.1",
        "haq sweep --hw edge --budgets 0.5,0.8ms --solvers ilp,ddpg,evolution --seeds 3 --workers 4",
        "haq sweep --resume runs/sweep-latency",
    ),
)
@options_of(SweepConfig, leave_out=("settings",))
@options_of(SearchConfig, only=SweepConfig.SHARED)
@options_of(WorkersConfig)
@option("--out", FOLDER, "folder of the sweep", group=FOLDERS, default_words="one under runs/")
@option("--config", FILE, "take options from a sweep's sweep.json; those that are given besides win", group=FOLDERS)
@option("--resume", FOLDER, "go on with an interrupted sweep", group=FOLDERS, metavar="SWEEP")
@flag("--dry-run", "say what would be done, and stop", group=FOLDERS)
@trust_option()
@output_options()
def cli(
    given: dict[str, Any], out: Path | None, config: Path | None, resume: Path | None, dry_run: bool, as_json: bool
) -> int:
    """Begin a sweep, or go on with one."""
    workers = WorkersConfig(**part_of(given, WorkersConfig))
    options = {**part_of(given, SweepConfig), **part_of(given, SearchConfig)}
    output = Output.open(as_json)
    if resume is not None:
        if options or out or config or dry_run:
            raise ValueError(
                "--resume SWEEP goes on with what the sweep was asked for: no other option but --workers, --ray and --json "
                "goes"
            )
        return resume_sweep(resume, workers, output)
    return run_sweep(SweepConfig.from_options(options, config), workers, output, out=out, dry_run=dry_run)


main = main_of(cli)


def run_sweep(
    config: SweepConfig, workers: WorkersConfig, output: Output, *, out: Path | None = None, dry_run: bool = False
) -> int:
    """Begin a sweep, and carry it out.

    Args:
        config: What is asked for.
        workers: Who searches.
        output: Where to print.
        out: The folder of the sweep; None for one under runs/.
        dry_run: Whether to say what would be done, and stop.

    Returns:
        The exit status.
    """
    from haq.store.lock import writing
    from haq.study import known_trials, sweep_run
    from haq.study.search_run import check_unused, unused_folder

    folder = out or unused_folder(f"sweep-{config.settings.metric}")
    check_unused(folder)
    _check_trials(config)
    context = _load(config, output)
    known = known_trials.read(config.settings.trial_folders, context.first)
    if dry_run:
        _print_plan(output, context, workers, None, known)
        return 0
    _print_plan(output, context, workers, folder, known)
    # The sweep's folder is held until the end; each search holds its own.
    with writing(folder, sweep_run.go_on(folder, config)):
        sweep_run.begin(folder, context.sweep, context, known)
        return _carry_out(folder, context, workers, output)


def resume_sweep(folder: Path, workers: WorkersConfig, output: Output) -> int:
    """Go on with a sweep that was interrupted; arguments and exit status are those of `run_sweep`.

    Args:
        folder: The folder of the sweep.
        workers: Who evaluates policies.
        output: Where to print.

    Returns:
        The exit status.

    Raises:
        ValueError: For a sweep that is finished.
    """
    from haq.store.files import SWEEP, SWEEP_PICTURE
    from haq.store.lock import writing
    from haq.store.records import FinishedSweepRecord
    from haq.study import sweep_run

    # Nothing is locked that isn't a sweep's.
    begun = sweep_run.asked_of(sweep_run.read(folder))
    with writing(folder, sweep_run.go_on(folder, begun)):
        earlier = sweep_run.read(folder)
        if isinstance(earlier, FinishedSweepRecord):
            if not (folder / SWEEP_PICTURE).exists():
                return _complete(folder, begun, earlier, output)
            raise ValueError(f"{folder} is finished; what it found is in {folder / SWEEP}")
        asked = sweep_run.asked_of(earlier)
        asked.check_code(folder / SWEEP)
        context = _load(asked, output)
        _print_plan(output, context, workers, folder, sweep_run.known(folder, context))
        sweep_run.check(folder, earlier, context)
        return _carry_out(folder, context, workers, output)


def _complete(folder: Path, asked: SweepConfig, found: FinishedSweepRecord, output: Output) -> int:
    """Draw the picture that a finished sweep lacks, and print its tables."""
    from haq.reporting import pictures
    from haq.store.files import SWEEP_PICTURE

    pictures.save(pictures.draw_sweep(found), folder / SWEEP_PICTURE)
    _print_result(folder, asked, found, output)
    return 0


def _load(config: SweepConfig, output: Output) -> SweepContext:
    from haq.study.sweep_run import SweepContext

    with follow_loading(output.notes, "loading network and data, calibrating, pricing") as follow:
        return SweepContext.load(config, **follow)


def _check_trials(config: SweepConfig) -> None:
    """Raise ValueError if trials of earlier searches are given, and no solver would learn from them."""
    from haq.study.known_trials import check_uses_trials

    if config.settings.trials is not None and not any(SOLVERS.get(solver).uses_trials for solver in config.solvers):
        check_uses_trials(config.solvers[0])


def _print_plan(
    output: Output, context: SweepContext, workers: WorkersConfig, folder: Path | None, known: KnownTrials
) -> None:
    from haq.study import sweep_tables, tables
    from haq.study.search_run import has_tensorboard

    sweep_tables.print_plan(output.notes, context, folder, workers.describe())
    if context.sweep.settings.trials is not None:
        say(output.notes, f"trials: {known.words(context.first.problem)} of {context.sweep.hw[0]}")
    # The network and its images are the same on every target.
    tables.print_doubts(output.results, next(iter(context.tasks.values())))
    if not has_tensorboard():
        say(output.notes, f"TensorBoard events: none ({install_line('report')} to have them)")


def _carry_out(folder: Path, context: SweepContext, workers: WorkersConfig, output: Output) -> int:
    """Search, and print what came out."""
    from haq.study import sweep_run

    go_on = sweep_run.go_on(folder, context.sweep)
    try:
        found = _search(folder, context, workers, output)
    except (ConnectionError, ChildProcessError) as error:
        raise type(error)(f"{error}; finished searches are kept, go on with: {go_on}") from None
    except KeyboardInterrupt:
        say(output.results, f"\nInterrupted. Finished searches are kept in {folder}; go on with", wrap=False)
        say(output.results, f"  {go_on}", wrap=False)
        return EXIT_INTERRUPTED
    _print_result(folder, context.sweep, found, output)
    return 0


def _search(folder: Path, context: SweepContext, workers: WorkersConfig, output: Output) -> FinishedSweepRecord:
    """Measure sensitivities, then search everywhere, with progress bars; write what was found."""
    from haq.reporting import pictures
    from haq.store.files import SWEEP, SWEEP_PICTURE
    from haq.study import sweep_run, sweep_sharing

    cells = context.cells()
    sensitivities: Sensitivities | None = None
    kind = context.sweep.settings.sensitivity_kind
    with progress(output.notes) as bar:
        if sweep_run.shares_sensitivities(context.sweep):
            sensitivities = _measure_sensitivities(bar, context, folder)
            kind = sensitivities.kind
        sweep_run.judge_uniform(context)
        line = bar.add_task("searches", total=len(cells), note="")

        def on_search(cell: SweepCell) -> None:
            bar.update(line, advance=1, note=cell.folder)

        together = sweep_sharing.groups(cells)
        for group in together:
            _search_together(bar, folder, context, group, workers)
            for cell in group:
                on_search(cell)
        others = [cell for cell in cells if not any(cell in group for group in together)]
        sweep_run.run_all(folder, context, others, kind, workers.workers, on_search, workers.ray)
        found = sweep_run.collect(folder, context, cells, sensitivities)
    pictures.save(pictures.draw_sweep(found), folder / SWEEP_PICTURE)
    found.write(folder / SWEEP)  # last: it says that all is there
    return found


def _search_together(
    bar: Progress, folder: Path, context: SweepContext, group: tuple[SweepCell, ...], workers: WorkersConfig
) -> None:
    """Run the searches that learn from each other's trials."""
    from haq.study import sweep_sharing

    total = sweep_sharing.evaluations_of(group, context)
    line = bar.add_task(f"{group[0].solver}, seed {group[0].seed}", total=total, note=f"{len(group)} searches share")

    def on_evaluation(count: int) -> None:
        bar.update(line, completed=count)

    sweep_sharing.search(folder, context, group, workers, on_evaluation)


def _measure_sensitivities(bar: Progress, context: SweepContext, folder: Path) -> Sensitivities:
    from haq.study import sweep_run

    line = bar.add_task("sensitivities", total=context.sweep.settings.evaluations, note="")

    def on_evaluation(count: int) -> None:
        bar.update(line, completed=count)

    found = sweep_run.measure_sensitivities(folder, context, on_evaluation)
    bar.update(line, completed=found.known, total=found.known)
    return found


def _print_result(folder: Path, asked: SweepConfig, found: FinishedSweepRecord, output: Output) -> None:
    from haq.store.files import SWEEP, SWEEP_PICTURE
    from haq.study import sweep_tables

    sweep_tables.print_result(output.results, found)
    say(output.notes, f"Written: {folder} ({SWEEP}, {SWEEP_PICTURE}, and a folder for each search)", wrap=False)
    finetune = ["haq.finetune", folder / found.found[0].runs[0].folder, *asked.trust_words()]
    say_next(output.notes, "python", "-m", *finetune, hint=" (with this search or another)")
    say_next(output.notes, "python", "-m", "haq.report", folder)
    output.print_json(found.to_dict())


if __name__ == "__main__":
    sys.exit(run_command(main))
