"""Find bits for every layer under a hardware budget.

A solver chooses the width of weights and activations, layer by layer; the policy with the best accuracy, or whatever else
--objective names, whose cost is within the budget is kept, fine-tuned and compared with what other solvers find in as many
evaluations. All of it goes to a folder, from which a search that was interrupted goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import flag, option, options_of, output_options, part_of, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading
from haq.console.tables import command_line, say
from haq.console.values import FILE, FOLDER, TextType
from haq.deployment import EXPORTERS
from haq.study.config import FOLDERS, SearchConfig, WorkersConfig
from hw_models.extras import install_line

if TYPE_CHECKING:
    from haq.study.known_trials import KnownTrials
    from haq.study.search_run import SearchRun
    from haq.study.task import SearchTask


@command(
    "search",
    __doc__,
    examples=(
        "haq search --hw edge --budget 0.5",
        "haq search --hw cloud --budget 0.8ms --solver ilp --finetune-epochs 0",
        "haq search --network mine:net --data mine:splits --metric storage --budget 40kB --scheme kmeans",
        "haq search --config runs/edge/config.yaml --seed 1",
        "haq search --resume runs/edge",
    ),
)
@options_of(SearchConfig)
@options_of(WorkersConfig)
@option("--out", FOLDER, "folder of the run", group=FOLDERS, default_words="one under runs/")
@option("--config", FILE, "take options from a run's config.yaml; those that are given besides win", group=FOLDERS)
@option("--resume", FOLDER, "go on with an interrupted run", group=FOLDERS, metavar="RUN")
@option(
    "--check-deploy",
    TextType(EXPORTERS.names),
    "begin only if whatever the search may find could be deployed to these formats, as `haq deploy --to` takes them, such as "
    "tvm,c",
    group=FOLDERS,
    metavar="NAMES",
)
@flag("--dry-run", "say what would be done, and stop", group=FOLDERS)
@trust_option()
@output_options()
def cli(
    given: dict[str, Any],
    out: Path | None,
    config: Path | None,
    resume: Path | None,
    check_deploy: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Begin a search, or go on with one."""
    workers = WorkersConfig(**part_of(given, WorkersConfig))
    options = part_of(given, SearchConfig)
    output = Output.open(as_json)
    if resume is not None:
        device = options.pop("device", None)
        if options or out or config or dry_run or check_deploy:
            raise ValueError(
                "--resume RUN goes on with what the run was asked for: no other option but --device, --workers, --ray and "
                "--json goes"
            )
        return resume_search(resume, workers, output, device)
    asked = SearchConfig.from_options(options, config)
    formats: tuple[str, ...] = ()
    if check_deploy:
        formats = tuple(check_deploy.split(","))
    return run_search(asked, workers, output, out=out, dry_run=dry_run, formats=formats)


main = main_of(cli)


def run_search(
    config: SearchConfig,
    workers: WorkersConfig,
    output: Output,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    formats: Sequence[str] = (),
) -> int:
    """Begin a search, and carry it out.

    Args:
        config: What is asked for.
        workers: Who evaluates policies.
        output: Where to print.
        out: The folder of the run; None for one under runs/.
        dry_run: Whether to say what would be done, and stop.
        formats: Exporters that must be able to write whatever it may find (--check-deploy).

    Returns:
        The exit status: 1 if what was found is not within the budgets, or not good enough.
    """
    from haq.store.lock import writing
    from haq.study.search_run import SearchRun, check_unused, default_folder

    folder = out or default_folder(config)
    check_unused(folder)
    for name in formats:
        EXPORTERS.get(name)  # an unknown one is told before anything is loaded
    task = _load(config, output)
    if formats:
        from haq.study.deployable import check_search

        check_search(task, formats)
    known = _read_trials(task)
    if dry_run:
        _print_plan(output, task, workers, None, known)
        return 0
    _print_plan(output, task, workers, folder, known)
    with writing(folder, _go_on(folder, config)):
        return _carry_out(task, SearchRun.create(folder, task, known), workers, output)


def resume_search(folder: Path, workers: WorkersConfig, output: Output, device: str | None = None) -> int:
    """Go on with a search that was interrupted; arguments and exit status are those of `run_search`.

    Args:
        folder: The folder of the run.
        workers: Who evaluates policies.
        output: Where to print.
        device: Where networks are run: one of the kind that the run began on; None for that itself.

    Returns:
        The exit status.

    Raises:
        ValueError: For a search that shares what it tries with others of a sweep, and for a device of another kind.
    """
    from haq.store.files import CONFIG
    from haq.store.lock import writing
    from haq.store.records import ConfigRecord
    from haq.study.search_run import SearchRun
    from haq.study.task import check_same_kind

    if ConfigRecord.read(folder / CONFIG).searches > 1:
        go_on = command_line("python", "-m", "haq.sweep", "--resume", folder.parent)
        raise ValueError(f"{folder} is one of a sweep's searches, which share what they try: go on with {go_on}")
    check_same_kind(folder, SearchRun.load(folder).config.device, device)
    run = SearchRun.load(folder, device)
    with writing(run.folder, run.go_on):
        if run.finished:
            # It may have been killed just before it did so itself.
            run.drop_checkpoint("finetuning")
            see = command_line("python", "-m", "haq.evaluate", folder, *run.config.trust_words())
            raise ValueError(f"{folder} is finished; see it with {see}")
        agent = run.read_agent()
        with follow_loading(output.notes, "loading network and data, calibrating") as follow:
            task = replace(run.build(**follow), agent=agent)
        _check_end(task)
        _print_plan(output, task, workers, folder, run.known(task.problem))
        run.check(task, same_versions=True)
        run.complete(task)
        say(output.notes, f"resuming: evaluations that are there already: {run.prepare_resume(task.problem)}")
        return _carry_out(task, run, workers, output)


def _load(config: SearchConfig, output: Output) -> SearchTask:
    """Load all that a search names, and the sensitivities that it is given."""
    from haq.solvers.base import find_solver
    from haq.study.known_trials import check_uses_trials
    from haq.study.task import SearchTask, load_target, read_agent

    find_solver(config.solver, config.iterate)
    if config.trials is not None:
        check_uses_trials(config.solver)
    agent = read_agent(config, [config.solver])
    with follow_loading(output.notes, "loading network and data, calibrating") as follow:
        task = replace(SearchTask.build(config, load_target(config, **follow), follow["progress"]), agent=agent)
    if config.sensitivity is not None:
        kind = task.read_sensitivities(Path(config.sensitivity)).kind
        task = replace(task, config=task.config.replace(sensitivity_kind=kind))
    _check_end(task)
    return task


def _read_trials(task: SearchTask) -> KnownTrials:
    """Read the trials that a search is given."""
    from haq.study import known_trials

    return known_trials.read(task.config.trial_folders, task)


def _check_end(task: SearchTask) -> None:
    """Raise before the search, rather than after it, what would end it then.

    Raises:
        ValueError: If there is nothing to fine-tune by.
        ImportError: If what verifies its outcome is missing.
    """
    from haq.study.search_steps import can_be_verified

    task.check_finetuning()

    if can_be_verified(task.problem.objective):
        import haq.attacks.evaluation_attacks  # noqa: F401


def _carry_out(task: SearchTask, run: SearchRun, workers: WorkersConfig, output: Output) -> int:
    """Search, and print what came out."""
    from haq.study.search_steps import search
    from haq.study.workers.processes import working

    try:
        with working(task.problem.evaluator, workers.workers, workers.ray, task.config.device):
            result, policy = search(output.notes, task, run)
    except (ConnectionError, ChildProcessError) as error:
        raise type(error)(f"{error}; what was found is kept, go on with: {run.go_on}") from None
    except KeyboardInterrupt:
        say(output.results, f"\nInterrupted. What was found so far is kept in {run.folder}; go on with", wrap=False)
        say(output.results, f"  {run.go_on}", wrap=False)
        return EXIT_INTERRUPTED
    finally:
        run.close()
    _print_result(output, task, run, result, policy)
    return int(not _is_kept(result))


def _is_kept(result: Mapping[str, Any]) -> bool:
    """Say whether what was found is within all budgets, and good enough where that was asked for."""
    budgets = result.get("budgets") or [result["budget"]]
    good_enough = result.get("reached", {}).get("search_holds", True)
    return bool(good_enough and all(budget["holds"] for budget in budgets))


def _print_plan(output: Output, task: SearchTask, workers: WorkersConfig, folder: Path | None, known: KnownTrials) -> None:
    from haq.study import tables
    from haq.study.search_run import has_tensorboard
    from haq.study.search_steps import rivals_of

    rivals = rivals_of(task)
    tables.print_plan(output.notes, task, folder, rivals.names, rivals.words, _describe_workers(workers, task.config))
    if task.config.trials is not None:
        say(output.notes, f"trials: {known.words(task.problem)}")
    tables.print_doubts(output.results, task)
    if not has_tensorboard():
        say(output.notes, f"TensorBoard events: none ({install_line('report')} to have them)")


def _describe_workers(workers: WorkersConfig, config: SearchConfig) -> str:
    """Who evaluates policies, and what keeps the solver from using all of them."""
    from haq.solvers.base import find_solver

    words = workers.describe()
    if not workers.exceed(config.ahead) or not find_solver(config.solver, config.iterate).chooses_ahead:
        return words
    return f"{words}; beyond sensitivities {config.solver} keeps {config.ahead} of them busy (--ahead)"


def _print_result(output: Output, task: SearchTask, run: SearchRun, result: dict[str, Any], policy: Any) -> None:
    from haq.study import tables
    from haq.study.search_steps import can_be_verified

    folder = run.folder
    tables.print_result(output.results, task, policy, result)
    if "verified" in result:
        say(output.results, _verdict(result["verified"]), wrap=False)
    trusting = task.config.trust_words()
    following = [["finetune", folder, *trusting], ["report", folder]]
    if task.config.finetune_epochs:
        following[0] = ["evaluate", folder, *trusting]
    elif task.problem.objective.distribution is None:
        following[0] = ["finetune", folder, "--loss", "MODULE:FUNCTION", *trusting]
    if can_be_verified(task.problem.objective):
        following.append(["robustness", folder, "--attacks", "full", *trusting])
    tables.print_next(output.notes, folder, following)
    output.print_json(result)


def _verdict(verified: dict[str, Any]) -> str:
    from haq.store.units import percent

    failed = [f"{check['name']}: {check['figures']}" for check in verified["checks"] if not check["passed"]]
    verdict = verified["verdict"]
    if failed:
        verdict = f"{verdict} ({'; '.join(failed)})"
    worst = percent(verified["worst"])
    return f"Verified by the full suite on {verified['images']} test images: {worst} right in the worst case, {verdict}."


def _go_on(folder: Path, config: SearchConfig) -> str:
    return command_line("python", "-m", "haq.search", "--resume", folder, *config.trust_words())


if __name__ == "__main__":
    sys.exit(run_command(main))
