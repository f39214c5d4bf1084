"""A hardware target: priced in Python, without a file."""

from __future__ import annotations

import numpy as np

from hw_models.cost import CostTable
from hw_models.storage import storage_bytes
from hw_models.workload import Workload

BYTES_PER_SECOND = 1e6


class Streaming:
    """A made-up processor that takes no time to compute and some to read weights and inputs."""

    name = "plugin_target"
    description = "a made-up processor that waits for memory only"
    provenance = "estimated"

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Charge the bytes of weights once for a batch, and those of inputs for every image."""
        images = batch or 1
        widths = np.arange(1, 9) / 8
        weights = np.array([layer.weights for layer in workload.layers])[:, None, None] * widths[:, None]
        inputs = np.array([layer.in_channels * layer.input_size[0] * layer.input_size[1] for layer in workload.layers])
        seconds = (weights + inputs[:, None, None] * widths * images) / BYTES_PER_SECOND
        return CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=images,
            latency_s=seconds,
            energy_j=None,
            storage_bytes=storage_bytes(workload),
        )
