"""Tracing finds every layer that is called, with exact sizes, and leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hw_models


def test_sizes_of_the_small_network(network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(2, 1, 8, 8))
    assert workload.names == ("stem", "depthwise", "pointwise", "hidden", "classifier")
    assert [layer.kind for layer in workload.layers] == ["conv", "depthwise", "pointwise", "linear", "linear"]
    assert [layer.macs for layer in workload.layers] == [
        16 * 9 * 16,
        16 * 9 * 16,
        16 * 16 * 16,
        64 * 16,
        16 * 4,
    ]
    assert [layer.parameters for layer in workload.layers] == [144, 144 + 16, 256 + 16, 1024 + 16, 64 + 4]
    assert workload.layers[0].input_size == (8, 8)
    assert workload.layers[0].output_size == (4, 4)


def test_macs_do_not_depend_on_the_batch(network: nn.Module) -> None:
    assert hw_models.trace(network, torch.zeros(1, 1, 8, 8)) == hw_models.trace(network, torch.zeros(5, 1, 8, 8))


class Shared(nn.Module):
    """One convolution called at two sizes, a linear layer over a sequence, a layer never called, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, (1, 3), padding="same", bias=False)
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(2, 5)
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.conv(self.pool(self.conv(x))) * scale
        result: Tensor = self.linear(x.flatten(2).transpose(1, 2))
        return result


def test_a_layer_called_twice_is_one_entry_with_both_sizes() -> None:
    workload = hw_models.trace(Shared(), torch.zeros(3, 2, 8, 4), torch.ones(1))
    conv, linear = workload.layers
    assert [call.output_size for call in conv.calls] == [(8, 4), (4, 2)]
    assert conv.macs == 2 * 2 * 3 * (8 * 4 + 4 * 2)
    assert (conv.kernel, conv.padding) == ((1, 3), (0, 1))
    assert linear.calls[0].output_size == (8, 1)
    assert linear.macs == 2 * 5 * 8
    assert "spare" not in workload.names


def test_modes_are_kept_and_no_hook_stays(network: nn.Module) -> None:
    network.train()
    network.norm.eval()
    hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    assert network.training
    assert not network.norm.training
    assert not any(module._forward_hooks for module in network.modules())


def test_grouped_layers() -> None:
    layer = hw_models.trace(nn.Conv2d(8, 12, 3, groups=4, dilation=2), torch.zeros(1, 8, 9, 9)).layers[0]
    assert (layer.kind, layer.groups, layer.weights, layer.macs) == (
        "grouped",
        4,
        12 * 2 * 9,
        12 * 2 * 9 * 25,
    )


def test_one_dimensional_convolutions_have_height_one() -> None:
    network = nn.Sequential(nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=1), nn.Conv1d(6, 6, 3, groups=6, padding="same"))
    first, second = hw_models.trace(network, torch.zeros(2, 4, 20)).layers
    assert (first.kind, first.kernel, first.stride, first.padding) == ("conv", (1, 5), (1, 2), (0, 2))
    assert (first.input_size, first.output_size, first.macs) == ((1, 20), (1, 10), 6 * 4 * 5 * 10)
    assert (second.kind, second.padding, second.macs) == ("depthwise", (0, 1), 6 * 3 * 10)


def test_rectangular_strided_and_dilated_layers() -> None:
    module = nn.Conv2d(3, 5, (3, 1), stride=(2, 3), padding=(4, 1), dilation=(3, 1))
    layer = hw_models.trace(module, torch.zeros(1, 3, 11, 14)).layers[0]
    expected = module(torch.zeros(1, 3, 11, 14)).shape
    assert layer.output_size == tuple(expected[2:])
    assert layer.macs == 5 * 3 * 3 * expected[2] * expected[3]
    assert (layer.stride, layer.dilation, layer.padding) == ((2, 3), (3, 1), (4, 1))


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.ConvTranspose2d(2, 2, 2), (2, 4, 4), r"layer of '1\.weight' computes 'convolution'"),
        (nn.Conv3d(2, 2, 1), (2, 4, 4, 4), "computes 'convolution'"),
        (nn.LSTM(4, 4), (4, 4), "has no cost model; priced are the modules Conv1d, Conv2d, Linear"),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), "'1.self_attn.in_proj_weight'"),
        (nn.Bilinear(4, 4, 2), (4,), None),
    ],
)
def test_a_layer_that_cannot_be_priced_is_named(module: nn.Module, shape: tuple[int, ...], message: str | None) -> None:
    class Network(nn.Sequential):
        def forward(self, x: Tensor) -> object:
            return self[1](x, x) if isinstance(self[1], nn.Bilinear) else self[1](x)

    with pytest.raises(ValueError, match=message):
        hw_models.trace(Network(nn.Identity(), module), torch.zeros(1, *shape))


def test_a_convolution_without_a_module_is_named() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, torch.ones(2, 2, 3, 3))

    with pytest.raises(ValueError, match="a function computes 'convolution'"):
        hw_models.trace(Functional(), torch.zeros(1, 2, 8, 8))


def test_attention_scores_have_no_weights_and_are_left_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(q @ k.transpose(1, 2), -1) @ v

    assert hw_models.trace(Attention(), torch.zeros(1, 5, 8)).names == ("qkv",)


def test_nothing_to_quantize_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no Conv1d, Conv2d or Linear.*Flatten, ReLU"):
        hw_models.trace(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.zeros(1, 3))


@pytest.mark.parametrize("example", [(), (torch.zeros(0, 1, 8, 8),), (torch.tensor(1.0),), ("text",)])
def test_an_example_is_needed(network: nn.Module, example: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="example input"):
        hw_models.trace(network, *example)


def test_a_workload_says_on_one_line_how_large_it_is(network: nn.Module) -> None:
    workload = hw_models.trace(network, torch.zeros(1, 1, 8, 8))
    said = f"5 layers, {workload.macs:,} MACs per image, {workload.parameters:,} parameters"
    assert repr(workload) == f"Workload({said})"
    html = workload._repr_html_()
    assert said in html
    assert "<td>stem</td><td>conv</td><td>1→16, 3x3 to 4x4</td><td>2,304</td><td>144</td>" in html
    assert "<td>classifier</td><td>linear</td><td>16→4</td><td>64</td><td>68</td>" in html
    assert html.count("<tr>") == 1 + 5 + 1
