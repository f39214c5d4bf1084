"""Everything is computed where networks are, and comes out as on the CPU; a device that isn't there is refused.

The second device (`tests.second_device`) computes on the CPU, so that whatever is equal there is equal to the last bit, and
fails where a GPU would: where tensors of two devices meet, or NumPy is given one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import haq
import quantizers as Q
from haq.attacks import ATTACKS
from haq.attacks.assessment import assess
from haq.attacks.base import AttackBudget, AttackSetup
from haq.attacks.classifier import Classifier
from haq.attacks.proxy import ProxyAttack
from haq.attacks.threat_model import ThreatModel
from haq.networks import Network
from haq.problem.device import available, check_device_name, find_device
from haq.problem.objective import RobustAccuracy
from haq.solvers.sensitivity import computed
from tests import second_device
from tests.conftest import brightest, fitted_network, images

CPU = torch.device("cpu")
SECOND = second_device.register()
SAMPLES = images(40)
LABELS = brightest(SAMPLES)


@pytest.fixture(autouse=True)
def nothing_is_drawn_there() -> Any:
    """A device of another make would draw other numbers."""
    second_device.drawn.clear()
    yield
    assert not second_device.drawn


def make_problem(device: torch.device | str, **options: Any) -> haq.Problem:
    options = {"metric": "latency", "objective": "accuracy", "search": (SAMPLES, LABELS), **options}
    return haq.Problem(
        fitted_network(),
        calibrate=images(24, 1),
        target="edge",
        budget=0.6,
        device=device,
        **options,
    )


def of_both(make: Any) -> tuple[Any, Any]:
    return make(CPU), make(SECOND)


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in plain(one).items():
        assert torch.equal(tensor, plain(other)[name]), name


@pytest.mark.parametrize("name", ["", "gpu:", "Cuda", "cuda:-1", "cuda:x", "cuda:01", "cuda 1", "cuda:99999"])
def test_a_name_that_no_device_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="it must be cpu, cuda, cuda:N or mps") as error:
        check_device_name(name)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "tpu", "second:4", "cpu:1"])
def test_a_device_that_is_not_there_is_refused_and_those_that_are_named(name: str) -> None:
    if name in available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"--device is '{name}', which isn't here: there are cpu, second:0"):
        find_device(name)
    with pytest.raises(ValueError, match=f"`device` is '{name}', which isn't here"):
        make_problem(name)


def test_a_device_without_its_number_is_the_first() -> None:
    assert find_device("second") == SECOND
    assert find_device("second:0") == SECOND
    assert find_device("cpu") == find_device("cpu:0") == CPU


def test_the_network_that_is_given_stays_where_it_is() -> None:
    network = fitted_network()
    problem = haq.Problem(
        network, calibrate=images(8, 1), search=(SAMPLES, LABELS), target="edge", device="second", scheme="pact"
    )
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert problem.evaluator.device == SECOND


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "gptq": {"rounding": "gptq"},
    "no correction": {"correction": None},
    "kmeans": {"scheme": "kmeans", "metric": "storage"},
    "lsq": {"scheme": "lsq"},
    "lsqplus": {"scheme": "lsqplus", "metric": "storage"},
    "pact": {"scheme": "pact"},
    "dorefa": {"scheme": "dorefa"},
    "binary": {"scheme": "binary", "bits": (1, 8)},
    "agreement": {"objective": "agreement"},
}


LONG = ("no correction", "kmeans", "binary", "gptq")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SETTINGS])
def test_calibration_and_evaluation_are_those_of_the_cpu(name: str) -> None:
    here, there = of_both(lambda device: make_problem(device, **SETTINGS[name]))
    assert_same(Q.quantizer_state(here.evaluator.network), Q.quantizer_state(there.evaluator.network))
    assert here.float_result == there.float_result
    for bits in (3, 8):
        assert here.evaluate(here.uniform(bits)) == there.evaluate(there.uniform(bits))
    # From where a policy parts from the one before.
    mixed = Q.BitPolicy({**here.uniform(8), "hidden": (2, 3)})
    assert here.evaluate(mixed) == there.evaluate(mixed)


def test_zero_points_are_those_of_the_cpu() -> None:
    made = []
    for device in (CPU, SECOND):
        network = fitted_network().to(device)
        policy = Q.BitPolicy.uniform(network, w=4, a=4)
        made.append(Q.quantize(network, policy, scheme="linear-asymmetric", calibrate=images(24, 1).to(device) - 0.5))
    assert_same(*map(Q.quantizer_state, made))


@pytest.mark.parametrize("kind", ["loss", "kl", "hessian", "gradient"])
def test_sensitivities_are_those_of_the_cpu(kind: str) -> None:
    if kind in ("hessian", "gradient"):
        here, there = of_both(lambda device: computed(make_problem(device), kind))
    else:
        here, there = of_both(
            lambda device: haq.solve(make_problem(device), "ilp", evaluations=40, sensitivities=kind).sensitivities
        )
    assert np.array_equal(here.loss_increases, there.loss_increases, equal_nan=True)


def test_a_search_under_attack_finds_what_it_finds_on_the_cpu() -> None:
    proxy = ProxyAttack.of(Network("small", nn.Identity(), (1, 8, 8)), 0.05)

    def search(device: torch.device) -> Any:
        problem = make_problem(device, objective=RobustAccuracy(proxy))
        return problem.float_result, problem.evaluate(problem.uniform(4))

    here, there = of_both(search)
    assert here == there


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_assessment_finds_what_it_finds_on_the_cpu(norm: str) -> None:
    x, y = SAMPLES[:6], LABELS[:6]

    def attacked(device: torch.device) -> Any:
        problem = make_problem(device, scheme="pact")
        network = problem.quantized(problem.uniform(4))
        attacks = "quick,pgd-dlr,pgd-temperature,pgd-bpda-soft"
        return assess(network, x, y, eps=0.1, norm=norm, attacks=attacks, sources={"twin": Q.float_copy(network)})

    here, there = of_both(attacked)
    assert here.attacks == there.attacks
    assert here.curve == there.curve
    assert here.checks == there.checks
    assert torch.equal(here.examples, there.examples)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_attack_makes_of_images_what_it_makes_on_the_cpu(norm: str) -> None:
    budget = AttackBudget(steps=2, restarts=2, apgd=3, targets=1, queries=5, draws=2)

    def attacked(device: torch.device) -> dict[str, Tensor]:
        network = fitted_network()
        network = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), scheme="pact", calibrate=images(24, 1))
        victim = Classifier(network.to(device))
        setup = AttackSetup(victim, ThreatModel(0.1, norm), budget, 4, {"twin": Classifier(fitted_network().to(device))})
        made = {}
        for name in ATTACKS:
            for attack in ATTACKS.get(name).make(name, setup):
                made[attack.name] = attack.run(SAMPLES[:6].to(device), LABELS[:6].to(device), 0)
        return made

    assert_same(*of_both(attacked))


def absolute(outputs: Any, targets: Tensor) -> Tensor:
    return (outputs["scores"] - targets).abs().mean(1)


absolute.higher_is_better = False  # type: ignore[attr-defined]


class TwoInputs(nn.Module):
    """Takes two images, and answers by name."""

    def __init__(self) -> None:
        super().__init__()
        self.network = fitted_network()

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"scores": self.network(first) + second.mean()}


def test_inputs_and_outputs_of_any_structure_are_those_of_the_cpu() -> None:
    targets = nn.functional.one_hot(LABELS, 4).float()

    def judged(device: torch.device) -> Any:
        problem = haq.Problem(
            TwoInputs(),
            calibrate=[(images(24, 1), images(24, 2))],
            search=[((SAMPLES, SAMPLES.flip(0)), targets)],
            target="edge",
            budget=0.6,
            scheme="pact",
            objective=absolute,
            device=device,
        )
        known = computed(problem, "gradient")
        assert known is not None
        few_bits = known.loss_increases[:, :, :8]  # what nobody can choose isn't known
        return problem.float_result, problem.evaluate(problem.uniform(3)), few_bits.tolist()

    here, there = of_both(judged)
    assert here == there


def test_samples_that_are_streamed_come_to_the_device() -> None:
    pairs = TensorDataset(SAMPLES, LABELS)
    kept = make_problem(SECOND, scheme="pact", search=pairs)
    streamed = make_problem(SECOND, scheme="pact", search=pairs, memory=1)
    assert streamed.evaluator.samples is not None
    assert not streamed.evaluator.samples.is_kept
    assert kept.float_result == streamed.float_result
    assert kept.evaluate(kept.uniform(3)) == streamed.evaluate(streamed.uniform(3))
