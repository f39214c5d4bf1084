"""Amounts, bytes and shares are written in one way everywhere."""

from __future__ import annotations

import math

import pytest

from haq.store.units import (
    DOWN,
    UNITS,
    UP,
    begin,
    best_unit,
    describe_amount,
    describe_bytes,
    heading_of,
    held_against,
    kind_of_cost,
    metric_words,
    percent,
    plotted,
    show,
    show_difference,
)
from hw_models.metrics import METRICS
from hw_models.metrics import UNITS as BASE_UNITS


@pytest.mark.parametrize(
    ("amount", "metric", "words"),
    [
        (1.2344e-3, "latency", "1.234 ms"),
        (45.7e-6, "latency", "45.7 us"),
        (2.0, "energy", "2 J"),
        (3e-9, "energy", "0.003 uJ"),
        (45_600.0, "storage", "45.6 kB"),
        (0.0, "storage", "0 B"),
        (199.2e6, "bops", "199.2 Mbops"),
        (3.5e12, "bops", "3.5 Tbops"),
        (4.125, "average_weight_bits", "4.125 bits"),
        (256e3, "peak_memory", "256 kB"),
        (1.5e6, "memory_traffic", "1.5 MB"),
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


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.925, "%", "92.50 %"),
        (28.4123, "dB", "28.41 dB"),
        (0.0123, "", "0.0123"),
        (-0.25, "nats", "-0.25 nats"),
        (12_345.6, "", "12,346"),
        (1.2e-7, "nats", "1.2e-07 nats"),
        (-math.inf, "dB", "-∞ dB"),
        (math.inf, "%", "∞ %"),
        (math.nan, "dB", "–"),
        (None, "dB", "–"),
    ],
)
def test_values_of_objectives(value: float | None, unit: str, words: str) -> None:
    assert show(value, unit) == words


@pytest.mark.parametrize(
    ("value", "other", "unit", "higher", "words"),
    [
        (0.918, 0.925, "%", True, "0.70 points below"),
        (0.925, 0.918, "%", True, "0.70 points above"),
        (0.925, 0.92500001, "%", True, "as good as"),
        (27.6, 28.4, "dB", True, "0.8 dB below"),
        (0.42, 0.3, "nats", False, "0.12 nats worse than"),
        (0.3, 0.42, "nats", False, "0.12 nats better than"),
        (0.02, 0.03, "", False, "0.01 better than"),
        (0.08, 0.05, "%", False, "3.00 points worse than"),
        (1.0, 1.0 + 1e-9, "dB", True, "as good as"),
        (-math.inf, 28.4, "dB", True, "∞ dB below"),
    ],
)
def test_one_value_held_against_another(value: float, other: float, unit: str, higher: bool, words: str) -> None:
    assert held_against(value, other, unit, higher) == words
    better_by = value - other
    if abs(better_by) > 1e-6:
        assert show_difference(better_by if higher else -better_by, unit, higher) == words


def test_shares_are_drawn_in_percent_and_other_values_as_they_are() -> None:
    assert plotted(0.5, "%") == 50.0
    assert plotted(0.5, "dB") == 0.5


def test_an_objective_at_the_beginning_of_a_sentence_keeps_its_name() -> None:
    titles = ["accuracy", "worst-case accuracy", "mIoU", "PSNR", "my_loss", ""]
    assert [begin(title) for title in titles] == ["Accuracy", "Worst-case accuracy", "mIoU", "PSNR", "my_loss", ""]


def test_every_metric_of_hardware_has_units_and_words() -> None:
    assert tuple(UNITS) == METRICS
    for metric, units in UNITS.items():
        assert [name for name, size in units.items() if size == 1] == [BASE_UNITS[metric]]
    words = {metric: metric_words(metric) for metric in METRICS}
    assert words["peak_memory"] == "peak memory"
    # What an amount is of isn't its unit: 4 bits of average weight width.
    assert not any(set(words[metric].split()) & set(UNITS[metric]) for metric in METRICS)
    assert heading_of("average_weight_bits", "(counted)") == "average weight\nwidth\n(counted)"
    assert heading_of("latency", "ms") == "\nlatency\nms"


def test_what_is_counted_is_neither_estimated_nor_measured() -> None:
    kinds = {metric: kind_of_cost(metric, "measured on a desk") for metric in METRICS}
    assert [metric for metric, kind in kinds.items() if kind == "measured"] == ["latency", "energy"]
    assert set(kinds.values()) == {"measured", "counted"}
