"""Problems of which every policy is known: read from a file, searched without a network, and told how far from the best.

problem = haq.Problem.tabular("digres.npz", budget="0.15")
result = haq.solve(problem, "evolution", evaluations=50)
print(problem.best_value - result.trial.value)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

import hw_models
import quantizers as Q
from haq.problem.budget import OutOfReach, parse_budget
from haq.problem.decision import Decision
from haq.problem.evaluator import Evaluation, Evaluator
from haq.problem.goal import CHEAPEST, TRADEOFF, read_goal
from haq.problem.limits import ROUNDING, Limit
from haq.problem.objective import find_objective
from haq.problem.paired import estimated_error
from haq.problem.problem import FARTHEST, TOP, Problem
from haq.problem.schemes import schemes_by_layer
from haq.problem.table_file import UNKNOWN, TableFile, read
from haq.store.units import DOWN, UNITS, UP, counted, describe_amount, show
from hw_models.cost import CostTable
from hw_models.metrics import UNITS as UNIT_OF
from hw_models.notebook import html_table
from hw_models.widths import PLACES, pair_words

IMAGES = "images"
SHOWN = 40  # characters of a value in a message

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GivenCosts(CostTable):
    """Costs that a file tells, by one metric; what is counted from the layers is there too."""

    given: str = ""  # the metric
    costs: Floats = field(default_factory=lambda: np.empty(0))

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metric of the file."""
        return (self.given,)

    def metric(self, name: str) -> Floats:
        """Return the costs of the file for its own metric; see `CostTable.metric`."""
        if name == self.given:
            return self.costs
        return super().metric(name)


@dataclass(frozen=True)
class GivenTarget:
    """The hardware that the costs of a file are of."""

    name: str
    table: GivenCosts
    provenance: str = "estimated"

    @property
    def description(self) -> str:
        """Say what it is."""
        return f"the costs of {self.name} that a file tells"

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> CostTable:
        """Return the file's costs, which are of its own layers and one batch.

        Raises:
            ValueError: For other layers or another batch than the file's.
        """
        if workload != self.table.workload or batch not in (None, self.table.batch):
            raise ValueError(f"the costs of {self.name} are those of a file, for its own layers and batch")
        return self.table


class TableEvaluator(Evaluator):
    """Looks policies up. Nothing is computed, so that workers, if there are any, are not asked."""

    def __init__(self, file: TableFile) -> None:
        """Take what is known.

        Args:
            file: Of every policy.
        """
        self.file = file
        self.objective = find_objective("accuracy")
        self.count = file.search_images
        self.device = torch.device("cpu")
        self.expected = None
        self.outputs = None
        self.samples = None
        self.teacher = None
        self.tune = None
        self.forward = None
        self.pool = None
        self.cache: dict[Q.BitPolicy, Evaluation] = {}
        names = file.workload.names
        self._layers = [[names[layer] for layer in group] for group in file.groups]
        self._options = [{tuple(pair): index for index, pair in enumerate(pairs.tolist())} for pairs in file.pairs]

    def __getstate__(self) -> dict[str, Any]:
        """Give all that it takes to look policies up elsewhere."""
        return self.__dict__ | {"cache": {}, "pool": None}

    @property
    def network(self) -> NoReturn:  # type: ignore[override]
        """Refuse to give the quantized network, which isn't there. Raises ValueError."""
        raise no_network(self.file.name)

    @property
    def worker_threads(self) -> int:
        """Tell how many threads a worker takes."""
        return 1

    def pairs_of(self, policy: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """Return the pair of every decision. Raises ValueError for a policy whose tied layers differ, or that lacks one."""
        pairs = []
        for names in self._layers:
            found = {policy.get(name) for name in names}
            if len(found) > 1 or None in found:
                raise ValueError(f"the policy must have one pair of bits for the layers {', '.join(names)} together")
            pairs.append(found.pop())
        return tuple(pairs)  # type: ignore[arg-type]

    def index_of(self, policy: Mapping[str, Any]) -> int | None:
        """Return the place of a policy among those that can be chosen; None for one that can't be."""
        index = 0
        for pair, options in zip(self.pairs_of(policy), self._options, strict=True):
            if pair not in options:
                return None
            index = index * len(options) + options[pair]
        return index

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        """Look a policy up; all images are looked at, whatever there is to beat.

        Raises:
            ValueError: Naming it, for a policy that the table doesn't know.
        """
        found = self.cache.get(policy)
        if found is None:
            self.cache[policy] = found = self._looked_up(policy)
        return found

    def _looked_up(self, policy: Q.BitPolicy) -> Evaluation:
        file, index = self.file, self.index_of(policy)
        if index is not None and file.accuracy[index] != UNKNOWN:
            values = float(file.accuracy[index]), float(file.loss[index]), float(file.kl[index])
        else:
            pairs = self.pairs_of(policy)
            if pairs not in file.extra:
                raise self.unknown(policy, index)
            values = file.extra[pairs]
        accuracy, loss, divergence = values
        return Evaluation(accuracy, loss, self.count, divergence)

    def unknown(self, policy: Q.BitPolicy, index: int | None) -> ValueError:
        """Make the error of a policy whose value isn't told."""
        words = ", ".join(f"{name} {pair_words(*policy[name])}" for name in self.file.workload.names)
        why = "none that can be chosen, nor one of its single operands"
        if index is not None:
            why = "beyond every budget, and was not evaluated"
        return ValueError(f"the table {self.file.name!r} doesn't know the policy {words}: it is {why}")

    def tested(self, policy: Q.BitPolicy) -> Evaluation:
        """Tell what a policy gives on the test images. Raises ValueError for one that can't be chosen or isn't known."""
        index = self.index_of(policy)
        if index is None or self.file.accuracy_test[index] == UNKNOWN:
            raise self.unknown(policy, index)
        return Evaluation(float(self.file.accuracy_test[index]), float(self.file.loss_test[index]), self.file.test_images)

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Do nothing: everything is known already."""

    def by_sample(self, policy: Q.BitPolicy) -> None:
        """Tell nothing: what a policy is worth on single images isn't known."""

    @property
    def races(self) -> bool:
        """Say that no evaluation ends early: each is known whole."""
        return False

    def measure(self, network: Any) -> NoReturn:
        """Refuse to judge a network. Raises ValueError: there are no images."""
        raise no_network(self.file.name)


class TabularProblem(Problem):
    """A problem of which every policy is known, so that the best is.

    It is searched as any other: `haq.solve`, `Session`, the environments. What needs a network (a quantized one, fine-tuning,
    sensitivities that are computed from gradients) is refused. `haq.problem.table_file` describes the file.

    Attributes:
        file: What was read.
        best_value: The best accuracy within the budget.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | TableFile,
        budget: float | str | None = None,
        *,
        max_drop: float | None = None,
        at_least: float | str | None = None,
        tradeoff: str | tuple[float, float] | None = None,
    ) -> None:
        """Read a problem; see `Problem.tabular`."""
        file = path
        if not isinstance(file, TableFile):
            file = read(file)
        self.file = file
        self.objective = find_objective("accuracy")
        self.evaluator = TableEvaluator(file)
        self.goal = read_goal(self.objective, max_drop, at_least, tradeoff)
        self.workload, self.groups = file.workload, file.groups
        self.metric, self.unit = file.metric, UNIT_OF[file.metric]
        self.batch = None
        self.widths = file.widths
        self.table = _table_of(file)
        self.target = GivenTarget(file.target, self.table)
        # Of a pair that can't be done nobody asks; as in every problem its cost is the layer's dearest.
        dearest = np.nanmax(file.cost, axis=(1, 2), keepdims=True)
        self.cost = np.where(np.isnan(file.cost), dearest, file.cost)
        self._meaningful = np.isfinite(file.cost)
        self.decisions = [
            Decision(group, pairs, prices) for group, pairs, prices in zip(file.groups, file.pairs, file.prices, strict=True)
        ]
        self.quantization_error = file.noise
        self.layer_errors = np.empty((len(self.workload.layers), 2, PLACES))
        for group, errors in zip(file.groups, file.noise, strict=True):
            self.layer_errors[list(group)] = errors
        self.schemes = schemes_by_layer("linear", self.workload.names)
        self.roundings = dict.fromkeys(self.workload.names, "nearest")
        self.pinned = {}
        for decision in self.decisions:
            if len(decision.pairs) == 1:
                pair = self.decide(one.pairs[0] for one in self.decisions)[self.workload.names[decision.layers[0]]]
                self.pinned |= {self.workload.names[layer]: pair for layer in decision.layers}
        self._reference_asked = None
        self.reference_policy = self.uniform(TOP + 1)
        self.reference = float(self.cost[:, TOP, TOP].sum())
        self.smallest = self._smallest(self.decisions)
        self.peak = None
        self.float_result = Evaluation(file.float_accuracy, math.nan, file.search_images, 0.0)
        self.goal.check(self.objective, file.float_accuracy)
        self._prices = file.all_prices()
        known = file.accuracy != UNKNOWN
        # Below it everything is known.
        self._unknown_from = float(np.min(self._prices[~known], initial=math.inf))
        self._set_budget(budget)

    def __repr__(self) -> str:
        """Say on one line what is searched."""
        return (
            f"Problem({self.file.name}: {len(self.file.accuracy):,} policies of {counted(len(self.workload), 'layers')} on "
            f"{self.target.name}, {self._budget_words()}, bits {self.widths.words}, float "
            f"{show(self.float_accuracy, self.objective.unit)})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "table": f"{self.file.name}, {len(self.file.accuracy):,} policies of {counted(len(self.workload), 'layers')}",
            "target": f"{self.target.name}: {self.target.description}; {self.table.provenance}",
            "budget": self._budget_words(),
            "bits": self.widths.words,
            "objective": f"{self.objective.words}{self.count_words(', on ')}",
            "float network": show(self.float_accuracy, self.objective.unit),
        }
        return html_table("Problem", ("", ""), rows.items())

    @property
    def network(self) -> NoReturn:  # type: ignore[override]
        """Refuse to give the network, which isn't there.

        Raises:
            ValueError: Always.
        """
        raise no_network(self.file.name)

    @property
    def calibration(self) -> NoReturn:  # type: ignore[override]
        """Refuse to give the calibration images, which aren't there.

        Raises:
            ValueError: Always.
        """
        raise no_network(self.file.name)

    @property
    def forward(self) -> NoReturn:  # type: ignore[override]
        """Refuse to tell how outputs are computed.

        Raises:
            ValueError: Always.
        """
        raise no_network(self.file.name)

    def quantized(self, policy: Q.BitPolicy) -> NoReturn:
        """Refuse to make a quantized network. Raises ValueError."""
        raise no_network(self.file.name)

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metric that the file has."""
        return (self.metric,)

    @property
    def network_words(self) -> str:
        """Name the network, which isn't here: as the table is called."""
        return self.file.name

    @property
    def samples_are(self) -> str:
        """Name what policies are judged on."""
        return IMAGES

    @property
    def largest(self) -> float:
        """Return the largest budget within which everything is known: what the dearest policy within it costs."""
        return float(self._prices[self._is_known(self._prices)].max())

    @property
    def reach(self) -> str:
        """Say in words which budgets can be met and are known."""
        low, high = describe_amount(self.smallest, self.metric, UP), describe_amount(self.largest, self.metric, DOWN)
        if self.largest == self.smallest:
            high = low
        keys = ", ".join(repr(key) for key in self.file.limits)
        return f"in the table {self.file.name!r}, {self.metric} can be from {low} to {high}, or one of its limits {keys}"

    @property
    def best_value(self) -> float:
        """Return the best accuracy of a policy within the budget, on the search images."""
        return float(self.file.accuracy[self._prices <= self.limit * (1 + ROUNDING)].max())

    def test(self, policy: Q.BitPolicy) -> Evaluation:
        """Tell what a policy that can be chosen gives on the test images.

        Args:
            policy: The policy.

        Returns:
            Its accuracy and loss, as the table has them.

        Raises:
            ValueError: Naming it, for a policy that the table doesn't know.
        """
        return self.evaluator.tested(policy)  # type: ignore[attr-defined,no-any-return]

    def paired_error(self, policy: Q.BitPolicy, other: Q.BitPolicy) -> float | None:
        """Estimate the paired standard error of two policies from their divergences (`haq.problem.paired.estimated_error`)."""
        return estimated_error(self.evaluate(policy), self.evaluate(other))

    def on(
        self,
        target: str | hw_models.Target,
        budget: Any,
        *,
        max_drop: float | None = None,
    ) -> Problem:
        """Put the same problem within another budget; everything evaluated is shared.

        Args:
            target: The table's own, or its name.
            budget: See `Problem.tabular`.
            max_drop: Likewise.

        Returns:
            The other problem.

        Raises:
            ValueError: For another target, which the table knows nothing of, and as `Problem.tabular` does.
        """
        if target not in (self.target, self.target.name):
            name = getattr(target, "name", target)
            raise ValueError(f"the table {self.file.name!r} has costs of {self.target.name}, none of {str(name)[:SHOWN]}")
        made = copy.copy(self)
        if max_drop is not None:
            made.goal = read_goal(self.objective, max_drop, None, None)
        made._set_budget(budget)
        return made

    def _is_known(self, amounts: Any) -> Any:
        """Say whether everything is known that costs no more than an amount."""
        return amounts * (1 + ROUNDING) < self._unknown_from

    def _set_budget(self, budget: Any) -> None:
        """Set what a policy may cost. Raises ValueError for a budget that is none, or is out of reach."""
        largest = self.largest
        self._budgets = {}
        if budget is None and self.goal.kind == CHEAPEST:
            self.limits = (self._limit(largest, is_given=False),)
            return
        if budget is None:
            budget = next(iter(self.file.limits))
        amount = self._amount(budget)
        self._budgets = {self.metric: budget}
        if self.goal.kind == TRADEOFF:
            if not self.smallest / FARTHEST <= amount <= largest * FARTHEST:
                raise OutOfReach(f"budget {budget} is too far to trade against: {self.reach}")
            self.tradeoff_target = amount
            self.limits = (self._limit(largest, is_given=False),)
            return
        if amount in self.file.limits.values():
            self.limits = (self._limit(amount),)
            return
        known = self._is_known(amount)
        if math.isinf(self._unknown_from):
            # A number beyond the dearest policy is meant as something else; amounts are written with few digits.
            highest = parse_budget(describe_amount(largest, self.metric, UP), self.metric, 1.0)
            known = amount <= highest * (1 + ROUNDING)
        if amount < self.smallest * (1 - ROUNDING) or not known:
            raise OutOfReach(f"budget {str(budget)[:SHOWN]} is out of reach: {self.reach}")
        self.limits = (self._limit(amount),)

    def _limit(self, amount: float, is_given: bool = True) -> Limit:
        return Limit(self.metric, self.unit, amount, self.reference, self.smallest, self.largest, is_given)

    def _amount(self, budget: Any) -> float:
        """Return a budget in the metric's unit: a key of the file's limits, or else an amount."""
        limits = self.file.limits
        if isinstance(budget, Mapping) and list(budget) == [self.metric]:
            budget = budget[self.metric]
        if isinstance(budget, str) and budget in limits:
            return limits[budget]
        number = _number(budget)
        for key, amount in limits.items():
            if number is not None and number == _number(key):
                return amount
        if number is None and not isinstance(budget, str):
            keys = ", ".join(map(repr, limits))
            raise ValueError(f"budget is {str(budget)[:SHOWN]!r}; it must be one of the table's limits {keys}, or an amount")
        try:
            # A number without a unit is an amount in the metric's own.
            return parse_budget(budget, self.metric, 1.0)
        except ValueError:
            keys = ", ".join(map(repr, limits))
            units = ", ".join(UNITS[self.metric])
            raise ValueError(
                f"budget {str(budget)[:SHOWN]!r} is not understood: the table {self.file.name!r} has the limits {keys}; any "
                f"other is an amount in {units}"
            ) from None


def no_network(name: str) -> ValueError:
    """Make the error of whatever needs the network of a table."""
    return ValueError(
        f"the table {name!r} has no network: what is computed with one (quantized networks, fine-tuning, sensitivities by "
        "hessian or gradient) can't be had"
    )


def _table_of(file: TableFile) -> GivenCosts:
    """Make the cost table of a file: what it doesn't price can't be done."""
    priced = np.isfinite(file.cost)
    # Only whether it is finite matters of it: what costs are told is for `GivenCosts.metric` to say.
    stored = np.where(priced, hw_models.storage_bytes(file.workload), np.nan)
    return GivenCosts(file.target, "estimated", file.workload, 1, None, None, stored, given=file.metric, costs=file.cost)


def _number(value: Any) -> float | None:
    """Return a number, given as such or as a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | np.floating | np.integer):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
