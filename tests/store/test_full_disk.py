"""A disk that takes nothing more is one sentence, and costs nothing that was finished."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haq import finetune, robustness, search, sweep, train
from haq.console import errors
from haq.store import files
from tests.commands.test_robustness_command import MODULE, lessen
from tests.conftest import enter

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--solver", "random", "--evaluations", "30", "--finetune-epochs", "1"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, check=False).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield Path("disk")
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path, but: int) -> Path:
    """Take all that is left of a disk, but for some bytes (pages of 4 kB)."""
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    ballast.write_bytes(b"x" * (room.f_bavail * room.f_frsize - but))
    return ballast


def call(main: Any, *arguments: str) -> int:
    return errors.run_command(lambda: main(list(arguments)))


def full(capsys: pytest.CaptureFixture[str], main: Any, *arguments: str) -> str:
    """The sentence of a command that fills the disk."""
    capsys.readouterr()
    assert call(main, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the disk is full, ")
    assert "what was finished is kept; free some space, then " in err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("room", [0, 4096, 40 * 1024, 64 * 1024, 88 * 1024, 112 * 1024])
def test_a_search_goes_on_when_there_is_space_again(disk: Path, room: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk is full before the first file, or in the middle of one of them."""
    assert call(search.main, *QUICK, "--out", "whole") == 0
    ballast = fill(disk, room)
    err = full(capsys, search.main, *QUICK, "--out", "disk/run")
    ballast.unlink()
    for path in Path("disk/run").rglob("*"):
        # Nothing has its real name that isn't whole, but for the history, whose last line doesn't count.
        if path.is_file() and path.suffix in (".json", ".yaml", ".png", ".safetensors"):
            whole = Path("whole", path.relative_to("disk/run"))
            assert path.stat().st_size == whole.stat().st_size or path.name in ("policy.json", "sensitivity.json")
    if Path("disk/run/config.yaml").exists():
        assert "go on with python -m haq.search --resume disk/run" in err
        assert call(search.main, "--resume", "disk/run") == 0
    else:
        assert "give the same command again" in err
        assert call(search.main, *QUICK, "--out", "disk/run") == 0
    for file in ("policy.json", "history.csv", "result.json"):
        assert Path("whole", file).read_bytes() == Path("disk/run", file).read_bytes()
    assert not list(Path("disk/run").rglob("*.part"))


def test_fine_tuning_leaves_the_run_as_it_was(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "disk/run") == 0
    before = {path: path.read_bytes() for path in Path("disk/run").rglob("*") if path.is_file()}
    ballast = fill(disk, 0)
    assert "go on with python -m haq.finetune disk/run --epochs 1" in full(capsys, finetune.main, "disk/run", "--epochs", "1")
    assert {path: path.read_bytes() for path in Path("disk/run").rglob("*") if path.is_file()} == before
    ballast.unlink()
    assert call(finetune.main, "disk/run", "--epochs", "1") == 0


def test_finished_attacks_are_kept(disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lessen(monkeypatch)
    arguments = ["disk/run", "--attacks", "fgsm,rfgsm", "--images", "32", "--workers", "1", "--defensive", "0"]
    assert call(search.main, *QUICK, "--out", "disk/run") == 0
    ballast = fill(disk, 24 * 1024)
    assert "go on with the same command again" in full(capsys, robustness.main, *arguments)
    kept = {path: path.stat().st_mtime_ns for path in Path("disk/run/robustness").iterdir()}
    assert not [path for path in kept if ".part" in path.name]
    ballast.unlink()
    assert call(robustness.main, *arguments) == 0


def test_a_training_goes_on_from_its_last_epoch(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*JOB, "--epochs", "2"]
    assert call(train.main, *arguments, "--out", "whole.safetensors") == 0
    ballast = fill(disk, 0)
    err = full(capsys, train.main, *arguments, "--out", "disk/net.safetensors")
    assert "go on with the same command and --resume" in err
    assert not Path("disk/net.safetensors").exists()
    ballast.unlink()
    assert call(train.main, *arguments, "--resume", "--out", "disk/net.safetensors") == 0
    # In the header there is the name.
    assert Path("disk/net.safetensors").stat().st_size <= Path("whole.safetensors").stat().st_size


# The thread of TensorBoard may be the one that meets the full disk.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sweep_goes_on_when_there_is_space_again(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = [*JOB, "--hw", "edge", "--budgets", "0.6,0.7", "--solvers", "random", "--evaluations", "8"]
    ballast = fill(disk, 32 * 1024)
    err = full(capsys, sweep.main, *swept, "--out", "disk/all")
    assert "go on with python -m haq.sweep --resume disk/all" in err
    ballast.unlink()
    assert call(sweep.main, "--resume", "disk/all") == 0


def test_without_a_small_disk_the_sentence_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same where nothing can be mounted: the third write fails."""
    write, count = files.write, []

    def fails(path: Path, content: str | bytes) -> None:
        count.append(path)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", fails)
        assert "go on with python -m haq.search --resume run" in full(capsys, search.main, *QUICK, "--out", "run")
    assert call(search.main, "--resume", "run") == 0


@pytest.mark.parametrize("what", ["search", "finetune"])
def test_a_read_only_folder_is_one_sentence(what: str, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "disk/run") == 0
    if what == "search":
        Path("disk/run/result.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk.resolve()], check=True)
    capsys.readouterr()
    main, arguments = {"search": (search.main, ["--resume", "disk/run"]), "finetune": (finetune.main, ["disk/run"])}[what]
    assert call(main, *arguments) == 2
    err = capsys.readouterr().err
    assert "disk/run can't be written" in err
    assert "its file system is read-only: copy it to where you may write" in err
    assert err.count("\n") == 1
    assert call(search.main, *QUICK, "--out", "disk/new") == 2
    assert "name another place with --out" in capsys.readouterr().err
    shutil.copytree("disk/run", "copy")
    assert call(main, *[argument.replace("disk/run", "copy") for argument in arguments]) == 0


def test_what_only_reads_works_in_a_read_only_folder(disk: Path) -> None:
    from haq import evaluate, runs

    assert call(search.main, *QUICK, "--out", "disk/run") == 0
    subprocess.run(["mount", "-o", "remount,ro", disk.resolve()], check=True)
    assert call(evaluate.main, "disk/run") == 0
    assert call(runs.main, "list", "disk") == 0
    assert call(runs.main, "show", "disk/run") == 0
