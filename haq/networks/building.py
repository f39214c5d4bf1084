"""From a name to a network, without a checkpoint: the registry's, a library's, or a function of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from haq.data.loading import call_with
from haq.networks import NETWORKS, pytorchcv, timm, torchvision
from haq.networks.network import Network
from haq.networks.zoo import LIBRARIES
from hw_models import trust
from hw_models.extras import install_line

_MODULES = {"timm": timm, "torchvision": torchvision, "pytorchcv": pytorchcv}


def names_of(library: str, containing: str = "") -> list[str]:
    """List the networks of a library, as they can be given; none if it isn't installed.

    Args:
        library: One of `zoo.LIBRARIES`.
        containing: Only names that contain this, in upper or lower case.

    Returns:
        Names such as "timm:mobilenetv2_050", in the library's order.

    Raises:
        ValueError: For a library that there isn't.
    """
    if library not in _MODULES:
        raise ValueError(f"there is no library {library!r}; known: {', '.join(LIBRARIES)}")
    try:
        known = _MODULES[library].names()
    except ImportError:
        return []
    return [f"{library}:{name}" for name in known if containing.lower() in name.lower()]


def build(name: str, classes: int | None = None, pretrained: bool = True) -> Network:
    """Build a network of a name that the user gave.

    Args:
        name: A name of the registry, LIBRARY:NAME, NAME of a library, or module:function.
        classes: The number of outputs; None for the network's own.
        pretrained: Whether it has its weights. A function of one's own is told if it takes an argument of that name.

    Returns:
        The network, as it was made.

    Raises:
        ValueError: For a name that there isn't, with the close ones, and for a function that returns something else.
        FileNotFoundError: For weights that can't be had.
        ImportError: For a library that isn't installed, with what to install.
    """
    library, _, model = name.partition(":")
    if library in LIBRARIES and model:
        return _MODULES[library].build(model, classes, pretrained)
    if name in NETWORKS:
        return _call(name, NETWORKS.get(name, modules=False), classes, pretrained)
    if ":" in name:
        return _call(name, NETWORKS.get(name), classes, pretrained)
    for library in LIBRARIES:
        if f"{library}:{name}" in names_of(library):
            return _MODULES[library].build(name, classes, pretrained)
    raise _unknown(name)


def is_own_function(name: str) -> bool:
    """Say whether a name is a function of somebody's own, which a file may not name by itself."""
    return ":" in name and name.partition(":")[0] not in LIBRARIES and name not in NETWORKS


def build_as_file_says(path: Path, name: str, classes: int | None) -> Network:
    """Build the network that a file names, with random weights; nothing is imported that only the file names.

    Args:
        path: The file, for messages.
        name: The name in it.
        classes: The number of outputs; None for the network's own.

    Returns:
        The network, as it was made.

    Raises:
        ValueError: For a name that there isn't, and for a function of somebody's own that the user hasn't named himself.
        ImportError: For a library that isn't installed, with what to install.
    """
    if NETWORKS.is_code(name):
        trust.check(name, f"{path} names network", f", or name it yourself, as {name[:80]}@{path}")
    try:
        return build(name, classes, pretrained=False)
    except ValueError as error:
        raise ValueError(f"{path} names a network that can't be built: {error}") from error


def shapes_of(name: str, classes: int | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the tensors of a network of ours or of a library, without the memory for them.

    Args:
        name: The name, which may be a file's.
        classes: The number of outputs; None for the network's own.

    Returns:
        Shapes by name; None for a network of somebody else, and for one that can't be made without memory.
    """
    library, _, model = name.partition(":")
    if not (library in LIBRARIES and model) and name not in NETWORKS and ":" in name:
        return None
    try:
        with torch.device("meta"):
            state = build(name, classes, pretrained=False).module.state_dict()
    except (RuntimeError, NotImplementedError):
        return None
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _call(name: str, function: Any, classes: int | None, pretrained: bool) -> Network:
    """Call what makes a network, with those of the two arguments that it takes, and say what is wrong with the result."""
    options: dict[str, Any] = {"pretrained": pretrained}
    if classes:
        options["classes"] = classes
    made = call_with(name, function, **options)
    module = getattr(made, "module", made)
    if isinstance(module, nn.Module) and any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise ValueError(f"{name} has lazy layers, which have no shape yet: call the network once before it is returned")
    if isinstance(made, Network):
        return replace(made, name=name)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} returned {type(made).__name__}; it must return an nn.Module or a haq.networks.Network")
    # Without one the data set tells what goes in.
    shape = getattr(made, "input_shape", ())
    if not isinstance(shape, tuple) or not all(isinstance(side, int) for side in shape):
        raise ValueError(
            f"{name}: module.input_shape is {shape!r}; it must be (channels, height, width), or not be there if the network "
            "takes something else than images"
        )
    if len(shape) != 3:
        shape = ()
    return Network(name, made, shape, origin="your function")


def _unknown(name: str) -> ValueError:
    """Say which names are close to one that nobody has, and which library isn't installed."""
    try:
        NETWORKS.get(name)
    except ValueError as error:
        absent = [library for library in LIBRARIES if not names_of(library)]
        hint = ""
        if absent:
            hint = f"; not installed: {', '.join(absent)} ({install_line('zoo')})"
        return ValueError(f"{error}{hint}")
    raise AssertionError(name)
