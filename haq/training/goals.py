"""What a training minimises: the loss of an objective, a loss of the user's, or the distance from a teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haq.data import Split
from haq.data.labels import class_numbers
from haq.networks import Network
from haq.problem.distribution import MAIN, main_output
from haq.problem.objective import Objective, class_scores
from haq.training.config import AUXILIARY
from hw_models.registry import import_by_name
from quantizers.calling import map_tensors, to_device
from quantizers.copying import evaluating

UserLoss = Callable[[Any, Any], Any]  # of outputs and targets: a number, or one for each sample
AUX = "aux"  # begins the names of auxiliary outputs
IMAGE_DIMS = 4  # (N, C, H, W)


@dataclass(frozen=True)
class Goal:
    """What a training minimises.

    Attributes:
        objective: Whose loss it is, and whose distance between outputs; None: classification of images.
        loss: Of outputs and targets, in place of both.
        auxiliary: Weight of the losses of auxiliary outputs.
    """

    objective: Objective | None = None
    loss: UserLoss | None = None
    auxiliary: float = AUXILIARY

    @property
    def is_classification(self) -> bool:
        """Say whether it is of class scores and labels."""
        return self.objective is None or self.objective.takes_scores

    @property
    def name(self) -> str:
        """Return what the objective is called."""
        if self.objective is None:
            return "accuracy"
        return self.objective.name

    def check_targets(self, targets: Any) -> None:
        """Raise ValueError if a training by targets has none, or such as no loss can be computed of."""
        if self.loss is not None:
            return
        if self.objective is not None and self.objective.compares_with_float and not self.is_classification:
            raise ValueError(
                f"objective {self.name!r} compares with the float network, so that there is nothing to train by: give a loss "
                "(loss=), a function of (outputs, targets)"
            )
        if targets is None:
            raise ValueError(
                f"training by objective {self.name!r} takes targets, and the data has none: give (inputs, targets)"
            )

    def check_teacher(self, network: Network, split: Split) -> None:
        """Check that outputs can be held against a teacher's, or that there is a loss.

        Args:
            network: The teacher, at whose outputs an objective that doesn't know them yet looks.
            split: The samples.

        Raises:
            ValueError: If there is neither.
        """
        if self.objective is not None and type(self.objective).look_at is not Objective.look_at:
            _look(self.objective, network, split)
        if self.loss is None and self.objective is not None and self.objective.distribution is None:
            raise ValueError(
                f"objective {self.name!r} has no distance between a network's outputs and the float network's, which "
                "fine-tuning would lessen: give a loss (loss=), a function of (outputs, targets)"
            )

    def looks_at_images(self, inputs: Any) -> bool:
        """Say whether inputs are images of classes, which may be mirrored, moved and mixed."""
        return self.is_classification and isinstance(inputs, Tensor) and inputs.dim() == IMAGE_DIMS

    def read(self, outputs: Any) -> Any:
        """Return what is looked at of outputs: class scores, or all there is."""
        if self.objective is not None:
            return self.objective.read(outputs)
        if hasattr(outputs, "keys"):
            outputs = main_output(outputs)
        return class_scores(outputs)

    def aligned(self, inputs: Any, targets: Any) -> Any:
        """Return targets in the places that outputs are held against; a loss of the user's gets them as they are."""
        if self.objective is None or self.loss is not None:
            return targets
        return self.objective.aligned(inputs, targets)

    def from_targets(self, outputs: Any, targets: Any, usual: Callable[[], Any]) -> Tensor:
        """Compute the loss of outputs by targets.

        Args:
            outputs: Of a network in training mode.
            targets: Of the batch.
            usual: Computes what the network returns in evaluation mode; called if that isn't a tensor for certain.

        Returns:
            A scalar.

        Raises:
            ValueError: For outputs and targets that don't fit, and a loss that is no number.
        """
        main, auxiliaries = self.divided(outputs, usual)
        total = self._loss(main, targets)
        for one in auxiliaries:
            total = total + self.auxiliary * self._loss(one, targets)
        return total

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            return user_loss(self.loss, outputs, targets)
        if self.objective is not None:
            return self.objective.training_loss(outputs, targets)
        scores = self.read(outputs)
        return F.cross_entropy(scores, class_numbers(targets, "what is trained on", scores.shape[1]))

    def from_teacher(self, expected: Any) -> Callable[[Any], Tensor]:
        """Make the loss of outputs: their mean distance from a teacher's.

        Args:
            expected: What the teacher returned for the same inputs.

        Returns:
            A function of a network's outputs, whose auxiliary ones play no part, that returns a scalar.
        """
        if self.is_usual_distance:
            return _distance_of_scores(lambda outputs: self.read(self.divided(outputs, lambda: expected)[0]), expected)
        objective = self.objective
        assert objective is not None
        wanted = objective.read(expected)

        def distance(outputs: Any) -> Tensor:
            main, _ = self.divided(outputs, lambda: expected)
            return objective.divergence(objective.read(main), wanted).mean()

        return distance

    @property
    def is_usual_distance(self) -> bool:
        """Say whether it is that of class scores, and no objective of somebody's own has another one."""
        if self.objective is None:
            return True
        kind = type(self.objective)
        is_own = kind.divergence is not Objective.divergence or kind.distribution is not Objective.distribution
        return self.is_classification and not is_own

    def divided(self, outputs: Any, usual: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Divide what a network returns in training mode into what it returns in evaluation mode, and auxiliary outputs.

        Args:
            outputs: What it returned.
            usual: Computes what it returns in evaluation mode.

        Returns:
            The outputs that count, and others of the same structure. Of a tuple (GoogLeNet, Inception) where there is a tensor
            in evaluation mode these are the first, or the one that is called as answers are, and the others of as many
            dimensions; of outputs by name those whose name begins with "aux".
        """
        if isinstance(outputs, Tensor):
            return outputs, []
        is_plain = isinstance(outputs, (tuple, list)) and not hasattr(outputs, "_fields")
        if is_plain and self.objective is None and self.loss is None:
            return outputs, []  # it is refused: no class scores
        expected = usual()
        if isinstance(expected, Tensor):
            return _first_of(outputs, expected)
        if isinstance(expected, Mapping) and isinstance(outputs, Mapping):
            return self._by_name(outputs, expected)
        return outputs, []

    def _by_name(self, outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        main: Any = outputs
        if set(outputs) != set(expected):
            main = {name: outputs[name] for name in expected if name in outputs}
        elif self.loss is not None:
            return outputs, []  # a loss of the user's knows what there is
        try:
            answer = main_output(main)
        except ValueError:
            return main, []
        names = [name for name, value in main.items() if value is answer]
        others = [
            value
            for name, value in outputs.items()
            if str(name).startswith(AUX) and isinstance(value, Tensor) and value.dim() == answer.dim()
        ]
        return main, [{**main, names[0]: other} for other in others]


def _look(objective: Objective, network: Network, split: Split) -> None:
    """Show an objective the outputs for one sample."""
    inputs, targets = split.take(torch.arange(1))
    if targets is None and objective.needs_labels:
        # Fine-tuning can do without targets; the objective knows outputs from the search then.
        return
    inputs = network_inputs(network, inputs)
    targets = to_device(targets, network.device)
    outputs = in_evaluation(network, network.module, inputs, targets)
    objective.look_at(objective.read(outputs), objective.aligned(inputs, targets))


def _first_of(outputs: Any, expected: Tensor) -> tuple[Any, list[Any]]:
    """Find the answer in a tuple or in outputs by name, and what is auxiliary to it."""
    if hasattr(outputs, "_fields"):
        entries = list(zip(outputs._fields, outputs, strict=True))
    elif isinstance(outputs, Mapping):
        entries = list(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        entries = [("", value) for value in outputs]
    else:
        return outputs, []
    entries = [(name, value) for name, value in entries if isinstance(value, Tensor) and value.dim() == expected.dim()]
    if not entries:
        return outputs, []
    answer = entries[0]
    for entry in entries:
        if entry[0] in MAIN:
            answer = entry
            break
    others = [value for name, value in entries if value is not answer[1] and (name == "" or str(name).startswith(AUX))]
    return answer[1], others


def _distance_of_scores(read: Callable[[Any], Tensor], expected: Any) -> Callable[[Any], Tensor]:
    """Make the mean Kullback-Leibler divergence of class scores from expected ones, in nats."""
    with torch.no_grad():
        targets = F.log_softmax(read(expected), dim=1)

    def distance(outputs: Any) -> Tensor:
        return F.kl_div(F.log_softmax(read(outputs), dim=1), targets, reduction="batchmean", log_target=True)

    return distance


def named_loss(name: str | None) -> UserLoss | None:
    """Import a loss that the user named, `module:function`; None for None.

    Raises ValueError for what can't be found, and for what is no function.
    """
    if name is None:
        return None
    found = import_by_name(name, "loss")
    if isinstance(found, type):
        found = found()  # such as torch.nn:SmoothL1Loss
    if not callable(found):
        raise ValueError(f"loss {name!r} is a {type(found).__name__}; it must be a function of (outputs, targets)")
    made: UserLoss = found
    return made


def user_loss(loss: UserLoss, outputs: Any, targets: Any) -> Tensor:
    """Compute a loss of the user's; one of several numbers is their mean.

    Args:
        loss: The function.
        outputs: Of a network.
        targets: Of the batch.

    Returns:
        A scalar.

    Raises:
        ValueError: If it fails, or returns no number.
    """
    try:
        given = loss(outputs, targets)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"`loss`, a function of (outputs, targets), failed: {reason}") from error
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.numel():
        what = type(given).__name__
        if isinstance(given, Tensor):
            what = f"{given.dtype} of shape {tuple(given.shape)}"
        raise ValueError(f"`loss` must return a number in a tensor, of which a gradient can be taken, not {what}")
    if given.dim():
        return given.mean()
    return given


def network_inputs(network: Network, inputs: Any) -> Any:
    """Turn the inputs of a batch, as the data gives them, into what a network takes, on its device."""
    return to_device(network.preprocess(inputs), network.device)


class Called(nn.Module):
    """A module that is called as the networks of its kind are, with the inputs of one batch."""

    def __init__(self, network: Network, module: nn.Module, targets: Any = None) -> None:
        """Take it.

        Args:
            network: Knows how it is called.
            module: The module.
            targets: Of the batch.
        """
        super().__init__()
        self.network = network
        self.module = module
        self.targets = targets

    def forward(self, inputs: Any) -> Any:
        """Compute the outputs."""
        return self.network.run(self.module, inputs, self.targets)

    def given(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
        """Yield the inputs of batches, as the network takes them; it is called with their targets meanwhile."""
        for inputs, targets in batches:
            self.targets = targets
            yield network_inputs(self.network, inputs)


def in_evaluation(network: Network, module: nn.Module, inputs: Any, targets: Any) -> Any:
    """Compute what a module returns in evaluation mode, in which it is meanwhile.

    Args:
        network: Knows how it is called.
        module: The module.
        inputs: Of a batch, as the network takes them.
        targets: Of the batch.

    Returns:
        Its outputs, without gradients.
    """
    with torch.no_grad(), evaluating(module):
        return network.run(module, inputs, targets)


def as_float32(outputs: Any) -> Any:
    """Return outputs with floats of half precision as float32."""

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.float()
        return tensor

    return map_tensors(outputs, converted)
