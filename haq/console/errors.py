"""How commands end: an exit status, and one sentence on stderr for what the user can mend."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from hw_models.registry import printable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
LONGEST = 200  # characters of a file's name in a message
REASONS = {
    errno.EACCES: "you lack the permission",
    errno.EPERM: "you lack the permission",
    errno.EROFS: "its file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your part of the disk is full",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder, where a file is expected",
    errno.EEXIST: "it is a file, where a folder is expected",
    errno.ENOENT: "there is no such file or folder",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "too many files are open",
}
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
EXIT_UNREAD = 141  # whoever reads the output, such as `head`, has had enough


def run_command(main: Callable[[], int]) -> int:
    """Run a command, and turn what it raises into a sentence and an exit status.

    Bad input ends it with `error: ...` on stderr and status 2. If $HAQ_DEBUG is set, its traceback is shown instead.

    Args:
        main: The command; returns its exit status.

    Returns:
        The status that the process should end with.
    """
    _open_all()
    if sys.stdout is None:
        _tell("error: the output is closed (>&-); send it to a file, or to /dev/null")
        return EXIT_BAD_INPUT
    try:
        status = main()
        sys.stdout.flush()
        if status == EXIT_INTERRUPTED:
            _end_at_once()
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
        _end_at_once()
        _tell("interrupted")
        return EXIT_INTERRUPTED


def _open_all() -> None:
    """Open what is closed of input, output and errors: a file that a command opens would be taken for it."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _end_at_once() -> None:
    """Let another Ctrl-C end this process without a word: what it had to say is said."""
    with suppress(ValueError):  # in another thread than the first
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _tell(sentence: str) -> None:
    """Print a sentence on stderr, if that takes it."""
    if sys.stderr is not None:  # print would take stdout in its place
        with suppress(OSError):
            print(sentence, file=sys.stderr)
        _flush(sys.stderr)


def _fail(error: Exception) -> int:
    """Say what went wrong; the error itself is raised if somebody wants to see where."""
    if os.environ.get("HAQ_DEBUG"):
        raise error
    if isinstance(error, OSError):
        _flush(sys.stdout)
    # A name from somebody's folder may hold what breaks a line or steers a terminal.
    _tell(f"error: {printable(_sentence(error))}")
    return EXIT_BAD_INPUT


def _sentence(error: Exception) -> str:
    """Say what went wrong; what the system says of a file is put into a sentence."""
    if not isinstance(error, OSError) or error.strerror is None or type(error).__str__ is not OSError.__str__:
        return str(error)
    reason = REASONS.get(error.errno or 0, error.strerror)
    if error.filename is None:
        if error.errno in WRITING:
            return f"the output or a file can't be written: {reason}"
        return str(error)
    name = str(error.filename)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}..."
    return f"{name} can't be used: {reason}"


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


def _flush(stream: TextIO | None) -> None:
    """Write out what a stream holds. What it doesn't take is lost, and not tried again at Python's end."""
    if stream is not None:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
