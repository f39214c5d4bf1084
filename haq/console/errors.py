"""How commands end: an exit status, and one sentence on stderr for what the user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hw_models.registry import printable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[], int]) -> int:
    """Run a command, and turn what it raises into a sentence and an exit status.

    Bad input ends it with `error: ...` on stderr and status 2. If $HAQ_DEBUG is set, its traceback is shown instead.

    Args:
        main: The command; returns its exit status.

    Returns:
        The status that the process should end with.
    """
    try:
        return main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("HAQ_DEBUG"):
            raise
        # A name from somebody's folder may hold what breaks a line or steers a terminal.
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
