"""With --finetune-steps every policy is judged by what it is after some steps of fine-tuning, always from the same weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import haq
import quantizers as Q
from haq import data, evaluate, search, training
from haq.console.errors import run_command
from haq.networks import Network
from haq.solvers import sensitivity
from haq.solvers.base import Session
from haq.study.config import SearchConfig
from tests.commands.test_search_command import SMALL, place  # noqa: F401
from tests.conftest import images, make_problem, small_network


def tuning(network: nn.Module, steps: int = 3, seed: int = 0) -> training.ShortTuning:
    inputs = images(80, 3)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    return training.ShortTuning(Network("small", network, (1, 8, 8)), data.Split(inputs, labels), steps, seed)


def tuned_problem(network: nn.Module, **options: int) -> haq.Problem:
    inputs, labels = make_problem(network).evaluator.batches[0]
    return haq.Problem(network, images(32, 1), (inputs, labels), "edge", budget=0.6, tune=tuning(network, **options))


def test_every_policy_is_tuned_from_the_float_weights(network: nn.Module) -> None:
    problem, other = tuned_problem(network), tuned_problem(network)
    policies = [problem.uniform(bits) for bits in (2, 3, 4)]
    results = [problem.evaluate(policy) for policy in policies]
    assert [other.evaluate(policy) for policy in reversed(policies)] == results[::-1]
    plain = make_problem(network)
    assert results[0].loss < plain.evaluate(policies[0]).loss
    assert problem.float_result.accuracy == plain.float_result.accuracy


def test_steps_and_seed_make_a_difference(network: nn.Module) -> None:
    results = [tuned_problem(network, **options) for options in ({}, {"steps": 9}, {"seed": 1})]
    assert len({problem.evaluate(problem.uniform(2)).loss for problem in results}) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_as_many_steps_as_were_asked_for(network: nn.Module, steps: int) -> None:
    done: list[tuple[int, int]] = []
    task = tuning(network)
    qnetwork = Q.quantize(network, make_problem(network).uniform(4), calibrate=images(32, 1))
    training.finetune(
        task.network, qnetwork, task.split, epochs=0, seed=0, steps=steps, on_step=lambda step, of: done.append((step, of))
    )
    assert done == [(step, steps) for step in range(1, steps + 1)]  # 80 images are three steps of an epoch


def test_random_numbers_are_neither_used_up_nor_depended_on(network: nn.Module) -> None:
    network.add_module("dropout", nn.Dropout(0.5))  # draws from torch's own generator
    problem = tuned_problem(network)
    before = torch.get_rng_state()
    first = problem.evaluate(problem.uniform(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    problem.evaluator.cache.clear()
    assert problem.evaluate(problem.uniform(3)) == first


def test_sensitivities_are_those_of_tuned_networks(network: nn.Module) -> None:
    problems = tuned_problem(network), make_problem(network)
    rises = [sensitivity.measure(problem, Session(problem, 60), keep=1) for problem in problems]
    assert rises[0][1:4, 1, 1].sum() < rises[1][1:4, 1, 1].sum()  # at 2 bits; tuning takes much of it away


def test_the_search_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*SMALL, "--solver", "greedy", "--evaluations", "6", "--finetune-epochs", "0", "--finetune-steps", "2"]
    for name in ("a", "b"):
        assert run_command(lambda name=name: search.main([*asked, "--out", name])) == 0  # type: ignore[misc]
    assert Path("a", "history.csv").read_bytes() == Path("b", "history.csv").read_bytes()
    out = " ".join(capsys.readouterr().out.split())
    assert "after 2 steps of fine-tuning" in out
    assert "every policy fine-tuned for 2 steps" in out
    result = json.loads(Path("a", "result.json").read_text())
    with Path("a", "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["solver"] == "greedy" and row["within_budget"] == "1"]
    assert result["found"]["search_accuracy"] == max(float(row["accuracy"]) for row in rows)
    assert run_command(lambda: evaluate.main(["a", "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_steps_are_checked() -> None:
    with pytest.raises(ValueError, match="--finetune-steps is -1; it must be an integer of at least 0"):
        SearchConfig(finetune_steps=-1)


def test_the_network_judged_is_a_copy() -> None:
    network = small_network()
    problem = tuned_problem(network)
    weights = {key: value.clone() for key, value in problem.evaluator.network.state_dict().items()}
    assert problem.evaluator.prepared(problem.uniform(3)) is not problem.evaluator.network
    assert all(torch.equal(value, weights[key]) for key, value in problem.evaluator.network.state_dict().items())
