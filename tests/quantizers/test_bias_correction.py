"""Bias correction: quantized layers have the mean outputs of the float network, and what was found for a policy is its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import quantizers as Q
from quantizers.correction import MeanOutput
from quantizers.layers import tailor

WIDTHS = (2, 3, 4, 8)


def images(count: int = 12, channels: int = 4, size: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Standardized(nn.Conv2d):
    """A layer of somebody else's, which changes its weight before it is used."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Saturating(nn.Conv2d):
    """No linear layer: mean outputs can't be told from mean inputs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.1, 0.1)


class Biasless(nn.Conv2d):
    """Has no use for a bias."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


LAYERS = {
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "without bias": lambda: nn.Conv2d(4, 6, 3, padding=2, bias=False),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "custom": lambda: Standardized(4, 6, 3, padding=1),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1)),
    "rows": lambda: nn.Linear(9, 5),
    "rows without bias": lambda: nn.Linear(9, 5, bias=False),
}


def mean_outputs(layer: nn.Module, batches: list[Tensor]) -> Tensor:
    means = MeanOutput()
    with torch.no_grad():
        for batch in batches:
            means.add(layer, layer(batch))
    mean = means.mean()
    assert mean is not None
    return mean


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", ["linear", "kmeans"])
def test_corrected_layers_have_no_mean_error_at_any_width(kind: str, scheme: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[kind]()).eval()
    batches = [images(), images(5, seed=1)]
    qnetwork = Q.quantize(network, {"0": (3, None)}, scheme=scheme, calibrate=batches, correction="analytic")
    expected = mean_outputs(network[0], batches)
    for bits in WIDTHS:
        Q.set_policy(qnetwork, {"0": (bits, None)})
        torch.testing.assert_close(mean_outputs(qnetwork[0], batches), expected, atol=1e-6, rtol=1e-5)
    Q.set_policy(qnetwork, {"0": (None, None)})
    torch.testing.assert_close(qnetwork(batches[0]), network(batches[0]), atol=0, rtol=0)


def test_images_of_several_sizes_count_by_their_places() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).eval()
    batches = [images(), images(3, size=5, seed=1), images(2, size=9, seed=2)]
    qnetwork = Q.quantize(network, {"0": (2, None)}, calibrate=batches, correction="analytic")
    torch.testing.assert_close(mean_outputs(qnetwork[0], batches), mean_outputs(network[0], batches), atol=1e-6, rtol=1e-5)


def test_signals_and_single_images_are_corrected_too() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1)).eval()
    signals = images(8)[:, :, 0]
    qnetwork = Q.quantize(network, {"0": (2, None)}, calibrate=signals, correction="analytic")
    torch.testing.assert_close(mean_outputs(qnetwork[0], [signals]), mean_outputs(network[0], [signals]), atol=1e-6, rtol=1e-5)
    one = Q.quantize(network, {"0": (2, None)}, calibrate=list(signals), correction="analytic")
    torch.testing.assert_close(one[0].bias_shift, qnetwork[0].bias_shift)


def test_nothing_is_corrected_unless_it_is_asked_for() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3)).eval()
    qnetwork = Q.quantize(network, {"0": (3, 8)}, calibrate=images())
    assert qnetwork[0].bias_shift is None
    assert qnetwork[0].effective_bias() is qnetwork[0].bias
    assert set(Q.quantizer_state(qnetwork)) == {f"0.{name}" for name in (*qnetwork[0].state_names, "signed", "calibrated")}


@pytest.mark.parametrize("kind", [Saturating, Biasless])
def test_a_layer_that_cannot_be_corrected_is_named_and_left_alone(kind: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), kind(4, 6, 3)).eval()
    with pytest.warns(UserWarning, match=r"1 layers stay without bias correction, .*: 1$"):
        qnetwork = Q.quantize(network, {"0": (3, 8), "1": (3, 8)}, calibrate=images(), correction="analytic")
    assert qnetwork[0].bias_shift is not None
    assert qnetwork[1].bias_shift is None


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.ReLU6()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.first(x).relu()).relu()
        return self.last(x.mean((2, 3)))


LOW = {"0": (2, 3), "3": (2, 3), "7": (3, 3)}


@pytest.mark.parametrize("parts", [1, 3])
def test_sequential_correction_leaves_no_mean_error_in_the_quantized_network(parts: int) -> None:
    network = chain()
    batches = list(images(24).chunk(parts))
    qnetwork = Q.quantize(network, LOW, calibrate=batches, correction="analytic")
    result = Q.correct_bias(qnetwork, network, batches)
    assert result.kept
    assert result.after < result.before
    assert list(result.errors) == ["0", "3", "7"]
    expected: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for module, found in ((network, expected), (qnetwork, given)):
        for name in LOW:
            layer = module.get_submodule(name)
            layer.register_forward_hook(lambda layer, x, y, name=name, found=found: found.update({name: _mean_of(layer, y)}))
        module(torch.cat(batches))
    for name in LOW:
        torch.testing.assert_close(given[name], expected[name], atol=1e-5, rtol=1e-5)


def _mean_of(layer: nn.Module, output: Tensor) -> Tensor:
    means = MeanOutput()
    means.add(layer, output)
    mean = means.mean()
    assert mean is not None
    return mean


def test_all_images_at_once_and_batch_by_batch_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batches = chain(), list(images(24).chunk(3))
    at_once = Q.quantize(network, LOW, calibrate=batches)
    in_parts = copy.deepcopy(at_once)
    Q.correct_bias(at_once, network, batches)
    monkeypatch.setattr("quantizers.correction.MOST_BYTES", 0)
    told: list[tuple[int, int, str]] = []
    Q.correct_bias(in_parts, network, iter(batches), on_progress=lambda *step: told.append(step))
    for name in LOW:
        one, other = at_once.get_submodule(name), in_parts.get_submodule(name)
        torch.testing.assert_close(one.tailored_shift, other.tailored_shift, atol=1e-6, rtol=1e-4)
    assert told == [(0, 3, "layers"), (1, 3, "layers"), (2, 3, "layers"), (3, 3, "layers")]


def test_quantize_corrects_sequentially_if_it_is_asked_to() -> None:
    network, x = chain(), images(3, seed=5)
    by_hand = Q.quantize(network, LOW, calibrate=images(), correction="analytic")
    Q.correct_bias(by_hand, network, images())
    at_once = Q.quantize(network, LOW, calibrate=iter([images()]), correction="sequential")
    assert torch.equal(at_once(x), by_hand(x))


def test_a_layer_that_is_called_twice_is_corrected_over_both() -> None:
    torch.manual_seed(0)
    network = Twice().eval()
    qnetwork = Q.quantize(network, {"first": (2, 4), "last": (3, 4)}, calibrate=images())
    assert Q.correct_bias(qnetwork, network, images()).kept


def test_a_correction_that_makes_outputs_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's bias is right for the images that it is corrected on, and what came before is kept as it was."""
    network = chain()
    qnetwork = Q.quantize(network, LOW, calibrate=images(), correction="analytic")
    assert Q.correct_bias(qnetwork, network, images()).kept
    before = {name: copy.deepcopy(qnetwork.get_submodule(name).tailored_shift) for name in LOW}
    distances = iter([1.0, 2.0])
    monkeypatch.setattr("quantizers.correction.distance", lambda *given: next(distances))
    result = Q.correct_bias(qnetwork, network, images(seed=9))  # which would find other shifts
    assert not result.kept
    for name in LOW:
        assert torch.equal(qnetwork.get_submodule(name).tailored_shift, before[name])


def test_what_was_found_for_a_policy_counts_for_no_other() -> None:
    network, x = chain(), images(3, seed=5)
    qnetwork = Q.quantize(network, LOW, calibrate=images(), correction="analytic")
    analytic = qnetwork(x)
    Q.correct_bias(qnetwork, network, images())
    sequential = qnetwork(x)
    assert not torch.equal(sequential, analytic)
    other = dict(LOW, **{"7": (3, 4)})
    fresh = Q.quantize(network, other, calibrate=images(), correction="analytic")
    Q.set_policy(qnetwork, other)
    assert torch.equal(qnetwork(x), fresh(x))
    Q.set_policy(qnetwork, LOW)
    assert torch.equal(qnetwork(x), sequential)
    qnetwork[3].weight_bits = 4  # layer by layer
    assert torch.equal(qnetwork[3].effective_bias(), qnetwork[3].bias_shift[3])


def test_offsets_of_rounding_are_added_to_the_integers_and_clamped() -> None:
    network = nn.Sequential(nn.Linear(9, 5)).eval()
    qnetwork = Q.quantize(network, {"0": (3, None)})
    layer = qnetwork[0]
    nearest = layer.quantized_weight() / layer.weight_scale[2][:, None]
    offset = torch.randint(-2, 3, (5, 9), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    layer.weight_offset = torch.zeros(8, 5, 9, dtype=torch.int8)
    layer.weight_offset[2] = offset
    expected = (nearest.round() + offset).clamp(-3, 3)
    codes = layer.scheme.integer_weights(layer).codes
    assert torch.equal(codes.float(), expected)
    # Kept weights notice other offsets.
    with torch.no_grad():
        layer.quantized_weight()
        layer.weight_offset[2] = 0
        assert torch.equal(layer.quantized_weight(), nearest * layer.weight_scale[2][:, None])
        tailor(layer, offset=offset)
        assert torch.equal(layer.scheme.integer_weights(layer).codes.float(), expected)
        Q.set_policy(qnetwork, {"0": (4, None)})
        assert torch.equal(
            layer.scheme.weight(layer, 4), Q.fake_quantize(layer.weight, layer.weight_scale[3][:, None], 4, True)
        )


def test_training_goes_on_from_the_offsets() -> None:
    network = nn.Sequential(nn.Linear(9, 5)).eval()
    qnetwork = Q.quantize(network, {"0": (3, None)})
    layer = qnetwork[0]
    layer.weight_offset = torch.ones(8, 5, 9, dtype=torch.int8)
    x = torch.rand(4, 9)
    with torch.no_grad():
        expected = qnetwork(x)
    given = qnetwork(x)
    assert torch.equal(given, expected)
    given.sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = layer.weight_offset = None
    qnetwork(x).sum().backward()
    assert torch.equal(gradient, layer.weight.grad)


@pytest.mark.parametrize("how", ["state", "deepcopy", "pickle"])
def test_all_that_was_found_can_be_kept(how: str) -> None:
    network, x = chain(), images(3, seed=5)
    qnetwork = Q.quantize(network, LOW, calibrate=images(), correction="analytic")
    Q.correct_bias(qnetwork, network, images())
    offset = torch.ones(8, 4, 3, 3, dtype=torch.int8)
    tailor(qnetwork[0], offset=torch.ones(8, 4, 3, 3))
    qnetwork[0].weight_offset = -offset.expand(8, 8, 4, 3, 3).clone()
    if how == "state":
        again = Q.quantize(network, LOW, state=Q.quantizer_state(qnetwork))
    elif how == "deepcopy":
        again = copy.deepcopy(qnetwork)
    else:
        again = pickle.loads(pickle.dumps(qnetwork))
    assert torch.equal(again(x), qnetwork(x))
    other = dict(LOW, **{"7": (3, 4)})
    for one in (again, qnetwork):
        Q.set_policy(one, other)
    assert torch.equal(again(x), qnetwork(x))
    plain = Q.quantize(network, LOW, calibrate=images())
    Q.load_quantizer_state(again, Q.quantizer_state(plain))
    Q.set_policy(again, LOW)
    assert torch.equal(again(x), plain(x))
    assert torch.equal(Q.float_copy(qnetwork)(x), network(x))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("bias_shift", torch.zeros(8, 5), r"0\.bias_shift has shape \(8, 5\)"),
        ("bias_shift", torch.full((9, 8), torch.nan), "damaged: 0.bias_shift"),
        ("weight_offset", torch.zeros(8, 8, 4, 3, 3), "damaged: 0.weight_offset"),
        ("weight_offset", torch.zeros(8, 8, 4, 3, 3, dtype=torch.int64), "another scheme: 0.weight_offset"),
        ("tailored_for", torch.tensor([3, 9]), r"damaged: 0.tailored_for is \[3, 9\]"),
        ("tailored_shift", torch.zeros(8, 1), "another network: 0.tailored_shift"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(key: str, value: Tensor, reason: str) -> None:
    network = chain()
    qnetwork = Q.quantize(network, LOW, calibrate=images(), correction="analytic")
    state = Q.quantizer_state(qnetwork)
    with pytest.raises(ValueError, match=reason):
        Q.load_quantizer_state(qnetwork, {**state, f"0.{key}": value})
    after = Q.quantizer_state(qnetwork)
    assert after.keys() == state.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_bad_input_is_named() -> None:
    network = chain()
    with pytest.raises(ValueError, match="unknown correction 'analytical'; it can be 'analytic', 'sequential', or None"):
        Q.quantize(network, LOW, calibrate=images(), correction="analytical")
    with pytest.raises(ValueError, match="correction='analytic' needs inputs to look at: give `calibrate`"):
        Q.quantize(network, {name: (w, None) for name, (w, _) in LOW.items()}, correction="analytic")
    qnetwork = Q.quantize(network, LOW, calibrate=images())
    with pytest.raises(ValueError, match="needs inputs to look at"):
        Q.quantize(network, LOW, state=Q.quantizer_state(qnetwork), correction="analytic")
    with pytest.raises(ValueError, match="the network isn't quantized"):
        Q.correct_bias(network, network, images())
    with pytest.raises(ValueError, match="layer '0' of the float network is quantized"):
        Q.correct_bias(qnetwork, qnetwork, images())
    with pytest.raises(ValueError, match="has no layer '0'"):
        Q.correct_bias(qnetwork, nn.Sequential(nn.Linear(3, 3)), images())
    with pytest.raises(ValueError, match="needs at least one image"):
        Q.correct_bias(qnetwork, network, [])
