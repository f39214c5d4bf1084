"""`python -m haq.hardware` shows what hardware there is, and what a network costs on it layer by layer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import hw_models
from haq import hardware
from haq.console.errors import EXIT_BAD_INPUT, run_command
from tests.hw_models.test_lookup_table import LAYERS, rows, write


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that goes to a pipe whose width nobody has set."""
    monkeypatch.delenv("COLUMNS", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert hardware.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_list_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "list")
    for name in hw_models.target_names():
        assert f" {name} " in text
    assert "estimated" in text


def test_show_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "bitfusion")
    for key in ("array_rows", "clock_mhz", "dram_pj_per_bit", "weight_buffer_bytes"):
        assert key in text
    assert "hw_models.bitfusion" in text


def test_show_prices_a_network_by_its_bare_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "cloud", "--network", "mobilenetv2_100")
    for expected in ("timm:mobilenetv2_100 on cloud", "blocks.0.0.conv_dw", "depthwise 32→32 3x3 to 112x112"):
        assert expected in text
    assert "w8/a8: latency 198.1 ms, storage 3.546 MB, 39,624,933 cycles, activations at most 1.505 MB" in text
    for bound in ("compute", "activation fetch", "weight fetch"):
        assert bound in text
    assert max(map(len, text.splitlines())) <= hardware.WIDTH
    assert "…" not in text


def test_show_prices_any_pair_of_bits_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "bitfusion", "--network", "mobilenet-mini", "--bits", "8, 4/6", "--batch", "2")
    assert "batch of 2 images" in text
    assert "w4/a6: latency" in text
    assert "energy" in text


def test_show_a_measured_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = write(tmp_path / "t.csv", "layer,w_bits,a_bits,latency_ms", rows(LAYERS))
    assert "(measured)" in run(capsys, "show", name)


def test_what_a_target_can_not_do_is_a_dash_and_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine:
        name = description = "mine"
        provenance = "measured"

        def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
            latency = np.full((len(workload), 8, 8), 2e-3)
            latency[1:3, 7, 7] = np.nan
            bound = np.zeros(latency.shape, int)
            storage = hw_models.storage_bytes(workload)
            return hw_models.CostTable("mine", "measured", workload, 1, latency, None, storage, bound=bound, bounds=("all",))

    monkeypatch.setattr(hw_models, "load_target", lambda name, **options: Mine())
    text = run(capsys, "show", "mine", "--network", "mobilenet-mini", "--bits", "8,4")
    assert "nan" not in text.lower()
    assert re.search(r"w8/a8: mine can't do 2 of \d+ layers, '.*' is the first", text)
    assert "w4/a4: latency " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "egde"), "did you mean edge"),
        (("show", "edge", "--network", "mobilenet-mni"), "unknown network 'mobilenet-mni'; did you mean mobilenet-mini"),
        (("show", "edge", "--network", "mobilenet-mini", "--bits", "8,9"), "--bits has '9'; give widths from 1 to 8"),
        (("show", "edge", "--network", "mobilenet-mini", "--batch", "0"), "batch must be a positive integer, not 0"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HAQ_DEBUG", raising=False)
    assert run_command(lambda: hardware.main(list(arguments))) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
