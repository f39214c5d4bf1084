"""A quantized network never computes in float without a word: it refuses, or `quantize` names what stays in float."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from tests.conftest import images, small_network

ROWS = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))


def quietly(network: nn.Module, policy: Mapping[str, Any], **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Q.LeftInFloat)
        return Q.quantize(network, policy, **{"calibrate": ROWS, **options})


def two_bits(network: nn.Module) -> dict[str, Any]:
    """Every layer at two bits, but those that attention computes itself."""
    return {name: (None, None) if "out_proj" in name else (2, 2) for name in Q.BitPolicy.uniform(network, 2, 2)}


class Padded(nn.Module):
    """Tells the encoder which rows are padding: it then packs the others into a nested tensor, if it may."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(len(x), 5, dtype=torch.bool)
        mask[0, 3:] = True
        result: Tensor = self.encoder(x, None, mask)
        return result


class Subclass(nn.TransformerEncoderLayer):
    pass


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x, x)
        return result


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
        lambda: Subclass(16, 2, 32, 0.0, activation="gelu", batch_first=True, norm_first=True),
        Padded,
        Both,
    ],
    ids=["layer", "subclass", "padded", "transformer"],
)
def test_transformers_take_no_path_around_their_layers(make: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make().eval()
    with torch.no_grad():
        plain = network(ROWS)
    qnetwork = quietly(network, two_bits(network))
    expected = qnetwork(ROWS).detach()  # with gradients torch calls every layer
    assert (expected - plain).norm() > 0.02 * plain.norm()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(qnetwork(ROWS), expected)
            torch.testing.assert_close(copy.deepcopy(qnetwork)(ROWS), expected)
    with torch.no_grad():
        assert torch.equal(Q.float_copy(qnetwork)(ROWS), plain)


@pytest.mark.parametrize("options", [{}, {"scheme": "dorefa", "calibrate": None}])
def test_a_layer_that_attention_only_reads_takes_no_bits(options: dict[str, Any]) -> None:
    network = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    policy = two_bits(network)
    with pytest.raises(ValueError, match=r"layer 'self_attn.out_proj' is never called: MultiheadAttention reads its weight"):
        quietly(network, policy | {"self_attn.out_proj": (4, None)}, **options)
    del policy["self_attn.out_proj"]
    with pytest.warns(Q.LeftInFloat, match=r"self_attn \(MultiheadAttention\), self_attn.out_proj"):
        Q.quantize(network, policy, **{"calibrate": ROWS, **options})


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self.out_proj(F.scaled_dot_product_attention(x, x, x))
        return result


def test_attention_that_calls_its_layer_has_it_quantized() -> None:
    network = nn.Sequential(OwnAttention(16, 2)).eval()
    qnetwork = quietly(network, {"0.out_proj": (2, 2)})
    assert isinstance(qnetwork.get_submodule("0.out_proj"), Q.QuantLayer)
    assert not torch.allclose(qnetwork(ROWS), network(ROWS))


class Reader(nn.Module):
    """Calls one layer, and reads the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)
        self.matrix = nn.Parameter(torch.eye(16))
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.linear(self.called(x), self.read.weight, self.read.bias) @ self.matrix


def test_what_a_function_reads_is_named() -> None:
    named = r"left in float: read.weight \(read by linear\), matrix \(read by matmul\);"
    with pytest.warns(Q.LeftInFloat, match=named) as told:
        Q.quantize(Reader(), {"called": (4, 4)}, calibrate=ROWS)
    assert len(told) == 1
    with pytest.raises(ValueError, match="layer 'read' is never called: a function .* reads its weight"):
        quietly(Reader(), {"called": (4, 4), "read": (4, None)})


class Lora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)
        self.low = nn.Parameter(torch.zeros(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.low.T @ self.low


class TiedBack(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.weight  # both are the quantized weight


def test_a_layer_may_read_its_own_weight_and_nothing_else() -> None:
    with pytest.warns(Q.LeftInFloat, match="0.low"):
        Q.quantize(nn.Sequential(Lora()), {"0": (4, 4)}, calibrate=ROWS)
    Q.quantize(nn.Sequential(TiedBack(16, 16)), {"0": (4, 4)}, calibrate=ROWS)


class Conv1D(nn.Module):
    """As a well-known library of transformers has it: a linear layer that is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.zeros(8))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.up, self.volume = nn.ConvTranspose2d(1, 1, 1), nn.Conv3d(1, 1, 1)
        self.gru, self.cell, self.pair = nn.GRU(16, 16), nn.LSTMCell(16, 4), nn.Bilinear(16, 16, 4)
        self.other = Conv1D()
        self.normed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(2, 2, 3))
        # These multiply no matrix.
        self.table, self.norm, self.slope = nn.Embedding(4, 16), nn.LayerNorm((5, 16)), nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def test_modules_that_stay_in_float_are_named_once() -> None:
    kinds = (
        r"up \(ConvTranspose2d\), volume \(Conv3d\), gru \(GRU\), cell \(LSTMCell\), pair \(Bilinear\), other \(Conv1D\), "
        r"normed \(ParametrizedConvTranspose1d\);"
    )
    for options in ({"calibrate": ROWS}, {"scheme": "dorefa"}):
        with pytest.warns(Q.LeftInFloat, match=f"left in float: {kinds}") as told:
            Q.quantize(Zoo(), {"linear": (4, 4)}, **options)
        assert len(told) == 1
        assert told[0].filename == __file__


class Branches(nn.Module):
    """Takes one of two branches, and in training a head beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.head(x)
        branch = self.bright
        if x.mean() < 0:
            branch = self.dark
        result: Tensor = branch(input=x)
        return result


def test_a_branch_that_calibration_never_took_is_refused_when_it_is_taken() -> None:
    network, bright = Branches().eval(), ROWS.abs()
    qnetwork = Q.quantize(network, {"bright": (4, 4)}, calibrate=bright)
    again = Q.quantize(network, {"bright": (4, 4)}, state=Q.quantizer_state(qnetwork))
    for made in (qnetwork, again, copy.deepcopy(qnetwork)):
        assert made(bright).isfinite().all()
        with pytest.raises(ValueError, match="layer 'dark' is called, but the policy lacks it"):
            made(-bright)
    with pytest.warns(Q.LeftInFloat, match="layer 'head' is trained in float"):
        qnetwork.train()(bright)
    assert torch.equal(Q.float_copy(qnetwork).eval()(-bright), network(-bright))


def test_a_layer_without_calibration_never_runs_at_a_made_up_scale() -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    seen = Q.quantize(network, {"0": (4, 4)}, calibrate=ROWS)
    unseen = Q.quantize(network, {"0": (4, None)})
    sentence = "layer '0': its input has no scale for 4 bits"
    with pytest.raises(ValueError, match=sentence):
        Q.set_policy(unseen, {"0": (4, 4)})
    with pytest.raises(ValueError, match=sentence):
        Q.load_quantizer_state(seen, Q.quantizer_state(unseen))
    assert seen.get_submodule("0").calibrated
    unseen.get_submodule("0").activation_bits = 4  # type: ignore[assignment]
    with pytest.raises(ValueError, match=sentence):
        unseen(ROWS)


def test_an_ordinary_network_is_quantized_without_a_word() -> None:
    network = small_network()
    Q.quantize(network, Q.BitPolicy.uniform(network, 4, 4), calibrate=images(8))
