"""Hardware is data: targets come by name or from a YAML file, and a wrong file gets one sentence that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import hw_models

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
