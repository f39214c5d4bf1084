"""Fetch a data set and show its splits:  python -m haq.data NAME"""

from __future__ import annotations

import sys

from haq.console.cli import run_command
from haq.data import DATASETS, fetch, load


def main() -> int:
    """Fetch the named data set if it is missing, and describe its splits."""
    if len(sys.argv) != 2:
        raise ValueError(f"usage: python -m haq.data NAME, with NAME one of {', '.join(DATASETS)}")
    fetch(sys.argv[1])
    print(load(sys.argv[1]).describe())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
