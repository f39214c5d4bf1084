"""BISMO in first order, its targets, and the cost table: golden values, bounds, and errors that name the key."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hw_models
from haq import models
from hw_models.cost import CostTable

# Milliseconds published by HAQ's authors (first convolution and classifier excluded), at 4, 5, 6 and 8 bits. The first-order
# model is a lower bound on `cloud`; `edge` was never described, and 7 % is as near as first order comes.
PUBLISHED = [
    ("timm:mobilenetv1_100", "cloud", (57.49, 77.52, 99.86, 151.09), 0.02),
    ("timm:mobilenetv2_100", "cloud", (74.46, 99.43, 127.07, 189.82), 0.02),
    ("timm:mobilenetv1_100", "edge", (45.45, 57.75, 70.67, 96.20), 0.03),
    ("timm:mobilenetv2_100", "edge", (52.15, 66.94, 82.49, 115.84), 0.07),
]


def workload_of(module: nn.Module, *shape: int) -> hw_models.Workload:
    return hw_models.trace(module, torch.zeros(1, *shape))


@pytest.mark.parametrize(("network", "target", "published", "tolerance"), PUBLISHED)
def test_published_latencies(network: str, target: str, published: tuple[float, ...], tolerance: float) -> None:
    table = hw_models.load_target(target).cost_table(workload_of(models.load(network, pretrained=False).module, 3, 224, 224))
    assert table.latency_s is not None
    for bits, milliseconds in zip((4, 5, 6, 8), published, strict=True):
        ours = 1e3 * table.latency_s[1:-1, bits - 1, bits - 1].sum()
        assert ours == pytest.approx(milliseconds, rel=tolerance)
        if target == "cloud":
            assert ours <= milliseconds


# Exact cycles of HAQ's own table (MobileNetV2, cloud, batch 16), of which first order is a lower bound: layer, w, a, cycles.
EXACT = [("conv_stem", 1, 1, 200720), ("conv_stem", 1, 2, 401472)]


def test_lower_bound_of_the_published_cycles(reference: Path) -> None:
    workload = workload_of(models.load("timm:mobilenetv2_100", pretrained=False).module, 3, 224, 224)
    cycles = hw_models.load_target("cloud").cost_table(workload).cycles
    assert cycles is not None
    with (reference / "haq_cloud_cycles.csv").open() as file:
        rows = [
            (int(r["layer"]), int(r["w_bits"]) - 1, int(r["a_bits"]) - 1, int(r["cycles_batch16"]))
            for r in csv.DictReader(file)
        ]
    layer, w, a, exact = np.array(rows).T
    ours = cycles[layer, w, a]
    assert (ours <= exact).all()
    assert (exact <= 1.67 * ours).all()
    assert ours.sum() == pytest.approx(exact.sum(), rel=0.03)


@pytest.mark.parametrize(("name", "w", "a", "exact"), EXACT)
def test_lower_bound_of_a_few_published_cycles(name: str, w: int, a: int, exact: int) -> None:
    workload = workload_of(nn.Conv2d(3, 32, 3, 2, 1), 3, 224, 224)
    cycles = hw_models.load_target("cloud").cost_table(workload).cycles
    assert cycles is not None
    assert 0.99 * exact < cycles[0, w - 1, a - 1] <= exact


def test_golden_cycles_by_hand() -> None:
    """64 -> 128 pointwise at 14x14, 3x3 depthwise of 64, fc 1024 -> 1000; at w5/a3."""
    pointwise = workload_of(nn.Conv2d(64, 128, 1), 64, 14, 14)
    depthwise = workload_of(nn.Conv2d(64, 64, 3, padding=1, groups=64), 64, 14, 14)
    linear = workload_of(nn.Linear(1024, 1000), 1024)
    edge, cloud = hw_models.load_target("edge"), hw_models.load_target("cloud")
    rows = [
        (edge, pointwise, max(16 * 25 * 15, 196 * 3 * 8, 128 * 5 * 8)),
        (edge, depthwise, 8 * max(25 * 15, 196 * 3 * 8, 8 * 5 * 8)),
        (edge, linear, max(125 * 1 * 4 * 15, 1 * 4 * 3 * 8, 1000 * 4 * 5 * 8)),
        (cloud, pointwise, 16 * max(8 * 13 * 15, 196 * 3, 128 * 5)),
        (cloud, depthwise, 16 * 4 * max(13 * 15, 196 * 3, 16 * 5)),
        (cloud, linear, max(63 * 1 * 4 * 15, 16 * 4 * 3, 1000 * 4 * 5)),
    ]
    for target, workload, cycles in rows:
        table = target.cost_table(workload)
        assert table.cycles is not None
        assert table.cycles[0, 4, 2] == cycles
        assert table.latency_s is not None
        assert table.latency_s[0, 4, 2] == pytest.approx(cycles / 200e6)


def test_what_bounds_a_layer() -> None:
    table = hw_models.load_target("edge").cost_table(workload_of(nn.Conv2d(64, 64, 3, padding=1, groups=64), 64, 14, 14))
    assert table.bound is not None
    assert {table.bounds[i] for i in table.bound.ravel()} == {"activation fetch"}


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 2),
    st.integers(5, 12),
    st.booleans(),
)
def test_latency_is_monotone_in_bits_and_grows_with_work(
    inputs: int, outputs: int, kernel: int, stride: int, size: int, depthwise: bool
) -> None:
    module = (
        nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs)
        if depthwise
        else nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    )
    small, large = (workload_of(module, inputs, n, n) for n in (size, size * 2))
    for name in hw_models.target_names():
        target = hw_models.load_target(name)
        table, larger = target.cost_table(small), target.cost_table(large)
        assert table.latency_s is not None
        assert larger.latency_s is not None
        assert (np.diff(table.latency_s, axis=1) >= 0).all()
        assert (np.diff(table.latency_s, axis=2) >= 0).all()
        assert (larger.latency_s >= table.latency_s).all()
        assert (larger.latency_s > table.latency_s).any()


def test_batch(network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    target = hw_models.load_target("cloud")
    one, own, same = (target.cost_table(workload, batch=batch) for batch in (1, None, 16))
    assert (one.batch, own.batch) == (1, 16)
    assert np.array_equal(own.latency_s, same.latency_s)
    assert np.allclose(own.latency_s[:3], 16 * one.latency_s[:3])
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"batch must be a positive integer, not {bad}"):
            target.cost_table(workload, batch=bad)  # type: ignore[arg-type]


def test_prices_of_many_policies_at_once(network: nn.Module) -> None:
    table = hw_models.load_target("edge").cost_table(workload_of(network, 1, 8, 8))
    random = np.random.default_rng(0)
    w, a = random.integers(1, 9, (2, 7, 3, 5))
    costs = table.price(w, a)
    assert costs.energy_j is None
    assert costs.latency_s is not None
    assert costs.storage_bytes is not None
    assert costs.latency_s.shape == (7, 3)
    expected = sum(table.latency_s[i, w[2, 1, i] - 1, a[2, 1, i] - 1] for i in range(5))
    assert costs.latency_s[2, 1] == pytest.approx(expected)
    for bad, message in (
        (np.zeros(5, int), "from 1 to 8, found 0"),
        (np.full(5, 9), "found 9"),
        (np.ones(4, int), "5 layers"),
        (np.ones(5), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            table.price(bad, np.ones(5, int))


def test_storage_is_weights_at_their_bits_and_scales_and_biases(network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    storage = hw_models.load_target("edge").cost_table(workload).storage_bytes
    assert storage[0, 7, 0] == 144 + 4 * 16  # no bias
    assert storage[1, 2, 5] == 144 * 3 / 8 + 4 * 16 + 4 * 16
    assert storage[4, 0, 0] == 64 / 8 + 4 * 4 + 4 * 4
    assert (storage == storage[:, :, :1]).all()


def test_undominated_pairs_are_those_worth_choosing() -> None:
    cost = np.ones((1, 8, 8)) * np.arange(1, 9)  # only activation bits cost
    allowed = np.ones((1, 8, 8), bool)
    worth = hw_models.undominated(cost, allowed)
    assert {tuple(pair) for pair in np.argwhere(worth[0]) + 1} == {(8, a) for a in range(1, 9)}
    product = np.arange(1, 9)[:, None] * np.arange(1, 9)
    assert hw_models.undominated(product[None].astype(float), allowed).all()
    allowed[0, 7] = False
    worth = hw_models.undominated(cost, allowed)
    assert {tuple(pair) for pair in np.argwhere(worth[0]) + 1} == {(7, a) for a in range(1, 9)}


def test_a_metric_that_is_missing_lists_those_there_are(network: nn.Module) -> None:
    table = hw_models.load_target("edge").cost_table(workload_of(network, 1, 8, 8))
    assert table.metrics == ("latency", "storage")
    with pytest.raises(ValueError, match="no metric 'energy'; it has latency, storage"):
        table.metric("energy")


def test_a_cost_that_is_not_a_positive_number_is_refused(network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    good = np.ones((5, 8, 8))
    for value in (0.0, -1.0, np.nan, np.inf):
        bad = good.copy()
        bad[2, 3, 3] = value
        with pytest.raises(ValueError, match="'pointwise'"):
            CostTable("mine", "measured", workload, 1, bad, None, good)
    with pytest.raises(ValueError, match="shape"):
        CostTable("mine", "measured", workload, 1, good[:3], None, good)


def test_a_target_from_a_file(tmp_path: Path, network: nn.Module) -> None:
    text = (Path(hw_models.__file__).parent / "targets" / "edge.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("clock_mhz: 200", "clock_mhz: 100"))
    workload = workload_of(network, 1, 8, 8)
    slow, fast = (
        hw_models.load_target(str(mine)).cost_table(workload),
        hw_models.load_target("edge").cost_table(workload),
    )
    assert slow.latency_s == pytest.approx(2 * fast.latency_s)

    for before, after, message in (
        ("clock_mhz: 200", "clock_mhz: -5", r"'clock_mhz' is -5.*greater than 0"),
        ("clock_mhz: 200", "clock_mhz: fast", r"'clock_mhz' is 'fast'"),
        ("clock_mhz: 200", "", "'clock_mhz' is missing"),
        ("clock_mhz: 200", "clock_mhz: .nan", "'clock_mhz' is nan"),
        ("clock_mhz:", "clock_ghz: 1\nclock_mhz:", "unknown key 'clock_ghz'; accepted: model, name"),
        ("model: bismo", "model: abacus", "'model' is 'abacus'; accepted: bismo"),
        ("model: bismo", "model: [", "not YAML"),
    ):
        mine.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=message):
            hw_models.load_target(str(mine))
    mine.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        hw_models.load_target(str(mine))


def test_unknown_targets_name_the_close_ones() -> None:
    assert set(hw_models.target_names()) == {"cloud", "edge"}
    with pytest.raises(ValueError, match="did you mean edge"):
        hw_models.load_target("egde")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hw_models.load_target("nowhere.yaml")
