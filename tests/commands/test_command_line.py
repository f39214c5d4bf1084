"""`haq` on the command line: helps that come at once and fit, lists of what there is, typos, completion."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import haq.__main__ as front
from haq import hardware
from haq import list as listing
from haq.console.errors import EXIT_BAD_INPUT, EXIT_UNREAD, run_command
from haq.version import __version__

ROOT = Path(__file__).parents[2]
SUBCOMMANDS = [
    ["hardware", "list"],
    ["hardware", "show"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "compare"],
    ["runs", "prune"],
]
WIDTHS = (60, 80, 120)


def call(*arguments: str) -> int:
    return run_command(lambda: front.main(list(arguments)))


def shell(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.parametrize("words", [[], *([name] for name in front.MODULES), ["completion"], *SUBCOMMANDS], ids=" ".join)
def test_every_help_fits_and_has_its_summary(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert call(*words, "--help") == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= width
    assert f"Usage: haq {' '.join(words)}".rstrip() in text
    assert "show this page" in text
    if len(words) == 1 and words[0] in front.MODULES:
        summary = front.summary(front.MODULES[words[0]])
        assert summary in " ".join(text.split())
        assert call("--help") == 0
        assert summary in " ".join(capsys.readouterr().out.split())


def test_helps_import_no_torch_and_take_little_time() -> None:
    code = (
        "import sys, time, haq.__main__ as front\n"
        "for name in [[], *([name] for name in front.MODULES)]:\n"
        "    assert front.main([*name, '--help']) == 0\n"
        "    heavy = {'torch', 'scipy', 'gymnasium', 'matplotlib', 'tvm'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr
    # A loose bound, of the time of the processor: it was 1.9 s, and is 0.3 s where nothing else runs.
    code = (
        "import resource, haq.__main__ as front; front.main(['search', '--help']);"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    assert float(shell("-c", code).stdout.split()[-1]) < 1.0


@pytest.mark.parametrize("name", list(front.MODULES))
def test_a_module_is_the_same_command(name: str) -> None:
    module = front.MODULES[name].removesuffix(".__main__")
    assert shell("-m", module, "--help").stdout == shell("-m", "haq", name, "--help").stdout


def test_every_command_module_has_main(capsys: pytest.CaptureFixture[str]) -> None:
    for module in front.MODULES.values():
        assert importlib.import_module(module).main(["--help"]) == 0
        assert "Usage: haq" in capsys.readouterr().out


def test_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"haq {__version__}\n"
    assert call() == 0
    shown = capsys.readouterr().out
    for heading in front.COMMANDS:
        assert f"{heading}:" in shown
    for arguments, message in (
        (["serach"], "error: there is no command 'serach'; did you mean search? Known: search, sweep"),
        (["netwroks"], "error: there is no command 'netwroks'; did you mean networks?"),
        (["--versoin"], "error: there is no option --versoin; did you mean --version"),
        (["search", "--bugdet", "1"], "error: there is no option --bugdet; did you mean --budget"),
        (["search", "--evaluations", "many"], "error: --evaluations is 'many'; it must be an integer"),
        (["search", "--config", "nowhere.yaml"], "error: --config nowhere.yaml: there is no such file"),
        (["hardware", "shwo"], "error: there is no command 'shwo'; did you mean show"),
        (["list", "solver"], "error: KIND is 'solver'; did you mean solvers"),
        (["evaluate"], "error: RUN is missing, the folder of a search; see haq evaluate --help"),
        (["data", "cifar1"], "error: unknown data set 'cifar1'; did you mean cifar10"),
    ):
        assert call(*arguments) == EXIT_BAD_INPUT
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith(message)
        assert err.count("\n") == 1


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    for name, mark in (("bash", "complete -o nosort -F"), ("zsh", "#compdef haq"), ("fish", "complete --no-files")):
        assert call("completion", name) == 0
        assert mark in capsys.readouterr().out
    for words, expected in (("haq sea", "search"), ("haq search --solver gre", "greedy"), ("haq netw", "networks")):
        done = shell("-m", "haq", _HAQ_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        assert done.stdout.split(",")[1].strip() == expected, done


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", list(listing.KINDS))
def test_lists_fit(kind: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert call("list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rows = listing.rows_of(kind)
    assert len(rows) >= 2
    for row in rows:
        assert row.origin == "built in" or "." in row.origin
        assert row.line


def test_lists_by_a_shorter_name_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "solvers") == 0
    whole = capsys.readouterr().out
    assert call("solvers") == 0
    assert capsys.readouterr().out == whole
    assert call("solvers", "--like", "GREE", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed["solvers"]] == ["greedy"]
    assert call("list") == 0
    shown = capsys.readouterr().out
    for name in ("ddpg", "edge", "lsq", "mobilenet-mini", "cifar10", "accuracy+robust", "bitfusion", "pgd"):
        assert f" {name} " in shown
    assert call("solvers", "--like", "zzz") == EXIT_BAD_INPUT
    assert "no name contains 'zzz'; see all of them with haq list solvers" in capsys.readouterr().err


def test_networks_of_libraries_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    assert call("networks", "--like", "mobilenetv2_05") == 0
    assert "timm:mobilenetv2_050" in capsys.readouterr().out


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_hardware_fit(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (
        ["list"],
        ["show", "edge"],
        ["show", "bitfusion", "--network", "mobilenet-mini"],
        ["show", "cloud", "--network", "mobilenet-mini", "--bits", "8,7,6,5,4/8,3,2,1"],
    ):
        assert hardware.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if not line.startswith("Next: ")) <= width, arguments
    assert "…" not in "".join(lines)


# The reader is gone before anything is written; the JSON is longer than what Python holds back until the end.
@pytest.mark.parametrize("program", ["haq.__main__ list", "haq.list", "haq.__main__ list --json", "haq.list --json"])
def test_a_reader_who_has_had_enough(program: str) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", *program.split()]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")


@pytest.mark.parametrize("module", ["haq", "haq.list"])
def test_an_output_that_is_closed(module: str) -> None:
    command = f"{sys.executable} -m {module} list >&-".replace("haq.list list", "haq.list")
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.stderr == "error: the output is closed (>&-); send it to a file, or to /dev/null\n"
    assert done.returncode == EXIT_BAD_INPUT


def test_another_pipe_than_the_output_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise BrokenPipeError("the board hung up")

    assert run_command(main) == EXIT_BAD_INPUT
    assert capfd.readouterr().err == "error: the board hung up\n"
