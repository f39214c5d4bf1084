"""The penalty equals its closed form and makes networks less expansive; norms are those of the explicit matrices."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.defensive import (
    ConvexAdd,
    Wiring,
    draw_amplification,
    error_amplification,
    lipschitz_bound,
    lipschitz_penalty,
    operator_norm,
    spectral_norms,
)
from tests.conftest import images, small_network


def linear(*weights: Tensor) -> nn.Sequential:
    """A chain of linear layers without biases."""
    network = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight.clone()
        network.append(layer)
    return network


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The explicit matrix of a layer: its answers to the unit vectors, less its bias."""
    size = math.prod(shape)
    units = torch.eye(size, dtype=torch.float64).view(size, *shape)
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros_like(units))).flatten(1).T


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (6, 6), (1, 5)])
def test_the_penalty_is_its_closed_form_in_either_orientation(shape: tuple[int, int]) -> None:
    network = linear(random(*shape))
    weight = network[0].weight
    small, large = min(shape), max(shape)
    wide = weight if shape[0] <= shape[1] else weight.T
    closed = (torch.linalg.svdvals(weight).square() - 1).square().sum()
    long_way = (wide.T @ wide - torch.eye(large)).square().sum()
    penalty = lipschitz_penalty(network, beta=2)
    torch.testing.assert_close(penalty, closed)
    torch.testing.assert_close(long_way - penalty, torch.tensor(large - small, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(penalty, weight)
    (long_gradient,) = torch.autograd.grad(long_way, weight)
    torch.testing.assert_close(gradient, long_gradient, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, 4 * (weight @ weight.T @ weight - weight), atol=1e-12, rtol=1e-12)


def test_orthonormal_weights_cost_nothing() -> None:
    rows = torch.linalg.qr(random(18, 4))[0].T
    conv = nn.Conv2d(2, 4, 3, dtype=torch.float64)
    conv.weight.data = rows.reshape(4, 2, 3, 3).contiguous()
    network = nn.Sequential(conv, nn.Flatten(), *linear(rows, rows.T.contiguous()))
    penalty = lipschitz_penalty(network)
    penalty.backward()
    assert penalty.item() < 1e-28
    assert all(layer.weight.grad.abs().max() < 1e-15 for layer in (conv, network[2], network[3]))


def test_beta_and_layers_add_up() -> None:
    a, b = random(3, 5), random(2, 3, seed=1)
    whole = lipschitz_penalty(linear(a, b), beta=0.3)
    torch.testing.assert_close(whole, 0.15 * 2 * (lipschitz_penalty(linear(a), 1) + lipschitz_penalty(linear(b), 1)))
    assert lipschitz_penalty(linear(a), beta=0).item() == 0
    torch.testing.assert_close(lipschitz_penalty(linear(a)), lipschitz_penalty(linear(a), beta=3e-4))


def test_groups_are_matrices_of_their_own() -> None:
    grouped = nn.Conv1d(6, 4, 3, groups=2, dtype=torch.float64)
    parts = grouped.weight.detach().flatten(1).split(2)
    torch.testing.assert_close(lipschitz_penalty(nn.Sequential(grouped), 1), lipschitz_penalty(linear(*parts), 1))
    depthwise = nn.Conv2d(12, 12, 3, groups=12, dtype=torch.float64)
    expected = (depthwise.weight.flatten(1).square().sum(1) - 1).square().sum()
    torch.testing.assert_close(lipschitz_penalty(nn.Sequential(depthwise), 2), expected)


def test_quantized_networks_have_the_penalty_of_their_float_weights(network: nn.Module) -> None:
    expected = lipschitz_penalty(network)
    wiring = Wiring.of(network, images(2))
    for bits in (8, 4, 2):
        qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=bits, a=bits), calibrate=images(8))
        assert torch.equal(lipschitz_penalty(qnetwork), expected)
        assert spectral_norms(qnetwork, images(2)) == spectral_norms(network, images(2))
        for given in (images(2), wiring):
            torch.testing.assert_close(
                lipschitz_penalty(qnetwork, folded=True, norm="conv", example=given),
                lipschitz_penalty(network, folded=True, norm="conv", example=given),
            )
    lipschitz_penalty(qnetwork).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in Q.quant_layers(qnetwork).values())


def test_half_precision_does_not_spoil_it(network: nn.Module) -> None:
    expected = lipschitz_penalty(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lipschitz_penalty(network), expected)
    torch.testing.assert_close(lipschitz_penalty(copy.deepcopy(network).bfloat16()), expected, rtol=0.02, atol=0)


class Mixed(nn.Module):
    """Norms after a convolution and a linear layer, one after an activation in place, one before anything, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(1)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.relu, self.late = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.hidden, self.plain = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)
        self.unused, self.spare = nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4)
        with torch.no_grad():
            for index, norm in enumerate((self.first, self.norm, self.late, self.plain)):
                generator = torch.Generator().manual_seed(index)
                norm.running_var.uniform_(0.2, 3, generator=generator)
                if norm.affine:
                    norm.weight.uniform_(-2, 2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.relu(self.other(torch.relu(self.norm(self.conv(self.first(x)))))))
        return self.plain(self.hidden(x.mean((2, 3))))


def test_the_wiring_is_what_the_forward_pass_does() -> None:
    network = Mixed().train()
    network.norm.eval()  # frozen
    for given in (images(3), images(3).requires_grad_()):
        wiring = Wiring.of(network, given)
        assert wiring.norms == {"conv": "norm", "hidden": "plain"}
        assert wiring.lone_norms == ("first", "late")
        assert wiring.inputs == {"conv": (1, 8, 8), "other": (4, 8, 8), "hidden": (4,)}
        assert wiring.calls == dict.fromkeys(wiring.inputs, 1)
    assert network.training
    assert network.conv.training
    assert not network.norm.training
    assert not any(module._forward_hooks for module in network.modules())
    with torch.inference_mode():
        assert Wiring.of(network, images(3)) == wiring
        assert spectral_norms(network, wiring) == spectral_norms(network, images(3))
        assert lipschitz_penalty(network, folded=True, norm="conv", example=wiring) > 0


class Unseen(nn.Module):
    """Works in place, in a way that torch doesn't count."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "data":
            x.data.relu_()
        else:
            values = x.detach().numpy()
            values[values < 0] = 0
        return x


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_an_activation_that_torch_does_not_see_stands_between_too(way: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), Unseen(way), nn.BatchNorm2d(4)).eval()
    wiring = Wiring.of(network, images(3))
    assert wiring.norms == {}
    assert wiring.lone_norms == ("2",)
    assert isinstance(Q.fold_batch_norm(network, images(3))[2], nn.BatchNorm2d)


def test_folding_is_multiplying_the_weights_beforehand() -> None:
    network = Mixed().eval()
    by_hand = copy.deepcopy(network)
    with torch.no_grad():
        factor = network.norm.weight / (network.norm.running_var + network.norm.eps).sqrt()
        by_hand.conv.weight *= factor.view(-1, 1, 1, 1)
        by_hand.hidden.weight /= (network.plain.running_var + network.plain.eps).sqrt()[:, None]
    x = images(2)
    assert lipschitz_penalty(network) != lipschitz_penalty(by_hand)
    torch.testing.assert_close(lipschitz_penalty(network, folded=True, example=x), lipschitz_penalty(by_hand))
    torch.testing.assert_close(
        lipschitz_penalty(network, folded=True, norm="conv", example=x),
        lipschitz_penalty(by_hand, norm="conv", example=x),
    )
    folded, expected = spectral_norms(network, x, folded=True), spectral_norms(by_hand, x)
    assert list(folded) == ["conv", "other", "hidden"]
    for name in folded:
        assert folded[name] == pytest.approx(expected[name], rel=1e-4)
    lipschitz_penalty(network, folded=True, example=x).backward()
    assert network.norm.weight.grad.abs().min() > 0
    assert network.late.weight.grad is None


@pytest.mark.parametrize("norm", ["reshaped", "conv"])
def test_the_size_of_a_weight_before_a_training_norm_gets_no_gradient(norm: str) -> None:
    """That norm undoes any size, so that a gradient would shrink the weight without end."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).double()
    wiring = Wiring.of(network, images(1).double())
    values, along = [], []
    for mode in (True, False):
        network.train(mode).zero_grad()
        penalty = lipschitz_penalty(network, 2, folded=True, norm=norm, example=wiring)
        penalty.backward()
        values.append(penalty.item())
        weight = network[0].weight
        assert weight.grad.abs().sum() > 0.1
        along.append((weight.grad * weight).flatten(1).sum(1).abs())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert along[0].max() < 1e-9
    assert along[1].max() > 0.01


@pytest.mark.parametrize("positions", [4, 16, 64])
def test_a_box_filter_expands_by_almost_three(positions: int) -> None:
    box = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    box.weight.data.fill_(1 / 3)
    rho, operator = spectral_norms(nn.Sequential(box), torch.zeros(1, 1, positions, positions))["0"]
    assert rho == pytest.approx(1, abs=1e-6)
    # A row of ones of length 3 is a tridiagonal matrix with eigenvalues 1 + 2 cos(pi k / (n + 1)).
    assert operator == pytest.approx((1 + 2 * math.cos(math.pi / (positions + 1))) ** 2 / 3, rel=3e-4)
    assert operator < 3
    assert lipschitz_penalty(nn.Sequential(box)).item() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_random_convolutions_expand_more_than_their_reshaped_weights(seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    rho, operator = spectral_norms(nn.Sequential(conv), torch.zeros(1, 8, 16, 16))["0"]
    assert 1.4 < operator / rho < 1.8
    with torch.no_grad():
        conv.weight.copy_(torch.linalg.qr(torch.randn(72, 8))[0].T.reshape(8, 8, 3, 3))
    rho, operator = spectral_norms(nn.Sequential(conv), torch.zeros(1, 8, 16, 16))["0"]
    assert rho == pytest.approx(1, abs=1e-5)
    assert 1.7 < operator < 2.4


class PaddedConv(nn.Conv2d):
    """Pads in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 5)),
    (nn.Conv2d(2, 3, (1, 3), dilation=2), (2, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    (nn.Conv2d(2, 2, (3, 5), padding="same"), (2, 5, 5)),
    (nn.Conv1d(3, 5, 3, padding=1), (3, 9)),
    (nn.Conv2d(3, 5, 1, stride=2), (3, 5, 5)),
    (nn.Linear(6, 4), (6,)),
    (PaddedConv(2, 3, 2, stride=2), (2, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:40])
def test_power_iteration_finds_the_norm_of_the_explicit_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).double()
    shape_of_weight = layer.get_parameter("weight").shape
    layer.weight.data = random(*shape_of_weight) + 1  # one direction stands out, so that it is found quickly
    matrix = matrix_of(layer, shape)
    u, s, v = torch.linalg.svd(matrix)
    found = operator_norm(layer, shape, tolerance=0)
    torch.testing.assert_close(found, s[0], atol=0, rtol=1e-9)
    # The gradient of the largest singular value is u v^T, here contracted with the matrix of another weight.
    (gradient,) = torch.autograd.grad(found, layer.weight)
    other = copy.deepcopy(layer)
    other.weight.data = random(*shape_of_weight, seed=1)
    expected = u[:, 0] @ matrix_of(other, shape) @ v[0]
    torch.testing.assert_close((gradient * other.weight).sum(), expected, atol=1e-5, rtol=1e-5)

    network = nn.Sequential(layer)
    rho, operator = spectral_norms(network, torch.zeros(2, *shape, dtype=torch.float64))["0"]
    assert operator == pytest.approx(s[0].item(), rel=1e-3)
    blocks = layer.weight.detach().flatten(1).chunk(getattr(layer, "groups", 1))
    assert rho == pytest.approx(max(torch.linalg.matrix_norm(block, 2).item() for block in blocks), rel=1e-9)
    penalty = lipschitz_penalty(network, 2, norm="conv", example=torch.zeros(1, *shape).double(), iterations=1000)
    assert penalty.item() == pytest.approx((operator**2 - 1) ** 2, rel=1e-2)
    quantized = Q.quantize(network, {"0": (2, None)})
    torch.testing.assert_close(operator_norm(quantized[0], shape, tolerance=0), found)


def test_a_norm_needs_no_example_and_repeats(network: nn.Module) -> None:
    norms = spectral_norms(network)
    assert list(norms) == list(Q.BitPolicy.uniform(network, w=4, a=4))
    assert norms == spectral_norms(network)
    assert norms["hidden"][0] == norms["hidden"][1]
    with torch.inference_mode():
        assert spectral_norms(network) == norms
    for name, (rho, operator) in spectral_norms(network, images(1)).items():
        assert operator <= norms[name][1] * (1 + 1e-3)  # larger inputs leave more room
        assert operator <= 3 * rho
    zero = nn.Conv2d(1, 1, 3)
    zero.weight.data.zero_()
    assert spectral_norms(nn.Sequential(zero))["0"] == (0, 0)


def test_the_bound_of_a_chain_bounds_its_jacobian() -> None:
    network = Mixed().eval()
    x = images(1)
    jacobian = torch.autograd.functional.jacobian(network, x).reshape(5, 64)
    bound = lipschitz_bound(network, x)
    assert torch.linalg.matrix_norm(jacobian, 2).item() < bound
    assert lipschitz_bound(network, Wiring.of(network, x)) == bound
    # Without activations, of diagonal layers: exact. A layer that is called twice counts twice.
    first, second = linear(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([3.0, 0.5])))
    assert lipschitz_bound(nn.Sequential(first, second, second), torch.ones(1, 2)) == pytest.approx(18)


def trained(beta: float, norm: bool = False, folded: bool = False) -> tuple[nn.Module, Tensor, float]:
    """Which quarter of an image is brightest: a network after 300 steps, the images, and its accuracy on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, channels = nn.Sequential(), 1
        for stride in (1, 2, 1, 1, 1):
            network.extend([nn.Conv2d(channels, 8, 3, stride, 1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU()])
            channels = 8
        network.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)])
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        x = images(256)
        y = F.avg_pool2d(x, 4).flatten(1).argmax(1)
        wiring = Wiring.of(network, x)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(300):
            index = torch.randint(256, (64,))
            loss = F.cross_entropy(network(x[index]), y[index])
            loss = loss + lipschitz_penalty(network, beta, folded=folded, example=wiring if folded else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            return network, x, (network(x).argmax(1) == y).double().mean().item()


def test_training_with_it_makes_a_network_expand_less() -> None:
    products, bounds = [], []
    for beta in (0, 2e-3, 2e-2):
        network, x, accuracy = trained(beta)
        assert accuracy > 0.9
        products.append(math.prod(rho for rho, _ in spectral_norms(network, x).values()))
        bounds.append(lipschitz_bound(network, x))
    assert products == sorted(products, reverse=True)
    assert products[0] >= 10 * products[2]  # measured 164, 29, 5.5
    assert bounds == sorted(bounds, reverse=True)


def test_batch_norm_undoes_it_unless_it_is_folded() -> None:
    bounds = []
    for beta, folded in ((0, False), (2e-2, False), (2e-2, True)):
        network, x, accuracy = trained(beta, norm=True, folded=folded)
        assert accuracy > 0.9
        bounds.append(lipschitz_bound(network, x))
    assert bounds[0] < 6 * bounds[1]  # measured 7600, 2700, 140
    assert bounds[0] > 15 * bounds[2]


@pytest.mark.parametrize("start", [0.5, 0.1, 0.99])
def test_convex_addition_expands_no_more_than_its_branches(start: float) -> None:
    add = ConvexAdd(start).double()
    assert add.share.item() == pytest.approx(start)
    for seed in range(10):
        a, b = random(6, 4, seed=seed), 3 * random(6, 4, seed=seed + 10)
        joined = add(a, b)  # linear maps are added as their matrices
        torch.testing.assert_close(joined, start * a + (1 - start) * b)
        largest = max(torch.linalg.matrix_norm(a, 2), torch.linalg.matrix_norm(b, 2))
        assert torch.linalg.matrix_norm(joined, 2) <= largest
    same = add(a, a)
    torch.testing.assert_close(same, a)


def test_the_share_is_learned_and_stays_a_share() -> None:
    add = ConvexAdd()
    optimizer = torch.optim.SGD(add.parameters(), 100.0)
    for _ in range(5):
        loss = add(torch.ones(2, 3), torch.zeros(2, 3)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 <= add.share.item() < 0.01
    fixed = ConvexAdd(0.25, learned=False)
    assert not list(fixed.parameters())
    fixed.load_state_dict(ConvexAdd(0.75).state_dict())
    assert fixed.share.item() == pytest.approx(0.75)


def test_amplification_is_what_the_layers_do() -> None:
    x = torch.zeros(5, 2, dtype=torch.float64)
    x[:, 0] = torch.arange(1, 6)
    moved = x + torch.tensor([0, 0.5])
    start = sum(0.5 / size for size in range(1, 6)) / 5
    eye = torch.eye(2, dtype=torch.float64)
    assert list(error_amplification(linear(eye, eye, eye), x, moved).values()) == pytest.approx([start] * 3)
    # Scaling all alike isn't growth, and expanding only the direction of the perturbation is.
    assert list(error_amplification(linear(2 * eye, 2 * eye), x, moved).values()) == pytest.approx([start] * 2)
    double = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    grown = error_amplification(linear(double, double, double), x, moved)
    assert grown == pytest.approx({"0": 2 * start, "1": 4 * start, "2": 8 * start})
    assert set(error_amplification(linear(double, eye), x, x).values()) == {0}


def test_rounding_removes_small_perturbations_and_adds_to_larger_ones() -> None:
    network = linear(torch.eye(2), torch.eye(2))
    grid = torch.tensor([[3.0, 1.0], [2.0, 1.0]])  # the integers 0..3 are the grid of two bits
    state = Q.quantizer_state(Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=2), calibrate=grid))
    state |= {"0.activation_scale": torch.ones(9), "1.activation_scale": torch.ones(9)}
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=2), state=state)
    for step, expected in ((0.4, 0.0), (0.6, 1.0)):
        moved = grid + torch.tensor([0, step])
        result = error_amplification(qnetwork, grid[:1], moved[:1])
        assert list(result.values()) == pytest.approx([expected / math.sqrt(10)] * 2, rel=1e-4)


def test_amplification_of_a_network_is_ordered_batched_and_leaves_it_alone(network: nn.Module) -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.body, self.tokens = nn.Linear(4, 2), small_network(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(self.last(self.body(x)).repeat_interleave(3, 0))

    net = Reversed().train()
    before = copy.deepcopy(net.state_dict())
    x = images(150)
    moved = x + 0.05 * images(150, seed=1)
    with torch.inference_mode():
        result = error_amplification(net, x, moved)
    assert list(result) == [f"body.{name}" for name in Q.BitPolicy.uniform(network, w=4, a=4)] + ["last", "tokens"]
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        a, b = net.body.stem(x).flatten(1), net.body.stem(moved).flatten(1)
    assert result["body.stem"] == pytest.approx(((a - b).norm(dim=1) / a.norm(dim=1)).mean().item(), rel=1e-5)
    halves = [error_amplification(net, x[part], moved[part]) for part in (slice(0, 75), slice(75, 150))]
    for name, value in result.items():
        assert value == pytest.approx((halves[0][name] + halves[1][name]) / 2, rel=1e-5)


def test_the_picture_is_a_png(tmp_path: Path, network: nn.Module) -> None:
    x = images(4)
    result = error_amplification(network, x, x + 0.01)
    path = tmp_path / "growth.png"
    draw_amplification({"float": result, "dead": dict.fromkeys(result, math.inf)}, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    draw_amplification({"float": result}, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["growth.png"]
    for bad, message in (
        ({}, "nothing to draw"),
        ({"a": {}}, "nothing to draw"),
        ({"a": result, "b": {"stem": 1.0}}, "'a' and 'b' are of different layers"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_amplification(bad, path)


def test_importing_it_draws_in_no_drawing_library() -> None:
    code = "import quantizers.defensive, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("beta", [-1e-9, float("nan"), float("inf"), -1])
def test_a_bad_beta_is_named(network: nn.Module, beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be a number from 0, not"):
        lipschitz_penalty(network, beta=beta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "frobenius"}, "unknown norm 'frobenius'; known: reshaped, conv"),
        ({"norm": "conv"}, "give `example`"),
        ({"folded": True}, "give `example`"),
        ({"norm": "conv", "example": images(1), "iterations": 0}, "at least one iteration, not 0"),
        ({"folded": True, "example": Wiring.of(Mixed(), images(1))}, "another network: there is no 'conv'"),
    ],
)
def test_bad_arguments_are_named(network: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_penalty(network, **arguments)


def test_other_bad_input_is_named(network: nn.Module) -> None:
    x, nothing = images(2), nn.Sequential(nn.ReLU())
    for call in (
        lambda: lipschitz_penalty(nothing),
        lambda: spectral_norms(nothing),
        lambda: lipschitz_bound(nothing, x),
        lambda: error_amplification(nothing, x, x),
    ):
        with pytest.raises(ValueError, match="Sequential has no Conv1d, Conv2d or Linear layer"):
            call()
    for clean, perturbed, message in (
        (x, x[:1], "differ in shape"),
        (x[:0], x[:0], "at least one input"),
        (x, x / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            error_amplification(network, clean, perturbed)
    network.norm = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match="'norm' has no running variance"):
        lipschitz_penalty(network, folded=True, example=x)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ConvexAdd(share)
    with pytest.raises(ValueError, match="different shapes"):
        ConvexAdd()(torch.ones(2, 3), torch.ones(1, 3))
