"""What hardware can ask of a scheme: one scale per tensor, powers of two, signed or unsigned integers, zero points."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q

RULES = ("mse", "max", "percentile", "kl", "output")


def network_and_inputs(negative: bool = True) -> tuple[nn.Module, Tensor]:
    """Two layers behind a SiLU or a ReLU, with output channels of very different weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        between = nn.SiLU() if negative else nn.ReLU()
        network = nn.Sequential(nn.Linear(5, 8), between, nn.Linear(8, 4)).eval()
        with torch.no_grad():
            network[2].weight[0] *= 20
        return network, torch.randn(120, 5)


def quantized(scheme: str | Q.Scheme, w: int | None = 4, a: int | None = 4, negative: bool = True, **options: Any) -> Any:
    network, x = network_and_inputs(negative)
    return Q.quantize(network, Q.BitPolicy.uniform(network, w, a), scheme=scheme, calibrate=x, **options)


def is_power_of_two(values: Tensor) -> bool:
    exponents = values.double().log2()
    return bool(torch.equal(exponents, exponents.round()))


# One scale per tensor


@pytest.mark.parametrize("rule", RULES)
def test_one_scale_per_tensor(rule: str) -> None:
    made = quantized(Q.Linear(rule, per_channel=False))
    each = quantized(Q.Linear(rule))
    layer = made[2]
    assert layer.weight_scale.shape == (9, 1)
    for bits in Q.WIDTHS:
        layer.weight_bits = each[2].weight_bits = bits
        _, scale, _ = layer.scheme.integer_weights(layer)
        assert scale.shape == (4,)
        assert len(scale.unique()) == 1
        if bits > 1:
            high = Q.integer_range(bits, True)[1]
            # The rule is that of a weight with one channel: from the largest of all downwards.
            assert layer.weight_scale[Q.row_of(bits)] <= layer.weight.abs().max() / high * (1 + 1e-6)
        if rule == "output":
            continue  # it makes another error small
        # One scale for channels of different sizes loses more.
        assert layer.weight_error[Q.row_of(bits)] > each[2].weight_error[Q.row_of(bits)]


@pytest.mark.parametrize("rule", ["mse", "output"])
def test_one_scale_per_tensor_is_that_of_the_tensor_as_one_channel(rule: str) -> None:
    """Where a layer has one output channel, both are the same, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network, x = nn.Sequential(nn.Linear(9, 1)), torch.randn(64, 9)
    made = [Q.quantize(network, {"0": (4, 8)}, scheme=Q.Linear(rule, per_channel=each), calibrate=x) for each in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*(Q.quantizer_state(one).values() for one in made), strict=True))


def test_one_scale_goes_with_gptq_correction_and_reconstruction() -> None:
    network, x = network_and_inputs()
    scheme = Q.Linear("output", per_channel=False)
    policy = Q.BitPolicy.uniform(network, 3, 8)
    qnetwork: Any = Q.quantize(network, policy, scheme=scheme, calibrate=x, rounding="gptq", correction="sequential")
    assert Q.reconstruct(qnetwork, network, [x], iterations=3).after < 1
    codes, scale, _ = scheme.integer_weights(qnetwork[2])
    assert codes.abs().max() <= 3
    assert torch.equal(codes.float() * scale.float()[:, None], qnetwork[2].quantized_weight())
    again = Q.quantize(network, policy, scheme=scheme, state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), qnetwork(x))


# Powers of two


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_scales_are_powers_of_two_at_every_width(rule: str, per_channel: bool, asymmetric: bool) -> None:
    if rule == "kl" and asymmetric:
        return
    qnetwork = quantized(Q.Linear(rule, True, asymmetric, per_channel=per_channel))
    for layer in Q.quant_layers(qnetwork).values():
        assert is_power_of_two(layer.weight_scale)
        assert is_power_of_two(layer.activation_scale)
        assert layer.activation_error[8] < 1e-4 * layer.activation_error[7]


def test_learned_steps_are_used_as_powers_of_two_and_trained() -> None:
    _, x = network_and_inputs()
    qnetwork: Any = quantized(Q.LSQ(power_of_two=True), 4, 16)
    layer = qnetwork[0]
    for bits in (4, 8, 16):
        assert is_power_of_two(layer.scheme.weight_step(layer, bits))
        assert is_power_of_two(layer.scheme.activation_step(layer, bits))
    assert not is_power_of_two(layer.weight_scale)  # what is learned stays as it is
    codes, scale, _ = layer.scheme.integer_weights(layer)
    assert torch.equal(codes.float() * scale.float()[:, None], layer.quantized_weight().detach())
    qnetwork.train()(x).square().mean().backward()
    assert layer.weight_scale.grad[3].any()
    assert layer.activation_scale.grad[8].any()


# Signed and unsigned integers


@pytest.mark.parametrize("scheme", [Q.Linear(activations="signed"), Q.Linear("output", activations="signed")])
def test_signed_integers_where_nothing_is_negative(scheme: Q.Linear) -> None:
    qnetwork = quantized(scheme, negative=False)
    plain = quantized(Q.Linear(scheme.calibration), negative=False)
    layer, before = qnetwork[2], plain[2]
    assert not layer.signed
    for bits in (2, 4, 8, 16):
        layer.activation_bits = before.activation_bits = bits
        codes = layer.scheme.integer_activations(layer)
        assert codes.signed
        assert not before.scheme.integer_activations(before).signed
        high = Q.integer_range(bits, True)[1]
        levels = layer.scheme.activation(layer, torch.linspace(0, 1e3, 20_001), bits).unique() / codes.scale
        assert levels.max().round() == high  # half of the levels, as hardware has them
        assert layer.activation_error[Q.row_of(bits)] > before.activation_error[Q.row_of(bits)]
    # One signed bit is a sign.
    assert len(layer.scheme.activation(layer, torch.linspace(-1, 1, 10), 1).unique()) == 2


def test_signed_integers_are_as_before_where_something_is_negative() -> None:
    made, plain = (Q.quantizer_state(quantized(Q.Linear(activations=kind))) for kind in ("signed", "auto"))
    assert all(torch.equal(made[key], plain[key]) for key in plain)


@pytest.mark.parametrize("scheme", [Q.Linear(activations="unsigned"), Q.LSQ(activations="unsigned")])
def test_a_negative_input_is_refused_where_integers_are_unsigned(scheme: Q.Scheme) -> None:
    with pytest.raises(ValueError, match=r"^layer '0': its input is negative in places, which unsigned integers of 4 bits"):
        quantized(scheme)
    network, x = network_and_inputs(negative=False)
    policy = {"0": (4, None), "2": (4, 4)}
    qnetwork: Any = Q.quantize(network, policy, scheme=scheme, calibrate=x)  # the first stays in float
    assert not scheme.has_signed_inputs(qnetwork[2], 4)
    with pytest.raises(ValueError, match="^layer '0': its input is negative in places, which unsigned integers of 16 bits"):
        Q.set_policy(qnetwork, {**policy, "0": (4, 16)})
    assert Q.get_policy(qnetwork) == policy


def test_a_zero_point_makes_a_negative_input_unsigned() -> None:
    scheme = Q.Linear(asymmetric=True, activations="unsigned")
    qnetwork = quantized(scheme)
    auto = quantized(Q.Linear(asymmetric=True))
    for bits in (2, 4, 8, 16):
        for layer in (qnetwork[0], qnetwork[2]):
            layer.activation_bits = bits
            assert not scheme.integer_activations(layer).signed
            assert 0 < scheme.zero_point(layer, bits) < 2**bits
        for key, tensor in Q.quantizer_state(auto).items():
            assert torch.equal(Q.quantizer_state(qnetwork)[key], tensor)
    with pytest.raises(
        ValueError, match="^layer '0': its input is negative in places, which unsigned integers of 1 bit aren't"
    ):
        Q.set_policy(qnetwork, {"0": (4, 1), "2": (4, 4)})


def test_signed_with_zero_points_are_the_same_values() -> None:
    """Integers with a zero point less 2^(b-1) are signed: the grid of an input that is never negative keeps all its levels."""
    made, auto = (quantized(Q.Linear(asymmetric=True, activations=kind), negative=False) for kind in ("signed", "auto"))
    assert all(
        torch.equal(a, b) for a, b in zip(Q.quantizer_state(made).values(), Q.quantizer_state(auto).values(), strict=True)
    )
    _, x = network_and_inputs()
    assert torch.equal(made(x), auto(x))


@pytest.mark.parametrize("activations", ["auto", "signed", "unsigned"])
def test_an_input_that_was_never_seen_says_so_first(activations: str) -> None:
    network, _ = network_and_inputs()
    scheme = Q.Linear(activations=activations)
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, 4, None), scheme=scheme)
    with pytest.raises(ValueError, match="^layer '0': its input has no scale for 4 bits, since calibration saw none"):
        Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, 4, 4))


def test_unknown_integers_are_refused() -> None:
    for make in (Q.Linear, Q.LSQ):
        with pytest.raises(ValueError, match="^unknown activations 'both'; known: auto, signed, unsigned$"):
            make(activations="both")
    with pytest.raises(ValueError, match="^unknown activations 'both'; known: auto, signed, unsigned$"):
        Q.DoReFa().with_capabilities(activations="both")
    with pytest.raises(ValueError, match="scheme 'lsqplus' has inputs with a learned offset"):
        Q.LSQPlus(activations="signed")


# Records


def test_options_are_recorded_where_they_are_no_defaults() -> None:
    """Records of what there was before are what they were."""
    assert Q.Linear().options() == {"calibration": "mse", "power_of_two": False, "asymmetric": False}
    assert Q.LSQ().options() == {"per_channel": True}
    schemes = [
        Q.Linear("max", per_channel=False, activations="unsigned"),
        Q.LSQ(False, power_of_two=True, activations="signed"),
    ]
    for scheme in schemes:
        record = json.loads(json.dumps(scheme.record()))
        assert Q.schemes_from_records({"a": record}) == {"a": scheme}
    assert schemes[0].options()["per_channel"] is False
    assert schemes[1].options()["activations"] == "signed"


def test_options_of_later_are_given_by_keyword() -> None:
    """So that schemes on ours keep the order of theirs."""
    assert Q.KMeans("max", False, False, False).keep_zeros is False
    with pytest.raises(TypeError):
        Q.Linear("max", False, False, False)  # type: ignore[misc]


# What hardware can do


def test_linear_obeys() -> None:
    scheme = Q.Linear("output")
    assert scheme.with_capabilities() is scheme
    assert scheme.with_capabilities(per_channel=True, power_of_two=False, activations="auto", zero_points=False) is scheme
    told = scheme.with_capabilities(per_channel=False, power_of_two=True, activations="signed")
    assert told == Q.Linear("output", True, per_channel=False, activations="signed")
    assert scheme.with_capabilities(zero_points=True, activations="unsigned") == Q.Linear(
        "output", asymmetric=True, activations="unsigned"
    )
    asymmetric = Q.Scheme.named("linear-asymmetric")
    assert not asymmetric.with_capabilities(zero_points=False).has_zero_points
    with pytest.raises(ValueError, match="calibration 'kl' finds no zero points"):
        Q.Linear("kl").with_capabilities(zero_points=True)


@pytest.mark.parametrize(
    ("scheme", "wishes", "lacks"),
    [
        (Q.DoReFa(), {"activations": "signed"}, "signed integers for all activations"),
        (Q.DoReFa(), {"per_channel": True}, "one scale per output channel of the weights"),
        (Q.PACT(), {"power_of_two": True}, "scales that are powers of two"),
        (Q.PACT(), {"activations": "unsigned"}, "unsigned integers for all activations"),
        (Q.Binary(), {"activations": "unsigned"}, "unsigned integers for all activations"),
        (Q.LSQ(), {"zero_points": True}, "zero points"),
        (Q.LSQPlus(), {"power_of_two": True}, "scales that are powers of two"),
        (Q.KMeans(), {"per_channel": True}, "one scale per output channel of the weights"),
    ],
)
def test_what_a_scheme_cant_do_is_said(scheme: Q.Scheme, wishes: dict[str, Any], lacks: str) -> None:
    with pytest.raises(ValueError, match=f"^scheme '{scheme.name}' can't do {lacks}; schemes that can be told more: linear"):
        scheme.with_capabilities(**wishes)


@pytest.mark.parametrize(
    ("scheme", "wishes"),
    [
        (Q.DoReFa(), {"activations": "unsigned", "per_channel": False, "zero_points": False}),
        (Q.PACT(), {"activations": "auto", "per_channel": False}),
        (Q.Binary(), {"zero_points": False, "activations": "auto"}),
        (Q.KMeans(), {"per_channel": False}),
    ],
)
def test_a_scheme_that_does_so_anyway_is_let_be(scheme: Q.Scheme, wishes: dict[str, Any]) -> None:
    assert scheme.with_capabilities(**wishes) is scheme


@pytest.mark.parametrize("name", Q.scheme_names())
def test_whoever_can_be_told_obeys(name: str) -> None:
    """Every wish that a scheme takes is what it does then, for every built-in scheme."""
    scheme = Q.Scheme.named(name)
    wishes: list[dict[str, Any]] = [
        {"per_channel": False},
        {"power_of_two": True},
        {"activations": "signed"},
        {"activations": "unsigned"},
        {"zero_points": True},
    ]
    for wish in wishes:
        try:
            told = scheme.with_capabilities(**wish)
        except ValueError:
            continue
        assert told.with_capabilities(**wish) is told
        assert told.name == name
        network, x = network_and_inputs(negative="activations" not in wish)
        bits = max(2, scheme.least_bits)
        qnetwork: Any = Q.quantize(network, {"0": (bits, None), "2": (bits, 16)}, scheme=told, calibrate=x)
        layer = qnetwork[2]
        if "power_of_two" in wish:
            assert is_power_of_two(told.activation_step(layer, 16))
        if "zero_points" in wish:
            assert told.zero_point(layer, 16) > 0
        if "activations" in wish and not told.has_zero_points:
            assert told.has_signed_inputs(layer, 16) == (wish["activations"] == "signed")
        if "per_channel" in wish and told.has_integer_weights:
            assert len(told.weight_step(layer, 2).unique()) == 1


def test_a_scheme_of_ones_own_is_told_by_its_attributes() -> None:
    class Own(Q.Linear):
        choices = {"power_of_two": "power_of_two"}
        habits = {"activations": "auto", "per_channel": True}

    assert Own().with_capabilities(power_of_two=True, per_channel=True) == Own(power_of_two=True)
    with pytest.raises(ValueError, match="can't do one scale for all weights of a layer"):
        Own().with_capabilities(per_channel=False)

    class Silent(Q.Scheme):
        """Says nothing of itself."""

    silent = Silent()
    assert silent.with_capabilities(zero_points=False, activations="auto") is silent
    with pytest.raises(ValueError, match="can't do signed integers for all activations"):
        silent.with_capabilities(activations="signed")
