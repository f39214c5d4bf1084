"""How a network is called with what a loader gives: inputs and targets of any structure.

A *structure* is a tensor, or a list, tuple, mapping or dataclass of structures. Outputs and batches
of Hugging Face are mappings. NumPy arrays of numbers are as good as tensors. Whatever else is in a
structure (strings, numbers, None) stays as it is.

What a *batch* holds:

- a tensor: inputs alone,
- a tuple or list: (inputs, targets, whatever is ignored ...); of one element, inputs alone,
- a mapping: inputs, with the targets under "labels", "label", "targets" or "target".
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence

Forward = Callable[[nn.Module, Any], Any]  # (network, batch) -> outputs, in place of `call`

TARGET_KEYS = ("labels", "label", "targets", "target")
NUMBERS = "?biufc"  # kinds of NumPy arrays that tensors can hold


def call(network: nn.Module, inputs: Any) -> Any:
    """Run a network on inputs of any structure.

    A tuple is spread over the arguments of `forward`, if its signature can take it so, and a mapping
    over the named arguments. Everything else is passed as the one argument, and so is what can't be
    spread. A list is spread only where `forward` can't be called with one argument: loaders make lists
    of tuples.

    Args:
        network: The network.
        inputs: Its inputs.

    Returns:
        What the network returns.
    """
    inputs = _spreadable(inputs, network)
    if isinstance(inputs, Mapping):
        if takes(network, (), inputs):
            return network(**inputs)
    elif _is_tuple(inputs) and takes(network, inputs, {}):
        return network(*inputs)
    return network(inputs)


def inputs_of(batch: Any, network: nn.Module | None = None) -> Any:
    """Return the inputs in a batch.

    Args:
        batch: What a loader gave.
        network: What they are for. A mapping's key that its `forward` can't do without is an input,
            whatever it is called. Of tensors side by side, as many are inputs as `forward` can't do
            without. A list that its `forward` takes only as several arguments becomes a tuple.

    Returns:
        The inputs, with tensors in place of arrays. One sample in each place (a detector's images) is
        a list, one input of all samples in each place a tuple, whichever of the two the loader made,
        as far as the targets tell.
    """
    if isinstance(batch, Mapping):
        return as_tensors(_without(batch, _target_key(batch, network)))
    if not _is_sequence(batch) or not batch:
        return as_tensors(batch)
    given, target = _divided(batch, network)
    inputs = as_tensors(given)
    if target is not None and _is_sequence(inputs):
        targets = as_tensors(target)
        if _are_samples(inputs, targets):
            return list(inputs)
        if _are_together(inputs, targets):
            return tuple(inputs)
    if network is not None:
        return _spreadable(inputs, network)
    return inputs


def targets_of(batch: Any, network: nn.Module | None = None) -> Any:
    """Return the targets in a batch, with tensors in place of arrays; None if there are none.

    Args:
        batch: What a loader gave.
        network: As in `inputs_of`.
    """
    if isinstance(batch, Mapping):
        return as_tensors(batch.get(_target_key(batch, network)))
    if _is_sequence(batch) and batch:
        return as_tensors(_divided(batch, network)[1])
    return None


def count_of(inputs: Any) -> int:
    """Return how many samples there are in inputs or targets.

    That is the first dimension of the first tensor that has one; of a list, its length. 1 where there
    is neither.
    """
    found = _count(inputs)
    if found is None:
        return 1
    return found


def first_sample(structure: Any, count: int) -> Any:
    """Return the first of some samples.

    Args:
        structure: Inputs, targets, or a tuple of both.
        count: How many samples there are in it.

    Returns:
        The same structure with a batch of one: the first row alone of every tensor whose first dimension
        is `count`, and the first element of every list of that length. Tensors are views.
    """
    return samples(structure, count, 0, 1)


def samples(structure: Any, count: int, begin: int, end: int) -> Any:
    """Return some samples out of many: those from `begin` up to `end`.

    Args:
        structure: As in `first_sample`.
        count: How many samples there are in it.
        begin: The first sample's number.
        end: The number behind that of the last.

    Returns:
        The same structure with those samples; what isn't there for every sample stays whole.
    """
    if isinstance(structure, Tensor | np.ndarray):
        if structure.ndim and len(structure) == count:
            return structure[begin:end]
        return structure
    if isinstance(structure, list) and len(structure) == count:
        return structure[begin:end]
    return _rebuilt(structure, lambda part: samples(part, count, begin, end))


def leaves(structure: Any) -> list[Tensor]:
    """Return the tensors of a structure in order; arrays of numbers as tensors."""
    if isinstance(structure, Tensor):
        return [structure]
    if _is_array(structure):
        return [_tensor_of(structure)]
    return [tensor for part in _parts(structure) for tensor in leaves(part)]


def map_tensors(structure: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a structure of the same kind with every tensor replaced by what a function makes of it.

    Args:
        structure: Any; it is left alone.
        function: Gets each tensor; an array of numbers as a tensor.

    Returns:
        The new structure.
    """
    if isinstance(structure, Tensor):
        return function(structure)
    if _is_array(structure):
        return function(_tensor_of(structure))
    if isinstance(structure, PackedSequence):
        return structure._replace(data=function(structure.data))
    return _rebuilt(structure, lambda part: map_tensors(part, function))


def as_tensors(structure: Any) -> Any:
    """Return a structure with tensors in place of arrays of numbers."""
    return map_tensors(structure, lambda tensor: tensor)


def to_device(structure: Any, device: torch.device | str) -> Any:
    """Return a structure whose tensors are on a device, and so is what is no structure and has a method `to`."""
    if isinstance(structure, Tensor):
        return structure.to(device)
    if isinstance(structure, PackedSequence):
        return structure.to(torch.device(device))  # type: ignore[arg-type]  # its annotations know dtypes alone
    if _is_array(structure):
        return _tensor_of(structure).to(device)
    if not _parts(structure) and callable(getattr(structure, "to", None)):
        return structure.to(device)
    return _rebuilt(structure, lambda part: to_device(part, device))


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's first parameter, or buffer; the CPU if it has neither."""
    tensor = next(itertools.chain(network.parameters(), network.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    return tensor.device


def takes(network: nn.Module, arguments: tuple[Any, ...], named: Mapping[Any, Any]) -> bool:
    """Say whether the signature of a network's `forward` has room for arguments.

    Args:
        network: The network.
        arguments: Those by place.
        named: Those by name.

    Returns:
        Whether they fit; True too for a `forward` whose signature can't be read.
    """
    if not all(isinstance(name, str) for name in named):
        return False
    signature = _signature(network)
    if signature is None:
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def _spreadable(inputs: Any, network: nn.Module) -> Any:
    """Return a list as a tuple, if a network takes its elements, and takes no argument alone."""
    if isinstance(inputs, list) and not takes(network, (inputs,), {}) and takes(network, tuple(inputs), {}):
        return tuple(inputs)
    return inputs


def _signature(network: nn.Module) -> inspect.Signature | None:
    """Return the signature of a network's `forward`; None if it has none that can be read."""
    if isinstance(network, nn.DataParallel | DistributedDataParallel):
        network = network.module
    try:
        return inspect.signature(getattr(network, "forward", network))
    except (TypeError, ValueError):
        return None


def _divided(batch: list[Any] | tuple[Any, ...], network: nn.Module | None) -> tuple[Any, Any]:
    """Return inputs and targets of a batch: the first two, or what is behind all arguments that a network needs."""
    needed = 1
    if network is not None and isinstance(batch[0], Tensor | np.ndarray) and not takes(network, (batch[0],), {}):
        lengths = range(2, len(batch) + 1)
        needed = next((length for length in lengths if takes(network, tuple(batch[:length]), {})), 1)
    inputs = batch[0]
    if needed > 1:
        inputs = tuple(batch[:needed])
    if len(batch) > needed:
        return inputs, batch[needed]
    return inputs, None


def _target_key(batch: Mapping[Any, Any], network: nn.Module | None) -> str | None:
    """Return under which key of a batch the targets are; None if there is none."""
    needed: set[str] = set()
    if network is not None and (signature := _signature(network)) is not None:
        parameters = signature.parameters.values()
        needed = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    for key in TARGET_KEYS:
        if key in batch and key not in needed:
            return key
    return None


def _are_samples(inputs: list[Any] | tuple[Any, ...], targets: Any) -> bool:
    """Say whether there is one sample in each place, with as many targets."""
    count = _count(targets)
    if isinstance(targets, tuple):
        count = len(targets)
    if count != len(inputs):
        return False
    if not _are_together(inputs, targets):
        return True
    # By lengths it could be either. Three images of three channels are met more often than three inputs of three samples.
    dimensions = {tensor.dim() for tensor in leaves(inputs)}
    return len(dimensions) == 1 and min(dimensions) > 2 and _count(inputs[0]) == count


def _are_together(inputs: Any, targets: Any) -> bool:
    """Say whether all tensors in inputs and targets are of the same number of samples."""
    return len({tensor.shape[:1] for tensor in leaves((inputs, targets))}) == 1


def _count(structure: Any) -> int | None:
    if isinstance(structure, Tensor | np.ndarray):
        if structure.ndim:
            return len(structure)
        return None
    if isinstance(structure, PackedSequence):
        return int(structure.batch_sizes[0])
    if isinstance(structure, list):
        return len(structure)
    for part in _parts(structure):
        found = _count(part)
        if found is not None:
            return found
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS


def _tensor_of(array: Any) -> Tensor:
    """Return an array of numbers as a tensor: of its memory, where a tensor can have such."""
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(array)


def _is_tuple(value: Any) -> bool:
    """Say whether a value is a tuple of inputs; a PackedSequence is one input."""
    return isinstance(value, tuple) and not isinstance(value, PackedSequence)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) or _is_tuple(value)


def _parts(structure: Any) -> list[Any]:
    """Return what a structure is made of; nothing for what is none."""
    if isinstance(structure, Mapping):
        return list(structure.values())
    if isinstance(structure, list | tuple):
        return list(structure)
    if is_dataclass(structure) and not isinstance(structure, type):
        return [value for _, value in _fields(structure)]
    return []


def _rebuilt(structure: Any, made_of: Callable[[Any], Any]) -> Any:
    """Return a structure of the same kind, of what a function makes of its parts; what is none stays."""
    if isinstance(structure, Mapping):
        return _like(structure, {key: made_of(value) for key, value in structure.items()})
    if isinstance(structure, PackedSequence):
        return structure
    if isinstance(structure, list):
        return [made_of(part) for part in structure]
    if isinstance(structure, tuple):
        parts = [made_of(part) for part in structure]
        if hasattr(structure, "_make"):
            return structure._make(parts)
        return tuple(parts)
    if is_dataclass(structure) and not isinstance(structure, type):
        made = copy.copy(structure)
        for name, value in _fields(structure):
            object.__setattr__(made, name, made_of(value))  # frozen ones too
        return made
    return structure


def _without(mapping: Mapping[Any, Any], key: str | None) -> Any:
    """Return a mapping without a key, of the same class where that can be changed."""
    if key is None:
        return mapping
    try:
        made: Any = copy.copy(mapping)
        del made[key]
    except Exception:  # mappings of Hugging Face raise one for `del`
        return {name: value for name, value in mapping.items() if name != key}
    return made


def _like(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return values in a mapping of the same class, or in a dict where its class can't be changed."""
    if type(mapping) is dict:
        return values
    try:
        made: Any = copy.copy(mapping)
        for key, value in values.items():
            made[key] = value
    except TypeError:
        return values
    return made


def _fields(structure: Any) -> Iterator[tuple[str, Any]]:
    """Return the fields of a dataclass that have a value, with their names."""
    for field in fields(structure):
        if hasattr(structure, field.name):
            yield field.name, getattr(structure, field.name)
