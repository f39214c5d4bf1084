"""The answers of what was written beside those of the network in PyTorch, on the whole test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.deployment.exporter import Samples
from haq.deployment.interpreter import OUTPUT_SHARE
from haq.store.units import percent


@dataclass
class Answers:
    """How many images are answered as in PyTorch, and how many rightly by both.

    count, same      images, and those with the same answer: the largest output, everywhere in a map
    ties             others whose answer is nearly as large in PyTorch: within OUTPUT_SHARE of the largest output there is
    right, right_in_torch    of images with a class, those that are given it
    labelled         images with a class
    difference       the largest difference of outputs
    largest          the largest output in PyTorch
    """

    count: int = 0
    same: int = 0
    ties: int = 0
    right: int = 0
    right_in_torch: int = 0
    labelled: int = 0
    difference: float = 0.0
    largest: float = 0.0

    @property
    def all_same(self) -> bool:
        """Whether all answers are the same, or as good as that."""
        return self.same + self.ties == self.count

    def add(self, expected: Tensor, outputs: Tensor, labels: Tensor | None) -> None:
        """Add the outputs of some images.

        Args:
            expected: The network's in PyTorch, (N, classes) or (N, classes, H, W).
            outputs: Those of what was written, of the same shape.
            labels: The right classes (N,); None if there are none.
        """
        self.count += len(expected)
        answers, in_torch = outputs.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
        same = (answers == in_torch).reshape(len(expected), -1).all(1)
        behind = expected.gather(1, in_torch) - expected.gather(1, answers)
        near = (behind <= OUTPUT_SHARE * expected.abs().max()).reshape(len(expected), -1).all(1)
        self.same += int(same.sum())
        self.ties += int((near & ~same).sum())
        self.difference = max(self.difference, float((expected - outputs).abs().max()))
        self.largest = max(self.largest, float(expected.abs().max()))
        if labels is not None and labels.shape == answers[:, 0].shape:
            self.labelled += labels.numel()
            self.right += int((answers[:, 0] == labels).sum())
            self.right_in_torch += int((in_torch[:, 0] == labels).sum())

    def rows(self) -> list[tuple[str, str]]:
        """Describe them in lines of a table."""
        words = f"{self.same:,} of {self.count:,} test images"
        if self.ties:
            words = f"{words}, {self.ties:,} as good as equal"
        rows = [("same answer as in PyTorch", words)]
        if self.labelled:
            before = percent(self.right_in_torch / self.labelled)
            rows.append(("accuracy", f"{percent(self.right / self.labelled)} (in PyTorch {before})"))
        apart = f"{self.difference:.3g} (the largest is {self.largest:.3g})"
        rows.append(("largest difference of outputs from PyTorch's", apart))
        return rows


@torch.no_grad()
def compare_answers(network: nn.Module, run: Callable[[Tensor], Tensor], samples: Samples) -> Answers:
    """Compare the answers to all test images.

    Args:
        network: The quantized network.
        run: Returns the outputs of what was written for images (N, C, H, W).
        samples: The images.

    Returns:
        What differs.
    """
    found = Answers()
    for images, labels in samples.test():
        known = None
        if samples.labelled and isinstance(labels, Tensor):
            known = labels
        expected = network(images)
        found.add(expected, torch.as_tensor(run(images)).reshape(expected.shape), known)
    return found
