"""`quantize` makes a copy that keeps the float network's keys, changes bits at no cost and never shows stale weights."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hw_models
import quantizers as Q
from quantizers.functional import BLOCK
from tests.conftest import images, small_network


def quantized(network: nn.Module, w: int | None = 4, a: int | None = 4) -> nn.Module:
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), calibrate=images(32))


def test_the_network_is_copied_and_its_keys_are_kept(network: nn.Module) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    qnetwork = quantized(network)
    assert list(qnetwork.state_dict()) == list(before)
    qnetwork.load_state_dict(before, strict=True)
    small_network(1).load_state_dict(qnetwork.state_dict(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert type(network.stem) is nn.Conv2d
    assert isinstance(qnetwork.stem, Q.QuantConv2d)
    assert isinstance(qnetwork.classifier, Q.QuantLinear)


def test_layers_compute_what_their_formula_says(network: nn.Module) -> None:
    qnetwork = quantized(network, 3, 5)
    layer = qnetwork.get_submodule("depthwise")
    assert isinstance(layer, Q.QuantConv2d)
    x = network[:3](images(4))
    expected = F.conv2d(
        Q.fake_quantize(x, layer.activation_scale[4], 5, False),
        Q.fake_quantize(layer.weight, layer.weight_scale[2].view(-1, 1, 1, 1), 3, True),
        layer.bias,
        padding=1,
        groups=16,
    )
    assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_none_is_float(network: nn.Module) -> None:
    x = images(8)
    assert torch.equal(quantized(network, None, None)(x), network(x))
    assert not torch.equal(quantized(network, 2, None)(x), network(x))


def test_eight_bits_are_nearly_float_and_two_are_not(network: nn.Module) -> None:
    x = images(64)
    errors = [(quantized(network, b, b)(x) - network(x)).square().mean().item() for b in (8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 * errors[-1]


def test_unsigned_where_the_data_are(network: nn.Module) -> None:
    layers = Q.quant_layers(quantized(network))
    assert {name: bool(layer.activation_signed) for name, layer in layers.items()} == {
        "stem": False,  # images in [0, 1]
        "depthwise": False,  # after ReLU
        "pointwise": False,
        "hidden": False,
        "classifier": True,  # after a linear layer
    }


def test_set_policy_equals_quantizing_anew(network: nn.Module) -> None:
    qnetwork, x = quantized(network, 8, 8), images(16)
    with torch.inference_mode():
        for w, a in ((2, 7), (8, 8), (5, 3), (2, 7), (1, 1)):
            Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, w=w, a=a))
            assert torch.equal(qnetwork(x), quantized(network, w, a)(x))
    assert Q.get_policy(qnetwork) == Q.BitPolicy.uniform(network, w=1, a=1)


def test_kept_weights_never_outlive_a_change(network: nn.Module) -> None:
    qnetwork, x = quantized(network), images(4)
    layer = qnetwork.get_submodule("stem")
    with torch.inference_mode():
        before = qnetwork(x)
    with torch.no_grad():
        layer.weight.mul_(-1)
    with torch.inference_mode():
        after = qnetwork(x)
    assert not torch.equal(before, after)
    qnetwork.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.equal(qnetwork(x), before)
        layer.weight_scale.mul_(1.5)
        assert not torch.equal(qnetwork(x), before)


def test_one_training_step_lowers_the_loss_and_reaches_every_parameter(network: nn.Module) -> None:
    qnetwork, x, y = quantized(network).train(), images(32), torch.arange(32) % 4
    optimizer = torch.optim.SGD(qnetwork.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(qnetwork(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in qnetwork.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_activation_scales_can_be_learned(network: nn.Module) -> None:
    qnetwork, x = quantized(network, 4, 3), images(32)
    before = qnetwork(x).detach()
    scales = Q.activation_scales(qnetwork)
    assert torch.equal(qnetwork(x), before)
    with torch.no_grad():
        assert torch.equal(qnetwork(x), before)
    qnetwork(x).square().sum().backward()
    for scale in scales:
        assert scale.grad is not None
        assert scale.grad[2] != 0
        assert (scale.grad[[0, 1, 3, 4, 5, 6, 7]] == 0).all()
    assert "stem.activation_scale" not in qnetwork.state_dict()


def test_a_copy_is_independent(network: nn.Module) -> None:
    qnetwork, x = quantized(network), images(4)
    with torch.inference_mode():
        before = qnetwork(x)
    twin = copy.deepcopy(qnetwork)
    Q.set_policy(twin, Q.BitPolicy.uniform(network, w=2, a=2))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    with torch.inference_mode():
        assert torch.equal(qnetwork(x), before)
        assert not torch.equal(twin(x), before)


def test_scales_travel_as_a_state(network: nn.Module) -> None:
    qnetwork, x = quantized(network, 3, 3), images(4)
    again = Q.quantize(network, Q.get_policy(qnetwork), state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), qnetwork(x))
    with pytest.raises(ValueError, match="another network"):
        Q.load_quantizer_state(again, {"nothing.weight_scale": torch.ones(8, 1)})
    wrong = Q.quantizer_state(qnetwork) | {"stem.weight_scale": torch.ones(8, 1)}
    with pytest.raises(ValueError, match=r"stem\.weight_scale"):
        Q.load_quantizer_state(again, wrong)


class PaddedConv(nn.Conv2d):
    """A subclass with a forward of its own, as timm's and EfficientNet-Lite's padding convolutions have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_subclasses_keep_their_own_forward() -> None:
    network = nn.Sequential(PaddedConv(1, 3, 3), nn.Flatten(), nn.Linear(192, 2)).eval()
    x = images(4)
    qnetwork = quantized(network, 8, 8)
    assert qnetwork[0](x).shape == (4, 3, 8, 8)
    torch.testing.assert_close(qnetwork(x), network(x), atol=0.05, rtol=0.05)
    order = [name for name, _ in network.named_parameters()]
    qnetwork(x).sum().backward()
    assert [name for name, _ in qnetwork.named_parameters()] == order
    assert qnetwork[0].weight.grad.abs().sum() > 0
    assert isinstance(copy.deepcopy(qnetwork)[0], PaddedConv)


class Gained(nn.Linear):
    """A subclass with a name of its own for its input, and with another argument."""

    def forward(self, rows: Tensor, gain: float = 1.0) -> Tensor:
        return gain * F.linear(rows, self.weight, self.bias)


class ByName(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Gained(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(input=self.conv(input=x)).mean((2, 3))
        result: Tensor = self.out(gain=2.0, rows=rows)
        return result


def test_layers_can_be_called_by_keyword() -> None:
    network, x = ByName().eval(), images(4)
    qnetwork = quantized(network, 8, 8)
    torch.testing.assert_close(qnetwork(x), network(x), atol=0.05, rtol=0.05)
    layer, rows = qnetwork.out, torch.ones(2, 4)
    assert torch.equal(layer(rows, 2.0), layer(gain=2.0, rows=rows))
    assert not torch.equal(layer(rows, 2.0), layer(rows=rows))
    assert isinstance(Q.fold_batch_norm(network, x).norm, nn.Identity)
    assert set(Q.error_amplification(network, x, x + 0.1)) == {"conv", "out"}


class OnlyByName(nn.Linear):
    """Takes its input by keyword only."""

    def forward(self, *, rows: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(rows, self.weight, self.bias)


def test_a_layer_may_take_keywords_only() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = OnlyByName(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(rows=x.flatten(1))
            return result

    network, x = Network(), images(4)
    torch.testing.assert_close(quantized(network, 8, 8)(x), network(x), atol=0.05, rtol=0.05)


def test_lazy_layers_are_named() -> None:
    network, x = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), images(4)
    for refused in (lambda: quantized(network), lambda: Q.fold_batch_norm(network, x), lambda: hw_models.trace(network, x)):
        with pytest.raises(ValueError, match=r"'1.weight' has no shape yet, since its layer is lazy: call the network once"):
            refused()
    network(x)
    assert quantized(network)(x).shape == (4, 4)


class Rebuilt(nn.Linear):
    """Says by itself how it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Rebuilt, (self.in_features, self.out_features), self.__dict__


def test_a_layer_that_pickles_in_its_own_way_keeps_its_bits() -> None:
    qnetwork = quantized(nn.Sequential(nn.Flatten(), Rebuilt(64, 2)), 2, 2)
    for again in (copy.deepcopy(qnetwork), pickle.loads(pickle.dumps(qnetwork))):
        assert Q.get_policy(again) == Q.get_policy(qnetwork)
        assert torch.equal(again(images(4)), qnetwork(images(4)))


def test_any_layer_can_be_pickled() -> None:
    x = images(4)
    networks = (ByName(), nn.Sequential(PaddedConv(1, 3, 3), nn.Flatten(), nn.Linear(192, 2)))
    for network in networks:
        qnetwork = quantized(network.eval())
        file = io.BytesIO()
        torch.save(qnetwork, file)
        file.seek(0)
        for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(qnetwork))):
            assert torch.equal(again(x), qnetwork(x))
            assert Q.get_policy(again) == Q.get_policy(qnetwork)
            assert torch.equal(Q.float_copy(again)(x), network(x))


class Shared(nn.Module):
    """Holds one layer under three names, in a list, a dict and a function's arguments, and uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.modules_by_name = nn.ModuleDict({"third": self.first})
        self.in_list, self.in_dict = [self.first], {"layer": (self.first,)}
        self.in_function = functools.partial(self.apply_layer, self.first)
        self.myself = [self]

    def apply_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layer(x)
        return result

    def users(self) -> list[nn.Module]:
        held = [self.in_list[0], self.in_dict["layer"][0], self.in_function.args[0]]
        return [self.first, self.second, self.modules_by_name["third"], *held]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.users():
            x = layer(x)
        return self.in_function(x)


def test_a_layer_is_quantized_wherever_it_is_held() -> None:
    network, x = Shared(), torch.randn(16, 8)
    qnetwork = Q.quantize(network, {"first": (2, 2)}, calibrate=x)
    twin = copy.deepcopy(qnetwork)
    Q.set_policy(twin, {"first": (8, 8)})
    for made, bits in ((qnetwork, 2), (twin, 8), (pickle.loads(pickle.dumps(qnetwork)), 2)):
        assert Q.get_policy(made) == {"first": (bits, bits)}
        assert isinstance(made.first, Q.QuantLinear)
        assert all(user is made.first for user in made.users())
        assert made.myself[0] is made
    again = Q.quantize(network, {"first": (2, 2)}, state=Q.quantizer_state(qnetwork))
    again.load_state_dict(qnetwork.state_dict(), strict=True)
    assert torch.equal(again(x), qnetwork(x))
    plain = Q.float_copy(qnetwork)
    assert all(type(user) is nn.Linear for user in plain.users())
    assert torch.equal(plain(x), network(x))
    for wrong in (
        lambda: Q.set_policy(qnetwork, {"second": (2, 2)}),
        lambda: Q.quantize(network, {"second": (2, 2)}, calibrate=x),
    ):
        with pytest.raises(ValueError, match="the policy names 'second', which is layer 'first' too"):
            wrong()


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    network[2].weight = network[0].weight
    qnetwork = Q.quantize(network, {"0": (2, 4), "2": (8, 8)}, calibrate=torch.randn(16, 8))
    assert qnetwork[0].weight is qnetwork[2].weight
    assert Q.float_copy(qnetwork)[0].weight.requires_grad


def test_a_channel_of_zeros_stays_zero() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        network[1].weight[1] = 0
    for b in range(2, 9):
        out = quantized(network, b, 8)(images(4))
        assert out.isfinite().all()
        assert torch.equal(out[:, 1], network[1].bias[1].expand(4))


def test_layers_that_are_never_called_stay_float() -> None:
    network = small_network()
    network.add_module("classifier", nn.Linear(16, 4))

    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = network, nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    net = WithSpare().eval()
    called = {f"body.{name}": (4, 4) for name in Q.BitPolicy.uniform(network, w=4, a=4)}
    qnetwork = Q.quantize(net, called, calibrate=images(4))
    assert type(qnetwork.spare) is nn.Linear
    with pytest.raises(ValueError, match=r"spare.*never called"):
        Q.quantize(net, Q.BitPolicy.uniform(net, w=4, a=4), calibrate=images(4))


@pytest.mark.parametrize("batches", [images(6), [images(3), images(3)], [(images(6), torch.zeros(6))], [[images(6), 0]]])
def test_calibration_takes_tensors_and_loaders(network: nn.Module, batches: Any) -> None:
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=batches)
    assert qnetwork(images(2)).isfinite().all()


def test_the_mode_of_the_network_is_kept(network: nn.Module) -> None:
    network.train()
    statistics = network.norm.running_mean.clone()
    assert quantized(network).training
    assert network.training
    assert torch.equal(network.norm.running_mean, statistics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": {"stem2": (4, 4)}}, "stem2.*close: stem"),
        ({"policy": {"stem": (4, 4)}}, "lacks layers depthwise, pointwise, hidden, classifier"),
        ({"policy": {"stem": (0, 4)}}, "lacks layers|1 to 8"),
        ({"scheme": "magic"}, "unknown scheme 'magic'.* known: .*linear"),
        ({"calibrate": []}, "at least one image"),
        ({"calibrate": None}, "calibrate"),
        ({"calibrate": torch.full((2, 1, 8, 8), float("nan"))}, "isn't finite"),
    ],
)
def test_bad_input_is_named(network: nn.Module, arguments: dict[str, Any], message: str) -> None:
    given = {"policy": Q.BitPolicy.uniform(network, w=4, a=4), "calibrate": images(4), **arguments}
    with pytest.raises(ValueError, match=message):
        Q.quantize(network, **given)


def test_set_policy_changes_nothing_when_it_fails(network: nn.Module) -> None:
    qnetwork = quantized(network)
    before = Q.get_policy(qnetwork)
    for bad in ({"stem": (2, 2)}, {**before, "other": (2, 2)}):
        with pytest.raises(ValueError, match="lacks|no layer"):
            Q.set_policy(qnetwork, bad)
        assert Q.get_policy(qnetwork) == before
    with pytest.raises(ValueError, match="quantized already"):
        Q.quantize(qnetwork, before, calibrate=images(2))


def test_memory_that_is_used_again_changes_no_result() -> None:
    """Large inputs are quantized into memory that the thread keeps: other calls and other threads leave results alone."""
    layer = Q.quantize(nn.Conv2d(4, 3, 1), Q.BitPolicy({"": (4, 4)}), calibrate=torch.randn(2, 4, 8, 8))
    inputs = [torch.randn(3, 4, 200, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [layer(x.requires_grad_()).detach() for x in inputs]  # with gradients nothing is used again
    for context in (torch.no_grad, torch.inference_mode):

        def run(x: Tensor, context: Any = context) -> Tensor:
            with context():
                result: Tensor = layer(x.detach())
                return result

        one_by_one = [run(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, inputs * 4))
        for index, result in enumerate([*one_by_one, *together]):
            assert torch.equal(result, expected[index % 4])
    smaller = inputs[0][:, :, :100]  # not dense
    with torch.no_grad():
        assert torch.equal(layer(smaller), expected[0][:, :, :100])


class Nested(nn.Linear):
    """A layer with layers of its own, which all read one input, and which hands its input on."""

    def __init__(self) -> None:
        super().__init__(512, 8)
        self.inner = nn.Linear(512, 8)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + F.linear(x, self.weight, self.bias), x


@pytest.mark.parametrize("scheme", ["linear", "lsq", "pact", "dorefa"])
def test_memory_in_use_is_nobody_elses(scheme: str) -> None:
    """Nested layers, a layer that returns its input, a hook that keeps it, and other threads."""
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    assert x.numel() > BLOCK
    layer = Q.quantize(Nested(), {"": (8, 8), "inner": (2, 2)}, calibrate=x, scheme=scheme)
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, output: kept.append(output[1][:3]))
    results, handed = zip(*(layer(part) for part in (x, -x)), strict=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            kept.clear()
            again = [layer(part) for part in (x, -x)]
            with ThreadPoolExecutor(1) as pool:
                pool.submit(context()(layer), x / 3).result()
            for index, (result, given) in enumerate(again):
                torch.testing.assert_close(result, results[index])
                assert torch.equal(given, handed[index])
                assert torch.equal(kept[index], handed[index][:3])
    with torch.no_grad():  # memory that nothing refers to any more is used again
        places = {layer.inner.scheme.activation(layer.inner, x, 2).data_ptr() for _ in range(3)}
    kept.clear()
    assert len(places) == 1


def test_a_scheme_without_activation_scales_is_named(network: nn.Module) -> None:
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=2, a=2), scheme="dorefa")
    with pytest.raises(ValueError, match="layer 'stem' has scheme 'dorefa', which has no activation scales"):
        Q.activation_scales(qnetwork)
