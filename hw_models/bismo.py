"""BISMO, the bit-serial matrix multiplier of HAQ's `edge` and `cloud` targets, in first order.

An array of D x D dot-product units, each one word (`word_bits`) wide, computes one bit plane by bit plane tile product per
cycle. A layer becomes matrix products, weights (M x K) times activations (K x N):

    conv, pointwise   M = C_out             K = C_in k k   N = H_out W_out   once per image
    grouped           M = C_out / groups    K = C_in / groups k k            once per group and image
    depthwise         M = D C_out / C_in    K = D k k, a block-diagonal group of D channels: ceil(C_in / D) groups per image
    linear            M = C_out             K = C_in       N = rows x batch  once

and with kt = ceil(K / word_bits) each takes the longest of

    compute            ceil(M / D) ceil(N / D) kt w a
    activation fetch   N kt a     x cycles per word
    weight fetch       M kt w     x cycles per word

cycles: compute, and each operand's own fetch port, work at the same time. This is the lower bound of the exact schedule
(within 2 % of it for MobileNetV2 on `cloud`). Nothing is charged for results, instructions, activation functions,
normalisation, pooling and additions.

Source: Umuroglu et al., "BISMO: A Scalable Bit-Serial Matrix Multiplication Overlay", FPL 2018; the mapping is the one that
reproduces the latency table published by HAQ's authors (Wang et al., CVPR 2019).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hw_models.cost import BITS, CostTable, storage_bytes
from hw_models.workload import Layer, Workload

BOUNDS = ("compute", "activation fetch", "weight fetch")


class BismoTarget(BaseModel):
    """A BISMO machine: every field is a key of its YAML file, with its unit in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Literal["bismo"]
    name: str = Field(min_length=1)
    description: str
    array_size: int = Field(gt=0, description="dot-product units along each side of the array")
    word_bits: int = Field(gt=0, description="bits that one dot-product unit takes from each operand per cycle")
    weight_port_bits_per_cycle: float = Field(gt=0)
    activation_port_bits_per_cycle: float = Field(gt=0)
    clock_mhz: float = Field(gt=0, allow_inf_nan=False)
    batch: int = Field(gt=0, description="images per batch")

    @property
    def provenance(self) -> str:
        return "estimated"

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Cycles and latency of every layer at every pair of widths, and its storage, for one batch of images.

        `batch=None` takes the target's own. Raises ValueError for a batch that isn't a positive integer.
        """
        images = self.batch if batch is None else batch
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise ValueError(f"batch must be a positive integer, not {images!r}")
        terms = np.stack([self._terms(layer, images) for layer in workload.layers])  # (layers, bounds, 8, 8)
        cycles = np.ceil(terms.max(1)).astype(np.int64)
        return CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=images,
            latency_s=cycles / (self.clock_mhz * 1e6),
            energy_j=None,
            storage_bytes=storage_bytes(workload),
            cycles=cycles,
            bound=terms.argmax(1),
            bounds=BOUNDS,
        )

    def _terms(self, layer: Layer, images: int) -> NDArray[np.float64]:
        """Cycles that each of BOUNDS would take alone, shape (3, 8, 8), summed over the layer's calls."""
        area = layer.kernel[0] * layer.kernel[1]
        rows, depth, repeats = (
            layer.out_channels // layer.groups,
            layer.in_channels // layer.groups * area,
            layer.groups,
        )
        if layer.kind == "depthwise":
            rows, depth = self.array_size * rows, self.array_size * area
            repeats = math.ceil(layer.in_channels / self.array_size)
        w, a = np.meshgrid(np.arange(1, BITS + 1), np.arange(1, BITS + 1), indexing="ij")
        words = math.ceil(depth / self.word_bits)
        terms = np.zeros((len(BOUNDS), BITS, BITS))
        for call in layer.calls:
            columns, times = call.positions, repeats * images
            if layer.kind == "linear":
                columns, times = columns * images, repeats
            tiles = math.ceil(rows / self.array_size) * math.ceil(columns / self.array_size)
            terms += times * np.stack(
                [
                    tiles * words * w * a,
                    columns * words * a * (self.word_bits / self.activation_port_bits_per_cycle),
                    rows * words * w * (self.word_bits / self.weight_port_bits_per_cycle),
                ]
            )
        return terms
