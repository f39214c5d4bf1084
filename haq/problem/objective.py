"""What policies are judged by. Torch is imported only when something is computed.

There are four kinds. `Objective` itself is of class scores: which samples are answered rightly. A `ValueObjective` gives every
sample a value, of which the mean counts. A `MetricObjective` has a metric of torchmetrics over all samples. A `BlackBox` is
given the network, and returns a number. Those of other tasks than classification are in `haq.problem.metrics`, and what is
made of a function or a metric of somebody's is in `haq.problem.given`.

An objective of your own is one class:

    class TopTwo(haq.Objective):
        name = "top-2"
        words = "the share of images whose label is among the two best answers"

        def correct(self, outputs, labels):
            return (outputs[0].topk(2).indices == labels[:, None]).any(1)

    haq.Problem(network, calibrate=loader, search=loader, target="edge", objective=TopTwo())
"""

from __future__ import annotations

import copy
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from haq.problem import OBJECTIVES, ROBUST, lacking
from haq.problem.guarding import apart, check_said, is_class_of_ours, is_ours, left_as_it_was
from hw_models.registry import printable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchmetrics import Metric

    from haq.attacks.proxy import ProxyAttack
    from haq.data import Dataset
    from haq.networks import Network
    from haq.problem.distribution import Distribution

# What a user may give for an objective; see `find_objective`.
AnyObjective = Any

PART = 125  # images whose losses are summed at a time: the order of a sum is part of the result


class NotFinite(ValueError):
    """A network's outputs aren't finite on the images that it is judged on."""

    def __init__(self) -> None:
        """Say so."""
        super().__init__("the network's outputs are not finite on the search images")


class Objective:
    """Says of a network's outputs which are correct and how large the loss is; larger shares are better.

    Subclasses say otherwise what they do otherwise. As it comes, an image is correct if the largest class score is that of its
    label, and the loss is the cross-entropy.

    Attributes:
        name: What it is called in options and files.
        words: What it measures, in words.
        title: What it is called in sentences and on the axes of plots, such as "accuracy" or "mIoU".
        short: What it is called at the head of a table's column.
        unit: "%": values are shares, 0 to 1, which are shown in percent. Otherwise it is shown behind the value.
        higher_is_better: Whether a larger value is better.
        needs_labels: Whether samples must have targets; those of classification are labels.
        takes_scores: Whether it is of class scores, shape (samples, classes), and labels.
        distribution: What outputs say of answers, by which their distance from the float network's is told; None where they
            can't be held against each other.
        compares_with_float: Whether labels are the float network's answers and the loss is the divergence from its
            outputs; the float network itself then has 1 and 0.
        attacked: Whether images are attacked too, by `proxy`.
        also: Objectives that are measured beside this one when a result is reported.
        note: What must be said below a table of results.
    """

    name: str = ""
    words: str = ""
    title: str = ""
    short: str = ""
    unit: str = "%"
    higher_is_better: bool = True
    needs_labels: bool = True
    takes_scores: bool = True
    compares_with_float: bool = False
    attacked: bool = False
    proxy: ProxyAttack | None = None
    also: tuple[Objective, ...] = ()
    note: str = ""

    def __init_subclass__(cls) -> None:
        """Call a class that gives itself no name after itself, and everything that has no other words by its name."""
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        for words in ("words", "title", "short"):
            if words not in cls.__dict__:
                setattr(cls, words, cls.name)

    def __repr__(self) -> str:
        """Say on one line what it measures."""
        return f"{type(self).__name__}({self.words})"

    @classmethod
    def build(cls, network: Network, dataset: Dataset, eps: float) -> Objective:
        """Make the objective for a network and data set that are given by name.

        Args:
            network: What is searched for.
            dataset: What it is judged on.
            eps: How far an attack may move a pixel, of 1; without meaning where nothing is attacked.

        Returns:
            The objective.

        Raises:
            ValueError: If the data set doesn't suit it.
        """
        cls.check_labels(dataset)
        return cls()

    @classmethod
    def check_labels(cls, dataset: Dataset) -> None:
        """Check that a data set has the labels that the objective needs.

        Args:
            dataset: The data set.

        Raises:
            ValueError: If labels are needed and the data set has none.
        """
        check_targets(cls, dataset)

    def more_inputs(self, network: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Make further versions of a batch's inputs by which a network is judged too; asked only where `attacked` is True.

        They are made anew for every policy, so that nothing is kept from one policy to the next.

        Args:
            network: The network that is judged.
            inputs: Shape (images, ...), preprocessed.
            labels: Shape (images,).
            batch: Its number. With the other arguments it is all that the result may depend on.

        Returns:
            Tensors of the shape of `inputs`; with a `proxy`, those by which it raises the loss.
        """
        if self.proxy is None:
            return ()
        return (self.proxy.raise_loss(network, self.attacked_loss(network, inputs, labels), inputs, batch),)

    def attacked_loss(self, network: nn.Module, inputs: Tensor, targets: Any) -> Callable[[Any], Tensor]:
        """Make the loss that an attack on a batch raises: the cross-entropy, summed.

        Args:
            network: The network that is attacked.
            inputs: As they are without an attack.
            targets: Of the batch.

        Returns:
            A function of the network's outputs that returns a scalar.
        """
        from torch.nn import functional as F

        labels = targets.to(inputs.device)
        return lambda outputs: F.cross_entropy(self.read(outputs), labels, reduction="sum")

    def aligned(self, inputs: Any, targets: Any) -> Any:
        """Return the targets of a batch in the places that outputs are held against; as they are, if nothing else is said.

        Args:
            inputs: Of the batch.
            targets: As the batch has them; None where it has none.

        Returns:
            Targets, in the shape that `correct` and `loss` take.
        """
        return targets

    def look_at(self, outputs: Any, targets: Any) -> None:
        """Look at a batch of the float network's outputs, before anything is judged.

        Args:
            outputs: As `read` returns them.
            targets: Of the batch; None where it has none.

        Raises:
            ValueError: For outputs that the objective isn't of.
        """

    def correct(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Say which images count as correct.

        Args:
            outputs: Class scores, shape (images, classes); after them those for `more_inputs`.
            labels: Shape (images,).

        Returns:
            Booleans, shape (images,).

        Raises:
            ValueError: For labels that no output stands for, and for a single output, which is always the largest.
        """
        import torch

        self._check_classes(outputs[0], labels)
        return torch.stack([part.argmax(1) == labels for part in outputs]).all(0)

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, divergence: float | None) -> float:
        """Tell the mean loss (nats); the cross-entropy, if nothing else is said.

        Args:
            outputs: Class scores, shape (images, classes); after them those for `more_inputs`, of which the largest loss of
                each image counts.
            labels: Shape (images,).
            divergence: Mean Kullback-Leibler divergence (nats) of the outputs from the float network's, if that is known.

        Returns:
            The loss.

        Raises:
            ValueError: As `correct` does.
        """
        import torch
        from torch.nn import functional as F

        self._check_classes(outputs[0], labels)
        total = 0.0
        for *parts, answers in zip(*(part.double().split(PART) for part in outputs), labels.split(PART), strict=True):
            if len(parts) == 1:
                total += float(F.cross_entropy(parts[0], answers, reduction="sum"))
            else:
                losses = [F.cross_entropy(part, answers, reduction="none") for part in parts]
                total += float(torch.stack(losses).amax(0).sum())
        return total / len(labels)

    def _check_classes(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise ValueError for labels that no output stands for, and for a single output, which is always the largest."""
        classes = outputs.shape[1]
        if classes < 2:
            raise ValueError(f"objective {self.name!r} needs a network with two outputs or more, not {classes}")
        if labels.max() >= classes or labels.min() < 0:
            outside = labels[(labels < 0) | (labels >= classes)]
            raise ValueError(
                f"labels such as {int(outside[0])} don't fit outputs of shape {tuple(outputs.shape)}: they must be from 0 to "
                f"{classes - 1}"
            )

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: scores of classes."""
        from haq.problem.distribution import Categorical

        return Categorical()

    @property
    def worst(self) -> float:
        """Return the value of a network whose outputs aren't finite."""
        if self.unit == "%" and self.higher_is_better:
            return 0.0
        return self.signed(-math.inf)

    def signed(self, value: float) -> float:
        """Return a number that is larger for a better value; and back, a value for such a number.

        Args:
            value: A value of the objective, or such a number.

        Returns:
            The value, negated where lower is better.
        """
        if self.higher_is_better:
            return value
        return -value

    def read(self, outputs: Any) -> Any:
        """Return what the objective looks at of a network's outputs: the class scores.

        Args:
            outputs: What the network returned, of whatever structure.

        Returns:
            Scores, shape (samples, classes).

        Raises:
            ValueError: For outputs that have none.
        """
        from haq.problem.distribution import main_output

        if hasattr(outputs, "keys"):
            outputs = main_output(outputs)
        return class_scores(outputs)

    def training_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute what training minimises: the mean cross-entropy.

        Args:
            outputs: Of the network in training mode.
            targets: Labels, shape (samples,).

        Returns:
            A scalar that a gradient can be taken of.

        Raises:
            ValueError: For what are no class scores, and labels that no output stands for.
        """
        from torch.nn import functional as F

        from haq.data.labels import class_numbers

        scores = self.read(outputs)
        return F.cross_entropy(scores, class_numbers(targets, "what is trained on", scores.shape[1]))

    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Tell how far outputs are from the float network's, which fine-tuning with it as teacher minimises.

        Args:
            outputs: Of the network.
            expected: Of the float network.

        Returns:
            Shape (samples,); a gradient can be taken.

        Raises:
            ValueError: For outputs that can't be held against each other.
        """
        if self.distribution is None:
            raise ValueError(f"objective {self.name!r} has no distance between outputs: give it a loss")
        try:
            return self.distribution.divergence(outputs, expected)
        except (IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the {type(self.distribution).__name__} distribution of objective {self.name!r} doesn't fit outputs, "
                f"{described(outputs)}: {_reason(error)}"
            ) from error


class ValueObjective(Objective):
    """Gives every sample a value; the mean over all samples is what a policy is worth.

    A subclass has `values`; and `losses`, if the values themselves are no loss that a gradient can be taken of.
    """

    unit = ""
    takes_scores = False

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: numbers."""
        from haq.problem.distribution import Gaussian

        return Gaussian()

    def read(self, outputs: Any) -> Any:
        """Return a network's outputs, as they are."""
        return outputs

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell what every sample's answer is worth.

        Args:
            outputs: What the network returned for a batch, or `forward` did.
            targets: The batch's targets, on the same device; those of an objective that compares with the float network are
                its outputs.

        Returns:
            Shape (samples,).
        """
        raise NotImplementedError

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell the loss of every sample's answer, by which policies of the same value are told apart.

        Args:
            outputs: As in `values`.
            targets: Likewise.

        Returns:
            Shape (samples,), of which a gradient can be taken in the outputs; smaller is better. None: the divergence from the
            float network's outputs stands for it. If nothing else is said these are the values, where smaller ones are better.
        """
        if self.higher_is_better:
            return None
        return self.values(outputs, targets)

    def training_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute what training minimises: the mean of the losses; see `Objective.training_loss`."""
        losses = self.losses(self.read(outputs), targets)
        if losses is None or not losses.requires_grad:
            raise ValueError(f"objective {self.name!r} has no loss that can be trained: give it one (loss=)")
        return losses.mean()

    def attacked_loss(self, network: nn.Module, inputs: Tensor, targets: Any) -> Callable[[Any], Tensor]:
        """Make the loss that an attack raises: the losses' sum, or that of the divergence from what the network said before.

        See `Objective.attacked_loss`.
        """
        return raised_loss(self, network, inputs, lambda outputs: self.losses(self.read(outputs), targets))


class MetricObjective(ValueObjective):
    """Has a metric of torchmetrics, over all samples at once, for its value."""

    def metric(self) -> Metric:
        """Make the metric, with nothing in it."""
        raise NotImplementedError

    def metric_for(self, outputs: Any, targets: Any) -> Metric:
        """Make the metric, with what isn't said of it taken from a batch's outputs and targets."""
        return self.metric()

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric.

        Args:
            metric: The metric.
            outputs: As `read` returns them.
            targets: Of the batch.

        Raises:
            ValueError: Naming both, for what the metric doesn't take.
        """
        try:
            metric.update(outputs, targets)
        except Exception as error:
            raise ValueError(
                f"the metric of objective {self.name!r} doesn't take outputs, {described(outputs)}, with targets, "
                f"{described(targets)}: {_reason(error)}"
            ) from error

    def compute(self, metric: Metric) -> Any:
        """Tell the metric's value, one number. Raises ValueError if it can't be computed."""
        try:
            return metric.compute()
        except Exception as error:
            raise ValueError(f"the metric of objective {self.name!r} can't be computed: {_reason(error)}") from error

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Leave the loss to the divergence from the float network's outputs; see `ValueObjective.losses`."""
        return None


class BlackBox(Objective):
    """Is given a network, and returns what it is worth.

    Nobody knows what it looks at. So the network is always run as a whole, no evaluation ends early, and there is no loss but
    what the value lost.

    Attributes:
        takes_split: Whether `evaluate` takes `split`, "search" or "test", by which it chooses what it looks at. Without it the
            value that is reported for the test split is of what policies were chosen by.
    """

    unit = ""
    needs_labels = False
    takes_scores = False
    takes_split = False

    def evaluate(self, network: nn.Module) -> float:
        """Tell what a network, in evaluation mode, is worth."""
        raise NotImplementedError

    def training_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Raise ValueError: there is none."""
        raise ValueError(f"objective {self.name!r} is given the network and has no loss that can be trained: give one (loss=)")

    def attacked_loss(self, network: nn.Module, inputs: Tensor, targets: Any) -> Callable[[Any], Tensor]:
        """Make the loss that an attack raises: the divergence from what the network said before."""
        return raised_loss(self, network, inputs, lambda outputs: None)

    def read(self, outputs: Any) -> Any:
        """Return a network's outputs, as they are."""
        return outputs

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: numbers."""
        from haq.problem.distribution import Gaussian

        return Gaussian()


class Accuracy(Objective):
    """The share of images that are classified correctly, and the cross-entropy."""

    name = "accuracy"
    words = "accuracy"


class Agreement(Objective):
    """The share of images to which the answer is the float network's, and the divergence from its outputs; without labels."""

    name = "agreement"
    words = "agreement with the float network's answers, without labels"
    needs_labels = False
    compares_with_float = True

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, divergence: float | None) -> float:
        """Return the divergence. Raises ValueError without a float network to tell it from."""
        if divergence is None:
            raise ValueError("agreement needs a teacher: the float network that answers are compared with")
        return divergence


class RobustAccuracy(Objective):
    """The share of images that are classified correctly both as they are and attacked.

    The loss is the mean of the larger one of an image's two cross-entropies. The attack is a cheap one, made anew for every
    policy's network with gradients straight through its quantizers. What it doesn't break may still be broken, above all at
    few bits: verify what was found with a full suite of attacks, python -m haq.robustness RUN --attacks full.
    """

    name = "accuracy+robust"
    title = "worst-case accuracy"
    short = "worst case"
    attacked = True

    def __init__(self, proxy: ProxyAttack | None = None) -> None:
        """Take the attack.

        Args:
            proxy: Knows eps and the range of images in the network's input space:
                `haq.attacks.proxy.ProxyAttack.of(network, eps)` for a `haq.networks.Network`.

        Raises:
            ValueError: Without one.
        """
        if proxy is None:
            raise ValueError(
                'objective="accuracy+robust" needs `proxy`, the attack that policies are judged under: give '
                "haq.problem.objective.RobustAccuracy(haq.attacks.proxy.ProxyAttack.of(network, eps))"
            )
        self.proxy = proxy
        self.words = f"worst of clean and {proxy}"
        self.also = (Accuracy(),)
        self.note = f"worst case: {self.words}, right both times, a cheap attack and no evaluation"

    @classmethod
    def build(cls, network: Network, dataset: Dataset, eps: float) -> RobustAccuracy:
        """Make the objective for a network and data set that are given by name; see `Objective.build`."""
        from haq.attacks.proxy import ProxyAttack
        from haq.attacks.threat_model import check_images

        cls.check_labels(dataset)
        for split in (dataset.search, dataset.test):
            check_images(split, dataset.name)
        return cls(ProxyAttack.of(network, eps))

    def more_inputs(self, network: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Attack a batch."""
        assert self.proxy is not None
        return (self.proxy(network, inputs, labels, batch),)


def class_scores(outputs: object) -> Tensor:
    """Return a network's outputs as they are. Raises ValueError unless they are a tensor of shape (images, classes)."""
    import torch

    if isinstance(outputs, torch.Tensor) and outputs.dim() == 2:
        return outputs
    what = f"a {type(outputs).__name__}"
    if isinstance(outputs, torch.Tensor):
        what = f"shape {tuple(outputs.shape)}"
    raise ValueError(f"the network's outputs are class scores of shape (images, classes), not {what}")


def check_targets(objective: Objective | type[Objective], dataset: Dataset) -> None:
    """Raise ValueError if a data set hasn't the targets that an objective needs, naming what can be searched for instead."""
    if not objective.needs_labels or (objective.takes_scores and dataset.classes):
        return
    measured = objective.title
    if objective.name.startswith("accuracy"):
        measured = "accuracy"
    if not dataset.has_targets:
        instead = "agreement"
        if not objective.takes_scores:
            instead = "cosine"
        what = "labels"
        if not objective.takes_scores:
            what = "targets"
        raise ValueError(f"{dataset.name} has no {what} to tell the {measured} by: search with --objective {instead}")
    if objective.takes_scores:
        raise ValueError(
            f"{dataset.name} has targets that are no classes to tell the {measured} by: search with an --objective that is of "
            "them, as `haq list objectives` shows"
        )


def count_correct(objective: Objective, outputs: Sequence[Tensor], labels: Tensor) -> int:
    """Count the images that an objective calls correct; arguments and errors are those of `which_correct`.

    Args:
        objective: The objective.
        outputs: As `Objective.correct` takes them.
        labels: Likewise.

    Returns:
        Their number.
    """
    return int(which_correct(objective, outputs, labels).sum())


def which_correct(objective: Objective, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Tell the images that an objective calls correct; those with an output that is NaN are not.

    Args:
        objective: The objective.
        outputs: As `Objective.correct` takes them.
        labels: Likewise.

    Returns:
        Booleans, shape (images,).

    Raises:
        ValueError: Naming the objective and what it gave, for anything but a boolean tensor of shape (images,); and for
            labels that no output stands for.
    """
    import torch

    with named(objective, "correct"):
        if _knows_one_version(objective, "correct"):
            answers = [objective.correct((apart(objective, part),), apart(objective, labels)) for part in outputs]
            given = functools.reduce(operator.and_, answers)
        else:
            given = objective.correct(apart(objective, outputs), apart(objective, labels))
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool or given.shape != labels.shape:
        raise ValueError(
            f"`correct` of objective {objective.name!r} must return a boolean tensor of shape {tuple(labels.shape)}, one for "
            f"each image, not {described(given)}"
        )
    for part in outputs:
        given = given & ~part.isnan().any(1)
    which: Tensor = given
    return which


def _knows_one_version(objective: Objective, method: str) -> bool:
    """Say whether somebody's method was written for inputs that nobody attacks; the worst of its answers counts then."""
    kind = type(objective)
    attacks_itself = kind.more_inputs is not Objective.more_inputs
    return objective.attacked and not attacks_itself and getattr(kind, method) is not getattr(Objective, method)


def raised_loss(
    objective: Objective, network: nn.Module, inputs: Tensor, losses: Callable[[Any], Tensor | None]
) -> Callable[[Any], Tensor]:
    """Make the loss that an attack on a batch raises.

    Args:
        objective: What tells the divergence.
        network: The network that is attacked.
        inputs: As they are without an attack.
        losses: Of outputs: the loss of every sample, or None where there is no such thing. Then the divergence from the
            network's own outputs without an attack stands for it.

    Returns:
        A function of the network's outputs that returns a scalar.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        before = objective.read(network(inputs.clone()))

    def loss(outputs: Any) -> Tensor:
        found = losses(outputs)
        if found is None or not found.requires_grad:
            found = objective.divergence(objective.read(outputs), before)
        return found.sum()

    return loss


def mean_loss(objective: Objective, outputs: Sequence[Tensor], labels: Tensor, divergence: float | None) -> float:
    """Tell an objective's loss.

    Args:
        objective: The objective.
        outputs: As `Objective.loss` takes them.
        labels: Likewise.
        divergence: Likewise.

    Returns:
        The loss.

    Raises:
        NotFinite: For outputs that aren't finite.
        ValueError: Naming the objective and what it gave, for anything but one finite number.
    """
    import torch

    with named(objective, "loss"):
        given: object
        if _knows_one_version(objective, "loss"):
            given = max(objective.loss((part,), labels, divergence) for part in outputs)
        else:
            given = objective.loss(outputs, labels, divergence)
    number = math.nan
    if isinstance(given, torch.Tensor):
        if given.dim() == 0 and given.is_floating_point():
            number = float(given)
    elif isinstance(given, numbers.Real) and not isinstance(given, bool):
        number = float(given)
    if not math.isfinite(number):
        if not all(bool(part.isfinite().all()) for part in outputs):
            raise NotFinite
        raise ValueError(
            f"`loss` of objective {objective.name!r} must return one finite number, the mean over the images, not "
            f"{described(given)}"
        )
    return number


def attacked_inputs(
    objective: Objective, network: nn.Module, inputs: Tensor, labels: Tensor, batch: int
) -> tuple[Tensor, ...]:
    """Make further versions of a batch's inputs, as an objective does.

    Args:
        objective: The objective.
        network: As `Objective.more_inputs` takes it.
        inputs: Likewise.
        labels: Likewise.
        batch: Likewise.

    Returns:
        Tensors of the shape of `inputs`.

    Raises:
        ValueError: Naming the objective and what it gave, for anything else.
    """
    import torch

    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        raise ValueError(
            f"objective {objective.name!r} attacks images, one tensor of floats, not inputs of {described(inputs)}"
        )
    with torch.inference_mode(False), named(objective, "more_inputs"):
        given: object = objective.more_inputs(network, inputs.clone(), apart(objective, labels), batch)
    if not isinstance(given, tuple | list):
        given = (given,)
    for one in given:
        if not isinstance(one, torch.Tensor) or one.shape != inputs.shape:
            raise ValueError(
                f"`more_inputs` of objective {objective.name!r} must return a tuple of tensors of shape "
                f"{tuple(inputs.shape)}, not {described(one)}"
            )
    return tuple(given)


def per_sample(objective: ValueObjective, method: str, given: Any, count: int) -> Tensor:
    """Check what an objective tells of every sample of a batch.

    Args:
        objective: The objective.
        method: What was called, "values" or "losses".
        given: What it returned.
        count: The samples of the batch.

    Returns:
        Numbers, float64 of shape (samples,), on the CPU.

    Raises:
        ValueError: Naming the objective and what it gave, for anything but a tensor of this shape.
    """
    import numpy as np
    import torch

    if isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        given = torch.as_tensor(given)
    if not isinstance(given, torch.Tensor) or given.shape != (count,) or given.is_complex():
        raise ValueError(
            f"`{method}` of objective {objective.name!r} must return a tensor of shape ({count},), a number for each sample, "
            f"not {described(given)}"
        )
    return given.detach().double().cpu()


def single_number(objective: Objective, method: str, given: Any) -> float:
    """Check the value that an objective tells of a network.

    Args:
        objective: The objective.
        method: What was called, "metric" or "evaluate".
        given: What it returned.

    Returns:
        The number, which may be NaN or infinite.

    Raises:
        ValueError: Naming the objective and what it gave, for anything but one number.
    """
    import numpy as np
    import torch

    if isinstance(given, np.ndarray) and given.size == 1:
        given = given.item()
    if isinstance(given, torch.Tensor) and given.numel() == 1 and not given.is_complex():
        return float(given)
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        return float(given)
    raise ValueError(f"`{method}` of objective {objective.name!r} must return one number, not {described(given)}")


def value_of(objective: BlackBox, network: nn.Module, split: str = "search") -> float:
    """Tell what a network is worth by an objective that is given it.

    Args:
        objective: The objective. It is given a copy of the network, with which it may do what it likes.
        network: In evaluation mode.
        split: "search" or "test", for an objective that takes it.

    Returns:
        The value, which may be NaN or infinite; under attack the worse of the two.

    Raises:
        ValueError: Naming the objective and what it gave, for anything but one number.
    """
    from quantizers.copying import copy_network

    values = [_told(objective, copy_network(network), split)]
    if objective.proxy is not None:
        values.append(_told(objective, objective.proxy.attacking(copy_network(network), objective), split))
    if any(map(math.isnan, values)):
        return math.nan
    return min(values, key=objective.signed)


def _told(objective: BlackBox, network: nn.Module, split: str) -> float:
    """Tell what a network is worth as it is."""
    options = {}
    if objective.takes_split:
        options["split"] = split
    with named(objective, "evaluate"), left_as_it_was():
        given = objective.evaluate(network, **options)
    return single_number(objective, "evaluate", given)


@contextmanager
def named(objective: Objective, method: str) -> Iterator[None]:
    """Say whose method it is that fails within; ours, and those that say why themselves, are left alone.

    Raises:
        ValueError: Naming the method and the objective, for whatever else somebody's own raises.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if is_ours(objective):
            raise
        if isinstance(error, ValueError) and (not hasattr(objective, "given") or objective.name in str(error)):
            raise
        raise ValueError(f"`{method}` of objective {objective.name!r} failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Write what somebody's code raised on one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def described(given: object) -> str:
    """Say in a few words what was given."""
    import torch

    if isinstance(given, list | tuple) and given and isinstance(given[0], torch.Tensor | Mapping):
        return printable(f"a {type(given).__name__} of {len(given)}, the first {described(given[0])}")
    if isinstance(given, Mapping):
        return printable(f"a {type(given).__name__} of {', '.join(map(str, given))}"[:120])
    if isinstance(given, torch.Tensor):
        if given.dim() == 0:
            return f"the {str(given.dtype).removeprefix('torch.')} {given.item()}"
        return f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
    return printable(f"{type(given).__name__} {given!r}"[:80])


def find_objective(objective: AnyObjective) -> Objective:
    """Return the objective that is given, in whatever form.

    Args:
        objective: A name, `NAME+robust`, `module:Name`, an objective or a class of one, a metric of torchmetrics, a function
            of (outputs, targets) that returns a value for every sample, or a function of a network that returns a number.

    Returns:
        The objective.

    Raises:
        ValueError: For an unknown name, naming the close ones; for a thing that is no objective, naming what it lacks; for a
            class that can't be made, with the reason; for what doesn't say whether larger values are better; and for what
            attacks inputs without an attack.
        ImportError: For an objective of somebody else's that can't be imported.
    """
    found: object = objective
    if isinstance(objective, str):
        found = OBJECTIVES.get(objective)
    if isinstance(found, type):
        try:
            found = found()
        except ValueError:
            raise
        except Exception as error:
            reason = f"{_reason(error)}: give an instance, or a class without arguments"
            raise ValueError(f"objective {objective!r} can't be made ({reason})") from error
    found = OBJECTIVES.read(found)
    if missing := lacking(found):
        raise ValueError(f"objective {objective!r} can't be used: it lacks {missing}")
    made: Objective = found  # type: ignore[assignment]
    check_said(made)
    _check_direction(made)
    if is_without_attack(made):
        raise ValueError(
            f"objective={made.name!r} needs the attack that policies are judged under: give haq.problem.given.robust("
            f"{made.name.removesuffix(ROBUST)!r}, haq.attacks.proxy.ProxyAttack.of(network, eps))"
        )
    return made


def _check_direction(objective: Objective) -> None:
    """Raise ValueError for somebody's objective of numbers of any kind that leaves it open which of them are better."""
    if "higher_is_better" in vars(objective):
        return
    for kind in type(objective).__mro__:
        if kind in (ValueObjective, MetricObjective, BlackBox):
            break
        if kind is Objective or "higher_is_better" in vars(kind) or is_class_of_ours(kind):
            return
    raise ValueError(
        f"objective {objective.name!r} doesn't say whether larger values are better: set higher_is_better = True in the class "
        f"{type(objective).__name__}, or False"
    )


def is_without_attack(objective: Objective) -> bool:
    """Say whether an objective is of attacked inputs, and nobody has given the attack."""
    return objective.attacked and objective.proxy is None and type(objective).more_inputs is Objective.more_inputs


def build_objective(name: str, network: Network, dataset: Dataset, eps: float) -> Objective:
    """Make the objective of a name for a network and data set that are given by name; see `Objective.build`.

    Args:
        name: A name, `NAME+robust`, or `module:Name`.
        network: What is searched for.
        dataset: What it is judged on.
        eps: As in `Objective.build`.

    Returns:
        The objective.

    Raises:
        ValueError: If the data set doesn't suit it.
    """
    found: type[Objective] | Objective = OBJECTIVES.get(name)
    if isinstance(found, type):
        if issubclass(found, Objective):
            return found.build(network, dataset, eps)
        found = find_objective(found)
    check_targets(found, dataset)
    if is_without_attack(found):
        return under_attack(found, network, dataset, eps)
    return found


def under_attack(objective: Objective, network: Network, dataset: Dataset, eps: float) -> Objective:
    """Give an objective of attacked inputs its attack.

    Args:
        objective: From `OBJECTIVES.get("NAME+robust")`.
        network: What is searched for.
        dataset: What it is judged on.
        eps: How far an attack may move a pixel, of 1.

    Returns:
        A copy.

    Raises:
        ValueError: For samples that are no images of known range.
    """
    from haq.attacks.proxy import ProxyAttack
    from haq.attacks.threat_model import check_images

    for split in (dataset.search, dataset.test):
        check_images(split, dataset.name)
    return attacked_by(objective, ProxyAttack.of(network, eps))


def attacked_by(objective: Objective, proxy: ProxyAttack | None) -> Objective:
    """Make of an objective the one of the worst of inputs as they are and attacked.

    Args:
        objective: The objective; or one of attacked inputs that has no attack yet.
        proxy: The attack; None: it is still to be given.

    Returns:
        A copy, called NAME+robust.

    Raises:
        ValueError: If it is of attacked inputs already, and where an attack has nothing that it could raise.
    """
    plain = objective
    if is_without_attack(objective):
        (plain,) = objective.also
    elif objective.attacked:
        raise ValueError(f"objective {objective.name!r} is of attacked inputs already")
    has_loss = not isinstance(plain, MetricObjective) or type(plain).losses is not MetricObjective.losses
    if not plain.takes_scores and plain.distribution is None and (isinstance(plain, BlackBox) or not has_loss):
        raise ValueError(
            f"objective {plain.name!r} can't be attacked: it has no loss, and no distance between outputs, that an attack "
            "could raise"
        )
    made = copy.copy(plain)
    made.name = f"{plain.name}{ROBUST}"
    made.title = f"worst-case {plain.title}"
    made.short = "worst case"
    made.attacked = True
    made.proxy = proxy
    made.also = (plain,)
    made.words = f"{plain.words}, worst of clean and attacked"
    if proxy is not None:
        made.words = f"{plain.words}, worst of clean and {proxy}"
        made.note = f"worst case: {made.words}, a cheap attack and no evaluation"
    return made
