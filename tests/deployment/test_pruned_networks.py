"""A network from which channels were removed is deployed as any other, with the same answers, by every exporter."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment import EXPORTERS
from haq.deployment.exporter import Exporter, Samples, Verdict
from haq.deployment.graph import capture
from haq.networks.mobilenet_mini import mobilenet_mini
from hw_models import trace
from quantizers.pruning.groups import channel_groups
from quantizers.pruning.removal import mask_channels, remove_channels
from tests.conftest import images

NEEDED = {
    "tvm": ("tvm",),
    "onnx": ("onnx", "onnxruntime"),
    "qonnx": ("onnx", "onnxruntime", "qonnx"),
    "c": (),
    "executorch": ("executorch",),
}


class Branches(nn.Module):
    """A concatenation, a grouped convolution, a residual and a squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 10, 5, stride=1, padding=2)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.down, self.up = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))), 2)
        x = F.relu(x + self.grouped(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        made: Tensor = self.head(F.adaptive_avg_pool2d(x, 3).flatten(1))
        return made


def pruned(network: nn.Module, share: float, seed: int) -> nn.Module:
    """Remove channels at random; what is left are odd numbers of them, and sometimes one."""
    x = images(4)
    groups = channel_groups(network, x)
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, group in groups.items():
        count = group.count(share) // group.unit
        units = torch.randperm(group.units, generator=generator)[:count].sort().values.tolist()
        kept[name] = [unit * group.unit + place for unit in units for place in range(group.unit)]
    smaller, masked = remove_channels(network, groups, kept), mask_channels(network, groups, kept)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), masked(x), rtol=1e-4, atol=1e-5)
    return smaller


@functools.cache
def case(name: str) -> tuple[nn.Module, Tensor]:
    """Return a quantized network and images; the cheapest network has a channel in each group."""
    kind, share, bits = {
        "branches": (Branches, 0.6, (4, 5)),
        "mini": (mobilenet_mini, 0.13, (8, 8)),
        "one channel": (Branches, 0.01, (3, 8)),
    }[name]
    torch.manual_seed(0)
    network = kind().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    smaller = pruned(network, share, 1)
    x = images(32)
    return Q.quantize(smaller, dict.fromkeys(Q.BitPolicy.uniform(smaller, 8, 8), bits), calibrate=x).eval(), x


def deployed(exporter: Exporter, network: nn.Module, x: Tensor, folder: Path) -> Verdict:
    exporter.check(network)
    graph = capture(network, x[:1])
    path = folder / exporter.output
    options = {"threads": 1} if "threads" in exporter.options else {}
    exporter.export(network, graph, x, path, notes={"network": "of a test"}, options=options, on_progress=lambda *told: None)
    return exporter.compare(network, graph, Samples(x, x, lambda: [(x, torch.zeros(len(x)))]), path)


NETWORKS = ("branches", "mini", "one channel")
# To compile takes long, and so do networks of many layers. Each exporter has a network, and each network an exporter.
LONG = {("tvm", "mini"), ("tvm", "branches"), ("qonnx", "mini"), ("c", "mini"), ("c", "branches")}
CASES: list[Any] = [
    pytest.param(to, name, marks=pytest.mark.slow) if (to, name) in LONG else (to, name) for to in NEEDED for name in NETWORKS
]


@pytest.mark.parametrize(("to", "name"), CASES)
def test_answers_are_equal(to: str, name: str, tmp_path: Path) -> None:
    if lacking := [module for module in NEEDED[to] if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{lacking[0]} is not installed")
    network, x = case(name)
    verdict = deployed(EXPORTERS.get(to)(), network, x, tmp_path)
    assert verdict.same_answers, verdict.rows


def test_every_exporter_is_tried() -> None:
    assert set(NEEDED) == set(EXPORTERS)


@pytest.mark.slow
def test_what_is_deployed_is_smaller(tmp_path: Path) -> None:
    """The file holds the smaller layers' weights alone."""
    whole = Q.quantize(mobilenet_mini().eval(), Q.BitPolicy.uniform(mobilenet_mini(), 8, 8), calibrate=images(8)).eval()
    network, x = case("mini")
    sizes = []
    for number, made in enumerate((network, whole)):
        folder = tmp_path / str(number)
        folder.mkdir()
        deployed(EXPORTERS.get("c")(), made, x, folder)
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    assert sizes[0] < 0.2 * sizes[1]


def test_the_workload_is_of_the_smaller_network() -> None:
    network, x = case("mini")
    floats = Q.float_copy(network)
    shapes = {layer.name: (layer.in_channels, layer.out_channels) for layer in trace(floats, x[:1]).layers}
    for name, layer in Q.quant_layers(network).items():
        assert layer.weight.shape[0] == shapes[name][1]
    assert shapes["classifier"] == (network.get_submodule("classifier").weight.shape[1], 10)
