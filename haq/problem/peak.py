"""The peak of activation memory as a limit: no sum over decisions, but a maximum over moments of sums over buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haq.problem.decision import Decision
from hw_models import Workload

FLOAT_BITS = 32  # what a buffer that no layer reads is held in


@dataclass(frozen=True)
class PeakOfDecisions:
    """The most memory that activations take at one time, as a limit on what decisions take together.

    It is no sum over decisions: a buffer is as wide as the widest of its readers reads it.

    Attributes:
        widths: Activation bits of every option, shape (decisions, options); 0 where a decision has fewer options.
        elements: How many values each buffer holds, shape (buffers,).
        reads: Which decision reads which buffer, shape (buffers, decisions); one that none reads is held in float32.
        alive: Which buffers are held together, shape (moments, buffers).
        limit: Bytes.
    """

    widths: NDArray[np.int64]
    elements: NDArray[np.int64]
    reads: NDArray[np.bool_]
    alive: NDArray[np.bool_]
    limit: float

    @classmethod
    def of(cls, workload: Workload, decisions: Sequence[Decision], batch: int, limit: float) -> PeakOfDecisions:
        """Describe the peak of a workload by its decisions; see `hw_models.storage.peak_activation_bytes`.

        Args:
            workload: Traced layers.
            decisions: What there is to decide.
            batch: Images at a time.
            limit: Bytes.

        Returns:
            The peak; of moments that hold nothing that another one doesn't hold as well only one is kept.
        """
        widths = padded([decision.pairs[:, 1] for decision in decisions], 0).astype(np.int64)
        of_layer = {layer: index for index, decision in enumerate(decisions) for layer in decision.layers}
        first, last, elements = np.array([(b.first, b.last, b.elements * batch) for b in workload.buffers]).T
        reads = np.zeros((len(elements), len(decisions)), bool)
        for row, buffer in zip(reads, workload.buffers, strict=True):
            row[[of_layer[layer] for layer in buffer.readers]] = True
        moments = np.unique(first)[:, None]
        alive = np.unique((first <= moments) & (moments <= last), axis=0)
        within = (alive[:, None] <= alive[None]).all(2)
        return cls(widths, elements, reads, alive[within.sum(1) == 1], limit)

    def sizes(self, widest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of buffers (..., buffers) of which the widest reader's bits are given; 0 bits: no reader."""
        return -(-self.elements * np.where(self.reads.any(1), widest, FLOAT_BITS) // 8)

    def widest(self, options: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bits of every buffer if the first decisions take these options, and no other reads any.

        Of options of shape (..., decisions) it is of shape (..., buffers).
        """
        chosen = np.asarray(options, int)
        count = chosen.shape[-1]
        taken = self.widths[np.arange(count), chosen]
        found: NDArray[np.int64] = np.where(self.reads[:, :count], taken[..., None, :], 0).max(-1, initial=0)
        return found

    def moments(self, widest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes held at each moment (..., moments), for buffers of given bits (..., buffers)."""
        # As floats, whose products are fast; they hold whole numbers up to 2 ** 53 exactly.
        held = self.sizes(widest).astype(float) @ self.alive.T.astype(float)
        return held.astype(np.int64)

    def amount(self, options: Sequence[int]) -> float:
        """Return the bytes of an option for every decision."""
        return float(self.moments(self.widest(options)).max())


def padded(rows: Sequence[Any], value: float) -> NDArray[np.float64]:
    """Make one array of rows of different lengths; the shorter ones end in a value."""
    padded = np.full((len(rows), max(map(len, rows))), value, float)
    for row, given in zip(padded, rows, strict=True):
        row[: len(given)] = given
    return padded
