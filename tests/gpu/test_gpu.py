"""On a GPU everything comes out as on the CPU, as far as float32 allows: `make gpu`.

Without a GPU, HAQ_TEST_DEVICE=second runs this on a device that computes on the CPU (`tests.second_device`).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from haq import training
from haq.attacks.assessment import assess
from haq.attacks.proxy import ProxyAttack
from haq.data import Split
from haq.networks import Network
from haq.problem.device import find_device
from haq.problem.objective import RobustAccuracy
from haq.study.config import SearchConfig
from haq.study.task import SearchTask
from tests import second_device
from tests.conftest import brightest, fitted_network, images, small_network

DEVICE = os.environ.get("HAQ_TEST_DEVICE", "cuda")
if DEVICE == second_device.NAME:
    second_device.register()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]
CALIBRATION = images(64, 1)
SAMPLES = images(1000, 3)
LABELS = brightest(SAMPLES)
ONE_IN_1000 = 1 / 1000 + 1e-9


@pytest.fixture(scope="module")
def device() -> torch.device:
    return find_device(DEVICE)


def make_problem(device: torch.device | str, **options: Any) -> haq.Problem:
    return haq.Problem(
        fitted_network(),
        calibrate=CALIBRATION,
        search=(SAMPLES, LABELS),
        target="edge",
        budget=0.6,
        device=device,
        **options,
    )


def policies(problem: haq.Problem, count: int, seed: int = 0) -> list[Q.BitPolicy]:
    random = np.random.default_rng(seed)
    return [problem.policy(*random.integers(2, 9, (2, len(problem.workload)))) for _ in range(count)]


def accuracies(problem: haq.Problem, asked: list[Q.BitPolicy]) -> list[float]:
    return [problem.evaluate(policy).accuracy for policy in asked]


def assert_ranked_alike(here: list[float], there: list[float], images: int) -> None:
    """Whatever two policies differ in by more than what either may change by is in the same order."""
    assert max(abs(one - other) for one, other in zip(here, there, strict=True)) <= ONE_IN_1000
    for i in range(len(here)):
        for j in range(len(here)):
            if here[i] - here[j] > 2.5 / images:
                assert there[i] > there[j]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_same_policies_are_ranked_the_same(device: torch.device, rounding: str) -> None:
    here, there = (make_problem(one, rounding=rounding) for one in ("cpu", device))
    asked = policies(here, 24)
    assert_ranked_alike(accuracies(here, asked), accuracies(there, asked), len(SAMPLES))
    assert abs(here.float_accuracy - there.float_accuracy) <= ONE_IN_1000


def test_the_default_job_ranks_policies_the_same(device: torch.device) -> None:
    if device.type == second_device.NAME:
        pytest.skip("takes minutes where every operation is one of Python")
    here, there = (SearchTask.build(SearchConfig(device=str(one))).problem for one in ("cpu", device))
    asked = policies(here, 12)
    assert_ranked_alike(accuracies(here, asked), accuracies(there, asked), here.evaluator.count)


@pytest.mark.parametrize("scheme", ["linear", "linear-asymmetric", "lsq", "pact", "dorefa"])
def test_integers_on_the_grid_are_equal_bit_for_bit(device: torch.device, scheme: str) -> None:
    network = fitted_network()
    policy = Q.BitPolicy.uniform(network, w=8, a=8)
    here = Q.quantize(network, policy, scheme=scheme, calibrate=CALIBRATION)
    there = Q.copy_network(here).to(device)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    for name, layer in Q.quant_layers(here).items():
        other = Q.quant_layers(there)[name]
        for bits in range(2, 9):
            for one in (layer, other):
                one.weight_bits = one.activation_bits = bits
            assert torch.equal(layer.quantized_weight(), other.quantized_weight().cpu()), (name, bits)
            given = layer.scheme.activation(layer, x, bits)
            assert torch.equal(given, other.scheme.activation(other, x.to(device), bits).cpu()), (name, bits)


def test_calibration_finds_the_same_scales(device: torch.device) -> None:
    here, there = (make_problem(one).evaluator.network for one in ("cpu", device))
    states = Q.quantizer_state(here), Q.quantizer_state(there)
    for name, tensor in states[0].items():
        other = states[1][name].cpu()
        assert torch.allclose(tensor.double(), other.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", ["loss", "kl", "hessian", "gradient"])
def test_a_search_with_every_kind_of_sensitivities(device: torch.device, kind: str) -> None:
    here, there = (haq.solve(make_problem(one), "ilp", evaluations=60, sensitivities=kind) for one in ("cpu", device))
    known = np.isfinite(here.sensitivities.loss_increases)
    assert np.allclose(
        here.sensitivities.loss_increases[known], there.sensitivities.loss_increases[known], rtol=1e-2, atol=1e-4
    )
    assert abs(here.trial.accuracy - there.trial.accuracy) <= 0.01
    assert there.trial.feasible


def test_a_step_of_fine_tuning(device: torch.device) -> None:
    split = Split((255 * CALIBRATION).to(torch.uint8), brightest(CALIBRATION))
    tuned: list[dict[str, Tensor]] = []
    for one in (torch.device("cpu"), device):
        network = Network("small", fitted_network(), (1, 8, 8)).to(one)
        quantized = make_problem(one).quantized(Q.BitPolicy.uniform(network.module, w=4, a=4))
        made = training.finetune(network, quantized, split, epochs=0, steps=2, seed=0, keep_best=False)
        tuned.append({name: tensor.detach().cpu() for name, tensor in made.state_dict().items()})
    for name, tensor in tuned[0].items():
        assert torch.allclose(tensor.double(), tuned[1][name].double(), rtol=1e-2, atol=1e-3), name


def test_mixed_precision_trains(device: torch.device) -> None:
    if device.type == second_device.NAME:
        pytest.skip("it has no type of half precision")
    network = Network("small", small_network(), (1, 8, 8)).to(device)
    split = Split((255 * SAMPLES).to(torch.uint8), LABELS)
    losses: list[float] = []
    config = training.TrainConfig(epochs=3, learning_rate=0.05, seed=0, batch_size=64, amp=True)
    training.fit(network, split, config, on_epoch=lambda epoch, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in network.module.parameters()} == {torch.float32}


def test_a_search_under_attack_judges_alike(device: torch.device) -> None:
    proxy = ProxyAttack.of(Network("small", nn.Identity(), (1, 8, 8)), 0.05)
    found = []
    for one in ("cpu", device):
        problem = make_problem(one, objective=RobustAccuracy(proxy))
        found.append(problem.evaluate(problem.uniform(4)).accuracy)
    # The sign of a gradient near 0 may be another.
    assert abs(found[0] - found[1]) <= 0.005


def test_pgd_finds_as_much(device: torch.device) -> None:
    found = []
    for one in (torch.device("cpu"), device):
        network = make_problem(one).quantized(Q.BitPolicy.uniform(fitted_network(), w=4, a=4))
        found.append(assess(network, SAMPLES[:100], LABELS[:100], eps=0.1, attacks="pgd,square").attacks)
    assert found[0].keys() == found[1].keys()
    for name, left in found[0].items():
        assert abs(left - found[1][name]) <= 0.02, name


def test_workers_find_what_is_found_here(device: torch.device) -> None:
    if device.type == second_device.NAME:
        pytest.skip("other processes don't know it")
    here, there = (haq.solve(make_problem(device), "greedy", evaluations=30, workers=count) for count in (None, 2))
    assert here.policy == there.policy
    assert here.trial.evaluation == there.trial.evaluation
