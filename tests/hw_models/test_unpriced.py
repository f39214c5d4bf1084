"""No product is free: those outside of layers are refused, or listed with their MACs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hw_models

IN, OUT = 12, 8
Function = Callable[["Computed", Tensor], Tensor]


class Computed(nn.Module):
    """A product of (1, 12) with a weight of (12, 8) that is computed first, before a priced layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.ones(OUT))
        self.register_buffer("fixed", torch.randn(IN, OUT))
        self.head = nn.Linear(OUT, 4)
        self.function = function

    @property
    def computed(self) -> Tensor:
        return self.weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.function(self, x).relu())
        return result


PRODUCTS: dict[str, Function] = {
    "x @ (w * g)": lambda s, x: x @ s.computed,
    "one row": lambda s, x: (x[0] @ s.computed)[None],
    "mv": lambda s, x: torch.mv(s.computed.t(), x[0])[None],
    "linear": lambda s, x: F.linear(x, s.computed.t()),
    "a fixed matrix": lambda s, x: x @ s.fixed,
    "einsum": lambda s, x: torch.einsum("nchw,hwco->no", x.view(1, 3, 2, 2), s.computed.view(2, 2, 3, OUT)),
    "einsum of a weight": lambda s, x: torch.einsum("nchw,hwco->no", x.view(1, 3, 2, 2), s.weight.view(2, 2, 3, OUT)),
    "tensordot": lambda s, x: torch.tensordot(x, s.computed, 1),
    "bmm": lambda s, x: torch.bmm(x[None], s.computed[None])[0],
    "baddbmm": lambda s, x: torch.baddbmm(torch.zeros(1, 1, OUT), x[None], s.computed[None])[0],
    "addbmm": lambda s, x: torch.addbmm(torch.zeros(OUT), x[None], s.computed[None]),
    "addmv": lambda s, x: torch.addmv(torch.zeros(OUT), s.computed.t(), x[0])[None],
    "conv_tbc": lambda s, x: torch.conv_tbc(x[None], s.computed[None], torch.zeros(OUT))[0],
    "distances": lambda s, x: torch.cdist(x, s.computed.t()),
    "other distances": lambda s, x: torch.cdist(x, s.computed.t(), p=1),
    "sparse": lambda s, x: torch.sparse.mm(s.computed.t().to_sparse(), x.t()).t(),
    "rows": lambda s, x: (s.computed.t().to_sparse_csr() @ x.t()).t(),
    "vmap": lambda s, x: torch.vmap(lambda row: row @ s.computed)(x),
    "multiplied and summed": lambda s, x: (x[:, :, None] * s.computed).sum(1),
    "multiplied and averaged": lambda s, x: (x[:, :, None] * s.computed).mean(1),
    "in inference mode": lambda s, x: torch.inference_mode()(lambda: x @ s.computed)(),
    "in low precision": lambda s, x: torch.autocast("cpu", torch.bfloat16)(lambda: x @ s.weight)().float(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_computed_weight_is_listed(name: str) -> None:
    workload = hw_models.trace(Computed(PRODUCTS[name]), torch.randn(1, IN))
    assert workload.names == ("head",)
    (product,) = workload.unpriced
    assert (product.name, product.macs) == ("", IN * OUT)
    assert workload.unpriced_share == pytest.approx(IN * OUT / (IN * OUT + 4 * OUT))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, x: x @ s.weight, "layer of 'weight' computes 'mm'"),
        (lambda s, x: (x[:, :, None] * s.weight).sum(1), "layer of 'weight' computes 'mul, sum'"),
        (lambda s, x: torch.mv(s.weight.t(), x[0])[None], "layer of 'weight' computes 'mv'"),
        (lambda s, x: F.conv1d(x[:, :, None], s.computed.t()[:, :, None])[:, :, 0], "a function computes 'convolution'"),
        (lambda s, x: F.conv_transpose1d(x[:, :, None], s.computed[:, :, None])[:, :, 0], "a function computes 'convolution'"),
        (lambda s, x: _swallowed(lambda: x @ s.weight, x), "layer of 'weight' computes 'mm'"),
    ],
)
def test_a_product_with_a_trained_weight_is_refused(function: Function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hw_models.trace(Computed(function), torch.randn(1, IN))


def _swallowed(function: Callable[[], Tensor], x: Tensor) -> Tensor:
    try:
        return function()
    except ValueError:
        return x[:, :OUT]


@torch.library.custom_op("haq_tests::mixed", mutates_args=())
def mixed(x: Tensor, weight: Tensor) -> Tensor:
    """Compute a product as a library of somebody's would."""
    return x @ weight


def test_what_a_library_computes_with_two_matrices_may_be_a_product() -> None:
    (product,) = hw_models.trace(Computed(lambda s, x: mixed(x, s.computed)), torch.randn(1, IN)).unpriced
    assert (product.operation, product.macs) == ("haq_tests::mixed", IN * OUT)
    with pytest.raises(ValueError, match="the layer of 'weight' computes 'haq_tests::mixed'"):
        hw_models.trace(Computed(lambda s, x: mixed(x, s.weight)), torch.randn(1, IN))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_is_never_free(kind: type[nn.GRU] | type[nn.LSTM] | type[nn.RNN]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = kind(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.recurrent(x)[0])
            return result

    network = Network()
    with pytest.raises(ValueError, match="the layer of 'recurrent.* has no cost model"):
        hw_models.trace(network, torch.zeros(1, 3, 4))
    # With computed weights torch takes some of them apart, into products that can be counted.
    for name in [name for name, _ in network.recurrent.named_parameters()]:
        nn.utils.weight_norm(network.recurrent, name)
    gates = {nn.GRU: 3, nn.LSTM: 4, nn.RNN: 1}[kind]
    refused = ""
    macs = 0
    try:
        macs = sum(product.macs for product in hw_models.trace(network, torch.zeros(1, 3, 4)).unpriced)
    except ValueError as error:
        refused = str(error)
    assert macs == 3 * gates * 2 * 16 or "has no cost model" in refused


class Block(nn.Module):
    """Attention over 5 tokens of 8 channels in 2 heads: two products of activations, of 2 x 5 x 5 x 4 MACs each."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(len(x), 5, 8))
        return result


@pytest.mark.parametrize(("fused", "operation"), [(False, "bmm"), (True, "scaled_dot_product_attention")])
def test_attention_is_listed_by_module(fused: bool, operation: str) -> None:
    network = nn.Sequential(Block(fused), nn.Sequential(Block(fused)))
    workload = hw_models.trace(network, torch.zeros(1, 5, 8))
    assert workload.unpriced == hw_models.trace(network, torch.zeros(3, 5, 8)).unpriced
    assert [(p.name, p.operation, p.macs) for p in workload.unpriced] == [("0", operation, 400), ("1.0", operation, 400)]
    share = 800 / (800 + workload.macs)
    assert workload.unpriced_share == pytest.approx(share)
    words = f"{100 * share:.1f} % of the MACs ({operation} 0.0008 M in 0 and 1 more)"
    assert workload.unpriced_words == words
    assert f"not priced: {100 * share:.1f} % of the MACs" in repr(workload)
    with torch.inference_mode():
        assert hw_models.trace(network, torch.zeros(1, 5, 8)).unpriced == workload.unpriced


class Adapted(nn.Linear):
    """A linear layer with a further product of rank 2 in its forward."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down @ self.up


class Merged(Adapted):
    """The same, added to the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + (self.down @ self.up).t(), self.bias)


class Shrinking(nn.Conv2d):
    """A convolution that looks smaller than it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(super().forward(x), 2)


@pytest.mark.parametrize(
    ("layer", "example", "macs"),
    [
        (Adapted(), (1, 5, 8), 5 * 2 * 16),
        (Merged(), (1, 5, 8), 0),
        (Shrinking(3, 4, 3, padding=1), (1, 3, 8, 8), (64 - 16) * 3 * 4 * 9),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), (1, 5, 8), 0),
        (nn.utils.parametrizations.spectral_norm(nn.Conv1d(5, 5, 3)), (1, 5, 8), 0),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (1, 5, 8), 0),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 8, 8), 0),
        (nn.Conv2d(4, 4, 3, groups=2, dilation=2), (1, 4, 8, 8), 0),
    ],
)
def test_what_a_layer_computes_beside_its_own_product_is_listed(layer: nn.Module, example: tuple[int, ...], macs: int) -> None:
    workload = hw_models.trace(nn.Sequential(nn.Identity(), layer), torch.randn(example))
    assert sum(product.macs for product in workload.unpriced) == macs
    assert {product.name for product in workload.unpriced} <= {"1"}


def test_what_is_no_product_is_not_listed(network: nn.Module) -> None:
    """Gates, norms, activation functions, pooling."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x) * self.scale
            x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
            result: Tensor = self.norm(x.mean((2, 3)))
            return result * result

    workload = hw_models.trace(Gated(), torch.zeros(1, 3, 8, 8))
    assert (workload.unpriced, workload.unpriced_share, workload.unpriced_words) == ((), 0, "")
    assert "not priced" not in repr(workload)
    assert not hw_models.trace(network, torch.zeros(1, 1, 8, 8)).unpriced


def test_layers_called_by_keyword_or_by_two_names() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.again(self.first(input=x))
            return result

    workload = hw_models.trace(Network(), torch.zeros(1, 3, 8))
    assert workload.names == ("first",)
    assert [call.positions for call in workload.layers[0].calls] == [3, 3]
    assert workload.parameters == 72


def test_a_network_that_hides_its_tensors_is_one_sentence() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.vmap(self.layer)(x)
            return result

    with pytest.raises(ValueError, match="^Mapped can't be traced: .*"):
        hw_models.trace(Mapped(), torch.zeros(1, 3, 8))


def test_a_product_that_was_freed_is_taken_for_no_other() -> None:
    """As of norms by the mean of squares: what they square lies where a product lay before."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            for _ in range(20):
                # Nobody keeps it, so that the squares come where it was.
                self.weight * x
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)
            return x

    assert not hw_models.trace(Norms(), torch.ones(2, 5, 8)).unpriced
