"""The roofline: times, traffic and bounds counted by hand, pairs of widths that a chip has, and what is wrong with a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import hw_models
from hw_models.roofline import BOUNDS, RooflineTarget
from hw_models.widths import FLOAT, place_of
from hw_models.workload import Call, Layer, Workload

# One layer of 2048 multiply-accumulates: 128 weights, 128 elements in, 256 out.
POINTWISE = Layer("layer", "pointwise", 8, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, False, (Call((4, 4), (4, 4)),))
MACS, WEIGHTS, INPUTS, OUTPUTS = 2048, 128, 128, 256
# 10^6 operations and 10^3 bytes a second: 4.096 ms for 2 x 2048 operations, 0.512 s for 512 bytes.
SLOW = {
    "model": "roofline",
    "name": "slow",
    "description": "",
    "batch": 1,
    "peak_tops": {"8/8": 1e-6, "4/8": 2e-6, "float": 1e-7},
    "bandwidth_gb_per_s": 1e-6,
    "on_chip_bytes": 2**20,
}


def slow(**changes: Any) -> RooflineTarget:
    return RooflineTarget.model_validate({**SLOW, **changes})


def latency(target: RooflineTarget, w: int, a: int, layer: Layer = POINTWISE, batch: int | None = None) -> float:
    table = target.cost_table(Workload((layer,)), batch=batch)
    assert table.latency_s is not None
    return float(table.latency_s[0, place_of(w), place_of(a)])


def bound(target: RooflineTarget, w: int = 8, a: int = 8) -> str:
    table = target.cost_table(Workload((POINTWISE,)))
    assert table.bound is not None
    return BOUNDS[table.bound[0, place_of(w), place_of(a)]]


def test_the_longer_of_computing_and_moving_and_a_fixed_time() -> None:
    moving = slow()
    assert latency(moving, 8, 8) == pytest.approx(0.512)
    assert latency(moving, 4, 8) == pytest.approx((64 + 128 + 256) / 1e3)  # weights at 4 bits, activations at 8
    assert latency(moving, FLOAT, FLOAT) == pytest.approx(4 * 0.512)
    assert bound(moving) == "memory"
    computing = slow(bandwidth_gb_per_s=1.0)
    assert latency(computing, 8, 8) == pytest.approx(2 * MACS / 1e6)
    assert latency(computing, 4, 8) == pytest.approx(2 * MACS / 2e6)
    assert bound(computing) == "compute"
    waiting = slow(bandwidth_gb_per_s=1.0, fixed_us=10_000)
    assert latency(waiting, 8, 8) == pytest.approx(0.004096 + 0.01)
    assert bound(waiting) == "overhead"


def test_utilisation_is_by_kind_the_least_of_those_that_a_layer_is() -> None:
    target = slow(bandwidth_gb_per_s=1.0, utilisation={"pointwise": 0.5, "conv1d": 0.25, "depthwise": 0.1})
    assert latency(target, 8, 8) == pytest.approx(0.008192)
    assert latency(target, 8, 8, replace(POINTWISE, is_1d=True)) == pytest.approx(0.016384)
    assert latency(target, 8, 8, replace(POINTWISE, kind="conv")) == pytest.approx(0.004096)


@pytest.mark.parametrize(
    ("on_chip", "again"),
    [
        (128, 0),  # one operand fits: both are fetched once
        (127, 128),  # two parts of either: the other streams by once more
        (50, 2 * 128),  # three parts
    ],
)
def test_what_does_not_fit_is_fetched_again(on_chip: int, again: int) -> None:
    target = slow(on_chip_bytes=on_chip)
    traffic = target.traffic(POINTWISE, POINTWISE.calls[0], 1)
    assert traffic[7, 7] == WEIGHTS + INPUTS + OUTPUTS + again
    assert latency(target, 8, 8) == pytest.approx(traffic[7, 7] / 1e3)


def test_the_operand_streams_by_that_moves_less() -> None:
    """16 KiB of weights against 128 bytes of input: the input is held, and the weights pass once."""
    layer = replace(POINTWISE, out_channels=2048)
    assert slow(on_chip_bytes=128).traffic(layer, layer.calls[0], 1)[7, 7] == 8 * 2048 + 128 + 16 * 2048
    # Of an input twice as large as what fits, two parts: the weights pass twice, or the input 128 times.
    assert slow(on_chip_bytes=64).traffic(layer, layer.calls[0], 1)[7, 7] == 2 * 8 * 2048 + 128 + 16 * 2048


def test_each_group_is_on_its_own() -> None:
    grouped = replace(POINTWISE, kind="grouped", groups=4)  # 32 weights: 8 with 32 elements of input to each group
    target = slow(on_chip_bytes=16)
    assert target.traffic(grouped, grouped.calls[0], 1)[7, 7] == 4 * (8 + 32) + OUTPUTS
    assert slow(on_chip_bytes=4).traffic(grouped, grouped.calls[0], 1)[7, 7] == 4 * (8 + 32 + 32) + OUTPUTS


def test_weights_are_read_once_for_a_batch_and_once_for_every_call() -> None:
    target = slow()
    assert latency(target, 8, 8, batch=16) == pytest.approx((WEIGHTS + 16 * (INPUTS + OUTPUTS)) / 1e3)
    twice = replace(POINTWISE, calls=POINTWISE.calls * 2)
    assert latency(target, 8, 8, twice) == pytest.approx(2 * 0.512)
    assert latency(slow(fixed_us=1000), 8, 8, twice) == pytest.approx(2 * 0.513)


def test_once_fetched_the_traffic_is_the_metric(network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    table = slow(wider=True).cost_table(workload)
    assert table.counters["traffic_bytes"] == pytest.approx(np.ceil(table.metric("memory_traffic")))


def test_only_listed_pairs_unless_wider_ones_compute_for_them() -> None:
    table = slow().cost_table(Workload((POINTWISE,)))
    assert table.pairs_of(0) == [(4, 8), (8, 8), (FLOAT, FLOAT)]
    with pytest.raises(ValueError, match="slow can't do layer 'layer' at w3/a5; it can do 4/8, 8/8, float"):
        table.price(np.array([3]), np.array([5]))
    wider = slow(wider=True, bandwidth_gb_per_s=1.0)
    assert latency(wider, 3, 5) == latency(wider, 4, 8)  # 4/8 is faster than 8/8, and wide enough
    assert latency(wider, 5, 3) == latency(wider, 8, 8)
    assert latency(wider, 16, 8) == latency(wider, 4, FLOAT) == latency(wider, FLOAT, FLOAT)
    narrow = slow(wider=True)
    assert latency(narrow, 3, 5) == pytest.approx((WEIGHTS * 3 + (INPUTS + OUTPUTS) * 5) / 8 / 1e3)  # the true bits


def test_energy_is_computing_and_moving() -> None:
    picojoules = {"8/8": 2.0, "4/8": 1.0, "float": 10.0}
    table = slow(pj_per_mac=picojoules, pj_per_byte=100.0).cost_table(Workload((POINTWISE,)), batch=2)
    assert table.energy_j is not None
    assert table.energy_j[0, 7, 7] == pytest.approx((2 * MACS * 2 + (WEIGHTS + 2 * (INPUTS + OUTPUTS)) * 100) * 1e-12)
    assert table.energy_j[0, 3, 7] == pytest.approx((2 * MACS * 1 + (64 + 2 * (INPUTS + OUTPUTS)) * 100) * 1e-12)
    assert np.isnan(table.energy_j[0, 3, 3])
    assert slow().cost_table(Workload((POINTWISE,))).metrics == ("latency", "storage")


def test_pairs_may_be_written_in_any_form(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SLOW, "peak_tops": {"w8a8": 1, "4/8": 2.0, "w4afloat": 0.1}}, sort_keys=False))
    target = hw_models.load_target(str(file))
    assert isinstance(target, RooflineTarget)
    assert list(target.peak_tops) == ["8/8", "4/8", "4/float"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_tops": {}}, "peak_tops has no pair of widths"),
        ({"peak_tops": {"8/9": 1.0}}, "a width must be 1 to 8, 16 or float, not '9'"),
        ({"peak_tops": {"eight": 1.0}}, "'eight' is no pair of widths; write w8a16, 8/16"),
        ({"peak_tops": {"8/8": 1.0, "w8a8": 2.0}}, "the pair 8/8 is given twice, the second time as 'w8a8'"),
        ({"peak_tops": {"8/8": 0.0}}, "'8/8' is 0.0, which should be from 1e-09 to 1e.09"),
        ({"peak_tops": {"8/8": float("nan")}}, "'8/8' is nan"),
        ({"peak_tops": {"8/8": "fast"}}, "'peak_tops.8/8' is 'fast'"),
        ({"peak_tops": 4.0}, "'peak_tops' is 4.0"),
        ({"utilisation": {"deptwise": 0.1}}, "'deptwise' is no kind of layer; known: conv, depthwise"),
        ({"utilisation": {"depthwise": 1.5}}, "the utilisation of depthwise is 1.5; it is a part of the peak, at most 1"),
        ({"bandwidth_gb_per_s": 0}, "'bandwidth_gb_per_s' is 0"),
        ({"on_chip_bytes": 1.5}, "'on_chip_bytes' is 1.5"),
        ({"fixed_us": -1}, "'fixed_us' is -1"),
        ({"pj_per_byte": 1.0}, "pj_per_mac and pj_per_byte come together"),
        ({"pj_per_byte": 1.0, "pj_per_mac": {"8/8": 1.0}}, "pj_per_mac has 8/8 and peak_tops 8/8, 4/8, float"),
        ({"clock_mhz": 200}, "unknown key 'clock_mhz'; accepted: model, name"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SLOW, **changes}, sort_keys=False))
    with pytest.raises(ValueError, match=message) as caught:
        hw_models.load_target(str(file))
    assert str(caught.value).isprintable()
