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
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

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
    __module__ = "torch.second"  # by its first part eagerpy knows whose tensors are whose

    @staticmethod
    def __new__(cls, held: Tensor) -> SecondTensor:
        if held.is_inference() != torch.is_inference_mode_enabled():
            # Such as a view, in inference mode, of what was there before.
            with torch.inference_mode(held.is_inference()):
                return cls._make(held)
        return cls._make(held)

    @classmethod
    def _make(cls, held: Tensor) -> SecondTensor:
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

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.held!r} on {DEVICE}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.held, self.requires_grad, getattr(self, "_is_param", False))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.numpy or function is Tensor.__array__:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")
        if function is Tensor.tolist:
            return args[0].held.tolist()
        if function is Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].held = args[1].held
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(function, args, kwargs or {})


def _rebuilt(held: Tensor, requires_grad: bool, is_parameter: bool) -> Any:
    made = SecondTensor(held)
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)


@functools.cache
def _aliases(function: Any) -> bool:
    """Say whether what an operation returns may be, or share the memory of, what it is given."""
    return any(argument.alias_info is not None for argument in function._schema.arguments)


def _bare(given: Any, tensors: list[Tensor]) -> Any:
    """Return what tensors hold in place of them, and put all tensors into a list."""
    if isinstance(given, Tensor):
        tensors.append(given)
        return getattr(given, "held", given)
    if isinstance(given, list | tuple):
        return type(given)(_bare(one, tensors) for one in given)
    return given


def _wrapped(found: Any) -> Any:
    if isinstance(found, Tensor):
        return SecondTensor(found)
    if isinstance(found, list | tuple):
        return type(found)(_wrapped(one) for one in found)
    return found


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute with what tensors hold, having checked that a GPU would."""
    tensors: list[Tensor] = []
    bare_args = _bare(args, tensors)
    bare_kwargs = {name: _bare(value, tensors) for name, value in kwargs.items()}
    _check_devices(function, args, kwargs, tensors)
    here = True
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == NAME
        bare_kwargs["device"] = torch.device("cpu")
    if here and torch.Tag.nondeterministic_seeded in function.tags:
        drawn.append(str(function))
    found = function(*bare_args, **bare_kwargs)
    if function is aten.copy_.default and not isinstance(args[0], SecondTensor):
        return args[0]
    if not here:
        if found is bare_args[0]:
            return found.clone()
        return found
    wrapped = _wrapped(found)
    if not _aliases(function):
        return wrapped
    for one in tensors:
        if isinstance(one, SecondTensor) and one.shape != one.held.shape:
            # What an operation was given to write into was made larger.
            with torch._C.DisableTorchFunctionSubclass():
                one.data = SecondTensor(one.held)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _check_devices(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type != NAME:
        raise RuntimeError(f"{function}: expected a {NAME!r} device type for generator but found {generator.device.type!r}")
    # A number of the CPU may meet any tensor.
    others = [one for one in tensors if not isinstance(one, SecondTensor) and one.dim()]
    if not others or len(others) == len(tensors) or function in CROSSING:
        return
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
    _setup_privateuseone_for_python_backend(NAME, _Module())
    delattr(torch.nn.Module, NAME)  # torch adds a method of that name, and networks have layers of that name
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


class _Module(_DummyBackendModule):
    """What torch asks of a device beside its tensors."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Nothing is drawn there."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


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
