"""Weights of layers in ONNX files: with what follows the layer folded in, and packed at their bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haq.deployment.program import BYTE_BITS

Array = NDArray[Any]
# The largest bias in steps of the sums that it is added to: sums of bytes need the rest of 32 bits.
LARGEST_BIAS = 2**30
# On x86 without VNNI, ONNX Runtime adds two products in 16 bits. With bytes up to 255, weights up to 64 fit.
SAFE = 64
POOLED = 2**16  # layers of fewer weights are unpacked together


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """Integers q of a layer, int8, whose real values are q scale; `bits` is what they take in two's complement (1: signs).

    `scale` and `bias` are float64 per output channel, those of batch norms and products behind the layer folded in.
    """

    q: NDArray[np.int8]
    bits: int
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]

    def positive(self) -> FoldedWeights:
        """Turn the sign of the integers where the scale is negative, and both integers and scale where it is zero."""
        q, scale = self.q.astype(np.int16), self.scale.copy()
        for channel in np.flatnonzero(scale <= 0):
            if scale[channel] == 0:
                q[channel] = 0
                scale[channel] = max(float(np.abs(scale).max()), float(np.finfo(np.float32).tiny))
            elif self.bits == 1 or q[channel].min() > -(2 ** (self.bits - 1)):
                q[channel] = -q[channel]
                scale[channel] = -scale[channel]
        bits = self.bits
        if bits == 1 and (q == 0).any():
            bits = 2
        return FoldedWeights(q.astype(np.int8), bits, scale, self.bias)

    def shift(self, wide: bool) -> int:
        """Return by how many bits the integers may be moved up.

        Biases are rounded to steps of the sums. The finer these are, the less that is.

        Args:
            wide: Whether what they are multiplied by takes whole bytes.
        """
        highest, lowest = 2 ** (BYTE_BITS - 1) - 1, 2 ** (BYTE_BITS - 1)
        if wide:
            highest, lowest = SAFE, SAFE
        largest, smallest = max(int(self.q.max()), 1), max(-int(self.q.min()), 1)
        return max(0, int(math.log2(min(highest / largest, lowest / smallest))))

    def with_small_bias(self, step: float) -> FoldedWeights:
        """Make steps of sums coarser where a bias would take too many of them, as behind channels that hardly contribute.

        Where all weights are zero, whose scale could be any, they become as fine as the bias allows.

        Args:
            step: The real value of 1 of what enters the layer.
        """
        least = np.abs(self.bias) / (LARGEST_BIAS * step)
        nothing = ~self.q.reshape(len(self.q), -1).any(1)
        other = (np.abs(self.scale) < least) | (nothing & (least > 0))
        if not other.any():
            return self
        scale = np.where(other, np.copysign(least, self.scale), self.scale)
        each = (self.scale / scale).reshape(-1, *[1] * (self.q.ndim - 1))
        return FoldedWeights(np.rint(self.q * each).astype(np.int8), self.bits, scale, self.bias)


def pack(integers: Array, bits: int) -> NDArray[np.uint8]:
    """Pack unsigned integers below 2^bits: byte k of eight integers holds bit k of each, the first in the lowest place.

    Args:
        integers: The integers, of any shape; their number is made a multiple of eight by zeros behind them.
        bits: Their width.

    Returns:
        Bytes of shape (groups of eight, bits, 1).
    """
    flat = integers.reshape(-1).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-len(flat) % 8, np.uint8)])
    planes = (flat.reshape(-1, 8, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    made: NDArray[np.uint8] = (planes << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return made[:, :, None]


class Packer:
    """Collects the weights of a file, and writes what unpacks them: operators on constants, done when a file is loaded."""

    def __init__(self, writer: Any) -> None:
        """Have collected nothing.

        Args:
            writer: The `onnx_nodes.GraphWriter`.
        """
        self.writer = writer
        self.waiting: dict[tuple[int, int], list[tuple[str, Array]]] = {}  # by bits and shift: names of tensors, and integers

    def add(self, name: str, q: Array, bits: int, shift: int) -> None:
        """Have a tensor of int8 that holds q 2^shift.

        Args:
            name: Its name.
            q: The integers.
            bits: What they take.
            shift: By how many bits they are moved up.
        """
        self.waiting.setdefault((bits, shift), []).append((name, q))

    def write(self) -> None:
        """Write everything, before all other operators."""
        after, self.writer.nodes = self.writer.nodes, []
        for (bits, shift), layers in self.waiting.items():
            small = [layer for layer in layers if layer[1].size < POOLED]
            for group in (small, *([layer] for layer in layers if layer[1].size >= POOLED)):
                if group:
                    self._write_group(group, bits, shift)
        self.writer.nodes += after

    def _write_group(self, layers: Sequence[tuple[str, Array]], bits: int, shift: int) -> None:
        """Write tensors that are unpacked together.

        floor(byte / 2^i) - 2 floor(byte / 2^(i+1)) is bit i of a byte. Both steps are linear, so the bits' values come first.
        """
        writer = self.writer
        name = layers[0][0]
        factor, offset = 2**shift, 2 ** (bits - 1)
        if bits == 1:
            # -1 and 1 are 2 u - 1.
            unsigned = [(q + 1) // 2 for _, q in layers]
            ends = 2 * factor, -factor
        else:
            unsigned = [q.astype(np.int16) + offset for _, q in layers]
            ends = factor, -factor * offset
        flat = np.concatenate([u.reshape(-1) for u in unsigned])
        packed = writer.constant(f"{name}:packed", pack(flat, bits), np.uint8)
        halves = writer.constant("halves", 0.5 ** np.arange(9))
        values = writer.constant(f"values_{bits}_{shift}", ends[0] * 2.0 ** np.arange(bits))
        bit = np.eye(9, 8) - 2 * np.eye(9, 8, -1)
        of_bits = "bits"
        if of_bits not in writer.constants:
            small = writer.constant(of_bits, bit, np.int8)
            writer.op("Cast", [small], f"{of_bits}:real", to=writer.onnx.TensorProto.FLOAT)
        of_bits = f"{of_bits}:real"
        least = writer.constant(f"offset_{bits}_{shift}", ends[1])
        real = writer.op("Cast", [packed], f"{name}:bytes", to=writer.onnx.TensorProto.FLOAT)
        floors = writer.op("Floor", [writer.op("Mul", [real, halves], f"{name}:halves")], f"{name}:floors")
        summed = writer.op("MatMul", [values, floors], f"{name}:valued")
        whole = writer.op("Gemm", [summed, of_bits, least], f"{name}:eights")
        whole = writer.op("Cast", [whole], f"{name}:integers", to=writer.onnx.TensorProto.INT8)
        parts = [whole]
        sizes = [q.size for _, q in layers]
        rest = -sum(sizes) % 8
        if len(layers) > 1 or rest:
            row = writer.op("Reshape", [whole, writer.integers(-1)], f"{name}:row")
            parts = [f"{layer}:row_of_it" for layer, _ in layers]
            outputs = list(parts)
            if rest:
                sizes.append(rest)
                outputs.append(f"{name}:rest")
            writer.nodes.append(writer.onnx.helper.make_node("Split", [row, writer.integers(*sizes)], outputs))
        for (layer, q), part in zip(layers, parts, strict=True):
            writer.op("Reshape", [part, writer.integers(*q.shape)], layer)
