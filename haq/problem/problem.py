"""A problem: network + data + hardware + budget, all that a solver needs to look for a policy."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq.data.memory import allowed_bytes
from haq.problem.batches import (
    Batches,
    Owned,
    check_alike,
    check_arguments,
    check_quantization,
    gathered,
    gathered_calibration,
    read_any,
    read_inputs,
    read_tensors,
)
from haq.problem.budget import ROUNDING, OutOfReach, parse_budget
from haq.problem.decision import Decision, joined, priced
from haq.problem.device import compute_exactly, find_device
from haq.problem.evaluator import Evaluation, Evaluator, evaluation_mode
from haq.problem.objective import AnyObjective, BlackBox, Objective, described, find_objective
from haq.problem.samples import KeptSamples, Samples, outputs_of, pieces, samples_in
from haq.problem.schemes import (
    AnyScheme,
    check_metric,
    check_rounding,
    check_widths,
    check_zero_points,
    linear_for,
    meaningful_metrics,
    meaningful_pairs,
    overhead_bytes,
    roundings_by_layer,
    schemes_by_layer,
)
from haq.store.units import DOWN, PERCENT, UP, describe_amount, show
from hw_models.notebook import html_table
from hw_models.registry import printable
from hw_models.target import price
from quantizers.calling import Forward, device_of, inputs_of, leaves, map_tensors, takes, targets_of, to_device
from quantizers.observers import OnProgress, no_progress
from quantizers.policy import QUANTIZABLE

REPEATED = 1e-3  # of an output's size: what it may differ by from call to call, in sums of another order
TOP = Q.MAX_BITS - 1  # index of the largest width in a table


class NotAllowed(ValueError):
    """A policy leaves a problem: its layers, its widths, what is pinned or what is tied."""


class Problem:
    """Find the policy that is best on held-out images and whose cost on a hardware target is within a budget.

    Attributes:
        network: The float network that was given.
        workload: Its layers.
        schemes: The quantization scheme of every layer, by name.
        roundings: How the weights of every layer are rounded, "nearest" or "gptq", by name.
        target: The hardware target.
        table: Its cost table for the workload.
        cost: Costs in the metric's unit, shape (layers, 8, 8), indexed [layer, weight bits - 1, activation bits - 1]; for a
            pair that the target can't do (`table.supported`), which nobody may choose, what the layer costs at most.
        decisions: The layers that decide together, with the pairs of bits worth choosing: within `bits`, with a meaning in the
            scheme, and without those that cost as much as a pair with more bits.
        limit: The budget in the metric's unit.
        reference: The cost of uniform 8 bits, of which a budget can be a fraction if the target can do them.
        smallest: The least that a policy can cost.
        layer_errors: The relative squared error that each width of weights (0) and of activations (1) leaves, from
            calibration, shape (layers, 2, 8).
        quantization_error: The same of every decision, the mean over its layers, shape (decisions, 2, 8).
        objective: What policies are judged by.
        calibration: The batches that set the scales.
        forward: Computes outputs of (network, batch); None: the network is called with the inputs.
        evaluator: Evaluates policies.
        float_result: The evaluation of the float network.
    """

    def __init__(
        self,
        network: nn.Module,
        calibrate: Batches,
        search: Batches | Samples | None,
        target: str | hw_models.Target,
        metric: str = "latency",
        budget: float | str = 0.5,
        *,
        bits: tuple[int, int] = (2, 8),
        pinned: Mapping[str, tuple[int, int]] | None = None,
        tied: Iterable[Iterable[str]] = (),
        batch: int | None = None,
        objective: AnyObjective = "accuracy",
        scheme: AnyScheme = "linear",
        tune: Callable[[nn.Module], nn.Module] | None = None,
        correction: str | None = "analytic",
        rounding: str = "nearest",
        forward: Forward | None = None,
        memory: str | int | None = None,
        device: str | torch.device | None = None,
        on_progress: OnProgress = no_progress,
    ) -> None:
        """Trace and price a network, calibrate its quantizers, and evaluate it in float.

        A batch is a tensor of inputs, a pair (inputs, targets), or a mapping by the names of the network's arguments. Inputs
        and targets may be of any structure of tensors. A tuple of inputs, and a mapping, are given to the network one by one.

        Args:
            network: Any; it is copied, never changed.
            calibrate: Inputs that set the activation scales: a tensor or a NumPy array, a Dataset, a DataLoader, or another
                iterable of batches; targets beside them play no part. All there is is kept in memory. Floats become float32.
            search: Held-out inputs and targets, for classification class numbers (integers of any type, shape (samples,)): a
                pair of tensors, a Dataset of pairs (input, target), a DataLoader, or another iterable of such batches. Inputs
                alone are enough for an objective that needs no targets, and None for one that is given the network. Kept in
                memory. Floats become float32.
            target: A hardware target, or the name of one (`hw_models.load_target`).
            metric: "latency", "energy" or "storage".
            budget: A number is a fraction of the uniform 8-bit network's cost; a string has a unit ("12ms", "40kB").
            bits: Smallest and largest width that a solver may choose.
            pinned: Layer name -> (weight bits, activation bits) that no solver may change; default: first and last layer at 8
                bits.
            tied: Groups of layer names; the layers of a group take the same bits.
            batch: Images at a time on the target; None takes the target's own batch.
            objective: What policies are judged by: a name of `haq.problem.OBJECTIVES`, `module:Name`, an objective, such as
                `haq.problem.objective.RobustAccuracy(attack)`, a metric of torchmetrics, a function of (outputs, targets) that
                returns a value for every sample, or a function of the network that returns a number.
            scheme: How values become few-bit ones: a name or a scheme for all layers, or one by layer name; layers that such a
                mapping leaves out have the linear scheme. The name "linear" stands for `Linear(calibration="output")`, and
                for `Linear()` where weights are rounded to nearest without correction.
            tune: What is done to the quantized network, at a policy's bits, before it is judged: takes it and returns a tuned
                copy.
            correction: Of what rounding weights adds to a layer's mean output: "analytic", or None; see `quantizers.quantize`.
                Every evaluation and all sensitivities are of the corrected network.
            rounding: Of weights, likewise: "nearest", or "gptq" in all layers that it means something in and for which
                `calibrate` has enough images (`roundings`).
            forward: Computes outputs of (network, batch), where that takes more than calling the network with the inputs; the
                batch is as the loader gives it, on the network's device.
            memory: How much the samples of `search` may take in memory, such as "4GB", or bytes; None: a quarter of the
                machine's. What doesn't fit is read anew for every policy, in advance.
            device: Where everything is computed: "cpu", "cuda", "cuda:1", "mps"; None: where the network is. On a GPU float32
                is computed as such from then on in this process, not as TF32.
            on_progress: Told how many of how many steps of calibration are done.

        Raises:
            OutOfReach: A ValueError, for a budget out of reach, naming the reachable range.
            ValueError: For whatever can't be, such as a width that means nothing in a scheme; before anything is computed.
        """
        check_arguments(network, target, metric, bits, pinned)
        check_quantization(correction, rounding)
        allowed_bytes(memory, "`memory`")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward is {forward!r}; it must be a function of (network, batch), or None")
        self.objective = find_objective(objective)
        self.forward = forward
        network = _on_device(network, device)
        device = device_of(network)
        samples = _read_search(search, network, self.objective, forward, memory)
        if samples is not None:
            samples = samples.to(device)
        # Batches of inputs. Copies, which stay what they are whoever changes the others.
        self.calibration = _read_calibration(gathered_calibration(calibrate, "calibrate", memory), network, forward, device)
        self.network = network
        example = to_device(_example(samples, self.calibration), device)
        self.workload = _traced(network, example, self.objective, forward)
        if forward is None:
            _check_same_kind(self.calibration, example, network)
        else:
            _check_forward(forward, self.calibration[0], network)
        self.metric = metric
        self.unit = hw_models.UNITS.get(metric, "")
        self.bits = _checked_range(bits)
        self.batch = batch
        self.pinned = self._pinned(pinned)
        self.groups = self._groups(tied)
        if metric == "storage":
            self.groups = joined(self.groups, self.workload.tied_weights)
        self.schemes = schemes_by_layer(scheme, self.workload.names, linear_for(correction, rounding))
        check_rounding(rounding, self.schemes, self.pinned)
        check_widths(self.schemes, self.bits, self.pinned)
        check_metric(self.schemes, metric)
        self._meaningful = meaningful_pairs(self.schemes, {})
        self._price(target)
        self.limit = self._limit(budget)
        count = sum(map(samples_in, self.calibration))
        self.roundings = roundings_by_layer(rounding, self.schemes, self.workload, count)
        with evaluation_mode(network):
            qnetwork = Q.quantize(
                network,
                self.uniform(Q.MAX_BITS),
                scheme=self.schemes,
                calibrate=self.calibration,
                correction=correction,
                rounding=self.roundings,
                on_progress=on_progress,
                forward=forward,
            )
        layers = {name: Q.quant_layers(qnetwork)[name] for name in self.workload.names}
        self._restrict({name: layer.signed for name, layer in layers.items()}, budget)
        errors = [self.schemes[name].quantization_errors(layer) for name, layer in layers.items()]
        self.layer_errors = np.array([[of_weights.tolist(), of_inputs.tolist()] for of_weights, of_inputs in errors])
        self.quantization_error = np.array([self.layer_errors[list(group)].mean(0) for group in self.groups])
        with evaluation_mode(network):
            with _no_other_layers(network, self.workload.names):
                self.evaluator = Evaluator(
                    qnetwork, samples, teacher=network, tune=tune, objective=self.objective, forward=forward
                )
            self.float_result = self.evaluator.measure_teacher()
        _check_share(self.objective, self.float_result.value)

    def __repr__(self) -> str:
        """Say on one line what is searched."""
        schemes = ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes.values()))
        low, high = self.bits
        return (
            f"Problem({len(self.workload)} layers on {self.target.name}, {self._budget_words()}, bits {low}:{high}, "
            f"scheme {schemes}, objective {self.objective.name}, float {show(self.float_accuracy, self.objective.unit)})"
        )

    def _repr_html_(self) -> str:
        """Make a table of it for a notebook."""
        schemes = ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes.values()))
        low, high = self.bits
        rows = {
            "network": f"{type(self.network).__name__}, {len(self.workload)} layers, {self.workload.macs / 1e6:.2f} M MACs",
            "target": f"{self.target.name}: {self.target.description}; {self.table.provenance}",
            "budget": self._budget_words(),
            "bits": f"{low} to {high}",
            "scheme": schemes,
            "objective": f"{self.objective.words}{self.count_words(', on ')}",
            "float network": show(self.float_accuracy, self.objective.unit),
        }
        if self.workload.unpriced:
            rows["not priced"] = self.workload.unpriced_words
        return html_table("Problem", ("", ""), rows.items())

    def on(self, target: str | hw_models.Target, budget: float | str) -> Problem:
        """Put the same problem on another target, within another budget.

        Both share what the value of a policy depends on (the network, the images, the scales) and everything evaluated.

        Args:
            target: A hardware target, or the name of one.
            budget: See `Problem`.

        Raises:
            ValueError: As `Problem` does.
        """
        made = copy.copy(self)
        if target is not self.target:
            made._price(target)
        made.limit = made._limit(budget)
        return made

    def _price(self, target: str | hw_models.Target) -> None:
        """Set all that depends on the target."""
        if isinstance(target, str):
            target = hw_models.load_target(target)
        self.target = target
        check_zero_points(self.schemes, target)
        table = price(target, self.workload, self.batch)
        overhead = overhead_bytes(self.schemes, self.workload)
        if overhead.any():
            table = dataclasses.replace(table, storage_bytes=table.storage_bytes + overhead)
        self.table = table
        self.cost = priced(table, self.metric)
        self.reference = float(self.cost[:, TOP, TOP].sum())
        self._choose()

    def _choose(self) -> None:
        """Set what can be chosen, and the least that it can cost."""
        self.decisions = self._decisions(self._allowed(*self.bits))
        self.smallest = self._smallest(self.decisions)

    def _restrict(self, signed: Mapping[str, bool], budget: float | str) -> None:
        """Leave out pairs of bits that mean nothing to a scheme now that calibration has seen each layer's input."""
        meaningful = meaningful_pairs(self.schemes, signed)
        if not np.array_equal(meaningful, self._meaningful):
            self._meaningful = meaningful
            self._choose()
            self.limit = self._limit(budget)

    @property
    def budget(self) -> float:
        """Return the budget as a fraction of the uniform 8-bit network's cost."""
        return self.limit / self.reference

    def _budget_words(self) -> str:
        return f"{self.metric} within {describe_amount(self.limit, self.metric)} ({self.budget:.3g} of {self.reference_words})"

    @property
    def reference_words(self) -> str:
        """Say what `reference` is the cost of."""
        if self._does_8_bits:
            return "uniform 8 bits"
        return "8 bits, and the dearest pair where they can't be done"

    @property
    def _does_8_bits(self) -> bool:
        """Whether the target can do 8 bits in every layer."""
        return bool(self.table.supported[:, TOP, TOP].all())

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metrics that the target has and that mean something in the schemes."""
        return meaningful_metrics(self.schemes, self.table.metrics)

    @property
    def reach(self) -> str:
        """Say in words which budgets can be met."""
        # Rounded inwards, so that what we name is what we accept.
        low = describe_amount(self.smallest, self.metric, UP)
        high = describe_amount(self.largest, self.metric, DOWN)
        from_one_bit = self._smallest(self._decisions(self._allowed(1, self.bits[1])))
        fraction = np.ceil(1000 * self.smallest / self.reference) / 1000
        at_one_bit = np.ceil(1000 * from_one_bit / self.reference) / 1000
        further = ""
        if at_one_bit < fraction:
            further = f"; bits 1:{self.bits[1]} would reach {at_one_bit:.3f}"
        if not self._does_8_bits:
            # Fractions are no budgets then.
            if further:
                further = f"; bits 1:{self.bits[1]} would reach {describe_amount(from_one_bit, self.metric, UP)}"
            return f"on {self.target.name}, {self.metric} can be from {low} to {high}{further}"
        least = f"{low} ({fraction:.3f} of uniform 8 bits)"
        return f"on {self.target.name}, {self.metric} can be from {least} to {high} (1.0){further}"

    @property
    def samples_are(self) -> str:
        """Name what policies are judged on: images, or samples where inputs are anything else."""
        inputs = inputs_of(self.calibration[0], self.network)
        if isinstance(inputs, Tensor) and inputs.dim() == 4 and (inputs.is_floating_point() or inputs.dtype == torch.uint8):
            return "images"
        return "samples"

    def count_words(self, before: str, split: str = "") -> str:
        """Say on how many samples policies are judged, with words before and their split; nothing if there are none."""
        if not self.evaluator.count:
            return ""
        return f"{before}{self.evaluator.count:,} {split}{self.samples_are}"

    @property
    def float_accuracy(self) -> float:
        """Return the objective's value of the float network, on the search samples."""
        return self.float_result.accuracy

    def uniform(self, bits: int, *, keep_pinned: bool = False) -> Q.BitPolicy:
        """Make the policy with the same width everywhere.

        Args:
            bits: The width.
            keep_pinned: Whether pinned layers keep their own.
        """
        pairs = dict.fromkeys(self.workload.names, (bits, bits))
        if keep_pinned:
            pairs |= self.pinned
        return Q.BitPolicy(pairs)

    def policy(self, w_bits: Iterable[int], a_bits: Iterable[int]) -> Q.BitPolicy:
        """Make a policy of two sequences of bits in the order of the workload."""
        pairs = zip(self.workload.names, w_bits, a_bits, strict=True)
        return Q.BitPolicy({name: (int(w), int(a)) for name, w, a in pairs})

    def decide(self, pairs: Iterable[Iterable[int]]) -> Q.BitPolicy:
        """Make a policy of one pair of bits for each of the decisions."""
        bits = np.empty((len(self.workload), 2), int)
        for group, pair in zip(self.groups, pairs, strict=True):
            bits[list(group)] = tuple(pair)
        return self.policy(*bits.T)

    def bit_arrays(self, policy: Mapping[str, tuple[int | None, int | None]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return weight bits and activation bits of a policy, in the order of the workload."""
        pairs = np.array([policy[name] for name in self.workload.names])
        return pairs[:, 0], pairs[:, 1]

    def policy_cost(self, policy: Mapping[str, tuple[int | None, int | None]]) -> float:
        """Return the cost of a policy in the metric's unit; infinity if the target can't do it."""
        w, a = self.bit_arrays(policy)
        cells = (np.arange(len(w)), w - 1, a - 1)
        if not self.table.supported[cells].all():
            return math.inf  # it can be evaluated, as sensitivities need it, and is in no budget
        return float(self.cost[cells].sum())

    def means_something(self, policy: Mapping[str, tuple[int | None, int | None]]) -> bool:
        """Say whether every layer's bits have a meaning in its scheme, and can be done by the target."""
        w, a = self.bit_arrays(policy)
        return bool((self._meaningful & self.table.supported)[np.arange(len(w)), w - 1, a - 1].all())

    def check_policy(self, policy: object) -> None:
        """Check that a policy is one of this problem's, whatever it costs.

        Args:
            policy: What somebody wants to be evaluated.

        Raises:
            NotAllowed: A ValueError, naming the layer, its bits and what is allowed: for anything but a policy of just these
                layers, each at widths that may be chosen, pinned layers at their own and tied ones at the same.
        """
        if not isinstance(policy, Q.BitPolicy):
            raise NotAllowed(f"a policy must be a quantizers.BitPolicy, not {type(policy).__name__}: problem.policy makes one")
        names = self.workload.names
        if differing := sorted(set(policy) ^ set(names)):
            raise NotAllowed(
                f"the policy must name the workload's layers, and only those; {differing[0]!r} is in one of the two only"
            )
        for index, name in enumerate(names):
            self._check_pair(index, policy[name])
        for group in self.groups:
            for other in group[1:]:
                first, second = names[group[0]], names[other]
                if policy[first] != policy[second]:
                    raise NotAllowed(
                        f"layers {first!r} and {second!r} are tied and take the same bits, not {_words(policy[first])} and "
                        f"{_words(policy[second])}"
                    )

    def _check_pair(self, index: int, pair: tuple[int | None, int | None]) -> None:
        """Raise NotAllowed for bits that a layer may not take; see `check_policy`."""
        name = self.workload.names[index]
        refused = f"layer {name!r} can't take {_words(pair)} (weights/activations)"
        if name in self.pinned:
            if pair != self.pinned[name]:
                raise NotAllowed(f"{refused}: it is pinned at {_words(self.pinned[name])}")
            return
        w, a = pair
        low, high = self.bits
        if w is None or a is None or not (low <= w <= high and low <= a <= high):
            raise NotAllowed(f"{refused}: {low} to {high} bits are allowed")
        if not self._meaningful[index, w - 1, a - 1]:
            raise NotAllowed(f"{refused}: its scheme {self.schemes[name].name!r} has no such pair")

    def within_budget(self, cost: float) -> bool:
        """Say whether a cost is within the budget, but for rounding."""
        return cost <= self.limit * (1 + ROUNDING)

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Say which policies will be evaluated, so that a pool of workers, if there is one, can begin."""
        self.evaluator.expect(policies)

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Tell the objective's value (`accuracy`) and the loss of a policy on the search samples."""
        return self.evaluator.evaluate(policy)

    def quantized(self, policy: Q.BitPolicy) -> nn.Module:
        """Make a copy of the calibrated quantized network, at the bits of a policy, that can be trained."""
        made = Q.copy_network(self.evaluator.network)
        floats = dict(self.network.named_parameters())
        for name, parameter in made.named_parameters():
            # Those that are no float network's are what a scheme learns.
            parameter.requires_grad_(name not in floats or floats[name].requires_grad)
        Q.set_policy(made, policy)
        return made.eval()

    def _pinned(self, pinned: Mapping[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
        names = self.workload.names
        if pinned is None:
            return dict(Q.ends(names))  # type: ignore[arg-type]
        chosen = dict(pinned)
        if unknown := sorted(set(chosen) - set(names)):
            raise ValueError(f"pinned layer {unknown[0]!r} is not in the workload: {', '.join(names)}")
        Q.BitPolicy(chosen)
        return chosen

    def _groups(self, tied: Iterable[Iterable[str]]) -> list[tuple[int, ...]]:
        """List the layers that decide together, by their place in the workload; each is in one group."""
        names = self.workload.names
        made = []
        for group in map(list, tied):
            if unknown := [name for name in group if name not in names]:
                raise ValueError(f"tied layer {unknown[0]!r} is not in the workload: {', '.join(names)}")
            made.append(tuple(sorted(names.index(name) for name in group)))
        seen = [layer for group in made for layer in group]
        if twice := [names[layer] for layer in seen if seen.count(layer) > 1]:
            raise ValueError(f"layer {twice[0]!r} is tied twice: join the groups")
        alone = [(index,) for index in range(len(names)) if index not in seen]
        return sorted([*filter(None, made), *alone])

    def _decisions(self, allowed: NDArray[np.bool_]) -> list[Decision]:
        cost = np.array([self.cost[list(group)].sum(0) for group in self.groups])
        together = np.array([allowed[list(group)].all(0) for group in self.groups])
        if not together.any((1, 2)).all():
            group = self.groups[int(np.argmin(together.any((1, 2))))]
            if len(group) == 1:
                low, high = self.bits
                raise ValueError(
                    f"layer {self.workload.names[group[0]]!r} has no pair of bits within {low} to {high} that its scheme has "
                    f"and {self.target.name} can do"
                )
            raise ValueError(f"tied layers {', '.join(self.workload.names[i] for i in group)} have no pair of bits in common")
        worth = hw_models.undominated(cost, together)
        return [Decision(*part) for part in zip(self.groups, map(_pairs, worth), map(np.extract, worth, cost), strict=True)]

    @staticmethod
    def _smallest(decisions: list[Decision]) -> float:
        return float(sum(decision.prices.min() for decision in decisions))

    def _allowed(self, low: int, high: int) -> NDArray[np.bool_]:
        """Tell which pairs may be chosen if widths may be from `low` to `high`, shape (layers, 8, 8)."""
        allowed = self._meant(low, high)
        for name, (w, a) in self.pinned.items():
            index = self.workload.names.index(name)
            if not self.table.supported[index, w - 1, a - 1]:
                raise ValueError(
                    f"layer {name!r} is fixed at {w}/{a} (weights/activations), which {self.target.name} can't do: "
                    "pin it at another pair"
                )
            row = allowed[index]
            row[:] = False
            row[w - 1, a - 1] = True
        return allowed

    @property
    def largest(self) -> float:
        """Return the largest budget: what uniform 8 bits cost, or the least that a policy does where that is more."""
        return max(self.reference, self.smallest)

    def _meant(self, low: int, high: int) -> NDArray[np.bool_]:
        """Tell which pairs of widths from `low` to `high` mean something to the layers' schemes, shape (layers, 8, 8)."""
        meant = np.zeros(self.cost.shape, bool)
        meant[:, low - 1 : high, low - 1 : high] = True
        return meant & self._meaningful & self.table.supported

    def _limit(self, budget: float | str) -> float:
        limit = parse_budget(budget, self.metric, self.reference)
        # An amount doesn't depend on what it is a fraction of.
        if not self._does_8_bits and limit != parse_budget(budget, self.metric, 2 * self.reference):
            layer = self.workload.names[int(np.argmin(self.table.supported[:, TOP, TOP]))]
            raise ValueError(
                f"budget {budget} is a fraction of uniform 8 bits, which {self.target.name} can't do in layer {layer!r}: "
                "give an amount with a unit"
            )
        # Tables round the cost of 8 bits to the nearest, and what they say of it is a budget too.
        highest = parse_budget(describe_amount(self.largest, self.metric, UP), self.metric, self.reference)
        if limit < self.smallest * (1 - ROUNDING) or limit > highest * (1 + ROUNDING):
            raise OutOfReach(f"budget {budget} is out of reach: {self.reach}{self._because_pinned(limit)}")
        return min(limit, self.largest)

    def _because_pinned(self, limit: float) -> str:
        """Name the pinned layers, if it is for them that a budget is out of reach; nothing otherwise."""
        if limit >= self.smallest * (1 - ROUNDING) or not self.pinned:
            return ""
        without = self._smallest(self._decisions(self._meant(*self.bits)))
        if limit < without * (1 - ROUNDING):
            return ""
        names = " and ".join(f"{name!r} at {_words(pair)}" for name, pair in self.pinned.items())
        least = describe_amount(without, self.metric, UP)
        return f"; that is for the pinned layers, {names}: without them (pinned={{}} in Python) it could be from {least}"


def _check_share(objective: Objective, value: float) -> None:
    """Raise ValueError for a value that is no share, of an objective that says that its values are."""
    if objective.unit == PERCENT and math.isfinite(value) and not 0 <= value <= 1:
        raise ValueError(
            f"objective {objective.name!r} has the unit '%' and gave {value:g} for the float network: values of that unit are "
            "shares from 0 to 1, which are shown in percent; divide them by 100, or give another unit"
        )


def _read_search(
    search: Any, network: nn.Module, objective: Objective, forward: Forward | None, memory: str | int | None
) -> Samples | None:
    """Read what policies are judged on.

    Args:
        search: What a user has.
        network: What it is for.
        objective: What policies are judged by.
        forward: As `Problem` takes it.
        memory: Likewise.

    Returns:
        The samples, with their targets if the objective needs them; None if there are none and the objective needs none.

    Raises:
        TypeError, ValueError: As `haq.problem.batches` does, and for missing targets.
    """
    if isinstance(search, Samples):
        return search
    if search is None and isinstance(objective, BlackBox):
        return None
    search = gathered(search, "search", memory)
    if isinstance(search, Samples):
        return search
    batches = read_any(search, "search")
    if objective.takes_scores and forward is None and _is_plain(batches or [search], network):
        inputs, labels = read_tensors(batches or search, "search", objective.needs_labels)
        if labels is None:
            return KeptSamples([inputs])
        return KeptSamples([(inputs, labels)])
    if batches is None:
        batches = [search]
    batches = [_as_float32(batch) for batch in batches]
    if objective.needs_labels and any(targets_of(batch, network) is None for batch in batches):
        raise ValueError(
            f"`search` has no targets, which objective {objective.name!r} needs, beside what the network takes: give batches "
            "(inputs, targets), of several inputs ((one, other), targets)"
        )
    return KeptSamples(batches)


def _read_calibration(calibrate: Any, network: nn.Module, forward: Forward | None, device: torch.device) -> list[Any]:
    """Read batches that set the scales, on a device; those of plain tensors without their targets."""
    if isinstance(calibrate, Owned):
        return [to_device(batch, device) for batch in calibrate]
    batches = read_any(calibrate, "calibrate")
    if batches is None or (forward is None and _is_plain(batches, network)):
        return [part.to(device, copy=True) for part in read_inputs(batches or calibrate, "calibrate")]
    return [to_device(map_tensors(_as_float32(batch), torch.clone), device) for batch in batches]


def _example(samples: Samples | None, calibration: list[Any]) -> Any:
    """Return a batch by which the network is traced."""
    if samples is None:
        return KeptSamples(calibration[:1]).example()
    return samples.example()


def _check_same_kind(calibration: list[Any], example: Any, network: nn.Module) -> None:
    """Raise ValueError unless batches that set scales are of the kind that policies are judged on."""
    wanted = inputs_of(example, network)
    given = [inputs_of(batch, network) for batch in calibration]
    for inputs in given:
        if isinstance(wanted, Tensor) != isinstance(inputs, Tensor):
            raise ValueError(
                f"`calibrate` gave a {type(inputs).__name__} of inputs, and `search` a {type(wanted).__name__}; both must be "
                "batches of the same kind of inputs"
            )
    if isinstance(wanted, Tensor):
        check_alike(given, wanted)


def _check_forward(forward: Forward, batch: Any, network: nn.Module) -> None:
    """Raise ValueError unless `forward` takes what sets the scales."""
    try:
        with evaluation_mode(network), torch.no_grad():
            outputs_of(network, next(pieces(batch, 1))[0], forward)
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(
            f"`forward` can't compute what `calibrate` gives, {described(batch)} ({reason}): give batches of the kind that "
            "`search` gives, with their targets if `forward` looks at them"
        ) from error


def _is_plain(batches: list[Any], network: nn.Module) -> bool:
    """Say whether batches are tensors of inputs, perhaps with targets that are no structure, for a network that takes one."""
    if not batches:
        return True
    first = batches[0]
    if isinstance(first, Mapping):
        return False
    # Arrays of other byte orders are no tensors yet.
    of_tensors = isinstance(first, list | tuple) and all(isinstance(part, Tensor) for part in first)
    if of_tensors and isinstance(inputs_of(first, network), tuple):
        return False
    inputs, targets = first, None
    if isinstance(first, list | tuple):
        if not first:
            return True
        inputs = first[0]
        if len(first) > 1:
            targets = first[1]
    structured = isinstance(inputs, list | tuple | Mapping) or is_dataclass(inputs) or isinstance(targets, Mapping)
    if isinstance(targets, list | tuple) and targets:
        structured = structured or isinstance(targets[0], Mapping | list | tuple | Tensor)
    return not structured


def _as_float32(batch: Any) -> Any:
    """Convert floats of other types, which the network isn't of; arrays become tensors, and a list the tuple that it means."""

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.float()
        return tensor

    if isinstance(batch, list):
        batch = tuple(batch)
    return map_tensors(batch, converted)


def _traced(network: nn.Module, batch: Any, objective: Objective, forward: Forward | None) -> hw_models.Workload:
    """Trace a network. Raises ValueError if it can't be run on one sample, and for outputs that the objective can't judge."""
    example = inputs_of(batch, network)
    try:
        with evaluation_mode(network), torch.no_grad():
            outputs, again = (outputs_of(network, batch, forward) for _ in range(2))
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        if forward is not None:
            raise ValueError(f"`forward` failed on what `search` gives, {described(batch)}: {reason}") from error
        if isinstance(example, Mapping):
            _check_names(example, network)
        if not isinstance(example, Tensor):
            raise ValueError(
                f"the network can't compute what `search` gives, inputs in a {type(example).__name__} ({reason}): give "
                "batches (inputs, targets) of inputs as it takes them, or `forward`, a function of (network, batch)"
            ) from error
        raise ValueError(
            f"the network can't compute inputs of shape {tuple(example.shape)} and type {example.dtype} ({reason}); it must "
            "take one tensor, of what `search` gives"
        ) from error
    first, second = _flat(objective.read(outputs)), _flat(objective.read(again))
    if len(first) == len(second) and (second - first).norm() > REPEATED * first.norm():
        warnings.warn(
            "the network answers the same image differently from call to call (randomness, or something it keeps): what is "
            "measured of a policy is then chance in part",
            stacklevel=3,
        )
    if isinstance(example, Tensor) and forward is None:
        return hw_models.trace(network, example.clone())
    return hw_models.trace(network, batch, forward=lambda module, given: outputs_of(module, given, forward))


def _check_names(inputs: Mapping[Any, Any], network: nn.Module) -> None:
    """Raise ValueError, naming it, for an input by name that a network's `forward` doesn't take."""
    for name in inputs:
        others = {other: value for other, value in inputs.items() if other != name}
        if not takes(network, (), inputs) and takes(network, (), others):
            raise ValueError(
                f"`search` gives {name!r}, which the network's `forward` doesn't take: leave it out, or give `forward`, a "
                "function of (network, batch)"
            )


def _on_device(network: nn.Module, device: str | torch.device | None) -> nn.Module:
    """Return a network itself, or a copy of it on another device. Raises ValueError for one that isn't here."""
    if device is None:
        compute_exactly(device_of(network))
        return network
    found = find_device(device, "`device`")
    if found == device_of(network):
        return network
    return Q.copy_network(network).to(found)


def _flat(outputs: Any) -> Tensor:
    """Return all numbers of outputs in one row."""
    found = [leaf.detach().double().flatten() for leaf in leaves(outputs) if leaf.is_floating_point()]
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat(found)


@contextmanager
def _no_other_layers(network: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let a network be run within.

    Args:
        network: The float network.
        names: The layers that are quantized and priced.

    Raises:
        ValueError: Naming the first layer that is called beside these: some inputs take another way through the network than
            those by which it was traced and calibrated.
    """
    others: dict[nn.Module, str] = {
        module: name for name, module in network.named_modules() if isinstance(module, QUANTIZABLE)
    }
    for name in names:
        others.pop(network.get_submodule(name), None)

    def refuse(module: nn.Module, inputs: object) -> None:
        raise ValueError(
            f"layer {others[module]!r} is called for some search images but neither for the first one nor in calibration, so "
            "it would stay in float, unpriced: only networks that call the same layers for all images can be searched"
        )

    handles = [module.register_forward_pre_hook(refuse) for module in others]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked_range(bits: tuple[int, int]) -> tuple[int, int]:
    low, high = bits
    if not 1 <= low <= high <= Q.MAX_BITS:
        raise ValueError(f"bits must be (smallest, largest) within 1..{Q.MAX_BITS}, not {(low, high)!r}")
    return low, high


def _words(pair: tuple[int | None, int | None]) -> str:
    """Write bits of weights and activations: "4/8", "float/8"."""
    return "/".join(str(bits) for bits in pair).replace("None", "float")


def _pairs(choices: NDArray[np.bool_]) -> NDArray[np.int64]:
    """List the bits of the entries of a table (8, 8) that are true, in the order in which `extract` takes them."""
    return np.argwhere(choices) + 1
