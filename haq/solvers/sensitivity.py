"""How much the loss rises when one operand of one layer is given fewer bits: what greedy and the integer programme know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.folder import check_schema, read_json, write
from haq.problem import Problem
from haq.solvers.hessian import curvature

if TYPE_CHECKING:
    from haq.solvers import Session

SCHEMA = "haq-sensitivity-1"
KINDS = ("loss", "kl", "hessian")
# A width in the middle says most; from it and the calibrated error the others can be guessed until they are measured. But for
# one bit, where that error is far too kind.
ORDER = (4, 1, 3, 5, 2, 6, 7, 8)
LEAST = 1e-6  # nats: what a rise that drowns in noise is taken for


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
        network and data (`haq.job.Subject.signature`).
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
        rise, highest = self.rises.copy(), _highest(problem)
        _fill(rise, problem.quantization_error)
        for decision in range(len(highest)):
            for operand in (0, 1):
                rise[decision, operand, highest[decision, operand] - 1 :] = 0.0
        rise = np.maximum.accumulate(rise[:, :, ::-1], axis=2)[:, :, ::-1]
        return rise[:, 0, :, None] + rise[:, 1, None, :]

    def check(self, problem: Problem, signature: dict[str, str], source: Path) -> None:
        """Raise ValueError, naming `source`, if these aren't sensitivities of the problem's network, data and bits."""
        way_out = "measure them anew, without --sensitivity"
        for name, value in signature.items():
            if (before := self.signature.get(name)) != value:
                raise ValueError(
                    f"{source} has sensitivities of another {name}: its signature is {before}, here it is {value}; {way_out}"
                )
        if self.layers != _layers(problem):
            raise ValueError(f"{source} has sensitivities of other layers, or of layers tied otherwise; {way_out}")
        if self.bits[0] > problem.bits[0] or self.base != problem.decide(_highest(problem)):
            low, high = self.bits
            raise ValueError(
                f"{source} has sensitivities of bits {low}:{high}, here they are {problem.bits[0]}:{problem.bits[1]}: "
                f"choose --bits within {low}:{high} that end at {high}, or {way_out}"
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


def measure(problem: Problem, session: Session, keep: int) -> NDArray[np.float64]:
    """The rise of the loss (nats) of every decision at every pair of bits, shape (decisions, 8, 8): from what the session
    knows, or else measured, for which all but `keep` of its evaluations may be used, and told to the session."""
    if session.sensitivities is None:
        hessian = session.sensitivity_kind == "hessian"
        session.sensitivities = by_hessian(problem) if hessian else by_evaluation(problem, session, keep)
        session.on_sensitivities(session.sensitivities)
    return session.sensitivities.table(problem)


def by_evaluation(problem: Problem, session: Session, keep: int, also: Sequence[Problem] = ()) -> Sensitivities:
    """Evaluate one policy for each operand and width worth choosing, with everything else at the largest width, as far as all
    but `keep` of the session's evaluations go. `also` are the same problem on other targets, where other widths are worth
    choosing."""
    highest = _highest(problem)
    rise = np.full((len(highest), 2, 8), np.nan)
    pairs = [np.concatenate([same.decisions[i].pairs for same in (problem, *also)]) for i in range(len(highest))]
    wanted = [
        (decision, operand, bits)
        for bits in ORDER
        for decision in range(len(highest))
        for operand in (0, 1)
        if bits < highest[decision, operand] and bits in pairs[decision][:, operand]
    ]
    # Those that can be paid for; within a width from the last layer to the first, so that what comes before the changed layer
    # is already computed (haq/prefix.py).
    affordable = wanted[: max(session.left - keep - 1, 0)]
    affordable.sort(key=lambda item: (ORDER.index(item[2]), -item[0]))
    divergence = session.sensitivity_kind == "kl"

    def loss(pairs: NDArray[np.int64]) -> float:
        result = session.evaluate(problem.decide(pairs))
        if not divergence:
            return result.loss
        if result.divergence is None:
            raise ValueError("the evaluator has no teacher to tell the divergence from")
        return result.divergence

    def changed(decision: int, operand: int, bits: int) -> NDArray[np.int64]:
        pairs = highest.copy()
        pairs[decision, operand] = bits
        return pairs

    if affordable:
        session.expect(map(problem.decide, [highest, *(changed(*item) for item in affordable)]))
    base = None
    for decision, operand, bits in affordable:
        if session.left <= keep + (base is None):
            break
        if base is None:
            base = loss(highest)
        rise[decision, operand, bits - 1] = max(loss(changed(decision, operand, bits)) - base, LEAST)
    # Judged by agreement, the loss is the divergence.
    kind = "kl" if divergence or problem.reward == "agreement" else "loss"
    return _sensitivities(problem, kind, rise)


def by_hessian(problem: Problem) -> Sensitivities:
    """HAWQ-V2's sensitivities (Dong et al., NeurIPS 2020, equation 2), which cost no evaluation: the average Hessian trace of
    a layer's weight times the squared error of its quantization, |Q(W) - W|^2, and likewise for its input; halved, as in the
    second-order expansion of the loss, so that they are nats. Traces are taken on the calibration images
    (`hessian.curvature`), errors as calibration found them."""
    layers = Q.quant_layers(problem.evaluator.network)
    bent = curvature(problem.network, problem.workload.names, problem.calibration)
    halves = {}
    for name in problem.workload.names:
        layer, bend = layers[name], bent[name]
        of_weight = bend.weight * float(layer.weight.detach().double().square().sum())
        of_input = sum(trace * power for trace, power in bend.inputs)
        errors = np.array([layer.weight_error.tolist(), layer.activation_error.tolist()])
        halves[name] = 0.5 * np.array([[of_weight], [of_input]]) * errors
    rise = np.array([sum(halves[name] for name in names) for names in _layers(problem)])
    # What the base leaves is no rise.
    highest = _highest(problem)[:, :, None] - 1
    rise = np.maximum(rise - np.take_along_axis(rise, highest, 2), LEAST)
    return _sensitivities(problem, "hessian", rise)


def check_kind(kind: str) -> str:
    """The kind itself. Raises ValueError for one that there isn't."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of sensitivities {kind!r}; it can be {', '.join(KINDS)}")
    return kind


def signed(sensitivities: Sensitivities, signature: dict[str, str]) -> Sensitivities:
    """The same, with the signature of the network and data they are of."""
    return replace(sensitivities, signature=signature)


def _sensitivities(problem: Problem, kind: str, rises: NDArray[np.float64]) -> Sensitivities:
    return Sensitivities(kind, rises, _layers(problem), problem.bits, problem.decide(_highest(problem)))


def _layers(problem: Problem) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(problem.workload.names[i] for i in decision.layers) for decision in problem.decisions)


def _highest(problem: Problem) -> NDArray[np.int64]:
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
