"""Constants as a file holds them: integers at their bits, other numbers byte by byte; and code that reads them again.

What is written is meant to be compressed by bytes. Integers of 3, 5, 6 or 7 bits that run over the ends of bytes would hide
from that, so every byte begins with as many whole ones as it holds, and what is left of all bytes holds the others. The
bytes of a float32 are kept apart: its sign and exponent are like those of its neighbours, the rest is like noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hw_models.tvm_cpu.builder import Builder

BYTE = 8  # bits


@dataclass(frozen=True)
class Bits:
    """Integers low + step * code, from byte `start` on, `count` codes of `bits` bits."""

    start: int
    count: int
    bits: int
    low: int
    step: int

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return -(-self.count * self.bits // BYTE)

    @property
    def _whole(self) -> int:
        """Codes that a byte holds whole, at its low end."""
        return BYTE // self.bits

    @property
    def _left(self) -> int:
        """Bits of every byte that are left for the others."""
        return BYTE % self.bits

    def pack(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the bytes of codes (count,)."""
        size = self.bytes
        held = np.zeros(size * self._whole, np.int64)
        first = codes[: held.size]
        held[: first.size] = first
        packed = (held.reshape(size, self._whole) << (self.bits * np.arange(self._whole))).sum(1)
        if self._left:
            places = np.arange(self._left) + self.bits * self._whole
            others = np.zeros(size * self._left, np.int64)
            single = (codes[held.size :, None] >> np.arange(self.bits)) & 1
            others[: single.size] = single.reshape(-1)
            packed |= (others.reshape(size, self._left) << places).sum(1)
        return packed.astype(np.uint8)

    def value(self, b: Builder, packed: Any, index: Any) -> Any:
        """Write the code that reads an integer.

        Args:
            b: Builds the function.
            packed: The buffer of bytes.
            index: Which one, of int32.

        Returns:
            The integer, of int32.
        """
        T = b.T
        whole = self.bytes * self._whole

        def at_once() -> Any:
            byte = packed[self.start + index // self._whole].astype("int32")
            return (byte >> (index % self._whole * self.bits)) & (2**self.bits - 1)

        def bit_by_bit() -> Any:
            code = b.const(0, "int32")
            for bit in range(self.bits):
                place = (index - whole) * self.bits + bit
                byte = packed[self.start + place // self._left].astype("int32")
                code = code | (((byte >> (place % self._left + self.bits * self._whole)) & 1) << bit)
            return code

        code = at_once()
        if whole < self.count:
            code = T.if_then_else(index < whole, code, bit_by_bit())
        return code * self.step + self.low


@dataclass(frozen=True)
class Planes:
    """`count` numbers of a type: the j-th byte of each, from byte `start` + j * `apart` on."""

    start: int
    count: int
    apart: int
    dtype: str

    def value(self, b: Builder, packed: Any, index: Any) -> Any:
        """Write the code that reads a number.

        Args:
            b: Builds the function.
            packed: The buffer of bytes.
            index: Which one, of int32.

        Returns:
            The number, of its type.
        """
        size = np.dtype(self.dtype).itemsize
        word = f"uint{BYTE * size}"
        made = b.const(0, word)
        for part in range(size):
            byte = packed[self.start + part * self.apart + index].astype(word)
            made = made | (byte << b.const(BYTE * part, word))
        return b.T.reinterpret(self.dtype, made)


Stored: TypeAlias = Bits | Planes


def pack(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[np.uint8], list[Stored]]:
    """Write constants one behind the other.

    Args:
        arrays: Of any shape and type; those of int64 are integers of few bits, if their range is.

    Returns:
        The bytes, and for each array where and how it is held there.
    """
    found: dict[int, Stored] = {}
    written: list[NDArray[np.uint8]] = []
    start = 0
    by_size: dict[int, list[int]] = {}
    for index, array in enumerate(arrays):
        values = array.reshape(-1)
        coded = _codes(values, start)
        if coded is None:
            by_size.setdefault(array.itemsize, []).append(index)
            continue
        stored, codes = coded
        found[index] = stored
        written.append(stored.pack(codes))
        start += stored.bytes
    for size, some in by_size.items():
        # All of a size together, so that the bytes that are like each other are neighbours.
        flat = [np.ascontiguousarray(arrays[index].reshape(-1)) for index in some]
        apart = sum(values.size for values in flat)
        for index, values in zip(some, flat, strict=True):
            found[index] = Planes(start, values.size, apart, str(values.dtype))
            start += values.size
        start += apart * (size - 1)
        planes = np.concatenate([values.view(np.uint8).reshape(-1, size) for values in flat])
        written.append(planes.T.reshape(-1))
    every = np.concatenate([*written, np.zeros(1, np.uint8)])  # a buffer is never empty
    return every, [found[index] for index in range(len(arrays))]


def _codes(values: NDArray[Any], start: int) -> tuple[Bits, NDArray[np.int64]] | None:
    """Return integers of few bits as codes, and how they are held; None for any others."""
    if values.dtype != np.int64 or not values.size:
        return None
    low = int(values.min())
    distances = values - low
    step = max(1, int(np.gcd.reduce(distances)))
    codes = distances // step
    bits = max(1, int(codes.max()).bit_length())
    if bits > BYTE:
        return None
    return Bits(start, values.size, bits, low, step), codes
