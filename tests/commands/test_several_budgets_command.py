"""A search from the command line within several budgets, on a chip of a few pairs: what it prints and writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from haq import evaluate, finetune, report, runs, search
from haq.console.errors import run_command
from tests.commands.test_search_command import MODULE, SMALL
from tests.conftest import enter

CHIP = """
model: roofline
name: chip
description: a chip of a few pairs
peak_tops:
  8/8: 0.004
  4/8: 0.008
  8/16: 0.002
  float: 0.0002
fixed_us: 0.01
bandwidth_gb_per_s: 1
on_chip_bytes: 65536
batch: 1
"""
ASKED = [*SMALL[:4], "--hw", "chip.yaml", "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0"]
BUDGETS = ["--budget", "latency=0.95", "--budget", "storage=0.95", "--budget", "peak_memory=1.5kB"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job of one's own, and a chip, in it."""
    enter(tmp_path, monkeypatch, MODULE)
    Path("chip.yaml").write_text(CHIP)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_three_budgets_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *ASKED, *BUDGETS, "--out", "run") == 0
    out = said(capsys)
    for words in ("budget latency ", " storage ", " peak memory 1.5 kB", "fractions are of uniform 8 bits", "4/8"):
        assert words in out
    assert out.count("Budget: ") == 3
    assert out.count(": holds.") == 3
    assert "Rivals at the same budgets (greedy, ilp)" in out
    settings = yaml.safe_load(Path("run/config.yaml").read_text())["settings"]
    assert settings["budget"] == "latency=0.95,storage=0.95,peak_memory=1.5kB"
    result = json.loads(Path("run/result.json").read_text())
    assert [budget["metric"] for budget in result["budgets"]] == ["latency", "storage", "peak_memory"]
    problem = json.loads(Path("run/problem.json").read_text())
    assert len(problem["layers"][0]["cost"]) == 10
    assert problem["layers"][0]["cost"][0][0] is None
    with Path("run/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["storage"]) > 0 and float(row["peak_memory"]) > 0 for row in rows)
    limits = {limit["metric"]: limit["amount"] for limit in problem["limits"]}
    for row in rows:
        costs = {"latency": float(row["cost"]), **{name: float(row[name]) for name in ("storage", "peak_memory")}}
        assert (row["within_budget"] == "1") == all(costs[name] <= limits[name] * (1 + 1e-9) for name in limits)
    # Everything that follows reads it.
    kept = {name: Path("run", name).read_bytes() for name in ("history.csv", "policy.json", "problem.json")}
    assert call(evaluate.main, "run") == 0
    assert said(capsys).count("Budget: ") == 3
    assert call(report.main, "run") == 0
    assert call(runs.main, "show", "run") == 0
    assert said(capsys).count(": holds") == 3
    # An interrupted run goes on as it began.
    Path("run/result.json").unlink()
    history = kept["history.csv"].splitlines(keepends=True)
    Path("run/history.csv").write_bytes(b"".join(history[:4]))
    assert call(search.main, "--resume", "run") == 0
    assert {name: Path("run", name).read_bytes() for name in kept} == kept


def test_the_cheapest_of_some_value_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *ASKED, "--max-drop", "30", "--bits", "4,8,float/8,float", "--out", "run") == 0
    out = said(capsys)
    assert "goal the cheapest that loses at most 30 points of accuracy, by latency (at least " in out
    assert "budget none" in out
    assert "Goal: the cheapest that loses at most 30 points of accuracy. Found: " in out
    assert "no budget limits it." in out
    assert "Rivals with the same goal" in out
    result = json.loads(Path("run/result.json").read_text())
    assert result["budget"]["limit"] is None
    assert result["reached"]["search_holds"] is True
    assert call(finetune.main, "run", "--epochs", "1") == 0
    again = json.loads(Path("run/result.json").read_text())
    assert again["reached"] == result["reached"]
    assert again["finetuned"] is not None


def test_a_policy_as_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ("stem", "depthwise", "pointwise", "hidden", "classifier")
    given = [{"name": name, "weight_bits": 8, "activation_bits": 16} for name in layers]
    reference = {"schema": "haq-bit-policy", "version": 1, "layers": given}
    Path("given.json").write_text(json.dumps(reference))
    dry = [*ASKED, "--reference", "given.json", "--budget", "0.6", "--dry-run"]
    assert call(search.main, *dry) == 0
    assert "fractions are of uniform 8/16" in said(capsys)
    given[0]["weight_bits"] = 2
    Path("given.json").write_text(json.dumps(reference))
    assert call(search.main, *dry) == 2
    assert "the reference has layer 'stem' at 2/16, which chip can't do" in capsys.readouterr().err
