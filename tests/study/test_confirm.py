"""`--confirm N`: the best few policies are judged again on samples that nothing else of the search has seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from haq import data, evaluate, runs, search, training
from haq.console.errors import run_command
from haq.data.dataset import Split
from haq.study.config import SearchConfig
from haq.study.task import CALIBRATION, SearchTask, set_apart
from tests.conftest import enter, images

COUNT = 640
MODULE = f"""
import torch
from haq.networks import Network
from tests.conftest import images, small_network

def splits():
    network = small_network()
    parts = {{}}
    for seed, (name, count) in enumerate((("train", {COUNT}), ("search", 48), ("test", 48))):
        x = images(count, seed)
        with torch.no_grad():
            y = network(x).argmax(1)
        y[:4] = torch.arange(4)
        parts[name] = (x, y)
    return parts

def network():
    return Network("small", small_network(), (1, 8, 8))
"""
ASKED = ["--network", "small_job:network", "--data", "small_job:splits", "--budget", "0.6", "--solver", "random"]
ASKED += ["--evaluations", "6", "--finetune-epochs", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def small(count: int = COUNT, groups: torch.Tensor | None = None) -> data.Dataset:
    """A data set whose images are numbered by their first pixel."""
    numbered = torch.zeros(count, 1, 8, 8)
    numbered[:, 0, 0, 0] = torch.arange(count).float()
    labels = torch.arange(count) % 4
    other = Split(images(16, 1), torch.arange(16) % 4)
    return data.Dataset("small", ("a", "b", "c", "d"), Split(numbered, labels, groups), other, other)


def numbers(split: Split) -> set[int]:
    return set(split.images[:, 0, 0, 0].int().tolist())


def test_what_is_set_apart_is_used_by_nothing_else() -> None:
    dataset = small()
    rest, apart = set_apart(dataset, 40)
    assert len(apart) == 40
    assert numbers(rest) | numbers(apart) == set(range(COUNT))
    assert not numbers(rest) & numbers(apart)
    assert not set(dataset.fair(CALIBRATION).tolist()) & numbers(apart)
    # What fine-tuning trains on, and what it judges by, are parts of the rest.
    assert not any(numbers(part) & numbers(apart) for part in training.hold_out(rest))
    assert apart.labels.bincount().tolist() == [10, 10, 10, 10]
    assert numbers(set_apart(dataset, 40)[1]) == numbers(apart)


def test_whole_groups_are_set_apart() -> None:
    """Those of which calibration has a sample stay, so that no group is on both sides."""
    # Of so many samples calibration takes some of every group, but for those that nobody drew.
    groups = torch.arange(2000) // 2
    dataset = small(2000, groups)
    rest, apart = set_apart(dataset, 50)
    assert len(apart) >= 50
    assert not set(rest.groups.tolist()) & set(apart.groups.tolist())  # type: ignore[union-attr]
    calibrated = groups[dataset.fair(CALIBRATION)]
    assert not set(calibrated.tolist()) & set(apart.groups.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize(("count", "asked", "words"), [(COUNT, 65, "at most 64"), (300, 1, "leave it out")])
def test_too_few_samples_are_one_sentence(count: int, asked: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"--confirm is {asked}, .*{words}"):
        set_apart(small(count), asked)


@pytest.mark.slow
def test_a_run_says_what_confirmed_its_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *ASKED, "--confirm", "40", "--out", "run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "on 40 images of the train split" in printed
    assert "on 40 further images" in printed
    result = json.loads(Path("run/result.json").read_text())
    assert result["choice"]["confirmed"] == 40
    assert SearchConfig.from_file(Path("run/config.yaml")).confirm == 40
    assert json.loads(Path("run/policy.json").read_text()) == result["policy"]
    # The search itself is the same as without.
    assert call(search.main, *ASKED, "--out", "plain") == 0
    assert Path("plain/history.csv").read_bytes() == Path("run/history.csv").read_bytes()
    assert "confirm" not in Path("plain/config.yaml").read_text()
    capsys.readouterr()
    assert call(runs.main, "show", "run") == 0
    assert "on 40 further images" in " ".join(capsys.readouterr().out.split())
    assert call(evaluate.main, "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["choice"] == result["choice"]
    # Killed before the choice was written, it comes out the same.
    shutil.copytree("run", "killed")
    for name in ("result.json", "policy.json", "policy.png"):
        Path("killed", name).unlink()
    assert call(search.main, "--resume", "killed") == 0
    for name in ("result.json", "policy.json", "history.csv"):
        assert Path("killed", name).read_bytes() == Path("run", name).read_bytes(), name


def test_an_objective_with_samples_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path("small_job.py")
    source.write_text(source.read_text() + "\n\ndef own(network):\n    return 1.0\n\nown.higher_is_better = True\n")
    assert call(search.main, *ASKED, "--objective", "small_job:own", "--confirm", "10", "--out", "run") == 2
    assert "leave --confirm out" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_task_trains_on_what_is_left() -> None:
    config = SearchConfig.from_options(
        {"network": "small_job:network", "data": "small_job:splits", "hw": "edge", "confirm": 30}
    )
    task = SearchTask.build(config)
    assert len(task.to_train_on) == COUNT - 30
    assert task.confirm is not None
    assert task.confirm.count == 30
    assert task.signature() == SearchTask.build(config.replace(confirm=None)).signature()
