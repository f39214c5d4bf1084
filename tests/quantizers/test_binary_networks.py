"""Binary layers: signs without a zero, written-out slopes, scales that are optimal, weights that are clipped or flipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.binary_training import Bop, RPReLU, RSign, WeightClipping, clip_weights, split_parameters, two_stages
from quantizers.schemes.binary import ESTIMATORS, Binary, binarize
from tests.conftest import images, small_network


def slope(estimator: str, x: Tensor) -> list[float]:
    leaf = x.clone().requires_grad_()
    binarize(leaf, estimator).sum().backward()
    assert leaf.grad is not None
    return list(leaf.grad.tolist())


def layer_of(scheme: Binary, weight: Tensor, bits: tuple[int | None, int | None] = (1, 1)) -> Q.QuantLayer:
    linear = nn.Linear(weight.shape[1], len(weight), bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = Q.quantize(linear, {"": bits}, scheme=scheme)
    assert isinstance(layer, Q.QuantLayer)
    return layer


def binary_mlp(scheme: Binary | None = None, seed: int = 0) -> nn.Module:
    """Eight by eight numbers in, four classes out; the first layer's input stays float."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32)),
            *(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4, bias=False), nn.BatchNorm1d(4)),
        )
    return Q.quantize(network, {"1": (1, None), "3": (1, 1), "5": (1, 1)}, scheme=scheme or Binary())


def labelled(count: int = 128) -> tuple[Tensor, Tensor]:
    """The brightest quarter is the class."""
    x = images(count)
    return x - 0.5, F.avg_pool2d(x, 4).flatten(1).argmax(1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sign_has_two_values_and_is_plus_one_at_zero(estimator: str) -> None:
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert binarize(x, estimator).tolist() == [-1, -1, 1, 1, 1, 1]
    assert binarize(x.half(), estimator).dtype == torch.half


def test_slopes_are_those_of_the_papers() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert slope("identity", x) == [1, 1, 1, 1, 1]
    assert slope("clipped", x) == slope("stochastic", x) == [0, 1, 1, 1, 0]
    assert slope("approx_sign", torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])) == [0, 0, 1, 2, 1, 0, 0]
    assert slope("swish_sign", torch.zeros(1)) == [5]
    assert slope("swish_sign", torch.tensor([-1e30, 100.0])) == pytest.approx([0, 0], abs=1e-12)


def test_clipped_weights_at_the_bound_still_learn() -> None:
    """The gradient of torch.clamp there is 1 or 0, depending on torch's version; the next float outside has none."""
    one = torch.tensor(1.0)
    outside = torch.nextafter(one, torch.tensor(2.0))
    assert slope("clipped", torch.stack([-outside, -one, one, outside])) == [0, 1, 1, 0]


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "identity"])
def test_slopes_add_up_to_the_jump_of_a_sign(estimator: str) -> None:
    x = torch.linspace(-10, 10, 200_001, dtype=torch.double)
    assert torch.trapezoid(ESTIMATORS[estimator](x), x).item() == pytest.approx(2, abs=1e-3)


def test_stochastic_signs_are_as_likely_as_the_hard_sigmoid_says() -> None:
    torch.manual_seed(0)
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]).repeat(20_000, 1)
    drawn = binarize(x, "stochastic", random=True)
    assert drawn.unique().tolist() == [-1, 1]
    assert ((drawn.mean(0) + 1) / 2).tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1], abs=0.02)
    torch.manual_seed(0)
    assert torch.equal(binarize(x, "stochastic", random=True), drawn)


def test_stochastic_weights_are_drawn_in_training_only_and_never_kept() -> None:
    layer = layer_of(Binary("stochastic"), torch.full((4, 500), 0.1))
    assert layer.train().quantized_weight().unique().tolist() == [-1, 1]
    with torch.no_grad():  # as when the statistics of norms are made again
        assert (layer.quantized_weight() == 1).all()
    assert (layer.eval().quantized_weight() == 1).all()
    x = torch.full((3, 500), 0.1)
    noisy = layer_of(Binary(activation_estimator="stochastic"), torch.ones(1, 500))
    assert (noisy.train()(x) < 500).all()
    assert torch.equal(noisy.eval()(x), torch.full((3, 1), 500.0))


def test_xnor_scales_leave_the_smallest_squared_error() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    made = layer_of(Binary(scaling="xnor"), weight).quantized_weight()
    alpha = weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(made, alpha * weight.sign())
    error = (weight - made).square().sum(1)
    torch.testing.assert_close(error, weight.square().sum(1) - 40 * alpha[:, 0].square())
    for factor in (0.98, 1.02):
        assert ((weight - factor * made).square().sum(1) > error).all()


def test_xnor_gradient_is_that_of_the_paper() -> None:
    weight = torch.tensor([[-2.0, -1.0, 0.5, 0.0], [0.25, -0.25, 0.25, -0.25]])
    layer = layer_of(Binary(scaling="xnor"), weight)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    (layer.quantized_weight() * upstream).sum().backward()
    alpha, inside = torch.tensor([[0.875], [0.25]]), torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1]])
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, upstream * (1 / 4 + alpha * inside))


def test_a_channel_of_zeros_stays_zero_under_a_scale() -> None:
    layer = layer_of(Binary(scaling="xnor"), torch.tensor([[0.0, 0.0], [1.0, -3.0]]))
    assert layer.quantized_weight().tolist() == [[0, 0], [2, -2]]


@pytest.mark.parametrize("scaling", ["none", "xnor"])
def test_layers_compute_what_their_formula_says(scaling: str) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer = Q.quantize(conv, {"": (1, 1)}, scheme=Binary(scaling=scaling))
    assert isinstance(layer, Q.QuantLayer)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    alpha = conv.weight.abs().mean((1, 2, 3), keepdim=True) if scaling == "xnor" else 1.0
    signs = torch.where(conv.weight >= 0, 1.0, -1.0)
    expected = F.conv2d(torch.where(x >= 0, 1.0, -1.0), signs * alpha, conv.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    layer.activation_bits = None  # BinaryConnect
    torch.testing.assert_close(layer(x), F.conv2d(x, signs * alpha, conv.bias, padding=1))


@pytest.mark.parametrize("bits", [(2, 1), (1, 2), (1, 4), (8, 8), (None, 1), (2, None), (None, 5)])
@pytest.mark.parametrize("scaling", ["none", "xnor"])
def test_other_bits_are_those_of_the_linear_scheme(
    network: nn.Module, bits: tuple[int | None, int | None], scaling: str
) -> None:
    """Each operand by itself: one bit is a sign, wherever it is, and wider ones are the linear scheme's."""
    scheme = Binary("swish_sign", "approx_sign", scaling)
    policy = Q.BitPolicy.uniform(network, *bits)
    ours = Q.quant_layers(Q.quantize(network, policy, scheme=scheme, calibrate=images(32)))
    linear = Q.quant_layers(Q.quantize(network, policy, calibrate=images(32)))
    signs = Q.quant_layers(Q.quantize(network, dict.fromkeys(policy, (1, 1)), scheme=scheme))
    for name, layer in ours.items():
        like_weight = signs[name] if bits[0] == 1 else linear[name]
        like_input = signs[name] if bits[1] == 1 else linear[name]
        gradients = []
        for other in (layer, like_weight):
            weight = other.quantized_weight()
            gradients.append(torch.autograd.grad(weight.square().sum(), other.weight)[0])
        assert torch.equal(layer.quantized_weight(), like_weight.quantized_weight())
        assert torch.equal(gradients[0], gradients[1])
        if bits[1] is not None:
            leaf = (3 * images(4, seed=2).flatten() - 1).requires_grad_()
            made = [other.scheme.activation(other, leaf, bits[1]) for other in (layer, like_input)]
            assert torch.equal(made[0], made[1])
            slopes = [torch.autograd.grad(x.square().sum(), leaf)[0] for x in made]
            assert torch.equal(slopes[0], slopes[1])
            steps = [other.scheme.activation_step(other, bits[1]) for other in (layer, like_input)]
            assert torch.equal(steps[0], steps[1])


def test_only_wider_inputs_need_data(network: nn.Module) -> None:
    """Signs have no scale; a network that was quantized without data says so before it computes with one."""
    for bits in ((1, 1), (1, None), (4, 1), (8, None)):
        assert not Binary().needs_data_at(*bits)
        assert Q.quantize(network, Q.BitPolicy.uniform(network, *bits), scheme="binary")(images(2)).isfinite().all()
    for bits in ((1, 2), (None, 8)):
        assert Binary().needs_data_at(*bits)
        with pytest.raises(ValueError, match="give `calibrate`"):
            Q.quantize(network, Q.BitPolicy.uniform(network, *bits), scheme="binary")
    blind = Q.quantize(network, Q.BitPolicy.uniform(network, 1, 1), scheme="binary")
    wider = {**Q.get_policy(blind), "hidden": (1, 4)}
    with pytest.raises(ValueError, match="layer 'hidden': its input has no scale for 4 bits"):
        Q.set_policy(blind, wider)
    assert Q.get_policy(blind) == Q.BitPolicy.uniform(network, 1, 1)
    seeing = Q.quantize(network, Q.get_policy(blind), scheme="binary", calibrate=images(32))
    Q.set_policy(seeing, wider)
    again = Q.quantize(network, wider, scheme="binary", state=Q.quantizer_state(seeing))
    assert torch.equal(again(images(4)), seeing(images(4)))
    Q.set_policy(again, {**wider, "stem": (8, 8)})
    with pytest.raises(ValueError, match="layer 'hidden'"):
        Q.quantize(network, wider, scheme="binary", state=Q.quantizer_state(blind))


@pytest.mark.parametrize("scaling", ["none", "xnor"])
def test_every_width_has_its_quantization_error(network: nn.Module, scaling: str) -> None:
    """So that a search may choose among one to eight bits: those of one bit are left after the best factor."""
    seen: dict[str, Tensor] = {}
    for name in Q.BitPolicy.uniform(network, 1, 1):
        module = network.get_submodule(name)
        module.register_forward_pre_hook(lambda module, x, name=name: seen.__setitem__(name, x[0].detach().double()))
    network(images(32))
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, 1, 1), scheme=Binary(scaling=scaling), calibrate=images(32))
    for name, layer in Q.quant_layers(qnetwork).items():
        of_weights, of_activations = layer.scheme.quantization_errors(layer)
        assert of_weights.shape == of_activations.shape == (len(Q.WIDTHS),)
        assert (of_weights.diff() < 0).all()
        weight = layer.weight.detach().double().flatten(1)
        alpha = weight.abs().mean(1, keepdim=True)
        left = (weight - alpha * weight.sign()).square().sum() / weight.square().sum()
        assert of_weights[0].item() == pytest.approx(left.item(), rel=1e-4)
        x, signs = seen[name].flatten(), torch.where(seen[name].flatten() >= 0, 1.0, -1.0).double()
        best = (x @ signs) / len(x)
        left = (x - best * signs).square().sum() / x.square().sum()
        assert of_activations[0].item() == pytest.approx(left.item(), rel=1e-3)
        assert of_activations[1:].max() < 1
        assert of_activations[7] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_estimator": "tanh"}, "estimator 'tanh'; known: identity, clipped"),
        ({"activation_estimator": "tanh"}, "estimator 'tanh'"),
        ({"scaling": "mean"}, "scaling 'mean'; known: none, xnor"),
    ],
)
def test_unknown_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Binary(**options)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        layer_of(Binary(), torch.tensor([[1.0, math.nan]]))


def test_a_binary_network_is_a_copy_that_keeps_the_keys(network: nn.Module) -> None:
    policy = Q.BitPolicy.uniform(network, 1, 1)
    first = {**policy, "stem": (1, None), "classifier": (None, None)}
    x = images(4)
    qnetwork = Q.quantize(network, first, scheme=Binary(scaling="xnor"))
    assert list(qnetwork.state_dict()) == list(network.state_dict())
    small_network(1).load_state_dict(qnetwork.state_dict(), strict=True)
    assert Q.get_policy(qnetwork) == first
    twin, before = copy.deepcopy(qnetwork), qnetwork(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.get_submodule("hidden").weight.neg_()  # type: ignore[operator,union-attr]
    assert not torch.equal(twin(x), before)
    assert torch.equal(qnetwork(x), before)
    again = Q.quantize(network, first, scheme=Binary(scaling="xnor"), state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), before)
    Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, None, None))
    assert torch.equal(qnetwork(x), network(x))
    assert torch.equal(Q.float_copy(qnetwork)(x), network(x))


@pytest.mark.parametrize(
    "scheme",
    [
        Binary(),
        Binary("identity", "approx_sign"),
        Binary("swish_sign", "swish_sign", "xnor"),
        Binary("stochastic"),
        Binary("clipped", "stochastic"),
    ],
)
def test_training_lowers_the_loss_and_reaches_every_parameter(scheme: Binary) -> None:
    torch.manual_seed(0)
    network, (x, y) = binary_mlp(scheme), labelled()
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    with torch.no_grad():
        before = F.cross_entropy(network(x), y)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        optimizer.step()
    with torch.no_grad():
        assert F.cross_entropy(network(x), y) < 0.8 * before


def test_rsign_without_thresholds_is_a_sign_and_learns_them() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    sign = RSign(3, "clipped")
    assert torch.equal(sign(x), binarize(x))
    with torch.no_grad():
        sign.threshold.copy_(torch.tensor([0.0, 0.5, -0.5]))
    shifted = x - sign.threshold.view(3, 1, 1)
    assert torch.equal(sign(x), torch.where(shifted >= 0, 1.0, -1.0))
    sign(x).sum().backward()
    assert sign.threshold.grad is not None
    assert torch.equal(sign.threshold.grad, -(shifted.abs() <= 1).float().sum((0, 2, 3)))
    assert torch.equal(RSign(3)(x[:, :, 0, 0]), binarize(x[:, :, 0, 0]))


def test_rprelu_bends_and_shifts_per_channel() -> None:
    bend = RPReLU(2)
    x = torch.tensor([[-1.0, 2.0], [3.0, -2.0], [1.0, 0.0]])
    assert torch.equal(bend(x), F.prelu(x, torch.tensor([0.25])))
    with torch.no_grad():
        for parameter, values in ((bend.shift_in, [1.0, 0]), (bend.slope, [0.5, -1]), (bend.shift_out, [10.0, 20])):
            parameter.copy_(torch.tensor(values))
    assert bend(x).tolist() == [[9, 22], [12, 22], [10, 20]]
    assert bend(x.view(3, 2, 1, 1)).flatten(1).tolist() == bend(x).tolist()


def test_clipping_counts_what_it_clips() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network = Q.quantize(network, {"0": (1, None), "1": (None, None)}, scheme="binary")
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.0]]))
        network[1].weight.fill_(9.0)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    clipping = clip_weights(network)
    assert clipping.share == clipping.mean_share == 0
    handle = optimizer.register_step_post_hook(clipping)
    network[0].weight.grad = torch.tensor([[-0.5, 0.5], [-0.5, 1.0]])
    optimizer.step()
    assert network[0].weight.tolist() == [[1, -1], [1, -1]]
    assert clipping.share == 0.5  # two arrived at a bound by themselves
    network[0].weight.grad.zero_()
    optimizer.step()
    assert (clipping.share, clipping.mean_share) == (0, 0.25)
    assert (network[1].weight == 9).all()
    handle.remove()
    network[0].weight.grad.fill_(5.0)
    optimizer.step()
    assert network[0].weight.min() < -1
    with pytest.raises(ValueError, match="below"):
        clip_weights(network, 1, -1)


def train(clip: bool, lr: float, steps: int = 40) -> tuple[nn.Module, WeightClipping]:
    network, (x, y) = binary_mlp(), labelled()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    clipping = clip_weights(network, *(() if clip else (-math.inf, math.inf)))
    optimizer.register_step_post_hook(clipping)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network, clipping


def test_clipping_changes_a_network_only_where_weights_are_clipped() -> None:
    """At a low learning rate from a usual start no weight ever leaves the bounds, and a comparison would be one of twins."""
    for lr, works in ((1e-3, False), (0.2, True)):
        (clipped, clipping), (free, _) = train(True, lr), train(False, lr)
        assert (clipping.mean_share > 0.01) == works
        assert (clipping.mean_share > 0) == works
        same = all(torch.equal(a, b) for a, b in zip(clipped.parameters(), free.parameters(), strict=True))
        assert same != works


def test_bop_flips_where_the_momentum_agrees_and_is_large() -> None:
    tau = 1e-3
    cases = [  # weight, momentum, weight after
        (1.0, 2 * tau, -1.0),
        (1.0, -2 * tau, 1.0),
        (-1.0, -2 * tau, 1.0),
        (-1.0, 2 * tau, -1.0),
        (1.0, 0.5 * tau, 1.0),
        (-1.0, -0.5 * tau, -1.0),
        (1.0, tau, 1.0),
        (1.0, 0.0, 1.0),
    ]
    weight = nn.Parameter(torch.tensor([[case[0] for case in cases]]))
    optimizer = Bop([weight], lr=1.0, threshold=float(torch.tensor(tau)))
    weight.grad = torch.tensor([[case[1] for case in cases]])
    optimizer.step()
    assert weight.tolist() == [[case[2] for case in cases]]
    assert optimizer.flip_ratio == 2 / 8


def test_bop_averages_gradients() -> None:
    weight = nn.Parameter(torch.tensor([[0.3, 0.0]]))
    optimizer = Bop([weight], lr=0.25, threshold=0.3)
    assert weight.tolist() == [[1, 1]]
    weight.grad = torch.tensor([[1.0, -1.0]])
    momentum = 0.0
    for _ in range(2):
        optimizer.step()
        momentum = 0.75 * momentum + 0.25
        assert optimizer.state[weight]["momentum"][0, 0].item() == pytest.approx(momentum)
        assert weight.tolist() == [[1.0 if momentum <= 0.3 else -1.0, 1.0]]
    assert optimizer.flip_ratio == 0.5
    again = Bop([nn.Parameter(weight.detach().clone())])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["threshold"] == 0.3


def test_bop_trains_beside_a_usual_optimizer_and_weights_stay_signs() -> None:
    torch.manual_seed(0)
    network, (x, y) = binary_mlp(), labelled()
    binary, others = split_parameters(network)
    assert [p.shape for p in binary] == [(32, 64), (32, 32), (4, 32)]
    assert len(binary) + len(others) == len(list(network.parameters()))
    optimizers = Bop(binary, lr=1e-2, threshold=1e-6), torch.optim.Adam(others, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], 40)
    losses, flips = [], []
    for _ in range(40):
        loss = F.cross_entropy(network(x), y)
        network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        losses.append(loss.item())
        flips.append(optimizers[0].flip_ratio)
    assert all(weight.detach().abs().unique().tolist() == [1] for weight in binary)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert flips[0] > 0
    assert sum(flips[-5:]) < sum(flips[:5])


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 2.0}, {"threshold": -1.0}])
def test_bop_refuses_what_means_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="gamma|threshold"):
        Bop([nn.Parameter(torch.ones(1, 1))], **bad)
    norm = nn.Parameter(torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"weights only.*\(3,\)"):
        Bop([norm])
    assert norm.tolist() == [0.5] * 3


def test_two_stages_clip_late_and_average_less() -> None:
    first, second = two_stages(9)
    assert (first.epochs, second.epochs) == (6, 3)
    assert (first.weight_estimator, first.clip) == ("identity", False)
    assert (second.weight_estimator, second.clip) == ("clipped", True)
    assert first.lr > first.last_lr >= second.lr > second.last_lr
    assert second.norm_momentum > first.norm_momentum  # torch's momentum is the new batch's weight
    assert [first.rate(0), first.rate(5)] == pytest.approx([first.lr, first.last_lr])
    with pytest.raises(ValueError, match="2 epochs"):
        two_stages(1)


def test_entering_a_stage_sets_the_network_and_the_optimizer() -> None:
    network, (x, y) = binary_mlp(Binary(scaling="xnor")), labelled(16)
    optimizer = torch.optim.Adam(network.parameters(), 1.0)
    counts = []
    for stage in two_stages(2, lr=0.1):
        clipping = stage.enter(network, optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch, stage=stage: stage.rate(epoch) / stage.lr)  # type: ignore[misc]
        assert optimizer.param_groups[0]["lr"] == stage.lr
        for layer in Q.quant_layers(network).values():
            assert layer.scheme == Binary(stage.weight_estimator, scaling="xnor")
        assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm1d)} == {stage.norm_momentum}
        for _ in range(15):
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        schedule.step()
        largest = max(float(weight.detach().abs().max()) for weight in split_parameters(network)[0])
        assert (largest > 1) == (clipping is None)
        counts.append(clipping)
    assert counts[0] is None
    assert counts[1] is not None
    assert counts[1].mean_share > 0
