"""Residual blocks whose branch can be left out as a whole: which they are, and networks without them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.calling import Forward, call
from quantizers.copying import copy_network
from quantizers.policy import QUANTIZABLE

RECORD = "_removed_blocks"  # the attribute of a network that says which blocks it lost
LAST = (*QUANTIZABLE, _BatchNorm)  # what a branch may end with: its output can be scaled by its weights


@dataclass(frozen=True)
class ResidualBlock:
    """A module that is act(x + f(x)).

    Attributes:
        last: The dotted name of the layer that the branch f ends with; where that gives zeros, f does.
        relu: Whether a ReLU is behind the sum.
    """

    last: str
    relu: bool


@torch.no_grad()
def residual_blocks(network: nn.Module, example: Any, *, forward: Forward | None = None) -> dict[str, ResidualBlock]:
    """Find the modules of a network that are nothing (or a ReLU) once the layer that their branch ends with gives zeros.

    It is tried out: a module that gives back what it is given, for its own input and for another one, is such a block.

    Args:
        network: A float network; it is left alone.
        example: Inputs that it takes.
        forward: `forward(network, example)` runs the network; None: it is called with the example.

    Returns:
        The blocks by name, in the order of the network's modules.
    """
    made = copy_network(network).eval()
    inputs: dict[str, list[Tensor]] = {}
    order: list[str] = []
    handles = []
    for name, module in made.named_modules():

        def note(module: nn.Module, given: tuple[Any, ...], output: Any, name: str = name) -> None:
            order.append(name)
            is_of_tensors = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
            if is_of_tensors and given[0].shape == output.shape:
                inputs.setdefault(name, []).append(given[0].clone())

        handles.append(module.register_forward_hook(note))
    if forward is None:
        call(made, copy.deepcopy(example))
    else:
        forward(made, copy.deepcopy(example))
    for handle in handles:
        handle.remove()
    found = {}
    for name, given in inputs.items():
        block = _block(made, name, order, given)
        if block is not None:
            found[name] = block
    return {name: found[name] for name, _ in network.named_modules() if name in found}


def _block(network: nn.Module, name: str, order: list[str], given: list[Tensor]) -> ResidualBlock | None:
    """Say whether a module, which was called with some inputs, is a residual block, and by which layer."""
    module = network.get_submodule(name)
    if not name or len(given) != 1 or not any(isinstance(layer, QUANTIZABLE) for layer in module.modules()):
        return None
    inside = [other for other in order if other.startswith(f"{name}.")]
    layers = [other for other in inside if isinstance(network.get_submodule(other), LAST)]
    if not layers or order.count(layers[-1]) != 1:
        return None
    last = network.get_submodule(layers[-1])
    if last.weight is None:
        return None
    handle = last.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(given[0].shape, generator=generator).to(given[0])
        pairs = [(x, module(x.clone())) for x in (given[0], other)]
    finally:
        handle.remove()
    if all(torch.equal(x, output) for x, output in pairs):
        return ResidualBlock(layers[-1], False)
    if all(torch.equal(x.relu(), output) for x, output in pairs):
        return ResidualBlock(layers[-1], True)
    return None


def remove_blocks(network: nn.Module, blocks: Mapping[str, bool]) -> nn.Module:
    """Make a copy of a network without some residual blocks.

    Args:
        network: The network; it is left alone.
        blocks: By name of the block whether a ReLU takes its place (`ResidualBlock.relu`), or nothing.

    Returns:
        The copy, which knows what it lost (`removed_blocks`).

    Raises:
        ValueError: For a block that isn't there.
    """
    made = copy_network(network)
    names = {name for name, _ in made.named_modules()}
    for name, relu in blocks.items():
        if not name or name not in names:
            raise ValueError(f"the network has no block {name!r} that could be removed")
        parent, _, child = name.rpartition(".")
        place = nn.Identity()
        if relu:
            place = nn.ReLU()  # type: ignore[assignment]
        setattr(made.get_submodule(parent), child, place.train(made.training))
    setattr(made, RECORD, removed_blocks(network) | dict(blocks))
    return made


def removed_blocks(network: nn.Module) -> dict[str, bool]:
    """Return which blocks were removed from a network, and whether a ReLU took their place; copies know it too."""
    return dict(getattr(network, RECORD, {}))


@torch.no_grad()
def scale_output(layers: Iterable[nn.Module], factor: Tensor) -> None:
    """Multiply what layers give by a number, which becomes part of their weights and biases.

    Args:
        layers: Norms, convolutions or linear layers.
        factor: A tensor of one value.
    """
    for layer in layers:
        for tensor in (layer.weight, layer.bias):
            if isinstance(tensor, Tensor):
                tensor.mul_(factor)
