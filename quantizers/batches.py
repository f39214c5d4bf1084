"""Batches that a network is run over: of any form and structure, in parts whose activations take bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from quantizers.calling import (
    Forward,
    as_tensors,
    call,
    count_of,
    device_of,
    first_sample,
    inputs_of,
    leaves,
    map_tensors,
    samples,
    takes,
    to_device,
)
from quantizers.copying import evaluating

BATCH = 64  # samples of a Dataset that are put together
# What the inputs and outputs of one module may take at a time. What looks at a layer's input takes about
# as much once more.
MOST_BYTES = 1 << 28
FEW_VALUES = 1 << 14  # of inputs, for which nobody asks what their activations take
SAME = 1e-3  # of the outputs' size: what a sample's outputs may differ by with another one beside it

Batches = Iterable[Any] | Tensor
ACCEPTED = "give a tensor of inputs (N, ...), or an iterable of such tensors or of pairs (inputs, labels)"


def batches_of(calibrate: Any, network: nn.Module) -> Iterable[Any]:
    """Return what to go through: batches, as `quantizers.calling` says what these are.

    Args:
        calibrate: One tensor, a pair (inputs, labels), a mapping of the network's arguments by name, or a
            tuple of all its arguments, if it has several: one batch. A Dataset, or an iterable of batches.
        network: What they are for.

    Returns:
        The batches.

    Raises:
        ValueError: For what is none of these.
    """
    if isinstance(calibrate, Tensor) or _is_pair(calibrate):
        return [calibrate]
    if isinstance(calibrate, tuple) and _are_arguments(calibrate, network):
        return [(calibrate,)]
    if isinstance(calibrate, Mapping) and takes(network, (), inputs_of(calibrate, network)):
        return [calibrate]
    if isinstance(calibrate, Dataset) and not isinstance(calibrate, IterableDataset):
        return DataLoader(calibrate, BATCH, collate_fn=_put_together)
    if isinstance(calibrate, str | bytes | Mapping | np.ndarray) or not _is_iterable(calibrate):
        raise ValueError(f"`calibrate` is {described(calibrate)}; {ACCEPTED}")
    iterable: Iterable[Any] = calibrate
    return iterable


def _is_pair(calibrate: Any) -> bool:
    """Say whether this is inputs and their labels, which have fewer dimensions, and not two batches of inputs."""
    if not isinstance(calibrate, list | tuple) or len(calibrate) != 2:
        return False
    inputs, labels = calibrate
    if not isinstance(labels, Tensor) or not labels.dim() or not isinstance(inputs, Tensor | Mapping | tuple):
        return False
    tensors = leaves(inputs)
    if not tensors or count_of(inputs) != len(labels):
        return False
    return not isinstance(inputs, Tensor) or labels.dim() < inputs.dim()


def _are_arguments(calibrate: tuple[Any, ...], network: nn.Module) -> bool:
    """Say whether these are the arguments of a network that can't be called with the first of them alone."""
    if not all(isinstance(one, Tensor) for one in calibrate):
        return False
    return not takes(network, calibrate[:1], {}) and takes(network, calibrate, {})


def _put_together(items: list[Any]) -> Any:
    """Make a batch of a Dataset's items: what can't be stacked, such as images of different sizes, is listed."""
    try:
        return default_collate(items)
    except (RuntimeError, TypeError):
        pass
    if isinstance(items[0], list | tuple):
        return tuple(list(parts) for parts in zip(*items, strict=True))
    return (items,)


def _is_iterable(value: Any) -> bool:
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def described(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of type {value.dtype} and shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


def _described_parts(value: Any) -> str:
    """Return what inputs of any structure are, in words."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}, first {described(next(iter(value), None))}"
    return described(value)


def prepared(batch: Any, network: nn.Module, forward: Forward | None = None) -> Any:
    """Make of a batch what a network is run on, on its device.

    A network may change its inputs in place, so that it is to be run on copies (`copied`).

    Args:
        batch: What a loader gave.
        network: The network.
        forward: What runs it; it gets the batch as it is. None: `call`, which gets the inputs, of the
            network's floating type.

    Returns:
        The inputs, or the batch.

    Raises:
        ValueError: For what can't be inputs.
    """
    device = device_of(network)
    if forward is not None:
        return to_device(as_tensors(batch), device)
    first = batch
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError(f"`calibrate` gave an empty {type(batch).__name__}; {ACCEPTED}")
        first = batch[0]
    if isinstance(first, np.ndarray | str | bytes):
        raise ValueError(f"`calibrate` gave {described(first)}; {ACCEPTED}")
    kinds = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}

    def taken(value: Tensor) -> Tensor:
        if value.is_floating_point() and len(kinds) == 1:
            return value.to(next(iter(kinds)))
        return value

    return map_tensors(to_device(inputs_of(batch, network), device), taken)


def copied(inputs: Any) -> Any:
    """Copy inputs for one pass: a network may normalise them in place."""
    return map_tensors(inputs, torch.clone)


def called(network: nn.Module, inputs: Any, forward: Forward | None = None) -> Any:
    """Return what a network makes of a batch that is `prepared`.

    Args:
        network: The network.
        inputs: What it is run on.
        forward: What runs it; None: `call`.

    Returns:
        What it returns.

    Raises:
        ValueError: Saying what the inputs are, if it can't take them.
    """
    try:
        return (forward or call)(network, inputs)
    except (ValueError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a network raises for inputs that aren't its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if forward is not None:
            raise ValueError(
                f"`forward` can't run the network on what `calibrate` gave, {_described_parts(inputs)} ({reason})"
            ) from error
        raise ValueError(
            f"the network can't be called with what `calibrate` gave, {_described_parts(inputs)} ({reason}); {ACCEPTED}, "
            "as the network takes them"
        ) from error


def running(forward: Forward | None) -> Forward:
    """Return what runs a network on an example: a tuple of all that is given for `forward`, or for the network itself.

    An example of one part that is a structure is spread as in `call`.
    """

    def run(network: nn.Module, example: Any) -> Any:
        if forward is not None:
            return forward(network, *example)
        if len(example) == 1:
            return call(network, example[0])
        return network(*example)

    return run


def first_of(network: nn.Module, example: Any, run: Forward) -> Any:
    """Return the first sample of an example.

    Args:
        network: The network.
        example: What `run` takes.
        run: Runs the network on it.

    Returns:
        The sample as a batch of one; the whole example if the network can't take that.
    """
    first = first_sample(example, count_of(example))
    try:
        with evaluating(network), torch.no_grad(), torch.random.fork_rng(_devices(network)):
            run(network, copied(first))
    except Exception:  # whatever a network raises for a batch of one
        return example
    return first


def collect(batches: Batches, network: nn.Module, forward: Forward | None = None) -> list[Any]:
    """Return what a network is run on, part after part, to go through it several times.

    Args:
        batches: As in `batches_of`.
        network: The network.
        forward: As in `prepared`.

    Returns:
        The parts (`Parts`) of all batches.

    Raises:
        ValueError: If there are no samples, or for what is no input.
    """
    divider = Parts(network, forward)
    parts: list[Any] = []
    for batch in batches_of(batches, network):
        # Copies: a loader may write over what it gave.
        parts += map(copied, divider.of(prepared(batch, network, forward)))
    if not sum(map(divider.count, parts)):
        raise ValueError("calibration needs at least one image; `calibrate` gave none")
    return parts


class Parts:
    """Divides batches into parts for each of which the inputs and outputs of every module take at most MOST_BYTES.

    How much they take is measured on the first sample alone. A batch that takes no more stays whole. So
    does one of a network that makes something else of a sample where others are beside it, or that can't
    be called with one or two.
    """

    def __init__(self, network: nn.Module, forward: Forward | None = None) -> None:
        """Take a network, and what runs it (as in `called`)."""
        self._network, self._forward = network, forward
        # By the shapes of one sample's tensors: how many samples take MOST_BYTES, 0 if nobody knows; and whether they can be
        # run apart from one another.
        self._sizes: dict[object, int] = {}
        self._independent: dict[object, bool] = {}

    def count(self, batch: Any) -> int:
        """Return how many samples there are in a batch that is `prepared`."""
        if self._forward is not None:
            return count_of(inputs_of(batch, self._network))
        return count_of(batch)

    def of(self, batch: Any) -> Iterator[Any]:
        """Go through the parts of a batch that is `prepared`."""
        count = self.count(batch)
        size = self._size(batch, count)
        if not 0 < size < count:
            yield batch
            return
        for begin in range(0, count, size):
            yield samples(batch, count, begin, begin + size)

    def _size(self, batch: Any, count: int) -> int:
        """Return how many samples a part has; 0: all."""
        if count < 2 or sum(tensor.numel() for tensor in leaves(batch)) <= FEW_VALUES:
            return 0
        first = first_sample(batch, count)
        key = tuple((tensor.shape, tensor.dtype) for tensor in leaves(first))
        # What is drawn at random here is drawn again when it counts.
        with evaluating(self._network), torch.no_grad(), torch.random.fork_rng(_devices(self._network)):
            if key not in self._sizes:
                self._sizes[key] = self._measured(first)
            if not 0 < self._sizes[key] < count:
                return 0
            if key not in self._independent:
                self._independent[key] = self._are_independent(first, samples(batch, count, 0, 2))
        if not self._independent[key]:
            return 0
        return self._sizes[key]

    def _measured(self, first: Any) -> int:
        """Return for how many samples no module's inputs and outputs take more than MOST_BYTES."""
        most = 1

        def look(module: nn.Module, given: Any, named: Any, output: Any) -> None:
            nonlocal most
            if next(module.children(), None) is None:
                most = max(most, sum(tensor.nbytes for tensor in leaves((given, named, output))))

        handles = [module.register_forward_hook(look, with_kwargs=True) for module in self._network.modules()]
        try:
            self._run(first)
        except Exception:  # a network that takes no batch of one; what is wrong besides is said where all are given
            return 0
        finally:
            for handle in handles:
                handle.remove()
        return max(1, MOST_BYTES // most)

    def _are_independent(self, first: Any, two: Any) -> bool:
        """Say whether a network makes the same of the first of two samples whether it is alone or not."""
        try:
            alone = leaves(self._run(first))
            both = leaves(first_sample(self._run(two), 2))
        except Exception:
            return False
        if [one.shape for one in alone] != [other.shape for other in both]:
            return False
        # One number for all samples, such as a loss, says nothing.
        pairs = [(one, other) for one, other in zip(alone, both, strict=True) if one.dim() and one.numel()]
        return bool(pairs) and all(_are_close(one, other) for one, other in pairs)

    def _run(self, batch: Any) -> Any:
        return (self._forward or call)(self._network, copied(batch))


def _are_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=SAME, atol=SAME * float(one.abs().max()), equal_nan=True)


def _devices(network: nn.Module) -> list[torch.device]:
    """Return the devices besides the CPU whose random numbers a network may draw."""
    device = device_of(network)
    if device.type == "cuda":
        return [device]
    return []
