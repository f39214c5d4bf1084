"""DoReFa, PACT, LSQ and LSQ+ compute the papers' formulas, and train with gradients written out for every tie."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.network import learned_parameters
from quantizers.observers import fit_activation_scales
from quantizers.schemes.dorefa import DoReFa, dorefa_activation, dorefa_weight
from quantizers.schemes.lsq import LSQ, LSQPlus, learned_step, least_squares_grids
from quantizers.schemes.pact import PACT, pact, pact_penalty
from tests.conftest import images

SCHEMES = ["dorefa", "pact", "lsq", "lsqplus"]
STEPS = ["lsq", "lsqplus"]
widths = st.integers(1, 8)
signs = st.booleans()
positive = st.floats(1e-3, 1e3)
vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40).map(torch.tensor)


def quantized(network: nn.Module, scheme: Any, w: int | None = 4, a: int | None = 4) -> nn.Module:
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), scheme=scheme, calibrate=images(32))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the sum of the outputs, each times another number, so that no two can be mistaken for each other."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    made = function(*leaves)
    return torch.autograd.grad((made * torch.arange(1, made.numel() + 1).view(made.shape)).sum(), leaves)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# DoReFa


def test_dorefa_weights() -> None:
    w = torch.tensor([-2, -0.5, -0.1, 0, 0.1, 0.5, 2])
    torch.testing.assert_close(dorefa_weight(w, 2), torch.tensor([-3, -1, -1, 1, 1, 1, 3]) / 3)
    torch.testing.assert_close(dorefa_weight(w, 3), torch.tensor([-7, -3, -1, 1, 1, 3, 7]) / 7)
    torch.testing.assert_close(dorefa_weight(w, 1), torch.tensor([-1, -1, -1, 1, 1, 1, 1]) * (5.2 / 7))


def test_dorefa_activations() -> None:
    x = torch.tensor([-0.2, 0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.3])
    torch.testing.assert_close(dorefa_activation(x, 2), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]) / 3)
    edges = torch.tensor([-1e-6, 0, 0.5, 1, 1 + 1e-6], requires_grad=True)
    dorefa_activation(edges, 2).sum().backward()
    assert edges.grad is not None
    assert edges.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gradient_of_dorefa_weights_is_that_of_the_formula_without_rounding(bits: int) -> None:
    def surrogate(w: Tensor) -> Tensor:
        return torch.tanh(w) / torch.tanh(w).abs().max()

    w = values(3, 4)
    assert torch.autograd.gradcheck(surrogate, w.clone().requires_grad_())
    torch.testing.assert_close(gradients(lambda w: dorefa_weight(w, bits), w), gradients(surrogate, w))


def test_the_gradient_of_one_bit_dorefa_weights_passes_as_it_is() -> None:
    (to_weight,) = gradients(lambda w: dorefa_weight(w, 1), torch.tensor([-3.0, 0.0, 5.0]))
    assert to_weight.tolist() == [1, 2, 3]


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights_of_a_layer_of_zeros_are_finite(bits: int) -> None:
    zero = torch.zeros(3, requires_grad=True)
    made = dorefa_weight(zero, bits)
    made.sum().backward()
    assert made.isfinite().all()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@given(vectors, widths)
def test_dorefa_has_few_levels_in_order(x: Tensor, bits: int) -> None:
    for function in (dorefa_weight, dorefa_activation):
        made = function(x.sort().values, bits)
        assert (made.diff() >= 0).all()
        assert len(made.unique()) <= 2**bits
    assert (dorefa_weight(x, bits).abs() <= 1).all() or bits == 1
    once = dorefa_activation(x, bits)
    assert torch.equal(dorefa_activation(once, bits), once)


def test_dorefa_needs_no_data(network: nn.Module) -> None:
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), scheme="dorefa")
    assert torch.equal(qnetwork(images(4)), quantized(network, "dorefa")(images(4)))
    assert not learned_parameters(qnetwork)


# PACT


def test_pact() -> None:
    x, clip = torch.tensor([-1, 0.5, 1.9, 2, 3]), torch.tensor(2.0)
    torch.testing.assert_close(pact(x, clip, 2), torch.tensor([0, 2 / 3, 2, 2, 2]))
    torch.testing.assert_close(pact(x, clip, 8), torch.tensor([0, 0.5, 1.9, 2, 2]), atol=1 / 255, rtol=0)
    x.requires_grad_()
    clip.requires_grad_()
    pact(x, clip, 2).sum().backward()
    assert x.grad is not None
    assert clip.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    assert clip.grad.item() == 2


@pytest.mark.parametrize("bits", range(1, 9))
def test_pact_is_symmetric_for_signed_inputs(bits: int) -> None:
    x, clip = torch.tensor([-3.0, -2, -1.5, 0.5, 2, 2.5]), torch.tensor(2.0)
    torch.testing.assert_close(pact(-x, clip, bits, True), -pact(x, clip, bits, True))
    assert pact(x, clip, bits, True).abs().max() == 2
    to_x, to_clip = gradients(lambda x, clip: pact(x, clip, bits, True), x, clip)
    assert to_x.tolist() == [0, 0, 3, 4, 0, 0]
    assert to_clip.item() == -1 - 2 + 5 + 6


@given(st.integers(0, 2**31), positive, widths, signs)
def test_the_gradients_of_pact_are_those_of_the_clip(seed: int, clip: float, bits: int, signed: bool) -> None:
    def surrogate(x: Tensor, clip: Tensor) -> Tensor:
        low = torch.where(x <= -clip, -clip, x) if signed else torch.where(x < 0, torch.zeros_like(x), x)
        return torch.where(x >= clip, clip, low)

    x, alpha = 2 * clip * values(12, seed=seed), torch.tensor(clip, dtype=torch.double)
    edges = torch.cat([(x.abs() - alpha).abs(), x.abs()])
    assume(edges.min() > 1e-4 * clip)
    assert torch.autograd.gradcheck(surrogate, (x.requires_grad_(), alpha.requires_grad_()), eps=1e-6 * clip)
    for ours, theirs in zip(
        gradients(lambda x, a: pact(x, a, bits, signed), x, alpha), gradients(surrogate, x, alpha), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@given(vectors, positive, widths, signs)
def test_pact_is_idempotent_and_has_few_levels(x: Tensor, clip: float, bits: int, signed: bool) -> None:
    once = pact(x, torch.tensor(clip), bits, signed)
    assert torch.equal(pact(once, torch.tensor(clip), bits, signed), once)
    assert len(once.unique()) <= 2**bits
    assert (once.abs() <= clip * (1 + 1e-6)).all()


def test_the_clip_starts_at_ten_or_where_the_data_say(network: nn.Module) -> None:
    assert all(layer.activation_clip == 10 for layer in Q.quant_layers(quantized(network, "pact")).values())
    x = images(32)
    with torch.no_grad():
        largest = network[:3](x).max()
    found = Q.quant_layers(quantized(network, PACT(clip=None)))["depthwise"].activation_clip
    assert largest / 4 < found <= largest
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive"):
            PACT(clip=bad)


def test_the_penalty_is_the_sum_of_squares_of_the_clips_in_use(network: nn.Module) -> None:
    qnetwork = quantized(network, PACT(clip=3))
    Q.set_policy(qnetwork, {**Q.get_policy(qnetwork), "stem": (4, None)})
    penalty = pact_penalty(qnetwork, 0.1)
    assert penalty.item() == pytest.approx(0.1 * 9 * 4)
    penalty.backward()
    clips = {name: layer.activation_clip for name, layer in Q.quant_layers(qnetwork).items()}
    assert clips["hidden"].grad.item() == pytest.approx(0.6)
    assert clips["stem"].grad is None
    with pytest.raises(ValueError, match="no layer"):
        pact_penalty(quantized(network, "lsq"), 0.1)


# LSQ and LSQ+


def test_lsq() -> None:
    v, expected = [-1, -0.3, -0.1, 0, 0.1, 0.26, 0.4, 1], [-1, -0.25, 0, 0, 0, 0.25, 0.5, 0.75]
    slopes, passes = [-4, 0.2, 0.4, 0, -0.4, -0.04, 0.4, 3], [0, 1, 1, 1, 1, 1, 1, 0]
    for value, made, slope, through in zip(v, expected, slopes, passes, strict=True):
        x, step = torch.tensor(float(value), requires_grad=True), torch.tensor(0.25, requires_grad=True)
        result = learned_step(x, step, -4, 3)
        result.backward()
        assert x.grad is not None
        assert step.grad is not None
        assert result.item() == made
        assert step.grad.item() == pytest.approx(slope, abs=1e-6)
        assert x.grad.item() == through


def test_lsq_starts_where_the_paper_says() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.1, -0.2], [0.3, -0.4]]))
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    qnetwork = Q.quantize(network, {"0": (3, 3)}, scheme=LSQ(per_channel=False), calibrate=x)
    layer = Q.quant_layers(qnetwork)["0"]
    assert layer.weight_scale.shape == (len(Q.WIDTHS), 1)
    assert layer.weight_scale[2].item() == pytest.approx(0.288675, abs=1e-6)
    assert layer.activation_scale[2].item() == pytest.approx(2 * 1.5 / math.sqrt(7))
    layer = Q.quant_layers(Q.quantize(network, {"0": (3, 3)}, scheme="lsq", calibrate=x))["0"]
    assert layer.weight_scale[2].tolist() == pytest.approx([2 * 0.15 / math.sqrt(3), 2 * 0.35 / math.sqrt(3)])


@pytest.mark.parametrize(("per_channel", "sharing"), [(False, 4), (True, 2)])
def test_the_gradient_of_a_step_is_scaled(per_channel: bool, sharing: int) -> None:
    layer = quantized_linear(LSQ(per_channel=per_channel))
    step = layer.weight_scale[2].detach()
    layer.quantized_weight().sum().backward()
    leaf = step[:, None].requires_grad_()
    (raw,) = torch.autograd.grad(learned_step(layer.weight.detach(), leaf, -4, 3).sum(), leaf)
    assert layer.weight_scale.grad is not None
    torch.testing.assert_close(layer.weight_scale.grad[2], raw.flatten() / math.sqrt(sharing * 3))
    if not per_channel:
        assert raw.abs().item() * 0.288675 == pytest.approx(layer.weight_scale.grad[2].abs().item(), rel=1e-5)
    assert not layer.weight_scale.grad[[0, 1, 3, 4, 5, 6, 7]].any()
    # Of an input it is the number of features, whatever the batch.
    grads = []
    for count in (1, 3):
        layer.activation_scale.grad = None
        layer.scheme.activation(layer, torch.full((count, 2), 0.9), 3).sum().backward()
        assert layer.activation_scale.grad is not None
        grads.append(layer.activation_scale.grad[2].item())
    assert grads[1] == pytest.approx(3 * grads[0])
    slope = 0.9 / layer.activation_scale[2].item()
    assert grads[0] == pytest.approx(2 * (round(slope) - slope) / math.sqrt(2 * 7), abs=1e-6)


def quantized_linear(scheme: Any) -> Q.QuantLayer:
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.1, -0.2], [0.3, -0.4]]))
    return Q.quant_layers(Q.quantize(network, {"0": (3, 3)}, scheme=scheme, calibrate=torch.rand(8, 2)))["0"]


def test_lsqplus_weights_start_at_three_standard_deviations() -> None:
    layer = quantized_linear(LSQPlus(per_channel=False))
    weight = layer.weight.detach().flatten()
    mean, spread = weight.mean(), 3 * weight.std(correction=0)
    expected = max((mean - spread).abs(), (mean + spread).abs()) / 4
    assert layer.weight_scale[2].item() == pytest.approx(expected.item(), rel=1e-5)


def test_lsqplus() -> None:
    """Worked out by hand: s = 0.5, beta = -0.25, codes 0..3, so that values are within at -0.25 < x < 1.25."""
    x = torch.tensor([-0.5, -0.25, 0.0, 0.5, 1.0, 1.25, 2.0])
    step, offset = torch.tensor(0.5), torch.tensor(-0.25)
    assert learned_step(x, step, 0, 3, offset).tolist() == [-0.25, -0.25, -0.25, 0.75, 0.75, 1.25, 1.25]
    to_x, to_step, to_offset = gradients(lambda x, s, b: learned_step(x, s, 0, 3, b), x, step, offset)
    assert to_x.tolist() == [0, 0, 3, 4, 5, 0, 0]
    assert to_step.item() == pytest.approx(3 * -0.5 + 4 * 0.5 + 5 * -0.5 + 6 * 3 + 7 * 3)
    assert to_offset.item() == 1 + 2 + 6 + 7


@given(st.integers(0, 2**31), positive, widths, signs, st.sampled_from([None, -0.3, 0.0, 1.7]))
def test_the_gradients_of_steps_are_those_of_the_formula_with_its_rounding_frozen(
    seed: int, scale: float, bits: int, signed: bool, offset: float | None
) -> None:
    """With what rounding adds held fixed, the formula is smooth within the bounds and beyond them."""
    assume(not (signed and bits == 1))
    low, high = Q.integer_range(bits, signed, narrow=False)
    shift = torch.tensor(0.0 if offset is None else offset * scale, dtype=torch.double)
    step = torch.tensor([[scale], [2 * scale]], dtype=torch.double)
    x = shift + 0.7 * max(high, 2) * scale * values(2, 6, seed=seed)
    ratio = (x - shift) / step
    assume(min((ratio - bound).abs().min() for bound in (low, high)) > 1e-4)
    residue = ratio.clamp(low, high).round() - ratio.clamp(low, high)

    def surrogate(x: Tensor, step: Tensor, shift: Tensor) -> Tensor:
        ratio = (x - shift) / step
        clipped = torch.where(ratio < low, float(low), torch.where(ratio > high, float(high), ratio))
        return (clipped + residue) * step + shift

    inputs = tuple(leaf.clone().requires_grad_() for leaf in (x, step, shift))
    assert torch.autograd.gradcheck(surrogate, inputs, eps=1e-6 * scale, atol=1e-4, rtol=1e-4)
    ours = gradients(lambda x, s, b: learned_step(x, s, low, high, b), x, step, shift)
    for mine, theirs in zip(ours, gradients(surrogate, x, step, shift), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(surrogate(x, step, shift), learned_step(x, step, low, high, shift))


@given(vectors, positive, st.integers(2, 8), signs)
def test_learned_steps_are_idempotent_and_have_few_levels(x: Tensor, step: float, bits: int, signed: bool) -> None:
    low, high = Q.integer_range(bits, signed, narrow=False)
    s = torch.tensor(step)
    once = learned_step(x, s, low, high)
    assert torch.equal(learned_step(once, s, low, high), once)
    assert len(once.unique()) <= 2**bits
    assert torch.equal(learned_step(x, s, low, high, torch.zeros(())), once)
    shifted = learned_step(x, s, low, high, torch.tensor(0.37))
    assert len(shifted.unique()) <= 2**bits
    torch.testing.assert_close(learned_step(shifted, s, low, high, torch.tensor(0.37)), shifted)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(values(20000), id="gaussian"),
        pytest.param(F.silu(2 * values(20000)), id="swish"),
        pytest.param(values(20000).relu(), id="relu"),
        pytest.param(torch.cat([values(20000), torch.tensor([50.0])]), id="outlier"),
        pytest.param(torch.tensor([1.0, 2.0, 2.0, 5.0]), id="few"),
    ],
)
def test_the_first_grid_is_no_worse_than_the_whole_range(sample: Tensor) -> None:
    steps, offsets = least_squares_grids(sample)
    assert (steps > 0).all()
    errors = []
    for bits in range(1, 9):
        high = 2**bits - 1

        def error(step: Tensor, offset: Tensor, high: int = high) -> float:
            return float((learned_step(sample, step, 0, high, offset) - sample).square().sum() / sample.square().sum())

        whole = error((sample.max() - sample.min()) / high, sample.min())
        errors.append(error(steps[bits - 1].double(), offsets[bits - 1].double()))
        assert errors[-1] <= whole * 1.02 + 1e-7
    assert all(later <= earlier * 1.01 + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_offsets_help_where_values_are_a_little_negative() -> None:
    sample = F.silu(2 * values(20000)).float()
    steps, offsets = least_squares_grids(sample)
    scales, _ = fit_activation_scales(sample, float(sample.abs().max()), True)
    for bits in range(2, 9):
        with_offset = learned_step(sample, steps[bits - 1], 0, 2**bits - 1, offsets[bits - 1])
        without = Q.fake_quantize(sample, scales[bits - 1], bits, True)
        assert (with_offset - sample).square().mean() < 0.6 * (without - sample).square().mean()


@pytest.mark.parametrize("constant", [0.0, -2.5, 3.0])
def test_a_constant_input_is_exact(constant: float) -> None:
    sample = torch.full((100,), constant)
    steps, offsets = least_squares_grids(sample)
    for step, offset in zip(steps, offsets, strict=True):
        assert torch.equal(learned_step(sample, step, 0, 3, offset), sample)


@pytest.mark.parametrize("scheme", STEPS)
def test_steps_stay_positive_whatever_an_update_makes_of_them(network: nn.Module, scheme: str) -> None:
    qnetwork, x = quantized(network, scheme, 3, 3), images(8)
    before = qnetwork(x)
    with torch.no_grad():
        for parameter in learned_parameters(qnetwork)[:2]:
            parameter.mul_(-1)
    assert torch.equal(qnetwork(x), before)
    layer = Q.quant_layers(qnetwork)["stem"]
    with torch.no_grad():
        for parameter in learned_parameters(qnetwork):
            parameter.zero_()
    out = qnetwork(x)
    assert out.isfinite().all()
    assert len(layer.quantized_weight().unique()) <= 8
    layer.quantized_weight().sum().backward()
    assert layer.weight_scale.grad is not None
    # A step that has fallen to the floor is moved by what its larger self would do.
    assert layer.weight_scale.grad[2].isfinite().all()
    assert layer.weight_scale.grad[2].any()


@pytest.mark.parametrize("scheme", STEPS)
def test_the_gradient_of_a_negative_step_is_that_of_its_magnitude(network: nn.Module, scheme: str) -> None:
    weight_steps = []
    for sign in (1, -1):
        layer = Q.quant_layers(quantized(network, scheme, 3, 3))["stem"]
        with torch.no_grad():
            layer.weight_scale.mul_(sign)
        layer.quantized_weight().square().sum().backward()
        weight_steps.append(layer.weight_scale.grad)
    assert weight_steps[0][2].any()
    assert torch.equal(weight_steps[0], -weight_steps[1])


@pytest.mark.parametrize("scheme", STEPS)
def test_one_signed_bit_is_refused_by_name(network: nn.Module, scheme: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 'stem': {scheme} has no weights of 1 bit"):
        quantized(network, scheme, 1, 4)
    qnetwork = quantized(network, scheme, 2, 2)
    before = Q.get_policy(qnetwork)
    with pytest.raises(ValueError, match=rf"layer 'hidden': {scheme} has no weights of 1 bit"):
        Q.set_policy(qnetwork, {**before, "hidden": (1, 4)})
    assert Q.get_policy(qnetwork) == before


def test_inputs_of_one_bit(network: nn.Module) -> None:
    """Unsigned ones are 0 and 1; LSQ has no signed ones; LSQ+ has two levels, wherever they are."""
    x = images(4)
    with pytest.raises(ValueError, match="no signed inputs of 1 bit"):
        quantized(network, "lsq", 2, 1)(x)
    lsq = quantized(network, "lsq", 2, 2)
    Q.set_policy(lsq, {name: (2, 2 if name == "classifier" else 1) for name in Q.get_policy(lsq)})
    assert lsq(x).isfinite().all()
    plus = quantized(network, "lsqplus", 2, 1)
    layer = Q.quant_layers(plus)["classifier"]
    assert len(layer.scheme.activation(layer, torch.linspace(-2, 2, 50)[:, None], 1).unique()) == 2
    assert plus(x).isfinite().all()


# Whole networks


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keys_are_the_float_networks(network: nn.Module, scheme: str) -> None:
    qnetwork = quantized(network, scheme)
    assert list(qnetwork.state_dict()) == list(network.state_dict())
    qnetwork.load_state_dict(network.state_dict(), strict=True)
    back = Q.float_copy(qnetwork)
    assert torch.equal(back(images(4)), network(images(4)))
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in network.named_parameters()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_the_same_with_and_without_gradients(network: nn.Module, scheme: str) -> None:
    qnetwork, x = quantized(network, scheme), images(8)
    for b in (2, 3, 8):
        Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, w=b, a=b))
        with_gradients = qnetwork(x)
        assert with_gradients.requires_grad
        with torch.no_grad():
            assert torch.equal(qnetwork(x), with_gradients)
        with torch.inference_mode():
            assert torch.equal(qnetwork(x), with_gradients)


@pytest.mark.parametrize("scheme", [*SCHEMES, PACT(clip=None), LSQ(per_channel=False), LSQPlus(per_channel=False)])
def test_bits_copies_and_states(network: nn.Module, scheme: Any) -> None:
    qnetwork, x = quantized(network, scheme, 8, 8), images(8)
    for w, a in ((2, 7), (5, 3), (None, 4), (4, None), (2, 7)):
        Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, w=w, a=a))
        assert torch.equal(qnetwork(x), quantized(network, scheme, w, a)(x))
    with torch.no_grad():
        for parameter in learned_parameters(qnetwork):
            parameter.mul_(1.25)
    with torch.inference_mode():
        before = qnetwork(x)
    again = Q.quantize(network, Q.get_policy(qnetwork), scheme=scheme, state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), before)
    twin = copy.deepcopy(qnetwork)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.3)
    with torch.inference_mode():
        assert torch.equal(qnetwork(x), before)
        assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_training_lowers_the_loss_and_reaches_every_parameter(network: nn.Module, scheme: str, bits: int) -> None:
    network.add_module("last", nn.BatchNorm1d(4))  # DoReFa's weights are of another size than the float ones
    # A clip that nothing reaches has no gradient; all inputs reach 0.5.
    options = PACT(clip=0.5) if scheme == "pact" else scheme
    qnetwork = quantized(network, options, bits, bits).train()
    x, y = images(32), torch.arange(32) % 4
    extra = learned_parameters(qnetwork)
    assert len(extra) == 5 * len(Q.Scheme.named(scheme).learned)
    rest = [p for p in qnetwork.parameters() if not any(p is other for other in extra)]
    optimizer = torch.optim.SGD([{"params": rest, "weight_decay": 1e-4}, {"params": extra, "weight_decay": 0}], 0.05)
    before = [parameter.detach().clone() for parameter in extra]
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(qnetwork(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is not None for p in qnetwork.parameters())
    assert all((parameter != old).any() for parameter, old in zip(extra, before, strict=True))
    for layer in Q.quant_layers(qnetwork).values():
        rows = layer.quantized_weight().detach().flatten(1)
        for channel in rows if scheme in STEPS else [rows]:
            assert len(channel.unique()) <= 2**bits
        made = layer.scheme.activation(layer, torch.linspace(-3, 3, 999)[:, None], bits)
        assert len(made.unique()) <= 2**bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_has_its_relative_errors(network: nn.Module, scheme: str) -> None:
    for layer in Q.quant_layers(quantized(network, scheme)).values():
        assert (layer.weight_error[1:].diff() <= 1e-4).all()
        assert layer.weight_error[7] < 0.01 < layer.weight_error[0]
        if scheme != "dorefa":  # which loses all above 1
            assert layer.activation_error[7] < layer.activation_error[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_not_finite_is_refused(network: nn.Module, scheme: str) -> None:
    with torch.no_grad():
        network.classifier.weight[0] = math.nan
    with pytest.raises(ValueError, match="'classifier'.*not finite"):
        quantized(network, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_channel_of_zeros_is_finite(network: nn.Module, scheme: str) -> None:
    with torch.no_grad():
        network.pointwise.weight.zero_()
        network.pointwise.bias.zero_()
    qnetwork = quantized(network, scheme)
    out = qnetwork(images(4))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in qnetwork.parameters())
    if scheme in STEPS:
        assert not Q.quant_layers(qnetwork)["pointwise"].quantized_weight().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = values(64).to(dtype)
    step, offset = torch.tensor(0.1), torch.tensor(-0.2)
    for function in (
        lambda x: dorefa_weight(x, 4),
        lambda x: dorefa_activation(x, 4),
        lambda x: pact(x, torch.tensor(0.7), 4, True),
        lambda x: learned_step(x, step, -8, 7),
        lambda x: learned_step(x, step, 0, 15, offset),
    ):
        made = function(x)
        assert made.dtype == dtype
        assert torch.equal(made, function(x.float()).to(dtype))
        (gradient,) = gradients(function, x)
        assert gradient.dtype == dtype


def test_names() -> None:
    assert [type(Q.Scheme.named(name)) for name in SCHEMES] == [DoReFa, PACT, LSQ, LSQPlus]
