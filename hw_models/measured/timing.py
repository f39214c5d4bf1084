"""A time that was measured, and who is told of measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Progress = Callable[[int, int, str], None]  # done, total, what is worked on
Say = Callable[[str], None]


class Timing(NamedTuple):
    """Seconds of one call: median and interquartile range of the rounds; not `trusted` if the machine was busy meanwhile."""

    median_s: float
    spread_s: float
    repeats: int
    trusted: bool = True
