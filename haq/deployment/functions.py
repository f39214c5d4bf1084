"""Functions of each value that a network writes out, as x * sigmoid(x), are found and become one of torch's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from haq.deployment.nodes import COMPUTED, Graph, Node, apply_function

# Where functions are compared. Far out, too: one that is clipped there is another one.
FAR = torch.tensor([1e2, 1e3, 1e4, 1e6], dtype=torch.float64)
PLACES = torch.cat([-FAR, torch.linspace(-24, 24, 1921, dtype=torch.float64), FAR]).view(1, 1, -1)
CLOSE = 1e-7  # of the value, or of 1: a number that a network has in float32 is that far from its own
# Torch's functions, with their arguments. Those that come first are found first.
KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("silu", {}),
    ("hardswish", {}),
    ("hardsigmoid", {}),
    ("gelu", {"approximate": "none"}),
    ("gelu", {"approximate": "tanh"}),
    ("mish", {}),
    ("sigmoid", {}),
    ("softplus", {}),
)
LONGEST = 8  # operations that a written out function may have


def name_functions(graph: Graph) -> Graph:
    """Put one function in the place of operations that compute it, where nothing else reads what is between.

    Args:
        graph: The graph.

    Returns:
        A graph that computes the same.
    """
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node.name)
    # What each node makes of the values of those before it, by their names.
    curves: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Node] = {}
    for node in graph.nodes:
        curves[node.name] = dict(_curves(node, nodes, curves))
        for name, curve in curves[node.name].items():
            function = _known(curve)
            if function is not None and _between(node, name, nodes, readers) is not None:
                words, arguments = function
                changed = {"inputs": (name,), "kind": "function", "function": words, "arguments": arguments}
                found[node.name] = replace(node, **changed)  # type: ignore[arg-type]
                break
        curves[node.name][node.name] = PLACES
    gone: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in found and node.name not in gone:
            gone |= _between(node, found[node.name].inputs[0], nodes, readers) or set()
        else:
            found.pop(node.name, None)
    return Graph(tuple(found.get(node.name, node) for node in graph.nodes if node.name not in gone))


def _curves(node: Node, nodes: Mapping[str, Node], curves: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Compute what an operation on each value makes of the values of each node before it."""
    if node.kind in ("mul", "add"):
        first, second = node.inputs
        if nodes[first].dims != nodes[second].dims:
            return
        for name in curves[first]:
            if name in curves[second]:
                yield name, COMPUTED[node.kind](node, curves[first][name], curves[second][name])
        return
    if node.kind == "batch_norm":
        assert node.scale is not None
        assert node.shift is not None
        if not ((node.scale == node.scale[0]).all() and (node.shift == node.shift[0]).all()):
            return
        node = replace(node, scale=node.scale[:1], shift=node.shift[:1])
    elif node.kind not in ("function", "relu", "clamp"):
        return
    for name, curve in curves[node.inputs[0]].items():
        yield name, COMPUTED[node.kind](node, curve)


def _known(curve: Tensor) -> tuple[str, dict[str, Any]] | None:
    """Return the function that has this curve."""
    for function, arguments in KNOWN:
        node = Node("", "function", (), (1, 1, 1), function=function, arguments=arguments)
        expected = apply_function(node, PLACES)
        if torch.allclose(curve, expected, rtol=CLOSE, atol=CLOSE):
            return function, arguments
    return None


def _between(node: Node, first: str, nodes: Mapping[str, Node], readers: Mapping[str, list[str]]) -> set[str] | None:
    """Return the operations from one to another, without these two; None where others read them, or for none or too many."""
    names: set[str] = set()
    todo = list(node.inputs)
    while todo:
        name = todo.pop()
        if name != first and name not in names:
            names.add(name)
            todo += nodes[name].inputs
    if not names or len(names) > LONGEST:
        return None
    if any(reader != node.name and reader not in names for name in names for reader in readers[name]):
        return None
    return names
