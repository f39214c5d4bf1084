"""Residual quantizers: where they are put, what they compute, and that they are a part of the quantized network."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantizers as Q


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, skip=None):
        identity = x
        if skip is not None:
            identity = skip
        out = self.conv2(self.relu(self.conv1(x)))
        out += identity
        return self.relu(out)


class Gate(nn.Module):
    """Squeeze and excitation, whose pool is called two modules below the product."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x)


class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.gate = Gate(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.gate(self.blocks(self.stem(x)))
        x = F.dropout(x, 0.5, self.training)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(net, images, bits=8, **options):
    inserted = Q.insert_residual_quantizers(net, images)
    return Q.quantize(inserted, Q.BitPolicy.uniform(net, w=bits, a=bits), calibrate=images, **options)


def test_tensors_that_are_added_and_averaged_have_a_quantizer_each(net, images):
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


def test_they_do_nothing_until_they_are_calibrated(net, images):
    made = Q.insert_residual_quantizers(net, images)
    assert torch.equal(made(images), net(images))
    # Dropout, which is called in the network's own code, is still there in training.
    made.train()
    assert not torch.equal(made(images), made(images))


def test_values_are_rounded_to_the_grid(images):
    quantizer = Q.ResidualQuantizer()
    quantizer.set_grid(Q.ResidualGrid(0.02, 100, 0, 255))
    expected = ((images / 0.02).round() + 100).clamp(0, 255).sub(100) * 0.02
    assert torch.allclose(quantizer(images), expected, atol=1e-6)
    half = quantizer(images.half())
    assert half.dtype == torch.float16
    broken = quantizer(torch.tensor([float("nan"), float("inf"), 0.03]))
    assert broken[0].isnan()
    assert broken[1:].tolist() == [float("inf"), pytest.approx(0.04, abs=1e-6)]


def test_gradients_pass_within_the_range_and_nowhere_else():
    quantizer = Q.ResidualQuantizer()
    quantizer.set_grid(Q.ResidualGrid(0.5, 10, 0, 255))
    x = torch.tensor([-7.0, -5.0, 0.3, 122.5, 124.0], requires_grad=True)
    quantizer(x).backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_unsigned_where_nothing_is_negative_else_with_a_zero_point(net, images):
    made = Q.residual_quantizers(quantized(net, images, scheme=Q.LSQ()))  # steps are learned: none is shared
    after_relu, after_conv = made["blocks.1.residual_quantizers.of_x"].grid, made["blocks.1.residual_quantizers.of_conv2"].grid
    assert after_relu[1:] == (0, 0, 255)
    assert (after_conv.low, after_conv.high) == (0, 255)
    assert 0 < after_conv.zero_point < 255


def test_signed_or_power_of_two_schemes_have_no_zero_points(net, images):
    for scheme in (Q.Linear(activations="signed"), Q.Linear(power_of_two=True)):
        grid = Q.residual_quantizers(quantized(net, images, scheme=scheme))["blocks.1.residual_quantizers.of_conv2"].grid
        assert grid[1:] == (0, -128, 127)
    assert torch.tensor(grid.scale).log2() == torch.tensor(grid.scale).log2().round()


def test_a_layer_of_8_bits_reads_what_is_quantized_on_its_own_grid(net, images):
    made = quantized(net, images)
    layer, quantizer = made.blocks[1].conv1, Q.residual_quantizers(made)["blocks.1.residual_quantizers.of_x"]
    assert quantizer.scale == float(layer.activation_scale[7])
    x = quantizer(images.abs())
    assert torch.allclose(layer.scheme.activation(layer, x, 8), x, rtol=1e-6)


def test_they_change_what_the_network_computes_by_little(net, images):
    made, without = quantized(net, images), Q.quantize(net, Q.BitPolicy.uniform(net, w=8, a=8), calibrate=images)
    expected = net(images)
    assert not torch.equal(made(images), without(images))
    assert (made(images) - expected).norm() < 0.05 * expected.norm()


def test_state_copies_pickles_and_places_bring_them_back(net, images):
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


def test_the_float_copy_has_none_unless_it_is_asked_to(net, images):
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


def test_they_train(net, images):
    made = quantized(net, images, bits=4).train()
    made(images).square().sum().backward()
    assert made.stem.weight.grad.abs().sum() > 0


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.sum() > 0:
            return self.conv(x) + x
        return self.conv(x)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Adding()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        self.inner(y)
        self.inner(y)
        return self.conv(y)


class Adding(nn.Module):
    def forward(self, y):
        return y.add_(y.exp())


@pytest.mark.parametrize(("network", "match"), [(Counting(), "Counting.*torch.fx.*its own code"), (Overwriting(), "in place")])
def test_networks_that_cannot_be_followed_are_refused_in_a_sentence(network, match):
    with pytest.raises(ValueError, match=match):
        Q.insert_residual_quantizers(network, torch.ones(2, 3, 4, 4))


def test_what_calibration_does_not_reach_is_named(net, images):
    inserted = Q.insert_residual_quantizers(net, images)
    policy = Q.BitPolicy.uniform(net, w=None, a=None)
    with pytest.raises(ValueError, match="give `calibrate`"):
        Q.quantize(inserted, policy)
    inserted.blocks[1].residual_quantizers.add_module("of_nothing", Q.ResidualQuantizer())
    with pytest.raises(ValueError, match="of_nothing' was never reached"):
        Q.quantize(inserted, policy, calibrate=images)


def test_constants_and_masks_are_added_as_they_are():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)
            self.bias = nn.Parameter(torch.zeros(3, 5))
            self.register_buffer("mask", torch.zeros(2, 3, 5))

        def forward(self, x):
            return self.conv(x + self.bias) + self.mask + 3

    made = Q.insert_residual_quantizers(Other().eval(), torch.randn(2, 3, 5))
    assert not Q.residual_quantizers(made)
