"""Where a command prints: results on stdout, everything else beside it, as much of it as the user wants to see."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole

logger = logging.getLogger("haq")


class Verbosity:
    """How much a command prints: set by -q and -v, for the time of one call."""

    def __init__(self) -> None:
        """Begin with what is usual: results, what leads to them, and warnings."""
        self.level = 0
        self._handler: logging.Handler | None = None
        self._before = logging.NOTSET

    @property
    def is_quiet(self) -> bool:
        """Whether only results, warnings and errors are shown."""
        return self.level < 0

    def set(self, level: int) -> None:
        """Show less (-1), the usual (0), single steps too (1) or everything that is logged (2 and more)."""
        self.level = level
        if level > 0 and self._handler is None:
            self._before = logger.level
            self._handler = logging.StreamHandler(sys.stderr)
            self._handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(self._handler)
            # The libraries that are used log through the root logger, which shows nothing of ours twice.
            logger.propagate = False
        if level > 0:
            logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)

    def reset(self) -> None:
        """Take back what `set` did."""
        self.level = 0
        if self._handler is not None:
            logger.removeHandler(self._handler)
            logger.setLevel(self._before)
            logger.propagate = True
            self._handler = None


VERBOSITY = Verbosity()


class Console(RichConsole):
    """A console whose reader may go: `haq.console.errors.run_command` then ends the command."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled; Rich itself ends the process with status 1."""
        raise


@dataclass(frozen=True)
class Output:
    """Two consoles: `results` for what was asked for, `notes` for plans, progress and hints, which -q leaves out."""

    results: Console
    notes: Console
    as_json: bool = False

    @classmethod
    def open(cls, as_json: bool = False, width: int | None = None) -> Output:
        """Open the consoles of a command.

        Args:
            as_json: Whether stdout is for JSON alone; everything else then goes to stderr.
            width: Of lines of results that go to a file or a pipe, unless $COLUMNS says one; None for the usual 80.

        Returns:
            The two consoles.
        """
        results = Console(stderr=as_json)
        if width is not None and not results.is_terminal and "COLUMNS" not in os.environ:
            results = Console(stderr=as_json, width=width)
        notes = Console(stderr=as_json, quiet=VERBOSITY.is_quiet)
        return cls(results, notes, as_json)

    def print_json(self, content: Any) -> None:
        """Print plain data on stdout, if that was asked for."""
        if self.as_json:
            print(json.dumps(content, indent=2))
