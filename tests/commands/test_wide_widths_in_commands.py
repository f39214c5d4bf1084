"""A chip with 16 bits and float, from search to exported file: in Python and by commands, with a target of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import haq
import quantizers as Q
from haq import deploy, evaluate, finetune, robustness, search
from haq.console.errors import run_command
from haq.deployment.graph import capture
from haq.deployment.onnx import export, verify
from haq.study.comparison import ComparisonSpec, _RunNetworks
from haq.study.search_run import SearchRun
from tests.commands.test_robustness_command import MODULE, lessen
from tests.conftest import brightest, enter, fitted_network, images

# Depthwise layers at 8 bits alone, the last layer in float on another processor, weights alone where the input is large.
CHIP = """
PAIRS = {
    "stem": [(16, 16)],
    "depthwise": [(8, 8)],
    "pointwise": [(8, 8), (8, 16), (16, 16), (4, None)],
    "hidden": [(8, 8), (4, 8), (None, 8)],
    "classifier": [(None, None)],
}

def latency(layer, w, a):
    \"\"\"A chip of one's own.\"\"\"
    if (w, a) not in PAIRS[layer.name]:
        return None
    return layer.macs * 1e-9 * ((w or 32) + (a or 32))
"""
JOB = ["--network", "small_job:network", "--data", "small_job:splits", "--hw", "small_job:latency", "--seed", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, f"{MODULE}\n{CHIP}")
    lessen(monkeypatch)
    monkeypatch.setattr("haq.training.reconstruction.ITERATIONS", 5)


def allowed() -> dict[str, list[tuple[int | None, int | None]]]:
    names: dict[str, Any] = {}
    exec(CHIP, names)
    pairs: dict[str, list[tuple[int | None, int | None]]] = names["PAIRS"]
    return pairs


@pytest.mark.parametrize("budget", [0.99, 1.4])
def test_in_python(budget: float, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network, x = fitted_network(), images(96)
    batches = [(x, brightest(x))]
    problem = haq.Problem(network, calibrate=batches, search=batches, target="small_job:latency", budget=budget)
    result = haq.solve(problem, "ilp", evaluations=20, seed=0)
    assert problem.holds(result.policy)
    assert all(pair in allowed()[name] for name, pair in result.policy.items())
    folder = result.save(tmp_path / "found")
    loaded = haq.load(folder, network)
    assert Q.get_policy(loaded) == result.policy
    # What is loaded is what is exported, and ONNX Runtime computes the same.
    export(capture(loaded, x), loaded, tmp_path / "network.onnx")
    found = verify(tmp_path / "network.onnx", loaded, x)
    assert not found.fault
    assert found.same_answers == 1


@pytest.mark.slow
def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")

    def call(main: Any, *arguments: str) -> dict[str, Any]:
        assert run_command(lambda: main([*arguments, "--json"])) == 0
        out, err = capsys.readouterr()
        assert not err or "Traceback" not in err
        made: dict[str, Any] = json.loads(out)
        return made

    asked = ["--budget", "1", "--solver", "ilp", "--evaluations", "6", "--finetune-epochs", "1", "--out", "run"]
    assert run_command(lambda: search.main([*JOB, *asked])) == 0
    out = capsys.readouterr().out
    assert "float" in out
    policy = Q.BitPolicy.from_json("run/policy.json")
    assert (policy["stem"], policy["classifier"]) == ((16, 16), (None, None))
    assert all(pair in allowed()[name] for name, pair in policy.items())
    for to in ("onnx", "qonnx"):
        made = call(deploy.main, "run", "--to", to)
        assert made["same_answers"]
        assert made["fine_tuned"]
        assert made["compared"]["same answer as in PyTorch"] == "64 of 64 test images"
    call(evaluate.main, "run")
    call(finetune.main, "run", "--method", "ptq")
    tuned = SearchRun.load(Path("run")).load_checkpoint(SearchRun.load(Path("run")).load_network())
    assert tuned is not None
    assert Q.get_policy(tuned) == policy
    attacked = ["run", "--attacks", "quick", "--images", "16", "--workers", "1", "--defensive", "0", "--uniform", "16"]
    assert run_command(lambda: robustness.main(attacked)) == 0
    networks = json.loads(Path("run/robustness/robustness.json").read_text())["networks"]
    assert {"float", "uniform 16", "found"} <= set(networks)
    assert networks["found"]["deployed"]["different"] == 0
    assert torch.isfinite(torch.tensor(networks["found"]["worst"]))


def test_no_command_goes_on_with_widths_that_the_chip_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--solver", "random", "--budget", "1.2", "--evaluations", "2", "--finetune-epochs", "0", "--out", "run"]
    assert run_command(lambda: search.main([*JOB, *asked])) == 0
    found = Q.BitPolicy.from_json("run/policy.json")
    commands: list[tuple[Any, list[str]]] = [
        (evaluate, []),
        (finetune, ["--epochs", "1"]),
        (deploy, ["--to", "onnx"]),
        (robustness, ["--attacks", "quick", "--images", "16", "--workers", "1", "--defensive", "0"]),
    ]
    for pair, words in (((3, 3), "3/3"), ((16, 8), "16/8"), ((None, None), "float")):
        Q.BitPolicy({**found, "depthwise": pair}).to_json("run/policy.json")
        for module, further in commands:
            capsys.readouterr()
            assert run_command(lambda module=module, further=further: module.main(["run", *further])) != 0  # type: ignore[misc]
            said = " ".join(capsys.readouterr().err.split())
            assert f"run/policy.json has layer 'depthwise' at {words} (weights/activations), which" in said
            assert "can't do" in said


PER_TENSOR = """
def plain(layer, w, a):
    return layer.macs * 1e-9 * (w * a)

plain.capabilities = {"weights": [4, 8], "activations": [8], "per_channel_weights": False, "power_of_two_scales": True}
"""


@pytest.mark.parametrize("scheme", [[], ["--scheme", "linear"]])
def test_what_is_exported_has_the_scales_that_the_chip_has(scheme: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("small_job.py").write_text(f"{MODULE}\n{PER_TENSOR}")
    job = ["--network", "small_job:network", "--data", "small_job:splits", "--hw", "small_job:plain", "--out", "run"]
    asked = ["--solver", "random", "--budget", "1", "--evaluations", "2", "--finetune-epochs", "0"]
    assert run_command(lambda: search.main([*job, *asked])) == 0
    seen = []

    def check(self: object, network: torch.nn.Module) -> None:
        seen.append(network)
        raise ValueError("seen")

    monkeypatch.setattr("haq.deployment.onnx.OnnxExporter.check", check)
    run_command(lambda: deploy.main(["run", "--to", "onnx", *scheme]))
    monkeypatch.setattr("hw_models.trust.allow", lambda *given: None)
    run = SearchRun.load(Path("run"))
    networks = [*seen, _RunNetworks(ComparisonSpec(source="run"), run, None).plain]
    assert len(networks) == 2
    for network in networks:
        for layer in Q.quant_layers(network).values():
            assert not layer.scheme.per_channel  # type: ignore[attr-defined]
            assert layer.scheme.power_of_two  # type: ignore[attr-defined]
    # Hardware that has become another one is told.
    Path("small_job.py").write_text(f"{MODULE}\n{PER_TENSOR.replace('False', 'True')}")
    monkeypatch.delitem(sys.modules, "small_job")
    with pytest.raises(ValueError, match="as small_job:plain has it, is no longer what run began with"):
        run.schemes(list(run.load_policy()))
