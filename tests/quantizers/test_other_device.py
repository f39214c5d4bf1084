"""Everything in `quantizers` and `hw_models` is computed where the network is, and comes out as on the CPU, bit for bit.

`tests.second_device` computes on the CPU, and fails where a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hw_models
import quantizers as Q
from quantizers import batches
from quantizers.calling import device_of
from tests import second_device

CPU = torch.device("cpu")
SECOND = second_device.register()


@pytest.fixture(autouse=True)
def nothing_is_drawn_there() -> Any:
    """A device of another make would draw other numbers."""
    second_device.drawn.clear()
    yield
    assert not second_device.drawn


def net() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.SiLU(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    network[1].running_mean = torch.linspace(-0.2, 0.2, 6)
    network[1].running_var = torch.linspace(0.3, 0.6, 6)
    return network.eval()


X = torch.rand(80, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 2
POLICY = {"0": (4, 8), "3": (3, 4), "5": (2, 4), "8": (4, 4)}


OUTPUT = Q.Linear(calibration="output")  # the rule that takes the fewest operations


def quantized(device: torch.device, scheme: Any = OUTPUT, **options: Any) -> nn.Module:
    return Q.quantize(net().to(device), POLICY, scheme=scheme, calibrate=X.to(device), **options)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**network.state_dict(), **Q.quantizer_state(network)}


def check_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor.detach().cpu(), other[key].detach().cpu()), key


SCHEMES: dict[str, Any] = {
    "output": OUTPUT,
    **{name: name for name in ("lsq", "lsqplus", "pact", "dorefa")},
}
SLOW: dict[str, Any] = {
    "linear": "linear",
    "kmeans": "kmeans",
    "kl": Q.Linear(calibration="kl"),
    "asymmetric": Q.Linear(asymmetric=True),
    "power of two": Q.Linear(power_of_two=True),
}


@pytest.mark.parametrize("scheme", [*SCHEMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_schemes_are_calibrated_and_computed_there(scheme: str) -> None:
    chosen = {**SCHEMES, **SLOW}[scheme]
    here, there = (quantized(device, chosen) for device in (CPU, SECOND))
    check_same(tensors(here), tensors(there))
    assert device_of(there).type == SECOND.type
    outputs = there(X.to(SECOND))
    assert outputs.device.type == SECOND.type
    assert torch.equal(outputs.cpu(), here(X))
    # Bits are set again, and a step of training goes through it.
    for made in (here, there):
        Q.set_policy(made, dict.fromkeys(POLICY, (8, 8)))
        made.train()
        made(X.to(device_of(made))).square().mean().backward()
    grads = [{name: one.grad for name, one in made.named_parameters() if one.grad is not None} for made in (here, there)]
    for name, gradient in grads[0].items():
        assert torch.allclose(gradient, grads[1][name].cpu(), rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_binary_layers_are_computed_there() -> None:
    policy = {"0": (None, None), "3": (1, 1), "5": (1, 1), "8": (None, None)}
    found = [Q.quantize(net().to(d), policy, scheme="binary", calibrate=X.to(d)) for d in (CPU, SECOND)]
    check_same(*map(tensors, found))
    assert torch.equal(found[1](X.to(SECOND)).cpu(), found[0](X))


OPTIONS: dict[str, dict[str, Any]] = {
    "analytic": {"correction": "analytic"},
    "sequential": {"correction": "sequential"},
    "gptq": {"rounding": "gptq"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_corrections_and_rounding(options: str) -> None:
    check_same(*(tensors(quantized(device, **OPTIONS[options])) for device in (CPU, SECOND)))


def reconstruct(made: nn.Module, network: nn.Module, inputs: Tensor) -> object:
    return Q.reconstruct(made, network, inputs, iterations=3)


def reestimate(made: nn.Module, network: nn.Module, inputs: Tensor) -> object:
    return Q.reestimate_norms(made, inputs, network=network, keep_worse=True)


AFTER: dict[str, Callable[..., object]] = {"bias": Q.correct_bias, "rounding": reconstruct, "norms": reestimate}


@pytest.mark.parametrize("step", AFTER)
def test_what_follows_quantization(step: str) -> None:
    found, said = [], []
    for device in (CPU, SECOND):
        made = quantized(device)
        said.append(str(AFTER[step](made, net().to(device), X.to(device))))
        found.append(tensors(made))
    check_same(*found)
    assert said[0] == said[1]


STEPS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "fold": lambda network, x: Q.fold_batch_norm(network, x),
    "shift": lambda network, x: Q.fold_shifts(network, x),
    "equalize": lambda network, x: Q.equalize(network, x),
    "equalize by activations": lambda network, x: Q.equalize(network, x, by="activations", relu6="keep"),
    "copy": lambda network, x: Q.copy_network(network),
    "float": lambda network, x: Q.float_copy(Q.quantize(network, POLICY, scheme="dorefa", calibrate=x)),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_precedes_quantization(step: str) -> None:
    found = [STEPS[step](net().to(device), X.to(device)) for device in (CPU, SECOND)]
    check_same(*(made.state_dict() for made in found))
    assert torch.equal(found[1](X.to(SECOND)).cpu(), found[0](X))


def test_smoothing() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    x = torch.randn(20, 8)
    check_same(*(Q.smooth(Q.copy_network(network).to(d), [x.to(d)]).state_dict() for d in (CPU, SECOND)))


def test_a_state_is_loaded_wherever_the_network_is() -> None:
    state = Q.quantizer_state(quantized(SECOND, correction="sequential"))
    for device in (CPU, SECOND):
        made = Q.quantize(net().to(device), POLICY, scheme=OUTPUT, state=state)
        assert made(X.to(device)).device.type == device.type
        check_same(state, Q.quantizer_state(made))
        assert {one.device.type for one in made.state_dict().values()} == {device.type}


def test_a_quantized_network_can_be_moved() -> None:
    made = quantized(CPU, correction="analytic", rounding="gptq")
    expected = made(X)
    assert torch.equal(made.to(SECOND)(X.to(SECOND)).cpu(), expected)
    assert torch.equal(made.to(CPU)(X), expected)


def test_inputs_go_to_the_network() -> None:
    made = Q.quantize(net().to(SECOND), POLICY, scheme="dorefa", calibrate=[(X, torch.zeros(80))])
    check_same(tensors(made), tensors(quantized(CPU, "dorefa")))
    moved: list[str] = []

    def forward(network: nn.Module, batch: Any) -> Any:
        moved.append(batch["labels"].device.type)
        return network(batch["x"])

    Q.quantize(
        net().to(SECOND), POLICY, scheme="dorefa", calibrate=[{"x": X.numpy(), "labels": torch.zeros(80)}], forward=forward
    )
    assert set(moved) == {SECOND.type}


def test_batches_are_divided_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FEW_VALUES", 10)
    monkeypatch.setattr(batches, "MOST_BYTES", 1 << 15)
    check_same(*(tensors(quantized(device, "lsq")) for device in (CPU, SECOND)))


def test_defensive_quantization() -> None:
    found = []
    for device in (CPU, SECOND):
        network, x = net().to(device), X.to(device)
        wiring = Q.Wiring.of(network, x)
        norms = Q.spectral_norms(network, wiring, folded=True, iterations=5)
        amplification = Q.error_amplification(network, x, x + 0.01)
        found.append((norms, amplification))
    for here, there in zip(*found, strict=True):
        assert here.keys() == there.keys()
        for name, values in here.items():
            assert values == pytest.approx(there[name], rel=1e-5)


def test_filters_are_pruned() -> None:
    found = []
    for device in (CPU, SECOND):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).to(device)
        schemes = {"0": Q.MainSubsidiary(), "2": Q.Binary()}
        made = Q.quantize(network, {"0": (1, None), "2": (1, None)}, scheme=schemes, calibrate=X.to(device))
        with torch.no_grad():
            Q.masked_layers(made)["0"].filter_mask[0] = -1
        found.append(Q.remove_filters(made, exact=False).state_dict())
    check_same(*found)


def test_ensembles_vote() -> None:
    found = [Q.Ensemble([net(), net()], [1.0, 2.0]).to(device)(X.to(device)).cpu() for device in (CPU, SECOND)]
    assert torch.equal(*found)


def test_networks_are_traced() -> None:
    assert hw_models.trace(net().to(SECOND), X.to(SECOND)) == hw_models.trace(net(), X)
