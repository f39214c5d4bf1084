"""Options are made from a model's fields; typos get a sentence; helps fit every width."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import haq.__main__ as front
from haq.console.commands import Group, command, main_of, summary_of
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.console.options import argument, flag, option, option_name, options_of, output_options, setting
from haq.console.output import VERBOSITY, Output, logger
from haq.console.values import FOLDER, ChoiceType

CALLS: list[dict[str, Any]] = []


class Config(BaseModel):
    """What the commands of these tests are asked."""

    epochs: int = setting(20, "passes over the train images", group="Training", metavar="N")
    learning_rate: float = setting(0.005, "of SGD", group="Training")
    objective: str | None = setting(None, "what counts", group="Search", spellings=("--reward",), names=lambda: ("acc", "iou"))
    limit: str = setting("0.5", "what is allowed", group="Search", several=True)
    cold: bool | None = setting(None, "measure with cold caches", group="Hardware", default_words="in them")


@command(
    "toy",
    """Do a thing.

    tvm     a folder with one library for this machine's processor, integers from end to end
    onnx    a file

    And more
    of it.
    """,
    examples=("haq toy run --epochs 3 --learning-rate 0.005 --objective accuracy --out somewhere-else",),
)
@options_of(Config)
@argument("run", FOLDER, "the folder of a search")
@option("--out", FOLDER, "folder to write", group="Output", default_words="one under runs/")
@option("--to", ChoiceType(("tvm", "onnx")), "format", group="Output", default="tvm")
@flag("--resume", "go on", group="Output")
@output_options()
def cli(given: dict[str, Any], as_json: bool, **others: Any) -> int:
    """Note what was given."""
    CALLS.append({"given": given, "json": as_json, "quiet": VERBOSITY.is_quiet, **others})
    return 3


main = main_of(cli)


def call(*arguments: str) -> int:
    CALLS.clear()
    return run_command(lambda: main(list(arguments)))


def test_options_that_were_not_given_are_absent() -> None:
    assert call("r") == 3
    expected = {"run": Path("r"), "out": None, "to": "tvm", "resume": False, "json": False, "quiet": False}
    assert [{"given": {}, **expected}] == CALLS
    assert call("r", "--epochs", "20", "--cold", "--resume", "--json", "--out", "o") == 3
    # A value that happens to be the default was given all the same.
    assert CALLS[0]["given"] == {"epochs": 20, "cold": True}
    assert CALLS[0]["resume"] is CALLS[0]["json"] is True
    assert CALLS[0]["out"] == Path("o")


def test_an_option_may_be_given_several_times() -> None:
    assert call("r", "--limit", "latency=0.5", "--epochs", "1", "--limit", "storage=40kB") == 3
    assert CALLS[0]["given"] == {"epochs": 1, "limit": "latency=0.5,storage=40kB"}
    assert call("r", "--limit", "1ms") == 3
    assert CALLS[0]["given"] == {"limit": "1ms"}
    # A program may put what it changes behind what it has; whoever types is told by what reads the text.
    assert call("r", "--limit", "0.5", "--limit", "energy=0.9", "--limit", "1ms", "--limit", "energy=0.8") == 3
    assert CALLS[0]["given"] == {"limit": "1ms,energy=0.8"}


def test_an_option_may_have_two_spellings() -> None:
    for spelling in ("--objective", "--reward"):
        assert call("r", spelling, "acc") == 3
        assert CALLS[0]["given"] == {"objective": "acc"}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["r", "--epochs", "3", "--epochs=3"], "--epochs"),
        (["r", "--reward", "a", "--objective", "b"], "--objective"),
        (["--out", "a", "r", "--out", "b"], "--out"),
    ],
)
def test_an_option_is_typed_once(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    CALLS.clear()
    monkeypatch.setattr(sys, "argv", ["haq", *words])
    assert run_command(main) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {name} is given twice, and can be given once; see haq toy --help\n"
    assert not CALLS
    # A program that changes what it has may put it last.
    assert call(*words) == 3


def test_an_option_of_a_command_in_a_group_is_typed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["haq", "search", "--hw", "edge", "--hw", "cloud"])
    assert run_command(front.main) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: --hw is given twice, and can be given once; see haq search --help\n"


def test_more_than_once_is_more_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["haq", "r", "-v", "-v", "--verbose", "-vv"])
    assert run_command(main) == 3


def test_a_negative_number_is_a_value() -> None:
    assert call("r", "--learning-rate", "-1e-3") == 3
    assert CALLS[0]["given"] == {"learning_rate": -0.001}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: RUN is missing, the folder of a search; see haq toy --help\n"),
        (["r", "--epoch", "3"], "error: there is no option --epoch; did you mean --epochs? See haq toy --help\n"),
        (["r", "--zzz"], "error: there is no option --zzz. See haq toy --help\n"),
        (["r", "-x"], "error: there is no option -x. See haq toy --help\n"),
        (["r", "--epochs", "x"], "error: --epochs is 'x'; it must be an integer\n"),
        (["r", "--epochs", "1.5"], "error: --epochs is '1.5'; it must be an integer\n"),
        (["r", "--learning-rate", "x"], "error: --learning-rate is 'x'; it must be a number\n"),
        (["r", "--epochs"], "error: --epochs requires an argument; see haq toy --help\n"),
        (["r", "--out", "--json"], "error: --out needs a value, and the option --json follows it\n"),
        (["r", "--objective", "--cold"], "error: --objective needs a value, and the option --cold follows it\n"),
        (["r", "--to", "onx"], "error: --to is 'onx'; did you mean onnx? Known: tvm, onnx\n"),
        (["r", "s"], "error: 's' is one thing too many; see haq toy --help\n"),
        (["r", "--cold=3"], "error: --cold does not take a value; see haq toy --help\n"),
    ],
)
def test_typos_are_one_sentence_and_status_two(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == EXIT_BAD_INPUT
    assert not CALLS
    out, err = capsys.readouterr()
    assert not out
    assert err == message


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_help_fits(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for word in ("--help", "-h"):
        assert call(word) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= width
    for words in (
        "Do a thing.",
        "tvm a folder with",
        "onnx a file And more of it.",
        "Arguments: RUN the folder of a search",
        "Training: --epochs N passes over the train images [default: 20]",
        "Search: --objective, --reward TEXT what counts",
        "--cold measure with cold caches [default: in them]",
        "--to tvm|onnx format [default: tvm]",
        "-q, --quiet",
        "--help show this page",
        "Examples: haq toy run",
    ):
        assert words in " ".join(text.split())
    assert "\n  onnx  a file\n" in text
    # What is broken is still one command for a shell.
    example = text.partition("Examples:\n")[2].replace("\\\n", " ").split()
    assert example == list(cli.examples[0].split())


def test_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group("toys", "Show toys.")

    @group.add("list", "List them.")
    def show() -> int:
        print("listed")
        return 0

    @group.add("show", "Show one of them.")
    @argument("name", FOLDER, "which")
    @output_options(json=None)
    def show_one(name: Path) -> int:
        return 4

    run = main_of(group)
    assert run(["list"]) == 0
    assert capsys.readouterr().out == "listed\n"
    assert run(["show", "x", "-q"]) == 4
    for arguments, message in (
        ([], "a command is missing after haq toys: list or show; see haq toys --help"),
        (["shwo"], "there is no command 'shwo'; did you mean show? Known: list, show"),
        (["--al"], "there is no option --al. See haq toys --help"),
        (["show"], "NAME is missing, which; see haq toys show --help"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run(arguments)
    assert run(["--help"]) == 0
    assert "  list  List them" in capsys.readouterr().out


def test_verbosity_is_for_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    @command("talk", "Talk.")
    @output_options()
    def talk(as_json: bool) -> int:
        output = Output.open(as_json)
        output.notes.print("plan")
        logger.info("step")
        logger.warning("careful")
        output.results.print("result")
        output.print_json({"a": 1})
        return 0

    run = main_of(talk)
    seen = {}
    for word in ("", "-q", "-v", "--json"):
        assert run([word] if word else []) == 0
        seen[word] = capsys.readouterr()
    assert seen[""].out == "plan\nresult\n"
    assert seen["-q"].out == "result\n"
    assert seen["-v"] == ("plan\nresult\n", "step\ncareful\n")
    assert seen["--json"].out == '{\n  "a": 1\n}\n'
    assert "result" in seen["--json"].err
    assert not VERBOSITY.is_quiet
    assert logger.propagate


def test_names_for_the_shell() -> None:
    context = cli.make_context("haq toy", ["r"])
    objective = next(param for param in cli.params if param.name == "objective")
    assert [item.value for item in objective.shell_complete(context, "a")] == ["acc"]


def test_a_field_without_setting_is_refused() -> None:
    class Bare(BaseModel):
        """A model that was not meant for a command line."""

        steps: int = 1

    with pytest.raises(TypeError, match="'steps' is not declared with setting"):
        options_of(Bare)(lambda given: 0)


def test_small_words() -> None:
    assert option_name("finetune_epochs") == "--finetune-epochs"
    assert summary_of("Find a thing.\n\nMore.") == "Find a thing"


def test_the_console_imports_nothing_heavy() -> None:
    code = "import sys, haq.console.commands, haq.console.progress, haq.console.errors; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "scipy", "gymnasium"} & set(done.stdout.split())
