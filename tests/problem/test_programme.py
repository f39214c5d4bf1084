"""Several budgets at once are an integer programme whose answers are those of brute force."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haq.problem.decision import Decision
from haq.problem.peak import PeakOfDecisions
from haq.problem.programme import Programme
from haq.solvers import ilp
from hw_models.workload import Buffer

ROUNDING = 1 + 1e-9
WIDTHS = (2, 4, 8, 16, 32)


def decision(index: int, widths: list[int], prices: list[list[float]]) -> Any:
    pairs = np.array([[8, width] for width in widths])
    return SimpleNamespace(
        layers=(index,), pairs=pairs, prices=np.array(prices[0]), others=np.array(prices[1:]).reshape(-1, len(widths))
    )


@st.composite
def programmes(draw: st.DrawFn) -> tuple[list[Any], list[float], PeakOfDecisions | None]:
    """Up to four decisions of up to four options, up to three limits, and perhaps one of the peak."""
    count, limits = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    numbers = st.integers(1, 30).map(float)
    decisions = []
    for index in range(count):
        options = draw(st.integers(1, 4))
        widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=options, max_size=options))
        prices = [draw(st.lists(numbers, min_size=options, max_size=options)) for _ in range(limits)]
        decisions.append(decision(index, widths, prices))
    amounts = [float(draw(st.integers(5, 30 * count))) for _ in range(limits)]
    if draw(st.booleans()):
        return decisions, amounts, None
    buffers = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, 4))
        readers = draw(st.lists(st.integers(0, count - 1), max_size=count, unique=True))
        buffers.append(Buffer(draw(st.integers(1, 20)), first, first + draw(st.integers(0, 3)), tuple(readers)))
    workload: Any = SimpleNamespace(buffers=tuple(buffers))
    return (
        decisions,
        amounts,
        PeakOfDecisions.of(workload, decisions, draw(st.integers(1, 2)), float(draw(st.integers(5, 300)))),
    )


def every(decisions: list[Any]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(one.pairs)) for one in decisions)))


def totals(decisions: list[Any], options: tuple[int, ...]) -> np.ndarray:
    first = sum(one.prices[pick] for one, pick in zip(decisions, options, strict=True))
    others = sum(one.others[:, pick] for one, pick in zip(decisions, options, strict=True))
    return np.append(first, others)


def fitting(decisions: list[Any], limits: list[float], peak: PeakOfDecisions | None) -> list[tuple[int, ...]]:
    within = [one for one in every(decisions) if (totals(decisions, one) <= np.array(limits) * ROUNDING).all()]
    if peak is None:
        return within
    return [one for one in within if peak.amount(one) <= peak.limit]


@settings(max_examples=80)
@given(programmes(), st.integers(0, 2**32 - 1))
def test_the_best_is_that_of_brute_force(given_: tuple[list[Any], list[float], PeakOfDecisions | None], seed: int) -> None:
    decisions, limits, peak = given_
    programme = Programme(decisions, limits, peak)
    random = np.random.default_rng(seed)
    losses = [random.integers(0, 9, len(one.pairs)).astype(float) for one in decisions]
    possible = fitting(decisions, limits, peak)
    assert sorted(options for options in every(decisions) if programme.fits(options)) == possible
    start = tuple(int(random.integers(len(one.pairs))) for one in decisions)[: int(random.integers(len(decisions) + 1))]
    for before in ((), start):
        reached = [options for options in possible if options[: len(before)] == before]
        best = programme.best(losses, before)
        assert (best is None) == (not reached)
        assert (programme.feasible(before) is None) == (not reached)
        assert programme.completes(before) == bool(reached)
        if best is not None:
            assert tuple(best) in reached
            lost = [sum(loss[pick] for loss, pick in zip(losses, options, strict=True)) for options in reached]
            assert sum(loss[pick] for loss, pick in zip(losses, best, strict=True)) == pytest.approx(min(lost))


@settings(max_examples=60)
@given(programmes(), st.integers(0, 2**32 - 1))
def test_whatever_fits_keeps_each_surrogate_and_what_may_replace_an_option_is_told(
    given_: tuple[list[Any], list[float], PeakOfDecisions | None], seed: int
) -> None:
    decisions, limits, peak = given_
    programme = Programme(decisions, limits, peak)
    random = np.random.default_rng(seed)
    losses = [random.integers(0, 9, len(one.pairs)).astype(float) for one in decisions]
    rows = np.arange(len(decisions))
    surrogates = programme.surrogates(losses)
    for options in fitting(decisions, limits, peak):
        for prices, most in surrogates:
            assert prices[rows, options].sum() <= most * (1 + 1e-6)
    taken = [int(random.integers(len(one.pairs))) for one in decisions]
    for place, one in enumerate(decisions):
        instead = [(*taken[:place], option, *taken[place + 1 :]) for option in range(len(one.pairs))]
        fits = [programme.fits(options) for options in instead]
        assert programme.room(taken, place).tolist() == fits
        assert (programme.excess(taken, place) == 0).tolist() == fits


@settings(max_examples=60)
@given(programmes())
def test_the_least_of_each_and_who_conflicts_are_those_of_brute_force(
    given_: tuple[list[Any], list[float], PeakOfDecisions | None],
) -> None:
    decisions, limits, peak = given_
    programme = Programme(decisions, limits, peak)
    ceilings = [*limits]
    amounts = [[*totals(decisions, options)] for options in every(decisions)]
    if peak is not None:
        ceilings.append(peak.limit)
        for row, options in zip(amounts, every(decisions), strict=True):
            row.append(peak.amount(options))
    table = np.array(amounts)
    holds = table <= np.array(ceilings) * ROUNDING

    def least(limit: int, within: list[int]) -> float:
        return float(table[holds[:, within].all(1), limit].min(initial=np.inf))

    for limit in range(len(ceilings)):
        within = [other for other in range(len(ceilings)) if other != limit]
        assert programme.least(limit, within) == pytest.approx(least(limit, within))
    conflict = programme.conflict()
    assert (conflict is None) == bool(holds.all(1).any())
    if conflict is not None:
        assert not holds[:, conflict.limits].all(1).any()
        for size in range(len(conflict.limits)):
            for fewer in itertools.combinations(range(len(ceilings)), size):
                assert holds[:, fewer].all(1).any()
        for limit, amount in zip(conflict.limits, conflict.least, strict=True):
            assert amount == pytest.approx(least(limit, [other for other in conflict.limits if other != limit]))


def test_a_peak_is_that_of_the_workload() -> None:
    """Buffers that two layers read are held at the wider of the two, what no layer reads in float32."""
    buffers = (Buffer(10, 0, 1, (0, 1)), Buffer(7, 1, 2, (1,)), Buffer(3, 2, 4, ()))
    decisions = [decision(0, [2, 8], [[1.0, 1.0]]), decision(1, [4, 16], [[1.0, 1.0]])]
    peak = PeakOfDecisions.of(SimpleNamespace(buffers=buffers), decisions, 1, 30.0)  # type: ignore[arg-type]
    # At moment 1 the first two are held, at moment 2 the last two.
    assert peak.amount([0, 0]) == max(5 + 4, 4 + 12)
    assert peak.amount([1, 0]) == max(10 + 4, 4 + 12)
    assert peak.amount([0, 1]) == max(20 + 14, 14 + 12)


def test_the_programme_of_arrays_takes_further_limits() -> None:
    loss = [[4.0, 2.0, 0.0], [3.0, 1.0, 0.0]]
    cost = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    bytes_ = [[9.0, 5.0, 1.0], [9.0, 5.0, 1.0]]
    assert ilp.allocate(loss, cost, 4).tolist() == [2, 0]
    assert ilp.allocate(loss, cost, 4, also=[(bytes_, 10.0)]).tolist() == [2, 0]
    assert ilp.allocate(loss, cost, 4, also=[([[9.0, 5.0, 6.0], [9.0, 5.0, 1.0]], 10.0)]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="no choice costs at most 4 within the other limits; the least is 5"):
        ilp.allocate(loss, cost, 4, also=[(bytes_, 6.0)])
    with pytest.raises(ValueError, match="no choice is within all limits, whatever the first of them"):
        ilp.allocate(loss, cost, 4, also=[(bytes_, 1.0)])


def test_a_decision_may_have_no_further_prices() -> None:
    one = Decision((0,), np.array([[4, 4], [8, 8]]), np.array([1.0, 2.0]))
    assert Programme([one], [1.5]).best([[1.0, 0.0]]) == [0]
