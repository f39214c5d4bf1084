"""How tall a bar of bits is: 1 to 8 as they are, 16 bits and float a step above each, so that they don't press the rest."""

from __future__ import annotations

from collections.abc import Iterable

from hw_models.storage import BITS
from hw_models.widths import FLOAT, width_words

STEPS = {16: BITS + 2, FLOAT: BITS + 4}
TICKS = (4, 8, 16, FLOAT)
NOT_TO_SCALE = "16 bits and float are drawn a step above 8 bits each, not to scale."


def height_of(width: int) -> int:
    """Return how tall the bar of a width is; float is 32."""
    return STEPS.get(width, width)


def top_of(widths: Iterable[int]) -> int:
    """Return how tall the tallest bar of some widths can be: that of 8 bits, unless there are wider ones."""
    return max([BITS, *map(height_of, widths)])


def ticks_of(widths: Iterable[int]) -> dict[int, str]:
    """List where an axis of bits is marked on one side of its zero, with the words there."""
    top = top_of(widths)
    return {height_of(width): width_words(width) for width in TICKS if height_of(width) <= top}
