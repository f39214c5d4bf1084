"""Makes ONNX files small: short names, and nothing said that runtimes know without it.

What names and attributes take doesn't matter in a large network, and is half the file of a small one.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INPUT = ":input"  # ends the names of tensors that enter layers
SHORT = re.compile(r"~(\d+)(@\d+)?")  # what they are called in a small file: the layer's number, and the call
LETTERS = string.ascii_letters
NAMED_SHARE = 0.01  # of a file: what names and the like may take
# Attributes by operator that need not be written where all their numbers are the usual one; None: they follow from others.
USUAL: Mapping[str, Mapping[str, int | None]] = {
    "Conv": {"kernel_shape": None, "strides": 1, "pads": 0, "dilations": 1, "group": 1},
    "MaxPool": {"strides": 1, "pads": 0, "dilations": 1},
    "AveragePool": {"strides": 1, "pads": 0},
}


def compacted(model: Any, layers: Sequence[str]) -> Any:
    """Make the names in a model short, if they are much of it.

    Args:
        model: onnx's ModelProto.
        layers: The names of the network's layers; those of the tensors that enter them become their numbers, for `layer_call`.

    Returns:
        The model, or the small one.
    """
    small = type(model)()
    small.CopyFrom(model)
    _leave_out_attributes(small)
    _rename(small, layers)
    if model.ByteSize() - small.ByteSize() <= NAMED_SHARE * model.ByteSize():
        return model
    return small


def layer_call(tensor: str, layers: Sequence[str]) -> str | None:
    """Return whose input a tensor is: the name of a layer, with @2 at its second call; None if it is none's."""
    if tensor.endswith(INPUT):
        return tensor.removesuffix(INPUT)
    found = SHORT.fullmatch(tensor)
    if found is None or int(found[1]) >= len(layers):
        return None
    return layers[int(found[1])] + (found[2] or "")


def _leave_out_attributes(model: Any) -> None:
    for node in model.graph.node:
        node.ClearField("name")
        usual = USUAL.get(node.op_type, {})
        for attribute in list(node.attribute):
            if attribute.name not in usual:
                continue
            numbers = set(attribute.ints) | ({attribute.i} if attribute.type == attribute.INT else set())
            if usual[attribute.name] is None or numbers == {usual[attribute.name]}:
                node.attribute.remove(attribute)


def _rename(model: Any, layers: Sequence[str]) -> None:
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    uses: Counter[str] = Counter()
    for node in graph.node:
        uses.update(node.input)
        uses.update(node.output)
    numbers = {name: number for number, name in enumerate(layers)}
    names = {name: name for name in kept}
    for name in uses:
        layer, call = name.removesuffix(INPUT), ""
        if layer not in numbers:
            layer, _, call = layer.rpartition("@")
        if name.endswith(INPUT) and layer in numbers:
            names[name] = f"~{numbers[layer]}"
            if call:
                names[name] = f"{names[name]}@{call}"
    fresh = _short_names(kept)
    for name, _ in uses.most_common():
        if name not in names:
            names[name] = next(fresh)
    for node in graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _short_names(taken: set[str]) -> Iterator[str]:
    """Go through names of letters, the shortest first."""
    for length in itertools.count(1):
        for letters in itertools.product(LETTERS, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name
