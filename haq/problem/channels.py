"""The joint problem: which share of its channels each group keeps, beside the widths of every layer.

    problem = haq.Problem(network, calibrate, search, "edge", budget=0.2, prune="0.25:1", criterion="fpgm")
    problem.evaluate(problem.uniform(8).with_keep({"features.0": 0.5}))

A policy says in `keep` which share of a group's channels is kept (`quantizers.BitPolicy`); groups that it doesn't name keep
all of theirs. Such a policy costs what the really smaller layers cost, and is worth what the really smaller network is worth:
channels are removed, the statistics of norms are taken anew, and it is quantized at just the policy's bits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.channel_costs import MEAN_BITS, VariantCosts
from haq.problem.channel_evaluation import ChannelEvaluator, Recipe, frozen_norms
from haq.problem.channel_shapes import Shapes
from haq.problem.decision import Decision, priced
from haq.problem.joint import JointCosts
from haq.problem.limits import Limit, PeakLimit
from haq.problem.problem import NotAllowed, Problem
from haq.problem.samples import Samples, outputs_of, samples_in
from haq.problem.shares import read_shares, shares_words
from haq.store.units import counted
from hw_models import CostTable, Workload, trust
from hw_models.metrics import PEAK
from hw_models.storage import peak_activation_bytes
from hw_models.target import is_measured
from hw_models.widths import PLACES, places
from quantizers.calling import inputs_of
from quantizers.norms import running_norms
from quantizers.pruning.channels import ChannelGroup, ChannelGroups
from quantizers.pruning.criterion import Criterion, Ranking

Shares = Mapping[str, float]  # what is kept, by the name of a group of channels; groups that aren't named keep all
Numbers = NDArray[np.int64]  # (..., channel decisions): the number of an option for each of them
Bits = Mapping[str, tuple[int | None, int | None]]

MOST_REASONS = 4  # in a sentence
AT_ONCE = 4096  # policies whose costs are looked up at a time


class ChannelDecision(NamedTuple):
    """A group of channels, and what it may keep.

    Options are in the order of their counts, so that the last one keeps all channels.

    Attributes:
        group: The group's name.
        shares: What may be kept, shape (options,): shares as policies name them, the last being 1.
        counts: How many channels these are, shape (options,); no two are the same.
        errors: The least part of the squared weights of the layers which write the channels that is lost with so many of them,
            from 0 to 1, shape (options,); 0 for the last one. It is of the kind of `Problem.layer_errors`.
        layers: The layers that become smaller with it, by their places in the workload.
    """

    group: str
    shares: NDArray[np.float64]
    counts: NDArray[np.int64]
    errors: NDArray[np.float64]
    layers: tuple[int, ...]


class ChannelProblem(Problem):
    """A problem in which channels are chosen beside widths; what `haq.Problem` makes where `prune` is given.

    All that a `Problem` has is there and is of the unpruned network: `workload`, `table`, `cost`, `decisions` (the layers'
    pairs of widths), `layer_errors`, `reference`, `float_accuracy`. The limits' `smallest` alone is with the fewest channels.
    All that takes a policy (`policy_cost`, `costs`, `holds`, `check_policy`, `evaluate`, `quantized`) takes those with `keep`.

    Attributes:
        channel_groups: The groups of channels of the network, those that can't be pruned among them.
        channel_decisions: What there is to choose of channels, in the order of the groups: those that can be pruned and have
            more than one count to choose from. None in what `at` makes, where channels are chosen already.
        not_pruned: Why the other groups aren't among them, in words, by name.
        shares: The shares that may be kept, from small to large, the last being 1.
        criterion: What says which channels are kept.
        keep: What is kept of every policy's channels where they are chosen already; empty otherwise.
    """

    channel_groups: ChannelGroups
    channel_decisions: tuple[ChannelDecision, ...]
    not_pruned: dict[str, str]
    evaluator: ChannelEvaluator
    _chooses_channels = True
    _joint: tuple[JointCosts | None, list[Decision], tuple[Limit, ...]] = (None, [], ())

    def __init__(self, *given: Any, prune: Any = None, criterion: str | Criterion = "l1", **named: Any) -> None:
        """Make a problem as `Problem` does.

        Args:
            given: What `Problem` takes, and so is `named`.
            prune: The shares of channels that may be kept; see `Problem`.
            criterion: What says which channels are kept; see `Problem`.
            named: What `Problem` takes.

        Raises:
            ValueError: As `Problem` does; for shares that aren't any; for a network of which no channels can be pruned, saying
                why; for a target that says nothing of smaller layers, and a criterion that needs a loss where there is none.
        """
        self.shares = read_shares(prune)
        if isinstance(criterion, str) and ":" in criterion and criterion not in Criterion.known:
            trust.allow(criterion, "criterion")
        self.criterion = Criterion.named(criterion)
        self.keep: Shares = {}
        self._costs: VariantCosts | None = None
        super().__init__(*given, **named)

    def __repr__(self) -> str:
        """Say on one line what is searched."""
        groups = counted(len(self.channel_decisions), "groups")
        words = f"{groups} of channels keep {shares_words(self.shares)} by {self.criterion.name}"
        return f"{super().__repr__()[:-1]}, {words})"

    def _find_channels(self, example: Any) -> None:
        """Find the groups of channels, and what each may keep, by a batch."""
        network, forward = self.network, self.forward
        if self.criterion.needs_loss and not self.objective.takes_scores:
            raise ValueError(
                f"criterion {self.criterion.name!r} needs a loss, which objective {self.objective.name!r} doesn't have "
                "without targets: choose another criterion, such as l1 or fpgm"
            )
        if running_norms(network) and sum(map(samples_in, self.calibration)) < 2:
            raise ValueError(
                "`calibrate` has one sample, by which norms of a smaller network have no variance: give 2 or more"
            )
        given = example
        if forward is None:
            given = inputs_of(example, network)
        self.channel_groups = Q.channel_groups(network, given, forward=forward)
        pinned = self._pins_asked
        if pinned is None:
            pinned = Q.ends(self.workload.names)
        self.not_pruned = dict(self.channel_groups.fixed)
        found, options = [], []
        for group in self.channel_groups.groups:
            # The largest share of each count.
            by_count = {group.count(share): share for share in self.shares}
            fixed = [name for name in group.writers if name in pinned]
            if fixed:
                self.not_pruned[group.name] = f"layer {fixed[0]!r}, which writes them, is pinned"
            elif len(by_count) == 1:
                self.not_pruned[group.name] = f"every share keeps all {group.channels} of them"
            else:
                found.append(group)
                options.append(by_count)
        if not found:
            raise ValueError(f"no channels of {type(network).__name__} can be pruned: {self._reasons()}")
        self._shapes = Shapes(self.workload, found, [min(by_count) for by_count in options], self._runner(example))
        decisions = []
        for index, (group, by_count) in enumerate(zip(found, options, strict=True)):
            counts = np.array(list(by_count), np.int64)
            errors = _least_losses(network, group, counts)
            shares = np.array(list(by_count.values()))
            decisions.append(ChannelDecision(group.name, shares, counts, errors, self._shapes.touched(index)))
        self.channel_decisions = tuple(decisions)
        self._options = self.channel_decisions

    def _reasons(self) -> str:
        """Say why groups can't be pruned, those with one reason together."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.not_pruned.items():
            by_reason.setdefault(reason, []).append(name)
        if not by_reason:
            return "it has no convolution or linear layer whose output others read"
        parts = [f"{', '.join(map(repr, names[:MOST_REASONS]))} ({reason})" for reason, names in by_reason.items()]
        if len(parts) > MOST_REASONS:
            parts = [*parts[:MOST_REASONS], f"and {len(parts) - MOST_REASONS} more"]
        return "; ".join(parts)

    def _runner(self, example: Any) -> Callable[[Mapping[str, int]], Workload]:
        """Return what makes a network with so many channels of each group, whichever they are, and traces it on a batch."""
        network, forward = self.network, self.forward

        def run(counts: Mapping[str, int]) -> Workload:
            kept = {name: range(count) for name, count in counts.items()}
            made = Q.remove_channels(network, self.channel_groups, kept)
            if forward is None:
                return hw_models.trace(made, copy.deepcopy(inputs_of(example, network)))
            return hw_models.trace(made, example, forward=lambda module, given: outputs_of(module, given, forward))

        return run

    def _price(self, target: hw_models.Target) -> None:
        """Set all that depends on the target."""
        self._costs = None
        super()._price(target)

    def _choose(self) -> None:
        """Set what can be chosen, and the least that it can cost with the fewest channels."""
        super()._choose()
        if self._costs is None:
            metrics = dict.fromkeys((self.metric, *self._budgets))
            self._costs = VariantCosts(self.target, self.table, self.schemes, self.batch, tuple(metrics))
            self._check_target()
        self._widen()
        self.smallest = self._least_of(self.metric)

    def _check_target(self) -> None:
        """Check that the target can price smaller layers, each by itself."""
        costs = self._costs
        assert costs is not None
        corners = self._corners()
        rows = costs.rows(self._shapes.sizes(corners))
        priced = np.isfinite(costs.of_cells(rows)).any(3)
        able: NDArray[np.bool_] = np.all(priced, axis=(1, 2))
        if not able[:-1].any() and costs.refused:
            name, reason = next(iter(costs.refused.items()))
            raise ValueError(f"{self.target.name} can't price layer {name!r} with fewer channels: {reason}")
        mixed = corners[-1:].copy()
        mixed[:, ::2] = corners[0, ::2]
        costs.check_independent(self._shapes.sizes(mixed))

    def _corners(self) -> Numbers:
        """Return channel counts (shapes, groups) at which all groups keep the same share; all channels come last.

        Of a target that is measured they are the fewest and all.
        """
        shares = self.shares
        if is_measured(self.target.name):
            shares = (shares[0], shares[-1])
        return np.array([[group.count(share) for group in self._shapes.groups] for share in shares], np.int64)

    def _widen(self) -> None:
        """Add the pairs of widths to decisions that are worth choosing with fewer channels, if not with all."""
        worth = [{tuple(pair) for pair in decision.pairs.tolist()} for decision in self.decisions]
        whole = self._pairs_mask()
        for counts in self._corners()[:-1]:
            try:
                smaller = self._view(counts, whole).decisions
            except ValueError:
                continue  # the target can't do some of these layers
            for pairs, decision in zip(worth, smaller, strict=True):
                pairs.update(tuple(pair) for pair in decision.pairs.tolist())
        self._worth = worth
        self.decisions = self._priced_pairs()

    def _pairs_mask(self) -> NDArray[np.bool_]:
        """Tell which pairs the layers can have with all channels, shape (layers, 10, 10)."""
        return self._allowed(self.widths.mask)

    def _priced_pairs(self) -> list[Decision]:
        """Return decisions with the pairs in `_worth`, at what they cost in this problem's layers."""
        tables = [self._summed(priced(self.table, name)) for name in self._sum_metrics()]
        cost = self._summed(self.cost)
        made = []
        for index, group in enumerate(self.groups):
            pairs = np.array(sorted(self._worth[index], key=lambda pair: tuple(places(np.array(pair)))), np.int64)
            w, a = places(pairs).T
            further = np.array([table[index][w, a] for table in tables])
            made.append(Decision(group, pairs, cost[index][w, a], further))
        return made

    def _sum_metrics(self) -> list[str]:
        """List the metrics of further limits that are sums over layers."""
        return [name for name in self._budgets if name not in (self.metric, PEAK)]

    def _view(self, counts: Numbers, mask: NDArray[np.bool_]) -> ChannelProblem:
        """Make the problem of widths alone in which groups have so many channels.

        Args:
            counts: Channels of each group.
            mask: The pairs that layers may have, shape (layers, 10, 10).

        Raises:
            ValueError: For layers that the target can't do.
        """
        costs = self._costs
        assert costs is not None
        made = copy.copy(self)
        made.workload = dataclasses.replace(self.workload, layers=self._shapes.layers(counts))
        rows = costs.rows(self._shapes.sizes(counts[None]))[0]
        made.table = costs.table_of(made.workload, rows)
        made.cost = priced(made.table, self.metric)
        made.decisions = made._decisions(mask & made.table.supported)
        made.smallest = made._smallest(made.decisions)
        made._several = (None, [], ())
        return made

    def at(self, keep: Shares) -> ChannelProblem:
        """Make the problem in which the channels are chosen already, and only widths are left to choose.

        Its `workload`, `table`, `cost`, `decisions`, `peak` and `several` are of the really smaller layers, its limits are
        those of this problem, and `decide`, `uniform` and `policy` make policies that keep these channels. So whatever
        plans widths within budgets (`envs.plan`, `haq.solvers.space`, `Programme`) does so for these channels. Its pairs of
        widths are among those of this problem. Limits may be out of its reach (`smallest` tells). It shares what was
        evaluated.

        Args:
            keep: What is kept, by the name of a group.

        Returns:
            The problem.

        Raises:
            NotAllowed: As `numbers_of` does.
            ValueError: Naming the layer, if the target can't do one of the smaller ones.
        """
        counts = self._counts(self.numbers_of(keep)[None])[0]
        mask = np.zeros((len(self.workload), PLACES, PLACES), bool)
        for decision in self.decisions:
            w, a = decision.places.T
            for layer in decision.layers:
                mask[layer, w, a] = True
        made = self._view(counts, mask)
        made.keep = dict(self.keep_of(self.numbers_of(keep)))
        made.channel_decisions = ()
        made.workload = self._shapes.workload_of(counts)
        made.table = dataclasses.replace(made.table, workload=made.workload)
        if self.peak is not None:
            made.peak = PeakLimit(made.workload, self.table.batch, self.peak.amount)
        return made

    def _least_of(self, metric: str) -> float:
        """Return the least that a policy costs by a metric where all groups keep the same share."""
        counts = self._corners()
        costs = self._costs
        assert costs is not None
        allowed = self._pairs_mask()
        if metric == PEAK:
            narrowest = np.empty(len(self.workload), np.int64)
            for decision in self.decisions:
                narrowest[list(decision.layers)] = decision.pairs[:, 1].min()
            return float(self._peaks(counts, np.repeat(narrowest[None], len(counts), 0)).min())
        sizes = self._shapes.sizes(counts)
        rows = costs.rows(sizes)
        column = costs.metrics.index(metric)
        table = np.where(allowed.reshape(len(self.workload), -1), costs.of_cells(rows)[:, column], np.inf)
        total = np.zeros(len(counts))
        for group in self.groups:
            total += table[:, list(group)].sum(1).min(1)
        if metric == MEAN_BITS:
            total /= costs.weights(rows)
        return float(total.min())

    def _extremes(self, metric: str) -> tuple[float, float]:
        """Return the least and the most that a policy can cost by a metric other than the main one."""
        least, most = super()._extremes(metric)
        return min(least, self._least_of(metric)), most

    @property
    def reach(self) -> str:
        """Say in words which budgets of the main metric can be met."""
        return f"{super().reach}; the least is that of {self.shares[0]:g} of the channels"

    def _reach_from_one_bit(self, fraction: float) -> str:
        """Say nothing of other widths: shares of channels are what there is more of."""
        return ""

    def _check_together(self) -> None:
        """Raise OutOfReach for budgets that can't be met together, whatever share all groups keep."""
        if len(self.limits) == 1:
            return
        refusal: OutOfReach | None = None
        for counts in self._corners():
            try:
                view = self._view_of_limits(counts)
                Problem._check_together(view)
            except OutOfReach as error:
                refusal = refusal or error
            except ValueError:
                continue  # the target can't do some of these layers
            else:
                return
        if refusal is not None:
            raise OutOfReach(f"{refusal}; that is with {self.shares[0]:g} of the channels") from refusal

    def _view_of_limits(self, counts: Numbers) -> ChannelProblem:
        view = self._view(counts, self._pairs_mask())
        if self.peak is not None:
            view.workload = self._shapes.workload_of(counts)
            view.peak = PeakLimit(view.workload, self.table.batch, self.peak.amount)
        return view

    def _evaluator_of(
        self, qnetwork: nn.Module, samples: Samples | None, tune: Callable[[nn.Module], nn.Module] | None
    ) -> ChannelEvaluator:
        """Make what judges policies of a quantized network on samples; which channels are kept is found out once."""
        made = ChannelEvaluator(
            qnetwork,
            samples,
            recipe=self._recipe(),
            teacher=self.network,
            tune=tune,
            objective=self.objective,
            forward=self.forward,
        )
        before = getattr(self, "evaluator", None)
        if before is not None:
            made.take_ranking(before)
        else:
            made.ranking  # noqa: B018  what a criterion refuses is said before anything is evaluated
        return made

    def _recipe(self) -> Recipe:
        loss: Callable[[Any, Any], Tensor] | None = None
        if self.objective.takes_scores:
            loss = self.objective.training_loss
        return Recipe(
            groups=self.channel_groups,
            criterion=self.criterion,
            loss=loss,
            calibration=self.calibration,
            schemes=self.schemes,
            correction=self._correction,
            roundings=self.roundings,
            forward=self.forward,
            frozen=frozen_norms(self.network),
        )

    @property
    def ranking(self) -> Ranking:
        """Return what the criterion found out about the channels of the network: which are kept, for any count."""
        return self.evaluator.ranking

    def keep_of(self, numbers: Iterable[int]) -> dict[str, float]:
        """Return what policies call `keep` for an option of every channel decision.

        Args:
            numbers: The number of an option for each channel decision, in order.

        Returns:
            Shares of channels, by the group's name; groups that keep all are left out.
        """
        found = {}
        for decision, number in zip(self._options, numbers, strict=True):
            share = float(decision.shares[number])
            if share < 1:
                found[decision.group] = share
        return found

    def numbers_of(self, keep: Shares) -> Numbers:
        """Return the option of every channel decision for what a policy keeps.

        Args:
            keep: Shares of channels, by the group's name; a group that isn't named keeps all.

        Returns:
            Numbers of options, shape (channel decisions,).

        Raises:
            NotAllowed: A ValueError, naming it, for a group that can't be pruned or a share that isn't among the options.
        """
        found = np.array([len(decision.counts) - 1 for decision in self._options], np.int64)
        for name, share in keep.items():
            if name not in self._places:
                raise NotAllowed(self._refusal(name))
            decision = self._options[self._places[name]]
            matching = np.flatnonzero(decision.shares == share)
            if not len(matching):
                allowed = ", ".join(f"{one:g}" for one in decision.shares)
                raise NotAllowed(f"group {name!r} can't keep {share:g} of its channels; it may keep {allowed}")
            found[self._places[name]] = matching[0]
        return found

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {decision.group: index for index, decision in enumerate(self._options)}

    def _refusal(self, name: str) -> str:
        """Say why a group's channels can't be chosen."""
        if name in self.not_pruned:
            return f"the channels of {name!r} can't be pruned: {self.not_pruned[name]}"
        known = ", ".join(self._places)
        return f"the policy keeps a part of {str(name)[:80]!r}, which is no group of channels; groups are {known}"

    def _counts(self, numbers: object) -> Numbers:
        """Return channel counts (policies, groups) for options (policies, channel decisions)."""
        given = np.asarray(numbers)
        if given.ndim != 2 or given.shape[1] != len(self._options) or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"options of channels must be integers (policies, {len(self._options)}), not {given.dtype} {given.shape}"
            )
        return np.stack([decision.counts[given[:, i]] for i, decision in enumerate(self._options)], axis=1)

    def totals(self, numbers: object, w_bits: object, a_bits: object) -> NDArray[np.float64]:
        """Tell what policies cost, many at a time.

        Args:
            numbers: The options of the channel decisions, integers of shape (policies, channel decisions).
            w_bits: Weight widths in the order of the workload, float being 32, integers of shape (policies, layers).
            a_bits: Activation widths, the same shape.

        Returns:
            Costs by every limit in the order of `limits`, peak memory among them, shape (policies, limits); infinite where
            the target can't do it.
        """
        counts = self._counts(numbers)
        w, a = np.asarray(w_bits), np.asarray(a_bits)
        parts = [slice(begin, begin + AT_ONCE) for begin in range(0, len(counts), AT_ONCE)]
        found = [self._totals(counts[part], w[part], a[part]) for part in parts]
        if not found:
            return np.empty((0, len(self.limits)))
        return np.concatenate(found)

    def _totals(self, counts: Numbers, w: NDArray[Any], a: NDArray[Any]) -> NDArray[np.float64]:
        costs = self._costs
        assert costs is not None
        rows = costs.rows(self._shapes.sizes(counts))
        cells = PLACES * places(w) + places(a)
        sums = costs.totals(rows, cells)
        found = np.empty((len(counts), len(self.limits)))
        for column, limit in enumerate(self.limits):
            if limit.metric != PEAK:
                found[:, column] = sums[:, costs.metrics.index(limit.metric)]
                continue
            able = np.isfinite(sums).all(1)
            found[:, column] = np.where(able, self._peaks(counts, a), np.inf)
        return found

    def _peaks(self, counts: Numbers, a_bits: NDArray[Any]) -> NDArray[np.int64]:
        """Return the peak of activation memory in bytes, shape (policies,)."""
        elements = self._shapes.elements(counts)
        return peak_activation_bytes(self._shapes.workload, a_bits, batch=self.table.batch, elements=elements)

    def within(self, totals: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which policies keep all limits, but for rounding.

        Args:
            totals: What `totals` returned: costs, shape (policies, limits), in the units of their metrics.

        Returns:
            Booleans, shape (policies,).
        """
        kept = np.ones(len(totals), bool)
        for column, limit in zip(totals.T, self.limits, strict=True):
            kept &= np.array([limit.holds(cost) for cost in column], bool)
        return kept

    def policy_cost(self, policy: Bits) -> float:
        """Return the cost of a policy in the metric's unit; infinity if the target can't do it."""
        if self._keeps_all(policy):
            return super().policy_cost(policy)
        return self._costs_of(policy)[self.metric]

    def costs(self, policy: Bits) -> dict[str, float]:
        """Return what a policy costs by every metric that is limited, main one first; infinity if the target can't do it."""
        if self._keeps_all(policy):
            return super().costs(policy)
        return self._costs_of(policy)

    def _keeps_all(self, policy: Bits) -> bool:
        """Say whether a policy keeps all channels, in a problem whose tables are of these."""
        return not self.keep and not _keep_of(policy)

    def _costs_of(self, policy: Bits) -> dict[str, float]:
        """Return what a policy that keeps a part of the channels costs; see `costs`."""
        w, a = self.bit_arrays(policy)
        found = self.totals(self.numbers_of(_keep_of(policy))[None], w[None], a[None])[0]
        return {limit.metric: float(cost) for limit, cost in zip(self.limits, found, strict=True)}

    def decide(self, pairs: Iterable[Iterable[int]], keep: Shares | None = None) -> Q.BitPolicy:
        """Make a policy of one pair of widths for each of the decisions, and of what is kept; None: what `at` says, or all."""
        policy = super().decide(pairs)
        if keep is None:
            return policy
        return policy.with_keep(keep)

    def policy(self, w_bits: Iterable[int], a_bits: Iterable[int]) -> Q.BitPolicy:
        """Make a policy of two sequences of widths in the order of the workload, float being 32."""
        return super().policy(w_bits, a_bits).with_keep(self.keep)

    def uniform(self, bits: int, *, keep_pinned: bool = False) -> Q.BitPolicy:
        """Make the policy with the same width everywhere; see `Problem.uniform`."""
        return super().uniform(bits, keep_pinned=keep_pinned).with_keep(self.keep)

    def check_policy(self, policy: object) -> None:
        """Check that a policy is one of this problem's, whatever it costs.

        Args:
            policy: What somebody wants to be evaluated.

        Raises:
            NotAllowed: As `Problem.check_policy` does; naming the group, for channels that can't be pruned or a share that
                isn't among the options.
        """
        super().check_policy(policy)
        keep = _keep_of(policy)
        self.numbers_of(keep)
        if not self.channel_decisions and keep != self.keep:
            raise NotAllowed("the channels are chosen already, and the policy keeps others: `at` tells which")

    def means_something(self, policy: Bits) -> bool:
        """Say whether every layer's bits have a meaning in its scheme, and can be done by the target at its channels."""
        keep = _keep_of(policy)
        if not keep:
            return super().means_something(policy)
        return bool(self._meaningful[self._cells(policy)].all()) and math.isfinite(self.policy_cost(policy))

    def quantized(self, policy: Q.BitPolicy) -> nn.Module:
        """Make the quantized network of a policy, at its bits, that can be trained; with fewer channels, if it keeps fewer."""
        if not policy.keep:
            return super().quantized(policy)
        made = self.evaluator.quantized(policy)
        floats = dict(self.network.named_parameters())
        for name, parameter in made.named_parameters():
            # Those that are no float network's are what a scheme learns.
            parameter.requires_grad_(name not in floats or floats[name].requires_grad)
        Q.set_policy(made, policy)
        return made.eval()

    def pruned(self, keep: Shares) -> nn.Module:
        """Make the smaller float network that policies with these channels are quantized from, with new norms' statistics.

        Args:
            keep: Shares of channels, by the group's name.

        Returns:
            A copy of the float network without the other channels.

        Raises:
            NotAllowed: A ValueError, naming it, for a group that can't be pruned or a share that isn't among the options.
        """
        self.numbers_of(keep)
        return self.evaluator.pruned(keep)

    def kept_channels(self, keep: Shares) -> dict[str, tuple[int, ...]]:
        """Return the numbers of the channels that are kept, as the criterion chooses them.

        Args:
            keep: Shares of channels, by the group's name.

        Returns:
            Numbers of channels, ascending, by the group's name.
        """
        self.numbers_of(keep)
        return self.evaluator.kept(keep)

    def shape_of(self, keep: Shares) -> tuple[Workload, CostTable]:
        """Describe the really smaller network.

        Args:
            keep: What is kept, by the name of a group.

        Returns:
            Its layers and activations, as `hw_models.trace` of it would tell them, and what they cost.

        Raises:
            NotAllowed: As `numbers_of` does.
            ValueError: Naming the layer, if the target can't do one of the smaller ones.
        """
        costs = self._costs
        assert costs is not None
        counts = self._counts(self.numbers_of(keep)[None])[0]
        workload = self._shapes.workload_of(counts)
        return workload, costs.table_of(workload, costs.rows(self._shapes.sizes(counts[None]))[0])

    def prices_at(self, numbers: Numbers) -> NDArray[np.float64]:
        """Return what the layers cost for given channels, by every limit that is a sum.

        Args:
            numbers: Options of the channel decisions, shape (policies, channel decisions).

        Returns:
            In the order of `limits`, shape (policies, limits, layers, 10, 10); infinite for pairs of widths that the target
            can't do.
        """
        costs = self._costs
        assert costs is not None
        found = costs.of_cells(costs.rows(self._shapes.sizes(self._counts(numbers))))
        columns = [costs.metrics.index(limit.metric) for limit in self.limits if limit.is_sum]
        return found[:, columns].reshape(len(numbers), len(columns), len(self.workload), PLACES, PLACES)

    def elements_at(self, numbers: Numbers) -> Numbers:
        """Return how many values every activation holds for one image.

        Args:
            numbers: Options of the channel decisions, shape (policies, channel decisions).

        Returns:
            Shape (policies, buffers), in the order of the workload's.
        """
        return self._shapes.elements(self._counts(numbers))

    @property
    def joint(self) -> JointCosts:
        """Return what channels and widths cost together, made once for the limits.

        Raises:
            ValueError: As `JointCosts` does.
        """
        made, decisions, limits = self._joint
        if made is None or decisions is not self.decisions or limits is not self.limits:
            made = JointCosts(self)
            self._joint = (made, self.decisions, self.limits)
        return made

    def channel_words(self, keep: Shares) -> dict[str, str]:
        """Say for tables how many of its output channels each layer keeps.

        Args:
            keep: Shares of channels, by the group's name.

        Returns:
            Words such as "16 of 32", by the layer's name; all layers.
        """
        counts = self._counts(self.numbers_of(keep)[None])[0]
        words = {}
        for whole, layer in zip(self._shapes.workload.layers, self._shapes.layers(counts), strict=True):
            words[whole.name] = str(whole.out_channels)
            if layer.out_channels < whole.out_channels:
                words[whole.name] = f"{layer.out_channels} of {whole.out_channels}"
        return words


def chooses_channels(problem: Problem) -> TypeGuard[ChannelProblem]:
    """Say whether channels are to be chosen in a problem; not where they are chosen already (`ChannelProblem.at`)."""
    return isinstance(problem, ChannelProblem) and bool(problem.channel_decisions)


def _keep_of(policy: object) -> dict[str, float]:
    """Return what a policy keeps; a mapping that is no policy keeps all."""
    if isinstance(policy, Q.BitPolicy):
        return dict(policy.keep)
    return {}


def _least_losses(network: nn.Module, group: ChannelGroup, counts: Sequence[int] | Numbers) -> NDArray[np.float64]:
    """Return the least part of the squared weights that write a group's channels which is lost with so many of them."""
    norms = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.dim != "out" or member.module not in group.writers:
            continue
        weight = network.get_submodule(member.module).weight
        assert isinstance(weight, Tensor)
        squares = weight.detach().double().square().flatten(1).sum(1).cpu()
        norms += squares[torch.tensor(member.places)].sum(1)
    of_units = np.sort(norms.reshape(-1, group.unit).sum(1).numpy())
    lost = np.concatenate([[0.0], of_units.cumsum()])
    units = (group.channels - np.asarray(counts)) // group.unit
    found: NDArray[np.float64] = lost[units] / max(float(of_units.sum()), 1e-300)
    return found
