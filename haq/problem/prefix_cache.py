"""A forward pass that begins where a policy parts from the one before: what its first layers computed is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from quantizers.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear
from quantizers.residuals import ResidualQuantizer

# Where functions are from that count what they change in place: torch itself, and what it is written in.
COUNTING = ("torch", "torch.functional", "torch.nn.functional", "torch._tensor", "_operator", "builtins", "math")
# What leads from a tensor to memory whose changes aren't counted.
NOT_COUNTED = frozenset(
    ("data", "numpy", "storage", "typed_storage", "untyped_storage", "data_ptr", "set_", "apply_", "map_", "map2_")
)
NOT_COUNTED |= {"share_memory_", "resize_", "__array__", "__dlpack__", "__cuda_array_interface__", "__array_interface__"}

State = tuple[Any, ...]  # what the rest of a network still needs of what was computed before


@dataclass
class Kept:
    """What is kept of one batch: the bits of every call when it was computed, and states by cut."""

    bits: list[Any] = field(default_factory=list)
    states: dict[int, tuple[State, list[int]]] = field(default_factory=dict)  # with the versions of their tensors

    def latest(self, bits: list[Any]) -> int:
        """Find the last cut that can be started from at these bits; 0, the input, if there is none."""
        pairs = zip(self.bits, bits, strict=False)
        common = next((call for call, (before, now) in enumerate(pairs) if before != now), min(len(self.bits), len(bits)))
        # An activation that a later operation wrote over (a ReLU in place, a quantizer's memory) has another version. A
        # copy that nobody was given is as it was.
        fit = (cut for cut, (state, versions) in self.states.items() if cut <= common and versions == _versions(state))
        return max(fit, default=0)


class Prefix:
    """A quantized network cut before every call of a quantized layer, and the states at those cuts for each of some batches.

    Cut 0 is the input, cut k > 0 lies before the k-th further call, the last one is the output. A layer that is called twice
    has two of them. A state holds all values that are still needed, so branches and residual connections are no obstacle.

    Of a network that torch's own operations make up, the values themselves are kept, since torch counts what they change in
    place. Somebody else's module, hook or function may write where nobody counts (`.data`, NumPy, a kernel of its own): then
    copies are kept, and copies of these are started from.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor], memory_bytes: int) -> None:
        """Cut a network.

        Args:
            network: Quantized.
            batches: Its inputs.
            memory_bytes: Limits what is kept of all batches together; the smallest states are kept first.

        Raises:
            ValueError: If the network can't be cut: torch.fx doesn't follow it, or what it follows is something else.
        """
        self.network, self.batches = network, batches
        self.stages, self.layers, names = _cut(network)
        self.copied = not all(_counts_changes(network, node) for stage in self.stages for node in stage.graph.nodes)
        self.kept = [Kept() for _ in batches]
        self.cuts: frozenset[int] = frozenset()
        first = max(range(len(batches)), key=lambda batch: len(batches[batch]))
        sizes = self._check(batches[first], names)
        images = sum(map(len, batches)) / len(batches[first])
        self.cuts = _fitting(sizes, memory_bytes / images, self.copied)

    def forward(self, batch: int) -> Tensor:
        """Compute the outputs of one batch at the network's present bits: bit for bit those of the network itself."""
        kept, bits = self.kept[batch], self._bits()
        start = kept.latest(bits)
        if start:
            state = self._taken(kept.states[start][0])
        else:
            state = (self.batches[batch].clone(),)
        # In this order, so that what is kept fits the bits whenever this is interrupted.
        kept.states = {cut: held for cut, held in kept.states.items() if cut <= start}
        kept.bits = bits
        for cut, stage in enumerate(self.stages[start:], start + 1):
            state = stage(*state)
            # Nobody counts the changes of inference tensors, which a module may make on its own.
            if cut in self.cuts and not any(tensor.is_inference() for tensor in _tensors(state)):
                held = self._taken(state)
                kept.states[cut] = held, _versions(held)
        result: Tensor = state[0]
        return result

    def _taken(self, state: State) -> State:
        """Return a state, or a copy of it: what shares memory shares it in the copy too."""
        if self.copied:
            return copy.deepcopy(state)
        return state

    def _bits(self) -> list[Any]:
        return [[(layer.weight_bits, layer.activation_bits) for layer in layers] for layers in self.layers]

    def _check(self, batch: Tensor, names: list[list[str]]) -> list[dict[str, int]]:
        """Compare with the network itself on a batch. Returns the bytes of every value of every cut after the first."""
        state: State = (batch.clone(),)
        sizes = []
        for stage, values in zip(self.stages, names[1:], strict=True):
            state = stage(*state)
            sizes.append({name: _bytes(value) for name, value in zip(values, state, strict=True)})
        if not isinstance(state[0], Tensor) or not torch.equal(state[0], self.network(batch.clone())):
            raise ValueError("the network does something else than its torch.fx graph")
        return sizes


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, QuantLayer | ResidualQuantizer) or super().is_leaf_module(module, name)


def _cut(network: nn.Module) -> tuple[list[fx.GraphModule], list[list[QuantLayer]], list[list[str]]]:
    """Cut a network before every call of quantized layers.

    Returns:
        One graph per call, the layers of each (more than one, where they are in a module that is not looked into), and the
        names of the values at every cut.

    Raises:
        ValueError: If torch.fx doesn't follow the network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A copy: a network that keeps what it computed would keep what stands for a tensor here.
            traced = copy.deepcopy(network)
            nodes = list(_Tracer().trace(traced).nodes)
    except Exception as error:  # whatever a network's code raises when it is called with something that isn't a tensor
        raise ValueError(f"torch.fx doesn't follow the network: {error}") from error
    for node in nodes:
        # A tensor that the network's code makes by itself.
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            setattr(network, str(node.target), getattr(traced, str(node.target)))
    inside = {node: _quant_layers(network, node) for node in nodes}
    calls = [place for place, node in enumerate(nodes) if inside[node]]
    reached = {layer for place in calls for layer in inside[nodes[place]]}
    everything = {module for module in network.modules() if isinstance(module, QuantLayer)}
    if reached != everything or not calls or sum(node.op == "placeholder" for node in nodes) != 1:
        raise ValueError("the network has layers that aren't called as such, or other inputs than one")
    places = {node: place for place, node in enumerate(nodes)}
    last_use = {node: max((places[user] for user in node.users), default=-1) for node in nodes}
    output = nodes.pop()
    ends = [*calls[1:], len(nodes)]
    alive = [[node for node in nodes[:end] if last_use[node] >= end] for end in ends[:-1]]
    stages, before, begin = [], [node for node in nodes if node.op == "placeholder"], 0
    names = [[node.name for node in before]]
    for number, end in enumerate(ends):
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in before}
        for node in nodes[begin:end]:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        last = number == len(ends) - 1
        results = output.args
        if not last:
            results = tuple(alive[number])
        graph.output(fx.node.map_arg(tuple(results), copies.__getitem__))
        stages.append(fx.GraphModule(network, graph))
        if last:
            names.append(["output"])
        else:
            names.append([node.name for node in alive[number]])
            before = alive[number]
        begin = end
    return stages, [inside[nodes[place]] for place in calls], names


def _quant_layers(network: nn.Module, node: fx.Node) -> list[QuantLayer]:
    if node.op != "call_module":
        return []
    return [module for module in network.get_submodule(str(node.target)).modules() if isinstance(module, QuantLayer)]


def _counts_changes(network: nn.Module, node: fx.Node) -> bool:
    """Say whether torch counts all that one operation may change in place."""
    if node.op == "call_module":
        return all(map(_is_known, network.get_submodule(str(node.target)).modules()))
    if node.op == "call_method":
        return node.target not in NOT_COUNTED
    if node.op != "call_function":
        return True
    if node.target is getattr:
        return node.args[1] not in NOT_COUNTED
    origin = getattr(node.target, "__module__", None) or "torch"
    return origin in COUNTING or origin.startswith("torch._C")


def _is_known(module: nn.Module) -> bool:
    """Say whether a module is torch's or ours, with nothing of somebody else's in it."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if isinstance(module, QuantLayer):
        known = type(module) in (QuantConv1d, QuantConv2d, QuantLinear)
        return known and type(module.scheme).__module__.partition(".")[0] == "quantizers"
    if isinstance(module, ResidualQuantizer):
        return True
    return type(module).__module__.startswith("torch.nn.modules.")


def _fitting(sizes: list[dict[str, int]], limit: float, copied: bool) -> frozenset[int]:
    """Choose the cuts that fit into `limit` bytes, smallest first and later ones (which save more) before earlier.

    A value that is alive at several cuts takes its place once, unless each has a copy of its own.
    """
    chosen: set[int] = set()
    held: dict[Any, int] = {}
    for cut, named in sorted(enumerate(sizes, 1), key=lambda item: (sum(item[1].values()), -item[0])):
        values: dict[Any, int] = dict(named)
        if copied:
            values = {(cut, name): size for name, size in named.items()}
        if sum((held | values).values()) <= limit:
            chosen.add(cut)
            held |= values
    return frozenset(chosen)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _versions(state: State) -> list[int]:
    """Tell how often tensors were changed in place: torch counts it, together with changes of their views."""
    return [tensor._version for tensor in _tensors(state)]


def _bytes(value: Any) -> int:
    # A view keeps all of its storage alive.
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))
