"""Widths have one order and one spelling, and what is none is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hw_models import widths
from hw_models.widths import FLOAT, WIDTHS, at_places, pair_words, place_of, places, read_pair, read_widths, width_words


def test_places_are_in_the_order_of_widths() -> None:
    assert [place_of(width) for width in WIDTHS] == list(range(10))
    assert places(np.array([[8, 16], [FLOAT, 1]])).tolist() == [[7, 8], [9, 0]]
    assert at_places(places(np.array(WIDTHS))).tolist() == list(WIDTHS)
    assert place_of(None) == place_of("float") == 9
    assert place_of(np.int64(4)) == 3


@pytest.mark.parametrize("wrong", [0, 9, 15, 17, 33, -1, 8.0, True, "08", "nine", "", [8], "²"])
def test_what_is_no_width_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match="1 to 8, 16 or float"):
        width_words(wrong)


@pytest.mark.parametrize("wrong", [[0], [9], [-1], [33], [2**40]])
def test_integers_that_are_no_widths_are_named(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=f"not {wrong[0]}$"):
        places(wrong)
    with pytest.raises(ValueError, match="must be integers"):
        places([8.0])


def test_pairs_are_read_as_they_are_written() -> None:
    for w in WIDTHS:
        for a in WIDTHS:
            assert read_pair(pair_words(w, a)) == (w, a)
            assert read_pair(f"w{width_words(w)}a{width_words(a)}") == (w, a)
    assert read_pair("float") == (FLOAT, FLOAT)
    assert read_pair(["float", 8]) == read_pair((None, 8)) == (FLOAT, 8)
    for wrong in ("8", "8/9", "w8", "8/8/8", "a8w8", "", "w8a9", None, 8):
        with pytest.raises(ValueError, match="width"):
            read_pair(wrong)


def test_sets_of_widths() -> None:
    assert read_widths("2:8,16,float") == (2, 3, 4, 5, 6, 7, 8, 16, FLOAT)
    assert read_widths([4, 8]) == (4, 8)
    assert read_widths("8,4,4") == (4, 8)
    assert read_widths("8:float") == (8, 16, FLOAT)
    assert read_widths(8) == (8,)
    for wrong in ("8:2", "", "2-8", "2:9", [], "4,,8"):
        with pytest.raises(ValueError, match="width|empty"):
            read_widths(wrong)
    assert widths.PLACES == 10
