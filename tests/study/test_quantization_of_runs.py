"""A run says how its network is quantized, and whatever comes after the search quantizes it in just that way."""

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
from haq import deploy, evaluate, finetune, search, sweep
from haq.console.errors import run_command
from haq.problem.schemes import linear_for
from haq.study.comparison import ComparisonSpec, gather
from haq.study.config import SearchConfig
from haq.study.search_run import SearchRun
from hw_models.trust import trust
from tests.commands.test_search_command import MODULE
from tests.conftest import enter, images, small_network

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--budget", "0.6", "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    trust("small_job:network", "small_job:splits")


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def config(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(folder, "config.yaml").read_text())
    return content


def result(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return content


def same(one: nn.Module, other: nn.Module) -> bool:
    states = [{**Q.quantizer_state(network), **network.state_dict()} for network in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_problem_is_of_the_corrected_network_unless_it_is_told_otherwise() -> None:
    network = small_network()
    given = {"calibrate": images(32, 1), "search": images(8), "target": "edge", "objective": "agreement"}
    corrected = haq.Problem(network, **given)
    plain = haq.Problem(network, **given, correction=None)
    for problem, correction in ((corrected, "analytic"), (plain, None)):
        scheme = linear_for(correction, "nearest")
        expected = Q.quantize(network, problem.uniform(8), scheme=scheme, calibrate=given["calibrate"], correction=correction)
        assert same(problem.evaluator.network, expected)
    assert corrected.evaluate(corrected.uniform(3)) != plain.evaluate(plain.uniform(3))
    for wrong, message in (
        ({"correction": "sequential"}, "unknown correction 'sequential'; it can be 'analytic', or None"),
        ({"rounding": "adaround"}, "unknown rounding 'adaround'; it can be 'nearest', 'gptq'"),
    ):
        with pytest.raises(ValueError, match=message):
            haq.Problem(network, **given, **wrong)


def test_whatever_comes_after_a_search_has_its_network() -> None:
    assert call(search.main, *QUICK, "--out", "run") == 0
    settings = config("run")["settings"]
    assert (settings["correction"], settings["rounding"]) == ("analytic", "nearest")
    run = SearchRun.load(Path("run"))
    task, loaded = run.build(), run.load_network()
    searched = task.problem.quantized(run.load_policy())
    deployed, tuned = deploy._quantized(run, loaded, None)
    assert not tuned
    assert same(deployed, searched)
    assert any(layer.bias_shift is not None for layer in Q.quant_layers(deployed).values())
    assert same(gather(ComparisonSpec("run")).networks["found"], searched)
    assert same(task.problem.evaluator.prepared(run.load_policy()), searched)


def test_runs_from_before_there_was_a_correction_go_on_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--correction", "none", "--out", "run") == 0
    content = config("run")
    assert not {"correction", "rounding"} & set(content["signature"])
    for name in ("correction", "rounding"):
        del content["settings"][name]
    Path("run/config.yaml").write_text(yaml.safe_dump(content))
    loaded = SearchConfig.from_file(Path("run/config.yaml"))
    assert (loaded.correction, loaded.rounding) == ("none", "nearest")
    assert "--correction none" in loaded.command()
    capsys.readouterr()
    assert call(evaluate.main, "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["found"] == result("run")["found"]
    # As if it had been killed.
    Path("run/result.json").unlink()
    before = Path("run/history.csv").read_text()
    Path("run/history.csv").write_text("".join(before.splitlines(True)[:-2]))
    assert call(search.main, "--resume", "run") == 0
    assert Path("run/history.csv").read_text() == before


def test_sensitivities_of_another_correction_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    by_ilp = [*JOB, "--budget", "0.6", "--solver", "ilp", "--evaluations", "3", "--finetune-epochs", "0"]
    assert call(search.main, *by_ilp, "--correction", "none", "--out", "plain") == 0
    capsys.readouterr()
    assert call(search.main, *QUICK, "--sensitivity", "plain", "--out", "run") == 2
    assert "has sensitivities of another correction: its signature is None, here it is analytic" in capsys.readouterr().err


def test_a_sweep_says_it_too() -> None:
    asked = [*JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "2"]
    assert call(sweep.main, *asked, "--correction", "none", "--out", "all") == 0
    assert json.loads(Path("all/sweep.json").read_text())["asked"]["settings"]["correction"] == "none"
    assert config("all/edge-0.6-random-seed0")["settings"]["correction"] == "none"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (search.main, ["--rounding", "up"], "unknown rounding 'up'; it can be nearest, gptq, adaround"),
        (search.main, ["--correction", "exact"], "unknown correction 'exact'; it can be analytic, none"),
        (finetune.main, ["run", "--method", "brecq"], "unknown method 'brecq' of fine-tuning; it can be train, ptq"),
        (finetune.main, ["run", "--method", "ptq", "--epochs", "3"], "--epochs is of training: leave it out, or"),
        (finetune.main, ["run", "--method", "ptq", "--resume"], "--resume goes on with a training: leave it out, or"),
    ],
)
def test_what_there_is_not_is_named(main: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if main is finetune.main:
        Path("run").mkdir()
    assert call(main, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
