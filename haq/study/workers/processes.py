"""Processes of this machine that evaluate policies.

What is evaluated is a function of the policy alone, so who does it, and when, changes no result: evaluations come in the order
in which a solver asks for them. How many can be done at a time is the solver's affair, which says ahead what it will ask for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import cloudpickle
import torch

import quantizers as Q
from haq.problem.evaluator import Evaluation, Evaluator

PATIENCE = 3  # times in a row that workers may be killed before anything is evaluated


class Processes:
    """A pool (`haq.problem.evaluator.Pool`) of processes, each with a copy of the evaluator.

    If one is killed, all are started anew, and nothing is lost but what they were at.
    """

    def __init__(self, evaluator: Evaluator, count: int) -> None:
        """Start `count` processes."""
        self.count = count
        self._given = cloudpickle.dumps(evaluator), evaluator.worker_threads
        self._futures: dict[Q.BitPolicy, Future[Evaluation]] = {}
        self._deaths = 0
        self._executor = self._start()

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Begin with policies that will be asked for."""
        for policy in policies:
            if policy not in self._futures:
                try:
                    self._futures[policy] = self._executor.submit(_evaluate, policy)
                except BrokenProcessPool:
                    self._futures[policy] = Future()
                    self._futures[policy].set_exception(BrokenProcessPool())  # seen to when it is asked for

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Wait for a policy's evaluation.

        Raises ChildProcessError if workers are killed again and again, and what evaluation raises.
        """
        self.expect([policy])
        while True:
            try:
                found = self._futures[policy].result()
            except BrokenProcessPool:
                self._restart()
            else:
                self._deaths = 0
                del self._futures[policy]
                return found

    def close(self) -> None:
        """End the processes when they are done with what they are at."""
        self._executor.shutdown(cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _start_worker, self._given)

    def _restart(self) -> None:
        self._deaths += 1
        if self._deaths == PATIENCE:
            raise ChildProcessError(
                f"workers were killed {PATIENCE} times in a row, perhaps for want of memory; go on with fewer --workers"
            )
        self._executor.shutdown()
        self._executor = self._start()
        lost = [policy for policy, future in self._futures.items() if isinstance(future.exception(), BrokenProcessPool)]
        for policy in lost:
            self._futures[policy] = self._executor.submit(_evaluate, policy)


@contextmanager
def working(evaluator: Evaluator, count: int | None, ray: str | None = None) -> Iterator[None]:
    """Let an evaluator's policies be evaluated by others within.

    Args:
        evaluator: Whose.
        count: By so many processes; None is by this one.
        ray: The address of a Ray cluster: by as many workers there, or by all of its processors.
    """
    if ray is not None:
        from haq.study.workers import ray as ray_workers

        with ray_workers.working(evaluator, ray, count):
            yield
        return
    if count is None:
        yield
        return
    pool = evaluator.pool = Processes(evaluator, count)
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


_evaluator: Evaluator | None = None


def _start_worker(given: bytes, threads: int) -> None:
    global _evaluator
    live_with_parent()
    torch.set_num_threads(threads)
    _evaluator = cloudpickle.loads(given)


def _evaluate(policy: Q.BitPolicy) -> Evaluation:
    assert _evaluator is not None
    return _evaluator.evaluate(policy)
