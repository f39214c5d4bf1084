"""Every kind of operation is read off a network, and computes what the network does, for any number of images."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment.graph import Graph, capture, evaluate


class Behind(nn.Module):
    """A layer, and an operation behind it."""

    def __init__(self, operation: Callable[..., Any], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, channels, 3, padding=1)
        self.operation = operation
        self.takes_module = len(inspect.signature(operation).parameters) == 2
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))
        self.register_buffer("beta", torch.randn(channels))

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        if self.takes_module:
            return self.operation(x, self)
        return self.operation(x)


def graph_of(network: nn.Module, x: Tensor) -> Graph:
    """Capture it and check that its nodes give what it gives, for one image and for several."""
    network = network.eval()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=x)
    graph = capture(quantized, x)
    layers = {name: network.get_submodule(name) for name in graph.layers}
    names = set()
    for count in (1, len(x)):
        with torch.no_grad():
            for node, made in evaluate(graph, layers, x[:count]):
                assert made.shape == (node.dims[0] * count, *node.dims[1:])
                assert set(node.inputs) <= names
                names.add(node.name)
            assert torch.allclose(made, network(x[:count]), rtol=1e-4, atol=1e-5)
    return graph


def behind(operation: Callable[..., Any], channels: int = 4) -> Graph:
    return graph_of(Behind(operation, channels), torch.randn(3, 3, 6, 8, generator=torch.Generator().manual_seed(0)))


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes[2:-1]]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.5),
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 2.0),
    "pow": lambda x: x**2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function = FUNCTIONS[name]
    graph = behind(lambda x: function(x))
    assert kinds(graph) == ["function"]
    assert graph.nodes[2].function == name
    if name == "gelu":
        assert graph.nodes[2].arguments == {"approximate": "tanh"}


WRITTEN: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "silu": [lambda x: x * torch.sigmoid(x), lambda x: x / (1 + (-x).exp())],
    "hardswish": [lambda x: x * F.relu6(x + 3) / 6, lambda x: x * F.hardsigmoid(x), lambda x: x * ((x + 3).clamp(0, 6) / 6)],
    "hardsigmoid": [lambda x: F.relu6(x + 3.0) / 6.0],
    "mish": [lambda x: x * F.softplus(x).tanh()],
    "gelu": [
        lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        lambda x: 0.5 * x * (1 + (0.7978845608 * (x + 0.044715 * x**3)).tanh()),
    ],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_functions_that_are_written_out(name: str) -> None:
    for function in WRITTEN[name]:
        graph = behind(function)
        assert kinds(graph) == ["function"]
        assert graph.nodes[2].function == name
    # In front of it and behind it is what is there.
    graph = behind(lambda x: (WRITTEN[name][0](x * 2) * 0.5).relu())
    assert kinds(graph) == ["batch_norm", "function", "batch_norm", "relu"]


def test_functions_that_are_nearly_written_out_stay_as_they_are() -> None:
    for function in (lambda x: x * (x * 1.702).sigmoid(), lambda x: (x * x.sigmoid()).clamp(max=50), lambda x: x * x.relu()):
        assert kinds(behind(function))[-1] != "function"
    # What is between is read by others.
    graph = behind(lambda x: x * F.relu6(x + 3) / 6 + F.relu6(x + 3).mean((2, 3), keepdim=True))
    assert kinds(graph).count("function") == 1

    def gated(x: Tensor) -> Tensor:
        gate = x.sigmoid()
        return x * gate + gate

    assert kinds(behind(gated)) == ["function", "mul", "add"]


def test_slopes_per_channel() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4, 0.1), nn.LeakyReLU(0.3)), torch.randn(2, 3, 4, 4))
    assert kinds(graph) == ["prelu", "prelu"]
    assert np.allclose(graph.nodes[2].scale, [0.1] * 4)
    assert np.allclose(graph.nodes[3].scale, [0.3] * 4)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * 0.5 + 1,
        lambda x: 1 - x / 3,
        lambda x: -x,
        lambda x, own: x * own.gamma + own.beta.view(1, -1, 1, 1),
        lambda x, own: own.gamma - x,
        lambda x, own: x * own.gamma.sigmoid(),
    ],
)
def test_constants_are_batch_norms(operation: Callable[..., Tensor]) -> None:
    assert set(kinds(behind(operation))) == {"batch_norm"}


def test_sums_and_products_of_results() -> None:
    assert kinds(behind(lambda x: x * x.mean((2, 3), keepdim=True))) == ["avg_pool", "mul"]
    assert kinds(behind(lambda x: x + x.amax((2, 3), True).sigmoid())) == ["max_pool", "function", "add"]
    assert kinds(behind(lambda x: x - x[:, :1] * 2)) == ["move", "batch_norm", "batch_norm", "add"]
    assert kinds(behind(lambda x: x / (1 + x.abs()))) == ["function", "batch_norm", "function", "mul"]
    assert kinds(behind(lambda x: torch.add(x, x.relu(), alpha=3))) == ["relu", "batch_norm", "add"]


def shuffled(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


MOVES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "cat": (lambda x: torch.cat([x, x.relu()], 1), ["cat"]),
    "cat with zeros": (lambda x: torch.cat([x, x.new_zeros(len(x), 2, 6, 8)], 1), ["cat"]),
    "stack": (lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2), ["stack", "reshape"]),
    "split": (lambda x: x.split([1, 3], 1)[1], ["slice"]),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), ["slice", "slice", "cat"]),
    "unbind": (lambda x: x.unbind(1)[2].unsqueeze(1), ["select", "reshape"]),
    "slice": (lambda x: x[:, 1:, ::2, 1:-1:3], ["slice"]),
    "narrow": (lambda x: x.narrow(1, 1, 2), ["slice"]),
    "permute": (lambda x: x.permute(0, 1, 3, 2), ["permute"]),
    "transpose": (lambda x: x.transpose(2, -1), ["permute"]),
    "reshape": (lambda x: x.unflatten(1, (2, 2)).flatten(3), ["reshape", "reshape"]),
    "shuffle": (shuffled, ["reshape", "permute", "reshape"]),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), ["channel_shuffle"]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), ["pixel_shuffle"]),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), ["pixel_unshuffle"]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1, 1, 0)), ["pad"]),
    "reflect": (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), ["pad"]),
    "circular": (lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), ["pad"]),
    "replicate": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), ["pad"]),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), ["roll"]),
    "flip": (lambda x: x.flip(-1), ["flip"]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), ["upsample_nearest"]),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), ["repeat"]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), ["gather"]),
    "expand": (lambda x: x[:, :, :1].expand(-1, -1, 6, -1), ["slice", "expand"]),
    "groups as images": (lambda x: x.view(2, 2, 6, 8).flip(1).view(1, 4, 6, 8), ["reshape", "flip", "reshape"]),
    "a list of places": (lambda x: x[:, [2, 0]], ["gather"]),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    operation, operations = MOVES[name]
    if name == "groups as images":
        # The batch is in a dimension with something else, and so is it in torch.
        count = 2
        network = Behind(lambda x: x.view(-1, count, 6, 8).flip(1).view(-1, 4, 6, 8))
        graph = graph_of(network, torch.randn(3, 3, 6, 8))
    else:
        graph = behind(operation)
    found = [node.operation for node in graph.nodes if node.kind == "move"]
    while len(found) > len(operations) and found.count("slice") > operations.count("slice"):
        found.remove("slice")  # torch has one for each dimension
    assert found == operations


def test_parts_are_told_by_where_they_begin() -> None:
    graph = behind(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))
    first, second, both = graph.nodes[2:5]
    assert first.arguments == {"dim": 1, "start": 0, "end": 2, "step": 1}
    assert second.arguments == {"dim": 1, "start": 2, "end": 4, "step": 1}
    assert both.arguments == {"dim": 1}


@pytest.mark.parametrize(
    ("pool", "has_window"),
    [
        (nn.AvgPool2d(3, 2, 1), True),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), False),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.AdaptiveAvgPool2d(2), True),
        (nn.AdaptiveAvgPool2d((4, 5)), False),
    ],
)
def test_average_pools(pool: nn.Module, has_window: bool) -> None:
    graph = behind(lambda x: pool(x))
    assert kinds(graph) == ["avg_pool"]
    assert (graph.nodes[2].window is not None) == has_window
    assert (graph.nodes[2].ranges is None) == has_window


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: x.amax(3),
        lambda x: x.mean(2, keepdim=True),
    ],
)
def test_other_pools(operation: Callable[..., Tensor]) -> None:
    assert kinds(behind(operation))[0] in ("max_pool", "avg_pool")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [{"scale_factor": 2.0}, {"size": (9, 5)}, {"scale_factor": (1.5, 0.6)}])
def test_bilinear_interpolation(size: dict[str, Any], align_corners: bool) -> None:
    graph = behind(lambda x: F.interpolate(x, mode="bilinear", align_corners=align_corners, **size))
    assert kinds(graph) == ["resize"]


@pytest.mark.parametrize("zero_point", [0, 37])
def test_quantizers_between_layers(zero_point: int) -> None:
    graph = behind(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, zero_point, 0, 255) + x)
    node = graph.nodes[2]
    assert kinds(graph) == ["quantize", "add"]
    assert (float(node.scale), node.zero_point, node.low, node.high) == (0.02, zero_point, 0, 255)


def test_quantizers_whose_scale_is_a_tensor() -> None:
    class Quantizing(Behind):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(self.layer(x), self.scale, self.zero, -128, 127)

    network = Quantizing(lambda x: x)
    network.register_buffer("scale", torch.tensor(0.03))
    network.register_buffer("zero", torch.tensor(-5, dtype=torch.int32))
    node = graph_of(network, torch.randn(3, 3, 6, 8)).nodes[2]
    assert (float(node.scale), node.zero_point, node.low, node.high) == (pytest.approx(0.03), -5, -128, 127)


def test_signals() -> None:
    network = nn.Sequential(
        nn.Conv1d(2, 4, 5, 2, 1, dilation=2),
        nn.BatchNorm1d(4),
        nn.SiLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 6, 3, padding="same", groups=2),
        nn.AvgPool1d(3, 2, 1),
        nn.AdaptiveAvgPool1d(3),
        nn.Flatten(),
        nn.Linear(18, 5),
    )
    graph = graph_of(network, torch.randn(3, 2, 33))
    assert kinds(graph) == ["batch_norm", "function", "max_pool", "conv", "avg_pool", "avg_pool", "flatten", "linear"]
    first = graph.nodes[1]
    assert first.window is not None
    assert first.window.kernel == (1, 5)
    assert first.window.stride[1] == 2
    assert (first.window.padding, first.window.dilation) == ((0, 1), (1, 2))
    assert first.dims == (1, 4, 14)
    assert first.shape == (1, 14, 4)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_a_layer_s_padding_mode_is_a_move_of_its_own(mode: str) -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode)), torch.randn(3, 3, 6, 8))
    move, conv = graph.nodes[1:3]
    assert (move.kind, move.operation, move.module) == ("move", "pad", "0")
    assert move.arguments["mode"] == mode
    assert move.shape == (8, 12, 3)
    assert conv.window.padding == (0, 0)


def test_zeros_in_front_of_a_layer_are_a_move_and_its_own_are_in_its_window() -> None:
    graph = graph_of(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3, padding=1)), torch.randn(3, 3, 6, 8))
    move, conv = graph.nodes[1:3]
    assert (move.kind, conv.window.padding) == ("move", (1, 1))
    assert (move.index == -1).sum() == 3 * (8 * 10 - 6 * 8)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: x.softmax(1), "operation aten.softmax; deployable are Conv2d, Conv1d and Linear"),
        (lambda x: F.layer_norm(x, (8,)), "operation aten.layer_norm;"),
        (lambda x: x.mean(1), "over other dimensions than height and width"),
        (lambda x: x + torch.arange(8.0), "with a constant that differs from place to place"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "aten.pad with 2.0 instead of zeros"),
        (lambda x: x @ x.transpose(2, 3), "operation aten.matmul"),
        (lambda x: torch.cat([x, torch.ones(1, 1, 6, 8)], 1), "aten.cat of a constant or a parameter"),
        (lambda x: x.view(2, 2, 6, 8).relu(), "whose first dimension isn't the image's"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], "max_pool2d_with_indices"),
        (lambda x: F.adaptive_max_pool2d(x, 4), "from 6x8 to 4x4, which doesn't divide"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "upsample_bicubic2d"),
        (lambda x: x / 0.0, "by zero or by what isn't finite"),
    ],
)
def test_what_has_no_kind_is_refused_with_its_layer(operation: Callable[..., Tensor], message: str) -> None:
    network = nn.Sequential(Behind(lambda x: operation(x)))
    x = torch.randn(1, 3, 6, 8)
    quantized = Q.quantize(network, {"0.layer": (8, 8)}, calibrate=x)
    with pytest.raises(ValueError, match=rf"layer '0' \(Behind\) can't be deployed: .*{message}"):
        capture(quantized, x)
