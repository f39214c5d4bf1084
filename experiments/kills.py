"""Kill runs at random moments, go on with them, and see whether they end as if nothing had happened.

    python -m experiments.kills [--kills N] [--times N] [--jobs NAME ...] [--seed N]
    python -m experiments.kills --kills 0 --worker-kills N [--by processes ray]

Every job is run once without interruption. Then it is started, killed (SIGKILL, to the first process only), started again
with --resume, perhaps killed again, and so on, until it ends; every file it leaves, but for TensorBoard's events, must have
the same bytes: policy, history, sensitivities, agents with their optimizers, fine-tuned and trained networks, results. Moments
are drawn uniformly over the time that the job took, a fifth of them from the start of the process, the others from its first
file on. The network has five small layers and the images are noise, so that a job takes seconds; what is kept is what is kept
of any.

With --worker-kills it is the workers of a search that are killed, one of them at a time, at moments from 0 to 10 s after the
first of them was there (most of that time they start). Nothing goes on with the search: it must end by itself, with the bytes
of one that nothing disturbed.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.console.progress import progress

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
WORKED = f"haq.search {ON} --hw edge --budget 0.6 --solver random --seed 1 --evaluations 80 --finetune-epochs 0 --out run"
WORKERS = {"processes": "--workers 2", "ray": "--workers 2 --ray local"}
LATEST = 10.0  # seconds after the first worker is there, to the last moment at which one is killed
PATIENCE = 300.0  # seconds until a search is taken to hang


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


def prepared(job: Job, place: Path, name: str) -> Path:
    """A folder of its own, with all that the job needs."""
    folder = place / name
    folder.mkdir()
    (folder / "small_job.py").write_text(JOB)
    if job.before:
        finish(job.before, folder)
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


def timed(job: Job, folder: Path) -> tuple[float, float]:
    """Run a job to its end. Returns its seconds until it had begun, and in all."""
    began = time.monotonic()
    process = start(job.command, folder)
    first = 0.0
    while process.poll() is None:
        if not first and (folder / RUN / job.begun).exists():
            first = time.monotonic() - began
        time.sleep(0.01)
    if process.returncode not in (0, 1):
        raise ChildProcessError(f"{job.command} failed: {(folder / 'log').read_text()[-2000:]}")
    return first, time.monotonic() - began


def interrupted(job: Job, folder: Path, kills: int, times: tuple[float, float], draws: random.Random) -> list[float]:
    """Run a job to its end, killing it up to so many times. Returns when it was, in seconds from its starts."""
    when: list[float] = []
    first, whole = times
    while True:
        command = job.command
        if (folder / RUN / job.begun).exists():
            command = job.resume
        process = start(command, folder)
        moment = None
        if len(when) < kills:
            earliest = first
            if draws.random() < EARLY:
                earliest = 0
            moment = draws.uniform(earliest, whole)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert moment is not None
            when.append(moment)
            continue
        # Gone on with after its end, it says so.
        over = process.returncode == EXIT_BAD_INPUT and when and job.ended and (folder / RUN / job.ended).exists()
        if process.returncode not in (0, 1) and not over:
            raise ChildProcessError(f"{job.resume} failed: {(folder / 'log').read_text()[-2000:]}")
        return when


@dataclass
class Tally:
    """What became of one job's kills."""

    moments: list[float] = field(default_factory=list)  # seconds after a start at which it was killed
    endings: int = 0
    same: int = 0  # endings with the bytes of a run that nothing interrupted


def tried(name: str, kills: int, times: int, place: Path, draws: random.Random, say: Callable[[str], None]) -> Tally:
    """Kill a job so many times, and compare how it ends with how it ends by itself.

    Args:
        name: One of `JOBS`.
        kills: How many kills in all.
        times: How many of one run, at most.
        place: An empty folder.
        draws: What moments are drawn from.
        say: Is told every difference.

    Returns:
        What was counted.
    """
    job = JOBS[name]
    whole = prepared(job, place, "whole")
    seconds = timed(job, whole)
    expected = endings(whole, RUN)
    tally = Tally()
    while len(tally.moments) < kills:
        folder = prepared(job, place, f"cut{tally.endings}")
        when = interrupted(job, folder, min(kills - len(tally.moments), times), seconds, draws)
        if when:  # otherwise it ended before it was to be killed
            tally.moments += when
            tally.endings += 1
            found = endings(folder, RUN)
            if found == expected:
                tally.same += 1
            else:
                names = [file for file in {**found, **expected} if found.get(file) != expected.get(file)]
                killed_at = ", ".join(f"{moment:.2f}" for moment in when)
                say(f"{name}: {', '.join(names)} differ after kills at {killed_at} s")
        shutil.rmtree(folder)
    return tally


def is_worker(words: list[str], by: str) -> bool:
    """Whether a command line is of a worker, or of what will be one when it has started."""
    if by == "processes":
        return any("multiprocessing.spawn" in word for word in words)
    # Ray has other processes whose names are like those of workers, or that are told how workers are called.
    if words[0].startswith(("ray::IDLE", "ray::_Evaluator")):
        return True
    is_python = Path(words[0]).name.startswith("python")
    return is_python and any(word.endswith("default_worker.py") for word in words)


def workers_of(pid: int, by: str) -> list[int]:
    """List the workers among the processes that a process has started, and that those have."""
    parents, words = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words[int(path.name)] = (path / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended
    found = []
    for one in words:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and is_worker(words[one], by):
            found.append(one)
    return found


def disturbed(folder: Path, by: str, moment: float, draws: random.Random) -> bool:
    """Search, and kill a worker at a moment. Returns whether there was one then; TimeoutExpired for a search that hangs."""
    process = start(f"{WORKED} {WORKERS[by]}", folder)
    try:
        while process.poll() is None and not workers_of(process.pid, by):
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        killed = False
        if found := workers_of(process.pid, by):
            with suppress(ProcessLookupError):
                os.kill(draws.choice(found), signal.SIGKILL)
                killed = True
        if process.wait(PATIENCE) not in (0, 1):
            raise ChildProcessError(f"{by}, a worker killed at {moment:.2f} s: {(folder / 'log').read_text()[-2000:]}")
        return killed
    finally:
        process.kill()


def disturb(by: str, kills: int, place: Path, draws: random.Random, say: Callable[[str], None]) -> Tally:
    """Kill a worker of each of so many searches, and compare how they end with how one ends by itself.

    Args:
        by: Who works, one of `WORKERS`.
        kills: How many searches.
        place: An empty folder.
        draws: What moments are drawn from.
        say: Is told how every search ended.

    Returns:
        What was counted.
    """
    job = Job(WORKED, RESUMED, "config.yaml")
    whole = prepared(job, place, "whole")
    finish(WORKED, whole)
    expected = endings(whole, RUN)
    tally = Tally()
    while len(tally.moments) < kills:
        folder = prepared(job, place, f"cut{len(tally.moments)}")
        moment = draws.uniform(0, LATEST)
        try:
            if disturbed(folder, by, moment, draws):  # otherwise it had ended before
                tally.moments.append(moment)
                tally.endings += 1
                same = endings(folder, RUN) == expected
                tally.same += same
                verdict = "the same bytes"
                if not same:
                    verdict = "OTHER BYTES"
                say(f"{by}: a worker was killed at {moment:.2f} s: ended, {verdict}")
        except (subprocess.TimeoutExpired, ChildProcessError) as error:
            tally.moments.append(moment)
            say(f"{by}: a worker was killed at {moment:.2f} s: {error}")
        shutil.rmtree(folder)
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--times", type=int, default=1, help="kills of each run, at most (default: 1)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker-kills", type=int, default=0, help="searches of each kind of which a worker is killed")
    parser.add_argument("--by", nargs="+", choices=list(WORKERS), default=list(WORKERS), help="whose workers are killed")
    options = parser.parse_args(arguments)
    console = Console()
    draws = random.Random(options.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    table = Table(title="Killed, gone on with, and compared", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("job", "killed after (s)"):
        table.add_column(heading)
    for heading in ("kills", "endings", "the same to the last bit"):
        table.add_column(heading, justify="right")
    share, rest = divmod(options.kills, len(options.jobs))
    jobs, workers = options.jobs, options.by
    if not options.kills:
        jobs = []
    if not options.worker_kills:
        workers = []
    tallies = []
    hung = 0
    with tempfile.TemporaryDirectory() as temporary, progress(console) as bar:
        bar_task = bar.add_task("kills", total=options.kills, note="")
        for number, name in enumerate(jobs):
            place = Path(temporary) / f"job{number}"
            place.mkdir()
            kills = share + (number < rest)
            tally = tried(name, kills, options.times, place, draws, console.print)
            bar.update(bar_task, advance=kills, note=name)
            moments = ", ".join(f"{moment:.1f}" for moment in tally.moments)
            table.add_row(name, moments, str(len(tally.moments)), str(tally.endings), str(tally.same))
            tallies.append(tally)
        for by in workers:
            place = Path(temporary) / by
            place.mkdir()
            tally = disturb(by, options.worker_kills, place, draws, console.print)
            moments = ", ".join(f"{moment:.1f}" for moment in tally.moments)
            table.add_row(f"workers: {by}", moments, str(len(tally.moments)), str(tally.endings), str(tally.same))
            tallies.append(tally)
            hung += len(tally.moments) - tally.endings
    console.print(table)
    total = sum(len(tally.moments) for tally in tallies)
    ended = sum(tally.endings for tally in tallies)
    same = sum(tally.same for tally in tallies)
    console.print(f"{total} kills, {ended} endings, {same} of them the same to the last bit as without a kill")
    if hung:
        console.print(f"{hung} searches did not end by themselves")
    return int(same != ended or hung > 0)


if __name__ == "__main__":
    sys.exit(run_command(main))
