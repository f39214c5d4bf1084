"""Whose code is imported: only what somebody who runs this has named, never what a file names.

A name `module:Name` is code. On a command line it is typed by whoever runs the command, in Python it is handed to a function;
both are remembered here for as long as the process lives. A file (the configuration of a run, the header of a checkpoint) may
come from anybody: code that it names is imported only if that very name is remembered.

    trust("mine:network")                   # --trust mine:network
    check("mine:network", "run/config.yaml names network")   # from a file: ValueError unless it was named

Names of the registries are no code of this kind: ours, and those of packages that were installed to be found by them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 100  # characters of a name in a message

_named: set[str] = set()
_commands = 0  # that are being carried out


class UntrustedError(ValueError):
    """A file names code that nobody has named who runs this."""


def trust(*names: str) -> None:
    """Remember names, each `module:Name`, as given by whoever runs this process."""
    _named.update(names)


def named() -> tuple[str, ...]:
    """List what was named so far, for a process that is to go on with the same rights."""
    return tuple(sorted(_named))


def names_in(text: str) -> list[str]:
    """List the parts of an option's value that may be names: of NAME,NAME and NAME,LAYER=NAME each, of NAME@PATH the name.

    Of NAME(ARGUMENT=VALUE) it is the name, too.
    """
    return [part.partition("@")[0].partition("(")[0].rpartition("=")[2].strip() for part in text.split(",")]


def check(name: str, source: str, remedy: str = "") -> None:
    """Raise an error for code that only a file names.

    Args:
        name: The code, `module:Name`.
        source: Which file names it and as what, to begin the sentence: "run/config.yaml names network".
        remedy: What can be done but --trust, to end the sentence.

    Raises:
        UntrustedError: If nobody has named it who runs this.
        ValueError: For code of Python itself, which is never what is meant.
    """
    shown = name
    if len(name) > LONGEST:
        shown = f"{name[:LONGEST]}..."
    never = "and code is never called because a file says so"
    if of_python_itself(name):
        raise ValueError(f"{source} {shown}, which is of Python itself, {never}")
    if name not in _named:
        raise UntrustedError(f"{source} {shown}, {never}: add --trust {shown} if you trust it{remedy}")


def allow(name: str, kind: str) -> None:
    """Let somebody who calls a function of Python name code; within a command, only what was typed is code to import.

    Args:
        name: The code, `module:Name`.
        kind: What it is for, in the singular, for the message: "network".

    Raises:
        UntrustedError: Within a command, for what wasn't typed.
    """
    if _commands:
        check(name, f"a file names {kind}")
    trust(name)


def of_python_itself(name: str) -> bool:
    """Say whether the module of a name is one of Python's own, in which nothing of ours can be."""
    return name.partition(":")[0].partition(".")[0] in sys.stdlib_module_names


def trust_words(names: Iterable[str]) -> list[str]:
    """Write the options that let a command on some file import what it names, word by word.

    Code that nobody has named yet is left out: a command to be pasted is no place to learn of it.
    """
    return trust_options(name for name in names if name in _named)


def trust_options(names: Iterable[str]) -> list[str]:
    """Write --trust for each name, word by word, whether it was named before or not."""
    return [word for name in dict.fromkeys(names) for word in ("--trust", name)]


def may_be_trusted(name: str) -> bool:
    """Say whether code was not named yet, and would be taken if it were."""
    return name not in _named and len(name) <= LONGEST and not of_python_itself(name)


@contextmanager
def command() -> Iterator[None]:
    """Within, code is imported only if it was typed, whichever way its name comes."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1
