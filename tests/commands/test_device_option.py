"""--device in every command: a run is searched, tuned, measured, attacked and deployed where it is asked for, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from haq import deploy, evaluate, finetune, robustness, search, sweep, train
from haq.console.errors import run_command
from haq.store.records import ConfigRecord
from tests import second_device
from tests.commands.test_search_command import MODULE
from tests.conftest import enter

SMALL = ["--network", "small_job:network", "--data", "small_job:splits", "--budget", "0.6", "--scheme", "pact"]
QUICK = [*SMALL, "--bits", "4:6", "--evaluations", "6", "--solver", "random", "--finetune-epochs", "0"]
COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "search": (search.main, SMALL),
    "sweep": (sweep.main, SMALL[:4]),
    "train": (train.main, [*SMALL[:4], "--out", "net.safetensors"]),
    "robustness": (robustness.main, ["small_job:network", "--data", "small_job:splits"]),
}

second_device.register()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job of one's own in it."""
    enter(tmp_path, monkeypatch, MODULE)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def files(folder: str) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in ("policy.json", "history.csv")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["second:7", "tpu", "Second", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_starts(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = COMMANDS[command]
    assert call(main, *arguments, "--device", name) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--device is '{name}'" in said
    assert "cpu" in said
    assert said.count(". ") == 0
    assert not Path("runs").exists()
    assert not Path("net.safetensors").exists()


def test_a_run_on_another_device_is_what_it_is_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "here") == 0
    assert call(search.main, *QUICK, "--out", "there", "--device", "second") == 0
    assert files("here") == files("there")
    results = [json.loads((Path(name) / "result.json").read_text()) for name in ("here", "there")]
    assert results[0]["found"] == results[1]["found"]
    assert results[0]["float"] == results[1]["float"]
    assert results[1]["accuracy_is"] == "measured on this machine's second"
    settings = ConfigRecord.read(Path("there/config.yaml"))
    assert settings.settings["device"] == "second"
    assert settings.versions["device"] == "second"
    assert "device" not in ConfigRecord.read(Path("here/config.yaml")).versions
    capsys.readouterr()
    # What it found is measured where it was, or elsewhere.
    for device in ([], ["--device", "cpu"]):
        assert call(evaluate.main, "there", "--json", *device) == 0
        assert json.loads(capsys.readouterr().out)["found"] == results[0]["found"]
    assert call(deploy.main, "there", "--to", "onnx") == 0
    assert call(evaluate.main, "there", "--device", "second:7") == 2


@pytest.mark.slow
def test_a_search_is_gone_on_with_on_its_own_kind_of_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "run", "--device", "second") == 0
    before = files("run")
    history = Path("run/history.csv")
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:4]))
    Path("run/result.json").unlink()
    assert call(search.main, "--resume", "run", "--device", "cpu") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "run began on second, so it would not go on as it began on cpu: leave --device out, or start a new run" in said
    config = Path("run/config.yaml")
    content = config.read_text()
    elsewhere = yaml.safe_load(content)
    elsewhere["versions"]["device"] = "second, of another make"
    config.write_text(yaml.safe_dump(elsewhere, sort_keys=False))
    assert call(search.main, "--resume", "run") == 2
    assert "began on second, of another make, this is second" in " ".join(capsys.readouterr().err.split())
    config.write_text(content)
    assert call(search.main, "--resume", "run", "--device", "second:0") == 0
    assert files("run") == before


def test_a_run_whose_device_is_not_here_can_be_measured_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--out", "run") == 0
    config = Path("run/config.yaml")
    content = yaml.safe_load(config.read_text())
    content["settings"]["device"] = "tpu"
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert call(evaluate.main, "run") == 2
    assert "the device of run is 'tpu', which isn't here" in " ".join(capsys.readouterr().err.split())
    assert call(evaluate.main, "run", "--device", "cpu") == 0


def test_runs_of_before_there_were_devices_are_of_the_cpu() -> None:
    assert call(search.main, *QUICK, "--out", "run") == 0
    config = Path("run/config.yaml")
    content = yaml.safe_load(config.read_text())
    for name in ("device", "amp"):
        del content["settings"][name]
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    Path("run/result.json").unlink()
    assert call(search.main, "--resume", "run") == 0


@pytest.mark.slow
def test_tuning_attacks_and_training_on_another_device() -> None:
    Path("small_job.py").write_text(MODULE.replace("(x, y)", "((255 * x).to(torch.uint8), y)"))
    found = {}
    for name in ("cpu", "second"):
        assert call(search.main, *QUICK, "--out", name, "--device", name) == 0
        assert call(finetune.main, name, "--epochs", "1", "--device", name) in (0, 1)
        assert call(robustness.main, name, "--attacks", "fgsm", "--images", "10", "--workers", "1", "--defensive", "0") == 0
        out = f"{name}.safetensors"
        trained = ["--epochs", "1", "--batch-size", "16", "--device", name, "--out", out]
        assert call(train.main, "--network", "small_job:network", "--data", "small_job:splits", *trained) == 0
        tuned = json.loads((Path(name) / "result.json").read_text())["finetuned"]
        attacked = json.loads((Path(name) / "robustness/robustness.json").read_text())["networks"]
        found[name] = tuned, {key: value["attacks"] for key, value in attacked.items()}
    assert found["cpu"] == found["second"]
