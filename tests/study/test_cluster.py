"""On a Ray cluster results are those of one process; workers and machines may go and come."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haq import search, sweep
from haq.solvers.base import Session, Trial, solve
from haq.study.search_run import SearchRun
from haq.study.workers import ray as ray_workers
from haq.study.workers.processes import working
from haq.study.workers.ray import Crew
from tests.commands.test_search_command import QUICK, call, history, place  # noqa: F401
from tests.conftest import make_problem, small_network
from tests.study.test_sweep import files
from tests.study.test_workers import Rows, rows, wait_for

pytest.importorskip("ray")
MEMORY = 100 * 2**20  # bytes of a node's object store


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two machines, as far as Ray knows, with a processor each."""
    # Machines import what this process does, small_job.py too, which each test has in a folder of its own.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    # Or workers wait for whatever else runs, the other tests first of all.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": MEMORY}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    made.add_node(**options)
    try:
        yield made
    finally:
        made.shutdown()


def test_every_solver_finds_the_same_on_two_machines(nodes: Any) -> None:
    problem = make_problem(small_network())
    asked = ("random", "ilp", "ddpg")
    alone = [rows(problem, solver, 12) for solver in asked]
    with working(problem.evaluator, None, nodes.address):
        assert [rows(problem, solver, 12) for solver in asked] == alone
        pool: Any = problem.evaluator.pool
        wait_for(lambda: pool.evaluate(problem.uniform(5)) and pool._crew.workers == 2)
    assert problem.evaluator.pool is None


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(nodes: Any) -> None:
    problem = make_problem(small_network())
    alone = rows(problem, "random", 30)
    problem.evaluator.cache.clear()
    kept: Rows = []

    def on_trial(found: Trial) -> None:
        count = len(kept) + 1
        kept.append((count, found.evaluation, found.cost, found.policy))
        if count in (3, 12):
            kill_a_worker()

    with working(problem.evaluator, 2, nodes.address):
        solve("random", Session(problem, 30, on_trial), seed=2)
    assert kept == alone


def kill_a_worker() -> None:
    names = ("ray::_Evaluator", "ray::_Searcher")
    found = [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if _title(pid).startswith(names)]
    assert found
    os.kill(int(found[0]), signal.SIGKILL)


def _title(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.slow
def test_a_machine_that_joins_is_used_and_one_that_leaves_is_not_missed(nodes: Any) -> None:
    problem = make_problem(small_network())
    alone = rows(problem, "random", 40)
    problem.evaluator.cache.clear()
    kept: Rows = []
    with working(problem.evaluator, None, nodes.address):
        pool: Any = problem.evaluator.pool
        extra: list[Any] = []

        def on_trial(found: Trial) -> None:
            count = len(kept) + 1
            kept.append((count, found.evaluation, found.cost, found.policy))
            if count == 5:
                extra.append(nodes.add_node(num_cpus=1, object_store_memory=MEMORY))
                wait_for(lambda: pool.evaluate(problem.uniform(5)) and pool._crew.workers == 3)
            if count == 15:
                nodes.remove_node(extra.pop())

        solve("random", Session(problem, 40, on_trial), seed=2)
    assert kept == alone


def test_a_sweep_on_the_cluster_writes_what_one_process_writes(nodes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK[:4], "--hw", "edge", "--budgets", "0.6", "--solvers", "ilp,ddpg", "--evaluations", "12"]
    assert call(sweep.main, *arguments, "--out", "here") == 0
    # One is killed once the first search streams its history.
    watcher = threading.Thread(target=lambda: [wait_for(lambda: _streamed(Path("there"))), kill_a_worker()])
    watcher.start()
    assert call(sweep.main, *arguments, "--out", "there", "--ray", nodes.address) == 0, capsys.readouterr().err
    watcher.join()
    here, there = files("here"), files("there")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def _streamed(folder: Path) -> bool:
    return any(len(history(path.parent)) > 1 for path in folder.glob("*seed0/history.csv"))


@pytest.mark.slow  # a sweep on the cluster, above, consists of searches
def test_the_search_command_on_the_cluster(nodes: Any) -> None:
    assert call(search.main, *QUICK, "--out", "alone") == 0
    assert call(search.main, *QUICK, "--out", "there", "--ray", nodes.address) == 0
    for name in ("history.csv", "policy.json", "result.json", "checkpoint/ddpg.state"):
        assert Path("alone", name).read_bytes() == Path("there", name).read_bytes(), name


def test_machines_with_other_versions_are_refused(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem = make_problem(small_network())
    here = ray_workers.versions()
    monkeypatch.setattr(ray_workers, "versions", lambda *given: here | {"torch": "1.0"})
    with (
        caplog.at_level(logging.WARNING, "haq"),
        working(problem.evaluator, 1, nodes.address),
        pytest.raises(ValueError, match=r"has torch .*, not 1\.0: results would differ.*install the same versions everywhere"),
    ):
        problem.evaluate(problem.uniform(4))


def test_what_goes_wrong_there_is_told_here_in_one_sentence(nodes: Any) -> None:
    problem = make_problem(small_network())
    problem.evaluator.labels = problem.evaluator.labels + 100
    with working(problem.evaluator, 1, nodes.address), pytest.raises(ValueError, match="don't fit outputs") as raised:
        problem.evaluate(problem.uniform(4))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "no Ray head answers at 127.0.0.1:1"),
        ("ray://somewhere:10001", "give auto on a machine of the cluster"),
        ("nonsense", "give auto on a machine of the cluster"),
    ],
)
def test_an_address_without_a_cluster_is_refused_in_one_sentence(
    address: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *QUICK, "--out", "run", "--ray", address) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def test_what_is_no_ray_head_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "ASK_S", 0.1)  # it is the same with 20 s, later
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray is asked, which takes minutes"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert call(search.main, *QUICK, "--out", "run", "--ray", address) == 2
    err = capsys.readouterr().err
    assert f"what answers at {address} is no Ray head" in err
    assert err.count("\n") == 1


def test_a_head_that_is_gone_ends_a_search_in_one_sentence_and_it_can_go_on_without_it(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as the search can see: nobody answers any more."""
    record, rows = SearchRun.record, []

    def record_and_leave(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        rows.append(1)
        if len(rows) == 4:
            monkeypatch.setattr(ray_workers, "_answers", lambda host, port: False)
            monkeypatch.setattr(ray_workers, "GROWTH", 0.0)

    arguments = [*QUICK, "--solver", "random"]
    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", record_and_leave)
        assert call(search.main, *arguments, "--out", "run", "--workers", "1", "--ray", nodes.address) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "is gone" in line]
    assert len(told) == 1
    assert "the Ray head at" in told[0]
    assert "--resume run" in told[0]
    assert 4 <= len(history(Path("run"))) < 30
    assert call(search.main, *arguments, "--out", "alone") == 0
    assert call(search.main, "--resume", "run") == 0
    assert history(Path("run")) == history(Path("alone"))


@pytest.mark.slow
def test_a_head_that_vanishes_ends_a_search_in_one_sentence_and_it_can_go_on_without_it() -> None:
    """In processes of its own: the head is killed."""
    code = """
import os, sys
from ray.cluster_utils import Cluster
from haq import search
from haq.console.errors import run_command
from haq.study.search_run import SearchRun
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": %d, "include_dashboard": False})
record, rows = SearchRun.record, []
def record_and_kill(self, *rest):
    record(self, *rest)
    rows.append(1)
    if len(rows) == 4:
        made.head_node.kill_gcs_server()
SearchRun.record = record_and_kill
sys.exit(run_command(lambda: search.main([*sys.argv[1:], "--ray", made.address])))
"""
    arguments = [*QUICK, "--evaluations", "200", "--solver", "random", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-c", code % MEMORY, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = [line for line in done.stderr.splitlines() if "is gone" in line]
    assert done.returncode == 2, done.stderr
    assert len(told) == 1
    assert "the Ray head at" in told[0]
    assert "--resume run" in told[0]
    assert "Traceback" not in done.stderr
    kept = len(history(Path("run")))
    assert kept >= 4
    assert call(search.main, *arguments[:-1], "alone") == 0
    assert call(search.main, "--resume", "run") == 0
    assert history(Path("run")) == history(Path("alone"))


def test_workers_that_are_lost_again_and_again_are_given_up(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:  # of this function, so that workers needn't import it
        def ready(self, given: bytes, threads: int, device: str) -> dict[str, str]:
            return os._exit(1)

    monkeypatch.setattr(ray_workers, "PATIENCE", 2)
    with ray_workers.connected(nodes.address):
        crew = Crew(Dying, None, 1, 1, 1)
        crew.submit("anything")
        with pytest.raises(ChildProcessError, match="lost 2 times in a row"):
            wait_for(lambda: list(crew.wait()))


@pytest.mark.slow
def test_a_cluster_that_is_full_is_waited_for_and_that_is_told(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    class Idle:  # of this function, so that workers needn't import it
        def ready(self) -> None: ...

    monkeypatch.setattr(ray_workers, "FULL", 0.5)
    problem = make_problem(small_network())
    alone = problem.evaluate(problem.uniform(4))
    problem.evaluator.cache.clear()
    with caplog.at_level(logging.WARNING, "haq"), working(problem.evaluator, None, nodes.address):
        pool: Any = problem.evaluator.pool
        idle: Any = ray.remote(num_cpus=1)(Idle)
        others = [idle.remote() for _ in range(2)]
        ray.get([other.ready.remote() for other in others])
        pool.expect([problem.uniform(4)])
        wait_for(lambda: not list(pool._crew.wait()) and "no processor of the Ray cluster is free yet" in caplog.text)
        others.clear()
        assert problem.evaluate(problem.uniform(4)) == alone
