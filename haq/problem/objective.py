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

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from haq.problem import OBJECTIVES, lacking

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haq.attacks.proxy import ProxyAttack
    from haq.data import Dataset, Split
    from haq.networks import Network

PART = 125  # images whose losses are summed at a time: the order of a sum is part of the result


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
            ValueError: For labels that no output stands for.
        """
        import torch

        if labels.max() >= outputs[0].shape[1] or labels.min() < 0:
            span = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels from {span} don't fit outputs of shape {tuple(outputs[0].shape)}")
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
        """
        import torch
        from torch.nn import functional as F

        total = 0.0
        for *parts, answers in zip(*(part.double().split(PART) for part in outputs), labels.split(PART), strict=True):
            if len(parts) == 1:
                total += float(F.cross_entropy(parts[0], answers, reduction="sum"))
            else:
                losses = [F.cross_entropy(part, answers, reduction="none") for part in parts]
                total += float(torch.stack(losses).amax(0).sum())
        return total / len(labels)

    def share(self, network: Network, split: Split, module: nn.Module, batch_size: int = 250) -> float:
        """Measure a network on any images.

        Args:
            network: The float network, which preprocesses the images.
            split: The images.
            module: The network that is measured; it is put into evaluation mode.
            batch_size: Images at a time.

        Returns:
            The share of images that count as correct, 0 to 1.
        """
        import torch

        module.eval()
        right = 0
        for batch, (images, labels) in enumerate(split.batches(batch_size)):
            inputs = network.preprocess(images)
            more: tuple[Tensor, ...] = ()
            if self.attacked:
                more = self.more_inputs(module, inputs, labels, batch)
            with torch.inference_mode():
                if self.compares_with_float:
                    labels = network.module.eval()(inputs).argmax(1)
                outputs = [module(one) for one in (inputs, *more)]
                right += int(self.correct(outputs, labels).sum())
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


def find_objective(objective: str | type[Objective] | Objective) -> Objective:
    """Return an objective that is given as a name, as `module:Name`, as a class or as itself.

    Raises:
        ValueError: For an unknown name, naming the close ones; for a thing that is no objective, naming what it lacks.
        ImportError: For an objective of somebody else's that can't be imported.
    """
    found: object = objective
    if isinstance(objective, str):
        found = OBJECTIVES.get(objective)
    if isinstance(found, type):
        found = found()
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
