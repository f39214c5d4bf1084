"""GPTQ rounds as its paper says, never loses more of a layer's output than rounding to nearest, and says what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers import moments as moments_module
from quantizers.functional import sign
from quantizers.moments import InputMoments, Passes
from quantizers.observers import fit_weight_scales
from quantizers.rounding import gptq
from tests.conftest import images, small_network


class PadsItself(nn.Conv2d):
    """A convolution that pads its input on its own, as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


LAYERS = {
    "linear": lambda: nn.Linear(8, 5),
    "dense": lambda: nn.Conv2d(6, 12, 3, padding=1),
    "stride": lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2)),
    "same": lambda: nn.Conv2d(6, 4, (3, 2), padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(6, 4, 2, padding="valid"),
    "pointwise": lambda: nn.Conv2d(6, 4, 1),
    "groups": lambda: nn.Conv2d(6, 12, 3, padding=(2, 1), groups=3, padding_mode="circular"),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "reflect": lambda: nn.Conv2d(6, 12, 3, padding="same", groups=6, padding_mode="reflect"),
    "conv1d": lambda: nn.Conv1d(6, 4, 4, padding="same", dilation=2),
    "depthwise1d": lambda: nn.Conv1d(6, 12, 3, stride=2, groups=6, padding=2, padding_mode="replicate"),
    "padsitself": lambda: PadsItself(6, 4, 2),
}


def made(kind: str, seed: int = 0, count: int = 8) -> tuple[Any, Tensor]:
    """Make a layer and inputs of it that vary together and have a large mean."""
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    x = torch.randn(count, 6, 9, 8).cumsum(1).cumsum(3) + 20
    if layer.weight.dim() == 3:
        x = x.flatten(2)
    return layer, x


def seen(layer: nn.Module, x: Tensor, centred: bool = True) -> InputMoments:
    moments = InputMoments("layer", layer, centred)
    for batch in x.split(3):
        moments(layer, (batch,))
    return moments


def of_channels(moments: InputMoments, errors: Tensor) -> Tensor:
    """Compute e^T C e for errors of a weight, by output channel, in float64."""
    grouped = moments.grouped(errors).double()
    left = ((grouped @ moments.covariance().double()) * grouped).sum(2)
    left = left.unflatten(0, (moments.groups, moments.parts)).sum(1)
    return left.flatten()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_second_moments_tell_the_error_of_the_output(kind: str, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "ENOUGH", 10**9)
    monkeypatch.setattr(moments_module, "PLENTY", 10**9)
    monkeypatch.setattr(moments_module, "CHUNK", 500)
    monkeypatch.setattr(moments_module, "LARGE", 20)
    layer, x = made(kind)
    moments = seen(layer, x, centred)
    error = torch.randn_like(layer.weight)
    assert torch.equal(moments.ungrouped(moments.grouped(error)), error)
    layer.bias = None
    layer.weight = nn.Parameter(error)
    with torch.no_grad():
        output = layer.double()(x.double())
    rows = output.reshape(-1, output.shape[-1])
    if kind != "linear":
        rows = output.movedim(1, -1).reshape(-1, output.shape[1])
    expected = rows.square().mean(0)
    if centred:
        expected = rows.var(0, unbiased=False)
    torch.testing.assert_close(of_channels(moments, error), expected, rtol=2e-4, atol=0)
    assert moments.images == len(x)
    assert moments.patches == len(rows)


@pytest.mark.parametrize("size", [16, 2])
def test_positions_that_are_left_out_change_little_and_save_most(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 2, 3, padding=1, groups=2)
    x = torch.randn(16384 // size**2, 6, size, size).cumsum(3) + 1
    monkeypatch.setattr(moments_module, "LEAST_PATCHES", 256)
    part = seen(layer, x)
    monkeypatch.setattr(moments_module, "ENOUGH", 10**9)
    monkeypatch.setattr(moments_module, "PLENTY", 10**9)
    every = seen(layer, x)
    assert part.patches < every.patches / 4
    assert part.patches >= 4 * part.inputs
    for one, other in ((part.covariance(), every.covariance()), (part.mean(), every.mean())):
        assert (one - other).norm() < 0.4 * other.norm()


def by_inverse(w: Tensor, scale: float, bits: int, second: Tensor, act_order: bool) -> Tensor:
    """Round one output channel as algorithm 1 of Frantar et al. says: with the Cholesky factor of the inverse."""
    low, high = Q.integer_range(bits, True)
    variances = second.diagonal()
    order = torch.arange(len(w))
    if act_order:
        order = variances.argsort(stable=True).flip(0)
    damped = second[order][:, order] + 0.01 * variances.mean() * torch.eye(len(w), dtype=torch.double)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, integers = w[order].clone(), torch.empty_like(w)
    for i in range(len(w)):
        integers[i] = (left[i] / scale).round().clamp(low, high)
        if bits == 1:
            integers[i] = sign(left[i])
        left[i:] -= (left[i] - scale * integers[i]) / upper[i, i] * upper[i, i:]
    result = torch.empty_like(integers)
    result[order] = integers
    return result


def quantized(layer: nn.Module, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    """The weight at a width, with offsets, in float64."""
    scale = scales[bits - 1].view(-1, *[1] * (layer.weight.dim() - 1))
    low, high = Q.integer_range(bits, True)
    integers = Q.quantize_tensor(layer.weight.detach(), scale, bits, True) + offsets[bits - 1]
    return integers.clamp(low, high).double() * scale.double()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kind", ["dense", "groups", "depthwise", "linear"])
def test_integers_are_those_of_the_paper(kind: str, act_order: bool) -> None:
    layer, x = made(kind, count=12)
    moments = seen(layer, x)
    scales = fit_weight_scales(layer.weight)[0]
    offsets = gptq(layer.weight, scales, moments, act_order=act_order)
    second = moments.covariance().double()
    weights = moments.grouped(layer.weight.detach()).double()
    differing = 0
    for bits in range(1, 9):
        scale = scales[bits - 1].view(moments.groups, -1)
        found = moments.grouped(quantized(layer, scales, offsets, bits))
        nearest = moments.grouped(quantized(layer, scales, torch.zeros_like(offsets), bits))
        for group in range(moments.groups):
            for channel in range(found.shape[1]):
                expected = (
                    by_inverse(weights[group, channel], float(scale[group, channel]), bits, second[group], act_order)
                    * scale[group, channel].double()
                )
                if torch.equal(found[group, channel], nearest[group, channel]):
                    loss, least = (
                        (weights[group, channel] - q) @ second[group] @ (weights[group, channel] - q)
                        for q in (expected, nearest[group, channel])
                    )
                    assert loss >= least * (1 - 1e-3)
                else:
                    differing += 1
                    torch.testing.assert_close(found[group, channel], expected)
    assert differing > 8


@pytest.mark.parametrize("rule", ["mse", "max", "output"])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_channel_at_no_width_loses_more_than_by_rounding_to_nearest(kind: str, rule: str) -> None:
    layer, x = made(kind, seed=1)
    moments = seen(layer, x)
    scales = fit_weight_scales(layer.weight, rule, moments=moments)[0]
    offsets = gptq(layer.weight, scales, moments)
    assert offsets.dtype == torch.int8
    assert offsets.shape == (8, *layer.weight.shape)
    weight = layer.weight.detach().double()
    total = nearest_total = 0.0
    for bits in range(1, 9):
        given = of_channels(moments, weight - quantized(layer, scales, offsets, bits))
        nearest = of_channels(moments, weight - quantized(layer, scales, torch.zeros_like(offsets), bits))
        assert (given <= nearest * (1 + 1e-6)).all()
        changed = offsets[bits - 1].flatten(1).any(1)
        assert (given[changed] < nearest[changed]).all()
        total, nearest_total = total + float(given.sum()), nearest_total + float(nearest.sum())
    assert total < nearest_total


def test_only_widths_that_were_asked_for_have_offsets() -> None:
    layer, x = made("dense")
    moments = seen(layer, x)
    scales = fit_weight_scales(layer.weight)[0]
    every, some = gptq(layer.weight, scales, moments), gptq(layer.weight, scales, moments, widths=(3, 5))
    assert torch.equal(every[[2, 4]], some[[2, 4]])
    assert not some[[0, 1, 3, 5, 6, 7]].any()


def test_inputs_that_never_vary_and_channels_of_zeros_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 4)
    layer.weight.data[2] = 0
    x = torch.randn(100, 12) @ torch.randn(12, 12)
    x[:, 3], x[:, 7] = 0, 5
    scales = fit_weight_scales(layer.weight)[0]
    offsets = gptq(layer.weight, scales, seen(layer, x))
    assert offsets.any()
    assert not offsets[:, :, [3, 7]].any()
    assert not offsets[1:, 2].any()
    assert not gptq(layer.weight, scales, seen(layer, torch.zeros(100, 12))).any()


def test_inputs_are_divided_where_their_products_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "MOST_INPUTS", 30)
    for kind in ("dense", "depthwise"):
        layer, x = made(kind)
        moments = seen(layer, x)
        assert moments.parts == {"dense": 2, "depthwise": 1}[kind]
        scales = fit_weight_scales(layer.weight, "output", moments=moments)[0]
        offsets = gptq(layer.weight, scales, moments)
        before = of_channels(moments, layer.weight.detach() - quantized(layer, scales, torch.zeros_like(offsets), 3))
        after = of_channels(moments, layer.weight.detach() - quantized(layer, scales, offsets, 3))
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < before.sum()


def test_quantize_keeps_the_offsets_of_every_width_and_its_state_has_them() -> None:
    network = small_network()
    policy = Q.BitPolicy.uniform(network, w=3, a=8)
    batches = images(64).split(16)
    nearest = Q.quantize(network, policy, calibrate=batches)
    one, other = (Q.quantize(network, policy, calibrate=batches, rounding="gptq", correction=c) for c in (None, "analytic"))
    assert "weight_offset" not in " ".join(Q.quantizer_state(nearest))
    for name, layer in Q.quant_layers(one).items():
        assert torch.equal(layer.weight_scale, Q.quant_layers(nearest)[name].weight_scale)
        assert layer.weight_offset is not None
        for bits in range(1, 9):
            layer.weight_bits = bits
            expected = quantized(layer, layer.weight_scale, layer.weight_offset, bits)
            torch.testing.assert_close(layer.quantized_weight().double(), expected)
    # Where a correction follows, the error's mean doesn't count.
    assert any(
        not torch.equal(layer.weight_offset, Q.quant_layers(other)[name].weight_offset)
        for name, layer in Q.quant_layers(one).items()
    )
    again = Q.quantize(network, policy, state=Q.quantizer_state(other))
    assert torch.equal(again(images(4)), other(images(4)))


def test_one_layer_may_be_rounded_otherwise() -> None:
    network = small_network()
    policy = Q.BitPolicy.uniform(network, w=3, a=8)
    first, *others = policy
    rounding = {first: "nearest", **dict.fromkeys(others, "gptq")}
    layers = Q.quant_layers(Q.quantize(network, policy, calibrate=images(64), rounding=rounding))
    assert layers[first].weight_offset is None
    assert all(layers[name].weight_offset is not None for name in others)


def test_layers_whose_moments_take_too_much_are_seen_in_further_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    policy = Q.BitPolicy.uniform(network, w=3, a=8)
    batches = images(64).split(16)

    def state(given: Any) -> dict[str, Tensor]:
        made = Q.quantize(
            network, policy, calibrate=given, rounding="gptq", correction="analytic", scheme=Q.Linear(calibration="output")
        )
        return Q.quantizer_state(made)

    expected = state(iter(batches))
    monkeypatch.setattr(Passes.__init__, "__defaults__", (1,))
    found = state(batches)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r"looked at \d times: give `calibrate` as a list"):
        state(iter(batches))


def test_too_few_patches_are_named_with_what_is_enough() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(40, 3))
    x = torch.randn(50, 40)
    policy = {"1": (4, 8)}
    with pytest.raises(ValueError, match=r"layer '1': GPTQ needs at least 40 patches .* gave 30 in 30 images: .* 40 images"):
        Q.quantize(network, policy, calibrate=x[:30], rounding="gptq")
    Q.quantize(network, policy, calibrate=x[:40], rounding="gptq")
    Q.quantize(network, {"1": (None, 8)}, calibrate=x[:30], rounding="gptq")
    convolution = nn.Sequential(nn.Conv2d(40, 3, 2))
    with pytest.raises(ValueError, match=r"at least 160 patches .* gave 36 in 4 images: .* at least 18 images"):
        Q.quantize(convolution, {"0": (4, 8)}, calibrate=torch.randn(4, 40, 4, 4), rounding="gptq")


class Wordy(nn.Linear):
    """A layer that doesn't say what it multiplies with."""

    def forward(self, input: Tensor) -> Tensor:
        return (input[:, None] * self.weight).sum(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "unknown rounding 'up'; known: nearest, gptq"),
        ({"rounding": {"0": "up"}}, "unknown rounding 'up'; known: nearest, gptq"),
        ({"rounding": {"other": "gptq"}}, "`rounding` names 'other', which is no layer of the policy"),
        ({"rounding": "gptq", "scheme": "dorefa"}, r"layer '0': weights of scheme 'dorefa' can't be .* \(linear"),
        ({"rounding": "gptq", "scheme": "kmeans"}, r"layer '0': weights of scheme 'kmeans' can't be .*nearest"),
        ({"rounding": "gptq", "calibrate": None}, "rounding='gptq' needs inputs to look at"),
        ({"rounding": "gptq", "calibrate": torch.full((64, 8), 1e25)}, "beyond torch.float32: scale its input down"),
    ],
)
def test_what_cannot_be_rounded_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    arguments = {"calibrate": torch.randn(64, 8), **arguments}
    with pytest.raises(ValueError, match=message) as raised:
        Q.quantize(nn.Sequential(nn.Linear(8, 3)), {"0": (4, None)}, **arguments)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="layer '0' calls neither F.linear nor"):
        Q.quantize(nn.Sequential(Wordy(8, 3)), {"0": (4, None)}, calibrate=torch.randn(64, 8), rounding="gptq")
    layer = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="damping must be positive"):
        gptq(layer.weight, torch.ones(8, 3), seen(layer, torch.randn(64, 8)), damping=0.0)


def test_no_layer_loses_by_gptq_on_all_images_where_they_are_few() -> None:
    """Were only a share of the patches looked at, channels could lose on the others."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(4, 8, 3, groups=2, padding=1), torch.rand(40, 4, 9, 9)
    network = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 4, 1))
    policy = Q.BitPolicy.uniform(network, w=3, a=None)
    errors = []
    for rounding in ("gptq", "nearest"):
        made = Q.quantize(network, policy, calibrate=images, rounding=rounding)[0]  # type: ignore[index]
        of_widths = []
        for width in range(1, 9):
            made.weight_bits = width
            with torch.no_grad():
                of_widths.append((made(images) - layer(images)).double().square().mean((0, 2, 3)))
        errors.append(torch.stack(of_widths))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert (errors[0] < errors[1]).any()
