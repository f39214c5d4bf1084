"""Show runs and sweeps on one web page that is complete in itself:  python -m haq.report RUN [RUN ...]

A folder may be a run's, finished or not, or a sweep's. The page asks for nothing from any network and can be sent as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from haq.console import cli
from haq.reporting import reading
from haq.store import files
from haq.store.files import REPORT

OURS = b'<meta name="generator" content="haq.report'


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m haq.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a search or of a sweep")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {REPORT} in the folder; of several, in the folder that they share)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    check_once(options.runs)
    out = options.out or default_file(options.runs)
    check_free(out)
    sources = [reading.read_folder(run) for run in options.runs]
    try:
        from haq.reporting import page
    except ImportError as error:
        raise ImportError(f"reports need altair, vl-convert-python and jinja2 ({error}): pip install 'haq[report]'") from error
    text = page.render(sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, text)
    unfinished = [str(run) for run, source in zip(options.runs, sources, strict=True) if not source.finished]
    if unfinished:
        print(f"Not finished, shown as far as it is there: {', '.join(unfinished)}")
    print(f"Written: {out} ({len(text.encode()) / 1e6:.2f} MB; open it in any browser)")
    return 0


def default_file(runs: list[Path]) -> Path:
    """Where the page of some folders goes: into the folder, or the one that all of them are in."""
    if len(runs) == 1:
        return runs[0] / REPORT
    return Path(os.path.relpath(os.path.commonpath([run.resolve().parent for run in runs]))) / REPORT


def check_once(runs: list[Path]) -> None:
    """Raise ValueError if a folder is given twice."""
    seen: set[Path] = set()
    for run in runs:
        if run.resolve() in seen:
            raise ValueError(f"{run} is given twice; give each folder once")
        seen.add(run.resolve())


def check_free(out: Path) -> None:
    """Raise ValueError if a page would take the place of something else."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the page's file, such as --out {out / REPORT}")
    if out.is_file():
        with out.open("rb") as file:
            if OURS not in file.read(4000):
                raise ValueError(f"{out} is there and is not a report, so it is not overwritten: name another with --out")


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
