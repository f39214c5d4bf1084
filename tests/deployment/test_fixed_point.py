"""A program without floats rounds as exact arithmetic does, never overflows, and computes what the float program does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantizers as Q
from haq import networks
from haq.deployment import fixed_point
from haq.deployment.fixed_point import Factor, FixedProgram, ImageValue, image_integers, round_shift, run_integers, scaled
from haq.deployment.graph import capture
from haq.deployment.interpreter import Comparison
from haq.deployment.lowering import lower
from haq.deployment.program import Codes, Convolution, Fixed, Program
from tests.conftest import images, small_network

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
    _, program, fixed, found = convert(networks.load().module, (bits, bits), torch.rand(8, 1, 28, 28))
    assert found.same_answers == 1
    assert found.different < 1e-3 * found.values
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
    """The same program in Python's integers, which have no bounds."""
    held: dict[str, Any] = {
        value.value: image_integers(x.transpose(0, 2, 3, 1), value).astype(object) for value in fixed.image
    }
    for step, epilogue in zip(fixed.steps, fixed.epilogues, strict=True):
        sums = held[step.input]
        if isinstance(step, Convolution):
            sums = fixed_point._convolve(step.conv, sums.astype(np.int64), step.weights).astype(object)
        elif hasattr(step, "window"):
            sums = fixed_point._pool(step, fixed_point.Head(), sums.astype(np.int64)).astype(object)
        left = epilogue.left.astype(object)
        v = sums * epilogue.multiplier.astype(object) * 2**left + epilogue.offset.astype(object) * 2**epilogue.offset_left
        for residual in epilogue.residuals:
            v = v + held[residual.value] * residual.factor * 2**residual.left
        for output in epilogue.outputs:
            factor, shift = 1, epilogue.shift
            if output.factor is not None:
                factor, shift = output.factor.mantissa, output.factor.shift
            rounded = [half_even(Fraction(int(number) * factor, 2**shift)) for number in v.reshape(-1)]
            held[output.value] = np.array(rounded, object).reshape(v.shape).clip(output.low, output.high)
    return held[fixed.output].astype(np.int64)


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
