"""A problem: network + data + hardware + budget, all that a solver needs to look for a policy."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq import problem as room
from haq.data.memory import allowed_bytes
from haq.problem.batches import (
    Batches,
    Owned,
    check_alike,
    check_arguments,
    check_dense,
    check_quantization,
    check_residuals,
    check_target,
    gathered,
    gathered_calibration,
    read_any,
    read_inputs,
    read_tensors,
)
from haq.problem.budget import OutOfReach, parse_budget
from haq.problem.decision import Decision, WidthsAsked, joined, priced, read_bits, ten_places
from haq.problem.device import compute_exactly, find_device
from haq.problem.evaluator import Evaluation, Evaluator, evaluation_mode
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF, read_goal
from haq.problem.limits import ROUNDING, Limit, PeakLimit, budgets_of
from haq.problem.objective import AnyObjective, BlackBox, Objective, described, find_objective
from haq.problem.paired import error_of_difference
from haq.problem.peak import PeakOfDecisions
from haq.problem.programme import Programme
from haq.problem.samples import KeptSamples, Samples, outputs_of, pieces, samples_in
from haq.problem.schemes import (
    AnyScheme,
    calibration_policy,
    check_inputs,
    check_metric,
    check_rounding,
    check_widths,
    check_zero_points,
    full_range,
    linear_for,
    meaningful_metrics,
    meaningful_pairs,
    obeying,
    overhead_bytes,
    roundings_by_layer,
    schemes_by_layer,
)
from haq.store.units import DOWN, PERCENT, UP, counted, describe_amount, show
from hw_models.cost import describe_pairs
from hw_models.metrics import METRICS, PEAK, STORED_ONCE, UNITS
from hw_models.notebook import html_table
from hw_models.registry import join_words, printable
from hw_models.target import price
from hw_models.widths import FLOAT, PLACES, at_places, pair_words, place_of, places, read_pair, width_words
from quantizers.calling import Forward, device_of, inputs_of, leaves, map_tensors, takes, targets_of, to_device
from quantizers.observers import OnProgress, no_progress
from quantizers.policy import QUANTIZABLE
from quantizers.pruning.criterion import Criterion

if TYPE_CHECKING:
    from haq.problem import TabularProblem as Tabular

REPEATED = 1e-3  # of an output's size: what it may differ by from call to call, in sums of another order
TOP = Q.MAX_BITS - 1  # the place of 8 bits in a table
FEW_BITS = (2, 8)  # widths that may be chosen where nothing is said, beside 16 bits and float where the target does them
MOST_NAMED = 3  # layers in a sentence
WIDE = PLACES - 2  # the first place beyond the few-bit widths
DEFAULT_BUDGET = 0.5
FARTHEST = 1000  # how many times dearer or cheaper than any policy the budget of a trade-off can be


class NotAllowed(ValueError):
    """A policy leaves a problem: its layers, its widths, what is pinned or what is tied."""


class Problem:
    """Find the policy that is best on held-out images and whose cost on a hardware target is within a budget.

    Attributes:
        network: The float network that was given.
        workload: Its layers.
        schemes: The quantization scheme of every layer, by name; it obeys the target's capabilities.
        roundings: How the weights of every layer are rounded, "nearest" or "gptq", by name.
        residuals: The bits of what additions and average pools take; None where that stays in float.
        target: The hardware target.
        table: Its cost table for the workload.
        cost: Costs in the metric's unit, shape (layers, 10, 10), indexed [layer, place of the weights' width, place of the
            activations'] (`hw_models.widths`: bits - 1 for 1 to 8); for a pair that the target can't do (`table.supported`),
            which nobody may choose, what the layer costs at most.
        widths: The widths of weights and of activations that may be chosen, float being 32; `bits` are the smallest and the
            largest of them.
        decisions: The layers that decide together, with the pairs of widths worth choosing: within `widths`, with a meaning in
            the scheme, and without those that cost as much as a pair with more bits.
        limits: What a policy may cost: that of `metric` first, then those of further budgets.
        limit: The first of them, in the metric's unit.
        peak: The limit of peak memory, which is no sum over layers; None if there is none.
        reference_policy: What budgets can be a fraction of.
        reference: What it costs.
        smallest: The least that a policy can cost.
        goal: What is looked for: the best policy within the budgets, the cheapest that is good enough, or a trade-off.
        layer_errors: The relative squared error that each width of weights (0) and of activations (1) leaves, from
            calibration, shape (layers, 2, 10).
        quantization_error: The same of every decision, the mean over its layers, shape (decisions, 2, 10).
        objective: What policies are judged by.
        calibration: The batches that set the scales.
        forward: Computes outputs of (network, batch); None: the network is called with the inputs.
        evaluator: Evaluates policies.
        float_result: The evaluation of the float network.
        float_seconds: How long that took.
    """

    residuals: int | None = None
    _chooses_channels = False
    _several: tuple[Programme | None, list[Decision], tuple[Limit, ...]] = (None, [], ())

    def __new__(cls, *args: Any, prune: Any = None, **kwargs: Any) -> Problem:
        """Make a problem; one in which channels are chosen too (`haq.problem.channels`), if `prune` says which shares."""
        if prune is not None and cls is Problem:
            # Found by its name: it stands on this file.
            cls = room.ChannelProblem
        return object.__new__(cls)

    def __init__(
        self,
        network: nn.Module,
        calibrate: Batches,
        search: Batches | Samples | None,
        target: str | hw_models.Target,
        metric: str = "latency",
        budget: float | str | Mapping[str, float | str] | None = None,
        *,
        bits: tuple[int, int] | str | None = None,
        pinned: Mapping[str, tuple[int | None, int | None]] | None = None,
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
        reference: str | os.PathLike[str] | Mapping[str, tuple[int | None, int | None]] | None = None,
        max_drop: float | None = None,
        at_least: float | str | None = None,
        tradeoff: str | tuple[float, float] | None = None,
        residuals: int | str | None = None,
        prune: str | Sequence[float] | None = None,
        criterion: str | Criterion = "l1",
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
            metric: What is limited, and priced: one of `hw_models.METRICS`.
            budget: A number is a fraction of the reference policy's cost; a string has a unit ("12ms", "40kB"). For several
                budgets, all of which must be kept, a mapping by metric: {"latency": 0.5, "storage": "40kB"}. None is 0.5; and
                no budget at all where the cheapest policy is looked for.
            bits: Widths that a solver may choose: (smallest, largest), or a text such as "2:8,16,float" or "4,8/8,16"
                (weights/activations). None: 2 to 8, and 16 bits and float where the target does them.
            pinned: Layer name -> (weight width, activation width) that no solver may change; default: first and last layer at
                8 bits, or the nearest pair that the target can do.
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
            reference: The policy that a budget is a fraction of: a pair for all layers ("w16a16", "8/8", "float"), a policy,
                or the path of a policy's file. None: 8 bits, and the widest pair where the target can't do that.
            max_drop: Look for the cheapest policy (by `metric`) whose objective is at most so much worse than the float
                network's: points of a share, otherwise the objective's unit.
            at_least: The same with the value that the objective must have: 0.92 or "92%" of a share.
            tradeoff: Look for the largest value x (cost / budget)^w, MnasNet's objective: "soft", "hard" or the exponents
                (within the budget, beyond it).
            residuals: The width of what additions and average pools take: 8, or "float", which None is too
                (`quantizers.insert_residual_quantizers`). The float network, which policies are held against, has none.
            prune: Which shares of its channels a group may keep, beside the widths of layers: "0.25:1" or (0.25, 1.0) for the
                multiples of 1/8 within, [1, 0.75, 0.5] for just these. None: all channels are kept. What is made then is a
                `haq.problem.channels.ChannelProblem`.
            criterion: What says which channels are kept: a name (`quantizers.pruning.criterion_names`), `module:Name`, or a
                criterion. It means nothing without `prune`.
            on_progress: Told how many of how many steps of calibration are done.

        Raises:
            OutOfReach: A ValueError, for a budget out of reach, naming the reachable range.
            ValueError: For whatever can't be, such as a width that means nothing in a scheme; before anything is computed.
            TypeError: For an argument of another kind, such as a `forward` that can't be called.
        """
        check_arguments(network, target, metric, bits, pinned)
        check_quantization(correction, rounding)
        if criterion != "l1" and not self._chooses_channels:
            raise ValueError("`criterion` says which channels are kept, and without `prune` all are: give both, or neither")
        self.residuals = check_residuals(residuals)
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
        to_quantize = network
        if self.residuals is not None:
            to_quantize = Q.insert_residual_quantizers(network, self.calibration, forward=forward)
        self.goal = read_goal(self.objective, max_drop, at_least, tradeoff)
        self._budgets = self._asked(budget, metric)
        self.metric = self._main_metric(metric)
        self.unit = UNITS[self.metric]
        self._bits_asked = None
        if bits is not None:
            self._bits_asked = read_bits(bits)
        self.batch = batch
        self._pins_asked = self._checked_pins(pinned)
        self._reference_asked = reference
        self.groups = self._groups(tied)
        if any(name in STORED_ONCE for name in (self.metric, *self._budgets)):
            self.groups = joined(self.groups, self.workload.tied_weights)
        self._schemes_asked = schemes_by_layer(scheme, self.workload.names, linear_for(correction, rounding))
        if isinstance(target, str):
            target = hw_models.load_target(target)
        self.schemes = obeying(self._schemes_asked, target)
        check_rounding(rounding, self.schemes, self._pins_asked or Q.ends(self.workload.names))
        for name in (self.metric, *self._budgets):
            check_metric(self.schemes, name)
        self._meaningful = meaningful_pairs(self.schemes, {})
        self._find_channels(example)
        self._price(target)
        self._set_limits()
        count = sum(map(samples_in, self.calibration))
        self.roundings = roundings_by_layer(rounding, self.schemes, self.workload, count)
        with evaluation_mode(network):
            qnetwork = Q.quantize(
                to_quantize,
                calibration_policy(self.schemes),
                scheme=self.schemes,
                calibrate=self.calibration,
                correction=correction,
                rounding=self.roundings,
                on_progress=on_progress,
                forward=forward,
            )
        layers = {name: Q.quant_layers(qnetwork)[name] for name in self.workload.names}
        self._restrict({name: layer.signed for name, layer in layers.items()})
        errors = [self.schemes[name].quantization_errors(layer) for name, layer in layers.items()]
        self.layer_errors = np.array([[ten_places(one.tolist(), 0.0) for one in of_layer] for of_layer in errors])
        self.quantization_error = np.array([self.layer_errors[list(group)].mean(0) for group in self.groups])
        self._correction = correction
        began = time.perf_counter()
        with evaluation_mode(network):
            with _no_other_layers(network, self.workload.names):
                self.evaluator = self._evaluator_of(qnetwork, samples, tune)
            self.float_result = self.evaluator.measure_teacher()
            self.float_seconds = time.perf_counter() - began
        _check_share(self.objective, self.float_result.value)
        self.goal.check(self.objective, self.float_result.value)

    def _find_channels(self, example: Any) -> None:
        """Find out, by a batch, which channels can be chosen: none, unless a subclass does otherwise."""

    def _evaluator_of(
        self, qnetwork: nn.Module, samples: Samples | None, tune: Callable[[nn.Module], nn.Module] | None
    ) -> Evaluator:
        """Make what judges policies of a quantized network on samples."""
        return Evaluator(qnetwork, samples, teacher=self.network, tune=tune, objective=self.objective, forward=self.forward)

    @staticmethod
    def tabular(
        path: str | os.PathLike[str],
        budget: float | str | None = None,
        *,
        max_drop: float | None = None,
        at_least: float | str | None = None,
        tradeoff: str | tuple[float, float] | None = None,
    ) -> Tabular:
        """Read a problem of which every policy is known; it needs no network.

        Args:
            path: An .npz file as `haq.problem.table_file` describes it, or the name of one that ships with the package.
            budget: The name of one of the file's limits, such as "0.15", or an amount: "5.9uJ", or a number in the metric's
                unit. None: the first limit; where the cheapest is looked for, all that is known.
            max_drop: Look for the cheapest policy instead; see `Problem`.
            at_least: Likewise.
            tradeoff: See `Problem`.

        Returns:
            The problem, which tells `best_value` and `test(policy)` besides.

        Raises:
            OutOfReach: A ValueError, for a budget that nothing meets, or within which not everything is known.
            ValueError: Naming the file and the key, for a file that isn't one.
        """
        # Found by its name: it stands on this file.
        return room.TabularProblem(path, budget, max_drop=max_drop, at_least=at_least, tradeoff=tradeoff)

    def __repr__(self) -> str:
        """Say on one line what is searched."""
        schemes = ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes.values()))
        layers = counted(len(self.workload), "layers")
        return (
            f"Problem({layers} on {self.target.name}, {self._budget_words()}, bits {self.widths.words}, "
            f"scheme {schemes}, objective {self.objective.name}, float {show(self.float_accuracy, self.objective.unit)})"
        )

    def _repr_html_(self) -> str:
        """Make a table of it for a notebook."""
        schemes = ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes.values()))
        layers = counted(len(self.workload), "layers")
        rows = {
            "network": f"{type(self.network).__name__}, {layers}, {self.workload.macs / 1e6:.2f} M MACs",
            "target": f"{self.target.name}: {self.target.description}; {self.table.provenance}",
            "budget": self._budget_words(),
            "bits": self.widths.words,
            "scheme": schemes,
            "objective": f"{self.objective.words}{self.count_words(', on ')}",
            "float network": show(self.float_accuracy, self.objective.unit),
        }
        if self.residuals is not None:
            rows["residuals"] = self.residuals_words
        if self.workload.unpriced:
            rows["not priced"] = self.workload.unpriced_words
        return html_table("Problem", ("", ""), rows.items())

    def on(
        self,
        target: str | hw_models.Target,
        budget: float | str | Mapping[str, float | str] | None,
        *,
        max_drop: float | None = None,
    ) -> Problem:
        """Put the same problem on another target, within another budget.

        Both share what the value of a policy depends on (the network, the images, the scales) and everything evaluated.

        Args:
            target: A hardware target, or the name of one.
            budget: See `Problem`; the metrics that are limited can't be others.
            max_drop: Likewise: what is looked for is then the cheapest policy, for which `budget` may be None.

        Returns:
            The other problem.

        Raises:
            ValueError: As `Problem` does, and for a target that wants layers quantized otherwise.
        """
        made = copy.copy(self)
        if max_drop is not None:
            made.goal = read_goal(self.objective, max_drop, None, None)
        asked = made._asked(budget, self.metric)
        if asked and set(asked) != set(self._budgets) and self._budgets:
            raise ValueError(
                f"this problem limits {', '.join(self._budgets)}, and not {', '.join(asked)}: make another problem for that"
            )
        made._budgets = asked
        check_target(target)
        if isinstance(target, str):
            target = hw_models.load_target(target)
        if target is not self.target:
            if obeying(self._schemes_asked, target) != self.schemes:
                raise ValueError(
                    f"{target.name} wants weights or activations quantized otherwise than {self.target.name}, so what was "
                    "evaluated for one says nothing of the other: make another problem, or sweep, for it"
                )
            made._price(target)
        made._set_limits()
        return made

    def limited_to(self, amount: float) -> Problem:
        """Make the same problem with another limit of the main metric, of which the best policy is looked for.

        Args:
            amount: In the metric's unit.

        Returns:
            A problem that shares what was evaluated; `goal` is the best policy within the limits.

        Raises:
            OutOfReach: A ValueError, if no policy costs so little.
        """
        if amount < self.smallest * (1 - ROUNDING):
            raise OutOfReach(f"{describe_amount(amount, self.metric)} is out of reach: {self.reach}")
        made = copy.copy(self)
        made.goal = BEST
        first = dataclasses.replace(self.limits[0], amount=min(amount, self.limits[0].amount), is_given=True)
        made.limits = (first, *self.limits[1:])
        return made

    def _asked(self, budget: Any, metric: str) -> dict[str, float | str]:
        """Return the budgets that are asked for, by metric."""
        if budget is None:
            if self.goal.kind == CHEAPEST:
                return {}
            budget = DEFAULT_BUDGET
        found = budgets_of(budget, metric)
        for name in (metric, *found):
            if name not in METRICS:
                raise ValueError(f"unknown metric {name[:40]!r}; known: {', '.join(METRICS)}")
        return found

    def _main_metric(self, metric: str) -> str:
        """Return the metric that is minimised, or planned with: one that is a sum over layers."""
        if self.goal.kind == CHEAPEST:
            if metric == PEAK:
                raise ValueError(f"{PEAK} can be limited by a budget, but not be what is made cheapest: choose another metric")
            return metric
        sums = [name for name in self._budgets if name != PEAK]
        if metric in sums:
            return metric
        if sums:
            return sums[0]
        if self.goal.kind == TRADEOFF:
            raise ValueError(f"a trade-off is with a cost that is a sum over layers, which {PEAK} isn't: limit another")
        if metric != PEAK:
            return metric
        return "storage"

    def _price(self, target: hw_models.Target) -> None:
        """Set all that depends on the target."""
        self.target = target
        check_zero_points(self.schemes, target)
        table = price(target, self.workload, self.batch, full_range=full_range(self.schemes))
        overhead = overhead_bytes(self.schemes, self.workload)
        if overhead.any():
            table = dataclasses.replace(table, storage_bytes=table.storage_bytes + overhead)
        self.table = table
        for name in self._budgets:
            if name not in table.all_metrics:
                raise ValueError(f"{target.name} has no metric {name!r}; it has {', '.join(table.all_metrics)}")
        self.cost = priced(table, self.metric)
        self.pinned = self._pinned()
        self._choose()

    def _choose(self) -> None:
        """Set what can be chosen, and the least that it can cost."""
        self.widths = self._widths()
        check_widths(self.schemes, self._bits_asked, self.pinned)
        self.reference_policy = self._reference_policy()
        self.reference = self._cost_of_reference(self.metric)
        self.decisions = self._decisions(self._allowed(self.widths.mask))
        self.smallest = self._smallest(self.decisions)

    def _widths(self) -> WidthsAsked:
        """Return the widths that may be chosen: those asked for, or else 2 to 8, and 16 bits and float where they can be."""
        free = [index for index, name in enumerate(self.workload.names) if name not in self.pinned]
        able = (self.table.supported & self._meaningful)[free]
        if self._bits_asked is not None:
            self._check_wide(self._bits_asked, able)
            return self._bits_asked
        found = []
        for others in ((0, 2), (0, 1)):
            by_width: NDArray[np.bool_] = np.any(able, axis=others)
            wide = np.flatnonzero(by_width[WIDE:]) + WIDE
            found.append((*range(FEW_BITS[0], FEW_BITS[1] + 1), *map(int, at_places(wide))))
        return WidthsAsked(*found)

    def _check_wide(self, asked: WidthsAsked, able: NDArray[np.bool_]) -> None:
        """Raise ValueError for 16 bits or float, if it is asked for and no layer that can be decided can have it."""
        for operand, widths, others in (("weights", asked.weights, (0, 2)), ("activations", asked.activations, (0, 1))):
            by_width: NDArray[np.bool_] = np.any(able, axis=others)
            lacking = [width for width in widths if place_of(width) >= WIDE and not by_width[place_of(width)]]
            if lacking and able.size:
                raise ValueError(
                    f"bits {asked.words!r} asks for {operand} of width {width_words(lacking[0])}, which "
                    f"{self.target.name} can't do in any layer that isn't pinned"
                )

    @property
    def bits(self) -> tuple[int, int]:
        """Return the smallest and the largest width that may be chosen, float being 32."""
        both = (*self.widths.weights, *self.widths.activations)
        return min(both), max(both)

    def _restrict(self, signed: Mapping[str, bool]) -> None:
        """Leave out pairs of bits that mean nothing to a scheme now that calibration has seen each layer's input."""
        meaningful = meaningful_pairs(self.schemes, signed)
        check_inputs(self.schemes, signed, self.table, meaningful)
        if not np.array_equal(meaningful, self._meaningful):
            self._meaningful = meaningful
            self._choose()
            self._set_limits()

    def _set_limits(self) -> None:
        """Set what a policy may cost by every metric that is limited. Raises OutOfReach for a budget that can't be met."""
        self.limits: tuple[Limit, ...]
        main = self._limit_of(self.metric)
        others = [self._limit_of(name) for name in self._budgets if name != self.metric]
        self.limits = (main, *others)
        self.peak = None
        for limit in others:
            if limit.metric == PEAK:
                self.peak = PeakLimit(self.workload, self.table.batch, limit.amount)
        self._check_together()

    def _check_together(self) -> None:
        """Raise OutOfReach, naming them and what each could be, for budgets that can't be met together."""
        programme = self.several
        if programme is None:
            return
        conflict = programme.conflict()
        if conflict is None:
            return
        # The programme has the peak last.
        ordered = sorted(self.limits, key=lambda limit: not limit.is_sum)
        parts = []
        for index, least in zip(conflict.limits, conflict.least, strict=True):
            limit = ordered[index]
            others = [ordered[other] for other in conflict.limits if other != index]
            within = join_words([f"{other.metric} within {describe_amount(other.amount, other.metric)}" for other in others])
            if math.isfinite(least):
                parts.append(f"with {within}, {limit.metric} is at least {describe_amount(least, limit.metric, UP)}")
        asked = [f"{ordered[index].metric}={self._budgets.get(ordered[index].metric)}" for index in conflict.limits]
        raise OutOfReach(f"budgets {join_words(asked)} can't be met together on {self.target.name}: {'; '.join(parts)}")

    @property
    def limit(self) -> float:
        """Return the budget of the main metric, in its unit."""
        return self.limits[0].amount

    @limit.setter
    def limit(self, amount: float) -> None:
        """Set the budget of the main metric, whatever can be reached."""
        self.limits = (dataclasses.replace(self.limits[0], amount=amount), *self.limits[1:])

    @property
    def budget(self) -> float:
        """Return the budget as a fraction of the reference policy's cost."""
        return self.limit / self.reference

    def _budget_words(self) -> str:
        words = []
        for limit in self.limits:
            if limit.is_given:
                of = f"{limit.fraction:.3g} of {self.reference_words}"
                words.append(f"{limit.metric} within {describe_amount(limit.amount, limit.metric)} ({of})")
        if self.goal.kind == TRADEOFF:
            words.insert(0, f"{self.goal.words(self.objective)}, budget {describe_amount(self.tradeoff_target, self.metric)}")
        if self.goal.kind == CHEAPEST:
            words.insert(0, f"{self.goal.words(self.objective)} by {self.metric}")
        return ", ".join(words)

    @property
    def reference_words(self) -> str:
        """Say what budgets are a fraction of: "uniform 8 bits"."""
        pairs = set(self.reference_policy.values())
        if pairs == {(8, 8)}:
            return "uniform 8 bits"
        if len(pairs) == 1:
            return f"uniform {pair_words(*next(iter(pairs)))}"
        if isinstance(self._reference_asked, str | os.PathLike):
            return f"the policy {printable(os.fspath(self._reference_asked))}"
        if self._reference_asked is not None:
            return "the given policy"
        others = [f"{pair_words(*pair)} in {name}" for name, pair in self.reference_policy.items() if pair != (8, 8)]
        if len(others) > MOST_NAMED:
            others = [*others[:MOST_NAMED], f"others in {len(others) - MOST_NAMED} more"]
        return f"8 bits, {', '.join(others)}, where 8/8 can't be done"

    def _reference_policy(self) -> Q.BitPolicy:
        """Return the policy that a budget can be a fraction of. Raises ValueError, naming the layer, if it can't be done."""
        asked = self._reference_asked
        if isinstance(asked, os.PathLike):
            asked = os.fspath(asked)
        if asked is None:
            return self.policy(*np.array([self._widest(index) for index in range(len(self.workload))]).T)
        if isinstance(asked, str) and asked.endswith(".json"):
            policy = Q.BitPolicy.from_json(asked)
        elif isinstance(asked, str):
            try:
                w, a = read_pair(asked)
            except ValueError as error:
                raise ValueError(
                    f"reference {asked[:40]!r} is no pair of widths such as w16a16, nor a policy's file"
                ) from error
            policy = self.policy([w] * len(self.workload), [a] * len(self.workload))
        elif isinstance(asked, Mapping):
            policy = Q.BitPolicy(asked)
        else:
            raise TypeError(f"reference is a {type(asked).__name__}; it must be a pair such as 'w16a16', or a policy")
        if differing := sorted(set(policy) ^ set(self.workload.names), key=str):
            raise ValueError(
                f"the reference policy must name the workload's layers; {differing[0]!r} is in one of the two only"
            )
        for index, name in enumerate(self.workload.names):
            pair = policy[name]
            if not self.table.supported[index, place_of(pair[0]), place_of(pair[1])]:
                can = describe_pairs(self.table.pairs_of(index))
                raise ValueError(
                    f"the reference has layer {name!r} at {pair_words(*pair)}, which {self.target.name} can't do; it can do "
                    f"{can}"
                )
        return policy

    def _widest(self, layer: int) -> tuple[int, int]:
        """Return 8/8 for a layer that can have it, or else the pair with the most bits that the target can do."""
        if self.table.supported[layer, TOP, TOP]:
            return 8, 8
        return max(self.table.pairs_of(layer), key=lambda pair: (place_of(pair[0]) + place_of(pair[1]), pair))

    def _cost_of_reference(self, metric: str) -> float:
        w, a = self.bit_arrays(self.reference_policy)
        if metric == self.metric:
            return float(self.cost[np.arange(len(w)), places(w), places(a)].sum())
        return float(self.table.total(metric, w, a))

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metrics that the target has and that mean something in the schemes."""
        return meaningful_metrics(self.schemes, self.table.metrics)

    @property
    def reach(self) -> str:
        """Say in words which budgets of the main metric can be met."""
        # Rounded inwards, so that what we name is what we accept.
        low = describe_amount(self.smallest, self.metric, UP)
        high = describe_amount(self.largest, self.metric, DOWN)
        if self.largest == self.smallest:
            high = low
        fraction = np.ceil(1000 * self.smallest / self.reference) / 1000
        top = f"{self.largest / self.reference:.3g}"
        if self.largest == self.reference:
            top = "1.0"
        least = f"{low} ({fraction:.3f} of {self.reference_words})"
        return (
            f"on {self.target.name}, {self.metric} can be from {least} to {high} ({top}){self._reach_from_one_bit(fraction)}"
        )

    def _reach_from_one_bit(self, fraction: float) -> str:
        """Say what could be reached with widths from 1 bit, if that is less; nothing otherwise."""
        below = np.arange(PLACES) < max(place_of(max(operand)) for operand in self.widths) + 1
        mask = below[:, None] & below
        from_one_bit = self._smallest(self._decisions(self._allowed(mask)))
        at_one_bit = np.ceil(1000 * from_one_bit / self.reference) / 1000
        if at_one_bit >= fraction:
            return ""
        words = WidthsAsked(*(tuple(range(1, 9)) + tuple(w for w in operand if w > 8) for operand in self.widths)).words
        if self.bits[1] <= 8:
            words = f"1:{self.bits[1]}"
        return f"; bits {words} would reach {at_one_bit:.3f}"

    @property
    def residuals_words(self) -> str:
        """Say how wide what additions and average pools take is, and how many tensors that are."""
        if self.residuals is None:
            return "float"
        count = len(Q.residual_quantizers(self.evaluator.network))
        return f"{self.residuals} bits at the operands of additions and the inputs of average pools, {count} tensors"

    @property
    def network_words(self) -> str:
        """Name the network: by its class."""
        return type(self.network).__name__

    @property
    def samples_are(self) -> str:
        """Name what policies are judged on: images, or samples where inputs are anything else."""
        inputs = inputs_of(self.calibration[0], self.network)
        if isinstance(inputs, Tensor) and inputs.dim() == 4 and (inputs.is_floating_point() or inputs.dtype == torch.uint8):
            return "images"
        return "samples"

    def count_words(self, before: str, split: str = "") -> str:
        """Say on how many samples policies are judged.

        Args:
            before: Words that stand before the count.
            split: The split's name, which stands before what samples are called.

        Returns:
            Such as "on 2,000 search images"; empty if policies aren't judged on samples.
        """
        if not self.evaluator.count:
            return ""
        return f"{before}{self.evaluator.count:,} {split}{self.samples_are}"

    @property
    def has_gradients(self) -> bool:
        """Say whether outputs can be held against the float network's, so that gradients tell what quantization does."""
        return self.objective.distribution is not None and self.evaluator.samples is not None

    @property
    def float_accuracy(self) -> float:
        """Return the objective's value of the float network, on the search samples."""
        return self.float_result.accuracy

    def uniform(self, bits: int, *, keep_pinned: bool = False) -> Q.BitPolicy:
        """Make the policy with the same width everywhere.

        Args:
            bits: The width, float being 32.
            keep_pinned: Whether pinned layers keep their own.

        Returns:
            The policy; it may have widths that the target can't do.
        """
        pairs: dict[str, tuple[int | None, int | None]] = dict.fromkeys(self.workload.names, (_policy_width(bits),) * 2)
        if keep_pinned:
            pairs |= self.pinned
        return Q.BitPolicy(pairs)

    def policy(self, w_bits: Iterable[int], a_bits: Iterable[int]) -> Q.BitPolicy:
        """Make a policy of widths in the order of the workload, float being 32.

        Args:
            w_bits: The widths of weights, one for each layer.
            a_bits: Those of inputs.

        Returns:
            The policy.

        Raises:
            ValueError: If there are more or fewer widths than layers.
        """
        pairs = zip(self.workload.names, w_bits, a_bits, strict=True)
        return Q.BitPolicy({name: (_policy_width(w), _policy_width(a)) for name, w, a in pairs})

    def decide(self, pairs: Iterable[Iterable[int]]) -> Q.BitPolicy:
        """Make a policy of one pair of widths for each of the decisions.

        Args:
            pairs: For each decision the widths of weights and inputs, float being 32.

        Returns:
            The policy; layers of one decision have the same pair.
        """
        bits = np.empty((len(self.workload), 2), int)
        for group, pair in zip(self.groups, pairs, strict=True):
            bits[list(group)] = tuple(pair)
        return self.policy(*bits.T)

    def bit_arrays(self, policy: Mapping[str, tuple[int | None, int | None]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the widths of a policy in the order of the workload; float is 32.

        Args:
            policy: Pairs of widths by layer; None is float.

        Returns:
            The widths of weights and of inputs, two arrays of shape (layers,).

        Raises:
            ValueError: If the policy lacks a layer, naming it.
        """
        if missing := [name for name in self.workload.names if name not in policy]:
            raise ValueError(f"the policy has no layer {missing[0]!r}: it must have all of the workload's")
        pairs = np.array([[bits or FLOAT for bits in policy[name]] for name in self.workload.names])
        return pairs[:, 0], pairs[:, 1]

    def _cells(self, policy: Mapping[str, tuple[int | None, int | None]]) -> tuple[NDArray[np.intp], ...]:
        """Return the index of every layer's pair in a table (layers, 10, 10)."""
        w, a = self.bit_arrays(policy)
        return np.arange(len(w)), places(w), places(a)

    def policy_cost(self, policy: Mapping[str, tuple[int | None, int | None]]) -> float:
        """Return the cost of a policy by the main metric.

        Args:
            policy: Pairs of widths by layer; None is float.

        Returns:
            The cost in the metric's unit (s, J, bytes ...); infinity if the target can't do it.
        """
        cells = self._cells(policy)
        if not self.table.supported[cells].all():
            return math.inf  # it can be evaluated, as sensitivities need it, and is in no budget
        return float(self.cost[cells].sum())

    def costs(self, policy: Mapping[str, tuple[int | None, int | None]]) -> dict[str, float]:
        """Return what a policy costs by every metric that is limited, the main one first.

        Args:
            policy: Pairs of widths by layer; None is float.

        Returns:
            Costs in the metrics' units, by metric; infinity if the target can't do it.
        """
        main = self.policy_cost(policy)
        found = {self.metric: main}
        w, a = self.bit_arrays(policy)
        for limit in self.limits[1:]:
            found[limit.metric] = math.inf
            if math.isfinite(main):
                found[limit.metric] = float(self.table.total(limit.metric, w, a))
        return found

    def holds(self, policy: Mapping[str, tuple[int | None, int | None]]) -> bool:
        """Say whether a policy keeps all budgets, but for rounding.

        Args:
            policy: Pairs of widths by layer; None is float.

        Returns:
            False also if the target can't do the policy.
        """
        costs = self.costs(policy)
        return all(limit.holds(costs[limit.metric]) for limit in self.limits)

    def fits(self, chosen: Iterable[int]) -> bool:
        """Say whether the policy of an option for each decision keeps all budgets.

        Args:
            chosen: The number of an option for each decision, in order.

        Returns:
            Whether no limit is exceeded, but for rounding.
        """
        options = list(zip(self.decisions, chosen, strict=True))
        if not self.within_budget(sum(float(decision.prices[pick]) for decision, pick in options)):
            return False
        sums = [limit for limit in self.limits[1:] if limit.is_sum]
        for row, limit in enumerate(sums):
            if not limit.holds(sum(float(decision.others[row, pick]) for decision, pick in options)):
                return False
        if self.peak is None:
            return True
        a_bits = np.empty(len(self.workload), int)
        for decision, pick in options:
            a_bits[list(decision.layers)] = decision.pairs[pick, 1]
        return self.peak.holds(a_bits)

    @property
    def several(self) -> Programme | None:
        """Return what fits all budgets together; None where there is one, of a sum."""
        if len(self.limits) == 1:
            return None
        made, decisions, limits = self._several
        if made is None or decisions is not self.decisions or limits is not self.limits:
            peak = None
            if self.peak is not None:
                peak = PeakOfDecisions.of(self.workload, self.decisions, self.peak.batch, self.peak.amount)
            made = Programme(self.decisions, [limit.amount for limit in self.limits if limit.is_sum], peak)
            self._several = (made, self.decisions, self.limits)
        return made

    def meets(self, evaluation: Evaluation) -> bool:
        """Say whether a policy that was evaluated is good enough for the goal.

        Args:
            evaluation: What the policy was measured to give, on the search split.

        Returns:
            True where the goal has no such threshold.
        """
        return self.goal.is_met(self.objective, evaluation.value, self.float_result.value)

    def means_something(self, policy: Mapping[str, tuple[int | None, int | None]]) -> bool:
        """Say whether every layer's bits have a meaning in its scheme, and can be done by the target.

        Args:
            policy: Pairs of widths by layer; None is float.

        Returns:
            Whether it can be evaluated, whatever it costs.
        """
        return bool((self._meaningful & self.table.supported)[self._cells(policy)].all())

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
        if differing := sorted(set(policy) ^ set(names), key=str):
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

    def allows(self, policy: object) -> bool:
        """Say whether a policy is one of this problem's, whatever it costs; see `check_policy`.

        Args:
            policy: Anything.

        Returns:
            Whether `check_policy` accepts it.
        """
        try:
            self.check_policy(policy)
        except NotAllowed:
            return False
        return True

    def _check_pair(self, index: int, pair: tuple[int | None, int | None]) -> None:
        """Raise NotAllowed for bits that a layer may not take; see `check_policy`."""
        name = self.workload.names[index]
        refused = f"layer {name!r} can't take {_words(pair)} (weights/activations)"
        if name in self.pinned:
            if pair != self.pinned[name]:
                raise NotAllowed(f"{refused}: it is pinned at {_words(self.pinned[name])}")
            return
        w, a = (bits or FLOAT for bits in pair)
        if w not in self.widths.weights or a not in self.widths.activations:
            raise NotAllowed(f"{refused}: {self._widths_words()} are allowed")
        if not self._meaningful[index, place_of(w), place_of(a)]:
            raise NotAllowed(f"{refused}: its scheme {self.schemes[name].name!r} has no such pair")

    def _widths_words(self) -> str:
        low, high = self.bits
        if self.widths == read_bits((low, min(high, Q.MAX_BITS))):
            return f"{low} to {high} bits"
        return f"widths {self.widths.words}"

    def within_budget(self, cost: float) -> bool:
        """Say whether a cost by the main metric is within its budget, but for rounding; see `holds` for all budgets.

        Args:
            cost: In the main metric's unit.

        Returns:
            True where nothing limits that metric.
        """
        return self.limits[0].holds(cost)

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Say which policies will be evaluated, and what they are to beat, so that a pool of workers can begin.

        Args:
            policies: Those that are evaluated next, in this order.
            beat: The value that they must reach to be worth a whole evaluation, as in `evaluate`.
        """
        self.evaluator.expect(policies, beat)

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        """Evaluate a policy on the search samples.

        Given a value to `beat`, it ends once a part of the samples tells that the policy is worse (`Evaluator.race`).

        Args:
            policy: The policy.
            beat: A value of the objective; None: all samples are looked at.

        Returns:
            The objective's value (`accuracy`) and the loss, with how many samples they are of.
        """
        if beat is None:
            return self.evaluator.evaluate(policy)
        return self.evaluator.race(policy, beat)

    def judging(self, samples: Batches | Samples) -> Evaluator:
        """Make what judges policies of this problem on other samples, exactly as they are judged on the search samples.

        Args:
            samples: Inputs and targets, as `search` of the problem.

        Returns:
            An evaluator with a network of its own.

        Raises:
            ValueError, TypeError: For samples that can't be read, and for an objective that looks at samples of its own.
        """
        if isinstance(self.objective, BlackBox):
            raise ValueError(
                f"objective {self.objective.name!r} is given the network and looks at samples of its own: policies can't be "
                "judged on others"
            )
        found = _read_search(samples, self.network, self.objective, self.forward, None)
        assert found is not None
        return self._evaluator_of(Q.copy_network(self.evaluator.network), found, self.evaluator.tune)

    def paired_error(self, policy: Q.BitPolicy, other: Q.BitPolicy) -> float | None:
        """Tell the standard error of the difference of two policies' values on the search samples, paired by sample.

        Both are wrong about mostly the same samples, so it is smaller than that of either value (`haq.problem.paired`). The
        policies are run again for it, unless they were compared lately.

        Args:
            policy: One of them.
            other: The other.

        Returns:
            The error, in the objective's unit (a share for "%"); None where values aren't means over samples.
        """
        return error_of_difference(self.evaluator.by_sample(policy), self.evaluator.by_sample(other))

    def quantized(self, policy: Q.BitPolicy) -> nn.Module:
        """Make a copy of the calibrated quantized network, at the bits of a policy, that can be trained.

        Args:
            policy: The policy.

        Returns:
            The copy, in evaluation mode; parameters that don't train in the float network don't here.
        """
        made = Q.copy_network(self.evaluator.network)
        floats = dict(self.network.named_parameters())
        for name, parameter in made.named_parameters():
            # Those that are no float network's are what a scheme learns.
            parameter.requires_grad_(name not in floats or floats[name].requires_grad)
        Q.set_policy(made, policy)
        return made.eval()

    def _checked_pins(
        self, pinned: Mapping[str, tuple[int | None, int | None]] | None
    ) -> dict[str, tuple[int | None, int | None]] | None:
        """Check the names and widths of what is to be pinned; None is the default."""
        if pinned is None:
            return None
        names = self.workload.names
        if unknown := sorted(set(pinned) - set(names), key=str):
            raise ValueError(f"pinned layer {unknown[0]!r} is not in the workload: {', '.join(names)}")
        return dict(Q.BitPolicy(pinned))

    def _pinned(self) -> dict[str, tuple[int | None, int | None]]:
        """Return the layers that can't be changed, and their widths."""
        if self._pins_asked is not None:
            return self._pins_asked
        found = dict(Q.ends(self.workload.names))
        for name in found:
            index = self.workload.names.index(name)
            if not (self.table.supported & self._meaningful)[index, TOP, TOP] and self.table.supported[index].any():
                w, a = self._nearest_to_8_bits(index)
                found[name] = (_policy_width(w), _policy_width(a))
        return found

    def _nearest_to_8_bits(self, layer: int) -> tuple[int, int]:
        """Return the pair nearest to 8/8 that a layer can have: with as few more bits as can be, or else with the most."""
        pairs = [pair for pair in self.table.pairs_of(layer) if self._meaningful[layer, place_of(pair[0]), place_of(pair[1])]]
        pairs = pairs or self.table.pairs_of(layer)
        above = [pair for pair in pairs if min(pair) >= Q.MAX_BITS]
        if above:
            return min(above, key=lambda pair: (place_of(pair[0]) + place_of(pair[1]), pair))
        return max(pairs, key=lambda pair: (place_of(pair[0]) + place_of(pair[1]), pair))

    def _groups(self, tied: Iterable[Iterable[str]]) -> list[tuple[int, ...]]:
        """List the layers that decide together, by their place in the workload; each is in one group."""
        names = self.workload.names
        made = []
        for group in _lists(tied):
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
                can = describe_pairs(self.table.pairs_of(group[0]))
                raise ValueError(
                    f"layer {self.workload.names[group[0]]!r} has no pair of bits within {self._range_words()} that its "
                    f"scheme has and {self.target.name} can do; it can do {can}"
                )
            raise ValueError(f"tied layers {', '.join(self.workload.names[i] for i in group)} have no pair of bits in common")
        sums = [name for name in self._budgets if name not in (self.metric, PEAK)]
        others = [self._summed(priced(self.table, name)) for name in sums]
        compared = list(others)
        if PEAK in self._budgets:
            # Peak memory never falls when activations get more bits, and that is all that a layer alone says of it.
            compared.append(np.broadcast_to(np.arange(PLACES, dtype=float), cost.shape))
        worth = hw_models.undominated(cost, together, *compared)
        made = []
        for index, group in enumerate(self.groups):
            further = np.array([other[index][worth[index]] for other in others])
            made.append(Decision(group, _pairs(worth[index]), np.extract(worth[index], cost[index]), further))
        return made

    def _summed(self, cost: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum a table (layers, 10, 10) over the layers of each decision."""
        return np.array([cost[list(group)].sum(0) for group in self.groups])

    def _range_words(self) -> str:
        if self.widths == read_bits((self.bits[0], min(self.bits[1], Q.MAX_BITS))):
            return f"{self.bits[0]} to {self.bits[1]}"
        return self.widths.words

    @staticmethod
    def _smallest(decisions: list[Decision]) -> float:
        return float(sum(decision.prices.min() for decision in decisions))

    def _allowed(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which pairs may be chosen if they must be in a mask (10, 10); returns shape (layers, 10, 10)."""
        allowed = self._meant(mask)
        for name, (w, a) in self.pinned.items():
            index = self.workload.names.index(name)
            if not self.table.supported[index, place_of(w), place_of(a)]:
                can = describe_pairs(self.table.pairs_of(index))
                raise ValueError(
                    f"layer {name!r} is fixed at {_words((w, a))} (weights/activations), which {self.target.name} can't do: "
                    f"pin it at another pair; it can do {can}"
                )
            row = allowed[index]
            row[:] = False
            row[place_of(w), place_of(a)] = True
        return allowed

    @property
    def largest(self) -> float:
        """Return the largest budget: what the reference costs, or the least that a policy does where that is more.

        Where 16 bits or float can be chosen, or another reference is asked for, it is what the dearest policy costs if that is
        more.
        """
        found = max(self.reference, self.smallest)
        if self.bits[1] > Q.MAX_BITS or self._reference_asked is not None:
            found = max(found, float(sum(decision.prices.max() for decision in self.decisions)))
        return found

    def _meant(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which pairs of a mask (10, 10) mean something to the layers' schemes, shape (layers, 10, 10)."""
        return mask & self._meaningful & self.table.supported

    def _limit_of(self, metric: str) -> Limit:
        """Make the limit of a metric. Raises OutOfReach if the budget can't be met."""
        unit = UNITS[metric]
        if metric == self.metric:
            smallest, largest = self.smallest, self.largest
            reference = self.reference
        else:
            smallest, largest = self._extremes(metric)
            reference = self._cost_of_reference(metric)
            largest = max(largest, reference)
        if metric not in self._budgets:
            dearest = max(largest, float(sum(decision.prices.max() for decision in self.decisions)))
            return Limit(metric, unit, dearest, reference, smallest, largest, is_given=False)
        budget = self._budgets[metric]
        amount = parse_budget(budget, metric, reference)
        if self.goal.kind == TRADEOFF and metric == self.metric:
            dearest = max(largest, float(sum(decision.prices.max() for decision in self.decisions)))
            if not smallest / FARTHEST <= amount <= dearest * FARTHEST:
                raise OutOfReach(f"budget {budget} is too far to trade against: {self.reach}")
            self.tradeoff_target = amount
            return Limit(metric, unit, dearest, reference, smallest, largest, is_given=False)
        # Tables round the cost of 8 bits to the nearest, and what they say of it is a budget too.
        highest = parse_budget(describe_amount(largest, metric, UP), metric, reference)
        too_much = amount > highest * (1 + ROUNDING) and len(self._budgets) == 1 and metric == self.metric
        if amount < smallest * (1 - ROUNDING) or too_much:
            raise OutOfReach(
                f"budget {budget} is out of reach: {self._reach_of(metric, smallest, largest, reference, amount)}"
            )
        return Limit(metric, unit, min(amount, largest), reference, smallest, largest)

    def _extremes(self, metric: str) -> tuple[float, float]:
        """Return the least and the most that a policy can cost by a metric other than the main one."""
        if metric == PEAK:
            a_bits = np.empty((2, len(self.workload)), int)
            for decision in self.decisions:
                a_bits[0, list(decision.layers)] = decision.pairs[:, 1].min()
                a_bits[1, list(decision.layers)] = decision.pairs[:, 1].max()
            least, most = hw_models.peak_activation_bytes(self.workload, a_bits, batch=self.table.batch)
            return float(least), float(most)
        row = [name for name in self._budgets if name not in (self.metric, PEAK)].index(metric)
        least = sum(float(decision.others[row].min()) for decision in self.decisions)
        most = sum(float(decision.others[row].max()) for decision in self.decisions)
        return least, most

    def _reach_of(self, metric: str, smallest: float, largest: float, reference: float, amount: float) -> str:
        """Say which budgets of a metric can be met, for one that can't."""
        if metric == self.metric:
            return self.reach + self._because_pinned(amount) + self._unit_words(metric, amount, reference)
        low, high = describe_amount(smallest, metric, UP), describe_amount(largest, metric, DOWN)
        if largest == smallest:
            high = low
        fraction = np.ceil(1000 * smallest / reference) / 1000
        return f"on {self.target.name}, {metric} can be from {low} ({fraction:.3f} of {self.reference_words}) to {high}"

    def _unit_words(self, metric: str, amount: float, reference: float) -> str:
        """Say that a number is a fraction, if it would have been a good amount in the metric's unit; nothing otherwise."""
        budget = self._budgets[metric]
        if amount <= self.largest or not self.smallest <= amount / reference <= self.largest:
            return ""
        return f"; a number without a unit is a fraction: did you mean '{budget} {UNITS[metric]}'?"

    def _because_pinned(self, limit: float) -> str:
        """Name the pinned layers, if it is for them that a budget is out of reach; nothing otherwise."""
        if limit >= self.smallest * (1 - ROUNDING) or not self.pinned:
            return ""
        without = self._smallest(self._decisions(self._meant(self.widths.mask)))
        if limit < without * (1 - ROUNDING):
            return ""
        names = " and ".join(f"{name!r} at {_words(pair)}" for name, pair in self.pinned.items())
        least = describe_amount(without, self.metric, UP)
        return f"; that is for the pinned layers, {names}: without them (pinned={{}} in Python) it could be from {least}"


def _lists(tied: Any) -> list[list[Any]]:
    """Return groups of names as lists. Raises TypeError for anything else."""
    if isinstance(tied, str) or not isinstance(tied, Iterable):
        raise TypeError(f"tied is {str(tied)[:40]!r}; it must be a list of groups, each a list of names of layers")
    groups = list(tied)
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Iterable):
            raise TypeError(f"tied has {str(group)[:40]!r} for a group; each group must be a list of names of layers")
    return [list(group) for group in groups]


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
    for leaf in leaves(batches):
        check_dense(leaf, "search")
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
    except (Exception, SystemExit) as error:
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
    except (Exception, SystemExit) as error:
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


def _words(pair: tuple[int | None, int | None]) -> str:
    """Write bits of weights and activations: "4/8", "float/8"."""
    return "/".join(str(bits) for bits in pair).replace("None", "float")


def _policy_width(width: int) -> int | None:
    """Return a width as policies hold it: None for float."""
    if width == FLOAT:
        return None
    return int(width)


def _pairs(choices: NDArray[np.bool_]) -> NDArray[np.int64]:
    """List the widths of the entries of a table (10, 10) that are true, in the order in which `extract` takes them."""
    return at_places(np.argwhere(choices))
