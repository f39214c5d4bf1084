"""Copies of networks, and weights that are computed from other tensors (weight_norm, prune, parametrizations)."""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)
UNCHANGEABLE = (bool, int, float, str, type(None))
EMPTY = (dict, OrderedDict, set, list, tuple)
HOLDING = ("_modules", "_parameters", "_buffers")  # attributes of a module
COPYING = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")


def copy_network(network: Network, replacing: Mapping[int, Tensor] | None = None) -> Network:
    """Make a copy of a network, whatever was computed with it before.

    `copy.deepcopy` refuses results of calculations that gradients go through, such as a weight that
    weight_norm, spectral_norm or prune has computed. In the copy they are values without a past,
    and these weights are computed anew.

    Args:
        network: The network.
        replacing: What the copy has in place of some tensors, by their `id`.

    Returns:
        The copy.

    Raises:
        ValueError: Naming the tensor, for a lazy module that has no shape yet.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet, since its layer is lazy: call the network once on inputs first")
    with torch.inference_mode(False), _WithoutPast():
        if replacing is None:
            made = copy.deepcopy(network)
        else:
            made = _copied_quickly(network, dict(replacing))
    for module in made.modules():
        _compute_again(module)
    return made


@functools.cache
def _is_plain(kind: type) -> bool:
    """Say whether modules of a class are copied as all modules are."""
    methods = [getattr(kind, name, None) for name in COPYING]
    plain = [getattr(nn.Module, name, None) for name in COPYING]
    # Some of torch's own set attributes that were added later.
    sets_state = getattr(kind, "__setstate__", None)
    is_torch = getattr(sets_state, "__module__", "").startswith("torch.nn.modules.")
    return methods == plain and is_torch


def _copied_quickly(value: Any, memo: dict[int, Any]) -> Any:
    """Do what `copy.deepcopy` does, which spends most of its time on the many empty dicts of modules."""
    kind: Any = type(value)
    if kind in UNCHANGEABLE:
        return value
    if kind in EMPTY and not value:
        return kind()
    if kind is tuple and all(type(part) in UNCHANGEABLE for part in value):
        return value
    if not isinstance(value, nn.Module) or not _is_plain(kind):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    made = kind.__new__(kind)
    memo[id(value)] = made
    state = made.__dict__
    for key, content in value.__dict__.items():
        if key in HOLDING:
            state[key] = type(content)((name, _copied_quickly(held, memo)) for name, held in content.items())
        elif type(content) in UNCHANGEABLE:
            state[key] = content
        else:
            state[key] = _copied_quickly(content, memo)
    return made


class _WithoutPast(TorchFunctionMode):
    """Within a `with`, deep copies of results of calculations hold their values, and nothing of how they came about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _compute_again(module: nn.Module) -> None:
    """Let the hooks of a module compute its tensors, which may be older than what they are computed from."""
    training = module.training
    module.training = False  # spectral_norm goes on with its iteration in training
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm | SpectralNorm) or _prunes(hook):
            hook(module, ())
    module.training = training


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode within a `with`; then every module has its own mode again."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        # Not train(mode): norms that are frozen within a training network stay frozen.
        for module, mode in modes.items():
            module.training = mode


def class_on(base: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """Make the class of a parametrized module anew, on another base.

    A parametrized tensor is a property of a class that torch makes for this one module, on top of
    the module's own class.
    """
    content = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), content)


@torch.enable_grad()  # without gradients, torch makes buffers of them, or parameters that aren't trained
def make_plain(module: nn.Module) -> None:
    """Make tensors of a module that are computed from others parameters of their own, with the values that they have now."""
    if parametrize.is_parametrized(module):
        # Copies of a module share its class, from which torch removes the property.
        module.__class__ = class_on(type(module).__bases__[0], module)
        for name in list(module.parametrizations):  # type: ignore[arg-type, union-attr]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif _prunes(hook):
            hook.remove(module)  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key]


def _prunes(hook: object) -> bool:
    """Say whether a hook is one of `torch.nn.utils.prune`, which is not imported where nothing is pruned."""
    prune = sys.modules.get("torch.nn.utils.prune")
    return prune is not None and isinstance(hook, prune.BasePruningMethod)
