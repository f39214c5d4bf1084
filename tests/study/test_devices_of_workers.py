"""Workers are spread over all devices of a kind, and what is on a GPU here arrives on each worker's own."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import haq
from haq.problem.device import spread
from haq.study.workers import moving, processes
from haq.study.workers.processes import Crew, working
from tests import second_device
from tests.conftest import brightest, fitted_network, images

SECOND = second_device.register()


def problem_on(device: torch.device) -> haq.Problem:
    x = images(96)
    return haq.Problem(
        fitted_network().to(device), calibrate=images(32, 1), search=(x, brightest(x)), target="edge", budget=0.6
    )


@pytest.fixture(scope="module")
def problem() -> haq.Problem:
    return problem_on(SECOND)


def test_what_is_on_a_device_travels_by_memory_and_arrives_on_the_receivers_own(problem: haq.Problem) -> None:
    policy = problem.uniform(3)
    here = copy.copy(problem.evaluator.evaluate(policy))
    sent = moving.dumps(problem.evaluator)
    assert b"second_device" not in sent
    arrived = moving.load(sent, "cpu")
    assert arrived.device.type == "cpu"
    assert {tensor.device.type for tensor in arrived.network.state_dict().values()} == {"cpu"}
    assert arrived.evaluate(policy) == here
    again = moving.load(sent, str(SECOND))
    assert again.device == SECOND
    assert again.evaluate(policy) == here


def test_what_is_shared_stays_shared_on_its_way() -> None:
    linear = torch.nn.Linear(3, 3).to(SECOND)
    tied = torch.nn.ModuleList([linear, torch.nn.Linear(3, 3).to(SECOND)])
    tied[1].weight = linear.weight
    arrived = moving.load(moving.dumps((tied, torch.device("cpu"), SECOND, torch.ones(2))), "cpu")
    assert arrived[0][1].weight is arrived[0][0].weight
    assert isinstance(arrived[0][0].weight, torch.nn.Parameter)
    assert arrived[0][0].weight.requires_grad
    assert [one.type for one in arrived[1:3]] == ["cpu", "cpu"]


def test_workers_are_spread_over_all_devices_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert spread("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert spread("cuda:1") == ["cuda:1"]
    assert spread("cpu") == ["cpu"]
    begun: list[str] = []

    class Noted:
        def __init__(self, handover: Any, closed: Any, on_news: Any, device: str) -> None:
            self.device = device
            begun.append(device)

    monkeypatch.setattr(processes, "_Worker", Noted)
    monkeypatch.setattr(Crew, "_serve", lambda self: None)
    crew = Crew(print, (), 7, devices=spread("cuda"))
    assert {name: begun.count(name) for name in begun} == {"cuda:0": 3, "cuda:1": 2, "cuda:2": 2}
    # One that follows a dead worker comes to where that was.
    crew._workers.remove(next(worker for worker in crew._workers if worker.device == "cuda:2"))
    crew._workers.remove(next(worker for worker in crew._workers if worker.device == "cuda:0"))
    crew._hire()
    assert begun[-1] in ("cuda:0", "cuda:2")
    crew._handover.close()


@pytest.mark.slow
def test_policies_are_evaluated_by_workers_on_other_devices_as_here(
    problem: haq.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [problem.uniform(bits) for bits in (3, 4, 5)]
    here = [problem.evaluate(policy) for policy in policies]
    problem.evaluator.cache.clear()
    monkeypatch.setattr(processes, "spread", lambda device: {"second": ["cpu", "cpu"]}[device])
    with working(problem.evaluator, 2, None, "second"):
        problem.evaluator.expect(policies)
        there = [problem.evaluate(policy) for policy in policies]
    assert there == here


def test_an_evaluator_on_the_cpu_is_sent_as_it_always_was() -> None:
    problem = problem_on(torch.device("cpu"))
    policy = problem.uniform(3)
    arrived = pickle.loads(moving.dumps(problem.evaluator))
    assert arrived.evaluate(policy) == problem.evaluate(policy)


@pytest.mark.parametrize(("gpus", "most", "expected"), [(3, None, 3), (3, 2, 2), (9, None, 4)])
def test_every_worker_of_a_cluster_takes_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, most: int | None, expected: int
) -> None:
    ray_workers = pytest.importorskip("haq.study.workers.ray")
    ray = MagicMock()
    ray.cluster_resources.return_value = {"CPU": 4.0, "GPU": float(gpus)}
    ray.get_runtime_context.return_value.gcs_address = "here:1"
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_workers, "_answers", lambda host, port: True)
    crew = ray_workers.Crew(object, "given", 1, most, 1, device="cuda")
    worker = ray.remote.return_value.return_value.remote
    worker.side_effect = lambda: MagicMock()
    crew._grow()
    assert ray.remote.call_args.kwargs == {"num_cpus": 1, "num_gpus": 1, "max_restarts": 0}
    assert worker.call_count == expected
    # Nothing of a GPU is asked for where networks are run on the CPU.
    ray_workers.Crew(object, "given", 1, most, 1)._grow()
    assert ray.remote.call_args.kwargs == {"num_cpus": 1, "max_restarts": 0}
    ray.cluster_resources.return_value = {"CPU": 4.0}
    with pytest.raises(ConnectionError, match="has no GPU, and networks are to be run on cuda"):
        ray_workers.Crew(object, "given", 1, most, 1, device="cuda")._grow()
