"""Every scheme from a search to what is deployed: found, fine-tuned, measured again, shown, read back, written or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import haq
import quantizers as Q
from haq import deploy, evaluate, finetune, report, search, sweep
from haq.console.errors import run_command
from tests.commands.test_search_command import MODULE, SMALL
from tests.conftest import enter, small_network

ASKED = [*SMALL[:4], "--solver", "ilp", "--evaluations", "30", "--finetune-epochs", "1", "--out", "run"]
# Options of a search, and whether what it finds can be deployed.
SCHEMES: dict[str, tuple[list[str], bool]] = {
    "linear": (["--budget", "0.6"], True),
    "lsq": (["--budget", "0.6"], True),
    "pact": (["--budget", "0.6", "--bits", "2:7"], True),
    "dorefa": (["--budget", "0.6", "--bits", "2:7"], True),
    "binary": (["--budget", "0.6", "--bits", "1:8"], True),
    "kmeans": (["--budget", "0.9", "--metric", "storage"], False),
    "lsqplus": (["--budget", "0.9", "--metric", "storage"], False),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_from_end_to_end(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, deployable = SCHEMES[name]
    assert call(search.main, *ASKED, *options, "--scheme", name, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    if not deployable:
        # It is told before the search begins.
        assert "can't be deployed" in " ".join(printed.err.split())

    # The file holds the scheme of every layer: first and last stay linear.
    network = haq.load("run/checkpoint/quantized.safetensors", network=small_network())
    names = {layer: part.scheme.name for layer, part in Q.quant_layers(network).items()}
    ends = ("stem", "classifier")
    assert {names[layer] for layer in names if layer not in ends} == {name}
    assert {names[layer] for layer in ends} == {"linear"}
    assert Q.get_policy(network) == Q.BitPolicy.from_json("run/policy.json")

    # Measured again from its files, it is what it was.
    assert call(evaluate.main, "run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["found"], again["finetuned"]) == (found["found"], found["finetuned"])

    assert call(finetune.main, "run", "--epochs", "1", "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["found"] == found["found"]
    assert call(report.main, "run") == 0
    assert name in Path("run/report.html").read_text(encoding="utf-8")
    capsys.readouterr()

    if deployable:
        assert call(deploy.main, "run", "--to", "onnx") in (0, 1)
        assert Path("run/network.onnx").is_file()
    else:
        assert call(deploy.main, "run", "--to", "onnx") == 2
        assert f"scheme '{name}'" in capsys.readouterr().err
        assert not Path("run/network.onnx").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--scheme", "lsq", "--bits", "1:8"], "2:8"),
        (["--scheme", "kmeans"], "choose --metric storage"),
        (["--scheme", "lsqplus", "--metric", "energy"], "choose --metric storage"),
        (["--scheme", "lsqq"], "did you mean lsq"),
        (["--scheme", "linear,nowhere=lsq"], "nowhere"),
    ],
)
def test_what_a_scheme_cannot_do_is_said_before_the_search(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *ASKED, "--budget", "0.6", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_widths_that_cannot_be_deployed_are_told_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    for command, asked in ((search.main, ["--budget", "0.6"]), (sweep.main, ["--hw", "edge", "--budgets", "0.6"])):
        assert call(command, *SMALL[:4], *asked, "--scheme", "pact", "--dry-run") == 0
        assert "weights of 8 bits in pact can't be deployed" in " ".join(capsys.readouterr().out.split())
        assert call(command, *SMALL[:4], *asked, "--scheme", "pact", "--bits", "2:7", "--dry-run") == 0
        assert "can't be deployed" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "steps", "told"), [("pact", "0", True), ("pact", "2", False), ("lsq", "0", False)])
def test_it_is_told_that_policies_of_a_scheme_for_training_are_judged_untrained(
    name: str, steps: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*SMALL, "--scheme", name, "--finetune-steps", steps, "--dry-run"]
    assert call(search.main, *asked) == 0
    assert ("judged untrained" in " ".join(capsys.readouterr().out.split())) == told


def test_a_sweep_with_a_scheme() -> None:
    asked = [*SMALL[:4], "--hw", "edge", "--budgets", "0.6", "--solvers", "greedy", "--evaluations", "12", "--scheme", "lsq"]
    assert call(sweep.main, *asked, "--out", "sweep") == 0
    (run,) = Path("sweep").glob("edge-*")
    assert "scheme: lsq" in (run / "config.yaml").read_text()


def test_schemes_differ_by_layer_in_a_problem() -> None:
    from tests.conftest import images

    inputs = images(64)
    labels = small_network()(inputs).argmax(1)
    schemes = {"stem": "linear", "depthwise": "lsq", "pointwise": "pact", "hidden": "lsq", "classifier": "linear"}
    problem = haq.Problem(
        small_network(), calibrate=images(32, 1), search=(inputs, labels), target="edge", budget=0.6, scheme=schemes
    )
    result = haq.solve(problem, "greedy", evaluations=20)
    names = {layer: part.scheme.name for layer, part in Q.quant_layers(result.quantized).items()}
    assert names == schemes
    with torch.inference_mode():
        accuracy = float((result.quantized(inputs).argmax(1) == labels).double().mean())
    assert accuracy == result.trial.accuracy
