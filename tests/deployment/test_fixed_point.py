"""A program without floats rounds as exact arithmetic does, never overflows, and computes what the float program does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq import networks
from haq.deployment import fixed_point, interpreter
from haq.deployment.fixed_point import (
    Factor,
    FixedEpilogue,
    FixedProgram,
    ImageValue,
    image_integers,
    round_shift,
    run_integers,
    scaled,
)
from haq.deployment.graph import capture
from haq.deployment.interpreter import Comparison
from haq.deployment.lowering import lower
from haq.deployment.program import Codes, Convolution, Fixed, Program
from tests.conftest import images, small_network
from tests.deployment.test_integer_kinds import IMAGES, Around
from tests.deployment.test_integer_programs import randomised

NUMBERS = st.integers(-(2**62) + 1, 2**62 - 1)
INT32 = st.integers(-(2**31) + 1, 2**31 - 1)


def half_even(number: Fraction) -> int:
    return round(number)  # Python rounds a Fraction's ties to even


def integers(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


# ----------------------------------------------------------------------------------------------------- exact arithmetic


@given(NUMBERS, st.integers(1, 62))
def test_a_shift_rounds_ties_to_even(number: int, shift: int) -> None:
    assert int(round_shift(integers(number), shift)[0]) == half_even(Fraction(number, 2**shift))


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_ties_of_a_shift(number: int, shift: int) -> None:
    tie = (2 * number + 1) << (shift - 1)
    assert int(round_shift(integers(tie), shift)[0]) == half_even(Fraction(2 * number + 1, 2)) == 2 * round((number + 0.5) / 2)


@given(NUMBERS, INT32, st.integers(32, 93))
def test_a_product_is_rounded_once(number: int, factor: int, shift: int) -> None:
    assert int(scaled(integers(number), factor, shift)[0]) == half_even(Fraction(number * factor, 2**shift))


@given(st.integers(-(2**20), 2**20), st.integers(33, 60), st.sampled_from([-1, 0, 1]))
def test_ties_of_a_product(number: int, shift: int, beside: int) -> None:
    """A tie, and what is one in the last digit beside it."""
    odd = (2 * number + 1) << (shift - 21)
    value, factor = odd, 2**20
    assert int(scaled(integers(value), factor, shift)[0]) == half_even(Fraction(value * factor, 2**shift))
    value = odd + beside
    assert int(scaled(integers(value), factor, shift)[0]) == half_even(Fraction(value * factor, 2**shift))


@given(st.floats(1e-30, 1e30))
def test_a_factor_has_31_digits(number: float) -> None:
    factor = Factor.of(number)
    assert 2**30 <= factor.mantissa < 2**31
    assert abs(Fraction(factor.mantissa) / Fraction(2) ** factor.shift / Fraction(number) - 1) <= Fraction(1, 2**31)


@settings(max_examples=300)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(2.0**-24, 2.0**12),
    st.sampled_from([(0, 255), (-128, 127), (0, 1), (-37, 218), (-(2**30), 2**30)]),
)
def test_an_image_s_numbers_are_rounded_exactly(x: float, scale: float, bounds: tuple[int, int]) -> None:
    factor = Factor.of(1 / scale)
    exact = half_even(Fraction(x) * factor.mantissa / Fraction(2) ** factor.shift)
    expected = min(max(exact, bounds[0]), bounds[1])
    assert int(image_integers(np.array([x], np.float32), ImageValue("x", factor, *bounds))[0]) == expected


def test_ties_of_an_image_are_those_of_torch_where_the_scale_is_a_power_of_two() -> None:
    x = torch.arange(-600, 600) / 8
    expected = torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -128, 127) / 0.25
    found = image_integers(x.numpy(), ImageValue("x", Factor.of(4.0), -128, 127))
    assert np.array_equal(found, expected.numpy())


def test_signs_of_an_image() -> None:
    x = np.array([-1.0, -1e-30, -0.0, 0.0, 1e-30, 2.0], np.float32)
    assert image_integers(x, ImageValue("x", Factor.of(1.0), -1, 1, True)).tolist() == [-1, -1, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------------- programs


def convert(
    network: nn.Module, bits: Any, x: Tensor, scheme: Any = "linear"
) -> tuple[nn.Module, Program, FixedProgram, Comparison]:
    """Quantize, convert and compare: what differs are single roundings."""
    policy: Mapping[str, Any] = bits
    if isinstance(bits, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme).eval()
    program = lower(capture(quantized, x), quantized, x)
    fixed = fixed_point.fixed_point(program)
    found = fixed_point.compare(quantized, program, fixed, x)
    assert not found.fault
    assert found.own <= max(2, 2e-5 * found.values)
    assert all(layer.own_largest <= 2 for layer in found.layers)
    return quantized, program, fixed, found


class Everything(nn.Module):
    """Residual additions, both poolings, a batch norm in front, groups, dilation, a flatten of a map, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
        self.right = nn.Conv2d(12, 12, 3, 1, 2, dilation=2, groups=2)
        self.average = nn.AvgPool2d(2)
        self.last = nn.Linear(12 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(self.norm(x)))
        x = torch.relu(x + self.left(x))
        x = x + self.right(x)
        return self.last(self.average(x).flatten(1))  # type: ignore[no-any-return]


def everything() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = Everything().train()
    x = torch.randn(32, 3, 16, 16)
    network(x)  # batch statistics
    return network.eval(), x


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (5, 3), (2, 2), (1, 1)])
def test_every_operation(bits: tuple[int, int]) -> None:
    network, x = everything()
    _, _, _, found = convert(network, bits, x)
    assert found.same_answers == 1


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("lsq", (4, 3)),
        ("pact", (3, 4)),
        ("dorefa", (2, 2)),
        ("binary", (1, 1)),
        ("linear-asymmetric", (4, 4)),
        ("linear-asymmetric", (8, 8)),
        (Q.Linear(power_of_two=True), (4, 4)),
    ],
)
def test_schemes(scheme: Any, bits: tuple[int, int]) -> None:
    _, _, _, found = convert(small_network(), bits, images(32), scheme)
    assert found.different <= 2
    assert found.same_answers == 1


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_the_default_network(bits: int) -> None:
    x = torch.rand(8, 1, 28, 28)
    quantized, program, fixed, found = convert(networks.load().module, (bits, bits), x)
    assert found.same_answers == 1
    # Given what went into each layer in PyTorch. Of a whole run this can't be asked: PyTorch adds in another order on every
    # processor, and one number that is rounded otherwise in an early layer changes hundreds later.
    _, before = interpreter.fake_quantized(quantized, x)
    _, entered = fixed_point.run(fixed, x.numpy(), before)
    different = sum(int((entered[name].reshape(q.shape) != q).sum()) for name, q in before.items())
    assert different <= 2e-5 * found.values
    assert len(fixed.image) == 1
    assert set(fixed.values) == set(program.values) - {program.input}
    assert all(isinstance(value.representation, Codes | Fixed) for value in fixed.values.values())


def test_channels_of_very_different_scales_lose_no_digits() -> None:
    """A channel that hardly changes has a multiplier a million times as large as its neighbours."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    norm: Any = network[1]
    norm.running_var.copy_(torch.logspace(-8, 4, 8))
    _, _, _, found = convert(network, (8, 8), torch.randn(8, 2, 12, 12))
    assert found.own == 0


def test_sums_of_the_largest_numbers_do_not_overflow() -> None:
    """All weights and inputs as large as they can be: what int64 gives is what integers without bounds give."""
    network = nn.Sequential(nn.Conv2d(64, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    for layer in (network[0], network[3]):
        layer.weight.data.fill_(1.0)
    x = torch.full((2, 64, 8, 8), 4.0)
    _, _, fixed, _ = convert(network, (8, 8), x)
    for far in (x, x * 1e3, -x * 1e3, x * 1e30, x.mul(0)):
        found, _ = run_integers(fixed, far.numpy())
        assert np.array_equal(found, unbounded(fixed, far.numpy()))
    assert all(bound(fixed, index) < 2**62 for index in range(len(fixed.steps)))


def bound(fixed: FixedProgram, index: int) -> int:
    """The largest that the sum of a step's epilogue may become, in Python's integers."""
    step, epilogue = fixed.steps[index], fixed.epilogues[index]
    largest = max(map(abs, representation_range(fixed, step.input)))
    sums = [largest]
    if isinstance(step, Convolution):
        sums = [int(total) * largest for total in np.abs(step.weights.astype(np.int64)).sum((1, 2, 3))]
    elif hasattr(step, "window"):
        sums = [largest * math.prod(step.window.kernel)]
    worst = 0
    for channel in range(max(len(sums), len(epilogue.multiplier))):
        total = sums[channel % len(sums)] * abs(int(epilogue.multiplier[channel % len(epilogue.multiplier)]))
        total <<= int(epilogue.left[channel % len(epilogue.left)])
        total += abs(int(epilogue.offset[channel % len(epilogue.offset)])) << epilogue.offset_left
        for residual in epilogue.residuals:
            total += max(map(abs, representation_range(fixed, residual.value))) * abs(residual.factor) << residual.left
        worst = max(worst, total)
    return worst


def representation_range(fixed: FixedProgram, name: str) -> tuple[int, int]:
    representation: Any = fixed.values[name].representation
    if isinstance(representation, Codes):
        return representation.range
    return -representation.limit, representation.limit


def unbounded(fixed: FixedProgram, x: Any) -> Any:
    """The same program with the ends of its sums in Python's integers, which have no bounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_point, "_finish", finish_unbounded)
        return run_integers(fixed, x)[0]


def finish_unbounded(epilogue: FixedEpilogue, sums: Any, held: dict[str, Any]) -> None:
    multiplier = epilogue.multiplier.astype(object) * 2 ** epilogue.left.astype(object)
    v = sums.astype(object) * multiplier + epilogue.offset.astype(object) * 2**epilogue.offset_left
    for residual in epilogue.residuals:
        v = v + held[residual.value].astype(object) * residual.factor * 2**residual.left
    if epilogue.slope is not None:
        slopes = np.broadcast_to(epilogue.slope.mantissas.astype(object) * 2**epilogue.slope.left, v.shape)
        v = np.where(v < 0, rounded(v * slopes, epilogue.slope.shift), v)
    if epilogue.table is not None:
        v = np.vectorize(lambda number: table_unbounded(epilogue.table, number), otypes=[object])(v)
    for output in epilogue.outputs:
        if output.sign:
            made = np.where(v >= 0, 1, -1)
        elif output.factor is None:
            made = rounded(v, epilogue.shift)
        else:
            made = rounded(v * output.factor.mantissa * 2**output.left, output.factor.shift)
        held[output.value] = made.clip(output.low, output.high).astype(np.int64)


def rounded(numbers: Any, shift: int) -> Any:
    made = [half_even(Fraction(int(number), 2**shift)) for number in numbers.reshape(-1)]
    return np.array(made, object).reshape(numbers.shape)


def table_unbounded(table: Any, v: int) -> int:
    last = len(table.coefficients) - 1
    i = min(max((v >> table.fraction) + table.start, 0), last)
    r = v - ((i - table.start) << table.fraction)
    constant, linear, square = map(int, table.coefficients[i])
    if i in (0, last):
        return (constant << table.guard) + half_even(Fraction(r * linear, 2 ** (table.fraction - table.guard)))
    place = r >> (table.fraction - 30)
    return (constant << table.guard) + ((linear + (square * place >> 30)) * place >> (30 - table.guard))


class Residual(nn.Module):
    """One residual addition, which needs a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return (x + self.second(x)).mean((2, 3))


def test_second_outputs_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    _, _, fixed, _ = convert(Residual().eval(), (6, 6), x)
    assert any(output.factor for epilogue in fixed.epilogues for output in epilogue.outputs)
    found, _ = run_integers(fixed, x.numpy())
    assert np.array_equal(found, unbounded(fixed, x.numpy()))


# ------------------------------------------------------------------------------------------------------- kinds of steps

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "square": lambda x: x**2,
    "prelu": nn.PReLU(4, init=-1.7),
    "leaky relu": nn.LeakyReLU(0.9),
    "squeeze and excitation": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "product of places": lambda x: x * x[:, :1],
    "product": lambda x: x * x.flip(2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "concatenation": lambda x: torch.cat([x[:, 1:3], F.relu(x[:, :2])], 1),
    "shuffle": nn.ChannelShuffle(2),
    "reflection": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "zeros": lambda x: F.pad(x, (1, 0, 2, 1)),
    "no pattern": lambda x: x.reshape(len(x), 4, 8, 6).transpose(2, 3).reshape(len(x), 4, 3, 16),
    "average with another divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kind_of_step(name: str) -> None:
    operation = OPERATIONS[name]
    channels = operation(torch.zeros(1, 4, 6, 8)).shape[1]
    for bits in ((4, 8), (8, 1)):
        _, _, fixed, found = convert(randomised(Around(operation, channels)), bits, IMAGES)
        assert found.own == 0
        assert found.same_answers == 1
        huge, _ = run_integers(fixed, IMAGES.numpy() * 1e6)
        assert np.array_equal(huge, unbounded(fixed, IMAGES.numpy() * 1e6))


def test_functions_of_many_layers_have_one_table() -> None:
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Conv2d(3, 3, 3, padding=1), nn.SiLU())]
    _, _, fixed, _ = convert(nn.Sequential(*layers, nn.Conv2d(3, 2, 1)).eval(), (4, 4), IMAGES)
    tables = [epilogue.table for epilogue in fixed.epilogues if epilogue is not None and epilogue.table is not None]
    assert len(tables) == 3
    assert len({id(table.coefficients) for table in tables}) == 1


def test_signals_and_vectors() -> None:
    torch.manual_seed(0)
    signals = nn.Sequential(nn.Conv1d(2, 4, 5, 2), nn.ReLU(), nn.Conv1d(4, 3, 3)).eval()
    vectors = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    for network, x in ((signals, torch.randn(4, 2, 20)), (vectors, torch.randn(4, 7))):
        _, _, fixed, found = convert(network, (5, 8), x)
        assert found.own == 0
        assert fixed_point.run(fixed, x.numpy())[0].shape == network(x).shape


class Twice(nn.Module):
    """A map as fine as float32 allows, and a step that is far coarser: v is multiplied before it is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x) * 1e-5)
        return x + self.second(x)


def test_values_that_are_much_finer_than_what_they_are_made_of_are_clipped_and_not_wrapped() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    network = Twice().eval()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=x).eval()
    fixed = fixed_point.fixed_point(lower(capture(quantized, x), quantized, x))
    assert any(output.left for epilogue in fixed.epilogues if epilogue is not None for output in epilogue.outputs)
    for factor in (1.0, 1e4, 1e30):
        far = (x * factor).numpy()
        assert np.array_equal(run_integers(fixed, far)[0], unbounded(fixed, far))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((None, None), "layer 'stem' has no integer form: an operand of it is in float"),
        ((4, None), "layer 'stem' has no integer form: an operand of it is in float"),
        ((16, 8), "layer 'stem' has no integer form here: it is of 16/8 bits, more than 8"),
        ((8, 16), "layer 'stem' has no integer form here: it is of 8/16 bits, more than 8"),
    ],
)
def test_layers_without_an_integer_form_are_named(bits: Any, message: str) -> None:
    network, x = small_network(), images(8)
    policy = {**dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), (4, 4)), "stem": bits}
    quantized = Q.quantize(network, policy, calibrate=x).eval()
    with pytest.raises(ValueError, match=message):
        fixed_point.fixed_point(lower(capture(quantized, x), quantized, x))
