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
    assert table.energy_j is not None
    assert table.energy_j[:, :8, :8] == pytest.approx(np.full((5, 8, 8), 2.5e-3))
    assert not table.supported[:, 8:].any()
    assert not table.supported[:, :, 8:].any()
    assert table.cycles is None


def test_rows_and_columns_in_any_order_and_layers_of_other_networks(tmp_path: Path, network: nn.Module) -> None:
    lines = rows((*LAYERS, "someone_elses"))
    turned = [",".join(line.split(",")[::-1]) for line in lines[::-1]]
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    one = hw_models.load_target(write(tmp_path / "1.csv", "layer,w_bits,a_bits,energy_j", lines)).cost_table(workload)
    other = hw_models.load_target(write(tmp_path / "2.csv", "energy_j,a_bits,w_bits,layer", turned)).cost_table(workload)
    assert one.metrics == ("energy", "storage")
    assert np.array_equal(one.energy_j, other.energy_j, equal_nan=True)


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
SHAPES = "kind,in_channels,out_channels,kernel,stride,groups,input_size,w_bits,a_bits,latency_s"


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (GOOD, [*rows(), "hidden,3,4,1"], "row 322: layer 'hidden' at w3/a4 is there twice"),
        (GOOD, ["stem,9,1,1"], "row 2: w_bits is '9'; it must be an integer from 1 to 8, 16 or float$"),
        (GOOD, ["stem,8,floats,1"], "row 2: a_bits is 'floats'; it must be an integer from 1 to 8, 16 or float$"),
        (GOOD, ["stem,4,float,1", "stem,4,32,1"], "row 3: layer 'stem' at 4/float is there twice"),
        (f"kind,{GOOD}", [], "rows are found by layer or by shape, and the first line has both layer and kind: leave out one"),
        (SHAPES.replace(",groups", ""), [], "must name the columns .*; it is kind, in_channels, out_channels, kernel, stride"),
        (
            SHAPES.replace(",input_size", ""),
            [],
            "in place of layer there may be kind, .* with input_size or output_size; it is",
        ),
        (
            SHAPES,
            ["convolution,1,8,3,1,1,8,8,8,1"],
            "kind is 'convolution'; it must be conv, depthwise, .*, linear or conv1d$",
        ),
        (SHAPES, ["conv,1,8,3x3x3,1,1,8,8,8,1"], "kernel is '3x3x3'; it must be height x width, such as 3x3, or one number"),
        (
            SHAPES,
            ["conv,1,8,3,1,1,8,8,8,1", "conv,1,8,3x3,1,1,8x8,8,8,1"],
            "shape conv, .*input_size 8x8 at w8/a8 is there twice",
        ),
        (SHAPES, ["conv,0,8,3,1,1,8,8,8,1"], "in_channels is '0'; it must be an integer from 1 to"),
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


def test_what_was_not_measured_can_not_be_done(tmp_path: Path, network: nn.Module) -> None:
    """Only the pairs of a chip, with 16 bits and float, and depthwise layers at 8 bits."""
    lines = [f"{name},{w},{a},1" for name in LAYERS for w, a in ((8, 8), (4, 8), (16, 16), ("float", "float"), (4, "float"))]
    lines = [line for line in lines if not line.startswith("depthwise,4,8")]
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    table = hw_models.load_target(write(tmp_path / "t.csv", GOOD, lines)).cost_table(workload)
    assert table.pairs_of(0) == [(4, 8), (4, 32), (8, 8), (16, 16), (32, 32)]
    assert table.pairs_of(1) == [(4, 32), (8, 8), (16, 16), (32, 32)]
    with pytest.raises(ValueError, match="can't do layer 'depthwise' at w4/a8; it can do 4/float, 8/8, 16/16, float"):
        table.price(np.full(5, 4), np.full(5, 8))
    assert table.price(np.full(5, 16), np.full(5, 16)).latency_s == 5


SHAPED = [
    "conv,1,8,3,1,1,8,8,8,1",
    "depthwise,8,8,3x3,1,8,8x8,8,8,2",
    "pointwise,8,8,1,1,1,8,8,8,3",
    "linear,32,16,,,,,8,8,4",
    "linear,16,4,1,1,1,1,8,8,5",
    "linear,16,4,1,1,1,7,8,8,100",
]


class Shapes(nn.Module):
    """One layer of every row of SHAPED, the pointwise one called twice."""

    def __init__(self, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.stem = nn.Conv2d(1, 8, kernel, padding=padding, dilation=dilation)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pointwise(self.pointwise(self.depthwise(self.stem(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.hidden(x))


def by_shape(path: Path, lines: list[str], network: nn.Module, header: str = SHAPES) -> hw_models.CostTable:
    target = hw_models.load_target(write(path / "t.csv", header, lines))
    return target.cost_table(hw_models.trace(network, torch.zeros(1, 1, 8, 8)))


def test_rows_by_shape(tmp_path: Path) -> None:
    table = by_shape(tmp_path, SHAPED, Shapes())
    assert table.latency_s is not None
    assert table.latency_s[:, 7, 7].tolist() == [1, 2, 6, 4, 5]
    assert table.supported.sum() == 5
    # The layers' names play no part, and neither does the order of rows and columns.
    turned = [",".join(line.split(",")[::-1]) for line in SHAPED[::-1]]
    other = by_shape(tmp_path, turned, nn.Sequential(Shapes()), ",".join(SHAPES.split(",")[::-1]))
    assert np.array_equal(other.latency_s, table.latency_s, equal_nan=True)


def test_sizes_of_the_output_and_dilations(tmp_path: Path) -> None:
    header = SHAPES.replace("input_size", "output_size,dilation")
    lines = [
        "conv,1,8,3,1,1,8,1,8,8,1",
        "conv,1,8,3,1,1,8,2,8,8,9",
        "depthwise,8,8,3,1,8,8,1,8,8,2",
        "pointwise,8,8,1,1,1,8,1,8,8,3",
        "linear,,,,,,,,8,8,4",
    ]
    for dilation, expected in ((1, 1), (2, 9)):
        table = by_shape(tmp_path, lines, Shapes(dilation=dilation), header)
        assert table.latency_s is not None
        assert table.latency_s[:, 7, 7].tolist() == [expected, 2, 6, 4, 4]
    with pytest.raises(ValueError, match="no row that fits 1 of 5 layers: stem; 'stem' is conv, .*dilation 2x2"):
        by_shape(tmp_path, SHAPED, Shapes(dilation=2))


def test_a_conv1d_has_one_number(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=4))
    lines = ["conv1d,2,4,3,1,1,20,8,8,1", "depthwise,4,4,1x3,1,4,1x18,8,8,2"]
    workload = hw_models.trace(network, torch.zeros(1, 2, 20))
    table = hw_models.load_target(write(tmp_path / "t.csv", SHAPES, lines)).cost_table(workload)
    assert table.latency_s is not None
    assert table.latency_s[:, 7, 7].tolist() == [1, 2]


def test_a_shape_that_fits_no_rows_or_those_of_two(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no row that fits 2 of 5 layers: stem, head; 'stem' is conv, in_channels 1, .*kernel 5x5"
    ):
        by_shape(tmp_path, SHAPED[:4], Shapes(kernel=5))
    twice = [*SHAPED, "conv,1,8,3,1,1,,8,8,7"]
    with pytest.raises(
        ValueError,
        match="rows of 2 shapes that fit layer 'stem' .*: conv, .*input_size 8x8 and conv, .*any input_size; leave one",
    ):
        by_shape(tmp_path, twice, Shapes())


def test_calls_of_a_layer_have_their_pairs_in_common(tmp_path: Path) -> None:
    """A layer that is called at two sizes can do what both sizes can."""
    shared = nn.Conv2d(1, 1, 3)
    network = nn.Sequential(shared, shared)
    lines = ["conv,1,1,3,1,1,8,8,8,1", "conv,1,1,3,1,1,8,4,8,1", "conv,1,1,3,1,1,6,8,8,2"]
    table = by_shape(tmp_path, lines, network)
    assert table.pairs_of(0) == [(8, 8)]
    assert table.latency_s is not None
    assert table.latency_s[0, 7, 7] == 3
    with pytest.raises(ValueError, match="no pair of widths for layer '0' that all its calls have"):
        by_shape(tmp_path, lines[1:], network)
