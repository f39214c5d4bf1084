"""What policies are judged by. Torch is imported only when something is computed.

An objective of your own is one class:

    class TopTwo(haq.Objective):
        name = "top-2"
        words = "the share of images whose label is among the two best answers"

        def correct(self, outputs, labels):
            return (outputs[0].topk(2).indices == labels[:, None]).any(1)

    haq.Problem(network, calibrate=loader, search=loader, target="edge", objective=TopTwo())
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from haq.problem import OBJECTIVES, lacking
from hw_models.registry import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haq.attacks.proxy import ProxyAttack
    from haq.data import Dataset, Split
    from haq.networks import Network

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
        short: What it is called at the head of a table's column.
        needs_labels: Whether images must have labels.
        compares_with_float: Whether labels are the float network's answers and the loss is the divergence from its
            outputs; the float network itself then has 1 and 0.
        attacked: Whether images are attacked too, by `proxy`.
        also: Objectives that are measured beside this one when a result is reported.
        note: What must be said below a table of results.
    """

    name: ClassVar[str] = ""
    words: str = ""
    short: ClassVar[str] = ""
    needs_labels: ClassVar[bool] = True
    compares_with_float: ClassVar[bool] = False
    attacked: ClassVar[bool] = False
    proxy: ProxyAttack | None = None
    also: tuple[Objective, ...] = ()
    note: str = ""

    def __init_subclass__(cls) -> None:
        """Call a class that gives itself no name after itself, and everything that has no other words by its name."""
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if "words" not in cls.__dict__:
            cls.words = cls.name
        if "short" not in cls.__dict__:
            cls.short = cls.name

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
        """Raise ValueError if labels are needed and a data set has none."""
        if cls.needs_labels and not dataset.classes:
            raise ValueError(f"{dataset.name} has no labels to tell the accuracy by: search with --objective agreement")

    def more_inputs(self, network: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Make further versions of a batch's inputs by which a network is judged too; asked only where `attacked` is True.

        They are made anew for every policy, so that nothing is kept from one policy to the next.

        Args:
            network: The network that is judged.
            inputs: Shape (images, ...), preprocessed.
            labels: Shape (images,).
            batch: Its number. With the other arguments it is all that the result may depend on.

        Returns:
            Tensors of the shape of `inputs`.
        """
        return ()

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

    def share(self, network: Network, split: Split, module: nn.Module, batch_size: int = 250) -> float:
        """Measure a network on any images.

        Args:
            network: The float network, which preprocesses the images.
            split: The images.
            module: The network that is measured; it is put into evaluation mode.
            batch_size: Images at a time.

        Returns:
            The share of images that count as correct, 0 to 1; those with an output that is NaN count as wrong.
        """
        import torch

        module.eval()
        right = 0
        for batch, (images, labels) in enumerate(split.batches(batch_size)):
            inputs = network.preprocess(images)
            more: tuple[Tensor, ...] = ()
            if self.attacked:
                more = self.more_inputs(module, inputs.clone(), labels, batch)
            with torch.inference_mode():
                if self.compares_with_float:
                    labels = class_scores(network.module.eval()(inputs.clone())).argmax(1)
                outputs = [class_scores(module(one.clone())) for one in (inputs, *more)]
                right += count_correct(self, outputs, labels)
        return right / len(split)


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


def count_correct(objective: Objective, outputs: Sequence[Tensor], labels: Tensor) -> int:
    """Count the images that an objective calls correct; those with an output that is NaN are not.

    Args:
        objective: The objective.
        outputs: As `Objective.correct` takes them.
        labels: Likewise.

    Returns:
        Their number.

    Raises:
        ValueError: Naming the objective and what it gave, for anything but a boolean tensor of shape (images,); and for
            labels that no output stands for.
    """
    import torch

    with _named(objective, "correct"):
        given = objective.correct(outputs, labels)
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool or given.shape != labels.shape:
        raise ValueError(
            f"`correct` of objective {objective.name!r} must return a boolean tensor of shape {tuple(labels.shape)}, one for "
            f"each image, not {_described(given)}"
        )
    for part in outputs:
        given = given & ~part.isnan().any(1)
    return int(given.sum())


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

    with _named(objective, "loss"):
        given: object = objective.loss(outputs, labels, divergence)
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
            f"{_described(given)}"
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

    with _named(objective, "more_inputs"):
        given: object = objective.more_inputs(network, inputs, labels, batch)
    if not isinstance(given, tuple | list):
        given = (given,)
    for one in given:
        if not isinstance(one, torch.Tensor) or one.shape != inputs.shape:
            raise ValueError(
                f"`more_inputs` of objective {objective.name!r} must return a tuple of tensors of shape "
                f"{tuple(inputs.shape)}, not {_described(one)}"
            )
    return tuple(given)


@contextmanager
def _named(objective: Objective, method: str) -> Iterator[None]:
    """Say whose method it is that fails within; ours, and those that say why themselves, are left alone."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if type(objective).__module__.partition(".")[0] == __name__.partition(".")[0]:
            raise
        raise ValueError(f"`{method}` of objective {objective.name!r} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Write what somebody's code raised on one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def _described(given: object) -> str:
    """Say in a few words what was given."""
    import torch

    if isinstance(given, torch.Tensor):
        if given.dim() == 0:
            return f"the {str(given.dtype).removeprefix('torch.')} {given.item()}"
        return f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
    return printable(f"{type(given).__name__} {given!r}"[:80])


def find_objective(objective: str | type[Objective] | Objective) -> Objective:
    """Return an objective that is given as a name, as `module:Name`, as a class or as itself.

    Raises:
        ValueError: For an unknown name, naming the close ones; for a thing that is no objective, naming what it lacks; for a
            class that can't be made, with the reason.
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
    if missing := lacking(found):
        raise ValueError(f"objective {objective!r} can't be used: it lacks {missing}")
    return found  # type: ignore[return-value]


def build_objective(name: str, network: Network, dataset: Dataset, eps: float) -> Objective:
    """Make the objective of a name for a network and data set that are given by name; see `Objective.build`.

    Args:
        name: A name, or `module:Name`.
        network: What is searched for.
        dataset: What it is judged on.
        eps: As in `Objective.build`.

    Returns:
        The objective.
    """
    found: type[Objective] | Objective = OBJECTIVES.get(name)
    if isinstance(found, type):
        return found.build(network, dataset, eps)
    return found
