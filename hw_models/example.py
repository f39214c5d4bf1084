"""Examples of any structure that a network is traced on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Forward = Callable[..., Any]  # (network, *example) -> outputs


def run(network: nn.Module, example: tuple[Any, ...], forward: Forward | None) -> Any:
    """Run a network on an example.

    Args:
        network: The network.
        example: Its inputs. A tuple or mapping alone is spread over the arguments, by their places or
            names, where the signature of the network's `forward` has room for that.
        forward: `forward(network, *example)` runs the network; None: it is called with the example.

    Returns:
        What comes back.
    """
    if forward is not None:
        return forward(network, *example)
    if len(example) != 1:
        return network(*example)
    (only,) = example
    if isinstance(only, Mapping) and all(isinstance(name, str) for name in only) and _takes(network, (), only):
        return network(**only)
    if isinstance(only, tuple) and _takes(network, only, {}):
        return network(*only)
    return network(only)


def _takes(network: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def first_of_lists(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return an example with the first sample alone of inputs that are a list of samples."""
    made = []
    for part in example:
        if isinstance(part, list):
            part = part[:1]
        made.append(part)
    return tuple(made)


def batch_of(example: tuple[Any, ...]) -> int:
    """Return how many samples an example has: the first dimension of its first tensor; 1 for a list of one; 0 for none."""
    if example and isinstance(example[0], list):
        return len(example[0])
    found = tensors(example)
    if not found or not found[0].dim():
        return 0
    return len(found[0])


def tensors(structure: Any) -> list[Tensor]:
    """Return the tensors in a structure of tuples, lists, mappings and dataclasses, in order; arrays of numbers too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(structure):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "?biufc":
            found.append(torch.as_tensor(leaf))
        elif isinstance(leaf, Mapping):
            found += tensors(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found
