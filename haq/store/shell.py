"""Commands as users are shown them: a shell reads the words back as they are, whatever names there are in them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any


def command_line(*words: Any) -> str:
    """Write a command such that a shell reads the words back as they are, on one line that doesn't steer a terminal."""
    return " ".join(_word(word) for word in words)


def _word(word: Any) -> str:
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"  # otherwise it would be taken for an option
    if text.isprintable():
        return shlex.quote(text)
    # Only this form of quotes can write what isn't to be printed.
    parts = [_escaped(char) for char in text]
    return f"$'{''.join(parts)}'"


def _escaped(char: str) -> str:
    """Write a character between $' and '."""
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable():
        return char
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
