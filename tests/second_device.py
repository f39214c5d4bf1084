"""A device that isn't the default, on a machine that has none: it computes on the CPU, and refuses what a GPU would refuse.

A tensor of it says that it is on "second:0" and holds a tensor of the CPU with which it computes, so that every result is the
CPU's, bit for bit. As on a GPU, an operation fails on tensors of two devices, a generator of the CPU can't draw for it, and
NumPy can't read it. Random numbers that are drawn on it are counted (`drawn`): they would be others on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
DEVICE = f"{NAME}:0"
LEFT = ("aten::as_tensor", "aten::tensor")
drawn: list[str] = []  # operations that drew on the device

aten = torch.ops.aten
# What may read a tensor of one device and write one of another.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
# What takes indices of the CPU too.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class SecondTensor(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SecondTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )
        made.held = held
        return made

    def __repr__(self, **options: Any) -> str:
        return f"{self.held!r} on {DEVICE}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.held, self.requires_grad, getattr(self, "_is_param", False))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.numpy or function is Tensor.__array__:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")
        if function is Tensor.tolist:
            return args[0].held.tolist()
        if function is Tensor.data.__set__:
            args[0].held = args[1].held
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _rebuilt(held: Tensor, requires_grad: bool, is_parameter: bool) -> Any:
    made = SecondTensor(held)
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute with what tensors hold, having checked that a GPU would."""
    _check_devices(function, args, kwargs)
    asked = kwargs.get("device")
    if asked is None:
        here = True
    else:
        here = torch.device(asked).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if here and torch.Tag.nondeterministic_seeded in function.tags:
        drawn.append(str(function))
    if function is aten._pin_memory.default:
        raise RuntimeError(f"cannot pin a tensor of {DEVICE}")
    bare_args, bare_kwargs = pytree.tree_map_only(SecondTensor, lambda one: one.held, (args, kwargs))
    if function is aten.copy_.default and not isinstance(args[0], SecondTensor):
        function(*bare_args, **bare_kwargs)
        return args[0]
    found = function(*bare_args, **bare_kwargs)
    if not here:
        if function is aten._to_copy.default and found is bare_args[0]:
            found = found.clone()
        return found
    for one in pytree.tree_leaves((args, kwargs)):
        if isinstance(one, SecondTensor) and one.shape != one.held.shape:
            raise NotImplementedError(f"{function} changed a shape")
    wrapped = pytree.tree_map_only(Tensor, SecondTensor, found)
    if not any(isinstance(one, SecondTensor) for one in pytree.tree_leaves((args, kwargs))):
        return wrapped
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _check_devices(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    ours = [one for one in tensors if isinstance(one, SecondTensor)]
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type != NAME:
        raise RuntimeError(f"{function}: expected a {NAME!r} device type for generator but found {generator.device.type!r}")
    if not ours or function in CROSSING:
        return
    others = [one for one in tensors if not isinstance(one, SecondTensor) and one.dim()]
    if function in INDEXING and isinstance(args[0], SecondTensor):
        indices = [one for one in args[1] if isinstance(one, Tensor)]
        others = [one for one in others if not any(one is index for index in indices)]
    if others:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu!"
        )


@functools.cache
def register() -> torch.device:
    """Make the device known to torch, and return it."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        if not _creates(schema):
            continue
        overload = schema.overload_name or "default"
        operation = getattr(getattr(aten, schema.name.removeprefix("aten::")), overload)
        library.impl(operation, functools.partial(_create, operation), "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    _LIBRARIES.append(library)
    return torch.device(DEVICE)


def _creates(schema: Any) -> bool:
    """Say whether an operation makes a tensor out of none, on a device that it is given."""
    if not schema.name.startswith("aten::") or schema.name in LEFT:
        return False
    names = [argument.name for argument in schema.arguments]
    takes = [str(argument.type) for argument in schema.arguments]
    gives = [str(value.type) for value in schema.returns]
    return "device" in names and gives == ["Tensor"] and not any("Tensor" in one for one in takes)


def _copy(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """Copy where torch itself makes a tensor of numbers, and asks nobody who computes in Python."""
    getattr(target, "held", target).copy_(getattr(source, "held", source))
    return target


def _create(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return _compute(operation, args, kwargs)


_LIBRARIES: list[Any] = []  # a library that nobody holds is taken back
