"""A function of (layer, w, a) is a target: asked once for each pair, and what it does wrong is named."""

from __future__ import annotations

import functools
import logging
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hw_models
from hw_models.function import FunctionTarget
from hw_models.target import price
from hw_models.widths import PLACES, place_of
from tests.hw_models.conftest import install

MINE = '''
class Target:
    name, description, provenance = "mine", "mine", "estimated"
    def cost_table(self, workload, *, batch=None): ...

def latency(layer, w, a):
    """Bit operations per second.

    More words."""
    return layer.macs * w * a * 1e-12

def chip(layer, w, a):
    if (w, a) not in ((8, 8), (4, 8), (16, 16), (None, None)): return None
    return 1e-3 if layer.kind != "depthwise" or w == 8 else float("nan")
chip.provenance = "measured on my board"
chip.batch = 4
chip.capabilities = {"pairs": ["8/8", "4/8", "16/16", "float"], "kinds": {"depthwise": ["8/8"]}}

def make(): return latency
class Callable:
    description = "a chip of my own"
    zero_points = True
    def __call__(self, layer, w, a): return {"latency_s": 1e-3, "energy_j": 2e-3}
instance = Callable()
lists = [[1.0] * 8] * 8
def table(layer, w, a): return lists[w - 1][a - 1]
def one(x): return 1.0
number = 3
'''


@pytest.fixture
def workload(network: nn.Module) -> hw_models.Workload:
    return hw_models.trace(network, torch.zeros(1, 1, 8, 8))


@pytest.fixture
def mine(here: Path) -> str:
    (here / "functions_of_mine.py").write_text(MINE)
    return "functions_of_mine"


@pytest.mark.parametrize("name", ["latency", "make"])
def test_a_formula_is_a_target(name: str, mine: str, workload: hw_models.Workload, caplog: Any) -> None:
    target = hw_models.load_target(f"{mine}:{name}")
    assert target.name == f"{mine}:{name}"
    assert (target.provenance, target.description) == ("estimated", "Bit operations per second.")
    with caplog.at_level(logging.WARNING, "haq"):
        table = price(target, workload)
    assert table.latency_s is not None
    assert table.batch == 1
    for index, layer in enumerate(workload.layers):
        assert table.latency_s[index, 3, 7] == layer.macs * 32 * 1e-12
        assert table.latency_s[index, place_of(16), 0] == layer.macs * 16 * 1e-12
    # None times a number is an error: no float, and that is said.
    assert not table.supported[:, place_of(None)].any()
    assert "is taken to have no 16 bits or float where it fails there: " in caplog.text
    assert f"{mine}:{name} failed for layer 'stem' at 1/float: TypeError" in caplog.text


def test_a_table_of_eight_widths_is_a_target(mine: str, workload: hw_models.Workload) -> None:
    table = price(hw_models.load_target(f"{mine}:table"), workload)
    assert table.supported[:, :8, :8].all()
    assert table.supported.sum() == 5 * 64


def test_what_a_function_says_of_itself(mine: str, workload: hw_models.Workload) -> None:
    table = price(hw_models.load_target(f"{mine}:chip"), workload)
    assert (table.provenance, table.batch) == ("measured on my board", 4)
    assert table.pairs_of(0) == [(4, 8), (8, 8), (16, 16), (32, 32)]
    assert table.pairs_of(1) == [(8, 8)]
    with pytest.raises(ValueError, match="functions_of_mine:chip is for a batch of 4, not 2"):
        price(hw_models.load_target(f"{mine}:chip"), workload, 2)


@pytest.mark.parametrize("name", ["Callable", "instance"])
def test_a_class_whose_objects_are_called(name: str, mine: str, workload: hw_models.Workload) -> None:
    target = hw_models.load_target(f"{mine}:{name}")
    table = price(target, workload)
    assert target.description == "a chip of my own"
    assert target.zero_points is True  # type: ignore[attr-defined]
    assert table.supported.all()
    assert table.metrics == ("latency", "energy", "storage")
    assert table.energy_j is not None
    assert (table.energy_j == 2e-3).all()


def test_a_function_of_an_installed_package(installed: Path, workload: hw_models.Workload) -> None:
    install(installed, "functions_of_others", "haq.targets", {"half": "functions_of_others:chip"}, MINE)
    target = hw_models.load_target("half")
    assert target.name == "half"
    assert price(target, workload).pairs_of(0) == [(4, 8), (8, 8), (16, 16), (32, 32)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "one",
            r"can't be made without arguments: .*; a function of \(layer, w, a\) that returns seconds would be a target too",
        ),
        ("number", "can't be used: it lacks name"),
    ],
)
def test_what_is_no_function_of_a_layer(name: str, message: str, mine: str) -> None:
    with pytest.raises(ValueError, match=f"^hardware target 'functions_of_mine:{name}' {message}"):
        hw_models.load_target(f"{mine}:{name}")


def test_every_pair_is_asked_once(workload: hw_models.Workload) -> None:
    asked: list[tuple[Any, ...]] = []

    def latency(layer: hw_models.Layer, w: int | None, a: int | None) -> float:
        asked.append((layer.name, w, a))
        return 1.0

    price(FunctionTarget(latency, "mine"), workload)
    assert len(asked) == len(set(asked)) == 5 * PLACES**2
    assert {pair[1:] for pair in asked} >= {(8, 8), (16, None), (None, None)}
    asked.clear()
    latency.capabilities = {"pairs": ["8/8", "4/float"], "layers": {"first": ["8/8"]}}  # type: ignore[attr-defined]
    price(FunctionTarget(latency, "mine"), workload)
    assert len(asked) == 1 + 4 * 2
    assert ("hidden", 4, None) in asked


def fails(layer: hw_models.Layer, w: Any, a: Any) -> float:
    return {(8, 8): 1.0}[w, a]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.0, "mine returns 0 for layer 'stem' at 1/1; it must return a positive number, or None"),
        (-1, "mine returns -1 for layer 'stem' at 1/1"),
        ("fast", "mine returns str 'fast' for layer 'stem' at 1/1"),
        (True, "mine returns bool 'True' for layer 'stem' at 1/1"),
        (np.ones(2), "mine returns ndarray .* for layer 'stem' at 1/1"),
        ({"latency": 1.0}, "mine returns 'latency' for layer 'stem' at 1/1; it may return latency_s and energy_j"),
        ({}, "mine returns nothing for layer 'stem' at 1/1"),
        ({"latency_s": 1.0, "energy_j": None}, "mine returns only one of latency_s and energy_j for layer 'stem' at 1/1"),
        ({"energy_j": -1.0}, "mine returns energy_j -1 for layer 'stem' at 1/1"),
        (None, "mine can't do layer 'stem' at any pair of widths"),
        (float("inf"), "mine can't do layer 'stem' at any pair of widths"),
    ],
)
def test_what_is_no_cost_is_named(returned: Any, message: str, workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        price(FunctionTarget(lambda layer, w, a: returned, "mine"), workload)
    assert str(caught.value).isprintable()


def test_scalars_of_libraries_are_costs(workload: hw_models.Workload) -> None:
    for value in (1, np.float32(1), np.int64(1), np.array(1.0), torch.tensor(1.0)):
        table = price(FunctionTarget(lambda layer, w, a, value=value: value, "mine"), workload)  # type: ignore[misc]
        assert table.latency_s is not None
        assert (table.latency_s == 1).all()


def test_an_error_inside_names_the_layer_and_the_pair(workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match="mine failed for layer 'stem' at 1/1: KeyError"):
        price(FunctionTarget(fails, "mine"), workload)

    def told(layer: hw_models.Layer, w: int | None, a: int | None) -> float:
        return fails(layer, w, a)

    told.capabilities = hw_models.Capabilities.model_validate({"pairs": ["8/8", "16/16"]})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="mine failed for layer 'stem' at 16/16: KeyError"):
        price(FunctionTarget(told, "mine"), workload)


def test_a_metric_is_told_of_all_pairs_or_of_none(workload: hw_models.Workload) -> None:
    def latency(layer: hw_models.Layer, w: int | None, a: int | None) -> Any:
        if layer.name == "hidden" and w == 4:
            return 1.0
        return {"latency_s": 1.0, "energy_j": 1.0}

    with pytest.raises(ValueError, match="mine returns no energy_j for layer 'hidden' at 4/1, and does so elsewhere"):
        price(FunctionTarget(latency, "mine"), workload)


def test_what_is_called_supported_must_have_a_cost(workload: hw_models.Workload) -> None:
    def latency(layer: hw_models.Layer, w: int | None, a: int | None) -> float | None:
        if layer.name == "hidden" and w == 4:
            return None
        return 1.0

    latency.capabilities = {"pairs": ["8/8", "4/8"]}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'mine': no finite, positive cost for layer 'hidden' at 4/8, which its capabilities"):
        price(FunctionTarget(latency, "mine"), workload)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("provenance", 3, "`provenance` of mine is 3; it must be a text"),
        ("batch", 0, "`batch` of mine: batch must be a positive integer, not 0"),
        ("batch", 10**30, "`batch` of mine: batch must be at most 65,536 images"),
        ("zero_points", "yes", "`zero_points` of mine is 'yes'; it must be True or False"),
        ("zero_points", 1, "`zero_points` of mine is '1'; it must be True or False"),
        (
            "capabilities",
            {"pairs": []},
            "`capabilities` of hardware target 'mine': key 'pairs': a set of pairs can't be empty",
        ),
    ],
)
def test_a_wrong_attribute_is_named_at_once(attribute: str, value: Any, message: str) -> None:
    def latency(layer: hw_models.Layer, w: int | None, a: int | None) -> float:
        return 1.0

    setattr(latency, attribute, value)
    with pytest.raises(ValueError, match=message):
        FunctionTarget(latency, "mine")


def test_it_goes_to_other_processes(workload: hw_models.Workload) -> None:
    target = pickle.loads(pickle.dumps(FunctionTarget(fails, "mine")))
    assert target == FunctionTarget(fails, "mine")


@pytest.mark.parametrize("told", [10**400, Fraction(10**400), np.float64("inf")])
def test_what_no_float_holds_is_infinite(told: Any, workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match="^mine can't do layer 'stem' at any pair of widths"):
        price(FunctionTarget(lambda layer, w, a: told, "mine"), workload)
    with pytest.raises(ValueError, match="^mine returns -inf for layer 'stem' at 1/1"):
        price(FunctionTarget(lambda layer, w, a: -told, "mine"), workload)


def leaves(*arguments: Any, **options: Any) -> float:
    raise SystemExit(3)


def test_a_target_that_leaves_python_is_named(workload: hw_models.Workload) -> None:
    with pytest.raises(ValueError, match="mine failed for layer 'stem' at 1/1: SystemExit: 3"):
        price(FunctionTarget(leaves, "mine"), workload)

    class Leaving:
        name, description, provenance = "leaving", "", "estimated"
        cost_table = staticmethod(leaves)

    with pytest.raises(ValueError, match="`cost_table` of hardware target 'leaving' failed: SystemExit: 3"):
        price(Leaving(), workload)


def test_capabilities_of_a_function_name_it(workload: hw_models.Workload) -> None:
    def latency(layer: hw_models.Layer, w: int | None, a: int | None) -> float:
        return 1.0

    latency.capabilities = {"layers": {"nowhere": ["8/8"]}}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="^hardware target 'mine': capabilities name 'nowhere', which is no layer"):
        price(FunctionTarget(latency, "mine"), workload)


@pytest.mark.parametrize("widths", [np.array([4, 8]), range(4, 9), object()])
def test_widths_that_are_no_list_are_named(widths: Any) -> None:
    latency = functools.partial(fails, a=8)
    latency.capabilities = {"weights": widths}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="key 'weights'.*: a width must be 1 to 8, 16 or float, not"):
        FunctionTarget(latency, "mine")


def test_a_partial_function_is_described_by_the_function() -> None:
    def latency(layer: hw_models.Layer, w: int | None, a: int | None, clock: float) -> float:
        """Count cycles."""
        return clock

    assert FunctionTarget(functools.partial(latency, clock=1.0), "mine").description == "Count cycles."
