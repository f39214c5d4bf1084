"""The widths that operands can have, and how they are written: 1 to 8 bits, 16 bits, or float.

In arrays of integers float stands as 32, the bits that a float32 takes. A table by width has a place for each of them, in the
order of WIDTHS.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT = 32
FLOAT_WORD = "float"
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, FLOAT)
PLACES = len(WIDTHS)
ACCEPTED = "1 to 8, 16 or float"
NO_PLACE = -1

_OF_WIDTH = np.full(FLOAT + 1, NO_PLACE)
_OF_WIDTH[list(WIDTHS)] = np.arange(PLACES)
_ARRAY = np.array(WIDTHS)
_WRITTEN = tuple(str(width) for width in WIDTHS)
_OPERAND = r"(?:[0-9]{1,2}|float)"
_PAIR = re.compile(rf"(?:w(?P<w>{_OPERAND})a(?P<a>{_OPERAND})|(?P<w2>{_OPERAND})/(?P<a2>{_OPERAND}))")


def width_of(width: Any) -> int:
    """Return a width as an integer, float as 32.

    Args:
        width: 1 to 8, 16, 32, None, or a text: "8", "float".

    Raises:
        ValueError: For anything else, naming it and what is accepted.
    """
    if width is None or (isinstance(width, str) and width == FLOAT_WORD):
        return FLOAT
    number = NO_PLACE
    if isinstance(width, str) and width in _WRITTEN:
        number = int(width)
    elif not isinstance(width, bool | str):
        try:
            number = operator.index(width)
        except TypeError:
            number = NO_PLACE
    if number not in WIDTHS:
        raise ValueError(f"a width must be {ACCEPTED}, not {str(width)[:40]!r}")
    return number


def place_of(width: Any) -> int:
    """Return where a width stands in a table: 0 for 1 bit, 8 for 16 bits, 9 for float. Raises what `width_of` does."""
    return int(_OF_WIDTH[width_of(width)])


def places(widths: Any) -> NDArray[np.intp]:
    """Return where widths stand in a table, for integers of any shape.

    Raises:
        ValueError: For anything but integers of WIDTHS, naming the first that isn't.
    """
    array = np.asarray(widths)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"widths must be integers, float being {FLOAT}, not {array.dtype}")
    inside = (array >= 0) & (array <= FLOAT)
    found: NDArray[np.intp] = _OF_WIDTH[np.where(inside, array, 0)]
    if (found == NO_PLACE).any():
        wrong = array[found == NO_PLACE].reshape(-1)[0]
        raise ValueError(f"a width must be {ACCEPTED} ({FLOAT} in integers), not {wrong}")
    return found


def at_places(indices: Any) -> NDArray[np.int64]:
    """Return the widths at places of a table, integers of the same shape."""
    found: NDArray[np.int64] = _ARRAY[np.asarray(indices)]
    return found


def width_words(width: Any) -> str:
    """Write a width: "8", "16", "float"."""
    number = width_of(width)
    if number == FLOAT:
        return FLOAT_WORD
    return str(number)


def pair_words(w: Any, a: Any) -> str:
    """Write the widths of weights and activations: "8/16", "4/float", and "float" where both are."""
    words = width_words(w), width_words(a)
    if words == (FLOAT_WORD, FLOAT_WORD):
        return FLOAT_WORD
    return "/".join(words)


def read_pair(text: Any) -> tuple[int, int]:
    """Read the widths of weights and activations, float being 32.

    Args:
        text: "w8a16" or "8/16"; "float" for both; or a list of two widths.

    Returns:
        The two widths.

    Raises:
        ValueError: For anything else, naming it and what is accepted.
    """
    if isinstance(text, list | tuple) and len(text) == 2:
        return width_of(text[0]), width_of(text[1])
    if isinstance(text, str) and text == FLOAT_WORD:
        return FLOAT, FLOAT
    match = None
    if isinstance(text, str):
        match = _PAIR.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{str(text)[:40]!r} is no pair of widths; write w8a16, 8/16, 4/float or float")
    return width_of(match["w"] or match["w2"]), width_of(match["a"] or match["a2"])


def read_widths(text: Any) -> tuple[int, ...]:
    """Read a set of widths, float being 32.

    Args:
        text: "2:8", "4,8,16", "2:8,float", or a list of widths.

    Returns:
        The widths, smallest first.

    Raises:
        ValueError: For anything else, naming it and what is accepted.
    """
    parts: Iterable[Any]
    if isinstance(text, str):
        parts = [part.strip() for part in text.split(",")]
    elif isinstance(text, list | tuple | set | frozenset):
        parts = text
    else:
        parts = [text]
    found: set[int] = set()
    for part in parts:
        found |= _span(part)
    if not found:
        raise ValueError("a set of widths can't be empty: give some, such as 4,8")
    return tuple(sorted(found))


def _span(part: Any) -> set[int]:
    """Read one width, or a span of them such as 2:8."""
    if not isinstance(part, str) or ":" not in part:
        return {width_of(part)}
    first, _, last = part.partition(":")
    low, high = width_of(first), width_of(last)
    if low > high:
        raise ValueError(f"{part[:40]!r} is no span of widths: the smaller stands first, such as 2:8")
    return {width for width in WIDTHS if low <= width <= high}
