"""Whoever evaluates policies, and however many they are, results are the same; a killed worker loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker, spawn
from pathlib import Path

import pytest
import torch

import haq
from haq import search
from haq.problem.evaluator import Evaluation
from haq.solvers.base import Session, Trial, solve
from haq.study.workers import processes
from haq.study.workers.processes import working
from tests.commands.test_search_command import AGENTS, QUICK, SMALL, call, history, place  # noqa: F401
from tests.conftest import images, make_problem, small_network

Rows = list[tuple[int, Evaluation, float, object]]


def rows(problem: haq.Problem, solver: str, evaluations: int = 24, env: str = "plan") -> Rows:
    """What a solver evaluates, in order."""
    problem.evaluator.cache.clear()
    kept: Rows = []

    def keep(found: Trial) -> None:
        count = len(kept) + 1
        kept.append((count, found.evaluation, found.cost, found.policy))

    solve(solver, Session(problem, evaluations, keep, env=env, ahead=3), seed=2)
    return kept


def test_every_solver_finds_the_same_with_any_number_of_workers() -> None:
    problem = make_problem(small_network())
    asked = [("random", "plan"), ("evolution", "plan"), ("ilp", "plan"), ("ddpg", "plan"), ("sac", "haq")]
    alone = [rows(problem, solver, 12, env=env) for solver, env in asked]
    for count, some in ((1, 3), (2, 5)):  # agents learn again each time, so that one number must do for them
        with working(problem.evaluator, count):
            assert [rows(problem, solver, 12, env=env) for solver, env in asked[:some]] == alone[:some]
    assert problem.evaluator.pool is None


def test_policies_are_evaluated_by_the_workers_and_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(small_network())
    with working(problem.evaluator, 1):
        monkeypatch.setattr(problem.evaluator, "_measure", lambda *_: pytest.fail("evaluated here"))
        assert len(rows(problem, "random", 5)) == 5


def test_what_is_known_is_not_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(small_network())
    known = problem.evaluate(problem.uniform(4))
    asked: list[object] = []

    class Nobody:
        def expect(self, policies: object) -> None:
            asked.extend(policies)  # type: ignore[call-overload]

        def evaluate(self, policy: object) -> Evaluation:
            pytest.fail("asked")

    monkeypatch.setattr(problem.evaluator, "pool", Nobody())
    problem.expect([problem.uniform(4), problem.uniform(5)])
    assert asked == [problem.uniform(5)]
    assert problem.evaluate(problem.uniform(4)) == known


def test_a_single_batch_has_the_threads_of_this_process_since_sums_depend_on_them() -> None:
    evaluator = make_problem(small_network()).evaluator
    assert evaluator.one_batch
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert evaluator.worker_threads == 3
        many = images(300)
        larger = haq.Problem(small_network(), calibrate=images(32), search=many, target="edge", objective="agreement")
        assert larger.evaluator.worker_threads == 1
    finally:
        torch.set_num_threads(before)


def test_workers_that_die_as_they_start_are_stopped_or_are_killed_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = make_problem(small_network())
    problem.evaluator.ballast = torch.zeros(100_000)  # type: ignore[attr-defined]  # more than fits into a pipe
    monkeypatch.setattr(processes, "LOOK_S", 0.1)
    monkeypatch.setattr(processes, "STOPPED", 2)
    dies_first(monkeypatch, tmp_path)
    alone = rows(problem, "random", 30)
    problem.evaluator.cache.clear()
    kept: Rows = []

    def on_trial(found: Trial) -> None:
        count = len(kept) + 1
        kept.append((count, found.evaluation, found.cost, found.policy))
        if count in (3, 11):
            for process in multiprocessing.active_children()[:1]:
                assert process.pid is not None
                os.kill(process.pid, {3: signal.SIGSTOP, 11: signal.SIGKILL}[count])

    with working(problem.evaluator, 2):
        session = Session(problem, 30, on_trial)
        solve("random", session, seed=2)
    assert kept == alone


def dies_first(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the first process that is started die before it has read anything."""
    resource_tracker.ensure_running()
    program = folder / "program"
    program.write_text(f'#!/bin/sh\nmkdir {folder}/dead 2>/dev/null && exit 1\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(spawn, "_python_exe", os.fsencode(program))


def test_workers_that_are_killed_again_and_again_are_given_up_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(small_network())
    problem.evaluator.ballast = torch.zeros(100_000)  # type: ignore[attr-defined]
    resource_tracker.ensure_running()
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    with working(problem.evaluator, 1), pytest.raises(ChildProcessError, match="killed 3 times in a row") as raised:
        problem.evaluate(problem.uniform(4))
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


class _Odd(Exception):
    """An error that doesn't come back from a pickle."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    found = processes._outcome(lambda key: (_ for _ in ()).throw(_Odd(3, "no such layer")), None)
    assert str(found[1]) == "_Odd: no such layer"


def test_what_goes_wrong_there_is_told_here() -> None:
    network = small_network()
    problem = make_problem(network)
    problem.evaluator.network.get_submodule("classifier").weight = torch.nn.Parameter(torch.ones(4, 5))
    with working(problem.evaluator, 1), pytest.raises((ValueError, RuntimeError), match="shapes cannot be multiplied"):
        problem.evaluate(problem.uniform(4))


def test_the_search_command_writes_the_same_with_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *AGENTS, "--out", "alone") == 0
    assert call(search.main, *AGENTS, "--out", "together", "--workers", "2") == 0
    assert history(Path("alone")) == history(Path("together"))
    for name in (
        "policy.json",
        "result.json",
        "checkpoint/quantized.safetensors",
    ):
        assert Path("alone", name).read_bytes() == Path("together", name).read_bytes(), name
    assert call(search.main, *QUICK, "--workers", "0") == 2
    assert "--workers is 0; it must be at least 1" in capsys.readouterr().err


def test_workers_end_with_the_process_that_started_them() -> None:
    asked = [*SMALL, "--evaluations", "2000", "--solver", "random", "--finetune-epochs", "0", "--workers", "2", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])}
    process = subprocess.Popen([sys.executable, "-m", "haq.search", *asked], env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: Path("run/history.csv").is_file() and len(history(Path("run"))) > 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(_lives(child) for child in children))


def _lives(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False


def wait_for(holds: object) -> None:
    """Wait until something holds; fail after two minutes."""
    for _ in range(1200):
        if holds():  # type: ignore[operator]
            return
        time.sleep(0.1)
    pytest.fail("waited in vain")
