"""What the results of a network depend on, copied, so that a change by any means is noticed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantizers.cache import as_integers

SET_ANEW = ("weight_bits", "activation_bits", "training")  # attributes that are set before every evaluation
LARGE = 1 << 28  # bytes of tensors that are copied; of what is beyond it checksums are kept
PLAIN = (bool, int, float, str, type(None))


class Snapshot:
    """A network's modules, their modes, numbers and words, and copies of all their tensors and of some more.

    Tensors are compared by value. Neither a tensor's version nor its address tells whether it was changed: fused optimizers,
    `.data`, NumPy and other processes write without a trace.
    """

    def __init__(self, network: nn.Module, more: Sequence[Tensor] = ()) -> None:
        """Copy all there is; of large tensors (`LARGE`) a checksum is kept, or memory would be needed twice.

        Args:
            network: Its parameters and buffers are copied, those of quantizers among them.
            more: Further tensors.
        """
        self.modules = list(network.modules())
        self.modes = [module.training for module in self.modules]
        self.copies = _copied([*_tensors(self.modules), *more])
        self.take_attributes()

    def restore_modes(self, network: nn.Module) -> None:
        """Put a network back into evaluation mode, as it was, if it left that."""
        if [module.training for module in network.modules()] == self.modes:
            return
        network.eval()

    def fits(self, network: nn.Module, more: Sequence[Tensor] = ()) -> bool:
        """Say whether nothing has changed.

        Args:
            network: The network.
            more: The further tensors, in their order.

        Returns:
            Whether modules are the same, and all values are.
        """
        modules = list(network.modules())
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return False
        if _attributes(modules) != self.attributes:
            return False
        return _same([*_tensors(modules), *more], self.copies) and _same(_loose_tensors(modules), self.loose)

    def holds(self, tensors: Sequence[Tensor], first: int) -> bool:
        """Say whether some of the further tensors are what they were.

        Args:
            tensors: The tensors.
            first: The place of the first of them, counted from the end of all that was copied.

        Returns:
            Whether all values are the same.
        """
        kept = self.copies[len(self.copies) - first :]
        return all(map(_is_same, tensors, kept))

    def take_attributes(self) -> None:
        """Take plain attributes as they are now: a network may count its calls, or keep what it saw last."""
        self.attributes = _attributes(self.modules)
        self.loose = _copied(_loose_tensors(self.modules))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are the same to the last bit; NaN is then the same as NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    one = one.detach()
    if one.is_floating_point():
        return torch.equal(as_integers(one), as_integers(other))
    return torch.equal(one, other)


class _Checksum(NamedTuple):
    """What is kept of a large tensor."""

    shape: torch.Size
    dtype: torch.dtype
    value: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Checksum:
        """Compute it, of the values in their order."""
        plain = tensor.detach()
        if plain.dim() == 4 and not plain.is_contiguous():
            plain = plain.permute(0, 2, 3, 1)  # channels last, as images are kept
        content = plain.contiguous().view(-1).view(torch.uint8).numpy()
        return cls(tensor.shape, tensor.dtype, zlib.crc32(content.data))


def _is_same(tensor: Tensor, kept: Tensor | _Checksum) -> bool:
    if isinstance(kept, Tensor):
        return same_bits(tensor, kept)
    if tensor.shape != kept.shape or tensor.dtype != kept.dtype or tensor.device.type != "cpu":
        return False
    return _Checksum.of(tensor) == kept


def _same(tensors: Sequence[Tensor], copies: Sequence[Tensor | _Checksum]) -> bool:
    return len(tensors) == len(copies) and all(map(_is_same, tensors, copies))


def _copied(tensors: Sequence[Tensor]) -> list[Tensor | _Checksum]:
    kept: list[Tensor | _Checksum] = []
    size = 0
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            size += tensor.nbytes
            if size > LARGE and tensor.device.type == "cpu":
                kept.append(_Checksum.of(tensor))
            else:
                kept.append(tensor.detach().clone())
    return kept


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """List all parameters and buffers; one that two modules share is there twice."""
    found: list[Tensor] = []
    for module in modules:
        found += [tensor for tensor in module._parameters.values() if tensor is not None]
        found += [tensor for tensor in module._buffers.values() if tensor is not None]
    return found


def _loose_tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """List the tensors that modules have as plain attributes, neither parameters nor buffers."""
    return [value for module in modules for value in vars(module).values() if isinstance(value, Tensor)]


def _attributes(modules: Sequence[nn.Module]) -> list[list[tuple[str, Any]]]:
    """List the numbers and words that modules have as attributes, such as a stride or a factor."""
    return [
        [(name, value) for name, value in vars(module).items() if _is_plain(value) and name not in SET_ANEW]
        for module in modules
    ]


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(part) in PLAIN for part in value)
    return type(value) in PLAIN
