"""`haq pretrain` writes an agent; searches and sweeps start from it, and go on only with the same one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

import hw_models
from haq import pretrain, search, sweep
from haq.console.errors import run_command
from haq.solvers.agent_file import AgentFile
from haq.study.search_run import SearchRun
from tests.commands.test_robustness_command import MODULE
from tests.conftest import enter

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--evaluations", "4", "--finetune-epochs", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of an agent that knows next to nothing."""
    path = tmp_path_factory.mktemp("made") / "ddpg.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hw_models, "target_names", lambda: ["edge", "cloud"])
        assert pretrain.main(["--on", "synthetic:2", "--episodes", "64", "--out", str(path), "-q"]) == 0
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    """An empty current folder with a small job and an agent in it."""
    enter(tmp_path, monkeypatch, MODULE)
    monkeypatch.setattr(hw_models, "target_names", lambda: ["edge", "cloud"])
    Path("agent.safetensors").write_bytes(made.read_bytes())


def another() -> None:
    """Put another agent in the place of the one that is there."""
    agent = AgentFile.read(Path("agent.safetensors"))
    tensors = {name: tensor + 1e-3 for name, tensor in agent.tensors.items()}
    dataclasses.replace(agent, tensors=tensors).write(Path("agent.safetensors"))


def test_the_command_says_how_well_the_agent_does_and_writes_the_same_again(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--on", "synthetic:2", "--episodes", "64", "--out", "again.safetensors", "--json"]
    assert pretrain.main(words) == 0
    told, errors = capsys.readouterr()
    found = json.loads(told)
    assert found["agent"]["trained_on"] == ["synthetic:2"]
    assert found["agent"]["episodes"] == 64
    assert [row["word"] for row in found["problems"]] == ["synthetic:2"]
    assert "beside the plan" in " ".join(errors.split())
    assert Path("again.safetensors").read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "nothing"], "'nothing' is no problem to train on"),
        (["--on", "synthetic:0"], "must be synthetic:N"),
        (["--on", "synthetic:1,synthetic:1"], "is there twice"),
        (["--on", "small_job.npz"], "there is no small_job.npz"),
        (["--on", "synthetic:1,"], "'' is no problem to train on"),
        (["--solver", "ppo"], "unknown agent 'ppo'; --solver can be ddpg, td3, sac"),
        (["--episodes", "0"], "--episodes is 0; it must be an integer of at least 1"),
        (["--seed", "4294967296"], "--seed is 4294967296"),
        (["--out", "agent.zip"], "its name must end in .safetensors"),
        (["--out", "agent.safetensors"], "agent.safetensors is there already and is not overwritten"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    before = Path("agent.safetensors").read_bytes()
    assert run_command(lambda: pretrain.main(words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert error.count("error:") == 1
    assert Path("agent.safetensors").read_bytes() == before
    assert not Path("ddpg-agent.safetensors").exists()


def test_a_run_remembers_its_agent_and_goes_on_only_with_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "--solver", "ddpg", "--agent", "agent.safetensors"]
    assert search.main([*words, "--out", "whole"]) == 0
    began = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert began["settings"]["agent"] == "agent.safetensors"
    assert began["signature"]["agent"] == AgentFile.read(Path("agent.safetensors")).checksum
    assert "--agent agent.safetensors" in began["command"]

    record, count = SearchRun.record, []

    def killed(*given: object, **named: object) -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        record(*given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", killed)
        assert search.main([*words, "--out", "cut"]) == 130
    before = Path("agent.safetensors").read_bytes()
    another()
    capsys.readouterr()
    assert run_command(lambda: search.main(["--resume", "cut"])) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the agent (agent.safetensors) is no longer what cut began with" in error
    Path("agent.safetensors").unlink()
    assert run_command(lambda: search.main(["--resume", "cut"])) == 2
    assert "was asked for with --agent agent.safetensors, and there is no" in " ".join(capsys.readouterr().err.split())
    Path("agent.safetensors").write_bytes(before)
    assert search.main(["--resume", "cut"]) == 0
    assert Path("cut/history.csv").read_bytes() == Path("whole/history.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "random"], "solver 'random' is no agent that could start from agent.safetensors"),
        (["--solver", "surrogate"], "solver 'surrogate' is no agent"),
        (["--solver", "td3"], "is a pretrained ddpg, from which td3 can't start"),
        (["--solver", "ddpg", "--env", "haq"], "knows what --env plan shows, and --env haq shows something else"),
        (["--solver", "ddpg", "--agent", "none.safetensors"], "there is no none.safetensors"),
    ],
)
def test_a_search_that_cannot_start_from_it_says_so_and_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run_command(lambda: search.main([*QUICK, "--agent", "agent.safetensors", *words, "--out", "run"])) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


def test_agents_of_a_sweep_start_from_it_and_others_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*JOB, "--hw", "edge", "--budgets", "0.6", "--evaluations", "4", "--agent", "agent.safetensors"]
    assert sweep.main([*words, "--solvers", "random,ddpg", "--out", "sweep"]) == 0
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in Path("sweep").glob("*/config.yaml")}
    assert configs["edge-0.6-ddpg-seed0"]["settings"]["agent"] == "agent.safetensors"
    assert "agent" not in configs["edge-0.6-random-seed0"]["settings"]
    assert "agent" not in configs["edge-0.6-random-seed0"]["signature"]
    asked = json.loads(Path("sweep/sweep.json").read_text())
    assert asked["signature"]["agent of edge"] == AgentFile.read(Path("agent.safetensors")).checksum
    capsys.readouterr()
    assert run_command(lambda: sweep.main([*words, "--solvers", "random", "--out", "none"])) == 2
    assert "solver 'random' is no agent" in " ".join(capsys.readouterr().err.split())
    assert run_command(lambda: sweep.main([*words, "--solvers", "ddpg,td3", "--out", "none"])) == 2
    assert "from which td3 can't start" in " ".join(capsys.readouterr().err.split())
    assert not Path("none").exists()


def test_a_file_that_is_no_agent_ends_a_search_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    agent = AgentFile.read(Path("agent.safetensors"))
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in agent.tensors.items()}
    dataclasses.replace(agent, tensors=tensors).write(Path("agent.safetensors"))
    words = [*QUICK, "--solver", "ddpg", "--agent", "agent.safetensors", "--out", "run"]
    assert run_command(lambda: search.main(words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "agent.safetensors holds values that are not finite in actor/mu.0.bias" in error
    assert not Path("run").exists()
