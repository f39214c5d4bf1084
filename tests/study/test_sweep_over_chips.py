"""A sweep goes over chips that can't do each other's policies, and over functions; other quantizers are refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hw_models
from haq import report, sweep
from haq.store.records import SpecialisedPolicy
from tests.commands.test_search_command import MODULE, call
from tests.conftest import enter

SMALL = ["--network", "small_job:network", "--data", "small_job:splits", "--solvers", "greedy", "--evaluations", "4"]
FUNCTION = """
def latency(layer, w, a):
    return layer.macs * w * a * 1e-12
latency.capabilities = {"pairs": ["8/8", "4/8"]}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    (tmp_path / "function_of_mine.py").write_text(FUNCTION)
    edge = (Path(hw_models.__file__).parent / "targets" / "edge.yaml").read_text(encoding="utf-8")
    (tmp_path / "shifts.yaml").write_text(
        f"{edge}\ncapabilities: {{power_of_two_scales: true}}\n".replace("name: edge", "name: s")
    )


@pytest.mark.slow
def test_a_policy_that_another_chip_can_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(sweep.main, *SMALL, "--hw", "edge,function_of_mine:latency", "--budgets", "0.8", "--out", "all") == 0
    out = capsys.readouterr().out
    content = json.loads(Path("all/sweep.json").read_text())
    fractions = {hw: row["fractions"] for hw, row in content["specialisation"]["policies"].items()}
    assert fractions["edge"]["edge"] <= 0.8
    assert fractions["edge"]["function_of_mine:latency"] is None
    assert fractions["function_of_mine:latency"]["function_of_mine:latency"] <= 0.8
    assert "the target can't do one of the policy's pairs of widths" in " ".join(out.split())
    assert call(report.main, "all") == 0


def test_a_cost_that_there_is_not_is_a_dash() -> None:
    row = {"folder": "a", "solver": "ilp", "test_accuracy": 0.5, "search_accuracy": 0.5, "fractions": {"a": 0.25, "b": None}}
    policy = SpecialisedPolicy.model_validate(row)
    assert (policy.fraction_words("a"), policy.fraction_words("b")) == ("0.250", "–")


def test_chips_with_other_quantizers_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(sweep.main, *SMALL, "--hw", "edge,shifts.yaml", "--budgets", "0.8", "--out", "all") == 2
    assert "error: s wants weights or activations quantized otherwise than edge" in capsys.readouterr().err
    assert not Path("all/runs").exists()
