"""What was killed goes on as if nothing had happened: the same policy, history, agent and network, to the last bit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import kills
from haq import finetune, search
from haq.solvers import agents
from haq.store.checkpoint import Checkpoint
from haq.study import search_steps
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import QUICK, SMALL, call, history, place  # noqa: F401

EVALUATIONS, WARM_UP = 16, 6  # of which an agent's first are random
AGENT = [*SMALL, "--evaluations", str(EVALUATIONS), "--finetune-epochs", "0"]
HAQ = [*AGENT, "--env", "haq"]  # whose agents keep checkpoints; all others are taught again by the history


@pytest.fixture(autouse=True)
def warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let agents of HAQ's environment be random for a shorter time, and act for the rest."""
    monkeypatch.setattr(agents, "WARM_UP", WARM_UP)


class Killed(BaseException):
    """Nobody catches it, and nothing is tidied up."""


def kill_after(patch: pytest.MonkeyPatch, owner: type, method: str, times: int) -> None:
    """End the process, as far as it can be done within one, once a method was called so many times."""
    original, calls = getattr(owner, method), []

    def called(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        calls.append(1)
        if len(calls) == times:
            raise Killed
        return result

    patch.setattr(owner, method, called)


def cut(patch: pytest.MonkeyPatch, owner: type, method: str, times: int, main: Any, *arguments: str) -> None:
    with patch.context() as patched:
        kill_after(patched, owner, method, times)
        with pytest.raises(Killed):
            call(main, *arguments)


def same(one: str, other: str) -> list[str]:
    """The files that two folders don't share byte for byte."""
    contents = [
        {key.partition("/")[2]: value for key, value in kills.endings(Path(), Path(run)).items()} for run in (one, other)
    ]
    assert "history.csv" in contents[0]
    return [name for name in {**contents[0], **contents[1]} if contents[0].get(name) != contents[1].get(name)]


# Before any checkpoint, after a checkpoint, and between an evaluation and its checkpoint.
EARLY, AFTER, LATE = (SearchRun, "record", 7), (Checkpoint, "write", 2), (SearchRun, "record", EVALUATIONS - 1)


@pytest.mark.parametrize(
    ("solver", "env", "moments"),
    [
        ("ddpg", "plan", (LATE,)),
        ("td3", "haq", (AFTER,)),
        # Each of the solvers, environments and moments is tried above with another.
        pytest.param("ddpg", "plan", (EARLY,), marks=pytest.mark.slow),
        pytest.param("td3", "plan", (EARLY, LATE), marks=pytest.mark.slow),
        pytest.param("sac", "plan", (EARLY, LATE), marks=pytest.mark.slow),
        pytest.param("ddpg", "haq", (EARLY, AFTER, LATE), marks=pytest.mark.slow),
        pytest.param("sac", "haq", (EARLY, AFTER, LATE), marks=pytest.mark.slow),
    ],
)
def test_an_agent_goes_on_from_its_last_episode(
    solver: str, env: str, moments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*AGENT, "--solver", solver, "--env", env]
    assert call(search.main, *asked, "--out", "whole") == 0
    for owner, method, times in moments:
        cut(monkeypatch, owner, method, times, search.main, *asked, "--out", "cut")
        trained: list[int] = []
        if method == "write":
            with monkeypatch.context() as patched:
                count_episodes(patched, trained)
                assert call(search.main, "--resume", "cut") == 0
            state = torch.load(f"cut/checkpoint/{solver}.state", weights_only=True)
            assert len(trained) == len(state["episodes"]) - 2  # two were learned before
        else:
            assert call(search.main, "--resume", "cut") == 0
        assert same("whole", "cut") == []
        shutil.rmtree("cut")


def count_episodes(patch: pytest.MonkeyPatch, counted: list[int]) -> None:
    from haq.solvers.agents import Learner

    learn = Learner.learn
    patch.setattr(Learner, "learn", lambda self, env: [counted.append(1), learn(self, env)][1])


def test_the_state_of_an_agent_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *HAQ, "--solver", "sac", "--out", "run") == 0
    state = torch.load("run/checkpoint/sac.state", weights_only=True)
    assert {"policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer"} <= set(state["agent"])
    assert len(state["variables"]) == 1  # log_ent_coef
    learned = set()
    for episode in state["episodes"]:
        layers = episode["policy"]["layers"]
        learned.add(tuple("-".join(str(layer[key]) for layer in layers) for key in ("weight_bits", "activation_bits")))
    assert learned <= {(row["weight_bits"], row["activation_bits"]) for row in history(Path("run"))}
    assert all(isinstance(episode["reward"], float) for episode in state["episodes"])
    assert {"draws", "numpy", "python", "torch"} <= set(state)


@pytest.mark.parametrize(
    "parts",
    [
        ("draws", "agent"),
        pytest.param(("numpy", "torch", "updates", "counts", "episodes"), marks=pytest.mark.slow),  # a search for each of them
    ],
)
def test_every_part_of_the_state_counts(parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """If a part weren't needed, or not restored, another one would do as well."""
    asked = [*HAQ, "--solver", "td3"]
    assert call(search.main, *asked, "--out", "whole") == 0
    cut(monkeypatch, Checkpoint, "write", 4, search.main, *asked, "--out", "cut")
    other = torch.load("whole/checkpoint/td3.state", weights_only=True)
    shutil.copytree("cut", "right")
    assert call(search.main, "--resume", "right") == 0
    assert same("whole", "right") == []  # so that what differs below is the part's doing
    for part in parts:
        shutil.copytree("cut", part)
        path = Path(part, "checkpoint/td3.state")
        state = torch.load(path, weights_only=True)
        assert state["asked"] == other["asked"]
        if part == "episodes":
            state["episodes"][0]["reward"] += 1.0
        elif part == "updates":
            state["updates"] += 1
        else:
            state[part] = other[part]
        torch.save(state, path)
        assert call(search.main, "--resume", part) == 0
        assert "checkpoint/td3.state" in same("whole", part), part


def test_a_checkpoint_of_another_search_is_refused_with_the_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *HAQ, "--seed", "1", "--out", "other") == 0
    cut(monkeypatch, Checkpoint, "write", 2, search.main, *HAQ, "--out", "cut")
    before = Path("cut/history.csv").read_bytes()
    shutil.copy("other/checkpoint/ddpg.state", "cut/checkpoint/ddpg.state")
    assert call(search.main, "--resume", "cut") == 2
    err = capsys.readouterr().err
    assert "cut/checkpoint/ddpg.state is of something else: seed was '1' and is '0' now" in err
    assert "delete it to start anew" in err
    assert Path("cut/history.csv").read_bytes() == before
    Path("cut/checkpoint/ddpg.state").unlink()
    assert call(search.main, "--resume", "cut") == 0
    assert call(search.main, *HAQ, "--out", "whole") == 0
    assert same("whole", "cut") == []


def test_a_checkpoint_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(monkeypatch, Checkpoint, "write", 2, search.main, *HAQ, "--out", "cut")
    state = torch.load("cut/checkpoint/ddpg.state", weights_only=True)
    del state["agent"]["critic.optimizer"]
    torch.save(state, "cut/checkpoint/ddpg.state")
    assert call(search.main, "--resume", "cut") == 2
    assert "doesn't fit what goes on from it" in capsys.readouterr().err


def test_on_another_processor_an_agent_may_go_another_way_from_its_checkpoint_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut(monkeypatch, SearchRun, "record", EVALUATIONS - 1, search.main, *HAQ, "--ahead", "3", "--out", "cut")
    state = torch.load("cut/checkpoint/ddpg.state", weights_only=True)
    rows = Path("cut/history.csv").read_text().splitlines()
    known = len(rows) - 1
    # What was chosen ahead came out otherwise there.
    state["waiting"] = state["waiting"][::-1]
    torch.save(state, "cut/checkpoint/ddpg.state")
    with caplog.at_level(logging.WARNING, "haq"):
        assert call(search.main, "--resume", "cut") == 0
    assert "goes on from evaluation" in caplog.text
    after = Path("cut/history.csv").read_text().splitlines()
    assert after[: known - 3] == rows[: known - 3]
    assert len([row for row in after if row.startswith("ddpg,")]) == EVALUATIONS
    assert len({row.split(",")[1] for row in after if row.startswith("ddpg,")}) == EVALUATIONS


def test_a_history_that_cannot_have_been_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(monkeypatch, SearchRun, "record", 20, search.main, *SMALL, "--solver", "random", "--out", "cut")
    rows = Path("cut/history.csv").read_text().splitlines()
    rows[3], rows[4] = rows[4].replace(",4,", ",3,", 1), rows[3].replace(",3,", ",4,", 1)
    Path("cut/history.csv").write_text("\n".join(rows) + "\n")
    policy = Path("cut/policy.json").read_bytes()
    assert call(search.main, "--resume", "cut") == 2
    assert "its history has" in capsys.readouterr().err
    assert Path("cut/policy.json").read_bytes() == policy


# One that goes through all of its epochs, and one that ends after two of them, as neither was better.
@pytest.mark.parametrize(("give_up_after", "done"), [(None, 3), (3, 1)])
def test_fine_tuning_within_a_search_goes_on(
    give_up_after: int | None, done: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_steps, "GIVE_UP_AFTER", give_up_after)
    asked = [*SMALL, "--solver", "greedy", "--finetune-epochs", "4"]
    assert call(search.main, *asked, "--out", "whole") == 0
    gave_up = "until it ended early, after epoch 2" in " ".join(capsys.readouterr().out.split())
    assert gave_up == (give_up_after is not None)
    cut(monkeypatch, Checkpoint, "write", done, search.main, *asked, "--out", "cut")
    assert Path("cut/checkpoint/finetuning.state").is_file()
    with monkeypatch.context() as patched:
        kill_after(patched, Checkpoint, "write", 2)  # the others were done before
        assert call(search.main, "--resume", "cut") == 0
    assert same("whole", "cut") == []


def test_the_command_that_fine_tunes_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "random", "--out", "whole") == 0
    shutil.copytree("whole", "cut")
    asked = ["--epochs", "5", "--seed", "3"]
    assert call(finetune.main, "whole", *asked) == 0
    cut(monkeypatch, Checkpoint, "write", 2, finetune.main, "cut", *asked)
    assert call(finetune.main, "cut", *asked) == 2
    assert "add --resume to go on with it, or delete it" in capsys.readouterr().err
    assert call(finetune.main, "cut", "--epochs", "6", "--seed", "3", "--resume") == 2
    assert "epochs was '5' and is '6' now" in capsys.readouterr().err
    assert call(finetune.main, "cut", *asked, "--resume") == 0
    assert same("whole", "cut") == []


@pytest.mark.slow
def test_real_kills_at_random_moments(capsys: pytest.CaptureFixture[str]) -> None:
    assert kills.main(["--kills", "2", "--jobs", "ddpg", "training", "--seed", "5"]) == 0
    assert "2 kills, 2 endings, 2 of them the same to the last bit" in " ".join(capsys.readouterr().out.split())
