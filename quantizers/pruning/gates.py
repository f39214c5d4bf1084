"""What the loss of each sample says about each channel: its derivative by a gate that multiplies the channel.

A gate stands where a channel is read, and is 1: at 0 the channel is removed. By the chain rule the derivative is the sum over
everything that reads the channel of gradient times activation; without a bias that is gradient times weight, summed over the
filter that writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quantizers.batches import BATCH, Batches, batches_of, called, copied, prepared
from quantizers.calling import Forward, count_of, device_of, inputs_of, samples, targets_of, to_device
from quantizers.copying import evaluating
from quantizers.pruning.channels import IN, ChannelGroup, ChannelGroups
from quantizers.pruning.layers import has_one_input_per_group


@torch.inference_mode(False)
@torch.enable_grad()
def gate_gradients(
    network: nn.Module,
    groups: ChannelGroups,
    batches: Batches,
    loss: Callable[[Any, Any], Tensor],
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Compute for every sample the derivative of its loss by the gate of every channel.

    The network is in evaluation mode meanwhile, so that no sample's loss depends on another. Batches without targets get the
    network's own answers, the class with the highest output: the divergence from its own outputs has no gradient, but how
    sure it is of its answers has.

    Args:
        network: The network.
        groups: Its groups of channels.
        batches: Inputs, or pairs of inputs and targets.
        loss: Function of outputs and targets: the mean over samples.
        forward: What runs the network on a batch, as in `quantize`.

    Returns:
        By the group's name a tensor of shape (samples, channels), float64 on the CPU, in units of the loss.

    Raises:
        ValueError: For no samples; naming the layer, for one whose inputs can't be told apart by sample; for a loss that isn't
            one finite number that depends on the network; for outputs without targets that aren't of classes.
    """
    readers = {group.name: gated_layers(network, group) for group in groups.groups}
    names = list(dict.fromkeys(name for found in readers.values() for name in found))
    made: dict[str, list[Tensor]] = {group.name: [] for group in groups.groups}
    with evaluating(network):
        for part, targets, count in _parts(network, batches, forward):
            by_layer = _of_part(network, names, part, targets, count, loss, forward)
            for group in groups.groups:
                made[group.name].append(_of_group(group, readers[group.name], by_layer, count))
    if not any(made.values()):
        raise ValueError("the criterion needs at least one sample; the batches gave none")
    return {name: torch.cat(parts) for name, parts in made.items()}


def gated_layers(network: nn.Module, group: ChannelGroup) -> tuple[str, ...]:
    """Return the names of the layers at whose inputs the gates of a group stand.

    A depthwise convolution hands on each channel to whoever reads it next, where the gate stands already.
    """
    modules = dict(network.named_modules())
    found = []
    for member in group.members:
        module = modules.get(member.module)
        if member.dim != IN or not isinstance(module, _ConvNd | nn.Linear):
            continue
        if not (isinstance(module, _ConvNd) and has_one_input_per_group(module)):
            found.append(member.module)
    return tuple(found)


def _parts(network: nn.Module, batches: Batches, forward: Forward | None) -> Iterator[tuple[Any, Any, int]]:
    """Go through inputs, targets and number of samples of parts that are small enough to keep all activations."""
    for batch in batches_of(batches, network):
        part = prepared(batch, network, forward)
        targets = to_device(targets_of(batch, network), device_of(network))
        given = part
        if forward is not None:
            given = inputs_of(part, network)
        count = count_of(given)
        for begin in range(0, count, BATCH):
            end = min(begin + BATCH, count)
            yield samples(part, count, begin, end), samples(targets, count, begin, end), end - begin


def _of_part(
    network: nn.Module,
    names: Sequence[str],
    part: Any,
    targets: Any,
    count: int,
    loss: Callable[[Any, Any], Tensor],
    forward: Forward | None,
) -> dict[str, Tensor]:
    """Return by the layer's name the derivative by a gate at each position of its input channels: (samples, positions)."""
    with _gates(network, names) as gates:
        outputs = called(network, copied(part), forward)
        if targets is None:
            targets = own_answers(outputs)
        value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
            raise ValueError("the loss must be one finite number: the mean over samples")
        flat = [(name, gate) for name, made in gates.items() for gate in made]
        if not flat or not value.requires_grad:
            raise ValueError("the loss doesn't depend on any channel: no gradient reaches the network")
        # The sum over samples: each sample's gates see the gradient of its own loss.
        found = torch.autograd.grad(value.sum() * count, [gate for _, gate in flat], allow_unused=True)
    made: dict[str, Tensor] = {}
    for (name, gate), gradient in zip(flat, found, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(gate)
        if len(gradient) % count:
            raise ValueError(f"the inputs of layer {name!r} can't be told apart by sample: {len(gradient)} of {count} samples")
        gradient = gradient.flatten(1).unflatten(0, (count, -1)).sum(1).double().cpu()
        made[name] = made.get(name, 0) + gradient
    return made


@contextmanager
def _gates(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Multiply what some layers read by gates, for every row of a batch and every input channel; all of them are 1."""
    gates: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def multiply(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x = given[0]
            shape = [1] * x.dim()
            shape[0] = x.shape[0]
            channel = -1
            if isinstance(layer, _ConvNd):
                channel = 1
            shape[channel] = x.shape[channel]
            gate = torch.ones(shape, dtype=x.dtype, device=x.device, requires_grad=True)
            gates[name].append(gate)
            return (x * gate, *given[1:])

        return multiply

    handles = [network.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _of_group(group: ChannelGroup, readers: Sequence[str], by_layer: dict[str, Tensor], count: int) -> Tensor:
    """Sum derivatives over all places of each channel of a group: (samples, channels)."""
    total = torch.zeros(count, group.channels, dtype=torch.float64)
    for member in group.members:
        if member.dim == IN and member.module in readers and member.module in by_layer:
            total += by_layer[member.module][:, torch.from_numpy(member.positions)].sum(2)
    return total


def own_answers(outputs: Any) -> Tensor:
    """Return the class of the highest output, of each sample (and place), as labels.

    Raises:
        ValueError: For outputs that aren't one tensor with a dimension of classes behind that of samples.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.dim() < 2:
        raise ValueError("the batches have no targets, and the outputs are no scores of classes: give pairs (inputs, targets)")
    return outputs.detach().argmax(1)
