"""What a network's outputs say of its answers: how far apart two outputs are, and how the distance bends.

Post-training quantization and fine-tuning bring a quantized network's outputs back to those of the float network. How far
they are from them depends on what they are: scores of classes, of labels, or numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantizers.calling import leaves

MAIN = ("logits", "out", "scores", "output", "prediction")  # of outputs by name, what stands for the answer


class NotComparable(ValueError):
    """Two outputs have other shapes, so that no distance can be told."""


class Distribution(ABC):
    """Tells how far outputs are from others, per sample."""

    unit: str = "nats"

    @abstractmethod
    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Tell how far outputs are from expected ones; a gradient can be taken in `outputs`.

        Args:
            outputs: Of a network.
            expected: Of the float network, on the same inputs.

        Returns:
            Shape (samples,), 0 where both are the same.

        Raises:
            NotComparable: If they are of other shapes.
        """

    @abstractmethod
    def cotangents(self, outputs: Any, draws: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Draw vectors v at the outputs of which the mean of v v^T is the Hessian of the divergence, where it is 0.

        Args:
            outputs: Of the float network.
            draws: How many.
            generator: On the CPU, whatever device the outputs are on.

        Yields:
            A tensor for each of `differentiated(outputs)`.
        """

    @abstractmethod
    def differentiated(self, outputs: Any) -> list[Tensor]:
        """Return the tensors of outputs that the divergence is of."""


def main_output(outputs: Any) -> Any:
    """Return the tensor among outputs that stands for the answer.

    It is the output itself, if that is a tensor; of outputs by name (Hugging Face, torchvision) that of a name in `MAIN`; the
    only tensor that there is.

    Args:
        outputs: What a network returned.

    Returns:
        The tensor.

    Raises:
        ValueError: If it can't be told which it is, naming what there is.
    """
    if isinstance(outputs, Tensor):
        return outputs
    names: list[str] = []
    if hasattr(outputs, "keys"):
        names = [str(name) for name in outputs.keys()]  # noqa: SIM118  # such outputs iterate over other things than names
        for name in MAIN:
            if name in names and isinstance(outputs[name], Tensor):
                return outputs[name]
    found = leaves(outputs)
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} tensors in a {type(outputs).__name__}"
    if names:
        what = f"a {type(outputs).__name__} of {', '.join(names)}"
    raise ValueError(
        f"the network's outputs are {what}, and it isn't clear which is the answer: give `forward`, a function of (network, "
        "batch) that returns it, or an objective of your own"
    )


class Categorical(Distribution):
    """Scores of classes, of which one is right; the distance is the Kullback-Leibler divergence in nats.

    Samples with many answers (pixels, words) have the mean over these.
    """

    def __init__(self, dim: int = 1) -> None:
        """Take the dimension of the scores that the classes are along."""
        self.dim = dim

    def differentiated(self, outputs: Any) -> list[Tensor]:
        """Return the scores."""
        return [main_output(outputs)]

    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Tell KL(expected || outputs) of every sample; see `Distribution.divergence`."""
        given, wanted = _alike(main_output(outputs), main_output(expected))
        log_given = F.log_softmax(given, self.dim)
        log_wanted = F.log_softmax(wanted, self.dim)
        summed = F.kl_div(log_given, log_wanted, reduction="none", log_target=True)
        # A class that is impossible (a score of minus infinity) adds nothing.
        summed = summed.where(log_wanted > -torch.inf, 0.0).sum(self.dim)
        return summed.reshape(len(summed), -1).mean(1)

    def cotangents(self, outputs: Any, draws: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Draw v = L s, where L L^T = diag p - p p^T and s are signs; see `Distribution.cotangents`."""
        scores = main_output(outputs).detach()
        p = scores.softmax(self.dim)
        answers = p[0].numel() / p.shape[self.dim]
        for _ in range(draws):
            drawn = p.sqrt() * _signs(p, generator)
            drawn = drawn - p * drawn.sum(self.dim, keepdim=True)
            if answers > 1:
                drawn = drawn / answers**0.5
            yield [drawn]


class Bernoulli(Distribution):
    """Scores of labels, each of which may be right; the distance is the sum of their Kullback-Leibler divergences in nats."""

    def differentiated(self, outputs: Any) -> list[Tensor]:
        """Return the scores."""
        return [main_output(outputs)]

    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Tell the divergence of every sample; see `Distribution.divergence`."""
        given, wanted = _alike(main_output(outputs), main_output(expected))
        p = wanted.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(wanted, p, reduction="none")
        crossed = F.binary_cross_entropy_with_logits(given, p, reduction="none")
        return (crossed - entropy).reshape(len(given), -1).sum(1)

    def cotangents(self, outputs: Any, draws: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Draw signs times the standard deviation of every label; see `Distribution.cotangents`."""
        p = main_output(outputs).detach().sigmoid()
        for _ in range(draws):
            yield [(p * (1 - p)).sqrt() * _signs(p, generator)]


class Gaussian(Distribution):
    """Numbers; the distance is the squared difference as a share of the variance that the float network's outputs have.

    It is the mean over all numbers of a sample, and the mean over the tensors, if there are several. The variance is that of
    the batch.
    """

    unit = ""

    def differentiated(self, outputs: Any) -> list[Tensor]:
        """Return all tensors of numbers."""
        found = [leaf for leaf in leaves(outputs) if leaf.is_floating_point() and leaf.dim()]
        if not found:
            raise ValueError("the network's outputs have no tensor of numbers")
        return found

    def divergence(self, outputs: Any, expected: Any) -> Tensor:
        """Tell the share of every sample; see `Distribution.divergence`."""
        given, wanted = self.differentiated(outputs), self.differentiated(expected)
        if len(given) != len(wanted):
            raise NotComparable(f"there are {len(given)} outputs where the float network gives {len(wanted)}")
        total: Tensor | float = 0.0
        for one, other in zip(given, wanted, strict=True):
            one, other = _alike(one, other)
            squares = (one - other).square().reshape(len(one), -1).mean(1)
            total = total + squares / _spread(other)
        assert isinstance(total, Tensor)
        return total / len(given)

    def cotangents(self, outputs: Any, draws: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Draw signs, scaled as the divergence is; see `Distribution.cotangents`."""
        found = [leaf.detach() for leaf in self.differentiated(outputs)]
        scales = [(2 / (leaf[0].numel() * _spread(leaf) * len(found))) ** 0.5 for leaf in found]
        for _ in range(draws):
            yield [scale * _signs(leaf, generator) for scale, leaf in zip(scales, found, strict=True)]


def _spread(values: Tensor) -> float:
    """Return the variance of numbers; of those that are all the same their square; 1 for zeros."""
    values = values.detach().double()
    for spread in (float(values.var(correction=0)), float(values.square().mean())):
        if spread > 0:
            return spread
    return 1.0


def _alike(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return two outputs. Raises NotComparable unless they are of one shape."""
    if given.shape != wanted.shape:
        raise NotComparable(
            f"outputs of shape {tuple(given.shape)} can't be held against the float network's of shape {tuple(wanted.shape)}"
        )
    if not given.dim():
        return given[None], wanted[None]
    return given, wanted


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same on every device.
    return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)
