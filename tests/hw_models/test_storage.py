"""Storage is counted to the byte: weights at their bits, what comes with them, what stays in float, and activations at their
peak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hw_models


def trace(module: nn.Module, *shape: int) -> hw_models.Workload:
    return hw_models.trace(module, torch.zeros(1, *shape))


def test_bytes_of_a_layer_by_hand(network: nn.Module) -> None:
    workload = trace(network, 1, 8, 8)
    parts = hw_models.storage_parts(workload)
    stem, depthwise = 0, 1
    assert [parts["weights"][stem, b - 1] for b in (1, 3, 8)] == [18, 54, 144]
    assert parts["scales"][stem, 0] == 4 * (16 + 1)  # one per channel, one for the input
    assert (parts["biases"][stem, 0], parts["biases"][depthwise, 0]) == (0, 64)
    assert not parts["codebooks"].any()
    assert not parts["zero_points"].any()
    total = hw_models.load_target("edge").cost_table(workload).storage_bytes
    assert total[depthwise, 2, 5] == 54 + 68 + 64
    assert np.array_equal(total[:, :8, 0], sum(parts.values())[:, :8])
    assert (total == total[:, :, :1])[:, :8, :8].all()


def test_bytes_of_16_bits_and_float_by_hand(network: nn.Module) -> None:
    workload = trace(network, 1, 8, 8)
    stored = hw_models.storage_bytes(workload)
    depthwise = 1
    assert stored[depthwise, 8, 7] == 2 * 144 + 68 + 64
    assert stored[depthwise, 9, 7] == 4 * 144 + 4 + 64  # float weights have no scales, the input has one
    assert stored[depthwise, 9, 9] == 4 * 144 + 64
    assert stored[depthwise, 3, 9] == 72 + 64 + 64  # weights alone


def test_weights_are_padded_to_a_byte_per_layer() -> None:
    parts = hw_models.storage_parts(trace(nn.Linear(3, 3, bias=False), 3))
    assert parts["weights"][0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 18, 36]


def test_k_means_has_a_codebook_instead_of_scales() -> None:
    """n weights at b bits and 2^b float32 centroids (Han et al., ICLR 2016); no more centroids than weights."""
    parts = hw_models.storage_parts(trace(nn.Linear(10, 10), 10), "kmeans")
    assert parts["codebooks"][0].tolist() == [8, 16, 32, 64, 128, 256, 400, 400, 400, 0]
    assert parts["weights"][0, 3] == 50
    assert parts["scales"][0, 3] == 4


def test_affine_has_a_zero_point_beside_every_scale() -> None:
    workload = trace(nn.Linear(10, 7), 10)
    linear, affine = (hw_models.storage_bytes(workload, scheme) for scheme in ("linear", "affine"))
    assert (affine - linear == 7 + 1)[:, :9, :9].all()
    assert (affine - linear == 7)[:, :9, 9].all()
    assert (affine - linear == 0)[:, 9, 9].all()
    with pytest.raises(ValueError, match="unknown scheme 'huffman'.*linear, affine, kmeans"):
        hw_models.storage_parts(workload, "huffman")


def test_what_stays_in_float() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(8, 2))
    network.add_module("spare", nn.Identity())
    network.spare.unused = nn.Linear(5, 5)
    workload = trace(network, 3, 3, 3)
    assert hw_models.float_bytes(workload) == 4 * (4 * 8 + 8 + 30)  # norm, PReLU, a layer that is never called
    assert workload.parameters == sum(p.numel() for p in network.parameters())


def test_weights_that_two_layers_share_are_stored_once() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = network[0].weight
    workload = trace(network, 6)
    assert workload.other_parameters == 0
    assert workload.parameters == sum(p.numel() for p in network.parameters()) == 36 + 6 + 6
    assert [layer.own_parameters for layer in workload.layers] == [42, 6]
    for target in hw_models.target_names():
        table = hw_models.load_target(target).cost_table(workload)
        alone = hw_models.load_target(target).cost_table(trace(nn.Linear(6, 6), 6))
        # Beside the weight, each has its scales and its bias.
        assert table.storage_bytes[1] == pytest.approx(
            alone.storage_bytes[0] - -(-36 * np.array([*range(1, 9), 16, 32]) // 8)[:, None], nan_ok=True
        )
        assert np.array_equal(table.latency_s[0], table.latency_s[1], equal_nan=True)  # computed twice
    assert hw_models.storage_parts(workload, "kmeans")["codebooks"][1].tolist() == [0] * 10
    network[1].bias = network[0].bias
    assert trace(network, 6).parameters == 42


def test_a_shared_weight_is_stored_once_for_every_width_that_it_is_used_at() -> None:
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    for index in (1, 3):
        network[index].weight = network[0].weight
    workload = trace(network, 6)
    assert workload.tied_weights == ((0, 1, 3),)
    table = hw_models.load_target("edge").cost_table(workload)
    scales_and_biases = 4 * (4 * (4 * (6 + 1) + 4 * 6) // 4)

    def stored(*w_bits: int) -> float:
        costs = table.price(np.array([w_bits]), np.full((1, 4), 8))
        assert costs.storage_bytes is not None
        return float(costs.storage_bytes[0]) - scales_and_biases

    assert stored(8, 8, 8, 8) == 36 + 36
    assert stored(4, 4, 8, 4) == 18 + 36
    assert stored(4, 8, 8, 4) == 18 + 36 + 36
    assert stored(8, 4, 8, 4) == 36 + 18 + 36
    assert stored(2, 4, 8, 8) == 9 + 18 + 36 + 36


def test_weights_that_share_memory_are_one_and_those_of_another_module_are_counted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.hidden(self.words(x)))
            return result

    network = Tied()
    workload = hw_models.trace(network, torch.zeros(1, 3, dtype=torch.long))
    assert workload.parameters == sum(p.numel() for p in network.parameters())
    assert hw_models.float_bytes(workload) == 4 * 60  # looked up in float, beside what the head stores
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight.data = first.weight.data
    assert trace(nn.Sequential(first, second), 6).parameters == 48
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))
    assert trace(normed, 6).parameters == 42
    first.gain = nn.Parameter(torch.ones(3))
    assert trace(first, 6).parameters == 45


class Residual(nn.Module):
    """x + f(x), f being two convolutions with a norm and an activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.norm(self.first(x)))) + x
        return result


def peak(workload: hw_models.Workload, *a_bits: int) -> int:
    return int(hw_models.peak_activation_bytes(workload, np.array(a_bits)))


def test_peak_of_a_chain_is_the_largest_input_and_output() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(128, 3))
    workload = trace(network, 1, 8, 8)
    assert peak(workload, 8, 8, 8) == 64 * 4 + 64 * 2
    assert peak(workload, 8, 4, 8) == 64 * 4 // 2 + 64 * 2
    assert peak(workload, 8, 1, 1) == 64 + 64 * 4 // 8  # now the image and the first output are the most


def test_a_shortcut_is_held_while_the_other_branch_runs() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 1), Residual(), nn.Conv2d(4, 1, 1))
    workload = trace(network, 2, 8, 8)
    # At the block's second convolution: its input of 16 channels, its output of 4, and the shortcut of 4.
    assert peak(workload, 8, 8, 8, 8) == 64 * (16 + 4 + 4)
    assert peak(workload, 8, 4, 8, 8) == 64 * (16 + 4) + 64 * 4 // 2
    without = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 1, 1))
    assert peak(trace(without, 2, 8, 8), 8, 8, 8, 8) == 64 * (16 + 4)


def test_what_no_layer_reads_is_float() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert peak(trace(network, 1, 8, 8), 8, 8) == 64 + 64 * 8 * 4


def test_peaks_of_many_policies_and_batches_at_once(network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(3, 1, 8, 8))
    assert workload.buffers == trace(network, 1, 8, 8).buffers
    bits = np.random.default_rng(0).integers(1, 9, (4, 2, 5))
    peaks = hw_models.peak_activation_bytes(workload, bits)
    assert peaks.shape == (4, 2)
    assert peaks[3, 1] == peak(workload, *bits[3, 1])
    eights = np.full(5, 8)
    assert hw_models.peak_activation_bytes(workload, eights, batch=16) == 16 * peak(workload, *eights)
    for bad, message in ((np.ones(4, int), "5 layers"), (np.full(5, 9), "not 9"), (np.ones(5), "integers")):
        with pytest.raises(ValueError, match=message):
            hw_models.peak_activation_bytes(workload, bad)
    with pytest.raises(ValueError, match="no record of its activations"):
        hw_models.peak_activation_bytes(hw_models.Workload(workload.layers), eights)
