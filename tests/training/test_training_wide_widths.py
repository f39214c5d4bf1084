"""Policies with 16 bits and float, of both operands or of one, are fine-tuned and reconstructed like any other."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import data, networks, training
from haq.training.config import Outcome
from haq.training.reconstruction import reconstruct
from tests.conftest import brightest, fitted_network, images

Bits = tuple[int | None, int | None]
# Of the stem, the depthwise, the pointwise and the linear layers.
MIXED: list[Bits] = [(16, 16), (3, None), (3, 16), (None, 3), (16, 3)]


@functools.cache
def given() -> tuple[networks.Network, data.Split]:
    module = fitted_network()
    x = images(160, 3)
    return networks.Network("small", module, (1, 8, 8)), data.Split(x, brightest(x))


def quantized(bits: list[Bits] | Bits, scheme: str = "linear") -> nn.Module:
    network, split = given()
    names = list(Q.BitPolicy.uniform(network.module, w=8, a=8))
    if isinstance(bits, tuple):
        bits = [bits] * len(names)
    policy = dict(zip(names, bits, strict=True))
    return Q.quantize(network.module, policy, scheme=scheme, calibrate=split.images[torch.arange(64)]).eval()


def saved_and_loaded(network: nn.Module, path: Path) -> nn.Module:
    networks.save_quantized(path / "q.safetensors", network)
    return networks.load_quantized(path / "q.safetensors", module=given()[0].module)


@pytest.mark.parametrize("scheme", ["linear", "lsq"])
def test_fine_tuning_helps_a_mixed_policy(scheme: str, tmp_path: Path) -> None:
    network, split = given()
    before = quantized(MIXED, scheme)
    outcomes: list[Outcome] = []
    tuned = training.finetune(network, before, split, epochs=4, seed=0, on_outcome=outcomes.append)
    assert outcomes[0].best.loss < outcomes[0].before.loss
    assert Q.get_policy(tuned) == Q.get_policy(before)
    for name, (_, a) in Q.get_policy(tuned).items():
        # The scales that the policy needs are trained, and no others.
        one, other = Q.quant_layers(before)[name].activation_scale, Q.quant_layers(tuned)[name].activation_scale
        changed = (one != other).nonzero().flatten().tolist()
        assert changed in ([], [] if a is None else [Q.WIDTHS.index(a)])
    again = saved_and_loaded(tuned, tmp_path)
    assert torch.equal(again(images(8, 1)), tuned(images(8, 1)))


@pytest.mark.parametrize("bits", [(16, 16), (None, 16), (16, None), (None, None)], ids=str)
def test_fine_tuning_never_makes_wide_policies_worse(bits: Bits) -> None:
    network, split = given()
    outcomes: list[Outcome] = []
    tuned = training.finetune(network, quantized(bits), split, epochs=1, seed=0, on_outcome=outcomes.append)
    assert outcomes[0].best.loss <= outcomes[0].before.loss
    x = images(160, 3)[:64]  # which it was calibrated with
    assert torch.allclose(tuned(x), network.module(x), atol=0.01)


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haq.training.reconstruction.ITERATIONS", 80)


def test_reconstruction_of_a_mixed_policy(tmp_path: Path, few_iterations: None) -> None:
    """Roundings are learned where weights have bits; what is in float stays as it is."""
    network, split = given()
    before = quantized(MIXED)
    found = reconstruct(network, before, split, seed=0)
    assert found.kept
    assert found.after.loss < found.before.loss
    assert Q.get_policy(found.network) == Q.get_policy(before)
    for layer in Q.quant_layers(found.network).values():
        if layer.weight_bits is None:
            assert torch.equal(layer.quantized_weight(), layer.weight)
        elif layer.weight_bits <= 3:
            assert layer.tailored_offset is not None
            assert int(layer.tailored_offset.abs().sum()) > 0
    again = saved_and_loaded(found.network, tmp_path)
    assert torch.equal(again(images(8, 1)), found.network(images(8, 1)))


@pytest.mark.parametrize("bits", [(8, 16), (16, None)], ids=str)
def test_reconstruction_never_makes_wide_policies_worse(bits: Bits, few_iterations: None) -> None:
    network, split = given()
    found = reconstruct(network, quantized(bits), split, seed=0)
    assert found.best.loss <= found.before.loss


def test_without_quantized_weights_there_is_no_rounding_to_learn() -> None:
    network, split = given()
    with pytest.raises(ValueError, match="no layer has quantized weights at the present policy"):
        reconstruct(network, quantized((None, 8)), split, seed=0)
