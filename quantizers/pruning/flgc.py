"""Convolutions that learn their groups, and run as ordinary group convolutions afterwards.

Fully learnable group convolution (FLGC: Wang et al., CVPR 2019, arXiv 1904.00346). A convolution of weight W (C_out, C_in,
k, k) has two more matrices, S (C_in, G) and T (C_out, G). Their rows say which of G groups an input channel and a filter
belong to: the softmax of a row, made hard by its largest entry. A filter sees the input channels of its own group only,

    W' = W * (T S^T)[:, :, None, None]        S, T hard: exactly one 1 in every row

Groups may be uneven, or empty. Once trained, channels are reordered so that those of a group stand together, which makes the
masked convolution an ordinary group convolution between two index operations (`GroupedConv2d`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers.copying import copy_network

START = 0.01  # logit of the group that a channel begins in; all others begin near 0
START_NOISE = 0.001  # standard deviation of the logits at the start


@dataclass(frozen=True)
class Grouping:
    """Which group every input channel and every filter of a convolution belongs to.

    Attributes:
        groups: How many groups there are, G; some may be empty.
        inputs: The group of each input channel, 0 to G - 1.
        outputs: The group of each filter.

    Raises:
        ValueError: For numbers that are no group, and for a grouping of nothing.
    """

    groups: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every number is a group."""
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups is {self.groups!r}; it must be an integer of at least 1")
        for words, numbers in (("input channel", self.inputs), ("filter", self.outputs)):
            if not numbers:
                raise ValueError(f"a grouping of no {words} means nothing: give a group for each")
            for place, number in enumerate(numbers):
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.groups:
                    raise ValueError(f"{words} {place} is in group {number!r}; groups are numbered 0 to {self.groups - 1}")

    @property
    def members(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Return of every group its input channels and its filters."""
        found = []
        for number in range(self.groups):
            inputs = tuple(channel for channel, group in enumerate(self.inputs) if group == number)
            outputs = tuple(channel for channel, group in enumerate(self.outputs) if group == number)
            found.append((inputs, outputs))
        return tuple(found)

    @property
    def live(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Return the groups that compute something: those with both input channels and filters."""
        return tuple((inputs, outputs) for inputs, outputs in self.members if inputs and outputs)

    @property
    def dead_inputs(self) -> tuple[int, ...]:
        """Return the input channels that no filter sees: those of groups without filters."""
        lost = [inputs for inputs, outputs in self.members if not outputs]
        return tuple(sorted(channel for inputs in lost for channel in inputs))

    @property
    def dead_outputs(self) -> tuple[int, ...]:
        """Return the filters that see no input channel, whose output is their bias: those of groups without inputs."""
        lost = [outputs for inputs, outputs in self.members if not inputs]
        return tuple(sorted(channel for outputs in lost for channel in outputs))

    def macs(self, kernel: int, positions: int) -> int:
        """Count the multiply-accumulates of the grouped convolution: sum over groups of C_in,g C_out,g k^2 H W.

        Args:
            kernel: Places of the kernel, k^2.
            positions: Places of the output, H W.

        Returns:
            The count, for one image.
        """
        pairs = sum(len(inputs) * len(outputs) for inputs, outputs in self.live)
        return pairs * kernel * positions

    def mask(self) -> Tensor:
        """Return T S^T, (C_out, C_in): 1 where a filter sees an input channel, 0 elsewhere."""
        return (torch.tensor(self.outputs)[:, None] == torch.tensor(self.inputs)).float()


def hard_assignment(logits: Tensor) -> Tensor:
    """Choose the group of every row: a 1 at its largest entry, at the first of them if there are several.

    (The published code compares with the maximum, so that two equal entries give two ones.)

    The gradient is that of the softmax of the row (straight-through estimator): all entries of a row learn, not only the one
    that was chosen.

    Args:
        logits: (rows, G).

    Returns:
        (rows, G) of zeros and exactly one 1 per row.
    """
    soft = logits.softmax(1)
    hard = F.one_hot(logits.argmax(1), logits.shape[1]).to(soft)
    return hard + (soft - soft.detach())


def even_grouping(inputs: int, outputs: int, groups: int, generator: torch.Generator | None = None) -> Grouping:
    """Draw groups at random that are as even as can be: the sizes of two of them differ by at most one.

    Args:
        inputs: Input channels.
        outputs: Filters.
        groups: How many groups.
        generator: Of what is random; None: torch's own.

    Returns:
        The groups.
    """
    drawn = []
    for count in (inputs, outputs):
        numbers = torch.arange(count) % groups
        drawn.append(tuple(numbers[torch.randperm(count, generator=generator)].tolist()))
    return Grouping(groups, *drawn)


class LearnedGroupConv2d(nn.Conv2d):
    """A dense convolution whose weight is masked by groups that are learned (Wang et al., CVPR 2019, arXiv 1904.00346).

    Attributes:
        input_groups: S, the logits (C_in, G) of the group of every input channel, a parameter.
        output_groups: T, the logits (C_out, G) of the group of every filter, a parameter.
    """

    input_groups: nn.Parameter
    output_groups: nn.Parameter

    @classmethod
    def of(
        cls, conv: nn.Conv2d, groups: int, *, generator: torch.Generator | None = None, learned: bool = True
    ) -> LearnedGroupConv2d:
        """Make it of a dense convolution, whose parameters it takes over.

        Channels begin in random groups that are as even as can be.

        Args:
            conv: The convolution.
            groups: How many groups, G.
            generator: Of what is random; None: torch's own.
            learned: Whether the groups are learned. False: they stay what they are drawn as.

        Returns:
            The convolution, on the same device.

        Raises:
            ValueError: For a convolution that has groups already, or fewer channels than groups, and for fewer than 1 group.
        """
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups is {groups!r}; it must be an integer of at least 1")
        if reason := why_not(conv, groups):
            raise ValueError(f"a convolution can't learn {groups} groups: {reason}")
        made = cls.__new__(cls)
        made.__dict__ = {key: value for key, value in conv.__dict__.items() if key != "_parameters"}
        made._parameters = dict(conv._parameters)
        start = even_grouping(conv.in_channels, conv.out_channels, groups, generator)
        for name, numbers in (("input_groups", start.inputs), ("output_groups", start.outputs)):
            logits = START_NOISE * torch.randn(len(numbers), groups, generator=generator)
            # The one that was drawn stands above all others, whatever the noise is.
            logits[range(len(numbers)), list(numbers)] = logits.max(1).values + START
            parameter = nn.Parameter(logits.to(conv.weight.device), requires_grad=learned)
            made.register_parameter(name, parameter)
        return made

    @property
    def grouping(self) -> Grouping:
        """Return the groups that channels are in now."""
        groups = self.input_groups.shape[1]
        inputs = tuple(self.input_groups.detach().argmax(1).tolist())
        outputs = tuple(self.output_groups.detach().argmax(1).tolist())
        return Grouping(groups, inputs, outputs)

    def masked_weight(self) -> Tensor:
        """Compute W * (T S^T): the weight without what joins an input channel and a filter of two groups."""
        mask = hard_assignment(self.output_groups) @ hard_assignment(self.input_groups).T
        return self.weight * mask[:, :, None, None]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the masked weight."""
        return self._conv_forward(input, self.masked_weight(), self.bias)

    def dense(self) -> nn.Conv2d:
        """Return an ordinary convolution of the masked weight: as large as before, the same outputs."""
        return _ordinary(self, self.masked_weight(), self.bias, 1)

    def grouped(self) -> GroupedConv2d:
        """Return the group convolution between index operations: fewer multiplications, the same outputs."""
        return GroupedConv2d(self, self.grouping)


class GroupedConv2d(nn.Module):
    """What a convolution of learned groups is in inference: ordinary group convolutions between two index operations.

    The input channels of a group are brought together, convolved, and the results put in the order that filters had. Groups
    of one size make one convolution with `groups`; otherwise each is a convolution of its own. An input channel that no
    filter sees isn't read; a filter that sees none is its bias, or zero.

    Attributes:
        grouping: Which channel is in which group.
        convs: The convolutions.
        constant: The biases of the filters that see no input channel; None without such filters, or without biases.
    """

    order_in: Tensor
    order_out: Tensor
    constant: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d, grouping: Grouping) -> None:
        """Cut it out of a dense convolution.

        Args:
            conv: The convolution; weights that join different groups are left out.
            grouping: Which channel is in which group.

        Raises:
            ValueError: For a grouping of other numbers of channels, and for one where no filter sees an input channel.
        """
        super().__init__()
        given = len(grouping.inputs), len(grouping.outputs)
        if given != (conv.in_channels, conv.out_channels) or conv.groups != 1:
            raise ValueError(
                f"a grouping of {given[0]} input channels and {given[1]} filters isn't of a convolution of "
                f"{conv.in_channels} and {conv.out_channels} in {conv.groups} groups"
            )
        live = grouping.live
        if not live:
            raise ValueError("no filter sees an input channel: every group lacks one or the other, so there is nothing left")
        self.grouping = grouping
        self.convs = nn.ModuleList(_convolutions(conv, live))
        inputs = [channel for group, _ in live for channel in group]
        outputs = [channel for _, group in live for channel in group]
        outputs += grouping.dead_outputs
        self.splits = [len(group) for group, _ in live]
        self.register_buffer("order_in", torch.tensor(inputs, device=conv.weight.device), persistent=False)
        order = torch.tensor(outputs, device=conv.weight.device).argsort()
        self.register_buffer("order_out", order, persistent=False)
        self.register_parameter("constant", None)
        if grouping.dead_outputs and conv.bias is not None:
            kept = conv.bias.detach()[list(grouping.dead_outputs)].clone()
            self.constant = nn.Parameter(kept, conv.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) by groups, in the order of channels that goes in and comes out."""
        x = x.index_select(1, self.order_in)
        if len(self.convs) == 1:
            out: Tensor = self.convs[0](x)
        else:
            parts = x.split(self.splits, 1)
            out = torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)
        dead = len(self.grouping.dead_outputs)
        if dead and self.constant is None:
            out = F.pad(out, (0, 0, 0, 0, 0, dead))
        elif self.constant is not None:
            constant = self.constant.view(1, -1, 1, 1).expand(len(out), -1, *out.shape[2:])
            out = torch.cat([out, constant], 1)
        return out.index_select(1, self.order_out)

    def extra_repr(self) -> str:
        """Say how many channels there are, and groups."""
        return f"{len(self.grouping.inputs)}, {len(self.grouping.outputs)}, groups={len(self.grouping.live)}"


def _convolutions(conv: nn.Conv2d, live: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[nn.Conv2d]:
    """Cut a dense convolution into those of its groups: one with `groups` if all are of one size."""
    weight = conv.weight
    if isinstance(conv, LearnedGroupConv2d):
        weight = conv.masked_weight()
    pieces = []
    biases = []
    for inputs, outputs in live:
        pieces.append(weight[list(outputs)][:, list(inputs)])
        if conv.bias is not None:
            biases.append(conv.bias[list(outputs)])
    if len({piece.shape for piece in pieces}) == 1:
        bias = torch.cat(biases) if biases else None
        return [_ordinary(conv, torch.cat(pieces), bias, len(pieces))]
    made = []
    for number, piece in enumerate(pieces):
        bias = biases[number] if biases else None
        made.append(_ordinary(conv, piece, bias, 1))
    return made


def _ordinary(like: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    """Make an ordinary convolution with the stride, padding and dilation of another one, of a weight and a bias."""
    given: dict[str, Any] = {name: getattr(like, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    given |= {"device": "meta", "dtype": weight.dtype, "groups": groups, "bias": bias is not None}
    conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], like.kernel_size, **given)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), like.weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), like.weight.requires_grad)
    return conv.train(like.training)


def why_not(conv: nn.Module, groups: int) -> str | None:
    """Say why a module can't learn so many groups.

    Args:
        conv: The module.
        groups: How many groups.

    Returns:
        The reason, or None if it can.
    """
    if isinstance(conv, LearnedGroupConv2d):
        return "it learns groups already"
    if type(conv) is not nn.Conv2d:
        return f"it is no Conv2d but {type(conv).__name__}"
    if conv.groups != 1:
        return f"it has {conv.groups} groups already"
    fewest = min(conv.in_channels, conv.out_channels)
    if fewest < groups:
        return f"it has {fewest} channels on one side, fewer than {groups}"
    return None


def learn_groups(
    network: nn.Module,
    groups: int,
    *,
    layers: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    learned: bool = True,
) -> dict[str, LearnedGroupConv2d]:
    """Put convolutions that learn their groups in the place of dense ones, in place.

    Args:
        network: The network.
        groups: How many groups each has, G, from 2 on.
        layers: The names of the convolutions. None: of all that have no groups yet and at least G channels on both sides.
        generator: Of what is random; None: torch's own.
        learned: Whether groups are learned. False: they stay what they are drawn as, even and at random.

    Returns:
        The new layers by name.

    Raises:
        ValueError: For fewer than 2 groups, a named layer that can't have groups, and a network without any that can.
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise ValueError(f"groups is {groups!r}; it must be an integer of at least 2")
    modules = dict(network.named_modules())
    if layers is None:
        chosen = [name for name, module in modules.items() if why_not(module, groups) is None]
        if not chosen:
            raise ValueError(
                f"no convolution of the network can learn {groups} groups: it takes one without groups, with at least "
                f"{groups} channels on both sides"
            )
    else:
        chosen = list(layers)
    for name in chosen:
        if name not in modules:
            raise ValueError(f"the network has no layer {name!r}")
        if reason := why_not(modules[name], groups):
            raise ValueError(f"layer {name!r} can't learn {groups} groups: {reason}")
    made = {}
    for name in chosen:
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        made[name] = LearnedGroupConv2d.of(conv, groups, generator=generator, learned=learned)
        _put(network, conv, made[name])
    return made


def learned_groups(network: nn.Module) -> dict[str, Grouping]:
    """Return the groups of every convolution that learns them, or runs in them, by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, (LearnedGroupConv2d, GroupedConv2d)):
            found[name] = module.grouping
    return found


def group_convolutions(network: nn.Module, groupings: Mapping[str, Grouping] | None = None) -> nn.Module:
    """Make a copy of a network whose convolutions of learned groups run as ordinary group convolutions.

    Args:
        network: The network, which stays as it is.
        groupings: Of dense convolutions, by name. None: of all layers that learn groups, theirs.

    Returns:
        The copy: in evaluation mode the same function up to rounding, of fewer multiplications.

    Raises:
        ValueError: Naming the layer, for one that is no convolution without groups, or where no filter sees an input.
    """
    made = copy_network(network)
    if groupings is None:
        groupings = {n: m.grouping for n, m in made.named_modules() if isinstance(m, LearnedGroupConv2d)}
    modules = dict(made.named_modules())
    for name, grouping in groupings.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"the network has no convolution {name!r} that could run in groups")
        try:
            _put(made, conv, GroupedConv2d(conv, grouping).train(conv.training))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return made


def make_dense(network: nn.Module) -> None:
    """Put ordinary convolutions of the masked weight in the place of those that learn groups, in place.

    The network has the layers and the names of tensors again that it had before it learned groups, and the same outputs.

    Args:
        network: The network.
    """
    for module in list(network.modules()):
        if isinstance(module, LearnedGroupConv2d):
            _put(network, module, module.dense())


def _put(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever that stands."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
