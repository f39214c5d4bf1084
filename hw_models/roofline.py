"""The roofline: what a data sheet says of a chip, and no more (`model: roofline`).

    model: roofline
    name: my-npu
    description: an NPU of 4 TOPS
    batch: 1                            # images
    peak_tops: {8/8: 4.0, 4/8: 8.0}     # 10^12 operations per second by weights/activations; a multiply-accumulate is two
    bandwidth_gb_per_s: 17.0            # 10^9 bytes per second
    on_chip_bytes: 2097152
    fixed_us: 5                         # per layer, whatever it does

One call of a layer takes the longer of computing and moving, and a fixed time:

    compute   2 MACs images / (peak of the pair x utilisation of the kind of layer)
    memory    traffic / bandwidth
    latency   max(compute, memory) + fixed

as in Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures" (CACM
52(4), 2009): attainable performance is the smaller of the peak and of bandwidth x operational intensity. Which of the three is
the longest is the layer's bound: `compute`, `memory`, or `overhead` for the fixed time.

Traffic. A call reads its weights, reads its input and writes its output, each element at its own width (the output at the
layer's own activation width; what follows may want another). Of a batch, the weights are read once. What doesn't fit on the
chip is fetched again: either the weights are held in parts as large as the on-chip memory and the input streams by once for
each part, or the input is held in parts and the weights stream by, whichever moves less:

    traffic = W + I + O + min(I (ceil(W / M) - 1), W (ceil(I / M) - 1))

in bytes, M = `on_chip_bytes`; each group of a grouped or depthwise layer is on its own. Nothing stays on the chip from one
layer to the next: with W, I and O fetched once this is the metric `memory_traffic`.

Pairs. Only the listed pairs are supported. With `wider: true` a pair that isn't listed is stored as narrow as it is, and
computed by the fastest listed pair that is as wide in both operands: that pair's peak, but the traffic of the true bits.
`float` is wider than any integers. `capabilities:` takes pairs away again, such as those that a depthwise layer can't have.

Energy, if both are given: MACs x `pj_per_mac` of the pair that computes + traffic x `pj_per_byte`.

A peak is an upper limit, so times are lower ones, often far below what is measured: `utilisation` (from 0 to 1, by kind of
layer) is where what is known of real kernels goes. docs/experiments/published_chips.md holds the targets that ship against
published figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from hw_models.capabilities import KINDS, within
from hw_models.cost import CostTable, Floats, Integers
from hw_models.files import quoted
from hw_models.machine import LARGEST, SMALLEST, Chip
from hw_models.storage import storage_bytes
from hw_models.widths import PLACES, WIDTHS, pair_words, place_of, read_pair
from hw_models.workload import Call, Layer, Workload

BOUNDS = ("compute", "memory", "overhead")
TERA, GIGA, MICRO, PICO = 1e12, 1e9, 1e-6, 1e-12

# Bytes of one element by place, down the table for weights and across it for activations.
_WEIGHT_BYTES = np.array(WIDTHS, dtype=np.float64)[:, None] / 8
_ACTIVATION_BYTES = np.array(WIDTHS, dtype=np.float64)[None, :] / 8


class RooflineTarget(Chip):
    """A chip by its data sheet: every field is a key of its YAML file, with its unit in the name."""

    model: Literal["roofline"]
    peak_tops: dict[str, float] = Field(description="10^12 operations per second by pair; a multiply-accumulate is two")
    wider: bool = Field(default=False, description="whether pairs not listed are stored narrow and computed by a wider one")
    bandwidth_gb_per_s: float = Field(gt=0, allow_inf_nan=False, description="10^9 bytes per second")
    on_chip_bytes: int = Field(gt=0, description="what of a layer fits here is fetched once")
    fixed_us: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="per call of a layer, whatever it does")
    utilisation: dict[str, float] = Field(default_factory=dict, description="part of the peak, 0 to 1, by kind of layer")
    pj_per_mac: dict[str, float] | None = Field(default=None, description="energy of a multiply-accumulate by pair")
    pj_per_byte: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="energy of moving a byte")

    @field_validator("peak_tops", "pj_per_mac", mode="before")
    @classmethod
    def _read_pairs(cls, value: Any) -> Any:
        """Write pairs of widths in one form. Raises ValueError for what is none, and for one that is given twice."""
        if not isinstance(value, Mapping):
            return value
        found: dict[str, float] = {}
        for text, number in value.items():
            pair = pair_words(*read_pair(text))
            if pair in found:
                raise ValueError(f"the pair {pair} is given twice, the second time as {quoted(text)}")
            found[pair] = number
        return found

    @field_validator("peak_tops", "pj_per_mac", "utilisation")
    @classmethod
    def _check_numbers(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key, number in (value or {}).items():
            if not SMALLEST <= number <= LARGEST:
                raise ValueError(f"{quoted(key)} is {quoted(number)}, which should be from {SMALLEST:g} to {LARGEST:g}")
        return value

    @field_validator("utilisation")
    @classmethod
    def _check_kinds(cls, value: dict[str, float]) -> dict[str, float]:
        for kind, share in value.items():
            if kind not in KINDS:
                raise ValueError(f"{quoted(kind)} is no kind of layer; known: {', '.join(KINDS)}")
            if share > 1:
                raise ValueError(f"the utilisation of {kind} is {quoted(share)}; it is a part of the peak, at most 1")
        return value

    @model_validator(mode="after")
    def _complete(self) -> RooflineTarget:
        if not self.peak_tops:
            raise ValueError("peak_tops has no pair of widths: give some, such as {8/8: 4.0}")
        if (self.pj_per_mac is None) != (self.pj_per_byte is None):
            raise ValueError("pj_per_mac and pj_per_byte come together: energy is computing and moving")
        if self.pj_per_mac is not None and set(self.pj_per_mac) != set(self.peak_tops):
            raise ValueError(
                f"pj_per_mac has {', '.join(self.pj_per_mac)} and peak_tops {', '.join(self.peak_tops)}: "
                "give both for the same pairs"
            )
        return self

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Price every layer at every pair of widths, for one batch: latency, and energy where it is known.

        Args:
            workload: The layers.
            batch: Images at a time; None is the target's own.

        Returns:
            The table; its counter `traffic_bytes` holds what is moved, rounded up to a byte.

        Raises:
            ValueError: For a batch that isn't a positive integer.
        """
        images = self.images(workload, batch)
        peak, pj_per_mac = self._units()
        shape = (len(workload), PLACES, PLACES)
        terms = np.zeros((len(BOUNDS), *shape))
        latency = np.zeros(shape)
        moved = np.zeros(shape)
        for index, layer in enumerate(workload.layers):
            share = self._utilisation(layer)
            for call in layer.calls:
                operations = 2.0 * layer.weights * call.positions * images
                traffic = self.traffic(layer, call, images)
                compute = operations / (peak * TERA * share)
                memory = traffic / (self.bandwidth_gb_per_s * GIGA)
                fixed = self.fixed_us * MICRO
                latency[index] += np.maximum(compute, memory) + fixed
                terms[:, index] += np.stack([compute, memory, np.full_like(memory, fixed)])
                moved[index] += traffic
        energy = None
        if pj_per_mac is not None and self.pj_per_byte is not None:
            macs = np.array([layer.macs * images for layer in workload.layers])[:, None, None]
            energy = (macs * pj_per_mac + moved * self.pj_per_byte) * PICO
        traffic_bytes: Integers = np.ceil(moved).astype(np.int64)
        table = CostTable(
            target=self.name,
            provenance=self.provenance,
            workload=workload,
            batch=images,
            latency_s=latency,
            energy_j=energy,
            storage_bytes=storage_bytes(workload),
            bound=np.nan_to_num(terms).argmax(0),
            bounds=BOUNDS,
            counters={"traffic_bytes": traffic_bytes},
        )
        return within(self, table)

    def traffic(self, layer: Layer, call: Call, images: int) -> Floats:
        """Count the bytes that one call of a layer moves at every pair of widths; the module has the formula.

        Args:
            layer: The layer.
            call: Its sizes.
            images: The batch.

        Returns:
            Bytes, shape (10, 10).
        """
        read = images * layer.in_channels * call.input_size[0] * call.input_size[1]
        written = images * layer.out_channels * call.positions
        weights = layer.weights / layer.groups * _WEIGHT_BYTES
        inputs = read / layer.groups * _ACTIVATION_BYTES
        of_weights = np.ceil(weights / self.on_chip_bytes)
        of_inputs = np.ceil(inputs / self.on_chip_bytes)
        again = np.minimum(inputs * (of_weights - 1), weights * (of_inputs - 1))
        total: Floats = layer.groups * (weights + inputs + again) + written * _ACTIVATION_BYTES
        return total

    def unit_of(self, w: int, a: int) -> str | None:
        """Return the listed pair that computes a pair of widths (float is 32); None if none does."""
        pair = pair_words(w, a)
        if pair in self.peak_tops:
            return pair
        if not self.wider:
            return None
        holding = []
        for listed in self.peak_tops:
            listed_w, listed_a = read_pair(listed)
            if listed_w >= w and listed_a >= a:
                holding.append(listed)
        if not holding:
            return None
        # Of equally fast ones the narrowest, which takes no more energy.
        return max(holding, key=lambda listed: (self.peak_tops[listed], -sum(read_pair(listed))))

    def _units(self) -> tuple[Floats, Floats | None]:
        """Return the peak and the energy of a multiply-accumulate at every pair, shape (10, 10), NaN where there is none."""
        peak = np.full((PLACES, PLACES), np.nan)
        energy = np.full((PLACES, PLACES), np.nan)
        for w in WIDTHS:
            for a in WIDTHS:
                unit = self.unit_of(w, a)
                if unit is None:
                    continue
                peak[place_of(w), place_of(a)] = self.peak_tops[unit]
                if self.pj_per_mac is not None:
                    energy[place_of(w), place_of(a)] = self.pj_per_mac[unit]
        if self.pj_per_mac is None:
            return peak, None
        return peak, energy

    def _utilisation(self, layer: Layer) -> float:
        """Return the part of the peak that a layer reaches: 1 where nothing is said, the least of the kinds that it is."""
        return min((self.utilisation.get(kind, 1.0) for kind in layer.kinds), default=1.0)
