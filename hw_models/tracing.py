"""Records what a network asks of hardware, by running it once on an example."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hw_models import example as examples
from hw_models.example import Forward
from hw_models.products import base_name, is_product, product_macs
from hw_models.workload import Buffer, Call, ElementWise, Layer, Size, Unpriced, Workload, kind_of

PRICED = (nn.Conv1d, nn.Conv2d, nn.Linear)
OURS = ("aten::", "prim::", "prims::")  # torch's own operations, which are known by name


def trace(network: nn.Module, *example: Any, forward: Forward | None = None) -> Workload:
    """Run a network once on an example and record its layers.

    Conv1d, Conv2d and Linear are recorded where they are called; what is never called is left out. A module with several
    names is one layer, called by its first one. Layers with the same weight say so: it is stored once. All other products,
    such as those of attention, are listed with their MACs in `unpriced`. The network comes back in the mode it was in.

    Args:
        network: The network.
        example: Its inputs, of any structure; the leading dimension of the first tensor is the batch. One
            tuple or mapping is spread over the arguments that `forward` of the network has. Of inputs
            that are a list of samples, such as a detector's images, the first is run.
        forward: `forward(network, *example)` runs the network; None: it is called with the example.

    Returns:
        The layers in the order of their first call, with their sizes per image.

    Raises:
        ValueError: If there is no such layer, listing the modules found; and, naming it, for a convolution or a recurrent
            layer that is none of these, and for a product with trained weights outside of them.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
        >>> workload = trace(network, torch.zeros(1, 3, 8, 8))
        >>> [(layer.name, layer.macs) for layer in workload.layers]
        [('0', 7776), ('2', 2880)]
    """
    example = examples.first_of_lists(example)
    if examples.batch_of(example) == 0:
        raise ValueError("trace needs an example input: a tensor whose first dimension is a batch of at least one")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet, since its layer is lazy: call the network once on inputs first")
    recorder = _Recorder(network, example)
    try:
        with _evaluating(network), recorder.hooked(), torch.no_grad(), recorder:
            examples.run(network, example, forward)
    except Exception as error:
        if recorder.refused is None and isinstance(error, NotImplementedError):
            # Within torch.vmap and the like, tensors don't tell whose memory they are.
            reason = " ".join(str(error).split())
            raise ValueError(f"{type(network).__name__} can't be traced: {reason}") from error
        if recorder.refused is None:
            raise
    if recorder.refused is not None:
        raise recorder.refused  # as it was: what ran the network may have wrapped or caught it
    if not recorder.calls:
        kinds = sorted({type(m).__name__ for m in network.modules() if not list(m.children())})
        raise ValueError(
            f"{type(network).__name__} calls no Conv1d, Conv2d or Linear layer, so there is nothing to quantize; "
            f"it is made of {', '.join(kinds)}"
        )
    layers = _tied(network, [_layer(n, network.get_submodule(n), tuple(calls)) for n, calls in recorder.calls.items()])
    inside = _inside(network, recorder.calls)
    # A weight that a layer stores at few bits and, say, an embedding reads in float is there twice.
    twice = {id(p): p.numel() for m in recorder.others for p in m.parameters(recurse=False) if id(p) in inside}
    return Workload(
        layers,
        other_parameters=sum(p.numel() for p in network.parameters() if id(p) not in inside),
        other_values=sum(b.numel() for b in network.buffers() if b.is_floating_point()) + sum(twice.values()),
        buffers=recorder.buffers(),
        unpriced=recorder.unpriced(),
        branches=recorder.branches(),
        element_wise=recorder.element_wise(),
    )


def _inside(network: nn.Module, names: Iterable[str]) -> set[int]:
    """The identities of the parameters that are weights and biases of layers, or that these are computed from."""
    found = set()
    for name in names:
        layer = network.get_submodule(name)
        found |= {id(p) for part, p in layer.named_parameters(recurse=False) if part.startswith(("weight", "bias"))}
        if parametrize.is_parametrized(layer):
            found |= {id(p) for p in layer.parametrizations.parameters()}  # type: ignore[union-attr]
    return found


def _tied(network: nn.Module, layers: list[Layer]) -> tuple[Layer, ...]:
    """Say of each layer which one before it has the same weight, and which one the same bias."""
    first: dict[object, str] = {}
    made = []
    for layer in layers:
        owners: dict[str, Any] = {}
        for part in ("weight", "bias"):
            tensor = network.get_submodule(layer.name)._parameters.get(part)
            if tensor is None:
                continue  # computed from others: nobody else's
            # The same numbers in memory, whatever they are called.
            same = (_storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            owner = first.setdefault(same, layer.name)
            if owner != layer.name:
                owners[f"{part}_of"] = owner
        made.append(replace(layer, **owners))
    return tuple(made)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass
class _Visit:
    """A call of a layer that is under way: what depends on its input, and the MACs of the products with that."""

    dependent: set[int]
    macs: dict[str, int] = field(default_factory=dict)


class _Recorder(TorchDispatchMode):
    """Watches a forward pass: modules through hooks, every operation's inputs and outputs through torch's dispatcher."""

    # Operations that have weights and aren't counted.
    RECURRENT = ("rnn", "lstm", "gru")
    FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
    # Beside the pointwise operations, those that can write their result over their input.
    IN_PLACE = ("batch_norm", "clone", "hardswish", "prelu", "threshold")
    # Of all of these, those that compute nothing, or are folded into the layer before.
    NO_ARITHMETIC = ("batch_norm", "clone", "copy", "fill", "zeros_like", "ones_like", "empty_like")

    def __init__(self, network: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.names: dict[nn.Module, str] = {module: name for name, module in network.named_modules()}
        self.calls: dict[str, list[Call]] = {}
        self.refused: ValueError | None = None
        self.others: list[nn.Module] = []  # modules called that are no layers
        self.batch = examples.batch_of(example)
        self._owners = {_storage(p): name for name, p in network.named_parameters()}
        # Those under way, the innermost last; around them `forward`, which counts as the network.
        self._modules: list[str] = [""]
        self._visits: list[_Visit] = []  # the layers under way
        self._unpriced: dict[tuple[str, str], int] = {}  # module and operation -> MACs of the batch
        # Products of broadcast tensors, element by element, by what holds them: a matrix product if they are then summed.
        self._spread: dict[int, tuple[torch.Size, list[int], list[str]]] = {}
        self._operation = 0
        # The number of the buffer that a storage holds now; a storage that was freed may come back as another buffer.
        self._holds: dict[int, int] = {}
        self._elements: list[int] = []
        self._first: list[int] = []
        self._last: list[int] = []
        self._readers: list[set[int]] = []
        self._overwrites: list[tuple[int, int, int]] = []  # operation, buffer read, buffer written
        # What layers read: a buffer whose values were changed in place holds another activation.
        self._version: dict[int, int] = {}
        self._readings: dict[tuple[int, int], set[int]] = {}
        self._element_wise: dict[tuple[str, str, int], tuple[int, int]] = {}
        for tensor in examples.tensors(example):
            self._new(tensor)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # First of all, so that what other hooks make a weight of belongs to the layer.
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        self._modules.append(name)
        if not isinstance(module, PRICED):
            self.others.append(module)
            return
        inputs = _tensors((args, kwargs))
        self._visits.append(_Visit({_storage(tensor) for tensor in inputs}))
        calls = self.calls.setdefault(name, [])
        if inputs and (buffer := self._holds.get(_storage(inputs[0]))) is not None:
            index = list(self.calls).index(name)
            self._readers[buffer].add(index)
            self._readings.setdefault((buffer, self._version.get(buffer, 0)), set()).add(index)
        calls.append(Call((0, 0), (0, 0)))  # keeps the place of a layer whose forward calls another

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = self._modules.pop()
        if not isinstance(module, PRICED):
            return
        visit = self._visits.pop()
        source, output = _tensors((args, kwargs))[0], _tensors(result)[0]
        if isinstance(module, nn.Linear):
            rows = -(-source.shape[:-1].numel() // self.batch)
            call = Call((rows, 1), (rows, 1))
        else:
            spatial = 1
            if isinstance(module, nn.Conv2d):
                spatial = 2
            # Images folded into the batch (patches, frames) count as more rows of positions.
            images = 1
            if output.dim() == spatial + 2:
                images = -(-output.shape[0] // self.batch)
            before = (1, *source.shape[-spatial:])[-2:]
            after = (1, *output.shape[-spatial:])[-2:]
            call = Call((before[0] * images, before[1]), (after[0] * images, after[1]))
        self.calls[name][-1] = call
        # What a subclass computes beyond its own product is priced nowhere.
        further = sum(visit.macs.values()) - self.batch * _layer(name, module, (call,)).macs
        if further > 0:
            self._list(name, ", ".join(visit.macs), further)
        if self._visits:
            self._visits[-1].dependent.add(_storage(output))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler when the first operation comes, which takes as long as torch itself.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "torch._dynamo" in sys.modules:
            # A network that is compiled mustn't compile what watches it.
            return torch.compiler.disable(self._record)(func, args, kwargs or {})
        return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_inference_mode_enabled():
            # Here alone do operations come that are made of others, such as `matmul`.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        inputs = [_storage(tensor) for tensor in tensors]
        name = base_name(func._schema.name)
        if self._visits:
            self._note_inside(func, inputs, args, kwargs, result)
        else:
            self._note_outside(func, tensors, args, kwargs, result)
        self._operation += 1
        read = [self._holds[storage] for storage in inputs if storage in self._holds]
        for buffer in read:
            self._last[buffer] = self._operation
        is_pointwise = torch.Tag.pointwise in func.tags or any(word in name for word in self.IN_PLACE)
        if is_pointwise and not self._visits:
            self._note_element_wise(name, tensors, result)
        if func._schema.is_mutable and inputs and inputs[0] in self._holds:
            written = self._holds[inputs[0]]
            self._version[written] = self._version.get(written, 0) + 1
        results = tree_leaves(result)
        if "batch_norm" in name:
            results = results[:1]  # the others are statistics that evaluation has no use for
        for tensor in results:
            if isinstance(tensor, Tensor) and _storage(tensor) not in inputs:
                # What was here before was freed, a product among others.
                self._spread.pop(_storage(tensor), None)
                made = self._new(tensor)
                if is_pointwise:
                    self._overwrites += [(self._operation, b, made) for b in read]
        if name == "mul":
            self._note_spread(tensors, result)
        return result

    def _note_inside(self, func: Any, inputs: list[int], args: Any, kwargs: Any, result: Any) -> None:
        """Count a product in a layer, unless it only makes a weight, such as that of spectral normalization."""
        visit = self._visits[-1]
        if visit.dependent.isdisjoint(inputs):
            visit.dependent -= {_storage(tensor) for tensor in _tensors(result)}
            return
        visit.dependent |= {_storage(tensor) for tensor in _tensors(result)}
        name = base_name(func._schema.name)
        if is_product(name):
            visit.macs[name] = visit.macs.get(name, 0) + (product_macs(func, args, kwargs, result) or 0)
        elif self._is_closed(name):
            self._refuse(name, [self._owners[storage] for storage in inputs if storage in self._owners])

    def _note_outside(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any, result: Any) -> None:
        """List a product that no layer owns; refuse one with trained weights, and one that isn't counted."""
        name = base_name(func._schema.name)
        weights = [self._owners[_storage(t)] for t in tensors if _storage(t) in self._owners]
        macs = None
        if is_product(name):
            macs = product_macs(func, args, kwargs, result)
            if weights or macs is None or name.endswith("convolution"):
                self._refuse(name, weights)
        elif name in ("sum", "mean") and tensors:
            macs, weights = self._summed(tensors[0], args)
            name = f"mul, {name}"
            if weights:
                self._refuse(name, weights)
        elif self._is_closed(name):
            self._refuse(name, weights)
        elif not func._schema.name.startswith(OURS):
            # A library's own operation on two matrices, such as a deformable convolution, may be a product.
            matrices = [t for t in tensors if t.dim() > 1 and t.is_floating_point()]
            if len(matrices) > 1:
                name = func._schema.name
                macs = product_macs(func, tuple(matrices), {}, result)
                if any(_storage(t) in self._owners for t in matrices):
                    self._refuse(name, weights)
        if macs:
            self._list(self._modules[-1], name, macs)

    def _is_closed(self, name: str) -> bool:
        return name in self.FUSED or any(word in name for word in self.RECURRENT)

    def _note_element_wise(self, name: str, tensors: list[Tensor], result: Any) -> None:
        """Count what an operation reads and writes that computes each element by itself."""
        if not isinstance(result, Tensor) or not result.is_floating_point() or any(w in name for w in self.NO_ARITHMETIC):
            return
        # Numbers by themselves, parameters and constants aren't activations.
        read = {_storage(t): t.numel() for t in tensors if t.dim() and t.is_floating_point() and _storage(t) in self._holds}
        if not read:
            return
        key = (self._modules[-1], name, len(read))
        before, written = self._element_wise.get(key, (0, 0))
        self._element_wise[key] = (before + sum(read.values()), written + result.numel())

    def _note_spread(self, tensors: list[Tensor], result: Tensor) -> None:
        """Keep in mind a product of two tensors that both have dimensions which the other lacks or has in common."""
        self._spread.pop(_storage(result), None)
        if len(tensors) != 2:
            return
        left, right = ((1,) * (result.dim() - t.dim()) + tuple(t.shape) for t in tensors)
        common = [d for d in range(result.dim()) if left[d] > 1 and right[d] > 1]
        if common and left != right:
            weights = [self._owners[_storage(t)] for t in tensors if _storage(t) in self._owners]
            self._spread[_storage(result)] = (result.shape, common, weights)

    def _summed(self, source: Tensor, args: Any) -> tuple[int, list[str]]:
        """The MACs of a sum over what two tensors that were multiplied have in common, and the weights among them."""
        shape, common, weights = self._spread.get(_storage(source), (None, [], []))
        if shape != source.shape:
            return 0, []
        dims = list(range(source.dim()))
        if len(args) > 1 and args[1] is not None and args[1] != []:
            dims = [d % source.dim() for d in args[1]]
        if set(common).isdisjoint(dims):
            return 0, []
        return source.numel(), weights

    def _refuse(self, name: str, weights: list[str]) -> None:
        owner = "a function"
        if weights:
            owner = f"the layer of {weights[0]!r}"
        self.refused = ValueError(
            f"{owner} computes {name!r}, which has no cost model; "
            f"priced are the modules {', '.join(kind.__name__ for kind in PRICED)}"
        )
        raise self.refused

    def _list(self, module: str, operation: str, macs: int) -> None:
        if operation.startswith("_scaled_dot_product"):
            operation = "scaled_dot_product_attention"  # whichever of its kernels this machine has
        self._unpriced[module, operation] = self._unpriced.get((module, operation), 0) + macs

    def unpriced(self) -> tuple[Unpriced, ...]:
        """List the products outside of layers, those of an operation in a module together."""
        return tuple(Unpriced(name, of, -(-macs // self.batch)) for (name, of), macs in self._unpriced.items())

    def branches(self) -> tuple[tuple[int, ...], ...]:
        """List the layers that read one activation, where they are several."""
        return tuple(tuple(sorted(layers)) for layers in self._readings.values() if len(layers) > 1)

    def element_wise(self) -> tuple[ElementWise, ...]:
        """List the operations between layers that compute each element by itself, those of one module together."""
        found = []
        for (module, operation, operands), (read, written) in self._element_wise.items():
            sizes = -(-read // self.batch), -(-written // self.batch)
            found.append(ElementWise(module, operation, operands, *sizes))
        return tuple(found)

    def _new(self, tensor: Tensor) -> int:
        buffer = len(self._elements)
        self._holds[_storage(tensor)] = buffer
        self._elements.append(math.ceil(tensor.numel() / self.batch))
        self._first.append(self._operation)
        self._last.append(self._operation)
        self._readers.append(set())
        return buffer

    def buffers(self) -> tuple[Buffer, ...]:
        """List the activations as an engine would hold them.

        A pointwise result takes the place of an input of the same size that nobody needs any more, so norms and activation
        functions cost no memory of their own.
        """
        place = list(range(len(self._elements)))
        last = list(self._last)
        for operation, source, made in self._overwrites:
            free = place[made] == made and last[place[source]] == operation
            if free and self._elements[place[source]] == self._elements[made] and place[source] != made:
                place[made] = place[source]
                last[place[source]] = last[made]
        readers: dict[int, set[int]] = {}
        for buffer, home in enumerate(place):
            readers.setdefault(home, set()).update(self._readers[buffer])
        return tuple(
            Buffer(self._elements[home], self._first[home], last[home], tuple(sorted(readers[home])))
            for home in sorted(readers)
            if self._elements[home]
        )


def _storage(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return -id(tensor)  # sparse: several storages
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _layer(name: str, module: nn.Module, calls: tuple[Call, ...]) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer(
            name=name,
            kind="linear",
            in_channels=module.in_features,
            out_channels=module.out_features,
            kernel=(1, 1),
            stride=(1, 1),
            padding=(0, 0),
            dilation=(1, 1),
            groups=1,
            bias=module.bias is not None,
            calls=calls,
        )
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    kernel = _pair(module.kernel_size)
    dilation = _pair(module.dilation)
    return Layer(
        name=name,
        kind=kind_of(module.in_channels, module.groups, kernel),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=kernel,
        stride=_pair(module.stride),
        padding=_padding(module.padding, kernel, dilation),
        dilation=dilation,
        groups=module.groups,
        bias=module.bias is not None,
        calls=calls,
        is_1d=isinstance(module, nn.Conv1d),
    )


def _padding(padding: str | tuple[int, ...], kernel: Size, dilation: Size) -> Size:
    """Padding at the top and left."""
    if padding == "same":
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    if padding == "valid":
        return 0, 0
    assert not isinstance(padding, str)
    return _pair(padding, 0)


def _pair(value: tuple[int, ...], missing: int = 1) -> Size:
    """(height, width) of a setting that has one entry per spatial dimension."""
    height, width = (missing, *value)[-2:]
    return int(height), int(width)
