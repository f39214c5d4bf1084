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

COUNTED = ("bit operations", "average weight bits", "memory traffic", "peak memory")
MINE = """
model: roofline
name: mine
description: mine
batch: 1
peak_tops: {8/8: 1.0, 4/8: 2.0}
bandwidth_gb_per_s: 1.0
on_chip_bytes: 1024
capabilities:
  layers:
    first: {weights: [8], activations: [8]}
    head: [8/8]
  per_channel_weights: false
  power_of_two_scales: true
  zero_points: false
  activation_sign: unsigned
  accumulator_bits: 24
  on_overflow: wider
  overflow_cost: 2.0
"""


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


def test_list_says_which_pairs_of_widths_a_target_has(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").splitlines()
    pairs = {name: next(line for line in lines if line.startswith(f" {name} ")) for name in ("edge", "nvidia-a100")}
    assert "1 to 8 bits" in pairs["edge"]
    assert "float, 8/float, 8/8" in pairs["nvidia-a100"]
    assert "1 to 8 bits, 16" in next(line for line in lines if "bitfusion-16bit" in line)


def test_show_says_in_words_what_a_chip_can_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(capsys, "show", "hexagon-npu")
    assert "peak_tops" in text
    assert "linear, conv, pointwise: 16/16, 8/16, 8/8, 4/16, 4/8" in text
    assert "depthwise, grouped: 16/16, 8/16, 8/8" in text
    assert "Weights have a scale for every output channel" in text
    assert "for layers of all kinds: 1 to 8 bits." in run(capsys, "show", "edge")
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    text = run(capsys, "show", str(file))
    for words in (
        "for layers of all kinds: 8/8, 4/8.",
        "Layer 'first': weights 8; activations 8.",
        "Layer 'head': 8/8.",
        "Weights have one scale per layer, a power of two; activations are unsigned integers, without zero points.",
        "Accumulators have 24 bits; sums that can overflow go to a wider unit, at 2 times the cost.",
    ):
        assert words in text


def test_the_page_of_a_chip_fits_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = run(capsys, "show", "hexagon-npu", "--network", "mobilenet-mini")
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "Layers by what bounds them: w8/a8 14 overhead;" in text


def test_show_prices_what_a_chip_has_unless_pairs_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "nvidia-a100", "--network", "mobilenet-mini")
    for pair in ("w8/a8: latency", "w4/a4: nvidia-a100 can't do 6 of 14 layers", "w4/afloat: latency"):
        assert pair in text
    text = run(capsys, "show", "nvidia-a100", "--network", "mobilenet-mini", "--bits", "float, w8afloat, 8/16")
    assert re.search(r"^float: latency .*storage", text, re.MULTILINE)
    assert re.search(r"^w8/afloat: latency", text, re.MULTILINE)
    assert "w8/a16: nvidia-a100 can't do 14 of 14 layers" in text


def test_show_counts_what_is_the_networks_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Of mobilenet-mini: 3,132,432 multiply-accumulates, 64 bit operations each at 8 bits."""
    text = run(capsys, "show", "edge", "--network", "mobilenet-mini", "--bits", "8,4/8,float")
    rows = {name: text[text.index(name) :].splitlines()[0].split() for name in COUNTED}
    assert rows["bit operations"][2::2] == ["0.2005", "0.1002", "3.208"]
    assert rows["average weight bits"][3:] == ["8", "4", "32"]
    assert rows["memory traffic"][2:6] == ["204.3", "kB", "178.7", "kB"]
    assert rows["peak memory"][2:4] == ["42.34", "kB"]


def test_show_holds_a_network_against_the_guidelines(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "show", "cloud", "--network", "mobilenetv2_100").split())
    for words in (
        "G1 equal channels yes 35 layers have unequal channels",
        "blocks.1.0.conv_pw (16→96, 1x1 to 112x112) 1.43",
        "G2 few groups yes 17 layers have groups",
        "G3 few branches no",
        "G4 few element-wise operations yes 43.2 % of all that is moved",
        "Depthwise layers do 20,716,416 of 300,774,272 multiply-accumulates (6.9 %)",
        "1/C_out + 1/K^2 of a full convolution",
    ):
        assert words in text


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
        (
            ("show", "edge", "--network", "mobilenet-mini", "--bits", "8/"),
            "--bits has '8/'; give widths from 1 to 8, 16 or float",
        ),
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
