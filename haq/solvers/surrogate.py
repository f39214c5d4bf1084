"""Bayesian optimization: a Gaussian process learns from every trial what policies are worth, and chooses the next to evaluate.

    start         plans for the calibration errors and for what gradients predict of the loss (where there are gradients), as
                  they are and under random weights, and random policies
    then, always  of many candidates the unseen one with the largest expected improvement (Jones et al., "Efficient global
                  optimization of expensive black-box functions", 1998)

What is learned of a policy are the roots of its operands' relative calibration errors, at the widths it has. No evaluation
goes into sensitivities. The loss, which differs little from samples to samples, tells most: one process learns it, a line
leads from it to the value, and a second process learns what the value has beyond the line. The line, and what is beyond it,
need only be right near the best policies: the better a trial, the more it counts.

Candidates are random policies that fill the budgets, the best trials with a few decisions drawn anew, plans under random
weights, what others propose (`Proposer`: agents do), and the neighbours of the most promising of all these.

Where there are proposers, every second policy is chosen among their candidates alone: beside the neighbours of neighbours,
some of which promise more than they keep, few of theirs would ever be chosen.

Everything follows from the seed and from what was evaluated, in its order. A search that was interrupted is therefore resumed
by doing it again with its history at hand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import ndtr

import quantizers as Q
from envs.base import REWARD_SCALE
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF
from haq.problem.problem import Problem
from haq.solvers import greedy, ilp, sensitivity
from haq.solvers.base import Session, Solver, Spending
from haq.solvers.joint_space import JointSpace, option_counts, space_of
from haq.solvers.process import Process
from haq.solvers.space import Flags, Floats, Options, Space
from haq.store.units import PERCENT

FEWEST = 10  # policies to begin with
BEYOND = 3  # as many more than there are free decisions
SPREAD = 1.0  # standard deviation of the logarithms of random weights
GUIDED = 0.5  # share of the plans that go by predicted losses, where there are any
RANDOM = 160  # candidates that are drawn at random
NEARBY = 320  # candidates that differ from the best trials
ELITE = 6  # best trials around which these are
MOST_CHANGED = 4  # decisions in which they differ at most
PLANS = 2  # candidates that are planned
CLIMBED = 4  # most promising candidates whose neighbours are looked at
STEPS = 2  # times in a row
PAIRS = 60  # neighbours of each that differ in two decisions
SINGLES = 60  # neighbours of each that differ in one
GROWTH = 1.16  # trials more, as a factor, after which a view is fitted anew
LENGTHS = (0.0, 0.7)  # what is expected of the logarithms of lengths, of views that choose in turn
MOST_LEARNED = 400  # trials that a view is made of
NEAR = 1.0  # how far from the best a trial is that counts a third, in parts of how far the median is
FAR = 1e-2  # weight of a trial that is far from it
SPREAD_OF_LOSS = 1.5  # standard deviation of one sample's loss, in parts of the mean
TURNS = 2  # in one of so many turns everybody proposes candidates, in the others proposers alone, if there are any
MOST_STALE_ROUNDS = 20  # rounds without a policy that is new, after which there seem to be none
TINY = 1e-12

START, RANDOMLY, PLANNED, NEIGHBOUR, KNOWN = "start", "random", "plan", "neighbour", "known"
CHANGED = ", changed"  # follows a proposer's name where a neighbour of what it proposed was chosen


class Learned(NamedTuple):
    """A policy of which it is known what it is worth."""

    features: Floats
    evaluation: Evaluation
    options: tuple[int, ...] | None  # None: a policy that can't be chosen here
    believed: bool = False  # chosen, and not evaluated yet: what it is worth is what was predicted


class Proposer(Protocol):
    """Something that proposes candidates beside those of the search itself."""

    name: str

    def learn(self, options: tuple[int, ...], evaluation: Evaluation) -> None:
        """Take a policy that was evaluated, the first ones included, in the order in which they were chosen."""

    def propose(self, model: Model, count: int) -> list[tuple[int, ...]]:
        """Propose option vectors within the budgets.

        Args:
            model: What was learned so far.
            count: About how many are wanted.
        """


class Columns(NamedTuple):
    """What was measured of policies, and how well it is known."""

    quality: Floats  # larger the smaller the loss is
    scores: Floats
    weights: Floats  # how much each counts
    of_quality: Floats  # the variance of what was measured on a part of the samples
    of_scores: Floats


class View:
    """One way to see trials: a process for the quality, a line from it to the score, and a process for what is beyond."""

    def __init__(self, features: int, length: float) -> None:
        """Begin with nothing.

        Args:
            features: How many there are.
            length: The logarithm of the length that is expected of a feature.
        """
        self.of_loss = Process(features, length)
        self.of_rest = Process(features, length)
        self.line = np.zeros(2)
        self._fitted = 0  # trials at the last fit

    def learn(self, x: Floats, columns: Columns, trials: int) -> None:
        """Take what was measured.

        Args:
            x: Features, shape (policies, features).
            columns: What was measured of them.
            trials: How many there are in all.
        """
        anew = trials >= self._fitted * GROWTH + 1
        if anew:
            self._fitted = trials
        self.of_loss.learn(x, columns.quality, extra=columns.of_quality, fit=anew)
        design = np.stack([np.ones(len(x)), columns.quality], axis=1)
        root = np.sqrt(columns.weights)
        self.line = np.linalg.lstsq(design * root[:, None], columns.scores * root, rcond=None)[0]
        # A larger loss is never a sign of a better value.
        if self.line[1] < 0:
            self.line = np.array([float(np.average(columns.scores, weights=columns.weights)), 0.0])
        rest = columns.scores - design @ self.line
        self.of_rest.learn(x, rest, 1 / columns.weights, extra=columns.of_scores, fit=anew)

    def predict(self, x: Floats) -> tuple[Floats, Floats]:
        """Return means and standard deviations of scores."""
        quality, of_quality = self.of_loss.predict(x)
        rest, of_rest = self.of_rest.predict(x)
        return self.line[0] + self.line[1] * quality + rest, np.hypot(self.line[1] * of_quality, of_rest)


class Model:
    """What is expected of policies that weren't evaluated.

    Attributes:
        trials: What it learned from.
        best: The best feasible trial among them, by the problem's goal; None if there is none.
    """

    def __init__(self, space: Space, count: int) -> None:
        """Begin with nothing.

        Args:
            space: The policies.
            count: The samples that a whole evaluation stands on.
        """
        self.space = space
        self.problem = space.problem
        self.count = count
        self.trials: list[Learned] = []
        self.best: Learned | None = None
        features = len(space.features(np.zeros((1, len(space.counts)), np.int64))[0])
        self._views = [View(features, length) for length in LENGTHS]
        self._view = self._views[0]
        self._current = False
        self._is_ratio = False

    def learn(self, policy: Q.BitPolicy, options: tuple[int, ...] | None, evaluation: Evaluation) -> None:
        """Take a policy that was evaluated.

        Args:
            policy: The policy.
            options: Its option vector; None if it can't be chosen here.
            evaluation: What it gave.
        """
        if options is None:
            features = self.space.features_of(policy)
        else:
            features = self.space.features(np.array([options]))[0]
        self.trials.append(Learned(features, evaluation, options))
        self._current = False

    def believe(self, options: tuple[int, ...]) -> None:
        """Take it that a policy that was chosen gives what is expected of it, until it is known."""
        self._fit()
        row = np.array([options])
        features = self.space.features(row)
        mean, _ = self.predict(row)
        quality, _ = self._view.of_loss.predict(features)
        loss = self._loss_of(float(quality[0]))
        higher = self.problem.objective.higher_is_better
        value = float(mean[0])
        if not higher:
            value = -value
        evaluation = Evaluation(value, loss, self.count, None, higher)
        self.trials.append(Learned(features[0], evaluation, options, believed=True))
        self._current = False

    def forget_believed(self) -> None:
        """Forget what was only believed."""
        self.trials = [trial for trial in self.trials if not trial.believed]
        self._current = False

    def predict(self, options: Options) -> tuple[Floats, Floats]:
        """Predict policies' scores, of which larger ones are better, in the unit of the objective.

        Args:
            options: Shape (policies, decisions).

        Returns:
            Means and standard deviations, shape (policies,) each.
        """
        self._fit()
        return self._view.predict(self.space.features(options))

    def reward(self, options: Options) -> Floats:
        """Predict what an agent gets for policies, shape (policies,); see `envs.base.reward_of`."""
        objective, float_value = self.problem.objective, self.problem.float_accuracy
        mean, _ = self.predict(options)
        better = mean - float(objective.signed(float_value))
        if objective.unit == PERCENT and objective.higher_is_better:
            return REWARD_SCALE * better
        x = better / (abs(float_value) or 1.0)
        return REWARD_SCALE * x / (1 + np.abs(x))

    def improvement(self, options: Options) -> Floats:
        """Tell how much better than the best policies are expected to be, shape (policies,).

        Of the best policy that is the expected improvement of the score; of the cheapest what a policy saves, times the
        probability that it is good enough; of a trade-off the expected improvement of its value.
        """
        mean, deviation = self.predict(options)
        problem, goal = self.problem, self.problem.goal
        if goal.kind == TRADEOFF:
            target = problem.tradeoff_target
            factor = np.array([goal.worth(1.0, float(cost), target) for cost in self.space.costs(options)])
            best = 0.0
            if self.best is not None:
                best = self._worth(self.best)
            return _expected(mean * factor, deviation * factor, best)
        if goal.kind == CHEAPEST:
            least = float(problem.objective.signed(goal.threshold(problem.objective, problem.float_accuracy)))
            sure = ndtr((mean - least) / np.maximum(deviation, TINY))
            if self.best is None:
                return sure
            saved = self._cost(self.best) * (1 - TINY) - self.space.costs(options)
            return np.maximum(saved, 0.0) * sure
        best = float(mean.max())
        if self.best is not None:
            best = self.best.evaluation.score
        return _expected(mean, deviation, best)

    def elite(self, count: int) -> Options:
        """Return the best trials that can be chosen, the best first, shape (at most count, decisions)."""
        found = [trial for trial in self.trials if trial.options is not None]
        fits = self._within(found)
        # Those that cost too much, as trials of other searches may, come last.
        places = sorted(range(len(found)), key=lambda place: (not fits[place], self._rank(found[place])))[:count]
        rows = [found[place].options for place in places]
        return np.array(rows, np.int64).reshape(len(rows), len(self.space.counts))

    def _within(self, trials: Sequence[Learned]) -> Flags:
        """Tell which trials can be chosen within all budgets, shape (trials,)."""
        found = np.array([trial.options is not None for trial in trials], bool)
        if found.any():
            found[found] = self.space.fits(np.array([trial.options for trial in trials if trial.options is not None]))
        return found

    def _rank(self, trial: Learned) -> tuple[float, ...]:
        """Sort better trials first, by the problem's goal; those that may not be chosen come last."""
        evaluation = trial.evaluation
        kind = self.problem.goal.kind
        if kind == TRADEOFF:
            return 0.0, -self._worth(trial), evaluation.loss
        if kind == CHEAPEST:
            if self.problem.meets(evaluation):
                return 0.0, self._cost(trial), -evaluation.score
            return 1.0, -evaluation.score, evaluation.loss
        return 0.0, -evaluation.score, evaluation.loss

    def _cost(self, trial: Learned) -> float:
        return float(self.space.costs(np.array([trial.options]))[0])

    def _worth(self, trial: Learned) -> float:
        problem = self.problem
        return problem.goal.worth(trial.evaluation.value, self._cost(trial), problem.tradeoff_target)

    def _fit(self) -> None:
        """Learn what the trials say, if that isn't what is known already."""
        if self._current:
            return
        self._current = True
        self._set_best()
        # In turn: no one of them is the best everywhere.
        self._view = self._views[len(self.trials) % len(self._views)]
        with one_thread():
            self._learn()

    def _set_best(self) -> None:
        """Find the best feasible trial that was evaluated whole."""
        self.best = None
        whole = [t for t in self.trials if t.options is not None and not t.believed and t.evaluation.images >= self.count]
        sound = [trial for trial in whole if math.isfinite(trial.evaluation.loss)]
        if self.problem.goal.kind == CHEAPEST:
            sound = [trial for trial in sound if self.problem.meets(trial.evaluation)]
        within = [trial for trial, fits in zip(sound, self._within(sound), strict=True) if fits]
        if within:
            self.best = min(within, key=self._rank)

    def _learn(self) -> None:
        losses, scores = self._measured()
        weights = self._weights(scores)
        quality = -losses
        spread = SPREAD_OF_LOSS * losses.std()
        self._is_ratio = bool(losses.min() > 0)
        if self._is_ratio:
            quality, spread = -np.log(losses), SPREAD_OF_LOSS
        images = np.array([max(trial.evaluation.images, 1) for trial in self.trials])
        unseen = np.maximum(1 - images / self.count, 0.0) / images  # of the variance of one sample, for a part of them
        of_score = unseen * np.square(np.std(scores))
        if self.problem.objective.unit == PERCENT:
            share = np.clip(np.abs(scores), 0.0, 1.0)
            of_score = unseen * share * (1 - share)
        columns = Columns(quality, scores, weights, unseen * spread**2, of_score)
        x = np.array([trial.features for trial in self.trials])
        if len(x) > MOST_LEARNED:
            # What is farthest from the best says least.
            kept = np.sort(np.argsort(-_rounded(weights), kind="stable")[:MOST_LEARNED])
            x, columns = x[kept], Columns(*(column[kept] for column in columns))
        self._view.learn(x, columns, len(self.trials))

    def _measured(self) -> tuple[Floats, Floats]:
        """Return the loss and the score of every trial, all of them finite."""
        losses = np.array([trial.evaluation.loss for trial in self.trials])
        scores = np.array([trial.evaluation.score for trial in self.trials])
        finite = np.isfinite(losses) & np.isfinite(scores)
        if not finite.any():
            return np.ones(len(losses)), np.zeros(len(scores))
        # Outputs that aren't finite are worth less than all others.
        losses = np.where(finite, losses, losses[finite].max() + np.ptp(losses[finite]))
        scores = np.where(finite, scores, scores[finite].min() - np.ptp(scores[finite]))
        return losses, scores

    def _loss_of(self, quality: float) -> float:
        """Return the loss of a quality, which is larger the smaller the loss is."""
        if self._is_ratio:
            return math.exp(-quality)
        return -quality

    def _weights(self, scores: Floats) -> Floats:
        """Tell how much every trial counts for the line and for what is beyond it: less the farther it is from the best."""
        problem = self.problem
        # Policies that cost too much, of other searches, say little of the best ones that don't.
        within = self._within(self.trials)
        if not within.any():
            within = np.ones(len(scores), bool)
        top = float(scores[within].max())
        if problem.goal.kind == CHEAPEST:
            top = float(problem.objective.signed(problem.goal.threshold(problem.objective, problem.float_accuracy)))
        if problem.goal.kind == TRADEOFF and self.best is not None:
            top = self.best.evaluation.score
        away = np.abs(scores - top)
        near = NEAR * float(np.median(away[within])) or 1.0
        return np.exp(-np.minimum(away / near, 700.0)) + FAR


class Candidates(NamedTuple):
    """Policies that may be chosen, and who proposed them."""

    options: Options
    origins: list[str]


class Search:
    """One search: what was learned, what was chosen but isn't learned yet, and where choices came from.

    Attributes:
        origins: Where every choice came from, in order: "start", "random", "neighbour", "plan", or a proposer's name.
        gain: The expected improvement of the last choice (`Model.improvement`); infinite for those to begin with.
    """

    def __init__(
        self, problem: Problem, session: Session, seed: int, proposers: Sequence[Proposer] = (), *, alone: bool = False
    ) -> None:
        """Begin a search.

        Args:
            problem: What is searched.
            session: Evaluates policies.
            seed: What everything random comes from.
            proposers: Who proposes candidates beside the search itself.
            alone: Whether nobody else does, but for the first policies: what they are worth without the others.
        """
        self.problem = problem
        self.session = session
        self.space = space_of(problem)
        self.model = Model(self.space, problem.evaluator.count)
        self.proposers = list(proposers)
        self.alone = alone
        self.origins = session.origins
        session.proposers = [proposer.name for proposer in self.proposers]
        self.gain = math.inf
        self._draws = np.random.default_rng(seed)
        self._chosen: set[tuple[int, ...]] = set()
        self._waiting: deque[tuple[tuple[int, ...], Q.BitPolicy]] = deque()
        for policy, evaluation in session.known:
            self.know(policy, evaluation)
        self._guides = self._increases()
        self._start = deque(self._first_policies())

    def run(self) -> None:
        """Choose and evaluate, until all evaluations are used or nothing new is found."""
        while True:
            while self._may_choose:
                found = self.choose()
                if found is None:
                    break
                self.expect(found)
            if not self._waiting:
                return
            self.evaluate()

    def evaluate(self) -> tuple[Q.BitPolicy, Evaluation]:
        """Evaluate the policy that has waited longest, learn from it, and return it with what it gave."""
        options, policy = self._waiting.popleft()
        evaluation = self.session.evaluate(policy)
        self.learn(options, policy, evaluation)
        return policy, evaluation

    def propose_with(self, proposer: Proposer) -> None:
        """Let somebody propose candidates from now on."""
        self.proposers.append(proposer)
        self.session.proposers = [one.name for one in self.proposers]

    def begin_with(self, count: int, place: int) -> None:
        """Begin with fewer policies, where several searches begin together.

        Args:
            count: How many are left, beside the best of known trials.
            place: Which of them is the first.
        """
        known = [one for one in self._start if one[1] == KNOWN]
        others = [one for one in self._start if one[1] != KNOWN]
        place %= max(len(others), 1)
        self._start = deque([*known, *(others[place:] + others[:place])[:count]])

    def begin_from(self, policies: Sequence[tuple[int, ...]], origin: str) -> None:
        """Begin with given policies, in place of the last of the search's own; the first of these stays.

        Args:
            policies: Option vectors within the budgets.
            origin: Where they come from.
        """
        own = list(self._start)
        if not own:
            return
        given = dict.fromkeys(policies)
        new = [(options, origin) for options in given if options != own[0][0]][: max(len(own) - 1, 0)]
        self._start = deque([own[0], *new, *own[1 : len(own) - len(new)]])

    def know(self, policy: Q.BitPolicy, evaluation: Evaluation) -> None:
        """Learn from a policy that another search evaluated, whatever it costs here, if it can be described here."""
        if self.space.describes(policy):
            self.model.learn(policy, self.space.options(policy), evaluation)

    def leave(self, policy: Q.BitPolicy) -> None:
        """Never choose a policy, which another search of the same sweep has chosen."""
        options = self.space.options(policy)
        if options is not None:
            self._chosen.add(options)

    @property
    def _may_choose(self) -> bool:
        return len(self._waiting) < min(self.session.ahead, self.session.left)

    def expect(self, options: tuple[int, ...], others: Iterable[Session] = ()) -> None:
        """Let a policy that was chosen be evaluated, and wait in line to be learned from.

        Args:
            options: The policy.
            others: Sessions of other searches that may return it too: its evaluation ends early only if none of them would.
        """
        policy = self.space.policy(options)
        self._waiting.append((options, policy))
        beats = [session.racing_beat() for session in (self.session, *others)]
        known = [beat for beat in beats if beat is not None]
        beat = None
        if len(known) == len(beats):
            beat = min(known)
        self.session.expect([policy], beat=beat)

    def learn(self, options: tuple[int, ...], policy: Q.BitPolicy, evaluation: Evaluation) -> None:
        """Take what a policy gave.

        Args:
            options: Its option vector.
            policy: The policy.
            evaluation: What it gave.
        """
        self.model.learn(policy, options, evaluation)
        for proposer in self.proposers:
            proposer.learn(options, evaluation)

    def choose(self) -> tuple[int, ...] | None:
        """Choose the next policy; None if nothing new is found."""
        while self._start:
            options, origin = self._start.popleft()
            if options not in self._chosen:
                return self._take(options, origin)
        if not self.model.trials:
            return None
        with one_thread():
            for options, _ in self._waiting:
                self.model.believe(options)
            found = self._most_promising()
            self.model.forget_believed()
        if found is None:
            return None
        return self._take(*found)

    def _take(self, options: tuple[int, ...], origin: str) -> tuple[int, ...]:
        self._chosen.add(options)
        self.origins.append(origin)
        return options

    def _first_policies(self) -> list[tuple[tuple[int, ...], str]]:
        """List the policies to begin with: of known trials the best; otherwise plans and random policies."""
        count = start_of(len(self.space.free), self.session.left)
        known = [trial for trial in self.model.trials if trial.options is not None]
        if known:
            within = [trial for trial, fits in zip(known, self.model._within(known), strict=True) if fits]
            count = max(count - len(known), 0)
            if within:
                best = min(within, key=self.model._rank)
                assert best.options is not None
                return [(best.options, KNOWN), *self._drawn_policies(count)]
            count = max(count, 1)
        return self._drawn_policies(count)

    def _drawn_policies(self, count: int) -> list[tuple[tuple[int, ...], str]]:
        """Draw policies: plans for what is predicted as it is, then three of four planned under random weights."""
        found: dict[tuple[int, ...], str] = {}
        for options in self._proposals()[:count]:
            found.setdefault(options, START)
        for number in range(MOST_STALE_ROUNDS * count):
            if len(found) == count:
                break
            if number % 4 == 2:
                options = tuple(self.space.random(1, self._draws)[0].tolist())
            else:
                options = self.space.planned(self._weighted())
            found.setdefault(options, START)
        return list(found.items())

    def _increases(self) -> Floats | None:
        """Return how much every pair of widths is predicted to raise the loss, shape (decisions, 10, 10); None if unknown.

        That is what the session knows, or what gradients on the calibration samples tell, which costs no evaluation.
        """
        known = self.session.sensitivities
        if known is None:
            known = self.session.predicted = sensitivity.predicted(self.problem)
        if known is None:
            return None
        return known.table(self.problem)

    def _proposals(self) -> list[tuple[int, ...]]:
        """List the plan for the sum of the errors, and what programme and greedy descent make of predicted losses.

        Of channels and widths it is what every search of both should know of (`JointSpace.first_policies`).
        """
        if isinstance(self.space, JointSpace):
            return self.space.first_policies(self.losses)
        found = [self.space.planned(self._sums(np.square(self.space.errors)))]
        if self._guides is not None:
            for propose in (ilp.propose, greedy.propose):
                options = self.space.options(propose(self.problem, self._guides))
                assert options is not None
                found.append(options)
        return list(dict.fromkeys(found))

    def _weighted(self) -> list[Floats]:
        """Sum what operands do, by decision, under random weights: errors, their roots or predicted losses."""
        weights = np.exp(SPREAD * self._draws.standard_normal((len(self.space.counts), 1, 2)))
        kind = self._draws.random()
        if isinstance(self.space, JointSpace):
            weights = self.space.balanced(weights, self._draws)
        if self._guides is not None and kind < GUIDED:
            losses = self.space.losses(self._guides)
            return [loss * weight[0, 0] for loss, weight in zip(losses, weights, strict=True)]
        errors = np.square(self.space.errors)
        if kind < (1 + GUIDED) / 2:
            errors = self.space.errors
        return self._sums(errors * weights)

    @property
    def losses(self) -> list[Floats]:
        """Return what every option is predicted to lose: by gradients, or else by the errors that it leaves."""
        if self._guides is None:
            return self._sums(np.square(self.space.errors))
        return self.space.losses(self._guides)

    def _sums(self, errors: Floats) -> list[Floats]:
        """Sum errors of weights and of activations, shape (decisions, options, 2), by decision."""
        return [row[:count].sum(1) for row, count in zip(errors, self.space.counts, strict=True)]

    def _most_promising(self) -> tuple[tuple[int, ...], str] | None:
        """Return the candidate with the largest expected improvement, and where it came from; None without any."""
        alone = self._is_proposers_turn
        for _ in range(MOST_STALE_ROUNDS):
            found = self._candidates(alone)
            if found.origins:
                break
            alone = self.alone  # they have nothing new: then everybody again
        else:
            return None
        options, origins = found
        gains = self.model.improvement(options)
        steps = STEPS
        if alone:
            steps = 0
        for _ in range(steps):
            order = np.argsort(-_rounded(gains), kind="stable")[:CLIMBED]
            changed, of = self._neighbours(options[order])
            near = self._new(changed, set(map(tuple, options.tolist())))
            if not len(near):
                break
            parents = dict(zip(map(tuple, changed[::-1].tolist()), order[of[::-1]].tolist(), strict=True))
            origins = [*origins, *(self._changed_from(origins[parents[row]]) for row in map(tuple, near.tolist()))]
            options = np.concatenate([options, near])
            gains = np.concatenate([gains, self.model.improvement(near)])
        best = int(np.argmax(_rounded(gains)))
        self.gain = float(gains[best])
        return tuple(options[best].tolist()), origins[best]

    def _changed_from(self, origin: str) -> str:
        """Say where a neighbour came from: what others proposed stays theirs, and that it was changed is told."""
        for proposer in self.proposers:
            if origin in (proposer.name, proposer.name + CHANGED):
                return proposer.name + CHANGED
        return NEIGHBOUR

    @property
    def _is_proposers_turn(self) -> bool:
        """Say whether only others propose candidates of the next policy, as they do in turn with everybody."""
        return self.alone or (bool(self.proposers) and len(self.origins) % TURNS != 0)

    def _candidates(self, alone: bool = False) -> Candidates:
        """Propose policies within the budgets that weren't chosen; `alone`: without the search's own."""
        space, draws = self.space, self._draws
        parts: list[tuple[str, Options]] = []
        if not alone:
            elite = self.model.elite(ELITE)
            parts.append((RANDOMLY, space.random(RANDOM, draws)))
            if len(elite):
                parts.append((NEIGHBOUR, self._around(elite[draws.integers(len(elite), size=NEARBY)])))
            parts.append((PLANNED, np.concatenate([space.planned_quickly(self._weighted(), draws) for _ in range(PLANS)])))
        for proposer in self.proposers:
            proposed = proposer.propose(self.model, RANDOM)
            parts.append((proposer.name, np.array(proposed, np.int64).reshape(-1, len(space.counts))))
        options, origins, before = [np.zeros((0, len(space.counts)), np.int64)], [], set[tuple[int, ...]]()
        for origin, rows in parts:
            new = self._new(rows, before)
            before.update(map(tuple, new.tolist()))
            options.append(new)
            origins += [origin] * len(new)
        return Candidates(np.concatenate(options), origins)

    def _around(self, options: Options) -> Options:
        """Draw up to four decisions of policies anew; half of them then fill the budgets."""
        changes = self._draws.integers(1, MOST_CHANGED + 1, size=len(options))
        within = self.space.lowered(self.space.changed(options, changes, self._draws), self._draws)
        half = len(within) // 2
        return np.concatenate([self.space.filled(within[:half], self._draws), within[half:]])

    def _neighbours(self, options: Options) -> tuple[Options, Options]:
        """Draw policies within the budgets that differ from given ones in one decision or in two, and tell of which."""
        of = np.repeat(np.arange(len(options)), SINGLES + PAIRS)
        rows = options[of]
        changes = np.tile([1] * SINGLES + [2] * PAIRS, len(options))
        changed = self.space.changed(rows, changes, self._draws)
        fits = self.space.fits(changed)
        return changed[fits], of[fits]

    def _new(self, options: Options, before: set[tuple[int, ...]]) -> Options:
        """Return policies that weren't chosen, aren't in `before`, and fit the budgets, each once."""
        if not len(options):
            return options
        listed = list(map(tuple, options.tolist()))
        first: dict[tuple[int, ...], int] = {}
        for index, row in enumerate(listed):
            if row not in before and row not in self._chosen:
                first.setdefault(row, index)
        found = options[list(first.values())]
        return found[self.space.fits(found)]


def start_of(free: int, evaluations: int) -> int:
    """Return how many policies a search begins with before it learns: at most half of its evaluations, and one at least."""
    return min(wanted_start(free), max(evaluations // 2, 1))


def wanted_start(free: int) -> int:
    """Return how many policies a search should begin with, for so many free decisions."""
    return max(FEWEST, free + BEYOND)


def start_spending(problem: Problem, evaluations: int) -> list[Spending]:
    """Tell what evaluations go into; see `Solver.spending`."""
    free = sum(count > 1 for count in option_counts(problem))
    start = start_of(free, evaluations)
    return [
        Spending(
            "first policies: plans for the calibration errors under random weights, and random ones", start, wanted_start(free)
        ),
        Spending("policies with the largest expected improvement", evaluations - start),
    ]


class Surrogate(Solver):
    """A Gaussian process that learns from every trial, and chooses the next by expected improvement."""

    name = "surrogate"
    summary = "a Gaussian process learns from every trial, and chooses the next (Bayesian optimization)"
    chooses_ahead = True
    uses_trials = True
    shares = True
    races = True
    goals = (BEST.kind, CHEAPEST, TRADEOFF)

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Search until the evaluations are used, or there is nothing new."""
        self.begin(problem, session, seed).run()

    def begin(self, problem: Problem, session: Session, seed: int) -> Search:
        """Begin a search that is led a policy at a time; see `haq.solvers.sharing`.

        Args:
            problem: What is searched.
            session: Evaluates policies.
            seed: What everything random comes from.

        Returns:
            The search, of which nothing was evaluated yet.
        """
        return Search(problem, session, seed)

    def spending(self, problem: Problem, evaluations: int) -> list[Spending]:
        """Tell what the evaluations go into."""
        return start_spending(problem, evaluations)


def _expected(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Return the expected improvement on the best; equation 15 of Jones et al., 1998."""
    deviation = np.maximum(deviation, TINY)
    z = (mean - best) / deviation
    density = np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)
    gain: Floats = (mean - best) * ndtr(z) + deviation * density
    return gain


def _rounded(values: Floats) -> Floats:
    """Round to nine digits of the largest: what differs by less is the same, on any processor."""
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    return np.round(values / most, 9)
