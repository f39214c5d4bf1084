"""Tables fit their console, and nothing of a file steers a terminal."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from haq.console.tables import Column, command_line, key_table, new_table, parts, plain, print_columns, say, say_next

HOSTILE = "[bold]a[/] :dog: \x1b[31mred\x07 \u202eback [/x] \\[i]"


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_wide_table_is_broken_and_nothing_is_left_out(width: int) -> None:
    names = [f"blocks.{i}.a_layer_with_a_long_name" for i in range(5)]
    costs = [[f"{index}.{row:03}" for row in range(6)] for index in range(9)]
    columns = [Column("layer", [*names, "total"])]
    columns += [Column(f"ms at\nw{index}", cost, "right") for index, cost in enumerate(costs)]
    shown = console(width)
    print_columns(shown, "a network", columns, totals=1, caption="below")
    lines = text(shown).splitlines()
    assert max(map(len, lines)) <= width
    cells = set(text(shown).split())
    assert cells >= {f"{index}.{row:03}" for index in range(9) for row in range(6)}
    assert cells >= {f"w{index}" for index in range(9)}
    assert text(shown).count("a network") == text(shown).count("below") == 1
    tables = text(shown).count("total")
    assert tables == len(parts(columns, width))
    assert (tables == 1) == (width == 120)


def test_long_names_are_wrapped_and_leave_what_is_said_of_them_whole() -> None:
    shown = console(80)
    rows = [Column(name, ["PASS"], "right") for name in ("float", "uniform 8", "found", "defensive")]
    print_columns(shown, "checks", [Column("what should hold", ["a name that is longer than half of the console is"]), *rows])
    lines = text(shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[-4:] == ["PASS"] * 4 for line in lines)


def test_names_are_shown_as_they_are() -> None:
    for width in (200, 60):
        shown = console(width)
        table = new_table(HOSTILE, HOSTILE)
        table.add_column("a")
        table.add_row(plain(HOSTILE))
        shown.print(table)
        shown.print(key_table([("key", HOSTILE)]))
        say(shown, HOSTILE)
        print_columns(shown, HOSTILE, [Column("a", [HOSTILE]), Column("b", ["c"])], caption=HOSTILE)
        seen = text(shown)
        assert not {"\x1b", "\x07", "\u202e"} & set(seen)
        if width == 200:
            assert seen.count(r"[bold]a[/] :dog: \x1b[31mred\x07 \u202eback [/x] \[i]") == 8


def test_commands_are_quoted_and_never_broken() -> None:
    words = ["python", "-m", "haq.evaluate", "a run; rm -rf ~", "it's"]
    assert shlex.split(command_line(*words)) == words
    shown = console(20)
    say_next(shown, *words)
    assert text(shown) == f"Next: {command_line(*words)}\n"


def test_what_is_said_of_a_command_is_not_copied_with_it() -> None:
    shown = console(20)
    say_next(shown, "python", "-m", "haq.report", "a b", hint=" (with this run or another)")
    assert text(shown) == "Next (with this run or another): python -m haq.report 'a b'\n"


NAMES = [
    "x[/b]",
    "[red]m[/]",
    "p q/r n",
    "a;b&c|d",
    "it's",
    'a "b"',
    "$HOME `id` $(id) !1 ~ * ?",
    "n" * 3000,
    "#x",
    "a=b",
    "日本",
]
STEERING = ["a\nb", "\x1b[31mred", "\u202eback", "a\u00a0b", "tab\tend\\", "it's\r\x07", "\udcff"]


@pytest.mark.parametrize("name", [*NAMES, *STEERING, "-rf", "--out"])
def test_a_shell_reads_back_any_name(name: str) -> None:
    shown = console(40)
    say_next(shown, "printf", r"%s\0", Path(name))
    line = text(shown).removeprefix("Next: ")
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    read = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert os.path.normpath(os.fsdecode(read[:-1])) == name
    if name in NAMES:
        assert shlex.split(line)[2] == name
    assert not read.startswith(b"-")


def test_a_sentence_is_one_line_whatever_name_it_has() -> None:
    shown = console(40)
    say(shown, f"\nKept in {Path('a') / STEERING[0]} {NAMES[0]} {NAMES[1]} :dog:", wrap=False)
    assert text(shown) == f"\nKept in a/a\\nb {NAMES[0]} {NAMES[1]} :dog:\n"
