"""Maps are written into the padding of the layer that reads them, if it is alone, and are what they were without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from hw_models.tvm_cpu.target import CpuTarget
from tests.deployment.test_deployment import assert_same, chosen_unmeasured

pytest.importorskip("tvm")


class Padded(nn.Module):
    """Padding of every kind, behind all that writes through an epilogue; one map is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.pointwise = nn.Conv2d(32, 16, 1)
        self.strided = nn.Conv2d(16, 32, (3, 5), 2, (1, 3))
        self.dilated = nn.Conv2d(32, 32, 3, 1, 2, dilation=2, groups=2)
        self.beside = nn.Conv2d(32, 32, 1)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depthwise(x))
        x = self.strided(torch.relu(self.pointwise(x)))
        x = torch.relu(self.dilated(x) + self.beside(x))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def unmeasured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuTarget, "fastest", chosen_unmeasured)
        yield


@pytest.mark.parametrize("bits", [8, 4])
def test_maps_lie_within_padding(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Padded().eval()
    images = torch.randn(4, 3, 15, 18)
    policy = Q.BitPolicy.uniform(network, w=bits, a=bits)
    quantized = Q.quantize(network, policy, calibrate=images).eval()
    deployed = assert_same(quantized, images, tmp_path)
    frames = {name.split(":")[0]: sides for name, sides in deployed.description["frames"].items()}
    # Of (8, 9) by (3, 5) with a stride of 2 the last row needs no padding below.
    assert sorted(frames.values()) == [[1, 0, 3, 3], [1, 1, 1, 1]] or [1, 1, 1, 1] in frames.values()
    assert len(frames) >= 2
