"""The exact integer programme over measured sensitivities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

import quantizers as Q
from haq.problem.channels import ChannelProblem, chooses_channels
from haq.problem.peak import PeakOfDecisions, padded
from haq.problem.problem import Problem
from haq.problem.programme import minimise
from haq.solvers import iterated, joint_programme, sensitivity
from haq.solvers.base import Session, Solver, Spending
from haq.solvers.joint_space import space_of

MEASURED = 0.5  # of the evaluations, what sensitivities take at most if policies are to follow from which more is learned


class IntegerProgramme(Solver):
    """Measures sensitivities, then evaluates the policy that is optimal if they add up.

    Iterated, it fits what adds up to all trials, and solves again (`haq.solvers.iterated`).
    """

    name = "ilp"
    summary = "measured sensitivities, and the policy that is optimal if they add up"
    uses_sensitivities = True
    draws = False
    iterates = True
    most_measured = 1.0

    def __init__(self, iterate: bool = False) -> None:
        """Take how it is to go on after the first solution.

        Args:
            iterate: Whether at all.
        """
        self.iterate = iterate
        if iterate:
            # What a class says is of its solvers as they come.
            self.draws = self.chooses_ahead = self.races = True  # type: ignore[misc]
            self.most_measured = MEASURED

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Measure sensitivities, then evaluate one policy; iterated, as many as are left."""
        if chooses_channels(problem):
            self._solve_jointly(problem, session)
            return
        keep = max(session.evaluations - int(self.most_measured * session.evaluations), 1)
        loss_increase = sensitivity.measure(problem, session, keep)
        first = propose(problem, loss_increase)
        if self.iterate:
            iterated.search(problem, session, first, loss_increase, seed)
        else:
            session.evaluate(first)

    def _solve_jointly(self, problem: ChannelProblem, session: Session) -> None:
        """Evaluate the channels and widths that are optimal if what they lose adds up.

        What widths lose is measured with all channels; what channels lose is predicted (`haq.solvers.removal`).
        """
        if self.iterate:
            raise ValueError(
                "ilp with iterate fits what widths lose and knows nothing of channels: leave iterate or prune out, or choose "
                "another solver, such as surrogate"
            )
        joint_programme.check(problem.joint)
        loss_increase = sensitivity.measure(problem, session, keep=1)
        space = space_of(problem)
        session.evaluate(space.policy(joint_programme.propose(problem.joint, space.losses(loss_increase))))

    def spending(self, problem: Problem, evaluations: int) -> list[Spending]:
        """Tell what evaluations go into beside sensitivities; see `Solver.spending`."""
        found = [Spending("the policy that is optimal if sensitivities add up", min(evaluations, 1))]
        if self.iterate and evaluations > 1:
            found.append(
                Spending(
                    "what the programme proposes once it is fitted to all trials, until nothing improves", evaluations - 1
                )
            )
        return found


def propose(problem: Problem, loss_increase: NDArray[np.float64]) -> Q.BitPolicy:
    """Find the policy within all budgets that is optimal if increases of the loss add up.

    Args:
        problem: What is searched.
        loss_increase: How much (nats) every pair of widths raises the loss, shape (decisions, 10, 10).

    Returns:
        A policy within all budgets.
    """
    losses = [decision.of(table) for decision, table in zip(problem.decisions, loss_increase, strict=True)]
    loss = padded(losses, np.inf)
    cost = padded([decision.prices for decision in problem.decisions], np.inf)
    if problem.several is None:
        chosen = allocate(loss, cost, problem.limit).tolist()
    else:
        chosen = problem.several.choose(losses)
    return problem.decide(decision.pairs[pick] for decision, pick in zip(problem.decisions, chosen, strict=True))


def allocate(
    loss: ArrayLike,
    cost: ArrayLike,
    limit: float,
    tied: Sequence[Sequence[int]] = (),
    also: Sequence[tuple[ArrayLike, float]] = (),
    peak: PeakOfDecisions | None = None,
) -> NDArray[np.int64]:
    """Choose one option per layer with the least total loss and a total cost within a limit, proven optimal.

    Args:
        loss: What every option loses, shape (layers, options); one that is infinite here or in `cost` is not available.
        cost: What every option costs, same shape.
        limit: Of the total cost; it is kept to about 1e-11 of it.
        tied: Groups of layers that must take the same option.
        also: Further costs, each with its limit, that hold as well.
        peak: A limit of the peak of memory that holds as well.

    Returns:
        Option indices, shape (layers,).

    Raises:
        ValueError: If shapes differ, numbers are NaN or nothing fits, naming the least cost that can be reached.
        RuntimeError: If it isn't solved, though something fits.
    """
    losses = np.asarray(loss, float)
    limits = [(np.asarray(costs, float), float(most)) for costs, most in ((cost, limit), *also)]
    available = _available(losses, limits, tied)
    chosen = minimise(losses, available, limits, peak=peak, tied=tied)
    if chosen is not None:
        return chosen
    cheapest = minimise(limits[0][0], available, limits[1:], peak=peak, tied=tied)
    if cheapest is None:
        raise ValueError("no choice is within all limits, whatever the first of them")
    least = float(np.take_along_axis(limits[0][0], cheapest[:, None], 1).sum())
    if least <= limit:
        raise RuntimeError(f"the integer programme was not solved, though a choice costs {least:.6g}")
    within = ""
    if also or peak is not None:
        within = " within the other limits"
    raise ValueError(f"no choice costs at most {limit:.6g}{within}; the least is {least:.6g}")


def _available(
    losses: NDArray[np.float64], limits: Sequence[tuple[NDArray[np.float64], float]], tied: Sequence[Sequence[int]]
) -> NDArray[np.bool_]:
    """Check what `allocate` is given; returns which options may be taken, shape (layers, options)."""
    available = np.isfinite(losses)
    for costs, limit in limits:
        if losses.ndim != 2 or losses.shape != costs.shape or not losses.size:
            raise ValueError(f"loss and cost must be two arrays (layers, options), not {losses.shape} and {costs.shape}")
        if np.isnan(losses).any() or np.isnan(costs).any() or np.isnan(limit):
            raise ValueError("loss, cost and limit must not be NaN")
        available &= np.isfinite(costs)
    for group in tied:
        available[list(group)] = available[list(group)].all(0)
    if not available.any(1).all():
        raise ValueError(f"layer {int(np.argmin(available.any(1)))} has no available option")
    return available
