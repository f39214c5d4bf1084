"""Channels chosen together: the loss that removing a set of them costs, with what they cost in pairs.

Peng, Wu, Chen and Huang, "Collaborative Channel Pruning for Deep Networks", ICML 2019, PMLR 97:5113. With d_i = 1 for a
channel that is removed, to second order

    L(d) - L(0) = - sum_i d_i u_i + 1/2 sum_ij d_i d_j s_ij,

where u_i is the derivative of the loss by the gate of channel i, and s_ij the second derivative by two gates. The Hessian is
approximated by first derivatives, as the paper does (its Gauss-Newton approximation): s_ij = mean over samples n of u_ni u_nj,
with each sample's own derivative. So two channels that do the same cost four times as much together as one of them, and two
that undo each other nothing, which no score by channel can say. The set is the optimum of a 0-1 quadratic programme.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quantizers.batches import Batches
from quantizers.calling import Forward
from quantizers.pruning.channels import ChannelGroup, ChannelGroups
from quantizers.pruning.criterion import Criterion, Loss, Ranking, channels_of
from quantizers.pruning.gates import gate_gradients

MOST_PROVEN = 20  # units of a group up to which the optimum is proven, in seconds; of 32 that takes minutes
STARTS = 20  # of the local search, drawn at random beside those that are reasoned
NODES = 5000  # of the search tree, after which there is no proof: not seconds, so that every machine answers the same
SAME = 1e-9  # of the largest term: sums that differ by less are equal

Array = Any  # np.ndarray of float64
logger = logging.getLogger("haq")


class LossModel(NamedTuple):
    """What it costs to remove a set of units: terms for each of them and for each pair."""

    linear: Tensor  # (units,): -u
    pairs: Tensor  # (units, units): s, symmetric

    def change(self, removed: Tensor) -> Tensor:
        """Return the predicted change of the loss.

        Args:
            removed: 1 for what is removed and 0 for what is kept, shape (..., units).

        Returns:
            Changes of shape (...), in units of the loss.
        """
        removed = removed.to(self.pairs.dtype)
        return removed @ self.linear + 0.5 * ((removed @ self.pairs) * removed).sum(-1)


class Choice(NamedTuple):
    """A set of units to remove."""

    removed: tuple[int, ...]
    change: float  # of the loss, as predicted
    proven: bool  # whether no set of so many units has a smaller change


def loss_model(gradients: Tensor) -> LossModel:
    """Return the second-order model of a group's loss.

    Args:
        gradients: Of every sample the derivative of its loss by the gate of every unit, shape (samples, units).

    Returns:
        The model.
    """
    gradients = gradients.double()
    return LossModel(-gradients.mean(0), gradients.T @ gradients / len(gradients))


def best_removal(model: LossModel, count: int, most_proven: int = MOST_PROVEN) -> Choice:
    """Choose the units whose removal costs least: minimise the model's change over all sets of a size.

    A local search finds a set; up to a number of units HiGHS then finds the optimum, or proves that the set is it.

    Args:
        model: What removals cost.
        count: How many units are removed.
        most_proven: Up to how many units there is a proof.

    Returns:
        The set, and whether it is proven to be the best.

    Raises:
        ValueError: For a count that isn't from 0 to the number of units.
    """
    # From the last unit to the first: of sets that are equally good, the one is kept whose units come first.
    linear, pairs = model.linear.flip(0).numpy(), model.pairs.flip(0, 1).numpy()
    units = len(linear)
    if not 0 <= count <= units:
        raise ValueError(f"0 to {units} units can be removed, not {count}")
    found = _local_search(linear, pairs, count)
    proven = count in (0, 1, units - 1, units)
    if not proven and units <= most_proven:
        best, proven = _by_highs(linear, pairs, count)
        scale = max(np.abs(linear).max(), np.abs(pairs).max())
        # Of sets that are equally good, the local search finds the same whatever the solver's version.
        if best is not None and _change(linear, pairs, best) < _change(linear, pairs, found) - SAME * scale:
            found = best
    removed = tuple(int(unit) for unit in np.flatnonzero(found[::-1]))
    return Choice(removed, _change(linear, pairs, found), proven)


def _change(linear: Array, pairs: Array, removed: Array) -> float:
    chosen = removed.astype(float)
    return float(chosen @ linear + 0.5 * chosen @ pairs @ chosen)


def _local_search(linear: Array, pairs: Array, count: int) -> Array:
    """Return the best of some sets after exchanges of one removed and one kept unit, as long as one helps."""
    starts = [_removed_one_by_one(linear, pairs, count), _brought_back_one_by_one(linear, pairs, count)]
    alone = np.zeros(len(linear), dtype=bool)
    alone[np.argsort(linear + 0.5 * np.diag(pairs), kind="stable")[:count]] = True
    starts.append(alone)
    draws = np.random.default_rng(0)
    for _ in range(STARTS):
        drawn = np.zeros(len(linear), dtype=bool)
        drawn[draws.permutation(len(linear))[:count]] = True
        starts.append(drawn)
    found = [_exchanged(linear, pairs, start) for start in starts]
    return min(found, key=lambda removed: _change(linear, pairs, removed))


def _removed_one_by_one(linear: Array, pairs: Array, count: int) -> Array:
    removed = np.zeros(len(linear), dtype=bool)
    cost = linear + 0.5 * np.diag(pairs)  # of one more
    for _ in range(count):
        unit = int(np.argmin(np.where(removed, np.inf, cost)))
        removed[unit] = True
        cost = cost + pairs[unit]
    return removed


def _brought_back_one_by_one(linear: Array, pairs: Array, count: int) -> Array:
    removed = np.ones(len(linear), dtype=bool)
    gain = linear + pairs.sum(1) - 0.5 * np.diag(pairs)  # of one fewer
    for _ in range(len(linear) - count):
        unit = int(np.argmax(np.where(removed, gain, -np.inf)))
        removed[unit] = False
        gain = gain - pairs[unit]
    return removed


def _exchanged(linear: Array, pairs: Array, removed: Array) -> Array:
    """Exchange the pair that lessens the change most, until none does."""
    removed = removed.copy()
    tolerance = SAME * max(np.abs(linear).max(), np.abs(pairs).max())
    diagonal = np.diag(pairs)
    while True:
        out, back = np.flatnonzero(~removed), np.flatnonzero(removed)
        if not len(out) or not len(back):
            return removed
        slope = linear + pairs @ removed  # of the change, by each unit
        more = slope[out] + 0.5 * diagonal[out]
        less = -slope[back] + 0.5 * diagonal[back]
        change = more[:, None] + less[None, :] - pairs[np.ix_(out, back)]
        best = int(np.argmin(change))
        if change.flat[best] >= -tolerance:
            return removed
        one, other = divmod(best, len(back))
        removed[out[one]] = True
        removed[back[other]] = False


def _by_highs(linear: Array, pairs: Array, count: int) -> tuple[Array | None, bool]:
    """Solve the 0-1 quadratic programme as a linear one: a variable for every product of two (Glover and Woolsey 1974).

    The number of removed units, multiplied by each variable, is another equation of the products, which makes the relaxation
    much tighter (Adams and Sherali 1986).

    Args:
        linear: Terms of units.
        pairs: Terms of pairs.
        count: How many units are removed.

    Returns:
        The set that was found, if any was; and whether it is proven to be the best.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix, vstack

    units = len(linear)
    first, second = np.triu_indices(units, 1)
    products = np.arange(units, units + len(first))  # their columns, behind those of the units
    columns = units + len(first)
    every = np.arange(units)
    # What a product costs keeps it from being too small, so that only the other side has to be said.
    above, below = pairs[first, second] < 0, pairs[first, second] >= 0

    def rows(height: int, *entries: tuple[Array, Array, float]) -> Any:
        """Make rows of coefficients: of every entry the rows, the columns, and the coefficient."""
        values = np.concatenate([np.full(len(row), value) for row, _, value in entries])
        places = np.concatenate([row for row, _, _ in entries]), np.concatenate([column for _, column, _ in entries])
        return coo_matrix((values, places), shape=(height, columns))

    def at_most(factor: Array) -> Any:
        """Say of products that they aren't above a factor."""
        number = np.arange(above.sum())
        return rows(len(number), (number, products[above], 1.0), (number, factor[above], -1.0))

    number = np.arange(below.sum())
    parts = [
        # So many units.
        (rows(1, (np.zeros(units, int), every, 1.0)), count, count),
        # That, times each unit: the sum of its products is (count - 1) times the unit.
        (rows(units, (first, products, 1.0), (second, products, 1.0), (every, every, 1.0 - count)), 0, 0),
        (at_most(first), -np.inf, 0),
        (at_most(second), -np.inf, 0),
        # A product isn't below the sum of its factors less 1.
        (
            rows(len(number), (number, products[below], -1.0), (number, first[below], 1.0), (number, second[below], 1.0)),
            -np.inf,
            1,
        ),
    ]
    constraints = LinearConstraint(
        vstack([part for part, _, _ in parts]).tocsr(),
        np.concatenate([np.full(part.shape[0], float(least)) for part, least, _ in parts]),
        np.concatenate([np.full(part.shape[0], float(most)) for part, _, most in parts]),
    )
    cost = np.concatenate([linear + 0.5 * np.diag(pairs), pairs[first, second]])
    largest = np.abs(cost).max()
    if largest > 0:
        # HiGHS takes differences below 1e-6 for none.
        cost = cost * (1e3 / largest)
    solved = milp(
        cost,
        constraints=constraints,
        integrality=np.concatenate([np.ones(units), np.zeros(len(products))]),
        bounds=Bounds(0, 1),
        options={"node_limit": NODES, "mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None, False
    return solved.x[:units] > 0.5, solved.status == 0


class QuadraticRanking(Ranking):
    """Keeps what is left when the set whose removal costs least is gone. Sets of different sizes needn't be nested.

    Attributes:
        models: By the group's name, what it costs to remove its units.
    """

    def __init__(self, groups: ChannelGroups, models: Mapping[str, LossModel], most_proven: int = MOST_PROVEN) -> None:
        """Take the groups, their models by name, and up to how many units the best set is proven to be that."""
        super().__init__(groups)
        self.models = dict(models)
        self._most_proven = most_proven
        self._choices: dict[tuple[str, int], Choice] = {}

    def choose(self, group: ChannelGroup, count: int) -> tuple[int, ...]:
        """Return the channels that aren't in the set whose removal costs least."""
        removed = set(self.choice(group.name, count).removed)
        return channels_of(group, [unit for unit in range(group.units) if unit not in removed])

    def choice(self, group: str, count: int) -> Choice:
        """Return the set of a group's units whose removal costs least, and whether that is proven.

        Args:
            group: The group's name.
            count: How many of its channels are kept.
        """
        key = group, count
        if key not in self._choices:
            found = self.groups[group]
            self._choices[key] = best_removal(self.models[group], found.units - count // found.unit, self._most_proven)
        return self._choices[key]


@dataclasses.dataclass
class CollaborativeChannels(Criterion, name="ccp"):
    """Chooses channels together, with the second derivatives of the loss by pairs of them.

    In groups of up to `most_proven` units the set is the proven optimum of the quadratic programme. In larger ones it is
    that of a local search, which isn't proven: the log says so, and `QuadraticRanking.choice` of every set. Units: the loss's.

    Attributes:
        most_proven: Up to how many units of a group the optimum is proven. Of 20 that takes up to 3 seconds for each count, of
            24 up to 10, of 32 minutes.
    """

    most_proven: int = MOST_PROVEN

    summary = "set that costs least to second order, pairs included (Peng et al. 2019, CCP); needs data and a loss"
    needs_data = True
    needs_loss = True

    def rank(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        batches: Batches | None,
        loss: Loss | None,
        generator: torch.Generator | None,
        forward: Forward | None,
    ) -> Ranking:
        """Model the loss by one pass forward and backward over the data.

        Args:
            network: The network.
            groups: Its groups of channels.
            batches: Inputs, or pairs of inputs and targets.
            loss: Function of outputs and targets: the mean over samples.
            generator: Plays no part.
            forward: What runs the network on a batch.

        Returns:
            The ranking, which solves a quadratic programme for every group and count that is asked for.
        """
        assert batches is not None
        assert loss is not None
        models = {}
        gradients = gate_gradients(network, groups, batches, loss, forward)
        for group in groups.groups:
            of_units = gradients[group.name].unflatten(1, (group.units, group.unit)).sum(2)
            models[group.name] = loss_model(of_units)
        large = [group.name for group in groups.groups if group.units > self.most_proven]
        if large:
            logger.warning(
                "criterion 'ccp': sets of groups with more than %d units are of a local search, not proven to be the best: %s",
                self.most_proven,
                ", ".join(large),
            )
        return QuadraticRanking(groups, models, self.most_proven)
