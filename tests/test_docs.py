"""What docs/solvers.md shows runs as it is written."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from haq.__main__ import main
from haq.problem.tabular import TabularProblem

PAGE = (Path(__file__).parents[1] / "docs" / "solvers.md").read_text(encoding="utf-8")


def test_the_page_on_solvers_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "150")
    solver, use = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    Path("climb.py").write_text(solver)
    Path("use.py").write_text(use)
    (command,) = re.findall(r"^    haq (bench .*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"digres 0.15 +climb:Climb +88.00 +\d\.\d\d ± \d\.\d\d", printed)
    assert "climb:Climb: 3 seeds; one search of 50 tells all counts" in printed
    runpy.run_path("use.py")
    regret, accuracy = map(float, capsys.readouterr().out.split())
    assert 0 <= regret < 0.05
    assert 0.7 < accuracy < 1


def test_the_page_names_the_tables_that_ship() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| ([\d,]+) \| (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for name, decisions, policies, target, budgets in rows:
        problem = TabularProblem(name)
        free = [one for one in problem.decisions if len(one.pairs) > 1]
        assert (len(free), f"{len(problem.file.accuracy):,}") == (int(decisions), policies)
        assert (problem.target.name, ", ".join(problem.file.limits)) == (target, budgets)
