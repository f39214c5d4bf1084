"""16 bits beside the widths 1 to 8: in policies, in every scheme, in what is found after training, and in saved states."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantizers as Q
from quantizers.functional import row
from tests.conftest import images, small_network

SCHEMES: dict[str, Q.Scheme] = {
    "linear": Q.Linear(),
    "output": Q.Linear("output"),
    "percentile": Q.Linear("percentile"),
    "kl": Q.Linear("kl"),
    "power of two": Q.Linear(power_of_two=True),
    "linear-asymmetric": Q.Scheme.named("linear-asymmetric"),
    "lsq": Q.LSQ(),
    "lsqplus": Q.LSQPlus(),
    "dorefa": Q.DoReFa(),
    "pact": Q.PACT(clip=None),
    "binary": Q.Binary(),
}
DEPLOYABLE = [name for name in SCHEMES if name not in ("lsqplus", "dorefa", "pact")]
FOLLOWS_DATA = [name for name in SCHEMES if name not in ("dorefa", "pact")]  # without squashing or a clip from elsewhere
Bits = tuple[int | None, int | None]


def tiny() -> tuple[nn.Module, Tensor]:
    """A network whose second layer's input is a little negative, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4)).eval()
        return network, torch.randn(300, 6)


def quantized(w: int | None, a: int | None, scheme: str | Q.Scheme = "linear", **options: Any) -> tuple[Any, Tensor]:
    network, x = tiny()
    return Q.quantize(network, Q.BitPolicy.uniform(network, w, a), scheme=scheme, calibrate=x, **options), x


def far(made: Tensor, from_what: Tensor) -> float:
    left = (made - from_what).detach().double()
    return float(left.square().sum() / from_what.detach().double().square().sum())


def without_wide_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a state as it was saved before there were 16 bits."""
    old = {}
    for key, tensor in state.items():
        if tensor.dim() and len(tensor) == len(Q.WIDTHS) and not key.endswith(("_offset", "tailored_shift")):
            tensor = tensor[:8]
        old[key] = tensor.clone()
    return old


# Policies


def test_policies_take_16_and_the_word_float(tmp_path: Path) -> None:
    policy = Q.BitPolicy({"a": (16, 8), "b": ("float", 16), "c": (4, "float")})
    assert dict(policy) == {"a": (16, 8), "b": (None, 16), "c": (4, None)}
    policy.to_json(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    assert '"weight_bits": null, "activation_bits": 16' in text
    assert Q.BitPolicy.from_json(tmp_path / "policy.json") == policy
    (tmp_path / "words.json").write_text(text.replace("null", '"float"'))
    assert Q.BitPolicy.from_json(tmp_path / "words.json") == policy
    network, _ = tiny()
    assert Q.BitPolicy.uniform(network, w="float", a=16)["0"] == (None, 16)


@pytest.mark.parametrize("bad", [0, 9, 15, 17, 32, "16", "Float", 16.0])
def test_other_widths_are_refused_with_what_is_accepted(bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^layer 'a': bits must be 1 to 8, 16 or float, not {bad!r}$"):
        Q.BitPolicy({"a": (8, bad)})


def test_policies_with_16_bits_are_tied_and_shown() -> None:
    policy = Q.BitPolicy({"a": (16, 8), "b": (8, 16), "c": (4, None), "d": (2, 2), "e": (8, 8)})
    tied = policy.tied([("a", "b"), ("c", "d")])
    assert (tied["a"], tied["b"], tied["c"], tied["d"]) == ((16, 16), (16, 16), (4, None), (4, None))
    assert repr(policy) == "BitPolicy(5 layers, 2-8+16 / 2-8+16+float bits, mean 7.6 / 8.5)"


def test_every_width_has_a_row() -> None:
    assert Q.WIDTHS == (1, 2, 3, 4, 5, 6, 7, 8, 16)
    assert [Q.row_of(bits) for bits in Q.WIDTHS] == list(range(9))
    assert row(torch.arange(9), 16) == row(torch.arange(9), 16) == 8
    with pytest.raises(ValueError, match="nothing is known of 16 bits: there are values for 1 to 8 bits only"):
        row(torch.arange(8), 16)


# Schemes


@pytest.mark.parametrize("name", SCHEMES)
def test_sixteen_bits_are_nearer_to_float_than_eight(name: str) -> None:
    qnetwork, x = quantized(8, 8, SCHEMES[name])
    network, _ = tiny()
    expected = network(x)
    for pair in ((8, 16), (16, 8), (16, 16), (16, None), (None, 16)):
        Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), pair))
        assert qnetwork(x).isfinite().all()
    for layer in Q.quant_layers(qnetwork).values():
        for errors in layer.scheme.quantization_errors(layer):
            assert errors.shape == (9,)
            assert errors[8] <= 1.1 * errors[7]  # what squashes or clips loses the same at both
            if name in FOLLOWS_DATA:
                assert errors[8] < errors[7] / 100
    if name in FOLLOWS_DATA:
        Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), (16, 16)))
        assert far(qnetwork(x), expected) < 1e-6


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.floats(1e-6, 1e6),
    shift=st.sampled_from([0.0, -0.5, 3.0]),
    asymmetric=st.booleans(),
    per_channel=st.booleans(),
    power_of_two=st.booleans(),
)
def test_codes_are_exact_and_nothing_is_clipped(
    seed: int, size: float, shift: float, asymmetric: bool, per_channel: bool, power_of_two: bool
) -> None:
    """Integers of 16 bits times a float32 scale are the layer's values, bit for bit, and as near as half a step."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 3))
    with torch.no_grad():
        network[0].weight.copy_(torch.randn(3, 5, generator=generator) * size)
    x = (torch.randn(40, 5, generator=generator) + shift) * size
    scheme = Q.Linear(power_of_two=power_of_two, asymmetric=asymmetric, per_channel=per_channel)
    layer: Any = Q.quantize(network, {"0": (16, 16)}, scheme=scheme, calibrate=x)[0]  # type: ignore[index]
    codes, scale, bits = scheme.integer_weights(layer)
    assert (codes.dtype, bits) == (torch.int16, 16)
    assert torch.equal(codes.float() * scale.float()[:, None], layer.quantized_weight())
    step, _, signed, narrow = scheme.integer_activations(layer)
    low, high = Q.integer_range(16, signed, narrow)
    zero = scheme.zero_point(layer, 16)
    made = scheme.activation(layer, x, 16)
    q = (made.double() / step).round() + zero
    assert low <= q.min()
    assert q.max() <= high
    assert torch.equal(((q - zero).float() * torch.tensor(step)), made)
    assert (made - x).abs().max() <= 0.51 * step + 1e-6 * size
    if not power_of_two:
        assert (layer.quantized_weight() - layer.weight).abs().max() <= 0.51 * scale.max()


@pytest.mark.parametrize("name", DEPLOYABLE)
def test_integers_are_of_16_bits(name: str) -> None:
    qnetwork, _ = quantized(16, 16, SCHEMES[name])
    for layer in Q.quant_layers(qnetwork).values():
        codes, scale, bits = layer.scheme.integer_weights(layer)
        assert (codes.dtype, bits) == (torch.int16, 16)
        assert codes.abs().max() > 127
        assert torch.equal(codes.float() * scale.float()[:, None], layer.quantized_weight().detach())
        assert layer.scheme.integer_activations(layer).bits == 16


def test_odd_integers_of_17_bits_are_refused() -> None:
    qnetwork, _ = quantized(16, 16, "dorefa")
    with pytest.raises(ValueError, match="weights of 16 bits in scheme 'dorefa' are odd integers of 17 bits; at most 7 bits"):
        qnetwork[0].scheme.integer_weights(qnetwork[0])


def test_k_means_has_no_codebook_of_65536() -> None:
    with pytest.raises(ValueError, match="^layer '0': kmeans has no weights of 16 bits: use 1 to 8, or float$"):
        quantized(16, 8, "kmeans")
    qnetwork, x = quantized(4, 16, "kmeans")
    assert qnetwork(x).isfinite().all()
    assert qnetwork[0].codebook.shape == (8, 256)
    of_weights, of_inputs = qnetwork[0].scheme.quantization_errors(qnetwork[0])
    assert (of_weights[8].item(), of_inputs[8] < 1e-6) == (1, True)


def test_a_pruning_scheme_takes_16_bits_of_inputs_alone() -> None:
    scheme = Q.MainSubsidiary()
    scheme.check(1, 16)
    with pytest.raises(ValueError, match="'main-subsidiary' has no weights of 16 bits: it takes 1, or None"):
        scheme.check(16, 16)


class Plain(Q.Scheme):
    """A scheme that was written when there were 1 to 8 bits."""

    of_weight: ClassVar[tuple[str, ...]] = ("levels",)

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        return {"levels": torch.zeros(Q.MAX_BITS), "top": torch.zeros(Q.MAX_BITS)}

    def calibrate(self, layer: Q.SchemeLayer, observer: Any) -> None:
        for bits in range(1, 9):
            layer.levels[bits - 1] = layer.weight.abs().max() / 2 ** (bits - 1)  # type: ignore[attr-defined]
            layer.top[bits - 1] = observer.largest / 2**bits  # type: ignore[attr-defined]

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        step = layer.levels[bits - 1]  # type: ignore[attr-defined]
        return (layer.weight / step).round() * step

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        step = layer.top[bits - 1]  # type: ignore[attr-defined]
        return (x / step).round() * step


class Lenient(Plain):
    """The same, and it checks nothing."""

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        pass


class OnLinear(Q.Linear):
    """A scheme on one of ours, with a tensor of its own."""

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        return {**super().start(layer), "factor": torch.ones(Q.MAX_BITS)}

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        return super().weight(layer, bits) * layer.factor[bits - 1]  # type: ignore[attr-defined]


class EightRows(Q.Linear):
    """A scheme on one of ours, with all tensors of 8 rows."""

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        tensors = super().start(layer)
        return {name: tensor[: Q.MAX_BITS].clone() if tensor.dim() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("scheme", [Plain(), Lenient(), OnLinear(), EightRows()])
def test_schemes_of_8_rows_work_as_before_and_are_refused_at_16(scheme: Q.Scheme) -> None:
    qnetwork, x = quantized(8, 8, scheme, correction="analytic")
    network, _ = tiny()
    assert far(qnetwork(x), network(x)) < 0.01
    for layer in Q.quant_layers(qnetwork).values():
        for errors in layer.scheme.quantization_errors(layer):
            assert errors.shape == (9,)
            assert (errors[:8].diff() < 0).any()
    before = Q.get_policy(qnetwork)
    with pytest.raises(ValueError, match="^layer '2': .* 16 bits") as caught:
        Q.set_policy(qnetwork, {**before, "2": (16, 8)})
    assert "\n" not in str(caught.value)
    assert Q.get_policy(qnetwork) == before
    with pytest.raises(ValueError, match="^layer '0': .*16 bits"):
        quantized(16, 8, scheme)
    state = Q.quantizer_state(qnetwork)
    again = Q.quantize(network, before, scheme=scheme, state=state)
    assert torch.equal(again(x), qnetwork(x))


class Wide(Q.Scheme):
    """A scheme that says that it has 16 bits."""

    most_weight_bits: ClassVar[int] = 16
    most_activation_bits: ClassVar[int] = 16

    def start(self, layer: Q.SchemeLayer) -> dict[str, Tensor]:
        return {"largest": torch.ones(())}

    def calibrate(self, layer: Q.SchemeLayer, observer: Any) -> None:
        layer.largest.fill_(observer.largest)  # type: ignore[attr-defined]

    def weight(self, layer: Q.SchemeLayer, bits: int) -> Tensor:
        return self._rounded(layer.weight, layer.weight.abs().max() / 2 ** (bits - 1))

    def activation(self, layer: Q.SchemeLayer, x: Tensor, bits: int) -> Tensor:
        return self._rounded(x, layer.largest / 2 ** (bits - 1))  # type: ignore[attr-defined]

    def _rounded(self, x: Tensor, step: Tensor) -> Tensor:
        return (x / step).round() * step


def test_a_scheme_of_ones_own_says_that_it_has_16_bits() -> None:
    qnetwork, x = quantized(16, 16, Wide(), correction="analytic")
    network, _ = tiny()
    assert far(qnetwork(x), network(x)) < 1e-7
    assert all(errors[8] < 1e-7 for errors in qnetwork[0].scheme.quantization_errors(qnetwork[0]))
    assert qnetwork[0].bias_shift.shape == (9, 8)


# Policies at run time


@pytest.mark.parametrize("options", [{}, {"correction": "analytic", "rounding": "gptq"}])
@pytest.mark.parametrize("name", ["linear", "output", "linear-asymmetric", "binary"])
def test_policies_change_among_8_16_and_float_and_back(name: str, options: dict[str, str]) -> None:
    if name == "binary":
        options = {}
    qnetwork, x = quantized(8, 8, SCHEMES[name], **options)
    network, _ = tiny()
    pairs: list[Bits] = [(8, 8), (16, 16), (None, None), (4, 16), (None, 16), (16, None), (4, None), (None, 4)]
    first = {}
    for pair in pairs:
        Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), pair))
        first[pair] = qnetwork(x)
    for pair in reversed(pairs):
        Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), pair))
        assert torch.equal(qnetwork(x), first[pair])
        assert torch.equal(copy.deepcopy(qnetwork)(x), first[pair])
        if 16 in pair:
            anew, _ = quantized(*pair, SCHEMES[name], **options)
            assert torch.equal(anew(x), first[pair])
    assert torch.equal(first[None, None], network(x))


@pytest.mark.parametrize("pair", [(16, 16), (4, None), (None, 4), (16, None), (None, 16)])
@pytest.mark.parametrize("name", ["linear", "linear-asymmetric", "lsq", "lsqplus", "dorefa", "pact", "binary", "kmeans"])
def test_every_pair_is_trained(name: str, pair: Bits) -> None:
    if name == "kmeans" and pair[0] == 16:
        return
    scheme = SCHEMES.get(name, Q.KMeans())
    qnetwork, x = quantized(*pair, scheme)
    before = qnetwork(x).detach()
    optimizer = torch.optim.SGD([parameter for parameter in qnetwork.parameters() if parameter.requires_grad], 1e-3)
    qnetwork.train()(x).square().mean().backward()
    optimizer.step()
    after = qnetwork.eval()(x)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_gptq_has_nothing_to_choose_at_16_bits() -> None:
    network, x = tiny()
    x = x + 2 * x[:, :1]  # inputs that hang together
    policy = Q.BitPolicy.uniform(network, 4, 8)
    qnetwork: Any = Q.quantize(network, policy, scheme="linear", calibrate=x, rounding="gptq")
    plain = Q.quantize(network, Q.BitPolicy.uniform(network, 16, 8), scheme="linear", calibrate=x)
    layer = qnetwork[0]
    assert layer.weight_offset.shape == (8, *layer.weight.shape)
    assert layer.weight_offset[3].any()
    Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), (16, 8)))
    assert layer.offset_of_rounding(16) is None
    assert torch.equal(qnetwork(x), plain(x))


def test_gptq_asks_for_no_patches_at_16_bits() -> None:
    network, x = tiny()
    with pytest.raises(ValueError, match="GPTQ needs at least 6 patches"):
        Q.quantize(network, {"0": (4, 8), "2": (4, 8)}, calibrate=x[:3], rounding="gptq")
    made = Q.quantize(network, {"0": (16, 8), "2": (16, 8)}, calibrate=x[:3], rounding="gptq")
    assert made(x).isfinite().all()


def test_bias_correction_has_a_row_for_16_bits() -> None:
    qnetwork, x = quantized(16, None, "dorefa", correction="analytic")
    network, _ = tiny()
    layer: Any = qnetwork[0]
    assert layer.bias_shift.shape == (9, 8)
    # DoReFa squashes weights, so that there is much to correct at 16 bits, too.
    assert layer.bias_shift[8].abs().max() > 1e-3
    assert torch.allclose(layer(x).mean(0), network[0](x).mean(0), atol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("pair", [(16, 4), (4, 16), (4, None), (16, None)])
def test_what_is_found_for_a_policy_may_have_16_bits(pair: Bits) -> None:
    qnetwork, x = quantized(*pair, "linear", correction="analytic")
    network, _ = tiny()
    result = Q.reconstruct(qnetwork, network, [x], iterations=3)
    assert result.after <= result.before
    Q.correct_bias(qnetwork, network, x)
    made = qnetwork(x)
    assert far(made, network(x)) < 0.1
    Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), (8, 8)))
    Q.set_policy(qnetwork, dict.fromkeys(("0", "2"), pair))
    assert torch.equal(qnetwork(x), made)
    again = Q.quantize(network, Q.get_policy(qnetwork), state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), made)


def test_convolutions_and_equalized_networks_have_16_bits() -> None:
    network, x = small_network(), images(80)
    even = Q.equalize(network, x[:4])
    policy = Q.BitPolicy.uniform(even, 16, 16)
    qnetwork = Q.quantize(even, policy, scheme="linear", calibrate=x, correction="sequential", rounding="gptq")
    assert far(qnetwork(x), even(x)) < 1e-6
    with_norms = Q.quantize(network, Q.BitPolicy.uniform(network, 16, None), calibrate=x)
    Q.reestimate_norms(with_norms, x)
    assert far(with_norms(x), network(x)) < 0.1  # statistics of these images, not of others


# States


@pytest.mark.parametrize("name", [*SCHEMES, "kmeans"])
def test_states_come_back(name: str) -> None:
    scheme = SCHEMES.get(name, Q.KMeans())
    weights = 4 if name == "kmeans" else 16
    qnetwork, x = quantized(weights, 16, scheme, correction="analytic")
    network, _ = tiny()
    again = Q.quantize(network, Q.get_policy(qnetwork), scheme=scheme, state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), qnetwork(x))
    records = json.loads(json.dumps(Q.scheme_records(again)))
    assert Q.schemes_from_records(records)["0"] == scheme


@pytest.mark.parametrize("name", [*SCHEMES, "kmeans"])
def test_a_state_of_8_rows_is_read_and_knows_no_16_bits(name: str) -> None:
    scheme = SCHEMES.get(name, Q.KMeans())
    options = {"correction": "analytic"}
    if scheme.takes_offsets:
        options["rounding"] = "gptq"
    qnetwork, x = quantized(4, 4, scheme, **options)
    network, _ = tiny()
    old = without_wide_rows(Q.quantizer_state(qnetwork))
    policy = Q.get_policy(qnetwork)
    again = Q.quantize(network, policy, scheme=scheme, state=old)
    assert torch.equal(again(x), qnetwork(x))
    sentence = "layer '2': nothing is known of 16 bits, since the state of its quantizers is from before there were any"
    wide: Bits = (4, 16)
    with pytest.raises(ValueError, match=f"^{sentence}.*give `calibrate`$"):
        Q.set_policy(again, {**policy, "2": wide})
    with pytest.raises(ValueError, match="^layer '0': nothing is known of 16 bits"):
        Q.quantize(network, dict.fromkeys(("0", "2"), wide), scheme=scheme, state=old)
    assert all(errors.shape == (9,) for errors in scheme.quantization_errors(again[0]))  # type: ignore[index]
    # What is saved again is what was read, and a network of 9 rows can take the place.
    saved = Q.quantizer_state(again)
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {k: tuple(t.shape) for k, t in old.items()}
    assert torch.equal(copy.deepcopy(again)(x), qnetwork(x))
    Q.load_quantizer_state(again, Q.quantizer_state(qnetwork))
    Q.set_policy(again, {**policy, "2": wide})
    Q.set_policy(qnetwork, {**policy, "2": wide})
    assert torch.equal(again(x), qnetwork(x))
    with pytest.raises(ValueError, match="^layer '2': nothing is known of 16 bits"):
        Q.load_quantizer_state(again, old)
    assert torch.equal(again(x), qnetwork(x))


def test_a_learned_step_stays_the_parameter_that_an_optimizer_holds() -> None:
    qnetwork, x = quantized(4, 4, "lsq")
    held = Q.learned_parameters(qnetwork)
    Q.load_quantizer_state(qnetwork, without_wide_rows(Q.quantizer_state(qnetwork)))
    assert all(one is other for one, other in zip(held, Q.learned_parameters(qnetwork), strict=True))
    qnetwork(x).sum().backward()
    assert held[0].grad is not None
    assert held[0].grad.shape[0] == 8


def test_mixed_and_foreign_states_are_refused() -> None:
    qnetwork, _ = quantized(4, 4, correction="analytic")
    state = Q.quantizer_state(qnetwork)
    old = without_wide_rows(state)
    for key in ("0.weight_scale", "0.activation_error", "0.weight_error", "0.bias_shift"):
        with pytest.raises(ValueError, match=re.escape("is of another network: 0.")):
            Q.load_quantizer_state(qnetwork, {**state, key: old[key]})
    with pytest.raises(ValueError, match="is of another network: 0."):
        Q.load_quantizer_state(qnetwork, {**old, "0.weight_error": torch.ones(7), "0.activation_error": torch.ones(7)})
    assert all(torch.equal(tensor, state[key]) for key, tensor in Q.quantizer_state(qnetwork).items())


# Odd numbers


@pytest.mark.parametrize("scheme", [Q.Linear(), Q.Linear(power_of_two=True), Q.Linear("output", per_channel=False), Q.LSQ()])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e10])
def test_weights_of_any_size(size: float, scheme: Q.Scheme) -> None:
    """A step that float32 can't hold would make everything NaN."""
    network, x = tiny()
    with torch.no_grad():
        network[0].weight.mul_(size)  # type: ignore[index]
    made = Q.quantize(network, Q.BitPolicy.uniform(network, 16, 16), scheme=scheme, calibrate=x)
    assert far(made(x), network(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types(dtype: torch.dtype) -> None:
    network, x = tiny()
    network, x = network.to(dtype), x.to(dtype)
    made = Q.quantize(network, Q.BitPolicy.uniform(network, 16, 16), calibrate=x)
    assert made(x).dtype == dtype
    assert far(made(x), network(x)) < max(1e-6, 10 * torch.finfo(dtype).eps ** 2)


def test_inputs_that_are_never_positive_or_always_zero() -> None:
    network, _ = tiny()
    for x, zero in ((torch.zeros(20, 6), 0), (-torch.rand(20, 6) - 1, 65535)):
        made: Any = Q.quantize(network, {"0": (16, 16), "2": (16, 16)}, scheme="linear-asymmetric", calibrate=x)
        assert far(made(x), network(x)) < 1e-6
        assert made[0].scheme.zero_point(made[0], 16) == zero


@pytest.mark.parametrize("mode", Q.BACKWARD)
def test_gradients_pass_inputs_of_16_bits_as_those_of_others(mode: str) -> None:
    qnetwork, x = quantized(16, 16)
    network, _ = tiny()
    gradients = []
    with Q.backward_mode(qnetwork, mode):
        for one in (network, qnetwork):
            given = x.clone().requires_grad_()
            one(given).sum().backward()
            gradients.append(given.grad)
    if mode == "hard":
        assert not gradients[1].any()
    elif mode == "bpda-soft":
        assert far(gradients[1], gradients[0]) < 0.5  # a slope of a few steps, which is uneven
    else:
        assert far(gradients[1], gradients[0]) < 0.01


@pytest.mark.parametrize("scheme", ["linear", "linear-asymmetric", "lsq"])
@pytest.mark.parametrize("low", [0.0, -0.4])
def test_inputs_somewhat_beyond_those_of_calibration_are_not_clipped(scheme: str, low: float) -> None:
    """Clipping them loses far more than the one bit that holds them."""
    seen = torch.linspace(low, 1.0, 400).view(100, 4)
    network = Q.quantize(nn.Sequential(nn.Linear(4, 3)), {"0": (None, 16)}, calibrate=seen, scheme=scheme).eval()
    layer = Q.quant_layers(network)["0"]
    for x in (seen, 1.9 * seen):
        with torch.no_grad():
            assert float((layer.scheme.activation(layer, x, 16) - x).abs().max()) < 1e-4
