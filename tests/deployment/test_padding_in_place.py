"""Maps are written into the padding of the layer that reads them, if it is alone, and are what they were without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq import deploy
from haq.deployment import tvm as tvm_code
from haq.deployment.program import Program
from hw_models.tvm_cpu.kernels import Direct
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
    # Behind the stem, and before `strided`, whose last row needs nothing below; what `dilated` reads `beside` reads, too.
    assert sorted(deployed.description["frames"].values()) == [[1, 0, 3, 3], [1, 1, 1, 1]]


class Wide(nn.Module):
    """Layers of 32 channels and more, with and without padding, behind each other and behind a pool and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.first = nn.Conv2d(32, 64, 3, 1, 1)
        self.second = nn.Conv2d(64, 64, 1)
        self.grouped = nn.Conv2d(64, 96, 3, 2, 1, groups=2)
        self.third = nn.Conv2d(96, 96, 3, 1, 1, groups=3)
        self.last = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2, 1)
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.second(x))
        x = torch.relu(self.third(torch.relu(self.grouped(x))))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("w", "a", "threads", "target"), [(1, 1, 1, None), (2, 2, 1, "x86-64-v3"), (1, 3, 2, None), (1, 2, 1, "x86-64")]
)
def test_bits_are_written_by_the_layer_before(
    w: int, a: int, threads: int, target: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that computes anything else than its integer program isn't compiled."""
    torch.manual_seed(0)
    network = Wide().eval()
    images = torch.randn(4, 3, 17, 14)
    policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=w, a=a), (w, a))
    schemes: dict[str, Q.Scheme] = {name: Q.Linear() for name in policy}
    if a == 1:
        schemes |= {"first": Q.Binary(), "grouped": Q.Binary(), "third": Q.Binary()}
    quantized = Q.quantize(network, policy, scheme=schemes, calibrate=images).eval()
    made: list[tvm_code.Part] = []

    def seen(program: Program, *given: Any, **options: Any) -> list[tvm_code.Part]:
        made[:] = parts(program, *given, **options)
        return made

    parts = tvm_code.parts
    monkeypatch.setattr(tvm_code, "parts", seen)
    deploy.to_tvm(quantized, images, tmp_path, threads=threads, target=target)
    written = [part.name for part in made if isinstance(part.code, Direct) and part.code.how == "bits" and part.code.framed]
    # The first one's input is written by a pool, the third one's by groups of 48 channels, which are whole blocks.
    assert {"second", "grouped", "third"} <= set(written)
