"""What options and arguments take: text, numbers, words of a list, paths."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Names = Callable[[], Iterable[str]]


class TextType(click.ParamType):
    """Text as it is. Another option in its place is taken for what it is: a value that was forgotten."""

    name = "text"

    def __init__(self, names: Names | None = None) -> None:
        """Complete values to some names, if there are any; whoever types one that is code may have it imported."""
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text itself."""
        if ctx is not None and value in option_strings(ctx.command):
            self.fail(f"{name_of(param)} needs a value, and the option {value} follows it", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """List the names that begin with what was typed."""
        if self.names is None:
            return []
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


class NumberType(click.ParamType):
    """A number, whole or not."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        """Take whole numbers (int) or all (float)."""
        self.kind = kind
        self.name, self.wanted = "number", "a number"
        if kind is int:
            self.name, self.wanted = "n", "an integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the number."""
        try:
            return self.kind(value)
        except ValueError:
            self.fail(f"{name_of(param)} is {value!r}; it must be {self.wanted}", param, ctx)


class ChoiceType(TextType):
    """One of some words."""

    name = "choice"

    def __init__(self, choices: Sequence[str]) -> None:
        """Take these words and no other."""
        super().__init__(lambda: choices)
        self.choices = tuple(choices)
        self.written = "|".join(choices)  # in a help, in place of the value

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word itself."""
        if value not in self.choices:
            known = ", ".join(self.choices)
            self.fail(f"{name_of(param)} is {value!r}{did_you_mean(value, self.choices)} Known: {known}", param, ctx)
        return value


class PathType(TextType):
    """A path, whether there is something or not."""

    def __init__(self, folders: bool) -> None:
        """Complete to folders only, or to files too."""
        super().__init__()
        self.name = "file"
        self.kind = "file"  # as a shell's completion calls it
        if folders:
            self.name = "folder"
            self.kind = "dir"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Make a path of the text."""
        return Path(super().convert(value, param, ctx))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell do it."""
        return [CompletionItem(incomplete, type=self.kind)]


TEXT = TextType()
INTEGER = NumberType(int)
NUMBER = NumberType(float)
FOLDER = PathType(folders=True)
FILE = PathType(folders=False)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End a sentence on an unknown word: with the words that are close, or with a full stop."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    if not close:
        return "."
    return f"; did you mean {' or '.join(close)}?"


def option_strings(cli: click.Command) -> list[str]:
    """List the options of a command, as they are written."""
    return [word for param in cli.params if isinstance(param, click.Option) for word in param.opts]


def name_of(param: click.Parameter | None) -> str:
    """Name an option as it is written, or an argument in capitals."""
    if param is None:
        return "a value"
    if isinstance(param, click.Option):
        return max(param.opts, key=lambda word: word.startswith("--"))
    return param.human_readable_name.upper()
