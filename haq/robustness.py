"""Attack the networks of a run, or a model, and say what can be believed of the outcome.

Compares float, uniform 8 bits, the policy found, and the same policy trained defensively; of a MODEL (a name as in
haq.networks, or a checkpoint) float, uniform bits, and the bits of the checkpoint. The number that counts is the worst case
over all attacks, image by image; checks for masked gradients stand beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq import networks
from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import argument, option, options_of, output_options, trust_option
from haq.console.output import Output
from haq.console.progress import follow_training, progress
from haq.console.tables import Column, key_table, print_columns, say
from haq.console.values import FOLDER, INTEGER, TextType
from haq.store.files import ATTACKED, ROBUSTNESS
from haq.store.units import counted, percent
from haq.study.attack_config import AttackConfig
from haq.study.config import FOLDERS, WORK

if TYPE_CHECKING:
    from rich.console import Console

    from haq.store.records import AttackedRecord, RobustnessRecord
    from haq.study.comparison import ComparedNetworks
    from haq.study.robustness_run import Examined, RobustnessTask

PICTURE = "robustness.png"
MODEL = TextType(networks.NETWORKS.names)
AGAIN = "the same command again, which takes up what is finished"
DIGITS = 1  # of percentages
PASSES = 1000  # that a bar counts as one: there are thousands, over one image each


@command(
    "robustness",
    __doc__,
    examples=(
        "haq robustness RUN --attacks quick",
        "haq robustness RUN --attacks full --norm l2 --uniform 8,4,2",
        "haq robustness mobilenet-mini --data fashion-mnist-12k --attacks standard,mine:Attack",
    ),
)
@argument("run_or_model", MODEL, "the folder of a search, a network's name as `haq list networks` shows them, or a checkpoint")
@options_of(AttackConfig)
@option(
    "--workers",
    INTEGER,
    "networks attacked at a time; the outcome doesn't depend on it",
    group=WORK,
    metavar="N",
    default=os.cpu_count() or 1,
    default_words="one for each processor",
)
@option("--out", FOLDER, "folder", group=FOLDERS, default_words=f"{ROBUSTNESS}/ in the run's, or runs/{ROBUSTNESS}-MODEL")
@trust_option()
@output_options()
def cli(run_or_model: str, given: dict[str, Any], workers: int, out: Path | None, as_json: bool) -> int:
    """Attack a run's networks, or a model's."""
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    return run_robustness(run_or_model, AttackConfig(**given), Output.open(as_json), workers=workers, out=out)


main = main_of(cli)


def run_robustness(source: str, config: AttackConfig, output: Output, *, workers: int = 1, out: Path | None = None) -> int:
    """Attack networks, and write what comes of it into a folder.

    Args:
        source: The folder of a run, a network's name, or a checkpoint.
        config: How they are attacked.
        output: Where to print.
        workers: How many are attacked at a time.
        out: The folder; None: one in the run's, or under runs/.

    Returns:
        The exit status.
    """
    from haq.attacks.masking import CURVE_STEPS
    from haq.problem.evaluator import one_thread
    from haq.reporting import pictures
    from haq.store.lock import writing
    from haq.study.robustness_run import RobustnessTask, collect

    task = RobustnessTask(source, config, out)
    run = task.spec.run
    folder = task.folder
    with ExitStack() as held:
        if run is not None:
            held.enter_context(writing(run.folder, AGAIN))
        try:
            with one_thread():
                compared = _gather(task, output)
                print_plan(output.notes, task, compared)
                if run is None or not folder.resolve().is_relative_to(run.folder.resolve()):
                    held.enter_context(writing(folder, AGAIN))
                found = _examine(task, compared, workers, output)
        except KeyboardInterrupt:
            kept = f"\nInterrupted. Finished attacks are kept in {folder}; the same command goes on from there."
            say(output.results, kept, wrap=False)
            return EXIT_INTERRUPTED
        record = collect(task, compared, found)
        folder.mkdir(parents=True, exist_ok=True)
        pictures.save(pictures.draw_robustness(record, CURVE_STEPS), folder / PICTURE)
        record.write(folder / ATTACKED)  # last: it says that all is there
    print_result(output.results, record)
    say(output.notes, f"Written: {folder} ({ATTACKED}, {PICTURE}, and the worst images of every network)", wrap=False)
    output.print_json(record.to_dict())
    return 0


def _gather(task: RobustnessTask, output: Output) -> ComparedNetworks:
    """Load what is compared, with a bar for what has to be trained."""
    from haq.study.comparison import gather

    bar = progress(output.notes)

    def on_training(name: str) -> dict[str, Any]:
        bar.start()
        say(output.notes, f"{name} isn't there yet: it is trained like the policy that was found")
        return follow_training(bar)

    try:
        return gather(task.spec, on_training)
    finally:
        bar.stop()


def _examine(task: RobustnessTask, compared: ComparedNetworks, workers: int, output: Output) -> dict[str, Examined]:
    """Attack every network, with a bar for each."""
    from haq.study.robustness_run import examine_all

    with progress(output.notes) as bar:
        bars = {name: bar.add_task(name, total=None, note="") for name in compared.networks}

        def on_progress(name: str, done: float, total: float, note: str) -> None:
            bar.update(bars[name], completed=int(done / PASSES), total=int(total / PASSES) or 1, note=note)

        return examine_all(task, compared, workers, on_progress)


def print_plan(console: Console, task: RobustnessTask, compared: ComparedNetworks) -> None:
    """Print the threat model, who is attacked, and what is left out.

    Args:
        console: Where to print.
        task: What is asked for.
        compared: The networks.
    """
    config = task.config
    budget = config.budget()
    images = min(config.images, len(compared.dataset.test))
    given = "images as the attacker made them"
    if config.requantize_input:
        given = "images rounded to 8 bits"
    rows = {
        "images": f"{images:,} of the test split of {compared.dataset.name}",
        "attacker": f"any image in [0, 1] within {config.threat()}; knows weights, bits and quantizers; gradients by "
        f"{config.backward}",
        "networks get": given,
        "attacks": f"{config.attacks}: PGD {budget.steps} steps, {budget.restarts} restarts; APGD {budget.apgd}; Square "
        f"{budget.queries:,} queries; noise {budget.draws} draws; seed {config.seed}",
        **compared.notes,
        **{name: f"left out: {reason}" for name, reason in compared.left_out.items()},
    }
    console.print(key_table(rows.items()))


def print_result(console: Console, record: RobustnessRecord) -> None:
    """Print accuracy under every attack, the checks, and what the deployed networks make of the worst images."""
    print_accuracies(console, record)
    print_checks(console, record.networks)
    for name, network in record.networks.items():
        for check in network.checks:
            if not check.passed:
                say(console, f"{name}: FAIL: {check.name}: {check.figures}", wrap=False)
        say(console, f"{name}: {percent(network.worst, DIGITS)}, {network.verdict}", wrap=False)
    for name, network in record.networks.items():
        if network.deployed is not None:
            say(console, f"{name}, as an integer network{_deployed_words(network)}", wrap=False)


def print_accuracies(console: Console, record: RobustnessRecord) -> None:
    """Print a table of accuracies: a row for each attack, a column for each network."""
    attacks = dict.fromkeys(attack for network in record.networks.values() for attack in network.attacks)
    columns = [Column("attack", ["none", *attacks, "worst case, image by image"])]
    for name, network in record.networks.items():
        cells = [percent(network.clean, DIGITS)]
        cells += [percent(network.attacks.get(attack), DIGITS) for attack in attacks]
        worst = percent(network.worst, DIGITS)
        if network.masked:
            worst = f"<= {worst}"
        columns.append(Column(name, [*cells, worst], "right"))
    title = f"{record.network} on {counted(record.images, 'images')} of {record.data}, {record.threat}"
    print_columns(console, f"Accuracy, measured: {title}", columns, totals=1)


def print_checks(console: Console, networks: dict[str, AttackedRecord]) -> None:
    """Print a table of the checks: a row for each, a column for each network."""
    # What was asked for by name may leave nothing to compare, for all networks or for some.
    names = list(dict.fromkeys(check.name for network in networks.values() for check in network.checks))
    columns = [Column("what should hold", names)]
    for name, network in networks.items():
        held = {check.name: check.passed for check in network.checks}
        columns.append(Column(name, _marks(names, held), "right"))
    print_columns(console, "Signs of masked gradients", columns)


def _marks(names: Sequence[str], held: dict[str, bool]) -> list[str]:
    words = {True: "PASS", False: "FAIL", None: "–"}
    return [words[held.get(name)] for name in names]


def _deployed_words(network: AttackedRecord) -> str:
    deployed = network.deployed
    assert deployed is not None
    if deployed.reason:
        return f": {deployed.reason}"
    return (
        f", on its worst images: {percent(deployed.right / deployed.images, DIGITS)} right, another answer than in PyTorch on "
        f"{deployed.different} of {deployed.images:,}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
