"""`python -m haq.sweep`: many targets and budgets with what they share measured once, whatever happens on the way."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from haq import evaluate, finetune, search, sweep
from haq.console import errors
from haq.problem.evaluator import Evaluator
from haq.reporting import pictures
from haq.store.records import FinishedSweepRecord, SweepRecord
from haq.study import front, sweep_tables
from haq.study.config import read_budgets
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, call, history
from tests.conftest import enter
from tests.store.test_records import sweep as sweep_content

SMALL = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*SMALL, "--hw", "edge,cloud,bitfusion", "--budgets", "0.5:0.98:0.24", "--evaluations", "40"]
ALL = [*QUICK, "--solvers", "ilp,greedy,random", "--seeds", "2"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def files(folder: str) -> dict[str, bytes]:
    """What a sweep wrote, but for events, which have times in them; paths of its own folder left out."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("events.")]
    return {str(path.relative_to(folder)): path.read_bytes().replace(folder.encode(), b"SWEEP") for path in sorted(paths)}


def test_a_sweep_from_end_to_end(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    assert call(sweep.main, *ALL, "--out", "all", "--json") == 0
    out, err = capsys.readouterr()
    assert not [str(w.message) for w in recwarn]
    content = json.loads(out)
    assert content == json.loads(Path("all/sweep.json").read_text())
    assert content["schema"] == "haq-sweep-2"
    assert Path("all/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("all").rglob("*.part"))
    for word in ("Pareto", "uniform 2 bits", "(estimated)", "(measured)", "bitfusion: budgets out of reach: 0.50, 0.74"):
        assert word in err
    assert "can be from 17.63 us (0.975 of uniform 8 bits)" in " ".join(err.split())

    assert {hw: target["unreachable"] for hw, target in content["targets"].items()} == {
        "edge": [],
        "cloud": [],
        "bitfusion": ["0.50", "0.74"],
    }
    for hw, target in content["targets"].items():
        for row in target["found"]:
            assert [run["seed"] for run in row["runs"]] == ([0, 1] if row["solver"] == "random" else [0])
            assert row["cost"] <= row["limit"] * (1 + 1e-9)
            mean = sum(run["test_accuracy"] for run in row["runs"]) / len(row["runs"])
            assert row["test_accuracy"] == pytest.approx(mean)
            assert row["fraction"] == pytest.approx(row["cost"] / target["uniform8"])
            for run in row["runs"]:
                result = json.loads(Path("all", run["folder"], "result.json").read_text())
                assert result["target"] == hw
                assert result["found"]["test_accuracy"] == run["test_accuracy"]
                # With the sweep's sensitivities, what is proposed is all that is evaluated.
                rows = history(Path("all", run["folder"]))
                assert len(rows) == run["evaluations"] == (40 if row["solver"] == "random" else 1)
        assert [row["bits"] for row in target["uniform"]] == [2, 3, 4, 5, 6, 7, 8]
        assert target["uniform"][-1]["fraction"] == 1
        cells = [(row["cost"], row["test_accuracy"], row["pareto"]) for row in [*target["found"], *target["uniform"]]]
        for cost, accuracy, on_front in cells:
            beaten = any(c <= cost and a >= accuracy and (c < cost or a > accuracy) for c, a, _ in cells)
            assert on_front is not beaten
    measured = history(Path("all/sensitivity"))
    assert 30 < len(measured) <= 40
    assert {row["solver"] for row in measured} == {"sensitivity"}

    # Policies of one target on another: at the one budget that all reach.
    special = content["specialisation"]
    assert special["budget"] == "0.98"
    for hw, row in special["policies"].items():
        assert row["fractions"][hw] <= 0.98 * (1 + 1e-9)
        rivals = [run for found in content["targets"][hw]["found"] if found["budget"] == "0.98" for run in found["runs"]]
        assert row["search_accuracy"] == max(run["search_accuracy"] for run in rivals)
    assert max(special["policies"]["edge"]["fractions"].values()) > 0.98

    # Its runs are runs like any other.
    folder = "all/edge-0.74-ilp-seed0"
    assert call(evaluate.main, folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(folder, "result.json").read_text())
    assert call(finetune.main, folder, "--epochs", "1") == 0
    assert Path(folder, "checkpoint", "quantized.safetensors").is_file()
    assert history(Path("all/edge-0.74-random-seed0")) != history(Path("all/edge-0.74-random-seed1"))
    # And its sensitivities serve a search.
    assert call(search.main, *SMALL, "--sensitivity", "all/sensitivity", "--solver", "ilp", "--budget", "0.74") == 0
    one, other = (Path(name, "policy.json").read_bytes() for name in (folder, "runs/edge-latency-0.74-ilp-seed0"))
    assert one == other
    assert call(sweep.main, "--resume", "all") == 2
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(("images", "shares"), [(100, "90.00 % ± 3.00 80.00 % ± 4.00"), (200, "90.00 % 80.00 %")])
def test_accuracies_of_few_images_stand_with_their_error(images: int, shares: str) -> None:
    record = SweepRecord.from_dict(sweep_content(images={"test": images, "search": images}))
    assert isinstance(record, FinishedSweepRecord)
    written = io.StringIO()
    sweep_tables.print_result(Console(file=written, width=150), record)
    shown = " ".join(written.getvalue().split())
    assert shares in shown
    assert ("± is the standard error" in shown) == ("±" in shares)


def test_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    prepared = Evaluator.prepared
    monkeypatch.setattr(Evaluator, "prepared", lambda self, policy: [prepared(self, policy), computed.append(1)][0])
    arguments = [*QUICK, "--hw", "edge,cloud", "--budgets", "0.5,0.6", "--solvers", "ilp", "--out"]
    assert call(sweep.main, *arguments, "one", "--evaluations", "30") == 0
    rows = [row for path in Path("one").rglob("history.csv") for row in history(path.parent)]
    policies = {(row["weight_bits"], row["activation_bits"]) for row in rows}
    uniform = 7
    # A policy's search accuracy, by the evaluator, and both accuracies of those that are reported.
    found = {(row["weight_bits"], row["activation_bits"]) for row in rows if row["solver"] == "ilp"}
    assert len(computed) <= len(policies) + len(found) + uniform
    computed.clear()
    assert call(sweep.main, *arguments, "two", "--sensitivity-kind", "hessian") == 0
    assert len(computed) <= 2 * 4 + uniform
    assert history(Path("two/sensitivity")) == []


def test_the_number_of_workers_changes_nothing() -> None:
    arguments = [*QUICK, "--hw", "edge,cloud", "--budgets", "0.6", "--solvers", "ilp,random", "--evaluations", "8"]
    assert call(sweep.main, *arguments, "--out", "here") == 0
    assert call(sweep.main, *arguments, "--workers", "2", "--out", "there") == 0
    here, there = files("here"), files("there")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.parametrize("after", [50, *(pytest.param(after, marks=pytest.mark.slow) for after in (3, 120))])
def test_an_interrupted_sweep_goes_on_as_if_nothing_had_happened(
    after: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*QUICK, "--hw", "edge,cloud", "--budgets", "0.5,0.7", "--solvers", "greedy,random"]
    assert call(sweep.main, *arguments, "--out", "whole") == 0
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        count.append(1)
        if len(count) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", interrupted)
        assert call(sweep.main, *arguments, "--out", "cut") == errors.EXIT_INTERRUPTED
    assert "python -m haq.sweep --resume cut" in capsys.readouterr().out
    done = {path: path.stat().st_mtime_ns for path in Path("cut").rglob("result.json")}
    assert call(sweep.main, *arguments, "--out", "cut") == 2
    assert "cut is in use" in capsys.readouterr().err
    assert call(sweep.main, "--resume", "cut", "--workers", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    whole, cut = files("whole"), files("cut")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


def test_a_sweep_is_finished_last_and_what_lacks_is_made_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*QUICK[:4], "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "4"]
    save = pictures.save

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "save", killed)
    assert call(sweep.main, *arguments, "--out", "run") == errors.EXIT_INTERRUPTED
    assert not json.loads(Path("run/sweep.json").read_text())["finished"]
    monkeypatch.setattr(pictures, "save", save)
    capsys.readouterr()
    assert call(sweep.main, "--resume", "run") == 0
    assert "uniform 8 bits" in capsys.readouterr().out
    assert Path("run/sweep.png").is_file()
    kept = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    # As versions before left it, which wrote the picture after the file that says that all is there.
    Path("run/sweep.png").unlink()
    assert call(sweep.main, "--resume", "run") == 0
    assert "uniform 8 bits" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == kept
    assert call(sweep.main, "--resume", "run") == 2
    assert "is finished" in capsys.readouterr().err


def test_a_worker_that_fails_says_why_and_the_rest_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--hw", "edge", "--budgets", "0.5,0.7", "--solvers", "ilp"]
    assert call(sweep.main, *arguments, "--out", "run") == 0
    content = json.loads(Path("run/sweep.json").read_text())
    Path("run/sweep.json").write_text(json.dumps(content | {"finished": False}))
    shutil.rmtree("run/edge-0.5-ilp-seed0")
    Path("run/edge-0.7-ilp-seed0/config.yaml").write_text("schema: other")
    assert call(sweep.main, "--resume", "run", "--workers", "2") == 2
    err = capsys.readouterr().err
    assert "run/edge-0.7-ilp-seed0/config.yaml is not the configuration of a run" in err
    assert err.count("\n") == 1


def test_a_sweep_is_not_resumed_on_other_ground(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(sweep.main, *QUICK, "--hw", "edge", "--budgets", "0.6", "--solvers", "ilp", "--out", "run") == 0
    path = Path("run/sweep.json")
    whole = json.loads(path.read_text()) | {"finished": False}
    for section, key, message in (
        ("signature", "network", "the network (small_job:network) is no longer what run began with"),
        ("signature", "data", "the data (small_job:splits) is no longer"),
        ("signature", "target of edge", "the target of edge is no longer"),
        ("versions", "torch", "install that version, or start a new run"),
    ):
        path.write_text(json.dumps({**whole, section: {**whole[section], key: "other"}}))
        assert call(sweep.main, "--resume", "run") == 2
        assert message in capsys.readouterr().err
    for text in ("{}", "schema", json.dumps({**whole, "schema": "a-sweep-2"})):
        path.write_text(text)
        assert call(sweep.main, "--resume", "run") == 2
        assert "is not the file of a sweep" in capsys.readouterr().err
    path.write_text(json.dumps({**whole, "schema": "haq-sweep-1"}))
    assert call(sweep.main, "--resume", "run") == 2
    assert "made by an older version of haq (haq-sweep-1, this one reads haq-sweep-2): sweep again" in capsys.readouterr().err
    assert call(sweep.main, "--resume", "nowhere") == 2
    assert "it has no sweep.json" in capsys.readouterr().err


def test_a_dry_run_says_it_all_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path().iterdir())
    assert call(sweep.main, *ALL, "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in (
        "on edge",
        "budgets 0.50, 0.74, 0.98",
        "out of reach: 0.50, 0.74",
        "28, in this process",
        "nothing is written",
    ):
        assert word in out
    assert set(Path().iterdir()) - before <= {Path("__pycache__")}


def test_storage_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--hw", "edge", "--metric", "storage", "--budgets", "0.6,1.5kB", "--solvers", "random"]
    assert call(sweep.main, *arguments, "--out", "run") == 0
    assert "(counted)" in capsys.readouterr().out
    content = json.loads(Path("run/sweep.json").read_text())
    assert content["unit"] == "B"
    assert [row["limit"] for row in content["targets"]["edge"]["found"]][1] == 1500
    assert content["sensitivities"] is None
    assert content["specialisation"] is None
    assert not Path("run/sensitivity").exists()


def test_budgets_are_decimal() -> None:
    assert read_budgets("0.3:0.9:0.1") == ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
    assert read_budgets("0.5:0.5:0.1") == ("0.5",)
    assert read_budgets("0.5,12ms") == ("0.5", "12ms")


def test_the_front_is_what_nothing_beats() -> None:
    assert front.pareto([(1, 0.5), (2, 0.5), (2, 0.7), (2, 0.7), (3, 0.6), (0.5, 0.1)]) == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hw", "edge,egde"], "did you mean edge"),
        (["--hw", "edge,edge"], "--hw is 'edge,edge'; it must be names parted by commas, each of them once"),
        (["--hw", "edge,"], "--hw is 'edge,'"),
        (["--budgets", "0.9:0.3:0.1"], "--budgets is '0.9:0.3:0.1'; it must be FIRST:LAST:STEP"),
        (["--budgets", "0.3:0.9:0"], "--budgets is '0.3:0.9:0'"),
        (["--budgets", "0.3:nan:0.1"], "--budgets is '0.3:nan:0.1'"),
        (["--budgets", "0.3:0.9"], "such as 0.3:0.9:0.1"),
        (["--budgets", "much"], "not understood"),
        (["--budgets", "0.01,0.02"], "none of the budgets 0.01, 0.02 is in reach of any target: on edge, latency can be from"),
        (["--solvers", "ilp,dpg"], "did you mean ddpg"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--evaluations", "0"], "--evaluations is 0"),
        (["--metric", "energy"], "it has latency, storage"),
        (["--threads", "2"], "threads is for kernels that are measured"),
        (["--sensitivity-kind", "hesse"], "loss, kl, hessian"),
        (["--resume", "x"], "no other option"),
    ],
)
def test_bad_input_is_one_sentence_and_touches_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().iterdir())
    assert call(sweep.main, *QUICK, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert set(Path().iterdir()) - before <= {Path("__pycache__")}
