"""Sensitivities: how much the loss rises when one operand of one layer is given fewer bits, on record."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem import KINDS
from haq.problem.problem import Problem
from haq.store.records import PolicyRecord, SensitivityRecord
from hw_models import BITS
from hw_models.widths import PLACES, places


def check_kind(kind: str) -> str:
    """Return the kind itself. Raises ValueError for one that there isn't."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of sensitivities {kind!r}; it can be {', '.join(KINDS)}")
    return kind


@dataclass(frozen=True)
class Sensitivities:
    """What is known of a network on its data, whatever the target and the budget.

    Attributes:
        kind: "loss": the increase of the loss that policies are judged by. "kl": that of the Kullback-Leibler
            divergence of the outputs from the float network's. "hessian", "gradient": its second-order estimates
            (`by_hessian`, `by_gradient`).
        loss_increases: Nats, shape (decisions, 2, 10), of weights and of activations at widths 1..8, 16 and float with all
            else at `base`; NaN where unknown.
        layers: The names of each decision's layers.
        bits: Smallest and largest width that could be chosen.
        base: Layer name -> (weight bits, activation bits) from which single operands were lowered.
        signature: Network and data (`haq.study.task.LoadedNetwork.signature`).
    """

    kind: str
    loss_increases: NDArray[np.float64]
    layers: tuple[tuple[str, ...], ...]
    bits: tuple[int, int]
    base: Q.BitPolicy
    signature: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> int:
        """Count the increases that are known."""
        return int((~np.isnan(self.loss_increases)).sum())

    def table(self, problem: Problem) -> NDArray[np.float64]:
        """Tell how much every pair of bits raises the loss: the sum of the weights' and the activations' parts.

        What isn't known is scaled from the nearest width that is, or from the other layers, by the quantization error found
        in calibration. More bits are never taken to be worse.

        Args:
            problem: The problem, whose decisions are the rows.

        Returns:
            Nats, shape (decisions, 10, 10).
        """
        increase = self.loss_increases.copy()
        highest = places(largest_widths(problem))
        _fill(increase, problem.quantization_error)
        for decision in range(len(highest)):
            for operand in (0, 1):
                increase[decision, operand, highest[decision, operand] :] = 0.0
        increase = np.maximum.accumulate(increase[:, :, ::-1], axis=2)[:, :, ::-1]
        return increase[:, 0, :, None] + increase[:, 1, None, :]

    def check(self, problem: Problem, signature: dict[str, str], source: Path) -> None:
        """Check that these are sensitivities of a problem's network, data and bits.

        Args:
            problem: The problem.
            signature: Of its network, data and schemes.
            source: The file that these are from, for messages.

        Raises:
            ValueError: Naming the first difference and what to do.
        """
        remedy = "measure them anew, without --sensitivity"
        # What is more than another setting is named first.
        others = (set(signature) | set(self.signature)) - {"data", "network"}
        for name in ("data", "network", *sorted(others)):
            before = self.signature.get(name)
            now = signature.get(name)
            if before != now:
                raise ValueError(
                    f"{source} has sensitivities of another {name}: its signature is {before}, here it is {now}; {remedy}"
                )
        if self.layers != decided_layers(problem):
            raise ValueError(f"{source} has sensitivities of other layers, or of layers tied otherwise; {remedy}")
        if self.bits[0] > problem.bits[0] or self.base != problem.decide(largest_widths(problem)):
            low, high = self.bits
            raise ValueError(
                f"{source} has sensitivities of bits {low}:{high}, here they are {problem.bits[0]}:{problem.bits[1]}: "
                f"choose --bits within {low}:{high} that end at {high}, or {remedy}"
            )

    def to_json(self, path: Path) -> None:
        """Write a file, beside and renamed.

        Args:
            path: The file.
        """
        # What nobody can choose is left out.
        known = PLACES
        if self.bits[1] <= BITS:
            known = BITS
        rows = [
            {"layers": names, "weights": _without_nan(of_weights), "activations": _without_nan(of_activations)}
            for names, (of_weights, of_activations) in zip(self.layers, self.loss_increases[:, :, :known], strict=True)
        ]
        content = {
            "schema": SensitivityRecord.SCHEMA,
            "kind": self.kind,
            "unit": "nats",
            "signature": self.signature,
            "bits": list(self.bits),
            "base": PolicyRecord.of(self.base).to_dict(),
            "loss_increases": rows,
        }
        SensitivityRecord.from_dict(content).write(path)

    @classmethod
    def from_json(cls, path: Path) -> Sensitivities:
        """Read a file that `to_json` wrote.

        Args:
            path: The file.

        Returns:
            The sensitivities.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: With the reason, if it isn't one of sensitivities.
        """
        record = SensitivityRecord.read(path)
        try:
            kind = check_kind(record.kind)
        except ValueError as error:
            raise ValueError(f"{path} is not a file of sensitivities: {error}") from error
        increases = np.array([[row.weights, row.activations] for row in record.loss_increases], float)  # None becomes NaN
        return cls(
            kind,
            _ten_places(increases.reshape(len(increases), 2, -1)),
            tuple(tuple(row.layers) for row in record.loss_increases),
            (record.bits[0], record.bits[1]),
            Q.BitPolicy(record.base.widths()),
            record.signature,
        )


def _ten_places(increases: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give what was written before there were 16 bits and float their places, unknown."""
    missing = PLACES - increases.shape[2]
    return np.pad(increases, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)


def signed(sensitivities: Sensitivities, signature: dict[str, str]) -> Sensitivities:
    """Give sensitivities the signature of the network and data they are of."""
    return replace(sensitivities, signature=signature)


def decided_layers(problem: Problem) -> tuple[tuple[str, ...], ...]:
    """List the names of each decision's layers."""
    names = problem.workload.names
    return tuple(tuple(names[i] for i in decision.layers) for decision in problem.decisions)


def largest_widths(problem: Problem) -> NDArray[np.int64]:
    """Tell the largest widths that can be chosen, shape (decisions, 2). They are always worth it: no pair has more bits."""
    return np.array([decision.pairs.max(0) for decision in problem.decisions])


def _without_nan(values: NDArray[np.float64]) -> list[float | None]:
    """Make plain data of numbers: null where one isn't known."""
    plain: list[float | None] = values.tolist()
    for index in np.flatnonzero(np.isnan(values)):
        plain[index] = None
    return plain


def _fill(increase: NDArray[np.float64], quantization_error: NDArray[np.float64]) -> None:
    """Replace what is NaN, in place, by the error at that width times a ratio of increase and error.

    The ratio is that of the nearest measured width, or else of the median layer.
    """
    error = np.maximum(quantization_error, 1e-12)
    measured = ~np.isnan(increase)
    ratio = increase / error
    for operand in (0, 1):
        known = ratio[:, operand][measured[:, operand]]
        typical = 1.0
        if known.size:
            typical = float(np.median(known))
        for layer in range(len(increase)):
            widths = np.flatnonzero(measured[layer, operand])
            for bits in np.flatnonzero(~measured[layer, operand]):
                scale = typical
                if widths.size:
                    scale = ratio[layer, operand, widths[np.abs(widths - bits).argmin()]]
                increase[layer, operand, bits] = scale * error[layer, operand, bits]
