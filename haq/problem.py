"""A problem: network + data + hardware + budget, all that a solver needs to look for a policy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq.adversarial import Proxy
from haq.amounts import UNITS, describe_amount
from haq.evaluator import Evaluation, Evaluator, device_of

REWARDS = ("accuracy", "agreement", "accuracy+robust")
ROUNDING = 1e-9  # relative slack of a budget: sums of floats depend on their order


class OutOfReach(ValueError):
    """No policy costs so little, or none so much, on a target."""


class Decision(NamedTuple):
    """Layers that take one pair of bits together, and what they may take."""

    layers: tuple[int, ...]  # in the order of the workload
    pairs: NDArray[np.int64]  # (options, 2): weight bits, activation bits
    prices: NDArray[np.float64]  # (options,) in the metric's unit

    def of(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """The options' entries of a table (8, 8), shape (options,)."""
        return table[self.pairs[:, 0] - 1, self.pairs[:, 1] - 1]


class Problem:
    """Find the policy with the best accuracy on `search` whose cost on `target` is within `budget`.

    network
        an nn.Module that classifies; it is copied, never changed. Everything is computed on the device it is on.
    calibrate
        batches of inputs that set the activation scales: a tensor, or an iterable of tensors or (inputs, labels) (kept in
        memory).
    search
        held-out inputs and labels: a pair of tensors, or an iterable of such pairs (kept in memory). With reward="agreement"
        inputs are enough: a tensor, or an iterable of tensors.
    target
        a hardware target, or the name of one; batch=None takes the target's own batch.
    metric
        "latency", "energy" or "storage".
    budget
        a number is a fraction of the uniform 8-bit network's cost; a string has a unit ("12ms", "40kB").
    bits
        smallest and largest width that a solver may choose.
    pinned
        layer name -> (weight bits, activation bits) that no solver may change; default: first and last layer at 8 bits.
    tied
        groups of layer names; the layers of a group take the same bits.
    reward
        what a policy is judged by: "accuracy" on the labels of `search` and cross-entropy (nats); or, without labels,
        "agreement": the share of inputs on which its answer is the float network's, and the mean Kullback-Leibler divergence
        (nats) of its outputs from the float network's. The two are then what an evaluation calls accuracy and loss. Or
        "accuracy+robust": the share of images that are classified correctly both as they are and attacked by `proxy`, and the
        mean of the larger one of their two cross-entropies (nats). The attack is a cheap one, made anew for every policy's
        network with gradients straight through its quantizers. What it doesn't break may still be broken, above all at few
        bits: verify what was found with a full suite of attacks, python -m haq.robustness RUN --attacks full.
    tune
        what is done to the quantized network, at a policy's bits, before the policy is judged: takes it, returns a tuned copy.
    proxy
        the attack of reward="accuracy+robust": a `haq.adversarial.Proxy`, which knows eps and the range of images in the
        network's input space (`Proxy.of(network, eps)` for a `haq.models.Network`).

    A solver sees `workload`, `cost` (layers, 8, 8) in the metric's unit, `decisions` with the pairs worth choosing (within
    `bits`, without those that cost as much as a pair with more bits), `limit` the budget in the metric's unit,
    `quantization_error` (decisions, 2, 8) the relative squared error that each width of weights and of activations leaves
    (from calibration), and `evaluate`. Raises OutOfReach, a ValueError, for a budget out of reach, naming the reachable range,
    and ValueError for whatever its parts refuse.
    """

    def __init__(
        self,
        network: nn.Module,
        calibrate: Iterable[Any] | Tensor,
        search: Tensor | tuple[Tensor, Tensor] | Iterable[Any],
        target: str | hw_models.Target,
        metric: str = "latency",
        budget: float | str = 0.5,
        *,
        bits: tuple[int, int] = (2, 8),
        pinned: Mapping[str, tuple[int, int]] | None = None,
        tied: Iterable[Iterable[str]] = (),
        batch: int | None = None,
        reward: str = "accuracy",
        tune: Callable[[nn.Module], nn.Module] | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self.reward = check_reward(reward)
        self.proxy = _check_proxy(proxy, reward)
        inputs, labels = _as_tensors(search, reward)
        device = device_of(network)
        inputs = inputs.to(device)
        self.network = network
        self.workload = hw_models.trace(network, inputs[:1])
        self.metric, self.unit = metric, hw_models.UNITS.get(metric, "")
        self.bits, self.batch = bits, batch
        self.pinned = self._pinned(pinned)
        self.groups = self._groups(tied)
        self._price(target)
        self.limit = self._limit(budget)
        self.calibration = [batch.to(device) for batch in _inputs(calibrate)]  # batches of inputs (N, ...)
        qnetwork = Q.quantize(network, self.uniform(8), calibrate=self.calibration)
        layers = Q.quant_layers(qnetwork)
        errors = np.array(
            [[layers[name].weight_error.tolist(), layers[name].activation_error.tolist()] for name in self.workload.names]
        )
        self.quantization_error = np.array([errors[list(group)].mean(0) for group in self.groups])
        was_training = network.training
        self.evaluator = Evaluator(qnetwork, inputs, labels, teacher=network.eval(), tune=tune, proxy=proxy)
        self.float_result = self.evaluator.measure_teacher()
        network.train(was_training)

    def on(self, target: str | hw_models.Target, budget: float | str) -> Problem:
        """The same problem on another target, within another budget. What a policy's accuracy depends on, the network, the
        images, the scales and everything evaluated, is shared by the two. Raises what `Problem` raises."""
        made = copy.copy(self)
        if target is not self.target:
            made._price(target)
        made.limit = made._limit(budget)
        return made

    def _price(self, target: str | hw_models.Target) -> None:
        """Set all that depends on the target."""
        self.target = hw_models.load_target(target) if isinstance(target, str) else target
        self.table = self.target.cost_table(self.workload, batch=self.batch)
        self.cost = self.table.metric(self.metric)
        self.decisions = self._decisions(self._allowed(*self.bits))
        self.reference = float(self.cost[:, 7, 7].sum())
        self.smallest = self._smallest(self.decisions)

    @property
    def budget(self) -> float:
        """The budget as a fraction of the uniform 8-bit network."""
        return self.limit / self.reference

    @property
    def reach(self) -> str:
        """The budgets that can be met, in words."""
        low, high = (describe_amount(amount, self.metric) for amount in (self.smallest, self.reference))
        # Rounded up, so that the number we name is one we accept.
        fraction, at_one_bit = (
            np.ceil(1000 * smallest / self.reference) / 1000
            for smallest in (self.smallest, self._smallest(self._decisions(self._allowed(1, self.bits[1]))))
        )
        further = f"; bits 1:{self.bits[1]} would reach {at_one_bit:.3f}" if at_one_bit < fraction else ""
        least = f"{low} ({fraction:.3f} of uniform 8 bits)"
        return f"on {self.target.name}, {self.metric} can be from {least} to {high} (1.0){further}"

    @property
    def reward_is(self) -> str:
        """What the reward measures, in words."""
        words = {"accuracy": "accuracy", "agreement": "agreement with the float network's answers, without labels"}
        return words.get(self.reward) or f"worst of clean and {self.proxy}"

    @property
    def float_accuracy(self) -> float:
        """Accuracy of the float network on the search images, attacked too if policies are; 1 where the reward is agreement
        with it."""
        return self.float_result.accuracy

    def uniform(self, bits: int, *, keep_pinned: bool = False) -> Q.BitPolicy:
        """The same width everywhere, the pinned layers included unless they keep theirs."""
        return Q.BitPolicy(dict.fromkeys(self.workload.names, (bits, bits)) | (self.pinned if keep_pinned else {}))

    def policy(self, w_bits: Iterable[int], a_bits: Iterable[int]) -> Q.BitPolicy:
        """A policy from two sequences of bits in the order of the workload."""
        pairs = zip(self.workload.names, w_bits, a_bits, strict=True)
        return Q.BitPolicy({name: (int(w), int(a)) for name, w, a in pairs})

    def decide(self, pairs: Iterable[Iterable[int]]) -> Q.BitPolicy:
        """A policy from one pair of bits for each of the decisions."""
        bits = np.empty((len(self.workload), 2), int)
        for group, pair in zip(self.groups, pairs, strict=True):
            bits[list(group)] = tuple(pair)
        return self.policy(*bits.T)

    def bit_arrays(self, policy: Mapping[str, tuple[int | None, int | None]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Weight bits and activation bits of a policy, in the order of the workload."""
        pairs = np.array([policy[name] for name in self.workload.names])
        return pairs[:, 0], pairs[:, 1]

    def policy_cost(self, policy: Mapping[str, tuple[int | None, int | None]]) -> float:
        """Cost of a policy in the metric's unit."""
        w, a = self.bit_arrays(policy)
        return float(self.cost[np.arange(len(w)), w - 1, a - 1].sum())

    def within_budget(self, cost: float) -> bool:
        return cost <= self.limit * (1 + ROUNDING)

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Say which policies will be evaluated, so that a pool of workers, if there is one, can begin."""
        self.evaluator.expect(policies)

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Accuracy and loss of a policy on the search images."""
        return self.evaluator.evaluate(policy)

    def _pinned(self, pinned: Mapping[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
        names = self.workload.names
        chosen = dict.fromkeys((names[0], names[-1]), (8, 8)) if pinned is None else dict(pinned)
        if unknown := sorted(set(chosen) - set(names)):
            raise ValueError(f"pinned layer {unknown[0]!r} is not in the workload: {', '.join(names)}")
        Q.BitPolicy(chosen)
        return chosen

    def _groups(self, tied: Iterable[Iterable[str]]) -> list[tuple[int, ...]]:
        """Layers that decide together, by their place in the workload; each is in one group."""
        names, made = self.workload.names, []
        for group in (list(group) for group in tied):
            if unknown := [name for name in group if name not in names]:
                raise ValueError(f"tied layer {unknown[0]!r} is not in the workload: {', '.join(names)}")
            made.append(tuple(sorted(names.index(name) for name in group)))
        seen = [layer for group in made for layer in group]
        if twice := [names[layer] for layer in seen if seen.count(layer) > 1]:
            raise ValueError(f"layer {twice[0]!r} is tied twice: join the groups")
        return sorted([*(group for group in made if group), *((i,) for i in range(len(names)) if i not in seen)])

    def _decisions(self, allowed: NDArray[np.bool_]) -> list[Decision]:
        cost = np.array([self.cost[list(group)].sum(0) for group in self.groups])
        together = np.array([allowed[list(group)].all(0) for group in self.groups])
        if not together.any((1, 2)).all():
            group = self.groups[int(np.argmin(together.any((1, 2))))]
            raise ValueError(f"tied layers {', '.join(self.workload.names[i] for i in group)} have no pair of bits in common")
        worth = hw_models.undominated(cost, together)
        return [Decision(*part) for part in zip(self.groups, map(_pairs, worth), map(np.extract, worth, cost), strict=True)]

    @staticmethod
    def _smallest(decisions: list[Decision]) -> float:
        return float(sum(decision.prices.min() for decision in decisions))

    def _allowed(self, low: int, high: int) -> NDArray[np.bool_]:
        if not 1 <= low <= high <= 8:
            raise ValueError(f"bits must be (smallest, largest) within 1..8, not {(low, high)!r}")
        allowed = np.zeros(self.cost.shape, bool)
        allowed[:, low - 1 : high, low - 1 : high] = True
        for name, (w, a) in self.pinned.items():
            row = allowed[self.workload.names.index(name)]
            row[:] = False
            row[w - 1, a - 1] = True
        return allowed

    def _limit(self, budget: float | str) -> float:
        limit = parse_budget(budget, self.metric, self.reference)
        if limit < self.smallest * (1 - ROUNDING) or limit > self.reference * (1 + ROUNDING):
            raise OutOfReach(f"budget {budget} is out of reach: {self.reach}")
        return limit


def _pairs(choices: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The bits of the entries of a table (8, 8) that are true, in the order in which `extract` takes them."""
    return np.argwhere(choices) + 1


def parse_budget(budget: float | str, metric: str, reference: float) -> float:
    """A budget in the metric's unit. "0.5" and 0.5 are fractions of `reference`; "12ms" is absolute."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(budget))
    units = UNITS.get(metric, {})
    try:
        if not match or (match[2] and match[2] not in units):
            raise ValueError
        return float(match[1]) * (units[match[2]] if match[2] else reference)
    except ValueError:
        raise ValueError(
            f"budget {budget!r} is not understood: give a fraction of uniform 8 bits such as 0.5, or an amount in "
            f"{', '.join(units)}"
        ) from None


def check_reward(reward: str) -> str:
    """The reward itself. Raises ValueError for one that there isn't."""
    if reward not in REWARDS:
        raise ValueError(f"unknown reward {reward!r}; it can be {' or '.join(REWARDS)}")
    return reward


def _check_proxy(proxy: Proxy | None, reward: str) -> Proxy | None:
    if reward == "accuracy+robust" and proxy is None:
        raise ValueError(
            'reward="accuracy+robust" needs `proxy`, the attack that policies are judged under: give haq.adversarial.Proxy.of('
            "network, eps)"
        )
    if reward != "accuracy+robust" and proxy is not None:
        raise ValueError(f'`proxy` is of reward="accuracy+robust", not of {reward!r}: give both or neither')
    return proxy


def _as_tensors(search: Any, reward: str) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels; no labels where they play no part."""
    batches: list[tuple[Tensor, Any]]
    if isinstance(search, Tensor):
        batches = [(search, None)]
    elif isinstance(search, tuple) and len(search) == 2 and isinstance(search[0], Tensor):
        batches = [search]
    else:
        batches = [(batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1]) for batch in search]
    if not batches:
        raise ValueError("`search` gave no images")
    inputs = torch.cat([batch for batch, _ in batches]) if len(batches) > 1 else batches[0][0]
    if reward == "agreement":
        labels = None
    elif any(part is None for _, part in batches):
        raise ValueError('`search` has no labels to tell the accuracy by: give (inputs, labels), or reward="agreement"')
    else:
        labels = torch.cat([part for _, part in batches])
    count = len(inputs) if labels is None else len(labels)
    if len(inputs) != count or not count:
        raise ValueError(f"`search` needs as many images as labels, at least one; got {len(inputs)} and {count}")
    return inputs, labels


def _inputs(batches: Iterable[Any] | Tensor) -> list[Tensor]:
    """The inputs of batches, without their labels."""
    if isinstance(batches, Tensor):
        return [batches]
    return [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
