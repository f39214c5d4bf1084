"""Whatever the gradient does at a quantized input, what passes forward stays; and each backward mode is what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers.functional import BLOCK
from tests.conftest import images, small_network

SCHEMES = ("linear", "lsq", "lsqplus", "pact", "dorefa", "kmeans", "binary")


def quantized(scheme: str | Q.Scheme, signed: bool = False) -> nn.Module:
    """The small network at three and two bits, or one, on images that are negative in places, or not."""
    network = small_network()
    one = scheme == "binary"
    if one:  # behind a ReLU all signs are +1
        for name in ("relu", "relu2", "relu3"):
            setattr(network, name, nn.Tanh())
    policy = Q.BitPolicy.uniform(network, w=1 if one else 3, a=1 if one else 2)
    # Pact's usual clip is far beyond this network's values.
    return Q.quantize(
        network, policy, scheme=Q.PACT(clip=None) if scheme == "pact" else scheme, calibrate=images(32) - signed / 2
    )


def one_layer(scheme: str | Q.Scheme = "linear", bits: int = 2, signed: bool = False) -> nn.Module:
    """y = x, but that x is quantized: to 0, 0.5, 1 and 1.5 with the linear scheme at two unsigned bits."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    network[0].weight.data.fill_(1)
    sample = torch.linspace(-1.5 if signed else 0, 1.5, 64)[:, None]
    made = Q.quantize(network, {"0": (1 if scheme == "binary" else None, bits)}, scheme=scheme, calibrate=sample)
    if scheme in ("linear", "kmeans"):
        made[0].activation_scale.fill_(0.5)
    return made


def slopes(network: nn.Module, mode: str, values: Tensor) -> Tensor:
    """What a gradient of one becomes on its way through a single layer."""
    x = values[:, None].clone().requires_grad_()
    with Q.backward_mode(network, mode):
        (gradient,) = torch.autograd.grad(network(x).sum(), x)
    return gradient[:, 0]


def modes_of(network: nn.Module) -> set[str]:
    return {layer.backward_mode for layer in Q.quant_layers(network).values()}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_passes_forward_never_changes(scheme: str, signed: bool) -> None:
    """To the last bit, with and without gradients, in every mode and scheme."""
    network, x = quantized(scheme, signed), 3 * images(5, seed=1) - 1
    with torch.no_grad():
        expected = network(x)
    assert len(expected.unique(dim=0)) > 1
    for mode in Q.BACKWARD:
        with Q.backward_mode(network, mode):
            found = network(x.clone().requires_grad_())
            assert found.requires_grad
            assert torch.equal(found, expected), mode
            assert torch.equal(network(x), expected), mode


def test_inputs_too_large_for_the_cache_are_not_written_over() -> None:
    """Without gradients a scheme may reuse the memory of its last result: the modes keep copies of theirs."""
    network, x = one_layer(), torch.linspace(-1, 3, 2 * BLOCK)[:, None]
    with torch.no_grad():
        expected = network(x).clone()
    for mode in Q.BACKWARD:
        inputs = x.clone().requires_grad_()
        with Q.backward_mode(network, mode):
            found = network(inputs)
            network(3 - inputs)
        assert torch.equal(found, expected), mode
        (gradient,) = torch.autograd.grad(found.sum(), network[0].weight)
        assert gradient.item() == pytest.approx(expected.sum().item(), rel=1e-4), mode
    some = torch.arange(0, 2 * BLOCK, 4099)
    assert torch.equal(slopes(network, "bpda-soft", x[:, 0])[some], slopes(network, "bpda-soft", x[some, 0]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_is_exactly_zero(scheme: str) -> None:
    """Every pixel's gradient, whatever the scheme; while the scheme's own isn't."""
    network, x = quantized(scheme), images(5, seed=1)
    gradients = {}
    for mode in Q.BACKWARD:
        inputs = x.clone().requires_grad_()
        with Q.backward_mode(network, mode):
            gradients[mode] = torch.autograd.grad(network(inputs).square().sum(), inputs)[0]
    assert torch.count_nonzero(gradients["hard"]) == 0
    for mode in ("ste", "bpda-identity", "bpda-soft"):
        assert torch.count_nonzero(gradients[mode]) > 0, mode


def test_straight_through_is_the_gradient_of_training() -> None:
    """Nothing else than without the context: it passes where a value wasn't clipped."""
    network, values = one_layer(), torch.tensor([-0.1, 0.0, 0.6, 1.5, 1.6])
    assert slopes(network, "ste", values).tolist() == [0, 1, 1, 1, 0]
    x = values[:, None].clone().requires_grad_()
    assert torch.autograd.grad(network(x).sum(), x)[0][:, 0].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_identity_passes_everywhere(scheme: str) -> None:
    """Clipped values included, which straight-through stops in every scheme."""
    network = one_layer(scheme, bits=1 if scheme == "binary" else 2)
    values = torch.tensor([-50.0, -0.3, 0.0, 0.6, 1.5, 50.0])
    assert slopes(network, "bpda-identity", values).tolist() == [1] * 6
    assert slopes(network, "ste", values)[[0, -1]].tolist() == [0, 0]


def test_identity_passes_through_a_whole_network() -> None:
    """It is the gradient of the same network with x + (quantized - x) at every layer, the bracket being constant."""
    network, x = quantized("linear"), 3 * images(4, seed=1) - 1

    class Detached(Q.Linear):
        def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
            value = super().activation(layer, x.detach(), bits)
            return x + (value - x).detach()

    inputs = x.clone().requires_grad_()
    with Q.backward_mode(network, "bpda-identity"):
        (found,) = torch.autograd.grad(network(inputs)[:, 0].sum(), inputs)
    for layer in Q.quant_layers(network).values():
        layer.scheme = Detached()
    (expected,) = torch.autograd.grad(network(inputs)[:, 0].sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.01


def test_soft_is_the_mean_slope_over_four_windows() -> None:
    """(Q(x + h) - Q(x - h)) / 2h for h of 1/4, 1/2, 1 and 2 steps, worked out by hand for levels 0, 1, 2, 3 times 0.5."""
    steps = {
        1.2: (0 + 1 + 1 + 0.75) / 4,  # 1.45 and 0.95; 1.7 and 0.7; 2.2 and 0.2; 3.2 and -0.8 are 1 and 1, 2 and 1, ...
        1.45: (2 + 1 + 1 + 0.75) / 4,  # close to the threshold 1.5
        3.8: (0 + 0 + 0 + 0.25) / 4,  # beyond the last level, where only the widest window reaches a threshold
        3.4: (0 + 0 + 0.5 + 0.5) / 4,
        -1.2: (0 + 0 + 0 + 0.25) / 4,
        5.2: 0,  # too far beyond
        -2.1: 0,
    }
    found = slopes(one_layer(), "bpda-soft", 0.5 * torch.tensor(list(steps)))
    assert found.tolist() == pytest.approx(list(steps.values()), abs=1e-6)
    assert slopes(one_layer(), "ste", 0.5 * torch.tensor([3.8, 3.4, -1.2])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_soft_has_the_windows_of_every_scheme(scheme: str, signed: bool) -> None:
    """The same formula, from the scheme's own values and step; and just beyond the last level it isn't zero."""
    network = one_layer(scheme, bits=1 if scheme == "binary" else 3, signed=signed)
    layer = network[0]
    step = layer.scheme.activation_step(layer, layer.activation_bits).item()
    top = network(torch.full((1, 1), 1e4)).item()
    values = torch.cat([torch.linspace(-3, 3, 41) * step, torch.tensor([top + 0.6 * step])])

    def quantizer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x[:, None])[:, 0].clone()

    expected = torch.zeros_like(values)
    for half in (0.25 * step, 0.5 * step, step, 2 * step):
        expected += (quantizer(values + half) - quantizer(values - half)) / (2 * half) / 4
    torch.testing.assert_close(slopes(network, "bpda-soft", values), expected, rtol=1e-5, atol=1e-5)
    assert expected[-1] > 0.05
    assert slopes(network, "ste", values[-1:]).item() == 0 or (scheme == "binary")


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_integers_times_the_step(scheme: str, signed: bool, bits: int) -> None:
    """`Scheme.activation_step` is the distance of neighbouring levels; that of the signs -1 and +1 is two of them."""
    signs = bits == 1 and (scheme == "binary" or (signed and scheme != "dorefa"))
    if scheme == "lsq" and bits == 1 and signed:
        with pytest.raises(ValueError, match="layer '0'"):
            one_layer(scheme, bits, signed)
        return
    if scheme == "lsqplus" and bits == 1:
        signs = False
    network = one_layer(scheme, bits, signed)
    layer = network[0]
    step = layer.scheme.activation_step(layer, bits).detach()
    assert step.dim() == 0
    assert step > 0
    with torch.no_grad():
        levels = network(torch.linspace(-40, 40, 100_001)[:, None]).unique()
    levels = levels - (row_of(layer, "activation_offset", bits) if scheme == "lsqplus" else 0)
    integers = (levels / step).round()
    torch.testing.assert_close(integers * step, levels, rtol=1e-5, atol=1e-6)
    assert set(integers.diff().tolist()) == ({2.0} if signs else {1.0})
    symmetric = signed and scheme not in ("dorefa", "lsqplus", "lsq")
    assert len(levels) == (2 if signs else 2**bits - symmetric)


def row_of(layer: Q.QuantLayer, name: str, bits: int) -> Tensor:
    return getattr(layer, name).detach()[bits - 1]


def test_the_mode_is_put_back() -> None:
    """After the context, after an exception in it, and after contexts within contexts; each layer's own."""
    network = quantized("linear")
    with Q.backward_mode(network, "hard"):
        assert modes_of(network) == {"hard"}
        with Q.backward_mode(network, "bpda-soft"):
            assert modes_of(network) == {"bpda-soft"}
        assert modes_of(network) == {"hard"}
    assert modes_of(network) == {"ste"}

    def fails() -> None:
        with Q.backward_mode(network, "bpda-identity"):
            raise KeyError("inside")

    network.stem.backward_mode = "hard"
    with pytest.raises(KeyError, match="inside"):
        fails()
    assert modes_of(network) == {"hard", "ste"}
    assert network.stem.backward_mode == "hard"


def test_networks_without_quantized_layers_have_nothing_to_change(network: nn.Module) -> None:
    x = images(2)
    with Q.backward_mode(network, "hard"):
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs)
    assert torch.count_nonzero(gradient) > 0


@pytest.mark.parametrize("change", [copy.deepcopy, lambda network: network])
def test_the_float_copy_of_a_changed_network_works(change: Callable[[nn.Module], nn.Module]) -> None:
    """It is the float network again, with its gradient, within the context and after it."""
    network, x = small_network(), images(3).requires_grad_()
    expected = torch.autograd.grad(network(x).sum(), x)[0]
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=2, a=2), calibrate=images(8))
    with Q.backward_mode(qnetwork, "hard"):
        within = Q.float_copy(change(qnetwork))
    for made in (within, Q.float_copy(change(qnetwork))):
        assert not any("backward_mode" in vars(module) for module in made.modules())
        assert torch.equal(torch.autograd.grad(made(x).sum(), x)[0], expected)


def test_an_unknown_mode_is_one_sentence() -> None:
    """It names the modes that there are, and changes nothing."""
    network = quantized("linear")
    message = "unknown backward mode 'soft'; known: ste, bpda-identity, bpda-soft, hard"
    with pytest.raises(ValueError, match=f"^{message}$"), Q.backward_mode(network, "soft"):
        pass
    assert modes_of(network) == {"ste"}


def test_a_scheme_of_ones_own_needs_a_step_for_soft_only() -> None:
    """One that doesn't say its step takes part in all other modes."""

    @dataclass(frozen=True)
    class Halves(Q.Scheme):
        needs_data: ClassVar[bool] = False

        def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
            return {}

        def calibrate(self, layer: Q.SchemeLayer, observer: object) -> None:
            pass

        def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
            return layer.weight

        def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
            return (2 * x).round() / 2

    network = one_layer(Halves())
    values = torch.tensor([0.1, 0.4])
    assert slopes(network, "hard", values).tolist() == [0, 0]
    assert slopes(network, "bpda-identity", values).tolist() == [1, 1]
    with pytest.raises(NotImplementedError):
        slopes(network, "bpda-soft", values)
