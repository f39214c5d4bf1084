"""The integer programme again and again: what it proposes is evaluated, its model fitted to all trials, and solved anew.

Sensitivities say what one operand adds to the loss where all others are at their largest widths. What it adds beside others
that are quantized too, whole policies tell. The model has a term for every operand at every width, and one for every two
operands of a layer and of layers that follow each other. A Gaussian prior pulls the first towards a multiple of the
sensitivities, the more so the smaller these are, and the others towards nothing: ridge regression, computed as a Gaussian
process with a linear kernel (Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, section 2.1). How far
trials may pull is what makes them likeliest; where they don't support terms of two operands these stay nothing, and the model
is linear.

In turn the best policy by what is expected of the model is evaluated, and the best by a model that is drawn from what is known
of it (Thompson, "On the likelihood that one unknown probability exceeds another", Biometrika 1933), each time of the policies
that weren't evaluated yet. Without terms of two layers that best is exact. With them the programme is solved with these terms
as they are beside the solution before, until that stays as it is: the best of what it passes through is taken, and no more is
claimed of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

import quantizers as Q
from haq.problem.peak import padded
from haq.problem.problem import Problem
from haq.problem.programme import minimise
from haq.problem.sensitivity import largest_widths
from haq.solvers.base import Session, Trial
from hw_models.widths import PLACES, places

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SHARED = 0.7  # of the variance of an operand's terms, what all its widths have in common
LEAST_PART = 0.1  # of the mean sensitivity in the first solution, what every operand may vary by
MOST_PART = 3.0  # of the whole first solution, what none varies by more than
SPREADS = (0.15, 0.4, 1.0)  # standard deviations of terms of one operand, in parts of its sensitivity
OF_TWO = (0.0, 0.4)  # those of two operands, in parts of the product of their sensitivities
SUPPORT = 1.0  # nats by which terms of two operands must make trials likelier
GUESSED = 0.7  # standard deviation of the logarithm by which a sensitivity is taken to be wrong
NOISES = (0.1, 0.3)  # standard deviations of what is left, in parts of that of what was measured
FADING = 1.0  # how much less a trial says whose predicted loss is e times that of the first solution, or a part of it
LEAST_WEIGHT = 1e-3
CLIPPED = 2 / 3  # of the whole policies, those whose values are told apart; the others are as bad as the last of these
FEWEST = 3  # trials that anything can be told from
MOST_KNOWN = 400  # trials that are learned from
LINEARISATIONS = 4
NEXT_BEST = 20  # policies that were evaluated already, beside which the next best is looked for
PATIENCE = 40  # evaluations without a better policy, and one for each decision, after which nothing improves any more
STALE = 4  # models in a row that propose nothing new, after which there seems to be nothing
TINY = 1e-12


@dataclass
class Terms:
    """What a model adds up."""

    one: Floats  # of every operand at every width, shape (operands, 10): weights of all decisions, then activations
    two: dict[tuple[int, int], Floats] = field(default_factory=dict)  # by two operands, shape (10, 10) each


def search(problem: Problem, session: Session, first: Q.BitPolicy, loss_increase: Floats, seed: int) -> None:
    """Evaluate what the programme proposes, one solution after the other.

    It ends when the evaluations are used, when nothing improves, or when the programme proposes nothing new.

    Args:
        problem: What is searched.
        session: Evaluates policies, and knows those that were evaluated.
        first: The first solution, the best policy by sensitivities alone.
        loss_increase: How much (nats) every pair of widths raises the loss, shape (decisions, 10, 10).
        seed: What models are drawn with.
    """
    random = np.random.default_rng(seed)
    model = Model(problem, loss_increase, first)
    if session.left and not session.seen(first):
        session.evaluate(first)
    best, last_better, rounds, stale = session.best, session.used, 0, 0
    patience = PATIENCE + len(model.free)
    while session.left and stale < STALE and session.used - last_better < patience:
        # One loss and one value after the other: a policy of a lower loss isn't always one of a better value.
        of_value = rounds // 2 % 2 == 1
        chosen: list[Q.BitPolicy] = []
        knows = model.learn(session.everything, of_value)
        for place in range(min(session.ahead, session.left)):
            if not knows:
                terms = model.guessed(random)
            elif (rounds + place) % 2:
                terms = model.drawn(random)
            else:
                terms = model.expected()
            proposal = propose(model, terms, session, chosen)
            if proposal is not None:
                chosen.append(proposal)
        rounds += 1
        stale += 1
        session.expect(chosen, session.racing_beat())
        for policy in chosen:
            stale = 0
            session.evaluate(policy)
        if session.best is not best:
            best, last_better = session.best, session.used


def propose(model: Model, terms: Terms, session: Session, waiting: Sequence[Q.BitPolicy]) -> Q.BitPolicy | None:
    """Find the best policy within all budgets that wasn't evaluated; None if there seems to be none.

    Args:
        model: Whose terms these are.
        terms: What adds up.
        session: Knows what was evaluated.
        waiting: What was chosen and isn't evaluated yet.

    Returns:
        The policy.
    """
    # What was proposed before is likely to be the best again; what else was evaluated is met seldom.
    beside = list(model.proposed)
    for _ in range(NEXT_BEST):
        options = model.best(terms, beside)
        if options is None:
            return None
        policy = model.policy(options)
        model.proposed.append(options)
        if not session.seen(policy) and policy not in waiting:
            return policy
        beside.append(options)
    return None


class Model:
    """What is known of the loss, or of the value, of policies that weren't evaluated."""

    def __init__(self, problem: Problem, loss_increase: Floats, first: Q.BitPolicy) -> None:
        """Take the sensitivities.

        Args:
            problem: What is searched.
            loss_increase: How much (nats) every pair of widths raises the loss, shape (decisions, 10, 10).
            first: The best policy by these.
        """
        self.problem = problem
        count = len(problem.decisions)
        self.proposed: list[list[int]] = []  # options that were found already
        self.free = [index for index, decision in enumerate(problem.decisions) if len(decision.pairs) > 1]
        self.first_layers = [decision.layers[0] for decision in problem.decisions]
        self.option_places = [decision.places for decision in problem.decisions]
        widest = places(largest_widths(problem))
        rows = np.arange(count)
        # Beside the largest width of the other operand, what one adds is its own.
        of_weights = loss_increase[rows, :, widest[:, 1]]
        of_activations = loss_increase[rows, widest[:, 0], :]
        self.sensitivities = np.concatenate([of_weights, of_activations])
        self.around = max(float(self._predicted(self._places(first)[None])[0]), TINY)
        least = LEAST_PART * self.around / len(self.sensitivities)
        self.scale = np.minimum(self.sensitivities + least, MOST_PART * self.around)
        self.alike = SHARED + (1 - SHARED) * np.eye(PLACES)
        self.twos = [(index, index + count) for index in self.free]
        for one, other in zip(self.free, self.free[1:], strict=False):
            self.twos += [(one, other), (one, other + count), (one + count, other), (one + count, other + count)]

    def learn(self, trials: Sequence[Trial], of_value: bool) -> bool:
        """Fit the model to trials.

        Args:
            trials: What was evaluated.
            of_value: Whether to the objective's value, rather than to the loss.

        Returns:
            Whether there are enough of them whose outputs are finite.
        """
        values = np.array([trial.loss for trial in trials])
        if of_value:
            values = np.array([-trial.evaluation.score for trial in trials])
        sound = np.isfinite(values) & np.isfinite([trial.loss for trial in trials])
        if sound.sum() < FEWEST:
            return False
        # Outputs that aren't finite are as bad as the worst that are.
        values = np.where(sound, values, values[sound].max())
        widths = np.array([self._places(trial.policy) for trial in trials])
        predicted = self._predicted(widths)
        weights = 1 / (1 + np.square(FADING * np.log(np.maximum(predicted, TINY) / self.around)))
        if self.problem.evaluator.count:
            # What was cut short is known of a part of the samples.
            weights *= np.array([trial.evaluation.images for trial in trials]) / self.problem.evaluator.count
        near = np.sort(np.argsort(-weights, kind="stable")[:MOST_KNOWN])
        self.widths = widths[near]
        self.weights = np.maximum(weights[near], LEAST_WEIGHT)
        self.values = _clipped(values[near], self.weights)
        self.design = np.stack([np.ones(len(near)), predicted[near]], axis=1)
        self._fit()
        return True

    def _fit(self) -> None:
        """Choose the variances under which what was measured is likeliest, and solve for them."""
        root = np.sqrt(self.weights)
        slope = float(np.linalg.lstsq(self.design * root[:, None], self.values * root, rcond=None)[0][1])
        average = np.average(self.values, weights=self.weights)
        deviation = math.sqrt(float(np.average(np.square(self.values - average), weights=self.weights)))
        slope = max(slope, LEAST_PART * deviation / self.around, TINY)
        ones, twos = self._covariances()
        best = -math.inf
        for of_two in OF_TWO:
            for spread in SPREADS:
                shared = np.square(slope * spread) * ones + np.square(slope * of_two) * twos
                for part in NOISES:
                    noise = np.maximum(np.square(part * deviation), TINY) / self.weights
                    factor = cho_factor(shared + np.diag(noise), lower=True)
                    likelihood, line, dual = self._solved(factor)
                    if of_two:
                        likelihood -= SUPPORT
                    if likelihood > best:
                        best = likelihood
                        self.spread, self.of_two, self.noise = slope * spread, slope * of_two, np.sqrt(noise)
                        self.factor, self.line, self.dual = factor, line, dual

    def _solved(self, factor: tuple[Floats, bool]) -> tuple[float, Floats, Floats]:
        """Return the logarithm of the likelihood but for a constant, the line, and what is left of it, solved for."""
        left = cho_solve(factor, self.design)
        within = self.design.T @ left
        line = np.linalg.solve(within + TINY * np.trace(within) * np.eye(2), left.T @ self.values)
        if line[1] < 0:
            # More bits are never taken to be worse.
            line = np.array([np.average(self.values, weights=self.weights), 0.0])
        rest = self.values - self.design @ line
        dual = cho_solve(factor, rest)
        halves = float(rest @ dual) / 2 + float(np.log(np.diag(factor[0])).sum()) + float(np.linalg.slogdet(within)[1]) / 2
        return -halves, line, dual

    def _covariances(self) -> tuple[Floats, Floats]:
        """Return what trials have in common of terms of one operand, and of two, shape (trials, trials) each."""
        count = len(self.widths)
        ones, twos = np.zeros((count, count)), np.zeros((count, count))
        common = [self._common(operand, self.widths[:, operand]) for operand in range(len(self.scale))]
        by_trial = [of[self.widths[:, operand]] for operand, of in enumerate(common)]
        for of in by_trial:
            ones += of
        for one, other in self.twos:
            twos += by_trial[one] * by_trial[other]
        return ones, twos / self.around**2

    def _common(self, operand: int, widths: Integers) -> Floats:
        """Return the covariance of an operand's terms at all widths with those at the given ones, shape (10, given)."""
        found: Floats = self.scale[operand][:, None] * self.alike[:, widths] * self.scale[operand][widths]
        return found

    def expected(self) -> Terms:
        """Return the terms as they are expected to be."""
        return self._terms(self.dual, Terms(np.zeros(self.scale.shape)))

    def drawn(self, random: np.random.Generator) -> Terms:
        """Draw terms from what is known of them: prior ones, corrected by what trials say against them.

        Matheron's rule; Wilson et al., "Efficiently sampling functions from Gaussian process posteriors", ICML 2020.
        """
        root = np.linalg.cholesky(self.alike)
        prior = Terms(self.spread * self.scale * (random.standard_normal(self.scale.shape) @ root.T))
        of_trials = self._values_of(prior)
        if self.of_two:
            for one, other in self.twos:
                drawn = root @ random.standard_normal((PLACES, PLACES)) @ root.T
                drawn *= self.of_two / self.around * self.scale[one][:, None] * self.scale[other]
                prior.two[one, other] = drawn
                of_trials = of_trials + drawn[self.widths[:, one], self.widths[:, other]]
        of_trials = of_trials + self.noise * random.standard_normal(len(self.values))
        rest = self.values - self.design @ self.line - of_trials
        return self._terms(cho_solve(self.factor, rest), prior)

    def guessed(self, random: np.random.Generator) -> Terms:
        """Draw terms by sensitivities alone, as long as nothing else is known: each operand's wrong by a factor."""
        factors = np.exp(GUESSED * random.standard_normal((len(self.sensitivities), 1)))
        return Terms(self.sensitivities * factors)

    def _values_of(self, terms: Terms) -> Floats:
        return terms.one[np.arange(len(terms.one)), self.widths].sum(1)

    def _terms(self, dual: Floats, prior: Terms) -> Terms:
        """Add the line, and what trials say beside it, to prior terms."""
        one = prior.one + self.line[1] * self.sensitivities
        common = [self._common(operand, self.widths[:, operand]) for operand in range(len(self.scale))]
        for operand, of in enumerate(common):
            one[operand] += np.square(self.spread) * (of @ dual)
        two = dict(prior.two)
        if self.of_two:
            for first, second in self.twos:
                learned = np.square(self.of_two / self.around) * ((common[first] * dual) @ common[second].T)
                two[first, second] = two.get((first, second), 0.0) + learned
        return Terms(one, two)

    def best(self, terms: Terms, beside: Sequence[Sequence[int]]) -> list[int] | None:
        """Find the options with the least sum of terms within all budgets; with terms of two layers, about the least.

        Args:
            terms: What adds up.
            beside: Options of all decisions that are not to be found again.

        Returns:
            An option for every decision; None if nothing else fits.
        """
        losses = self._alone(terms)
        between = self._between(terms)
        found = within_budgets(self.problem, losses, beside)
        if found is None or not between:
            return found
        kept, least = found, self._total(losses, between, found)
        for _ in range(LINEARISATIONS):
            now = found
            found = within_budgets(self.problem, self._beside(losses, between, now), beside)
            if found is None or found == now:
                break
            total = self._total(losses, between, found)
            if total < least:
                kept, least = found, total
        return kept

    def _alone(self, terms: Terms) -> list[Floats]:
        """Return what options add by themselves, by decision."""
        count = len(self.option_places)
        found = []
        for index, of in enumerate(self.option_places):
            loss = terms.one[index, of[:, 0]] + terms.one[index + count, of[:, 1]]
            if (index, index + count) in terms.two:
                loss = loss + terms.two[index, index + count][of[:, 0], of[:, 1]]
            found.append(loss)
        return found

    def _between(self, terms: Terms) -> dict[tuple[int, int], Floats]:
        """Return what options of two decisions add together, shape (options, options), by decisions."""
        count = len(self.option_places)
        found: dict[tuple[int, int], Floats] = {}
        for (first, second), table in terms.two.items():
            one, other = first % count, second % count
            if one == other:
                continue
            rows = self.option_places[one][:, first // count]
            columns = self.option_places[other][:, second // count]
            found[one, other] = found.get((one, other), 0.0) + table[np.ix_(rows, columns)]
        return found

    @staticmethod
    def _beside(losses: list[Floats], between: dict[tuple[int, int], Floats], now: list[int]) -> list[Floats]:
        """Return what options add beside those that all other decisions take now."""
        found = list(losses)
        for (one, other), table in between.items():
            # Half of it each, so that the sum counts what two add together once.
            found[one] = found[one] + table[:, now[other]] / 2
            found[other] = found[other] + table[now[one]] / 2
        return found

    @staticmethod
    def _total(losses: list[Floats], between: dict[tuple[int, int], Floats], options: list[int]) -> float:
        total = sum(float(loss[pick]) for loss, pick in zip(losses, options, strict=True))
        return total + sum(float(table[options[one], options[other]]) for (one, other), table in between.items())

    def policy(self, options: Sequence[int]) -> Q.BitPolicy:
        """Make the policy of an option for every decision."""
        decisions = self.problem.decisions
        return self.problem.decide(decision.pairs[pick] for decision, pick in zip(decisions, options, strict=True))

    def _places(self, policy: Q.BitPolicy) -> Integers:
        """Return where the widths of every decision's operands stand in a table: weights of all, then activations."""
        w, a = self.problem.bit_arrays(policy)
        return np.concatenate([places(w[self.first_layers]), places(a[self.first_layers])])

    def _predicted(self, widths: Integers) -> Floats:
        """Return what sensitivities say that policies, shape (policies, operands), add to the loss."""
        found: Floats = self.sensitivities[np.arange(len(self.sensitivities)), widths].sum(1)
        return found


def within_budgets(problem: Problem, losses: Sequence[Floats], beside: Sequence[Sequence[int]] = ()) -> list[int] | None:
    """Find the options with the least total loss within all budgets, exactly.

    Args:
        problem: What is searched.
        losses: What every option adds, by decision.
        beside: Options of all decisions that are not to be found again.

    Returns:
        An option for every decision; None if nothing else fits.
    """
    if problem.several is not None:
        return problem.several.best(losses, beside=beside)
    loss = padded(losses, np.inf)
    price = padded([decision.prices for decision in problem.decisions], np.inf)
    # What is no cheaper than another option and adds more is never part of the best.
    no_worse = (loss[:, :, None] <= loss[:, None, :]) & (price[:, :, None] <= price[:, None, :])
    better = no_worse & ~no_worse.transpose(0, 2, 1)
    available = np.isfinite(loss) & ~better.any(1)
    found = minimise(loss, available, [(price, problem.limit)], beside=beside)
    if found is None:
        return None
    options: list[int] = found.tolist()
    return options


def _clipped(values: Floats, weights: Floats) -> Floats:
    """Make the worst values, of those that say most, alike: how bad they are says nothing of the best."""
    most = float(np.quantile(values[weights >= np.median(weights)], CLIPPED))
    return np.minimum(values, most)
