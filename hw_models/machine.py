"""What hardware described in files shares: the keys that every YAML file has, and the table that a machine's cycles become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hw_models.capabilities import Capabilities, within
from hw_models.cost import CostTable, Floats, Integers, check_batch
from hw_models.storage import storage_bytes
from hw_models.workload import Workload

# What a number of a machine may be; far beyond any that is built, and small enough that no product of them overflows.
MOST_COUNT, MOST_CAPACITY = 2**16, 2**40
CAPACITIES = ("_bytes", "_entries", "_planes")  # the ends of the names of what has a capacity
SMALLEST, LARGEST = 1e-9, 1e9


class Chip(BaseModel):
    """Hardware that a YAML file describes: every field is a key of the file, with its unit in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    name: str = Field(min_length=1, max_length=100)
    description: str = Field(max_length=1000)
    batch: int = Field(gt=0, description="images per batch")
    # Bit-serial and fused multipliers, as their papers define them, take unsigned integers or two's complement.
    zero_points: bool = Field(default=False, description="whether it takes zero points of unsigned activations off its sums")
    capabilities: Capabilities | None = Field(default=None, description="what it can do; none: whatever it has costs for")

    @field_validator("*")
    @classmethod
    def _check_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what no machine has, and with which integers would overflow; of text, what steers a terminal."""
        name = str(info.field_name)
        if isinstance(value, str):
            value = " ".join(value.split())
            if not value.isprintable() or (name == "name" and not value):
                raise ValueError("Input should be text that can be printed")
        elif isinstance(value, int):
            most = MOST_COUNT
            if name.endswith(CAPACITIES):
                most = MOST_CAPACITY
            if abs(value) > most:
                raise ValueError(f"Input should be at most {most:,}")
        elif isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
            raise ValueError(f"Input should be from {SMALLEST:g} to {LARGEST:g}")
        return value

    @model_validator(mode="after")
    def _one_word_on_zero_points(self) -> Chip:
        said = self.capabilities and self.capabilities.zero_points
        if said is not None and "zero_points" in self.model_fields_set and said != self.zero_points:
            raise ValueError("zero_points and capabilities.zero_points say different things: give one of the two")
        return self

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


class Machine(Chip):
    """A simulated machine, whose cycles are counted."""

    clock_mhz: float = Field(gt=0, allow_inf_nan=False)

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
            The table, with the seconds that the cycles take and the bytes that any machine needs, within the machine's
            capabilities.
        """
        table = CostTable(
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
        return within(self, table)

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
