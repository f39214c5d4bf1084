"""Hardware is data: targets come by name or from a YAML file, and a wrong file gets one sentence that names what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import haq
import hw_models
from tests.conftest import images
from tests.hw_models.conftest import install

FOLDER = Path(hw_models.__file__).parent / "targets"


@pytest.mark.parametrize("name", hw_models.target_names())
def test_a_file_is_its_target_and_says_its_units(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert content["name"] == name
    assert set(content) == set(content) & set(type(hw_models.load_target(name)).model_fields)  # type: ignore[attr-defined]
    units = ("_bits", "_per_cycle", "_bytes", "_mhz", "_per_bit", "_w", "_planes", "_tokens", "_entries")
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        number = isinstance(yaml.safe_load(value), int | float) if value else False
        # A number's unit is in its key or in the comment behind it.
        assert not number or key.endswith(units) or "#" in line, line


@pytest.mark.parametrize("name", hw_models.target_names())
def test_a_copy_of_your_own(name: str, tmp_path: Path, network: nn.Module) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    clock = next(line for line in text.splitlines() if line.startswith("clock_mhz"))
    mine.write_text(text.replace(clock, f"clock_mhz: {hw_models.load_target(name).clock_mhz / 2}"))  # type: ignore[attr-defined]
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    slow, fast = (hw_models.load_target(str(which)).cost_table(workload) for which in (mine, name))
    assert slow.latency_s == pytest.approx(2 * fast.latency_s)


def test_a_wrong_file_names_the_key_the_value_and_what_is_accepted(tmp_path: Path) -> None:
    text = (FOLDER / "edge.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    for before, after, message in (
        ("clock_mhz: 200", "clock_mhz: -5", r"'clock_mhz' is -5.*greater than 0"),
        ("clock_mhz: 200", "clock_mhz: fast", r"'clock_mhz' is 'fast'"),
        ("clock_mhz: 200", "", "'clock_mhz' is missing"),
        ("clock_mhz: 200", "clock_mhz: .nan", "'clock_mhz' is nan"),
        ("clock_mhz:", "clock_ghz: 1\nclock_mhz:", "unknown key 'clock_ghz'; accepted: model, name"),
        ("batch: 1 ", "batch: 0 ", "'batch' is 0.*greater than 0"),
        ("batch: 1 ", "batch: 1.5 ", "'batch' is 1.5.*integer"),
        ("model: bismo", "model: abacus", "'model' is 'abacus'; accepted: bismo, bismo-overlay, bitfusion"),
        ("model: bismo", "model: [", "not YAML"),
        ("power_source:", "# power_source:", "power_w and power_source come together"),
    ):
        assert before in text
        mine.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match=message):
            hw_models.load_target(str(mine))
    mine.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        hw_models.load_target(str(mine))
    mine.write_text((FOLDER / "bitfusion.yaml").read_text(encoding="utf-8").replace("fusion_bits: 8", "fusion_bits: 12"))
    with pytest.raises(ValueError, match=r"'fusion_bits' is 12: Input should be 8 or 16"):
        hw_models.load_target(str(mine))


def test_unknown_targets_name_the_close_ones() -> None:
    assert {"cloud", "edge", "bitfusion", "bismo-overlay"} <= set(hw_models.target_names())
    with pytest.raises(ValueError, match=r"did you mean edge.*lut:TABLE.csv"):
        hw_models.load_target("egde")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hw_models.load_target("nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="no table nowhere.csv"):
        hw_models.load_target("lut:nowhere.csv")


MINE = """
import dataclasses
import hw_models
from hw_models.bismo import BismoTarget

class Mine:
    name, description, provenance = "mine", "half of edge", "estimated"
    def cost_table(self, workload, *, batch=None):
        table = hw_models.load_target("edge").cost_table(workload, batch=batch)
        return dataclasses.replace(table, latency_s=table.latency_s / 2)

class Chip(BismoTarget):
    model: str

instance = Mine()
def make(): return Mine()
def needs(argument): return Mine()
def breaks(): raise FileNotFoundError("no such\\nboard")
class Empty: pass
class Half:
    name = description = "half"
number = 3
def none(): return None
"""


@pytest.mark.parametrize("name", ["targets_of_mine:Mine", "targets_of_mine:instance", "targets_of_mine:make"])
def test_a_target_of_your_own_module(name: str, here: Path, network: nn.Module) -> None:
    """A class, a target itself, or a function that makes one."""
    (here / "targets_of_mine.py").write_text(MINE)
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    mine, edge = (hw_models.load_target(which).cost_table(workload) for which in (name, "edge"))
    assert mine.latency_s == pytest.approx(edge.latency_s / 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs", "can't be made without arguments: TypeError: needs.. missing 1 required positional argument"),
        ("breaks", "can't be made without arguments: FileNotFoundError: no such board"),
        ("Empty", "can't be used: it lacks name, description, provenance and cost_table"),
        ("Half", "can't be used: it lacks provenance and cost_table"),
        ("number", "can't be used: it lacks name"),
        ("none", "can't be used: it lacks name"),
        ("mine", "has no 'mine'; close: Mine"),
    ],
)
def test_what_is_wrong_with_a_target_of_your_own_is_said_in_one_sentence(name: str, message: str, here: Path) -> None:
    (here / "targets_of_mine.py").write_text(MINE)
    with pytest.raises(ValueError, match=f"^hardware target 'targets_of_mine:{name}'.*{message}") as caught:
        hw_models.load_target(f"targets_of_mine:{name}")
    assert str(caught.value).isprintable()


def test_targets_and_models_of_an_installed_package(installed: Path, tmp_path: Path, network: nn.Module) -> None:
    install(installed, "targets_of_others", "haq.targets", {"half": "targets_of_others:Mine"}, MINE)
    install(installed, "models_of_others", "haq.hardware_models", {"chip": "targets_of_others:Chip"})
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    half, edge = (hw_models.load_target(which).cost_table(workload) for which in ("half", "edge"))
    assert half.latency_s == pytest.approx(edge.latency_s / 2)
    mine = tmp_path / "mine.yaml"
    mine.write_text((FOLDER / "edge.yaml").read_text(encoding="utf-8").replace("model: bismo", "model: chip"))
    assert (hw_models.load_target(str(mine)).cost_table(workload).latency_s == edge.latency_s).all()
    with pytest.raises(ValueError, match=r"did you mean half\?.*Known: .*edge, half, .*or module:Name"):
        hw_models.load_target("halv")
    assert ("half", "targets_of_others 1.5", "Wheels of all kinds") in hw_models.target_rows()


def test_a_model_that_is_none_is_said_to_lack_what_it_lacks(installed: Path, tmp_path: Path) -> None:
    install(installed, "wrong_models", "haq.hardware_models", {"chip": "wrong_models:Chip"}, "class Chip: pass")
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: chip")
    with pytest.raises(ValueError, match="hardware model 'chip' can't be used: it lacks model_validate"):
        hw_models.load_target(str(mine))


def test_what_a_file_says_is_never_imported(here: Path) -> None:
    (here / "chips_of_mine.py").write_text("raise SystemExit")
    (here / "mine.yaml").write_text("model: chips_of_mine:Chip")
    with pytest.raises(ValueError, match="'model' is 'chips_of_mine:Chip'; accepted: bismo"):
        hw_models.load_target("mine.yaml")
    with pytest.raises(ValueError, match="only imported if you name it yourself"):
        hw_models.load_target("chips_of_mine:Chip", modules=False)
    assert "chips_of_mine" not in sys.modules


def test_every_way_to_name_a_target_is_listed() -> None:
    rows = {row.name: row for row in hw_models.target_rows()}
    assert list(rows) == [*hw_models.target_names(), "cpu", "rpc:HOST:PORT", "FILE.yaml", "lut:TABLE.csv"]
    assert rows["edge"].line == hw_models.load_target("edge").description
    assert all(row.line for row in rows.values())


class Wrong:
    """A target of somebody's own, which does something wrong to the edge's table."""

    name, description, provenance = "wrong", "wrong", "estimated"

    def __init__(self, change: Any) -> None:
        self.change = change

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> Any:
        return self.change(hw_models.load_target("edge").cost_table(workload, batch=batch))


class Alone(Wrong):
    """It has no batch."""

    def cost_table(self, workload: hw_models.Workload) -> Any:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Wrong(lambda table: None), "must return a hw_models.CostTable, not NoneType"),
        (Wrong(lambda table: table.latency_s), "must return a hw_models.CostTable, not ndarray"),
        (Wrong(lambda table: replace(table, latency_s=table.latency_s.tolist())), "latency_s of edge must be .*, not list"),
        (Wrong(lambda table: replace(table, latency_s=table.latency_s.astype(str))), "latency_s of edge must hold numbers"),
        (Wrong(lambda table: replace(table, storage_bytes=None)), "storage_bytes of edge is None"),
        (Wrong(lambda table: replace(table, latency_s=table.latency_s[0])), r"latency_s of edge has shape \(8, 8\)"),
        (Wrong(lambda table: replace(table, latency_s=table.latency_s * float("nan"))), "not a positive number for 'stem'"),
        (Wrong(lambda table: replace(table, latency_s=-table.latency_s)), "not a positive number for 'stem'"),
        (Wrong(lambda table: {}["no\nkey"]), "failed: KeyError: "),
        (Wrong(lambda table: other_table()), "must return the table of the workload that it is given"),
        (Alone(None), r"must take \(workload, \*, batch=None\): got an unexpected keyword argument 'batch'"),
    ],
)
def test_what_is_wrong_with_a_table_of_ones_own_is_said_in_one_sentence(target: Any, message: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"^`cost_table` of hardware target 'wrong' .*{message}") as caught:
        haq.Problem(network, images(8), (images(8), torch.zeros(8, dtype=torch.long)), target)
    assert str(caught.value).isprintable()


def other_table() -> hw_models.CostTable:
    workload = hw_models.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    return hw_models.load_target("edge").cost_table(workload)
