"""The exact integer programme over channels and widths: what is best if what they lose adds up.

What a layer costs depends on a product of choices: the channels before it, those behind it, and its widths. So there is a
variable for every decision, every choice of the channels that it has to do with and every pair of widths, and equations tie
these to the variables of the groups' shares (the usual linearisation of products, which is tight: what is summed over a share
is the share's own variable).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from haq.problem.joint import JointCosts, sum_of
from haq.problem.limits import ROUNDING
from haq.problem.programme import SCALE, silent

Floats = NDArray[np.float64]

MOST_CHOICES = 1024  # of channels that one decision may have to do with
GAP = 1e-4  # how far from the optimum, in parts of it, the solution may be
SECONDS = 120.0  # after which the best that was found is taken


class _Variables(NamedTuple):
    """The variables of the pairs of widths, one entry each."""

    decision: NDArray[np.int64]
    option: NDArray[np.int64]
    loss: Floats
    prices: Floats  # (limits, variables), in parts of the limits
    ties: list[tuple[int, int]]  # of a variable with that of a share


def check(costs: JointCosts) -> None:
    """Check that the programme can be written down.

    Args:
        costs: Of a problem of channels and widths.

    Raises:
        ValueError: In one sentence, for a limit of peak memory, and for a layer that too many groups have to do with.
    """
    if costs.has_peak:
        raise ValueError(
            "ilp can't choose channels within a budget of peak_memory, which is no sum over layers: choose another solver, "
            "such as surrogate"
        )
    for decision in range(len(costs.pairs)):
        beside = costs.touching(decision)
        choices = math.prod(int(costs.counts[group]) for group in beside)
        if choices > MOST_CHOICES:
            raise ValueError(
                f"ilp can't choose channels here: {len(beside)} groups have to do with one layer ({choices:.3g} choices); "
                "choose another solver, such as surrogate"
            )


def propose(costs: JointCosts, losses: Sequence[Floats]) -> tuple[int, ...]:
    """Find the options within all budgets whose losses have the least sum, to one part in 10,000.

    Args:
        costs: Of a problem of channels and widths.
        losses: What every option loses, by place in an option vector.

    Returns:
        An option vector within all budgets. If HiGHS isn't done after two minutes, the best that is known.
    """
    check(costs)
    groups = costs.groups
    sizes = costs.counts[:groups].tolist()
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    shares = int(starts[-1])
    variables = _variables(costs, losses, starts)
    count = shares + len(variables.decision)
    goal = np.concatenate([*(np.asarray(loss, float) for loss in losses[:groups]), variables.loss])
    known = costs.planned(losses)
    scale = SCALE / (float(goal.max()) or 1.0)
    equal, right = _equations(costs, variables, starts, count)
    within = np.concatenate([np.zeros((len(costs.limits), shares)), variables.prices], axis=1)
    with silent():
        result: Any = milp(
            scale * goal,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(equal, right, right),
                LinearConstraint(SCALE * within, -np.inf, SCALE * (1 + 0.9 * ROUNDING)),
            ],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if result.x is None:
        return known
    found = [int(result.x[starts[group] : starts[group + 1]].argmax()) for group in range(groups)]
    picks = costs.best_widths(np.array(found, np.int64), losses[groups:])
    if picks is None:
        return known
    chosen = (*found, *picks)
    # Widths within one budget are planned with a grain: the programme's own may be better by that.
    own = (*found, *_picked(result.x[shares:], variables, len(costs.pairs)))
    candidates = [one for one in (chosen, own, known) if bool(costs.fits(np.array([one]))[0])]
    return min(candidates, key=lambda one: sum_of(losses, one))


def _variables(costs: JointCosts, losses: Sequence[Floats], starts: NDArray[np.int_]) -> _Variables:
    """List the pairs that are worth it, for every choice of channels."""
    groups = costs.groups
    decisions: list[int] = []
    options: list[int] = []
    lost: list[float] = []
    prices: list[Floats] = []
    ties: list[tuple[int, int]] = []
    for decision in range(len(costs.pairs)):
        beside = costs.touching(decision)
        every = list(itertools.product(*(range(costs.counts[group]) for group in beside)))
        numbers = np.zeros((len(every), groups), np.int64)
        numbers[:, beside] = np.array(every, np.int64).reshape(len(every), len(beside))
        parts = costs.prices(numbers)[:, :, decision] / costs.limits[:, None, None]
        loss = np.asarray(losses[groups + decision], float)
        for choice, of_choice in enumerate(parts.transpose(1, 0, 2)):
            for option in _worth(loss, of_choice[:, : len(loss)]):
                place = len(decisions)
                decisions.append(decision)
                options.append(option)
                lost.append(loss[option])
                prices.append(of_choice[:, option])
                ties += [(place, int(starts[group]) + every[choice][index]) for index, group in enumerate(beside)]
    return _Variables(np.array(decisions), np.array(options), np.array(lost), np.array(prices).T, ties)


def _worth(loss: Floats, prices: Floats) -> list[int]:
    """List the options that can be had, and beside which none is as cheap by all limits and loses as little."""
    respects = np.concatenate([loss[None], prices])
    there = np.isfinite(respects).all(0)
    no_worse = np.all(respects[:, :, None] <= respects[:, None, :], axis=0)
    better = no_worse & ~no_worse.T
    first = no_worse & no_worse.T & np.triu(np.ones((len(loss), len(loss)), bool), 1)
    beaten = np.any((better | first) & there[:, None], axis=0)
    found: list[int] = np.flatnonzero(there & ~beaten).tolist()
    return found


def _equations(costs: JointCosts, variables: _Variables, starts: NDArray[np.int_], count: int) -> tuple[Any, Floats]:
    """Say that every group takes one share, every decision one pair, and that they go together."""
    shares = int(starts[-1])
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    right: list[float] = []
    for group in range(costs.groups):
        for share in range(int(starts[group]), int(starts[group + 1])):
            rows.append(len(right))
            columns.append(share)
            values.append(1.0)
        right.append(1.0)
    begin = len(right)
    decisions = len(costs.pairs)
    rows += (begin + variables.decision).tolist()
    columns += range(shares, count)
    values += [1.0] * (count - shares)
    right += [1.0] * decisions
    number: dict[tuple[int, int], int] = {}
    for place, share in variables.ties:
        key = (int(variables.decision[place]), share)
        if key not in number:
            number[key] = len(right)
            rows.append(len(right))
            columns.append(share)
            values.append(-1.0)
            right.append(0.0)
        rows.append(number[key])
        columns.append(shares + place)
        values.append(1.0)
    return coo_array((values, (rows, columns)), shape=(len(right), count)).tocsr(), np.array(right)


def _picked(chosen: Floats, variables: _Variables, decisions: int) -> list[int]:
    """Return the option of every decision."""
    found = []
    for decision in range(decisions):
        of_decision = np.flatnonzero(variables.decision == decision)
        found.append(int(variables.option[of_decision[chosen[of_decision].argmax()]]))
    return found
