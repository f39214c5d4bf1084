"""Reading groups of channels from the dependency graph of torch-pruning."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from quantizers.calling import Forward, call, leaves, map_tensors
from quantizers.policy import QUANTIZABLE
from quantizers.pruning.channels import IN, OUT, ChannelGroup, ChannelGroups, Member
from quantizers.pruning.layers import FOLLOWED, MAKERS, heads_of, is_depthwise, size_of

Place = tuple[str, str, int]  # a module or tensor, the dimension, the position in it
MOVING = {"view", "reshape", "transpose", "swapaxes", "permute", "movedim", "flatten", "unflatten", "contiguous"}
MOVING |= {"channel_shuffle", "native_channel_shuffle"}
INPUT = "input{}"  # the parameter that stands for an input while the network is followed
MOST_PLACES = 10_000  # of a channel, in the whole network
MOST_VISITS = 50  # of a node
LOST = "what becomes of them on the way to the outputs can't be followed"
SHUFFLE = "shuffle "  # a name that no module has
UNSIGNED = 2**64
TENSOR_ORDER = 10**9  # tensors that are no module's are behind all modules


def read_groups(network: nn.Module, example: Any, forward: Forward | None) -> ChannelGroups:
    """Read the groups of a network as torch-pruning sees them; nothing is tried out.

    Args:
        network: A copy in evaluation mode, which is left in an undefined state.
        example: Its inputs.
        forward: What runs it on them; None: `call`.

    Returns:
        The groups.

    Raises:
        ValueError: For a network that can't be followed.
    """
    return _Reading(network, example, forward).groups()


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ValueError("groups of channels need torch-pruning, which isn't installed: pip install torch-pruning") from None
    return torch_pruning


class _Traced(nn.Module):
    """A network with its inputs as parameters, and one more operation behind each output, which marks it as one."""

    def __init__(self, network: nn.Module, example: Any, forward: Forward | None) -> None:
        super().__init__()
        self.network = network
        self._run = forward or call
        self._inputs: list[nn.Parameter] = []
        self._example = map_tensors(example, self._keep)

    def _keep(self, tensor: Tensor) -> Tensor:
        # torch-pruning takes what meets a parameter of three dimensions for the tokens of a transformer.
        if not tensor.is_floating_point() or tensor.dim() in (0, 1, 3) or tensor.shape[1] == 1:
            return tensor
        parameter = nn.Parameter(tensor.detach().clone())
        self.register_parameter(INPUT.format(len(self._inputs)), parameter)
        self._inputs.append(parameter)
        return parameter

    @property
    def channels_of_inputs(self) -> list[tuple[nn.Parameter, int]]:
        """Return the inputs, and the axis of their channels."""
        return [(parameter, 1) for parameter in self._inputs]

    def forward(self) -> list[Tensor]:
        """Return the outputs in which gradients flow."""
        # Not the parameters themselves, which could not be changed in place.
        outputs = leaves(self._run(self.network, map_tensors(self._example, _through)))
        return [output * 1 for output in outputs if output.requires_grad]


def _through(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return tensor * 1
    return tensor.clone()


class _Shuffles(TorchFunctionMode):
    """Within a `with`, what only changes the order of a map's channels, by views and transposes, is one index_select.

    torch-pruning takes views for operations that leave channels where they are, as most of them do.
    """

    def __init__(self) -> None:
        super().__init__()
        # By the `id` of a result: itself, what its values are of, and where they are there.
        self._moved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in MOVING or not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return result
        _, source, labels = self._moved.get(id(args[0]), (None, args[0], None))
        if source.dim() < 3:
            return result
        if labels is None:
            labels = _labels(source)
        labels = func(labels, *args[1:], **(kwargs or {}))
        order = _order_of_channels(labels, source)
        if order is not None:
            return source.index_select(1, order)
        self._moved[id(result)] = (result, source, labels)
        return result


def _labels(source: Tensor) -> Tensor:
    """Number the values of a tensor."""
    return torch.arange(source.numel(), device=source.device).view(source.shape)


def _order_of_channels(labels: Tensor, source: Tensor) -> Tensor | None:
    """Return which channel of a map is at which place now; None if anything else happened to it, or nothing."""
    if labels.shape != source.shape:
        return None
    inner = source[0, 0].numel()
    order = labels[0].flatten(1)[:, 0] // inner
    if int(order.max()) >= source.shape[1] or torch.equal(order, torch.arange(len(order), device=order.device)):
        return None
    if torch.equal(labels, _labels(source).index_select(1, order)):
        return order
    return None


class _Sets:
    """Things of which some belong together (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[Hashable, Any] = {}

    def root(self, thing: Any) -> Any:
        """Return what stands for the set of a thing."""
        parents = self._parents
        parents.setdefault(thing, thing)
        while parents[thing] != thing:
            parents[thing] = parents[parents[thing]]
            thing = parents[thing]
        return thing

    def join(self, one: Any, other: Any) -> None:
        """Put two things into one set."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self._parents[other] = one

    def all(self) -> list[list[Any]]:
        """Return the sets."""
        found: dict[Any, list[Any]] = {}
        for thing in self._parents:
            found.setdefault(self.root(thing), []).append(thing)
        return list(found.values())


class _Reading:
    """Reads the groups of one network."""

    def __init__(self, network: nn.Module, example: Any, forward: Forward | None) -> None:
        """Run the network once, and let torch-pruning write down what depends on what."""
        self.network = network
        self.tools = _torch_pruning()
        _name_buffers(network)
        traced = _Traced(network, example, forward)
        self.modules = dict(network.named_modules())
        self.tensors = dict(network.named_parameters())
        self.names: dict[Any, str] = {module: name for name, module in self.modules.items()}
        self.names.update({parameter: name for name, parameter in self.tensors.items()})
        self.axes: dict[str, int] = {}  # of tensors, the axis of their channels
        self.shared = _shared(network)
        self.order: dict[str, int] = {}
        self.graph = self._traced(traced)
        self.same = _Sets()  # positions of one channel
        self.tied = _Sets()  # positions that are kept or removed together, though they are of several channels
        self.reasons: dict[Place, str] = {}  # why the channel at a position can't be removed

    def _traced(self, traced: _Traced) -> Any:
        """Return torch-pruning's graph."""

        def note(module: nn.Module, _: Any) -> None:
            self.order.setdefault(self.names[module], len(self.order))

        handles = [module.register_forward_pre_hook(note) for module in self.modules.values()]
        graph = self.tools.DependencyGraph()
        try:
            with warnings.catch_warnings(), _Shuffles():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    traced,
                    (),
                    forward_fn=lambda module, _: module(),
                    unwrapped_parameters=traced.channels_of_inputs,
                    verbose=False,
                )
        except Exception as error:  # whatever torch-pruning meets in a network that it can't follow
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            last = next(reversed(self.order), "the network")
            raise ValueError(
                f"the channels of the network can't be followed: torch-pruning fails behind {last} ({reason})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return graph

    def groups(self) -> ChannelGroups:
        """Return all groups."""
        roots = [m for m in self.graph.module2node if isinstance(m, MAKERS) and m in self.names]
        roots.sort(key=lambda module: self.order[self.names[module]])
        for module in roots:
            self._follow(module)
        self._tie()
        return self._sorted()

    def _follow(self, root: nn.Module) -> None:
        """Join every output channel of a layer with all positions that depend on it."""
        index = self.tools._helpers._HybridIndex
        pruner = self.graph.get_pruner_of_module(root)
        count = pruner.get_out_channels(root)
        node = self.graph.module2node[root]
        start = [index(idx=channel, root_idx=channel) for channel in range(count)]
        seen: dict[Any, set[Any]] = {}
        visits: Counter[Any] = Counter()
        left = MOST_PLACES * count
        todo = [(node, pruner.prune_out_channels, start)]
        while todo:
            node, side, channels = todo.pop()
            known = seen.setdefault((node, side), set())
            new = [channel for channel in channels if channel not in known]
            if not new:
                continue
            known.update(new)
            visits[node, side] += 1
            left -= len(new)
            if left < 0 or visits[node, side] > MOST_VISITS:
                # Every channel comes back as others, again and again, as in a recurrent layer.
                self.reasons.update({(self.names[root], OUT, channel): LOST for channel in range(count)})
                return
            self._join(root, node, side, new)
            self._tie_shuffled(root, node, new)
            triggered = [dependency for dependency in node.dependencies if dependency.is_triggered_by(side)]
            try:
                todo.extend((edge.target, edge.handler, self._mapped(edge, new)) for edge in triggered)
            except Exception:  # whatever torch-pruning's mappings meet in what they take for something else
                self.reasons.update({(self.names[root], OUT, channel): LOST for channel in range(count)})

    def _mapped(self, dependency: Any, channels: list[Any]) -> list[Any]:
        """Follow channels along an edge of the graph."""
        source, target = dependency.source, dependency.target
        read_parts = _parts_of(source, target) or ()
        given_parts = _parts_of(target, source) or ()
        if read_parts:
            channels = _moved(channels, lambda place: [place - begin for begin, end in read_parts if begin <= place < end])
        elif given_parts:
            channels = _moved(channels, lambda place: [begin + place for begin, end in given_parts if place < end - begin])
        elif dependency.index_mapping[0] is not None:
            channels = dependency.index_mapping[0](channels)
        if dependency.index_mapping[1] is not None:
            channels = dependency.index_mapping[1](channels)
        if source in target.inputs and (order := _selection_of(target)) is not None:
            places: dict[int, list[int]] = {}
            for place, number in enumerate(order):
                places.setdefault(number, []).append(place)
            return _moved(channels, lambda place: places.get(place, []))
        if target in source.inputs and (order := _selection_of(source)) is not None:
            return _moved(channels, lambda place: order[place : place + 1])
        return channels

    def _join(self, root: nn.Module, node: Any, side: Any, channels: Iterable[Any]) -> None:
        """Join channels at a node with the root's."""
        name = self.names[root]
        reason = self._reason(node.module)
        known = self._dimension(node, side)
        size = 0
        if known is not None:
            size = self._size(*known)
        for channel in channels:
            if channel.root_idx is None:
                continue
            place = (name, OUT, channel.root_idx)
            self.same.root(place)
            if known is not None:
                if channel.idx >= size:
                    reason = reason or f"what happens to them before {known[0]} can't be followed"
                else:
                    self.same.join(place, (*known, channel.idx))
            if reason:
                self.reasons.setdefault(place, reason)

    def _tie_shuffled(self, root: nn.Module, node: Any, channels: Iterable[Any]) -> None:
        """Tie channels of which a shuffle makes neighbours: it must find as many in each of its groups."""
        order = _selection_of(node)
        if order is None or len(order) < 2:
            return
        in_group = order[1]
        if order != [place + group for place in range(in_group) for group in range(0, len(order), in_group)]:
            return
        shuffle = f"{SHUFFLE}{id(node)}"
        for channel in channels:
            self.tied.join((shuffle, OUT, order[channel.idx] % in_group), (self.names[root], OUT, channel.root_idx))

    def _dimension(self, node: Any, side: Any) -> tuple[str, str] | None:
        """Return the name of what holds weights for the channels at a node, and in which dimension; None if nothing does."""
        held = node.module
        if held not in self.names:
            return None
        name = self.names[held]
        if isinstance(held, nn.Parameter):
            if held.shape[node.pruning_dim] == 1:
                return None
            self.axes[name] = node.pruning_dim % held.dim()
            return name, OUT
        if not isinstance(held, FOLLOWED) or (isinstance(held, nn.PReLU) and held.num_parameters == 1):
            return None
        has_inputs = isinstance(held, _ConvNd | nn.Linear) and not is_depthwise(held)
        if has_inputs and side != self.graph.get_pruner_of_module(held).prune_out_channels:
            return name, IN
        return name, OUT

    def _size(self, name: str, dim: str) -> int:
        if name in self.tensors:
            return self.tensors[name].shape[self.axes[name]]
        return size_of(self.modules[name], dim)

    def _reason(self, held: Any) -> str:
        """Say why channels that reach a module or parameter can't be removed; nothing if they can."""
        if isinstance(held, self.tools.ops._OutputOp):
            return "they are outputs of the network"
        if isinstance(held, nn.Parameter):
            if held not in self.names:
                return "they meet the network's inputs"
            return ""
        name = self.names.get(held)
        if name is None:
            return ""
        if name in self.shared:
            return f"{name} has the same weights as {self.shared[name]}"
        if isinstance(held, nn.LayerNorm):
            return f"{name} normalises over them (LayerNorm)"
        if isinstance(held, nn.MultiheadAttention | nn.RNNBase):
            return f"{name}, whose weights are of several layers (a {type(held).__name__}), has them"
        if isinstance(held, _ConvNd) and held.groups > 1 and not _is_understood(held):
            return f"{name} has them, whose groups can't be followed"
        return ""

    def _tie(self) -> None:
        """Tie channels that grouped layers, or heads of an attention, can only keep or remove together."""
        for name, module in self.modules.items():
            heads = heads_of(module)
            proj = f"{name}.proj".lstrip(".")
            if heads is not None and name in self.order:
                for position in range(heads.channels):
                    self.same.join((proj, IN, position), (name, OUT, position))
                    self.tied.join((proj, IN, position - position % heads.width), (proj, IN, position))
        for place in [place for places in self.same.all() for place in places]:
            name, dim, position = place
            module = self.modules.get(name)
            if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
                if module.in_channels == module.groups:
                    # Each group makes several channels of one.
                    if dim == OUT:
                        self.same.join((name, IN, position // (module.out_channels // module.groups)), place)
                else:
                    # Each group keeps as many, at the same positions in it.
                    in_group = size_of(module, dim) // module.groups
                    self.tied.join((name, dim, position % in_group), place)
            elif isinstance(module, nn.GroupNorm):
                in_group = module.num_channels // module.num_groups
                self.tied.join((name, dim, position - position % in_group), place)

    def _channels(self) -> list[list[Place]]:
        """Return the positions of every channel; channels that are tied and at different modules are one."""
        while True:
            channels = self.same.all()
            of_place = {place: number for number, places in enumerate(channels) for place in places}
            signatures = [frozenset(Counter((name, dim) for name, dim, _ in places).items()) for places in channels]
            merged = False
            for tied in self._tied_channels(of_place):
                if len({signatures[number] for number in tied}) > 1:
                    merged = True
                    for number in tied[1:]:
                        self.same.join(channels[tied[0]][0], channels[number][0])
            if not merged:
                return channels

    def _tied_channels(self, of_place: dict[Place, int]) -> list[list[int]]:
        """Return the numbers of channels that are tied."""
        numbers = _Sets()
        for places in self.tied.all():
            known = [of_place[place] for place in places if place in of_place]
            for number in known:
                numbers.join(known[0], number)
        return numbers.all()

    def _sorted(self) -> ChannelGroups:
        """Put channels into groups: those that are at the same modules."""
        channels = self._channels()
        for places in channels:
            places.sort(key=self._rank)
        of_place = {place: number for number, places in enumerate(channels) for place in places}
        unit_of = {number: tuple(tied) for tied in self._tied_channels(of_place) for number in tied}
        by_modules: dict[Any, list[int]] = {}
        for number, places in enumerate(channels):
            signature = Counter((name, dim) for name, dim, _ in places)
            by_modules.setdefault(frozenset(signature.items()), []).append(number)
        groups: list[ChannelGroup] = []
        fixed: dict[str, str] = {}
        taken: Counter[str] = Counter()
        for numbers in sorted(by_modules.values(), key=lambda numbers: min(self._rank(channels[n][0]) for n in numbers)):
            units = sorted({unit_of.get(number, (number,)) for number in numbers})
            units = [tuple(sorted(unit, key=lambda n: self._rank(channels[n][0]))) for unit in units]
            units.sort(key=lambda unit: self._rank(channels[unit[0]][0]))
            group = self._group([[channels[number] for number in unit] for unit in units])
            if group is None:
                continue
            taken[group.name] += 1
            name = group.name
            if taken[name] > 1:
                name = f"{name}#{taken[name]}"
            reason = self._why_fixed([channels[number] for number in numbers], units)
            if not reason:
                groups.append(replace(group, name=name))
            elif fixed.get(group.name) != reason:
                fixed[name] = reason
        followed = {name for places in channels for name, dim, _ in places if dim == OUT}
        for name, module in self.modules.items():
            if isinstance(module, MAKERS) and name not in followed:
                fixed[name] = "it is never called"
                if name in self.order:
                    fixed[name] = LOST
        return ChannelGroups(tuple(groups), fixed)

    def _why_fixed(self, channels: list[list[Place]], units: list[tuple[int, ...]]) -> str:
        """Say why some channels can't be removed; nothing if they can."""
        reasons = [self.reasons[place] for places in channels for place in places if place in self.reasons]
        if reasons:
            return reasons[0]
        if len({len(unit) for unit in units}) > 1:
            return "grouped layers divide them in different ways"
        if len(units) == 1 and len(channels) > 1:
            return "a grouped layer needs all of them"
        return ""

    def _rank(self, place: Place) -> tuple[int, bool, int]:
        name, dim, position = place
        return self.order.get(name, TENSOR_ORDER), dim == OUT, position

    def _group(self, units: list[list[list[Place]]]) -> ChannelGroup | None:
        """Make a group of the positions of its channels, unit by unit; None for channels that no layer writes."""
        channels = [places for unit in units for places in unit]
        keys = {(self.order.get(name, TENSOR_ORDER), name, dim) for name, dim, _ in channels[0]}
        members = []
        for _, name, dim in sorted(keys):
            positions = tuple(_positions(places, name, dim) for places in channels)
            members.append(Member(name, dim, positions, self._axis(name, dim)))
        layers = {name for name, module in self.modules.items() if isinstance(module, QUANTIZABLE)}
        writers = tuple(member.module for member in members if member.dim == OUT and member.module in layers)
        through = {name for name in writers if is_depthwise(self.modules[name])}
        readers = through.union(member.module for member in members if member.dim == IN and member.module in layers)
        makers = [m.module for m in members if m.dim == OUT and isinstance(self.modules.get(m.module), MAKERS)]
        if not makers:
            return None
        in_order = tuple(sorted(readers, key=lambda name: self.order[name]))
        return ChannelGroup(makers[0], len(channels), len(units[0]), tuple(members), writers, in_order)

    def _axis(self, name: str, dim: str) -> int:
        """Return the axis of a weight that has the channels."""
        if name in self.axes:
            return self.axes[name]
        module = self.modules[name]
        is_transposed = isinstance(module, _ConvNd) and module.transposed and not is_depthwise(module)
        if isinstance(module, nn.Embedding) or is_transposed:
            return int(dim == OUT)
        return int(dim == IN)


def _moved(channels: list[Any], places_of: Callable[[int], list[int]]) -> list[Any]:
    """Return channels at other places; torch-pruning's pairs of a place and the root's channel."""
    return [channel._replace(idx=place) for channel in channels for place in places_of(channel.idx)]


def _selection_of(node: Any) -> list[int] | None:
    """Return which channels of its input a node selects, which torch-pruning takes for the identity; None for others."""
    grad_fn = node.grad_fn
    if grad_fn is None or not type(grad_fn).__name__.startswith("IndexSelectBackward") or grad_fn._saved_dim != 1:
        return None
    order: list[int] = grad_fn._saved_index.tolist()
    return order


def _parts_of(split: Any, reader: Any) -> list[tuple[int, int]] | None:
    """Return which parts of a split a node reads, as the places where they begin and end; None if it isn't a split.

    torch-pruning takes the parts in the order in which it meets their readers.
    """
    grad_fn = split.grad_fn
    if reader not in split.outputs or not type(grad_fn).__name__.startswith("Split"):
        return None
    dims = len(grad_fn._saved_self_sym_sizes)
    dim = grad_fn._saved_dim
    if dim >= dims:
        dim -= UNSIGNED  # torch hands on negative numbers as those that they look like without a sign
    dim %= dims
    if dim not in (1, dims - 1):
        return None
    size = grad_fn._saved_self_sym_sizes[dim]
    if hasattr(grad_fn, "_saved_split_sizes"):
        ends = list(itertools.accumulate(grad_fn._saved_split_sizes))
    else:
        ends = [*range(grad_fn._saved_split_size, size, grad_fn._saved_split_size), size]
    begins = [0, *ends[:-1]]
    numbers = sorted({number for function, number in reader.grad_fn.next_functions if function is grad_fn})
    return [(begins[number], ends[number]) for number in numbers]


def _positions(places: list[Place], name: str, dim: str) -> tuple[int, ...]:
    """Return the positions in one dimension of one module."""
    return tuple(sorted(position for at, way, position in places if at == name and way == dim))


def _is_understood(module: _ConvNd) -> bool:
    """Say whether torch-pruning takes a convolution of several groups for what it is."""
    if module.groups == module.out_channels and not is_depthwise(module):
        return False
    return not module.transposed or is_depthwise(module)


def _name_buffers(network: nn.Module) -> None:
    """Make the buffers of unknown modules parameters, which torch-pruning can follow."""
    for module in network.modules():
        if isinstance(module, FOLLOWED):
            continue
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer is not None and buffer.is_floating_point() and buffer.numel() > 1:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer))


def _shared(network: nn.Module) -> dict[str, str]:
    """Return the modules whose weights are those of another module too, with that module's name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            other = first.setdefault(id(parameter), name)
            if other != name:
                found[name], found[other] = other, name
    return found
