"""Uniform quantization: integers, real values and training-time values are one computation, with a written-out gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quantizers as Q
from quantizers import functional
from quantizers.observers import BINS, RULES, fit_activation_scales, fit_weight_scales, kl_threshold

bits = st.integers(1, 8)
signs = st.booleans()
scales = st.floats(1e-3, 1e3)
vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40).map(torch.tensor)


@given(vectors, scales, bits, signs)
def test_fake_quantize_is_dequantize_of_quantize(x: Tensor, scale: float, b: int, signed: bool) -> None:
    s = torch.tensor(scale)
    expected = Q.dequantize(functional.quantize_tensor(x, s, b, signed), s)
    assert torch.equal(Q.fake_quantize(x, s, b, signed), expected)
    assert torch.equal(Q.fake_quantize(x.clone().requires_grad_(), s, b, signed), expected)


@given(vectors, scales, bits, signs)
def test_idempotent_monotone_and_few_levels(x: Tensor, scale: float, b: int, signed: bool) -> None:
    s = torch.tensor(scale)
    once = Q.fake_quantize(x, s, b, signed)
    assert torch.equal(Q.fake_quantize(once, s, b, signed), once)
    ordered = Q.fake_quantize(x.sort().values, s, b, signed)
    assert (ordered.diff() >= 0).all()
    assert len(once.unique()) <= 2**b


@given(vectors, scales, st.integers(2, 8), signs)
def test_error_is_at_most_half_a_step_in_range(x: Tensor, scale: float, b: int, signed: bool) -> None:
    s = torch.tensor(scale)
    low, high = Q.integer_range(b, signed)
    inside = x[(x >= low * s) & (x <= high * s)]
    assert ((Q.fake_quantize(inside, s, b, signed) - inside).abs() <= s / 2 * (1 + 1e-5)).all()
    assert Q.fake_quantize(torch.zeros(1), s, b, signed).item() == 0


@given(vectors, st.integers(-8, 8), bits, signs)
def test_scaling_data_and_step_scales_the_result(x: Tensor, power: int, b: int, signed: bool) -> None:
    s, factor = torch.tensor(0.37), 2.0**power
    assert torch.equal(Q.fake_quantize(x * factor, s * factor, b, signed), Q.fake_quantize(x, s, b, signed) * factor)


@given(vectors, scales, bits, signs)
def test_gradient_passes_in_range_only(x: Tensor, scale: float, b: int, signed: bool) -> None:
    s, leaf = torch.tensor(scale), x.clone().requires_grad_()
    Q.fake_quantize(leaf, s, b, signed).sum().backward()
    low, high = Q.integer_range(b, signed)
    everywhere = b == 1 and signed
    expected = torch.ones_like(x) if everywhere else ((x / s >= low) & (x / s <= high)).float()
    assert torch.equal(leaf.grad, expected)


def test_gradient_at_the_bounds_is_one() -> None:
    x = torch.tensor([-0.75, 0.75, 0.7501], requires_grad=True)
    Q.fake_quantize(x, torch.tensor(0.25), 3, True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0]


def test_gradient_of_a_scale_is_that_of_lsq() -> None:
    """Esser et al., equation 3, worked out by hand; symmetric range -3..3."""
    x = torch.tensor([-1.0, -0.3, -0.1, 0.0, 0.1, 0.26, 0.4, 1.0])
    expected = [-3.0, 0.2, 0.4, 0.0, -0.4, -0.04, 0.4, 3.0]
    for value, slope in zip(x, expected, strict=True):
        scale = torch.tensor(0.25, requires_grad=True)
        Q.fake_quantize(value, scale, 3, True).backward()
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(slope, abs=1e-6)
    per_channel = torch.full((2, 1), 0.25, requires_grad=True)
    Q.fake_quantize(x.view(2, 4), per_channel, 3, True).sum().backward()
    assert per_channel.grad is not None
    assert per_channel.grad.flatten().tolist() == pytest.approx([sum(expected[:4]), sum(expected[4:])], abs=1e-6)


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert Q.fake_quantize(x, torch.tensor(1.0), 4, True).tolist() == [0, 2, 2, 0, -2]


def test_one_signed_bit_is_a_sign_with_plus_one_at_zero() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 0.1])
    assert Q.fake_quantize(x, torch.tensor(0.5), 1, True).tolist() == [-0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("b", "signed", "expected"),
    [
        (8, True, (-127, 127)),
        (8, False, (0, 255)),
        (2, True, (-1, 1)),
        (2, False, (0, 3)),
        (1, False, (0, 1)),
        (1, True, (-1, 1)),
    ],
)
def test_ranges(b: int, signed: bool, expected: tuple[int, int]) -> None:
    assert Q.integer_range(b, signed) == expected


@pytest.mark.parametrize("bad", [0, 9, 2.0, None, True])
def test_bits_out_of_range(bad: object) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        Q.integer_range(bad, True)  # type: ignore[arg-type]


@given(st.integers(0, 2**31))
def test_calibration_by_error_is_no_worse_than_by_maximum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, 3, generator=generator) * torch.rand(5, 1, 1, generator=generator)
    scale, error = fit_weight_scales(weight)
    energy = weight.square().sum()
    for b in range(2, 9):
        by_maximum = weight.abs().amax((1, 2)) / Q.integer_range(b, True)[1]
        left = {
            name: float((weight - Q.fake_quantize(weight, s.view(-1, 1, 1), b, True)).square().sum() / energy)
            for name, s in (("error", scale[b - 1]), ("maximum", by_maximum))
        }
        assert left["error"] <= left["maximum"] * (1 + 1e-5)
        assert left["error"] == pytest.approx(float(error[b - 1]), rel=1e-3, abs=1e-9)
    assert (error.diff() < 0).all()


def test_per_channel_is_blind_to_other_channels() -> None:
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    louder = weight * torch.tensor([[1.0], [100.0], [1.0]])
    before, after = fit_weight_scales(weight)[0], fit_weight_scales(louder)[0]
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    torch.testing.assert_close(before[:, 1] * 100, after[:, 1])


def test_one_bit_weights_have_the_mean_magnitude_as_scale() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    scale, _ = fit_weight_scales(weight)
    assert scale[0].tolist() == [2.0, 1.0]
    assert (scale > 0).all()


def test_activation_scale_clips_an_outlier_at_few_bits_and_keeps_it_at_eight() -> None:
    values = torch.cat([torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0])])
    scale, error = fit_activation_scales(values, 4.0, signed=False)
    assert scale[1] * 3 < 2.0
    assert (error[1:].diff() < 0).all()
    assert scale[7] * 255 <= 4.0 * (1 + 1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_activation_errors_are_those_of_the_quantizer(signed: bool) -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    values = values if signed else values.relu()
    scale, error = fit_activation_scales(values, float(values.abs().max()), signed)
    for b in range(1, 9):
        left = (values - Q.fake_quantize(values, scale[b - 1], b, signed)).square().sum() / values.square().sum()
        assert float(error[b - 1]) == pytest.approx(float(left), rel=0.1)


def test_an_input_of_zeros_has_a_scale() -> None:
    scale, error = fit_activation_scales(torch.zeros(10), 0.0, signed=False)
    assert (scale == 1).all()
    assert (error == 0).all()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit_weight_scales(torch.tensor([[1.0, float("nan")]]))


def clip_by_divergence(x: Tensor, levels: int) -> tuple[float, float]:
    """Where `kl` clips a sample, and its largest magnitude."""
    largest = float(x.abs().max())
    counts = torch.histc(x.abs().double(), BINS, 0, largest)
    return float(kl_threshold(counts, largest, levels)), largest


def test_divergence_keeps_what_is_spread_evenly_and_cuts_off_what_is_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(65536, generator=generator), torch.randn(65536, generator=generator)
    for levels in (4, 16, 256):
        clip, largest = clip_by_divergence(uniform, levels)
        assert clip > 0.98 * largest
    clip, largest = clip_by_divergence(torch.cat([normal, torch.tensor([40.0])]), 128)
    assert 3 < clip < 8 < largest
    assert clip_by_divergence(normal, 4)[0] < clip_by_divergence(normal, 16)[0]
    scaled = clip_by_divergence(normal * 64, 16)
    assert scaled[0] == pytest.approx(64 * clip_by_divergence(normal, 16)[0], rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_calibration_gives_positive_scales_and_true_errors(rule: str, power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(20000, generator=generator), torch.tensor([25.0])])
    scales, errors = fit_activation_scales(x, 25.0, True, rule, power_of_two)
    weights = torch.randn(6, 5, 3, 3, generator=generator)
    weights[2] = 0
    weight_scale, weight_error = fit_weight_scales(weights, rule, power_of_two)
    for scale in (scales, weight_scale):
        assert (scale > 0).all()
        if power_of_two:
            assert torch.equal(scale, 2 ** scale.log2().round())
    for b in range(2, 9):
        fake = Q.fake_quantize(x, scales[b - 1], b, True)
        assert ((fake - x).square().sum() / x.square().sum()).item() == pytest.approx(errors[b - 1].item(), rel=0.1, abs=1e-4)
        fake = Q.fake_quantize(weights, weight_scale[b - 1].view(-1, 1, 1, 1), b, True)
        expected = (fake - weights).square().sum() / weights.square().sum()
        assert weight_error[b - 1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_smallest_error_is_smallest_and_maximum_keeps_everything() -> None:
    x = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(0)), torch.tensor([25.0])])
    errors = {rule: fit_activation_scales(x, 25.0, True, rule)[1] for rule in RULES}
    for rule in ("max", "percentile", "kl"):
        assert (errors["mse"][1:] <= errors[rule][1:] * (1 + 1e-6)).all()
    assert fit_activation_scales(x, 25.0, True, "max")[0][7].item() == pytest.approx(25 / 127)
    assert fit_activation_scales(x, 25.0, True, "percentile")[0][7].item() < 6 / 127
    with pytest.raises(ValueError, match="unknown calibration 'best'; known: mse, max"):
        Q.Linear(calibration="best")


@pytest.mark.parametrize("shape", [(40, 4000), (100, 3, 3, 3), (2, 20000), (1, 1)])
def test_scales_of_channels_do_not_depend_on_how_many_are_found_at_once(shape: tuple[int, ...]) -> None:
    """Each channel's scale is that of a weight with this channel only, to the last bit."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    together = fit_weight_scales(weight)[0]
    for channel in (0, len(weight) // 2, len(weight) - 1):
        assert torch.equal(together[:, channel], fit_weight_scales(weight[channel : channel + 1])[0][:, 0])
