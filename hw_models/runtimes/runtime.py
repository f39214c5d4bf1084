"""What a runtime is to measuring: it says which pairs it computes, loads a model, and says how it would compute it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

from hw_models.extras import install_line
from hw_models.runtimes.operators import INTEGER, PACKED_BITS, WHOLE_FLOAT, Operator, Pair
from hw_models.widths import FLOAT

Call = Callable[[], object]


class Runtime(Protocol):
    """Something that runs ONNX models on this machine."""

    @property
    def name(self) -> str:
        """What `--hw` is given."""
        ...

    @property
    def title(self) -> str:
        """What it calls itself."""
        ...

    @property
    def version(self) -> str:
        """Of the installed package."""
        ...

    def load(self, operator: Operator, threads: int) -> Call:
        """Make what runs a layer's graph once, on inputs of its own, whenever it is called."""
        ...

    def computes(self, operator: Operator) -> bool:
        """Say whether it would compute a layer at just the widths that it has, and not in float instead.

        Raises ValueError with the reason for one that it can't load in float.
        """
        ...


def possible_pairs(form: str) -> tuple[Pair, ...]:
    """List the pairs that runtimes may compute without turning one operand into float first; the widest comes first.

    Both quantize activations to 8 bits; 16 bits, and convolutions of few-bit weights, are dequantized and computed in float.
    """
    pairs: tuple[Pair, ...] = (WHOLE_FLOAT, INTEGER)
    if form == "linear":
        pairs += tuple((bits, FLOAT) for bits in PACKED_BITS)
    return pairs


def check_installed(name: str, *modules: str) -> None:
    """Raise ImportError saying what to install, if a module isn't there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the target {name} needs {' and '.join(missing)}: {install_line('runtimes')}")


def example(shape: Any, is_bytes: bool) -> Any:
    """Make an input of a model: bytes of all values, or floats nowhere near zero."""
    import numpy as np

    random = np.random.default_rng(0)
    if is_bytes:
        return random.integers(0, 256, shape, np.uint8)
    return random.uniform(0.5, 1.5, shape).astype(np.float32)
