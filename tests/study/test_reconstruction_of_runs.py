"""A policy that was found is reconstructed without labels, by haq finetune --method ptq, or at the end of its search."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import quantizers as Q
from haq import deploy, evaluate, finetune, report, search, sweep, training
from haq.study.search_run import SearchRun
from haq.training.config import Judgement
from hw_models.trust import trust
from tests.commands.test_search_command import MODULE
from tests.conftest import enter
from tests.study.test_quantization_of_runs import JOB, QUICK, call, result, same


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE.replace('("train", 64)', '("train", 200)'))
    trust("small_job:network", "small_job:splits")
    monkeypatch.setattr("haq.training.reconstruction.ITERATIONS", 12)


def kept_or_not(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    """Decide whether what is judged later beats what was judged before."""
    monkeypatch.setattr(Judgement, "beats", lambda self, other: better)


def test_a_network_is_reconstructed_and_everything_after_takes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_or_not(monkeypatch, True)
    assert call(search.main, *QUICK, "--bits", "2:4", "--correction", "none", "--out", "run") == 0
    found = result("run")
    capsys.readouterr()
    assert call(finetune.main, "run", "--method", "ptq") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"after ptq \d", out)
    assert "calibration images, no labels, seed 0" in out
    entry = result("run")["reconstruction"]
    assert entry["kept"]
    assert entry["divergence_after"] < entry["divergence_before"]
    assert entry["images"] + entry["calibration_images"] == 200
    assert (result("run")["finetuned_by"], result("run")["found"]) == ("ptq", found["found"])
    run = SearchRun.load(Path("run"))
    task = run.build()
    network = run.load_checkpoint(task)
    assert network is not None
    layers = Q.quant_layers(network).values()
    assert all(layer.tailored for layer in layers)
    assert not same(network, task.problem.quantized(run.load_policy()))
    # Measured and deployed is that very network.
    assert call(evaluate.main, "run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["finetuned"] == result("run")["finetuned"]
    assert again["reconstruction"] == entry
    assert call(deploy.main, "run", "--to", "onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_answers"]
    assert call(deploy.main, "run", "--to", "onnx") == 0
    assert "(after ptq)" in capsys.readouterr().out
    assert call(report.main, "run") == 0
    assert "After ptq" in Path("run/report.html").read_text()


def test_it_is_the_same_again_and_only_what_is_better_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(search.main, *QUICK, "--bits", "3:4", "--out", "run") == 0
    task = SearchRun.load(Path("run")).build()
    policy = SearchRun.load(Path("run")).load_policy()
    kept_or_not(monkeypatch, True)
    one, other = (task.reconstruct(policy, 3) for _ in range(2))
    assert same(one.network, other.network)
    assert one[1:5] == other[1:5]
    kept_or_not(monkeypatch, False)
    assert same(task.reconstruct(policy, 3).network, task.problem.quantized(policy))
    assert call(finetune.main, "run", "--method", "ptq") == 0
    assert "that is no better, and the network before was kept" in " ".join(capsys.readouterr().out.split())
    # A network that was fine-tuned earlier stays where ptq doesn't beat it.
    assert call(finetune.main, "run", "--epochs", "1") == 0
    assert "earlier" in result("run")["tuning"]
    assert result("run")["finetuned_by"] == "ptq"


def test_a_search_ends_with_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept_or_not(monkeypatch, True)
    asked = [*QUICK, "--bits", "3:4", "--rounding", "adaround"]
    assert call(search.main, *asked, "--finetune-epochs", "1", "--out", "run") == 0
    assert "rounded by GPTQ; biases get the analytic correction" in " ".join(capsys.readouterr().out.split())
    both = result("run")
    assert both["reconstruction"]["kept"]
    assert both["tuning"]["before"] == both["reconstruction"]["after"]
    task = SearchRun.load(Path("run")).build()
    expected = task.quantized(task.problem.uniform(8), task.problem.schemes)
    assert same(task.problem.evaluator.network, expected)


@pytest.mark.slow  # what a search does is tested above
def test_so_does_every_search_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_or_not(monkeypatch, True)
    sweeping = [*JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "2"]
    assert call(sweep.main, *sweeping, "--bits", "3:4", "--rounding", "adaround", "--out", "all") == 0
    assert result("all/edge-0.6-random-seed0")["finetuned_by"] == "ptq"


def test_training_starts_from_what_the_search_judged() -> None:
    """The correction is part of the network that is trained, and its answers before the first step are those of the search."""
    assert call(search.main, *QUICK, "--bits", "3:4", "--out", "run") == 0
    run = SearchRun.load(Path("run"))
    task = run.build()
    judged = []
    training.finetune(
        task.network,
        task.problem.quantized(run.load_policy()),
        task.dataset.train,
        epochs=1,
        seed=0,
        on_judged=lambda epoch, judgement: judged.append(judgement),
    )
    held = training.hold_out(task.dataset.train)[1]
    expected = training.judge_of(task.network, held)(task.problem.evaluator.prepared(run.load_policy()))
    assert judged[0] == expected
    with torch.no_grad():
        assert judged[0].loss > 0


def test_schemes_whose_rounding_cannot_be_learned_are_refused_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--scheme", "lsq", "--rounding", "adaround", "--out", "refused") == 2
    assert "rounding 'adaround' means nothing to scheme 'lsq' of layer" in " ".join(capsys.readouterr().err.split())
    assert not Path("refused").exists()
