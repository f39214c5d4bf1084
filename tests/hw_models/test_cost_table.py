"""A cost table holds every layer at every pair of bits, prices thousands of policies at once, has no cost of 0, and knows
which pairs the target can't do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hw_models
from hw_models.cost import CostTable
from hw_models.machine import Machine


def workload_of(module: nn.Module, *shape: int) -> hw_models.Workload:
    return hw_models.trace(module, torch.zeros(1, *shape))


@pytest.mark.parametrize("name", hw_models.target_names())
def test_every_target_prices_every_kind_of_layer(name: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.Conv2d(8, 8, (1, 5), padding="same", groups=8),
        nn.Conv2d(8, 12, 3, dilation=2, groups=4),
        nn.Flatten(2),
        nn.Conv1d(12, 6, 3, padding=1),
        nn.Linear(16, 5),
    )
    workload = workload_of(network, 4, 16, 16)
    target = hw_models.load_target(name)
    table = target.cost_table(workload)
    assert {layer.kind for layer in workload.layers} == {"conv", "depthwise", "grouped", "linear"}
    assert table.supported[:, 7, 7].all()
    if isinstance(target, Machine):
        assert table.supported[:, :8, :8].all()
    for metric in table.metrics:
        assert table.metric(metric).shape == (5, 10, 10)
        assert (table.metric(metric)[table.supported] > 0).all()
    assert table.bound is not None
    if isinstance(target, Machine):
        assert table.cycles is not None
        seconds = table.cycles / (target.clock_mhz * 1e6)
        assert table.latency_s[table.supported] == pytest.approx(seconds[table.supported])  # type: ignore[index]
    assert 0 <= table.bound.min() <= table.bound.max() < len(table.bounds)
    assert {"latency", "storage"} <= set(table.metrics)
    assert table.provenance == "estimated"


@pytest.mark.parametrize("name", hw_models.target_names())
def test_batch(name: str, network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    target = hw_models.load_target(name)
    assert target.cost_table(workload).batch == target.batch  # type: ignore[attr-defined]
    one, sixteen = (target.cost_table(workload, batch=batch) for batch in (1, 16))
    assert (one.batch, sixteen.batch) == (1, 16)
    assert one.latency_s is not None
    assert sixteen.latency_s is not None
    assert np.array_equal(one.supported, sixteen.supported)
    one_s, sixteen_s = one.latency_s[one.supported], sixteen.latency_s[one.supported]
    # A linear layer of one image may fill an array as little as one of sixteen.
    assert (sixteen_s >= one_s).all()
    of_convolutions = np.nonzero(one.supported)[0] < 3
    assert (sixteen_s[of_convolutions] > one_s[of_convolutions]).all()
    assert (sixteen_s <= 16 * one_s).all()
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"batch must be a positive integer, not {bad}"):
            target.cost_table(workload, batch=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["edge", "bitfusion"])
def test_prices_of_many_policies_at_once(name: str, network: nn.Module) -> None:
    table = hw_models.load_target(name).cost_table(workload_of(network, 1, 8, 8))
    random = np.random.default_rng(0)
    w, a = random.integers(1, 9, (2, 7, 3, 5))
    costs = table.price(w, a)
    arrays = (table.latency_s, table.energy_j, table.storage_bytes, table.cycles)
    for cost, array in zip(costs, arrays, strict=True):
        assert cost is not None
        assert array is not None
        assert cost.shape == (7, 3)
        expected = sum(array[i, w[2, 1, i] - 1, a[2, 1, i] - 1] for i in range(5))
        assert cost[2, 1] == pytest.approx(expected)
    for bad, message in (
        (np.zeros(5, int), "from 1 to 8, 16 or float .32., found 0"),
        (np.full(5, 9), "found 9"),
        (np.ones(4, int), "5 layers"),
        (np.ones(5), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            table.price(bad, np.ones(5, int))
        with pytest.raises(ValueError, match=message):
            table.price(np.ones(5, int), bad)


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
    table = hw_models.load_target("cloud").cost_table(workload_of(network, 1, 8, 8))
    assert table.metrics == ("latency", "storage")
    assert table.price(np.ones(5, int), np.ones(5, int)).energy_j is None
    with pytest.raises(ValueError, match="no metric 'energy'; it has latency, storage"):
        table.metric("energy")


def test_a_cost_that_is_not_a_positive_number_is_refused(network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    good = np.ones((5, 8, 8))
    for value in (0.0, -1.0, -np.inf):
        bad = good.copy()
        bad[2, 3, 3] = value
        with pytest.raises(ValueError, match="'pointwise'"):
            CostTable("mine", "measured", workload, 1, bad, None, good)
    with pytest.raises(ValueError, match="shape"):
        CostTable("mine", "measured", workload, 1, good[:3], None, good)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e9])
def test_a_pair_without_a_sane_cost_is_one_that_the_target_can_not_do(network: nn.Module, value: float) -> None:
    """A table of energies of about 1 J says by `value` that one layer can't be done at w8/a8."""
    workload = workload_of(network, 1, 8, 8)
    energy = np.ones((5, 8, 8))
    energy[2, 7, 7] = value
    table = CostTable("mine", "measured", workload, 1, np.ones((5, 8, 8)), energy, np.ones((5, 8, 8)))
    assert np.argwhere(~table.supported[:, :8, :8]).tolist() == [[2, 7, 7]]
    assert not table.supported[:, 8:].any()
    assert not table.supported[:, :, 8:].any()
    assert all(np.isnan(table.metric(metric)[2, 7, 7]) for metric in table.metrics)
    eights = np.full((3, 5), 8)
    with pytest.raises(ValueError, match="mine can't do layer 'pointwise' at w8/a8"):
        table.price(eights, eights)
    eights[:, 2] = 7
    assert table.price(eights, eights).energy_j == pytest.approx([5, 5, 5])
    assert "at w8/a8 latency not supported" in repr(table)
    assert "<td>5</td><td>5</td>" in table._repr_html_()  # the least and the most, of what can be done
    energy[2] = value
    if value > 1e9 or np.isnan(value):  # a layer that always takes 1e9 J is dear, and that is all
        with pytest.raises(ValueError, match="not a positive number for 'pointwise', whatever the pair"):
            CostTable("mine", "measured", workload, 1, np.ones((5, 8, 8)), energy, np.ones((5, 8, 8)))


def test_an_empty_network_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        hw_models.load_target("cloud").cost_table(hw_models.Workload(()))


def test_a_table_says_on_one_line_what_it_is(network: nn.Module) -> None:
    table = hw_models.load_target("edge").cost_table(workload_of(network, 1, 8, 8))
    assert table.latency_s is not None
    assert table.energy_j is not None
    assert repr(table) == (
        "CostTable(5 layers on edge, estimated, one batch of 1 image; at w8/a8 "
        f"latency {table.latency_s[:, 7, 7].sum():.4g} s, energy {table.energy_j[:, 7, 7].sum():.4g} J, "
        f"storage {table.storage_bytes[:, 7, 7].sum():,.0f} B)"
    )
    html = table._repr_html_()
    assert "5 layers on edge, estimated, one batch of 1 image" in html
    cells = [
        f"{a.sum():.4g}"
        for a in (table.latency_s[:, 7, 7], np.nanmin(table.latency_s, (1, 2)), np.nanmax(table.latency_s, (1, 2)))
    ]
    assert f"<td>latency</td><td>s</td><td>{'</td><td>'.join(cells)}</td>" in html
    assert html.count("<tr>") == 1 + 3


def test_a_name_can_not_steer_the_notebook(network: nn.Module) -> None:
    workload = workload_of(network, 1, 8, 8)
    table = CostTable("<script>", "measured", workload, 2, np.ones((5, 8, 8)), None, np.ones((5, 8, 8)))
    assert "&lt;script&gt;, measured, one batch of 2 images" in table._repr_html_()
    assert "<script>" not in table._repr_html_()
