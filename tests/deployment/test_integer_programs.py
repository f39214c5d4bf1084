"""A quantized network becomes a program of integers that computes what the fake-quantized network does.

Layer by layer, given the same integers before it, each integer is equal, but for ties and the last digits of float32 ("own
rounding"), which are rare and one step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import quantizers as Q
from haq import networks
from haq.deployment.graph import Graph, capture
from haq.deployment.interpreter import Comparison, compare, run
from haq.deployment.lowering import integer_activations, integer_weights, lower
from haq.deployment.program import (
    Codes,
    Convolution,
    Epilogue,
    Fixed,
    Float,
    FloatConvolution,
    Lookup,
    Move,
    Pool,
    Product,
    Program,
    Quantize,
    Sum,
    read_by,
    written_by,
)
from hw_models.tvm_cpu.conv import reference, zero_point
from tests.conftest import images, small_network

Bits = tuple[int | None, int | None]


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that have seen something."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
    return network.eval()


def deploy(
    network: nn.Module, policy: Bits | Mapping[str, Bits], x: Tensor, scheme: Any = "linear"
) -> tuple[Program, Comparison]:
    if isinstance(policy, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), policy)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme)
    program = lower(capture(quantized, x), quantized, x)
    check_program(program)
    found = compare(quantized, program, x)
    print(found)
    for result in (found, compare(quantized, program, x.double())):
        assert result.own < max(2, 1e-4 * result.values)
        assert all(layer.own_largest <= 1 for layer in result.layers)
        assert not result.fault
        # Nothing differs but what a tie made, and what lies behind it.
        assert result.own or equal(result)
    return program, found


def check_program(program: Program) -> None:
    """Values are written once, before they are read, and are what their readers take them for."""
    written = {program.input}
    for step in program.steps:
        outputs = written_by(step)
        assert set(read_by(step)) <= written
        assert not set(outputs) & written
        written |= set(outputs)
        represented = [program.values[value].representation for value in (*read_by(step), *outputs)]
        if isinstance(step, Convolution):
            taken = represented[0]
            assert isinstance(taken, Codes)
            assert (taken.bits, taken.signed) == (step.a_bits, step.signed)
            assert step.weights.dtype == np.int8
        elif isinstance(step, Move):
            assert len(set(represented)) == 1
            assert step.index.shape == program.values[step.output].shape
            assert step.index.dtype == np.int32
            assert step.index.max() < sum(np.prod(program.values[name].shape) for name in step.inputs)
        elif isinstance(step, Lookup):
            assert [entries.dtype for entries in step.entries] == [found.dtype for found in represented[1:]]
        elif isinstance(step, Product):
            whole, other = (program.values[name].shape for name in (step.input, step.other))
            assert whole == program.values[outputs[0]].shape
            assert other in (whole, (1, 1, whole[2]), (*whole[:2], 1))
        if not isinstance(step, Quantize | Move | Lookup):
            check_epilogue(program, step.epilogue)
    assert written == set(program.values)
    assert program.values[program.output].representation == Float()


def check_epilogue(program: Program, epilogue: Epilogue) -> None:
    assert epilogue.outputs[0].factor == 1
    assert epilogue.multiplier.dtype == epilogue.offset.dtype == np.float32
    assert epilogue.slope is None or epilogue.table is None
    shape = program.values[epilogue.outputs[0].value].shape
    for residual in epilogue.residuals:
        assert isinstance(program.values[residual.value].representation, Fixed | Codes)
        assert program.values[residual.value].shape == shape
    if epilogue.table is not None:
        assert epilogue.table.start == epilogue.table.segments / 2
        assert epilogue.table.inverse == 2.0 ** round(np.log2(epilogue.table.inverse))
        assert epilogue.table.coefficients.dtype == np.float32
        assert (epilogue.table.coefficients[[0, -1], 2] == 0).all()


def equal(found: Comparison) -> bool:
    return found.different == 0 and found.same_answers == 1


def kinds(program: Program) -> list[str]:
    return [type(step).__name__ for step in program.steps]


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).eval()


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("seed", range(3))
def test_the_default_network_at_mixed_bits(seed: int) -> None:
    network = networks.load().module
    draw = random.Random(seed)
    policy: dict[str, Bits] = {
        name: (draw.randint(1, 8), draw.randint(1, 8)) for name in Q.BitPolicy.uniform(network, w=8, a=8)
    }
    policy |= dict(zip(draw.sample(list(policy), 3), [(None, None), (4, None), (None, 3)], strict=True))
    program, found = deploy(network, policy, torch.rand(8, 1, 28, 28))
    assert program.layers == tuple(policy)
    assert kinds(program).count("FloatConvolution") == 3
    assert found.different < 1e-2 * found.values
    assert found.same_answers == 1


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_the_default_network_at_even_bits(bits: int) -> None:
    program, found = deploy(networks.load().module, (bits, bits), torch.rand(8, 1, 28, 28))
    # Every residual addition, ReLU and batch norm is in a convolution.
    assert kinds(program) == ["Quantize", *["Convolution"] * 13, "Pool", "Convolution"]
    assert sum(len(step.epilogue.residuals) for step in program.steps if isinstance(step, Convolution)) == 3
    assert found.different < 1e-2 * found.values
    assert found.same_answers == 1


@pytest.mark.parametrize(
    ("name", "bits", "scheme"),
    [
        # Small networks are at other bits, and of other schemes, below.
        pytest.param("torchvision:resnet18", (1, 1), "binary", marks=pytest.mark.slow),
        pytest.param("torchvision:resnet18", (8, 8), Q.Linear(calibration="max"), marks=pytest.mark.slow),
        pytest.param("torchvision:resnet18", (3, 2), "lsq", marks=pytest.mark.slow),
        ("timm:mobilenetv2_100", (4, 6), "lsq"),
    ],
)
def test_published_networks(name: str, bits: Bits, scheme: Any) -> None:
    torch.manual_seed(0)
    network = randomised(networks.load(name, pretrained=False).module)
    x = torch.randn(2, 3, 32, 32)
    # In a network of random weights one tie makes thousands of integers differ behind it: how many is not looked at.
    program, _ = deploy(network, bits, x, scheme)
    assert not {"Sum", "FloatConvolution"} & set(kinds(program))
    if name.endswith("resnet18"):
        assert sum(len(step.epilogue.residuals) for step in program.steps if isinstance(step, Convolution)) == 8


# ------------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("lsq", (2, 2)),
        ("lsq", (4, 3)),
        (Q.LSQ(per_channel=False), (8, 8)),
        ("pact", (1, 1)),
        ("pact", (3, 4)),
        ("pact", (7, 8)),
        ("dorefa", (2, 2)),
        ("binary", (1, 1)),
        (Q.Binary(scaling="xnor"), (1, 1)),
        (Q.Binary(scaling="xnor"), (1, None)),
        (Q.Linear(power_of_two=True), (4, 4)),
        ("linear", (1, 1)),
        ("lsqplus", (3, None)),
    ],
)
def test_schemes(scheme: Any, bits: Bits) -> None:
    _, found = deploy(small_network(), bits, images(32), scheme)
    assert found.different <= 2
    assert found.output_difference < 1e-2
    assert found.same_answers == 1


def test_signed_inputs_and_padding_of_signs() -> None:
    torch.manual_seed(1)
    network = randomised(
        sequence(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 5, padding=2))
    )
    for scheme, bits in [("linear", (1, 1)), ("linear", (4, 2)), ("lsq", (2, 2)), ("binary", (1, 1)), ("pact", (2, 1))]:
        program, found = deploy(network, bits, torch.randn(4, 3, 9, 9), scheme)
        assert found.different <= 2
        assert all(step.signed for step in program.steps if isinstance(step, Convolution))


def test_integer_weights_are_the_layer_s() -> None:
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(4, 4, 8, 8)
    for scheme in ("linear", "lsq", "dorefa", "binary"):
        first = {"lsq": 2}.get(scheme, 1)
        last = {"dorefa": 7, "binary": 1}.get(scheme, 8)
        quantized = Q.quantize(network, {"0": (first, first)}, calibrate=x, scheme=scheme)
        for bits in range(first, last + 1):
            Q.set_policy(quantized, {"0": (bits, bits)})
            layer: Any = quantized[0]  # type: ignore[index]
            q, scale, stored = integer_weights("0", layer)
            real = layer.quantized_weight().detach().numpy()
            made = q.astype(np.float32) * scale.astype(np.float32)[:, None, None, None]
            if scheme == "dorefa" and bits > 1:
                assert stored == bits + 1
                np.testing.assert_allclose(made, real, atol=3e-7)
            else:
                assert stored == bits
                np.testing.assert_array_equal(made, real)
            codes = integer_activations("0", layer)
            entered = layer.scheme.activation(layer, x, bits).detach() / codes.scale
            assert torch.allclose(entered, entered.round(), atol=1e-4)
            low, high = codes.range
            assert low <= float(entered.round().min())
            assert float(entered.round().max()) <= high


# -------------------------------------------------------------------------------------------------- operations between


class Shared(nn.Module):
    """One layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.twice(x)) + x
        return torch.relu(self.twice(x)).mean((2, 3))


class Preactivation(nn.Module):
    """Batch norms before convolutions, a stream that several read, an addition to itself, an input that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(self.act(norm(x))) + x
            x = x + x
        return x


class InPlace(nn.Module):
    """The shortcut is what the ReLU made of it, because it works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x.relu_())
        y += x
        return y


def test_a_layer_that_is_called_twice() -> None:
    torch.manual_seed(0)
    program, found = deploy(Shared().eval(), (4, 4), torch.rand(4, 2, 8, 8))
    assert program.layers == ("first", "twice", "twice@2")
    assert [layer.layer for layer in found.layers] == ["first", "twice", "twice@2"]
    assert equal(found)


def test_batch_norms_before_convolutions() -> None:
    network = randomised(Preactivation())
    program, found = deploy(network, (4, 4), torch.randn(4, 4, 6, 6))
    assert found.different <= 2
    assert "Sum" in kinds(program)


def test_in_place_operations() -> None:
    torch.manual_seed(0)
    assert equal(deploy(InPlace().eval(), (4, 4), torch.randn(4, 3, 6, 6))[1])


def test_a_flattened_map_permutes_the_columns() -> None:
    torch.manual_seed(0)
    network = sequence(
        nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(), nn.ReLU(), nn.Dropout(), nn.Linear(96, 8), nn.BatchNorm1d(8), nn.ReLU6()
    )
    network.append(nn.Linear(8, 5))
    program, found = deploy(randomised(network), (4, 4), torch.randn(8, 2, 4, 4))
    assert kinds(program) == ["Quantize", *["Convolution"] * 3]
    assert equal(found)
    assert all(deploy(network, bits, torch.randn(8, 2, 4, 4))[1].same_answers == 1 for bits in [(4, None), (None, None)])


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(3),
    ],
)
def test_pools(pool: nn.Module) -> None:
    torch.manual_seed(0)
    network = sequence(pool, nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 4, 1), pool, nn.ReLU())
    program, found = deploy(network, (4, 3), torch.randn(4, 3, 36, 36).mul(2))
    assert found.different <= 2
    if isinstance(pool, nn.MaxPool2d):
        first, second, third = (step for step in program.steps if isinstance(step, Pool))
        # The codes of the first layer are pooled; before the output and the ReLU there is no one code.
        assert [isinstance(program.values[p.input].representation, Codes) for p in (first, second, third)] == [
            True,
            True,
            False,
        ]


def test_an_average_of_clipped_values_is_an_exact_sum() -> None:
    # So many of the largest integers that 32 bits would overflow, were they not given fewer bits.
    network = sequence(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 1))
    x = torch.rand(2, 1, 64, 64)
    quantized = Q.quantize(network, {"0": (8, 8), "2": (8, 8)}, calibrate=x)
    program = lower(capture(quantized, x), quantized, x)
    (pool,) = (step for step in program.steps if isinstance(step, Pool))
    fixed = program.values[pool.input].representation
    assert isinstance(fixed, Fixed)
    assert fixed.limit * 64 * 64 < 2**31
    assert equal(compare(quantized, program, x))


def test_values_beyond_the_calibrated_are_clipped_and_not_wrapped() -> None:
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1))
    x = torch.rand(2, 1, 4, 4)
    quantized = Q.quantize(network, {"0": (8, None)}, calibrate=x)
    program = lower(capture(quantized, x), quantized, x)
    normal, _ = run(program, x.numpy())
    huge, _ = run(program, x.numpy() * 1e6)
    assert (np.sign(huge) == np.sign(normal)).all()
    assert np.isfinite(huge).all()


class Padding(nn.Conv2d):
    """Pads its own input, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize("bits", [(4, 4), (4, 1), (None, None)])
def test_a_layer_that_pads_its_input(bits: Bits) -> None:
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(3, 4, 3), Padding(4, 5, 3, 2, padding=1), nn.ReLU(), Padding(5, 5, 3, 2))
    assert equal(deploy(network, bits, torch.randn(4, 3, 12, 12))[1])


def test_maps_come_out_with_their_channels_first() -> None:
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(3, 5, 3))
    x = torch.randn(2, 3, 6, 7)
    quantized = Q.quantize(network, {"0": (8, 8)}, calibrate=x)
    outputs, entered = run(lower(capture(quantized, x), quantized, x), x.numpy())
    assert torch.allclose(torch.from_numpy(outputs), quantized(x), atol=1e-5)
    assert entered["0"].shape == x.shape


def test_a_convolution_step_is_the_kernels_one() -> None:
    """The sums are those of the kernels' reference, from the bytes that the step before wrote."""
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(4, 6, 3, 2, padding="valid", groups=2), nn.Conv2d(6, 6, 3, padding="same", dilation=2))
    x = torch.randn(1, 4, 9, 9)
    quantized = Q.quantize(network, {"0": (3, 4), "1": (5, 1)}, calibrate=x)
    program = lower(capture(quantized, x), quantized, x)
    _, entered = run(program, x.numpy())
    first, second = (step for step in program.steps if isinstance(step, Convolution))
    assert zero_point(first.a_bits, first.signed) == 128
    sums = reference(first.conv, first.weights, entered["0"].transpose(0, 2, 3, 1))
    v = sums * first.epilogue.multiplier + first.epilogue.offset
    np.testing.assert_array_equal(np.where(v >= 0, 1, -1).transpose(0, 3, 1, 2), entered["1"])
    sums = reference(second.conv, second.weights, entered["1"].transpose(0, 2, 3, 1))
    outputs, _ = run(program, x.numpy())
    v = sums * second.epilogue.multiplier + second.epilogue.offset
    np.testing.assert_allclose(v.transpose(0, 3, 1, 2), outputs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- refusals


def graph_of(network: nn.Module, x: Tensor, scheme: str = "linear", bits: Bits = (4, 4)) -> Graph:
    policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    return capture(Q.quantize(network, policy, calibrate=x, scheme=scheme), x)


class Odd(nn.Module):
    """One layer, and something before or behind it."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.before, self.after = before or (lambda x: x), after or (lambda x: x)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.layer(self.before(x)))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (sequence(nn.Conv2d(3, 3, 1), nn.Softmax(1)), r"layer '1' \(Softmax\) can't be deployed: operation aten.softmax"),
        (Odd(after=lambda x: x.mean(1)), "other dimensions than height and width"),
        (Odd(after=lambda x: (x, x)), "2 outputs"),
        (Odd(after=lambda x: x if x.sum() > 0 else -x), "Odd can't be deployed"),
    ],
)
def test_operations_that_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_of(network.eval(), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("scheme", "bits", "message"),
    [
        ("kmeans", (4, 4), "layer 'stem' can't be deployed: .*'kmeans'"),
        ("lsqplus", (4, 4), "layer 'stem' can't be deployed: activations of scheme 'lsqplus' have an offset"),
        ("pact", (8, 4), "layer 'stem' can't be deployed: weights of 8 bits in scheme 'pact' are odd integers of 9 bits"),
    ],
)
def test_schemes_that_are_refused(scheme: str, bits: Bits, message: str) -> None:
    network, x = small_network(), images(8)
    quantized = Q.quantize(network, dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits), calibrate=x, scheme=scheme)
    graph = capture(quantized, x)
    with pytest.raises(ValueError, match=message):
        lower(graph, quantized, x)


def test_a_flattened_output_and_a_norm_of_a_flattened_map_move_values() -> None:
    torch.manual_seed(0)
    for after in ((nn.Flatten(),), (nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 4))):
        program, found = deploy(randomised(sequence(nn.Conv2d(3, 3, 1), *after)), (4, 4), torch.rand(2, 3, 4, 4))
        assert kinds(program).count("Move") == 1
        assert equal(found)


def test_images_of_another_size_are_refused() -> None:
    network, x = small_network(), images(4)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=x)
    program = lower(capture(quantized, x), quantized, x)
    with pytest.raises(ValueError, match=r"takes images \(N, 1, 8, 8\), not"):
        run(program, np.zeros((1, 1, 9, 9), np.float32))


def test_a_program_has_integers_only_but_at_its_ends() -> None:
    program, _ = deploy(networks.load().module, (4, 4), torch.rand(4, 1, 28, 28))
    floats = [name for name, value in program.values.items() if value.representation == Float()]
    assert floats == [program.input, program.output]
    assert not any(isinstance(step, FloatConvolution | Sum) for step in program.steps)
