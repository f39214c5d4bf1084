"""The pages of the reference hold every command and option, every name that users call, and every key of a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from haq.__main__ import MODULES, cli
from haq.console.options import Argument
from haq.store import records
from hw_models.target import HARDWARE_MODELS, target_names

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages() -> Any:
    """The module that writes the pages."""
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def commands(pages: Any) -> str:
    return str(pages.commands())


def all_commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Go through a command and those in it."""
    context = click.Context(command, **command.context_settings)
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from all_commands(found, (*path, name))


def test_every_command_has_a_chapter(commands: str) -> None:
    found = [path for path, _ in all_commands(cli, ("haq",))]
    assert {path[1] for path in found if len(path) > 1} == {*MODULES, "completion"}
    for path in found:
        assert re.search(rf"^#+ {' '.join(path)}( {{ #{'-'.join(path)} }})?$", commands, re.MULTILINE), path


def test_every_option_has_a_row(commands: str) -> None:
    rows = [line for line in commands.splitlines() if line.startswith("| <span")]
    count = 0
    for path, command in all_commands(cli, ("haq",)):
        for param in command.get_params(click.Context(command, **command.context_settings)):
            if isinstance(param, click.Option) and param.hidden:
                continue
            count += 1
            word = str(param.name)
            if isinstance(param, click.Option):
                word = max(param.opts, key=lambda one: one.startswith("--")).lstrip("-")
            (row,) = [row for row in rows if f'id="{"-".join([*path, word])}"' in row]
            if isinstance(param, Argument):
                assert f"`{param.human_readable_name.upper()}`" in row
            else:
                assert all(f"`{written}`" in row for written in (*param.opts, *param.secondary_opts)), row
    assert count == len(rows) > 100


def test_tables_are_tables(commands: str, pages: Any) -> None:
    for text in (commands, pages.target_keys(), pages.record_keys(), pages.faces_table()):
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("|") and not lines[number - 1].startswith("|"):
                assert set(lines[number + 1]) == {"|", "-"}, line


def test_a_name_that_is_forgotten_is_seen(pages: Any) -> None:
    for face in pages.FACES:
        offered = getattr(importlib.import_module(face), "__all__", None)
        if offered is None:
            continue
        module = importlib.import_module(face)
        names = [name for name in offered if not inspect.ismodule(getattr(module, name)) and not name.startswith("_")]
        listed = pages.public_names(face)
        assert set(names) == set(listed), face
        for name in listed:
            assert pages.find(face, name).about, f"nothing is said of {face}.{name}"


def test_every_key_of_a_file_has_a_row(pages: Any) -> None:
    text = pages.record_keys()
    for name, kind in vars(records).items():
        if inspect.isclass(kind) and issubclass(kind, records.Record) and kind.__module__ == records.__name__:
            part = text.partition(f"{{ #{name.lower()} }}")[2].partition("\n### ")[0]
            for field in vars(kind).get("__annotations__", {}):
                if field in kind.model_fields:
                    assert f"| `{kind.model_fields[field].alias or field}` |" in part, f"{name}.{field}"


def test_every_key_of_hardware_says_what_it_is(pages: Any) -> None:
    text = pages.target_keys()
    assert not re.findall(r"^\| `\w+` \|.*\|  \|$", text, re.MULTILINE)
    for kind in HARDWARE_MODELS:
        assert f"`model: {kind}`" in text
    assert target_names()


def test_marks_of_pages_are_filled(pages: Any) -> None:
    for page in sorted((DOCS / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert set(pages.MARK.findall(text)) <= set(pages.GENERATED), page.name
    filled = pages.filled((DOCS / "reference" / "files.md").read_text(encoding="utf-8"))
    assert "[[" not in filled
    assert "`haq-run-2`" in filled
