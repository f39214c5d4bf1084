"""A network that can't be called with the inputs alone is searched through a function of the user's: `--forward`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from haq import evaluate, report, search, train
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.study.search_run import SearchRun
from haq.study.task import SearchTask
from tests.conftest import enter

MODULE = """
import torch
from torch import nn
from torch.utils.data import StackDataset

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        self.both, self.out = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, pair, flag):
        x, y = pair
        both = torch.cat([self.first(x), self.second(y)], 1).relu()
        return {"of the pair": self.out(self.both(both).relu()), "flag": flag}

def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Two().eval()

def run(network, batch):
    inputs, _ = batch
    return network(inputs, flag=True)["of the pair"]

def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 200, 8, generator=generator)
    with torch.no_grad():
        labels = run(network(), ((x, y), None)).argmax(1)
    parts = {"train": slice(0, 100), "search": slice(100, 150), "test": slice(150, 200)}
    return {name: StackDataset(StackDataset(x[part], y[part]), labels[part]) for name, part in parts.items()}

number = 3
"""
JOB = ["--network", "small_job:network", "--data", "small_job:data", "--budget", "0.9", "--solver", "random"]
JOB += ["--evaluations", "2", "--finetune-epochs", "1"]


def test_a_run_is_of_what_forward_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    assert run_command(lambda: search.main([*JOB, "--forward", "small_job:run", "--out", "run"])) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["float"]["test_accuracy"] == 1
    run = SearchRun.load(Path("run"))
    task = SearchTask.build(run.config)
    quantized = task.problem.quantized(run.load_policy())
    (x, y), labels = task.dataset.test.take(torch.arange(50))
    with torch.no_grad():
        right = quantized((x, y), flag=True)["of the pair"].argmax(1) == labels
    assert result["found"]["test_accuracy"] == float(right.double().mean())
    trust = [word for name in ("network", "data", "run") for word in ("--trust", f"small_job:{name}")]
    assert run_command(lambda: evaluate.main(["run", *trust])) == 0
    assert run_command(lambda: report.main(["run"])) == 0


@pytest.mark.parametrize(("name", "reason"), [("small_job:number", "must be a function"), ("small_job:nothing", "nothing")])
def test_it_must_be_a_function(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    assert run_command(lambda: search.main([*JOB, "--forward", name, "--out", "run"])) == EXIT_BAD_INPUT
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not Path("run/history.csv").exists()


def test_a_training_calls_it_and_names_it_to_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = "{name: StackDataset(StackDataset(x[part], y[part]), labels[part]) for name, part in parts.items()}"
    enter(tmp_path, monkeypatch, MODULE.replace(splits, f"{splits[:-1]} if name != 'search'}}"))
    asked = [*JOB[:4], "--forward", "small_job:run", "--search-images", "30", "--memory", "1MB", "--epochs", "1"]
    assert run_command(lambda: train.main([*asked, "--out", "trained.safetensors"])) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "70 train / 30 search / 50 test samples" in said
    assert "--search-images 30 --memory 1MB --forward small_job:run" in said
    assert run_command(lambda: train.main([*asked, "--memory", "much", "--out", "other.safetensors"])) == EXIT_BAD_INPUT


def test_samples_that_are_no_images_are_called_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE.replace(".argmax(1)", ".argmin(1)"))
    assert run_command(lambda: search.main([*JOB, "--forward", "small_job:run", "--out", "run"])) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "50 samples of the search split, and guessing gives" in said
    assert "train samples that were held out" in said
    assert "images" not in said


def test_an_objective_that_nothing_can_be_finetuned_by_is_said_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = """
import haq
class Judge(haq.Objective):
    name = "judge"
    distribution = None
"""
    enter(tmp_path, monkeypatch, MODULE + judge)
    asked = [*JOB, "--forward", "small_job:run", "--objective", "small_job:Judge"]
    assert run_command(lambda: search.main([*asked, "--out", "run"])) == EXIT_BAD_INPUT
    assert "search with --finetune-epochs 0" in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()
