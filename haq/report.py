"""Show runs and sweeps on one web page that is complete in itself.

A folder may be a run's, finished or not, or a sweep's. The page asks for nothing from any network and can be sent as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, option, output_options
from haq.console.output import Output
from haq.console.tables import command_line, say
from haq.console.values import FILE, FOLDER
from haq.reporting import reading
from haq.store import files
from haq.store.files import REPORT
from haq.store.units import describe_bytes
from hw_models.extras import install_line

OURS = b'<meta name="generator" content="haq.report'


@command(
    "report", __doc__, examples=("haq report runs/edge-latency-0.5-ddpg-seed0", "haq report runs/a runs/b --out both.html")
)
@argument("runs", FOLDER, "the folder of a search or of a sweep", several=True)
@option(
    "--out",
    FILE,
    "the page",
    group="Output",
    default_words=f"{REPORT} in the folder; of several, in the folder that they share",
)
@output_options(json=None)
def cli(runs: tuple[Path, ...], out: Path | None) -> int:
    """Read the folders, make the page, write it."""
    check_once(runs)
    out = out or default_file(runs)
    check_free(out)
    sources = [reading.read_folder(run) for run in runs]
    try:
        from haq.reporting import page
    except ImportError as error:
        raise ImportError(f"reports need altair, vl-convert-python and jinja2 ({error}): {install_line('report')}") from error
    content = page.render(sources).encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, content)
    except OSError as error:
        raise ValueError(f"{out} can't be written ({error.strerror}): name a file in another place with --out") from error
    console = Output.open().notes
    unfinished = [str(run) for run, source in zip(runs, sources, strict=True) if not source.finished]
    if unfinished:
        say(console, f"Not finished, shown as far as it is there: {', '.join(unfinished)}", wrap=False)
    say(console, f"Written: {out} ({describe_bytes(len(content))}; open it in any browser)", wrap=False)
    return 0


def default_file(runs: Sequence[Path]) -> Path:
    """Say where the page of some folders goes: into the folder, or the one that all of them are in."""
    if len(runs) == 1:
        return runs[0] / REPORT
    shared = os.path.commonpath([run.resolve().parent for run in runs])
    return Path(os.path.relpath(shared)) / REPORT


def check_once(runs: Sequence[Path]) -> None:
    """Raise ValueError if a folder is given twice."""
    seen: set[Path] = set()
    for run in runs:
        if run.resolve() in seen:
            raise ValueError(f"{run} is given twice; give each folder once")
        seen.add(run.resolve())


def check_free(out: Path) -> None:
    """Raise ValueError if a page would take the place of something else."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the page's file, such as {command_line('--out', out / REPORT)}")
    if out.is_file():
        with out.open("rb") as file:
            if OURS not in file.read(4000):
                raise ValueError(f"{out} is there and is not a report, so it is not overwritten: name another with --out")


main = main_of(cli)

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(None)))
