"""A run whose evaluations end early says so, is resumed to the last bit, and is read by whatever reads runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haq import evaluate, report, runs, search
from haq.store import history
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, call
from tests.conftest import enter
from tests.study.test_exact_resume import cut, same

MODULE = MODULE.replace('(("train", 64), ("search", 64), ("test", 64))', '(("train", 64), ("search", 625), ("test", 64))')
MODULE = MODULE.replace("network = small_network()", "network = fitted_network()")
MODULE = MODULE.replace('"small", small_network()', '"small", fitted_network()')
MODULE = MODULE.replace("images, small_network", "brightest, images, fitted_network").replace(
    "network(x).argmax(1)", "brightest(x)"
)
ASKED = ["--network", "small_job:network", "--data", "small_job:splits", "--budget", "0.4", "--correction", "none"]
ASKED += ["--evaluations", "30", "--finetune-epochs", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE)


def header(folder: str) -> list[str]:
    return Path(folder, "history.csv").read_text().splitlines()[0].split(",")


def test_a_killed_run_goes_on_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*ASKED, "--solver", "surrogate", "--ahead", "2"]
    assert call(search.main, *asked, "--out", "whole") == 0
    out = capsys.readouterr().out
    rows = history.read(Path("whole/history.csv"))
    assert header("whole")[-1] == "images"
    parts = [row.images for row in rows if row.images is not None]
    assert parts
    assert all(part in (125, 250, 375, 500) for part in parts)
    assert all(row.whole for row in rows if row.solver != "surrogate")  # greedy and ilp need the losses of all samples
    racing = json.loads(Path("whole/result.json").read_text())["racing"]
    assert racing == {
        "evaluations": 30,
        "cut": len(parts),
        "images": sum(parts) + 625 * (30 - len(parts)),
        "of_images": 30 * 625,
    }
    assert f"{len(parts)} of 30 evaluations ended early" in " ".join(out.split())
    cut(monkeypatch, SearchRun, "record", 24, search.main, *asked, "--out", "cut")
    assert not all(row.whole for row in history.read(Path("cut/history.csv")))
    assert call(search.main, "--resume", "cut", "--trust", "small_job") == 0
    assert not same("whole", "cut")
    for main, *words in ((runs.main, "list", "."), (evaluate.main, "whole", "--trust", "small_job"), (report.main, "whole")):
        capsys.readouterr()
        assert call(main, *words) == 0
    page = Path("whole/report.html").read_text()
    assert f"{len(parts)} of 30 evaluations ended early" in page
    assert f"{len(parts)} ended early, and have the value of the images that were looked at" in page


def test_what_does_not_race_is_written_as_ever(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*ASKED, "--solver", "random"]
    assert call(search.main, *asked, "--no-race", "--out", "whole") == 0
    assert header("whole") == list(history.COLUMNS)
    assert "ended early" not in capsys.readouterr().out
    assert "--no-race" in Path("whole/config.yaml").read_text()
    # A run that an earlier version began has no such column, and says nothing of racing: it goes on as it began.
    cut(monkeypatch, SearchRun, "record", 9, search.main, *asked, "--no-race", "--out", "cut")
    config = Path("cut/config.yaml")
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "race: false" not in line))
    assert call(search.main, "--resume", "cut", "--trust", "small_job") == 0
    assert Path("cut/history.csv").read_bytes() == Path("whole/history.csv").read_bytes()
    assert call(search.main, *ASKED, "--solver", "ilp", "--out", "ilp") == 0
    assert header("ilp") == list(history.COLUMNS)


def test_a_history_of_more_images_than_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(monkeypatch, SearchRun, "record", 29, search.main, *ASKED, "--solver", "random", "--out", "cut")
    path = Path("cut/history.csv")
    text = path.read_text()
    part = next(row.images for row in history.read(path) if not row.whole)
    path.write_text(text.replace(f",{part}\n", ",625\n", 1))
    assert call(search.main, "--resume", "cut", "--trust", "small_job") != 0
    assert "is said to have been cut short after 625 images, and there are 625" in " ".join(capsys.readouterr().err.split())
    path.write_text(text)
    assert call(search.main, "--resume", "cut", "--trust", "small_job") == 0
