"""The chips that ship: every number has its source, networks are priced at the pairs they have, and beside measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import hw_models
from experiments import published_chips
from haq import networks
from hw_models.roofline import RooflineTarget
from hw_models.target import price
from hw_models.widths import FLOAT, place_of

FOLDER = Path(hw_models.__file__).parent / "targets"
ONE_TO_EIGHT = {(w, a) for w in range(1, 9) for a in range(1, 9)}
CHIPS = {
    "cortex-m7": {(4, 8), (8, 8), (8, 16), (16, 16), (FLOAT, FLOAT)},
    "c2000-npu": {(2, 8), (4, 8), (8, 8), (FLOAT, FLOAT)},
    "hexagon-npu": {(4, 8), (8, 8), (4, 16), (8, 16), (16, 16)},
    "finn": ONE_TO_EIGHT,
    "hls4ml": ONE_TO_EIGHT,
    "nvidia-a100": {(4, 4), (4, 8), (8, 8), (4, FLOAT), (8, FLOAT), (FLOAT, FLOAT)},
}
DEPTHWISE = {"hexagon-npu": {(8, 8), (8, 16), (16, 16)}, "nvidia-a100": {(8, 8), (4, FLOAT), (8, FLOAT), (FLOAT, FLOAT)}}


@pytest.fixture(scope="module")
def mini() -> hw_models.Workload:
    loaded = networks.load("mobilenet-mini", pretrained=False)
    return hw_models.trace(loaded.module, torch.zeros(1, *loaded.input_shape))


def test_these_are_the_rooflines_that_ship() -> None:
    rooflines = [name for name in hw_models.target_names() if "model: roofline" in (FOLDER / f"{name}.yaml").read_text()]
    assert set(rooflines) == set(CHIPS)
    listed = {row.name for row in hw_models.target_rows()}
    assert listed >= set(CHIPS)


@pytest.mark.parametrize("name", CHIPS)
def test_every_number_has_its_source_behind_it(name: str) -> None:
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        content, _, comment = line.partition("#")
        if not content.strip():
            continue
        value = yaml.safe_load(content.partition(":")[2])
        if isinstance(value, int | float | list):
            # A sentence, or the words that say where it is from.
            assert len(comment.split()) >= 2, line


@pytest.mark.parametrize("name", CHIPS)
def test_the_pairs_that_a_chip_has(name: str, mini: hw_models.Workload) -> None:
    target = hw_models.load_target(name)
    assert isinstance(target, RooflineTarget)
    assert target.provenance == "estimated"
    table = price(target, mini)
    for index, layer in enumerate(mini.layers):
        expected = CHIPS[name]
        if layer.kind == "depthwise":
            expected = DEPTHWISE.get(name, expected)
        assert set(table.pairs_of(index)) == expected, layer.name
    assert table.latency_s is not None
    assert (table.latency_s[table.supported] > 0).all()
    fewest = table.latency_s[:, place_of(8), place_of(8)]
    assert (fewest <= np.nanmax(table.latency_s, (1, 2))).all()


def test_the_page_holds_what_is_compared() -> None:
    """In the quick way: the rows of one network."""
    check_page(tuple(row for row in published_chips.ROWS if row.network == "timm:mobilenetv2_100"))


@pytest.mark.slow
def test_the_page_holds_all_that_is_compared() -> None:
    check_page(published_chips.ROWS)


def check_page(rows: tuple[published_chips.Published, ...]) -> None:
    page = (Path(__file__).parents[2] / "docs/experiments/published_chips.md").read_text(encoding="utf-8")
    compared = published_chips.compare(rows)
    assert len(compared) == len(rows) > 0
    for row in compared:
        assert f"| {' | '.join(row.cells)} |" in page
        # What the page calls an order of magnitude.
        assert 1 / 4 < row.ours / row.published.milliseconds < 4
