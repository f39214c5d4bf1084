"""Kernels for the tests of measuring: they compute nothing of use, but in as many steps as the bits of their kind ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hw_models.tvm_cpu.conv import Conv


class Argument(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Spin:
    """Adds up an array `steps` times."""

    conv: Conv
    w_bits: int
    a_bits: int
    signed: bool
    name: str
    steps: int

    @property
    def key(self) -> str:
        return f"spin {self.steps}"

    def functions(self, symbol: str) -> dict[str, Any]:
        from tvm import te

        count = self.conv.in_channels * 16
        source = te.placeholder((count,), "float32", name="x")
        prepared = te.compute((count,), lambda i: source[i] * 2.0, name="prepared")
        again = te.placeholder((count,), "float32", name="prepared")
        step, k = te.reduce_axis((0, self.steps)), te.reduce_axis((0, count))
        result = te.compute((1,), lambda i: te.sum(again[k] * step.astype("float32"), axis=[step, k]), name="y")
        return {
            f"{symbol}_prepare": te.create_prim_func([source, prepared]),
            f"{symbol}_main": te.create_prim_func([again, result]),
        }

    def arguments(self) -> dict[str, list[Argument]]:
        count = self.conv.in_channels * 16
        x, prepared = Argument("x", (count,), "float32"), Argument("prepared", (count,), "float32")
        return {"prepare": [x, prepared], "main": [prepared, Argument("y", (1,), "float32")]}


def candidates(conv: Conv, w_bits: int, a_bits: int, signed: bool, cpu: object) -> list[Spin]:
    """8-bit kernels in 10 steps, bit-serial ones in 2 a pair of bits, each with a better and a worse tile."""
    if conv.in_channels == 13:
        raise ValueError("13 channels bring bad luck")
    return [
        *(Spin(conv, 8, 8, signed, f"int8 {tile}", 10 * slower) for tile, slower in (("4x4", 1), ("1x8", 3))),
        *(
            Spin(conv, w_bits, a_bits, signed, f"bits w{w_bits}a{a_bits} {tile}", 2 * w_bits * a_bits * slower)
            for tile, slower in (("4x4", 1), ("1x4", 2))
        ),
    ]
