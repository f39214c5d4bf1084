"""`python -m haq.runs` says what runs there are, what they asked for and how they differ, and deletes nothing unasked."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from haq import runs, search, sweep
from haq.console import errors
from haq.store import lock
from haq.study.search_run import SearchRun
from hw_models import trust
from tests.commands.test_robustness_command import MODULE
from tests.conftest import enter

ROOT = Path(__file__).parents[2]
JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
QUICK = [*JOB, "--solver", "random", "--evaluations", "6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one of them fine-tuned, one that was interrupted, one damaged, and a sweep."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        enter(place, patch, MODULE)
        assert search.main([*QUICK, "--budget", "0.6", "--finetune-epochs", "1", "--out", "runs/a"]) == 0
        assert search.main([*QUICK, "--budget", "0.7", "--finetune-epochs", "0", "--out", "runs/b"]) == 0
        record, count = SearchRun.record, []

        def interrupted(self: SearchRun, *arguments: Any) -> None:
            record(self, *arguments)
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt

        with patch.context() as inner:
            inner.setattr(SearchRun, "record", interrupted)
            assert search.main([*QUICK, "--budget", "0.8", "--out", "runs/cut"]) == errors.EXIT_INTERRUPTED
        shutil.copytree("runs/b", "runs/torn")
        Path("runs/torn/history.csv").write_bytes(b"\xff")
        swept = [*JOB, "--hw", "edge,cloud", "--budgets", "0.6", "--solvers", "ilp,random", "--evaluations", "6"]
        assert sweep.main([*swept, "--out", "runs/swept"]) == 0
        Path("runs/notes").mkdir()
        Path("runs/notes/thesis.tex").write_text("years of work")
    return place


@pytest.fixture(autouse=True)
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    enter(tmp_path, monkeypatch, MODULE)
    monkeypatch.setattr(trust, "_named", set())  # as in a process of its own


def call(*arguments: str) -> int:
    return errors.run_command(lambda: runs.main(list(arguments)))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert call(*arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def files() -> set[str]:
    return {str(path) for path in Path("runs").rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_list_has_a_line_for_every_run_and_sweep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = told(capsys, "list")
    shown = out.splitlines()
    lines = {line.split()[0]: line.split() for line in shown if re.search(r"\d/\d", line)}
    asked = {before.split()[0]: line.strip() for before, line in itertools.pairwise(shown) if before.split()}
    assert list(lines) == ["runs/a", "runs/b", "runs/cut", "runs/swept"]
    assert asked["runs/a"] == "small_job:network, edge, latency 0.6, random"
    assert asked["runs/swept"].startswith("sweep: small_job:network, edge,cloud, latency 0.6")
    result = json.loads(Path("runs/a/result.json").read_text())
    shares = [f"{100 * result[row][key]:.2f}" for row, key in (("found", "search_accuracy"), ("finetuned", "test_accuracy"))]
    assert lines["runs/a"][1:] == ["6/6", shares[0], "%", shares[1], "%", "finished"]
    assert lines["runs/b"][-1] == lines["runs/swept"][-1] == "finished"
    assert lines["runs/cut"][-1] == "interrupted"
    assert lines["runs/cut"][1] == "4/6"
    assert lines["runs/swept"][1] == "4/4"
    assert "runs/torn: runs/torn/history.csv is not text in UTF-8" in out
    assert "notes" not in out
    assert ".lock" not in out


@pytest.mark.parametrize("width", [60, 80, 150])
def test_tables_are_no_wider_than_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shutil.copytree("runs/a", f"runs/{'a-name-that-goes-on' * 5}")
    for arguments in (
        ["list"],
        ["list", "runs/swept"],
        ["show", "runs/a"],
        ["show", "runs/swept"],
        ["compare", "runs/a", "runs/b"],
    ):
        out = told(capsys, *arguments)
        # Commands stand on one line, to be copied.
        lines = [line for line in out.splitlines() if not line.startswith(("again  ", "go on  "))]
        assert max(map(len, lines)) <= width
    assert "finished" in out


def test_a_list_as_json_agrees_with_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = {Path(run["folder"]).name: run for run in json.loads(told(capsys, "list", "--json"))}
    result = json.loads(Path("runs/a/result.json").read_text())
    assert found["a"]["search_accuracy"] == result["found"]["search_accuracy"]
    assert found["a"]["test_accuracy"] == result["finetuned"]["test_accuracy"]
    assert found["a"]["bytes"] == sum(p.stat().st_size for p in Path("runs/a").rglob("*") if p.is_file() and p.name != ".lock")
    rows = [line.split(",") for line in Path("runs/cut/history.csv").read_text().splitlines()[1:]]
    within = [float(row[4]) for row in rows if row[7] == "1"]
    assert found["cut"]["search_accuracy"] == (max(within) if within else None)
    assert found["cut"]["test_accuracy"] is None
    assert {name: run["state"] for name, run in found.items()} == {
        "a": "finished",
        "b": "finished",
        "cut": "interrupted",
        "swept": "finished",
        "torn": "damaged",
    }


def test_no_nones_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("runs/a", "runs/b", "runs/cut", "runs/swept", "runs/swept/sensitivity"):
        assert runs.main(["show", folder]) == 0
        out = capsys.readouterr().out
        assert not re.search("none|null|[{}]", out, re.IGNORECASE), out
    assert runs.main(["show", "runs/swept"]) == 0
    assert "hw edge,cloud, budgets 0.6, solvers ilp,random, seeds 1" in " ".join(capsys.readouterr().out.split())


def test_a_finished_run_is_finished_whoever_holds_its_lock(capsys: pytest.CaptureFixture[str]) -> None:
    with lock.writing(Path("runs/b"), ""), lock.writing(Path("runs/cut"), ""), lock.writing(Path("runs/swept"), ""):
        assert runs.main(["list", "--json"]) == 0
        states = {Path(run["folder"]).name: run["state"] for run in json.loads(capsys.readouterr().out)}
        assert runs.main(["prune", "--checkpoints"]) == 0
        assert "left alone: runs/b, it is being written" in capsys.readouterr().out
    assert (states["b"], states["cut"], states["swept"]) == ("finished", "running", "finished")


def test_a_sweep_is_listed_with_its_searches(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, "list", "runs/swept", "--json"))
    assert [run["kind"] for run in found] == ["sweep"] + 4 * ["search"]
    assert {run["folder"] for run in found[1:]} == {
        f"runs/swept/{hw}-0.6-{solver}-seed0" for hw in ("edge", "cloud") for solver in ("ilp", "random")
    }


def test_where_there_are_none_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    assert "no runs in empty" in told(capsys, "list", "empty")
    assert call("list", "nowhere") == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    monkeypatch.chdir("empty")
    assert "no runs in runs; python -m haq.search --hw edge makes one" in told(capsys, "list")
    assert json.loads(told(capsys, "list", "--json")) == []


def test_a_setting_that_there_is_not_is_told_with_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    content = Path("runs/a/config.yaml").read_text()
    Path("runs/a/config.yaml").write_text(content.replace("seed: 0", "color: red"))
    assert call("show", "runs/a") == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: runs/a/config.yaml: unknown setting 'color'")


def test_show_says_what_was_asked_and_found_and_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "show", "runs/a")
    asked = (
        "python -m haq.search --network small_job:network --data small_job:splits --budget 0.6 --solver random "
        "--evaluations 6 --finetune-epochs 1"
    )
    assert f"again  {asked}\n" in out
    assert "go on  python -m haq.evaluate runs/a\n" in out
    for word in ("finished", "evaluations 6", "torch", "signature", "history.csv", "checkpoint/", "finetuned", "holds"):
        assert word in " ".join(out.split())
    code = "code small_job:network, small_job:splits: if you trust it, give --trust with each name"
    assert all(code in " ".join(told(capsys, "show", run).split()) for run in ("runs/a", "runs/cut", "runs/swept"))
    assert "go on  python -m haq.finetune runs/b\n" in told(capsys, "show", "runs/b")
    assert "go on  python -m haq.search --resume runs/cut\n" in told(capsys, "show", "runs/cut")
    content = json.loads(told(capsys, "show", "runs/a", "--json"))
    assert content["settings"] == yaml.safe_load(Path("runs/a/config.yaml").read_text())["settings"]
    assert content["result"] == json.loads(Path("runs/a/result.json").read_text())
    assert content["files"]["history.csv"] == Path("runs/a/history.csv").stat().st_size


@pytest.mark.parametrize("run", ["runs/a", "runs/swept", "given"])
def test_the_command_that_it_shows_does_the_same_again(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    if run == "given":
        arguments = [*JOB, "--solver", "ilp", "--budget", "0.7", "--sensitivity", "runs/measured", "--finetune-epochs", "0"]
        first = [*QUICK, "--solver", "ilp", "--evaluations", "30", "--sensitivity-kind", "kl", "--finetune-epochs", "0"]
        assert search.main([*first, "--out", "runs/measured"]) == 0
        assert search.main([*arguments, "--out", run]) == 0
    command = json.loads(told(capsys, "show", run, "--json"))["commands"]["again"].split()
    main: Any = {"haq.search": search.main, "haq.sweep": sweep.main}[command[2]]
    assert main([*command[3:], "--out", "again"]) == 0
    for path in Path(run).rglob("policy.json"):
        assert Path("again", path.relative_to(run)).read_bytes() == path.read_bytes()


def test_compare_puts_differences_first_and_then_what_came_out(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "compare", "runs/a", "runs/b", "runs/cut")
    assert out.index("what was asked differently") < out.index("what came out")
    content = json.loads(told(capsys, "compare", "runs/a", "runs/b", "runs/cut", "--json"))
    assert content["comparable"]
    assert content["differences"] == {"budget": ["0.6", "0.7", "0.8"], "finetune_epochs": [1, 0, 12]}
    result = json.loads(Path("runs/a/result.json").read_text())
    assert content["results"]["state"] == ["finished", "finished", "interrupted"]
    assert content["results"]["test accuracy, found"][0] == result["found"]["test_accuracy"]
    assert content["results"]["test accuracy, found"][2] is None
    assert content["results"]["cost, of uniform 8 bits"][0] == result["budget"]["used_fraction"]


@pytest.mark.parametrize(
    ("part", "name", "reason"),
    [
        ("signature", "data", "signature of data"),
        ("signature", "network", "signature of network"),
        ("settings", "objective", "objective"),
    ],
)
def test_accuracies_of_other_terms_are_not_put_side_by_side(
    part: str, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("runs/b/config.yaml")
    content = yaml.safe_load(path.read_text())
    content[part][name] = "agreement"
    path.write_text(yaml.safe_dump(content))
    out = told(capsys, "compare", "runs/a", "runs/b")
    assert f"Their accuracies can't be compared: they are of another {reason}." in out
    assert "test accuracy" not in out
    assert "evaluations" in out


def test_what_can_not_be_compared_is_said_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["runs/a", "runs/swept"], "runs/swept is a sweep: compare runs of it"),
        (["runs/a", "runs/torn"], "runs/torn/history.csv is not text"),
        (["runs/a", "runs/notes"], "runs/notes is neither the folder of a run nor of a sweep"),
        (["runs/a"], "compare takes at least two runs"),
    ):
        assert call("compare", *arguments) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1


def test_prune_says_what_it_would_delete_and_deletes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    out = told(capsys, "prune", "--unfinished", "--checkpoints")
    assert "would delete: runs/cut, all of it" in out
    assert "would delete: runs/a, networks, agents and attacks, 1 file" in out
    assert "nothing was deleted: add --yes to do it" in out
    assert files() == before


def test_prune_deletes_what_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    out = told(capsys, "prune", "--unfinished", "--yes")
    assert "deleted: runs/cut, all of it" in out
    assert not Path("runs/cut").exists()
    assert files() == {name for name in before if not name.startswith("runs/cut/")}
    for state in ("ddpg", "finetune"):
        Path(f"runs/a/checkpoint/{state}.state").write_bytes(b"kept")
    out = told(capsys, "prune", "--checkpoints", "--yes")
    assert "deleted: runs/a, networks, agents and attacks, 2 files" in out
    assert Path("runs/a/checkpoint/finetune.state").exists()  # somebody's interrupted fine-tuning
    Path("runs/a/checkpoint/finetune.state").unlink()
    gone = "runs/a/checkpoint/quantized.safetensors"
    assert files() == {name for name in before if not name.startswith("runs/cut/") and name != gone}
    assert "finished" in told(capsys, "show", "runs/a")
    assert "nothing to delete in runs" in told(capsys, "prune", "--unfinished", "--checkpoints", "--yes")


def test_prune_goes_by_age_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to delete" in told(capsys, "prune", "--unfinished", "--older-than", "1", "--yes")
    for path in (Path("runs/cut"), *Path("runs/cut").rglob("*")):
        os.utime(path, (0, 0))
    assert "deleted: runs/cut" in told(capsys, "prune", "--unfinished", "--older-than", "1", "--yes")


def test_prune_leaves_alone_what_is_not_of_haq(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/cut/thesis.tex").write_text("years of work")
    Path("elsewhere").mkdir()
    shutil.copytree("runs/cut", "elsewhere/cut")
    Path("elsewhere/cut/thesis.tex").unlink()
    Path("runs/link").symlink_to(Path("elsewhere/cut").resolve())
    out = told(capsys, "prune", "--unfinished", "--yes")
    assert "left alone: runs/cut, thesis.tex in it isn't of haq" in out
    assert "left alone: runs/link, it is a symbolic link" in out
    assert Path("runs/cut/history.csv").exists()
    assert Path("elsewhere/cut/history.csv").exists()
    assert Path("runs/notes/thesis.tex").exists()
    assert Path("runs/torn/config.yaml").exists()
    for arguments, sentence in (
        (["runs/notes", "--unfinished"], None),
        (["runs"], "say what is to be deleted: --unfinished, --checkpoints, or both"),
        (["nowhere", "--unfinished"], "there is no folder nowhere"),
        (["--unfinished", "--older-than", "-1"], "--older-than is -1.0"),
    ):
        assert call("prune", *arguments, "--yes") == (2 if sentence else 0)
        assert (sentence or "") in capsys.readouterr().err
    assert Path("runs/notes/thesis.tex").exists()


def test_prune_follows_no_link_out_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/net.safetensors").write_text("years of work")
    Path("runs/cut/robustness").symlink_to(Path("elsewhere").resolve())
    Path("runs/b/robustness").symlink_to(Path("elsewhere").resolve())
    told(capsys, "prune", "--unfinished", "--checkpoints", "--yes")
    assert Path("elsewhere/net.safetensors").read_text() == "years of work"


def test_a_sweep_goes_as_a_whole_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/swept/edge-0.6-ilp-seed0/result.json").unlink()
    assert "swept" not in told(capsys, "prune", "--unfinished")
    out = told(capsys, "prune", "runs/swept/edge-0.6-ilp-seed0", "--unfinished", "--yes")
    assert "it is part of a sweep" in out
    path = Path("runs/swept/sweep.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    assert "deleted: runs/swept, all of it" in told(capsys, "prune", "--unfinished", "--yes")
    assert not Path("runs/swept").exists()


def test_what_a_kill_left_before_a_run_began_can_be_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/stub").mkdir()
    Path("runs/stub/config.yaml.part").write_text("half")
    assert "runs/stub: it had hardly begun" in told(capsys, "list")
    assert "deleted: runs/stub" in told(capsys, "prune", "--unfinished", "--yes")
    assert not Path("runs/stub").exists()


def test_text_of_a_run_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("runs/b/config.yaml")
    content = yaml.safe_load(path.read_text())
    content["settings"]["network"] = "\x1b[2Jnet[bold]work"
    path.write_text(yaml.safe_dump(content))
    out = told(capsys, "list")
    assert "\x1b" not in out
    assert "net[bold]work" in out


def test_a_line_break_in_the_name_of_a_folder_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/b").rename("runs/b\nforged: finished")
    Path("runs/st\nub").mkdir()
    Path("runs/st\nub/config.yaml.part").write_text("half")
    Path("no\nforged").mkdir()
    folder = str(Path("runs/b\nforged: finished"))
    for words in (["list"], ["show", folder], ["list", "no\nforged"], ["prune", "--unfinished", "--checkpoints"]):
        assert not [line for line in told(capsys, *words).splitlines() if line.startswith(("forged", "ub"))], words


def test_a_list_needs_no_torch() -> None:
    code = (
        "import sys; from haq import runs; runs.main(['list']); runs.main(['compare', 'runs/a', 'runs/b']);"
        "runs.main(['prune', '--unfinished']); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "False"
