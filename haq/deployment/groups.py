"""Operations of a graph in groups that one step does: a convolution, the batch norm, addition and activation behind it.

Operations that move values become one for a chain of them, and none where nothing moves in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from haq.deployment.nodes import Graph, Node, Shape, shape_of
from haq.deployment.program import Codes
from haq.deployment.views import View, moved

# What a step's epilogue does, in this order; each begins a group of its own where it comes too late for that before.
AFFINE, ADDED, APPLIED, CLIPPED = range(4)
STAGES = {"batch_norm": AFFINE, "add": ADDED, "function": APPLIED, "prelu": APPLIED, "relu": CLIPPED, "clamp": CLIPPED}
MOVES = ("move", "flatten")


@dataclass(eq=False)
class Group:
    """An operation and those after it that its epilogue does: y multiplier + offset + residuals, a function, then clipped.

    `value` is the last operation's name, `dims` and `shape` are those of its result. Of a move `view` says what is moved, of a
    linear layer `columns` the column of its weight for each of its stored inputs. `given` is the largest value that the
    function gets in calibration, `largest` the largest result.
    """

    head: Node
    sources: tuple[Group, ...]
    dims: tuple[int, ...]
    shape: Shape
    multiplier: NDArray[np.float64]
    offset: NDArray[np.float64]
    value: str
    view: View[Group] | None = None
    columns: NDArray[np.int64] | None = None
    stage: int = AFFINE
    residuals: list[Group] = field(default_factory=list)
    slope: NDArray[np.float64] | None = None
    function: Node | None = None
    given: float = 1.0
    largest: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    # What others want of it.
    codes: list[Codes] = field(default_factory=list)
    fixed_limit: int | None = None
    pool_limit: int | None = None  # of a Fixed value for sums over many places, beside one for all others
    wants_float: bool = False
    is_read: bool = False  # as the integers that it has, of a quantizer

    @property
    def wanted(self) -> bool:
        """Whether anything reads it."""
        limited = self.fixed_limit is not None or self.pool_limit is not None
        return bool(self.codes) or limited or self.wants_float or self.is_read

    @property
    def plain(self) -> bool:
        """Whether it is the result of its head, and nothing was absorbed."""
        return self.value == self.head.name and self.head.kind not in STAGES

    @property
    def quantizes(self) -> bool:
        """Whether it is a quantizer between layers, whose integers are read as they are."""
        return self.head.kind == "quantize"

    @property
    def pools_codes(self) -> bool:
        """Whether the largest of codes can be taken in place of the codes of the largest: all want the same ones."""
        alone = len(self.codes) == 1 and self.fixed_limit is None and self.pool_limit is None and not self.wants_float
        return self.head.kind == "max_pool" and self.plain and alone

    @property
    def multiplies(self) -> bool:
        """Whether it begins with a layer that has weights."""
        return self.head.kind in ("conv", "linear")

    @property
    def absorbs(self) -> bool:
        """Whether it has an epilogue."""
        return self.head.kind not in ("move", "quantize")

    def absorb(self, node: Node, given: float, residual: Group | None = None) -> None:
        """Do the work of one more operation, behind the others.

        Args:
            node: The operation.
            given: The largest value that it gets.
            residual: What is added.
        """
        if node.kind == "batch_norm":
            assert node.scale is not None
            assert node.shift is not None
            self.multiplier = self.multiplier * node.scale
            self.offset = self.offset * node.scale + node.shift
        elif node.kind == "add":
            assert residual is not None
            self.residuals.append(residual)
        elif node.kind == "prelu":
            self.slope = node.scale
        elif node.kind == "function":
            self.function, self.given = node, given
        else:
            self.low = min(max(self.low, node.low), node.high)
            self.high = min(max(self.high, node.low), node.high)
        self.stage = STAGES[node.kind]
        self.value = node.name


class Grouping:
    """Puts a graph's operations into groups, in an order in which they can be computed."""

    def __init__(self, graph: Graph, largest: Mapping[str, float]) -> None:
        """Group the operations of a graph.

        Args:
            graph: The graph.
            largest: The largest magnitude of values, by name.
        """
        self.nodes = {node.name: node for node in graph.nodes}
        self.largest = largest
        self.readers: dict[str, int] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers[name] = self.readers.get(name, 0) + 1
        self.groups: list[Group] = []
        self.views: dict[str, View[Group]] = {}  # of each node's result
        self.moves: dict[View[Group], Group] = {}  # those that are computed
        for node in graph.nodes[:-1]:
            self.views[node.name] = self._view(node)
        self.output = self._computed(self.views[graph.nodes[-1].inputs[0]], graph.nodes[-1])
        self.output.wants_float = True

    def _view(self, node: Node) -> View[Group]:
        """Say what a node's result is."""
        given = [self.views[name] for name in node.inputs]
        if node.kind in MOVES:
            return moved(given, node.index, node.dims)
        if node.kind == "add":
            return self._add(node, *given)
        if node.kind in STAGES:
            return self._elementwise(node, given[0])
        if node.kind == "quantize" and given[0].is_permutation:
            source = given[0].sources[0]
            return given[0].again(self._begin(node, (source,), source.dims).sources[0])
        if node.kind == "linear":
            return self._linear(node, given[0])
        if node.kind == "mul":
            return self._begin(node, self._factors(node, *given))
        return self._begin(node, tuple(self._computed(view, node) for view in given))

    # ----------------------------------------------------------------------------------------------------- beginnings

    def _begin(self, node: Node, sources: tuple[Group, ...], dims: tuple[int, ...] = ()) -> View[Group]:
        """Begin a group with an operation."""
        dims = dims or node.dims
        shape = shape_of(dims)
        group = Group(node, sources, dims, shape, np.ones(shape[2]), np.zeros(shape[2]), node.name)
        group.largest = self.largest.get(node.name, 0.0)
        self.groups.append(group)
        return View.of(group, dims)

    def _begin_absorbing(self, node: Node, source: Group, residual: Group | None = None) -> View[Group]:
        """Begin a group with an operation that is all epilogue."""
        view = self._begin(node, (source,), source.dims)
        self._absorb(view.sources[0], node, residual)
        return view

    def _computed(self, view: View[Group], reader: Node) -> Group:
        """Return a group whose result lies in memory as a view has it: a move, if anything moves."""
        if view.is_plain:
            return view.sources[0]
        if view not in self.moves:
            name = f"{reader.name}_input"
            for known, other in self.views.items():
                if other is view:
                    name = known
            node = Node(name, "move", (), shape_of(view.dims), reader.module, dims=view.dims)
            group = self._begin(node, view.sources).sources[0]
            group.view = view
            self.moves[view] = group
        return self.moves[view]

    # ------------------------------------------------------------------------------------------------------ absorbing

    def _alone(self, name: str) -> bool:
        """Say whether the only reader of groups' results is that of a node, which has their values, maybe in other places."""
        node = self.nodes[name]
        if self.readers[name] != 1:
            return False
        return node.kind not in MOVES or all(self._alone(source) for source in node.inputs)

    def _can_absorb(self, group: Group, name: str, stage: int) -> bool:
        """Say whether a group can do what comes after a node, which has its result."""
        if not group.absorbs or not self._alone(name):
            return False
        if stage == CLIPPED:
            return True
        return group.stage <= stage and group.stage < APPLIED

    def _elementwise(self, node: Node, view: View[Group]) -> View[Group]:
        """Do on sources what is done on their values in other places: in their epilogues, or in a step of its own."""
        parts = _parts(node, view)
        if parts is None:
            return self._begin_absorbing(node, self._computed(view, node))
        if all(self._can_absorb(source, node.inputs[0], STAGES[node.kind]) for source in view.sources):
            for number, (source, part) in enumerate(zip(view.sources, parts, strict=True)):
                self._absorb(source, part, number=number)
            return view
        if len(parts) > 1:
            return self._begin_absorbing(node, self._computed(view, node))
        return view.again(self._begin_absorbing(parts[0], view.sources[0]).sources[0])

    def _absorb(self, group: Group, node: Node, residual: Group | None = None, number: int = 0) -> None:
        """Let a group do the work of one more operation, or of the part of it that has this number."""
        given = 1.0
        if node.kind == "function":
            given = self.largest[node.inputs[0]]
        group.absorb(node, given, residual)
        group.largest = self.largest[node.name]
        if number:
            group.value = f"{node.name}_{number + 1}"

    def _add(self, node: Node, first: View[Group], second: View[Group]) -> View[Group]:
        """Add to the later of two results, if only this reads it; else in a step of its own."""
        alike = first.is_permutation and second.is_permutation and np.array_equal(first.stored, second.stored)
        if first.dims == second.dims and alike and first.sources[0].shape == second.sources[0].shape:
            view, pair = first, [first.sources[0], second.sources[0]]
        else:
            pair = [self._computed(_broadcast(view, node.dims), node) for view in (first, second)]
            view = View.of(pair[0], node.dims)
        names = list(node.inputs)
        order = [self.groups.index(group) for group in pair]
        later = int(order[1] >= order[0])
        group, residual = pair[later], pair[1 - later]
        if group is not residual and self._can_absorb(group, names[later], ADDED):
            self._absorb(group, node, residual)
            return view.again(group)
        made = self._begin_absorbing(node, pair[0], pair[1])
        return view.again(made.sources[0])

    # ------------------------------------------------------------------------------------------------- layers, products

    def _linear(self, node: Node, view: View[Group]) -> View[Group]:
        """Begin a linear layer: a map in another order permutes its columns."""
        if not view.is_permutation:
            return self._begin(node, (self._computed(view, node),))
        source = view.sources[0]
        made = self._begin(node, (source,))
        made.sources[0].columns = np.argsort(view.stored)
        return made

    def _factors(self, node: Node, first: View[Group], second: View[Group]) -> tuple[Group, Group]:
        """Return the factors of a product: a whole map, and one as large or with a factor for each channel or each place."""
        if first.dims != node.dims:
            first, second = second, first
        first = _broadcast(first, node.dims)
        channels = (*node.dims[:2], *[1] * (len(node.dims) - 2))
        places = (1, 1, *node.dims[2:])
        if second.dims not in (node.dims, channels, places):
            second = _broadcast(second, node.dims)
        return self._computed(first, node), self._computed(second, node)


def _broadcast(view: View[Group], dims: tuple[int, ...]) -> View[Group]:
    if view.dims == dims:
        return view
    return view.expanded(dims)


def _parts(node: Node, view: View[Group]) -> list[Node] | None:
    """Return what an operation on each value does on each source of a view; None if it can't be done there."""
    if not view.is_complete:
        return None
    parts = [node] * len(view.sources)
    if view.is_plain or node.scale is None:
        return parts
    scales = view.per_channel(node.scale)
    if scales is None:
        return None
    parts = [replace(node, scale=scale) for scale in scales]
    if node.shift is None:
        return parts
    shifts = view.per_channel(node.shift)
    if shifts is None:
        return None
    return [replace(part, shift=shift) for part, shift in zip(parts, shifts, strict=True)]
