"""Every kind of operation in integers: programs compute what the fake-quantized network does, but for rounding at ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.graph import capture
from haq.deployment.interpreter import apply_table, check
from haq.deployment.lowering import integer_activations, lower
from haq.deployment.nodes import Node
from haq.deployment.program import Codes, Convolution, Fixed, Float, FloatConvolution, Lookup, Move, Pool, Product, Program
from haq.deployment.tables import make_table
from tests.deployment.test_integer_programs import check_program, deploy, kinds, randomised, sequence


class Around(nn.Module):
    """Two layers, and an operation between them."""

    def __init__(self, operation: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.operation = operation
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.norm(self.first(x))))


IMAGES = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def around(operation: Callable[[Tensor], Tensor], channels: int = 4, bits: Any = (4, 4), scheme: Any = "linear") -> Program:
    program, found = deploy(randomised(Around(operation, channels)), bits, IMAGES, scheme)
    assert found.different <= 3
    assert found.same_answers == 1
    return program


# ---------------------------------------------------------------------------------------------- functions of each value

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.5),
    "selu": F.selu,
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 2.0),
    "square": lambda x: x**2,
    "abs": torch.abs,
    "relu6 by hand": lambda x: x * F.relu6(x + 3) / 6,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_in_the_epilogue_of_the_layer_before(name: str) -> None:
    program = around(FUNCTIONS[name])
    assert kinds(program) == ["Quantize", "Convolution", "Convolution"]
    assert program.steps[1].epilogue.table is not None


@pytest.mark.parametrize("bits", [(8, 8), (1, 1), (16, 16), (None, None), (4, None)])
def test_functions_at_other_widths(bits: Any) -> None:
    network = randomised(Around(F.silu))
    quantized = Q.quantize(network, {"first": bits, "last": bits}, calibrate=IMAGES)
    program = lower(capture(quantized, IMAGES), quantized, IMAGES)
    check(quantized, program, IMAGES)


@pytest.mark.parametrize("function", ["silu", "hardswish", "tanh", "gelu", "mish", "softplus", "elu", "erf", "exp"])
@pytest.mark.parametrize("largest", [0.01, 1.0, 7.0, 60.0])
def test_a_table_is_as_close_as_float32(function: str, largest: float) -> None:
    if function == "exp" and largest > 10:
        largest = 10.0
    node = Node("f", "function", ("x",), (1, 1, 1), function=function)
    table = make_table(node, largest, 8.0, 0.5)
    x = np.linspace(-largest, largest, 5001, dtype=np.float32)
    expected = getattr(torch.ops.aten, function)(torch.from_numpy(x).double()).numpy()
    error = np.abs(apply_table(table, x) * 0.5 - expected).max()
    assert error <= 3e-7 * np.abs(expected).max() + 4e-8
    # Beyond what it was made for a function goes on as it ends.
    if function in ("silu", "hardswish", "gelu", "mish", "softplus"):
        x = np.array([-1e4, 1e4], np.float32)
        np.testing.assert_allclose(apply_table(table, x)[0], 0, atol=1e-2)


def test_what_has_no_table_is_refused_with_its_layer() -> None:
    network = randomised(Around(lambda x: F.hardshrink(x, 0.3)))
    quantized = Q.quantize(network, {"first": (4, 4), "last": (4, 4)}, calibrate=IMAGES)
    with pytest.raises(ValueError, match="hardshrink has no table from -.* to .* that is closer to it than"):
        lower(capture(quantized, IMAGES), quantized, IMAGES)


def test_slopes_of_negative_values() -> None:
    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU(4)
            self.act.weight.data = torch.tensor([0.1, -0.5, 0.0, 1.5])

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    program = around(Slopes())
    assert kinds(program) == ["Quantize", "Convolution", "Convolution"]
    np.testing.assert_allclose(program.steps[1].epilogue.slope, [0.1, -0.5, 0.0, 1.5], rtol=1e-6)
    around(lambda x: F.leaky_relu(x, 0.2).flatten(2).unflatten(2, (6, 8)))


def test_a_function_comes_behind_an_addition_and_before_a_clip() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = F.silu(x + self.norm(self.b(x))).clamp(-0.1, 1.0)
            return self.c(self.norm(x) * 2 + 1)

    program, _ = deploy(randomised(Residual()), (4, 4), IMAGES)
    assert kinds(program) == ["Quantize", "Convolution", "Convolution", "Sum", "Convolution"]
    epilogue = program.steps[2].epilogue
    assert epilogue.residuals
    assert epilogue.table is not None
    assert epilogue.low < 0 < epilogue.high < np.inf


# ------------------------------------------------------------------------------------------------------ sums, products


def test_constants_are_in_the_epilogue() -> None:
    program = around(lambda x: (1 - x * 0.5) / 3)
    assert kinds(program) == ["Quantize", "Convolution", "Convolution"]


@pytest.mark.parametrize(
    ("operation", "other"),
    [
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), (1, 1, 4)),
        (lambda x: x.amax((2, 3), keepdim=True) * x, (1, 1, 4)),
        (lambda x: x * x[:, :1].sigmoid(), (6, 8, 1)),
        (lambda x: x * x.tanh(), (6, 8, 4)),
        (lambda x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True), (6, 8, 4)),
        (lambda x: x * x.mean(3, keepdim=True), (6, 8, 4)),
    ],
)
def test_products(operation: Callable[[Tensor], Tensor], other: Any) -> None:
    program = around(operation)
    (product,) = (step for step in program.steps if isinstance(step, Product))
    assert program.values[product.other].shape == other


def test_a_map_that_a_large_pool_and_others_read_has_fine_steps_for_those() -> None:
    """Sums of 32 bits leave few bits for each of many values; squeeze and excitation multiplies the same map."""
    torch.manual_seed(0)
    network = randomised(Around(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()))
    x = torch.randn(2, 3, 40, 40)
    program, found = deploy(network, (8, 8), x)
    fixed = [value.representation for value in program.values.values() if isinstance(value.representation, Fixed)]
    (pool,) = (step for step in program.steps if isinstance(step, Pool))
    (product,) = (step for step in program.steps if isinstance(step, Product))
    coarse, fine = (program.values[step.input].representation for step in (pool, product))
    assert coarse in fixed
    assert coarse.limit * 40 * 40 < 2**31
    assert fine.limit == 2**30
    assert found.own <= 3


def test_sums_of_a_map_and_a_smaller_one_expand_it() -> None:
    program = around(lambda x: F.silu(x + x.mean((2, 3), keepdim=True)) - x[:, 1:2])
    assert kinds(program).count("Move") == 3


# ---------------------------------------------------------------------------------------------------------------- moves


def shuffled(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "cat": (lambda x: torch.cat([x, x.relu()], 1), 8),
    "shuffle": (shuffled, 4),
    "half of a shuffle": (lambda x: shuffled(torch.cat([x[:, 2:], x.relu()], 1)).chunk(2, 1)[1], 3),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 1),
    "reflect": (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), 4),
    "circular": (lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), 4),
    "zeros": (lambda x: F.pad(x, (1, 2, 0, 1, 2, 0)), 6),
    "crop": (lambda x: F.pad(x, (-1, 2, 0, -2)), 4),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), 4),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), 4),
    "transpose": (lambda x: x.transpose(2, 3), 4),
    "five dimensions": (lambda x: x.view(-1, 2, 2, 6, 8).relu().sigmoid().transpose(1, 2).flatten(1, 2), 4),
}


@pytest.mark.parametrize("bits", [(4, 4), (4, 1), (None, None)])
@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str, bits: Any) -> None:
    operation, channels = MOVES[name]
    program = around(operation, channels, bits)
    moves = [step for step in program.steps if isinstance(step, Move)]
    # A chain of any length is one.
    assert len(moves) == 1
    if bits == (4, 1):
        assert isinstance(program.values[moves[0].output].representation, Codes)


def test_zeros_before_a_layer_are_quantized_and_those_of_a_layer_are_not() -> None:
    """One signed bit makes +1 of a zero."""
    torch.manual_seed(0)
    network = sequence(nn.Conv2d(3, 4, 1), nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding=1))
    program, _ = deploy(network, (4, 1), IMAGES)
    (move,) = (step for step in program.steps if isinstance(step, Move))
    assert (move.index == -1).any()
    (last,) = (step for step in program.steps if isinstance(step, Convolution) and step.name == "2")
    assert last.conv.padding == (1, 1)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("bits", [(4, 4), (2, 1), (None, None)])
def test_padding_modes(mode: str, bits: Any) -> None:
    torch.manual_seed(0)
    network = sequence(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=2, padding_mode=mode)
    )
    program, _ = deploy(network, bits, IMAGES)
    assert kinds(program).count("Move") == 2


def test_maps_put_together_have_one_step_and_others_their_own() -> None:
    class Dense(nn.Module):
        """As DenseNet: every norm reads all results before it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            made = [x * 100]
            for layer, norm in zip(self.layers, self.norms, strict=True):
                made.append(layer(norm(torch.cat(made, 1)).relu()))
            return made[-1].mean((2, 3))

    program, found = deploy(randomised(Dense()), (4, 4), IMAGES)
    assert found.same_answers == 1
    steps = {value.representation.step for value in program.values.values() if isinstance(value.representation, Fixed)}
    assert len(steps) == 2
    assert kinds(program).count("Move") == 3


def test_what_follows_a_concatenation_is_done_before_it() -> None:
    """If nothing else reads what is put together: the map that moves is of codes."""

    class Mixed(nn.Module):
        """As MixNet: groups of channels with kernels of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 5, padding=2)
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.a(x).chunk(2, 1)
            x = torch.cat([self.c(second), self.b(first)], 1)
            return self.last(F.silu(self.norm(F.channel_shuffle(x, 2))))

    program, _ = deploy(randomised(Mixed()), (4, 4), IMAGES)
    assert kinds(program) == ["Quantize", "Convolution", *["Move", "Convolution"] * 2, "Move", "Convolution"]
    assert all(isinstance(value.representation, Codes | Float) for value in program.values.values())


def test_a_move_in_each_of_the_codes_that_are_wanted() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = torch.cat([x, x.relu()], 1)
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    policy = {"first": (8, 8), "a": (4, 3), "b": (4, 5)}
    program, _ = deploy(Branches().eval(), policy, IMAGES)
    moves = [program.values[step.output].representation for step in program.steps if isinstance(step, Move)]
    assert sorted(codes.bits for codes in moves if isinstance(codes, Codes)) == [3, 5]


# ------------------------------------------------------------------------------------------------------ pools, resizing


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((4, 5)),
        nn.AdaptiveMaxPool2d(2),
    ],
)
def test_pools(pool: nn.Module) -> None:
    program = around(lambda x: F.silu(pool(x)))
    (step,) = (step for step in program.steps if isinstance(step, Pool))
    assert (step.ranges is None) == isinstance(pool, nn.AdaptiveMaxPool2d)


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_interpolation(align_corners: bool) -> None:
    program = around(lambda x: F.interpolate(x, (9, 5), mode="bilinear", align_corners=align_corners).relu())
    assert kinds(program) == ["Quantize", "Convolution", "Resize", "Convolution"]


# ------------------------------------------------------------------------------------------- quantizers between layers


def rounded(x: Tensor, scale: float = 0.05, zero_point: int = 100) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)


def test_quantized_sums_and_pools_are_of_codes() -> None:
    program = around(lambda x: F.avg_pool2d(rounded((rounded(x) + rounded(x, 0.02, 0)).relu(), 0.04, 0), 2), scheme="lsq")
    assert not any(isinstance(value.representation, Fixed) for value in program.values.values())
    read = [program.values[step.input].representation for step in program.steps if isinstance(step, Pool)]
    assert read == [Codes(0.04, 8, signed=False)]


def test_residual_quantizers_of_a_whole_network() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(F.adaptive_avg_pool2d((x + self.b(x)).relu(), 1))

    torch.manual_seed(0)
    program, found = deploy(Q.insert_residual_quantizers(Residual().eval(), IMAGES), (4, 4), IMAGES, "lsq")
    assert found.same_answers == 1
    assert not any(isinstance(value.representation, Fixed) for value in program.values.values())


@pytest.mark.parametrize(("low", "high", "zero_point"), [(0, 255, 0), (-128, 127, 0), (-127, 127, 0), (-128, 127, 11)])
def test_a_function_of_codes_is_looked_up(low: int, high: int, zero_point: int) -> None:
    program = around(
        lambda x: F.silu(torch.fake_quantize_per_tensor_affine(x, 0.05, zero_point, low, high)).clamp(max=2) * 3 + x
    )
    (lookup,) = (step for step in program.steps if isinstance(step, Lookup))
    assert [entries.shape for entries in lookup.entries] == [(256,)]


def test_integers_that_a_quantizer_and_a_layer_share_are_written_once() -> None:
    class Shared(Around):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x)).relu()
            return self.last(x) + torch.cat([rounded(x, self.scale, 0), rounded(x, self.scale, 0)[:, :1]], 1)

    network: Any = randomised(Shared(lambda x: x))
    layer = Q.quant_layers(Q.quantize(network, {"first": (8, 8), "last": (8, 8)}, calibrate=IMAGES))["last"]
    network.scale = integer_activations("last", layer).scale
    program, _ = deploy(network, (8, 8), IMAGES)
    codes = [value.representation for value in program.values.values() if isinstance(value.representation, Codes)]
    assert sum(found.scale == network.scale for found in codes) == 1


def test_other_things_read_a_quantizer_too() -> None:
    """Layers with another scale, layers in float, moves next to what isn't quantized."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            q = rounded(x)
            return (self.a(q) + q).relu() + self.b(torch.cat([q, x.tanh()], 1)) + F.max_pool2d(q, 3, 1, 1)

    torch.manual_seed(0)
    for policy in ({"first": (8, 8), "a": (4, 4), "b": (4, 4)}, {"first": (8, 8), "a": (None, None), "b": (8, None)}):
        assert deploy(Mixed().eval(), policy, IMAGES)[1].same_answers == 1


# --------------------------------------------------------------------------------------------------------------- signals


def test_signals_and_vectors() -> None:
    torch.manual_seed(0)
    network = sequence(
        nn.Conv1d(2, 4, 5, 2, 1, dilation=2),
        nn.BatchNorm1d(4),
        nn.SiLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 6, 3, padding="same", groups=2, padding_mode="circular"),
        nn.AvgPool1d(3, 2, 1),
        nn.AdaptiveAvgPool1d(3),
        nn.Flatten(),
        nn.Linear(18, 5),
    )
    x = torch.randn(6, 2, 33)
    for bits in [(4, 4), (8, 1), (None, None)]:
        program, found = deploy(randomised(network), bits, x)
        assert found.same_answers == 1
        assert program.input_dims == (1, 2, 33)
        if bits == (4, 4):
            assert [step.conv.kernel for step in program.steps if isinstance(step, Convolution)] == [(1, 5), (1, 3), (1, 1)]
    program, found = deploy(sequence(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3)), (4, 4), torch.randn(6, 7))
    assert program.input_dims == (1, 7)
    assert found.same_answers == 1


def test_results_of_any_shape_come_out_as_torch_has_them() -> None:
    torch.manual_seed(0)
    for behind in (lambda x: x.mean(3), lambda x: x.unflatten(1, (2, 2)), lambda x: x.transpose(1, 3), lambda x: x.amax(2)):
        network = Around(lambda x: x)
        network.last = sequence(nn.Conv2d(4, 4, 1))
        made = Behind(network, behind).eval()
        quantized = Q.quantize(made, Q.BitPolicy.uniform(made, w=8, a=8), calibrate=IMAGES)
        program = lower(capture(quantized, IMAGES), quantized, IMAGES)
        check_program(program)
        check(quantized, program, IMAGES)
        assert program.output_dims == (1, *quantized(IMAGES).shape[1:])


class Behind(nn.Module):
    def __init__(self, network: nn.Module, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.operation = network, operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.network(x))


def test_layers_in_float_take_tables_and_moves_too() -> None:
    program = around(lambda x: F.hardswish(torch.cat([x, x], 1)), 8, (None, None))
    assert sum(isinstance(step, FloatConvolution) for step in program.steps) == 2
