"""What the three libraries of networks share: their import, names that they don't have, weights that can't be had."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from hw_models.extras import install_line

LIBRARIES = ("timm", "torchvision", "pytorchcv")  # in which a name is looked for, in this order
_DECLARED: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def import_zoo(module: str) -> Any:
    """Import a module of the zoo extra, on torch builds without torchvision's compiled operators as well.

    Args:
        module: Its name, such as "timm".

    Returns:
        The module.

    Raises:
        ImportError: With what to install, if it isn't there.
    """
    try:
        return import_declared(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {install_line('zoo')}") from error


def import_declared(module: str) -> Any:
    """Import a module that imports torchvision, on torch builds without its compiled operators as well."""
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # torchvision registers documentation for operators that a CPU-only torch build doesn't have: declare them. No
    # classification network calls them, and no metric does.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    half_loaded = (*LIBRARIES, module.partition(".")[0])
    for loaded in [name for name in sys.modules if name.partition(".")[0] in half_loaded]:
        del sys.modules[loaded]
    return importlib.import_module(module)


def check_known(library: str, model: str, known: Collection[str]) -> None:
    """Raise ValueError, with the names that are close, for a model that a library doesn't have.

    Args:
        library: Its name.
        model: The name that is asked for.
        known: The names that it has.
    """
    if model in known:
        return
    close = difflib.get_close_matches(model, known, n=4, cutoff=0.4)
    hint = ", ".join(f"{library}:{match}" for match in close) or "nothing"
    raise ValueError(f"unknown network '{library}:{model}': {library} has no {model!r}; close to it: {hint}")


def create(name: str, pretrained: bool, make: Callable[[], nn.Module]) -> nn.Module:
    """Call what makes a network. Raises FileNotFoundError, with what to do, if its weights can't be had.

    Args:
        name: The network, for messages.
        pretrained: Whether it has its weights.
        make: Makes it.

    Returns:
        The network.
    """
    if not pretrained:
        return make()
    try:
        return make()
    except Exception as error:
        # The hubs raise their own kinds of errors; all of them mean that the weights could not be had.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name} could not be loaded with its weights ({lines[0]}); give them as {name}@CHECKPOINT"
        ) from error


def origin(library: str, pretrained: bool) -> str:
    """Say where the weights of a library's network are from."""
    if pretrained:
        return library
    return "random weights"
