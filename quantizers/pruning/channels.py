"""Groups of channels as plain data: what belongs to a channel in every module."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from quantizers.kept import count_at

OUT, IN = "out", "in"


@dataclass(frozen=True)
class Member:
    """What belongs to a group of channels in one module.

    Attributes:
        module: The module's dotted name; of a parameter or buffer that is no convolution's, linear layer's or
            norm's, that tensor's.
        dim: "out" for the channels that it writes, "in" for those that a convolution or linear layer
            reads. What has but one dimension of channels (norms, PReLU, depthwise convolutions) has
            them as "out".
        places: By channel of the group, the positions in that dimension: several after a flatten, say.
        axis: The axis of the weight, or of the parameter, along which they lie.
    """

    module: str
    dim: str
    places: tuple[tuple[int, ...], ...]
    axis: int = 0

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """Return the places as an array of integers (channels, places of each): every channel has as many."""
        return np.array(self.places, dtype=np.int64)


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
        return count_at(self.channels, self.unit, share)


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
