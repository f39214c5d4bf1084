"""`python -m haq.search` does what it says: plan, search, fine-tune, report, resume; and refuses what it must."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantizers as Q
from haq import evaluate, finetune, report, runs, search
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.store.history import COLUMNS
from haq.study.config import SearchConfig
from haq.study.search_run import SearchRun
from hw_models import trust
from tests.conftest import enter

MODULE = """
import torch
from haq.networks import Network
from tests.conftest import images, small_network

def splits():
    network = small_network()
    parts = {}
    for seed, (name, count) in enumerate((("train", 64), ("search", 64), ("test", 64))):
        x = images(count, seed)
        with torch.no_grad():
            y = network(x).argmax(1)
        y[:4] = torch.arange(4)  # every class at least once
        parts[name] = (x, y)
    return parts

def network():
    return Network("small", small_network(), (1, 8, 8))
"""
SMALL = ["--network", "small_job:network", "--data", "small_job:splits", "--budget", "0.6"]
QUICK = [*SMALL, "--evaluations", "30", "--finetune-epochs", "1"]
AGENTS = [*SMALL, "--evaluations", "16", "--finetune-epochs", "1"]  # half of them proposed by an agent, which takes longest


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job of one's own in it."""
    enter(tmp_path, monkeypatch, MODULE)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_printed_commands_work_whatever_the_folder_is_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p q/[red]r[/] n;x[/b]", "-it's"):
        asked = [*SMALL, "--solver", "random", "--evaluations", "4", "--finetune-epochs", "0", "--out", name]
        assert call(search.main, *asked) == 0
        out = capsys.readouterr().out
        assert f"Written: {name} (policy.json" in out
        assert call(runs.main, "show", "--", name) == 0
        out += "".join(f"Next: {line[7:]}" for line in capsys.readouterr().out.splitlines(True) if line[:7] == "go on  ")
        commands = [shlex.split(line[6:]) for line in out.splitlines() if line.startswith("Next: ")]
        assert {words[2] for words in commands} == {"haq.finetune", "haq.report"}
        for _, _, module, *words in commands:
            context = importlib.import_module(module).cli.make_context(module, words)
            (folder,) = [value for value in context.params.values() if value in (Path(name), (Path(name),))]
            assert folder


def test_signs_of_inputs_that_are_never_negative_are_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    said = "1 bit makes one value of inputs that are never negative ("
    for bits, schemes, named in (("1:8", "binary", True), ("1:8/2:8", "binary", False), ("1:8", "linear", False)):
        assert call(search.main, *SMALL, "--hw", "edge", "--bits", bits, "--scheme", schemes, "--dry-run") == 0
        assert (said in " ".join(capsys.readouterr().out.split())) == named


def test_the_job_from_end_to_end(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    assert call(search.main, *AGENTS, "--out", "run") == 0
    out, err = capsys.readouterr()
    assert not err
    assert not [str(w.message) for w in recwarn]
    for word in (
        "network",
        "search images",
        "fixed (weights/activations): stem 8/8, classifier 8/8",
        "results in",
    ):
        assert word in " ".join(out.split())
    for word in (
        "Bits per layer on edge",
        "bound by",
        "uniform 8 bits",
        "fine-tuned",
        "(measured)",
        "(estimated)",
    ):
        assert word in out
    assert "holds" in out
    assert "Next: python -m haq.evaluate run" in out

    run = Path("run")
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "policy.json", "history.csv", "result.json", "policy.png", "checkpoint"} <= names
    assert any(name.startswith("events.") for name in names)
    assert not [name for name in names if name.endswith(".part")]
    assert (run / "policy.png").read_bytes().startswith(b"\x89PNG")
    policy, result = Q.BitPolicy.from_json(run / "policy.json"), json.loads((run / "result.json").read_text())
    assert result["budget"]["holds"]
    assert result["budget"]["used"] <= result["budget"]["limit"] * (1 + 1e-9)
    assert set(result["rivals"]) == {"greedy", "ilp"}
    rows = history(run)
    assert tuple(rows[0]) == COLUMNS
    assert {row["solver"] for row in rows} == {"ddpg", "greedy", "ilp"}
    best = max(float(row["accuracy"]) for row in rows if row["solver"] == "ddpg" and row["within_budget"] == "1")
    assert result["found"]["search_accuracy"] == best
    w = "-".join(str(bits[0]) for bits in policy.values())
    assert any(row["weight_bits"] == w and float(row["accuracy"]) == best for row in rows)

    assert call(evaluate.main, "run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == result

    checkpoint = run / "checkpoint" / "quantized.safetensors"
    before = checkpoint.read_bytes()
    assert call(finetune.main, "run", "--epochs", "2") == 0
    told = capsys.readouterr().out
    assert ("did not help" in told) == (checkpoint.read_bytes() == before)
    assert "fine-tuned" in told
    assert call(evaluate.main, "run", "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["found"] == result["found"]
    assert json.loads((run / "result.json").read_text()) == tuned


def test_the_same_seed_gives_the_same_bytes() -> None:
    for name in ("a", "b"):
        assert call(search.main, *AGENTS, "--out", name) == 0
    assert call(search.main, *AGENTS, "--seed", "1", "--out", "c") == 0
    for file in ("policy.json", "history.csv"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    assert Path("a", "history.csv").read_bytes() != Path("c", "history.csv").read_bytes()


@pytest.mark.parametrize("solver", ["ilp", "greedy", "random"])
def test_every_solver_through_the_command(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *SMALL, "--solver", solver, "--evaluations", "9", "--finetune-epochs", "0", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["solver"] == solver
    assert result["finetuned"] is None
    assert solver not in result["rivals"]
    assert all(used <= 9 for used in result["evaluations"].values())
    assert "Next: python -m haq.finetune" in err


def test_storage_is_a_metric_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *SMALL,
        "--metric",
        "storage",
        "--budget",
        "1.1kB",
        "--solver",
        "ilp",
        "--finetune-epochs",
        "0",
    ]
    assert call(search.main, *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["budget"]["unit"] == "B"
    assert result["found"]["storage_bytes"] == result["budget"]["used"] <= 1100


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch, MODULE)
        assert call(search.main, *AGENTS, "--out", "whole") == 0
    return folder / "whole"


# In the agent's policies, and in a rival's; at once, and before the agent's last.
@pytest.mark.parametrize("after", [7, 17, *(pytest.param(after, marks=pytest.mark.slow) for after in (1, 15))])
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    after: int, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *arguments: Any) -> None:
        record(self, *arguments)
        count.append(1)
        if len(count) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", interrupted)
        assert call(search.main, *AGENTS, "--out", "cut") == EXIT_INTERRUPTED
    assert "python -m haq.search --resume cut" in capsys.readouterr().out
    if any(row["within_budget"] == "1" for row in history(Path("cut"))):
        assert Path("cut", "policy.json").is_file()
        assert call(evaluate.main, "cut") == 0
        assert "not finished" in capsys.readouterr().out
    # As a kill in the middle of a write would leave it.
    with Path("cut", "history.csv").open("a") as file:
        file.write("ddpg,99,8-")
    assert call(search.main, "--out", "cut", *AGENTS) == 2
    assert "--resume cut" in capsys.readouterr().err
    assert call(search.main, "--resume", "cut") == 0
    for file in ("policy.json", "history.csv"):
        assert (whole / file).read_bytes() == Path("cut", file).read_bytes()
    assert call(search.main, "--resume", "cut") == 2
    assert "is finished" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_ground(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: SearchRun, *arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", stop)
        call(search.main, *QUICK, "--out", "run")
    config = Path("run/config.yaml")
    whole = yaml.safe_load(config.read_text())
    for section, key, message in (
        ("signature", "network", "the network (small_job:network) is no longer what run began with"),
        ("signature", "data", "the data (small_job:splits) is no longer"),
        ("signature", "target", "the target (edge) is no longer"),
        ("versions", "torch", "install that version, or start a new run"),
    ):
        config.write_text(yaml.safe_dump({**whole, section: {**whole[section], key: "other"}}))
        assert call(search.main, "--resume", "run") == 2
        assert message in capsys.readouterr().err
    config.write_text("schema: other")
    assert call(search.main, "--resume", "run") == 2
    assert "not the configuration of a run" in capsys.readouterr().err
    assert call(search.main, "--resume", "nowhere") == 2
    assert "no config.yaml" in capsys.readouterr().err


def test_a_history_that_was_changed_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "random", "--out", "run") == 0
    Path("run/result.json").unlink()
    text = Path("run/history.csv").read_text().splitlines(keepends=True)
    swapped = [*text[:2], text[3], text[2], *text[4:]]
    Path("run/history.csv").write_text("".join(swapped))
    assert call(search.main, "--resume", "run") == 2
    assert "line 3: evaluation 3 of random, where its evaluation 2 must be" in capsys.readouterr().err
    # The same with numbers that count up.
    text[2], text[3] = text[3].replace(",3,", ",2,", 1), text[2].replace(",2,", ",3,", 1)
    Path("run/history.csv").write_text("".join(text))
    assert call(search.main, "--resume", "run") == 2
    assert "can't be resumed" in capsys.readouterr().err


ATTENDING = """

class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.mix = small_network(), torch.nn.Linear(8, 8)

    def forward(self, x):
        rows = self.mix(x[:, 0])
        return self.inner((rows @ rows.transpose(1, 2))[:, None])

def attending():
    return Network("attending", Attending(), (1, 8, 8))
"""


def test_a_plan_says_which_share_of_the_work_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    Path("attending_job.py").write_text(MODULE + ATTENDING)
    asked = ["--network", "attending_job:attending", "--data", "attending_job:splits", "--budget", "0.9"]
    assert call(search.main, *asked, "--finetune-epochs", "0", "--evaluations", "5", "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"not priced [0-9.]+ % of the MACs \(bmm 0.000512 M in the network itself\)", out)
    assert call(search.main, *QUICK, "--dry-run") == 0
    assert "not priced" not in capsys.readouterr().out


def test_a_dry_run_says_it_all_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path().iterdir())
    assert call(search.main, *QUICK, "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in (
        "small",
        "edge",
        "latency",
        "0.6 of uniform 8 bits",
        "ddpg",
        "30 (",
        "each on 64",
        "seed",
        "nothing is written",
    ):
        assert word in out
    assert set(Path().iterdir()) - before <= {Path("__pycache__")}


def test_the_default_folder_is_never_one_in_use() -> None:
    for _ in range(2):
        assert call(search.main, *SMALL, "--solver", "ilp", "--evaluations", "1", "--finetune-epochs", "0") == 0
    assert {path.name for path in Path("runs").iterdir()} == {
        "edge-latency-0.6-ilp-seed0",
        "edge-latency-0.6-ilp-seed0-2",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hw", "egde"], "did you mean edge"),
        (["--network", "mobilenet-mni"], "mobilenet-mini"),
        (["--data", "fashion-mnst"], "fashion-mnist"),
        (["--solver", "dpg"], "did you mean ddpg"),
        (["--metric", "energy", "--hw", "cloud"], "it has latency, storage"),
        (["--budget", "0.01"], "out of reach"),
        (["--budget", "much"], "not understood"),
        (["--env", "gym"], "unknown environment 'gym'; known: plan, haq"),
        (["--bits", "8:2"], "--bits: '8:2' is no span of widths: the smaller stands first"),
        (["--bits", "0:8"], "a width must be 1 to 8, 16 or float, not '0'"),
        (["--evaluations", "0"], "--evaluations is 0"),
        (["--finetune-epochs", "-1"], "--finetune-epochs is -1"),
        (["--resume", "x", "--seed", "3"], "no other option"),
    ],
)
def test_bad_input_is_one_sentence_and_touches_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().iterdir())
    assert call(search.main, *QUICK, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert set(Path().iterdir()) - before <= {Path("__pycache__")}


def test_a_history_of_other_columns_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--out", "run") == 0
    Path("run/result.json").unlink()
    path = Path("run/history.csv")
    path.write_text(path.read_text().replace(",divergence", "", 1))
    before = path.read_text()
    assert call(search.main, "--resume", "run") == 2
    assert "start a new run" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_folder_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    assert call(search.main, *QUICK, "--out", "mine") == 2
    assert "mine is in use and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    assert call(search.main, *QUICK, "--out", "mine/thesis.tex") == 2
    assert "is a file" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--out", "run") == 0
    path = Path("run/checkpoint/quantized.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert call(evaluate.main, "run") == 2
    assert "truncated" in capsys.readouterr().err
    from haq import networks

    networks.save_checkpoint(networks.load("small_job:network"), path)
    assert call(evaluate.main, "run") == 2
    assert "not a checkpoint of this run" in capsys.readouterr().err
    path.unlink()
    assert call(evaluate.main, "run") == 0
    for arguments, message in (
        (["--epochs", "0"], "--epochs is 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
    ):
        assert call(finetune.main, "run", *arguments) == 2
        assert message in capsys.readouterr().err
    shutil.copy("run/config.yaml", "config.yaml")
    assert call(finetune.main, ".") == 2
    assert "not finished" in capsys.readouterr().err


def test_status_one_if_the_budget_does_not_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--finetune-epochs", "0", "--out", "run") == 0
    policy = Q.BitPolicy.from_json("run/policy.json")
    Q.BitPolicy(dict.fromkeys(policy, (8, 8))).to_json("run/policy.json")
    assert call(evaluate.main, "run") == 1
    assert "EXCEEDED" in capsys.readouterr().out


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="--seed is -1"):
        SearchConfig(seed=-1)


def test_as_a_user_types_it_nothing_comes_on_stderr(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "haq.search", "--hw", "edge", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "mobilenet-mini" in done.stdout


def test_the_config_of_a_run_can_be_given_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--scheme", "lsq,hidden=pact", "--out", "run") == 0
    config = SearchConfig.from_file(Path("run/config.yaml"))
    assert (config.solver, config.scheme, config.evaluations) == ("ilp", "lsq,hidden=pact", 30)
    assert call(search.main, "--config", "run/config.yaml", "--out", "again") == 0
    for file in ("policy.json", "history.csv", "problem.json"):
        assert Path("run", file).read_bytes() == Path("again", file).read_bytes()
    # What is given besides wins.
    more = ["--solver", "greedy", "--finetune-epochs", "0", "--seed", "3", "--out", "other"]
    assert call(search.main, "--config", "run/config.yaml", *more) == 0
    expected = config.replace(solver="greedy", finetune_epochs=0, seed=3)
    assert SearchConfig.from_file(Path("other/config.yaml")) == expected
    capsys.readouterr()
    # A file can't have code imported that nobody has named; who names it himself can.
    shutil.copy("run/config.yaml", "config.yaml")
    monkeypatch.setattr(trust, "_named", set())
    assert call(search.main, "--config", "config.yaml", "--dry-run") == 2
    assert "config.yaml names network small_job:network, and code is never called because" in capsys.readouterr().err
    assert call(search.main, "--config", "config.yaml", *SMALL, "--dry-run") == 0
    Path("config.yaml").write_text("schema: other")
    assert call(search.main, "--config", "config.yaml") == 2
    assert "error: --config config.yaml: config.yaml is not the configuration of a run" in capsys.readouterr().err


def test_another_scheme_for_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *SMALL, "--evaluations", "9", "--solver", "ilp", "--finetune-epochs", "0", "--out", "run") == 0
    capsys.readouterr()
    assert call(finetune.main, "run", "--epochs", "1", "--scheme", "pact", "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["finetuned_scheme"] == "pact"
    assert call(evaluate.main, "run", "--json") == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == tuned
    assert "  fine-tuned, " in again.err
    assert " pact " in again.err
    assert call(report.main, "run") == 0
    assert "Fine-tuned with pact" in Path("run/report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert call(evaluate.main, "run", "--scheme", "lsq", "--json") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["scheme"] == "lsq"
    assert other["finetuned"] == tuned["finetuned"]
    assert call(evaluate.main, "run", "--scheme", "kmeans") == 2
    assert "choose --metric storage" in capsys.readouterr().err
    assert call(finetune.main, "run", "--scheme", "lsqq") == 2
    assert "did you mean lsq" in capsys.readouterr().err


def test_quiet_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--solver", "ilp", "--evaluations", "3", "--finetune-epochs", "0"]
    assert call(search.main, *arguments, "-q") == 0
    out, err = capsys.readouterr()
    assert not err
    assert "Bits per layer" in out
    assert "results in" not in out
    assert "Next:" not in out
    assert call(search.main, *arguments, "-v") == 0
    out, err = capsys.readouterr()
    assert "Next:" in out
    assert "ilp 1/3: " in err


@pytest.mark.parametrize("solver", ["ddpg", "random"])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_written(
    solver: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *QUICK, "--solver", solver, "--seed", str(2**32), "--out", "run") == 2
    assert "--seed is 4294967296; it must be an integer from 0 to 4294967295" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_worse_fine_tuning_replaces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The network before, or the one that was fine-tuned earlier, is what evaluate and deploy find."""
    assert call(search.main, *SMALL, "--solver", "greedy", "--finetune-epochs", "3", "--out", "run") == 0
    (network,) = Path("run/checkpoint").glob("*.safetensors")
    before = network.read_bytes()
    result = json.loads(Path("run/result.json").read_text())
    assert "Fine-tuning" in capsys.readouterr().out
    assert call(finetune.main, "run", "--epochs", "1", "--learning-rate", "9.0") == 0
    assert "Fine-tuning did not help" in capsys.readouterr().out
    assert network.read_bytes() == before
    again = json.loads(Path("run/result.json").read_text())
    assert again["finetuned"] == result["finetuned"]
    assert again["tuning"]["kept"] == 0
    assert again["tuning"]["earlier"] >= result["tuning"]["before"]
