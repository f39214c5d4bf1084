"""How much memory samples may take."""

from __future__ import annotations

import os
import re
from pathlib import Path

UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SHARE = 4  # samples may take a quarter of the machine's memory, if nobody says otherwise
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def parse_bytes(text: object, option: str = "--memory") -> int:
    """Turn an amount of memory such as "4GB" or "500MB" into bytes.

    Raises ValueError, naming the option and the units, for anything else, and for nothing at all.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-zA-Z]+)\s*", str(text))
    amount = 0
    if match and match[2] in UNITS:
        amount = int(float(match[1]) * UNITS[match[2]])
    if amount < 1:
        raise ValueError(f"{option} {text!r} is not understood: give an amount such as 4GB or 500MB, in {', '.join(UNITS)}")
    return amount


def default_bytes() -> int:
    """Return a quarter of the memory that this machine, or the container that this runs in, has."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUPS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            whole = min(whole, int(limit))
    return whole // SHARE


def allowed_bytes(memory: str | int | None, option: str = "--memory") -> int:
    """Return how much memory samples may take.

    Args:
        memory: An amount such as "4GB", or bytes; None: the default.
        option: What it was given as, for the message.

    Returns:
        Bytes.

    Raises:
        ValueError: As `parse_bytes` does.
    """
    if memory is None:
        return default_bytes()
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    return parse_bytes(memory, option)


def show_bytes(amount: float) -> str:
    """Write an amount of memory or of disk: "1.2 GB"."""
    for unit in ("TB", "GB", "MB", "kB"):
        if amount >= UNITS[unit]:
            return f"{amount / UNITS[unit]:.3g} {unit}"
    return f"{amount:.0f} B"
