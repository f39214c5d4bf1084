"""What the simulated machines share: the keys that every YAML file has, and the table that their cycles become."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hw_models.cost import CostTable, Floats, Integers, check_batch
from hw_models.storage import storage_bytes
from hw_models.workload import Workload


class Machine(BaseModel):
    """A simulated machine: every field is a key of its YAML file, with its unit in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    name: str = Field(min_length=1)
    description: str
    clock_mhz: float = Field(gt=0, allow_inf_nan=False)
    batch: int = Field(gt=0, description="images per batch")

    @property
    def provenance(self) -> str:
        """Say that its costs are estimated."""
        return "estimated"

    def images(self, workload: Workload, batch: int | None) -> int:
        """Return the batch asked for, or the machine's own.

        Raises ValueError for one that isn't a positive integer, and for a workload without layers.
        """
        if not len(workload):
            raise ValueError("the workload has no layers, so there is nothing to price")
        if batch is None:
            return self.batch
        return check_batch(batch)

    def table(
        self,
        workload: Workload,
        images: int,
        cycles: Integers,
        energy_j: Floats | None,
        bound: Integers,
        bounds: tuple[str, ...],
        counters: Mapping[str, Integers],
    ) -> CostTable:
        """Make the cost table of what was counted.

        Args:
            workload: What was priced.
            images: The batch.
            cycles: Of every layer at every pair of widths, shape (layers, 8, 8), as all arrays here.
            energy_j: Joules, or None.
            bound: Which of `bounds` limits each cell.
            bounds: What may limit one.
            counters: Further integers by name.

        Returns:
            The table, with the seconds that the cycles take and the bytes that any machine needs.
        """
        return CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=images,
            latency_s=self.seconds(cycles),
            energy_j=energy_j,
            storage_bytes=storage_bytes(workload),
            cycles=cycles,
            bound=bound,
            bounds=bounds,
            counters=counters,
        )

    def seconds(self, cycles: Integers) -> Floats:
        """Return how long so many cycles take."""
        seconds: Floats = cycles / (self.clock_mhz * 1e6)
        return seconds


class PoweredMachine(Machine):
    """A machine whose energy is its latency times a published power. Without one it has no energy: none is made up."""

    power_w: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="while it works; none: no energy")
    power_source: str | None = Field(default=None, min_length=1, description="where power_w was published")

    @model_validator(mode="after")
    def _sourced(self) -> PoweredMachine:
        if (self.power_w is None) != (self.power_source is None):
            raise ValueError("power_w and power_source come together: a power without its source can't be checked")
        return self

    def energy(self, cycles: Integers) -> Floats | None:
        """Return the joules of so many cycles; None if no power is known."""
        if self.power_w is None:
            return None
        return self.seconds(cycles) * self.power_w
