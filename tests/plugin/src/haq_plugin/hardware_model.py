"""A hardware model: what `model: plugin_model` in a YAML file stands for."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from hw_models.cost import CostTable
from hw_models.machine import Machine
from hw_models.workload import Workload


class BitProducts(Machine):
    """A made-up machine that multiplies bit by bit; every field is a key of its file."""

    model: Literal["plugin_model"]
    products_per_cycle: int = Field(gt=0, description="products of two bits")

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Count a product for every multiplication, weight bit and activation bit."""
        images = self.images(workload, batch)
        widths = np.arange(1, 9)
        macs = np.array([layer.macs for layer in workload.layers])
        products = macs[:, None, None] * widths[:, None] * widths * images
        cycles = -(-products // self.products_per_cycle)
        return self.table(workload, images, cycles, None, np.zeros_like(cycles), ("products",), {})
