"""Measure how far solvers stay from the best policy, on problems of which every policy is known.

No network is needed. The tables that ship with the package are searched, or others: .npz files as haq/problem/table_file.py
describes them. How to add a solver, and measure it, is in docs/how_to/solver.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import argument, option, options_of, output_options, part_of, trust_option
from haq.console.output import Output
from haq.console.progress import progress
from haq.console.tables import print_columns, say
from haq.console.values import FILE, TEXT, TextType
from haq.solvers import SOLVERS
from haq.study.config import BENCH, BenchConfig, WorkersConfig

WIDTH = 150  # of lines of results that go to a file or a pipe


@command(
    "bench",
    __doc__,
    examples=(
        "haq bench --solver evolution --solver random",
        "haq bench --solver mysolver:Mine --tables deep,mine.npz --seeds 5",
        "haq bench --solver ddpg --evaluations 50,100 --workers 4 --out ddpg.json",
    ),
)
@argument("table", TEXT, "tables, as --tables takes them", several=True, required=False)
@option(
    "--solver",
    TextType(lambda: SOLVERS.names()),
    "a name as `haq list solvers` shows them, or module:Name; may be given several times",
    group=BENCH,
    metavar="NAME",
    default_words="none: give at least one",
    multiple=True,
)
@option(
    "--tables",
    TEXT,
    "names of tables that ship with the package, or .npz files; may be given several times",
    group=BENCH,
    metavar="NAME|PATH",
    default_words="all that ship with the package",
    multiple=True,
)
@options_of(BenchConfig, only=("seeds", "evaluations"))
@options_of(WorkersConfig, only=("workers",))
@option("--out", FILE, "write the results as JSON into a new file", group="Output", metavar="FILE")
@trust_option()
@output_options()
def cli(
    table: tuple[str, ...],
    solver: tuple[str, ...],
    tables: tuple[str, ...],
    given: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure solvers."""
    config = BenchConfig(solver=solver, tables=(*tables, *table), **part_of(given, BenchConfig))
    if out is not None and out.exists():
        raise ValueError(f"{out} exists and is not overwritten: name another file")
    return run_bench(config, WorkersConfig(**part_of(given, WorkersConfig)).workers, Output.open(as_json, WIDTH), out)


main = main_of(cli)


def run_bench(config: BenchConfig, workers: int | None, output: Output, out: Path | None = None) -> int:
    """Search every table with every solver, and print how far from the best they stayed.

    Args:
        config: What is asked for.
        workers: Processes that search; None for this one.
        output: Where to print.
        out: A file for the results.

    Returns:
        The exit status.
    """
    from haq.problem.table_file import shipped
    from haq.store.files import write
    from haq.study.bench import Bench, Searched, caption, columns, load

    bench = Bench(load(config.tables or shipped()), config.solver, config.seeds, config.evaluations)
    say(output.notes, f"{len(bench.places)} problems: {', '.join(place.words for place in bench.places)}")
    status = 0
    try:
        with progress(output.notes) as bar:
            line = bar.add_task("evaluations", total=bench.most_evaluations(), note="")
            firsts = set(bench.first_searches())

            def on_search(searched: Searched) -> None:
                asked = searched.asked
                note = f"{asked.place.words}, {asked.solver}, seed {asked.seed}"
                bar.update(line, advance=asked.evaluations, note=note)
                firsts.discard(asked)
                if not firsts and asked.seed == 0:
                    # Now it is known which of the others are needed.
                    done = sum(one.evaluations for one in bench.first_searches())
                    others = sum(one.evaluations for one in bench.other_searches())
                    bar.update(line, completed=done, total=done + others)

            bench.run(workers, on_search)
    except KeyboardInterrupt:
        say(output.results, "\nInterrupted: what follows is of the problems whose searches are done.")
        status = EXIT_INTERRUPTED
    found = bench.to_dict()
    if bench.rows():
        sections = range(len(bench.solvers), len(bench.rows()), len(bench.solvers))
        totals = 0
        if len(bench.places) > 1:
            totals = len(bench.solvers)
        print_columns(output.results, "Regret", columns(bench), keys=2, totals=totals, sections=sections)
        for sentence in caption(bench):
            say(output.results, sentence)
    if out is not None:
        write(out, json.dumps(found, indent=2) + "\n")
        say(output.notes, f"Written: {out}", wrap=False)
    output.print_json(found)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
