"""The folder of a run may be renamed and copied elsewhere: it still is all that it takes to go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from haq import deploy, evaluate, finetune, networks, search, sweep
from haq.console import errors
from haq.study.search_run import SearchRun
from tests.commands.test_robustness_command import MODULE
from tests.conftest import enter

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--evaluations", "12", "--finetune-epochs", "1", "--solver", "random"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def call(main: Any, *arguments: str) -> int:
    return errors.run_command(lambda: main(list(arguments)))


def cut(monkeypatch: pytest.MonkeyPatch, after: int, main: Any, *arguments: str) -> None:
    """A command that is interrupted after some evaluations."""
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        count.append(1)
        if len(count) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", interrupted)
        assert call(main, *arguments) == errors.EXIT_INTERRUPTED


def test_a_run_that_was_moved_goes_on_as_if_nothing_had_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *QUICK, "--out", "whole") == 0
    cut(monkeypatch, 7, search.main, *QUICK, "--out", str(Path("cut").resolve()))
    Path("far/away").mkdir(parents=True)
    shutil.move("cut", "far/away/moved")
    assert call(search.main, "--resume", "far/away/moved") == 0
    for file in ("policy.json", "history.csv", "result.json", "problem.json"):
        assert Path("whole", file).read_bytes() == Path("far/away/moved", file).read_bytes()
    shutil.copytree("far/away/moved", "copy")
    shutil.rmtree("far")
    for main, options in ((evaluate.main, []), (finetune.main, ["--epochs", "1"]), (deploy.main, ["--to", "onnx"])):
        assert call(main, "copy", *options) == 0


def test_its_sensitivities_move_along(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = [*QUICK, "--solver", "ilp", "--evaluations", "40", "--finetune-epochs", "0"]
    assert call(search.main, *measuring, "--out", "measured") == 0
    given = [*QUICK, "--solver", "ddpg", "--sensitivity", str(Path("measured").resolve())]
    assert call(search.main, *given, "--out", "whole") == 0
    cut(monkeypatch, 5, search.main, *given, "--out", "cut")
    shutil.rmtree("measured")
    shutil.move("cut", "moved")
    assert call(search.main, "--resume", "moved") == 0
    assert Path("whole/history.csv").read_bytes() == Path("moved/history.csv").read_bytes()


def test_a_sweep_that_was_moved_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = [*JOB, "--hw", "edge,cloud", "--budgets", "0.6", "--solvers", "greedy,random", "--evaluations", "12"]
    assert call(sweep.main, *swept, "--out", "whole") == 0
    cut(monkeypatch, 20, sweep.main, *swept, "--out", str(Path("cut").resolve()))
    shutil.move("cut", "moved")
    assert call(sweep.main, "--resume", "moved") == 0
    one, other = (json.loads(Path(name, "sweep.json").read_text()) for name in ("whole", "moved"))
    assert one == other


def test_files_that_it_names_by_relative_paths_are_asked_for_where_they_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from small_job import network  # type: ignore[import-not-found]

    networks.save_checkpoint(network(), Path("net.safetensors"))
    target = Path(__file__).parents[2] / "hw_models" / "targets" / "edge.yaml"
    shutil.copy(target, "mine.yaml")
    arguments = [*QUICK, "--network", "small_job:network@net.safetensors", "--hw", "mine.yaml", "--out", "run"]
    cut(monkeypatch, 5, search.main, *arguments)
    (tmp_path / "other").mkdir()
    shutil.move("run", "other/run")
    monkeypatch.chdir("other")
    capsys.readouterr()
    for name, main, options in (
        ("network small_job:network@net.safetensors", search.main, ["--resume", "run"]),
        ("hw mine.yaml", search.main, ["--resume", "run"]),
    ):
        before = {path: path.read_bytes() for path in Path("run").iterdir() if path.name != ".lock"}
        assert call(main, *options) == 2
        err = capsys.readouterr().err
        assert f"run was asked for with --{name}, and there is no {name.rpartition('@')[2].rpartition(' ')[2]} in " in err
        assert "paths are relative to where the search was started; go on from there, or put it here" in err
        assert err.count("\n") == 1
        assert {path: path.read_bytes() for path in Path("run").iterdir() if path.name != ".lock"} == before
        shutil.copy("../net.safetensors", ".")
    shutil.copy("../mine.yaml", ".")
    assert call(search.main, "--resume", "run") == 0


def test_what_a_kill_left_out_as_the_folder_was_made_is_written_on_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *QUICK, "--out", "whole") == 0
    shutil.copytree("whole", "cut")
    for path in Path("cut").iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert call(search.main, "--resume", "cut") == 0
    for file in ("policy.json", "history.csv", "result.json", "problem.json"):
        assert Path("whole", file).read_bytes() == Path("cut", file).read_bytes()
