"""A measured table is a target: its numbers come back, and what it lacks, repeats or gets wrong is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import haq
import hw_models
from tests.conftest import make_problem

LAYERS = ("stem", "depthwise", "pointwise", "hidden", "classifier")


def rows(layers: tuple[str, ...] = LAYERS, *extra: str) -> list[str]:
    """Layer i at w/a costs i + w + a / 10."""
    return [
        f"{name},{w},{a},{i + w + a / 10}{''.join(extra)}"
        for i, name in enumerate(layers)
        for w in range(1, 9)
        for a in range(1, 9)
    ]


def write(path: Path, header: str, lines: list[str]) -> str:
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return f"lut:{path}"


def test_the_numbers_come_back_in_their_units(tmp_path: Path, network: nn.Module) -> None:
    name = write(tmp_path / "t.csv", "Layer, weight bits, activation bits, latency_us, energy_mJ", rows(LAYERS, ",2.5"))
    target = hw_models.load_target(name)
    table = target.cost_table(hw_models.trace(network, torch.zeros(1, 1, 8, 8)))
    assert (table.provenance, table.batch, table.metrics) == ("measured", 1, ("latency", "energy", "storage"))
    assert table.latency_s is not None
    assert table.latency_s[3, 4, 1] == pytest.approx((3 + 5 + 0.2) * 1e-6)
    assert table.energy_j == pytest.approx(np.full((5, 8, 8), 2.5e-3))
    assert table.cycles is None


def test_rows_and_columns_in_any_order_and_layers_of_other_networks(tmp_path: Path, network: nn.Module) -> None:
    lines = rows((*LAYERS, "someone_elses"))
    turned = [",".join(line.split(",")[::-1]) for line in lines[::-1]]
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    one = hw_models.load_target(write(tmp_path / "1.csv", "layer,w_bits,a_bits,energy_j", lines)).cost_table(workload)
    other = hw_models.load_target(write(tmp_path / "2.csv", "energy_j,a_bits,w_bits,layer", turned)).cost_table(workload)
    assert one.metrics == ("energy", "storage")
    assert np.array_equal(one.energy_j, other.energy_j)


def test_a_search_problem_on_a_table(tmp_path: Path, network: nn.Module) -> None:
    name = write(tmp_path / "t.csv", "layer,w_bits,a_bits,latency_ms", rows())
    like = make_problem(network)
    problem = haq.Problem(
        network, calibrate=like.evaluator.batches[0][0], search=like.evaluator.batches, target=name, budget=0.7
    )
    assert problem.limit == pytest.approx(0.7 * sum(i + 8.8 for i in range(5)) * 1e-3)


def test_a_batch_of_its_own(tmp_path: Path, network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    header = "layer,w_bits,a_bits,latency_ms,batch"
    target = hw_models.load_target(write(tmp_path / "t.csv", header, rows(LAYERS, ",16")))
    assert target.cost_table(workload).batch == target.cost_table(workload, batch=16).batch == 16
    with pytest.raises(ValueError, match="measured with a batch of 16, not 1"):
        target.cost_table(workload, batch=1)
    mixed = [*rows(LAYERS[:4], ",16"), *rows(LAYERS[4:], ",4")]
    with pytest.raises(ValueError, match="mixes batches of 4, 16"):
        hw_models.load_target(write(tmp_path / "t.csv", header, mixed))


def test_missing_layers_are_named(tmp_path: Path, network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    target = hw_models.load_target(write(tmp_path / "t.csv", "layer,w_bits,a_bits,latency_s", rows(LAYERS[:3])))
    with pytest.raises(ValueError, match="lacks 2 of 5 layers: hidden, classifier; it has"):
        target.cost_table(workload)


GOOD = "layer,w_bits,a_bits,latency_s"


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (GOOD, rows()[:-1], r"lacks 1 of 64 pairs of bits for layer 'classifier': w8/a8$"),
        (
            GOOD,
            [line for line in rows() if ",1," not in line],
            r"'stem': w1/a1, w1/a2, .*; 4 other layers have holes too",
        ),
        (GOOD, [*rows(), "hidden,3,4,1"], "row 322: layer 'hidden' at w3/a4 is there twice"),
        (GOOD, ["stem,9,1,1"], "row 2: w_bits is '9'; it must be an integer from 1 to 8"),
        (GOOD, ["stem,1,2.5,1"], "a_bits is '2.5'"),
        (GOOD, ["stem,1,1,nan"], "row 2: latency_s is 'nan'; it must be a positive number"),
        (GOOD, ["stem,1,1,0"], "latency_s is '0'"),
        (GOOD, ["stem,1,1,-1e-3"], "latency_s is '-1e-3'"),
        (GOOD, ["stem,1,1,fast"], "latency_s is 'fast'"),
        (GOOD, ["stem,1,1"], "row 2: 3 cells, the first line has 4"),
        (GOOD, [], "no rows"),
        (
            "layer,w_bits,a_bits,latency",
            ["stem,1,1,1"],
            "must name the columns .* latency_s or .*; it is layer, w_bits",
        ),
        ("layer,w_bits,a_bits", ["stem,1,1"], "must name the columns"),
        ("layer,w_bits,w_bits,a_bits,latency_s", ["stem,1,1,1,1"], "must name the columns"),
        ("", [], "must name the columns .*; it is empty"),
        ("root:x:0:0,secret", ["more"], "must name the columns .*; it is something else$"),
        (f"layer,w_bits,a_bits,{'s' * 99}", [], "it is layer, w_bits, a_bits, 's{20}'$"),
        (GOOD, [f"stem,{'9' * 5000},1,1"], "w_bits is '9{20}'; it must be an integer from 1 to 8"),
        (GOOD, ["stem,1,1,1e-320"], "it must be a positive number, from 1e-30 to 1e.30"),
        (GOOD, ["stem,1,1,1_0"], "latency_s is '1_0'"),
        (GOOD, ["\x1b[31m,1,1,1"], r"row 2: layer is '\\x1b\[31m'; it must be the name of a layer"),
        (GOOD, [f"{'x' * 300},1,1,1"], "at most 200 characters"),
        (f"{GOOD},batch", ["stem,1,1,1,99999999"], "batch is '99999999'; it must be an integer from 1 to 65,536"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(header: str, lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hw_models.load_target(write(tmp_path / "t.csv", header, lines))


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"t\.csv is not a table of comma-separated values"):
        hw_models.load_target(f"lut:{path}")
