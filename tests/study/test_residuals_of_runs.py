"""What additions and average pools take is a part of what a run evaluates, fine-tunes, saves, reports and deploys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import haq
import quantizers as Q
from haq import deploy, evaluate, report, search, sweep
from haq.console.errors import run_command
from haq.networks import load_quantized
from haq.problem.evaluator import Evaluator
from haq.study.comparison import ComparisonSpec, gather
from haq.study.config import SearchConfig
from haq.study.residuals import with_residuals
from haq.study.search_run import SearchRun
from haq.study.workers import moving
from hw_models.trust import trust
from tests.conftest import brightest, enter, images

MODULE = """
from haq.networks import Network
from tests.conftest import brightest, images
from tests.study.test_residuals_of_runs import residual_network

def splits():
    parts = {name: images(count, seed) for seed, (name, count) in enumerate((("train", 64), ("search", 64), ("test", 64)))}
    return {name: (x, brightest(x)) for name, x in parts.items()}

def network():
    return Network("residual", residual_network(), (1, 8, 8))
"""
JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def residual_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), Residual(), Residual()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)).eval()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    trust("small_job:network", "small_job:splits")


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def result(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return content


def problem(**options: Any) -> haq.Problem:
    x = images(64, 1)
    return haq.Problem(residual_network(), calibrate=images(32), search=(x, brightest(x)), target="edge", **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = [{**Q.quantizer_state(network), **network.state_dict()} for network in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_problem_evaluates_them() -> None:
    with_8, plain = problem(residuals=8), problem()
    assert (with_8.residuals, plain.residuals) == (8, None)
    policy = plain.uniform(4)
    assert with_8.evaluate(policy).loss != plain.evaluate(policy).loss
    # What policies are held against stays the float network.
    assert with_8.float_result == plain.float_result
    assert len(Q.residual_quantizers(with_8.quantized(policy))) == 5
    assert "8 bits at the operands" in with_8._repr_html_()


def test_what_is_kept_between_evaluations_changes_nothing() -> None:
    made = problem(residuals="8")
    evaluator = made.evaluator
    assert evaluator.prefix is not None
    assert not evaluator.prefix.copied
    policies = [made.uniform(bits) for bits in (8, 4, 3)]
    names = made.workload.names
    policies += [Q.BitPolicy({**made.uniform(4), names[-2]: (bits, bits)}) for bits in (2, 8)]
    afresh = Evaluator(evaluator.network, evaluator.samples, teacher=made.network, objective=made.objective, kept_bytes=0)
    afresh.__dict__["prefix"] = None
    elsewhere = moving.load(moving.dumps(evaluator))
    for policy in policies:
        found = made.evaluate(policy)
        assert found == afresh.evaluate(policy)
        assert found == elsewhere.evaluate(policy)


@pytest.mark.parametrize("width", [4, True, "int8"])
def test_other_widths_are_refused(width: Any) -> None:
    with pytest.raises(ValueError, match="it can be 8, or 'float'"):
        problem(residuals=width)


def test_whatever_comes_after_a_search_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*QUICK[:-1], "1", "--residuals", "8"]
    assert call(search.main, *asked, "--out", "run") == 0
    assert "8 bits at the operands of additions and the inputs of average pools, 5 tensors" in " ".join(
        capsys.readouterr().out.split()
    )
    content = yaml.safe_load(Path("run/config.yaml").read_text())
    assert content["settings"]["residuals"] == content["signature"]["residuals"] == "8"
    assert result("run")["residuals"] == 8

    run = SearchRun.load(Path("run"))
    task, loaded = run.build(), run.load_network()
    policy = run.load_policy()
    assert same(loaded.quantized(policy, run.schemes(list(policy))), task.problem.quantized(policy))
    tuned = run.load_checkpoint(loaded)
    assert tuned is not None
    assert len(Q.residual_quantizers(tuned)) == 5
    assert len(Q.residual_quantizers(gather(ComparisonSpec("run", uniform=(), beta=0)).networks["found"])) == 5
    assert same(tuned, load_quantized(Path("run/checkpoint/quantized.safetensors"), loaded.network.module))
    capsys.readouterr()
    assert call(evaluate.main, "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["finetuned"] == result("run")["finetuned"]
    assert call(report.main, "run") == 0
    assert "Additions and average pools take 8 bits" in Path("run/report.html").read_text()


def test_a_killed_search_goes_on_to_the_same_bytes() -> None:
    asked = [*QUICK, "--residuals", "8", "--out", "run"]
    assert call(search.main, *asked) == 0
    before = Path("run/history.csv").read_text()
    Path("run/result.json").unlink()
    Path("run/history.csv").write_text("".join(before.splitlines(True)[:-2]))
    assert call(search.main, "--resume", "run") == 0
    assert Path("run/history.csv").read_text() == before


def test_runs_without_them_are_of_float_and_nothing_is_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    by_ilp = [*JOB, "--budget", "0.6", "--solver", "ilp", "--evaluations", "3", "--finetune-epochs", "0"]
    assert call(search.main, *by_ilp, "--out", "plain") == 0
    content = yaml.safe_load(Path("plain/config.yaml").read_text())
    assert "residuals" not in content["settings"]
    assert "residuals" not in result("plain")
    loaded = SearchConfig.from_file(Path("plain/config.yaml"))
    assert loaded.residuals == "float"
    assert "--residuals" not in loaded.command()
    capsys.readouterr()
    assert call(search.main, *QUICK, "--residuals", "8", "--sensitivity", "plain", "--out", "run") == 2
    assert "has sensitivities of another residuals: its signature is None, here it is 8" in capsys.readouterr().err
    assert call(search.main, *QUICK, "--residuals", "4") == 2
    assert "--residuals is '4'; it can be 8 or float" in capsys.readouterr().err
    assert call(sweep.main, *JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "2",
                "--residuals", "8", "--out", "all") == 0  # fmt: skip
    cell = yaml.safe_load(Path("all/edge-0.6-random-seed0/config.yaml").read_text())
    assert cell["settings"]["residuals"] == "8"


def test_a_run_in_float_is_deployed_with_them_and_says_what_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "run") == 0
    run = SearchRun.load(Path("run"))
    loaded = run.load_network()
    network, _ = deploy._quantized(run, loaded, None)
    other = with_residuals(loaded, network, "8")
    assert len(Q.residual_quantizers(other.network)) == 5
    assert not Q.residual_quantizers(network)
    assert set(other.values) == {"8", "float"}
    assert [name for name, _ in other.rows] == ["test accuracy, residuals in float", "test accuracy, residuals of 8 bits"]
    assert other.values["float"] == result("run")["found"]["test_accuracy"]
    x = images(8)
    back = with_residuals(loaded, other.network, "float")
    assert torch.equal(back.network(x), network(x))
    assert with_residuals(loaded, network, "float").network is network
