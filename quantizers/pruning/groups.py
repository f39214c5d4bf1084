"""Which channels of a float network must be removed together: groups, read from the dependency graph of torch-pruning.

A channel of a convolution goes to every layer that reads it, through norms, sums, concatenations
and depthwise convolutions; all of their weights for it have to go with it. `torch-pruning` (Fang et
al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900) says layer by layer
what depends on what. `channel_groups` reads that once into plain data, so that nothing is traced
again when channels are removed, and tries every group out before anybody gets it: where removal is
other than masking, the group is fixed, for that reason.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from quantizers.batches import called
from quantizers.calling import Forward, leaves
from quantizers.copying import copy_network
from quantizers.policy import QUANTIZABLE

OUT, IN = "out", "in"


@dataclass(frozen=True)
class Member:
    """What belongs to a group of channels in one module.

    Attributes:
        module: The module's dotted name.
        dim: "out" for the channels that it writes, "in" for those that a convolution or linear layer
            reads. What has but one dimension of channels (norms, PReLU, depthwise convolutions) has
            them as "out".
        places: By channel of the group, the positions in that dimension: several after a flatten, say.
    """

    module: str
    dim: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together wherever they are.

    Attributes:
        name: The dotted name of the first layer, in the order of the calls, whose output channels these
            are; of a further group of the same layer with "#2", "#3" ... behind it.
        channels: How many there are.
        unit: Channels are kept or removed in runs of so many: channels 0 to unit - 1, and so on. Not 1
            where a grouped convolution must keep as many in each of its groups, or where a run is a head of
            an attention.
        members: What belongs to them, by module.
        writers: The convolutions and linear layers whose output channels they are, in the order of the calls.
        readers: Those whose input channels they are.
    """

    name: str
    channels: int
    unit: int
    members: tuple[Member, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def units(self) -> int:
        """Return how many units the channels are."""
        return self.channels // self.unit

    def count(self, share: float) -> int:
        """Return how many channels are kept at a share.

        Args:
            share: Beyond 0, at most 1.

        Returns:
            The nearest multiple of the unit, half a unit rounded up; at least one unit, at most all channels.

        Raises:
            ValueError: For a share outside that.
        """
        if not 0 < share <= 1:
            raise ValueError(f"group {self.name!r} can't keep {share!r} of its channels; it must be beyond 0 and at most 1")
        units = math.floor(share * self.units + 0.5)
        return min(max(units, 1), self.units) * self.unit


@dataclass(frozen=True)
class ChannelGroups(Mapping[str, ChannelGroup]):
    """All groups of channels of a network, by name, in the order of the calls.

    Attributes:
        groups: The groups of which channels can be removed.
        fixed: Why the others can't, in words, by name.
    """

    groups: tuple[ChannelGroup, ...]
    fixed: Mapping[str, str]
    _by_name: dict[str, ChannelGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the groups by name."""
        object.__setattr__(self, "_by_name", {group.name: group for group in self.groups})

    def __getitem__(self, name: str) -> ChannelGroup:
        """Return a group. Raises KeyError, saying why if its channels can't be removed."""
        if name in self._by_name:
            return self._by_name[name]
        if name in self.fixed:
            raise KeyError(f"the channels of {name!r} can't be removed: {self.fixed[name]}")
        raise KeyError(f"no group of channels {name!r}; there are {', '.join(self._by_name) or 'none'}")

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._by_name)

    def __len__(self) -> int:
        """Count the groups."""
        return len(self.groups)


def channel_groups(network: nn.Module, example: Any, *, forward: Forward | None = None) -> ChannelGroups:
    """Find which channels of a network must be removed together, and which can be removed at all.

    Channels of the network's inputs are in no group, and groups of its outputs (classes) are fixed.

    Args:
        network: A float network; it is left alone.
        example: Inputs: a tensor, or any structure that the network takes (`quantizers.calling`).
        forward: `forward(network, example)` runs the network; None: it is called with the example.

    Returns:
        The groups.

    Raises:
        ValueError: For a network that can't be followed, naming what stands in the way; if torch-pruning
            isn't installed.
    """
    _check(network)
    with torch.inference_mode(False), torch.enable_grad():
        made = copy_network(network)
        made.eval()
        for parameter in made.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return _Reading(made, example, forward).groups()


def _check(network: nn.Module) -> None:
    """Refuse networks that can't be copied smaller."""
    if hasattr(network, "_orig_mod"):
        raise ValueError("the network is compiled: prune what was compiled (its `_orig_mod`), and compile the result")
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"the weight of {name!r} is computed from others (a parametrization): remove that before pruning")
        if isinstance(module, QUANTIZABLE) and not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {name!r} is computed from others (weight_norm, prune): remove that before pruning"
            )


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ValueError("groups of channels need torch-pruning, which isn't installed: pip install torch-pruning") from None
    return torch_pruning


class _Outputs(nn.Module):
    """A network whose outputs are a list of tensors, each behind one more operation, which marks it as an output."""

    def __init__(self, network: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.network = network
        self._run = forward

    def forward(self, example: Any) -> list[Tensor]:
        """Return the outputs in which gradients flow."""
        outputs = leaves(called(self.network, example, self._run))
        return [output * 1 for output in outputs if output.requires_grad]


class _Atoms:
    """Positions of channels; those that must be removed together are in one set (union-find)."""

    def __init__(self) -> None:
        self.parents: dict[Any, Any] = {}

    def root(self, place: Any) -> Any:
        """Return what stands for the set of a position."""
        parents = self.parents
        parents.setdefault(place, place)
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    def join(self, one: Any, other: Any) -> None:
        """Put two positions into one set."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self.parents[other] = one

    def sets(self) -> list[list[Any]]:
        """Return the sets."""
        found: dict[Any, list[Any]] = {}
        for place in self.parents:
            found.setdefault(self.root(place), []).append(place)
        return list(found.values())


class _Reading:
    """Reads the groups of one network."""

    def __init__(self, network: nn.Module, example: Any, forward: Forward | None) -> None:
        """Run the network once, and let torch-pruning write down what depends on what."""
        self.network = network
        self.tools = _torch_pruning()
        self.names = {module: name for name, module in network.named_modules()}
        self.calls: Counter[nn.Module] = Counter()
        self.order: dict[str, int] = {}
        handles = [module.register_forward_pre_hook(self._note) for module in self.names]
        wrapped = _Outputs(network, forward)
        self.graph = self.tools.DependencyGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.graph.build_dependency(wrapped, [example], verbose=False)
        finally:
            for handle in handles:
                handle.remove()
        self.atoms = _Atoms()
        self.reasons: dict[Any, str] = {}  # why the channel at a position can't be removed

    def _note(self, module: nn.Module, _: Any) -> None:
        self.calls[module] += 1
        self.order.setdefault(self.names[module], len(self.order))

    def groups(self) -> ChannelGroups:
        """Return all groups."""
        roots = [m for m in self.graph.module2node if isinstance(m, _ConvNd | nn.Linear) and m in self.names]
        roots.sort(key=lambda module: self.order[self.names[module]])
        for module in roots:
            self._follow(module)
        return self._sorted()

    def _follow(self, root: nn.Module) -> None:
        """Join every output channel of a layer with all positions that depend on it."""
        index = self.tools._helpers._HybridIndex
        pruner = self.graph.get_pruner_of_module(root)
        count = pruner.get_out_channels(root)
        node = self.graph.module2node[root]
        start = [index(idx=channel, root_idx=channel) for channel in range(count)]
        seen: dict[Any, set[Any]] = {}
        todo = [(node, pruner.prune_out_channels, start)]
        while todo:
            node, side, channels = todo.pop()
            known = seen.setdefault((node, side), set())
            new = [channel for channel in channels if channel not in known]
            if not new:
                continue
            known.update(new)
            self._join(root, node, side, new)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(side):
                    mapped = new
                    for mapping in dependency.index_mapping:
                        if mapping is not None:
                            mapped = mapping(mapped)
                    todo.append((dependency.target, dependency.handler, mapped))

    def _join(self, root: nn.Module, node: Any, side: Any, channels: Iterable[Any]) -> None:
        """Join channels at a node with the root's."""
        name = self.names[root]
        module = node.module
        reason = self._reason(module)
        known = self._kind(module, node, side)
        for channel in channels:
            place = (name, OUT, channel.root_idx)
            if known is not None:
                self.atoms.join(place, (*known, channel.idx))
            if reason:
                self.reasons.setdefault(place, reason)

    def _kind(self, module: Any, node: Any, side: Any) -> tuple[str, str] | None:
        """Return name and dimension of a module that has weights for its channels; None for what has none."""
        if not isinstance(module, nn.Module) or module not in self.names:
            return None
        name = self.names[module]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None
        if isinstance(module, _ConvNd | nn.Linear):
            if is_depthwise(module) or side == self.graph.get_pruner_of_module(module).prune_out_channels:
                return name, OUT
            return name, IN
        if isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.PReLU):
            return name, OUT
        return None

    def _reason(self, module: Any) -> str:
        """Say why channels that reach a module can't be removed; nothing if they can."""
        types = self.tools.ops
        if isinstance(module, types._OutputOp):
            return "they are outputs of the network"
        if isinstance(module, nn.Parameter):
            return "a parameter that belongs to no layer is added to them or multiplied by them"
        if module not in self.names:
            return ""
        name = self.names[module]
        if self.calls[module] > 1:
            return f"{name} is called {self.calls[module]} times"
        if isinstance(module, nn.LayerNorm):
            return f"{name} normalises over them (LayerNorm)"
        if isinstance(module, _ConvTransposeNd | nn.MultiheadAttention | nn.LSTM | nn.Embedding | nn.GroupNorm):
            return f"{name}, a {type(module).__name__}, has them"
        if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
            return f"{name}, a grouped convolution, has them"
        return ""

    def _sorted(self) -> ChannelGroups:
        """Put channels into groups: those that are at the same members."""
        by_members: dict[Any, list[list[Any]]] = {}
        for places in self.atoms.sets():
            members = Counter((name, dim) for name, dim, _ in places)
            by_members.setdefault(frozenset(members.items()), []).append(sorted(places, key=self._rank))
        groups, fixed = [], {}
        taken: Counter[str] = Counter()
        for channels in sorted(by_members.values(), key=lambda channels: self._rank(min(channels[0], key=self._rank))):
            channels.sort(key=lambda places: self._rank(places[0]))
            group = self._group(channels)
            taken[group.name] += 1
            name = group.name
            if taken[name] > 1:
                name = f"{name}#{taken[name]}"
            reasons = [self.reasons[place] for places in channels for place in places if place in self.reasons]
            if reasons:
                fixed[name] = reasons[0]
            else:
                groups.append(group)
        return ChannelGroups(tuple(groups), fixed)

    def _rank(self, place: tuple[str, str, int]) -> tuple[int, int, int]:
        name, dim, position = place
        return self.order[name], dim == OUT, position

    def _group(self, channels: list[list[Any]]) -> ChannelGroup:
        keys = sorted({(self.order[name], name, dim) for places in channels for name, dim, _ in places})
        members = []
        for _, name, dim in keys:
            at = [tuple(sorted(p for n, d, p in places if (n, d) == (name, dim))) for places in channels]
            members.append(Member(name, dim, tuple(at)))
        layers = {name for name, module in self.network.named_modules() if isinstance(module, QUANTIZABLE)}
        writers = tuple(m.module for m in members if m.dim == OUT and m.module in layers)
        readers = tuple(m.module for m in members if m.dim == IN and m.module in layers)
        both = tuple(name for name in writers if is_depthwise(self.network.get_submodule(name)))
        order = self.order
        readers = tuple(sorted({*readers, *both}, key=lambda name: order[name]))
        return ChannelGroup(writers[0], len(channels), 1, tuple(members), writers, readers)


def is_depthwise(module: nn.Module) -> bool:
    """Say whether a module is a convolution that makes each channel of the same channel of its input."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1
