"""Soft masks on channels that are learned against a discriminator, without labels; those that become zero are removed.

Generative adversarial learning (GAL: Lin et al., "Towards Optimal Structured CNN Pruning via Generative Adversarial
Learning", CVPR 2019, arXiv 1903.09291). The network with masks m is a generator, whose outputs f_g are to be those f_b of the
network as it was, the baseline. A discriminator D tries to tell the two apart:

    min over W, m   max over D   L_adv(f_b, f_g; D) + mu |f_b - f_g|^2 + R(W) + lambda |m|_1 + R_adv(D)

The masks are moved by FISTA (`Fista`), which makes many of them exactly zero. Labels play no part.

A mask multiplies a channel where it is read: in the input of every convolution and linear layer that reads it. A channel whose
mask is zero can then be removed without any change, and the other masks become part of the weights that read
(`SoftMasks.fold`). Residual blocks may have a mask each, which multiplies what their branch adds; where it is zero, the block
goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers.pruning.blocks import ResidualBlock, scale_output
from quantizers.pruning.channels import IN, ChannelGroup, ChannelGroups

HIDDEN = (128, 256, 128)  # neurons of the discriminator's hidden layers


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """Move values towards zero by a threshold, and make those nearer than it exactly zero: sign(x) max(|x| - t, 0).

    It is the proximal operator of t |x|_1.

    Args:
        values: Of any shape.
        threshold: t, not below 0.

    Returns:
        Values of the same shape.
    """
    return values.sign() * (values.abs() - threshold).clamp(min=0)


class Fista:
    """The fast iterative shrinkage-thresholding algorithm (Beck & Teboulle 2009) for parameters that are never negative.

    It minimises f(m) + lambda |m|_1 over m >= 0. Gradients of f are taken at an extrapolated point y:

        y = m_k + (t_k - 1) / t_(k+1) (m_k - m_(k-1))          t_(k+1) = (1 + sqrt(1 + 4 t_k^2)) / 2, t_0 = 0
        m_(k+1) = max(soft_threshold(y - rate grad f(y), rate lambda), 0)

    (The published code of GAL takes the gradient at m_k, and adds that of lambda |m|_1 to it, so that lambda counts twice.)

    Attributes:
        parameters: What is moved: m between `step` and `extrapolate`, y between `extrapolate` and `step`.
        momentum: t_k; 0 at the start and after a restart, where y is m.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin at the parameters' values."""
        self.parameters = list(parameters)
        self.momentum = 0.0
        self._now = [parameter.detach().clone() for parameter in self.parameters]
        self._before = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def extrapolate(self) -> None:
        """Set the parameters to the point where the next step takes its gradients."""
        following = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2
        weight = (self.momentum - 1) / following
        for parameter, now, before in zip(self.parameters, self._now, self._before, strict=True):
            parameter.copy_(now + weight * (now - before))

    @torch.no_grad()
    def settle(self) -> None:
        """Set the parameters to where they are between steps, if they were extrapolated."""
        for parameter, now in zip(self.parameters, self._now, strict=True):
            parameter.copy_(now)

    @torch.no_grad()
    def step(self, rate: float, penalty: float) -> None:
        """Take a step by the gradients of the parameters, which are where `extrapolate` set them.

        Args:
            rate: The learning rate, above 0.
            penalty: lambda, not below 0.

        Raises:
            ValueError: For a rate or a penalty outside that.
        """
        if not rate >= 0 or not penalty >= 0:
            raise ValueError(f"a step of rate {rate!r} and penalty {penalty!r} means nothing: both must be numbers from 0 on")
        for place, parameter in enumerate(self.parameters):
            moved: Tensor = parameter
            if parameter.grad is not None:
                moved = parameter - rate * parameter.grad
            made = soft_threshold(moved, rate * penalty).clamp(min=0)
            self._before[place] = self._now[place]
            self._now[place] = made
            parameter.copy_(made)
        self.momentum = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2

    def restart(self) -> None:
        """Forget the momentum: the next step begins where the parameters are."""
        self.momentum = 0.0
        self._before = [now.clone() for now in self._now]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from."""
        return {
            "momentum": self.momentum,
            "now": [tensor.clone() for tensor in self._now],
            "before": [tensor.clone() for tensor in self._before],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError for tensors of other shapes."""
        for key in ("now", "before"):
            shapes = [tuple(tensor.shape) for tensor in state[key]]
            if shapes != [tuple(parameter.shape) for parameter in self.parameters]:
                raise ValueError(f"masks of shapes {shapes} aren't those of this network")
        self.momentum = float(state["momentum"])
        for place, parameter in enumerate(self.parameters):
            self._now[place] = state["now"][place].to(parameter).clone()
            self._before[place] = state["before"][place].to(parameter).clone()
        self.settle()


class _MaskedInput:
    """A hook that multiplies what a layer reads by masks: of each position of the input, the mask that counts for it."""

    def __init__(self, mask: nn.Parameter, index: Tensor, axis: int) -> None:
        self.mask = mask
        self.index = index  # of every position its unit of the mask; the last number for a position that has none
        self.axis = axis  # of the layer's weight, along which the positions lie

    def values(self) -> Tensor:
        """Return what every position is multiplied by."""
        padded = torch.cat([self.mask, self.mask.new_ones(1)])
        return padded[self.index.to(padded.device)]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        values = self.values().to(x.dtype)
        if not isinstance(module, nn.Linear):
            values = values.view(-1, *[1] * (x.dim() - 2))
        return (x * values, *others)


class _MaskedOutput:
    """A hook that multiplies what a layer gives by a mask."""

    def __init__(self, mask: nn.Parameter) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.mask.to(output.dtype)


class SoftMasks(nn.Module):
    """Soft masks on the channels of a network, one for every channel (or unit of channels) that can be removed.

    While they are attached, every layer of the network that reads a channel reads it times its mask. They begin at 1, where
    they change nothing.

    Attributes:
        groups: The groups of channels that they are on.
        masks: The masks of each group, (units,), in the order of the groups.
        blocks: The residual blocks that have a mask.
        block_masks: The mask of each block, (1,), in the order of the blocks.
    """

    def __init__(self, network: nn.Module, groups: ChannelGroups, blocks: Mapping[str, ResidualBlock] | None = None) -> None:
        """Attach masks to a network.

        Args:
            network: The float network; it gets hooks, no parameters.
            groups: What `channel_groups` returned for it.
            blocks: What `residual_blocks` returned for it; None: only channels have masks.

        Raises:
            ValueError: If no channel and no block of the network can be removed.
        """
        super().__init__()
        self.blocks = dict(blocks or {})
        if not len(groups) and not self.blocks:
            reasons = ""
            for name, reason in list(groups.fixed.items())[:1]:
                reasons = f" (of {name!r}: {reason})"
            raise ValueError(f"no channels of the network can be removed{reasons}: there is nothing to learn masks for")
        self.groups = groups
        weight = next(network.parameters())
        masks = [nn.Parameter(torch.ones(group.units, device=weight.device)) for group in groups.groups]
        self.masks = nn.ParameterList(masks)
        self._readers: list[tuple[str, _MaskedInput]] = []
        self._handles: list[Any] = []
        for mask, group in zip(self.masks, groups.groups, strict=True):
            for member in group.members:
                if member.dim == IN:
                    layer = network.get_submodule(member.module)
                    hook = _MaskedInput(mask, _index(group, member.places, _inputs_of(layer)), member.axis)
                    self._readers.append((member.module, hook))
                    self._handles.append(layer.register_forward_pre_hook(hook))
        self.block_masks = nn.ParameterList(
            [nn.Parameter(torch.ones(1, device=weight.device)) for _ in range(len(self.blocks))]
        )
        for mask, block in zip(self.block_masks, self.blocks.values(), strict=True):
            last = network.get_submodule(block.last)
            self._handles.append(last.register_forward_hook(_MaskedOutput(mask)))

    def detach_from_network(self) -> None:
        """Take the masks off the network, whose layers then read channels as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def fold(self, network: nn.Module) -> None:
        """Multiply the weights that read channels by the masks, and take the masks off: the same function, without them.

        Args:
            network: The network that they are attached to, or one like it.
        """
        self.detach_from_network()
        for name, hook in self._readers:
            _scale_inputs(network.get_submodule(name), hook.values(), hook.axis)
        for mask, block in zip(self.block_masks, self.blocks.values(), strict=True):
            scale_output([network.get_submodule(block.last)], mask)

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Return the channels that are kept, by group, as `remove_channels` takes them: those whose masks aren't zero.

        A group whose masks are all zero keeps its first unit, whose weights are zero once masks are folded.
        """
        found = {}
        for mask, group in zip(self.masks, self.groups.groups, strict=True):
            units = mask.detach().nonzero().flatten().tolist() or [0]
            channels = [unit * group.unit + place for unit in units for place in range(group.unit)]
            found[group.name] = tuple(channels)
        return found

    def lost_blocks(self) -> dict[str, bool]:
        """Return the blocks whose mask is zero, as `remove_blocks` takes them."""
        found = {}
        for mask, (name, block) in zip(self.block_masks, self.blocks.items(), strict=True):
            if not mask.any():
                found[name] = block.relu
        return found

    def zeros(self) -> int:
        """Count the masks of channels that are exactly zero."""
        return sum(int((mask == 0).sum()) for mask in self.masks)


def _scale_inputs(layer: nn.Module, values: Tensor, axis: int) -> None:
    """Multiply the weights of a layer by a value for each position of its input."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = getattr(layer, "groups", 1)
    if axis == 0 or groups == 1:
        shape = [1] * weight.dim()
        shape[axis] = -1
        weight.mul_(values.view(shape))
        return
    # The filters of a grouped convolution have weights for the inputs of their own group alone.
    by_group = weight.view(groups, -1, *weight.shape[1:])
    by_group.mul_(values.view(groups, 1, -1, *[1] * (weight.dim() - 2)))


def _index(group: ChannelGroup, places: Sequence[Sequence[int]], size: int) -> Tensor:
    """Return of every input position of a layer the unit of the group that it belongs to; the number of units for others."""
    index = torch.full((size,), group.units)
    for channel, positions in enumerate(places):
        index[list(positions)] = channel // group.unit
    return index


def _inputs_of(layer: nn.Module) -> int:
    """Count the input channels of a layer."""
    count = getattr(layer, "in_channels", None) or getattr(layer, "in_features", None)
    assert isinstance(count, int)
    return count


class Discriminator(nn.Module):
    """Tells the outputs of two networks apart: a multilayer perceptron K - 128 - 256 - 128 - 1 on class scores.

    It returns one logit, above 0 for "of the baseline". (That of the published code ends in a sigmoid, of which its loss takes
    the sigmoid once more, so that its answers lie between 0.5 and 0.73.)
    """

    def __init__(self, outputs: int, generator: torch.Generator | None = None) -> None:
        """Make it for networks of so many outputs, with random weights (He et al. 2015).

        Args:
            outputs: Class scores of the networks, K.
            generator: Of what is random, on the CPU; None: torch's own.
        """
        super().__init__()
        layers: list[nn.Module] = []
        sizes = (outputs, *HIDDEN, 1)
        for inputs, neurons in itertools.pairwise(sizes):
            layer = nn.utils.skip_init(nn.Linear, inputs, neurons)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, scores: Tensor) -> Tensor:
        """Return a logit (N,) for class scores (N, K)."""
        logits: Tensor = self.layers(scores)
        return logits.squeeze(1)


def discriminator_loss(of_baseline: Tensor, of_generator: Tensor, regularizer: float = 1.0) -> Tensor:
    """Return what the discriminator minimises: binary cross-entropy, and the adversarial regulariser of Lin et al. 2019.

    The regulariser is the cross-entropy of calling the generator's outputs the baseline's. It holds the discriminator back, so
    that the generator always has a gradient to follow.

    Args:
        of_baseline: Its logits for the baseline's outputs.
        of_generator: Its logits for the generator's outputs.
        regularizer: Weight of the regulariser.

    Returns:
        A scalar.
    """
    real = F.binary_cross_entropy_with_logits(of_baseline, torch.ones_like(of_baseline))
    made = F.binary_cross_entropy_with_logits(of_generator, torch.zeros_like(of_generator))
    fooled = F.binary_cross_entropy_with_logits(of_generator, torch.ones_like(of_generator))
    return real + made + regularizer * fooled


def generator_loss(outputs: Tensor, expected: Tensor, logits: Tensor, mu: float = 1.0) -> Tensor:
    """Return what the network with masks minimises, but for the penalty on masks, which `Fista` takes care of.

    Args:
        outputs: Its class scores, f_g.
        expected: Those of the baseline on the same inputs, f_b.
        logits: The discriminator's, for `outputs`.
        mu: Weight of the squared distance of the scores (its mean over samples and classes).

    Returns:
        A scalar: the cross-entropy of being taken for the baseline, plus mu times the distance.
    """
    fooled = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    return fooled + mu * F.mse_loss(outputs, expected)
