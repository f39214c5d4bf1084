"""Calibration sees what a layer is called with, keeps a copy of a bounded part of it, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers import moments as moments_module
from quantizers import observers
from quantizers.clipping import OutputErrors
from quantizers.moments import InputMoments
from quantizers.observers import Observer, fit_weight_scales
from tests.conftest import images, small_network

POLICY = {"a": (4, 4), "b": (4, 4)}


class Net(nn.Module):
    """Two layers, the input of the first of which may be written over afterwards, or that of the network before."""

    def __init__(self, after: str = "", before: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.after, self.before = after, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x.sub_(0.5).mul_(2)
        else:
            x = (x - 0.5) * 2
        y = self.a(input=x)
        z = x.relu()
        if self.after == "relu":
            z = F.relu(x, inplace=True)
        elif self.after == "fill":
            x.fill_(9)
        elif self.after == "data":
            x.data.mul_(100)
        result: Tensor = y + self.b(z)
        return result


def calibrated(network: nn.Module, batches: Any, scheme: str = "linear") -> dict[str, Tensor]:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return Q.quantizer_state(Q.quantize(network, POLICY, calibrate=batches, scheme=scheme))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def pictures(count: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["linear", "lsq", "lsqplus"])
def test_what_happens_to_an_input_later_is_not_seen(scheme: str) -> None:
    expected = calibrated(Net(), pictures(), scheme)
    for after in ("relu", "fill", "data"):
        assert same(calibrated(Net(after), pictures(), scheme), expected), after


def test_loaders_may_fill_one_buffer_again_and_again() -> None:
    buffer = torch.empty(8, 3, 6, 6)

    def loader() -> Iterator[Tensor]:
        for seed in range(3):
            yield buffer.copy_(pictures(8, seed))

    assert same(calibrated(Net(), loader()), calibrated(Net(), [pictures(8, seed) for seed in range(3)]))


def test_networks_that_change_their_input_leave_the_callers_alone() -> None:
    x = pictures()
    for batches in (x, [x], [(x, torch.zeros(8))], (x, torch.zeros(8, dtype=torch.long))):
        assert same(calibrated(Net(before=True), batches), calibrated(Net(), pictures()))
        assert torch.equal(x, pictures())


def test_memory_is_bounded_and_few_batches_are_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "SAMPLES", 64)
    monkeypatch.setattr(observers, "MOST_SAMPLES", 1024)
    batches = [torch.arange(64.0) + 64 * number for number in range(200)]
    observer, layer = Observer(), nn.Linear(64, 1)
    for number, batch in enumerate(batches, 1):
        observer(layer, (batch,))
        held = sum(tensor.untyped_storage().nbytes() for tensor in observer.values) // 4
        assert held <= 1024 + 64
        assert len(observer.values) <= observers.PIECES + 1
        if number <= 16:
            assert torch.equal(observer.sample(), torch.cat(batches[:number])[:: number | 1])
        else:  # evenly spaced over all that was given
            kept = torch.cat(observer.values)
            assert kept[0] == 0
            assert kept.diff().unique().tolist() in ([11], [121])
            assert kept[-1] >= number * 64 - 121
            assert len(observer.sample()) >= 42


def test_every_module_comes_back_in_its_own_mode() -> None:
    class Stubborn(nn.Sequential):
        """A network whose norms never train, by a `train` of its own."""

        def train(self, mode: bool = True) -> Stubborn:
            super().train(mode)
            self[1].eval()
            return self

    def frozen(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
        return kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()

    hooked = frozen()
    hooked[1].eval()
    hooked[2].eval()
    inverted = frozen().eval()
    inverted[2].train()  # dropout for Monte Carlo estimates
    for network in (hooked, inverted, frozen(Stubborn)):
        network[0].register_forward_hook(lambda *_: None)
        before = [module.training for module in network.modules()]
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()]
        for calibrate in (pictures(), None):
            made = Q.quantize(network, {"0": (4, None), "3": (4, None)}, calibrate=calibrate)
            assert [module.training for module in made.modules()] == before
            assert [module.training for module in network.modules()] == before
            assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in made.modules()] == hooks
    failing = frozen()
    failing[1].eval()
    with pytest.raises(ValueError, match="isn't finite"):
        observers.observe(failing, {"0": failing[0]}, torch.full((2, 3, 4, 4), torch.inf))
    assert [module.training for module in failing.modules()] == [True, True, False, True, True]
    assert not failing[0]._forward_pre_hooks


@pytest.mark.parametrize(
    "batches",
    [
        images(8).double(),
        [images(8).half().double()[:4], images(8)[4:]],
        (images(8), torch.arange(8)),
        [images(8), torch.zeros(8, 1, dtype=torch.uint8)],
        torch.utils.data.TensorDataset(images(8), torch.arange(8)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(8), torch.arange(8)), 3),
    ],
)
def test_inputs_are_taken_in_the_networks_type_and_labels_left_out(batches: Any) -> None:
    network = small_network()
    made = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=batches)
    expected = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images(8))
    assert torch.allclose(made.stem.activation_scale, expected.stem.activation_scale, rtol=2e-3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (images(4).numpy(), r"ndarray of type float32 and shape \(4, 1, 8, 8\); give a tensor"),
        ([images(4).numpy()], r"gave a ndarray of type float32"),
        ((images(4) * 255).to(torch.uint8), r"can't be called with .* a Tensor of type torch.uint8 and shape \(4, 1, 8, 8\)"),
        ({"x": images(4)}, "`calibrate` is of type dict; give"),
        ([{"x": images(4)}], "layer 'stem' is called with dict"),
        ("images", "of type str"),
        (5, "of type int"),
        ([5], "of type int|called with int"),
        ([()], "an empty tuple"),
        ([None], "NoneType"),
        (images(4)[:0], "at least one image"),
        (images(4).expand(-1, 2, -1, -1), "can't be called with"),
        (images(4).to(torch.complex64), "can't be called with|complex"),
    ],
)
def test_what_is_no_input_is_one_sentence(batches: Any, message: str) -> None:
    network = small_network()
    with pytest.raises(ValueError, match=message) as raised:
        Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=batches)
    assert "\n" not in str(raised.value)


def test_words_and_networks_of_dicts_are_handed_on() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, batch: Any) -> Any:
            if isinstance(batch, dict):
                batch = batch["words"]
            return self.out(input=self.words(batch).mean(1))

    words = torch.arange(12).view(3, 4) % 9
    states = [
        Q.quantizer_state(Q.quantize(network, {"out": (4, 4)}, calibrate=batches))
        for network in [Text()]
        for batches in (words, [{"words": words}], (words, torch.arange(3)))
    ]
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def output_errors(layer: nn.Module, x: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What a layer's outputs lose by channel once the bias is corrected, and what of it is a multiple of the output."""
    weight = layer.weight.detach()
    quantized = Q.fake_quantize(weight, scales[bits - 1].view(-1, *[1] * (weight.dim() - 1)), bits, True)
    results = []
    for values in (weight, quantized):
        y = torch.func.functional_call(layer, {"weight": values}, x).detach().double()
        y = y.movedim(1, -1).flatten(0, -2)
        results.append(y - y.mean(0))
    y, left = results[0], results[0] - results[1]
    return left.square().mean(0), (left * y).mean(0).square() / y.square().mean(0)


LAYERS = {
    "dense": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "pointwise": lambda: nn.Conv2d(8, 6, 1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_scales_by_the_output_lose_less_of_it_than_by_any_other_rule(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "ENOUGH", 10**9)
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    x = torch.randn(20, 8, 8, 8).cumsum(1).relu()
    moments = InputMoments("layer", layer)
    moments(layer, (x,))
    found, errors = fit_weight_scales(layer.weight, "output", moments=moments)
    assert (errors[1:].diff() < 0).all()
    for bits in range(1, 9):
        left, along = output_errors(layer, x, found, bits)
        rules = ["max"]
        if kind != "depthwise":  # of so few weights, one may be rounded better by chance
            rules.append("mse")
        for rule in rules:
            scales, _ = fit_weight_scales(layer.weight, rule)
            other, other_along = output_errors(layer, x, scales, bits)
            # Multiples of the output count ten times more.
            assert (left + 10 * along).sum() <= (other + 10 * other_along).sum() * 1.02, (rule, bits)
            if bits in (2, 3) and kind != "depthwise":
                assert (left + 10 * along).sum() < 0.95 * (other + 10 * other_along).sum(), (rule, bits)


def test_errors_of_outputs_with_many_inputs_are_nearly_the_true_ones() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 40)
    # A few directions hold most of the variance, as in networks.
    x = torch.randn(2000, 300) @ (torch.randn(300, 300) * torch.logspace(0, -2, 300)[:, None])
    moments = InputMoments("layer", layer)
    moments(layer, (x,))
    measure = OutputErrors(layer.weight.detach(), moments)
    scales = torch.rand(5, 40) * 0.02 + 0.01
    for bits in (2, 3, 4):
        found = measure.of(scales, bits)
        for index in range(5):
            left, along = output_errors(layer, x, scales[index].expand(8, -1), bits)
            expected = (left + 10 * along).float()
            assert ((found[index] - expected).abs() / expected).median() < 0.1


def test_without_inputs_the_output_rule_is_that_of_the_weights_own_error() -> None:
    network = nn.Sequential(nn.Linear(6, 4))
    policy = {"0": (3, None)}
    states = [Q.quantizer_state(Q.quantize(network, policy, scheme=Q.Linear(calibration=rule))) for rule in ("mse", "output")]
    assert same(*states)
    seen = Q.quantizer_state(Q.quantize(network, policy, scheme=Q.Linear(calibration="output"), calibrate=torch.randn(50, 6)))
    assert not torch.equal(seen["0.weight_scale"], states[0]["0.weight_scale"])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_by_the_output_are_positive_whatever_the_layer_is_like(power_of_two: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 5)
    layer.weight.data[1] = 0
    for x in (torch.zeros(10, 8), torch.ones(10, 8), torch.randn(10, 8), torch.randn(1, 8)):
        moments = InputMoments("layer", layer)
        moments(layer, (x,))
        scales, errors = fit_weight_scales(layer.weight, "output", power_of_two, moments)
        assert scales.dtype == errors.dtype == torch.float32
        assert (scales > 0).all()
        assert scales.isfinite().all()
        assert (scales[:, 1] == 1).all()
        if power_of_two:
            assert torch.equal(scales, 2 ** scales.log2().round())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (1, 7), (5, 1), (3, 0), (0, 3), (4, 200)])
def test_candidates_that_are_measured_together_are_measured_as_one_by_one(
    shape: tuple[int, ...], power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; of a channel of zeros, and where several lose as much, too."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)
    weight[1:2] = 0
    together = fit_weight_scales(weight, power_of_two=power_of_two)
    monkeypatch.setattr(observers, "CACHED_VALUES", 1)
    alone = fit_weight_scales(weight, power_of_two=power_of_two)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
