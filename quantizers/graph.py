"""Which channels of a float network must be scaled together: the captured graph behind equalization.

A channel of a layer's output can be multiplied by any s > 0, and what reads it divided by s, if
everything between is positively homogeneous: f(s x) = s f(x), as ReLU and pooling are. `capture`
follows every channel through the operations that torch.export writes down. Each value of a map is
labelled with the number of the channel whose scale it has. Whatever moves values (views, slices,
concatenations) is run on the labels themselves; a sum gives the channels that meet in it one
scale; anything that isn't homogeneous ends the chain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quantizers.batches import running
from quantizers.calling import Forward, count_of, first_sample, leaves, map_tensors

FIXED = 0  # the label of what keeps its scale
ZERO = -1  # of zeros that were put around a map, which have any scale

# Operations by what they do to scales. A trailing underscore, in place, is taken off before.
KEEPING = {"relu", "leaky_relu", "prelu", "abs", "neg", "dropout", "feature_dropout", "alias", "detach", "clone"}
KEEPING |= {"contiguous", "to", "_to_copy", "lift_fresh_copy"}
MOVING = {"flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "squeeze", "unsqueeze", "expand", "select", "slice"}
MOVING |= {"narrow", "split", "split_with_sizes", "chunk", "unbind", "cat", "concat", "stack", "pixel_shuffle", "roll", "flip"}
MOVING |= {"pixel_unshuffle", "channel_shuffle", "movedim", "swapaxes", "repeat", "view_as", "expand_as", "tensor_split"}
RESHAPING = {"view", "reshape", "_unsafe_view"}
POOLING = {"max_pool1d": 1, "max_pool2d": 2, "avg_pool1d": 1, "avg_pool2d": 2, "adaptive_avg_pool1d": 1}  # and its dimensions
POOLING |= {"adaptive_avg_pool2d": 2, "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "upsample_nearest1d": 1}
POOLING |= {"upsample_nearest2d": 2, "upsample_bilinear2d": 2}
REDUCING = {"mean", "sum", "amax", "amin"}
MEETING = {"add", "sub", "maximum", "minimum"}
CLIPPING = {"relu6", "hardtanh", "clamp"}
NORMS = {"layer_norm": (2, 3), "rms_norm": (2, 2), "group_norm": (2, 3), "instance_norm": (1, 2), "batch_norm": (1, 2)}
LAST = {"layer_norm", "rms_norm"}  # norms whose weight lies along the last dimension
LAYERS = {"conv1d", "conv2d", "linear"}
PADDING = {"pad", "constant_pad_nd"}

# What leaves the sum of a map and a constant per channel such a sum; values are at least the constant.
SHIFTING = KEEPING - {"abs", "neg", "to", "_to_copy"} | MOVING | RESHAPING | set(POOLING) | {"mean", "amax", "amin"}


@dataclass
class LayerChannels:
    """The channels of one weight.

    Attributes:
        name: The layer's; of a weight that isn't called `weight`, the parameter's.
        weight: The parameter's name.
        bias: The name of the bias; empty where there is none, or another in each call.
        outputs: The number of each output channel (C_out); FIXED where it can't be scaled.
        inputs: The number of the input channel of each weight, (C_out, C_in / groups).
        end: Why outputs can't be scaled, in words; empty if all can.
        calls: The operations that use it.
    """

    name: str
    weight: str
    outputs: Tensor
    inputs: Tensor
    bias: str = ""
    end: str = ""
    calls: list[fx.Node] = field(default_factory=list)


@dataclass
class Clip:
    """One call of a ReLU6.

    Attributes:
        module: The module's name.
        call: The call's number among that module's.
        high: Its bound.
        dim: The dimension along which channels lie.
        channels: Their numbers (C).
        node: The operation.
    """

    module: str
    call: int
    high: float
    dim: int
    channels: Tensor
    node: fx.Node


@dataclass
class ChannelGraph:
    """What may be scaled in a network, and what must be scaled together.

    Channels are numbered from 1; those that must have one scale (of a residual sum, say) have one
    number.

    Attributes:
        count: The number of channels, with FIXED.
        layers: The convolutions and linear layers by name, in the order of their first call.
        vectors: Parameters with one value per channel, by name, with the channel of each value:
            the layers' biases, and the norms' weights and biases.
        clips: The calls of ReLU6.
    """

    count: int
    layers: dict[str, LayerChannels]
    vectors: dict[str, Tensor]
    clips: list[Clip]

    def readers(self, name: str) -> tuple[str, ...]:
        """Return the layers that read channels of a layer's output which can be scaled."""
        channels = self.layers[name].outputs
        channels = channels[channels != FIXED]
        return tuple(other.name for other in self.layers.values() if torch.isin(other.inputs, channels).any())

    def operations(self, name: str) -> tuple[str, ...]:
        """Return the operations that a layer's output goes through up to the next layers, in the order in which they run."""
        found: dict[fx.Node, str] = {}
        todo = list(self.layers[name].calls)
        while todo:
            for user in todo.pop().users:
                if user not in found and base_name(user) not in LAYERS and user.op != "output":
                    found[user] = base_name(user)
                    todo.append(user)
        if not found:
            return ()
        order = {node: place for place, node in enumerate(next(iter(found)).graph.nodes)}
        return tuple(found[node] for node in sorted(found, key=order.__getitem__))

    def carries_constant(self, name: str, unclipped: Sequence[fx.Node]) -> bool:
        """Say whether a constant per channel that is added to a layer's output reaches all readers as it is.

        Where values are at least the constant, ReLU lets it pass. Convolutions that pad don't: their zeros would have to be
        that constant.

        Args:
            name: The layer.
            unclipped: Calls of ReLU6 that are ReLU now.
        """
        seen: set[fx.Node] = set()
        todo = list(self.layers[name].calls)
        while todo:
            for user in todo.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                base = base_name(user)
                if base in LAYERS:
                    if _pads(user):
                        return False
                elif base in SHIFTING or user.target is operator.getitem or user in unclipped:
                    if _averages_padding(user):
                        return False
                    todo.append(user)
                else:
                    return False
        return True


@torch.no_grad()
def capture(network: nn.Module, example: tuple[Any, ...], forward: Forward | None = None) -> ChannelGraph:
    """Follow the channels of a float network in evaluation mode.

    Args:
        network: The network; it is left alone.
        example: Its inputs, of any structure; the graph is of the operations that it computes for these.
        forward: `forward(network, *example)` runs the network; None: it is called with the example.

    Returns:
        The graph.

    Raises:
        ValueError: For a network that torch.export can't follow, with its reason.
    """
    return _Follower(network, _exported(network, example, forward)).follow()


class _Runner(nn.Module):
    """A network that is called with the tensors of an example, and returns those of its outputs: torch.export knows no others.

    Its modules, parameters and buffers are the network's, by the same names.
    """

    def __init__(self, network: nn.Module, example: Any, run: Forward) -> None:
        super().__init__()
        for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[held] = network.__dict__[held]
        # Not the network itself, which would be a part of this one.
        self._run: Any = lambda given: run(network, given)
        self._example = example

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        return leaves(self._run(map_tensors(self._example, lambda tensor: next(given))))


def _exported(network: nn.Module, example: tuple[Any, ...], forward: Forward | None) -> Any:
    """Export a network for the first of a batch, or, if it doesn't take that, for the batch."""
    attempts: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    if forward is None and all(isinstance(part, Tensor) for part in example):
        attempts = [(network, tuple(map(_first, example))), (network, example)]
    else:
        for given in (first_sample(example, count_of(example)), example):
            attempts.append((_Runner(network, given, running(forward)), tuple(leaves(given))))
    reason = ""
    for module, tensors in attempts:
        try:
            return torch.export.export(module, tensors, strict=False)
        except Exception as error:  # whatever a network raises for a batch of one
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise ValueError(f"{type(network).__name__} can't be equalized: torch.export can't write down what it does ({reason})")


def _first(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor.clone()
    return tensor[:1].clone()


class _Scales:
    """Numbers of channels; those that must have one scale are in one set (union-find)."""

    def __init__(self) -> None:
        self.parents = [FIXED]
        self.ends: dict[int, str] = {FIXED: "what can't be scaled"}  # why a set, by its root, can't be scaled

    def make(self, count: int) -> Tensor:
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, channel: int) -> int:
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def join(self, first: Tensor, second: Tensor, why: str) -> None:
        """Give channels that meet, element by element, one scale; what meets a fixed one is fixed for this reason."""
        first, second = torch.broadcast_tensors(first, second)
        differ = (first != second) & (first != ZERO) & (second != ZERO)
        codes = (first[differ] * len(self.parents) + second[differ]).unique()
        for code in codes.tolist():
            one, other = (self.root(channel) for channel in divmod(code, len(self.parents)))
            if FIXED in (one, other):
                self.ends.setdefault(max(one, other), why)
            elif one != other:
                low, high = sorted((one, other))
                self.parents[high] = low
                if high in self.ends:
                    self.ends.setdefault(low, self.ends[high])

    def fix(self, channels: Tensor, why: str) -> None:
        """Let channels keep their scale."""
        for channel in channels.unique().tolist():
            if channel > FIXED:
                self.ends.setdefault(self.root(channel), why)

    def are_free(self, channels: Tensor) -> bool:
        """Say whether any of them can be scaled."""
        return any(channel > FIXED and self.root(channel) not in self.ends for channel in channels.unique().tolist())

    def numbers(self) -> tuple[Tensor, int]:
        """Number the sets that can be scaled from 1; returns every channel's number, and how many there are, with FIXED."""
        made: dict[int, int] = {}
        table = torch.zeros(len(self.parents), dtype=torch.long)
        for channel in range(len(self.parents)):
            root = self.root(channel)
            if root not in self.ends:
                table[channel] = made.setdefault(root, len(made) + 1)
        return table, len(made) + 1


class _Follower:
    """Goes through the exported operations with a label for every value."""

    def __init__(self, network: nn.Module, exported: Any) -> None:
        self.nodes = exported.graph.nodes
        signature = exported.graph_signature
        self.parameters: dict[str, tuple[str, Tensor]] = {}  # by the placeholder's name
        # One name for each tensor, whatever modules share it.
        names = {parameter: name for name, parameter in network.named_parameters()}
        every = dict(network.named_parameters(remove_duplicate=False))
        for placeholder, name in signature.inputs_to_parameters.items():
            if name in every:
                self.parameters[placeholder] = names[every[name]], every[name]
        self.scales = _Scales()
        self.labels: dict[fx.Node, Any] = {}
        self.layers: dict[str, LayerChannels] = {}
        self.vectors: dict[str, Tensor] = {}
        self.clips: list[Clip] = []

    def follow(self) -> ChannelGraph:
        for node in self.nodes:
            if node.op == "call_function":
                self.labels[node] = self._result(node)
            elif node.op == "output":
                self._fix_all(node, "the network's output")
            else:
                self.labels[node] = self._start(node)
        table, count = self.scales.numbers()
        for layer in self.layers.values():
            roots = [self.scales.root(channel) for channel in layer.outputs.tolist()]
            layer.end = next((self.scales.ends[root] for root in roots if root in self.scales.ends), "")
            layer.outputs, layer.inputs = table[layer.outputs], table[layer.inputs]
        for clip in self.clips:
            clip.channels = table[clip.channels]
        vectors = {name: table[channels] for name, channels in self.vectors.items()}
        return ChannelGraph(count, {layer.name: layer for layer in self.layers.values()}, vectors, self.clips)

    def _start(self, node: fx.Node) -> Any:
        """Return labels of an input, a buffer or a parameter."""
        if node.name in self.parameters:
            name, parameter = self.parameters[node.name]
            # One value per channel; what is larger is a weight, or something that isn't scaled.
            if 0 < parameter.numel() == max(parameter.shape, default=1):
                if name not in self.vectors:
                    self.vectors[name] = self.scales.make(parameter.numel())
                return self.vectors[name].view(parameter.shape)
        return self._fixed(node)

    def _result(self, node: fx.Node) -> Any:
        """Return labels of what an operation computes."""
        base = base_name(node)
        first = None
        if node.args and isinstance(node.args[0], fx.Node):
            first = self.labels.get(node.args[0])
        if node.target is operator.getitem and isinstance(first, list | tuple):
            return first[node.args[1]]  # type: ignore[index]
        follow = self._following(base)
        value = node.meta.get("val")
        floating = all(x.is_floating_point() for x in tree_leaves(value) if isinstance(x, Tensor))
        made = None
        if follow is not None and (floating or base in POOLING):
            made = follow(node, arguments(node))
        if made is None:
            self._fix_all(node, _described(node))
            return self._fixed(node)
        if base_in_place(node) and isinstance(node.args[0], fx.Node):
            # Whoever looks at the changed tensor from here on, looks at the result.
            self.labels[node.args[0]] = made
        return made

    def _following(self, base: str) -> Callable[[fx.Node, dict[str, Any]], Any] | None:
        tables: tuple[tuple[Iterable[str], Callable[[fx.Node, dict[str, Any]], Any]], ...] = (
            (LAYERS, self._layer),
            (KEEPING, self._keep),
            (MOVING, self._move),
            (RESHAPING, self._reshape),
            (POOLING, self._pool),
            (REDUCING, self._reduce),
            (MEETING, self._meet),
            (CLIPPING, self._clip),
            (("clamp_min",), self._clip),
            (NORMS, self._norm),
            (PADDING, self._pad),
            (("mul", "div"), self._multiply),
            (("matmul", "bmm"), self._mix),
            (("scaled_dot_product_attention",), self._attend),
        )
        return next((follow for names, follow in tables if base in names), None)

    def _fixed(self, node: fx.Node) -> Any:
        return tree_map_only(Tensor, lambda x: torch.zeros((), dtype=torch.long).expand(x.shape), node.meta.get("val"))

    def _fix_all(self, node: fx.Node, why: str) -> None:
        """Let everything that an operation reads keep its scale."""
        for given in node.all_input_nodes:
            if given.name in self.parameters:
                name = self.parameters[given.name][0]
                if name in self.layers:
                    self.scales.fix(self.layers[name].outputs, f"its weight is read by {why}")
                    self.scales.fix(self.layers[name].inputs, f"a weight is read by {why}")
                elif name not in self.vectors:
                    self._weight(name, self.parameters[given.name][1], f"its weight is read by {why}")
            for labels in tree_leaves(self.labels.get(given)):
                if isinstance(labels, Tensor):
                    self.scales.fix(labels, why)

    def _of(self, given: Any) -> Tensor:
        """Return the labels of an operand; a weight that is computed with keeps its scale."""
        labels: Tensor = self.labels[given]
        if given.name in self.parameters and self.parameters[given.name][0] not in self.vectors:
            name, parameter = self.parameters[given.name]
            layer = self._weight(name, parameter, "")
            if layer is not None:
                self.scales.fix(layer.outputs, "its weight is computed with")
                self.scales.fix(layer.inputs, "a weight is computed with")
        return labels

    def _weight(self, name: str, weight: Tensor, why: str) -> LayerChannels | None:
        """Return the channels of a weight."""
        if name in self.vectors or weight.dim() < 2:
            return None
        if name not in self.layers:
            owner, _, key = name.rpartition(".")
            called = name
            if key == "weight":
                called = owner
            inputs = self.scales.make(weight.shape[1]).expand(weight.shape[:2])
            self.layers[name] = LayerChannels(called, name, self.scales.make(len(weight)), inputs)
        if why:
            self.scales.fix(self.layers[name].outputs, why)
            self.scales.fix(self.layers[name].inputs, why)
        return self.layers[name]

    def _layer(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        weight, bias, x = given["weight"], given["bias"], self._of(given["input"])
        if weight.name not in self.parameters:
            return None
        name, parameter = self.parameters[weight.name]
        first_call = name not in self.layers
        spatial = parameter.dim() - 2
        last = x.dim() - 1 - spatial
        why = _described(node)
        inputs = self._together(x, [dim for dim in range(x.dim()) if dim != last], why).flatten()
        inputs = inputs.clamp_min(FIXED)
        groups = given.get("groups", 1)
        # Each output channel of a group reads the channels of its group.
        inputs = inputs.view(groups, 1, -1).expand(-1, len(parameter) // groups, -1).reshape(len(parameter), -1)
        layer = self._weight(name, parameter, "")
        if layer is None:  # a weight of one value, or one row
            layer = self._row(name, parameter)
        if first_call:
            layer.inputs = inputs
        else:
            self.scales.join(layer.inputs, inputs, "a layer that is called more than once, on other channels")
        layer.calls.append(node)
        if bias is not None and bias.name in self.parameters:
            self.scales.join(layer.outputs, self._of(bias), "a bias that keeps its scale")
            layer.bias = self.parameters[bias.name][0]
        elif bias is not None:
            self.scales.fix(layer.outputs, "a bias that is no parameter")
        return _spread(layer.outputs, node, last)

    def _row(self, name: str, parameter: Tensor) -> LayerChannels:
        """Return the channels of a weight that has as many values as its longest side, so that it was taken for a vector."""
        self.scales.fix(self.vectors.pop(name), "read as a weight")
        made = self._weight(name, parameter, "")
        assert made is not None
        return made

    def _together(self, labels: Tensor, dims: list[int], why: str) -> Tensor:
        """Give all values along some dimensions one scale; these dimensions are 1 long in the result."""
        if not dims:
            return labels
        low = labels.masked_fill(labels == ZERO, len(self.scales.parents)).amin(dims, keepdim=True)
        high = labels.amax(dims, keepdim=True)
        low = torch.minimum(low, torch.where(high == ZERO, ZERO, low))
        if not torch.equal(low, high):
            self.scales.join(labels, low, f"{why}, of values that keep their scale")
        return low

    def _keep(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        if base_name(node) == "prelu":
            self.scales.fix(self._of(node.args[1]), "PReLU's slopes")
        return self._of(node.args[0])

    def _move(self, node: fx.Node, given: dict[str, Any]) -> Any:
        args = tree_map_only(fx.Node, self._of, node.args)
        return node.target(*args, **node.kwargs)  # type: ignore[operator]

    def _reshape(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        return self._of(node.args[0]).reshape(node.meta["val"].shape)

    def _pool(self, node: fx.Node, given: dict[str, Any]) -> Any:
        x = self._of(node.args[0])
        dims = [x.dim() - 1 - dim for dim in range(POOLING[base_name(node)])]
        pooled = self._together(x, dims, _described(node))
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return pooled.expand(value.shape)
        return pooled.expand(value[0].shape), torch.zeros((), dtype=torch.long).expand(value[1].shape)

    def _reduce(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self._of(node.args[0])
        dims = given.get("dim")
        if dims is None or dims == []:
            dims = range(x.dim())
        if isinstance(dims, int):
            dims = [dims]
        dims = [dim % x.dim() for dim in dims]
        return self._together(x, dims, _described(node)).reshape(node.meta["val"].shape)

    def _meet(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        if not all(isinstance(given[key], fx.Node) for key in ("self", "other")):
            return None
        first, second = torch.broadcast_tensors(self._of(given["self"]), self._of(given["other"]))
        self.scales.join(first, second, "a sum with what can't be scaled")
        return torch.where(first == ZERO, second, first)

    def _clip(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        low, high = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
        if base_name(node) == "relu6":
            low, high = 0, 6
        if low != 0 or isinstance(high, fx.Node):
            return None
        x = self._of(node.args[0])
        if high is None:
            return x
        module, kind = module_of(node)
        if kind not in ("ReLU6", "Hardtanh") or x.dim() < 2:
            return None
        # The second dimension of maps, the last of tokens: the one along which labels differ.
        differ = [dim for dim in range(1, x.dim()) if not torch.equal(x, x.narrow(dim, 0, 1).expand(x.shape))]
        along = 1
        if len(differ) == 1:
            along = differ[0]
        channels = self._together(x, [dim for dim in range(x.dim()) if dim != along], _described(node)).flatten()
        call = sum(clip.module == module for clip in self.clips)
        self.clips.append(Clip(module, call, float(high), along, channels.clamp_min(FIXED), node))
        return x

    def _norm(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        base = base_name(node)
        self.scales.fix(self._of(node.args[0]), _described(node))
        weight, bias = given.get("weight"), given.get("bias")
        if not isinstance(weight, fx.Node) or weight.name not in self.parameters:
            return None
        channels = self._of(weight)
        if isinstance(bias, fx.Node):
            self.scales.join(channels, self._of(bias), "a bias that keeps its scale")
        shape = node.meta["val"].shape
        if base in LAST:
            return channels.expand(shape)
        return channels.view(-1, *[1] * (len(shape) - 2)).expand(shape)

    def _pad(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self._of(node.args[0])
        if given.get("mode", "constant") != "constant":
            # Reflected and repeated values are values of the map.
            return nn.functional.pad(x.double(), given["pad"], given["mode"]).long()
        value = FIXED
        if not given.get("value"):
            value = ZERO
        return nn.functional.pad(x, given["pad"], value=value)

    def _multiply(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        if not isinstance(given["self"], fx.Node):
            return None
        first = self._of(given["self"])
        if not isinstance(given["other"], fx.Node):
            if given["other"] == 0 or given.get("rounding_mode") is not None:
                return None
            return first
        second = self._of(given["other"])
        if base_name(node) == "div":
            if given.get("rounding_mode") is not None:
                return None
            self.scales.fix(second, _described(node))
        elif self.scales.are_free(first) and self.scales.are_free(second):
            # One of the two keeps its scale: the smaller, a gate or a factor per channel.
            smaller = second
            if first.numel() < second.numel() or given["self"].name in self.parameters:
                smaller = first
            self.scales.fix(smaller, "a product with another map")
        if base_in_place(node) and self.scales.are_free(second):
            return None
        if self.scales.are_free(second):
            first, second = second, first
        return first.expand(node.meta["val"].shape)

    def _mix(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        """Follow a product of matrices: sums over rows of the second or columns of the first."""
        first, second = (self._of(operand) for operand in node.args[:2])
        if first.dim() < 2 or second.dim() < 2:
            return None
        shape = node.meta["val"].shape
        if self.scales.are_free(second):
            self.scales.fix(first, "a product with another map")
            return self._together(second, [second.dim() - 2], _described(node)).expand(shape)
        return self._together(first, [first.dim() - 1], _described(node)).expand(shape)

    def _attend(self, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
        values = self._of(given["value"])
        for key in ("query", "key", "attn_mask"):
            if isinstance(given.get(key), fx.Node):
                self.scales.fix(self._of(given[key]), "attention")
        if given.get("enable_gqa"):
            return None
        return self._together(values, [values.dim() - 2], _described(node)).expand(node.meta["val"].shape)


def _spread(channels: Tensor, node: fx.Node, dim: int) -> Tensor:
    """Shape one label per channel as an operation's result, along a dimension."""
    shape = node.meta["val"].shape
    return channels.view(-1, *[1] * (len(shape) - 1 - dim)).expand(shape)


def base_name(node: fx.Node) -> str:
    """Return the name of an operation, without the underscore of one in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name: str = schema.name.removeprefix("aten::")  # somebody else's "relu" is another operation
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1]
    return name


def base_in_place(node: fx.Node) -> bool:
    """Say whether an operation changes its first operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.endswith("_")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an operation by name, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**given, **node.kwargs}


def module_of(node: fx.Node) -> tuple[str, str]:
    """Return the dotted name and the class of the innermost module that an operation is in."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    name, kind = stack[-1]
    # The second call of a module is marked with @1.
    return str(name).partition("@")[0], str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def _described(node: fx.Node) -> str:
    name, _ = module_of(node)
    if name:
        return f"{base_name(node)} (in {name!r})"
    return base_name(node)


def _pads(node: fx.Node) -> bool:
    """Say whether a layer puts zeros around its input."""
    padding = arguments(node).get("padding", 0)
    if padding == "same":
        return max(node.args[1].meta["val"].shape[2:]) > 1  # type: ignore[union-attr]
    return padding != "valid" and any(side for side in tree_leaves(padding))


def _averages_padding(node: fx.Node) -> bool:
    """Say whether an operation is an average in which zeros around the map count."""
    if not base_name(node).startswith("avg_pool"):
        return False
    given = arguments(node)
    return given.get("divisor_override") is not None or bool(any(tree_leaves(given["padding"])) and given["count_include_pad"])
