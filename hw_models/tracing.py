"""Records what a network asks of hardware, by running it once on an example."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hw_models.workload import Buffer, Call, Layer, Size, Workload

PRICED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def trace(network: nn.Module, *example: Any) -> Workload:
    """Run a network once on an example and record its layers.

    Conv1d, Conv2d and Linear are recorded where they are called; what is never called is left out. The network comes back
    in the mode it was in.

    Args:
        network: The network.
        example: Its inputs; the first one's leading dimension is the batch.

    Returns:
        The layers in the order of their first call, with their sizes per image.

    Raises:
        ValueError: If there is no such layer, listing the modules found; and, naming it, for a convolution or matrix product
            with trained weights that is none of these: it would be priced at nothing.
    """
    if not example or not isinstance(example[0], Tensor) or example[0].dim() == 0 or len(example[0]) == 0:
        raise ValueError("trace needs an example input: a tensor whose first dimension is a batch of at least one")
    recorder = _Recorder(network, example)
    with _evaluating(network), recorder.hooked(), torch.no_grad(), recorder:
        network(*example)
    if not recorder.calls:
        kinds = sorted({type(m).__name__ for m in network.modules() if not list(m.children())})
        raise ValueError(
            f"{type(network).__name__} calls no Conv1d, Conv2d or Linear layer, so there is nothing to quantize; "
            f"it is made of {', '.join(kinds)}"
        )
    layers = tuple(_layer(name, network.get_submodule(name), tuple(calls)) for name, calls in recorder.calls.items())
    # A weight that two layers share is stored once, and belongs to the first.
    inside = {id(p) for name in recorder.calls for p in network.get_submodule(name).parameters(recurse=False)}
    return Workload(
        layers,
        other_parameters=sum(p.numel() for p in network.parameters() if id(p) not in inside),
        other_values=sum(b.numel() for b in network.buffers() if b.is_floating_point()),
        buffers=recorder.buffers(),
    )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _Recorder(TorchDispatchMode):
    """Watches a forward pass: layers through hooks, every operation's inputs and outputs through torch's dispatcher."""

    # Operations that multiply by weights, and would be priced at nothing if no layer owned them.
    PRODUCTS = (
        *("convolution", "linear", "mm", "addmm", "bmm", "baddbmm"),
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    )
    RECURRENT = ("rnn", "lstm", "gru")
    # Beside the pointwise operations, those that can write their result over their input.
    IN_PLACE = ("batch_norm", "clone", "hardswish", "prelu", "threshold")

    def __init__(self, network: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.names: dict[nn.Module, str] = {
            module: name for name, module in network.named_modules() if isinstance(module, PRICED)
        }
        self.calls: dict[str, list[Call]] = {}
        self.batch = len(example[0])
        self._owners = {_storage(p): name for name, p in network.named_parameters()}
        self._inside = 0
        self._operation = 0
        # The number of the buffer that a storage holds now; a storage that was freed may come back as another buffer.
        self._holds: dict[int, int] = {}
        self._elements: list[int] = []
        self._first: list[int] = []
        self._last: list[int] = []
        self._readers: list[set[int]] = []
        self._overwrites: list[tuple[int, int, int]] = []  # operation, buffer read, buffer written
        for tensor in tree_leaves(example):
            if isinstance(tensor, Tensor):
                self._new(tensor)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._enter) for module in self.names]
        handles += [module.register_forward_hook(self._leave) for module in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside += 1
        calls = self.calls.setdefault(self.names[module], [])
        if (buffer := self._holds.get(_storage(inputs[0]))) is not None:
            self._readers[buffer].add(list(self.calls).index(self.names[module]))
        calls.append(Call((0, 0), (0, 0)))  # keeps the place of a layer whose forward calls another

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._inside -= 1
        source: Tensor = inputs[0]
        if isinstance(module, nn.Linear):
            rows = source.shape[:-1].numel() // self.batch
            call = Call((rows, 1), (rows, 1))
        else:
            spatial = 1
            if isinstance(module, nn.Conv2d):
                spatial = 2
            # Images folded into the batch (patches, frames) count as more rows of positions.
            images = 1
            if output.dim() == spatial + 2:
                images = output.shape[0] // self.batch
            before = (1, *source.shape[-spatial:])[-2:]
            after = (1, *output.shape[-spatial:])[-2:]
            call = Call((before[0] * images, before[1]), (after[0] * images, after[1]))
        self.calls[self.names[module]][-1] = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if not self._inside:
            self._check_priced(name, inputs)
        self._operation += 1
        read = [self._holds[storage] for storage in inputs if storage in self._holds]
        for buffer in read:
            self._last[buffer] = self._operation
        results = tree_leaves(result)
        if "batch_norm" in name:
            results = results[:1]  # the others are statistics that evaluation has no use for
        for tensor in results:
            if isinstance(tensor, Tensor) and _storage(tensor) not in inputs:
                made = self._new(tensor)
                if torch.Tag.pointwise in func.tags or any(word in name for word in self.IN_PLACE):
                    self._overwrites += [(self._operation, b, made) for b in read]
        return result

    def _check_priced(self, name: str, inputs: list[int]) -> None:
        base = name.rstrip("_")
        product = base in self.PRODUCTS or any(word in base for word in self.RECURRENT)
        weights = [self._owners[storage] for storage in inputs if storage in self._owners]
        if product and (weights or base == "convolution"):
            owner = "a function"
            if weights:
                owner = f"the layer of {weights[0]!r}"
            raise ValueError(
                f"{owner} computes {base!r}, which has no cost model; "
                f"priced are the modules {', '.join(kind.__name__ for kind in PRICED)}"
            )

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
    identity: int = tensor.untyped_storage()._cdata
    return identity


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
        kind=_kind(module, kernel),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=kernel,
        stride=_pair(module.stride),
        padding=_padding(module.padding, kernel, dilation),
        dilation=dilation,
        groups=module.groups,
        bias=module.bias is not None,
        calls=calls,
    )


def _kind(module: nn.Conv1d | nn.Conv2d, kernel: Size) -> str:
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    if module.groups > 1:
        return "grouped"
    if kernel == (1, 1):
        return "pointwise"
    return "conv"


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
