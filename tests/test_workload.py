"""Tracing finds every layer that is called, with exact sizes, and leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hw_models
from haq import models


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


# Conv and linear MACs, batch 1, 3x224x224: two or three libraries agree on each but the last, which has one source.
@pytest.mark.parametrize(
    ("name", "macs", "layers"),
    [
        ("timm:mobilenetv1_100", 568_740_352, 28),
        ("timm:mobilenetv2_100", 300_774_272, 53),
        ("torchvision:mobilenet_v2", 300_774_272, 53),
        ("torchvision:resnet18", 1_814_073_344, 21),
        ("pytorchcv:mobilenet_w1", 568_740_352, 28),
        ("efficientnet-lite0", 385_187_552, 50),
    ],
)
def test_published_networks(name: str, macs: int, layers: int) -> None:
    network = models.load(name, pretrained=False)
    workload = hw_models.trace(network.module, torch.zeros(1, *network.input_shape))
    assert (workload.macs, len(workload)) == (macs, layers)


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


def test_nothing_to_quantize_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no Conv1d, Conv2d or Linear.*Flatten, ReLU"):
        hw_models.trace(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.zeros(1, 3))


@pytest.mark.parametrize("example", [(), (torch.zeros(0, 1, 8, 8),), (torch.tensor(1.0),), ("text",)])
def test_an_example_is_needed(network: nn.Module, example: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="example input"):
        hw_models.trace(network, *example)
