"""Amounts, bytes and shares are written in one way everywhere."""

from __future__ import annotations

import pytest

from haq.store.units import DOWN, UP, best_unit, describe_amount, describe_bytes, percent


@pytest.mark.parametrize(
    ("amount", "metric", "words"),
    [
        (1.2344e-3, "latency", "1.234 ms"),
        (45.7e-6, "latency", "45.7 us"),
        (2.0, "energy", "2 J"),
        (3e-9, "energy", "0.003 uJ"),
        (45_600.0, "storage", "45.6 kB"),
        (0.0, "storage", "0 B"),
    ],
)
def test_amounts_have_the_unit_that_reads_best(amount: float, metric: str, words: str) -> None:
    assert describe_amount(amount, metric) == words


def test_bounds_are_rounded_to_their_side() -> None:
    assert describe_amount(1.67761e-3, "latency", UP) == "1.678 ms"
    assert describe_amount(1.67761e-3, "latency", DOWN) == "1.677 ms"
    assert describe_amount(45_600.0, "storage", UP) == describe_amount(45_600.0, "storage", DOWN) == "45.6 kB"
    assert describe_amount(999.96e-6, "latency", UP) == "1000 us"
    assert describe_amount(0.0, "storage", UP) == "0 B"


def test_of_binary_units_only_those_that_are_asked_for() -> None:
    assert best_unit(2048.0, "storage") == ("kB", 1000.0)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (65_536, "65.5 kB"),
        (999_600, "1 MB"),
        (32 * 1024**2, "33.6 MB"),
        (10**10, "10 GB"),
        (5 * 10**15, "5e+03 TB"),
    ],
)
def test_bytes(count: int, words: str) -> None:
    assert describe_bytes(count) == words


def test_shares() -> None:
    assert percent(0.925) == "92.50 %"
    assert percent(0.925, 1) == "92.5 %"
    assert percent(None) == "–"
