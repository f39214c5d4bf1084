"""How commands end: an exit status, and one sentence on stderr for what the user can mend."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from hw_models.registry import printable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # whoever reads the output, such as `head`, has had enough


def run_command(main: Callable[[], int]) -> int:
    """Run a command, and turn what it raises into a sentence and an exit status.

    Bad input ends it with `error: ...` on stderr and status 2. If $HAQ_DEBUG is set, its traceback is shown instead.

    Args:
        main: The command; returns its exit status.

    Returns:
        The status that the process should end with.
    """
    if sys.stdout is None:
        # A file that the command opens would be taken for its output.
        print("error: the output is closed (>&-); send it to a file, or to /dev/null", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError as error:
        # Each of them is looked at: Python writes what is left to both of them at its end.
        are_read = [_is_read(stream) for stream in (sys.stdout, sys.stderr)]
        if all(are_read):
            return _fail(error)
        return EXIT_UNREAD
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(error: Exception) -> int:
    """Say what went wrong; the error itself is raised if somebody wants to see where."""
    if os.environ.get("HAQ_DEBUG"):
        raise error
    # A name from somebody's folder may hold what breaks a line or steers a terminal.
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _is_read(stream: TextIO | None) -> bool:
    """Whether a stream takes what is written. One that doesn't is closed, so that Python doesn't try again at its end."""
    if stream is None:
        return True
    try:
        stream.flush()
        if _has_reader(stream):
            return True
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False


def _has_reader(stream: TextIO) -> bool:
    """Whether somebody holds the other end of a stream; what is no pipe is taken for read, as is all where none can ask."""
    if not hasattr(select, "poll"):
        return True
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
