"""What a search for an FPGA flow finds is what the flow takes: from `haq search --hw` to `haq deploy --to qonnx --for`."""

from __future__ import annotations

from pathlib import Path

import pytest

from haq import deploy, search
from haq.console.errors import run_command
from tests.commands.test_robustness_command import MODULE, lessen
from tests.conftest import enter

JOB = ["--network", "small_job:network", "--data", "small_job:splits", "--out", "run"]
QUICK = ["--solver", "random", "--budget", "0.6", "--evaluations", "2", "--finetune-epochs", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qonnx")
    enter(tmp_path, monkeypatch, MODULE)
    lessen(monkeypatch)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flow", ["finn", "hls4ml"])
def test_what_is_found_is_deployed(flow: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: search.main([*JOB, *QUICK, "--hw", flow])) == 0
    assert "estimated" in capsys.readouterr().out
    assert run_command(lambda: deploy.main(["run", "--to", "qonnx", "--for", flow])) == 0
    assert Path("run/network-qonnx.onnx").stat().st_size > 0


def test_what_was_searched_for_another_chip_is_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: search.main([*JOB, *QUICK, "--hw", "edge"])) == 0
    capsys.readouterr()
    before = sorted(Path("run").iterdir())
    assert run_command(lambda: deploy.main(["run", "--to", "qonnx", "--for", "hls4ml"])) != 0
    assert "layer 'stem' can't be built by hls4ml: its output channels have scales of their own, and it takes one" in said(
        capsys
    )
    assert run_command(lambda: deploy.main(["run", "--to", "qonnx", "--for", "vitis"])) != 0
    assert "--for is 'vitis'" in said(capsys)
    assert sorted(Path("run").iterdir()) == before
