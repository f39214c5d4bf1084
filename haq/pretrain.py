"""Train an agent on many problems, so that a search can start from what it knows.

It plays enumerated problems, within random budgets and on random hardware, and problems that are made up; no network is
needed. What comes out is a file for --agent of haq search and haq sweep. The same options give the same file; a run that is
interrupted is begun again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import option, options_of, output_options
from haq.console.output import Output
from haq.console.progress import progress
from haq.console.tables import new_table, plain, say, say_next
from haq.console.values import FILE, TEXT
from haq.store.units import describe_bytes
from haq.study.config import AGENT_TRAINING, PretrainConfig

if TYPE_CHECKING:
    from haq.problem.synthetic import Drawn
    from haq.solvers.pretraining import Pretrained

MADE_UP = "synthetic:64"


@command(
    "pretrain",
    __doc__,
    examples=(
        "haq pretrain --out agent.safetensors",
        "haq pretrain --on plain,low,separable,synthetic:100 --solver td3 --episodes 60000 --seed 1",
        "haq search --hw edge --agent ddpg-agent.safetensors",
    ),
)
@option(
    "--on",
    TEXT,
    "what to train on, parted by commas: names of tables that ship with the package, .npz files, and synthetic:N for N "
    "problems that are made up; may be given several times",
    group=AGENT_TRAINING,
    metavar="PROBLEMS",
    default_words=f"all tables that ship with the package, {MADE_UP}",
    multiple=True,
)
@options_of(PretrainConfig)
@option("--out", FILE, "the file to write", group=AGENT_TRAINING, default_words="SOLVER-agent.safetensors here")
@output_options()
def cli(on: tuple[str, ...], given: dict[str, Any], out: Path | None, as_json: bool) -> int:
    """Train an agent."""
    config = PretrainConfig(**given)
    words = [word.strip() for part in on for word in part.split(",")]
    return run_pretraining(words, config, out or Path(f"{config.solver}-agent.safetensors"), Output.open(as_json))


main = main_of(cli)


def run_pretraining(words: Sequence[str], config: PretrainConfig, out: Path, output: Output) -> int:
    """Train an agent, write it and print how well it does.

    Args:
        words: What to train on; none: all that ships, and made-up problems.
        config: How.
        out: The file to write, which isn't there yet.
        output: Where to print.

    Returns:
        The exit status.

    Raises:
        ValueError: For a file that is there already or can't be one, and for what is no problem to train on.
    """
    from haq.problem.table_file import shipped
    from haq.solvers.agent_file import check_ending
    from haq.solvers.pretraining import pretrain, read_problems

    check_ending(out)
    if out.exists():
        raise ValueError(f"{out} is there already and is not overwritten: name another file with --out")
    words = list(words) or [*shipped(), MADE_UP]
    try:
        with output.notes.status("drawing problems, pricing them"):
            problems = read_problems(words, config.seed)
        _print_plan(output, problems, config, out)
        with progress(output.notes) as bar:
            line = bar.add_task(config.solver, total=config.episodes, note="")

            def on_progress(episodes: int, gained: float) -> None:
                bar.update(line, completed=min(episodes, config.episodes), note=f"best so far {gained:+.3f} over the plan")

            made = pretrain(problems, config.solver, episodes=config.episodes, seed=config.seed, on_progress=on_progress)
    except KeyboardInterrupt:
        say(output.results, "\nInterrupted: nothing was written; the same command begins again and gives the same agent.")
        return EXIT_INTERRUPTED
    made.agent.write(out)
    _print_result(output, made, out)
    return 0


def _print_plan(output: Output, problems: dict[str, list[Drawn]], config: PretrainConfig, out: Path) -> None:
    counts = ", ".join(f"{len(drawn)} of {word}" for word, drawn in problems.items())
    every = [one for drawn in problems.values() for one in drawn]
    decisions = sorted(sum(len(decision.pairs) > 1 for decision in one.decisions) for one in every)
    targets = {one.name.rpartition(" on ")[2] for one in every}
    say(
        output.notes,
        f"{config.solver} on {len(every)} problems ({counts}), {decisions[0]} to {decisions[-1]} decisions, "
        f"{len(targets)} targets; {config.episodes:,} episodes, seed {config.seed}; into {out}",
    )


def _print_result(output: Output, made: Pretrained, out: Path) -> None:
    table = new_table("Accuracy without any evaluation, beside the plan for the calibration errors")
    table.add_column("problems")
    for heading in ("", "number", "better", "worse", "mean difference, points"):
        table.add_column(heading, justify="right")
    for row in made.rows:
        kind = "trained on"
        if row.held_back:
            kind = "held back"
        counts = [str(count) for count in (row.problems, row.better, row.worse)]
        table.add_row(plain(row.word), kind, *counts, f"{row.gained:+.2f}")
    output.results.print(table)
    if made.kept_at:
        say(output.results, f"Kept as it was after {made.kept_at:,} episodes, when it did best on the problems held back.")
    else:
        say(
            output.results,
            "On the problems held back it was never better than the plan: kept as it was in the beginning, playing the plan.",
        )
    say(output.notes, f"Written: {out}, {describe_bytes(out.stat().st_size)}", wrap=False)
    say_next(output.notes, "haq", "search", "--solver", made.agent.record.kind, "--agent", out)
    output.print_json(
        {
            "file": str(out),
            "agent": made.agent.record.to_dict(),
            "kept_at": made.kept_at,
            "problems": [row._asdict() for row in made.rows],
        }
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
