"""Channels are searched together with bits by every command, and what is found is measured, shown, tuned and deployed."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import haq
import quantizers as Q
from haq import deploy, evaluate, finetune, report, robustness, runs, search, sweep
from haq import list as listing
from haq.console.errors import run_command
from haq.store.history import COLUMNS
from haq.study.search_run import SearchRun
from hw_models import trust
from hw_models.extras import install_line
from tests.conftest import enter
from tests.study.test_channels_of_runs import network as whole_network
from tests.study.test_exact_resume import cut, same

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
PRUNED = [*JOB, "--budget", "0.4", "--prune", "0.25:1", "--criterion", "fpgm"]
SHORT = [*PRUNED, "--solver", "random", "--evaluations", "12"]
MODULE = '''
import torch
from haq.networks import Network
from tests.conftest import brightest, images
from tests.study import test_channels_of_runs

def splits():
    parts = {name: images(count, seed) for seed, (name, count) in enumerate((("train", 64), ("search", 64), ("test", 64)))}
    return {name: (x, brightest(x)) for name, x in parts.items()}

def network():
    return Network("convolutions", test_channels_of_runs.network(), (1, 8, 8))

def middle(network, group):
    """The channels in the middle."""
    return -(torch.arange(group.channels) - group.channels / 2).abs()
'''


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job of one's own in it, and a criterion."""
    enter(tmp_path, monkeypatch, MODULE)
    monkeypatch.setattr(Q.Criterion, "known", dict(Q.Criterion.known))  # what a test names is forgotten after it
    trust.trust("small_job:network", "small_job:splits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose network was fine-tuned."""
    folder = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch, MODULE)
        assert call(search.main, *SHORT, "--finetune-epochs", "1", "--out", "run") == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path) -> Path:
    """A copy of it in the current folder."""
    shutil.copytree(finished, "run")
    return Path("run")


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed since, on one line."""
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_plan_says_which_channels_may_be_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *SHORT, "--finetune-epochs", "0", "--dry-run") == 0
    words = told(capsys)
    assert "0.25 to 1 in eighths of the channels of 2 groups (32 channels), chosen by fpgm; 2 groups keep all" in words
    assert "fixed: classifier (they are outputs of the network)" in words
    assert "fixed: stem (layer 'stem', which writes them, is pinned)" in words
    assert "bits only, with all channels" in words


def test_what_is_found_stands_in_all_files(run: Path) -> None:
    policy = Q.BitPolicy.from_json(run / "policy.json")
    assert policy.keep
    assert json.loads((run / "policy.json").read_text())["version"] == 2
    rows = rows_of(run)
    assert tuple(rows[0]) == (*COLUMNS, "keep")
    kept = "-".join(f"{policy.keep.get(name, 1.0):g}" for name in ("first", "second"))
    assert any(row["keep"] == kept for row in rows if row["solver"] == "random")
    # Rivals search bits alone.
    assert {row["keep"] for row in rows if row["solver"] != "random"} == {"1-1"}
    result = json.loads((run / "result.json").read_text())
    assert result["bits_only"] == ["greedy", "ilp"]
    channels = result["channels"]
    assert channels["kept"] < channels["of_channels"] == 32
    assert channels["macs"] < channels["of_macs"]
    settings = (run / "config.yaml").read_text()
    assert "prune: 0.25:1" in settings
    assert "criterion: fpgm" in settings
    network = haq.load(run, network=whole_network())
    assert len(Q.kept_channels(network)) == len(policy.keep)
    assert (run / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_measured_again_as_it_was_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((run / "result.json").read_text())
    assert call(evaluate.main, "run", "--json") == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)
    assert {**again, "evaluations": result["evaluations"]} == result
    words = " ".join(printed.err.split())
    assert "Channels and bits per layer" in words
    channels = result["channels"]
    assert f"{channels['kept']} of 32 channels kept" in words
    assert "bits only" in words
    assert call(runs.main, "show", "run") == 0
    shown = told(capsys)
    assert f"channels {channels['kept']} of 32 channels kept" in shown
    assert "prune 0.25:1, criterion fpgm" in shown
    assert call(runs.main, "list", "run") == 0
    assert "prune 0.25:1 criterion fpgm" in told(capsys)


def test_runs_are_compared_by_what_they_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [*JOB, "--budget", "0.4", "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0"]
    assert call(search.main, *plain, "--out", "plain") == 0
    # Nothing of channels is said where none are pruned.
    assert tuple(rows_of(Path("plain"))[0]) == COLUMNS
    for name in ("config.yaml", "result.json", "problem.json", "policy.json"):
        for word in ("prun", "criterion", "channels", "keep"):
            assert word not in Path("plain", name).read_text()
    capsys.readouterr()
    assert call(runs.main, "compare", "run", "plain", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["differences"]["prune"] == ["0.25:1", None]
    assert content["differences"]["criterion"] == ["fpgm", None]
    assert content["results"]["channels kept"][1] is None
    assert content["comparable"]


def test_its_page_has_channels_beside_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("altair")
    assert call(report.main, "run") == 0
    page = (run / "report.html").read_text()
    channels = json.loads((run / "result.json").read_text())["channels"]
    assert "Channels and bits per layer" in page
    assert '<th scope="col">output channels kept</th>' in page.replace("'", '"') or "output channels kept" in page
    for layer in channels["layers"]:
        assert f">{layer['outputs']}/{layer['of_outputs']}<" in page
    assert "found by ilp (bits only)" in page
    assert "shares of channels kept" in page


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*SHORT, "--evaluations", "6", "--finetune-epochs", "0"]
    assert call(search.main, *asked, "--out", "whole") == 0
    for times in (3, 7):  # by its own solver, and by a rival
        cut(monkeypatch, SearchRun, "record", times, search.main, *asked, "--out", "cut")
        assert call(search.main, "--resume", "cut") == 0
        assert same("whole", "cut") == []
        shutil.rmtree("cut")


def test_workers_change_nothing() -> None:
    asked = [*PRUNED, "--solver", "random", "--evaluations", "6", "--finetune-epochs", "0"]
    assert call(search.main, *asked, "--out", "one") == 0
    assert call(search.main, *asked, "--workers", "2", "--out", "two") == 0
    assert same("one", "two") == []


def test_a_config_is_taken_and_options_win(run: Path) -> None:
    quick = ["--evaluations", "3", "--finetune-epochs", "0"]
    assert call(search.main, "--config", "run/config.yaml", *quick, "--prune", "1,0.5", "--criterion", "l2", "--out", "b") == 0
    assert {part for row in rows_of(Path("b")) for part in row["keep"].split("-")} <= {"1", "0.5"}
    assert "criterion: l2" in Path("b/config.yaml").read_text()


def test_it_is_tuned_by_every_method(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads((run / "result.json").read_text())["channels"]
    for options in (["--epochs", "1"], ["--epochs", "1", "--scheme", "lsq"], ["--method", "ptq"]):
        capsys.readouterr()
        assert call(finetune.main, "run", *options, "--json") == 0, options
        result = json.loads(capsys.readouterr().out)
        assert result["channels"] == kept
        network = haq.load(run, network=whole_network())
        assert Q.kept_channels(network)


@pytest.mark.parametrize("to", ["onnx", "qonnx", "c", "executorch", "tvm"])
def test_it_is_deployed(to: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"c": "torch", "qonnx": "onnx", "onnx": "onnxruntime"}.get(to, to)
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}")
    assert call(deploy.main, "run", "--to", to, "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_answers"]


def test_what_was_not_tuned_is_deployed_and_attacked_without_its_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *SHORT, "--finetune-epochs", "0", "--check-deploy", "c", "--out", "run") == 0
    task = SearchRun.load(Path("run")).build()
    policy = SearchRun.load(Path("run")).load_policy()
    loaded = SearchRun.load(Path("run")).load_network()
    made = loaded.quantized(policy, SearchRun.load(Path("run")).schemes(list(policy)))
    found = task.problem.quantized(policy)
    x = loaded.network.preprocess(loaded.dataset.test.take(torch.arange(16))[0])
    assert torch.equal(made(x), found(x))
    capsys.readouterr()
    assert call(deploy.main, "run", "--to", "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_answers"]


def test_it_is_attacked_beside_uniform_bits_of_all_channels(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from haq.study.comparison import ComparisonSpec, gather

    def on_training(name: str) -> dict[str, Any]:
        return {}

    compared = gather(ComparisonSpec("run", beta=0.0), on_training)
    assert Q.kept_channels(compared.networks["found"])
    assert not Q.kept_channels(compared.networks["uniform 8"])
    # The second time what was trained is there.
    again = gather(ComparisonSpec("run", beta=0.0))
    x = torch.rand(4, 1, 8, 8)
    for name, network in compared.networks.items():
        assert torch.equal(network(x), again.networks[name](x))
    assert callable(robustness.main)


def test_criteria_of_ones_own_are_imported_if_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*JOB, "--budget", "0.4", "--prune", "1,0.5", "--solver", "random", "--evaluations", "3"]
    asked += ["--finetune-epochs", "0", "--criterion", "small_job:middle"]
    assert call(search.main, *asked, "--out", "run") == 0
    assert "chosen by small_job:middle" in told(capsys)
    Q.Criterion.known.pop("small_job:middle", None)
    trust._named.discard("small_job:middle")
    assert call(evaluate.main, "run") == 2
    words = told(capsys)
    assert "run/config.yaml names criterion small_job:middle" in words
    assert "add --trust small_job:middle if you trust it" in words
    assert call(evaluate.main, "run", "--trust", "small_job:middle") == 0
    # What a file names isn't imported by a report of it.
    assert call(runs.main, "show", "run") == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--criterion", "l1"], "--criterion 'l1' chooses which channels are kept: give --prune besides"),
        (["--prune", "0:1"], "--prune is '0:1': a share of channels must be a number beyond 0 and at most 1, not '0'"),
        (["--prune", "0.25:2"], "--prune is '0.25:2': a share of channels must be a number beyond 0 and at most 1, not '2'"),
        (["--prune", "half"], "--prune is 'half': a share of channels must be a number"),
        (["--prune", "0.5"], "--prune is '0.5', and must reach 1"),
        (["--prune", "1:0.5"], "--prune is '1:0.5': the smaller share comes first"),
        (["--prune", "0.5:1", "--criterion", "fgpm"], "unknown criterion 'fgpm'; did you mean fpgm"),
        (["--prune", "0.5:1", "--criterion", "small_job:lacking"], "module small_job has no 'lacking'"),
        (["--prune", "0.5:1", "--budget", "0.001"], "budget 0.001 is out of reach"),
    ],
)
def test_what_isnt_accepted_is_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *JOB, *options, "--dry-run") == 2
    words = told(capsys)
    assert words.startswith("error: ")
    assert sentence in words


def test_without_torch_pruning_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torch_pruning" else find(name, *more)
    )
    assert call(search.main, *PRUNED, "--dry-run") == 2
    assert f"--prune needs torch-pruning, which isn't installed: {install_line('prune')}" in told(capsys)


def test_files_that_dont_fit_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = json.loads((run / "policy.json").read_text())
    for keep, sentence in (
        ({"first": 0.3}, "run/policy.json: group 'first' can't keep 0.3 of its channels; it may keep 0.25, 0.375"),
        ({"stem": 0.5}, "run/policy.json: the channels of 'stem' can't be pruned: layer 'stem', which writes them, is pinned"),
        ({"other": 0.5}, "'other', which is no group of channels"),
        ({"first": 2.0}, "'keep.first' is 2.0"),
        ({}, "'keep'"),
    ):
        (run / "policy.json").write_text(json.dumps({**policy, "keep": keep}))
        capsys.readouterr()
        assert call(evaluate.main, "run") == 2
        assert sentence in told(capsys)
    (run / "policy.json").write_text(json.dumps({**policy, "keep": {"first": 0.25, "second": 0.875}}))
    assert call(evaluate.main, "run") == 2
    words = told(capsys)
    assert "run/policy.json and run/checkpoint/quantized.safetensors: the policy keeps" in words
    assert call(report.main, "run") == 2
    assert "is not the policy that run/result.json was measured of (group" in told(capsys)


def test_criteria_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(listing.main, "criteria", "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["criteria"]]
    assert {"l1", "l2", "bn-scale", "fpgm", "kse", "taylor", "random"} <= set(names)


def test_sweeps_search_channels_too(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*JOB, "--hw", "edge,cloud", "--budgets", "0.5", "--solvers", "random", "--evaluations", "3"]
    assert call(sweep.main, *asked, "--prune", "1,0.5", "--out", "sweep") == 0
    assert "0.5 or 1 of the channels of 2 groups" in told(capsys)
    runs_of = [folder for folder in Path("sweep").iterdir() if (folder / "history.csv").is_file()]
    assert {part for folder in runs_of for row in rows_of(folder) for part in row["keep"].split("-")} == {"1", "0.5"}
    assert call(report.main, "sweep") == 0
