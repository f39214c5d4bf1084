"""k-means weight sharing: few values that fit the weights well, whose training moves them and nothing else."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.network import learned_parameters
from quantizers.schemes.kmeans import KMeans, assignment, cluster
from tests.conftest import images

SIZES = [2**bits for bits in range(1, 9)]
vectors = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60).map(torch.tensor)
seeds = st.integers(0, 2**31)


def quantized(network: nn.Module, w: int | None = 4, a: int | None = None, **options: Any) -> nn.Module:
    calibrate = None if a is None else images(32)
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), scheme=KMeans(**options), calibrate=calibrate)


def one_layer(weight: Tensor, bits: int, **options: Any) -> Q.QuantLayer:
    network = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    with torch.no_grad():
        network[0].weight.copy_(weight)
    return Q.quant_layers(quantized(network, bits, **options))["0"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shared(values: Tensor, codebook: tuple[Tensor, Tensor]) -> Tensor:
    centroids, borders = codebook
    return centroids[torch.bucketize(values.double(), borders)]


def errors(values: Tensor, sizes: list[int]) -> list[float]:
    return [float((values - shared(values, found)).square().sum()) for found in cluster(values, sizes)]


def test_centroids_and_their_gradients() -> None:
    layer = one_layer(torch.tensor([[0, 0.1], [1, 1.2]]), 1, keep_zeros=False)
    codebook = layer.get_parameter("codebook")
    assert codebook[0, :2].tolist() == pytest.approx([0.05, 1.1])
    assert assignment(layer, 1).tolist() == [[0, 0], [1, 1]]
    assert assignment(layer, 1).dtype == torch.uint8
    torch.testing.assert_close(layer.quantized_weight(), torch.tensor([[0.05, 0.05], [1.1, 1.1]]))
    (layer.quantized_weight() * torch.tensor([[1, 2], [3, 5]])).sum().backward()
    assert codebook.grad is not None
    assert codebook.grad[0, :2].tolist() == [3, 8]  # the sum, not the mean
    assert not codebook.grad[0, 2:].any()
    assert not codebook.grad[1:].any()
    assert layer.weight.grad is None


@given(seeds, st.integers(1, 8))
def test_the_gradient_of_a_codebook_is_the_sum_over_its_weights(seed: int, bits: int) -> None:
    layer = one_layer(random(6, 5, seed=seed), bits)
    codebook, gradient = layer.get_parameter("codebook"), random(6, 5, seed=seed + 1)
    layer.quantized_weight().backward(gradient)
    index = assignment(layer, bits).long()
    expected = torch.stack([gradient[index == entry].sum() for entry in range(2**bits)])
    assert codebook.grad is not None
    torch.testing.assert_close(codebook.grad[bits - 1, : 2**bits], expected)


@given(vectors)
def test_more_clusters_never_fit_worse_and_enough_fit_exactly(values: Tensor) -> None:
    left = errors(values, SIZES)
    slack = 1e-9 * float(values.square().sum())
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(left))
    for size, (centroids, borders), error in zip(SIZES, cluster(values, SIZES), left, strict=True):
        assert len(centroids) <= size
        assert len(borders) == len(centroids) - 1
        assert (centroids.diff() > 0).all()
        if len(values.unique()) <= size:
            assert error == 0


@given(vectors, st.sampled_from(SIZES))
def test_centroids_are_means_and_their_order_is_no_matter(values: Tensor, size: int) -> None:
    found = cluster(values, [size])[0]
    centroids, borders = found
    index = torch.bucketize(values.double(), borders)
    means = [values[index == entry].double().mean() for entry in range(len(centroids))]
    torch.testing.assert_close(centroids, torch.stack(means))
    shuffled = cluster(values[random(len(values)).argsort()], [size])[0]
    assert torch.equal(shuffled[0], centroids)
    assert torch.equal(shuffled[1], borders)


@given(seeds)
def test_every_value_is_with_its_nearest_centroid(seed: int) -> None:
    values = random(300, seed=seed)
    for found in cluster(values, SIZES):
        nearest = (values.double()[:, None] - found[0]).abs().min(1).values
        assert torch.equal((values - shared(values, found)).abs(), nearest)


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499), (6, 0.000641)]
)
def test_a_gaussian_is_fitted_as_well_as_it_can_be(bits: int, distortion: float) -> None:
    """The least distortion of a normal distribution: Max 1960, "Quantizing for minimum distortion", table 1."""
    values = random(40000)
    left = errors(values, SIZES[:bits])[-1] / values.square().sum()
    assert left == pytest.approx(distortion, rel=0.08)


def test_it_fits_better_than_a_grid() -> None:
    layer = one_layer(random(64, 64), 4)
    grid = Q.quant_layers(Q.quantize(nn.Sequential(nn.Linear(64, 64)), {"0": (4, None)}))["0"]
    with torch.no_grad():
        grid.weight.copy_(layer.weight)
        grid.scheme.calibrate(grid, None)
    assert layer.weight_error[3] < grid.weight_error[3]
    left = (layer.quantized_weight() - layer.weight).square().sum() / layer.weight.square().sum()
    assert layer.weight_error[3].item() == pytest.approx(left.item(), rel=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pruned_weights_stay_zero(bits: int) -> None:
    weight = random(40, 30)
    pruned = weight.abs() < 0.8
    layer = one_layer(weight.masked_fill(pruned, 0), bits)
    codebook = layer.get_parameter("codebook")
    optimizer = torch.optim.SGD([codebook], 0.01)
    for _ in range(3):
        made = layer.quantized_weight()
        assert torch.equal(made == 0, pruned)
        assert len(made.unique()) <= 2**bits
        optimizer.zero_grad()
        (made * random(40, 30, seed=1)).sum().backward()
        optimizer.step()
    lost = one_layer(weight.masked_fill(pruned, 0), bits, keep_zeros=False)
    assert len(lost.quantized_weight().unique()) == 2**bits


@pytest.mark.parametrize("weight", [torch.zeros(3, 2), torch.full((3, 2), -0.7), torch.tensor([[0.0, 2.0], [0.0, 0.0]])])
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_few_distinct_weights_lose_nothing(weight: Tensor, keep_zeros: bool) -> None:
    for bits in range(1, 9):
        layer = one_layer(weight, bits, keep_zeros=keep_zeros)
        assert torch.equal(layer.quantized_weight(), weight)
        assert not layer.weight_error[:8].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    weight = random(10, 8).to(dtype)
    layer = one_layer(weight, 8)
    assert layer.quantized_weight().dtype == dtype
    assert torch.equal(layer.quantized_weight(), weight)  # 80 weights, 256 values


def test_neighbouring_numbers_are_told_apart() -> None:
    one = torch.tensor(1.0)
    values = torch.stack([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one), 3 * one])
    assert torch.equal(one_layer(values[None], 2).quantized_weight(), values[None])


def test_training_moves_the_codebook_only(network: nn.Module) -> None:
    qnetwork = quantized(network, 3, 8).train()
    layers = Q.quant_layers(qnetwork)
    indices = {name: assignment(layer, 3).clone() for name, layer in layers.items()}
    x, y = images(32), torch.arange(32) % 4
    codebooks = learned_parameters(qnetwork)
    rest = [p for name, p in qnetwork.named_parameters() if not name.endswith("codebook")]
    optimizer = torch.optim.SGD([{"params": rest, "weight_decay": 1e-2}, {"params": codebooks, "lr": 0.005}], 0.05)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(qnetwork(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    before = quantized(network, 3, 8)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, network.get_submodule(name).weight)
        assert torch.equal(assignment(layer, 3), indices[name])
        assert len(layer.quantized_weight().unique()) <= 8
        old = before.get_submodule(name).codebook
        assert (layer.codebook[2] != old[2]).any()
        assert torch.equal(layer.codebook[[0, 1, 3, 4, 5, 6, 7]], old[[0, 1, 3, 4, 5, 6, 7]])


def test_keys_values_bits_copies_and_states(network: nn.Module) -> None:
    qnetwork, x = quantized(network, 8, 8), images(8)
    assert list(qnetwork.state_dict()) == list(network.state_dict())
    qnetwork.load_state_dict(network.state_dict(), strict=True)
    for w, a in ((2, 7), (1, 1), (None, 4), (4, None), (3, 5)):
        Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, w=w, a=a))
        made = qnetwork(x)
        assert torch.equal(made, quantized(network, w, a)(x))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(qnetwork(x), made)
    with torch.no_grad():
        for parameter in learned_parameters(qnetwork):
            # So far that the nearest centroid of most weights is now another.
            parameter.copy_(parameter.flip(1).roll(7, 1))
    with torch.inference_mode():
        before = qnetwork(x)
    again = Q.quantize(network, Q.get_policy(qnetwork), scheme="kmeans", state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(x), before)
    twin = copy.deepcopy(qnetwork)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.3)
    with torch.inference_mode():
        assert torch.equal(qnetwork(x), before)
        assert not torch.equal(twin(x), before)
    back = Q.float_copy(qnetwork)
    assert torch.equal(back(x), network(x))
    assert not [name for name in vars(back.stem) if "codebook" in name or "bank" in name]


def test_indices_are_never_those_of_other_weights(network: nn.Module) -> None:
    qnetwork = quantized(network, 4)
    layer = Q.quant_layers(qnetwork)["stem"]
    made, index = layer.quantized_weight().detach(), assignment(layer, 4)
    assert assignment(layer, 4) is not index  # a copy, which anybody may change
    index.zero_()
    assert torch.equal(layer.quantized_weight(), made)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    assert torch.equal(layer.quantized_weight(), made.flip(0))
    with torch.inference_mode():
        assert torch.equal(layer.quantized_weight(), made.flip(0))


def test_policies_of_weights_need_no_data(network: nn.Module) -> None:
    assert quantized(network, 4)(images(4)).isfinite().all()
    with pytest.raises(ValueError, match="calibrate"):
        Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), scheme="kmeans")


def test_activations_are_those_of_the_linear_scheme(network: nn.Module) -> None:
    policy = Q.BitPolicy.uniform(network, w=None, a=3)
    linear = Q.quantize(network, policy, scheme=Q.Linear("percentile", True), calibrate=images(32))
    assert torch.equal(quantized(network, None, 3, calibration="percentile", power_of_two=True)(images(4)), linear(images(4)))
    with pytest.raises(ValueError, match="calibration"):
        KMeans(calibration="magic")


def test_channels_last_weights(network: nn.Module) -> None:
    expected = quantized(network, 3)(images(4))
    last = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(quantized(last, 3)(images(4)), expected)


def test_a_weight_that_is_not_finite_is_refused(network: nn.Module) -> None:
    with torch.no_grad():
        network.stem.weight[0] = math.inf
    with pytest.raises(ValueError, match="'stem'.*not finite"):
        quantized(network)
