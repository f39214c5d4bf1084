"""A search needs no labels: policies can be judged by how often the quantized network answers what the float network does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq import data, evaluate, finetune, search, train
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.problem import Evaluation
from haq.study.config import SearchConfig
from tests.conftest import images

MODULE = """
import torch
from haq.networks import Network
from torch import nn

def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 7)
    for parameter in layers[-1].parameters():
        parameter.data *= 5
    return Network("tiny", nn.Sequential(*layers), (3, 8, 8))
"""


def unlabelled(network: nn.Module, search: object, **options: object) -> haq.Problem:
    return haq.Problem(network, images(32, 1), search, "edge", budget=0.6, objective="agreement", **options)


@torch.inference_mode()
def by_hand(network: nn.Module, problem: haq.Problem, policy: Q.BitPolicy, inputs: Tensor) -> tuple[float, float]:
    given = {"scheme": Q.Linear("output"), "calibrate": images(32, 1), "correction": "analytic"}
    quantized = Q.quantize(network, policy, **given)(inputs).double()
    expected = network(inputs).double()
    p, q = F.softmax(expected, 1), F.softmax(quantized, 1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    return (quantized.argmax(1) == expected.argmax(1)).double().mean().item(), divergence.item()


def test_agreement_and_divergence_are_those_of_their_definitions(network: nn.Module) -> None:
    inputs = images(300)
    problem = unlabelled(network, inputs)
    for bits in (2, 3, 5):
        policy = problem.uniform(bits)
        agreement, divergence = by_hand(network, problem, policy, inputs)
        assert problem.evaluate(policy)[:3] == (pytest.approx(agreement), pytest.approx(divergence, rel=1e-4), 300)
    assert problem.evaluate(problem.uniform(2)).loss > 100 * problem.evaluate(problem.uniform(8)).loss > 0


def test_the_float_network_agrees_with_itself(network: nn.Module) -> None:
    problem = unlabelled(network, images(300))
    assert problem.float_result == Evaluation(1.0, 0.0, 300, 0.0)
    assert problem.float_accuracy == 1


def test_inputs_come_as_a_tensor_or_in_batches_with_or_without_labels(network: nn.Module) -> None:
    inputs, labels = images(40), torch.zeros(40, dtype=torch.long)
    given = [inputs, list(inputs.split(16)), (batch for batch in inputs.split(16)), (inputs, labels)]
    pairs = list(zip(inputs.split(16), labels.split(16), strict=True))
    results = []
    for judged_on in [*given, pairs]:
        problem = unlabelled(network, judged_on)
        results.append(problem.evaluate(problem.uniform(3)))
    assert len(set(results)) == 1


def test_an_agreement_to_beat_ends_early_too(network: nn.Module) -> None:
    problem = unlabelled(network, images(1000))
    assert problem.evaluator.evaluate(problem.uniform(1), beat=0.99).images < 1000


@pytest.mark.parametrize("search", [images(8), [images(8)]])
def test_accuracy_needs_labels(network: nn.Module, search: object) -> None:
    with pytest.raises(ValueError, match='no labels to tell the accuracy by: give .* or objective="agreement"'):
        haq.Problem(network, images(8), search, "edge", budget=0.6)


def test_unknown_objectives_are_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="unknown objective 'kl'; .* Known: accuracy, agreement"):
        haq.Problem(network, images(8), images(8), "edge", budget=0.6, objective="kl")
    with pytest.raises(ValueError, match="unknown objective 'kl'"):
        SearchConfig(objective="kl")


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fifty of them in folders of several depths, beside what is no image."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for number in range(50):
        place = folder / ["", "2024", "2024/summer", "other"][number % 4]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(random.integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(place / f"{number}.{'png' if number % 2 else 'PNG'}")
    (folder / "notes.txt").write_text("no image")
    (tmp_path / "tiny_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_folders_of_photographs_have_three_splits_that_never_change(photographs: Path) -> None:
    dataset = data.load(f"images:{photographs}", image_size=8)
    splits = {name: getattr(dataset, name) for name in ("train", "search", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "search": 10, "test": 10}
    paths = [path for split in splits.values() for path in split.images.paths]  # type: ignore[attr-defined]
    assert len(set(paths)) == 50
    assert len({path.parent for path in splits["train"].images.paths}) == 4
    assert splits["search"].images[torch.arange(10)].shape == (10, 3, 8, 8)
    assert data.load(f"images:{photographs}", image_size=8).search.images.paths == splits["search"].images.paths  # type: ignore[attr-defined]
    assert "no labels, 30 train / 10 search / 10 test" in dataset.describe()
    assert sorted(dataset.fair(20).tolist()) == sorted(set(dataset.fair(20).tolist()))
    assert len(dataset.fair(20)) == 20
    assert len(dataset.fair(500)) == 30


def test_missing_or_too_few_photographs_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: images:PATH wants one"):
        data.load(f"images:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="holds 0 images ending in .jpg"):
        data.load(f"images:{tmp_path}")


JOB = ["--network", "tiny_job:network", "--budget", "0.8", "--solver", "greedy", "--evaluations", "12"]


def test_a_search_on_photographs(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*JOB, "--data", f"images:{photographs}", "--objective", "agreement", "--finetune-epochs", "2", "--out", "run"]
    assert run_command(lambda: search.main(asked)) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "agreement with the float network's answers, without labels" in " ".join(out.split())
    assert "accuracy" not in out.replace("float accuracy", "accuracy")
    assert "agreement" in out
    result = json.loads(Path("run", "result.json").read_text())
    assert result["objective"] == "agreement"
    assert result["float"]["search_agreement"] == result["float"]["test_agreement"] == 1.0
    assert 0 <= result["found"]["test_agreement"] <= 1
    assert result["finetuned"] is not None
    assert not [key for key in result["found"] if "accuracy" in key]
    assert run_command(lambda: evaluate.main(["run", "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert run_command(lambda: finetune.main(["run", "--epochs", "1"])) == 0


def test_accuracy_of_photographs_is_refused(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: search.main([*JOB, "--data", f"images:{photographs}"])) == EXIT_BAD_INPUT
    assert "has no labels to tell the accuracy by: search with --objective agreement" in capsys.readouterr().err
    options = ["--network", "tiny_job:network", "--data", f"images:{photographs}", "--out", "t.safetensors"]
    assert run_command(lambda: train.main(options)) == EXIT_BAD_INPUT
    assert "has no labels to train by" in capsys.readouterr().err


def test_labels_play_no_part_where_there_are_some(network: nn.Module) -> None:
    problem = unlabelled(network, (images(96), torch.full((96,), 99)))
    assert problem.evaluate(problem.uniform(8)).accuracy > 0.9
