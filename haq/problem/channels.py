"""The joint problem: which share of its channels each group keeps, beside the widths of every layer.

    problem = haq.Problem(network, calibrate, search, "edge", budget=0.2, prune="0.25:1", criterion="fpgm")
    problem.evaluate(problem.uniform(8).with_keep({"features.0": 0.5}))

A policy says in `keep` which share of a group's channels is kept (`quantizers.BitPolicy`); groups that it doesn't name keep all
of theirs. Such a policy costs what the really smaller layers cost, and is worth what the really smaller network is worth: its
channels are removed, the statistics of its norms are taken anew, and it is quantized at just the policy's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import quantizers as Q
from haq.problem.problem import Problem
from hw_models import CostTable, Workload

Shares = Mapping[str, float]  # what is kept, by the name of a group of channels; groups that aren't named keep all
Numbers = NDArray[np.int64]  # (..., channel decisions): the number of an option for each of them


class ChannelDecision(NamedTuple):
    """A group of channels, and what it may keep.

    Options are in the order of their counts, so that the last one keeps all channels.

    Attributes:
        group: The group's name.
        shares: What may be kept, shape (options,): shares as policies name them, the last being 1.
        counts: How many channels these are, shape (options,); no two are the same.
        errors: The part of the squared weights of the layers that write the channels which each option removes, from 0 to 1,
            shape (options,); 0 for the last one. It is of the kind of `Problem.layer_errors`.
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
            more than one count to choose from.
        shares: The shares that may be kept, from small to large, the last being 1.
        criterion: What says which channels are kept.
    """

    channel_groups: Any
    channel_decisions: tuple[ChannelDecision, ...]
    shares: tuple[float, ...]
    criterion: Any

    @property
    def ranking(self) -> Any:
        """Return what the criterion found out about the channels of the network: which are kept, for any count."""
        raise NotImplementedError

    def keep_of(self, numbers: Iterable[int]) -> dict[str, float]:
        """Return what policies call `keep` for an option of every channel decision; those that keep all are left out."""
        raise NotImplementedError

    def numbers_of(self, keep: Shares) -> Numbers:
        """Return the option of every channel decision, shape (channel decisions,), for what a policy keeps.

        Raises:
            NotAllowed: A ValueError, naming it, for a group that can't be pruned or a share that isn't among the options.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def within(self, totals: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which of what `totals` returned keep all limits, but for rounding, shape (policies,)."""
        raise NotImplementedError

    def decide(self, pairs: Iterable[Iterable[int]], keep: Shares | None = None) -> Q.BitPolicy:
        """Make a policy of one pair of widths for each of the decisions, and of what is kept; None: what `at` says, or all."""
        raise NotImplementedError

    def at(self, keep: Shares) -> ChannelProblem:
        """Make the problem in which the channels are decided already, and only widths are left to choose.

        Its `workload`, `table`, `cost`, `decisions`, `peak` and `several` are of the really smaller layers, its limits are
        those of this problem, and `decide`, `uniform` and `policy` make policies that keep these channels. So whatever
        plans widths within budgets (`envs.plan`, `haq.solvers.space`, `Programme`) does so for these channels. Limits may be
        out of its reach (`smallest` tells). It shares what was evaluated.

        Args:
            keep: What is kept, by the name of a group.

        Returns:
            The problem.
        """
        raise NotImplementedError

    def shape_of(self, keep: Shares) -> tuple[Workload, CostTable]:
        """Describe the really smaller network.

        Args:
            keep: What is kept, by the name of a group.

        Returns:
            Its layers and activations, as `hw_models.trace` of it would tell them, and what they cost.
        """
        raise NotImplementedError

    def channel_words(self, keep: Shares) -> dict[str, str]:
        """Say for tables, by layer, how many of its output channels are kept: {"features.0": "16 of 32"}; all layers."""
        raise NotImplementedError
