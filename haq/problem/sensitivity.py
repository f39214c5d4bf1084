"""Sensitivities: how much the loss rises when one operand of one layer is given fewer bits, on record."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.problem import Problem
from haq.store.files import check_schema, read_json, write

SCHEMA = "haq-sensitivity-1"
KINDS = ("loss", "kl", "hessian")


def check_kind(kind: str) -> str:
    """The kind itself. Raises ValueError for one that there isn't."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of sensitivities {kind!r}; it can be {', '.join(KINDS)}")
    return kind


@dataclass(frozen=True)
class Sensitivities:
    """What is known of a network on its data, whatever the target and the budget.

    kind
        "loss": the rise of the loss that policies are judged by. "kl": that of the Kullback-Leibler divergence of the outputs
        from the float network's. "hessian": its second-order estimate (`by_hessian`).
    rises
        nats, shape (decisions, 2, 8), of weights and of activations at widths 1..8 with all else at `base`; NaN where unknown.
    layers
        the names of each decision's layers.
    bits
        smallest and largest width that could be chosen.
    base
        layer name -> (weight bits, activation bits) from which single operands were lowered.
    signature
        network and data (`haq.study.task.LoadedNetwork.signature`).
    """

    kind: str
    rises: NDArray[np.float64]
    layers: tuple[tuple[str, ...], ...]
    bits: tuple[int, int]
    base: Q.BitPolicy
    signature: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> int:
        """How many rises are known."""
        return int((~np.isnan(self.rises)).sum())

    def table(self, problem: Problem) -> NDArray[np.float64]:
        """The rise (nats) of every decision at every pair of bits, shape (decisions, 8, 8), taken as a sum of the weights' and
        the activations' parts.

        What isn't known is scaled from the nearest width that is, or from the other layers, by the quantization error found
        in calibration. More bits are never taken to be worse.
        """
        rise, highest = self.rises.copy(), largest_widths(problem)
        _fill(rise, problem.noise)
        for decision in range(len(highest)):
            for operand in (0, 1):
                rise[decision, operand, highest[decision, operand] - 1 :] = 0.0
        rise = np.maximum.accumulate(rise[:, :, ::-1], axis=2)[:, :, ::-1]
        return rise[:, 0, :, None] + rise[:, 1, None, :]

    def check(self, problem: Problem, signature: dict[str, str], source: Path) -> None:
        """Raise ValueError, naming `source`, if these aren't sensitivities of the problem's network, data and bits."""
        remedy = "measure them anew, without --sensitivity"
        for name, value in signature.items():
            if (before := self.signature.get(name)) != value:
                raise ValueError(
                    f"{source} has sensitivities of another {name}: its signature is {before}, here it is {value}; {remedy}"
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
        """Write a file, beside and renamed."""
        content = {
            "schema": SCHEMA,
            "kind": self.kind,
            "unit": "nats",
            "signature": self.signature,
            "bits": list(self.bits),
            "base": {name: list(bits) for name, bits in self.base.items()},
            "rises": [
                {"layers": names, "weights": _without_nan(of_weights), "activations": _without_nan(of_activations)}
                for names, (of_weights, of_activations) in zip(self.layers, self.rises, strict=True)
            ],
        }
        write(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: Path) -> Sensitivities:
        """Read a file. Raises FileNotFoundError, or ValueError with the reason if it isn't one of sensitivities."""
        content = read_json(path, "a file of sensitivities")
        check_schema(path, content.get("schema"), SCHEMA, "a file of sensitivities")
        try:
            rows = content["rises"]
            values = [value for row in rows for key in ("weights", "activations") for value in row[key]]
            if wrong := [value for value in values if value is not None and not _is_rise(value)]:
                raise ValueError(f"a rise is {str(wrong[0])[:40]}, not a number of nats from 0 or null")
            rises = np.array([[row["weights"], row["activations"]] for row in rows], float)  # None becomes NaN
            if rises.shape != (len(rows), 2, 8):
                raise ValueError(f"the rises have shape {rises.shape}, not (decisions, 2, 8)")
            low, high = content["bits"]
            if not all(isinstance(value, str) for value in content["signature"].values()):
                raise ValueError("its signature must map names to text")
            return cls(
                check_kind(content["kind"]),
                rises,
                tuple(tuple(row["layers"]) for row in rows),
                (int(low), int(high)),
                Q.BitPolicy({name: tuple(bits) for name, bits in content["base"].items()}),
                content["signature"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of sensitivities: {error}") from error


def signed(sensitivities: Sensitivities, signature: dict[str, str]) -> Sensitivities:
    """The same, with the signature of the network and data they are of."""
    return replace(sensitivities, signature=signature)


def decided_layers(problem: Problem) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(problem.workload.names[i] for i in decision.layers) for decision in problem.decisions)


def largest_widths(problem: Problem) -> NDArray[np.int64]:
    """The largest widths that can be chosen, shape (decisions, 2). They are always worth it: no pair has more bits."""
    return np.array([decision.pairs.max(0) for decision in problem.decisions])


def _is_rise(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30


def _without_nan(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _fill(rise: NDArray[np.float64], noise: NDArray[np.float64]) -> None:
    """Replace NaN by noise x (rise / noise) of the nearest measured width, or of the median layer, in place."""
    error = np.maximum(noise, 1e-12)
    measured = ~np.isnan(rise)
    ratio = rise / error
    for operand in (0, 1):
        known = ratio[:, operand][measured[:, operand]]
        typical = float(np.median(known)) if known.size else 1.0
        for layer in range(len(rise)):
            widths = np.flatnonzero(measured[layer, operand])
            for bits in np.flatnonzero(~measured[layer, operand]):
                near = widths[np.abs(widths - bits).argmin()] if widths.size else None
                scale = typical if near is None else ratio[layer, operand, near]
                rise[layer, operand, bits] = scale * error[layer, operand, bits]
