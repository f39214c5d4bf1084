"""What every scheme says about itself is true: its attributes, its integers, its errors, its records."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from tests.conftest import images, small_network

SCHEMES: dict[str, Q.Scheme] = {
    "linear": Q.Linear("percentile", True),
    "dorefa": Q.DoReFa(),
    "pact": Q.PACT(clip=None),
    "lsq": Q.LSQ(),
    "lsqplus": Q.LSQPlus(per_channel=False),
    "kmeans": Q.KMeans(keep_zeros=False),
    "binary": Q.Binary("identity", "approx_sign", "xnor"),
    "main-subsidiary": Q.MainSubsidiary(),
}
Bits = tuple[int | None, int | None]


def signed_network() -> nn.Module:
    """The small network with inputs of layers that are negative in places."""
    network = small_network()
    for name in ("relu", "relu2", "relu3"):
        setattr(network, name, nn.Tanh())
    return network


def first_bits(scheme: Q.Scheme) -> Bits:
    return scheme.least_bits, 2


def widths_of(layer: Q.QuantLayer) -> list[Bits]:
    """All pairs that a layer's scheme takes."""
    found = []
    for bits in itertools.product((None, *range(1, 9)), repeat=2):
        try:
            layer.scheme.check(bits[0], bits[1], signed=layer.signed)
        except ValueError:
            continue
        found.append(bits)
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_least_bits_are_the_least_that_check_takes(name: str) -> None:
    scheme = SCHEMES[name]
    assert scheme.name == name
    scheme.check(scheme.least_bits, None)
    if scheme.least_bits > 1:
        with pytest.raises(ValueError, match=f"{name} has no weights of {scheme.least_bits - 1} bit"):
            scheme.check(scheme.least_bits - 1, None)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_integers_are_where_the_attributes_say(name: str, signed: bool) -> None:
    """Codes times scale are the layer's own values at every width, and within the range that they say."""
    network, scheme = small_network(), SCHEMES[name]
    if signed:
        network = signed_network()
    x = images(16) - signed / 2
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, *first_bits(scheme)), scheme=scheme, calibrate=x)
    layer = Q.quant_layers(qnetwork)["pointwise"]
    for w, a in widths_of(layer):
        layer.weight_bits, layer.activation_bits = w, a
        if w is not None:
            check_weights(layer, w)
        if a is not None:
            check_activations(layer, a)


def check_weights(layer: Q.QuantLayer, bits: int) -> None:
    scheme = layer.scheme
    odd = scheme.name in ("dorefa", "pact") and bits > 1
    if not scheme.has_integer_weights:
        with pytest.raises(ValueError, match=f"^weights of scheme '{scheme.name}' are no multiples of a step$"):
            scheme.integer_weights(layer)
        return
    if odd and bits == 8:
        with pytest.raises(ValueError, match="^weights of 8 bits in scheme .* odd integers of 9 bits; at most 7 bits are$"):
            scheme.integer_weights(layer)
        return
    codes, scale, stored = scheme.integer_weights(layer)
    assert codes.dtype == torch.int8
    assert codes.shape == layer.weight.shape
    assert (scale.dtype, scale.shape) == (torch.float64, (len(codes),))
    assert stored == scheme.integer_weight_bits(bits) == bits + odd
    product = codes.float() * scale.float().view(-1, 1, 1, 1)
    if odd:
        torch.testing.assert_close(product, layer.quantized_weight().detach(), rtol=0, atol=3e-7)
    else:
        assert torch.equal(product, layer.quantized_weight().detach())
    if bits == 1 and scheme.name != "main-subsidiary":
        assert set(codes.unique().tolist()) == {-1, 1}


def check_activations(layer: Q.QuantLayer, bits: int) -> None:
    scheme = layer.scheme
    if not scheme.has_integer_activations:
        with pytest.raises(ValueError, match=f"^activations of scheme '{scheme.name}' have an offset$"):
            scheme.integer_activations(layer)
        return
    scale, width, signed, narrow = scheme.integer_activations(layer)
    assert width == bits
    low, high = Q.integer_range(bits, signed, narrow)
    zero_point = scheme.zero_point(layer, bits)
    with torch.no_grad():
        levels = scheme.activation(layer, torch.linspace(-40, 40, 30_001).view(1, -1, 1, 1), bits).unique()
    codes = levels / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert [codes.min().round().item(), codes.max().round().item()] == [low - zero_point, high - zero_point]


@pytest.mark.parametrize("name", SCHEMES)
def test_training_moves_the_step_where_the_attribute_says(name: str) -> None:
    network, scheme = small_network(), SCHEMES[name]
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, *first_bits(scheme)), scheme=scheme, calibrate=images(16))
    layer = Q.quant_layers(qnetwork)["stem"]
    step = layer.scheme.activation_step(layer, 2).detach().clone()
    with torch.no_grad():
        for parameter in Q.learned_parameters(qnetwork):
            parameter.mul_(1.5)
    assert (layer.scheme.activation_step(layer, 2) != step).item() == scheme.trains_step


@pytest.mark.parametrize("name", SCHEMES)
def test_needed_data_are_asked_for_and_no_other(name: str) -> None:
    network, scheme = small_network(), SCHEMES[name]
    weights = scheme.least_bits
    for bits in ((weights, None), (weights, 1), (weights, 4), (None, 4)):
        policy = Q.BitPolicy.uniform(network, *bits)
        assert not scheme.needs_data_at(*bits) or scheme.needs_data
        if scheme.needs_data_at(*bits):
            with pytest.raises(ValueError, match="give `calibrate`"):
                Q.quantize(network, policy, scheme=scheme)
        else:
            assert Q.quantize(network, policy, scheme=scheme)(images(2)).isfinite().all()


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.needs_data])
def test_bits_that_need_data_are_not_set_without(name: str) -> None:
    network, scheme = small_network(), SCHEMES[name]
    blind = Q.quantize(network, Q.BitPolicy.uniform(network, scheme.least_bits, None), scheme=scheme)
    before = Q.get_policy(blind)
    with pytest.raises(ValueError, match="layer 'depthwise': its input has no scale for 4 bits, since calibration saw none"):
        Q.set_policy(blind, {**before, "depthwise": (scheme.least_bits, 4)})
    assert Q.get_policy(blind) == before


@pytest.mark.parametrize("name", SCHEMES)
def test_errors_are_there_at_every_width(name: str) -> None:
    network, scheme = small_network(), SCHEMES[name]
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, *first_bits(scheme)), scheme=scheme, calibrate=images(16))
    for layer in Q.quant_layers(qnetwork).values():
        for errors in scheme.quantization_errors(layer):
            assert errors.shape == (len(Q.WIDTHS),)
            assert errors.isfinite().all()
            assert errors.min() >= 0
            assert errors[1:].argmin() > 3  # more bits are better
        of_weights, _ = scheme.quantization_errors(layer)
        assert of_weights[7] < 0.01


def test_only_a_codebook_takes_storage_beside_the_codes() -> None:
    assert Q.KMeans().storage_overhead_bytes(3) == 8 * 4
    assert Q.KMeans().storage_overhead_bytes(8, weights=100) == 100 * 4
    for scheme in SCHEMES.values():
        assert (scheme.storage_overhead_bytes(4) > 0) == (scheme.name == "kmeans")


def test_records_make_the_same_schemes_again() -> None:
    """Through JSON, and with them and its state the same network."""
    network = small_network()
    names = list(Q.BitPolicy.uniform(network, 8, 8))
    for offset in range(0, len(SCHEMES), 2):
        chosen = [list(SCHEMES.values())[(offset + index) % len(SCHEMES)] for index in range(len(names))]
        schemes = dict(zip(names, chosen, strict=True))
        policy = {name: first_bits(scheme) for name, scheme in schemes.items()}
        mixed = Q.quantize(network, policy, scheme=schemes, calibrate=images(16))
        records = json.loads(json.dumps(Q.scheme_records(mixed)))
        assert Q.schemes_from_records(records) == schemes
        again = Q.quantize(network, policy, scheme=Q.schemes_from_records(records), state=Q.quantizer_state(mixed))
        assert torch.equal(again(images(4)), mixed(images(4)))


def test_widths_change_with_mixed_schemes() -> None:
    """`set_policy` is as if the network had been quantized anew, whatever schemes its layers have."""
    network, x = small_network(), images(8)
    names = list(Q.BitPolicy.uniform(network, 8, 8))
    schemes = dict(zip(names, (SCHEMES[name] for name in ("binary", "lsq", "kmeans", "pact", "lsqplus")), strict=True))
    mixed = Q.quantize(network, dict.fromkeys(names, (4, 4)), scheme=schemes, calibrate=images(32))
    policies: list[dict[str, Any]] = [
        dict(zip(names, [(1, 1), (2, 8), (1, 3), (1, 1), (3, 1)], strict=True)),
        dict(zip(names, [(1, 4), (None, 2), (5, None), (7, 2), (8, 8)], strict=True)),
        dict(zip(names, [(6, 1), (8, 1), (8, 1), (None, None), (2, None)], strict=True)),
    ]
    for policy in policies:
        Q.set_policy(mixed, policy)
        anew = Q.quantize(network, policy, scheme=schemes, calibrate=images(32))
        restored = Q.quantize(network, policy, scheme=schemes, state=Q.quantizer_state(mixed))
        for made in (anew, restored):
            assert torch.equal(made(x), mixed(x))
        with torch.inference_mode():
            assert torch.equal(mixed(x), anew(x))


def test_errors_of_ones_own_scheme_are_measured_only_where_it_has_widths() -> None:
    class Even(Q.Linear):
        """Only even widths; it brings no errors."""

        def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
            for bits in (weight_bits, activation_bits):
                if bits is not None and bits % 2:
                    raise ValueError(f"{bits} is odd")

        def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
            tensors = super().start(layer)
            return {name: tensor for name, tensor in tensors.items() if not name.endswith("_error")}

        def calibrate(self, layer: Q.SchemeLayer, observer: Any) -> None:
            layer.weight_scale.fill_(0.01)
            layer.activation_scale.fill_(0.01)

    network = small_network()
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, 8, 8), scheme=Even(), calibrate=images(8))
    layer = Q.quant_layers(qnetwork)["hidden"]
    for errors in layer.scheme.quantization_errors(layer):
        assert errors[[0, 2, 4, 6]].tolist() == [1, 1, 1, 1]
        assert (errors[[1, 3, 5, 7]] < 1).all()
    expected = (layer.quantized_weight() - layer.weight).square().sum() / layer.weight.square().sum()
    assert layer.weight_error[7].item() == pytest.approx(expected.item(), rel=1e-5)


class Mine(Q.Linear):
    """A scheme of somebody's own, which does something wrong."""

    name = "mine"


def scheme_class(**methods: Any) -> Q.Scheme:
    made: Q.Scheme = type("Wrong", (Mine,), methods)()
    return made


def add_a_tensor(name: Any, tensor: Any) -> Any:
    return lambda self, layer: {**Q.Linear.start(self, layer), name: tensor}


def shrink(self: Any, layer: Any, *rest: Any) -> Tensor:
    layer.weight.mul_(0.5)
    return torch.zeros_like(layer.weight)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weight": lambda self, layer, bits: None}, "`weight` .* must return a tensor, not NoneType"),
    ({"weight": lambda self, layer, bits: layer.weight.flatten()}, r"`weight` .* the shape .* \(16, 1, 3, 3\), not \(144,\)"),
    ({"weight": lambda self, layer, bits: layer.weight.double()}, "`weight` .* torch.float32, not torch.float64"),
    ({"weight": lambda self, layer, bits: layer.weight.to("meta")}, "`weight` .* on cpu, not on meta"),
    ({"weight": lambda self, layer, bits: layer.weight * torch.nan}, "`weight` .* finite numbers, not nan"),
    ({"weight": lambda self, layer, bits: {}["x"]}, "`weight` .* failed: KeyError: 'x'"),
    ({"weight": shrink}, "changes `layer.weight` in place"),
    ({"calibrate": shrink}, "changes `layer.weight` in place"),
    ({"calibrate": lambda self, layer, observer: 1 / 0}, "`calibrate` .* failed: ZeroDivisionError"),
    ({"activation": lambda self, layer, x, bits: None}, "`activation` .* must return a tensor, not NoneType"),
    ({"activation": lambda self, layer, x, bits: x[:1]}, r"`activation` .* \(2, 16, 5, 5\), not \(1, 16, 5, 5\)"),
    ({"activation": lambda self, layer, x, bits: x.half()}, "`activation` .* torch.float32, not torch.float16"),
    ({"activation": lambda self, layer, x, bits: x / 0}, "`activation` .* finite numbers, not (inf|nan)"),
    ({"activation": lambda self, layer, x, bits: x.mul_(0.5)}, "`activation` .* changes its input in place"),
    ({"start": lambda self, layer: None}, "`start` .* must return a dict of tensors, not NoneType"),
    ({"start": lambda self, layer: {}["x"]}, "`start` .* failed: KeyError: 'x'"),
    ({"start": add_a_tensor("more", 3)}, "`start` .* must return tensors, but 'more' is int"),
    ({"start": add_a_tensor("weight", torch.ones(8))}, "`start` .* 'weight', which the layer has already"),
    ({"start": add_a_tensor("bias", torch.ones(8))}, "`start` .* 'bias', which the layer has already"),
    ({"start": add_a_tensor("forward", torch.ones(8))}, "`start` .* 'forward', which the layer has already"),
    ({"start": add_a_tensor("a.b", torch.ones(8))}, "`start` .* 'a.b': give a name"),
    ({"learned": ("nowhere",)}, "learns 'nowhere', which its `start` doesn't make"),
]


@pytest.mark.parametrize(("methods", "message"), WRONG)
def test_a_scheme_that_gives_something_else_is_found_at_the_start(methods: dict[str, Any], message: str) -> None:
    network = small_network()
    wrong = scheme_class(**methods)
    schemes = dict.fromkeys(Q.BitPolicy.uniform(network, 4, 4), "linear") | {"depthwise": wrong}
    with pytest.raises(ValueError, match=f"^layer 'depthwise': .*{message}") as caught:
        Q.quantize(network, Q.BitPolicy.uniform(network, 4, 4), scheme=schemes, calibrate=images(8))
    assert "scheme 'mine'" in str(caught.value)


def test_a_scheme_that_gives_what_it_should_is_let_pass() -> None:
    network = small_network()
    policy = Q.BitPolicy.uniform(network, 4, 4)
    mine, linear = (Q.quantize(network, policy, scheme=scheme, calibrate=images(8)) for scheme in (Mine(), "linear"))
    assert torch.equal(mine(images(8)), linear(images(8)))


def test_the_base_check_reads_least_bits() -> None:
    four = scheme_class(least_bits=4)
    four.check(4, 1)
    four.check(None, 1)
    for bits, words in ((3, "3 bits"), (1, "1 bit")):
        with pytest.raises(ValueError, match=f"^mine has no weights of {words}: use 4 to 8"):
            four.check(bits, 8)
