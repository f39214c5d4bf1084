"""What this machine's processor is called, and which of its cores this process may run on."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INFORMATION = Path("/proc/cpuinfo")
# Instructions for sums of products of bytes: what Linux calls VNNI, with 512-bit registers and without.
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni"}


def processor_model() -> str:
    """Return what the processor calls itself."""
    name = platform.processor() or platform.machine()
    if found := _line("model name"):
        name = found
    return " ".join(name.split())


@contextmanager
def kept_processors() -> Iterator[None]:
    """Give the calling thread, in the end, back the cores that it may run on: TVM's pool of threads leaves it only one.

    Threads that are started later, such as PyTorch's, would have that one, too.
    """
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processor_features() -> str:
    """Return a fingerprint of the instructions that the processor has; empty where the system doesn't tell."""
    flags = _line("flags") or _line("Features")
    if not flags:
        return ""
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


def lacks_vnni() -> bool:
    """Say whether this is an x86 processor without VNNI: instructions that multiply bytes and add in 32 bits.

    Without them, runtimes add two products of bytes in 16 bits, which is too few for large ones. False where the system
    doesn't tell what its processor has.
    """
    flags = set(_line("flags").split())
    return "avx2" in flags and not flags & DOT_PRODUCTS


def _line(key: str) -> str:
    """Return what Linux says of the first processor; empty for what it doesn't."""
    if not INFORMATION.is_file():
        return ""
    found = re.search(rf"^{key}\s*:\s*(.+)$", INFORMATION.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if not found:
        return ""
    return found[1]
