"""What docs/how_to/solver.md and docs/how_to/prune.md show runs as it is written."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import quantizers as Q
from haq.__main__ import main
from haq.problem.table_file import shipped
from haq.training.methods import METHODS, build_method
from quantizers.pruning import criterion_names

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "how_to" / "solver.md").read_text(encoding="utf-8")
PRUNING = (DOCS / "how_to" / "prune.md").read_text(encoding="utf-8")


def test_the_page_on_solvers_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "150")
    solver, _, tables, use = re.findall(r"^```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)  # the second is smaller data
    Path("climb.py").write_text(solver.removeprefix("%%writefile climb.py\n"))
    Path("tables.py").write_text(tables)
    Path("use.py").write_text(use)
    (command,) = re.findall(r"^haq (bench .*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"digres 0.15 +climb:Climb +88.00 +\d\.\d\d ± \d\.\d\d", printed)
    assert "climb:Climb: 3 seeds; one search of 50 tells all counts" in printed
    runpy.run_path("use.py")
    regret, accuracy = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert 0 <= regret < 5
    assert 70 < accuracy < 100
    runpy.run_path("tables.py")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["table", *shipped()]
    assert rows[2][1:4] == ["5", "59,049", "bitfusion"]


def test_the_page_names_the_tables_that_ship() -> None:
    said = re.findall(r"`(\w+)`", "".join(re.findall(r"^\* `\w+`: .*$", PAGE, re.MULTILINE)))
    assert sorted(said) == shipped()


def test_the_page_on_pruning_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ((name, content),) = re.findall(r"```python\n%%writefile (\S+)\n(.*?)```", PRUNING, re.DOTALL)
    Path(name).write_text(content)
    monkeypatch.setattr(Q.pruning.Criterion, "known", dict(Q.pruning.Criterion.known))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    blocks = re.findall(r"```python\n(?!%%)(.*?)```", PRUNING, re.DOTALL)
    assert len(blocks) == 3
    found: dict[str, object] = {}
    exec("".join(blocks), found)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "0 8 ('0',) ('3',)"
    assert "outputs of the network" in printed[2]
    assert printed[3].startswith("Conv2d(4, 8")
    assert printed[4].startswith("Conv2d(1, 4")
    assert printed[-1].startswith("Result(surrogate: accuracy")
    assert found["small"][3].in_channels == 4  # type: ignore[index]


def test_the_page_on_pruning_names_every_criterion_and_method() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`", "".join(re.findall(r"^\| (`.*?) \|", PRUNING, re.MULTILINE))))
    assert named == {*criterion_names(), *METHODS.names()}


def test_the_commands_of_the_page_on_pruning_are_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (search,) = re.findall(r"^haq (search .*)$", PRUNING, re.MULTILINE)
    assert main([*shlex.split(search), "--dry-run"]) == 0
    (training,) = re.findall(r"^haq train .*--method (\".*?\").*$", PRUNING, re.MULTILINE)
    build_method(shlex.split(training)[0])
