"""Problems that are made up at random, without a network: there are as many as one wants, and a policy costs no forward pass.

An agent that is to know problems that it never saw has to be trained on more of them than there are networks whose policies
were all evaluated. `draw(generator)` makes one:

Workload    3 to 10 blocks: a convolution (3x3 or 5x5), a separable one (depthwise, then pointwise) or a pointwise one, some
            with stride 2, on images of 16 to 96 pixels, and one to three linear layers behind them; or linear layers alone.
            Channels begin at 8 to 32 and grow where the image shrinks.
Hardware    A shipped target that prices latency, energy or storage, and does at least `LEAST_OPTIONS` pairs of widths.
Decisions   First and last layer at 8 bits, or the nearest that the target does; the others may take random pairs of 1 to 8
            bits, 4 to 12 of them or all, without those that cost as much as a pair with more bits.
Budget      Of the way from the cheapest policy to the dearest, a share from 0.1 to 0.7.
Errors      Of an operand at b bits, relative and squared: x / (1 + x) with x = k / (2^b - 1/2)^2, which is a uniform
            quantizer's with a clipped range. k is log-normal around 2.3 for weights and 0.5 for activations, about as in
            the table `digres`.
Response    Every operand has a weight s, log-normal with a deviation from 0.4 to 1.2 (at random, as is all that follows), and
            adds d = s e^p, p from 0.5 to 1. Operands that follow each other interact: c sqrt(d d') with a sign and size of
            their own, as their errors add up or cancel. The damage D is the sum, in units of what a random policy within the
            budget has. Accuracy falls from the float network's to chance with exp(-t D^q), q from 0.8 to 1.6: it saturates at
            both ends. The loss rises with it, up to that of chance.

Such sums explain about 0.88 of the variance of accuracy in the table `digres`, and 0.94 of that of the divergence's logarithm.
No trend of kinds or places of layers is put in: what is to be learned of these has to come from networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import hw_models
import quantizers as Q
from haq.problem.decision import Decision, priced, ten_places
from haq.problem.evaluator import Evaluation
from hw_models.storage import BITS
from hw_models.target import price
from hw_models.widths import FLOAT, at_places, pair_words
from hw_models.workload import Call, Layer, Workload

Floats = NDArray[np.float64]
Options = NDArray[np.intp]

METRICS = ("latency", "energy", "storage")
LEAST_OPTIONS = 6  # of a decision, on average
LEAST_DECISIONS = 4  # that are free
JUDGED = 64  # random policies that the damage is counted in
SHARES = (0.1, 0.7)  # of the way from the cheapest policy to the dearest: budgets
TRIES = 100  # problems drawn until one has something to decide


@dataclass(frozen=True)
class Response:
    """What policies of a made-up problem are worth: a function of the options of all its decisions.

    Attributes:
        damage: For each decision what each option's weights and activations add, shape (options, 2).
        interactions: Of operands that follow each other, shape (2 x decisions - 1,).
        unit: The damage that counts as 1.
        steepness: t of the accuracy's exp(-t D^q).
        power: q of it.
        float_accuracy: The accuracy without damage.
        classes: The number of classes, of which chance knows one.
    """

    damage: list[Floats]
    interactions: Floats
    unit: float
    steepness: float
    power: float
    float_accuracy: float
    classes: int

    def total(self, options: Options) -> Floats:
        """Sum up the damage of option vectors (n, decisions) to shape (n,), in `unit`."""
        operands = np.concatenate([damage[options[:, i]] for i, damage in enumerate(self.damage)], axis=1)
        neighbours = np.sqrt(operands[:, :-1] * operands[:, 1:])
        summed: Floats = operands.sum(1) + neighbours @ self.interactions
        # Errors may cancel, but not to less than nothing.
        return np.maximum(summed, 0.05 * operands.sum(1)) / self.unit

    def judge(self, options: Options) -> tuple[Floats, Floats]:
        """Tell accuracy (0 to 1) and loss (nats) of option vectors (n, decisions), shape (n,) each."""
        kept = np.exp(-self.steepness * self.total(options) ** self.power)
        chance = 1 / self.classes
        accuracy = chance + (self.float_accuracy - chance) * kept
        least = -math.log(self.float_accuracy)
        loss = least + (math.log(self.classes) - least) * (1 - kept)
        return accuracy, loss


class Judge(Protocol):
    """Tells what policies are worth, many of them at once and without a network."""

    @property
    def float_accuracy(self) -> float:
        """Return the accuracy of the float network."""
        ...

    def judge(self, options: Options) -> tuple[Floats, Floats]:
        """Tell accuracy (0 to 1) and loss (nats) of option vectors (n, decisions), shape (n,) each."""
        ...


@dataclass
class Drawn:
    """A problem to train on: what the environments need of one (`envs.SearchProblem`), and what any policy is worth.

    Attributes:
        name: What it is called.
        metric: What is limited.
        workload: Its layers.
        cost: In the metric's unit, shape (layers, 10, 10).
        decisions: What may be chosen.
        quantization_error: Of weights and activations by width, shape (decisions, 2, 10).
        limit: The budget, in the metric's unit.
        response: What policies are worth.
    """

    name: str
    metric: str
    workload: Workload
    cost: Floats
    decisions: list[Decision]
    quantization_error: Floats
    limit: float
    response: Judge

    @property
    def float_accuracy(self) -> float:
        """Return the accuracy of the float network."""
        return self.response.float_accuracy

    def decide(self, pairs: Iterable[Iterable[int]]) -> Q.BitPolicy:
        """Make a policy of one pair of widths for each of the decisions; float is 32."""
        found: dict[str, tuple[int | None, int | None]] = {}
        for decision, (w, a) in zip(self.decisions, pairs, strict=True):
            for layer in decision.layers:
                found[self.workload.names[layer]] = (_policy_width(w), _policy_width(a))
        return Q.BitPolicy({name: found[name] for name in self.workload.names})

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Tell accuracy and loss of a policy. Raises ValueError, naming the layer, for a pair that can't be chosen."""
        options = []
        for decision in self.decisions:
            name = self.workload.names[decision.layers[0]]
            pair = [width or FLOAT for width in policy[name]]
            found = np.flatnonzero((decision.pairs == pair).all(1))
            if not len(found):
                raise ValueError(f"layer {name!r} of {self.name} can't have {pair_words(*policy[name])}")
            options.append(int(found[0]))
        accuracy, loss = self.response.judge(np.array([options]))
        return Evaluation(float(accuracy[0]), float(loss[0]), 1)


def _policy_width(width: int) -> int | None:
    """Return a width as policies hold it: None for float."""
    if width == FLOAT:
        return None
    return int(width)


def draw(generator: np.random.Generator) -> Drawn:
    """Make up a problem.

    Args:
        generator: What everything random comes from.

    Returns:
        The problem.

    Raises:
        RuntimeError: If many problems in a row have nothing to decide.
    """
    for _ in range(TRIES):
        workload = draw_workload(generator)
        target, metric, cost, supported = priced_somewhere(workload, generator)
        decisions = _draw_decisions(workload, cost, supported, generator)
        counts = [len(decision.pairs) for decision in decisions if len(decision.pairs) > 1]
        if len(counts) >= LEAST_DECISIONS and np.mean(counts) >= LEAST_OPTIONS:
            break
    else:
        raise RuntimeError(f"{TRIES} made-up problems in a row had nothing to decide: the shipped targets do too few widths")
    low, high = (sum(float(pick(decision.prices)) for decision in decisions) for pick in (np.min, np.max))
    limit = low + generator.uniform(*SHARES) * (high - low)
    errors = _draw_errors(len(workload), generator)
    response = _draw_response(decisions, errors, limit, generator)
    return Drawn(f"synthetic on {target}", metric, workload, cost, decisions, errors, limit, response)


def draw_workload(generator: np.random.Generator) -> Workload:
    """Make up the layers of a network."""
    layers: list[Layer] = []
    classes = int(generator.choice([2, 10, 10, 100]))
    features = int(generator.choice([32, 64, 128]))
    if generator.random() < 0.85:
        features = _add_blocks(layers, generator)
    for _ in range(int(generator.integers(0, 3)) + 4 * (not layers)):
        wide = int(generator.choice([32, 48, 64, 128]))
        layers.append(_linear(len(layers), features, wide))
        features = wide
    layers.append(_linear(len(layers), features, classes))
    return Workload(tuple(layers))


def _add_blocks(layers: list[Layer], generator: np.random.Generator) -> int:
    """Add convolutions; returns the features that they leave."""
    size = int(generator.choice([16, 28, 32, 64, 96]))
    channels = int(generator.choice([1, 3]))
    wide = int(generator.choice([8, 16, 24, 32]))
    for block in range(int(generator.integers(3, 11))):
        stride = 1
        if size > 4 and (block == 0 or generator.random() < 0.35):
            stride = 2
            wide = int(wide * generator.choice([1, 1.5, 2]))
        kind = generator.choice(["conv", "separable", "pointwise"], p=[0.5, 0.35, 0.15])
        if block == 0:
            kind = "conv"
        kernel = int(generator.choice([3, 3, 5]))
        if kind == "conv":
            layers.append(_conv(len(layers), "conv", channels, wide, kernel, stride, size))
        else:
            if kind == "separable":
                layers.append(_conv(len(layers), "depthwise", channels, channels, kernel, stride, size))
            else:
                stride = 1
            layers.append(_conv(len(layers), "pointwise", channels, wide, 1, 1, -(-size // stride)))
        channels = wide
        size = -(-size // stride)
    if generator.random() < 0.5:
        return channels
    return channels * 4


def _conv(number: int, kind: str, channels: int, out: int, kernel: int, stride: int, size: int) -> Layer:
    """Make a convolution of a square image that keeps its size, but for the stride."""
    groups = 1
    if kind == "depthwise":
        groups = channels
    after = -(-size // stride)
    return Layer(
        name=f"{number}",
        kind=kind,
        in_channels=channels,
        out_channels=out,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dilation=(1, 1),
        groups=groups,
        bias=True,
        calls=(Call((size, size), (after, after)),),
    )


def _linear(number: int, features: int, out: int) -> Layer:
    """Make a linear layer that is called on one row."""
    one = (1, 1)
    return Layer(f"{number}", "linear", features, out, one, one, one, one, 1, True, (Call(one, one),))


def priced_somewhere(workload: Workload, generator: np.random.Generator) -> tuple[str, str, Floats, NDArray[np.bool_]]:
    """Price layers on a random shipped target.

    Args:
        workload: The layers.
        generator: What is drawn from.

    Returns:
        The target's name, a metric, costs and what is supported, shape (layers, 10, 10).
    """
    name = str(generator.choice(hw_models.target_names()))
    table = price(_target(name), workload)
    metric = str(generator.choice([metric for metric in METRICS if metric in table.metrics]))
    return name, metric, priced(table, metric), table.supported


@functools.cache
def _target(name: str) -> hw_models.Target:
    """Load a shipped target, once."""
    return hw_models.load_target(name)


def _draw_decisions(
    workload: Workload, cost: Floats, supported: NDArray[np.bool_], generator: np.random.Generator
) -> list[Decision]:
    """Draw what may be chosen, the same pairs for all layers but the first and the last."""
    few = np.zeros(supported.shape[1:], bool)
    few[:BITS, :BITS] = True
    if generator.random() < 0.7:
        places = generator.choice(BITS * BITS, int(generator.integers(4, 13)), replace=False)
        few[:] = False
        few[places // BITS, places % BITS] = True
    made = []
    for index in range(len(workload)):
        allowed = supported[index] & few
        if index in (0, len(workload) - 1):
            allowed = _nearest_to_8_bits(supported[index])
        elif not allowed.any():
            allowed = supported[index]
        worth = hw_models.undominated(cost[index][None], allowed[None])[0]
        made.append(Decision((index,), at_places(np.argwhere(worth)), np.extract(worth, cost[index])))
    return made


def _nearest_to_8_bits(supported: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the pair that is nearest to 8 bits of those that are supported, shape (10, 10)."""
    found = np.argwhere(supported)
    nearest = found[np.abs(found - (BITS - 1)).sum(1).argmin()]
    marked = np.zeros_like(supported)
    marked[tuple(nearest)] = True
    return marked


def _draw_errors(decisions: int, generator: np.random.Generator) -> Floats:
    """Draw relative squared errors of weights and activations by width, shape (decisions, 2, 10)."""
    levels = (2.0 ** np.arange(1, BITS + 1) - 0.5) ** 2
    scale = np.exp(generator.normal([math.log(2.3), math.log(0.5)], [0.3, 0.4], (decisions, 2)))
    ratio = scale[:, :, None] / levels
    errors = ratio / (1 + ratio) * np.exp(generator.normal(0, 0.05, ratio.shape))
    # A wider operand never has the larger error.
    errors = np.minimum.accumulate(errors, axis=2)
    return np.array([[ten_places(row, 0.0) for row in of_decision] for of_decision in errors])


def _draw_response(decisions: list[Decision], errors: Floats, limit: float, generator: np.random.Generator) -> Response:
    """Draw what policies are worth; see the head of this file."""
    power = generator.uniform(0.5, 1.0)
    deviation = generator.uniform(0.4, 1.2)
    weights = np.exp(generator.normal(0, deviation, (len(decisions), 2)))
    damage = []
    for decision, of_decision, weight in zip(decisions, errors, weights, strict=True):
        by_operand = [of_decision[operand][decision.places[:, operand]] for operand in (0, 1)]
        damage.append(weight * np.stack(by_operand, axis=1) ** power)
    interactions = generator.uniform(0, 0.6) * generator.normal(0, 1, 2 * len(decisions) - 1)
    classes = int(generator.choice([2, 10, 100]))
    accuracy = generator.uniform(max(0.6, 1.5 / classes), 0.97)
    steepness = math.exp(generator.uniform(math.log(0.05), math.log(1.0)))
    raw = Response(damage, interactions, 1.0, steepness, generator.uniform(0.8, 1.6), accuracy, classes)
    unit = float(np.median(raw.total(random_within(decisions, limit, JUDGED, generator))))
    return Response(damage, interactions, unit, raw.steepness, raw.power, accuracy, classes)


def random_within(decisions: list[Decision], limit: float, count: int, generator: np.random.Generator) -> Options:
    """Draw policies within a budget: random ones, of which random decisions become the cheapest until it holds.

    Args:
        decisions: What may be chosen.
        limit: The budget, in the prices' unit.
        count: How many.
        generator: What is drawn from.

    Returns:
        Option vectors (count, decisions).
    """
    chosen = np.stack([generator.integers(len(decision.pairs), size=count) for decision in decisions], axis=1)
    cheapest = [int(decision.prices.argmin()) for decision in decisions]
    for row in chosen:
        total = sum(float(decision.prices[option]) for decision, option in zip(decisions, row, strict=True))
        for index in generator.permutation(len(decisions)):
            if total <= limit:
                break
            prices = decisions[index].prices
            total += float(prices[cheapest[index]] - prices[row[index]])
            row[index] = cheapest[index]
    return chosen
