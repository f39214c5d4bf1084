"""How solvers that look for the best policy within a budget find the cheapest that is good enough, or the best trade-off.

Three steps, which share one allowance of evaluations and one measurement of sensitivities:

1. Stages. The solver runs on the same problem within another limit of the main metric, again and again. For the cheapest
   policy the limit is bisected, and a stage ends as soon as a policy is good enough. For a trade-off limits around the target
   are tried, then those around the best of them.
2. Refinement, for solvers that work with sensitivities. What was evaluated so far tells how good a policy is likely to be
   that differs from one of them in a decision or two (`Surrogate`), and corrects the sensitivities. In turn what the
   programme proposes with these, what is expected to save most nearby, and what is expected to save most at all is evaluated.
3. Stages again, for all other solvers, each a little below the cheapest policy that is good enough.

An agent's reward is in every stage what it is within a budget (HAQ, equation 3): a trade-off is judged outside, by the whole
search, which compares the stages.

Everything follows from the seed and from what was evaluated, in its order. A search that was interrupted is therefore resumed
by doing it again with its history at hand; agents, which live for a few evaluations each, are taught anew and keep no
checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, ndtr

import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.channels import chooses_channels
from haq.problem.evaluator import Evaluation
from haq.problem.goal import TRADEOFF
from haq.problem.problem import Problem
from haq.solvers import ilp, sensitivity
from haq.solvers.base import Session, Solver, Trial
from hw_models.widths import WIDTHS, places

Floats = NDArray[np.float64]

MEASURED = 0.35  # the most of all evaluations that go into sensitivities
IN_STAGES = 0.2  # of what is left then, for solvers whose policies are refined
BISECTIONS = 7  # stages that halve the range of limits
CLOSE = 0.01  # relative width of that range at which halving ends
BELOW = 0.01  # how far below the cheapest policy the limit of a further stage is
GRID = 6  # first limits of a trade-off
OFFSPRING = 12  # limits around the best of them
# Of the surrogate. Policies that share most widths share most of their luck; measured on the default network, where the
# correlation of what the line leaves is 0.52, 0.32, 0.23 and 0.07 for policies that differ in 1, 3, 4 and 6 of 24 operands;
# of the loss 0.72, 0.41, 0.32 and 0.15.
SHARED, SHARED_OF_LOSS = 0.65, 0.9  # shares of the variance that similar policies have in common
REACH = 1 / 6  # share of the operands over which that falls to 1 / e
FADING = 2.0  # how much less a trial says for a predicted loss that is e times as large
MOST_KNOWN = 400  # trials that it is made of
RANGE = 0.15  # how far below the best so far the programme's proposals go, as a part of its cost
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it fill a range evenly
WINDOW, LEAST_WINDOW = 0.05, 0.01  # how far below the best so far, at most and at least, every third policy costs
SHRINK, GROW = 0.9, 1.5  # of that, without and with success
ORIGINS = 12  # trials whose surroundings are looked at
MOST_MOVES = 400  # changes of one decision of which any two are looked at together
LOOKED_AT = 150  # neighbours of each
FEWEST = 3  # trials that anything can be told from
TINY = 1e-12


class Reached(Exception):
    """Ends a stage: a policy was found that is good enough."""


@dataclass(repr=False, kw_only=True)
class Stage(Session):
    """A solver's allowance on the problem within another limit, out of that of the whole search.

    Attributes:
        whole: The session of the search: it counts what was never asked for before, and keeps the best by its own goal.
        ends: Whether the stage ends with the first policy that is good enough for the whole search.
    """

    whole: Session
    ends: bool = False

    @property
    def left(self) -> int:
        """Count the evaluations that are left of the stage's and of the whole search's."""
        return min(self.evaluations - self.used, self.whole.left)

    @property
    def everything(self) -> Sequence[Trial]:
        """Return every trial of the whole search."""
        return self.whole.trials

    @property
    def races(self) -> bool:
        """Say whether evaluations may end early; see `Session.races`."""
        return self.whole.races

    def racing_beat(self) -> float | None:
        """Tell which value a policy must reach for the goal of the whole search; see `Session.racing_beat`."""
        return self.whole.racing_beat()

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Say which policies will be asked for; see `Session.expect`."""
        self.whole.expect(policies, beat)

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Evaluate a policy, as `Session.evaluate` does; what the whole search knows already costs it nothing.

        Raises:
            Reached: If that ends the stage.
            RuntimeError: Beyond the allowance.
        """
        if policy in self._seen:
            return self._seen[policy]
        evaluation = self.whole.evaluate(policy)
        trial = Trial.of(self.problem, policy, evaluation)
        self._seen[policy] = evaluation
        self.trials.append(trial)
        sound = trial.feasible and trial.whole and math.isfinite(trial.loss)
        if sound and (self.best is None or trial.rank < self.best.rank):
            self.best = trial
        if sound and self.ends and self.whole.problem.meets(evaluation):
            raise Reached
        return evaluation


def search(solver: Solver, session: Session, seed: int) -> None:
    """Lead a solver towards the goal of a session's problem; what it finds is the session's best.

    Args:
        solver: It looks for the best policy within a budget.
        session: Its allowance.
        seed: What everything random comes from.

    Raises:
        ValueError: For a solver that can't look for the goal among channels and widths.
    """
    problem = session.problem
    if chooses_channels(problem) and (solver.uses_sensitivities or len(problem.limits) > 1):
        raise ValueError(
            f"solver {solver.name!r} can't look for {problem.goal.words(problem.objective)} among channels and widths"
            f"{_of_limits(problem)}: choose surrogate, ddpg or exhaustive, or leave prune out"
        )
    loss_increase: Floats | None = None
    if solver.uses_sensitivities:
        keep = max(session.evaluations - int(MEASURED * session.evaluations), 1)
        loss_increase = sensitivity.measure(problem, session, keep)
    stages = Stages(solver, session, seed)
    share = 1.0
    if loss_increase is not None:
        share = IN_STAGES
    if problem.goal.kind == TRADEOFF:
        stages.trade(int(share * session.left) + 1)
    else:
        stages.bisect(int(share * session.left) + 1)
    if loss_increase is not None:
        refine(session, loss_increase)
    elif problem.goal.kind != TRADEOFF:
        stages.descend()


def _of_limits(problem: Problem) -> str:
    """Say that there are several budgets, if there are."""
    if len(problem.limits) > 1:
        return " within several budgets"
    return ""


class Stages:
    """The stages of one search."""

    def __init__(self, solver: Solver, session: Session, seed: int) -> None:
        """Begin with none.

        Args:
            solver: What runs in each.
            session: Of the whole search.
            seed: What the stages' seeds come from.
        """
        self.solver = solver
        self.session = session
        self.problem = session.problem
        self.seeds = np.random.default_rng(seed)
        self.lowest = cheapest_within(self.problem)

    def run(self, limit: float, evaluations: int, ends: bool = False) -> Trial | None:
        """Run the solver within a limit of the main metric.

        Args:
            limit: In the metric's unit.
            evaluations: How many policies it may evaluate.
            ends: Whether the first policy that is good enough ends the stage.

        Returns:
            The stage's best policy; None if there is none.
        """
        seed = int(self.seeds.integers(2**32))
        if evaluations < 1 or not self.session.left:
            return None
        limited = limited_to(self.problem, limit)
        if limited is None:
            return None
        whole = self.session
        stage = Stage(
            limited,
            evaluations,
            sensitivities=whole.sensitivities,
            sensitivity_kind=whole.sensitivity_kind,
            on_sensitivities=whole.on_sensitivities,
            env=whole.env,
            ahead=whole.ahead,
            saturated=whole.saturated,
            race=whole.race,
            whole=whole,
            ends=ends,
        )
        with contextlib.suppress(Reached):
            self.solver.solve(limited, stage, seed)
        return stage.best

    def bisect(self, evaluations: int) -> None:
        """Halve the range of limits below which no policy is good enough, and above which one is.

        Args:
            evaluations: How many policies may be evaluated, all stages together.
        """
        low, high = self.lowest, self.problem.limit
        each = max(evaluations // BISECTIONS, 1)
        if self.session.best is None:
            self.run(high, each, ends=True)
        for _ in range(BISECTIONS):
            if self.session.best is not None:
                high = min(high, self.session.best.cost)
            if high - low <= CLOSE * high:
                return
            middle = (low + high) / 2
            before = self.session.best
            self.run(middle, each, ends=True)
            if self.session.best is before:
                low = middle

    def descend(self) -> None:
        """Spend what is left on limits a little below the cheapest policy that is good enough."""
        while self.session.left:
            limit = self.problem.limit
            if self.session.best is not None:
                limit = max(self.session.best.cost * (1 - BELOW), self.lowest)
            used, before = self.session.used, self.session.best
            self.run(limit, self.session.left, ends=True)
            if self.session.used == used or (self.session.best is before and before is not None):
                return

    def trade(self, evaluations: int) -> None:
        """Try limits around the target of a trade-off, then between the best of them and their neighbours.

        Args:
            evaluations: How many policies may be evaluated, all stages together.
        """
        target = min(max(self.problem.tradeoff_target, self.lowest), self.problem.limit)
        below = np.geomspace(self.lowest, target, GRID // 2 + 1)
        above = np.geomspace(target, self.problem.limit, GRID // 2 + 1)[1:]
        each = max(evaluations // (GRID + 1 + OFFSPRING), 1)
        worths: dict[float, float] = {}

        def attempt(limit: float) -> None:
            stage = self.run(limit, each)
            worths[limit] = -math.inf
            if stage is not None:
                worth = self.problem.goal.worth(stage.value, stage.cost, self.problem.tradeoff_target)
                worths[limit] = worth

        # Nearest to the target first: there may not be enough evaluations for all.
        for limit in sorted({*below.tolist(), *above.tolist()}, key=lambda one: abs(math.log(one / target))):
            attempt(limit)
        for number in range(OFFSPRING):
            limits = sorted(worths)
            best = limits.index(max(limits, key=worths.__getitem__))
            other = best + (-1) ** number
            if 0 <= other < len(limits):
                attempt(math.sqrt(limits[best] * limits[other]))


def limited_to(problem: Problem, limit: float) -> Problem | None:
    """Make the problem of the best policy within a limit of the main metric; None if nothing is within all limits then."""
    try:
        limited = problem.limited_to(limit)
    except OutOfReach:
        return None
    programme = limited.several
    if programme is not None and programme.feasible() is None:
        return None
    return limited


def cheapest_within(problem: Problem) -> float:
    """Return the least that a policy costs within all further budgets."""
    programme = problem.several
    if programme is None:
        return problem.smallest
    return max(programme.least(0, range(1, len(problem.limits))), problem.smallest)


def refine(session: Session, loss_increase: Floats) -> None:
    """Evaluate, one after the other, the policies from which most is expected, until no evaluations are left.

    Args:
        session: What was evaluated, and how much more may be.
        loss_increase: How much (nats) every pair of widths raises the loss, shape (decisions, 10, 10).
    """
    neighbours = Neighbours(session.problem, loss_increase)
    step, rounds = WINDOW, 0
    while session.left:
        before = session.best
        count = min(session.ahead, session.left)
        if rounds % 3 == 0:
            chosen = neighbours.proposals(session, rounds // 3)
        elif rounds % 3 == 1:
            chosen = neighbours.promising(session, count, step)
        else:
            chosen = neighbours.promising(session, count)
        rounds += 1
        session.expect(chosen)
        for policy in chosen[:count]:
            session.evaluate(policy)
        if not chosen and rounds % 3 == 0:
            return
        if rounds % 3 != 2:
            continue
        # The window follows what succeeds, as steps do in evolution strategies.
        step = max(step * SHRINK, LEAST_WINDOW)
        if session.best is not before:
            step = min(step * GROW, WINDOW)


class Luck:
    """What policies have beyond a line, in part shared by those that are alike: a Gaussian process.

    Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, section 2.2, with a covariance that falls with the
    number of operands in which two policies differ.
    """

    def __init__(self, widths: NDArray[np.int64], line_of: Floats, values: Floats, weights: Floats, shared: float) -> None:
        """Fit the line, and what is left.

        Args:
            widths: Of the operands of every policy that was evaluated, shape (policies, operands).
            line_of: What the line is in, shape (policies,).
            values: What was measured, same shape.
            weights: How much each says of the policies that are asked about.
            shared: Share of the variance that similar policies have in common.
        """
        design = np.stack([np.ones(len(values)), line_of], axis=1)
        root = np.sqrt(weights)
        self.line = np.linalg.lstsq(design * root[:, None], values * root, rcond=None)[0]
        left = values - design @ self.line
        self.deviation = max(math.sqrt(float(np.average(np.square(left), weights=weights))), TINY)
        self.widths, self.shared = widths, shared
        self.given, self.rest = weights, left
        self.reach = max(REACH * widths.shape[1], 1.0)
        self.factor = cho_factor(self._alike(widths) + np.diag(1 / weights - shared))
        self.left = cho_solve(self.factor, left)

    def trend(self, line_of: Floats) -> Floats:
        """Return what the line alone says."""
        found: Floats = self.line[0] + self.line[1] * line_of
        return found

    def beyond(self, widths: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return what policies, shape (policies, operands), are expected to have beyond the line, and standard deviations."""
        alike = self._alike(widths)
        known = (alike * cho_solve(self.factor, alike.T).T).sum(1)
        return alike @ self.left, self.deviation * np.sqrt(np.maximum(1 - known, TINY))

    def by_width(self, places_of: Sequence[int]) -> Floats:
        """Return what each width of each operand adds to what is left of the line, shape (operands, widths), if that adds up.

        Ridge regression with as much variance for all operands together as policies share.

        Args:
            places_of: The widths.
        """
        count = self.widths.shape[1]
        same = (self.widths[:, None, :] == self.widths[None, :, :]).sum(2)
        covariance = self.shared * same / count + np.diag(1 / self.given - self.shared)
        dual = np.linalg.solve(covariance, self.rest)
        has = self.widths[:, :, None] == np.asarray(places_of)
        found: Floats = self.shared / count * np.einsum("p,pow->ow", dual, has)
        return found

    def _alike(self, widths: NDArray[np.int64]) -> Floats:
        """Return the correlation of policies with those evaluated, shape (policies, evaluated)."""
        differing = (widths[:, None, :] != self.widths[None, :, :]).sum(2)
        return self.shared * np.exp(-differing / self.reach)


class Surrogate:
    """What is expected of a policy that wasn't evaluated: how much worse than float's its value is, and how certain that is.

    Sensitivities predict its loss, and its loss predicts its value; both in a line, but for what similar policies share.
    """

    def __init__(self, widths: NDArray[np.int64], predicted: Floats, losses: Floats, drops: Floats, around: float) -> None:
        """Fit it.

        Args:
            widths: Of the operands of every policy that was evaluated, shape (policies, operands).
            predicted: What they are predicted to add to the loss, shape (policies,).
            losses: The losses that were measured, same shape.
            drops: How much worse than float's their values are, same shape.
            around: The predicted loss around which it is to be right.
        """
        ratio = np.log(np.maximum(predicted, TINY) / max(around, TINY))
        weights = 1 / (1 + np.square(FADING * ratio))
        near = np.sort(np.argsort(-_rounded(weights), kind="stable")[:MOST_KNOWN])
        widths, weights = widths[near], weights[near]
        self.of_loss = Luck(widths, predicted[near], losses[near], weights, SHARED_OF_LOSS)
        self.of_drop = Luck(widths, losses[near], drops[near], weights, SHARED)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of a drop of which the predicted loss alone is known."""
        return math.hypot(self.of_drop.deviation, float(self.of_drop.line[1]) * self.of_loss.deviation)

    def trend(self, predicted: Floats) -> Floats:
        """Return the drop by the predicted loss alone."""
        return self.of_drop.trend(self.of_loss.trend(predicted))

    def predict(self, widths: NDArray[np.int64], predicted: Floats) -> tuple[Floats, Floats]:
        """Predict policies that weren't evaluated.

        Args:
            widths: Of their operands, shape (policies, operands).
            predicted: What they are predicted to add to the loss.

        Returns:
            How much worse than float's their values are, and standard deviations, shape (policies,) each.
        """
        more_loss, of_loss = self.of_loss.beyond(widths)
        luck, of_drop = self.of_drop.beyond(widths)
        mean = self.of_drop.trend(self.of_loss.trend(predicted) + more_loss) + luck
        return mean, np.hypot(of_drop, self.of_drop.line[1] * of_loss)


class Neighbours:
    """The policies that differ from one that was evaluated in a decision or two, and what is expected of them."""

    def __init__(self, problem: Problem, loss_increase: Floats) -> None:
        """List what a decision may take: the options beside which none is as cheap and predicted to lose less.

        Args:
            problem: What is searched.
            loss_increase: How much (nats) every pair of widths raises the loss, shape (decisions, 10, 10).
        """
        self.problem = problem
        self.loss_increase = loss_increase
        self.losses = [decision.of(table) for decision, table in zip(problem.decisions, loss_increase, strict=True)]
        kept = [undominated(decision.prices, loss) for decision, loss in zip(problem.decisions, self.losses, strict=True)]
        # Every such option in one row: whose it is, its number there, what it costs and loses.
        self.owner = np.concatenate([np.full(len(options), index) for index, options in enumerate(kept)])
        self.option = np.concatenate(kept)
        self.price = np.concatenate([d.prices[options] for d, options in zip(problem.decisions, kept, strict=True)])
        self.loss = np.concatenate([loss[options] for loss, options in zip(self.losses, kept, strict=True)])
        self.first_layers = [decision.layers[0] for decision in problem.decisions]
        self.pairs = [{tuple(pair): index for index, pair in enumerate(d.pairs.tolist())} for d in problem.decisions]

    def proposals(self, session: Session, number: int) -> list[Q.BitPolicy]:
        """Let the programme propose a policy below the best so far, with sensitivities corrected by what was evaluated.

        Policies far apart have each their own luck, and what others find around the luckiest of them is better than what they
        find around any.

        Args:
            session: What was evaluated.
            number: How many were asked for before; limits are spread evenly over `RANGE` below the best, or around a target.

        Returns:
            The policy, or none if it was evaluated already.
        """
        problem = self.problem
        surrogate = self._surrogate(session)
        place = (number + 1) * GOLDEN % 1
        top = problem.limit
        if session.best is not None:
            top = session.best.cost
        limit = top * (1 - RANGE * place)
        if problem.goal.kind == TRADEOFF:
            limit = top * (1 + RANGE * (2 * place - 1))
        limited = limited_to(problem, max(limit, cheapest_within(problem)))
        if limited is None or surrogate is None:
            return []
        policy = ilp.propose(limited, self._corrected(surrogate))
        if session.seen(policy):
            return []
        return [policy]

    def _corrected(self, surrogate: Surrogate) -> Floats:
        """Return the sensitivities, shape (decisions, 10, 10), with what the widths of policies had beside the prediction."""
        extra = surrogate.of_loss.by_width(WIDTHS)
        of_weights, of_activations = np.split(extra / float(surrogate.of_loss.line[1] or 1.0), 2)
        return self.loss_increase + of_weights[:, :, None] + of_activations[:, None, :]

    def promising(self, session: Session, count: int, window: float = 1.0) -> list[Q.BitPolicy]:
        """Choose the policies from which most is expected, none of which was evaluated.

        Args:
            session: What was evaluated.
            count: How many are wanted.
            window: How far below the best so far they may cost, as a part of that.

        Returns:
            As many, the best first, or fewer if there are no more.
        """
        origins = self._origins(session)
        surrogate = self._surrogate(session)
        if surrogate is None:
            return []
        found: dict[tuple[int, ...], tuple[float, float]] = {}
        for origin in self._nearest(origins, session.best, surrogate):
            found |= self._around(origin, session.best, surrogate, window)
        if not found:
            return []
        options = np.array(list(found))
        price, loss = np.array(list(found.values())).T
        rows = np.array([self._widths_of(row) for row in options])
        mean, deviation = surrogate.predict(rows, loss)
        gains = self._gains(session.best, price, mean, deviation)
        order = np.lexsort((*options.T, -_rounded(gains)))
        return self._first_new(session, options[order], count)

    def _first_new(self, session: Session, options: NDArray[np.int64], count: int) -> list[Q.BitPolicy]:
        """Return the first policies of a list that are within all budgets and were never evaluated."""
        chosen: list[Q.BitPolicy] = []
        for row in options.tolist():
            if len(chosen) == count:
                break
            if not self.problem.fits(row):
                continue
            policy = self.problem.decide(d.pairs[pick] for d, pick in zip(self.problem.decisions, row, strict=True))
            if not session.seen(policy):
                chosen.append(policy)
        return chosen

    def _origins(self, session: Session) -> list[Trial]:
        """List the trials that have the pairs of decisions, as those that measure sensitivities need not."""
        known = [trial for trial in session.trials if math.isfinite(trial.cost) and _is_sound(trial)]
        return [trial for trial in known if self._options(trial.policy) is not None]

    def _surrogate(self, session: Session) -> Surrogate | None:
        """Fit what is expected of policies to what was evaluated; None if that is too little."""
        trials = [trial for trial in session.trials if _is_sound(trial)]
        origins = self._origins(session)
        if len(trials) < FEWEST or not origins:
            return None
        widths = np.array([self._widths(trial.policy) for trial in trials])
        predicted = np.array([self._predicted(row) for row in widths])
        losses = np.array([trial.loss for trial in trials])
        drops = np.array([self._drop(trial) for trial in trials])
        start = session.best or min(origins, key=self._drop)
        return Surrogate(widths, predicted, losses, drops, self._predicted(self._widths(start.policy)))

    def _nearest(self, origins: list[Trial], best: Trial | None, surrogate: Surrogate) -> list[Trial]:
        """Choose the trials around which most is expected, as if each were to be evaluated again a little cheaper."""
        price = np.array([trial.cost for trial in origins])
        if self.problem.goal.kind != TRADEOFF and best is not None:
            price = price * (1 - BELOW)
        drops = np.array([self._drop(trial) for trial in origins])
        gains = self._gains(best, price, drops, np.full(len(origins), surrogate.deviation))
        order = np.argsort(-_rounded(gains), kind="stable")[:ORIGINS]
        found = [origins[index] for index in order]
        if best is not None and best in origins and best not in found:
            found.append(best)
        return found

    def _around(
        self, origin: Trial, best: Trial | None, surrogate: Surrogate, window: float
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        """List the most promising policies that differ from a trial in one decision or two.

        Args:
            origin: The trial.
            best: The best so far.
            surrogate: What is expected of policies.
            window: As in `promising`.

        Returns:
            What they cost and are predicted to lose, by the option of every decision.
        """
        options = self._options(origin.policy)
        assert options is not None
        now_price = np.array([d.prices[pick] for d, pick in zip(self.problem.decisions, options, strict=True)])
        now_loss = np.array([loss[pick] for loss, pick in zip(self.losses, options, strict=True)])
        cheaper = self.price - now_price[self.owner]
        worse = self.loss - now_loss[self.owner]
        moves = _best_moves(cheaper, worse)
        owner, cheaper, worse = self.owner[moves], cheaper[moves], worse[moves]
        # Two changes of different decisions; on the diagonal one alone.
        price = now_price.sum() + cheaper[:, None] + cheaper[None, :]
        loss = now_loss.sum() + worse[:, None] + worse[None, :]
        alone = np.arange(len(cheaper))
        price[alone, alone] -= cheaper
        loss[alone, alone] -= worse
        possible = np.triu(owner[:, None] != owner[None, :]) | np.eye(len(alone), dtype=bool)
        first, second = np.nonzero(possible)
        price, loss = price[first, second], loss[first, second]
        # About half of what a policy has beyond the trend its neighbours have as well.
        luck = self._drop(origin) - float(surrogate.trend(np.array([now_loss.sum()]))[0])
        gains = self._gains(best, price, surrogate.trend(loss) + luck / 2, np.full(len(price), surrogate.deviation))
        if best is not None:
            gains[np.abs(price - best.cost) > window * best.cost] = 0.0
        order = np.argsort(-_rounded(gains), kind="stable")[:LOOKED_AT]
        found = {}
        for index in order:
            changed = list(options)
            for move in (moves[first[index]], moves[second[index]]):
                changed[self.owner[move]] = int(self.option[move])
            if gains[index] > 0:
                found[tuple(changed)] = (float(price[index]), float(loss[index]))
        return found

    def _gains(self, best: Trial | None, price: Floats, drop: Floats, deviation: Floats) -> Floats:
        """Tell what may be gained by policies.

        Args:
            best: The best so far.
            price: What they cost.
            drop: How much worse than float's their values are expected to be.
            deviation: How uncertain that is.

        Returns:
            For the cheapest policy what it saves, times the probability that it is good enough; for a trade-off how much
            larger its value is expected to be, where it is larger (Jones et al., "Efficient global optimization", 1998).
        """
        problem, goal = self.problem, self.problem.goal
        if goal.kind == TRADEOFF:
            target = problem.tradeoff_target
            factor = np.array([goal.worth(1.0, float(one), target) for one in price])
            known = 0.0
            if best is not None:
                known = best.worth
            mean = (problem.float_accuracy - drop) * factor
            spread = np.maximum(deviation * factor, TINY)
            z = (mean - known) / spread
            density = np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)
            gain: Floats = (mean - known) * ndtr(z) + spread * density
            return gain
        ceiling = problem.limit
        if best is not None:
            ceiling = best.cost
        sure = (self._allowed - drop) / np.maximum(deviation, TINY)
        if best is None:
            # The same order as that of probabilities, which may all be 0.
            likely: Floats = expit(np.clip(sure, -700, 700))
            return likely
        holds = ndtr(sure)
        return np.maximum(ceiling * (1 - TINY) - price, 0.0) * holds

    @property
    def _allowed(self) -> float:
        """Return how much worse than float's a value may be."""
        problem = self.problem
        least = problem.goal.threshold(problem.objective, problem.float_accuracy)
        return problem.goal.drop(problem.objective, least, problem.float_accuracy)

    def _drop(self, trial: Trial) -> float:
        problem = self.problem
        return problem.goal.drop(problem.objective, trial.value, problem.float_accuracy)

    def _options(self, policy: Q.BitPolicy) -> list[int] | None:
        """Return the option of every decision; None if one takes a pair that isn't among them."""
        w, a = self.problem.bit_arrays(policy)
        pairs = [(int(w[layer]), int(a[layer])) for layer in self.first_layers]
        if not all(pair in known for pair, known in zip(pairs, self.pairs, strict=True)):
            return None
        return [known[pair] for pair, known in zip(pairs, self.pairs, strict=True)]

    def _widths(self, policy: Q.BitPolicy) -> NDArray[np.int64]:
        """Return the widths of every decision's operands, in one row."""
        w, a = self.problem.bit_arrays(policy)
        return np.concatenate([w[self.first_layers], a[self.first_layers]])

    def _widths_of(self, options: Any) -> NDArray[np.int64]:
        """Return the widths of the operands for the option of every decision, as `_widths` does."""
        pairs = np.array([d.pairs[pick] for d, pick in zip(self.problem.decisions, options, strict=True)])
        return pairs.T.ravel()

    def _predicted(self, widths: NDArray[np.int64]) -> float:
        """Return what widths, in one row, are predicted to add to the loss."""
        w, a = places(widths).reshape(2, -1)
        return float(self.loss_increase[np.arange(len(w)), w, a].sum())


def _is_sound(trial: Trial) -> bool:
    """Say whether a network's outputs were finite."""
    return math.isfinite(trial.loss) and math.isfinite(trial.value)


def _best_moves(cheaper: Floats, worse: Floats) -> NDArray[np.int64]:
    """Choose the changes of one decision of which any two are looked at together: where there are many, the best trades.

    Args:
        cheaper: How much more than now the policy would cost.
        worse: How much it would add to the loss.

    Returns:
        Their numbers, in their order.
    """
    if len(cheaper) <= MOST_MOVES:
        return np.arange(len(cheaper))
    usual = float(np.median(np.abs(worse))) / max(float(np.median(np.abs(cheaper))), TINY)
    return np.sort(np.argsort(_rounded(worse + usual * cheaper), kind="stable")[:MOST_MOVES])


def undominated(prices: Floats, losses: Floats) -> NDArray[np.int64]:
    """Return the numbers of the options beside which none costs as little and loses less."""
    kept = []
    least = math.inf
    for index in np.lexsort((losses, prices)).tolist():
        if losses[index] < least:
            kept.append(index)
            least = float(losses[index])
    return np.array(kept, np.int64)


def _rounded(values: Floats) -> Floats:
    """Round to nine digits of the largest: what differs by less is the same, on any number of threads."""
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    return np.round(values / most, 9)
