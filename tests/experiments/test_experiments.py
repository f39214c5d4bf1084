"""The experiments that take long are put together from pieces that work, tried here on a network that is searched in
milliseconds."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hw_models
from experiments import agreement, fuzz, haq_tables
from haq import data, networks
from hw_models import trust
from tests.conftest import images, small_network


def test_tables_of_haq() -> None:
    network = networks.Network("tiny", small_network(), (1, 8, 8))
    with torch.inference_mode():
        splits = [data.Split(x, network.module(x).argmax(1).clone()) for x in (images(64, 1), images(96), images(96, 2))]
    dataset = data.Dataset("quarters", ("a", "b", "c", "d"), *splits)
    study = haq_tables.Study(network, dataset, haq_tables.Effort(seeds=(0,), steps=2, evaluations=8, budgets=(0.6, 0.9)))
    rows = haq_tables.equal_cost(study).rows
    assert [row[:2] for row in rows[:3]] == [("edge", "6"), ("edge", "5"), ("edge", "4")]
    assert len(haq_tables.specialisation([study]).rows) == 2 * len(haq_tables.TARGETS)
    made = haq_tables.Table("", ())
    bars = list(haq_tables.headline(study, made))
    assert len(bars) >= len(haq_tables.TARGETS)
    assert all(bar.startswith(("holds: ", "FALLS SHORT: ")) for bar in bars)
    for result in study.results:
        assert 0 <= result.accuracy <= 100
        # Whatever was found within a budget is within it.
        assert result.budget is None or result.latency <= result.budget * (1 + 1e-9)


def test_agreement_on_photographs(tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = agreement.photographs([tmp_path])[tmp_path.name]
    assert [path.stem for path in found] == ["0", "1", "2"]
    cut = agreement.crops(found[0], 3, np.random.default_rng(0))
    assert [crop.shape for crop in cut] == [(3, agreement.SIZE, agreement.SIZE)] * 3
    assert torch.equal(cut[0], agreement.crops(found[0], 1, np.random.default_rng(1))[0])  # the centre isn't random
    assert not torch.equal(cut[1], cut[2])

    network, test = networks.Network("tiny", small_network(), (1, 8, 8)), images(60, 2)
    with torch.inference_mode():
        labels = network.module(test).argmax(1).clone()
    study = agreement.Study(network, images(32, 1), images(96), test, test, labels, agreement.Effort(evaluations=12, agent=12))
    study.on_edge()
    # Labels that are the float network's answers: the two columns say the same.
    assert len(study.rows) == 8
    for row in study.rows:
        assert round(row.test * len(test) / 100) == row.top1
    fractions = {row.policy: row.fraction for row in study.rows}
    assert fractions["uniform 4 bits"] >= fractions["ilp at 4 bits"]


def test_a_few_files_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_named", set(fuzz.OWN))
    (tmp_path / "canary.py").write_text(fuzz.CANARY)
    (tmp_path / "sound").mkdir()
    hardware = [Path(shutil.copy(path, "sound")) for path in Path(hw_models.__file__).parent.glob("targets/e*.yaml")]
    torch.save(fuzz.network().module.state_dict(), "sound/own.pt")
    kinds = [
        fuzz.Kind("hardware", hardware, fuzz.read_hardware),
        fuzz.Kind("torch file", [Path("sound/own.pt")], fuzz.read_checkpoint),
    ]
    fuzz.fuzz(kinds, 8, seed=0)
    for kind in kinds:
        assert {outcome.verdict for outcome in kind.outcomes} <= {"read", "refused"}, kind.outcomes


def test_the_fuzzer_notices_what_must_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text(fuzz.CANARY)
    path = tmp_path / "any"

    def told(read: Callable[[Path], object]) -> str:
        return fuzz.read_in_child(fuzz.Kind("any", [path], read), path).verdict

    monkeypatch.syspath_prepend(str(tmp_path))
    assert told(lambda path: None) == "read"
    assert told(lambda path: path.read_text()) == "refused"
    assert told(lambda path: {}["x"]) == "TRACEBACK"  # type: ignore[index]
    assert told(lambda path: os.kill(os.getpid(), signal.SIGKILL)) == "KILLED"
    assert told(lambda path: b"x" * (600 * 10**6)) == "MEMORY"
    assert told(lambda path: os.system("true")) == "CODE"
    assert told(lambda path: importlib.import_module("canary")) == "CODE"
    (tmp_path / "executed").unlink()
    monkeypatch.setattr(fuzz, "CPU_S", 0.01)
    assert told(lambda path: all(range(1, 10**7))) == "SLOW"


def test_the_table_of_gpus_is_made_on_a_cpu_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import gpu

    asked = ["--device", "cpu", "--images", "2", "--batch", "2", "--rounds", "2", "--networks", networks.DEFAULT]
    gpu.main([*asked, "--save", str(tmp_path)])
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    row = next(line for line in page.splitlines() if line.startswith(f"| {networks.DEFAULT} "))
    assert all(float(cell) > 0 for cell in row.split("|")[3:11])
    with pytest.raises(ValueError, match="which isn't here"):
        gpu.main(["--device", "tpu"])
