"""Problems of channels and widths on a small network, judged by a formula: a search takes a second."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import haq
import hw_models
from haq.problem.channels import ChannelProblem
from haq.problem.evaluator import Evaluation
from hw_models.widths import PLACES, WIDTHS
from tests.conftest import images, small_network


class Backwards:
    """A target on which layers with fewer channels take longer: they leave most of it idle."""

    name = "backwards"
    description = "a target that is made for wide layers"
    provenance = "estimated"

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        widths = np.array(WIDTHS, float)
        cells = widths[:, None] * widths[None] * np.ones((PLACES, PLACES))
        full = np.array([16.0, 1e9])
        latency, storage = [], []
        for layer in workload.layers:
            idle = 1.0 + (layer.out_channels < full[0]) * 4.0 * (full[0] / layer.out_channels)
            latency.append(1e-6 * layer.macs * cells * idle)
            storage.append(np.ceil(layer.weights * widths[:, None] / 8) * np.ones(PLACES))
        return hw_models.CostTable("backwards", "estimated", workload, batch or 1, np.array(latency), None, np.array(storage))


@functools.cache
def base(target: str = "edge", metrics: tuple[str, ...] = ("latency",), bits: str = "2:8", prune: str = "0.25:1") -> Any:
    """A problem with a generous budget, of which others are made by `on`."""
    inputs = images(16)
    labels = torch.zeros(16, dtype=torch.long)
    chip: Any = target
    if target == "backwards":
        chip = Backwards()
    return haq.Problem(
        small_network(),
        inputs,
        (inputs, labels),
        chip,
        metric=metrics[0],
        budget=dict.fromkeys(metrics, 1.0),
        bits=bits,
        prune=prune,
        pinned={"classifier": (8, 8)},
        correction=None,
    )


def joint_problem(
    budget: float | dict[str, float],
    target: str = "edge",
    bits: str = "2:8",
    prune: str = "0.25:1",
    **goal: Any,
) -> ChannelProblem:
    """A problem of its own within a budget, by a fraction of 8 bits, judged by the formula."""
    if not isinstance(budget, dict):
        budget = {"latency": budget}
    one = base(target, tuple(budget), bits, prune)
    made = one.on(one.target, budget, **goal)
    assert isinstance(made, ChannelProblem)
    return judged_by_formula(made)


def judged_by_formula(problem: ChannelProblem) -> ChannelProblem:
    """Let policies be judged by a loss that falls with widths and with what is kept, in some layers more than in others."""
    random = np.random.default_rng(3)
    scales = random.lognormal(-1, 1, (len(problem.workload), 2))
    of_groups = random.lognormal(0, 0.5, len(problem.channel_decisions))

    def evaluate(policy: Any, beat: float | None = None) -> Evaluation:
        widths = np.array(problem.bit_arrays(policy), float).T
        loss = 0.02 + float((scales * 4.0 ** (1 - np.minimum(widths, 20))).sum())
        for channel, scale in zip(problem.channel_decisions, of_groups, strict=True):
            loss += scale * (1 - policy.keep.get(channel.group, 1.0)) ** 2
        return Evaluation(float(np.exp(-loss)), loss, problem.evaluator.count)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    problem.expect = lambda policies, beat=None: None  # type: ignore[method-assign]
    problem.paired_error = lambda policy, other: None  # type: ignore[method-assign]
    return problem


def formula_losses(problem: ChannelProblem) -> list[NDArray[np.float64]]:
    """What the formula says that options lose, by place in an option vector."""
    joint = problem.joint
    best = [len(one.counts) - 1 for one in problem.channel_decisions]
    widest = [int(pairs.sum(1).argmax()) for pairs in joint.pairs]
    found = []
    for place, count in enumerate(joint.counts):
        losses = []
        for option in range(count):
            vector = [*best, *widest]
            vector[place] = option
            losses.append(problem.evaluate(policy_of(problem, vector)).loss)
        found.append(np.array(losses) - min(losses))
    return found


def policy_of(problem: ChannelProblem, options: Sequence[int] | NDArray[np.int64]) -> Any:
    """The policy of an option vector, made without the space of solvers."""
    count = len(problem.channel_decisions)
    pairs = [decision.pairs[pick] for decision, pick in zip(problem.decisions, options[count:], strict=True)]
    keep = {
        channel.group: float(channel.shares[pick])
        for channel, pick in zip(problem.channel_decisions, options[:count], strict=True)
    }
    return problem.decide(pairs, keep)


def every(problem: ChannelProblem) -> list[tuple[int, ...]]:
    """All option vectors."""
    return list(itertools.product(*(range(count) for count in problem.joint.counts)))


def drawn(problem: ChannelProblem, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Option vectors at random, whatever they cost."""
    random = np.random.default_rng(seed)
    return np.stack([random.integers(problem.joint.counts) for _ in range(count)])
