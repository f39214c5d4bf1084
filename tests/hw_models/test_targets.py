"""Hardware is data: targets come by name or from a YAML file, and a wrong file gets one sentence that names what is wrong."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
    """Half as fast."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if content["model"] == "roofline":
        content["peak_tops"] = {pair: peak / 2 for pair, peak in content["peak_tops"].items()}
        content["bandwidth_gb_per_s"] /= 2
        content["fixed_us"] = 2 * content.get("fixed_us", 0)
    else:
        content["clock_mhz"] /= 2
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(content))
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    slow, fast = (hw_models.load_target(str(which)).cost_table(workload) for which in (mine, name))
    assert slow.latency_s == pytest.approx(2 * fast.latency_s, nan_ok=True)


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


ALIASES = "a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("", ALIASES, r"it has an alias \(\*\) or an anchor \(&\) in line 1"),
        ("name: edge", "name: &x edge", "anchor"),
        ("model: bismo", "model: [bismo]", "key 'model' is a list; accepted: bismo"),
        ("model: bismo", "model: {}", "key 'model' is a mapping"),
        ("model: bismo", "model: !!set {bismo}", r"it has a tag \(!\) in line 3"),
        ("name: edge", "name: !!binary aGVsbG8=", "tag"),
        ("name: edge", "name: ~", "'name' is nothing"),
        ("array_rows: 8", "array_rows: 1.0e+30", "'array_rows' is 1e.30: Input should be a valid integer"),
        ("array_rows: 8", f"array_rows: 1{'0' * 30}", "at most 65,536"),
        ("array_rows: 8", f"array_rows: 1{'0' * 5000}", "isn't written in decimal digits, at most 40 of them"),
        ("batch: 1 ", "batch: 010 ", "isn't written in decimal digits"),
        ("clock_mhz: 200", "clock_mhz: 1:30", "isn't written in decimal digits"),
        ("clock_mhz: 200", "clock_mhz: .inf", "'clock_mhz' is inf"),
        ("clock_mhz: 200", "clock_mhz: 1.0e-300", "from 1e-09 to 1e.09"),
        ("batch: 1 ", "batch: true ", "'batch' is True"),
        ("name: edge", 'name: "\\e[31mred"', r"'name' is '\\x1b\[31mred': Input should be text that can be printed"),
        ("name: edge", "name: a\u202eb", r"a\\u202eb"),
        ("name: edge", 'name: "\\L\\P"', "Input should be text that can be printed"),
        ("name: edge", f"name: {'x' * 101}", "at most 100 characters"),
        ("batch: 1 ", "clock_mhz: 1\nbatch: 1 ", "'clock_mhz' is given twice, the second time in line 15"),
        ("batch: 1 ", "1: 1\nbatch: 1 ", "a key in line 15 is no text"),
        ("batch: 1 ", "a: " + "[" * 3000, "nested too deeply in line 15"),
        ("batch: 1 ", "a: \0", r"the character U\+0000"),
        ("batch: 1 ", "a: %secret", r"line 15: found character something that cannot start any token$"),
        ("batch: 1 ", "a: " + "x" * 70_000, "was not read; at most 65.5 kB"),
    ],
)
def test_yaml_is_plain_and_every_number_has_bounds(before: str, after: str, message: str, tmp_path: Path) -> None:
    text = (FOLDER / "edge.yaml").read_text(encoding="utf-8")
    assert before in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message) as caught:
        hw_models.load_target(str(mine))
    assert str(caught.value).isprintable()


def test_no_number_within_bounds_overflows(tmp_path: Path, network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    mine = tmp_path / "mine.yaml"
    for name in ("edge", "bismo-overlay"):
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        for key in [key for key, value in content.items() if isinstance(value, int) and key != "fusion_bits"]:
            most = 2**40 if key.endswith(("_bytes", "_entries", "_planes")) else 2**16
            mine.write_text(yaml.safe_dump({**content, key: most}))
            try:
                table = hw_models.load_target(str(mine)).cost_table(workload)
            except ValueError:
                continue
            assert table.latency_s is not None
            assert (table.latency_s[:, :8, :8] > 0).all()


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for; what the kernel makes up, such as the environment, is nobody's to read."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "environ.yaml").symlink_to("/proc/self/environ")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name, message in (("pipe", "is no ordinary file"), ("zero", "is no ordinary file"), ("environ", "'model' is nothing")):
        for form in (f"{tmp_path}/{name}.yaml", f"lut:{tmp_path}/{name}.yaml"):
            with pytest.raises(ValueError, match=f"{message}|it is empty$"):
                hw_models.load_target(form)


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
    assert mine.latency_s == pytest.approx(edge.latency_s / 2, nan_ok=True)


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
    assert half.latency_s == pytest.approx(edge.latency_s / 2, nan_ok=True)
    mine = tmp_path / "mine.yaml"
    mine.write_text((FOLDER / "edge.yaml").read_text(encoding="utf-8").replace("model: bismo", "model: chip"))
    assert np.array_equal(hw_models.load_target(str(mine)).cost_table(workload).latency_s, edge.latency_s, equal_nan=True)
    with pytest.raises(ValueError, match=r"did you mean half\?.*Known: .*edge, .*half, .*or module:Name"):
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
    measured = ["cpu", "rpc:HOST:PORT", "onnxruntime", "openvino"]
    assert list(rows) == [*hw_models.target_names(), *measured, "FILE.yaml", "lut:TABLE.csv"]
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
        (Wrong(lambda table: replace(table, latency_s=table.latency_s[0])), r"latency_s of edge has shape \(10, 10\)"),
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
