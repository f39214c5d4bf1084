"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("haq", "envs", "hw_models", "quantizers")
LEAST = 15  # names that have an example, at least
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")) if ">>> " in file.read_text("utf-8")]


def name_of(file: Path) -> str:
    """Name the module of a file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [name_of(file) for file in FILES])
def test_examples_print_what_they_say(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert not failed
    assert tried


def test_there_are_examples() -> None:
    texts = [file.read_text("utf-8") for file in FILES]
    assert sum(text.count("Examples:\n") for text in texts) >= LEAST
