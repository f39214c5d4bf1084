"""Tensors that are computed from others, kept until one of those changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Key = tuple[str, int]


class TensorCache:
    """Tensors by what they are and their width, such as ("weight", 4), each with the state of what it was made of."""

    def __init__(self) -> None:
        """Keep nothing at first."""
        self._kept: dict[Key, tuple[tuple[int, ...], Tensor]] = {}

    def get(self, key: Key, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` returns: kept, if no source has changed since, or made now.

        Args:
            key: What the tensor is, and its width.
            sources: All tensors that it depends on.
            make: Computes it.

        Returns:
            The tensor, which nobody may change.
        """
        # Nobody counts the changes of inference tensors, and compiled code can't look at counts.
        if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            return make()
        # torch counts in-place changes of a tensor; a replaced tensor has another address.
        state = tuple(number for source in sources for number in (source._version, source.data_ptr()))
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = state, make().detach()
            self._kept[key] = kept
        return kept[1]

    def clear(self) -> None:
        """Forget everything: needed only where shapes change."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        """Copy and pickle as an empty one: what is kept can be many times a layer's size, and is made again when needed."""
        return TensorCache, ()
