"""Inputs and labels from whatever a user has: tensors, a DataLoader, a Dataset, or any iterable of batches."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import quantizers as Q
from haq.data.dataset import Split
from haq.data.labels import class_numbers, native
from haq.data.memory import allowed_bytes
from haq.data.sources import Stream, gives_samples, source_of
from haq.problem import CORRECTIONS, ROUNDINGS
from haq.problem.samples import COPIES, Samples, StreamedSamples
from quantizers.calling import inputs_of, leaves, map_tensors
from quantizers.policy import QUANTIZABLE

BATCH = 250  # images of a Dataset that are put together at a time
# Types that are converted to float32, which networks are searched in. Images of uint8 are not yet inputs: nobody knows how
# they are to be scaled.
CONVERTED = (torch.float64, torch.float16, torch.bfloat16)
ACCEPTED = (torch.float32, torch.int64, torch.int32)  # whole numbers are the words of a text

Batches = Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]


def check_arguments(network: Any, target: Any, metric: Any, bits: Any, pinned: Any) -> None:
    """Check that what a problem is given is of the right type, before anything is computed.

    Args:
        network: The float network.
        target: The hardware, or its name.
        metric: The name of what is limited.
        bits: Smallest and largest width, a text, or None.
        pinned: Pairs of bits by layer name, or None.

    Raises:
        TypeError: In one sentence, naming the value and what is accepted.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is {_shown(network)}; it must be a torch.nn.Module")
    _check_network(network)
    check_target(target)
    if not isinstance(metric, str):
        raise TypeError(
            f"metric is {_shown(metric)}; it must be 'latency', 'energy' or 'storage', or another name of hw_models.METRICS"
        )
    if bits is not None and not isinstance(bits, str) and not _is_pair(bits):
        raise TypeError(
            f"bits is {_shown(bits)}; it must be a pair of integers (smallest, largest), such as (2, 8): every width from the "
            "smallest to the largest may be chosen; or a text such as '2:8,16,float'"
        )
    if pinned is None:
        return
    if not isinstance(pinned, Mapping):
        raise TypeError(f"pinned is {_shown(pinned)}; it must map names of layers to (weight bits, activation bits)")
    for layer, pair in pinned.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"pinned layer {layer!r} has {_shown(pair)}; it must be a pair of integers (weight bits, activation bits): "
                "1 to 8, 16, or None for float"
            )


def check_target(target: Any) -> None:
    """Raise TypeError, in one sentence, for what is neither a name nor a hardware target."""
    if not isinstance(target, str) and (isinstance(target, type) or not hasattr(target, "cost_table")):
        raise TypeError(f"target is {_shown(target)}; it must be a name, such as 'edge', or a hardware target")


def check_quantization(correction: Any, rounding: Any) -> None:
    """Raise ValueError, naming what is accepted, for a correction or rounding of weights that every policy can't have."""
    if correction not in (None, *CORRECTIONS):
        raise ValueError(f"unknown correction {correction!r}; it can be {', '.join(map(repr, CORRECTIONS))}, or None")
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; it can be {', '.join(map(repr, ROUNDINGS))}")


def check_residuals(residuals: Any) -> int | None:
    """Return the bits of what additions and average pools take, None for float. Raises ValueError for any other width."""
    if residuals in (None, "float"):
        return None
    if isinstance(residuals, bool) or str(residuals) != str(Q.MAX_BITS):
        raise ValueError(f"residuals is {residuals!r}; it can be {Q.MAX_BITS}, or 'float', which None is too")
    return Q.MAX_BITS


def _check_network(network: nn.Module) -> None:
    """Raise ValueError for a network that is compiled, or not made of numbers in float32."""
    for name, module in network.named_modules():
        called = "the network"
        if name:
            called = f"the network's part {name!r}"
        if hasattr(module, "_orig_mod") or (not name and isinstance(module, torch.jit.ScriptModule)):
            raise ValueError(f"{called} is compiled (torch.compile or torch.jit): give the module that it was made of")
        for parameter in module.parameters(recurse=False):
            if is_lazy(parameter) or parameter.is_meta:
                raise ValueError(f"{called} has parameters without numbers: run it on some images, and train it, first")
            if isinstance(module, QUANTIZABLE) and parameter.dtype in CONVERTED:
                raise ValueError(f"{called} is of type {parameter.dtype}; it must be of torch.float32: call network.float()")


def check_alike(calibrate: list[Tensor], inputs: Tensor) -> None:
    """Check that what scales are calibrated with is of the kind that policies are judged on.

    Args:
        calibrate: Batches of inputs; other heights, widths or lengths are fine.
        inputs: Those of `search`.

    Raises:
        ValueError: Naming both shapes, if single inputs were given for batches of them, or otherwise other dimensions.
    """
    for part in calibrate:
        if part.dim() != inputs.dim():
            raise ValueError(
                f"`calibrate` gave inputs of shape {tuple(part.shape)}, and `search` of {tuple(inputs.shape)}; both must be "
                "batches of the same kind of inputs"
            )


def read_batches(data: Batches, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Read all there is into memory.

    Args:
        data: A tensor of inputs; a pair of tensors, inputs and labels; a Dataset of single inputs or of pairs
            (input, label); a DataLoader, or another iterable, of batches of inputs or of (inputs, labels). NumPy arrays are
            as good as tensors. Floats of other types become float32.
        name: What the data are called in messages.

    Returns:
        Batches: inputs of shape (images, ...), and labels, of any kind, or None.

    Raises:
        TypeError: For something that gives no batches.
        ValueError: If there is nothing in it, or something that is neither inputs nor (inputs, labels), or inputs that are
            not of one type and shape.
    """
    batches = [(_as_float32(inputs), labels) for inputs, labels in _batches_of(data, name)]
    if not batches:
        raise ValueError(f"`{name}` gave no images")
    first = batches[0][0]
    for number, (inputs, _) in enumerate(batches, 1):
        if inputs.dtype not in ACCEPTED or not inputs.dim():
            raise ValueError(
                f"`{name}` gave inputs of type {inputs.dtype} and shape {tuple(inputs.shape)}; they must be torch.float32, as "
                "the network takes them (scaled and normalised), of shape (images, ...)"
            )
        if inputs.dtype != first.dtype or inputs.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"`{name}` gave inputs of shape {tuple(first.shape)} and type {first.dtype} first, and in batch {number} of "
                f"{tuple(inputs.shape)} and {inputs.dtype}; all must be alike"
            )
    return batches


class Owned(list[Any]):
    """Batches of inputs, as the network takes them, that nobody else changes: they need no copy."""


def gathered(data: Any, name: str, memory: str | int | None = None) -> Any:
    """Read what isn't in memory into it, if it fits.

    Data sets and loaders that shuffle are read in the order of the data set.

    Args:
        data: Whatever a user has; see `read_batches`.
        name: What the data are called in messages.
        memory: How many bytes they may take, or an amount such as "4GB"; None: a quarter of the machine's.

    Returns:
        What is in memory as it is; batches that were read, if they fit; otherwise samples that are streamed.

    Raises:
        TypeError: For something that gives no samples.
        ValueError: If there is nothing in it, or something else each time, and for what can be read once only and doesn't fit.
    """
    if isinstance(data, (Samples, Mapping, tuple)) or _is_array(data):
        return data
    if isinstance(data, list) and not gives_samples(data):
        return data
    most = allowed_bytes(memory, "`memory`")
    if isinstance(data, Split):
        source = data.source
    else:
        source = source_of(data, f"`{name}`", most)
    if not source.is_kept or source.nbytes * COPIES > most:
        return StreamedSamples(source, functools.partial(_converted, name=name))
    if isinstance(source, Stream):
        return list(source)
    return list(source.batches(torch.arange(source.count).split(source.size)))


def gathered_calibration(data: Any, name: str, memory: str | int | None = None) -> Any:
    """Read the samples that scales are calibrated with into memory; see `gathered`.

    Args:
        data: Whatever a user has.
        name: What the data are called in messages.
        memory: How many bytes they may take, or an amount; None: a quarter of the machine's.

    Returns:
        What is in memory as it is, or batches that were read.

    Raises:
        ValueError: If they don't fit.
    """
    found = gathered(data, name, memory)
    if isinstance(found, StreamedSamples):
        raise ValueError(
            f"`{name}` gives {found.count:,} samples, too many for the memory that they may take: a few hundred are enough, "
            "such as torch.utils.data.Subset(dataset, range(512))"
        )
    return found


def _converted(batch: Any, name: str) -> Any:
    """Return a batch with floats of other types as float32. Raises ValueError for images that nobody has scaled."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor) and inputs.dtype not in (*ACCEPTED, *CONVERTED):
        raise ValueError(
            f"`{name}` gave inputs of type {inputs.dtype} and shape {tuple(inputs.shape)}; they must be torch.float32, as "
            "the network takes them (scaled and normalised), of shape (images, ...)"
        )
    return map_tensors(batch, _as_float32)


def read_any(data: Any, name: str) -> list[Any] | None:
    """List the batches of whatever a user has, of any structure, as they come.

    Args:
        data: See `read_batches`; entries of a batch may be of any structure. A mapping is one batch.
        name: What the data are called in messages.

    Returns:
        The batches; None for what is one batch of tensors, a tensor or a pair of them.

    Raises:
        TypeError: For something that gives no batches.
        ValueError: If there is nothing in it.
    """
    if _is_array(data) or (isinstance(data, tuple) and len(data) == 2 and all(map(_is_array, data))):
        return None
    if isinstance(data, Mapping) or (isinstance(data, tuple) and len(data) == 2):
        return [data]
    batches = _iterated(data, name)
    # Copies: some loaders fill the same memory again with every batch.
    found = [map_tensors(batch, torch.clone) for batch in batches]
    if not found:
        raise ValueError(f"`{name}` gave no images")
    for batch in found:
        if not leaves(inputs_of(batch)):
            kind = type(batch).__name__
            raise ValueError(f"`{name}` gave a {kind}; it must give tensors of inputs, or pairs (inputs, labels) of tensors")
    return found


def read_inputs(data: Batches, name: str) -> list[Tensor]:
    """Read batches of inputs, without their labels; see `read_batches`."""
    return [inputs for inputs, _ in read_batches(data, name)]


def read_tensors(data: Batches, name: str, with_labels: bool) -> tuple[Tensor, Tensor | None]:
    """Read all inputs as one tensor, and their labels as another.

    Args:
        data: See `read_batches`.
        name: What the data are called in messages.
        with_labels: Whether labels play a part; otherwise they are left out.

    Returns:
        Inputs of shape (images, ...), and labels of shape (images,) or None.

    Raises:
        ValueError: If there is nothing in it, if labels are missing, or if they are not as many as the inputs.
    """
    batches = read_batches(data, name)
    if with_labels:
        batches = [(part, _checked_labels(labels, name)) for part, labels in batches]
    inputs = batches[0][0]
    if len(batches) > 1:
        inputs = torch.cat([part for part, _ in batches])
    if not len(inputs):
        raise ValueError(f"`{name}` gave no images")
    if not with_labels:
        return inputs, None
    for number, (part, labels) in enumerate(batches, 1):
        assert labels is not None
        if len(part) != len(labels):
            raise ValueError(
                f"`{name}` needs as many images as labels, at least one; got {len(part)} and {len(labels)} in batch {number} "
                f"of {len(batches)}"
            )
    return inputs, torch.cat([labels for _, labels in batches if labels is not None])


def _checked_labels(labels: Tensor | None, name: str) -> Tensor:
    """Return labels as int64. Raises ValueError unless there are some, class numbers of shape (images,)."""
    if labels is None:
        raise ValueError(f'`{name}` has no labels to tell the accuracy by: give (inputs, labels), or objective="agreement"')
    return class_numbers(labels, f"`{name}`")


def _as_float32(inputs: Tensor) -> Tensor:
    """Convert floats of another type."""
    if inputs.dtype in CONVERTED:
        return inputs.float()
    return inputs


def _batches_of(data: Any, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Take apart whatever a user has."""
    if _is_array(data):
        return [(_tensor_of(data, name), None)]
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_array, data)):
        inputs, labels = _pair(data, name)
        if labels is not None and labels.is_floating_point() and labels.dim() > 1 and labels.shape[1:] == inputs.shape[1:]:
            raise ValueError(
                f"`{name}` is a pair of two batches of inputs, where a pair is (inputs, labels): give batches as a list"
            )
        return [(inputs, labels)]
    batches = _iterated(data, name)
    # Copies: some loaders fill the same memory again with every batch.
    return [_copied(*_pair(batch, name)) for batch in batches]


def _iterated(data: Any, name: str) -> Iterator[Any]:
    """Go through the batches of whatever a user has. Raises TypeError for what gives none."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, BATCH, collate_fn=functools.partial(_collated, name=name))
    try:
        return iter(data)
    except TypeError as error:
        raise TypeError(
            f"`{name}` is {_shown(data)}; it must be a tensor, a pair (inputs, labels) of tensors, a Dataset, a DataLoader, "
            "or an iterable of batches"
        ) from error


def _collated(samples: list[Any], name: str) -> Any:
    """Put images together. Raises ValueError for those that make no batch."""
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`{name}` is a Dataset whose entries make no batch ({reason}); they must be tensors or arrays of one shape"
        ) from error


def _copied(inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if labels is None:
        return inputs.clone(), None
    return inputs.clone(), labels.clone()


def _pair(batch: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Take one batch apart."""
    if _is_array(batch):
        return _tensor_of(batch, name), None
    if isinstance(batch, (tuple, list)) and batch and _is_array(batch[0]):
        labels = None
        if len(batch) > 1 and batch[1] is not None:
            try:
                labels = torch.as_tensor(native(batch[1]))
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(batch[1]).__name__
                raise ValueError(f"`{name}` gave a {kind} as labels; they must be a tensor of class numbers") from error
            labels = check_dense(labels, name)
        return _tensor_of(batch[0], name), labels
    kind = type(batch).__name__
    raise ValueError(f"`{name}` gave a {kind}; it must give tensors of inputs, or pairs (inputs, labels) of tensors")


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _tensor_of(array: Any, name: str) -> Tensor:
    """Make a tensor of an array. Raises ValueError for one that holds no numbers, or none in memory."""
    try:
        tensor = torch.as_tensor(native(array))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` gave an array of type {array.dtype}; it must be one of float32") from error
    return check_dense(tensor, name)


def check_dense(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor.

    Args:
        tensor: The tensor.
        name: What the data are called in messages.

    Raises:
        ValueError: For one that isn't whole and in memory.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise ValueError(f"`{name}` gave a sparse, nested or meta tensor; it must be a dense one, with its numbers in memory")
    return tensor


def _is_pair(value: Any) -> bool:
    """Say whether a value is two whole numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(part, Integral) and not isinstance(part, bool) for part in value)


def _shown(value: Any) -> str:
    """Show a value on one line, in few words."""
    words = " ".join(repr(value).split())
    if len(words) > 60:
        return f"a {type(value).__name__}"
    return words
