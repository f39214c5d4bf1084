"""Networks by name, with their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haq import data
from haq.networks import CHECKPOINT_ENDINGS, DEFAULT, is_file, split_name
from haq.networks.building import build, is_own_function
from haq.networks.checkpoint import (
    MOST_CLASSES,
    check_can_be_of,
    float_tensors,
    load_checkpoint,
    load_state,
    read_state,
    restore,
)
from haq.networks.grouped import BLOCKS, GROUPINGS
from haq.networks.network import Network, output_count
from haq.networks.pruned import CHANNELS
from quantizers.calling import leaves
from quantizers.copying import evaluating


def load(name: str = DEFAULT, *, classes: int | None = None, pretrained: bool = True) -> Network:
    """Load a network by name, in evaluation mode, float32.

    Args:
        name: What `haq.networks.NETWORKS` lists: a name, LIBRARY:NAME, module:function, PATH or NAME@PATH.
        classes: The number of outputs, where the weights are random.
        pretrained: Whether it has its weights. False for training from scratch, or to price a network without its weights;
            weights are then random, from torch's current generator.

    Returns:
        The network.

    Raises:
        ValueError: For unknown names, with the close ones, and bad checkpoints.
        FileNotFoundError: For missing weights.
        ImportError: For a library that isn't installed, with the extra to install.
    """
    base, path = split_name(name)
    if base:
        network = _with_weights(base, Path(path), classes)
    elif name.endswith(CHECKPOINT_ENDINGS) or is_file(Path(name)):
        network = load_checkpoint(Path(name))
    else:
        network = build(name, classes, pretrained)
    _check_types(network)
    return network.ordered()


def name_of_checkpoint(network: str, path: Path) -> str:
    """Write how a checkpoint is loaded in any process: by its path, or as NAME@PATH if its network is somebody's own.

    Args:
        network: The name of the network that it is of.
        path: The checkpoint.

    Returns:
        A name for `load` and for --network.
    """
    base = split_name(network)[0] or network
    if is_own_function(base):
        return f"{base}@{path}"
    return str(path)


def path_of_checkpoint(name: str) -> Path | None:
    """Return the file of a name that is PATH or NAME@PATH.

    Args:
        name: The name of a network, as `load` takes it.

    Returns:
        The path; None for a network without a file, or if there is none.
    """
    path = Path(split_name(name)[1])
    if path.is_file():
        return path
    return None


def _with_weights(base: str, path: Path, classes: int | None) -> Network:
    """Build a named network with the weights of a checkpoint or of a plain state dict."""
    tensors, notes = read_state(path)
    if not classes:
        classes = _classes_of(path, float_tensors(tensors), notes)
    state = float_tensors(tensors)
    if not notes.keys().isdisjoint((CHANNELS, GROUPINGS, BLOCKS)):
        return replace(restore(build(base, classes, pretrained=False), path), name=f"{base}@{path}")
    check_can_be_of(path, state, base, classes)
    network = build(base, classes, pretrained=False)
    load_state(network.module, state, path)
    return replace(network, name=f"{base}@{path}", origin=str(path))


def _classes_of(path: Path, state: Mapping[str, Tensor], notes: Mapping[str, str]) -> int:
    """Tell how many classes a network tells apart by the note in its checkpoint, or by the last of its tensors."""
    # The last tensor of a classifier has one entry (or row) per class.
    rows = [tensor.shape[0] for tensor in state.values() if tensor.dim() and tensor.numel()]
    if not rows:
        raise ValueError(f"{path} holds no tensor with a value: it can't be the weights of a network")
    said = notes.get("classes", "")
    if len(said) < 10 and said.isdecimal() and int(said) in rows:
        return int(said)
    if rows[-1] > MOST_CLASSES:
        raise ValueError(f"{path} ends with a tensor of {rows[-1]:,} rows; a network has at most {MOST_CLASSES:,} classes")
    return rows[-1]


def _check_types(network: Network) -> None:
    """Raise ValueError for weights of a type that nothing here computes with."""
    for name, tensor in network.module.state_dict().items():
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float32:
            raise ValueError(
                f"{network.name} has weights of type {tensor.dtype} ({name}); they must be torch.float32: call .float() on it"
            )


def check_fits(network: Network, dataset: data.Dataset, takes_scores: bool = True) -> None:
    """Check that a network takes the samples of a data set, and tells its classes apart.

    Args:
        network: The network.
        dataset: The data set.
        takes_scores: Whether what it is judged by is of class scores; otherwise its outputs may be anything.

    Raises:
        ValueError: Unless its input is of the samples' shape, and its outputs are the classes, where there are labels.
    """
    if takes_scores:
        _check_classes(network, dataset)
    inputs, targets = dataset.search.take(torch.arange(1))
    inputs = network.preprocess(inputs)
    for leaf in leaves(inputs):
        if leaf.is_floating_point() and not math.isfinite(float(leaf.sum())):
            raise ValueError(f"the {dataset.search.samples_are} of {dataset.name} hold values that are not finite")
    if not takes_scores or not network.input_shape:
        hint = ""
        if dataset.search.source.is_of_list:
            hint = "; a list is read as batches: samples are given as a Dataset or a DataLoader"
        _check_runs(network, inputs, targets, dataset.name, hint)


def _check_runs(network: Network, inputs: Any, targets: Any, called: str, hint: str) -> None:
    """Raise ValueError, in one sentence with a hint at its end, if a network fails on the samples of a data set."""
    try:
        with torch.inference_mode(), evaluating(network.module):
            network.run(network.module, inputs, targets)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in leaves(inputs))
        raise ValueError(f"{network.name} can't take the samples of {called} ({shapes}): {reason}{hint}") from error


def _check_classes(network: Network, dataset: data.Dataset) -> None:
    """Raise ValueError unless a network's outputs are a data set's classes, where it has labels."""
    if not network.input_shape:
        # It says nothing of what it takes; its outputs are looked at when it is given samples.
        return
    outputs = output_count(network)
    if dataset.classes and outputs != len(dataset.classes):
        raise ValueError(
            f"{network.name} tells {outputs} classes apart, {dataset.name} has {len(dataset.classes)}: accuracy would mean "
            "nothing. Train the network on this data set (python -m haq.train) or choose another data set"
        )
