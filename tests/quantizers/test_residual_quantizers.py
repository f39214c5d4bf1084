"""Residual quantizers: where they are put, what they compute, and that they are a part of the quantized network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import quantizers as Q


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        identity = x
        if skip is not None:
            identity = skip
        out = self.conv2(self.relu(self.conv1(x)))
        out += identity
        return self.relu(out)


class Gate(nn.Module):
    """Squeeze and excitation, whose pool is called two modules below the product."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x)


class Net(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.gate = Gate(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.blocks(self.stem(x)))
        x = F.dropout(x, 0.5, self.training)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(net: nn.Module, images: Tensor, bits: int = 8, **options: Any) -> nn.Module:
    inserted = Q.insert_residual_quantizers(net, images)
    return Q.quantize(inserted, Q.BitPolicy.uniform(net, w=bits, a=bits), calibrate=images, **options)


def test_tensors_that_are_added_and_averaged_have_a_quantizer_each(net: nn.Module, images: Tensor) -> None:
    made = Q.insert_residual_quantizers(net, images)
    assert list(Q.residual_quantizers(made)) == [
        "blocks.0.residual_quantizers.of_conv2",
        "blocks.0.residual_quantizers.of_x",
        "blocks.1.residual_quantizers.of_conv2",
        "blocks.1.residual_quantizers.of_x",
        # What the pool averages is a factor of the product, too: both read what is quantized.
        "gate.residual_quantizers.of_x",
        "residual_quantizers.of_dropout",
    ]
    assert made.state_dict().keys() == net.state_dict().keys()
    assert not Q.residual_quantizers(net)


def test_they_do_nothing_until_they_are_calibrated(net: nn.Module, images: Tensor) -> None:
    made = Q.insert_residual_quantizers(net, images)
    assert torch.equal(made(images), net(images))
    # Dropout, which is called in the network's own code, is still there in training.
    made.train()
    assert not torch.equal(made(images), made(images))


def test_values_are_rounded_to_the_grid(images: Tensor) -> None:
    quantizer = Q.ResidualQuantizer()
    quantizer.set_grid(Q.ResidualGrid(0.02, 100, 0, 255))
    expected = ((images / 0.02).round() + 100).clamp(0, 255).sub(100) * 0.02
    assert torch.allclose(quantizer(images), expected, atol=1e-6)
    half = quantizer(images.half())
    assert half.dtype == torch.float16
    for trained in (False, True):
        broken = quantizer(torch.tensor([float("nan"), 0.03, 99.0], requires_grad=trained))
        assert broken[0].isnan()
        assert broken[1:].tolist() == pytest.approx([0.04, 3.1])


@pytest.mark.parametrize("grid", [(0.0373, 100, 0, 255), (0.25, 0, -128, 127), (1.7e-3, 0, 0, 255)])
def test_without_gradients_the_same_comes_out_to_the_last_bit(grid: tuple[float, int, int, int]) -> None:
    quantizer = Q.ResidualQuantizer()
    quantizer.set_grid(Q.ResidualGrid(float(torch.tensor(grid[0])), *grid[1:]))
    ties = (torch.arange(-300, 300) + 0.5) * quantizer.scale
    x = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), 5 * torch.randn(300_000), torch.tensor([1e30, -1e30])])
    for values in (x, x[:1000], x[:300_000].view(3, 4, 250, 100).contiguous(memory_format=torch.channels_last)):
        expected = quantizer(values.clone().requires_grad_())
        # Integers of 64 bits, in which torch has them, end before 1e30.
        within = values.abs() < 1e10
        assert torch.equal(quantizer(values)[within], expected[within])


def test_gradients_pass_within_the_range_and_nowhere_else() -> None:
    quantizer = Q.ResidualQuantizer()
    quantizer.set_grid(Q.ResidualGrid(0.5, 10, 0, 255))
    x = torch.tensor([-7.0, -5.0, 0.3, 122.5, 124.0], requires_grad=True)
    quantizer(x).backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_unsigned_where_nothing_is_negative_else_with_a_zero_point(net: nn.Module, images: Tensor) -> None:
    made = Q.residual_quantizers(quantized(net, images, scheme=Q.LSQ()))  # steps are learned: none is shared
    after_relu, after_conv = made["blocks.1.residual_quantizers.of_x"].grid, made["blocks.1.residual_quantizers.of_conv2"].grid
    assert after_relu[1:] == (0, 0, 255)
    assert (after_conv.low, after_conv.high) == (0, 255)
    assert 0 < after_conv.zero_point < 255


def test_signed_or_power_of_two_schemes_have_no_zero_points(net: nn.Module, images: Tensor) -> None:
    for scheme in (Q.Linear(activations="signed"), Q.Linear(power_of_two=True)):
        grid = Q.residual_quantizers(quantized(net, images, scheme=scheme))["blocks.1.residual_quantizers.of_conv2"].grid
        assert grid[1:] == (0, -128, 127)
    assert torch.tensor(grid.scale).log2() == torch.tensor(grid.scale).log2().round()


def test_a_layer_of_8_bits_reads_what_is_quantized_on_its_own_grid(net: nn.Module, images: Tensor) -> None:
    made = quantized(net, images)
    layer, quantizer = made.blocks[1].conv1, Q.residual_quantizers(made)["blocks.1.residual_quantizers.of_x"]
    assert quantizer.scale == float(layer.activation_scale[7])
    x = quantizer(images.abs())
    assert torch.allclose(layer.scheme.activation(layer, x, 8), x, rtol=1e-6)


def test_a_layers_grid_that_does_not_cover_the_tensor_is_not_taken(net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        net.stem.weight[0] *= 30
        net.stem.weight[0].abs_()
        # The layer hardly looks at the channel whose values are large, and clips them.
        net.blocks[0].conv1.weight[:, 0] *= 1e-6
    made = quantized(net, images.abs(), scheme=Q.Linear(calibration="output"))
    layer, quantizer = made.blocks[0].conv1, Q.residual_quantizers(made)["blocks.0.residual_quantizers.of_x"]
    reaches = quantizer.scale * (quantizer.high - quantizer.zero_point)
    assert reaches > 3 * 127 * float(layer.activation_scale[7])
    # DoReFa's grid ends at 1, whatever the values are.
    made = quantized(net, images.abs(), scheme=Q.DoReFa())
    grid = Q.residual_quantizers(made)["blocks.0.residual_quantizers.of_x"].grid
    assert grid.scale * (grid.high - grid.zero_point) == pytest.approx(reaches, rel=0.1)


def test_they_change_what_the_network_computes_by_little(net: nn.Module, images: Tensor) -> None:
    made, without = quantized(net, images), Q.quantize(net, Q.BitPolicy.uniform(net, w=8, a=8), calibrate=images)
    expected = net(images)
    assert not torch.equal(made(images), without(images))
    assert (made(images) - expected).norm() < 0.05 * expected.norm()


def test_state_copies_pickles_and_places_bring_them_back(net: nn.Module, images: Tensor) -> None:
    made = quantized(net, images, bits=4)
    expected = made(images)
    state = Q.quantizer_state(made)
    assert state["blocks.0.residual_quantizers.of_x.high"] == 127
    assert torch.equal(Q.copy_network(made)(images), expected)
    assert torch.equal(copy.deepcopy(made)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(made))(images), expected)
    again = Q.insert_residual_quantizers(net, places=Q.residual_places(made))
    restored = Q.quantize(again, Q.get_policy(made), state=state)
    assert torch.equal(restored(images), expected)
    damaged = {**state, "blocks.0.residual_quantizers.of_x.scale": torch.tensor(-1.0)}
    with pytest.raises(ValueError, match="of_x has scale -1"):
        Q.load_quantizer_state(restored, damaged)
    assert torch.equal(restored(images), expected)


def test_the_float_copy_has_none_unless_it_is_asked_to(net: nn.Module, images: Tensor) -> None:
    made = quantized(net, images)
    plain = Q.float_copy(made)
    assert not Q.residual_quantizers(plain)
    assert type(plain) is Net
    assert torch.equal(plain(images), net(images))
    kept = Q.float_copy(made, keep_residuals=True)
    exported = torch.export.export(kept, (images[:1],))
    found = [node.args[1:] for node in exported.graph.nodes if "fake_quantize_per_tensor_affine" in str(node.target)]
    grids = {tuple(quantizer.grid) for quantizer in Q.residual_quantizers(made).values()}
    assert len(found) == 6
    assert set(found) == grids


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_can_write_them_down(net: nn.Module, images: Tensor) -> None:
    made = pickle.loads(pickle.dumps(quantized(net, images)))
    expected = made(images)
    # Nothing of ours may be new to the compiler, after a pickle either.
    assert torch.allclose(torch.compile(made, backend="eager", fullgraph=True)(images), expected, atol=1e-6)
    plain = Q.float_copy(made, keep_residuals=True)
    assert torch.allclose(fx.symbolic_trace(plain)(images), plain(images), atol=1e-6)


def test_they_train(net: nn.Module, images: Tensor) -> None:
    made = quantized(net, images, bits=4).train()
    made(images).square().sum().backward()
    assert made.stem.weight.grad.abs().sum() > 0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.conv(x) + x
        return self.conv(x)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Adding()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.inner(y)
        self.inner(y)
        return self.conv(y)


class Adding(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y.add_(y.exp())


@pytest.mark.parametrize(("network", "match"), [(Counting(), "Counting.*torch.fx.*its own code"), (Overwriting(), "in place")])
def test_networks_that_cannot_be_followed_are_refused_in_a_sentence(network: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Q.insert_residual_quantizers(network, torch.ones(2, 3, 4, 4))


def test_what_calibration_does_not_reach_is_named(net: nn.Module, images: Tensor) -> None:
    inserted = Q.insert_residual_quantizers(net, images)
    policy = Q.BitPolicy.uniform(net, w=None, a=None)
    with pytest.raises(ValueError, match="give `calibrate`"):
        Q.quantize(inserted, policy)
    inserted.blocks[1].residual_quantizers.add_module("of_nothing", Q.ResidualQuantizer())
    with pytest.raises(ValueError, match="of_nothing' was never reached"):
        Q.quantize(inserted, policy, calibrate=images)


def test_constants_and_masks_are_added_as_they_are() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)
            self.bias = nn.Parameter(torch.zeros(3, 5))
            self.register_buffer("mask", torch.zeros(2, 3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + self.bias) + self.mask + 3

    made = Q.insert_residual_quantizers(Other().eval(), torch.randn(2, 3, 5))
    assert not Q.residual_quantizers(made)
