"""The default job, `haq search --hw edge`, with today's solvers and with those of an earlier commit, in the same run.

    OMP_NUM_THREADS=1 python -m experiments.default_job [--before COMMIT] [--evaluations N] [--seeds N] [--quick] [--anew]
                                                        [--out FOLDER]

Both programs are started as commands, the earlier one from a working tree of its commit that is made beside and removed in the
end (`git worktree`), with the same data, budget, seed and number of evaluations, and without fine-tuning. Seconds are the
processor's, of a whole command less those of a command that evaluates one policy: loading, calibration and reports are in
both. The rivals that a search is compared with, greedy and ilp, are in both as well.

Every finished command is a row of default_job.csv, which a call goes on with; --anew forgets them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from experiments import shared
from experiments.quantizer_accuracy import Table
from haq.console.errors import run_command
from haq.console.tables import say
from haq.store import files

NAME = "default_job"
FOLDER = Path("docs/experiments")
ROOT = Path(__file__).resolve().parents[1]
BEFORE = "fc958ae"  # before searches learned from a surrogate
NOW = "now"
LEAST = 92.5  # percent of the search split
RATIO = 0.5  # of the time before, at most
HELD = ("ddpg", "surrogate")
OLD = "ddpg"
START = "start"  # a command that evaluates one policy


class Row(NamedTuple):
    """One command."""

    code: str  # "now", or a commit
    solver: str
    seed: int
    evaluations: int
    search: float  # accuracy of the policy that is returned, percent
    test: float
    rival: float  # test accuracy of the best of the rivals on the search split
    seconds: float  # of the processor

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What was asked for."""
        return self.code, self.solver, self.seed, self.evaluations


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Make a working tree of a commit, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], check=True, capture_output=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def one_command(tree: Path, code: str, solver: str, seed: int, evaluations: int, more: Sequence[str]) -> Row:
    """Run a search as a command, and read what it wrote."""
    asked = [solver, str(evaluations)]
    if solver == START:
        asked = ["random", "1"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "haq.search", "--hw", "edge", "--solver", asked[0], "--evaluations", asked[1]]
        command += ["--seed", str(seed), "--finetune-epochs", "0", "--out", "run", *more]
        # An editable install would be found otherwise, whatever the folder.
        environment = os.environ | {"PYTHONPATH": str(tree)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {tree} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads((Path(folder) / "run" / "result.json").read_text(encoding="utf-8"))
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rivals = list(result.get("rivals", {}).values())
    rival = max(rivals, key=lambda one: one["search_accuracy"], default={"test_accuracy": 0.0})
    found = result["found"]
    return Row(
        code,
        solver,
        seed,
        evaluations,
        100 * found["search_accuracy"],
        100 * found["test_accuracy"],
        100 * rival["test_accuracy"],
        seconds,
    )


def mean(rows: Sequence[Row], code: str, solver: str, field: str) -> float:
    """Return the mean over seeds."""
    return statistics.mean(getattr(row, field) for row in rows if (row.code, row.solver) == (code, solver))


def searching(rows: Sequence[Row], code: str, solver: str) -> float:
    """Return the seconds of a search alone, mean over seeds."""
    return mean(rows, code, solver, "seconds") - mean(rows, code, START, "seconds")


def bars(rows: Sequence[Row], before: str) -> Iterator[str]:
    """Hold what was found, and how long it took, against what it may."""
    for solver in HELD:
        found, test, rival = (mean(rows, NOW, solver, field) for field in ("search", "test", "rival"))
        yield said(LEAST - found, f"{solver} finds at least {LEAST} % on the search split ({found:.2f} %)")
        yield said(
            rival - test, f"{solver} is not below the best rival on the test split ({test:.2f} % against {rival:.2f} %)"
        )
        own, old = searching(rows, NOW, solver), searching(rows, before, OLD)
        ratio = own / old
        figures = f"{own:.0f} s against {old:.0f} s: {ratio:.2f}"
        claim = f"{solver} searches in at most {RATIO} of the time that {OLD} took at {before} ({figures})"
        yield said(ratio - RATIO, claim)


def said(short: float, claim: str) -> str:
    if short > 0:
        return f"FALLS SHORT by {short:.2f}: {claim}"
    return f"holds: {claim}"


def table(rows: Sequence[Row]) -> Table:
    columns = ("code", "solver", "seeds", "search, %", "test, %", "best rival, test", "seconds", "of the search")
    made: list[tuple[str, ...]] = []
    for code, solver in dict.fromkeys((row.code, row.solver) for row in rows if row.solver != START):
        cells = [f"{mean(rows, code, solver, field):.2f}" for field in ("search", "test", "rival")]
        seconds = [f"{mean(rows, code, solver, 'seconds'):.0f}", f"{searching(rows, code, solver):.0f}"]
        seeds = sum((row.code, row.solver) == (code, solver) for row in rows)
        made.append((code, solver, str(seeds), *cells, *seconds))
    return Table("`haq search --hw edge` without fine-tuning, mean over seeds", columns, made)


def load_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    made = []
    for line in lines:
        numbers = [float(line[name]) for name in ("search", "test", "rival", "seconds")]
        made.append(Row(line["code"], line["solver"], int(line["seed"]), int(line["evaluations"]), *numbers))
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only see that it runs: 14 evaluations; saves nothing")
    parser.add_argument("--anew", action="store_true", help="forget the commands that were run")
    parser.add_argument("--out", type=Path, help=f"folder for page and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    seeds, evaluations = options.seeds, options.evaluations
    if options.quick:
        seeds, evaluations = 1, 14
    rows: list[Row] = []
    path = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{NAME}.csv"
        if not options.anew:
            rows = load_rows(path)
    # In turn, so that a machine that becomes slower is so for both.
    asked = [
        (code, solver, seed, evaluations)
        for seed in range(seeds)
        for code, solver in ((NOW, START), (options.before, START), *[(NOW, one) for one in HELD], (options.before, OLD))
    ]
    with checked_out(options.before) as tree:
        for code, solver, seed, count in asked:
            if (code, solver, seed, count) in [row.key for row in rows]:
                continue
            place = tree
            if code == NOW:
                place = ROOT
            rows.append(one_command(place, code, solver, seed, count, ()))
            say(console, f"{code}, {solver}, seed {seed}: {rows[-1].search:.2f} % in {rows[-1].seconds:.0f} s")
            if path is not None:
                lines = [Row._fields, *[shared.rounded(row) for row in rows]]
                files.write(path, "".join(",".join(map(str, line)) + "\n" for line in lines))
    shown = [row for row in rows if row.key in asked]
    made = list(bars(shown, options.before))
    console.print(table(shown).rich())
    for line in made:
        console.print(line, markup=False, highlight=False)
    if out is not None:
        command = " ".join([f"OMP_NUM_THREADS=1 python -m experiments.{NAME}", *sys.argv[1:]])
        parts = [
            "# The default job, now and before",
            f"Made by `experiments/{NAME}.py`, which says what is compared and how; every command is in `{NAME}.csv`.",
            f"    {command}",
            "\n".join(f"* {line}" for line in made),
            table(shown).markdown(),
        ]
        files.write(out / f"{NAME}.md", "\n\n".join(parts) + "\n")
        say(console, f"written: {out / NAME}.md and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
