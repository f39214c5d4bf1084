"""A package of somebody else's adds one of each kind, in one file each, and every command finds it by name.

tests/plugin is such a package. It is built and installed by pip, into a folder that only these tests import from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantizers as Q
from haq import deploy, hardware, robustness, search, sweep, train
from haq.console.errors import run_command
from tests.commands.test_robustness_command import lessen
from tests.hw_models.conftest import install

ROOT = Path(__file__).parents[2]
KINDS = ("scheme", "criterion", "model", "target", "solver", "objective", "attack", "exporter", "method", "net", "data")
# What may be given for each option of a search: the name in the plug-in's pyproject.toml, or the place itself.
NAMES = {
    "--network": "plugin_net",
    "--data": "plugin_data",
    "--solver": "plugin_solver",
    "--scheme": "plugin_scheme",
    "--hw": "plugin_target",
    "--objective": "plugin_objective",
}
PLACES = {
    "--network": "haq_plugin.network:build",
    "--data": "haq_plugin.data:load",
    "--solver": "haq_plugin.solver:Downhill",
    "--scheme": "haq_plugin.scheme:LargestMagnitude",
    "--hw": "haq_plugin.target:Streaming",
    "--objective": "haq_plugin.objective:TopTwo",
}
JOB = ["--network", "plugin_net", "--data", "plugin_data"]
QUICK = ["--budget", "0.6", "--evaluations", "12", "--finetune-epochs", "1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in, installed as pip does it, from its own pyproject.toml, with nothing fetched."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "tests" / "plugin", source)
    folder = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    done = subprocess.run([*pip, *offline, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def plugin(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plug-in where Python finds it, and an empty current folder."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    monkeypatch.setattr(Q.Scheme, "known", dict(Q.Scheme.known))
    monkeypatch.setattr(Q.Criterion, "known", dict(Q.Criterion.known))
    monkeypatch.chdir(tmp_path)
    return installed


def call(main: Callable[[list[str]], int], *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def read(file: str) -> Any:
    return json.loads(Path(file).read_text())


def options(given: dict[str, str]) -> list[str]:
    return [word for option in given.items() for word in option]


def test_everything_is_listed_by_the_installed_program(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)])}
    command = [sys.executable, "-W", "error", "-m", "haq", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        assert f"plugin_{kind}" in done.stdout
    # Where it is from, and the one line that its package says about it.
    words = " ".join(done.stdout.split())
    assert "haq-plugin 1.0" in words
    assert "One of each kind, from another package" in words


@pytest.mark.parametrize("given", [NAMES, PLACES], ids=["by name", "by place"])
def test_a_search_with_one_of_each(given: dict[str, str], plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *options(given), *QUICK, "--out", "run") == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().out.split())
    assert "made-up processor" in shown or "plugin_target" in shown
    assert "two best answers" in shown or "plugin_objective" in shown
    policy = Q.BitPolicy.from_json(Path("run/policy.json"))
    assert list(policy) == ["stem", "wide", "hidden", "classifier"]
    # It was the plug-in's solver that looked for it: its first policy is the cheapest there is.
    result = read("run/result.json")
    assert given["--solver"] in json.dumps(result)
    for name in given.values():
        assert name in Path("run/config.yaml").read_text()


def test_what_was_found_is_attacked_and_written(
    plugin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that go on with a run know its scheme, network and data from the run."""
    lessen(monkeypatch)
    assert call(search.main, *options(NAMES), *QUICK, "--out", "run") == 0, capsys.readouterr().err
    attack = ["--attacks", "plugin_attack", "--images", "32", "--uniform", "8", "--workers", "1"]
    assert call(robustness.main, "run", *attack) == 0, capsys.readouterr().err
    networks = read("run/robustness/robustness.json")["networks"]
    assert {"float", "found"} <= set(networks)
    for network in networks.values():
        assert network["worst"] <= network["attacks"]["plugin_attack"] <= network["clean"]
    assert call(deploy.main, "run", "--to", "plugin_exporter", "--out", "listing.txt") == 0, capsys.readouterr().err
    layers = Path("listing.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in layers] == list(Q.BitPolicy.from_json(Path("run/policy.json")))


def test_a_hardware_file_names_the_model_of_a_plug_in(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`model: plugin_model` in a file, for what prices a network and for a search."""
    machine = str(plugin / "haq_plugin" / "machine.yaml")
    assert call(hardware.main, "show", machine, "--network", "plugin_net") == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().out.split())
    assert "plugin-machine" in shown
    # 8 x 4 x 4 x 9 + 16 x 2 x 2 x 72 + 64 x 16 + 16 x 4 products of 64 bits each, 64 a cycle at 100 MHz.
    assert "6,848 cycles" in shown
    assert call(search.main, "--hw", machine, *options({**NAMES, "--hw": machine}), *QUICK, "--dry-run") == 0


def test_channels_are_kept_by_the_criterion_of_a_plug_in(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = ["--prune", "0.5:1", "--criterion", "plugin_criterion", "--solver", "random"]
    assert call(search.main, *JOB, *pruned, *QUICK, "--out", "pruned") == 0, capsys.readouterr().err
    assert "chosen by plugin_criterion" in " ".join(capsys.readouterr().out.split())
    assert "plugin_criterion" in Path("pruned/config.yaml").read_text()


def test_what_is_named_alone_works_with_what_is_ours(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scheme of somebody's for one layer, ours for all others."""
    mixed = {"--network": "plugin_net", "--data": "plugin_data", "--scheme": "lsq,wide=plugin_scheme", "--solver": "random"}
    assert call(search.main, *options(mixed), *QUICK, "--out", "mixed") == 0, capsys.readouterr().err


BROKEN = """
class Nothing:
    def __init__(self, *arguments):
        pass
number = 3
"""
FAILS = "raise RuntimeError('the licence server is away')"
# For each option: what a class of no methods lacks there.
LACKING = {
    "--scheme": "subclass of quantizers.Scheme",
    "--hw": "name, description, provenance and cost_table",
    "--solver": "solve",
    "--objective": "correct",
    "--network": "haq.networks.Network",
    "--data": "haq.data.Dataset",
}


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: str) -> str:
    """The one sentence that a command is refused with, before it has written or found anything."""
    before = sorted(Path.cwd().rglob("run*"))
    assert call(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(Path.cwd().rglob("run*")) == before
    assert "evaluations" not in out
    return err


@pytest.mark.parametrize("option", LACKING)
def test_a_thing_that_lacks_something_is_refused_at_the_start(
    option: str, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text(BROKEN)
    sentence = refused(capsys, search.main, *options({**NAMES, option: "broken:Nothing"}), *QUICK, "--out", "run")
    assert "broken:Nothing" in sentence
    assert LACKING[option] in sentence
    sys.modules.pop("broken")


@pytest.mark.parametrize("option", LACKING)
def test_a_thing_that_fails_to_import_is_refused_at_the_start(
    option: str, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fails.py").write_text(FAILS)
    sentence = refused(capsys, search.main, *options({**NAMES, option: "fails:Thing"}), *QUICK, "--out", "run")
    assert "fails:Thing" in sentence
    assert "can't be imported" in sentence
    assert "RuntimeError: the licence server is away" in sentence


GROUPS = {
    "--scheme": "quantizers.schemes",
    "--hw": "haq.targets",
    "--solver": "haq.solvers",
    "--objective": "haq.objectives",
    "--network": "haq.networks",
    "--data": "haq.data",
}


@pytest.mark.parametrize("option", GROUPS)
def test_an_installed_package_that_is_broken_is_named(
    option: str, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "others"
    other.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(other)])
    install(other, "broken_package", GROUPS[option], {"broken_thing": "broken_package:Thing"}, FAILS)
    sentence = refused(capsys, search.main, *options({**NAMES, option: "broken_thing"}), *QUICK, "--out", "run")
    for words in ("broken_thing", "broken_package 1.5", "RuntimeError: the licence server is away"):
        assert words in sentence


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (robustness.main, ["run", "--attacks", "{}"]),
        (deploy.main, ["run", "--to", "{}"]),
        (hardware.main, ["show", "{}"]),
        (sweep.main, [*JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random,{}", "--out", "runs"]),
        (train.main, [*JOB, "--scheme", "{}", "--out", "runs.safetensors"]),
    ],
    ids=["attack", "exporter", "target", "solver of a sweep", "scheme of a training"],
)
def test_other_commands_refuse_what_is_broken_too(
    main: Callable[[list[str]], int], arguments: list[str], plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *options(NAMES), *QUICK, "--finetune-epochs", "0", "--out", "run") == 0, capsys.readouterr().err
    capsys.readouterr()
    Path("broken.py").write_text(BROKEN)
    Path("fails.py").write_text(FAILS)
    for name, words in (("broken:Nothing", "can't be used: it "), ("fails:Thing", "RuntimeError: the licence server is away")):
        sentence = refused(capsys, main, *(argument.format(name) for argument in arguments))
        assert name in sentence
        assert words in sentence
    sys.modules.pop("broken")


def test_a_hardware_file_whose_model_is_broken(plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = (plugin / "haq_plugin" / "machine.yaml").read_text()
    Path("mine.yaml").write_text(machine.replace("plugin_model", "plugin_modle"))
    sentence = refused(capsys, hardware.main, "show", "mine.yaml")
    assert "plugin_modle" in sentence
    assert "plugin_model" in sentence.replace("plugin_modle", "")


def test_a_close_name_is_named(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in NAMES.items():
        sentence = refused(capsys, search.main, *options({**NAMES, option: f"{name}s"}), *QUICK, "--out", "run")
        assert f"{name}s" in sentence
        assert f"mean {name}" in sentence
