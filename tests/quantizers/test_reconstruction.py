"""Learned rounding brings a quantized network's outputs closer to the float network's, and changes nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers import reconstruction
from quantizers.correction import distance


class Residual(nn.Sequential):
    """relu(x + f(x))."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.relu_(super().forward(x) + x)
        return result


class Scaled(nn.Linear):
    """A layer of somebody's own, which doubles its outputs."""

    def forward(self, values: Tensor) -> Tensor:
        return 2 * super().forward(values)


class Twice(nn.Module):
    """One layer that is called twice, and a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.relu = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        result: Tensor = self.layer(self.relu(self.layer(input=y))[:, :8])
        return result


def images(count: int = 96, shape: tuple[int, ...] = (3, 8, 8), seed: int = 1) -> Tensor:
    """Mixtures of some patterns: where values have nothing to do with each other, rounding to nearest is the best there is."""
    patterns = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    shares = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("np,p...->n...", shares, patterns) + 0.3


def network(folded: bool = True) -> Any:
    """A dense, a depthwise and a grouped convolution, in a residual block, and a linear layer."""
    torch.manual_seed(0)
    block = Residual(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1, groups=2, bias=False),
        nn.BatchNorm2d(8),
    )
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), block, nn.Flatten(), nn.Linear(72, 5)
    )
    made.train()
    with torch.no_grad():
        for _ in range(20):
            made(images())
    made.eval()
    if folded:
        made = Q.fold_batch_norm(made, images(2))
    return made


def quantized(of: nn.Module, calibrate: Any) -> Any:
    return Q.quantize(of, Q.BitPolicy.uniform(of, w=3, a=8), calibrate=calibrate)


@torch.no_grad()
def off(qnetwork: nn.Module, of: nn.Module, inputs: Tensor) -> float:
    return distance(qnetwork, of, [inputs])


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_outputs_come_closer(method: str, folded: bool) -> None:
    """On images of the calibration, and on others."""
    of = network(folded)
    qnetwork = quantized(of, images())
    others = images(200, seed=7)
    before = off(qnetwork, of, others)
    result = Q.reconstruct(qnetwork, of, images(), method=method, iterations=30)
    assert result.is_kept
    assert result.after == pytest.approx(off(qnetwork, of, images()), rel=1e-4)
    assert result.after < 0.6 * result.before
    assert off(qnetwork, of, others) < 0.8 * before
    names = [part.name for part in result.parts]
    expected = ["0", "3", "5"]
    if method == "adaround":
        expected = ["0", "3.0", "3.3", "5"]
    assert names == expected
    for part in result.parts:
        assert part.is_kept == (part.after < part.before)


def test_it_is_better_than_the_correction_of_biases_alone() -> None:
    of = network()
    corrected, learned = quantized(of, images()), quantized(of, images())
    Q.correct_bias(corrected, of, images())
    Q.reconstruct(learned, of, images(), iterations=30)
    assert off(learned, of, images()) < 0.9 * off(corrected, of, images())


def test_means_of_outputs_are_exact() -> None:
    """Of layers that are learned one by one."""
    of = network()
    qnetwork = quantized(of, images())
    result = Q.reconstruct(qnetwork, of, images(), method="adaround", iterations=5)
    assert any(part.is_kept for part in result.parts)
    for part in result.parts:
        if part.is_kept:
            one, other = mean_of(qnetwork, part.name), mean_of(of, part.name)
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def mean_of(network: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda layer, given, output: seen.append(output.clone()))
    network(images())
    handle.remove()
    return seen[0].transpose(0, 1).flatten(1).double().mean(1)


def test_it_counts_for_its_policy_alone_and_is_kept_in_the_state() -> None:
    of = network()
    qnetwork = quantized(of, images())
    policy = Q.get_policy(qnetwork)
    other = Q.BitPolicy.uniform(of, w=4, a=8)
    with torch.no_grad():
        plain = quantized(of, images())
        Q.set_policy(plain, other)
        at_four_bits = plain(images())
        Q.reconstruct(qnetwork, of, images(), iterations=30)
        learned = qnetwork(images())
        Q.set_policy(qnetwork, other)
        assert torch.equal(qnetwork(images()), at_four_bits)
        Q.set_policy(qnetwork, policy)
        assert torch.equal(qnetwork(images()), learned)
        again = Q.quantize(of, policy, state=Q.quantizer_state(qnetwork))
        assert torch.equal(again(images()), learned)
    for layer in Q.quant_layers(qnetwork).values():
        integers = layer.scheme.integer_weights(layer)  # still integers of these bits
        assert integers.codes.abs().max() <= 3


def test_the_same_seed_gives_the_same() -> None:
    of = network()
    random = torch.random.get_rng_state()
    outputs = []
    for seed in (3, 3, 4):
        qnetwork = quantized(of, images())
        Q.reconstruct(qnetwork, of, images(), iterations=10, seed=seed)
        outputs.append(qnetwork(images()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.random.get_rng_state(), random)


def test_everything_else_stays_as_it_was() -> None:
    """Modes, hooks, what requires gradients, float weights, and the images."""
    of = network(folded=False)
    of.train()
    of[1].eval()
    qnetwork = quantized(of, images())
    qnetwork[0].weight.requires_grad_(False)
    inputs = images()

    def looks(network: nn.Module) -> list[Any]:
        seen: list[Any] = []
        for module in network.modules():
            own = vars(module)
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            seen.append((module.training, hooks, type(module), own.get("scheme"), own.get("backward_mode", "ste")))
        return seen + [(parameter.requires_grad, parameter.grad) for parameter in network.parameters()]

    before = looks(of), looks(qnetwork)
    states = copy.deepcopy(of.state_dict()), copy.deepcopy(qnetwork.state_dict())
    Q.reconstruct(qnetwork, of, inputs, iterations=5)
    assert before == (looks(of), looks(qnetwork))
    for old, module in zip(states, (of, qnetwork), strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, old[name]), name
    assert torch.equal(inputs, images())


def test_a_part_that_gets_worse_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    of = network()
    qnetwork = quantized(of, images())
    before = qnetwork(images())
    monkeypatch.setattr(reconstruction, "SHIFT_RATE", 1e3)
    monkeypatch.setattr(reconstruction._Learner, "_correct_mean", lambda self, name, pieces: spoiled(self.layers[name]))
    result = Q.reconstruct(qnetwork, of, images(), iterations=3)
    assert not any(part.is_kept for part in result.parts)
    assert torch.equal(qnetwork(images()), before)


def spoiled(layer: Q.QuantLayer) -> reconstruction._Outputs:
    reconstruction.tailor(layer, shift=torch.full((len(layer.weight),), 100.0))
    outputs = reconstruction._Outputs(is_linear=True)
    outputs._add(layer, None, torch.ones(4, 4))
    return outputs


def test_nothing_is_kept_if_the_network_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    of = network()
    qnetwork = quantized(of, images())
    Q.correct_bias(qnetwork, of, images())
    before = Q.quantizer_state(qnetwork)
    distances = iter([1.0, 2.0])
    monkeypatch.setattr(reconstruction, "distance", lambda *given: next(distances))
    result = Q.reconstruct(qnetwork, of, images(), iterations=2)
    assert not result.is_kept
    assert "nothing is kept" in str(result)
    assert "from 1 to 2" in str(result)
    after = Q.quantizer_state(qnetwork)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class Sequence(nn.Module):
    """Convolutions over time, then what takes its first dimension for time."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(6, 8, 3, groups=2)
        self.mixing = Mixing()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convolution(x)).permute(2, 0, 1)
        result: Tensor = self.mixing(y)[-1]
        return result


class Mixing(nn.Module):
    """A block that can't be computed for a part of its first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), Scaled(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        result: Tensor = self.other(values=y + y.mean(0, keepdim=True))
        return result


@pytest.mark.parametrize(
    ("made", "shape", "names"),
    [
        (Twice, (8,), ["first", "layer"]),
        (Sequence, (6, 9), ["convolution", "mixing.one", "mixing.other"]),
        (lambda: nn.Sequential(Scaled(8, 16), nn.GELU(), nn.Linear(16, 4)), (8,), ["0", "2"]),
    ],
)
def test_networks_of_all_kinds(made: Any, shape: tuple[int, ...], names: list[str]) -> None:
    """Layers that are called twice or by keyword, blocks that need their whole input, layers of somebody's own."""
    torch.manual_seed(0)
    of = made().eval()
    inputs = images(64, shape)
    qnetwork = Q.quantize(of, dict.fromkeys(Q.BitPolicy.uniform(of, w=3, a=8), (3, 8)), calibrate=inputs)
    result = Q.reconstruct(qnetwork, of, [inputs[:40], inputs[40:]], iterations=25)
    assert [part.name for part in result.parts] == names
    assert all(part.is_kept for part in result.parts)
    assert result.is_kept == (result.after <= result.before)


def test_images_of_several_sizes_and_layouts() -> None:
    of = nn.Sequential(*list(network())[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    of.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = [images(32).to(memory_format=torch.channels_last), images(32, (3, 12, 10))]
    qnetwork = quantized(of, batches)  # type: ignore[arg-type]
    result = Q.reconstruct(qnetwork, of, batches, iterations=25)
    assert result.is_kept
    assert result.after < 0.8 * result.before


class Gated(nn.Linear):
    """A layer with two inputs."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class WithGate(nn.Module):
    """A layer that needs two inputs, and one that doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.plain = Gated(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.plain(self.gated(x, x.sigmoid()))
        return result


def test_a_layer_with_two_inputs_is_left_as_it_was_and_named() -> None:
    torch.manual_seed(0)
    of = WithGate().eval()
    inputs = images(64, (8,))
    qnetwork = quantized(of, inputs)
    result = Q.reconstruct(qnetwork, of, inputs, iterations=10)
    gated, plain = result.parts
    assert (gated.name, plain.name) == ("gated", "plain")
    assert math.isnan(gated.before)
    assert not gated.is_kept
    assert qnetwork.gated.tailored_offset is None


def test_few_images_leave_weights_nearer_to_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a channel has as many weights as it has outputs, rounding doesn't follow the accidents of these."""
    torch.manual_seed(0)
    of = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    others = torch.randn(500, 32, generator=torch.Generator().manual_seed(2))
    left = []
    for ridge in (0.0, 2.0):
        monkeypatch.setattr(reconstruction, "RIDGE", ridge)
        qnetwork = quantized(of, inputs)
        Q.reconstruct(qnetwork, of, inputs, iterations=100)
        left.append(off(qnetwork, of, others))
    assert left[1] < left[0]


def test_float_layers_are_left_out_and_one_bit_is_a_sign() -> None:
    of = network()
    policy = {"0": (8, 8), "3.0": (None, 8), "3.3": (1, 8), "5": (4, None)}
    qnetwork = Q.quantize(of, policy, calibrate=images())
    result = Q.reconstruct(qnetwork, of, images(), iterations=25)
    layers = Q.quant_layers(qnetwork)
    assert [part.layers for part in result.parts] == [("0",), ("3.3",), ("5",)]
    assert layers["3.0"].tailored_offset is None
    scale = layers["3.3"].weight_scale[0].view(-1, 1, 1, 1)
    assert torch.equal((layers["3.3"].quantized_weight() / scale).abs().round(), torch.ones(8, 4, 1, 1))
    assert result.after < result.before


def test_what_gptq_found_is_where_it_begins() -> None:
    """With nothing learned, the weights are those that the layer had."""
    of = network()
    qnetwork = quantized(of, images())
    layer = Q.quant_layers(qnetwork)["5"]
    random = torch.Generator().manual_seed(0)
    layer.weight_offset = torch.randint(-1, 2, (8, *layer.weight.shape), generator=random).to(torch.int8)
    before = layer.quantized_weight()
    rounding = reconstruction._Rounding(layer)
    found = ((rounding.nearest + rounding.offset()) * rounding.scale).float()
    torch.testing.assert_close(found, before)


def test_memory_is_bounded_by_leaving_images_out(monkeypatch: pytest.MonkeyPatch) -> None:
    of = network()
    qnetwork = quantized(of, images())
    monkeypatch.setattr(reconstruction, "CACHED_BYTES", 1 << 14)
    seen: list[int] = []
    error = reconstruction._Learner._error

    def noting(self: Any, pieces: Any) -> float:
        seen.append(sum(tensor.nbytes for piece in pieces for tensor in piece))
        return error(self, pieces)

    monkeypatch.setattr(reconstruction._Learner, "_error", noting)
    Q.reconstruct(qnetwork, of, images(), iterations=2)
    assert max(seen) <= 2 << 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hessian"}, "unknown method 'hessian'; known: adaround, brecq"),
        ({"iterations": 0}, "iterations must be a positive integer, not 0"),
        ({"scheme": "kmeans"}, "can't round otherwise .* 0 [(]kmeans[)], 3.0 [(]kmeans[)]"),
        ({"bits": None}, "no layer has quantized weights"),
        ({"batches": []}, "at least one image"),
        ({"of": "quantized"}, "layer '0' of the float network is quantized"),
    ],
)
def test_what_can_not_be_is_said(options: dict[str, Any], message: str) -> None:
    of = network()
    scheme, bits = options.pop("scheme", "linear"), options.pop("bits", 3)
    qnetwork = Q.quantize(
        of, Q.BitPolicy(dict.fromkeys(Q.BitPolicy.uniform(of, w=4, a=8), (bits, 8))), scheme=scheme, calibrate=images()
    )
    batches = options.pop("batches", images())
    if options.pop("of", ""):
        of = qnetwork
    with pytest.raises(ValueError, match=message):
        Q.reconstruct(qnetwork, of, batches, **options)
