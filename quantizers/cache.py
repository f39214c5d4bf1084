"""Tensors that are computed from others, and kept as long as those have the values that they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantizers.functional import followed

Key = tuple[str, int]
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


class TensorCache:
    """Tensors by what they are and their width, such as ("weight", 4), beside copies of what they were computed from.

    What is kept is used only as long as everything that it was computed from equals its copy, bit
    for bit. Torch's own signs of a change don't tell: its counts miss optimizers with `fused=True`,
    `tensor.data`, NumPy views and memory that processes share, and an address can be another
    tensor's soon.

    The copies take as much memory as a layer's weight does, and every width that is kept takes as
    much again.
    """

    def __init__(self) -> None:
        """Keep nothing at first."""
        self._kept: dict[str, _Kept] = {}

    def get(
        self,
        key: Key,
        sources: Callable[[], Sequence[Tensor]],
        make: Callable[[], Tensor],
        settings: tuple[Any, ...] = (),
    ) -> Tensor:
        """Return what `make` returns: kept, if it would be the same as before, or made now.

        Args:
            key: What the tensor is, and its width.
            sources: Returns all tensors that it depends on, as they are now.
            make: Computes it.
            settings: Plain values that it depends on, too.

        Returns:
            The tensor, which nobody may change.
        """
        now = sources()
        if followed(*now):
            return make()
        what, bits = key
        kept = self._kept.get(what)
        if kept is None or not kept.is_of(now, settings):
            if not all(_comparable(source) for source in now):
                return make()
            kept = self._kept[what] = _Kept(now, settings)
        found = kept.results.get(bits)
        if found is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():
            made = make().detach()
        # Another thread, or `make` itself, may have changed something meanwhile.
        if kept.is_of(sources(), settings):
            kept.results[bits] = made
        return made

    def clear(self) -> None:
        """Forget everything, and give its memory back."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        """Copy and pickle as an empty one: what is kept can be many times a layer's size, and is made again when needed."""
        return TensorCache, ()


class _Kept:
    """Results by width, with a copy of all that they were computed from."""

    def __init__(self, sources: Sequence[Tensor], settings: tuple[Any, ...]) -> None:
        self.results: dict[int, Tensor] = {}
        self._settings = settings
        with torch.inference_mode(False):
            self._copies = [(_form(source), as_integers(source).clone()) for source in sources]

    def is_of(self, sources: Sequence[Tensor], settings: tuple[Any, ...]) -> bool:
        """Say whether results made of these would be the same."""
        if settings != self._settings or len(sources) != len(self._copies):
            return False
        for source, (form, copy) in zip(sources, self._copies, strict=True):
            if _form(source) != form or not torch.equal(as_integers(source), copy):
                return False
        return True


def _comparable(source: Tensor) -> bool:
    """Say whether a tensor's values can be looked at, and whether that is worth while.

    On an accelerator the processor would wait for the answer at every layer, which takes longer
    than to quantize a weight there.
    """
    return source.is_cpu and source.layout == torch.strided and not source.is_complex()


def _form(source: Tensor) -> tuple[Any, ...]:
    # Strides are part of it: what is computed from a weight of other strides can differ in the last
    # bit.
    return source.dtype, source.device, source.shape, source.stride()


def as_integers(source: Tensor) -> Tensor:
    """Return a tensor's memory as integers, by which -0.0 is not 0.0, and NaN is NaN."""
    return source.view(WHOLE[source.itemsize])
