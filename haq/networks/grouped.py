"""Networks in files whose convolutions learned their groups, or that lost residual blocks: the layers that follow from it.

A file tells the groups of every such convolution in its header, under "groupings": {layer: [groups, inputs, outputs]}, which
is how many there are, the group of each input channel, and that of each filter. Under "removed_blocks": {block: relu} it tells
the blocks that are gone, and whether a ReLU is in their place.
"""

from __future__ import annotations

import json

from torch import nn

from haq.store.files import kind_of, quoted
from quantizers.pruning import Grouping, group_convolutions, learned_groups, remove_blocks, removed_blocks

GROUPINGS, BLOCKS = "groupings", "removed_blocks"  # keys of the header
MOST_LAYERS = 10_000
MOST_CHANNELS = 2**20  # of a network, counted on both sides of every layer


def structure_notes(network: nn.Module) -> dict[str, str]:
    """Return what a header says of groups that convolutions run in, and of blocks that are gone; nothing where neither is."""
    notes = {}
    blocks = removed_blocks(network)
    if blocks:
        notes[BLOCKS] = json.dumps(blocks)
    content = {name: [one.groups, list(one.inputs), list(one.outputs)] for name, one in learned_groups(network).items()}
    if content:
        notes[GROUPINGS] = json.dumps(content)
    return notes


def read_groupings(text: str) -> dict[str, Grouping]:
    """Read what a header says of groups.

    Args:
        text: The note, from anywhere; how long it is is bounded by whoever reads the file.

    Returns:
        The groups of every convolution, by name.

    Raises:
        ValueError: In a sentence, for anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its groups of convolutions are no JSON") from error
    if not isinstance(content, dict) or not 0 < len(content) <= MOST_LAYERS:
        raise ValueError(f"its groups of convolutions are {kind_of(content)}, where groups by layer are wanted")
    found = {}
    channels = 0
    for name, entry in content.items():
        if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(part, list) for part in entry[1:]):
            raise ValueError(f"its groups of layer {quoted(name)} are {quoted(entry)}; a number and two lists are wanted")
        groups, inputs, outputs = entry
        channels += len(inputs) + len(outputs)
        if channels > MOST_CHANNELS:
            raise ValueError(f"its groups are of more than {MOST_CHANNELS:,} channels")
        if type(groups) is int and groups > MOST_CHANNELS:
            raise ValueError(f"layer {quoted(name)} has {groups:,} groups, at most {MOST_CHANNELS:,} are read")
        try:
            found[name] = Grouping(groups, tuple(inputs), tuple(outputs))
        except ValueError as error:
            raise ValueError(f"layer {quoted(name)}: {error}") from error
    return found


def read_blocks(text: str) -> dict[str, bool]:
    """Read what a header says of blocks that are gone.

    Args:
        text: The note, from anywhere; how long it is is bounded by whoever reads the file.

    Returns:
        By name of the block whether a ReLU is in its place.

    Raises:
        ValueError: In a sentence, for anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its blocks that are gone are no JSON") from error
    if not isinstance(content, dict) or not 0 < len(content) <= MOST_LAYERS:
        raise ValueError(f"its blocks that are gone are {kind_of(content)}, where true or false by block is wanted")
    for name, relu in content.items():
        if not isinstance(relu, bool):
            raise ValueError(f"its block {quoted(name)} that is gone is {quoted(relu)}; true or false is wanted")
    return content


def without_blocks(module: nn.Module, blocks: dict[str, bool]) -> nn.Module:
    """Make a copy of a float network without the blocks that a file says are gone.

    Args:
        module: The float network, which stays as it is. One that lost these blocks already is returned itself.
        blocks: The blocks, as `read_blocks` returns them.

    Returns:
        The network.

    Raises:
        ValueError: In a sentence, for blocks that this network doesn't have.
    """
    if removed_blocks(module) == blocks:
        return module
    return remove_blocks(module, blocks)


def regrouped(module: nn.Module, groupings: dict[str, Grouping]) -> nn.Module:
    """Make a copy of a float network whose convolutions run in the groups that a file tells.

    Args:
        module: The float network, which stays as it is. One that runs in these groups already is returned itself.
        groupings: The groups.

    Returns:
        The network, whose weights are those of the dense convolutions within groups.

    Raises:
        ValueError: In a sentence, for groups that aren't of this network.
    """
    if learned_groups(module) == groupings:
        return module
    return group_convolutions(module, groupings)
