"""Processes of this machine that evaluate policies, or do whole searches.

What is evaluated is a function of the policy alone, so who does it, and when, changes no result: evaluations come in the order
in which a solver asks for them. How many can be done at a time is the solver's affair, which says ahead what it will ask for.

Every worker has a pipe of its own, and they share no lock: one that dies, whenever that is, takes nothing with it that another
waits for. What all of them work on is too large for a pipe, so that it lies in a file.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager, suppress
from multiprocessing import reduction, resource_tracker
from typing import IO, Any, NamedTuple

import torch

import quantizers as Q
from haq.problem.device import CPU, kind_of, spread
from haq.problem.evaluator import Asked, Evaluator, Judged
from haq.study.workers import moving

logger = logging.getLogger("haq")
PATIENCE = 3  # times in a row that the workers of one place may die before they have done anything
LOOK_S = 1.0  # seconds between two looks at whether a worker that is waited for lives
STOPPED = 10  # looks after which a worker that somebody has stopped is taken for dead
WAKE_S = 0.2  # seconds between two looks at what else than its tasks a crew has to see to
END_S = 10.0  # seconds in which a process that was killed is gone

Task = tuple[int, Any, "Future[Any]"]  # its number, by which earlier ones go first


class Crew:
    """Places for workers, each with a process, and the tasks that they share.

    A process that dies, or is stopped for long, is followed by another, which is given the same task.
    """

    def __init__(
        self,
        begin: Callable[..., Callable[[Any], Any]],
        given: tuple[Any, ...],
        count: int,
        on_news: Callable[..., None] = lambda *news: None,
        devices: Sequence[str] = (CPU,),
    ) -> None:
        """Start processes.

        Args:
            begin: Called in each of them with a function that tells `on_news`, and what is given; returns what does a task.
            given: What each is given once.
            count: How many there are.
            on_news: Told, while tasks are waited for, what workers tell of what they are at.
            devices: Where what is given is in the workers, in turn, if it isn't on the CPU here.

        Raises:
            OSError: If there is no room for what is given, naming the folder of temporary files.
        """
        self._devices = list(devices)
        self._on_news = on_news
        self._news: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        # Without a name, so that nothing is left of it, whoever is killed.
        self._handover = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            moving.dump((begin, given), self._handover)
            self._handover.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
        self._tasks: queue.PriorityQueue[Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = threading.Event()
        self._fault: BaseException | None = None
        self._reason = ""  # why a place was given up
        self._workers: set[_Worker] = set()  # that live, as far as is known
        self._fresh: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # that have no place yet
        self._vacant: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for every place that needs one
        # If this were left to the first worker, it would let Ctrl-C through to it.
        resource_tracker.ensure_running()
        self._places: list[threading.Thread] = []
        try:
            for _ in range(count):
                self._hire()
                place = threading.Thread(target=self._serve, daemon=True)
                place.start()
                self._places.append(place)
        except BaseException:
            self.close()
            raise

    def submit(self, key: Any) -> Future[Any]:
        """Give the workers another task."""
        future: Future[Any] = Future()
        self._tasks.put((next(self._numbers), key, future))
        return future

    def wait(self, futures: Iterable[Future[Any]]) -> set[Future[Any]]:
        """Wait until some tasks are done.

        Args:
            futures: What `submit` returned for them.

        Returns:
            Those that are done, at least one.

        Raises:
            ChildProcessError: If no place is left whose workers live.
            Exception: What `begin` raises in a worker.
        """
        pending = list(futures)
        while True:
            while not self._vacant.empty():
                self._vacant.get()
                self._hire()
            done, _ = wait_for_any(pending, WAKE_S, FIRST_COMPLETED)
            while not self._news.empty():
                self._on_news(*self._news.get())
            if done:
                return done
            if self._fault is not None:
                raise self._fault
            if not any(place.is_alive() for place in self._places):
                raise ChildProcessError(f"{self._reason}; go on with fewer --workers")

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._closed.set()
        for worker in list(self._workers):
            worker.kill()
        for _ in self._places:
            # Whoever waits for a worker or a task looks up.
            self._fresh.put(None)
            self._tasks.put((next(self._numbers), None, Future()))
        for place in self._places:
            place.join(END_S)
        self._handover.close()

    def _hire(self) -> None:
        """Start a process; its place is whichever has none."""
        # Ctrl-C is for this process, which knows what to do; a worker inherits that it doesn't get it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # The device with the fewest workers: one that follows a dead one comes to where that was.
            counts = Counter(worker.device for worker in list(self._workers))
            device = min(self._devices, key=lambda name: counts[name])
            worker = _Worker(self._handover, self._closed, self._news.put, device)
            self._workers.add(worker)
            self._fresh.put(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _serve(self) -> None:
        """Give tasks to one worker, and to those that follow it."""
        task: Task | None = None
        deaths = 0
        try:
            while deaths < PATIENCE and not self._closed.is_set():
                worker = self._fresh.get()
                if worker is None:
                    return
                try:
                    worker.wait()
                    while not self._closed.is_set():
                        task = task or self._tasks.get()
                        if self._closed.is_set():
                            return
                        worker.send(task[1])
                        _settle(task[2], worker.wait())
                        task, deaths = None, 0
                except _Lost:
                    deaths += 1
                    self._workers.discard(worker)
                    if deaths < PATIENCE:
                        self._vacant.put(None)
                finally:
                    self._workers.discard(worker)
                    reason = worker.bury()
            if not self._closed.is_set():
                self._leave(task, reason)
        except BaseException as error:
            self._fault = error

    def _leave(self, task: Task | None, reason: str) -> None:
        """Give up a place; what its last worker was at is left to the others."""
        self._reason = f"a worker was killed {PATIENCE} times in a row ({reason}), perhaps for want of memory"
        if task is not None:
            self._tasks.put(task)
        if sum(place.is_alive() for place in self._places) > 1:
            logger.warning(f"{self._reason}; it goes on with one worker less")


class _Lost(Exception):
    """A worker is dead, or stopped."""


class _Worker:
    """A process and the pipe to it."""

    def __init__(
        self, handover: IO[bytes], closed: threading.Event, on_news: Callable[[tuple[Any, ...]], None], device: str
    ) -> None:
        self.device = device
        self._closed = closed
        self._on_news = on_news
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, _Shared(handover), device))
        self._process.start()
        # Only the worker holds its end now, so that the pipe tells of its death.
        theirs.close()

    def send(self, key: Any) -> None:
        try:
            _send(self._pipe, key)
        except OSError as error:
            raise _Lost from error

    def wait(self) -> Any:
        """Return what the worker says next. Raises `_Lost` if it never will, and what it could not begin for."""
        while True:
            try:
                self._look()
                said = pickle.loads(self._pipe.recv_bytes())
            except (OSError, EOFError) as error:
                raise _Lost from error
            if isinstance(said, _Unable):
                raise said.error
            if not isinstance(said, _News):
                return said
            self._on_news(said.words)

    def _look(self) -> None:
        """Wait until there is something in the pipe; raises `_Lost` if there won't be."""
        stopped = 0
        while not self._pipe.poll(LOOK_S):
            if self._closed.is_set() or not self._process.is_alive():
                raise _Lost
            stopped += 1
            if not self._is_stopped():
                stopped = 0
            if stopped == STOPPED:
                raise _Lost

    def kill(self) -> None:
        """Kill the process; whoever waits for it is told."""
        self._process.kill()

    def bury(self) -> str:
        """Kill the process, if it lives, and say how it ended."""
        was_stopped = self._is_stopped()
        self._process.kill()
        self._process.join(END_S)
        self._pipe.close()
        code = self._process.exitcode
        if was_stopped:
            return "the last was stopped by a signal"
        if code is not None and code < 0:
            return f"the last by {signal.Signals(-code).name}"
        return f"the last ended with status {code}"

    def _is_stopped(self) -> bool:
        if not hasattr(os, "waitid"):
            return False  # nobody can tell
        with suppress(OSError):
            flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid or 0, flags) is not None
        return False


class _Shared:
    """The file that workers are given what they work on in: it has no name, so that they inherit it while they start."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inherited, (reduction.DupFd(self.file.fileno()),)


class _Inherited:
    def __init__(self, descriptor: Any) -> None:
        self._descriptor = descriptor.detach()

    def load(self, device: str) -> Any:
        with (
            open(self._descriptor, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return moving.load(content, device)


class _Unable:
    """Why a worker can't begin."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _News(NamedTuple):
    """What a worker tells while it is at a task."""

    words: tuple[Any, ...]


def _send(pipe: Any, content: Any) -> None:
    # Bytes, since torch would otherwise send tensors by memory that both processes must live for.
    pipe.send_bytes(pickle.dumps(content))


class Processes:
    """A pool (`haq.problem.evaluator.Pool`) of processes, each with a copy of the evaluator.

    If one is killed, another takes its place, and nothing is lost but what it was at.
    """

    def __init__(self, evaluator: Evaluator, count: int, devices: Sequence[str] = (CPU,)) -> None:
        """Start processes.

        Args:
            evaluator: What they are given copies of.
            count: How many.
            devices: Where the copies are, in turn, if the evaluator isn't on the CPU.
        """
        self.count = count
        self._crew = Crew(_evaluating, (evaluator, evaluator.worker_threads), count, devices=devices)
        self._futures: dict[Asked, Future[Judged]] = {}

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Begin with policies that will be asked for, and what they are to beat."""
        for policy in policies:
            key = (policy, beat)
            if key not in self._futures:
                self._futures[key] = self._crew.submit(key)

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Judged:
        """Wait for a policy's evaluation.

        Raises ChildProcessError if workers are killed again and again, and what evaluation raises.
        """
        self.expect([policy], beat)
        key = (policy, beat)
        self._crew.wait([self._futures[key]])
        return self._futures.pop(key).result()

    def close(self) -> None:
        """End the processes."""
        self._crew.close()


@contextmanager
def working(evaluator: Evaluator, count: int | None, ray: str | None = None, device: str = CPU) -> Iterator[None]:
    """Let an evaluator's policies be evaluated by others within.

    Args:
        evaluator: Whose.
        count: By so many processes; None is by this one.
        ray: The address of a Ray cluster: by as many workers there, or by all of its processors.
        device: What networks are run on: "cuda" is all GPUs, "cuda:1" that one alone.
    """
    if ray is not None:
        from haq.study.workers import ray as ray_workers

        with ray_workers.working(evaluator, ray, count, kind_of(device)):
            yield
        return
    if count is None:
        yield
        return
    pool = evaluator.pool = Processes(evaluator, count, spread(device))
    try:
        yield
    finally:
        evaluator.pool = None
        pool.close()


def live_with_parent() -> None:
    """Leave Ctrl-C to the first process, which knows what to do, and end when that one does, even by kill -9.

    What a worker does first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # nobody waits for an answer

    threading.Thread(target=watch, daemon=True).start()


def _work(pipe: Any, shared: _Inherited, device: str) -> None:
    """Do tasks until the first process has no more."""
    live_with_parent()
    try:
        begin, given = shared.load(device)
        work = begin(lambda *words: _send(pipe, _News(words)), *given)
    except MemoryError:
        os._exit(1)  # there may be room another time
    except BaseException as error:
        _send(pipe, _Unable(_portable(error)))
        return
    _send(pipe, None)
    while True:
        try:
            key = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        _send(pipe, _outcome(work, key))


def _outcome(work: Callable[[Any], Any], key: Any) -> tuple[Any, BaseException | None]:
    """Do a task: what comes of it, and what it raises."""
    try:
        return work(key), None
    except BaseException as error:
        return None, _portable(error)


def _settle(future: Future[Any], outcome: tuple[Any, BaseException | None]) -> None:
    found, error = outcome
    if error is None:
        future.set_result(found)
    else:
        future.set_exception(error)


def _portable(error: BaseException) -> BaseException:
    """Return an error as it can be sent: somebody's own class may not come back from a pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _evaluating(tell: Any, evaluator: Evaluator, threads: int) -> Callable[[Asked], Judged]:
    torch.set_num_threads(threads)
    return lambda asked: evaluator.judge(*asked)
