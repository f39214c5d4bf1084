"""Odd networks and odd images in post-training quantization: what is computed stays right, what can't be is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q

WRONG_SHAPE = torch.rand(4, 5)
NO_NUMBERS = torch.full((4, 3, 6, 6), float("nan"))


def images(count: int = 24) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


def quantized(network: nn.Module, calibrate: Tensor, **options: Any) -> nn.Module:
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=3, a=8), calibrate=calibrate, **options)


def mean_outputs(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the mean of what each layer itself returns, before other hooks."""
    means: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def look(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
                channel = 1 if output.dim() == 4 else -1
                means[name] = output.double().movedim(channel, -1).flatten(0, -2).mean(0)

            layer.register_forward_hook(look, prepend=True)
    with torch.no_grad():
        network(inputs)
    return means


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(input=self.a(input=x).relu().mean((2, 3)))
        return made


def with_hook() -> nn.Module:
    network = net()
    network[3].register_forward_hook(lambda module, given, output: output * 2 + 1)
    return network


@pytest.mark.parametrize("make", [ByKeyword, with_hook])
def test_sequential_correction_is_of_what_layers_return_however_they_are_called(make: Callable[[], nn.Module]) -> None:
    network, inputs = make(), images()
    made = quantized(network, inputs)
    assert Q.correct_bias(made, network, inputs).kept
    expected, found = mean_outputs(network, inputs), mean_outputs(made, inputs)
    for name, mean in expected.items():
        assert (mean - found[name]).abs().max() < 1e-5, name


class OneByOne(nn.Module):
    """Takes images through its layers one by one, without a dimension of images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.a(image).relu().mean((1, 2))) for image in x])


def test_layers_without_a_dimension_of_images_are_corrected() -> None:
    network, inputs = OneByOne().eval(), images(6)
    made = quantized(network, inputs, correction="sequential")
    assert Q.correct_bias(made, network, inputs).after < 1e-2


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), 1


class OfPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Pair(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x)[0])
        return made


@pytest.mark.parametrize(("make", "name"), [(lambda: nn.Sequential(Rectified(6, 6), nn.Linear(6, 3)), "0"), (OfPair, "a")])
def test_layers_whose_mean_output_does_not_follow_from_the_mean_input_are_left_alone(make: Any, name: str) -> None:
    torch.manual_seed(0)
    network, inputs = make(), torch.randn(40, 6)
    with pytest.warns(UserWarning, match="without bias correction"):
        made = quantized(network, inputs, correction="analytic")
    assert made.get_submodule(name).bias_shift is None
    Q.correct_bias(made, network, inputs)


def correct(made: nn.Module, network: nn.Module, inputs: Any) -> object:
    return Q.correct_bias(made, network, inputs)


def reconstruct(made: nn.Module, network: nn.Module, inputs: Any) -> object:
    return Q.reconstruct(made, network, inputs, iterations=1)


def reestimate(made: nn.Module, network: nn.Module, inputs: Any) -> object:
    return Q.reestimate_norms(made, inputs, network=network, keep_worse=True)


@pytest.mark.parametrize("method", [correct, reconstruct, reestimate])
@pytest.mark.parametrize(("inputs", "reason"), [(WRONG_SHAPE, "can't be called with"), (NO_NUMBERS, "aren't finite")])
def test_images_that_mean_nothing_are_refused_and_change_nothing(method: Any, inputs: Tensor, reason: str) -> None:
    network = net()
    made = quantized(network, images(), correction="analytic")
    before = {**made.state_dict(), **Q.quantizer_state(made)}
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.raises(ValueError, match=reason):
        method(made, network, inputs)
    after = {**made.state_dict(), **Q.quantizer_state(made)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_float_network_of_other_outputs_is_refused() -> None:
    made = quantized(net(), images())
    with pytest.raises(ValueError, match="it is another one"):
        Q.reestimate_norms(made, images(), network=nn.Sequential(nn.Flatten(), nn.Linear(108, 7)))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: Q.equalize(net(), WRONG_SHAPE), "can't be called with the example"),
    (lambda: Q.equalize(net(), images(2), batches=NO_NUMBERS), "isn't finite appeared"),
    (lambda: Q.equalize(net(), images(2), layers="0"), "collection of names"),
    (lambda: Q.equalize(net(), images(2), layers=[]), "collection of names"),
    (lambda: Q.smooth(net(), WRONG_SHAPE), "can't be called with the example"),
    (lambda: Q.smooth(net(), images(), alpha="a"), "alpha must be"),  # type: ignore[arg-type]
    (lambda: Q.fold_shifts(net()), "an example is needed"),
    (lambda: Q.fold_shifts(net(), WRONG_SHAPE), "can't be called with the example"),
    (lambda: Q.fold_shifts(net(), NO_NUMBERS), "aren't finite"),
    (lambda: Q.reconstruct(quantized(net(), images()), net(), images(), seed="a"), "seed must be"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "reason"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_input_is_named(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()


def test_a_layer_is_named_once_where_its_moments_are_too_large() -> None:
    with pytest.raises(ValueError, match=r"^layer '0': products") as refused:
        quantized(net(), images() * 1e25, rounding="gptq")
    assert str(refused.value).count("layer '0'") == 1


def test_a_state_of_lists_is_refused() -> None:
    made = quantized(net(), images(), correction="analytic")
    state: dict[str, Any] = {**Q.quantizer_state(made), "0.bias_shift": [1, 2]}
    with pytest.raises(ValueError, match="is a list and no tensor"):
        Q.load_quantizer_state(made, state)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 3)]
    parts[1].running_var.fill_(0.3)
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("change", ["equalized", "folded", "bias alone", "without bias"])
def test_another_float_network_than_the_quantized_one_was_made_of_is_refused(change: str) -> None:
    """Its outputs may be the same, but not those of its layers, which reconstruction aims at."""
    network, x = chain(), torch.rand(16, 3, 4, 4)
    made = copy.deepcopy(network)
    if change == "equalized":
        made = Q.equalize(network, x)
    elif change == "folded":
        made = Q.fold_batch_norm(network, x)
    elif change == "bias alone":
        made[0].bias.data += 1
    else:
        made[0].bias = None
    policy = Q.BitPolicy.uniform(made, 4, 4)
    qnetwork = Q.quantize(made, policy, calibrate=x)
    for call in (Q.correct_bias, Q.reconstruct):
        with pytest.raises(ValueError, match="layer '0' has another weight or bias in the float network"):
            call(qnetwork, network, x)
    assert Q.correct_bias(qnetwork, made, x).kept
    with torch.no_grad():
        qnetwork[3].weight += 0.1
    with pytest.raises(ValueError, match="layer '3' has another weight"):
        Q.correct_bias(qnetwork, made, x)
    Q.correct_bias(qnetwork, Q.float_copy(qnetwork), x)


def test_roundings_by_layer_name_what_is_wrong() -> None:
    network, x = chain(), torch.rand(80, 3, 4, 4)
    policy = Q.BitPolicy.uniform(network, 4, 4)
    for rounding, message in (
        ({"typo": "gptq", "0": "gptq", "3": "gptq", "5": "gptq"}, "`rounding` names 'typo', which is no layer of the policy"),
        ({"0": "gptq"}, "`rounding` lacks layer '3'"),
        ("adaround", "rounding 'adaround' is learned for one policy: call `reconstruct`"),
        ("brecq", "rounding 'brecq' is learned for one policy"),
    ):
        with pytest.raises(ValueError, match=message):
            Q.quantize(network, policy, calibrate=x, rounding=rounding)
