"""Kill runs at random moments, go on with them, and see whether they end as if nothing had happened.

    python -m experiments.kills [--kills N] [--times N] [--jobs NAME ...] [--seed N]

Every job is run once without interruption. Then it is started, killed (SIGKILL, to the first process only), started again
with --resume, perhaps killed again, and so on, until it ends; every file it leaves, but for TensorBoard's events, must have
the same bytes: policy, history, sensitivities, agents with their optimizers, fine-tuned and trained networks, results. Moments
are drawn uniformly over the time that the job took, a fifth of them from the start of the process, the others from its first
file on. The network has five small layers and the images are noise, so that a job takes seconds; what is kept is what is kept
of any.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from haq.console import cli

NAME = "kills"
RUN = Path("run")
ROOT = Path(__file__).parents[1]
EARLY = 0.2  # share of kills that may hit the start of the process
JOB = """
import torch
from torch import nn
from haq.networks import Network

def network():
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    module = nn.Sequential(*parts, nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 4))
    for parameter in module.parameters():
        parameter.data *= 2.5 if parameter.dim() > 1 else 1
    return Network("small", module.eval(), (1, 8, 8))

def splits():
    made, module = {}, network().module
    for seed, name in enumerate(("train", "search", "test")):
        x = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = module(x).argmax(1)
        y[:4] = torch.arange(4)
        made[name] = x, y
    return made
"""
ON = "--network small_job:network --data small_job:splits"
SEARCH = f"haq.search {ON} --hw edge --budget 0.6 --evaluations 45 --finetune-epochs 2 --out run"
TRAIN = f"haq.train {ON} --epochs 12 --batch-size 16 --out run/network.safetensors"
RESUMED = "haq.search --resume run"


@dataclass(frozen=True)
class Job:
    """A command, the one that goes on with it, and the file that tells that it has begun to keep something."""

    command: str
    resume: str
    begun: str
    ended: str = ""  # the file that tells that there is nothing to go on with
    before: str = ""  # what must have been done


JOBS = {
    **{
        name: Job(f"{SEARCH} --solver {name} --seed 1", RESUMED, "config.yaml", "result.json")
        for name in ("ddpg", "td3", "sac", "ilp", "greedy", "evolution", "random")
    },
    **{
        name: Job(f"{SEARCH} {more}", f"{RESUMED} {resumed}", "config.yaml", "result.json")
        for name, more, resumed in (
            ("exhaustive", "--solver exhaustive --bits 6:7 --budget 0.95 --evaluations 300", ""),
            ("ddpg as in HAQ", "--env haq", ""),
            ("ddpg, 2 workers", "--workers 2 --ahead 3", "--workers 2"),
            ("tuning in the loop", "--finetune-steps 3 --solver evolution", ""),
        )
    },
    "fine-tuning": Job(
        "haq.finetune run --epochs 12",
        "haq.finetune run --epochs 12 --resume",
        "checkpoint/finetune.state",
        before=f"{SEARCH} --solver greedy --finetune-epochs 0",
    ),
    **{
        name: Job(f"{TRAIN}{more}", f"{TRAIN}{more} --resume", "network.state", "network.safetensors")
        for name, more in (("training", ""), ("training, LSQ", " --scheme lsq --optimizer adam"))
    },
}


def start(command: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", *command.split()], cwd=folder, stdout=log, stderr=log)


def finish(command: str, folder: Path) -> None:
    if start(command, folder).wait() not in (0, 1):  # 1: the policy is not within the budget
        raise ChildProcessError(f"{command} failed: {(folder / 'log').read_text()[-2000:]}")


def prepared(task: Job, place: Path, name: str) -> Path:
    """A folder of its own, with all that the job needs."""
    folder = place / name
    folder.mkdir()
    (folder / "small_job.py").write_text(JOB)
    if task.before:
        finish(task.before, folder)
    return folder


def endings(folder: Path, run: Path) -> dict[str, bytes]:
    """What a job leaves in a run."""
    paths = (path for path in sorted((folder / run).rglob("*")) if path.is_file())
    aside = ("events.", ".lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if not path.name.startswith(aside) and path.suffix not in (".part", ".lock")
    }


def timed(task: Job, folder: Path) -> tuple[float, float]:
    """Run a job to its end. Returns its seconds until it had begun, and in all."""
    began, process, first = time.monotonic(), start(task.command, folder), 0.0
    while process.poll() is None:
        if not first and (folder / RUN / task.begun).exists():
            first = time.monotonic() - began
        time.sleep(0.01)
    if process.returncode not in (0, 1):
        raise ChildProcessError(f"{task.command} failed: {(folder / 'log').read_text()[-2000:]}")
    return first, time.monotonic() - began


def interrupted(task: Job, folder: Path, kills: int, times: tuple[float, float], draws: random.Random) -> list[float]:
    """Run a job to its end, killing it up to so many times. Returns when it was, in seconds from its starts."""
    when: list[float] = []
    first, whole = times
    while True:
        process = start(task.resume if (folder / RUN / task.begun).exists() else task.command, folder)
        moment = None
        if len(when) < kills:
            moment = draws.uniform(0 if draws.random() < EARLY else first, whole)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert moment is not None
            when.append(moment)
            continue
        # Gone on with after its end, it says so.
        over = process.returncode == cli.EXIT_BAD_INPUT and when and task.ended and (folder / RUN / task.ended).exists()
        if process.returncode not in (0, 1) and not over:
            raise ChildProcessError(f"{task.resume} failed: {(folder / 'log').read_text()[-2000:]}")
        return when


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--times", type=int, default=1, help="kills of each run, at most (default: 1)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console, draws = Console(), random.Random(options.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    table = Table(title="Killed, gone on with, and compared", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("job", "killed after (s)", "kills", "endings", "the same to the last bit"):
        table.add_column(heading, justify="left" if heading in ("job", "killed after (s)") else "right")
    share, rest = divmod(options.kills, len(options.tasks))
    total = same_total = ended = 0
    with tempfile.TemporaryDirectory() as temporary, cli.progress(console) as bar:
        bar_task = bar.add_task("kills", total=options.kills, note="")
        for number, name in enumerate(options.tasks):
            task, place = JOBS[name], Path(temporary) / f"job{number}"
            place.mkdir()
            whole = prepared(task, place, "whole")
            times, expected = timed(task, whole), endings(whole, RUN)
            left, moments, endings_, same = share + (number < rest), list[float](), 0, 0
            while left:
                folder = prepared(task, place, f"cut{endings_}")
                when = interrupted(task, folder, min(left, options.times), times, draws)
                left -= len(when)
                if not when:  # it ended before it was to be killed
                    shutil.rmtree(folder)
                    continue
                moments += when
                killed_at = ", ".join(f"{moment:.2f}" for moment in when)
                found = endings(folder, RUN)
                endings_ += 1
                if found == expected:
                    same += 1
                else:
                    names = [file for file in {**found, **expected} if found.get(file) != expected.get(file)]
                    console.print(f"{name}: {', '.join(names)} differ after kills at {killed_at} s")
                bar.update(bar_task, advance=len(when), note=name)
                shutil.rmtree(folder)
            table.add_row(name, ", ".join(f"{moment:.1f}" for moment in moments), str(len(moments)), str(endings_), str(same))
            total, same_total, ended = total + len(moments), same_total + same, ended + endings_
    console.print(table)
    console.print(f"{total} kills, {ended} endings, {same_total} of them the same to the last bit as without a kill")
    return 0 if same_total == ended else 1


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
