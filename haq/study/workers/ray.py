"""Workers on a Ray cluster: evaluations of a search, or the searches of a sweep, on every processor there is.

Workers are actors that are given network and data once. Each machine gets these once, whatever its number of workers. A worker
that is lost, or a machine, costs what it was at: that is given to another. A machine that joins is used from then on. Only the
first process writes files; what workers find streams to it.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import quantizers as Q
from haq.problem.device import CPU, find_device
from haq.problem.evaluator import Asked, Evaluator, Judged
from haq.store import files as store_files
from haq.study.search_run import HISTORY
from haq.study.task import versions
from haq.study.workers import moving
from hw_models.extras import install_line

logger = logging.getLogger("haq")
GROWTH = 2.0  # seconds between two looks at whether the cluster is there, and has become larger
FULL = 60.0  # seconds without a worker after which it is told that there is none
GET_S = 60.0  # seconds in which what a worker has found comes here
ASK_S = 20.0  # seconds in which a head answers
# Where Ray has none of these names, and where there is no address, `ray.init` says what is wrong.
ASK = """
import sys
try:
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient
    address = canonicalize_bootstrap_address(sys.argv[1])
except Exception:
    sys.exit(0)
if address is not None:
    GcsClient(address=address)
"""
PATIENCE = 10  # times in a row that workers may be lost before anything is done


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a Ray cluster.

    Args:
        address: `auto` (the one that this machine is a node of), HOST:PORT, or `local` (one on this machine, for the while).

    Raises:
        ImportError: Without Ray.
        ValueError: For an address of another form.
        ConnectionError: If there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--ray needs Ray: {install_line('ray')}") from error
    remedy = "give auto on a machine of the cluster, HOST:PORT of its head, or local"
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or "/" in address:
            raise ValueError(f"--ray is {address!r}: {remedy}")
        if not _answers(host, int(port)):
            raise ConnectionError(f"no Ray head answers at {address}: start one (ray start --head), or {remedy}")
    if address != "local" and not _is_head(address):
        raise ConnectionError(f"what answers at {address} is no Ray head, or one of another version: {remedy}")
    # A cluster that is made here would wait for ever if one of its first workers were killed while it starts.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"no Ray cluster at {address!r} ({reason[:200]}): {remedy}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def working(evaluator: Evaluator, address: str, most: int | None, device: str = CPU) -> Iterator[None]:
    """Let an evaluator's policies be evaluated on a Ray cluster, by at most so many workers if there is a number.

    Args:
        evaluator: Whose policies.
        address: Of the cluster.
        most: How many workers; None is as many as it has processors, or GPUs if networks are run on these.
        device: The kind of what networks are run on.
    """
    with connected(address):
        evaluator.pool = Evaluations(evaluator, most, device)
        try:
            yield
        finally:
            evaluator.pool = None


class Crew:
    """Workers of one kind, one for each processor (or GPU) of the cluster but at most `most`, and the tasks that they share.

    A task is a key; `arguments` tells, when it is given to a worker, what comes with it. What a worker yields comes back by
    `wait`. `kind` is a class with the methods `ready(given, threads, device) -> versions` and
    `work(key, *arguments) -> iterator`.
    """

    def __init__(
        self,
        kind: type,
        given: object,
        threads: int,
        most: int | None,
        depth: int,
        arguments: Callable[[Any], tuple[Any, ...]] = lambda key: (),
        device: str = CPU,
    ) -> None:
        """Start workers.

        Args:
            kind: Their class.
            given: What each is given once; it is pickled.
            threads: Of each.
            most: How many there may be; None for no limit.
            depth: How many tasks a worker is given at a time.
            arguments: What comes with a task's key.
            device: The kind of what networks are run on; of anything but the CPU every worker has one to itself.
        """
        import ray

        self._ray = ray
        self._kind = kind
        self._most = most
        self._depth = depth
        self._arguments = arguments
        self._given = ray.put(moving.dumps(given))
        self._threads = threads
        self._device = device
        self._address = ray.get_runtime_context().gcs_address
        self._queue: deque[Any] = deque()
        self._starting: dict[Any, Any] = {}  # what tells that a worker is ready -> the worker
        self._load: dict[Any, int] = {}  # workers that are ready -> tasks that they have
        self._running: dict[Any, tuple[Any, Any]] = {}  # what a task yields -> its key and worker
        self._refused: list[Any] = []  # workers on machines with other versions; they keep their places
        self._looked = -GROWTH
        self._losses = 0
        self._notice = time.monotonic() + FULL

    @property
    def workers(self) -> int:
        """Count the workers that are ready."""
        return len(self._load)

    def submit(self, key: Any) -> None:
        """Give the workers another task."""
        self._queue.append(key)
        self._dispatch()

    def wait(self) -> Iterator[tuple[Any, Any, bool]]:
        """Wait for some of what workers yield: keys and what there is of them, and at last a key, None, and True.

        Raises ConnectionError if the head is gone, ChildProcessError if workers are lost again and again, ValueError if every
        machine has other versions, and whatever a task raises.
        """
        self._grow()
        self._dispatch()
        if not self._load and time.monotonic() > self._notice:
            logger.warning("no processor of the Ray cluster is free yet: waiting for one")
            self._notice = math.inf
        waiting = [*self._starting, *self._running]
        if not waiting:
            time.sleep(0.1)
            return
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=GROWTH)
        for reference in done:
            try:
                if reference in self._starting:
                    self._welcome(reference)
                else:
                    yield self._next(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                # Its process or its machine is gone, wherever in its life that was.
                self._lose(reference, error)

    def _grow(self) -> None:
        """Start workers on processors that have none; sometimes."""
        if time.monotonic() - self._looked < GROWTH:
            return
        host, _, port = self._address.rpartition(":")
        # Ray itself would wait for a minute, and then end this process.
        if not _answers(host, int(port)):
            raise ConnectionError(f"the Ray head at {self._address} is gone")
        resources = self._ray.cluster_resources()
        there = int(resources.get("CPU", 0))
        needs: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}
        if self._device != CPU:
            # Ray shows a worker no GPU but its own.
            there = min(there, int(resources.get("GPU", 0)))
            needs["num_gpus"] = 1
            if not there:
                raise ConnectionError(
                    f"the Ray cluster at {self._address} has no GPU, and networks are to be run on {self._device}: start its "
                    "machines with ray start --num-gpus, or search with --device cpu"
                )
        wanted = there
        if self._most is not None:
            wanted = min(there, self._most)
        worker: Any = self._ray.remote(**needs)(self._kind)
        for _ in range(wanted - len(self._starting) - len(self._load) - len(self._refused)):
            one = worker.remote()
            self._starting[one.ready.remote(self._given, self._threads, self._device)] = one
        self._looked = time.monotonic()

    def _dispatch(self) -> None:
        while self._queue and self._load:
            worker = min(self._load, key=self._load.__getitem__)
            if self._load[worker] >= self._depth:
                return
            key = self._queue.popleft()
            self._load[worker] += 1
            yielded = worker.work.options(num_returns="streaming").remote(key, *self._arguments(key))
            self._running[yielded] = key, worker

    def _welcome(self, reference: Any) -> None:
        there, here = self._ray.get(reference, timeout=GET_S), versions_on(self._device)
        worker = self._starting.pop(reference)
        other = [f"{name} {there.get(name)}, not {here[name]}" for name in here if there.get(name) != here[name]]
        if not other:
            self._load[worker] = 0
            return
        self._refused.append(worker)
        sentence = f"a machine of the cluster has {', '.join(other)}: results would differ, so it isn't used"
        if not self._load and not self._starting:
            raise ValueError(f"{sentence}; install the same versions everywhere")
        logger.warning(sentence)

    def _next(self, yielded: Any) -> tuple[Any, Any, bool]:
        key, worker = self._running[yielded]
        try:
            found = self._ray.get(next(yielded), timeout=GET_S)
        except StopIteration:
            del self._running[yielded]
            self._load[worker] -= 1
            return key, None, True
        self._losses = 0
        return key, found, False

    def _lose(self, reference: Any, error: Exception) -> None:
        """Give what a lost worker was at to others."""
        lost = self._starting.pop(reference, None) or self._running[reference][1]
        self._load.pop(lost, None)
        self._ray.kill(lost)  # it may live, and hold its processor
        again = [(yielded, key) for yielded, (key, worker) in self._running.items() if worker == lost]
        for yielded, _ in again:
            del self._running[yielded]
        self._queue.extendleft(key for _, key in reversed(again))
        self._losses += 1
        if self._losses == PATIENCE:
            reason = " ".join(str(error).split())[-200:]
            raise ChildProcessError(f"workers of the Ray cluster were lost {PATIENCE} times in a row ({reason})")


class Evaluations:
    """A pool (`haq.problem.evaluator.Pool`) of workers on a Ray cluster."""

    def __init__(self, evaluator: Evaluator, most: int | None, device: str = CPU) -> None:
        """Start workers.

        Args:
            evaluator: What they are given copies of.
            most: How many there may be; None for no limit.
            device: As of `Crew`.
        """
        # Two policies each, so that none waits for us while we wait for another.
        self._crew = Crew(_Evaluator, evaluator, evaluator.worker_threads, most, depth=2, device=device)
        self._asked: set[Asked] = set()
        self._found: dict[Asked, Judged] = {}

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Begin with policies that will be asked for, and what they are to beat."""
        for policy in policies:
            if (policy, beat) not in self._asked:
                self._asked.add((policy, beat))
                self._crew.submit((policy, beat))

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Judged:
        """Wait for a policy's evaluation; raises what `Crew.wait` raises."""
        self.expect([policy], beat)
        asked = (policy, beat)
        while asked not in self._found:
            for key, found, last in self._crew.wait():
                if not last:
                    self._found[key] = found
        self._asked.remove(asked)
        return self._found.pop(asked)


class _Evaluator:
    """A worker that evaluates policies."""

    def ready(self, given: bytes, threads: int, device: str) -> dict[str, str]:
        torch.set_num_threads(threads)
        self._evaluator = moving.load(given, device)
        return versions_on(device)

    def work(self, asked: Asked) -> Iterator[Judged]:
        yield self._evaluator.judge(*asked)


def run_folders(
    given: object,
    searched: Callable[..., None],
    folders: dict[Any, Path],
    most: int | None,
    on_done: Callable[[Any], None],
    device: str = CPU,
) -> None:
    """Let searches be done on the cluster that this process is connected to, and their runs come into folders of this machine.

    Args:
        given: What every worker is given once.
        searched: Called there with (given, key, folder, on_row), does one search in a folder that begins as ours is.
        folders: Where the run of each key is begun. Its history grows there; its other files come at its end.
        most: How many workers there may be; None for no limit.
        on_done: Is told the key of a search that has ended.
        device: As of `Crew`.
    """
    crew = Crew(_Searcher, (given, searched), 1, most, 1, lambda key: (folders[key].name, _files(folders[key])), device)
    for key in folders:
        crew.submit(key)
    left = set(folders)
    while left:
        for key, files, last in crew.wait():
            if last:
                left.remove(key)
                on_done(key)
            elif isinstance(files, bytes):
                with (folders[key] / HISTORY).open("ab") as file:
                    file.write(files)
            else:
                _write(folders[key], files)


class _Searcher:
    """A worker that does whole searches, each in a folder that is there for as long as it takes."""

    def ready(self, given: bytes, threads: int, device: str) -> dict[str, str]:
        self._given, self._searched = moving.load(given, device)
        self._threads = threads
        return versions_on(device)

    def work(self, key: Any, name: str, files: dict[str, bytes]) -> Iterator[bytes | dict[str, bytes]]:
        """What the history grows by, and in the end every file."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            _write(folder, files)
            news: queue.Queue[BaseException | bool] = queue.Queue()

            def search() -> None:
                try:
                    torch.set_num_threads(self._threads)
                    self._searched(self._given, key, folder, lambda: news.put(True))
                    news.put(False)
                except BaseException as error:
                    news.put(error)

            threading.Thread(target=search, daemon=True).start()
            sent = len(files[HISTORY])
            while (item := news.get()) is True:
                rows = (folder / HISTORY).read_bytes()
                rows = rows[: rows.rfind(b"\n") + 1]
                if len(rows) > sent:
                    yield rows[sent:]
                    sent = len(rows)
            if isinstance(item, BaseException):
                raise item
            yield _files(folder)


def versions_on(device: str) -> dict[str, str]:
    """Tell the versions on which results depend to the last bit, with the device of a kind that this process has."""
    return versions(find_device(device))


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".part", ".lock")
    }


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files, each beside and renamed."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        store_files.write(path, content)


def _is_head(address: str) -> bool:
    """Tell whether the head of a Ray cluster is at an address.

    Ray itself would ask anything there again and again for minutes, and can't be interrupted meanwhile; so it is another
    process that asks.
    """
    try:
        asked = subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
