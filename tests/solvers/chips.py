"""Chips that do a few pairs of widths, and problems on them that are judged by a formula: a search takes milliseconds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import haq
import hw_models
from haq.problem.evaluator import Evaluation
from haq.problem.sensitivity import Sensitivities
from haq.solvers import sensitivity
from haq.solvers.base import Session, Trial, solve
from hw_models.widths import FLOAT, PLACES, place_of
from tests.conftest import images

Pairs = Sequence[tuple[int, int]]

FEW = ((8, 8), (4, 8), (4, 4))
WIDE = ((8, 8), (4, 8), (4, 4), (8, 16), (16, 16), (FLOAT, FLOAT), (4, FLOAT))


class Chip:
    """A target that does some pairs, and fewer of them in depthwise layers.

    Milliseconds by MACs and the product of the widths, but for what `factors` says of a pair; bytes of the weights, of which
    `dear` pairs take more: what saves one may cost the other.
    """

    name = "chip"
    description = "a target of few pairs"
    provenance = "estimated"

    def __init__(self, pairs: Pairs, depthwise: Pairs = ((8, 8),), seed: int = 0, dear: Pairs = ()) -> None:
        self.pairs = pairs
        self.depthwise = depthwise
        self.dear = dear
        self.noise = np.random.default_rng(seed).uniform(0.8, 1.25, (20, PLACES, PLACES))

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        shape = (len(workload), PLACES, PLACES)
        latency, storage = np.full(shape, np.nan), np.full(shape, np.nan)
        for index, layer in enumerate(workload.layers):
            allowed = self.pairs
            if layer.kind == "depthwise":
                allowed = self.depthwise
            for w, a in allowed:
                cell = index, place_of(w), place_of(a)
                latency[cell] = 1e-6 * layer.macs * w * a * self.noise[cell]
                storage[cell] = np.ceil(layer.weights * w / 8)
                if (w, a) in self.dear:
                    storage[cell] *= 5
        return hw_models.CostTable("chip", "estimated", workload, batch or 1, latency, None, storage)


class Branches(nn.Module):
    """Six layers: two read the same tensor, one is depthwise, one is tied to none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, 1)
        self.left = nn.Conv2d(8, 8, 3, 1, 1)
        self.right = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.hidden = nn.Linear(8 * 16, 12)
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.left(x)) + torch.relu(self.right(x))
        x = torch.relu(self.depthwise(x))
        x = torch.relu(self.hidden(x.flatten(1)))
        return self.classifier(x)


class Chain(nn.Sequential):
    """Twenty layers, every third of them depthwise."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU()]
        for index in range(18):
            groups = 1
            if index % 3 == 2:
                groups = 8
            layers += [nn.Conv2d(8, 8, 3, 1, 1, groups=groups), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))


@functools.cache
def base_problem(pairs: Pairs, dear: Pairs = (), metrics: tuple[str, ...] = ("latency",), chain: bool = False) -> haq.Problem:
    """A problem with generous budgets by these metrics, of which others are made by `on`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Branches().eval()
        if chain:
            network = Chain().eval()
    inputs = images(8)
    labels = torch.zeros(8, dtype=torch.long)
    chip = Chip(pairs, dear=dear)
    budget = dict.fromkeys(metrics, 1.0)
    problem = haq.Problem(
        network, inputs, (inputs, labels), chip, budget=budget, pinned={}, bits=bits_of(pairs), correction=None
    )
    return judged_by_formula(problem)


def bits_of(pairs: Pairs) -> str:
    words = sorted({width for pair in pairs for width in pair})
    return ",".join("float" if width == FLOAT else str(width) for width in words)


def judged_by_formula(problem: haq.Problem) -> haq.Problem:
    """Let policies be judged by a loss that falls with the widths, by chance more in some layers than in others."""
    random = np.random.default_rng(3)
    scales = random.lognormal(0, 1, (len(problem.workload), 2))

    def evaluate(policy: Any) -> Evaluation:
        widths = np.array(problem.bit_arrays(policy), float).T
        loss = 1.0 + float((scales * 2.0 ** (1 - np.minimum(widths, 20))).sum())
        return Evaluation(1 / (1 + loss), loss, 8)

    problem.evaluate = evaluate  # type: ignore[method-assign]
    return problem


def every(problem: haq.Problem) -> NDArray[np.int64]:
    """All choices of an option per decision, shape (choices, decisions)."""
    return np.array(list(itertools.product(*(range(len(decision.pairs)) for decision in problem.decisions))))


def costs_of(problem: haq.Problem, choices: NDArray[np.int64]) -> NDArray[np.float64]:
    """What choices cost by every limit, counted from the table, shape (choices, limits)."""
    widths = np.zeros((2, len(choices), len(problem.workload)), int)
    for index, decision in enumerate(problem.decisions):
        for layer in decision.layers:
            widths[:, :, layer] = decision.pairs[choices[:, index]].T
    return np.stack([problem.table.total(limit.metric, widths[0], widths[1]) for limit in problem.limits], axis=1)


def amounts(problem: haq.Problem) -> NDArray[np.float64]:
    return np.array([limit.amount for limit in problem.limits])


def random_budgets(problem: haq.Problem, count: int, seed: int = 0) -> Iterable[haq.Problem]:
    """The problem within random budgets that some policy keeps all of, narrowly or with room."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        choice = np.array([[random.integers(len(decision.pairs)) for decision in problem.decisions]])
        within = costs_of(problem, choice)[0] * random.choice([1.0, 1.0, 1.05, 1.3], len(problem.limits))
        budget = {}
        for amount, limit in zip(within, problem.limits, strict=True):
            # Not below what the policy costs by a last digit.
            budget[limit.metric] = min(amount, limit.largest) / limit.reference * (1 + 1e-12)
        yield problem.on(problem.target, budget)


def tried_by(
    problem: haq.Problem, solver: str, evaluations: int, env: str = "plan", known: Sensitivities | None = None
) -> tuple[Trial, list[Trial]]:
    """Search with a solver; returns the best trial, and all of them."""
    tried: list[Trial] = []
    session = Session(problem, evaluations, tried.append, env=env, sensitivities=known)
    return solve(solver, session, 0), tried


def sensitivities(problem: haq.Problem) -> Sensitivities:
    """All sensitivities of a problem, so that every evaluation of a search is of a policy that may be found."""
    return sensitivity.by_evaluation(problem, Session(problem, 1000), keep=1)


def check(problem: haq.Problem, policy: Any) -> None:
    """Assert that a policy is one that the chip does, within every budget."""
    w, a = problem.bit_arrays(policy)
    chip = problem.target
    assert isinstance(chip, Chip)
    costs = [float(problem.table.total(limit.metric, w, a)) for limit in problem.limits]
    assert (np.array(costs) <= amounts(problem) * (1 + 1e-9)).all()
    for layer, pair in zip(problem.workload.layers, zip(w.tolist(), a.tolist(), strict=True), strict=True):
        assert pair in (chip.depthwise if layer.kind == "depthwise" else chip.pairs)


def policy_of(problem: haq.Problem, options: NDArray[np.int64]) -> Any:
    return problem.decide(decision.pairs[option] for decision, option in zip(problem.decisions, options, strict=True))


def options_of(problem: haq.Problem, policy: Any) -> NDArray[np.int64]:
    """The option of every decision in a policy."""
    widths = np.stack(problem.bit_arrays(policy), axis=1)
    same = [(decision.pairs == widths[decision.layers[0]]).all(1) for decision in problem.decisions]
    return np.array([int(np.flatnonzero(one)[0]) for one in same])


def loss_table(seed: int, decisions: int = 6) -> NDArray[np.float64]:
    """What pairs are predicted to lose, by chance: more bits may be worse."""
    return np.random.default_rng(seed).lognormal(0, 1, (decisions, PLACES, PLACES))


def lost(problem: haq.Problem, table: NDArray[np.float64], choices: NDArray[np.int64]) -> NDArray[np.float64]:
    """What choices of an option per decision are predicted to lose, shape (choices,)."""
    total = np.zeros(len(choices))
    for index, (decision, of_one) in enumerate(zip(problem.decisions, table, strict=True)):
        total += decision.of(of_one)[choices[:, index]]
    return total
