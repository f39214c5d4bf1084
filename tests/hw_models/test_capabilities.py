"""Capabilities: what a chip can't do is in none of its tables, and what contradicts itself gets one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hw_models
from hw_models.capabilities import KINDS, Capabilities, accumulator_bits, has_zero_points
from hw_models.target import price
from hw_models.widths import PLACES, WIDTHS, place_of

EDGE = (Path(hw_models.__file__).parent / "targets" / "edge.yaml").read_text(encoding="utf-8")
CHIP = {"pairs": ["8/8", "4/8", "4/4"], "kinds": {"depthwise": ["8/8"]}}


class Mixed(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.along = nn.Conv1d(8, 8, 3)
        self.filters = nn.Conv1d(8, 8, 3, groups=8)
        self.head = nn.Linear(8 * 12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.pointwise(self.depthwise(self.stem(x))))
        x = self.filters(self.along(x.flatten(2)))
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def workload() -> hw_models.Workload:
    return hw_models.trace(Mixed(), torch.zeros(1, 3, 8, 8))


class Chip:
    """A target of somebody's own, a millisecond for everything."""

    name, description, provenance = "chip", "a chip", "measured"

    def __init__(self, capabilities: Any = None, costs: Any = 1e-3) -> None:
        self.capabilities = capabilities
        self.costs = costs

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        latency = np.ones((len(workload), PLACES, PLACES)) * self.costs
        cycles = np.full(latency.shape, 1001)
        stored = hw_models.storage_bytes(workload)
        return hw_models.CostTable("chip", "measured", workload, 1, latency, 2 * latency, stored, cycles)


def pairs_of(content: Any, workload: hw_models.Workload) -> dict[str, list[tuple[int, int]]]:
    supported = Capabilities.model_validate(content).supported(workload)
    found = {}
    for name, table in zip(workload.names, supported, strict=True):
        found[name] = [(WIDTHS[w], WIDTHS[a]) for w, a in np.argwhere(table)]
    return found


def test_pairs_of_all_layers_and_of_kinds(workload: hw_models.Workload) -> None:
    found = pairs_of(CHIP, workload)
    assert found["stem"] == found["grouped"] == found["along"] == [(4, 4), (4, 8), (8, 8)]
    assert found["depthwise"] == found["filters"] == [(8, 8)]
    table = price(Chip(CHIP), workload)
    assert np.array_equal(table.supported, Capabilities.model_validate(CHIP).supported(workload))
    with pytest.raises(ValueError, match="chip can't do layer 'depthwise' at w4/a4; it can do 8/8$"):
        table.price(np.full(7, 4), np.full(7, 4))


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        (({"pairs": ["w8a16"]}, {"pairs": "8/16"}, {"pairs": [[8, 16]]}, ["8/16"], "w8a16"), [(8, 16)]),
        (({"pairs": ["float", "4/float"]}, {"weights": "4,float", "activations": ["float"]}), [(4, 32), (32, 32)]),
        (({"weights": [4, 8], "activations": [8]}, {"weights": "4,8", "activations": 8}), [(4, 8), (8, 8)]),
        (({"weights": "7:8", "activations": "16"},), [(7, 16), (8, 16)]),
        (({"weights": [4]},), [(4, a) for a in WIDTHS]),
        (({},), list(itertools.product(WIDTHS, WIDTHS))),
    ],
)
def test_ways_to_write_the_pairs(forms: Any, expected: Any, workload: hw_models.Workload) -> None:
    for form in forms:
        assert pairs_of(form, workload)["stem"] == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "matmul"])
def test_each_kind_is_told_from_the_others(kind: str, workload: hw_models.Workload) -> None:
    found = pairs_of({"pairs": ["8/8"], "kinds": {kind: ["4/4", "8/8"]}}, workload)
    layers = {
        "conv": ["stem"],
        "depthwise": ["depthwise", "filters"],
        "pointwise": ["pointwise"],
        "grouped": ["grouped"],
        "linear": ["head"],
        "conv1d": ["along", "filters"],
    }
    assert [name for name, pairs in found.items() if len(pairs) == 2] == layers[kind]
    assert pairs_of({"pairs": ["8/8"], "kinds": {"matmul": ["4/4"]}}, workload)["head"] == [(8, 8)]


def test_the_most_specific_rule_wins(workload: hw_models.Workload) -> None:
    content = {
        "pairs": ["8/8", "4/8"],
        "kinds": {"conv": ["4/4"], "pointwise": {"weights": [8]}, "depthwise": ["8/8", "8/16"], "conv1d": ["8/16", "4/16"]},
        "layers": {"first": ["16/16"], "last": {"weights": [4]}, "grouped": ["float"]},
    }
    found = pairs_of(content, workload)
    assert found["stem"] == [(16, 16)]
    assert found["pointwise"] == [(8, 8)]
    assert found["grouped"] == [(32, 32)]
    assert found["head"] == [(4, 8)]
    assert found["along"] == [(4, 16), (8, 16)]
    assert found["filters"] == [(8, 16)]  # it is both
    content["layers"]["stem"] = ["2/2"]  # type: ignore[call-overload,index]
    assert pairs_of(content, workload)["stem"] == [(2, 2)]


def brute_force(layer: hw_models.Layer, w: int, a: int, signed: bool) -> int:
    """Find the smallest two's complement that holds the largest sum, by its definition."""
    products = layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
    of_weights = max(1, 2 ** (w - 1) - 1)
    of_activations = 2**a - 1
    if signed:
        of_activations = max(1, 2 ** (a - 1) - 1)
    total = products * of_weights * of_activations
    bits = 1
    while not (-(2 ** (bits - 1)) <= -total and total <= 2 ** (bits - 1) - 1):
        bits += 1
    return bits


def test_the_bits_of_an_accumulator(workload: hw_models.Workload) -> None:
    for layer, w, a, signed in itertools.product(workload.layers, WIDTHS[:-1], WIDTHS[:-1], (False, True)):
        assert accumulator_bits(layer, w, a, signed=signed) == brute_force(layer, w, a, signed)
    # 27 products of at most 127 and 255 are 874,395: 20 bits and a sign.
    assert accumulator_bits(workload.layers[0], 8, 8) == 21
    # The bound of A2Q's section 3 takes 2^7 and 2^8, and is never below ours, nor above by more than a bit each.
    for layer in workload.layers:
        products = layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
        alpha = np.log2(products) + 8 + 8 - 1
        theirs = int(np.ceil(alpha + np.log2(1 + 2.0**-alpha) + 1))
        assert theirs - 2 <= accumulator_bits(layer, 8, 8) <= theirs


def test_a_pair_whose_sums_can_overflow_is_refused(workload: hw_models.Workload) -> None:
    content: dict[str, Any] = {"pairs": ["8/8", "4/8", "4/4", "16/16", "16/float"], "accumulator_bits": 20}
    found = pairs_of(content, workload)
    for layer in workload.layers:
        fitting = [(w, a) for w, a in ((4, 4), (4, 8), (8, 8), (16, 16)) if brute_force(layer, w, a, False) <= 20]
        assert found[layer.name] == [*fitting, (16, 32)]  # float has no integer sums
    assert (8, 8) not in found["stem"]
    assert (8, 8) in found["depthwise"]
    # Signed activations need a bit less.
    assert (8, 8) in pairs_of({**content, "activation_sign": "signed"}, workload)["stem"]
    assert (8, 8) not in pairs_of({**content, "activation_sign": "signed", "zero_points": True}, workload)["stem"]


def test_the_wider_unit_has_its_price(workload: hw_models.Workload) -> None:
    content = {"pairs": ["8/8", "4/8"], "accumulator_bits": 20, "on_overflow": "wider", "overflow_cost": 2.5}
    table, plain = price(Chip(content), workload), price(Chip({"pairs": ["8/8", "4/8"]}), workload)
    assert np.array_equal(table.supported, plain.supported)
    for index, layer in enumerate(workload.layers):
        for w in (4, 8):
            factor = 1.0
            if brute_force(layer, w, 8, False) > 20:
                factor = 2.5
            cell = index, place_of(w), place_of(8)
            assert table.latency_s is not None
            assert plain.latency_s is not None
            assert table.energy_j is not None
            assert plain.energy_j is not None
            assert table.cycles is not None
            assert table.latency_s[cell] == factor * plain.latency_s[cell]
            assert table.energy_j[cell] == factor * plain.energy_j[cell]
            assert table.cycles[cell] == np.ceil(factor * 1001)
            assert table.storage_bytes[cell] == plain.storage_bytes[cell]


def test_layers_whose_integers_reach_further(workload: hw_models.Workload) -> None:
    """2 bits from -2 to 1 can sum to twice what -1 to 1 can."""
    content = {"pairs": ["2/8", "4/float"], "accumulator_bits": accumulator_bits(workload.layers[0], 2, 8)}
    table = price(Chip(content), workload)
    assert table.supported[0, place_of(2), place_of(8)]
    reaching = price(Chip(content), workload, full_range={"stem"})
    assert not reaching.supported[0, place_of(2), place_of(8)]
    assert np.array_equal(reaching.supported[1:], table.supported[1:])
    wider = {**content, "on_overflow": "wider", "overflow_cost": 4.0}
    cell = 0, place_of(2), place_of(8)
    narrow, full = (price(Chip(wider), workload, full_range=names).latency_s for names in ((), ("stem",)))
    assert narrow is not None
    assert full is not None
    assert full[cell] == 4 * narrow[cell]
    with pytest.raises(ValueError, match="'chip': layer 'stem' has no pair of widths: with integers down to -2.* at 2/8"):
        price(Chip({**content, "pairs": ["4/float"], "layers": {"first": ["2/8"]}}), workload, full_range={"stem"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pairs": []}, "key 'pairs': a set of pairs can't be empty"),
        ({"weights": []}, "key 'weights': a set of widths can't be empty"),
        ({"pairs": ["8/8"], "weights": [4]}, "pairs and weights both say which widths there are: give one of the two"),
        ({"kinds": {"conv": {"pairs": ["8/8"], "activations": [4]}}}, "key 'kinds.conv': pairs and activations both say"),
        ({"kinds": {"conv": {}}}, "key 'kinds.conv': a rule must say something"),
        ({"kinds": {"conv": 8}}, "key 'kinds.conv' is 8: give a list of pairs of widths"),
        ({"kinds": {"attention": ["8/8"]}}, "key 'kinds': 'attention' is no kind of layer; known: conv, depthwise"),
        ({"pairs": ["8/8"], "kinds": {"conv": {"weights": [4]}}}, "kinds.conv leaves none of the pairs that all layers have"),
        ({"pairs": ["9/8"]}, "key 'pairs': a width must be 1 to 8, 16 or float, not '9'"),
        ({"pairs": ["88"]}, "key 'pairs': '88' is no pair of widths"),
        ({"pairs": {"a": 1}}, "give a list of pairs of widths, weights/activations"),
        ({"weights": [12]}, "a width must be 1 to 8, 16 or float, not '12'"),
        ({"activations": "signed"}, "of integers' signs say activation_sign: signed"),
        ({"activation_sign": "both"}, "key 'activation_sign' is 'both': Input should be 'auto', 'signed' or 'unsigned'"),
        ({"per_channel_weights": "no"}, "key 'per_channel_weights' is 'no'"),
        ({"chips": 1}, "unknown key 'chips'; accepted: pairs, weights, activations, kinds, layers, per_channel_weights"),
        ({"kinds": {"conv": {"bits": 8}}}, "unknown key 'kinds.conv.bits'; accepted: pairs, weights, activations$"),
        ({"accumulator_bits": 0}, "key 'accumulator_bits' is 0"),
        ({"on_overflow": "wider"}, "on_overflow and overflow_cost mean nothing without accumulator_bits"),
        ({"accumulator_bits": 24, "on_overflow": "wider"}, "on_overflow is wider, but not what that costs"),
        (
            {"accumulator_bits": 24, "overflow_cost": 2.0},
            "overflow_cost is what the wider unit costs, and on_overflow is refuse",
        ),
        ({"accumulator_bits": 24, "on_overflow": "wider", "overflow_cost": 0.5}, "key 'overflow_cost' is 0.5"),
        (3, "must be hw_models.Capabilities, or a mapping of its keys, not int"),
    ],
)
def test_what_contradicts_itself_gets_one_sentence(content: Any, message: str, workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match=f"^`capabilities` of hardware target 'chip'.*{message}") as caught:
        price(Chip(content), workload)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": {"haed": ["8/8"]}}, "capabilities name 'haed', which is no layer of the workload; close: head"),
        (
            {"pairs": ["8/8"], "layers": {"first": {"weights": [4]}}},
            r"layer 'stem' \(conv\) has no pair of widths: its rules in the capabilities have none in common",
        ),
        (
            {"kinds": {"depthwise": ["8/8"], "conv1d": ["4/4"]}},
            r"layer 'filters' \(depthwise, conv1d\) has no pair of widths",
        ),
        (
            {"pairs": ["8/8", "4/8"], "accumulator_bits": 12},
            "layer 'stem' has no pair of widths: its sums of 27 products need accumulators of 17 bits at 4/8, the least of "
            "4/8, 8/8, and there are 12; on_overflow: wider would price them",
        ),
    ],
)
def test_what_a_workload_can_not_have_gets_one_sentence(content: Any, message: str, workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match=f"^hardware target 'chip': {message}") as caught:
        price(Chip(content), workload)
    assert str(caught.value).isprintable()


def test_the_first_layer_of_one_is_the_last(workload: hw_models.Workload) -> None:
    single = hw_models.trace(nn.Linear(4, 4), torch.zeros(1, 4))
    clash: dict[str, Any] = {"layers": {"first": ["8/8"], "last": ["8/8", "16/16"]}}
    with pytest.raises(
        ValueError, match="only layer '' is both its first and its last, .* 8/8 and 8/8, 16/16: name the layer"
    ):
        price(Chip(clash), single)
    assert pairs_of({"layers": {"first": ["8/8"], "last": "8/8"}}, single)[""] == [(8, 8)]
    assert pairs_of(clash, workload)["head"] == [(8, 8), (16, 16)]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e31])
def test_a_pair_that_is_called_supported_has_a_cost(value: float, workload: hw_models.Workload) -> None:
    costs = np.full((7, PLACES, PLACES), 1e-3)
    costs[2, place_of(4), place_of(8)] = value
    price(Chip(costs=costs), workload)  # says nothing of it
    price(Chip({"weights": [4, 8]}, costs), workload)  # says nothing of this pair
    price(Chip({"pairs": ["8/8"]}, costs), workload)  # doesn't call it supported
    for content in (CHIP, {"weights": [4, 8], "activations": [8]}, {"layers": {"pointwise": ["4/8", "8/8"]}}):
        with pytest.raises(ValueError, match="'chip': no finite, positive cost for layer 'pointwise' at 4/8, which its cap"):
            price(Chip(content, costs), workload)
    costs[2, place_of(4), place_of(8)] = -1.0
    with pytest.raises(ValueError, match="'chip' .*latency_s of chip is not a positive number for 'pointwise' at 4/8"):
        price(Chip(CHIP, costs), workload)


def test_a_layer_without_costs_for_what_is_left_is_named(workload: hw_models.Workload) -> None:
    costs = np.full((7, PLACES, PLACES), 1e-3)
    costs[:, place_of(4)] = np.nan
    with pytest.raises(ValueError, match="'chip': layer 'stem' has no pair of widths: its capabilities have"):
        price(Chip({"weights": [4]}, costs), workload)


def test_capabilities_in_a_file(tmp_path: Path, workload: hw_models.Workload) -> None:
    mine = tmp_path / "mine.yaml"
    text = """
capabilities:
  pairs: [8/8, 4/8, 4/4]
  kinds:
    depthwise: [8/8]
  layers:
    first: {weights: [8], activations: "6:8"}
  per_channel_weights: false
  accumulator_bits: 24
"""
    mine.write_text(EDGE + text)
    target = hw_models.load_target(str(mine))
    table = price(target, workload)
    assert table.supported.sum((1, 2)).tolist() == [3, 1, 3, 3, 3, 1, 3]
    plain = price(hw_models.load_target("edge"), workload)
    # Whoever asks the target itself gets the same.
    assert np.array_equal(target.cost_table(workload).latency_s, table.latency_s, equal_nan=True)
    assert np.array_equal(table.latency_s, np.where(table.supported, plain.latency_s, np.nan), equal_nan=True)
    for wrong, message in (
        ("  chips: 1\n", "unknown key 'capabilities.chips'; accepted: pairs, weights"),
        ("  weights: [4]\n", "key 'capabilities': pairs and weights both say"),
        ("  zero_points: 3\n", "key 'capabilities.zero_points' is 3"),
        ("  zero_points: true\nzero_points: false\n", "zero_points and capabilities.zero_points say different things"),
    ):
        mine.write_text(EDGE + text + wrong)
        with pytest.raises(ValueError, match=message) as caught:
            hw_models.load_target(str(mine))
        assert str(caught.value).isprintable()


def test_bismo_has_no_16_bits_whatever_a_file_says(tmp_path: Path, workload: hw_models.Workload) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{EDGE}\ncapabilities: [8/8, 8/16]\n")
    with pytest.raises(ValueError, match="'edge': no finite, positive cost for layer 'stem' at 8/16, which its capabilities"):
        price(hw_models.load_target(str(mine)), workload)


@pytest.mark.parametrize(
    ("attribute", "content", "expected"),
    [
        (True, None, True),
        (False, None, False),
        (True, {}, True),
        (True, {"zero_points": False}, False),
        (False, {"zero_points": True}, True),
    ],
)
def test_zero_points_are_said_in_one_of_two_places(attribute: bool, content: Any, expected: bool) -> None:
    chip = Chip(content)
    chip.zero_points = attribute  # type: ignore[attr-defined]
    assert has_zero_points(chip) is expected


def test_capabilities_in_words() -> None:
    assert str(Capabilities()) == "whatever it has costs for"
    content = {
        "pairs": ["8/8", "4/float"],
        "kinds": {"linear": {"weights": [4, 8]}},
        "layers": {"first": ["float"]},
        "per_channel_weights": False,
        "power_of_two_scales": True,
        "zero_points": False,
        "activation_sign": "unsigned",
        "accumulator_bits": 20,
        "on_overflow": "wider",
        "overflow_cost": 2.5,
    }
    assert str(Capabilities.model_validate(content)) == (
        "4/float, 8/8; linear: weights 4, 8 with any activations; first: float; one scale for all weights of a layer; scales "
        "that are powers of two; no zero points; unsigned activations; accumulators of 20 bits, sums that can overflow at 2.5 "
        "times the cost"
    )


def test_the_wider_unit_is_paid_for_once(tmp_path: Path, workload: hw_models.Workload) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{EDGE}\ncapabilities: {{accumulator_bits: 20, on_overflow: wider, overflow_cost: 3.0}}\n")
    target = hw_models.load_target(str(mine))
    asked, priced = target.cost_table(workload), price(target, workload)
    plain = hw_models.load_target("edge").cost_table(workload)
    assert asked.latency_s is not None
    assert priced.latency_s is not None
    assert plain.latency_s is not None
    assert asked.latency_s[0, 7, 7] == priced.latency_s[0, 7, 7] == 3 * plain.latency_s[0, 7, 7]
    assert asked.latency_s[0, 0, 0] == plain.latency_s[0, 0, 0]
