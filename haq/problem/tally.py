"""What is told of a policy while its outputs come in, batch by batch."""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haq.problem.guarding import apart, is_ours
from haq.problem.objective import (
    BlackBox,
    MetricObjective,
    NotFinite,
    Objective,
    ValueObjective,
    attacked_inputs,
    mean_loss,
    named,
    per_sample,
    single_number,
    value_of,
    which_correct,
)
from quantizers.calling import count_of, leaves, samples, to_device

if TYPE_CHECKING:
    from haq.data import Split
    from haq.networks import Network

LEAST = 3  # samples of a batch in which a sample's value is looked at with others beside it
BATCH = 125  # samples whose divergence is summed at a time: the order of a sum is part of the result


class Evaluation(NamedTuple):
    """What a policy was measured to give.

    A network whose outputs aren't all finite is worth nothing: its value is the worst that there is (0 for a share), and its
    loss and divergence are infinite.

    Attributes:
        accuracy: The objective's value; of classification the share of samples that count as correct, 0 to 1.
        loss: The objective's mean loss (nats, for class scores).
        images: The number of samples that both stand on.
        divergence: Where there is a teacher, the mean divergence of the outputs from its own, on the samples as they are: of
            Kullback and Leibler in nats, or what the objective's `distribution` says.
        higher_is_better: Whether a larger value is better.
        error: The standard error of a value that is a mean of values by sample, no shares; None where it isn't known.
    """

    accuracy: float
    loss: float
    images: int
    divergence: float | None = None
    higher_is_better: bool = True
    error: float | None = None

    @property
    def value(self) -> float:
        """Return the objective's value."""
        return self.accuracy

    @property
    def score(self) -> float:
        """Return a number that is larger for a better value."""
        if self.higher_is_better:
            return self.accuracy
        return -self.accuracy

    def together(self, other: Evaluation) -> Evaluation:
        """Return what a policy is worth on these samples and others: means weighted by how many they are.

        Args:
            other: What the same policy is worth on other samples.

        Returns:
            The evaluation on all of them.
        """
        count = self.images + other.images

        def mean(one: float, another: float) -> float:
            return (self.images * one + other.images * another) / count

        divergence = None
        if self.divergence is not None and other.divergence is not None:
            divergence = mean(self.divergence, other.divergence)
        value, loss = mean(self.accuracy, other.accuracy), mean(self.loss, other.loss)
        return Evaluation(value, loss, count, divergence, self.higher_is_better)


def worthless(objective: Objective, count: int, has_teacher: bool) -> Evaluation:
    """Return what a network whose outputs aren't finite is worth.

    Args:
        objective: What it is judged by.
        count: The number of samples.
        has_teacher: Whether a divergence is told.

    Returns:
        The worst value, and an infinite loss.
    """
    divergence = None
    if has_teacher:
        divergence = math.inf
    return Evaluation(objective.worst, math.inf, count, divergence, objective.higher_is_better)


class Tally(Protocol):
    """Takes the outputs of one batch after the other."""

    seen: int  # samples so far

    def add(self, outputs: tuple[Any, ...], targets: Any, expected: Any, count: int) -> None:
        """Take the outputs of a batch.

        Args:
            outputs: Those of the batch as it is, and of every version of it that is attacked.
            targets: Of the batch, on the same device.
            expected: The teacher's outputs, if the divergence from them is to be told.
            count: The number of samples.

        Raises:
            NotFinite: For outputs that are NaN.
            ValueError: Naming the objective, for what it may not return.
        """

    def good(self) -> float | None:
        """Return how much of the samples so far is good, each from 0 to 1; None where values are no such thing."""

    def result(self) -> Evaluation:
        """Tell what all is worth that was taken."""

    def by_sample(self) -> Tensor | None:
        """Tell the value of every sample that was taken, whose mean `result` tells; None where values are no such mean."""


class ScoreTally:
    """Of class scores: which samples are answered rightly, and the mean loss.

    Scores are kept, and summed in the end in the order in which the samples were given.
    """

    def __init__(self, objective: Objective, order: Tensor, expected: Tensor | None) -> None:
        """Begin with nothing.

        Args:
            objective: Of class scores.
            order: The place of every sample, as it was given, in the order in which they are looked at.
            expected: The teacher's scores, in the order in which samples were given.
        """
        self.objective = objective
        self.order = order
        self.expected = expected
        self.seen = 0
        self.right = 0
        self.correct: list[Tensor] = []
        self.parts: list[tuple[Tensor, ...]] = []
        self.labels: list[Tensor] = []

    def add(self, outputs: tuple[Any, ...], targets: Any, expected: Any, count: int) -> None:
        """Take the scores of a batch, and its labels.

        Args:
            outputs: As in `Tally.add`.
            targets: The labels.
            expected: Plays no part: scores are kept, and held against all of the teacher's in the end.
            count: The number of samples.

        Raises:
            NotFinite: If a score is no number.
        """
        outputs = tuple(part.cpu() for part in outputs)
        if any(bool(part.isnan().any()) for part in outputs):
            raise NotFinite
        correct = which_correct(self.objective, outputs, targets)
        self.correct.append(correct.cpu())
        self.right += int(correct.sum())
        self.seen += len(targets)
        self.parts.append(outputs)
        self.labels.append(targets)

    def good(self) -> float | None:
        """Return the number of samples so far that count as correct."""
        return self.right

    def result(self) -> Evaluation:
        """Tell what all is worth that was taken."""
        looked_at = self.order[: self.seen]
        back, index = looked_at.argsort(), looked_at.sort().values
        outputs = tuple(torch.cat(part)[back] for part in zip(*self.parts, strict=True))
        divergence = None
        if self.expected is not None:
            divergence = _divergence(outputs[0], self.expected[index]) / self.seen
        loss = mean_loss(self.objective, outputs, torch.cat(self.labels)[back], divergence)
        return Evaluation(self.right / self.seen, loss, self.seen, divergence)

    def by_sample(self) -> Tensor | None:
        """Tell which samples are answered rightly, booleans in the order in which samples were given."""
        return torch.cat(self.correct)[self.order[: self.seen].argsort()]


class ValueTally:
    """Of values by sample, or of a metric; losses and divergences are kept by sample."""

    def __init__(self, objective: ValueObjective, order: Tensor | None = None) -> None:
        """Begin with nothing.

        Args:
            objective: Gives every sample a value, or has a metric.
            order: The place of every sample, as it was given, in the order in which they are looked at; None: in this order.
        """
        self.objective = objective
        self.order = order
        self.seen = 0
        self.metrics: list[Any] = []  # one for every version of the inputs
        self.values: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.divergences: list[Tensor] = []
        self._sum, self._summed = 0.0, 0  # of how many batches the sum is

    def add(self, outputs: tuple[Any, ...], targets: Any, expected: Any, count: int) -> None:
        """Take the outputs of a batch.

        Args:
            outputs: As in `Tally.add`.
            targets: Likewise.
            expected: Likewise.
            count: Likewise.

        Raises:
            NotFinite: If an output is no number.
            ValueError: If an objective's `values` returns None.
        """
        objective = self.objective
        for leaf in leaves(outputs):
            if leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise NotFinite
        if isinstance(objective, MetricObjective):
            self._update(objective, outputs, targets)
        else:
            values = self._worst_of("values", outputs, targets, count, objective.higher_is_better)
            if values is None:
                raise ValueError(f"`values` of objective {objective.name!r} must return a tensor, not None")
            self.values.append(values)
        losses = self._worst_of("losses", outputs, targets, count, False)
        if losses is not None:
            self.losses.append(losses)
        if expected is not None and objective.distribution is not None:
            # In float64, as sums of many small differences are.
            apart = objective.divergence(outputs[0], expected)
            self.divergences.append(apart.detach().double().cpu())
        self.seen += count

    def _update(self, objective: MetricObjective, outputs: tuple[Any, ...], targets: Any) -> None:
        with named(objective, "metric"):
            for number, one in enumerate(outputs):
                if len(self.metrics) <= number:
                    metric = _emptied(objective, objective.metric_for(one, targets))
                    found = leaves(one)
                    if found:
                        metric = metric.to(found[0].device)
                    self.metrics.append(metric)
                objective.update(self.metrics[number], apart(objective, one), apart(objective, targets))

    def _worst_of(self, method: str, outputs: tuple[Any, ...], targets: Any, count: int, higher: bool) -> Tensor | None:
        """Tell by sample the worst of what its versions are worth; None if the objective tells nothing."""
        found: list[Tensor] = []
        for one in outputs:
            with named(self.objective, method):
                given = getattr(self.objective, method)(apart(self.objective, one), apart(self.objective, targets))
            if given is None:
                return None
            found.append(per_sample(self.objective, method, given, count))
        stacked = torch.stack(found)
        if higher:
            return stacked.amin(0)
        return stacked.amax(0)

    def good(self) -> float | None:
        """Return the sum of the values, or of 1 less each where smaller ones are better; None unless all are from 0 to 1."""
        for values in self.values[self._summed :]:
            if not bool(((values >= 0) & (values <= 1)).all()):
                self._sum = math.nan
            elif self.objective.higher_is_better:
                self._sum += float(values.sum())
            else:
                self._sum += float((1 - values).sum())
        self._summed = len(self.values)
        if not self.values or math.isnan(self._sum):
            return None
        return self._sum

    def result(self) -> Evaluation:
        """Tell what all is worth that was taken."""
        objective = self.objective
        error = None
        if isinstance(objective, MetricObjective):
            value = self._worst_metric(objective)
        else:
            values = self._in_order(self.values)
            value = float(values.mean())
            if len(values) > 1:
                error = float(values.std() / len(values) ** 0.5)
        divergence = None
        if self.divergences:
            divergence = float(self._in_order(self.divergences).mean())
        loss = -objective.signed(value)
        if self.losses:
            loss = float(self._in_order(self.losses).mean())
        elif divergence is not None:
            loss = divergence
        return Evaluation(value, loss, self.seen, divergence, objective.higher_is_better, error)

    def by_sample(self) -> Tensor | None:
        """Tell the value of every sample, float64, in the order in which samples were given; None of a metric."""
        if isinstance(self.objective, MetricObjective):
            return None
        return self._in_order(self.values)

    def _worst_metric(self, objective: MetricObjective) -> float:
        """Tell the worst of the metrics of all versions of the inputs; NaN if there is one."""
        values: list[float] = []
        for metric in self.metrics:
            with named(objective, "metric"):
                given = objective.compute(metric)
            values.append(single_number(objective, "metric", given))
        if any(map(math.isnan, values)):
            return math.nan
        return min(values, key=objective.signed)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Put what is told by sample into the order in which samples were given: that of a sum is part of the result."""
        found = torch.cat(parts)
        if self.order is None:
            return found
        return found[self.order[: len(found)].argsort()]


def _emptied(objective: MetricObjective, metric: Any) -> Any:
    """Return an empty metric of its own for every network, also where somebody's objective returns the same one again."""
    if is_ours(objective) or not hasattr(metric, "reset"):
        return metric
    made = copy.deepcopy(metric)
    made.reset()
    return made


def check_by_sample(objective: Objective, outputs: Any, targets: Any, count: int) -> None:
    """Check that the value of a sample is its own, whatever other samples are beside it in a batch.

    It isn't where outputs (N, 1) are held against targets (N,): their difference has the shape (N, N).

    Args:
        objective: Somebody's, with values by sample; of all others nothing is asked.
        outputs: Of a batch.
        targets: Likewise.
        count: The number of samples.

    Raises:
        ValueError: Naming both shapes, where it is for them that values depend on other samples.
    """
    if not isinstance(objective, ValueObjective) or isinstance(objective, MetricObjective):
        return
    if is_ours(objective) or count < LEAST:
        return
    few = LEAST - 1

    def values(given: Any, wanted: Any, number: int) -> Tensor:
        found = objective.values(apart(objective, given), apart(objective, wanted))
        return per_sample(objective, "values", found, number)

    with torch.inference_mode(), named(objective, "values"):
        whole, again = (values(outputs, targets, count) for _ in range(2))
        try:
            alone = values(samples(outputs, count, 0, few), samples(targets, count, 0, few), few)
        except Exception:
            return  # it takes whole batches alone
    if not _are_close(whole, again):
        warnings.warn(
            f"objective {objective.name!r} gives other values of the same outputs from call to call: what is measured of a "
            "policy is then chance in part",
            stacklevel=2,
        )
        return
    if _are_close(whole[:few], alone):
        return
    what = f"objective {objective.name!r} gives a sample another value when other samples are beside it in the batch"
    of_tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if of_tensors and outputs.dim() != targets.dim() and outputs.numel() == targets.numel():
        raise ValueError(
            f"{what}: outputs of shape {tuple(outputs.shape)} and targets of {tuple(targets.shape)} are spread over each "
            "other; give both the same shape"
        )
    warnings.warn(f"{what}: values then depend on the size of batches", stacklevel=2)


def _are_close(values: Tensor, others: Tensor) -> bool:
    return torch.allclose(values, others, rtol=1e-3, atol=1e-5 * float(values.abs().nan_to_num().max()), equal_nan=True)


def measure(
    objective: Objective,
    network: Network,
    split: Split,
    module: nn.Module,
    batch_size: int = 250,
    called: str = "test",
) -> float:
    """Measure a network on any samples.

    Args:
        objective: What it is judged by.
        network: The float network, which preprocesses the inputs.
        split: The samples. An objective that is given the network looks at its own.
        module: The network that is measured; it is put into evaluation mode.
        batch_size: Samples at a time.
        called: What the split is called, which an objective is told that is given the network and takes `split`.

    Returns:
        The objective's value. Of class scores it is the share of samples that count as correct; those with an output that is
        NaN count as wrong.
    """
    return measure_by_sample(objective, network, split, module, batch_size, called).value


class Measured(NamedTuple):
    """What a network was measured to give on some samples.

    Attributes:
        value: The objective's.
        error: The standard error of a value that is a mean of values by sample, no shares; None where it isn't known.
        by_sample: The value of every sample, or whether it is answered rightly; None where values aren't means over samples.
    """

    value: float
    error: float | None = None
    by_sample: Tensor | None = None


def measure_by_sample(
    objective: Objective,
    network: Network,
    split: Split,
    module: nn.Module,
    batch_size: int = 250,
    called: str = "test",
) -> Measured:
    """Measure a network on any samples, and tell what it is worth on each.

    Args:
        objective: As in `measure`.
        network: Likewise.
        split: Likewise.
        module: Likewise.
        batch_size: Likewise.
        called: Likewise.

    Returns:
        The value, how far chance moves it, and what is known by sample.
    """
    module.eval()
    if isinstance(objective, BlackBox):
        return Measured(_or_worst(objective, value_of(objective, module, called)))
    right: list[Tensor] = []
    tally: ValueTally | None = None
    if isinstance(objective, ValueObjective):
        tally = ValueTally(objective)
    for batch, (given, targets) in enumerate(split.batches(batch_size)):
        inputs = to_device(network.preprocess(given), network.device)
        wanted = wanted_of(objective, network, inputs, targets)
        more: tuple[Tensor, ...] = ()
        if objective.attacked:
            more = attacked_inputs(objective, module, inputs, wanted, batch)
        with torch.inference_mode():
            outputs = tuple(objective.read(network.run(module, one, targets)) for one in (inputs, *more))
            if tally is None:
                right.append(which_correct(objective, outputs, wanted).cpu())
                continue
            try:
                tally.add(outputs, wanted, None, count_of(inputs))
            except NotFinite:
                return Measured(objective.worst)
    if tally is None:
        by_sample = torch.cat(right)
        return Measured(int(by_sample.sum()) / len(split), None, by_sample)
    result = tally.result()
    return Measured(_or_worst(objective, result.accuracy), result.error, tally.by_sample())


def wanted_of(objective: Objective, network: Network, inputs: Any, targets: Any) -> Any:
    """Tell what a batch's outputs are held against.

    Args:
        objective: What judges them.
        network: The float network.
        inputs: The batch's, preprocessed.
        targets: The batch's.

    Returns:
        Its targets, or the float network's outputs, on the network's device.
    """
    if not objective.compares_with_float:
        return objective.aligned(inputs, to_device(targets, network.device))
    with torch.no_grad():
        outputs = objective.read(network.run(network.module.eval(), inputs, targets))
    if objective.takes_scores:
        return outputs.argmax(1)
    return outputs


def _or_worst(objective: Objective, value: float) -> float:
    """Return a value; the worst there is, if it is NaN."""
    if math.isnan(value):
        return objective.worst
    return value


def _divergence(outputs: Tensor, expected: Tensor) -> float:
    """Sum KL(expected || outputs) over the samples."""
    total = 0.0
    for part, of_teacher in zip(outputs.double().split(BATCH), expected.double().split(BATCH), strict=True):
        target = F.log_softmax(of_teacher, 1)
        given = F.log_softmax(part, 1)
        summed = float(F.kl_div(given, target, reduction="sum", log_target=True))
        if math.isnan(summed):
            # A class that is impossible (a score of minus infinity) adds nothing.
            summed = float((target.exp() * (target - given)).where(target > -math.inf, 0.0).sum())
        total += summed
    return total
