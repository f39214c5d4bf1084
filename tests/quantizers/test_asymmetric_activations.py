"""Ranges from histograms of all values, zero points of signed inputs, and shifts that make inputs unsigned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers import histogram
from quantizers.functional import BLOCK
from quantizers.histogram import BINS, GROUPS, Histogram, importance_of_inputs
from quantizers.observers import Observer, fit_activation_scales

WIDTHS = range(1, 9)


def swish(count: int = 20000, seed: int = 0) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return nn.functional.silu(3 * x)


def of_values(values: Tensor) -> Histogram:
    made = Histogram()
    made.add(values, float(values.abs().max()))
    return made


class Net(nn.Module):
    """A stem, and a layer whose input an activation makes."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = activation
        self.body = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(self.act(self.stem(x)))
        return made


def net(activation: nn.Module | None = None) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    made = Net(activation or nn.SiLU()).eval()
    made.stem.weight.data *= 4
    return made, torch.rand(8, 3, 8, 8)


def uniform(network: nn.Module, bits: int) -> Q.BitPolicy:
    return Q.BitPolicy.uniform(network, w=8, a=bits)


# ----------------------------------------------------------------------------------------------------------- histograms


@pytest.mark.parametrize("scale", [1e-20, 0.3, 1.0, 4.0, 1e10])
def test_all_values_are_counted_whatever_batches_they_come_in(scale: float) -> None:
    values = swish().mul_(scale).sort(descending=False).values
    whole = of_values(values)
    ascending, descending = Histogram(), Histogram()
    for part in values.abs().argsort().split(997):
        ascending.add(values[part], float(values[part].abs().max()))
    for part in values.flip(0).split(4001):
        descending.add(part, float(part.abs().max()))
    assert int(whole.counts.sum()) == len(values)
    for other in (ascending, descending):
        assert other.width == whole.width
        assert torch.equal(other.counts, whole.counts)
    # A power of two, as narrow as it can be.
    assert np.frexp(whole.width)[0] == 0.5
    assert BINS / 2 <= float(values.abs().max()) / whole.width < BINS
    edges = np.arange(-BINS, BINS + 1) * whole.width
    expected, _ = np.histogram(values.double().numpy(), edges)
    assert np.array_equal(whole.counts.sum(0).numpy(), expected)


def test_zeros_alone_and_nothing() -> None:
    made = Histogram()
    grids = made.grids(0.0, 0.0)
    made.add(torch.zeros(5), 0.0)
    assert grids.scales.eq(1).all()
    assert made.grids(0.0, 0.0).errors.eq(0).all()
    made.add(torch.ones(5), 1.0)
    assert int(made.counts[0, BINS]) == 5
    assert int(made.counts.sum()) == 10


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2)])
def test_channels_are_counted_by_what_they_weigh(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    layer.weight.data *= torch.logspace(-3, 2, layer.weight.numel()).view_as(layer.weight)
    x = torch.randn(5, 6, 7, 9)
    importance = importance_of_inputs(layer)
    assert importance is not None
    counted = []
    for given in (x, x.to(memory_format=torch.channels_last), x[:, :, ::1].transpose(2, 3)):
        made = Histogram(importance)
        made.add(given, float(x.abs().max()), -3)
        counted.append(made.counts)
        assert int(made.counts.sum()) == x.numel()
        # What all values weigh is what their channels do.
        weighed = (made.counts.sum(1) * made.weights).sum() / x[:, 0].numel()
        assert float(weighed) == pytest.approx(float((importance / importance.max()).sum()), rel=1e-9)
    assert all(torch.equal(counts, counted[0]) for counts in counted)
    assert int((counted[0].sum(1) > 0).sum()) <= GROUPS


def test_importance_is_the_sum_of_squares_of_what_meets_a_channel() -> None:
    layer = nn.Conv2d(2, 3, 2, bias=False)
    weight = layer.weight.data = torch.arange(24.0).view(3, 2, 2, 2)
    expected = [float(weight[:, channel].square().sum()) for channel in (0, 1)]
    assert importance_of_inputs(layer).tolist() == expected  # type: ignore[union-attr]
    assert importance_of_inputs(nn.Linear(3, 2)).shape == (3,)  # type: ignore[union-attr]
    assert importance_of_inputs(nn.ReLU()) is None
    # Channels that stay apart: only what is lighter than the others counts for less.
    apart = nn.Conv2d(4, 4, 1, groups=4)
    apart.weight.data = torch.tensor([1e-3, 1.0, 1.0, 1e3]).view(4, 1, 1, 1)
    light, one, other, heavy = importance_of_inputs(apart).tolist()  # type: ignore[union-attr]
    assert light < 1e-4 * one
    assert one == other < heavy < 7 * one


def test_a_channel_that_the_layer_ignores_does_not_set_the_range() -> None:
    layer = nn.Conv2d(2, 2, 1)
    layer.weight.data = torch.tensor([[1.0, 1e-5], [1.0, 1e-5]]).view(2, 2, 1, 1)
    x = torch.rand(4, 2, 8, 8)
    x[:, 1] *= 100
    found = {}
    for rule in ("mse", "output"):
        network = Q.quantize(nn.Sequential(layer), {"0": (8, 4)}, scheme=Q.Linear(rule), calibrate=x)
        found[rule] = float((network(x) - layer(x)).detach().square().mean())
    assert found["output"] < found["mse"] / 100


# ---------------------------------------------------------------------------------------------------------------- grids


def rounded(values: Tensor, scale: float, zero: float, bits: int, signed: bool) -> Tensor:
    zero_point = torch.tensor(zero) if not signed else None
    return Q.fake_quantize(values, torch.tensor(scale), bits, signed, zero_point=zero_point)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", ["unsigned", "symmetric", "asymmetric"])
def test_errors_of_grids_are_those_of_the_values(kind: str, power_of_two: bool) -> None:
    values = swish()
    if kind == "unsigned":
        values = values.relu()
    low, high = float(values.min()), float(values.max())
    grids = of_values(values).grids(low, high, asymmetric=kind == "asymmetric", power_of_two=power_of_two)
    for bits in WIDTHS:
        scale, zero = float(grids.scales[bits - 1]), float(grids.zero_points[bits - 1])
        signed = kind == "symmetric" or (kind == "asymmetric" and bits == 1)
        left = (values - rounded(values, scale, zero, bits, signed)).double().square().sum()
        measured = float(left / values.double().square().sum())
        assert measured == pytest.approx(float(grids.errors[bits - 1]), rel=0.1)
        assert zero == int(zero)
        assert 0 <= zero < 2**bits
        if power_of_two:
            assert np.frexp(scale)[0] == 0.5
        # None of the clipping points that are looked at is better by more than the width of a bin.
        for top in torch.linspace(0.1, 1, 25).tolist() if not power_of_two else []:
            other = rounded(values, top * high / Q.integer_range(bits, signed)[1], 0.0, bits, signed)
            assert measured < 1.03 * float((values - other).double().square().sum() / values.double().square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_grid_with_a_zero_point_is_worse_than_the_symmetric_one(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(3000, generator=random) ** 3 + torch.randn(1, generator=random)
    low, high = float(values.min()), float(values.max())
    if seed == 4:
        values = -values.abs() - 0.01
        low, high = float(values.min()), 0.0
    made = of_values(values)
    symmetric, affine = made.grids(low, high), made.grids(low, high, asymmetric=True)
    assert (affine.errors <= symmetric.errors * (1 + 1e-6)).all()
    assert torch.equal(affine.scales[:1], symmetric.scales[:1])
    if seed == 4:  # all negative: real 0 is the largest level
        assert torch.equal(affine.zero_points[1:], 2.0 ** torch.arange(2, 9) - 1)


@pytest.mark.parametrize("rule", ["max", "percentile"])
def test_ends_by_other_rules(rule: str) -> None:
    values = torch.cat([swish(), torch.tensor([60.0])])
    grids = of_values(values).grids(float(values.min()), 60.0, rule, asymmetric=True)
    top = {"max": 60.0, "percentile": float(values.quantile(0.9999))}[rule]
    for bits in WIDTHS[1:]:
        expected = (top + 0.2784) / (2**bits - 1)
        assert float(grids.scales[bits - 1]) == pytest.approx(expected, rel=0.02)
        assert float(grids.zero_points[bits - 1]) == round(0.2784 / float(grids.scales[bits - 1]))


# ------------------------------------------------------------------------------------------------------------ schemes


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_signed_inputs_lose_less_with_a_zero_point(activation: nn.Module, bits: int) -> None:
    network, x = net(activation)
    inputs = network.act(network.stem(x))
    errors, layers = {}, {}
    for asymmetric in (False, True):
        scheme = Q.Linear("output", asymmetric=asymmetric)
        quantized = Q.quantize(network, uniform(network, bits), scheme=scheme, calibrate=x)
        layers[asymmetric] = Q.quant_layers(quantized)
        made = scheme.activation(quantized.body, inputs, bits)
        errors[asymmetric] = float((made - inputs).detach().square().sum())
        assert scheme.activation(quantized.body, torch.zeros(3), bits).eq(0).all()
        assert len(made.unique()) <= 2**bits
    assert errors[True] < 0.6 * errors[False]
    # The image is unsigned, and stays what it is.
    assert torch.equal(layers[True]["stem"].activation_scale, layers[False]["stem"].activation_scale)
    assert layers[True]["stem"].activation_zero_point.eq(0).all()
    body, stem = layers[True]["body"], layers[True]["stem"]
    assert not body.scheme.integer_activations(body).signed
    assert body.scheme.zero_point(body, bits) > 0 or bits == 3
    assert stem.scheme.zero_point(stem, bits) == 0


@pytest.mark.parametrize("rule", ["mse", "max", "percentile", "kl"])
def test_explicit_rules_keep_their_scales(rule: str) -> None:
    network, x = net()
    quantized: Any = Q.quantize(network, uniform(network, 4), scheme=Q.Linear(rule), calibrate=[x[:4], x[4:]])
    observer = Observer()
    for part in (x[:4], x[4:]):
        observer(network.body, (network.act(network.stem(part)).detach(),))
    scales, errors = fit_activation_scales(observer.sample(), observer.largest, True, rule)
    assert torch.equal(quantized.body.activation_scale[:8], scales)
    assert torch.equal(quantized.body.activation_error[:8], errors)
    assert not hasattr(quantized.body, "activation_zero_point")
    if rule != "kl":
        asymmetric: Any = Q.quantize(
            network, uniform(network, 4), scheme=Q.Linear(rule, asymmetric=True), calibrate=[x[:4], x[4:]]
        )
        assert torch.equal(asymmetric.stem.activation_scale, quantized.stem.activation_scale)
        assert torch.equal(asymmetric.body.weight_scale, quantized.body.weight_scale)
        assert asymmetric.body.activation_zero_point[1:].sum() > 0


def test_activations_do_not_depend_on_batches() -> None:
    """Weights may: of many patches some are left out, batch by batch."""
    network, x = net()
    states = []
    for batches in (x, x.split(1), [x[:5], x[5:]]):
        made = Q.quantize(network, uniform(network, 4), scheme="linear-asymmetric", calibrate=batches)
        states.append(Q.quantizer_state(made))
    names = [name for name in states[0] if ".weight_" not in name]
    assert len(names) > 5
    for name in names:
        assert all(torch.allclose(states[0][name], state[name], rtol=1e-3) for state in states), name


def test_state_records_and_copies() -> None:
    network, x = net()
    made = Q.quantize(network, uniform(network, 4), scheme="linear-asymmetric", calibrate=x)
    records = Q.scheme_records(made)
    schemes = Q.schemes_from_records(records)
    assert schemes["body"] == Q.Scheme.named("linear-asymmetric")
    assert schemes["body"].options()["asymmetric"]
    again = Q.quantize(network, uniform(network, 4), scheme=schemes, state=Q.quantizer_state(made))
    assert torch.equal(again(x), made(x))
    again = Q.quantize(network, uniform(network, 4), scheme=Q.Linear("output", asymmetric=True), calibrate=x)
    assert torch.equal(again(x), made(x))
    Q.set_policy(made, uniform(network, 6))
    other = Q.quantize(network, uniform(network, 6), scheme="linear-asymmetric", calibrate=x)
    assert torch.equal(other(x), made(x))


def test_gradients() -> None:
    """Straight through between the bounds; a scale that is learned gets LSQ's of q - z."""
    network, x = net()
    made = Q.quantize(network, uniform(network, 3), scheme="linear-asymmetric", calibrate=x)
    layer: Any = made.body
    (scale, _) = (float(layer.activation_scale[2]), layer.activation_zero_point[2].fill_(2))
    values = (torch.tensor([-9.0, -2.0, -1.6, 0.0, 0.3, 5.0, 5.2]) * scale).requires_grad_()
    Q.activation_scales(made)
    result = layer.scheme.activation(layer, values, 3)
    assert torch.allclose(result, torch.tensor([-2.0, -2, -2, 0, 0, 5, 5]) * scale)
    result.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]  # type: ignore[union-attr]
    factor = 7**-0.5
    expected = factor * (-2 + 0 + (-2 + 1.6) + 0 - 0.3 + 0 + 5)
    assert float(layer.activation_scale.grad[2]) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        assert torch.equal(layer.scheme.activation(layer, values, 3), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_large_inputs_are_rounded_as_small_ones(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, BLOCK)).to(dtype)
    scale, zero = torch.tensor(0.3), torch.tensor(5.0)
    small = [Q.fake_quantize(part, scale, 4, False, zero_point=zero) for part in x.flatten().split(1000)]
    assert torch.equal(Q.fake_quantize(x, scale, 4, False, zero_point=zero), torch.cat(small).view_as(x))
    assert torch.equal(Q.quantize_tensor(x, scale, 4, False, zero_point=zero).unique(), torch.arange(16).to(dtype))


def test_a_wrong_zero_point_in_a_file_is_named() -> None:
    from haq.networks.checkpoint import _check_meaning

    network, x = net()
    made = Q.quantize(network, uniform(network, 4), scheme="linear-asymmetric", calibrate=x)
    state = Q.quantizer_state(made)
    _check_meaning(made, state)
    for value in (-1.0, 1.5, 300.0, float("nan")):
        state["body.activation_zero_point"][4] = value
        with pytest.raises(ValueError, match="body.activation_zero_point has a zero point that is no integer from 0 to"):
            _check_meaning(made, state)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown calibration 'best'; known: mse, max, percentile, kl, output"):
        Q.Linear("best")
    with pytest.raises(ValueError, match="'kl' finds no zero points for asymmetric inputs; those that do: mse, max,"):
        Q.Linear("kl", asymmetric=True)


def test_memory_is_bounded() -> None:
    network, x = net()
    observer = Observer()
    for _ in range(3):
        observer(network.body, (network.act(network.stem(x)).detach(),))
    made = observer.histogram
    assert made is not None
    assert made.counts.shape == (histogram.GROUPS, 2 * histogram.BINS)
    assert int(made.counts.sum()) == 3 * 8 * 8 * 8 * 8


# ------------------------------------------------------------------------------------------------------------- shifts


class Blocks(nn.Module):
    """Activations that can be shifted, and some that can't."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.act = kind()
        self.depthwise = nn.Conv2d(8, 8, (3, 5), 2, padding="valid", groups=8)
        self.act2 = kind()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=(1, 1)), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.added = kind()  # is added up, too
        self.third = nn.Conv2d(8, 8, (2, 3), padding="same")
        self.unlike = kind()  # is read with two paddings
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding=2)
        self.twice = kind()
        self.fourth, self.fifth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.last_act = kind()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.act(self.first(x)))
        x = self.act2(x)
        x = self.left(x) + self.right(x)
        x = self.added(x)
        x = x + self.third(x)
        x = self.unlike(x)
        x = self.one(x) + self.other(x)
        x = self.fifth(self.twice(self.fourth(self.twice(x))))
        made: Tensor = self.last(self.last_act(x.mean((2, 3))))
        return made


EVEN = "ignore:Using padding='same' with even kernel"


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("kind", [nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU])
def test_shifts_leave_float_outputs(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = Blocks(kind).eval(), 3 * torch.randn(6, 3, 12, 16)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    made: Any = Q.fold_shifts(network, x[:2])
    shifted = [name for name, module in made.named_modules() if type(module).__name__ == "Shifted"]
    assert shifted == ["act", "act2", "last_act"]
    with torch.no_grad():
        expected = network(x)
        assert torch.allclose(made(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert type(network.act) is kind
    # The padding is where the shift is.
    assert made.left.padding == made.right.padding == (0, 0)
    assert made.third.padding == "same"
    quantized = Q.quantize(made, uniform(made, 4), calibrate=x)
    signed = {name: layer.signed for name, layer in Q.quant_layers(quantized).items()}
    assert not any(signed[name] for name in ("depthwise", "left", "right", "last"))
    assert all(signed[name] for name in ("first", "third", "one", "other", "fourth", "fifth"))


@pytest.mark.filterwarnings(EVEN)
def test_shifts_of_vectors_and_without_padding() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GELU("tanh"), nn.Conv1d(4, 4, 3, padding=2, dilation=2))
    network.extend([nn.SiLU(inplace=True), nn.Conv1d(4, 2, 4, padding="same")])
    x = 3 * torch.randn(5, 3, 20)
    made: Any = Q.fold_shifts(network.eval(), x)
    assert [type(module).__name__ for module in made] == ["Conv1d", "Shifted", "Conv1d", "Shifted", "Conv1d"]
    assert torch.allclose(made(x), network(x), atol=1e-5)
    assert made[:4](x).ge(0).all()


def test_shifts_halve_the_steps_of_symmetric_inputs() -> None:
    network, x = net(nn.SiLU())
    made = Q.fold_shifts(network, x)
    outputs = network(x)
    left = []
    for float_network in (network, made):
        quantized = Q.quantize(float_network, uniform(network, 4), scheme=Q.Linear("output"), calibrate=x)
        left.append(float((quantized(x) - outputs).detach().square().mean()))
    assert left[1] < 0.6 * left[0]


def test_networks_without_such_activations_stay_what_they_are() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.SiLU())
    x = torch.randn(2, 3, 8, 8)
    made: Any = Q.fold_shifts(network, x)
    assert [type(module) for module in made] == [type(module) for module in network]
    assert torch.equal(made(x), network(x))
