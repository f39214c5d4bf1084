"""What a network asks of hardware once some of its channels are gone, for many numbers of channels, without building each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.workload import Layer, Workload
from quantizers.pruning.channels import IN, OUT, ChannelGroup

Integers = NDArray[np.int64]

KEPT_WORKLOADS = 256  # of the shapes that were asked for last
OF_LAYERS = ("in_channels", "out_channels", "groups")


class Shapes:
    """The layers and activations of a network as functions of how many channels its groups have.

    Every number that a workload has besides is linear in these counts: channels of a layer, elements of an activation,
    parameters of a norm. The layers' follow from the groups. The others are found by running the smaller network once for
    every group, as soon as somebody asks for them, and are held against a network in which all groups are smaller; if they are
    no linear functions, every shape that is asked for is run.

    Attributes:
        workload: Of the network with all of its channels.
        groups: The groups whose channels can be removed, in order; counts are in this order.
        full: How many channels they have, shape (groups,).
    """

    def __init__(
        self,
        workload: Workload,
        groups: Sequence[ChannelGroup],
        fewest: Sequence[int],
        run: Callable[[Mapping[str, int]], Workload],
    ) -> None:
        """Read from the groups what belongs to their channels.

        Args:
            workload: Traced layers of the network.
            groups: The groups.
            fewest: The smallest number of channels of each that will be asked for.
            run: Makes the network with so many channels of each group, and traces it.

        Raises:
            ValueError: Naming the layer, for one that becomes something else than its groups say.
        """
        self.workload = workload
        self.groups = tuple(groups)
        self.full = np.array([group.channels for group in groups], np.int64)
        self._fewest = np.array(fewest, np.int64)
        self._run = run
        self._kept: OrderedDict[tuple[int, ...], Workload] = OrderedDict()
        layers = workload.layers
        self._sizes = np.array([[getattr(layer, name) for layer in layers] for name in OF_LAYERS], np.int64)
        self._taken = self._places_of_channels()
        self._slopes: NDArray[np.float64] | None = None
        self._is_linear = True
        self._smallest = run(self._named(self._fewest))
        self._check_layers()

    def _places_of_channels(self) -> NDArray[np.float64]:
        """Tell how many inputs, outputs and convolution groups of each layer a channel is, shape (groups, 3, layers)."""
        numbers = {layer.name: index for index, layer in enumerate(self.workload.layers)}
        taken = np.zeros((len(self.groups), *self._sizes.shape))
        for row, group in zip(taken, self.groups, strict=True):
            for member in group.members:
                index = numbers.get(member.module)
                if index is None:
                    continue
                layer = self.workload.layers[index]
                count = len(member.places[0])
                reads, writes = member.dim == IN, member.dim == OUT
                if layer.groups == layer.in_channels == layer.out_channels > 1:
                    reads = writes = True  # each channel is an input and an output
                row[0, index] += count * reads
                row[1, index] += count * writes
                row[2, index] += count * (reads and layer.kind == "depthwise")
        return taken

    def touched(self, group: int) -> tuple[int, ...]:
        """Return the layers that have channels of a group, by their places in the workload."""
        return tuple(int(index) for index in np.flatnonzero(self._taken[group].any(0)))

    def sizes(self, counts: Integers) -> Integers:
        """Return input channels, output channels and convolution groups of all layers.

        Args:
            counts: Channels of every group, shape (shapes, groups).

        Returns:
            Shape (shapes, 3, layers).
        """
        # As floats, whose products are fast; they hold whole numbers up to 2 ** 53 exactly.
        gone = (self.full - counts).astype(float) @ self._taken.reshape(len(self.full), -1)
        return self._sizes - gone.astype(np.int64).reshape(-1, *self._sizes.shape)

    def layers(self, counts: Sequence[int] | Integers) -> tuple[Layer, ...]:
        """Return the layers at counts of shape (groups,)."""
        sizes = self.sizes(np.asarray(counts, np.int64)[None])[0].T.tolist()
        return tuple(layer.resized(*size) for layer, size in zip(self.workload.layers, sizes, strict=True))

    def workload_of(self, counts: Sequence[int] | Integers) -> Workload:
        """Return the workload at counts of shape (groups,), as tracing the smaller network would tell it."""
        key = tuple(int(count) for count in counts)
        if key == tuple(self.full.tolist()):
            return self.workload
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._made(np.array(key, np.int64))
        self._kept[key] = made
        if len(self._kept) > KEPT_WORKLOADS:
            self._kept.popitem(last=False)
        return made

    def elements(self, counts: Integers) -> Integers:
        """Return how many values each of the workload's buffers holds at counts (shapes, groups): shape (shapes, buffers)."""
        self._learn()
        buffers = len(self.workload.buffers)
        if not self._is_linear:
            return np.array([[b.elements for b in self.workload_of(row).buffers] for row in counts], np.int64)
        return self._numbers_at(counts)[:, :buffers]

    def _made(self, counts: Integers) -> Workload:
        self._learn()
        if not self._is_linear:
            return self._run(self._named(counts))
        return _with_numbers(self.workload, self.layers(counts), self._numbers_at(counts[None])[0].tolist())

    def _numbers_at(self, counts: Integers) -> Integers:
        assert self._slopes is not None
        gone = (self.full - counts).astype(float) @ self._slopes
        return _numbers(self.workload) - np.rint(gone).astype(np.int64)

    def _learn(self) -> None:
        """Find out how the numbers of a workload depend on the counts, once."""
        if self._slopes is not None or not self._is_linear:
            return
        whole = _numbers(self.workload)
        slopes = np.zeros((len(self.full), len(whole)))
        for row, (full, fewest) in enumerate(zip(self.full, self._fewest, strict=True)):
            counts = self.full.copy()
            counts[row] = fewest
            numbers = self._comparable(self._run(self._named(counts)))
            if numbers is None:
                return
            slopes[row] = (whole - numbers) / (full - fewest)
        self._slopes = slopes
        smallest = self._comparable(self._smallest)
        if smallest is None or not np.array_equal(self._numbers_at(self._fewest[None])[0], smallest):
            self._is_linear = False

    def _comparable(self, workload: Workload) -> Integers | None:
        """Return the numbers of a smaller workload; None, noting it, if it differs in more than numbers."""
        numbers = _numbers(workload)
        expected = _numbers(self.workload)
        if len(numbers) == len(expected):
            blank = [0] * len(numbers)
            alike = _with_numbers(workload, (), blank) == _with_numbers(self.workload, (), blank)
            if alike:
                return numbers
        self._is_linear = False
        return None

    def _named(self, counts: Integers) -> dict[str, int]:
        return {group.name: int(count) for group, count in zip(self.groups, counts, strict=True)}

    def _check_layers(self) -> None:
        """Raise ValueError, naming it, for a layer that is another one in the smaller network than the groups say."""
        expected = self.layers(self._fewest)
        found = self._smallest.layers
        for one, other in zip(expected, found, strict=False):
            if one != other:
                raise ValueError(
                    f"layer {one.name!r} has the shape {other.shape} once channels are removed, and its groups of channels "
                    f"say {one.shape}: what becomes of it can't be followed, so channels of this network can't be searched"
                )
        if len(expected) != len(found):
            raise ValueError(
                "the network calls other layers once channels are removed, so that channels of this network can't be searched"
            )


def _numbers(workload: Workload) -> Integers:
    """List all numbers of a workload that depend on channels, but for those of layers: the elements of buffers first."""
    found: list[int] = [buffer.elements for buffer in workload.buffers]
    found += [workload.other_parameters, workload.other_values]
    found += [product.macs for product in workload.unpriced]
    for operation in workload.element_wise:
        found += [operation.read, operation.written]
    return np.array(found, np.int64)


def _with_numbers(workload: Workload, layers: tuple[Layer, ...], numbers: Sequence[int]) -> Workload:
    """Put other layers and numbers, in the order of `_numbers`, into a workload."""
    left: Any = iter(numbers)
    buffers = tuple(replace(buffer, elements=next(left)) for buffer in workload.buffers)
    parameters, values = next(left), next(left)
    unpriced = tuple(replace(product, macs=next(left)) for product in workload.unpriced)
    element_wise = tuple(replace(one, read=next(left), written=next(left)) for one in workload.element_wise)
    return replace(
        workload,
        layers=layers,
        other_parameters=parameters,
        other_values=values,
        buffers=buffers,
        unpriced=unpriced,
        element_wise=element_wise,
    )
