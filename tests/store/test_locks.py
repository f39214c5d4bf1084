"""Two processes never write one run: the second says so in one sentence; and a dead process holds nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from haq import deploy, evaluate, finetune, robustness, runs, search, sweep, train
from haq.console import errors
from haq.store.lock import check_can_be_made, is_held, writing
from haq.study import sweep_run
from haq.study.search_run import SearchRun, check_unused, unused_folder
from hw_models.trust import trust
from tests.commands.test_robustness_command import MODULE, lessen
from tests.conftest import enter

ROOT = Path(__file__).parents[2]
JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0"]
SWEEP = [*JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "4"]
HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from haq.store.lock import holding, writing
path = Path(sys.argv[1])
with holding(path, path, "") if path.suffix == ".lock" else writing(path, ""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    # Some runs are made by another process, which alone was told whose code it is.
    trust("small_job:network", "small_job:splits")


@contextmanager
def another_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held(path: str) -> Iterator[subprocess.Popen[str]]:
    """A lock that another process holds."""
    with another_process("-c", HOLD, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def call(main: Any, *arguments: str) -> int:
    return errors.run_command(lambda: main(list(arguments)))


def refused(capsys: pytest.CaptureFixture[str], what: str, main: Any, *arguments: str) -> None:
    capsys.readouterr()
    assert call(main, *arguments) == 2
    err = capsys.readouterr().err
    assert f"{what} is being written by another process: wait until it ends" in err
    assert err.count("\n") == 1


def test_while_a_search_runs_nothing_else_writes_there_and_its_death_frees_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*JOB, "--budget", "0.6", "--solver", "random", "--finetune-epochs", "0", "--evaluations", "100000", "--out", "run"]
    with another_process("-m", "haq.search", *long) as process:
        history = Path("run/history.csv")
        until(lambda: history.exists() and history.read_bytes().count(b"\n") > 20 and Path("run/policy.json").exists())
        assert is_held(Path("run"))
        refused(capsys, "run", search.main, "--resume", "run")
        refused(capsys, "run", finetune.main, "run")
        refused(capsys, "run", deploy.main, "run", "--to", "onnx")
        refused(capsys, "run", robustness.main, "run", "--attacks", "fgsm")
        assert call(runs.main, "prune", ".", "--unfinished", "--yes") == 0
        assert "left alone: run, it is being written" in capsys.readouterr().out
        # What only reads goes on reading.
        assert call(evaluate.main, "run") in (0, 1)
        capsys.readouterr()
        assert call(runs.main, "list", ".", "--json") == 0
        assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["running"]
        assert call(runs.main, "show", "run") == 0
        assert "run: running" in capsys.readouterr().out
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_held(Path("run"))
    assert call(runs.main, "list", ".") == 0
    assert "interrupted" in capsys.readouterr().out
    before, record = len(history.read_bytes().splitlines()), SearchRun.record

    def stop_after_the_old(self: SearchRun, *arguments: Any) -> None:
        old = bool(self._expected)
        record(self, *arguments)
        if not old:
            raise KeyboardInterrupt

    monkeypatch.setattr(SearchRun, "record", stop_after_the_old)
    assert call(search.main, "--resume", "run") == errors.EXIT_INTERRUPTED
    assert len(history.read_bytes().splitlines()) >= before
    assert not is_held(Path("run"))


def until(reached: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lock_is_freed_by_the_death_of_whoever_held_it() -> None:
    with held("folder") as process:
        assert is_held(Path("folder"))
        with pytest.raises(BlockingIOError, match="folder is being written by another process"), writing(Path("folder"), ""):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_held(Path("folder"))
        with writing(Path("folder"), ""):
            assert is_held(Path("folder"))
    assert not is_held(Path("folder"))


def test_a_folder_that_another_search_has_just_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with held("run"):
        refused(capsys, "run", search.main, *QUICK, "--out", "run")
        refused(capsys, "run", sweep.main, *SWEEP, "--out", "run")
    assert [path.name for path in Path("run").iterdir()] == [".lock"]
    assert call(search.main, *QUICK, "--out", "run") == 0


def test_a_sweep_is_written_by_one_process_and_so_is_each_of_its_searches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "ORPHAN_S", 0.1)
    assert call(sweep.main, *SWEEP, "--out", "all") == 0
    path = Path("all/sweep.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    with held("all"):
        refused(capsys, "all", sweep.main, "--resume", "all")
    one = "all/edge-0.6-random-seed0"
    with held(one):
        refused(capsys, one, sweep.main, "--resume", "all")
    shutil.rmtree(one)
    with held(one):
        refused(capsys, one, sweep.main, "--resume", "all")
        assert call(runs.main, "prune", ".", "--unfinished", "--yes") == 0
        assert "left alone: all, it is in use" in capsys.readouterr().out
    assert call(sweep.main, "--resume", "all") == 0


def test_a_checkpoint_is_trained_by_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*JOB, "--epochs", "1", "--out", "nets/net.safetensors"]
    Path("nets").mkdir()
    with held("nets/.net.safetensors.lock"):
        refused(capsys, "nets/net.safetensors", train.main, *arguments)
    assert {path.name for path in Path("nets").iterdir()} == {".net.safetensors.lock"}
    assert call(train.main, *arguments) == 0


def test_attacks_on_a_model_are_written_by_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lessen(monkeypatch)
    arguments = ["small_job:network", "--data", "small_job:splits", "--attacks", "fgsm", "--images", "32", "--workers", "1"]
    with held("attacked"):
        refused(capsys, "attacked", robustness.main, *arguments, "--out", "attacked")
    assert call(robustness.main, *arguments, "--out", "attacked") == 0
    assert call(search.main, *QUICK, "--out", "run") == 0
    with held("run"):
        refused(capsys, "run", robustness.main, "run", "--attacks", "fgsm", "--out", "attacked")


def test_deploying_elsewhere_only_reads_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "run") == 0
    with held("run"):
        assert call(deploy.main, "run", "--to", "onnx", "--out", "net.onnx") == 0
        refused(capsys, "run", deploy.main, "run", "--to", "onnx")


def test_what_a_kill_leaves_of_a_folder_that_was_being_made_is_no_use_of_it() -> None:
    folder = Path("runs/name")
    folder.mkdir(parents=True)
    for name in (".lock", "config.yaml.part", "sweep.json.part"):
        (folder / name).write_text("half")
        check_unused(folder)
    assert unused_folder("name") == folder
    with held("runs/name"):
        assert unused_folder("name") == Path("runs/name-2")
    assert call(search.main, *QUICK, "--out", "runs/name") == 0
    assert not (folder / "config.yaml.part").exists()
    (folder / "mine.part").touch()
    with pytest.raises(ValueError, match="is in use"):
        check_unused(folder)
    other = Path("other")
    other.mkdir()
    (other / "film.mkv.part").touch()
    with pytest.raises(ValueError, match="is in use"):
        check_unused(other)


def test_a_lock_that_leads_elsewhere_is_not_followed() -> None:
    Path("outside").write_text("years of work")
    Path("run").mkdir()
    Path("run/.lock").symlink_to(Path("outside").resolve())
    with pytest.raises(ValueError, match="symbolic link out of run"), writing(Path("run"), ""):
        pass
    Path("run/.lock").unlink()
    os.mkfifo("run/.lock")
    assert not is_held(Path("run"))
    with pytest.raises(ValueError, match="no ordinary file"), writing(Path("run"), ""):
        pass
    assert Path("outside").read_text() == "years of work"


def test_links_of_ones_own_in_a_folder_for_results_are_let_be() -> None:
    """A project with a virtual environment in it is no run's folder."""
    Path("project/.venv/bin").mkdir(parents=True)
    Path("project/.venv/bin/python").symlink_to(sys.executable)
    Path("project/data").symlink_to("/")
    with writing(Path("project"), ""):
        pass
    Path("project/robustness.json.part").symlink_to("/nowhere")
    with pytest.raises(ValueError, match="symbolic link out of project"), writing(Path("project"), ""):
        pass


@pytest.mark.parametrize("main", [search.main, sweep.main, train.main])
@pytest.mark.parametrize("out", ["/proc/x/y.safetensors", "file/x/y.safetensors", "n" * 300 + "/x/y.safetensors"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(
    main: Callable[[list[str]], int], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("", encoding="utf-8")
    # The network isn't there either: it would be missed first, if anything were loaded.
    assert errors.run_command(lambda: main(["--network", "none.pt", "--out", out])) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"error: --out {Path(out).parent}")
    assert "can't be made (" in said


def test_looking_whether_a_folder_can_be_made_leaves_nothing_behind() -> None:
    check_can_be_made(Path("a") / "b")
    assert not Path("a").exists()
    Path("link").symlink_to(Path("nowhere") / "at" / "all")
    with pytest.raises(ValueError, match="--out link/x can't be made"):
        check_can_be_made(Path("link") / "x")
