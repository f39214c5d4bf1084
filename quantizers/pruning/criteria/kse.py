"""Kernel sparsity and entropy: an input channel that is read by small or similar kernels says little.

Li, Lin, Zhang, Liu, Doermann, Wu, Huang and Ji, "Exploiting Kernel Sparsity and Entropy for Interpretable CNN Compression",
CVPR 2019, arXiv 1812.04368. The authors' code takes the entropy of another channel than that of the sparsity (it reshapes
where it should transpose); this follows the paper.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from quantizers.pruning.channels import ChannelGroup
from quantizers.pruning.criterion import Criterion
from quantizers.pruning.weights import reader_kernels, reading_layers

NEIGHBOURS = 5


def kernel_sparsity(kernels: Tensor) -> Tensor:
    """Return the sparsity of every input channel: the sum of absolute weights that read it (equation 3 of the paper).

    Args:
        kernels: Shape (inputs, kernels, values).

    Returns:
        Sums of shape (inputs,), in the weights' own units.
    """
    return kernels.abs().sum((1, 2))


def kernel_entropy(kernels: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the entropy of the kernels of every input channel (equations 5 and 6).

    The density of a kernel is the sum of its distances to the nearest others of the same channel; the entropy is that of the
    densities' shares of their sum: the more alike these are, the higher, so that a high one says that there is little
    variety. Kernels that are all equal have equal densities, though these are 0.

    Args:
        kernels: Shape (inputs, kernels, values).
        neighbours: How many of the nearest are looked at; all others where there are fewer.

    Returns:
        Bits, from 0 to log2 of the number of kernels, shape (inputs,).
    """
    inputs, count, _ = kernels.shape
    nearest = min(neighbours, count - 1)
    made = []
    for channel in range(inputs):
        if not nearest:
            made.append(0.0)
            continue
        of_one = kernels[channel]
        distances = torch.cdist(of_one, of_one, compute_mode="donot_use_mm_for_euclid_dist")
        distances.fill_diagonal_(math.inf)
        density = distances.topk(nearest, largest=False).values.sum(1)
        total = density.sum()
        if total == 0:
            made.append(math.log2(count))
            continue
        shares = density / total
        made.append(float(-torch.xlogy(shares, shares).sum() / math.log(2)))
    return torch.tensor(made, dtype=torch.float64)


def kernel_importance(kernels: Tensor, neighbours: int = NEIGHBOURS, entropy_weight: float = 1.0) -> Tensor:
    """Return the indicator of every input channel, v = sqrt(s / (1 + a e)), scaled to 0..1 over the layer (equation 7).

    Sparsity s and entropy e are scaled to 0..1 over the layer before. Where all values are equal, so that 0..1 can't be, they
    are 1 each, or 0 if they are 0.

    Args:
        kernels: Shape (inputs, kernels, values).
        neighbours: As in `kernel_entropy`.
        entropy_weight: The a of the equation.

    Returns:
        Numbers from 0, of the channel that says least, to 1, shape (inputs,).
    """
    sparsity = scaled(kernel_sparsity(kernels))
    entropy = scaled(kernel_entropy(kernels, neighbours))
    return scaled((sparsity / (1 + entropy_weight * entropy)).sqrt())


def scaled(values: Tensor) -> Tensor:
    """Scale values, none of them negative, so that the smallest is 0 and the largest 1; equal ones become 1, or stay 0."""
    least, most = values.min(), values.max()
    if least == most:
        return (values != 0).to(values.dtype)
    return (values - least) / (most - least)


@dataclasses.dataclass
class KernelSparsityEntropy(Criterion, name="kse"):
    """Scores a channel by the kernels that read it: the mean of the indicator over the layers that read the group.

    The indicator is scaled over the channels of the group. Without data. Units: none, from 0 to 1.

    Attributes:
        neighbours: How many of the nearest kernels make up a kernel's density: 5 in the paper's code.
        entropy_weight: How much the entropy counts beside the sparsity: 1 in the paper's code.

    Raises:
        ValueError: For fewer than one neighbour, and for a weight that is negative or not finite.
    """

    neighbours: int = NEIGHBOURS
    entropy_weight: float = 1.0

    summary = "sparsity and entropy of the kernels that read a channel (Li et al. 2019, KSE)"

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.neighbours < 1:
            raise ValueError(f"the number of nearest kernels must be 1 or more, not {self.neighbours!r}")
        if not (self.entropy_weight >= 0 and math.isfinite(self.entropy_weight)):
            raise ValueError(f"the weight of the entropy must be 0 or more, not {self.entropy_weight!r}")

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the mean over the layers that read the group of the channels' indicators.

        Raises:
            ValueError: Naming the group, if no convolution or linear layer reads it.
        """
        made = []
        for reader in reading_layers(network, group):
            kernels = reader_kernels(network, group, reader)
            made.append(kernel_importance(kernels, self.neighbours, self.entropy_weight))
        if not made:
            raise ValueError(
                f"criterion {self.name!r} can't rank group {group.name!r}: no convolution or linear layer reads it; use "
                "another criterion, such as 'l1'"
            )
        return torch.stack(made).mean(0)
