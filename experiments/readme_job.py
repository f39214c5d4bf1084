"""What the README shows: runs its first command as it stands, and keeps the table that it prints and the picture it draws.

    python -m experiments.readme_job [--out FOLDER]

`docs/main_job.txt` is the table of results, and a line that says how long the command took, on which machine and with which
versions; `docs/policy.png` is the picture. The README shows both as they are. The command runs in an empty folder, 80
characters wide, on as many cores as there are: nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from haq.console.errors import run_command
from haq.console.tables import say
from haq.store import files
from haq.version import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs"
TABLE = "main_job.txt"
PICTURE = "policy.png"
MARK = "<!-- main -->"  # in the README, before the block of its first command
WIDTH = 80  # characters


def first_command(readme: str) -> list[str]:
    """Return the words of the search that the README begins with: what follows the installation.

    Raises ValueError if there is none.
    """
    _, _, after = readme.partition(MARK)
    lines = after.split("```")
    if len(lines) < 2:
        raise ValueError(f"the README has no block of commands after {MARK}")
    _, _, commands = lines[1].partition("\n")
    words = shlex.split(commands.strip().split("&&")[-1])
    if words[:1] != ["python"]:
        raise ValueError(f"the README's first job is {' '.join(words)!r}; it must begin with python")
    return words


def table_of(printed: str) -> str:
    """Return the table of results in what a search printed. Raises ValueError if there is none."""
    lines = [line.rstrip() for line in printed.splitlines()]
    heads = [place for place, line in enumerate(lines) if line.split()[:1] == ["policy"]]
    if not heads:
        raise ValueError("the search printed no table of policies")
    first = last = heads[0]
    while first and lines[first - 1]:
        first -= 1
    while last < len(lines) and lines[last]:
        last += 1
    return "\n".join(lines[first:last])


def processor() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def made_with(seconds: float) -> str:
    """Say how long the command took, on what and with what."""
    versions = f"haq {__version__}, torch {version('torch')}, Python {platform.python_version()}"
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{seconds:.0f} s on {cores()} cores of {processor()}, {today}\n({versions})"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.readme_job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for both files (default: docs)")
    options = parser.parse_args(arguments)
    words = first_command((ROOT / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        # This tree's own program, whatever is installed.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH)}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}")
        pictures = sorted(Path(folder).rglob(PICTURE))
        if not pictures:
            raise RuntimeError(f"{shlex.join(words)} drew no {PICTURE}")
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pictures[0], options.out / PICTURE)
    files.write(options.out / TABLE, f"{table_of(done.stdout)}\n\n{made_with(seconds)}\n")
    say(Console(), f"written: {options.out / TABLE} and {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
