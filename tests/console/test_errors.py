"""Whatever ends a command, it is one sentence, and nothing beside it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from haq.console.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_command
from haq.store.lock import Unwritable

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> int:
    def main() -> int:
        raise error

    return run_command(main)


@pytest.mark.parametrize(
    ("code", "name", "sentence"),
    [
        (errno.EACCES, "run/x", "run/x can't be used: you lack the permission"),
        (errno.EROFS, "run/x", "run/x can't be used: its file system is read-only"),
        (errno.ENOTDIR, "file/x", "file/x can't be used: a part of its path is a file, not a folder"),
        (errno.EISDIR, "folder", "folder can't be used: it is a folder, where a file is expected"),
        (errno.EEXIST, "file", "file can't be used: it is a file, where a folder is expected"),
        (errno.ENAMETOOLONG, "n" * 5000, f"{'n' * 200}... can't be used: the name is too long; give a shorter one"),
        (errno.ENOSPC, None, "the output or a file can't be written: the disk is full"),
        (errno.EIO, "a\nb\x1b[31m", rf"a\nb\x1b[31m can't be used: {os.strerror(errno.EIO)}"),
    ],
)
def test_what_the_system_says_is_a_sentence(
    code: int, name: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(OSError(code, os.strerror(code), name)) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_sentence_of_ours_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    raising(Unwritable(errno.ENOSPC, "the disk is full, run can't be written"))
    raising(ConnectionError("no Ray head answers"))
    assert capsys.readouterr().err == "error: the disk is full, run can't be written\nerror: no Ray head answers\n"


def test_after_ctrl_c_another_one_ends_it_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        for end in (lambda: EXIT_INTERRUPTED, lambda: signal.raise_signal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            assert run_command(end) == EXIT_INTERRUPTED
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


CODE = "import sys; from haq.console.errors import run_command; sys.exit(run_command(lambda: {}))"


def shell(code: str, rest: str) -> subprocess.CompletedProcess[str]:
    """Run a command made of some code, which light imports are enough for, with what a shell does about its streams."""
    line = f"{sys.executable} -c {CODE.format(code)!r} {rest}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_an_output_that_takes_nothing_is_one_sentence() -> None:
    for before in ("", "PYTHONUNBUFFERED= "):
        done = subprocess.run(
            ["bash", "-c", f"{before}{sys.executable} -c {CODE.format('print(1)')!r} > /dev/full"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == EXIT_BAD_INPUT
        assert done.stderr == "error: the output or a file can't be written: the disk is full\n"


def test_files_are_not_taken_for_streams_that_are_closed(tmp_path: Path) -> None:
    opened = f"open({str(tmp_path / 'kept')!r}, chr(119)).fileno() < 3"
    assert shell(opened, "<&- 2>&-").returncode == 0
    failed = shell("int(chr(120))", "2>&-")
    assert failed.returncode == EXIT_BAD_INPUT
    assert not failed.stdout + failed.stderr
